"""``hq``: hierarchical group quantisation in nested levels, exact at the end. spec/codec-hq.md.

Level 0 is a low-bit anchor with group parameters, level 1 the rest of an 8-bit code, level 2 each word's rank among
the words that share that code. Nothing is sent twice.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import ChunkSpec, as_words
from lynxproto.codecs._library import address, error_text, ffi, lib, parallel, scratch
from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.errors import CodecError, ConfigError, PayloadError, SpecError

__all__ = ["HQ"]

_HEADER: Final = struct.Struct("<BBHI")  # mode, level, reserved, bytes of the section of variable size
_CODED: Final = 0
_STORED: Final = 1
_DTYPES: Final = {"bfloat16": lib.LYNX_BFLOAT16, "float16": lib.LYNX_FLOAT16}
_PARTS: Final = {"key": lib.LYNX_KEY, "value": lib.LYNX_VALUE}
_MAX_BYTES: Final = 1 << 31  # of a tile: sizes in payloads have 32 bits
_SECTIONS: Final = ("parameters", "codes", "ranks")


@dataclass(frozen=True, slots=True)
class _Tile:
    """The C structures of one tile, and what keeps their memory alive."""

    c: Any
    sizes: Any
    widths: NDArray[np.uint8]


class _Encoder:
    """One call of encode: the levels' buffers, which the kernels fill in place where sizes are known beforehand."""

    def __init__(self, tile: _Tile, levels: int, wanted: Collection[int], *, rank: bool) -> None:
        sizes = self.sizes = tile.sizes
        self.levels, self.tile = levels, tile
        self.has_anchor, self.has_rest, self.has_rank = 0 in wanted, 1 in wanted and levels > 1, rank
        self.planes = sizes.anchor if self.has_anchor else 0
        self.header_bytes = lib.LYNX_HQ_PARAM_HEADER * sizes.blocks
        # Level 0: header, planes, parameter headers, parameters. Without planes nobody sees it, but its size counts.
        self.first = np.empty(_HEADER.size + self.planes + self.header_bytes + sizes.max_params, np.uint8)
        self.rest = np.empty(_HEADER.size + sizes.rest if self.has_rest else 0, np.uint8)
        self.table = np.empty(lib.LYNX_HQ_RANK_HEADER * sizes.blocks if rank else 0, np.uint8)
        self.params: list[NDArray[np.uint8]] = []
        self.ranks: list[NDArray[np.uint8]] = []
        self.rank_bound = 0  # bytes of table and ranks; without them, what they take at most

    def run(self, words: NDArray[Any], threads: int) -> None:
        """Encode all blocks."""
        head_stride, token_stride = _strides(words)

        def work(first: int, last: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
            before, own = ffi.new("lynx_hq_sizes *"), ffi.new("lynx_hq_sizes *")
            lib.lynx_hq_measure_range(self.tile.c, 0, first, before)
            lib.lynx_hq_measure_range(self.tile.c, first, last, own)
            params = np.empty(own.max_params, np.uint8)
            ranks = np.empty(own.max_rank if self.has_rank else 0, np.uint8)
            c = ffi.new("lynx_hq_encoded *")
            start = address(self.first) + _HEADER.size
            c.param_headers = start + self.planes + lib.LYNX_HQ_PARAM_HEADER * first
            c.params = address(params)
            c.wants_rank_bound = self.levels > 1
            if self.has_anchor:
                c.anchor = start + before.anchor
            if self.has_rest:
                c.rest = address(self.rest) + _HEADER.size + before.rest
            if self.has_rank:
                c.rank_table = address(self.table) + lib.LYNX_HQ_RANK_HEADER * first
                c.rank = address(ranks)
            source, memory = address(words, "const uint16_t *"), scratch()
            code = lib.lynx_hq_encode(self.tile.c, source, head_stride, token_stride, first, last, c, address(memory))
            if code != lib.LYNX_OK:
                raise CodecError(f"hq: {error_text(code)}")
            return params[: c.params_size], ranks[: c.rank_size], c.rank_bound

        for params, ranks, bound in parallel(work, self.sizes.blocks, threads):
            self.params.append(params)
            self.ranks.append(ranks)
            self.rank_bound += bound

    @property
    def total(self) -> int:
        """Bytes of all levels together; with ranks unknown, what they take at most."""
        size = self.levels * _HEADER.size + self.sizes.anchor + self.header_bytes + _nbytes(self.params)
        return int(size + self.sizes.rest + self.rank_bound if self.levels > 1 else size)

    def payload(self, level: int) -> Buffer:
        """A wanted level."""
        if level == 0:
            params, at = _nbytes(self.params), _HEADER.size + self.planes + self.header_bytes
            _HEADER.pack_into(self.first.data, 0, _CODED, 0, 0, params)
            self.first[at : at + params] = np.concatenate(self.params)
            return self.first[: at + params].data
        if level < self.levels - 1:
            _HEADER.pack_into(self.rest.data, 0, _CODED, level, 0, 0)
            return self.rest.data
        body = [self.table, *self.ranks]
        if level == 1:
            body.insert(0, self.rest[_HEADER.size :])
        return b"".join([_HEADER.pack(_CODED, level, 0, _nbytes(self.ranks)), *(part.data for part in body)])


class HQ(Codec):
    """Hierarchical quantisation of bfloat16 and float16 keys and values.

    ``anchor_bits`` (2..8) sets the anchor's width for keys and values; ``key_bits`` and ``value_bits`` set one each.
    ``levels``: 3 = anchor, 8-bit, exact; 2 = anchor, exact; 1 = anchor only, lossy.
    """

    codec_id: ClassVar[str] = "hq"
    wire_id: ClassVar[int] = 3

    def __init__(
        self,
        *,
        anchor_bits: int | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        levels: int = 3,
    ) -> None:
        self._key_bits = self._bits("key_bits", key_bits, anchor_bits)
        self._value_bits = self._bits("value_bits", value_bits, anchor_bits)
        if levels not in (1, 2, 3):
            raise ConfigError(f"hq: levels must be 1, 2 or 3, not {levels!r}")
        if levels == 3 and self._key_bits == self._value_bits == 8:
            raise ConfigError("hq: an 8-bit anchor leaves nothing for a middle level; use levels=2 or levels=1")
        self._levels = levels

    @staticmethod
    def _bits(name: str, bits: int | None, default: int | None) -> int:
        value = bits if bits is not None else default if default is not None else 4
        if not isinstance(value, int) or not 2 <= value <= 8:
            raise ConfigError(f"hq: {name} must be an integer from 2 to 8, not {value!r}")
        return value

    @property
    def levels(self) -> int:
        """1, 2 or 3."""
        return self._levels

    @property
    def exact(self) -> bool:
        """True with 2 or 3 levels."""
        return self._levels > 1

    def supports(self, spec: ChunkSpec) -> bool:
        """Keys and values of bfloat16 and float16, up to 2 GiB a tile."""
        return spec.dtype in _DTYPES and spec.part in _PARTS and spec.nbytes <= _MAX_BYTES

    def get_config(self) -> dict[str, Any]:
        """``id``, ``key_bits``, ``value_bits``, ``levels``."""
        return {
            "id": self.codec_id,
            "key_bits": self._key_bits,
            "value_bits": self._value_bits,
            "levels": self._levels,
        }

    def max_encoded_size(self, spec: ChunkSpec, level: int) -> int:
        """The header and, in the middle level, its planes; elsewhere the tile's bytes, which ``stored`` tiles take."""
        sizes = self._tile(spec).sizes
        if not 0 <= level < self._levels:
            raise SpecError(f"hq: level {level} of {self._levels}")
        middle = 0 < level < self._levels - 1
        return _HEADER.size + min(spec.nbytes, int(sizes.rest) if middle else spec.nbytes)

    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """See :meth:`Codec.encode`."""
        tile = self._tile(spec)
        words = as_words(spec, array)
        wanted = list(range(self._levels)) if levels is None else list(levels)
        if any(not 0 <= level < self._levels for level in wanted):
            raise SpecError(f"hq: levels {wanted} of a codec with {self._levels}")
        rank = self.exact and self._levels - 1 in wanted
        encoder = _Encoder(tile, self._levels, wanted, rank=rank)
        encoder.run(words, threads)
        if encoder.total >= spec.nbytes and self.exact and not rank:
            # What the ranks take at most does not tell whether the tile would grow; what they take does.
            encoder = _Encoder(tile, self._levels, wanted, rank=True)
            encoder.run(words, threads)
        if encoder.total >= spec.nbytes:
            return [self._stored(words, level) for level in wanted]
        return [encoder.payload(level) for level in wanted]

    def decode(self, spec: ChunkSpec, levels: Sequence[Buffer], out: Any | None, *, threads: int = 1) -> DecodeState:
        """See :meth:`Codec.decode`. Without ``out`` sizes and tables are checked, and codes and ranks are not."""
        tile = self._tile(spec)
        words = None if out is None else as_words(spec, out, writable=True)
        if not 1 <= len(levels) <= self._levels:
            raise SpecError(f"hq: got {len(levels)} levels of a codec with {self._levels}")
        payloads = [np.frombuffer(payload, np.uint8) for payload in levels]
        modes = [self._header(payload, level) for level, payload in enumerate(payloads)]
        if len({mode for mode, _ in modes}) > 1:
            raise PayloadError("hq: some levels of the chunk are stored and others are not (byte offset 0)")
        if modes[0][0] == _STORED:
            self._decode_stored(spec, payloads, words)
        else:
            self._decode_coded(tile, payloads, [size for _, size in modes], words, threads)
        return DecodeState(len(levels) - 1, tuple(levels))

    def refine(
        self, spec: ChunkSpec, state: DecodeState, level: int, payload: Buffer, out: Any | None, *, threads: int = 1
    ) -> DecodeState:
        """See :meth:`Codec.refine`."""
        if level != state.level + 1:
            raise SpecError(f"hq: level {level} cannot follow level {state.level}")
        return self.decode(spec, [*state.payloads, payload], out, threads=threads)

    def _tile(self, spec: ChunkSpec) -> _Tile:
        if not self.supports(spec):
            raise SpecError(
                f"hq codes key and value tiles of {' and '.join(_DTYPES)} up to {_MAX_BYTES} bytes,"
                f" not {spec.part} tiles of {spec.nbytes} bytes of {spec.dtype}; use bitplane or raw"
            )
        bits = self._key_bits if spec.part == "key" else self._value_bits
        return _tile(_PARTS[spec.part], _DTYPES[spec.dtype], spec.shape, bits)

    @staticmethod
    def _stored(words: NDArray[Any], level: int) -> bytes:
        body = np.ascontiguousarray(words).tobytes() if level == 0 else b""
        return _HEADER.pack(_STORED, level, 0, 0) + body

    @staticmethod
    def _header(payload: NDArray[np.uint8], level: int) -> tuple[int, int]:
        """Mode and size field of a level's header."""
        if payload.nbytes < _HEADER.size:
            raise PayloadError(f"hq level {level}: {payload.nbytes} bytes hold no header (byte offset 0)")
        mode, number, reserved, size = _HEADER.unpack_from(payload.data)
        if mode not in (_CODED, _STORED):
            raise PayloadError(f"hq level {level}: unknown mode {mode} (byte offset 0)")
        if number != level:
            raise PayloadError(f"hq level {level}: the payload is of level {number} (byte offset 1)")
        if reserved or (mode == _STORED and size):
            raise PayloadError(f"hq level {level}: reserved bytes are not zero (byte offset 2)")
        return mode, size

    @staticmethod
    def _decode_stored(spec: ChunkSpec, payloads: list[NDArray[np.uint8]], words: NDArray[Any] | None) -> None:
        for level, payload in enumerate(payloads):
            _check_size(level, payload, _HEADER.size + (spec.nbytes if level == 0 else 0))
        if words is not None:
            words[...] = payloads[0][_HEADER.size :].view(spec.word_dtype).reshape(spec.shape)

    def _decode_coded(
        self,
        tile: _Tile,
        payloads: list[NDArray[np.uint8]],
        variable: list[int],
        words: NDArray[Any] | None,
        threads: int,
    ) -> None:
        sizes, blocks = tile.sizes, tile.sizes.blocks
        header_bytes, table_bytes = lib.LYNX_HQ_PARAM_HEADER * blocks, lib.LYNX_HQ_RANK_HEADER * blocks
        c = ffi.new("lynx_hq_levels *")
        starts = [_HEADER.size + sizes.anchor + header_bytes, _HEADER.size, _HEADER.size]  # of parameters, codes, ranks
        at = [0, min(1, len(payloads) - 1), len(payloads) - 1]  # the levels where they lie
        _check_size(0, payloads[0], starts[0] + variable[0])
        c.anchor = address(payloads[0], "const uint8_t *") + _HEADER.size
        c.param_headers = c.anchor + sizes.anchor
        c.params = c.param_headers + header_bytes
        c.params_size = variable[0]
        if len(payloads) > 1:
            fixed = sizes.rest + (table_bytes if self._levels == 2 else 0)
            _check_size(1, payloads[1], _HEADER.size + fixed + variable[1])
            c.rest = address(payloads[1], "const uint8_t *") + _HEADER.size
        if self.exact and len(payloads) == self._levels:
            level = self._levels - 1
            starts[2] = _HEADER.size + (sizes.rest if level == 1 else 0) + table_bytes
            _check_size(level, payloads[level], starts[2] + variable[level])
            c.rank = address(payloads[level], "const uint8_t *") + starts[2]
            c.rank_table = c.rank - table_bytes
            c.rank_size = variable[level]
        elif len(payloads) == 2 and variable[1]:
            raise PayloadError("hq level 1: reserved bytes are not zero (byte offset 4)")

        def check(code: int, fault: Any) -> None:
            if code == lib.LYNX_OK:
                return
            if code == lib.LYNX_ERR_ARGUMENT:
                raise CodecError(f"hq: {error_text(code)}")
            offset = starts[fault.section] + fault.offset
            raise PayloadError(
                f"hq level {at[fault.section]}: {error_text(code)}"
                f" ({_SECTIONS[fault.section]} of block {fault.block} of {blocks}, byte offset {offset})"
            )

        fault = ffi.new("lynx_hq_fault *")
        check(lib.lynx_hq_check(tile.c, c, fault), fault)
        if words is None:
            return
        head_stride, token_stride = _strides(words)
        target = address(words, "uint16_t *")

        def work(first: int, last: int) -> None:
            fault, memory = ffi.new("lynx_hq_fault *"), scratch()
            code = lib.lynx_hq_decode(tile.c, c, target, head_stride, token_stride, first, last, address(memory), fault)
            check(code, fault)

        parallel(work, blocks, threads)


@lru_cache(256)
def _tile(part: int, dtype: int, shape: tuple[int, int, int], bits: int) -> _Tile:
    widths = np.full(shape[0] * shape[2], bits, np.uint8)
    c, sizes = ffi.new("lynx_hq_tile *"), ffi.new("lynx_hq_sizes *")
    c.dtype, c.part = dtype, part
    c.heads, c.tokens, c.head_dim = shape
    c.widths = address(widths, "const uint8_t *")
    code = lib.lynx_hq_measure(c, sizes)
    if code != lib.LYNX_OK:
        raise SpecError(f"hq cannot code a tile of shape {shape}: {error_text(code)}")
    return _Tile(c, sizes, widths)


def _strides(words: NDArray[Any]) -> tuple[int, int]:
    """Strides of heads and tokens in words."""
    if not words.flags.aligned:
        raise SpecError(f"the array's address is not a multiple of the word's {words.itemsize} bytes")
    for stride in words.strides[:2]:
        if stride % words.itemsize:
            raise SpecError(f"strides {words.strides} are not multiples of the word's {words.itemsize} bytes")
    return words.strides[0] // words.itemsize, words.strides[1] // words.itemsize


def _nbytes(parts: list[NDArray[np.uint8]]) -> int:
    return sum(part.nbytes for part in parts)


def _check_size(level: int, payload: NDArray[np.uint8], size: int) -> None:
    if payload.nbytes != size:
        what = "truncated" if payload.nbytes < size else "longer than its content"
        raise PayloadError(
            f"hq level {level}: {what}: {payload.nbytes} bytes, its header and the tile make {size}"
            f" (byte offset {min(payload.nbytes, size)})"
        )
