"""Transports: bytes arrive whole and in order over every scheme, failures are named, links keep their speed."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import socket
import ssl
import struct
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto.errors import AuthenticationError, ConfigError, StreamClosedError, TransportError, UnknownTransportError
from lynxproto.transports import (
    ByteStream,
    Listener,
    TokenBucket,
    client_context,
    get_transport,
    open_listener,
    open_stream,
    parse_url,
    register_transport,
    schemes,
    server_context,
)
from lynxproto.transports._socket import SocketStream
from lynxproto.transports.abc import take
from lynxproto.transports.tcp import LOCAL_BYTES, TCPStream


def run(coroutine: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await coroutine

    return asyncio.run(bounded())


async def receive_exactly(stream: ByteStream, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view.nbytes:
        count = await stream.receive_into(view)
        if count == 0:
            raise AssertionError(f"the stream ended {view.nbytes} bytes early")
        view = view[count:]
    return bytes(data)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pem(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Certificate, key and ca files for a name."""

    def files(name: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp(name.replace("@", "_"))
        cert = authority.issue_cert(name)
        cert.private_key_pem.write_to_path(folder / "key.pem")
        cert.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        return {k: folder / f"{k}.pem" for k in ("certificate", "key", "ca")}

    return files


async def exchange(listener: Listener, tls: ssl.SSLContext | None = None, link: TokenBucket | None = None) -> None:
    """Both directions at once, several megabytes in oddly sized buffers."""
    client, server = await asyncio.gather(open_stream(listener.url, tls=tls, link=link), listener.accept())
    up, down = os.urandom(3_000_001), os.urandom(1_234_567)
    cuts = [0, 1, 1, 70_000, 2_000_003, len(up)]
    parts = [memoryview(up)[a:b] for a, b in itertools.pairwise(cuts)]
    _, _, got_up, got_down = await asyncio.gather(
        client.send(parts),
        server.send([memoryview(down)]),
        receive_exactly(server, len(up)),
        receive_exactly(client, len(down)),
    )
    assert got_up == up
    assert got_down == down
    await client.aclose()
    assert await server.receive_into(memoryview(bytearray(10))) == 0
    await server.aclose()


def test_ipv6_wildcard_takes_ipv4_peers() -> None:
    async def main() -> None:
        async with await open_listener("tcp://[::]:0") as listener:
            port = parse_url(listener.url).port
            client, server = await asyncio.gather(open_stream(f"tcp://127.0.0.1:{port}"), listener.accept())
            await client.send([memoryview(b"hello")])
            assert await receive_exactly(server, 5) == b"hello"
            await client.aclose()
            await server.aclose()

    run(main())


def test_unix_exchange_and_stale_file(tmp_path: Path) -> None:
    path = tmp_path / "lynx.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()  # leaves the file behind, as a killed program does

    async def main() -> None:
        async with await open_listener(f"unix://{path}") as listener:
            await exchange(listener)
            with pytest.raises(TransportError, match="another program listens"):
                await open_listener(f"unix://{path}")
        assert not path.exists()
        path.write_bytes(b"a user's file")
        with pytest.raises(TransportError, match="in use"):
            await open_listener(f"unix://{path}")
        assert path.read_bytes() == b"a user's file"

    run(main())


def test_tls_mutual_exchange(pem: Callable[[str], dict[str, Path]]) -> None:
    server, client = pem("localhost"), pem("client@example.org")

    async def main() -> None:
        async with await open_listener("tcps://localhost:0", tls=server_context(**server)) as listener:
            assert listener.url.startswith("tcps://")
            port = parse_url(listener.url).port
            context = client_context(**client)
            peer, accepted = await asyncio.gather(
                open_stream(f"tcps://localhost:{port}", tls=context), _first_byte(listener)
            )
            data = os.urandom(1_000_003)
            _, got = await asyncio.gather(peer.send([memoryview(data)]), receive_exactly(accepted, len(data)))
            assert got == data
            assert peer.name.startswith("tcps://")
            await peer.aclose()
            await accepted.aclose()

    async def _first_byte(listener: Listener) -> ByteStream:
        stream = await listener.accept()
        await stream.send([])  # a server's handshake happens on first use
        return stream

    run(main())


async def _serve_one(listener: Listener) -> BaseException | None:
    async with await listener.accept() as stream:
        try:
            await stream.receive_into(memoryview(bytearray(1)))
        except (AuthenticationError, TransportError) as error:
            return error
    return None


def test_tls_refuses_a_server_it_cannot_trust(pem: Callable[[str], dict[str, Path]]) -> None:
    server = pem("localhost")

    async def main() -> None:
        async with await open_listener("tcps://localhost:0", tls=server_context(**server)) as listener:
            serving = asyncio.ensure_future(_serve_one(listener))
            with pytest.raises(AuthenticationError, match="not trusted"):
                await open_stream(listener.url.replace("[::1]", "localhost").replace("127.0.0.1", "localhost"))
            assert isinstance(await serving, (AuthenticationError, TransportError))

    run(main())


def test_tls_server_refuses_a_client_without_certificate(pem: Callable[[str], dict[str, Path]]) -> None:
    server = pem("localhost")

    async def main() -> None:
        async with await open_listener("tcps://localhost:0", tls=server_context(**server)) as listener:
            port = parse_url(listener.url).port
            serving = asyncio.ensure_future(_serve_one(listener))
            # In TLS 1.3 the client learns of the refusal with its first read.
            async with await open_stream(f"tcps://localhost:{port}", tls=client_context(ca=server["ca"])) as client:
                with pytest.raises(AuthenticationError, match="does not trust this side"):
                    await client.receive_into(memoryview(bytearray(1)))
            assert isinstance(await serving, (AuthenticationError, TransportError))

    run(main())


def test_tls_against_plaintext_says_so(pem: Callable[[str], dict[str, Path]]) -> None:
    server = pem("localhost")

    async def main() -> None:
        async with await open_listener("tcps://127.0.0.1:0", tls=server_context(**server)) as listener:
            serving = asyncio.ensure_future(_serve_one(listener))
            async with await open_stream(listener.url.replace("tcps", "tcp")) as client:
                await client.send([memoryview(b"LYNX, in the clear, and more than a TLS record header")])
                error = await serving
                assert isinstance(error, TransportError)
                assert "tcps://" in str(error)
        async with await open_listener("tcp://127.0.0.1:0") as listener:
            hang_up = asyncio.ensure_future(_hang_up(listener))
            with pytest.raises(TransportError, match="tcps://"):
                await open_stream(listener.url.replace("tcp", "tcps"), tls=client_context(ca=server["ca"]))
            await hang_up

    async def _hang_up(listener: Listener) -> None:
        async with await listener.accept() as stream:
            await stream.receive_into(memoryview(bytearray(10_000)))

    run(main())


def test_tls_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "not.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"not\.pem"):
        server_context(certificate=tmp_path / "not.pem", client_certificates=False)
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        client_context(ca=tmp_path / "absent.pem")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:7411", "unknown scheme 'http'"),
        ("127.0.0.1:7411", "unknown scheme"),
        ("tcp://127.0.0.1", "HOST:PORT"),
        ("tcp://:7411", "HOST:PORT"),
        ("tcp://host:99999", "not a URL"),
        ("tcp://host:1/path", "HOST:PORT"),
        ("tcp://user@host:1", "takes no user"),
        ("tcp://host:1?x=1", "takes no user"),
        ("unix://relative", "unix:///PATH"),
        ("memory://", "memory://NAME"),
    ],
)
def test_bad_urls(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_url(url)


def test_ports_in_use_and_nobody_listening() -> None:
    async def main() -> None:
        async with await open_listener("tcp://127.0.0.1:0") as listener:
            with pytest.raises(TransportError, match="port 0 for any free one"):
                await open_listener(listener.url)
            url = listener.url
        with pytest.raises(TransportError, match="start the receiver first"):
            await open_stream(url)
        with pytest.raises(TransportError, match="nobody in this process"):
            await open_stream("memory://nobody")
        with pytest.raises(TransportError, match="cannot resolve"):
            await open_stream("tcp://no-such-host.invalid:7411")
        with pytest.raises(TransportError, match="no such address"):
            await open_listener("tcp://192.0.2.1:0")

    run(main())


def test_a_reset_is_a_broken_link() -> None:
    async def main() -> None:
        async with await open_listener("tcp://127.0.0.1:0") as listener:
            port = parse_url(listener.url).port
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                server = await listener.accept()
            with pytest.raises(TransportError, match="broke"):
                await server.receive_into(memoryview(bytearray(1)))
            await server.aclose()

    run(main())


def test_the_kernel_holds_little_unsent() -> None:
    """A peer that stops reading must not make the sender's kernel swallow megabytes: priority would be lost."""

    async def main() -> None:
        async with await open_listener("tcp://127.0.0.1:0") as listener:
            client, server = await asyncio.gather(open_stream(listener.url), listener.accept())
            sending = asyncio.ensure_future(client.send([memoryview(bytes(64 << 20))]))
            for _ in range(50):  # the peer never reads: its window fills, then the unsent bytes reach their bound
                await asyncio.sleep(0.002)
            siocoutqnsd = 0x894B
            unsent = struct.unpack("i", fcntl.ioctl(client._sock, siocoutqnsd, bytes(4)))[0]  # type: ignore[attr-defined]
            assert not sending.done()
            assert 0 < unsent <= 2 * LOCAL_BYTES
            await client.aclose()
            with pytest.raises(StreamClosedError):
                await sending
            await server.aclose()

    run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is read on Linux only")
def test_tcp_knows_what_the_link_behind_its_buffers_carries() -> None:
    """Not before it has carried something, and no more than was acknowledged."""
    nbytes = 32 << 20

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
            far, _ = server.accept()
            sender, receiver = TCPStream(near, "near"), SocketStream(far, "far")
            assert sender.link_rate == 0.0
            assert receiver.link_rate is None
            loop = asyncio.get_running_loop()
            began = loop.time()
            receiving = asyncio.create_task(receive_exactly(receiver, nbytes))
            for _ in range(nbytes >> 16):
                await sender.send([memoryview(bytes(1 << 16))])
            await receiving
            took = loop.time() - began
            assert sender.link_rate > 0.5 * nbytes / took  # the fastest 10 ms of it
            await receiver.aclose()
            await sender.aclose()

    run(main())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=8), st.integers(1, 30))
def test_take_cuts_without_loss(parts: list[bytes], piece: int) -> None:
    queue = deque(memoryview(p) for p in parts)
    pieces = []
    while taken := take(queue, piece):
        pieces.append(b"".join(taken))
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(p) == piece for p in pieces[:-1])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=50, deadline=None)
@given(
    st.floats(1e4, 1e10),
    st.lists(st.tuples(st.integers(1, 200_000), st.floats(0, 0.1)), min_size=1, max_size=40),
)
def test_token_bucket_never_exceeds_rate_plus_burst(bits_per_second: float, steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    link = TokenBucket(bits_per_second, 20_000, clock=clock)
    sent = 0
    for nbytes, idle in steps:
        clock.now += idle
        clock.now += link.reserve(nbytes)
        sent += nbytes
        assert sent <= 20_000 + (clock.now - 100.0) * bits_per_second / 8 * (1 + 1e-9) + 1


def test_token_bucket_uses_the_whole_rate() -> None:
    clock = Clock()
    link = TokenBucket(8e6, 10_000, clock=clock)
    for _ in range(1000):
        clock.now += link.reserve(1000)
    assert clock.now - 100.0 == pytest.approx((1000 * 1000 - 10_000) / 1e6)


def test_token_bucket_refuses_nonsense() -> None:
    for bad in (0, -1, float("nan")):
        with pytest.raises(ConfigError):
            TokenBucket(bad)
    with pytest.raises(ConfigError):
        TokenBucket(1e6, 0)


def test_shaped_stream_holds_nothing_back_or_ahead() -> None:
    """While the shaped link is busy, at most the burst and what is allowed by time has left the caller."""

    async def main() -> None:
        link = TokenBucket(8e5, 4096)  # 100 kB/s
        async with await open_listener("memory://shaped") as listener:
            client, server = await asyncio.gather(open_stream(listener.url, link=link), listener.accept())
            loop = asyncio.get_running_loop()
            start = loop.time()
            sending = asyncio.ensure_future(client.send([memoryview(bytes(20_000))]))
            got = 0
            buffer = memoryview(bytearray(65536))
            while got < 20_000:
                got += await server.receive_into(buffer)
                # Bytes never run ahead of the link's speed (this bound holds however slow the machine is).
                assert got <= 4096 + (loop.time() - start) * 1e5 + 1
            await sending
            await client.aclose()
            await server.aclose()

    run(main())


PLUGIN = """
from lynxproto.transports import Transport
from lynxproto.transports.memory import connect_memory, listen_memory

class Carrier(Transport):
    address = "NAME"
    async def connect(self, address, setup):
        return setup.stream_through_link(await connect_memory("carrier-" + address.path))
    async def listen(self, address, setup):
        return setup.listener_through_link(await listen_memory("carrier-" + address.path))

class NoTransport:
    pass
"""


def test_third_parties_register_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By entry point of an installed package, or by a decorator."""
    (tmp_path / "lynx_carrier.py").write_text(PLUGIN)
    info = tmp_path / "lynx_carrier-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lynx-carrier\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[lynxproto.transports]\ncarrier = lynx_carrier:Carrier\nwrong = lynx_carrier:NoTransport\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "carrier" in schemes()

    async def main() -> None:
        async with await open_listener("carrier://here") as listener:
            client, server = await asyncio.gather(open_stream("carrier://here"), listener.accept())
            await client.send([memoryview(b"hello")])
            assert await receive_exactly(server, 5) == b"hello"
            await client.aclose()
            await server.aclose()

    run(main())
    with pytest.raises(ConfigError, match=r"lynx_carrier:NoTransport.*no Transport"):
        parse_url("wrong://x")
    with pytest.raises(UnknownTransportError, match=r"unknown scheme 'pigeon'; there are carrier://.*tcps://.*unix://"):
        parse_url("pigeon://x:1")
    carrier = type(get_transport("carrier"))
    assert register_transport("carrier")(carrier) is carrier
    for taken in ("carrier", "tcp"):
        with pytest.raises(ConfigError, match=f"{taken!r} is taken by"):
            register_transport(taken)(type("Other", (carrier,), {}))


def test_memory_connections_that_nobody_accepts_any_more() -> None:
    """Who connects while the listener closes sees an end; all who wait to accept hear of it."""

    async def main() -> None:
        from lynxproto.transports import open_listener, open_stream

        listener = await open_listener("memory://closing")
        waiting = [asyncio.ensure_future(listener.accept()) for _ in range(2)]
        await asyncio.sleep(0)
        async with await open_stream("memory://closing") as stream:  # it has not arrived yet
            await listener.aclose()
            for accepting in waiting:
                with pytest.raises(StreamClosedError):
                    await accepting
            assert await stream.receive_into(memoryview(bytearray(1))) == 0

    run(main())


def test_memory_listeners_of_loops_that_are_closed() -> None:
    from lynxproto.transports import open_listener, open_stream

    listener = asyncio.run(open_listener("memory://left"))
    with pytest.raises(TransportError, match="its event loop is closed"):
        asyncio.run(open_stream("memory://left"))
    asyncio.run(listener.aclose())
