""":class:`WordCache`, a transformers cache of the wire's words, and :class:`HFEngine`, which decodes on one.

A word cache keeps K and V as words of the wire's dtype, whatever the model computes in: what enters is rounded once,
what attention reads are the rounded values. So a sender exports the words without a copy, a receiver decodes straight
into them, and both sides compute on the same numbers. Buffers are allocated once; stock caches concatenate the whole
cache each step. Where the wire's dtype is the model's, a word cache with ``windows`` gives the stock cache's results
bit for bit: attention gets tensors of the same shapes and values.

Attention layers, full or sliding, are supported, and layers without K and V. Recurrent and convolutional state is
refused by name. Batch size is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from numpy.typing import NDArray

from lynxproto.chunk import Part
from lynxproto.errors import SpecError, SpeculationError
from lynxproto.integrations.hf.model import (  # says what to install if torch or transformers is missing
    DTYPES,
    NAMES,
    DummyLayer,
    as_array,
    require_version,
    stock_layers,
)
from lynxproto.manifest import LayerSpec, Manifest
from lynxproto.speculation import Logits

import torch  # isort: skip  # after model, whose error names the extra
import transformers  # isort: skip  # the same
from transformers.cache_utils import Cache, CacheLayerMixin  # isort: skip  # the same

__all__ = ["HFEngine", "WordCache"]

_PARTS: tuple[Part, Part] = ("key", "value")
_GROWTH_TOKENS = 256

#: Called with a layer's index and its K and V words ``[kv_heads, tokens, head_dim]`` as they enter the cache.
OnLayer = Callable[[int, NDArray[Any], NDArray[Any]], None]
#: Called with a layer's index.
BeforeLayer = Callable[[int], None]


class _WordLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
    """One layer: words ``[1, kv_heads, room, head_dim]``, and their values in the type the model computes in.

    Buffers hold the tokens from ``start`` on; ``length`` counts all tokens of the sequence.
    """

    is_croppable = True

    def __init__(self, cache: WordCache, index: int, *, is_sliding: bool, window: int | None) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.start = 0
        self.length = 0
        self._window = window
        self._cache = cache
        self._index = index
        self.word_buffers: tuple[torch.Tensor, ...] = ()
        self._value_buffers: tuple[torch.Tensor, ...] = ()

    def allocate(
        self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, start: int = 0
    ) -> None:
        """Make both buffers; ``shapes`` are (kv_heads, head_dim) of K and of V."""
        self.dtype, self.device, self.is_initialized = dtype, device, True
        self.start = start
        self._make(shapes, max(self._cache.capacity - start, 1))
        self.resize(self.length)

    def _make(self, shapes: Sequence[tuple[int, int]], room: int) -> None:
        with torch.inference_mode(False):  # a forward may call this, and its tensors could not be written outside it
            words = tuple(
                torch.zeros((1, heads, room, head_dim), dtype=self._cache.word_dtype, device=self.device)
                for heads, head_dim in shapes
            )
            same = self.dtype == self._cache.word_dtype
            values = words if same else tuple(torch.zeros_like(buffer, dtype=self.dtype) for buffer in words)
        self.word_buffers, self._value_buffers = words, values

    def _grow(self, room: int) -> None:
        """Move to buffers of at least ``room`` tokens."""
        words, values, held = self.word_buffers, self._value_buffers, self.length - self.start
        room = max(room, room + (held >> 1), room + _GROWTH_TOKENS)
        self._make([(buffer.shape[1], buffer.shape[3]) for buffer in words], room)
        for old, new in zip((*words, *values), (*self.word_buffers, *self._value_buffers), strict=True):
            new[:, :, :held].copy_(old[:, :, :held])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(kv_heads, head_dim) of K and of V."""
        return [(buffer.shape[1], buffer.shape[3]) for buffer in self.word_buffers]

    def shown_from(self, length: int) -> int:
        """The first of ``length`` tokens that attention reads."""
        if self._window is None or not self._cache.windows:
            return self.start
        return max(self.start, length - self._window + 1)

    def resize(self, length: int) -> None:
        """Show attention the first ``length`` tokens, as far as it reads them."""
        self.length = length
        if self.is_initialized:
            first, stop = self.shown_from(length) - self.start, length - self.start
            self.keys, self.values = (buffer[:, :, first:stop] for buffer in self._value_buffers)

    def refresh(self, length: int) -> None:
        """Take over words that were written from outside: the first ``length`` tokens."""
        count = length - self.start
        for words, values in zip(self.word_buffers, self._value_buffers, strict=True):
            if words is not values:
                values[:, :, :count].copy_(words[:, :, :count])

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
        first = self.shown_from(self.length) - self.start
        start, stop = self.length - self.start, self.length - self.start + key_states.shape[-2]
        if stop > self.word_buffers[0].shape[2]:
            if not self._cache.grows:
                raise SpeculationError(
                    f"layer {self._index}: {stop + self.start} tokens do not fit; make the word cache with a capacity "
                    f"above {self._cache.capacity}"
                )
            self._grow(stop)
        for states, words, values in zip(
            (key_states, value_states), self.word_buffers, self._value_buffers, strict=True
        ):
            words[:, :, start:stop].copy_(states)  # rounds to nearest even
            if words is not values:
                values[:, :, start:stop].copy_(words[:, :, start:stop])
        self.resize(self.start + stop)
        if self._cache.on_layer is not None:
            self._cache.on_layer(self._index, *(as_array(words[0, :, start:stop]) for words in self.word_buffers))
        keys, values = (buffer[:, :, first:stop] for buffer in self._value_buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        first = self.shown_from(self.length)
        new = query_length if isinstance(query_length, int) else len(query_length)  # transformers 5.0: their positions
        return self.length - first + new, first

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self._cache.grows else self._cache.capacity

    get_max_cache_shape = get_max_length  # what transformers 5.0 calls it

    def crop(self, tokens_to_remove: int) -> None:
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {self.length} tokens")
        left = self.length + tokens_to_remove
        needed = 0 if self._window is None else max(0, left - self._window + 1)
        if left and needed < self.start:
            raise ValueError(f"layer {self._index} holds tokens from {self.start} on, {left} tokens need {needed}")
        self.resize(left)

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

    ``windows``: sliding layers show attention only the tokens of their window, as stock caches do, and take caches
    that hold no more; without, they show all tokens and leave the rest to the model's mask. Either way they keep
    what they got, so that they can be cropped. ``grows``: buffers that are full move to larger ones; it can be set
    later, when nobody writes into them from outside any more.

    Raises :class:`~lynxproto.errors.SpecError` for a model with state that is not K and V of attention layers.
    """

    def __init__(
        self,
        config: Any,
        capacity: int,
        dtype: str = "bfloat16",
        on_layer: OnLayer | None = None,
        before_layer: BeforeLayer | None = None,
        *,
        windows: bool = False,
        grows: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise SpecError(f"a word cache holds {', '.join(DTYPES)}, not {dtype!r}")
        if capacity < 1:
            raise SpecError(f"a cache's capacity must be positive, not {capacity}")
        self.capacity = capacity
        self.word_dtype = DTYPES[dtype]
        self.on_layer = on_layer
        self.before_layer = before_layer
        self.windows = windows
        self.grows = grows
        super().__init__(
            layers=[
                DummyLayer() if kind is None else _WordLayer(self, i, is_sliding=kind[0] == "sliding", window=kind[1])
                for i, kind in enumerate(stock_layers(config))
            ]
        )

    def _held(self) -> list[tuple[int, _WordLayer]]:
        return [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, _WordLayer)]

    def words(self, layer: int, part: Part) -> NDArray[Any]:
        """The words of one part of one layer, ``[kv_heads, tokens held, head_dim]``: a view, not a copy."""
        held: _WordLayer = self.layers[layer]
        if not held.is_initialized:
            raise SpecError(f"layer {layer} holds no tokens yet")
        return as_array(held.word_buffers[_part_index(part)][0, :, : held.length - held.start])

    def allocate(self, manifest: Manifest, model: Any, device: Any = None) -> dict[tuple[int, Part], NDArray[Any]]:
        """Views of this cache, ``[kv_heads, tokens, head_dim]`` words, for a receiver to write the prompt into.

        Pass as a listener's ``allocate``. Buffers are kept from one prompt to the next; they are made on ``device``
        (default: the model's). Call :meth:`refresh` when a layer's words have been written or improved.

        Raises :class:`~lynxproto.errors.SpecError` for a manifest that does not describe this model's cache.
        """
        if DTYPES.get(manifest.dtype) != self.word_dtype or any(
            not isinstance(self.layers[spec.index], _WordLayer) if spec.index < len(self.layers) else True
            for spec in manifest.layers
        ):
            raise SpecError(
                f"the manifest has {len(manifest.layers)} layers of {manifest.dtype}, "
                f"the cache {len(self._held())} of {NAMES[self.word_dtype]}"
            )
        parameter = next(model.parameters())
        arrays: dict[tuple[int, Part], NDArray[Any]] = {}
        for spec in manifest.layers:
            layer: _WordLayer = self.layers[spec.index]
            self._fit(spec, layer)
            shapes = [(spec.kv_heads, spec.key_dim), (spec.kv_heads, spec.value_dim)]
            if not layer.is_initialized:
                layer.allocate(shapes, parameter.dtype, device or parameter.device, spec.token_start)
            elif layer.shapes != shapes or layer.start != spec.token_start:
                raise SpecError(
                    f"layer {spec.index}: the manifest's (heads, head_dim) are {shapes} from token {spec.token_start} "
                    f"on, the cache's {layer.shapes} from {layer.start} on"
                )
            for part, buffer in zip(_PARTS, layer.word_buffers, strict=True):
                arrays[spec.index, part] = as_array(buffer[0, :, : spec.tokens])
        return arrays

    def _fit(self, spec: LayerSpec, layer: _WordLayer) -> None:
        """Refuse tokens that this layer cannot hold, or that are too few for what comes after them."""
        start = spec.token_start
        if spec.token_stop > self.capacity or spec.parts != _PARTS or (start and not self.windows):
            raise SpecError(
                f"layer {spec.index}: tokens [{start}, {spec.token_stop}) of {spec.parts} do not fit "
                f"a word cache of {self.capacity} tokens of key and value"
            )
        needed = 0 if layer._window is None else max(0, spec.token_stop - layer._window + 1)
        if start > needed:
            raise SpecError(
                f"layer {spec.index}: tokens [{start}, {spec.token_stop}) are too few; the next token attends to those "
                f"from {needed} on"
            )

    def expect(self, tokens: int) -> None:
        """Count on ``tokens`` tokens in every layer from now on; ``before_layer`` is where they must be there."""
        for _, layer in self._held():
            layer.resize(tokens)

    def refresh(self, layer: int, tokens: int) -> None:
        """Compute on what :meth:`allocate`'s arrays of ``layer`` hold now; the layer has at least ``tokens`` tokens."""
        held: _WordLayer = self.layers[layer]
        held.refresh(tokens)
        held.resize(max(held.length, tokens))

    def held_words(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, int, str]]:
        """Of each layer with tokens: index, K and V words ``[1, kv_heads, tokens, head_dim]``, tokens seen, kind.

        Of a sliding layer, with ``windows``, what the next token attends to.
        """
        for index, layer in self._held():
            if layer.is_initialized and layer.length:
                first, stop = layer.shown_from(layer.length) - layer.start, layer.length - layer.start
                keys, values = (buffer[:, :, first:stop] for buffer in layer.word_buffers)
                yield index, keys, values, layer.length, "sliding" if layer.is_sliding else "full"


class HFEngine:
    """:class:`~lynxproto.speculation.Engine` over a causal language model and a cache (a WordCache, or a stock one).

    ``lead``: tokens at the start of the sequence that are not in the cache when it has ``base`` tokens, and enter with
    the first token that is fed, in one forward (as ``generate`` does with the tokens that follow a cache).
    """

    def __init__(self, model: Any, cache: Any, *, base: int = 0, lead: Sequence[int] = ()) -> None:
        require_version()
        self.model = model
        self.cache = cache
        self._base = base
        self._lead = list(lead)
        self._waiting = False  # the lead is counted as cached, and enters with the next token

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Feed ``tokens`` in one forward; return the logits after the last, shape ``[vocabulary]``."""
        return cast(Logits, self._forward(tokens, keep=1)[0])

    def step(self, token: int) -> Logits:
        """Feed one token; return the next token's logits, shape ``[vocabulary]``."""
        return cast(Logits, self._forward([token], keep=1)[0])

    def verify(self, tokens: Sequence[int]) -> Logits:
        """Feed all tokens in one forward; shape ``[tokens, vocabulary]``."""
        return self._forward(tokens, keep=len(tokens))

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises :class:`~lynxproto.errors.SpeculationError` when the cache cannot do that exactly.
        """
        if self._lead and length == self._base + len(self._lead):
            self._crop(self._base)
            self._waiting = True
            return
        if self._lead and self._base < length < self._base + len(self._lead):
            raise SpeculationError(f"cannot crop to {length} tokens, inside those that enter in one forward")
        self._crop(length)
        self._waiting = False

    def _crop(self, length: int) -> None:
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
        fed = [*self._lead, *tokens] if self._waiting else list(tokens)
        self._waiting = False
        with torch.inference_mode():
            inputs = torch.tensor([fed], device=self.model.device)
            output = self.model(inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
            return cast(Logits, output.logits[0, -keep:].float().cpu().numpy())


def _part_index(part: Part) -> int:
    if part not in _PARTS:
        raise SpecError(f"a word cache holds key and value, not {part!r}")
    return _PARTS.index(part)
