"""``ucx://host:port``: a byte stream over UCX (RDMA, shared memory, TCP: what ``UCX_TLS`` allows).

A control connection over TCP comes first, to ``host:port``. It carries both workers' addresses and a random tag for
each direction, and then nothing: its end tells at once that the peer is gone, which UCX does not on every device. With
a TLS context it is TLS, so that only who was authenticated knows the tags; the data that UCX carries are not encrypted.

Each message is a piece of the stream. UCX tells a message's size when it has come, and then the receiver names the
buffer it is to land in: UCX copies nothing that it need not, and long ones stay with the sender until then. Two bits of
the tag say what a message is:

| kind | length | message |
|---|---|---|
| 0 | 1 to 512 KiB | bytes of the stream |
| 1 | 0 | this side has read another mebibyte of messages below 8 KiB, each counted with 512 bytes more |
| 2 | 0 | the stream ends here |
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import monotonic_ns
from typing import TYPE_CHECKING, ClassVar, Final
from weakref import WeakKeyDictionary

from lynxproto.errors import ConfigError, StreamClosedError, TransportError
from lynxproto.transports._ucxx import (
    BUSY,
    FOUND,
    LONG,
    OVER,
    PIECE,
    QUIET,
    Endpoint,
    Message,
    Operation,
    Worker,
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
#: What a short message counts beside its bytes.
_COST: Final = 512
#: Bytes, so counted, that may be under way: messages of LONG bytes until they are sent, which is when the peer has
#: named their place; shorter ones, which UCX may hold for the peer, until it confirms that it read them.
WINDOW: Final = 4 << 20
_CONFIRMED: Final = WINDOW // 4
#: A stream's tag is its random number and what the message is.
_DATA, _CONFIRM, _END, _KIND = 0, 1, 2, 3

_MAGIC: Final = b"LYNXUCX2"
_HELLO: Final = struct.Struct("<8sQI")
_ADDRESS_BYTES: Final = 64 << 10

#: Seconds after a failed operation in which the control connection says whether the peer is gone.
_VERDICT_S: Final = 1.0
#: Rounds in which UCX ends what was under way on a closed endpoint: it takes two or three.
_LAST_ROUNDS: Final = 100
#: What it did not end: memory that it might still write to must never be anything else.
_ABANDONED: Final[list[Operation]] = []
#: Nanoseconds of polling, and of calls that need not wait, after which they get it.
_SLICE_NS: Final = 500_000
_TURN_NS: Final = 1_000_000

#: Microseconds without anything happening for which a stream polls before it sleeps.
SPIN_VARIABLE: Final = "LYNXPROTO_UCX_SPIN_US"
_SPIN_US: Final = 100
#: Times that is a short sleep: one after which it is worth to poll again.
_SHORT: Final = 10


def _spin_ns() -> int:
    text = os.environ.get(SPIN_VARIABLE)
    if text is None:
        return 0 if len(os.sched_getaffinity(0)) == 1 else _SPIN_US * 1000
    try:
        microseconds = int(text)
    except ValueError:
        microseconds = -1
    if not 0 <= microseconds <= 1_000_000:
        raise ConfigError(f"{SPIN_VARIABLE}={text}: must be microseconds, 0 (never poll) to 1000000")
    return microseconds * 1000


class _Bell:
    """Wakes the one coroutine that waits for it, if one does."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: asyncio.Future[None] | None = None

    def ring(self) -> bool:
        """Whether somebody was woken."""
        if self.future is None or self.future.done():
            return False
        self.future.set_result(None)
        return True


class _LoopWorker:
    """A UCX worker on an event loop; shared by its streams, closed with the last of them.

    Sleeping and being woken takes some 0.1 ms, on both sides. So whoever waits polls for so long before, but only if
    the last sleep was so short: where things happen seldom nothing polls.
    """

    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWorker]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._spin_ns = _spin_ns()
        self._polls_ns = self._spin_ns
        self._slept_at = 0
        self.ucx = Worker()
        self.ucx.bound(self._polls_ns, _SLICE_NS)
        self.turned_ns = 0
        """When other tasks of the loop had their last turn."""
        self._loop = asyncio.get_running_loop()
        self._users = 0
        self._streams: dict[int, UCXStream] = {}
        self._under_way: set[Operation] = set()
        self._free: list[Operation] = []
        self._woke = self._alone = False
        self._scheduled: asyncio.Handle | None = None
        self._loop.add_reader(self.ucx.fileno, self._awake)

    @classmethod
    def acquire(cls, stream: UCXStream, tag: int) -> _LoopWorker:
        """The running loop's worker, which hands ``stream`` its messages. Goes with :meth:`release`."""
        loop = asyncio.get_running_loop()
        worker = cls._all.get(loop)
        if worker is None:
            worker = cls._all[loop] = cls()
        worker._users += 1
        worker._streams[tag] = stream
        return worker

    def release(self, tag: int) -> None:
        """One user less."""
        self._users -= 1
        del self._streams[tag]
        if self._users == 0:
            del self._all[self._loop]
            self._loop.remove_reader(self.ucx.fileno)
            _ABANDONED.extend(self._under_way)
            self._unschedule()
            self.ucx.close()

    def start(self, operation: Operation) -> Operation:
        """Hold on to ``operation`` and its buffer until it is over."""
        if operation.done:
            operation.buffer = None
        else:
            self._under_way.add(operation)
        return operation

    def drop(self, message: Message) -> None:
        """Nobody wants ``message``."""
        self.start(self.ucx.receive(message, memoryview(bytearray())))

    def ring(self, bell: _Bell) -> None:
        """Whoever waits for ``bell`` is to look again."""
        self._woke = bell.ring() or self._woke

    async def take_turns(self) -> None:
        """Let other tasks of the loop have their turn."""
        self.turned_ns = monotonic_ns()
        await asyncio.sleep(0)

    async def until(self, ready: Callable[[], bool], bell: _Bell, operation: Operation | None = None) -> None:
        """Return once ``ready()``: because ``operation``, whose bell it is, is over, or somebody rings."""
        while not ready():
            while (outcome := self._poll(operation)) != QUIET:
                if ready():
                    return
                if self._woke or outcome == BUSY:
                    await self.take_turns()
                    if ready():
                        return
            bell.future = self._loop.create_future()
            try:
                await bell.future
            finally:
                bell.future = None

    def nudge(self) -> None:
        """Make what progress there is to make now."""
        while self._poll_once() != QUIET:
            pass

    def settle(self) -> None:
        """An endpoint was closed: UCX ends what was under way on it in its next rounds."""
        for _ in range(_LAST_ROUNDS):
            if not self._under_way:
                break
            self._poll_once()

    def _awake(self) -> None:
        """Something happened while the loop slept, or was busy."""
        if self._scheduled is None:
            self._polls_ns = self._spin_ns if monotonic_ns() - self._slept_at < _SHORT * self._spin_ns else 0
            self.ucx.bound(self._polls_ns, _SLICE_NS)
        self._progress()

    def _progress(self) -> None:
        """Sleep if there is nothing to do; poll before only if the loop's other tasks have had their turn in vain."""
        self._unschedule()
        self.turned_ns = monotonic_ns()
        alone, self._alone = self._alone, False
        while (outcome := self._poll() if alone else self._poll_once()) == FOUND and not self._woke:
            pass
        if outcome != QUIET or self._woke:
            return
        if not alone and self._polls_ns:
            self._alone = True
        elif self.ucx.arm():
            self._slept_at = monotonic_ns()
            self._unschedule()

    def _unschedule(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None

    def complete(self, operation: Operation) -> bool:
        """Poll until ``operation`` is over; False if it is time to do something else, or to sleep."""
        while self._poll(operation) == FOUND and not operation.done and not self._woke:
            pass
        return operation.done

    def send(self, endpoint: Endpoint, buffer: memoryview, tag: int) -> Operation:
        """Send, and poll until that is over or it is time to do something else."""
        operation = self._free.pop() if self._free else Operation()
        outcome = self.ucx.send_poll(operation, endpoint, buffer, tag)
        if outcome != OVER:
            self.start(operation)
        self._after(outcome)
        return operation

    def receive(self, tag: int, buffer: memoryview) -> Operation | None:
        """Poll for the next message, and if it has ``tag`` and fits into ``buffer`` receive it: what does, or None."""
        operation = self._free.pop() if self._free else Operation()
        outcome = self.ucx.receive_poll(operation, tag, buffer)
        begun = outcome == OVER or operation.nbytes > 0
        if begun and outcome != OVER:
            self.start(operation)
        self._after(outcome)
        if begun:
            return operation
        self.free(operation)
        return None

    def free(self, operation: Operation) -> None:
        """An operation that is over, or never began, is free to be another."""
        operation.buffer = operation.bell = None
        self._free.append(operation)

    def _poll_once(self) -> int:
        self.ucx.bound(0, _SLICE_NS)
        try:
            return self._poll()
        finally:
            self.ucx.bound(self._polls_ns, _SLICE_NS)

    def _poll(self, operation: Operation | None = None) -> int:
        outcome = self.ucx.poll(operation)
        self._after(outcome)
        return outcome

    def _after(self, outcome: int) -> None:
        """What is to be done after progress."""
        self._woke = self._alone = False
        if outcome == FOUND:
            message = self.ucx.found()
            stream = self._streams.get(message.tag & ~_KIND)
            if stream is None:
                self.drop(message)
            else:
                stream.arrived(message)
        if self._under_way:
            for over in [one for one in self._under_way if one.done]:
                self._under_way.discard(over)
                over.buffer = None
                if over.bell is not None:
                    self.ring(over.bell)
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._progress)


class UCXStream(ByteStream):
    """A stream over UCX, set up through ``control``, which it owns. The server's side is set up on first use."""

    def __init__(self, control: ByteStream) -> None:
        self._control = control
        self._mine = secrets.randbits(62) << 2
        self._worker = _LoopWorker.acquire(self, self._mine)
        self._theirs = 0
        self._endpoint: Endpoint | None = None
        self._setting_up = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._closed = False
        self._gone: str | None = None  # why the peer is; "" if it hung up
        self._cut = False  # UCX can carry nothing more
        # receiving
        self._coming = _Bell()
        self._inbox: deque[Message | None] = deque()  # None: the end
        self._held = 0
        self._read = 0
        self._rest = memoryview(b"")  # of a message longer than the caller's buffer
        self._spare: bytearray | None = None  # where that is
        self._ended = False
        # sending
        self._allowed = _Bell()
        self._unconfirmed = 0
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
                address = self._worker.ucx.address
                await self._control.send([memoryview(_HELLO.pack(_MAGIC, self._mine, len(address)) + address)])
                magic, self._theirs, nbytes = _HELLO.unpack(await self._read_control(_HELLO.size))
                if magic != _MAGIC or nbytes > _ADDRESS_BYTES or self._theirs & _KIND:
                    other = magic[:-1] == _MAGIC[:-1] and magic != _MAGIC
                    raise TransportError(
                        f"{self.name} {'speaks another version of' if other else 'does not speak'} ucx://"
                    )
                peer = await self._read_control(nbytes)
                self._check()
                self._endpoint = self._worker.ucx.connect(peer)
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

    def _usable(self) -> Endpoint:
        """The endpoint, if UCX can still carry something."""
        self._check()
        if self._endpoint is None or self._cut:
            raise self._broken("the peer hung up")
        return self._endpoint

    async def _begin(self) -> None:
        """Of a call, if it is the first, or other tasks of the loop have waited for long."""
        if self._endpoint is None:
            await self.set_up()
        await self._worker.take_turns()
        self._check()

    async def _over(self, operation: Operation) -> None:
        """Wait for ``operation`` on the caller's buffer. Cancelled, it breaks the stream, which ends all of them."""
        operation.bell = _Bell()
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

    def arrived(self, message: Message) -> None:
        """A message with this stream's tag has come."""
        kind = message.tag & _KIND
        if kind == _DATA and 0 < message.nbytes <= PIECE:
            self._held += _cost(message.nbytes)
            self._inbox.append(message)
            if self._held > WINDOW:
                self._break_off("it sends more than it may")
        elif kind == _CONFIRM and message.nbytes == 0 and self._unconfirmed >= _CONFIRMED:
            self._unconfirmed -= _CONFIRMED
            self._worker.drop(message)
            self._worker.ring(self._allowed)
            return
        elif kind == _END and message.nbytes == 0:
            self._inbox.append(None)
            self._worker.drop(message)
        else:
            self._worker.drop(message)
            self._break_off("a message that cannot be")
        self._worker.ring(self._coming)

    async def receive_into(self, buffer: memoryview, sums: Sums | None = None) -> int:
        """See :meth:`ByteStream.receive_into`. Cancelling it may break the stream. ``sums``: to be added to."""
        if self._endpoint is None or monotonic_ns() - self._worker.turned_ns > _TURN_NS:
            await self._begin()
        if not self._rest:
            if not self._inbox and not self._ended and not self._cut:
                target = buffer if sums is None else buffer[:PIECE]  # which are to be added while the next come
                operation = self._worker.receive(self._mine | _DATA, target)
                if operation is not None:
                    nbytes = operation.nbytes
                    if self._inbox or operation.state.status:  # more has come, or it is not over, or failed
                        return await self._receive_all(operation, buffer, sums)
                    self._worker.free(operation)
                    self._count(nbytes)
                    if sums is not None:
                        sums.add(sums.there + nbytes)
                    return nbytes
                self._check()
            message = await self._next()
            if message is None:
                return 0
            operation = self._land(message, buffer)
            if operation is not None:
                return await self._receive_all(operation, buffer, sums)
            await self._receive_rest(message)
        count = min(buffer.nbytes, len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        if sums is not None:
            sums.add(sums.there + count)
        return count

    async def receive_summed(self, sums: Sums) -> int:
        """See :meth:`ByteStream.receive_summed`."""
        return await self.receive_into(sums.data[sums.there :], sums)

    def _land(self, message: Message, buffer: memoryview) -> Operation | None:
        """Receive ``message`` into ``buffer`` if it fits."""
        if message.nbytes > buffer.nbytes:
            return None
        self._held -= _cost(message.nbytes)
        return self._worker.start(self._worker.ucx.receive(message, buffer[: message.nbytes]))

    async def _receive_rest(self, message: Message) -> None:
        """A message longer than the caller's buffer: into memory of the stream's own, from which it is read later."""
        if self._spare is None:
            self._spare = bytearray(PIECE)
        rest = memoryview(self._spare)[: message.nbytes]
        operation = self._land(message, rest)
        assert operation is not None
        await self._finish((operation,))
        self._count(message.nbytes)
        self._rest = rest

    async def _receive_all(self, first: Operation, buffer: memoryview, sums: Sums | None) -> int:
        """What ``first`` receives, and what has come after it as long as it fits: the sender need not wait for us."""
        start = 0 if sums is None else sums.there
        under_way = deque((first,))
        asked, there = first.nbytes, 0
        while under_way:
            while self._inbox and (following := self._fitting(buffer[asked:])) is not None:
                under_way.append(following)
                asked += following.nbytes
            if sums is not None:
                sums.add(start + there)
            operation = under_way.popleft()
            await self._finish((operation,))
            self._count(operation.nbytes)
            there += operation.nbytes
            if not under_way and self._inbox and (following := self._fitting(buffer[asked:])) is not None:
                under_way.append(following)
                asked += following.nbytes
        if sums is not None:
            sums.add(start + there)
        return there

    def _fitting(self, buffer: memoryview) -> Operation | None:
        """Receive the next message, if it has come and fits."""
        message = self._inbox[0]
        operation = None if message is None or self._cut else self._land(message, buffer)
        if operation is not None:
            self._inbox.popleft()
        return operation

    async def _next(self) -> Message | None:
        """The next message of the stream; None at its end."""
        if not self._inbox and not self._ended:
            await self._worker.until(lambda: bool(self._inbox) or self._cut or self._closed, self._coming)
            self._check()
        if not self._inbox and not self._ended:
            await self._failed("the peer hung up")
            return None
        message = None if self._ended else self._inbox.popleft()
        self._ended = message is None
        return message

    def _count(self, nbytes: int) -> None:
        """A message has been read. The peer is told of short ones, now and then."""
        if nbytes < LONG:
            self._read += _cost(nbytes)
            if self._read >= _CONFIRMED and not self._cut:
                self._read -= _CONFIRMED
                self._worker.start(self._usable().send(memoryview(b""), self._theirs | _CONFIRM))

    # --- sending

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`. Cancelling it breaks the stream."""
        if self._endpoint is None or monotonic_ns() - self._worker.turned_ns > _TURN_NS:
            await self._begin()
        if len(buffers) == 1 and LONG <= buffers[0].nbytes <= WINDOW - self._unconfirmed:  # without a list of one
            operation = self._worker.send(self._usable(), buffers[0], self._theirs | _DATA)
            if operation.state.status:  # it is not over, or failed
                await self._finish((operation,))
            self._worker.free(operation)
            return
        short: list[Operation] = []
        long: deque[Operation] = deque()
        try:
            for data in _messages(buffers):
                cost = _cost(data.nbytes)
                while long and self._unconfirmed + cost > WINDOW:
                    await self._finish((long[0],))
                    self._unconfirmed -= long.popleft().nbytes
                if self._unconfirmed + cost > WINDOW:
                    await self._allow(cost)
                self._unconfirmed += cost
                operation = self._worker.start(self._usable().send(data, self._theirs | _DATA))
                (short if data.nbytes < LONG else long).append(operation)
        except asyncio.CancelledError:
            self._break_off()
            raise
        finally:
            await self._finish((*short, *long))
            self._unconfirmed -= sum(operation.nbytes for operation in long)

    async def send_eof(self) -> None:
        """See :meth:`ByteStream.send_eof`."""
        if self._endpoint is None or monotonic_ns() - self._worker.turned_ns > _TURN_NS:
            await self._begin()
        if not self._eof_sent:
            self._eof_sent = True
            operation = self._worker.start(self._usable().send(memoryview(b""), self._theirs | _END))
            await self._finish((operation,))

    async def _allow(self, cost: int) -> None:
        """Return when so much more may be under way."""
        await self._worker.until(lambda: self._unconfirmed + cost <= WINDOW or self._cut or self._closed, self._allowed)
        if self._cut or self._closed:
            await self._failed("the peer hung up")

    async def aclose(self) -> None:
        """See :meth:`ByteStream.aclose`."""
        if self._closed:
            return
        self._closed = True
        self._break_off()
        self._endpoint = None
        for message in self._inbox:
            if message is not None:
                self._worker.drop(message)
        self._inbox.clear()
        await self._control.aclose()
        if self._watching is not None:
            with suppress(asyncio.CancelledError):
                self._watching.cancel()
        self._worker.release(self._mine)


def _cost(nbytes: int) -> int:
    return nbytes if nbytes >= LONG else nbytes + _COST


def _messages(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    """Cut ``buffers`` into messages: short neighbours joined, the rest as it lies."""
    short: list[memoryview] = []
    room = _JOINED
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if short and view.nbytes > room:
            yield short[0] if len(short) == 1 else memoryview(b"".join(short))
            short, room = [], _JOINED
        if view.nbytes > _JOINED:
            for start in range(0, view.nbytes, PIECE):
                yield view[start : start + PIECE]
        elif view.nbytes:
            short.append(view)
            room -= view.nbytes
    if short:
        yield short[0] if len(short) == 1 else memoryview(b"".join(short))


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
    _spin_ns()
