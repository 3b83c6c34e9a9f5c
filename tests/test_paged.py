"""Paged caches: codecs read block tables and write into them, with the payloads of contiguous words, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import lynxproto
from lynxproto.chunk import DTYPES, ChunkSpec, Paged
from lynxproto.codecs import Codec, get_codec

HQ = {dtype: [get_codec("hq", preset="fast"), get_codec("hq", preset="dense")] for dtype in ("bfloat16", "float16")}
FP8 = [get_codec("raw"), get_codec("raw", zstd=1), get_codec("bitplane", planes=[5, 3]),
       get_codec("bitplane", planes=[4, 2, 2], zstd=1)]  # fmt: skip
WORDS16 = [get_codec("raw"), get_codec("bitplane", planes=[9, 7]), get_codec("bitplane", planes=[4, 4, 8])]
CODECS: dict[str, list[Codec]] = {
    "bfloat16": [*WORDS16, *HQ["bfloat16"]],
    "float16": [*WORDS16, *HQ["float16"]],
    "float8_e4m3": FP8,
    "float8_e5m2": FP8,
    "float32": [get_codec("raw"), get_codec("bitplane", planes=[9, 23])],
}


@dataclass(frozen=True)
class Cache:
    """A paged cache that holds a tile, and one of the same kind; ``beside`` marks the words that are not the tile's."""

    spec: ChunkSpec
    words: NDArray[Any]
    paged: Paged
    other: Paged
    memory: NDArray[Any]
    other_memory: NDArray[Any]
    beside: NDArray[np.bool_]


def filled(dtype: str, shape: tuple[int, ...], seed: int, *, tame: bool) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    if tame and dtype in HQ:
        values = random.normal(0, 1, shape).astype(np.float32) * random.uniform(0.1, 8, shape[-1]).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(kind) if dtype == "bfloat16" else values.astype("<f2").view(kind)
    return random.integers(0, 1 << (8 * kind.itemsize), shape, dtype=kind, endpoint=False)


@st.composite
def caches(draw: st.DrawFn) -> Cache:
    """Block tables in any order, a partial first and last page, K and V beside each other or not, gaps between rows."""
    dtype = draw(st.sampled_from(sorted(CODECS)))
    part: Any = draw(st.sampled_from(["key", "value"]))
    layout: Literal["NHD", "HND"] = draw(st.sampled_from(["NHD", "HND"]))
    page_tokens = draw(st.sampled_from([1, 3, 16, 128]) | st.integers(1, 70))
    heads, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([1, 64, 130]) | st.integers(1, 150))
    dim = draw(st.sampled_from([1, 8, 64, 80, 128]) | st.integers(1, 70))
    first = draw(st.integers(0, page_tokens - 1))
    used = -(-(first + tokens) // page_tokens)
    count = used + draw(st.integers(0, 3))
    table = draw(st.permutations(range(count)))[:used]
    before, after = draw(st.sampled_from([(0, 0), (0, dim), (dim, 0), (0, 1), (2, 3)]))  # (0, dim): V behind each K
    axes = (count, page_tokens, heads) if layout == "NHD" else (count, heads, page_tokens)
    words = filled(dtype, (heads, tokens, dim), draw(st.integers(0, 99)), tame=draw(st.booleans()))
    made = []
    for seed in (1, 2):
        memory = filled(dtype, (*axes, before + dim + after), seed, tame=False)
        made.append((memory, Paged(memory[..., before : before + dim], table, layout, first)))
    (memory, paged), (other_memory, other) = made
    beside = np.ones(memory.shape, bool)
    for t in range(tokens):
        page, inside = table[(first + t) // page_tokens], (first + t) % page_tokens
        place = (page, inside) if layout == "NHD" else (page, slice(None), inside)
        memory[place][:, before : before + dim] = words[:, t]
        beside[place][:, before : before + dim] = False
    spec = ChunkSpec(part, dtype, heads, tokens, dim)
    return Cache(spec, words, paged, other, memory, other_memory, beside)


@settings(max_examples=150, deadline=None)
@given(cache=caches(), threads=st.integers(1, 2))
def test_payloads_are_those_of_contiguous_words_and_land_in_any_pages(cache: Cache, threads: int) -> None:
    spec, was = cache.spec, cache.other_memory.copy()
    for codec in CODECS[spec.dtype]:
        levels = codec.encode(spec, cache.paged, threads=threads)
        assert [bytes(level) for level in levels] == [bytes(level) for level in codec.encode(spec, cache.words)]
        for count in range(1, len(levels) + 1):
            plain = np.empty_like(cache.words)
            codec.decode(spec, levels[:count], plain)
            codec.decode(spec, levels[:count], cache.other, threads=threads)
            again = get_codec("raw").encode(spec, cache.other)[0]
            assert bytes(again) == plain.tobytes(), f"{codec.get_config()}: {count} levels"
        assert bytes(again) == cache.words.tobytes()
        assert np.array_equal(cache.other_memory[cache.beside], was[cache.beside]), "written beside the tile"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_tensors_packed_as_vllm_does(dtype: str) -> None:
    """K and V of a head behind each other, [pages, heads, page_tokens, 2 * head_dim]; pages of 16 into pages of 128."""
    torch = pytest.importorskip("torch")
    heads, tokens, dim = 2, 300, 64
    kind = getattr(torch, dtype)
    table = torch.randperm(25)[:19]
    cache = torch.randn(25, heads, 16, 2 * dim).to(kind)
    target = torch.zeros(4, 128, heads, 2 * dim).to(kind)  # NHD
    small = dtype.startswith("float8")
    codec = get_codec("bitplane", planes=[5, 3]) if small else get_codec("hq", preset="balanced")
    for part, at in (("key", slice(0, dim)), ("value", slice(dim, 2 * dim))):
        spec = lynxproto.ChunkSpec(part, dtype.removesuffix("fn"), heads, tokens, dim)
        levels = codec.encode(spec, Paged(cache[..., at], table, "HND"))
        codec.decode(spec, levels, Paged(target[..., at], [2, 0, 3], "NHD"))
    words = torch.uint8 if small else torch.int16
    whole = cache[table].view(words).transpose(1, 2).reshape(19 * 16, heads, 2 * dim)[:tokens]
    landed = target[[2, 0, 3]].view(words).reshape(3 * 128, heads, 2 * dim)[:tokens]
    assert torch.equal(whole, landed)
    if small:  # the whole page as one part
        spec = lynxproto.ChunkSpec("packed-kv", dtype.removesuffix("fn"), heads, tokens, 2 * dim)
        for config in ({"id": "raw"}, {"id": "bitplane", "planes": [4, 4]}):
            other = torch.zeros_like(target)
            packed = get_codec(config)
            packed.decode(spec, packed.encode(spec, Paged(cache, table, "HND")), Paged(other, [2, 0, 3], "NHD"))
            assert torch.equal(other.view(words), target.view(words))
