"""bitplane: planes as NumPy's unpackbits makes them, any cut into levels, every instruction set."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto import ChunkSpec, get_codec
from lynxproto.chunk import DTYPES
from lynxproto.codecs._library import ISAS, instruction_set, lib, select_instruction_set
from lynxproto.errors import ConfigError, PayloadError, SpecError

HERE = instruction_set()
AVAILABLE = [name for name, number in ISAS.items() if lib.lynx_isa_select(number) == lib.LYNX_OK]
select_instruction_set(HERE)


@pytest.fixture(params=AVAILABLE)
def _isa(request):
    before = instruction_set()
    select_instruction_set(request.param)
    yield
    select_instruction_set(before)


def specification(dtype, shape):
    return ChunkSpec(part="packed-kv", dtype=dtype, heads=shape[0], tokens=shape[1], head_dim=shape[2])


def random_words(spec, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, spec.nbytes, dtype=np.uint8).view(spec.word_dtype).reshape(spec.shape)


def planes_of(words):
    """All planes, most significant first, by NumPy."""
    bits = 8 * words.itemsize
    flat = words.reshape(-1)
    return [np.packbits((flat >> bits - 1 - p & 1).astype(np.uint8), bitorder="little").tobytes() for p in range(bits)]


@st.composite
def cuts(draw, bits):
    positions = draw(st.sets(st.integers(1, bits - 1), max_size=bits - 1))
    edges = [0, *sorted(positions), bits]
    return [b - a for a, b in pairwise(edges)]


@settings(max_examples=80, deadline=None)
@given(
    st.data(),
    st.sampled_from(sorted(DTYPES)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 3, 8, 33, 64, 80])),
    st.sampled_from([None, 1]),
    st.integers(0, 1 << 30),
)
def test_planes_levels_and_refinement(data, dtype, shape, zstd, seed) -> None:
    spec = specification(dtype, shape)
    bits = 8 * spec.word_dtype.itemsize
    planes = data.draw(cuts(bits))
    codec = get_codec("bitplane", planes=planes, zstd=zstd)
    words = random_words(spec, seed)
    expected = planes_of(words)
    by_token = np.ascontiguousarray(words.transpose(1, 0, 2)).transpose(1, 0, 2)
    for name in AVAILABLE:
        select_instruction_set(name)
        levels = codec.encode(spec, words)
        assert codec.encode(spec, by_token) == levels
        assert codec.encode(spec, words, levels=[codec.levels - 1]) == levels[-1:]
        out, view = np.zeros_like(words), np.zeros_like(by_token)
        state, first = None, 0
        for level, payload in enumerate(map(bytes, levels)):
            assert len(payload) <= codec.max_encoded_size(spec, level)
            if zstd is None:
                assert payload[:4] == bytes([level, planes[level], 0, 0])
                assert payload[4:] == b"".join(expected[first : first + planes[level]])
            first += planes[level]
            state = codec.refine(spec, state, level, payload, out) if state else codec.decode(spec, levels[:1], out)
            kept = (1 << bits) - (1 << bits - first)
            assert np.array_equal(out, words & words.dtype.type(kept))
            codec.decode(spec, levels[: level + 1], view)
            assert np.array_equal(view, out)
        assert np.array_equal(out, words)
    select_instruction_set(HERE)


@pytest.mark.usefixtures("_isa")
def test_every_word_of_16_bits() -> None:
    words = np.arange(1 << 16).astype(np.uint16).reshape(1, 1024, 64)
    for dtype in ("bfloat16", "float16"):
        spec = specification(dtype, words.shape)
        for planes in ([9, 7], [8, 8], [4, 4, 8], [1] * 16, [16]):
            codec = get_codec("bitplane", planes=planes)
            out = np.zeros_like(words)
            codec.decode(spec, codec.encode(spec, words), out)
            assert np.array_equal(out, words)


@pytest.mark.usefixtures("_isa")
def test_strided_pages_are_written_in_place() -> None:
    spec = specification("bfloat16", (3, 50, 40))
    words = random_words(spec, 1)
    codec = get_codec("bitplane", planes=[9, 7])
    levels = codec.encode(spec, words)
    page = np.full((60, 5, 48), 0xDEAD, np.uint16)
    for view in (page[5:55, 1:4, 4:44].transpose(1, 0, 2), page[5:55, 1:2, 4:44].transpose(1, 0, 2)):
        part = spec if view.shape[0] == 3 else specification("bfloat16", (1, 50, 40))
        sent = levels if view.shape[0] == 3 else codec.encode(part, words[:1])
        codec.decode(part, sent, view)
        assert np.array_equal(view, words[: view.shape[0]])
        view[...] = 0xDEAD
        assert (page == 0xDEAD).all()


def test_broken_payloads_are_errors() -> None:
    spec = specification("bfloat16", (1, 9, 7))
    words = random_words(spec, 2)
    for zstd in (None, 3):
        codec = get_codec("bitplane", planes=[9, 7], zstd=zstd)
        levels = codec.encode(spec, words)
        for level, payload in enumerate(map(bytes, levels)):
            wrong_header = bytes([payload[0] ^ 1]) + payload[1:]
            for wrong in (payload[:-1], payload + b"\0", payload[:4], payload[:3], b"", wrong_header):
                for out in (np.zeros_like(words), None):
                    with pytest.raises(PayloadError, match=rf"bitplane level {level}.*byte offset"):
                        codec.decode(spec, [*levels[:level], wrong], out)


def test_interface() -> None:
    codec = get_codec("bitplane", planes=[4, 4, 8])
    assert codec.get_config() == {"id": "bitplane", "planes": [4, 4, 8]}
    assert get_codec(codec.get_config()) == codec
    assert (codec.levels, codec.exact, codec.wire_id) == (3, True, 2)
    for bad in ({"planes": [9, 8]}, {"planes": []}, {"planes": [16, 0]}, {"planes": [8], "zstd": 0}, {"planes": ["8"]}):
        with pytest.raises(ConfigError):
            get_codec("bitplane", **bad)
    spec = specification("float32", (1, 1, 8))
    assert not codec.supports(spec)
    with pytest.raises(SpecError, match="16 planes do not make a word of float32"):
        codec.encode(spec, np.zeros(spec.shape, np.uint32))
    spec = specification("float16", (1, 1, 8))
    words = np.zeros(spec.shape, np.uint16)
    with pytest.raises(SpecError):
        codec.encode(spec, words, levels=[3])
    with pytest.raises(SpecError):
        codec.decode(spec, [], words)
    state = codec.decode(spec, codec.encode(spec, words)[:1], None)
    with pytest.raises(SpecError):
        codec.refine(spec, state, 2, b"", words)
