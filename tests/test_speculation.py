"""Drafting and verification on a toy engine: the output never depends on drafts, batches or rounding."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto.errors import ConfigError, SpeculationError
from lynxproto.speculation import (
    Greedy,
    Logits,
    Provisional,
    RejectionSampler,
    Retracted,
    Sampler,
    SeededSampler,
    Speculation,
    Verified,
    measure_noise,
)

VOCABULARY = 12
GREEDY = Greedy()


class ToyEngine:
    """Logits are a hash of all tokens, plus an error while the prompt is approximate, plus a smaller one for batches.

    ``rounding`` bounds the error of logits that were computed in a batch, or on KV that a batch made; if ``growing``,
    :meth:`bounds` are tighter where fewer tokens follow the first that a batch made.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        error: float = 0.0,
        rounding: float = 0.0,
        grid: float = 0.0,
        growing: bool = False,
    ) -> None:
        self.prompt, self.error, self.rounding, self.grid = list(prompt), error, rounding, grid
        self.growing = growing
        self.approximate = True
        self.cache = [(token, False) for token in prompt]  # (token, its KV was made by a batch)

    def install(self) -> None:
        assert len(self.cache) <= len(self.prompt), "KV after the prompt must be dropped first"
        self.approximate = False
        self.cache = [(token, False) for token in self.prompt]

    def bounds(self) -> list[float]:
        """The error's bound by the number of tokens since the first that a batch made."""
        return [self._bound(depth) for depth in range(1, 40)] if self.growing else [self.rounding]

    def _bound(self, depth: int) -> float:
        return self.rounding * (min(depth, 20) / 20 if self.growing else 1)

    def _logits(self, batched: bool) -> Logits:
        tokens = bytes(token for token, _ in self.cache)

        def noise(*what: object) -> Logits:
            return np.random.default_rng(zlib.crc32(repr((tokens, what)).encode())).uniform(-1, 1, VOCABULARY)

        logits = 3 * noise("model")
        if self.grid:
            logits = np.round(logits / self.grid) * self.grid
        if self.approximate:
            logits += self.error * noise("quantised")
        kinds = tuple(kind for _, kind in self.cache)
        if batched or any(kinds):
            depth = len(kinds) - kinds.index(True)
            logits += self._bound(depth) * noise("batch", batched, kinds)
        return logits

    def step(self, token: int) -> Logits:
        self.cache.append((token, False))
        return self._logits(False)

    def verify(self, tokens: Sequence[int]) -> Logits:
        rows = []
        for token in tokens:
            self.cache.append((token, True))
            rows.append(self._logits(True))
        return np.stack(rows)

    def crop(self, length: int) -> None:
        assert 0 <= length <= len(self.cache)
        del self.cache[length:]


def never(generated: Sequence[int]) -> bool:
    return False


def reference(
    engine: ToyEngine,
    first: int | None,
    *,
    sampler: Sampler = GREEDY,
    processors=(),
    eos=(),
    stop=never,
    max_tokens: int,
) -> tuple[int, ...]:
    """Plain decoding on the exact cache, written without the module's help."""
    engine.install()
    sequence = list(engine.prompt)
    generated: list[int] = []
    if first is None:
        engine.crop(len(sequence) - 1)
    else:
        sequence.append(first)
        generated.append(first)
    while not (generated and (generated[-1] in eos or len(generated) >= max_tokens or stop(generated))):
        logits = engine.step(sequence[-1])
        for processor in processors:
            logits = processor(sequence, logits)
        token = sampler.choose(logits, len(sequence))
        sequence.append(token)
        generated.append(token)
    return tuple(generated)


def no_repeat(tokens: Sequence[int], logits: Logits) -> Logits:
    logits = logits.copy()
    logits[tokens[-1]] = -np.inf
    return logits


samplers = st.one_of(
    st.just(Greedy()),
    st.builds(
        SeededSampler,
        seed=st.integers(0, 2**64 - 1),
        temperature=st.sampled_from([0.3, 1.0, 2.5]),
        top_k=st.sampled_from([0, 1, 3, VOCABULARY, 50]),
        top_p=st.sampled_from([0.2, 0.9, 1.0]),
    ),
)
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(
    prompt=prompts,
    first=st.none() | st.integers(0, VOCABULARY - 1),
    sampler=samplers,
    processors=st.sampled_from([(), (no_repeat,)]),
    eos=st.sets(st.integers(0, VOCABULARY - 1), max_size=2),
    stop_sum=st.integers(0, 5),
    max_tokens=st.integers(1, 30),
    max_draft=st.integers(0, 20),
    interrupt=st.integers(0, 25),
    error=st.sampled_from([0.0, 0.1, 0.5, 2.0, 50.0]),
    rounding=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    grid=st.sampled_from([0.0, 0.5]),
    growing=st.booleans(),
)
def test_output_is_that_of_plain_decoding(  # noqa: PLR0917 (hypothesis passes by keyword)
    prompt, first, sampler, processors, eos, stop_sum, max_tokens, max_draft, interrupt, error, rounding, grid, growing
):
    def stop(generated):
        return stop_sum > 0 and len(generated) > 3 and sum(generated[-3:]) % 7 == stop_sum

    rules = {"sampler": sampler, "processors": processors, "eos": eos, "stop": stop, "max_tokens": max_tokens}
    expected = reference(ToyEngine(prompt, grid=grid), first, **rules)
    engine = ToyEngine(prompt, error, rounding, grid, growing)
    run = Speculation(
        engine,
        prompt,
        first,
        max_draft=max_draft,
        noise=engine.bounds(),
        **rules,
    )
    asked = count()
    shown = list(run.tokens)
    committed = len(shown)
    for event in run.draft(until=lambda: next(asked) >= interrupt):
        assert event == Provisional(len(shown), event.token)
        shown.append(event.token)
    assert run.report.drafted == len(shown) - committed == len(run.drafts) <= min(max_draft, interrupt)

    for event in [*run.verify(engine.install), *run.decode()]:
        if isinstance(event, Retracted):
            assert committed <= event.index < len(shown)
            del shown[event.index :]
        else:
            assert isinstance(event, Verified)
            shown[committed : committed + len(event.tokens)] = event.tokens  # confirms what is shown, or extends it
            committed += len(event.tokens)
            assert event.count == committed
    assert tuple(shown[:committed]) == run.tokens == expected
    assert len(shown) == committed
    assert run.finished
    assert run.report.accepted <= run.report.drafted
    assert run.report.noise == engine.bounds()[-1]  # the bound given was right, so nothing larger was seen
    if rounding == 0:
        assert run.report.redecided == run.report.mismatches == ()
        assert run.report.batches <= 1


@settings(max_examples=300, deadline=None)
@given(
    sampler=samplers, seed=st.integers(0, 2**32), noise=st.sampled_from([1e-6, 1e-3, 0.1, 0.5]), width=st.integers(1, 9)
)
def test_no_near_tie_means_that_no_error_changes_the_choice(sampler, seed, noise, width):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, width)
    if not sampler.near_tie(logits, 7, noise):
        for _ in range(10):
            assert sampler.choose(logits + noise * rng.choice([-1, 1, 0.5], width), 7) == sampler.choose(logits, 7)


def test_every_accepted_prefix_length():
    """One forward settles any number of right drafts, and gives one token more."""
    prompt, first, drafts = [1, 2, 3], 4, 6
    exact = reference(ToyEngine(prompt), first, max_tokens=10)
    for right in range(drafts + 1):
        engine = ToyEngine(prompt)

        def spoil(tokens, logits, right=right, engine=engine):
            draft = engine.approximate and len(tokens) - len(prompt) - 1 >= right
            return -logits if draft else logits

        run = Speculation(engine, prompt, first, processors=[spoil], max_draft=drafts, max_tokens=10)
        drafted = list(run.draft())
        events = list(run.verify(engine.install))
        assert len(drafted) == drafts
        assert run.report.accepted == right
        assert run.report.batches == 1
        assert run.report.steps == 0
        assert events[-1] == Verified(right + 2, exact[1 : right + 2])
        assert events[:-1] == ([Retracted(right + 1)] if right < drafts else [])
        assert len(engine.cache) == len(prompt) + right + 1  # all but the last committed token
        list(run.decode())
        assert run.tokens == exact


def test_near_ties_are_decided_again_and_reported():
    prompt = [5]
    engine = ToyEngine(prompt, rounding=0.4, grid=1.0)
    exact = reference(ToyEngine(prompt, grid=1.0), 0, max_tokens=40)
    run = Speculation(engine, prompt, 0, max_tokens=40, max_draft=40, noise=0.4)
    list(run.draft())
    list(run.verify(engine.install))
    assert run.tokens == exact
    assert run.report.redecided
    assert set(run.report.mismatches) & set(run.report.redecided)  # ties on a grid: batches do choose otherwise
    assert run.report.steps >= len(run.report.redecided)


def test_noise_that_was_underestimated_is_reported():
    prompt = [5]
    engine = ToyEngine(prompt, rounding=0.2)
    run = Speculation(engine, prompt, 0, max_tokens=60, max_draft=30, noise=0.02)
    list(run.draft())
    list(run.verify(engine.install))
    list(run.decode())
    assert run.report.redecided
    assert run.report.mismatches
    assert 0.02 < run.report.noise <= 0.4


@pytest.mark.parametrize("growing", [False, True])
def test_noise_that_nobody_measured_is_learned(growing):
    wrong = learned = 0
    for seed in range(60):
        prompt = [seed % VOCABULARY, seed // VOCABULARY]
        engine = ToyEngine(prompt, error=0.3, rounding=0.1, growing=growing)
        plain = reference(ToyEngine(prompt), 0, max_tokens=50)
        run = Speculation(engine, prompt, 0, max_tokens=50, max_draft=30, noise=None)
        assert run.noise is None
        list(run.draft())
        list(run.verify(engine.install))
        list(run.decode())
        wrong += run.tokens != plain
        if run.noise is not None:
            learned += 1
            assert len(run.noise) >= 31
            assert list(run.noise) == sorted(run.noise)
    assert wrong <= 1  # eight tokens are no proof
    assert learned > 15


def test_what_is_learned_is_no_less_than_rounding_allows():
    engine = ToyEngine([3, 4])  # its batches are exact, as far as one can see
    run = Speculation(engine, [3, 4], 0, max_tokens=30, max_draft=20, noise=None, rounding=2.0**-8)
    list(run.draft())
    list(run.verify(engine.install))
    assert 2.0**-8 < run.noise[0] < 8 * 2.0**-8


def test_infinite_noise_believes_no_batch():
    engine = ToyEngine([4, 5], error=0.5, rounding=3.0)
    run = Speculation(engine, [4, 5], 0, max_tokens=30, max_draft=20, noise=float("inf"))
    drafts = [event.token for event in run.draft()]
    events = list(run.verify(engine.install))
    list(run.decode())
    assert run.tokens == reference(ToyEngine([4, 5]), 0, max_tokens=30)
    assert (run.report.batches, run.report.steps) == (0, 29)
    accepted = run.report.accepted
    assert list(run.tokens[1 : 1 + accepted]) == drafts[:accepted]
    assert [e for e in events if isinstance(e, Retracted)] == ([Retracted(1 + accepted)] if accepted < 20 else [])


def test_a_short_batch_is_stepped_again_so_that_ties_cost_nothing_later():
    prompt, noise = [4], 0.1
    engine = ToyEngine(prompt, error=50.0, rounding=noise)
    run = Speculation(engine, prompt, 0, max_tokens=60, max_draft=1, noise=noise)
    list(run.draft())
    list(run.verify(engine.install))
    assert run.report.accepted == 0
    list(run.decode())
    assert run.report.redecided == ()
    assert run.report.steps <= 60


def test_measure_noise():
    engine = ToyEngine([1, 2], rounding=0.25, growing=True)
    engine.install()
    noise = measure_noise(engine, 2, [3, 4, 5, 6] * 5, batches=(4, 20))
    assert len(noise) == 20
    assert list(noise) == sorted(noise)
    assert all(0 < measured <= bound for measured, bound in zip(noise, engine.bounds(), strict=False))
    assert noise[-1] > 0.1
    assert len(engine.cache) == 2
    assert measure_noise(ToyEngine([1]), 1, [3, 4]) == (0.0, 0.0)


def test_seeded_noise_depends_on_seed_and_position_only():
    logits = np.zeros(1000)
    sampler = SeededSampler(7)
    assert sampler.choose(logits, 3) == SeededSampler(7).choose(logits, 3)
    chosen = Counter(SeededSampler(s).choose(np.log([0.5, 0.3, 0.2, 1e-9]), p) for s in range(20) for p in range(200))
    assert {t: round(n / 4000, 1) for t, n in chosen.items()} == {0: 0.5, 1: 0.3, 2: 0.2}
    # A golden value: a seed must mean the same run on every machine and version.
    assert [sampler.choose(logits, p) for p in range(5)] == [896, 370, 195, 345, 165]


def test_rejection_sampling_follows_the_exact_distribution():
    prompt, runs = [1], 4000
    target = ToyEngine(prompt)
    target.install()
    sampler = RejectionSampler(temperature=1.5, top_p=0.95, rng=np.random.default_rng(1))
    expected = sampler.probabilities(target.step(2))
    counts = np.zeros(VOCABULARY)
    accepted = 0
    for _ in range(runs):
        engine = ToyEngine(prompt, error=1.5)
        run = Speculation(engine, prompt, 2, sampler=sampler, max_draft=2, max_tokens=3)
        list(run.draft())
        list(run.verify(engine.install))
        counts[run.tokens[1]] += 1
        accepted += run.report.accepted > 0
    assert 0.2 * runs < accepted < 0.98 * runs
    assert np.abs(counts / runs - expected).max() < 4 * np.sqrt(0.25 / runs)


def test_engine_that_breaks_the_contract_is_named():
    class Broken(ToyEngine):
        def step(self, token: int) -> Logits:
            return np.full(VOCABULARY, np.nan)

        def verify(self, tokens: Sequence[int]) -> Logits:
            return np.zeros((len(tokens) + 1, VOCABULARY))

    with pytest.raises(SpeculationError, match="position 2: the best logit is nan"):
        list(Speculation(Broken([1]), [1], 2).draft())
    run = Speculation(ToyEngine([1]), [1], 2, max_draft=2)
    list(run.draft())
    run._engine = Broken([1])
    with pytest.raises(SpeculationError, match=r"shape \(4, 12\) for 3 tokens"):
        list(run.verify())


def test_phases_come_in_order():
    engine = ToyEngine([1])
    run = Speculation(engine, [1], 2)
    with pytest.raises(SpeculationError, match="before decode"):
        list(run.decode(3))
    list(run.verify(engine.install))
    with pytest.raises(SpeculationError, match="verified already"):
        list(run.draft())
    list(run.decode(5))
    assert len(run.tokens) == 5
    assert not run.finished


@pytest.mark.parametrize(
    "build",
    [
        lambda: Speculation(ToyEngine([1]), []),
        lambda: Speculation(ToyEngine([1]), [1], max_draft=-1),
        lambda: Speculation(ToyEngine([1]), [1], max_tokens=0),
        lambda: Speculation(ToyEngine([1]), [1], noise=float("nan")),
        lambda: Speculation(ToyEngine([1]), [1], noise=[-1.0, 2.0]),
        lambda: Speculation(ToyEngine([1]), [1], noise=[]),
        lambda: SeededSampler(-1),
        lambda: SeededSampler(1, temperature=0),
        lambda: SeededSampler(1, top_p=0),
        lambda: RejectionSampler(top_k=-1),
    ],
)
def test_arguments_that_make_no_sense(build):
    with pytest.raises(ConfigError):
        build()
