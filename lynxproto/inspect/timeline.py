"""When bytes went, in a fixed number of bins: the bins get twice as wide whenever time runs out of them."""

from __future__ import annotations

from typing import Final

__all__ = ["BINS", "Timeline"]

BINS: Final = 192
_FIRST_WIDTH_NS: Final = 50_000
#: Rows (level and layer) that are kept apart.
_MAX_ROWS: Final = 4096


class Timeline:
    """Bytes by bin: of control frames, of each level, and of each layer of a level."""

    def __init__(self) -> None:
        self.width = _FIRST_WIDTH_NS
        """Nanoseconds of a bin."""
        self.used = 0
        """Bins that time has reached."""
        self.control = [0] * BINS
        self.levels: dict[int, list[int]] = {}
        self.layers: dict[tuple[int, int], list[int]] = {}
        """By level and layer."""

    def control_frame(self, time: int, nbytes: int) -> None:
        """``nbytes`` of control frames were complete at ``time``."""
        at = self._bin(time)
        self.control[at] += nbytes

    def data(self, start: int, time: int, level: int, layer: int, nbytes: int) -> None:
        """``nbytes`` of DATA went from ``start`` to ``time``: they are spread evenly over that."""
        last = self._bin(time)
        first = min(start // self.width, last)
        rows = [self.levels.setdefault(level, [0] * BINS)]
        if (level, layer) in self.layers or len(self.layers) < _MAX_ROWS:
            rows.append(self.layers.setdefault((level, layer), [0] * BINS))
        each, rest = divmod(nbytes, last - first + 1)
        for row in rows:
            for at in range(first, last + 1):
                row[at] += each
            row[last] += rest

    def _bin(self, time: int) -> int:
        while time >= self.width * BINS:
            for row in (self.control, *self.levels.values(), *self.layers.values()):
                row[:] = [a + b for a, b in zip(row[::2], row[1::2], strict=True)] + [0] * (BINS // 2)
            self.width *= 2
            self.used = (self.used + 1) // 2
        at = time // self.width
        self.used = max(self.used, at + 1)
        return at
