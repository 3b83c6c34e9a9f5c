"""TLS 1.3 over any byte stream, by the standard library's ``ssl``; mutual when both sides are given a ``ca``."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lynxproto.errors import AuthenticationError, ConfigError, TransportError
from lynxproto.transports.abc import Address, ByteStream, Listener, Setup, Transport
from lynxproto.transports.tcp import connect_tcp, listen_tcp

__all__ = ["TLSListener", "TLSStream", "TLSTransport", "client_context", "server_context"]

#: Bytes encrypted at once: large enough to be cheap, small enough that an urgent frame does not wait long.
_RECORDS = 64 << 10


def _context(
    protocol: int, certificate: str | Path | None, key: str | Path | None, ca: str | Path | None
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    loading: str | Path | None = certificate
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        loading = ca
        if ca is not None:
            context.load_verify_locations(ca)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"cannot load {loading}: {error.strerror or error}; it must be a PEM file") from error
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
    *, certificate: str | Path, key: str | Path | None = None, ca: str | Path | None = None
) -> ssl.SSLContext:
    """A context with this side's ``certificate`` and ``key`` (PEM files).

    With ``ca``, clients must present a certificate that it signed (mutual authentication). Raises
    :class:`~lynxproto.errors.ConfigError`.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, ca)
    if ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


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
        self._received = memoryview(bytearray(256 << 10))
        self._shaken = False
        self._shaking = asyncio.Lock()
        self._flushing = asyncio.Lock()  # receiving may have to answer (key update) while another task sends

    async def handshake(self) -> None:
        """Shake hands, unless that is done."""
        async with self._shaking:
            while not self._shaken:
                try:
                    self._tls.do_handshake()
                    self._shaken = True
                except ssl.SSLWantReadError:
                    await self._flush()
                    if not await self._fill():
                        raise TransportError(
                            f"{self.name} hung up during the TLS handshake; does it speak TLS (tcps://)?"
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
                return cast(int, self._tls.read(buffer.nbytes, cast(bytearray, buffer)))  # typeshed knows less
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

    async def _fill(self) -> bool:
        count = await self._stream.receive_into(self._received)
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
        if isinstance(error, ssl.SSLCertVerificationError):
            return AuthenticationError(f"{self.name} is not trusted: {error.verify_message}; check the ca")
        if "CERTIFICATE" in (error.reason or ""):
            return AuthenticationError(f"{self.name} does not trust this side: {error.reason}; check the certificate")
        return TransportError(f"no TLS 1.3 with {self.name}: {error.reason or error}; does it speak TLS (tcps://)?")

    async def _last_words(self) -> None:
        """Tell the peer why (a TLS alert), if the link still takes it."""
        try:
            await self._flush()
        except (TransportError, OSError):
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
        link = setup.stream_through_link(await connect_tcp(address.host, address.port))
        stream = TLSStream(link, setup.tls or client_context(), server_hostname=address.host)
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
        return TLSListener(setup.listener_through_link(await listen_tcp(address.host, address.port)), setup.tls)
