"""Calibrate on one kind of text, judge on another: does a calibration belong to its model, or to its text?

    python benchmarks/cross_calibration.py                     # SmolLM2, prose and source code, 12 windows each
    python benchmarks/cross_calibration.py --model FOLDER      # any causal model that transformers runs

For each text the model is calibrated on two pieces of it (kept in the cache folder), and the presets with each
calibration, and without one, are judged on other pieces of each text beside INT4 with attention sinks: real codecs,
bits all-in, KL paired by window. ``--target`` adds anchors of a predicted KL: how far a model's bits go.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from anchor_quality import int4_with_sinks
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lynxproto import quality
from lynxproto.calibration import Calibration, calibrate
from lynxproto.codecs import get_codec
from lynxproto.demo.model import MODEL, cache_folder
from lynxproto.integrations.hf import make_identity
from lynxproto.integrations.loading import OpenedModel, open_model, use_threads
from lynxproto.policy import Policy

PIECES, CONTEXT, SCORED = 2, 1024, 128  # what `lynxproto calibrate` takes unless told otherwise


def calibration_of(opened: OpenedModel, text: str, show: quality.OnProgress) -> Calibration:
    """The model's calibration on a text, made once."""
    path = cache_folder() / "calibrations" / f"{opened.name}-{opened.revision}-{text}.json"
    if not path.exists():
        pieces = quality.cut(opened.tokenizer, quality.TEXTS[text](), CONTEXT + SCORED, PIECES, place=0.4)
        made = calibrate(
            opened.model, pieces, name=opened.name, revision=opened.revision, scored=SCORED,
            on_progress=lambda done, total, what: show(done, total, f"calibrating on {text}: {what}"),
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
    return Calibration.load(path)


def _reaching(calibration: Calibration, kl: float) -> Policy:
    widths = calibration.reaching(kl)
    table = {
        "keys": [["".join(map(str, head)) for head in layer.tolist()] for layer in widths.keys],
        "values": ["".join(map(str, layer.tolist())) for layer in widths.values],
    }
    return Policy(body=get_codec("hq", preset="balanced", widths=table).get_config())


@click.command()
@click.option("--model", "source", default=MODEL, show_default=True)
@click.option("--calibrate-on", "on", multiple=True, type=click.Choice(list(quality.TEXTS)), help="Default: all.")
@click.option("--judge-on", "judged", multiple=True, type=click.Choice(list(quality.TEXTS)), help="Default: all.")
@click.option("--preset", "presets", multiple=True, default=("balanced", "dense"), show_default=True)
@click.option("--target", "targets", multiple=True, type=float, help="A predicted KL, nats.")
@click.option("--windows", type=int, default=12, show_default=True)
@click.option("--context", type=int, default=1792, show_default=True)
@click.option("--scored", type=int, default=256, show_default=True)
@click.option("--threads", type=int)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    *, source: str, on: tuple[str, ...], judged: tuple[str, ...], presets: tuple[str, ...], targets: tuple[float, ...],
    windows: int, context: int, scored: int, threads: int | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Calibrate and judge."""
    use_threads(threads)
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    results: dict[str, Any] = {}
    console = Console(width=120)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading the model", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        opened = open_model(source)
        identity = make_identity(opened.model, opened.tokenizer, name=opened.name, revision=opened.revision)
        calibrations = {text: calibration_of(opened, text, show) for text in on or quality.TEXTS}
        for text in judged or quality.TEXTS:
            pieces = quality.prefill_windows(
                opened.model, opened.tokenizer, identity, cache_folder() / "windows",
                text=text, count=windows, context=context, scored=scored, on_progress=show,
            )  # fmt: skip
            methods: dict[str, quality.Method] = {"int4, 4 sinks": int4_with_sinks}
            for preset in presets:
                methods |= {
                    f"{preset}, calibrated on {of}": quality.CodecMethod(Policy.lynx(preset, calibration))
                    for of, calibration in calibrations.items()
                }
                methods[f"{preset}, no calibration"] = quality.CodecMethod(Policy.lynx(preset))
            for target in targets:
                methods |= {
                    f"KL {target:g}, calibrated on {of}": quality.CodecMethod(_reaching(calibration, target))
                    for of, calibration in calibrations.items()
                }
            scores = {score.name: score for score in quality.evaluate(opened.model, pieces, methods, show)}
            int4 = scores["int4, 4 sinks"]
            table = Table("judged on " + text, "bits", "top-1", "KL", "minus INT4's", "minus own calibration's")
            results[text] = quality.report(list(scores.values()))
            for name, entry in zip(scores, results[text]["results"], strict=True):
                own = scores.get(f"{name.partition(',')[0]}, calibrated on {text}", scores[name])
                to_int4, to_own = (quality.paired(scores[name], other) for other in (int4, own))
                entry["kl_minus_int4"], entry["kl_minus_int4_se"] = to_int4.kl, to_int4.kl_se
                entry["kl_minus_own"], entry["kl_minus_own_se"] = to_own.kl, to_own.kl_se
                table.add_row(
                    name,
                    f"{entry['bits_per_value']:.3f}",
                    f"{entry['top1']:.4f} ± {entry['top1_se']:.4f}",
                    f"{entry['kl']:.5f} ± {entry['kl_se']:.5f}",
                    "" if scores[name] is int4 else f"{to_int4.kl:+.5f} ± {to_int4.kl_se:.5f}",
                    "" if scores[name] is own else f"{to_own.kl:+.5f} ± {to_own.kl_se:.5f}",
                )
            console.print(table)
    if json_path is not None:
        json_path.write_text(
            json.dumps({"schema": "lynxproto.bench.cross_calibration/1", "judged_on": results}, indent=1)
        )


if __name__ == "__main__":
    main()
