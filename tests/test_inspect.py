"""The inspector: frames out of bytes however they are split, damaged or cut; table, JSON, filters, exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import make_cache, receiving
from test_frames import BODIES

from lynxproto import frames
from lynxproto.capture import CaptureWriter, Direction
from lynxproto.chunk import Tile, TokenSet
from lynxproto.cli import main
from lynxproto.codecs import get_codec
from lynxproto.digest import crc32c
from lynxproto.frames import FrameType, Header, TileKey, control_frame, data_frame
from lynxproto.inspect import Fault, Frame, Gap, Inspector, Segment, StripeEnd, jsonl, table
from lynxproto.inspect.annotate import annotate
from lynxproto.inspect.context import CODEC_NAMES
from lynxproto.inspect.html import page
from lynxproto.inspect.model import printable
from lynxproto.inspect.summary import Summary
from lynxproto.manifest import Identity, Manifest

MANIFEST = Manifest.for_cache(
    identity=Identity(model="test/model"), dtype="bfloat16", layers=2, kv_heads=2, head_dim=8, tokens=64,
    codecs=({"id": "hq"}, {"id": "raw"}),
)  # fmt: skip


def tile(layer: int = 0, part: str = "key", start: int = 0, stop: int = 16, codec: int = 0) -> Tile:
    return Tile(layer, part, 0, 2, TokenSet.range(start, stop), codec)


def data(where: Tile, level: int = 0, payload: bytes = b"payload", transfer: int = 7 << 96, attempt: int = 0) -> bytes:
    parts = data_frame(transfer, TileKey.of(where), level, memoryview(payload), attempt=attempt, codec_id=3)
    return b"".join(parts)


def opened(transfer: int = 7 << 96) -> bytes:
    return control_frame(frames.Open(manifest=MANIFEST.to_bytes()), transfer)


def segment(data: bytes, time: int = 0, direction: Direction = Direction.TO_SERVER, offset: int | None = 0) -> Segment:
    return Segment(time, 0, direction, data, offset)


def look(stream: bytes, cuts: list[int] | None = None, **options) -> list[Frame | Fault]:
    """Inspect one direction of one stripe, fed in pieces."""
    inspector = Inspector(**options)
    edges = sorted({0, len(stream), *(c % (len(stream) + 1) for c in cuts or [])})
    found = []
    for time, (start, stop) in enumerate(pairwise(edges)):
        found += inspector.feed(segment(stream[start:stop], time, offset=1000 + start))
    return found + list(inspector.feed(StripeEnd(len(edges), 0)))


EXPLICIT = st.builds(
    lambda positions, level: data(Tile(1, "value", 0, 2, TokenSet.of(positions), 1), level),
    st.sets(st.integers(0, 63), min_size=1), st.integers(0, 7),
)  # fmt: skip
SEEDS = st.integers(0, 1 << 32).map(Random)
CONTROL = st.builds(lambda body, seed: control_frame(body, 9, seed), BODIES, SEEDS)
GREASE = SEEDS.map(frames.grease_frame)
RANGES = st.builds(lambda n, payload: data(tile(n % 2), n % 8, payload), st.integers(0, 15), st.binary(min_size=1))
FRAMES = st.one_of(CONTROL, EXPLICIT, GREASE, RANGES)
CUTS = st.lists(st.integers(0, 1 << 16), max_size=8)


@given(st.lists(FRAMES, max_size=6), CUTS)
def test_frames_come_out_whole_however_the_bytes_are_split(stream, cuts):
    found = look(b"".join(stream), cuts, keep=1 << 20)
    at = 0
    assert len(found) == len(stream)
    for number, (frame, raw) in enumerate(zip(found, stream, strict=True)):
        assert frame.raw_header + frame.extension + frame.payload == raw
        assert (frame.number, frame.checksum) == (number, "ok")
        assert frame.stream_offset == at
        assert frame.offset == 1000 + at
        assert frame.header == Header.unpack(raw[:64])
        at += len(raw)
        if frame.header.type == FrameType.OPEN:  # hypothesis gives it bytes that are no manifest
            assert "manifest" in frame.problem
        else:
            assert not frame.problem
            assert (frame.body is not None) == (frame.header.known and not frame.is_data)


@given(st.lists(FRAMES, min_size=1, max_size=4), CUTS, st.data())
def test_damage_is_told_and_what_follows_is_found_again(stream, cuts, draw):
    raw = bytearray(b"".join(stream))
    at = draw.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= draw.draw(st.integers(1, 255))
    edges = [0]
    for frame in stream:
        edges.append(edges[-1] + len(frame))
    hit = max(i for i, edge in enumerate(edges) if edge <= at)
    found = look(bytes(raw), cuts)
    whole = [one for one in found if isinstance(one, Frame)]
    assert [f.stream_offset for f in whole[:hit]] == edges[:hit]
    assert all(f.checksum == "ok" for f in whole[:hit])
    if at - edges[hit] < 64:  # framing is lost, and found again at the next frame
        fault = next(one for one in found if isinstance(one, Fault))
        assert (fault.stream_offset, fault.offset) == (edges[hit], 1000 + edges[hit])
        assert [f.stream_offset for f in whole[hit:]] == edges[hit + 1 : -1]
    else:
        assert [f.stream_offset for f in whole] == edges[:-1]
        assert whole[hit].checksum == "bad"
        assert "CRC32C" in whole[hit].problem
    assert all(f.checksum == "ok" for f in whole[hit + 1 :])


@given(st.lists(FRAMES, min_size=1, max_size=3), CUTS, st.data())
def test_a_stream_that_is_cut_is_shown_up_to_the_cut(stream, cuts, draw):
    raw = b"".join(stream)
    cut = draw.draw(st.integers(0, len(raw) - 1))
    found = look(raw[:cut], cuts)
    rest, whole = cut, 0
    while rest >= len(stream[whole]):
        rest -= len(stream[whole])
        whole += 1
    assert [f.checksum for f in found[:whole]] == ["ok"] * whole
    tail = found[whole:]
    if not rest:
        assert not tail
    elif rest < 64:
        assert f"inside a frame header: {rest} of its 64 bytes" in tail[0].reason
    else:
        assert tail[0].checksum == "cut"
        assert f"{rest} of its {len(stream[whole])} bytes" in tail[0].problem


@settings(max_examples=200)
@given(st.lists(st.one_of(st.binary(), st.just(frames.MAGIC), FRAMES), max_size=5), CUTS, st.booleans())
def test_no_bytes_make_it_fail(pieces, cuts, lenient):
    summary = Summary()
    for one in look(b"".join(pieces), cuts, lenient=lenient, keep=64):
        summary.add(one)
        if isinstance(one, Frame):
            table.frame_lines(one, colour=True)
            jsonl.dumps(jsonl.frame_object(one))
            annotate(one)
        else:
            table.fault_line(one, colour=True)
            jsonl.dumps(jsonl.fault_object(one))
    jsonl.dumps(summary.as_object())
    page(summary, "test")


def test_many_streams_with_half_a_frame_each_are_bounded():
    """Each holds a frame back; together they may hold so much."""
    inspector = Inspector()
    payload = bytes(16 << 20)
    frame = Header(FrameType.ACK, 1, len(payload), crc32c(payload)).pack() + payload
    for stripe in range(12):
        assert list(inspector.feed(segment(frame[:-1])._replace(stripe=stripe))) == []
    found = [one for stripe in range(12) for one in inspector.feed(segment(frame[-1:])._replace(stripe=stripe))]
    assert [one.problem.startswith("not decoded: too many") for one in found] == [False] * 8 + [True] * 4
    assert max(len(one.payload) for one in found[8:]) == 0
    again = [one for part in (frame[:-1], frame[-1:]) for one in inspector.feed(segment(part)._replace(stripe=3))]
    assert not again[0].problem.startswith("not decoded")


def test_a_lenient_reader_finds_its_place_and_ignores_other_streams():
    stream = data(tile()) * 3
    found = look(stream[30:], lenient=True)
    assert [type(one) for one in found] == [Fault, Frame, Frame]
    assert f"{len(stream) // 3 - 30} bytes before" in found[0].reason
    assert look(b"GET / HTTP/1.1\r\n" * 100, lenient=True) == []


def test_lost_bytes_cut_a_frame_and_are_told():
    inspector = Inspector()
    frame = data(tile(), payload=bytes(1000))
    found = list(inspector.feed(segment(frame[:500])))
    found += inspector.feed(Gap(1, 0, Direction.TO_SERVER, 564))
    found += inspector.feed(segment(frame, 2))
    assert [getattr(one, "checksum", "fault") for one in found] == ["cut", "fault", "ok"]
    assert found[2].stream_offset == len(frame)


def test_a_huge_control_frame_is_neither_believed_nor_kept():
    payload = bytes(40 << 20)
    header = Header(FrameType.ACK, 1, len(payload), crc32c(payload)).pack()
    inspector = Inspector()
    list(inspector.feed(segment(header)))
    for at in range(0, len(payload), 1 << 20):
        found = list(inspector.feed(segment(payload[at : at + (1 << 20)])))
    assert "payload of 41943040 bytes, limit" in found[0].problem
    assert found[0].body is None
    assert len(found[0].payload) <= 16 << 20


def test_manifests_tell_codec_and_ratio():
    found = look(opened() + data(tile(), payload=bytes(128)) + data(tile(codec=1), payload=bytes(512)) + data(tile(5)))
    assert found[0].note == "test/model, 2 layers, 64 tokens, bfloat16, 8192 B"
    assert (found[1].codec, found[1].tokens, found[1].uncompressed, found[1].ratio) == ("hq", 16, 512, 0.25)
    assert (found[2].codec, found[2].ratio) == ("raw", 1.0)
    assert found[3].problem == "the manifest has no layer 5, part 0"


def test_codec_names_are_those_of_the_codecs():
    assert {get_codec(name).wire_id: name for name in ("raw", "bitplane", "hq")} == CODEC_NAMES


def test_text_from_the_wire_cannot_control_a_terminal():
    evil = "\x1b[2Jnice\r\n\x07\u202e"
    frame = look(control_frame(frames.GoAway(code=frames.ErrorCode.INTERNAL, text=evil)))[0]
    assert frame.note == r"INTERNAL \x1b[2Jnice\r\n\x07\u202e"
    assert len(printable("x" * 500, 80)) == 80


# --- the command


@pytest.fixture
def capture(tmp_path) -> Path:
    path = tmp_path / "a.lynx"
    times = iter(range(0, 10**12, 10**6))
    with CaptureWriter(path, clock=lambda: next(times)) as writer:
        stripe = writer.opened("peer")
        writer.data(stripe, Direction.TO_SERVER, [opened(), control_frame(frames.Ping(id=3, probe=True))])
        writer.data(stripe, Direction.TO_CLIENT, [control_frame(frames.Pong(id=3))])
        for level in range(2):
            for layer in range(2):
                writer.data(stripe, Direction.TO_SERVER, [data(tile(layer), level, bytes(128 << level))])
        writer.data(stripe, Direction.TO_SERVER, [frames.grease_frame(Random(1))])
        writer.closed(stripe)
    return path


def run(*arguments: object, stdin: bytes | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def numbers(output: str) -> list[int]:
    return [int(line.split()[0]) for line in output.splitlines()[1:] if not line.lstrip().startswith("!")]


def test_the_table(capture):
    code, output = run(capture)
    assert code == 0
    assert "\x1b" not in output
    lines = output.splitlines()
    assert lines[0].split() == [
        "#", "time", "str", "dir", "type", "transfer", "layer", "part", "level", "heads", "tokens", "codec", "size",
        "ratio", "sum", "what", "it", "says",
    ]  # fmt: skip
    assert lines[1].split()[:6] == ["0", "0.002000", "0", "->", "OPEN", "00000007"]
    assert lines[3].split() == ["2", "0.003000", "0", "<-", "PONG", "5", "ok", "id", "3"]
    assert lines[4].split() == [
        "3", "0.004000", "0", "->", "DATA", "00000007", "0", "key", "0", "0-1", "0-15", "hq", "128", "0.250", "ok",
    ]  # fmt: skip
    assert "reserved type, to be skipped" in lines[8]
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--type", "data"], [3, 4, 5, 6]),
        (["--type", "PING", "--type", "pong"], [1, 2]),
        (["--type", "9", "--level", "1"], [5, 6]),
        (["--layer", "1"], [4, 6]),
        (["--layer", "0-1", "--level", "0"], [3, 4]),
        (["--transfer", "00000007"], [0, 3, 4, 5, 6]),
        (["--transfer", "f"], []),
        (["--layer", "7"], []),
    ],
)
def test_filters(capture, options, shown):
    if shown == [0, 3, 4, 5, 6]:  # the grease frame's transfer id is random
        options = [*options, "--type", "open", "--type", "data"]
    assert numbers(run(capture, *options)[1]) == shown


def test_json_lines(capture):
    code, output = run(capture, "--json")
    assert code == 0
    found = [json.loads(line) for line in output.splitlines()]
    assert [one["frame"] for one in found] == list(range(8))
    assert found[0]["body"]["manifest"]["identity"] == {"model": "test/model"}
    assert found[1]["body"] == {"id": 3, "probe": True}
    assert found[2]["direction"] == "to-client"
    offset, stream_offset = found[4].pop("offset"), found[4].pop("stream_offset")
    assert stream_offset == found[3]["stream_offset"] + 64 + 128
    assert found[4] == {
        "frame": 4, "time": 0.005, "start": 0.005, "stripe": 0, "direction": "to-server", "type": "DATA",
        "transfer": f"{7 << 96:032x}", "flags": 0,
        "header_size": 64, "size": 128, "checksum": "ok", "layer": 1, "part": "key", "level": 0, "attempt": 0,
        "heads": [0, 2], "tokens": [0, 16], "token_count": 16, "codec": "hq", "codec_id": 3, "uncompressed": 512,
        "ratio": 0.25,
    }  # fmt: skip
    assert capture.read_bytes()[offset:].startswith(data(tile(1), 0, bytes(128)))


def test_standard_input_is_read_as_it_comes(capture):
    """A FIFO that stays open: what has come is shown."""
    command = [sys.executable, "-m", "lynxproto", "inspect", "--type", "pong"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(capture.read_bytes()[:-10])
        process.stdin.flush()
        assert process.stdout.readline().split()[0] == b"#"
        assert process.stdout.readline().split()[4] == b"PONG"
        process.stdin.close()
        assert b"the capture ends inside a record header" in process.stdout.read()
        assert process.wait() == 3


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_and_progress_are_for_terminals(capture, environment, coloured):
    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "lynxproto", "inspect", str(capture)]
    env = {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm", **environment}
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, env=env, timeout=60, check=True)
    os.set_blocking(main_end, False)
    shown = os.read(main_end, 1 << 16)
    assert (b"\x1b[32m" in shown) == coloured
    assert done.stderr == b""
    done = subprocess.run(
        [*command, "--summary"], stdout=subprocess.PIPE, stderr=terminal, env=env, timeout=60, check=True
    )
    assert b"reading" in os.read(main_end, 1 << 16)
    assert b"\x1b" not in done.stdout
    os.close(terminal)
    os.close(main_end)


def test_raw_frames_are_read_too(tmp_path):
    path = tmp_path / "frames.bin"
    path.write_bytes(opened() + data(tile()))
    assert numbers(run(path)[1]) == [0, 1]


def test_a_broken_capture_is_shown_up_to_the_fault(capture, tmp_path):
    raw = bytearray(capture.read_bytes())
    record = raw.find(data(tile(1), 0, bytes(128))) - 24
    raw[record] ^= 1
    broken = tmp_path / "broken.lynx"
    broken.write_bytes(raw)
    code, output = run(broken)
    assert code == 3
    assert numbers(output) == [0, 1, 2, 3]
    assert output.splitlines()[-1] == (
        f"        ! offset {record}: the CRC32C of a record header is wrong; the capture cannot be read from here on"
    )
    code, output = run(broken, "--json")
    assert code == 3
    last = json.loads(output.splitlines()[-1])
    assert last["offset"] == record
    assert "CRC32C" in last["fault"]


def test_a_damaged_payload_is_shown_and_told(capture, tmp_path):
    raw = bytearray(capture.read_bytes())
    frame = raw.find(data(tile(1), 0, bytes(128)))
    raw[frame + 70] ^= 1
    broken = tmp_path / "broken.lynx"
    broken.write_bytes(raw)
    code, output = run(broken)
    assert code == 3
    assert numbers(output) == list(range(8))
    row, problem = output.splitlines()[5:7]
    assert row.split()[-1] == "BAD"
    assert f"! frame 4 at offset {frame}: CRC32C of the payload is" in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file.lynx"], "cannot read no-such-file.lynx: No such file or directory"),
        (["/"], "cannot read /: Is a directory"),
        (["/dev/null"], "/dev/null is empty"),
        ([__file__], "is neither a capture (.lynx) nor a pcap nor frames: it begins with"),
        (["{capture}", "--type", "dta"], "'dta' is not a frame type: give a number or one of HELLO,"),
        (["{capture}", "--layer", "3-1"], "'3-1' is not a layer"),
        (["{capture}", "--transfer", "xyz"], "'xyz' is not the beginning of a transfer id"),
        (["{capture}", "--frame", "99"], "has no frame 99: it has 8 frames, from 0"),
        (["{capture}", "--frame", "1", "--summary"], "--frame shows one frame"),
        (["{capture}", "--type", "data", "--summary"], "--summary and --html take all"),
        (["--listen", "tcp://127.0.0.1:0"], "a tap needs both"),
        (["{capture}", "--listen", "tcp://127.0.0.1:0", "--connect", "tcp://127.0.0.1:1"], "a tap reads no file"),
        (["{capture}", "--save", "x.lynx"], "--save records a tap"),
        (["--listen", "tcps://127.0.0.1:0", "--connect", "tcp://127.0.0.1:1"], "a tap sees only plaintext"),
        (["{capture}", "--html", "/no/such/folder/x.html"], "cannot write /no/such/folder/x.html: No such file"),
    ],
)
def test_mistakes_are_one_line(capture, arguments, message):
    code, output = run(*(argument.format(capture=capture) for argument in arguments))
    assert code == 1
    assert message in output
    assert len(output.splitlines()) == 1


def test_send_and_recv_record_themselves(tmp_path):
    cache = tmp_path / "cache.safetensors"
    make_cache(cache)
    recorded = [tmp_path / "recv.lynx", tmp_path / "send.lynx"]
    with receiving("-o", str(tmp_path / "out"), "--capture", str(recorded[0])) as (process, url):
        command = [sys.executable, "-m", "lynxproto", "send", str(cache), url, "--insecure", "-q"]
        command += ["--capture", str(recorded[1])]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert process.wait(60) == 0
    for path in recorded:
        code, output = run(path, "--json")
        found = [json.loads(line) for line in output.splitlines()]
        assert code == 0
        assert {"HELLO", "OPEN", "ACCEPT", "PLAN", "DATA", "END", "ACK", "RESULT"} <= {one["type"] for one in found}
        sent = [one for one in found if one["type"] == "DATA"]
        assert {one["direction"] for one in sent} == {"to-server"}
        assert all(one["checksum"] == "ok" and one["uncompressed"] for one in sent)
        assert path.stat().st_mode & 0o077 == 0  # it holds what may be private
