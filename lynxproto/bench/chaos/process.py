"""The two sides as processes of their own, which are killed and started again; the proxy stays in this one."""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from lynxproto.bench.chaos.leaks import census
from lynxproto.bench.chaos.proxy import ChaosProxy
from lynxproto.bench.chaos.scenario import Scenario
from lynxproto.bench.chaos.sides import Outcome, config_of, make_cache, policy_of, url_of
from lynxproto.errors import DeadlineError, LynxError
from lynxproto.session import connect, listen

__all__ = ["prepare", "run_killed"]

_context: Final = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])
_POLL_S: Final = 0.004


def prepare() -> None:
    """Start the process that the sides are forked from: it outlives them, and is no leak."""
    forkserver.ensure_running()


# --- in the processes


def _receive(pipe: Connection, s: Scenario, folder: Path, number: int) -> None:
    asyncio.run(_counted(pipe, lambda: _receiving(pipe, s, folder, number)))


def _send(pipe: Connection, s: Scenario, url: str, key: bytes) -> None:
    asyncio.run(_counted(pipe, lambda: _sending(pipe, s, url, key)))


async def _counted(pipe: Connection, side: Callable[[], Any]) -> None:
    await asyncio.to_thread(lambda: None)
    before = census()
    await side()
    pipe.send(census().leaks(before))


async def _receiving(pipe: Connection, s: Scenario, folder: Path, number: int) -> None:
    """Tells its URL, then what became of the transfer, then waits until it may go."""
    url = url_of(s, folder, f"far-{number}")
    async with listen(url, config_of(s), insecure=True, state=folder / "state", threads=1) as receiver:
        pipe.send(receiver.url)
        cache = make_cache(s)
        async for incoming in receiver:
            try:
                await incoming.exact()
            except DeadlineError:  # its sender was away for too long; it will come back, to a new transfer
                continue
            except LynxError as error:
                pipe.send(type(error).__name__)
                break
            equal = all(np.array_equal(incoming.arrays[key], words) for key, words in cache.arrays.items())
            pipe.send("exact" if equal else "wrong")
            break
        await _heard(pipe)


async def _sending(pipe: Connection, s: Scenario, url: str, key: bytes) -> None:
    cache = make_cache(s)
    try:
        async with connect(
            url, config_of(s), insecure=True, policy=policy_of(s), threads=1, stripes=s.stripes
        ) as session:
            await session.open(cache.manifest, resume=key).send(cache)
        pipe.send("exact")
    except LynxError as error:
        pipe.send(type(error).__name__)


# --- in this process


async def _heard(pipe: Connection) -> Any:
    """What the other process says next. Raises EOFError if it is dead."""
    while not pipe.poll():
        await asyncio.sleep(_POLL_S)
    return pipe.recv()


class _Process:
    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process: ForkServerProcess = _context.Process(target=target, args=(theirs, *args))
        self.process.start()
        theirs.close()

    async def kill(self) -> None:
        """SIGKILL, and what the system does then."""
        self.process.kill()
        while self.process.is_alive():
            await asyncio.sleep(_POLL_S)
        self.close()

    async def end(self) -> list[str]:
        """Let it go; returns what it had leaked."""
        leaks: list[str] = await _heard(self.pipe)
        while self.process.is_alive():
            await asyncio.sleep(_POLL_S)
        if self.process.exitcode:
            leaks.append(f"exit code {self.process.exitcode}")
        self.close()
        return leaks

    def close(self) -> None:
        """Give its descriptors back."""
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


async def run_killed(s: Scenario, outcome: Outcome, folder: Path) -> None:
    """Kill one side or both in the middle of the data, start them anew, and see how the transfer ends."""
    key = secrets.token_bytes(32)
    processes: list[_Process] = []

    async def receiver(number: int) -> tuple[_Process, str]:
        processes.append(_Process(_receive, s, folder, number))
        return processes[-1], await _heard(processes[-1].pipe)

    def sender(url: str) -> _Process:
        processes.append(_Process(_send, s, url, key))
        return processes[-1]

    try:
        receiving, target = await receiver(0)
        async with ChaosProxy(target, url_of(s, folder, "near"), strikes=s.strikes, random=Random(s.seed)) as proxy:
            sending = sender(proxy.url)
            while not proxy.reached.is_set() and not sending.pipe.poll():
                await asyncio.sleep(_POLL_S)
            if s.fault != "sender killed":
                await receiving.kill()
                proxy.target = ""  # nobody is there
            if s.fault != "receiver killed":
                await sending.kill()
            proxy.gate.set()
            if s.fault != "sender killed":
                receiving, proxy.target = await receiver(1)
            if s.fault != "receiver killed":
                sending = sender(proxy.url)
            outcome.sender = await _heard(sending.pipe)
            outcome.leaks += [f"sender: {leak}" for leak in await sending.end()]
            outcome.receiver = await _heard(receiving.pipe)
            if outcome.receiver == "wrong":
                outcome.wrong.append("words differ")
            receiving.pipe.send("go")
            outcome.leaks += [f"receiver: {leak}" for leak in await receiving.end()]
            outcome.note(proxy)
        outcome.leaks += [f"file: {path.name}" for path in (folder / "state").iterdir()]
    finally:
        for process in processes:
            if process.pipe.closed:
                continue
            process.close()
