"""CBOR (RFC 8949) as lynxproto uses it: plain data only, deterministic, checked before anything is built on it.

Decoded values are dict (text keys), list, str, bytes, int (64-bit), float, bool and None. Tags, other key types,
deep nesting and trailing bytes are refused, so a hostile peer gets no object, no cycle and no big integer out of it.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

import cbor2

from lynxproto.errors import ErrorCode, ProtocolError

__all__ = ["Fields", "dumps", "loads"]

_MAX_DEPTH: Final = 16


def dumps(value: Any) -> bytes:
    """Encode with the deterministic rules of RFC 8949, section 4.2 (shortest forms, sorted keys)."""
    return cbor2.dumps(value, canonical=True)


def _check(value: Any, what: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ProtocolError(f"{what}: CBOR nested deeper than {_MAX_DEPTH}")
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ProtocolError(f"{what}: CBOR map key {key!r} is not text")
            _check(item, what, depth + 1)
    elif kind is list:
        for item in value:
            if type(item) is not int or not 0 <= item < 1 << 64:  # what long lists are of
                _check(item, what, depth + 1)
    elif kind is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise ProtocolError(f"{what}: CBOR integer outside 64 bits")
    elif kind not in (str, bytes, float, bool, type(None)):
        raise ProtocolError(f"{what}: CBOR type {kind.__name__} is not allowed")


def loads(data: bytes | bytearray | memoryview, what: str) -> Fields:
    """Decode one CBOR map of plain data; ``what`` names it in errors.

    Raises :class:`~lynxproto.errors.ProtocolError` for anything else.
    """
    stream = BytesIO(data)
    try:
        value = cbor2.CBORDecoder(stream).decode()
    except (cbor2.CBORDecodeError, RecursionError, MemoryError, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"{what}: not valid CBOR ({error})") from error
    if stream.tell() != len(data):
        raise ProtocolError(f"{what}: {len(data) - stream.tell()} bytes follow the CBOR item")
    if type(value) is not dict:
        raise ProtocolError(f"{what}: expected a CBOR map, got {type(value).__name__}")
    _check(value, what, 0)
    return Fields(value, what)


class Fields:
    """A decoded map whose fields are taken one by one, each with its type and bounds checked.

    Unknown fields are ignored, except that a name beginning with ``!`` is critical: a reader that does not know it
    must refuse (:meth:`done`).
    """

    __slots__ = ("_map", "_taken", "what")

    def __init__(self, value: Any, what: str) -> None:
        if type(value) is not dict:
            raise ProtocolError(f"{what}: expected a map, got {type(value).__name__}")
        self._map: dict[str, Any] = value
        self._taken: set[str] = set()
        self.what = what

    @property
    def raw(self) -> dict[str, Any]:
        """The whole map, for readers that check it themselves."""
        return self._map

    def _take(self, name: str, kind: type, default: Any) -> Any:
        self._taken.add(name)
        value = self._map.get(name, default)
        if value is ...:
            raise ProtocolError(f"{self.what}: field {name!r} is missing")
        if value is not default and type(value) is not kind:
            raise ProtocolError(f"{self.what}: field {name!r} is {type(value).__name__}, not {kind.__name__}")
        return value

    def integer(self, name: str, low: int = 0, high: int = (1 << 63) - 1, default: Any = ...) -> Any:
        """An integer in ``[low, high]``; without the field, ``default`` unless that is ``...`` (required)."""
        value = self._take(name, int, default)
        if value is not default and not low <= value <= high:
            raise ProtocolError(f"{self.what}: field {name!r} = {value} is outside [{low}, {high}]")
        return value

    def text(self, name: str, limit: int = 1024, default: Any = ...) -> Any:
        """A text of at most ``limit`` characters."""
        value = self._take(name, str, default)
        if value is not default and len(value) > limit:
            raise ProtocolError(f"{self.what}: field {name!r} is longer than {limit} characters")
        return value

    def data(self, name: str, low: int = 0, high: int = 1 << 20, default: Any = ...) -> Any:
        """A byte string of ``low`` to ``high`` bytes."""
        value = self._take(name, bytes, default)
        if value is not default and not low <= len(value) <= high:
            raise ProtocolError(f"{self.what}: field {name!r} has {len(value)} bytes, not {low} to {high}")
        return value

    def flag(self, name: str, default: Any = ...) -> Any:
        """A boolean."""
        return self._take(name, bool, default)

    def number(self, name: str, default: Any = ...) -> Any:
        """A float."""
        return self._take(name, float, default)

    def array(self, name: str, limit: int, default: Any = ...) -> Any:
        """A list of at most ``limit`` items, not yet checked."""
        value = self._take(name, list, default)
        if value is not default and len(value) > limit:
            raise ProtocolError(f"{self.what}: field {name!r} has {len(value)} items, limit {limit}", ErrorCode.LIMIT)
        return value

    def mapping(self, name: str) -> Fields:
        """A nested map."""
        return Fields(self._take(name, dict, ...), f"{self.what}.{name}")

    def integers(
        self, name: str, count: int | None, low: int = 0, high: int = (1 << 63) - 1, *, limit: int = 64
    ) -> Any:
        """A list of ``count`` (None: at most ``limit``) integers in ``[low, high]``, as a tuple."""
        values = self._take(name, list, ...) if count is not None else self.array(name, limit)
        if count is not None and len(values) != count:
            raise ProtocolError(f"{self.what}: field {name!r} has {len(values)} items, not {count}")
        for value in values:
            if type(value) is not int or not low <= value <= high:
                raise ProtocolError(f"{self.what}: field {name!r} holds {value!r}, not an integer in [{low}, {high}]")
        return tuple(values)

    def texts(self, name: str, limit: int, length: int = 256) -> tuple[str, ...]:
        """A list of at most ``limit`` texts."""
        values = self.array(name, limit)
        if any(type(value) is not str or len(value) > length for value in values):
            raise ProtocolError(f"{self.what}: field {name!r} holds something else than texts of {length} characters")
        return tuple(values)

    def blobs(self, name: str, limit: int, sizes: tuple[int, ...]) -> tuple[bytes, ...]:
        """A list of at most ``limit`` byte strings whose lengths are among ``sizes``."""
        values = self.array(name, limit)
        if any(type(value) is not bytes or len(value) not in sizes for value in values):
            raise ProtocolError(f"{self.what}: field {name!r} holds something else than strings of {sizes} bytes")
        return tuple(values)

    def done(self) -> None:
        """Refuse unknown critical fields."""
        for name in self._map.keys() - self._taken:
            if name.startswith("!"):
                raise ProtocolError(f"{self.what}: unknown critical field {name!r}", ErrorCode.UNKNOWN_CRITICAL)
