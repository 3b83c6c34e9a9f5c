"""Frames: the 64-byte header, and the body of every frame type. spec/wire-format.md says the same in tables.

A frame is ``header | extension | payload``. The extension exists only in DATA frames of explicit token sets. The
payload of DATA is a codec's; that of all other types is one CBOR map (:mod:`lynxproto._cbor`).
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from random import Random
from typing import Any, ClassVar, Final, NamedTuple, Self

import numpy as np
import xxhash

from lynxproto import _cbor
from lynxproto.chunk import PARTS, Tile, TokenSet
from lynxproto.config import MAX_LEVELS, Limits
from lynxproto.digest import DIGEST_SIZE, crc32c
from lynxproto.errors import CorruptFrameError, ErrorCode, LimitError, ProtocolError, SpecError, VersionError
from lynxproto.manifest import MAX_WANTS, FetchKey, Want

HEADER_SIZE: Final = 64
MAGIC: Final = b"\xabLYX"
VERSION: Final = 1
#: Payloads before the handshake is over; spec/wire-format.md, "Limits".
MAX_HELLO: Final = 16 * 1024

#: Types with this bit are skipped by a reader that does not know them; others must be understood.
IGNORABLE_TYPE: Final = 0x8000
#: Flag bits that a reader must understand (none is defined in version 1); the others may be ignored.
CRITICAL_FLAGS: Final = 0xFF00

#: The fields of the header in the order of their bytes, each with its code in :mod:`struct`; all little-endian.
#: spec/wire-format.md and spec/lynx.ksy are compared with this table.
HEADER_FIELDS: Final = (
    ("magic", "4s"), ("version", "B"), ("header_length", "B"), ("type", "H"), ("flags", "H"), ("part", "B"),
    ("level", "B"), ("payload_length", "I"), ("transfer", "16s"), ("layer", "H"), ("attempt", "B"), ("reserved", "B"),
    ("head_start", "H"), ("heads", "H"), ("token_start", "I"), ("token_stop", "I"), ("codec_id", "H"), ("codec", "H"),
    ("extension_length", "I"), ("payload_crc", "I"), ("header_crc", "I"),
)  # fmt: skip
_LAYOUT = struct.Struct("<" + "".join(code for _, code in HEADER_FIELDS))
assert _LAYOUT.size == HEADER_SIZE


class FrameType(IntEnum):
    """Wire numbers of frame types; spec/wire-format.md, "Frame types"."""

    HELLO = 1
    HELLO_ACK = 2
    OPEN = 3
    ACCEPT = 4
    REJECT = 5
    FETCH = 6
    NOT_FOUND = 7
    PLAN = 8
    DATA = 9
    RESULT = 10
    END = 11
    ACK = 12
    NACK = 13
    CREDIT = 14
    RESUME = 15
    CANCEL = 16
    CLOSED = 17
    URGENT = 18
    PING = 19
    PONG = 20
    ERROR = 21
    GOAWAY = 22


_KNOWN_TYPES = frozenset(int(t) for t in FrameType)


def grease_type(random: Random) -> int:
    """A reserved frame type, ``0x8000 + 31 n + 27``: never defined, always skipped (as RFC 9000, section 18.1)."""
    return IGNORABLE_TYPE + 31 * random.randrange(1024) + 27


class TileKey(NamedTuple):
    """A tile as DATA headers and PLAN entries name it; ``bitmap`` is b"" for a token range."""

    layer: int
    part: int
    head_start: int
    heads: int
    token_start: int
    token_stop: int
    codec: int
    bitmap: bytes

    @classmethod
    def of(cls, tile: Tile) -> TileKey:
        """The key of ``tile``."""
        t = tile.tokens
        part = PARTS.index(tile.part)
        return cls(tile.layer, part, tile.head_start, tile.heads, t.start, t.stop, tile.codec, _bitmap(t))

    @property
    def positions(self) -> int:
        """How many explicit token positions :meth:`tile` would list (0 for a range). Cheap; check it first."""
        return int.from_bytes(self.bitmap, "little").bit_count()

    def tile(self) -> Tile:
        """The tile. Raises :class:`~lynxproto.errors.ProtocolError` for a key that describes none."""
        try:
            if self.bitmap:
                bits = np.unpackbits(np.frombuffer(self.bitmap, np.uint8), bitorder="little")
                positions = (np.flatnonzero(bits) + self.token_start).tolist()
                tokens = TokenSet(self.token_start, self.token_stop, tuple(positions))
            else:
                tokens = TokenSet(self.token_start, self.token_stop)
        except SpecError as error:
            raise ProtocolError(f"tile of layer {self.layer}: {error}") from error
        return Tile(self.layer, PARTS[self.part], self.head_start, self.heads, tokens, self.codec)

    def as_list(self) -> list[Any]:
        """``[part, head_start, heads, token_start, token_stop, codec]``, then the bitmap if there is one."""
        numbers = [self.part, self.head_start, self.heads, self.token_start, self.token_stop, self.codec]
        return [*numbers, self.bitmap] if self.bitmap else numbers

    @classmethod
    def from_list(cls, layer: int, value: Any, what: str) -> TileKey:
        """Decode :meth:`as_list`'s form."""
        if type(value) is not list or not 6 <= len(value) <= 7 or set(map(type, value[:6])) != {int}:
            raise ProtocolError(f"{what}: a tile must be a list of 6 integers and perhaps a bitmap")
        bitmap = value[6] if len(value) == 7 else b""
        if type(bitmap) is not bytes or (len(value) == 7 and not bitmap):
            raise ProtocolError(f"{what}: the bitmap of a tile must be a non-empty byte string")
        part, head_start, heads, token_start, token_stop, codec = value[:6]
        key = cls(layer, part, head_start, heads, token_start, token_stop, codec, bitmap)
        key.check(what)
        return key

    def check(self, what: str) -> None:
        """Raise :class:`~lynxproto.errors.ProtocolError` unless the fields can describe a tile."""
        tokens = self.token_stop - self.token_start
        if not (
            0 <= self.part < len(PARTS)
            and 0 <= self.head_start <= 0xFFFF
            and 1 <= self.heads <= 0xFFFF
            and 0 <= self.token_start < self.token_stop <= 0xFFFFFFFF
            and 0 <= self.codec <= 0xFFFF
        ):
            raise ProtocolError(f"{what}: fields out of range in {self.as_list()[:6]}")
        if self.bitmap:
            spare = len(self.bitmap) * 8 - tokens
            if not 0 <= spare < 8 or not self.bitmap[0] & 1 or self.bitmap[-1].bit_length() != 8 - spare:
                raise ProtocolError(f"{what}: the bitmap does not span tokens [{self.token_start}, {self.token_stop})")
            if self.positions == tokens:
                raise ProtocolError(f"{what}: a contiguous token set comes as a range, not as a bitmap")


def _bitmap(tokens: TokenSet) -> bytes:
    if tokens.positions is None:
        return b""
    bits = np.zeros(tokens.stop - tokens.start, np.uint8)
    bits[np.asarray(tokens.positions) - tokens.start] = 1
    return np.packbits(bits, bitorder="little").tobytes()


class Header(NamedTuple):
    """The fixed header. ``type`` may be unknown. The chunk fields are 0 except in DATA frames."""

    type: int
    transfer: int = 0
    payload_length: int = 0
    payload_crc: int = 0
    flags: int = 0
    layer: int = 0
    part: int = 0
    level: int = 0
    attempt: int = 0
    head_start: int = 0
    heads: int = 0
    token_start: int = 0
    token_stop: int = 0
    codec_id: int = 0
    codec: int = 0
    extension_length: int = 0

    def pack(self) -> bytes:
        """The 64 bytes, with their CRC32C."""
        head = _LAYOUT.pack(
            MAGIC, VERSION, HEADER_SIZE // 8, self.type, self.flags, self.part, self.level, self.payload_length,
            self.transfer.to_bytes(16, "big"), self.layer, self.attempt, 0, self.head_start, self.heads,
            self.token_start, self.token_stop, self.codec_id, self.codec, self.extension_length, self.payload_crc, 0,
        )[:60]  # fmt: skip
        return head + crc32c(head).to_bytes(4, "little")

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Header:
        """Decode and verify 64 bytes.

        Raises :class:`~lynxproto.errors.CorruptFrameError` for a wrong magic or CRC32C and
        :class:`~lynxproto.errors.VersionError` for another version.
        """
        (
            magic, version, units, kind, flags, part, level, length, transfer, layer, attempt, _reserved, head_start,
            heads, token_start, token_stop, codec_id, codec, extension, payload_crc, header_crc,
        ) = _LAYOUT.unpack(data)  # fmt: skip
        if magic != MAGIC:
            raise CorruptFrameError(f"not a lynxproto frame: magic is {magic.hex(' ')}, expected {MAGIC.hex(' ')}")
        if crc32c(memoryview(data)[:60]) != header_crc:
            raise CorruptFrameError(f"header CRC32C is wrong (frame type {kind})")
        if version != VERSION or units != HEADER_SIZE // 8:
            raise VersionError(
                f"frame of version {version} with a header of {units * 8} bytes; this side speaks 1 (64)"
            )
        return cls(
            kind, int.from_bytes(transfer, "big"), length, payload_crc, flags, layer, part, level, attempt,
            head_start, heads, token_start, token_stop, codec_id, codec, extension,
        )  # fmt: skip

    @property
    def known(self) -> bool:
        """Whether this version defines the type."""
        return self.type in _KNOWN_TYPES

    @property
    def _name(self) -> str:
        return FrameType(self.type).name if self.known else f"type {self.type:#06x}"

    def check(self, limits: Limits) -> None:
        """Enforce ``limits`` and the critical bits, before a byte is allocated for this frame.

        Raises :class:`~lynxproto.errors.LimitError` or :class:`~lynxproto.errors.ProtocolError`.
        """
        if not self.known and not self.type & IGNORABLE_TYPE:
            raise ProtocolError(f"unknown critical frame {self._name}", ErrorCode.UNKNOWN_CRITICAL)
        if self.flags & CRITICAL_FLAGS:
            text = f"{self._name} frame: unknown critical flags {self.flags:#06x}"
            raise ProtocolError(text, ErrorCode.UNKNOWN_CRITICAL)
        limit = limits.frame_bytes if self.type == FrameType.DATA else limits.control_bytes
        if self.payload_length > limit:
            error = LimitError(f"{self._name} frame: payload of {self.payload_length} bytes, limit {limit}")
            error.code = ErrorCode.FRAME_TOO_LARGE
            raise error
        if self.type != FrameType.DATA:
            if self.extension_length:
                raise ProtocolError(f"{self._name} frame: only DATA may have a header extension")
            return
        if self.level >= MAX_LEVELS or self.attempt > 1 or not self.payload_length:
            raise ProtocolError(f"DATA frame: level {self.level}, attempt {self.attempt}, {self.payload_length} bytes")
        span = self.token_stop - self.token_start
        if span > limits.tokens:
            raise LimitError(f"DATA frame: {span} tokens, limit {limits.tokens}")
        if self.extension_length not in (0, (span + 7) // 8 + 4):
            raise ProtocolError(f"DATA frame: extension of {self.extension_length} bytes for {span} tokens")
        if not self.extension_length:
            self.key(b"").check("DATA frame")

    def key(self, bitmap: bytes) -> TileKey:
        """The tile that a DATA frame belongs to."""
        span = (self.token_start, self.token_stop)
        return TileKey(self.layer, self.part, self.head_start, self.heads, *span, self.codec, bitmap)


def grease_frame(random: Random) -> bytes:
    """A frame of a reserved type, with any ignorable flags and a small payload."""
    payload = random.randbytes(random.randrange(32))
    flags = random.randrange(256)
    header = Header(grease_type(random), random.getrandbits(128), len(payload), crc32c(payload), flags)
    return header.pack() + payload


def ballast_frame(nbytes: int) -> bytes:
    """A frame of a reserved type with ``nbytes`` bytes that mean nothing: what measures a link."""
    payload = bytes(nbytes)
    return Header(grease_type(Random(0)), 0, nbytes, crc32c(payload)).pack() + payload


def data_frame(
    transfer: int,
    key: TileKey,
    level: int,
    payload: memoryview,
    *,
    attempt: int,
    codec_id: int,
    crc: int | None = None,
) -> list[memoryview]:
    """Header (with extension) and payload of a DATA frame; the payload is not copied. ``crc``: its CRC32C, if known."""
    extension = b""
    if key.bitmap:
        extension = key.bitmap + crc32c(key.bitmap).to_bytes(4, "little")
    if crc is None:
        crc = crc32c(payload)
    header = Header(
        FrameType.DATA, transfer, payload.nbytes, crc, 0, key.layer, key.part, level, attempt,
        key.head_start, key.heads, key.token_start, key.token_stop, codec_id, key.codec, len(extension),
    )  # fmt: skip
    return [memoryview(header.pack() + extension), payload]


def parse_extension(data: bytes | bytearray | memoryview) -> bytes:
    """The token bitmap of a header extension. Raises :class:`~lynxproto.errors.CorruptFrameError`."""
    bitmap = bytes(data[:-4])
    if crc32c(bitmap) != int.from_bytes(data[-4:], "little"):
        raise CorruptFrameError("CRC32C of the header extension is wrong")
    return bitmap


# --- bodies


class Body(ABC):
    """Base of the bodies of control frames: ``TYPE``, ``_to_map``, ``_from_fields``."""

    __slots__ = ()
    TYPE: ClassVar[FrameType]

    @abstractmethod
    def _to_map(self) -> dict[str, Any]:
        """The CBOR map, without grease."""

    @classmethod
    @abstractmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Self:
        """Decode, checking types and bounds."""


def control_frame(body: Body, transfer: int = 0, grease: Random | None = None) -> bytes:
    """One control frame; with ``grease``, now and then with a reserved parameter or flag in it."""
    fields_ = body._to_map()
    flags = 0
    if grease is not None and grease.random() < 1 / 16:
        fields_[f"grease-{grease.randrange(1 << 16):04x}"] = grease.randrange(1 << 16)
        flags = 1 << grease.randrange(8)
    payload = _cbor.dumps(fields_)
    return Header(body.TYPE, transfer, len(payload), crc32c(payload), flags).pack() + payload


def parse_body(header: Header, payload: bytes | bytearray | memoryview, limits: Limits) -> Body:
    """Decode the payload of a known control frame. Raises :class:`~lynxproto.errors.ProtocolError`."""
    cls = _BODIES[header.type]
    f = _cbor.loads(payload, cls.TYPE.name)
    body = cls._from_fields(f, limits)
    f.done()
    return body


def _code(f: _cbor.Fields) -> ErrorCode:
    code = f.integer("code", 0, 0xFFFF)
    return ErrorCode(code) if code in ErrorCode._value2member_map_ else ErrorCode.INTERNAL


def _limits_from(f: _cbor.Fields) -> Limits:
    values = {item.name: f.integer(item.name, 1, default=item.default) for item in fields(Limits)}
    f.done()
    values["frame_bytes"] = min(values["frame_bytes"], (1 << 32) - 1)
    try:
        return Limits(**values)
    except ValueError as error:
        raise ProtocolError(f"HELLO: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Body):
    """First frame of each side on each stripe."""

    TYPE = FrameType.HELLO
    versions: tuple[int, int]
    nonce: bytes
    stripe: int
    """The client's number of this stripe; the server repeats it."""
    name: str
    lease: float
    limits: Limits
    codecs: tuple[str, ...]
    features: tuple[str, ...]
    session: bytes = b""
    """Client: the session to join, or b"" for a new one. Server: the session."""
    token: bytes = b""
    """Server, in a new session: the join token that later stripes must know."""
    alive: tuple[int, ...] = ()
    """Client: its other stripes that are alive; the server drops those that are not listed."""
    secret: str = ""
    """Client: id of the shared secret that it will prove to know."""

    def _to_map(self) -> dict[str, Any]:
        return {
            "versions": list(self.versions),
            "nonce": self.nonce,
            "stripe": self.stripe,
            "name": self.name,
            "lease": self.lease,
            "limits": asdict(self.limits),
            "codecs": list(self.codecs),
            "features": list(self.features),
            "session": self.session,
            "token": self.token,
            "alive": list(self.alive),
            "secret": self.secret,
        }

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Hello:
        low, high = f.integers("versions", 2, 0, 255)
        lease = f.number("lease")
        if not 0 < lease < 1e9:
            raise ProtocolError(f"HELLO: lease of {lease} s")
        hello = cls(
            versions=(low, high),
            nonce=f.data("nonce", 32, 32),
            stripe=f.integer("stripe", 0, 1 << 32),
            name=f.text("name", 256),
            lease=lease,
            limits=_limits_from(f.mapping("limits")),
            codecs=f.texts("codecs", 256),
            features=f.texts("features", 256),
            session=f.data("session", 0, 16),
            token=f.data("token", 0, 32),
            alive=f.integers("alive", None, 0, 1 << 32, limit=1024),
            secret=f.text("secret", 64, default=""),
        )
        if len(hello.session) not in (0, 16):
            raise ProtocolError("HELLO: a session id has 16 bytes")
        return hello


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloAck(Body):
    """The version chosen, and the proof that the sender knows the shared secret and the join token."""

    TYPE = FrameType.HELLO_ACK
    version: int
    mac: bytes

    def _to_map(self) -> dict[str, Any]:
        return {"version": self.version, "mac": self.mac}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> HelloAck:
        return cls(version=f.integer("version", 0, 255), mac=f.data("mac", 32, 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Body):
    """A manifest (as CBOR of its own), the FETCH that it answers, if any, and the secret by which it may be resumed."""

    TYPE = FrameType.OPEN
    manifest: bytes
    fetch: int | None = None
    resume: bytes = b""

    def _to_map(self) -> dict[str, Any]:
        fetch = b"" if self.fetch is None else self.fetch.to_bytes(16, "big")
        return {"manifest": self.manifest, "fetch": fetch, "resume": self.resume}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Open:
        fetch = f.data("fetch", 0, 16)
        if len(fetch) not in (0, 16):
            raise ProtocolError("OPEN: a request id has 16 bytes")
        resume = f.data("resume", 0, RESUME_KEY_SIZE, default=b"")
        if len(resume) not in (0, RESUME_KEY_SIZE):
            raise ProtocolError(f"OPEN: a resume key has {RESUME_KEY_SIZE} bytes")
        manifest = f.data("manifest", 1, limits.control_bytes)
        return cls(manifest=manifest, fetch=int.from_bytes(fetch, "big") if fetch else None, resume=resume)


TILE_STATUS_SIZE: Final = 3
#: So many tiles are sooner compared one by one.
_FEW: Final = 64
#: Bytes of the secret in OPEN by which a sender may resume the transfer in another session.
RESUME_KEY_SIZE: Final = 32


class TileStatus(NamedTuple):
    """What a receiver has of one tile, as masks of levels."""

    received: int = 0
    applied: int = 0
    attempt: int = 0
    verified: bool = False

    def pack(self) -> bytes:
        """3 bytes: ``received, applied, attempt | verified << 1``."""
        return bytes((self.received, self.applied, self.attempt | self.verified << 1))


class LayerStatus(NamedTuple):
    """What a receiver has of one layer: ``packed`` is 3 bytes a tile in plan order, empty while the plan is unknown.

    It stays packed because an ACK of one chunk repeats its whole layer: only what changed is ever unpacked.
    """

    layer: int
    planned: bool
    ended: bool
    packed: bytes

    @property
    def tiles(self) -> tuple[TileStatus, ...]:
        """All tiles, unpacked."""
        return tuple(self.tile(i) for i in range(len(self.packed) // TILE_STATUS_SIZE))

    def tile(self, place: int) -> TileStatus:
        """One tile, by its place in the plan."""
        received, applied, rest = self.packed[TILE_STATUS_SIZE * place : TILE_STATUS_SIZE * (place + 1)]
        return TileStatus(received, applied, rest & 1, bool(rest & 2))

    def changed(self, before: bytes) -> list[int]:
        """Places of the tiles that differ from an earlier status of as many tiles, or from nothing."""
        packed, tiles = self.packed, len(self.packed) // TILE_STATUS_SIZE
        if len(before) != len(packed):
            return list(range(tiles))
        if tiles <= _FEW:
            at = range(0, len(packed), TILE_STATUS_SIZE)
            return [
                i // TILE_STATUS_SIZE
                for i in at
                if packed[i : i + TILE_STATUS_SIZE] != before[i : i + TILE_STATUS_SIZE]
            ]
        new, old = np.frombuffer(packed, np.uint8), np.frombuffer(before, np.uint8)
        return sorted({int(at) // TILE_STATUS_SIZE for at in np.flatnonzero(new != old)})

    def as_list(self) -> list[Any]:
        """``[layer, planned | ended << 1, packed]``."""
        return [self.layer, self.planned | self.ended << 1, self.packed]

    @classmethod
    def from_list(cls, value: Any, what: str) -> LayerStatus:
        """Decode :meth:`as_list`'s form."""
        if type(value) is not list or [type(x) for x in value] != [int, int, bytes] or len(value[2]) % TILE_STATUS_SIZE:
            raise ProtocolError(f"{what}: a layer's status must be [layer, flags, 3 bytes a tile]")
        layer, flags, packed = value
        if not (0 <= layer <= 0xFFFF and 0 <= flags <= 0xFF):
            raise ProtocolError(f"{what}: a layer's status is of layer {layer} and has the flags {flags}")
        return cls(layer, bool(flags & 1), bool(flags & 2), packed)


class HeldLayer(NamedTuple):
    """What a receiver holds of one layer from another session: of each tile of a plan, so many of its lowest levels."""

    layer: int
    plan: bytes
    """:meth:`Plan.digest` of the plan that the tiles belong to."""
    levels: bytes
    """One byte a tile, in plan order."""

    def as_list(self) -> list[Any]:
        """The wire form."""
        return list(self)

    @classmethod
    def from_list(cls, value: Any) -> HeldLayer:
        """Decode :meth:`as_list`'s form."""
        if type(value) is not list or [type(item) for item in value] != [int, bytes, bytes]:
            raise ProtocolError("ACCEPT: field 'held' holds something else than [layer, plan, levels]")
        layer = cls(*value)
        if not 0 <= layer.layer <= 0xFFFF or len(layer.plan) != 16 or max(layer.levels, default=0) > MAX_LEVELS:
            raise ProtocolError(f"ACCEPT: held layer {layer.layer}: a value is out of its range")
        return layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Status(Body):
    """What the receiver has, in all frames that say so (ACCEPT, ACK, RESUME). Cumulative: later ones add to earlier."""

    layers: tuple[LayerStatus, ...] = ()
    result: bool = False
    """RESULT arrived."""
    level: int = MAX_LEVELS - 1
    """The highest level that the receiver still wants."""
    settled: int = MAX_LEVELS - 1
    """The level of the last CLOSED that it has seen."""
    urgent: bool = False

    def _to_map(self) -> dict[str, Any]:
        layers = [layer.as_list() for layer in self.layers]
        state = {"result": self.result, "level": self.level, "settled": self.settled, "urgent": self.urgent}
        return {"layers": layers, **state}

    @staticmethod
    def _take(f: _cbor.Fields, limits: Limits) -> dict[str, Any]:
        layers = f.array("layers", limits.layers)
        return {
            "layers": tuple(LayerStatus.from_list(v, f.what) for v in layers),
            "result": f.flag("result"),
            "level": f.integer("level", 0, MAX_LEVELS - 1),
            "settled": f.integer("settled", 0, MAX_LEVELS - 1),
            "urgent": f.flag("urgent"),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack(Status):
    """Chunks applied, and all else that changed; layers that did not change are left out."""

    TYPE = FrameType.ACK

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Ack:
        return cls(**cls._take(f, limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Status):
    """The whole status and the wants, after a stripe was lost."""

    TYPE = FrameType.RESUME
    wants: tuple[Want, ...]

    def _to_map(self) -> dict[str, Any]:
        return {**Status._to_map(self), "want": [want.as_list() for want in self.wants]}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Self:
        wants = tuple(Want.from_list(v) for v in f.array("want", MAX_WANTS))
        return cls(wants=wants, **cls._take(f, limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept(Resume):
    """The same, with the transfer's first credit: memory is ready. ``held``: what it has from another session."""

    TYPE = FrameType.ACCEPT
    credit: tuple[int, ...]
    held: tuple[HeldLayer, ...] = ()

    def _to_map(self) -> dict[str, Any]:
        held = [layer.as_list() for layer in self.held]
        return {**Resume._to_map(self), "credit": list(self.credit), "held": held}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Self:
        wants = tuple(Want.from_list(v) for v in f.array("want", MAX_WANTS))
        credit = f.integers("credit", MAX_LEVELS)
        held = tuple(HeldLayer.from_list(v) for v in f.array("held", limits.layers, default=()))
        return cls(credit=credit, wants=wants, held=held, **cls._take(f, limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report(Body):
    code: ErrorCode
    text: str = ""

    def _to_map(self) -> dict[str, Any]:
        return {"code": int(self.code), "text": self.text[:1024]}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Self:
        return cls(code=_code(f), text=f.text("text"))


class Reject(_Report):
    """A transfer is refused before any data moved."""

    __slots__ = ()
    TYPE = FrameType.REJECT


class Error(_Report):
    """With transfer 0 the session has failed, otherwise that transfer."""

    __slots__ = ()
    TYPE = FrameType.ERROR


class GoAway(_Report):
    """The session ends now."""

    __slots__ = ()
    TYPE = FrameType.GOAWAY


class NotFound(_Report):
    """Nothing is held under the key of this FETCH."""

    __slots__ = ()
    TYPE = FrameType.NOT_FOUND


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(Body):
    """Ask for a cache by key; the header's transfer field holds the request id."""

    TYPE = FrameType.FETCH
    key: FetchKey
    wants: tuple[Want, ...]
    lease: float

    def _to_map(self) -> dict[str, Any]:
        return {
            "identity": self.key.identity,
            "blocks": list(self.key.blocks),
            "salt": self.key.salt,
            "want": [want.as_list() for want in self.wants],
            "lease": self.lease,
        }

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Fetch:
        key = FetchKey(
            identity=f.data("identity", 16, 16),
            blocks=f.blobs("blocks", limits.tokens, tuple(range(8, 33))),
            salt=f.data("salt", 0, 64),
        )
        lease = f.number("lease")
        if not 0 <= lease < 1e9:
            raise ProtocolError(f"FETCH: lease of {lease} s")
        return cls(key=key, wants=tuple(Want.from_list(v) for v in f.array("want", MAX_WANTS)), lease=lease)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Body):
    """The tiles of one layer and how many levels each has; fixed for the transfer's life."""

    TYPE = FrameType.PLAN
    layer: int
    tiles: tuple[TileKey, ...]
    levels: tuple[int, ...]

    def _to_map(self) -> dict[str, Any]:
        return {"layer": self.layer, "tiles": [key.as_list() for key in self.tiles], "levels": bytes(self.levels)}

    def digest(self) -> bytes:
        """16 bytes that name this plan: xxh3-128 of its deterministic CBOR, big-endian."""
        return xxhash.xxh3_128_digest(_cbor.dumps(self._to_map()))

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Plan:
        layer = f.integer("layer", 0, 0xFFFF)
        items = f.array("tiles", limits.tiles)
        tiles = tuple(TileKey.from_list(layer, v, f"PLAN of layer {layer}") for v in items)
        levels = tuple(f.data("levels", len(tiles), len(tiles)))
        if any(not 1 <= n <= MAX_LEVELS for n in levels):
            raise ProtocolError(f"PLAN of layer {layer}: a tile has 1 to {MAX_LEVELS} levels")
        return cls(layer=layer, tiles=tiles, levels=levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Body):
    """Prefill's first token, and the gap between its two largest logits if it is known."""

    TYPE = FrameType.RESULT
    first_token: int
    logit_gap: float | None

    def _to_map(self) -> dict[str, Any]:
        return {"token": self.first_token, "gap": self.logit_gap}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Result:
        return cls(first_token=f.integer("token", 0, 0xFFFFFFFF), logit_gap=f.number("gap", default=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Body):
    """Digests of a layer's tiles in plan order; b"" vouches for nothing."""

    TYPE = FrameType.END
    layer: int
    digests: tuple[bytes, ...]

    def _to_map(self) -> dict[str, Any]:
        return {"layer": self.layer, "digests": list(self.digests)}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> End:
        layer = f.integer("layer", 0, 0xFFFF)
        return cls(layer=layer, digests=f.blobs("digests", limits.tiles, (0, DIGEST_SIZE)))


class NackItem(NamedTuple):
    """One chunk that arrived corrupt for the ``times``-th time (or a tile that failed: ``level`` 0, attempt 1)."""

    key: TileKey
    level: int
    attempt: int
    times: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nack(Body):
    """Chunks to send again. A tile with ``attempt`` 1 is to be sent again whole."""

    TYPE = FrameType.NACK
    items: tuple[NackItem, ...]

    def _to_map(self) -> dict[str, Any]:
        return {"chunks": [[i.key.layer, i.key.as_list(), i.level, i.attempt, i.times] for i in self.items]}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Nack:
        items = []
        for value in f.array("chunks", 1 << 16):
            if type(value) is not list or [type(x) for x in value] != [int, list, int, int, int]:
                raise ProtocolError("NACK: a chunk must be [layer, tile, level, attempt, count]")
            layer, tile, level, attempt, count = value
            if not (0 <= layer <= 0xFFFF and 0 <= level < MAX_LEVELS and 0 <= attempt <= 1 and 1 <= count <= 0xFF):
                raise ProtocolError(f"NACK: layer {layer}, level {level}, attempt {attempt}, count {count}")
            items.append(NackItem(TileKey.from_list(layer, tile, "NACK"), level, attempt, count))
        return cls(items=tuple(items))


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit(Body):
    """Cumulative byte limits per class, of a transfer or (transfer 0) of the session."""

    TYPE = FrameType.CREDIT
    limits: tuple[int, ...]

    def _to_map(self) -> dict[str, Any]:
        return {"limits": list(self.limits)}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Credit:
        return cls(limits=f.integers("limits", MAX_LEVELS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Body):
    """The receiver wants no level above ``above`` (-1: nothing at all) any more."""

    TYPE = FrameType.CANCEL
    above: int
    code: ErrorCode
    text: str = ""

    def _to_map(self) -> dict[str, Any]:
        return {"above": self.above, "code": int(self.code), "text": self.text[:1024]}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Cancel:
        return cls(above=f.integer("above", -1, MAX_LEVELS - 1), code=_code(f), text=f.text("text"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed(Body):
    """The sender's last word on levels above ``level`` (all levels if ``end``): what they cost in credit."""

    TYPE = FrameType.CLOSED
    level: int
    end: bool
    final: tuple[int, ...]
    """Bytes charged per class over the transfer's life; final for classes above ``level``, for all if ``end``."""
    code: ErrorCode
    text: str = ""

    def _to_map(self) -> dict[str, Any]:
        final = list(self.final)
        return {"level": self.level, "end": self.end, "final": final, "code": int(self.code), "text": self.text[:1024]}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Closed:
        return cls(
            level=f.integer("level", 0, MAX_LEVELS - 1),
            end=f.flag("end"),
            final=f.integers("final", MAX_LEVELS),
            code=_code(f),
            text=f.text("text"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Urgent(Body):
    """Promote this transfer's residual."""

    TYPE = FrameType.URGENT

    def _to_map(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Urgent:
        return cls()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping(Body):
    """Answer with PONG on the same stripe; with ``probe``, after an ACK of each transfer being received."""

    TYPE = FrameType.PING
    id: int
    probe: bool

    def _to_map(self) -> dict[str, Any]:
        return {"id": self.id, "probe": self.probe}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Ping:
        return cls(id=f.integer("id"), probe=f.flag("probe"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong(Body):
    """The answer to the PING with this id."""

    TYPE = FrameType.PONG
    id: int

    def _to_map(self) -> dict[str, Any]:
        return {"id": self.id}

    @classmethod
    def _from_fields(cls, f: _cbor.Fields, limits: Limits) -> Pong:
        return cls(id=f.integer("id"))


_BODIES: Final[dict[int, type[Body]]] = {
    cls.TYPE: cls
    for cls in (
        Hello, HelloAck, Open, Accept, Reject, Fetch, NotFound, Plan, Result, End, Ack, Nack, Credit, Resume, Cancel,
        Closed, Urgent, Ping, Pong, Error, GoAway,
    )
}  # fmt: skip


def check_cover(what: str, keys: Iterable[TileKey], parts: Sequence[int], heads: range, tokens: range) -> None:
    """Check that ``keys`` cover ``heads`` times ``tokens`` of each of ``parts`` exactly once.

    Raises :class:`~lynxproto.errors.ProtocolError` for gaps, overlaps and tiles outside; the work is bounded.
    """
    runs: dict[int, list[tuple[int, int, int, int]]] = {part: [] for part in parts}
    work = 0
    for key in keys:
        if key.part not in runs or key.head_start < heads.start or key.head_start + key.heads > heads.stop:
            raise ProtocolError(f"{what}: tile {key.as_list()[:6]} lies outside the layer")
        stop = key.head_start + key.heads
        spans = _runs(key)
        work += len(spans) * key.heads
        if work > 1 << 24:
            raise LimitError(f"{what}: more than {1 << 24} runs of tokens and heads")
        runs[key.part].extend((first, last, key.head_start, stop) for first, last in spans)
    for part, found in runs.items():
        reached = [tokens.start] * len(heads)
        for first, last, head_start, head_stop in sorted(found):
            for head in range(head_start - heads.start, head_stop - heads.start):
                if reached[head] != first:
                    kind = "overlap at" if reached[head] > first else "leave a gap before"
                    raise ProtocolError(
                        f"{what}: tiles of {PARTS[part]} {kind} token {first}, head {head + heads.start}"
                    )
                reached[head] = last
        for head, stop in enumerate(reached):
            if stop != tokens.stop:
                where = f"head {head + heads.start} of {PARTS[part]} up to token {stop}, the layer has {tokens.stop}"
                raise ProtocolError(f"{what}: tiles cover {where}")


def _runs(key: TileKey) -> list[tuple[int, int]]:
    if not key.bitmap:
        return [(key.token_start, key.token_stop)]
    bits = np.unpackbits(np.frombuffer(key.bitmap, np.uint8), bitorder="little").astype(np.int8)
    edges = np.flatnonzero(np.diff(bits, prepend=0, append=0)) + key.token_start
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
