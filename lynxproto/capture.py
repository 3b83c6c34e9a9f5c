"""The capture file format ``.lynx`` (spec/capture.md), and how a session records itself into one.

A capture is what went over a session's byte streams, as it went: records of bytes with a time, a direction and a
stripe. It holds the frames unencrypted, whatever the transport did to them afterwards.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from lynxproto.digest import crc32c
from lynxproto.errors import CaptureError
from lynxproto.transports.abc import ByteStream, Credentials

__all__ = ["CaptureWriter", "Direction", "FileHeader", "RecordHeader", "RecordKind"]

_log = logging.getLogger("lynxproto")

#: PNG's recipe: a byte above 127, a name, CR LF and Ctrl-Z, so that a damaging copy is noticed at once.
MAGIC: Final = b"\x89LYNX\r\n\x1a"
VERSION: Final = 1

_FILE: Final = struct.Struct("<8sHHIQII")
_RECORD: Final = struct.Struct("<IBBHQII")
FILE_HEADER_SIZE: Final = _FILE.size
RECORD_HEADER_SIZE: Final = _RECORD.size
#: Bytes of one record that a writer makes at most; readers take any length.
_MAX_RECORD: Final = 1 << 24
#: Buffers of one writev; below Linux's IOV_MAX of 1024.
_IOV: Final = 512


class Direction(IntEnum):
    """Which way bytes went; the client is the side that opened the stripe."""

    TO_SERVER = 0
    TO_CLIENT = 1


class RecordKind(IntEnum):
    """What a record says; spec/capture.md, "Records". Readers skip other kinds."""

    DATA = 0
    OPENED = 1
    CLOSED = 2


class FileHeader(NamedTuple):
    """The first 32 bytes of a capture. ``start``: time 0 of its records, nanoseconds since 1970 (UTC)."""

    start: int

    def pack(self) -> bytes:
        """The 32 bytes, with their CRC32C."""
        head = _FILE.pack(MAGIC, VERSION, FILE_HEADER_SIZE, 0, self.start, 0, 0)[:-4]
        return head + crc32c(head).to_bytes(4, "little")

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> FileHeader:
        """Decode and check. Raises :class:`~lynxproto.errors.CaptureError`."""
        if len(data) < FILE_HEADER_SIZE:
            raise CaptureError(f"the capture ends after {len(data)} bytes, inside its file header")
        magic, version, size, flags, start, _reserved, crc = _FILE.unpack(data[:FILE_HEADER_SIZE])
        if magic != MAGIC:
            raise CaptureError(f"not a capture: it begins with {magic.hex(' ')}, not {MAGIC.hex(' ')}")
        if crc32c(memoryview(data)[: FILE_HEADER_SIZE - 4]) != crc:
            raise CaptureError("the CRC32C of the capture's file header is wrong (offset 28)")
        if version != VERSION or size != FILE_HEADER_SIZE or flags:
            raise CaptureError(f"capture of version {version}, flags {flags:#x}; this program reads version 1, flags 0")
        return cls(start)


class RecordHeader(NamedTuple):
    """The 24 bytes before a record's data. ``time``: nanoseconds since the file header's ``start``."""

    length: int
    kind: int
    direction: int
    time: int
    stripe: int

    def pack(self) -> bytes:
        """The 24 bytes, with their CRC32C."""
        head = _RECORD.pack(self.length, self.kind, self.direction, 0, self.time, self.stripe, 0)[:-4]
        return head + crc32c(head).to_bytes(4, "little")

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> RecordHeader:
        """Decode and check 24 bytes. Raises :class:`~lynxproto.errors.CaptureError`."""
        length, kind, direction, _reserved, when, stripe, crc = _RECORD.unpack(data)
        if crc32c(memoryview(data)[: RECORD_HEADER_SIZE - 4]) != crc:
            raise CaptureError("the CRC32C of a record header is wrong")
        if direction > Direction.TO_CLIENT:
            raise CaptureError(f"a record has the direction {direction}; 0 and 1 exist")
        return cls(length, kind, direction, when, stripe)


class CaptureWriter:
    """Writes a capture; streams of several sessions may share one. Thread-safe.

    ``path`` may be a FIFO or ``/dev/stdout``. Each record is one ``writev``, so that what happened before a crash is in
    the file, and another program can read along. A write that fails (a full disk) ends the capture and not the
    session: it is logged at once, and :meth:`close` raises it.
    """

    def __init__(
        self, path: str | Path, *, clock: Callable[[], int] = time.monotonic_ns, start: int | None = None
    ) -> None:
        """Create or truncate ``path``. Raises :class:`~lynxproto.errors.CaptureError` if that is not possible."""
        self.path = Path(path)
        self.error: CaptureError | None = None
        self._clock = clock
        self._zero = clock()
        self._lock = threading.Lock()
        self._stripes = 0
        try:
            self._fd: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CaptureError(f"cannot write the capture {self.path}: {error.strerror}") from error
        self._write([FileHeader(time.time_ns() if start is None else start).pack()])

    def opened(self, name: str = "") -> int:
        """A stripe begins; returns its number in this capture. ``name``: the peer, for people."""
        with self._lock:
            stripe = self._stripes
            self._stripes += 1
        self._record(RecordKind.OPENED, Direction.TO_SERVER, stripe, [memoryview(name.encode()[:1024])])
        return stripe

    def data(self, stripe: int, direction: Direction, buffers: Sequence[bytes | memoryview]) -> None:
        """Bytes went over ``stripe``, the ``buffers`` one after the other."""
        batch: list[memoryview] = []
        size = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while view.nbytes:
                part, view = view[: _MAX_RECORD - size], view[_MAX_RECORD - size :]
                batch.append(part)
                size += part.nbytes
                if size == _MAX_RECORD:
                    self._record(RecordKind.DATA, direction, stripe, batch)
                    batch, size = [], 0
        if batch:
            self._record(RecordKind.DATA, direction, stripe, batch)

    def closed(self, stripe: int) -> None:
        """A stripe is over."""
        self._record(RecordKind.CLOSED, Direction.TO_SERVER, stripe, [])

    def attach(self, stream: ByteStream, *, client: bool, received: bytes = b"") -> ByteStream:
        """``stream``, recorded from now on. ``client``: this side opened it; ``received``: was read from it before."""
        return _Recorded(self, stream, client=client, received=received)

    def close(self) -> None:
        """Close the file. Idempotent. Raises the :class:`~lynxproto.errors.CaptureError` of a write that failed."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _record(self, kind: RecordKind, direction: Direction, stripe: int, data: Sequence[memoryview]) -> None:
        length = sum(view.nbytes for view in data)
        with self._lock:  # the time is taken inside, so that times in a file never run backwards
            header = RecordHeader(length, kind, direction, self._clock() - self._zero, stripe).pack()
            self._write([header, *data])

    def _write(self, buffers: list[bytes | memoryview]) -> None:
        if self._fd is None or self.error is not None:
            return
        views = [memoryview(buffer) for buffer in buffers]
        try:
            while views:
                written = os.writev(self._fd, views[:_IOV])
                while views and written >= views[0].nbytes:
                    written -= views.pop(0).nbytes
                if views:
                    views[0] = views[0][written:]
        except OSError as error:
            self.error = CaptureError(f"the capture {self.path} is incomplete: {error.strerror}")
            _log.warning("%s; the session goes on", self.error)


class _Recorded(ByteStream):
    """A byte stream whose traffic is recorded. What is sent is recorded when it is handed to the stream."""

    def __init__(self, writer: CaptureWriter, stream: ByteStream, *, client: bool, received: bytes) -> None:
        self._writer = writer
        self._stream = stream
        self._out, self._in = Direction.TO_SERVER, Direction.TO_CLIENT
        if not client:
            self._out, self._in = self._in, self._out
        self._stripe = writer.opened(stream.name)
        self._open = True
        if received:
            writer.data(self._stripe, self._in, [received])

    @property
    def name(self) -> str:
        return self._stream.name

    @property
    def credentials(self) -> Credentials:
        return self._stream.credentials

    async def receive_into(self, buffer: memoryview) -> int:
        count = await self._stream.receive_into(buffer)
        if count:
            self._writer.data(self._stripe, self._in, [buffer[:count]])
        return count

    async def send(self, buffers: Sequence[memoryview]) -> None:
        self._writer.data(self._stripe, self._out, buffers)
        await self._stream.send(buffers)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            self._writer.closed(self._stripe)
        await self._stream.aclose()
