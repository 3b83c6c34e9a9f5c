"""``ucx://host:port``: a byte stream over UCX (RDMA, shared memory, TCP: what ``UCX_TLS`` allows).

A control connection over TCP comes first, to ``host:port``. It carries both workers' addresses and a random tag for
each direction, and then nothing: its end tells at once that the peer is gone, which UCX does not on every device. With
a TLS context it is TLS, so that only who was authenticated knows the tags; the data that UCX carries are not encrypted.

The stream is cut into packets: a head of fixed size, which holds short buffers itself, and perhaps a body. So a reader
knows each message's size before it comes and can name the buffer it is to land in; UCX copies nothing that it need not.

| offset | size | head |
|---|---|---|
| 0 | 4 | bytes of the head that belong to the stream |
| 4 | 4 | bytes of the body that follows, 0: none |
| 8 | 4 | 1: the stream ends here |
| 12 | 500 | the bytes |
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import ClassVar, Final
from weakref import WeakKeyDictionary

from lynxproto.errors import ConfigError, StreamClosedError, TransportError
from lynxproto.transports._ucxx import Endpoint, Operation, Worker, require_ucxx
from lynxproto.transports.abc import Address, ByteStream, Credentials, Listener, Setup, Transport
from lynxproto.transports.tcp import connect_tcp, listen_tcp
from lynxproto.transports.tls import TLSListener, TLSStream

__all__ = ["UCXStream", "UCXTransport"]

_HEAD: Final = struct.Struct("<III")
_HEAD_BYTES: Final = 512
_INLINE: Final = _HEAD_BYTES - _HEAD.size
#: Bytes of a body at most: what may have to be received before somebody names a buffer for it.
BODY_BYTES: Final = 1 << 20
#: Bytes, heads included, that may be under way without the peer's confirmation that it read them.
WINDOW: Final = 4 << 20
_CONFIRM: Final = WINDOW // 4
_CONFIRMED: Final = struct.Struct("<Q")
#: Heads that wait for packets, so that short ones land without being held by UCX first.
_POSTED: Final = 4
#: Tags of a stream: its random number, and what the message is.
_TAG_HEAD, _TAG_BODY, _TAG_CONFIRM = 0, 1, 2

_MAGIC: Final = b"LYNXUCX1"
_HELLO: Final = struct.Struct("<8sQI")
_ADDRESS_BYTES: Final = 64 << 10

#: Seconds after a failed operation in which the control connection says whether the peer is gone.
_VERDICT_S: Final = 1.0
#: Rounds of progress before other tasks of the loop get their turn.
_ROUNDS = 16


class _LoopWorker:
    """A UCX worker on an event loop; shared by its streams, closed with the last of them."""

    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWorker]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.ucx = Worker()
        self._loop = asyncio.get_running_loop()
        self._users = 0
        self._waiting: dict[Operation, asyncio.Future[None] | None] = {}
        self._scheduled: asyncio.Handle | None = None
        self._loop.add_reader(self.ucx.fileno, self._progress)

    @classmethod
    def acquire(cls) -> _LoopWorker:
        """The running loop's worker. Goes with :meth:`release`."""
        loop = asyncio.get_running_loop()
        worker = cls._all.get(loop)
        if worker is None:
            worker = cls._all[loop] = cls()
        worker._users += 1
        return worker

    def release(self) -> None:
        """One user less."""
        self._users -= 1
        if self._users == 0:
            del self._all[self._loop]
            self._loop.remove_reader(self.ucx.fileno)
            if self._scheduled is not None:
                self._scheduled.cancel()
            self.ucx.close()

    async def until_done(self, operation: Operation) -> None:
        """Return when ``operation`` is over, well or not."""
        if not operation.done:
            self.nudge()
        if not operation.done:
            future = self._waiting[operation] = self._loop.create_future()
            try:
                await future
            finally:
                self.keep(operation)

    def keep(self, operation: Operation) -> None:
        """Hold on to ``operation`` and its buffer until it is over."""
        if operation.done:
            self._waiting.pop(operation, None)
        else:
            self._waiting[operation] = None

    def nudge(self) -> None:
        """Make progress now, and soon listen to UCX's descriptor again."""
        self.ucx.progress()
        self._settle()
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        for _ in range(_ROUNDS):
            self.ucx.progress()
            self._settle()
            if self.ucx.arm():
                return
        self._scheduled = self._loop.call_soon(self._progress)

    def _settle(self) -> None:
        over = [operation for operation in self._waiting if operation.done]
        for operation in over:
            future = self._waiting.pop(operation)
            if future is not None and not future.done():
                future.set_result(None)


class UCXStream(ByteStream):
    """A stream over UCX, set up through ``control``, which it owns. The server's side is set up on first use."""

    def __init__(self, control: ByteStream) -> None:
        self._control = control
        self._worker = _LoopWorker.acquire()
        self._mine = secrets.randbits(62) << 2
        self._theirs = 0
        self._endpoint: Endpoint | None = None
        self._setting_up = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self._gone: str | None = None  # why the peer is; "" if it hung up
        self._cut = False  # UCX can carry nothing more
        # receiving
        self._posted: deque[tuple[Operation, bytearray]] = deque()
        self._inline = memoryview(b"")
        self._inline_of: bytearray | None = None
        self._body = 0
        self._ended = False
        self._read = 0
        self._confirmed = 0
        # sending
        self._heads: list[bytearray] = []
        self._sent = 0
        self._acknowledged = 0
        self._confirmation: tuple[Operation, bytearray] | None = None
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
            if self._endpoint is None:
                self._check()
                address = self._worker.ucx.address
                await self._control.send([memoryview(_HELLO.pack(_MAGIC, self._mine, len(address)) + address)])
                magic, self._theirs, nbytes = _HELLO.unpack(await self._read_control(_HELLO.size))
                if magic != _MAGIC or nbytes > _ADDRESS_BYTES or self._theirs & 3:
                    raise TransportError(f"{self.name} does not speak ucx://")
                peer = await self._read_control(nbytes)
                self._check()
                endpoint = self._endpoint = self._worker.ucx.connect(peer)
                for _ in range(_POSTED):
                    self._post(endpoint, bytearray(_HEAD_BYTES))
                self._await_confirmation(endpoint)
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
            self._gone = ""
        except TransportError as error:
            self._gone = str(error)
        except StreamClosedError:
            return
        self._worker.nudge()  # what has arrived before
        self._break_off()

    def _break_off(self) -> None:
        """Nothing more will come or go: whoever waits is told. Heads that have arrived can still be read."""
        if self._endpoint is not None and not self._cut:
            self._cut = True
            self._endpoint.close()
            self._worker.nudge()

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

    def _usable(self) -> Endpoint:
        """The endpoint, if UCX can still carry something."""
        self._check()
        if self._endpoint is None or self._cut:
            raise self._broken("the peer hung up")
        return self._endpoint

    # --- receiving

    def _post(self, endpoint: Endpoint, head: bytearray) -> None:
        self._posted.append((endpoint.receive(memoryview(head), self._mine | _TAG_HEAD), head))

    async def receive_into(self, buffer: memoryview) -> int:
        """See :meth:`ByteStream.receive_into`. Cancelling it may break the stream."""
        await self.set_up()
        while True:
            self._check()
            if self._inline.nbytes:
                return self._take_inline(buffer)
            if self._body:
                return await self._receive_body(buffer)
            if self._ended or not await self._next_head():
                return 0

    async def _next_head(self) -> bool:
        """Take the next head in; False if the peer has hung up instead."""
        if not self._posted:
            await self._failed("the peer hung up")
            return False
        operation, head = self._posted[0]
        await self._worker.until_done(operation)
        self._check()
        if (error := operation.error) is not None:
            await self._failed(error)
            return False
        self._posted.popleft()
        inline, self._body, end = _HEAD.unpack_from(head)
        if inline > _INLINE or self._body > BODY_BYTES or end > 1:
            self._break_off()
            raise self._broken("a packet with impossible sizes")
        self._inline, self._inline_of = memoryview(head)[_HEAD.size : _HEAD.size + inline], head
        self._ended = end == 1
        self._read += _HEAD_BYTES
        if not inline:
            self._repost()
        return True

    def _repost(self) -> None:
        """The bytes of a head have been read: its memory is free for another."""
        head, self._inline_of = self._inline_of, None
        self._inline = memoryview(b"")
        if head is not None and not self._cut:
            self._post(self._usable(), head)
        self._confirm()

    def _take_inline(self, buffer: memoryview) -> int:
        count = min(buffer.nbytes, self._inline.nbytes)
        buffer[:count] = self._inline[:count]
        self._inline = self._inline[count:]
        if not self._inline.nbytes and self._inline_of is not None:
            self._repost()
        return count

    async def _receive_body(self, buffer: memoryview) -> int:
        """Into ``buffer`` if there is room, else into memory of the stream's own, from which it is read later."""
        nbytes, self._body = self._body, 0
        fits = buffer.nbytes >= nbytes
        target = buffer[:nbytes] if fits else memoryview(bytearray(nbytes))
        await self._complete([self._usable().receive(target, self._mine | _TAG_BODY)])
        self._read += nbytes
        self._confirm()
        if fits:
            return nbytes
        self._inline = target
        return self._take_inline(buffer)

    def _confirm(self) -> None:
        if self._read - self._confirmed >= _CONFIRM and not self._cut:
            self._confirmed = self._read
            word = memoryview(_CONFIRMED.pack(self._read))
            self._worker.keep(self._usable().send(word, self._theirs | _TAG_CONFIRM))

    async def _complete(self, operations: Sequence[Operation]) -> None:
        """Wait for operations on the caller's buffers: none is under way when this returns or raises."""
        try:
            for operation in operations:
                await self._worker.until_done(operation)
        except asyncio.CancelledError:
            self._break_off()
            raise
        for operation in operations:
            if (error := operation.error) is not None:
                await self._failed(error)
                raise self._broken("the peer hung up")

    # --- sending

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`. Cancelling it breaks the stream."""
        await self.set_up()
        self._check()
        used: list[bytearray] = []
        operations: list[Operation] = []
        try:
            for parts, body in _packets(buffers):
                await self._credit(_HEAD_BYTES + (0 if body is None else body.nbytes))
                endpoint = self._usable()
                head = self._heads.pop() if self._heads else bytearray(_HEAD_BYTES)
                used.append(head)
                end = _HEAD.size
                for part in parts:
                    head[end : end + part.nbytes] = part
                    end += part.nbytes
                _HEAD.pack_into(head, 0, end - _HEAD.size, 0 if body is None else body.nbytes, 0)
                operations.append(endpoint.send(memoryview(head), self._theirs | _TAG_HEAD))
                if body is not None:
                    operations.append(endpoint.send(body, self._theirs | _TAG_BODY))
        finally:
            await self._complete(operations)
        self._heads += used

    async def send_eof(self) -> None:
        """See :meth:`ByteStream.send_eof`."""
        await self.set_up()
        self._check()
        if not self._eof_sent:
            self._eof_sent = True
            await self._credit(_HEAD_BYTES)
            head = bytearray(_HEAD_BYTES)
            _HEAD.pack_into(head, 0, 0, 0, 1)
            await self._complete([self._usable().send(memoryview(head), self._theirs | _TAG_HEAD)])

    def _await_confirmation(self, endpoint: Endpoint) -> None:
        word = bytearray(_CONFIRMED.size)
        self._confirmation = endpoint.receive(memoryview(word), self._mine | _TAG_CONFIRM), word

    async def _credit(self, nbytes: int) -> None:
        """Return when ``nbytes`` more may be under way."""
        while self._sent + nbytes - self._acknowledged > WINDOW:
            assert self._confirmation is not None
            operation, word = self._confirmation
            await self._worker.until_done(operation)
            if (error := operation.error) is not None:
                await self._failed(error)
            endpoint = self._usable()
            (self._acknowledged,) = _CONFIRMED.unpack(word)
            self._await_confirmation(endpoint)
        self._sent += nbytes

    async def aclose(self) -> None:
        """See :meth:`ByteStream.aclose`."""
        if self._closed:
            return
        self._closed = True
        self._break_off()
        self._endpoint = None
        self._posted.clear()
        self._confirmation = None
        await self._control.aclose()
        if self._watching is not None:
            with suppress(asyncio.CancelledError):
                self._watching.cancel()
        self._worker.release()


def _packets(buffers: Sequence[memoryview]) -> Iterator[tuple[list[memoryview], memoryview | None]]:
    """Cut ``buffers`` into packets: what the head holds, and the body."""
    parts: list[memoryview] = []
    room = _INLINE
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if view.nbytes <= room:
            parts.append(view)
            room -= view.nbytes
            continue
        for start in range(0, view.nbytes, BODY_BYTES):
            yield parts, view[start : start + BODY_BYTES]
            parts, room = [], _INLINE
    if room < _INLINE:
        yield parts, None


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
        return self._over(UCXStream(await self._listener.accept()))

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
        stream = UCXStream(control)
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
