"""A proxy for byte streams that strikes at given bytes: flips, cuts, silence, stalls, trickles, other speeds.

Offsets count the bytes of one direction over all streams together, in the order that the proxy forwards them, so that
each strike falls once. The proxy knows frames only where it is asked to lose or double them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal
from urllib.parse import urlsplit

from lynxproto.errors import ProtocolError
from lynxproto.frames import HEADER_SIZE, FrameType, Header

__all__ = ["ChaosProxy", "Direction", "FrameFaults", "Strike"]

Direction = Literal["up", "down"]
StrikeKind = Literal["flip", "end", "reset", "silence", "stall", "trickle", "rate", "gate", "gone"]

_READ = 16 << 10
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


@dataclass(frozen=True, slots=True)
class Strike:
    """What happens when ``at`` bytes have gone ``direction``.

    ``flip``: bit ``value`` of the next byte. ``end``, ``reset``: the stream ends in order, or with a TCP reset.
    ``silence``: both ends stay open, and nothing is forwarded any more. ``stall``: nothing for ``value`` seconds.
    ``trickle``: the next ``value`` bytes go a few at a time. ``rate``: from now on ``value`` bytes a second.
    ``gate``: nothing until :attr:`ChaosProxy.gate` is set. ``gone``: as ``silence``, for all streams, and new ones too.
    """

    at: int
    direction: Direction
    kind: StrikeKind
    value: float = 0


@dataclass(frozen=True, slots=True)
class FrameFaults:
    """What may happen to a whole frame after the handshake, ``limit`` times in all.

    ``spoil`` damages the payload of every DATA frame of this layer, whatever the limit: also when it is sent again.
    """

    lose: float = 0.0
    double: float = 0.0
    limit: int = 0
    spoil_layer: int | None = None


@dataclass(eq=False)
class _Stream:
    near: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    far: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    delay: float
    parked: bool = False  # nothing is forwarded, and neither end is closed
    locks: dict[Direction, asyncio.Lock] = field(default_factory=lambda: {"up": asyncio.Lock(), "down": asyncio.Lock()})
    greeted: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})  # handshake frames seen

    def sink(self, direction: Direction) -> asyncio.StreamWriter:
        return self.far[1] if direction == "up" else self.near[1]

    def source(self, direction: Direction) -> asyncio.StreamReader:
        return self.near[0] if direction == "up" else self.far[0]

    def close(self, *, reset: bool) -> None:
        for _, writer in (self.near, self.far):
            if reset:
                sock = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                writer.transport.abort()
            else:
                writer.close()


class ChaosProxy:
    """Listens at ``url`` (``tcp`` or ``unix``, as the target) and forwards to ``target``; ``async with`` it.

    While :attr:`target` is empty nobody is there. ``delays``: each stream gets its own delay per piece from this range,
    in seconds, so that stripes overtake another.
    """

    def __init__(
        self,
        target: str,
        listen_at: str,
        *,
        strikes: Sequence[Strike] = (),
        frames: FrameFaults | None = None,
        delays: tuple[float, float] = (0.0, 0.0),
        random: Random,
    ) -> None:
        self.target = target
        self.url = listen_at
        self.gate = asyncio.Event()
        self.reached = asyncio.Event()
        """A ``gate`` was reached."""
        self.struck: list[Strike] = []
        self.frames_hit = 0
        self.streams = 0
        in_order = sorted(strikes, key=lambda strike: strike.at)
        self._strikes = {way: [strike for strike in in_order if strike.direction == way] for way in ("up", "down")}
        self._passed: dict[Direction, int] = {"up": 0, "down": 0}
        self._frames = frames
        self._delays = delays
        self._random = random
        self._rate: float | None = None
        self._trickle: dict[Direction, int] = {"up": 0, "down": 0}
        self._gone = False
        self._open: set[_Stream] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ChaosProxy:
        parts = urlsplit(self.url)
        self._server: asyncio.Server
        if parts.scheme == "unix":
            self._server = await asyncio.start_unix_server(self._accept, parts.path)
        else:
            self._server = await asyncio.start_server(self._accept, parts.hostname, parts.port)
            self.url = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for stream in list(self._open):
            stream.close(reset=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)  # transports close their sockets in a later turn of the loop

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:  # the end of the run, not a failure that anyone should hear of
            pass
        finally:
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._gone or not self.target:
            writer.transport.abort()
            return
        try:
            parts = urlsplit(self.target)
            far = await (
                asyncio.open_unix_connection(parts.path)
                if parts.scheme == "unix"
                else asyncio.open_connection(parts.hostname, parts.port)
            )
        except OSError:
            writer.transport.abort()
            return
        self.streams += 1
        stream = _Stream((reader, writer), far, self._random.uniform(*self._delays))
        self._open.add(stream)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(stream, "up"))
                group.create_task(self._forward(stream, "down"))
        finally:
            self._open.discard(stream)
            stream.close(reset=False)

    async def _forward(self, stream: _Stream, direction: Direction) -> None:
        """One direction of one stream, until it ends."""
        source, sink = stream.source(direction), stream.sink(direction)
        pending = bytearray()
        try:
            while data := await source.read(_READ):
                if self._frames is None:
                    await self._send(stream, direction, data)
                    continue
                pending += data
                for frame in _split(pending):
                    await self._send_frame(stream, direction, frame)
            if pending:
                await self._send(stream, direction, bytes(pending))
            if not stream.parked and sink.can_write_eof():
                sink.write_eof()
        except (OSError, RuntimeError):  # either end is gone (RuntimeError: the transport is closing)
            stream.close(reset=False)
        await self._while_parked(stream)

    async def _while_parked(self, stream: _Stream) -> None:
        if stream.parked or self._gone:
            await asyncio.Event().wait()  # until the run is over

    # --- frames

    async def _send_frame(self, stream: _Stream, direction: Direction, frame: bytes) -> None:
        faults, random = self._frames, self._random
        assert faults is not None
        header = Header.unpack(memoryview(frame)[:HEADER_SIZE])
        if header.type in (FrameType.HELLO, FrameType.HELLO_ACK):
            stream.greeted[direction] += 1
        elif faults.spoil_layer is not None and header.type == FrameType.DATA and header.layer == faults.spoil_layer:
            self.frames_hit += 1
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
        elif self.frames_hit < faults.limit and stream.greeted[direction] == 2:
            if random.random() < faults.lose:
                self.frames_hit += 1
                return
            if random.random() < faults.double:
                self.frames_hit += 1
                others = [s for s in self._open if s.greeted == {"up": 2, "down": 2} and not s.parked]
                twin = random.choice([*others, stream])
                if twin is not stream:
                    async with twin.locks[direction]:
                        await self._send(twin, direction, frame)
                else:
                    await self._locked(stream, direction, frame)
        await self._locked(stream, direction, frame)

    async def _locked(self, stream: _Stream, direction: Direction, frame: bytes) -> None:
        async with stream.locks[direction]:
            await self._send(stream, direction, frame)

    # --- bytes

    async def _send(self, stream: _Stream, direction: Direction, data: bytes) -> None:
        """Forward ``data``, with the strikes that fall on it."""
        view = bytearray(data)
        sink = stream.sink(direction)
        strikes = self._strikes[direction]
        if stream.delay:
            await asyncio.sleep(self._random.uniform(0, stream.delay))
        while view:
            if stream.parked or self._gone:
                await asyncio.Event().wait()
            due = strikes[0].at - self._passed[direction] if strikes else len(view)
            if due <= 0:
                strike = strikes.pop(0)
                self.struck.append(strike)
                if strike.kind == "flip":
                    view[0] ^= 1 << int(strike.value)
                else:
                    await self._strike(stream, strike)
                continue
            n = min(due, len(view))
            if self._trickle[direction] > 0:
                n = min(n, self._random.randint(1, 48))
                self._trickle[direction] -= n
                await asyncio.sleep(0.001)
            elif self._rate is not None:
                n = min(n, 4096)
                await asyncio.sleep(n / self._rate)
            part, view = bytes(view[:n]), view[n:]
            self._passed[direction] += n
            sink.write(part)
            await sink.drain()

    async def _strike(self, stream: _Stream, strike: Strike) -> None:
        match strike.kind:
            case "end" | "reset":
                stream.close(reset=strike.kind == "reset")
                raise ConnectionAbortedError(f"{strike.kind} at byte {strike.at}")
            case "silence":
                stream.parked = True
            case "gone":
                self._gone = True
            case "stall":
                await asyncio.sleep(strike.value)
            case "trickle":
                self._trickle[strike.direction] = int(strike.value)
            case "rate":
                self._rate = strike.value
            case "gate":
                self.reached.set()
                await self.gate.wait()
            case _:
                raise AssertionError(strike.kind)


def _split(data: bytearray) -> list[bytes]:
    """Remove and return the whole frames at the start of ``data``; all of it if it holds no frames (any more)."""
    found = []
    while len(data) >= HEADER_SIZE:
        try:
            header = Header.unpack(memoryview(data)[:HEADER_SIZE].tobytes())
        except ProtocolError:
            found.append(bytes(data))
            data.clear()
            break
        size = HEADER_SIZE + header.extension_length + header.payload_length
        if len(data) < size:
            break
        found.append(bytes(data[:size]))
        del data[:size]
    return found


def describe(strikes: Sequence[Strike]) -> list[dict[str, Any]]:
    """For reports."""
    return [{"at": s.at, "direction": s.direction, "kind": s.kind, "value": s.value} for s in strikes]
