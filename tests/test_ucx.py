"""What is particular to ucx://: peers that die or stop, memory after a close, hostile peers, the missing extra."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lynxproto.errors import ConfigError, StreamClosedError, TransportError
from lynxproto.transports import ByteStream, open_listener, open_stream, parse_url

needs_ucxx = pytest.mark.skipif(find_spec("ucxx") is None, reason="needs the extra `ucx`, which CI installs")

#: Sends for ever in megabytes, or receives one byte and waits.
PEER = """
import asyncio, sys
from lynxproto.transports import open_stream
async def main():
    stream = await open_stream(sys.argv[1], insecure=True)
    await stream.send([memoryview(b"!")])
    while sys.argv[2] == "send":
        await stream.send([memoryview(bytes(1 << 20))])
    await asyncio.sleep(1000)
asyncio.run(main())
"""


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(bounded())


@pytest.fixture(params=["tcp", "sm"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UCX_TLS", request.param)
    return str(request.param)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[ByteStream, ByteStream]]:
    """Both ends of a stream: the server's, the client's."""
    async with await open_listener("ucx://127.0.0.1:0", insecure=True) as listener:
        dialling = asyncio.ensure_future(open_stream(listener.url, insecure=True))
        async with await listener.accept() as server:
            await server.send([])  # sets it up
            async with await dialling as client:
                yield server, client


async def fill(stream: ByteStream, target: memoryview) -> None:
    """Receive until ``target`` is full."""
    there = 0
    while there < target.nbytes:
        count = await stream.receive_into(target[there:])
        assert count
        there += count


@asynccontextmanager
async def peer(does: str) -> AsyncIterator[tuple[ByteStream, subprocess.Popen[bytes]]]:
    """A stream to another process, which has said a byte."""
    async with await open_listener("ucx://127.0.0.1:0", insecure=True) as listener:
        process = subprocess.Popen([sys.executable, "-c", PEER, listener.url, does])
        try:
            async with await listener.accept() as stream:
                assert await stream.receive_into(memoryview(bytearray(1))) == 1
                yield stream, process
        finally:
            process.kill()
            process.wait()


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_a_killed_peer_ends_sending_and_receiving() -> None:
    async def main() -> None:
        async with peer("wait") as (stream, process):

            async def fill() -> None:
                while True:
                    await stream.send([memoryview(bytes(1 << 20))])

            sending = asyncio.ensure_future(fill())
            receiving = asyncio.ensure_future(stream.receive_into(memoryview(bytearray(10))))
            await asyncio.sleep(0.05)  # its window is full: the peer does not read
            assert not sending.done()
            process.send_signal(signal.SIGKILL)
            with pytest.raises(TransportError, match="broke"):
                await sending
            try:
                assert await receiving == 0
            except TransportError:
                pass

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_a_peer_killed_while_it_sends() -> None:
    async def main() -> None:
        async with peer("send") as (stream, process):
            buffer = memoryview(bytearray(1 << 20))
            for _ in range(5):
                assert await stream.receive_into(buffer)
            process.send_signal(signal.SIGKILL)
            try:
                while await stream.receive_into(buffer):
                    pass
            except TransportError:
                pass

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_sends_of_any_size_while_the_peer_is_slow() -> None:
    """Long and short messages in one call, many windows' worth; the stream keeps the order and to the window."""

    async def main() -> None:
        async with pair() as (server, client):
            sizes = [1, 8191, 8192, 8193, 5 << 20, 100, 4096, 4097, 12 << 20, 700_000] + [2000] * 6000
            data = np.random.default_rng(1).bytes(sum(sizes))
            view, buffers = memoryview(data), []
            for size in sizes:
                buffers.append(view[:size])
                view = view[size:]
            sending = asyncio.ensure_future(client.send(buffers))
            target, there = memoryview(bytearray(len(data))), 0
            rooms = itertools.cycle((3, 9000, 70_000, 600_000, 9 << 20))
            while there < len(data):
                there += await server.receive_into(target[there : there + next(rooms)])
            await sending
            assert target == data

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_short_messages_between_long_ones() -> None:
    """Many have come, of any size, when somebody receives: they are whole and in order, whatever room there is."""

    async def main() -> None:
        rng = np.random.default_rng(3)
        async with pair() as (server, client):
            for turn in range(60):
                sizes = rng.choice(
                    [1, 4097, 5000, 8192, 32_767, 32_768, 32_769, 65_536, 80_000], size=rng.integers(2, 12)
                )
                data = memoryview(rng.bytes(int(sizes.sum())))
                ends = np.cumsum(sizes)
                await client.send([data[end - size : end] for size, end in zip(sizes, ends, strict=True)])
                target = memoryview(bytearray(len(data) + 40_000))
                room = (len(target), 70_000, 33_000, 100)[turn % 4]
                there = 0
                while there < len(data):
                    there += await server.receive_into(target[there : there + room])
                assert target[:there] == data

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_closing_does_not_wait_for_a_peer_that_stopped() -> None:
    """With a body under way in each direction; afterwards nobody writes to the receiver's memory."""

    async def main() -> None:
        async with peer("send") as (stream, process):
            target = bytearray(1 << 20)
            receiving = asyncio.ensure_future(stream.receive_into(memoryview(target)))
            sending = asyncio.ensure_future(stream.send([memoryview(bytes(8 << 20))]))
            await asyncio.sleep(0)
            process.send_signal(signal.SIGSTOP)
            loop = asyncio.get_running_loop()
            while (await asyncio.wait((receiving,), timeout=0.1))[0]:  # whole bodies that came before the signal
                receiving = asyncio.ensure_future(stream.receive_into(memoryview(target)))
            before = loop.time()
            await stream.aclose()
            assert loop.time() - before < 2
            for waiting in (receiving, sending):
                with pytest.raises(StreamClosedError):
                    await waiting
            target[:] = bytes([7]) * len(target)
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.1)
            assert target == bytes([7]) * len(target)

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_a_cancelled_receive_leaves_the_memory_alone() -> None:
    async def main() -> None:
        async with pair() as (server, client):
            target = np.zeros(1 << 20, np.uint8)
            sending = asyncio.ensure_future(client.send([memoryview(os.urandom(1 << 20))]))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):  # while the body is on its way, or before
                    await server.receive_into(memoryview(target))
            kept = target.copy()
            await asyncio.sleep(0.05)
            await server.aclose()
            assert np.array_equal(target, kept)
            await client.aclose()
            await asyncio.wait((sending,))  # well, if all was dropped before, or not
            sending.exception()

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_nothing_is_left_of_closed_streams() -> None:
    """Descriptors and operations: of streams that ended well, were cut in the middle, or were never set up."""

    async def use(cut: bool) -> None:
        async with pair() as (server, client):
            sending = asyncio.ensure_future(client.send([memoryview(bytes(7 << 20)), memoryview(b"!")]))
            target = memoryview(bytearray((7 << 20) + 1))
            await (server.receive_into(target[:1]) if cut else fill(server, target))
            if not cut:
                await sending
            await client.aclose()
            await asyncio.wait((sending,))
            sending.exception()

    async def main() -> None:
        for cut in (False, True):
            await use(cut)
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            for cut in (False, True):
                await use(cut)
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
        assert not ABANDONED

    from lynxproto.transports._ucxloop import ABANDONED

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("spin", ["0", "100"])
def test_who_waits_for_long_sleeps(spin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYNXPROTO_UCX_SPIN_US", spin)

    async def main() -> None:
        async with pair() as (server, client):
            buffer = memoryview(bytearray(300_000))
            for _ in range(20):  # a busy time, in which it polls
                receiving = asyncio.ensure_future(fill(server, buffer))
                await client.send([memoryview(bytes(300_000))])
                await receiving
            receiving = asyncio.ensure_future(server.receive_into(buffer))
            before = time.process_time()
            await asyncio.sleep(0.4)
            assert time.process_time() - before < 0.2
            await client.send([memoryview(b"!")])
            await receiving
            assert receiving.result() == 1

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("room", [8 << 20, 300_000])
def test_nothing_is_copied_here(room: int) -> None:
    """UCX sends from the caller's memory and receives into it: no memory is taken while megabytes move.

    What is longer than the receiver's room is put by, always in the same place.
    """

    async def main() -> None:
        async with pair() as (server, client):
            data = memoryview(np.random.default_rng(2).bytes(8 << 20))
            target = memoryview(bytearray(8 << 20))

            async def receive() -> None:
                for start in range(0, len(target), room):
                    await fill(server, target[start : start + room])

            for measured in (False, True):  # the first time, what is kept for later is made
                if measured:
                    tracemalloc.start()
                receiving = asyncio.ensure_future(receive())
                await client.send([data])
                await receiving
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert target == data
            assert peak < 64 << 10

    run(main())


@needs_ucxx
@pytest.mark.parametrize(
    ("device", "short", "long"),
    [
        ("tcp", "zero-copy", "rendezvous zero-copy"),  # long ones from memory to memory
        ("sm", "copy-in", None),  # through memory that both have
    ],
)
def test_what_ucx_does_with_messages(device: str, short: str, long: str | None) -> None:
    """In its own words: each comes as one packet, or the receiver asks for it; and how often it is copied."""
    script = (
        "import asyncio, test_ucx\n"
        "async def main():\n"
        "    async with test_ucx.pair() as (server, client):\n"
        "        receiving = asyncio.ensure_future(test_ucx.fill(server, memoryview(bytearray((4 << 20) + 5000))))\n"
        "        await client.send([memoryview(bytes(4 << 20)), memoryview(bytes(5000))])\n"
        "        await receiving\n"
        "        print('cut', client._state.shortest, client._state.longest)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "UCX_TLS": device, "UCX_PROTO_INFO": "y", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    shortest, longest = map(int, re.findall(r"^cut (\d+) (\d+)$", done.stdout, re.MULTILINE)[0])
    _, _, packets = done.stdout.partition("ucp_am_send*(egr) from host memory")
    packet = re.search(rf"\.\.(\d+) +\| {short} ", packets)
    assert packet
    assert shortest + struct.calcsize("<QQ") <= int(packet[1])
    if long is None:
        assert longest == 0
    else:
        _, _, asked = done.stdout.partition("ucp_am_send*(rndv) from host memory")
        assert re.search(rf"\.inf +\| \(\?\) {long} ", asked)
        assert longest > shortest


@needs_ucxx
def test_devices_that_this_machine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides say so by name, and leave no descriptor."""
    monkeypatch.setenv("UCX_TLS", "mars")

    async def main() -> None:
        async with await open_listener("ucx://127.0.0.1:0", insecure=True) as listener:
            for _ in range(2):
                dialling = asyncio.ensure_future(open_stream(listener.url, insecure=True))
                with pytest.raises(TransportError, match=r"UCX cannot start: .*UCX_TLS"):
                    await listener.accept()
                with pytest.raises(TransportError, match=r"UCX cannot start: .*UCX_TLS"):
                    await dialling
                descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
        assert descriptors[0] == descriptors[1]

    descriptors: list[int] = []
    run(main())


@needs_ucxx
def test_a_peer_with_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX would write past the memory of the one with the shorter packets."""
    script = (
        "import asyncio, sys\n"
        "from lynxproto.transports import open_stream\n"
        "asyncio.run(open_stream(sys.argv[1], insecure=True))\n"
    )
    monkeypatch.setenv("UCX_POSIX_SEG_SIZE", "8256")

    async def main() -> None:
        async with await open_listener("ucx://127.0.0.1:0", insecure=True) as listener:
            environment = {key: value for key, value in os.environ.items() if key != "UCX_POSIX_SEG_SIZE"}
            command = [sys.executable, "-c", script, listener.url]
            peer = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            async with await listener.accept() as stream:
                with pytest.raises(TransportError, match=r"other settings of UCX.*UCX_POSIX_SEG_SIZE"):
                    await stream.receive_into(memoryview(bytearray(1)))
            _, said = await asyncio.to_thread(peer.communicate)
            assert "other settings of UCX" in said

    run(main())


def test_a_spin_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ucxx", reason="needs the extra `ucx`, which CI installs")
    monkeypatch.setenv("LYNXPROTO_UCX_SPIN_US", "fast")

    for call in (open_stream("ucx://127.0.0.1:1", insecure=True), open_listener("ucx://127.0.0.1:0", insecure=True)):
        with pytest.raises(ConfigError, match="LYNXPROTO_UCX_SPIN_US=fast"):
            run(call)


@asynccontextmanager
async def hostile_peer() -> AsyncIterator[tuple[ByteStream, Callable[..., None], Callable[[], None]]]:
    """A stream, and what its peer, who knows the tags, has: to send a message of any kind, and to make progress."""
    from lynxproto.transports._ucxx import Operation, Worker

    async with await open_listener("ucx://127.0.0.1:0", insecure=True) as listener:
        worker = Worker()
        control = await open_stream(f"tcp://127.0.0.1:{parse_url(listener.url).port}", insecure=True)
        hello = struct.pack("<8sQII", b"LYNXUCX5", 4, worker.settings, len(worker.address)) + worker.address
        await control.send([memoryview(hello)])
        async with await listener.accept() as server:
            await server.send([])  # sets it up
            reply = bytearray(struct.calcsize("<8sQII"))
            assert await control.receive_into(memoryview(reply)) == len(reply)
            _, tag, _, nbytes = struct.unpack("<8sQII", reply)
            address = bytearray(nbytes)
            assert await control.receive_into(memoryview(address)) == nbytes
            endpoint = worker.connect(bytes(address))
            stream = worker.open_stream(4)
            worker.direct(stream, endpoint, tag)
            sent = []

            def say(kind: int, data: bytes, *, kept: bool = False) -> None:
                if data:
                    stream.theirs, stream.shortest, stream.longest = tag | kind, len(data), len(data) if kept else 0
                    operation = Operation()
                    worker.begin(operation)
                    worker.send(operation, stream, memoryview(data))
                    sent.append(operation)
                else:
                    sent.append(worker.tell(stream, kind))

            try:
                yield server, say, worker.progress
            finally:
                endpoint.close()
                for _ in range(100):
                    worker.progress()
            assert all(operation.done for operation in sent)
        worker.close()
        await control.aclose()


@needs_ucxx
@pytest.mark.parametrize(
    ("kind", "nbytes", "count", "says"),
    [
        (0, 0, 1, "a message that cannot be"),  # bytes of the stream: none, too many
        (0, (1 << 19) + 1, 1, "a message that cannot be"),
        (0, 1 << 19, 11, "it sends more than it may"),
        (0, 100, 9000, "it sends more than it may"),
        (1, 0, 1, "a message that cannot be"),  # it has read what was never sent
        (1, 8, 1, "a message that cannot be"),
        (2, 1, 1, "a message that cannot be"),
        (3, 0, 1, "a message that cannot be"),
    ],
)
def test_a_peer_that_breaks_the_rules_is_cut_off(kind: int, nbytes: int, count: int, says: str) -> None:
    """Nothing is allocated for what it announces, and what it sent is let go of."""

    async def main() -> None:
        async with hostile_peer() as (server, send, progress):
            data = bytes(nbytes)
            for _ in range(count):
                send(kind, data)
            for _ in range(5000):
                progress()
                await asyncio.sleep(0)
                try:
                    await server.send([])
                except TransportError:
                    break
            with pytest.raises(TransportError, match=says):
                await server.send([memoryview(b"!")])
            buffer = memoryview(bytearray(1 << 20))
            with suppress(TransportError):  # short messages that came before can still be read
                while await server.receive_into(buffer):
                    pass
            with pytest.raises(TransportError, match=says):
                await server.receive_into(buffer)

    run(main())


async def get_to_know(server: Any, send: Any, progress: Any, memory: memoryview) -> None:
    """Both endpoints have met when a first message is here."""
    send(0, bytes(100))
    receiving = asyncio.ensure_future(server.receive_into(memory))
    while not receiving.done():
        progress()
        await asyncio.sleep(0)


@needs_ucxx
@pytest.mark.parametrize("closed", [False, True])
def test_a_peer_that_stops_half_way_through_a_message(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver's memory is its own as soon as it gives up; what comes of the message is UCX's affair."""
    monkeypatch.setenv("UCX_TLS", "sm")

    async def main() -> None:
        async with hostile_peer() as (server, send, progress):
            target = np.full(1 << 20, 7, np.uint8)
            await get_to_know(server, send, progress, memoryview(target))
            for _ in range(20):  # with these the queue between both cannot hold all packets of the next
                send(0, bytes(100))
            send(0, bytes(1 << 19))
            there = 0
            while there < 2000:
                there += await server.receive_into(memoryview(target)[there:])
            receiving = asyncio.ensure_future(server.receive_into(memoryview(target)[there:]))
            assert not (await asyncio.wait((receiving,), timeout=0.05))[0]
            if closed:
                await server.aclose()
            receiving.cancel()
            await asyncio.wait((receiving,))
            for _ in range(1000):
                progress()  # now the rest comes
                await asyncio.sleep(0)
            assert (target[there:] == 7).all()
            if not closed:
                await fill(server, memoryview(target)[: 1 << 19])
                assert not target[: 1 << 19].any()
            lent = weakref.ref(target)
            del target, receiving
            gc.collect()
            assert lent() is None
        assert not ABANDONED

    from lynxproto.transports._ucxloop import ABANDONED

    run(main())


@needs_ucxx
@pytest.mark.usefixtures("device")
def test_a_peer_that_announces_a_message_and_keeps_it() -> None:
    """A receiver that asked for it and gives up ends the stream: then its memory is its own."""

    async def main() -> None:
        async with hostile_peer() as (server, send, progress):
            target = np.full(1 << 20, 7, np.uint8)
            await get_to_know(server, send, progress, memoryview(target))
            target[:] = 7
            send(0, bytes(1 << 19), kept=True)
            receiving = asyncio.ensure_future(server.receive_into(memoryview(target)))
            assert not (await asyncio.wait((receiving,), timeout=0.05))[0]
            receiving.cancel()
            await asyncio.wait((receiving,))
            for _ in range(1000):
                progress()
                await asyncio.sleep(0)
            assert (target == 7).all()
            lent = weakref.ref(target)
            del target, receiving
            gc.collect()
            assert lent() is None
            with pytest.raises(TransportError, match="broke"):
                await server.send([memoryview(b"!")])
        assert not ABANDONED

    from lynxproto.transports._ucxloop import ABANDONED

    run(main())


@needs_ucxx
def test_a_stranger_on_the_control_port() -> None:
    async def main() -> None:
        async with await open_listener("ucx://127.0.0.1:0", insecure=True) as listener:
            port = parse_url(listener.url).port
            async with (
                await open_stream(f"tcp://127.0.0.1:{port}", insecure=True) as stranger,
                await listener.accept() as server,
            ):
                await stranger.send([memoryview(b"GET / HTTP/1.1\r\nHost: lynx\r\n\r\n")])
                with pytest.raises(TransportError, match="does not speak ucx://"):
                    await server.receive_into(memoryview(bytearray(10)))
        async with await open_listener("tcp://127.0.0.1:0", insecure=True) as listener:
            port = parse_url(listener.url).port
            dialling = asyncio.ensure_future(open_stream(f"ucx://127.0.0.1:{port}", insecure=True))
            async with await listener.accept():
                pass
            with pytest.raises(TransportError, match=r"does it speak ucx://|broke"):
                await dialling

    run(main())


def test_it_is_not_encrypted_and_says_so() -> None:
    for call in (open_stream("ucx://127.0.0.1:1"), open_listener("ucx://127.0.0.1:0")):
        with pytest.raises(ConfigError, match=r"insecure=True"):
            run(call)


def test_without_the_extra() -> None:
    script = (
        "import sys, asyncio; sys.modules['ucxx'] = None\n"
        "from lynxproto.transports import open_listener\n"
        "asyncio.run(open_listener('ucx://127.0.0.1:0', insecure=True))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in done.stderr
    assert "pip install 'lynxproto[ucx]'" in done.stderr
