"""What a chunk is: a rectangle of one layer's K or V, and the words in it.

A *tile* is a set of KV heads times a set of tokens of one part (key, value...) of one layer. A *chunk* is one
level of one tile as a codec encodes it. Vocabulary: spec/wire-format.md, "Tiles, chunks and levels".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import SpecError

__all__ = ["DTYPES", "PARTS", "ChunkSpec", "Part", "Tile", "TokenSet", "as_words"]

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
    if type(array).__module__.split(".")[0] == "torch":
        array = _torch_words(array, spec.word_dtype.itemsize)
    if not isinstance(array, np.ndarray):
        raise SpecError(f"expected a NumPy array or a torch tensor, got {type(array).__name__}")
    if array.shape != spec.shape:
        raise SpecError(f"array has shape {array.shape}, the spec {spec.shape}")
    if array.dtype.itemsize != spec.word_dtype.itemsize:
        raise SpecError(f"array dtype {array.dtype} does not hold {spec.dtype} words")
    if spec.head_dim > 1 and array.strides[2] != array.dtype.itemsize:
        raise SpecError("the last dimension (head_dim) must be contiguous; call .contiguous() or np.ascontiguousarray")
    if writable and not array.flags.writeable:
        raise SpecError("the output array is read-only")
    return cast(NDArray[Any], array if array.dtype == spec.word_dtype else array.view(spec.word_dtype))


def _torch_words(tensor: Any, itemsize: int) -> NDArray[Any]:
    if tensor.device.type != "cpu":
        raise SpecError(
            f"tensor lives on {tensor.device}; this codec path reads CPU memory (copy it, or use the torch codec)"
        )
    if tensor.element_size() != itemsize:
        raise SpecError(f"tensor dtype {tensor.dtype} does not hold words of {itemsize} bytes")
    import torch  # the caller already has it: the tensor came from there

    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[itemsize]
    return cast(NDArray[Any], tensor.detach().view(integer).numpy())


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
