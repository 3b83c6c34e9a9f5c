"""Write the parts of the specification that follow from code: ``make spec``.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in a document of this folder. State machines are
drawn from the tables of lynxproto/state.py; worked examples are encoded by the codecs, and explained value by value
from their bytes alone, with the formulas of the documents.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lynxproto import state
from lynxproto.chunk import ChunkSpec
from lynxproto.codecs import get_codec

HERE = Path(__file__).resolve().parent
_BLOCK = re.compile(r"(<!-- generated: ([^>]+) -->\n).*?(<!-- end -->)", re.S)


# --- state machines


def machine(table: Mapping[Enum, Mapping[str, Enum]]) -> Iterator[str]:
    """A diagram and a table of one machine, which begins in its first state."""
    first = next(iter(table))
    yield from ("```mermaid", "stateDiagram-v2", f"    [*] --> {first.value}")
    for here, row in table.items():
        for signal, there in row.items():
            yield f"    {here.value} --> {there.value} : {signal}"
        if not row:
            yield f"    {here.value} --> [*]"
    yield from ("```", "", "| state | signal | next state |", "|---|---|---|")
    for here, row in table.items():
        yield from (f"| {here.value} | {signal} | {there.value} |" for signal, there in row.items())
        if not row:
            yield f"| {here.value} | | (final) |"


# --- examples


def _hex(data: bytes, row: int = 16) -> list[str]:
    return [data[i : i + row].hex(" ") for i in range(0, len(data), row)] or ["(no bytes)"]


def _dump(pieces: list[tuple[bytes, str]]) -> Iterator[str]:
    """Bytes in rows, with their offset and what they are."""
    yield "```"
    at = 0
    for data, what in pieces:
        for i, line in enumerate(_hex(data)):
            yield f"{at + 16 * i:04x}  {line:<47}  {what if i == 0 else ''}".rstrip()
        at += len(data)
    yield "```"


def _encode(config: dict[str, Any], part: Any, words: Any) -> list[bytes]:
    heads, tokens, dim = words.shape
    spec = ChunkSpec(part=part, dtype="bfloat16", heads=heads, tokens=tokens, head_dim=dim)
    return [bytes(payload) for payload in get_codec(config).encode(spec, words)]


def _decode(config: dict[str, Any], part: Any, shape: tuple[int, int, int], payloads: list[bytes]) -> Any:
    heads, tokens, dim = shape
    out = np.zeros(shape, np.uint16)
    spec = ChunkSpec(part=part, dtype="bfloat16", heads=heads, tokens=tokens, head_dim=dim)
    get_codec(config).decode(spec, payloads, out)
    return out


def example_raw() -> Iterator[str]:
    """Two tokens of three values."""
    words = np.array([[[0x3F80, 0xC000, 0x7FC1], [0x8000, 0x0001, 0xFF80]]], np.uint16)
    (payload,) = _encode({"id": "raw"}, "key", words)
    yield "A bfloat16 tile of 1 head, 2 tokens and 3 values (1.0, -2.0, a NaN; -0, the least subnormal, -infinity) is"
    yield ""
    yield from _dump([(payload[:6], "token 0"), (payload[6:], "token 1")])


def example_bitplane() -> Iterator[str]:
    """Ten words."""
    values = [0x3F80 + 0x25 * i | (i % 3 == 2) << 15 for i in range(10)]
    words = np.array(values, np.uint16).reshape(1, 5, 2)
    first, second = _encode({"id": "bitplane", "planes": [9, 7]}, "value", words)
    yield "A bfloat16 tile of 1 head, 5 tokens and 2 values has the words"
    yield ""
    yield from ("```", *_hex(words.byteswap().tobytes(), 2 * 10), "```")
    yield ""
    yield "(here as numbers, most significant byte first). With `planes` [9, 7] a plane takes 2 bytes. Level 0:"
    yield ""
    names = ["plane 0: signs", *(f"plane {p}" for p in range(1, 9))]
    yield from _dump([(first[:4], "level 0, 9 planes"), *((first[4 + 2 * p : 6 + 2 * p], names[p]) for p in range(9))])
    yield ""
    yield "Words 2, 5 and 8 are negative: bits 2 and 5 of the first byte of plane 0, bit 0 of the second. Level 1:"
    yield ""
    yield from _dump(
        [(second[:4], "level 1, 7 planes"), *((second[4 + 2 * p : 6 + 2 * p], f"plane {9 + p}") for p in range(7))]
    )
    yield ""
    half = [word & 0xFF80 for word in values]
    yield f"After level 0 the words are {', '.join(f'`{word:04x}`' for word in half)}; after level 1 they are exact."


def _bfloat(word: int) -> Fraction:
    return Fraction(float(struct.unpack("<f", struct.pack("<I", word << 16))[0]))


def _bits(x: Fraction) -> int:
    return struct.unpack("<I", struct.pack("<f", float(x)))[0]


def _ceil_word(x: Fraction) -> int:
    return (_bits(x) + 0xFFFF) >> 16


def _nearest(x: Fraction, s: Fraction) -> int:
    return int(abs(x) / s + Fraction(1, 2)) * (-1 if x < 0 else 1)


def _packed(bits: str) -> bytes:
    padded = bits + "0" * (-len(bits) % 8)
    return bytes(int(padded[i : i + 8][::-1], 2) for i in range(0, len(padded), 8))


def _pairs(bits: str) -> str:
    half = (len(bits) + 1) // 2
    x, y = bits[:half], bits[half:].ljust(half, "0")
    some = [i for i in range(half) if "1" in x[i] + y[i]]
    either = "".join("1" if "1" in x[i] + y[i] else "0" for i in range(half))
    return either + "".join(x[i] for i in some) + "".join(y[i] for i in some if x[i] == "1")


_HQ = {"id": "hq", "key_bits": 3, "value_bits": 3, "levels": 3, "widths": "uniform", "fold": False, "scaling": False}
_R, _O = 224, 16  # of 3 bits


def _ramp(order: Callable[[int], int]) -> Any:
    """64 values from -20/16 to 43/16, each once."""
    values = np.array([(order(t) - 20) / 16 for t in range(64)], np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(1, 64, 1)


def example_hq() -> Iterator[str]:
    """One channel of 64 tokens, three levels."""
    words = _ramp(lambda t: t * 37 % 64)
    zero, one, two = _encode(_HQ, "key", words)
    yield "A bfloat16 key tile of 1 head, 64 tokens and 1 channel: one block, one group. Its values are"
    yield "`((37 t) mod 64 - 20) / 16` for token t, so -20/16 = -1.25 for t = 0, 17/16 for t = 1, ... Configuration:"
    yield '`key_bits` 3, `levels` 3, `widths` `"uniform"`, no fold.'
    yield ""
    yield "Level 0:"
    yield ""
    planes = [(zero[8 + 3 * o : 11 + 3 * o], f"octet {o}, planes 0 to 2") for o in range(8)]
    yield from _dump([(zero[:8], "coded, level 0, no bytes of parameters"), *planes, (zero[32:], "parameter header")])
    s_word, z = struct.unpack_from("<Hh", zero, 32)
    s = _bfloat(s_word)
    low, high = Fraction(-20, 16), Fraction(43, 16)
    step = max((high - low) / _R, max(-low, high) / 1024)
    yield ""
    size = f"max({float(high - low)} / 224, {float(high)} / 1024) = {float(step):.7g}"
    yield f"Scale: min = {float(low)}, max = {float(high)}, so step = {size}, and the smallest number of"
    yield f"6 significant bits not below it is s = `{s_word:04x}` = {float(s)}. Zero point: k(min) = {-z}, z = {z}."
    yield "There is one group, so both fields have 0 bits and the parameter section is empty."
    yield ""
    yield "Level 1:"
    yield ""
    yield from _dump(
        [(one[:8], "coded, level 1"), *((one[8 + 5 * o : 13 + 5 * o], f"octet {o}, planes 3 to 7") for o in range(8))]
    )
    yield ""
    yield "Level 2:"
    yield ""
    a, others = struct.unpack_from("<HH", two, 8)
    body, w = two[12:], 2  # one zero cell: 12 bits of W
    b = others - w
    yield from _dump(
        [
            (two[:8], f"coded, level 2, {len(body)} bytes of ranks"),
            (two[8:12], f"rank table: A {a}, the others {others}"),
            (body[:a], "stream A"),
            (body[a : a + b], "stream B"),
            (body[a + b :], "stream W"),
        ]
    )
    yield ""
    yield "Some values. u is the anchor, its three most significant bits; each code C is k + z + 16."
    yield ""
    yield "| t | word | value | k | C | u | after level 0 | after level 1 | cell: low, n | v | rank | A | B |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    rows, low_bits, high_bits = [], "", ""
    decoded = [_decode(_HQ, "key", words.shape, [zero, one, two][: level + 1]).ravel() for level in range(3)]
    for t, word in enumerate(words.ravel().tolist()):
        value = _bfloat(word)
        k = _nearest(value, s)
        code = k + z + _O
        anchor = code >> 5
        shown = [(_bits(x) + 0x8000 >> 16) & 0xFFFF for x in ((anchor * 32 - z) * s, (code - _O - z) * s)]
        assert shown == [decoded[0][t], decoded[1][t]]
        if k:
            start, stop = (_ceil_word((2 * abs(k) + d) * s / 2) for d in (-1, 1))
            n, rank = stop - start, (word & 0x7FFF) - start
            v = n.bit_length() - 1
            field = rank % 2**v
            extra = str(rank >> v) if field < n - 2**v else ""
            low_bits += "".join(str(field >> i & 1) for i in range(v))
            high_bits += extra
            cell = f"`{start:04x}`, {n} | {v} | {rank} | {field if v else '-'} | {extra or '-'}"
        else:
            top = _ceil_word(s / 2) - 1
            cell = f"zero, top = `{top:04x}` | | | W: {top - word if word else 2046} |"
        before = f"| {t} | `{word:04x}` | {float(value)} | {k} | {code} | {anchor}"
        rows.append(f"{before} | `{shown[0]:04x}` | `{shown[1]:04x}` | {cell} |")
    assert (_packed(low_bits), _packed(high_bits)) == (body[:a], body[a : a + b])
    yield from (rows[t] for t in (0, 1, 2, 3, 4, 5, 6, 7, 52))
    yield ""
    yield f"Octet 0 of plane 0 is `{zero[8]:02x}`: bit t is bit 7 of the code of token t. A field of A or B is `-`"
    yield "where it has no bits. Stream A holds the fields of all 64 values, token by token."


def example_hq_fold() -> Iterator[str]:
    """The same values in order, folded."""
    words = _ramp(lambda t: t)
    config = {**_HQ, "fold": True}
    zero = _encode(config, "key", words)[0]
    entry = struct.unpack_from("<H", zero, 8)[0]
    streams = entry & 0x1FFF
    planes = len(zero) - 10 - streams - 6 - struct.unpack_from("<I", zero, 4)[0]
    yield "The same values in ascending order, with `fold`. Level 0:"
    yield ""
    pieces = [(zero[:8], "coded, level 0"), (zero[8:10], f"fold table: D2 and D3 have {streams} bytes")]
    pieces += [(zero[10 + 2 * o : 12 + 2 * o], f"octet {o}: S, D1") for o in range(planes // 2)]
    at = 10 + planes
    s_word, z = struct.unpack_from("<Hh", zero, at + streams)
    tops = []
    for t in range(64):
        tops.append((_nearest(_bfloat(int(words[0, t, 0])), _bfloat(s_word)) + z + _O) >> 5)
    rows, far, farther = [], "", ""
    for t, top in enumerate(tops):
        centre = 4 if t == 0 else 2 + (tops[t - 1] + 1) // 2
        v = (top - centre + 4) % 8
        distance = v - 4 if v >= 4 else 3 - v
        far += str(int(distance > 1)) if distance > 0 else ""
        farther += str(int(distance > 2)) if distance > 1 else ""
        rows.append(f"| {t} | {top} | {centre} | {v} | {int(v >= 4)} | {distance} |")
    lengths = len(far), len(farther)
    far, farther = (_pairs(one) if entry >> bit & 1 else one for one, bit in ((far, 13), (farther, 14)))
    size = len(_packed(far))
    assert _packed(far) + _packed(farther) == zero[at : at + streams]
    said = [f"{n} bits{' in pairs' * (entry >> bit & 1)}" for n, bit in zip(lengths, (13, 14), strict=True)]
    pieces += [(zero[at : at + size], f"D2, {said[0]}"), (zero[at + size : at + streams], f"D3, {said[1]}")]
    pieces += [(zero[at + streams :], "parameter header")]
    yield from _dump(pieces)
    yield ""
    yield "t is the token, t3 the three most significant bits of its code, c the centre by the token before:"
    yield ""
    yield from ("| t | t3 | c | v | S | d |", "|---|---|---|---|---|---|", *rows[:8], rows[-1])


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "state session": lambda: machine(state.SESSION),
    "state stripe": lambda: machine(state.STRIPE),
    "state outgoing": lambda: machine(state.OUTGOING),
    "state incoming": lambda: machine(state.INCOMING),
    "state chunk": lambda: machine(state.CHUNK),
    "example raw": example_raw,
    "example bitplane": example_bitplane,
    "example hq": example_hq,
    "example hq fold": example_hq_fold,
}


def written(text: str) -> str:
    """``text`` with its generated parts made again. Raises KeyError for a name that is not known."""
    return _BLOCK.sub(lambda m: m[1] + "\n".join(PARTS[m[2]]()) + "\n" + m[3], text)


def main() -> None:
    """Make all documents again; with ``--check`` only say which are out of date."""
    stale = []
    for path in sorted(HERE.glob("*.md")):
        text = path.read_text()
        new = written(text)
        if new != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"{'out of date' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'nothing'}")
    sys.exit(1 if stale and "--check" in sys.argv else 0)


if __name__ == "__main__":
    main()
