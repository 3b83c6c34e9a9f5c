"""Streams and listeners over non-blocking sockets: what TCP, unix and in-memory transports share.

Sockets are used directly instead of through asyncio's transports: bytes land in the caller's buffer, go out from the
caller's buffers in one ``sendmsg``, and nothing queues up in between, where a more urgent frame could not overtake it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from lynxproto.errors import StreamClosedError, TransportError
from lynxproto.transports.abc import ByteStream, Credentials, Listener, take

if TYPE_CHECKING:
    from lynxproto.digest import Sums

__all__ = ["SocketListener", "SocketStream"]

#: Calls that may succeed in a row before other tasks of the loop get their turn.
_BURST = 16
#: Bytes that weigh as much as a call.
_TURN_BYTES = 1 << 20
#: Buffers of one sendmsg; far below Linux's IOV_MAX of 1024.
_IOV = 64


#: The kernel's struct ucred: process, user and group id.
_UCRED = struct.Struct("3i")


class _Waiter:
    """Waits for readiness of one socket; :meth:`close` ends every wait with ``StreamClosedError``."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()

    async def readable(self) -> None:
        await self._wait(self._loop.add_reader, self._loop.remove_reader)

    async def writable(self) -> None:
        await self._wait(self._loop.add_writer, self._loop.remove_writer)

    async def _wait(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        future: asyncio.Future[None] = self._loop.create_future()

        def ready() -> None:
            if not future.done():
                future.set_result(None)

        fd = self.sock.fileno()
        add(fd, ready)
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)
            if self.sock.fileno() == fd:
                remove(fd)

    def check_open(self) -> None:
        if self.sock.fileno() < 0:
            raise StreamClosedError(f"the stream to {self.name} was closed by this side")

    def close(self) -> None:
        fd = self.sock.fileno()
        if fd < 0:
            return
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        self.sock.close()
        for future in self._waiting:
            if not future.done():
                future.set_exception(StreamClosedError(f"{self.name} was closed by this side"))


class SocketStream(ByteStream):
    """A byte stream over a connected stream socket, which it owns."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._waiter = _Waiter(sock, name)
        self._streak = 0

    @property
    def name(self) -> str:
        """The peer's address, for messages."""
        return self._waiter.name

    @property
    def credentials(self) -> Credentials:
        """The peer's user id, if the socket is a unix one."""
        if self._sock.family != socket.AF_UNIX or self._sock.fileno() < 0:
            return Credentials()
        _, uid, _ = _UCRED.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return Credentials(uid=uid)

    async def receive_into(self, buffer: memoryview) -> int:
        """See :meth:`ByteStream.receive_into`."""
        await self._fair()
        while True:
            self._waiter.check_open()
            try:
                return self._sock.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                self._streak = 0
                await self._waiter.readable()
            except OSError as error:
                raise self._broken(error) from error

    async def receive_summed(self, sums: Sums) -> int:
        """See :meth:`ByteStream.receive_summed`."""
        await self._fair()
        while True:
            self._waiter.check_open()
            try:
                count = sums.receive(self._sock.fileno())
            except (BlockingIOError, InterruptedError):
                self._streak = 0
                await self._waiter.readable()
            except OSError as error:
                raise self._broken(error) from error
            else:
                self._streak += count // _TURN_BYTES
                return count

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`."""
        queue = deque(memoryview(b).cast("B") for b in buffers if memoryview(b).nbytes)
        while queue:
            await self._fair()
            self._waiter.check_open()
            try:
                sent = self._sock.sendmsg(list(islice(queue, _IOV)))
            except (BlockingIOError, InterruptedError):
                self._streak = 0
                await self._waiter.writable()
            except OSError as error:
                raise self._broken(error) from error
            else:
                take(queue, sent)

    async def send_eof(self) -> None:
        """See :meth:`ByteStream.send_eof`."""
        self._waiter.check_open()
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise self._broken(error) from error

    async def aclose(self) -> None:
        """See :meth:`ByteStream.aclose`."""
        self._waiter.close()

    async def _fair(self) -> None:
        self._streak += 1
        if self._streak >= _BURST:
            self._streak = 0
            await asyncio.sleep(0)

    def _broken(self, error: OSError) -> TransportError:
        return TransportError(f"the link to {self.name} broke: {error.strerror or error}")


class SocketListener(Listener):
    """A listener over a bound, listening socket, which it owns; ``setup`` makes a stream of each accepted socket."""

    def __init__(
        self,
        sock: socket.socket,
        url: str,
        setup: Callable[[socket.socket], SocketStream],
        on_close: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._url = url
        self._waiter = _Waiter(sock, url)
        self._setup = setup
        self._on_close = on_close

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return self._url

    async def accept(self) -> ByteStream:
        """See :meth:`Listener.accept`."""
        while True:
            self._waiter.check_open()
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                await self._waiter.readable()
            except OSError as error:
                raise TransportError(f"{self._url} cannot accept: {error.strerror or error}") from error
            else:
                try:
                    return self._setup(sock)
                except OSError:  # the peer is gone already
                    sock.close()

    async def aclose(self) -> None:
        """See :meth:`Listener.aclose`."""
        if self._sock.fileno() >= 0:
            self._waiter.close()
            self._on_close()
