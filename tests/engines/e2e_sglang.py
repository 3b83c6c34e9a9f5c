"""SGLang's own factory, cache controller and host pools with the HiCache backend, on a CPU. `make sglang-e2e` runs it.

What needs a GPU is left out: a model, and copies between device and host pools.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engines import use_engine

use_engine("sglang")

from sglang.srt.managers.cache_controller import HiCacheController  # noqa: E402  # the engine comes first
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo  # noqa: E402  # the same
from sglang.srt.mem_cache.hicache_storage import HiCacheFile  # noqa: E402  # the same
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402  # the same
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402  # the same
from test_sglang import KEYS, config  # noqa: E402  # the same

from lynxproto.errors import ConfigError  # noqa: E402  # the same

PAGE, LAYERS, HEADS, DIM = 64, 4, 3, 64
CPU = torch.device("cpu")


def tables(buffers):
    return torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64)


def mha(layout, *, dtype=torch.bfloat16, value_dim=DIM):
    keys = tuple(torch.zeros(PAGE, HEADS, DIM, dtype=dtype) for _ in range(LAYERS))
    values = tuple(torch.zeros(PAGE, HEADS, value_dim, dtype=dtype) for _ in range(LAYERS))
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=keys, v=values, k_data_ptrs=tables(keys), v_data_ptrs=tables(values), layout=next(iter(KVBufferLayout))
        ),
        page_size=PAGE,
        head_num=HEADS,
        head_dim=DIM,
        v_head_dim=value_dim,
        dtype=dtype,
        device=CPU,
    )
    cls = MHATokenToKVPoolHost if value_dim == DIM else AsymmetricMHATokenToKVPoolHost
    return cls(
        info, 0, 0, PAGE, layout, False, device_capacity_tokens=PAGE, start_layer=0, end_layer=LAYERS,
        host_token_capacity=6 * PAGE,
    )  # fmt: skip


def mla(layout):
    buffers = tuple(torch.zeros(PAGE, 1, DIM + 16, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=buffers,
        data_ptrs=tables(buffers),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=DIM,
        qk_rope_head_dim=16,
        kv_cache_dim=DIM + 16,
        dtype=torch.bfloat16,
        device=CPU,
    )
    return MLATokenToKVPoolHost(
        info, 0, 0, PAGE, layout, False, device_capacity_tokens=PAGE, start_layer=0, end_layer=LAYERS,
        target_layer_num=LAYERS, host_token_capacity=6 * PAGE,
    )  # fmt: skip


def buffers(pool):
    found = pool.kv_buffer
    return list(found) if isinstance(found, tuple) else [found]


def fill(pool, seed=1):
    """Values as in a cache: each channel has a size of its own."""
    random = torch.Generator().manual_seed(seed)
    for buffer in buffers(pool):
        sizes = torch.randn(buffer.shape[-1], generator=random).exp()
        buffer.copy_((torch.randn(buffer.shape, generator=random) * sizes).to(buffer.dtype))
    return pool


def controller(pool, path, **extra):
    """What HiCacheController is when it has attached the backend, as far as its transfers of pages look at it."""
    settings = config(path, extra=extra)
    backend = StorageBackendFactory.create_backend("dynamic", settings, pool)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return SimpleNamespace(storage_backend=backend, storage_host_pool=pool, page_size=PAGE)


def indices(*pages):
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


OPERATION = SimpleNamespace(request_id="r", is_terminated=lambda: False)
WRITES = {"generic": HiCacheController._generic_page_set, "interface_v1": HiCacheController._page_set_zero_copy}
READS = {"generic": HiCacheController._generic_page_get, "interface_v1": HiCacheController._page_get_zero_copy}
POOLS = {
    **{f"mha {layout}": (lambda layout=layout: mha(layout)) for layout in ("layer_first", "page_first", "page_head")},
    "mha page_first_direct": lambda: mha("page_first_direct"),
    "mha fp8": lambda: mha("page_first", dtype=torch.float8_e4m3fn),
    **{f"mla {layout}": (lambda layout=layout: mla(layout)) for layout in ("layer_first", "page_first")},
    "mla page_first_direct": lambda: mla("page_first_direct"),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("name", POOLS)
def test_pages_come_back_bit_for_bit(tmp_path, name, way):
    pool, target = fill(POOLS[name]()), POOLS[name]()
    writer, reader = controller(pool, tmp_path), controller(target, tmp_path)
    assert WRITES[way](writer, KEYS, indices(0, 2, 3, 5))
    assert reader.storage_backend.batch_exists(KEYS) == 4
    assert READS[way](reader, OPERATION, [*KEYS, "missing"], indices(5, 1, 0, 4, 2)) == 4
    for here, there in zip((5, 1, 0, 4), (0, 2, 3, 5), strict=True):
        found, expected = (p.get_data_page(i * PAGE).view(torch.uint8) for p, i in ((target, here), (pool, there)))
        assert torch.equal(found, expected)
    counters = writer.storage_backend.store.counters
    print(f"{name}, {way}: {counters['stored_bytes'] / counters['raw_bytes']:.3f} of the bytes")
    assert counters["stored_bytes"] < counters["raw_bytes"] * (0.95 if "fp8" in name else 0.75)


def test_keys_and_values_of_different_sizes(tmp_path):
    """SGLang gives such pages by index only."""
    pool, target = fill(mha("page_first", value_dim=32)), mha("page_first", value_dim=32)
    assert WRITES["interface_v1"](controller(pool, tmp_path), KEYS[:2], indices(0, 2))
    assert READS["interface_v1"](controller(target, tmp_path), OPERATION, KEYS[:2], indices(3, 1)) == 2
    for here, there in ((3, 0), (1, 2)):
        for found, expected in zip(buffers(target), buffers(pool), strict=True):
            assert torch.equal(found[here * PAGE : (here + 1) * PAGE], expected[there * PAGE : (there + 1) * PAGE])


def test_a_layout_without_pages_is_refused_when_it_is_attached(tmp_path):
    with pytest.raises(ConfigError, match="page_unified"):
        controller(mha("page_unified"), tmp_path)


def test_sizes_beside_sglangs_own_file_backend(tmp_path):
    pool = fill(mha("page_first"))
    ours = controller(pool, tmp_path / "lynx")
    assert WRITES["interface_v1"](ours, KEYS, indices(0, 1, 2, 3))
    theirs = HiCacheFile(config(tmp_path / "unused"), str(tmp_path / "file"))
    theirs.register_mem_pool_host(pool)
    assert WRITES["generic"](
        SimpleNamespace(storage_backend=theirs, storage_host_pool=pool, page_size=PAGE), KEYS, indices(0, 1, 2, 3)
    )
    size = sum(path.stat().st_size for path in (tmp_path / "file").iterdir())
    assert ours.storage_backend.store.folder.used() < 0.8 * size
