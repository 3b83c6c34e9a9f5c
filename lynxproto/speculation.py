"""Drafting and verification: decode on an approximate KV cache, commit only what the exact one confirms.

Engine-free. An engine implements three methods (:class:`Engine`); everything else here is plain Python and NumPy.

The contract: the committed tokens are those that the same engine produces, one step at a time, on the cache
that verification uses. Drafts change when tokens appear, never which. Two things make that hold:

* draft and verification choose each token with the same noise (greedy: none; sampling: Gumbel-max noise that is a
  function of the seed and the token's position), so equal logits give equal tokens;
* a batched forward and single steps round differently. Where the two best scores lie within twice the largest
  difference measured between the two (``noise``), the token is decided again step by step, and reported.

Verification by one forward over all drafts is speculative decoding (arXiv 2211.17192) with the same model in both
roles; only the cache differs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import ConfigError, SpeculationError

__all__ = [
    "Engine",
    "Event",
    "Greedy",
    "Logits",
    "Processor",
    "Provisional",
    "RejectionSampler",
    "Report",
    "Retracted",
    "Sampler",
    "SeededSampler",
    "Speculation",
    "Verified",
    "gap",
    "measure_noise",
    "nucleus",
]

_SHORT_BATCH = 4
#: To learn how batched and stepwise logits differ, so many tokens are decided both ways; what was seen is then doubled,
#: and grows with depth beyond that. What fewer tokens taught is good for one request only.
_LEARN_TOKENS = 8
_LEARN_LEAST = 4
_LEARN_MARGIN = 2.0

#: Scores of the next token, shape ``[vocabulary]``, any float type.
Logits = NDArray[Any]

#: Rewrites logits. Gets all tokens so far (prompt included) and the logits; must be a pure function of both, since
#: it runs once for the draft and again for the verification of the same position.
Processor = Callable[[Sequence[int], Logits], Logits]


class Engine(Protocol):
    """One sequence in a decoder whose KV cache holds the prompt.

    Arrays that are returned belong to the caller: a later call must not change them.
    """

    def step(self, token: int) -> Logits:
        """Feed one token; return the next token's logits, shape ``[vocabulary]``."""

    def verify(self, tokens: Sequence[int]) -> Logits:
        """Feed all tokens in one forward; row i, of shape ``[vocabulary]``, follows ``tokens[: i + 1]``."""

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        The state must be the one that feeding those tokens leaves: windows and recurrent state are restored, not cut.
        """


@dataclass(frozen=True, slots=True)
class Provisional:
    """A drafted ``token`` at ``index`` of the generated tokens. It may be shown; it is not committed."""

    index: int
    token: int


@dataclass(frozen=True, slots=True)
class Retracted:
    """The provisional tokens from ``index`` on were wrong."""

    index: int


@dataclass(frozen=True, slots=True)
class Verified:
    """``tokens`` joined the committed ones, which are now ``count`` (RESULT's first token included)."""

    count: int
    tokens: tuple[int, ...]


Event = Provisional | Retracted | Verified


@dataclass(slots=True)
class Report:
    """What happened, for people and for benchmarks. Indices count generated tokens, RESULT's token being 0."""

    #: Tokens drafted, and the length of their prefix that was committed.
    drafted: int = 0
    accepted: int = 0
    #: Near ties that were decided again step by step.
    redecided: tuple[int, ...] = ()
    #: Positions where the batched choice, or a token committed on batched state, differs from the stepwise choice.
    mismatches: tuple[int, ...] = ()
    #: Largest logit difference between batched and stepwise forwards: given at the start, or seen since.
    noise: float = 0.0
    #: Forwards after verification began: of one token, and of several.
    steps: int = 0
    batches: int = 0


class Sampler(Protocol):
    """Chooses tokens. ``position`` is the absolute position of the token that is chosen."""

    #: Whether :meth:`check` reads the draft's logits (they are kept only then).
    needs_draft_logits: ClassVar[bool]

    def choose(self, logits: Logits, position: int) -> int:
        """The token for ``position``."""

    def check(self, token: int, draft_logits: Logits | None, logits: Logits, position: int) -> int:
        """The token to commit where ``token`` was drafted; equal to it if the draft is accepted."""

    def near_tie(self, logits: Logits, position: int, noise: float) -> bool:
        """Whether an error of up to ``noise`` in each logit could change :meth:`choose`."""


class Greedy:
    """The largest logit; the lowest id among equals."""

    needs_draft_logits: ClassVar[bool] = False

    def choose(self, logits: Logits, position: int) -> int:
        """The token for ``position``."""
        return _argmax(logits, position)

    def check(self, token: int, draft_logits: Logits | None, logits: Logits, position: int) -> int:
        """The token to commit where ``token`` was drafted."""
        return self.choose(logits, position)

    def near_tie(self, logits: Logits, position: int, noise: float) -> bool:
        """Whether the two largest logits lie within ``2 * noise``."""
        return noise > 0 and gap(logits) < 2 * noise


@dataclass(frozen=True, slots=True)
class SeededSampler:
    """Sampling as the argmax of scaled logits plus Gumbel noise that depends on the seed and the position alone.

    The noise is the same for the draft, the verification and a run without speculation, so all three agree wherever
    their logits do. ``top_k`` (0: off) and ``top_p`` (1: off) both act on the full distribution at ``temperature``.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    needs_draft_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed must fit 64 unsigned bits, not {self.seed}")
        _check_filters(self.temperature, self.top_k, self.top_p)

    def choose(self, logits: Logits, position: int) -> int:
        """The token for ``position``."""
        scaled = _scaled(logits, self.temperature)
        allowed = nucleus(scaled, self.top_k, self.top_p)
        return _argmax(np.where(allowed, scaled + self._gumbel(len(scaled), position), -np.inf), position)

    def check(self, token: int, draft_logits: Logits | None, logits: Logits, position: int) -> int:
        """The token to commit where ``token`` was drafted."""
        return self.choose(logits, position)

    def near_tie(self, logits: Logits, position: int, noise: float) -> bool:
        """Whether ``noise`` could change the choice, be it by the order of scores or by who passes the filters."""
        if noise <= 0:
            return False
        slack = 2 * noise / self.temperature
        scaled = _scaled(logits, self.temperature)
        scores = scaled + self._gumbel(len(scaled), position)
        certain = nucleus(scaled, self.top_k, self.top_p, -slack)
        possible = nucleus(scaled, self.top_k, self.top_p, slack)
        best = int(np.argmax(np.where(possible, scores, -np.inf)))
        return not certain[best] or gap(np.where(possible, scores, -np.inf)) < slack

    def _gumbel(self, size: int, position: int) -> NDArray[np.float64]:
        # Philox is counter-based: the position picks a block of the stream, so noise needs no history. Raw words and
        # not Generator methods, whose streams NumPy may change between versions.
        words = np.random.Philox(key=self.seed, counter=[0, position, 0, 0]).random_raw(size)
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # open interval (0, 1)
        return -np.log(-np.log(uniform))


class RejectionSampler:
    """Standard rejection sampling (arXiv 2211.17192, algorithm 1) for engines whose sampling cannot be seeded.

    Committed tokens follow the exact distribution, but are not those of any particular run without speculation.
    """

    needs_draft_logits: ClassVar[bool] = True

    def __init__(
        self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, rng: np.random.Generator | None = None
    ) -> None:
        _check_filters(temperature, top_k, top_p)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._rng = np.random.default_rng() if rng is None else rng

    def probabilities(self, logits: Logits) -> NDArray[np.float64]:
        """The distribution that is sampled, shape ``[vocabulary]``."""
        scaled = _scaled(logits, self.temperature)
        weights = np.where(nucleus(scaled, self.top_k, self.top_p), np.exp(scaled - scaled.max()), 0.0)
        return np.asarray(weights / weights.sum())

    def choose(self, logits: Logits, position: int) -> int:
        """The token for ``position``."""
        _argmax(logits, position)  # refuses NaN
        return self._draw(self.probabilities(logits))

    def check(self, token: int, draft_logits: Logits | None, logits: Logits, position: int) -> int:
        """Accept ``token`` with probability ``min(1, p / q)``, else draw from ``max(0, p - q)``."""
        if draft_logits is None:
            raise SpeculationError(f"rejection sampling at position {position} needs the draft's logits")
        _argmax(logits, position)
        p, q = self.probabilities(logits), self.probabilities(draft_logits)
        if self._rng.random() * q[token] < p[token]:
            return token
        rest = np.maximum(p - q, 0.0)
        return self._draw(rest / rest.sum())

    def near_tie(self, logits: Logits, position: int, noise: float) -> bool:
        """Never: an unseeded choice has no right answer to protect."""
        return False

    def _draw(self, probabilities: NDArray[np.float64]) -> int:
        edges = np.cumsum(probabilities)
        return int(np.searchsorted(edges, self._rng.random() * edges[-1], side="right"))


class Speculation:
    """One request: draft on what has arrived, verify once, decode on.

    ``prompt`` are the tokens whose KV is (or will be) in the engine's cache; ``first_token`` is what prefill already
    chose (RESULT), committed from the start, or None, in which case the last prompt token is fed again.
    ``eos`` ends a request with its token; ``stop`` gets the generated tokens and says whether the newest ends it;
    ``processors`` rewrite logits, in order. ``noise`` comes from :func:`measure_noise`; one number: for all depths;
    None: the first few tokens of the verification are decided both ways, to learn it (:attr:`noise` is for the next
    request); infinity: no batch is believed, and all tokens are decided step by step. ``rounding``: of the engine's
    numbers, relative; whatever is learned, logits may differ by that share of the largest.

    ``draft``, ``verify`` and ``decode`` are generators, called in that order; they do their work as they are
    iterated, so a caller timestamps, shows and interrupts at each event. Not thread-safe.

    Raises :class:`~lynxproto.errors.SpeculationError` when the engine breaks its contract or a phase comes out of
    order, and :class:`~lynxproto.errors.ConfigError` for arguments that make no sense.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        first_token: int | None = None,
        *,
        sampler: Sampler | None = None,
        processors: Sequence[Processor] = (),
        eos: Iterable[int] = (),
        stop: Callable[[Sequence[int]], bool] | None = None,
        max_draft: int = 64,
        max_tokens: int | None = None,
        noise: float | Sequence[float] | None = 0.0,
        rounding: float = float(np.finfo(np.float32).eps),
    ) -> None:
        if not prompt:
            raise ConfigError("a speculation needs a prompt of at least one token")
        if max_draft < 0 or (max_tokens is not None and max_tokens < 1):
            raise ConfigError(f"max_draft {max_draft} or max_tokens {max_tokens} is out of range")
        self._learning = noise is None
        self._known = noise is not None
        self._rounding = rounding
        given = np.zeros(_LEARN_TOKENS) if noise is None else np.atleast_1d(np.asarray(noise, np.float64))
        by_depth = np.maximum.accumulate(given)
        if by_depth.ndim != 1 or not by_depth.size or not by_depth[0] >= 0 or np.isnan(by_depth).any():
            raise ConfigError(f"noise must be differences of logits, not {noise}")
        self._engine = engine
        self.sampler: Sampler = Greedy() if sampler is None else sampler
        self._processors = tuple(processors)
        self._eos = frozenset(eos)
        self._stop = stop
        self._max_draft = max_draft
        self._max_tokens = max_tokens
        #: Largest difference of logits that follow 1, 2... tokens (the last entry: or more) after the stepwise ones.
        self._noise = by_depth
        self.report = Report(noise=float(by_depth[-1]))

        self._prompt = len(prompt)
        self._sequence = [int(token) for token in prompt]  # the prompt and the committed tokens
        self._draft: list[int] = []
        self._draft_logits: list[Logits] = []
        self._phase = "draft"
        #: Leading tokens of the sequence whose KV the prompt's exact cache or single steps gave: what a run without
        #: speculation would hold. Positions decided on anything else are subject to the near-tie rule.
        self._stepwise = 0
        self._ended = False
        if first_token is not None:
            self._commit(int(first_token))
        #: Tokens that the cache keeps at each start: with no RESULT the last prompt token is fed again.
        self._base = len(self._sequence) - 1

    @property
    def tokens(self) -> tuple[int, ...]:
        """The committed tokens, RESULT's first."""
        return tuple(self._sequence[self._prompt :])

    @property
    def drafts(self) -> tuple[int, ...]:
        """The provisional tokens that follow :attr:`tokens`; empty after verification."""
        return tuple(self._draft)

    @property
    def noise(self) -> tuple[float, ...] | None:
        """How far batched logits may be from stepwise ones, by depth: as given or learned, and what was seen since.

        None if it was to be learned, and there were too few drafts to learn from.
        """
        return tuple(map(float, self._noise)) if self._known else None

    @property
    def finished(self) -> bool:
        """Whether the committed tokens ended the request (EOS, stop rule, max_tokens)."""
        return self._ended

    def draft(self, until: Callable[[], bool] = lambda: False) -> Iterator[Provisional]:
        """Draft on the cache as it is, until ``until()`` (asked before each step), ``max_draft`` or an end."""
        self._expect("draft")
        if not self._draft:
            self._engine.crop(self._base)
        sequence = self._sequence + self._draft
        while len(self._draft) < self._max_draft and not self._ends(sequence) and not until():
            logits = self._process(sequence, self._checked(self._engine.step(sequence[-1]), 1)[0])
            token = self.sampler.choose(logits, len(sequence))
            if self.sampler.needs_draft_logits:
                self._draft_logits.append(np.array(logits))
            sequence.append(token)
            self._draft.append(token)
            self.report.drafted += 1
            yield Provisional(len(sequence) - 1 - self._prompt, token)

    def verify(self, install: Callable[[], None] | None = None) -> Iterator[Event]:
        """Settle the drafts on the exact cache; commit the longest matching prefix plus one token.

        Drops all KV after the prompt, calls ``install`` (puts the exact prompt KV in place, unless it is there
        already), and runs one forward over the last committed token and the drafts. Near ties cost more: the tokens
        up to and including the tie are decided step by step, and the drafts after it by another forward.
        """
        self._expect("draft")
        self._phase = "decode"
        self._engine.crop(self._base)
        if install is not None:
            install()
            self._engine.crop(self._base)  # the prompt's own last token is fed again if there was no RESULT
        self._stepwise = self._base
        draft, kept = self._draft, self._draft_logits
        self._draft, self._draft_logits = [], []
        agreeing = True
        while agreeing and not self._ended:
            start = len(self._sequence)
            agreeing = self._settle(draft, kept)
            fresh = self._sequence[start:]
            pairs = zip(fresh, draft, strict=False)
            matching = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            self.report.accepted += matching
            draft, kept = draft[matching:], kept[matching:]
            if draft and not agreeing:
                yield Retracted(start + matching - self._prompt)
            yield Verified(len(self._sequence) - self._prompt, tuple(fresh))

    def decode(self, count: int | None = None) -> Iterator[Verified]:
        """Go on step by step on the verified cache until ``count`` tokens are committed in all (None: until an end)."""
        self._expect("decode")
        while not self._ended and (count is None or len(self._sequence) - self._prompt < count):
            position = len(self._sequence)
            batched_kv = position - 1 - self._stepwise
            # A tie would send us back to where batched KV begins; if that is only a few steps, go at once, and be rid
            # of the rule.
            row = self._replay() if 0 < batched_kv <= _SHORT_BATCH else self._step()
            logits = self._process(self._sequence, row)
            if self._stepwise >= position - 1:
                self._stepwise = position
            elif self._near_tie(logits, position):
                self.report.redecided += (position - self._prompt,)
                batched = self.sampler.choose(logits, position)
                depth = position - self._stepwise
                exact = self._replay()
                self._observe(row, exact, depth)
                logits = self._process(self._sequence, exact)
                if self.sampler.choose(logits, position) != batched:
                    self.report.mismatches += (position - self._prompt,)
            self._commit(self.sampler.choose(logits, position))
            yield Verified(len(self._sequence) - self._prompt, (self._sequence[-1],))

    def _settle(self, draft: list[int], kept: list[Logits]) -> bool:
        """Commit from one forward over the last token and ``draft``; whether more of the draft may follow."""
        start = len(self._sequence)
        if not draft or self._noise[0] == np.inf:
            self._decide_stepwise()
            return len(draft) > 1 and self._sequence[-1] == draft[0]
        rows = self._checked(self._engine.verify([self._sequence[-1], *draft]), len(draft) + 1)
        self.report.batches += 1
        choices: list[int] = []
        tie = False
        while not tie:
            i, position = len(choices), start + len(choices)
            sequence = self._sequence + choices
            logits = self._process(sequence, rows[i])
            tie = self._near_tie(logits, position) or (self._learning and i + 1 == _LEARN_TOKENS)
            if i == len(draft):
                choices.append(self.sampler.choose(logits, position))
                break
            choices.append(self.sampler.check(draft[i], kept[i] if kept else None, logits, position))
            if choices[i] != draft[i] or self._ends(self._sequence + choices):
                break
        if not (tie or self._learning):
            for token in choices:
                self._commit(token)
            self._engine.crop(len(self._sequence) - 1)
            return False
        # Decide everything up to the tie as a run without speculation would: on KV that single steps made.
        if not self._learning:
            self.report.redecided += (start + len(choices) - 1 - self._prompt,)
        self._engine.crop(self._stepwise)
        more = len(draft) > len(choices)
        for i, batched in enumerate(choices):
            exact = self._decide_stepwise()
            self._observe(rows[i], exact, i + 1)
            token = self._sequence[-1]
            if token != batched and not self._learning:
                self.report.mismatches += (start + i - self._prompt,)
            if self._ended or i == len(draft) or token != draft[i]:
                more = False
                break
        if self._learning:
            self._learned(i + 1, float(np.abs(np.asarray(exact, np.float64)).max()))
        return more

    def _learned(self, depth: int, largest: float) -> None:
        """Take what was observed up to ``depth`` for what can be expected; ``largest``: size of the logits."""
        depths = np.arange(1, max(self._max_draft, depth) + 2)
        seen = np.maximum(self._noise[np.minimum(depths, depth) - 1], self._rounding * largest)
        self._noise = _LEARN_MARGIN * seen * np.sqrt(np.maximum(1.0, depths / depth))
        self.report.noise = float(self._noise[-1])
        self._learning, self._known = False, depth >= _LEARN_LEAST

    def _decide_stepwise(self) -> Logits:
        """Commit one token on a cache that single steps made; return the raw logits."""
        row = self._step()
        self._stepwise = len(self._sequence)
        self._commit(self.sampler.choose(self._process(self._sequence, row), len(self._sequence)))
        return row

    def _replay(self) -> Logits:
        """Make the cache what single steps would have made it; return the raw logits after the last token.

        Tokens that are committed stay committed: one that the replay would have chosen otherwise is reported.
        """
        sequence = self._sequence
        self._engine.crop(self._stepwise)
        for length in range(self._stepwise + 1, len(sequence)):
            row = self._step(length)
            if self.sampler.choose(self._process(sequence[:length], row), length) != sequence[length]:
                self.report.mismatches += (length - self._prompt,)
        row = self._step()
        self._stepwise = len(sequence)
        return row

    def _step(self, length: int | None = None) -> Logits:
        """Feed the last of the sequence's first ``length`` tokens."""
        self.report.steps += 1
        token = self._sequence[-1 if length is None else length - 1]
        row: Logits = self._checked(self._engine.step(token), 1)[0]
        return row

    def _near_tie(self, logits: Logits, position: int) -> bool:
        depth = position - self._stepwise
        return self.sampler.near_tie(logits, position, float(self._noise[min(depth, len(self._noise)) - 1]))

    def _observe(self, batched: Logits, exact: Logits, depth: int) -> None:
        """Learn from logits that were computed both ways, ``depth`` tokens after the stepwise ones."""
        difference = float(_differences(batched, exact).max())
        from_here = self._noise[min(depth, len(self._noise)) - 1 :]
        np.maximum(from_here, difference, out=from_here)
        self.report.noise = float(self._noise[-1])

    def _process(self, sequence: Sequence[int], logits: Logits) -> Logits:
        for processor in self._processors:
            logits = processor(sequence, logits)
        return logits

    def _commit(self, token: int) -> None:
        self._sequence.append(token)
        self._ended = self._ends(self._sequence)

    def _ends(self, sequence: Sequence[int]) -> bool:
        generated = sequence[self._prompt :]
        if not generated:
            return False
        if generated[-1] in self._eos or (self._max_tokens is not None and len(generated) >= self._max_tokens):
            return True
        return self._stop is not None and self._stop(generated)

    def _checked(self, logits: Logits, rows: int) -> Logits:
        array: Logits = np.atleast_2d(np.asarray(logits))
        if array.ndim != 2 or array.shape[0] != rows or array.shape[1] == 0:
            raise SpeculationError(f"the engine returned logits of shape {np.shape(logits)} for {rows} tokens")
        return array

    def _expect(self, phase: str) -> None:
        if self._phase != phase:
            done = "the drafts were verified already; go on with decode()"
            raise SpeculationError(done if phase == "draft" else "call verify() before decode()")


def measure_noise(engine: Engine, length: int, tokens: Sequence[int], batches: Sequence[int] = ()) -> tuple[float, ...]:
    """The largest difference between batched and stepwise logits, by depth.

    ``tokens`` are fed after ``length`` cached ones, once step by step, and in one forward for each of ``batches`` (how
    many of them; default: all), since kernels round differently at different shapes. Entry i holds for logits that
    follow at most i + 1 tokens: the more K and V a batch made, the more the logits differ. Use at least as many tokens
    as will be drafted. The engine is left with its first ``length`` tokens.
    """
    engine.crop(length)
    stepwise = np.stack([np.array(engine.step(token)) for token in tokens])
    largest = np.zeros(len(tokens))
    for count in batches or (len(tokens),):
        engine.crop(length)
        batched = np.array(engine.verify(tokens[:count]))
        largest[:count] = np.maximum(largest[:count], _differences(batched, stepwise[:count]))
    engine.crop(length)
    return tuple(map(float, np.maximum.accumulate(largest)))


def _differences(a: Logits, b: Logits) -> NDArray[np.float64]:
    """The largest difference in each row."""
    return np.asarray(np.abs(np.asarray(a, np.float64) - b).max(axis=-1))


def _argmax(scores: Logits, position: int) -> int:
    best = int(np.argmax(scores))
    if not scores[best] > -np.inf:  # NaN, or every token is masked
        raise SpeculationError(f"no token can be chosen at position {position}: the best logit is {scores[best]}")
    return best


def gap(scores: Logits) -> float:
    """How far the best score is ahead of the second."""
    if len(scores) < 2:
        return math.inf
    second, best = np.partition(scores, -2)[-2:]
    return float(best) - float(second)


def _scaled(logits: Logits, temperature: float) -> NDArray[np.float64]:
    return np.asarray(logits, np.float64) / temperature


def nucleus(scaled: NDArray[np.float64], top_k: int, top_p: float, slack: float = 0.0) -> NDArray[np.bool_]:
    """Who passes both filters: the ``top_k`` largest, and tokens whose strictly larger ones weigh less than ``top_p``.

    ``slack`` bounds the error of a difference of two scores: above zero, who could pass; below, who surely does.
    """
    allowed = np.ones(len(scaled), np.bool_)
    margin = abs(slack)
    if 0 < top_k < len(scaled):
        after, last = np.partition(scaled, (-top_k - 1, -top_k))[[-top_k - 1, -top_k]]
        allowed &= scaled - margin > after if slack < 0 else scaled + margin >= last
    if top_p < 1:
        ascending = np.sort(scaled)
        weights = np.exp(ascending - ascending[-1])
        weights /= weights.sum()
        above = np.concatenate([np.cumsum(weights[::-1])[::-1], [0.0]])  # [i]: weight of ascending[i:]
        if slack < 0:
            own = np.exp(scaled - ascending[-1]) * weights[-1]
            rivals = above[np.searchsorted(ascending, scaled - margin, "left")] - own
            worst = rivals * math.exp(margin)
            allowed &= worst / (worst + 1 - rivals) < top_p
        else:
            ahead = above[np.searchsorted(ascending, scaled + margin, "right")]
            allowed &= ahead / (ahead + (1 - ahead) * math.exp(margin)) < top_p
    return allowed


def _check_filters(temperature: float, top_k: int, top_p: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature must be positive, not {temperature}; for greedy decoding use Greedy()")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(f"top_k {top_k} must not be negative and top_p {top_p} must be in (0, 1]")
