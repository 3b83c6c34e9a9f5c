"""What a :class:`~lynxproto.connection.Connection` tells its shell. Frozen; do not subclass.

``transfer`` and ``request`` are the 128-bit ids of spec/wire-format.md as integers.
"""

from __future__ import annotations

from dataclasses import dataclass

from lynxproto.chunk import Tile
from lynxproto.errors import ErrorCode, ProtocolError, RemoteError
from lynxproto.frames import Plan
from lynxproto.manifest import FetchKey, Manifest, Want

__all__ = [
    "Cancelled",
    "ChunkReceived",
    "ChunksResumed",
    "ConnectionClosed",
    "ConnectionFailed",
    "Event",
    "FetchFailed",
    "FetchRequested",
    "HandshakeCompleted",
    "LayerEnded",
    "LevelsCancelled",
    "LinkMeasured",
    "PlanReceived",
    "ResultReceived",
    "StripeClosed",
    "StripeReady",
    "TileDigested",
    "TransferAccepted",
    "TransferComplete",
    "TransferFailed",
    "TransferOffered",
    "TransferRefused",
    "TransferRejected",
    "TransferReleased",
    "UnknownFrame",
    "UrgentReceived",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeCompleted:
    """The session is up (once a session, on its first stripe): transfers may be opened.

    Comes again when the server has forgotten the session and the client began a new one. Transfers that this side sends
    go on in it: the peer is offered them anew. Those that it was receiving have failed.
    """

    session: bytes
    peer_name: str
    version: int
    codecs: tuple[str, ...]
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StripeReady:
    """A stripe finished its handshake and carries frames (also fires for the first one)."""

    stripe: int
    resumed: bool
    """True when the session had lost all its stripes before this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StripeClosed:
    """The stripe is over: close its byte stream. The session lives on; open another stripe to resume."""

    stripe: int
    error: RemoteError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionFailed:
    """The session is over because of ``error``. All transfers were released; their events came first."""

    error: RemoteError


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionClosed:
    """The session ended in order: the peer said GOAWAY with NO_ERROR, or this side did and has sent it."""

    by_peer: bool
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMeasured:
    """The answer to a ``measure_link`` is here: everything that was sent before its PING has arrived."""

    ping: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownFrame:
    """A frame of a type that this version does not know, and that its sender marked as ignorable. It was skipped."""

    type: int
    flags: int
    transfer: int
    nbytes: int


# Receiving side


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOffered:
    """OPEN arrived and passed identity, limit, codec and table checks. Allocate, then ``accept`` or ``reject``."""

    transfer: int
    manifest: Manifest
    fetch: int | None
    """The request that this answers, if the peer opened it because of ``fetch``."""
    resume: bytes
    """The sender's secret, by which it may resume the transfer in another session; b"" if it will not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRefused:
    """OPEN arrived and was answered by REJECT: identity, limits, codecs or tables rule it out."""

    transfer: int
    error: ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReceived:
    """The tiles of one layer. Comes before any :class:`ChunkReceived` or :class:`LayerEnded` of that layer.

    ``levels[i]`` is the number of levels of ``tiles[i]`` that this side wants: 0 for tiles that were not wanted.
    ``held[i]`` of them, the lowest, will not come: this side said when it accepted that it holds them. Call
    ``applied`` for them as for chunks that came.
    """

    transfer: int
    plan: Plan
    tiles: tuple[Tile, ...]
    levels: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def layer(self) -> int:
        """Whose tiles they are."""
        return self.plan.layer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReceived:
    """One level of one tile, its checksum verified. Levels of one tile always come in order 0, 1, 2...

    Decode it and call ``applied``, or ``tile_failed`` if the codec refuses it. After a ``tile_failed`` the tile comes
    again from level 0 (``attempt`` 1): drop the decoder state of the first attempt.
    """

    transfer: int
    tile: Tile
    level: int
    payload: memoryview
    attempt: int
    last: bool
    """Whether this is the tile's last level."""
    landed: bytes | None = None
    """The tile's digest, if ``payload`` is the memory that the shell gave for its words: nothing is left to decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileDigested:
    """Sender: a tile whose codec is ``verbatim`` was framed for the first time, and this is its digest, for END."""

    transfer: int
    tile: Tile
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEnded:
    """Digests of the layer's tiles, in the order of its plan; b"" where the sender vouches for nothing (lossy)."""

    transfer: int
    layer: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultReceived:
    """What prefill already knows: the first token, and the gap between its two largest logits if known."""

    transfer: int
    first_token: int
    logit_gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferComplete:
    """Receiving side: every wanted tile is applied, and verified where it has a digest. The transfer is over soon."""

    transfer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelsCancelled:
    """Levels above ``level`` will not come (either side asked); tiles are final when they have reached it."""

    transfer: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailed:
    """The peer has nothing under the key that ``fetch`` asked for, or the request ran into its timeout."""

    request: int
    error: RemoteError


# Sending side


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferAccepted:
    """The receiver has its memory ready; again, if its side of the session was forgotten.

    ``wants`` is what it lacks; the connection asks for those chunks only.
    """

    transfer: int
    wants: tuple[Want, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRejected:
    """The receiver refused before any data moved. The transfer is over; :class:`TransferReleased` follows."""

    transfer: int
    code: ErrorCode
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunksResumed:
    """After a lost stripe: ``missing`` chunks of this transfer had not arrived and will be asked for again."""

    transfer: int
    missing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UrgentReceived:
    """The receiver is close to its draft limit: this transfer's residual was promoted."""

    transfer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequested:
    """The peer asks for a cache. Answer with ``open(manifest, now, fetch=request)`` or ``not_found(request, now)``."""

    request: int
    key: FetchKey
    wants: tuple[Want, ...]
    lease: float


# Both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The peer cancelled the whole transfer (or confirmed that this side's cancel took effect)."""

    transfer: int
    by_peer: bool
    code: ErrorCode
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed:
    """The transfer is over because of ``error``; :class:`TransferReleased` follows."""

    transfer: int
    error: RemoteError


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReleased:
    """The connection holds and asks for nothing of this transfer any more. Always its last event, exactly once.

    Sending side: borrowed arrays may be reused. ``complete`` tells whether the peer confirmed all that it wanted.
    Receiving side: nothing more will arrive.
    """

    transfer: int
    complete: bool


Event = (
    HandshakeCompleted
    | StripeReady
    | StripeClosed
    | ConnectionFailed
    | ConnectionClosed
    | LinkMeasured
    | UnknownFrame
    | TransferOffered
    | TransferRefused
    | PlanReceived
    | ChunkReceived
    | LayerEnded
    | TileDigested
    | ResultReceived
    | TransferComplete
    | LevelsCancelled
    | FetchFailed
    | TransferAccepted
    | TransferRejected
    | ChunksResumed
    | UrgentReceived
    | FetchRequested
    | Cancelled
    | TransferFailed
    | TransferReleased
)
