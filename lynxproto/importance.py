"""Which tokens of a prompt matter: from attention, from key norms, or from position alone.

An importance is ``I_j = A_j * exp(-decay * (n - j))`` with ``A_j`` from what is known of token j's attention
(SpectrumKV, arXiv 2606.08635). All functions take and give plain arrays; tokens are the last axis.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import SpecError

__all__ = ["by_position", "checked", "decayed", "from_key_norms", "key_norms", "shares"]

#: Of the heuristic without any measurement, as SpectrumKV's code has it.
_SINKS: Final = 4
_EARLY_RATE: Final = 0.01
_LATE_SHARE: Final = 0.2
_LATE: Final = (0.3, 0.8)


def checked(importance: Any, tokens: int) -> NDArray[np.float64]:
    """``importance`` as float64 ``[..., tokens]``.

    Raises :class:`~lynxproto.errors.SpecError` for another number of tokens, and for negative or infinite entries.
    """
    array = np.asarray(importance, np.float64)
    if array.ndim < 1 or array.shape[-1] != tokens:
        raise SpecError(f"importance has shape {array.shape}; its last axis must be the layer's {tokens} tokens")
    if not np.isfinite(array).all() or (array < 0).any():
        raise SpecError("importance must be finite and not negative")
    return array


def decayed(attention: NDArray[np.float64], decay: float = 0.0) -> NDArray[np.float64]:
    """``A_j * exp(-decay * (n - j))``."""
    tokens = attention.shape[-1]
    found: NDArray[np.float64] = attention * np.exp(-decay * (tokens - np.arange(tokens)))
    return found


def by_position(tokens: int) -> NDArray[np.float64]:
    """SpectrumKV's guess when nothing is known: sinks 1, then falling from the start; the last fifth rising."""
    importance: NDArray[np.float64] = np.exp(-_EARLY_RATE * np.arange(tokens))
    late = min(tokens, int(tokens * _LATE_SHARE))
    if late:
        importance[tokens - late :] = np.maximum(importance[tokens - late :], np.linspace(*_LATE, late))
    importance[:_SINKS] = 1.0
    return importance


def key_norms(words: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """Euclidean norms of keys ``[kv_heads, tokens, key_dim]``, given as words of ``dtype``: ``[kv_heads, tokens]``.

    Raises :class:`~lynxproto.errors.SpecError` for a dtype whose words are no 16 or 32-bit floats.
    """
    if dtype == "bfloat16":
        values = (words.astype(np.uint32) << 16).view(np.float32)
    elif dtype in ("float16", "float32"):
        values = words.view(np.dtype(dtype))
    else:
        raise SpecError(f"key norms need bfloat16, float16 or float32 keys, not {dtype}")
    norms: NDArray[np.float64] = np.sqrt(np.einsum("htd,htd->ht", values, values, dtype=np.float64))
    return norms


def from_key_norms(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Importance from key norms ``[..., tokens]``: small keys get much attention (arXiv 2406.11430).

    A head's score is how many standard deviations its key is smaller than the mean, as a power of e.
    """
    spread = norms.std(-1, keepdims=True)
    z = (norms - norms.mean(-1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    found: NDArray[np.float64] = np.exp(-np.clip(z, -8, 8))
    return found


def shares(importance: NDArray[np.float64], floor: float = 0.0) -> NDArray[np.float64]:
    """Importances scaled to a mean of 1, with ``floor`` of it even: what was not attended to yet may be later.

    A row of zeros becomes even.
    """
    mean = importance.mean(-1, keepdims=True)
    scaled = np.where(mean > 0, importance / np.where(mean > 0, mean, 1.0), 1.0)
    mixed: NDArray[np.float64] = (1 - floor) * scaled + floor
    return mixed
