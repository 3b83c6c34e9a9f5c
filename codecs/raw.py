"""``raw``: the words as they are, in one level. spec/codec-raw.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import zstandard

from lynxproto.chunk import ChunkSpec, Paged, as_words
from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.errors import ConfigError, PayloadError, SpecError

__all__ = ["Raw"]


class Raw(Codec):
    """The words of any dtype and part, little-endian, in [head, token, dim] order.

    ``zstd`` (1..19) compresses them as one Zstandard frame; None sends them as they are.
    """

    codec_id: ClassVar[str] = "raw"
    wire_id: ClassVar[int] = 1

    def __init__(self, *, zstd: int | None = None) -> None:
        if zstd is not None and (not isinstance(zstd, int) or not 1 <= zstd <= 19):
            raise ConfigError(f"raw: zstd must be a level from 1 to 19 or None, not {zstd!r}")
        self._zstd = zstd

    @property
    def levels(self) -> int:
        """1."""
        return 1

    @property
    def exact(self) -> bool:
        """True."""
        return True

    @property
    def verbatim(self) -> bool:
        """True without ``zstd``."""
        return self._zstd is None

    def supports(self, spec: ChunkSpec) -> bool:
        """Everything."""
        return True

    def get_config(self) -> dict[str, Any]:
        """``id`` and, if set, ``zstd``."""
        return {"id": self.codec_id} if self._zstd is None else {"id": self.codec_id, "zstd": self._zstd}

    def max_encoded_size(self, spec: ChunkSpec, level: int) -> int:
        """The tile's bytes, or what Zstandard makes of them at worst."""
        if level != 0:
            raise SpecError(f"raw: level {level} of 1")
        n = spec.nbytes
        return n if self._zstd is None else zstd_bound(n)

    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """See :meth:`Codec.encode`. Without ``zstd`` a contiguous array is not copied: the payload borrows it."""
        if isinstance(array, Paged):
            from lynxproto.codecs._view import dense_words  # arrays do not need the native library

            array = dense_words(spec, array)
        words = np.ascontiguousarray(as_words(spec, array))
        wanted = [0] if levels is None else list(levels)
        if any(level != 0 for level in wanted):
            raise SpecError(f"raw: levels {wanted} of a codec with 1")
        body = words.reshape(-1).view(np.uint8).data
        payload = body if self._zstd is None else zstd_compress(body, self._zstd)
        return [payload for _ in wanted]

    def decode(self, spec: ChunkSpec, levels: Sequence[Buffer], out: Any | None, *, threads: int = 1) -> DecodeState:
        """See :meth:`Codec.decode`."""
        if len(levels) != 1:
            raise SpecError(f"raw: got {len(levels)} levels of a codec with 1")
        payload: Buffer = levels[0]
        if self._zstd is not None:
            payload = zstd_decompress(payload, spec.nbytes, "raw level 0")
        body = np.frombuffer(payload, np.uint8)
        if body.nbytes != spec.nbytes:
            what = "truncated" if body.nbytes < spec.nbytes else "longer than its content"
            raise PayloadError(
                f"raw level 0: {what}: {body.nbytes} bytes for a tile of {spec.nbytes}"
                f" (byte offset {min(body.nbytes, spec.nbytes)})"
            )
        if out is not None:
            words = body.view(spec.word_dtype).reshape(spec.shape)
            if isinstance(out, Paged):
                from lynxproto.codecs._view import place_words

                place_words(spec, words, out)
            else:
                as_words(spec, out, writable=True)[...] = words
        return DecodeState(0, tuple(levels))

    def refine(
        self, spec: ChunkSpec, state: DecodeState, level: int, payload: Buffer, out: Any | None, *, threads: int = 1
    ) -> DecodeState:
        """Never valid: there is one level."""
        raise SpecError(f"raw: level {level} of a codec with 1")


def zstd_bound(size: int) -> int:
    """The largest Zstandard frame of ``size`` bytes (ZSTD_COMPRESSBOUND of zstd.h)."""
    return size + (size >> 8) + (max(0, (128 << 10) - size) >> 11)


def zstd_compress(body: Buffer, level: int) -> bytes:
    """One Zstandard frame that names its content's size."""
    return bytes(zstandard.ZstdCompressor(level=level, write_content_size=True).compress(body))


def zstd_decompress(payload: Buffer, size: int, where: str) -> bytes:
    """Decompress a frame that must hold ``size`` bytes, and nothing after it.

    Raises :class:`~lynxproto.errors.PayloadError`, before any allocation, if the frame names another size.
    """
    try:
        named = zstandard.get_frame_parameters(payload).content_size
        if named != size:
            raise PayloadError(f"{where}: the Zstandard frame holds {named} bytes, expected {size} (byte offset 0)")
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        body = bytes(decoder.decompress(payload))
    except zstandard.ZstdError as error:
        raise PayloadError(f"{where}: {error} (byte offset 0)") from error
    if not decoder.eof or len(body) != size:
        raise PayloadError(f"{where}: truncated Zstandard frame (byte offset {memoryview(payload).nbytes})")
    if decoder.unused_data:
        offset = memoryview(payload).nbytes - len(decoder.unused_data)
        raise PayloadError(f"{where}: bytes after the Zstandard frame (byte offset {offset})")
    return body
