"""Which transport serves which URL scheme.

Built in: ``tcp``, ``tcps``, ``unix``, ``memory``, ``ucx``. Others register through the entry point group
``lynxproto.transports`` (name = scheme, value = the :class:`~lynxproto.transports.abc.Transport` subclass); a class is
imported when it is first asked for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from lynxproto.errors import ConfigError, UnknownTransportError
from lynxproto.transports.abc import Address, Transport

__all__ = ["check_plaintext", "get_transport", "parse_url", "register_transport", "schemes"]

_GROUP = "lynxproto.transports"
_BUILT_IN = {
    "tcp": "tcp:TCPTransport",
    "tcps": "tls:TLSTransport",
    "unix": "tcp:UnixTransport",
    "memory": "memory:MemoryTransport",
    "ucx": "ucx:UCXTransport",
}
_transports: dict[str, Transport] = {}


def schemes() -> list[str]:
    """All schemes that :func:`get_transport` knows, installed plug-ins included."""
    found = {entry.name for entry in entry_points(group=_GROUP)}
    return sorted(found | set(_BUILT_IN) | set(_transports))


def register_transport(scheme: str) -> Callable[[type[Transport]], type[Transport]]:
    """Register a transport under ``scheme`` (a class decorator); refuses to replace another."""

    def register(cls: type[Transport]) -> type[Transport]:
        known = _transports.get(scheme)
        if scheme in _BUILT_IN or (known is not None and type(known) is not cls):
            by = "lynxproto" if known is None else type(known).__qualname__
            raise ConfigError(f"the scheme {scheme!r} is taken by {by}")
        _transports[scheme] = cls()
        return cls

    return register


def get_transport(scheme: str) -> Transport:
    """The transport of ``scheme``.

    Raises :class:`~lynxproto.errors.UnknownTransportError`, which lists what there is, and
    :class:`~lynxproto.errors.MissingDependencyError` if it needs a package that is not installed: which.
    """
    transport = _transports.get(scheme)
    if transport is None:
        transport = _transports[scheme] = _load(scheme)()
    return transport


def _load(scheme: str) -> type[Transport]:
    if scheme in _BUILT_IN:
        module, name = _BUILT_IN[scheme].split(":")
        cls: type[Transport] = getattr(import_module(f"lynxproto.transports.{module}"), name)
        return cls
    for entry in entry_points(group=_GROUP):
        if entry.name == scheme:
            loaded = entry.load()
            if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
                raise ConfigError(f"entry point {entry.value!r} of {scheme}:// is no Transport but {loaded!r}")
            return loaded
    known = ", ".join(f"{s}://" for s in schemes())
    raise UnknownTransportError(f"unknown scheme {scheme!r}; there are {known}; for example tcp://127.0.0.1:7411")


def parse_url(url: str) -> Address:
    """Take a URL apart. Raises :class:`~lynxproto.errors.ConfigError`, which says what is wrong with it."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL: {error}") from error
    try:
        form = get_transport(scheme).address
    except UnknownTransportError as error:
        raise UnknownTransportError(f"{url!r}: {error}") from None
    if parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"{url!r}: a {scheme}:// URL takes no user, query or fragment")
    match form:
        case "HOST:PORT" if host and port is not None and parts.path in ("", "/"):
            return Address(scheme, host, port)
        case "/PATH" if parts.path and not parts.netloc:
            return Address(scheme, path=parts.path)
        case "NAME" if parts.netloc and not parts.path:
            return Address(scheme, path=parts.netloc)
    example = f", for example {scheme}://127.0.0.1:7411" if form == "HOST:PORT" else ""
    raise ConfigError(f"{url!r}: expected {scheme}://{form}{example}")


def check_plaintext(url: str, *, insecure: bool, tls: bool) -> None:
    """Refuse ``url`` if strangers could read or reach what it carries and nobody asked for that.

    A transport that is not :attr:`~lynxproto.transports.Transport.secure` needs ``insecure``, with two exceptions.
    ``tcp://`` on a loopback address stays on this machine: only root can listen in. (Other users of the machine can
    connect there: give both sides a shared secret where there are any.) A transport with
    :attr:`~lynxproto.transports.Transport.tickets` may have a ``tls`` context instead.

    Raises :class:`~lynxproto.errors.ConfigError`, which says what to do.
    """
    address = parse_url(url)
    transport = get_transport(address.scheme)
    if insecure or transport.secure or (tls and transport.tickets):
        return
    if address.scheme == "tcp" and _is_loopback(address.host):
        return
    instead = ", or a TLS context (--ca...), which authenticates and does not encrypt" if transport.tickets else ""
    raise ConfigError(
        f"{url!r} is plaintext: whoever is on the way can read and change what it carries; use tcps:// with "
        f"certificates{instead}, or say that you want plaintext (insecure=True, --insecure)"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
