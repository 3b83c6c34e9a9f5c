"""What a decode worker has been offered, and the requests that wait for it. No I/O, no threads; time is an argument.

A *piece* is one transfer: some heads and tokens of a cache (a chunk of a chunked prefill, a rank of the prefill side).
A *claim* is a request of this side: heads and tokens that its blocks must be filled with. They meet by name, in any
order. A claim is done when exact pieces that it has been filled from cover it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import DTYPES
from lynxproto.errors import ErrorCode, LimitError, LynxError, PeerError
from lynxproto.integrations.vllm.metadata import Load
from lynxproto.manifest import Identity, LayerSpec, Manifest

__all__ = ["Cache", "Inbox", "Outcome", "Piece"]

_PARTS = ("key", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """What this worker's KV cache is: its pieces must fit it."""

    identity: Identity
    dtype: str
    layers: tuple[int, ...]
    heads: range
    """Of the whole model's KV heads, those that this worker has."""
    key_dim: int
    value_dim: int
    max_tokens: int

    def check(self, manifest: Manifest) -> None:
        """Raise :class:`~lynxproto.errors.PeerError` (IDENTITY) for a piece of anything else, before memory is made."""
        reason = self.identity.mismatch(manifest.identity)
        if reason is None and manifest.dtype != self.dtype:
            reason = f"dtype is {manifest.dtype}, expected {self.dtype}"
        if reason is None and manifest.packing:
            reason = f"pages are packed as {manifest.packing!r}, expected rows"
        if reason is None and manifest.lossy:
            reason = "the transfer is lossy"
        for layer in manifest.layers:
            reason = reason or self._misfit(layer)
        if reason is not None:
            raise PeerError(f"not a cache for this worker: {reason}", ErrorCode.IDENTITY)

    def _misfit(self, layer: LayerSpec) -> str | None:
        if layer.index not in self.layers:
            return f"there is no layer {layer.index}"
        if layer.parts != _PARTS or (layer.key_dim, layer.value_dim) != (self.key_dim, self.value_dim):
            mine = f"key and value of {self.key_dim} and {self.value_dim}"
            return f"layer {layer.index} holds {layer.parts} of {layer.key_dim} and {layer.value_dim}, expected {mine}"
        heads = range(layer.head_start, layer.head_start + layer.kv_heads)
        if heads[0] not in self.heads or heads[-1] not in self.heads:
            return f"layer {layer.index} has heads {heads}, this worker {self.heads}"
        if layer.token_stop > self.max_tokens:
            return (
                f"layer {layer.index} has {layer.token_stop} tokens, this worker's sequences at most {self.max_tokens}"
            )
        return None


@dataclass(slots=True, eq=False)
class Piece:
    """One transfer that was offered: rows in host memory, until they are in the blocks of who claims it."""

    manifest: Manifest
    arrays: Mapping[tuple[int, Any], NDArray[Any]]
    offered: float
    exact: list[LayerSpec] = field(default_factory=list)
    """Layers that are here, every digest verified."""
    dropped: bool = False
    """Nobody wants it (any more): its transfer should be cancelled."""
    wire_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A claim that is over: the request's blocks hold verified words, or ``error`` says why not."""

    request: str
    made: float
    """When the claim was made."""
    error: LynxError | None = None
    wire_bytes: int = 0
    cache_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Claim:
    load: Load
    made: float
    pieces: list[Piece]
    quiet: float
    """Since when nothing has been under way for it, if nothing is."""

    @property
    def idle(self) -> bool:
        """Whether no transfer is under way: none was offered, or those that were are complete, and more must come."""
        return all(len(piece.exact) == len(piece.manifest.layers) for piece in self.pieces)


#: Puts a layer's rows into blocks: (load, layer, keys, values).
Fill = Callable[[Load, LayerSpec, NDArray[Any], NDArray[Any]], None]


class Inbox:
    """Pieces and claims of one worker; threads share it under a lock of their own."""

    def __init__(
        self, cache: Cache, fill: Fill, *, idle: float, timeout: float, lease: float, buffer_bytes: int
    ) -> None:
        self._cache = cache
        self._fill = fill
        self._idle, self._timeout, self._lease = idle, timeout, lease
        self._room = buffer_bytes
        self._pieces: dict[str, list[Piece]] = {}
        self._claims: dict[str, _Claim] = {}
        self._failed: dict[
            str, tuple[float, LynxError]
        ] = {}  # names of which a piece failed, and until when they are remembered
        self.outcomes: list[Outcome] = []

    # --- pieces

    def offer(self, manifest: Manifest, now: float) -> Piece:
        """Make room for a transfer. Raises :class:`~lynxproto.errors.RemoteError` if it does not fit."""
        name = manifest.request_id
        self._cache.check(manifest)
        if manifest.nbytes > self._room:
            raise LimitError(f"{manifest.nbytes} bytes do not fit into the {self._room} that are left of buffer_bytes")
        self._room -= manifest.nbytes
        word = DTYPES[manifest.dtype]
        arrays = {
            (layer.index, part): np.empty((layer.kv_heads, layer.tokens, layer.head_dim(part)), word)
            for layer in manifest.layers
            for part in layer.parts
        }
        piece = Piece(manifest, arrays, now)
        self._pieces.setdefault(name, []).append(piece)
        claim = self._claims.get(name)
        if claim is not None:
            claim.pieces.append(piece)
        return piece

    def layer_exact(self, piece: Piece, layer: LayerSpec, wire_bytes: int, now: float) -> None:
        """A layer of a piece is here and verified; ``wire_bytes`` of the piece have come so far."""
        piece.wire_bytes = wire_bytes
        if piece.dropped:
            return
        piece.exact.append(layer)
        claim = self._claims.get(piece.manifest.request_id)
        if claim is not None:
            claim.quiet = now
            self._fill_layer(claim, piece, layer)
            self._try_finish(claim)

    def piece_failed(self, piece: Piece, error: LynxError, now: float) -> None:
        """A transfer ended without being exact."""
        if not piece.dropped:
            self.refused(piece.manifest.request_id, error, now)

    def refused(self, name: str, error: LynxError, now: float) -> None:
        """Some part of a cache will not come: whoever waits for it, or will, is told."""
        claim = self._claims.get(name)
        if claim is not None:
            self._end(claim, error)
        else:
            self.drop(name)
            self._failed[name] = (now + self._lease, error)

    # --- claims

    def claim(self, load: Load, now: float) -> None:
        """A request waits for a cache."""
        claim = _Claim(load, now, list(self._pieces.get(load.name, ())), now)
        if load.name in self._claims:
            error = LynxError(f"request {self._claims[load.name].load.request} waits for the same cache already")
            self.outcomes.append(Outcome(load.request, now, error))
            return
        self._claims[load.name] = claim
        if (failed := self._failed.pop(load.name, None)) is not None:
            self._end(claim, failed[1])
            return
        for piece in claim.pieces:
            for layer in piece.exact:
                self._fill_layer(claim, piece, layer)
        self._try_finish(claim)

    def abort(self, request: str) -> None:
        """A request waits no more; its blocks are written no more when this returns."""
        for claim in list(self._claims.values()):
            if claim.load.request == request:
                self._end(claim, LynxError(f"request {request} was aborted"))

    def drop(self, name: str) -> None:
        """No request will claim this cache."""
        for piece in list(self._pieces.get(name, ())):
            self._forget(piece)
        self._failed.pop(name, None)

    # --- time

    def next_timer(self) -> float | None:
        """When :meth:`handle_timer` has something to do."""
        times = [self._until(claim) for claim in self._claims.values()]
        times += [p.offered + self._timeout + self._lease for pieces in self._pieces.values() for p in pieces]
        times += [until for until, _ in self._failed.values()]
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        """Fail claims that waited too long, and forget what nobody claimed."""
        for claim in list(self._claims.values()):
            if now >= self._until(claim):
                text = f"not complete after {self._timeout:g} s"
                if now < claim.made + self._timeout:
                    missing = "some" if claim.pieces else "all"
                    text = f"nothing on its way for {self._idle:g} s, and {missing} of it missing"
                self._end(claim, LynxError(f"{claim.load.name}: {text}"))
        for name, pieces in list(self._pieces.items()):
            for piece in list(pieces):
                if name not in self._claims and now >= piece.offered + self._timeout + self._lease:
                    self._forget(piece)
        self._failed = {name: entry for name, entry in self._failed.items() if now < entry[0]}

    def _until(self, claim: _Claim) -> float:
        """When a claim fails, if nothing happens."""
        deadline = claim.made + self._timeout
        return min(deadline, claim.quiet + self._idle) if claim.idle else deadline

    # --- inside

    def _fill_layer(self, claim: _Claim, piece: Piece, layer: LayerSpec) -> None:
        """Copy what the claim wants of a layer's rows; tokens that it has cached itself are left alone."""
        start, stop = max(layer.token_start, claim.load.start), min(layer.token_stop, claim.load.stop)
        if start < stop:
            rows = slice(start - layer.token_start, stop - layer.token_start)
            keys, values = (piece.arrays[layer.index, part][:, rows] for part in _PARTS)
            self._fill(claim.load, replace(layer, token_start=start, token_stop=stop), keys, values)

    def _try_finish(self, claim: _Claim) -> None:
        if self._covered(claim):
            self._end(claim, None)

    def _covered(self, claim: _Claim) -> bool:
        rectangles: dict[int, list[LayerSpec]] = {index: [] for index in self._cache.layers}
        for piece in claim.pieces:
            for layer in piece.exact:
                rectangles[layer.index].append(layer)
        seen: set[tuple[tuple[int, int, int, int], ...]] = set()
        for layers in rectangles.values():
            shape = tuple((s.head_start, s.head_start + s.kv_heads, s.token_start, s.token_stop) for s in layers)
            if shape not in seen and not covers(shape, self._cache.heads, range(claim.load.start, claim.load.stop)):
                return False
            seen.add(shape)
        return True

    def _end(self, claim: _Claim, error: LynxError | None) -> None:
        name = claim.load.name
        del self._claims[name]
        wire = sum(piece.wire_bytes for piece in claim.pieces)
        size = sum(piece.manifest.nbytes for piece in claim.pieces)
        self.drop(name)
        self.outcomes.append(Outcome(claim.load.request, claim.made, error, wire, size))

    def _forget(self, piece: Piece) -> None:
        piece.dropped = True
        pieces = self._pieces.get(piece.manifest.request_id, [])
        if piece in pieces:
            pieces.remove(piece)
            self._room += piece.manifest.nbytes
            if not pieces:
                del self._pieces[piece.manifest.request_id]


def covers(rectangles: Iterable[tuple[int, int, int, int]], heads: range, tokens: range) -> bool:
    """Whether (head start, head stop, token start, token stop) rectangles together cover ``heads`` x ``tokens``."""
    if not heads or not tokens:
        return True
    boxes = list(rectangles)
    cuts = sorted({heads.start, *(edge for box in boxes for edge in box[:2] if edge in heads)})
    for head in cuts:
        at = tokens.start
        for start, stop in sorted((box[2], box[3]) for box in boxes if box[0] <= head < box[1]):
            if start > at:
                break
            at = max(at, stop)
        if at < tokens.stop:
            return False
    return True
