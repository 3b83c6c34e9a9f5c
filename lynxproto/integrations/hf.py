"""Adapter for Hugging Face transformers 5.x: caches of words, an :class:`~lynxproto.speculation.Engine`, identities.

:class:`WordCache` replaces ``DynamicCache``. It keeps K and V as words of the wire's dtype (bfloat16 unless told
otherwise), whatever the model computes in: what enters is rounded once, what attention reads are the rounded values.
So a sender exports the words without a copy, a receiver decodes straight into them, and both sides compute on the
same numbers. Buffers are allocated once for ``capacity`` tokens; stock caches concatenate the whole cache each step.

Attention layers, full or sliding, are supported (a sliding layer keeps all tokens here, and the model's mask hides the
old ones, so that it can be cropped). Recurrent and convolutional state is refused by name. Batch size is 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from lynxproto.chunk import Part
from lynxproto.errors import MissingDependencyError, SpecError, SpeculationError
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.speculation import Logits

try:
    import torch
    import transformers
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
except ImportError as error:
    raise MissingDependencyError(
        f"lynxproto.integrations.hf needs torch and transformers 5 ({error}); run: pip install 'lynxproto[hf]'"
    ) from error

__all__ = ["HFEngine", "WordCache", "as_array", "as_tensor", "make_identity", "make_manifest"]

_WORDS: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BITS: Final = {2: (torch.int16, np.dtype("<u2")), 4: (torch.int32, np.dtype("<u4"))}
_PARTS: Final[tuple[Part, Part]] = ("key", "value")
_KINDS: Final = {DynamicLayer: "full", DynamicSlidingWindowLayer: "sliding"}

#: Called with a layer's index and its K and V words ``[kv_heads, tokens, head_dim]`` as they enter the cache.
OnLayer = Callable[[int, NDArray[Any], NDArray[Any]], None]
#: Called with a layer's index.
BeforeLayer = Callable[[int], None]


class _WordLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
    """One layer: words ``[1, kv_heads, capacity, head_dim]``, and their values in the type the model computes in."""

    is_croppable = True

    def __init__(self, cache: WordCache, index: int, *, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.length = 0
        self._cache = cache
        self._index = index
        self.word_buffers: tuple[torch.Tensor, ...] = ()
        self._value_buffers: tuple[torch.Tensor, ...] = ()

    def allocate(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        """Make both buffers; ``shapes`` are (kv_heads, head_dim) of K and of V."""
        sizes = [(1, heads, self._cache.capacity, head_dim) for heads, head_dim in shapes]
        with torch.inference_mode(False):  # a forward may call this, and its tensors could not be written outside it
            self.word_buffers = tuple(torch.zeros(s, dtype=self._cache.word_dtype, device=device) for s in sizes)
            same = dtype == self._cache.word_dtype
            self._value_buffers = (
                self.word_buffers if same else tuple(torch.zeros(s, dtype=dtype, device=device) for s in sizes)
            )
        self.dtype, self.device, self.is_initialized = dtype, device, True
        self.resize(self.length)

    def resize(self, length: int) -> None:
        """Show the first ``length`` tokens."""
        self.length = length
        if self.is_initialized:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._value_buffers)

    def refresh(self, length: int) -> None:
        """Take over words that were written from outside: the first ``length`` tokens."""
        for words, values in zip(self.word_buffers, self._value_buffers, strict=True):
            if words is not values:
                values[:, :, :length].copy_(words[:, :, :length])

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shapes = [(states.shape[1], states.shape[3]) for states in (key_states, value_states)]
        self.allocate(shapes, key_states.dtype, key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[0] != 1:
            raise SpeculationError(f"a word cache holds one sequence; got a batch of {key_states.shape[0]}")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._cache.before_layer is not None:
            self._cache.before_layer(self._index)
        start, stop = self.length, self.length + key_states.shape[-2]
        if stop > self._cache.capacity:
            raise SpeculationError(
                f"layer {self._index}: {stop} tokens do not fit; make the word cache with a capacity above "
                f"{self._cache.capacity}"
            )
        for states, words, values in zip(
            (key_states, value_states), self.word_buffers, self._value_buffers, strict=True
        ):
            words[:, :, start:stop].copy_(states)  # rounds to nearest even
            if words is not values:
                values[:, :, start:stop].copy_(words[:, :, start:stop])
        self.resize(stop)
        if self._cache.on_layer is not None:
            self._cache.on_layer(self._index, *(as_array(words[0, :, start:stop]) for words in self.word_buffers))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self._cache.capacity

    def crop(self, tokens_to_remove: int) -> None:
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {self.length} tokens")
        self.resize(self.length + tokens_to_remove)

    def reset(self) -> None:
        self.resize(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise SpeculationError("a word cache holds one sequence; beam search needs another cache")


class WordCache(Cache):  # type: ignore[misc]  # transformers is not followed
    """A transformers cache for one sequence of at most ``capacity`` tokens, kept as words of ``dtype``.

    ``on_layer`` is called inside the forward, as soon as a layer's K and V exist and before its attention runs:
    with ``(layer, keys, values)``, words ``[kv_heads, new tokens, head_dim]``, views of the cache. It should return at
    once (hand the arrays to a sender's thread).

    ``before_layer`` is called inside the forward before a layer's K and V are read. It may wait for them to arrive, so
    that a first step computes layer by layer as the cache comes in (:meth:`expect`).

    Raises :class:`~lynxproto.errors.SpecError` for a model with state that is not K and V of attention layers.
    """

    def __init__(
        self,
        config: Any,
        capacity: int,
        dtype: str = "bfloat16",
        on_layer: OnLayer | None = None,
        before_layer: BeforeLayer | None = None,
    ) -> None:
        if dtype not in _WORDS:
            raise SpecError(f"a word cache holds {', '.join(_WORDS)}, not {dtype!r}")
        if capacity < 1:
            raise SpecError(f"a cache's capacity must be positive, not {capacity}")
        self.capacity = capacity
        self.word_dtype = _WORDS[dtype]
        self.on_layer = on_layer
        self.before_layer = before_layer
        kinds = _layer_kinds(config)
        super().__init__(layers=[_WordLayer(self, i, is_sliding=k == "sliding") for i, k in enumerate(kinds)])

    def words(self, layer: int, part: Part) -> NDArray[Any]:
        """The words of one part of one layer, ``[kv_heads, tokens, head_dim]``: a view, not a copy."""
        held: _WordLayer = self.layers[layer]
        if not held.is_initialized:
            raise SpecError(f"layer {layer} holds no tokens yet")
        return as_array(held.word_buffers[_part_index(part)][0, :, : held.length])

    def allocate(self, manifest: Manifest, model: Any) -> dict[tuple[int, Part], NDArray[Any]]:
        """Views of this cache, ``[kv_heads, tokens, head_dim]`` words, for a receiver to write the prompt into.

        Pass as a listener's ``allocate``. Buffers are kept from one prompt to the next. Call :meth:`refresh` when
        a layer's words have been written or improved.

        Raises :class:`~lynxproto.errors.SpecError` for a manifest that does not describe this model's cache.
        """
        if len(manifest.layers) != len(self.layers) or _WORDS.get(manifest.dtype) != self.word_dtype:
            raise SpecError(
                f"the manifest has {len(manifest.layers)} layers of {manifest.dtype}, "
                f"the cache {len(self.layers)} of {str(self.word_dtype).removeprefix('torch.')}"
            )
        parameter = next(model.parameters())
        arrays: dict[tuple[int, Part], NDArray[Any]] = {}
        for spec in manifest.layers:
            if spec.token_start or spec.token_stop > self.capacity or spec.parts != _PARTS:
                raise SpecError(
                    f"layer {spec.index}: tokens [{spec.token_start}, {spec.token_stop}) of {spec.parts} do not fit "
                    f"a word cache of {self.capacity} tokens of key and value"
                )
            layer: _WordLayer = self.layers[spec.index]
            shapes = [(spec.kv_heads, spec.key_dim), (spec.kv_heads, spec.value_dim)]
            if not layer.is_initialized:
                layer.allocate(shapes, parameter.dtype, parameter.device)
            held = [(buffer.shape[1], buffer.shape[3]) for buffer in layer.word_buffers]
            if held != shapes:
                raise SpecError(
                    f"layer {spec.index}: the manifest's (heads, head_dim) are {shapes}, the cache's {held}"
                )
            for part, buffer in zip(_PARTS, layer.word_buffers, strict=True):
                arrays[spec.index, part] = as_array(buffer[0, :, : spec.tokens])
        return arrays

    def expect(self, tokens: int) -> None:
        """Count on ``tokens`` tokens in every layer from now on; ``before_layer`` is where they must be there."""
        for layer in self.layers:
            layer.resize(tokens)

    def refresh(self, layer: int, tokens: int) -> None:
        """Compute on what :meth:`allocate`'s arrays of ``layer`` hold now; the layer has at least ``tokens`` tokens."""
        held: _WordLayer = self.layers[layer]
        held.refresh(tokens)
        held.resize(max(held.length, tokens))


class HFEngine:
    """:class:`~lynxproto.speculation.Engine` over a causal language model and a cache (a WordCache, or a stock one)."""

    def __init__(self, model: Any, cache: Any) -> None:
        _require_version()
        self.model = model
        self.cache = cache

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Feed ``tokens`` in one forward; return the logits after the last, shape ``[vocabulary]``."""
        return cast(Logits, self._forward(tokens, keep=1)[0])

    def step(self, token: int) -> Logits:
        """Feed one token; return the next token's logits, shape ``[vocabulary]``."""
        return cast(Logits, self._forward([token], keep=1)[0])

    def verify(self, tokens: Sequence[int]) -> Logits:
        """Feed all tokens in one forward; shape ``[tokens, vocabulary]``."""
        return self._forward(tokens, keep=0)

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises :class:`~lynxproto.errors.SpeculationError` when the cache cannot do that exactly.
        """
        have = self.cache.get_seq_length()
        if not 0 <= length <= have:
            raise SpeculationError(f"cannot crop a cache of {have} tokens to {length}")
        if length == have:
            return
        if not getattr(self.cache, "is_croppable", True):
            raise SpeculationError(f"{type(self.cache).__name__} cannot be cropped; use a WordCache")
        try:
            # A negative count of tokens to remove is the one form that all 5.x versions take alike: a positive
            # argument was the new length at first, and is refused since.
            self.cache.crop(length - have)
        except (RuntimeError, ValueError) as error:
            raise SpeculationError(f"{type(self.cache).__name__} cannot be cropped to {length}: {error}") from error
        if (left := self.cache.get_seq_length()) != length:
            raise SpeculationError(f"transformers {transformers.__version__} cropped to {left} tokens, not {length}")

    def _forward(self, tokens: Sequence[int], keep: int) -> Logits:
        with torch.inference_mode():
            inputs = torch.tensor([list(tokens)], device=self.model.device)
            output = self.model(inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
            return cast(Logits, output.logits[0].float().cpu().numpy())


def make_identity(model: Any, tokenizer: Any = None, *, name: str = "", revision: str = "") -> Identity:
    """Who made a cache: model and revision, hashes of tokenizer and position encoding, library and kernels.

    ``name`` and ``revision`` default to what the model was loaded from; a model from a folder has no revision of
    its own, so give one.
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


def make_manifest(model: Any, tokens: int, identity: Identity, *, dtype: str = "bfloat16", **fields: Any) -> Manifest:
    """The manifest of a prompt of ``tokens`` tokens; ``fields`` are further ones of :class:`Manifest`."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = tuple(
        LayerSpec(index=i, kv_heads=heads, key_dim=head_dim, value_dim=head_dim, token_stop=tokens, kind=kind)
        for i, kind in enumerate(_layer_kinds(model.config))
    )
    return Manifest(identity=identity, dtype=dtype, layers=layers, prompt_tokens=tokens, **fields)


def _layer_kinds(config: Any) -> list[str]:
    _require_version()
    stock = DynamicCache(config=config).layers
    for index, layer in enumerate(stock):
        if type(layer) not in _KINDS:
            raise SpecError(
                f"layer {index} of {type(config).__name__} keeps its state in {type(layer).__name__}; "
                "only full and sliding attention can be transferred so far"
            )
    return [_KINDS[type(layer)] for layer in stock]


def _require_version() -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        raise MissingDependencyError(
            f"transformers {transformers.__version__} has another cache; run: pip install 'transformers>=5'"
        )


def _part_index(part: Part) -> int:
    if part not in _PARTS:
        raise SpecError(f"a word cache holds key and value, not {part!r}")
    return _PARTS.index(part)


def as_array(words: torch.Tensor) -> NDArray[Any]:
    """View a tensor of words as unsigned integers; CPU only, no copy."""
    if words.device.type != "cpu":
        raise SpecError(f"the cache lives on {words.device}; its words can be viewed on the CPU only")
    integer, unsigned = _BITS[words.element_size()]
    return cast(NDArray[Any], words.detach().view(integer).numpy().view(unsigned))


def as_tensor(words: NDArray[Any], dtype: str) -> torch.Tensor:
    """The values of words of a manifest's ``dtype``, as a new tensor."""
    integer, _ = _BITS[words.dtype.itemsize]
    signed = words.view(np.int16 if words.dtype.itemsize == 2 else np.int32)
    return torch.from_numpy(signed.copy()).to(integer).view(_WORDS[dtype])


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
    text = config.get_text_config(decoder=True)
    return _hash({name: getattr(text, name, None) for name in names})
