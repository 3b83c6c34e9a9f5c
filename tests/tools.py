"""Programs that some tests need from the system. CI installs them, so there a missing one is a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import pytest


def need(name: str) -> Callable[..., str]:
    """The program ``name`` as a function of its arguments that returns its standard output; fails if it does."""
    path = shutil.which(name)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"CI must install {name}: apt-get install {name}")
    if path is None:
        pytest.skip(f"this test needs {name}: apt-get install {name}")

    def run(*arguments: object) -> str:
        done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
