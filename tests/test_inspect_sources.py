"""Frames from pcaps, with packets lost, repeated and in disorder; from a live tap; and in Wireshark."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pcapfile import Tcp, write_pcap, write_pcapng
from test_cli import make_cache, receiving
from test_inspect import data, opened, run, tile
from test_session import make_cache as arrays
from tools import need

from lynxproto import connect, frames, listen
from lynxproto.capture import CaptureWriter, Direction
from lynxproto.chunk import PARTS
from lynxproto.cli import main
from lynxproto.errors import CaptureError, TransportError
from lynxproto.frames import FrameType, control_frame
from lynxproto.inspect import Fault, Frame, Gap, Inspector, Segment, StripeEnd
from lynxproto.inspect.model import Item
from lynxproto.inspect.sources import open_source
from lynxproto.inspect.tap import Tap

LUA = Path(__file__).parent.parent / "spec" / "wireshark" / "lynx.lua"
WRITERS = [write_pcap, write_pcapng]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A session as it was recorded at its sender, with grease, on two stripes."""
    path = tmp_path_factory.mktemp("recorded") / "session.lynx"
    cache = arrays(layers=2, tokens=200)

    async def main() -> None:
        with CaptureWriter(path) as writer:
            async with (
                listen("tcp://127.0.0.1:0", insecure=True) as receiver,
                connect(receiver.url, insecure=True, capture=writer) as sender,
            ):
                transfer = sender.open(cache.manifest)
                sent = asyncio.ensure_future(transfer.send(cache))
                async for incoming in receiver:
                    await incoming.exact()
                    break
                await sent

    asyncio.run(main())
    return path


def packets_of(path: Path, **options: int) -> list[tuple[int, bytes]]:
    tcp, time = Tcp(**options), 0
    with closing(open_source(str(path))) as source:
        for item in source:
            time = item.time
            if isinstance(item, Segment):
                tcp.send(item.time, item.direction, bytes(item.data))
    tcp.close(time)
    return tcp.packets


def table(path: Path) -> tuple[int, list[dict]]:
    """Exit code and frames, without what depends on the file's format."""
    code, output = run(path, "--json")
    found = [json.loads(line) for line in output.splitlines()]
    for one in found:
        for name in ("time", "start", "offset"):
            one.pop(name, None)
    return code, found


def keyed(found: list[dict]) -> list[tuple]:
    """In an order that does not depend on how two directions interleave."""
    return sorted((one["direction"], one["stream_offset"], one["type"], one["size"], one["checksum"]) for one in found)


@pytest.mark.parametrize("write", WRITERS)
def test_a_pcap_shows_what_the_capture_shows(recorded, tmp_path, write):
    path = tmp_path / "a.pcap"
    write(path, packets_of(recorded))
    assert table(path) == table(recorded)
    assert table(path)[0] == 0


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("seed", range(3))
def test_packets_in_disorder_and_twice_change_nothing(recorded, tmp_path, write, seed):
    random = Random(seed)
    packets = packets_of(recorded, mss=random.choice([100, 536, 9000]))
    body = [(n + random.random() * 12, packet) for n, packet in enumerate(packets[2:-2])]
    body += random.sample(body, len(body) // 10)
    mixed = [packet for _, packet in sorted(body, key=lambda item: item[0])]
    path = tmp_path / "a.pcap"
    write(path, [*packets[:2], *mixed, *packets[-2:]])
    code, found = table(path)
    assert code == 0
    assert keyed(found) == keyed(table(recorded)[1])


def test_a_lost_packet_is_told_and_the_rest_is_shown(recorded, tmp_path):
    packets = packets_of(recorded, mss=1000)
    full = [len(packet) == 1054 for _, packet in packets]
    lost = next(n for n in range(len(packets) // 2, len(packets)) if all(full[n - 3 : n + 4]))  # inside a DATA frame
    path = tmp_path / "a.pcap"
    write_pcap(path, packets[:lost] + packets[lost + 1 :])
    code, found = table(path)
    assert code == 3
    assert next(one["fault"] for one in found if "fault" in one) == "1000 bytes of the stream are missing"
    shown = [one for one in found if "frame" in one]
    whole = table(recorded)[1]
    assert [one["checksum"] for one in shown].count("cut") == 1
    assert len(whole) - 4 <= len(shown) <= len(whole)


def test_a_pcap_that_begins_late_and_other_connections(recorded, tmp_path):
    packets = packets_of(recorded, mss=1000)
    other = Tcp(first=5)
    other.packets.clear()
    other.send(0, Direction.TO_CLIENT, b"HTTP/1.1 200 OK\r\n" * 200)
    moved = [(time, p[:34] + struct.pack(">H", 80) + p[36:]) for time, p in other.packets]
    noise = [(packets[0][0], b"\x02" * 12 + b"\x08\x06" + bytes(28)), (packets[0][0], b"short")]
    inside = [n for n in range(20, len(packets)) if not packets[n][1][54:].startswith(frames.MAGIC)]
    begin = inside[0]
    path = tmp_path / "a.pcap"
    write_pcap(path, [*noise, *moved, *packets[begin:]])
    code, found = table(path)
    assert code == 3
    shown = [one for one in found if "frame" in one]
    assert len(shown) > len(table(recorded)[1]) - begin
    assert "bytes before the next intact frame header" in next(one["fault"] for one in found if "fault" in one)
    assert {one["stripe"] for one in shown} == {1}


@pytest.mark.parametrize("write", WRITERS)
def test_a_pcap_that_is_cut_is_shown_up_to_the_cut(recorded, tmp_path, write):
    path = tmp_path / "a.pcap"
    write(path, packets_of(recorded))
    raw = path.read_bytes()
    for cut in (len(raw) // 2, len(raw) - 3, len(raw) - 60):
        path.write_bytes(raw[:cut])
        code, output = run(path)
        assert code == 3
        assert re.search(r"! offset \d+: the pcap(ng is broken: it)? ends inside", output)
    path.write_bytes(raw[:10])
    assert run(path)[0] in (1, 3)


def look(path: Path) -> list[Frame | Fault]:
    with closing(open_source(str(path))) as source:
        inspector = Inspector(lenient=source.lenient)
        return [one for item in source for one in inspector.feed(item)] + list(inspector.end())


@pytest.mark.parametrize("write", WRITERS)
@given(st.data())
def test_damaged_pcaps_never_make_it_fail(tmp_path_factory, write, draw):
    tcp = Tcp(mss=60)
    tcp.send(1, Direction.TO_SERVER, opened() + data(tile()))
    path = tmp_path_factory.mktemp("damaged") / "a.pcap"
    write(path, tcp.packets)
    raw = bytearray(path.read_bytes())
    for at, change in draw.draw(st.lists(st.tuples(st.integers(4, len(raw) - 1), st.integers(1, 255)), max_size=4)):
        raw[at] ^= change
    path.write_bytes(raw[: draw.draw(st.integers(4, len(raw)))])
    try:
        look(path)
    except CaptureError:
        pass


LINKS: list[tuple[int, Callable[[bytes], bytes]]] = [
    (1, lambda p: p[:12] + b"\x81\x00\x00\x07" + p[12:]),  # a VLAN
    (113, lambda p: bytes(14) + p[12:]),  # Linux cooked
    (276, lambda p: p[12:14] + bytes(18) + p[14:]),
    (101, lambda p: p[14:]),  # raw IP
    (0, lambda p: b"\x02\x00\x00\x00" + p[14:]),  # loopback
    (1, lambda p: p[:12] + b"\x86\xdd" + _ipv6(p[14:])),
]


def _ipv6(ip: bytes) -> bytes:
    payload = bytes([6, 0]) + bytes(6) + ip[20:]  # behind a destination-options header
    return struct.pack(">IHBB", 6 << 28, len(payload), 60, 64) + bytes(12) + ip[12:16] + bytes(12) + ip[16:20] + payload


@pytest.mark.parametrize(("link", "wrap"), LINKS)
def test_link_types(recorded, tmp_path, link, wrap):
    path = tmp_path / "a.pcap"
    write_pcap(path, [(time, wrap(packet)) for time, packet in packets_of(recorded)])
    raw = bytearray(path.read_bytes())
    raw[20:24] = struct.pack("<I", link)
    path.write_bytes(raw)
    assert table(path) == table(recorded)


def test_what_waits_for_a_lost_packet_is_bounded(tmp_path):
    tcp = Tcp(mss=60_000)
    tcp.send(0, Direction.TO_SERVER, data(tile(), payload=bytes(12 << 20)) + opened())
    lost = tcp.packets[5]
    path = tmp_path / "a.pcap"
    write_pcap(path, [p for p in tcp.packets if p is not lost])
    with closing(open_source(str(path))) as source:
        items = list(source)
    at = next(n for n, item in enumerate(items) if isinstance(item, Gap))
    assert items[at].nbytes == 60_000
    assert len(items) - at > 50  # it was not told at the end only


# --- tap


def test_a_tap_passes_on_and_shows(tmp_path):
    cache = tmp_path / "cache.safetensors"
    make_cache(cache)
    with receiving("-o", str(tmp_path / "out")) as (receiver, url):
        command = [sys.executable, "-m", "lynxproto", "inspect", "--listen", "tcp://127.0.0.1:0", "--connect", url]
        command += ["--json", "--save", str(tmp_path / "tap.lynx")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tap:
            assert tap.stderr is not None
            here = tap.stderr.readline().split()[2].rstrip(",")
            send = [sys.executable, "-m", "lynxproto", "send", str(cache), here, "--insecure", "-q"]
            subprocess.run(send, check=True, capture_output=True, timeout=60)
            assert receiver.wait(60) == 0
            tap.send_signal(signal.SIGINT)
            output, _ = tap.communicate(timeout=60)
            assert tap.returncode == 0
    live = [json.loads(line) for line in output.splitlines()]
    assert {"HELLO", "OPEN", "ACCEPT", "DATA", "END", "ACK"} <= {one["type"] for one in live}
    assert all(one["checksum"] == "ok" for one in live)
    code, saved = table(tmp_path / "tap.lynx")
    assert code == 0
    assert keyed(saved) == keyed(live)


def test_a_tap_without_a_receiver_turns_clients_away():
    async def main() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nowhere = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        told: list[str] = []
        tap = Tap("tcp://127.0.0.1:0", nowhere, lambda item: pytest.fail("nothing passed"), told=told.append)
        running = asyncio.ensure_future(tap.run())
        await tap.listening.wait()
        reader, writer = await asyncio.open_connection(*tap.url.removeprefix("tcp://").split(":"))
        assert await reader.read() == b""
        writer.close()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert "is turned away: cannot connect to" in told[1]

    asyncio.run(main())


def test_a_tap_passes_a_half_close_on():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])  # only when the client has said all
        writer.close()

    async def main() -> None:
        seen: list[Item] = []
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            tap = Tap("tcp://127.0.0.1:0", f"tcp://127.0.0.1:{port}", seen.append)
            running = asyncio.ensure_future(tap.run())
            await tap.listening.wait()
            reader, writer = await asyncio.open_connection(*tap.url.removeprefix("tcp://").split(":"))
            writer.write(b"abc")
            writer.write_eof()
            assert await reader.read() == b"cba"
            writer.close()
            while not isinstance(seen[-1], StripeEnd):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert [item.direction for item in seen[:-1]] == [Direction.TO_SERVER, Direction.TO_CLIENT]

    asyncio.run(main())


def test_a_tap_that_cannot_listen_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TransportError, match="another program listens there"):
            asyncio.run(Tap(url, "tcp://127.0.0.1:1", lambda item: None).run())
        result = CliRunner().invoke(main, ["inspect", "--listen", url, "--connect", "tcp://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "another program listens there" in result.output


# --- Wireshark


def dissect(path: Path, *options: str) -> str:
    return need("tshark")("-r", path, "-X", f"lua_script:{LUA}", *options)


def test_wireshark_sees_the_same_frames(recorded, tmp_path):
    path = tmp_path / "a.pcap"
    write_pcap(path, packets_of(recorded))
    names = ("type", "level", "layer", "part", "token_start", "token_stop", "payload_length", "transfer", "checksum")
    columns = [word for name in names for word in ("-e", f"lynx.{name}")]
    output = dissect(path, "-Y", "lynx", "-T", "fields", "-e", "ip.src", *columns)
    seen: dict[str, list[tuple]] = {"10.0.0.1": [], "10.0.0.2": []}
    for line in output.splitlines():
        source, *values = line.split("\t")
        seen[source] += zip(*(value.split(",") for value in values), strict=True)
    expected: dict[str, list[tuple]] = {"10.0.0.1": [], "10.0.0.2": []}
    for one in look(path):
        assert isinstance(one, Frame)
        h = one.header
        place = (h.type, h.level, h.layer, h.part, h.token_start, h.token_stop, h.payload_length)
        source = "10.0.0.1" if one.direction == Direction.TO_SERVER else "10.0.0.2"
        expected[source].append((*map(str, place), f"{h.transfer:032x}", "ok"))
    assert seen == expected
    assert len(seen["10.0.0.1"]) > 30


def test_wireshark_shows_fields_and_bodies(tmp_path):
    tcp = Tcp()
    positions = frames.TokenSet.of([3, 5, 9])
    explicit = data(frames.Tile(1, "value", 0, 2, positions, 1), 2)
    grease, ping = frames.grease_frame(Random(3)), control_frame(frames.Ping(id=77, probe=True))
    tcp.send(10**6, Direction.TO_SERVER, explicit + grease + ping)
    write_pcap(tmp_path / "a.pcap", tcp.packets)
    text = dissect(tmp_path / "a.pcap", "-V")
    assert "lynxproto DATA, layer 1, value, level 2, 7 bytes" in text
    assert re.search(r"Token bitmap: 45\n", text)
    assert "(grease, to be skipped)" in text
    assert re.search(r"Text String: id\n.*?Unsigned Integer: 77\n", text, re.DOTALL)
    assert not re.search(r"Expert Info \((Error|Warn)", text)


def test_wireshark_tells_damage(tmp_path):
    frame = data(tile())
    for at, what in ((70, "payload"), (20, "header")):
        tcp = Tcp()
        damaged = bytearray(frame)
        damaged[at] ^= 1
        tcp.send(10**6, Direction.TO_SERVER, opened() + bytes(damaged))
        write_pcap(tmp_path / "a.pcap", tcp.packets)
        output = dissect(tmp_path / "a.pcap", "-Y", 'lynx.checksum == "bad"', "-V")
        assert re.search(rf"CRC32C of the {what}: \w+\n\s+\[Expert Info \(Error/Checksum\)", output)
    bad = bytearray(control_frame(frames.Urgent(), 1))
    bad[9] = 1  # a critical flag, with a right checksum
    bad[60:64] = frames.crc32c(bad[:60]).to_bytes(4, "little")
    tcp = Tcp()
    tcp.send(10**6, Direction.TO_SERVER, bytes(bad))
    write_pcap(tmp_path / "a.pcap", tcp.packets)
    assert "Unknown critical type or flag" in dissect(tmp_path / "a.pcap", "-V")


def test_the_dissector_knows_the_same_names():
    lua = LUA.read_text()
    types = dict(re.findall(r"\[(\d+)\] = \"([A-Z_]+)\"", lua.split("local TYPES")[1].split("}")[0]))
    assert {int(n): name for n, name in types.items()} == {int(t): t.name for t in FrameType}
    parts = dict(re.findall(r"\[(\d)\] = \"([a-z-]+)\"", lua.split("local PARTS")[1].split("}")[0]))
    assert tuple(parts[str(n)] for n in range(len(PARTS))) == PARTS
