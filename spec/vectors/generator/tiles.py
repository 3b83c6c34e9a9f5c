"""Words to encode: small tiles of every kind of value."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from random import Random

from pieces import rng

KINDS = ("usual", "zeros", "constant", "special", "subnormal", "huge", "wide", "flat", "signed-zero", "noise")
WORD = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3": 1, "float8_e5m2": 1, "uint8": 1}


def word_of(dtype: str, value: float) -> int:
    """The bits of ``value``: bfloat16 is cut off, float16 rounded."""
    if dtype == "float16":
        bounded = max(-65504.0, min(65504.0, value))
        return struct.unpack("<H", struct.pack("<e", bounded))[0]
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def _bell(random: Random) -> float:
    """About normal, by sums: the same on every machine."""
    return sum(random.random() for _ in range(12)) - 6.0


def tile(kind: str, dtype: str, part: str, shape: tuple[int, int, int], seed: object = 0) -> bytes:
    """Words in [head, token, dim] order, little-endian, of bfloat16 or float16."""
    random = rng("tile", kind, dtype, part, shape, seed)
    heads, tokens, dim = shape

    def usual(t: int, c: int) -> int:
        """Keys: channels of different means and sizes. Values: every other token lies in a narrow range."""
        if part == "key":
            scale = 2.0 ** ((c * 7) % 5 - 2)
            return word_of(dtype, scale * ((c * 5) % 7 - 3 + _bell(random)))
        return word_of(dtype, 4.0 + 0.25 * _bell(random) if t % 2 else 2.0 ** (c % 3 - 1) * _bell(random))

    def constant(t: int, c: int) -> int:
        group = c if part == "key" else t
        return word_of(dtype, 1.5 - group) if group % 3 == 0 else usual(t, c)

    def special(t: int, c: int) -> int:
        top = 0x7F80 if dtype == "bfloat16" else 0x7C00
        choices = (top, top | 0x8000, top + 1, 0xFFFF, top + 0x41, top - 1, 0x8000)
        return choices[random.getrandbits(3) % 7] if random.random() < 0.5 else usual(t, c)

    def huge(t: int, c: int) -> int:
        top = 0x7E7F if dtype == "bfloat16" else 0x7BFF
        return random.getrandbits(1) << 15 | top - random.getrandbits(9)

    def wide(t: int, c: int) -> int:
        spread = 60 if dtype == "bfloat16" else 12
        return word_of(dtype, math.copysign(2.0 ** (spread * (random.random() - 0.5)), random.random() - 0.5))

    strange: dict[str, Callable[[int, int], int]] = {
        "usual": usual,
        "zeros": lambda t, c: 0,
        "constant": constant,
        "special": special,
        "subnormal": lambda t, c: random.getrandbits(1) << 15 | random.getrandbits(6 if dtype == "bfloat16" else 9),
        "huge": huge,
        "wide": wide,
        "flat": lambda t, c: word_of(dtype, 3.0 + 0.0625 * (random.random() < 0.5)),
        "signed-zero": lambda t, c: random.getrandbits(1) << 15 if random.random() < 0.7 else usual(t, c),
        "noise": lambda t, c: random.getrandbits(16),
    }

    def make(t: int, c: int) -> int:
        """Strange words in some groups; a tile of nothing else would be stored as it is."""
        group = c if part == "key" else t
        if kind == "special":
            return strange[kind](t, c) if t >= 64 else usual(t, c)
        few = kind in ("subnormal", "wide", "signed-zero", "huge")
        return strange[kind](t, c) if not few or group < 2 else usual(t, c)

    words = [make(t, c) for _ in range(heads) for t in range(tokens) for c in range(dim)]
    return struct.pack(f"<{len(words)}H", *words)


def noise(dtype: str, shape: tuple[int, int, int]) -> bytes:
    """Any bits, of any dtype."""
    size = math.prod(shape) * WORD[dtype]
    return rng("noise", dtype, shape).getrandbits(8 * size).to_bytes(size, "little")


def even(dtype: str, shape: tuple[int, int, int]) -> bytes:
    """Words that compress."""
    size = math.prod(shape) * WORD[dtype]
    return bytes(i // 16 % 5 for i in range(size))
