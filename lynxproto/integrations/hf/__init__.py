"""Hugging Face transformers 5.x: ``docs/embedding/transformers.md``."""

from __future__ import annotations

from lynxproto.integrations.hf.cache import CacheReceiver, IncomingCache, LynxCache
from lynxproto.integrations.hf.generate import decode_arriving, generate
from lynxproto.integrations.hf.model import as_array, make_identity, make_manifest, weights_revision
from lynxproto.integrations.hf.words import HFEngine, WordCache

__all__ = [
    "CacheReceiver",
    "HFEngine",
    "IncomingCache",
    "LynxCache",
    "WordCache",
    "as_array",
    "decode_arriving",
    "generate",
    "make_identity",
    "make_manifest",
    "weights_revision",
]
