"""The command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from lynxproto.bench import bench
from lynxproto.calibrate_command import calibrate
from lynxproto.commands.config import config
from lynxproto.commands.options import BitRate
from lynxproto.commands.recv import fetch, recv
from lynxproto.commands.send import send
from lynxproto.commands.serve import serve
from lynxproto.errors import LynxError
from lynxproto.probe_command import probe

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


for _command in (send, recv, serve, fetch, config, bench, calibrate, probe):
    main.add_command(_command)


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
    """Show what is on the wire.

    SOURCE is a capture (.lynx), a pcap, raw frames, or - for standard input.

    Exit code 3: the source is broken, and was shown as far as it goes.
    """
    from lynxproto.inspect.command import run_inspect

    try:
        sys.exit(run_inspect(source, **options))
    except KeyboardInterrupt:
        sys.exit(130)


@main.command()
@click.option("--command", metavar="CMD", help="Test this program (spec/conformance.md), not this implementation.")
@click.option(
    "--vectors", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of vectors. Default: those that came with this package.",
)  # fmt: skip
@click.option(
    "--filter", "filters", multiple=True, metavar="WHAT", help="Only a file, operation, result, flag or glob."
)
@click.option("--exclude", multiple=True, metavar="WHAT", help="All but those.")
@click.option("--list", "listing", is_flag=True, help="List the cases and run none.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a report (-: stdout)."
)
@click.option("--junit", "junit_file", type=click.Path(dir_okay=False, path_type=Path), help="Write JUnit XML.")
@click.option("--allow-unsupported", is_flag=True, help="Exit with 0 though some cases are unsupported.")
@click.option("--timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds for an answer.")
@click.option("--quiet", "-q", is_flag=True, help="No table, no progress.")
@click.option("--serve", is_flag=True, help="Be such a program: answer requests on standard input.")
def conformance(
    vectors: Path | None, filters: Any, exclude: Any, *, listing: bool, serve: bool, **options: Any
) -> None:
    """Run the conformance vectors against an implementation.

    That is this one, or with --command any program. WHAT selects cases: `frames`, `decode`, `invalid`, `hostile`,
    or a glob of file/operation/number. Exit code 1: a case failed. 3: none failed, and some are unsupported.
    """
    from lynxproto.conformance import command

    if serve:
        command.serve(sys.stdin, sys.stdout)
    elif listing:
        click.echo("\n".join(command.list_cases(vectors, filters, exclude)))
    else:
        sys.exit(command.run_conformance(vectors=vectors, filters=filters, exclude=exclude, **options))


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
@click.option(
    "--policy-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `lynxproto probe` wrote: lynxproto with precision by token instead of its default policy.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the results.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the timeline.")
def demo(json_file: Path | None, plot_file: Path | None, **settings: Any) -> None:
    """Run a real model over a shaped link, in four ways.

    A prefill and a decode process; BF16, INT8, INT4 and lynxproto side by side.
    """
    from lynxproto.demo.main import run_demo

    if not run_demo(json_file=json_file, plot_file=plot_file, **settings):
        sys.exit(1)
