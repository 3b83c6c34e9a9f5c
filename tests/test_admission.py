"""Strangers at the door: floods and slow ones cost little and keep nobody out; known peers have limits too."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

import lynxproto
from lynxproto import frames
from lynxproto.admission import Gate, Guest, neighbourhood
from lynxproto.cachefile import Cache
from lynxproto.config import Admission, Config, Limits
from lynxproto.errors import ConfigError, ErrorCode, LimitError, RejectedError, RemoteError
from lynxproto.manifest import Identity, Manifest
from lynxproto.transports import client_context, open_stream, parse_url, server_context
from lynxproto.windows import Budget

#: Plaintext, which these tests ask for.
connect, listen = partial(lynxproto.connect, insecure=True), partial(lynxproto.listen, insecure=True)
_names = (f"memory://admission-{n}" for n in itertools.count())


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(100):
            return await main()

    return asyncio.run(bounded())


def make_cache(tokens: int = 64) -> Cache:
    manifest = Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=1, head_dim=64, tokens=tokens
    )
    arrays: Any = {(0, part): np.zeros((1, tokens, 64), np.uint16) for part in ("key", "value")}
    return Cache(manifest=manifest, arrays=arrays)


async def push(url: str, config: Config, cache: Cache) -> None:
    async with connect(url, config) as sender:
        await sender.open(cache.manifest).send(cache)


# --- the gate alone


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aab"), st.sampled_from(["knock", "enter", "leave"])), max_size=60))
def test_the_gate_never_lets_in_more_than_it_may(steps: list[tuple[str, str]]) -> None:
    limits = Admission(
        handshakes=4, handshakes_per_address=3, connections=5, connections_per_address=4, connections_per_principal=2
    )
    gate = Gate(limits)
    door: list[Guest] = []
    inside: list[Guest] = []
    for address, action in steps:
        if action == "knock":
            try:
                guest = gate.knock(address, 0.0, lambda: None)
            except LimitError:
                continue
            guest.evict = partial(door.remove, guest)
            door.append(guest)
        elif action == "enter" and door:
            guest = door.pop(0)
            try:
                gate.enter(guest, f"principal of {guest.address}")
                inside.append(guest)
            except LimitError:
                pass
        elif action == "leave" and inside:
            gate.leave(inside.pop(0))
        assert gate.handshakes == len(door) <= 4
        assert gate.connections == len(inside) <= 5
        assert max(Counter(guest.address for guest in door).values(), default=0) <= 3
        assert max(Counter(guest.principal for guest in inside).values(), default=0) <= 2
    for guest in door + inside:
        gate.leave(guest)
        gate.leave(guest)
    assert (gate.handshakes, gate.connections) == (0, 0)


def test_the_busiest_address_makes_room_and_its_oldest_goes() -> None:
    gate = Gate(Admission(handshakes=4, handshakes_per_address=4))
    gone: list[str] = []
    for name in ("flood-1", "flood-2", "honest", "flood-3", "flood-4", "flood-5"):
        gate.knock(name.split("-")[0], 0.0, lambda name=name: gone.append(name))
    assert gone == ["flood-1", "flood-2"]


def test_accepts_are_limited_by_address() -> None:
    gate = Gate(Admission(accepts_per_address=2))
    for _ in range(2):
        gate.leave(gate.knock("a", 0.0, lambda: None))
    with pytest.raises(LimitError, match="2 connections a second from a"):
        gate.knock("a", 0.1, lambda: None)
    gate.knock("b", 0.1, lambda: None)
    gate.knock("a", 0.6, lambda: None)


def test_budgets_are_shared_by_the_sessions_of_a_principal() -> None:
    gate = Gate(Admission(sessions_per_principal=2))
    one, two = gate.open_session("a"), gate.open_session("a")
    assert one[0] is two[0]
    assert one[1] is two[1]
    with pytest.raises(LimitError, match="2 sessions of a"):
        gate.open_session("a")
    assert gate.open_session("b")[0] is not one[0]
    gate.close_session("a")
    gate.open_session("a")


@settings(max_examples=100, deadline=None)
@given(st.floats(0.1, 1e6), st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1e6)), max_size=40))
def test_a_budget_never_gives_more_than_burst_and_rate(rate: float, steps: list[tuple[float, float]]) -> None:
    budget, now, spent = Budget(rate), 0.0, 0.0
    for wait, amount in steps:
        now += wait
        spent += amount if budget.spend(amount, now) else 0.0
        assert spent <= (2 * rate + rate * now) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("address", "counts_as"),
    [
        ("tcp://10.0.0.3", "tcp://10.0.0.3"),
        ("tcps://[2001:db8:1:2:3:4:5:6]", "tcps://[2001:db8:1:2::/64]"),
        ("tcp://[::ffff:10.0.0.3]", "tcp://10.0.0.3"),
        ("tcp://[fe80::1%eth0]", "tcp://[fe80::/64]"),
        ("unix:///run/lynx.sock", "unix:///run/lynx.sock"),
        ("memory://name", "memory://name"),
    ],
)
def test_neighbours_count_as_one(address: str, counts_as: str) -> None:
    assert neighbourhood(address) == counts_as


def test_limits_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="handshakes"):
        Admission(handshakes=0)


# --- floods

_FLOOD = """
import resource, select, socket, sys, time
count, port, lines = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 100)), hard))
held = []
print("ready", flush=True)
for n in range(count):
    s = socket.socket()
    s.bind((f"127.0.0.{2 + n % 4}", 0))
    s.settimeout(5)
    try:
        s.connect(("127.0.0.1", port))
        s.send(lines[: n * 7919 % (len(lines) + 1)] if n % 3 else lines)
    except OSError:
        pass
    held.append(s)
print("all", flush=True)
while True:  # a byte at a time, for ever
    time.sleep(0.05)
    for s in held:
        try:
            s.send(b"x")
        except OSError:
            pass
"""


@contextmanager
def flood(port: int, count: int, first: bytes) -> Iterator[subprocess.Popen[str]]:
    """Strangers in a process of their own, from four other addresses; none is closed by its own side."""
    command = [sys.executable, "-c", _FLOOD, str(count), str(port), first.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def hello() -> bytes:
    """What a peer says first; who knows no secret cannot go on."""
    body = frames.Hello(
        versions=(1, 1), nonce=bytes(32), stripe=0, name="flood", lease=1.0, limits=Limits(), codecs=(), features=()
    )
    return frames.control_frame(body)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("scheme", ["tcp", "tcps"])
def test_a_flood_of_strangers_is_bounded_and_keeps_nobody_out(scheme: str, tmp_path: Path) -> None:
    """1,200 strangers say a HELLO or a part of one, or half a TLS hello, and then a byte now and then."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "certificate", "key")}
    tls = {"tls": server_context(**files)} if scheme == "tcps" else {}
    client = {"tls": client_context(**files)} if scheme == "tcps" else {}
    admission = Admission(handshakes=32, handshakes_per_address=16, accepts_per_address=5000)
    config = Config(admission=admission, handshake_timeout=2.0)
    cache = make_cache()
    failed: Counter[str] = Counter()
    allocated: list[Manifest] = []

    def observe(event: str, fields: Mapping[str, Any]) -> None:
        if event == "handshake_failed":
            failed[fields["reason"]] += 1

    def allocate(manifest: Manifest) -> Any:
        allocated.append(manifest)
        return lynxproto.session.allocate_arrays(manifest)

    first = b"\x16\x03\x01\x02\x00\x01" if scheme == "tcps" else hello()

    async def main() -> None:
        async with listen(f"{scheme}://127.0.0.1:0", config, observe=observe, allocate=allocate, **tls) as receiver:
            port = parse_url(receiver.url).port
            url = f"{scheme}://localhost:{port}"
            async with connect(url, **client) as sender:  # what comes with the first use is not the flood's
                await asyncio.gather(sender.open(cache.manifest).send(cache), (await anext(receiver)).exact())
            before, memory = descriptors(), psutil.Process().memory_info().rss
            most = 0
            with flood(port, 1200, first) as strangers:
                assert strangers.stdout is not None
                arrived = asyncio.get_running_loop().run_in_executor(None, strangers.stdout.readline)
                served = 0
                while not arrived.done() or served < 3:
                    async with connect(url, **client) as sender:
                        await asyncio.gather(sender.open(cache.manifest).send(cache), (await anext(receiver)).exact())
                    served += 1
                    most = max(most, descriptors() - before)
                while sum(failed.values()) < 1200 - 32:
                    await asyncio.sleep(0.01)
                    most = max(most, descriptors() - before)
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is nobody's
                grown = psutil.Process().memory_info().rss - memory
            assert len(allocated) == served + 1  # nothing for strangers
            assert most <= 32 + 16, most  # who is at the door, and the honest peer's own
            assert grown < 24 << 20, grown

    run(main)
    assert set(failed) <= {"limit", "timeout", "link", "frame_corrupt", "protocol"}


def test_slow_strangers_have_a_time_limit() -> None:
    failed: list[Mapping[str, Any]] = []

    def observe(event: str, fields: Mapping[str, Any]) -> None:
        if event == "handshake_failed":
            failed.append(fields)

    async def main() -> None:
        config = Config(handshake_timeout=0.2)
        async with (
            listen("tcp://127.0.0.1:0", config, observe=observe) as receiver,
            await open_stream(receiver.url) as stranger,
        ):
            for byte in b"\xab\x4c":  # the first bytes of a HELLO, slowly
                await stranger.send([memoryview(bytes([byte]))])
                await asyncio.sleep(0.01)
            assert await stranger.receive_into(memoryview(bytearray(1))) == 0

    run(main)
    assert [(one["reason"], one["stage"]) for one in failed] == [("timeout", "hello")]
    assert "no HELLO within 0.2 s" in failed[0]["error"]


def test_who_says_hello_and_then_nothing_has_a_time_limit_too() -> None:
    failed: list[Mapping[str, Any]] = []

    def observe(event: str, fields: Mapping[str, Any]) -> None:
        if event == "handshake_failed":
            failed.append(fields)

    async def main() -> None:
        config = Config(handshake_timeout=0.2, secret=b"0123456789abcdef")
        async with (
            listen("tcp://127.0.0.1:0", config, observe=observe) as receiver,
            await open_stream(receiver.url) as stranger,
        ):
            await stranger.send([memoryview(hello())])
            while await stranger.receive_into(memoryview(bytearray(1 << 16))):
                pass
            await stranger.aclose()
            while receiver.snapshot().handshakes:  # its place is free
                await asyncio.sleep(0.01)

    run(main)
    assert [(one["reason"], one["stage"]) for one in failed] == [("timeout", "session")]
    assert "no handshake for 0.2 s" in failed[0]["error"]


def test_who_comes_too_often_is_told_so() -> None:
    async def main() -> None:
        config = Config(admission=Admission(accepts_per_address=2))
        async with listen("tcp://127.0.0.1:0", config) as receiver, connect(receiver.url), connect(receiver.url):
            with pytest.raises(RemoteError, match=r"2 connections a second|broke|hung up") as caught:
                await connect(receiver.url).__aenter__()
            if "broke" not in str(caught.value):
                assert isinstance(caught.value, LimitError)

    run(main)


# --- limits of known peers


def test_sessions_of_a_principal_are_limited() -> None:
    cache = make_cache()

    async def main() -> None:
        config = Config(admission=Admission(sessions_per_principal=1), secret=b"0123456789abcdef")
        async with listen(next(_names), config) as receiver, connect(receiver.url, config) as first:
            with pytest.raises(RemoteError, match="1 sessions of secret:shared") as caught:
                await push(receiver.url, config, cache)
            assert caught.value.code is ErrorCode.LIMIT
            await asyncio.gather(first.open(cache.manifest).send(cache), (await anext(receiver)).exact())

    run(main)


def test_what_a_principal_pushes_is_limited_over_all_its_sessions() -> None:
    cache = make_cache()
    allocated: list[Manifest] = []

    def allocate(manifest: Manifest) -> Any:
        allocated.append(manifest)
        return lynxproto.session.allocate_arrays(manifest)

    async def main() -> None:
        nbytes = cache.manifest.nbytes
        for admission, says in (
            (Admission(transfers_per_principal=1), "1 transfers of"),
            (Admission(bytes_per_principal=nbytes + 1), "admission.bytes_per_principal"),
        ):
            allocated.clear()
            async with (
                listen(next(_names), Config(admission=admission), allocate=allocate) as receiver,
                connect(receiver.url) as one,
                connect(receiver.url) as other,
            ):
                held = one.open(cache.manifest)
                await held.accepted()
                with pytest.raises(RejectedError, match=says) as caught:
                    await other.open(cache.manifest).accepted()
                assert caught.value.code is ErrorCode.LIMIT
                assert len(allocated) == 1
                await asyncio.gather(held.send(cache), (await anext(receiver)).exact())
                again = other.open(cache.manifest)  # there is room again
                await asyncio.gather(again.send(cache), (await anext(receiver)).exact())

    run(main)


@pytest.mark.parametrize(
    "config", [Config(control_byte_rate=200.0), Config(admission=Admission(control_bytes_per_principal=50))]
)
def test_control_bytes_are_limited(config: Config) -> None:
    async def main() -> None:
        async with listen(next(_names), config) as receiver:
            cache = make_cache()
            with pytest.raises(RemoteError, match=r"(200|50) bytes of control a second"):
                await push(receiver.url, Config(), cache)

    run(main)
