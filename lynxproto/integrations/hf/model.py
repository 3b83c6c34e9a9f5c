"""What lynxproto must know of a transformers model: whose cache it is, and what its layers' K and V look like."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from lynxproto.errors import MissingDependencyError, SpecError
from lynxproto.manifest import Identity, LayerSpec, Manifest

try:
    import torch
    import transformers
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    raise MissingDependencyError(
        f"lynxproto.integrations.hf needs torch and transformers 5 ({error}); run: pip install 'lynxproto[hf]'"
    ) from error

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # transformers before 5.10
    DummyLayer = None

__all__ = [
    "DTYPES",
    "NAMES",
    "DummyLayer",
    "LayerShape",
    "as_array",
    "layer_shapes",
    "make_identity",
    "make_manifest",
    "prompt_id",
    "require_version",
    "stock_layers",
    "weights_revision",
]

#: A manifest's dtype -> torch's.
DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_BITS: Final = {2: (torch.int16, np.dtype("<u2")), 4: (torch.int32, np.dtype("<u4"))}
_KINDS: Final = {DynamicLayer: "full", DynamicSlidingWindowLayer: "sliding"}
_ATTENTION: Final = ("full_attention", "sliding_attention", "chunked_attention")
#: Values of each parameter that :func:`weights_revision` looks at.
_SAMPLES: Final = 64


@dataclass(frozen=True, slots=True)
class LayerShape:
    """K and V of layer ``index``: kind, heads and head sizes. ``window``: of a sliding layer, in tokens."""

    index: int
    kind: str
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def first_kept(self, tokens: int) -> int:
        """The first of ``tokens`` tokens that the next one attends to."""
        return 0 if self.window is None else max(0, tokens - self.window + 1)


def require_version() -> None:
    """Raise :class:`~lynxproto.errors.MissingDependencyError` for a transformers with another cache."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise MissingDependencyError(
            f"transformers {transformers.__version__} has another cache; run: pip install 'transformers>=5'"
        )


def stock_layers(config: Any) -> list[tuple[str, int | None] | None]:
    """Kind (``full`` or ``sliding``) and window of each layer's K and V; None for a layer that keeps none of its own.

    Layers without attention, and layers that read another layer's K and V, keep none. Raises
    :class:`~lynxproto.errors.SpecError` for other state (recurrent, convolutional, quantised).
    """
    require_version()
    names = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    for index, name in enumerate(names if DummyLayer is None else ()):  # older versions make plain layers of all types
        if name not in _ATTENTION:
            raise SpecError(
                f"layer {index} of {type(config).__name__} is of type {name}; only full and sliding attention can be "
                f"transferred with transformers {transformers.__version__}"
            )
    found: list[tuple[str, int | None] | None] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if DummyLayer is not None and type(layer) is DummyLayer:
            found.append(None)
        elif type(layer) in _KINDS:
            found.append((_KINDS[type(layer)], getattr(layer, "sliding_window", None)))
        else:
            raise SpecError(
                f"layer {index} of {type(config).__name__} keeps its state in {type(layer).__name__}; "
                "only full and sliding attention can be transferred so far"
            )
    return found


_shapes: weakref.WeakKeyDictionary[Any, tuple[LayerShape, ...]] = weakref.WeakKeyDictionary()


def layer_shapes(model: Any) -> tuple[LayerShape, ...]:
    """The layers of a causal model that keep K and V.

    Found by feeding one token, once for each model: configs name heads and head sizes in too many ways (multi-query,
    shared layers, sizes that differ by layer).
    """
    if (known := _shapes.get(model)) is not None:
        return known
    kinds = stock_layers(model.config)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    shapes = tuple(
        LayerShape(index, kind[0], layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], kind[1])
        for index, (kind, layer) in enumerate(zip(kinds, cache.layers, strict=True))
        if kind is not None and layer.keys is not None  # some models share K and V and do not say so in their config
    )
    _shapes[model] = shapes
    return shapes


def make_identity(model: Any, tokenizer: Any = None, *, name: str = "", revision: str = "") -> Identity:
    """Who made a cache: model and revision, hashes of tokenizer and position encoding, library and kernels.

    ``name`` and ``revision`` default to what the model was loaded from; a model from a folder has no revision of
    its own, so give one (:func:`weights_revision`, for example).
    """
    config = model.config
    return Identity(
        model=name or config._name_or_path or type(model).__name__,
        revision=revision or getattr(config, "_commit_hash", None) or "",
        tokenizer_hash="" if tokenizer is None else _tokenizer_hash(tokenizer),
        rope_hash=_rope_hash(config),
        producer=f"transformers {transformers.__version__}",
        attention_backend=config._attn_implementation or "",
    )


def weights_revision(model: Any) -> str:
    """A revision for weights that have none: a hash of their names, shapes and a sample of their values.

    Equal on both sides whatever the type that the weights were loaded in, as long as that type holds them exactly.
    """
    state = xxhash.xxh3_64()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().cpu()
        state.update(f"{name} {tuple(parameter.shape)}".encode())
        state.update(picked.numpy().tobytes())
    return f"weights-{state.hexdigest()}"


def make_manifest(
    model: Any,
    tokens: int,
    identity: Identity,
    *,
    dtype: str = "bfloat16",
    windows: bool = False,
    **fields: Any,
) -> Manifest:
    """The manifest of a prompt of ``tokens`` tokens; ``fields`` are further ones of :class:`Manifest`.

    ``windows``: sliding layers send only the tokens that a next one attends to, and not the whole prompt.
    """
    layers = tuple(
        LayerSpec(
            index=shape.index,
            kv_heads=shape.kv_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            token_start=shape.first_kept(tokens) if windows else 0,
            token_stop=tokens,
            kind=shape.kind,
        )
        for shape in layer_shapes(model)
    )
    return Manifest(identity=identity, dtype=dtype, layers=layers, prompt_tokens=tokens, **fields)


def prompt_id(tokens: Sequence[int]) -> str:
    """The request id that tells which prompt a cache holds: xxh3-128 of its token ids as little-endian uint32."""
    return f"prompt-{xxhash.xxh3_128_hexdigest(np.asarray(tokens, '<u4').tobytes())}"


def as_array(words: torch.Tensor) -> NDArray[Any]:
    """View a tensor of words as unsigned integers; CPU only, no copy."""
    if words.device.type != "cpu":
        raise SpecError(f"the cache lives on {words.device}; its words can be viewed on the CPU only")
    integer, unsigned = _BITS[words.element_size()]
    return cast(NDArray[Any], words.detach().view(integer).numpy().view(unsigned))


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _hash(backend.to_str() if backend is not None else tokenizer.get_vocab())


def _rope_hash(config: Any) -> str:
    names = (
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "max_position_embeddings",
        "partial_rotary_factor",
        "head_dim",
    )
    fields = config.get_text_config(decoder=True).to_dict()  # where layers differ, attributes raise
    return _hash({name: fields.get(name) for name in names})
