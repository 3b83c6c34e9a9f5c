"""What a transfer has moved: statistics, progress, the result of prefill."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LevelStats", "Progress", "Result", "TransferStats"]


@dataclass(slots=True)
class LevelStats:
    """One level of one transfer."""

    chunks: int = 0
    """Chunks, resent ones counted again; each is one DATA frame."""
    bytes: int = 0
    """Bytes of their payloads."""
    total_chunks: int = 0
    """Chunks that the plans so far call for."""
    first: float | None = None
    """When the first chunk was encoded (sender) or had arrived (receiver); ``time.monotonic()``."""
    last: float | None = None
    """The same of the latest chunk."""


@dataclass(slots=True)
class TransferStats:
    """One transfer. Times are ``time.monotonic()``, which all processes of a Linux machine share."""

    opened: float
    """When it was opened (sender) or accepted (receiver)."""
    released: float | None = None
    """When it was over."""
    levels: dict[int, LevelStats] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Payload bytes of all levels."""
        return sum(level.bytes for level in self.levels.values())

    @property
    def chunks(self) -> int:
        """Chunks of all levels."""
        return sum(level.chunks for level in self.levels.values())

    def plan(self, levels: int) -> None:
        """One more tile will come with ``levels`` levels."""
        for level in range(levels):
            self.levels.setdefault(level, LevelStats()).total_chunks += 1

    def count(self, level: int, nbytes: int, now: float) -> LevelStats:
        """One more chunk."""
        stats = self.levels.setdefault(level, LevelStats())
        stats.chunks += 1
        stats.bytes += nbytes
        stats.first = now if stats.first is None else stats.first
        stats.last = now
        return stats


@dataclass(frozen=True, slots=True)
class Progress:
    """A chunk has arrived: the running totals of its level."""

    time: float
    """``time.monotonic()``"""
    level: int
    chunks: int
    bytes: int
    total_chunks: int


@dataclass(frozen=True, slots=True)
class Result:
    """What prefill already knew: the first token, and the gap between its two largest logits if it was told."""

    first_token: int
    logit_gap: float | None = None
