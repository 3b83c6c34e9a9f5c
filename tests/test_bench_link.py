"""`lynxproto bench link` and `bench ucx`: what they print and write, on small work."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from lynxproto.cli import main


def test_bench_link_predicts_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "link.png"
    done = CliRunner().invoke(main, ["bench", "link", "--no-check", "--json", "-", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["schema"] == "lynxproto.bench.link/1"
    rows = report["predictions"]
    assert rows[0]["auto"].startswith("lynx")
    assert rows[-1]["auto"] == "raw"  # progressive coding switches itself off
    assert {point["above"] for point in report["break_even"]} >= {"raw"}
    for row in rows:
        assert row["raw"]["usable_s"] == row["raw"]["exact_s"]
        assert row["lynx"]["usable_s"] <= row["lynx"]["exact_s"]
    assert plot.stat().st_size > 1000


def test_bench_link_checks_predictions_over_links() -> None:
    arguments = ["bench", "link", "--cache", "8", "--check-link", "40M", "--runs", "1", "--json", "-"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    checks = json.loads(done.stdout)["checks"]
    assert [check["policy"] for check in checks] == ["raw", "exact", "lynx", "auto"]
    for check in checks:
        assert 0 < check["usable_s"] <= check["exact_s"]
        assert check["exact_s"] > 0.3 * check["predicted_exact_s"]  # the link holds everybody back


@pytest.mark.skipif(find_spec("ucxx") is None, reason="needs the extra `ucx`, which CI installs")
def test_bench_ucx() -> None:
    arguments = ["bench", "ucx", "--tls", "tcp", "--size", "65536", "--runs", "1", "--moved", "1", "--json", "-"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["schema"] == "lynxproto.bench.ucx/1"
    assert {entry["contestant"]: entry["peer"] for entry in report["results"]} == {
        "lynxproto": False,
        "ucxx polling": True,
        "ucxx polling, set": True,
        "ucxx coroutines": True,
    }
    assert all(entry["stream_gb_per_s"] > 0 and entry["ping_pong_gb_per_s"] > 0 for entry in report["results"])
