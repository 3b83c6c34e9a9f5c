"""Allocation within budgets: the paper's fractions, and an optimum that no other plan beats."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto.allocation import DROPPED, first_last, optimise, ranked
from lynxproto.errors import BudgetError, SpecError
from lynxproto.importance import by_position, checked, decayed, from_key_norms, key_norms, shares

PAPER = (0.25, 0.5, 1.0)


@given(st.integers(25, 100), st.integers(1, 4))
def test_three_tiers_have_the_papers_fractions(percent, scale):
    b, tokens = percent / 100, 400 * scale
    importance = np.random.default_rng(percent).random(tokens)
    tiers = ranked(importance, PAPER, b * tokens)
    f4, f8, f16 = (np.mean(tiers == t) for t in range(3))
    expected = (2 - 4 * b, 4 * b - 1, 0) if b <= 0.5 else (0, 2 - 2 * b, 2 * b - 1)
    assert (f4, f8, f16) == pytest.approx(expected, abs=2 / tokens)
    ranks = np.argsort(-importance)
    assert (np.diff(tiers[ranks]) <= 0).all()  # the more important, the more precise


@given(st.integers(10, 100))
def test_without_int4_the_least_important_are_dropped_below_one_half(percent):
    b, tokens = percent / 100, 500
    tiers = ranked(np.arange(tokens)[::-1].astype(float), PAPER[1:], b * tokens)
    if b < 0.5:
        assert np.mean(tiers == 0) == pytest.approx(2 * b, abs=2 / tokens)
        assert (tiers[round(2 * b * tokens) :] == DROPPED).all()
    else:
        assert np.mean(tiers == 1) == pytest.approx(2 * b - 1, abs=2 / tokens)
        assert not (tiers == DROPPED).any()


def test_pinned_tokens_are_paid_first():
    pinned = np.zeros(100, bool)
    pinned[:4] = True
    tiers = ranked(np.arange(100.0), PAPER, 30, pinned=pinned)
    assert (tiers[:4] == 2).all()
    cost = np.array(PAPER)[tiers].sum()
    assert 30 - 0.25 < cost <= 30
    with pytest.raises(BudgetError, match="pinned"):
        ranked(np.arange(100.0), PAPER, 3, pinned=pinned)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_of_equal_size_is_better(data):
    units, tokens, tiers = 2, 3, 3
    floats = st.floats(0.01, 100)
    draw = lambda *shape: np.array(  # noqa: E731 - short
        data.draw(st.lists(floats, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    ).reshape(shape)
    weights = draw(units, tokens)
    errors = np.sort(draw(units, tiers), axis=1)[:, ::-1]
    costs = np.cumsum(draw(units, tiers), axis=1)
    least = costs[:, 0].sum() * tokens
    budget = least + data.draw(st.floats(0, 1)) * (costs[:, -1].sum() * tokens - least)
    chosen = optimise(weights, errors, costs, budget)

    def outcome(plan):
        rows = np.arange(units)[:, None]
        return costs[rows, plan].sum(), (weights * errors[rows, plan]).sum()

    size, error = outcome(chosen)
    assert size <= budget * (1 + 1e-9)
    for plan in itertools.product(range(tiers), repeat=units * tokens):
        other_size, other = outcome(np.array(plan).reshape(units, tokens))
        if other_size <= size * (1 - 1e-9):
            assert other >= error * (1 - 1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 1))
def test_budgets_are_kept_with_overheads(seed, share):
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 2, (4, 300))
    errors = np.array([1, 0.25, 0.06, 0.015, 0]) * rng.lognormal(0, 1, (4, 1))
    costs = np.broadcast_to(np.array([30.0, 54, 78, 102, 384]), (4, 5))
    overheads = np.full((4, 5), float(rng.integers(0, 3000)))
    least = costs[:, 0].sum() * 300 + overheads[:, 0].sum()
    budget = least + share * (costs[:, -1].sum() * 300 + overheads.sum() - least)
    chosen = optimise(weights, errors, costs, budget, overheads=overheads)
    size = sum(costs[u][chosen[u]].sum() + overheads[u][np.unique(chosen[u])].sum() for u in range(4))
    assert size <= budget * (1 + 1e-9)


def test_tiers_that_do_not_earn_their_overhead_are_given_up():
    weights = np.random.default_rng(0).lognormal(0, 1, (1, 300))
    errors, costs = np.array([[1.0, 0.25, 0.06, 0.015]]), np.array([[30.0, 54, 78, 102]])
    used = [
        len(np.unique(optimise(weights, errors, costs, 300 * 60 + 2 * o, overheads=np.full((1, 4), o))))
        for o in (0.0, 1500.0)
    ]
    assert used[0] == 4
    assert used[1] <= 2


def test_impossible_budgets_are_named():
    weights, errors, costs = np.ones((1, 10)), np.array([[1.0, 0]]), np.array([[2.0, 4]])
    assert (optimise(weights, errors, costs, 20) == 0).all()
    assert (optimise(weights, errors, costs, 1e9) == 1).all()
    with pytest.raises(BudgetError, match="cheapest tiers take 20"):
        optimise(weights, errors, costs, 19)


def test_first_and_last():
    keep = first_last(10, 5, 0.4)
    assert np.flatnonzero(keep).tolist() == [0, 1, 7, 8, 9]
    assert first_last(10, 10).all()
    assert not first_last(10, 0).any()


def test_importance_falls_with_age_and_rises_with_small_keys():
    assert np.allclose(decayed(np.ones(4), np.log(2)), [1 / 16, 1 / 8, 1 / 4, 1 / 2])
    position = by_position(100)
    assert (position[:4] == 1).all()
    assert position[99] > position[70] > position[79 - 1]
    words = (np.linspace(1, 3, 20, dtype=np.float32)[None, :, None] * np.ones((2, 20, 8), np.float32)).view(np.uint32)
    norms = key_norms((words >> 16).astype(np.uint16), "bfloat16")
    assert norms.shape == (2, 20)
    assert norms[0, 0] == pytest.approx(np.sqrt(8), rel=0.01)
    assert (np.diff(from_key_norms(norms)) < 0).all()


def test_shares_have_mean_one_and_a_floor():
    mixed = shares(np.array([[0.0, 4], [0, 0]]), 0.25)
    assert mixed.tolist() == [[0.25, 1.75], [1, 1]]
    for bad in ([1, -1], [1, np.nan], [1, 2, 3]):
        with pytest.raises(SpecError):
            checked(bad, 2)
