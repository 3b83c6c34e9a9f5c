"""Pages of vLLM's KV cache, and rows ``[kv_heads, tokens, head_dim]`` in and out of them.

Since vLLM's RFC 42082 every layer's cache is a tensor ``[blocks, kv_heads, block_tokens, content]`` with K and V in
``content``. What lies where inside a (block, head) *page* is the attention backend's affair: on GPUs each token has a
row of K and V; vLLM's CPU kernels keep K of a block transposed, or both in tiles for AMX. So slices of tokens are not
rows, and two machines may differ. A :class:`Packing` says where each word of a page belongs; rows are the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import MissingDependencyError, SpecError

try:
    import torch
except ImportError as error:
    raise MissingDependencyError("vLLM's pages are torch tensors; run: pip install torch") from error

__all__ = ["WORDS", "LayerPages", "Packing", "learn_packing", "row_packing"]

#: torch dtype of a cache -> a manifest's dtype.
WORDS: Final[dict[Any, str]] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
#: Words that are numbers of positions while a packing is learned: finite and normal in bfloat16 and in float16.
_FIRST_WORD: Final = 0x0400
_DIGITS: Final = 0x7000 - _FIRST_WORD

#: Writes keys and values ``[tokens, heads, dim]`` into the blocks ``[blocks, heads, tokens, content]`` from token 0 on.
Store = Callable[[Any, Any, Any], None]


@dataclass(frozen=True, slots=True)
class Packing:
    """Which word of a (block, head) page holds which value.

    ``key`` and ``value``: ``[block_tokens, head_dim]`` positions within the ``block_tokens * content`` words of a page.
    """

    key: NDArray[np.int64]
    value: NDArray[np.int64]

    @property
    def block_tokens(self) -> int:
        """Tokens of a page."""
        return len(self.key)

    @property
    def words(self) -> int:
        """Words of a page."""
        return self.key.size + self.value.size


def row_packing(block_tokens: int, key_dim: int, value_dim: int) -> Packing:
    """Each token a row of K and V, as GPU backends keep it."""
    rows = np.arange(block_tokens * (key_dim + value_dim), dtype=np.int64).reshape(block_tokens, key_dim + value_dim)
    return Packing(rows[:, :key_dim].copy(), rows[:, key_dim:].copy())


def learn_packing(store: Store, dtype: Any, block_tokens: int, key_dim: int, value_dim: int) -> Packing:
    """Find out where the engine's own ``store`` puts words, by letting it store numbers and looking where they are.

    So any packing is known, of whatever instruction set, that moves words without changing them.

    Raises :class:`~lynxproto.errors.SpecError` when it changes them, or does not fill pages of its own.
    """
    if dtype not in WORDS:
        raise SpecError(f"a KV cache of {dtype} cannot be transferred; known: {', '.join(WORDS.values())}")
    words = block_tokens * (key_dim + value_dim)
    numbers = np.arange(words, dtype=np.int64)
    found = np.zeros((2, words), np.int64)
    scale = 1
    while scale < words:
        digits = torch.from_numpy((numbers // scale % _DIGITS + _FIRST_WORD).astype(np.int16))
        if dtype == torch.float32:
            digits = digits.to(torch.int32) << 16
        given = digits.view(dtype)
        key = given[: block_tokens * key_dim].view(block_tokens, 1, key_dim).repeat(1, 2, 1).contiguous()
        value = given[block_tokens * key_dim :].view(block_tokens, 1, value_dim).repeat(1, 2, 1).contiguous()
        blocks = torch.zeros(1, 2, block_tokens, key_dim + value_dim, dtype=dtype)
        store(blocks, key, value)
        stored = blocks.view(2, words).view(_INTEGERS[dtype.itemsize])
        if dtype == torch.float32:
            stored = stored >> 16
        found += (stored.numpy().astype(np.int64) - _FIRST_WORD) * scale
        scale *= _DIGITS
    if not np.array_equal(found[0], found[1]) or not np.array_equal(np.sort(found[0]), numbers):
        raise SpecError(
            f"this attention backend does not keep {dtype} words as they are in pages of {block_tokens} tokens; "
            "its cache cannot be sent as rows"
        )
    places = np.empty(words, np.int64)
    places[found[0]] = numbers
    split = block_tokens * key_dim
    return Packing(places[:split].reshape(block_tokens, key_dim), places[split:].reshape(block_tokens, value_dim))


class LayerPages:
    """One layer's pages, ``cache[blocks, kv_heads, block_tokens, content]`` on the CPU, read and written as rows.

    Raises :class:`~lynxproto.errors.SpecError` for a cache elsewhere, of a dtype that is not known, or that the packing
    does not fit.
    """

    def __init__(self, cache: Any, packing: Packing) -> None:
        if cache.device.type != "cpu":
            raise SpecError(
                f"the KV cache lives on {cache.device}; only caches in CPU memory can be transferred so far"
            )
        if cache.dtype not in WORDS:
            raise SpecError(f"a KV cache of {cache.dtype} cannot be transferred; known: {', '.join(WORDS.values())}")
        if cache.dim() != 4 or cache.shape[2] != packing.block_tokens or cache[0, 0].numel() != packing.words:
            raise SpecError(
                f"a KV cache of shape {tuple(cache.shape)} has no pages of {packing.block_tokens} tokens and "
                f"{packing.words} words"
            )
        self.dtype: str = WORDS[cache.dtype]
        self.block_tokens = packing.block_tokens
        self.kv_heads: int = cache.shape[1]
        self.blocks: int = cache.shape[0]
        words = cache.view(_INTEGERS[cache.element_size()])
        self._parts = tuple(_part_view(words, places) for places in (packing.key, packing.value))

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Copies of K and V of tokens ``[start, stop)`` of the sequence in ``blocks``: words ``[kv_heads, n, dim]``."""
        spans = list(self._spans(blocks, start, stop))
        out = []
        for part in self._parts:
            rows = part.empty(stop - start)
            at = 0
            for block, first, last in spans:
                part.read(block, first, last, rows[:, at : at + last - first])
                at += last - first
            out.append(_unsigned(rows))
        return out[0], out[1]

    def write(
        self, blocks: Sequence[int], start: int, keys: NDArray[Any], values: NDArray[Any], heads: slice = slice(None)
    ) -> None:
        """Put words ``[kv_heads, n, dim]`` in as tokens ``start, start + 1...`` of the sequence; of ``heads`` only."""
        spans = list(self._spans(blocks, start, start + keys.shape[1]))
        for part, words in zip(self._parts, (keys, values), strict=True):
            rows = _signed(words)
            at = 0
            for block, first, last in spans:
                part.write(block, first, last, rows[:, at : at + last - first], heads)
                at += last - first

    def _spans(self, blocks: Sequence[int], start: int, stop: int) -> Any:
        size = self.block_tokens
        if not 0 <= start < stop <= len(blocks) * size:
            raise SpecError(f"tokens [{start}, {stop}) do not lie in {len(blocks)} blocks of {size}")
        for index in range(start // size, -(-stop // size)):
            block = blocks[index]
            if not 0 <= block < self.blocks:
                raise SpecError(f"block {block} is not one of the cache's {self.blocks}")
            yield block, max(start - index * size, 0), min(stop - index * size, size)


class _Strided:
    """One part of all pages, where a step of token or channel is always the same number of words."""

    def __init__(self, words: Any, first: int, shape: tuple[int, int], steps: tuple[int, int]) -> None:
        strides = (words.stride(0), words.stride(1), *steps)
        self._view = words.as_strided((*words.shape[:2], *shape), strides, words.storage_offset() + first)

    def empty(self, tokens: int) -> Any:
        _, heads, _, dim = self._view.shape
        return self._view.new_empty(heads, tokens, dim)

    def read(self, block: int, first: int, last: int, out: Any) -> None:
        out.copy_(self._view[block, :, first:last])

    def write(self, block: int, first: int, last: int, rows: Any, heads: slice) -> None:
        self._view[block, heads, first:last].copy_(rows)


class _Gathered:
    """One part of all pages, in any order."""

    def __init__(self, words: Any, places: NDArray[np.int64]) -> None:
        self._view = words.view(*words.shape[:2], -1)
        self._places = torch.from_numpy(places)

    def empty(self, tokens: int) -> Any:
        return self._view.new_empty(self._view.shape[1], tokens, self._places.shape[1])

    def read(self, block: int, first: int, last: int, out: Any) -> None:
        out.copy_(self._view[block][:, self._places[first:last]])

    def write(self, block: int, first: int, last: int, rows: Any, heads: slice) -> None:
        self._view[block, heads][:, self._places[first:last]] = rows


def _part_view(words: Any, places: NDArray[np.int64]) -> _Strided | _Gathered:
    """A view by strides where the packing has them; it needs the page's own words to be contiguous, as rows of tokens.

    Pages whose tokens are further apart than their content (a layout with heads inside tokens) have rows only.
    """
    tokens, dim = places.shape
    content = words.shape[3]
    if words.stride(2) == content and words.stride(3) == 1:
        steps = (
            int(places[1, 0] - places[0, 0]) if tokens > 1 else content,
            int(places[0, 1] - places[0, 0]) if dim > 1 else 1,
        )
        first = int(places[0, 0])
        grid = first + np.arange(tokens)[:, None] * steps[0] + np.arange(dim) * steps[1]
        return (
            _Strided(words, first, (tokens, dim), steps) if np.array_equal(grid, places) else _Gathered(words, places)
        )
    offset = int(places[0, 0])
    if np.array_equal(places, offset + np.arange(tokens)[:, None] * content + np.arange(dim)):
        return _Strided(words, offset * words.stride(3), (tokens, dim), (words.stride(2), words.stride(3)))
    raise SpecError("a packing that is not by rows needs pages of contiguous words")


def _unsigned(words: Any) -> NDArray[Any]:
    array = words.numpy()
    return cast(NDArray[Any], array.view(f"u{array.itemsize}"))


def _signed(words: NDArray[Any]) -> Any:
    return torch.from_numpy(words.view(np.uint8 if words.itemsize == 1 else f"i{words.itemsize}"))
