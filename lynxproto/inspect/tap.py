"""A live tap: takes connections, passes their bytes on both ways, and hands what passes to the inspector.

It reads plaintext. Where the stream is encrypted (``tcps://``) an endpoint must record itself (``--capture``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lynxproto.capture import CaptureWriter, Direction
from lynxproto.errors import ConfigError, LynxError
from lynxproto.inspect.model import Item, Segment, StripeEnd
from lynxproto.transports import open_listener, open_stream, parse_url
from lynxproto.transports.abc import ByteStream

__all__ = ["Tap"]

_BUFFER: Final = 64 << 10
_CONNECT_S: Final = 10.0


class Tap:
    """Listens on ``listen_url`` and connects to ``connect_url`` once for each connection it takes.

    ``emit`` gets items in the order of their times, on the loop that :meth:`run` runs on. ``save``: a capture to record
    into as well. ``told`` gets a line for people now and then.
    """

    def __init__(
        self,
        listen_url: str,
        connect_url: str,
        emit: Callable[[Item], None],
        *,
        save: Path | None = None,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        for url in (listen_url, connect_url):
            if parse_url(url).scheme == "tcps":
                raise ConfigError(
                    f"{url}: a tap sees only plaintext; record an encrypted session at one of its ends, with --capture"
                )
        self.url = listen_url
        """Where it listens; with the real port once :meth:`run` does."""
        self.listening = asyncio.Event()
        self._target = connect_url
        self._emit = emit
        self._save = save
        self._told = told
        self._stripes = 0
        self._zero = time.monotonic_ns()

    async def run(self) -> None:
        """Serve until cancelled.

        Raises :class:`~lynxproto.errors.TransportError` if it cannot listen, and
        :class:`~lynxproto.errors.CaptureError` if the capture cannot be written.
        """
        writer = None if self._save is None else CaptureWriter(self._save)
        try:
            async with await open_listener(self.url) as listener, asyncio.TaskGroup() as group:
                self.url = listener.url
                self.listening.set()
                self._told(f"listening on {self.url}, passing on to {self._target}")
                while True:
                    stream = await listener.accept()
                    group.create_task(self._serve(stream, writer))
        finally:
            if writer is not None:
                writer.close()

    async def _serve(self, client: ByteStream, writer: CaptureWriter | None) -> None:
        async with client:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    server = await open_stream(self._target)
            except (LynxError, TimeoutError) as error:
                self._told(f"{client.name} is turned away: {error or f'{self._target} does not answer'}")
                return
            stripe = self._stripes
            self._stripes += 1
            async with server:
                if writer is not None:
                    client = writer.attach(client, client=False)
                ways = (
                    asyncio.ensure_future(self._pass(client, server, stripe, Direction.TO_SERVER)),
                    asyncio.ensure_future(self._pass(server, client, stripe, Direction.TO_CLIENT)),
                )
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
                finally:
                    for way in ways:
                        way.cancel()
                    for outcome in await asyncio.gather(*ways, return_exceptions=True):
                        if isinstance(outcome, LynxError):
                            self._told(str(outcome))
                    await client.aclose()
                    self._emit(StripeEnd(time.monotonic_ns() - self._zero, stripe))

    async def _pass(self, source: ByteStream, target: ByteStream, stripe: int, direction: Direction) -> None:
        """Pass bytes one way until that side hangs up, and pass that on too: the other way may go on."""
        buffer = memoryview(bytearray(_BUFFER))
        while count := await source.receive_into(buffer):
            self._emit(Segment(time.monotonic_ns() - self._zero, stripe, direction, buffer[:count], None))
            await target.send([buffer[:count]])
        await target.send_eof()
