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
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from lynxproto.cachefile import Cache, load_cache, save_cache
from lynxproto.chunk import Part
from lynxproto.codecs import get_codec
from lynxproto.errors import CacheFileError, ConfigError
from lynxproto.frames import HEADER_SIZE
from lynxproto.manifest import Identity, LayerSpec

if TYPE_CHECKING:
    from lynxproto.policy import Policy

__all__ = [
    "TEXTS",
    "CodecMethod",
    "Difference",
    "Method",
    "Score",
    "Window",
    "evaluate",
    "paired",
    "prefill_windows",
    "report",
]

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

    ``tokens`` has one token more than are scored: the last is only predicted.
    """

    cache: Cache
    tokens: NDArray[np.int64]


class Method(Protocol):
    """Replaces the words of one part of one layer, ``[kv_heads, tokens, head_dim]``.

    Returns the words to compute on, and the bytes that a receiver needs to have them.
    """

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Replace ``words``, which must not be written to."""


class CodecMethod:
    """What a receiver has when all tiles of ``policy`` have reached ``level`` (or their last level, if lower).

    Bytes are those of the real payloads and of their frame headers.
    """

    def __init__(self, policy: Policy, level: int = 0, dtype: str = "bfloat16") -> None:
        if level < 0:
            raise ConfigError(f"a level must not be negative, got {level}")
        self.policy, self.level, self.dtype = policy, level, dtype
        self._codecs = [get_codec(config) for config in policy.codecs]

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        """Encode and decode the tiles of ``part``."""
        out = np.empty_like(words)
        nbytes = 0
        for tile in self.policy.tiles(self.dtype, layer):
            if tile.part != part:
                continue
            codec = self._codecs[tile.codec]
            spec = tile.spec(self.dtype, layer.head_dim(part))
            at = np.s_[:, tile.tokens.start - layer.token_start : tile.tokens.stop - layer.token_start]
            payloads = codec.encode(spec, words[at], levels=range(min(self.level + 1, codec.levels)))
            codec.decode(spec, payloads, out[at])
            nbytes += sum(memoryview(p).nbytes + HEADER_SIZE for p in payloads)
        return out, nbytes


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
    on_progress: OnProgress | None = None,
) -> list[Window]:
    """Cut ``count`` windows from a text of :data:`TEXTS` and prefill their contexts; map the dumps of earlier runs.

    ``identity`` must name the weights: with the text and the lengths it is the key of the dumps in ``folder``.
    """
    from lynxproto.integrations.hf import WordCache, make_manifest

    if text not in TEXTS:
        raise ConfigError(f"unknown text {text!r}; known: {', '.join(TEXTS)}")
    pieces = cut(tokenizer, TEXTS[text](), context + scored + 1, count)
    manifest = make_manifest(model, context, identity)
    windows = []
    for n, ids in enumerate(pieces):
        if on_progress is not None:
            on_progress(n, count, f"prefill {text}")
        prompt = ids[:context]
        key = xxhash.xxh3_128(identity.hash())
        key.update(prompt.astype("<u4").tobytes())
        path = folder / f"{key.hexdigest()}.safetensors"
        if not path.exists():
            held = WordCache(model.config, context)
            _forward(model, held, prompt, keep=1)
            arrays = {
                (spec.index, part): held.words(spec.index, part) for spec in manifest.layers for part in spec.parts
            }
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CacheFileError(f"cannot make {folder}: {error.strerror}") from error
            save_cache(path, Cache(manifest=manifest, arrays=arrays))
        windows.append(Window(load_cache(path), ids[context:]))
    if on_progress is not None:
        on_progress(count, count, f"prefill {text}")
    return windows


def _forward(model: Any, cache: Any, tokens: NDArray[np.int64], *, keep: int) -> Any:
    import torch

    with torch.inference_mode():
        inputs = torch.from_numpy(np.ascontiguousarray(tokens))[None].to(model.device)
        return model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0].float()


def evaluate(
    model: Any,
    windows: Sequence[Window],
    methods: Mapping[str, Method],
    on_progress: OnProgress | None = None,
) -> list[Score]:
    """Score ``methods`` on ``windows`` against the exact cache; one :class:`Score` each, in order.

    Raises :class:`~lynxproto.errors.SpecError` when the windows are not of this model's shape.
    """
    import torch

    from lynxproto.integrations.hf import HFEngine, WordCache

    if not windows:
        raise ConfigError("no windows to score on")
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in methods}
    steps = len(windows) * (len(methods) + 1)
    done = 0
    for window in windows:
        manifest, scored = window.cache.manifest, window.tokens[:-1]
        held = WordCache(model.config, manifest.prompt_tokens + len(scored), dtype=manifest.dtype)
        arrays = held.allocate(manifest, model)
        engine = HFEngine(model, held)
        target = torch.from_numpy(np.ascontiguousarray(window.tokens[1:]))[:, None].to(model.device)
        exact: Any = None
        for name, method in ({"exact": _identity} | dict(methods)).items():
            if on_progress is not None:
                on_progress(done, steps, name)
            nbytes = 0.0
            for spec in manifest.layers:
                for part in spec.parts:
                    words, size = method(spec, part, window.cache.arrays[spec.index, part])
                    arrays[spec.index, part][...] = words
                    nbytes += size
                held.refresh(spec.index, spec.tokens)
            log_p = torch.log_softmax(_forward(model, held, scored, keep=0), -1)
            engine.crop(manifest.prompt_tokens)
            done += 1
            if exact is None:
                exact = log_p
                continue
            results[name].append(
                (
                    8 * nbytes / sum(spec.words() for spec in manifest.layers),
                    float((log_p.argmax(-1) == exact.argmax(-1)).float().mean()),
                    float((exact.exp() * (exact - log_p)).sum(-1).mean()),
                    float((exact - log_p).gather(-1, target).mean()),
                )
            )
    if on_progress is not None:
        on_progress(steps, steps, "done")
    return [Score(name, *np.asarray(rows, np.float64).T) for name, rows in results.items()]


def _identity(layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
    return words, words.nbytes
