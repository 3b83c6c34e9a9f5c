"""Cache objects: one self-contained piece of a KV cache (a chunk, a page), for stores that know bytes and names only.

An object is a capture (spec/capture.md, "Cache objects") of what a sender would say of a transfer: OPEN with its
manifest, a PLAN and an END for each layer, and DATA. So every byte is under a CRC32C, every tile under the digest of
its words, ``lynxproto inspect`` reads it, and no second format exists. It is exact: what it gives back is bit for bit
what went in, or an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

import xxhash

from lynxproto import _cbor, frames
from lynxproto.capture import (
    FILE_HEADER_SIZE,
    RECORD_HEADER_SIZE,
    Direction,
    FileHeader,
    RecordHeader,
    RecordKind,
)
from lynxproto.chunk import PARTS, ChunkSpec, Part, TokenSet
from lynxproto.codecs import Buffer, Codec, get_codec
from lynxproto.config import Limits
from lynxproto.digest import DIGEST_SIZE, crc32c, tile_digest
from lynxproto.errors import (
    CodecError,
    ConfigError,
    CorruptObjectError,
    ForeignObjectError,
    LimitError,
    LynxError,
    PayloadError,
    ProtocolError,
    SpecError,
)
from lynxproto.frames import HEADER_SIZE, End, FrameType, Header, Open, Plan, TileKey
from lynxproto.manifest import LayerSpec, Manifest

__all__ = ["ObjectCodec", "object_size", "read_manifest"]

#: Words of a layer and part, ``[kv_heads, tokens, head_dim]``: arrays or CPU tensors, any strides that codecs take.
Views = Mapping[tuple[int, Part], Any]

_STORED: Final = "raw"
#: The record's length has 32 bits.
_MAX_FRAMES: Final = (1 << 32) - 1
_LIMITS: Final = Limits(frame_bytes=_MAX_FRAMES, layers=0xFFFF, tokens=0xFFFFFFFF)
#: Fewer bytes hold no object.
_MIN_SIZE: Final = FILE_HEADER_SIZE + RECORD_HEADER_SIZE
#: Codecs and shapes that are remembered.
_REMEMBERED: Final = 64


class _Tile(NamedTuple):
    """A whole part of a layer."""

    key: tuple[int, Part]
    spec: ChunkSpec

    def wire(self, codec: int) -> TileKey:
        tokens = self.spec.token_set
        assert tokens is not None
        return TileKey(
            self.key[0], PARTS.index(self.key[1]), self.spec.head_start, self.spec.heads, tokens.start, tokens.stop,
            codec, b"",
        )  # fmt: skip


def _tiles(manifest: Manifest) -> Mapping[int, Sequence[_Tile]]:
    """The tiles of an object by layer: each part of a layer is one."""
    return _tiles_of(manifest.dtype, manifest.layers)


@lru_cache(_REMEMBERED)
def _tiles_of(dtype: str, layers: tuple[LayerSpec, ...]) -> Mapping[int, Sequence[_Tile]]:
    return {
        layer.index: [
            _Tile(
                (layer.index, part),
                ChunkSpec(
                    part=part,
                    dtype=dtype,
                    heads=layer.kv_heads,
                    tokens=layer.tokens,
                    head_dim=layer.head_dim(part),
                    layer=layer.index,
                    head_start=layer.head_start,
                    token_set=TokenSet.range(layer.token_start, layer.token_stop),
                ),
            )
            for part in layer.parts
        ]
        for layer in layers
    }


class ObjectCodec:
    """Makes objects of caches, and caches of objects. Immutable, may be used from several threads at once.

    ``codec``: an exact codec for keys and values of bfloat16 and float16 (default: ``hq``, preset ``balanced``). What
    it does not take, Zstandard takes: bytes (fp8, opaque) as they are, larger words plane by plane, in whatever order
    they are. A tile that does not become smaller is stored as it is: an object is never larger than :meth:`bound`.
    ``threads``: of one call. Raises :class:`~lynxproto.errors.ConfigError` for a codec that is not exact.
    """

    def __init__(self, codec: Codec | None = None, *, threads: int = 1) -> None:
        self._codec = get_codec("hq", preset="balanced") if codec is None else codec
        if not self._codec.exact:
            raise ConfigError(f"objects are exact, {self._codec!r} is not")
        self._threads = threads

    def _for(self, spec: ChunkSpec) -> Codec:
        return self._codec if self._codec.supports(spec) else _general(spec.word_dtype.itemsize)

    def _configs(self, manifest: Manifest) -> list[Codec]:
        """All codecs that an object of ``manifest`` may name, in the order of their numbers."""
        found: list[Codec] = [get_codec(_STORED)]
        for tiles in _tiles(manifest).values():
            for tile in tiles:
                codec = self._for(tile.spec)
                if codec not in found:
                    found.append(codec)
        return found

    def bound(self, manifest: Manifest) -> int:
        """Bytes of the largest object of ``manifest``, whatever the words: its words' and some hundreds more."""
        codecs = self._configs(manifest)
        size = _MIN_SIZE + len(frames.control_frame(Open(manifest=_with(manifest, codecs).to_bytes())))
        for layer, tiles in _tiles(manifest).items():
            numbers = [(codecs.index(self._for(tile.spec)), tile) for tile in tiles]
            plan = Plan(layer=layer, tiles=tuple(t.wire(n) for n, t in numbers), levels=(1,) * len(tiles))
            size += len(frames.control_frame(plan))
            size += len(frames.control_frame(End(layer=layer, digests=(bytes(DIGEST_SIZE),) * len(tiles))))
            size += sum(HEADER_SIZE + tile.spec.nbytes for tile in tiles)
        return size

    def encode(self, manifest: Manifest, views: Views) -> list[memoryview]:
        """The object of ``manifest``, in pieces to be written one after the other (``os.writev``).

        ``manifest.codecs`` is set here; ``request_id`` should name the object, so that it is not taken for another.
        The same manifest and words give the same bytes. Some pieces may borrow the views' memory.

        Raises :class:`~lynxproto.errors.SpecError` for views that do not match, for a manifest that the wire format
        does not hold (names or dimensions too large), and if the object would be 4 GiB.
        """
        codecs = self._configs(manifest)
        by_layer = _tiles(manifest)
        expected = {tile.key for tiles in by_layer.values() for tile in tiles}
        if set(views) != expected:
            raise SpecError(f"views of {sorted(views)}, the manifest names {sorted(expected)}")
        named = _with(manifest, codecs).to_bytes()
        try:
            Manifest.from_bytes(named, _LIMITS)
        except (ProtocolError, LimitError) as error:
            raise SpecError(f"nobody could read such an object: {error}") from error
        transfer = xxhash.xxh3_128_intdigest(named)
        pieces = [memoryview(frames.control_frame(Open(manifest=named), transfer))]
        ends: list[memoryview] = []
        data: list[list[memoryview]] = []  # by level
        for layer, tiles in by_layer.items():
            wires, levels, digests = [], [], []
            for tile in tiles:
                codec, payloads = self._encode_tile(tile.spec, views[tile.key])
                wire = tile.wire(codecs.index(codec))
                wires.append(wire)
                levels.append(len(payloads))
                digests.append(tile_digest(tile.spec, views[tile.key]))
                for level, payload in enumerate(payloads):
                    while len(data) <= level:
                        data.append([])
                    body = memoryview(payload).cast("B")
                    data[level] += frames.data_frame(transfer, wire, level, body, attempt=0, codec_id=codec.wire_id)
            plan = Plan(layer=layer, tiles=tuple(wires), levels=tuple(levels))
            pieces.append(memoryview(frames.control_frame(plan, transfer)))
            ends.append(memoryview(frames.control_frame(End(layer=layer, digests=tuple(digests)), transfer)))
        pieces += [piece for level in data for piece in level] + ends
        length = sum(piece.nbytes for piece in pieces)
        if length > _MAX_FRAMES:
            raise SpecError(f"an object of {length} bytes; the limit is 4 GiB")
        head = FileHeader(0).pack() + RecordHeader(length, RecordKind.DATA, Direction.TO_SERVER, 0, 0).pack()
        return [memoryview(head), *pieces]

    def encode_into(self, buffer: Any, manifest: Manifest, views: Views) -> int:
        """:meth:`encode` into a writable buffer of bytes; returns how many. :meth:`bound` bytes are always enough.

        Raises :class:`~lynxproto.errors.SpecError` when it is too small, before anything is written.
        """
        target = memoryview(buffer).cast("B")
        pieces = self.encode(manifest, views)
        size = sum(piece.nbytes for piece in pieces)
        if size > target.nbytes:
            raise SpecError(f"the object has {size} bytes, the buffer {target.nbytes}")
        at = 0
        for piece in pieces:
            target[at : at + piece.nbytes] = piece
            at += piece.nbytes
        return size

    def _encode_tile(self, spec: ChunkSpec, view: Any) -> tuple[Codec, list[Buffer]]:
        codec = self._for(spec)
        payloads = codec.encode(spec, view, threads=self._threads)
        size = sum(memoryview(payload).nbytes for payload in payloads) + HEADER_SIZE * (len(payloads) - 1)
        if size < spec.nbytes and all(memoryview(payload).nbytes for payload in payloads):
            return codec, payloads
        stored = get_codec(_STORED)
        return stored, stored.encode(spec, view)

    def decode(self, data: Any, manifest: Manifest, views: Views) -> int:
        """Restore the object at the start of ``data`` into ``views``; returns its bytes (more may follow).

        ``manifest`` says what is expected: identity, dtype, layers, layout, packing, request id (``codecs`` is not
        compared: whatever exact codec made the object is asked to read it). Everything is checked before ``views`` are
        written, but for the digests of the words, which are compared after it.

        Raises :class:`~lynxproto.errors.ForeignObjectError` for an object of something else, and
        :class:`~lynxproto.errors.CorruptObjectError` for one that is damaged or cut off; ``views`` are then untouched
        or hold values that mean nothing. :class:`~lynxproto.errors.SpecError` is for views that do not match.
        """
        content = _Reader(data)
        manifest_, codecs = content.manifest()
        difference = _difference(manifest_, manifest)
        if difference:
            raise ForeignObjectError(f"the object is of something else: {difference}")
        by_layer = _tiles(manifest)
        expected = {tile.key for tiles in by_layer.values() for tile in tiles}
        if set(views) != expected:
            raise SpecError(f"views of {sorted(views)}, the manifest names {sorted(expected)}")
        for found in content.tiles(by_layer, codecs):
            view = views[found.key]
            try:
                found.codec.decode(found.spec, found.payloads, view, threads=self._threads)
            except PayloadError as error:
                raise CorruptObjectError(f"layer {found.key[0]}, {found.key[1]}: {error}") from error
            if tile_digest(found.spec, view) != found.digest:
                raise CorruptObjectError(f"layer {found.key[0]}, {found.key[1]}: the words do not match their digest")
        return content.size


@dataclass(slots=True)
class _Found:
    """A tile of an object that is read."""

    key: tuple[int, Part]
    spec: ChunkSpec
    codec: Codec
    levels: int
    payloads: list[memoryview]
    digest: bytes = b""


class _Reader:
    """The frames of an object, in their order. Raises only :class:`~lynxproto.errors.CorruptObjectError` and
    :class:`~lynxproto.errors.ForeignObjectError`."""

    def __init__(self, data: Any) -> None:
        self.size = object_size(data)
        self._frames = memoryview(data).cast("B")[_MIN_SIZE : self.size]
        self._at = 0
        self._transfer: int | None = None

    def _frame(self, what: str) -> tuple[Header, memoryview]:
        where = f"byte {_MIN_SIZE + self._at}"
        left = len(self._frames) - self._at
        if left < HEADER_SIZE:
            raise CorruptObjectError(f"{where}: {what} is missing, the frames end")
        try:
            header = Header.unpack(self._frames[self._at : self._at + HEADER_SIZE])
            header.check(_LIMITS)
        except LynxError as error:
            raise CorruptObjectError(f"{where}: {error}") from error
        if header.flags or header.extension_length or header.payload_length > left - HEADER_SIZE:
            raise CorruptObjectError(
                f"{where}: a frame of {header.payload_length} bytes, {left - HEADER_SIZE} are left"
            )
        if self._transfer is None:
            self._transfer = header.transfer
        elif header.transfer != self._transfer:
            raise CorruptObjectError(f"{where}: a frame of another transfer")
        start = self._at + HEADER_SIZE
        payload = self._frames[start : start + header.payload_length]
        if crc32c(payload) != header.payload_crc:
            raise CorruptObjectError(f"{where}: the CRC32C of a payload of {payload.nbytes} bytes is wrong")
        self._at = start + header.payload_length
        return header, payload

    def _control(self, kind: FrameType) -> Any:
        header, payload = self._frame(kind.name)
        if header.type != kind:
            raise CorruptObjectError(f"frame of type {header.type} where {kind.name} is due")
        try:
            return frames.parse_body(header, payload, _LIMITS)
        except ProtocolError as error:
            raise CorruptObjectError(str(error)) from error

    def manifest(self) -> tuple[Manifest, Sequence[Codec]]:
        """What OPEN says, and the codecs that it names."""
        opened = self._control(FrameType.OPEN)
        try:
            manifest = Manifest.from_bytes(opened.manifest, _LIMITS)
        except LimitError as error:
            raise ForeignObjectError(str(error)) from error
        except ProtocolError as error:
            raise CorruptObjectError(str(error)) from error
        try:
            codecs = [_codec(_cbor.dumps(config)) for config in manifest.codecs]
        except (CodecError, ConfigError) as error:
            raise ForeignObjectError(f"the object needs a codec that this side lacks: {error}") from error
        return manifest, codecs

    def tiles(self, by_layer: Mapping[int, Sequence[_Tile]], codecs: Sequence[Codec]) -> list[_Found]:
        """Everything after OPEN: all tiles, with payloads whose sizes are possible."""
        found: OrderedDict[TileKey, _Found] = OrderedDict()
        for layer, tiles in by_layer.items():
            plan = self._control(FrameType.PLAN)
            if plan.layer != layer or len(plan.tiles) != len(tiles):
                raise CorruptObjectError(f"PLAN of layer {plan.layer} with {len(plan.tiles)} tiles; due: {layer}")
            for wire, levels, tile in zip(plan.tiles, plan.levels, tiles, strict=True):
                if wire != tile.wire(wire.codec) or wire.codec >= len(codecs):
                    raise CorruptObjectError(
                        f"layer {layer}: the plan's tile {wire.as_list()[:6]} is not {tile.key[1]}"
                    )
                codec = codecs[wire.codec]
                if levels != codec.levels or not codec.exact or not codec.supports(tile.spec):
                    raise ForeignObjectError(
                        f"layer {layer}, {tile.key[1]}: {levels} levels of {codec!r} are not exact"
                    )
                found[wire] = _Found(tile.key, tile.spec, codec, levels, [])
        for level in range(max(tile.levels for tile in found.values())):
            for wire, tile_ in found.items():
                if level < tile_.levels:
                    tile_.payloads.append(self._data(wire, tile_, level))
        for layer in by_layer:
            end = self._control(FrameType.END)
            mine = [tile_ for tile_ in found.values() if tile_.key[0] == layer]
            if end.layer != layer or len(end.digests) != len(mine) or b"" in end.digests:
                raise CorruptObjectError(f"END of layer {end.layer} with {len(end.digests)} digests; due: {layer}")
            for tile_, digest in zip(mine, end.digests, strict=True):
                tile_.digest = digest
        if self._at != len(self._frames):
            raise CorruptObjectError(f"{len(self._frames) - self._at} bytes follow the last frame")
        return list(found.values())

    def _data(self, wire: TileKey, tile: _Found, level: int) -> memoryview:
        header, payload = self._frame("DATA")
        if (
            header.type != FrameType.DATA
            or header.key(b"") != wire
            or (header.level, header.attempt, header.codec_id) != (level, 0, tile.codec.wire_id)
        ):
            raise CorruptObjectError(f"layer {wire.layer}, {tile.key[1]}: level {level} is due, another frame is there")
        if payload.nbytes > tile.codec.max_encoded_size(tile.spec, level):
            raise CorruptObjectError(f"layer {wire.layer}, {tile.key[1]}: {payload.nbytes} bytes of level {level}")
        return payload


def object_size(data: Any) -> int:
    """Bytes of the object at the start of ``data`` (two headers say it; the rest is not looked at).

    Raises :class:`~lynxproto.errors.ForeignObjectError` for data that is no object, and
    :class:`~lynxproto.errors.CorruptObjectError` for one whose headers are damaged or that is cut off.
    """
    view = memoryview(data).cast("B")
    if view.nbytes < _MIN_SIZE:
        raise CorruptObjectError(f"{view.nbytes} bytes are no cache object; the smallest has more than {_MIN_SIZE}")
    try:
        FileHeader.unpack(view[:FILE_HEADER_SIZE])
        record = RecordHeader.unpack(view[FILE_HEADER_SIZE:_MIN_SIZE])
    except LynxError as error:
        raise CorruptObjectError(str(error)) from error
    if (record.kind, record.direction, record.stripe) != (RecordKind.DATA, Direction.TO_SERVER, 0):
        raise ForeignObjectError("a capture, but no cache object: it does not begin with the data of a sender")
    size = _MIN_SIZE + record.length
    if size > view.nbytes:
        raise CorruptObjectError(f"the object has {size} bytes and ends after {view.nbytes}")
    return size


def read_manifest(data: Any) -> Manifest:
    """What an object is of: its manifest. Raises as :meth:`ObjectCodec.decode`."""
    return _Reader(data).manifest()[0]


def _with(manifest: Manifest, codecs: Sequence[Codec]) -> Manifest:
    return replace(manifest, codecs=tuple(codec.get_config() for codec in codecs), lossy=False)


@lru_cache(_REMEMBERED)
def _codec(config: bytes) -> Codec:
    """The codec of a config (as CBOR). Those used lately are kept, and with them what they learnt of shapes."""
    return get_codec(_cbor.loads(config, "codec").raw)


@lru_cache(4)
def _general(itemsize: int) -> Codec:
    """What takes words of any meaning: compressed as they are if they are bytes, else plane by plane."""
    return get_codec("raw", zstd=1) if itemsize == 1 else get_codec("bitplane", planes=[8 * itemsize], zstd=1)


def _difference(found: Manifest, expected: Manifest) -> str | None:
    """What two manifests disagree on, as text; None if nothing."""
    mismatch = expected.identity.mismatch(found.identity)
    if mismatch:
        return mismatch
    for name in ("dtype", "request_id", "packing", "layout", "prompt_tokens", "shard_index", "shard_count", "lossy"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        if mine != theirs:
            return f"{name} is {mine!r}, expected {theirs!r}"
    if found.layers != expected.layers:
        return f"its layers are {_shapes(found)}, expected {_shapes(expected)}"
    return None


def _shapes(manifest: Manifest) -> str:
    shapes = [f"{tile.key[1]} {list(tile.spec.shape)}" for tiles in _tiles(manifest).values() for tile in tiles]
    return ", ".join(shapes[:4]) + (", ..." if len(shapes) > 4 else "")
