"""Programs that tests need from the system: installed with apt-get where that is possible, else named."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import pytest


def need(name: str) -> Callable[..., str]:
    """The program ``name`` as a function of its arguments that returns its standard output; fails if it does."""
    if shutil.which(name) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True}
        subprocess.run(["apt-get", "update", "-qq"], **quiet, check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", name], **quiet, check=False)
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"this test needs {name}: apt-get install {name}")

    def run(*arguments: object) -> str:
        done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
