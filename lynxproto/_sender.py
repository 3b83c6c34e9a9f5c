"""The sending half of a connection: outgoing transfers, their chunks, and which of them goes next.

Control state (OPEN, PLAN, END, RESULT, CLOSED) is not queued for ever: each piece is kept until the receiver's
status confirms it, and sent again after a reconnect or when a timer runs out.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from lynxproto import frames
from lynxproto._context import ALL_LEVELS, Backoff, Context, Sizes, build_codec
from lynxproto.chunk import PARTS, Tile
from lynxproto.codecs.abc import Codec
from lynxproto.config import MAX_LEVELS
from lynxproto.counters import Counters
from lynxproto.digest import DIGEST_SIZE, checksums
from lynxproto.errors import (
    DeadlineError,
    ErrorCode,
    LimitError,
    LocalError,
    LynxError,
    PeerError,
    ProtocolError,
    RemoteError,
    SpecError,
    UnknownCodecError,
)
from lynxproto.events import (
    Cancelled,
    ChunksResumed,
    LevelsCancelled,
    TileDigested,
    TransferAccepted,
    TransferFailed,
    TransferRejected,
    TransferReleased,
    UrgentReceived,
)
from lynxproto.frames import TileKey
from lynxproto.manifest import Manifest, Want, wanted_levels
from lynxproto.scheduler import ChunkQueue, Fit, Flow, Share
from lynxproto.state import CHUNK, OUTGOING, ChunkState, OutgoingState, advance
from lynxproto.windows import SendWindow

__all__ = ["Chunk", "Outgoing", "Sender"]


def _max_size(chunk: Chunk) -> int:
    return chunk.max_size


def _size(chunk: Chunk) -> int:
    return chunk.charged or chunk.max_size


#: A tile's entry in PLAN, its bitmap apart, and its byte of levels.
_PLAN_BYTES: Final = 27
_UNSENT: Final = frozenset({ChunkState.WAITING, ChunkState.ENCODING, ChunkState.READY})


class Chunk:
    """One level of one tile. ``charged`` is its size once it has cost credit (in this attempt), else 0."""

    __slots__ = (
        "attempt", "begun", "charged", "crc", "flow", "held", "level", "nacks", "payload", "place", "sequence", "state",
        "stripe", "tile",
    )  # fmt: skip

    def __init__(self, tile: _Tile, level: int, flow: Flow, place: tuple[int, int]) -> None:
        self.tile = tile
        self.level = level
        self.flow = flow
        self.place = place
        self.state = ChunkState.IDLE
        self.payload: memoryview | None = None
        self.crc: int | None = None  # of the payload
        self.charged = 0
        self.begun = False  # some of a frame went out in this attempt: the peer may have charged it too
        self.held = 0  # bytes of the encode-ahead budget
        self.attempt = 0  # of the tile, when the frame was made
        self.nacks = 0
        self.stripe = -1  # that carried it last
        self.sequence = 0  # grows with each chunk written

    @property
    def max_size(self) -> int:
        return self.tile.max_sizes[self.level]


class _Tile:
    """``levels`` are its codec's, ``want`` of them the receiver's; masks are of levels, in the current attempt."""

    __slots__ = (
        "applied", "attempt", "chunks", "codec_id", "digested", "done", "key", "layer", "lent", "levels", "max_sizes",
        "place", "received", "tile", "transfer", "verbatim", "verified", "want",
    )  # fmt: skip

    def __init__(
        self, transfer: Outgoing, layer: _Layer, tile: Tile, key: TileKey, codec: Codec, *, lend: bool
    ) -> None:
        self.transfer = transfer
        self.layer = layer
        self.place = len(layer.tiles)
        self.tile = tile
        self.key = key
        self.codec_id = codec.wire_id
        self.levels = codec.levels
        self.max_sizes = transfer.sizes.of(tile)
        self.verbatim = codec.verbatim
        self.lent = codec.verbatim and lend  # its payload is had when its turn comes
        self.digested = False
        self.start_over()

    def start_over(self) -> None:
        """Nothing of it was sent, in this session."""
        self.want = 0
        self.attempt = 0
        self.received = 0
        self.applied = 0
        self.verified = False
        self.done = False
        self.chunks: list[Chunk] = []


class _Layer:
    """``open`` counts the tiles that are not done; ``plan`` is PLAN's body, and ``said`` whether it went out."""

    __slots__ = (
        "bitmaps", "checked", "digests", "end_confirmed", "index", "open", "plan", "plan_confirmed", "positions",
        "said", "status", "tiles",
    )  # fmt: skip

    def __init__(self, index: int, keys: Sequence[TileKey], codecs: Sequence[Codec]) -> None:
        self.index = index
        self.tiles: list[_Tile] = []
        self.digests: tuple[bytes, ...] | None = None
        self.plan = frames.Plan(layer=index, tiles=tuple(keys), levels=tuple(codecs[key.codec].levels for key in keys))
        self.bitmaps = sum(len(key.bitmap) for key in keys)  # bytes
        self.positions = sum(key.positions for key in keys) if self.bitmaps else 0
        self.start_over()

    def start_over(self) -> None:
        """Nothing of it was said, in this session."""
        self.checked = False  # against the peer's limits
        self.said = False
        self.plan_confirmed = False
        self.end_confirmed = False
        self.status: frames.LayerStatus | None = None
        self.open = len(self.tiles)
        for tile in self.tiles:
            tile.start_over()


class Outgoing:
    """One transfer at its sender."""

    def __init__(
        self,
        transfer: int,
        manifest: Manifest,
        flow: Flow,
        ctx: Context,
        now: float,
        *,
        fetch: int | None,
        resume: bytes,
    ) -> None:
        self.id = transfer
        self.manifest = manifest
        self.flow = flow
        self.fetch = fetch
        self.resume = resume
        self.codecs = [build_codec(config) for config in manifest.codecs]
        self.sizes = Sizes(self.codecs, manifest)
        self.state = OutgoingState.OFFERED
        self.layers: dict[int, _Layer] = {}
        self.by_tile: dict[Tile, _Tile] = {}
        self.by_key: dict[TileKey, _Tile] = {}
        self.result: frames.Result | None = None
        self.finished = False
        self.level = ALL_LEVELS  # levels above it are cancelled
        self.counters = Counters()
        self.start_over(ctx, now)

    def start_over(self, ctx: Context, now: float) -> None:
        """The peer knows nothing of it, in this session."""
        self.wants: tuple[Want, ...] = ()
        self.held: dict[int, frames.HeldLayer] = {}  # by the receiver, from another session
        self.windows = [SendWindow() for _ in range(MAX_LEVELS)]
        self.in_flight: dict[Chunk, None] = {}
        self.result_confirmed = False
        self.settled = ALL_LEVELS  # the peer has seen CLOSED down to here
        self.flow.anchors = 0
        self.backoff = Backoff(ctx.config, now)
        self.progress_at = now
        self.spoke_at = now

    @property
    def unconfirmed(self) -> bool:
        """Whether the peer owes an answer to something."""
        if self.state is OutgoingState.OFFERED or self.in_flight or self.settled > self.level:
            return True
        if self.result is not None and not self.result_confirmed:
            return True
        return any(
            not layer.plan_confirmed or (layer.digests is not None and not layer.end_confirmed)
            for layer in self.layers.values()
        )

    @property
    def waiting(self) -> bool:
        """Whether it is the peer's or the link's turn, not the shell's."""
        return self.unconfirmed or any(layer.open for layer in self.layers.values())

    @property
    def confirmed(self) -> bool:
        """Whether the peer has all that it wants, and this side has nothing left to say."""
        return (
            self.finished
            and (self.result is None or self.result_confirmed)
            and all(layer.open == 0 and layer.plan_confirmed and layer.end_confirmed for layer in self.layers.values())
        )


class Sender:
    """All outgoing transfers of a connection."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.transfers: dict[int, Outgoing] = {}
        #: transfer -> its CLOSED frame's body and its counters
        self.tombstones: OrderedDict[int, tuple[frames.Closed, Counters]] = OrderedDict()
        self.windows = [SendWindow() for _ in range(MAX_LEVELS)]
        self._waiting: ChunkQueue[Chunk] = ChunkQueue(ChunkState.WAITING)
        self._encoded: ChunkQueue[Chunk] = ChunkQueue(ChunkState.READY)
        self._encode_share, self._send_share = Share(ctx.config.residual_grace), Share(ctx.config.residual_grace)
        self._urgent: list[Flow] = []
        self._unsaid: deque[tuple[Outgoing, _Layer]] = deque()  # plans
        self._held = [0, 0]  # encoded or promised bytes: anchors, residuals
        self._order = 0
        self.sequence = 0
        self.restarts = 0  # since a transfer was confirmed

    # --- the shell's calls

    def open(
        self, transfer: int, manifest: Manifest, now: float, deadline: float, *, fetch: int | None, resume: bytes
    ) -> None:
        ctx = self.ctx
        if ctx.config.identity is not None and (difference := ctx.config.identity.mismatch(manifest.identity)):
            raise LocalError(f"manifest.identity does not match the configured identity: {difference}")
        if not manifest.codecs:
            raise SpecError("manifest.codecs is empty; fill it in from the policy")
        if len(resume) not in (0, frames.RESUME_KEY_SIZE):
            raise SpecError(f"a resume key has {frames.RESUME_KEY_SIZE} bytes, not {len(resume)}")
        flow = Flow(self._order, deadline)
        outgoing = Outgoing(transfer, manifest, flow, ctx, now, fetch=fetch, resume=resume)
        if not manifest.lossy and not all(codec.exact for codec in outgoing.codecs):
            raise SpecError(
                "a codec of the manifest is not exact: set Manifest.lossy, or use levels up to the exact one"
            )
        if ctx.peer is not None:
            self._check_manifest(outgoing)
        self._order += 1
        self.transfers[transfer] = outgoing
        self._emit(outgoing, self._open_body(outgoing), now)

    def _check_manifest(self, t: Outgoing) -> None:
        """What can be known of the peer's refusal before asking it."""
        assert self.ctx.peer is not None
        limits, m = self.ctx.peer.limits, t.manifest
        unknown = {codec.codec_id for codec in t.codecs} - set(self.ctx.peer.codecs)
        if unknown:
            raise UnknownCodecError(f"the peer cannot decode {', '.join(sorted(unknown))}")
        for what, value, limit in (
            ("layers", len(m.layers), limits.layers),
            ("tokens", m.prompt_tokens, limits.tokens),
            ("bytes of cache", m.nbytes, limits.transfer_bytes),
            ("bytes of manifest", len(m.to_bytes()) + 1024, limits.control_bytes),
            ("open transfers", len(self.transfers) + (t.id not in self.transfers), limits.transfers),
        ):
            if value > limit:
                raise SpecError(f"{value} {what}: the peer's limit is {limit}")

    def plan(self, transfer: int, index: int, tiles: Sequence[Tile], now: float) -> None:
        t = self._get(transfer)
        if t is None:
            return
        if index in t.layers:
            raise LocalError(f"layer {index} of transfer {transfer:032x} is planned already")
        spec = t.manifest.layer(index)
        for tile in tiles:
            if tile.layer != index:
                raise SpecError(f"a tile of layer {tile.layer} in the plan of layer {index}")
            if not 0 <= tile.codec < len(t.codecs):
                raise SpecError(f"tile codec {tile.codec}: the manifest has {len(t.codecs)} codecs")
        keys = [TileKey.of(tile) for tile in tiles]
        layer = _Layer(index, keys, t.codecs)
        lend = self.ctx.lend is not None
        for tile, key in zip(tiles, keys, strict=True):
            layer.tiles.append(_Tile(t, layer, tile, key, t.codecs[tile.codec], lend=lend))
        parts = [PARTS.index(part) for part in spec.parts]
        heads = range(spec.head_start, spec.head_start + spec.kv_heads)
        try:
            frames.check_cover(f"plan of layer {index}", keys, parts, heads, range(spec.token_start, spec.token_stop))
        except ProtocolError as error:
            raise SpecError(str(error)) from error
        if self.ctx.peer is not None:
            self._check_layer(t, layer)
        layer.open = len(layer.tiles)
        t.layers[index] = layer
        for tile_ in layer.tiles:
            t.by_tile[tile_.tile] = t.by_key[tile_.key] = tile_
        if t.state is OutgoingState.SENDING:
            self._start_layer(t, layer, now)

    def _check_layer(self, t: Outgoing, layer: _Layer) -> None:
        """Whether the peer's windows and limits can take the layer."""
        assert self.ctx.peer is not None
        limits, largest = self.ctx.peer.limits, self.ctx.peer.largest_chunk
        for tile in layer.tiles:
            if max(tile.max_sizes) > largest:
                raise SpecError(
                    f"layer {layer.index}: a chunk of {tile.tile.part}, {len(tile.tile.tokens)} tokens may have "
                    f"{max(tile.max_sizes)} bytes, the peer's smallest window or frame {largest}; use smaller tiles"
                )
        tiles = len(t.by_tile) + sum(tile.tile not in t.by_tile for tile in layer.tiles)
        if tiles > limits.tiles:
            raise SpecError(f"{tiles} tiles: the peer's limit is {limits.tiles}; use larger tiles")
        positions = sum(other.positions for other in {*t.layers.values(), layer})
        if positions > limits.positions:
            raise SpecError(f"{positions} explicit token positions: the peer's limit is {limits.positions}; use ranges")
        size = _PLAN_BYTES * len(layer.tiles) + layer.bitmaps + 128  # PLAN at most; more than END
        if size > limits.control_bytes:
            size = max(len(frames.control_frame(layer.plan)), 18 * len(layer.tiles) + 128)
        if size > limits.control_bytes:
            raise SpecError(f"layer {layer.index}: a plan of {size} bytes, the peer's limit is {limits.control_bytes}")
        layer.checked = True

    def next_chunk(self, now: float) -> Chunk | None:
        if not self.ctx.ready:
            return None
        ahead = self.ctx.config.encode_ahead
        if not self._waiting:
            return None

        def fits(chunk: Chunk) -> Fit:
            size = chunk.tile.max_sizes[chunk.level]
            held = self._held[chunk.level > 0]
            if held and held + size > ahead:
                return Fit.NOTHING
            return self._credit(chunk)

        chunk = self._waiting.pick(self._encode_share, self._portion(), now, fits, _max_size, urgent=self._urgent)
        if chunk is None:
            return None
        self._move(chunk, "requested")
        self._hold(chunk, chunk.max_size)
        if not chunk.charged:
            for window in self._windows(chunk):
                window.reserved += chunk.max_size
        return chunk

    def chunk_encoded(
        self, transfer: int, tile: Tile, level: int, payload: bytes | memoryview, now: float, *, crc: int | None
    ) -> None:
        t = self._get(transfer)
        if t is None:
            return
        found = t.by_tile.get(tile)
        if found is None or not 0 <= level < found.levels:
            raise LocalError(f"transfer {transfer:032x} has no level {level} of {tile}")
        chunk = found.chunks[level] if found.chunks else None
        if chunk is None or chunk.state is not ChunkState.ENCODING:
            return  # arrived or was cancelled meanwhile
        view = memoryview(payload).cast("B")
        if not 0 < view.nbytes <= chunk.max_size:
            raise LocalError(f"level {level} of {tile}: {view.nbytes} bytes, the codec promised 1 to {chunk.max_size}")
        if chunk.charged and chunk.charged != view.nbytes:
            raise LocalError(f"level {level} of {tile} was {chunk.charged} bytes, now {view.nbytes}: not deterministic")
        if not chunk.charged:
            for window in self._windows(chunk):
                window.reserved -= chunk.max_size
                window.charged += view.nbytes
            chunk.charged = view.nbytes
        self._hold(chunk, view.nbytes)
        chunk.payload, chunk.crc = view, crc
        t.progress_at = now
        self._move(chunk, "encoded")

    def will_send(self, transfer: int, tile: Tile) -> bool:
        t = self._get(transfer)
        if t is None:
            return False
        chunks = t.by_tile[tile].chunks
        return not chunks or chunks[0].state not in (ChunkState.IDLE, ChunkState.ARRIVED)

    def end_layer(self, transfer: int, index: int, digests: Sequence[bytes], now: float) -> None:
        t = self._get(transfer)
        if t is None:
            return
        layer = t.layers.get(index)
        if layer is None or layer.digests is not None:
            raise LocalError(f"layer {index} of transfer {transfer:032x} is {'ended' if layer else 'not planned'}")
        if len(digests) != len(layer.tiles) or any(len(digest) not in (0, DIGEST_SIZE) for digest in digests):
            raise SpecError(f"layer {index}: need {len(layer.tiles)} digests of {DIGEST_SIZE} bytes (or b'')")
        if not t.manifest.lossy and not all(digests):
            raise SpecError(f"layer {index}: an exact transfer needs a digest of every tile")
        layer.digests = tuple(digests)
        t.progress_at = now
        if layer.said:
            self._emit(t, frames.End(layer=index, digests=layer.digests), now)
        for tile in layer.tiles:
            self._judge(tile)

    def result(self, transfer: int, first_token: int, logit_gap: float | None, now: float) -> None:
        t = self._get(transfer)
        if t is None:
            return
        if t.result is not None:
            raise LocalError(f"transfer {transfer:032x} has its result already")
        if not 0 <= first_token <= 0xFFFFFFFF:
            raise SpecError(f"first_token {first_token} does not fit 32 bits")
        t.result = frames.Result(first_token=first_token, logit_gap=None if logit_gap is None else float(logit_gap))
        if t.state is OutgoingState.SENDING:
            self._emit(t, t.result, now)

    def finish(self, transfer: int, now: float) -> None:
        t = self._get(transfer)
        if t is None:
            return
        for spec in t.manifest.layers:
            layer = t.layers.get(spec.index)
            if layer is None or layer.digests is None:
                raise LocalError(f"finish: layer {spec.index} is not {'planned' if layer is None else 'ended'}")
        t.finished = True
        self._check_confirmed(t)

    def cancel(self, t: Outgoing, now: float, above: int | None, code: ErrorCode, text: str, *, by_peer: bool) -> None:
        """Cancel, asked by either side."""
        if above is None or above < 0:
            self.ctx.events.append(Cancelled(transfer=t.id, by_peer=by_peer, code=code, text=text))
            self._close(t, code, text)
        elif above < t.level:
            t.level = above
            for layer in t.layers.values():
                for tile in layer.tiles:
                    self._trim(tile)
            self.ctx.events.append(LevelsCancelled(transfer=t.id, level=above))
            if t.state is OutgoingState.SENDING:
                self._emit(t, self._closed_body(t, ErrorCode.CANCELLED, text, end=False), now)
            self._check_confirmed(t)

    # --- frames from the receiver

    def on_accept(self, t: Outgoing, body: frames.Accept, now: float) -> None:
        for window, limit in zip(t.windows, body.credit, strict=True):
            window.raise_limit(limit)
        if t.state is OutgoingState.OFFERED:
            t.state = advance(OUTGOING, t.state, "accept")
            t.wants = body.wants
            t.held = {held.layer: held for held in body.held}
            self.ctx.events.append(TransferAccepted(transfer=t.id, wants=body.wants))
            try:
                self._check_manifest(t)
                for layer in t.layers.values():
                    if not layer.checked:
                        self._check_layer(t, layer)
            except LynxError as error:
                self.fail(t, LimitError(str(error)))
                return
            for layer in t.layers.values():
                self._start_layer(t, layer, now)
            if t.result is not None:
                self._emit(t, t.result, now)
            if t.settled > t.level:
                self._emit(t, self._closed_body(t, ErrorCode.CANCELLED, "", end=False), now)
            t.progress_at = now
            t.backoff.reset(now)
        self.on_status(t, body, now)

    def on_reject(self, t: Outgoing, body: frames.Reject) -> None:
        if t.state is OutgoingState.OFFERED:
            self.ctx.events.append(TransferRejected(transfer=t.id, code=body.code, text=body.text))
            t.state = advance(OUTGOING, t.state, "reject")
            self._bury(t, self._closed_body(t, body.code, body.text, end=True), complete=False, emit=False)

    def on_error(self, t: Outgoing, body: frames.Error) -> None:
        error = PeerError(f"transfer {t.id:032x} failed at the receiver: {body.text}", body.code)
        self.fail(t, error)

    def on_status(self, t: Outgoing, body: frames.Status, now: float) -> None:
        if t.state is OutgoingState.OFFERED:
            return  # a late frame; ACCEPT says the same
        moved = False
        for status in body.layers:
            layer = t.layers.get(status.layer)
            if layer is None or len(status.packed) != frames.TILE_STATUS_SIZE * len(layer.tiles) * status.planned:
                raise ProtocolError(f"status of layer {status.layer} does not match its plan")
            if status == layer.status:
                continue
            moved = True
            places = status.changed(layer.status.packed if layer.status else b"")
            layer.status = status
            layer.plan_confirmed |= status.planned
            layer.end_confirmed |= status.ended
            for place in places:
                self._tile_status(layer.tiles[place], status.tile(place))
        if body.result and t.result is not None and not t.result_confirmed:
            t.result_confirmed = moved = True
        if body.settled < t.settled:
            t.settled = body.settled
            moved = True
        if body.urgent:
            self.on_urgent(t)
        if body.level < t.level:
            self.cancel(t, now, body.level, ErrorCode.CANCELLED, "", by_peer=True)
        if moved:
            t.progress_at = now
            t.backoff.reset(now)
        self._check_confirmed(t)

    def on_resume(self, t: Outgoing, body: frames.Resume, now: float) -> None:
        self.on_status(t, body, now)
        if t.state is not OutgoingState.SENDING:
            return
        lost = [chunk for chunk in t.in_flight if not self.ctx.stripe_alive(chunk.stripe)]
        for chunk in lost:
            self._resend(t, chunk)
        self.ctx.events.append(ChunksResumed(transfer=t.id, missing=len(lost)))

    def on_urgent(self, t: Outgoing) -> None:
        if not t.flow.urgent:
            t.flow.urgent = True
            self._urgent.append(t.flow)
            self.ctx.events.append(UrgentReceived(transfer=t.id))

    def on_nack(self, t: Outgoing, body: frames.Nack) -> None:
        for item in body.items:
            tile = t.by_key.get(item.key)
            if tile is None or item.level >= tile.levels:
                raise ProtocolError(f"NACK of a chunk that is not in the plan of layer {item.key.layer}")
            if item.attempt > tile.attempt:
                self._restart(tile)
            elif item.attempt == tile.attempt and tile.chunks:
                chunk = tile.chunks[item.level]
                if item.times > chunk.nacks and chunk.state is ChunkState.SENT:
                    chunk.nacks = item.times
                    self._resend(t, chunk)

    def on_credit(self, transfer: int, limits: Sequence[int], now: float) -> None:
        windows = self.windows
        if transfer:
            t = self.transfers.get(transfer)
            if t is None:
                return
            windows = t.windows
        grown = [window.raise_limit(limit) for window, limit in zip(windows, limits, strict=True)]
        if transfer and any(grown):
            self.transfers[transfer].progress_at = now

    def on_probe_answered(self, stripe: int, sequence: int) -> None:
        """All that was written to ``stripe`` up to ``sequence`` has arrived, or is lost."""
        for t in self.transfers.values():
            for chunk in list(t.in_flight):
                gone = chunk.stripe == stripe or not self.ctx.stripe_alive(chunk.stripe)
                if gone and chunk.sequence <= sequence:
                    self._resend(t, chunk)

    # --- writing

    @property
    def waits(self) -> bool:
        """Whether chunks wait for a stripe, or for credit."""
        return bool(self._encoded)

    @property
    def anchors_wait(self) -> bool:
        """The same, of anchors."""
        return self._encoded.anchors

    @property
    def plans_wait(self) -> bool:
        """Whether :meth:`say_plan` may have something to say."""
        return bool(self._unsaid)

    def say_plan(self) -> None:
        """Queue the next plan. One goes with each chunk, or while there is none: all of them first would keep chunks
        waiting for as long as both sides write and read them.
        """
        while self._unsaid:
            t, layer = self._unsaid.popleft()
            if t.state is OutgoingState.SENDING and not layer.said:
                self._say(t, layer, self.ctx.now)
                return

    def next_frame(self, *, anchors_only: bool = False) -> Chunk | None:
        """The encoded chunk to write next, behind the plans that this queues: its layer's, and one more."""
        if not self._encoded:
            return None
        chunk = self._encoded.pick(
            self._send_share,
            self._portion(),
            self.ctx.now,
            self._credit,
            _size,
            urgent=self._urgent,
            anchors_only=anchors_only,
        )
        if chunk is not None:
            if chunk.payload is None:
                self._borrow(chunk)
            self._move(chunk, "started")
            chunk.begun = True
            chunk.attempt = chunk.tile.attempt
            if self._unsaid:
                self._say(chunk.tile.transfer, chunk.tile.layer, self.ctx.now)
                self.say_plan()
        return chunk

    def _credit(self, chunk: Chunk) -> Fit:
        """Whether there is credit for a chunk, or it has been charged already."""
        if chunk.charged:
            return Fit.YES
        size = chunk.max_size
        if not self.windows[chunk.level].fits(size):
            return Fit.NOTHING
        return Fit.YES if chunk.tile.transfer.windows[chunk.level].fits(size) else Fit.NOT_THIS_TRANSFER

    def _borrow(self, chunk: Chunk) -> None:
        """The payload of a chunk that is its tile's words."""
        tile = chunk.tile
        assert self.ctx.lend is not None
        view = self.ctx.lend(tile.transfer.id, tile.tile)
        if view.nbytes != chunk.max_size:
            raise LocalError(f"{tile.tile} has {chunk.max_size} bytes, lend() gave {view.nbytes}")
        if not chunk.charged:
            chunk.charged = view.nbytes
            for window in self._windows(chunk):
                window.charged += view.nbytes
        chunk.payload = view

    def frame(self, chunk: Chunk) -> list[memoryview]:
        """The bytes of a chunk's frame."""
        assert chunk.payload is not None
        tile = chunk.tile
        if tile.verbatim and chunk.crc is None:
            chunk.crc, digest = checksums(chunk.payload)
            if not tile.digested:
                tile.digested = True
                self.ctx.events.append(TileDigested(transfer=tile.transfer.id, tile=tile.tile, digest=digest))
        return frames.data_frame(
            tile.transfer.id,
            tile.key,
            chunk.level,
            chunk.payload,
            attempt=chunk.attempt,
            codec_id=tile.codec_id,
            crc=chunk.crc,
        )

    def written(self, chunk: Chunk, stripe: int, nbytes: int, now: float) -> None:
        """The frame was handed out whole: its payload is no longer held here."""
        t = chunk.tile.transfer
        for counters in (self.ctx.counters, t.counters):
            counters.sent_frames[chunk.level] += 1
            counters.sent_bytes[chunk.level] += nbytes
        self._move(chunk, "written")
        self._drop_payload(chunk)
        if t.state is not OutgoingState.SENDING:
            return
        self.sequence += 1
        chunk.stripe, chunk.sequence = stripe, self.sequence
        t.in_flight[chunk] = None
        t.progress_at = t.spoke_at = now
        if not t.backoff.at > now:
            t.backoff.reset(now)
        if chunk.level >= chunk.tile.want:
            self._leave(chunk, "unwanted")
        elif chunk.attempt != chunk.tile.attempt:
            self._leave(chunk, "restarted")
        elif chunk.tile.received >> chunk.level & 1:
            self._leave(chunk, "arrived")

    def cut_off(self, chunk: Chunk) -> None:
        """The stripe was lost in the middle of the frame."""
        t = chunk.tile.transfer
        self._move(chunk, "cut off")
        if t.state is not OutgoingState.SENDING or chunk.level >= chunk.tile.want:
            self._leave(chunk, "unwanted")
            if t.state is not OutgoingState.SENDING:
                self._encoded.forget(t.flow)
        elif chunk.attempt != chunk.tile.attempt:
            self._leave(chunk, "restarted")
        elif chunk.tile.received >> chunk.level & 1:
            self._leave(chunk, "arrived")

    # --- time, stripes, the end

    def resync(self, now: float) -> None:
        """A stripe was lost or came back: say again all that was not confirmed."""
        for t in list(self.transfers.values()):
            self._repeat(t, now)
            t.backoff.reset(now)

    def timer(self) -> float | None:
        """When :meth:`handle_timer` has something to do."""
        times = []
        keepalive = self._keepalive()
        for t in self.transfers.values():
            times.append(t.spoke_at + keepalive)
            if t.waiting:
                times.append(t.progress_at + self.ctx.config.lease)
            if t.unconfirmed and self.ctx.ready:
                times.append(t.backoff.at)
        return min(times, default=None)

    def _keepalive(self) -> float:
        peer = self.ctx.peer
        return min(self.ctx.config.lease, peer.lease if peer else self.ctx.config.lease) / 4

    def handle_timer(self, now: float) -> bool:
        """Resend, keep alive, expire. True if chunks may be lost and the stripes should be probed."""
        probe = False
        keepalive = self._keepalive()
        for t in list(self.transfers.values()):
            if t.waiting and now >= t.progress_at + self.ctx.config.lease:
                self.fail(t, DeadlineError(f"transfer {t.id:032x}: no progress for {self.ctx.config.lease:g} s"))
                continue
            if t.unconfirmed and self.ctx.ready and now >= t.backoff.at:
                self._repeat(t, now)
                probe |= bool(t.in_flight)
                t.backoff.tried(now)
            if now >= t.spoke_at + keepalive:
                self._emit(t, self._open_body(t), now)
                t.spoke_at = now
        return probe

    def _repeat(self, t: Outgoing, now: float) -> None:
        if t.state is OutgoingState.OFFERED:
            self._emit(t, self._open_body(t), now)
            return
        for layer in t.layers.values():
            if not layer.plan_confirmed:
                self._emit(t, layer.plan, now)
            if layer.digests is not None and not layer.end_confirmed:
                self._emit(t, frames.End(layer=layer.index, digests=layer.digests), now)
            layer.said = True
        if t.result is not None and not t.result_confirmed:
            self._emit(t, t.result, now)
        if t.settled > t.level:
            self._emit(t, self._closed_body(t, ErrorCode.CANCELLED, "", end=False), now)

    def tombstone(self, transfer: int) -> frames.Closed | None:
        """The last word on a transfer that is over."""
        entry = self.tombstones.get(transfer)
        return entry[0] if entry else None

    def fail(self, t: Outgoing, error: RemoteError) -> None:
        """End a transfer with an error, on this side and on the other."""
        self.ctx.events.append(TransferFailed(transfer=t.id, error=error))
        self._close(t, error.code, str(error))

    def start_over(self, now: float) -> None:
        """The peer has forgotten the session: a new one begins, in which every transfer is offered again."""
        self.restarts += 1
        self.windows = [SendWindow() for _ in range(MAX_LEVELS)]
        self._unsaid.clear()
        for t in self.transfers.values():
            self._waiting.forget(t.flow)
            self._encoded.forget(t.flow)
            for layer in t.layers.values():
                for tile in layer.tiles:
                    for chunk in tile.chunks:
                        self._drop_payload(chunk)
                layer.start_over()
            if t.state is OutgoingState.SENDING:
                t.state = advance(OUTGOING, t.state, "forgotten")
            t.start_over(self.ctx, now)

    def abandon(self, error: RemoteError | None) -> None:
        """The session is over: release everything."""
        for t in list(self.transfers.values()):
            if error is not None:
                self.ctx.events.append(TransferFailed(transfer=t.id, error=error))
            else:
                text = "the session was closed"
                self.ctx.events.append(Cancelled(transfer=t.id, by_peer=False, code=ErrorCode.SHUTDOWN, text=text))
            self._close(t, ErrorCode.SHUTDOWN, "")

    # --- inside

    def _get(self, transfer: int) -> Outgoing | None:
        t = self.transfers.get(transfer)
        if t is None and transfer not in self.tombstones:
            raise LocalError(f"no outgoing transfer {transfer:032x}")
        return t

    def _emit(self, t: Outgoing, body: frames.Body, now: float) -> None:
        t.spoke_at = now
        self.ctx.emit(body, t.id)

    @staticmethod
    def _open_body(t: Outgoing) -> frames.Open:
        return frames.Open(manifest=t.manifest.to_bytes(), fetch=t.fetch, resume=t.resume)

    @staticmethod
    def _closed_body(t: Outgoing, code: ErrorCode, text: str, *, end: bool) -> frames.Closed:
        final = tuple(window.charged for window in t.windows)
        return frames.Closed(level=t.level, end=end, final=final, code=code, text=text)

    def _portion(self) -> float:
        config = self.ctx.config
        urgent = any(not flow.anchors for flow in self._urgent)
        return config.urgent_share if urgent else config.residual_floor

    def _windows(self, chunk: Chunk) -> tuple[SendWindow, SendWindow]:
        return self.windows[chunk.level], chunk.tile.transfer.windows[chunk.level]

    def _start_layer(self, t: Outgoing, layer: _Layer, now: float) -> None:
        """The receiver's wants are known: queue the chunks that it lacks; the plan is said before the first of them."""
        held = t.held.get(layer.index)
        if held is None or held.plan != layer.plan.digest() or len(held.levels) != len(layer.tiles):
            held = None  # cut otherwise than in the session that it is from: all is sent
        for tile in layer.tiles:
            tile.want = min(wanted_levels(t.wants, tile.tile, tile.levels), t.level + 1)
            tile.chunks = [Chunk(tile, level, t.flow, (layer.index, tile.place)) for level in range(tile.levels)]
            there = min(held.levels[tile.place], tile.want) if held is not None else 0
            tile.received = (1 << there) - 1
            for chunk in tile.chunks[: tile.want]:
                self._move(chunk, "held" if chunk.level < there else "wanted")
            self._judge(tile)
        if any(tile.received + 1 < 1 << tile.want for tile in layer.tiles):
            self._unsaid.append((t, layer))
        else:
            self._say(t, layer, now)
        t.progress_at = now
        self._check_confirmed(t)

    def _say(self, t: Outgoing, layer: _Layer, now: float) -> None:
        """Send PLAN, and END if the digests are known, unless that was done before."""
        if not layer.said:
            layer.said = True
            self._emit(t, layer.plan, now)
            if layer.digests is not None:
                self._emit(t, frames.End(layer=layer.index, digests=layer.digests), now)

    def _move(self, chunk: Chunk, signal: str) -> None:
        before, after = chunk.state, advance(CHUNK, chunk.state, signal)
        if after is ChunkState.WAITING and chunk.tile.lent:
            after = advance(CHUNK, after, "lent")
        chunk.state = after
        if chunk.level == 0 and (before in _UNSENT) is not (after in _UNSENT):
            flow = chunk.flow
            flow.anchors += 1 if after in _UNSENT else -1
            if not flow.anchors:
                self._waiting.anchors_gone(flow)
                self._encoded.anchors_gone(flow)
        if after is ChunkState.WAITING:
            self._waiting.push(chunk)
        elif after is ChunkState.READY:
            self._encoded.push(chunk)

    def _hold(self, chunk: Chunk, nbytes: int) -> None:
        if nbytes != chunk.held:
            self._held[chunk.level > 0] += nbytes - chunk.held
            chunk.held = nbytes

    def _drop_payload(self, chunk: Chunk) -> None:
        chunk.payload = None
        self._hold(chunk, 0)

    def _leave(self, chunk: Chunk, signal: str) -> None:
        """Take the chunk out of whatever it is in (encoding, encoded, in flight), then move it."""
        if chunk.state is ChunkState.ENCODING and not chunk.charged:
            for window in self._windows(chunk):
                window.reserved -= chunk.max_size
        self._drop_payload(chunk)
        chunk.tile.transfer.in_flight.pop(chunk, None)
        if signal == "restarted":
            if not chunk.begun:  # the peer will never hear of this charge
                for window in self._windows(chunk):
                    window.charged -= chunk.charged
            chunk.charged = 0
            chunk.begun = False
        self._move(chunk, signal)

    def _resend(self, t: Outgoing, chunk: Chunk) -> None:
        self.ctx.counters.resends += 1
        t.counters.resends += 1
        self._leave(chunk, "lost")

    def _tile_status(self, tile: _Tile, has: frames.TileStatus) -> None:
        if has.attempt > tile.attempt:
            self._restart(tile)
        if has.attempt < tile.attempt or not tile.chunks:
            return
        fresh = (has.received | has.applied) & ~tile.received
        if fresh >> tile.levels or has.applied & ~has.received:
            raise ProtocolError(f"status of layer {tile.key.layer}: levels {has.received:#x}, {has.applied:#x}")
        tile.received |= fresh
        tile.applied |= has.applied
        tile.verified |= has.verified
        for chunk in tile.chunks[: tile.want]:
            if fresh >> chunk.level & 1:
                if not chunk.charged:
                    raise ProtocolError(f"status of layer {tile.key.layer}: a chunk that was never sent is reported")
                if chunk.state is not ChunkState.SENDING:
                    self._leave(chunk, "arrived")
        self._judge(tile)

    def _restart(self, tile: _Tile) -> None:
        """The tile failed at the receiver: send it again whole."""
        tile.attempt = 1
        tile.received = tile.applied = 0
        tile.verified = False
        for chunk in tile.chunks[: tile.want]:
            if chunk.state in (ChunkState.READY, ChunkState.SENT, ChunkState.ARRIVED):
                if chunk.state is not ChunkState.READY:
                    self.ctx.counters.resends += 1
                    tile.transfer.counters.resends += 1
                self._leave(chunk, "restarted")
            elif chunk.state in (ChunkState.WAITING, ChunkState.ENCODING) and chunk.charged:
                if chunk.state is ChunkState.ENCODING:
                    for window in self._windows(chunk):  # it will be charged again, as part of the new attempt
                        window.reserved += chunk.max_size
                chunk.charged = 0
                chunk.begun = False
        self._judge(tile)

    def _trim(self, tile: _Tile) -> None:
        """Levels above the transfer's were cancelled."""
        for chunk in tile.chunks[tile.transfer.level + 1 : tile.want]:
            if chunk.state is not ChunkState.SENDING:
                self._leave(chunk, "unwanted")
        tile.want = min(tile.want, tile.transfer.level + 1)
        self._judge(tile)

    def _judge(self, tile: _Tile) -> None:
        """Is the tile done? All wanted levels applied, and the digest verified where there is one."""
        digests = tile.layer.digests
        whole = (1 << tile.want) - 1
        done = bool(tile.chunks) and digests is not None and tile.applied & whole == whole
        if done and digests is not None and tile.levels == tile.want:
            done = tile.verified or not digests[tile.place]
        tile.layer.open -= done - tile.done
        tile.done = done

    def _check_confirmed(self, t: Outgoing) -> None:
        if t.state is OutgoingState.SENDING and t.confirmed:
            t.state = advance(OUTGOING, t.state, "confirmed")
            self.restarts = 0
            self._bury(t, self._closed_body(t, ErrorCode.NO_ERROR, "", end=True), complete=True)

    def _close(self, t: Outgoing, code: ErrorCode, text: str) -> None:
        if t.state is not OutgoingState.CLOSED:
            t.state = advance(OUTGOING, t.state, "end")
            self._bury(t, self._closed_body(t, code, text, end=True), complete=False)

    def _bury(self, t: Outgoing, last_word: frames.Closed, *, complete: bool, emit: bool = True) -> None:
        """Forget all but a tombstone."""
        for layer in t.layers.values():
            for tile in layer.tiles:
                for chunk in tile.chunks:
                    if chunk.state is ChunkState.ENCODING and not chunk.charged:
                        for window in self._windows(chunk):
                            window.reserved -= chunk.max_size
                    if chunk.state is not ChunkState.SENDING:
                        self._drop_payload(chunk)
                    else:
                        self.ctx.take_over(chunk)
        self._waiting.forget(t.flow)
        self._encoded.forget(t.flow)
        if t.flow.urgent:
            self._urgent.remove(t.flow)
        del self.transfers[t.id]
        self.tombstones[t.id] = (replace(last_word, text=last_word.text[:256]), t.counters)
        while len(self.tombstones) > self.ctx.config.tombstones:
            self.tombstones.popitem(last=False)
        if emit:
            self.ctx.emit(last_word, t.id)
        self.ctx.events.append(TransferReleased(transfer=t.id, complete=complete))
