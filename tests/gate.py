"""A link that lets anchors pass and holds residuals until it is opened: arrivals in an order that a test chooses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from lynxproto.frames import HEADER_SIZE, FrameType, Header
from lynxproto.transports.abc import ByteStream, WrappedStream


class ResidualGate:
    """Give as ``link``. Frames that come after a held one pass it; for caches that fit into memory twice."""

    def __init__(self) -> None:
        self.opened = False
        self._lock = threading.Lock()
        self._streams: list[_Gated] = []

    def open(self) -> None:
        """Let everything pass. From any thread, while the session is open."""
        with self._lock:
            if self.opened:
                return
            self.opened = True
            for stream in self._streams:
                asyncio.run_coroutine_threadsafe(stream.flush(), stream.loop)

    def over(self, stream: ByteStream) -> ByteStream:
        with self._lock:
            self._streams.append(_Gated(stream, self))
            return self._streams[-1]


class _Gated(WrappedStream):
    def __init__(self, stream: ByteStream, gate: ResidualGate) -> None:
        super().__init__(stream)
        self.loop = asyncio.get_running_loop()
        self._gate = gate
        self._frame = bytearray()  # as far as it was sent
        self._held: list[bytes] = []
        self._writing = asyncio.Lock()

    async def send(self, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            rest = memoryview(buffer).cast("B")
            while rest:
                size = HEADER_SIZE
                if len(self._frame) >= HEADER_SIZE:
                    size += Header.unpack(self._frame[:HEADER_SIZE]).payload_length
                missing = size - len(self._frame)
                self._frame += rest[:missing]
                rest = rest[missing:]
                if len(self._frame) >= HEADER_SIZE:
                    await self._pass(Header.unpack(self._frame[:HEADER_SIZE]))

    async def _pass(self, header: Header) -> None:
        if len(self._frame) < HEADER_SIZE + header.payload_length:
            return
        frame, self._frame = bytes(self._frame), bytearray()
        if header.type == FrameType.DATA and header.level and not self._gate.opened:
            self._held.append(frame)
            return
        async with self._writing:
            await self._stream.send([memoryview(frame)])

    async def flush(self) -> None:
        async with self._writing:
            for frame in self._held:
                await self._stream.send([memoryview(frame)])
            self._held.clear()
