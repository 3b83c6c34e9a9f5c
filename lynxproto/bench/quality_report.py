"""Tables and pictures of `bench quality`'s JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lynxproto.bench import outputs

__all__ = ["draw", "print_tables"]

_OURS: Final = "lynx tiers"
_MARKS: Final = "osv^D<>PX*hpd"


def print_tables(result: Mapping[str, Any], console: Any) -> None:
    """What was measured, for people."""
    from rich.table import Table

    table = Table(
        "method", "bits", "top-1", "KL", "perplexity", "KL: ours minus this", title=f"{result['windows']} windows"
    )
    for row in result["results"]:
        difference = row.get("ours_minus_this")
        table.add_row(
            row["method"],
            f"{row['bits_per_value']:.3f}",
            f"{row['top1']:.4f} ± {row['top1_se']:.4f}",
            f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
            f"{100 * row['perplexity_change']:+.2f} ± {100 * row['perplexity_change_se']:.2f} %",
            "" if difference is None else f"{difference['kl']:+.5f} ± {difference['kl_se']:.5f}",
        )
    console.print(table)
    for entry in result["infeasible"]:
        console.print(f"{entry['method']}: {entry['reason']}", markup=False)
    if "drafts" in result:
        table = Table("method", "accepted", title="Real drafts")
        for row in result["drafts"]:
            se = "" if row["mean_accepted_se"] is None else f" ± {row['mean_accepted_se']:.1f}"
            table.add_row(row["method"], f"{row['mean_accepted']:.1f}{se} of {row['drafted']}")
        console.print(table)
    if "needles" in result:
        contexts = sorted({row["context"] for row in result["needles"]})
        table = Table("method", *(f"{c} tokens" for c in contexts), title="Needles found; least margin, nats")
        for method in dict.fromkeys(row["method"] for row in result["needles"]):
            table.add_row(method, *(_needles(result, method, context) for context in contexts))
        console.print(table)
    if "layers" in result:
        table = Table("layer", "keys", "values", title="KL of one layer at 3 bits")
        for layer in sorted({row["layer"] for row in result["layers"]}):
            found = {row["part"]: row["kl"] for row in result["layers"] if row["layer"] == layer}
            table.add_row(str(layer), *(f"{found[part]:.6f}" if part in found else "" for part in ("key", "value")))
        console.print(table)


def _needles(result: Mapping[str, Any], method: str, context: int) -> str:
    rows = [row["margins"] for row in result["needles"] if (row["method"], row["context"]) == (method, context)]
    margins = [m for row in rows for m in row]
    if any(m is None for m in margins):
        return "impossible"
    return f"{sum(m > 0 for m in margins)} of {len(margins)}; {min(margins):+.2f}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Rate against divergence and disagreement, needles, layers. Raises MissingDependencyError without matplotlib."""
    figure, axes = outputs.pyplot().subplots(2, 2, figsize=(14, 10), layout="constrained")
    _rate(axes[0, 0], result["results"], "kl", "KL (nats)")
    _rate(axes[0, 1], result["results"], "disagreement", "1 - top-1 agreement")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=7, loc="outside lower center")
    if "needles" in result:
        _heat(axes[1, 0], result["needles"])
    if "layers" in result:
        _layers(axes[1, 1], result["layers"])
    settings = result["settings"]
    figure.suptitle(
        f"{settings['model']}, {result['windows']} windows of {settings['context']} + {settings['scored']} tokens"
    )
    outputs.save_figure(figure, path, dpi=100)


def _rate(axes: Any, rows: Sequence[Mapping[str, Any]], field: str, label: str) -> None:
    families = list(dict.fromkeys(row["family"] for row in rows))
    for n, family in enumerate(families):
        points = sorted(
            (row["bits_per_value"], row["kl"] if field == "kl" else 1 - row["top1"])
            for row in rows
            if row["family"] == family
        )
        line = "-" if len(points) > 1 and family not in ("uniform", "KIVI", "QuantSpec", "CacheGen", "preset") else ""
        axes.plot(
            *zip(*points, strict=True), marker=_MARKS[n % len(_MARKS)], linestyle=line, label=family,
            linewidth=2.5 if family == _OURS else 1, zorder=3 if family == _OURS else 2,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(1.5, 10)
    axes.set_xlabel("bits a value, everything counted")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _heat(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    contexts = sorted({row["context"] for row in rows})
    depths = rows[0]["depths"]
    grid = [
        [
            float("nan") if m is None else m
            for context in contexts
            for row in rows
            if (row["method"], row["context"]) == (method, context)
            for m in row["margins"]
        ]
        for method in methods
    ]
    image = axes.imshow(grid, cmap="RdYlGn", vmin=-6, vmax=6, aspect="auto")
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    labels = [f"{depth:.2f}" for _ in contexts for depth in depths]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_xlabel("depth of the needle, in contexts of " + ", ".join(map(str, contexts)) + " tokens")
    axes.set_title("Margin of the right answer, nats (found if positive)", fontsize=9)
    axes.figure.colorbar(image, ax=axes)


def _layers(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for part, colour in (("key", "tab:blue"), ("value", "tab:orange")):
        points = [(row["layer"], row["kl"]) for row in rows if row["part"] == part]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"{part}s")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("KL when it alone has 3 bits a value")
    axes.grid(alpha=0.3)
    axes.legend()
