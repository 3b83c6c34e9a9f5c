"""``lynxproto bench chaos``."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import click

from lynxproto.bench.chaos.pool import run_seeds
from lynxproto.bench.chaos.report import Report, explain
from lynxproto.bench.chaos.transfer import run_seed
from lynxproto.bench.machine import environment
from lynxproto.bench.outputs import json_option, write_json

__all__ = ["chaos"]


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=1000, show_default=True, help="How many seeds to run.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The first of them.")
@click.option("--step", type=click.IntRange(1), default=1, show_default=True, help="Take every so many-th seed.")
@click.option("--workers", type=click.IntRange(1), help="Processes that run seeds; default: two for each CPU.")
@click.option(
    "--patience",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    help="Multiply all timeouts by this: for a machine that is busy, where 3 s without the CPU are no fault of a link.",
)
@click.option("--seed", type=click.IntRange(0), help="Run this one alone, in this process.")
@click.option("--verbose", is_flag=True, help="With --seed: show the log, and record what crossed the proxy's side.")
@click.option(
    "--capture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --verbose: where, for `lynxproto inspect`; default: chaos-SEED.lynx.",
)
@json_option()
def chaos(
    *,
    seeds: int,
    first: int,
    step: int,
    workers: int | None,
    patience: float,
    seed: int | None,
    verbose: bool,
    capture: Path | None,
    json_path: str | None,
) -> None:
    """Run seeded transfers over damaged links.

    Each seed states beforehand whether it must end exact, or with which errors; most are exact. Exit code 1: a seed
    ended otherwise, with wrong words, never, or left a task, thread, descriptor, buffer or file behind.
    """
    started = time.perf_counter()
    if seed is not None:
        if verbose:
            logging.basicConfig(level=logging.DEBUG, format="%(relativeCreated)8.0f ms %(threadName)s %(message)s")
            logging.getLogger("asyncio").setLevel(logging.WARNING)
            capture = capture or Path(f"chaos-{seed}.lynx")
        outcomes = [run_seed(seed, patience=patience, capture=capture)]
        click.echo(explain(outcomes[0]), err=json_path == "-")
        if capture is not None and capture.exists():
            click.echo(f"what the connecting side sent and received: lynxproto inspect {capture}", err=True)
        count = 1
    else:
        count = workers or 2 * len(os.sched_getaffinity(0))  # they wait most of the time
        outcomes = []
        for outcome in run_seeds(range(first, first + seeds * step, step), count, patience):
            outcomes.append(outcome)
            if not outcome.good:
                click.echo(explain(outcome), err=True)
            elif len(outcomes) % 50 == 0:
                click.echo(f"{len(outcomes)} of {seeds}, {time.perf_counter() - started:.0f} s", err=True)
    outcomes.sort(key=lambda outcome: outcome.seed)
    report = Report(outcomes, time.perf_counter() - started, count, patience, environment())
    if json_path is not None:
        write_json(json_path, report.to_dict())
    if seed is None and json_path != "-":
        click.echo(report.to_text())
    if not report.good:
        sys.exit(1)
