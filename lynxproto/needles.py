"""Needles: short facts hidden in a long context, and the questions that ask for them.

A model of 135 million parameters does not always *say* a fact that it has read, so nothing is generated: the answer's
log-probability is compared with those of other answers of the same kind. A needle is found when the right one is the
likeliest of 16; the others occur in no needle. Prompts end with the question, as a user's do, so that importance by
attention sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.cachefile import Cache
from lynxproto.errors import BudgetError, ConfigError
from lynxproto.quality import QUERIES, Window, fill, predict

if TYPE_CHECKING:
    from lynxproto.integrations.loading import OpenedModel

__all__ = ["CANDIDATES", "Needle", "answer", "ask", "plant"]

_PLACES: Final = (
    "Paris", "Berlin", "Madrid", "London", "Vienna", "Athens", "Oslo", "Prague", "Lisbon", "Dublin", "Warsaw", "Cairo",
    "Moscow", "Tokyo", "Sydney", "Boston",
)  # fmt: skip
_ANSWERS: Final = (
    "apple", "river", "stone", "garden", "window", "silver", "horse", "bridge", "summer", "music", "pepper", "castle",
    "forest", "paper", "ocean", "winter", "table", "mirror", "candle", "button", "rocket", "tiger", "cotton", "marble",
    "lemon", "island", "hammer", "rabbit", "violin", "desert",
)  # fmt: skip
#: How many answers are compared: chance finds one needle in as many.
CANDIDATES: Final = 16


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact at ``depth`` (0..1) of a context: the ``question``'s tokens, the ``answer`` and all ``candidates``.

    ``answer`` indexes ``candidates``, which are the first tokens of as many answers, all different.
    """

    depth: float
    question: tuple[int, ...]
    candidates: NDArray[np.int64]
    answer: int

    def margin(self, logits: NDArray[Any]) -> float:
        """How much likelier the right answer is than the best wrong one, in nats; found if positive."""
        scores = np.asarray(logits, np.float64)[self.candidates]
        return float(scores[self.answer] - np.delete(scores, self.answer).max())


def plant(
    tokenizer: Any, filler: Sequence[int], context: int, depths: Sequence[float], *, seed: int = 0
) -> tuple[list[int], list[Needle]]:
    """Hide one needle at each of ``depths`` in a context of exactly ``context`` tokens of ``filler``.

    Raises :class:`~lynxproto.errors.ConfigError` when the filler or the context is too short, when there are more
    depths than places, or when a vocabulary does not tell enough answers apart.
    """
    rng = np.random.default_rng(seed)
    if not 1 <= len(depths) <= len(_PLACES):
        raise ConfigError(f"1 to {len(_PLACES)} needles can be planted, not {len(depths)}")
    firsts: dict[int, str] = {}
    for word in _ANSWERS:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids):
            firsts.setdefault(int(ids[0]), word)
    needed = CANDIDATES - 1 + len(depths)
    if len(firsts) < needed:
        raise ConfigError(f"this tokenizer tells {len(firsts)} answers apart by their first token, {needed} needed")
    # Other needles' answers are no candidates: a small model takes the one that it read last.
    chosen = rng.permutation(list(firsts)).astype(np.int64)
    planted, wrong = chosen[: len(depths)], chosen[len(depths) : needed]
    places = rng.permutation(np.array(_PLACES))[: len(depths)]
    facts, needles = [], []
    for depth, place, right in zip(depths, places, planted, strict=True):
        word = firsts[int(right)]
        fact = f"\n\nRemember this: the magic word of {place} is {word}.\n\n"
        question = f"\n\nQuestion: What is the magic word of {place}?\nAnswer: The magic word of {place} is"
        facts.append((depth, tokenizer(fact, add_special_tokens=False)["input_ids"]))
        asked = tuple(int(t) for t in tokenizer(question, add_special_tokens=False)["input_ids"])
        needles.append(Needle(float(depth), asked, np.append(wrong, right), len(wrong)))
    room = context - sum(len(ids) for _, ids in facts)
    if room < 1 or len(filler) < room:
        raise ConfigError(
            f"{len(facts)} needles and {len(filler)} tokens of filler do not make a context of {context} tokens"
        )
    tokens: list[int] = []
    start = 0
    for depth, ids in sorted(facts, key=lambda fact: fact[0]):
        stop = max(start, round(depth * room))
        tokens += [*map(int, filler[start:stop]), *map(int, ids)]
        start = stop
    return [*tokens, *map(int, filler[start:room])], needles


def ask(opened: OpenedModel, tokens: Sequence[int], needles: Sequence[Needle]) -> Iterator[tuple[Needle, Window]]:
    """For each needle the window of the context and its question; the last token of the question is scored."""
    import torch

    from lynxproto.integrations.attention import AttentionMass, watch_attention
    from lynxproto.integrations.hf import HFEngine, WordCache, make_identity, make_manifest

    model = opened.model
    longest = max(len(n.question) for n in needles)
    held = WordCache(model.config, len(tokens) + longest)
    engine = HFEngine(model, held)
    before = AttentionMass(QUERIES)
    with torch.inference_mode(), watch_attention(model, before):
        engine.prefill(tokens)
    identity = make_identity(model, name=opened.name, revision=opened.revision)
    for needle in needles:
        asking = AttentionMass(None)
        with watch_attention(model, asking):
            engine.prefill(needle.question[:-1])
        size = len(tokens) + len(needle.question) - 1
        manifest = make_manifest(model, size, identity)
        arrays = {
            (layer.index, part): held.words(layer.index, part).copy()
            for layer in manifest.layers
            for part in layer.parts
        }
        mass = []
        for index in range(len(manifest.layers)):
            row = asking.mass[index].copy()
            row[:, : len(tokens)] += before.mass[index]
            mass.append(row)
        engine.crop(len(tokens))
        last = np.array([needle.question[-1], 0], np.int64)
        yield needle, Window(Cache(manifest=manifest, arrays=arrays), last, np.stack(mass).astype(np.float32))


def answer(model: Any, window: Window, needle: Needle, method: Any) -> float | None:
    """The needle's margin on the method's cache; None where its budget is impossible in this context."""
    from lynxproto.integrations.hf import WordCache

    manifest = window.cache.manifest
    held = WordCache(model.config, manifest.prompt_tokens + 1, dtype=manifest.dtype)
    arrays = held.allocate(manifest, model)
    try:
        fill(held, arrays, window, method)
    except BudgetError:
        return None
    return needle.margin(predict(model, held, window.tokens[:-1], start=manifest.prompt_tokens)[-1].cpu().numpy())
