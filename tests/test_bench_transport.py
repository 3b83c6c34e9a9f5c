"""``lynxproto bench transport``: that it measures, and says what it measured. Not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lynxproto.bench import loads
from lynxproto.cli import main


def test_goodput_as_json(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = ["bench", "transport", "--only", "goodput", "--transport", "unix", "--size", "2", "--runs", "1"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["schema"] == "lynxproto.bench.transport/1"
    rows = {row["transport"]: row for row in report["results"]}
    assert set(rows) == {"raw", "raw-reno", "raw+checksums", "unix"}
    assert report["raw_tcp_gb_per_s"] == max(rows["raw"]["gb_per_s"], rows["raw-reno"]["gb_per_s"])
    assert [rows[name]["peer"] for name in ("raw", "unix")] == [True, False]
    assert all(row["gb_per_s"] > 0 and row["version"] for row in rows.values())
    assert report["environment"]["cores"] >= 1
    assert "unix" in result.output


def test_the_parser_takes_everything_in() -> None:
    found = loads.parser(4 << 20, 1)
    assert found["gb_per_s"] > 0
    assert found["to_memcpy"] == pytest.approx(found["gb_per_s"] / found["memcpy_gb_per_s"])


def test_many_frames_and_many_open_transfers() -> None:
    assert loads.frames(64)["frames"] == 64
    assert loads.open_transfers(20)["open"] == 20
