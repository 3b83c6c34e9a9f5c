"""Watching a transformers model's attention: how much each cached token is attended to, without the whole matrix.

Works through transformers' table of attention functions, which all models with caches of this kind consult. The
attention itself still runs in whatever kernel the model uses; what is recorded is computed beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import ConfigError, SpecError

__all__ = ["AttentionMass", "require_layers", "watch_attention"]

#: Called with a layer's index, queries ``[heads, new tokens, dim]``, keys ``[kv_heads, all tokens, dim]``, the mask
#: (or None) and the other arguments of the attention function.
Observe = Callable[[int, Any, Any, Any, dict[str, Any]], None]

#: Scores that are held at a time.
_CHUNK_SCORES: Final = 1 << 24


@contextmanager
def watch_attention(model: Any, observe: Observe) -> Iterator[None]:
    """Call ``observe`` for each attention of the model's forwards, before the attention runs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    registered = ALL_ATTENTION_FUNCTIONS.get(implementation)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kwargs: Any) -> Any:
        observe(module.layer_idx, query[0], key[0], mask, kwargs)
        # "eager" is in no table: each model's module has its own.
        function = registered or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS[implementation] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]


def require_layers(seen: Any, count: int, model: Any) -> None:
    """Raise :class:`~lynxproto.errors.SpecError` unless all ``count`` layers were seen."""
    if sorted(seen) != list(range(count)):
        raise SpecError(
            f"saw the attention of layers {sorted(seen)} out of {count}: {type(model).__name__} does not go through "
            "transformers' attention interface; use importance by key norms or by position instead"
        )


class AttentionMass:
    """Records how much attention each token gets: a function for :func:`watch_attention`.

    ``mass[layer]`` is ``[kv_heads, tokens]``, float64: the sum over query heads that share the KV head of attention
    from the last ``queries`` positions of the forwards so far (None: from all). ``squares[layer]``: of its square,
    which is what independent errors of the tokens' values add up by. Memory: a few MB of scores at a time, never all.
    ``on_layer`` gets a layer's index and mass as soon as both are known: after its K and V entered the cache, before
    its attention ran.
    """

    def __init__(
        self, queries: int | None = 64, on_layer: Callable[[int, NDArray[np.float64]], None] | None = None
    ) -> None:
        if queries is not None and queries < 1:
            raise ConfigError(f"attention of the last {queries} queries cannot be measured; ask for at least 1")
        self.queries = queries
        self.on_layer = on_layer
        self.mass: dict[int, NDArray[np.float64]] = {}
        self.squares: dict[int, NDArray[np.float64]] = {}

    def __call__(self, layer: int, query: Any, key: Any, mask: Any, options: dict[str, Any]) -> None:
        """Add one forward's attention in ``layer``."""
        import torch

        heads, new, dim = query.shape
        kv_heads, tokens, _ = key.shape
        first = 0 if self.queries is None else max(0, new - self.queries)
        scaling = options.get("scaling") or dim**-0.5
        softcap = options.get("softcap")
        step = max(1, _CHUNK_SCORES // (heads * tokens))
        places = torch.arange(tokens, device=key.device)
        sums = torch.zeros(2, kv_heads, tokens, dtype=torch.float64, device=key.device)
        for start in range(first, new, step):
            stop = min(start + step, new)
            grouped = query[:, start:stop].reshape(kv_heads, -1, dim)  # heads that share a KV head are neighbours
            scores = (grouped.float() @ key.float().transpose(1, 2)).mul_(scaling)
            scores = scores.view(heads, stop - start, tokens)
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            if mask is None:
                hidden = places > (tokens - new + torch.arange(start, stop, device=key.device))[:, None]
                scores.masked_fill_(hidden, -torch.inf)
            else:
                shown = mask[0, :, start:stop, :tokens]
                scores = scores.masked_fill_(~shown, -torch.inf) if shown.dtype == torch.bool else scores + shown
            attention = torch.softmax(scores, -1).view(kv_heads, -1, tokens)
            sums[0] += attention.sum(1)
            sums[1] += attention.square_().sum(1)
        self._add(self.mass, layer, sums[0])
        self._add(self.squares, layer, sums[1])
        if self.on_layer is not None:
            self.on_layer(layer, self.mass[layer])

    def _add(self, into: dict[int, NDArray[np.float64]], layer: int, sums: Any) -> None:
        new: NDArray[np.float64] = sums.cpu().numpy()
        before = into.get(layer)
        if self.queries is None and before is not None and before.shape[1] <= new.shape[1]:
            new[:, : before.shape[1]] += before
        into[layer] = new
