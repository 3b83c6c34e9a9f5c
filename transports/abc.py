"""What a transport is: a byte stream that a connection can run over, and a listener that yields such streams.

In the manner of anyio's stream ABCs, with three failures kept apart: *you* closed it
(:class:`~lynxproto.errors.StreamClosedError`), the peer ended it (:meth:`ByteStream.receive_into` returns 0), and the
link broke (:class:`~lynxproto.errors.TransportError`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

__all__ = ["ByteStream", "Listener", "take"]


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


class ByteStream(_Resource):
    """A reliable, ordered byte stream. One task may receive while another sends; neither call may overlap itself.

    A stream keeps few bytes of its own: :meth:`send` returns when the link below has taken the bytes, so that the
    caller can still choose what goes next.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The peer's address, for messages."""

    @abstractmethod
    async def receive_into(self, buffer: memoryview) -> int:
        """Receive at least one byte into ``buffer`` (writable, not empty) and return how many; 0 when the peer ended.

        Raises :class:`~lynxproto.errors.TransportError` if the link broke and
        :class:`~lynxproto.errors.StreamClosedError` if this side closed the stream.
        """

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
