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

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from lynxproto.chunk import Tile
from lynxproto.config import Config
from lynxproto.errors import ErrorCode, RemoteError
from lynxproto.events import Event
from lynxproto.manifest import FetchKey, Manifest, Want

__all__ = ["ChunkRequest", "Connection", "hello_session"]


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Encode ``level`` of ``tile`` and hand it to ``chunk_encoded`` (or cancel the transfer)."""

    transfer: int
    tile: Tile
    level: int


def hello_session(data: bytes | bytearray | memoryview) -> bytes | None:
    """For a listener: which session the first bytes of a new byte stream ask for.

    Returns None while ``data`` is too short to tell, ``b""`` for a new session (make a new Connection), or the
    16-byte id of the session to join (find the Connection by ``Connection.session``; refuse if there is none).
    Then call ``open_stripe`` and feed the same bytes to ``receive_data``. Joining is authenticated there.

    Raises :class:`~lynxproto.errors.ProtocolError` for anything that is not a HELLO of at most 16 KiB.
    """
    raise NotImplementedError


class Connection:
    """A session. ``client`` is the side that opened the byte streams; either side may send and receive caches.

    ``random`` is for tests; by default ids, nonces and tokens come from the operating system.
    """

    def __init__(self, config: Config, *, client: bool, random: Random | None = None) -> None:
        raise NotImplementedError

    # --- what it is

    @property
    def session(self) -> bytes | None:
        """The 16-byte session id; None until the handshake of the first stripe told it."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """True once the session is over and everything is released. Bytes may still wait to be sent (GOAWAY)."""
        raise NotImplementedError

    # --- byte streams

    def open_stripe(self, now: float) -> int:
        """A byte stream to the peer exists; returns its number. The client's HELLO is queued.

        Raises :class:`~lynxproto.errors.LocalError` if the session is over.
        """
        raise NotImplementedError

    def stripe_lost(self, stripe: int, now: float, error: RemoteError | None = None) -> None:
        """The byte stream ended. Idempotent. The session lives on, and resumes on its other stripes or on the next."""
        raise NotImplementedError

    def receive_data(self, data: bytes | bytearray | memoryview, now: float, stripe: int = 0) -> None:
        """Bytes arrived on ``stripe``, in any split. Never raises for what the peer sent: that becomes events."""
        raise NotImplementedError

    def get_buffer(self, stripe: int = 0) -> memoryview:
        """Where the next bytes of ``stripe`` should be read to; never empty. Payloads land in their own buffer."""
        raise NotImplementedError

    def buffer_updated(self, nbytes: int, now: float, stripe: int = 0) -> None:
        """``nbytes`` bytes were read into the start of :meth:`get_buffer`'s last result."""
        raise NotImplementedError

    def data_to_send(self, now: float, stripe: int = 0, limit: int = 65536) -> list[memoryview]:
        """At most about ``limit`` bytes to write to ``stripe``, in order; [] if there is nothing to send now.

        At each frame boundary the most urgent frame is taken. What is returned counts as written: if the write
        fails, call :meth:`stripe_lost`. Ask again when the stream can take more, and after other calls.
        """
        raise NotImplementedError

    def next_event(self) -> Event | None:
        """The oldest event not yet taken."""
        raise NotImplementedError

    def next_timer(self) -> float | None:
        """When :meth:`handle_timer` wants to be called; None for never."""
        raise NotImplementedError

    def handle_timer(self, now: float) -> None:
        """The time is ``now``: pings, resends, timeouts. May be called at any time."""
        raise NotImplementedError

    def close(self, now: float, code: ErrorCode = ErrorCode.NO_ERROR, text: str = "") -> None:
        """End the session: release all transfers now, send GOAWAY. Idempotent. Drain data_to_send, then hang up."""
        raise NotImplementedError

    # --- sending side

    def open(
        self, manifest: Manifest, now: float, *, deadline: float = float("inf"), fetch: int | None = None
    ) -> int:
        """Offer a transfer (OPEN); returns its id. ``deadline`` (same clock) breaks ties between anchors.

        Allowed before the handshake is over. Raises :class:`~lynxproto.errors.LocalError` for a closed session,
        another identity than the configured one, or codecs or sizes that the peer has said it refuses.
        """
        raise NotImplementedError

    def plan(self, transfer: int, layer: int, tiles: Sequence[Tile], now: float) -> None:
        """The tiles of ``layer`` (PLAN, fixed for good); from now on :meth:`next_chunk` may ask for them.

        Allowed before the transfer is accepted. A no-op for a transfer that is already over.
        Raises :class:`~lynxproto.errors.LocalError` for a second plan, tiles outside the layer, overlapping tiles, or
        a chunk that could be larger than the peer's windows.
        """
        raise NotImplementedError

    def next_chunk(self, now: float) -> ChunkRequest | None:
        """The most urgent chunk to encode; None if nothing is wanted, credit is short or enough is encoded ahead.

        The same chunk is asked for again when it must be resent: it must be encoded to the same bytes.
        """
        raise NotImplementedError

    def chunk_encoded(self, transfer: int, tile: Tile, level: int, payload: bytes | memoryview, now: float) -> None:
        """The answer to a :class:`ChunkRequest`. ``payload`` is borrowed until the frame is written.

        A no-op for a transfer that is over, or a chunk that is no longer wanted.
        Raises :class:`~lynxproto.errors.LocalError` if it was not asked for, is empty, or is larger than the codec's
        ``max_encoded_size``.
        """
        raise NotImplementedError

    def end_layer(self, transfer: int, layer: int, digests: Sequence[bytes], now: float) -> None:
        """Digests (16 bytes each, :func:`lynxproto.digest.tile_digest`) of the planned tiles, in plan order (END).

        b"" means that the sender vouches for nothing; allowed if the manifest is ``lossy`` or the tile unwanted.
        A no-op for a transfer that is over.
        """
        raise NotImplementedError

    def result(self, transfer: int, first_token: int, logit_gap: float | None, now: float) -> None:
        """Send RESULT. A no-op for a transfer that is over."""
        raise NotImplementedError

    def finish(self, transfer: int, now: float) -> None:
        """All layers are planned and ended: when the peer has confirmed everything, the transfer is released."""
        raise NotImplementedError

    def not_found(self, request: int, now: float) -> None:
        """Answer a :class:`~lynxproto.events.FetchRequested`: nothing is held under that key."""
        raise NotImplementedError

    # --- receiving side

    def accept(self, transfer: int, now: float, wants: Sequence[Want] | None = None) -> None:
        """Memory is ready (ACCEPT). ``wants`` says what this side lacks; None means everything."""
        raise NotImplementedError

    def reject(self, transfer: int, code: ErrorCode, text: str, now: float) -> None:
        """Refuse an offered transfer (REJECT)."""
        raise NotImplementedError

    def applied(self, transfer: int, tile: Tile, level: int, now: float) -> None:
        """A received chunk was decoded into place, or dropped on purpose: its credit returns, the ACK goes out.

        To be called once for each :class:`~lynxproto.events.ChunkReceived`, from any order of chunks, unless the tile
        failed. A no-op for a transfer that is over.
        """
        raise NotImplementedError

    def tile_verified(self, transfer: int, tile: Tile, now: float) -> None:
        """All levels are applied and the words match the digest in END."""
        raise NotImplementedError

    def tile_failed(
        self, transfer: int, tile: Tile, now: float, code: ErrorCode = ErrorCode.DIGEST, text: str = ""
    ) -> None:
        """The words do not match the digest, or the codec refused a payload (``ErrorCode.PAYLOAD``).

        The first time the whole tile is asked for again (attempt 1); the second time the transfer fails.
        """
        raise NotImplementedError

    def urgent(self, transfer: int, now: float) -> None:
        """Ask the sender to promote this transfer's residual (URGENT)."""
        raise NotImplementedError

    def fetch(self, key: FetchKey, now: float, wants: Sequence[Want] | None = None, lease: float = 0.0) -> int:
        """Ask for a cache by key (FETCH); returns the request id. Answered by
        :class:`~lynxproto.events.TransferOffered` with this ``fetch``, or
        :class:`~lynxproto.events.FetchFailed`. ``lease``: seconds that the peer should keep the cache afterwards.
        """
        raise NotImplementedError

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
        """
        raise NotImplementedError
