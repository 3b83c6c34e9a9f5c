"""The HiCache backend, through the calls of SGLang's cache controller, on a stub of its interface (tests/engines)."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engines import use_engine

torch = pytest.importorskip("torch")
use_engine("sglang")

from engines.hostpools import LAYOUTS, HostPool, WithoutPages  # noqa: E402  # torch and the engine come first
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402  # the same
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)

from lynxproto.errors import ConfigError  # noqa: E402  # the same

KEYS = [f"{number:064x}" for number in range(4)]


def config(path, **kw):
    fields = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "a/model",
        "extra_config": {
            "backend_name": "lynx",
            "module_path": "lynxproto.integrations.sglang",
            "class_name": "LynxHiCache",
            "path": str(path),
        },
    }
    extra = {**fields["extra_config"], **kw.pop("extra", {})}
    return HiCacheStorageConfig(**{**fields, "extra_config": extra, **kw})


def backend(path, pool=None, **kw):
    """As SGLang's factory and controller make one."""
    settings = config(path, **kw)
    loaded = importlib.import_module(settings.extra_config["module_path"])
    cls = getattr(loaded, settings.extra_config["class_name"])
    assert issubclass(cls, HiCacheStorage)
    made = cls(settings, {})
    if pool is not None:
        made.register_mem_pool_host(pool)
        made.on_host_pools_registered()
    return made


def pages_of(pool, *pages):
    return [pool.get_data_page(page * pool.page_size).view(torch.uint8) for page in pages]


def assert_pages(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kv", [2, 1], ids=["mha", "mla"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_by_index(tmp_path, layout, kv):
    pool, target = HostPool(layout, kv=kv, seed=1), HostPool(layout, kv=kv)
    store = backend(tmp_path, pool)
    assert store.batch_exists(KEYS) == 0
    assert store.batch_set_v1(KEYS, pool.indices(0, 2, 3, 5)) == [True] * 4
    assert store.batch_exists(KEYS) == 4
    reader = backend(tmp_path, target)
    assert reader.batch_get_v1([KEYS[2], KEYS[0], "missing"], target.indices(1, 4, 5)) == [True, True, False]
    assert_pages(pages_of(target, 1, 4), pages_of(pool, 3, 0))
    assert not any(page.any() for page in pages_of(target, 0, 2, 3))


@pytest.mark.parametrize("layout", [*LAYOUTS, "another"])
def test_pages_that_sglang_copies(tmp_path, layout):
    pool, target = HostPool(layout, seed=2), HostPool(layout)
    store = backend(tmp_path, pool)
    assert store.batch_set(KEYS, [pool.get_data_page(index * pool.page_size) for index in range(4)])
    reader = backend(tmp_path, target)
    assert reader.exists(KEYS[0])
    places = [target.get_dummy_flat_data_page() for _ in range(3)]
    found = reader.batch_get([KEYS[3], "missing", KEYS[1]], places)
    assert found[1] is None
    for index, page in ((0, found[0]), (2, found[2])):
        assert page.data_ptr() == places[index].data_ptr()
        target.set_from_flat_data_page(index * target.page_size, page)
    assert_pages(pages_of(target, 0, 2), pages_of(pool, 3, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_dtypes(tmp_path, dtype):
    pool, target = HostPool(dtype=dtype, seed=3), HostPool(dtype=dtype)
    assert backend(tmp_path, pool).batch_set_v1(KEYS[:1], pool.indices(1)) == [True]
    assert backend(tmp_path, target).batch_get_v1(KEYS[:1], target.indices(0)) == [True]
    assert_pages(pages_of(target, 0), pages_of(pool, 1))


def test_both_ways_and_three_layouts_share_pages(tmp_path):
    pool = HostPool("layer_first", seed=4)
    assert backend(tmp_path, pool).batch_set_v1(KEYS[:1], pool.indices(2)) == [True]
    for layout in LAYOUTS[1:3]:
        target = HostPool(layout)
        reader = backend(tmp_path, target)
        flat = reader.get(KEYS[0], target.get_dummy_flat_data_page())
        target.set_from_flat_data_page(0, flat)
        assert reader.batch_get_v1(KEYS[:1], target.indices(1)) == [True]
        assert_pages(pages_of(target, 0), pages_of(target, 1))
        key = target.k_buffer[: target.page_size].transpose(0, 1) if layout == "page_first" else target.k_buffer[0]
        assert torch.equal(key, pool.k_buffer[:, 32:48])


@pytest.mark.parametrize(
    "other",
    [
        {"pool": {"heads": 4}},
        {"pool": {"page_size": 8}},
        {"pool": {"dtype": torch.float16}},
        {"pool": {"layout": "page_head"}},
        {"model_name": "another/model"},
        {"tp_rank": 1, "tp_size": 2},
        {"pp_rank": 1, "pp_size": 2},
    ],
    ids=str,
)
def test_what_does_not_fit_is_missing_and_stays(tmp_path, other):
    pool = HostPool(seed=5)
    store = backend(tmp_path, pool)
    store.batch_set_v1(KEYS[:1], pool.indices(0))
    other = dict(other)
    target = HostPool(**{"layout": "layer_first", **other.pop("pool", {})})
    stranger = backend(tmp_path, target, **other)
    assert stranger.batch_exists(KEYS) == 0
    assert stranger.batch_get_v1(KEYS[:1], target.indices(0)) == [False]
    assert store.batch_exists(KEYS) == 1


def test_ranks_with_the_same_latents_share_them(tmp_path):
    pool, target = HostPool(kv=1, seed=6), HostPool(kv=1)
    backend(tmp_path, pool, is_mla_model=True, tp_size=2).batch_set_v1(KEYS[:1], pool.indices(0))
    reader = backend(tmp_path, target, is_mla_model=True, tp_rank=1, tp_size=2)
    assert reader.batch_get_v1(KEYS[:1], target.indices(0)) == [True]
    assert_pages(pages_of(target, 0), pages_of(pool, 0))


def test_a_broken_page_is_a_miss_and_goes(tmp_path, caplog):
    pool, target = HostPool(seed=7), HostPool()
    store = backend(tmp_path, pool)
    store.batch_set_v1(KEYS[:2], pool.indices(0, 1))
    for path in tmp_path.rglob("*.lynx"):
        data = bytearray(path.read_bytes())
        data[-100] ^= 4
        path.write_bytes(data)
    reader = backend(tmp_path, target)
    assert reader.batch_exists(KEYS) == 2
    assert reader.batch_get_v1(KEYS[:2], target.indices(0, 1)) == [False, False]
    assert reader.batch_exists(KEYS) == 0
    assert "is removed" in caplog.text
    assert store.batch_set_v1(KEYS[:2], pool.indices(0, 1)) == [True, True]
    assert reader.batch_get_v1(KEYS[:2], target.indices(0, 1)) == [True, True]


def test_a_page_that_cannot_be_stored_is_said(tmp_path, caplog):
    pool = HostPool(seed=8)
    store = backend(tmp_path, pool, extra={"max_size": "1K"})
    assert store.batch_set_v1(KEYS[:1], pool.indices(0)) == [False]
    assert not store.set(KEYS[0], torch.zeros(7, dtype=torch.bfloat16))
    assert "HiCache page not stored" in caplog.text


def test_too_few_indices_are_refused(tmp_path, caplog):
    pool = HostPool(seed=9)
    store = backend(tmp_path, pool)
    assert store.batch_set_v1(KEYS[:2], pool.indices(0)) == [False, False]
    assert "16 indices" in caplog.text
    assert store.batch_exists(KEYS) == 0


def test_pools_beside_kv(tmp_path):
    kv, states = HostPool(seed=10), HostPool("another", page_size=1, seed=11)
    store = backend(tmp_path, kv)
    store.register_mem_host_pool_v2(states, PoolName.MAMBA)
    store.batch_set_v1(KEYS, kv.indices(0, 1, 2, 3))
    sent = PoolTransfer(PoolName.MAMBA, host_indices=torch.tensor([4, 2]), keys=[KEYS[1], KEYS[3]])
    assert store.batch_set_v2([sent]) == {PoolName.MAMBA: [True, True]}
    trailing = PoolTransfer(PoolName.MAMBA, keys=[KEYS[0]], hit_policy=PoolHitPolicy.TRAILING_PAGES)
    found = store.batch_exists_v2(KEYS, [trailing])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [2, 4])
    assert found.extra_pool_hit_pages == {PoolName.KV: 4, PoolName.MAMBA: 4}
    every = PoolTransfer(PoolName.MAMBA, keys=KEYS, hit_policy=PoolHitPolicy.ALL_PAGES)
    assert store.batch_exists_v2(KEYS, [every]).kv_hit_pages == 0
    assert store.batch_exists_v2([KEYS[1], KEYS[0]], [every]).kv_hit_pages == 1
    assert store.batch_exists_v2(KEYS).kv_hit_pages == 4
    with pytest.raises(ConfigError, match="block_groups"):
        store.batch_exists_v2(KEYS, [PoolTransfer(PoolName.MAMBA, hit_policy=PoolHitPolicy.BLOCK_GROUPS)])
    before = states.kv_buffer.clone()
    states.kv_buffer.zero_()
    wanted = PoolTransfer(PoolName.MAMBA, host_indices=torch.tensor([4, 2, 0]), keys=[KEYS[1], KEYS[3], KEYS[0]])
    assert store.batch_get_v2([wanted]) == {PoolName.MAMBA: [True, True, False]}
    assert torch.equal(states.kv_buffer[:, [4, 2]], before[:, [4, 2]])


def test_states_are_cut_over_ranks_also_beside_latents(tmp_path):
    kv, states = HostPool(kv=1), HostPool("another", page_size=1, seed=11)
    for rank in range(2):
        store = backend(tmp_path, kv, is_mla_model=True, tp_rank=rank, tp_size=2)
        store.register_mem_host_pool_v2(states, PoolName.MAMBA)
        wanted = PoolTransfer(PoolName.MAMBA, host_indices=torch.tensor([0]), keys=KEYS[:1])
        assert store.batch_get_v2([wanted]) == {PoolName.MAMBA: [False]}
        assert store.batch_set_v2([wanted]) == {PoolName.MAMBA: [True]}


def test_a_pool_that_is_only_an_anchor_holds_nothing(tmp_path):
    pool = HostPool()
    pool.kv_buffer = None
    store = backend(tmp_path, pool)
    assert store.batch_exists(KEYS) == 4
    assert store.batch_set_v1(KEYS[:1], pool.indices(0)) == store.batch_get_v1(KEYS[:1], pool.indices(0)) == [True]
    assert not list(tmp_path.rglob("*.lynx"))


def test_bytes_that_a_layout_does_not_hold_make_pages_flat(tmp_path):
    """Buffers of a known shape beside others (scales): only the pool knows its pages."""
    pool = HostPool(seed=12)
    pool.size_per_token += 4
    store = backend(tmp_path, pool)
    assert store.batch_set_v1(KEYS[:1], pool.indices(3)) == [True]
    assert store.batch_get_v1(KEYS[:1], pool.indices(0)) == [True]
    assert_pages(pages_of(pool, 0), pages_of(pool, 3))
    with pytest.raises(ConfigError, match="gives no pages"):
        backend(tmp_path, WithoutPages())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"path": None}, "'path', a folder"),
        ({"threads": 0}, "'threads'"),
        ({"max_size": "many"}, "'max_size': 'many' is not a size"),
        ({"preset": "best"}, "preset"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, extra, message):
    with pytest.raises(ConfigError, match=message):
        backend(tmp_path, extra=extra)


def test_clear_and_close(tmp_path):
    pool = HostPool(seed=13)
    store = backend(tmp_path, pool, extra={"max_size": "1G", "threads": 2, "preset": "fast"})
    store.batch_set_v1(KEYS, pool.indices(0, 1, 2, 3))
    assert store.get_stats() is None
    assert store.clear()
    assert store.batch_exists(KEYS) == 0
    store.close()


def test_without_sglang_the_error_says_what_to_install():
    command = [sys.executable, "-c", "import sys; sys.modules['sglang'] = None; import lynxproto.integrations.sglang"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in result.stderr
    assert "pip install sglang" in result.stderr


def test_the_documented_configuration(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "embedding" / "sglang.md"
    settings = json.loads(re.search(r"```json\n(.*?)```", page.read_text(), re.DOTALL)[1])
    assert settings["path"] == "/var/cache/lynx"
    pool = HostPool(seed=14)
    store = backend(tmp_path, pool, extra={**settings, "path": str(tmp_path)})
    assert store.batch_set_v1(KEYS, pool.indices(0, 1, 2, 3)) == [True] * 4
    assert store.store.folder.max_bytes == 200 << 30
