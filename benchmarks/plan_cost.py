"""What plans by attention cost: the hook's time in prefill, the planning, and how long a layer's plan waits.

    python benchmarks/plan_cost.py --policy-file policy.json

Without importance by attention a layer can be planned when its K and V exist; with it, when its attention's queries
have met its keys, a moment later; in a prefill of several pieces only in the last one. Medians over runs, as JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from lynxproto.demo.model import MODEL
from lynxproto.integrations.attention import AttentionMass, watch_attention
from lynxproto.integrations.hf import HFEngine, WordCache, make_identity, make_manifest
from lynxproto.integrations.loading import open_model, use_threads
from lynxproto.policy import Policy
from lynxproto.quality import QUERIES, TEXTS


@click.command()
@click.option("--model", "source", default=MODEL, show_default=True)
@click.option("--policy-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--tokens", default=1792, show_default=True)
@click.option("--piece", default=448, show_default=True, help="Tokens of a piece, for prefill in pieces.")
@click.option("--runs", default=3, show_default=True)
@click.option("--threads", type=int)
def main(*, source: str, policy_file: Path, tokens: int, piece: int, runs: int, threads: int | None) -> None:
    """Measure."""
    use_threads(threads)
    opened = open_model(source)
    policy = Policy.from_file(policy_file)
    ids = [int(t) for t in opened.tokenizer(TEXTS["prose"]()[: 8 * tokens])["input_ids"][:tokens]]
    manifest = make_manifest(opened.model, tokens, make_identity(opened.model, name=opened.name))
    plain, watched, waits, in_pieces, planning = [], [], [], [], []
    for _ in range(runs):
        plain.append(_prefill(opened.model, ids, tokens, None)[0])
        seconds, wait, cache, mass = _prefill(opened.model, ids, tokens, AttentionMass(QUERIES))
        watched.append(seconds)
        waits.append(wait)
        in_pieces.append(_prefill(opened.model, ids, piece, AttentionMass(QUERIES))[1])
        started = time.perf_counter()
        for layer in manifest.layers:
            words: Any = {part: cache.words(layer.index, part) for part in layer.parts}
            policy.plan("bfloat16", layer, policy.score("bfloat16", layer, words, mass.mass[layer.index]))
        planning.append((time.perf_counter() - started) / len(manifest.layers))
    result = {
        "tokens": tokens, "queries": QUERIES, "prefill_s": statistics.median(plain),
        "prefill_watched_s": statistics.median(watched),
        "hook_share": round(statistics.median(w / p for w, p in zip(watched, plain, strict=True)) - 1, 4),
        "plan_waits_for_attention_s": statistics.median(waits), "piece": piece,
        "plan_waits_in_pieces_s": statistics.median(in_pieces), "planning_per_layer_s": statistics.median(planning),
    }  # fmt: skip
    click.echo(json.dumps(result, indent=1))


def _prefill(model: Any, ids: list[int], piece: int, mass: AttentionMass | None) -> tuple[float, float, Any, Any]:
    """Seconds; mean seconds from a layer's first K and V to its importance; the cache; the mass."""
    known: dict[int, float] = {}
    told: dict[int, float] = {}
    cache = WordCache(
        model.config, len(ids), on_layer=lambda layer, keys, values: known.setdefault(layer, time.perf_counter())
    )
    engine = HFEngine(model, cache)
    started = time.perf_counter()
    for first in range(0, len(ids), piece):
        if mass is None:
            engine.prefill(ids[first : first + piece])
            continue
        mass.on_layer = lambda layer, found: told.update({layer: time.perf_counter()})
        with watch_attention(model, mass):
            engine.prefill(ids[first : first + piece])
    seconds = time.perf_counter() - started
    wait = float(np.mean([told[layer] - known[layer] for layer in told])) if told else 0.0
    return seconds, wait, cache, mass


if __name__ == "__main__":
    main()
