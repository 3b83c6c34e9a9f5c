"""Results of ``bench codec``: a table for people, JSON for programs, a picture. The keys are in docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lynxproto.bench import outputs
from lynxproto.bench.contestants import Ours, Skipped, ZipNN
from lynxproto.bench.measure import Case, Run
from lynxproto.errors import ConfigError

__all__ = ["SCHEMA", "Report", "read_quality"]

SCHEMA: Final = "lynxproto.bench.codec/1"
_QUALITY_SCHEMA: Final = "lynxproto.bench.quality/1"
_BUSY: Final = 1.1
_OPERATIONS: Final = ("encode", "anchor_encode", "anchor_decode", "exact_decode")


@dataclass(slots=True)
class Report:
    """All that one invocation measured. ``policy`` holds the bits by level of whole transfers, by (source, label)."""

    runs: list[Run]
    skipped: list[Skipped]
    settings: dict[str, Any]
    environment: dict[str, Any]
    policy: dict[tuple[str, str], list[float]]

    def memcpy(self) -> float:
        """GB/s of the faster way to copy; the mean over the sources, which it does not depend on."""
        speeds = [max(run.memcpy.speeds().values()) for run in self.runs]
        return sum(speeds) / len(speeds)

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "schema": SCHEMA,
            "memcpy_gb_per_s": _round(self.memcpy()),
            "results": [self._result(run, case) for run in self.runs for case in run.cases],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "sources": [self._source(run) for run in self.runs],
            "settings": self.settings,
            "environment": self.environment,
        }

    def _source(self, run: Run) -> dict[str, Any]:
        source = run.set.source
        return {
            "source": source.name,
            "dtype": source.dtype,
            "tokens": source.tokens,
            "bytes": source.nbytes,
            "copies": run.set.copies,
            "layers_left_out": source.layers_left_out,
            "chunk_bytes": run.set.chunk_bytes,
            "memcpy_gb_per_s": {name: _round(speed) for name, speed in run.memcpy.speeds().items()},
            "wall_to_processor_time": _round(run.load()),
            "arithmetic_scaling": {str(n): _round(run.scaling(n)) for n in run.arithmetic},
        }

    def _result(self, run: Run, case: Case) -> dict[str, Any]:
        contestant = case.contestant
        bits = case.bits()
        word_bits = 8 * case.nbytes / case.values
        result: dict[str, Any] = {
            "codec": contestant.codec,
            "preset": contestant.preset,
            "source": case.source,
            "bits_per_value": [_round(b) for b in bits],
            "ratio": _round(sum(bits) / word_bits),
            "encode_gb_per_s": _round(case.speed("encode")),
            "anchor_decode_gb_per_s": _round(case.speed("anchor_decode")),
            "exact_decode_gb_per_s": _round(case.speed("exact_decode")),
            "threads": case.threads,
            "anchor_encode_gb_per_s": _round(case.speed("anchor_encode")),
            "refine_gb_per_s": [_round(case.speed(f"refine_{n}")) for n in range(1, contestant.levels)],
            "to_memcpy": {o: _round(r) for o in case.times if (r := case.ratio_to_memcpy(o)) is not None},
            "parts": {part: self._part(case, part) for part in case.sizes},
            "peer": not isinstance(contestant, Ours),
            "exact": contestant.exact,
            "verified": True,  # a wrong word is an error, and then there is no report
            "config": contestant.config,
            "version": contestant.version,
            "runs": case.rounds,
        }
        if case.call_seconds:
            result["call_seconds"] = {name: _round(value) for name, value in case.call_seconds.items()}
        to_zipnn = self._to_zipnn(run, case)
        if to_zipnn:
            result["to_zipnn"] = to_zipnn
        if case.state_bytes:
            result["state_bits_per_value"] = _round(8 * case.state_bytes / case.values)
        policy = self.policy.get((case.source, contestant.label))
        if policy is not None:
            result["policy_bits_per_value"] = [_round(b) for b in policy]
        if case.threads > 1:
            result["scaling"] = self._scaling(run, case)
        return result

    def _to_zipnn(self, run: Run, case: Case) -> dict[str, float]:
        """Speeds as multiples of ZipNN's, both relative to the memcpy beside them."""
        zipnn = next((c for c in run.cases if c.contestant.codec == ZipNN.codec), None)
        if zipnn is None or not isinstance(case.contestant, Ours):
            return {}
        pairs = {o: (case.ratio_to_memcpy(o), zipnn.ratio_to_memcpy(o)) for o in ("encode", "exact_decode")}
        return {o: float(f"{ours / theirs:.4g}") for o, (ours, theirs) in pairs.items() if ours is not None and theirs}

    def _part(self, case: Case, part: str) -> dict[str, Any]:
        speeds = {f"{o}_gb_per_s": _round(case.part_speed(o, part)) for o in case.times}
        return {"bits_per_value": [_round(b) for b in case.bits(part)], **speeds}

    def _scaling(self, run: Run, case: Case) -> dict[str, Any]:
        """Speed at several threads over speed at one, and that over the scaling of plain arithmetic."""
        alone = next(c for c in run.cases if c.contestant is case.contestant and c.threads == 1)
        scaling: dict[str, Any] = {}
        for operation in case.times:
            factor = case.wall_speed(operation) / alone.wall_speed(operation)
            scaling[operation] = {
                "factor": _round(factor),
                "to_arithmetic": _round(factor / run.scaling(case.threads)),
            }
        return scaling

    def print(self, console: Any) -> None:
        """Tables, one a source, with the conditions that they hold under."""
        from rich.table import Table

        for run in self.runs:
            source, memcpy = run.set.source, run.memcpy.speeds()
            table = Table(
                title=f"{source.name}: {source.dtype}, {source.tokens} tokens, {source.nbytes / 1e6:.0f} MB"
                f" x {run.set.copies}; memcpy {max(memcpy.values()):.2f} GB/s",
                caption="GB/s of uncompressed bytes; in brackets the ratio to memcpy in the same round",
            )
            for name in ("codec", "threads"):
                table.add_column(name)
            for name in ("bits a value, by level", "of 16 bits" if _is_16(run) else "ratio", *_OPERATIONS, "refine"):
                table.add_column(name.replace("_", " "), justify="right")
            for case in run.cases:
                table.add_row(*self._row(case), end_section=case is run.cases[-1])
            console.print(table)
            if run.load() > _BUSY:
                console.print(
                    f"Other processes were busy: wall time was {run.load():.2f} of processor time. Speeds of one "
                    "thread are of processor time; those of several threads are of wall time and mean little.",
                    style="yellow",
                )
            for case in run.cases:
                to_zipnn = self._to_zipnn(run, case)
                if to_zipnn:
                    text = ", ".join(f"{o.replace('_', ' ')} {factor:.2f}" for o, factor in to_zipnn.items())
                    console.print(f"{case.contestant.label}, times ZipNN's speed: {text}", markup=False)
            if source.layers_left_out:
                console.print(
                    f"{source.layers_left_out} layers do not fit the memory and were left out", style="yellow"
                )
            self._print_scaling(console, run)
        for (name, label), bits in self.policy.items():
            console.print(f"{name}: {label} under the default policy: {_bits(bits)} bits a value", markup=False)
        for skipped in self.skipped:
            console.print(f"{skipped.codec}: {skipped.reason}", style="yellow", markup=False)
        if self.settings["working_set_bound_by_memory"]:
            size = self.settings["working_set_bytes"] / 2**20
            console.print(f"Too little memory for the working set: {size:.0f} MiB of words only.", style="yellow")
        if self.settings["quick"]:
            console.print("A quick run: the working set is small and so are the numbers of rounds.", style="yellow")
        console.print(
            f"{self.environment['cpu']}, {self.environment['instruction_set']} kernels; "
            f"medians of up to {self.settings['runs']} interleaved rounds; every word checked"
        )

    def _row(self, case: Case) -> list[str]:
        from rich.markup import escape

        contestant, bits = case.contestant, case.bits()
        ratio = sum(bits) * case.values / (8 * case.nbytes)

        def cell(operation: str) -> str:
            speed = case.speed(operation)
            if speed is None:
                return "" if contestant.timed else "not measured"
            to_memcpy = case.ratio_to_memcpy(operation)
            return f"{speed:.2f}" if to_memcpy is None else f"{speed:.2f} ({to_memcpy:.3f})"

        refine = [f"{case.speed(f'refine_{n}') or 0:.2f}" for n in range(1, contestant.levels) if case.times]
        return [
            escape(contestant.label),
            str(case.threads),
            _bits(bits),
            f"{ratio:.4f}",
            *(cell(operation) for operation in _OPERATIONS),
            " ".join(refine),
        ]

    def _print_scaling(self, console: Any, run: Run) -> None:
        for n in run.arithmetic:
            if n == 1:
                continue
            console.print(f"{n} threads: plain arithmetic scales {run.scaling(n):.2f}")
            for case in run.cases:
                if case.threads == n:
                    factors = self._scaling(run, case)
                    text = ", ".join(
                        f"{o.replace('_', ' ')} {factors[o]['factor']:.2f} ({factors[o]['to_arithmetic']:.2f} of that)"
                        for o in _OPERATIONS
                        if o in factors
                    )
                    console.print(f"  {case.contestant.label}: {text}", markup=False)

    def plot(self, path: Path, quality: dict[str, Any] | None = None) -> None:
        """Ratio against exact decode speed; with ``quality``, also rate against acceptance.

        Raises :class:`~lynxproto.errors.MissingDependencyError` without matplotlib.
        """
        panels = 1 if quality is None else 2
        figure, axes = outputs.pyplot().subplots(
            1, panels, figsize=(7 * panels, 5.2), squeeze=False, layout="constrained"
        )
        self._plot_speed(axes[0][0])
        if quality is not None:
            _plot_quality(axes[0][1], quality)
        outputs.save_figure(figure, path, dpi=150)

    def _plot_speed(self, axis: Any) -> None:
        run = max(self.runs, key=lambda run: run.set.source.tokens)
        points = []
        for case in run.cases:
            encode, decode = case.ratio_to_memcpy("encode"), case.ratio_to_memcpy("exact_decode")
            if encode is not None and decode is not None:  # one thread, timed, exact
                ratio = sum(case.bits()) * case.values / (8 * case.nbytes)
                points.append((ratio, (encode, decode), case.contestant))
        points.sort(key=lambda point: point[0])
        # Names stand in a column on the right, apart from each other, with a line to what they name.
        low, high = points[0][0], points[-1][0]
        gap = max(high - low, 0.01) / 16
        place = low - 2 * gap
        for ratio, speeds, contestant in points:
            place = max(place + gap, ratio)
            color = "tab:blue" if isinstance(contestant, Ours) else "tab:gray"
            axis.plot(speeds, [ratio, ratio], color=color, linewidth=1)
            axis.plot(speeds[:1], [ratio], "o", color=color, fillstyle="none")
            axis.plot(speeds[1:], [ratio], "o", color=color)
            axis.annotate(
                f"{contestant.label}  {ratio:.3f}",
                (max(speeds), ratio),
                xytext=(1.02, place),
                textcoords=axis.get_yaxis_transform(),
                color=color,
                fontsize=8,
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "lightgray"},
            )
        axis.set_xscale("log")
        axis.set_xlabel("speed / memcpy, one core (open: encode, filled: exact decode)")
        axis.set_ylabel("compressed size / uncompressed")
        axis.set_title(f"Lossless size against speed: {run.set.source.name}")
        axis.grid(alpha=0.3)


def _plot_quality(axis: Any, quality: dict[str, Any]) -> None:
    for result in quality["results"]:
        ours = "int" not in str(result["method"]).lower()
        axis.errorbar(
            [result["bits_per_value"]],
            [result["top1"]],
            yerr=[result.get("top1_se") or 0.0],
            fmt="o" if ours else "s",
            color="tab:blue" if ours else "tab:gray",
            capsize=2,
        )
        place = (result["bits_per_value"], result["top1"])
        axis.annotate(result["method"], place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("anchor, bits a value (all-in)")
    axis.set_ylabel("top-1 agreement with the exact cache")
    axis.set_title(f"Rate against acceptance ({quality.get('windows', '?')} windows)")
    axis.grid(alpha=0.3)


def read_quality(path: Path) -> dict[str, Any]:
    """The JSON of ``lynxproto bench quality``.

    Raises :class:`~lynxproto.errors.ConfigError` for anything else.
    """
    try:
        quality = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(quality, dict) or quality.get("schema") != _QUALITY_SCHEMA:
        raise ConfigError(f"{path} is not of schema {_QUALITY_SCHEMA}; make it with `lynxproto bench quality --json`")
    for result in quality.get("results", []):
        if not {"method", "bits_per_value", "top1"} <= result.keys():
            raise ConfigError(f"{path}: a result lacks method, bits_per_value or top1")
    return quality


def _is_16(run: Run) -> bool:
    return run.set.chunks[0].spec.word_dtype.itemsize == 2


def _bits(bits: Sequence[float]) -> str:
    levels = " + ".join(f"{b:.3f}" for b in bits)
    return levels if len(bits) == 1 else f"{levels} = {sum(bits):.3f}"


def _round(value: float | None) -> float | None:
    """Four significant digits are more than a measurement has."""
    return None if value is None else float(f"{value:.5g}")
