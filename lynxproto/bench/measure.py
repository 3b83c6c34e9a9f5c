"""Rounds of measurements: every contestant once a round, memcpy beside each, every decoded word checked.

A shared machine is faster in one second than in the next. So contestants take turns (A B C A B C), each is set
against the memcpy measured right before and after it, and what is reported are medians over the rounds. The first
round warms memory up and is dropped.

Speeds of one thread are of the processor time that the process used, which is the wall time unless something else
runs on that processor; speeds of several threads, and the scaling from one to several, are of wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import xxhash

from lynxproto.bench.contestants import Contestant, Ours
from lynxproto.bench.machine import Seconds, Workers, spin
from lynxproto.bench.sources import Chunk, Source, WorkingSet
from lynxproto.errors import BenchmarkError
from lynxproto.policy import Policy

__all__ = ["Case", "Memcpy", "Run", "policy_bits"]

_GIGA: Final = 1e9
#: A peer gets no further round after this many seconds of rounds that count, of which it gets one at least.
PEER_SECONDS: Final = 3.0
_SCRIBBLE: Final = 0x5A
_BLOCK_TOKENS: Final = 64
_CALLS: Final = 30

Step = Callable[[], object]


@dataclass(slots=True)
class Memcpy:
    """Copies of the working set: chunk by chunk, and in one call. The faster of a round is what others are held to."""

    nbytes: int
    chunked: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def speeds(self) -> dict[str, float]:
        """Medians in GB/s."""
        times = {"chunked": self.chunked, "whole": self.whole}
        return {name: self.nbytes / statistics.median(t) / _GIGA for name, t in times.items() if t}


@dataclass(slots=True)
class Case:
    """A contestant at a number of threads, on one source: its times (seconds a pass, by operation) and its sizes.

    Operations: ``encode`` (all levels), ``anchor_encode``, ``anchor_decode``, ``refine_1``..., ``exact_decode``.
    """

    contestant: Contestant
    threads: int
    source: str
    nbytes: int
    values: int
    times: dict[str, list[float]] = field(default_factory=dict)
    #: Wall times; for several threads ``times`` holds the same.
    wall: dict[str, list[float]] = field(default_factory=dict)
    #: Speeds as multiples of memcpy's speed in the same round; one thread only.
    to_memcpy: dict[str, list[float]] = field(default_factory=dict)
    part_times: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    part_bytes: dict[str, int] = field(default_factory=dict)
    #: Bytes by part and level.
    sizes: dict[str, list[int]] = field(default_factory=dict)
    state_bytes: int = 0
    #: Least seconds of one call on a tile of one block: what a call costs besides its words.
    call_seconds: dict[str, float] = field(default_factory=dict)
    spent: float = 0.0
    _digests: dict[str, list[bytes]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """How many rounds count."""
        return max((len(times) for times in self.times.values()), default=0)

    def speed(self, operation: str) -> float | None:
        """Median GB/s of the source's bytes; None if it was not measured."""
        times = self.times.get(operation)
        return self.nbytes / statistics.median(times) / _GIGA if times else None

    def wall_speed(self, operation: str) -> float:
        """Median GB/s by wall time."""
        return self.nbytes / statistics.median(self.wall[operation]) / _GIGA

    def part_speed(self, operation: str, part: str) -> float | None:
        """The same for chunks of one part."""
        times = self.part_times.get((operation, part))
        return self.part_bytes[part] / statistics.median(times) / _GIGA if times else None

    def ratio_to_memcpy(self, operation: str) -> float | None:
        """Median over the rounds; None if it was not measured."""
        ratios = self.to_memcpy.get(operation)
        return statistics.median(ratios) if ratios else None

    def bits(self, part: str | None = None) -> list[float]:
        """Bits a value of each level, parameters and headers included."""
        parts = [part] if part else list(self.sizes)
        word_bits = 8 * self.nbytes / self.values
        total = sum(self.part_bytes[p] for p in parts)
        levels = zip(*(self.sizes[p] for p in parts), strict=True)
        return [word_bits * sum(level) / total for level in levels]


class Run:
    """All measurements on one source."""

    def __init__(self, working_set: WorkingSet, contestants: Sequence[Contestant], threads: Sequence[int]) -> None:
        self.set = working_set
        self.memcpy = Memcpy(working_set.nbytes)
        self.arithmetic: dict[int, list[float]] = {n: [] for n in threads}
        specs = {chunk.spec for chunk in working_set.originals}
        self.refused = [c for c in contestants if not all(c.supports(spec) for spec in specs)]
        name, values = working_set.source.name, working_set.source.values * working_set.copies
        self.cases = [
            Case(contestant, n, name, working_set.nbytes, values)
            for n in threads
            for contestant in contestants
            if contestant not in self.refused and (n == 1 or (contestant.threaded and contestant.timed))
        ]
        for case in self.cases:
            for chunk in working_set.chunks:
                part = chunk.spec.part
                case.part_bytes[part] = case.part_bytes.get(part, 0) + chunk.words.nbytes

    def measure(self, runs: int, progress: Callable[[str], None]) -> None:
        """One round to warm up, then ``runs`` that count; ``progress`` is called before each step of :attr:`steps`.

        Raises :class:`~lynxproto.errors.BenchmarkError` when a contestant does not restore every word.
        """
        for number in range(runs + 1):
            for n in self.arithmetic:
                with Workers(n) as workers:
                    self.arithmetic[n].append(workers.run(spin, range(2 * n))[1].wall / (2 * n))
                    for case in self.cases:
                        if case.threads == n:
                            progress(f"{self.set.source.name}: {case.contestant.label}")
                            self._round(case, number, workers)
        for case in self.cases:
            if isinstance(case.contestant, Ours) and case.threads == 1:
                self._calls(case, case.contestant)
            for series in (case.times, case.wall, case.to_memcpy, case.part_times):
                _drop_first(series)
        for times in (self.memcpy.chunked, self.memcpy.whole, *self.arithmetic.values()):
            if len(times) > 1:
                del times[0]

    def steps(self, runs: int) -> int:
        """How often :meth:`measure` calls ``progress``."""
        return (runs + 1) * len(self.cases)

    def load(self) -> float:
        """Wall time over processor time with one thread: 1 on an idle machine, more if others used the processor."""
        pairs = [(case.wall, case.times) for case in self.cases if case.threads == 1]
        wall, busy = (sum(sum(times) for pair in pairs for times in pair[i].values()) for i in (0, 1))
        return wall / busy

    def scaling(self, threads: int) -> float:
        """How many times the arithmetic of one thread several of them did in the same time."""
        return statistics.median(self.arithmetic[1]) / statistics.median(self.arithmetic[threads])

    def _round(self, case: Case, number: int, workers: Workers) -> None:
        contestant = case.contestant
        if number and not isinstance(contestant, Ours) and (not contestant.timed or case.spent > PEER_SECONDS):
            return  # after the round that warms up, which is dropped: who was measured in that alone paid for new pages
        started = time.perf_counter()
        alone = workers.count == 1
        before = self._copy(workers) if alone else 0.0
        seconds = self._passes(case, workers)
        after = self._copy(workers) if alone else 0.0
        if contestant.timed:
            for operation, spent in seconds.items():
                value = spent.processor if alone else spent.wall
                case.times.setdefault(operation, []).append(value)
                case.wall.setdefault(operation, []).append(spent.wall)
                if alone:
                    case.to_memcpy.setdefault(operation, []).append((before + after) / 2 / value)
        case.spent += time.perf_counter() - started if number else 0.0

    def _copy(self, workers: Workers) -> float:
        """Seconds of a memcpy of the working set, the faster way."""
        _, chunked = workers.run(lambda chunk: np.copyto(chunk.out, chunk.words), self.set.chunks)
        _, whole = workers.run(lambda out: np.copyto(out, self.set.all_words), [self.set.all_out])
        self.memcpy.chunked.append(chunked.processor)
        self.memcpy.whole.append(whole.processor)
        return min(chunked.processor, whole.processor)

    def _passes(self, case: Case, workers: Workers) -> dict[str, Seconds]:
        """Every operation of a contestant over the working set, each checked."""
        contestant, chunks = case.contestant, self.set.chunks
        seconds: dict[str, Seconds] = {}

        def timed(operation: str, work: Callable[[int], Any]) -> list[Any]:
            results, seconds[operation] = workers.run(work, range(len(chunks)))
            if contestant.timed:
                each = list(zip(seconds[operation].each, chunks, strict=True))
                for part in case.part_bytes:
                    spent = sum(t for t, chunk in each if chunk.spec.part == part)
                    case.part_times.setdefault((operation, part), []).append(spent)
            return results

        inputs = [contestant.prepare(chunk.words) for chunk in chunks]
        payloads = timed("encode", lambda i: contestant.encode(chunks[i].spec, inputs[i]))
        if not case.sizes:
            self._weigh(case, payloads)
        if isinstance(contestant, Ours):
            self._ours(case, contestant, payloads, timed)
        if contestant.exact:
            self._scribble()
            decoded = timed("exact_decode", lambda i: contestant.decode(chunks[i].spec, payloads[i], chunks[i].out))
            self._check(case, "exact decode", decoded)
        return seconds

    def _ours(
        self, case: Case, ours: Ours, payloads: list[Any], timed: Callable[[str, Callable[[int], Any]], list[Any]]
    ) -> None:
        """The operations that codecs with levels have."""
        chunks = self.set.chunks
        if ours.levels == 1 and ours.exact:
            return
        anchors = timed("anchor_encode", lambda i: ours.encode(chunks[i].spec, chunks[i].words, [0]))
        if any(
            memoryview(one[0]).tobytes() != memoryview(all_[0]).tobytes()
            for one, all_ in zip(anchors, payloads, strict=True)
        ):
            raise BenchmarkError(f"{ours.label}: the anchor made alone differs from the one made with all levels")
        del anchors
        self._scribble()
        states = timed("anchor_decode", lambda i: ours.start(chunks[i].spec, payloads[i][0], chunks[i].out))
        self._same(case, "anchor decode")

        def refine(states: list[Any], level: int, i: int) -> Any:
            return ours.refine(chunks[i].spec, states[i], level, payloads[i][level], chunks[i].out)

        for level in range(1, ours.levels):
            case.state_bytes = max(case.state_bytes, sum(state.nbytes for state in states))
            self._scribble()
            states = timed(
                f"refine_{level}",
                partial(refine, states, level),
            )
            if level < ours.levels - 1:
                self._same(case, f"refine to level {level}")
        if ours.exact:
            self._check(case, "refine to the last level", [None] * len(chunks))

    def _calls(self, case: Case, ours: Ours) -> None:
        whole = self.set.originals[0]
        words = whole.words[:1, :_BLOCK_TOKENS]
        out = np.empty_like(words)
        spec = replace(whole.spec, heads=1, tokens=words.shape[1], token_set=None)
        payload = ours.encode(spec, words)
        calls: dict[str, Step] = {
            "anchor_encode": lambda: ours.encode(spec, words, [0]),
            "anchor_decode": lambda: ours.start(spec, payload[0], out),
        }
        for name, call in calls.items():
            times = []
            for _ in range(_CALLS):
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            case.call_seconds[name] = min(times)

    def _weigh(self, case: Case, payloads: list[Any]) -> None:
        levels = case.contestant.levels
        for chunk, parts in zip(self.set.chunks, payloads, strict=True):
            sizes = [memoryview(part).nbytes for part in parts]
            if levels == 1:  # a peer's payloads that are all needed
                sizes = [sum(sizes)]
            total = case.sizes.setdefault(chunk.spec.part, [0] * levels)
            for level, size in enumerate(sizes):
                total[level] += size

    def _scribble(self) -> None:
        self.set.all_out.fill(_SCRIBBLE)

    def _check(self, case: Case, what: str, decoded: list[Any]) -> None:
        for chunk, result in zip(self.set.chunks, decoded, strict=True):
            words = chunk.out if result is None else np.frombuffer(result, chunk.words.dtype)
            if words.size != chunk.words.size or not np.array_equal(words.reshape(chunk.words.shape), chunk.words):
                raise BenchmarkError(
                    f"{case.contestant.label}: {what} of {case.source} does not restore the words"
                    f" (layer {chunk.spec.layer}, {chunk.spec.part}, tokens from {_first_token(chunk)})"
                )

    def _same(self, case: Case, what: str) -> None:
        """Lossy levels have nothing to be compared with but the first round, and the same chunk in another copy."""
        digests = [xxhash.xxh3_128_digest(chunk.out.data) for chunk in self.set.originals]
        last = [xxhash.xxh3_128_digest(chunk.out.data) for chunk in self.set.chunks[-len(digests) :]]
        if last != digests or case._digests.setdefault(what, digests) != digests:
            raise BenchmarkError(f"{case.contestant.label}: {what} of {case.source} gave different words this time")


def _first_token(chunk: Chunk) -> int:
    return chunk.spec.token_set.start if chunk.spec.token_set else 0


def _drop_first(series: dict[Any, list[float]]) -> None:
    for values in series.values():
        if len(values) > 1:
            del values[0]


def policy_bits(source: Source, contestant: Ours) -> list[float]:
    """Bits a value by level of a whole transfer under the default policy: with exact sinks and fine recent tokens."""
    from lynxproto.codecs import get_codec

    policy = Policy(body=contestant.instance.get_config())
    codecs = [get_codec(config) for config in policy.codecs]
    sizes: list[int] = []
    for layer in source.layer_specs():
        for tile in policy.tiles(source.dtype, layer):
            words = source.arrays[tile.layer, tile.part][:, tile.tokens.start : tile.tokens.stop]
            payloads = codecs[tile.codec].encode(tile.spec(source.dtype, words.shape[2]), words)
            sizes += [0] * (len(payloads) - len(sizes))
            for level, payload in enumerate(payloads):
                sizes[level] += memoryview(payload).nbytes
    return [8 * size / source.values for size in sizes]
