"""``lynxproto calibrate``: measure a model and write its calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

__all__ = ["calibrate"]


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to calibrate on, UTF-8. Default: English prose of the Python reference manual.",
)
@click.option("--windows", type=click.IntRange(min=1), default=2, show_default=True, help="Pieces of the text to use.")
@click.option("--context", type=click.IntRange(min=100), default=1024, show_default=True, help="Tokens of a context.")
@click.option("--scored", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens predicted from it.")
@click.option("--name", help="The model's name in caches, if not the folder's or file's.")
@click.option("--revision", help="The model's revision in caches, if not a hash of its files.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: as many as torch takes.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
def calibrate(
    *,
    model: str,
    output: Path,
    text: Path | None,
    windows: int,
    context: int,
    scored: int,
    name: str | None,
    revision: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure which key channels and value heads need bits.

    Writes a small file for `send --calibration`. MODEL is a folder of Hugging Face files, a .gguf file, or
    SmolLM2-135M-Instruct (the demo's model).
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from lynxproto import calibration
    from lynxproto.bench.outputs import check_file
    from lynxproto.integrations.loading import open_model, use_threads

    check_file(output)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task("loading the model", total=None)
        use_threads(threads)
        opened = open_model(model)
        result = calibration.calibrate(
            opened.model,
            _windows(opened.tokenizer, text, windows, context + scored),
            name=name or opened.name,
            revision=opened.revision if revision is None else revision,
            scored=scored,
            on_progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    result.save(output)
    summary: dict[str, Any] = {
        "schema": "lynxproto.calibrate/1",
        "path": str(output),
        "bytes": output.stat().st_size,
        "model": result.model,
        "revision": result.revision,
        "layers": len(result.keys),
        "xxh3_128": result.hash.hex(),
    }
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo(f"wrote {output}: {summary['layers']} layers of {result.model}, {summary['bytes']} bytes")


def _windows(tokenizer: Any, text: Path | None, count: int, size: int) -> list[Any]:
    from lynxproto.errors import CalibrationError
    from lynxproto.quality import TEXTS, cut

    try:
        content = TEXTS["prose"]() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {text}: {error}") from error
    # Not at the beginning of a stretch: with the default text that is where the windows of quality.py are.
    return cut(tokenizer, content, size, count, place=0.4)
