"""What went over the wire, counted: of a session, and of each transfer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from lynxproto.config import MAX_LEVELS

__all__ = ["Counters"]


def _zeros() -> list[int]:
    return [0] * MAX_LEVELS


@dataclass(slots=True)
class Counters:
    """Frames and bytes. Lists are indexed by level; bytes are whole frames, headers included."""

    sent_frames: list[int] = field(default_factory=_zeros)
    sent_bytes: list[int] = field(default_factory=_zeros)
    received_frames: list[int] = field(default_factory=_zeros)
    """Chunks taken in: each once, however often it came."""
    received_bytes: list[int] = field(default_factory=_zeros)
    control_frames_sent: int = 0
    control_bytes_sent: int = 0
    control_frames_received: int = 0
    control_bytes_received: int = 0
    resends: int = 0
    """Chunks sent again: asked for by the peer, or lost with a stripe."""
    nacks: int = 0
    """Chunks that a peer asked for again because they had arrived corrupt."""
    corrupt: int = 0
    """Payloads that arrived with a wrong CRC32C."""
    duplicates: int = 0
    """Chunks that arrived though this side had them."""
    dropped: int = 0
    """Chunks that arrived too late, cancelled or for a transfer that is over."""
    dropped_bytes: int = 0
    """Payload bytes of duplicates and dropped chunks."""

    def add(self, other: Counters) -> None:
        """Add another's figures to these."""
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            total = [a + b for a, b in zip(mine, theirs, strict=True)] if isinstance(mine, list) else mine + theirs
            setattr(self, item.name, total)
