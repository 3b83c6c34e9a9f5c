"""Peak memory of a sender and of a receiver, each a process of its own without a model, beyond what it cannot avoid.

Each is measured against a baseline process that imports the same modules and maps (sender) or makes and fills
(receiver) the same cache. Figures are resident bytes at their peak (VmHWM), as multiples of the cache.

    python benchmarks/memory.py [--megabytes 256] [--link 2G] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lynxproto.cachefile import Cache, CacheFileWriter, load_cache, save_cache
from lynxproto.commands.options import BitRate
from lynxproto.manifest import Identity, Manifest
from lynxproto.session import connect, listen
from lynxproto.transports import TokenBucket

SENDER_LIMIT, RECEIVER_LIMIT = 0.3, 0.7


def peak_bytes() -> int:
    """The process's largest resident size so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def make_cache(path: Path, megabytes: int) -> None:
    """A dump of normally distributed bfloat16 values with a scale of its own for each channel."""
    layers, heads, dim = 16, 8, 128
    tokens = max(64, megabytes * 1_000_000 // (layers * 2 * heads * dim * 2))
    manifest = Manifest.for_cache(
        identity=Identity(model="benchmark"),
        dtype="bfloat16",
        layers=layers,
        kv_heads=heads,
        head_dim=dim,
        tokens=tokens,
    )
    rng = np.random.default_rng(0)
    arrays: Any = {}
    for layer in range(layers):
        for part in ("key", "value"):
            scale = np.exp(rng.standard_normal((heads, 1, dim), np.float32))
            values = rng.standard_normal((heads, tokens, dim), np.float32) * scale
            arrays[layer, part] = (values.view(np.uint32) >> 16).astype(np.uint16)
    save_cache(path, Cache(manifest=manifest, arrays=arrays))


def touch(arrays: Any) -> None:
    for array in arrays.values():
        array.max()


async def send(path: Path, url: str, link: float | None) -> None:
    cache = load_cache(path)
    async with connect(url, insecure=True, link=None if link is None else TokenBucket(link)) as session:
        await session.open(cache.manifest).send(cache)


async def receive(path: Path, target: Path) -> None:
    with CacheFileWriter(target, load_cache(path).manifest) as writer:
        async with listen("tcp://127.0.0.1:0", insecure=True, allocate=lambda _: writer.arrays) as receiver:
            print(receiver.url, flush=True)
            transfer = await anext(receiver)
            await transfer.exact()
        writer.commit()


def role(name: str, path: Path, argument: str, link: float | None) -> None:
    """What a child process does; the last line it prints is its peak."""
    if name == "send":
        asyncio.run(send(path, argument, link))
    elif name == "receive":
        asyncio.run(receive(path, Path(argument)))
    elif name == "map":
        touch(load_cache(path).arrays)
    elif name == "fill":
        with CacheFileWriter(argument, load_cache(path).manifest) as writer:
            for array in writer.arrays.values():
                array[...] = 1
            touch(writer.arrays)
    print(peak_bytes(), flush=True)


def start(name: str, path: Path, argument: str, link: str | None) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--role", name, "--cache", str(path), "--argument", argument]
    return subprocess.Popen([*command, *(["--link", link] if link else [])], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> int:
    output, _ = process.communicate(timeout=600)
    if process.returncode != 0:
        raise SystemExit(f"a child failed with exit code {process.returncode}")
    return int(output.split()[-1])


def measure(megabytes: int, link: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        make_cache(path, megabytes)
        cache = load_cache(path).manifest.nbytes
        mapped = finish(start("map", path, "", None))
        filled = finish(start("fill", path, str(Path(folder) / "filled"), None))
        receiver = start("receive", path, str(Path(folder) / "received"), None)
        assert receiver.stdout is not None
        sender = start("send", path, receiver.stdout.readline().strip(), link)
        sent, received = finish(sender), finish(receiver)
        same = all(
            np.array_equal(words, load_cache(Path(folder) / "received").arrays[key])
            for key, words in load_cache(path).arrays.items()
        )
    return {
        "schema": "lynxproto.bench.memory/1",
        "cache_bytes": cache,
        "link_bits_per_second": None if link is None else BitRate().convert(link, None, None),
        "sender": {"peak_bytes": sent, "baseline_bytes": mapped, "beyond": (sent - mapped) / cache},
        "receiver": {"peak_bytes": received, "baseline_bytes": filled, "beyond": (received - filled) / cache},
        "bit_exact": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the cache (default 256)")
    parser.add_argument("--link", help="rate of the link, for example 2G (default: as fast as it goes)")
    parser.add_argument("--json", action="store_true")
    for hidden in ("--role", "--cache", "--argument"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        rate = None if options.link is None else BitRate().convert(options.link, None, None)
        role(options.role, Path(options.cache), options.argument, rate)
        return
    result = measure(options.megabytes, options.link)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"cache: {result['cache_bytes'] / 1e6:.0f} MB, bit exact: {result['bit_exact']}")
        for side, limit in (("sender", SENDER_LIMIT), ("receiver", RECEIVER_LIMIT)):
            r = result[side]
            print(
                f"{side}: peak {r['peak_bytes'] / 1e6:.0f} MB, baseline {r['baseline_bytes'] / 1e6:.0f} MB, "
                f"{r['beyond']:.2f} of the cache beyond it (limit {limit})"
            )
    ok = result["sender"]["beyond"] <= SENDER_LIMIT and result["receiver"]["beyond"] <= RECEIVER_LIMIT
    sys.exit(0 if ok and result["bit_exact"] else 1)


if __name__ == "__main__":
    main()
