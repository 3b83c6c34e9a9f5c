"""Where a tile's words are, as the native library takes it: arrays of any strides, and paged caches."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import DTYPES, ChunkSpec, Paged, as_words
from lynxproto.codecs._library import address, check, ffi, lib
from lynxproto.errors import SpecError

__all__ = ["Dense", "dense_words", "place_words", "scatter", "view_of"]


_VIEW: Final = ffi.typeof("lynx_view *")
_VOID: Final = ffi.typeof("void *")


class Dense:
    """C-contiguous arrays of a shape, seen by few steps: nearly all are such, and a call is a part of a tile's time."""

    __slots__ = ("_head_stride", "_shape", "_token_stride", "_words")

    def __init__(self, spec: ChunkSpec) -> None:
        self._shape, self._words = spec.shape, DTYPES[spec.dtype]
        self._head_stride, self._token_stride = spec.tokens * spec.head_dim, spec.head_dim

    def fill(self, view: Any, array: Any) -> bool:
        """Make ``view``, a ``lynx_view`` without pages, that of ``array`` while it lives. False for any other array."""
        if not (
            type(array) is np.ndarray
            and array.flags.carray  # writable, aligned and contiguous
            and array.dtype is self._words
            and array.shape == self._shape
        ):
            return False
        view.words = ffi.from_buffer(array)
        view.head_stride = self._head_stride
        view.token_stride = self._token_stride
        return True


def view_of(spec: ChunkSpec, array: Any, *, writable: bool = False) -> Any:
    """A ``lynx_view`` of an array, tensor or :class:`~lynxproto.chunk.Paged` that matches ``spec``, while that lives.

    Raises :class:`~lynxproto.errors.SpecError` as :func:`~lynxproto.chunk.as_words` does, and for addresses and
    strides that are not multiples of a word.
    """
    view = ffi.new(_VIEW)
    if Dense(spec).fill(view, array):
        return view
    paged = isinstance(array, Paged)
    words = array.words(spec, writable=writable) if paged else as_words(spec, array, writable=writable)
    size, strides = words.itemsize, words.strides
    head, token = strides[-3], strides[-2]
    if head % size or token % size or strides[0] % size or not words.flags.aligned:
        raise SpecError(f"the array's address or strides {strides} are not multiples of the word's {size} bytes")
    view.words, view.head_stride, view.token_stride = address(words, _VOID), head // size, token // size
    if paged:
        view.pages = address(array.table, "const int64_t *")
        view.page_stride, view.page_tokens, view.first_token = strides[0] // size, array.page_tokens, array.first
    return view


def scatter(spec: ChunkSpec, view: Any, words: Any) -> None:
    """Copy a tile's words from an address to where a ``lynx_view`` says."""
    check(lib.lynx_view_scatter(view, spec.word_dtype.itemsize, *spec.shape, words))


def dense_words(spec: ChunkSpec, pages: Paged) -> NDArray[Any]:
    """The words of a paged tile as a contiguous array."""
    words = np.empty(spec.shape, spec.word_dtype)
    check(lib.lynx_view_gather(view_of(spec, pages), spec.word_dtype.itemsize, *spec.shape, address(words)))
    return words


def place_words(spec: ChunkSpec, words: NDArray[Any], out: Paged) -> None:
    """The reverse."""
    scatter(spec, view_of(spec, out, writable=True), address(words))
