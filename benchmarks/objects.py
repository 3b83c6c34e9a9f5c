"""Cache objects of real KV pages: how many bytes they take, and how fast a folder of them is beside one of raw pages.

Pages are cut out of a dump as SGLang (page_first) has them: all layers of so many tokens, keys and
values. The folder is on a RAM disk if there is one, so that the disk is not what is measured. Speeds are medians of
rounds, GB/s of raw bytes, one thread; the raw folder writes a temporary file and renames it, as ours does.

    python benchmarks/objects.py [--source DUMP] [--tokens 16,64,256] [--megabytes 48] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lynxproto.bench.machine import environment
from lynxproto.bench.sources import Source, built_in, read_source
from lynxproto.codecs import get_codec
from lynxproto.integrations.stores import ObjectFolder, ObjectStore, object_name
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.objects import ObjectCodec, Views

ROUNDS = 5
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "hq fast": ("hq", {"preset": "fast"}),
    "hq balanced": ("hq", {"preset": "balanced"}),
    "bitplane, zstd": ("bitplane", {"planes": [16], "zstd": 1}),
    "raw": ("raw", {}),
}


def cut(source: Source, tokens: int, megabytes: int) -> list[NDArray[Any]]:
    """Pages ``[2, tokens, layers, heads, dim]`` in memory of their own, from the cache's start."""
    layers = sorted({layer for layer, _ in source.arrays})
    heads, length, dim = source.arrays[layers[0], "key"].shape
    count = max(1, min(length // tokens, megabytes * 1_000_000 // (4 * len(layers) * heads * tokens * dim)))
    pages = []
    for first in range(0, count * tokens, tokens):
        page = np.empty((2, tokens, len(layers), heads, dim), np.uint16)
        for place, layer in enumerate(layers):
            for i, part in enumerate(("key", "value")):
                page[i, :, place] = source.arrays[layer, part][:, first : first + tokens].transpose(1, 0, 2)  # type: ignore[index]  # part is a Part
        pages.append(page)
    return pages


def views(page: NDArray[Any]) -> Views:
    """As the adapters give them: ``[layers, tokens, heads * dim]``."""
    _, tokens, layers, heads, dim = page.shape
    flat = page.reshape(2, tokens, layers, heads * dim).transpose(0, 2, 1, 3)
    return {(0, "key"): flat[0], (0, "value"): flat[1]}


def manifest(page: NDArray[Any], dtype: str, name: str) -> Manifest:
    _, tokens, layers, heads, dim = page.shape
    layer = LayerSpec(index=0, kv_heads=layers, key_dim=heads * dim, value_dim=heads * dim, token_stop=tokens)
    return Manifest(
        identity=Identity(model="benchmark"), dtype=dtype, layers=(layer,), prompt_tokens=tokens, request_id=name
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def raw_folder(path: Path, pages: list[NDArray[Any]], out: list[NDArray[Any]]) -> tuple[float, float]:
    """Seconds to write and to read pages as they are."""

    def write() -> None:
        for number, page in enumerate(pages):
            (path / "new").write_bytes(page.data)
            (path / "new").rename(path / str(number))

    def read() -> None:
        for number, page in enumerate(out):
            with (path / str(number)).open("rb", buffering=0) as file:
                file.readinto(page.data)  # type: ignore[attr-defined]  # unbuffered files have it

    return seconds(write), seconds(read)


def objects_folder(path: Path, codec: ObjectCodec, manifests: list[Manifest], pages: Any, out: Any) -> Any:
    """Seconds to write and read them as objects, and the bytes of the folder."""
    store = ObjectStore(ObjectFolder(path), codec)
    store.folder.clear()
    write = seconds(lambda: [store.put(m, views(page)) for m, page in zip(manifests, pages, strict=True)])
    read = seconds(lambda: [store.get(m, views(page)) for m, page in zip(manifests, out, strict=True)])
    return write, read, store.folder.used()


def run(source: Source, tokens: int, megabytes: int, root: Path) -> list[dict[str, Any]]:
    pages = cut(source, tokens, megabytes)
    out = [np.empty_like(page) for page in pages]
    raw = sum(page.nbytes for page in pages)
    manifests = [manifest(page, source.dtype, object_name(number)) for number, page in enumerate(pages)]
    times: dict[str, list[tuple[float, float]]] = {"raw files": []}
    sizes = {"raw files": raw}
    (root / "raw").mkdir(exist_ok=True)
    for _ in range(ROUNDS + 1):  # the first fills caches and is dropped
        times["raw files"].append(raw_folder(root / "raw", pages, out))
        for name, (codec_id, options) in CODECS.items():
            for page in out:
                page.fill(0)
            codec = ObjectCodec(get_codec(codec_id, **options))
            write, read, sizes[name] = objects_folder(root / f"objects-{codec_id}", codec, manifests, pages, out)
            times.setdefault(name, []).append((write, read))
            if not all(np.array_equal(one, other) for one, other in zip(out, pages, strict=True)):
                raise SystemExit(f"{name}: a page came back different")
    results = []
    for name, rounds in times.items():
        write, read = (statistics.median(one[i] for one in rounds[1:]) for i in (0, 1))
        results.append(
            {
                "store": name,
                "page_tokens": tokens,
                "pages": len(pages),
                "page_bytes": pages[0].nbytes,
                "ratio": round(sizes[name] / raw, 4),
                "overhead_bytes": (sizes[name] - raw) // len(pages) if name == "raw" else None,
                "write_gb_per_s": round(raw / write / 1e9, 3),
                "read_gb_per_s": round(raw / read / 1e9, 3),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a dump (`lynxproto recv -o`); default: SmolLM2-135M on prose")
    parser.add_argument("--tokens", default="16,64,256", help="tokens of a page, several with commas")
    parser.add_argument("--megabytes", type=int, default=48, help="raw bytes of all pages of one size")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731  # one line
    source = read_source(args.source) if args.source else built_in(["smollm2-prose-4096"], note)[0]
    shm = Path("/dev/shm")
    results = []
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as root:
        for tokens in map(int, args.tokens.split(",")):
            results += run(source, tokens, args.megabytes, Path(root))
    if args.json:
        print(json.dumps({"source": source.name, "environment": environment(), "results": results}, indent=1))
        return
    print(f"{source.name}; {environment()}")
    print(f"{'page':>5} {'MB':>6}  {'store':<16}{'of raw':>7}{'write GB/s':>12}{'read GB/s':>11}{'overhead':>10}")
    for r in results:
        overhead = "" if r["overhead_bytes"] is None else f"{r['overhead_bytes']} B"
        print(
            f"{r['page_tokens']:>5} {r['page_bytes'] / 1e6:>6.2f}  {r['store']:<16}{r['ratio']:>7.3f}"
            f"{r['write_gb_per_s']:>12.2f}{r['read_gb_per_s']:>11.2f}{overhead:>10}"
        )


if __name__ == "__main__":
    main()
