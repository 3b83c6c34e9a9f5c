"""Speed of examples/c/decode, a C program with the installed library, beside the Python binding: the same capture, the
same layout of pages, one core, in turns.

Both decode every tile (512 tokens x 8 heads x 128 channels, K and V of some layers) into a paged cache: the anchors
alone, then all levels. The kernels are the same; the difference is what a program in Python pays for its calls. It
needs make, a C compiler, pkg-config and libxxhash-dev.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lynxproto.bench.machine import Workers, calm, environment
from lynxproto.capture import CaptureWriter, Direction
from lynxproto.chunk import PARTS, Paged, Part, Tile, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.digest import tile_digest
from lynxproto.frames import End, Open, Plan, TileKey, control_frame, data_frame
from lynxproto.manifest import Identity, Manifest

ROOT = Path(__file__).parent.parent
HEADS, TOKENS, DIM = 8, 512, 128
ROUND = re.compile(r"round \d+: anchor ([\d.]+) GB/s, exact ([\d.]+) GB/s")


def build(folder: Path) -> Path:
    """The example program, with the library installed below ``folder``."""
    paths = {**os.environ, "PKG_CONFIG_PATH": f"{folder}/lib/pkgconfig"}
    library = ["make", "-s", "-j2", "-C", "native", f"BUILD={folder}/build", f"PREFIX={folder}", "install"]
    example = [
        "make",
        "-s",
        "-C",
        "examples/c",
        f"BUILD={folder}",
        f"LDFLAGS=-Wl,-rpath,{folder}/lib",
        f"{folder}/decode",
    ]
    for command in (library, example):
        subprocess.run(command, check=True, cwd=ROOT, env=paths)
    return folder / "decode"


def make(path: Path, preset: str, layers: int) -> list[tuple[Any, list[Any]]]:
    """Write a capture of ``layers`` layers; the specs and payloads of its tiles."""
    codec = get_codec("hq", preset=preset)
    manifest = Manifest.for_cache(
        identity=Identity(model="benchmark"), dtype="bfloat16", layers=layers, kv_heads=HEADS, head_dim=DIM,
        tokens=TOKENS, codecs=(codec.get_config(),),
    )  # fmt: skip
    random, found = np.random.default_rng(0), []
    with CaptureWriter(path) as writer:
        stripe = writer.opened("benchmark")

        def put(*buffers: bytes | memoryview) -> None:
            writer.data(stripe, Direction.TO_SERVER, buffers)

        put(control_frame(Open(manifest=manifest.to_bytes()), 1))
        for layer in range(layers):
            keys, digests, chunks = [], [], []
            for part in PARTS[:2]:
                tile = Tile(layer, part, 0, HEADS, TokenSet.range(0, TOKENS), 0)
                values = random.standard_normal((HEADS, TOKENS, DIM), np.float32)
                values *= np.exp(random.normal(0, 1, DIM)).astype(np.float32)
                words = (values.view(np.uint32) >> 16).astype(np.uint16)
                spec = tile.spec("bfloat16", DIM)
                payloads = codec.encode(spec, words)
                keys.append(TileKey.of(tile))
                digests.append(tile_digest(spec, words))
                chunks.append(payloads)
                found.append((spec, payloads))
            put(control_frame(Plan(layer=layer, tiles=tuple(keys), levels=(3, 3)), 1))
            for key, payloads in zip(keys, chunks, strict=True):
                for level, payload in enumerate(payloads):
                    put(*data_frame(1, key, level, memoryview(payload), attempt=0, codec_id=3))
            put(control_frame(End(layer=layer, digests=tuple(digests)), 1))
    return found


def in_c(program: Path, capture: Path, page_tokens: int, layout: str) -> tuple[float, float]:
    """GB/s of anchors and of exact words: medians of the program's rounds but the first."""
    command = [program, capture, "--page-tokens", page_tokens, "--layout", layout.lower(), "--benchmark", 4]
    said = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    anchor, exact = zip(*((float(a), float(b)) for a, b in ROUND.findall(said)[1:]), strict=True)
    return statistics.median(anchor), statistics.median(exact)


def in_python(tiles: list[tuple[Any, list[Any]]], preset: str, page_tokens: int, layout: Any) -> tuple[float, float]:
    """The same through the Python binding."""
    codec = get_codec("hq", preset=preset)
    pages = TOKENS // page_tokens
    axes = (pages, page_tokens, HEADS) if layout == "NHD" else (pages, HEADS, page_tokens)
    table = np.random.default_rng(1).permutation(pages)
    caches: dict[tuple[int | None, Part], Paged] = {
        (spec.layer, spec.part): Paged(np.zeros((*axes, DIM), np.uint16), table, layout) for spec, _ in tiles
    }
    nbytes = sum(spec.nbytes for spec, _ in tiles)
    speeds: list[list[float]] = [[], []]
    for _ in range(4):
        for which, levels in enumerate((1, 3)):
            began = time.perf_counter()
            for spec, payloads in tiles:
                codec.decode(spec, payloads[:levels], caches[spec.layer, spec.part])
            speeds[which].append(nbytes / (time.perf_counter() - began) / 1e9)
    return statistics.median(speeds[0][1:]), statistics.median(speeds[1][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16, help="of 2 MiB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name, calm(cold_allocator=False), Workers(1):  # pinned, and so is the program
        folder = Path(name)
        program = build(folder)
        for preset in ("fast", "balanced"):
            tiles = make(folder / "capture.lynx", preset, args.layers)
            for page_tokens, layout in ((16, "HND"), (128, "NHD")):
                pairs = []
                for _ in range(args.runs):
                    ours = in_c(program, folder / "capture.lynx", page_tokens, layout)
                    theirs = in_python(tiles, preset, page_tokens, layout)
                    pairs.append((ours, theirs))
                for which, operation in enumerate(("anchor decode", "exact decode")):
                    c = statistics.median(pair[0][which] for pair in pairs)
                    python = statistics.median(pair[1][which] for pair in pairs)
                    ratio = statistics.median(pair[0][which] / pair[1][which] for pair in pairs)
                    result = {"preset": preset, "layout": layout, "page_tokens": page_tokens, "operation": operation}
                    results.append({**result, "c_gb_per_s": c, "python_gb_per_s": python, "ratio": ratio})
                    where = f"{preset:<9} {layout} {page_tokens:>4}  {operation:<14}"
                    print(f"{where} C {c:5.2f} GB/s, Python {python:5.2f} GB/s: {ratio:.2f}")
    if args.json:
        report = {"schema": "lynxproto.bench.c-example/1", "environment": environment(), "results": results}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
