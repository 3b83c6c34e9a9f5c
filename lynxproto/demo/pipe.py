"""How the demo's processes talk: one JSON object a line, commands to a worker's stdin, events from its stdout.

Only control and measurements pass here; the cache goes over the link. Worker side: :class:`Pipe`, :func:`serve`.
Caller side: :class:`Worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import IO, Any

from lynxproto.errors import LocalError, LynxError

__all__ = ["Pipe", "Worker", "serve"]

_LINE_LIMIT = 64 << 20
_STOP_S = 5.0

#: What a worker does for one command: takes the command's arguments, returns the reply.
Command = Callable[..., Awaitable[Mapping[str, Any]]]


class Pipe:
    """A worker's end. Takes over stdout: whatever a library prints goes to stderr instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, event: str, **fields: Any) -> None:
        """Tell the caller something; any thread may call this."""
        self._out.write(json.dumps({"event": event, **fields}) + "\n")


async def serve(pipe: Pipe, commands: Mapping[str, Command]) -> None:
    """Run commands, one at a time, until stdin ends, which also ends a command that is running.

    A :class:`LynxError` is reported and the worker goes on; any other exception is a bug and ends it.
    """
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        while line := sys.stdin.readline():
            loop.call_soon_threadsafe(lines.put_nowait, line)
        loop.call_soon_threadsafe(work.cancel)

    async def run() -> None:
        while True:
            request = json.loads(await lines.get())
            try:
                pipe.send("done", **await commands[request.pop("command")](**request))
            except LynxError as error:
                pipe.send("error", text=str(error))
            except Exception:
                traceback.print_exc()
                pipe.send("error", text=f"unexpected failure:\n{traceback.format_exc()}")
                raise

    work = asyncio.ensure_future(run())
    threading.Thread(target=read, name="commands", daemon=True).start()
    with contextlib.suppress(asyncio.CancelledError):
        await work


class Worker:
    """A worker process, as its caller sees it. ``on_event`` gets every event that is not a reply."""

    def __init__(self, name: str, module: str, on_event: Callable[[dict[str, Any]], None]) -> None:
        self.name = name
        self._module = module
        self._on_event = on_event
        self._process: asyncio.subprocess.Process | None = None
        self._stack = contextlib.ExitStack()
        self._errors: IO[bytes]

    async def __aenter__(self) -> Worker:
        self._errors = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._errors,
            # Both processes, their codecs and their models share the cores: threads that spin while they wait for
            # each other would take them from those that work.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            limit=_LINE_LIMIT,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()  # the worker ends when it has read all commands
        try:
            async with asyncio.timeout(_STOP_S if exc[0] is None else 0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        self._stack.close()

    async def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a command to its end. Raises :class:`~lynxproto.errors.LocalError` with the worker's own message."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is gone; the read below says how
        while line := await process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            kind = event.pop("event")
            if kind == "done":
                return event
            if kind == "error":
                raise LocalError(f"{self.name} process: {event['text']}")
            self._on_event({"kind": kind, **event})
        status = await process.wait()
        raise LocalError(f"{self.name} process ended with status {status} during {command!r}{self._last_words()}")

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return ":\n  " + "\n  ".join(lines[-15:]) if lines else ""
