"""``bitplane`` for torch tensors on any device: the bytes of :mod:`lynxproto.codecs.bitplane`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

from lynxproto.chunk import ChunkSpec
from lynxproto.codecs._torch import (
    Tensor,
    TorchState,
    bytes_on,
    payload_tensors,
    tensor_words,
    torch,
    transpose_bits,
)
from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.codecs.bitplane import Bitplane
from lynxproto.errors import ConfigError, PayloadError, SpecError

__all__ = ["TorchBitplane"]

_HEADER: Final = struct.Struct("<BBH")  # level, planes, reserved


class TorchBitplane(Bitplane):
    """:class:`~lynxproto.codecs.bitplane.Bitplane` for torch tensors, with the same config, payloads and words.

    Tensors and payloads are as those of :class:`~lynxproto.codecs.hq_torch.TorchHQ`. There is no Zstandard on devices:
    ``zstd`` is refused.
    """

    def __init__(self, *, planes: Sequence[int] = (9, 7), zstd: int | None = None) -> None:
        if zstd is not None:
            raise ConfigError("bitplane: Zstandard needs the CPU: use the codec for arrays, or leave zstd out")
        super().__init__(planes=planes)

    @classmethod
    def of(cls, codec: Codec) -> TorchBitplane:
        """The torch twin of a bitplane codec."""
        config = codec.get_config()
        if config.pop("id") != cls.codec_id:
            raise ConfigError(f"{codec!r} is no bitplane codec")
        return cls(**config)

    def encode(
        self, spec: ChunkSpec, array: Any, *, levels: Sequence[int] | None = None, threads: int = 1
    ) -> list[Buffer]:
        """See :meth:`Codec.encode`; payloads are uint8 tensors."""
        wanted = list(range(self.levels)) if levels is None else list(levels)
        self._check(spec, wanted)
        words = tensor_words(spec, array).reshape(-1)
        width = words.element_size()
        octets = -(-spec.words // 8)
        data = torch.zeros(8 * octets * width, dtype=torch.uint8, device=words.device)
        data[: spec.nbytes] = words.view(torch.uint8)
        bits = transpose_bits(data.reshape(octets, 8, width).permute(2, 0, 1))  # [byte of a word, octet, bit]
        planes = bits.transpose(1, 2).reshape(8 * width, octets).flip(0)
        payloads: list[Buffer] = []
        for level in wanted:
            first, count = sum(self._planes[:level]), self._planes[level]
            header = bytes_on(_HEADER.pack(level, count, 0), words.device)
            payloads.append(torch.cat([header, planes[first : first + count].reshape(-1)]))
        return payloads

    def decode(self, spec: ChunkSpec, levels: Sequence[Buffer], out: Any | None, *, threads: int = 1) -> DecodeState:
        """See :meth:`Codec.decode`."""
        self._check(spec, range(len(levels)))
        if not levels:
            raise SpecError("bitplane: no levels to decode")
        words = None if out is None else tensor_words(spec, out)
        bodies = [self._planes_in(spec, level, payload) for level, payload in enumerate(payload_tensors(levels, words))]
        if words is not None:
            width, octets = words.element_size(), -(-spec.words // 8)
            planes = torch.zeros(8 * width, octets, dtype=torch.uint8, device=words.device)
            known = torch.cat(bodies).reshape(-1, octets)
            planes[: len(known)] = known
            bits = planes.flip(0).reshape(width, 8, octets).transpose(1, 2)
            data = transpose_bits(bits).permute(1, 2, 0).reshape(-1)[: spec.nbytes]
            words.copy_(data.view(words.dtype).reshape(spec.shape))
        return TorchState(len(levels) - 1, tuple(levels))

    def _planes_in(self, spec: ChunkSpec, level: int, payload: Tensor) -> Tensor:
        """A level's planes, one after another."""
        where = f"bitplane level {level}"
        size = payload.numel()
        if size < _HEADER.size:
            raise PayloadError(f"{where}: {size} bytes hold no header (byte offset 0)")
        if _HEADER.unpack(bytes(payload[: _HEADER.size].tolist())) != (level, self._planes[level], 0):
            raise PayloadError(
                f"{where}: the header is not that of level {level} with {self._planes[level]} planes (byte offset 0)"
            )
        expected = self.max_encoded_size(spec, level)
        if size != expected:
            what = "truncated" if size < expected else "longer than its content"
            raise PayloadError(
                f"{where}: {what}: {size} bytes, expected {expected} (byte offset {min(size, expected)})"
            )
        return payload[_HEADER.size :]
