"""The two ends of sessions: who connects and who listens; their threads, and their peers. Lives on the I/O thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from lynxproto._incoming import Incoming
from lynxproto._io import IOThread, Signal, Workers
from lynxproto._journal import Journal
from lynxproto._options import Options
from lynxproto._outgoing import Outgoing
from lynxproto._peer import Peer
from lynxproto._stats import Snapshot
from lynxproto.access import address_of
from lynxproto.admission import Gate, Guest, neighbourhood
from lynxproto.config import Config
from lynxproto.connection import hello_session
from lynxproto.counters import Counters
from lynxproto.errors import (
    ConnectionClosedError,
    DeadlineError,
    ErrorCode,
    LimitError,
    LynxError,
    StreamClosedError,
    TransportError,
)
from lynxproto.frames import Error, control_frame
from lynxproto.linkpolicy import AutoPolicy
from lynxproto.manifest import Manifest
from lynxproto.policy import Policy
from lynxproto.transports import ByteStream, Listener, check_plaintext, open_listener, open_stream

__all__ = ["Client", "Endpoint", "Server"]

T = TypeVar("T")
_log = logging.getLogger("lynxproto")
#: Bytes of a HELLO at most, before a listener knows which session it belongs to.
_HELLO_BYTES: Final = (16 << 10) + 64
#: Seconds that telling a refused stranger why may take: its socket has room, or it is not told.
_TURN_AWAY_S: Final = 0.05


class Endpoint:
    """What both ends have: the I/O thread, the codec threads, the peers, and the transfers they offer."""

    def __init__(self, url: str, config: Config | None, options: Options) -> None:
        self.url = url
        self.config = config or Config()
        self.options = options
        self.io: IOThread | None = None
        self.peers: set[Peer] = set()
        self.closed = False
        self.draining = False
        self.finished = Counters()  # of sessions that are forgotten
        self.journal = Journal(options.observe)
        self.running: dict[str, Incoming] = {}
        self._closing = threading.Lock()
        self._offers: deque[Incoming] = deque()
        self._changed: Signal

    def start(self) -> None:
        """Start the threads."""
        if self.io is not None or self.closed:
            raise StreamClosedError("a session can be entered only once; call connect() or listen() again")
        self.io = IOThread("lynxproto-io")
        self.io.call(self._prepare)

    def _prepare(self) -> None:
        self.workers = Workers(self.options.threads or os.cpu_count() or 1)
        self._changed = Signal()

    def check_url(self) -> None:
        """Raise :class:`~lynxproto.errors.ConfigError` for a URL that is none, or plaintext that nobody asked for."""
        options = self.options
        check_plaintext(self.url, insecure=options.insecure, tls=options.tls is not None)

    def thread(self) -> IOThread:
        """The I/O thread. Raises :class:`~lynxproto.errors.StreamClosedError` outside ``with``."""
        if self.io is None or self.closed:
            raise StreamClosedError("the session is not open: use it inside `with`")
        return self.io

    def offer(self, incoming: Incoming) -> None:
        """A transfer was accepted: hand it to whoever iterates."""
        self._offers.append(incoming)
        self._changed.notify()

    def on_over(self, peer: Peer) -> None:
        """A session ended."""
        self._changed.notify()

    def take(self) -> Incoming | None:
        """The next incoming transfer, if there is one. From any thread: a caller who gives up waiting takes none."""
        try:
            taken = self._offers.popleft()
        except IndexError:
            return None
        if self.draining and self.io is not None:
            self.io.loop.call_soon_threadsafe(self._changed.notify)
        return taken

    async def offered(self) -> bool:
        """Return when there is something to take; False once nothing will come any more."""
        await self._changed.until(lambda: bool(self._offers) or self.exhausted())
        return bool(self._offers)

    def exhausted(self) -> bool:
        """Whether no more transfers can come."""
        return self.closed

    async def drain(self) -> None:
        """Refuse new sessions and transfers, and return when no transfer is open. Sessions may still resume."""
        self.draining = True
        await asyncio.gather(*(peer.drained() for peer in self.peers))
        await self._changed.until(lambda: not self._offers)

    def snapshot(self) -> Snapshot:
        """Counters and gauges now."""
        total = Snapshot(handshakes=self.handshakes(), sessions=sum(not peer.over for peer in self.peers))
        total.counters.add(self.finished)
        for peer in self.peers:
            total.counters.add(peer.connection.counters)
            total.outgoing += len(peer.outgoing)
            total.incoming += len(peer.incoming)
            if not peer.over:
                total.credit = [a + b for a, b in zip(total.credit, peer.connection.credit(), strict=True)]
                total.unapplied = [a + b for a, b in zip(total.unapplied, peer.connection.unapplied(), strict=True)]
        return total

    def handshakes(self) -> int:
        """Byte streams whose peers have not yet proved who they are."""
        return 0

    async def shut(self) -> None:
        """Close the peers (on the I/O thread)."""
        self.closed = True
        self._changed.notify()
        await asyncio.gather(*(peer.aclose() for peer in self.peers))
        self.peers.clear()

    def close(self) -> None:
        """End everything. Blocks, also while another caller is at it; not to be called on the I/O thread."""
        with self._closing:
            if self.io is not None:
                self.io.submit(self.shut()).result()
                self.workers.stop()
                self.io.stop()
                self.io = None


class Client(Endpoint):
    """The end that connects."""

    peer: Peer

    async def _dial(self) -> ByteStream:
        options = self.options
        try:
            async with asyncio.timeout(options.connect_timeout):
                return await open_stream(self.url, tls=options.tls, link=options.link, insecure=options.insecure)
        except TimeoutError as error:
            raise TransportError(
                f"cannot connect to {self.url}: no answer within {options.connect_timeout:g} s; "
                "check host, port and firewall"
            ) from error

    async def open(self) -> None:
        """Connect and shake hands."""
        self.check_url()
        self.peer = Peer(self, dial=self._dial)
        self.peers.add(self.peer)
        await self.peer.establish()

    def offer_out(
        self, manifest: Manifest, policy: Policy | AutoPolicy | None, deadline: float, resume: bytes | None
    ) -> Outgoing:
        """Offer a transfer (on the I/O thread)."""
        return self.peer.open(manifest, policy, deadline, resume=resume)

    def exhausted(self) -> bool:
        return self.closed or self.peer.over


class Server(Endpoint):
    """The end that listens."""

    def __init__(self, url: str, config: Config | None, options: Options) -> None:
        super().__init__(url, config, options)
        self.gate = Gate(self.config.admission)
        self._listener: Listener
        self._accepting: asyncio.Task[None] | None = None
        self._greeting: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen."""
        self.check_url()
        options = self.options
        self._listener = await open_listener(self.url, tls=options.tls, link=options.link, insecure=options.insecure)
        self.url = self._listener.url
        self._accepting = asyncio.get_running_loop().create_task(self._accept())
        self.journal.tell(logging.INFO, "listening", f"listening on {self.url}", url=self.url)

    async def _accept(self) -> None:
        while True:
            try:
                stream = await self._listener.accept()
            except StreamClosedError:
                return
            except TransportError as error:  # out of file descriptors, for example: others may still be served
                _log.warning("%s", error)
                await asyncio.sleep(0.1)
                continue
            now = time.monotonic()
            try:
                guest = self.gate.knock(neighbourhood(address_of(stream.name)), now, lambda: None)
            except LimitError as error:
                self.journal.handshake_failed(stream.name, error, now, stage="accept")
                if stream.name.startswith("tcps://"):  # it could be told only after a handshake
                    await stream.aclose()
                else:
                    await _turn_away(stream, error.code, str(error))
                continue
            self._start(self._greet(stream, guest))
            await asyncio.sleep(0)  # it begins before the next is taken, and the loop stays fair in a flood

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)
        return task

    async def _greet(self, stream: ByteStream, guest: Guest) -> None:
        """Read a HELLO, to learn which session the stream belongs to."""
        task = asyncio.current_task()
        assert task is not None
        guest.evict = lambda: bool(task.cancel())
        received = bytearray()
        timeout = min(self.config.handshake_timeout, self.config.peer_timeout)
        try:
            buffer = memoryview(bytearray(_HELLO_BYTES))
            async with asyncio.timeout(timeout):
                while (session := hello_session(received)) is None:
                    count = await stream.receive_into(buffer[len(received) :])
                    if count == 0:
                        raise ConnectionClosedError(f"{stream.name} hung up before its HELLO")
                    received += buffer[len(received) : len(received) + count]
        except (LynxError, TimeoutError) as error:
            late = DeadlineError(f"{stream.name} sent no HELLO within {timeout:g} s")
            failure = late if type(error) is TimeoutError else error
            self.journal.handshake_failed(stream.name, failure, time.monotonic(), stage="hello")
            self.gate.leave(guest)
            await stream.aclose()
            return
        except BaseException:
            if not self.closed:  # evicted
                full = LimitError("too many strangers at the door; others came later")
                self.journal.handshake_failed(stream.name, full, time.monotonic(), stage="hello")
            self.gate.leave(guest)
            await stream.aclose()
            raise
        peer = next((p for p in self.peers if session and p.connection.session == session), None)
        if peer is not None and not peer.admits(stream):
            _log.warning("%s asks for a session of %s: refused", stream.name, peer.principal.name)
            peer = None
        if self.draining and (peer is None or peer.over):
            await _turn_away(stream, ErrorCode.SHUTDOWN, "shutting down; connect to another")
            self.gate.leave(guest)
            return
        if peer is None:  # a new session; or one that is over, which the new connection will say
            peer = Peer(self, gate=self.gate)
            self.peers.add(peer)
        peer.attach(stream, bytes(received), guest)

    def on_over(self, peer: Peer) -> None:
        if not self.closed:
            self._start(self._forget(peer))

    async def _forget(self, peer: Peer) -> None:
        await peer.aclose()
        if peer in self.peers:
            self.peers.discard(peer)
            self.finished.add(peer.connection.counters)

    def handshakes(self) -> int:
        return self.gate.handshakes

    async def shut(self) -> None:
        self.closed = True
        if self._accepting is not None:
            await self._listener.aclose()
            await self._accepting
            for task in list(self._greeting):
                task.cancel()
            await asyncio.gather(*self._greeting, return_exceptions=True)
        await super().shut()


async def _turn_away(stream: ByteStream, code: ErrorCode, text: str) -> None:
    """Say why, if the stream takes it at once, and close it."""
    with contextlib.suppress(LynxError, TimeoutError):
        async with asyncio.timeout(_TURN_AWAY_S):
            await stream.send([memoryview(control_frame(Error(code=code, text=text)))])
    await stream.aclose()
