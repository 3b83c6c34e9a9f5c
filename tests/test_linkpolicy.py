"""Choosing a policy by the link: predictions, choices, experience, meters; and sessions that do it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto import Config, Identity, LayerSpec, Manifest, Policy, TokenBucket, connect, listen
from lynxproto.codecspeed import made_up_words, measure_codec
from lynxproto.connection import Connection
from lynxproto.errors import LocalError
from lynxproto.linkpolicy import (
    AutoPolicy,
    Chooser,
    CodecFigures,
    LevelFigures,
    LinkMeter,
    break_even,
    default_candidates,
    predict,
)

RAW = CodecFigures((LevelFigures(1.0, 0.0, 1 / 10e9),))
EXACT = CodecFigures((LevelFigures(0.5, 1 / 3e9, 1 / 6e9), LevelFigures(0.15, 1 / 2e9, 1 / 2.5e9)))
LYNX = CodecFigures((LevelFigures(0.2, 1 / 2e9, 1 / 4e9), LevelFigures(0.46, 1 / 1.2e9, 1 / 2.4e9)))
NAMES = ("raw", "exact", "lynx-fast-2")
FIGURES = dict(zip(NAMES, (RAW, EXACT, LYNX), strict=True))

levels = st.builds(LevelFigures, st.floats(0.01, 1), st.floats(0, 1e-8), st.floats(0, 1e-8))
figures = st.builds(CodecFigures, st.lists(levels, min_size=1, max_size=4).map(tuple))
rates = st.floats(1e5, 1e12)
sizes = st.integers(1, 1 << 34)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(bounded())


def chooser(**auto: Any) -> Chooser:
    return Chooser(AutoPolicy({name: Policy() for name in NAMES}, **auto), FIGURES)


@given(figures, sizes, rates, st.floats(1.0, 100.0))
def test_predictions_are_sound(codec: CodecFigures, nbytes: int, rate: float, factor: float) -> None:
    """No stage is beaten, levels come in order, and a faster link or codec makes nothing later."""
    estimate = predict(codec, nbytes, rate)
    assert list(estimate.levels) == sorted(estimate.levels)
    slack = 1 - 1e-9
    assert estimate.exact >= slack * nbytes * codec.size / rate
    assert estimate.exact >= slack * nbytes * sum(level.encode for level in codec.levels)
    assert estimate.exact >= slack * nbytes * sum(level.decode for level in codec.levels)
    assert estimate.usable >= slack * nbytes * codec.levels[0].size / rate
    for faster in (predict(codec, nbytes, rate * factor), predict(codec.on_threads(2), nbytes, rate)):
        assert all(a <= b / slack for a, b in zip(faster.levels, estimate.levels, strict=True))


@given(sizes, rates, st.floats(0, 10))
def test_the_choice_costs_least(nbytes: int, rate: float, weight: float) -> None:
    auto = chooser(exact_weight=weight)
    auto.saw_link(rate, "by the test")
    choice = auto.choose(nbytes, NAMES)
    costs = {name: auto.auto.cost(predict(FIGURES[name], nbytes, rate)) for name in NAMES}
    assert costs[choice.name] == min(costs.values())
    assert choice.estimates.keys() == costs.keys()
    assert "by the test" in choice.reason


@settings(deadline=None)
@given(st.integers(1 << 24, 1 << 34))
def test_progressive_switches_itself_off_where_the_link_is_faster_than_the_codec(nbytes: int) -> None:
    auto = chooser()
    for rate, name in ((1e7, "lynx-fast-2"), (100e9, "raw")):
        auto.saw_link(rate, "")
        assert auto.choose(nbytes, NAMES).name == name
    point = break_even(LYNX, RAW, nbytes, auto.auto)
    assert point is not None
    for rate, better in ((point / 1.05, LYNX), (point * 1.05, RAW)):
        cost = {codec: auto.auto.cost(predict(codec, nbytes, rate)) for codec in (LYNX, RAW)}
        assert min(cost, key=cost.__getitem__) is better
    assert break_even(RAW, RAW, nbytes, auto.auto) is None


def test_without_a_measurement_the_most_progressive_is_taken() -> None:
    choice = chooser().choose(1 << 30, NAMES)
    assert choice.name == NAMES[-1]
    assert "not been measured" in choice.reason


def test_experience_overrules_the_figures_and_fades() -> None:
    """A receiver that decodes slowly is not in the figures; how long transfers take is."""
    auto, nbytes = chooser(), 1 << 28
    auto.saw_link(1e8, "")
    expected = auto.estimates(nbytes)["lynx-fast-2"].exact
    auto.took("lynx-fast-2", nbytes, 15 * expected)
    assert auto.choose(nbytes, NAMES).name == "exact"
    for _ in range(40):
        auto.took("exact", nbytes, auto.estimates(nbytes)["exact"].exact)
    assert auto.choose(nbytes, NAMES).name == "lynx-fast-2"
    auto.took("lynx-fast-2", 1000, 1e6)  # too small to tell anything
    assert auto.choose(nbytes, NAMES).name == "lynx-fast-2"


@given(st.floats(1e6, 1e10), st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(0, 0.5)), min_size=3, max_size=30))
def test_the_meter_counts_only_while_the_link_holds_the_sender_back(
    rate: float, steps: list[tuple[int, float]]
) -> None:
    meter, now, total = LinkMeter(), 100.0, 0
    for nbytes, idle in steps:
        now += idle  # the codec, the engine or the receiver is slow
        meter.begin(now)
        meter.begin(now)  # two stripes share the link: the time counts once
        now += nbytes / rate
        meter.end(now)
        meter.end(now)
        now += 0.01
        meter.confirmed(nbytes, now)
        total += nbytes
    if total >= 8 << 20:
        assert meter.bytes_per_second == pytest.approx(rate, rel=1e-3)
    if total < 4 << 20:
        assert meter.bytes_per_second is None


def test_every_candidate_is_measured_and_exact() -> None:
    candidates = default_candidates()
    assert next(iter(candidates)) == "raw"
    for policy in candidates.values():
        assert not policy.lossy
        measured = measure_codec(policy.body)
        assert 0.3 < measured.size <= 1.0
        assert all(level.encode >= 0 and level.size > 0 for level in measured.levels)


TOKENS, HEADS, DIM = 512, 4, 64
LAYERS = tuple(LayerSpec(index=i, kv_heads=HEADS, key_dim=DIM, value_dim=DIM, token_stop=TOKENS) for i in range(8))


def manifest(dtype: str = "bfloat16") -> Manifest:
    return Manifest(
        identity=Identity(model="test/model", revision="1"), dtype=dtype, layers=LAYERS, prompt_tokens=TOKENS
    )


async def transfer(policy: Any, link: TokenBucket | None, dtype: str = "bfloat16") -> Any:
    words = [made_up_words(part, HEADS, TOKENS, DIM) for part in ("key", "value")]  # type: ignore[arg-type]  # literals
    if dtype == "float8_e4m3":
        words = [array.astype(np.uint8) for array in words]
    async with (
        listen("memory://linkpolicy") as receiver,
        connect("memory://linkpolicy", policy=policy, link=link) as sender,
    ):
        outgoing = sender.open(manifest(dtype))
        for layer in LAYERS:
            await outgoing.write(layer.index, *words)
        incoming = await anext(receiver)
        await asyncio.gather(outgoing.finish(), incoming.exact())
        for layer in LAYERS:
            assert np.array_equal(incoming.arrays[layer.index, "key"], words[0])
    return outgoing


def test_a_session_chooses_by_its_link() -> None:
    outgoing = run(transfer(Policy.auto(), TokenBucket(40e6, 16384)))
    assert outgoing.stats.policy.startswith("lynx")
    assert "bit/s (measured at the start)" in outgoing.stats.reason
    assert outgoing.manifest.codecs == Policy.auto().candidates[outgoing.stats.policy].codecs


def test_a_forced_choice() -> None:
    for name in ("raw", "exact", "lynx"):
        policy = Policy.named(name)  # type: ignore[arg-type]  # literals
        outgoing = run(transfer(policy, None))
        assert outgoing.manifest.codecs == policy.codecs
        assert outgoing.stats.policy == ""


def test_an_automatic_policy_takes_only_what_can_code_the_cache() -> None:
    outgoing = run(transfer(Policy.auto(), TokenBucket(40e6, 16384), "float8_e4m3"))
    assert outgoing.stats.policy == "raw"


def test_a_link_is_measured_only_where_there_is_one() -> None:
    with pytest.raises(LocalError, match="handshake"):
        Connection(Config(), client=True).measure_link(1000, 0.0)


def test_an_automatic_policy_is_the_sessions() -> None:
    async def main() -> None:
        async with listen("memory://linkpolicy-2"), connect("memory://linkpolicy-2") as sender:
            with pytest.raises(LocalError, match=r"connect\(..., policy=Policy.auto\(\)\)"):
                sender.open(manifest(), Policy.auto())

    run(main())
