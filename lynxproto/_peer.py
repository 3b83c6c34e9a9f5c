"""Drives one :class:`~lynxproto.connection.Connection` over byte streams: the thin shell. Lives on the I/O thread."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

from lynxproto import events
from lynxproto._incoming import Incoming
from lynxproto._io import Signal, Workers
from lynxproto._journal import Journal, reason_of
from lynxproto._linkaware import LinkAware
from lynxproto._options import Options, allocate_arrays
from lynxproto._outgoing import Outgoing
from lynxproto._pace import Pace
from lynxproto.access import Principal, TransferRequest
from lynxproto.admission import Gate, Guest
from lynxproto.chunk import Tile
from lynxproto.config import Config
from lynxproto.connection import Connection, News
from lynxproto.errors import (
    ConnectionClosedError,
    ErrorCode,
    ForbiddenError,
    LimitError,
    LocalError,
    LynxError,
    PeerError,
    RejectedError,
    RemoteError,
    StateError,
    StreamClosedError,
    TransferCancelledError,
    TransportError,
)
from lynxproto.frames import RESUME_KEY_SIZE
from lynxproto.linkpolicy import AutoPolicy
from lynxproto.manifest import FetchKey, Manifest, Want
from lynxproto.policy import Policy
from lynxproto.spool import Spool, transfer_name
from lynxproto.transports import ByteStream

__all__ = ["Dial", "Peer"]

T = TypeVar("T")
_log = logging.getLogger("lynxproto")

Dial = Callable[[], Coroutine[Any, Any, ByteStream]]


class Endpoint(Protocol):
    """What a peer needs of the end that it belongs to."""

    config: Config
    options: Options
    workers: Workers
    journal: Journal
    running: dict[str, Incoming]
    """Incoming transfers of all sessions that may be resumed, by name (:func:`~lynxproto.spool.transfer_name`)."""

    def offer(self, incoming: Incoming, /) -> None:
        """A transfer was accepted."""

    def on_over(self, peer: Peer, /) -> None:
        """A session ended."""


#: Chunks asked for ahead, for each codec thread: one that is done finds the next without the I/O thread's help.
_AHEAD: Final = 2
#: Work on so few bytes of words takes some 50 us: less than to wake a thread, and to be woken by it.
_HERE_BYTES: Final = 64 << 10
#: Protocol timers are looked at so late at most.
_TIMER_SLACK_S: Final = 5e-3
#: Seconds that a stream may take to let go of the memory of a transfer that is over.
_RECLAIM_S: Final = 1.0
#: Seconds that a stream which is to be closed may take to send its last words.
_LINGER_S: Final = 2.0
#: The same where a frame is half sent and the link is slow.
_LONG_LINGER_S: Final = 10.0


@dataclass(slots=True, eq=False)
class _Stripe:
    number: int
    stream: ByteStream
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    pace: Pace = field(default_factory=Pace)
    sending: asyncio.Future[None] | None = None  # while the stream sends what it was given last
    interrupted: asyncio.Future[None] | None = None  # until receiving has let go of its buffer
    closing: bool = False
    linger: asyncio.TimerHandle | None = None
    guest: Guest | None = None
    ready: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def resume(self) -> None:
        """Receiving has let go of its buffer, or is over."""
        if self.interrupted is not None:
            self.interrupted.set_result(None)
            self.interrupted = None


class Peer:
    """One session with one peer."""

    def __init__(self, endpoint: Endpoint, *, dial: Dial | None = None, gate: Gate | None = None) -> None:
        self.config = config = endpoint.config
        self.workers = endpoint.workers
        self.journal = endpoint.journal
        self.connection = Connection(
            config,
            client=dial is not None,
            land=self._land,
            lend=self._lend,
            unix_offset=time.time() - time.monotonic(),
        )
        self.principal = Principal("")
        self.name = "the peer"
        self.error: LynxError | None = None
        self.established = False
        self.over = False
        self.draining = False
        self.bytes_sent = 0
        self.bytes_received = 0
        self.changed = Signal()
        self.outgoing: dict[int, Outgoing] = {}
        self.incoming: dict[int, Incoming] = {}
        self._options = endpoint.options
        self.link = LinkAware(self, self._options.policy)
        self._offer = endpoint.offer
        self._on_over = endpoint.on_over
        self._running = endpoint.running
        self._dial = dial
        self._gate = gate
        self._in_gate = False
        self._held: dict[int, int] = {}  # transfers counted at the gate, and their bytes
        self._stripes: dict[int, _Stripe] = {}
        self._offered: set[int] = set()
        self._fetches: dict[int, asyncio.Future[Incoming]] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._redialing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pumping = self._pump_due = False
        self.encoding = 0  # chunks at the codec threads

    # --- byte streams

    def attach(self, stream: ByteStream, received: bytes = b"", guest: Guest | None = None) -> None:
        """Run the session over ``stream``; ``received`` are bytes already read from it."""
        if self.over:
            self._leave(guest)
            self._track(stream.aclose())
            return
        if self._options.capture is not None:
            stream = self._options.capture.attach(stream, client=self._dial is not None, received=received)
        now = time.monotonic()
        stripe = _Stripe(self.connection.open_stripe(now), stream, guest=guest)
        self._stripes[stripe.number] = stripe
        self.name = stream.name
        if guest is not None:
            guest.evict = lambda: self._evict(stripe)
        if received:
            self.bytes_received += len(received)
            self.connection.receive_data(received, now, stripe.number)
        stripe.tasks = [
            self._loop.create_task(self._receive(stripe), name=f"receive {stream.name}"),
            self._loop.create_task(self._send(stripe), name=f"send {stream.name}"),
        ]
        self.pump()

    def admits(self, stream: ByteStream) -> bool:
        """Whether ``stream`` may join: its peer must be who made the session, by certificate or user id."""
        who = self.principal
        return not who.address or (who.certificate, who.uid) == (stream.credentials.names, stream.credentials.uid)

    async def establish(self) -> None:
        """Client: connect and shake hands; raises what prevents it."""
        assert self._dial is not None
        self.attach(await self._dial())
        await self.changed.until(lambda: self.established or self.over)
        if not self.established:
            raise self.error or ConnectionClosedError(f"{self.name} closed the session during the handshake")
        self._redial()
        await self.link.get_to_know()

    async def _receive(self, stripe: _Stripe) -> None:
        error: RemoteError = ConnectionClosedError(f"{stripe.stream.name} hung up")
        try:
            while True:
                try:
                    buffer = self.connection.get_buffer(stripe.number)
                    sums = self.connection.sums(stripe.number)
                    if sums is None:
                        count = await stripe.stream.receive_into(buffer)
                    else:
                        count = await stripe.stream.receive_summed(sums)
                except asyncio.CancelledError:
                    if stripe.interrupted is None:
                        raise
                    task = asyncio.current_task()
                    assert task is not None
                    task.uncancel()
                    stripe.resume()
                    continue
                if count == 0:
                    if not stripe.ready:
                        text = "hung up during the handshake; its log may say why, or it wants TLS (tcps://)"
                        error = ConnectionClosedError(f"{stripe.stream.name} {text}")
                    break
                self.bytes_received += count
                self.connection.buffer_updated(count, time.monotonic(), stripe.number)
                news = self.connection.news()
                if news is News.CHUNKS:
                    self.pump_soon()
                elif news:
                    self.pump()
        except StreamClosedError:
            return
        except RemoteError as broken:
            error = broken
        except Exception as bug:
            self._crash(bug)
        self._lost(stripe, error)

    async def _send(self, stripe: _Stripe) -> None:
        pace = stripe.pace
        try:
            while True:
                stripe.wake.clear()
                data = self.connection.data_to_send(time.monotonic(), stripe.number, pace.limit)
                if data:
                    stripe.sending = self._loop.create_future()
                    self.link.meter.begin(time.monotonic())
                    try:
                        await stripe.stream.send(data)
                    finally:
                        self.link.meter.end(time.monotonic())
                        stripe.sending.set_result(None)
                        stripe.sending = None
                    nbytes = sum(part.nbytes for part in data)
                    pace.sent(nbytes, time.monotonic(), stripe.stream.link_rate)
                    self.bytes_sent += nbytes
                    if self.connection.news():
                        for transfer in self.connection.lent(stripe.number):
                            if transfer in self.outgoing:
                                self.outgoing[transfer].count()
                        self.pump()
                elif stripe.closing:
                    await stripe.stream.send_eof()
                    return  # the receiving task goes on until the peer hangs up too, or the linger time is over
                else:
                    pace.idle()
                    await stripe.wake.wait()
        except StreamClosedError:
            return
        except RemoteError as error:
            self._lost(stripe, error)
            return
        except Exception as bug:
            self._crash(bug)

    def _leave(self, guest: Guest | None) -> None:
        if guest is not None and self._gate is not None:
            self._gate.leave(guest)

    def _evict(self, stripe: _Stripe) -> None:
        self._lost(stripe, LimitError("too many strangers at the door; others came later"))

    def _lost(self, stripe: _Stripe, error: RemoteError) -> None:
        self.connection.stripe_lost(stripe.number, time.monotonic(), error)
        self._track(self._hang_up(stripe))
        if not self.established:
            self._end(error)
        self.pump()

    async def _hang_up(self, stripe: _Stripe) -> None:
        if stripe.linger is not None:
            stripe.linger.cancel()
        await stripe.stream.aclose()
        stripe.resume()
        others = [task for task in stripe.tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        if self._stripes.pop(stripe.number, None) is not None:
            await asyncio.gather(*others, return_exceptions=True)  # they ask about the stripe until they end
            self.connection.forget_stripe(stripe.number, time.monotonic())
            self._leave(stripe.guest)
            self._redial()
            self.changed.notify()

    def _land(self, transfer: int, tile: Tile) -> memoryview | None:
        incoming = self.incoming.get(transfer)
        return None if incoming is None else incoming.land(tile)

    def _lend(self, transfer: int, tile: Tile) -> memoryview:
        return self.outgoing[transfer].lend(tile)

    async def stop_landing(self, transfer: int) -> None:
        """Return when no stream writes to the destination of ``transfer``, which is over, any more."""
        for stripe in list(self._stripes.values()):
            receiving = stripe.tasks[0]
            if self.connection.landing(stripe.number) == transfer and not receiving.done():
                stripe.interrupted = stripe.interrupted or self._loop.create_future()
                receiving.cancel()
                await stripe.interrupted

    async def reclaim(self, transfer: int) -> None:
        """Return when no stream reads the payloads of ``transfer``, which is over, any more.

        A stream that does not get rid of what it was given is given up: the session resumes on another.
        """
        for stripe in list(self._stripes.values()):
            if stripe.sending is not None and transfer in self.connection.lent(stripe.number):
                await asyncio.wait([stripe.sending], timeout=_RECLAIM_S)
                if stripe.sending is not None and transfer in self.connection.lent(stripe.number):
                    text = f"{stripe.stream.name} takes no bytes, and a cancelled transfer wants its memory back"
                    self._lost(stripe, TransportError(text))
                    await self._hang_up(stripe)

    def _close_stripe(self, stripe: _Stripe) -> None:
        """Send what is left to say, for a bounded time, then hang up."""
        if not stripe.closing:
            stripe.closing = True
            stripe.wake.set()
            seconds = _LINGER_S
            if stripe.sending is not None:  # the rest of a frame must go before a GOAWAY can
                rest = self.connection.unsent(stripe.number) + stripe.pace.limit
                rate = stripe.pace.rate or 1.0  # not known yet: the link is slow
                seconds = min(max(seconds, 1.5 * rest / rate), _LONG_LINGER_S)
            stripe.linger = self._loop.call_later(seconds, lambda: self._track(self._hang_up(stripe)))
            self._redial()

    def _redial(self) -> None:
        if self._dial is None or self.over or not self.established or self._redialing is not None:
            return
        if self._lacks_stripes():
            self._redialing = self._loop.create_task(self._redial_until_done(self._dial))

    def _lacks_stripes(self) -> bool:
        return sum(not stripe.closing for stripe in self._stripes.values()) < self._options.stripes

    async def _redial_until_done(self, dial: Dial) -> None:
        delay = 0.0
        try:
            while not self.over and self._lacks_stripes():
                await asyncio.sleep(delay)
                delay = min(max(2 * delay, self.config.retry_interval), self.config.retry_limit)
                try:
                    stream = await dial()
                except LynxError as error:
                    _log.info("cannot reach %s again yet: %s", self.name, error)
                    continue
                self.attach(stream)
        finally:
            self._redialing = None

    # --- the pump

    def pump_soon(self) -> None:
        """The same once the task that runs waits or gives way: many chunks that are there already are one job."""
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pump_due = False
        self.pump()

    def pump(self) -> None:
        """After anything happened: deliver events, ask for chunks, wake senders, set the timer."""
        if self._pumping:
            return  # an event's handler called back; the loop below goes on
        self._pumping = True
        try:
            while (event := self.connection.next_event()) is not None:
                self._handle(event)
            self._encode()
        except Exception as error:
            self._pumping = False
            self._crash(error)
        finally:
            self._pumping = False
        now = time.monotonic()
        for stripe in self._stripes.values():
            if stripe.closing or self.connection.wants_to_send(now, stripe.number):
                stripe.wake.set()
        if self._look is None:  # the timer changes with nearly everything: it is not looked up every time
            self._look = self._loop.call_later(_TIMER_SLACK_S, self._set_timer)

    def _set_timer(self) -> None:
        self._look = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.connection.next_timer()
        if due is not None:
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.connection.handle_timer(time.monotonic())
        self.pump()

    def _crash(self, error: Exception) -> None:
        """A bug must end the session with an error that everybody sees; it must not leave them waiting."""
        _log.critical("bug in the session with %s", self.name, exc_info=error)
        if not self.over:
            self._end(LocalError(f"internal error in the session with {self.name}: {error!r}"))
            self.connection.close(time.monotonic(), ErrorCode.INTERNAL, "internal error")
            self.pump()

    def work(
        self,
        owner: Hashable,
        urgency: tuple[int, int],
        work: Callable[[], T],
        done: Callable[[Future[T]], None],
        *,
        nbytes: int | None = None,
    ) -> None:
        """Run ``work`` on a codec thread, then ``done`` here; see :meth:`Workers.run`.

        Work on few bytes of words (``nbytes``) is done here at once: a thread's attention would cost more. None: it may
        take its time.
        """

        def guarded(future: Future[T]) -> None:
            try:
                done(future)
            except Exception as error:
                self._crash(error)

        if nbytes is not None and nbytes <= _HERE_BYTES:
            self.workers.run_here(owner, work, guarded)
        else:
            self.workers.run(owner, urgency, work, guarded)

    def _encode(self) -> None:
        while self.encoding < _AHEAD * self.workers.threads:
            request = self.connection.next_chunk(time.monotonic())
            if request is None:
                return
            self.outgoing[request.transfer].encode(request)

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.ChunkReceived():
                self._incoming_of(event.transfer, lambda transfer: transfer.on_chunk(event))
            case events.PlanReceived():
                self._incoming_of(event.transfer, lambda transfer: transfer.on_plan(event))
            case events.LayerEnded():
                self._incoming_of(event.transfer, lambda transfer: transfer.on_layer_ended(event))
            case events.ResultReceived():
                self._incoming_of(event.transfer, lambda transfer: transfer.on_result(event))
            case events.TransferComplete():
                self._incoming_of(event.transfer, lambda transfer: transfer.on_complete())
            case events.LevelsCancelled():
                if event.transfer in self.outgoing:
                    self.outgoing[event.transfer].final = event.level
                self._incoming_of(event.transfer, lambda transfer: transfer.on_levels_cancelled(event.level))
            case events.TransferOffered():
                self._offered.add(event.transfer)
                self._track(self._consider(event))
            case events.TransferRefused():
                self._tell_refused(event.transfer, event.error)
            case events.TransferAccepted():
                self.outgoing[event.transfer].on_accepted()
            case events.TileDigested():
                self.outgoing[event.transfer].on_digested(event.tile, event.digest)
            case events.TransferRejected():
                text = f"{self.name} refused transfer {event.transfer:032x}: {event.text}"
                forbidden = event.code is ErrorCode.FORBIDDEN
                self.outgoing[event.transfer].fail(
                    ForbiddenError(text) if forbidden else RejectedError(text, event.code)
                )
            case events.TransferFailed():
                self._fail_transfer(event.transfer, event.error)
            case events.Cancelled():
                by = f"by {self.name}" if event.by_peer else "by this side"
                text = f"transfer {event.transfer:032x} was cancelled {by}{': ' + event.text if event.text else ''}"
                self._fail_transfer(event.transfer, TransferCancelledError(text))
            case events.TransferReleased():
                self._offered.discard(event.transfer)  # at once: it may not have been considered yet
                self._track(self._release(event.transfer, event.complete))
            case events.FetchRequested():
                self._track(self._serve(event))
            case events.FetchFailed():
                fetch = self._fetches.pop(event.request, None)
                if fetch is not None and not fetch.done():
                    fetch.set_exception(event.error)
            case events.HandshakeCompleted():
                self.established = True
                self.changed.notify()
            case events.StripeClosed():
                stripe = self._stripes.get(event.stripe)
                if stripe is not None:
                    self._tell_stripe_closed(stripe, event.error)
                    self._close_stripe(stripe)
                if not self.established:
                    self._end(event.error)
            case events.ConnectionFailed():
                self._end(event.error)
            case events.ConnectionClosed():
                text = f": {event.text}" if event.text else ""
                closed = ConnectionClosedError(f"{self.name} closed the session{text}")
                self._end(closed if event.by_peer else None, orderly=True)
            case events.LinkMeasured():
                self.link.on_measured(event.ping)
            case events.UnknownFrame():
                _log.debug("%s sent a frame of unknown type %#x; skipped", self.name, event.type)
            case events.StripeReady():
                self._on_stripe_ready(event)
            case events.ChunksResumed() | events.UrgentReceived():
                _log.debug("%s: %s", self.name, event)

    def _on_stripe_ready(self, event: events.StripeReady) -> None:
        stripe = self._stripes.get(event.stripe)
        if stripe is None:
            return
        stripe.ready = True
        stream = stripe.stream
        if not self.principal.address:
            self.principal = Principal.of(stream.name, stream.credentials, self.connection.principal)
            text = f"session with {stream.name} ({self.principal.name})"
            self.journal.tell(logging.INFO, "session_opened", text, peer=stream.name, principal=self.principal.name)
        if self._gate is None or stripe.guest is None:
            return
        try:
            self._gate.enter(stripe.guest, self.principal.key)
            if not self._in_gate:
                self.connection.control_budgets.append(self._gate.open_session(self.principal.key))
                self._in_gate = True
        except LimitError as error:
            self.journal.handshake_failed(stream.name, error, time.monotonic(), stage="session")
            self.error = error
            self.connection.close(time.monotonic(), error.code, str(error))

    def _tell_stripe_closed(self, stripe: _Stripe, error: RemoteError | None) -> None:
        if error is None or (self.over and stripe.ready):
            return
        if not stripe.ready:
            self.journal.handshake_failed(stripe.stream.name, error, time.monotonic(), stage="session")
        else:
            text = f"a link with {stripe.stream.name} is lost: {error}"
            self.journal.tell(logging.INFO, "link_lost", text, peer=stripe.stream.name, error=str(error))

    def _incoming_of(self, transfer: int, deliver: Callable[[Incoming], None]) -> None:
        incoming = self.incoming.get(transfer)
        if incoming is not None:
            deliver(incoming)

    def _fail_transfer(self, transfer: int, error: LynxError) -> None:
        side = self.outgoing.get(transfer) or self.incoming.get(transfer)
        if side is not None:
            side.fail(error)

    def _hold(self, transfer: int, nbytes: int) -> None:
        if self._gate is not None:
            self._gate.open_transfer(self.principal.key, nbytes)
            self._held[transfer] = nbytes

    def let_go(self, transfer: int) -> None:
        nbytes = self._held.pop(transfer, None)
        if nbytes is not None and self._gate is not None:
            self._gate.close_transfer(self.principal.key, nbytes)

    def _tell_refused(self, transfer: int, error: Exception, request_id: str = "") -> None:
        self.journal.refuse(
            "transfer_refused",
            f"transfer {transfer:032x} of {self.name} is refused: {error}",
            time.monotonic(),
            transfer=f"{transfer:032x}",
            peer=self.name,
            principal=self.principal.name,
            request_id=request_id,
            reason=reason_of(error),
            error=str(error),
        )

    async def _release(self, transfer: int, complete: bool) -> None:
        side = self.outgoing.pop(transfer, None) or self.incoming.pop(transfer, None)
        if side is not None:
            if isinstance(side, Incoming):
                await self._release_incoming(side, complete=complete)
            else:
                await side.release(complete)
            direction = "out" if isinstance(side, Outgoing) else "in"
            self.journal.transfer_closed(direction, side, self.name, time.monotonic())
        self.let_go(transfer)
        self.changed.notify()

    def _end(self, error: LynxError | None, orderly: bool = False) -> None:
        """The session is over; ``orderly`` if a side closed it."""
        if self.over:
            return
        self.over = True
        self.error = self.error or error
        if self._in_gate and self._gate is not None:
            self._in_gate = False
            self._gate.close_session(self.principal.key)
        if self.principal.address:
            self.journal.tell(
                logging.INFO,
                "session_closed",
                f"the session with {self.name} is over: {self.error or 'closed by this side'}",
                peer=self.name,
                principal=self.principal.name,
                bytes_sent=self.bytes_sent,
                bytes_received=self.bytes_received,
                error=None if self.error is None or orderly else str(self.error),
            )
        for fetch in self._fetches.values():
            if not fetch.done():
                fetch.set_exception(error or StreamClosedError("the session was closed by this side"))
        self._fetches.clear()
        for stripe in list(self._stripes.values()):
            self._close_stripe(stripe)
        self.changed.notify()
        self._on_over(self)

    async def drained(self) -> None:
        """Return when no transfer is open; new ones are refused from now on."""
        self.draining = True
        await self.changed.until(lambda: self.over or not (self._offered or self.outgoing or self.incoming))

    async def aclose(self) -> None:
        """Close in order: no transfer touches its user's memory, and no task is left, when this returns."""
        self.connection.close(time.monotonic())
        self.pump()
        self._end(None)
        await self.changed.until(lambda: not self._stripes)
        if self._redialing is not None:
            self._redialing.cancel()
        for timer in (self._timer, self._look):
            if timer is not None:
                timer.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- transfers

    def frames_of(self, policy: Policy) -> Policy:
        """``policy`` with frames that suit the link as it has been lately, and leave several in the peer's window."""
        rate = max((stripe.pace.rate or 0.0 for stripe in self._stripes.values()), default=0.0)
        limits = self.connection.peer_limits
        return policy if limits is None else policy.for_link(rate, limits.transfer_window // 4)

    def open(
        self,
        manifest: Manifest,
        policy: Policy | AutoPolicy | None,
        deadline: float,
        *,
        fetch: int | None = None,
        resume: bytes | None = None,
    ) -> Outgoing:
        """Offer a transfer. Without a ``resume`` secret of the caller's it can go on as long as this process lives."""
        if self.over:
            raise self.error or StreamClosedError("the session was closed by this side")
        chosen = policy or self._options.policy or Policy.progressive(manifest.dtype)
        choice = None
        if isinstance(chosen, AutoPolicy):
            choice = self.link.choose(chosen, manifest)
            chosen = choice.policy
        chosen.require(manifest.identity)
        manifest = replace(manifest, codecs=chosen.codecs, lossy=chosen.lossy)
        secret = secrets.token_bytes(RESUME_KEY_SIZE) if resume is None else resume
        transfer = self.connection.open(manifest, time.monotonic(), deadline=deadline, fetch=fetch, resume=secret)
        for other in self.outgoing.values():
            other.alone = False
        outgoing = self.outgoing[transfer] = Outgoing(self, transfer, manifest, chosen, adaptive=resume is None)
        outgoing.alone = len(self.outgoing) == 1
        if choice is not None:
            outgoing.stats.policy, outgoing.stats.reason = choice.name, choice.reason
        self.journal.transfer_opened("out", outgoing, self.name)
        self.pump()
        return outgoing

    async def fetch(self, key: FetchKey, wants: Sequence[Want] | None, lease: float) -> Incoming:
        """Ask for a cache by key; returns once the peer offers it and memory is ready."""
        if self.over:
            raise self.error or StreamClosedError("the session was closed by this side")
        request = self.connection.fetch(key, time.monotonic(), wants, lease)
        future: asyncio.Future[Incoming] = self._loop.create_future()
        self._fetches[request] = future
        self.pump()
        try:
            return await future
        finally:
            self._fetches.pop(request, None)

    async def _consider(self, event: events.TransferOffered) -> None:
        """Let the user allocate (on a thread: it may take its time), then accept."""
        transfer = event.transfer
        waiting = self._fetches.get(event.fetch) if event.fetch is not None else None
        incoming = resumed = None
        refused: Exception | None = None
        try:
            if self.draining:
                raise PeerError("shutting down; send it to another", ErrorCode.SHUTDOWN)
            if waiting is None:  # what this side asked for needs no permission
                await self._authorize(TransferRequest(action="push", principal=self.principal, manifest=event.manifest))
                resumed = await self._resumed(event)
                self._hold(transfer, event.manifest.nbytes)
            incoming = resumed or await self._make(event)
            if transfer not in self._offered:  # the sender changed its mind meanwhile
                raise TransferCancelledError(f"transfer {transfer:032x} was cancelled by {self.name}")
        except Exception as error:  # whatever the user's callbacks raise
            refused = error
        if refused is not None:
            self.let_go(transfer)
            self._tell_refused(transfer, refused, event.manifest.request_id)
            if not isinstance(refused, LynxError):
                _log.error("what refused it is a mistake of this program", exc_info=refused)
            # Its traceback holds this frame, and so what the user allocated, until the collector comes by.
            refused.__traceback__ = None
            text = str(refused) if isinstance(refused, LynxError) else "the receiver has no memory for it"
            code = refused.code if isinstance(refused, PeerError | LimitError) else ErrorCode.INTERNAL
            self.connection.reject(transfer, code, text, time.monotonic())
            if (side := resumed or incoming) is not None:
                side.fail(refused if isinstance(refused, LynxError) else LocalError(f"cannot go on: {refused!r}"))
                await self._release_incoming(side, complete=False)
        elif incoming is not None:
            self.incoming[transfer] = incoming
            self.journal.transfer_opened("in", incoming, self.name)
            self.connection.accept(transfer, time.monotonic(), incoming.wants, incoming.held())
        if waiting is not None:
            if waiting.done():  # nobody waits any more
                pass
            elif refused is not None:
                waiting.set_exception(refused)
            elif incoming is not None:
                waiting.set_result(incoming)
        elif refused is None and incoming is not None and resumed is None:
            self._offer(incoming)
        self.pump()

    async def _resumed(self, event: events.TransferOffered) -> Incoming | None:
        """The same transfer, if it runs in another session, perhaps a dead one: it goes on in this one."""
        running = self._running.get(self._name(event))
        if running is None:
            return None
        async with running.moving:
            if running.ending or running.error is not None:
                await running.wait_released()
                return None
            await running.move(self, event.transfer)
            return running

    def _name(self, event: events.TransferOffered) -> str:
        if not event.resume or event.fetch is not None:
            return ""
        return transfer_name(self.principal.name, event.resume, event.manifest)

    async def _make(self, event: events.TransferOffered) -> Incoming:
        """Memory for the transfer, and what was kept of it."""
        options, name = self._options, self._name(event)
        if options.allocate is allocate_arrays:  # it touches no memory, and a thread may have to wait for its turn
            arrays: Mapping[Any, Any] = allocate_arrays(event.manifest)
        else:
            arrays = await asyncio.to_thread(options.allocate, event.manifest)
        wants = None if options.wants is None else await asyncio.to_thread(options.wants, event.manifest)
        spool: Spool | StateError | None = None
        if options.state is not None and name:
            try:
                spool = await asyncio.to_thread(options.state.open, name)
            except StateError as error:
                _log.warning("transfer %032x cannot go on after a restart: %s", event.transfer, error)
                spool = error
        try:
            incoming = Incoming(
                self, event.transfer, event.manifest, arrays, options, name=name, wants=wants, spool=spool
            )
        except BaseException:
            if isinstance(spool, Spool):
                spool.close()
            raise
        if name:
            self._running[name] = incoming
        return incoming

    async def _release_incoming(self, incoming: Incoming, *, complete: bool) -> None:
        await incoming.release(complete)
        if self._running.get(incoming.name) is incoming:
            del self._running[incoming.name]

    async def _serve(self, event: events.FetchRequested) -> None:
        """Let the user look the key up (on a thread), then send what it found."""
        on_fetch = self._options.on_fetch
        cache, code, text = None, ErrorCode.NOT_FOUND, ""
        if self.draining:
            code, text = ErrorCode.SHUTDOWN, "shutting down; ask another"
        elif on_fetch is not None:
            try:
                await self._authorize(TransferRequest(action="pull", principal=self.principal, key=event.key))
                cache = await asyncio.to_thread(on_fetch, event.key, event.wants)
            except ForbiddenError as error:
                code, text = error.code, str(error)
                who = {"peer": self.name, "principal": self.principal.name}
                self.journal.refuse("fetch_refused", text, time.monotonic(), **who, reason=reason_of(error))
            except Exception:  # whatever the user's callback raises
                _log.exception("on_fetch failed; the peer is told that nothing was found")
        if cache is None:
            self.connection.not_found(event.request, time.monotonic(), code, text)
            self.pump()
            return
        outgoing = None
        try:
            await self.link.get_to_know()
            outgoing = self.open(cache.manifest, None, float("inf"), fetch=event.request)
            await outgoing.send_cache(cache)
        except LynxError as error:
            _log.warning("a fetched cache was not delivered: %s", error)
            if self.over or (outgoing is not None and outgoing.released):
                return
            if outgoing is None:
                self.connection.not_found(event.request, time.monotonic(), ErrorCode.INTERNAL, str(error))
                self.pump()
            else:  # this side cannot go on, for example because the session's policy does not code such a cache
                await outgoing.cancel(None)

    async def _authorize(self, request: TransferRequest) -> None:
        """Ask the user (on a thread) whether the peer may. Raises :class:`~lynxproto.errors.ForbiddenError`."""
        if self._options.authorize is None:
            return
        why = ""
        try:
            if await asyncio.to_thread(self._options.authorize, request):
                return
        except LynxError as error:
            why = f": {error}"
        except Exception:  # the user's own mistake must not open the door
            _log.exception("authorize failed; %s is refused", request.principal.name)
        raise ForbiddenError(f"{request.principal.name} may not {request.action} this{why}")

    # --- helpers

    def call_user(self, callback: Callable[..., object], *args: Any) -> None:
        """Call the user's callback; what it raises is its own affair."""
        try:
            callback(*args)
        except Exception:  # see above
            _log.exception("a callback failed")

    def _track(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
