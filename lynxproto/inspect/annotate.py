"""One frame field by field: offset, bytes, name, value and the section of the specification that defines it.

The header's fields are :data:`lynxproto.frames.HEADER_FIELDS`; those of control frames come from their bytes. Every
byte of a frame belongs to exactly one field.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from lynxproto.chunk import PARTS
from lynxproto.digest import crc32c
from lynxproto.errors import ErrorCode, ProtocolError
from lynxproto.frames import CRITICAL_FLAGS, HEADER_FIELDS, HEADER_SIZE, FrameType, TileKey
from lynxproto.inspect.context import CODEC_NAMES
from lynxproto.inspect.model import Frame, printable, type_name
from lynxproto.inspect.table import part_name

__all__ = ["Field", "annotate", "render"]

_HEADER: Final = "wire-format.md, Frame header"
_CBOR: Final = "wire-format.md, Control payloads"
_MANIFEST: Final = "wire-format.md, Manifest"
_GREASE: Final = "invariants.md, 6"
_MAX_DEPTH: Final = 16
#: Arrays of numbers up to this many bytes are one field.
_INLINE: Final = 48


@dataclass(frozen=True, slots=True)
class Field:
    """Bytes of a frame that mean one thing. ``offset`` counts from the frame's first byte."""

    offset: int
    raw: bytes
    name: str
    value: Any
    """Decoded, as plain data; None for bytes that only frame others."""
    text: str
    """The value, for people."""
    section: str
    """File and heading in spec/."""


def annotate(frame: Frame) -> list[Field]:
    """All fields of ``frame``, in order. Of a DATA payload there is as much as the frame holds."""
    fields = list(_header(frame))
    at = HEADER_SIZE
    if frame.extension:
        fields.extend(_extension(frame, at))
    at += frame.header.extension_length
    if frame.payload or frame.header.payload_length:
        fields.extend(_data(frame, at) if frame.is_data else _control(frame, at))
    return fields


# --- header


def _header(frame: Frame) -> Iterator[Field]:
    at = 0
    for name, code in HEADER_FIELDS:
        size = struct.calcsize("<" + code)
        raw = frame.raw_header[at : at + size]
        (value,) = struct.unpack("<" + code, raw)
        if name == "transfer":
            value = value.hex()
        explain = _EXPLAIN.get(name)
        text = explain(value, frame) if explain else str(value)
        yield Field(at, raw, name, value, text, _HEADER)
        at += size


def _flags(value: int, frame: Frame) -> str:
    if not value:
        return "0"
    kinds = [name for name, bits in (("critical", CRITICAL_FLAGS), ("ignorable", ~CRITICAL_FLAGS)) if value & bits]
    return f"{value:#06x} (unknown, {' and '.join(kinds)})"


def _payload_crc(value: int, frame: Frame) -> str:
    state = {"ok": "right", "bad": "does not match", "cut": "not checked: the frame is cut"}[frame.checksum]
    return f"{value:#010x} ({state})"


def _head_count(value: int, frame: Frame) -> str:
    first = frame.header.head_start
    return f"{value} (heads {first} to {first + value - 1})" if value else "0"


def _token_stop(value: int, frame: Frame) -> str:
    return f"{value} ({frame.tokens} tokens)" if frame.is_data else str(value)


_EXPLAIN: Final[dict[str, Callable[[Any, Frame], str]]] = {
    "magic": lambda v, f: repr(v),
    "header_length": lambda v, f: f"{v} (in 8 bytes: {v * 8})",
    "type": lambda v, f: f"{v} ({type_name(v) if f.header.known else 'not defined in version 1'})",
    "flags": _flags,
    "part": lambda v, f: f"{v} ({part_name(v)})" if f.is_data and v < len(PARTS) else str(v),
    "heads": _head_count,
    "token_stop": _token_stop,
    "codec_id": lambda v, f: f"{v} ({CODEC_NAMES.get(v, 'not defined in version 1')})" if f.is_data else str(v),
    "payload_crc": _payload_crc,
    "header_crc": lambda v, f: f"{v:#010x} (right)",
}


def _extension(frame: Frame, at: int) -> Iterator[Field]:
    bitmap, crc = frame.extension[:-4], frame.extension[-4:]
    yield Field(at, bitmap, "token_bitmap", bitmap, f"{frame.tokens} tokens of {len(bitmap) * 8} bits", _HEADER)
    said = int.from_bytes(crc, "little")
    state = "right" if crc32c(bitmap) == said else f"does not match: {crc32c(bitmap):#010x}"
    yield Field(at + len(bitmap), crc, "bitmap_crc", said, f"{said:#010x} ({state})", _HEADER)


def _data(frame: Frame, at: int) -> Iterator[Field]:
    h = frame.header
    size = h.payload_length
    shown = f", the first {len(frame.payload)} shown" if len(frame.payload) < size else ""
    text = f"level {h.level} of codec {frame.codec}, {size} bytes{shown}"
    name = CODEC_NAMES.get(h.codec_id)
    yield Field(at, frame.payload, "payload", frame.payload, text, f"codec-{name}.md" if name else "the codec's own")


# --- control frames


def _control(frame: Frame, at: int) -> Iterator[Field]:
    h = frame.header
    if not h.known:
        yield Field(at, frame.payload, "payload", frame.payload, "of an unknown type", _GREASE)
        return
    walker = _Walker(frame.payload, at, f"wire-format.md, {FrameType(h.type).name}")
    try:
        walker.item("", 0, 0)
        rest = "bytes that follow the map"
    except _BrokenError as error:
        rest = f"cannot be decoded: {error}"
    yield from walker.fields
    done = walker.done
    if done < len(frame.payload):
        raw = frame.payload[done:]
        yield Field(at + done, raw, "rest", raw, rest, _CBOR)


class _BrokenError(Exception):
    """CBOR that cannot be walked."""


class _Walker:
    """Walks CBOR (RFC 8949) and notes which bytes hold what."""

    def __init__(self, data: bytes, base: int, section: str) -> None:
        self.fields: list[Field] = []
        self.done = 0  # bytes that belong to a field
        self._data = data
        self._at = 0
        self._base = base
        self._section = section

    def item(self, name: str, start: int, depth: int) -> Any:
        """Walk one item, whose field begins at ``start`` (its key in a map comes first); returns its value."""
        if depth > _MAX_DEPTH:
            raise _BrokenError(f"nested deeper than {_MAX_DEPTH}")
        major, argument = self._head()
        if major == 4:
            return self._array(name, start, argument, depth)
        if major == 5:
            return self._map(name, start, argument, depth)
        if major in (2, 3):
            return self._string(name, start, major, argument, depth)
        if major == 6:
            self._note(start, name, None, f"tag {argument}")
            return self.item(name, self._at, depth + 1)
        value = self._scalar(major, argument)
        self._note(start, name, value, _text(name, value))
        return value

    def _head(self) -> tuple[int, Any]:
        """Major type and argument (None: indefinite length; a float or simple value for major type 7)."""
        first = self._bytes(1)[0]
        major, info = first >> 5, first & 31
        if info < 24:
            argument: Any = info
        elif info < 28:
            raw = self._bytes(1 << (info - 24))
            if major == 7 and info > 24:
                return major, struct.unpack({2: ">e", 4: ">f", 8: ">d"}[len(raw)], raw)[0]
            argument = int.from_bytes(raw, "big")
        elif info == 31 and major in (2, 3, 4, 5):
            argument = None
        else:
            raise _BrokenError(f"byte {first:#04x} at offset {self._base + self._at - 1} begins no item")
        return major, argument

    def _bytes(self, n: int) -> bytes:
        raw = self._data[self._at : self._at + n]
        if len(raw) < n:
            raise _BrokenError(f"{n} bytes are needed at offset {self._base + self._at}, {len(raw)} are there")
        self._at += n
        return raw

    def _break(self) -> bool:
        """Take the end of an indefinite length, if it is there."""
        if self._data[self._at : self._at + 1] != b"\xff":
            return False
        self._at += 1
        return True

    @staticmethod
    def _scalar(major: int, argument: Any) -> Any:
        if major == 0:
            return argument
        if major == 1:
            return -1 - argument
        return argument if isinstance(argument, float) else {20: False, 21: True}.get(argument)

    def _string(self, name: str, start: int, major: int, length: int | None, depth: int) -> Any:
        if length is None:
            raw = b""
            while not self._break():
                kind, part = self._head()
                if kind != major or part is None:
                    raise _BrokenError(f"a string in pieces holds something else at offset {self._base + self._at}")
                raw += self._bytes(part)
        else:
            if major == 2 and name == "manifest" and depth == 1 and length:
                return self._manifest(start, length)
            raw = self._bytes(length)
        value = raw if major == 2 else raw.decode("utf-8", "replace")
        self._note(start, name, value, _text(name, value))
        return value

    def _manifest(self, start: int, length: int) -> bytes:
        raw = self._bytes(length)
        self._at -= length
        self._note(start, "manifest", None, f"{length} bytes of CBOR")
        inner = _Walker(raw, self._base + self._at, _MANIFEST)
        try:
            inner.item("manifest", 0, 0)
        finally:
            self.fields.extend(inner.fields)
            self._at += inner.done
            self.done = self._at
        self._at += length - inner.done
        if inner.done < length:
            self._note(self.done, "manifest", None, "bytes that follow the map")
        return raw

    def _array(self, name: str, start: int, count: int | None, depth: int) -> list[Any]:
        mark = len(self.fields)
        self._note(start, name, None, f"array of {count if count is not None else 'indefinite length'}")
        values: list[Any] = []
        while self._break() is False if count is None else len(values) < count:
            values.append(self.item(f"{name}[{len(values)}]", self._at, depth + 1))
        if count is None:
            self._note(self._at - 1, name, None, "end of the array")
        flat = not any(isinstance(value, list | dict | str) for value in values)
        if flat and self._at - start <= _INLINE:
            del self.fields[mark:]
            self._note(start, name, values, _text(name, values))
        return values

    def _map(self, name: str, start: int, count: int | None, depth: int) -> dict[str, Any]:
        self._note(start, name or "body", None, f"map of {count if count is not None else 'indefinite length'}")
        values: dict[str, Any] = {}
        done = 0
        while self._break() is False if count is None else done < count:
            begin = self._at
            major, length = self._head()
            if major != 3 or length is None:
                raise _BrokenError(f"a map's key at offset {self._base + begin} is not text")
            key = self._bytes(length).decode("utf-8", "replace")
            path = f"{name}.{key}" if name else key
            values[key] = self.item(printable(path, 64), begin, depth + 1)
            done += 1
        if count is None:
            self._note(self._at - 1, name or "body", None, "end of the map")
        return values

    def _note(self, start: int, name: str, value: Any, text: str) -> None:
        raw = self._data[start : self._at]
        self.fields.append(Field(self._base + start, raw, name, value, text, self._section))
        self.done = self._at


def _text(name: str, value: Any) -> str:
    """A value for people; some names tell more about it."""
    short = name.rpartition(".")[2]
    if short == "code" and isinstance(value, int):
        known = value in ErrorCode._value2member_map_
        return f"{value} ({ErrorCode(value).name if known else 'not defined in version 1'})"
    if short.startswith("tiles[") and isinstance(value, list):
        try:
            key = TileKey.from_list(0, value, name)
        except ProtocolError:
            return str(value)
        heads = f"heads {key.head_start} to {key.head_start + key.heads - 1}"
        return f"{PARTS[key.part]}, {heads}, tokens {key.token_start} to {key.token_stop - 1}, codec {key.codec}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes" if len(value) > 32 else value.hex() or "empty"
    if isinstance(value, str):
        return f'"{printable(value)}"'
    if isinstance(value, list):
        return "[" + ", ".join(_text("", item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# --- for people

_ROW: Final = 8


def render(fields: list[Field], *, colour: bool) -> Iterator[str]:
    """Lines of text, one or more a field."""
    width = min(36, max((len(field.name) for field in fields), default=0))
    yield f"{'offset':<8}{'bytes':<{_ROW * 3 + 1}}{'name':<{width}}  value"
    section = ""
    for field in fields:
        if field.section != section:
            section = field.section
            line = f"-- {section}"
            yield f"\x1b[2m{line}\x1b[0m" if colour else line
        pieces = [field.raw[i : i + _ROW] for i in range(0, len(field.raw), _ROW)] or [b""]
        for i, piece in enumerate(pieces):
            said = f"{field.name:<{width}}  {field.text}" if i == 0 else ""
            if colour and said:
                said = f"\x1b[36m{field.name:<{width}}\x1b[0m  {field.text}"
            yield f"{field.offset + i * _ROW:06x}  {piece.hex(' '):<{_ROW * 3}} {said}".rstrip()
