"""The receiving side of a transfer: chunks are decoded straight into the destination. Lives on the I/O thread.

Each tile has at most one job on a worker at a time; payloads that arrive meanwhile are taken together by the next
job, so that a receiver slower than its link skips the levels that nobody would see.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lynxproto import events
from lynxproto._io import Signal
from lynxproto._options import Deadline, Options
from lynxproto._outgoing import part_words, tile_view
from lynxproto._stats import LevelStats, Progress, Result, TransferStats
from lynxproto.chunk import ChunkSpec, Part, Tile
from lynxproto.codecs import Codec, DecodeState, get_codec
from lynxproto.config import MAX_LEVELS
from lynxproto.digest import tile_digest
from lynxproto.errors import (
    DeadlineError,
    ErrorCode,
    LocalError,
    LynxError,
    NotFoundError,
    PayloadError,
    SpecError,
    StateError,
    TransferCancelledError,
    TransportError,
)
from lynxproto.frames import HeldLayer, Plan
from lynxproto.manifest import LayerSpec, Manifest, Want

if TYPE_CHECKING:
    from lynxproto._peer import Peer
    from lynxproto.spool import Spool

__all__ = ["Incoming"]


@dataclass(slots=True, eq=False)
class _Tile:
    """Where a tile stands.

    ``last`` is the last level that will come, ``exact`` the codec's last one, ``decoded`` the level its decoder has,
    and ``shown`` the level that its destination holds.
    """

    tile: Tile
    layer: LayerSpec
    dtype: str
    codec: Codec
    words: NDArray[Any]
    last: int
    exact: int
    attempt: int = 0
    state: DecodeState | None = None
    decoded: int = -1
    shown: int = -1
    pending: list[events.ChunkReceived] = field(default_factory=list)
    running: int | None = None  # the level that a worker is decoding to
    landed: bytes | None = None  # the digest of the words that arrived in place
    digest: bytes | None = None  # what END says it must be
    verified: bool = False
    kept: int = 0  # levels that the spool has

    @property
    def spec(self) -> ChunkSpec:
        """What its codec gets; words that land in place need none."""
        return self.tile.spec(self.dtype, self.layer.head_dim(self.tile.part))

    @property
    def held(self) -> int:
        """How many of its lowest levels are here, decoded or to be decoded next."""
        return self.pending[-1].level + 1 if self.pending else self.decoded + 1

    def show(self, decode: Callable[[NDArray[Any]], DecodeState]) -> DecodeState:
        """Let ``decode`` write the tile's words; an explicit token set is scattered into the destination."""
        if self.tile.tokens.is_range:
            return decode(tile_view(self.words, self.layer, self.tile))
        spec = self.spec
        words = np.empty(spec.shape, spec.word_dtype)
        state = decode(words)
        head = self.tile.head_start - self.layer.head_start
        positions = np.asarray(self.tile.tokens.positions) - self.layer.token_start
        self.words[head : head + self.tile.heads, positions] = words
        return state


@dataclass(frozen=True, slots=True)
class _Outcome:
    state: DecodeState | None
    shown: bool
    digest: bytes | None


def _decode(
    tile: _Tile, state: DecodeState | None, payloads: Sequence[memoryview], show: bool, digest: bool
) -> _Outcome:
    """On a worker: add levels to the decoder, put the words into place if ``show``, and digest them if ``digest``."""
    spec, codec = tile.spec, tile.codec

    def decode(out: NDArray[Any] | None) -> DecodeState:
        if state is None:
            return codec.decode(spec, payloads, out)
        if not payloads:
            return codec.decode(spec, state.payloads, out)
        now = state
        for payload in payloads[:-1]:
            now = codec.refine(spec, now, now.level + 1, payload, None)
        return codec.refine(spec, now, now.level + 1, payloads[-1], out)

    after = tile.show(decode) if show else decode(None)
    return _Outcome(after, show, tile_digest(spec, tile_view(tile.words, tile.layer, tile.tile)) if digest else None)


def _verify(tile: _Tile) -> _Outcome:
    return _Outcome(tile.state, False, tile_digest(tile.spec, tile_view(tile.words, tile.layer, tile.tile)))


def _check_apart(words: Mapping[tuple[int, Part], NDArray[Any]]) -> None:
    """Tiles are verified as they are decoded: a later one must not write over them.

    Finds arrays that begin at the same word, and broadcast ones; engines' pages may interleave as they like.
    Raises :class:`~lynxproto.errors.SpecError`.
    """
    seen: dict[int, tuple[int, Part]] = {}
    for (layer, part), array in words.items():
        if not array.size:
            continue
        if any(stride == 0 and size > 1 for size, stride in zip(array.shape, array.strides, strict=True)):
            raise SpecError(f"layer {layer}, {part}: the output array is broadcast; its rows share memory")
        other = seen.setdefault(array.ctypes.data, (layer, part))
        if other != (layer, part):
            raise SpecError(f"layer {layer}, {part}: the output array shares memory with layer {other[0]}, {other[1]}")


class Incoming:
    """One incoming transfer."""

    def __init__(
        self,
        peer: Peer,
        transfer: int,
        manifest: Manifest,
        arrays: Mapping[tuple[int, Part], Any],
        options: Options,
        *,
        name: str,
        wants: Sequence[Want] | None,
        spool: Spool | StateError | None,
    ) -> None:
        self.id = transfer
        self.manifest = manifest
        self.principal = peer.principal
        self.arrays = arrays
        self.stats = TransferStats(opened=time.monotonic())
        self.error: LynxError | None = None
        self.released = False
        self.complete = False
        self.late: set[int] = set()
        self.degraded: int | None = None
        self.final: int | None = None
        self.on_progress: Callable[[Progress], object] | None = None
        self.changed = Signal()
        self.wants = wants
        self.spool = None if isinstance(spool, StateError) else spool
        self._no_spool = spool if isinstance(spool, StateError) else None
        self.name = name
        self.moving = asyncio.Lock()
        self.ending = False  # it is about to be released
        self._peer = peer
        self._intermediate = options.intermediate
        self._codecs = [get_codec(config) for config in manifest.codecs]
        self._levels = max((codec.levels for codec in self._codecs), default=0)
        self._words: dict[tuple[int, Part], NDArray[Any]] = {}
        for layer in manifest.layers:
            for part in layer.parts:
                if (layer.index, part) not in arrays:
                    raise SpecError(f"allocate() gave no array for layer {layer.index}, {part}")
                self._words[layer.index, part] = part_words(
                    manifest, layer, part, arrays[layer.index, part], writable=True
                )
        _check_apart(self._words)
        self._tiles: dict[Tile, _Tile] = {}
        self._plans: dict[int, Plan] = {}
        self._places: dict[int, tuple[Tile, ...]] = {}  # a plan's tiles, in its order
        self._behind: dict[int, list[int]] = {}  # layer -> level -> tiles that have not reached it
        self._awaited: Counter[tuple[int, int | None]] = Counter()
        self._told = -1  # levels up to this one are known to be ready
        self._result: Result | None = None
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(d.seconds, self._on_deadline, d) for d in options.deadlines]

    # --- called by the user, on the I/O thread

    async def ready(self, level: int, layer: int | None) -> None:
        """Return when every tile (of ``layer``) holds ``level``, or its last level if that is lower."""
        if not 0 <= level < MAX_LEVELS:
            raise LocalError(f"there is no level {level}; levels are 0 to {MAX_LEVELS - 1}")
        if layer is not None:
            self.manifest.layer(layer)
        self._awaited[level, layer] += 1
        try:
            for tile in list(self._tiles.values()):
                self._advance(tile)
            await self.changed.until(lambda: self._check_ready(level, layer))
        finally:
            self._awaited[level, layer] -= 1
            self._awaited += Counter()  # forgets levels that nobody awaits any more

    def is_ready(self, level: int, layer: int | None) -> bool:
        """Whether :meth:`ready` would return at once."""
        layers = [spec.index for spec in self.manifest.layers] if layer is None else [layer]
        return all(index in self._plans and self._behind[index][level] == 0 for index in layers)

    def _check_ready(self, level: int, layer: int | None) -> bool:
        if self.is_ready(level, layer):
            return True
        if self.final is not None and level > self.final:
            raise self._final_error()
        self._check()
        return False

    async def exact(self, layer: int | None) -> None:
        """Return when every word (of ``layer``) is there and verified; raise why that will not happen."""
        if self.manifest.lossy:
            raise LocalError(f"transfer {self.id:032x} is lossy: no level of it is exact; wait for ready() instead")
        if layer is not None:
            self.manifest.layer(layer)

        def tiles() -> Iterator[_Tile]:
            return (tile for tile in self._tiles.values() if layer is None or tile.tile.layer == layer)

        def done() -> bool:  # asked often, and there may be many tiles
            if self.final is not None and any(tile.last > self.final for tile in tiles()):
                raise self._final_error()
            if layer is not None and layer in self._plans and self._verified(layer):
                return True
            if self.complete:
                if any(tile.last < tile.exact for tile in tiles()):
                    raise LocalError(f"transfer {self.id:032x} is not exact: this side did not want all levels")
                return True
            self._check()
            return False

        await self.changed.until(done)

    def _verified(self, layer: int) -> bool:
        """Whether all tiles of a layer are."""
        tiles = [self._tiles.get(tile) for tile in self._places[layer]]
        return all(tile is not None and tile.verified and tile.last == tile.exact for tile in tiles)

    async def result(self) -> Result:
        """Prefill's result, once it has arrived."""

        def done() -> bool:
            if self._result is None:
                self._check()
                if self.released:
                    raise NotFoundError(f"the sender of transfer {self.id:032x} told no result")
            return self._result is not None

        await self.changed.until(done)
        assert self._result is not None
        return self._result

    def urgent(self) -> None:
        """Ask for this transfer's residual ahead of others."""
        self._peer.connection.urgent(self.id, time.monotonic())
        self._peer.pump()

    async def cancel(self, above_level: int | None) -> None:
        """Cancel; nothing writes to the destination (above that level) when this returns."""
        self._peer.connection.cancel(self.id, time.monotonic(), above_level)
        self._peer.pump()
        whole, level = above_level is None, -1 if above_level is None else above_level
        # A complete transfer is released when its sender says so, but nothing writes to it any more.
        await self.changed.until(lambda: self.released or ((self.complete or not whole) and self._quiet_above(level)))

    def _quiet_above(self, level: int) -> bool:
        return all(tile.running is None or tile.running <= level for tile in self._tiles.values())

    async def wait_released(self) -> None:
        """Return when nothing writes to the destination any more."""
        await self.changed.until(lambda: self.released)

    def _check(self) -> None:
        """Raise why the transfer is over: only once nothing writes to the destination any more."""
        if not self.released:
            return
        if self.error is not None:
            raise self.error
        if not self.complete:
            raise TransferCancelledError(f"transfer {self.id:032x} was cancelled")

    def _final_error(self) -> LynxError:
        if self.degraded is not None:
            return DeadlineError(
                f"transfer {self.id:032x} missed a deadline and was degraded to level {self.degraded}: it is not exact"
            )
        return TransferCancelledError(f"levels above {self.final} of transfer {self.id:032x} were cancelled")

    # --- events

    @property
    def state_error(self) -> StateError | None:
        """Why nothing (more) of it is kept."""
        return self._no_spool if self.spool is None else self.spool.error

    def held(self) -> list[HeldLayer]:
        """What is here already, of a session before this one: in memory, or in the spool."""
        if not self._plans:
            return [] if self.spool is None else self.spool.held()
        layers = []
        for index, plan in self._plans.items():
            tiles = [self._tiles.get(tile) for tile in self._places[index]]
            layers.append(HeldLayer(index, plan.digest(), bytes(tile.held if tile else 0 for tile in tiles)))
        return layers

    async def move(self, peer: Peer, transfer: int) -> None:
        """Go on in another session, as ``transfer``. What still comes in the one before is dropped there."""
        before, old = self._peer, self.id
        del before.incoming[old]
        text = "the transfer goes on in another session"
        before.connection.cancel(old, time.monotonic(), text=text)
        before.let_go(old)
        before.pump()
        await before.stop_landing(old)
        await before.workers.settle(self)
        self._peer, self.id = peer, transfer
        self.complete = False
        for tile in self._tiles.values():
            tile.attempt = 0
        self.stats.carry_over()

    def on_plan(self, event: events.PlanReceived) -> None:
        """The tiles of a layer."""
        layer = self.manifest.layer(event.layer)
        if event.plan != self._plans.get(layer.index):  # else the session is another, and its tiles are as they were
            self._tiles = {tile: state for tile, state in self._tiles.items() if tile.layer != layer.index}
            self._plans[layer.index], self._places[layer.index] = event.plan, event.tiles
            self._behind[layer.index] = [0] * MAX_LEVELS
        for tile, levels, held in zip(event.tiles, event.levels, event.held, strict=True):
            if levels:
                self._plan_tile(layer, tile, levels, held)
        self.changed.notify()

    def _plan_tile(self, layer: LayerSpec, tile: Tile, levels: int, held: int) -> None:
        state = self._tiles.get(tile)
        if state is None:
            state = self._tiles[tile] = self._new_tile(layer, tile, levels)
            self.stats.plan(levels)
            self._fall_behind(state, MAX_LEVELS)
        if state.held > held:  # there was no room to tell the sender
            self._restart(state, 0)
        elif state.held == held:
            for level in range(held):
                self._peer.connection.applied(self.id, tile, level, time.monotonic())
        elif self.spool is not None:
            for level, payload in enumerate(self.spool.payloads(tile, held)):
                chunk = events.ChunkReceived(
                    transfer=self.id, tile=tile, level=level, payload=payload, attempt=0, last=level == levels - 1
                )
                state.pending.append(chunk)
            state.kept = held
            self._advance(state)

    def _new_tile(self, layer: LayerSpec, tile: Tile, levels: int) -> _Tile:
        codec = self._codecs[tile.codec]
        return _Tile(
            tile=tile,
            layer=layer,
            dtype=self.manifest.dtype,
            codec=codec,
            words=self._words[tile.layer, tile.part],
            last=levels - 1,
            exact=codec.levels - 1,
        )

    def on_chunk(self, event: events.ChunkReceived) -> None:
        """A chunk to decode."""
        tile = self._tiles[event.tile]
        if event.attempt > tile.attempt:
            self._restart(tile, event.attempt)
        elif event.attempt < tile.attempt:
            return  # the rest of an attempt that failed
        if event.landed is not None:
            self._landed(tile, event)
        else:
            tile.pending.append(event)
        self._advance(tile)
        now, level = time.monotonic(), event.level
        counters = self._peer.connection.transfer_counters(self.id)
        stats = self.stats.update(level, counters.received_frames[level], counters.received_bytes[level], now)
        if stats is not None:
            self._tell(level, stats, now)

    def tell_progress(self) -> None:
        """What has come before anybody asked to be told."""
        now = time.monotonic()
        for level, stats in sorted(self.stats.levels.items()):
            if stats.chunks:
                self._tell(level, stats, now)

    def _tell(self, level: int, stats: LevelStats, now: float) -> None:
        if self.on_progress is not None:
            progress = Progress(now, level, stats.chunks, stats.bytes, stats.total_chunks)
            self._peer.call_user(self.on_progress, progress)

    def land(self, tile: Tile) -> memoryview | None:
        """Where the words of ``tile`` belong, if they are contiguous there. Its plan may still be on the way here."""
        if not tile.tokens.is_range or self.spool is not None:  # what is kept passes through here
            return None
        words = tile_view(self._words[tile.layer, tile.part], self.manifest.layer(tile.layer), tile)
        return words.reshape(-1).view(np.uint8).data if words.flags.c_contiguous else None

    def on_layer_ended(self, event: events.LayerEnded) -> None:
        """Digests of a layer's tiles."""
        for tile, digest in zip(self._places[event.layer], event.digests, strict=True):
            state = self._tiles.get(tile)
            if state is None:
                continue
            if state.verified and state.digest == digest:  # in the session before
                self._peer.connection.tile_verified(self.id, state.tile, time.monotonic())
                continue
            state.digest, state.verified = digest, False
            self._advance(state)

    def on_result(self, event: events.ResultReceived) -> None:
        """Prefill's result."""
        self._result = Result(event.first_token, event.logit_gap)
        self.changed.notify()

    def on_levels_cancelled(self, level: int) -> None:
        """Levels above ``level`` will not come."""
        self.final = level if self.final is None else min(self.final, level)
        now = time.monotonic()
        for tile in self._tiles.values():
            for chunk in tile.pending:
                if chunk.level > self.final:
                    self._peer.connection.applied(self.id, tile.tile, chunk.level, now)
            tile.pending = [chunk for chunk in tile.pending if chunk.level <= self.final]
            self._advance(tile)
        self.changed.notify()

    def on_complete(self) -> None:
        """Everything wanted is here and verified."""
        self.complete = True
        self.changed.notify()

    def fail(self, error: LynxError) -> None:
        """The transfer is over because of ``error``; release follows."""
        if self.error is None:
            self.error = error

    async def release(self, complete: bool) -> None:
        """Nothing more will arrive: stop writing to the destination."""
        self.ending = True
        for timer in self._timers:
            timer.cancel()
        if complete:
            await self._peer.workers.settle(self)
        else:
            await self._peer.workers.drop(self)
            await self._peer.stop_landing(self.id)
            self._tiles.clear()
        if self.spool is not None:
            # Whatever only ended the session may be resumed; what ended the transfer may not.
            resumable = self._peer.over or isinstance(self.error, DeadlineError | TransportError)
            if complete or not resumable:
                self.spool.discard()
            self.spool.close()
        self.released = True
        self.stats.released = time.monotonic()
        self.changed.notify()

    def _on_deadline(self, deadline: Deadline) -> None:
        if self.released or self.complete or self.is_ready(deadline.level, None):
            return
        text = f"level {deadline.level} of transfer {self.id:032x} was not ready within {deadline.seconds:g} s"
        connection, now = self._peer.connection, time.monotonic()
        if deadline.policy == "wait":
            self.late.add(deadline.level)
        elif deadline.policy == "degrade" and self.is_ready(0, None):
            self.degraded = max(level for level in range(deadline.level) if self.is_ready(level, None))
            connection.cancel(self.id, now, self.degraded, code=ErrorCode.TIMEOUT, text=text)
        else:
            self.fail(DeadlineError(text))
            connection.cancel(self.id, now, code=ErrorCode.TIMEOUT, text=text)
        self._peer.pump()
        self.changed.notify()

    # --- tiles

    def _last(self, tile: _Tile) -> int:
        return tile.last if self.final is None else min(tile.last, self.final)

    def _wanted(self, tile: _Tile, level: int) -> bool:
        """Whether ``level`` of ``tile``, just decoded, should be put into the destination."""
        if level in (0, self._last(tile)) or self._intermediate:
            return True
        return any(
            tile.shown < awaited <= level
            for (awaited, layer) in self._awaited
            if layer is None or layer == tile.layer.index
        )

    def _advance(self, tile: _Tile) -> None:
        """Start the tile's next job, if there is one and none is running."""
        if tile.running is not None:
            return
        chunks = tile.pending
        level = chunks[-1].level if chunks else tile.decoded
        if chunks or (level > tile.shown and self._wanted(tile, level)):
            tile.pending = []
            payloads = [chunk.payload for chunk in chunks]
            show = self._wanted(tile, level)
            digest = level == tile.exact and bool(tile.digest)
            state = tile.state
            fresh = [chunk for chunk in chunks if chunk.level >= tile.kept]
            tile.kept = level + 1

            def work() -> _Outcome:
                self._keep(fresh)
                return _decode(tile, state, payloads, show, digest)

            self._run(tile, level, chunks, work, words=show or digest)
        elif tile.landed and tile.digest:
            landed, tile.landed = tile.landed, None
            self._check_digest(tile, landed)
        elif tile.shown == tile.exact and tile.digest and not tile.verified and tile.landed is None:
            self._run(tile, level, [], lambda: _verify(tile), words=True)

    def _keep(self, chunks: Sequence[events.ChunkReceived]) -> None:
        """On a worker: append what has come to the spool."""
        if self.spool is not None:
            for chunk in chunks:
                self.spool.plan(self.id, self._plans[chunk.tile.layer])
                codec = self._codecs[chunk.tile.codec]
                self.spool.keep(self.id, chunk.tile, chunk.level, chunk.payload, codec.wire_id)

    def _run(
        self,
        tile: _Tile,
        level: int,
        chunks: Sequence[events.ChunkReceived],
        work: Callable[[], _Outcome],
        *,
        words: bool,
    ) -> None:
        """``words``: the work is on the tile's words; else it only looks at its payloads, which takes microseconds."""
        tile.running = level
        attempt = tile.attempt
        self._peer.work(
            self,
            (max(level, 0), tile.layer.index),
            work,
            lambda future: self._done(tile, attempt, level, chunks, future),
            nbytes=None if self.spool is not None else tile.spec.nbytes if words else 0,
        )

    def _done(
        self, tile: _Tile, attempt: int, level: int, chunks: Sequence[events.ChunkReceived], future: Future[_Outcome]
    ) -> None:
        tile.running = None
        self.changed.notify()
        if attempt != tile.attempt:
            self._advance(tile)
            return
        connection, now = self._peer.connection, time.monotonic()
        error = future.exception()
        if isinstance(error, PayloadError):
            self._fail_tile(tile, ErrorCode.PAYLOAD, str(error))
            return
        if error is not None:
            self.fail(error if isinstance(error, LynxError) else LocalError(f"decoding failed: {error!r}"))
            connection.cancel(self.id, now, code=ErrorCode.INTERNAL, text="the receiver could not decode a chunk")
            self._peer.pump()
            return
        outcome = future.result()
        tile.decoded = level
        if outcome.shown:
            self._show(tile, level)
        tile.state = outcome.state if level < self._last(tile) else None
        for chunk in chunks:
            connection.applied(self.id, tile.tile, chunk.level, now)
        if outcome.digest is not None and not self._check_digest(tile, outcome.digest):
            return
        self._advance(tile)
        self.changed.notify()
        self._peer.pump_soon()

    def _landed(self, tile: _Tile, event: events.ChunkReceived) -> None:
        """The chunk's words are in place already."""
        tile.landed = event.landed
        tile.decoded = event.level
        self._show(tile, event.level)
        self._peer.connection.applied(self.id, tile.tile, event.level, time.monotonic())

    def _check_digest(self, tile: _Tile, digest: bytes) -> bool:
        """Whether the words are what END says."""
        if digest != tile.digest:
            self._fail_tile(tile, ErrorCode.DIGEST, "the words do not match the digest in END")
            return False
        tile.verified = True
        self._peer.connection.tile_verified(self.id, tile.tile, time.monotonic())
        self.changed.notify()
        return True

    def _fail_tile(self, tile: _Tile, code: ErrorCode, text: str) -> None:
        self._restart(tile, tile.attempt + 1)
        self._peer.connection.tile_failed(self.id, tile.tile, time.monotonic(), code, text)
        self._peer.pump()

    def _restart(self, tile: _Tile, attempt: int) -> None:
        tile.attempt = attempt
        tile.kept = 0
        tile.state = tile.landed = None
        tile.decoded = -1
        tile.pending = []
        tile.verified = False
        if tile.shown >= 0:
            self._fall_behind(tile, MAX_LEVELS if tile.shown == tile.last else tile.shown + 1)
            tile.shown = -1

    def _fall_behind(self, tile: _Tile, levels: int) -> None:
        """The destination does not hold the lowest ``levels`` levels of the tile."""
        behind = self._behind[tile.layer.index]
        for level in range(levels):
            behind[level] += 1

    def _show(self, tile: _Tile, level: int) -> None:
        """The destination holds ``level`` now."""
        behind = self._behind[tile.layer.index]
        for reached in range(tile.shown + 1, MAX_LEVELS if level == tile.last else level + 1):
            behind[reached] -= 1
        tile.shown = level
        if 0 in behind:  # perhaps somebody waits for that
            self.changed.notify()
        while self._told + 1 < self._levels and not behind[self._told + 1]:
            if not self.is_ready(self._told + 1, None):
                break
            self._told += 1
            self._peer.journal.level_ready(self, self._peer.name, self._told, time.monotonic())
