"""spec/ says what the code does: its tables are compared with the code's, its generated parts are made again."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from lynxproto import _cbor, state
from lynxproto.config import Limits
from lynxproto.conformance.schema import Key, keys_of
from lynxproto.errors import ErrorCode
from lynxproto.frames import HEADER_FIELDS, FrameType
from lynxproto.manifest import Identity, Manifest

FOLDER = Path(__file__).parent.parent / "spec"
SPEC = (FOLDER / "wire-format.md").read_text()


def section(title: str, level: int = 2) -> str:
    """The text under a heading, up to the next one of its level or above."""
    mark = "#" * level
    return re.split(rf"^#{{1,{level}}} ", SPEC.split(f"\n{mark} {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def rows(text: str) -> list[list[str]]:
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found if not set("".join(row)) <= set("- ")][1:]


def test_frame_header():
    table = [row for row in rows(section("Frame header")) if row[0].isdigit() and row[1].isdigit()]
    offset, expected = 0, []
    for name, code in HEADER_FIELDS:
        size = struct.calcsize("<" + code)
        expected.append([str(offset), str(size), name])
        offset += size
    assert [row[:3] for row in table] == expected


def test_frame_types():
    overview = section("Frame types").split("\n### ")[0]
    assert {int(row[0]): row[1] for row in rows(overview)} == {int(t): t.name for t in FrameType}


def span(key: Key) -> str:
    found = f"{key.range}, {key.items}" if key.items else key.range
    if key.required:
        return found
    default = {None: "null", "": '`""`', b"": "empty", (): "empty"}.get(key.default, str(key.default))
    return f"{found}; default {default}" if found else f"default {default}"


@pytest.mark.parametrize("kind", [kind for kind in FrameType if kind != FrameType.DATA], ids=lambda kind: kind.name)
def test_keys_of_control_frames(kind: FrameType):
    """A key that the parser takes must be in its table, with the type, range and default that the parser checks."""
    table = rows(section(kind.name, 3))
    assert [row[:3] for row in table] == [[key.name, key.type, span(key)] for key in keys_of(kind)]
    assert all(row[3] for row in table)


def test_error_codes():
    assert {int(row[0]): row[1] for row in rows(section("Error codes"))} == {int(c): c.name for c in ErrorCode}


def test_limits():
    scale = {"GiB": 1 << 30, "MiB": 1 << 20, "Mi": 1 << 20, "Ki": 1 << 10}
    documented = {}
    for name, default, _ in rows(section("Limits")):
        number, *unit = default.split()
        documented[name] = int(number) * (scale[unit[0]] if unit else 1)
    assert documented == asdict(Limits())


def test_manifest_keys():
    manifest = Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=1, head_dim=1, tokens=1
    )
    told = _cbor.loads(manifest.to_bytes(), "manifest").raw
    documented = {row[0] for row in rows(section("Manifest"))} - {"key"}
    assert documented == set(told) | set(told["layers"][0])
    named = re.findall(r"`([a-z_]+)`", section("Identity", 3))
    assert set(named) == {item.name for item in fields(Identity)}


def test_generated_parts_are_up_to_date():
    done = subprocess.run(
        [sys.executable, FOLDER / "generate.py", "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"run `make spec`: {done.stdout}{done.stderr}"
    names = set(re.findall(r"<!-- generated: ([^>]+) -->", "".join(path.read_text() for path in FOLDER.glob("*.md"))))
    assert len(names) == 9


def test_diagrams_show_the_tables():
    for name, table in (
        ("Session", state.SESSION),
        ("Stripe", state.STRIPE),
        ("Outgoing transfer", state.OUTGOING),
        ("Incoming transfer", state.INCOMING),
        ("Chunk at its sender", state.CHUNK),
    ):
        text = section(name, 3)
        moves = {(s.value, to.value, signal) for s, row in table.items() for signal, to in row.items()}
        assert set(re.findall(r"^    (\w+) --> (\w+) : (.+)$", text, re.M)) == moves
        assert {tuple(row) for row in rows(text)} == {(s, signal, to) for s, to, signal in moves} | {
            (s.value, "", "(final)") for s, row in table.items() if not row
        }


def test_links_between_documents_lead_somewhere():
    for path in FOLDER.glob("*.md"):
        text = path.read_text()
        headings = {
            re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)
        }
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in headings, (path.name, target)
            elif "://" not in target:
                assert (FOLDER / target).exists(), (path.name, target)


def test_every_state_can_end():
    for table in (state.SESSION, state.STRIPE, state.OUTGOING, state.INCOMING):
        final = next(s for s, row in table.items() if not row)
        reached = {final}
        for _ in table:
            reached |= {s for s, row in table.items() if reached & set(row.values())}
        assert reached == set(table)
