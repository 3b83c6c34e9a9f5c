"""``lynxproto serve``: take caches into a folder and give them out of it, until a signal comes."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lynxproto.commands import logs
from lynxproto.commands.options import STATE_OPTION, SessionOptions, Size, session_command
from lynxproto.errors import LynxError

if TYPE_CHECKING:
    from lynxproto.access import TransferRequest
    from lynxproto.commands.folder import Folder
    from lynxproto.commands.stopping import Stopping
    from lynxproto.session import IncomingTransfer

__all__ = ["serve"]

_log = logging.getLogger("lynxproto")


@session_command(
    "serve",
    click.Argument(["url"]),
    click.Option(
        ["--root"], type=click.Path(file_okay=False, path_type=Path), required=True,
        help="Directory of the caches; made if need be.",
    ),
    click.Option(["--quota"], type=Size(), help="Bytes that the directory may take, for example 200G."),
    click.Option(["--evict"], is_flag=True, help="Beyond the quota, remove the least recently used caches."),
    click.Option(
        ["--allow-push"], multiple=True, metavar="PATTERN", default=["*"], show_default=True,
        help="Principals that may push: tls:NAME, secret:OWNER, uid:N, anonymous; with * and ?.",
    ),
    click.Option(
        ["--allow-pull"], multiple=True, metavar="PATTERN", default=["*"], show_default=True,
        help="Principals that may pull.",
    ),
    click.Option(["--model"], help="Accept only caches of this model."),
    click.Option(["--revision"], default="", help="Accept only this revision of the model."),
    STATE_OPTION,
    server=True,
    log_level="info",
)  # fmt: skip
def serve(options: SessionOptions, content: Mapping[str, Any], url: str, **own: Any) -> None:
    """Serve a folder of KV caches on URL.

    It takes what peers push, each named by its request id, and answers FETCH.

    SIGTERM or SIGINT: no new transfers, those under way have --drain-timeout seconds; exit code 0 if all ended, 75 if
    some were handed back. A second signal stops at once (128 + its number).
    """
    from lynxproto.commands import stopping

    stopping.run(lambda stop: _serve(stop, options, content, url, **own), signal.SIGTERM, signal.SIGINT)


async def _serve(
    stop: Stopping,
    options: SessionOptions,
    content: Mapping[str, Any],
    url: str,
    *,
    root: Path,
    quota: int | None,
    evict: bool,
    allow_push: tuple[str, ...],
    allow_pull: tuple[str, ...],
    model: str | None,
    revision: str,
    state: Path | None,
) -> int:
    from lynxproto.commands.folder import Folder
    from lynxproto.commands.stopping import UNFINISHED
    from lynxproto.manifest import Identity
    from lynxproto.session import listen

    if evict and quota is None:
        raise click.UsageError("--evict needs a --quota")
    folder = Folder(root, quota=quota, evict=evict, replace=True)
    _log.info("%d caches in %s", folder.scan(), root)
    allowed = {"push": allow_push, "pull": allow_pull}

    def authorize(request: TransferRequest) -> bool:
        return any(fnmatchcase(request.principal.name, pattern) for pattern in allowed[request.action])

    arguments = options.session(
        url, content, server=True, identity=None if model is None else Identity(model=model, revision=revision)
    )
    if not arguments["config"].accepted_secrets and (options.any_client or arguments["tls"] is None):
        _log.warning("no certificates and no secret are asked for: whoever can connect to %s is let in", url)
    landing: dict[asyncio.Task[None], IncomingTransfer] = {}
    with options.recording() as recording, options.measuring() as metrics:

        def observe(event: str, fields: Mapping[str, Any]) -> None:
            if metrics is not None:
                metrics.observe(event, fields)
            if options.json and event == "transfer_closed" and fields["direction"] == "out":
                _tell("sent", fields)

        async with listen(
            url,
            **arguments,
            allocate=folder.allocate,
            on_fetch=folder.find,
            authorize=authorize,
            state=state,
            capture=recording,
            observe=observe,
        ) as receiver:
            if metrics is not None:
                metrics.watch(receiver.snapshot)
            if not options.quiet:
                logs.say(f"serving {root} on {receiver.url}", url=receiver.url)

            async def take() -> None:
                async for transfer in receiver:
                    task = asyncio.ensure_future(_land(folder, transfer, as_json=options.json))
                    landing[task] = transfer
                    task.add_done_callback(landing.pop)

            taking = asyncio.ensure_future(take())  # goes on while others drain: what was accepted is landed
            await stop.asked.wait()
            drained = await receiver.drain(options.drain_timeout)
            if not drained:
                _log.warning("%d transfers did not end in time and are handed back", len(landing))
                await asyncio.gather(*(transfer.cancel() for transfer in landing.values()))
            await asyncio.gather(*landing)
        await taking
    return 0 if drained else UNFINISHED


async def _land(folder: Folder, transfer: IncomingTransfer, *, as_json: bool) -> None:
    """Wait for one cache; what went wrong is its own affair, and the log has it."""
    path, error = None, None
    try:
        path = await folder.land(transfer)
    except LynxError as failure:
        error = failure
    if as_json:
        stats = transfer.stats
        _tell(
            "received" if error is None else "failed",
            {
                "path": None if path is None else str(path),
                "transfer": f"{transfer.id:032x}",
                "request_id": transfer.manifest.request_id,
                "principal": transfer.principal.name,
                "cache_bytes": transfer.manifest.nbytes,
                "bytes": stats.bytes,
                "seconds": (stats.released or stats.opened) - stats.opened,
                "error": None if error is None else str(error),
            },
        )


def _tell(outcome: str, fields: Mapping[str, Any]) -> None:
    names = ("path", "transfer", "request_id", "principal", "cache_bytes", "bytes", "seconds", "error")
    line = {"schema": "lynxproto.serve/1", "outcome": outcome, **{name: fields.get(name) for name in names}}
    try:
        logs.tell(json.dumps(line))
    except click.ClickException as error:  # the caches matter more
        _log.error("%s", error.message)
