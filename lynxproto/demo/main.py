"""What ``lynxproto demo`` does: run, print, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lynxproto.bench.outputs import check_file, check_plot, write_json
from lynxproto.demo.plot import write_plot
from lynxproto.demo.run import Settings, run

__all__ = ["run_demo"]


def run_demo(*, json_file: Path | None = None, plot_file: Path | None = None, **settings: Any) -> bool:
    """Run the demo with :class:`Settings`; print the tables; return whether all checks held.

    Raises :class:`~lynxproto.errors.LynxError` for what keeps it from running.
    """
    console = Console()
    if json_file is not None:
        check_file(json_file)
    if plot_file is not None:
        check_plot(plot_file)
    report = run(Settings(**settings), console)
    for table in report.tables():
        console.print()
        console.print(table)
    console.print()
    for line in report.conclusions():
        console.print(line, highlight=False)
    console.print(f"The model went on: [italic]{escape(repr(report.text))}[/italic]", highlight=False)
    if json_file is not None:
        write_json(str(json_file), report.as_json())
        console.print(f"wrote {json_file}", markup=False)
    if plot_file is not None:
        write_plot(report, plot_file)
        console.print(f"wrote {plot_file}", markup=False)
    return all(report.checks().values())
