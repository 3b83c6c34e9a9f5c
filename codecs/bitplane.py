"""``bitplane``: the bit planes of words, cut into levels, most significant first. spec/codec-bitplane.md."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import DTYPES, ChunkSpec
from lynxproto.codecs._library import address, check, ffi, lib
from lynxproto.codecs._view import view_of
from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.codecs.raw import zstd_bound, zstd_compress, zstd_decompress
from lynxproto.errors import ConfigError, PayloadError, SpecError

__all__ = ["Bitplane"]

_HEADER: Final = struct.Struct("<BBH")  # level, planes, reserved
_WORD_BITS: Final = (8, 16, 32)


class Bitplane(Codec):
    """Bit planes of words of 8, 16 or 32 bits, in levels: sign and exponent come first.

    ``planes`` says how many planes each level holds, ``(9, 7)`` for example: bfloat16's sign and exponent, then its
    mantissa. They must add up to the word's bits. ``zstd`` (1..19) compresses each level. Words keep their places, so
    this codec is valid for permuted and packed pages. Bits that have not arrived read as zero.
    """

    codec_id: ClassVar[str] = "bitplane"
    wire_id: ClassVar[int] = 2

    def __init__(self, *, planes: Sequence[int] = (9, 7), zstd: int | None = None) -> None:
        cuts = tuple(planes)
        if not cuts or any(not isinstance(n, int) or n < 1 for n in cuts) or sum(cuts) not in _WORD_BITS:
            raise ConfigError(f"bitplane: planes must be positive and add up to 8, 16 or 32, not {planes!r}")
        if zstd is not None and (not isinstance(zstd, int) or not 1 <= zstd <= 19):
            raise ConfigError(f"bitplane: zstd must be a level from 1 to 19 or None, not {zstd!r}")
        self._planes = cuts
        self._zstd = zstd

    @property
    def levels(self) -> int:
        """As many as ``planes`` has entries."""
        return len(self._planes)

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def supports(self, spec: ChunkSpec) -> bool:
        """Any part; dtypes whose words have as many bits as there are planes."""
        return 8 * DTYPES[spec.dtype].itemsize == sum(self._planes)

    def get_config(self) -> dict[str, Any]:
        """``id``, ``planes`` and, if set, ``zstd``."""
        config: dict[str, Any] = {"id": self.codec_id, "planes": list(self._planes)}
        return config if self._zstd is None else {**config, "zstd": self._zstd}

    def max_encoded_size(self, spec: ChunkSpec, level: int) -> int:
        """The planes' bytes, or what Zstandard makes of them at worst, and the header."""
        self._check(spec, [level])
        size = self._planes[level] * _plane_bytes(spec)
        return _HEADER.size + (size if self._zstd is None else zstd_bound(size))

    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """See :meth:`Codec.encode`."""
        wanted = list(range(self.levels)) if levels is None else list(levels)
        self._check(spec, wanted)
        view, plane_bytes = view_of(spec, array), _plane_bytes(spec)
        payloads = [np.empty(_HEADER.size + self._planes[level] * plane_bytes, np.uint8) for level in wanted]
        planes = ffi.new("uint8_t *[]", 32)
        for level, payload in zip(wanted, payloads, strict=True):
            first, count = sum(self._planes[:level]), self._planes[level]
            _HEADER.pack_into(payload.data, 0, level, count, 0)
            for i in range(count):
                planes[first + i] = address(payload) + _HEADER.size + i * plane_bytes
        check(lib.lynx_bitplane_pack(view, spec.word_dtype.itemsize, *spec.shape, planes))
        if self._zstd is None:
            return [payload.data for payload in payloads]
        cut = _HEADER.size
        return [payload[:cut].tobytes() + zstd_compress(payload[cut:], self._zstd) for payload in payloads]

    def decode(self, spec: ChunkSpec, levels: Sequence[Buffer], out: Any | None, *, threads: int = 1) -> DecodeState:
        """See :meth:`Codec.decode`."""
        self._check(spec, range(len(levels)))
        if not levels:
            raise SpecError("bitplane: no levels to decode")
        view = None if out is None else view_of(spec, out, writable=True)
        bodies = [self._body(spec, level, payload) for level, payload in enumerate(levels)]
        if view is not None:
            plane_bytes = _plane_bytes(spec)
            planes = ffi.new("const uint8_t *[]", 32)
            first = 0
            for body in bodies:
                for start in range(0, body.nbytes, plane_bytes):
                    planes[first] = address(body, "const uint8_t *") + start
                    first += 1
            check(lib.lynx_bitplane_unpack(planes, view, spec.word_dtype.itemsize, *spec.shape))
        return DecodeState(len(levels) - 1, tuple(levels))

    def refine(
        self, spec: ChunkSpec, state: DecodeState, level: int, payload: Buffer, out: Any | None, *, threads: int = 1
    ) -> DecodeState:
        """See :meth:`Codec.refine`."""
        if level != state.level + 1:
            raise SpecError(f"bitplane: level {level} cannot follow level {state.level}")
        return self.decode(spec, [*state.payloads, payload], out, threads=threads)

    def _check(self, spec: ChunkSpec, levels: Sequence[int]) -> None:
        if not self.supports(spec):
            raise SpecError(f"bitplane: {sum(self._planes)} planes do not make a word of {spec.dtype}")
        if any(not 0 <= level < self.levels for level in levels):
            raise SpecError(f"bitplane: levels {list(levels)} of a codec with {self.levels}")

    def _body(self, spec: ChunkSpec, level: int, payload: Buffer) -> NDArray[np.uint8]:
        where = f"bitplane level {level}"
        view = np.frombuffer(payload, np.uint8)
        if view.nbytes < _HEADER.size:
            raise PayloadError(f"{where}: {view.nbytes} bytes hold no header (byte offset 0)")
        number, count, reserved = _HEADER.unpack_from(view.data)
        if (number, count, reserved) != (level, self._planes[level], 0):
            raise PayloadError(
                f"{where}: the header names level {number} of {count} planes, expected {self._planes[level]}"
                " (byte offset 0)"
            )
        size = self._planes[level] * _plane_bytes(spec)
        body = view[_HEADER.size :]
        if self._zstd is not None:
            return np.frombuffer(zstd_decompress(body, size, where), np.uint8)
        if body.nbytes != size:
            what = "truncated" if body.nbytes < size else "longer than its content"
            raise PayloadError(
                f"{where}: {what}: {body.nbytes} bytes of planes, expected {size}"
                f" (byte offset {_HEADER.size + min(body.nbytes, size)})"
            )
        return body


def _plane_bytes(spec: ChunkSpec) -> int:
    return (spec.words + 7) // 8
