"""Headers, extensions and bodies: whatever the bytes, a body or a named error; and what was read can be said again."""

from __future__ import annotations

from lynxproto import _cbor
from lynxproto.config import Limits
from lynxproto.digest import crc32c
from lynxproto.errors import LynxError
from lynxproto.frames import HEADER_SIZE, MAGIC, FrameType, Header, Open, control_frame, parse_body, parse_extension
from lynxproto.manifest import Manifest

_LIMITS = Limits(layers=64, tokens=1 << 16, tiles=1 << 12, positions=1 << 16)


def run(data: bytes) -> None:
    """The first byte: 0, a raw header (and an extension behind it); else a body of that type, its CBOR behind it."""
    if not data:
        return
    kind, rest = data[0], data[1:]
    if kind == 0:
        _header(rest)
    elif kind in FrameType.__members__.values() and kind != FrameType.DATA:
        _body(FrameType(kind), rest)
    else:
        _cbor_map(rest)


def _header(data: bytes) -> None:
    """As it is, which a checksum mostly ends; and with its magic and checksum put right."""
    raw = data[:HEADER_SIZE].ljust(HEADER_SIZE, b"\0")
    head = MAGIC + raw[4:60]
    for form in (raw, head + crc32c(head).to_bytes(4, "little")):
        _one_header(form, data[HEADER_SIZE:])


def _one_header(raw: bytes, extension: bytes) -> None:
    try:
        header = Header.unpack(raw)
        header.check(_LIMITS)
        assert Header.unpack(header.pack()) == header
        if header.type == FrameType.DATA:
            bitmap = b""
            if header.extension_length:
                extension = extension[: header.extension_length - 4]
                bitmap = parse_extension(extension + crc32c(extension).to_bytes(4, "little"))
            key = header.key(bitmap)
            key.check("DATA")
            if key.positions <= _LIMITS.positions:
                key.tile()
    except LynxError:
        pass


def _body(kind: FrameType, payload: bytes) -> None:
    header = Header(type=kind, transfer=1, payload_length=len(payload))
    try:
        body = parse_body(header, payload, _LIMITS)
    except LynxError:
        return
    again = control_frame(body, 1)
    read = parse_body(Header.unpack(again[:HEADER_SIZE]), again[HEADER_SIZE:], _LIMITS)
    assert control_frame(read, 1) == again, f"{kind.name} does not survive being said again"
    if isinstance(body, Open):
        try:
            manifest = Manifest.from_bytes(body.manifest, _LIMITS)
        except LynxError:
            return
        assert Manifest.from_bytes(manifest.to_bytes(), _LIMITS) == manifest


def _cbor_map(data: bytes) -> None:
    try:
        _cbor.loads(data, "fuzz")
    except LynxError:
        pass
