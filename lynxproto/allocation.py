"""Which precision each token gets within a budget: pure arithmetic on arrays, without codecs or models.

A *tier* is a precision; tiers are ordered from the cheapest to the most precise. A *unit* is what shares one set of
tiers, such as the keys of a layer. Costs are bytes of a token in a unit, with everything that travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import BudgetError

__all__ = ["DROPPED", "first_last", "optimise", "ranked"]

#: The tier of a token that is not sent at all.
DROPPED = -1

_PRICES = 100.0
_PRECISION = 2.0**-20
_ROUNDS = 4


def ranked(
    importance: NDArray[np.float64], costs: Sequence[float], budget: float, *, pinned: NDArray[np.bool_] | None = None
) -> NDArray[np.int8]:
    """SpectrumKV's greedy allocation: all tokens start in the cheapest tier, the most important are raised first.

    ``importance``: ``[tokens]``. ``costs``: of a token in each tier, rising. ``budget``: of all tokens together, in
    the same unit. ``pinned`` tokens get the last tier before anything else is decided. Tokens are raised to tier 1 in
    order of importance while the budget lasts, then to tier 2, and so on: with the costs 1/4, 1/2 and 1 of INT4, INT8
    and FP16 these are the paper's fractions, f8 = 4b - 1 up to b = 1/2 and f16 = 2b - 1 beyond. With two tiers 1/2
    and 1 (models that do not tolerate INT4) a budget below 1/2 cannot hold all tokens: the least important are
    dropped, and get :data:`DROPPED`. Ties go to the earlier token.

    Raises :class:`~lynxproto.errors.BudgetError` when the budget does not hold the pinned tokens.
    """
    tokens, top = len(importance), len(costs) - 1
    tiers = np.full(tokens, DROPPED, np.int8)
    if pinned is not None:
        tiers[pinned] = top
        budget -= float(pinned.sum()) * costs[top]
    free = np.flatnonzero(tiers == DROPPED)
    order = free[np.argsort(-importance[free], kind="stable")]
    if budget < -1e-9:
        raise BudgetError(f"the budget does not hold {tokens - len(free)} pinned tokens; it lacks {-budget:.6g}")
    before = 0.0
    for tier, cost in enumerate(costs):
        order = order[: int((budget + 1e-9) / (cost - before))]  # only what is in the tier below can be raised
        tiers[order] = tier
        budget -= len(order) * (cost - before)
        before = cost
    return tiers


def first_last(tokens: int, kept: int, first_share: float = 0.5) -> NDArray[np.bool_]:
    """Which tokens a cache of first and last tokens keeps, ``kept`` of them (PDTrim-style, arXiv 2509.04467 v3)."""
    first = min(kept, round(kept * first_share))
    keep = np.zeros(tokens, bool)
    keep[:first] = True
    keep[tokens - (kept - first) :] = True
    return keep


def optimise(
    weights: NDArray[np.float64],
    errors: NDArray[np.float64],
    costs: NDArray[np.float64],
    budget: float,
    *,
    overheads: NDArray[np.float64] | None = None,
) -> NDArray[np.int8]:
    """Tiers of least expected error within a budget: ``[units, tokens]``.

    ``weights``: how much a token's error counts, ``[units, tokens]``. ``errors`` and ``costs``: of a token of weight 1
    in each tier, ``[units, tiers]``. ``overheads``: what a tier costs a unit once if any token is in it. Minimises the
    sum of weights x errors with the sum of costs at most ``budget``, by one price of a byte for all (Lagrange): each
    token takes the tier that is best at that price, tiers that do not earn their overhead are given up, and the price
    is bisected. So a byte is worth the same wherever it is spent: in tokens, layers, keys or values. Ties go to the
    cheaper tier.

    Raises :class:`~lynxproto.errors.BudgetError` when even the cheapest tier for all tokens exceeds ``budget``.
    """
    if overheads is None:
        overheads = np.zeros_like(costs)
    tokens = weights.shape[1]
    cheapest = float((costs * tokens + overheads).min(1).sum())
    if cheapest > budget * (1 + 1e-9):
        raise BudgetError(f"{budget:.0f} bytes do not hold these tokens: the cheapest tiers take {cheapest:.0f}")
    units = [_Unit.of(*rows) for rows in zip(weights, errors, costs, overheads, strict=True)]
    used = [unit.hull(range(costs.shape[1])) for unit in units]
    price = _price(units, used, budget)
    best = (_error(units, used, price), used, price)
    for _ in range(_ROUNDS if overheads.any() else 0):
        # Tiers that are given up free bytes, so the price falls, and others may then earn their overhead.
        pruned = [unit.prune(price) for unit in units]
        if pruned == used:
            break
        used, price = pruned, _price(units, pruned, budget)
        best = min(best, (_error(units, used, price), used, price))
    _, used, price = best
    return np.stack([unit.tiers(tiers, price) for unit, tiers in zip(units, used, strict=True)])


def _error(units: Sequence[_Unit], used: Sequence[list[int]], price: float) -> float:
    return sum(unit.outcome(tiers, price)[0] for unit, tiers in zip(units, used, strict=True))


def _price(units: Sequence[_Unit], used: Sequence[list[int]], budget: float) -> float:
    """log2 of the lowest price of a byte, in error, at which ``used`` tiers keep within ``budget``."""
    low, high = -_PRICES, _PRICES  # at the low end error alone counts, at the high end bytes alone

    def size(price: float) -> float:
        return sum(unit.outcome(tiers, price)[1] for unit, tiers in zip(units, used, strict=True))

    if size(low) <= budget:
        return low
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) > budget else (low, middle)
    return high


@dataclass(frozen=True, slots=True)
class _Unit:
    """One unit: its weights sorted, with their sums, so that any price is answered without looking at each token."""

    order: NDArray[np.int64]
    weights: NDArray[np.float64]
    sums: NDArray[np.float64]
    errors: NDArray[np.float64]
    costs: NDArray[np.float64]
    overheads: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        weights: NDArray[np.float64],
        errors: NDArray[np.float64],
        costs: NDArray[np.float64],
        overheads: NDArray[np.float64],
    ) -> _Unit:
        order = np.argsort(weights, kind="stable")
        ascending = weights[order]
        return cls(order, ascending, np.concatenate([[0.0], np.cumsum(ascending)]), errors, costs, overheads)

    def prune(self, price: float) -> list[int]:
        """The tiers to use when a byte is worth ``2 ** price``: without those that do not earn their overhead.

        The cheapest stays, so that any budget that holds it can be kept.
        """

        def value(tiers: list[int]) -> float:
            error, size = self.outcome(tiers, price)
            return float(error + size * 2.0**price)

        tiers = self.hull(range(len(self.costs)))
        best = value(tiers)
        while len(tiers) > 1:
            fewer = [tiers[:i] + tiers[i + 1 :] for i in range(1, len(tiers))]  # a hull's subset is a hull
            values = [value(subset) for subset in fewer]
            index = int(np.argmin(values))
            if values[index] > best:
                break
            tiers, best = fewer[index], values[index]
        return tiers

    def tiers(self, tiers: Sequence[int], price: float) -> NDArray[np.int8]:
        """The tier of each token."""
        chosen = np.empty(len(self.order), np.int8)
        chosen[self.order] = np.repeat(np.array(tiers, np.int8), np.diff(self._bounds(tiers, price)))
        return chosen

    def hull(self, tiers: Sequence[int]) -> list[int]:
        """Those of ``tiers`` that are the best at some price: the lower convex hull of cost and error."""
        kept: list[int] = []
        for tier in sorted(tiers, key=lambda t: (self.costs[t], self.errors[t])):
            if kept and self.errors[tier] >= self.errors[kept[-1]]:
                continue  # dearer and no better
            while len(kept) > 1 and self._step(kept[-1], tier) <= self._step(kept[-2], kept[-1]):
                kept.pop()
            kept.append(tier)
        return kept

    def _step(self, lower: int, upper: int) -> float:
        """The weight over price from which ``upper`` is better."""
        return float((self.costs[upper] - self.costs[lower]) / (self.errors[lower] - self.errors[upper]))

    def _bounds(self, tiers: Sequence[int], price: float) -> NDArray[np.int64]:
        """Where each of a hull's tiers begins among the sorted weights, and their end."""
        steps = [self._step(a, b) * 2.0**price for a, b in pairwise(tiers)]
        return np.array([0, *np.searchsorted(self.weights, steps, side="right"), len(self.weights)])

    def outcome(self, tiers: Sequence[int], price: float) -> tuple[float, float]:
        """Error and bytes when a byte is worth ``2 ** price``."""
        bounds = self._bounds(tiers, price)
        counts = np.diff(bounds)
        size = float((self.costs[tiers] * counts + self.overheads[tiers] * (counts > 0)).sum())
        return float((self.errors[tiers] * np.diff(self.sums[bounds])).sum()), size
