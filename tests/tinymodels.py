"""Small transformers models with random weights, of the kinds of caches that there are."""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `hf` is not installed")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="the extra `hf` is not installed")

torch.set_num_threads(1)  # small matrices; on a busy machine several threads wait for each other

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
    "initializer_range": 0.3,
}  # fmt: skip
_ROPE = {**_COMMON, "intermediate_size": 64, "max_position_embeddings": 512}
_UNTIED = {"tie_word_embeddings": False}  # else each token follows itself, whatever the cache holds
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

#: Name -> config class, model class, their arguments.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_ROPE, "num_key_value_heads": 2}),
    "mistral": (
        "MistralConfig", "MistralForCausalLM", {**_ROPE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
    ),
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {**_ROPE, **_MIXED, "num_key_value_heads": 1, "head_dim": 16, **_UNTIED},
    ),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _ROPE),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_COMMON, "multi_query": True}),
    "bigcode": (
        "GPTBigCodeConfig", "GPTBigCodeForCausalLM",
        {
            "vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 512, "multi_query": True,
            "initializer_range": 0.3,
        },
    ),
    #: Its last two layers keep no K and V; full layers have other head sizes than sliding ones.
    "gemma4": (
        "Gemma4TextConfig", "Gemma4ForCausalLM",
        {
            **_ROPE, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
            "sliding_window": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16, **_UNTIED,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip


@functools.cache
def tiny(kind: str, dtype: str = "float32", seed: int = 0) -> Any:
    """A model of ``kind``, ready for inference; the same object each time."""
    config, model, arguments = KINDS[kind]
    for name in (config, model):
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(seed)
    fewer = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    made = getattr(transformers, model)(getattr(transformers, config)(**arguments, **fewer))
    return made.to(getattr(torch, dtype)).eval()


def prompt(tokens: int, seed: int = 0) -> Any:
    """Random token ids, ``[1, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (1, tokens), generator=generator)


def prefilled(model: Any, ids: Any) -> tuple[Any, int]:
    """The stock cache of a prompt, and the greedy token after it."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
    return cache, int(logits[0, -1].argmax())
