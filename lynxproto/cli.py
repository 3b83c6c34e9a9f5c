"""The command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lynxproto.bench import bench
from lynxproto.calibrate_command import calibrate
from lynxproto.errors import CalibrationError, ConfigError, LynxError

if TYPE_CHECKING:
    import ssl

    from lynxproto.cachefile import Cache
    from lynxproto.calibration import Calibration
    from lynxproto.capture import CaptureWriter
    from lynxproto.config import Config
    from lynxproto.session import IncomingTransfer, OutgoingTransfer, Receiver, TransferStats
    from lynxproto.transports import TokenBucket

__all__ = ["main"]


class _Group(click.Group):
    """Turns the library's named errors into one line on stderr and exit code 1: a user's mistake is no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LynxError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lynxproto")
def main() -> None:
    """Move KV caches between machines: usable before they have arrived, bit-exact when they have."""


main.add_command(bench)
main.add_command(calibrate)


class BitRate(click.ParamType[float]):
    """``130M``, ``1.5G``, ``800k`` or a plain number: bits per second."""

    name = "bits/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a rate."""
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)([kKMG]?)", str(value))
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a rate; examples: 130M, 1.5G, 800k (bits per second)", param, ctx)
        return float(match[1]) * {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_shared = (
    click.option("--link", type=BitRate(), help="Slow this side's sending down to a rate, for example 130M."),
    click.option("--ca", type=_FILE, help="PEM file that signs the peer's certificate (tcps://)."),
    click.option("--certificate", type=_FILE, help="This side's certificate, a PEM file (tcps://)."),
    click.option("--key", type=_FILE, help="Key of the certificate, a PEM file (tcps://)."),
    click.option("--insecure", is_flag=True, help="Allow plaintext: tcp:// without --secret-file or beyond loopback."),
    click.option("--secret-file", type=_FILE, help="Shared secret that the peer must know: 16 bytes or more."),
    click.option(
        "--capture",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Record what crosses the session's streams into a file, for `lynxproto inspect`.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="No progress on stderr."),
)


def _with_shared(command: Any) -> Any:
    for option in reversed(_shared):
        command = option(command)
    return command


@main.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("url")
@click.option(
    "--policy",
    type=click.Choice(["lynx", "bf16", "int8", "int4"]),
    default="lynx",
    show_default=True,
    help="How to cut and encode the cache; all but lynx are baselines of one level, int8 and int4 lossy.",
)
@click.option(
    "--preset",
    type=click.Choice(["fast", "balanced", "dense"]),
    default="balanced",
    show_default=True,
    help="Of policy lynx: speed of coding against size of the anchor.",
)
@click.option(
    "--calibration",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Of policy lynx: what `lynxproto calibrate` measured of the cache's model.",
)
@_with_shared
def send(cache: Path, url: str, **shared: Any) -> None:
    """Send a dumped KV cache (a file that `recv` or lynxproto.cachefile made) to URL, e.g. tcps://decode:7411."""
    _run(_send(cache, url, **shared))


@main.command()
@click.argument("url")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Directory for the received dump; made if it does not exist.",
)
@click.option("--model", help="Accept only caches of this model.")
@click.option("--revision", default="", help="Accept only this revision of the model.")
@click.option("--any-client", is_flag=True, help="Let in clients without a certificate (tcps://).")
@_with_shared
def recv(url: str, output: Path, model: str | None, revision: str, any_client: bool, **shared: Any) -> None:
    """Receive one KV cache on URL, e.g. tcps://0.0.0.0:7411 (port 0: any free one), and dump it into a directory."""
    _run(_recv(url, output, model, revision, any_client, **shared))


@main.command()
@click.argument("source", default="-")
@click.option("--listen", "listen_url", metavar="URL", help="Tap: take connections here, e.g. tcp://127.0.0.1:7412.")
@click.option("--connect", "connect_url", metavar="URL", help="Tap: pass them on to the real receiver.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Tap: record into a capture file too.")
@click.option("--transfer", "transfers", multiple=True, metavar="HEX", help="Only transfers whose id begins so.")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only frames of this type: data, ack, 0x801b...")
@click.option("--layer", "layers", multiple=True, metavar="N|A-B", help="Only frames about these layers.")
@click.option("--level", "levels", multiple=True, metavar="N|A-B", help="Only DATA of these levels.")
@click.option("--frame", type=click.IntRange(min=0), help="One frame, field by field.")
@click.option(
    "--bytes", "payload_bytes", type=click.IntRange(min=0), default=256, show_default=True,
    help="With --frame: how much of a DATA payload to dump.",
)  # fmt: skip
@click.option("--summary", is_flag=True, help="Bytes and ratio by level and layer, order, resends, timeline.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the summary as one web page.")
@click.option("--json", "as_json", is_flag=True, help="JSON: one object a line, or one summary.")
def inspect(source: str, **options: Any) -> None:
    """Show what is on the wire: SOURCE is a capture (.lynx), a pcap, raw frames, or - for standard input.

    Exit code 3: the source is broken, and was shown as far as it goes.
    """
    from lynxproto.inspect.command import run_inspect

    try:
        sys.exit(run_inspect(source, **options))
    except KeyboardInterrupt:
        sys.exit(130)


@main.command()
@click.option("--tokens", type=int, default=4096, show_default=True, help="Prompt tokens of prose to prefill.")
@click.option("--decode", type=int, default=32, show_default=True, help="Tokens to decode after the first.")
@click.option("--max-draft", type=int, default=64, show_default=True, help="Tokens to draft at most.")
@click.option("--runs", type=int, default=3, show_default=True, help="Runs of each method; medians are shown.")
@click.option(
    "--link",
    type=BitRate(),
    help="Speed of the link, for example 130M. Default: as many decode steps for the BF16 cache as in the paper (70).",
)
@click.option("--streamed/--no-streamed", default=True, help="Also stream by layer while prefill runs.")
@click.option("--threads", type=int, default=2, show_default=True, help="Threads of each process's model.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the timeline.")
def demo(json_file: Path | None, plot_file: Path | None, **settings: Any) -> None:
    """Real model, prefill and decode process, shaped link: BF16, INT8, INT4 and lynxproto side by side."""
    from lynxproto.demo.main import run_demo

    if not run_demo(json_file=json_file, plot_file=plot_file, **settings):
        sys.exit(1)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(coroutine)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)


def _config(secret_file: Path | None, model: str | None = None, revision: str = "") -> Config:
    from lynxproto.config import MIN_SECRET, Config
    from lynxproto.manifest import Identity

    secret = None if secret_file is None else secret_file.read_bytes().strip()
    if secret is not None and len(secret) < MIN_SECRET:
        raise click.UsageError(
            f"{secret_file}: a secret has at least {MIN_SECRET} bytes, this one {len(secret)}; "
            "`openssl rand -hex 32` makes one"
        )
    return Config(secret=secret, identity=None if model is None else Identity(model=model, revision=revision))


def _tls(
    url: str, *, server: bool, ca: Path | None, certificate: Path | None, key: Path | None, any_client: bool = False
) -> ssl.SSLContext | None:
    from lynxproto.transports import client_context, parse_url, server_context

    if parse_url(url).scheme != "tcps":
        if ca or certificate or key:
            raise click.UsageError(f"--ca, --certificate and --key need a tcps:// URL, not {url}")
        return None
    if not server:
        return client_context(ca=ca, certificate=certificate, key=key)
    if certificate is None:
        raise click.UsageError("receiving on tcps:// needs --certificate (and --key, unless that file holds both)")
    return server_context(certificate=certificate, key=key, ca=ca, client_certificates=not any_client)


def _writer(capture: Path | None) -> AbstractContextManager[CaptureWriter | None]:
    from lynxproto.capture import CaptureWriter

    return nullcontext() if capture is None else CaptureWriter(capture)


def _bucket(link: float | None) -> TokenBucket | None:
    from lynxproto.transports import TokenBucket

    return None if link is None else TokenBucket(link)


def _calibration(path: Path | None, cache: Cache) -> Calibration | None:
    """The calibration of the cache's model, from a file; another model's is refused."""
    from lynxproto.calibration import Calibration

    if path is None:
        return None
    calibration, identity = Calibration.load(path), cache.manifest.identity
    if (calibration.model, calibration.revision or identity.revision) != (identity.model, identity.revision):
        raise CalibrationError(
            f"{path} was measured on {calibration.model} {calibration.revision}, the cache is of {identity.model}"
            f" {identity.revision}; run `lynxproto calibrate` on the cache's model"
        )
    return calibration


async def _send(
    path: Path,
    url: str,
    *,
    policy: Any,
    preset: str,
    calibration: Path | None,
    link: float | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    insecure: bool,
    secret_file: Path | None,
    capture: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from lynxproto.cachefile import load_cache
    from lynxproto.policy import Policy
    from lynxproto.session import connect

    cache = load_cache(path)
    if policy == "lynx":
        chosen = Policy.lynx(preset, _calibration(calibration, cache))
    elif calibration is not None:
        raise ConfigError(f"--calibration is for the policy lynx, not {policy}")
    else:
        chosen = Policy.named(policy)
    tls = _tls(url, server=False, ca=ca, certificate=certificate, key=key)
    with _writer(capture) as recording:
        async with connect(
            url, _config(secret_file), policy=chosen, tls=tls, insecure=insecure, link=_bucket(link), capture=recording
        ) as session:
            transfer = session.open(cache.manifest)
            async with _Watch(transfer, quiet=quiet):
                await transfer.send(cache)
    _summary("send", transfer, as_json=as_json, path=path)


async def _recv(
    url: str,
    output: Path,
    model: str | None,
    revision: str,
    any_client: bool,
    *,
    link: float | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    insecure: bool,
    secret_file: Path | None,
    capture: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from lynxproto.cachefile import CacheFileWriter
    from lynxproto.config import MAX_LEVELS
    from lynxproto.errors import CacheFileError, NotFoundError
    from lynxproto.manifest import Manifest
    from lynxproto.session import listen

    writers: list[CacheFileWriter] = []
    loop = asyncio.get_running_loop()
    no_room: asyncio.Future[None] = loop.create_future()

    def allocate(manifest: Manifest) -> Any:
        if writers:
            raise CacheFileError("this receiver takes one cache and has it")
        try:
            output.mkdir(parents=True, exist_ok=True)
            writers.append(CacheFileWriter(_free_name(output, manifest.request_id), manifest))
        except (OSError, CacheFileError) as error:
            named = error if isinstance(error, CacheFileError) else CacheFileError(f"cannot make {output}: {error}")
            loop.call_soon_threadsafe(no_room.set_exception, named)
            raise named from error
        return writers[0].arrays

    tls = _tls(url, server=True, ca=ca, certificate=certificate, key=key, any_client=any_client)
    try:
        with _writer(capture) as recording:
            async with listen(
                url,
                _config(secret_file, model, revision),
                allocate=allocate,
                tls=tls,
                insecure=insecure,
                link=_bucket(link),
                capture=recording,
            ) as receiver:
                if not quiet:
                    click.echo(f"listening on {receiver.url}", err=True)
                transfer = await _first(receiver, no_room)
                async with _Watch(transfer, quiet=quiet):
                    if transfer.manifest.lossy:
                        await transfer.ready(level=MAX_LEVELS - 1)
                    else:
                        await transfer.exact()
                    try:
                        result = await transfer.result()
                    except NotFoundError:  # the sender knew none
                        result = None
        if result is None:
            path = writers[0].commit()
        else:
            path = writers[0].commit(first_token=result.first_token, logit_gap=result.logit_gap)
    finally:
        no_room.cancel()
        for writer in writers:
            writer.discard()
    _summary("recv", transfer, as_json=as_json, path=path)


async def _first(receiver: Receiver, failure: asyncio.Future[None]) -> IncomingTransfer:
    """The first transfer, or the failure if that comes sooner."""
    first = asyncio.ensure_future(anext(receiver))
    waiting: list[asyncio.Future[Any]] = [first, failure]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            failure.result()
        return await first
    finally:
        first.cancel()


def _free_name(directory: Path, request_id: str) -> Path:
    """A file name that does not exist yet. ``request_id`` comes from the peer: anything unusual in it is dropped."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", request_id).strip("-")[:80] or "cache"
    path = directory / f"{stem}.safetensors"
    number = 1
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}.safetensors"
    return path


def _level_name(level: int) -> str:
    return "anchor" if level == 0 else f"residual {level}"


class _Watch:
    """Shows a transfer's levels while it runs: bars when a person looks, one line per level at the end when not."""

    _INTERVAL_S = 0.1

    def __init__(self, transfer: IncomingTransfer | OutgoingTransfer, *, quiet: bool) -> None:
        self._stats = transfer.stats
        self._bars: Any = None
        self._task: asyncio.Task[None] | None = None
        self._quiet = quiet

    async def __aenter__(self) -> None:
        if self._quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[megabytes]:>9.2f} MB {task.fields[rate]:>8.2f} MB/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bars.start()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            self._show()
            self._bars.stop()
        elif not self._quiet:
            for level, stats in sorted(self._stats.levels.items()):
                if stats.chunks:
                    seconds = (stats.last or 0) - self._stats.opened
                    click.echo(
                        f"{_level_name(level)}: {stats.bytes / 1e6:.2f} MB, done after {seconds:.3f} s", err=True
                    )

    async def _watch(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(self._INTERVAL_S)

    def _show(self) -> None:
        for level, stats in sorted(self._stats.levels.copy().items()):
            if level >= len(self._bars.tasks):
                self._bars.add_task(_level_name(level), megabytes=0.0, rate=0.0)
            seconds = (stats.last or 0.0) - (stats.first or 0.0)
            self._bars.update(
                self._bars.tasks[level].id,
                completed=stats.chunks,
                total=max(stats.total_chunks, stats.chunks),
                megabytes=stats.bytes / 1e6,
                rate=stats.bytes / 1e6 / seconds if seconds > 0 else 0.0,
            )


def _summary(command: str, transfer: IncomingTransfer | OutgoingTransfer, *, as_json: bool, path: Path) -> None:
    stats: TransferStats = transfer.stats
    seconds = (stats.released or time.monotonic()) - stats.opened
    cache = transfer.manifest.nbytes
    if as_json:
        levels = [
            {"level": level, "chunks": s.chunks, "bytes": s.bytes, "seconds": (s.last or 0) - stats.opened}
            for level, s in sorted(stats.levels.items())
            if s.chunks
        ]
        summary = {
            "schema": f"lynxproto.{command}/1",
            "path": str(path),
            "transfer": f"{transfer.id:032x}",
            "cache_bytes": cache,
            "bytes": stats.bytes,
            "seconds": seconds,
            "exact": not transfer.manifest.lossy,
            "levels": levels,
        }
        click.echo(json.dumps(summary))
        return
    what = "lossy" if transfer.manifest.lossy else "exact"
    done = f"sent {path}" if command == "send" else f"received {path}"
    click.echo(f"{done}: {stats.bytes / 1e6:.2f} MB for a cache of {cache / 1e6:.2f} MB ({what}), {seconds:.3f} s")
