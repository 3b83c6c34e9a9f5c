"""The sending side of a transfer: borrowed arrays, encoded lazily, chunk by chunk. Lives on the I/O thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lynxproto._io import Signal
from lynxproto._stats import TransferStats
from lynxproto.cachefile import Cache
from lynxproto.chunk import ChunkSpec, Part, Tile, as_words
from lynxproto.codecs import Codec, get_codec
from lynxproto.connection import ChunkRequest
from lynxproto.digest import crc32c, tile_digest
from lynxproto.errors import (
    ErrorCode,
    LocalError,
    LynxError,
    SpecError,
    StreamClosedError,
    TransferCancelledError,
)
from lynxproto.manifest import LayerSpec, Manifest
from lynxproto.policy import Policy

if TYPE_CHECKING:
    from lynxproto._peer import Peer

__all__ = ["Outgoing", "borrow", "part_words", "tile_view"]

#: Urgency of codec work: anchors first, then digests, then residuals by level.
_DIGEST_URGENCY = 1
#: A transfer whose layers were all written within this share of its time was not waiting for prefill.
_PROMPT = 0.1


def part_words(manifest: Manifest, layer: LayerSpec, part: Part, array: Any, *, writable: bool = False) -> NDArray[Any]:
    """View the caller's array of one part of one layer as words. Raises :class:`~lynxproto.errors.SpecError`."""
    spec = ChunkSpec(
        part=part, dtype=manifest.dtype, heads=layer.kv_heads, tokens=layer.tokens, head_dim=layer.head_dim(part)
    )
    try:
        return as_words(spec, array, writable=writable)
    except SpecError as error:
        raise SpecError(f"layer {layer.index}, {part}: {error}") from error


def borrow(manifest: Manifest, index: int, arrays: Sequence[Any], *, copy: bool) -> dict[Part, NDArray[Any]]:
    """The words of layer ``index``: views of ``arrays`` (one for each part, in the manifest's order), or copies.

    Raises :class:`~lynxproto.errors.SpecError` when they do not match the manifest.
    """
    layer = manifest.layer(index)
    if len(arrays) != len(layer.parts):
        raise SpecError(f"layer {index} has the parts {', '.join(layer.parts)}; {len(arrays)} arrays were given")
    words = {part: part_words(manifest, layer, part, a) for part, a in zip(layer.parts, arrays, strict=True)}
    return {part: array.copy() for part, array in words.items()} if copy else words


def tile_view(words: NDArray[Any], layer: LayerSpec, tile: Tile) -> NDArray[Any]:
    """The tile's part of its layer: a view for a token range, a gathered copy for an explicit token set."""
    head = tile.head_start - layer.head_start
    heads = words[head : head + tile.heads]
    if tile.tokens.positions is None:
        return heads[:, tile.tokens.start - layer.token_start : tile.tokens.stop - layer.token_start]
    return heads[:, np.asarray(tile.tokens.positions) - layer.token_start]


def _encode(
    codec: Codec, spec: ChunkSpec, words: NDArray[Any], layer: LayerSpec, request: ChunkRequest
) -> tuple[memoryview, int]:
    """On a worker: a payload and its CRC32C."""
    (encoded,) = codec.encode(spec, tile_view(words, layer, request.tile), levels=[request.level])
    payload = memoryview(encoded).cast("B")
    return payload, crc32c(payload)


def _digest(manifest: Manifest, layer: LayerSpec, tile: Tile, words: NDArray[Any]) -> bytes:
    return tile_digest(tile.spec(manifest.dtype, layer.head_dim(tile.part)), tile_view(words, layer, tile))


class Outgoing:
    """One outgoing transfer."""

    def __init__(
        self, peer: Peer, transfer: int, manifest: Manifest, policy: Policy, *, adaptive: bool = False
    ) -> None:
        """``adaptive``: layers may be cut as the link is now. A transfer that goes on later is cut the same again."""
        self.id = transfer
        self.manifest = manifest
        self.principal = peer.principal
        self.stats = TransferStats(opened=time.monotonic())
        self.error: LynxError | None = None
        self.accepted = False
        self.released = False
        self.complete = False
        self.final: int | None = None  # levels above it were cancelled
        self.alone = False
        """No other transfer has been under way since this one was opened."""
        self.changed = Signal()
        self._encoding = 0  # chunks at the codec threads
        self._peer = peer
        self._policy = policy
        self._adaptive = adaptive
        self._codecs = [get_codec(config) for config in manifest.codecs]
        self._words: dict[tuple[int, Part], NDArray[Any]] = {}
        self._written: set[int] = set()
        #: (layer, its tiles, their digests as far as they are known) until the layer is ended
        self._digests: dict[int, tuple[tuple[Tile, ...], dict[Tile, bytes]]] = {}
        self._planning = 0
        self._counted: list[int] = []
        self._finishing = False
        self._accepted_at = self._written_at = self.stats.opened

    # --- called by the user, on the I/O thread

    def write(self, index: int, words: dict[Part, NDArray[Any]], importance: Any = None) -> None:
        """Take the words of layer ``index`` (see :func:`borrow`) and let them be asked for."""
        self._check()
        layer = self.manifest.layer(index)
        if layer.index in self._written:
            raise LocalError(f"layer {layer.index} of transfer {self.id:032x} was written before")
        attention = self._policy.attention(layer, importance)
        dtype, policy = self.manifest.dtype, self._policy
        tiles = None
        if policy.tiers is None:
            tiles = (self._peer.frames_of(policy) if self._adaptive else policy).tiles(dtype, layer)
            self._peer.connection.plan(self.id, layer.index, tiles, time.monotonic())
        self._written.add(layer.index)
        self._written_at = time.monotonic()
        for part, array in words.items():
            self._words[layer.index, part] = array
        if tiles is not None:
            self._planned(layer, tiles)
            return
        self._planning += 1  # it takes some milliseconds
        self._peer.work(
            self,
            (0, layer.index),
            lambda: policy.tiles(dtype, layer, policy.score(dtype, layer, words, attention)),
            lambda future: self._tiered(layer, future),
        )

    def _tiered(self, layer: LayerSpec, future: Future[tuple[Tile, ...]]) -> None:
        error = future.exception()
        if error is not None:
            self._break(error)
            return
        self._planning -= 1
        try:
            self._peer.connection.plan(self.id, layer.index, future.result(), time.monotonic())
        except LocalError as refused:  # beyond the peer's limits
            self._break(refused)
            return
        self._planned(layer, future.result())
        self._try_finish()

    def _planned(self, layer: LayerSpec, tiles: tuple[Tile, ...]) -> None:
        """Count the tiles of a layer whose plan is out, and tell or compute their digests."""
        for tile in tiles:
            self.stats.plan(self._codecs[tile.codec].levels)
        if self.manifest.lossy:
            self._peer.connection.end_layer(self.id, layer.index, [b""] * len(tiles), time.monotonic())
        else:
            self._digests[layer.index] = (tiles, {})
            self._digest(layer, [tile for tile in tiles if not self._digested_when_sent(tile)])
        self._peer.pump()

    def result(self, first_token: int, logit_gap: float | None) -> None:
        """Tell what prefill knows."""
        self._check()
        self._peer.connection.result(self.id, first_token, logit_gap, time.monotonic())
        self._peer.pump()

    async def finish(self) -> None:
        """Return when the peer has confirmed everything; raise why it did not."""
        self._check()
        missing = [layer.index for layer in self.manifest.layers if layer.index not in self._written]
        if missing:
            raise LocalError(f"finish() before all layers were written; missing: {_some(missing)}")
        self._finishing = True
        self._try_finish()
        await self.changed.until(lambda: self.released)
        if not self.complete:
            self._check()

    async def send_cache(self, cache: Cache, importance: Sequence[Any] | None = None) -> None:
        """Write a whole cache and its result, and finish. ``importance`` has one entry a layer; see :meth:`write`."""
        if importance is not None and len(importance) != len(self.manifest.layers):
            raise SpecError(f"importance of {len(importance)} layers; the cache has {len(self.manifest.layers)}")
        for n, layer in enumerate(self.manifest.layers):
            arrays = [cache.arrays[layer.index, part] for part in layer.parts]
            words = borrow(self.manifest, layer.index, arrays, copy=False)
            self.write(layer.index, words, None if importance is None else importance[n])
            await asyncio.sleep(0)  # what is planned may go
        if cache.first_token is not None:
            self.result(cache.first_token, cache.logit_gap)
        await self.finish()

    async def wait_accepted(self) -> None:
        """Return when the peer has its memory ready; raise if it refused."""

        def done() -> bool:
            if not self.accepted:
                self._check()
            return self.accepted

        await self.changed.until(done)

    async def wait_released(self) -> None:
        """Return when nothing reads the borrowed arrays any more."""
        await self.changed.until(lambda: self.released)

    async def cancel(self, above_level: int | None) -> None:
        """Cancel; the whole transfer is released when this returns."""
        self._peer.connection.cancel(self.id, time.monotonic(), above_level)
        self._peer.pump()
        if above_level is None:
            await self.wait_released()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self.released and not self.complete:
            raise TransferCancelledError(f"transfer {self.id:032x} was cancelled")
        if self.released:
            raise StreamClosedError(f"transfer {self.id:032x} is complete")

    # --- called by the peer

    def encode(self, request: ChunkRequest) -> None:
        """Encode a chunk on a worker and hand it to the connection."""
        tile = request.tile
        layer = self.manifest.layer(tile.layer)
        words = self._words[tile.layer, tile.part]
        codec = self._codecs[tile.codec]
        spec = tile.spec(self.manifest.dtype, layer.head_dim(tile.part))
        urgency = (0 if request.level == 0 else _DIGEST_URGENCY + request.level, tile.layer)
        self._encoding += 1
        self._peer.encoding += 1
        self._peer.work(
            self,
            urgency,
            lambda: _encode(codec, spec, words, layer, request),
            lambda future: self._encoded(request, future),
            nbytes=spec.nbytes,
        )

    def lend(self, tile: Tile) -> memoryview:
        """The words of a tile that go as they are; copied if they are not contiguous."""
        words = tile_view(self._words[tile.layer, tile.part], self.manifest.layer(tile.layer), tile)
        return np.ascontiguousarray(words).reshape(-1).view(np.uint8).data

    def on_digested(self, tile: Tile, digest: bytes) -> None:
        """A tile whose words go as they are was framed."""
        self._know(tile.layer, {tile: digest})

    def count(self) -> None:
        """Bring the statistics up to date."""
        counters = self._peer.connection.transfer_counters(self.id)
        if counters.sent_frames != self._counted:
            self._counted, now = list(counters.sent_frames), time.monotonic()
            for level, frames in enumerate(self._counted):
                if frames:
                    self.stats.update(level, frames, counters.sent_bytes[level], now)

    def on_accepted(self) -> None:
        """The peer accepted."""
        self.accepted = True
        self._accepted_at = time.monotonic()
        for index, (tiles, known) in self._digests.items():
            unsent = [tile for tile in tiles if tile not in known and not self._digested_when_sent(tile)]
            self._digest(self.manifest.layer(index), unsent)
        self.changed.notify()

    def fail(self, error: LynxError) -> None:
        """The transfer is over because of ``error``; release follows."""
        if self.error is None:
            self.error = error

    async def release(self, complete: bool) -> None:
        """The connection wants nothing any more: let go of the caller's arrays."""
        self.count()
        await self._peer.workers.drop(self)
        self._peer.encoding -= self._encoding
        await self._peer.reclaim(self.id)
        self._words.clear()
        self.complete = complete
        self.released = True
        now = self.stats.released = time.monotonic()
        if complete:
            took = now - self._accepted_at
            prompt = self._written_at - self._accepted_at < _PROMPT * took
            self._peer.link.learn(self, took if self.alone and prompt else None)
        self.changed.notify()

    # --- outcomes of codec work

    def _encoded(self, request: ChunkRequest, future: Future[tuple[memoryview, int]]) -> None:
        self._encoding -= 1
        self._peer.encoding -= 1
        error = future.exception()
        if error is not None:
            self._break(error)
            return
        payload, crc = future.result()
        try:
            now = time.monotonic()
            self._peer.connection.chunk_encoded(self.id, request.tile, request.level, payload, now, crc=crc)
        except LocalError as refused:  # a codec that breaks its own promises
            self._break(refused)
            return
        self._peer.pump_soon()

    def _digested_when_sent(self, tile: Tile) -> bool:
        """Whether encoding the tile makes its digest: its payload is its words, and the peer seems to lack it."""
        return self._codecs[tile.codec].verbatim and self._peer.connection.will_send(self.id, tile)

    def _digest(self, layer: LayerSpec, tiles: Sequence[Tile]) -> None:
        """Digest these tiles on a worker."""
        if tiles:
            words = {part: self._words[layer.index, part] for part in layer.parts}
            self._peer.work(
                self,
                (_DIGEST_URGENCY, layer.index),
                lambda: {tile: _digest(self.manifest, layer, tile, words[tile.part]) for tile in tiles},
                lambda future: self._digested(layer.index, future),
                nbytes=sum(tile.spec(self.manifest.dtype, layer.head_dim(tile.part)).nbytes for tile in tiles),
            )

    def _digested(self, layer: int, future: Future[dict[Tile, bytes]]) -> None:
        error = future.exception()
        if error is not None:
            self._break(error)
            return
        self._know(layer, future.result())
        self._peer.pump()

    def _know(self, layer: int, digests: dict[Tile, bytes]) -> None:
        """Digests of some tiles are known; with the last of them the layer ends."""
        if layer not in self._digests:  # a resend
            return
        tiles, known = self._digests[layer]
        known.update(digests)
        if len(known) == len(tiles):
            del self._digests[layer]
            self._peer.connection.end_layer(self.id, layer, [known[tile] for tile in tiles], time.monotonic())
            self._try_finish()

    def _try_finish(self) -> None:
        if self._finishing and not self._planning and not self._digests:
            self._peer.connection.finish(self.id, time.monotonic())
            self._peer.pump()

    def _break(self, error: BaseException) -> None:
        """Encoding failed: a codec's error is the caller's to see, anything else is a bug that must not hang."""
        self.fail(error if isinstance(error, LynxError) else LocalError(f"encoding failed: {error!r}"))
        self._peer.connection.cancel(
            self.id, time.monotonic(), code=ErrorCode.INTERNAL, text="the sender could not encode a chunk"
        )
        self._peer.pump()


def _some(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
