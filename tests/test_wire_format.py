"""spec/wire-format.md says what the code does: its tables are compared with the code's."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from lynxproto import _cbor, state
from lynxproto.config import Limits
from lynxproto.errors import ErrorCode
from lynxproto.frames import FrameType
from lynxproto.manifest import Identity, Manifest

SPEC = (Path(__file__).parent.parent / "spec" / "wire-format.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", SPEC.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def rows(text: str) -> list[list[str]]:
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found if not set("".join(row)) <= set("- ")][1:]


def test_frame_types():
    table = rows(section("Frame types"))
    assert {int(row[0]): row[1] for row in table} == {int(t): t.name for t in FrameType}
    for row in table:
        names = set(re.findall(r"`([a-z]+)`", row[3]))
        assert names or row[1] in ("DATA", "URGENT", "ACCEPT", "RESUME")


def test_error_codes():
    assert {int(row[0]): row[1] for row in rows(section("Error codes"))} == {int(c): c.name for c in ErrorCode}


def test_limits():
    scale = {"GiB": 1 << 30, "MiB": 1 << 20, "Mi": 1 << 20, "Ki": 1 << 10}
    documented = {}
    for name, default, _ in rows(section("Handshake")):
        number, *unit = default.split()
        documented[name] = int(number) * (scale[unit[0]] if unit else 1)
    assert documented == {item.name: item.default for item in fields(Limits)}


def test_manifest_keys():
    manifest = Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=1, head_dim=1, tokens=1
    )
    assert {row[0] for row in rows(section("Manifest"))} == set(_cbor.loads(manifest.to_bytes(), "manifest").raw)


def test_state_machines():
    text = section("State machines")
    for name, table in (
        ("Session", state.SESSION),
        ("Stripe", state.STRIPE),
        ("Outgoing transfer", state.OUTGOING),
        ("Incoming transfer", state.INCOMING),
        ("Chunk at its sender", state.CHUNK),
    ):
        block = text.split(f"**{name}**", 1)[1].split("**", 1)[0]
        expected = {(s.value, signal, to.value) for s, row in table.items() for signal, to in row.items()}
        finals = {(s.value, "", "(final)") for s, row in table.items() if not row}
        assert {tuple(row) for row in rows(block)} == expected | finals


def test_every_state_can_end():
    for table in (state.SESSION, state.STRIPE, state.OUTGOING, state.INCOMING):
        final = next(s for s, row in table.items() if not row)
        reached = {final}
        for _ in table:
            reached |= {s for s, row in table.items() if reached & set(row.values())}
        assert reached == set(table)
