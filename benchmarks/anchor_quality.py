"""Acceptance of anchors against their bits, beside INT4 with attention sinks, on the same windows.

    python benchmarks/anchor_quality.py --calibration smollm2.json --budgets 2:2.5,2.5:3

``--budgets`` are mean widths of keys and values. ``--weights`` gives key channels widths by what each tile shows, as
the codec does without a calibration, with other weights to try: exponents of range^2, of size^2, and of size^2 of the
channel's partner. Anchors are simulated in floating point (lynxproto.calibration), so that widths can be tried on any
model that transformers runs; their bytes are widths plus the parameters that the real codec writes for the same words.
``--policies`` and ``--presets`` measure real codecs, presets also with each calibration. Results print as a table, and
with ``--json`` as schema lynxproto.bench.quality/1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lynxproto import quality
from lynxproto.calibration import Calibration, Widths, anchor_keys, anchor_values
from lynxproto.chunk import ChunkSpec, Part
from lynxproto.codecs import get_codec
from lynxproto.demo.model import MODEL, cache_folder
from lynxproto.frames import HEADER_SIZE
from lynxproto.integrations.hf import make_identity
from lynxproto.integrations.loading import open_model, use_threads
from lynxproto.manifest import LayerSpec
from lynxproto.policy import GROUP_TOKENS, Policy

FINE_BITS = 8


def _floats(words: NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(np.array(words).view(np.int16)).view(torch.bfloat16).float()


def _words(floats: Any) -> NDArray[Any]:
    import torch

    return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


class Simulated:
    """Sinks exact, the last ``recent`` tokens at 8 bits, the rest as anchors of ``widths``."""

    def __init__(self, widths: Widths, sinks: int = 4, recent: int = 32) -> None:
        self.widths, self.sinks, self.recent = widths, sinks, recent
        self._flat = [get_codec("hq", anchor_bits=bits, levels=1) for bits in (4, 5)]

    def chosen(self, layer: int, part: Part, body: Any) -> NDArray[Any]:
        """Widths of key channels, or of value heads; ``body``: the values that get them."""
        return (self.widths.keys if part == "key" else self.widths.values)[layer]

    def __call__(self, layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
        import torch

        values = _floats(words)
        heads, tokens, dim = words.shape
        fine = tokens - self.recent
        chosen = self.chosen(layer.index, part, values[:, self.sinks : fine])
        nbytes = heads * dim * self.sinks * 2.0 + HEADER_SIZE * (self.sinks > 0)
        anchor = anchor_keys if part == "key" else anchor_values
        for span, bits in ((slice(self.sinks, fine), chosen), (slice(fine, tokens), np.full_like(chosen, FINE_BITS))):
            source = words[:, span]
            if not source.size:
                continue
            values[:, span] = anchor(values[:, span], torch.from_numpy(bits.astype(np.int64)))
            spec = ChunkSpec(part, "bfloat16", heads, source.shape[1], dim)
            four, five = (memoryview(codec.encode(spec, source)[0]).nbytes for codec in self._flat)
            # A bit more for all values costs the difference; what is left without any bits is parameters and headers.
            nbytes += HEADER_SIZE + four + (float(bits.mean()) - 4) * (five - four)
        return _words(values), nbytes


class Weighed(Simulated):
    """Without a calibration: key channels weighed by their tile's ranges and sizes; spec/codec-hq.md, section 4.2."""

    def __init__(self, weights: Sequence[float], key_bits: float, value_bits: int, recent: int = 32) -> None:
        super().__init__(Widths((), ()), recent=recent)
        self.weights, self.key_bits, self.value_bits = weights, key_bits, value_bits

    def chosen(self, layer: int, part: Part, body: Any) -> NDArray[Any]:
        if part == "value":
            return np.full(body.shape[0], self.value_bits, np.uint8)
        groups = body[:, : body.shape[1] // GROUP_TOKENS * GROUP_TOKENS].unflatten(1, (-1, GROUP_TOKENS))
        ranges = (groups.amax(2) - groups.amin(2)).mean(1)
        sizes = groups.abs().amax(2).mean(1)
        shown = (ranges, sizes, sizes.roll(sizes.shape[1] // 2, 1))
        logs = (2 * weight * x.clamp(min=2**-60).log2() for weight, x in zip(self.weights, shown, strict=True))
        import torch

        importance = (16 * sum(logs)).round().to(torch.int16).numpy()
        none = np.zeros(len(importance), np.int16)
        return Calibration(model="", method="", keys=(importance,), values=(none,)).widths(self.key_bits, 3).keys[0]


def int4_with_sinks(layer: LayerSpec, part: Part, words: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """KIVI's grouping (keys per channel over 64 tokens, values per token over 64 channels), bf16 scale and minimum."""
    import torch

    values, sinks, group = _floats(words), 4, 64
    body = values[:, sinks:]
    if part == "key":
        missing = -body.shape[1] % group
        groups = torch.cat([body, body[:, -1:].expand(-1, missing, -1)], 1).unflatten(1, (-1, group))
        dim = 2
    else:
        groups, dim = body.unflatten(2, (-1, group)), 3
    low = groups.amin(dim, keepdim=True).bfloat16().float()
    scale = ((groups.amax(dim, keepdim=True) - low) / 15).bfloat16().float().clamp(min=1e-30)
    codes = ((groups - low) / scale).round().clamp(0, 15)
    out = (codes * scale + low).flatten(dim - 1, dim)
    values[:, sinks:] = out[:, : body.shape[1]]
    return _words(values), words[:, :sinks].size * 2 + words[:, sinks:].size * (4 + 32 / group) / 8


def _budget(text: str) -> tuple[float, float]:
    keys, _, values = text.partition(":")
    return float(keys), float(values)


@click.command()
@click.option("--model", "source", default=MODEL, show_default=True)
@click.option("--text", type=click.Choice(list(quality.TEXTS)), default="prose", show_default=True)
@click.option("--windows", type=int, default=12, show_default=True)
@click.option("--context", type=int, default=1792, show_default=True)
@click.option("--scored", type=int, default=256, show_default=True)
@click.option(
    "--calibration", "files", type=click.Path(exists=True, path_type=Path), multiple=True, help="Side file; repeatable."
)
@click.option(
    "--weights", default="", help="Without a calibration: range:size:partner, ...; the codec's: .375:.375:.375"
)
@click.option("--budgets", default="2:2.5,2.5:3", show_default=True, help="Mean key bits:value bits, ...")
@click.option("--recent", default="32", show_default=True, help="Recent tokens at 8 bits: one or more counts, 16,32")
@click.option("--policies", default="", help="Real policies to measure: bf16,int8,int4,lynx")
@click.option("--presets", default="", help="Presets of hq to measure as they are sent: fast,balanced,dense")
@click.option("--threads", type=int)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    *, source: str, text: str, windows: int, context: int, scored: int, files: tuple[Path, ...], weights: str,
    budgets: str, recent: str, policies: str, presets: str, threads: int | None, json_path: Path | None,
) -> None:  # fmt: skip
    """Measure."""
    use_threads(threads)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading the model", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        opened = open_model(source)
        identity = make_identity(opened.model, opened.tokenizer, name=opened.name, revision=opened.revision)
        cut = quality.prefill_windows(
            opened.model, opened.tokenizer, identity, cache_folder() / "windows",
            text=text, count=windows, context=context, scored=scored, on_progress=show,
        )  # fmt: skip
        methods: dict[str, quality.Method] = {"int4, 4 sinks": int4_with_sinks}
        for name in filter(None, policies.split(",")):
            methods[name] = quality.CodecMethod(Policy.named(name))  # type: ignore[arg-type]  # it refuses unknown names
        calibrations = {path.stem: Calibration.load(path) for path in files}
        for preset in filter(None, presets.split(",")):
            methods[preset] = quality.CodecMethod(Policy.lynx(preset))
            for name, calibration in calibrations.items():
                methods[f"{preset}, {name}"] = quality.CodecMethod(Policy.lynx(preset, calibration))
        for name, calibration in calibrations.items():
            for budget in filter(None, budgets.split(",")):
                for count in recent.split(","):
                    label = f"{name} K{budget.replace(':', ' V')} r{count}"
                    methods[label] = Simulated(calibration.widths(*_budget(budget)), recent=int(count))
        for text_weights in filter(None, weights.split(",")):
            for budget in filter(None, budgets.split(",")):
                key_bits, value_bits = _budget(budget)
                triple = [float(weight) for weight in text_weights.split(":")]
                methods[f"{text_weights} K{budget.replace(':', ' V')}"] = Weighed(triple, key_bits, int(value_bits))
        scores = quality.evaluate(opened.model, cut, methods, show)
    table = Table("method", "bits", "top-1", "KL", "paired KL to INT4", "perplexity")
    for score in scores:
        d, r = quality.paired(score, scores[0]), score.as_dict()
        table.add_row(
            score.name,
            f"{r['bits_per_value']:.3f}",
            f"{r['top1']:.4f} ± {r['top1_se']:.4f}",
            f"{r['kl']:.5f} ± {r['kl_se']:.5f}",
            f"{d.kl:+.5f} ± {d.kl_se:.5f}",
            f"{100 * r['perplexity_change']:+.2f} %",
        )
    Console(width=120).print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(quality.report(scores), indent=1))


if __name__ == "__main__":
    main()
