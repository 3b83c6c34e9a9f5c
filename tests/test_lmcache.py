"""LMCache's serde and L2 adapter, on a stub of its interface; `make lmcache-e2e` runs LMCache's own code."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from engines import use_engine
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
use_engine("lmcache")

from engines.memoryobjs import Chunk  # noqa: E402  # torch and the engine come first
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402  # the same
from lmcache.v1.distributed.serde import (  # noqa: E402  # the same
    AsyncSerdeProcessor,
    create_serde_processor,
    get_registered_serde_types,
)

from lynxproto.errors import ConfigError, CorruptObjectError, ForeignObjectError, SpecError  # noqa: E402  # the same
from lynxproto.integrations.lmcache import (  # noqa: E402  # the same
    InnerL2Adapter,
    LynxDeserializer,
    LynxL2Adapter,
    LynxL2AdapterConfig,
    LynxSerializer,
)

BF16 = torch.bfloat16
LAYOUTS = {
    "KV_2LTD": ([(2, 4, 64, 32)], [BF16]),
    "KV_2LTD, 16 tokens, one head": ([(2, 4, 16, 64)], [BF16]),
    "KV_MLA": ([(1, 4, 64, 72)], [BF16]),
    "one plane": ([(4, 64, 72)], [BF16]),
    "KV_T2D": ([(64, 2, 32)], [BF16]),
    "KV_2TD": ([(2, 64, 32)], [BF16]),
    "EC_TD": ([(64, 32)], [BF16]),
    "float16": ([(2, 4, 64, 32)], [torch.float16]),
    "float32": ([(2, 4, 64, 32)], [torch.float32]),
    "float8_e4m3": ([(2, 4, 64, 32)], [torch.float8_e4m3fn]),
    "float8_e5m2": ([(2, 4, 64, 32)], [torch.float8_e5m2]),
    "opaque": ([(2, 4, 64, 32)], [torch.uint8]),
    "int64": ([(5, 7)], [torch.int64]),
    "one dimension": ([(777,)], [BF16]),
    "two groups": ([(2, 4, 64, 32), (2, 3, 64, 16)], [BF16, BF16]),
    "two dtypes": ([(2, 4, 64, 32), (3, 17), (2, 1, 4, 5)], [BF16, torch.int64, torch.uint8]),
    "more than a mebibyte of bytes": ([(3, 1 << 17)], [torch.int64]),
}


def key(number=1, **kw):
    fields = {"model_name": "a/model", "kv_rank": 0, "object_group_id": 0, "cache_salt": "", **kw}
    return ObjectKey(number.to_bytes(8, "big"), **fields)


def chunk(name, seed=None):
    return Chunk(*LAYOUTS[name], seed=seed)


def serialized(source, serializer=None, k=None):
    serializer = serializer or LynxSerializer(ratio=1)
    size = serializer.estimate_serialized_size(MemoryLayoutDesc(source.get_shapes(), source.get_dtypes()))
    target = Chunk.of_bytes(size)
    target.raw_data.fill_(0xA5)
    assert serializer.serialize(source, target, k or key()) == size
    return target


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_serde_restores_every_bit(name):
    source, target = chunk(name, seed=1), chunk(name)
    LynxDeserializer().deserialize(serialized(source), target, key())
    assert torch.equal(source.raw_data, target.raw_data)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([BF16, torch.float16, torch.float32, torch.float8_e5m2, torch.int16, torch.bool]),
    st.integers(0, 1000),
)
def test_any_shape_and_any_bits_within_the_estimate(shape, dtype, seed):
    source, target = Chunk([shape], [dtype]), Chunk([shape], [dtype])
    source.raw_data.copy_(torch.randint(256, source.raw_data.shape, generator=torch.Generator().manual_seed(seed)))
    LynxDeserializer().deserialize(serialized(source), target, key())
    assert torch.equal(source.raw_data, target.raw_data)


def test_slots_are_a_share_of_the_chunk_in_whole_blocks():
    source = Chunk([(2, 8, 256, 192)], [BF16], seed=2)
    raw = source.raw_data.numel()
    for serializer, share in ((LynxSerializer(), 0.75), (LynxSerializer(ratio=0.72), 0.72)):
        slot = serialized(source, serializer)
        assert slot.raw_data.numel() % 4096 == 0
        assert share * raw < slot.raw_data.numel() < share * raw + 8192
        target = Chunk([(2, 8, 256, 192)], [BF16])
        LynxDeserializer().deserialize(slot, target, key())
        assert torch.equal(source.raw_data, target.raw_data)


def test_what_does_not_fit_its_slot_is_refused():
    noise = Chunk([(2, 8, 256, 192)], [BF16])
    noise.raw_data.copy_(torch.randint(256, noise.raw_data.shape))
    with pytest.raises(SpecError, match="raise the serde's 'ratio'"):
        serialized(noise, LynxSerializer())
    with pytest.raises(SpecError, match="the estimate was"):
        LynxSerializer().serialize(noise, Chunk.of_bytes(100), key())


def test_the_older_form_without_a_key():
    source, target = chunk("KV_2LTD", seed=3), chunk("KV_2LTD")
    size = LynxSerializer().estimate_serialized_size(MemoryLayoutDesc(source.get_shapes(), source.get_dtypes()))
    slot = Chunk.of_bytes(size)
    assert LynxSerializer().serialize(source, slot) == size
    LynxDeserializer().deserialize(slot, target)
    assert torch.equal(source.raw_data, target.raw_data)


@pytest.mark.parametrize(
    "other",
    [{"number": 2}, {"model_name": "b"}, {"kv_rank": 1}, {"object_group_id": 1}, {"cache_salt": "x"}],
    ids=str,
)
def test_a_chunk_of_another_key_is_refused(other):
    slot = serialized(chunk("KV_2LTD", seed=4))
    with pytest.raises(ForeignObjectError):
        LynxDeserializer().deserialize(slot, chunk("KV_2LTD"), key(**other))


def test_a_chunk_of_another_shape_is_refused():
    slot = serialized(chunk("KV_2LTD", seed=4))
    for other in ("KV_MLA", "float16", "two groups"):
        with pytest.raises(ForeignObjectError):
            LynxDeserializer().deserialize(slot, chunk(other), key())


@settings(max_examples=50)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_a_damaged_slot_is_refused(at, change):
    source = chunk("KV_2LTD, 16 tokens, one head", seed=5)
    slot = serialized(source)
    used = int.from_bytes(bytes(slot.raw_data[32:36].tolist()), "little") + 56
    slot.raw_data[at % used] ^= change
    with pytest.raises((CorruptObjectError, ForeignObjectError)):
        LynxDeserializer().deserialize(slot, chunk("KV_2LTD, 16 tokens, one head"), key())


class Settings:
    """LMCache's SerdeConfig."""

    def __init__(self, **kwargs):
        self.type, self.kwargs = "lynx", kwargs


def test_the_serde_is_registered():
    assert "lynx" in get_registered_serde_types()
    processor = create_serde_processor(Settings(ratio=0.7, preset="fast", threads=2, max_workers=2))
    assert isinstance(processor, AsyncSerdeProcessor)
    layout = MemoryLayoutDesc([torch.Size((2, 8, 256, 192))], [BF16])
    assert processor.estimate_serialized_size(layout) == LynxSerializer(ratio=0.7).estimate_serialized_size(layout)
    processor.close()
    for wrong in (
        {"ratio": 0},
        {"ratio": 2},
        {"ratio": "x"},
        {"max_workers": 0},
        {"presets": "fast"},
        {"preset": "best"},
    ):
        with pytest.raises(ConfigError):
            create_serde_processor(Settings(**wrong))


# --- the L2 adapter


@pytest.fixture
def adapter(tmp_path):
    made = LynxL2Adapter(LynxL2AdapterConfig.from_dict({"path": str(tmp_path), "max_size": "1G", "threads": 2}), None)
    yield made
    made.close()


def wait(fd, query):
    """As LMCache's controllers do: poll the event, then ask."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        assert poll.poll(60_000), "no event came"
        result = query()
        if result:
            return result


def put(adapter, keys, chunks):
    task = adapter.submit_store_task(keys, chunks)
    return wait(adapter.get_store_event_fd(), adapter.pop_completed_store_tasks)[task]


def bits(adapter, fd, query, task, count):
    bitmap = wait(fd, lambda: query(task))
    return [bitmap.test(place) for place in range(count)]


def lookup(adapter, keys):
    task = adapter.submit_lookup_and_lock_task(keys, {})
    return bits(adapter, adapter.get_lookup_and_lock_event_fd(), adapter.query_lookup_and_lock_result, task, len(keys))


def load(adapter, keys, chunks):
    task = adapter.submit_load_task(keys, chunks)
    return bits(adapter, adapter.get_load_event_fd(), adapter.query_load_result, task, len(keys))


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_are_stored_and_loaded(adapter, name):
    keys, sources = [key(1), key(2)], [chunk(name, seed=6), chunk(name, seed=7)]
    stored = put(adapter, keys, sources)
    assert stored.is_successful()
    assert stored.bytes_transferred() == adapter.store.folder.used()
    assert put(adapter, keys, sources).bytes_transferred() == 0
    assert lookup(adapter, [key(2), key(3), key(1)]) == [True, False, True]
    targets = [chunk(name) for _ in range(3)]
    assert load(adapter, [key(2), key(3), key(1)], targets) == [True, False, True]
    assert torch.equal(targets[0].raw_data, sources[1].raw_data)
    assert torch.equal(targets[2].raw_data, sources[0].raw_data)
    adapter.submit_unlock(keys)


def test_deleted_chunks_are_gone(adapter):
    keys = [key(1), key(2)]
    put(adapter, keys, [chunk("KV_2LTD", seed=8), chunk("KV_2LTD", seed=9)])
    adapter.delete([key(1), key(3)])
    assert lookup(adapter, keys) == [False, True]


def test_a_damaged_chunk_is_missing_and_goes(adapter, tmp_path, caplog):
    put(adapter, [key(1)], [chunk("KV_2LTD", seed=10)])
    path = next(tmp_path.rglob("*.lynx"))
    path.write_bytes(path.read_bytes()[:-1])
    assert lookup(adapter, [key(1)]) == [True]
    assert load(adapter, [key(1)], [chunk("KV_2LTD")]) == [False]
    assert lookup(adapter, [key(1)]) == [False]
    assert "is removed" in caplog.text
    status = adapter.report_status()
    assert (status["is_healthy"], status["broken"]) == (True, 1)


def test_a_chunk_that_cannot_be_stored_fails_its_task(tmp_path):
    small = LynxL2Adapter(LynxL2AdapterConfig(str(tmp_path), max_size=100))
    assert not put(small, [key(1)], [chunk("KV_2LTD", seed=11)]).is_successful()
    assert put(small, [], []).is_successful()
    broken = chunk("KV_2LTD", seed=11)
    broken.get_shapes = lambda: 1 / 0
    assert not put(small, [key(1)], [broken]).is_successful()
    assert load(small, [key(1)], [broken]) == [False]
    small.close()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "'path', a folder"),
        ({"path": "x", "threads": 0}, "'threads'"),
        ({"path": "x", "max_size": "big"}, "'max_size'"),
        ({"path": "x", "size": 1}, r"unknown settings \['size'\]"),
    ],
)
def test_settings_that_make_no_sense(params, message):
    with pytest.raises(ConfigError, match=message):
        LynxL2AdapterConfig.from_dict(params)
    assert "path" in LynxL2AdapterConfig.help()


def test_an_inner_adapter_needs_a_type():
    with pytest.raises(ConfigError, match="'adapter_params' must be the settings of another"):
        InnerL2Adapter({})


def test_the_documented_configurations():
    page = (Path(__file__).parent.parent / "docs" / "embedding" / "lmcache.md").read_text()
    first, second = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    for found, cls in ((first, LynxL2Adapter), (second, InnerL2Adapter)):
        module = __import__(found["module_path"], fromlist=["x"])
        assert getattr(module, found["class_name"]) is cls
    assert LynxL2AdapterConfig.from_dict(first["adapter_params"]).max_bytes == 200 << 30
    serde = dict(second["serde"])
    assert serde.pop("type") == "lynx"
    create_serde_processor(Settings(**serde)).close()


def test_without_lmcache_the_error_says_what_to_install():
    command = [sys.executable, "-c", "import sys; sys.modules['lmcache'] = None; import lynxproto.integrations.lmcache"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in result.stderr
    assert "pip install lmcache" in result.stderr
