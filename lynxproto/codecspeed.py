"""How fast this machine's codecs are: a short self-test on made-up words, once in a process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import ChunkSpec, Part
from lynxproto.codecs import get_codec
from lynxproto.linkpolicy import CodecFigures, LevelFigures

__all__ = ["made_up_words", "measure_codec"]

_HEADS, _TOKENS, _DIM = 4, 256, 128
_RUNS: Final = 3


def made_up_words(part: Part, heads: int, tokens: int, dim: int, seed: int = 0) -> NDArray[np.uint16]:
    """BF16 words ``[heads, tokens, dim]`` that code about as well as a model's: keys have channels of unequal size."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((heads, tokens, dim), np.float32)
    if part == "key":
        values *= np.exp(rng.normal(0, 1, (heads, 1, dim)).astype(np.float32))
        values += rng.normal(0, 2, (heads, 1, dim)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def measure_codec(config: Mapping[str, Any]) -> CodecFigures:
    """Sizes and speeds of a codec on one thread (processor time: another program's load does not count)."""
    return _measure(json.dumps(dict(config), sort_keys=True))


@lru_cache(maxsize=64)
def _measure(config: str) -> CodecFigures:
    codec = get_codec(json.loads(config))
    sizes, encode = [0.0] * codec.levels, [0.0] * codec.levels
    anchor = exact = 0.0
    total = 0
    parts: tuple[Part, ...] = ("key", "value")
    for part in parts:
        words = made_up_words(part, _HEADS, _TOKENS, _DIM)
        spec = ChunkSpec(part=part, dtype="bfloat16", heads=_HEADS, tokens=_TOKENS, head_dim=_DIM)
        out = np.empty_like(words)
        payloads = codec.encode(spec, words)
        total += words.nbytes
        for level, payload in enumerate(payloads):
            sizes[level] += memoryview(payload).nbytes
            encode[level] += _seconds(partial(codec.encode, spec, words, levels=[level]))
        anchor += _seconds(partial(codec.decode, spec, payloads[:1], out))
        exact += _seconds(partial(codec.decode, spec, payloads, out))
    decode = [anchor] + [0.0] * (codec.levels - 1)
    if codec.levels > 1:
        decode[-1] = exact
    return CodecFigures(
        tuple(
            LevelFigures(size / total, made / total, shown / total)
            for size, made, shown in zip(sizes, encode, decode, strict=True)
        )
    )


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of a few runs."""
    work()
    best = float("inf")
    for _ in range(_RUNS):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best
