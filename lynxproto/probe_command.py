"""``lynxproto probe``: which precisions a model tolerates, as a policy file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

__all__ = ["probe"]


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `lynxproto calibrate` measured of the model; default: SmolLM2's for SmolLM2, else uniform widths.",
)
@click.option("--budget", type=float, default=0.22, show_default=True, help="Level 0's share of the bytes, at least.")
@click.option("--windows", type=click.IntRange(1), default=2, show_default=True, help="Pieces of text to predict.")
@click.option("--context", type=click.IntRange(256), default=768, show_default=True, help="Tokens of their contexts.")
@click.option("--scored", type=click.IntRange(8), default=64, show_default=True, help="Tokens predicted from each.")
@click.option("--kl", type=float, default=0.05, show_default=True, help="Nats of KL that count as tolerated, at most.")
@click.option(
    "--top1", type=float, default=0.9, show_default=True, help="Agreement that counts as tolerated, at least."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: as many as torch takes.")
@click.option("--json", "as_json", is_flag=True, help="Print the evidence as JSON on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
def probe(
    *,
    model: str,
    output: Path,
    calibration: Path | None,
    budget: float,
    kl: float,
    top1: float,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **sizes: int,
) -> None:
    """Find out which precisions a model tolerates.

    Writes a policy for `send --policy-file` and Policy.from_file. MODEL is a folder of Hugging Face files, a .gguf
    file, or SmolLM2-135M-Instruct (the demo's model).
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from lynxproto.bench.outputs import check_file
    from lynxproto.integrations.loading import open_model, use_threads

    check_file(output)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("loading the model", total=None)
        use_threads(threads)
        from lynxproto import probe as probing
        from lynxproto.calibration import Calibration
        from lynxproto.demo.model import CALIBRATION, MODEL
        from lynxproto.errors import CalibrationError

        opened = open_model(model)
        if calibration is None and opened.name == MODEL:
            calibration = CALIBRATION
        measured = None if calibration is None else Calibration.load(calibration)
        if measured is not None and measured.model != opened.name:
            raise CalibrationError(
                f"{calibration} is of {measured.model}, the model is {opened.name}; run `lynxproto calibrate` on it"
            )
        result = probing.probe(
            opened,
            calibration=measured,
            budget=budget,
            bounds=probing.Bounds(kl, top1),
            on_progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
            **sizes,
        )
    result.save(output)
    summary: dict[str, Any] = {
        "schema": "lynxproto.probe/1",
        "path": str(output),
        "model": result.policy.model,
        "revision": result.policy.revision,
        "budget": result.policy.budget,
        "rule": result.policy.rule,
        **result.evidence,
    }
    click.echo(json.dumps(summary) if as_json else _sentences(summary))


def _sentences(summary: dict[str, Any]) -> str:
    lines = [
        f"INT{row['bits']} everywhere: {row['bits_per_value']:.2f} bits, top-1 {row['top1']:.3f}, KL {row['kl']:.4f}"
        for row in summary["everywhere"]
    ]
    worst = sorted(summary["layers"], key=lambda row: -row["kl"])[:3]
    lines.append(
        "most sensitive layers: " + ", ".join(f"{row['layer']} (KL {row['kl']:.4f} at 3 bits)" for row in worst)
    )
    for name, margins in summary["needles"].items():
        found = sum(m is not None and m > 0 for m in margins)
        lines.append(f"needles found, {name}: {found} of {len(margins)}")
    if not summary["needles_conclusive"]:
        lines.append("needles decide nothing: the model does not find them on the exact cache")
    if summary["int4"]:
        lines.append("tolerates tiers below 8 bits")
    else:
        lines.append("falls back to INT8 and raw words: " + "; ".join(summary["reasons"]))
    last = summary["policy"][-1]
    lines.append(
        f"wrote {summary['path']}: {summary['model']}, budget {last['budget']:.2f}, "
        f"{last['bits_per_value']:.2f} bits, top-1 {last['top1']:.3f}, KL {last['kl']:.4f}"
    )
    return "\n".join(lines)
