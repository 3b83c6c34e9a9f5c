"""Where bytes come from: a capture file, a pcap, a raw byte stream; from a path or from standard input.

Formats are told apart by their first bytes. Everything streams through one buffer.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from lynxproto import capture, frames
from lynxproto.capture import Direction, FileHeader, RecordHeader, RecordKind
from lynxproto.errors import CaptureError
from lynxproto.inspect.model import Fault, Item, Segment, StripeEnd
from lynxproto.inspect.packets import MAGICS
from lynxproto.inspect.pcap import open_pcap

__all__ = ["Source", "open_source"]

_BUFFER: Final = 1 << 20


class _Input(io.RawIOBase):
    """A file, FIFO or pipe that is read once, with its first bytes looked at. ``readinto`` returns what is there."""

    def __init__(self, path: str) -> None:
        self.name = "standard input" if path == "-" else path
        if path == "-":  # unbuffered: a buffer would wait until it is full, and a live source has more to show now
            self._file: BinaryIO = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        else:
            self._file = cast(BinaryIO, Path(path).open("rb", buffering=0))  # noqa: SIM115  # closed by close()
        self._head = b""
        self.position = 0

    @property
    def size(self) -> int | None:
        """Bytes of a regular file; None for anything that only ends when it ends."""
        try:
            size = os.fstat(self._file.fileno()).st_size
        except OSError:
            return None
        return size or None

    def peek(self, n: int) -> bytes:
        """The first ``n`` bytes, or all if there are fewer; they will be read again."""
        while len(self._head) < n and (more := self._file.read(n - len(self._head))):
            self._head += more
        return self._head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._head:
            data = self._head[: view.nbytes]
            self._head = self._head[len(data) :]
            view[: len(data)] = data
            count = len(data)
        else:
            count = self._file.readinto(view)  # type: ignore[attr-defined]  # unbuffered files and BytesIO have it
        self.position += count
        return count

    def close(self) -> None:
        if not self.closed and self.name != "standard input":
            self._file.close()
        super().close()


class Source:
    """An iterable of items. ``lenient``: its streams may begin inside a frame, or hold none."""

    def __init__(
        self, file: _Input, kind: str, items: Iterator[Item], *, start: int = 0, lenient: bool = False
    ) -> None:
        self.kind = kind
        """``capture``, ``pcap`` or ``frames`` (a raw byte stream of one direction)."""
        self.start = start
        """Time 0 of its items, nanoseconds since 1970; 0 if unknown."""
        self.lenient = lenient
        self._items = items
        self._file = file

    @property
    def name(self) -> str:
        """For messages."""
        return self._file.name

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._file.position

    @property
    def size(self) -> int | None:
        """Bytes in all, if that is known."""
        return self._file.size

    def __iter__(self) -> Iterator[Item]:
        return self._items

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_source(path: str) -> Source:
    """Open ``path`` (``-``: standard input) and find out what it is.

    Raises :class:`~lynxproto.errors.CaptureError` if it cannot be read, is empty, or is no capture at all.
    """
    try:
        file = _Input(path)
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror}") from error
    try:
        return _recognize(file)
    except OSError as error:
        file.close()
        raise CaptureError(f"cannot read {path}: {error.strerror}") from error
    except BaseException:
        file.close()
        raise


def _recognize(file: _Input) -> Source:
    head = file.peek(capture.FILE_HEADER_SIZE)
    if not head:
        raise CaptureError(f"{file.name} is empty")
    if head.startswith(capture.MAGIC):
        try:
            header = FileHeader.unpack(head)
        except CaptureError as error:
            raise CaptureError(f"{file.name}: {error}") from error
        return Source(file, "capture", read_capture(file), start=header.start)
    if head.startswith(MAGICS):
        start, items = open_pcap(file.name, io.BufferedReader(file, _BUFFER))
        return Source(file, "pcap", items, start=start, lenient=True)
    if head.startswith(frames.MAGIC):
        return Source(file, "frames", read_frames(file))
    raise CaptureError(
        f"{file.name} is neither a capture (.lynx) nor a pcap nor frames: it begins with {head[:8].hex(' ')}; "
        "make a capture with `lynxproto recv --capture FILE` or `lynxproto inspect --listen URL --connect URL`"
    )


class _Buffer:
    """Bytes of a file, as views that are valid until the next call."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._memory = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0
        self.offset = 0
        """Of the next byte in the file."""

    def some(self, limit: int) -> memoryview:
        """The next 1 to ``limit`` bytes; none at the end."""
        if self._start == self._end:
            self._start, self._end = 0, self._file.readinto(self._memory) or 0
        return self._taken(min(limit, self._end - self._start))

    def exactly(self, n: int) -> memoryview:
        """The next ``n`` bytes; fewer only at the end."""
        if self._end - self._start < n:
            rest = bytes(self._memory[self._start : self._end])
            self._memory[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
            while self._end < n and (count := self._file.readinto(self._memory[self._end :])):
                self._end += count
        return self._taken(min(n, self._end - self._start))

    def _taken(self, n: int) -> memoryview:
        view = self._memory[self._start : self._start + n]
        self._start += n
        self.offset += n
        return view


def read_capture(file: io.RawIOBase) -> Iterator[Item]:
    """The items of a capture file. The last is a :class:`Fault` if the file is broken."""
    buffer = _Buffer(file)
    buffer.exactly(capture.FILE_HEADER_SIZE)  # looked at before
    time = 0
    while raw := buffer.exactly(capture.RECORD_HEADER_SIZE):
        offset = buffer.offset - raw.nbytes
        if raw.nbytes < capture.RECORD_HEADER_SIZE:
            reason = f"the capture ends inside a record header: {raw.nbytes} of {capture.RECORD_HEADER_SIZE} bytes"
            yield Fault(time, reason, offset=offset)
            return
        try:
            record = RecordHeader.unpack(raw)
        except CaptureError as error:
            yield Fault(time, f"{error}; the capture cannot be read from here on", offset=offset)
            return
        time, left = record.time, record.length
        while left:
            at = buffer.offset
            data = buffer.some(left)
            if not data.nbytes:
                have = record.length - left
                reason = f"the capture ends inside a record: {have} of {record.length} bytes"
                yield Fault(time, reason, offset=offset)
                return
            left -= data.nbytes
            if record.kind == RecordKind.DATA:
                yield Segment(time, record.stripe, Direction(record.direction), data, at)
        if record.kind == RecordKind.CLOSED:
            yield StripeEnd(time, record.stripe)


def read_frames(file: io.RawIOBase) -> Iterator[Item]:
    """A raw byte stream of frames: one direction, no times."""
    buffer = _Buffer(file)
    while (data := buffer.some(_BUFFER)).nbytes:
        yield Segment(0, 0, Direction.TO_SERVER, data, buffer.offset - data.nbytes)
