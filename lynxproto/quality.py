"""How well a model works on a lossy cache: windows of real text, scored against the exact cache.

A *window* is a context and the tokens that follow it. The context's KV is prefilled once as bfloat16 words and kept in
the user's cache folder. A *method* replaces those words by what a receiver would decode; the following tokens are then
fed to the model (teacher forcing) on both caches, and the two predictions are compared at each position. KL ranks
methods more reliably than top-1 agreement, and differences between methods are taken window by window (paired), which
removes most of the variation between texts.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
import xxhash
from numpy.typing import NDArray

from lynxproto._outgoing import tile_view
from lynxproto.cachefile import Cache, load_cache, save_cache
from lynxproto.chunk import Part, Tile
from lynxproto.codecs import get_codec
from lynxproto.errors import CacheFileError, ConfigError
from lynxproto.frames import HEADER_SIZE
from lynxproto.manifest import Identity, LayerSpec
from lynxproto.tiers import PLAN_ENTRY

if TYPE_CHECKING:
    from lynxproto.policy import Policy

__all__ = [
    "TEXTS",
    "CodecMethod",
    "Difference",
    "Method",
    "Score",
    "Scorer",
    "Window",
    "WindowMethod",
    "evaluate",
    "fill",
    "paired",
    "predict",
    "prefill",
    "prefill_windows",
    "report",
]

#: Whose attention tells a token's importance: this many last tokens of a context.
QUERIES: Final = 256

#: Called with how many units of work are done, how many there are, and what is being done.
OnProgress = Callable[[int, int, str], None]


def _prose() -> str:
    """English: the Python reference manual, 113,000 tokens."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def _source() -> str:
    """Code: modules of the standard library that are large and change little."""
    names = (
        "argparse",
        "ast",
        "datetime",
        "decimal",
        "difflib",
        "inspect",
        "pathlib",
        "subprocess",
        "tarfile",
        "typing",
    )
    folder = Path(sysconfig.get_path("stdlib"))
    found = [folder / f"{name}.py" for name in names] + [folder / f"_py{name}.py" for name in ("datetime", "decimal")]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in found if path.exists())


#: Name -> text to cut windows from.
TEXTS: Final[Mapping[str, Callable[[], str]]] = {"prose": _prose, "source": _source}


@dataclass(frozen=True, slots=True)
class Window:
    """A context's exact cache and the tokens that follow the context.

    ``tokens`` has one token more than are scored: the last is only predicted. ``attention``: how much the last
    :data:`QUERIES` tokens of the context attended to each token, ``[layers, kv_heads, tokens]``, if asked for.
    """

    cache: Cache
    tokens: NDArray[np.int64]
    attention: NDArray[np.float32] | None = None


class Method(Protocol):
    """Replaces the words of one part of one layer, ``[kv_heads, tokens, head_dim]``.

    Returns the words to compute on, and the bytes that a receiver needs to have them.
    """

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Replace ``words``, which must not be written to."""


@runtime_checkable
class WindowMethod(Protocol):
    """A method that looks at a window first: at its attention, or to drop tokens."""

    def on(self, window: Window) -> Method:
        """The method for ``window``. If it has ``kept``, ``[tokens]`` of bool, the other tokens are not attended to."""


class CodecMethod:
    """What a receiver has when all tiles of ``policy`` have reached ``level`` (or their last level, if lower).

    Bytes are those of the real payloads and of their frame headers; with tiers also of token sets in
    PLAN and frames, and of the codecs' tables in the manifest.
    """

    def __init__(self, policy: Policy, level: int = 0, dtype: str = "bfloat16") -> None:
        if level < 0:
            raise ConfigError(f"a level must not be negative, got {level}")
        self.policy, self.level, self.dtype = policy, level, dtype
        self._codecs = [get_codec(config) for config in policy.codecs]

    def on(self, window: Window) -> Method:
        """With the window's attention, which a policy with tiers may need."""
        return _OnWindow(self, window)

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Encode and decode the tiles of ``part``."""
        return self.replace(layer, words, [t for t in self.policy.tiles(self.dtype, layer) if t.part == part])

    def replace(self, layer: LayerSpec, words: NDArray[Any], tiles: Sequence[Tile]) -> tuple[NDArray[Any], float]:
        """Encode and decode ``tiles``, which cover ``words``."""
        out = np.empty_like(words)
        nbytes = 0
        for tile in tiles:
            codec = self._codecs[tile.codec]
            spec = tile.spec(self.dtype, layer.head_dim(tile.part))
            source = tile_view(words, layer, tile)
            payloads = codec.encode(spec, source, levels=range(min(self.level + 1, codec.levels)))
            if tile.tokens.is_range:
                codec.decode(spec, payloads, tile_view(out, layer, tile))
            else:
                decoded = np.empty_like(source)
                codec.decode(spec, payloads, decoded)
                out[:, np.asarray(tile.tokens.positions) - layer.token_start] = decoded
            nbytes += sum(memoryview(p).nbytes + HEADER_SIZE for p in payloads) + _token_set_bytes(tile, len(payloads))
        tiers = self.policy.tiers
        return out, nbytes if tiers is None else nbytes + tiers.table_bytes / tiers.layers / len(layer.parts)


class _OnWindow:
    """A :class:`CodecMethod` on one window: tiles are planned once for a layer."""

    def __init__(self, method: CodecMethod, window: Window) -> None:
        self._method, self._window = method, window
        self._tiles: dict[int, Sequence[Tile]] = {}

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Encode and decode the tiles of ``part``."""
        method, window = self._method, self._window
        if layer.index not in self._tiles:
            attention = None if window.attention is None else window.attention[layer.index]
            arrays = {p: window.cache.arrays[layer.index, p] for p in layer.parts}
            score = method.policy.score(method.dtype, layer, arrays, attention)
            self._tiles[layer.index] = method.policy.tiles(method.dtype, layer, score)
        return method.replace(layer, words, [tile for tile in self._tiles[layer.index] if tile.part == part])


def _token_set_bytes(tile: Tile, levels: int) -> int:
    """Of an explicit token set: a bitmap in PLAN, and one with its CRC in each frame."""
    if tile.tokens.is_range:
        return 0
    bitmap = (tile.tokens.stop - tile.tokens.start + 7) // 8
    return PLAN_ENTRY + bitmap + levels * (bitmap + 4)


@dataclass(frozen=True, slots=True)
class Score:
    """What a method did on each window; arrays have one entry a window.

    ``bits``: per value, all-in. ``top1``: share of positions where both caches predict the same token. ``kl``: mean
    Kullback-Leibler divergence of the method's prediction from the exact cache's, in nats. ``nll``: how much the
    mean negative log-likelihood of the text rises, in nats.
    """

    name: str
    bits: NDArray[np.float64]
    top1: NDArray[np.float64]
    kl: NDArray[np.float64]
    nll: NDArray[np.float64]

    def as_dict(self) -> dict[str, Any]:
        """One entry of ``results`` in the JSON form."""
        bits, change = float(self.bits.mean()), np.expm1(self.nll)
        return {
            "method": self.name,
            "bits_per_value": bits,
            "budget": bits / 16,
            "top1": float(self.top1.mean()),
            "top1_se": standard_error(self.top1),
            "kl": float(self.kl.mean()),
            "kl_se": standard_error(self.kl),
            "perplexity_change": float(change.mean()),
            "perplexity_change_se": standard_error(change),
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over windows of (method minus other), and its standard error."""

    kl: float
    kl_se: float
    top1: float
    top1_se: float


def standard_error(sample: NDArray[np.float64]) -> float:
    """Standard error of the mean over windows."""
    return float(sample.std(ddof=1) / np.sqrt(len(sample))) if len(sample) > 1 else float("nan")


def paired(method: Score, other: Score) -> Difference:
    """``method`` minus ``other``, window by window. Both must come from the same windows."""
    if method.kl.shape != other.kl.shape:
        raise ConfigError(f"{method.name!r} and {other.name!r} were scored on different windows")
    kl, top1 = method.kl - other.kl, method.top1 - other.top1
    return Difference(float(kl.mean()), standard_error(kl), float(top1.mean()), standard_error(top1))


def report(scores: Sequence[Score]) -> dict[str, Any]:
    """The JSON form, schema ``lynxproto.bench.quality/1``."""
    return {
        "schema": "lynxproto.bench.quality/1",
        "windows": len(scores[0].kl) if scores else 0,
        "results": [score.as_dict() for score in scores],
    }


def cut(tokenizer: Any, text: str, size: int, count: int, place: float = 0.0) -> list[NDArray[np.int64]]:
    """Cut ``count`` pieces of ``size`` tokens from ``text``, one from each of as many equal stretches.

    ``place``: where in its stretch a piece lies, from 0 (at its beginning) to 1. Each begins with what the tokenizer
    puts in front of a text: models that know a BOS token attend to it.

    Raises :class:`~lynxproto.errors.ConfigError` when the text is too short.
    """
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    front = np.asarray(tokenizer("")["input_ids"], np.int64)
    needed = size - len(front)
    if count < 1 or count * needed > len(ids):
        raise ConfigError(
            f"{count} windows of {needed} tokens do not fit a text of {len(ids)}; "
            "ask for fewer or shorter windows, or take another text"
        )
    stretch = len(ids) // count
    starts = [n * stretch + int(place * (stretch - needed)) for n in range(count)]
    return [np.concatenate([front, ids[start : start + needed]]) for start in starts]


def prefill_windows(
    model: Any,
    tokenizer: Any,
    identity: Identity,
    folder: Path,
    *,
    text: str = "prose",
    count: int = 12,
    context: int = 1792,
    scored: int = 256,
    attention: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Window]:
    """Cut ``count`` windows from a text of :data:`TEXTS` and prefill their contexts; map the dumps of earlier runs.

    ``identity`` must name the weights: with the text and the lengths it is the key of the dumps in ``folder``.
    ``attention``: record importances too.
    """
    if text not in TEXTS:
        raise ConfigError(f"unknown text {text!r}; known: {', '.join(TEXTS)}")
    pieces = cut(tokenizer, TEXTS[text](), context + scored + 1, count)
    windows = []
    for n, ids in enumerate(pieces):
        if on_progress is not None:
            on_progress(n, count, f"prefill {text}")
        prompt = ids[:context]
        key = xxhash.xxh3_128(identity.hash())
        key.update(prompt.astype("<u4").tobytes())
        path = folder / f"{key.hexdigest()}.safetensors"
        beside = path.with_suffix(f".attention-{QUERIES}.npy")
        if not path.exists() or (attention and not beside.exists()):
            window = prefill(model, identity, ids, context, attention=attention)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CacheFileError(f"cannot make {folder}: {error.strerror}") from error
            if not path.exists():
                save_cache(path, window.cache)
            if window.attention is not None:
                np.save(beside, window.attention)
        scores = np.load(beside) if attention else None
        windows.append(Window(load_cache(path), ids[context:], scores))
    if on_progress is not None:
        on_progress(count, count, f"prefill {text}")
    return windows


def prefill(model: Any, identity: Identity, ids: NDArray[np.int64], context: int, *, attention: bool = True) -> Window:
    """The window of a context, the first ``context`` of ``ids``, and of the tokens that follow.

    Raises :class:`~lynxproto.errors.SpecError` for a model whose attention is asked for and cannot be watched.
    """
    from lynxproto.integrations.attention import AttentionMass, require_layers, watch_attention
    from lynxproto.integrations.hf import WordCache, make_manifest

    manifest = make_manifest(model, context, identity)
    held = WordCache(model.config, context)
    mass = AttentionMass(QUERIES)
    with watch_attention(model, mass) if attention else nullcontext():
        predict(model, held, ids[:context], start=0, keep=1)
    found = None
    if attention:
        require_layers(mass.mass, len(manifest.layers), model)
        found = np.stack([mass.mass[i] for i in range(len(manifest.layers))]).astype(np.float32)
    arrays = {(spec.index, part): held.words(spec.index, part) for spec in manifest.layers for part in spec.parts}
    return Window(Cache(manifest=manifest, arrays=arrays), ids[context:], found)


def predict(model: Any, cache: Any, tokens: NDArray[np.int64], *, start: int, keep: int = 0) -> Any:
    """Logits after each of ``tokens`` (or after the last ``keep``), as a tensor.

    ``start``: the first one's position, which is not the number of tokens in a cache that some were dropped from.
    """
    import torch

    places = torch.arange(start, start + len(tokens))[None].to(model.device)
    with torch.inference_mode():
        inputs = torch.from_numpy(np.ascontiguousarray(tokens))[None].to(model.device)
        output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep, position_ids=places)
        return output.logits[0].float()


class Scorer:
    """Scores methods on one window. The exact cache's prediction is made when it is first needed."""

    def __init__(self, model: Any, window: Window) -> None:
        from lynxproto.integrations.hf import WordCache

        manifest, self._scored = window.cache.manifest, window.tokens[:-1]
        self._model, self._window = model, window
        self._held = WordCache(model.config, manifest.prompt_tokens + len(self._scored), dtype=manifest.dtype)
        self._arrays = self._held.allocate(manifest, model)
        self._exact: Any = None

    def score(self, method: Method | WindowMethod) -> tuple[float, float, float, float]:
        """Bits a value, top-1 agreement, KL in nats, rise of the text's negative log-likelihood in nats."""
        import torch

        if self._exact is None:
            self._exact = self._predict(_identity)[0]
        log_p, nbytes = self._predict(method)
        target = torch.from_numpy(np.ascontiguousarray(self._window.tokens[1:]))[:, None].to(self._model.device)
        exact = self._exact
        return (
            8 * nbytes / sum(spec.words() for spec in self._window.cache.manifest.layers),
            float((log_p.argmax(-1) == exact.argmax(-1)).float().mean()),
            float((exact.exp() * (exact - log_p)).sum(-1).mean()),
            float((exact - log_p).gather(-1, target).mean()),
        )

    def _predict(self, method: Method | WindowMethod) -> tuple[Any, float]:
        import torch

        nbytes = fill(self._held, self._arrays, self._window, method)
        start = self._window.cache.manifest.prompt_tokens
        return torch.log_softmax(predict(self._model, self._held, self._scored, start=start), -1), nbytes


def evaluate(
    model: Any,
    windows: Sequence[Window],
    methods: Mapping[str, Method | WindowMethod],
    on_progress: OnProgress | None = None,
) -> list[Score]:
    """Score ``methods`` on ``windows`` against the exact cache; one :class:`Score` each, in order.

    Raises :class:`~lynxproto.errors.SpecError` when the windows are not of this model's shape.
    """
    if not windows:
        raise ConfigError("no windows to score on")
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in methods}
    steps = len(windows) * len(methods)
    for n, window in enumerate(windows):
        scorer = Scorer(model, window)
        for m, (name, method) in enumerate(methods.items()):
            if on_progress is not None:
                on_progress(n * len(methods) + m, steps, name)
            results[name].append(scorer.score(method))
    if on_progress is not None:
        on_progress(steps, steps, "done")
    return [Score(name, *np.asarray(rows, np.float64).T) for name, rows in results.items()]


def fill(
    cache: Any, arrays: Mapping[tuple[int, Part], NDArray[Any]], window: Window, method: Method | WindowMethod
) -> float:
    """Put what ``method`` makes of a window into a WordCache and the ``arrays`` that it allocated; the bytes it takes.

    A cache that tokens were dropped from is shorter: pass positions to the model.
    """
    manifest = window.cache.manifest
    chosen: Method = method.on(window) if isinstance(method, WindowMethod) else method
    kept: NDArray[np.bool_] | None = getattr(chosen, "kept", None)
    tokens = manifest.prompt_tokens if kept is None else int(kept.sum())
    nbytes = 0.0
    cache.reset()  # layers differ in length where a method failed half way
    for spec in manifest.layers:
        for part in spec.parts:
            words, size = chosen(spec, part, window.cache.arrays[spec.index, part])
            arrays[spec.index, part][:, :tokens] = words if kept is None else words[:, kept]
            nbytes += size
        cache.refresh(spec.index, tokens)
    return nbytes


def _identity(layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
    return words, words.nbytes
