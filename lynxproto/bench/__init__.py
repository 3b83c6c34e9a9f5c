"""``lynxproto bench``: measure this machine. One module per subcommand, imported when it runs.

A new subcommand is a click command in a module of its own and one line in ``_COMMANDS``.
"""

from __future__ import annotations

from importlib import import_module

import click

__all__ = ["bench"]

#: name -> "module:attribute" of a click command
_COMMANDS = {
    "chaos": "lynxproto.bench.chaos.command:chaos",
    "codec": "lynxproto.bench.codec:codec",
    "instructions": "lynxproto.bench.instructions:instructions",
    "link": "lynxproto.bench.link:link",
    "quality": "lynxproto.bench.quality:quality",
    "ucx": "lynxproto.bench.ucx:ucx",
    "transport": "lynxproto.bench.transport:transport",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(cls=_LazyGroup)
def bench() -> None:
    """Measure this machine: codecs, transports, faults, quality."""
