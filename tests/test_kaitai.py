"""spec/lynx.ksy compiles, and reads every vector as this implementation does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = ("kaitai-struct@0.11.0", "kaitai-struct-compiler@0.11.0", "yaml@2.9.1")
#: Where npm puts them; outlives a test run. CI installs them before.
CACHE = HERE.parent / ".cache" / "kaitai"


@pytest.fixture(scope="module")
def node() -> str:
    found, npm = shutil.which("node"), shutil.which("npm")
    if not found or not npm:
        if os.environ.get("CI"):
            pytest.fail("CI must install node and npm: apt-get install nodejs npm")
        pytest.skip("this test needs node and npm: apt-get install nodejs npm")
    if not (CACHE / "node_modules" / "kaitai-struct-compiler").is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-save", "--silent", "--prefix", CACHE, *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode and not os.environ.get("CI"):
            pytest.skip(f"npm could not install {', '.join(PACKAGES)}: {done.stderr[:200]}")
        assert done.returncode == 0, done.stderr
    return found


def test_it_reads_every_vector(node: str):
    command = [node, HERE / "kaitai" / "run.js", CACHE, HERE.parent / "spec"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["differences"] == []
    assert read["frames"] > 3000
    assert read["sessions"] > 200
    assert read["payloads"] > 500
    assert read["captures"] >= 6
    assert read["refused"] > 50
