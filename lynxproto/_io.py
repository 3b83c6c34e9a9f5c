"""The threads of a session: one for I/O with its own event loop, a few for codecs; and waiting on state.

Everything that a connection owns lives on the I/O thread. Callers from other threads and event loops hand it a
coroutine and wait for the outcome; codec work leaves it and comes back as a callback.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from lynxproto.errors import StreamClosedError

__all__ = ["IOThread", "Signal", "Workers", "outcome_of"]

T = TypeVar("T")


class IOThread:
    """A daemon thread that runs an event loop until :meth:`stop`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(
                asyncio.sleep(0)
            )  # every call that was submitted begins, and so can be refused
            left = asyncio.all_tasks(self.loop)  # calls that came while the session closed
            for task in left:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``coroutine`` on the I/O thread; cancelling the future cancels it."""
        with self._lock:  # what is submitted before the loop is told to stop still begins; nothing is after
            if not self._stopping:
                return asyncio.run_coroutine_threadsafe(self._refused_at_stop(coroutine), self.loop)
        coroutine.close()
        raise StreamClosedError("the session was closed by this side")

    async def _refused_at_stop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """A caller whom the end of the loop cuts off must not take that for a cancellation of its own task."""
        try:
            return await coroutine
        except asyncio.CancelledError:
            if self._stopping:
                raise StreamClosedError("the session was closed by this side") from None
            raise

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run ``function``, which must be short, on the I/O thread and return its result."""
        if threading.current_thread() is self._thread:
            return function(*args)

        async def run() -> T:
            return function(*args)

        return self.submit(run()).result()

    def soon(self, function: Callable[[], object]) -> None:
        """Run ``function``, which must be short, on the I/O thread; not if that has ended."""
        with self._lock:
            if not self._stopping:
                self.loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """End the loop and the thread. Idempotent. Must not be called from the I/O thread."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


class Signal:
    """Wakes coroutines of one loop to look at a condition again."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Something changed."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once ``condition()`` is true; what it raises is raised here."""
        while not condition():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                await future
            finally:
                self._waiting.discard(future)


class _Job:
    __slots__ = ("done", "dropped", "key", "owner", "work")

    def __init__(
        self, key: tuple[int, int, int], owner: Hashable, work: Callable[[], Any], done: Callable[[Future[Any]], None]
    ) -> None:
        self.key = key
        self.owner = owner
        self.work = work
        self.done = done
        self.dropped = False

    def __lt__(self, other: _Job) -> bool:
        return self.key < other.key


def outcome_of(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` here and now."""
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except BaseException as error:  # whoever waits for the work is to see it
        future.set_exception(error)
    return future


class Workers:
    """Runs codec work on ``threads`` threads, the most urgent first. To be used from one event loop.

    A thread that is done takes the next job by itself; the loop hears together of all that ended meanwhile.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="lynxproto-codec")
        self._lock = threading.Lock()  # of what follows: the loop and the threads share it
        self._queue: list[_Job] = []
        self._running: set[_Job] = set()  # or ended, and the loop has not heard of it
        self._ended: list[tuple[_Job, Future[Any]]] = []
        self._serving = 0  # threads
        self._number = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._finished = Signal()

    def run(
        self,
        owner: Hashable,
        urgency: tuple[int, int],
        work: Callable[[], T],
        done: Callable[[Future[T]], None],
    ) -> None:
        """Run ``work()`` on a thread, lower ``urgency`` first, then call ``done`` with its future on the loop."""
        with self._lock:
            heapq.heappush(self._queue, _Job((*urgency, next(self._number)), owner, work, done))
            if self._serving == self.threads:
                return
            self._serving += 1
        try:
            self._executor.submit(self._serve)
        except RuntimeError as error:  # no thread can be started, or they are gone
            self._fail_queue(error)

    def run_here(self, owner: Hashable, work: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        """The same on the loop: ``work`` must be short. It is over when this returns; ``done`` follows."""
        job = _Job((0, 0, next(self._number)), owner, work, done)
        with self._lock:
            self._running.add(job)
        self._end(job, outcome_of(work), self._loop.call_soon)

    async def drop(self, owner: Hashable) -> None:
        """Forget all work of ``owner``: when this returns no thread runs it any more, and no ``done`` will follow."""
        with self._lock:
            self._queue = [job for job in self._queue if job.owner != owner]
            heapq.heapify(self._queue)
            running = {job for job in self._running if job.owner == owner}
        for job in running:
            job.dropped = True
        await self._finished.until(lambda: not running & self._running)

    async def settle(self, owner: Hashable) -> None:
        """Return when all work of ``owner`` is done."""

        def done() -> bool:
            with self._lock:
                return all(job.owner != owner for job in [*self._queue, *self._running])

        await self._finished.until(done)

    def stop(self) -> None:
        """Drop queued work, and wait for what runs. Blocks: call it when nothing runs, or not on the loop."""
        with self._lock:
            self._queue.clear()
        self._executor.shutdown(wait=True)

    def _serve(self) -> None:
        """On a thread: run what there is to run."""
        while True:
            with self._lock:
                if not self._queue:
                    self._serving -= 1
                    return
                job = heapq.heappop(self._queue)
                self._running.add(job)
            self._end(job, outcome_of(job.work), self._loop.call_soon_threadsafe)

    def _fail_queue(self, error: RuntimeError) -> None:
        """A thread could not be started: if no other serves the queue, nobody will."""
        with self._lock:
            self._serving -= 1
            jobs = [] if self._serving else self._queue[:]
            self._running.update(jobs)
            if jobs:
                self._queue.clear()
        for job in jobs:
            future: Future[Any] = Future()
            future.set_exception(error)
            self._end(job, future, self._loop.call_soon)

    def _end(self, job: _Job, future: Future[Any], call_soon: Callable[[Callable[[], None]], object]) -> None:
        with self._lock:
            self._ended.append((job, future))
            known = len(self._ended) > 1
        if not known:
            call_soon(self._collect)

    def _collect(self) -> None:
        """On the loop: tell what has ended."""
        with self._lock:
            ended, self._ended = self._ended, []
            self._running.difference_update(job for job, _ in ended)
        for job, future in ended:
            if not job.dropped:
                job.done(future)
        self._finished.notify()
