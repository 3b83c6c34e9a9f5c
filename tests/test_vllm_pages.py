"""Pages of vLLM's KV cache: rows come out of any packing, and go into any other, word for word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("prometheus_client")

import torch
import vllm_engine  # noqa: F401  # puts the stub of vLLM into the path
from vllm import _custom_ops as ops

from lynxproto.errors import SpecError
from lynxproto.integrations.vllm.inbox import covers
from lynxproto.integrations.vllm.packing import cpu_packing
from lynxproto.integrations.vllm.pages import LayerPages, Packing, learn_packing, row_packing
from lynxproto.integrations.vllm.settings import head_range

HEADS, DIM = 2, 32


def pages(packing: Packing, blocks: int, dtype: Any, seed: int) -> tuple[Any, LayerPages]:
    rng = np.random.default_rng(seed)
    shape = (blocks, HEADS, packing.block_tokens, packing.words // packing.block_tokens)
    words = torch.from_numpy(rng.integers(0, 1 << 15, shape).astype(np.int16))
    cache = (words.view(dtype) if dtype.itemsize == 2 else words.to(torch.int32).view(dtype)).clone()
    return cache, LayerPages(cache, packing)


def packing_of(isa: str, tokens: int) -> Packing:
    return row_packing(tokens, DIM, DIM) if isa == "rows" else cpu_packing(torch.bfloat16, tokens, DIM, isa=isa)


@pytest.mark.parametrize("isa", ["vec", "amx"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [32, 128])
def test_a_packing_is_learned_from_the_kernel(isa: str, dtype: Any, tokens: int) -> None:
    """What the kernel stores is what is read."""
    packing = cpu_packing(dtype, tokens, DIM, isa=isa)
    cache, layer = pages(packing, 3, dtype, 1)
    key, value = (torch.randn(tokens + 5, HEADS, DIM).to(dtype) for _ in range(2))
    key_cache, value_cache = cache.view(3, HEADS, 2 * tokens, DIM).chunk(2, dim=2)
    slots = torch.cat([torch.arange(2 * tokens, 3 * tokens), torch.arange(5)])
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    read = layer.read((2, 0), 0, tokens + 5)
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    for rows, given_ in zip(read, (key, value), strict=True):
        np.testing.assert_array_equal(rows.view(f"i{rows.itemsize}"), given_.view(integer).numpy().transpose(1, 0, 2))


@settings(max_examples=30, deadline=None)
@given(
    block=st.sampled_from([32, 64]),
    other=st.sampled_from([32, 96]),
    isas=st.tuples(*[st.sampled_from(["vec", "amx", "rows"])] * 2),
    span=st.tuples(st.integers(0, 150), st.integers(1, 40)),
    seed=st.integers(0, 1 << 16),
)
def test_rows_survive_a_move(block: int, other: int, isas: tuple[str, str], span: tuple[int, int], seed: int) -> None:
    """Other blocks, other packing, any range of tokens; whatever else is in the pages stays."""
    start, stop = span[0], span[0] + span[1]
    (_, source), (cache, target) = (
        pages(packing_of(isa, n), 8, torch.bfloat16, seed) for n, isa in zip((block, other), isas, strict=True)
    )
    rng = np.random.default_rng(seed)
    theirs, mine = (tuple(rng.permutation(8).tolist()) for _ in range(2))
    before = cache.clone()
    head = int(rng.integers(HEADS))
    keys, values = source.read(theirs, start, stop)
    target.write(mine, start, keys[head : head + 1], values[head : head + 1], slice(head, head + 1))
    for rows, sent in zip(target.read(mine, start, stop), (keys, values), strict=True):
        np.testing.assert_array_equal(rows[head], sent[head])
    assert torch.equal(cache[:, 1 - head].view(torch.int16), before[:, 1 - head].view(torch.int16))
    changed = (cache.view(torch.int16) != before.view(torch.int16)).sum()
    assert int(changed) <= (stop - start) * 2 * DIM
    # Tokens that were not written are as they were.
    again = LayerPages(before, packing_of(isas[1], other))
    for span_ in ((0, start), (stop, 8 * other)):
        if span_[0] < span_[1]:
            for now, then in zip(target.read(mine, *span_), again.read(mine, *span_), strict=True):
                np.testing.assert_array_equal(now, then)


def test_heads_inside_tokens() -> None:
    """The layout LBNHC: a token's heads are neighbours."""
    physical = torch.randn(4, 16, HEADS, 2 * DIM).to(torch.bfloat16)
    layer = LayerPages(physical.permute(0, 2, 1, 3), row_packing(16, DIM, DIM))
    keys, values = layer.read((3, 1), 5, 20)
    flat = torch.cat([physical[3], physical[1]])[5:20].view(torch.int16).numpy().transpose(1, 0, 2)
    np.testing.assert_array_equal(np.concatenate([keys, values], -1).view(np.int16), flat)
    layer.write((0, 2), 5, keys, values)
    assert torch.equal(torch.cat([physical[0], physical[2]])[5:20], torch.cat([physical[3], physical[1]])[5:20])
    with pytest.raises(SpecError, match="contiguous"):
        LayerPages(physical.permute(0, 2, 1, 3), cpu_packing(torch.bfloat16, 16, DIM, isa="vec"))


def test_a_kernel_that_changes_words_is_noticed() -> None:
    def scaled(blocks: Any, key: Any, value: Any) -> None:
        blocks[0, :, :, :DIM] = (key * 2).transpose(0, 1)
        blocks[0, :, :, DIM:] = value.transpose(0, 1)

    with pytest.raises(SpecError, match="does not keep"):
        learn_packing(scaled, torch.bfloat16, 32, DIM, DIM)


@pytest.mark.parametrize(
    ("blocks", "start", "stop", "message"),
    [
        ((0,), 0, 33, "do not lie in 1 blocks"),
        ((0,), 5, 5, "do not lie"),
        ((0, 9), 0, 40, "block 9"),
        ((-1,), 0, 1, "block -1"),
    ],
)
def test_tokens_and_blocks_are_checked(blocks: tuple[int, ...], start: int, stop: int, message: str) -> None:
    _, layer = pages(row_packing(32, DIM, DIM), 4, torch.bfloat16, 0)
    with pytest.raises(SpecError, match=message):
        layer.read(blocks, start, stop)


@given(st.data())
def test_cover_is_what_cells_say(data: st.DataObject) -> None:
    edge = st.integers(0, 6)
    boxes = data.draw(
        st.lists(st.tuples(edge, edge, edge, edge).map(lambda b: (*sorted(b[:2]), *sorted(b[2:]))), max_size=6)
    )
    heads, tokens = (range(*sorted(data.draw(st.tuples(edge, edge), label="span"))) for _ in range(2))
    cells = {(h, t) for a, b, c, d in boxes for h in range(a, b) for t in range(c, d)}
    assert covers(boxes, heads, tokens) == all((h, t) in cells for h in heads for t in tokens)


@given(st.sampled_from([1, 2, 4, 8, 12]), st.sampled_from([1, 2, 4, 8, 16, 24]))
def test_each_head_has_one_first_copy(heads: int, ranks: int) -> None:
    if heads % ranks and ranks % heads:
        return
    first = [range_ for range_, first in (head_range(heads, ranks, rank) for rank in range(ranks)) if first]
    assert [head for range_ in first for head in range_] == list(range(heads))
