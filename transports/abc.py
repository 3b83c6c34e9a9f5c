"""What a transport is: byte streams that a connection can run over, listeners that accept them, and who makes both.

In the manner of anyio's stream ABCs, with three failures kept apart: *you* closed it
(:class:`~lynxproto.errors.StreamClosedError`), the peer ended it (:meth:`ByteStream.receive_into` returns 0), and the
link broke (:class:`~lynxproto.errors.TransportError`). ``docs/transports.md`` tells how to write a transport.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from lynxproto.digest import Sums

__all__ = [
    "Address",
    "ByteStream",
    "Credentials",
    "Link",
    "Listener",
    "Setup",
    "Transport",
    "WrappedListener",
    "WrappedStream",
    "take",
]


#: Bytes that a core's cache holds.
_PIECE: Final = 256 << 10


class _Resource(ABC):
    """Something to be closed, usable in ``async with``."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close at once. Idempotent; calls that wait on this object raise ``StreamClosedError``."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a transport has verified of who is at the other end."""

    names: tuple[str, ...] = ()
    """Of its certificate: URIs, then DNS names, e-mail addresses and the common name."""
    uid: int | None = None
    """Of its process, over a unix socket."""


class ByteStream(_Resource):
    """A reliable, ordered byte stream. One task may receive while another sends; neither call may overlap itself.

    A stream keeps few bytes of its own: :meth:`send` returns when the link below has taken the bytes, so that the
    caller can still choose what goes next.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The peer's address, for messages."""

    @property
    def credentials(self) -> Credentials:
        """Who the peer is; known once bytes have arrived."""
        return Credentials()

    @property
    def link_rate(self) -> float | None:
        """Bytes a second that a link behind the system's buffers carried lately, which :meth:`send` cannot show.

        0.0 while too little went to tell. None, the default, if the time of :meth:`send` is all that there is to know.
        """
        return None

    @abstractmethod
    async def receive_into(self, buffer: memoryview) -> int:
        """Receive at least one byte into ``buffer`` (writable, not empty) and return how many; 0 when the peer ended.

        ``buffer`` may lie in the caller's final destination. Cancelling the call loses nothing of the stream, and
        nothing is written to ``buffer`` after that.

        Raises :class:`~lynxproto.errors.TransportError` if the link broke and
        :class:`~lynxproto.errors.StreamClosedError` if this side closed the stream.
        """

    async def receive_summed(self, sums: Sums) -> int:
        """Receive what comes next of ``sums.data``, add it to ``sums``, return how many bytes; 0 when the peer ended.

        Otherwise as :meth:`receive_into`. A stream that gets at bytes piece by piece can override this, to add each
        piece while the processor's cache has it.
        """
        count = await self.receive_into(sums.data[sums.there : sums.there + _PIECE])
        sums.add(sums.there + count)
        return count

    @abstractmethod
    async def send(self, buffers: Sequence[memoryview]) -> None:
        """Send all bytes of ``buffers`` in order, without joining them. They are read until this returns or raises.

        Raises as :meth:`receive_into` does; then any part may have been sent.
        """

    @abstractmethod
    async def send_eof(self) -> None:
        """Tell the peer that nothing more will be sent; receiving goes on. Idempotent.

        Closing at once instead can destroy what was sent last: a socket that is closed with unread bytes resets the
        link (RFC 1122, section 4.2.2.13). Raises as :meth:`receive_into` does.
        """


class Listener(_Resource):
    """Accepts streams."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it listens, with the real port."""

    @abstractmethod
    async def accept(self) -> ByteStream:
        """Wait for a peer. Raises :class:`~lynxproto.errors.StreamClosedError` once the listener is closed."""


class Address(NamedTuple):
    """A parsed URL; ``path`` is a unix socket's path or a memory transport's name."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""


class Link(Protocol):
    """What lies between a session and its streams, below TLS: a shaper, injected faults, a recorder."""

    def over(self, stream: ByteStream) -> ByteStream:
        """``stream``, which the result owns, seen through this link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How streams are to be made, whatever the scheme."""

    tls: ssl.SSLContext | None = None
    """For schemes that encrypt with TLS."""
    link: Link | None = None
    """Wraps every stream as soon as it exists, below TLS."""
    insecure: bool = False
    """The user asked for a scheme that does not encrypt."""

    def stream_through_link(self, stream: ByteStream) -> ByteStream:
        """``stream`` as the link lets it be seen."""
        return stream if self.link is None else self.link.over(stream)

    def listener_through_link(self, listener: Listener) -> Listener:
        """``listener`` with its streams so."""
        return listener if self.link is None else WrappedListener(listener, self.link)


class Transport(ABC):
    """Makes the streams and listeners of one URL scheme. Has no state; made without arguments.

    Third parties register one under the entry point group ``lynxproto.transports``: name = scheme, value = class.
    """

    #: What follows ``scheme://`` in its URLs.
    address: ClassVar[Literal["HOST:PORT", "/PATH", "NAME"]]
    #: Whether nobody on the way can read or change the bytes: they are encrypted, or stay on the machine.
    secure: ClassVar[bool] = False
    #: Whether a TLS context authenticates its peers though their data are not encrypted.
    tickets: ClassVar[bool] = False

    @abstractmethod
    async def connect(self, address: Address, setup: Setup) -> ByteStream:
        """Connect. The caller bounds the time.

        Raises :class:`~lynxproto.errors.TransportError` if the link cannot be made: why, and what to do.
        """

    @abstractmethod
    async def listen(self, address: Address, setup: Setup) -> Listener:
        """Listen; port 0 takes a free one.

        Raises :class:`~lynxproto.errors.TransportError` if the address cannot be had: why, and what to do.
        """


class WrappedStream(ByteStream):
    """``stream``, which it owns: a base for streams that change one thing about another."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    @property
    def name(self) -> str:
        """The peer's address, for messages."""
        return self._stream.name

    @property
    def credentials(self) -> Credentials:
        """See :attr:`ByteStream.credentials`."""
        return self._stream.credentials

    @property
    def link_rate(self) -> float | None:
        """See :attr:`ByteStream.link_rate`."""
        return self._stream.link_rate

    async def receive_into(self, buffer: memoryview) -> int:
        """See :meth:`ByteStream.receive_into`."""
        return await self._stream.receive_into(buffer)

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`."""
        await self._stream.send(buffers)

    async def send_eof(self) -> None:
        """See :meth:`ByteStream.send_eof`."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """See :meth:`ByteStream.aclose`."""
        await self._stream.aclose()


class WrappedListener(Listener):
    """``listener``, which it owns, with its streams seen through ``link``."""

    def __init__(self, listener: Listener, link: Link) -> None:
        self._listener = listener
        self._link = link

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return self._listener.url

    async def accept(self) -> ByteStream:
        """See :meth:`Listener.accept`."""
        return self._link.over(await self._listener.accept())

    async def aclose(self) -> None:
        """See :meth:`Listener.aclose`."""
        await self._listener.aclose()


def take(buffers: deque[memoryview], nbytes: int) -> list[memoryview]:
    """Remove the first ``nbytes`` bytes (or all, if fewer) from ``buffers`` and return them, without copying."""
    taken: list[memoryview] = []
    while buffers and nbytes > 0:
        first = buffers.popleft()
        if first.nbytes > nbytes:
            buffers.appendleft(first[nbytes:])
            first = first[:nbytes]
        if first.nbytes:
            taken.append(first)
        nbytes -= first.nbytes
    return taken
