"""Which packing this instance's attention backend uses: learned from its own kernel on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lynxproto.errors import SpecError
from lynxproto.integrations.vllm.pages import Packing, learn_packing

__all__ = ["cpu_packing", "packing_of"]


def packing_of(spec: Any, cache_dtype: str, caches: Mapping[str, Any]) -> Packing:
    """The packing of the caches that vLLM registered; ``spec`` is their KVCacheSpec.

    Raises :class:`~lynxproto.errors.SpecError` for caches that are not K and V of attention, all alike.
    """
    if not caches:
        raise SpecError("vLLM registered no KV caches")
    if not hasattr(spec, "head_size_v") or getattr(spec, "tokens_per_state", 1) != 1:
        raise SpecError(f"layers of {type(spec).__name__} cannot be transferred; only K and V of attention can")
    shapes = {(tuple(cache.shape[1:]), cache.dtype, cache.device.type) for cache in caches.values()}
    if len(shapes) != 1:
        raise SpecError(f"the layers' KV caches differ: {sorted(map(str, shapes))}; such models cannot be transferred")
    ((_, tokens, content), dtype, device) = next(iter(shapes))
    if device != "cpu":
        raise SpecError(f"the KV cache lives on {device}; only caches in CPU memory can be transferred so far")
    if not content == 2 * spec.head_size == 2 * spec.head_size_v:
        raise SpecError(
            f"a KV cache of {content} words a token, K of {spec.head_size} and V of {spec.head_size_v}, cannot be "
            "transferred; only K and V of the same size can"
        )
    return cpu_packing(dtype, tokens, spec.head_size, cache_dtype)


def cpu_packing(dtype: Any, tokens: int, head_dim: int, cache_dtype: str = "auto", isa: str | None = None) -> Packing:
    """What vLLM's CPU kernels make of pages of ``tokens`` tokens; ``isa`` as vLLM names it (default: what it uses)."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = isa or _get_attn_isa(dtype, tokens, head_dim, cache_dtype)

    def store(blocks: Any, key: Any, value: Any) -> None:
        # As CPUAttentionBackendImpl.do_kv_cache_update calls it.
        count, heads, _, _ = blocks.shape
        key_cache, value_cache = blocks.view(count, heads, 2 * tokens, head_dim).chunk(2, dim=2)
        slots = torch.arange(tokens, dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(
            key, value, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=cache_dtype
        )

    return learn_packing(store, dtype, tokens, head_dim, head_dim)
