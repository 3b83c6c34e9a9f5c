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
from reference_hq import Sections, Tile, biases_of, exponents_of, nibbles, payloads, spreads, weights, widths_by_range

from lynxproto import ChunkSpec, get_codec
from lynxproto.chunk import Paged, as_words
from lynxproto.codecs._library import (
    ISAS,
    address,
    ffi,
    instruction_set,
    lib,
    select_instruction_set,
)
from lynxproto.codecs.hq import PRESETS
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


def configs() -> st.SearchStrategy[dict[str, Any]]:
    uniform = [
        {"key_bits": k, "value_bits": v, "levels": n}
        for k, v, n in itertools.product(range(2, 9), range(2, 9), (1, 2, 3))
        if n < 3 or (k, v) != (8, 8)
    ]
    ranges = [
        {"widths": "ranges", "key_bits": k, "value_bits": v, "levels": n}
        for k, v, n in itertools.product((2, 2.5, 3, 4.25, 7), (2, 3, 4, 8), (1, 2, 3))
    ]
    flags = st.fixed_dictionaries({"fold": st.booleans(), "scaling": st.booleans()})
    return st.builds(lambda base, more: base | more, st.sampled_from(uniform) | st.sampled_from(ranges), flags)


def reference_of(config: dict[str, Any], part: str, dtype: str, words: Words) -> tuple[Tile, bytes]:
    """The reference's tile for a config, and the tables that the payload carries."""
    heads, _, dim = words.shape
    exponents, biases, side = None, None, b""
    if part == "key" and config.get("widths") == "ranges":
        widths = widths_by_range(weights(*spreads(dtype, words)), config["key_bits"])
        side = nibbles(widths)
    else:
        widths = np.full((heads, dim), config[f"{part}_bits"], np.uint8)
    if part == "value" and config.get("scaling") and dtype == "bfloat16":
        exponents = exponents_of(spreads(dtype, words)[1])
        side = nibbles(exponents + 8)
    if part == "value" and config.get("fold"):
        biases = biases_of(words)
        side += nibbles(biases + 8)
    fold = config.get("fold", False)
    return Tile(part, dtype, words.shape, widths, fold=fold, exponents=exponents, biases=biases), side


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PARTS), st.sampled_from(DTYPES), st.tuples(shapes, st.sampled_from(KINDS)), configs(), seeds)
@example("key", "bfloat16", ((2, 70, 80), "channels"), {"key_bits": 4, "value_bits": 3, "levels": 3}, 1)
@example("value", "bfloat16", ((2, 70, 80), "channels"), {"key_bits": 4, "value_bits": 3, "levels": 3}, 1)
@example("key", "float16", ((1, 70, 96), "channels"), {"key_bits": 3, "value_bits": 3, "levels": 3}, 2)
@example("value", "float16", ((1, 70, 96), "special"), {"key_bits": 3, "value_bits": 2, "levels": 2}, 2)
@example("key", "bfloat16", ((2, 70, 80), "channels"), {**PRESETS["balanced"], "levels": 3}, 3)
@example("value", "bfloat16", ((2, 70, 80), "channels"), {**PRESETS["balanced"], "levels": 3}, 3)
@example("key", "bfloat16", ((2, 70, 80), "channels"), {**PRESETS["dense"], "key_bits": 2, "levels": 3}, 3)
@example("key", "bfloat16", ((2, 70, 80), "channels"), {**PRESETS["dense"], "key_bits": 2, "levels": 2}, 3)
@example("value", "bfloat16", ((2, 70, 80), "channels"), {**PRESETS["dense"], "value_bits": 2, "levels": 3}, 3)
@example("value", "bfloat16", ((2, 70, 80), "exponents"), {**PRESETS["fast"], "levels": 3}, 3)
@example("value", "bfloat16", ((2, 70, 80), "special"), {**PRESETS["dense"], "levels": 2}, 3)
def test_bytes_are_the_references_on_every_instruction_set(
    part: str, dtype: str, tile: tuple[tuple[int, int, int], str], config: dict[str, Any], seed: int
) -> None:
    shape, kind = tile
    words = make(kind, dtype, shape, seed)
    count = config["levels"]
    spec = specification(part, dtype, shape)
    codec = get_codec("hq", **config)
    reference, side = reference_of(config, part, dtype, words)
    expected = payloads(reference, words, count, side)
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
        sections = split(reference, expected, count, len(side))
        assert np.array_equal(results[0][0], reference.decode(sections, 1))
        if count == 3:
            assert np.array_equal(results[0][1], reference.decode(sections, 2))
        if count > 1:
            assert np.array_equal(results[0][-1], reference.decode(sections, 3))


def split(tile: Tile, levels: list[bytes], count: int, side: int) -> Sections:
    """The sections in a tile's payloads."""
    blocks = len(tile.blocks())
    params = int.from_bytes(levels[0][4:8], "little")
    folds, body = cut(levels[0][8 + side :], 2 * blocks * tile.fold)
    planes, body = cut(body, len(body) - params - 6 * blocks)
    first = planes, *cut(body, 6 * blocks)
    if count == 1:
        return Sections(*first, folds=folds)
    rest_folds, rest = cut(levels[1][8:], 2 * blocks * tile.folds_rest)
    exact = levels[-1][8:]
    if count == 2:
        ranks = int.from_bytes(levels[1][4:8], "little")
        rest, exact = cut(rest, len(rest) - ranks - 4 * blocks)
    return Sections(*first, rest, *cut(exact, 4 * blocks), folds, rest_folds)


def cut(data: bytes, at: int) -> tuple[bytes, bytes]:
    return data[:at], data[at:]


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
        for codec in (
            get_codec("hq", anchor_bits=4),
            get_codec("hq", anchor_bits=8, levels=2),
            get_codec("hq", preset="balanced"),
        ):
            levels = codec.encode(spec, words)
            assert np.array_equal(decoded(codec, spec, levels), words)
            assert sum(map(len, levels)) <= spec.nbytes + 8 * codec.levels


@pytest.mark.parametrize("dim", [1, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [1, 3, 64, 129])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{"key_bits": 4, "value_bits": 3}, {"preset": "balanced"}], ids=["flat", "folded"])
def test_shapes(part: str, dtype: str, tokens: int, dim: int, config: dict[str, Any]) -> None:
    words = make("channels", dtype, (3, tokens, dim), dim)
    spec = specification(part, dtype, words.shape)
    codec = get_codec("hq", **config)
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
    codec = get_codec("hq", preset="balanced", levels=count)
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


PAGED_CONFIGS: list[dict[str, Any]] = [
    {"id": "hq", **PRESETS["dense"]},
    {"id": "hq", **PRESETS["fast"]},
    {"id": "raw"},
    {"id": "bitplane", "planes": [9, 7]},
]


@pytest.mark.parametrize("config", PAGED_CONFIGS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("page_tokens", "first"), [(16, 0), (16, 5), (128, 0), (100, 99), (1, 0)])
def test_paged_caches(config: dict[str, Any], layout: Any, page_tokens: int, first: int) -> None:
    heads, tokens, dim = 2, 200, 80
    random = np.random.default_rng(page_tokens + first)
    used = -(-(first + tokens) // page_tokens)
    table = random.permutation(used + 3)[:used]
    axes = (used + 3, page_tokens, heads) if layout == "NHD" else (used + 3, heads, page_tokens)
    cache, other = (np.full((*axes, dim), 7, np.uint16) for _ in range(2))
    words = make("channels", "bfloat16", (heads, tokens, dim), 3)
    for t in range(tokens):
        page, inside = table[(first + t) // page_tokens], (first + t) % page_tokens
        cache[(page, inside) if layout == "NHD" else (page, slice(None), inside)] = words[:, t]
    codec = get_codec(config)
    for part in PARTS:
        spec = specification(part, "bfloat16", words.shape)
        levels = codec.encode(spec, Paged(cache, table, layout, first), threads=2)
        assert [bytes(level) for level in levels] == [bytes(level) for level in codec.encode(spec, words)]
        for count in range(1, len(levels) + 1):
            other[...] = 7
            codec.decode(spec, levels[:count], Paged(other, table, layout, first), threads=2)
            page, inside = table[(first + 150) // page_tokens], (first + 150) % page_tokens
            place = other[page, inside] if layout == "NHD" else other[page, :, inside]
            assert np.array_equal(place, decoded(codec, spec, levels[:count])[:, 150])
        assert np.array_equal(other, cache)


def test_paged_caches_are_checked() -> None:
    pages = np.zeros((4, 16, 2, 64), np.uint16)
    spec = specification("key", "bfloat16", (2, 40, 64))
    codec = get_codec("hq", preset="fast")
    for bad, what in (
        (lambda: Paged(pages, [0, 1, 4]), "0 to 3"),
        (lambda: Paged(pages, [0, -1]), "0 to 3"),
        (lambda: Paged(pages[0], [0]), "dimensions"),
        (lambda: Paged(pages, [0], "NDH"), "layout"),
        (lambda: Paged(pages, [0], first=16), "first"),
        (lambda: codec.encode(spec, Paged(pages, [0, 1])), "do not hold"),
        (lambda: codec.encode(spec, Paged(pages, [0, 1, 2], "HND")), "heads"),
        (lambda: codec.encode(spec, Paged(pages[..., ::2], [0, 1, 2])), "contiguous"),
        (lambda: as_words(spec, Paged(pages, [0, 1, 2])), "paged"),
    ):
        with pytest.raises(SpecError, match=what):
            bad()


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
    count = data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        codec = get_codec("hq", anchor_bits=data.draw(st.integers(2, 7)), levels=count)
    else:
        codec = get_codec("hq", preset=data.draw(st.sampled_from(sorted(PRESETS))), levels=count)
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


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_large_tiles_may_lie_anywhere(name: str, part: str, preset: str) -> None:
    """Large anchors go past the caches in whole lines: of outputs that begin within one, the rest is not touched."""
    words = make("channels", "bfloat16", (2, 1090, 64), 17)
    spec = specification(part, "bfloat16", words.shape)
    codec = get_codec("hq", preset=preset)
    levels = codec.encode(spec, words)
    with isa("scalar"):
        expected = [decoded(codec, spec, levels[:n]) for n in (1, 2, 3)]
    memory = np.empty(words.size + 128, np.uint16)
    line = -memory.ctypes.data // 2 % 32
    with isa(name):
        for n, offset in itertools.product((1, 2, 3), (0, 1, 2, 8, 16, 24, 31)):
            start = line + offset
            memory[:] = 0xDEAD
            codec.decode(spec, levels[:n], memory[start : start + words.size].reshape(words.shape))
            assert np.array_equal(memory[start : start + words.size].reshape(words.shape), expected[n - 1])
            assert (memory[:start] == 0xDEAD).all()
            assert (memory[start + words.size :] == 0xDEAD).all()
        for n, width in itertools.product((1, 2, 3), (2, 3)):  # rows that lie apart: [tokens, heads, head_dim]
            apart = np.full((1090, width, 64), 0xDEAD, np.uint16)
            codec.decode(spec, levels[:n], apart.transpose(1, 0, 2)[:2], threads=n)
            assert np.array_equal(apart.transpose(1, 0, 2)[:2], expected[n - 1])
            assert (apart[:, 2:] == 0xDEAD).all()


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
    sizes = np.frombuffer(levels[2], "<u2", count=2 * 8, offset=8).reshape(8, 2)
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
        (0x3C00, 0, 14, z_bits),
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


# --- widths


def digits(widths: NDArray[np.uint8]) -> list[list[str]]:
    """``[layers, heads, channels]`` as a config has it."""
    return [["".join(map(str, head)) for head in layer] for layer in widths.tolist()]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DTYPES), shapes, st.sampled_from(KINDS), st.booleans(), seeds)
@example("bfloat16", (2, 70, 96), "channels", False, 1)
@example("bfloat16", (2, 70, 96), "channels", True, 1)
@example("bfloat16", (1, 64, 64), "narrow", True, 2)
def test_mixed_widths(dtype: str, shape: tuple[int, int, int], kind: str, fold: bool, seed: int) -> None:
    words = make(kind, dtype, shape, seed)
    rng = np.random.default_rng(seed)
    widths = rng.integers(0, 9, (2, shape[0] + 1, shape[2])).astype(np.uint8)
    table = {"keys": digits(widths), "values": ["".join(map(str, layer)) for layer in widths[:, :, 0].tolist()]}
    codec = get_codec("hq", widths=table, fold=fold)
    assert get_codec(codec.get_config()) == codec
    for part in PARTS:
        spec = ChunkSpec(
            part=part, dtype=dtype, heads=shape[0], tokens=shape[1], head_dim=shape[2], layer=1, head_start=1
        )
        own = widths[1, 1:] if part == "key" else np.repeat(widths[1, 1:, :1], shape[2], axis=1)
        biases = biases_of(words) if part == "value" and fold else None
        reference = Tile(part, dtype, shape, own, fold=fold, biases=biases)
        side = b"" if biases is None else nibbles(biases + 8)
        expected = payloads(reference, words, 3, side)
        for name in AVAILABLE:
            with isa(name):
                assert codec.encode(spec, words) == expected
                assert np.array_equal(decoded(codec, spec, expected), words)
                assert all(len(p) <= codec.max_encoded_size(spec, i) for i, p in enumerate(expected))
                if expected[0][0] == 0:
                    sections = split(reference, expected, 3, len(side))
                    for count in (1, 2):
                        assert np.array_equal(decoded(codec, spec, expected[:count]), reference.decode(sections, count))


def test_a_table_without_the_tile_is_a_named_error() -> None:
    codec = get_codec("hq", widths={"keys": [["33445566"] * 2] * 3, "values": ["34"] * 3})
    words = np.zeros((1, 8, 8), np.uint16)
    good = {"part": "key", "dtype": "bfloat16", "heads": 1, "tokens": 8, "head_dim": 8, "layer": 0}
    codec.encode(ChunkSpec(**good), words)
    for change, what in (
        ({"layer": None}, "layers"),
        ({"layer": 3}, "layers"),
        ({"head_start": 2}, "heads"),
        ({"head_dim": 16}, "channels"),
    ):
        spec = ChunkSpec(**(good | change))
        with pytest.raises(SpecError, match=what):
            codec.encode(spec, np.zeros(spec.shape, np.uint16))


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"keys": [["33"]]},
        {"keys": [["33"]], "values": []},
        {"keys": [], "values": []},
        {"keys": [["39"]], "values": ["3"]},
        {"keys": ["33"], "values": ["3"]},
        {"keys": [[33]], "values": ["3"]},
        {"keys": [["33", "333"]], "values": ["33"]},
        {"keys": [["33"]], "values": ["33"]},
        {"keys": [["33"]], "values": ["3"], "hash": "0"},
        {"keys": [["33"]], "values": ["3"], "more": 1},
    ],
)
def test_bad_tables_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"table|digits|list"):
        get_codec("hq", widths=table)


def test_widths_by_range_follow_the_weights() -> None:
    words = make("channels", "bfloat16", (2, 200, 64), 5)
    codec = get_codec("hq", key_bits=2.5, value_bits=3, widths="ranges")
    spec = specification("key", "bfloat16", words.shape)
    packed = np.frombuffer(codec.encode(spec, words)[0], np.uint8)[8 : 8 + 64]
    widths = np.stack([packed & 15, packed >> 4], 1).ravel()
    assert widths.sum() == int(2.5 * 128)
    weight = weights(*spreads("bfloat16", words)).ravel()
    order = np.lexsort((-np.arange(weight.size), weight))  # of equal ones the first gets its bit first
    assert (np.diff(widths[order].astype(int)) >= 0).all()
    hostile = bytearray(codec.encode(spec, words)[0])
    hostile[8] = 0x99
    with pytest.raises(PayloadError, match=r"level 0.*width.*byte offset 8"):
        decoded(codec, spec, [bytes(hostile)])


def test_a_special_word_costs_its_block_only() -> None:
    words = make("channels", "bfloat16", (1, 640, 64), 6)
    for part in PARTS:
        spec = specification(part, "bfloat16", words.shape)
        codec = get_codec("hq", preset="balanced")
        before = sum(map(len, codec.encode(spec, words)))
        poisoned = words.copy()
        poisoned[0, 100, 3] = 0x7FC1
        after = codec.encode(spec, poisoned)
        assert np.array_equal(decoded(codec, spec, after), poisoned)
        assert sum(map(len, after)) - before < 2 * 64 * 64


def test_hostile_folds_are_errors() -> None:
    words = make("channels", "bfloat16", (1, 128, 64), 7)
    spec = specification("value", "bfloat16", words.shape)
    codec = get_codec("hq", value_bits=3, key_bits=3, fold=True)
    level = bytes(codec.encode(spec, words)[0])
    at = 8 + 32  # behind the biases
    entries = np.frombuffer(level, "<u2", count=2, offset=at)
    assert ((entries & 0x1FFF) < 512).all()
    assert (entries >> 15 == 0).all()
    first, second = entries.tolist()
    hostile = (
        (0, 0),
        (first + 1, second),
        (first + 1, second - 1),
        (512, 0),
        (0xFFFF, second),
        (first | 0x8000, second),
        (0x7FFF, second),
    )
    for bad in hostile:
        broken = level[:at] + np.array(bad, "<u2").tobytes() + level[at + 4 :]
        with pytest.raises(PayloadError, match=r"level 0.*anchor planes of block.*byte offset"):
            decoded(codec, spec, [broken])
    ones = level[: at + 4] + b"\xff" * 1024 + level[at + 4 + 1024 :]  # all values far: the streams would be longer
    with pytest.raises(PayloadError, match=r"level 0.*anchor planes of block 0"):
        decoded(codec, spec, [ones])


def test_hostile_folds_of_the_rest_are_errors() -> None:
    words = make("channels", "bfloat16", (1, 128, 64), 7)
    spec = specification("key", "bfloat16", words.shape)
    codec = get_codec("hq", widths="ranges", key_bits=2, fold=True)
    levels = [bytes(level) for level in codec.encode(spec, words)]
    first, second = np.frombuffer(levels[1], "<u2", count=2, offset=8).tolist()
    assert first != 0xFFFF
    assert second != 0xFFFF
    for bad in (
        (0, second),
        (first + 1, second - 1),
        (first, 0xFFFF),
        (first | 0x8000, second),
        (first ^ 0x2000, second),
    ):
        broken = levels[1][:8] + np.array(bad, "<u2").tobytes() + levels[1][12:]
        with pytest.raises(PayloadError, match=r"level 1.*codes of block.*byte offset"):
            decoded(codec, spec, [levels[0], broken, *levels[2:]])


def test_bad_widths_are_refused() -> None:
    bounds = ffi.new("lynx_hq_bounds *")
    for part, widths in (("key", [9] * 64), ("value", [3] * 63 + [4])):
        array = np.array(widths, np.uint8)
        shape = {"part": PARTS.index(part), "heads": 1, "tokens": 8, "head_dim": 64, "levels": 3}
        config = ffi.new("lynx_hq_config *", shape)
        config.widths = address(array, "const uint8_t *")
        assert lib.lynx_hq_measure(config, bounds) == lib.LYNX_ERR_ARGUMENT


# --- interface


def test_config() -> None:
    codec = get_codec("hq", anchor_bits=3)
    assert codec.get_config() == {
        "id": "hq",
        "key_bits": 3,
        "value_bits": 3,
        "levels": 3,
        "widths": "uniform",
        "fold": False,
        "scaling": False,
    }
    for preset, config in PRESETS.items():
        chosen = get_codec("hq", preset=preset)
        assert chosen.get_config() == {"id": "hq", "levels": 3} | config
        assert get_codec(chosen.get_config()) == chosen
    assert get_codec("hq", preset="dense", fold=False, key_bits=3).get_config()["key_bits"] == 3
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
        {"preset": "best"},
        {"key_bits": 2.5},
        {"value_bits": 2.5, "widths": "ranges"},
        {"key_bits": 7.5, "widths": "ranges"},
        {"widths": "mixed"},
        {"fold": 1},
        {"scaling": "yes"},
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


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("part", PARTS)
def test_streams_may_end_at_any_bit(name: str, part: str) -> None:
    """Streams of bits are written a word at a time, and the last call may begin another. Few words make some dense."""
    codec = get_codec("hq", preset="dense")
    with isa(name):
        for seed in range(96, 200):
            rng = np.random.default_rng(seed)
            shape = (2, int(rng.choice([33, 64, 67])), int(rng.choice([64, 71, 72])))
            words = np.zeros(shape, np.uint16)
            places = rng.integers(0, 64 if seed % 2 else words.size, int(rng.integers(1, 8)))
            words.reshape(-1)[places] = rng.integers(0, 1 << 16, len(places))
            spec = specification(part, "bfloat16", shape)
            assert np.array_equal(decoded(codec, spec, codec.encode(spec, words)), words)
