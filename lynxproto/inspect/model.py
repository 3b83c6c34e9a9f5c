"""What sources give to the inspector (segments of byte streams), and what it gives back (frames and faults)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lynxproto.capture import Direction
from lynxproto.frames import Body, FrameType, Header

__all__ = ["Fault", "Frame", "Gap", "Item", "Segment", "StripeEnd", "printable", "type_name"]


class Segment(NamedTuple):
    """Bytes of one direction of one stripe. ``data`` is valid until the next item is asked for."""

    time: int
    """Nanoseconds since the source began."""
    stripe: int
    """Number of the byte stream in the source, from 0 in order of appearance."""
    direction: Direction
    data: bytes | memoryview
    offset: int | None
    """Of ``data`` in the file; None for a live source."""


class Gap(NamedTuple):
    """Bytes that the source should have and lacks (a packet that a pcap misses)."""

    time: int
    stripe: int
    direction: Direction
    nbytes: int


class StripeEnd(NamedTuple):
    """A byte stream is over, both directions."""

    time: int
    stripe: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Where a source or a stream breaks: not tied to a frame, or it is what stands where a frame should."""

    time: int
    reason: str
    stripe: int | None = None
    direction: Direction | None = None
    offset: int | None = None
    """In the file."""
    stream_offset: int | None = None
    """In that direction of the stripe."""


Item = Segment | Gap | StripeEnd | Fault


@dataclass(slots=True)
class Frame:
    """One frame as it was seen. Sizes in bytes, times in nanoseconds since the source began."""

    number: int
    """From 0, in order of completion."""
    time: int
    """When its last byte was seen."""
    start: int
    """When its first byte was seen."""
    stripe: int
    direction: Direction
    offset: int | None
    """Of its first byte in the file."""
    stream_offset: int
    """The same in its direction of the stripe."""
    header: Header
    checksum: str
    """``ok``; ``bad`` (CRC32C of extension or payload); ``cut`` (the stream ends inside)."""
    problem: str = ""
    """What is wrong with it, if anything is."""
    body: Body | None = None
    """Of a control frame whose payload could be decoded."""
    bitmap: bytes = b""
    raw_header: bytes = b""
    extension: bytes = b""
    payload: bytes = b""
    """All of a control frame's; of DATA as much as was to be kept."""
    codec: str = ""
    """DATA: the codec's name, as far as it is known."""
    tokens: int = 0
    """DATA: how many tokens the tile has."""
    uncompressed: int | None = None
    """DATA: bytes of the tile's words, if the manifest was seen."""
    note: str = ""
    """What a control frame says, in a few words."""

    @property
    def is_data(self) -> bool:
        """Whether it is a DATA frame."""
        return self.header.type == FrameType.DATA

    @property
    def size(self) -> int:
        """Bytes of the payload, as the header says."""
        return self.header.payload_length

    @property
    def overhead(self) -> int:
        """Bytes of header and extension."""
        return 64 + self.header.extension_length

    @property
    def ratio(self) -> float | None:
        """Payload relative to the tile's uncompressed words."""
        return None if not self.uncompressed else self.header.payload_length / self.uncompressed

    @property
    def layer(self) -> int | None:
        """Of DATA, and of control frames about one layer (PLAN, END)."""
        return self.header.layer if self.is_data else _of(self.body, "layer")

    @property
    def level(self) -> int | None:
        """Of DATA; None for other types."""
        return self.header.level if self.is_data else None


def _of(body: Any, name: str) -> int | None:
    value = getattr(body, name, None)
    return value if isinstance(value, int) else None


_NAMES = {int(kind): kind.name for kind in FrameType}


def type_name(kind: int) -> str:
    """``DATA``, ``PLAN``..., or the number of a type that version 1 does not define."""
    return _NAMES.get(kind) or f"{kind:#06x}"


def printable(text: str, limit: int = 80) -> str:
    """``text`` from the wire, made safe for a terminal: control characters escaped, and no longer than ``limit``."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."
