"""The ``session`` operation: what one side of a recorded conversation must make of it. spec/conformance.md, "session".

A script holds the bytes of both directions. Those of the observed side tell what it has said; those of its peer are
given to a :class:`~lynxproto.connection.Connection`, which decides. Time stands still.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from lynxproto import events as ev
from lynxproto import frames
from lynxproto.chunk import Tile
from lynxproto.codecs import get_codec
from lynxproto.config import Config, Limits, Secret
from lynxproto.conformance.plain import unhex
from lynxproto.connection import Connection
from lynxproto.digest import tile_digest
from lynxproto.errors import ErrorCode, PayloadError, PeerError, RemoteError
from lynxproto.frames import HEADER_SIZE, Header, TileKey
from lynxproto.manifest import Identity, Manifest

__all__ = ["Receiving", "observe", "split"]


def split(data: bytes) -> list[tuple[Header, bytes, bytes]]:
    """Header, extension and payload of whole frames."""
    found = []
    at = 0
    while at < len(data):
        header = Header.unpack(data[at : at + HEADER_SIZE])
        middle = at + HEADER_SIZE + header.extension_length
        found.append((header, data[at + HEADER_SIZE : middle], data[middle : middle + header.payload_length]))
        at = middle + header.payload_length
    return found


class _Replay(Random):
    """Ids, nonces and tokens as the script has them."""

    def __init__(self) -> None:
        super().__init__(0)
        self.strings: deque[bytes] = deque()
        self.ids: deque[int] = deque()

    def randbytes(self, n: int) -> bytes:
        return self.strings.popleft() if self.strings else bytes(n)

    def getrandbits(self, k: int) -> int:
        return self.ids.popleft() if self.ids and k == 128 else super().getrandbits(k)


@dataclass
class Receiving:
    """A transfer that is being received, decoded as it comes."""

    manifest: Manifest
    outcome: str = "offered"
    code: int | None = None
    level: int | None = None
    corrupt: int = 0
    restarted: int = 0
    result: dict[str, Any] | None = None
    planned: list[Tile] = field(default_factory=list)
    payloads: dict[Tile, list[bytes]] = field(default_factory=dict)
    words: dict[Tile, Any] = field(default_factory=dict)
    digests: dict[Tile, bytes] = field(default_factory=dict)
    verified: set[Tile] = field(default_factory=set)

    def on_event(self, event: ev.Event, connection: Connection) -> None:
        """Take in one event of this transfer, and report what became of it."""
        match event:
            case ev.PlanReceived():
                self.planned += event.tiles
            case ev.LayerEnded():
                tiles = [tile for tile in self.planned if tile.layer == event.layer]
                self.digests |= dict(zip(tiles, event.digests, strict=True))
                for tile in tiles:
                    self._verify(event.transfer, tile, connection)
            case ev.ChunkReceived():
                self._on_chunk(event, connection)
            case ev.ResultReceived():
                self.result = {"token": event.first_token, "gap": event.logit_gap}
            case ev.LevelsCancelled():
                self.level = event.level
            case ev.TransferComplete():
                self.outcome = "complete"
            case ev.Cancelled():
                self.outcome, self.code = "cancelled", int(event.code)
            case ev.TransferFailed():
                assert isinstance(event.error, RemoteError)
                self.outcome, self.code = "failed", int(event.error.code)

    def _on_chunk(self, event: ev.ChunkReceived, connection: Connection) -> None:
        tile = event.tile
        before = [] if event.level == 0 else self.payloads[tile]
        payloads = [*before, bytes(event.payload)]
        spec = tile.spec(self.manifest.dtype, self.manifest.layer(tile.layer).head_dim(tile.part))
        words = np.zeros(spec.shape, spec.word_dtype)
        try:
            get_codec(self.manifest.codecs[tile.codec]).decode(spec, payloads, words)
        except PayloadError as error:
            self._fail(event.transfer, tile, connection, error.code, str(error))
            return
        self.payloads[tile], self.words[tile] = payloads, words
        connection.applied(event.transfer, tile, event.level, 0.0)
        self._verify(event.transfer, tile, connection)

    def _verify(self, transfer: int, tile: Tile, connection: Connection) -> None:
        digest = self.digests.get(tile)
        codec = get_codec(self.manifest.codecs[tile.codec])
        if not digest or tile in self.verified or len(self.payloads.get(tile, ())) < codec.levels:
            return
        spec = tile.spec(self.manifest.dtype, self.manifest.layer(tile.layer).head_dim(tile.part))
        if tile_digest(spec, self.words[tile]) == digest:
            self.verified.add(tile)
            connection.tile_verified(transfer, tile, 0.0)
        else:
            self._fail(transfer, tile, connection, ErrorCode.DIGEST, "")

    def _fail(self, transfer: int, tile: Tile, connection: Connection, code: ErrorCode, text: str) -> None:
        self.restarted += 1
        self.payloads.pop(tile, None)
        self.words.pop(tile, None)
        connection.tile_failed(transfer, tile, 0.0, code, text)

    def summary(self) -> dict[str, Any]:
        """What the ``session`` operation tells of it."""
        found: dict[str, Any] = {"outcome": self.outcome}
        for name in ("code", "level", "result"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        found |= {"corrupt": self.corrupt, "restarted": self.restarted}
        if self.outcome in ("receiving", "complete"):
            tiles = sorted((t for t in self.planned if t in self.words), key=lambda t: t.layer)
            found["tiles"] = [
                {
                    "tile": [tile.layer, *TileKey.of(tile).as_list()[:6], TileKey.of(tile).bitmap.hex()],
                    "level": len(self.payloads[tile]) - 1,
                    "verified": tile in self.verified,
                    "words": self.words[tile].tobytes().hex(),
                }
                for tile in tiles
            ]
        return found


class _Cutter:
    """Cuts the peer's bytes where headers and frames end, and knows where the present frame began."""

    def __init__(self) -> None:
        self.start = self.total = 0
        self._head = b""
        self._left = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            if len(self._head) == HEADER_SIZE and not self._left:
                self.start, self._head = self.total, b""
            n = self._left or HEADER_SIZE - len(self._head)
            piece, data = data[:n], data[n:]
            self.total += len(piece)
            if self._left:
                self._left -= len(piece)
            else:
                self._head += piece
                if len(self._head) == HEADER_SIZE:
                    lengths = (self._head[12:16], self._head[52:56])
                    self._left = sum(int.from_bytes(length, "little") for length in lengths)
            yield piece


class _Observer:
    """One side of a script."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.role = request["role"]
        self.script = request["script"]
        self.random = _Replay()
        self.payloads: dict[tuple[int, TileKey, int], bytes] = {}
        said = b"".join(unhex(step["data"]) for step in self.script if step.get("from") == self.role)
        config = self._prepare(split(said), request)
        self.connection = Connection(config, client=self.role == "client", random=self.random)
        self.stripes: dict[int, int] = {}
        self.cutters: dict[int, _Cutter] = {}
        self.incoming: dict[int, Receiving] = {}
        self.outgoing: dict[int, dict[str, Any]] = {}
        self.unended: dict[int, set[int]] = {}
        self.done: set[tuple[int, int, bytes]] = set()
        self.answer: dict[str, Any] = {}
        self.at: tuple[int, int] = (0, 0)

    def _prepare(self, said: list[tuple[Header, bytes, bytes]], request: dict[str, Any]) -> Config:
        """What this side drew at random, and what it said of itself in HELLO."""
        config: dict[str, Any] = {"grease": False, "tables": frozenset(map(unhex, request.get("tables", ())))}
        if request.get("secret"):
            config["secrets"] = (Secret(key=unhex(request["secret"]), id=request.get("secret_id", "")),)
        config["identity"] = Identity(**request["identity"]) if request.get("identity") else None
        if request.get("limits"):
            config["limits"] = Limits(**request["limits"])
        for header, extension, payload in said:
            kind = header.type
            if kind == frames.FrameType.DATA:
                key = header.key(extension[:-4])
                self.payloads.setdefault((header.transfer, key, header.level), payload)
                continue
            if not header.known:
                continue
            body = frames.parse_body(header, payload, Limits())
            if isinstance(body, frames.Hello):
                if body.token:
                    self.random.strings += [body.session, body.token]
                self.random.strings.append(body.nonce)
                names = ("name", "lease", "limits", "codecs", "features")
                config |= {name: getattr(body, name) for name in names}
            elif isinstance(body, frames.Open | frames.Fetch) and header.transfer not in self.random.ids:
                self.random.ids.append(header.transfer)
        return Config(**config)

    def run(self) -> dict[str, Any]:
        for step in self.script:
            stripe = step.get("stripe", 0)
            if stripe not in self.stripes:
                self.stripes[stripe] = self.connection.open_stripe(0.0)
                self.cutters[stripe] = _Cutter()
            if step.get("event") == "lost":
                self.connection.stripe_lost(self.stripes[stripe], 0.0)
            elif step["from"] == self.role:
                self._own(stripe, unhex(step["data"]))
            else:
                self._peer(stripe, unhex(step["data"]))
            if "code" in self.answer:
                return self.answer
        for stripe in self.stripes:
            self._drain(stripe)
        if "ended" not in self.answer:
            self.answer["state"] = self.connection._state.value
        for t, received in self.incoming.items():
            received.corrupt = self.connection.transfer_counters(t).corrupt
        transfers = {t: received.summary() for t, received in self.incoming.items()} | self.outgoing
        self.answer["transfers"] = {f"{t:032x}": summary for t, summary in sorted(transfers.items())}
        return self.answer

    # --- bytes

    def _peer(self, stripe: int, data: bytes) -> None:
        cutter = self.cutters[stripe]
        for piece in cutter.pieces(data):
            self.at = (stripe, cutter.start)
            self.connection.receive_data(piece, 0.0, self.stripes[stripe])
            self._events()
            if self.answer:
                return

    def _own(self, stripe: int, data: bytes) -> None:
        """This side said so: bring its connection to the same state."""
        connection = self.connection
        for header, _, payload in split(data):
            t = header.transfer
            if not header.known or header.type == frames.FrameType.DATA:
                continue
            body = frames.parse_body(header, payload, Limits())
            seen = (t, header.type, payload)
            again = seen in self.done
            self.done.add(seen)
            match body:
                case frames.Hello():  # later implementations may have more to say in it; proofs cover this one
                    connection._stripes[self.stripes[stripe]].my_hello = payload
                case frames.Accept() if t in self.incoming and self.incoming[t].outcome == "offered":
                    connection.accept(t, 0.0, body.wants)
                    self.incoming[t].outcome = "receiving"
                case frames.Reject() if t in self.incoming and self.incoming[t].outcome == "offered":
                    connection.reject(t, body.code, body.text, 0.0)
                case frames.Cancel() if t in self.incoming and not again:
                    connection.cancel(t, 0.0, None if body.above < 0 else body.above, body.code, body.text)
                case frames.Urgent() if t in self.incoming:
                    connection.urgent(t, 0.0)
                case frames.Fetch() if not again:
                    connection.fetch(body.key, 0.0, body.wants, body.lease)
                case frames.GoAway():
                    connection.close(0.0, body.code, body.text)
                case _ if not again:
                    self._send(t, body)
        while (request := connection.next_chunk(0.0)) is not None:
            key = TileKey.of(request.tile)
            if (request.transfer, key, request.level) not in self.payloads:
                break  # it was not yet said when the script ends
            chunk = self.payloads[request.transfer, key, request.level]
            connection.chunk_encoded(request.transfer, request.tile, request.level, chunk, 0.0)
        self._drain(stripe)
        self._events()

    def _send(self, t: int, body: frames.Body) -> None:
        """What a sender says of a transfer."""
        connection = self.connection
        match body:
            case frames.Open():
                manifest = Manifest.from_bytes(body.manifest, Limits())
                connection.open(manifest, 0.0, fetch=body.fetch)
                self.outgoing[t] = {"outcome": "offered"}
                self.unended[t] = {layer.index for layer in manifest.layers}
            case frames.Plan():
                connection.plan(t, body.layer, [key.tile() for key in body.tiles], 0.0)
            case frames.End():
                connection.end_layer(t, body.layer, body.digests, 0.0)
                self.unended[t].discard(body.layer)
                if not self.unended[t]:
                    connection.finish(t, 0.0)
            case frames.Result():
                connection.result(t, body.first_token, body.logit_gap, 0.0)
            case frames.NotFound():
                connection.not_found(t, 0.0)

    def _drain(self, stripe: int) -> None:
        """What it would say: refused offers are visible in no other way."""
        said = b"".join(bytes(part) for part in self.connection.data_to_send(0.0, self.stripes[stripe], 1 << 40))
        for header, _, payload in split(said):
            if header.type == frames.FrameType.REJECT:
                body = frames.parse_body(header, payload, Limits())
                assert isinstance(body, frames.Reject)
                found = self.incoming.get(header.transfer)
                if found is not None:
                    found.outcome, found.code = "rejected", int(body.code)
                else:
                    self.outgoing[header.transfer] = {"outcome": "rejected", "code": int(body.code)}

    # --- what becomes of them

    def _events(self) -> None:
        closed: RemoteError | None = None
        while (event := self.connection.next_event()) is not None:
            transfer = getattr(event, "transfer", None)
            if isinstance(event, ev.ConnectionFailed):
                self._ended(event.error, "session")
            elif isinstance(event, ev.ConnectionClosed):
                self.answer["ended"] = 0
            elif isinstance(event, ev.StripeClosed):
                if event.stripe == self.stripes[self.at[0]]:  # others end because the peer has lost them: no fault
                    closed = event.error
            elif isinstance(event, ev.TransferOffered):
                self.incoming[event.transfer] = Receiving(event.manifest)
            elif isinstance(event, ev.FetchFailed):
                code = event.error.code
                self.outgoing[event.request] = {"outcome": "not found", "code": int(code)}
            elif transfer in self.incoming:
                self.incoming[transfer].on_event(event, self.connection)
            elif transfer in self.outgoing:
                self._sending(self.outgoing[transfer], event)
        if closed is not None and not self.answer:
            self._ended(closed, "stripe")

    @staticmethod
    def _sending(t: dict[str, Any], event: ev.Event) -> None:
        match event:
            case ev.TransferAccepted():
                t["outcome"] = "sending"
            case ev.TransferRejected():
                t |= {"outcome": "rejected", "code": int(event.code)}
            case ev.Cancelled():
                t |= {"outcome": "cancelled", "code": int(event.code)}
            case ev.TransferFailed():
                t |= {"outcome": "failed", "code": int(event.error.code)}
            case ev.LevelsCancelled():
                t["level"] = event.level
            case ev.TransferReleased(complete=True):
                t["outcome"] = "complete"

    def _ended(self, error: RemoteError, scope: str) -> None:
        if isinstance(error, PeerError):
            self.answer["ended"] = int(error.code)
        elif "ended" not in self.answer:
            stripe, offset = self.at
            self.answer = {"code": int(error.code), "scope": scope, "stripe": stripe, "offset": offset}


def observe(request: dict[str, Any]) -> dict[str, Any]:
    """The ``session`` operation."""
    return _Observer(request).run()
