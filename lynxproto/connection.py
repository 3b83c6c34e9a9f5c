"""One session with one peer over one or more byte streams: bytes in, events out, bytes out, the time an argument.

No I/O, no clock, no threads: a shell feeds what it reads, writes what it is given, and calls back when a timer is
due. A connection is not thread-safe; it belongs to the shell's I/O thread. Payloads are never decoded here: the
shell encodes chunks when asked (:meth:`Connection.next_chunk`) and reports what became of received ones
(:meth:`Connection.applied`, :meth:`Connection.tile_verified`, :meth:`Connection.tile_failed`).

After any call, the shell takes the events (:meth:`Connection.next_event`), asks each live stripe for bytes
(:meth:`Connection.data_to_send`), asks for chunks to encode (:meth:`Connection.next_chunk`), and sets its timer
(:meth:`Connection.next_timer`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from random import Random, SystemRandom
from typing import Any, Final

from lynxproto import frames
from lynxproto._context import Context, Land, Lend, Peer
from lynxproto._fetches import Fetches
from lynxproto._handshake import Handshake, PeerRefusal, as_refusal, hello_session
from lynxproto._receiver import Receiver
from lynxproto._sender import Chunk, Sender
from lynxproto._stripe import HANDSHAKE_TYPES, FrameReader, Stripe, Target
from lynxproto._writer import Writer
from lynxproto.chunk import Tile
from lynxproto.config import Config, Limits
from lynxproto.counters import Counters
from lynxproto.digest import Sums
from lynxproto.errors import (
    ConnectionClosedError,
    CorruptFrameError,
    DeadlineError,
    ErrorCode,
    ExpiredSecretError,
    LocalError,
    PeerError,
    ProtocolError,
    RemoteError,
    VersionError,
)
from lynxproto.events import (
    ConnectionClosed,
    ConnectionFailed,
    Event,
    HandshakeCompleted,
    LinkMeasured,
    StripeClosed,
    StripeReady,
    UnknownFrame,
)
from lynxproto.frames import HEADER_SIZE, MAX_HELLO, VERSION, FrameType, Header
from lynxproto.manifest import FetchKey, Manifest, Want
from lynxproto.state import SESSION, STRIPE, IncomingState, SessionState, advance
from lynxproto.windows import Budget

__all__ = ["ChunkRequest", "Connection", "News", "hello_session"]


class News(IntEnum):
    """What a shell that fed or emptied a connection has to look at. The larger, the more."""

    NOTHING = 0
    """No frame began or ended: there are no events, and nothing more to send or to encode."""
    CHUNKS = 1
    """Frames of DATA did: chunks may be delivered or asked for, and credit may be due."""
    ANYTHING = 2


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Encode ``level`` of ``tile`` and hand it to ``chunk_encoded`` (or cancel the transfer)."""

    transfer: int
    tile: Tile
    level: int


class _Handler:
    """Binds a stripe's reader to its connection."""

    __slots__ = ("_connection", "_stripe")

    def __init__(self, connection: Connection, stripe: Stripe) -> None:
        self._connection = connection
        self._stripe = stripe

    def check_header(self, header: Header) -> None:
        self._connection._check_header(self._stripe, header)

    def begin_payload(self, header: Header, bitmap: bytes) -> Target | None:
        return self._connection._begin_payload(self._stripe, header, bitmap)

    def end_payload(self, header: Header, target: Target) -> None:
        self._connection._end_payload(self._stripe, header, target)


class Connection:
    """A session. ``client`` is the side that opened the byte streams; either side may send and receive caches.

    ``random`` is for tests; by default ids, nonces and tokens come from the operating system. ``unix_offset`` is Unix
    time minus the ``now`` of all calls: secrets that expire need it.

    ``land(transfer, tile)`` is asked where the words of a tile belong, when a chunk arrives that is those words as they
    are (a codec that is ``verbatim``): ``tile.spec().nbytes`` contiguous, writable bytes, which are then written while
    the chunk arrives, before its checksum is known; or None, and the chunk is delivered like any other. Nothing is
    written there after :class:`~lynxproto.events.TransferReleased`, provided that the shell asks for
    :meth:`get_buffer` again before it reads.

    ``lend(transfer, tile)`` is asked for those words at the sender, contiguous and borrowed as by
    :meth:`chunk_encoded`, when the turn of such a tile has come; without it :meth:`next_chunk` asks for them too.
    """

    def __init__(
        self,
        config: Config,
        *,
        client: bool,
        random: Random | None = None,
        land: Land | None = None,
        lend: Lend | None = None,
        unix_offset: float | None = None,
    ) -> None:
        if unix_offset is None and any(s.not_before or s.not_after for s in config.secrets):
            raise LocalError("secrets that expire need unix_offset")
        self._ctx = ctx = Context(config, random or SystemRandom(), Random(None if random is None else random.random()))
        ctx.stripe_alive = self._is_alive
        ctx.take_over = self._take_over
        ctx.land, ctx.lend = land, lend
        self._client = client
        self._state = SessionState.CONNECTING
        self._handshake = Handshake(ctx, client=client, unix_offset=unix_offset or 0.0)
        self._stripes: dict[int, Stripe] = {}
        self._next_stripe = 0
        self._sender = Sender(ctx)
        self._receiver = Receiver(ctx)
        self._writer = Writer(ctx, self._sender, self._receiver, self._stripes)
        self._alone_since: float | None = None  # without a ready stripe
        self._pings = 0
        self._measuring: set[int] = set()
        self._news = News.NOTHING
        self._handshake_timeout = min(config.handshake_timeout, config.peer_timeout)
        #: Control frames cost no credit; their rate is limited instead: frames and bytes. A shell may add budgets that
        #: several sessions share.
        self.control_budgets = [(Budget(config.control_rate), Budget(config.control_byte_rate))]
        self._fetches = Fetches(ctx)

    # --- what it is

    @property
    def session(self) -> bytes | None:
        """The 16-byte session id; None until the handshake of the first stripe told it."""
        return self._handshake.session

    @property
    def principal(self) -> str:
        """Whose shared secret the peer proved to know (:attr:`Secret.owner`); empty if there is none."""
        return self._handshake.principal

    @property
    def closed(self) -> bool:
        """True once the session is over and everything is released. Bytes may still wait to be sent (GOAWAY)."""
        return self._state is SessionState.CLOSED

    @property
    def counters(self) -> Counters:
        """What went over the wire so far, of the whole session. Live: read it, do not change it."""
        return self._ctx.counters

    @property
    def peer_limits(self) -> Limits | None:
        """What the peer accepts; None until the handshake of the first stripe told it."""
        return None if self._ctx.peer is None else self._ctx.peer.limits

    def credit(self) -> list[int]:
        """Bytes that may still be sent, by class, as far as the session's windows go."""
        return [max(0, w.limit - w.charged - w.reserved) for w in self._sender.windows]

    def unapplied(self) -> list[int]:
        """Bytes that were received and are not yet applied, by class."""
        return [w.charged - w.released for w in self._receiver.windows]

    def transfer_counters(self, transfer: int) -> Counters:
        """The same of one transfer, its control frames included; kept for a while after its release."""
        for half in (self._sender, self._receiver):
            if transfer in half.transfers:
                return half.transfers[transfer].counters
            if transfer in half.tombstones:
                return half.tombstones[transfer][1]
        raise LocalError(f"no transfer {transfer:032x}")

    # --- byte streams

    def open_stripe(self, now: float) -> int:
        """A byte stream to the peer exists; returns its number. The client's HELLO is queued.

        Raises :class:`~lynxproto.errors.LocalError` if the session is over.
        """
        self._check_open()
        self._ctx.now = now
        if self._alone_since is None and not self._ctx.ready:
            self._alone_since = now
        stripe = Stripe(self._next_stripe, now)
        self._next_stripe += 1
        stripe.reader = FrameReader(_Handler(self, stripe))
        self._stripes[stripe.index] = stripe
        self._greet()
        return stripe.index

    def stripe_lost(self, stripe: int, now: float, error: RemoteError | None = None) -> None:
        """The byte stream ended. Idempotent. The session lives on, and resumes on its other stripes or on the next."""
        self._ctx.now = now
        found = self._stripe(stripe)
        if not found.closed:
            self._drop_stripe(found, error)

    def forget_stripe(self, stripe: int, now: float) -> None:
        """Nobody asks about ``stripe`` any more. Until then a closed stripe answers: it has nothing to send."""
        self.stripe_lost(stripe, now)
        del self._stripes[stripe]

    def receive_data(self, data: bytes | bytearray | memoryview, now: float, stripe: int = 0) -> None:
        """Bytes arrived on ``stripe``, in any split. Never raises for what the peer sent: that becomes events."""
        view = memoryview(data).cast("B")
        while view.nbytes:
            buffer = self.get_buffer(stripe)
            n = min(buffer.nbytes, view.nbytes)
            buffer[:n] = view[:n]
            self.buffer_updated(n, now, stripe)
            view = view[n:]

    def get_buffer(self, stripe: int = 0) -> memoryview:
        """Where the next bytes of ``stripe`` should be read to; never empty. Payloads land in their own buffer."""
        return self._stripe(stripe).reader.get_buffer()

    def sums(self, stripe: int = 0) -> Sums | None:
        """If :meth:`get_buffer`'s last result lies in a long payload: the checksums of that payload.

        The shell may then fill up ``sums.data`` behind ``sums.there`` instead, beyond the buffer's end if it likes, and
        add what it reads to them while the processor's cache has it (:meth:`~lynxproto.digest.Sums.receive`).
        """
        return self._stripe(stripe).reader.sums

    def buffer_updated(self, nbytes: int, now: float, stripe: int = 0) -> None:
        """``nbytes`` bytes were read into the start of :meth:`get_buffer`'s last result, or of what is behind it."""
        self._ctx.now = now
        found = self._stripe(stripe)
        if found.closed or not nbytes:
            return
        found.heard_at = now
        try:
            found.reader.buffer_updated(nbytes)
        except (CorruptFrameError, VersionError) as error:
            self._news = News.ANYTHING
            self._stripe_error(found, error, framing_lost=True)
        except ProtocolError as error:
            self._news = News.ANYTHING
            self._stripe_error(found, error, framing_lost=False)

    def data_to_send(self, now: float, stripe: int = 0, limit: int = 65536) -> list[memoryview]:
        """About ``limit`` bytes to write to ``stripe``, in order; [] if there is nothing to send now.

        A large ``limit`` may be doubled, to hold the rest of a frame: nothing else could go before it.
        At each frame boundary the most urgent frame is taken. What is returned counts as written: if the write
        fails, call :meth:`stripe_lost`. Ask again when the stream can take more, and after other calls.

        With several stripes the first one carries no residuals: anchors need not wait there for the end of a residual's
        frame. While it carries an anchor, residuals' frames on the others pause where they are.
        """
        self._ctx.now = now
        found = self._stripe(stripe)
        chunks, ended = self._writer.take(found, limit)
        if ended:
            self._news = self._news or News.CHUNKS
        return chunks

    def wants_to_send(self, now: float, stripe: int = 0) -> bool:
        """Whether :meth:`data_to_send` may have something. Cheap."""
        self._ctx.now = now
        found = self._stripe(stripe)
        return self._writer.has_some(found)

    def unsent(self, stripe: int = 0) -> int:
        """Bytes of frames that have begun, or come before all others, and were not given out yet."""
        found = self._stripe(stripe)
        return sum(len(part) for parts in (found.out, found.control) for part in parts)

    def lent(self, stripe: int = 0) -> frozenset[int]:
        """The transfers whose payloads are among what :meth:`data_to_send` gave out last for ``stripe``."""
        return frozenset(self._stripe(stripe).lent)

    def landing(self, stripe: int = 0) -> int | None:
        """The transfer whose destination :meth:`get_buffer`'s last result for ``stripe`` may lie in."""
        arrival = self._stripe(stripe).arrival
        return arrival.transfer.id if arrival is not None and arrival.landing else None

    def news(self) -> News:
        """What :meth:`buffer_updated` and :meth:`data_to_send` brought since this was asked last."""
        news, self._news = self._news, News.NOTHING
        return news

    def next_event(self) -> Event | None:
        """The oldest event not yet taken."""
        return self._ctx.events.popleft() if self._ctx.events else None

    def next_timer(self) -> float | None:
        """When :meth:`handle_timer` wants to be called; None for never."""
        if self.closed:
            return None
        config = self._ctx.config
        times = [self._sender.timer(), self._receiver.timer(), self._fetches.timer()]
        for stripe in self._stripes.values():
            if stripe.ready:
                times.append(stripe.heard_at + config.peer_timeout)
                times.append(max(stripe.heard_at, stripe.pinged_at) + config.ping_interval)
                times.append(self._writer.timer(stripe))
            elif not stripe.closed:
                times.append(stripe.opened_at + self._handshake_timeout)
        if self._alone_since is not None:
            times.append(self._alone_since + config.session_timeout)
        return min((time for time in times if time is not None), default=None)

    def handle_timer(self, now: float) -> None:
        """The time is ``now``: pings, resends, timeouts. May be called at any time."""
        if self.closed:
            return
        self._ctx.now = now
        config = self._ctx.config
        for stripe in list(self._stripes.values()):
            since = stripe.heard_at if stripe.ready else stripe.opened_at
            limit = config.peer_timeout if stripe.ready else self._handshake_timeout
            if not stripe.closed and now >= since + limit:
                what = "nothing heard of the peer" if stripe.ready else "no handshake"
                self._drop_stripe(stripe, DeadlineError(f"stripe {stripe.index}: {what} for {limit:g} s"))
            elif stripe.ready and now >= max(stripe.heard_at, stripe.pinged_at) + config.ping_interval:
                self._ping(stripe, probe=False)
        if self._alone_since is not None and now >= self._alone_since + config.session_timeout:
            self._fail(DeadlineError(f"no connection to the peer for {config.session_timeout:g} s"), tell=False)
            return
        self._receiver.handle_timer(now)
        if self._sender.handle_timer(now):
            self._probe()
        self._fetches.handle_timer(now)

    def close(self, now: float, code: ErrorCode = ErrorCode.NO_ERROR, text: str = "") -> None:
        """End the session: release all transfers now, send GOAWAY. Idempotent. Drain data_to_send, then hang up."""
        if self.closed:
            return
        self._ctx.now = now
        self._receiver.flush(everything=True)
        for stripe in self._ready_stripes()[:1]:  # what was said before must not be lost: a peer may wait for its ACK
            stripe.control.extend(frame for frame, _ in self._ctx.control)
        self._say_everywhere(frames.GoAway(code=code, text=text))
        self._end(None if code is ErrorCode.NO_ERROR else ConnectionClosedError(text or code.name))
        self._ctx.events.append(ConnectionClosed(by_peer=False, text=text))

    # --- sending side

    def open(
        self,
        manifest: Manifest,
        now: float,
        *,
        deadline: float = float("inf"),
        fetch: int | None = None,
        resume: bytes = b"",
    ) -> int:
        """Offer a transfer (OPEN); returns its id. ``deadline`` (same clock) breaks ties between anchors.

        ``resume`` is a secret of 32 random bytes: a later offer of the same manifest with the same secret, in another
        session or by another process, is sent only what the receiver has not kept of this one.

        Allowed before the handshake is over. Raises :class:`~lynxproto.errors.LocalError` for a closed session,
        another identity than the configured one, or codecs or sizes that the peer has said it refuses.
        """
        self._check_open()
        self._ctx.now = now
        transfer = self._new_id()
        self._sender.open(transfer, manifest, now, deadline, fetch=fetch, resume=resume)
        if fetch is not None:
            self._fetches.answered(fetch)
        return transfer

    def plan(self, transfer: int, layer: int, tiles: Sequence[Tile], now: float) -> None:
        """The tiles of ``layer`` (PLAN, fixed for good); from now on :meth:`next_chunk` may ask for them.

        Allowed before the transfer is accepted. A no-op for a transfer that is already over.
        Raises :class:`~lynxproto.errors.LocalError` for a second plan, tiles outside the layer, overlapping tiles, or
        a chunk that could be larger than the peer's windows.
        """
        self._ctx.now = now
        self._sender.plan(transfer, layer, tiles, now)

    def next_chunk(self, now: float) -> ChunkRequest | None:
        """The most urgent chunk to encode; None if nothing is wanted, credit is short or enough is encoded ahead.

        The same chunk is asked for again when it must be resent: it must be encoded to the same bytes.
        """
        self._ctx.now = now
        chunk = self._sender.next_chunk(now)
        return None if chunk is None else ChunkRequest(chunk.tile.transfer.id, chunk.tile.tile, chunk.level)

    def chunk_encoded(
        self,
        transfer: int,
        tile: Tile,
        level: int,
        payload: bytes | memoryview,
        now: float,
        *,
        crc: int | None = None,
    ) -> None:
        """The answer to a :class:`ChunkRequest`. ``payload`` is borrowed until the frame is written, or the transfer is
        released (what :meth:`data_to_send` gave out before that apart). ``crc`` is its CRC32C, if that is known.

        A no-op for a transfer that is over, or a chunk that is no longer wanted.
        Raises :class:`~lynxproto.errors.LocalError` if it was not asked for, is empty, or is larger than the codec's
        ``max_encoded_size``.
        """
        self._ctx.now = now
        self._sender.chunk_encoded(transfer, tile, level, payload, now, crc=crc)

    def will_send(self, transfer: int, tile: Tile) -> bool:
        """Whether level 0 of a planned tile may have to be encoded: not if the peer does not want it, or holds it."""
        return self._sender.will_send(transfer, tile)

    def end_layer(self, transfer: int, layer: int, digests: Sequence[bytes], now: float) -> None:
        """Digests (16 bytes each, :func:`lynxproto.digest.tile_digest`) of the planned tiles, in plan order (END).

        b"" means that the sender vouches for nothing; allowed if the manifest is ``lossy`` or the tile unwanted.
        A no-op for a transfer that is over.
        """
        self._ctx.now = now
        self._sender.end_layer(transfer, layer, digests, now)

    def result(self, transfer: int, first_token: int, logit_gap: float | None, now: float) -> None:
        """Send RESULT. A no-op for a transfer that is over."""
        self._ctx.now = now
        self._sender.result(transfer, first_token, logit_gap, now)

    def finish(self, transfer: int, now: float) -> None:
        """All layers are planned and ended: when the peer has confirmed everything, the transfer is released."""
        self._ctx.now = now
        self._sender.finish(transfer, now)

    def not_found(self, request: int, now: float, code: ErrorCode = ErrorCode.NOT_FOUND, text: str = "") -> None:
        """Answer a :class:`~lynxproto.events.FetchRequested`: nothing is held under that key, or FORBIDDEN."""
        self._ctx.now = now
        self._fetches.refuse(request, code, text)

    # --- receiving side

    def accept(
        self,
        transfer: int,
        now: float,
        wants: Sequence[Want] | None = None,
        held: Sequence[frames.HeldLayer] = (),
    ) -> None:
        """Memory is ready (ACCEPT). ``wants`` says what this side lacks; None means everything.

        ``held`` is what it has kept of the same transfer (:attr:`~lynxproto.events.TransferOffered.resume`, the same
        peer, the same manifest). What of it counts is told by :class:`~lynxproto.events.PlanReceived`.
        """
        self._ctx.now = now
        self._receiver.accept(transfer, now, wants, held)

    def reject(self, transfer: int, code: ErrorCode, text: str, now: float) -> None:
        """Refuse an offered transfer (REJECT)."""
        self._ctx.now = now
        self._receiver.reject(transfer, code, text, now)

    def applied(self, transfer: int, tile: Tile, level: int, now: float) -> None:
        """A received chunk was decoded into place, or dropped on purpose: its credit returns, the ACK goes out.

        To be called once for each :class:`~lynxproto.events.ChunkReceived`, from any order of chunks, unless the tile
        failed. A no-op for a transfer that is over.
        """
        self._ctx.now = now
        self._receiver.applied(transfer, tile, level, now)

    def tile_verified(self, transfer: int, tile: Tile, now: float) -> None:
        """All levels are applied and the words match the digest in END."""
        self._ctx.now = now
        self._receiver.tile_verified(transfer, tile, now)

    def tile_failed(
        self, transfer: int, tile: Tile, now: float, code: ErrorCode = ErrorCode.DIGEST, text: str = ""
    ) -> None:
        """The words do not match the digest, or the codec refused a payload (``ErrorCode.PAYLOAD``).

        The first time the whole tile is asked for again (attempt 1); the second time the transfer fails. No chunk of
        the failed attempt is delivered after this; the shell calls nothing more for those that were.
        """
        self._ctx.now = now
        self._receiver.tile_failed(transfer, tile, now, code, text)

    def urgent(self, transfer: int, now: float) -> None:
        """Ask the sender to promote this transfer's residual (URGENT)."""
        self._ctx.now = now
        self._receiver.urgent(transfer, now)

    def fetch(self, key: FetchKey, now: float, wants: Sequence[Want] | None = None, lease: float = 0.0) -> int:
        """Ask for a cache by key (FETCH); returns the request id. Answered by
        :class:`~lynxproto.events.TransferOffered` with this ``fetch``, or
        :class:`~lynxproto.events.FetchFailed`. ``lease``: seconds that the peer should keep the cache afterwards.
        """
        self._check_open()
        self._ctx.now = now
        request = self._new_id()
        self._fetches.ask(request, key, now, wants, lease)
        return request

    # --- both sides

    def cancel(
        self,
        transfer: int,
        now: float,
        above_level: int | None = None,
        code: ErrorCode = ErrorCode.CANCELLED,
        text: str = "",
    ) -> None:
        """Cancel the whole transfer, or with ``above_level`` only the levels above that one. Idempotent.

        Both sides may. The whole: :class:`~lynxproto.events.TransferReleased` is queued before this returns. Levels:
        :class:`~lynxproto.events.LevelsCancelled` on both sides, and the transfer then completes at that level.
        A no-op for a transfer that is over, or complete at its receiver.
        """
        self._ctx.now = now
        outgoing = self._sender.transfers.get(transfer)
        incoming = self._receiver.transfers.get(transfer)
        if outgoing is not None:
            self._sender.cancel(outgoing, now, above_level, code, text, by_peer=False)
        elif incoming is not None:
            self._receiver.cancel(incoming, now, above_level, code, text)
        elif transfer not in self._sender.tombstones and transfer not in self._receiver.tombstones:
            raise LocalError(f"no transfer {transfer:032x}")

    # --- stripes: reading

    def _check_open(self) -> None:
        if self.closed:
            raise LocalError("the session is over; make a new Connection")

    def _new_id(self) -> int:
        return self._ctx.random.getrandbits(128) or 1

    def _stripe(self, index: int) -> Stripe:
        try:
            return self._stripes[index]
        except KeyError:
            raise LocalError(f"there is no stripe {index}") from None

    def _ready_stripes(self) -> list[Stripe]:
        return [stripe for stripe in self._stripes.values() if stripe.ready]

    def _take_over(self, chunk: Chunk) -> None:
        for stripe in self._stripes.values():
            if stripe.writing is chunk:
                stripe.out = deque(memoryview(bytes(part)) for part in stripe.out)
                stripe.lender = None

    def _is_alive(self, index: int) -> bool:
        stripe = self._stripes.get(index)
        return stripe is not None and stripe.ready

    def _check_header(self, stripe: Stripe, header: Header) -> None:
        """Refuse a frame by its header, before anything is allocated for it."""
        if not stripe.ready:
            if header.known and header.type not in HANDSHAKE_TYPES:
                raise ProtocolError(f"{FrameType(header.type).name} before the handshake", ErrorCode.STATE)
            if header.payload_length > MAX_HELLO:
                text = f"{header.payload_length} bytes of payload before the handshake, limit {MAX_HELLO}"
                raise ProtocolError(text, ErrorCode.FRAME_TOO_LARGE)
        header.check(self._ctx.config.limits)
        if header.type != FrameType.DATA:
            self._spend_budget(HEADER_SIZE + header.payload_length)

    def _spend_budget(self, nbytes: int) -> None:
        for frames_, bytes_ in self.control_budgets:
            for budget, amount, what in ((frames_, 1, "frames"), (bytes_, nbytes, "bytes")):
                if not budget.spend(amount, self._ctx.now):
                    raise ProtocolError(f"more than {budget.rate:g} {what} of control a second", ErrorCode.LIMIT)

    def _begin_payload(self, stripe: Stripe, header: Header, bitmap: bytes) -> Target | None:
        if header.type == FrameType.DATA:
            self._news = self._news or News.CHUNKS
            stripe.arrival = self._receiver.admit(header, bitmap, self._ctx.now)
            return stripe.arrival
        self._news = News.ANYTHING
        counters = self._ctx.counters
        counters.control_frames_received += 1
        counters.control_bytes_received += HEADER_SIZE + header.payload_length
        if header.known:
            return Target(memoryview(bytearray(header.payload_length)))
        self._ctx.events.append(
            UnknownFrame(type=header.type, flags=header.flags, transfer=header.transfer, nbytes=header.payload_length)
        )
        return None

    def _end_payload(self, stripe: Stripe, header: Header, target: Target) -> None:
        payload = target.view
        self._news = self._news or News.CHUNKS
        if header.type == FrameType.DATA:
            arrival, stripe.arrival = stripe.arrival, None
            assert arrival is not None
            self._receiver.arrived(arrival, self._ctx.now)
        elif target.crc != header.payload_crc:
            if not stripe.ready:
                raise CorruptFrameError(f"{FrameType(header.type).name}: payload CRC32C is wrong")
            self._ctx.counters.corrupt += 1  # as good as lost: its sender will say it again
        elif header.type in _HELLOS and bytes(payload) in (stripe.peer_hello, stripe.peer_proof):
            return  # a duplicate of the handshake's frames
        elif stripe.ready:
            self._dispatch(stripe, header, frames.parse_body(header, payload, self._ctx.config.limits))
        else:
            body = frames.parse_body(header, payload, self._ctx.config.limits)
            hello = self._handshake.receive(stripe, body, bytes(payload))
            if hello is not None:
                self._stripe_ready(stripe, hello)

    # --- stripes: handshake

    def _greet(self) -> None:
        """The client's HELLOs. While there is no session yet one stripe makes it; the others wait to join."""
        if not self._client or self.closed:
            return
        for stripe in self._stripes.values():
            others = any(other.my_hello and not other.closed for other in self._stripes.values())
            if not stripe.my_hello and not stripe.closed and (self._handshake.session is not None or not others):
                alive = tuple(other.number for other in self._stripes.values() if not other.closed)
                try:
                    self._handshake.greet(stripe, alive)
                except ExpiredSecretError as error:
                    self._drop_stripe(stripe, error)
                    if not self._ready_stripes():
                        self._fail(error, tell=False)
                    return

    def _given_up(self, stripe: Stripe, hello: frames.Hello) -> list[Stripe]:
        """The stripes that the client has lost, as it says in the HELLO of a later one."""
        older = [other for other in self._ready_stripes() if other.number < stripe.number]
        return [other for other in older if other.number not in hello.alive]

    def _stripe_ready(self, stripe: Stripe, hello: frames.Hello) -> None:
        ctx = self._ctx
        limit = ctx.config.limits.stripes
        if not self._client and len(self._ready_stripes()) - len(self._given_up(stripe, hello)) >= limit:
            raise ProtocolError(f"more than {limit} stripes", ErrorCode.LIMIT)
        stripe.state = advance(STRIPE, stripe.state, "proof")
        if not self._client:
            for other in self._given_up(stripe, hello):
                self._drop_stripe(other, ConnectionClosedError("the client says that it lost this stripe"))
        was, first = self._state, not ctx.ready
        self._state = advance(SESSION, self._state, "stripe ready")
        ctx.ready = True
        self._alone_since = None
        if was is SessionState.CONNECTING:
            assert self.session is not None
            ctx.peer = Peer(hello.name, hello.limits, hello.codecs, hello.features, hello.lease)
            for window in self._sender.windows:
                window.raise_limit(hello.limits.session_window)
            ctx.events.append(
                HandshakeCompleted(
                    session=self.session,
                    peer_name=hello.name,
                    version=VERSION,
                    codecs=hello.codecs,
                    features=hello.features,
                )
            )
        ctx.events.append(StripeReady(stripe=stripe.index, resumed=was is SessionState.SUSPENDED))
        self._greet()
        if first:
            self._resync()

    def _resync(self) -> None:
        self._sender.resync(self._ctx.now)
        self._receiver.resync(self._ctx.now)
        self._fetches.resync()

    # --- stripes: the end of one, the end of all

    def _stripe_error(self, stripe: Stripe, error: ProtocolError, *, framing_lost: bool) -> None:
        """The peer, or the link, broke the rules on this stripe."""
        if stripe.closed:
            return
        if stripe.ready:
            if framing_lost:
                self._drop_stripe(stripe, error)
            else:
                self._fail(error, tell=True)
            return
        # Nobody is known in a handshake: a stranger may cost this stripe, not a session that stands.
        refused = isinstance(error, PeerRefusal)
        shown = as_refusal(error) if refused else error
        self._drop_stripe(stripe, shown)
        if not refused:
            stripe.control.append(self._ctx.encode(frames.Error(code=error.code, text=str(error))))
        if refused and error.code is ErrorCode.NOT_FOUND and self._state is SessionState.SUSPENDED:
            if self._sender.restarts < self._ctx.config.session_restarts:
                self._start_over(shown)
            else:
                self._fail(shown, tell=False)
        elif self._state is SessionState.CONNECTING and (self._ctx.peer is None or error.code in _REFUSALS):
            self._fail(shown, tell=False)

    def _start_over(self, error: RemoteError) -> None:
        """The server has forgotten the session: begin another, and offer in it what this side was sending."""
        self._state = advance(SESSION, self._state, "forgotten")
        self._handshake.forget()
        for other in self._stripes.values():
            if not other.closed:  # it asks for the session that is gone
                self._drop_stripe(other, error)
        self._receiver.abandon(error)
        self._receiver.start_over()
        self._fetches.forget_theirs()
        self._sender.start_over(self._ctx.now)

    def _drop_stripe(self, stripe: Stripe, error: RemoteError | None) -> None:
        was_ready = stripe.ready
        stripe.state = advance(STRIPE, stripe.state, "lost")
        stripe.reader.stop()
        stripe.control.clear()
        stripe.out.clear()
        if stripe.arrival is not None:
            self._receiver.cut_off(stripe.arrival)
            stripe.arrival = None
        if stripe.writing is not None:
            self._sender.cut_off(stripe.writing)
            stripe.writing = None
        self._ctx.events.append(StripeClosed(stripe=stripe.index, error=error))
        if not was_ready:
            self._greet()
            return
        if self._ready_stripes():
            self._resync()
            self._probe()
        else:
            self._ctx.ready = False
            self._ctx.control.clear()
            self._alone_since = self._ctx.now
            self._state = advance(SESSION, self._state, "last stripe lost")

    def _say_everywhere(self, body: frames.Body) -> None:
        for stripe in self._ready_stripes():
            stripe.control.append(self._ctx.encode(body))

    def _fail(self, error: RemoteError, *, tell: bool) -> None:
        if self.closed:
            return
        if tell:
            self._say_everywhere(frames.Error(code=error.code, text=str(error)))
        self._end(error)
        self._ctx.events.append(ConnectionFailed(error=error))

    def _end(self, error: RemoteError | None) -> None:
        """Release everything. What is queued on the stripes themselves may still be sent."""
        self._ctx.ready = False
        self._ctx.control.clear()
        self._sender.abandon(error)
        self._receiver.abandon(error)
        self._fetches.abandon(error or ConnectionClosedError("the session was closed"))
        self._alone_since = None
        for stripe in self._stripes.values():
            if not stripe.closed:
                stripe.reader.stop()
                stripe.state = advance(STRIPE, stripe.state, "lost")
                stripe.arrival = None
        self._state = advance(SESSION, self._state, "end")

    # --- stripes: writing

    def _probe(self) -> None:
        """Ask what has arrived: what was written before the PING and is not in the answer is lost."""
        for stripe in self._ready_stripes():
            self._ping(stripe, probe=True)

    def measure_link(self, nbytes: int, now: float) -> int:
        """Send ``nbytes`` bytes that mean nothing, then PING; :class:`~lynxproto.events.LinkMeasured` tells its answer.

        Any peer answers: the bytes are the payload of a reserved frame type. At most the peer's ``control_bytes`` go.
        Returns the PING's id. Raises :class:`~lynxproto.errors.LocalError` while no stripe is ready.
        """
        self._ctx.now = now
        stripe = next(iter(self._ready_stripes()), None)
        if stripe is None or self._ctx.peer is None:
            raise LocalError("a link can be measured once the handshake is over and while it holds")
        if nbytes:
            stripe.control.append(frames.ballast_frame(min(nbytes, self._ctx.peer.limits.control_bytes)))
        self._ping(stripe, probe=False)
        self._measuring.add(self._pings)
        return self._pings

    def _ping(self, stripe: Stripe, *, probe: bool) -> None:
        self._pings += 1
        stripe.pinged_at = self._ctx.now
        if probe:
            stripe.note_probe(self._pings, self._sender.sequence)
        stripe.control.append(self._ctx.encode(frames.Ping(id=self._pings, probe=probe)))

    # --- frames after the handshake

    def _dispatch(self, stripe: Stripe, header: Header, body: frames.Body) -> None:
        transfer = header.transfer
        name = FrameType(header.type).name
        found = self._sender.transfers.get(transfer) or self._receiver.transfers.get(transfer)
        if found is not None:
            found.counters.control_frames_received += 1
            found.counters.control_bytes_received += HEADER_SIZE + header.payload_length
        if header.type in _HELLOS:
            raise ProtocolError(f"{name} after the handshake", ErrorCode.STATE)
        if header.type in _OF_SESSION:
            _OF_SESSION[header.type](self, stripe, transfer, body)
        elif isinstance(body, frames.Credit):
            self._sender.on_credit(transfer, body.limits, self._ctx.now)
        elif isinstance(body, frames.Error) and not transfer and body.code in _OF_STRIPE:
            # Perhaps of this side's proof: the handshake is over here, and was not there.
            self._drop_stripe(stripe, PeerError(f"the peer found this stripe damaged: {body.text}", body.code))
        elif isinstance(body, frames.Error) and not transfer:
            self._fail(PeerError(f"the peer ended the session: {body.text or body.code.name}", body.code), tell=False)
        elif not transfer:
            raise ProtocolError(f"{name} without a transfer id")
        elif header.type in _TO_SENDER:
            self._to_sender(transfer, body, name)
        else:
            self._to_receiver(transfer, body, name)

    def _to_sender(self, transfer: int, body: frames.Body, name: str) -> None:
        sender, now = self._sender, self._ctx.now
        t = sender.transfers.get(transfer)
        if t is None:
            if transfer in self._receiver.transfers:
                raise ProtocolError(f"{name} for a transfer that goes the other way")
            last_word = sender.tombstone(transfer)
            if last_word is not None and not isinstance(body, frames.Reject):
                self._ctx.reply(last_word, transfer)
            return
        match body:
            case frames.Accept():
                sender.on_accept(t, body, now)
            case frames.Reject():
                sender.on_reject(t, body)
            case frames.Resume():
                sender.on_resume(t, body, now)
            case frames.Ack():
                sender.on_status(t, body, now)
            case frames.Nack():
                self._ctx.counters.nacks += len(body.items)
                sender.on_nack(t, body)
            case frames.Cancel():
                sender.cancel(t, now, body.above, body.code, body.text, by_peer=True)
            case frames.Urgent():
                sender.on_urgent(t)
            case frames.Error():
                sender.on_error(t, body)

    def _to_receiver(self, transfer: int, body: frames.Body, name: str) -> None:
        receiver, now = self._receiver, self._ctx.now
        if transfer in self._sender.transfers:
            raise ProtocolError(f"{name} for a transfer that goes the other way")
        if isinstance(body, frames.Open):
            receiver.on_open(transfer, body, now)
            if body.fetch is not None and transfer in receiver.transfers:
                self._fetches.on_open(body.fetch)
            return
        t = receiver.transfers.get(transfer)
        if t is None:
            return  # late
        t.heard_at = now
        if isinstance(body, frames.Closed):
            receiver.on_closed(t, body, now)
            return
        if t.state is IncomingState.OFFERED:
            raise ProtocolError(f"{name} before the transfer was accepted", ErrorCode.STATE)
        if t.live:
            match body:
                case frames.Plan():
                    receiver.on_plan(t, body, now)
                case frames.End():
                    receiver.on_end(t, body, now)
                case frames.Result():
                    receiver.on_result(t, body, now)

    def _on_ping(self, stripe: Stripe, _: int, body: frames.Ping) -> None:
        if len(stripe.pongs) > _MAX_REPLIES:
            raise ProtocolError("PINGs come faster than the answers can go out", ErrorCode.LIMIT)
        stripe.pongs.append(body.id)
        stripe.probed |= body.probe

    def _on_pong(self, stripe: Stripe, _: int, body: frames.Pong) -> None:
        if body.id in self._measuring:
            self._measuring.discard(body.id)
            self._ctx.events.append(LinkMeasured(ping=body.id))
        sequence = stripe.probes.pop(body.id, None)
        if sequence is not None:
            self._sender.on_probe_answered(stripe.index, sequence)

    def _on_goaway(self, stripe: Stripe, _: int, body: frames.GoAway) -> None:
        why = "it ended or was stopped" if body.code is ErrorCode.NO_ERROR else body.code.name
        text = f"the peer closed the session: {body.text or why}"
        if body.code is ErrorCode.NO_ERROR:
            self._end(ConnectionClosedError(text))
            self._ctx.events.append(ConnectionClosed(by_peer=True, text=body.text))
        else:
            self._fail(PeerError(text, body.code), tell=False)

    def _on_fetch(self, stripe: Stripe, request: int, body: frames.Fetch) -> None:
        if not any(t.fetch == request for t in self._sender.transfers.values()):  # else OPEN is on its way
            self._fetches.on_fetch(request, body)

    def _on_not_found(self, stripe: Stripe, request: int, body: frames.NotFound) -> None:
        self._fetches.on_not_found(request, body)


#: What ERROR without a transfer says of its stripe, and not of the session.
_OF_STRIPE: Final = frozenset({ErrorCode.FRAME_CORRUPT, ErrorCode.VERSION})
#: What a new attempt would not change.
_REFUSALS: Final = frozenset(
    {ErrorCode.AUTHENTICATION, ErrorCode.VERSION, ErrorCode.UNKNOWN_CRITICAL, ErrorCode.NOT_FOUND}
)
_HELLOS: Final = frozenset({FrameType.HELLO, FrameType.HELLO_ACK})
_MAX_REPLIES: Final = 10_000
_OF_SESSION: Final[dict[int, Callable[[Connection, Stripe, int, Any], None]]] = {
    FrameType.PING: Connection._on_ping,
    FrameType.PONG: Connection._on_pong,
    FrameType.GOAWAY: Connection._on_goaway,
    FrameType.FETCH: Connection._on_fetch,
    FrameType.NOT_FOUND: Connection._on_not_found,
}
_TO_SENDER: Final = frozenset(
    {
        FrameType.ACCEPT, FrameType.REJECT, FrameType.ACK, FrameType.NACK, FrameType.RESUME, FrameType.CANCEL,
        FrameType.URGENT, FrameType.ERROR,
    }
)  # fmt: skip
