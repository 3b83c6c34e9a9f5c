"""Seeds on several processes, one at a time on each; a process that answers no more counts as hung and is replaced.

A seed that timed out in a process which was not given the CPU says nothing about the protocol: it is run again.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Final

from lynxproto.bench.chaos.scenario import Scenario
from lynxproto.bench.chaos.sides import Outcome
from lynxproto.bench.chaos.transfer import HANG_S, run_seed

__all__ = ["run_seeds"]

_context: Final = multiprocessing.get_context("spawn")
#: What a seed may take beyond :data:`HANG_S` before its process is given up: it judges itself before.
_GRACE_S: Final = 30.0
#: Times that a seed is run again at most, and for how long its process must have stalled, times ``patience``.
_AGAIN: Final = 3
_STALLED_S: Final = 0.2
_TIMEOUTS: Final = ("DeadlineError", "TransportError", "ConnectionClosedError", "PeerError")


def _work(pipe: Connection, patience: float) -> None:
    while True:
        pipe.send(run_seed(pipe.recv(), patience=patience))


class _Worker:
    def __init__(self, patience: float) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process: SpawnProcess = _context.Process(target=_work, args=(theirs, patience))
        self.process.start()
        theirs.close()
        self.seed = -1
        self.since = 0.0

    def begin(self, seed: int) -> None:
        """Run one."""
        self.seed, self.since = seed, time.monotonic()
        self.pipe.send(seed)

    def take(self) -> Outcome:
        """What became of it."""
        try:
            outcome: Outcome = self.pipe.recv()
        except EOFError:
            return self.lost("its process died")
        return outcome

    def lost(self, why: str) -> Outcome:
        """The process is of no use any more."""
        s = Scenario.of(self.seed)
        return Outcome(self.seed, s.fault, (s.expected.sender, s.expected.receiver), wrong=[why])

    def end(self) -> None:
        """Stop it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _proves_nothing(outcome: Outcome, patience: float) -> bool:
    """Whether it only timed out, and had reason to. Wrong words and leaks are what they are."""
    timed_out = outcome.hung or any(side in _TIMEOUTS for side in (outcome.sender, outcome.receiver))
    innocent = not outcome.leaks and (outcome.hung or not outcome.wrong)
    return not outcome.good and timed_out and innocent and outcome.stalled > _STALLED_S * patience


def run_seeds(seeds: Sequence[int], workers: int, patience: float = 1.0) -> Iterator[Outcome]:
    """What became of each seed, in the order that they end."""
    limit = HANG_S * patience + _GRACE_S
    todo = list(reversed(seeds))
    starved: Counter[int] = Counter()
    running: list[_Worker] = []
    try:
        while todo or running:
            while todo and len(running) < workers:
                running.append(_Worker(patience))
                running[-1].begin(todo.pop())
            ready = wait([worker.pipe for worker in running], timeout=1.0)
            for worker in list(running):
                late = time.monotonic() - worker.since > limit
                if worker.pipe in ready:
                    outcome = worker.take()
                elif late:
                    outcome = worker.lost(f"its process did not answer for {limit:g} s")
                else:
                    continue
                if todo and not late and worker.process.is_alive():
                    worker.begin(todo.pop())
                else:
                    running.remove(worker)
                    worker.end()
                if _proves_nothing(outcome, patience) and starved[outcome.seed] < _AGAIN:
                    starved[outcome.seed] += 1
                    todo.insert(0, outcome.seed)
                else:
                    outcome.starved = starved[outcome.seed]
                    yield outcome
    finally:
        for worker in running:
            worker.end()
