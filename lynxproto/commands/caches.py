"""Caches in files, whatever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lynxproto.cachefile import Cache, load_cache
from lynxproto.errors import CacheFileError

__all__ = ["SUFFIXES", "open_cache"]

_TORCH: Final = (".pt", ".pth")
SUFFIXES: Final = (".safetensors", *_TORCH)


def open_cache(path: Path, model: str | None, revision: str) -> Cache:
    """A dump, or a DynamicCache that torch.save wrote; of that ``model`` must be told.

    Raises :class:`~lynxproto.errors.CacheFileError`.
    """
    if path.suffix not in _TORCH:
        return load_cache(path)
    if model is None:
        raise CacheFileError(f"{path} is a file of torch and does not say whose cache it holds; give --model")
    from lynxproto.integrations.hf.dynamic import load_dynamic
    from lynxproto.manifest import Identity

    return load_dynamic(path, Identity(model=model, revision=revision))
