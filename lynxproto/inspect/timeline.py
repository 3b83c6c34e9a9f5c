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

    def data(self, time: int, level: int, layer: int, nbytes: int) -> None:
        """``nbytes`` of DATA were complete at ``time``."""
        at = self._bin(time)
        self.levels.setdefault(level, [0] * BINS)[at] += nbytes
        row = self.layers.get((level, layer))
        if row is None and len(self.layers) < _MAX_ROWS:
            row = self.layers[level, layer] = [0] * BINS
        if row is not None:
            row[at] += nbytes

    def _bin(self, time: int) -> int:
        while time >= self.width * BINS:
            for row in (self.control, *self.levels.values(), *self.layers.values()):
                row[:] = [a + b for a, b in zip(row[::2], row[1::2], strict=True)] + [0] * (BINS // 2)
            self.width *= 2
            self.used = (self.used + 1) // 2
        at = time // self.width
        self.used = max(self.used, at + 1)
        return at
