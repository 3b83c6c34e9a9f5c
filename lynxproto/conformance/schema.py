"""What the parsers of :mod:`lynxproto.frames` ask of each key, found by watching them.

A parser takes the keys of a map one by one from a :class:`lynxproto._cbor.Fields`, with their types and bounds. Here it
is given one that notes what is asked for. So the tables in spec/wire-format.md, and the vectors that break every rule
of every key, follow from the code that checks them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from lynxproto import _cbor
from lynxproto.config import Limits
from lynxproto.frames import _BODIES, Body, FrameType

__all__ = ["Key", "keys_of"]

_REQUIRED: Final = ...


class _LimitValue(int):
    """A limit's default that knows which limit it is."""

    name: str

    @classmethod
    def of(cls, name: str, value: int) -> _LimitValue:
        limit = cls(value)
        limit.name = name
        return limit


_NAMED: Final = Limits(**{name: _LimitValue.of(name, default) for name, default in asdict(Limits()).items()})


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a control frame's map. ``low`` and ``high`` bound an integer, or the size of anything else."""

    name: str
    type: str
    low: int | None = None
    high: int | None = None
    default: Any = _REQUIRED
    items: str = ""
    """Of an array: what it holds, for people."""

    @property
    def required(self) -> bool:
        """Whether a map without it is refused."""
        return self.default is _REQUIRED

    @property
    def range(self) -> str:
        """Bounds as spec/wire-format.md writes them."""
        if self.low is None and self.high is None:
            return ""
        if self.low == self.high:
            return _number(self.high)
        return f"{_number(self.low)} to {_number(self.high)}"


def _number(value: int | None) -> str:
    if isinstance(value, _LimitValue):
        return f"`{value.name}`"
    assert value is not None
    for power in (63, 32, 20, 16):
        for less in (0, 1):
            if value == (1 << power) - less:
                return f"2^{power}" + (" - 1" if less else "")
    return str(value)


class _Watcher(_cbor.Fields):
    """Notes what is taken, and answers with the least that is allowed."""

    __slots__ = ("keys", "nested")

    def __init__(self, what: str) -> None:
        super().__init__({}, what)
        self.keys: list[Key] = []
        self.nested: dict[str, _Watcher] = {}

    def _note(self, *key: Any) -> None:
        self.keys.append(Key(*key))

    def integer(self, name: str, low: int = 0, high: int = (1 << 63) - 1, default: Any = ...) -> Any:
        self._note(name, "integer", low, high, default)
        return low if default is ... else default

    def text(self, name: str, limit: int = 1024, default: Any = ...) -> Any:
        self._note(name, "text", 0, limit, default)
        return ""

    def data(self, name: str, low: int = 0, high: int = 1 << 20, default: Any = ...) -> Any:
        self._note(name, "bytes", low, high, default)
        return bytes(low)

    def flag(self, name: str, default: Any = ...) -> Any:
        self._note(name, "boolean", None, None, default)
        return False

    def number(self, name: str, default: Any = ...) -> Any:
        self._note(name, "float", None, None, default)
        return 1.0

    def array(self, name: str, limit: int, default: Any = ...) -> Any:
        self._note(name, "array", 0, limit, default)
        return []

    def mapping(self, name: str) -> _cbor.Fields:
        self._note(name, "map")
        return self.nested.setdefault(name, _Watcher(f"{self.what}.{name}"))

    def integers(
        self, name: str, count: int | None, low: int = 0, high: int = (1 << 63) - 1, *, limit: int = 64
    ) -> Any:
        items = f"integers {_number(low)} to {_number(high)}"
        self._note(name, "array", *((count, count) if count is not None else (0, limit)), _REQUIRED, items)
        return (low,) * (count or 0)

    def texts(self, name: str, limit: int, length: int = 256) -> tuple[str, ...]:
        self._note(name, "array", 0, limit, _REQUIRED, f"texts of 0 to {length}")
        return ()

    def blobs(self, name: str, limit: int, sizes: tuple[int, ...]) -> tuple[bytes, ...]:
        consecutive = len(sizes) > 2 and sizes == tuple(range(sizes[0], sizes[-1] + 1))
        spans = f"{sizes[0]} to {sizes[-1]}" if consecutive else " or ".join(map(str, sizes))
        self._note(name, "array", 0, limit, _REQUIRED, f"bytes of {spans}")
        return ()


def keys_of(kind: FrameType | type[Body]) -> tuple[Key, ...]:
    """The keys of a control frame's map, in the order in which they are checked."""
    body = _BODIES[kind] if isinstance(kind, FrameType) else kind
    watcher = _Watcher(body.TYPE.name)
    body._from_fields(watcher, _NAMED)
    return tuple(watcher.keys)
