"""A UCX worker on an event loop: who polls and who sleeps, whose message has come, what is over."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, ClassVar, Final, Protocol
from weakref import WeakKeyDictionary

from lynxproto.errors import ConfigError
from lynxproto.transports._ucxx import BUSY, NEWS, OVER, QUIET, Operation, Worker

__all__ = ["ABANDONED", "TURN_NS", "Bell", "LoopWorker", "Receiver", "spin_ns"]

#: Rounds in which UCX ends what was under way on a closed endpoint: it takes two or three.
_LAST_ROUNDS: Final = 100
#: What it did not end: memory that it might still write to must never be anything else.
ABANDONED: Final[list[Operation]] = []
#: Nanoseconds of polling, and of calls that need not wait, after which other tasks of the loop get their turn.
_SLICE_NS: Final = 100_000
TURN_NS: Final = 500_000

#: Microseconds without anything happening for which a stream polls before it sleeps.
SPIN_VARIABLE: Final = "LYNXPROTO_UCX_SPIN_US"
_SPIN_US: Final = 100
#: Times that is a short sleep: one after which it is worth to poll again.
_SHORT: Final = 10


class Receiver(Protocol):
    """A stream, as its messages come."""

    def news(self) -> None:
        """It has a message, or may send, or refuses what its peer sends."""


def spin_ns() -> int:
    text = os.environ.get(SPIN_VARIABLE)
    if text is None:
        return 0 if len(os.sched_getaffinity(0)) == 1 else _SPIN_US * 1000
    try:
        microseconds = int(text)
    except ValueError:
        microseconds = -1
    if not 0 <= microseconds <= 1_000_000:
        raise ConfigError(f"{SPIN_VARIABLE}={text}: must be microseconds, 0 (never poll) to 1000000")
    return microseconds * 1000


class Bell:
    """Wakes the one coroutine that waits for it, if one does."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: asyncio.Future[None] | None = None

    def ring(self) -> bool:
        """Whether somebody was woken."""
        if self.future is None or self.future.done():
            return False
        self.future.set_result(None)
        return True


class LoopWorker:
    """A UCX worker on an event loop; shared by its streams, closed with the last of them.

    Sleeping and being woken takes some 0.1 ms, on both sides. So whoever waits polls for so long before, but only if
    the last sleep was short: where things happen seldom nothing polls.
    """

    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWorker]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._spin_ns = spin_ns()
        self._polls_ns = self._spin_ns
        self._slept_at = 0
        self.ucx = Worker()
        self.ucx.bound(self._polls_ns, max(self._polls_ns, _SLICE_NS))
        self.turned_ns = 0
        """When other tasks of the loop had their last turn."""
        self._loop = asyncio.get_running_loop()
        self._users = 0
        self._streams: dict[int, Receiver] = {}
        self._under_way: set[Operation] = set()
        self._free: list[Operation] = []
        self._woke = self._alone = False
        self._turns = 0  # tasks that poll as soon as the others had theirs
        self._scheduled: asyncio.Handle | None = None
        self._loop.add_reader(self.ucx.fileno, self._awake)

    @classmethod
    def acquire(cls, stream: Receiver, tag: int) -> LoopWorker:
        """The running loop's worker, which hands ``stream`` its messages. Goes with :meth:`release`."""
        loop = asyncio.get_running_loop()
        worker = cls._all.get(loop)
        if worker is None:
            worker = cls._all[loop] = cls()
        worker._users += 1
        worker._streams[tag] = stream
        return worker

    def release(self, tag: int) -> None:
        """One user less."""
        self._users -= 1
        del self._streams[tag]
        if self._users == 0:
            del self._all[self._loop]
            self._loop.remove_reader(self.ucx.fileno)
            ABANDONED.extend(self._under_way)
            self._unschedule()
            self.ucx.close()

    def start(self, operation: Operation) -> Operation:
        """Hold on to ``operation`` and its buffer until it is over."""
        if operation.done:
            operation.buffer = None
        else:
            self._under_way.add(operation)
        return operation

    def ring(self, bell: Bell) -> None:
        """Whoever waits for ``bell`` is to look again."""
        self._woke = bell.ring() or self._woke

    async def take_turns(self) -> None:
        """Let other tasks of the loop have their turn."""
        self.turned_ns = monotonic_ns()
        self._turns += 1
        try:
            await asyncio.sleep(0)
        finally:
            self._turns -= 1

    async def until(self, ready: Callable[[], bool], bell: Bell, operation: Operation | None = None) -> None:
        """Return once ``ready()``: because ``operation``, whose bell it is, is over, or somebody rings."""
        while not ready():
            while (outcome := self._poll(operation)) != QUIET:
                if ready():
                    return
                if self._woke or outcome == BUSY:
                    await self.take_turns()
                    if ready():
                        return
            await self.sleep(bell)

    async def sleep(self, bell: Bell) -> None:
        """Return when somebody rings."""
        bell.future = self._loop.create_future()
        try:
            await bell.future
        finally:
            bell.future = None

    def nudge(self) -> None:
        """Make what progress there is to make now."""
        while self._poll_once() != QUIET:
            pass

    def settle(self) -> None:
        """An endpoint was closed: UCX ends what was under way on it in its next rounds."""
        for _ in range(_LAST_ROUNDS):
            if not self._under_way:
                break
            self._poll_once()

    def _awake(self) -> None:
        """Something happened while the loop slept; or while it was busy, and then it looks soon anyway."""
        if self._scheduled is None:
            self._polls_ns = self._spin_ns if monotonic_ns() - self._slept_at < _SHORT * self._spin_ns else 0
            self.ucx.bound(self._polls_ns, max(self._polls_ns, _SLICE_NS))
            self._progress()

    def _progress(self) -> None:
        """Sleep if there is nothing to do; poll before only if the loop's other tasks have had their turn in vain."""
        if self._turns:
            self._scheduled = self._loop.call_soon(self._progress)
            return
        self._unschedule()
        self.turned_ns = monotonic_ns()
        alone, self._alone = self._alone, False
        while (outcome := self._poll() if alone else self._poll_once()) == NEWS and not self._woke:
            pass
        if outcome != QUIET or self._woke:
            return
        if not alone and self._polls_ns:
            self._alone = True
        elif self.ucx.arm():
            self._slept_at = monotonic_ns()
            self._unschedule()

    def _unschedule(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None

    def complete(self, operation: Operation) -> bool:
        """Poll until ``operation`` is over; False if it is time to do something else, or to sleep."""
        while self._poll(operation) == NEWS and not operation.done and not self._woke:
            pass
        return operation.done

    def begin(self) -> Operation:
        """An operation with nothing to do yet."""
        operation = self._free.pop() if self._free else Operation()
        self.ucx.begin(operation)
        return operation

    def add(self, operation: Operation, stream: Any, buffer: memoryview) -> None:
        """It is to send ``buffer`` too."""
        self.ucx.send(operation, stream, buffer)
        self.start(operation)

    def send(self, stream: Any, buffer: memoryview) -> Operation:
        """Send, and poll until that is over or it is time to do something else."""
        operation = self._free.pop() if self._free else Operation()
        outcome = self.ucx.send_poll(operation, stream, buffer)
        if outcome != OVER:
            self.start(operation)
        self._after(outcome)
        return operation

    def receive(self, stream: Any, buffer: memoryview) -> tuple[Operation, int]:
        """What receives what has come, or comes while this polls; the poll's outcome, BUSY if others are to go on."""
        operation = self._free.pop() if self._free else Operation()
        outcome = self.ucx.receive_poll(operation, stream, buffer)
        if operation.state.status:
            self.start(operation)
        self._after(outcome)
        return operation, BUSY if self._woke else outcome

    def free(self, operation: Operation) -> None:
        """An operation that is over, or never began, is free to be another."""
        operation.buffer = operation.bell = None
        self._under_way.discard(operation)
        self._free.append(operation)

    def _poll_once(self) -> int:
        self.ucx.bound(0, _SLICE_NS)
        try:
            return self._poll()
        finally:
            self.ucx.bound(self._polls_ns, max(self._polls_ns, _SLICE_NS))

    def _poll(self, operation: Operation | None = None) -> int:
        outcome = self.ucx.poll(operation)
        self._after(outcome)
        return outcome

    def _after(self, outcome: int) -> None:
        """What is to be done after progress."""
        self._woke = self._alone = False
        if outcome == NEWS:
            while tag := self.ucx.news():
                self._streams[tag].news()
        if self._under_way:
            for over in [one for one in self._under_way if one.done]:
                self._under_way.discard(over)
                over.buffer = None
                if over.bell is not None:
                    self.ring(over.bell)
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._progress)
