"""One seed: both sides, the proxy between them, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from lynxproto.bench.chaos.leaks import census
from lynxproto.bench.chaos.process import prepare, run_killed
from lynxproto.bench.chaos.proxy import ChaosProxy
from lynxproto.bench.chaos.scenario import KILLS, Scenario
from lynxproto.bench.chaos.sides import IDENTITY, Outcome, config_of, make_cache, policy_of, url_of
from lynxproto.capture import CaptureWriter
from lynxproto.config import Config
from lynxproto.errors import CaptureError, LynxError, StateError
from lynxproto.manifest import FetchKey, Manifest
from lynxproto.session import IncomingTransfer, OutgoingTransfer, Receiver, Sender, connect, listen
from lynxproto.spool import StateFolder

__all__ = ["HANG_S", "run_seed"]

#: A seed that takes longer hangs. The longest timeouts in a row are a fifth of it.
HANG_S: Final = 30.0
_POISON: Final = 0xDEAD
_TICK_S: Final = 0.02


def run_seed(seed: int, *, patience: float = 1.0, capture: Path | None = None) -> Outcome:
    """Run one seed in this process, which must do nothing else meanwhile. ``capture``: record the connecting side."""
    return asyncio.run(_judged(Scenario.of(seed, patience), capture))


async def _judged(s: Scenario, capture: Path | None) -> Outcome:
    with ThreadPoolExecutor(1, "chaos") as executor:  # the loop's own thread, which closing a session needs, is no leak
        asyncio.get_running_loop().set_default_executor(executor)
        await asyncio.to_thread(lambda: None)
        return await _counted(s, capture)


async def _counted(s: Scenario, capture: Path | None) -> Outcome:
    if s.fault in KILLS:
        prepare()
    before = census()
    outcome = Outcome(s.seed, s.fault, (s.expected.sender, s.expected.receiver))
    started = time.perf_counter()
    watching = asyncio.ensure_future(_watch(outcome))
    arrays = await _run(s, outcome, capture)
    outcome.seconds = time.perf_counter() - started
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await asyncio.to_thread(lambda: None)  # the thread that closed the sessions lets go of them before it runs this
    outcome.leaks = census().leaks(before)
    outcome.leaks += [f"array: {name}" for name, array in arrays if array() is not None]
    return outcome


async def _watch(outcome: Outcome) -> None:
    """Note how late the loop wakes up."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        outcome.stalled = max(outcome.stalled, time.perf_counter() - before - _TICK_S)


async def _run(s: Scenario, outcome: Outcome, capture: Path | None) -> list[tuple[str, weakref.ref[Any]]]:
    """Fills in ``outcome``; returns weak references to all arrays of the transfer, which nobody may hold afterwards."""
    with tempfile.TemporaryDirectory(prefix="lynx-chaos-") as folder, _undelivered() as log:
        run = _Run(s, outcome, Path(folder), capture, log)
        try:
            async with asyncio.timeout(HANG_S * s.patience):
                if s.fault in KILLS:
                    await run_killed(s, outcome, Path(folder))
                else:
                    await run.run()
        except TimeoutError:
            outcome.wrong.append(f"not over after {HANG_S * s.patience:g} s")
        except BaseExceptionGroup as error:
            outcome.wrong.append(f"unnamed: {error!r}: {error.exceptions!r}")
        except Exception as error:  # whatever has no name is a finding
            outcome.wrong.append(f"unnamed: {error!r}")
        if s.fault not in KILLS:
            run.check()
        return [
            (f"{side} {key}", weakref.ref(array))
            for side, arrays in (("source", run.cache.arrays), ("destination", run.destination))
            for key, array in arrays.items()
        ]


class _Run:
    """The two sides of one seed."""

    def __init__(
        self, s: Scenario, outcome: Outcome, folder: Path, capture: Path | None, log: list[logging.LogRecord]
    ) -> None:
        self.s = s
        self.outcome = outcome
        self.folder = folder
        self.cache = make_cache(s)
        self.sent = {key: words.copy() for key, words in self.cache.arrays.items()}
        self.destination: dict[Any, Any] = {}
        self.poisoned = False
        self._capture = "/dev/full" if s.fault == "disk full on capture" else capture
        self._log = log
        self._incoming: asyncio.Future[IncomingTransfer] = asyncio.get_running_loop().create_future()
        self._outgoing: asyncio.Future[OutgoingTransfer] = asyncio.get_running_loop().create_future()

    def _allocate(self, manifest: Manifest) -> Any:
        if self.s.fault == "receiver out of memory":
            raise MemoryError
        for layer in manifest.layers:
            for part in layer.parts:
                self.destination[layer.index, part] = np.zeros((layer.kv_heads, layer.tokens, 64), "<u2")
        return dict(self.destination)

    def _state(self) -> StateFolder | None:
        if not self.s.state:
            return None
        return StateFolder(self.folder / "state", max_bytes=20_000 if self.s.fault == "state folder full" else 1 << 30)

    async def run(self) -> None:
        """Both sides, to their ends."""
        s, config = self.s, config_of(self.s)
        secret = Config(secret=b"another secret than none", peer_timeout=1.0)
        policy = policy_of(s)
        capture = CaptureWriter(self._capture) if self._capture else None
        async with (
            listen(
                url_of(s, self.folder, "far"),
                secret if s.fault == "wrong secret" else config,
                policy=policy,
                allocate=self._allocate,
                on_fetch=(lambda key, wants: self.cache) if s.fetch else None,
                threads=2,
                insecure=True,
                state=self._state(),
            ) as listener,
            ChaosProxy(
                listener.url,
                url_of(s, self.folder, "near"),
                strikes=s.strikes,
                frames=s.frames,
                delays=s.delays,
                random=Random(s.seed),
            ) as proxy,
        ):
            receiving = None if s.fetch else asyncio.ensure_future(self._receive(listener))
            try:
                async with connect(
                    proxy.url,
                    config,
                    policy=policy,
                    allocate=self._allocate,
                    stripes=s.stripes,
                    threads=2,
                    insecure=True,
                    capture=capture,
                ) as client:
                    acting = asyncio.ensure_future(self._act(proxy, client, listener))
                    try:
                        if s.fetch:
                            await self._fetch(client)
                        else:
                            await self._send(client)
                        if receiving is not None and not (self.outcome.sender != "exact" and self._nothing_expected()):
                            await receiving
                    finally:
                        acting.cancel()
                        await asyncio.gather(acting, return_exceptions=True)
            except LynxError as error:  # the session never stood, or ended before the cache was offered
                self.outcome.said.append(f"session: {error}")
                if s.fetch:
                    self.outcome.receiver = type(error).__name__
                else:
                    self.outcome.sender = type(error).__name__
            if receiving is not None:
                if not receiving.done() and not self._incoming.done():
                    await asyncio.sleep(0.05)
                    receiving.cancel()
                    self.outcome.receiver = "hung" if self._incoming.done() else "nothing"
                await asyncio.gather(receiving, return_exceptions=True)
            proxy.gate.set()
            self.outcome.note(proxy)
        if s.fetch:
            failed = [record.args for record in self._log]
            if failed and failed[0]:
                self.outcome.sender = type(failed[0][0]).__name__  # type: ignore[index]  # args are a tuple
            else:
                self.outcome.sender = "exact" if self.outcome.receiver == "exact" else "nothing"
        if capture is not None:
            self._close(capture)

    def _nothing_expected(self) -> bool:
        return "nothing" in self.s.expected.receiver

    def _close(self, capture: CaptureWriter) -> None:
        try:
            capture.close()
        except CaptureError:
            return
        if self.s.fault == "disk full on capture":
            self.outcome.wrong.append("the full disk under the capture had no error")

    async def _send(self, client: Sender) -> None:
        outgoing = client.open(self.cache.manifest)
        self._outgoing.set_result(outgoing)
        try:
            await outgoing.send(self.cache)
            self.outcome.sender = "exact"
        except LynxError as error:
            self.outcome.sender = type(error).__name__
            self.outcome.said.append(f"sender: {error}")
        await outgoing.released.wait()
        for words in self.cache.arrays.values():  # they are the engine's again
            words[...] = _POISON

    async def _receive(self, listener: Receiver) -> None:
        incoming = await anext(listener)
        self._incoming.set_result(incoming)
        await self._finish(incoming)

    async def _fetch(self, client: Sender) -> None:
        incoming = await client.fetch(FetchKey(identity=IDENTITY.hash(), blocks=(bytes(8),)))
        self._incoming.set_result(incoming)
        await self._finish(incoming)

    async def _finish(self, incoming: IncomingTransfer) -> None:
        try:
            await incoming.exact()
            self.outcome.receiver = "exact"
        except LynxError as error:
            self.outcome.receiver = type(error).__name__
            self.outcome.said.append(f"receiver: {error}")
            self.poison()  # the pages have another owner now
        await incoming.released.wait()
        full = self.s.fault == "state folder full"
        if full != isinstance(incoming.state_error, StateError):
            self.outcome.wrong.append(f"the state folder said {incoming.state_error!r}")

    def poison(self) -> None:
        """Reassign the destination's pages."""
        self.poisoned = True
        for words in self.destination.values():
            words[...] = _POISON

    async def _act(self, proxy: ChaosProxy, client: Sender, listener: Receiver) -> None:
        """What a seed does besides what its link suffers."""
        if not any(strike.kind == "gate" for strike in self.s.strikes):
            return
        await proxy.reached.wait()
        match self.s.fault:
            case "cancelled by the sender":
                await (await asyncio.shield(self._outgoing)).cancel()
            case "cancelled by the receiver":
                await (await asyncio.shield(self._incoming)).cancel()
                self.poison()
            case "receiver closes":
                await listener.aclose()
            case "sender closes":
                await client.aclose()
        proxy.gate.set()

    def check(self) -> None:
        """The sessions are closed: whatever the destination holds is final."""
        outcome = self.outcome
        if outcome.receiver == "exact" and not self.poisoned:
            for key, words in self.sent.items():
                if not np.array_equal(self.destination[key], words):
                    outcome.wrong.append(f"{key} differs")
        elif self.poisoned:
            for key, words in self.destination.items():
                if not (words == _POISON).all():
                    outcome.wrong.append(f"late write to {key}")
        if outcome.sender == "exact" and outcome.receiver != "exact":
            outcome.wrong.append("the sender was told that all has arrived")
        if outcome.receiver == "exact" and self.s.state:
            outcome.leaks += [f"file: {path.name}" for path in (self.folder / "state").iterdir()]


@contextlib.contextmanager
def _undelivered() -> Iterator[list[logging.LogRecord]]:
    """What a listener logs of fetched caches that it could not deliver: nobody else is told."""
    records: list[logging.LogRecord] = []
    logger = logging.getLogger("lynxproto")

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "was not delivered" in record.msg:
                records.append(record)

    keep = Keep()
    logger.addHandler(keep)
    try:
        yield records
    finally:
        logger.removeHandler(keep)
