"""Shows a transfer's levels while it runs, and sums it up at the end."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from lynxproto.commands import logs
from lynxproto.session import IncomingTransfer, OutgoingTransfer, TransferStats

__all__ = ["Watch", "summarize"]


def _level_name(level: int) -> str:
    return "anchor" if level == 0 else f"residual {level}"


class Watch:
    """Bars with rate and time left when a person looks, one line per level at the end when not."""

    _INTERVAL_S = 0.1

    def __init__(self, transfer: IncomingTransfer | OutgoingTransfer, *, quiet: bool) -> None:
        self._stats = transfer.stats
        self._bars: Any = None
        self._task: asyncio.Task[None] | None = None
        self._quiet = quiet

    async def __aenter__(self) -> None:
        if self._quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[megabytes]:>9.2f} MB {task.fields[rate]:>8.2f} MB/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bars.start()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            self._show(whole=kind is None)
            self._bars.stop()
        elif not self._quiet:
            for level, stats in sorted(self._stats.levels.items()):
                if stats.chunks:
                    seconds = (stats.last or 0) - self._stats.opened
                    click.echo(f"{_level_name(level)}: {stats.bytes / 1e6:.2f} MB after {seconds:.3f} s", err=True)

    async def _watch(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(self._INTERVAL_S)

    def _show(self, whole: bool = False) -> None:
        """``whole``: all has come, though a part of it before a restart of either side."""
        for level, stats in sorted(self._stats.levels.copy().items()):
            if level >= len(self._bars.tasks):
                self._bars.add_task(_level_name(level), megabytes=0.0, rate=0.0)
            seconds = (stats.last or 0.0) - (stats.first or 0.0)
            self._bars.update(
                self._bars.tasks[level].id,
                completed=stats.chunks,
                total=stats.chunks if whole else max(stats.total_chunks, stats.chunks),
                megabytes=stats.bytes / 1e6,
                rate=stats.bytes / 1e6 / seconds if seconds > 0 else 0.0,
            )


def summarize(command: str, transfer: IncomingTransfer | OutgoingTransfer, *, as_json: bool, path: Path) -> None:
    """One outcome line on stdout: JSON of schema ``lynxproto.COMMAND/1``, or for people."""
    stats: TransferStats = transfer.stats
    seconds = (stats.released or time.monotonic()) - stats.opened
    cache = transfer.manifest.nbytes
    if as_json:
        levels = [
            {"level": level, "chunks": s.chunks, "bytes": s.bytes, "seconds": (s.last or 0) - stats.opened}
            for level, s in sorted(stats.levels.items())
            if s.chunks
        ]
        summary = {
            "schema": f"lynxproto.{command}/1",
            "path": str(path),
            "transfer": f"{transfer.id:032x}",
            "request_id": transfer.manifest.request_id,
            "peer": transfer.principal.name,
            "cache_bytes": cache,
            "bytes": stats.bytes,
            "seconds": seconds,
            "exact": not transfer.manifest.lossy,
            "levels": levels,
            "policy": stats.policy,
            "reason": stats.reason,
        }
        logs.tell(json.dumps(summary))
        return
    what = "lossy" if transfer.manifest.lossy else "exact"
    done = f"sent {path}" if command == "send" else f"received {path}"
    if stats.policy:
        logs.tell(f"policy {stats.policy}: {stats.reason}")
    logs.tell(f"{done}: {stats.bytes / 1e6:.2f} MB for a cache of {cache / 1e6:.2f} MB ({what}), {seconds:.3f} s")
