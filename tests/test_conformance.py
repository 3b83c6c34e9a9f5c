"""The vectors hold, are well formed, can be made again, and stay true; the runner tells the truth about a program."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from lynxproto.chunk import ChunkSpec, TokenSet
from lynxproto.cli import main
from lynxproto.conformance.vectors import Case, default_vectors, load

SPEC = Path(__file__).parent.parent / "spec"
VECTORS = SPEC / "vectors"
FROZEN = sorted(path for path in (VECTORS / "frozen").iterdir() if path.is_dir())
CASES = load(VECTORS)
SERVE = f"{sys.executable} -m lynxproto conformance --serve"


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["conformance", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def test_this_implementation_conforms():
    run("--quiet", "--vectors", VECTORS)


def test_the_vectors_come_with_the_package():
    assert [case.address for case in load(default_vectors())] == [case.address for case in CASES]


def test_vectors_follow_their_schema():
    if importlib.util.find_spec("jsonschema") is None and not os.environ.get("CI"):
        pytest.skip("this test needs jsonschema: pip install -e '.[dev]'")
    import jsonschema

    schema = json.loads((VECTORS / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in (path for path in VECTORS.rglob("*.json") if path.name != "schema.json"):
        content = json.loads(path.read_text())
        errors = [f"{path.name} {list(e.path)}: {e.message}" for e in validator.iter_errors(content)]
        assert not errors, errors[:3]


def test_vectors_count_and_explain_themselves():
    for path in (path for path in VECTORS.rglob("*.json") if path.name != "schema.json"):
        content = json.loads(path.read_text())
        tests = [test for group in content["groups"] for test in group["tests"]]
        assert [test["tcId"] for test in sorted(tests, key=lambda t: t["tcId"])] == list(range(1, len(tests) + 1))
        assert content["numberOfTests"] == len(tests)
        assert {flag for test in tests for flag in test["flags"]} == set(content["notes"])
        assert path.stat().st_size < 1 << 20
    assert len(CASES) >= 300


def test_the_generator_makes_the_same_bytes(tmp_path: Path):
    subprocess.run([sys.executable, VECTORS / "generator", "--output", tmp_path], check=True, timeout=120)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in VECTORS.glob("*.json") if path.name != "schema.json"}
    assert made.keys() == kept.keys()
    changed = [name for name in made if made[name] != kept[name]]
    assert not changed, f"{changed} are out of date: run `make vectors` and look at what changed"


@pytest.mark.parametrize("folder", FROZEN, ids=lambda path: path.name)
def test_frozen_vectors_hold_for_ever(folder: Path):
    run("--quiet", "--vectors", folder)


def tile_of(case: Case) -> tuple[ChunkSpec, list[bytes]]:
    heads, tokens, dim = case.input["shape"]
    place = {"layer": case.input.get("layer", 0), "head_start": case.input.get("head_start", 0)}
    spec = ChunkSpec(
        part=case.input["part"], dtype=case.input["dtype"], heads=heads, tokens=tokens, head_dim=dim,
        token_set=TokenSet.range(0, tokens), **place,
    )  # fmt: skip
    return spec, [bytes.fromhex(payload) for payload in case.input.get("payloads", ())]


def test_the_torch_codec_makes_the_same_of_them():
    torch = pytest.importorskip("torch", reason="the codec for devices needs torch: pip install -e '.[torch]'")
    from lynxproto.codecs import get_codec
    from lynxproto.codecs.hq_torch import TorchHQ

    chosen = [case for case in CASES if case.file in ("codec-hq-bfloat16", "codec-hq-float16")]
    assert len(chosen) > 100
    for case in chosen:
        spec, payloads = tile_of(case)
        codec = TorchHQ.of(get_codec(case.input["codec"]))
        if case.op == "encode":
            words = np.frombuffer(bytearray.fromhex(case.input["words"]), np.int16).reshape(spec.shape)
            made = codec.encode(spec, torch.from_numpy(words).view(getattr(torch, spec.dtype)))
            assert [bytes(memoryview(m.numpy() if torch.is_tensor(m) else m)).hex() for m in made] == case.expected[
                "payloads"
            ], case.comment
            continue
        for level, words_ in enumerate(case.expected["levels"]):
            out = torch.zeros(spec.shape, dtype=torch.int16)
            codec.decode(spec, payloads[: level + 1], out.view(getattr(torch, spec.dtype)))
            assert out.numpy().tobytes().hex() == words_, (case.comment, level)


# --- the runner


def test_the_protocol_carries_every_case():
    run("--quiet", "--vectors", VECTORS, "--command", SERVE, "--filter", "primitives", "--filter", "headers/*/1*",
        "--filter", "codec-hq-bfloat16/*/1*", "--filter", "sessions-violations/*/1*")  # fmt: skip


def program(folder: Path, body: str) -> str:
    """A program under test: ``body`` sees ``request`` and gives the answer to ``say``."""
    path = folder / "program.py"
    path.write_text(
        "import json, sys, time\n"
        "def say(**answer): print(json.dumps({'id': request['id'], **answer}), flush=True)\n"
        f"for line in sys.stdin:\n    request = json.loads(line)\n    {body}\n"
    )
    return f"{sys.executable} {path}"


def test_unsupported_is_not_passed(tmp_path: Path):
    command = program(tmp_path, "say(status='unsupported')")
    report = tmp_path / "report.json"
    asked = ("--vectors", VECTORS, "--command", command, "--filter", "captures")
    assert "18 cases, 0 passed, 0 failed, 18 unsupported" in run(*asked, "--json", report, code=3)
    run(*asked, "--allow-unsupported")
    found = json.loads(report.read_text())
    assert found["schema"] == "lynxproto.conformance/1"
    assert (found["cases"], found["passed"], found["failed"], found["unsupported"]) == (18, 0, 0, 18)
    assert len(found["unsupported_cases"]) == 18
    assert json.loads(run(*asked, "--json", "-", code=3)) == found


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('out of memory')", "out of memory"),
        ("time.sleep(60)", "no answer for 0.5 s"),
        ("print('hello', flush=True)", "not JSON"),
        ("print('{}', flush=True)", "not an answer to request"),
        ("say(status='refused', code=2)", "expected ok"),
        ("say(status='perhaps')", "expected ok"),
        ("say(status='ok')", 'expected "e3069283", got null'),
        ("say(status='ok', crc32c='e3069283ff')", "expected"),
    ],
)
def test_a_program_that_fails(tmp_path: Path, body: str, said: str):
    command = program(tmp_path, body)
    out = run("--vectors", VECTORS, "--command", command, "--filter", "primitives/crc32c/1", "--timeout", "0.5", code=1)
    assert said in out
    assert "1 cases, 0 passed, 1 failed" in out


def test_a_program_is_started_again_after_it_died(tmp_path: Path):
    command = program(tmp_path, "say(status='ok', crc32c='e3069283'); sys.exit()")
    out = run("--vectors", VECTORS, "--command", command, "--filter", "primitives/crc32c/[12]", code=1)
    assert "2 cases, 1 passed, 1 failed" in out


def test_a_refusal_of_something_valid_and_the_other_way_round(tmp_path: Path):
    asked = ("--vectors", VECTORS, "--filter", "headers", "--exclude")
    everything = program(tmp_path, "say(status='ok', frames=[], rest=0)")
    assert "status: expected refused, got" in run(*asked, "valid", "--command", everything, code=1)
    nothing = program(tmp_path, "say(status='refused', code=4, offset=0)")
    assert "status: expected ok, got" in run(*asked, "invalid", "--command", nothing, code=1)


def test_junit(tmp_path: Path):
    report = tmp_path / "junit.xml"
    command = program(tmp_path, "say(status='unsupported') if request['op'] == 'proof' else say(status='ok')")
    run("--quiet", "--vectors", VECTORS, "--command", command, "--filter", "primitives", "--junit", report, code=1)
    suites = ElementTree.parse(report).getroot()
    (suite,) = suites
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("37", "29", "8")
    assert len(suite.findall("testcase/failure")) == 29


def test_a_difference_in_bytes_names_the_first(tmp_path: Path):
    levels = [("00" * 400)] * 3
    command = program(tmp_path, f"say(status='ok', levels={levels})")
    out = run("--vectors", VECTORS, "--command", command, "--filter", "codec-hq-bfloat16/decode/1", code=1)
    assert re.search(r"levels\[0\]: byte \d+ of 720 bytes, not 400: expected \.\.", out)


def test_mistakes(tmp_path: Path):
    assert "matches no case" in run("--vectors", VECTORS, "--filter", "nothing", code=1)
    assert "no vectors in" in run("--vectors", tmp_path, code=1)
    assert "cannot start" in run("--vectors", VECTORS, "--command", "/does/not/exist", code=1)
    assert "cannot write" in run("--vectors", VECTORS, "--filter", "captures", "--json", tmp_path / "no" / "x", code=1)
    (tmp_path / "x.json").write_text('{"format": "lynxproto.vectors/9"}')
    assert "has format" in run("--vectors", tmp_path, code=1)


def test_list():
    listed = run("--list", "--vectors", VECTORS, "--filter", "captures").splitlines()
    assert len(listed) == 18
    assert listed[0] == "captures/capture/1  valid  -  no records"


def test_every_section_that_a_vector_names_exists():
    for section in {case.section for case in CASES}:
        file, _, heading = section.partition(", ")
        text = (SPEC / file).read_text()
        assert not heading or re.search(rf"^(#+ (\d+(\.\d+)*\.? )?|\d+\. ){re.escape(heading)}\b", text, re.M), section
