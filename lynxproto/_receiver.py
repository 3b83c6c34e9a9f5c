"""The receiving half of a connection: incoming transfers, what of them has arrived, and the credit they give.

A chunk goes to the shell only when its layer's plan is known and all lower levels of its tile went before, so that
a shell sees an order whatever the stripes did. What waits meanwhile is bounded by credit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Final

import numpy as np

from lynxproto import _cbor, frames
from lynxproto._context import ALL_LEVELS, Backoff, Context, Sizes, build_codec
from lynxproto._stripe import Target
from lynxproto.chunk import PARTS, Tile
from lynxproto.codecs.abc import Codec
from lynxproto.config import MAX_LEVELS
from lynxproto.counters import Counters
from lynxproto.digest import checksums
from lynxproto.errors import (
    DeadlineError,
    DigestError,
    ErrorCode,
    LocalError,
    LynxError,
    PeerError,
    ProtocolError,
    RemoteError,
)
from lynxproto.events import (
    Cancelled,
    ChunkReceived,
    LayerEnded,
    LevelsCancelled,
    PlanReceived,
    ResultReceived,
    TransferComplete,
    TransferFailed,
    TransferOffered,
    TransferRefused,
    TransferReleased,
)
from lynxproto.frames import LayerStatus, TileKey, TileStatus
from lynxproto.manifest import Manifest, Want, check_wants, wanted_levels
from lynxproto.state import INCOMING, IncomingState, advance
from lynxproto.windows import ReceiveWindow

__all__ = ["Arrival", "Incoming", "Receiver"]

_SENT_THOUGH_HELD: Final = "a chunk that this side said it holds from another session"
#: Tiles of layers whose plan has not arrived; chunks of more are dropped (and sent again when the sender asks).
_MAX_EARLY = 1024


class _Tile:
    """``levels`` is 0 while the plan is unknown. Masks are of levels, in the current attempt unless they say else."""

    __slots__ = (
        "applied", "attempt", "before", "charged", "charged_before", "corrupt", "delivered", "done", "held", "key",
        "levels", "max_sizes", "place", "received", "receiving", "sizes", "tile", "verified", "want",
    )  # fmt: skip

    def __init__(self, key: TileKey) -> None:
        self.key = key
        self.tile: Tile | None = None
        self.place = -1
        self.levels = 0
        self.want = MAX_LEVELS
        self.max_sizes: tuple[int, ...] = ()
        self.attempt = 0
        self.before = 0  # levels that the shell holds from another session: they cost no credit and never come
        self.charged = 0
        self.charged_before = 0  # in attempt 0, once attempt 1 has begun
        self.receiving = 0
        self.received = 0
        self.applied = 0
        self.delivered = 0  # levels below this went to the shell
        self.verified = False
        self.done = False
        self.sizes = [0] * MAX_LEVELS
        self.corrupt: dict[int, int] = {}
        self.held: dict[int, Arrival] = {}


class _Layer:
    """``open`` counts the tiles that are not done."""

    __slots__ = ("_stale", "by_key", "digests", "index", "open", "packed", "plan", "tiles")

    def __init__(self, index: int) -> None:
        self.index = index
        self.plan: frames.Plan | None = None
        self.tiles: list[_Tile] = []
        self.by_key: dict[TileKey, _Tile] = {}
        self.digests: tuple[bytes, ...] | None = None
        self.open = 0
        self.packed = bytearray()  # the status of its tiles, but for
        self._stale: set[_Tile] = set()

    @property
    def status(self) -> LayerStatus:
        for has in self._stale:
            at = frames.TILE_STATUS_SIZE * has.place
            status = TileStatus(has.received, has.applied, has.attempt, has.verified)
            self.packed[at : at + frames.TILE_STATUS_SIZE] = status.pack()
        self._stale.clear()
        return LayerStatus(self.index, self.plan is not None, self.digests is not None, bytes(self.packed))

    def note(self, has: _Tile) -> None:
        """The tile changed, and so has its part of the status."""
        if has.place >= 0:
            self._stale.add(has)


class Incoming:
    """One transfer at its receiver."""

    def __init__(self, transfer: int, manifest: Manifest, codecs: list[Codec], ctx: Context, now: float) -> None:
        self.id = transfer
        self.manifest = manifest
        self.codecs = codecs
        self.sizes = Sizes(codecs, manifest)
        self.state = IncomingState.OFFERED
        self.wants: tuple[Want, ...] = ()
        self.held: dict[int, frames.HeldLayer] = {}  # from another session
        self.layers = {spec.index: _Layer(spec.index) for spec in manifest.layers}
        self.by_tile: dict[Tile, tuple[_Layer, _Tile]] = {}
        self.windows = [ReceiveWindow(ctx.config.limits.transfer_window) for _ in range(MAX_LEVELS)]
        self.result: frames.Result | None = None
        self.level = ALL_LEVELS  # levels above it are not wanted any more
        self.settled = ALL_LEVELS  # CLOSED was seen down to here
        self.urgent = False
        self.asked = False  # OPEN came again: ACCEPT is due
        self.last_word: frames.Body | None = None  # said again until CLOSED comes
        self.early = 0
        self.positions = 0
        self.changed: set[int] = set()
        self.counters = Counters()
        self.backoff = Backoff(ctx.config, now)
        self.heard_at = now

    @property
    def live(self) -> bool:
        """Whether the shell still has to do with it."""
        return self.state in (IncomingState.OFFERED, IncomingState.RECEIVING, IncomingState.COMPLETE)


class Arrival(Target):
    """A chunk whose header was accepted: where its payload goes; ``landing`` if that is the final place."""

    __slots__ = ("attempt", "header", "landing", "layer", "tile", "transfer")

    def __init__(
        self, transfer: Incoming, layer: _Layer, tile: _Tile, header: frames.Header, landing: memoryview | None
    ) -> None:
        # Not a bytearray, which is filled with zeros first.
        super().__init__(np.empty(header.payload_length, np.uint8).data if landing is None else landing)
        self.transfer = transfer
        self.layer = layer
        self.tile = tile
        self.header = header
        self.attempt = tile.attempt
        self.landing = landing is not None

    @property
    def wanted(self) -> bool:
        t, tile = self.transfer, self.tile
        return t.state is IncomingState.RECEIVING and self.attempt == tile.attempt and self.header.level < tile.want

    def landed(self) -> bytes | None:
        """The digest of the words, if they are in their final place."""
        if not self.landing:
            return None
        return checksums(self.view)[1] if self.sums is None else self.sums.digest()


class Receiver:
    """All incoming transfers of a connection."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.transfers: dict[int, Incoming] = {}
        #: transfer -> what to answer to its late frames (REJECT), or None; and its counters
        self.tombstones: OrderedDict[int, tuple[frames.Reject | None, Counters]] = OrderedDict()
        self.windows = [ReceiveWindow(ctx.config.limits.session_window) for _ in range(MAX_LEVELS)]
        self._dirty: dict[int, Incoming] = {}  # what of these changed is not confirmed yet
        self._flush_at: float | None = None  # when what is dirty is to be confirmed
        self._short = False  # the peer may soon be short of credit

    # --- the shell's calls

    def accept(self, transfer: int, now: float, wants: Sequence[Want] | None, held: Sequence[frames.HeldLayer]) -> None:
        t = self._get(transfer)
        if t is None or not t.live:
            return
        wanted = (Want(),) if wants is None else tuple(wants)
        check_wants(wanted)
        assert self.ctx.peer is not None
        room = self.ctx.peer.limits.control_bytes - 1024 - sum(len(_cbor.dumps(want.as_list())) for want in wanted)
        for layer in held:
            room -= len(layer.levels) + 32
            if room > 0 and any(layer.levels):  # what does not fit is sent again
                t.held[layer.layer] = layer
        t.state = advance(INCOMING, t.state, "accept")
        t.wants = wanted
        t.heard_at = now
        t.backoff.reset(now)
        self._emit_accept(t)

    def reject(self, transfer: int, code: ErrorCode, text: str, now: float) -> None:
        t = self._get(transfer)
        if t is None or not t.live:
            return
        t.state = advance(INCOMING, t.state, "reject")
        self._bury(t, frames.Reject(code=code, text=text))
        self.ctx.events.append(TransferReleased(transfer=transfer, complete=False))

    def applied(self, transfer: int, tile: Tile, level: int, now: float) -> None:
        found = self._tile(transfer, tile)
        if found is None:
            return
        t, layer, has = found
        if level >= has.delivered:
            if has.attempt:
                return  # of the attempt that failed
            raise LocalError(f"level {level} of {tile} was not received")
        if has.applied >> level & 1:
            return
        has.applied |= 1 << level
        self._release(t, level, has.sizes[level])
        self._judge(t, layer, has)
        self._touch(t, layer, has, pressing=False)

    def tile_verified(self, transfer: int, tile: Tile, now: float) -> None:
        found = self._tile(transfer, tile)
        if found is None:
            return
        t, layer, has = found
        if has.applied != (1 << has.levels) - 1:
            if has.attempt:
                return
            raise LocalError(f"{tile} was verified before all its levels were applied")
        has.verified = True
        self._judge(t, layer, has)
        self._touch(t, layer, has, pressing=False)

    def tile_failed(self, transfer: int, tile: Tile, now: float, code: ErrorCode, text: str) -> None:
        found = self._tile(transfer, tile)
        if found is None:
            return
        t, layer, has = found
        where = f"layer {tile.layer} {tile.part} tokens [{tile.tokens.start}, {tile.tokens.stop})"
        if has.attempt:
            text = text or "words differ from the sender's"
            message = f"{where}: {text}, even after it was sent again whole"
            self.fail(t, DigestError(message) if code is ErrorCode.DIGEST else ProtocolError(message, code))
            return
        for level in range(max(has.want, has.delivered)):  # what is above was given back when it was cut
            if has.charged >> level & 1 and not has.applied >> level & 1:
                self._release(t, level, has.sizes[level])
        has.charged_before, has.charged = has.charged, 0
        has.attempt = 1
        has.receiving = has.received = has.applied = has.delivered = has.before = 0
        has.verified = False
        has.held.clear()
        has.corrupt.clear()
        stale = [e for e in self.ctx.events if isinstance(e, ChunkReceived) and (e.transfer, e.tile) == (t.id, tile)]
        for event in stale:
            self.ctx.events.remove(event)
        self._judge(t, layer, has)
        self.ctx.emit(frames.Nack(items=(frames.NackItem(has.key, 0, 1, 1),)), t.id)
        self._touch(t, layer, has)

    def urgent(self, transfer: int, now: float) -> None:
        t = self._get(transfer)
        if t is not None and t.state is IncomingState.RECEIVING and not t.urgent:
            t.urgent = True
            self.ctx.emit(frames.Urgent(), t.id)

    def cancel(self, t: Incoming, now: float, above: int | None, code: ErrorCode, text: str) -> None:
        if above is None or above < 0:
            if t.state is IncomingState.OFFERED:
                self.reject(t.id, code, text, now)
            elif t.state is IncomingState.RECEIVING:
                self.ctx.events.append(Cancelled(transfer=t.id, by_peer=False, code=code, text=text))
                self._give_up(t, frames.Cancel(above=-1, code=code, text=text))
        elif t.state is IncomingState.RECEIVING and above < t.level:
            self._cut(t, above)
            self.ctx.emit(frames.Cancel(above=above, code=code, text=text), t.id)

    # --- frames from the sender

    def on_open(self, transfer: int, body: frames.Open, now: float) -> None:
        if transfer in self.tombstones:
            reply = self.tombstones[transfer][0]
            if reply is not None:
                self.ctx.reply(reply, transfer)
            return
        t = self.transfers.get(transfer)
        if t is not None:
            t.heard_at = now
            if t.state is IncomingState.RECEIVING:
                t.asked = True
                self._soil(t, pressing=True)
            return
        config = self.ctx.config
        try:
            if len(self.transfers) >= config.limits.transfers:
                raise ProtocolError(f"{config.limits.transfers} transfers are open already", ErrorCode.LIMIT)
            manifest = Manifest.from_bytes(body.manifest, config.limits)
            codecs = self._check_manifest(manifest)
        except ProtocolError as error:
            self._tombstone(transfer, frames.Reject(code=error.code, text=str(error)), Counters())
            self.ctx.events.append(TransferRefused(transfer=transfer, error=error))
            return
        self.transfers[transfer] = Incoming(transfer, manifest, codecs, self.ctx, now)
        self.ctx.events.append(
            TransferOffered(transfer=transfer, manifest=manifest, fetch=body.fetch, resume=body.resume)
        )

    def _check_manifest(self, manifest: Manifest) -> list[Codec]:
        config = self.ctx.config
        if config.identity is not None and (difference := config.identity.mismatch(manifest.identity)):
            raise ProtocolError(f"the cache's {difference}", ErrorCode.IDENTITY)
        missing = set(manifest.tables) - config.tables
        if missing:
            raise ProtocolError(f"codec table {min(missing).hex()} is not known here", ErrorCode.MISSING_TABLE)
        codecs = []
        for item in manifest.codecs:
            if item["id"] not in config.codecs:
                raise ProtocolError(f"codec {item['id']!r} is not supported here", ErrorCode.UNSUPPORTED)
            try:
                codecs.append(build_codec(item))
            except (LynxError, ValueError, TypeError) as error:
                raise ProtocolError(f"codec config {item!r}: {error}", ErrorCode.UNSUPPORTED) from error
        if not codecs:
            raise ProtocolError("the manifest names no codec")
        if not manifest.lossy and not all(codec.exact for codec in codecs):
            raise ProtocolError("the manifest claims to be exact, one of its codecs is not")
        return codecs

    def on_plan(self, t: Incoming, body: frames.Plan, now: float) -> None:
        layer = self._layer(t, body.layer)
        if layer.plan is not None:
            if layer.plan != body:
                raise ProtocolError(f"a second, different plan of layer {layer.index}", ErrorCode.STATE)
            self._touch(t, layer)
            return
        what = f"PLAN of layer {layer.index}"
        spec = t.manifest.layer(layer.index)
        parts = [PARTS.index(part) for part in spec.parts]
        heads = range(spec.head_start, spec.head_start + spec.kv_heads)
        limits = self.ctx.config.limits  # first what is cheap to count: the cover takes work for each position
        t.positions += sum(key.positions for key in body.tiles)
        room = self.ctx.peer.limits.control_bytes if self.ctx.peer else 0  # for one layer's status
        too_many = (
            len(t.by_tile) + len(body.tiles) > limits.tiles or frames.TILE_STATUS_SIZE * len(body.tiles) + 1024 > room
        )
        if too_many or t.positions > limits.positions:
            self.fail(t, ProtocolError(f"{what}: more tiles or token positions than the limits allow", ErrorCode.LIMIT))
            return
        frames.check_cover(what, body.tiles, parts, heads, range(spec.token_start, spec.token_stop))
        largest = min(limits.frame_bytes, limits.session_window, limits.transfer_window)
        early = layer.by_key
        held = t.held.get(layer.index)
        if held is None or held.plan != body.digest() or len(held.levels) != len(body.tiles):
            held = None
        layer.plan, layer.by_key = body, {}
        for place, (key, levels) in enumerate(zip(body.tiles, body.levels, strict=True)):
            if key.codec >= len(t.codecs) or t.codecs[key.codec].levels != levels:
                raise ProtocolError(f"{what}: a tile of codec {key.codec} with {levels} levels")
            has = early.pop(key, None) or _Tile(key)
            has.tile = key.tile()
            has.place, has.levels = place, levels
            try:
                has.max_sizes = t.sizes.of(has.tile)
            except (LynxError, ValueError) as error:
                raise ProtocolError(f"{what}: {error}") from error
            has.want = min(wanted_levels(t.wants, has.tile, levels), t.level + 1)
            if held is not None:
                has.before = has.delivered = min(held.levels[place], has.want)
                has.received |= (1 << has.before) - 1
                if has.charged & (1 << has.before) - 1:
                    raise ProtocolError(f"{what}: {_SENT_THOUGH_HELD}", ErrorCode.STATE)
            if has.charged >> levels or any(s > m for s, m in zip(has.sizes, has.max_sizes, strict=False)):
                raise ProtocolError(f"{what}: a chunk that came before is too large or of a level that does not exist")
            layer.tiles.append(has)
            layer.by_key[key] = has
            t.by_tile[has.tile] = (layer, has)
        if early:
            raise ProtocolError(f"{what} does not hold tiles whose chunks came before it")
        if (most := max(max(has.max_sizes) for has in layer.tiles)) > largest:
            text = f"{what}: a chunk may have {most} bytes, the smallest window is {largest}"
            self.fail(t, ProtocolError(text, ErrorCode.LIMIT))
            return
        for sizes in {has.max_sizes for has in layer.tiles}:
            for windows in (t.windows, self.windows):
                for window, size in zip(windows, sizes, strict=False):
                    window.largest = max(window.largest, size)
        layer.open = len(layer.tiles)
        layer.packed = bytearray(frames.TILE_STATUS_SIZE * len(layer.tiles))
        for has in layer.tiles:
            layer.note(has)
        tiles = tuple(t_.tile for t_ in layer.tiles if t_.tile is not None)
        wants, before = tuple(t_.want for t_ in layer.tiles), tuple(t_.before for t_ in layer.tiles)
        self.ctx.events.append(PlanReceived(transfer=t.id, plan=body, tiles=tiles, levels=wants, held=before))
        if layer.digests is not None:
            self._ended(t, layer)
        for has in layer.tiles:
            if has.held:  # its chunks came before the plan
                self._drop_unwanted(t, has)
                self._deliver(t, has)
        self._judge_all(t, layer)
        self._touch(t, layer)

    def on_end(self, t: Incoming, body: frames.End, now: float) -> None:
        layer = self._layer(t, body.layer)
        if layer.digests is None:
            layer.digests = body.digests
            if layer.plan is not None:
                self._ended(t, layer)
                self._judge_all(t, layer)
        elif layer.digests != body.digests:
            raise ProtocolError(f"a second, different END of layer {layer.index}", ErrorCode.STATE)
        self._touch(t, layer)

    def _ended(self, t: Incoming, layer: _Layer) -> None:
        assert layer.digests is not None
        if len(layer.digests) != len(layer.tiles):
            raise ProtocolError(f"END of layer {layer.index}: {len(layer.digests)} digests, {len(layer.tiles)} tiles")
        if not t.manifest.lossy and not all(layer.digests):
            raise ProtocolError(f"END of layer {layer.index}: an exact transfer needs a digest of every tile")
        self.ctx.events.append(LayerEnded(transfer=t.id, layer=layer.index, digests=layer.digests))

    def on_result(self, t: Incoming, body: frames.Result, now: float) -> None:
        if t.result is None:
            t.result = body
            self.ctx.events.append(
                ResultReceived(transfer=t.id, first_token=body.first_token, logit_gap=body.logit_gap)
            )
        self._touch(t, None)

    def on_closed(self, t: Incoming, body: frames.Closed, now: float) -> None:
        if t.state is IncomingState.OFFERED and not body.end:
            raise ProtocolError("levels were closed before the transfer was accepted", ErrorCode.STATE)
        if body.level < t.level and t.state is IncomingState.RECEIVING:
            self._cut(t, body.level)
        first = 0 if body.end else body.level + 1
        for level in range(first, t.settled + 1):
            self._settle(t, level, body.final[level])
        t.settled = min(t.settled, body.level)
        if not body.end:
            self._touch(t, None)
            return
        state, events = t.state, self.ctx.events
        t.state = advance(INCOMING, t.state, "closed")
        if state in (IncomingState.OFFERED, IncomingState.RECEIVING):
            text = f"transfer {t.id:032x} was ended by its sender: {body.text or body.code.name}"
            if body.code is ErrorCode.CANCELLED:
                events.append(Cancelled(transfer=t.id, by_peer=True, code=body.code, text=body.text))
            else:
                code = body.code or ErrorCode.INTERNAL  # all is done, says the sender, and it is not
                events.append(TransferFailed(transfer=t.id, error=PeerError(text, code)))
        if state is not IncomingState.CLOSING:
            events.append(TransferReleased(transfer=t.id, complete=state is IncomingState.COMPLETE))
        self._bury(t, None)

    # --- DATA

    def admit(self, header: frames.Header, bitmap: bytes, now: float) -> Arrival | None:
        """Decide about a chunk by its header alone; allocates its buffer. None: skip the payload."""
        t = self.transfers.get(header.transfer)
        if t is None:
            self._drop(header)
            return None
        t.heard_at = now
        if t.state is IncomingState.OFFERED:
            raise ProtocolError("DATA before the transfer was accepted", ErrorCode.STATE)
        if t.state is not IncomingState.RECEIVING:
            self._drop(header)
            return None
        layer = self._layer(t, header.layer)
        if header.codec >= len(t.codecs) or t.codecs[header.codec].wire_id != header.codec_id:
            raise ProtocolError(f"DATA of codec id {header.codec_id}, config {header.codec}: not in the manifest")
        has = layer.by_key.get(header.key(bitmap))
        if has is None:
            has = self._early(t, layer, header, bitmap)
            if has is None:
                self._drop(header)
                return None
        level, bit = header.level, 1 << header.level
        if has.levels and (level >= has.levels or header.payload_length > has.max_sizes[level]):
            raise ProtocolError(
                f"DATA of layer {header.layer}, level {level}, {header.payload_length} bytes: too large"
            )
        if header.attempt > has.attempt:
            raise ProtocolError(f"DATA of layer {header.layer}: attempt {header.attempt} was never asked for")
        if level > t.settled:
            self._drop(header)
            return None
        if header.attempt < has.attempt:  # late, from the attempt that failed; it may not have been charged yet
            if not has.charged_before & bit:
                has.charged_before |= bit
                self._charge(t, header)
                self._release(t, level, header.payload_length)
            self._drop(header)
            return None
        if level < has.before:
            raise ProtocolError(f"DATA of layer {header.layer}: {_SENT_THOUGH_HELD}", ErrorCode.STATE)
        if not has.charged & bit:
            self._charge(t, header)
            has.charged |= bit
            has.sizes[level] = header.payload_length
            if level >= has.want:
                self._release(t, level, header.payload_length)
        elif has.sizes[level] != header.payload_length:
            raise ProtocolError(f"DATA of layer {header.layer}: the same chunk with another size", ErrorCode.STATE)
        if level >= has.want:
            self._drop(header)
            return None
        if (has.received | has.receiving) & bit:
            for counters in (self.ctx.counters, t.counters):
                counters.duplicates += 1
                counters.dropped_bytes += header.payload_length
            return None
        has.receiving |= bit
        return Arrival(t, layer, has, header, self._landing(t, has, header))

    def _landing(self, t: Incoming, has: _Tile, header: frames.Header) -> memoryview | None:
        """The shell's own memory for the payload of a tile that needs no decoding; None if it offers none."""
        if self.ctx.land is None or has.tile is None or not t.codecs[header.codec].verbatim:
            return None
        if header.payload_length != has.max_sizes[0]:  # the codec will say what is wrong with it
            return None
        view = self.ctx.land(t.id, has.tile)
        if view is not None and view.nbytes != header.payload_length:
            raise LocalError(f"{has.tile} has {header.payload_length} bytes, land() gave {view.nbytes}")
        return view

    def _early(self, t: Incoming, layer: _Layer, header: frames.Header, bitmap: bytes) -> _Tile | None:
        if layer.plan is not None:
            raise ProtocolError(f"DATA of layer {layer.index}: the tile is not in its plan")
        if t.early >= _MAX_EARLY:
            return None
        t.early += 1
        key = header.key(bitmap)
        key.check("DATA")
        has = layer.by_key[key] = _Tile(key)
        return has

    def arrived(self, arrival: Arrival, now: float) -> None:
        """The payload is complete: check it, then deliver it or ask for it again."""
        t, has, header = arrival.transfer, arrival.tile, arrival.header
        level, bit = header.level, 1 << header.level
        if not arrival.wanted:
            self._drop(header)
            return
        has.receiving &= ~bit
        if arrival.crc != header.payload_crc:
            for counters in (self.ctx.counters, t.counters):
                counters.corrupt += 1
            count = has.corrupt[level] = has.corrupt.get(level, 0) + 1
            if count > self.ctx.config.resends:
                text = f"layer {header.layer}, level {level}: payload CRC32C wrong {count} times"
                self.fail(t, ProtocolError(text, ErrorCode.FRAME_CORRUPT))
            else:
                self.ctx.emit(frames.Nack(items=(frames.NackItem(has.key, level, has.attempt, count),)), t.id)
            return
        has.received |= bit
        arrival.layer.note(has)
        has.held[level] = arrival
        for counters in (self.ctx.counters, t.counters):
            counters.received_frames[level] += 1
            counters.received_bytes[level] += frames.HEADER_SIZE + header.extension_length + header.payload_length
        self._deliver(t, has)

    def cut_off(self, arrival: Arrival) -> None:
        """The stripe was lost in the middle of the payload."""
        if arrival.attempt == arrival.tile.attempt:
            arrival.tile.receiving &= ~(1 << arrival.header.level)

    # --- time, stripes, the end

    def flush(self, *, everything: bool = False) -> None:
        """Put what changed since the last call into ACK and CREDIT frames (one each, however much changed).

        Credit goes out when the peer may soon be short of it, the rest when it is time or ``everything`` is asked for.
        """
        if not self.ctx.ready:
            return
        self._short = False
        confirm = everything or self._confirmation_due
        for t in self._dirty.values():
            if t.state not in (IncomingState.RECEIVING, IncomingState.COMPLETE):
                continue
            if confirm and t.asked:
                self._emit_accept(t)
                t.asked = False
                t.changed.clear()
            elif confirm:
                self._emit_status(t, sorted(t.changed))
                t.changed.clear()
            if any(window.due for window in t.windows):
                limits = tuple(window.advertise() for window in t.windows)
                self.ctx.emit(frames.Credit(limits=limits), t.id)
        if any(window.due for window in self.windows):
            self._emit_session_credit()
        if confirm:
            self._flush_at = None
            self._dirty.clear()

    @property
    def due(self) -> bool:
        """Whether :meth:`flush` should be called now."""
        return self._short or self._confirmation_due

    @property
    def _confirmation_due(self) -> bool:
        return self._flush_at is not None and self._flush_at <= self.ctx.now

    def status_frames(self) -> list[bytes]:
        """ACK frames that say everything of every transfer: the answer to a probe."""
        return [
            self.ctx.encode(body, t.id)
            for t in self.transfers.values()
            if t.state in (IncomingState.RECEIVING, IncomingState.COMPLETE)
            for body in self._status_bodies(t, list(t.layers))
        ]

    def resync(self, now: float) -> None:
        """A stripe was lost or came back: say again all that the senders need."""
        self._emit_session_credit()
        for t in self.transfers.values():
            t.backoff.reset(now)
            self._repeat(t, resume=True)

    def timer(self) -> float | None:
        """When :meth:`handle_timer` has something to do."""
        times = [] if self._flush_at is None else [self._flush_at]
        for t in self.transfers.values():
            times.append(t.heard_at + self.ctx.config.lease)
            if t.state is not IncomingState.OFFERED and self.ctx.ready:
                times.append(t.backoff.at)
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        """Repeat what may have been lost; give up on senders that say nothing for a lease."""
        repeated = False
        for t in list(self.transfers.values()):
            if now >= t.heard_at + self.ctx.config.lease:
                if t.state in (IncomingState.OFFERED, IncomingState.RECEIVING):
                    text = f"transfer {t.id:032x}: nothing heard of its sender for {self.ctx.config.lease:g} s"
                    self.fail(t, DeadlineError(text))
                    t.heard_at = now
                else:
                    if t.state is IncomingState.COMPLETE:
                        self.ctx.events.append(TransferReleased(transfer=t.id, complete=True))
                    self._forget(t)
            elif t.state is not IncomingState.OFFERED and self.ctx.ready and now >= t.backoff.at:
                self._repeat(t, resume=False)
                t.backoff.tried(now)
                repeated = True
        if repeated:
            self._emit_session_credit()

    def fail(self, t: Incoming, error: RemoteError) -> None:
        """End a transfer with an error, on this side and on the other."""
        self.ctx.events.append(TransferFailed(transfer=t.id, error=error))
        if t.state is IncomingState.OFFERED:
            self.reject(t.id, error.code, str(error), 0.0)
        else:
            self._give_up(t, frames.Error(code=error.code, text=str(error)))

    def abandon(self, error: RemoteError | None) -> None:
        """The session is over: release everything."""
        for t in list(self.transfers.values()):
            if t.live:
                complete = t.state is IncomingState.COMPLETE
                if error is not None and not complete:
                    self.ctx.events.append(TransferFailed(transfer=t.id, error=error))
                elif not complete:
                    text = "the session was closed"
                    self.ctx.events.append(Cancelled(transfer=t.id, by_peer=False, code=ErrorCode.SHUTDOWN, text=text))
                self.ctx.events.append(TransferReleased(transfer=t.id, complete=complete))
            t.state = IncomingState.CLOSED
            self._bury(t, None)

    def start_over(self) -> None:
        """The peer has forgotten the session, and a new one begins: nothing is charged in it."""
        self.windows = [ReceiveWindow(self.ctx.config.limits.session_window) for _ in range(MAX_LEVELS)]

    # --- inside

    def _get(self, transfer: int) -> Incoming | None:
        t = self.transfers.get(transfer)
        if t is None and transfer not in self.tombstones:
            raise LocalError(f"no incoming transfer {transfer:032x}")
        return t

    def _tile(self, transfer: int, tile: Tile) -> tuple[Incoming, _Layer, _Tile] | None:
        t = self._get(transfer)
        if t is None or t.state is not IncomingState.RECEIVING:
            return None
        if tile not in t.by_tile:
            raise LocalError(f"transfer {transfer:032x} has no {tile}")
        return (t, *t.by_tile[tile])

    @staticmethod
    def _layer(t: Incoming, index: int) -> _Layer:
        layer = t.layers.get(index)
        if layer is None:
            raise ProtocolError(f"layer {index} is not in the manifest of transfer {t.id:032x}")
        return layer

    def _charge(self, t: Incoming, header: frames.Header) -> None:
        what = f"layer {header.layer}, level {header.level}"
        t.windows[header.level].charge(header.payload_length, what)
        self.windows[header.level].charge(header.payload_length, what)

    def _release(self, t: Incoming, level: int, nbytes: int) -> None:
        if level <= t.settled:
            t.windows[level].release(nbytes)
            self.windows[level].release(nbytes)
            self._short |= t.windows[level].pressing or self.windows[level].pressing
            self._soil(t, pressing=False)

    def _soil(self, t: Incoming, *, pressing: bool) -> None:
        """Something of the transfer is to be confirmed: now, or with what else comes soon."""
        self._dirty[t.id] = t
        at = self.ctx.now if pressing else self.ctx.now + self.ctx.config.ack_delay
        if self._flush_at is None or at < self._flush_at:
            self._flush_at = at

    def _settle(self, t: Incoming, level: int, final: int) -> None:
        """No more of this class will come: what it still holds of the session's window is free."""
        window = t.windows[level]
        unseen = window.settle(final, f"CLOSED of transfer {t.id:032x}, class {level}")
        self.windows[level].charge(unseen, "CLOSED")
        self.windows[level].release(window.charged - window.released)
        window.released = window.charged

    def _drop(self, header: frames.Header) -> None:
        t = self.transfers.get(header.transfer)
        for counters in (self.ctx.counters, t.counters) if t else (self.ctx.counters,):
            counters.dropped += 1
            counters.dropped_bytes += header.payload_length

    def _drop_unwanted(self, t: Incoming, has: _Tile) -> None:
        for level in [level for level in has.held if level >= max(has.want, has.delivered)]:
            del has.held[level]
            self._release(t, level, has.sizes[level])

    def _deliver(self, t: Incoming, has: _Tile) -> None:
        while has.tile is not None and has.delivered < has.want and has.delivered in has.held:
            level = has.delivered
            has.delivered += 1
            arrival = has.held.pop(level)
            self.ctx.events.append(
                ChunkReceived(
                    transfer=t.id,
                    tile=has.tile,
                    level=level,
                    payload=arrival.view,
                    attempt=has.attempt,
                    last=level == has.levels - 1,
                    landed=arrival.landed(),
                )
            )

    def _judge(self, t: Incoming, layer: _Layer, has: _Tile) -> None:
        """Is the tile done? All wanted levels applied, and the digest verified where there is one."""
        whole = (1 << has.want) - 1
        done = layer.digests is not None and has.applied & whole == whole
        if done and layer.digests is not None and has.levels == has.want:
            done = has.verified or not layer.digests[has.place]
        layer.open -= done - has.done
        has.done = done
        if (
            done
            and t.state is IncomingState.RECEIVING
            and all(
                other.plan is not None and other.digests is not None and other.open == 0 for other in t.layers.values()
            )
        ):
            t.state = advance(INCOMING, t.state, "complete")
            self._soil(t, pressing=True)
            self.ctx.events.append(TransferComplete(transfer=t.id))

    def _judge_all(self, t: Incoming, layer: _Layer) -> None:
        if layer.digests is not None:  # without them no tile is done
            for has in layer.tiles:
                self._judge(t, layer, has)

    def _cut(self, t: Incoming, level: int) -> None:
        t.level = level
        self.ctx.events.append(LevelsCancelled(transfer=t.id, level=level))
        for layer in t.layers.values():
            for has in layer.by_key.values():
                has.want = min(has.want, level + 1)
                self._drop_unwanted(t, has)
            self._judge_all(t, layer)
        self._touch(t, None)

    def _touch(self, t: Incoming, layer: _Layer | None, has: _Tile | None = None, *, pressing: bool = True) -> None:
        """Something that the sender should know has changed."""
        if layer is not None and has is not None:
            layer.note(has)
        if layer is not None:
            t.changed.add(layer.index)
        t.backoff.reset(self.ctx.now)
        self._soil(t, pressing=pressing)

    def _status_bodies(self, t: Incoming, layers: Sequence[int]) -> list[frames.Ack]:
        """ACK bodies of these layers, each small enough for the peer."""
        assert self.ctx.peer is not None
        room = self.ctx.peer.limits.control_bytes - 1024
        batches: list[list[LayerStatus]] = [[]]
        used = 0
        for index in layers:
            layer = t.layers[index]
            if layer.plan is None and layer.digests is None:
                continue
            size = len(layer.packed) + 16
            if used + size > room and batches[-1]:
                batches.append([])
                used = 0
            batches[-1].append(layer.status)
            used += size
        return [
            frames.Ack(
                layers=tuple(batch), result=t.result is not None, level=t.level, settled=t.settled, urgent=t.urgent
            )
            for batch in batches
        ]

    def _emit_status(self, t: Incoming, layers: Sequence[int]) -> None:
        for body in self._status_bodies(t, layers):
            self.ctx.emit(body, t.id)

    def _emit_accept(self, t: Incoming) -> None:
        credit = tuple(window.advertise() for window in t.windows)
        held = tuple(t.held.values())
        self.ctx.emit(frames.Accept(wants=t.wants, credit=credit, held=held, **self._emit_holdings(t)), t.id)

    def _emit_holdings(self, t: Incoming) -> dict[str, Any]:
        """The whole status: what does not fit one frame goes out as ACKs, the rest is returned as fields."""
        *bodies, last = self._status_bodies(t, list(t.layers))
        if t.held and last.layers:  # ACCEPT has no room for both
            bodies, last = [*bodies, last], replace(last, layers=())
        for body in bodies:
            self.ctx.emit(body, t.id)
        return {item.name: getattr(last, item.name) for item in fields(frames.Status)}

    def _emit_session_credit(self) -> None:
        self.ctx.emit(frames.Credit(limits=tuple(window.advertise() for window in self.windows)))

    def _repeat(self, t: Incoming, *, resume: bool) -> None:
        if t.state is IncomingState.OFFERED or not self.ctx.ready:
            return
        if t.state is IncomingState.CLOSING:
            assert t.last_word is not None
            self.ctx.emit(t.last_word, t.id)
            return
        self.ctx.emit(frames.Credit(limits=tuple(window.advertise() for window in t.windows)), t.id)
        if resume:
            self.ctx.emit(frames.Resume(wants=t.wants, **self._emit_holdings(t)), t.id)
        else:
            self._emit_status(t, list(t.layers))

    def _give_up(self, t: Incoming, last_word: frames.Body) -> None:
        t.state = advance(INCOMING, t.state, "give up")
        t.last_word = last_word
        self._free(t)
        self.ctx.emit(last_word, t.id)
        self.ctx.events.append(TransferReleased(transfer=t.id, complete=False))

    @staticmethod
    def _free(t: Incoming) -> None:
        for layer in t.layers.values():
            layer.tiles.clear()
            layer.by_key.clear()
            layer.plan = None
        t.by_tile.clear()

    def _forget(self, t: Incoming) -> None:
        """The sender never said CLOSED: what it held of the session's windows is free all the same."""
        for level in range(t.settled + 1):
            window = t.windows[level]
            self.windows[level].release(window.charged - window.released)
        t.state = advance(INCOMING, t.state, "closed")
        self._bury(t, None)

    def _bury(self, t: Incoming, reply: frames.Reject | None) -> None:
        self._free(t)
        self.transfers.pop(t.id, None)
        self._dirty.pop(t.id, None)
        self._tombstone(t.id, reply, t.counters)

    def _tombstone(self, transfer: int, reply: frames.Reject | None, counters: Counters) -> None:
        if reply is not None:  # it may quote the peer, who must not choose how much is remembered
            reply = replace(reply, text=reply.text[:256])
        self.tombstones[transfer] = (reply, counters)
        while len(self.tombstones) > self.ctx.config.tombstones:
            self.tombstones.popitem(last=False)
        if reply is not None:
            self.ctx.reply(reply, transfer)
