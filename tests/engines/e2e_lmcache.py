"""LMCache's own storage manager, serde wrapper and L2 adapters with ours, on a CPU. `make lmcache-e2e` runs it.

What needs a GPU or an engine is left out: copies between a device and L1, and the server around the manager.
"""

from __future__ import annotations

import math
import shutil
import socket
import subprocess

import pytest
import torch

from engines import use_engine

use_engine("lmcache")

from lmcache.v1.distributed.api import MemoryLayoutDesc  # noqa: E402  # the same

from engines.lmcache_manager import PLUGIN, fetch, key, layout_of, manager, store, wait  # noqa: E402  # the engine first

LAYERS, TOKENS, HIDDEN = 8, 256, 192
SHAPE = (2, LAYERS, TOKENS, HIDDEN)
LAYOUTS = {
    "KV_2LTD bfloat16": layout_of(SHAPE, torch.bfloat16),
    "KV_2LTD float16": layout_of(SHAPE, torch.float16),
    "KV_2LTD float32": layout_of(SHAPE, torch.float32),
    "KV_2LTD fp8": layout_of(SHAPE, torch.float8_e4m3fn),
    "one plane": layout_of((LAYERS, TOKENS, 576), torch.bfloat16),
    "KV_MLA": layout_of((1, LAYERS, TOKENS, 576), torch.bfloat16),
    "KV_T2D": layout_of((TOKENS, 2, HIDDEN), torch.bfloat16),
    "KV_2TD": layout_of((2, TOKENS, HIDDEN), torch.bfloat16),
    "two groups": MemoryLayoutDesc([torch.Size(SHAPE), torch.Size((2, 3, TOKENS, 64))], [torch.bfloat16] * 2),
    "groups of two dtypes": MemoryLayoutDesc(
        [torch.Size(SHAPE), torch.Size((1, 3, 17))], [torch.bfloat16, torch.int64]
    ),
}


def values(shape, dtype, seed):
    """As in a cache: each channel has a size of its own."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) * torch.randn(shape[-1], generator=random).exp()).to(dtype)


def chunks_of(layout, count=4):
    groups = list(zip(layout.shapes, layout.dtypes, strict=True))
    return {
        key(number): [values(shape, dtype, 10 * number + place) for place, (shape, dtype) in enumerate(groups)]
        for number in range(count)
    }


def raw_bytes(layout, count=4):
    return count * sum(math.prod(s) * d.itemsize for s, d in zip(layout.shapes, layout.dtypes, strict=True))


def assert_same(found, written):
    assert found.keys() == written.keys()
    for k, tensors in written.items():
        for one, other in zip(found[k], tensors, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


class Folder:
    """An L2 adapter whose chunks are files."""

    def __init__(self, kind, path, **serde):
        self.path = path
        inner = {"type": kind, "base_path": str(path)}
        self.settings = (
            {**PLUGIN, "class_name": "LynxL2Adapter", "adapter_params": {"path": str(path)}}
            if kind == "lynx"
            else {**PLUGIN, "class_name": "InnerL2Adapter", "adapter_params": inner, "serde": {"type": "lynx", **serde}}
        )

    def files(self):
        return [file for file in self.path.rglob("*") if file.suffix in (".lynx", ".data")]

    def sizes(self):
        return [file.stat().st_size for file in self.files()]


class Redis:
    """LMCache's adapter for Redis."""

    def __init__(self, port):
        import redis

        self.client = redis.Redis(port=port)
        inner = {"type": "resp", "host": "127.0.0.1", "port": port}
        self.settings = {**PLUGIN, "class_name": "InnerL2Adapter", "adapter_params": inner, "serde": {"type": "lynx"}}
        wait(self._answers)

    def _answers(self):
        import redis

        try:
            return self.client.ping()
        except redis.exceptions.ConnectionError:
            return False

    def sizes(self):
        return [self.client.strlen(name) for name in self.client.scan_iter()]


@pytest.fixture
def redis_port(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        yield port
        server.terminate()


def round_trip(backend, layout):
    """Store chunks, forget everything but L2, and load them again. Returns L2's share of the raw bytes."""
    chunks = chunks_of(layout)
    writer = manager(backend.settings)
    try:
        store(writer, chunks, layout, lambda: len(backend.sizes()) == len(chunks))
    finally:
        writer.close()
    reader = manager(backend.settings)
    try:
        assert_same(fetch(reader, list(chunks), layout), chunks)
        assert fetch(reader, [key(99)], layout) == {}
        assert fetch(reader, [key(0, salt="tenant")], layout) == {}
        assert fetch(reader, [key(0, model="another")], layout) == {}
    finally:
        reader.close()
    return sum(backend.sizes()) / raw_bytes(layout)


@pytest.mark.parametrize("kind", ["lynx", "fs", "fs_native"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_come_back_bit_for_bit(tmp_path, name, kind):
    share = round_trip(Folder(kind, tmp_path), LAYOUTS[name])
    print(f"{kind}, {name}: {share:.3f} of the bytes")
    assert share < 1.01 if "bfloat16" not in name else share < 0.76


def test_chunks_in_redis(redis_port):
    share = round_trip(Redis(redis_port), LAYOUTS["KV_2LTD bfloat16"])
    print(f"resp, KV_2LTD bfloat16: {share:.3f} of the bytes")
    assert share < 0.76


@pytest.mark.parametrize("kind", ["lynx", "fs"])
def test_a_damaged_chunk_is_missing(tmp_path, kind):
    """And with it, behind LMCache's serde wrapper, the others that were asked for in the same task."""
    layout, backend = LAYOUTS["KV_2LTD bfloat16"], Folder(kind, tmp_path)
    chunks = chunks_of(layout)
    writer = manager(backend.settings)
    store(writer, chunks, layout, lambda: len(backend.sizes()) == 4)
    writer.close()
    victim = sorted(backend.files())[0]
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    victim.write_bytes(data)
    reader = manager(backend.settings)
    try:
        found = {}
        for k in chunks:
            found |= fetch(reader, [k], layout)
        assert len(found) == 3
        assert_same(found, {k: chunks[k] for k in found})
    finally:
        reader.close()


def test_chunks_that_do_not_fit_their_slots_are_not_stored(tmp_path):
    layout, backend = LAYOUTS["KV_2LTD bfloat16"], Folder("fs", tmp_path, ratio=0.3)
    chunks = chunks_of(layout)
    sm = manager(backend.settings)
    store(sm, chunks, layout, lambda: True)
    sm.close()
    reader = manager(backend.settings)
    try:
        assert fetch(reader, list(chunks), layout) == {}
        assert backend.sizes() == []
    finally:
        reader.close()


def test_a_serde_after_an_adapter_that_imports_it(tmp_path):
    """The module is imported for any adapter of type plugin, so a serde of a later adapter needs nothing else."""
    first = Folder("lynx", tmp_path / "lynx")
    second = {"type": "fs", "base_path": str(tmp_path / "fs"), "serde": {"type": "lynx", "ratio": 0.72}}
    layout = LAYOUTS["KV_2LTD bfloat16"]
    chunks = chunks_of(layout)
    sm = manager(first.settings, second)
    try:
        files = tmp_path / "fs"
        store(sm, chunks, layout, lambda: len(list(files.glob("*.data"))) == 4 and len(first.sizes()) == 4)
    finally:
        sm.close()
    reader = manager({**second, **PLUGIN, "class_name": "InnerL2Adapter", "adapter_params": second})
    try:
        assert_same(fetch(reader, list(chunks), layout), chunks)
    finally:
        reader.close()
