"""Sessions for programs without asyncio: the names of :mod:`lynxproto.session`, with ``with`` and ``for``.

Methods that wait take ``timeout`` in seconds (None: as long as it takes) and raise
:class:`~lynxproto.errors.DeadlineError` when it is over; the transfer itself goes on. Everything may be called from
several threads.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from lynxproto import session
from lynxproto._endpoint import Client, Server
from lynxproto._incoming import Incoming
from lynxproto._io import IOThread
from lynxproto._outgoing import Outgoing, borrow
from lynxproto._stats import Progress, Result, Snapshot, TransferStats
from lynxproto.access import Principal
from lynxproto.cachefile import Cache
from lynxproto.chunk import Part
from lynxproto.config import Config
from lynxproto.errors import DeadlineError
from lynxproto.linkpolicy import AutoPolicy
from lynxproto.manifest import FetchKey, Manifest, Want
from lynxproto.policy import Policy

__all__ = ["IncomingTransfer", "OutgoingTransfer", "Receiver", "Sender", "connect", "listen"]

T = TypeVar("T")
SideT = TypeVar("SideT", Incoming, Outgoing)


def _wait(io: IOThread, coroutine: Coroutine[Any, Any, T], timeout: float | None) -> T:
    future = io.submit(coroutine)
    try:
        return future.result(timeout)
    except concurrent.futures.TimeoutError:
        if future.done():  # the coroutine's own TimeoutError (DeadlineError is one)
            raise
        future.cancel()
        raise DeadlineError(f"not done within {timeout:g} s") from None
    except BaseException:  # KeyboardInterrupt, for example
        future.cancel()
        raise


class _Transfer(Generic[SideT]):
    """What both directions have."""

    def __init__(self, io: IOThread, side: SideT) -> None:
        self._io = io
        self._side: SideT = side

    @property
    def id(self) -> int:
        """The transfer's 128-bit id."""
        return self._side.id

    @property
    def manifest(self) -> Manifest:
        """What it carries."""
        return self._side.manifest

    @property
    def principal(self) -> Principal:
        """Who is at the other end."""
        return self._side.principal

    @property
    def stats(self) -> TransferStats:
        """Chunks, bytes and times so far, by level."""
        return self._side.stats

    @property
    def released(self) -> bool:
        """Whether the transfer touches its arrays no more."""
        return self._side.released

    def wait_released(self, timeout: float | None = None) -> None:
        """Return once :attr:`released` is true."""
        _wait(self._io, self._side.wait_released(), timeout)

    def cancel(self, above_level: int | None = None, timeout: float | None = None) -> None:
        """Cancel the transfer, or only its levels above ``above_level``.

        When the whole was cancelled, no thread touches the arrays after this returns.
        """
        _wait(self._io, self._side.cancel(above_level), timeout)


class OutgoingTransfer(_Transfer[Outgoing]):
    """See :class:`lynxproto.session.OutgoingTransfer`."""

    def write(self, layer: int, *arrays: Any, importance: Any = None, copy: bool = False) -> None:
        """Send one layer; the arrays are borrowed until :attr:`released`, unless ``copy``.

        ``importance``: how much each token was attended to, for a policy that ranks tokens by it.
        """
        self._io.call(self._side.write, layer, borrow(self._side.manifest, layer, arrays, copy=copy), importance)

    def result(self, first_token: int, logit_gap: float | None = None) -> None:
        """Tell the receiver the first token."""
        self._io.call(self._side.result, first_token, logit_gap)

    def accepted(self, timeout: float | None = None) -> None:
        """Return when the receiver has its memory ready."""
        _wait(self._io, self._side.wait_accepted(), timeout)

    def finish(self, timeout: float | None = None) -> None:
        """Return when the receiver has confirmed everything."""
        _wait(self._io, self._side.finish(), timeout)

    def send(self, cache: Cache, timeout: float | None = None, *, importance: Sequence[Any] | None = None) -> None:
        """Write all layers of ``cache`` (``importance``: one entry a layer) and its result, and finish."""
        _wait(self._io, self._side.send_cache(cache, importance), timeout)


class IncomingTransfer(_Transfer[Incoming]):
    """See :class:`lynxproto.session.IncomingTransfer`."""

    @property
    def arrays(self) -> Mapping[tuple[int, Part], Any]:
        """``(layer, part)`` -> the array that ``allocate`` gave."""
        return self._side.arrays

    @property
    def late(self) -> frozenset[int]:
        """Levels that missed a deadline with the policy ``wait``."""
        return frozenset(self._side.late)

    @property
    def degraded(self) -> int | None:
        """The level that this transfer ends at because of a missed deadline, or None."""
        return self._side.degraded

    def on_progress(self, callback: Callable[[Progress], object] | None) -> None:
        """Call ``callback`` when chunks have arrived, on the I/O thread: it must be quick and must not wait.

        What had arrived before is told at once.
        """
        self._side.on_progress = callback
        self._io.soon(self._side.tell_progress)

    def ready(self, level: int = 0, layer: int | None = None, timeout: float | None = None) -> None:
        """Return when the arrays (of one layer, or all) hold ``level``."""
        _wait(self._io, self._side.ready(level, layer), timeout)

    def is_ready(self, level: int = 0, layer: int | None = None) -> bool:
        """Whether :meth:`ready` would return at once."""
        return self._io.call(self._side.is_ready, level, layer)

    def exact(self, timeout: float | None = None, layer: int | None = None) -> None:
        """Return when every word (of ``layer``, or all) is in place and every digest matched."""
        _wait(self._io, self._side.exact(layer), timeout)

    def when_ready(self, level: int = 0, layer: int | None = None) -> concurrent.futures.Future[None]:
        """A future that is done when :meth:`ready` would return, with its error if it would raise."""
        return self._io.submit(self._side.ready(level, layer))

    def when_exact(self, layer: int | None = None) -> concurrent.futures.Future[None]:
        """The same for :meth:`exact`."""
        return self._io.submit(self._side.exact(layer))

    def result(self, timeout: float | None = None) -> Result:
        """Prefill's first token."""
        return _wait(self._io, self._side.result(), timeout)

    def urgent(self) -> None:
        """Ask the sender to prefer this transfer's residual."""
        self._io.call(self._side.urgent)


class _Session:
    """An open endpoint: iterate over it to receive transfers."""

    _endpoint: Client | Server

    @property
    def url(self) -> str:
        """Where it is connected to, or listens (with the real port)."""
        return self._endpoint.url

    def __enter__(self) -> Self:
        self._endpoint.start()
        try:
            _wait(self._endpoint.thread(), self._endpoint.open(), None)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close: unfinished transfers are cancelled, and no thread touches their arrays when this returns."""
        self._endpoint.close()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new transfers, and let those under way finish; False if some are left after ``timeout`` seconds."""
        try:
            _wait(self._endpoint.thread(), self._endpoint.drain(), timeout)
        except DeadlineError:
            return False
        return True

    def snapshot(self) -> Snapshot:
        """Counters and gauges now; see :meth:`lynxproto.session.Receiver.snapshot`."""
        return self._endpoint.thread().call(self._endpoint.snapshot)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> IncomingTransfer:
        io = self._endpoint.thread()
        while (incoming := self._endpoint.take()) is None:
            if not _wait(io, self._endpoint.offered(), None):
                raise StopIteration
        return IncomingTransfer(io, incoming)


class Sender(_Session):
    """See :class:`lynxproto.session.Sender`."""

    def __init__(self, endpoint: Client) -> None:
        self._endpoint = self._client = endpoint

    def open(
        self,
        manifest: Manifest,
        policy: Policy | AutoPolicy | None = None,
        *,
        deadline: float = float("inf"),
        resume: bytes | None = None,
    ) -> OutgoingTransfer:
        """Offer a transfer."""
        io = self._client.thread()
        return OutgoingTransfer(io, io.call(self._client.offer_out, manifest, policy, deadline, resume))

    def fetch(
        self,
        key: FetchKey,
        wants: Sequence[Want] | None = None,
        *,
        lease: float = 0.0,
        timeout: float | None = None,
    ) -> IncomingTransfer:
        """Ask the peer for a cache."""
        io = self._client.thread()
        return IncomingTransfer(io, _wait(io, self._client.peer.fetch(key, wants, lease), timeout))


class Receiver(_Session):
    """See :class:`lynxproto.session.Receiver`."""

    def __init__(self, endpoint: Server) -> None:
        self._endpoint = endpoint


def connect(url: str, config: Config | None = None, **options: Any) -> Sender:
    """Connect to a peer: ``with connect("tcps://decode:7411") as sender``. Options: :func:`lynxproto.connect`."""
    return Sender(session.connect(url, config, **options)._endpoint)


def listen(url: str, config: Config | None = None, **options: Any) -> Receiver:
    """Listen for peers: ``with listen(url, tls=...) as receiver``. Options: :func:`lynxproto.listen`."""
    return Receiver(session.listen(url, config, **options)._endpoint)
