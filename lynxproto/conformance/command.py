"""``lynxproto conformance``: vectors in, verdicts out. The click command in lynxproto/cli.py only parses options."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from rich.console import Console
from rich.progress import track

from lynxproto import __version__
from lynxproto.conformance.judge import Outcome, Verdict, judge
from lynxproto.conformance.program import Program, ProgramError
from lynxproto.conformance.report import Run, as_json, as_junit, as_text
from lynxproto.conformance.subject import answer
from lynxproto.conformance.vectors import Case, default_vectors, load, select
from lynxproto.errors import ConfigError

__all__ = ["FAILED", "PASSED", "UNSUPPORTED", "run_conformance", "serve"]

#: Exit codes; 2 is click's, for a command line that makes no sense.
PASSED: Final = 0
FAILED: Final = 1
UNSUPPORTED: Final = 3

Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def _subject(command: str | None, timeout: float) -> Iterator[Ask]:
    if command is None:
        yield answer
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--command {command!r}: {error}") from error
    if not words:
        raise ConfigError("--command is empty")
    with Program(words, timeout) as program:
        yield program.ask


def _try(ask: Ask, case: Case) -> Verdict:
    start = time.perf_counter()
    try:
        found = ask({"op": case.op, **case.input})
    except ProgramError as error:
        return Verdict(case, Outcome.FAILED, (str(error),), time.perf_counter() - start)
    return judge(case, found, time.perf_counter() - start)


def run_conformance(
    *,
    command: str | None,
    vectors: Path | None,
    filters: Sequence[str],
    exclude: Sequence[str],
    json_file: Path | None,
    junit_file: Path | None,
    allow_unsupported: bool,
    timeout: float,
    quiet: bool,
) -> int:
    """Run the cases and write the reports; returns the exit code."""
    cases = select(load(vectors or default_vectors()), filters, exclude)
    people = Console(stderr=True)
    watched = people.is_terminal and not quiet
    with _subject(command, timeout) as ask:
        progress = track(cases, "conformance", console=people, transient=True, disable=not watched)
        run = Run(command or f"lynxproto {__version__}", [_try(ask, case) for case in progress])
    _write(json_file, (json.dumps(as_json(run), indent=1) + "\n").encode())
    _write(junit_file, as_junit(run))
    if not quiet and "-" not in (str(json_file), str(junit_file)):
        print("\n".join(as_text(run)))
    if run.count(Outcome.FAILED):
        return FAILED
    return PASSED if allow_unsupported or not run.count(Outcome.UNSUPPORTED) else UNSUPPORTED


def list_cases(vectors: Path | None, filters: Sequence[str], exclude: Sequence[str]) -> Iterator[str]:
    """A line for each case: address, result, flags, what it is about."""
    for case in select(load(vectors or default_vectors()), filters, exclude):
        yield f"{case.address}  {case.result}  {','.join(case.flags) or '-'}  {case.comment}"


def serve(source: TextIO, sink: TextIO) -> None:
    """Answer requests, one a line, until the end of ``source``: this implementation as a program under test."""
    for line in source:
        request = json.loads(line)
        sink.write(json.dumps({"id": request.get("id"), **answer(request)}, separators=(",", ":")) + "\n")
        sink.flush()


def _write(path: Path | None, content: bytes) -> None:
    if path is None:
        return
    try:
        if str(path) == "-":
            sys.stdout.buffer.write(content)
        else:
            path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
