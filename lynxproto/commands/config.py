"""``lynxproto config``: what a command would run with, and where each value comes from."""

from __future__ import annotations

import json
from copy import copy
from typing import Any

import click

from lynxproto.commands import options as shared
from lynxproto.commands.options import COMMANDS
from lynxproto.commands.settings import TABLES, Settings, table_fields

__all__ = ["config"]

_SOURCES = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--json", "as_json", is_flag=True, help="One object: setting -> value and source.")
@click.argument("command", metavar="COMMAND")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def config(command: str, arguments: tuple[str, ...], as_json: bool) -> None:
    """Show the settings that COMMAND would run with.

    COMMAND is send, recv, serve or fetch, with its ARGUMENTS; shown is where each setting comes from, too.
    A flag wins over the environment (LYNXPROTO_...), that over the file (--config), that over the default.
    """
    if command not in COMMANDS:
        raise click.UsageError(f"{command!r} has no settings; known: {', '.join(COMMANDS)}")
    params = [copy(param) for param in COMMANDS[command].params]
    for param in params:
        param.required = False  # they may be missing here; everything else is checked as it will be
    with click.Command(command, params=params).make_context(command, list(arguments)) as ctx:
        content = ctx.meta[shared.__name__]
        effective: dict[str, dict[str, Any]] = {}
        for param in params:
            if param.name and param.name != "settings":
                source = ctx.get_parameter_source(param.name)
                effective[param.name.replace("_", "-")] = {
                    "value": ctx.params.get(param.name),
                    "source": _SOURCES.get(source.name if source else "", "default"),
                }
        settings = Settings(content, ctx.params.get("config"), ctx.params.get("settings") or ())
        for table in TABLES:
            for name, item in table_fields(table).items():
                key = f"{table}.{name}"
                effective[key] = {
                    "value": settings.values[table].get(name, item.default),
                    "source": settings.sources.get(key, "default"),
                }
        secrets = settings.secrets()
        for secret in secrets:
            life = {"not_before": secret.not_before, "not_after": secret.not_after}
            effective[f"secrets.{secret.id}"] = {"value": {"principal": secret.owner, **life}, "source": "file"}
        settings.config(secrets=secrets)  # what makes no sense together is an error here too
    if as_json:
        click.echo(json.dumps(effective, default=str))
        return
    width = max(map(len, effective))
    for key, entry in effective.items():
        value = "-" if entry["value"] is None else entry["value"]
        click.echo(f"{key:<{width}}  {value!s:<24}  {entry['source']}")
