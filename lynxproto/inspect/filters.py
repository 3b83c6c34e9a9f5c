"""Which frames to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lynxproto.errors import ConfigError
from lynxproto.frames import FrameType
from lynxproto.inspect.model import Frame

__all__ = ["Filter"]


@dataclass(frozen=True, slots=True)
class Filter:
    """A frame passes if it matches one choice of each kind that was given."""

    transfers: tuple[str, ...] = ()
    types: frozenset[int] = frozenset()
    layers: tuple[range, ...] = ()
    levels: tuple[range, ...] = ()

    @classmethod
    def of(cls, transfers: Sequence[str], types: Sequence[str], layers: Sequence[str], levels: Sequence[str]) -> Filter:
        """From command-line words: beginnings of transfer ids in hex, type names or numbers, ``3`` or ``0-5``.

        Raises :class:`~lynxproto.errors.ConfigError` for a word that is none.
        """
        ids = tuple(transfer.lower() for transfer in transfers)
        for one in ids:
            if not one or len(one) > 32 or one.strip("0123456789abcdef"):
                raise ConfigError(f"{one!r} is not the beginning of a transfer id (hexadecimal, as the table shows it)")
        return cls(
            ids,
            frozenset(_type(word) for word in types),
            tuple(_range(word, "layer") for word in layers),
            tuple(_range(word, "level") for word in levels),
        )

    @property
    def empty(self) -> bool:
        """Whether everything passes."""
        return not (self.transfers or self.types or self.layers or self.levels)

    def __call__(self, frame: Frame) -> bool:
        """Whether ``frame`` passes."""
        if self.types and frame.header.type not in self.types:
            return False
        if self.layers and not _within(frame.layer, self.layers):
            return False
        if self.levels and not _within(frame.level, self.levels):
            return False
        return not self.transfers or f"{frame.header.transfer:032x}".startswith(self.transfers)


def _within(value: int | None, ranges: Sequence[range]) -> bool:
    return value is not None and any(value in r for r in ranges)


def _type(word: str) -> int:
    name = word.upper().replace("-", "_")
    if name in FrameType.__members__:
        return int(FrameType[name])
    try:
        return int(word, 0)
    except ValueError:
        known = ", ".join(FrameType.__members__)
        raise ConfigError(f"{word!r} is not a frame type: give a number or one of {known}") from None


def _range(word: str, what: str) -> range:
    first, dash, last = word.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
        raise ConfigError(f"{word!r} is not a {what}: give a number, or a range such as 0-5")
    return range(int(first), int(last if dash else first) + 1)
