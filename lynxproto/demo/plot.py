"""The timeline: for each method what the link carried, and what the decode engine did meanwhile."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from lynxproto.bench import outputs
from lynxproto.demo.report import METHODS, Measurement, Report, Table, level_names

__all__ = ["write_plot"]

_LEVELS: Final = ("#1f5fa8", "#6aa9e0", "#bcd9f2")
_WHOLE: Final = "#8c8c8c"
_DRAFT, _VERIFY, _DECODE = "#e8a33d", "#c0392b", "#4c9a5f"
_NAMES: Final = {"bf16": "BF16", "int8": "INT8", "int4": "INT4", "lynxproto": "lynxproto"}


def write_plot(report: Report, path: Path) -> None:
    """Draw the run of each method whose first token took the median time."""
    plt = outputs.pyplot()
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
    runs = {method: _typical(report.measurements[Table.SENT_WHOLE][method]) for method in METHODS}
    for row, (method, run) in enumerate(reversed(runs.items())):
        _draw(axes, row, method, run)
    axes.set_yticks(
        [row + dy for row in range(len(runs)) for dy in (-0.19, 0.19)],
        [label for method in reversed(runs) for label in ("decode engine", f"{_NAMES[method]}   link")],
    )
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the KV cache was complete")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{report.model}, {report.prompt_tokens:,} prompt tokens, {report.link / 1e6:.0f} Mbit/s, "
        f"{report.decode} decoded tokens\nfirst token {report.speedup:.2f} times sooner than INT8",
        fontsize=11,
        loc="left",
    )
    names = level_names("lynxproto")
    handles: list[Any] = [Patch(color=_LEVELS[level], label=f"link: {name}") for level, name in names.items()]
    handles += [
        Patch(color=_WHOLE, label="link: whole cache"),
        Patch(color=_DRAFT, label="drafting (provisional)"),
        Patch(color=_VERIFY, label="verification"),
        Patch(color=_DECODE, label="decoding"),
        plt.Line2D([], [], marker="v", color="black", linestyle="", label="first decoded token"),
        plt.Line2D([], [], marker="D", color="black", linestyle="", markersize=5, label=f"token {report.decode} final"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    outputs.save_figure(figure, path, dpi=150)


def _typical(runs: list[Measurement]) -> Measurement:
    return sorted(runs, key=lambda run: run.first_provisional)[len(runs) // 2]


def _draw(axes: Any, row: int, method: str, run: Measurement) -> None:
    marks = {name: run.since_complete(time) for name, time in run.decode["marks"].items()}
    spans: dict[int, list[tuple[float, float]]] = {}
    arrivals = [(0.0, 0, 0), *((run.since_complete(t), level, n) for t, level, n in run.decode["progress"])]
    for (start, _, _), (stop, level, _) in pairwise(arrivals):
        spans.setdefault(level, []).append((start, stop - start))
    for level, bars in spans.items():
        color = _LEVELS[min(level, 2)] if method == "lynxproto" else _WHOLE
        axes.broken_barh(bars, (row + 0.03, 0.32), color=color, linewidth=0)
    engine = (row - 0.35, 0.32)
    start = marks["anchor"]
    if run.decode["drafted"]:
        axes.broken_barh([(start, marks["drafted"] - start)], engine, color=_DRAFT)
        start = marks["settled"]
        axes.broken_barh([(marks["exact"], start - marks["exact"])], engine, color=_VERIFY)
    axes.broken_barh([(start, marks["end"] - start)], engine, color=_DECODE)
    axes.plot(run.first_provisional, row - 0.19, "v", color="black")
    axes.plot(run.last_verified, row - 0.19, "D", color="black", markersize=5)
