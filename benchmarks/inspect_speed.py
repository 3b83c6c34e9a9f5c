"""How fast, and in how much memory, `lynxproto inspect` goes through a large capture, checksums verified.

The capture holds one transfer in frames of the sizes that the default policy makes, in records of 64 KiB as a session
writes them. The table goes to a file; memcpy and CRC32C of the same run, on data that is in no cache, are the scale.
The inspector runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lynxproto.capture import CaptureWriter, Direction
from lynxproto.chunk import Tile, TokenSet
from lynxproto.digest import crc32c
from lynxproto.frames import Open, Plan, TileKey, control_frame, data_frame
from lynxproto.manifest import Identity, Manifest

LAYERS, HEADS, DIM = 32, 8, 128
TILE_TOKENS = 512  # 1 MiB of bfloat16 words, the default policy's tile
#: Payload bytes of an anchor, residual 1 and residual 2 of such a tile, as the hq codec makes them.
LEVEL_BYTES = (250_000, 300_000, 175_000)
RECORD = 64 << 10


def make(path: Path, nbytes: int) -> int:
    """Write a capture of about ``nbytes``; returns how many frames it has."""
    rounds = max(1, nbytes // (LAYERS * 2 * sum(LEVEL_BYTES)))
    tokens = rounds * TILE_TOKENS
    manifest = Manifest.for_cache(
        identity=Identity(model="benchmark"), dtype="bfloat16", layers=LAYERS, kv_heads=HEADS, head_dim=DIM,
        tokens=tokens, codecs=({"id": "hq"},),
    )  # fmt: skip
    noise = memoryview(np.random.default_rng(0).bytes(max(LEVEL_BYTES)))
    tiles = {
        (layer, part): tuple(
            TileKey.of(Tile(layer, part, 0, HEADS, TokenSet.range(t, t + TILE_TOKENS), 0))
            for t in range(0, tokens, TILE_TOKENS)
        )
        for layer in range(LAYERS)
        for part in ("key", "value")
    }
    frames = 0
    with CaptureWriter(path) as writer:
        stripe = writer.opened("benchmark")

        def put(*buffers: bytes | memoryview) -> None:
            nonlocal frames
            frames += 1
            for buffer in buffers:
                view = memoryview(buffer)
                for at in range(0, view.nbytes, RECORD):
                    writer.data(stripe, Direction.TO_SERVER, [view[at : at + RECORD]])

        put(control_frame(Open(manifest=manifest.to_bytes()), 1))
        for layer in range(LAYERS):
            keys = tiles[layer, "key"] + tiles[layer, "value"]
            put(control_frame(Plan(layer=layer, tiles=keys, levels=(3,) * len(keys)), 1))
        for level, size in enumerate(LEVEL_BYTES):
            for keys in tiles.values():
                for key in keys:
                    put(*data_frame(1, key, level, noise[:size], attempt=0, codec_id=3))
    return frames


#: What runs in the inspector's process. Peak memory is not taken from getrusage: that begins with the parent's, whose
#: memory a new process shares until it calls exec.
PROGRAM = """
import sys, time
from pathlib import Path
from lynxproto.cli import main

started = time.perf_counter()
try:
    main(["inspect", *sys.argv[1:]], standalone_mode=False)
except SystemExit as end:
    assert not end.code, end.code
seconds = time.perf_counter() - started
peak = next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
print(seconds, int(peak) * 1024, file=sys.stderr)
"""


def inspect(path: Path, *options: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of the inspector's process; its output goes to a file."""
    command = [sys.executable, "-c", PROGRAM, str(path), *options]
    with tempfile.TemporaryFile("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the inspector failed: {done.stderr}")
    seconds, peak = done.stderr.split()
    return float(seconds), int(peak)


def scale() -> tuple[float, float]:
    """Bytes a second of memcpy and of CRC32C, one core, on 256 MB."""
    data = np.ones(256 << 20, np.uint8)
    copy = np.zeros_like(data)
    copied, summed = [], []
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(copy, data)
        copied.append(time.perf_counter() - started)
        started = time.perf_counter()
        crc32c(memoryview(data))
        summed.append(time.perf_counter() - started)
    return data.nbytes / min(copied), data.nbytes / min(summed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    memcpy, crc = scale()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.lynx"
        frames = make(path, int(args.gigabytes * 1e9))
        size = path.stat().st_size
        for view in ((), ("--json",), ("--summary",)):
            runs = [inspect(path, *view) for _ in range(args.runs)]
            seconds, peak = min(r[0] for r in runs), max(r[1] for r in runs)
            rate = size / seconds
            results.append({"view": view[0] if view else "table", "bytes_per_s": rate, "peak_bytes": peak})
            print(
                f"{results[-1]['view']:<10} {rate / 1e6:8.0f} MB/s  {rate / memcpy:.3f} of memcpy  "
                f"{rate / crc:.3f} of CRC32C  peak {peak / 1e6:.0f} MB"
            )
    print(f"{size / 1e9:.2f} GB, {frames} frames; memcpy {memcpy / 1e9:.1f} GB/s, CRC32C {crc / 1e9:.1f} GB/s")
    if args.json:
        report = {"schema": "lynxproto.bench.inspect/1", "bytes": size, "frames": frames,
                  "memcpy_bytes_per_s": memcpy, "crc32c_bytes_per_s": crc, "results": results}  # fmt: skip
        args.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
