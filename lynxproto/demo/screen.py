"""What the demo shows while it runs: one bar for each thing that moves."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from lynxproto.demo.report import Measurement, Report, level_names

__all__ = ["Screen"]


class Screen:
    """Progress bars on ``console``; a line is left for each finished run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=5,
        )
        self._stage = self._progress.add_task("starting two processes", total=None)
        self._bars: dict[str, TaskID] = {}
        self._method = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Say what is going on."""
        self._progress.update(self._stage, description=text)

    def plan(self, runs: int) -> None:
        """How many runs there will be."""
        self._progress.update(self._stage, total=runs)

    def facts(self, report: Report) -> None:
        """Print what the runs have in common."""
        for line in report.facts():
            self._console.print(line, highlight=False)

    def begin(self, method: str, what: str) -> None:
        """A run starts."""
        self._method = method
        self.stage(f"{what}: {method}")
        for bar in self._bars.values():
            self._progress.remove_task(bar)
        self._bars.clear()

    def end(self, measurement: Measurement) -> None:
        """A run ended."""
        self._progress.advance(self._stage)
        self._console.print(f"  {self._progress.tasks[0].description:<31} {measurement.line()}", highlight=False)

    def on_prefill(self, event: dict[str, Any]) -> None:
        """An event of the prefill process."""
        if event["kind"] == "stage":
            self.stage(event["text"])
        elif event["kind"] == "prefill":
            self._bar("prefill, layers", event["layer"], event["layers"])

    def on_decode(self, event: dict[str, Any]) -> None:
        """An event of the decode process."""
        if event["kind"] == "level":
            name = level_names(self._method).get(event["level"], f"level {event['level']}")
            self._bar(f"{name}, chunks", event["chunks"], event["total"])
        elif event["kind"] == "draft":
            self._bar("drafted tokens", event["count"], event["total"])
        elif event["kind"] == "verified":
            self._bar("verified tokens", event["count"], event["total"])

    def _bar(self, name: str, done: int, total: int) -> None:
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._bars[name], completed=done, total=total)
