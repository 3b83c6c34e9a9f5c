"""``lynxproto recv``: take one cache. ``lynxproto fetch``: ask for one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lynxproto.commands import logs
from lynxproto.commands.options import STATE_OPTION, SessionOptions, session_command
from lynxproto.errors import LynxError

if TYPE_CHECKING:
    from lynxproto.commands.stopping import Stopping

__all__ = ["fetch", "recv"]

#: Seconds that telling the sender that there is no room may take.
_REFUSAL_S = 1.0
_OUTPUT = click.Path(file_okay=False, path_type=Path)


@session_command(
    "recv",
    click.Argument(["url"]),
    click.Option(["-o", "--output"], type=_OUTPUT, required=True, help="Directory for the dump; made if need be."),
    click.Option(["--model"], help="Accept only caches of this model."),
    click.Option(["--revision"], default="", help="Accept only this revision of the model."),
    STATE_OPTION,
    server=True,
    log_level="warning",
)
def recv(options: SessionOptions, content: Mapping[str, Any], url: str, **own: Any) -> None:
    """Receive one KV cache on URL, and dump it into a directory.

    URL is for example tcps://0.0.0.0:7411; port 0 is any free one, which is told on stderr. Exit code 75: stopped
    before a cache had come.
    """
    from lynxproto.commands import stopping

    stopping.run(lambda stop: _recv(stop, options, content, url, **own), signal.SIGTERM)


async def _recv(
    stop: Stopping,
    options: SessionOptions,
    content: Mapping[str, Any],
    url: str,
    *,
    output: Path,
    model: str | None,
    revision: str,
    state: Path | None,
) -> int:
    from lynxproto.commands.folder import Folder
    from lynxproto.commands.progress import Watch, summarize
    from lynxproto.commands.stopping import UNFINISHED
    from lynxproto.errors import TransferCancelledError
    from lynxproto.manifest import Identity, Manifest
    from lynxproto.session import IncomingTransfer, listen

    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()  # there is no room, or the sender left

    def no_room(error: LynxError) -> None:
        if not over.done():
            over.set_exception(error)

    def left() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: this command is over
            loop.call_soon_threadsafe(no_room, TransferCancelledError("the sender left before its transfer began"))

    folder = Folder(output, limit=1, abandoned=left)

    def allocate(manifest: Manifest) -> Any:
        try:
            return folder.allocate(manifest)
        except LynxError as error:
            if folder.empty:
                loop.call_soon_threadsafe(no_room, error)
            raise

    arguments = options.session(
        url, content, server=True, identity=None if model is None else Identity(model=model, revision=revision)
    )
    taken: list[IncomingTransfer] = []

    async def take() -> None:
        first = asyncio.ensure_future(anext(receiver))
        waiting: list[asyncio.Future[Any]] = [first, over]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                await receiver.drain(_REFUSAL_S)  # or the sender would hear that the session was closed, and not why
                over.result()
            taken.append(await first)
        finally:
            first.cancel()

    try:
        with options.recording() as recording, options.measuring() as metrics:
            observe = options.observer(metrics, arguments["config"])
            async with listen(
                url, **arguments, allocate=allocate, state=state, capture=recording, observe=observe
            ) as receiver:
                if metrics is not None:
                    metrics.watch(receiver.snapshot)
                if not options.quiet:
                    logs.say(f"listening on {receiver.url}", url=receiver.url)
                if not await stop.first_of(take()):
                    return UNFINISHED  # asked to stop before anything came
                (transfer,) = taken
                async with Watch(transfer, quiet=options.silent):
                    landing = asyncio.ensure_future(folder.land(transfer))
                    try:
                        if not await stop.first_of(asyncio.shield(landing)):
                            await asyncio.wait([landing], timeout=options.drain_timeout)
                            if not landing.done():
                                return UNFINISHED
                        path = await landing
                    finally:
                        landing.cancel()
                        await asyncio.gather(landing, return_exceptions=True)
                summarize("recv", transfer, as_json=options.json, path=path)  # it is there, whatever else goes wrong
    finally:
        over.cancel()
    return 0


@session_command(
    "fetch",
    click.Argument(["url"]),
    click.Argument(["request_id"]),
    click.Option(["-o", "--output"], type=_OUTPUT, required=True, help="Directory for the dump; made if need be."),
    click.Option(["--model"], required=True, help="Whose cache it is."),
    click.Option(["--revision"], default="", help="Revision of the model, if the peer should insist on it."),
)
def fetch(options: SessionOptions, content: Mapping[str, Any], url: str, **own: Any) -> None:
    """Fetch one KV cache from the `lynxproto serve` at URL.

    It is known there by REQUEST_ID, and is dumped into a directory.
    """
    from lynxproto.commands import stopping

    stopping.run(lambda stop: _fetch(options, content, url, **own), signal.SIGTERM)


async def _fetch(
    options: SessionOptions,
    content: Mapping[str, Any],
    url: str,
    *,
    request_id: str,
    output: Path,
    model: str,
    revision: str,
) -> int:
    from lynxproto.commands.folder import Folder
    from lynxproto.commands.progress import Watch, summarize
    from lynxproto.errors import NotFoundError
    from lynxproto.manifest import FetchKey, Identity
    from lynxproto.session import connect

    folder, identity = Folder(output), Identity(model=model, revision=revision)
    arguments = options.session(url, content, server=False, identity=identity)
    with options.recording() as recording, options.measuring() as metrics:
        observe = options.observer(metrics, arguments["config"])
        async with connect(url, **arguments, allocate=folder.allocate, capture=recording, observe=observe) as session:
            if metrics is not None:
                metrics.watch(session.snapshot)
            try:
                transfer = await session.fetch(FetchKey.of_request(request_id, identity))
            except NotFoundError as error:
                whose = f"{model!r}" + (f", revision {revision!r}" if revision else "")
                raise NotFoundError(f"{url} holds no cache {request_id!r} of {whose}: {error}") from error
            async with Watch(transfer, quiet=options.silent):
                path = await folder.land(transfer)
            summarize("fetch", transfer, as_json=options.json, path=path)
    return 0
