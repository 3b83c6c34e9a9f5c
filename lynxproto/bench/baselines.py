"""Other people's ways to shrink a KV cache, as their sources describe them and with settings that make them strong.

Each is a :class:`lynxproto.quality.Method`. Quantisers work on float32 copies of bfloat16 words; the bytes that they
report are those of codes, scales and minima, entropy-coded where the source does so, without any framing.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import Part
from lynxproto.errors import MissingDependencyError, SpecError
from lynxproto.manifest import LayerSpec

__all__ = ["CacheGen", "Grouped", "QuantSpec", "floats", "words_of"]

_Floats = NDArray[np.floating[Any]]
#: Smallest scale: of a group whose values are all alike.
_TINY: Final = np.float32(1e-30)


def floats(words: NDArray[Any]) -> _Floats:
    """Values of bfloat16 words."""
    values: _Floats = (words.astype(np.uint32) << 16).view(np.float32)
    return values


def words_of(values: _Floats) -> NDArray[np.uint16]:
    """bfloat16 words of finite values, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    words: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return words


def _bfloat16(values: _Floats) -> _Floats:
    return floats(words_of(values))


def _grouped(values: _Floats, part: Part, group: int) -> _Floats:
    """Groups in the last axis: of tokens for keys, ``[heads, dim, groups, group]``; of channels for values."""
    if part == "key":
        missing = -values.shape[1] % group
        padded = np.concatenate([values, np.repeat(values[:, -1:], missing, 1)], 1) if missing else values
        values = padded.transpose(0, 2, 1)
    if values.shape[2] % group:
        raise SpecError(f"groups of {group} do not divide {values.shape[2]} channels")
    return np.ascontiguousarray(values).reshape(*values.shape[:2], -1, group)


def _ungrouped(groups: _Floats, part: Part, tokens: int) -> _Floats:
    flat = groups.reshape(*groups.shape[:2], -1)
    return flat.transpose(0, 2, 1)[:, :tokens] if part == "key" else flat


class Grouped:
    """KIVI's grouping (arXiv 2402.02750): keys per channel over ``group`` tokens, values per token over channels.

    Asymmetric, with a bfloat16 scale and minimum a group. The first ``sinks`` tokens stay exact, which KIVI does not
    do and which makes INT4 much better.
    """

    def __init__(self, bits: int, group: int = 64, sinks: int = 4) -> None:
        self.bits, self.group, self.sinks = bits, group, sinks

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Quantise and reconstruct."""
        body = floats(words[:, self.sinks :])
        groups = _grouped(body, part, self.group)
        low = _bfloat16(groups.min(-1, keepdims=True))
        top = 2**self.bits - 1
        scale = np.maximum(_bfloat16((groups.max(-1, keepdims=True) - low) / top), _TINY)
        codes = np.clip(np.round((groups - low) / scale), 0, top)
        out = words.copy()
        out[:, self.sinks :] = words_of(_ungrouped(codes * scale + low, part, body.shape[1]))
        return out, words[:, : self.sinks].nbytes + body.size * self.bits / 8 + low.size * 4


class QuantSpec:
    """QuantSpec's nesting (arXiv 2502.10424): a 4-bit code, and 4 bits more that refine it with the same scale.

    Keys per channel over ``group`` tokens, values per token over ``group`` channels (128 in the source; here at most
    head_dim); bfloat16 scale and minimum. The last ``recent`` tokens stay exact, as in its ring of new tokens.
    ``levels``: 1 is its draft, 2 its target.
    """

    def __init__(self, levels: int = 1, group: int = 128, recent: int = 128) -> None:
        self.levels, self.group, self.recent = levels, group, recent

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Quantise and reconstruct."""
        tokens = words.shape[1]
        stop = max(0, tokens - self.recent)
        body = floats(words[:, :stop])
        groups = _grouped(body, part, self.group if part == "key" else min(self.group, words.shape[2]))
        low = _bfloat16(groups.min(-1, keepdims=True))
        scale = np.maximum(_bfloat16((groups.max(-1, keepdims=True) - low) / 15), _TINY)
        upper = np.clip(np.round((groups - low) / scale), 0, 15)
        out = upper * scale + low
        if self.levels == 2:
            out += np.clip(np.round((groups - out) / (scale / 16)), -8, 7) * (scale / 16)
        result = words.copy()
        result[:, :stop] = words_of(_ungrouped(out, part, stop))
        return result, words[:, stop:].nbytes + body.size * self.levels / 2 + low.size * 4


class CacheGen:
    """CacheGen (SIGCOMM 2024): deltas to an anchor token, bins that grow with depth, range coding by layer and channel.

    Groups of ``group`` tokens; the first token of each is quantised to 8 bits, the others' differences to it to
    ``bins`` levels in the first, middle and last third of the layers. ``delta=False`` is what LMCache ships: no
    deltas, keys with these bins by third, values with ``value_bins`` in the first two layers and in the others.
    Symmetric, with one bfloat16 scale a token and head (vector-wise), as in its source. Probabilities are those of the
    very symbols, by layer, head and channel, and not counted: better than the profiled ones of the source.
    """

    def __init__(
        self,
        bins: tuple[int, int, int] = (32, 16, 16),
        value_bins: tuple[int, int] = (32, 16),
        group: int = 10,
        *,
        delta: bool = False,
        layers: int = 30,
    ) -> None:
        try:
            import constriction
        except ImportError as error:
            raise MissingDependencyError(
                "the CacheGen baseline needs constriction; run: pip install 'lynxproto[bench]'"
            ) from error
        self._coder = constriction.stream
        self.bins, self.value_bins, self.group, self.delta, self.layers = bins, value_bins, group, delta, layers

    def _levels(self, layer: int, part: Part) -> int:
        if part == "value" and not self.delta:
            return self.value_bins[layer >= 2]
        return self.bins[min(2, 3 * layer // self.layers)]

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Quantise, code and reconstruct."""
        values = floats(words)
        bins = self._levels(layer.index, part)
        nbytes = 0.0
        if self.delta:
            first = np.arange(values.shape[1]) // self.group * self.group
            anchors, size = self._quantise(values[:, :: self.group], 256)
            nbytes += size
            base = anchors[:, first // self.group]
            rest = first != np.arange(values.shape[1])
            out = base.copy()
            deltas, size = self._quantise(values[:, rest] - base[:, rest], bins)
            out[:, rest] += deltas
        else:
            out, size = self._quantise(values, bins)
        return words_of(out), nbytes + size

    def _quantise(self, values: _Floats, bins: int) -> tuple[_Floats, float]:
        top = bins // 2 - 1
        scale = np.maximum(_bfloat16(np.abs(values).max(2, keepdims=True) / top), _TINY)
        codes = np.clip(np.round(values / scale), -top - 1, top)
        symbols = (codes + top + 1).astype(np.int32)
        encoder = self._coder.queue.RangeEncoder()
        for head in symbols:
            for channel in np.ascontiguousarray(head.T):
                counts = np.bincount(channel, minlength=bins).astype(np.float32)
                if counts.max() < channel.size:  # a channel of one symbol takes nothing
                    encoder.encode(channel, self._coder.model.Categorical(counts / counts.sum(), perfect=False))
        return codes * scale, encoder.get_compressed().nbytes + scale.size * 2
