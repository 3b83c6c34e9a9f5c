"""``hq``: hierarchical group quantisation in nested levels, exact at the end. spec/codec-hq.md.

Level 0 is a low-bit anchor with group parameters, level 1 the rest of an 8-bit code, level 2 each word's rank among
the words that share that code. Nothing is sent twice. Anchors give each key channel the width that it deserves: from a
table in the config, or from the ranges of the tile's own channels.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

import numpy as np
import xxhash
from numpy.typing import NDArray

from lynxproto.chunk import ChunkSpec
from lynxproto.codecs._library import (
    Workspace,
    address,
    check,
    error_text,
    ffi,
    lib,
    parallel,
    part_count,
    workspace,
)
from lynxproto.codecs._view import Dense, scatter, view_of
from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.errors import ConfigError, PayloadError, SpecError

if TYPE_CHECKING:
    from lynxproto.calibration import Calibration

__all__ = ["HQ", "PRESETS"]

#: Configs by name: ``fast`` for speed, ``balanced`` for few bits of all levels, ``dense`` for a small anchor.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "fast": {"key_bits": 3.15, "value_bits": 3, "widths": "ranges", "fold": False, "scaling": True},
    "balanced": {"key_bits": 3.4, "value_bits": 3, "widths": "ranges", "fold": True, "scaling": True},
    "dense": {"key_bits": 2.6, "value_bits": 3, "widths": "ranges", "fold": True, "scaling": True},
}
#: What presets with a calibration are content with: a predicted KL, in nats. It decides how many bits a model needs.
_CALIBRATED: Final = {"fast": 0.0034, "balanced": 0.0034, "dense": 0.0075}

_HEADER: Final = struct.Struct("<BBHI")  # mode, level, reserved, bytes of the section of variable size
_DTYPES: Final = {"bfloat16": lib.LYNX_BFLOAT16, "float16": lib.LYNX_FLOAT16}
_PARTS: Final = {"key": lib.LYNX_KEY, "value": lib.LYNX_VALUE}
_MAX_BYTES: Final = 1 << 31  # of a tile: sizes in payloads have 32 bits
_SECTIONS: Final = ("parameters", "codes", "ranks", "anchor planes")
_MAX_TABLE: Final = 1 << 22  # entries of a table of widths
_PIECES: Final = ffi.typeof("lynx_hq_piece[]")
_FAULTS: Final = ffi.typeof("lynx_hq_fault[]")
_OCTETS: Final = ffi.typeof("uint8_t[]")
_NULL: Final = ffi.NULL
_OK: Final = lib.LYNX_OK
_encode_tile: Final = lib.lynx_hq_encode_tile
_decode_tile: Final = lib.lynx_hq_decode_tile
_MAX_JOBS: Final = 1024  # shapes that a codec remembers


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the levels of a call lie in one piece of memory."""

    places: tuple[tuple[int, int], ...]  # levels, ascending, and where each begins
    room: int  # bytes


@dataclass(frozen=True, slots=True)
class _Job:
    """A codec's config for tiles of one shape, as the library takes it, and what it needs."""

    config: Any
    sizes: tuple[int, ...]  # bytes that an encoder needs for each level
    blocks: int
    plan: int  # bytes of a plan
    dense: Dense
    widths: NDArray[np.uint8] | None  # keeps memory alive
    layouts: dict[tuple[int, ...], _Layout] = field(default_factory=dict)  # by the levels that calls want

    def lay_out(self, wanted: tuple[int, ...]) -> _Layout:
        """Worked out once."""
        places, room = [], 0
        for level in sorted(set(wanted)):
            places.append((level, room))
            room += self.sizes[level]
        return self.layouts.setdefault(wanted, _Layout(tuple(places), room))


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
        if type(levels) is not int or levels not in (1, 2, 3):
            raise ConfigError(f"hq: levels must be 1, 2 or 3, not {levels!r}")
        if levels == 3 and self._key_bits == self._value_bits == 8:
            raise ConfigError("hq: an 8-bit anchor leaves nothing for a middle level; use levels=2 or levels=1")
        self._levels = levels
        self._every = tuple(range(levels))
        self._jobs: dict[tuple[Any, ...], _Job] = {}

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
        return _HEADER.size + min(spec.nbytes, (2 * blocks if self._fold else 0) + octets * free)

    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """See :meth:`Codec.encode`. The payloads of a call lie in one piece of memory, which any of them keeps."""
        job = self._job(spec)
        wanted = self._every if levels is None else tuple(levels)
        layout = job.layouts.get(wanted)
        if layout is None:
            if not set(wanted) <= set(self._every):
                raise SpecError(f"hq: levels {list(wanted)} of a codec with {self._levels}")
            layout = job.lay_out(wanted)
        own = workspace(job.plan)
        view = own.view if job.dense.fill(own.view, array) else view_of(spec, array)
        outcome, memory = self._encode(job, view, layout, own, threads)
        if outcome != _OK:
            if outcome == lib.LYNX_UNDECIDED:  # what the ranks take at most does not tell whether the tile would grow
                more = job.lay_out((*wanted, self._levels - 1))  # that comes last, behind what is wanted
                outcome, memory = self._encode(job, view, more, own, threads)
            if outcome == lib.LYNX_STORED:
                return [self._stored(job, spec, view, level) for level in wanted]
            check(outcome)
        sizes = own.sizes
        if wanted:
            last, place = layout.places[-1]
            memory.resize(place + sizes[last], refcheck=False)  # gives back what was not needed
        whole = memory.data
        if len(wanted) == 1:
            return [whole]
        places = dict(layout.places)
        return [whole[places[i] : places[i] + sizes[i]] for i in wanted]

    @staticmethod
    def _encode(job: _Job, view: Any, layout: _Layout, own: Workspace, threads: int) -> tuple[int, NDArray[np.uint8]]:
        """LYNX_OK, LYNX_STORED or LYNX_UNDECIDED, and the levels' memory, of the sizes in ``own``.

        One piece of memory, because each takes longer to get and to give back than the call needs beside.
        """
        memory = np.empty(layout.room, np.uint8)
        start, levels = ffi.from_buffer(_OCTETS, memory), own.levels
        levels[0] = levels[1] = levels[2] = _NULL
        for level, place in layout.places:
            levels[level] = start + place
        if threads == 1 or (count := part_count(job.blocks, threads)) == 1:
            return _encode_tile(job.config, view, levels, own.sizes, own.plan, own.scratch), memory
        return _encode_parts(job, view, own, count), memory

    def decode(self, spec: ChunkSpec, levels: Sequence[Buffer], out: Any | None, *, threads: int = 1) -> DecodeState:
        """See :meth:`Codec.decode`. Without ``out`` sizes and tables are checked, and codes and ranks are not."""
        job = self._job(spec)
        if not 1 <= len(levels) <= self._levels:
            raise SpecError(f"hq: got {len(levels)} levels of a codec with {self._levels}")
        own = workspace(job.plan)
        plan, fault, addresses, sizes = own.plan, own.fault, own.levels, own.sizes
        view = None
        if out is not None:
            view = own.view if job.dense.fill(own.view, out) else view_of(spec, out, writable=True)
        held = []  # payloads, which nobody may resize meanwhile
        for level, payload in enumerate(levels):
            octets = np.frombuffer(payload, np.uint8)  # not ffi.from_buffer alone: cycles may crash it
            held.append(octets)
            addresses[level] = ffi.from_buffer(_OCTETS, octets)
            sizes[level] = octets.size
        count = 1 if threads == 1 or view is None else part_count(job.blocks, threads)
        if view is not None and count == 1:
            outcome = _decode_tile(job.config, addresses, sizes, len(held), view, plan, own.scratch, fault)
        else:
            outcome = lib.lynx_hq_open(job.config, addresses, sizes, len(held), plan, fault)
            if outcome == _OK and view is not None:
                outcome = _decode_parts(job, view, own, count)
        if outcome != _OK:
            if outcome != lib.LYNX_STORED:
                self._fail(outcome, fault, job, sizes)
            if view is not None:
                scatter(spec, view, addresses[0] + _HEADER.size)
        return DecodeState(len(levels) - 1, tuple(levels))

    @staticmethod
    def _fail(outcome: int, fault: Any, job: _Job, sizes: Any) -> NoReturn:
        """Raise what a fault means."""
        if outcome in (lib.LYNX_ERR_ARGUMENT, lib.LYNX_ERR_SPACE):
            check(outcome)
        text = error_text(outcome)
        if outcome == lib.LYNX_ERR_LEVEL:
            text = f"the payload is of level {fault.expected}"
        if fault.section >= 0:
            where = f"{_SECTIONS[fault.section]} of block {fault.block} of {job.blocks}, byte offset {fault.offset}"
        else:
            where = f"byte offset {fault.offset}"
            if outcome in (lib.LYNX_ERR_TRUNCATED, lib.LYNX_ERR_PADDED):
                text += f": {sizes[fault.level]} bytes, its header and the tile make {fault.expected}"
        raise PayloadError(f"hq level {fault.level}: {text} ({where})")

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

    def _job(self, spec: ChunkSpec) -> _Job:
        """The library's view of this config for tiles like this one."""
        place = () if self._table is None else (spec.layer, spec.head_start)  # that widths depend on
        key = (spec.part, spec.dtype, spec.heads, spec.tokens, spec.head_dim, place)
        job = self._jobs.get(key)
        if job is None:
            self._check_support(spec)
            if len(self._jobs) >= _MAX_JOBS:
                self._jobs.clear()
            job = self._jobs[key] = self._make_job(spec)
        return job

    def _make_job(self, spec: ChunkSpec) -> _Job:
        config, bounds = ffi.new("lynx_hq_config *"), ffi.new("lynx_hq_bounds *")
        config.dtype, config.part = _DTYPES[spec.dtype], _PARTS[spec.part]
        config.heads, config.tokens, config.head_dim = spec.shape
        config.levels, config.fold, config.scaling = self._levels, self._fold, self._scaling
        widths = self._static_widths(spec)
        if widths is not None:
            widths = np.ascontiguousarray(widths)
            config.widths = address(widths, "const uint8_t *")
        config.range_bits = int(self._key_bits * spec.heads * spec.head_dim)
        code = lib.lynx_hq_measure(config, bounds)
        if code != lib.LYNX_OK:
            raise SpecError(f"hq cannot code a tile of shape {spec.shape}: {error_text(code)}")
        return _Job(config, tuple(bounds.level), int(bounds.blocks), int(bounds.plan), Dense(spec), widths)

    @staticmethod
    def _stored(job: _Job, spec: ChunkSpec, view: Any, level: int) -> Buffer:
        payload = np.empty(_HEADER.size + (spec.nbytes if level == 0 else 0), np.uint8)
        check(lib.lynx_hq_store(job.config, view, level, address(payload), ffi.new("uint64_t *")))
        return payload.data


def _encode_parts(job: _Job, view: Any, own: Workspace, count: int) -> int:
    """``lynx_hq_encode_tile`` on several threads."""
    plan, levels = own.plan, own.levels
    pieces = ffi.new(_PIECES, count)
    check(lib.lynx_hq_prepare(job.config, view, plan, own.scratch))

    def work(part: int, first: int, last: int) -> None:
        check(lib.lynx_hq_encode(plan, view, first, last, levels, pieces + part, workspace().scratch))

    parallel(work, job.blocks, count)
    return int(lib.lynx_hq_assemble(plan, levels, pieces, count, own.sizes))


def _decode_parts(job: _Job, view: Any, own: Workspace, count: int) -> int:
    """``lynx_hq_decode`` of all blocks on several threads: the first outcome that is not LYNX_OK, and its fault."""
    plan, faults = own.plan, ffi.new(_FAULTS, count)
    outcomes = [lib.LYNX_OK] * count

    def work(part: int, first: int, last: int) -> None:
        outcomes[part] = lib.lynx_hq_decode(plan, view, first, last, workspace().scratch, faults + part)

    parallel(work, job.blocks, count)
    part = next((i for i, outcome in enumerate(outcomes) if outcome != lib.LYNX_OK), 0)
    own.fault[0] = faults[part]
    return int(outcomes[part])


def _bits(name: str, bits: Any) -> float:
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 2 <= bits <= 8:
        raise ConfigError(f"hq: {name} must be a number from 2 to 8, not {bits!r}")
    return int(bits) if bits == int(bits) else bits


def _mean(layers: Sequence[NDArray[np.uint8]]) -> float:
    return sum(int(layer.sum()) for layer in layers) / sum(layer.size for layer in layers)
