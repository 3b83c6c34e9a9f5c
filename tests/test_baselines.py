"""Baselines do what their sources describe, and count what they would send."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("constriction")

from lynxproto.bench.baselines import CacheGen, Grouped, QuantSpec, floats, words_of
from lynxproto.bench.methods import Dropped, Ranked
from lynxproto.cachefile import Cache
from lynxproto.errors import BudgetError
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.quality import Window
from lynxproto.tiers import PARTS, Tiers

HEADS, TOKENS, DIM = 2, 640, 64
LAYER = LayerSpec(index=0, kv_heads=HEADS, key_dim=DIM, value_dim=DIM, token_stop=TOKENS)


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 1, (HEADS, 1, DIM))
    return words_of((rng.standard_normal((HEADS, TOKENS, DIM)) * sizes).astype(np.float32))


def error(words: np.ndarray, out: np.ndarray) -> float:
    exact = floats(words).astype(np.float64)
    return float(np.square(floats(out) - exact).sum() / np.square(exact).sum())


def test_words_and_values_are_inverse() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every & 0x7F80) != 0x7F80]
    assert (words_of(floats(finite)) == finite).all()
    assert words_of(np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)).tolist() == [0x3F80, 0x3F82]  # ties to even


@pytest.mark.parametrize("part", PARTS)
def test_groups_are_within_half_a_step_and_bits_are_counted(words: np.ndarray, part: str) -> None:
    errors = []
    for bits in (3, 4, 8):
        out, nbytes = Grouped(bits)(LAYER, part, words)
        assert (out[:, :4] == words[:, :4]).all()
        body = (TOKENS - 4) * HEADS * DIM
        groups = HEADS * DIM * -(-(TOKENS - 4) // 64) if part == "key" else body // 64
        assert nbytes == 4 * HEADS * DIM * 2 + body * bits / 8 + groups * 4
        errors.append(error(words, out))
    assert errors[0] > 3 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize("part", PARTS)
def test_quantspec_nests_four_bits_in_eight(words: np.ndarray, part: str) -> None:
    draft, small = QuantSpec(1)(LAYER, part, words)
    target, large = QuantSpec(2)(LAYER, part, words)
    assert (draft[:, -128:] == words[:, -128:]).all()
    body = (TOKENS - 128) * HEADS * DIM
    assert large - small == body / 2
    assert error(words, draft) > 50 * error(words, target) > 0


def test_cachegen_codes_what_it_quantises(words: np.ndarray) -> None:
    sizes = {}
    for bins in (16, 32, 64):
        out, nbytes = CacheGen((bins,) * 3, (bins, bins), layers=1)(LAYER, "key", words)
        bits = 8 * nbytes / words.size
        assert bits < np.log2(bins) + 0.3  # coded, with a scale of 16 bits a token and head
        sizes[bits] = error(words, out)
    assert list(sizes) == sorted(sizes)
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    near = np.repeat(words[:, ::10], 10, axis=1)  # like tokens: deltas are zero
    with_deltas = CacheGen(delta=True, layers=1)(LAYER, "key", near)
    without = CacheGen(layers=1)(LAYER, "key", near)
    assert error(near, with_deltas[0]) < error(near, without[0])


def test_allocations_keep_their_budget_and_order(words: np.ndarray) -> None:
    manifest = Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=HEADS, head_dim=DIM, tokens=TOKENS
    )
    cache = Cache(manifest=manifest, arrays=dict.fromkeys(((0, p) for p in PARTS), words))
    attention = np.linspace(2, 1, TOKENS, dtype=np.float32)[None, None].repeat(HEADS, 1)
    window = Window(cache, np.arange(9), attention)
    tiers = Tiers.uniform((4, 8, 16), cache)
    for order in ("attention", "random", "ends"):
        method = Ranked(tiers, 0.4, order).on(window)
        total = 0.0
        errors = {}
        for part in PARTS:
            out, nbytes = method(LAYER, part, words)
            total += nbytes
            errors[part] = np.square(floats(out) - floats(words)).mean((0, 2))
        assert 0.37 < total / manifest.nbytes <= 0.41
        early, late = errors["key"][10:100].mean(), errors["key"][-110:-10].mean()
        if order == "attention":
            assert early < late / 10
    with pytest.raises(BudgetError):
        Ranked(tiers, 0.2).on(window)
    kept = Dropped(0.25, 0.3).on(window)
    assert kept.kept.sum() == TOKENS // 4
    assert kept.kept[: round(0.3 * TOKENS / 4)].all()
    assert Dropped(0.25, sinks=4).on(window).kept[:5].tolist() == [True] * 4 + [False]
