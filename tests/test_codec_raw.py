"""raw: words as they are, with or without Zstandard."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto import ChunkSpec, get_codec
from lynxproto.chunk import DTYPES, PARTS
from lynxproto.errors import ConfigError, PayloadError, SpecError

CODECS = [get_codec("raw"), get_codec("raw", zstd=1), get_codec("raw", zstd=19)]


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(PARTS),
    st.sampled_from(sorted(DTYPES)),
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from(CODECS),
    st.integers(0, 1 << 30),
)
def test_round_trip(part, dtype, shape, codec, seed) -> None:
    spec = ChunkSpec(part=part, dtype=dtype, heads=shape[0], tokens=shape[1], head_dim=shape[2])
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, spec.nbytes, dtype=np.uint8).view(spec.word_dtype).reshape(shape)
    (payload,) = codec.encode(spec, words)
    assert memoryview(payload).nbytes <= codec.max_encoded_size(spec, 0)
    out = np.zeros_like(words)
    state = codec.decode(spec, [payload], out)
    assert np.array_equal(out, words)
    assert state.level == 0
    by_token = np.ascontiguousarray(words.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert bytes(codec.encode(spec, by_token)[0]) == bytes(payload)
    assert bytes(payload) == words.tobytes() or codec != CODECS[0]


@pytest.mark.parametrize("codec", CODECS)
def test_broken_payloads_are_errors(codec) -> None:
    spec = ChunkSpec(part="opaque", dtype="uint8", heads=1, tokens=10, head_dim=100)
    words = np.arange(1000, dtype=np.uint16).astype(np.uint8).reshape(spec.shape)
    payload = bytes(codec.encode(spec, words)[0])
    for wrong in (payload[:-1], payload + b"\0", payload[: len(payload) // 2], b""):
        for out in (np.zeros_like(words), None):
            with pytest.raises(PayloadError, match=r"raw level 0.*byte offset"):
                codec.decode(spec, [wrong], out)


def test_a_zstd_bomb_is_refused_before_it_is_unpacked() -> None:
    spec = ChunkSpec(part="opaque", dtype="uint8", heads=1, tokens=1, head_dim=100)
    bomb = zstandard.compress(bytes(1 << 24))
    with pytest.raises(PayloadError, match="holds 16777216 bytes, expected 100"):
        get_codec("raw", zstd=3).decode(spec, [bomb], None)
    nameless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(PayloadError):
        get_codec("raw", zstd=3).decode(spec, [nameless], None)


def test_interface() -> None:
    codec = get_codec("raw", zstd=3)
    assert codec.get_config() == {"id": "raw", "zstd": 3}
    assert get_codec(codec.get_config()) == codec
    assert get_codec("raw").get_config() == {"id": "raw"}
    assert (codec.levels, codec.exact, codec.wire_id) == (1, True, 1)
    for bad in (0, 20, "3"):
        with pytest.raises(ConfigError):
            get_codec("raw", zstd=bad)
    spec = ChunkSpec(part="key", dtype="bfloat16", heads=1, tokens=1, head_dim=1)
    words = np.zeros(spec.shape, np.uint16)
    with pytest.raises(SpecError):
        codec.encode(spec, words, levels=[1])
    with pytest.raises(SpecError):
        codec.decode(spec, [], words)
    with pytest.raises(SpecError):
        codec.max_encoded_size(spec, 1)
    state = codec.decode(spec, codec.encode(spec, words), words)
    with pytest.raises(SpecError):
        codec.refine(spec, state, 1, b"", words)
