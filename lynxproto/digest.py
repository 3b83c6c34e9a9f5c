"""The two checksums: CRC32C of a frame's bytes, xxh3-128 of a tile's reconstructed words (as LZ4 keeps two).

CRC32C is Castagnoli's polynomial (RFC 3720, appendix B.4), not the CRC-32 of zlib.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Final, cast

import crc32c as _crc32c
import xxhash

from lynxproto.chunk import ChunkSpec, as_words
from lynxproto.codecs._library import check, ffi, lib

__all__ = ["DIGEST_SIZE", "Sums", "checksums", "crc32c", "sums_of", "tile_digest"]

DIGEST_SIZE: Final = 16
#: From here on the native kernel is faster than the package, whose calls are cheaper (and keep Python's lock).
_LONG: Final = 16 << 10
#: From here on one pass for both checksums is faster than two; below, a core's cache holds all of it anyway.
_SUMS: Final = 64 << 10
#: A tile's digest, made piece by piece.
_Digest: Final = xxhash.xxh3_128


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """CRC32C of ``data``, 32 bits; ``crc32c(b"123456789") == 0xE3069283``. ``value``: that of the bytes before it."""
    if memoryview(data).nbytes < _LONG:
        return cast(int, _crc32c.crc32c(data, value))
    return cast(int, lib.lynx_crc32c(value, ffi.from_buffer(data), memoryview(data).nbytes))


class Sums:
    """CRC32C and digest of ``data`` (contiguous, more than 240 bytes) in one pass, made while it fills up."""

    __slots__ = ("_memory", "_state", "data", "there")

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.there = 0
        """Bytes at the start of ``data`` that are in place, and added."""
        # The bare address: a buffer held here would be an export of `data`, and Python's collector of cycles clears a
        # memoryview without regard to its exports.
        self._memory = ffi.cast("void *", ffi.from_buffer(data))
        self._state = ffi.new("lynx_sums *")
        lib.lynx_sums_begin(self._state, data.nbytes)

    def add(self, there: int) -> None:
        """The first ``there`` bytes are in place now."""
        if there > self.there:
            lib.lynx_sums_add(self._state, self._memory, there)
            self.there = there

    def receive(self, socket: int) -> int:
        """Fill up with what a socket (its descriptor) has now, never waiting; how many bytes, 0 if its peer has ended.

        Each piece is added while the core's cache has it. Raises :class:`OSError` as ``recv_into`` would.
        """
        count = cast(int, lib.lynx_sums_receive(self._state, socket, self._memory, self.there))
        if count == -errno.EAGAIN:
            raise BlockingIOError
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        self.there += count
        return count

    @property
    def crc(self) -> int:
        """CRC32C, once all of ``data`` is there."""
        return cast(int, self._state.crc)

    def digest(self) -> bytes:
        """The digest (see :func:`tile_digest`), once all of ``data`` is there."""
        digest = bytearray(DIGEST_SIZE)
        check(lib.lynx_sums_digest(self._state, ffi.from_buffer(digest)))
        return bytes(digest)


def sums_of(data: memoryview) -> Sums | None:
    """The sums of ``data``, which fills up; None if it is so short that :func:`checksums` does better afterwards."""
    return Sums(data) if data.nbytes >= _SUMS else None


def checksums(words: memoryview) -> tuple[int, bytes]:
    """CRC32C and digest of a tile's words (bytes, little-endian, in [head, token, dim] order)."""
    sums = sums_of(words)
    if sums is None:
        return crc32c(words), _Digest(words).digest()
    sums.add(words.nbytes)
    return sums.crc, sums.digest()


def tile_digest(spec: ChunkSpec, array: Any) -> bytes:
    """xxh3-128 (canonical, big-endian, 16 bytes) of a tile's words: little-endian, in [head, token, dim] order.

    ``array`` has shape ``[heads, tokens, head_dim]`` and any strides that :func:`lynxproto.chunk.as_words` takes; it
    is copied head by head only where its tokens are not contiguous.

    Raises :class:`~lynxproto.errors.SpecError` for an array that does not match ``spec``.
    """
    digest = _Digest()
    for head in as_words(spec, array):
        digest.update(memoryview(head if head.flags.c_contiguous else head.copy()).cast("B"))
    return digest.digest()
