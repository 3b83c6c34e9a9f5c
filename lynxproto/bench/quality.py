"""``lynxproto bench quality``: what lossy caches do to a model's predictions, method by method, byte for byte."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import xxhash

from lynxproto.bench.outputs import json_option, plot_option, write_json
from lynxproto.errors import BudgetError, CalibrationError, ConfigError

__all__ = ["quality"]

_QUICK: Final = {"count": 2, "context": 768, "scored": 64}
_QUICK_BUDGETS: Final = "0.2,0.3,0.45"
_TUNED: Final = 2  # windows that first/last's ratio is tuned on
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--model", "source", help="A folder of Hugging Face files or a .gguf file. Default: SmolLM2-135M-Instruct."
)
@click.option(
    "--text", type=click.Choice(["prose", "source"]), default="prose", show_default=True, help="Windows' text."
)
@click.option("--windows", type=click.IntRange(1), default=12, show_default=True, help="Pieces of the text.")
@click.option("--context", type=click.IntRange(256), default=1024, show_default=True, help="Tokens of a context.")
@click.option("--scored", type=click.IntRange(8), default=128, show_default=True, help="Tokens predicted from it.")
@click.option("--budgets", help="Shares of the uncompressed bytes, 0.2,0.3,... Default: eleven from .15 to 1.")
@click.option("--calibration", type=_FILE, help="What `lynxproto calibrate` measured; default: SmolLM2's for SmolLM2.")
@click.option("--only", multiple=True, help="Only methods whose name begins so; repeatable.")
@click.option("--skip", "skipped", type=click.Choice(["needles", "drafts", "layers"]), multiple=True, help="Leave out.")
@click.option("--quick", is_flag=True, help="Two short windows, three budgets: to see that it works, not to be quoted.")
@click.option(
    "--resume", type=click.Path(file_okay=False, path_type=Path), help="Folder of an interrupted run's parts."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: as many as torch takes.")
@json_option()
@plot_option("Draw three pictures in one.")
def quality(
    *,
    source: str | None,
    text: str,
    windows: int,
    context: int,
    scored: int,
    budgets: str | None,
    calibration: Path | None,
    only: Sequence[str],
    skipped: Sequence[str],
    quick: bool,
    resume: Path | None,
    threads: int | None,
    json_path: str | None,
    plot_path: Path | None,
) -> None:
    """Measure what lossy caches do to a model's predictions.

    KL, top-1 agreement, perplexity, drafts, needles and layers at given budgets, method by method. Every method
    replaces the stored exact cache of a context; the tokens that follow are scored on both. Results are kept as
    they are found: an interrupted run goes on where it was (--resume, or the same options again).
    """
    from rich.console import Console

    from lynxproto.bench.machine import environment
    from lynxproto.bench.quality_report import draw, print_tables
    from lynxproto.integrations.loading import use_threads

    sizes = {"count": windows, "context": context, "scored": scored}
    if quick:
        sizes, budgets = _QUICK, budgets or _QUICK_BUDGETS
    use_threads(threads)
    started = time.monotonic()
    console = Console(stderr=True)
    with _progress(console) as show:
        run = _Run(source, _parse(budgets), calibration, resume, show, text=text, **sizes)
        result = run.measure(only, skipped, quick=quick)
    result["environment"] = environment()
    result["seconds"] = round(time.monotonic() - started, 1)
    if json_path != "-":
        print_tables(result, Console(width=None if console.is_terminal else 150))
    if json_path is not None:
        write_json(json_path, result)
    if plot_path is not None:
        draw(result, plot_path)


def _parse(budgets: str | None) -> tuple[float, ...]:
    from lynxproto.bench.methods import BUDGETS
    from lynxproto.tiers import LEAST_BUDGET

    if budgets is None:
        return BUDGETS
    try:
        parsed = tuple(sorted({float(part) for part in budgets.split(",")}))
    except ValueError as error:
        raise ConfigError(f"--budgets {budgets!r}: numbers with commas between them, for example 0.2,0.3") from error
    if not all(LEAST_BUDGET < b <= 1 for b in parsed):
        raise BudgetError(f"--budgets {budgets!r}: a budget is above {LEAST_BUDGET} and at most 1")
    return parsed


class _Store:
    """Parts of results, by name, one small file each: what was measured is not measured again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {folder}: {error.strerror}") from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{xxhash.xxh3_64_hexdigest(name.encode())}.json"

    def get(self, name: str) -> Any:
        try:
            kept = json.loads(self._path(name).read_bytes())
        except (OSError, ValueError):
            return None
        return kept["value"] if isinstance(kept, dict) and kept.get("name") == name else None

    def put(self, name: str, value: Any) -> None:
        temporary = self._path(name).with_suffix(".part")
        temporary.write_text(json.dumps({"name": name, "value": value}))
        temporary.replace(self._path(name))


class _Run:
    """One invocation: model, windows, methods, and the store of what is known."""

    def __init__(
        self,
        source: str | None,
        budgets: tuple[float, ...],
        calibration: Path | None,
        resume: Path | None,
        show: Any,
        *,
        text: str,
        count: int,
        context: int,
        scored: int,
    ) -> None:
        from lynxproto import _native, allocation, importance, policy, tiers
        from lynxproto import quality as scoring
        from lynxproto.bench import baselines, methods
        from lynxproto.calibration import Calibration
        from lynxproto.demo.model import CALIBRATION, MODEL, cache_folder
        from lynxproto.integrations.hf import make_identity
        from lynxproto.integrations.loading import open_model

        show(0, 1, "loading the model")
        self.show, self.budgets = show, budgets
        self.opened = opened = open_model(source or MODEL)
        limit = getattr(opened.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and context + scored > limit:
            raise ConfigError(f"{opened.name} takes {limit} tokens; {context} + {scored} are too many")
        identity = make_identity(opened.model, opened.tokenizer, name=opened.name, revision=opened.revision)
        if calibration is None and opened.name == MODEL:
            calibration = CALIBRATION
        self.calibration = None if calibration is None else Calibration.load(calibration)
        if self.calibration is not None and self.calibration.model != opened.name:
            raise CalibrationError(f"{calibration} is of {self.calibration.model}, the model is {opened.name}")
        self.windows = scoring.prefill_windows(
            opened.model, opened.tokenizer, identity, cache_folder() / "windows",
            text=text, count=count, context=context, scored=scored, attention=True, on_progress=show,
        )  # fmt: skip
        key = xxhash.xxh3_128(identity.hash())
        key.update(self.windows[0].tokens.tobytes() + (self.calibration.hash if self.calibration else b""))
        # Another codec gives other words, another method other tokens: parts of their results are not mixed.
        for module in (_native, allocation, baselines, importance, methods, policy, tiers):
            key.update(Path(str(module.__file__)).read_bytes())
        self.store = _Store(resume or cache_folder() / "quality" / key.hexdigest())
        self.settings = {
            "model": opened.name, "revision": opened.revision, "text": text, "context": context, "scored": scored,
            "budgets": list(budgets), "calibrated": self.calibration is not None,
        }  # fmt: skip

    def measure(self, only: Sequence[str], skipped: Sequence[str], *, quick: bool) -> dict[str, Any]:
        """Everything, as the JSON form."""
        from lynxproto.bench import methods, quality_runs

        entries = methods.catalogue(
            self.windows,
            self.calibration,
            self.budgets,
            tune=self._tune,
            layers=len(self.windows[0].cache.manifest.layers),
        )
        if only:
            entries = [e for e in entries if any(e.name.startswith(prefix) for prefix in only)]
        if not entries:
            raise ConfigError(f"no method's name begins with {', '.join(only)}")
        rows, infeasible = self._scores(entries)
        result: dict[str, Any] = {
            "schema": "lynxproto.bench.quality/1",
            "windows": len(self.windows),
            "results": self._results(entries, rows),
            "infeasible": infeasible,
            "settings": self.settings | {"quick": quick, "first_share": self._first_share},
        }
        few = [e for e in entries if e.name in quality_runs.SHOWN]
        if "layers" not in skipped:
            result["layers"] = quality_runs.layers(self.opened, self.windows[:1], self.store, self.show)
        if "drafts" not in skipped:
            result["drafts"] = quality_runs.drafts(
                self.opened, self.windows[: 2 if quick else 4], few, self.store, self.show, length=16 if quick else 32
            )
        if "needles" not in skipped:
            contexts = (256, 512) if quick else (512, 1024, 2048)
            result["needles"] = quality_runs.needles(self.opened, few, contexts, self.store, self.show)
        return result

    def _tune(self, candidates: Mapping[str, Any]) -> str:
        """The candidate of least KL on the first windows."""
        rows = self._rows(candidates, self.windows[:_TUNED])
        best = min(candidates, key=lambda name: float(np.mean([row[2] for row in rows[name]])))
        self._first_share = float(best)
        return best

    def _scores(self, entries: Sequence[Any]) -> tuple[dict[str, list[Any]], list[dict[str, str]]]:
        rows = self._rows({e.name: e.method for e in entries}, self.windows)
        infeasible = [{"method": name, "reason": row[0]} for name, row in rows.items() if isinstance(row[0], str)]
        return {name: row for name, row in rows.items() if not isinstance(row[0], str)}, infeasible

    def _rows(self, methods: Mapping[str, Any], windows: Sequence[Any]) -> dict[str, list[Any]]:
        """bits, top-1, KL and rise of NLL of each method in each window; a text where a budget is impossible."""
        from lynxproto import quality as scoring

        rows: dict[str, list[Any]] = {name: [] for name in methods}
        total = len(methods) * len(windows)
        done = 0
        for window in windows:
            prefix = f"{int(window.tokens[0])}.{xxhash.xxh3_64_hexdigest(window.tokens.tobytes())}"
            scorer = None
            for name, method in methods.items():
                self.show(done, total, name)
                done += 1
                key = f"score {prefix} {name}"
                row = self.store.get(key)
                if row is None:
                    scorer = scorer or scoring.Scorer(self.opened.model, window)
                    try:
                        row = scorer.score(method)
                    except BudgetError as error:
                        row = str(error)
                    self.store.put(key, row)
                rows[name].append(row)
        return rows

    def _results(self, entries: Sequence[Any], rows: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
        from lynxproto.quality import Score, paired

        scores = {name: Score(name, *np.asarray(row, np.float64).T) for name, row in rows.items()}
        ours = {e.budget: scores[e.name] for e in entries if e.family == "lynx tiers" and e.name in scores}
        results = []
        for entry in entries:
            if entry.name not in scores:
                continue
            result = scores[entry.name].as_dict() | {"family": entry.family, "given_budget": entry.budget}
            if entry.budget in ours and entry.family != "lynx tiers":
                difference = paired(ours[entry.budget], scores[entry.name])
                rise = np.expm1(ours[entry.budget].nll) - np.expm1(scores[entry.name].nll)
                result["ours_minus_this"] = {
                    "kl": difference.kl, "kl_se": difference.kl_se, "top1": difference.top1,
                    "top1_se": difference.top1_se, "perplexity_change": float(rise.mean()),
                    "perplexity_change_se": float(rise.std(ddof=1) / len(rise) ** 0.5) if len(rise) > 1 else None,
                }  # fmt: skip
            results.append(result)
        return results


@contextmanager
def _progress(console: Any) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<32}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("start", total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total, description=what)
