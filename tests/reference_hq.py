"""The hq codec in plain NumPy, from spec/codec-hq.md and not from the C code.

Slow and simple: codes are exact quotients in float64, cells are found by quantising every word of the dtype, streams
are lists of bits. It serves to check the library's bytes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 64
KEY_WIDTHS = {  # bits: (R, o, anchor integer of the lowest level)
    0: (254, 0, 127),
    1: (254, 0, 64),
    2: (211, 22, 10),
    **{b: ((2**b - 1) * 2 ** (8 - b), 2 ** (7 - b), 0) for b in (3, 4, 5, 6)},
    7: (253, 1, 0),
    8: (254, 0, 0),
}
VALUE_WIDTHS = {**KEY_WIDTHS, 2: (230, 12, 19)}


@dataclass(frozen=True)
class Format:
    least: float  # scale
    special: int  # magnitude words from here on are not quantised exactly


FORMATS = {"bfloat16": Format(2.0**-116, 0x7E80), "float16": Format(2.0**-24, 0x7C00)}


def numbers(dtype: str, words: NDArray[np.uint16]) -> NDArray[np.float64]:
    words = np.asarray(words, np.uint16)
    if dtype == "float16":
        return words.view(np.float16).astype(np.float64)
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@lru_cache(2)
def _magnitudes(dtype: str) -> NDArray[np.float64]:
    """The value of every finite magnitude word, ascending."""
    top = 0x7F80 if dtype == "bfloat16" else 0x7C00
    return numbers(dtype, np.arange(top, dtype=np.uint16))


def quantised(x: NDArray[np.float64], s: float) -> NDArray[np.int64]:
    """round(x / s), ties away from zero."""
    return (np.sign(x) * np.floor(np.abs(x) / s + 0.5)).astype(np.int64)


@lru_cache(256)
def _cells(dtype: str, s: float) -> NDArray[np.int64]:
    """|k| of every finite magnitude word; ascending."""
    return np.minimum(np.floor(_magnitudes(dtype) / s + 0.5), 1 << 40).astype(np.int64)


def cell(dtype: str, s: float, a: int) -> tuple[int, int]:
    """Least magnitude word with |k| = a, and how many there are."""
    k = _cells(dtype, s)
    low, high = np.searchsorted(k, [a, a + 1])
    return int(low), int(high - low)


def to_words(dtype: str, x: float) -> int:
    """A reconstruction as a word: bfloat16 nearest, ties away from zero; float16 to even, saturating."""
    if dtype == "float16":
        return int(np.float16(min(max(x, -65504.0), 65504.0)).view(np.uint16))
    bits = int(np.float32(x).view(np.uint32))
    return (bits + 0x8000) >> 16 & 0xFFFF


def scale_of(dtype: str, low: float, high: float, steps: int) -> tuple[float, int]:
    span = np.float32(high) - np.float32(low)
    step = max(
        np.float32(span) / np.float32(steps),
        np.float32(max(abs(low), abs(high))) * np.float32(2.0**-10),
        np.float32(FORMATS[dtype].least),
    )
    word = (int(np.float32(step).view(np.uint32)) + 0x3FFFF) >> 18 << 2
    return float(np.uint32(word << 16).view(np.float32)), word


def paired(bits: list[int]) -> Bits:
    """A stream in pairs, of a bit in its first half and the one as far in the second."""
    half = (len(bits) + 1) // 2
    pairs = [(bits[i], bits[half + i] if half + i < len(bits) else 0) for i in range(half)]
    out = Bits()
    for stream in ([x | y for x, y in pairs], [x for x, y in pairs if x | y], [y for x, y in pairs if x]):
        for bit in stream:
            out.put(bit, 1)
    return out


def unpaired(stream: Bits, count: int) -> list[int]:
    """The reverse."""
    either = stream.take((count + 1) // 2)
    first = [bit and x for bit, x in zip(either, spread(stream, either), strict=True)]
    second = [y if x else bit for bit, x, y in zip(either, first, spread(stream, first), strict=True)]
    return (first + second)[:count]


def spread(stream: Bits, mask: list[int]) -> list[int]:
    """A bit of the stream for each that is set in the mask, zeros elsewhere."""
    return [stream.get(1) if bit else 0 for bit in mask]


class Bits:
    """A stream of bits, the first in the least significant bit of the first byte."""

    def __init__(self, data: bytes = b"") -> None:
        self.bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").tolist()
        self.at = 0

    def put(self, value: int, count: int) -> None:
        self.bits += [value >> i & 1 for i in range(count)]

    def get(self, count: int) -> int:
        taken = self.bits[self.at : self.at + count]
        assert len(taken) == count, "stream ends early"
        self.at += count
        return sum(bit << i for i, bit in enumerate(taken))

    def take(self, count: int) -> list[int]:
        return [self.get(1) for _ in range(count)]

    def data(self) -> bytes:
        return np.packbits(np.array(self.bits, np.uint8), bitorder="little").tobytes()


@dataclass
class Group:
    s: float
    s_word: int
    z: int
    constant: int | None
    width: tuple[int, int, int]


RESCALED = range(0x0800, 0x7E80)  # magnitude words that exponents move


def rescaled(words: NDArray[np.uint16], exponents: NDArray[np.int8]) -> NDArray[np.uint16]:
    """bfloat16 words divided by 2^e, e by channel; words that leave the range come in again at its other end."""
    magnitude = (words & 0x7FFF).astype(np.int64)
    moved = (magnitude - RESCALED.start - 128 * exponents.astype(np.int64)) % len(RESCALED) + RESCALED.start
    inside = (magnitude >= RESCALED.start) & (magnitude < RESCALED.stop)
    return (np.where(inside, moved, magnitude) | (words & 0x8000)).astype(np.uint16)


def spreads(dtype: str, words: NDArray[np.uint16]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mean bfloat16 words of each channel's range and largest magnitude, over blocks."""
    heads, tokens, dim = words.shape
    out = np.zeros((2, heads, dim), np.int64)
    for h, c in np.ndindex(heads, dim):
        found: tuple[list[int], list[int]] = [], []
        for t in range(0, tokens, BLOCK):
            block = words[h, t : t + BLOCK, c]
            if ((block & 0x7FFF) >= FORMATS[dtype].special).any():
                continue
            x = numbers(dtype, block).astype(np.float32)
            for kind, spread in zip(found, (np.float32(x.max()) - np.float32(x.min()), np.abs(x).max()), strict=True):
                word = (int(np.float32(spread).view(np.uint32)) + 0xFFFF) >> 16
                kind.append(max(word, 0x2000))
        out[:, h, c] = [sum(kind) // len(kind) if kind else 0x2000 for kind in found]
    return out[0], out[1]


GAINS = (-315, -392, -475, -614, -756, -891, -1022)


def weights(ranges: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Half a channel's range and size, and three quarters of its partner's size in position encoding."""
    dim = sizes.shape[1]
    partners = [(c - dim // 2) % dim for c in range(dim)]
    return (2 * ranges + 2 * sizes + 3 * sizes[:, partners]) // 4


def widths_by_range(weight: NDArray[np.int64], mean: float) -> NDArray[np.uint8]:
    """Each next bit to the channel that gains most, the first of those that gain the same."""
    widths = np.zeros(weight.size, np.uint8)
    flat = weight.ravel()
    for _ in range(min(int(mean * weight.size), 7 * weight.size)):
        gains = [int(flat[i]) + GAINS[b] if b < 7 else -(10**9) for i, b in enumerate(widths)]
        widths[int(np.argmax(gains))] += 1
    return widths.reshape(weight.shape)


def biases_of(words: NDArray[np.uint16]) -> NDArray[np.int8]:
    """round(15 (positive - negative) / tokens) of each channel, [heads, channels]."""
    tokens = words.shape[1]
    excess = tokens - 2 * (words >> 15).astype(np.int64).sum(1)
    return np.clip(np.floor(15 * excess / tokens + 0.5), -8, 7).astype(np.int8)


def exponents_of(sizes: NDArray[np.int64]) -> NDArray[np.int8]:
    rows = [[min(max((int(x) - int(row.sum()) // row.size + 64) // 128, -8), 7) for x in row] for row in sizes]
    return np.array(rows, np.int8)


@dataclass(frozen=True)
class Sections:
    anchor: bytes = b""
    headers: bytes = b""
    params: bytes = b""
    rest: bytes = b""
    table: bytes = b""
    ranks: bytes = b""
    folds: bytes = b""
    rest_folds: bytes = b""


class Tile:
    """A tile of one part; `widths` is [heads, head_dim] (for values, equal within 64 channels)."""

    def __init__(
        self,
        part: str,
        dtype: str,
        shape: tuple[int, int, int],
        widths: NDArray[np.uint8],
        *,
        fold: bool = False,
        exponents: NDArray[np.int8] | None = None,
        biases: NDArray[np.int8] | None = None,
    ) -> None:
        self.part, self.dtype, self.shape, self.widths = part, dtype, shape, widths
        self.table = KEY_WIDTHS if part == "key" else VALUE_WIDTHS
        self.fold, self.exponents = fold, exponents
        self.folds_rest = fold and part == "key" and bool((widths < 2).any())
        self.biases = np.zeros(widths.shape, np.int8) if biases is None else biases

    def blocks(self) -> list[tuple[int, slice, slice]]:
        heads, tokens, dim = self.shape
        return [
            (h, slice(t, min(t + BLOCK, tokens)), slice(c, min(c + BLOCK, dim)))
            for h in range(heads)
            for t in range(0, tokens, BLOCK)
            for c in range(0, dim, BLOCK)
        ]

    def groups_last(self, block: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """[tokens, channels] as [group, value]."""
        return block.T if self.part == "key" else block

    # --- encoder

    def encode(self, words: NDArray[np.uint16]) -> Sections:
        out = [b""] * 8
        for h, t, c in self.blocks():
            block, widths = words[h, t, c], self.widths[h, c]
            scaled = block if self.exponents is None else rescaled(block, self.exponents[h, c])
            groups, special = self.choose(scaled, widths)
            codes = self.codes(scaled, groups)
            anchor, rest = self.planes(codes, widths)
            entry, anchor = self.folded(0, codes, widths, groups, self.biases[h, c], anchor)
            late_entry, rest = self.folded(1, codes, widths, groups, self.biases[h, c], rest)
            header, params = self.params(groups)
            rank_entry, ranks = self.ranks(scaled, block, codes, groups, special)
            for i, piece in enumerate((anchor, header, params, rest, rank_entry, ranks, entry, late_entry)):
                out[i] += piece
        return Sections(*out)

    # --- folding

    def centre(  # noqa: PLR0917
        self, codes: NDArray[np.int64], groups: list[Group], biases: NDArray[np.int8], t: int, c: int, width: int
    ) -> int:
        """Of the three top bits of a value; of the codes only the token before is read."""
        if self.part == "value":
            return min(max((self.zero(groups, biases, t, c) + 16) // 32, 1), 7)
        return 2 + ((int(codes[t - 1, c]) >> 5) + 1) // 2 if t and width != 1 else 4

    @staticmethod
    def zero(groups: list[Group], biases: NDArray[np.int8], t: int, c: int) -> int:
        """Where zero lies among the codes of a value."""
        return groups[t].z + groups[t].width[1] + 4 * int(biases[c])

    def likely(
        self, codes: NDArray[np.int64], groups: list[Group], biases: NDArray[np.int8], t: int, c: int
    ) -> tuple[int, ...]:
        """The two top bits of 2-bit channels, the likeliest first."""
        if self.part == "value":
            cell = min(max(self.zero(groups, biases, t, c) // 32, 1), 6)
            return [(0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 0, 3), (2, 1, 3, 0), (2, 3, 1, 0), (3, 2, 1, 0)][cell - 1]
        return (2, 1, 3, 0) if t and codes[t - 1, c] >= 128 else (1, 2, 0, 3)

    def folds(self, section: int, width: int) -> bool:
        return width >= 2 if section == 0 else width < 2 and self.part == "key"

    def fold_rows(self, section: int, widths: NDArray[np.uint8]) -> list[tuple[int, int]]:
        """(plane, channel) of the bytes of an octet of a folded section; plane -1 is S, -2 is D1."""
        rows = []
        for p in range(8):
            for c, width in enumerate(int(b) for b in widths):
                if (p < width) != (section == 0):
                    continue
                names = {0: (-1, -2, None), 1: (0, -2, None), 2: (-2, None)}.get(width, (-1, -2, None))
                plane = names[p] if self.folds(section, width) and p < len(names) else p
                rows += [(plane, c)] * (plane is not None)
        return rows

    def distance(self, code: int, width: int, centre: int, likely: tuple[int, ...]) -> tuple[int, bool]:
        if width == 2:
            return likely.index(code >> 6), False
        v = ((code >> 5) - centre + 4) % 8
        return (v - 4, True) if v >= 4 else (3 - v, False)

    def folded(  # noqa: PLR0917
        self,
        section: int,
        codes: NDArray[np.int64],
        widths: NDArray[np.uint8],
        groups: list[Group],
        biases: NDArray[np.int8],
        flat: bytes,
    ) -> tuple[bytes, bytes]:
        """The entry in the fold table, and the section of the block."""
        if not self.fold or (section == 1 and not self.folds_rest):
            return b"", flat
        channels = [c for c, width in enumerate(widths) if self.folds(section, int(width))]
        sign, distances = np.zeros_like(codes), np.zeros_like(codes)
        streams = [Bits(), Bits()]
        for first in range(0, len(codes), 8):
            for c in channels:
                width = int(widths[c])
                for t in range(first, min(first + 8, len(codes))):
                    centre = self.centre(codes, groups, biases, t, c, width)
                    likely = self.likely(codes, groups, biases, t, c)
                    d, sign[t, c] = self.distance(int(codes[t, c]), width, centre, likely)
                    distances[t, c] = d
                    for i, stream in enumerate(streams):
                        if d > i:
                            stream.put(int(d > i + 1), 1)
        out = b""
        for first in range(0, len(codes), 8):
            for p, c in self.fold_rows(section, widths):
                bits = sign if p == -1 else distances > 0 if p == -2 else codes >> 7 - p & 1
                out += bytes([sum(int(bit) << t for t, bit in enumerate(bits[first : first + 8, c]))])
        entry, coded = 0, b""
        for i, stream in enumerate(streams):
            pairs = paired(stream.bits)
            if len(pairs.bits) < len(stream.bits):
                stream, entry = pairs, entry | 1 << 13 + i
            coded += stream.data()
        if len(out) + len(coded) >= len(flat):
            return b"\xff\xff", flat
        return struct.pack("<H", entry | len(coded)), out + coded

    def unfolded(  # noqa: PLR0917
        self,
        section: int,
        folded: Bits,
        widths: NDArray[np.uint8],
        groups: list[Group],
        biases: NDArray[np.int8],
        codes: NDArray[np.int64],
        entry: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Set the section's other bits of `codes`, and return S and distances."""
        sign, distance = np.zeros_like(codes), np.zeros_like(codes)
        for first in range(0, len(codes), 8):
            for p, c in self.fold_rows(section, widths):
                byte = folded.get(8)
                for t in range(first, min(first + 8, len(codes))):
                    bit = byte >> t - first & 1
                    if p < 0:
                        (distance, sign)[p][t, c] = bit
                    else:
                        codes[t, c] |= bit << 7 - p
        channels = [c for c, width in enumerate(widths) if self.folds(section, int(width))]
        order = [(t, c) for o in range(0, len(codes), 8) for c in channels for t in range(o, min(o + 8, len(codes)))]
        end = folded.at + 8 * (entry & 0x1FFF)
        for position in (1, 2):
            places = [(t, c) for t, c in order if distance[t, c] == position]
            bits = unpaired(folded, len(places)) if entry >> 12 + position & 1 else folded.take(len(places))
            for (t, c), bit in zip(places, bits, strict=True):
                distance[t, c] += bit
            folded.at += -folded.at % 8
        assert folded.at == end, "the fold's streams have another size"
        return sign, distance

    def uncentred(  # noqa: PLR0917
        self,
        section: int,
        widths: NDArray[np.uint8],
        groups: list[Group],
        biases: NDArray[np.int8],
        codes: NDArray[np.int64],
        found: tuple[NDArray[np.int64], NDArray[np.int64]],
    ) -> None:
        """Set the top bits of the section's folded channels."""
        sign, distance = found
        for c in (c for c, width in enumerate(widths) if self.folds(section, int(width))):
            for t in range(len(codes)):
                if widths[c] == 2:
                    codes[t, c] |= self.likely(codes, groups, biases, t, c)[distance[t, c]] << 6
                    continue
                above = codes[t, c] >= 128 if widths[c] == 1 else sign[t, c]
                v = 4 + distance[t, c] if above else 3 - distance[t, c]
                centre = self.centre(codes, groups, biases, t, c, int(widths[c]))
                codes[t, c] = codes[t, c] & 31 | (v + centre - 4) % 8 << 5

    def choose(self, block: NDArray[np.uint16], widths: NDArray[np.uint8]) -> tuple[list[Group], bool]:
        groups, any_special = [], False
        for g, words in enumerate(self.groups_last(block)):
            width = self.table[int(widths[g if self.part == "key" else 0])]
            if (words == words[0]).all():
                groups.append(Group(0.0, 0, 0, int(words[0]), width))
                continue
            special = (words & 0x7FFF) >= FORMATS[self.dtype].special
            any_special |= bool(special.any())
            x = numbers(self.dtype, words[~special]) if not special.all() else np.zeros(1)
            low, high = float(x.min()), float(x.max())
            s, s_word = scale_of(self.dtype, low, high, width[0])
            k_low, k_high = (int(k) for k in quantised(np.array([low, high]), s))
            groups.append(Group(s, s_word, width[2] if k_low == k_high == 0 else -k_low, None, width))
        return groups, any_special

    def codes(self, block: NDArray[np.uint16], groups: list[Group]) -> NDArray[np.int64]:
        codes = np.zeros(self.groups_last(block).shape, np.int64)
        for g, words in enumerate(self.groups_last(block)):
            group = groups[g]
            steps, offset, _ = group.width
            if group.constant is not None:
                codes[g] = offset
                continue
            with np.errstate(invalid="ignore", over="ignore"):
                magnitude = np.abs(numbers(self.dtype, words & 0x7FFF)) / group.s
            k = np.floor(np.where(magnitude < 4095, magnitude, 4095) + 0.5).astype(np.int64)
            k = np.where(words >> 15, -k, k)
            codes[g] = np.clip(k + group.z + offset, offset, offset + steps + 1)
        return self.groups_last(codes)  # back to [tokens, channels]: the transpose is its own inverse

    @staticmethod
    def planes(codes: NDArray[np.int64], widths: NDArray[np.uint8]) -> tuple[bytes, bytes]:
        anchor, rest = b"", b""
        for first in range(0, len(codes), 8):
            octet = codes[first : first + 8]
            for p in range(8):
                for c in range(codes.shape[1]):
                    byte = sum((int(octet[t, c]) >> 7 - p & 1) << t for t in range(len(octet)))
                    if p < widths[c]:
                        anchor += bytes([byte])
                    else:
                        rest += bytes([byte])
        return anchor, rest

    @staticmethod
    def params(groups: list[Group]) -> tuple[bytes, bytes]:
        if any(group.constant is not None for group in groups):
            body = b"".join(
                struct.pack("<Hh", group.s_word, group.z)
                if group.constant is None
                else struct.pack("<HH", 0, group.constant)
                for group in groups
            )
            return struct.pack("<HhBB", 0, 0, 255, 255), body
        s_low, z_low = min(g.s_word for g in groups), min(g.z for g in groups)
        s_bits = ((max(g.s_word for g in groups) - s_low) // 4).bit_length()
        z_bits = (max(g.z for g in groups) - z_low).bit_length()
        bits = Bits()
        for group in groups:
            bits.put((group.s_word - s_low) // 4, s_bits)
            bits.put(group.z - z_low, z_bits)
        return struct.pack("<HhBB", s_low, z_low, s_bits, z_bits), bits.data()

    def group_at(self, groups: list[Group], t: int, c: int) -> Group:
        return groups[c if self.part == "key" else t]

    def ranks(
        self,
        block: NDArray[np.uint16],
        original: NDArray[np.uint16],
        codes: NDArray[np.int64],
        groups: list[Group],
        special: bool,
    ) -> tuple[bytes, bytes]:
        a, b, w, x = Bits(), Bits(), Bits(), b""
        raw = struct.pack("<HH", 0xFFFF, 0), original.astype("<u2").tobytes()
        if special:
            return raw
        for t, c in np.ndindex(block.shape):
            group = self.group_at(groups, t, c)
            if group.constant is not None:
                continue
            word = int(block[t, c])
            magnitude = word & 0x7FFF
            k = abs(int(codes[t, c]) - group.width[1] - group.z)
            if k == 0 and self.dtype == "float16":
                x += struct.pack("<H", word)
            elif k == 0:
                top = cell(self.dtype, group.s, 0)[1] - 1
                code = top - magnitude if magnitude else 2046
                if magnitude and code >= 2046:
                    code = 2047
                    x += struct.pack("<H", word)
                w.put(code | word >> 15 << 11, 12)
            else:
                low, count = cell(self.dtype, group.s, k)
                width = int(math.log2(count))
                rank = magnitude - low
                field = rank % 2**width
                a.put(field, width)
                if field < count - 2**width:
                    b.put(rank >> width, 1)
        streams = [a.data(), b.data(), w.data(), x]
        if sum(map(len, streams)) >= 2 * block.size:
            return raw
        return struct.pack("<HH", len(streams[0]), sum(map(len, streams[1:]))), b"".join(streams)

    # --- decoder

    def decode(self, sections: Sections, count: int = 3) -> NDArray[np.uint16]:
        """Words after level 0 (``count`` 1), with the rest (2), or with ranks too (3)."""
        words = np.zeros(self.shape, np.uint16)
        params, ranks = sections.params, sections.ranks
        anchor, rest = Bits(sections.anchor), Bits(sections.rest)
        for i, (h, t, c) in enumerate(self.blocks()):
            shape = (t.stop - t.start, c.stop - c.start)
            widths = self.widths[h, c]
            groups, params = self.read_params(sections.headers[6 * i : 6 * i + 6], params, shape, widths)
            codes = np.zeros(shape, np.int64)
            found = []
            for section, (stream, table) in enumerate(((anchor, sections.folds), (rest, sections.rest_folds))):
                if section == 1 and count == 1:
                    continue
                has_table = self.fold if section == 0 else self.folds_rest
                entry = struct.unpack_from("<H", table, 2 * i)[0] if has_table else 0xFFFF
                if entry != 0xFFFF:
                    found.append(
                        (section, self.unfolded(section, stream, widths, groups, self.biases[h, c], codes, entry))
                    )
                    continue
                for first in range(0, shape[0], 8):
                    for p in range(8):
                        for channel in range(shape[1]):
                            if (p < widths[channel]) == (section == 0):
                                byte = stream.get(8)
                                for j in range(min(8, shape[0] - first)):
                                    codes[first + j, channel] |= (byte >> j & 1) << 7 - p
            for section, what in found:
                self.uncentred(section, widths, groups, self.biases[h, c], codes, what)
            if count < 3:
                block = self.dequantised(codes, groups, full=count == 2)
            else:
                sizes = struct.unpack_from("<HH", sections.table, 4 * i)
                size = 2 * shape[0] * shape[1] if sizes[0] == 0xFFFF else sum(sizes)
                body, ranks = ranks[:size], ranks[size:]
                if sizes[0] == 0xFFFF:
                    words[h, t, c] = np.frombuffer(body, "<u2").reshape(shape)
                    continue
                block = self.exact(codes, groups, sizes[0], body)
            words[h, t, c] = block if self.exponents is None else rescaled(block, -self.exponents[h, c])
        assert anchor.at == len(anchor.bits), "anchor planes are left over"
        assert count == 1 or rest.at == len(rest.bits), "planes are left over"
        assert not params, "parameters are left over"
        assert count < 3 or not ranks, "ranks are left over"
        return words

    def read_params(
        self, header: bytes, params: bytes, shape: tuple[int, int], widths: NDArray[np.uint8]
    ) -> tuple[list[Group], bytes]:
        s_low, z_low, s_bits, z_bits = struct.unpack("<HhBB", header)
        count = shape[1] if self.part == "key" else shape[0]
        size = 4 * count if s_bits == 255 else (count * (s_bits + z_bits) + 7) // 8
        body, params = params[:size], params[size:]
        bits = Bits(body)
        groups = []
        for g in range(count):
            width = self.table[int(widths[g if self.part == "key" else 0])]
            constant = None
            if s_bits == 255:
                s_word, z = struct.unpack_from("<Hh", body, 4 * g)
                if s_word == 0:
                    constant, z = z & 0xFFFF, 0
            else:
                s_word = s_low + 4 * bits.get(s_bits)
                z = z_low + bits.get(z_bits)
            groups.append(Group(float(np.uint32(s_word << 16).view(np.float32)), s_word, z, constant, width))
        return groups, params

    def dequantised(self, codes: NDArray[np.int64], groups: list[Group], *, full: bool) -> NDArray[np.uint16]:
        words = np.zeros(codes.shape, np.uint16)
        for t, c in np.ndindex(codes.shape):
            group = self.group_at(groups, t, c)
            if group.constant is not None:
                words[t, c] = group.constant
                continue
            _, offset, base = group.width
            integer = int(codes[t, c]) - group.z + (-offset if full else base)
            words[t, c] = to_words(self.dtype, integer * group.s)
        return words

    def exact(self, codes: NDArray[np.int64], groups: list[Group], a_size: int, ranks: bytes) -> NDArray[np.uint16]:
        a, more = Bits(ranks[:a_size]), Bits(ranks[a_size:])
        words = np.zeros(codes.shape, np.uint16)
        zeros = []
        for t, c in np.ndindex(codes.shape):
            group = self.group_at(groups, t, c)
            if group.constant is not None:
                words[t, c] = group.constant
                continue
            k = int(codes[t, c]) - group.width[1] - group.z
            if k == 0:
                zeros.append((t, c, cell(self.dtype, group.s, 0)[1] - 1))
                continue
            low, count = cell(self.dtype, group.s, abs(k))
            width = int(math.log2(count))
            rank = a.get(width)
            if rank < count - 2**width:
                rank |= more.get(1) << width
            words[t, c] = low + rank | (k < 0) << 15
        more.at += -more.at % 8
        escaped = []
        for t, c, top in zeros:
            field = more.get(12) if self.dtype == "bfloat16" else 2047
            code, sign = field & 2047, field >> 11
            words[t, c] = sign << 15 | (0 if code == 2046 else max(top - code, 0))
            escaped += [(t, c)] * (code == 2047)
        more.at += -more.at % 8
        for t, c in escaped:
            words[t, c] = more.get(16)
        assert (a.at + 7) // 8 == a_size, "stream A has another size"
        assert more.at == len(more.bits), "streams B, W and X have another size"
        return words


def nibbles(values: NDArray[np.integer]) -> bytes:
    flat = [int(x) for x in values.ravel()] + [0] * (values.size % 2)
    return bytes(low | high << 4 for low, high in zip(flat[::2], flat[1::2], strict=True))


def payloads(tile: Tile, words: NDArray[np.uint16], levels: int, side: bytes = b"") -> list[bytes]:
    """The codec's payloads of a tile; `side`: the tile's own tables."""
    s = tile.encode(words)
    header = struct.Struct("<BBHI").pack
    first = side + s.folds + s.anchor + s.headers + s.params
    out = [header(0, 0, 0, len(s.params)) + first]
    if levels == 3:
        out += [header(0, 1, 0, 0) + s.rest_folds + s.rest, header(0, 2, 0, len(s.ranks)) + s.table + s.ranks]
    elif levels == 2:
        out += [header(0, 1, 0, len(s.ranks)) + s.rest_folds + s.rest + s.table + s.ranks]
    flat = [
        -(-(t.stop - t.start) // 8) * np.array([b.sum(), (8 - b).sum()])
        for h, t, c in tile.blocks()
        for b in [tile.widths[h, c].astype(int)]
    ]
    planes = sum(flat)[: levels if levels < 2 else 2].sum()
    folded = len(s.anchor) + (len(s.rest) if levels > 1 else 0)
    if sum(map(len, out)) - folded + planes >= words.nbytes:
        stored = words.astype("<u2").tobytes()
        return [header(1, i, 0, 0) + (stored if i == 0 else b"") for i in range(levels)]
    return out
