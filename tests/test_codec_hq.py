"""hq: exact for every word, nested, the same bytes from every instruction set and from the NumPy reference."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference_hq import Tile, payloads

from lynxproto import ChunkSpec, get_codec
from lynxproto.codecs._library import (
    ISAS,
    address,
    error_text,
    ffi,
    instruction_set,
    lib,
    scratch,
    select_instruction_set,
)
from lynxproto.errors import ConfigError, PayloadError, SpecError

Words = NDArray[np.uint16]
DTYPES = ("bfloat16", "float16")
PARTS = ("key", "value")
HERE = instruction_set()
AVAILABLE = [name for name, number in ISAS.items() if lib.lynx_isa_select(number) == lib.LYNX_OK]
select_instruction_set(HERE)


@contextmanager
def isa(name: str) -> Iterator[None]:
    before = instruction_set()
    select_instruction_set(name)
    try:
        yield
    finally:
        select_instruction_set(before)


def words_of(dtype: str, x: NDArray[Any]) -> Words:
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def make(kind: str, dtype: str, shape: tuple[int, int, int], seed: int) -> Words:
    """Words of several characters."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=shape)
    sign = (rng.integers(0, 2, shape) << 15).astype(np.uint16)
    match kind:
        case "channels":  # like keys: channels with their own means and spreads
            mean, spread = rng.normal(size=(shape[0], 1, shape[2])), np.exp(rng.normal(size=(shape[0], 1, shape[2])))
            return words_of(dtype, (noise + 2 * mean) * spread)
        case "narrow":  # far from zero: large zero points
            return words_of(dtype, 100 + noise * 0.5)
        case "any":
            return rng.integers(0, 1 << 16, shape).astype(np.uint16)
        case "denormal":
            return rng.integers(0, 0x90, shape).astype(np.uint16) | sign
        case "exponents":  # magnitudes over many binades
            return rng.integers(0x3000, 0x4400, shape).astype(np.uint16) | sign
        case "huge":  # near overflow
            return rng.integers(0x7A00, 0x7F80, shape).astype(np.uint16) | sign
        case "special":  # a few NaN, infinities and zeros of both signs
            words = words_of(dtype, noise)
            odd = np.array([0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7C00, 0xFC00, 0x7E01, 0, 0x8000], np.uint16)
            return np.where(rng.random(shape) < 0.01, rng.choice(odd, shape), words)
        case "constant":  # some channels, some tokens, some heads of one word
            words = words_of(dtype, noise)
            words[:, :, rng.random(shape[2]) < 0.3] = rng.integers(0, 1 << 16)
            words[:, rng.random(shape[1]) < 0.3] = rng.integers(0, 1 << 16)
            words[rng.random(shape[0]) < 0.3] = rng.integers(0, 1 << 16)
            return words
        case "zeros":
            return np.where(rng.random(shape) < 0.5, 0, 0x8000).astype(np.uint16)
        case _:  # few distinct values, ties included
            return words_of(dtype, rng.integers(-9, 10, shape) / 2)


KINDS = ("channels", "narrow", "any", "denormal", "exponents", "huge", "special", "constant", "zeros", "ties")
shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 2, 7, 8, 17, 63, 64, 65, 70]), st.sampled_from([1, 8, 40, 64, 80, 96])
)
seeds = st.integers(0, 1 << 30)


def specification(part: Any, dtype: str, shape: tuple[int, int, int]) -> ChunkSpec:
    return ChunkSpec(part=part, dtype=dtype, heads=shape[0], tokens=shape[1], head_dim=shape[2])


def decoded(codec: Any, spec: ChunkSpec, levels: Sequence[Any], **kw: Any) -> Words:
    out = np.full(spec.shape, 0xDEAD, np.uint16)
    codec.decode(spec, levels, out, **kw)
    return out


def bits_and_levels() -> st.SearchStrategy[tuple[int, int, int]]:
    choices = [
        (k, v, n) for k, v, n in itertools.product(range(2, 9), range(2, 9), (1, 2, 3)) if n < 3 or (k, v) != (8, 8)
    ]
    return st.sampled_from(choices)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PARTS), st.sampled_from(DTYPES), st.tuples(shapes, st.sampled_from(KINDS)), bits_and_levels(), seeds
)
@example("key", "bfloat16", ((2, 70, 80), "channels"), (4, 3, 3), 1)
@example("value", "bfloat16", ((2, 70, 80), "channels"), (4, 3, 3), 1)
@example("key", "float16", ((1, 70, 96), "channels"), (3, 3, 3), 2)
@example("value", "float16", ((1, 70, 96), "special"), (3, 2, 2), 2)
def test_bytes_are_the_references_on_every_instruction_set(
    part: str, dtype: str, tile: tuple[tuple[int, int, int], str], config: tuple[int, int, int], seed: int
) -> None:
    shape, kind = tile
    words = make(kind, dtype, shape, seed)
    key_bits, value_bits, count = config
    spec = specification(part, dtype, shape)
    codec = get_codec("hq", key_bits=key_bits, value_bits=value_bits, levels=count)
    bits = key_bits if part == "key" else value_bits
    reference = Tile(part, dtype, shape, np.full((shape[0], shape[2]), bits, np.uint8))
    expected = payloads(reference, words, count)
    results = []
    for name in AVAILABLE:
        with isa(name):
            assert codec.encode(spec, words) == expected
            results.append([decoded(codec, spec, expected[:n]) for n in range(1, count + 1)])
    for other in results[1:]:
        assert all(map(np.array_equal, results[0], other))
    if codec.exact:
        assert np.array_equal(results[0][-1], words)
    if expected[0][0] == 0:
        sections = split(reference, expected, count)
        assert np.array_equal(results[0][0], restored(reference, *sections[:3]))
        if count == 3:
            assert np.array_equal(results[0][1], restored(reference, *sections[:4]))
        if count > 1:
            assert np.array_equal(results[0][-1], restored(reference, *sections))


def restored(tile: Tile, *sections: bytes) -> Words:
    return tile.decode(*sections[:3], **dict(zip(("rest", "table", "ranks"), sections[3:], strict=False)))


def split(tile: Tile, levels: list[bytes], count: int) -> tuple[bytes, ...]:
    """The sections in a tile's payloads."""
    heads, _, dim = tile.shape
    octets = sum(-(-(t.stop - t.start) // 8) for h, t, c in tile.blocks() if h == 0 and c.start == 0)
    blocks = len(tile.blocks())
    anchor = octets * int(tile.widths.sum())
    rest = octets * 8 * heads * dim - anchor
    body = levels[0][8:]
    sections = [body[:anchor], body[anchor : anchor + 6 * blocks], body[anchor + 6 * blocks :]]
    if count == 1:
        return tuple(sections)
    exact = levels[-1][8:] if count == 3 else levels[1][8 + rest :]
    return (*sections, levels[1][8 : 8 + rest], exact[: 8 * blocks], exact[8 * blocks :])


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_word_survives(name: str, part: str, dtype: str, shuffled: bool) -> None:
    words = np.arange(1 << 16).astype(np.uint16)
    if shuffled:
        words = np.random.default_rng(3).permutation(words)
    words = words.reshape(2, 512, 64)
    spec = specification(part, dtype, words.shape)
    with isa(name):
        for codec in (get_codec("hq", anchor_bits=4), get_codec("hq", anchor_bits=8, levels=2)):
            levels = codec.encode(spec, words)
            assert np.array_equal(decoded(codec, spec, levels), words)
            assert sum(map(len, levels)) <= spec.nbytes + 8 * codec.levels


@pytest.mark.parametrize("dim", [1, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [1, 3, 64, 129])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(part: str, dtype: str, tokens: int, dim: int) -> None:
    words = make("channels", dtype, (3, tokens, dim), dim)
    spec = specification(part, dtype, words.shape)
    codec = get_codec("hq", key_bits=4, value_bits=3)
    levels = codec.encode(spec, words)
    assert np.array_equal(decoded(codec, spec, levels), words)
    assert [len(p) <= codec.max_encoded_size(spec, i) for i, p in enumerate(levels)] == [True] * 3
    assert codec.encode(spec, words, threads=3) == levels
    assert np.array_equal(decoded(codec, spec, levels, threads=3), words)
    for subset in itertools.chain.from_iterable(itertools.permutations(range(3), n) for n in range(3)):
        assert codec.encode(spec, words, levels=subset) == [levels[i] for i in subset]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3])
def test_refine_is_decode(part: str, dtype: str, kind: str, count: int) -> None:
    words = make(kind, dtype, (2, 80, 64), 5)
    spec = specification(part, dtype, words.shape)
    codec = get_codec("hq", anchor_bits=3, levels=count)
    levels = codec.encode(spec, words)
    assert [codec.encode(spec, words, levels=[i])[0] for i in range(count)] == levels
    out = np.zeros_like(words)
    state = codec.decode(spec, levels[:1], out)
    assert np.array_equal(out, decoded(codec, spec, levels[:1]))
    unread = codec.decode(spec, levels[:1], None)
    for level in range(1, count):
        state = codec.refine(spec, state, level, levels[level], out)
        unread = codec.refine(spec, unread, level, levels[level], None)
        assert (state.level, unread.level) == (level, level)
        assert np.array_equal(out, decoded(codec, spec, levels[: level + 1]))
    assert np.array_equal(out, words)


@pytest.mark.parametrize("part", PARTS)
def test_strided_arrays(part: str) -> None:
    words = make("channels", "bfloat16", (3, 150, 80), 7)
    spec = specification(part, "bfloat16", words.shape)
    codec = get_codec("hq", key_bits=4, value_bits=3)
    levels = codec.encode(spec, words)
    by_token = np.ascontiguousarray(words.transpose(1, 0, 2))  # [tokens, heads, head_dim]
    assert codec.encode(spec, by_token.transpose(1, 0, 2)) == levels
    page = np.full((160, 5, 96), 0xDEAD, np.uint16)
    view = page[5:155, 1:4, 8:88].transpose(1, 0, 2)
    codec.decode(spec, levels, view)
    assert np.array_equal(view, words)
    view[...] = 0xDEAD
    assert (page == 0xDEAD).all(), "decode wrote beside the view"
    backwards = np.zeros_like(words)[::-1, ::-1]
    codec.decode(spec, levels, backwards)
    assert np.array_equal(backwards, words)


def test_sizes_of_a_cache_like_ours() -> None:
    """Gaussian channels are close to real keys: parameters and ranks cost what the specification says."""
    words = make("channels", "bfloat16", (1, 1024, 64), 11)
    spec = specification("key", "bfloat16", words.shape)
    bits = [8 * len(p) / words.size for p in get_codec("hq", anchor_bits=4).encode(spec, words)]
    assert bits[0] < 4.35
    assert bits[1] == pytest.approx(4, abs=0.01)
    assert bits[2] < 3.1


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PARTS), st.sampled_from(DTYPES), st.sampled_from([1, 9, 64, 100]), st.integers(0, 2**32), seeds)
def test_no_tile_grows_by_more_than_its_headers(part: str, dtype: str, tokens: int, pattern: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, span = pattern & 0xFFFF, (pattern >> 16 & 0xFFFF) + 1
    words = ((low + rng.integers(0, span, (1, tokens, 64))) & 0xFFFF).astype(np.uint16)
    spec = specification(part, dtype, words.shape)
    for codec in (get_codec("hq", anchor_bits=2), get_codec("hq", anchor_bits=8, levels=2)):
        levels = codec.encode(spec, words)
        assert sum(map(len, levels)) <= spec.nbytes + 8 * codec.levels
        assert np.array_equal(decoded(codec, spec, levels), words)
        assert [codec.encode(spec, words, levels=[i])[0] for i in range(codec.levels)] == levels


# --- hostile payloads


def outcome(codec: Any, spec: ChunkSpec, levels: Sequence[bytes]) -> Words | None:
    try:
        return decoded(codec, spec, levels)
    except PayloadError as error:
        message = str(error)
    assert "byte offset" in message
    assert "level" in message
    return None


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(PARTS), st.sampled_from(DTYPES), st.sampled_from(KINDS), seeds)
def test_mutated_payloads_are_errors_or_words(data: Any, part: str, dtype: str, kind: str, seed: int) -> None:
    words = make(kind, dtype, (1, 70, 72), seed)
    spec = specification(part, dtype, words.shape)
    codec = get_codec("hq", anchor_bits=data.draw(st.integers(2, 7)), levels=data.draw(st.integers(1, 3)))
    levels = [bytearray(p) for p in codec.encode(spec, words)]
    level = data.draw(st.integers(0, codec.levels - 1))
    payload = levels[level]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, min(len(payload) - 1, 60)), st.integers(0, len(payload) - 1)))
        payload[at] = data.draw(st.integers(0, 255))
    results = []
    for name in AVAILABLE:
        with isa(name):
            results.append(outcome(codec, spec, levels))
    for result in results[1:]:
        assert (result is None) == (results[0] is None)
        assert result is None or np.array_equal(result, results[0])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["channels", "any", "special"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_truncated_and_padded_payloads_are_errors(part: str, kind: str, count: int) -> None:
    words = make(kind, "bfloat16", (1, 70, 64), 13)
    spec = specification(part, "bfloat16", words.shape)
    codec = get_codec("hq", anchor_bits=3, levels=count)
    levels = [bytes(payload) for payload in codec.encode(spec, words)]
    for level, payload in enumerate(levels):
        for wrong in (payload + b"\0", payload[:-1], payload[: len(payload) // 2], payload[:8], payload[:7], b""):
            if wrong == payload:
                continue
            for out in (np.zeros_like(words), None):
                with pytest.raises(PayloadError, match=rf"level {level}.*byte offset"):
                    codec.decode(spec, [*levels[:level], wrong], out)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_any_block_is_raised(threads: int) -> None:
    words = make("channels", "bfloat16", (1, 512, 64), 31)
    spec = specification("key", "bfloat16", words.shape)
    codec = get_codec("hq", anchor_bits=4)
    levels = codec.encode(spec, words)
    broken = bytearray(levels[2])
    sizes = np.frombuffer(levels[2], "<u2", count=4 * 8, offset=8).reshape(8, 4)
    for block in range(8):
        table = sizes.copy()
        table[block, 0] -= 1  # a byte of A becomes one of B: the sum stays
        table[block, 1] += 1
        broken[8 : 8 + table.nbytes] = table.tobytes()
        out = np.zeros_like(words)
        with pytest.raises(PayloadError, match=rf"level 2.*ranks of block {block} of 8"):
            codec.decode(spec, [*levels[:2], bytes(broken)], out, threads=threads)


def test_hostile_parameters_are_errors() -> None:
    words = make("channels", "bfloat16", (1, 64, 64), 17)
    spec = specification("key", "bfloat16", words.shape)
    codec = get_codec("hq", anchor_bits=4)
    levels = codec.encode(spec, words)
    header = 8 + 4 * 512

    def with_header(*values: int) -> bytes:
        s, z, s_bits, z_bits = values
        raw = s.to_bytes(2, "little") + z.to_bytes(2, "little", signed=True) + bytes([s_bits, z_bits])
        return bytes(levels[0][:header]) + raw + bytes(levels[0][header + 6 :])

    s_bits, z_bits = levels[0][header + 4 : header + 6]
    for bad in (
        (0x0100, 0, s_bits, z_bits),  # scale below 2^-116
        (0x7E01, 0, s_bits, z_bits),  # above 2^125
        (0xBF80, 0, s_bits, z_bits),  # negative
        (0x3C00, 1025, s_bits, z_bits),
        (0x3C00, -1025, s_bits, z_bits),
        (0x3C00, 0, 16, z_bits),
        (0x3C00, 0, s_bits, 13),
        (0x3C00, 0, 255, z_bits),
        (0x3C00, 0, s_bits + 1, z_bits),  # parameters would be longer
        (0x3C00, 0, s_bits - 1, z_bits),  # shorter
    ):
        with pytest.raises(PayloadError, match=r"level 0.*parameters of block"):
            decoded(codec, spec, [with_header(*bad)])


def test_codes_out_of_range_are_errors() -> None:
    words = make("channels", "bfloat16", (1, 64, 64), 19)
    spec = specification("value", "bfloat16", words.shape)
    codec = get_codec("hq", anchor_bits=4)
    levels = [bytearray(p) for p in codec.encode(spec, words)]
    levels[0][8 : 8 + 4 * 512] = b"\xff" * 2048
    levels[1][8:] = b"\xff" * 2048  # all codes 255; the largest valid one is 249
    with pytest.raises(PayloadError, match=r"level 1.*codes of block 0"):
        decoded(codec, spec, levels[:2])


def test_levels_that_do_not_belong_together_are_errors() -> None:
    codec = get_codec("hq", anchor_bits=4)
    words = make("channels", "bfloat16", (1, 64, 64), 23)
    spec = specification("key", "bfloat16", words.shape)
    coded = codec.encode(spec, words)
    stored = codec.encode(spec, make("any", "bfloat16", (1, 64, 64), 23))
    with pytest.raises(PayloadError, match="stored"):
        decoded(codec, spec, [coded[0], stored[1]])
    with pytest.raises(PayloadError, match="level 1: the payload is of level 0"):
        decoded(codec, spec, [coded[0], coded[0]])
    other = specification("key", "bfloat16", (1, 65, 64))
    with pytest.raises(PayloadError, match="level 0"):
        decoded(codec, other, coded[:1])


# --- mixed widths: the C interface, which the tables of presets will use


def c_tile(part: str, dtype: str, shape: tuple[int, int, int], widths: NDArray[np.uint8]) -> Any:
    tile = ffi.new("lynx_hq_tile *")
    tile.dtype, tile.part = DTYPES.index(dtype), PARTS.index(part)
    tile.heads, tile.tokens, tile.head_dim = shape
    tile.widths = address(widths, "const uint8_t *")
    return tile


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DTYPES), shapes, st.sampled_from(KINDS), seeds)
@example("bfloat16", (2, 70, 96), "channels", 1)
@example("bfloat16", (1, 64, 64), "narrow", 2)
def test_mixed_widths(dtype: str, shape: tuple[int, int, int], kind: str, seed: int) -> None:
    words = make(kind, dtype, shape, seed)
    rng = np.random.default_rng(seed)
    widths = rng.integers(0, 9, (shape[0], shape[2])).astype(np.uint8)
    reference = Tile("key", dtype, shape, widths)
    expected = reference.encode(words)
    tile = c_tile("key", dtype, shape, widths)
    sizes = ffi.new("lynx_hq_sizes *")
    assert lib.lynx_hq_measure(tile, sizes) == lib.LYNX_OK
    memory = scratch()
    for name in AVAILABLE:
        with isa(name):
            sections = [
                np.empty(n, np.uint8)
                for n in (
                    sizes.anchor,
                    6 * sizes.blocks,
                    sizes.max_params,
                    sizes.rest,
                    8 * sizes.blocks,
                    sizes.max_rank,
                )
            ]
            out = ffi.new("lynx_hq_encoded *")
            out.anchor, out.param_headers, out.params, out.rest, out.rank_table, out.rank = map(address, sections)
            source = address(words, "const uint16_t *")
            strides = shape[1] * shape[2], shape[2]
            assert lib.lynx_hq_encode(tile, source, *strides, 0, sizes.blocks, out, address(memory)) == lib.LYNX_OK
            sections[2], sections[5] = sections[2][: out.params_size], sections[5][: out.rank_size]
            assert tuple(s.tobytes() for s in sections) == expected
            levels, fault = ffi.new("lynx_hq_levels *"), ffi.new("lynx_hq_fault *")
            levels.anchor, levels.param_headers, levels.params = (address(s, "const uint8_t *") for s in sections[:3])
            levels.params_size = out.params_size
            back = np.zeros_like(words)
            for count in (1, 2, 3):
                if count > 1:
                    levels.rest = address(sections[3], "const uint8_t *")
                if count > 2:
                    levels.rank_table, levels.rank = (address(s, "const uint8_t *") for s in sections[4:])
                    levels.rank_size = out.rank_size
                assert lib.lynx_hq_check(tile, levels, fault) == lib.LYNX_OK
                target = address(back, "uint16_t *")
                code = lib.lynx_hq_decode(tile, levels, target, *strides, 0, sizes.blocks, address(memory), fault)
                assert code == lib.LYNX_OK, error_text(code)
                given_sections = expected[: (3, 4, 6)[count - 1]]
                assert np.array_equal(back, restored(reference, *given_sections))
            assert np.array_equal(back, words)


def test_bad_widths_are_refused() -> None:
    sizes = ffi.new("lynx_hq_sizes *")
    for part, widths in (("key", [9] * 64), ("value", [3] * 63 + [4])):
        array = np.array(widths, np.uint8)
        assert lib.lynx_hq_measure(c_tile(part, "bfloat16", (1, 8, 64), array), sizes) == lib.LYNX_ERR_ARGUMENT


# --- interface


def test_config() -> None:
    codec = get_codec("hq", anchor_bits=3)
    assert codec.get_config() == {"id": "hq", "key_bits": 3, "value_bits": 3, "levels": 3}
    assert get_codec(codec.get_config()) == codec
    assert (codec.levels, codec.exact) == (3, True)
    lossy = get_codec("hq", anchor_bits=8, levels=1)
    assert (lossy.levels, lossy.exact) == (1, False)
    for bad in (
        {"anchor_bits": 1},
        {"anchor_bits": 9},
        {"anchor_bits": "4"},
        {"key_bits": 4, "levels": 4},
        {"anchor_bits": 8},
        {"nonsense": 1},
    ):
        with pytest.raises(ConfigError):
            get_codec("hq", **bad)


def test_support() -> None:
    codec = get_codec("hq")
    for part, dtype, good in (
        ("key", "bfloat16", True),
        ("value", "float16", True),
        ("latent", "bfloat16", False),
        ("opaque", "float16", False),
        ("packed-kv", "bfloat16", False),
        ("key", "float32", False),
        ("key", "float8_e4m3", False),
    ):
        spec = specification(part, dtype, (1, 64, 64))
        assert codec.supports(spec) is good
        if not good:
            with pytest.raises(SpecError, match="use bitplane or raw"):
                codec.encode(spec, np.zeros(spec.shape, spec.word_dtype))


def test_a_missing_library_is_a_named_error() -> None:
    """Without the native module `raw` works, and the others say how to build it."""
    script = """
import sys
sys.modules["lynxproto._native"] = None
from lynxproto import get_codec
from lynxproto.errors import MissingDependencyError
get_codec("raw")
for codec in ("hq", "bitplane"):
    try:
        get_codec(codec)
    except MissingDependencyError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.count("pip install -e .") == 2


def test_the_environment_selects_an_instruction_set() -> None:
    script = "from lynxproto.codecs._library import instruction_set; print(instruction_set())"
    for name in AVAILABLE:
        environment = {**os.environ, "LYNXPROTO_ISA": name}
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        assert run.stdout.strip() == name


def test_misuse() -> None:
    codec = get_codec("hq")
    words = make("channels", "bfloat16", (1, 64, 64), 29)
    spec = specification("key", "bfloat16", words.shape)
    levels = codec.encode(spec, words)
    state = codec.decode(spec, levels[:1], None)
    with pytest.raises(SpecError):
        codec.encode(spec, words, levels=[3])
    with pytest.raises(SpecError):
        codec.encode(spec, words[:, :63])
    with pytest.raises(SpecError):
        codec.decode(spec, [], words)
    with pytest.raises(SpecError):
        codec.decode(spec, [*levels, levels[2]], words)
    with pytest.raises(SpecError):
        codec.refine(spec, state, 2, levels[2], words)
    with pytest.raises(ConfigError):
        codec.encode(spec, words, threads=0)
    with pytest.raises(ConfigError):
        select_instruction_set("mmx")
    odd = np.zeros(words.nbytes + 1, np.uint8)[1:].view(np.uint16).reshape(words.shape)
    with pytest.raises(SpecError, match="address"):
        codec.decode(spec, levels, odd)
    with pytest.raises(SpecError, match="address"):
        codec.encode(spec, odd)
    readonly = words.copy()
    readonly.flags.writeable = False
    with pytest.raises(SpecError):
        codec.decode(spec, levels, readonly)
