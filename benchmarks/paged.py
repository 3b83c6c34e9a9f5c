"""Codecs on paged caches, beside the same words as contiguous arrays in the same run: one core, medians of ratios.

Chunks of 512 tokens x 8 heads x 128 channels (1 MiB of bfloat16, the default policy's tile), K and V in turn. The
cache of pages holds all chunks, its pages in random order; `packed` has V behind K in each row, as vLLM's [pages,
heads, tokens, 2 * head_dim]. Each round takes the contiguous arrays before and after each other layout, and sets its
time against their mean. `raw` has no contiguous encoder to be compared with (it lends the array): its paged encoder is
set against memcpy.

Small pages and long rows cost address translation, which is no part of a codec: --huge-pages shows the same without it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lynxproto.bench.machine import Workers, calm, environment
from lynxproto.chunk import DTYPES, ChunkSpec, Paged
from lynxproto.codecs import Codec, get_codec

HEADS, TOKENS = 8, 512
HUGE = 2 << 20
CODECS: dict[str, tuple[dict[str, Any], str]] = {
    "hq fast": ({"id": "hq", "preset": "fast"}, "bfloat16"),
    "hq balanced": ({"id": "hq", "preset": "balanced"}, "bfloat16"),
    "bitplane 9|7": ({"id": "bitplane", "planes": [9, 7]}, "bfloat16"),
    "bitplane 5|3": ({"id": "bitplane", "planes": [5, 3]}, "float8_e5m2"),
    "raw": ({"id": "raw"}, "bfloat16"),
}
LAYOUTS = [(layout, page, packed) for packed in (False, True) for layout in ("NHD", "HND") for page in (16, 128)]


@dataclass
class Place:
    """Where all chunks lie, to be read from and written to."""

    name: str
    sources: list[Any]
    targets: list[Any]


def zeros(shape: tuple[int, ...], dtype: Any, huge: bool) -> NDArray[Any]:
    """Memory of a cache, in pages of 2 MiB if asked for and if the system has them."""
    if not huge:
        return np.zeros(shape, dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, nbytes + HUGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    first = -array.ctypes.data % HUGE
    return array[first : first + nbytes].view(dtype).reshape(shape)


def words_of(dtype: str, shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """Gaussian values with channels of different sizes."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape, np.float32) * np.exp(random.normal(0, 1, shape[-1])).astype(np.float32)
    return (values.view(np.uint32) >> (32 - 8 * DTYPES[dtype].itemsize)).astype(DTYPES[dtype])


def pages_of(chunks: list[NDArray[Any]], layout: Any, page: int, packed: bool, huge: bool) -> list[Paged]:
    """The chunks in one cache of K and one of V, or of both."""
    heads, tokens, dim = chunks[0].shape
    count, total = tokens // page, tokens // page * len(chunks) // 2
    axes = (total, page, heads) if layout == "NHD" else (total, heads, page)
    if packed:
        memory = zeros((*axes, 2 * dim), chunks[0].dtype, huge)
        halves = memory[..., :dim], memory[..., dim:]
    else:
        halves = zeros((*axes, dim), chunks[0].dtype, huge), zeros((*axes, dim), chunks[0].dtype, huge)
    order = np.random.default_rng(7).permutation(total).reshape(len(chunks) // 2, count)
    found = []
    for i, chunk in enumerate(chunks):
        cut, half, table = chunk.reshape(heads, count, page, dim), halves[i % 2], order[i // 2]
        half[table] = cut.transpose(1, 2, 0, 3) if layout == "NHD" else cut.transpose(1, 0, 2, 3)
        found.append(Paged(half, table, layout))
    return found


def operations(
    codec: Codec, specs: list[ChunkSpec], place: Place, payloads: list[Any]
) -> dict[str, Callable[[int], Any]]:
    """What is timed, by chunk."""
    found: dict[str, Callable[[int], Any]] = {"encode": lambda i: codec.encode(specs[i], place.sources[i])}
    if codec.levels > 1:
        found["anchor decode"] = lambda i: codec.decode(specs[i], payloads[i][:1], place.targets[i])
    found["exact decode"] = lambda i: codec.decode(specs[i], payloads[i], place.targets[i])
    return found


def measure(name: str, chunks: int, runs: int, dim: int, huge: bool) -> list[dict[str, Any]]:
    """Ratios of one codec, by layout and operation."""
    config, dtype = CODECS[name]
    codec = get_codec(config)
    specs = [ChunkSpec("value" if i % 2 else "key", dtype, HEADS, TOKENS, dim) for i in range(chunks)]
    some = [words_of(dtype, spec.shape, i) for i, spec in enumerate(specs[:8])]
    words = [some[i % 8].copy() for i in range(chunks)]
    flat = Place("contiguous", words, [np.empty_like(w) for w in words])
    payloads = [codec.encode(spec, w) for spec, w in zip(specs, words, strict=True)]
    nbytes = sum(spec.nbytes for spec in specs)
    base = operations(codec, specs, flat, payloads)
    if codec.codec_id == "raw":
        base["encode"] = lambda i: words[i].copy()
    results = []
    with Workers(1) as workers:

        def seconds(work: Callable[[int], Any]) -> float:
            return workers.run(work, range(chunks))[1].processor

        for layout, page, packed in LAYOUTS:
            place = Place(f"{layout}{' packed' if packed else ''}", pages_of(words, layout, page, packed, huge), [])
            place.targets = pages_of([np.zeros_like(w) for w in words], layout, page, packed, huge)
            for operation, work in operations(codec, specs, place, payloads).items():
                ratios, speeds = [], []
                for number in range(runs + 1):
                    before, spent, after = seconds(base[operation]), seconds(work), seconds(base[operation])
                    if number:  # the first warms up
                        ratios.append((before + after) / 2 / spent)
                        speeds.append(nbytes / spent / 1e9)
                results.append({
                    "codec": name, "layout": place.name, "page_tokens": page, "operation": operation,
                    "gb_per_s": statistics.median(speeds), "ratio": statistics.median(ratios),
                })  # fmt: skip
            raw = get_codec("raw")
            for spec, target, w in zip(specs, place.targets, words, strict=True):
                assert bytes(raw.encode(spec, target)[0]) == w.tobytes(), "words differ"
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", choices=CODECS, action="append", help="default: all")
    parser.add_argument("--chunks", type=int, default=64, help="of 1 MiB; two copies of each are in use")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--huge-pages", action="store_true", help="the caches' memory in pages of 2 MiB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with calm(cold_allocator=False):
        for name in args.codec or CODECS:
            found = measure(name, args.chunks, args.runs, args.head_dim, args.huge_pages)
            results += found
            for r in found:
                print(f"{r['codec']:<13} {r['layout']:<11} {r['page_tokens']:>4}  {r['operation']:<14}"
                      f"{r['gb_per_s']:6.2f} GB/s  {r['ratio']:.2f} of contiguous")  # fmt: skip
    worst = min(results, key=lambda r: r["ratio"])
    place = ", ".join(str(worst[key]) for key in ("codec", "layout", "page_tokens", "operation"))
    print(f"least: {worst['ratio']:.2f} ({place})")
    if args.json:
        report = {"schema": "lynxproto.bench.paged/1", "environment": environment(), "huge_pages": args.huge_pages}
        args.json.write_text(json.dumps({**report, "results": results}, indent=1))


if __name__ == "__main__":
    main()
