"""Faults on any transport, by seed: bit flips, lost bytes, early ends, resets, stalls, delays, short reads and writes.

A fault strikes at a byte of a stream's direction, not at a call or a time; so a seed hits the same bytes of the same
stream however the machine schedules the session.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from random import Random
from typing import Any, Final, Literal, TypeVar, get_args

from lynxproto.errors import ConfigError, StreamClosedError, TransportError
from lynxproto.transports.abc import ByteStream, WrappedStream, take

__all__ = ["Fault", "FaultKind", "Faults", "FaultyStream"]

T = TypeVar("T")

FaultKind = Literal["flip", "drop", "end", "reset", "stall"]
Direction = Literal["send", "receive"]

_KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that goes wrong before byte ``at`` of one direction of a stream passes.

    ``flip`` inverts bit ``bit`` of that byte; ``drop`` loses ``nbytes`` bytes; after ``end`` nothing more arrives and
    the reading side sees an end; ``reset`` breaks the link; ``stall`` lets nothing through for ``seconds``.
    """

    kind: FaultKind
    at: int
    stream: int = 0
    """Which of the streams that the :class:`Faults` saw, in order."""
    direction: Direction = "send"
    bit: int = 0
    nbytes: int = 1
    seconds: float = float("inf")

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"unknown kind of fault {self.kind!r}; known: {', '.join(_KINDS)}")
        if self.at < 0 or self.nbytes < 1 or not 0 <= self.bit < 8 or not self.seconds >= 0:
            raise ConfigError(f"a fault that cannot be: {self}")


class Faults:
    """A link (see :class:`~lynxproto.transports.abc.Link`) on which things go wrong.

    ``every`` gives for each kind the mean number of bytes between two such faults, in each of ``directions`` of each
    stream; ``script`` adds faults at known places. ``limit`` bounds how many strike in all, so that a session gets
    through in the end. ``piece``: reads and writes are cut into pieces of 1 to so many bytes. ``delay``: seconds
    (least, most) that a piece takes longer. ``stall``: seconds (least, most) of drawn stalls. ``drop``: bytes of drawn
    losses at most. ``sleep`` waits for so many seconds.
    """

    def __init__(
        self,
        seed: int,
        *,
        every: Mapping[FaultKind, float] | None = None,
        script: Sequence[Fault] = (),
        directions: Sequence[Direction] = ("send", "receive"),
        limit: int | None = None,
        piece: int | None = None,
        delay: tuple[float, float] = (0.0, 0.0),
        stall: tuple[float, float] = (0.0, 0.1),
        drop: int = 64,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.seed = seed
        self.every = dict(every or {})
        for kind, mean in self.every.items():
            if kind not in _KINDS:
                raise ConfigError(f"unknown kind of fault {kind!r}; known: {', '.join(_KINDS)}")
            if not mean > 0:
                raise ConfigError(f"faults of kind {kind!r} must be a positive number of bytes apart, not {mean!r}")
        if (piece is not None and piece < 1) or drop < 1:
            raise ConfigError("Faults: piece and drop are numbers of bytes, 1 at least")
        self.script = tuple(script)
        self.directions = tuple(directions)
        self.limit = limit
        self.piece = piece
        self.delay = delay
        self.stall = stall
        self.drop = drop
        self.sleep = sleep
        #: What has struck, in order.
        self.struck: list[Fault] = []
        self._streams = itertools.count()

    def over(self, stream: ByteStream) -> ByteStream:
        """See :meth:`~lynxproto.transports.abc.Link.over`."""
        return FaultyStream(stream, self, next(self._streams))

    def plan(self, stream: int, direction: Direction) -> Iterator[Fault]:
        """The faults of one direction of one stream, in order; endless if ``every`` names any kind."""
        drawn = [self._draw(kind, stream, direction) for kind in self.every] if direction in self.directions else []
        script = [fault for fault in self.script if (fault.stream, fault.direction) == (stream, direction)]
        return merge(sorted(script, key=_place), *drawn, key=_place)

    def strike(self, fault: Fault) -> bool:
        """Whether ``fault`` may still strike; counts it."""
        if self.limit is not None and len(self.struck) >= self.limit:
            return False
        self.struck.append(fault)
        return True

    def _draw(self, kind: FaultKind, stream: int, direction: Direction) -> Iterator[Fault]:
        random = Random(f"{self.seed}/{stream}/{direction}/{kind}")
        at = -1
        while True:
            at += 1 + int(random.expovariate(1 / self.every[kind]))
            yield Fault(
                kind=kind,
                at=at,
                stream=stream,
                direction=direction,
                bit=random.randrange(8),
                nbytes=random.randint(1, self.drop),
                seconds=random.uniform(*self.stall),
            )


def _place(fault: Fault) -> int:
    return fault.at


class _Way:
    """One direction of a stream: where it is, and what comes next."""

    def __init__(self, faults: Faults, stream: int, direction: Direction) -> None:
        self.at = 0
        self.lose = 0
        """Bytes that still are to be lost."""
        self.ended = False
        self._faults = faults
        self._plan = faults.plan(stream, direction)
        self._next = next(self._plan, None)
        self._random = Random(f"{faults.seed}/{stream}/{direction}")

    def due(self) -> Fault | None:
        """The next fault that strikes here, if there is one."""
        while self._next is not None and self._next.at <= self.at:
            fault = self._next
            self._next = next(self._plan, None)
            if self._faults.strike(fault):
                return fault
        return None

    def room(self, nbytes: int) -> int:
        """How many of ``nbytes`` bytes may pass at once."""
        if self._next is not None:
            nbytes = min(nbytes, max(1, self._next.at - self.at))  # several faults may share a byte
        if self._faults.piece is not None:
            nbytes = min(nbytes, self._random.randint(1, self._faults.piece))
        return nbytes

    def delay(self) -> float:
        """How much longer the next piece takes, in seconds."""
        least, most = self._faults.delay
        return self._random.uniform(least, most) if most > 0 else 0.0


class FaultyStream(WrappedStream):
    """``stream``, which it owns, with the faults that ``faults`` plans for its ``number``-th stream."""

    def __init__(self, stream: ByteStream, faults: Faults, number: int) -> None:
        super().__init__(stream)
        self._faults = faults
        self._ways: dict[Direction, _Way] = {
            "send": _Way(faults, number, "send"),
            "receive": _Way(faults, number, "receive"),
        }
        self._reset: Fault | None = None
        self._closed = asyncio.get_running_loop().create_future()

    async def receive_into(self, buffer: memoryview) -> int:
        """See :meth:`ByteStream.receive_into`."""
        way = self._ways["receive"]
        while True:
            flips = await self._strike(way)
            if way.ended:
                return 0
            target = memoryview(bytearray(way.lose)) if way.lose else buffer
            room = 1 if flips else way.room(target.nbytes)
            count = await self._through(self._stream.receive_into(target[:room]))
            way.at += count
            if count and way.lose:
                way.lose -= count
                continue
            if count:
                buffer[0] ^= flips
            return count

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`."""
        way = self._ways["send"]
        queue = deque(memoryview(b).cast("B") for b in buffers if memoryview(b).nbytes)
        if not queue:
            await self._through(self._stream.send([]))
        while queue:
            flips = await self._strike(way)
            left = sum(part.nbytes for part in queue)
            piece = take(queue, 1 if flips else way.room(min(way.lose, left) if way.lose else left))
            count = sum(part.nbytes for part in piece)
            if way.lose:
                way.lose -= count
            elif not way.ended:
                flipped = [memoryview(bytes([piece[0][0] ^ flips]))] if flips else piece
                await self._through(self._stream.send(flipped))
            way.at += count

    async def send_eof(self) -> None:
        """See :meth:`ByteStream.send_eof`."""
        if self._closed.done() or not self._ways["send"].ended:
            await self._through(self._stream.send_eof())

    async def aclose(self) -> None:
        """See :meth:`ByteStream.aclose`."""
        if not self._closed.done():
            self._closed.set_result(None)
        await self._stream.aclose()

    async def _strike(self, way: _Way) -> int:
        """Let the faults that are due here strike; returns which bits of the next byte are to be inverted."""
        flips = 0
        await self._wait(way.delay())
        while not way.ended and (fault := way.due()) is not None:
            match fault.kind:
                case "flip":
                    flips ^= 1 << fault.bit
                case "drop":
                    way.lose += fault.nbytes
                case "stall":
                    await self._wait(fault.seconds)
                case "end":
                    way.ended = True
                    if fault.direction == "send":
                        await self._through(self._stream.send_eof())
                case "reset":
                    self._reset = fault
                    await self._stream.aclose()
                    raise self._broken(fault)
        return flips

    async def _wait(self, seconds: float) -> None:
        """Wait; closing ends it."""
        if seconds <= 0:
            return
        sleeping = asyncio.ensure_future(_sleep(self._faults.sleep, seconds))
        try:
            await asyncio.wait((sleeping, self._closed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
        if self._closed.done():
            raise StreamClosedError(f"the stream to {self.name} was closed by this side")

    async def _through(self, call: Coroutine[Any, Any, T]) -> T:
        """What the stream beneath does; that it was closed because a fault reset it is the link's doing."""
        try:
            return await call
        except StreamClosedError:
            if self._reset is not None and not self._closed.done():
                raise self._broken(self._reset) from None
            raise

    def _broken(self, fault: Fault) -> TransportError:
        return TransportError(f"the link to {self.name} broke: reset at byte {fault.at} ({fault.direction}), injected")


async def _sleep(sleep: Callable[[float], Awaitable[object]], seconds: float) -> None:
    if seconds == float("inf"):
        await asyncio.get_running_loop().create_future()
    await sleep(seconds)
