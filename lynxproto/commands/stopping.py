"""What signals do to a command: the first asks it to finish what it does, the second ends it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import click

from lynxproto.commands import logs

__all__ = ["UNFINISHED", "Stopping", "run"]

#: Exit code when the drain timeout was over before all transfers were: a later try may succeed (EX_TEMPFAIL).
UNFINISHED: Final = 75


class Stopping:
    """Waits for a signal. The second one of any kind cancels the main task."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.asked = asyncio.Event()
        self.exit_code: int | None = None
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.asked.is_set():
            logs.say(f"{number.name}: finishing what is under way; once more stops at once")
            self.asked.set()
        elif self._main is not None:
            self.exit_code = 128 + number
            self._main.cancel()

    async def first_of(self, work: Awaitable[Any]) -> bool:
        """Do ``work``, but only until a stop is asked for; whether it was done."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self.asked.wait())
        try:
            await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            for one in (task, asked):
                one.cancel()
            await asyncio.gather(task, asked, return_exceptions=True)


def run(main: Callable[[Stopping], Coroutine[Any, Any, int]], *signals: signal.Signals) -> None:
    """Run a command's coroutine and exit with the code it returns; 128 + n when a signal ended it."""
    stopping: list[Stopping] = []

    async def outer() -> int:
        stopping.append(Stopping(*signals))
        return await main(stopping[0])

    try:
        code = asyncio.run(outer())
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        code = 130
    except asyncio.CancelledError:
        code = (stopping and stopping[0].exit_code) or 130
        click.echo("stopped", err=True)
    if code:
        sys.exit(code)
