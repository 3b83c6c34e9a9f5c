"""One suite that every transport passes: built in, shaped, or with (harmless) faults injected.

A new transport adds one line to ``KINDS``.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import ssl
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from lynxproto import Identity, LayerSpec, Manifest, connect, listen
from lynxproto.errors import StreamClosedError, TransportError
from lynxproto.transports import (
    ByteStream,
    Faults,
    Link,
    Listener,
    TokenBucket,
    client_context,
    open_listener,
    open_stream,
    server_context,
)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(bounded())


@dataclass(frozen=True)
class Kind:
    """A transport as the suite uses it. ``link`` makes the link for one side."""

    url: str
    link: Callable[[], Link | None] = lambda: None
    tls: bool = False
    insecure: bool = True
    #: Bytes that may be under way while the peer does not read: kernel buffers of both ends, and a piece.
    in_flight: int = 16 << 20
    #: Which of UCX's own transports may be used.
    ucx_tls: str = "all"


KINDS = {
    "memory": Kind("memory://contract", in_flight=2 << 20),
    "tcp-ipv4": Kind("tcp://127.0.0.1:0"),
    "tcp-ipv6": Kind("tcp://[::1]:0"),
    "unix": Kind("unix://{tmp}/lynx.sock", in_flight=2 << 20),
    "tcps": Kind("tcps://localhost:0", tls=True),
    "shaped": Kind("tcp://127.0.0.1:0", lambda: TokenBucket(8e8)),
    "faulty": Kind("tcp://127.0.0.1:0", lambda: Faults(1, piece=200_000, delay=(0.0, 2e-4))),
    "shaped-tcps": Kind("tcps://localhost:0", lambda: TokenBucket(8e8), tls=True),
}
if find_spec("ucxx"):  # the extra `ucx`, which CI installs
    KINDS |= {
        "ucx-tcp": Kind("ucx://127.0.0.1:0", in_flight=8 << 20, ucx_tls="tcp"),
        "ucx-sm": Kind("ucx://[::1]:0", in_flight=8 << 20, ucx_tls="sm"),
        "ucx-self": Kind("ucx://127.0.0.1:0", in_flight=8 << 20, ucx_tls="self,tcp"),
        "ucx-ticket": Kind("ucx://localhost:0", tls=True, insecure=False, in_flight=8 << 20, ucx_tls="sm,tcp"),
    }


@functools.cache
def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    cert = authority.issue_cert("localhost")
    cert.private_key_pem.write_to_path(folder / "key.pem")
    cert.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    files = {name: folder / f"{name}.pem" for name in ("ca", "certificate", "key")}
    return server_context(**files), client_context(**files)


class Transport:
    """Listens and connects by one kind."""

    def __init__(self, kind: Kind, tmp: Path, certificates: Path) -> None:
        self.kind = kind
        self.url = kind.url.format(tmp=tmp)
        self.server_tls, self.client_tls = contexts(certificates) if kind.tls else (None, None)

    def server(self) -> dict[str, Any]:
        return {"tls": self.server_tls, "link": self.kind.link(), "insecure": self.kind.insecure}

    def client(self) -> dict[str, Any]:
        return {"tls": self.client_tls, "link": self.kind.link(), "insecure": self.kind.insecure}

    def reachable(self, url: str) -> str:
        """``url`` by the name that the certificate has."""
        return url.replace("127.0.0.1", "localhost").replace("[::1]", "localhost") if self.kind.tls else url

    async def listen(self) -> Listener:
        return await open_listener(self.url, **self.server())

    async def connect(self, url: str) -> ByteStream:
        return await open_stream(self.reachable(url), **self.client())

    async def pair(self, listener: Listener) -> tuple[ByteStream, ByteStream]:
        """A client's and a server's stream; both have moved a byte, so that handshakes are done."""

        async def accept() -> ByteStream:
            stream = await listener.accept()
            await stream.send([memoryview(b"!")])
            assert await receive(stream, 1) == b"?"
            return stream

        async def dial() -> ByteStream:
            stream = await self.connect(listener.url)
            await stream.send([memoryview(b"?")])
            assert await receive(stream, 1) == b"!"
            return stream

        client, server = await asyncio.gather(dial(), accept())
        return client, server


@pytest.fixture(params=KINDS)
def transport(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Transport:
    return Transport(KINDS[request.param], tmp_path, tmp_path_factory.getbasetemp())


async def receive(stream: ByteStream, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view.nbytes:
        count = await stream.receive_into(view)
        if count == 0:
            raise AssertionError(f"the stream ended {view.nbytes} bytes early")
        view = view[count:]
    return bytes(data)


async def ends(stream: ByteStream) -> None:
    assert await stream.receive_into(memoryview(bytearray(8))) == 0


async def exchange(client: ByteStream, server: ByteStream, nbytes: int = 3_000_001) -> None:
    """Both directions at once, in oddly sized buffers of any kind."""
    up, down = os.urandom(nbytes), np.frombuffer(os.urandom(nbytes // 4 * 2), np.uint16)
    cuts = [0, 1, 1, 70, nbytes // 3, nbytes // 2, nbytes]
    parts = [memoryview(up)[a:b] for a, b in itertools.pairwise(cuts)]
    halves = [memoryview(down[:1000]), memoryview(down[1000:])]
    _, _, got_up, got_down = await asyncio.gather(
        client.send(parts), server.send(halves), receive(server, nbytes), receive(client, down.nbytes)
    )
    assert got_up == up
    assert got_down == down.tobytes()


def test_bytes_arrive_whole_and_in_order(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:
            assert not listener.url.endswith(":0")
            client, server = await transport.pair(listener)
            assert client.name
            assert server.name
            await exchange(client, server)
            await client.send([])
            await exchange(client, server, 1000)
            await client.aclose()
            await ends(server)
            await server.aclose()

    run(main())


def test_small_messages_back_and_forth(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:
            client, server = await transport.pair(listener)
            for number in range(50):
                await client.send([memoryview(number.to_bytes(4, "little")), memoryview(bytes(number))])
                got = await receive(server, 4 + number)
                assert int.from_bytes(got[:4], "little") == number
                await server.send([memoryview(got)])
                assert await receive(client, len(got)) == got
            await client.aclose()
            await server.aclose()

    run(main())


def test_after_send_eof_receiving_goes_on(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:
            client, server = await transport.pair(listener)
            await client.send([memoryview(b"goodbye")])
            await client.send_eof()
            await client.send_eof()
            assert await receive(server, 7) == b"goodbye"
            await ends(server)
            await ends(server)
            await server.send([memoryview(b"farewell")])
            await server.send_eof()
            assert await receive(client, 8) == b"farewell"
            await ends(client)
            await client.aclose()
            await client.aclose()
            with pytest.raises(StreamClosedError):
                await client.send_eof()
            await server.aclose()

    run(main())


def test_what_was_sent_before_the_end_arrives(transport: Transport) -> None:
    """Also what the peer has not read when this side is done."""

    async def main() -> None:
        async with await transport.listen() as listener:
            client, server = await transport.pair(listener)
            data = os.urandom(100_000)
            sending = asyncio.ensure_future(client.send([memoryview(data)]))
            first = await receive(server, 10)
            await sending
            await client.send_eof()
            assert first + await receive(server, len(data) - 10) == data
            await ends(server)
            await server.aclose()
            await ends(client)
            await client.aclose()

    run(main())


def test_closing_ends_what_waits_on_it(transport: Transport) -> None:
    async def main() -> None:
        listener = await transport.listen()
        client, server = await transport.pair(listener)
        receiving = asyncio.ensure_future(client.receive_into(memoryview(bytearray(1))))
        sending = asyncio.ensure_future(client.send([memoryview(bytes(64 << 20))]))
        accepting = asyncio.ensure_future(listener.accept())
        await asyncio.sleep(0.01)
        await client.aclose()
        await listener.aclose()
        for waiting in (receiving, sending, accepting):
            with pytest.raises(StreamClosedError):
                await waiting
        for again in (client.receive_into(memoryview(bytearray(1))), client.send([memoryview(b"x")])):
            with pytest.raises(StreamClosedError):
                await again
        with pytest.raises(StreamClosedError):
            await listener.accept()
        await listener.aclose()
        await server.aclose()

    run(main())


def test_few_bytes_are_under_way(transport: Transport) -> None:
    """A peer that does not read stops the sender soon: what has left can no longer be overtaken."""

    async def main() -> None:
        async with await transport.listen() as listener:
            client, server = await transport.pair(listener)
            piece = memoryview(bytes(256 << 10))
            sent = 0

            async def fill() -> None:
                nonlocal sent
                while True:
                    await client.send([piece])
                    sent += piece.nbytes

            filling = asyncio.ensure_future(fill())
            seen = -1
            while seen != sent:  # until it stands still
                seen = sent
                await asyncio.sleep(0.05)
                assert sent <= transport.kind.in_flight
            assert not filling.done()
            left = sent  # more follows as soon as there is room
            assert len(await receive(server, left)) == left
            await client.aclose()
            with pytest.raises(StreamClosedError):
                await filling
            await server.aclose()

    run(main())


def test_a_peer_that_is_gone_is_noticed(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:
            client, server = await transport.pair(listener)
            await server.aclose()

            async def fill() -> None:
                while True:
                    await client.send([memoryview(bytes(1 << 20))])

            with pytest.raises(TransportError):
                await fill()
            try:
                assert await client.receive_into(memoryview(bytearray(100))) == 0
            except TransportError:
                pass
            await client.aclose()

    run(main())


def test_many_streams_at_once(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:

            async def one() -> None:
                client, server = await transport.pair(listener)
                await client.aclose()
                await ends(server)
                await server.aclose()

            for _ in range(4):
                await one()
            streams = [await transport.pair(listener) for _ in range(8)]
            await asyncio.gather(*(exchange(client, server, 100_003) for client, server in streams))
            for client, server in streams:
                await client.aclose()
                await server.aclose()

    run(main())


def test_an_abandoned_accept_loses_no_peer(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await listener.accept()
            client, server = await transport.pair(listener)
            await exchange(client, server, 1000)
            await client.aclose()
            await server.aclose()

    run(main())


def test_sides_on_event_loops_of_their_own(transport: Transport) -> None:
    """As sessions are: each has its own I/O thread, also within one process."""
    data = os.urandom(2_000_003)
    url: asyncio.Queue[str] = asyncio.Queue()
    got = bytearray()

    async def serve(ready: Callable[[str], None]) -> None:
        async with await transport.listen() as listener:
            ready(listener.url)
            async with await listener.accept() as stream:
                got.extend(await receive(stream, len(data)))
                await stream.send([memoryview(b"thanks")])
                await ends(stream)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        thread = threading.Thread(
            target=lambda: run(serve(lambda u: loop.call_soon_threadsafe(url.put_nowait, u)))  # type: ignore[arg-type,return-value]  # call_soon_threadsafe returns a handle
        )
        thread.start()
        async with await transport.connect(await url.get()) as client:
            await client.send([memoryview(data)])
            assert await receive(client, 6) == b"thanks"
        await asyncio.to_thread(thread.join)

    run(main())
    assert got == data


def test_nobody_listens(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:
            url = listener.url
        with pytest.raises(TransportError, match=r"cannot connect to .*(listen|receiver)"):
            await transport.connect(url)

    run(main())


def test_an_address_that_is_taken(transport: Transport) -> None:
    async def main() -> None:
        async with await transport.listen() as listener:
            with pytest.raises(TransportError, match=f"cannot listen on .*{'taken|listens'}"):
                await open_listener(listener.url, **transport.server())

    run(main())


def test_descriptors_are_given_back(transport: Transport) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- counts descriptors; a Path adds nothing

    async def once() -> None:
        async with await transport.listen() as listener:
            client, server = await transport.pair(listener)
            await exchange(client, server, 1000)
            await client.aclose()
            await server.aclose()

    run(once())  # what stays for the process's life, if anything does
    before = descriptors()
    for _ in range(3):
        run(once())
    assert descriptors() == before


def test_a_session_runs_over_it(transport: Transport) -> None:
    tokens, heads, dim = 300, 2, 64
    layers = tuple(LayerSpec(index=i, kv_heads=heads, key_dim=dim, value_dim=dim, token_stop=tokens) for i in range(2))
    manifest = Manifest(
        identity=Identity(model="test/model", revision="1"),
        dtype="bfloat16",
        layers=layers,
        prompt_tokens=tokens,
        request_id="contract",
    )
    rng = np.random.default_rng(0)
    cache = {
        (layer.index, part): (
            rng.standard_normal((heads, tokens, dim)).astype(np.float32).view(np.uint32) >> 16
        ).astype(np.uint16)
        for layer in layers
        for part in layer.parts
    }

    async def main() -> None:
        async with (
            listen(transport.url, **transport.server()) as receiver,
            connect(transport.reachable(receiver.url), **transport.client()) as sender,
        ):
            outgoing = sender.open(manifest)
            for layer in layers:
                await outgoing.write(layer.index, *(cache[layer.index, part] for part in layer.parts))
            incoming = await anext(receiver)
            await asyncio.gather(outgoing.finish(), incoming.exact())
            for key, words in cache.items():
                assert np.array_equal(incoming.arrays[key], words)

    run(main())
