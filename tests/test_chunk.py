"""ChunkSpec, TokenSet and as_words: what describes a tile, and what is refused."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lynxproto import ChunkSpec, TokenSet
from lynxproto.chunk import DTYPES, PARTS, as_words
from lynxproto.errors import SpecError


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=200))
def test_token_set_keeps_its_positions_in_order(positions):
    tokens = TokenSet.of(positions)
    assert list(tokens) == sorted(positions)
    assert len(tokens) == len(positions)
    assert tokens.is_range == (max(positions) - min(positions) + 1 == len(positions))
    if tokens.is_range:
        assert tokens == TokenSet.range(min(positions), max(positions) + 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: TokenSet.range(3, 3),
        lambda: TokenSet.range(-1, 3),
        lambda: TokenSet.of([]),
        lambda: TokenSet(0, 4, (0, 2, 1, 3)),
        lambda: TokenSet(0, 4, (0, 1)),
    ],
)
def test_token_sets_that_make_no_sense_are_refused(build):
    with pytest.raises(SpecError):
        build()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_spec_sizes(part, dtype):
    spec = ChunkSpec(part=part, dtype=dtype, heads=3, tokens=5, head_dim=7)
    assert spec.words == 105
    assert spec.nbytes == 105 * DTYPES[dtype].itemsize


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("part", "keys"),
        ("dtype", "bf16"),
        ("heads", 0),
        ("tokens", -1),
        ("head_dim", 1.5),
        ("tokens", 1 << 40),
        ("layer", -1),
        ("head_start", -1),
        ("token_set", TokenSet.range(0, 4)),
    ],
)
def test_spec_refuses(field, value):
    good = {"part": "key", "dtype": "bfloat16", "heads": 2, "tokens": 3, "head_dim": 4}
    with pytest.raises(SpecError):
        ChunkSpec(**{**good, field: value})


SPEC = ChunkSpec(part="key", dtype="bfloat16", heads=2, tokens=3, head_dim=4)


def test_as_words_views_every_kind_of_array_without_a_copy():
    words = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    tensor = torch.from_numpy(words.view(np.int16).copy()).view(torch.bfloat16)
    for array in (words, words.view(ml_dtypes.bfloat16), words.view(np.float16)):
        view = as_words(SPEC, array)
        assert np.shares_memory(view, words)
        np.testing.assert_array_equal(view, words)
    view = as_words(SPEC, tensor)
    view[1, 2, 3] = 0x3F80
    assert tensor[1, 2, 3] == 1.0


def test_as_words_takes_any_stride_of_heads_and_tokens():
    by_token = np.arange(24, dtype=np.uint16).reshape(3, 2, 4)
    view = as_words(SPEC, by_token.transpose(1, 0, 2))
    assert np.shares_memory(view, by_token)
    np.testing.assert_array_equal(view[1, 2], by_token[2, 1])


def test_as_words_refuses_what_does_not_match():
    words = np.zeros((2, 3, 4), np.uint16)
    read_only = words.copy()
    read_only.flags.writeable = False
    for array, writable in [
        (words[:, :2], False),
        (words.astype(np.uint32), False),
        (np.zeros((2, 4, 3), np.uint16).transpose(0, 2, 1), False),
        (words.tolist(), False),
        (torch.zeros(2, 3, 4, device="meta", dtype=torch.bfloat16), False),
        (read_only, True),
    ]:
        with pytest.raises(SpecError):
            as_words(SPEC, array, writable=writable)
