"""Where a tile's words are, as the native library takes it: arrays of any strides, and paged caches."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import DTYPES, ChunkSpec, Paged, as_words
from lynxproto.codecs._library import address, check, ffi, lib
from lynxproto.errors import SpecError

__all__ = ["View", "dense_words", "place_words", "view_of"]


_VIEW: Final = ffi.typeof("lynx_view *")
_VOID: Final = ffi.typeof("void *")


class View:
    """A ``lynx_view``, and what keeps its memory alive."""

    __slots__ = ("_keep", "c")

    def __init__(self, c: Any, keep: Any) -> None:
        self.c, self._keep = c, keep

    @classmethod
    def strided(cls, words: NDArray[Any], table: NDArray[np.int64] | None, first: int) -> View:
        """Words ``[heads, tokens, dim]``; with a table ``[pages, heads, tokens, dim]``."""
        size, strides = words.itemsize, words.strides
        head, token = strides[-3], strides[-2]
        if head % size or token % size or strides[0] % size or not words.flags.aligned:
            raise SpecError(f"the array's address or strides {strides} are not multiples of the word's {size} bytes")
        c = ffi.new(_VIEW, (address(words, _VOID), head // size, token // size))
        if table is not None:
            c.pages = address(table, "const int64_t *")
            c.page_stride, c.page_tokens, c.first_token = strides[0] // size, words.shape[2], first
        return cls(c, (words, table))

    def gather(self, spec: ChunkSpec, out: Any) -> None:
        """Copy all words to an address."""
        check(lib.lynx_view_gather(self.c, spec.word_dtype.itemsize, *spec.shape, out))

    def scatter(self, spec: ChunkSpec, words: Any) -> None:
        """Copy all words from an address."""
        check(lib.lynx_view_scatter(self.c, spec.word_dtype.itemsize, *spec.shape, words))


def view_of(spec: ChunkSpec, array: Any, *, writable: bool = False) -> View:
    """The words of an array, tensor or :class:`~lynxproto.chunk.Paged` that matches ``spec``.

    Raises :class:`~lynxproto.errors.SpecError` as :func:`~lynxproto.chunk.as_words` does, and for addresses and
    strides that are not multiples of a word.
    """
    if (  # the usual case by few steps, because a call is a part of a tile's time: writable, aligned and contiguous
        type(array) is np.ndarray
        and array.flags.carray
        and array.dtype is DTYPES[spec.dtype]
        and array.shape == (spec.heads, spec.tokens, dim := spec.head_dim)
    ):
        return View(ffi.new(_VIEW, (ffi.from_buffer(array), spec.tokens * dim, dim)), array)
    if isinstance(array, Paged):
        return View.strided(array.words(spec, writable=writable), array.table, array.first)
    return View.strided(as_words(spec, array, writable=writable), None, 0)


def dense_words(spec: ChunkSpec, pages: Paged) -> NDArray[Any]:
    """The words of a paged tile as a contiguous array."""
    words = np.empty(spec.shape, spec.word_dtype)
    view_of(spec, pages).gather(spec, address(words))
    return words


def place_words(spec: ChunkSpec, words: NDArray[Any], out: Paged) -> None:
    """The reverse."""
    view_of(spec, out, writable=True).scatter(spec, address(words))
