"""Manifests: what they hold, what they refuse."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynxproto.chunk import Tile, TokenSet
from lynxproto.config import Limits
from lynxproto.errors import ErrorCode, LimitError, ProtocolError, SpecError
from lynxproto.manifest import FetchKey, Identity, LayerSpec, Manifest, Want, wanted_levels

LIMITS = Limits()
TEXT = st.text(max_size=20)
IDENTITIES = st.builds(
    Identity, model=TEXT, revision=TEXT, tokenizer_hash=TEXT, rope_hash=TEXT, producer=TEXT, attention_backend=TEXT
)
LAYERS = st.lists(
    st.builds(
        lambda start, **kw: LayerSpec(token_start=start, token_stop=start + 10, **kw),
        start=st.integers(0, 90),
        index=st.integers(0, 60),
        kv_heads=st.integers(1, 64),
        key_dim=st.integers(1, 256),
        value_dim=st.integers(1, 256),
        kind=st.sampled_from(["full", "sliding", "recurrent"]),
        parts=st.sampled_from([("key", "value"), ("packed-kv",), ("latent",), ("opaque", "key")]),
        head_start=st.integers(0, 100),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda layer: layer.index,
).map(tuple)
MANIFESTS = st.builds(
    Manifest,
    identity=IDENTITIES,
    dtype=st.sampled_from(["bfloat16", "float16", "float8_e4m3"]),
    layers=LAYERS,
    prompt_tokens=st.integers(100, 1000),
    codecs=st.just(({"id": "raw"}, {"id": "hq", "key_bits": 4, "widths": [1, 2], "exact": True, "x": None})),
    layout=TEXT,
    packing=TEXT,
    request_id=TEXT,
    shard_index=st.integers(0, 3),
    shard_count=st.integers(4, 9),
    lossy=st.booleans(),
    tables=st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(tuple),
)


@given(MANIFESTS)
def test_round_trip(manifest):
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data, LIMITS)
    assert again == manifest
    assert again.to_bytes() == data
    for layer in manifest.layers:
        assert again.layer(layer.index) == layer


def small(**kw: Any) -> Manifest:
    return Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=2, kv_heads=3, head_dim=4, tokens=5, **kw
    )


def test_sizes():
    assert small().nbytes == 2 * 2 * 3 * 4 * 5 * 2
    layer = LayerSpec(index=0, kv_heads=2, key_dim=3, value_dim=5, token_start=4, token_stop=7, parts=("packed-kv",))
    assert layer.head_dim("packed-kv") == 8
    assert layer.words() == 2 * 3 * 8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "int3"}, "int3"),
        ({"dtype": 5}, "dtype"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [5]}, "expected a map"),
        ({"prompt_tokens": 4}, "prompt_tokens"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"shard": [2, 2]}, "shard"),
        ({"shard": [1]}, "shard"),
        ({"codecs": ["raw"]}, "codec config"),
        ({"codecs": [{"id": 1}]}, "codec config"),
        ({"tables": [b"short"]}, "tables"),
        ({"identity": {}}, "model"),
        ({"identity": {"model": "m", "!new": 1}}, "critical"),
        ({"lossy": 1}, "lossy"),
        ({"!critical": 1}, "critical"),
    ],
)
def test_broken_manifests_are_protocol_errors(change, match):
    fields = cbor2.loads(small().to_bytes()) | change
    with pytest.raises(ProtocolError, match=match):
        Manifest.from_bytes(cbor2.dumps(fields), LIMITS)


@pytest.mark.parametrize(
    "change",
    [{"parts": ["key", "key"]}, {"parts": []}, {"parts": ["soul"]}, {"kv_heads": 0}, {"tokens": [5, 5]},
     {"head_start": 65535}, {"index": 1 << 16}, {"index": 1}],
)  # fmt: skip
def test_broken_layers_are_protocol_errors(change):
    fields = cbor2.loads(small().to_bytes())
    fields["layers"][0] |= change
    with pytest.raises(ProtocolError):
        Manifest.from_bytes(cbor2.dumps(fields), LIMITS)


def test_unknown_keys_are_ignored():
    fields = cbor2.loads(small().to_bytes()) | {"grease-1": 5}
    assert Manifest.from_bytes(cbor2.dumps(fields), LIMITS) == small()


@pytest.mark.parametrize("limits", [Limits(layers=1), Limits(tokens=4), Limits(transfer_bytes=479)])
def test_limits(limits):
    with pytest.raises(LimitError) as caught:
        Manifest.from_bytes(small().to_bytes(), limits)
    assert caught.value.code is ErrorCode.LIMIT


@given(st.binary(max_size=80))
def test_noise_is_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        Manifest.from_bytes(data, LIMITS)


def test_contradictions_are_named_on_the_sender_too():
    for change in ({"dtype": "x"}, {"shard_index": 1}, {"prompt_tokens": 1}):
        with pytest.raises(SpecError):
            Manifest(**{"identity": Identity(model="m"), "dtype": "bfloat16", "layers": small().layers,
                        "prompt_tokens": 5, **change})  # fmt: skip
    with pytest.raises(SpecError, match="no layer 9"):
        small().layer(9)


def test_identities():
    ours = Identity(model="m", revision="1")
    assert ours.mismatch(Identity(model="m", revision="1", tokenizer_hash="t")) is None
    assert ours.mismatch(Identity(model="m")) is None
    assert ours.mismatch(Identity(model="m", revision="2")) == "revision is '2', expected '1'"
    assert len(ours.hash()) == 16
    assert ours.hash() != Identity(model="m").hash()


def test_wants():
    tile = Tile(3, "key", 2, 2, TokenSet.range(10, 20), 0)
    assert Want().levels_of(tile, 3) == 3
    assert Want(levels=1).levels_of(tile, 3) == 1
    for meets in ({"layers": (3, 4)}, {"heads": (3, 9)}, {"tokens": (19, 30)}, {"tokens": (0, 11)}):
        assert Want(**meets).levels_of(tile, 3) == 3
    for misses in ({"layers": (4, 9)}, {"heads": (4, 9)}, {"tokens": (20, 30)}, {"tokens": (0, 10)}):
        assert Want(**misses).levels_of(tile, 3) == 0
    assert wanted_levels((Want(layers=(0, 1)), Want(levels=2), Want(levels=1)), tile, 3) == 2
    assert wanted_levels((), tile, 3) == 0
    for bad in ({"layers": (2, 2)}, {"tokens": (-1, 2)}, {"levels": 0}):
        with pytest.raises(SpecError):
            Want(**bad)
    for item in ([], [None] * 3, [[1], None, None, None], [[2, 1], None, None, None], [None, None, None, "x"]):
        with pytest.raises(ProtocolError):
            Want.from_list(item)


def test_fetch_keys():
    with pytest.raises(SpecError):
        FetchKey(identity=b"", blocks=())
    with pytest.raises(SpecError):
        FetchKey(identity=bytes(16), blocks=(b"short",))
