"""TLS 1.3 over any byte stream, by the standard library's ``ssl``; mutual unless the listener is told otherwise."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from lynxproto.errors import AuthenticationError, ConfigError, LynxError, TransportError
from lynxproto.transports.abc import Address, ByteStream, Credentials, Listener, Setup, Transport
from lynxproto.transports.tcp import connect_tcp, listen_tcp

__all__ = ["TLSListener", "TLSStream", "TLSTransport", "client_context", "server_context"]

#: Bytes encrypted and sent at once: large enough to be cheap, and to stay in a core's cache.
_RECORDS = 256 << 10


#: Bytes of a handshake at most: certificate chains have a few kilobytes.
_HANDSHAKE_BYTES: Final = 256 << 10
#: After a refusal: how long to wait for the peer to have read why, and what it may have sent meanwhile.
_LINGER_S: Final = 1.0
_LINGER_BYTES: Final = 64 << 10

_EXPIRED = "has expired; renew it, or check the clocks"
_UNSIGNED = "is not signed by an authority that {side} trusts; --ca (ca=) there must name the file that signed it"
#: Why this side refuses the peer's certificate: OpenSSL's verification codes.
_REFUSED: Final = {
    9: "the certificate is not valid yet; check the clocks",
    10: f"the certificate {_EXPIRED}",
    **dict.fromkeys((2, 18, 19, 20, 21), f"the certificate {_UNSIGNED.format(side='this side')}"),
    **dict.fromkeys((62, 64), "connect by a name that the certificate holds, or issue one that names this host"),
}
#: Why the peer refuses this side's: what TLS alerts stand for.
_ALERTS: Final = {
    "CERTIFICATE_EXPIRED": f"this side's certificate {_EXPIRED}",
    "UNKNOWN_CA": f"this side's certificate {_UNSIGNED.format(side='the peer')}",
    "CERTIFICATE_REQUIRED": "it wants a certificate of this side; give --certificate and --key",
    "BAD_CERTIFICATE": "this side's certificate is broken, or does not hold the name that the peer connected to",
    "CERTIFICATE_UNKNOWN": "it refuses this side's certificate; its log says why",
    "UNSUPPORTED_CERTIFICATE": "this side's certificate is not for this use",
}


def _no_password() -> str:
    raise ConfigError("the key is encrypted; lynxproto asks for no passphrase: decrypt it (`openssl pkey`)")


def _context(
    protocol: int, certificate: str | Path | None, key: str | Path | None, ca: str | Path | None
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    loading = f"{certificate}" + (f" with key {key}" if key else "")
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key, _no_password)
        loading = str(ca)
        if ca is not None:
            context.load_verify_locations(ca)
    except OSError as error:  # ssl.SSLError is one
        remedy = "it must be a PEM file"
        if "MISMATCH" in (getattr(error, "reason", None) or ""):
            remedy = "the key belongs to another certificate"
        raise ConfigError(f"cannot load {loading}: {error.strerror or error}; {remedy}") from error
    return context


def client_context(
    *, ca: str | Path | None = None, certificate: str | Path | None = None, key: str | Path | None = None
) -> ssl.SSLContext:
    """A context that checks the server's name and certificate against ``ca`` (default: the system's).

    ``certificate`` and ``key`` (PEM files) prove who this side is. Raises :class:`~lynxproto.errors.ConfigError`.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, ca)
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def server_context(
    *,
    certificate: str | Path,
    key: str | Path | None = None,
    ca: str | Path | None = None,
    client_certificates: bool = True,
) -> ssl.SSLContext:
    """A context with this side's ``certificate`` and ``key`` (PEM files), for clients with certificates by ``ca``.

    ``client_certificates=False`` lets in clients without one; prove who they are by a shared secret then. Raises
    :class:`~lynxproto.errors.ConfigError`.
    """
    if client_certificates and ca is None:
        raise ConfigError(
            "clients must show a certificate: give the ca that signs theirs (--ca), or let them in without "
            "(client_certificates=False, --any-client) and ask for a shared secret"
        )
    context = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, ca)
    if client_certificates:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_version(context: ssl.SSLContext) -> None:
    if context.minimum_version < ssl.TLSVersion.TLSv1_3:
        raise ConfigError(
            f"the TLS context allows {context.minimum_version.name}: set minimum_version = TLSv1_3, or make it with "
            "client_context() or server_context()"
        )


class TLSStream(ByteStream):
    """TLS over ``stream``, which it owns: as the client of ``server_hostname``, or as a server if that is None.

    The handshake happens on first use, so that accepting a stream never waits for its peer. :meth:`handshake`,
    :meth:`receive_into` and :meth:`send` raise :class:`~lynxproto.errors.AuthenticationError` when a certificate is
    not accepted, and :class:`~lynxproto.errors.TransportError` when the peer does not speak TLS 1.3.
    """

    def __init__(self, stream: ByteStream, context: ssl.SSLContext, *, server_hostname: str | None) -> None:
        self._stream = stream
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self._received = memoryview(bytearray(16 << 10))  # a stranger gets no more
        self._shaken = False
        self._left = _HANDSHAKE_BYTES
        self._shaking = asyncio.Lock()
        self._flushing = asyncio.Lock()  # receiving may have to answer (key update) while another task sends

    async def handshake(self) -> None:
        """Shake hands, unless that is done."""
        async with self._shaking:
            while not self._shaken:
                try:
                    self._tls.do_handshake()
                    self._shaken = True
                    self._received = memoryview(bytearray(_RECORDS))
                except ssl.SSLWantReadError:
                    await self._flush()
                    if not await self._fill():
                        raise TransportError(
                            f"{self.name} hung up during the TLS handshake; does it speak TLS (tcps://)? Its log tells "
                            "whether it refused this side"
                        ) from None
                except ssl.SSLError as error:
                    await self._last_words()
                    raise self._explain(error) from error
            await self._flush()

    @property
    def name(self) -> str:
        """The peer's address, for messages."""
        return self._stream.name.replace("tcp://", "tcps://", 1)

    async def receive_into(self, buffer: memoryview) -> int:
        """See :meth:`ByteStream.receive_into`."""
        if not self._shaken:
            await self.handshake()
        while True:
            try:
                count = self._read(buffer)
                while 0 < count < buffer.nbytes:  # OpenSSL gives one record (16 KiB) at a time
                    try:
                        more = self._read(buffer[count:])
                    except ssl.SSLError:  # nothing more, or what the next call will meet
                        break
                    if not more:
                        break
                    count += more
                return count
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    await asyncio.shield(self._flush())  # the caller may cancel; half a record must not be lost
                if not await self._fill():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                await self._last_words()
                raise self._explain(error) from error

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`."""
        if not self._shaken:
            await self.handshake()
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while view.nbytes:
                try:
                    view = view[self._tls.write(view[:_RECORDS]) :]
                except ssl.SSLError as error:
                    raise self._explain(error) from error
                if self._outgoing.pending >= _RECORDS:
                    await self._flush()
        await self._flush()

    async def send_eof(self) -> None:
        """See :meth:`ByteStream.send_eof`. No close_notify: a session says GOAWAY, which TLS authenticates."""
        await self._flush()
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """See :meth:`ByteStream.aclose`."""
        await self._stream.aclose()

    @property
    def credentials(self) -> Credentials:
        """The names in the peer's certificate."""
        certificate: dict[str, Any] = (self._tls.getpeercert() if self._shaken else None) or {}
        names = list(certificate.get("subjectAltName", ()))
        for part in certificate.get("subject", ()):
            names += [("CN", value) for kind, value in part if kind == "commonName"]
        order = ("URI", "DNS", "IP Address", "email", "CN")
        names = sorted((pair for pair in names if pair[0] in order), key=lambda pair: order.index(pair[0]))
        return Credentials(names=tuple(dict.fromkeys(name for _, name in names)))

    @property
    def link_rate(self) -> float | None:
        """See :attr:`ByteStream.link_rate`."""
        return self._stream.link_rate

    def _read(self, buffer: memoryview) -> int:
        return cast(int, self._tls.read(buffer.nbytes, cast(bytearray, buffer)))  # typeshed knows less

    async def _fill(self) -> bool:
        count = await self._stream.receive_into(self._received)
        if not self._shaken:
            self._left -= count
            if self._left < 0:
                raise TransportError(f"{self.name}: a TLS handshake of more than {_HANDSHAKE_BYTES} bytes")
        if count:
            self._incoming.write(self._received[:count])
        return count > 0

    async def _flush(self) -> None:
        if self._outgoing.pending:
            async with self._flushing:
                data = self._outgoing.read()
                if data:
                    await self._stream.send([memoryview(data)])

    def _explain(self, error: ssl.SSLError) -> AuthenticationError | TransportError:
        reason = error.reason or str(error)
        if isinstance(error, ssl.SSLCertVerificationError):
            text = error.verify_message.rstrip(".")
            return AuthenticationError(
                f"{self.name} is not trusted: {text}; {_REFUSED.get(error.verify_code, 'check its certificate')}"
            )
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return AuthenticationError(
                f"{self.name} showed no certificate, and this side lets nobody in without; the peer must give "
                "--certificate and --key"
            )
        if "ALERT" in reason:
            for alert, meaning in _ALERTS.items():
                if alert in reason:
                    return AuthenticationError(f"{self.name} does not trust this side ({reason}): {meaning}")
        return TransportError(f"no TLS 1.3 with {self.name}: {reason}; does it speak TLS (tcps://)?")

    async def _last_words(self) -> None:
        """Tell the peer why (a TLS alert), if the link still takes it, and let it read that before the link ends."""
        try:
            async with asyncio.timeout(_LINGER_S):
                await self._flush()
                await self._stream.send_eof()
                left = _LINGER_BYTES  # closing with unread bytes would reset the link, and the alert be lost
                while left > 0 and (count := await self._stream.receive_into(self._received)):
                    left -= count
        except (LynxError, OSError, TimeoutError):
            pass


class TLSListener(Listener):
    """Serves TLS over the streams that ``listener``, which it owns, accepts."""

    def __init__(self, listener: Listener, context: ssl.SSLContext) -> None:
        self._listener = listener
        self._context = context

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return self._listener.url.replace("tcp://", "tcps://", 1)

    async def accept(self) -> ByteStream:
        """See :meth:`Listener.accept`."""
        return TLSStream(await self._listener.accept(), self._context, server_hostname=None)

    async def aclose(self) -> None:
        """See :meth:`Listener.aclose`."""
        await self._listener.aclose()


class TLSTransport(Transport):
    """``tcps://host:port``: TLS 1.3 over TCP. Listening needs a context, made by :func:`server_context`."""

    address = "HOST:PORT"
    secure = True

    async def connect(self, address: Address, setup: Setup) -> ByteStream:
        """See :meth:`Transport.connect`."""
        context = setup.tls or client_context()
        _check_version(context)
        if context.verify_mode != ssl.CERT_REQUIRED and not setup.insecure:
            raise ConfigError(
                "the TLS context does not verify the server: anybody could pose as it; make it with client_context(), "
                "or say that you want that (insecure=True, --insecure)"
            )
        link = setup.stream_through_link(await connect_tcp(address.host, address.port))
        stream = TLSStream(link, context, server_hostname=address.host)
        try:
            await stream.handshake()
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def listen(self, address: Address, setup: Setup) -> Listener:
        """See :meth:`Transport.listen`."""
        if setup.tls is None:
            raise ConfigError(
                "listening with TLS (tcps://) needs a certificate; pass tls=server_context(certificate=...)"
            )
        _check_version(setup.tls)
        return TLSListener(setup.listener_through_link(await listen_tcp(address.host, address.port)), setup.tls)
