"""transformers' caches to and from :class:`~lynxproto.cachefile.Cache`, and out of files that torch.save wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lynxproto.cachefile import Arrays, Cache
from lynxproto.errors import CacheFileError, SpecError
from lynxproto.integrations.hf.model import (  # says what to install if torch or transformers is missing
    DTYPES,
    NAMES,
    DummyLayer,
    as_array,
)
from lynxproto.integrations.hf.words import WordCache
from lynxproto.manifest import Identity, LayerSpec, Manifest

import torch  # isort: skip  # after model, whose error names the extra
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer  # isort: skip  # the same

__all__ = ["cache_of", "dynamic_of", "empty_dynamic", "load_dynamic"]


def cache_of(
    held: Any,
    identity: Identity,
    *,
    request_id: str = "",
    first_token: int | None = None,
    logit_gap: float | None = None,
) -> Cache:
    """The words of a DynamicCache or WordCache of one sequence, or of (keys, values) ``[1, heads, tokens, head_dim]``.

    The arrays are views of its tensors (copies if those are on a device). Layers that keep no K and V of their own are
    left out; of a sliding layer goes what it holds. Raises :class:`~lynxproto.errors.SpecError` for what is not K and V
    of attention layers, a batch, or a cache without tokens.
    """
    layers: list[LayerSpec] = []
    arrays: Arrays = {}
    dtypes: set[torch.dtype] = set()
    for index, keys, values, seen, kind in _layers(held):
        if keys.shape[0] != 1:
            raise SpecError(
                f"layer {index}: a batch of {keys.shape[0]} sequences; a transfer holds one: take each by itself "
                "(copy.deepcopy, then batch_select_indices)"
            )
        if keys.shape[:3] != values.shape[:3] or not keys.numel():
            raise SpecError(f"layer {index}: keys {tuple(keys.shape)} and values {tuple(values.shape)} are no sequence")
        dtypes |= {keys.dtype, values.dtype}
        if not dtypes <= set(NAMES):
            break
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
        arrays[index, "key"], arrays[index, "value"] = (as_array(states[0].detach().cpu()) for states in (keys, values))
    if len(dtypes) != 1 or not dtypes <= set(NAMES):
        found = ", ".join(sorted(map(str, dtypes))) or "no tokens"
        raise SpecError(f"a cache has one dtype of {', '.join(DTYPES)}, not {found}")
    if len(counts := {layer.token_stop for layer in layers}) > 1:
        raise SpecError(f"the cache's layers have seen different numbers of tokens: {sorted(counts)}")
    manifest = Manifest(
        identity=identity,
        dtype=NAMES[dtypes.pop()],
        layers=tuple(layers),
        prompt_tokens=layers[0].token_stop,
        request_id=request_id,
    )
    return Cache(manifest=manifest, arrays=arrays, first_token=first_token, logit_gap=logit_gap)


def _layers(held: Any) -> list[tuple[int, torch.Tensor, torch.Tensor, int, str]]:
    """Index, keys, values, tokens seen and kind of each layer that holds some."""
    if isinstance(held, (list, tuple)):
        pairs = [tuple(layer)[:2] for layer in held]
        return [(index, keys, values, keys.shape[2], "full") for index, (keys, values) in enumerate(pairs)]
    if isinstance(held, WordCache):
        return list(held.held_words())
    if not isinstance(held, DynamicCache):
        raise SpecError(f"expected a DynamicCache or a list of (keys, values), not {type(held).__name__}")
    found = []
    for index, layer in enumerate(held.layers):
        if DummyLayer is not None and type(layer) is DummyLayer:
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise SpecError(
                f"layer {index} keeps its state in {type(layer).__name__}; only attention can be transferred"
            )
        if not getattr(layer, "is_initialized", layer.keys is not None) or layer.keys is None:
            continue  # it reads another layer's
        sliding = type(layer) is DynamicSlidingWindowLayer
        seen = layer.get_seq_length() if sliding else layer.keys.shape[2]
        found.append((index, layer.keys, layer.values, int(seen), "sliding" if sliding else "full"))
    return found


def empty_dynamic(manifest: Manifest, config: Any = None, device: Any = "cpu") -> tuple[DynamicCache, Arrays]:
    """A DynamicCache of what ``manifest`` describes, and its words ``[kv_heads, tokens, head_dim]``, to be filled.

    ``config``: of the model; needed where it has sliding layers. On another ``device`` than the CPU there are no views:
    raises :class:`~lynxproto.errors.SpecError`, as for packed parts.
    """
    dynamic = DynamicCache(config=config) if config is not None else DynamicCache()
    arrays: Arrays = {}
    dtype = DTYPES.get(manifest.dtype)
    for spec in manifest.layers:
        if spec.parts != ("key", "value") or dtype is None or (spec.kind != "full" and config is None):
            raise SpecError(
                f"layer {spec.index}: {spec.kind} {spec.parts} of {manifest.dtype}; "
                "for sliding layers give the model's config"
            )
        pair = [
            torch.empty((1, spec.kv_heads, spec.tokens, dim), dtype=dtype, device=device)
            for dim in (spec.key_dim, spec.value_dim)
        ]
        arrays[spec.index, "key"], arrays[spec.index, "value"] = (as_array(states[0]) for states in pair)
        while config is None and len(dynamic.layers) <= spec.index:
            dynamic.layers.append(DynamicLayer())
        if spec.index >= len(dynamic.layers):
            raise SpecError(f"layer {spec.index}: the model has {len(dynamic.layers)} layers")
        put_layer(dynamic.layers[spec.index], pair, spec.token_stop)
    return dynamic, arrays


def put_layer(layer: Any, pair: Sequence[torch.Tensor], seen: int) -> None:
    """Let a layer of a stock cache hold ``pair``, the last of ``seen`` tokens; a sliding one shows its window."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise SpecError(f"a {type(layer).__name__} holds no keys and values of its own")
    layer.lazy_initialization(*pair)
    held = pair[0].shape[2]
    kept = min(held, seen)
    if type(layer) is DynamicSlidingWindowLayer:
        kept = min(seen, layer.sliding_window - 1)
        layer.cumulative_length = seen
    if kept > held or (held < seen and type(layer) is DynamicLayer):
        raise SpecError(f"{held} tokens are too few: after {seen} tokens this layer needs {kept}")
    layer.keys, layer.values = (states[:, :, held - kept :] for states in pair)


def dynamic_of(cache: Cache, config: Any = None, *, on_progress: Any = None) -> DynamicCache:
    """A DynamicCache with the cache's values (copied); ``config`` as in :func:`empty_dynamic`.

    ``on_progress(done, total)`` is called with bytes after each array.
    """
    dynamic, arrays = empty_dynamic(cache.manifest, config)
    done = 0
    for place, words in arrays.items():
        words[...] = cache.arrays[place]
        done += words.nbytes
        if on_progress is not None:
            on_progress(done, cache.manifest.nbytes)
    return dynamic


def load_dynamic(path: str | Path, identity: Identity) -> Cache:
    """The cache that ``torch.save`` wrote: a DynamicCache, or a list of (keys, values). Nothing in it is executed.

    Raises :class:`~lynxproto.errors.CacheFileError`.
    """
    known = [DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, torch.device]
    try:
        with torch.serialization.safe_globals(known if DummyLayer is None else [*known, DummyLayer]):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for broken files
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CacheFileError(f"cannot read {path} as a cache that torch.save wrote: {text}") from error
    try:
        return cache_of(held, identity, request_id=Path(path).stem)
    except SpecError as error:
        raise CacheFileError(f"{path}: {error}") from error
