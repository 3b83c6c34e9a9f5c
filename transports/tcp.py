"""``tcp://host:port`` (IPv4 and IPv6) and ``unix:///path``."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from lynxproto.errors import TransportError
from lynxproto.transports._socket import SocketListener, SocketStream
from lynxproto.transports.abc import Address, ByteStream, Listener, Setup, Transport

__all__ = ["UNSENT_BYTES", "TCPTransport", "UnixTransport", "connect_tcp", "connect_unix", "listen_tcp", "listen_unix"]

#: Bytes that the kernel may hold unsent. A strict queue in user space is worth nothing if megabytes of the lowest
#: class already sit in the socket; with this bound an urgent frame waits for about this much, whatever the send buffer.
UNSENT_BYTES: Final = 128 << 10

_BACKLOG = 512
_REMEDY: Final = {
    errno.ECONNREFUSED: "nobody listens there; start the receiver first, or check host and port",
    errno.EHOSTUNREACH: "no route to that host; check the address and the network",
    errno.ENETUNREACH: "no route to that network; check the address and the network",
    errno.EADDRINUSE: "another program listens there; choose another port, or port 0 for any free one",
    errno.EADDRNOTAVAIL: "this machine has no such address; use 0.0.0.0 or [::] to listen on all",
    errno.EACCES: "not permitted; ports below 1024 need privileges",
    errno.ENOENT: "no such path; start the receiver first, or check the path",
}


def _explain(what: str, error: OSError) -> TransportError:
    if isinstance(error, socket.gaierror):
        return TransportError(f"{what}: cannot resolve the host name ({error.strerror}); check its spelling")
    remedy = _REMEDY.get(error.errno or 0)
    return TransportError(f"{what}: {error.strerror or error}{'; ' + remedy if remedy else ''}")


def _authority(address: tuple[object, ...]) -> str:
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _tune(sock: socket.socket) -> str:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return "tcp://" + _authority(sock.getpeername())


async def connect_tcp(host: str, port: int) -> ByteStream:
    """Connect to the first address of ``host`` that answers. The caller bounds the time.

    Raises :class:`~lynxproto.errors.TransportError`, which says why and what to do.
    """
    loop = asyncio.get_running_loop()
    what = f"cannot connect to tcp://{_authority((host, port))}"
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
            return SocketStream(sock, _tune(sock))
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
    what = f"cannot listen on tcp://{_authority((host, port))}"
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
    return SocketListener(sock, "tcp://" + _authority(sock.getsockname()), _tune, lambda: None)


def _bound(sock: socket.socket) -> None:
    # Unix sockets have no TCP_NOTSENT_LOWAT; a small send buffer does the same.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_BYTES)


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
        raise _explain(f"cannot connect to unix://{path}", error) from error
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

    def setup(sock: socket.socket) -> str:
        _bound(sock)
        return url

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(Path(path))
        os.fchmod(sock.fileno(), 0o600)  # of the file that bind makes: for this user only
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise _explain(f"cannot listen on {url}", error) from error
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
