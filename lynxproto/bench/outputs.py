"""Where results go: ``--json FILE|-`` and ``--plot FILE``. What cannot be written is refused before the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lynxproto.errors import ConfigError, MissingDependencyError

__all__ = ["check_file", "check_plot", "json_option", "plot_option", "pyplot", "save_figure", "write_json"]

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def json_option(what: str = "results") -> Decorator:
    """``--json FILE|-``, as ``json_path``: for :func:`write_json`."""

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value not in (None, "-"):
            check_file(Path(value))
        return value

    text = f"Write the {what} as JSON; - for standard output."
    return click.option("--json", "json_path", metavar="FILE|-", callback=check, help=text)


def plot_option(text: str) -> Decorator:
    """``--plot FILE``, as ``plot_path``."""

    def check(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        if value is not None:
            check_plot(value)
        return value

    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option("--plot", "plot_path", type=kind, callback=check, help=text)


def check_file(path: Path) -> None:
    """Raise :class:`~lynxproto.errors.ConfigError` if there is no folder for the file, or it may not be written to."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: permission denied")


def check_plot(path: Path) -> None:
    """Raise a :class:`~lynxproto.errors.LynxError` if matplotlib is missing, or cannot write such a file."""
    check_file(path)
    pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise ConfigError(f"cannot plot to {path}: use one of .{', .'.join(sorted(known))}")


def pyplot() -> Any:
    """``matplotlib.pyplot``, without a display. Raises :class:`~lynxproto.errors.MissingDependencyError`."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as module
    except ImportError as error:
        raise MissingDependencyError(f"--plot needs {error.name}; run: pip install 'lynxproto[plot]'") from error
    return module


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure and forget it. Raises :class:`~lynxproto.errors.ConfigError`."""
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error
    finally:
        pyplot().close(figure)


def write_json(path: str, value: Any) -> None:
    """Write ``value`` to a file, or to standard output (``-``). Raises :class:`~lynxproto.errors.ConfigError`."""
    text = json.dumps(value, indent=1)
    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
