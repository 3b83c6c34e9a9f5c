"""What a chunk is: a rectangle of one layer's K or V, and the words in it.

A *tile* is a set of KV heads times a set of tokens of one part (key, value...) of one layer. A *chunk* is one
level of one tile as a codec encodes it. Vocabulary: spec/wire-format.md, "Tiles, chunks and levels".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import SpecError

__all__ = ["DTYPES", "PARTS", "ChunkSpec", "Paged", "Part", "Tile", "TokenSet", "as_words"]

Part = Literal["key", "value", "packed-kv", "latent", "opaque"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)

#: dtype name -> (numpy dtype of one word, bits of one word). Values travel as words, never as numbers.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<u2"),
    "float32": np.dtype("<u4"),
    "float8_e4m3": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "uint8": np.dtype("u1"),
}

_MAX_WORDS: Final = 1 << 40  # a chunk of more words than this is a mistake on any machine


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Absolute token positions, ascending: a range ``[start, stop)``, or an explicit list.

    ``positions`` is None for a range. Build with :meth:`range` or :meth:`of`; ``of`` turns a contiguous list
    into a range, so that equal sets compare equal.
    """

    start: int
    stop: int
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise SpecError(f"token range [{self.start}, {self.stop}) is empty or negative")
        if self.positions is not None:
            p = self.positions
            if not p or p[0] != self.start or p[-1] != self.stop - 1:
                raise SpecError("token positions do not span [start, stop)")
            if any(b <= a for a, b in pairwise(p)):
                raise SpecError("token positions must be strictly ascending")

    @classmethod
    def range(cls, start: int, stop: int) -> TokenSet:
        """The tokens ``start, start + 1, ..., stop - 1``."""
        return cls(start, stop)

    @classmethod
    def of(cls, positions: Iterable[int]) -> TokenSet:
        """The given positions, in any order, without repeats."""
        p = tuple(sorted(int(x) for x in positions))
        if not p:
            raise SpecError("a token set needs at least one token")
        if p[-1] - p[0] + 1 == len(p):
            return cls(p[0], p[-1] + 1)
        return cls(p[0], p[-1] + 1, p)

    @property
    def is_range(self) -> bool:
        """True when the tokens are contiguous."""
        return self.positions is None

    def __len__(self) -> int:
        return self.stop - self.start if self.positions is None else len(self.positions)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop) if self.positions is None else self.positions)


@dataclass(frozen=True, slots=True)
class ChunkSpec:
    """Shape, dtype and place of a tile: all that a codec may know besides the words themselves.

    An array that matches it has shape ``[heads, tokens, head_dim]``. ``layer``, ``head_start`` and
    ``token_set`` say where the tile lies in its cache; codecs use them to look up per-channel tables and never
    to treat one token better than another (policies do that, by cutting a layer into tiles).

    Raises :class:`~lynxproto.errors.SpecError` for unknown parts and dtypes, and for empty or absurd sizes.
    """

    part: Part
    dtype: str
    heads: int
    tokens: int
    head_dim: int
    layer: int | None = None
    head_start: int = 0
    token_set: TokenSet | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise SpecError(f"unknown part {self.part!r}; known: {', '.join(PARTS)}")
        if self.dtype not in DTYPES:
            raise SpecError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        for name in ("heads", "tokens", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SpecError(f"ChunkSpec.{name} must be a positive integer, not {value!r}")
        if self.heads * self.tokens * self.head_dim > _MAX_WORDS:
            raise SpecError(f"a chunk of {self.shape} words is larger than {_MAX_WORDS} words")
        if self.head_start < 0 or (self.layer is not None and self.layer < 0):
            raise SpecError("ChunkSpec.layer and head_start must not be negative")
        if self.token_set is not None and len(self.token_set) != self.tokens:
            raise SpecError(f"token_set holds {len(self.token_set)} tokens, the spec {self.tokens}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(heads, tokens, head_dim)``."""
        return (self.heads, self.tokens, self.head_dim)

    @property
    def words(self) -> int:
        """Number of values."""
        return self.heads * self.tokens * self.head_dim

    @property
    def word_dtype(self) -> np.dtype[Any]:
        """The unsigned integer type that holds one value's bits."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the uncompressed tile."""
        return self.words * self.word_dtype.itemsize


def as_words(spec: ChunkSpec, array: Any, *, writable: bool = False) -> NDArray[Any]:
    """View ``array`` as ``[heads, tokens, head_dim]`` unsigned words, without copying.

    Accepts NumPy arrays of the word type, of ml_dtypes or NumPy float types of the same size, and torch CPU
    tensors. Heads and tokens may have any stride; the values of one token and head must be contiguous.

    Raises :class:`~lynxproto.errors.SpecError` when the array does not match ``spec``, is not contiguous in its
    last dimension, is read-only though ``writable`` is asked for, or lives on a device.
    """
    if isinstance(array, Paged):
        raise SpecError("a paged cache is no array; hq, bitplane and raw take it as it is")
    words = _unsigned(spec, array, writable)
    if words.shape != spec.shape:
        raise SpecError(f"array has shape {words.shape}, the spec {spec.shape}")
    return words


@dataclass(frozen=True, slots=True, eq=False)
class Paged:
    """Tokens of a paged cache, which codecs take in place of an array ``[heads, tokens, head_dim]``, without a copy.

    ``pages`` are all pages of the cache, of keys or of values: an array or CPU tensor ``[pages, page_tokens, heads,
    head_dim]`` (``layout="NHD"``) or ``[pages, heads, page_tokens, head_dim]`` (``"HND"``) with any strides but in
    ``head_dim``. ``table`` numbers the pages that hold the tokens, in their order; ``first`` tokens of the first of
    them come before. A tile that is decoded must not have a page twice in its table. K and V beside each other,
    ``[pages, heads, page_tokens, 2 * head_dim]``, are ``pages[..., :head_dim]`` and ``pages[..., head_dim:]``.

    Raises :class:`~lynxproto.errors.SpecError` for a layout, a table or a shape that cannot be.
    """

    pages: Any
    table: Any
    layout: Literal["NHD", "HND"] = "NHD"
    first: int = 0

    def __post_init__(self) -> None:
        if self.layout not in ("NHD", "HND"):
            raise SpecError(f"Paged.layout must be 'NHD' or 'HND', not {self.layout!r}")
        if len(self.pages.shape) != 4:
            raise SpecError(f"pages have shape {tuple(self.pages.shape)}, not 4 dimensions")
        table = np.ascontiguousarray(self.table, np.int64)
        if table.ndim != 1 or (table.size and not 0 <= int(table.min()) <= int(table.max()) < self.pages.shape[0]):
            raise SpecError(f"Paged.table must be a list of page numbers from 0 to {self.pages.shape[0] - 1}")
        if not isinstance(self.first, int) or not 0 <= self.first < max(1, self.page_tokens):
            raise SpecError(f"Paged.first must be a token of the first page, not {self.first!r}")
        object.__setattr__(self, "table", table)

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return int(self.pages.shape[1 if self.layout == "NHD" else 2])

    def words(self, spec: ChunkSpec, *, writable: bool = False) -> NDArray[Any]:
        """All pages as unsigned words ``[pages, heads, page_tokens, head_dim]``, a view.

        Raises :class:`~lynxproto.errors.SpecError` as :func:`as_words` does, and where the table has too few pages.
        """
        words = _unsigned(spec, self.pages, writable)
        words = words.transpose(0, 2, 1, 3) if self.layout == "NHD" else words
        if (words.shape[1], words.shape[3]) != (spec.heads, spec.head_dim):
            raise SpecError(f"pages have {words.shape[1]} heads of {words.shape[3]}, the spec {spec.shape}")
        if self.table.size * self.page_tokens < self.first + spec.tokens:
            raise SpecError(
                f"{self.table.size} pages of {self.page_tokens} tokens do not hold {self.first + spec.tokens}"
            )
        return words


def _unsigned(spec: ChunkSpec, array: Any, writable: bool) -> NDArray[Any]:
    """The words of an array of any shape, as they lie."""
    if not isinstance(array, np.ndarray):
        if type(array).__module__.split(".")[0] != "torch":
            raise SpecError(f"expected a NumPy array or a torch tensor, got {type(array).__name__}")
        array = _torch_words(array, spec.word_dtype.itemsize)
    dtype = array.dtype
    if dtype.itemsize != spec.word_dtype.itemsize:
        raise SpecError(f"array dtype {dtype} does not hold {spec.dtype} words")
    if array.ndim and array.shape[-1] > 1 and array.strides[-1] != dtype.itemsize:
        raise SpecError("the last dimension (head_dim) must be contiguous; call .contiguous() or np.ascontiguousarray")
    if writable and not array.flags.writeable:
        raise SpecError("the output array is read-only")
    return cast("NDArray[Any]", array if dtype == spec.word_dtype else array.view(spec.word_dtype))


def _torch_words(tensor: Any, itemsize: int) -> NDArray[Any]:
    if tensor.device.type != "cpu":
        raise SpecError(
            f"tensor lives on {tensor.device}; this codec path reads CPU memory (copy it, or use the torch codec)"
        )
    if tensor.element_size() != itemsize:
        raise SpecError(f"tensor dtype {tensor.dtype} does not hold words of {itemsize} bytes")
    import torch  # the caller already has it: the tensor came from there

    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[itemsize]
    return cast("NDArray[Any]", tensor.detach().view(integer).numpy())


@dataclass(frozen=True, slots=True)
class Tile:
    """KV heads ``[head_start, head_start + heads)`` times ``tokens`` of one part of one layer, and its codec.

    ``codec`` indexes the manifest's codec configs. The tile and a level number together are a chunk key.
    """

    layer: int
    part: Part
    head_start: int
    heads: int
    tokens: TokenSet
    codec: int
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = (self.layer, self.part, self.head_start, self.heads, self.tokens, self.codec)
        object.__setattr__(self, "_hash", hash(key))

    def __hash__(self) -> int:  # tiles are looked up all the time, and their token sets may be long
        return self._hash

    def spec(self, dtype: str, head_dim: int) -> ChunkSpec:
        """The :class:`ChunkSpec` that the tile's codec gets."""
        return ChunkSpec(
            part=self.part,
            dtype=dtype,
            heads=self.heads,
            tokens=len(self.tokens),
            head_dim=head_dim,
            layer=self.layer,
            head_start=self.head_start,
            token_set=self.tokens,
        )
