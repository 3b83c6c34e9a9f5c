"""Stores keys and values as vLLM's CPU kernels were seen to: ``vec`` transposes K of a page, ``amx`` pairs words."""

from __future__ import annotations

from typing import Any


def cpu_attn_reshape_and_cache(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    isa: str,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    kv_cache_dtype: str = "auto",
) -> None:
    _, heads, tokens, dim = key_cache.shape
    for slot, k, v in zip(slot_mapping.tolist(), key, value, strict=True):
        block, token = divmod(slot, tokens)
        for head in range(heads):
            k_page = key_cache[block, head].view(-1)
            v_page = value_cache[block, head].view(-1)
            if isa == "vec":
                k_page.view(dim, tokens)[:, token] = k[head]
                v_page.view(tokens, dim)[token] = v[head]
            elif isa == "amx":
                k_page.view(tokens // 16, dim // 2, 16, 2)[token // 16, :, token % 16] = k[head].view(dim // 2, 2)
                v_page.view(dim // 16, tokens // 2, 16, 2)[:, token // 2, :, token % 2] = v[head].view(dim // 16, 16)
            else:
                raise NotImplementedError(isa)
