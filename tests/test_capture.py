"""Captures: the format, the writer, and sessions that record themselves."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_session import assert_same, make_cache

from lynxproto import connect, listen
from lynxproto.capture import CaptureWriter, Direction, FileHeader, RecordHeader
from lynxproto.errors import CaptureError
from lynxproto.inspect.model import Fault, Segment, StripeEnd
from lynxproto.inspect.sources import open_source

SPEC = Path(__file__).parent.parent / "spec" / "capture.md"
U32 = st.integers(0, (1 << 32) - 1)


@given(U32, st.integers(0, 255), st.integers(0, 1), st.integers(0, (1 << 64) - 1), U32)
def test_record_headers_round_trip(length, kind, direction, time, stripe):
    header = RecordHeader(length, kind, direction, time, stripe)
    assert RecordHeader.unpack(header.pack()) == header


@given(st.integers(0, 23), st.integers(1, 255))
def test_any_damage_of_a_record_header_is_found(at, change):
    data = bytearray(RecordHeader(5, 0, 1, 7, 9).pack())
    data[at] ^= change
    with pytest.raises(CaptureError):
        RecordHeader.unpack(data)


@given(st.integers(0, 31), st.integers(1, 255))
def test_any_damage_of_a_file_header_is_found(at, change):
    data = bytearray(FileHeader(1 << 60).pack())
    data[at] ^= change
    with pytest.raises(CaptureError):
        FileHeader.unpack(data)


def test_the_example_of_the_specification(tmp_path):
    rows = re.findall(r"^((?:[0-9a-f]{2} ?)+)", SPEC.read_text().split("## Example")[1].split("```")[1], re.MULTILINE)
    clock = iter([0, 0, 10**6, 2 * 10**6])
    path = tmp_path / "example.lynx"
    with CaptureWriter(path, clock=lambda: next(clock), start=1_700_000_000 * 10**9) as writer:
        stripe = writer.opened()
        writer.data(stripe, Direction.TO_SERVER, [b"abc"])
        writer.closed(stripe)
    assert path.read_bytes() == bytes.fromhex("".join(rows))


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "a.lynx"
    times = iter(range(0, 10**9, 10**6))
    large = bytes(range(256)) * 20_000
    with CaptureWriter(path, clock=lambda: next(times)) as writer:
        first, second = writer.opened("a"), writer.opened("b")
        writer.data(first, Direction.TO_SERVER, [b"one", memoryview(b"two")])
        writer.data(second, Direction.TO_CLIENT, [large])
        writer.closed(first)
    found: dict[tuple[int, Direction], bytes] = {}
    ends = []
    for item in open_source(str(path)):
        if isinstance(item, Segment):
            key = (item.stripe, item.direction)
            assert path.read_bytes()[item.offset : item.offset + len(item.data)] == item.data
            found[key] = found.get(key, b"") + item.data
        else:
            ends.append(item)
    assert found == {(0, Direction.TO_SERVER): b"onetwo", (1, Direction.TO_CLIENT): large}
    assert ends == [StripeEnd(5 * 10**6, 0)]


def test_a_long_batch_becomes_several_records(tmp_path):
    path = tmp_path / "a.lynx"
    piece = memoryview(bytes(3 << 20))
    with CaptureWriter(path) as writer:
        writer.data(writer.opened(), Direction.TO_SERVER, [piece] * 6 + [memoryview(b"")])
    lengths, at, data = [], 32, path.read_bytes()
    while at < len(data):
        record = RecordHeader.unpack(data[at : at + 24])
        lengths.append(record.length)
        at += 24 + record.length
    assert lengths == [0, 16 << 20, 2 << 20]


@pytest.mark.parametrize("cut", [33, 50, 56, 57, 60, 83, 90])
def test_a_capture_that_was_cut_is_read_up_to_the_cut(tmp_path, cut):
    path = tmp_path / "a.lynx"
    with CaptureWriter(path) as writer:
        stripe = writer.opened()
        writer.data(stripe, Direction.TO_SERVER, [b"abc"])
        writer.closed(stripe)
    path.write_bytes(path.read_bytes()[:cut])
    items = list(open_source(str(path)))
    data = b"".join(bytes(item.data) for item in items if isinstance(item, Segment))
    assert data == b"abc"[: max(0, cut - 80)]
    faults = [item for item in items if isinstance(item, Fault)]
    whole = cut in (56, 83)
    assert len(faults) == (not whole)
    if faults:
        assert faults[0].offset == max(start for start in (32, 56, 83) if start < cut)
        assert "the capture ends inside a record" in faults[0].reason


def test_a_broken_record_ends_the_reading(tmp_path):
    path = tmp_path / "a.lynx"
    with CaptureWriter(path) as writer:
        stripe = writer.opened()
        writer.data(stripe, Direction.TO_SERVER, [b"abc"])
        writer.data(stripe, Direction.TO_SERVER, [b"def"])
    data = bytearray(path.read_bytes())
    data[90] ^= 1  # in the header of the third record
    path.write_bytes(data)
    items = list(open_source(str(path)))
    assert [bytes(i.data) for i in items if isinstance(i, Segment)] == [b"abc"]
    assert items[-1] == Fault(
        items[0].time, "the CRC32C of a record header is wrong; the capture cannot be read from here on", offset=83
    )


def test_records_of_unknown_kinds_are_skipped(tmp_path):
    path = tmp_path / "a.lynx"
    with CaptureWriter(path) as writer:
        writer.opened()
    with path.open("ab") as file:
        file.write(RecordHeader(4, 77, 0, 1, 0).pack() + b"????" + RecordHeader(1, 0, 1, 2, 0).pack() + b"x")
    assert [bytes(i.data) for i in open_source(str(path))] == [b"x"]


def test_a_capture_that_cannot_be_made_or_written_is_named(tmp_path, caplog):
    with pytest.raises(CaptureError, match=r"cannot write the capture .*: No such file"):
        CaptureWriter(tmp_path / "no" / "a.lynx")
    writer = CaptureWriter("/dev/full")
    stripe = writer.opened()
    writer.data(stripe, Direction.TO_SERVER, [b"abc"])  # the session goes on
    with pytest.raises(CaptureError, match="the capture /dev/full is incomplete: No space left"):
        writer.close()
    assert caplog.text.count("No space left") == 1


def streams(path: Path) -> dict[Direction, bytes]:
    found = dict.fromkeys(Direction, b"")
    for item in open_source(str(path)):
        if isinstance(item, Segment):
            found[item.direction] += item.data
    return found


def test_both_ends_of_a_session_record_the_same_bytes(tmp_path):
    cache = make_cache()

    async def main():
        with CaptureWriter(tmp_path / "s.lynx") as sending, CaptureWriter(tmp_path / "r.lynx") as receiving:
            async with (
                listen("tcp://127.0.0.1:0", insecure=True, capture=receiving) as receiver,
                connect(receiver.url, insecure=True, capture=sending) as sender,
            ):
                transfer = sender.open(cache.manifest)
                done = asyncio.ensure_future(transfer.send(cache))
                async for incoming in receiver:
                    await incoming.exact()
                    break
                await done
                assert_same(incoming.arrays, cache)

    asyncio.run(main())
    sent, received = streams(tmp_path / "s.lynx"), streams(tmp_path / "r.lynx")
    assert received[Direction.TO_SERVER] == sent[Direction.TO_SERVER][: len(received[Direction.TO_SERVER])]
    assert sent[Direction.TO_CLIENT] == received[Direction.TO_CLIENT][: len(sent[Direction.TO_CLIENT])]
    assert len(sent[Direction.TO_SERVER]) > 300_000
