"""Policies cut every layer into tiles that cover each token and part exactly once."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto import LayerSpec, Policy, get_codec
from lynxproto.chunk import DTYPES
from lynxproto.errors import ConfigError
from lynxproto.policy import GROUP_TOKENS

layers = st.builds(
    lambda start, tokens, heads, key_dim, value_dim, parts: LayerSpec(
        index=3,
        kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        token_start=start,
        token_stop=start + tokens,
        parts=parts,
    ),
    st.one_of(st.just(0), st.integers(0, 5000)),
    st.integers(1, 6000),
    st.integers(1, 8),
    st.sampled_from([64, 80, 128]),
    st.sampled_from([64, 96, 256]),
    st.sampled_from([("key", "value"), ("key",), ("value",)]),
)
policies = st.builds(Policy, sinks=st.integers(0, 8), recent=st.integers(0, 200), tile_bytes=st.integers(4096, 1 << 21))


@given(policies, layers, st.sampled_from(["bfloat16", "float16"]))
@settings(deadline=None)  # a busy machine is not a failure
def test_tiles_cover_every_token_of_every_part_once(policy, layer, dtype):
    tiles = policy.tiles(dtype, layer)
    codecs = [get_codec(config) for config in policy.codecs]
    for part in layer.parts:
        covered = np.zeros(layer.token_stop, int)
        for tile in tiles:
            if tile.part == part:
                covered[tile.tokens.start : tile.tokens.stop] += 1
        assert (covered[layer.token_start :] == 1).all()
        assert not covered[: layer.token_start].any()
    for tile in tiles:
        assert (tile.layer, tile.head_start, tile.heads) == (3, layer.head_start, layer.kv_heads)
        assert codecs[tile.codec].supports(tile.spec(dtype, layer.head_dim(tile.part)))


@given(policies, layers)
def test_sinks_are_exact_at_once_and_recent_tokens_fine(policy, layer):
    first_level_exact = {i for i, config in enumerate(policy.codecs) if get_codec(config).levels == 1}
    for tile in policy.tiles("bfloat16", layer):
        if tile.tokens.start < policy.sinks:
            assert tile.codec in first_level_exact
            assert tile.tokens.stop <= policy.sinks
        elif tile.tokens.stop > layer.token_stop - policy.recent:
            assert policy.codecs[tile.codec] == get_codec(policy.fine).get_config()
            assert len(tile.tokens) <= policy.recent
        else:
            assert policy.codecs[tile.codec] == get_codec(policy.body).get_config()


@given(policies, layers)
def test_tiles_are_bounded_and_cut_between_groups(policy, layer):
    body = [t for t in policy.tiles("bfloat16", layer) if t.codec == 0]
    for tile, following in pairwise(body):
        if tile.part == following.part:
            assert len(tile.tokens) % GROUP_TOKENS == 0
    for tile in body:
        token_bytes = layer.kv_heads * layer.head_dim(tile.part) * DTYPES["bfloat16"].itemsize
        assert len(tile.tokens) * token_bytes <= max(policy.tile_bytes, GROUP_TOKENS * token_bytes)


def test_baselines():
    assert Policy.named("lynx") == Policy(grow=True)
    assert not Policy.named("lynx").lossy
    assert not Policy.named("bf16").lossy
    for name in ("int8", "int4"):
        policy = Policy.named(name)
        assert policy.lossy
        assert [get_codec(config).levels for config in policy.codecs] == [1]


@pytest.mark.parametrize("arguments", [{"sinks": -1}, {"recent": -1}, {"tile_bytes": 100}])
def test_refused(arguments):
    with pytest.raises(ConfigError):
        Policy(**arguments)
    with pytest.raises(ConfigError):
        Policy.named("int5")


def test_tiles_are_larger_on_faster_links() -> None:
    bf16, plenty = Policy.named("bf16"), 1 << 30
    sizes = [bf16.for_link(rate, plenty).tile_bytes >> 20 for rate in (0.0, 1e8, 1.3e9, 1.5e9, 3e9, 1e11)]
    assert sizes == [2, 2, 2, 4, 8, 8]
    assert bf16.for_link(1e11, 5 << 20).tile_bytes == 4 << 20, "several must fit into the peer's window"
    for coded in (Policy.named("lynx"), Policy.named("exact"), Policy.lynx("fast")):
        sizes = [coded.for_link(rate, plenty).tile_bytes >> 20 for rate in (0.0, 2e8, 3e8, 5e8, 1e11)]
        assert sizes == [1, 1, 2, 4, 4]
        assert coded.for_link(1e11, 3 << 20).tile_bytes == 2 << 20
    for policy in (Policy(), Policy(body={"id": "raw"}, sinks=0, recent=0)):
        assert policy.for_link(1e11, plenty) is policy
