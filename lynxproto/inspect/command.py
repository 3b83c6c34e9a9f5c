"""``lynxproto inspect``: sources in, a view out. The click command in lynxproto/cli.py only parses options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Final, Protocol, TextIO

from lynxproto.errors import ConfigError
from lynxproto.inspect import jsonl, table
from lynxproto.inspect.filters import Filter
from lynxproto.inspect.model import Fault, Frame
from lynxproto.inspect.reader import Inspector
from lynxproto.inspect.sources import Source, open_source

__all__ = ["FAULTY", "View", "inspect_file"]

#: Exit code for a source that has faults: it was shown as far as it goes.
FAULTY: Final = 3
_BATCH: Final = 1 << 16


class View(Protocol):
    """What becomes of frames and faults."""

    keep: int
    """How many bytes of a DATA payload the view needs."""

    def show(self, one: Frame | Fault) -> None:
        """One more."""

    def flush(self) -> None:
        """Show what is held back, because nothing more may come for a while."""

    def end(self, inspector: Inspector, source: str) -> None:
        """That was all."""


class Lines:
    """The table, or JSON lines."""

    keep = 0

    def __init__(self, out: TextIO, wanted: Filter, *, as_json: bool) -> None:
        self._out = out
        self._wanted = wanted
        self._json = as_json
        self._colour = not as_json and _colourful(out)
        self._lines: list[str] = []
        self._size = 0
        if not as_json:
            self._lines.append(table.HEADING)

    def show(self, one: Frame | Fault) -> None:
        """See :class:`View`."""
        if isinstance(one, Frame):
            if not self._wanted(one):
                return
            line = jsonl.dumps(jsonl.frame_object(one)) if self._json else table.frame_lines(one, colour=self._colour)
        elif self._json:
            line = jsonl.dumps(jsonl.fault_object(one))
        else:
            line = table.fault_line(one, colour=self._colour)
        self._lines.append(line)
        self._size += len(line)
        if self._size >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """See :class:`View`."""
        if self._lines:
            self._out.write("\n".join(self._lines) + "\n")
            self._out.flush()
            self._lines.clear()
            self._size = 0

    def end(self, inspector: Inspector, source: str) -> None:
        """See :class:`View`."""
        self.flush()


def _colourful(out: TextIO) -> bool:
    import os

    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def inspect_file(path: str, view: View, *, progress: bool) -> int:
    """Show the file ``path`` (``-``: standard input) in ``view``; returns the exit code.

    Raises :class:`~lynxproto.errors.CaptureError` if it is no capture at all.
    """
    with closing(open_source(path)) as source:
        inspector = Inspector(keep=view.keep, lenient=source.lenient)
        live = source.size is None
        with _Progress(source) if progress else nullcontext() as bar:
            for item in source:
                for one in inspector.feed(item):
                    view.show(one)
                if live:
                    view.flush()
                if bar is not None:
                    bar.update()
            for one in inspector.end():
                view.show(one)
        view.end(inspector, source.name)
    return FAULTY if inspector.faults else 0


class _Progress:
    """A bar on stderr, for a person who waits."""

    def __init__(self, source: Source) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._source = source
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("reading", total=source.size)
        self._shown = 0

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Move on, now and then."""
        position = self._source.position
        if position - self._shown >= 1 << 22:
            self._shown = position
            self._bar.update(self._task, completed=position)


def run_inspect(
    source: str,
    *,
    listen_url: str | None,
    connect_url: str | None,
    save: Path | None,
    transfers: Sequence[str],
    types: Sequence[str],
    layers: Sequence[str],
    levels: Sequence[str],
    frame: int | None,
    payload_bytes: int,
    summary: bool,
    html: Path | None,
    as_json: bool,
) -> int:
    """What the command line asks for; returns the exit code.

    Raises :class:`~lynxproto.errors.ConfigError` for options that contradict each other, and what the source raises.
    """
    wanted = Filter.of(transfers, types, layers, levels)
    if (frame is not None) + summary + (html is not None) > 1 and not (summary and html is not None):
        raise ConfigError("--frame shows one frame: leave out --summary and --html")
    if not wanted.empty and (frame is not None or summary or html is not None):
        raise ConfigError(
            "--transfer, --type, --layer and --level choose lines of the table; --frame, --summary and --html take all"
        )
    if (listen_url is None) != (connect_url is None):
        raise ConfigError("a tap needs both --listen URL and --connect URL")
    if save is not None and listen_url is None:
        raise ConfigError("--save records a tap; it needs --listen and --connect")
    view: View = Lines(sys.stdout, wanted, as_json=as_json)
    return inspect_file(source, view, progress=sys.stderr.isatty() and not sys.stdout.isatty())
