"""``hq``: hierarchical group quantisation in nested levels, exact at the end. spec/codec-hq.md.

Level 0 is a low-bit anchor with group parameters, level 1 the rest of an 8-bit code, level 2 each word's rank among
the words that share that code. Nothing is sent twice. Anchors give each key channel the width that it deserves: from a
table in the config, or from the ranges of the tile's own channels.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from lynxproto.chunk import ChunkSpec, as_words
from lynxproto.codecs._library import address, error_text, ffi, lib, parallel, scratch
from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.errors import CodecError, ConfigError, PayloadError, SpecError

if TYPE_CHECKING:
    from lynxproto.calibration import Calibration

__all__ = ["HQ", "PRESETS"]

#: Configs by name: ``fast`` for speed, ``balanced`` for few bits of all levels, ``dense`` for a small anchor.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "fast": {"key_bits": 3, "value_bits": 3, "widths": "ranges", "fold": False, "scaling": True},
    "balanced": {"key_bits": 3, "value_bits": 3, "widths": "ranges", "fold": True, "scaling": True},
    "dense": {"key_bits": 2.6, "value_bits": 3, "widths": "ranges", "fold": True, "scaling": True},
}
#: What presets with a calibration are content with: a predicted KL, in nats. It decides how many bits a model needs.
_CALIBRATED: Final = {"fast": 0.0034, "balanced": 0.0034, "dense": 0.0075}

_HEADER: Final = struct.Struct("<BBHI")  # mode, level, reserved, bytes of the section of variable size
_CODED: Final = 0
_STORED: Final = 1
_DTYPES: Final = {"bfloat16": lib.LYNX_BFLOAT16, "float16": lib.LYNX_FLOAT16}
_PARTS: Final = {"key": lib.LYNX_KEY, "value": lib.LYNX_VALUE}
_MAX_BYTES: Final = 1 << 31  # of a tile: sizes in payloads have 32 bits
_SECTIONS: Final = ("parameters", "codes", "ranks", "anchor planes")
#: What a key channel gains with its bit 0, 1, ..., in units of 1/64 octave of KL: spec/codec-hq.md, "Widths by range".
_GAINS: Final = np.array([-315, -392, -475, -614, -756, -891, -1022])
_MIDDLE: Final = 22000  # of weights, 9216 .. 36576
_MAX_TABLE: Final = 1 << 22  # entries of a table of widths


@dataclass(frozen=True, slots=True)
class _Tile:
    """The C structures of one tile, and what keeps their memory alive."""

    c: Any
    sizes: Any
    side: bytes  # the tile's own tables, as level 0 carries them
    folds_rest: bool
    keep: tuple[NDArray[Any] | None, ...]

    @property
    def fold_bytes(self) -> int:
        """Bytes of the anchor's fold table."""
        return int(lib.LYNX_HQ_FOLD_HEADER * self.sizes.blocks) if self.c.fold else 0

    @property
    def rest_fold_bytes(self) -> int:
        """Bytes of the rest's fold table."""
        return int(lib.LYNX_HQ_FOLD_HEADER * self.sizes.blocks) if self.folds_rest else 0


@dataclass(slots=True)
class _Piece:
    """What one thread makes: the sections whose sizes are known only afterwards."""

    anchor: NDArray[np.uint8]
    params: NDArray[np.uint8]
    rest: NDArray[np.uint8]
    ranks: NDArray[np.uint8]
    rank_bound: int


class _Encoder:
    """One call of encode: the levels' buffers, which the kernels fill in place where sizes are known beforehand."""

    def __init__(self, tile: _Tile, levels: int, wanted: Collection[int], *, rank: bool) -> None:
        sizes = self.sizes = tile.sizes
        self.levels, self.tile = levels, tile
        self.has_anchor, self.has_rest, self.has_rank = 0 in wanted, 1 in wanted and levels > 1, rank
        self.header_bytes = lib.LYNX_HQ_PARAM_HEADER * sizes.blocks
        # Level 0: header, side table, fold table, planes, parameter headers, parameters.
        self.planes_start = _HEADER.size + len(tile.side) + tile.fold_bytes
        planes = sizes.anchor if self.has_anchor else 0
        self.first = np.empty(self.planes_start + planes + self.header_bytes + sizes.max_params, np.uint8)
        self.rest_start = _HEADER.size + tile.rest_fold_bytes
        self.rest = np.empty(self.rest_start + sizes.rest if self.has_rest else 0, np.uint8)
        self.table = np.empty(lib.LYNX_HQ_RANK_HEADER * sizes.blocks if rank else 0, np.uint8)
        self.headers = np.empty(self.header_bytes, np.uint8)
        self.pieces: list[_Piece] = []

    def run(self, words: NDArray[Any], threads: int) -> None:
        """Encode all blocks."""
        head_stride, token_stride = _strides(words)
        fold, folds_rest = bool(self.tile.c.fold), self.tile.folds_rest and self.has_rest

        def work(first: int, last: int) -> _Piece:
            before, own = ffi.new("lynx_hq_sizes *"), ffi.new("lynx_hq_sizes *")
            lib.lynx_hq_measure_range(self.tile.c, 0, first, before)
            lib.lynx_hq_measure_range(self.tile.c, first, last, own)
            params = np.empty(own.max_params, np.uint8)
            ranks = np.empty(own.max_rank if self.has_rank else 0, np.uint8)
            anchor = np.empty(own.anchor if fold and self.has_anchor else 0, np.uint8)
            rest = np.empty(own.rest if folds_rest else 0, np.uint8)
            c = ffi.new("lynx_hq_encoded *")
            c.param_headers = address(self.headers) + lib.LYNX_HQ_PARAM_HEADER * first
            c.params = address(params)
            c.wants_rank_bound = self.levels > 1
            if fold and self.has_anchor:
                c.anchor = address(anchor)
                table = _HEADER.size + len(self.tile.side)
                c.fold_table = address(self.first) + table + lib.LYNX_HQ_FOLD_HEADER * first
            elif self.has_anchor:
                c.anchor = address(self.first) + self.planes_start + before.anchor
            if folds_rest:
                c.rest = address(rest)
                c.rest_table = address(self.rest) + _HEADER.size + lib.LYNX_HQ_FOLD_HEADER * first
            elif self.has_rest:
                c.rest = address(self.rest) + self.rest_start + before.rest
            if self.has_rank:
                c.rank_table = address(self.table) + lib.LYNX_HQ_RANK_HEADER * first
                c.rank = address(ranks)
            source, memory = address(words, "const uint16_t *"), scratch()
            code = lib.lynx_hq_encode(self.tile.c, source, head_stride, token_stride, first, last, c, address(memory))
            if code != lib.LYNX_OK:
                raise CodecError(f"hq: {error_text(code)}")
            return _Piece(
                anchor[: c.anchor_size if fold else 0],
                params[: c.params_size],
                rest[: c.rest_size if folds_rest else 0],
                ranks[: c.rank_size],
                c.rank_bound,
            )

        self.pieces = parallel(work, self.sizes.blocks, threads)

    @property
    def total(self) -> int:
        """Bytes of all levels together, without folding; with ranks unknown, what they take at most."""
        size = self.levels * _HEADER.size + self.planes_start - _HEADER.size + self.sizes.anchor + self.header_bytes
        size += sum(piece.params.nbytes for piece in self.pieces)
        if self.levels > 1:
            size += self.tile.rest_fold_bytes + self.sizes.rest + sum(piece.rank_bound for piece in self.pieces)
        return int(size)

    def payload(self, level: int) -> Buffer:
        """A wanted level."""
        if level == 0:
            params = sum(piece.params.nbytes for piece in self.pieces)
            _HEADER.pack_into(self.first.data, 0, _CODED, 0, 0, params)
            self.first[_HEADER.size : _HEADER.size + len(self.tile.side)] = np.frombuffer(self.tile.side, np.uint8)
            at = self.planes_start + (0 if self.tile.c.fold else self.sizes.anchor)
            for part in (*(p.anchor for p in self.pieces), self.headers, *(p.params for p in self.pieces)):
                self.first[at : at + part.nbytes] = part
                at += part.nbytes
            return self.first[:at].data
        if level == 1 and self.tile.folds_rest:
            at = self.rest_start
            for piece in self.pieces:
                self.rest[at : at + piece.rest.nbytes] = piece.rest
                at += piece.rest.nbytes
            self.rest = self.rest[:at]
        if level < self.levels - 1:
            _HEADER.pack_into(self.rest.data, 0, _CODED, level, 0, 0)
            return self.rest.data
        ranks = [piece.ranks for piece in self.pieces]
        body = [self.table, *ranks]
        if level == 1:
            body.insert(0, self.rest[_HEADER.size :])
        return b"".join([_HEADER.pack(_CODED, level, 0, sum(r.nbytes for r in ranks)), *(part.data for part in body)])


class _Table:
    """A checked table of widths: of key channels by layer and head, of values by layer and head."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        if not {"keys", "values"} <= set(table) <= {"keys", "values", "hash"}:
            raise ConfigError("hq: a table of widths has the keys 'keys', 'values' and 'hash'")
        keys, values = table["keys"], table["values"]
        if not (isinstance(keys, Sequence) and isinstance(values, Sequence) and len(keys) == len(values)):
            raise ConfigError("hq: a table of widths needs a list of layers for keys and one as long for values")
        self.keys = [[self._digits(head) for head in _list(layer)] for layer in keys]
        self.values = [self._digits(layer) for layer in values]
        entries = sum(head.size for layer in self.keys for head in layer)
        if (
            not self.keys
            or entries > _MAX_TABLE
            or any(
                len(k) != v.size or len({head.size for head in k}) != 1
                for k, v in zip(self.keys, self.values, strict=True)
            )
        ):
            raise ConfigError("hq: a table of widths must have the same heads for keys and values in each layer")
        self.hash = xxhash.xxh3_128_hexdigest("/".join([",".join(layer) for layer in keys] + [*values]).encode())
        if table.get("hash", self.hash) != self.hash:
            raise ConfigError(f"hq: the table of widths has hash {self.hash}, not {table['hash']}")
        self.config = {"keys": [list(layer) for layer in keys], "values": list(values), "hash": self.hash}

    @staticmethod
    def _digits(text: Any) -> NDArray[np.uint8]:
        if not isinstance(text, str) or not text or set(text) - set("012345678"):
            raise ConfigError(f"hq: widths are texts of digits from 0 to 8, not {text!r:.80}")
        return np.frombuffer(text.encode(), np.uint8) - ord("0")

    @staticmethod
    def of(widths: Any) -> dict[str, Any]:
        """A config's form of :class:`lynxproto.calibration.Widths`."""

        def text(row: NDArray[np.uint8]) -> str:
            return "".join(map(str, row.tolist()))

        keys = [[text(head) for head in layer] for layer in widths.keys]
        return {"keys": keys, "values": [text(layer) for layer in widths.values]}

    def lookup(self, spec: ChunkSpec) -> NDArray[np.uint8]:
        """Widths ``[heads, head_dim]`` of a tile. Raises SpecError where the table has no such layer or heads."""
        if spec.layer is None or spec.layer >= len(self.keys):
            raise SpecError(f"hq: the table of widths has {len(self.keys)} layers; the tile is of layer {spec.layer}")
        stop, known = spec.head_start + spec.heads, self.values[spec.layer].size
        if stop > known:
            raise SpecError(
                f"hq: the table of widths has {known} heads in layer {spec.layer};"
                f" the tile has heads {spec.head_start} to {stop - 1}"
            )
        if spec.part == "value":
            heads = self.values[spec.layer][spec.head_start : stop]
            return np.repeat(heads[:, None], spec.head_dim, axis=1)
        rows = np.stack(self.keys[spec.layer][spec.head_start : stop])
        if rows.shape[1] != spec.head_dim:
            raise SpecError(
                f"hq: the table of widths has {rows.shape[1]} key channels in layer {spec.layer},"
                f" the tile {spec.head_dim}"
            )
        return rows


def _list(value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError("hq: keys of a table of widths are a list of layers of a list of heads")
    return value


class HQ(Codec):
    """Hierarchical quantisation of bfloat16 and float16 keys and values.

    ``preset`` (``fast``, ``balanced``, ``dense``) sets whatever is not given: :data:`PRESETS`; with a ``calibration``
    it takes the fewest bits that keep the KL which that predicts small enough, however many the model needs.
    ``key_bits`` and ``value_bits`` (2..8; ``anchor_bits`` sets both) are widths of the anchor.
    ``levels``: 3 = anchor, 8-bit, exact; 2 = anchor, exact; 1 = anchor only, lossy.
    ``widths``: ``"uniform"``; ``"ranges"``: each tile's keys have widths by their own ranges, of mean ``key_bits``;
    or a table by layer, head and channel: ``{"keys": [[digits of a head's channels, ...], ...], "values": [digits of
    a layer's heads, ...]}``. ``calibration`` makes such a table, of the means ``key_bits`` and ``value_bits`` if given.
    ``fold``: a prefix code for the top planes. ``scaling``: exponents for the channels of bfloat16 values.
    """

    codec_id: ClassVar[str] = "hq"
    wire_id: ClassVar[int] = 3

    def __init__(
        self,
        *,
        preset: str | None = None,
        calibration: Calibration | None = None,
        anchor_bits: float | None = None,
        key_bits: float | None = None,
        value_bits: float | None = None,
        levels: int = 3,
        widths: str | Mapping[str, Any] | None = None,
        fold: bool | None = None,
        scaling: bool | None = None,
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"hq: unknown preset {preset!r}; known: {', '.join(PRESETS)}")
        default = PRESETS[preset] if preset else {"key_bits": 4, "value_bits": 4, "widths": "uniform"}
        if calibration is not None:
            if widths is not None:
                raise ConfigError("hq: give a calibration or widths, not both")
            if preset and (key_bits, value_bits, anchor_bits) == (None, None, None):
                reaching = calibration.reaching(_CALIBRATED[preset])
                widths = _Table.of(reaching)
                key_bits, value_bits = (max(2.0, round(_mean(w), 3)) for w in (reaching.keys, reaching.values))

        def choose(name: str, *given: Any) -> Any:
            return next((value for value in given if value is not None), default.get(name, False))

        self._key_bits = _bits("key_bits", choose("key_bits", key_bits, anchor_bits))
        self._value_bits = _bits("value_bits", choose("value_bits", value_bits, anchor_bits))
        if calibration is not None and widths is None:
            widths = _Table.of(calibration.widths(self._key_bits, self._value_bits))
        chosen = choose("widths", widths)
        self._table = _Table(chosen) if isinstance(chosen, Mapping) else None
        if self._table is None and chosen not in ("uniform", "ranges"):
            raise ConfigError(f"hq: widths must be 'uniform', 'ranges' or a table, not {chosen!r:.80}")
        self._widths: str | dict[str, Any] = self._table.config if self._table else str(chosen)
        self._fold, self._scaling = choose("fold", fold), choose("scaling", scaling)
        for name, flag in (("fold", self._fold), ("scaling", self._scaling)):
            if not isinstance(flag, bool):
                raise ConfigError(f"hq: {name} must be true or false, not {flag!r}")
        if self._table is None:
            whole = {"key_bits": self._key_bits} if chosen == "uniform" else {}
            for name, bits in {**whole, "value_bits": self._value_bits}.items():
                if not isinstance(bits, int):
                    raise ConfigError(f"hq: {name} must be an integer without a table, not {bits!r}")
        if chosen == "ranges" and self._key_bits > 7:
            raise ConfigError(f"hq: widths by range have a mean of at most 7 bits, not {self._key_bits}")
        if levels not in (1, 2, 3):
            raise ConfigError(f"hq: levels must be 1, 2 or 3, not {levels!r}")
        if levels == 3 and self._key_bits == self._value_bits == 8:
            raise ConfigError("hq: an 8-bit anchor leaves nothing for a middle level; use levels=2 or levels=1")
        self._levels = levels

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
        """All that decides about bytes; presets and calibrations are expanded."""
        return {
            "id": self.codec_id,
            "key_bits": self._key_bits,
            "value_bits": self._value_bits,
            "levels": self._levels,
            "widths": self._widths,
            "fold": self._fold,
            "scaling": self._scaling,
        }

    def max_encoded_size(self, spec: ChunkSpec, level: int) -> int:
        """The header and, in the middle level, its planes; elsewhere the tile's bytes, which ``stored`` tiles take."""
        self._check_support(spec)
        if not 0 <= level < self._levels:
            raise SpecError(f"hq: level {level} of {self._levels}")
        if not 0 < level < self._levels - 1:
            return _HEADER.size + spec.nbytes
        widths = self._static_widths(spec)
        octets, blocks = -(-spec.tokens // 8), spec.heads * -(-spec.tokens // 64) * -(-spec.head_dim // 64)
        free = 8 * spec.heads * spec.head_dim - (0 if widths is None else int(widths.sum()))
        table = lib.LYNX_HQ_FOLD_HEADER * blocks if self._fold else 0
        return int(_HEADER.size + min(spec.nbytes, table + octets * free))

    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """See :meth:`Codec.encode`."""
        self._check_support(spec)
        words = as_words(spec, array)
        wanted = list(range(self._levels)) if levels is None else list(levels)
        if any(not 0 <= level < self._levels for level in wanted):
            raise SpecError(f"hq: levels {wanted} of a codec with {self._levels}")
        rank = self.exact and self._levels - 1 in wanted
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        tile = self._tile_of(spec, words)
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
        self._check_support(spec)
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
            tile = self._tile_in(spec, payloads[0])
            self._decode_coded(tile, payloads, [size for _, size in modes], words, threads)
        return DecodeState(len(levels) - 1, tuple(levels))

    def refine(
        self, spec: ChunkSpec, state: DecodeState, level: int, payload: Buffer, out: Any | None, *, threads: int = 1
    ) -> DecodeState:
        """See :meth:`Codec.refine`."""
        if level != state.level + 1:
            raise SpecError(f"hq: level {level} cannot follow level {state.level}")
        return self.decode(spec, [*state.payloads, payload], out, threads=threads)

    def _check_support(self, spec: ChunkSpec) -> None:
        if not self.supports(spec):
            raise SpecError(
                f"hq codes key and value tiles of {' and '.join(_DTYPES)} up to {_MAX_BYTES} bytes,"
                f" not {spec.part} tiles of {spec.nbytes} bytes of {spec.dtype}; use bitplane or raw"
            )

    def _static_widths(self, spec: ChunkSpec) -> NDArray[np.uint8] | None:
        """Widths ``[heads, head_dim]`` that follow from the config; None where the tile carries them."""
        if self._table is not None:
            return self._table.lookup(spec)
        if spec.part == "key" and self._widths == "ranges":
            return None
        bits = self._key_bits if spec.part == "key" else self._value_bits
        return np.full((spec.heads, spec.head_dim), bits, np.uint8)

    def _side_tables(self, spec: ChunkSpec) -> tuple[str, ...]:
        """The tables that the tile carries: 4 bits for each of its channels."""
        if spec.part == "key":
            return ("widths",) if self._widths == "ranges" else ()
        exponents = ("exponents",) if self._scaling and spec.dtype == "bfloat16" else ()
        return (*exponents, "biases") if self._fold else exponents

    def _tile_of(self, spec: ChunkSpec, words: NDArray[Any]) -> _Tile:
        """The tile to encode ``words``: with the tables that it will carry."""
        names = self._side_tables(spec)
        tables = {}
        if names:
            ranges, sizes, biases = _spreads(spec, words)
            if "widths" in names:
                tables["widths"] = _widths_by_range(_weights(ranges, sizes), self._key_bits)
            if "exponents" in names:
                tables["exponents"] = _exponents(sizes)
            if "biases" in names:
                tables["biases"] = (biases + 8).astype(np.uint8)
        return self._build(spec, tables)

    def _tile_in(self, spec: ChunkSpec, payload: NDArray[np.uint8]) -> _Tile:
        """The tile that a payload of level 0 describes."""
        count = spec.heads * spec.head_dim
        size = (count + 1) // 2
        tables, at = {}, _HEADER.size
        for name in self._side_tables(spec):
            if payload.nbytes < at + size:
                _check_size(0, payload, at + size)
            packed = payload[at : at + size]
            nibbles = np.stack([packed & 15, packed >> 4], axis=1).ravel()
            tables[name] = nibbles[:count].reshape(spec.heads, spec.head_dim)
            if nibbles[count:].any() or (name == "widths" and tables[name].max() > 8):
                raise PayloadError(f"hq level 0: a width is over 8 or padding not zero (byte offset {at})")
            at += size
        return self._build(spec, tables)

    def _build(self, spec: ChunkSpec, tables: Mapping[str, NDArray[np.uint8]]) -> _Tile:
        widths = tables["widths"] if "widths" in tables else self._static_widths(spec)
        assert widths is not None
        signed = [tables[name].astype(np.int8) - 8 if name in tables else None for name in ("exponents", "biases")]
        return _tile(
            _PARTS[spec.part],
            _DTYPES[spec.dtype],
            spec.shape,
            self._fold,
            b"".join(_nibbles(table.ravel()) for table in tables.values()),
            widths.tobytes(),
            *(None if table is None else table.astype(np.int8).tobytes() for table in signed),
        )

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
        planes = _HEADER.size + len(tile.side) + tile.fold_bytes  # where they start
        anchor_size = sizes.anchor
        if tile.c.fold:  # the fold table says how large they are, and the library whether that is so
            anchor_size = max(0, payloads[0].nbytes - planes - header_bytes - variable[0])
        # Where parameters, codes, ranks and anchor planes start, and in which levels.
        starts = [planes + anchor_size + header_bytes, _HEADER.size, _HEADER.size, planes]
        at = [0, min(1, len(payloads) - 1), len(payloads) - 1, 0]
        _check_size(0, payloads[0], starts[0] + variable[0])
        c.anchor = address(payloads[0], "const uint8_t *") + planes
        if tile.c.fold:
            c.fold_table = c.anchor - tile.fold_bytes
        c.anchor_size = anchor_size
        c.param_headers = c.anchor + anchor_size
        c.params = c.param_headers + header_bytes
        c.params_size = variable[0]
        if len(payloads) > 1:
            rest_start = starts[1] = _HEADER.size + tile.rest_fold_bytes
            beyond = (table_bytes if self._levels == 2 else 0) + variable[1]
            rest_size = sizes.rest
            if tile.folds_rest:
                rest_size = max(0, payloads[1].nbytes - rest_start - beyond)
            _check_size(1, payloads[1], rest_start + rest_size + beyond)
            c.rest = address(payloads[1], "const uint8_t *") + rest_start
            c.rest_size = rest_size
            if tile.folds_rest:
                c.rest_table = c.rest - tile.rest_fold_bytes
        if self.exact and len(payloads) == self._levels:
            level = self._levels - 1
            starts[2] = (starts[1] + c.rest_size if level == 1 else _HEADER.size) + table_bytes
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
def _tile(  # noqa: PLR0917 - lru_cache hashes positional arguments faster
    part: int,
    dtype: int,
    shape: tuple[int, int, int],
    fold: bool,
    side: bytes,
    widths: bytes,
    exponents: bytes | None = None,
    biases: bytes | None = None,
) -> _Tile:
    c, sizes = ffi.new("lynx_hq_tile *"), ffi.new("lynx_hq_sizes *")
    c.dtype, c.part, c.fold = dtype, part, fold
    c.heads, c.tokens, c.head_dim = shape
    keep = [None if table is None else np.frombuffer(table, np.uint8) for table in (widths, exponents, biases)]
    c.widths, c.exponents, c.biases = (
        ffi.NULL if table is None else address(table, ctype)
        for table, ctype in zip(keep, ("const uint8_t *", "const int8_t *", "const int8_t *"), strict=True)
    )
    code = lib.lynx_hq_measure(c, sizes)
    if code != lib.LYNX_OK:
        raise SpecError(f"hq cannot code a tile of shape {shape}: {error_text(code)}")
    return _Tile(c, sizes, side, bool(lib.lynx_hq_folds_rest(c)), tuple(keep))


def _bits(name: str, bits: Any) -> float:
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 2 <= bits <= 8:
        raise ConfigError(f"hq: {name} must be a number from 2 to 8, not {bits!r}")
    return int(bits) if bits == int(bits) else bits


def _mean(layers: Sequence[NDArray[np.uint8]]) -> float:
    return sum(int(layer.sum()) for layer in layers) / sum(layer.size for layer in layers)


def _nibbles(values: NDArray[np.uint8]) -> bytes:
    padded = np.zeros((values.size + 1) // 2 * 2, np.uint8)
    padded[: values.size] = values
    return (padded[::2] | padded[1::2] << 4).tobytes()


def _spreads(spec: ChunkSpec, words: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
    """Ranges and sizes of the tile's channels, 128 an octave, and their biases; all ``[heads, head_dim]``."""
    ranges, sizes = np.empty((2, spec.heads, spec.head_dim), np.uint16)
    biases = np.empty(sizes.shape, np.int8)
    tile = _tile(_PARTS[spec.part], _DTYPES[spec.dtype], spec.shape, False, b"", bytes(sizes.size))
    source, memory = address(words, "const uint16_t *"), scratch()
    code = lib.lynx_hq_spreads(
        tile.c,
        source,
        *_strides(words),
        address(ranges, "uint16_t *"),
        address(sizes, "uint16_t *"),
        address(biases, "int8_t *"),
        address(memory),
    )
    if code != lib.LYNX_OK:
        raise CodecError(f"hq: {error_text(code)}")
    return ranges.astype(np.int64), sizes.astype(np.int64), biases


def _weights(ranges: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How much the error of a key channel is expected to matter, 64 an octave of KL; ``[heads, head_dim]``."""
    return 3 * (ranges + sizes + np.roll(sizes, sizes.shape[1] // 2, 1)) >> 3


def _widths_by_range(weights: NDArray[np.int64], mean: float) -> NDArray[np.uint8]:
    """Widths 0..7 of mean at most ``mean``: each next bit goes to the channel of the tile that gains most."""
    gains = (weights.reshape(-1, 1) + _GAINS - _MIDDLE).ravel()  # of 16-bit integers NumPy's sort is linear
    chosen = np.zeros(gains.size, bool)
    chosen[np.argsort((-gains).astype(np.int16), kind="stable")[: int(mean * weights.size)]] = True
    widths: NDArray[np.uint8] = chosen.reshape(*weights.shape, -1).sum(2).astype(np.uint8)
    return widths


def _exponents(sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Exponents that even the sizes of a head's channels out, -8..7, plus 8."""
    mean = sizes.sum(1, keepdims=True) // sizes.shape[1]
    shifted: NDArray[np.uint8] = (np.clip((sizes - mean + 64) // 128, -8, 7) + 8).astype(np.uint8)
    return shifted


def _strides(words: NDArray[Any]) -> tuple[int, int]:
    """Strides of heads and tokens in words."""
    if not words.flags.aligned:
        raise SpecError(f"the array's address is not a multiple of the word's {words.itemsize} bytes")
    for stride in words.strides[:2]:
        if stride % words.itemsize:
            raise SpecError(f"strides {words.strides} are not multiples of the word's {words.itemsize} bytes")
    return words.strides[0] // words.itemsize, words.strides[1] // words.itemsize


def _check_size(level: int, payload: NDArray[np.uint8], size: int) -> None:
    if payload.nbytes != size:
        what = "truncated" if payload.nbytes < size else "longer than its content"
        raise PayloadError(
            f"hq level {level}: {what}: {payload.nbytes} bytes, its header and the tile make {size}"
            f" (byte offset {min(payload.nbytes, size)})"
        )
