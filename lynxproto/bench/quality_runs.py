"""The slower parts of `bench quality`: one layer at a time, real drafts, needles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from lynxproto.bench.methods import Entry
from lynxproto.needles import answer, ask, plant
from lynxproto.policy import Policy
from lynxproto.quality import TEXTS, CodecMethod, Scorer, Window, fill

__all__ = ["SHOWN", "drafts", "layers", "needles"]

#: Methods that drafts and needles are run with.
SHOWN: Final = (
    "lynx tiers 0.15", "lynx tiers 0.20", "lynx tiers 0.25", "lynx tiers 0.30", "paper's tiers 0.30",
    "random tiers 0.30", "uniform INT4", "KIVI INT4, 4 sinks", "first/last 0.30", "sink + window 0.30",
)  # fmt: skip
_DEPTHS: Final = (0.05, 0.25, 0.5, 0.75, 0.95)


class _OneLayer:
    """All exact but one part of one layer."""

    def __init__(self, layer: int, part: str) -> None:
        body = {"id": "hq", "anchor_bits": 3, "levels": 1}
        self._place, self._codec = (layer, part), CodecMethod(Policy(body=body, sinks=4, recent=0))

    def __call__(self, layer: Any, part: Any, words: Any) -> tuple[Any, float]:
        return self._codec(layer, part, words) if (layer.index, part) == self._place else (words, words.nbytes)


def layers(opened: Any, windows: Sequence[Window], store: Any, show: Any) -> list[dict[str, Any]]:
    """KL when one part of one layer alone is stored with 3 bits a value (4 sinks exact), and its squared error."""
    manifest = windows[0].cache.manifest
    results: list[dict[str, Any]] = []
    scorers: dict[int, Scorer] = {}
    total = 2 * len(manifest.layers)
    for layer in manifest.layers:
        for part in layer.parts:
            show(len(results), total, f"{part} of layer {layer.index}")
            key = f"layer {layer.index} {part} {len(windows)} {windows[0].tokens[:8].tolist()}"
            row = store.get(key)
            if row is None:
                kls = []
                for n, window in enumerate(windows):
                    scorers.setdefault(n, Scorer(opened.model, window))
                    kls.append(scorers[n].score(_OneLayer(layer.index, part))[2])
                words = windows[0].cache.arrays[layer.index, part]
                out, _ = _OneLayer(layer.index, part)(layer, part, words)
                exact, lossy = (_floats(w) for w in (words, out))
                row = [float(np.mean(kls)), float(np.square(lossy - exact).sum() / np.square(exact).sum())]
                store.put(key, row)
            results.append({"layer": layer.index, "part": part, "kl": row[0], "relative_squared_error": row[1]})
    return results


def _floats(words: Any) -> Any:
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def drafts(
    opened: Any, windows: Sequence[Window], entries: Sequence[Entry], store: Any, show: Any, *, length: int
) -> list[dict[str, Any]]:
    """Real drafts: ``length`` tokens, greedy, on the method's cache; how many of them the exact cache accepts."""
    results = []
    total = len(entries) * len(windows)
    for n, entry in enumerate(entries):
        accepted = []
        for m, window in enumerate(windows):
            show(n * len(windows) + m, total, f"drafts: {entry.name}")
            key = f"draft {length} {window.tokens[:8].tolist()} {entry.name}"
            count = store.get(key)
            if count is None:
                count = _draft(opened.model, window, entry, length)
                store.put(key, count)
            accepted.append(count)
        array = np.array(accepted, float)
        results.append(
            {
                "method": entry.name, "drafted": length, "runs": len(accepted), "accepted": accepted,
                "mean_accepted": float(array.mean()),
                "mean_accepted_se": float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else None,
            }
        )  # fmt: skip
    return results


def _draft(model: Any, window: Window, entry: Entry, length: int) -> int:
    import torch

    from lynxproto.integrations.hf import HFEngine, WordCache

    manifest = window.cache.manifest
    start = manifest.prompt_tokens
    held = WordCache(model.config, start + length, dtype=manifest.dtype)
    arrays = held.allocate(manifest, model)
    fill(held, arrays, window, entry.method)
    tokens = [int(window.tokens[0])]
    with torch.inference_mode():
        for n in range(length):
            output = model(
                torch.tensor([[tokens[-1]]]), past_key_values=held, use_cache=True,
                position_ids=torch.tensor([[start + n]]),
            )  # fmt: skip
            tokens.append(int(output.logits[0, -1].argmax()))
    fill(held, arrays, window, lambda layer, part, words: (words, 0.0))
    chosen = HFEngine(model, held).verify(tokens[:-1]).argmax(-1)
    wrong = np.flatnonzero(chosen != np.array(tokens[1:]))
    return int(wrong[0]) if len(wrong) else length


def needles(
    opened: Any, entries: Sequence[Entry], contexts: Sequence[int], store: Any, show: Any
) -> list[dict[str, Any]]:
    """Margins of needles by method, context and depth, in nats; found where positive. The exact cache's come first."""
    filler = opened.tokenizer(TEXTS["prose"]()[-200_000:], add_special_tokens=False)["input_ids"]
    names = ["exact", *(e.name for e in entries)]
    margins: dict[tuple[str, int], list[float | None]] = {}
    total = len(contexts) * len(_DEPTHS)
    for n, context in enumerate(contexts):
        key = f"needles {context} {names}"
        found = store.get(key)
        if found is None:
            tokens, planted = plant(opened.tokenizer, filler, context, _DEPTHS, seed=context)
            found = []
            for m, (needle, window) in enumerate(ask(opened, tokens, planted)):
                show(n * len(_DEPTHS) + m, total, f"needles in {context} tokens")
                found.append(
                    [answer(opened.model, window, needle, method) for method in (_exact, *(e.method for e in entries))]
                )
            store.put(key, found)
        for m, name in enumerate(names):
            margins[name, context] = [row[m] for row in found]
    return [
        {"method": name, "context": context, "depths": list(_DEPTHS), "margins": row}
        for (name, context), row in margins.items()
    ]


def _exact(layer: Any, part: Any, words: Any) -> tuple[Any, float]:
    return words, words.nbytes
