"""What codecs for torch tensors share: torch or an error that says how to get it, tensors in and out, bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from lynxproto.chunk import ChunkSpec
from lynxproto.codecs.abc import Buffer, DecodeState
from lynxproto.errors import MissingDependencyError, SpecError

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise MissingDependencyError(
        f'codecs for torch tensors need torch ({error}); run: pip install "lynxproto[torch]"'
    ) from error

__all__ = ["Tensor", "TorchState", "bytes_on", "payload_tensors", "tensor_words", "torch", "transpose_bits"]

_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class TorchState(DecodeState):
    """A :class:`DecodeState` of payloads that may be tensors."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads that are kept."""
        return sum(p.numel() if isinstance(p, Tensor) else memoryview(p).nbytes for p in self.payloads)


def tensor_words(spec: ChunkSpec, tensor: Any) -> Tensor:
    """A tensor's words as integers, in place. Raises SpecError for one that does not match ``spec``."""
    if not isinstance(tensor, Tensor):
        raise SpecError(f"a codec for torch takes torch tensors, not {type(tensor).__name__}")
    if tuple(tensor.shape) != spec.shape:
        raise SpecError(f"tensor has shape {tuple(tensor.shape)}, the spec {spec.shape}")
    if tensor.element_size() != spec.word_dtype.itemsize:
        raise SpecError(f"tensor dtype {tensor.dtype} does not hold {spec.dtype} words")
    return tensor.detach().view(_WORDS[tensor.element_size()])


def payload_tensors(levels: Sequence[Buffer], words: Tensor | None) -> list[Tensor]:
    """Payloads as uint8 tensors on the output's device, or that of the first tensor; bytes are copied there."""
    tensors = [payload for payload in levels if isinstance(payload, Tensor)]
    device = words.device if words is not None else tensors[0].device if tensors else torch.device("cpu")
    for payload in tensors:
        if payload.dtype != torch.uint8 or payload.dim() != 1:
            raise SpecError(f"a payload is a uint8 tensor of one dimension, not {payload.dtype} of {payload.dim()}")
        if payload.device != device:
            raise SpecError(f"a payload is on {payload.device}, the output or another payload on {device}")
    return [p if isinstance(p, Tensor) else bytes_on(p, device) for p in levels]


def bytes_on(data: Buffer, device: torch.device) -> Tensor:
    """A copy of bytes on a device."""
    copy = bytearray(memoryview(data).cast("B"))
    if not copy:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(copy, dtype=torch.uint8).to(device)


def transpose_bits(rows: Tensor) -> Tensor:
    """Each 8 bytes along the last dimension as an 8 x 8 matrix of bits (byte = row), transposed."""
    x = rows.reshape(-1).view(torch.int64)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        t = (x ^ (x >> shift)) & mask  # the mask drops what the shift copies from the sign
        x = x ^ t ^ (t << shift)
    return x.view(torch.uint8).reshape(rows.shape)
