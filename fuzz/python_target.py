"""Runs one Python target under atheris: ``python -m fuzz.python_target TARGET [libFuzzer options] [CORPUS...]``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small; must be set before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the honest user of a connection lives there

import atheris


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["lynxproto"]):
        target = importlib.import_module(f"fuzz.targets.{name}")
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
