"""``tcp://host:port`` (IPv4 and IPv6) and ``unix:///path``."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lynxproto.errors import TransportError
from lynxproto.transports._socket import SocketListener, SocketStream
from lynxproto.transports.abc import Address, ByteStream, Listener, Setup, Transport

__all__ = [
    "LOCAL_BYTES",
    "UNIX_BYTES",
    "UNSENT_BYTES",
    "TCPStream",
    "TCPTransport",
    "UnixTransport",
    "connect_tcp",
    "connect_unix",
    "listen_tcp",
    "listen_unix",
]

#: Bytes that the kernel may hold unsent. A strict queue in user space is worth nothing if megabytes of the lowest
#: class already sit in the socket; with this bound an urgent frame waits for about this much, whatever the send buffer.
UNSENT_BYTES: Final = 128 << 10
#: The same within a machine: it carries that in 50 us, and more would leave the processors' caches before it is read.
LOCAL_BYTES: Final = 256 << 10
#: The same of a unix socket, whose buffer also holds what is under way.
UNIX_BYTES: Final = 1 << 20
#: The same once the link's speed is known: what it carries in this time, within bounds.
_UNSENT_S: Final = 0.5e-3
_UNSENT: Final = (32 << 10, 4 << 20)
#: Bytes in flight beyond 1.5 round trips: what the link carries in this time, and while this side wakes up late: by as
#: much as it did lately, within bounds.
_QUEUE_S: Final = 1.2e-3
_LATE_S: Final = (0.5e-3, 4e-3)
#: How much the last one counts.
_LATE_SHARE: Final = 0.1
_QUEUE_BYTES: Final = 64 << 10
#: The link's speed is measured over at least so long, and the largest of the last so many measurements counts.
_MEASURE_S: Final = 10e-3
_MEASUREMENTS: Final = 32
#: Loopback loses nothing and has no queue but the sockets': congestion control that paces (BBR) only slows it down.
_LOOPBACK_CONGESTION: Final = b"reno"
#: tcpi_snd_mss, tcpi_unacked, tcpi_rtt, tcpi_bytes_acked, tcpi_notsent_bytes, tcpi_min_rtt of linux/tcp.h
_TCP_INFO: Final = struct.Struct("=16xI4xI40xI48xQ16xII")

_BACKLOG = 512
_REMEDY: Final = {
    errno.ECONNREFUSED: "nobody listens there; start the receiver first, or check host and port",
    errno.EHOSTUNREACH: "no route to that host; check the address and the network",
    errno.ENETUNREACH: "no route to that network; check the address and the network",
    errno.EADDRINUSE: "another program listens there; choose another port, or port 0 for any free one",
    errno.EADDRNOTAVAIL: "this machine has no such address; use 0.0.0.0 or [::] to listen on all",
    errno.EACCES: "not permitted; ports below 1024 need privileges",
}
_UNIX_REMEDY: Final = {
    errno.ECONNREFUSED: "nobody listens there; start the receiver first, or check the path",
    errno.ENOENT: "start the receiver first, or check the path",
    errno.EACCES: "the socket is for another user",
}
_UNIX_LISTEN_REMEDY: Final = {
    errno.EADDRINUSE: "another program listens there, or the file is no socket; choose another path",
    errno.ENOENT: "make its folder first, or check the path",
    errno.EACCES: "choose a folder that this user may write to",
}


def _explain(what: str, error: OSError, remedies: Mapping[int, str] = _REMEDY) -> TransportError:
    if isinstance(error, socket.gaierror):
        return TransportError(f"{what}: cannot resolve the host name ({error.strerror}); check its spelling")
    reason = os.strerror(error.errno) if error.errno else error  # asyncio puts words of its own into strerror
    remedy = remedies.get(error.errno or 0)
    return TransportError(f"{what}: {reason}{'; ' + remedy if remedy else ''}")


def _authority(address: tuple[object, ...]) -> str:
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _stream(sock: socket.socket) -> SocketStream:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer = sock.getpeername()
    name = "tcp://" + _authority(peer)
    loopback = peer[0] == "::1" or peer[0].removeprefix("::ffff:").startswith("127.")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, LOCAL_BYTES if loopback else UNSENT_BYTES)
    if sys.platform != "linux":
        return SocketStream(sock, name)
    if not loopback:
        return TCPStream(sock, name)
    with contextlib.suppress(OSError):  # a system may not permit the choice
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _LOOPBACK_CONGESTION)
    return SocketStream(sock, name)


class TCPStream(SocketStream):
    """A TCP connection that keeps little under way, so that what is sent next arrives soon.

    Congestion control fills the queue of a router on the way: tens of milliseconds of bytes that a more urgent frame
    cannot overtake, and with BBR, which means not to, several still. This stream lets no more be under way than the
    link carries in 1.5 round trips and about 2 ms, or more where this side wakes up late. What the link carries is what
    the peer acknowledges; while it carries more, the bound grows by half in each measurement.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        super().__init__(sock, name)
        self._rates: deque[float] = deque(maxlen=_MEASUREMENTS)
        self._acked = 0
        self._since = 0.0
        self._busy = False  # the link had something to do since then
        self._unsent = UNSENT_BYTES
        self._late = sum(_LATE_S) / 2  # seconds

    @property
    def link_rate(self) -> float | None:
        """What the peer acknowledged in the fastest of the last measurements."""
        return max(self._rates, default=0.0)

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`."""
        while (wait := self._measure()) > 0:
            began = time.monotonic()
            await asyncio.sleep(wait)
            late = time.monotonic() - began - wait
            self._late += _LATE_SHARE * (min(max(late, _LATE_S[0]), _LATE_S[1]) - self._late)
        await super().send(buffers)

    def _measure(self) -> float:
        """Look at the link; seconds until it has room for more."""
        self._waiter.check_open()
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        mss, unacked, rtt, acked, notsent, min_rtt = _TCP_INFO.unpack(info)
        under_way = unacked * mss + notsent
        now = time.monotonic()
        elapsed = now - self._since
        if not self._busy or not under_way:
            self._since, self._acked, self._busy = now, acked, under_way > 0
        elif elapsed >= max(_MEASURE_S, 2e-6 * rtt):
            self._rates.append((acked - self._acked) / elapsed)
            self._since, self._acked = now, acked
            self._set_unsent(max(self._rates))
        if not self._rates:
            return 0.0
        rate = max(1.0, *self._rates)
        over = under_way - max(rate * (1.5e-6 * min(min_rtt, rtt) + _QUEUE_S + self._late), _QUEUE_BYTES)
        wait: float = over / rate
        return min(wait, 0.1)

    def _set_unsent(self, rate: float) -> None:
        low, high = _UNSENT
        wanted = int(max(low, min(rate * _UNSENT_S, high)))
        if not self._unsent / 1.5 <= wanted <= self._unsent * 1.5:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, wanted)
            self._unsent = wanted


async def connect_tcp(host: str, port: int) -> ByteStream:
    """Connect to the first address of ``host`` that answers. The caller bounds the time.

    Raises :class:`~lynxproto.errors.TransportError`, which says why and what to do.
    """
    loop = asyncio.get_running_loop()
    what = f"cannot connect to {_authority((host, port))}"
    failure: OSError = OSError("no address")
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _explain(what, error) from error
    for family, kind, protocol, _, address in found:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            failure = error
            continue
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
            return _stream(sock)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise _explain(what, failure) from failure


async def listen_tcp(host: str, port: int) -> Listener:
    """Listen on the first address that ``host`` resolves to (``[::]`` takes IPv4 peers too); port 0 takes a free one.

    Raises :class:`~lynxproto.errors.TransportError`, which says why and what to do.
    """
    what = f"cannot listen on {_authority((host, port))}"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _explain(what, error) from error
    family, kind, protocol, _, address = found[0]
    sock = None
    try:
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _explain(what, error) from error
    url = "tcp://" + _authority(sock.getsockname())
    return SocketListener(sock, url, _stream, lambda: None)


def _bound(sock: socket.socket) -> None:
    # Unix sockets have no TCP_NOTSENT_LOWAT; a small send buffer does the same.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BYTES)


async def connect_unix(path: str) -> ByteStream:
    """Connect to a unix socket. Raises :class:`~lynxproto.errors.TransportError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _bound(sock)
        await asyncio.get_running_loop().sock_connect(sock, path)
        return SocketStream(sock, f"unix://{path}")
    except OSError as error:
        sock.close()
        raise _explain(f"cannot connect to unix://{path}", error, _UNIX_REMEDY) from error
    except BaseException:
        sock.close()
        raise


def _remove_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on any more; leave everything else alone."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


async def listen_unix(path: str) -> Listener:
    """Listen on a unix socket; its file is removed on close. Raises :class:`~lynxproto.errors.TransportError`."""
    url = f"unix://{path}"

    def setup(sock: socket.socket) -> SocketStream:
        _bound(sock)
        return SocketStream(sock, url)

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(Path(path))
        os.fchmod(sock.fileno(), 0o600)  # of the file that bind makes: for this user only
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise _explain(f"cannot listen on {url}", error, _UNIX_LISTEN_REMEDY) from error
    return SocketListener(sock, url, setup, lambda: Path(path).unlink(missing_ok=True))


class TCPTransport(Transport):
    """``tcp://host:port``: plaintext."""

    address = "HOST:PORT"

    async def connect(self, address: Address, setup: Setup) -> ByteStream:
        """See :meth:`Transport.connect`."""
        return setup.stream_through_link(await connect_tcp(address.host, address.port))

    async def listen(self, address: Address, setup: Setup) -> Listener:
        """See :meth:`Transport.listen`."""
        return setup.listener_through_link(await listen_tcp(address.host, address.port))


class UnixTransport(Transport):
    """``unix:///path``."""

    address = "/PATH"
    secure = True

    async def connect(self, address: Address, setup: Setup) -> ByteStream:
        """See :meth:`Transport.connect`."""
        return setup.stream_through_link(await connect_unix(address.path))

    async def listen(self, address: Address, setup: Setup) -> Listener:
        """See :meth:`Transport.listen`."""
        return setup.listener_through_link(await listen_unix(address.path))
