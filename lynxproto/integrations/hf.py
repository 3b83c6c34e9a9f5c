"""Hugging Face transformers 5.x: ``docs/embedding/transformers.md``."""

from __future__ import annotations

from lynxproto.integrations.hf_model import as_array, as_tensor, make_identity, make_manifest, weights_revision
from lynxproto.integrations.hf_words import HFEngine, WordCache

__all__ = [
    "HFEngine",
    "WordCache",
    "as_array",
    "as_tensor",
    "make_identity",
    "make_manifest",
    "weights_revision",
]
