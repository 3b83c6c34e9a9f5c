"""LMCache with a real KV cache: bytes in L2, and the time until chunks are there and back, by adapter and serde.

Chunks go through LMCache's own storage manager: L1, its store and prefetch controllers, its file adapter (on a RAM disk
if there is one) without a serde, with its fp8 serde (which is not exact) and with ours, and our adapter. Run it in the
environment of `make lmcache-e2e`; the cache is a dump, as `lynxproto recv` makes them.

    .venv-lmcache/bin/python benchmarks/lmcache_l2.py DUMP [--tokens 256] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
os.environ["LYNXPROTO_REAL_ENGINES"] = "1"

from engines import use_engine  # paths come first

use_engine("lmcache")

import torch  # noqa: E402  # after the engine
from engines.lmcache_manager import PLUGIN, fetch, key, layout_of, manager, store  # noqa: E402  # the same

from lynxproto.bench.machine import environment  # noqa: E402  # the same
from lynxproto.cachefile import load_cache  # noqa: E402  # the same


def chunks_of(path: Path, tokens: int) -> dict[Any, list[torch.Tensor]]:
    """Chunks ``[2, layers, tokens, heads * dim]`` (KV_2LTD) of a dump's first whole chunks."""
    cache = load_cache(path)
    layers = sorted({layer for layer, _ in cache.arrays})
    heads, length, dim = cache.arrays[layers[0], "key"].shape
    found = {}
    for number in range(length // tokens):
        chunk = np.empty((2, len(layers), tokens, heads, dim), np.int16)
        for place, layer in enumerate(layers):
            for i in range(2):
                words = cache.arrays[layer, "value" if i else "key"]
                chunk[i, place] = words[:, number * tokens : (number + 1) * tokens].transpose(1, 0, 2).view(np.int16)
        found[key(number)] = [torch.from_numpy(chunk).view(torch.bfloat16).reshape(2, len(layers), tokens, heads * dim)]
    return found


def adapters(path: Path) -> dict[str, dict[str, Any]]:
    inner = {"type": "fs", "base_path": str(path)}
    with_serde = {**PLUGIN, "class_name": "InnerL2Adapter", "adapter_params": inner}
    return {
        "fs": inner,
        "fs, serde fp8 (not exact)": {**inner, "serde": {"type": "fp8"}},
        "fs, serde lynx": {**with_serde, "serde": {"type": "lynx"}},
        "fs, serde lynx, ratio .68": {**with_serde, "serde": {"type": "lynx", "ratio": 0.68}},
        "LynxL2Adapter": {
            **PLUGIN,
            "class_name": "LynxL2Adapter",
            "adapter_params": {"path": str(path), "threads": 2},
        },
    }


def files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.suffix in (".data", ".lynx")]


def run(chunks: dict[Any, list[torch.Tensor]], name: str) -> tuple[float, float, int]:
    """Seconds to store all chunks and to fetch them, and their bytes in L2."""
    shm = Path("/dev/shm")
    layout = layout_of(next(iter(chunks.values()))[0].shape, torch.bfloat16)
    raw = sum(tensors[0].nbytes for tensors in chunks.values())
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        settings = adapters(Path(folder))[name]
        writer = manager(settings, megabytes=4 * raw >> 20)
        start = time.perf_counter()
        store(writer, chunks, layout, lambda: len(files(Path(folder))) == len(chunks))
        stored = time.perf_counter() - start
        writer.close()
        size = sum(file.stat().st_size for file in files(Path(folder)))
        reader = manager(settings, megabytes=4 * raw >> 20)
        start = time.perf_counter()
        found = fetch(reader, list(chunks), layout)
        fetched = time.perf_counter() - start
        reader.close()
    if len(found) != len(chunks):
        raise SystemExit(f"{name}: {len(found)} of {len(chunks)} chunks were found again")
    same = all(torch.equal(found[k][0].view(torch.int16), chunks[k][0].view(torch.int16)) for k in chunks)
    if same == ("not exact" in name):
        raise SystemExit(f"{name}: chunks came back {'the same' if same else 'different'}")
    return stored, fetched, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    chunks = chunks_of(args.dump, args.tokens)
    raw = sum(tensors[0].nbytes for tensors in chunks.values())
    names = list(adapters(Path()))
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            times[name].append(run(chunks, name))
    results = []
    for name in names:
        stored, fetched = (statistics.median(one[i] for one in times[name]) for i in (0, 1))
        share = round(times[name][0][2] / raw, 4)
        results.append({"adapter": name, "share": share, "store_s": round(stored, 3), "fetch_s": round(fetched, 3)})
    if args.json:
        print(json.dumps({"raw_bytes": raw, "environment": environment(), "results": results}, indent=1))
        return
    print(f"{args.dump.stem}: {len(chunks)} chunks of {args.tokens} tokens, {raw / 1e6:.1f} MB; {environment()}")
    print(f"{'adapter':<28}{'of raw':>8}{'store s':>9}{'fetch s':>9}")
    for r in results:
        print(f"{r['adapter']:<28}{r['share']:>8.3f}{r['store_s']:>9.3f}{r['fetch_s']:>9.3f}")


if __name__ == "__main__":
    main()
