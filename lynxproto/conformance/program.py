"""Another program under test: one JSON object a line on its standard input, one a line on its standard output."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from lynxproto.errors import ConfigError

__all__ = ["Program", "ProgramError"]

_TOLD: Final = 20  # lines of standard error that are kept


class ProgramError(Exception):
    """The program died, was silent for too long, or wrote something else than an answer."""


class Program:
    """The command is started at the first request, and again after it died or was silent for ``timeout`` seconds."""

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self._command = list(command)
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._told: deque[str] = deque(maxlen=_TOLD)
        self._id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises :class:`ProgramError`; the next request then meets a fresh process."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        self._id += 1
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"id": self._id, **request}, separators=(",", ":")) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=self._timeout)
        except (OSError, queue.Empty) as error:
            line = None
            why = f"no answer for {self._timeout:g} s" if isinstance(error, queue.Empty) else "it closed its input"
        else:
            why = "it ended"
        if line is None:
            raise ProgramError(f"{why}{self._stop()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise ProgramError(f"not JSON: {line[:200]!r}{self._stop()}") from None
        if not isinstance(answer, dict) or answer.get("id") != self._id:
            raise ProgramError(f"not an answer to request {self._id}: {line[:200]!r}{self._stop()}")
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self._stop()
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot start {self._command[0]!r}: {error.strerror}") from error
        self._process, self._lines, self._told = process, queue.SimpleQueue(), deque(maxlen=_TOLD)
        threading.Thread(target=self._read, args=(process, self._lines), daemon=True).start()
        threading.Thread(target=self._read_errors, args=(process, self._told), daemon=True).start()
        return process

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    @staticmethod
    def _read_errors(process: subprocess.Popen[str], told: deque[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            told.extend(line.rstrip() for line in process.stderr)

    def _stop(self) -> str:
        """End the process; what it said last, for a message."""
        process, self._process = self._process, None
        if process is None:
            return ""
        assert process.stdin is not None
        try:
            process.stdin.close()
        except OSError:
            pass  # it was gone already
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said = " | ".join(self._told)
        return f" (exit code {process.returncode}{', ' + said if said else ''})"
