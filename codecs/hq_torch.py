"""``hq`` for torch tensors on any device: the bytes and words of :mod:`lynxproto.codecs.hq`. spec/codec-hq.md.

Whole tiles at a time, in integer operations that every device has. Nothing runs along a stream: places in streams are
prefix sums, writing is addition of bits that do not overlap, and indices into a payload are clamped to it, so that a
broken one is found by comparing sizes afterwards. The host waits for the device only where sizes decide about
allocations, and once for all faults of a payload.

Floating point is used for products that binary32 holds exactly, and where the specification leaves room for error;
divisions that must be right to the last bit are made of integers. Devices are taken to be little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import numpy as np

from lynxproto.chunk import ChunkSpec
from lynxproto.codecs._torch import (
    Tensor,
    TorchState,
    bytes_on,
    payload_tensors,
    tensor_words,
    torch,
    transpose_bits,
)
from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.codecs.hq import HQ
from lynxproto.errors import ConfigError, PayloadError, SpecError

__all__ = ["TorchHQ"]

_HEADER: Final = struct.Struct("<BBHI")  # mode, level, reserved, bytes of the section of variable size
_CODED: Final = 0
_STORED: Final = 1
_BLOCK: Final = 64
_PARAM_HEADER: Final = 6  # bytes a block
_RANK_HEADER: Final = 4
_FOLD_HEADER: Final = 2
_FULL: Final = 255  # in both fields of a parameter header: s and z follow in full
_RAW: Final = 0xFFFF  # in the rank table: the block's words follow
_ZERO: Final = 2046  # in stream W: the word is +0 or -0
_ESCAPE: Final = 2047  # the word is in stream X
_FLAT: Final = 0xFFFF  # in a fold table: the block is not folded
_SIZE: Final = 0x1FFF  # in a fold table: bytes of streams
_PAIRED: Final = 13  # in a fold table: the bit that says whether D2 is paired; the next one says it of D3
#: The two top bits of 2-bit channels, the likeliest first: of keys by the code before, of values by zero. Section 6.1.
_LIKELY: Final = ((1, 2, 0, 3), (2, 1, 3, 0))
_NEAREST: Final = ((0, 1, 2, 3), (1, 0, 2, 3), (1, 2, 0, 3), (2, 1, 3, 0), (2, 3, 1, 0), (3, 2, 1, 0))
_ANCHOR: Final = 0  # sections of planes
_REST: Final = 1
_MAX_ZERO_POINT: Final = 1024
_LEAST_SPREAD: Final = 0x2000
_GAINS: Final = (-315, -392, -475, -614, -756, -891, -1022)  # of a channel's bits: section 4.2
_MOVED: Final = range(0x0800, 0x7E80)  # magnitude words that exponents move


@dataclass(frozen=True, slots=True)
class _Format:
    """What section 5 says of a dtype. Exponents are of the magnitude's last place."""

    fraction: int  # bits after the leading one
    bias: int  # a word of exponent field e counts in units of 2^(max(e, 1) - bias)
    special: int  # magnitude words from here on are not quantised exactly
    least: int  # scale, as a bfloat16 word
    largest: int
    rank_bits: int  # of stream A, at most


_FORMATS: Final = {
    "bfloat16": _Format(7, 134, 0x7E80, 0x0580, 0x7E00, 7),
    "float16": _Format(10, 25, 0x7C00, 0x3380, 0x4480, 10),
}


class TorchHQ(HQ):
    """:class:`~lynxproto.codecs.hq.HQ` for torch tensors, with the same config, payloads and words.

    ``encode`` takes a tensor ``[heads, tokens, head_dim]`` of a 16-bit dtype on any device and returns uint8 tensors
    on that device. ``decode`` and ``refine`` take uint8 tensors of the output's device, or anything with the buffer
    protocol, and write into such a tensor. Strides are free. ``threads`` is ignored: torch has its own. Temporary
    memory is about 115 bytes a value in ``decode`` and 150 in ``encode``.
    """

    @classmethod
    def of(cls, codec: Codec) -> TorchHQ:
        """The torch twin of an hq codec."""
        config = codec.get_config()
        if config.pop("id") != cls.codec_id:
            raise ConfigError(f"{codec!r} is no hq codec")
        return cls(**config)

    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """See :meth:`Codec.encode`; payloads are uint8 tensors."""
        self._check_support(spec)
        words = tensor_words(spec, array)
        wanted = list(range(self.levels)) if levels is None else list(levels)
        if any(not 0 <= level < self.levels for level in wanted):
            raise SpecError(f"hq: levels {wanted} of a codec with {self.levels}")
        grid = _Grid.of(spec, words.device)
        source = grid.cut(words.to(torch.int32) & 0xFFFF)
        tables, side = self._choose_tables(grid, source)
        widths = tables.widths
        block = source if tables.exponents is None else _moved(source, tables.exponents)
        params, special = _choose(grid, widths, block)
        tile = _Tile(grid, tables, params)
        codes = _quantised(tile, block)
        planes = _pack(codes)
        anchor = planes[widths.anchor]
        rest = [planes[~widths.anchor & grid.planes]]
        fields = _write_params(grid, params)
        last = _write_ranks(tile, block, source, codes, special) if self.exact else []
        flat = [*side, anchor, *fields, *(rest + last if self.exact else [])]
        folds = [section for section in (_ANCHOR, _REST) if self._folds(grid, widths, section)]
        fold_bytes = _FOLD_HEADER * grid.blocks * len(folds if self.exact else folds[:1])
        if self.levels * _HEADER.size + _nbytes(flat) + fold_bytes >= spec.nbytes:
            stored = words.reshape(-1).view(torch.uint8)
            sections = [[stored] if level == 0 else [] for level in range(self.levels)]
            headers = [_HEADER.pack(_STORED, level, 0, 0) for level in range(self.levels)]
        else:
            folded = _write_folded(tile, codes, _ANCHOR) if _ANCHOR in folds and 0 in wanted else [anchor]
            rest = _write_folded(tile, codes, _REST) if _REST in folds and 1 in wanted and self.exact else rest
            first = [*side, *folded, *fields]
            sections = [first, rest, last] if self.levels == 3 else [first, rest + last][: self.levels]
            variable = {self.levels - 1: _nbytes(last[1:]), 0: _nbytes(fields[1:])}
            headers = [_HEADER.pack(_CODED, level, 0, variable.get(level, 0)) for level in range(self.levels)]
        return [torch.cat([bytes_on(headers[level], words.device), *sections[level]]) for level in wanted]

    def decode(self, spec: ChunkSpec, levels: Sequence[Buffer], out: Any | None, *, threads: int = 1) -> DecodeState:
        """See :meth:`Codec.decode`. Without ``out`` sizes are checked, and values are not."""
        self._check_support(spec)
        words = None if out is None else tensor_words(spec, out)
        if not 1 <= len(levels) <= self.levels:
            raise SpecError(f"hq: got {len(levels)} levels of a codec with {self.levels}")
        payloads = payload_tensors(levels, words)
        heads = [_read_header(payload, level) for level, payload in enumerate(payloads)]
        if len({mode for mode, _ in heads}) > 1:
            raise PayloadError("hq: some levels of the chunk are stored and others are not (byte offset 0)")
        if heads[0][0] == _STORED:
            for level, payload in enumerate(payloads):
                _check_size(level, payload, _HEADER.size + (spec.nbytes if level == 0 else 0))
            if words is not None:
                words.copy_(payloads[0][_HEADER.size :].clone().view(torch.int16).reshape(spec.shape))
        else:
            self._decode_levels(spec, payloads, [size for _, size in heads], words)
        return TorchState(len(levels) - 1, tuple(levels))

    def _decode_levels(
        self, spec: ChunkSpec, payloads: list[Tensor], variable: list[int], words: Tensor | None
    ) -> None:
        grid = _Grid.of(spec, payloads[0].device)
        tables, side_bytes = self._read_tables(grid, payloads[0])
        parts = self._cut_levels(grid, tables.widths, side_bytes, payloads, variable)
        faults = _Faults(grid.blocks)
        anchor = _plane_sizes(grid, tables.widths, _ANCHOR, parts.folds, parts.anchor, faults)
        rest = None
        if parts.rest is not None:
            rest = _plane_sizes(grid, tables.widths, _REST, parts.rest_folds, parts.rest, faults)
        param_sizes = _param_sizes(grid, parts.headers, parts.params, faults)
        streams = None
        if parts.table is not None and parts.ranks is not None:
            streams = _rank_sizes(grid, parts.table, parts.ranks, faults)
        faults.check()
        if words is None:
            return
        tile = _Tile(grid, tables, _read_params(grid, param_sizes, parts.params, faults))
        coded = torch.ones_like(grid.groups[:, 0]) if streams is None else ~streams.raw
        codes = _unpack_folded(tile, [s for s in (anchor, rest) if s is not None], coded, faults)
        if rest is not None:
            _check_codes(tile, codes, coded, rest, faults)
        if streams is None or parts.ranks is None:
            values = _dequantised(tile, codes, full=parts.rest is not None)
        else:
            values = _read_ranks(tile, codes, streams, parts.ranks, faults)
        faults.check()
        if tables.exponents is not None:
            values = _moved(values, -tables.exponents)
        if streams is not None and parts.ranks is not None:
            mine, at = _raw_places(grid, streams.starts, streams.raw)
            values[mine] = _Reader(parts.ranks.data).get(at, 16).to(torch.int32)
        words.copy_(grid.join(_to_int16(values)))

    def _cut_levels(
        self, grid: _Grid, widths: _Widths, side_bytes: int, payloads: list[Tensor], variable: list[int]
    ) -> _Parts:
        """Payloads as sections, whose sizes are checked as far as headers and tables of widths tell."""
        head_bytes, table_bytes = _PARAM_HEADER * grid.blocks, _RANK_HEADER * grid.blocks
        fold_bytes = _FOLD_HEADER * grid.blocks if self._fold else 0
        late_bytes = _FOLD_HEADER * grid.blocks if self._folds(grid, widths, _REST) else 0
        anchor_bytes, plane_bytes = torch.stack([widths.anchor.sum(), grid.planes.sum()]).tolist()
        rest_bytes = plane_bytes - anchor_bytes
        if self._fold:  # the fold table says how large it is
            fixed = _HEADER.size + side_bytes + fold_bytes + head_bytes + variable[0]
            anchor_bytes = max(0, payloads[0].numel() - fixed)
        sections = _cut(
            payloads[0],
            0,
            {
                "side table": side_bytes,
                "fold table": fold_bytes,
                "anchor planes": anchor_bytes,
                "parameter headers": head_bytes,
                "parameters": variable[0],
            },
        )
        _, folds, anchor, headers, params = sections
        parts = _Parts(folds if self._fold else None, anchor, headers, params)
        if len(payloads) == 1:
            return parts
        last = self.levels - 1
        ranks = {"rank table": table_bytes, "ranks": variable[min(last, len(payloads) - 1)]}
        if last == 2 and variable[1]:
            raise PayloadError("hq level 1: reserved bytes are not zero (byte offset 4)")
        beyond = ranks if last == 1 else {}
        if late_bytes:
            rest_bytes = max(0, payloads[1].numel() - _HEADER.size - late_bytes - sum(beyond.values()))
        sections = _cut(payloads[1], 1, {"rest fold table": late_bytes, "codes": rest_bytes, **beyond})
        late, *sections = sections
        if last == 2 and len(payloads) == 3:
            sections += _cut(payloads[2], 2, ranks)
        parts = parts._replace(rest_folds=late if late_bytes else None)
        return parts._replace(**dict(zip(("rest", "table", "ranks"), sections, strict=False)))

    def _folds(self, grid: _Grid, widths: _Widths, section: int) -> bool:
        """Whether a section has a fold table. May wait for the device."""
        if not self._fold or section == _ANCHOR:
            return bool(self._fold)
        return bool(_folding(grid, widths, _REST).any())

    def _choose_tables(self, grid: _Grid, block: Tensor) -> tuple[_Tables, list[Tensor]]:
        """Tables of a tile to encode, and its side table."""
        chosen = {}
        names = self._side_tables(grid.spec)
        if "widths" in names:
            chosen["widths"] = _widths_by_range(_ranges(grid, block), _sizes(grid, block), self._key_bits)
        if "exponents" in names:
            chosen["exponents"] = _exponents(_sizes(grid, block)) + 8
        if "biases" in names:
            chosen["biases"] = _biases(grid, block) + 8
        return self._tables(grid, chosen), [_nibbles(chosen[name]) for name in names]

    def _read_tables(self, grid: _Grid, payload: Tensor) -> tuple[_Tables, int]:
        """Tables from a payload of level 0, and the size of its side table."""
        heads, _, dim = grid.spec.shape
        size = (heads * dim + 1) // 2
        read, at = {}, _HEADER.size
        for name in self._side_tables(grid.spec):
            if payload.numel() < at + size:
                _check_size(0, payload, at + size)
            packed = payload[at : at + size].to(torch.int32)
            nibbles = torch.stack([packed & 15, packed >> 4], 1).reshape(-1)
            table, padding = nibbles[: heads * dim], nibbles[heads * dim :]
            if bool(padding.any() | (table > (8 if name == "widths" else 15)).any()):
                raise PayloadError(f"hq level 0: a width is over 8 or padding not zero (byte offset {at})")
            read[name] = table.reshape(heads, dim)
            at += size
        return self._tables(grid, read), at - _HEADER.size

    def _tables(self, grid: _Grid, side: dict[str, Tensor]) -> _Tables:
        """From what a side table has."""
        widths, static = side.get("widths"), self._static_widths(grid.spec)
        if widths is None:
            widths = torch.from_numpy(np.array(static, np.int32)).to(grid.valid.device)
        exponents, biases = (
            grid.of_channels(side[name] - 8)[:, None, :] if name in side else None for name in ("exponents", "biases")
        )
        return _Tables(_Widths.of(grid, widths), exponents, biases)


# --- payloads and their sections


def _nbytes(parts: Sequence[Tensor]) -> int:
    return sum(part.numel() for part in parts)


def _read_header(payload: Tensor, level: int) -> tuple[int, int]:
    """Mode and size field of a level's header."""
    if payload.numel() < _HEADER.size:
        raise PayloadError(f"hq level {level}: {payload.numel()} bytes hold no header (byte offset 0)")
    mode, number, reserved, size = _HEADER.unpack(bytes(payload[: _HEADER.size].tolist()))
    if mode not in (_CODED, _STORED):
        raise PayloadError(f"hq level {level}: unknown mode {mode} (byte offset 0)")
    if number != level:
        raise PayloadError(f"hq level {level}: the payload is of level {number} (byte offset 1)")
    if reserved or (mode == _STORED and size):
        raise PayloadError(f"hq level {level}: reserved bytes are not zero (byte offset 2)")
    return mode, size


def _check_size(level: int, payload: Tensor, size: int) -> None:
    if payload.numel() != size:
        what = "truncated" if payload.numel() < size else "longer than its content"
        raise PayloadError(
            f"hq level {level}: {what}: {payload.numel()} bytes, its header and the tile make {size}"
            f" (byte offset {min(payload.numel(), size)})"
        )


class _Section(NamedTuple):
    """A part of a payload, and where it is."""

    level: int
    name: str
    start: int
    data: Tensor


class _Parts(NamedTuple):
    """The sections of a tile's levels, as far as they are there."""

    folds: _Section | None
    anchor: _Section
    headers: _Section
    params: _Section
    rest_folds: _Section | None = None
    rest: _Section | None = None
    table: _Section | None = None
    ranks: _Section | None = None


def _cut(payload: Tensor, level: int, sizes: dict[str, int]) -> list[_Section]:
    """A level's sections, of these sizes."""
    _check_size(level, payload, _HEADER.size + sum(sizes.values()))
    edges = pairwise(accumulate(sizes.values(), initial=_HEADER.size))
    return [_Section(level, name, a, payload[a:b]) for name, (a, b) in zip(sizes, edges, strict=True)]


class _Faults:
    """What is wrong with a payload, block by block; looked at once, when all is known."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.found: list[tuple[_Section, str, Tensor, Tensor]] = []

    def add(self, section: _Section, what: str, bad: Tensor, starts: Tensor) -> None:
        """Note which blocks are bad, as ``[blocks]`` booleans; ``starts``: of blocks in the section, and its end."""
        self.found.append((section, what, bad, starts))

    def add_total(self, section: _Section, starts: Tensor) -> None:
        """Note whether the blocks do not add up to the section."""
        self.add(section, "sizes do not add up", starts[-1] != section.data.numel(), starts)

    def check(self) -> None:
        """Raise PayloadError for the first fault. Waits for the device."""
        any_bad = torch.stack([bad.any() for _, _, bad, _ in self.found]).tolist()
        for (section, what, bad, starts), wrong in zip(self.found, any_bad, strict=True):
            if wrong:
                block = int(bad.to(torch.uint8).argmax()) if bad.dim() else self.blocks
                raise PayloadError(
                    f"hq level {section.level}: {what} ({section.name} of block {block} of {self.blocks},"
                    f" byte offset {section.start + int(starts[block])})"
                )
        self.found.clear()


# --- bits


def _bit_length(x: Tensor) -> Tensor:
    """Bits of integers from 0 up to 2^63 - 1."""
    n = torch.zeros_like(x)
    for shift in (32, 16, 8, 4, 2, 1):
        more = (x >> shift > 0).to(x.dtype) * shift if shift < 32 or x.dtype == torch.int64 else 0
        n, x = n + more, x >> more
    return n + (x > 0).to(x.dtype)


def _floor_log2(n: Tensor) -> Tensor:
    """Of int32 from 1 to 2^24: the exponent of the exact binary32."""
    return (n.to(torch.float32).view(torch.int32) >> 23) - 127


def _starts(sizes: Tensor) -> Tensor:
    """Where pieces of these sizes start, and where the last one ends: ``[n]`` as int64 ``[n + 1]``."""
    ends = sizes.to(torch.int64).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def _before(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums ``[blocks, n]`` of what stands before each value of its block, and ``[blocks]`` of all."""
    ends = counts.cumsum(1, dtype=torch.int32)
    return ends - counts, ends[:, -1]


class _Reader:
    """Fields of up to 32 bits at any places of a byte string; places beyond its end read something or other."""

    def __init__(self, data: Tensor) -> None:
        size = data.numel() // 4 + 2
        padded = data.new_zeros(4 * size)
        padded[: data.numel()] = data
        words = padded.view(torch.int32).to(torch.int64)
        self.pairs = (words[:-1] & 0xFFFFFFFF) | (words[1:] << 32)

    def get(self, at: Tensor, bits: Tensor | int) -> Tensor:
        """Fields at bit ``at``."""
        pairs = self.pairs[(at >> 5).clamp(0, self.pairs.numel() - 1)]
        ones = (1 << bits) - 1 if isinstance(bits, int) else (torch.ones_like(at) << bits) - 1
        return pairs >> (at & 31) & ones


class _Writer:
    """A byte string made of fields of up to 32 bits, which must not overlap."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.words = torch.zeros(size // 4 + 2, dtype=torch.int64, device=device)

    def put(self, at: Tensor, fields: Tensor) -> None:
        """Put fields at bits ``at``; what a field does not have must be zero."""
        at = at.reshape(-1)
        fields = fields.reshape(-1).to(torch.int64) << (at & 31)
        word = at >> 5
        self.words.index_add_(0, word, fields & 0xFFFFFFFF)
        self.words.index_add_(0, word + 1, fields >> 32)

    def bytes(self) -> Tensor:
        """All of it."""
        signed = self.words - (self.words >> 31 << 32)  # the same 32 bits as an int32
        return signed.to(torch.int32).view(torch.uint8)[: self.size]


# --- section 3: blocks and groups


@dataclass(frozen=True, slots=True)
class _Grid:
    """A tile as blocks ``[blocks, rows, columns]`` with zeros where a block has fewer tokens or channels.

    ``rows`` is a multiple of 8 up to 64. ``valid`` says which values are the tile's, ``groups`` which groups (as
    ``[blocks, n]``), ``planes`` which bytes of planes (``[blocks, octets, 8, columns]``).
    """

    spec: ChunkSpec
    format: _Format
    blocks: int
    rows: int
    columns: int
    tokens: Tensor
    channels: Tensor
    valid: Tensor
    groups: Tensor
    planes: Tensor
    has_channel: Tensor

    @classmethod
    def of(cls, spec: ChunkSpec, device: torch.device) -> _Grid:
        heads, tokens, dim = spec.shape
        rows, columns = min(_BLOCK, (tokens + 7) // 8 * 8), min(_BLOCK, dim)
        down, across = -(-tokens // rows), -(-dim // columns)
        blocks = heads * down * across
        number = torch.arange(blocks, device=device)
        token_counts = (tokens - number // across % down * rows).clamp(max=rows)
        channel_counts = (dim - number % across * columns).clamp(max=columns)
        has_token = torch.arange(rows, device=device) < token_counts[:, None]
        has_channel = torch.arange(columns, device=device) < channel_counts[:, None]
        return cls(
            spec=spec,
            format=_FORMATS[spec.dtype],
            blocks=blocks,
            rows=rows,
            columns=columns,
            tokens=token_counts,
            channels=channel_counts,
            valid=has_token[:, :, None] & has_channel[:, None, :],
            groups=has_channel if spec.part == "key" else has_token,
            planes=(has_token[:, ::8, None, None] & has_channel[:, None, None, :]).expand(-1, -1, 8, -1),
            has_channel=has_channel,
        )

    @property
    def over(self) -> int:
        """The dimension of a block that a group runs along."""
        return 1 if self.spec.part == "key" else 2

    def cut(self, tile: Tensor) -> Tensor:
        """``[heads, tokens, head_dim]`` as ``[blocks, rows, columns]``."""
        heads, tokens, dim = self.spec.shape
        down, across = -(-tokens // self.rows), -(-dim // self.columns)
        if (tokens, dim) != (down * self.rows, across * self.columns):
            padded = tile.new_zeros(heads, down * self.rows, across * self.columns)
            padded[:, :tokens, :dim] = tile
            tile = padded
        parts = tile.reshape(heads, down, self.rows, across, self.columns).permute(0, 1, 3, 2, 4)
        return parts.reshape(self.blocks, self.rows, self.columns)

    def join(self, blocks: Tensor) -> Tensor:
        """The reverse."""
        heads, tokens, dim = self.spec.shape
        down, across = -(-tokens // self.rows), -(-dim // self.columns)
        parts = blocks.reshape(heads, down, across, self.rows, self.columns).permute(0, 1, 3, 2, 4)
        return parts.reshape(heads, down * self.rows, across * self.columns)[:, :tokens, :dim]

    def of_channels(self, table: Tensor) -> Tensor:
        """``[heads, head_dim]`` as ``[blocks, columns]``, with zeros beside the tile."""
        heads, tokens, dim = self.spec.shape
        down, across = -(-tokens // self.rows), -(-dim // self.columns)
        padded = table.new_zeros(heads, 1, across * self.columns)
        padded[:, 0, :dim] = table
        return padded.expand(-1, down, -1).reshape(self.blocks, self.columns)

    def spread(self, of_groups: Tensor) -> Tensor:
        """``[blocks, n]`` of groups, to go with values."""
        return of_groups.unsqueeze(self.over)


# --- section 4: widths


@dataclass(frozen=True, slots=True)
class _Widths:
    """Of groups, ``[blocks, n]``: R, o and the anchor's lowest integer.

    ``channels``: the widths, ``[blocks, columns]``. ``anchor``: which plane bytes are in level 0.
    """

    steps: Tensor
    offset: Tensor
    base: Tensor
    anchor: Tensor
    channels: Tensor

    @classmethod
    def of(cls, grid: _Grid, bits: Tensor) -> _Widths:
        """From widths ``[heads, head_dim]``."""
        channels = grid.of_channels(bits)
        key = grid.spec.part == "key"
        table = [(254, 0, 127), (254, 0, 64), (211, 22, 10) if key else (230, 12, 19)]
        table += [((2**b - 1) * 2 ** (8 - b), 2 ** (7 - b), 0) for b in (3, 4, 5, 6)]
        table += [(253, 1, 0), (254, 0, 0)]
        of_groups = channels if key else channels[:, :1].expand(-1, grid.rows)
        steps, offset, base = torch.tensor(table, dtype=torch.int32, device=bits.device)[of_groups.long()].unbind(-1)
        plane = torch.arange(8, device=bits.device)[None, None, :, None]
        anchor = (plane < channels[:, None, None, :]) & grid.planes
        return cls(steps, offset, base, anchor, channels)


class _Tables(NamedTuple):
    """What is known of a tile's channels; exponents and biases as ``[blocks, 1, columns]``."""

    widths: _Widths
    exponents: Tensor | None
    biases: Tensor | None


def _ranges(grid: _Grid, block: Tensor) -> Tensor:
    """Section 4.1, ``[heads, head_dim]``."""
    return _mean_spread(grid, block, _ceil_word8(*_span(grid.format, *_extremes(block, grid.valid, 1))))


def _sizes(grid: _Grid, block: Tensor) -> Tensor:
    """Section 4.1, ``[heads, head_dim]``."""
    return _mean_spread(grid, block, _ceil_word8(*_integers(grid.format, (block & 0x7FFF).amax(1))))


def _mean_spread(grid: _Grid, block: Tensor, words: Tensor) -> Tensor:
    heads, tokens, dim = grid.spec.shape
    good = ~((block & 0x7FFF) >= grid.format.special).any(1)
    down = -(-tokens // grid.rows)
    counted = words.clamp(min=_LEAST_SPREAD).masked_fill(~good, 0)
    total = counted.reshape(heads, down, -1).sum(1)[:, :dim]
    count = good.reshape(heads, down, -1).sum(1)[:, :dim]
    return torch.where(count == 0, _LEAST_SPREAD, total // count.clamp(min=1))


def _widths_by_range(ranges: Tensor, sizes: Tensor, mean: float) -> Tensor:
    """Section 4.2, ``[heads, head_dim]``. A channel's gains fall, so the largest of all are a prefix of each's."""
    weights = (2 * (ranges + sizes) + 3 * sizes.roll(sizes.shape[1] // 2, 1)) >> 2
    gains = weights.reshape(-1, 1) + torch.tensor(_GAINS, device=weights.device)
    chosen = torch.zeros_like(gains.reshape(-1))
    chosen[torch.sort(-gains.reshape(-1), stable=True).indices[: int(mean * weights.numel())]] = 1
    return chosen.reshape(*weights.shape, -1).sum(2).to(torch.int32)


def _exponents(sizes: Tensor) -> Tensor:
    """Section 4.3, ``[heads, head_dim]``."""
    mean = sizes.sum(1, keepdim=True) // sizes.shape[1]
    return ((sizes - mean + 64) >> 7).clamp(-8, 7).to(torch.int32)


def _biases(grid: _Grid, block: Tensor) -> Tensor:
    """Section 6.1, ``[heads, head_dim]``."""
    heads, tokens, dim = grid.spec.shape
    negative = ((block >= 0x8000) & grid.valid).sum(1).reshape(heads, -(-tokens // grid.rows), -1).sum(1)[:, :dim]
    excess = tokens - 2 * negative
    return ((30 * excess + tokens) // (2 * tokens)).clamp(-8, 7).to(torch.int32)


def _moved(block: Tensor, exponents: Tensor) -> Tensor:
    """Section 4.3: words divided by powers of two."""
    magnitude = block & 0x7FFF
    to = torch.remainder(magnitude - _MOVED.start - 128 * exponents, len(_MOVED)) + _MOVED.start
    inside = (magnitude >= _MOVED.start) & (magnitude < _MOVED.stop)
    return torch.where(inside, to, magnitude) | block & 0x8000


def _nibbles(table: Tensor) -> Tensor:
    values = torch.cat([table.reshape(-1), table.new_zeros(table.numel() % 2)]).reshape(-1, 2)
    return (values[:, 0] | values[:, 1] << 4).to(torch.uint8)


# --- section 5: scale, zero point, code


class _Params(NamedTuple):
    """Of groups, ``[blocks, n]``: s as a bfloat16 word, z, and constant groups with their words. Int32."""

    s: Tensor
    z: Tensor
    constant: Tensor
    word: Tensor

    def scale(self) -> Tensor:
        """s as a number."""
        return (self.s << 16).view(torch.float32)


class _Tile(NamedTuple):
    """All that says what a tile's codes mean."""

    grid: _Grid
    tables: _Tables
    params: _Params

    @property
    def widths(self) -> _Widths:
        return self.tables.widths


def _value(form: _Format, magnitude: Tensor) -> Tensor:
    """Magnitude words as binary32; subnormals of bfloat16 may count as 0."""
    if form.fraction == 7:
        return (magnitude << 16).view(torch.float32)
    infinite = magnitude >= form.special
    number = ((magnitude << 13) + 0x38000000).masked_fill(infinite, 0x7F800000).view(torch.float32)
    return torch.where(magnitude < 0x400, magnitude.to(torch.float32) * 2.0**-24, number)


def _integers(form: _Format, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude words as integers times powers of two, in int64."""
    magnitude = magnitude.to(torch.int64)
    field = magnitude >> form.fraction
    lead = (field > 0).to(torch.int64) << form.fraction
    return (magnitude & ((1 << form.fraction) - 1)) | lead, field.clamp(min=1) - form.bias


def _to_binary32(number: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """number * 2^exponent with 24 significant bits, all used: nearest, ties to even."""
    length = _bit_length(number)
    down = (length - 24).clamp(min=0)
    half = (torch.ones_like(number) << down) >> 1
    kept = number >> down
    rest = number - (kept << down)
    up = (rest > half) | ((rest == half) & (half > 0) & (kept & 1 > 0))
    short = (24 - length).clamp(min=0)
    return (kept + up.to(torch.int64)) << short, exponent + down - short


def _ceil_word8(number: Tensor, exponent: Tensor) -> Tensor:
    """The least bfloat16 word not below number * 2^exponent; less than any scale for what is too small for a word."""
    length = _bit_length(number)
    down, up = (length - 8).clamp(min=0), (8 - length).clamp(min=0)
    eight = (number + (torch.ones_like(number) << down) - 1) >> down << up
    word = ((exponent + down - up + 133) << 7) + eight  # 134 is what 128 * 2^-126 needs; eight has the leading one
    return word.masked_fill(number == 0, 0).to(torch.int32)


def _extremes(block: Tensor, of: Tensor, over: int) -> tuple[Tensor, Tensor]:
    """Least and largest word among those chosen, along a dimension, -0 below +0; 0 where none is chosen."""
    ordered = torch.where(block >= 0x8000, 0x7FFF - block, block)
    low = ordered.masked_fill(~of, 1 << 20).amin(over)
    high = ordered.masked_fill(~of, -(1 << 20)).amax(over)
    low, high = (extreme.masked_fill(low > high, 0) for extreme in (low, high))
    return torch.where(low < 0, 0x7FFF - low, low), torch.where(high < 0, 0x7FFF - high, high)


def _span(form: _Format, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """high - low of words, rounded to binary32: 24 bits and an exponent."""
    a, a_exponent = _integers(form, high & 0x7FFF)
    b, b_exponent = _integers(form, low & 0x7FFF)
    a, b = torch.where(high >= 0x8000, -a, a), torch.where(low >= 0x8000, -b, b)
    # Numbers that are 2^40 units of the smaller one apart round alike, however far they are.
    near = torch.maximum(a_exponent, b_exponent) - 40
    span = (a << (a_exponent - near).clamp(min=0)) - (b << (b_exponent - near).clamp(min=0))
    return _to_binary32(span, near)


def _step(form: _Format, low: Tensor, high: Tensor, steps: Tensor) -> Tensor:
    """s of groups with these extremes (words), as in binary32 arithmetic with subnormals."""
    span, exponent = _span(form, low, high)
    quotient = (span << 32) // steps
    inexact = (quotient * steps != span << 32).to(torch.int64)
    wide = _ceil_word8(*_to_binary32(quotient << 1 | inexact, exponent - 33))
    number, exponent = _integers(form, torch.maximum(low & 0x7FFF, high & 0x7FFF))
    word = torch.maximum(wide, _ceil_word8(number, exponent - 10)).clamp(min=form.least)
    return (word + 3) >> 2 << 2  # 6 significant bits


def _inverse(scale: Tensor) -> Tensor:
    """What to multiply with instead of dividing by s: a little too large, so that ties do not fall short.

    A quotient that is no tie misses the next one by 2^-19.4 of its size or more; this is off by 2^-21 and what the
    device's reciprocal, product and sum are off.
    """
    return torch.reciprocal(scale) * (1.0 + 2.0**-21)


def _rounded(magnitude: Tensor, inverse: Tensor) -> Tensor:
    """Nearest integers to |x| / s, ties away from zero, at most 4095."""
    return (magnitude * inverse + 0.5).clamp(max=4095.0).to(torch.int32)


def _choose(grid: _Grid, widths: _Widths, block: Tensor) -> tuple[_Params, Tensor]:
    """Parameters of all groups, and ``[blocks]`` whether special words stand outside constant groups."""
    form, over = grid.format, grid.over
    special = ((block & 0x7FFF) >= form.special) & grid.valid
    word, last = _extremes(block, grid.valid, over)
    constant = (word == last) & grid.groups
    outside = special & ~grid.spread(constant)
    low, high = _extremes(block, grid.valid & ~special, over)
    s = _step(form, low, high, widths.steps.to(torch.int64))
    inverse = _inverse((s << 16).view(torch.float32))
    k_low = _rounded(_value(form, low & 0x7FFF), inverse)
    k_high = _rounded(_value(form, high & 0x7FFF), inverse)
    z = torch.where(low >= 0x8000, k_low, -k_low)
    z = torch.where((k_low | k_high) == 0, widths.base, z)
    unused = constant | ~grid.groups
    params = _Params(s.masked_fill(unused, 0), z.masked_fill(unused, 0), constant, word.masked_fill(~constant, 0))
    return params, outside.flatten(1).any(1)


def _quantised(tile: _Tile, block: Tensor) -> Tensor:
    """Codes, uint8; zeros beside the tile."""
    grid, widths, params = tile.grid, tile.widths, tile.params
    magnitude = block & 0x7FFF
    inverse = grid.spread(_inverse(params.scale().masked_fill(params.s == 0, 1.0)))
    k = _rounded(_value(grid.format, magnitude.clamp(max=0x7F80)), inverse)  # NaN counts as infinity
    k = torch.where(block >= 0x8000, -k, k)
    low, high = grid.spread(widths.offset), grid.spread(widths.offset + widths.steps + 1)
    codes = k + grid.spread(params.z + widths.offset)
    codes = torch.minimum(torch.maximum(codes, low), high)
    codes = torch.where(grid.spread(params.constant), low, codes)
    return codes.masked_fill(~grid.valid, 0).to(torch.uint8)


def _check_codes(tile: _Tile, codes: Tensor, coded: Tensor, rest: _Folds, faults: _Faults) -> None:
    """Codes of the blocks that are ``coded`` are in range."""
    grid, widths = tile.grid, tile.widths
    assert rest.section is not None
    steps = codes.to(torch.int32) - grid.spread(widths.offset)
    bad = ((steps < 0) | (steps > grid.spread(widths.steps) + 1)) & grid.valid
    faults.add(rest.section, "a code outside its range", bad.flatten(1).any(1) & coded, rest.starts)


def _dequantised(tile: _Tile, codes: Tensor, *, full: bool) -> Tensor:
    """Words after level 0, or 1 if ``full``."""
    grid, widths, params = tile.grid, tile.widths, tile.params
    integer = codes.to(torch.int32) + grid.spread((-widths.offset if full else widths.base) - params.z)
    bits = (integer.abs().to(torch.float32) * grid.spread(params.scale())).view(torch.int32)
    if grid.format.fraction == 7:
        word = (bits + 0x8000) >> 16
    else:
        bits = bits.clamp(max=0x477FE000)
        tiny = (bits.view(torch.float32) * 2.0**24).clamp(max=1024.0).round().to(torch.int32)
        rebased = bits - 0x38000000
        word = torch.where(bits < 0x38800000, tiny, (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13)
    word = torch.where(integer < 0, word | 0x8000, word)
    return torch.where(grid.spread(params.constant), grid.spread(params.word), word)


def _to_int16(word: Tensor) -> Tensor:
    return (word - (word >> 15 << 16)).to(torch.int16)


# --- section 6: planes


def _pack(codes: Tensor) -> Tensor:
    """Codes ``[blocks, rows, columns]`` as bytes of planes ``[blocks, octets, 8, columns]``."""
    blocks, rows, columns = codes.shape
    octets = codes.reshape(blocks, rows // 8, 8, columns).transpose(2, 3)
    return transpose_bits(octets).flip(3).transpose(2, 3)


# --- section 6.1: folding


def _folding(grid: _Grid, widths: _Widths, section: int) -> Tensor:
    """Which channels fold in a section, ``[blocks, columns]``."""
    if section == _ANCHOR:
        return widths.channels >= 2
    return (widths.channels < 2) & grid.has_channel & (grid.spec.part == "key")


def _planes_of(grid: _Grid, widths: _Widths, section: int) -> Tensor:
    """Which plane bytes are in a section."""
    return widths.anchor if section == _ANCHOR else ~widths.anchor & grid.planes


def _zero(tile: _Tile) -> Tensor:
    """Where zero lies among the codes of values, to go with ``[blocks, rows, columns]``."""
    grid, tables, params = tile.grid, tile.tables, tile.params
    zero = grid.spread(params.z + tables.widths.offset)
    return zero + (0 if tables.biases is None else 4 * tables.biases)


def _fold_order(grid: _Grid, values: Tensor) -> Tensor:
    """``[blocks, rows, columns]`` in the order of the fold's streams: ``[blocks, octets * columns * 8]``."""
    octets = values.reshape(grid.blocks, grid.rows // 8, 8, grid.columns)
    return octets.transpose(2, 3).reshape(grid.blocks, -1)


def _row_order(grid: _Grid, values: Tensor) -> Tensor:
    """The reverse."""
    octets = values.reshape(grid.blocks, grid.rows // 8, grid.columns, 8)
    return octets.transpose(2, 3).reshape(grid.blocks, grid.rows, grid.columns)


@dataclass(frozen=True, slots=True)
class _Folds:
    """A section of planes, ``[blocks]`` each: entries of its fold table, sizes in bytes, and where blocks start."""

    number: int
    section: _Section | None
    folded: Tensor
    entry: Tensor
    planes: Tensor
    streams: Tensor
    starts: Tensor
    mask: Tensor  # plane bytes that are there

    @classmethod
    def of(cls, grid: _Grid, widths: _Widths, number: int, entry: Tensor, section: _Section | None = None) -> _Folds:
        folded = entry != _FLAT
        plane = torch.arange(8, device=entry.device)[None, None, :, None]
        last = widths.channels.clamp(max=3) - 1 if number == _ANCHOR else torch.full_like(widths.channels, 2)
        last = last.masked_fill(~(_folding(grid, widths, number) & folded[:, None]), -1)
        mask = _planes_of(grid, widths, number) & (plane != last[:, None, None, :])
        planes, streams = mask.flatten(1).sum(1), (entry & _SIZE).masked_fill(~folded, 0)
        return cls(number, section, folded, entry, planes, streams, _starts(planes + streams), mask)

    def plane_places(self) -> Tensor:
        """Where each plane byte is in the section."""
        before = _starts(self.streams)[:-1].repeat_interleave(self.planes)
        return torch.arange(before.numel(), device=before.device) + before

    def stream_places(self) -> Tensor:
        """Where each byte of streams is."""
        before = _starts(self.planes)[1:].repeat_interleave(self.streams)
        return torch.arange(before.numel(), device=before.device) + before


class _Pairs(NamedTuple):
    """A stream of each block in pairs: x and y of its halves as ``[blocks, n]`` booleans, and which are there."""

    there: Tensor
    x: Tensor
    y: Tensor
    half: Tensor

    def places(self) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """(place, is there, bit) of the three parts, and ``[blocks]`` bits of all."""
        either = self.x | self.y
        x_at, x_count = _before(either.to(torch.int32))
        y_at, y_count = _before(self.x.to(torch.int32))
        index = torch.arange(either.shape[1], device=either.device).expand_as(either)
        x_base, y_base = self.half[:, None], (self.half + x_count)[:, None]
        parts = [(index, self.there, either), (x_base + x_at, either, self.x), (y_base + y_at, self.x, self.y)]
        return parts, self.half + x_count + y_count


def _sequences(chosen: Tensor, at: Tensor, bits: Tensor) -> Tensor:
    """The bits that are chosen at the start of each block's row, in order, with zeros behind."""
    rows = torch.zeros(bits.shape[0], bits.shape[1] + 2, dtype=torch.bool, device=bits.device)
    mine = chosen.nonzero(as_tuple=True)
    rows[mine[0], at[mine].long()] = bits[mine]
    return rows


def _paired(rows: Tensor, count: Tensor) -> _Pairs:
    """Streams of ``count`` bits, in pairs."""
    half = (count + 1) // 2
    index = torch.arange(rows.shape[1] // 2, device=rows.device).expand(rows.shape[0], -1)
    there = index < half[:, None]
    x = rows[:, : index.shape[1]] & there
    y = rows.gather(1, (half[:, None] + index).clamp(max=rows.shape[1] - 1)) & there
    return _Pairs(there, x, y, half)


def _unpaired(reader: _Reader, base: Tensor, count: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The reverse: streams as rows, and the bits that the pairs take. ``base``: the first bit, ``[blocks, 1]``."""
    half = (count + 1) // 2
    index = torch.arange(columns // 2, device=count.device).expand(count.numel(), -1)
    there = index < half[:, None]
    either = (reader.get(base + index, 1) > 0) & there
    x_at, x_count = _before(either.to(torch.int32))
    x = (reader.get(base + half[:, None] + x_at, 1) > 0) & either
    y_at, y_count = _before(x.to(torch.int32))
    y = either & (~x | (reader.get(base + (half + x_count)[:, None] + y_at, 1) > 0))
    rows = torch.zeros(count.numel(), columns + 2, dtype=torch.bool, device=count.device)
    rows[:, : columns // 2] = x
    mine = (there & (half[:, None] + index < count[:, None])).nonzero(as_tuple=True)
    rows[mine[0], (half[:, None] + index)[mine].long()] = y[mine]
    return rows, half + x_count + y_count


def _distances(tile: _Tile, codes: Tensor) -> tuple[Tensor, Tensor]:
    """d and v (of 3 bits around the centre) of all values, to go with ``[blocks, rows, columns]``."""
    grid, widths, code = tile.grid, tile.widths, codes.to(torch.int32)
    likely: tuple[tuple[int, ...], ...]
    if grid.spec.part == "value":
        zero = _zero(tile)
        centre, case = ((zero + 16) >> 5).clamp(1, 7), (zero >> 5).clamp(1, 6) - 1
        likely = _NEAREST
    else:
        before = torch.cat([torch.full_like(code[:, :1], 96), code[:, :-1]], 1)  # 96: the first token's centre is 4
        centre = (2 + (((before >> 5) + 1) >> 1)).masked_fill(widths.channels[:, None, :] == 1, 4)
        case, likely = before >> 7, _LIKELY
    v = ((code >> 5) - centre + 4) & 7
    places = torch.tensor([[row.index(top) for top in range(4)] for row in likely], device=codes.device)
    two = widths.channels[:, None, :] == 2
    return torch.where(two, places[case, code >> 6], torch.where(v >= 4, v - 4, 3 - v)), v


def _write_folded(tile: _Tile, codes: Tensor, number: int) -> list[Tensor]:
    """Fold table, section."""
    grid, widths, code = tile.grid, tile.widths, codes.to(torch.int32)
    distance, v = _distances(tile, codes)
    folds = _folding(grid, widths, number)[:, None, :] & grid.valid
    entry = torch.zeros(grid.blocks, dtype=torch.int64, device=codes.device)
    parts, sizes = [], []  # by stream: (place, is there, bit)
    chosen = _fold_order(grid, (distance > 0) & folds)
    for i in (0, 1):
        bits = _fold_order(grid, (distance > i + 1) & folds)
        at, count = _before(chosen.to(torch.int32))
        in_pairs, pairs_count = _paired(_sequences(chosen, at, bits), count).places()
        paired = pairs_count < count
        parts.append([(at, chosen & ~paired[:, None], bits)])
        parts[i] += [(place, there & paired[:, None], bit) for place, there, bit in in_pairs]
        sizes.append((torch.where(paired, pairs_count, count) + 7) // 8)
        entry += paired.to(torch.int64) << _PAIRED + i
        chosen = bits
    octets = (grid.tokens + 7) // 8
    saved = octets * _folding(grid, widths, number).sum(1) - sizes[0] - sizes[1]
    entry = (entry + sizes[0] + sizes[1]).masked_fill(saved <= 0, _FLAT)
    layout = _Folds.of(grid, widths, number, entry)

    starts = _starts(layout.streams)
    writer = _Writer(int(starts[-1]), codes.device)
    for i, base in enumerate((torch.zeros_like(sizes[0]), sizes[0])):
        for at, there, bit in parts[i]:
            mine = (there & layout.folded[:, None]).nonzero(as_tuple=True)
            writer.put(((8 * (starts[:-1] + base))[:, None] + at)[mine], bit[mine])
    near = (distance > 0).to(torch.int32)
    channels = widths.channels[:, None, :]
    sign = torch.where(channels == 1, code >> 7, v >> 2)  # of 1 bit: the anchor's
    centred = torch.where(channels == 2, near << 7 | code & 63, sign << 7 | near << 6 | code & 31).to(torch.uint8)
    centred = torch.where(folds & layout.folded[:, None, None], centred, codes)
    section = torch.empty(int(layout.starts[-1]), dtype=torch.uint8, device=codes.device)
    section[layout.plane_places()] = _pack(centred)[layout.mask]
    section[layout.stream_places()] = writer.bytes()
    return [torch.stack([entry & 255, entry >> 8], 1).to(torch.uint8).reshape(-1), section]


def _plane_sizes(  # noqa: PLR0917 - of one kind each
    grid: _Grid, widths: _Widths, number: int, table: _Section | None, section: _Section, faults: _Faults
) -> _Folds:
    if table is None:
        return _Folds.of(grid, widths, number, torch.full_like(grid.tokens, _FLAT), section)
    pairs = table.data.reshape(-1, 2).to(torch.int64)
    layout = _Folds.of(grid, widths, number, pairs[:, 0] | pairs[:, 1] << 8, section)
    grows = layout.planes + layout.streams >= _planes_of(grid, widths, number).flatten(1).sum(1)
    bad = layout.folded & (grows | (layout.entry >> 15 > 0))
    faults.add(section, "a block that folding does not make smaller", bad, layout.starts)
    faults.add_total(section, layout.starts)
    return layout


def _unpack_folded(tile: _Tile, layouts: list[_Folds], coded: Tensor, faults: _Faults) -> Tensor:
    """Codes from the sections that are there, with zeros for the planes of others."""
    grid, widths = tile.grid, tile.widths
    planes = torch.zeros(grid.planes.shape, dtype=torch.uint8, device=coded.device)
    for layout in layouts:
        assert layout.section is not None
        planes.masked_scatter_(layout.mask, layout.section.data[layout.plane_places()])
    octets = transpose_bits(planes.transpose(2, 3).flip(3))
    codes = octets.transpose(2, 3).reshape(grid.blocks, grid.rows, grid.columns)
    code = codes.to(torch.int32)
    all_folds = torch.zeros_like(grid.valid)
    distance = torch.zeros_like(code)
    for layout in layouts:
        assert layout.section is not None
        folds = _folding(grid, widths, layout.number)[:, None, :] & grid.valid & layout.folded[:, None, None]
        all_folds |= folds
        if not bool(folds.any()):
            continue
        near = torch.where(widths.channels[:, None, :] == 2, code >> 7, code >> 6 & 1)
        reader = _Reader(layout.section.data)
        base = (8 * (layout.starts[:-1] + layout.planes))[:, None]
        chosen = _fold_order(grid, folds & (near > 0))
        found, total = chosen.to(torch.int32), torch.zeros_like(layout.streams)
        for i in (0, 1):
            at, count = _before(chosen.to(torch.int32))
            paired = (layout.entry >> _PAIRED + i & 1) > 0
            rows, bits = _unpaired(reader, base, count, chosen.shape[1])
            plain = reader.get(base + at, 1) > 0
            bit = torch.where(paired[:, None], rows.gather(1, at.long()), plain) & chosen
            size = (torch.where(paired, bits, count) + 7) // 8
            base, total, chosen = base + 8 * size[:, None], total + size, bit
            found += bit
        bad = (total != layout.streams) & layout.folded & coded
        faults.add(layout.section, "folded planes whose sizes do not match", bad, layout.starts)
        distance += _row_order(grid, found)
    return _uncentred(tile, code, distance, all_folds).to(torch.uint8)


def _next_tops() -> list[int]:
    """What top bits come after each of the 8, 3 bits each: for every v, every d of 2 bits, every v of 1 bit."""
    after = [[(v + ((top + 1) >> 1) - 2) & 7 for top in range(8)] for v in range(8)]
    after += [[_LIKELY[top >> 2][d] << 1 for top in range(8)] for d in range(4)]
    after += [[v] * 8 for v in range(8)]
    return [sum(then << 3 * top for top, then in enumerate(row)) for row in after]


def _uncentred(tile: _Tile, code: Tensor, distance: Tensor, folds: Tensor) -> Tensor:
    """Codes with the top bits of folded values in place."""
    grid, device = tile.grid, code.device
    channels = tile.widths.channels[:, None, :]
    two = channels == 2
    v = torch.where(code >= 128, 4 + distance, 3 - distance)
    if grid.spec.part == "value":
        zero = _zero(tile)
        tops = torch.tensor(_NEAREST, dtype=torch.int32, device=device)
        nearest = tops[((zero >> 5).clamp(1, 6) - 1).expand_as(code), distance] << 1
        top = torch.where(two, nearest, (v + ((zero + 16) >> 5).clamp(1, 7) - 4) & 7)
    else:  # a token's top bits depend on those before: one look into a table each
        row = torch.where(two, 8 + distance, torch.where(channels == 1, 12 + v, v))
        after = torch.tensor(_next_tops(), dtype=torch.int32, device=device)[row]
        steps = [torch.full_like(after[:, 0], 3)]
        for step in after.unbind(1):
            steps.append(step >> 3 * steps[-1] & 7)
        top = torch.stack(steps[1:], 1)
    low = code & torch.where(two, 63, 31)
    return torch.where(folds, low | top << 5, code)


# --- section 7: parameters


def _write_params(grid: _Grid, params: _Params) -> list[Tensor]:
    """Headers, parameters."""
    used, many = grid.groups, 1 << 20
    has_constant = params.constant.any(1)
    s_low = params.s.masked_fill(~used, many).amin(1)
    z_low = params.z.masked_fill(~used, many).amin(1)
    s_bits = _bit_length((params.s.masked_fill(~used, 0).amax(1) - s_low) >> 2)
    z_bits = _bit_length(params.z.masked_fill(~used, -many).amax(1) - z_low)
    plain = (params.s - s_low[:, None]).long() >> 2 | (params.z - z_low[:, None]).long() << s_bits[:, None].long()
    full = params.s.long() | torch.where(params.constant, params.word, params.z & 0xFFFF).long() << 16
    fields = torch.where(has_constant[:, None], full, plain).masked_fill(~used, 0)
    s_low, z_low = s_low.masked_fill(has_constant, 0), z_low.masked_fill(has_constant, 0)
    s_bits, z_bits = s_bits.masked_fill(has_constant, _FULL), z_bits.masked_fill(has_constant, _FULL)
    header = torch.stack([s_low & 255, s_low >> 8, z_low & 255, z_low >> 8 & 255, s_bits, z_bits], 1)
    bits = torch.where(has_constant, 32, s_bits + z_bits)
    starts = _starts((bits * used.sum(1) + 7) // 8)
    writer = _Writer(int(starts[-1]), fields.device)
    writer.put(8 * starts[:-1, None] + bits[:, None] * (used.cumsum(1) - used.long()), fields)
    return [header.to(torch.uint8).reshape(-1), writer.bytes()]


class _ParamSizes(NamedTuple):
    """What parameter headers say, ``[blocks]`` each; ``starts`` has the end as well."""

    s_low: Tensor
    z_low: Tensor
    s_bits: Tensor
    z_bits: Tensor
    full: Tensor
    starts: Tensor


def _param_sizes(grid: _Grid, headers: _Section, params: _Section, faults: _Faults) -> _ParamSizes:
    b = headers.data.reshape(-1, _PARAM_HEADER).to(torch.int32)
    s_low, z_low, s_bits, z_bits = b[:, 0] | b[:, 1] << 8, b[:, 2] | b[:, 3] << 8, b[:, 4], b[:, 5]
    z_low = z_low - (z_low >> 15 << 16)
    full = (s_bits == _FULL) & (z_bits == _FULL)
    bad = ~full & ((s_bits > 13) | (z_bits > 12))
    s_bits, z_bits = s_bits.masked_fill(full, 16), z_bits.masked_fill(full, 16)
    starts = _starts(((s_bits + z_bits) * grid.groups.sum(1) + 7) // 8)
    faults.add(params, "a width of parameters outside its range", bad, starts)
    faults.add_total(params, starts)
    return _ParamSizes(s_low, z_low, s_bits, z_bits, full, starts)


def _read_params(grid: _Grid, sizes: _ParamSizes, section: _Section, faults: _Faults) -> _Params:
    used, full = grid.groups, sizes.full[:, None]
    bits = (sizes.s_bits + sizes.z_bits)[:, None]
    at = 8 * sizes.starts[:-1, None] + bits * (used.cumsum(1) - used.long())
    fields = _Reader(section.data).get(at, bits)
    s_bits = sizes.s_bits[:, None]
    s = (fields & ((1 << s_bits.long()) - 1)).to(torch.int32)
    z = (fields >> s_bits).to(torch.int32)
    constant = full & (s == 0) & used
    word = z.masked_fill(~constant, 0)
    s = torch.where(full, s, 4 * s) + sizes.s_low[:, None]
    z = torch.where(full, z - (z >> 15 << 16), z) + sizes.z_low[:, None]
    form = grid.format
    good = (s >= form.least) & (s <= form.largest) & (z >= -_MAX_ZERO_POINT) & (z <= _MAX_ZERO_POINT)
    bad = (used & ~constant & ~good).any(1) | (sizes.full & ((sizes.s_low != 0) | (sizes.z_low != 0)))
    faults.add(section, "a scale or zero point outside its range", bad, sizes.starts)
    unused = constant | ~used | ~good
    return _Params(s.masked_fill(unused, 0), z.masked_fill(unused, 0), constant, word)


# --- section 8: ranks


def _ceil_word(form: _Format, x: Tensor) -> Tensor:
    """The smallest magnitude word not below x."""
    bits = x.view(torch.int32)
    if form.fraction == 7:
        return (bits >> 16) + (bits & 0xFFFF > 0).to(torch.int32)
    tiny = (x.clamp(max=1.0) * 2.0**24).ceil().to(torch.int32)
    return torch.where(bits < 0x38800000, tiny, (bits - 0x38000000 + 0x1FFF >> 13).clamp(max=0x7C00))


class _Cells(NamedTuple):
    """Where each value's word lies: k, the cell's least magnitude word, how many, and v. Zero cells: low = top + 1."""

    k: Tensor
    low: Tensor
    size: Tensor
    bits: Tensor
    ranked: Tensor  # values of streams A and B
    zero: Tensor  # values of zero cells


def _cells(tile: _Tile, codes: Tensor, coded: Tensor) -> _Cells:
    """Cells of the blocks that are ``coded``."""
    grid, widths, params = tile.grid, tile.widths, tile.params
    k = codes.to(torch.int32) - grid.spread(widths.offset + params.z)
    twice, half = 2 * k.abs(), grid.spread(params.scale() * 0.5)
    low = _ceil_word(grid.format, (twice - 1).abs().to(torch.float32) * half)
    count = _ceil_word(grid.format, (twice + 1).to(torch.float32) * half) - low
    live = grid.valid & ~grid.spread(params.constant) & coded[:, None, None]
    bits = _floor_log2(count.clamp(1, 2047))
    return _Cells(k, low, count, bits, live & (k != 0), live & (k == 0))


class _Streams(NamedTuple):
    """Where blocks' streams are, ``[blocks]`` each in bytes; ``starts`` has the end as well."""

    a: Tensor
    more: Tensor
    raw: Tensor
    starts: Tensor

    @classmethod
    def of(cls, grid: _Grid, a: Tensor, more: Tensor, raw: Tensor) -> _Streams:
        """From the sizes of A, and of B, W and X together."""
        return cls(a, more, raw, _starts(torch.where(raw, 2 * grid.tokens * grid.channels, a + more)))

    def bit(self, before: Tensor) -> Tensor:
        """The first bit of each block's stream that has these streams before it, to go with flattened values."""
        return 8 * (self.starts[:-1] + before)[:, None]


def _raw_places(grid: _Grid, starts: Tensor, chosen: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Which values are ``chosen`` blocks' ones, and the bits where their words are."""
    row = torch.arange(grid.rows, device=chosen.device)[:, None]
    column = torch.arange(grid.columns, device=chosen.device)
    mine = (grid.valid & chosen[:, None, None]).nonzero(as_tuple=True)
    place = row * grid.channels[:, None, None] + column
    return mine, (8 * starts[:-1, None, None] + 16 * place)[mine]


def _write_ranks(tile: _Tile, block: Tensor, source: Tensor, codes: Tensor, special: Tensor) -> list[Tensor]:
    """Table, ranks; ``source`` is what raw blocks hold."""
    grid = tile.grid
    cells = _cells(tile, codes, ~special)
    magnitude = block & 0x7FFF
    bits = cells.bits.masked_fill(~cells.ranked, 0).flatten(1)
    rank = (magnitude - cells.low).flatten(1)
    one = torch.ones_like(bits)
    field = rank & ((one << bits) - 1)
    more = cells.ranked.flatten(1) & (field < cells.size.flatten(1) - (one << bits))
    zero = cells.zero.flatten(1)
    if grid.format.fraction == 7:
        depth = (cells.low - 1 - magnitude).flatten(1)
        is_zero = (magnitude == 0).flatten(1)
        escaped = zero & ~is_zero & (depth >= _ZERO)
        packed = zero
    else:
        escaped, packed = zero, torch.zeros_like(zero)

    a_at, a_bits = _before(bits)
    b_at, b_bits = _before(more.to(torch.int32))
    w_at, w_count = _before(packed.to(torch.int32))
    x_at, x_count = _before(escaped.to(torch.int32))
    sizes = [(a_bits + 7) // 8, (b_bits + 7) // 8, (12 * w_count + 7) // 8, 2 * x_count]
    raw = special | (sum(sizes) >= 2 * grid.tokens * grid.channels)
    a, b, w, x = (size.masked_fill(raw, 0) for size in sizes)
    streams = _Streams.of(grid, a, b + w + x, raw)
    coded = ~raw[:, None]
    writer = _Writer(int(streams.starts[-1]), block.device)

    # Neighbours' fields of A are joined to one: there are many, and they are short.
    field, bits = field.masked_fill(~(cells.ranked.flatten(1) & coded), 0).long(), bits.long()
    count = 4 if grid.format.rank_bits <= 8 else 2
    field, length = field.reshape(grid.blocks, -1, count), bits.reshape(grid.blocks, -1, count)
    joined = (field << (length.cumsum(2) - length)).sum(2)
    writer.put(streams.bit(torch.zeros_like(a)) + a_at[:, ::count], joined.masked_fill(raw[:, None], 0))

    def put(base: Tensor, at: Tensor, chosen: Tensor, fields: Tensor) -> None:
        mine = (chosen & coded).nonzero(as_tuple=True)
        writer.put((streams.bit(base) + at)[mine], fields[mine])

    put(a, b_at, more, rank >> bits)
    word = block.flatten(1)
    if grid.format.fraction == 7:
        code = torch.where(is_zero, _ZERO, torch.where(escaped, _ESCAPE, depth))
        put(a + b, 12 * w_at, packed, code | word >> 15 << 11)
    put(a + b + w, 16 * x_at, escaped, word)
    mine, at = _raw_places(grid, streams.starts, raw)
    writer.put(at, source[mine])

    entries = torch.stack([a.masked_fill(raw, _RAW), b + w + x], 1).to(torch.int32)
    table = torch.stack([entries & 255, entries >> 8], 2).to(torch.uint8).reshape(-1)
    return [table, writer.bytes()]


def _rank_sizes(grid: _Grid, table: _Section, ranks: _Section, faults: _Faults) -> _Streams:
    pairs = table.data.reshape(-1, 2, 2).to(torch.int64)
    a, more = (pairs[..., 0] | pairs[..., 1] << 8).unbind(1)
    raw = a == _RAW
    bad = torch.where(raw, more > 0, a + more >= 2 * grid.tokens * grid.channels)
    streams = _Streams.of(grid, a, more, raw)
    faults.add(ranks, "sizes that cannot be", bad, streams.starts)
    faults.add_total(ranks, streams.starts)
    return streams


def _read_ranks(tile: _Tile, codes: Tensor, streams: _Streams, section: _Section, faults: _Faults) -> Tensor:
    """Exact words; those of raw blocks mean nothing."""
    grid, params = tile.grid, tile.params
    cells = _cells(tile, codes, ~streams.raw)
    reader = _Reader(section.data)
    ranked, zero = cells.ranked.flatten(1), cells.zero.flatten(1)
    count, low = cells.size.flatten(1), cells.low.flatten(1)
    bad = (ranked & (count <= 0)).any(1)

    bits = cells.bits.flatten(1).masked_fill(~ranked, 0)
    at, a_bits = _before(bits)
    rank = reader.get(streams.bit(torch.zeros_like(streams.a)) + at, bits.long()).to(torch.int32)
    top = torch.ones_like(bits) << bits
    more = ranked & (rank < count - top)
    at, b_bits = _before(more.to(torch.int32))
    mine = more.nonzero(as_tuple=True)
    upper = reader.get((streams.bit(streams.a) + at)[mine], 1).to(torch.int32)
    rank[mine] += upper * top[mine]
    word = low + rank + ((cells.k < 0).to(torch.int32) << 15).flatten(1)
    a, b = streams.a, (b_bits + 7) // 8

    escaped, w_count = zero, torch.zeros_like(a_bits)
    if grid.format.fraction == 7:
        at, w_count = _before(zero.to(torch.int32))
        mine = zero.nonzero(as_tuple=True)
        field = reader.get((streams.bit(a + b) + 12 * at)[mine], 12).to(torch.int32)
        code, top = field & 2047, low[mine] - 1
        bad[mine[0][(code < _ZERO) & (code >= top)]] = True
        word[mine] = torch.where(code == _ZERO, 0, top - code) | field >> 11 << 15
        escaped = torch.zeros_like(zero)
        escaped[mine] = code == _ESCAPE
    at, x_count = _before(escaped.to(torch.int32))
    mine = escaped.nonzero(as_tuple=True)
    w = (12 * w_count + 7) // 8
    word[mine] = reader.get((streams.bit(a + b + w) + 16 * at)[mine], 16).to(torch.int32)

    bad |= ((a_bits + 7) // 8 != a) | (b + w + 2 * x_count != streams.more)
    what = "a rank outside its cell, or streams that the codes do not call for"
    faults.add(section, what, bad & ~streams.raw, streams.starts)
    return torch.where(grid.spread(params.constant), grid.spread(params.word), word.reshape(grid.valid.shape))
