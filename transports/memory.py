"""``memory://name``: streams inside one process, between any threads and event loops. For tests and examples.

The kernel's socket pairs do the work, so that two event loops need no lock between them and the bytes in flight stay
bounded as on a real link.
"""

from __future__ import annotations

import asyncio
import socket
from threading import Lock

from lynxproto.errors import StreamClosedError, TransportError
from lynxproto.transports._socket import SocketStream
from lynxproto.transports.abc import Address, ByteStream, Listener, Setup, Transport
from lynxproto.transports.tcp import UNIX_BYTES

__all__ = ["MemoryTransport", "connect_memory", "listen_memory", "memory_pair"]

_lock = Lock()
_listeners: dict[str, _MemoryListener] = {}


def _socketpair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for sock in pair:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BYTES)
    return pair


def memory_pair() -> tuple[ByteStream, ByteStream]:
    """Two connected streams on the running loop."""
    a, b = _socketpair()
    return SocketStream(a, "memory://pair"), SocketStream(b, "memory://pair")


class _MemoryListener(Listener):
    def __init__(self, name: str) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Queue[socket.socket | None] = asyncio.Queue()
        self._closed = False

    @property
    def url(self) -> str:
        return f"memory://{self.name}"

    async def accept(self) -> ByteStream:
        sock = None if self._closed else await self.accepted.get()
        if sock is None:
            self.accepted.put_nowait(None)  # whoever else waits
            raise StreamClosedError(f"{self.url} was closed by this side")
        return SocketStream(sock, self.url)

    def arrive(self, sock: socket.socket) -> None:
        """A peer has connected; on the listener's loop, which may have closed it meanwhile."""
        if self._closed:
            sock.close()
        else:
            self.accepted.put_nowait(sock)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        with _lock:
            del _listeners[self.name]
        while not self.accepted.empty():
            sock = self.accepted.get_nowait()
            if sock is not None:
                sock.close()
        self.accepted.put_nowait(None)


async def connect_memory(name: str) -> ByteStream:
    """Connect to the listener called ``name``. Raises :class:`~lynxproto.errors.TransportError` if there is none."""
    with _lock:
        listener = _listeners.get(name)
        if listener is None:
            raise TransportError(f"cannot connect to memory://{name}: nobody in this process listens there")
        mine, theirs = _socketpair()
        try:
            listener.loop.call_soon_threadsafe(listener.arrive, theirs)
        except RuntimeError as error:
            mine.close()
            theirs.close()
            raise TransportError(f"cannot connect to memory://{name}: its event loop is closed") from error
    return SocketStream(mine, listener.url)


async def listen_memory(name: str) -> Listener:
    """Listen under ``name``. Raises :class:`~lynxproto.errors.TransportError` if the name is taken."""
    with _lock:
        if name in _listeners:
            raise TransportError(f"cannot listen on memory://{name}: the name is taken")
        listener = _listeners[name] = _MemoryListener(name)
    return listener


class MemoryTransport(Transport):
    """``memory://name``."""

    address = "NAME"
    secure = True

    async def connect(self, address: Address, setup: Setup) -> ByteStream:
        """See :meth:`Transport.connect`."""
        return setup.stream_through_link(await connect_memory(address.path))

    async def listen(self, address: Address, setup: Setup) -> Listener:
        """See :meth:`Transport.listen`."""
        return setup.listener_through_link(await listen_memory(address.path))
