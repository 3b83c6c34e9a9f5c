"""The program that newcomers run first, and what they do with the file that it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lynxproto.cachefile import load_cache

ROOT = Path(__file__).parent.parent


def test_the_first_example(tmp_path: Path) -> None:
    for _ in range(2):  # again, over the file of the first time
        command = [sys.executable, str(ROOT / "examples" / "first.py")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        told = [line.split()[0] for line in done.stdout.splitlines()]
        assert sorted(told) == ["exact", "sent", "usable"], done.stdout
        assert told.index("usable") < told.index("exact")
    assert load_cache(tmp_path / "cache.safetensors").first_token == 11
    assert "examples/first.py" in (ROOT / "README.md").read_text()
