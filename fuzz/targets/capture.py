"""`lynxproto inspect` over any file: it shows what it can and names the fault; it never raises, and ends."""

from __future__ import annotations

import io
import os
from pathlib import Path

from lynxproto.errors import CaptureError
from lynxproto.inspect.annotate import annotate, render
from lynxproto.inspect.command import Lines, View, inspect_file
from lynxproto.inspect.filters import Filter
from lynxproto.inspect.html import page
from lynxproto.inspect.model import Fault, Frame
from lynxproto.inspect.reader import Inspector
from lynxproto.inspect.summary import Summary

_FILE = Path("/dev/shm") / f"lynxproto-fuzz-{os.getpid()}"


class _Fields:
    """Every frame field by field, and the summary's page."""

    keep = 256
    done = False

    def __init__(self) -> None:
        self._summary = Summary()

    def show(self, one: Frame | Fault) -> None:
        if isinstance(one, Frame):
            for _ in render(annotate(one), colour=False):
                pass
        self._summary.add(one)

    def flush(self) -> None:
        pass

    def end(self, inspector: Inspector, source: str) -> None:
        page(self._summary, source)


def run(data: bytes) -> None:
    """The table, the JSON lines, or fields and page, by the length of the file."""
    views: tuple[View, ...] = (
        Lines(io.StringIO(), Filter(), as_json=False),
        Lines(io.StringIO(), Filter(), as_json=True),
        _Fields(),
    )
    _FILE.write_bytes(data)
    try:
        inspect_file(str(_FILE), views[len(data) % len(views)], progress=False)
    except CaptureError:
        pass
    finally:
        _FILE.unlink()
