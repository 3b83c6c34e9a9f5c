"""The codec threads: order, what the loop hears, and what is dropped."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from lynxproto._io import Workers


def run(main: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


class Gate:
    """Work that holds a thread until it is opened."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.opened.wait(10)


def test_a_thread_takes_the_most_urgent_job_next_without_the_loop() -> None:
    async def main() -> None:
        workers, gate, order, told = Workers(1), Gate(), [], []
        everything = threading.Event()

        def job(name: str) -> None:
            order.append(name)
            if len(order) == 3:
                everything.set()

        workers.run("a", (0, 0), gate, lambda future: told.append("gate"))
        for name, urgency in (("low", (2, 0)), ("high", (0, 5)), ("middle", (1, 0))):
            workers.run("a", urgency, lambda name=name: job(name), lambda future, name=name: told.append(name))
        gate.opened.set()
        assert everything.wait(10)  # the loop does not run meanwhile
        assert order == ["high", "middle", "low"]
        assert told == []
        await workers.settle("a")
        assert told == ["gate", "high", "middle", "low"]
        workers.stop()

    run(main)


def test_what_is_dropped_ends_before_drop_returns_and_is_not_told() -> None:
    async def main() -> None:
        workers, gate, told = Workers(1), Gate(), []
        workers.run("a", (0, 0), gate, lambda future: told.append("a runs"))
        workers.run("a", (0, 1), lambda: pytest.fail("it was dropped"), lambda future: told.append("a waits"))
        workers.run("b", (0, 2), lambda: None, lambda future: told.append("b"))
        assert gate.begun.wait(10)
        dropping = asyncio.ensure_future(workers.drop("a"))
        await asyncio.sleep(0)
        assert not dropping.done()
        gate.opened.set()
        await dropping
        await workers.settle("b")
        assert told == ["b"]
        workers.stop()

    run(main)


def test_what_ended_and_was_not_told_yet_can_still_be_dropped() -> None:
    async def main() -> None:
        workers, told, ended = Workers(1), [], threading.Event()
        workers.run("a", (0, 0), lambda: None, lambda future: told.append("a"))
        workers.run("b", (0, 1), ended.set, lambda future: told.append("b"))
        assert ended.wait(10)  # and so has the job before it, while the loop was held up here
        await workers.drop("a")
        await workers.settle("b")
        assert told == ["b"]
        workers.stop()

    run(main)


def test_errors_reach_whoever_waits_for_the_work() -> None:
    async def main() -> None:
        workers, futures = Workers(2), []
        workers.run("a", (0, 0), lambda: 1 // 0, futures.append)
        workers.run("a", (0, 0), lambda: 7, futures.append)
        await workers.settle("a")
        results = sorted(repr(future.exception() or future.result()) for future in futures)
        assert results == ["7", "ZeroDivisionError('integer division or modulo by zero')"]
        workers.stop()

    run(main)


def test_without_threads_all_that_waits_fails() -> None:
    async def main() -> None:
        workers, gate, futures = Workers(2), Gate(), []
        workers.run("a", (0, 0), gate, futures.append)
        assert gate.begun.wait(10)
        workers._executor.shutdown(wait=False)  # as where the system allows no more threads
        workers.run("a", (0, 1), lambda: 7, futures.append)  # one thread is left, and will do it
        gate.opened.set()
        await workers.settle("a")
        while workers._serving:  # it looks for work once more
            await asyncio.sleep(0)
        workers.run("a", (0, 2), lambda: 7, futures.append)
        await workers.settle("a")
        first, second, third = futures
        assert isinstance(first, Future)
        assert (first.result(), second.result()) == (None, 7)
        assert isinstance(third.exception(), RuntimeError)
        workers.stop()

    run(main)


def test_work_on_the_loop_is_done_at_once_and_told_later() -> None:
    """Whoever asks is not called back before asking is over; what it raises is told as a thread's would be."""

    async def main() -> None:
        workers, order = Workers(1), []
        workers.run_here("a", lambda: order.append("work"), lambda future: order.append("told"))
        workers.run_here("a", lambda: 1 // 0, lambda future: order.append(type(future.exception())))
        assert order == ["work"]
        await workers.settle("a")
        assert order == ["work", "told", ZeroDivisionError]
        workers.stop()

    run(main)


def test_work_on_the_loop_can_be_dropped_before_it_is_told() -> None:
    async def main() -> None:
        workers, told = Workers(1), []
        workers.run_here("a", lambda: None, lambda future: told.append("a"))
        workers.run_here("b", lambda: None, lambda future: told.append("b"))
        await workers.drop("a")
        await workers.settle("b")
        assert told == ["b"]
        workers.stop()

    run(main)
