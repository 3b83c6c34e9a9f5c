"""Speed and size of the codecs, against memcpy in the same run.

    python benchmarks/codec_speed.py [--keys K.npy --values V.npy] [--megabytes 256] [--rounds 7] [--threads 1]

The arrays hold 16-bit words of shape [layers, heads, tokens, head_dim]; without them a synthetic cache is coded, which
is good for speeds only. GB/s are of uncompressed bytes. The working set should be at least 8 times the last-level
cache; every round measures memcpy and every codec once, and the table shows medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lynxproto import ChunkSpec, get_codec
from lynxproto.chunk import Part
from lynxproto.codecs import Codec
from lynxproto.codecs._library import ISAS, instruction_set, select_instruction_set
from lynxproto.codecs.hq import PRESETS

Words = NDArray[np.uint16]
TILE_TOKENS = 2048


def synthetic(rng: np.random.Generator) -> Words:
    """Gaussian channels with their own means and spreads: [4, 8, 2048, 64] bfloat16 words."""
    shape = (4, 8, 2048, 64)
    spread = np.exp(rng.normal(size=(4, 8, 1, 64)))
    x = (rng.normal(size=shape) + 2 * rng.normal(size=(4, 8, 1, 64))) * spread
    return ((x.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def tiles(cache: Words, megabytes: int) -> list[Words]:
    """Tiles [heads, tokens, head_dim], repeated as copies until they fill `megabytes`."""
    cut = [t for layer in cache for t in np.split(layer, range(TILE_TOKENS, layer.shape[1], TILE_TOKENS), axis=1)]
    wanted = megabytes * 1_000_000
    result: list[Words] = []
    while sum(t.nbytes for t in result) < wanted:
        result.append(np.ascontiguousarray(cut[len(result) % len(cut)]))
    return result


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


class Case:
    """One codec on one part."""

    def __init__(
        self, codec: Codec, part: Part, *, dtype: str, words: list[Words], outs: list[Words], threads: int
    ) -> None:
        self.codec, self.part, self.threads = codec, part, threads
        self.words, self.outs = words, outs
        self.specs = [
            ChunkSpec(part=part, dtype=dtype, heads=w.shape[0], tokens=w.shape[1], head_dim=w.shape[2]) for w in words
        ]
        self.payloads = [codec.encode(s, w, threads=threads) for s, w in zip(self.specs, words, strict=True)]
        self.times: dict[str, list[float]] = {}

    def encode(self, levels: list[int] | None) -> None:
        for spec, words in zip(self.specs, self.words, strict=True):
            self.codec.encode(spec, words, levels=levels, threads=self.threads)

    def decode(self, count: int) -> None:
        for spec, payload, out in zip(self.specs, self.payloads, self.outs, strict=True):
            self.codec.decode(spec, payload[:count], out, threads=self.threads)

    def round(self, clock: Callable[[], float]) -> None:
        steps: dict[str, Callable[[], object]] = {
            "encode": lambda: self.encode(None),
            "encode anchor": lambda: self.encode([0]),
        }
        for count in range(1, self.codec.levels + 1):
            steps[f"decode {count}"] = lambda count=count: self.decode(count)  # type: ignore[misc]
        for name, step in steps.items():
            self.times.setdefault(name, []).append(seconds(step, clock))
        if self.codec.exact and not all(map(np.array_equal, self.words, self.outs)):
            raise SystemExit(f"{self.codec}: decoded words differ")

    def report(self, memcpy: float) -> None:
        nbytes = sum(w.nbytes for w in self.words)
        bits = [
            16 * sum(memoryview(p[level]).nbytes for p in self.payloads) / nbytes for level in range(self.codec.levels)
        ]
        total = sum(bits)
        print(f"\n{self.codec!r} {self.part}: bits {' + '.join(f'{b:.3f}' for b in bits)} = {total:.3f}", end="")
        print(f" ({total / 16:.4f})")
        for name, times in self.times.items():
            speed = nbytes / statistics.median(times) / 1e9
            print(f"  {name:14} {speed:6.2f} GB/s  {speed / memcpy:5.2f} of memcpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--values", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of wall time, for a busy machine")
    parser.add_argument("--isa", choices=sorted(ISAS))
    args = parser.parse_args()
    if args.cpu_time and args.threads > 1:
        parser.error("--cpu-time adds up all threads: it needs --threads 1")
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.isa:
        select_instruction_set(args.isa)
    rng = np.random.default_rng(1)
    sources: dict[Part, Words] = {
        "key": np.load(args.keys) if args.keys else synthetic(rng),
        "value": np.load(args.values) if args.values else synthetic(rng),
    }
    codecs = [
        *(get_codec("hq", preset=preset) for preset in PRESETS),
        get_codec("hq", anchor_bits=3),
        get_codec("hq", anchor_bits=8, levels=2),
        get_codec("bitplane", planes=[9, 7]),
    ]
    cases: list[Case] = []
    copies: list[tuple[list[Words], list[Words]]] = []
    for part, cache in sources.items():
        words = tiles(cache, args.megabytes)
        outs = [np.zeros_like(w) for w in words]
        copies.append((words, outs))
        cases += [Case(codec, part, dtype=args.dtype, words=words, outs=outs, threads=args.threads) for codec in codecs]

    def copy() -> None:
        for words, outs in copies:
            for word, out in zip(words, outs, strict=True):
                np.copyto(out, word)

    memcpy_times = []
    for _ in range(args.rounds):
        memcpy_times.append(seconds(copy, clock))
        for case in cases:
            case.round(clock)
    memcpy = sum(w.nbytes for words, _ in copies for w in words) / statistics.median(memcpy_times) / 1e9
    print(f"{instruction_set()}, threads {args.threads}, {args.megabytes} MB a part; memcpy {memcpy:.2f} GB/s")
    for case in cases:
        case.report(memcpy)


if __name__ == "__main__":
    main()
