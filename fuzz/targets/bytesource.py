"""Decisions out of a fuzzer's bytes: cheap, total, and stable when the rest of the input changes."""

from __future__ import annotations


class ByteSource:
    """Reads numbers and byte strings from ``data``; zeros once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, nbytes: int) -> bytes:
        """At most ``nbytes`` bytes."""
        part = self._data[self._at : self._at + nbytes]
        self._at += len(part)
        return part

    def number(self, nbytes: int) -> int:
        """An unsigned little-endian integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def below(self, limit: int) -> int:
        """An integer in ``[0, limit)``."""
        return self.number(1 if limit <= 256 else 2) % limit

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))
