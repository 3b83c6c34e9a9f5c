"""``lynxproto bench link``: which policy for which link, with this machine's codecs, and some of it over real links."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Final, TextIO

import click

from lynxproto.bench import machine, outputs
from lynxproto.bench.outputs import json_option, plot_option
from lynxproto.chunk import Part
from lynxproto.codecspeed import made_up_words, measure_codec
from lynxproto.commands.options import BitRate
from lynxproto.linkpolicy import AutoPolicy, Choice, Chooser, CodecFigures
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.policy import Policy

__all__ = ["link"]

_RATES: Final = (50e6, 100e6, 200e6, 500e6, 1e9, 2e9, 5e9, 10e9, 20e9, 50e9, 100e9)
#: Bits per second at which predictions are checked; 0: a link that nothing slows down.
_CHECKED: Final = (100e6, 500e6, 2e9, 0.0)
#: Seconds that raw words take over a checked link, and bytes of cache at most.
_CHECK_S: Final = 1.0
_CHECK_BYTES: Final = 128 << 20
_HEADS, _TOKENS, _DIM = 8, 512, 128
_LAYER_BYTES: Final = 2 * _HEADS * _TOKENS * _DIM * 2
_KINDS: Final = ("raw", "exact", "lynx")


def _choices(chooser: Chooser, nbytes: int, rate: float) -> dict[str, Choice]:
    """The choice among all candidates (``auto``), and the best of each kind."""
    chooser.saw_link(rate / 8, "given")
    names = list(chooser.figures)
    kinds = {kind: [name for name in names if name.split("-")[0] == kind] for kind in _KINDS}
    return {"auto": chooser.choose(nbytes, names)} | {
        kind: chooser.choose(nbytes, some) for kind, some in kinds.items()
    }


def _predictions(chooser: Chooser, nbytes: int) -> list[dict[str, Any]]:
    rows = []
    for rate in _RATES:
        choices = _choices(chooser, nbytes, rate)
        kinds = {
            kind: {
                "policy": choices[kind].name,
                "usable_s": choices[kind].estimates[choices[kind].name].usable,
                "exact_s": choices[kind].estimates[choices[kind].name].exact,
            }
            for kind in _KINDS
        }
        rows.append({"link_bits_per_second": rate, "auto": choices["auto"].name, **kinds})
    return rows


def _break_evens(chooser: Chooser, nbytes: int) -> list[dict[str, Any]]:
    """Where the choice changes its kind, on a grid of 2 %."""
    points: list[dict[str, Any]] = []
    rate, before = _RATES[0], ""
    while rate <= _RATES[-1]:
        kind = _choices(chooser, nbytes, rate)["auto"].name.split("-")[0]
        if before and kind != before:
            points.append({"link_bits_per_second": rate, "below": before, "above": kind})
        rate, before = rate * 1.02, kind
    return points


def _manifest(nbytes: int) -> Manifest:
    layers = tuple(
        LayerSpec(index=index, kv_heads=_HEADS, key_dim=_DIM, value_dim=_DIM, token_stop=_TOKENS)
        for index in range(max(1, nbytes // _LAYER_BYTES))
    )
    return Manifest(
        identity=Identity(model="made up", revision="1"), dtype="bfloat16", layers=layers, prompt_tokens=_TOKENS
    )


def _receive(pipe: Pipe) -> None:
    """The receiving process: says its URL, and for each transfer when it was usable and exact."""
    asyncio.run(_receive_all(pipe))


async def _receive_all(pipe: Pipe) -> None:
    from lynxproto.session import listen

    async with listen("tcp://127.0.0.1:0", insecure=True) as receiver:
        pipe.send(receiver.url)
        async for transfer in receiver:
            await transfer.ready(level=0)
            usable = time.monotonic()
            await transfer.exact()
            pipe.send((usable, time.monotonic()))


async def _send(
    url: str, policy: Policy | AutoPolicy, manifest: Manifest, *, rate: float, pipe: Pipe, runs: int
) -> dict[str, Any]:
    from lynxproto.session import connect
    from lynxproto.transports import TokenBucket

    parts: tuple[Part, ...] = ("key", "value")
    words = [made_up_words(part, _HEADS, _TOKENS, _DIM) for part in parts]
    usable, exact, chosen = [], [], []
    shaped = TokenBucket(rate) if rate else None
    async with connect(url, policy=policy, link=shaped, insecure=True) as session:
        for _ in range(runs + 1):  # the first makes connection and memory warm
            began = time.monotonic()
            transfer = session.open(manifest)
            for layer in manifest.layers:
                await transfer.write(layer.index, *words)
            await transfer.finish()
            when = await asyncio.to_thread(pipe.recv)
            usable.append(when[0] - began)
            exact.append(when[1] - began)
            chosen.append(transfer.stats.policy)
    return {
        "usable_s": statistics.median(usable[1:]),
        "exact_s": statistics.median(exact[1:]),
        "chosen": chosen,
    }


def _check(
    chooser: Chooser, candidates: Mapping[str, Policy], rates: Sequence[float], runs: int, out: TextIO
) -> list[dict[str, Any]]:
    """Transfers between two processes over loopback, shaped by a token bucket, beside what was predicted."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs,), daemon=True)
    receiver.start()
    try:
        url = mine.recv()
        rows = []
        for rate in rates:
            nbytes = min(_CHECK_BYTES, int((rate or math.inf) / 8 * _CHECK_S) if rate else _CHECK_BYTES)
            manifest = _manifest(nbytes)
            choices = _choices(chooser, manifest.nbytes, rate) if rate else {}
            for kind in (*_KINDS, "auto"):
                policy: Policy | AutoPolicy = Policy.auto() if kind == "auto" else candidates[_best(kind, choices)]
                measured = asyncio.run(_send(url, policy, manifest, rate=rate, pipe=mine, runs=runs))
                row = {"link_bits_per_second": rate or None, "cache_bytes": manifest.nbytes, "policy": kind, **measured}
                if choices:
                    estimate = choices[kind].estimates[choices[kind].name]
                    row |= {"predicted_usable_s": estimate.usable, "predicted_exact_s": estimate.exact}
                rows.append(row)
                _show_check(row, out)
        return rows
    finally:
        receiver.kill()
        receiver.join()


def _best(kind: str, choices: Mapping[str, Choice]) -> str:
    if choices:
        return choices[kind].name
    return {"raw": "raw", "exact": "exact", "lynx": "lynx-fast-2"}[kind]


def _bits(rate: float | None) -> str:
    if rate is None:
        return "loopback"
    return f"{rate / 1e9:g} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:g} Mbit/s"


def _show_check(row: Mapping[str, Any], out: TextIO) -> None:
    predicted = (
        f"{row['predicted_usable_s']:9.3f}{row['predicted_exact_s']:9.3f}" if "predicted_usable_s" in row else " " * 18
    )
    chosen = f"  chose {', '.join(row['chosen'])}" if row["policy"] == "auto" else ""
    click.echo(
        f"{_bits(row['link_bits_per_second']):>12}{row['cache_bytes'] >> 20:>6} MiB  {row['policy']:8}"
        f"{row['usable_s']:9.3f}{row['exact_s']:9.3f}{predicted}{chosen}",
        file=out,
    )


def _plot(path: Path, rows: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]], nbytes: int) -> None:
    figure, axes = outputs.pyplot().subplots(figsize=(8, 5), layout="constrained")
    rates = [row["link_bits_per_second"] / 1e9 for row in rows]
    for number, kind in enumerate(_KINDS):
        axes.plot(rates, [row[kind]["exact_s"] for row in rows], color=f"C{number}", label=f"{kind}: exact")
        if kind != "raw":
            axes.plot(rates, [row[kind]["usable_s"] for row in rows], "--", color=f"C{number}", label=f"{kind}: usable")
    for number, point in enumerate(points):
        axes.axvline(point["link_bits_per_second"] / 1e9, color="grey", lw=0.8)
        axes.annotate(
            f"{point['below']} | {point['above']}", (point["link_bits_per_second"] / 1e9, 0.96 - 0.06 * number),
            ha="center", xycoords=("data", "axes fraction"), fontsize=8, backgroundcolor="white",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="link, Gbit/s", ylabel=f"seconds, {nbytes >> 20} MiB of cache")
    axes.legend(fontsize=8)
    outputs.save_figure(figure, path, dpi=120)


@click.command()
@click.option(
    "--cache", "mib", type=click.IntRange(1), default=1024, show_default=True, help="MiB of cache to predict."
)
@click.option("--threads", type=click.IntRange(1), help="Codec threads on each side; default: all processors.")
@click.option("--exact-weight", type=float, default=1.0, show_default=True, help="See docs/policy.md.")
@click.option(
    "--check-link", "check_links", type=BitRate(), multiple=True, help="Links to check; default: four, one unshaped."
)
@click.option("--check/--no-check", default=True, show_default=True, help="Compare with transfers over shaped links.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Transfers of a check; medians.")
@json_option()
@plot_option("Draw time against link.")
def link(
    *,
    mib: int,
    threads: int | None,
    exact_weight: float,
    check_links: Sequence[float],
    check: bool,
    runs: int,
    json_path: str | None,
    plot_path: Path | None,
) -> None:
    """Predict when a cache is usable and exact, by link.

    Raw, exact-coded and progressive, on links of 50 Mbit/s to 100 Gbit/s. Codecs are measured on this machine. Where
    the choice of `--policy auto` changes is the break-even.
    """
    auto = Policy.auto(exact_weight=exact_weight)
    threads = threads or len(machine.cpus())
    figures: dict[str, CodecFigures] = {
        name: measure_codec(policy.body).on_threads(threads) for name, policy in auto.candidates.items()
    }
    chooser = Chooser(auto, figures)
    nbytes = mib << 20
    rows, points = _predictions(chooser, nbytes), _break_evens(chooser, nbytes)
    out = sys.stderr if json_path == "-" else sys.stdout
    click.echo(f"{mib} MiB, {threads} codec threads a side; seconds to usable and exact", file=out)
    click.echo(f"{'':>12}{'raw':>10}{'exact':>18}{'lynx':>20}", file=out)
    click.echo(f"{'link':>12}{'exact':>10}{'usable':>9}{'exact':>9}{'usable':>11}{'exact':>9}   auto", file=out)
    for row in rows:
        click.echo(
            f"{_bits(row['link_bits_per_second']):>12}{row['raw']['exact_s']:>10.3f}"
            f"{row['exact']['usable_s']:>9.3f}{row['exact']['exact_s']:>9.3f}"
            f"{row['lynx']['usable_s']:>11.3f}{row['lynx']['exact_s']:>9.3f}   {row['auto']}",
            file=out,
        )
    for point in points:
        rate = _bits(float(f"{point['link_bits_per_second']:.2g}"))
        click.echo(f"break-even: {point['below']} below {rate}, {point['above']} above", file=out)
    report: dict[str, Any] = {
        "schema": "lynxproto.bench.link/1",
        "cache_bytes": nbytes,
        "threads": threads,
        "exact_weight": exact_weight,
        "predictions": rows,
        "break_even": points,
        "codecs": {
            name: [{"size": v.size, "encode": v.encode, "decode": v.decode} for v in figure.levels]
            for name, figure in figures.items()
        },
        "environment": machine.environment(),
    }
    if check:
        click.echo(f"{'':30}{'measured':>18}{'predicted':>18}", file=out)
        report["checks"] = _check(chooser, auto.candidates, check_links or _CHECKED, runs, out)
    if json_path is not None:
        outputs.write_json(json_path, report)
    if plot_path is not None:
        _plot(plot_path, rows, points, nbytes)
