"""DynamicCache of transformers to and from files, and to and from :class:`~lynxproto.cachefile.Cache`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from lynxproto.cachefile import Arrays, Cache, save_cache
from lynxproto.errors import CacheFileError, SpecError
from lynxproto.integrations import hf  # says what to install if torch or transformers is missing
from lynxproto.manifest import Identity, LayerSpec, Manifest

import torch  # isort: skip  # after hf, whose error names the extra
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer  # isort: skip

__all__ = ["cache_of", "dynamic_of", "load_dynamic", "save_dynamic"]

_DTYPES: Final = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def cache_of(dynamic: Any, identity: Identity, *, request_id: str = "") -> Cache:
    """The words of a DynamicCache of one sequence (or of a list of (keys, values) ``[1, heads, tokens, head_dim]``).

    The arrays are views of its tensors. Raises :class:`~lynxproto.errors.SpecError` for what is not K and V of
    attention layers, a batch, an empty layer, or tensors that are not on the CPU.
    """
    layers: list[LayerSpec] = []
    arrays: Arrays = {}
    dtypes = set()
    prompt = 0
    for index, (keys, values, seen, kind) in enumerate(_layers(dynamic)):
        if keys.shape[0] != 1 or keys.shape[:3] != values.shape[:3]:
            raise SpecError(f"layer {index}: keys {tuple(keys.shape)} and values {tuple(values.shape)} are no sequence")
        dtypes |= {keys.dtype, values.dtype}
        if not dtypes <= set(_DTYPES):
            break
        prompt = max(prompt, seen)
        layers.append(
            LayerSpec(
                index=index,
                kv_heads=keys.shape[1],
                key_dim=keys.shape[3],
                value_dim=values.shape[3],
                token_start=seen - keys.shape[2],
                token_stop=seen,
                kind=kind,
            )
        )
        arrays[index, "key"], arrays[index, "value"] = hf.as_array(keys[0]), hf.as_array(values[0])
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        found = ", ".join(sorted(map(str, dtypes))) or "no layers"
        raise SpecError(f"a cache has one dtype of {', '.join(_DTYPES.values())}, not {found}")
    (dtype,) = dtypes
    manifest = Manifest(
        identity=identity, dtype=_DTYPES[dtype], layers=tuple(layers), prompt_tokens=prompt, request_id=request_id
    )
    return Cache(manifest=manifest, arrays=arrays)


def _layers(dynamic: Any) -> list[tuple[torch.Tensor, torch.Tensor, int, str]]:
    """Keys, values, tokens seen and kind of each layer."""
    if isinstance(dynamic, (list, tuple)):
        pairs = [tuple(layer)[:2] for layer in dynamic]
        return [(keys, values, keys.shape[2], "full") for keys, values in pairs]
    if not isinstance(dynamic, DynamicCache):
        raise SpecError(f"expected a DynamicCache or a list of (keys, values), not {type(dynamic).__name__}")
    found = []
    for index, layer in enumerate(dynamic.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise SpecError(
                f"layer {index} keeps its state in {type(layer).__name__}; only attention can be transferred"
            )
        if not getattr(layer, "is_initialized", layer.keys is not None) or layer.keys.numel() == 0:
            raise SpecError(f"layer {index} holds no tokens")
        sliding = type(layer) is DynamicSlidingWindowLayer
        seen = layer.get_seq_length() if sliding else layer.keys.shape[2]
        found.append((layer.keys, layer.values, int(seen), "sliding" if sliding else "full"))
    return found


def dynamic_of(cache: Cache, config: Any = None) -> DynamicCache:
    """A DynamicCache with the cache's values (copied); ``config`` of a model with sliding layers tells their windows.

    Raises :class:`~lynxproto.errors.SpecError` for sliding layers without ``config``, and for packed parts.
    """
    dynamic = DynamicCache(config=config) if config is not None else DynamicCache()
    for layer in cache.manifest.layers:
        if layer.parts != ("key", "value") or (layer.kind != "full" and config is None):
            raise SpecError(f"layer {layer.index}: {layer.kind} {layer.parts}; give the model's config")
        keys, values = (
            hf.as_tensor(cache.arrays[layer.index, part], cache.manifest.dtype)[None] for part in ("key", "value")
        )
        dynamic.update(keys, values, layer.index)
        if layer.token_start:
            dynamic.layers[layer.index].cumulative_length = layer.token_stop
    return dynamic


def save_dynamic(
    path: str | Path, dynamic: Any, identity: Identity, *, on_progress: Callable[[int, int], object] | None = None
) -> Path:
    """Dump a DynamicCache as a file that :func:`~lynxproto.cachefile.load_cache` and `lynxproto send` read."""
    return save_cache(path, cache_of(dynamic, identity, request_id=Path(path).stem), on_progress=on_progress)


def load_dynamic(path: str | Path, identity: Identity) -> Cache:
    """The cache that ``torch.save`` wrote: a DynamicCache, or a list of (keys, values). Nothing in it is executed.

    Raises :class:`~lynxproto.errors.CacheFileError`. For dumps: ``dynamic_of(load_cache(path))``.
    """
    try:
        with torch.serialization.safe_globals([DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, torch.device]):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for broken files
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheFileError(f"cannot read {path} as a cache that torch.save wrote: {text}") from error
    try:
        return cache_of(held, identity, request_id=Path(path).stem)
    except SpecError as error:
        raise CacheFileError(f"{path}: {error}") from error
