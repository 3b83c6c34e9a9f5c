"""One frame field by field: every byte once, and what the fields say is what was packed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import cbor2
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_frames import BODIES
from test_inspect import EXPLICIT, FRAMES, MANIFEST, data, look, opened, tile

from lynxproto import frames
from lynxproto.cli import main
from lynxproto.digest import crc32c
from lynxproto.frames import FrameType, Header, control_frame
from lynxproto.inspect.annotate import Field, annotate, render

SPEC = Path(__file__).parent.parent / "spec"
U8, U16, U32 = st.integers(0, 0xFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
HEADERS = st.builds(
    Header, type=U16, transfer=st.integers(0, (1 << 128) - 1), payload_length=U32, payload_crc=U32, flags=U16,
    layer=U16, part=U8, level=U8, attempt=U8, head_start=U16, heads=U16, token_start=U32, token_stop=U32, codec_id=U16,
    codec=U16, extension_length=U32,
)  # fmt: skip


def fields_of(raw: bytes) -> list[Field]:
    (frame,) = look(raw, keep=1 << 20)
    return annotate(frame)


def rebuilt(fields: list[Field]) -> dict[str, Any]:
    """The CBOR map that the fields describe, from their names and values alone."""
    top: dict[str, Any] = {}
    for field in fields:
        steps = re.findall(r"[^.\[\]]+", field.name)
        if field.value is None and re.match(r"(map|array) of", field.text):
            value: Any = {} if field.text.startswith("map") else []
        else:
            value = field.value
        if field.name == "body":
            continue
        place: Any = top
        for step in steps[:-1]:
            place = place[int(step)] if isinstance(place, list) else place[step]
        if isinstance(place, list):
            assert int(steps[-1]) == len(place)
            place.append(value)
        else:
            place[steps[-1]] = value
    return top


@given(st.one_of(FRAMES, EXPLICIT))
def test_every_byte_belongs_to_one_field(raw):
    fields = fields_of(raw)
    assert b"".join(field.raw for field in fields) == raw
    at = 0
    for field in fields:
        assert field.offset == at
        at += len(field.raw)
    assert all(line.isprintable() for line in render(fields, colour=False))


@given(HEADERS)
def test_header_fields_are_those_that_are_packed(header):
    frame = look(opened())[0]
    frame.header, frame.raw_header, frame.payload, frame.extension = header, header.pack(), b"", b""
    found = {field.name: field.value for field in annotate(frame) if field.offset < 64}
    for item in Header._fields:
        expected = getattr(header, item)
        assert found[item] == (f"{expected:032x}" if item == "transfer" else expected), item
    others = {"magic": frames.MAGIC, "version": frames.VERSION, "header_length": 8, "reserved": 0}
    assert {name: found[name] for name in others} == others
    assert found["header_crc"] == crc32c(header.pack()[:60])
    assert len(found) == len(Header._fields) + len(others) + 1


@given(BODIES.filter(lambda body: body.TYPE != FrameType.OPEN), st.integers(0, 1 << 32).map(Random))
def test_control_fields_are_those_that_are_packed(body, grease):
    raw = control_frame(body, 3, grease)
    packed = cbor2.loads(raw[64:])
    fields = [field for field in fields_of(raw) if field.offset >= 64]
    assert rebuilt(fields) == packed or _flat(fields, packed)


def _flat(fields: list[Field], packed: dict[str, Any]) -> bool:
    """NaN is no NaN: compare as text."""
    return repr(rebuilt(fields)) == repr(packed)


def test_every_type_of_frame_is_covered():
    kinds = {body.TYPE for body in frames._BODIES.values()} | {FrameType.DATA}
    assert kinds == set(FrameType)


def test_a_manifest_is_taken_apart():
    fields = {field.name: field for field in fields_of(opened())}
    assert fields["manifest.identity.model"].value == "test/model"
    assert fields["manifest.layers[1].tokens"].value == [0, 64]
    assert fields["manifest.layers[1].tokens"].section == "wire-format.md, Manifest"
    assert fields["manifest.prompt_tokens"].raw == cbor2.dumps("prompt_tokens") + cbor2.dumps(64)
    assert len(opened()) - 64 > len(MANIFEST.to_bytes())


def test_damaged_cbor_is_shown_as_far_as_it_goes():
    payload = cbor2.dumps({"id": 3, "probe": True})[:-1]
    header = Header(FrameType.PING, 0, len(payload), crc32c(payload))
    fields = fields_of(header.pack() + payload)
    assert [field.name for field in fields if field.offset >= 64] == ["body", "id", "rest"]
    assert fields[-1].raw == payload[5:]
    assert fields[-1].text.startswith("cannot be decoded: 1 bytes are needed at offset 75, 0 are there")


@given(st.binary(max_size=60))
def test_any_payload_can_be_annotated(payload):
    raw = Header(FrameType.ACK, 0, len(payload), crc32c(payload)).pack() + payload
    assert b"".join(field.raw for field in fields_of(raw)) == raw


@given(FRAMES)
def test_sections_exist_in_the_specification(raw):
    for field in fields_of(raw):
        name, _, heading = field.section.partition(", ")
        text = (SPEC / name).read_text()
        if heading:
            assert re.search(rf"^(#+ {re.escape(heading)}$|{heading}\. )", text, re.MULTILINE), field.section


def test_the_command(tmp_path):
    path = tmp_path / "frames.bin"
    path.write_bytes(opened() + data(tile(), 1, bytes(range(200))))
    lines = CliRunner().invoke(main, ["inspect", str(path), "--frame", "1", "--bytes", "16"]).output.splitlines()
    assert "000006  09 00                    type              9 (DATA)" in lines
    assert "00000b  01                       level             1" in lines
    assert "000026  02 00                    heads             2 (heads 0 to 1)" in lines
    assert "-- codec-hq.md" in lines
    assert lines[-2:] == [
        "000040  00 01 02 03 04 05 06 07  payload           level 1 of codec hq, 200 bytes, the first 16 shown",
        "000048  08 09 0a 0b 0c 0d 0e 0f",
    ]
    found = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--frame", "1", "--json"]).output)
    assert found["type"] == "DATA"
    by_name = {field["name"]: field for field in found["fields"]}
    assert by_name["token_stop"] == {
        "offset": 44, "bytes": "10000000", "name": "token_stop", "value": 16, "text": "16 (16 tokens)",
        "section": "wire-format.md, Frame header",
    }  # fmt: skip
    assert by_name["payload"]["bytes"] == bytes(range(200)).hex()
