"""Options that all commands with a session share, and what they mean for it."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lynxproto.commands import logs
from lynxproto.commands.settings import PREFIX, Settings, check_environment, defaults_of, load_file, read_secret, size
from lynxproto.config import Config, Secret

__all__ = ["COMMANDS", "STATE_OPTION", "BitRate", "SessionOptions", "Size", "session_command"]

#: The commands whose options may be set in a file and in the environment, by name.
COMMANDS: dict[str, click.Command] = {}


class BitRate(click.ParamType[float]):
    """``130M``, ``1.5G``, ``800k`` or a plain number: bits per second."""

    name = "bits/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a rate."""
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)([kKMG]?)", str(value))
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a rate; examples: 130M, 1.5G, 800k (bits per second)", param, ctx)
        return float(match[1]) * {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]


class Size(click.ParamType[int]):
    """``64M``, ``200G`` or a plain number: bytes, powers of 1024."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size."""
        try:
            return size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _load(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Before any other option: what the file says are the defaults of the others."""
    check_environment(COMMANDS)
    content = {} if value is None else load_file(value, COMMANDS)
    ctx.meta[__name__] = content
    ctx.default_map = defaults_of(content, ctx.info_name or "", ctx.command)
    return value


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUT = click.Path(dir_okay=False, path_type=Path)


def _shared(log_level: str) -> list[click.Parameter]:
    return [
        click.Option(
            ["--config"], type=FILE, is_eager=True, callback=_load, help="Settings in TOML; see docs/operations.md."
        ),
        click.Option(
            ["--set", "settings"], multiple=True, metavar="TABLE.NAME=VALUE",
            help="A setting of the session, limits or admission table, e.g. limits.transfers=64.",
        ),
        click.Option(["--threads"], type=click.IntRange(1), help="Codec threads. Default: one for each CPU."),
        click.Option(["--link"], type=BitRate(), help="Slow this side's sending down to a rate, for example 130M."),
        click.Option(["--ca"], type=FILE, help="PEM file that signs the peer's certificate (tcps://)."),
        click.Option(["--certificate"], type=FILE, help="This side's certificate, a PEM file (tcps://)."),
        click.Option(["--key"], type=FILE, help="Key of the certificate, a PEM file (tcps://)."),
        click.Option(["--insecure"], is_flag=True, help="Allow plaintext: tcp:// beyond loopback."),
        click.Option(
            ["--secret-file"], type=FILE, help="File of a shared secret that the peer must know: 16 bytes or more."
        ),
        click.Option(
            ["--capture"], type=_OUT,
            help="Record what crosses the session's streams into a file, for `lynxproto inspect`.",
        ),
        click.Option(["--metrics"], metavar="HOST:PORT", help="Serve Prometheus metrics there."),
        click.Option(
            ["--log-format"], type=click.Choice(["text", "json"]), default="text", show_default=True,
            help="Of the lines on stderr; json: all of them, and no progress.",
        ),
        click.Option(
            ["--log-level"], type=click.Choice(["debug", "info", "warning", "error"]), default=log_level,
            show_default=True, help="The least that is logged.",
        ),
        click.Option(["--json"], is_flag=True, help="Print each outcome as one line of JSON on stdout."),
        click.Option(["--quiet", "-q"], is_flag=True, help="No progress on stderr."),
    ]  # fmt: skip


def _of_servers() -> list[click.Parameter]:
    return [
        click.Option(["--any-client"], is_flag=True, help="Let in clients without a certificate (tcps://)."),
        click.Option(
            ["--drain-timeout"], type=click.FloatRange(min=0), default=30.0, show_default=True,
            help="Seconds that transfers have to finish after SIGTERM.",
        ),
    ]  # fmt: skip


def _of_clients() -> list[click.Parameter]:
    return [
        click.Option(
            ["--stripes"], type=click.IntRange(1), default=1, show_default=True,
            help="Connections of the session; with several, the first is kept free for anchors.",
        ),
    ]  # fmt: skip


#: For commands that receive.
STATE_OPTION = click.Option(
    ["--state"],
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps what has arrived, so that transfers go on after a restart of this process.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """The shared options of one command, as given."""

    config: Path | None
    settings: tuple[str, ...]
    threads: int | None
    link: float | None
    ca: Path | None
    certificate: Path | None
    key: Path | None
    insecure: bool
    secret_file: Path | None
    capture: Path | None
    metrics: str | None
    log_format: str
    log_level: str
    json: bool
    quiet: bool
    any_client: bool = False
    drain_timeout: float = 30.0
    stripes: int = 1

    @property
    def silent(self) -> bool:
        """Whether progress is not shown: nobody wants to see it, or stderr holds JSON."""
        return self.quiet or self.log_format == "json"

    def session(self, url: str, content: Mapping[str, Any], *, server: bool, **fields: Any) -> dict[str, Any]:
        """Arguments for ``connect`` and ``listen``; ``fields`` are further ones of Config."""
        from lynxproto.transports import TokenBucket

        settings = Settings(content, self.config, self.settings)
        secrets = settings.secrets()
        if self.secret_file is not None:
            secrets = (*secrets, Secret(key=read_secret(self.secret_file)))
        return {
            "config": settings.config(secrets=secrets, **fields),
            "tls": self._tls(url, server=server),
            "insecure": self.insecure,
            "link": None if self.link is None else TokenBucket(self.link),
            "threads": self.threads,
            **({} if server else {"stripes": self.stripes}),
        }

    def _tls(self, url: str, *, server: bool) -> ssl.SSLContext | None:
        from lynxproto.transports import client_context, get_transport, parse_url, server_context

        scheme = parse_url(url).scheme
        given = bool(self.ca or self.certificate or self.key)
        if scheme != "tcps" and not given:
            return None
        if scheme != "tcps" and not get_transport(scheme).tickets:
            raise click.UsageError(f"--ca, --certificate and --key need a tcps:// URL, not {url}")
        if not server:
            return client_context(ca=self.ca, certificate=self.certificate, key=self.key)
        if self.certificate is None:
            raise click.UsageError(
                f"receiving on {scheme}:// needs --certificate (and --key, unless that file holds both)"
            )
        return server_context(
            certificate=self.certificate, key=self.key, ca=self.ca, client_certificates=not self.any_client
        )

    def observer(self, metrics: Any, config: Config) -> Callable[[str, Mapping[str, Any]], None]:
        """For ``observe``: counts, and tells whoever waits why nothing moves."""

        def observe(event: str, fields: Mapping[str, Any]) -> None:
            if metrics is not None:
                metrics.observe(event, fields)
            if event == "link_lost" and not self.silent and self.log_level not in ("debug", "info"):
                logs.say(f"the link is lost ({fields['error']}); the transfer goes on if it is back within "
                         f"{config.session_timeout:g} s")  # fmt: skip

        return observe

    def recording(self) -> AbstractContextManager[Any]:
        """A writer for ``--capture``, or None."""
        from lynxproto.capture import CaptureWriter

        return nullcontext() if self.capture is None else CaptureWriter(self.capture)

    @contextmanager
    def measuring(self) -> Iterator[Any]:
        """Metrics that are served, or None."""
        if self.metrics is None:
            yield None
            return
        from lynxproto.metrics import Metrics

        metrics = Metrics()
        stop = metrics.serve(self.metrics)
        try:
            yield metrics
        finally:
            stop()


def session_command(
    name: str, *params: click.Parameter, server: bool = False, log_level: str = "error"
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function that takes ``params``, ``options``, and ``content`` (of the settings file)."""

    def make(function: Callable[..., None]) -> click.Command:
        def call(**given: Any) -> None:
            shared = {key: given.pop(key) for key in SessionOptions.__dataclass_fields__ if key in given}
            options = SessionOptions(**shared)
            logs.set_up(options.log_format, options.log_level)
            function(options=options, content=click.get_current_context().meta[__name__], **given)

        everything = [*params, *(_of_servers() if server else _of_clients()), *_shared(log_level)]
        for param in everything:
            if param.name != "settings":
                param.envvar = f"{PREFIX}{param.name}".upper()
        command = COMMANDS[name] = click.Command(name, params=everything, callback=call, help=function.__doc__)
        return command

    return make
