"""Precision by token: budgets that hold, transfers that end bit-exact whatever the tier, policy files."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lynxproto import blocking, connect, listen
from lynxproto.cachefile import Cache
from lynxproto.calibration import Calibration
from lynxproto.chunk import Tile, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.errors import BudgetError, ConfigError, PolicyError, SpecError
from lynxproto.frames import HEADER_SIZE, TileKey
from lynxproto.manifest import Identity, Manifest
from lynxproto.policy import LEAST_TOKENS, Policy
from lynxproto.policyfile import PolicyFile
from lynxproto.tiers import PARTS, Tiers

IDENTITY = Identity(model="test/model", revision="r1")
LAYERS, TOKENS, HEADS, DIM = 2, 1024, 2, 64
BUDGETS = (0.16, 0.2, 0.3, 0.45, 0.6, 0.9)


@pytest.fixture(scope="module")
def cache() -> Cache:
    """Channels and layers of very different sizes, as real caches have them."""
    rng = np.random.default_rng(1)
    arrays: Any = {}
    for layer, part in itertools.product(range(LAYERS), PARTS):
        sizes = rng.lognormal(0, 1, (HEADS, 1, DIM)) * (1 + layer)
        values = (rng.standard_normal((HEADS, TOKENS, DIM)) * sizes + sizes).astype(np.float32)
        arrays[layer, part] = (values.view(np.uint32) >> 16).astype(np.uint16)
    manifest = Manifest.for_cache(
        identity=IDENTITY, dtype="bfloat16", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, tokens=TOKENS
    )
    return Cache(manifest=manifest, arrays=arrays, first_token=7)


@pytest.fixture(scope="module")
def importances() -> np.ndarray:
    """Few tokens have most of the attention."""
    return np.random.default_rng(2).lognormal(0, 2, (LAYERS, HEADS, TOKENS))


@pytest.fixture(scope="module")
def tiers(cache: Cache, importances: np.ndarray) -> Tiers:
    rng = np.random.default_rng(3)
    calibration = Calibration(
        model="test/model",
        method="none",
        keys=tuple(rng.normal(-160, 40, (HEADS, DIM)).round().astype(np.int16) for _ in range(LAYERS)),
        values=tuple(rng.normal(-60, 10, HEADS).round().astype(np.int16) for _ in range(LAYERS)),
    )
    return Tiers.calibrated(calibration, cache).observed([importances])


def policy_of(tiers: Tiers, **fields: Any) -> Policy:
    return Policy(tiers=tiers, model="test/model", revision="r1", **({"recent": 16} | fields))


def words_of(cache: Cache, layer: int) -> Any:
    return {part: cache.arrays[layer, part] for part in PARTS}


def travelled(policy: Policy, cache: Cache, index: int, importance: np.ndarray) -> tuple[float, float]:
    """What level 0 of a layer was expected to take, and the bytes of its payloads, frames and PLAN entries."""
    layer = cache.manifest.layer(index)
    plan = policy.plan("bfloat16", layer, policy.score("bfloat16", layer, words_of(cache, index), importance))
    codecs = [get_codec(config) for config in policy.codecs]
    manifest = [len(replace(cache.manifest, codecs=configs).to_bytes()) for configs in (policy.codecs, ())]
    total = (manifest[0] - manifest[1]) / LAYERS
    for tile in plan.tiles:
        where = list(tile.tokens)
        (payload,) = codecs[tile.codec].encode(
            tile.spec("bfloat16", DIM), cache.arrays[index, tile.part][:, where], levels=[0]
        )
        bitmap = len(TileKey.of(tile).bitmap)
        total += memoryview(payload).nbytes + HEADER_SIZE + bitmap + 4 * (bitmap > 0) + 20 + bitmap
    return plan.expected_bytes, total


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rule", ["optimise", "ranked"])
def test_promised_bytes_travel(cache: Cache, tiers: Tiers, importances: np.ndarray, budget: float, rule: Any) -> None:
    if rule == "ranked":
        tiers = Tiers.uniform((2, 4, 8, 16), cache)
    policy = policy_of(tiers, budget=budget, rule=rule)
    expected, actual = np.sum([travelled(policy, cache, i, importances[i]) for i in range(LAYERS)], axis=0)
    assert expected <= budget * cache.manifest.nbytes * 1.01
    assert actual == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("rule", ["optimise", "ranked"])
def test_tiles_cover_every_token_once_and_the_important_are_more_precise(
    cache: Cache, tiers: Tiers, importances: np.ndarray, rule: Any
) -> None:
    policy = policy_of(tiers, budget=0.25, rule=rule)
    layer = cache.manifest.layer(1)
    plan = policy.plan("bfloat16", layer, policy.score("bfloat16", layer, words_of(cache, 1), importances[1]))
    exact = len(policy.codecs) - 1
    for part in PARTS:
        covered = np.zeros(TOKENS, int)
        means = {}
        for tile in plan.tiles:
            if tile.part == part:
                where = np.array(list(tile.tokens))
                covered[where] += 1
                if where[0] >= policy.sinks and where[-1] < TOKENS - policy.recent:
                    means[tile.codec] = importances[1].mean(0)[where].mean()
                    assert len(where) >= LEAST_TOKENS or tile.codec == exact
                elif where[-1] < policy.sinks:
                    assert tile.codec == exact
        assert (covered == 1).all()
        ordered = [means[codec] for codec in sorted(means)]
        assert len(ordered) >= 2
        assert ordered == sorted(ordered)


@pytest.mark.parametrize("source", ["attention", "key-norms", "position"])
@pytest.mark.parametrize("url", ["memory://tiers", "tcp://127.0.0.1:0"])
def test_every_token_becomes_exact_whatever_its_tier(
    cache: Cache, tiers: Tiers, importances: np.ndarray, source: Any, url: str
) -> None:
    policy = policy_of(tiers, budget=0.25, importance=source)

    async def main() -> None:
        async with listen(url, insecure=True) as receiver, connect(receiver.url, insecure=True) as sender:
            outgoing = sender.open(cache.manifest, policy)
            for layer in range(LAYERS):
                given = importances[layer] if source == "attention" else None
                await outgoing.write(layer, *words_of(cache, layer).values(), importance=given)
            outgoing.result(first_token=7)
            incoming = await anext(receiver)
            await asyncio.gather(outgoing.finish(), incoming.exact())
            assert not incoming.manifest.lossy
            level0 = outgoing.stats.levels[0].bytes
            assert level0 <= 0.26 * cache.manifest.nbytes
            for place, words in cache.arrays.items():
                np.testing.assert_array_equal(np.asarray(incoming.arrays[place]), words)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_without_residual_the_manifest_says_lossy(cache: Cache, tiers: Tiers, importances: np.ndarray) -> None:
    policy = policy_of(tiers, budget=0.3).anchors_only()
    assert policy.lossy
    with blocking.listen("memory://lossy-tiers") as receiver, blocking.connect(receiver.url) as sender:
        outgoing = sender.open(cache.manifest, policy)
        for layer in range(LAYERS):
            outgoing.write(layer, *words_of(cache, layer).values(), importance=importances[layer])
        incoming = next(iter(receiver))
        assert incoming.manifest.lossy
        incoming.ready(level=2, timeout=60)
        outgoing.finish(timeout=60)
        assert outgoing.stats.bytes <= 0.31 * cache.manifest.nbytes
        for (layer, part), words in cache.arrays.items():
            got = np.asarray(incoming.arrays[layer, part])
            assert (got[:, : policy.sinks] == words[:, : policy.sinks]).all()
            assert (got != words).any()


def test_attention_must_be_given_and_fit(cache: Cache, tiers: Tiers, importances: np.ndarray) -> None:
    with blocking.listen("memory://no-attention") as receiver, blocking.connect(receiver.url) as sender:
        outgoing = sender.open(cache.manifest, policy_of(tiers))
        with pytest.raises(SpecError, match="importance"):
            outgoing.write(0, *words_of(cache, 0).values())
        with pytest.raises(SpecError, match="1024 tokens"):
            outgoing.write(0, *words_of(cache, 0).values(), importance=importances[0, :, :-1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0.12}, "outside"),
        ({"budget": 1.1}, "outside"),
        ({"rule": "guess"}, "rule"),
        ({"importance": "mood"}, "importance"),
        ({"decay": -1}, "decay"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiers: Tiers, fields: Any, message: str) -> None:
    with pytest.raises(ConfigError if "budget" not in fields else BudgetError, match=message):
        policy_of(tiers, **fields)


def test_budgets_that_nothing_fits_are_named(cache: Cache, importances: np.ndarray) -> None:
    two = Tiers.uniform((8, 16), cache)
    layer = cache.manifest.layer(0)
    for rule in ("optimise", "ranked"):
        with pytest.raises(BudgetError, match="bytes do not hold"):
            policy_of(two, budget=0.4, rule=rule).plan("bfloat16", layer, importances[0])
    with pytest.raises(BudgetError, match="sinks"):
        policy_of(two, budget=0.2, sinks=512).plan("bfloat16", layer, importances[0])


@pytest.mark.parametrize("more", [1.01, 1.5])
def test_a_layer_that_counts_little_still_gets_its_cheapest_tiles(
    cache: Cache, importances: np.ndarray, more: float
) -> None:
    uniform = Tiers.uniform((4, 8, 16), cache)
    tiers = replace(uniform, errors=uniform.errors * np.array([[[1000.0]], [[1.0]]]))
    cheapest = float((tiers.costs[:, :, 0] * TOKENS + tiers.overheads[:, :, 0]).sum()) / cache.manifest.nbytes
    policy = policy_of(tiers, budget=more * cheapest, sinks=0, recent=0)
    plans = [policy.plan("bfloat16", cache.manifest.layer(i), importances[i]) for i in range(LAYERS)]
    assert sum(plan.expected_bytes for plan in plans) <= 1.01 * policy.budget * cache.manifest.nbytes
    assert all(sum(len(tile.tokens) for tile in plan.tiles) == 2 * TOKENS for plan in plans)


def test_a_policy_of_another_model_is_refused(cache: Cache, tiers: Tiers) -> None:
    policy = policy_of(tiers)
    policy.require(IDENTITY)
    policy.require(replace(IDENTITY, revision=""))  # not stated
    for other in (Identity(model="another"), replace(IDENTITY, revision="r2")):
        with pytest.raises(PolicyError, match="lynxproto probe"):
            policy.require(other)
    manifest = replace(cache.manifest, identity=Identity(model="another"))
    with (
        blocking.listen("memory://wrong-model") as receiver,
        blocking.connect(receiver.url) as sender,
        pytest.raises(PolicyError),
    ):
        sender.open(manifest, policy)


def test_policy_files_hold_all_that_decides(tmp_path: Any, tiers: Tiers, cache: Cache, importances: Any) -> None:
    policy = policy_of(tiers, budget=0.22)
    path = tmp_path / "policy.json"
    PolicyFile(policy=policy, evidence={"needles": 3}).save(path)
    loaded = Policy.from_file(path)
    layer = cache.manifest.layer(1)
    assert loaded.plan("bfloat16", layer, importances[1]).tiles == policy.plan("bfloat16", layer, importances[1]).tiles
    assert loaded.codecs == policy.codecs
    assert PolicyFile.load(path).evidence == {"needles": 3}
    assert Policy.from_file(path, budget=0.4, importance="position").budget == 0.4
    assert PolicyFile.load(path).to_bytes() == path.read_bytes()


def test_broken_policy_files_are_named(tmp_path: Any, tiers: Tiers) -> None:
    good = PolicyFile(policy=policy_of(tiers)).to_bytes()
    for data, message in (
        (b"{", "not JSON"),
        (b"{}", "lynxproto probe"),
        (good.replace(b'"budget":0.25', b'"budget":0.26'), "hash"),
        (json.dumps({"format": "lynxproto.policy/1"}).encode(), "hash"),
    ):
        with pytest.raises(PolicyError, match=message):
            PolicyFile.from_bytes(data)
    with pytest.raises(PolicyError, match="cannot read"):
        Policy.from_file(tmp_path / "missing.json")
    with pytest.raises(PolicyError):
        PolicyFile(policy=Policy())


def test_sparse_sets_are_grouped_by_rank(cache: Cache) -> None:
    """A tile of scattered tokens decodes to the same words as a tile of the same tokens side by side."""
    where = np.sort(np.random.default_rng(0).permutation(TOKENS)[:130])
    words = cache.arrays[0, "key"][:, where]
    codec = get_codec("hq", anchor_bits=3)
    scattered, dense = (
        codec.encode(Tile(0, "key", 0, HEADS, tokens, 0).spec("bfloat16", DIM), words)
        for tokens in (TokenSet.of(where.tolist()), TokenSet.range(0, len(where)))
    )
    assert [bytes(level) for level in scattered] == [bytes(level) for level in dense]
