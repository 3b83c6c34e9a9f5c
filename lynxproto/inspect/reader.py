"""Cuts byte streams into frames for looking at: no session, no windows, no trust. Memory is bounded.

The payloads of DATA pass through a checksum and are not kept; those of control frames are kept while they are decoded.
After a fault a reader looks for the next intact header, so that what follows a damaged or missing stretch is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lynxproto.capture import Direction
from lynxproto.digest import crc32c
from lynxproto.errors import CorruptFrameError, LynxError, VersionError
from lynxproto.frames import HEADER_SIZE, MAGIC, FrameType, Header, parse_body, parse_extension
from lynxproto.inspect.context import LIMITS, MAX_CONTROL, MAX_EXTENSION, Context
from lynxproto.inspect.model import Fault, Frame, Gap, Item, Segment, StripeEnd

__all__ = ["FrameReader", "Inspector"]

#: Byte streams that are followed at a time; a source with more is not a session.
_MAX_STRIPES: Final = 4096
#: Bytes of control payloads that are held at a time, of all streams together.
_MAX_HELD: Final = 128 << 20


class _Budget:
    """Bytes of control payloads that all readers may hold together."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class _Partial:
    """A frame on its way, whose header is known."""

    __slots__ = ("crc", "extension", "extension_left", "frame", "keep", "payload", "payload_left", "reserved")

    def __init__(self, frame: Frame, keep: int, budget: _Budget) -> None:
        header = frame.header
        self.frame = frame
        self.extension = bytearray()
        self.extension_left = header.extension_length
        self.payload = bytearray()
        self.payload_left = header.payload_length
        self.crc = 0
        self.keep = keep
        self.reserved = 0
        if header.type != FrameType.DATA:
            self.keep = self.reserved = min(header.payload_length, MAX_CONTROL, budget.left)
            budget.left -= self.reserved

    def take(self, data: memoryview) -> int:
        """Take what belongs to the frame from ``data``; returns how many bytes that is."""
        taken = min(self.extension_left, data.nbytes)
        if taken:
            self.extension_left -= taken
            self.extension += data[: max(0, min(taken, MAX_EXTENSION - len(self.extension)))]
            data = data[taken:]
        data = data[: self.payload_left]
        if data.nbytes:
            self.payload_left -= data.nbytes
            self.crc = crc32c(data, self.crc)
            room = self.keep - len(self.payload)
            if room > 0:
                self.payload += data[:room]
        return taken + data.nbytes

    @property
    def done(self) -> bool:
        return not self.payload_left and not self.extension_left


class FrameReader:
    """One direction of one stripe. ``keep``: how many bytes of a DATA payload its frames hold.

    ``lenient``: the stream may begin inside a frame, or hold no frames at all.
    """

    def __init__(
        self, stripe: int, direction: Direction, *, keep: int = 0, lenient: bool = False, budget: _Budget | None = None
    ) -> None:
        self._budget = budget or _Budget(_MAX_HELD)
        self._stripe = stripe
        self._direction = direction
        self._keep = keep
        self._position = 0  # of the next byte, in the stream
        self._pending = b""  # an incomplete header, or the end of the stretch that is being searched
        self._pending_from: tuple[int, int | None] = (0, None)  # time and file offset of its first byte
        self._partial: _Partial | None = None
        self._lost: int | None = 0 if lenient else None  # where framing was lost, in the stream
        self._out: list[Frame | Fault] = []
        self.recognized = not lenient
        """Whether the stream is known to hold frames."""

    def feed(self, segment: Segment) -> list[Frame | Fault]:
        """What ``segment`` completes; frames have no number yet."""
        view = memoryview(segment.data)
        at = 0
        while at < view.nbytes:
            if self._partial is not None:
                taken = self._partial.take(view[at:])
                at += taken
                self._position += taken
                self._finish(segment.time)
            elif self._lost is not None:
                at = self._search(segment, view, at)
            else:
                at = self._header(segment, view, at)
        return self._drain()

    def gap(self, gap: Gap) -> list[Frame | Fault]:
        """Bytes are missing: what was begun is cut, and the next header must be found."""
        self._cut(gap.time, f"{gap.nbytes} bytes are missing")
        if self.recognized:
            self._fault(gap.time, f"{gap.nbytes} bytes of the stream are missing", None, self._position)
        self._position += gap.nbytes
        self._lost = self._position
        return self._drain()

    def end(self, time: int) -> list[Frame | Fault]:
        """The stream is over."""
        self._cut(time, "the stream ends")
        if self.recognized and self._lost is not None and self._position > self._lost:
            skipped = self._position - self._lost
            self._fault(time, f"no intact frame header in the last {skipped} bytes of the stream", None, self._lost)
        return self._drain()

    def _drain(self) -> list[Frame | Fault]:
        out, self._out = self._out, []
        return out

    def _fault(self, time: int, reason: str, offset: int | None, stream_offset: int) -> None:
        self._out.append(Fault(time, reason, self._stripe, self._direction, offset, stream_offset))

    def _header(self, segment: Segment, view: memoryview, at: int) -> int:
        """Read a header at a frame boundary, or as much of it as is there; returns the new ``at``."""
        if not self._pending:
            self._pending_from = (segment.time, _plus(segment.offset, at))
        have = len(self._pending)
        raw = self._pending + view[at : at + HEADER_SIZE - have]
        at += len(raw) - have
        self._position += len(raw) - have
        if len(raw) < HEADER_SIZE:
            self._pending = raw
            return at
        self._pending = b""
        try:
            header = Header.unpack(raw)
        except (CorruptFrameError, VersionError) as error:
            self._lost = self._position - HEADER_SIZE
            self._fault(segment.time, str(error), self._pending_from[1], self._lost)
            self._pending = raw[1:]
            self._pending_from = (self._pending_from[0], _plus(self._pending_from[1], 1))
            return at
        self._begin(header, raw, *self._pending_from)
        self._finish(segment.time)
        return at

    def _search(self, segment: Segment, view: memoryview, at: int) -> int:
        """Look for an intact header; returns the new ``at``."""
        assert self._lost is not None
        have = len(self._pending)
        if not have:
            self._pending_from = (segment.time, _plus(segment.offset, at))
        data = self._pending + view[at:]
        time, offset = self._pending_from
        found, header = _find_header(data)
        if header is None:
            kept = data[found:]
            self._pending = kept
            if found >= have:
                self._pending_from = (segment.time, _plus(segment.offset, at + found - have))
            else:
                self._pending_from = (time, _plus(offset, found))
            self._position += view.nbytes - at
            return view.nbytes
        self._position += found - have
        where = _plus(segment.offset, at + found - have) if found >= have else _plus(offset, found)
        skipped = self._position - self._lost
        if skipped:
            what = "were skipped up to" if self.recognized else "before"
            self._fault(segment.time, f"{skipped} bytes {what} the next intact frame header", where, self._position)
        self._lost = None
        self._pending = b""
        self._position += HEADER_SIZE
        self._begin(header, data[found : found + HEADER_SIZE], segment.time, where)
        self._finish(segment.time)
        return at + found - have + HEADER_SIZE

    def _begin(self, header: Header, raw: bytes, start: int, offset: int | None) -> None:
        self.recognized = True
        frame = Frame(
            -1, start, start, self._stripe, self._direction, offset, self._position - HEADER_SIZE, header, "ok",
            raw_header=raw,
        )  # fmt: skip
        try:
            header.check(LIMITS)
        except LynxError as error:
            frame.problem = str(error)
        self._partial = _Partial(frame, self._keep, self._budget)

    def _finish(self, time: int) -> None:
        partial = self._partial
        if partial is None or not partial.done:
            return
        self._partial = None
        self._budget.left += partial.reserved
        frame = partial.frame
        frame.time = time
        frame.extension = bytes(partial.extension)
        frame.payload = bytes(partial.payload)
        if partial.crc != frame.header.payload_crc:
            frame.checksum = "bad"
            frame.problem = (
                f"CRC32C of the payload is {partial.crc:#010x}, the header says {frame.header.payload_crc:#010x}"
            )
        elif not frame.problem and not frame.is_data and len(frame.payload) < frame.size:
            frame.problem = "not decoded: too many control frames are on their way at once"
        elif not frame.problem:
            self._decode(frame)
        self._out.append(frame)

    def _decode(self, frame: Frame) -> None:
        header = frame.header
        try:
            if frame.extension:
                frame.bitmap = parse_extension(frame.extension)
            if header.type == FrameType.DATA:
                if frame.bitmap:
                    header.key(frame.bitmap).check("DATA frame")
            elif header.known:
                frame.body = parse_body(header, frame.payload, LIMITS)
        except CorruptFrameError as error:
            frame.checksum = "bad"
            frame.problem = str(error)
        except LynxError as error:
            frame.problem = str(error)

    def _cut(self, time: int, why: str) -> None:
        if self._partial is not None:
            partial, self._partial = self._partial, None
            self._budget.left += partial.reserved
            frame = partial.frame
            total = HEADER_SIZE + frame.header.extension_length + frame.header.payload_length
            have = total - partial.extension_left - partial.payload_left
            frame.time = time
            frame.checksum = "cut"
            frame.problem = f"{why} inside the frame: {have} of its {total} bytes are there"
            frame.extension, frame.payload = bytes(partial.extension), bytes(partial.payload)
            self._out.append(frame)
        elif self._lost is None and self._pending:
            have = len(self._pending)
            reason = f"{why} inside a frame header: {have} of its {HEADER_SIZE} bytes are there"
            self._fault(time, reason, self._pending_from[1], self._position - have)
        self._pending = b""


def _plus(offset: int | None, n: int) -> int | None:
    return None if offset is None else offset + n


def _find_header(data: bytes) -> tuple[int, Header | None]:
    """The first intact header and where; without one, where the bytes begin that more data might complete to one."""
    at = data.find(MAGIC)
    while 0 <= at <= len(data) - HEADER_SIZE:
        raw = data[at : at + HEADER_SIZE]
        if crc32c(raw[:-4]) == int.from_bytes(raw[-4:], "little"):
            try:
                return at, Header.unpack(raw)
            except VersionError:
                pass
        at = data.find(MAGIC, at + 1)
    if at >= 0:
        return at, None
    tail = max(0, len(data) - len(MAGIC) + 1)
    return tail, None


class Inspector:
    """Turns what a source yields into numbered frames and faults, with what earlier frames say about later ones."""

    def __init__(self, *, keep: int = 0, lenient: bool = False) -> None:
        self._keep = keep
        self._lenient = lenient
        self._readers: dict[tuple[int, Direction], FrameReader] = {}
        self._budget = _Budget(_MAX_HELD)
        self._context = Context()
        self._number = 0
        self._time = 0
        self.faults = 0
        """Faults so far, frames with a problem included."""
        self.unrecognized = 0
        """Byte streams that ended without a single frame (of a lenient inspector)."""

    @property
    def frames(self) -> int:
        """Frames so far."""
        return self._number

    def feed(self, item: Item) -> Iterator[Frame | Fault]:
        """What ``item`` completes."""
        self._time = item.time
        if isinstance(item, Segment | Gap) and (item.stripe, item.direction) not in self._readers:
            if len(self._readers) >= 2 * _MAX_STRIPES:  # the one that is known longest gives way
                yield from self._end(*next(iter(self._readers)))
            reader = FrameReader(
                item.stripe, item.direction, keep=self._keep, lenient=self._lenient, budget=self._budget
            )
            self._readers[item.stripe, item.direction] = reader
        if isinstance(item, Segment):
            yield from self._number_them(self._readers[item.stripe, item.direction].feed(item))
        elif isinstance(item, StripeEnd):
            for direction in Direction:
                yield from self._end(item.stripe, direction)
        elif isinstance(item, Gap):
            yield from self._number_them(self._readers[item.stripe, item.direction].gap(item))
        else:
            yield from self._number_them([item])

    def end(self) -> Iterator[Frame | Fault]:
        """The source is over: what is left of frames that were begun."""
        for stripe, direction in list(self._readers):
            yield from self._end(stripe, direction)

    def _end(self, stripe: int, direction: Direction) -> Iterator[Frame | Fault]:
        reader = self._readers.pop((stripe, direction), None)
        if reader is not None:
            self.unrecognized += not reader.recognized
            yield from self._number_them(reader.end(self._time))

    def _number_them(self, found: list[Frame | Fault]) -> Iterator[Frame | Fault]:
        for one in found:
            if isinstance(one, Frame):
                one.number = self._number
                self._number += 1
                self._context.observe(one)
                self.faults += bool(one.problem)
            else:
                self.faults += 1
            yield one
