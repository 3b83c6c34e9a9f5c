"""bitplane on torch tensors: the bytes and the words of the C codec."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto import ChunkSpec, get_codec
from lynxproto.chunk import DTYPES
from lynxproto.errors import ConfigError, PayloadError, SpecError

torch = pytest.importorskip("torch")

from lynxproto.codecs.bitplane_torch import TorchBitplane  # noqa: E402 - after the check for torch

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def specification(dtype, shape):
    return ChunkSpec(part="packed-kv", dtype=dtype, heads=shape[0], tokens=shape[1], head_dim=shape[2])


def random_words(spec, seed):
    data = np.random.default_rng(seed).integers(0, 256, spec.nbytes, dtype=np.uint8)
    return data.view(spec.word_dtype).reshape(spec.shape)


def tensor(words):
    flat = torch.from_numpy(words.reshape(-1).view(np.uint8).copy())
    return flat.view(WORDS[words.itemsize]).reshape(words.shape)


def as_words(spec, found):
    return found.contiguous().reshape(-1).view(torch.uint8).numpy().view(spec.word_dtype).reshape(spec.shape)


def as_bytes(payloads):
    return [payload.numpy().tobytes() for payload in payloads]


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.sampled_from(sorted(DTYPES)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 3, 8, 33, 64, 80])),
    st.integers(0, 1 << 30),
)
def test_bytes_and_words_are_those_of_the_c_codec(data, dtype, shape, seed):
    spec = specification(dtype, shape)
    bits = 8 * spec.word_dtype.itemsize
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, bits - 1)))), bits]
    codec = get_codec("bitplane", planes=[b - a for a, b in pairwise(edges)])
    twin = TorchBitplane.of(codec)
    assert twin == codec
    words = random_words(spec, seed)
    expected = [bytes(payload) for payload in codec.encode(spec, words)]
    with torch.device("meta"):  # what is not made on the input's device would not mix with it
        levels = twin.encode(spec, tensor(words))
    assert as_bytes(levels) == expected
    for count in range(1, codec.levels + 1):
        there, here = np.zeros_like(words), tensor(np.zeros_like(words))
        codec.decode(spec, expected[:count], there)
        with torch.device("meta"):
            twin.decode(spec, levels[:count], here)
        assert np.array_equal(as_words(spec, here), there)
    assert np.array_equal(as_words(spec, here), words)


def test_strides_and_refinement():
    spec = specification("bfloat16", (3, 10, 24))
    words = random_words(spec, 1)
    codec = TorchBitplane(planes=(9, 7))
    by_token = tensor(words).transpose(0, 1).contiguous().view(torch.bfloat16)
    levels = codec.encode(spec, by_token.transpose(0, 1))
    assert as_bytes(levels) == as_bytes(codec.encode(spec, tensor(words)))
    page = torch.zeros(10, 5, 32, dtype=torch.int16)
    view = page[:, 1:4, 4:28].transpose(0, 1)
    state = codec.decode(spec, levels[:1], view)
    state = codec.refine(spec, state, 1, levels[1], view)
    assert state.nbytes == sum(map(len, levels))
    assert np.array_equal(as_words(spec, view), words)
    view.fill_(0)
    assert not page.any(), "decode wrote beside the view"


def test_bad_payloads_are_errors():
    spec = specification("bfloat16", (1, 3, 5))
    codec = TorchBitplane(planes=(9, 7))
    levels = as_bytes(codec.encode(spec, tensor(random_words(spec, 2))))
    out = torch.zeros(spec.shape, dtype=torch.int16)
    good = levels[1]
    for wrong in (b"", good[:3], good[:-1], good + b"\0", b"\0" + good[1:], good[:1] + b"\1" + good[2:]):
        with pytest.raises(PayloadError, match=r"level 1.*byte offset"):
            codec.decode(spec, [levels[0], wrong], out)
    with pytest.raises(SpecError, match="no levels"):
        codec.decode(spec, [], out)
    with pytest.raises(SpecError, match="does not hold"):
        codec.encode(spec, torch.zeros(spec.shape))


def test_zstd_is_refused():
    with pytest.raises(ConfigError, match="Zstandard"):
        TorchBitplane.of(get_codec("bitplane", planes=[8, 8], zstd=3))
    with pytest.raises(ConfigError, match="no bitplane codec"):
        TorchBitplane.of(get_codec("raw"))
