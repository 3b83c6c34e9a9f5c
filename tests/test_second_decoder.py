"""examples/decoder was written from spec/ alone: it must read all vectors that it can, and say so of the rest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from lynxproto.cli import main

ROOT = Path(__file__).parent.parent


def test_it_conforms(tmp_path: Path):
    node = shutil.which("node")
    if not node:
        if os.environ.get("CI"):
            pytest.fail("CI must install node: apt-get install nodejs")
        pytest.skip("this test needs node: apt-get install nodejs")
    report = tmp_path / "report.json"
    command = f"{node} {ROOT / 'examples' / 'decoder' / 'decoder.js'}"
    asked = ("--vectors", ROOT / "spec" / "vectors", "--command", command, "--exclude", "encode", "--exclude", "sender",
             "--allow-unsupported", "--json", report)  # fmt: skip
    done = CliRunner().invoke(main, ["conformance", *map(str, asked)])
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    assert found["failed"] == 0
    assert found["passed"] > 1500
    # Zstandard is not in it: that, and nothing else, may be unsupported.
    assert all("zstd" in case["flags"] for case in found["unsupported_cases"])
