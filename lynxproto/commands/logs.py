"""Log lines: one event a line, as text for people or JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import click

__all__ = ["say", "set_up", "tell"]


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower():<8} {record.getMessage()}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


class _Json(logging.Formatter):
    """``time``, ``level``, ``event``, ``message``, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def set_up(form: str, level: str) -> None:
    """Send the library's records to stderr, ``text`` or ``json``, from ``level`` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logger = logging.getLogger("lynxproto")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def say(text: str, **fields: object) -> None:
    """A line on stderr at any log level, in the log's form: where that is JSON, all lines are."""
    handlers = logging.getLogger("lynxproto").handlers
    form = handlers[0].formatter if handlers else None
    if isinstance(form, _Json):
        record = logging.LogRecord("lynxproto", logging.INFO, "", 0, text, None, None)
        record.fields = fields
        text = form.format(record)
    click.echo(text, err=True)


def tell(line: str) -> None:
    """An outcome line on stdout. Raises ClickException if nobody can have it."""
    try:
        click.echo(line)
    except OSError as error:  # whoever read it is gone, or a disk is full
        raise click.ClickException(f"cannot write the outcome to standard output: {error.strerror}") from error
