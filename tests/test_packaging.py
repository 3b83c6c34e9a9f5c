"""What is installed: every package of the source tree, under the name that it is imported by."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = {"lynxproto": "lynxproto", "codecs": "lynxproto.codecs", "transports": "lynxproto.transports"}
    found = {
        ".".join((names[top], *init.parent.relative_to(ROOT / top).parts))
        for top in names
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(setuptools["packages"]) - {"lynxproto.vectors"}
