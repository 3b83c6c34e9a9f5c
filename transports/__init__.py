"""Transports: byte streams that a connection can run over, by URL.

``tcp://host:port`` (plaintext), ``tcps://host:port`` (TLS 1.3), ``unix:///path``, ``memory://name`` (one process), and
what is registered under the entry point group ``lynxproto.transports``.
"""

from __future__ import annotations

import ssl

from lynxproto.transports.abc import Address, ByteStream, Link, Listener, Setup, Transport
from lynxproto.transports.faults import Fault, Faults
from lynxproto.transports.memory import memory_pair
from lynxproto.transports.registry import check_plaintext, get_transport, parse_url, register_transport, schemes
from lynxproto.transports.shaper import TokenBucket
from lynxproto.transports.tls import client_context, server_context

__all__ = [
    "Address",
    "ByteStream",
    "Fault",
    "Faults",
    "Link",
    "Listener",
    "Setup",
    "TokenBucket",
    "Transport",
    "check_plaintext",
    "client_context",
    "get_transport",
    "memory_pair",
    "open_listener",
    "open_stream",
    "parse_url",
    "register_transport",
    "schemes",
    "server_context",
]


async def open_stream(
    url: str, *, tls: ssl.SSLContext | None = None, link: Link | None = None, insecure: bool = False
) -> ByteStream:
    """Connect to ``url``. The caller bounds the time.

    ``tls`` (for ``tcps``; default :func:`client_context`) checks the server; ``link`` (a :class:`TokenBucket`,
    :class:`Faults`...) lies between this side and the stream, below TLS.

    Raises :class:`~lynxproto.errors.ConfigError` for a bad URL, :class:`~lynxproto.errors.TransportError` if the link
    cannot be made, :class:`~lynxproto.errors.AuthenticationError` if the server is not trusted.
    """
    address = parse_url(url)
    return await get_transport(address.scheme).connect(address, Setup(tls=tls, link=link, insecure=insecure))


async def open_listener(
    url: str, *, tls: ssl.SSLContext | None = None, link: Link | None = None, insecure: bool = False
) -> Listener:
    """Listen on ``url``; ``tcps`` needs ``tls``, made by :func:`server_context`. ``link`` as in :func:`open_stream`.

    Raises :class:`~lynxproto.errors.ConfigError` for a bad URL or a missing context, and
    :class:`~lynxproto.errors.TransportError` if the address cannot be had.
    """
    address = parse_url(url)
    return await get_transport(address.scheme).listen(address, Setup(tls=tls, link=link, insecure=insecure))
