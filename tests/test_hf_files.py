"""Saved DynamicCaches: their words travel, and come back as a DynamicCache."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `hf` is not installed")
pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from test_cli import invoke, receiving  # noqa: E402  # after the skip
from transformers.cache_utils import DynamicCache  # noqa: E402  # after the skip

from lynxproto.cachefile import load_cache  # noqa: E402  # after the skip
from lynxproto.errors import CacheFileError, SpecError  # noqa: E402  # after the skip
from lynxproto.integrations.hf_files import cache_of, dynamic_of, load_dynamic, save_dynamic  # noqa: E402  # after the skip
from lynxproto.manifest import Identity  # noqa: E402  # after the skip

IDENTITY = Identity(model="test/model")


def make_dynamic(dtype: Any = torch.bfloat16, layers: int = 2, batch: int = 1) -> DynamicCache:
    torch.manual_seed(0)
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*(torch.randn(batch, 2, 150, 64).to(dtype) for _ in range(2)), layer)
    return cache


def assert_same(a: DynamicCache, b: DynamicCache) -> None:
    assert len(a.layers) == len(b.layers)
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        assert mine.keys.dtype == theirs.keys.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_to_disk_and_back(tmp_path: Path, dtype: Any) -> None:
    cache = make_dynamic(dtype)
    seen: list[tuple[int, int]] = []
    path = save_dynamic(tmp_path / "one.safetensors", cache, IDENTITY, on_progress=lambda *s: seen.append(s))
    assert len(seen) == 4
    assert seen[-1][0] == seen[-1][1] > 0
    assert_same(dynamic_of(load_cache(path)), cache)
    torch.save(cache, tmp_path / "one.pt")
    assert_same(dynamic_of(load_dynamic(tmp_path / "one.pt", IDENTITY)), cache)


def test_words_are_views(tmp_path: Path) -> None:
    cache = make_dynamic()
    words = cache_of(cache, IDENTITY).arrays[0, "key"]
    assert words.ctypes.data == cache.layers[0].keys.data_ptr()


def test_a_saved_cache_is_sent(tmp_path: Path) -> None:
    cache = make_dynamic()
    torch.save(cache, tmp_path / "one.pt")
    code, _, err = invoke("send", str(tmp_path / "one.pt"), "tcp://127.0.0.1:9")
    assert (code, "give --model" in err) == (1, True)
    with receiving("-o", str(tmp_path / "out")) as (receiver, url):
        code, _, err = invoke("send", str(tmp_path / "one.pt"), url, "--model", "test/model", "-q")
        assert code == 0, err
        receiver.communicate(timeout=60)
    assert_same(dynamic_of(load_cache(tmp_path / "out" / "one.safetensors")), cache)


def test_legacy_tuples_are_read(tmp_path: Path) -> None:
    cache = make_dynamic()
    torch.save([(layer.keys, layer.values) for layer in cache.layers], tmp_path / "one.pt")
    assert_same(dynamic_of(load_dynamic(tmp_path / "one.pt", IDENTITY)), cache)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("/tmp/lynxproto-bomb").touch, ())


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save(Bomb(), tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "text.pt").write_text("no cache")
    for name in ("bomb", "plain", "text", "absent"):
        with pytest.raises(CacheFileError, match=name):
            load_dynamic(tmp_path / f"{name}.pt", IDENTITY)
    assert not Path("/tmp/lynxproto-bomb").exists()


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(SpecError, match="no sequence"):
        cache_of(make_dynamic(batch=2), IDENTITY)
    with pytest.raises(SpecError, match="DynamicCache"):
        cache_of({"keys": 1}, IDENTITY)
    with pytest.raises(SpecError, match="dtype"):
        cache_of(make_dynamic(torch.float64), IDENTITY)
    with pytest.raises(SpecError, match="one dtype"):
        cache_of([], IDENTITY)
