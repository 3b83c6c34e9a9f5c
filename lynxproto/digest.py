"""The two checksums: CRC32C of a frame's bytes, xxh3-128 of a tile's reconstructed words (as LZ4 keeps two).

CRC32C is Castagnoli's polynomial (RFC 3720, appendix B.4), not the CRC-32 of zlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import crc32c as _crc32c
import xxhash

from lynxproto.chunk import ChunkSpec, as_words
from lynxproto.codecs._library import ffi, lib

__all__ = ["DIGEST_SIZE", "Digest", "checksums", "crc32c", "pieces", "tile_digest"]

DIGEST_SIZE: Final = 16
#: From here on the native kernel is faster than the package, whose calls are cheaper (and keep Python's lock).
_LONG: Final = 16 << 10
#: Bytes that a core's cache holds.
_PIECE: Final = 256 << 10

#: A tile's digest, made piece by piece: ``update(bytes)``, ``digest()`` (canonical, big-endian).
Digest = xxhash.xxh3_128


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """CRC32C of ``data``, 32 bits; ``crc32c(b"123456789") == 0xE3069283``. ``value``: that of the bytes before it."""
    if memoryview(data).nbytes < _LONG:
        return cast(int, _crc32c.crc32c(data, value))
    return cast(int, lib.lynx_crc32c(value, ffi.from_buffer(data), memoryview(data).nbytes))


def pieces(data: memoryview) -> Iterator[memoryview]:
    """``data`` in pieces that the second of two checksums still finds in the core's cache."""
    for start in range(0, data.nbytes, _PIECE):
        yield data[start : start + _PIECE]


def checksums(words: memoryview) -> tuple[int, bytes]:
    """CRC32C and digest of a tile's words (bytes, little-endian, in [head, token, dim] order), in one pass."""
    digest, crc = Digest(), 0
    for piece in pieces(words):
        crc = crc32c(piece, crc)
        digest.update(piece)
    return crc, digest.digest()


def tile_digest(spec: ChunkSpec, array: Any) -> bytes:
    """xxh3-128 (canonical, big-endian, 16 bytes) of a tile's words: little-endian, in [head, token, dim] order.

    ``array`` has shape ``[heads, tokens, head_dim]`` and any strides that :func:`lynxproto.chunk.as_words` takes; it
    is copied head by head only where its tokens are not contiguous.

    Raises :class:`~lynxproto.errors.SpecError` for an array that does not match ``spec``.
    """
    digest = Digest()
    for head in as_words(spec, array):
        digest.update(memoryview(head if head.flags.c_contiguous else head.copy()).cast("B"))
    return digest.digest()
