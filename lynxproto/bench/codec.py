"""``lynxproto bench codec``: density and speed of codecs on real caches, beside memcpy and peers in one run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from lynxproto.bench import contestants as contestants_
from lynxproto.bench import machine, measure, report, sources
from lynxproto.bench.outputs import json_option, plot_option, write_json
from lynxproto.errors import BenchmarkError, ConfigError

__all__ = ["codec"]

#: How much larger than the last-level cache the working set is, so that no cache can hold it.
_CACHE_MULTIPLE: Final = 8
_MEMORY_SHARE: Final = (
    8  # of the available memory; words, outputs, payloads and peers' buffers take 4 to 5 times as much
)
_QUICK_BYTES: Final = 64 << 20
_QUICK_CODECS: Final = ("hq", *contestants_.UNIFORM, "zipnn")
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--source", "paths", type=_FILE, multiple=True, help="A dumped cache, or a .npy file; default: built-in.")
@click.option(
    "--built-in",
    "names",
    type=click.Choice(list(sources.BUILT_IN)),
    multiple=True,
    help="A built-in source: SmolLM2's cache of a text; default: all of them.",
)
@click.option("--codec", "codecs", multiple=True, help="Codec id, peer, or codec config as JSON; default: all.")
@click.option("--preset", "presets", multiple=True, help="Preset of hq; default: all.")
@click.option("--threads", type=click.IntRange(1), help="Measure 1 to N threads; default: 2 if there are 2 cores.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Rounds; medians are reported.")
@click.option("--chunk", "chunk_kib", type=click.IntRange(1), default=2048, show_default=True, help="Chunk size, KiB.")
@click.option(
    "--working-set",
    "working_set_mib",
    type=click.IntRange(1),
    help="MiB of words; default: 8 times the last-level cache.",
)
@click.option(
    "--cold-allocator",
    is_flag=True,
    help="Let page faults count: the clearing of new memory is charged to whoever allocates it.",
)
@click.option("--quick", is_flag=True, help="One small source, few rounds, ZipNN as the only peer: not to be quoted.")
@click.option("--quality", type=_FILE, help="JSON of `bench quality`, for the plot of rate against acceptance.")
@json_option()
@plot_option("Draw ratio against speed.")
def codec(
    *,
    paths: Sequence[Path],
    names: Sequence[str],
    codecs: Sequence[str],
    presets: Sequence[str],
    threads: int | None,
    runs: int,
    chunk_kib: int,
    working_set_mib: int | None,
    cold_allocator: bool,
    quick: bool,
    quality: Path | None,
    json_path: str | None,
    plot_path: Path | None,
) -> None:
    """Measure size and speed of codecs on real caches.

    One core, pinned (then several, pinned); a working set that no cache holds; contestants take turns, each beside
    memcpy; medians; every decoded word is compared. Peers that are not installed are named
    (pip install 'lynxproto[bench]').
    """
    from rich.console import Console

    if quick:
        runs, codecs = min(runs, 2), codecs or _QUICK_CODECS
        names = names or (() if paths else tuple(sources.BUILT_IN)[:1])
    quality_results = None if quality is None else report.read_quality(quality)
    chosen, skipped = contestants_.select(codecs, presets)
    if not chosen:
        raise ConfigError("; ".join(f"{s.codec}: {s.reason}" for s in skipped) or "nothing to measure")
    target = _QUICK_BYTES if quick else _CACHE_MULTIPLE * machine.last_level_cache()
    if working_set_mib is not None:
        target = working_set_mib << 20
    bound = machine.available_bytes() // _MEMORY_SHARE
    counts = _thread_counts(threads)
    console = Console(stderr=True)
    measured: list[measure.Run] = []
    policy: dict[tuple[str, str], list[float]] = {}
    with machine.calm(cold_allocator=cold_allocator) as warm, _progress(console) as (note, advance):
        loaded = [sources.read_source(path) for path in paths]
        if names or not paths:
            loaded += sources.built_in(names or tuple(sources.BUILT_IN), note)
        for source in loaded:
            note(f"{source.name}: memory")
            source = source.fitting(bound)
            working_set = sources.WorkingSet(source, target=min(target, bound), chunk_bytes=chunk_kib << 10)
            run = measure.Run(working_set, chosen, counts)
            skipped += [contestants_.Skipped(c.label, f"cannot code {source.name}") for c in run.refused]
            if not run.cases:
                raise BenchmarkError(f"none of the codecs can code {source.name} ({source.dtype})")
            run.measure(runs, advance(run.steps(runs)))
            for case in run.cases:
                contestant = case.contestant
                if case.threads == 1 and isinstance(contestant, contestants_.Ours) and contestant.codec == "hq":
                    note(f"{source.name}: {contestant.label} under the default policy")
                    policy[source.name, contestant.label] = measure.policy_bits(source, contestant)
            run.set.release()
            measured.append(run)
    result = report.Report(
        measured,
        skipped,
        {
            "runs": runs,
            "threads": counts,
            "chunk_bytes": chunk_kib << 10,
            "working_set_bytes": min(target, bound),
            "working_set_bound_by_memory": bound < target,
            "last_level_cache_bytes": machine.last_level_cache(),
            "warm_allocator": warm,
            "quick": quick,
        },
        machine.environment(),
        policy,
    )
    if json_path != "-":
        result.print(Console(width=None if sys.stdout.isatty() else 180))
    if json_path is not None:
        write_json(json_path, result.to_dict())
    if plot_path is not None:
        result.plot(plot_path, quality_results)


def _thread_counts(threads: int | None) -> list[int]:
    """1, 2, 4... and the largest."""
    available = len(machine.cpus())
    if threads is None:
        threads = min(2, available)
    elif threads > available:
        raise ConfigError(
            f"--threads {threads}: this process may use {available} processors; each thread needs its own"
        )
    counts = [1]
    while counts[-1] < threads:
        counts.append(min(2 * counts[-1], threads))
    return counts


@contextmanager
def _progress(console: Any) -> Iterator[tuple[sources.Note, Any]]:
    """Two functions: one that says what is being done, and one that makes a bar of so many steps."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # It is drawn between the steps only: a thread that draws would take time from what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bars:
        task = bars.add_task("start", total=None)

        def note(text: str) -> None:
            bars.update(task, description=text, refresh=True)

        def advance(steps: int) -> Any:
            bars.reset(task, total=steps)
            started = False

            def step(text: str) -> None:
                nonlocal started
                bars.update(task, description=text, advance=1 if started else 0, refresh=True)
                started = True

            return step

        yield note, advance
