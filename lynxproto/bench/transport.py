"""``lynxproto bench transport``: goodput beside raw sockets and other engines, and what a connection can bear."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import click

from lynxproto.bench import loads, machine, outputs, transfers
from lynxproto.bench.outputs import json_option, plot_option
from lynxproto.errors import BenchmarkError, ConfigError

__all__ = ["transport"]

SCHEMA: Final = "lynxproto.bench.transport/1"
_PARTS: Final = ("goodput", "parser", "frames", "transfers", "priority")
#: What always takes part: raw sockets, and the same with the checksums, which no protocol that makes them can beat.
_REFERENCES: Final = ("raw", "summed")
_NAMES: Final = [contestant.name for contestant in transfers.CONTESTANTS if contestant.kind not in _REFERENCES]


@click.command()
@click.option(
    "--only", "parts", type=click.Choice(_PARTS), multiple=True, help="What to measure; default: all but priority."
)
@click.option("--priority", is_flag=True, help="Measure anchor latency under residual load too (minutes).")
@click.option("--transport", "names", type=click.Choice(_NAMES), multiple=True, help="Contestant; default: all.")
@click.option("--size", "mib", type=click.IntRange(1), default=512, show_default=True, help="MiB of a transfer.")
@click.option("--runs", type=click.IntRange(1), default=7, show_default=True, help="Rounds; medians are reported.")
@click.option("--open", "count", type=click.IntRange(1), default=1000, show_default=True, help="Open transfers.")
@click.option("--samples", type=click.IntRange(2), default=500, show_default=True, help="Anchors timed by --priority.")
@click.option("--rate", default="1G", show_default=True, help="Speed of the shaped link of --priority, bits a second.")
@click.option("--stripes", type=click.IntRange(1), default=2, show_default=True, help="Byte streams of --priority.")
@click.option("--shaper", type=click.Choice(["auto", "tbf", "bucket"]), default="auto", help="What shapes that link.")
@click.option("--congestion", help="TCP's congestion control on that link; default: the system's.")
@json_option()
@plot_option("Draw goodput and anchor latency.")
def transport(
    *,
    parts: Sequence[str],
    priority: bool,
    names: Sequence[str],
    mib: int,
    runs: int,
    count: int,
    samples: int,
    rate: str,
    stripes: int,
    shaper: str,
    congestion: str | None,
    json_path: str | None,
    plot_path: Path | None,
) -> None:
    """Measure transports between two processes of this machine.

    Contestants take turns, so that a busy moment hits all of them; medians. Peers that are not installed are named (pip
    install mooncake-transfer-engine-non-cuda nixl-cu12, and Debian's libibverbs1 librdmacm1 libnuma1).
    """
    from rich.console import Console

    from lynxproto.bench import priority as priority_

    wanted = set(parts) or set(_PARTS) - {"priority"}
    if priority:
        wanted.add("priority")
    if plot_path is not None and not wanted & {"goodput", "priority"}:
        raise ConfigError("--plot: there is nothing to draw; measure goodput or priority")
    console = Console(stderr=True)
    report: dict[str, Any] = {"schema": SCHEMA}
    with console.status("start") as status:
        if "goodput" in wanted:
            report |= _goodput(mib << 20, runs, names, status.update)
        if "frames" in wanted:
            status.update("frames")
            report["frames"] = loads.frames(40_000)
        if "transfers" in wanted:
            status.update(f"{count} open transfers")
            report["transfers"] = loads.open_transfers(count)
        if "parser" in wanted:
            status.update("parser")
            with machine.calm(cold_allocator=False):  # behind the others: the allocator stays as this makes it
                report["parser"] = loads.parser(128 << 20, runs)
        if "priority" in wanted:
            report["priority"] = priority_.measure(rate, shaper, samples, stripes, status.update, congestion=congestion)
    report["settings"] = {"bytes": mib << 20, "runs": runs, "processes": 2, "policy": "bf16"}
    report["environment"] = machine.environment() | _network()
    if json_path != "-":
        _print(report)
    if json_path is not None:
        outputs.write_json(json_path, report)
    if plot_path is not None:
        _plot(report, plot_path)


def _goodput(nbytes: int, runs: int, names: Sequence[str], note: Any) -> dict[str, Any]:
    chosen = [c for c in transfers.CONTESTANTS if c.kind in _REFERENCES or not names or c.name in names]
    skipped = [{"transport": c.name, "reason": why} for c in chosen if (why := transfers.missing(c)) is not None]
    missing = {entry["transport"] for entry in skipped}
    chosen = [c for c in chosen if c.name not in missing]
    times: dict[str, list[float]] = {c.name: [] for c in chosen}
    with tempfile.TemporaryDirectory() as folder:
        tls = transfers.certificates(Path(folder)) if any(c.scheme == "tcps" for c in chosen) else None
        urls = {scheme: f"{scheme}://127.0.0.1:0" for scheme in ("tcp", "tcps", "ucx")}
        urls["unix"] = f"unix://{folder}/socket"
        running: dict[str, transfers.Running] = {}
        try:
            for c in chosen:
                note(f"{c.name}: start")
                arguments: dict[str, Any] = {"nbytes": nbytes}
                if c.kind == "raw":
                    arguments["congestion"] = c.name.partition("-")[2]
                elif c.kind == "lynx":
                    arguments |= {"url": urls[c.scheme], "tls": tls if c.scheme == "tcps" else None, "policy": c.policy}
                running[c.name] = transfers.Running(c.kind, **arguments)
                running[c.name].turn()  # connections, page tables
                running[c.name].pause()
            for turn in range(runs):
                for c in chosen:
                    note(f"{c.name}: round {turn + 1} of {runs}")
                    running[c.name].go_on()
                    times[c.name].append(running[c.name].turn())
                    running[c.name].pause()
            for name, pair in running.items():
                pair.go_on()
                if not pair.same():
                    raise BenchmarkError(f"{name}: the bytes that arrived are not those that were sent")
        finally:
            for pair in running.values():
                pair.close()
    speeds = {name: nbytes / median(values) / 1e9 for name, values in times.items()}
    raw = max(speeds[c.name] for c in chosen if c.kind == "raw")
    summed = max(speeds[c.name] for c in chosen if c.kind == "summed")
    results = [
        {
            "transport": c.name,
            "peer": c.peer,
            "version": c.version,
            "gb_per_s": speeds[c.name],
            "to_raw_tcp": speeds[c.name] / raw,
            "to_raw_checksums": speeds[c.name] / summed,
            "slowest_gb_per_s": nbytes / max(times[c.name]) / 1e9,
            "fastest_gb_per_s": nbytes / min(times[c.name]) / 1e9,
            "what": c.what,
        }
        for c in chosen
    ]
    return {"raw_tcp_gb_per_s": raw, "results": results, "skipped": skipped}


def _network() -> dict[str, Any]:
    """What of the kernel's settings matters here."""
    found = {}
    for name in ("net/ipv4/tcp_congestion_control", "net/ipv4/tcp_wmem", "net/ipv4/tcp_rmem", "kernel/osrelease"):
        path = Path("/proc/sys") / name
        if path.exists():
            found[name.rpartition("/")[2]] = path.read_text().strip()
    return found


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "results" in report:
        table = Table(title=f"{report['settings']['bytes'] >> 20} MiB, two processes, loopback, medians")
        for heading in ("transport", "version", "GB/s", "slowest, fastest", "of raw", "of raw+checksums"):
            left = heading in ("transport", "version")
            table.add_column(heading, justify="left" if left else "right", no_wrap=left)
        for row in report["results"]:
            spread = f"{row['slowest_gb_per_s']:.2f}, {row['fastest_gb_per_s']:.2f}"
            ratios = (f"{row[key]:.2f}" for key in ("to_raw_tcp", "to_raw_checksums"))
            table.add_row(row["transport"], row["version"], f"{row['gb_per_s']:.2f}", spread, *ratios)
        console.print(table)
        for row in report["results"]:
            console.print(f"{row['transport']}: {row['what']}", style="dim", markup=False)
        for entry in report["skipped"]:
            console.print(f"{entry['transport']}: {entry['reason']}", markup=False)
    if "parser" in report:
        p = report["parser"]
        console.print(
            f"parser: {p['gb_per_s']:.2f} GB/s of DATA on one core, checksums made; memcpy {p['memcpy_gb_per_s']:.2f}"
        )
    if "frames" in report:
        f = report["frames"]
        console.print(f"frames: {f['per_s']:,.0f} a second of {f['bytes']} bytes on one connection")
    if "transfers" in report:
        t = report["transfers"]
        console.print(
            f"open transfers: {t['open']}, {t['receiver_bytes_each'] / 1e3:.1f} kB each at the receiver, "
            f"all exact after {t['seconds']:.2f} s"
        )
    if "priority" in report:
        from lynxproto.bench.priority import show

        show(report["priority"], console)
    environment = report["environment"]
    console.print(", ".join(f"{key}: {value}" for key, value in environment.items()), style="dim", markup=False)


def _plot(report: dict[str, Any], path: Path) -> None:
    """Bars of goodput, and the distribution of anchor latencies where they were measured."""
    panels = [key for key in ("results", "priority") if key in report]
    figure, axes = outputs.pyplot().subplots(1, len(panels), figsize=(6.5 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel == "results":
            rows = report["results"][::-1]
            colours = ["#888888" if row["peer"] else "#1f77b4" for row in rows]
            bars = axis.barh([row["transport"] for row in rows], [row["gb_per_s"] for row in rows], color=colours)
            axis.bar_label(bars, [f"{row['gb_per_s']:.2f}" for row in rows], padding=3, fontsize=8)
            axis.margins(x=0.12)
            axis.set_title("Goodput; lynxproto in blue", fontsize=10)
            axis.set_xlabel("GB/s")
        else:
            for label, values in report["priority"]["latencies_s"].items():
                ordered = sorted(1e3 * value for value in values)
                axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=label)
            allowed = 1e3 * report["priority"]["allowed_p99_s"]
            axis.axvline(allowed, color="#888888", linestyle=":", label="1.15 x p99 idle, and a chunk")
            axis.set_title(
                f"A new request on a full link ({report['priority']['link'].partition(',')[0]})", fontsize=10
            )
            axis.set_xlabel("anchor latency, ms")
            axis.set_ylabel("share of requests")
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
