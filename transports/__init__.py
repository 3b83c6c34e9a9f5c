"""Transports: byte streams that a connection can run over, by URL.

``tcp://host:port`` (plaintext), ``tcps://host:port`` (TLS 1.3), ``unix:///path`` and ``memory://name`` (one process).
"""

from __future__ import annotations

import ssl
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from lynxproto.errors import ConfigError
from lynxproto.transports.abc import ByteStream, Listener
from lynxproto.transports.memory import connect_memory, listen_memory, memory_pair
from lynxproto.transports.shaper import ShapedListener, ShapedStream, TokenBucket
from lynxproto.transports.tcp import connect_tcp, connect_unix, listen_tcp, listen_unix
from lynxproto.transports.tls import TLSListener, TLSStream, client_context, server_context

__all__ = [
    "SCHEMES",
    "Address",
    "ByteStream",
    "Listener",
    "TokenBucket",
    "client_context",
    "memory_pair",
    "open_listener",
    "open_stream",
    "parse_url",
    "server_context",
]

SCHEMES: Final = ("tcp", "tcps", "unix", "memory")


class Address(NamedTuple):
    """A parsed URL; ``path`` is a unix socket's path or a memory transport's name."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""


def parse_url(url: str) -> Address:
    """Take a URL apart. Raises :class:`~lynxproto.errors.ConfigError`, which says what is wrong with it."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL: {error}") from error
    if scheme not in SCHEMES:
        known = ", ".join(f"{s}://" for s in SCHEMES)
        raise ConfigError(f"{url!r}: unknown scheme {scheme!r}; use one of {known}, for example tcp://127.0.0.1:7411")
    if parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"{url!r}: a {scheme}:// URL takes no user, query or fragment")
    if scheme in ("tcp", "tcps"):
        if not host or port is None or parts.path not in ("", "/"):
            raise ConfigError(f"{url!r}: expected {scheme}://HOST:PORT, for example {scheme}://127.0.0.1:7411")
        return Address(scheme, host, port)
    path = parts.path if scheme == "unix" else parts.netloc
    if not path or (scheme == "unix" and parts.netloc) or (scheme == "memory" and parts.path):
        raise ConfigError(f"{url!r}: expected {'unix:///PATH' if scheme == 'unix' else 'memory://NAME'}")
    return Address(scheme, path=path)


async def open_stream(url: str, *, tls: ssl.SSLContext | None = None, link: TokenBucket | None = None) -> ByteStream:
    """Connect to ``url``. The caller bounds the time.

    ``tls`` (for ``tcps``; default :func:`client_context`) checks the server; ``link`` slows down what is sent.

    Raises :class:`~lynxproto.errors.ConfigError` for a bad URL, :class:`~lynxproto.errors.TransportError` if the link
    cannot be made, :class:`~lynxproto.errors.AuthenticationError` if the server is not trusted.
    """
    address = parse_url(url)
    stream: ByteStream
    if address.scheme == "memory":
        stream = await connect_memory(address.path)
    elif address.scheme == "unix":
        stream = await connect_unix(address.path)
    else:
        context = (tls or client_context()) if address.scheme == "tcps" else None
        stream = await connect_tcp(address.host, address.port)
        if link is not None:
            stream = ShapedStream(stream, link)
        if context is not None:
            stream = await _secure(TLSStream(stream, context, server_hostname=address.host))
        return stream
    return stream if link is None else ShapedStream(stream, link)


async def _secure(stream: TLSStream) -> TLSStream:
    try:
        await stream.handshake()
    except BaseException:
        await stream.aclose()
        raise
    return stream


async def open_listener(url: str, *, tls: ssl.SSLContext | None = None, link: TokenBucket | None = None) -> Listener:
    """Listen on ``url``; ``tcps`` needs ``tls``, made by :func:`server_context`.

    Raises :class:`~lynxproto.errors.ConfigError` for a bad URL or a missing context, and
    :class:`~lynxproto.errors.TransportError` if the address cannot be had.
    """
    address = parse_url(url)
    if address.scheme == "tcps" and tls is None:
        raise ConfigError(f"{url!r}: listening with TLS needs a certificate; pass tls=server_context(certificate=...)")
    listener: Listener
    if address.scheme == "memory":
        listener = await listen_memory(address.path)
    elif address.scheme == "unix":
        listener = await listen_unix(address.path)
    else:
        listener = await listen_tcp(address.host, address.port)
    if link is not None:
        listener = ShapedListener(listener, link)
    if address.scheme == "tcps" and tls is not None:
        listener = TLSListener(listener, tls)
    return listener
