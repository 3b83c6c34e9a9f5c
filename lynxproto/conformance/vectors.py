"""The vectors: JSON files of cases, each with what a program is given and what it must make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Final

from lynxproto.errors import ConfigError

__all__ = ["FORMAT", "Case", "default_vectors", "load", "select"]

FORMAT: Final = "lynxproto.vectors/1"
RESULTS: Final = ("valid", "invalid", "acceptable")


@dataclass(frozen=True, slots=True)
class Case:
    """One test of one file. ``expected`` is part of the answer that a program must give."""

    file: str
    number: int
    op: str
    section: str
    comment: str
    flags: tuple[str, ...]
    result: str
    input: dict[str, Any]
    expected: dict[str, Any]

    @property
    def address(self) -> str:
        """``file/op/tcId``."""
        return f"{self.file}/{self.op}/{self.number}"

    def matches(self, pattern: str) -> bool:
        """Whether ``pattern`` is its file, operation, result or one of its flags, or a glob of its address."""
        return pattern in (self.file, self.op, self.result, *self.flags) or fnmatchcase(self.address, pattern)


def default_vectors() -> Path:
    """The folder of the vectors that came with this package."""
    return Path(str(resources.files("lynxproto.vectors")))


def load(folder: Path) -> list[Case]:
    """All cases of the JSON files in ``folder``, in order. Raises :class:`~lynxproto.errors.ConfigError`."""
    files = sorted(path for path in folder.glob("*.json") if path.name != "schema.json")
    if not files:
        raise ConfigError(f"no vectors in {folder}: expected JSON files as in spec/vectors")
    return [case for path in files for case in _cases(path)]


def _cases(path: Path) -> Iterator[Case]:
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ConfigError(f"{path} has format {content['format']!r}; this program reads {FORMAT}")
        for group in content["groups"]:
            for test in group["tests"]:
                if test["result"] not in RESULTS:
                    raise ConfigError(f"{path}, tcId {test['tcId']}: unknown result {test['result']!r}")
                yield Case(
                    path.stem,
                    test["tcId"],
                    group["op"],
                    test.get("section", group["section"]),
                    test["comment"],
                    tuple(test["flags"]),
                    test["result"],
                    test["input"],
                    test["expected"],
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not hold vectors: {error!r}") from error


def select(cases: Sequence[Case], filters: Sequence[str], exclude: Sequence[str]) -> list[Case]:
    """Cases that match one of ``filters`` (all, if there are none) and none of ``exclude``.

    Raises :class:`~lynxproto.errors.ConfigError` for a pattern that matches nothing: a run that tests nothing is no
    success.
    """
    for pattern in (*filters, *exclude):
        if not any(case.matches(pattern) for case in cases):
            raise ConfigError(f"{pattern!r} matches no case; --list shows addresses and flags")
    chosen = [
        case
        for case in cases
        if (not filters or any(map(case.matches, filters))) and not any(map(case.matches, exclude))
    ]
    if not chosen:
        raise ConfigError("the filters leave no case")
    return chosen
