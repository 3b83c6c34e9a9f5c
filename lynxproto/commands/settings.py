"""Settings of a command: a flag wins over the environment, that over the file, that over the default.

An option ``--log-level`` is ``LYNXPROTO_LOG_LEVEL`` in the environment and ``log-level`` in the file, at its top or in
the table of one command. Fields of :class:`~lynxproto.config.Config`, ``Limits`` and ``Admission`` are ``--set
limits.transfers=64``, ``LYNXPROTO_LIMITS_TRANSFERS``, and ``transfers`` in the table ``[limits]``.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import click

from lynxproto.config import MIN_SECRET, Admission, Config, Limits, Secret
from lynxproto.errors import ConfigError

__all__ = ["PREFIX", "TABLES", "Settings", "load_file", "read_secret"]

PREFIX: Final = "LYNXPROTO_"
#: Tables of fields, and the class that has them.
TABLES: Final[Mapping[str, type]] = {"session": Config, "limits": Limits, "admission": Admission}
#: Fields of Config that are set in other ways.
_APART: Final = {"identity", "secret", "secrets", "limits", "admission", "codecs", "features", "tables", "name"}
#: Variables that other parts of lynxproto read.
_OTHERS: Final = {"LYNXPROTO_ISA", "LYNXPROTO_UCX_SPIN_US"}
_SIZES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def table_fields(table: str) -> dict[str, Field[Any]]:
    """The fields of a table, by name."""
    return {item.name: item for item in fields(TABLES[table]) if item.name not in _APART}


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of an unknown name."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def size(text: str) -> int:
    """``64M``, ``200G`` or a plain number of bytes (powers of 1024). Raises ValueError."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:iB|B)?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; examples: 64M, 200G, 1048576")
    return int(match[1]) * _SIZES[match[2]]


def _parse(key: str, field: Field[Any], value: Any) -> Any:
    """A value of the field's type, from a text or from TOML."""
    kind: Any = type(field.default)
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if kind is int:
            return value if type(value) is int else size(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{key}: {value!r} is not of type {kind.__name__}") from error
    raise ConfigError(f"{key}: {value!r} is not of type {kind.__name__}")


def load_file(path: Path, commands: Mapping[str, click.Command]) -> dict[str, Any]:
    """Read a settings file and refuse what no command knows.

    Raises :class:`~lynxproto.errors.ConfigError`, which names the key and the nearest one there is.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    options = {name: _options(command) for name, command in commands.items()}
    everywhere = {key: param for of_one in options.values() for key, param in of_one.items()}
    for key, value in content.items():
        if key in options:
            _check_keys(path, f"[{key}] ", value, set(options[key]))
            for name, item in value.items():
                _check_value(f"{path}: [{key}] {name}", options[key][_plain(name)], item)
        elif key in TABLES:
            _check_keys(path, f"[{key}] ", value, set(table_fields(key)))
        elif key == "secrets":
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise ConfigError(f"{path}: secrets are written as tables: [[secrets]]")
            for item in value:
                _check_keys(path, "[[secrets]] ", item, {"id", "file", "principal", "not_before", "not_after"})
                for name in ("id", "file", "principal"):
                    if not isinstance(item.get(name, ""), str):
                        raise ConfigError(f"{path}: [[secrets]] {name} is a text, not {item[name]!r}")
        elif _plain(key) not in everywhere:
            known = {*map(_dashed, everywhere), *options, *TABLES, "secrets"}
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, known)}")
        else:
            _check_value(f"{path}: {key}", everywhere[_plain(key)], value)
    return content


def _options(command: click.Command) -> dict[str, click.Parameter]:
    return {param.name: param for param in command.params if param.name and param.name not in ("config", "settings")}


def _check_value(what: str, param: click.Parameter, value: Any) -> None:
    """Whether the file's value has a kind that the option can take; its own type says the rest."""
    if isinstance(param, click.Option) and param.is_flag:
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(param.type, click.Path | click.types.StringParamType):
        texts = value if param.multiple and isinstance(value, list) else [value]
        fits, kind = all(isinstance(text, str) for text in texts), f"a text{' or a list of texts' * param.multiple}"
    else:
        fits, kind = isinstance(value, str | int | float) and not isinstance(value, bool), "a text or a number"
    if not fits:
        raise ConfigError(f"{what} is {kind}, not {value!r}")


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _check_keys(path: Path, where: str, table: Any, known: set[str]) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {where.strip()} is a table")
    for key in table:
        if _plain(key) not in known:
            raise ConfigError(f"{path}: unknown key {where}{key!r}{nearest(key, map(_dashed, known))}")


def defaults_of(content: Mapping[str, Any], name: str, command: click.Command) -> dict[str, Any]:
    """What a file says of one command's options, for click's ``default_map``."""
    known = {param.name: param for param in command.params if param.name}
    found = {_plain(key): value for key, value in content.items() if _plain(key) in known}
    found |= {_plain(key): value for key, value in content.get(name, {}).items()}
    return {key: [value] if known[key].multiple and isinstance(value, str) else value for key, value in found.items()}


class Settings:
    """The fields of the tables: their effective values, and where each comes from."""

    def __init__(self, content: Mapping[str, Any], path: Path | None, pairs: Iterable[str]) -> None:
        self.values: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
        self.sources: dict[str, str] = {}
        self._content = content
        self._path = path
        for table in TABLES:
            for key, value in content.get(table, {}).items():
                self._set(table, _plain(key), value, f"file {path}")
            for name in table_fields(table):
                variable = f"{PREFIX}{table}_{name}".upper()
                if variable in os.environ:
                    self._set(table, name, os.environ[variable], f"environment {variable}")
        for pair in pairs:
            key, equals, value = pair.partition("=")
            table, _, name = key.strip().partition(".")
            if not equals or not name or table not in TABLES:
                raise ConfigError(f"--set {pair}: expected {'|'.join(TABLES)}.NAME=VALUE, e.g. limits.transfers=64")
            self._set(table, _plain(name), value.strip(), f"flag --set {key}")

    def _set(self, table: str, name: str, value: Any, source: str) -> None:
        known = table_fields(table)
        if name not in known:
            raise ConfigError(f"{source}: unknown key {table}.{name}{nearest(name, known)}")
        self.values[table][name] = _parse(f"{table}.{name}", known[name], value)
        self.sources[f"{table}.{name}"] = source

    def secrets(self) -> tuple[Secret, ...]:
        """The file's ``[[secrets]]``; relative paths are relative to the file."""
        found = []
        for table in self._content.get("secrets", []):
            item = {_plain(key): value for key, value in table.items()}
            if "file" not in item:
                raise ConfigError(f"{self._path}: [[secrets]] needs file = PATH")
            base = Path() if self._path is None else self._path.parent
            found.append(
                Secret(
                    key=read_secret(base / item["file"]),
                    id=item.get("id", ""),
                    principal=item.get("principal", ""),
                    not_before=_when(item, "not_before"),
                    not_after=_when(item, "not_after"),
                )
            )
        return tuple(found)

    def config(self, **fields_: Any) -> Config:
        """The configuration of a session; ``fields_`` are those of Config that no table has."""
        return Config(
            limits=Limits(**self.values["limits"]),
            admission=Admission(**self.values["admission"]),
            **self.values["session"],
            **fields_,
        )


def _when(item: Mapping[str, Any], key: str) -> float | None:
    value = item.get(key)
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ConfigError(f"[[secrets]] {key} is a time with its zone, for example 2027-01-31T00:00:00Z, not {value}")
    return value.timestamp()


def read_secret(path: Path) -> bytes:
    """The secret in a file, without white space around it. Raises :class:`~lynxproto.errors.ConfigError`."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the secret in {path}: {error.strerror or error}") from error
    if len(secret) < MIN_SECRET:
        raise ConfigError(
            f"{path}: a secret has at least {MIN_SECRET} bytes, this one {len(secret)}; "
            "`openssl rand -hex 32` makes one"
        )
    return secret


def check_environment(commands: Mapping[str, click.Command]) -> None:
    """Refuse LYNXPROTO_ variables that nothing reads. Raises :class:`~lynxproto.errors.ConfigError`."""
    known = {f"{PREFIX}{name}".upper() for command in commands.values() for name in _options(command)}
    known |= {f"{PREFIX}{table}_{name}".upper() for table in TABLES for name in table_fields(table)}
    known |= _OTHERS | {f"{PREFIX}CONFIG"}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            raise ConfigError(f"unknown variable {name} in the environment{nearest(name, known)}")
