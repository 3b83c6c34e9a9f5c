"""``ucx://host:port``: a byte stream over UCX (RDMA, shared memory, TCP: what ``UCX_TLS`` allows).

A control connection over TCP comes first, to ``host:port``. It carries both workers' addresses and a random tag for
each direction, and then nothing: its end tells at once that the peer is gone, which UCX does not on every device. With
a TLS context it is TLS, so that only who was authenticated knows the tags; the data that UCX carries are not encrypted.

Each message is a piece of the stream, cut for the device: one packet, or, where bytes can land in place, a long one
that stays with the sender until the receiver names its place. What comes before anybody receives waits in UCX, up to a
window that the receiver's confirmations open. A message's header is the receiver's tag and, but for confirmations, the
message's number; two bits of the tag say what it is:

| kind | length | message |
|---|---|---|
| 0 | 1 to 512 KiB | bytes of the stream |
| 1 | 0 | this side has read another 512 KiB, each message counted with 512 bytes more |
| 2 | 0 | the stream ends here |
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from lynxproto.errors import ConfigError, StreamClosedError, TransportError
from lynxproto.transports._ucxloop import TURN_NS, Bell, LoopWorker, spin_ns
from lynxproto.transports._ucxx import (
    BUSY,
    COST,
    END,
    KIND,
    LONG,
    PIECE,
    QUIET,
    SETTINGS,
    SHORTEST,
    WINDOW,
    Endpoint,
    Operation,
    require_ucxx,
)
from lynxproto.transports.abc import Address, ByteStream, Credentials, Listener, Setup, Transport
from lynxproto.transports.tcp import connect_tcp, listen_tcp
from lynxproto.transports.tls import TLSListener, TLSStream

if TYPE_CHECKING:
    from lynxproto.digest import Sums

__all__ = ["UCXStream", "UCXTransport"]

#: Buffers up to this size are joined with their neighbours, up to this size.
_JOINED: Final = 4 << 10
#: Bytes of one buffer that are given to UCX at a time.
_PART: Final = 1 << 20
#: Bytes, counted as in the window, that may be under way when a send returns: what has left no anchor can overtake.
_LEFT: Final = 1 << 20
_MAGIC: Final = b"LYNXUCX5"
#: Magic, tag, a digest of UCX's settings, bytes of the worker's address, which follows.
_HELLO: Final = struct.Struct("<8sQII")
_ADDRESS_BYTES: Final = 64 << 10

#: Seconds after a failed operation in which the control connection says whether the peer is gone.
_VERDICT_S: Final = 1.0


class UCXStream(ByteStream):
    """A stream over UCX, set up through ``control``, which it owns. The server's side is set up on first use."""

    def __init__(self, control: ByteStream) -> None:
        self._control = control
        self._mine = secrets.randbits(62) << 2
        self._worker = LoopWorker.acquire(self, self._mine)
        self._state = self._worker.ucx.open_stream(self._mine)
        self._endpoint: Endpoint | None = None
        self._setting_up = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self._gone: str | None = None  # why the peer is; "" if it hung up
        self._cut = False  # UCX can carry nothing more
        # receiving
        self._coming = Bell()
        self._rest = memoryview(b"")  # of a message longer than the caller's buffer
        self._spare: bytearray | None = None  # where that is
        # sending
        self._allowed = Bell()
        self._eof_sent = False

    @property
    def name(self) -> str:
        """The peer's address, for messages."""
        return "ucx" + self._control.name[self._control.name.index(":") :]

    @property
    def credentials(self) -> Credentials:
        """Who the peer is, as the control connection knows."""
        return self._control.credentials

    # --- setting up

    async def set_up(self) -> None:
        """Exchange addresses and tags with the peer, unless that is done."""
        async with self._setting_up:
            self._check()
            if self._endpoint is None:
                address, settings = self._worker.ucx.address, self._worker.ucx.settings
                hello = _HELLO.pack(_MAGIC, self._mine, settings, len(address)) + address
                await self._control.send([memoryview(hello)])
                magic, theirs, other_settings, nbytes = _HELLO.unpack(await self._read_control(_HELLO.size))
                if magic != _MAGIC or nbytes > _ADDRESS_BYTES or theirs & KIND:
                    other = magic[:-1] == _MAGIC[:-1] and magic != _MAGIC
                    raise TransportError(
                        f"{self.name} {'speaks another version of' if other else 'does not speak'} ucx://"
                    )
                if other_settings != settings:
                    raise TransportError(
                        f"{self.name} has other settings of UCX, which would write past memory; give both sides the "
                        f"same UCX_{', UCX_'.join(SETTINGS)}"
                    )
                peer = await self._read_control(nbytes)
                self._check()
                self._endpoint = self._worker.ucx.connect(peer)
                self._worker.ucx.direct(self._state, self._endpoint, theirs)
                self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _read_control(self, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        view = memoryview(data)
        while view.nbytes:
            count = await self._control.receive_into(view)
            if count == 0:
                raise TransportError(f"{self.name} hung up before the UCX stream was set up; does it speak ucx://?")
            view = view[count:]
        return bytes(data)

    async def _watch(self) -> None:
        """The control connection's end is the peer's."""
        try:
            while await self._control.receive_into(memoryview(bytearray(1))):
                pass
            gone = ""
        except TransportError as error:
            gone = str(error)
        except StreamClosedError:
            return
        self._worker.nudge()  # what has arrived before
        self._break_off(gone)

    def _break_off(self, gone: str | None = None) -> None:
        """Nothing more will come or go: whoever waits is told. Short messages that have arrived can still be read."""
        if self._gone is None:
            self._gone = gone
        if self._endpoint is not None and not self._cut:
            self._cut = True
            self._worker.ucx.cut(self._state)
            self._endpoint.close()
            self._worker.settle()
        self._worker.ring(self._coming)
        self._worker.ring(self._allowed)

    async def _failed(self, reason: str) -> None:
        """An operation did: raise why. Returns if it is because the peer hung up."""
        self._check()
        if self._gone is None and self._watching is not None:  # the control connection knows better, in a moment
            await asyncio.wait((self._watching,), timeout=_VERDICT_S)
        if self._gone != "":
            self._break_off()
            raise self._broken(reason)

    def _check(self) -> None:
        if self._closed:
            raise StreamClosedError(f"the stream to {self.name} was closed by this side")

    def _broken(self, reason: str) -> TransportError:
        self._check()
        return TransportError(f"the link to {self.name} broke: {self._gone or reason}")

    def _usable(self) -> None:
        """Raise unless UCX can still carry something."""
        self._check()
        if self._endpoint is None or self._cut:
            raise self._broken("the peer hung up")

    async def _begin(self) -> None:
        """Of a call, if it is the first, or other tasks of the loop have waited for long."""
        if self._endpoint is None:
            await self.set_up()
        await self._worker.take_turns()
        self._check()

    async def _over(self, operation: Operation) -> None:
        """Wait for ``operation`` on the caller's buffer. Cancelled, it breaks the stream, which ends all of them."""
        operation.bell = Bell()
        try:
            await self._worker.until(lambda: operation.done, operation.bell, operation)
        except asyncio.CancelledError:
            self._break_off()
            raise

    async def _finish(self, operations: Sequence[Operation]) -> None:
        """Wait for operations on the caller's buffers. If one fails all end, and this raises."""
        for operation in operations:
            if not operation.done and not self._worker.complete(operation):
                await self._over(operation)
        for operation in operations:
            if (error := operation.error) is not None:
                await self._failed(error)
                raise self._broken("the peer hung up")

    # --- receiving

    def news(self) -> None:
        """See :class:`Receiver`."""
        if (why := self._worker.ucx.refused(self._state)) is not None:
            self._break_off(why)
        self._worker.ring(self._coming)
        self._worker.ring(self._allowed)

    async def receive_into(self, buffer: memoryview, sums: Sums | None = None) -> int:
        """See :meth:`ByteStream.receive_into`. Cancelling it may break the stream. ``sums``: to be added to."""
        if self._endpoint is None or monotonic_ns() - self._worker.turned_ns > TURN_NS:
            await self._begin()
        count = await self._receive(buffer if sums is None else buffer[:PIECE]) if not self._rest else -1
        if count < 0:
            count = min(buffer.nbytes, len(self._rest))
            buffer[:count] = self._rest[:count]
            self._rest = self._rest[count:]
        if sums is not None:
            sums.add(sums.there + count)
        return count

    async def _receive(self, buffer: memoryview) -> int:
        """Into ``buffer``; 0 at the end, and -1 if what comes next is longer, and is the rest now."""
        state, worker = self._state, self._worker
        while state.count or not state.ended:
            if self._cut and not state.count:
                await self._failed("the peer hung up")
                return 0
            operation, outcome = worker.receive(state, buffer)
            if operation.state.status:  # it is not over, or failed
                await self._finish((operation,))
                worker.ucx.confirm(state, operation)
            nbytes = operation.nbytes
            worker.free(operation)
            if nbytes:
                return nbytes
            self._check()
            if outcome == LONG:
                if self._spare is None:
                    self._spare = bytearray(PIECE)
                spare = memoryview(self._spare)[: worker.ucx.next(state)]
                self._rest = spare[: await self._receive(spare)]
                return -1
            if outcome == BUSY:
                await worker.take_turns()
                self._check()
            elif outcome == QUIET and not state.count and not state.ended and not self._cut:
                state.receiver_waits = 1
                try:
                    await worker.sleep(self._coming)
                finally:
                    state.receiver_waits = 0
                self._check()
        return 0

    async def receive_summed(self, sums: Sums) -> int:
        """See :meth:`ByteStream.receive_summed`."""
        return await self.receive_into(sums.data[sums.there :], sums)

    # --- sending

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`. Cancelling it breaks the stream."""
        if self._endpoint is None or monotonic_ns() - self._worker.turned_ns > TURN_NS:
            await self._begin()
        self._usable()
        if len(buffers) == 1 and self._state.unconfirmed + _most(buffers[0].nbytes) <= WINDOW:  # without a list of one
            operation = self._worker.send(self._state, buffers[0])
            if operation.state.status:  # it is not over, or failed
                await self._finish((operation,))
            self._worker.free(operation)
        else:
            await self._send_all(buffers)
        if self._state.unconfirmed > _LEFT:
            try:
                await self._allow(WINDOW - _LEFT)
            except asyncio.CancelledError:
                self._break_off()
                raise

    async def _send_all(self, buffers: Sequence[memoryview]) -> None:
        worker, state = self._worker, self._state
        operation = worker.begin()
        try:
            for data in _parts(buffers):
                if state.unconfirmed + (most := _most(data.nbytes)) > WINDOW:
                    await self._allow(most)
                self._usable()
                worker.add(operation, state, data)
        except asyncio.CancelledError:
            self._break_off()
            raise
        finally:
            await self._finish((operation,))
        worker.free(operation)

    async def send_eof(self) -> None:
        """See :meth:`ByteStream.send_eof`."""
        if self._endpoint is None or monotonic_ns() - self._worker.turned_ns > TURN_NS:
            await self._begin()
        if not self._eof_sent:
            self._usable()
            self._eof_sent = True
            operation = self._worker.start(self._worker.ucx.tell(self._state, END))
            await self._finish((operation,))

    async def _allow(self, cost: int) -> None:
        """Return when so much more may be under way."""
        state = self._state
        state.sender_waits = 1
        try:
            await self._worker.until(
                lambda: state.unconfirmed + cost <= WINDOW or self._cut or self._closed, self._allowed
            )
        finally:
            state.sender_waits = 0
        if self._cut or self._closed:
            await self._failed("the peer hung up")

    async def aclose(self) -> None:
        """See :meth:`ByteStream.aclose`."""
        if self._closed:
            return
        self._closed = True
        self._break_off()
        self._endpoint = None
        self._worker.ucx.close_stream(self._state)
        await self._control.aclose()
        if self._watching is not None:
            with suppress(asyncio.CancelledError):
                self._watching.cancel()
        self._worker.release(self._mine)


def _most(nbytes: int) -> int:
    """What so many bytes count at most, cut into messages."""
    return nbytes + (nbytes // SHORTEST + 1) * COST


def _parts(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    """``buffers`` as they are to be sent: short neighbours joined, the rest as it lies."""
    short: list[memoryview] = []
    room = _JOINED
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if short and view.nbytes > room:
            yield short[0] if len(short) == 1 else memoryview(b"".join(short))
            short, room = [], _JOINED
        if view.nbytes > _JOINED:
            for start in range(0, view.nbytes, _PART):
                yield view[start : start + _PART]
        elif view.nbytes:
            short.append(view)
            room -= view.nbytes
    if short:
        yield short[0] if len(short) == 1 else memoryview(b"".join(short))


async def _over_control(control: ByteStream) -> UCXStream:
    """A stream that is not set up. Raises :class:`~lynxproto.errors.TransportError` if UCX cannot be used here."""
    try:
        return UCXStream(control)
    except BaseException:
        await control.aclose()
        raise


class UCXListener(Listener):
    """Sets UCX streams up over the control connections that ``listener``, which it owns, accepts."""

    def __init__(self, listener: Listener, over: Callable[[ByteStream], ByteStream]) -> None:
        self._listener = listener
        self._over = over

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return "ucx" + self._listener.url[self._listener.url.index(":") :]

    async def accept(self) -> ByteStream:
        """See :meth:`Listener.accept`."""
        return self._over(await _over_control(await self._listener.accept()))

    async def aclose(self) -> None:
        """See :meth:`Listener.aclose`."""
        await self._listener.aclose()


class UCXTransport(Transport):
    """``ucx://host:port``. Not encrypted, so it needs ``insecure``; a TLS context authenticates the peers."""

    address = "HOST:PORT"
    tickets = True

    async def connect(self, address: Address, setup: Setup) -> ByteStream:
        """See :meth:`Transport.connect`."""
        _check(setup)
        try:
            control = await connect_tcp(address.host, address.port)
        except TransportError as error:
            raise TransportError(str(error).replace("tcp://", "ucx://")) from error
        if setup.tls is not None:
            control = TLSStream(control, setup.tls, server_hostname=address.host)
        stream = await _over_control(control)
        try:
            await stream.set_up()
        except BaseException:
            await stream.aclose()
            raise
        return setup.stream_through_link(stream)

    async def listen(self, address: Address, setup: Setup) -> Listener:
        """See :meth:`Transport.listen`."""
        _check(setup)
        try:
            listener = await listen_tcp(address.host, address.port)
        except TransportError as error:
            raise TransportError(str(error).replace("tcp://", "ucx://")) from error
        if setup.tls is not None:
            listener = TLSListener(listener, setup.tls)
        return UCXListener(listener, setup.stream_through_link)


def _check(setup: Setup) -> None:
    if not setup.insecure and setup.tls is None:
        raise ConfigError(
            "UCX does not encrypt: whoever is on the way can read and change what ucx:// carries; use tcps://, or a "
            "TLS context (tls=, --ca...), which authenticates both sides, or say that you want this (insecure=True, "
            "--insecure)"
        )
    require_ucxx()
    spin_ns()
