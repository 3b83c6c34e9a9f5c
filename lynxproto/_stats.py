"""What a transfer has moved: statistics, progress, the result of prefill."""

from __future__ import annotations

from dataclasses import dataclass, field

from lynxproto.config import MAX_LEVELS
from lynxproto.counters import Counters

__all__ = ["LevelStats", "Progress", "Result", "Snapshot", "TransferStats"]


@dataclass(slots=True)
class LevelStats:
    """One level of one transfer."""

    chunks: int = 0
    """Chunks sent (resent ones again) or received; each is one DATA frame."""
    bytes: int = 0
    """Bytes of their frames, headers included."""
    total_chunks: int = 0
    """Chunks that the plans so far call for."""
    first: float | None = None
    """When the first chunk was handed to the link (sender) or had arrived (receiver); ``time.monotonic()``."""
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
    policy: str = ""
    """Sender, with an automatic policy: the one that was chosen."""
    reason: str = ""
    """Why."""
    _before: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of the DATA frames of all levels."""
        return sum(level.bytes for level in self.levels.values())

    @property
    def chunks(self) -> int:
        """Chunks of all levels."""
        return sum(level.chunks for level in self.levels.values())

    def plan(self, levels: int) -> None:
        """One more tile will come with ``levels`` levels."""
        for level in range(levels):
            self.levels.setdefault(level, LevelStats()).total_chunks += 1

    def carry_over(self) -> None:
        """The transfer goes on in another session, whose counters begin at 0."""
        self._before = {level: (stats.chunks, stats.bytes) for level, stats in self.levels.items()}

    def update(self, level: int, frames: int, nbytes: int, now: float) -> LevelStats | None:
        """The connection's counters of ``level`` have become these; returns its statistics if they moved."""
        before = self._before.get(level, (0, 0))
        chunks = before[0] + frames
        stats = self.levels.setdefault(level, LevelStats())
        if chunks == stats.chunks:
            return None
        stats.chunks, stats.bytes = chunks, before[1] + nbytes
        stats.first = now if stats.first is None else stats.first
        stats.last = now
        return stats


@dataclass(frozen=True, slots=True)
class Progress:
    """One or several chunks of a level have arrived: the level's running totals."""

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


@dataclass(slots=True)
class Snapshot:
    """An endpoint at one moment, all its peers together."""

    counters: Counters = field(default_factory=Counters)
    """Since it was opened."""
    handshakes: int = 0
    """Byte streams whose peers have not yet proved who they are."""
    sessions: int = 0
    outgoing: int = 0
    """Transfers that are open."""
    incoming: int = 0
    credit: list[int] = field(default_factory=lambda: [0] * MAX_LEVELS)
    """Bytes that peers still allow this side to send, by class."""
    unapplied: list[int] = field(default_factory=lambda: [0] * MAX_LEVELS)
    """Bytes that were received and wait to be decoded, by class."""
