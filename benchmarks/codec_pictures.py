"""The pictures of docs/codec.md.

    lynxproto bench codec --json codecs.json
    python benchmarks/cross_calibration.py --json cross.json
    python benchmarks/codec_pictures.py --codecs codecs.json --quality cross.json -o docs/images

``codec-levels.png`` needs no measurement: it follows from spec/codec-hq.md for one group of values.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt

LEVEL_COLORS = ("#1f5fa8", "#6aa9e0", "#bcd9f2")
PEER, OURS = "#8c8c8c", "#1f5fa8"
LOW, HIGH, WORD = -1.9, 2.3, 0.7421875  # a group's range, and one of its values


def floats(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The values of bfloat16 words."""
    return (words << 16).astype(np.uint32).view(np.float32)


def bits(value: float) -> int:
    """A binary32 pattern."""
    return int(np.float32(value).view(np.uint32))


def draw_levels(path: Path) -> None:
    """One value of a group: its cell of 3 bits, its cell of 8 bits, its rank among the words of that cell."""
    used, offset, cell = 224, 16, 32  # R, o and 2^(8-b) of 3 bits
    step = np.float32((HIGH - LOW) / used)
    scale = float(floats(np.array([(bits(step) + 0x3FFFF) >> 18 << 2], np.uint32))[0])
    k_low, k = (round(x / scale) for x in (LOW, WORD))
    code = k - k_low + offset

    def value(integer: float) -> float:
        return float((integer - offset + k_low) * scale)

    low, high = ((bits((2 * abs(k) + side) * scale / 2) + 0xFFFF) >> 16 for side in (-1, 1))
    word = bits(WORD) >> 16
    figure, axes = plt.subplots(3, 1, figsize=(9, 4.6), layout="constrained")
    rows: list[tuple[str, list[float], list[float], int]] = [
        (
            f"level 0: the {code >> 5:03b} of code {code >> 5:03b}·{code & 31:05b} says which of 8 cells;\n"
            "reconstruction (marks) reaches both ends of the group's range",
            [value(u * cell - 0.5) for u in range(9)],
            [value(u * cell + offset) for u in range(8)],
            code >> 5,
        ),
        (
            f"level 1: the {code & 31:05b} of code {code >> 5:03b}·{code & 31:05b} says which of that cell's 32",
            [value((code >> 5) * cell + n - 0.5) for n in range(33)],
            [],
            code & 31,
        ),
        (
            f"level 2: rank {word - low} among the {high - low} bfloat16 words of that cell: "
            f"{int(np.log2(high - low))} to {int(np.ceil(np.log2(high - low)))} bits",
            [float(x) for x in floats(np.arange(low, high + 1, dtype=np.uint32))],
            [],
            word - low,
        ),
    ]
    for axis, color, (title, edges, marks, chosen) in zip(axes, LEVEL_COLORS, rows, strict=True):
        for n, (left, right) in enumerate(pairwise(edges)):
            face = color if n == chosen else "white"
            axis.add_patch(
                plt.Rectangle((left, 0), right - left, 1, facecolor=face, edgecolor="#666666", linewidth=0.6)
            )
        axis.plot(marks, [0.5] * len(marks), "|", color="black", markersize=9)
        axis.plot(WORD, 1.25, "v", color="#c0392b")
        span = edges[-1] - edges[0]
        axis.set_xlim(edges[0] - 0.02 * span, edges[-1] + 0.02 * span)
        axis.set_ylim(0, 1.5)
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_title(title, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"One value ({WORD}) of a group that reaches from {LOW} to {HIGH}", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_bits(axis: Any, codecs: dict[str, Any]) -> None:
    """Bits by level of the codecs that have levels, above those that have not."""
    source = max((s for s in codecs["sources"]), key=lambda s: s["tokens"])["source"]
    results = [r for r in codecs["results"] if r["source"] == source and r["threads"] == 1 and r["exact"]]
    results.sort(key=lambda r: -r["ratio"])
    for row, result in enumerate(results):
        start = 0.0
        for level, size in enumerate(result["bits_per_value"]):
            color = PEER if result["peer"] else LEVEL_COLORS[min(level, 2)]
            axis.barh(row, size, left=start, color=color, edgecolor="white")
            start += size
        axis.text(start + 0.1, row, f"{result['ratio']:.3f}", va="center", fontsize=8)
    axis.set_yticks(range(len(results)), [label(r) for r in results], fontsize=8)
    axis.set_xlabel("bits a value; levels from dark (anchor) to light (exact)")
    axis.set_xlim(0, 17.5)
    axis.set_title(source, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def draw_speed(axis: Any, codecs: dict[str, Any]) -> None:
    """Compressed size against speed relative to memcpy: a line from encode to exact decode."""
    source = max((s for s in codecs["sources"]), key=lambda s: s["tokens"])["source"]
    for result in codecs["results"]:
        speeds = [result["to_memcpy"].get(name) for name in ("encode", "exact_decode")]
        if result["source"] != source or result["threads"] > 1 or None in speeds:
            continue
        color = PEER if result["peer"] else OURS
        axis.plot(speeds, [result["ratio"]] * 2, color=color, linewidth=1)
        axis.plot(speeds[:1], [result["ratio"]], "o", color=color, fillstyle="none")
        axis.plot(speeds[1:], [result["ratio"]], "o", color=color)
        axis.annotate(
            label(result), (max(speeds), result["ratio"]), xytext=(5, -2), textcoords="offset points", fontsize=7
        )
    axis.set_xscale("log")
    axis.set_xlabel("speed / memcpy, one core (open: encode, filled: exact decode)")
    axis.set_ylabel("of the uncompressed size")
    axis.grid(alpha=0.3)


def draw_quality(axis: Any, quality: dict[str, Any]) -> None:
    """KL against bits, with standard errors."""
    for n, result in enumerate(sorted(quality["results"], key=lambda r: (r["bits_per_value"], r["kl"]))):
        color = PEER if "int" in result["method"].lower() else OURS
        axis.errorbar(result["bits_per_value"], result["kl"], yerr=result["kl_se"], fmt="o", color=color, capsize=2)
        place = (result["bits_per_value"], result["kl"])
        text = f"{result['method']}\ntop-1 {result['top1']:.3f}"
        axis.annotate(text, place, xytext=(6, (-14, 4)[n % 2]), textcoords="offset points", fontsize=7)
    axis.set_yscale("log")
    axis.set_xlabel("anchor, bits a value, all-in")
    axis.set_ylabel("KL to the exact cache, nats")
    axis.margins(x=0.25, y=0.15)
    axis.grid(alpha=0.3)


def label(result: dict[str, Any]) -> str:
    """A codec and its preset."""
    return " ".join(filter(None, (result["codec"], result["preset"])))


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@click.command()
@click.option("--codecs", type=click.Path(exists=True, path_type=Path), help="JSON of `lynxproto bench codec`.")
@click.option(
    "--quality", type=click.Path(exists=True, path_type=Path), multiple=True, help="JSON of cross_calibration.py."
)
@click.option("-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(*, codecs: Path | None, quality: tuple[Path, ...], folder: Path) -> None:
    """Draw what there is data for."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_levels(folder / "codec-levels.png")
    if codecs is not None:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        draw_bits(axes[0], read(codecs))
        draw_speed(axes[1], read(codecs))
        figure.savefig(folder / "codec-size-speed.png", dpi=110)
    if quality:
        panels = [(f"{path.stem}: {text}", r) for path in quality for text, r in read(path)["judged_on"].items()]
        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), layout="constrained", squeeze=False)
        for axis, (title, result) in zip(axes[0], panels, strict=True):
            draw_quality(axis, result)
            axis.set_title(f"{title}, {result['windows']} windows", fontsize=9, loc="left")
        figure.savefig(folder / "codec-rate-acceptance.png", dpi=110)


if __name__ == "__main__":
    main()
