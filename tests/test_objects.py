"""Cache objects: what goes in comes out bit for bit, and nothing else ever does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lynxproto import Manifest, get_codec
from lynxproto.chunk import DTYPES, PARTS
from lynxproto.errors import ConfigError, CorruptObjectError, ForeignObjectError, ObjectError, SpecError
from lynxproto.frames import HEADER_SIZE, FrameType, Header
from lynxproto.manifest import Identity, LayerSpec
from lynxproto.objects import ObjectCodec, object_size, read_manifest

CODEC = ObjectCodec()
CODECS = [("raw", {}), ("bitplane", {}), ("hq", {"preset": "fast"}), ("hq", {"levels": 2})]
IDENTITY = Identity(model="a/model", revision="7")


def manifest_of(layers, dtype="bfloat16", **kw):
    tokens = max(layer.token_stop for layer in layers)
    kw = {"request_id": "page-1", "packing": "test", **kw}
    return Manifest(identity=IDENTITY, dtype=dtype, layers=tuple(layers), prompt_tokens=tokens, **kw)


def layer_of(index=0, *, heads=2, tokens=16, dims=(8, 8), parts=("key", "value"), start=0):
    return LayerSpec(
        index=index,
        kv_heads=heads,
        key_dim=dims[0],
        value_dim=dims[1],
        token_start=start,
        token_stop=start + tokens,
        parts=parts,
    )


def views_of(manifest, fill):
    return {
        (layer.index, part): fill((layer.kv_heads, layer.tokens, layer.head_dim(part)), DTYPES[manifest.dtype])
        for layer in manifest.layers
        for part in layer.parts
    }


def empty(manifest):
    return views_of(manifest, np.zeros)


def joined(pieces):
    return b"".join(pieces)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, words in expected.items():
        assert np.array_equal(found[key], words), key


def realistic(shape, dtype, seed=0):
    """bfloat16 words with the spread of a cache: channels of different sizes."""
    random = np.random.default_rng(seed)
    values = random.normal(size=shape) * np.exp(random.normal(size=shape[-1]))
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").astype(dtype)


@st.composite
def caches(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    layers = []
    for index in sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=3))):
        parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3, unique=True))
        heads, tokens, start = draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.integers(0, 100))
        dims = draw(st.integers(1, 20)), draw(st.integers(1, 70))
        layers.append(layer_of(index, heads=heads, tokens=tokens, dims=dims, parts=tuple(parts), start=start))
    manifest = manifest_of(layers, dtype, request_id=draw(st.text(max_size=20)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["bits", "small", "zero", "few"]))

    def fill(shape, word):
        if kind == "zero":
            return np.zeros(shape, word)
        if kind == "bits":
            return random.integers(0, 1 << 8 * word.itemsize, shape, word)
        if kind == "few":
            return random.choice(np.array([0, 1, (1 << 8 * word.itemsize) - 1, 0x7F], word), shape)
        return realistic(shape, word, random.integers(1000))

    return manifest, views_of(manifest, fill)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    caches(), st.sampled_from([None, ("raw", {}), ("bitplane", {}), ("hq", {"preset": "fast"}), ("hq", {"levels": 2})])
)
def test_words_come_back_bit_for_bit_within_the_bound(cache, name):
    manifest, views = cache
    codec = CODEC if name is None else ObjectCodec(get_codec(name[0], **name[1]))
    data = joined(codec.encode(manifest, views))
    assert data == joined(codec.encode(manifest, views))
    assert len(data) == object_size(data) <= codec.bound(manifest)
    out = empty(manifest)
    assert CODEC.decode(data, manifest, out) == len(data)
    assert_same(out, views)


@settings(deadline=None)
@given(st.integers(1, 40), st.text(max_size=200))
def test_the_bound_is_reached_by_words_that_do_not_compress(tokens, name):
    manifest = manifest_of([layer_of(tokens=tokens)], request_id=name)
    random = np.random.default_rng(tokens)
    views = views_of(manifest, lambda shape, dtype: random.integers(0, 1 << 16, shape, dtype))
    assert len(joined(ObjectCodec(get_codec("raw")).encode(manifest, views))) == ObjectCodec(get_codec("raw")).bound(
        manifest
    )
    slack = CODEC.bound(manifest) - manifest.nbytes
    assert slack < 1200 + len(name.encode())


def test_a_real_page_shrinks_and_a_tiny_one_hardly_grows():
    page = manifest_of([layer_of(heads=30, tokens=64, dims=(192, 192))])
    size = sum(piece.nbytes for piece in CODEC.encode(page, views_of(page, realistic)))
    assert size < 0.75 * page.nbytes
    tiny = manifest_of([layer_of(heads=1, tokens=1, dims=(1, 1))])
    assert sum(piece.nbytes for piece in CODEC.encode(tiny, views_of(tiny, realistic))) < tiny.nbytes + 1200


@lru_cache(1)
def small():
    manifest = manifest_of(
        [layer_of(heads=1, tokens=64, dims=(16, 8)), layer_of(3, heads=1, tokens=64, dims=(16, 16), parts=("opaque",))]
    )
    views = views_of(manifest, realistic)
    return manifest, views, joined(CODEC.encode(manifest, views))


@settings(deadline=None)
@given(st.data(), st.integers(1, 255))
def test_any_changed_byte_is_an_error(data, change):
    manifest, _, good = small()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= change
    with pytest.raises(ObjectError):
        CODEC.decode(bad, manifest, empty(manifest))


def test_every_byte_is_covered():
    manifest, _, good = small()
    out = empty(manifest)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x40
        with pytest.raises(ObjectError):
            CODEC.decode(bad, manifest, out)


def test_truncated_objects_are_errors():
    manifest, _, good = small()
    for size in range(len(good)):
        with pytest.raises(CorruptObjectError):
            CODEC.decode(good[:size], manifest, empty(manifest))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_an_error(noise):
    manifest, _, good = small()
    for data in (noise, good[:32] + noise, good[:56] + noise):
        with pytest.raises(ObjectError):
            CODEC.decode(data, manifest, empty(manifest))


def test_what_follows_an_object_is_not_read():
    manifest, views, good = small()
    out = empty(manifest)
    assert CODEC.decode(good + bytes(100), manifest, out) == len(good)
    assert_same(out, views)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": Identity(model="another/model")}, "model is 'a/model'"),
        ({"identity": replace(IDENTITY, revision="8")}, "revision is '7'"),
        ({"request_id": "page-2"}, "request_id is 'page-1', expected 'page-2'"),
        ({"packing": "other"}, "packing is 'test'"),
        ({"layout": "LBNHC"}, "layout"),
        ({"dtype": "float16"}, "dtype is 'bfloat16', expected 'float16'"),
        ({"layers": (layer_of(heads=3, tokens=64),)}, r"its layers are key \[1, 64, 16\]"),
    ],
)
def test_objects_of_something_else_are_refused(change, message):
    manifest, _, good = small()
    expected = replace(manifest, **change)
    out = empty(expected)
    with pytest.raises(ForeignObjectError, match=message):
        CODEC.decode(good, expected, out)
    assert_same(out, empty(expected))


def test_a_live_capture_is_no_object():
    from lynxproto.capture import FileHeader, RecordHeader

    manifest, _, _ = small()
    with pytest.raises(ForeignObjectError, match="no cache object"):
        CODEC.decode(FileHeader(1).pack() + RecordHeader(0, 1, 0, 0, 0).pack(), manifest, empty(manifest))


def test_a_page_of_a_paged_pool_is_read_and_written_where_it_lies():
    pool = realistic((6, 40, 5, 3, 16), np.dtype("<u2"))  # [layers, slots, k or v..., heads, dim]
    manifest = manifest_of([layer_of(heads=6, tokens=8, dims=(48, 48))])

    def views(buffer):
        return {(0, part): buffer[:, 8:16, i].reshape(6, 8, 48) for i, part in enumerate(("key", "value"))}

    assert all(np.shares_memory(view, pool) for view in views(pool).values())
    data = joined(CODEC.encode(manifest, views(pool)))
    target = np.zeros_like(pool)
    CODEC.decode(data, manifest, views(target))
    assert np.array_equal(target[:, 8:16, :2], pool[:, 8:16, :2])
    assert not target[:, :8].any()
    assert not target[:, 16:].any()


def test_torch_tensors_of_any_dtype():
    torch = pytest.importorskip("torch")
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float8_e4m3fn, "float8_e4m3"), (torch.float32, "float32")):
        manifest = manifest_of([layer_of(tokens=64)], name)
        views = views_of(manifest, lambda shape, _, dtype=dtype: torch.randn(shape).to(dtype))
        out = views_of(manifest, lambda shape, _, dtype=dtype: torch.zeros(shape, dtype=dtype))
        CODEC.decode(joined(CODEC.encode(manifest, views)), manifest, out)
        for key, words in views.items():
            assert torch.equal(out[key].view(torch.uint8), words.view(torch.uint8))


def test_into_a_buffer():
    manifest, views, good = small()
    buffer = bytearray(CODEC.bound(manifest))
    assert CODEC.encode_into(buffer, manifest, views) == len(good)
    assert buffer.startswith(good)
    short = bytearray(len(good) - 1)
    with pytest.raises(SpecError, match=f"the object has {len(good)} bytes, the buffer {len(good) - 1}"):
        CODEC.encode_into(short, manifest, views)
    assert not any(short)


def test_misuse_is_named():
    manifest, views, good = small()
    with pytest.raises(ConfigError, match="is not"):
        ObjectCodec(get_codec("hq", levels=1))
    with pytest.raises(SpecError, match="the manifest names"):
        CODEC.encode(manifest, {})
    with pytest.raises(SpecError, match="the manifest names"):
        CODEC.decode(good, manifest, {})
    for change in ({"request_id": "x" * 2000}, {"packing": "x" * 300}, {"layers": (layer_of(dims=(1 << 21, 1)),)}):
        unreadable = replace(manifest, **change)
        with pytest.raises(SpecError, match="nobody could read"):
            CODEC.encode(unreadable, empty(unreadable))
    with pytest.raises(SpecError, match="shape"):
        CODEC.encode(manifest, {key: view[:, :1] for key, view in views.items()})


def test_an_object_says_what_it_is_of():
    manifest, _, good = small()
    found = read_manifest(good)
    assert (found.identity, found.layers, found.request_id) == (manifest.identity, manifest.layers, "page-1")
    assert [config["id"] for config in found.codecs] == ["raw", "hq", "bitplane"]


def test_the_first_levels_come_first():
    """Level by level, so that the beginning of an object is an anchor."""
    rest, found = memoryview(small()[2])[56:], []
    while rest:
        header = Header.unpack(rest[:HEADER_SIZE])
        if header.type == FrameType.DATA:
            found.append((header.level, header.layer, header.part))
        rest = rest[HEADER_SIZE + header.payload_length :]
    assert found == sorted(found)
    assert {level for level, _, _ in found} == {0, 1, 2}


def test_inspect_reads_objects(tmp_path):
    path = tmp_path / "page.lynx"
    path.write_bytes(small()[2])
    command = [sys.executable, "-m", "lynxproto", "inspect", str(path), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in ("OPEN", "PLAN", "DATA", "END"):
        assert name in result.stdout
