"""Dumped caches: what was written comes back, other tools can read it, and broken files are named."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lynxproto.cachefile import Cache, CacheFileWriter, load_cache, save_cache
from lynxproto.chunk import DTYPES
from lynxproto.errors import CacheFileError
from lynxproto.manifest import Identity, LayerSpec, Manifest

IDENTITY = Identity(model="test/model", revision="r1", tokenizer_hash="t")


def make_cache(dtype: str = "bfloat16", *, seed: int = 0, first_token: int | None = 7) -> Cache:
    layers = (
        LayerSpec(index=0, kv_heads=2, key_dim=16, value_dim=24, token_stop=33),
        LayerSpec(index=5, kv_heads=1, key_dim=8, value_dim=8, token_start=20, token_stop=33, kind="sliding"),
        LayerSpec(index=6, kv_heads=1, key_dim=40, value_dim=40, token_stop=33, parts=("latent",)),
    )
    manifest = Manifest(identity=IDENTITY, dtype=dtype, layers=layers, prompt_tokens=33)
    rng = np.random.default_rng(seed)
    words = DTYPES[dtype]
    arrays = {
        (layer.index, part): rng.integers(
            0, 1 << (8 * words.itemsize), (layer.kv_heads, layer.tokens, layer.head_dim(part)), words, endpoint=False
        )
        for layer in layers
        for part in layer.parts
    }
    return Cache(manifest=manifest, arrays=arrays, first_token=first_token, logit_gap=0.5)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_round_trip(dtype: str, tmp_path: Path) -> None:
    cache = make_cache(dtype)
    path = save_cache(tmp_path / "cache.safetensors", cache)
    back = load_cache(path)
    assert back.manifest == cache.manifest
    assert (back.first_token, back.logit_gap) == (7, 0.5)
    assert back.arrays.keys() == cache.arrays.keys()
    for key, array in cache.arrays.items():
        assert back.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(back.arrays[key], array)
        assert not back.arrays[key].flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_no_result_stays_no_result(tmp_path: Path) -> None:
    back = load_cache(save_cache(tmp_path / "c", make_cache(first_token=None)))
    assert back.first_token is None


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    cache = make_cache("float16")
    path = save_cache(tmp_path / "cache.safetensors", cache)
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {f"layers.{layer}.{part}" for layer, part in cache.arrays}
        for (layer, part), array in cache.arrays.items():
            np.testing.assert_array_equal(file.get_tensor(f"layers.{layer}.{part}").view(np.uint16), array)
        assert file.metadata()["format"] == "lynxproto.cache/1"


def test_the_arrays_are_the_mapped_file(tmp_path: Path) -> None:
    path = save_cache(tmp_path / "cache", make_cache())
    array = load_cache(path).arrays[0, "key"]
    before = int(array[0, 0, 0])
    with path.open("r+b") as file:
        data = file.read()
        file.seek(data.index(array.tobytes()))
        file.write(struct.pack("<H", before ^ 0xFFFF))
    assert int(array[0, 0, 0]) == before ^ 0xFFFF


def test_writer_shows_nothing_before_commit(tmp_path: Path) -> None:
    cache = make_cache()
    path = tmp_path / "cache"
    with CacheFileWriter(path, cache.manifest) as writer:
        assert not path.exists()
        for key, array in cache.arrays.items():
            writer.arrays[key][...] = array
        assert writer.commit(first_token=3) == path
        with pytest.raises(CacheFileError, match="before"):
            writer.commit()
    assert load_cache(path).first_token == 3
    with pytest.raises(CacheFileError, match="exists"):
        CacheFileWriter(path, cache.manifest)
    with pytest.raises(RuntimeError), CacheFileWriter(tmp_path / "other", cache.manifest):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [path]


def test_no_room(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk or a quota does, at a small size
    try:
        with pytest.raises(CacheFileError, match="is there room"):
            CacheFileWriter(tmp_path / "cache", make_cache().manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_arrays_that_do_not_match(tmp_path: Path) -> None:
    cache = make_cache()
    short = dict(cache.arrays)
    del short[5, "value"]
    with pytest.raises(CacheFileError, match="not those"):
        save_cache(tmp_path / "c", Cache(manifest=cache.manifest, arrays=short))
    wrong: Any = {**cache.arrays, (5, "value"): np.zeros((1, 2, 8), np.uint16)}
    with pytest.raises(CacheFileError, match=r"\(5, 'value'\)"):
        save_cache(tmp_path / "c", Cache(manifest=cache.manifest, arrays=wrong))
    assert not list(tmp_path.iterdir())


def rewrite(path: Path, change: Any) -> Path:
    """Change the JSON header in place."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def _drop(header: Any) -> None:
    del header["layers.0.key"]


def _extra(header: Any) -> None:
    header["weights"] = header["layers.0.key"]


def _shape(header: Any) -> None:
    header["layers.0.key"]["shape"][0] = 1


def _offsets(header: Any) -> None:
    header["layers.0.key"]["data_offsets"] = [0, 2]


def _far(header: Any) -> None:
    entry = header["layers.0.key"]
    entry["data_offsets"] = [x + (1 << 40) for x in entry["data_offsets"]]


def _negative(header: Any) -> None:
    header["layers.0.key"]["data_offsets"] = [-4, 2]


def _no_format(header: Any) -> None:
    del header["__metadata__"]["format"]


def _no_manifest(header: Any) -> None:
    del header["__metadata__"]["manifest"]


def _bad_manifest(header: Any) -> None:
    header["__metadata__"]["manifest"] = '{"identity": {"model": "m", "surprise": 1}, "layers": []}'


def _bad_layer(header: Any) -> None:
    fields = json.loads(header["__metadata__"]["manifest"])
    fields["layers"][0]["kv_heads"] = "2"
    header["__metadata__"]["manifest"] = json.dumps(fields)


def _bad_result(header: Any) -> None:
    header["__metadata__"]["result"] = '{"first_token": "the"}'


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop, "lacks the tensor 'layers.0.key'"),
        (_extra, "does not name: weights"),
        (_shape, "as its manifest says"),
        (_offsets, "takes 2 bytes"),
        (_far, "truncated"),
        (_negative, "data_offsets"),
        (_no_format, "not a KV cache"),
        (_no_manifest, "manifest is broken"),
        (_bad_manifest, "manifest is broken"),
        (_bad_layer, "manifest is broken"),
        (_bad_result, "first_token"),
    ],
)
def test_broken_headers_are_named(tmp_path: Path, change: Any, says: str) -> None:
    path = rewrite(save_cache(tmp_path / "cache", make_cache()), change)
    with pytest.raises(CacheFileError, match=says):
        load_cache(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too few"),
        (b"\x7fELF" + bytes(100), "does not start as"),
        (struct.pack("<Q", 50) + b"{" + bytes(10), "truncated"),
        (struct.pack("<Q", 4) + b"{ab}", "not JSON"),
        (struct.pack("<Q", 2) + b"{}", "format"),
        (struct.pack("<Q", 1 << 60) + b"{}", "does not start as"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CacheFileError, match=says):
        load_cache(path)


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match="No such file"):
        load_cache(tmp_path / "absent")
    with pytest.raises(CacheFileError, match="directory"):
        load_cache(tmp_path)
    with pytest.raises(CacheFileError, match="cannot make"):
        save_cache(tmp_path / "absent" / "cache", make_cache())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_named_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damage") / "cache"
    content = bytearray(save_cache(path, make_cache()).read_bytes())
    (header,) = struct.unpack_from("<Q", content)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        with_error = True
    else:
        content[data.draw(st.integers(0, 8 + header - 1))] = data.draw(st.integers(0, 255))
        with_error = False
    path.write_bytes(content)
    try:
        load_cache(path)
    except CacheFileError:
        return
    assert not with_error, "a truncated file was taken for a whole one"


def test_a_cache_is_for_its_user_only(tmp_path):
    """Keys and values tell the prompt."""
    path = save_cache(tmp_path / "cache", make_cache())
    assert path.stat().st_mode & 0o077 == 0
