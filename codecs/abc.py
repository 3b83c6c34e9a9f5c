"""The codec interface: one class, one file, one id (the manner of numcodecs)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from lynxproto.chunk import ChunkSpec

__all__ = ["Buffer", "Codec", "DecodeState"]

#: Anything with the buffer protocol that holds bytes: bytes, bytearray, memoryview, a uint8 array.
Buffer = Any


class DecodeState:
    """What a decoder keeps between levels: the payloads so far. Opaque; hand it back to :meth:`Codec.refine`.

    ``level`` is the highest level decoded, ``nbytes`` what the state holds on to.
    """

    __slots__ = ("level", "payloads")

    def __init__(self, level: int, payloads: tuple[Buffer, ...]) -> None:
        self.level = level
        self.payloads = payloads

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads that are kept."""
        return sum(memoryview(p).nbytes for p in self.payloads)


class Codec(ABC):
    """Turns the words of a tile into levels and back.

    Level 0 decodes alone; level n needs all levels below it. If ``exact`` is true the last level restores
    every word bit for bit. Codecs are immutable and may be used from several threads at once.
    """

    codec_id: ClassVar[str]
    #: Number in DATA frames; ids of 0x8000 and above are private. spec/wire-format.md, "Codec ids".
    wire_id: ClassVar[int]

    @property
    @abstractmethod
    def levels(self) -> int:
        """How many levels ``encode`` makes."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether the last level restores every word."""

    @property
    def verbatim(self) -> bool:
        """Whether level 0 is the tile's words as they are, in [head, token, dim] order: nothing to encode or decode."""
        return False

    @abstractmethod
    def supports(self, spec: ChunkSpec) -> bool:
        """Whether this codec can encode such a tile (dtype, part)."""

    @abstractmethod
    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """Encode ``array`` (``[heads, tokens, head_dim]``); return one payload for each of ``levels`` (default all).

        Deterministic: the same words and config give the same bytes, whatever the machine, the threads and
        whether levels are made together or one by one.

        Raises :class:`~lynxproto.errors.SpecError` for an array that does not match ``spec``.
        """

    @abstractmethod
    def decode(self, spec: ChunkSpec, levels: Sequence[Buffer], out: Any | None, *, threads: int = 1) -> DecodeState:
        """Decode levels ``0 .. len(levels) - 1`` into ``out`` (``[heads, tokens, head_dim]``, any strides).

        ``out`` None only checks and keeps the payloads, briefly: sessions do it on their I/O thread. The state returned
        borrows the payloads.

        Raises :class:`~lynxproto.errors.PayloadError` for a broken payload, before writing out of any bound;
        ``out`` is then untouched or holds values that mean nothing.
        """

    @abstractmethod
    def refine(
        self, spec: ChunkSpec, state: DecodeState, level: int, payload: Buffer, out: Any | None, *, threads: int = 1
    ) -> DecodeState:
        """Add ``level`` (which must be ``state.level + 1``) to an earlier decode and write the better values."""

    @abstractmethod
    def max_encoded_size(self, spec: ChunkSpec, level: int) -> int:
        """The largest payload, in bytes, that ``level`` of such a tile can have. Receivers refuse larger ones.

        Tiles of as many tokens have the same, whichever tokens these are.
        """

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """A JSON-serialisable description with the key ``id``; ``get_codec(config)`` rebuilds the codec."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Codec:
        """Build from :meth:`get_config`'s result without its ``id``."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(repr(sorted(self.get_config().items(), key=lambda kv: kv[0])))

    def __repr__(self) -> str:
        config = self.get_config()
        args = ", ".join(f"{k}={v!r}" for k, v in config.items() if k != "id")
        return f"get_codec({config['id']!r}{', ' if args else ''}{args})"
