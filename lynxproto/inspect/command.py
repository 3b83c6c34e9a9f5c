"""``lynxproto inspect``: sources in, a view out. The click command in lynxproto/cli.py only parses options."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Final, Protocol, TextIO

from lynxproto.errors import CaptureError, ConfigError
from lynxproto.inspect import jsonl, table
from lynxproto.inspect.annotate import annotate, render
from lynxproto.inspect.filters import Filter
from lynxproto.inspect.html import page
from lynxproto.inspect.model import Fault, Frame, Item
from lynxproto.inspect.reader import Inspector
from lynxproto.inspect.report import report
from lynxproto.inspect.sources import Source, open_source
from lynxproto.inspect.summary import Summary
from lynxproto.inspect.tap import Tap

__all__ = ["FAULTY", "View", "inspect_file"]

#: Exit code for a source that has faults: it was shown as far as it goes.
FAULTY: Final = 3
_BATCH: Final = 1 << 16


class View(Protocol):
    """What becomes of frames and faults."""

    keep: int
    """How many bytes of a DATA payload the view needs."""
    done: bool
    """Nothing more is needed."""

    def show(self, one: Frame | Fault) -> None:
        """One more."""

    def flush(self) -> None:
        """Show what is held back, because nothing more may come for a while."""

    def end(self, inspector: Inspector, source: str) -> None:
        """That was all."""


class Lines:
    """The table, or JSON lines."""

    keep = 0
    done = False

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


class OneFrame:
    """One frame, field by field."""

    def __init__(self, out: TextIO, number: int, keep: int, *, as_json: bool) -> None:
        self.keep = keep
        self.done = False
        self._out = out
        self._number = number
        self._json = as_json

    def show(self, one: Frame | Fault) -> None:
        """See :class:`View`."""
        if not isinstance(one, Frame) or one.number != self._number:
            return
        self.done = True
        fields = annotate(one)
        if self._json:
            found = jsonl.frame_object(one)
            found["fields"] = [jsonl.field_object(field) for field in fields]
            self._out.write(jsonl.dumps(found) + "\n")
            return
        colour = _colourful(self._out)
        self._out.write(f"{table.HEADING}\n{table.frame_lines(one, colour=colour)}\n\n")
        for line in render(fields, colour=colour):
            self._out.write(line + "\n")

    def flush(self) -> None:
        """See :class:`View`."""

    def end(self, inspector: Inspector, source: str) -> None:
        """See :class:`View`. Raises :class:`~lynxproto.errors.ConfigError` if the frame was not there."""
        if not self.done:
            raise ConfigError(f"{source} has no frame {self._number}: it has {inspector.frames} frames, from 0")


class Summarized:
    """A summary: as text, as JSON, as a web page."""

    keep = 0
    done = False

    def __init__(self, out: TextIO, *, text: bool, as_json: bool, html: Path | None) -> None:
        self._out = out
        self._text = text
        self._json = as_json
        self._html = html
        self._summary = Summary()

    def show(self, one: Frame | Fault) -> None:
        """See :class:`View`."""
        self._summary.add(one)

    def flush(self) -> None:
        """See :class:`View`."""

    def end(self, inspector: Inspector, source: str) -> None:
        """See :class:`View`. Raises :class:`~lynxproto.errors.CaptureError` if the page cannot be written."""
        if self._html is not None:
            try:
                self._html.write_text(page(self._summary, source), encoding="utf-8")
            except OSError as error:
                raise CaptureError(f"cannot write {self._html}: {error.strerror}") from error
        if self._json:
            self._out.write(jsonl.dumps(self._summary.as_object()) + "\n")
        elif self._text:
            for line in report(self._summary, source, colour=_colourful(self._out)):
                self._out.write(line + "\n")
        elif self._html is not None:
            self._out.write(f"wrote {self._html}\n")


def _colourful(out: TextIO) -> bool:
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
                if view.done:
                    break
            for one in inspector.end():
                view.show(one)
        view.end(inspector, source.name)
    return FAULTY if inspector.faults else 0


def inspect_tap(listen_url: str, connect_url: str, save: Path | None, view: View) -> int:
    """Show what passes through a tap, until interrupted; returns the exit code.

    Raises :class:`~lynxproto.errors.TransportError` if the tap cannot listen, and
    :class:`~lynxproto.errors.ConfigError` for URLs that cannot be tapped.
    """
    inspector = Inspector(keep=view.keep)

    def emit(item: Item) -> None:
        for one in inspector.feed(item):
            view.show(one)
        view.flush()

    async def run() -> None:
        tap = Tap(listen_url, connect_url, emit, save=save, told=lambda line: print(line, file=sys.stderr, flush=True))
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel if task is not None else loop.stop)
        with suppress(asyncio.CancelledError):
            await tap.run()

    asyncio.run(run())
    for one in inspector.end():
        view.show(one)
    view.end(inspector, f"tap from {listen_url} to {connect_url}")
    return FAULTY if inspector.faults else 0


class _Progress:
    """A bar on stderr, for a person who waits."""

    def __init__(self, source: Source) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._source = source
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
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
    if listen_url is not None and source != "-":
        raise ConfigError(f"a tap reads no file: leave out {source}, or --listen and --connect")
    if save is not None and listen_url is None:
        raise ConfigError("--save records a tap; it needs --listen and --connect")
    view: View
    if frame is not None:
        view = OneFrame(sys.stdout, frame, payload_bytes, as_json=as_json)
    elif summary or html is not None:
        view = Summarized(sys.stdout, text=summary, as_json=as_json, html=html)
    else:
        view = Lines(sys.stdout, wanted, as_json=as_json)
    if listen_url is not None and connect_url is not None:
        return inspect_tap(listen_url, connect_url, save, view)
    shown_as_it_goes = isinstance(view, Lines) and sys.stdout.isatty()
    return inspect_file(source, view, progress=sys.stderr.isatty() and not shown_as_it_goes)
