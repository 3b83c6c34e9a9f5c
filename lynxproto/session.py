"""Sessions: :func:`connect` and :func:`listen`, and the transfers that run over them.

I/O runs on a thread of its own with its own event loop, codecs on a few more; so the methods here may be awaited on
any asyncio loop, and a busy engine never makes its peer believe that it is gone. :mod:`lynxproto.blocking` has the same
names for programs without asyncio.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lynxproto._endpoint import Client, Server
from lynxproto._incoming import Incoming
from lynxproto._io import IOThread
from lynxproto._journal import Observe
from lynxproto._options import Allocate, Deadline, OnFetch, Options, Wants, allocate_arrays
from lynxproto._outgoing import Outgoing, borrow
from lynxproto._stats import LevelStats, Progress, Result, Snapshot, TransferStats
from lynxproto.access import Authorize, Principal
from lynxproto.cachefile import Cache
from lynxproto.capture import CaptureWriter
from lynxproto.chunk import Part
from lynxproto.config import Config
from lynxproto.errors import (
    StateError,
)
from lynxproto.linkpolicy import AutoPolicy
from lynxproto.manifest import FetchKey, Manifest, Want
from lynxproto.policy import Policy
from lynxproto.spool import StateFolder
from lynxproto.transports import Link

__all__ = [
    "Deadline",
    "IncomingTransfer",
    "LevelStats",
    "OutgoingTransfer",
    "Progress",
    "Receiver",
    "Released",
    "Result",
    "Sender",
    "Snapshot",
    "TransferStats",
    "connect",
    "listen",
]

T = TypeVar("T")


class Released:
    """Fires when a transfer touches its arrays no more: confirmed, cancelled, failed, or its lease ran out."""

    def __init__(self, io: IOThread, side: Outgoing | Incoming) -> None:
        self._io = io
        self._side = side

    def is_set(self) -> bool:
        """Whether it has fired."""
        return self._side.released

    async def wait(self) -> None:
        """Return once it has fired."""
        if not self._side.released:
            await asyncio.wrap_future(self._io.submit(self._side.wait_released()))


class _Transfer:
    """What both directions have."""

    def __init__(self, io: IOThread, side: Outgoing | Incoming) -> None:
        self._io = io
        self._base = side
        self.released = Released(io, side)

    @property
    def id(self) -> int:
        """The transfer's 128-bit id."""
        return self._base.id

    @property
    def manifest(self) -> Manifest:
        """What it carries."""
        return self._base.manifest

    @property
    def principal(self) -> Principal:
        """Who is at the other end."""
        return self._base.principal

    @property
    def stats(self) -> TransferStats:
        """Chunks, bytes and times so far, by level."""
        return self._base.stats

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self._io.submit(coroutine))


class OutgoingTransfer(_Transfer):
    """A cache on its way out; made by :meth:`Sender.open`."""

    def __init__(self, io: IOThread, side: Outgoing) -> None:
        super().__init__(io, side)
        self._side = side

    async def write(self, layer: int, *arrays: Any, importance: Any = None, copy: bool = False) -> None:
        """Send one layer: its keys and its values (in general: one array for each part in the manifest's order).

        Arrays have shape ``[kv_heads, tokens, head_dim]`` and hold words, or values of the manifest's dtype (NumPy,
        ml_dtypes, torch on the CPU). They are borrowed, not copied: leave them alone until :attr:`released` fires, or
        pass ``copy=True``. Returns at once; layers may come in any order, while prefill still runs. ``importance``: how
        much each token was attended to, ``[kv_heads, tokens]`` or ``[tokens]``, for a policy that ranks tokens by it.

        Raises :class:`~lynxproto.errors.SpecError` for arrays that do not match the manifest, and the transfer's own
        error if it is over (:class:`~lynxproto.errors.RejectedError`...).
        """
        words = borrow(self._side.manifest, layer, arrays, copy=copy)
        self._io.call(self._side.write, layer, words, importance)

    def result(self, first_token: int, logit_gap: float | None = None) -> None:
        """Tell the receiver the first token (and the gap between its two largest logits): prefill knows it already."""
        self._io.call(self._side.result, first_token, logit_gap)

    async def accepted(self) -> None:
        """Return when the receiver has its memory ready. Raises :class:`~lynxproto.errors.RejectedError` if not."""
        await self._run(self._side.wait_accepted())

    async def finish(self) -> None:
        """Return when the receiver has confirmed everything; all layers must be written.

        Raises what prevented it: :class:`~lynxproto.errors.RejectedError`,
        :class:`~lynxproto.errors.TransferCancelledError`, :class:`~lynxproto.errors.DigestError`,
        :class:`~lynxproto.errors.TransportError`...
        """
        await self._run(self._side.finish())

    async def send(self, cache: Cache, *, importance: Sequence[Any] | None = None) -> None:
        """Write all layers of ``cache`` and its result, and finish; ``importance``: one entry a layer."""
        await self._run(self._side.send_cache(cache, importance))

    async def cancel(self, above_level: int | None = None) -> None:
        """Cancel the transfer, or only its levels above ``above_level``.

        When the whole was cancelled, no thread reads the borrowed arrays after this returns.
        """
        await self._run(self._side.cancel(above_level))


class IncomingTransfer(_Transfer):
    """A cache on its way in; yielded by :class:`Receiver`, or returned by ``fetch``."""

    def __init__(self, io: IOThread, side: Incoming) -> None:
        super().__init__(io, side)
        self._side = side

    @property
    def arrays(self) -> Mapping[tuple[int, Part], Any]:
        """``(layer, part)`` -> the array that ``allocate`` gave, ``[kv_heads, tokens, head_dim]``."""
        return self._side.arrays

    @property
    def late(self) -> frozenset[int]:
        """Levels that missed a deadline with the policy ``wait``."""
        return frozenset(self._side.late)

    @property
    def degraded(self) -> int | None:
        """The level that this transfer ends at because of a missed deadline with the policy ``degrade``, or None."""
        return self._side.degraded

    @property
    def state_error(self) -> StateError | None:
        """Why this transfer cannot go on after a restart, though there is a state folder: it is full, or broken.

        The transfer itself is not affected.
        """
        return self._side.state_error

    @property
    def on_progress(self) -> Callable[[Progress], object] | None:
        """Called when chunks have arrived, on the I/O thread: it must be quick and must not wait.

        What had arrived before it was set is told at once.
        """
        return self._side.on_progress

    @on_progress.setter
    def on_progress(self, callback: Callable[[Progress], object] | None) -> None:
        self._side.on_progress = callback
        self._io.soon(self._side.tell_progress)

    async def ready(self, level: int = 0, layer: int | None = None) -> None:
        """Return when the arrays (of one layer, or all) hold ``level``, or a tile's last level if that is lower.

        Raises why that will not happen: :class:`~lynxproto.errors.TransferCancelledError`,
        :class:`~lynxproto.errors.DeadlineError`, :class:`~lynxproto.errors.TransportError`...
        """
        await self._run(self._side.ready(level, layer))

    def is_ready(self, level: int = 0, layer: int | None = None) -> bool:
        """Whether :meth:`ready` would return at once."""
        return self._io.call(self._side.is_ready, level, layer)

    async def exact(self, layer: int | None = None) -> None:
        """Return when every word is in place and every digest matched; else raise, also for a degraded transfer.

        ``layer``: of this layer only, which may be long before the others.
        """
        await self._run(self._side.exact(layer))

    async def result(self) -> Result:
        """Prefill's first token, once it has arrived.

        Raises :class:`~lynxproto.errors.NotFoundError` if the transfer ended and the sender never told one.
        """
        return await self._run(self._side.result())

    def urgent(self) -> None:
        """Ask the sender to prefer this transfer's residual: drafting is close to its limit."""
        self._io.call(self._side.urgent)

    async def cancel(self, above_level: int | None = None) -> None:
        """Cancel the transfer, or only its levels above ``above_level`` (bytes not yet sent never will be).

        When the whole was cancelled, no thread writes to the arrays after this returns.
        """
        await self._run(self._side.cancel(above_level))


class _Session:
    """An open endpoint: iterate over it to receive transfers."""

    def __init__(self, endpoint: Client | Server) -> None:
        self._endpoint = endpoint

    @property
    def url(self) -> str:
        """Where it is connected to, or listens (with the real port)."""
        return self._endpoint.url

    async def __aenter__(self) -> Self:
        endpoint = self._endpoint
        endpoint.start()
        try:
            await asyncio.wrap_future(endpoint.thread().submit(endpoint.open()))
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close: unfinished transfers are cancelled, and no thread touches their arrays when this returns."""
        await asyncio.shield(asyncio.to_thread(self._endpoint.close))

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no new transfers or sessions (peers are told SHUTDOWN), and let those under way finish.

        What was accepted already is still to be iterated over.

        Returns True when none is left, False if some are after ``timeout`` seconds: closing hands them back to their
        senders as cancelled.
        """
        io = self._endpoint.thread()
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wrap_future(io.submit(self._endpoint.drain()))
        except TimeoutError:
            return False
        return True

    def snapshot(self) -> Snapshot:
        """What went over the wire so far and what is under way now, of all its peers together."""
        return self._endpoint.thread().call(self._endpoint.snapshot)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> IncomingTransfer:
        io = self._endpoint.thread()
        while (incoming := self._endpoint.take()) is None:
            if not await asyncio.wrap_future(io.submit(self._endpoint.offered())):
                raise StopAsyncIteration
        return IncomingTransfer(io, incoming)


class Sender(_Session):
    """A connected session; made by :func:`connect`. Sends, fetches, and (iterated over) receives too."""

    _endpoint: Client

    def open(
        self,
        manifest: Manifest,
        policy: Policy | AutoPolicy | None = None,
        *,
        deadline: float = float("inf"),
        resume: bytes | None = None,
    ) -> OutgoingTransfer:
        """Offer a transfer; write to it at once, while the peer still makes room.

        ``policy`` cuts it into tiles and chooses codecs (default: the session's, which may choose for each transfer:
        :meth:`Policy.auto`; else :meth:`Policy.progressive` for the cache's dtype); the manifest's ``codecs`` and
        ``lossy`` follow from it. ``deadline`` (``time.monotonic()``) decides between anchors of several transfers.
        ``resume``: 32 random bytes (``secrets.token_bytes(32)``), as secret as the cache. Whoever opens the same
        manifest with the same policy and secret again, after a restart, sends only what the receiver lacks.

        Raises :class:`~lynxproto.errors.LocalError` for what this side or the handshake rules out, and the session's
        error if it is over.
        """
        io = self._endpoint.thread()
        return OutgoingTransfer(io, io.call(self._endpoint.offer_out, manifest, policy, deadline, resume))

    async def fetch(
        self, key: FetchKey, wants: Sequence[Want] | None = None, *, lease: float = 0.0
    ) -> IncomingTransfer:
        """Ask the peer for a cache; returns when it is on its way and memory is ready.

        ``wants`` is what this side lacks (default: all); ``lease``: seconds that the peer should keep it afterwards.

        Raises :class:`~lynxproto.errors.NotFoundError` if the peer does not hold it.
        """
        io = self._endpoint.thread()
        incoming = await asyncio.wrap_future(io.submit(self._endpoint.peer.fetch(key, wants, lease)))
        return IncomingTransfer(io, incoming)


class Receiver(_Session):
    """A listening endpoint; made by :func:`listen`. ``async for transfer in receiver`` yields what peers send."""

    _endpoint: Server


def connect(
    url: str,
    config: Config | None = None,
    *,
    policy: Policy | AutoPolicy | None = None,
    allocate: Allocate = allocate_arrays,
    wants: Wants | None = None,
    on_fetch: OnFetch | None = None,
    authorize: Authorize | None = None,
    observe: Observe | None = None,
    deadlines: Sequence[Deadline] = (),
    intermediate: bool = False,
    tls: ssl.SSLContext | None = None,
    insecure: bool = False,
    link: Link | None = None,
    stripes: int = 1,
    threads: int | None = None,
    connect_timeout: float = 10.0,
    capture: CaptureWriter | None = None,
) -> Sender:
    """Connect to a peer: ``async with connect("tcps://decode:7411") as sender``.

    Entering shakes hands. A session whose link breaks is resumed, with growing pauses, for at most
    ``config.session_timeout`` seconds; only what is missing is sent again.

    ``tls`` (for ``tcps://``): see :func:`lynxproto.transports.client_context`. ``insecure`` allows
    plaintext (``tcp://``) beyond loopback addresses. ``link`` lies between
    this side and its streams: a :class:`~lynxproto.transports.TokenBucket` slows its sending down to a given speed.
    ``stripes``: parallel byte streams. ``threads``: codec threads (default: all CPUs). The others are as in
    :func:`listen`.

    Entering raises :class:`~lynxproto.errors.ConfigError` for a bad URL, :class:`~lynxproto.errors.TransportError` when
    the peer cannot be reached, :class:`~lynxproto.errors.AuthenticationError`, :class:`~lynxproto.errors.VersionError`
    or :class:`~lynxproto.errors.ProtocolError` when the handshake fails.
    """
    options = Options(
        policy=policy,
        allocate=allocate,
        wants=wants,
        on_fetch=on_fetch,
        authorize=authorize,
        observe=observe,
        deadlines=deadlines,
        intermediate=intermediate,
        tls=tls,
        insecure=insecure,
        link=link,
        stripes=stripes,
        threads=threads,
        connect_timeout=connect_timeout,
        capture=capture,
    )
    return Sender(Client(url, config, options))


def listen(
    url: str,
    config: Config | None = None,
    *,
    policy: Policy | AutoPolicy | None = None,
    allocate: Allocate = allocate_arrays,
    wants: Wants | None = None,
    on_fetch: OnFetch | None = None,
    authorize: Authorize | None = None,
    observe: Observe | None = None,
    deadlines: Sequence[Deadline] = (),
    intermediate: bool = False,
    tls: ssl.SSLContext | None = None,
    insecure: bool = False,
    link: Link | None = None,
    threads: int | None = None,
    state: StateFolder | str | Path | None = None,
    capture: CaptureWriter | None = None,
) -> Receiver:
    """Listen for peers: ``async with listen("tcps://0.0.0.0:7411", tls=...) as receiver``. Port 0 takes a free one.

    ``allocate(manifest)`` returns the arrays to decode into: ``{(layer, part): array}``, writable, of words or values
    of the manifest's dtype, ``[kv_heads, tokens, head_dim]`` with any strides over heads and tokens; it runs on a
    thread, and refuses a transfer by raising a :class:`~lynxproto.errors.LynxError`. ``wants(manifest)`` tells what
    this side lacks (None: everything). ``on_fetch(key, wants)`` returns the :class:`~lynxproto.cachefile.Cache` that a
    peer asks for, or None; it is sent by ``policy``. ``authorize(request)`` says whether the peer may push or pull
    that (:class:`~lynxproto.access.TransferRequest`); it runs on a thread, before anything is allocated or looked up,
    and False refuses with FORBIDDEN. ``observe(event, fields)``: told what happens, as the log is (on the I/O thread;
    ``docs/operations.md`` lists the events). ``deadlines``: see :class:`Deadline`. ``intermediate``: decode
    every level as it arrives, not only the first, the last and those that somebody waits for. ``state``: a folder
    (:class:`~lynxproto.spool.StateFolder`) in which received chunks are kept, so that transfers go on after a restart;
    it is readable for this user only. ``capture`` records what crosses the session's streams,
    unencrypted; the caller closes it after the session. ``tls`` (for ``tcps://``): see
    :func:`lynxproto.transports.server_context`; ``insecure`` as in :func:`connect`.
    """
    options = Options(
        policy=policy,
        allocate=allocate,
        wants=wants,
        on_fetch=on_fetch,
        authorize=authorize,
        observe=observe,
        deadlines=deadlines,
        intermediate=intermediate,
        tls=tls,
        insecure=insecure,
        link=link,
        threads=threads,
        state=StateFolder(state) if isinstance(state, str | Path) else state,
        capture=capture,
    )
    return Receiver(Server(url, config, options))
