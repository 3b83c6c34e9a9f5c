"""What `bench quality` compares: our tiers, other allocations with the same quantiser, tokens dropped, other codecs.

Allocations take hq's INT4 and INT8 (keys per channel, values per token, fold and scaling as in our tiers) and raw
words, whole-cache budgets and all bytes, so that they differ from ours in who gets which precision alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from lynxproto import allocation
from lynxproto.bench.baselines import CacheGen, Grouped, QuantSpec
from lynxproto.calibration import Calibration
from lynxproto.chunk import Part, Tile, TokenSet
from lynxproto.errors import BudgetError
from lynxproto.importance import decayed
from lynxproto.manifest import LayerSpec
from lynxproto.policy import LEAST_TOKENS, Importance, Policy
from lynxproto.quality import CodecMethod, Method, Window, WindowMethod
from lynxproto.tiers import Tiers, calibrated_errors

__all__ = ["BUDGETS", "FIRST_SHARES", "Dropped", "Entry", "Ranked", "catalogue"]

BUDGETS: Final = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1.0)
#: Ratios that first/last is tuned over, as in SpectrumKV's paper.
FIRST_SHARES: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
_PAPER_BITS: Final = (4, 8, 16)
#: SpectrumKV: sinks pinned at full precision, and how fast importance falls with age.
_SINKS: Final = 4
_DECAY: Final = 0.0

Order = Literal["attention", "random", "ends"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A method with its name, its family (what it is compared as) and the budget that it was given."""

    name: str
    family: str
    method: Method | WindowMethod
    budget: float | None = None


class Ranked:
    """SpectrumKV's tiers: tokens of all layers alike, raised from INT4 to INT8 to raw in an order.

    ``order``: by attention (mean over layers and heads); at random; or by nearness to the prompt's ends.
    """

    def __init__(self, tiers: Tiers, budget: float, order: Order = "attention", first_share: float = 0.5) -> None:
        self.tiers, self.budget, self.order, self.first_share = tiers, budget, order, first_share
        self._codecs = CodecMethod(Policy(tiers=tiers, recent=0, sinks=0))

    def on(self, window: Window) -> Method:
        """Allocate the window's tokens."""
        manifest = window.cache.manifest
        tokens = manifest.prompt_tokens
        pinned = np.zeros(tokens, bool)
        pinned[:_SINKS] = True
        costs = self.tiers.costs.sum((0, 1))
        # Every tier's tile in every layer and part, and its tokens' bitmap in PLAN and frame.
        overhead = float(self.tiers.overheads.sum()) + self.tiers.overheads.size * 2 * (tokens / 8 + 2)
        budget = self.budget * manifest.nbytes - overhead
        chosen = allocation.ranked(self._importance(window), [float(c) for c in costs], budget, pinned=pinned)
        if (chosen == allocation.DROPPED).any():
            raise BudgetError(f"a budget of {self.budget} does not hold all tokens in the cheapest tier")
        return _Chosen(self._codecs, chosen)

    def _importance(self, window: Window) -> NDArray[np.float64]:
        tokens = window.cache.manifest.prompt_tokens
        if self.order == "random":
            return np.random.default_rng(int(window.tokens[0])).random(tokens)
        if self.order == "ends":
            places = np.arange(tokens)
            return -np.minimum(places / self.first_share, (tokens - 1 - places) / (1 - self.first_share))
        assert window.attention is not None
        return decayed(window.attention.astype(np.float64).mean((0, 1)), _DECAY)


class _Chosen:
    """Tiers of tokens, in all layers alike."""

    def __init__(self, codecs: CodecMethod, chosen: NDArray[np.int8]) -> None:
        self._codecs, self._chosen = codecs, chosen

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Encode and decode."""
        raw = len(self._codecs.policy.codecs) - 1
        tiles = []
        for tier in np.unique(self._chosen):
            at = np.flatnonzero(self._chosen == tier)
            codec = int(tier) if len(at) >= LEAST_TOKENS else raw
            tiles.append(Tile(layer.index, part, 0, layer.kv_heads, TokenSet.of(at.tolist()), codec))
        return self._codecs.replace(layer, words, tiles)


class Dropped:
    """Keeps some tokens exactly and drops the others: they are hidden, not zeroed.

    ``first_share`` of the kept ones are the first (PDTrim-style); or ``sinks`` first ones, and a window of the last
    (StreamingLLM, arXiv 2309.17453).
    """

    def __init__(self, budget: float, first_share: float = 0.5, sinks: int | None = None) -> None:
        self.budget, self.first_share, self.sinks = budget, first_share, sinks

    def on(self, window: Window) -> Method:
        """Choose the window's tokens."""
        tokens = window.cache.manifest.prompt_tokens
        count = int(tokens * self.budget)
        share = self.first_share if self.sinks is None else min(1.0, self.sinks / max(1, count))
        return _Kept(allocation.first_last(tokens, count, share))


class _Kept:
    def __init__(self, kept: NDArray[np.bool_]) -> None:
        self.kept = kept

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """All words: the caller leaves out those that are not kept."""
        return words, float(self.kept.sum()) * words.itemsize * words.shape[0] * words.shape[2]


def catalogue(
    windows: list[Window],
    calibration: Calibration | None,
    budgets: tuple[float, ...],
    *,
    tune: Callable[[Mapping[str, WindowMethod]], str],
    layers: int,
) -> list[Entry]:
    """All methods, the most telling first. ``tune`` returns the name of the best of some methods.

    Without a calibration our tiers are uniform widths.
    """
    cache = windows[0].cache
    attention = [w.attention.astype(np.float64) for w in windows[:2] if w.attention is not None]
    three = Tiers.uniform(_PAPER_BITS, cache)
    ours = Tiers.uniform((2, 3, 4, 6, 8, 16), cache) if calibration is None else Tiers.calibrated(calibration, cache)
    ours = ours.observed(attention)
    same = three if calibration is None else replace(three, errors=calibrated_errors(calibration, _PAPER_BITS))
    even = replace(ours, floor=1.0)
    share = float(tune({str(s): Dropped(0.4, s) for s in FIRST_SHARES}))
    entries: list[Entry] = []

    def add(family: str, budget: float, method: Method | WindowMethod) -> None:
        entries.append(Entry(f"{family} {budget:.2f}", family, method, budget))

    least = float(three.costs[:, :, 0].sum() / three.costs[:, :, 2].sum()) * 1.03
    for budget in sorted(budgets, key=lambda b: (b > 0.45, b)):
        add("lynx tiers", budget, CodecMethod(Policy(tiers=ours, budget=budget)))
        if least < budget < 1:
            add("paper's tiers", budget, Ranked(three, budget))
            add("random tiers", budget, Ranked(three, budget, "random"))
            add("first/last tiers", budget, Ranked(three, budget, "ends", share))
        if 0.2 <= budget <= 0.6:
            add("first/last", budget, Dropped(budget, share))
            add("sink + window", budget, Dropped(budget, sinks=_SINKS))
        if budget <= 0.3:
            add("no importance", budget, CodecMethod(Policy(tiers=even, budget=budget)))
        if budget == 0.2:
            others: tuple[Importance, ...] = ("key-norms", "position")
            for importance in others:
                policy = Policy(tiers=ours, budget=budget, importance=importance)
                add(f"importance by {importance}", budget, CodecMethod(policy))
        if least < budget <= 0.6:
            tiers = same.observed(attention)
            add("optimiser, paper's tiers", budget, CodecMethod(Policy(tiers=tiers, budget=budget, recent=0)))
    for bits in (8, 4, 3):
        body = Policy(tiers=Tiers.uniform((bits, 16), cache), sinks=0, recent=0).codecs[0]
        entries.append(Entry(f"uniform INT{bits}", "uniform", CodecMethod(Policy(body=body, sinks=0, recent=0))))
    entries += [
        Entry("KIVI INT4, 4 sinks", "KIVI", Grouped(4)),
        Entry("KIVI INT3, 4 sinks", "KIVI", Grouped(3)),
        Entry("QuantSpec draft (4)", "QuantSpec", QuantSpec(1)),
        Entry("QuantSpec target (8)", "QuantSpec", QuantSpec(2)),
        Entry("CacheGen as in LMCache", "CacheGen", CacheGen(layers=layers)),
        Entry("CacheGen, deltas", "CacheGen", CacheGen((32, 16, 16), delta=True, layers=layers)),
        Entry("CacheGen, finer", "CacheGen", CacheGen((64, 64, 64), (64, 64), layers=layers)),
    ]
    for preset in ("balanced", "dense"):
        entries.append(Entry(f"preset {preset}", "preset", CodecMethod(Policy.lynx(preset, calibration))))
    return entries
