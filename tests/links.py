"""Two connections, tiny caches, and links between them that lose, reorder, duplicate, corrupt and cut.

No sockets, no clock: time is a number that the test moves. A :class:`Shell` does what a session does (encode, decode,
verify) on caches of a few bytes; a :class:`World` carries frames between two shells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from lynxproto import events as ev
from lynxproto.chunk import ChunkSpec, Tile, TokenSet
from lynxproto.codecs import register_codec
from lynxproto.codecs.abc import Codec, DecodeState
from lynxproto.config import Config, Limits
from lynxproto.connection import Connection
from lynxproto.digest import tile_digest
from lynxproto.errors import ErrorCode
from lynxproto.frames import HEADER_SIZE, Header, HeldLayer, Plan, TileKey
from lynxproto.manifest import Identity, LayerSpec, Manifest


@register_codec
class Sliced(Codec):
    """Level i is every n-th byte of the words, from the i-th on: as many levels as a test wants, and exact."""

    codec_id = "test-sliced"
    wire_id = 0x8001

    def __init__(self, levels: int = 3, exact: bool = True) -> None:
        self._levels, self._exact = levels, exact

    @property
    def levels(self) -> int:
        return self._levels

    @property
    def exact(self) -> bool:
        return self._exact

    def supports(self, spec: ChunkSpec) -> bool:
        return True

    def encode(self, spec: ChunkSpec, array: Any, *, levels: Any = None, threads: int = 1) -> list[bytes]:
        data = array.tobytes()
        return [data[i :: self._levels] for i in (range(self._levels) if levels is None else levels)]

    def decode(self, spec: ChunkSpec, levels: Any, out: Any, *, threads: int = 1) -> DecodeState:
        raise AssertionError("a connection never decodes")

    def refine(self, *args: Any, **kw: Any) -> DecodeState:
        raise AssertionError("a connection never decodes")

    def max_encoded_size(self, spec: ChunkSpec, level: int) -> int:
        return -(-spec.nbytes // self._levels)

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id, "levels": self._levels, "exact": self._exact}


def small_config(**kw: Any) -> Config:
    """A configuration with windows of a few chunks, so that credit matters."""
    limits = kw.pop("limits", None) or Limits(session_window=2048, transfer_window=1024, transfers=8, layers=16)
    defaults: dict[str, Any] = {"codecs": ("raw", "test-sliced"), "encode_ahead": 600, "ack_delay": 0.0}
    return Config(**{**defaults, **kw}, limits=limits)


def cache(seed: int = 0, layers: int = 2, heads: int = 2, tokens: int = 12, dim: int = 4) -> dict[Any, Any]:
    """Words of a small cache: ``{(layer, part): [heads, tokens, dim]}``."""
    rng = np.random.default_rng(seed)
    return {
        (layer, part): rng.integers(0, 1 << 16, (heads, tokens, dim), np.uint16)
        for layer in range(layers)
        for part in ("key", "value")
    }


def manifest_of(words: dict[Any, Any], levels: int = 3, **kw: Any) -> Manifest:
    heads, tokens, dim = words[0, "key"].shape
    layers = tuple(
        LayerSpec(index=i, kv_heads=heads, key_dim=dim, value_dim=dim, token_stop=tokens)
        for i in sorted({layer for layer, _ in words})
    )
    exact = not kw.get("lossy", False)
    defaults: dict[str, Any] = {
        "identity": Identity(model="m"),
        "dtype": "bfloat16",
        "prompt_tokens": tokens,
        "codecs": ({"id": "test-sliced", "levels": levels, "exact": exact}, {"id": "raw"}),
    }
    return Manifest(**{**defaults, **kw}, layers=layers)


def tiles_of(manifest: Manifest, layer: int, step: int = 5) -> tuple[Tile, ...]:
    """Raw tiles of the first token, then tiles of ``step`` tokens, the last two being explicit interleaved sets."""
    spec = manifest.layer(layer)
    tiles = []
    for part in spec.parts:

        def add(tokens: TokenSet, codec: int, part: Any = part) -> None:
            tiles.append(Tile(layer, part, spec.head_start, spec.kv_heads, tokens, codec))

        add(TokenSet.range(0, 1), 1)
        last = spec.token_stop - step
        for start in range(1, last, step):
            add(TokenSet.range(start, min(start + step, last)), 0)
        for odd in (0, 1):
            add(TokenSet.of(range(last + odd, spec.token_stop, 2)), 0)
    return tuple(tiles)


def tile_words(words: dict[Any, Any], tile: Tile) -> Any:
    whole = words[tile.layer, tile.part]
    return whole[tile.head_start : tile.head_start + tile.heads][:, list(tile.tokens)]


@dataclass
class Received:
    """What a shell holds of an incoming transfer."""

    manifest: Manifest
    levels: dict[Tile, list[bytes]] = field(default_factory=dict)
    plan: dict[Tile, int] = field(default_factory=dict)
    digests: dict[Tile, bytes] = field(default_factory=dict)
    attempts: dict[Tile, int] = field(default_factory=dict)
    verified: set[Tile] = field(default_factory=set)
    result: tuple[int, float | None] | None = None
    cut: int = 99
    complete: bool = False
    released: bool | None = None
    error: Any = None
    before: Received | None = None  # what was kept of the same transfer in another session

    def held(self) -> list[HeldLayer]:
        """What a receiver that kept all this would say in ACCEPT."""
        layers = []
        for index in {tile.layer: None for tile in self.plan}:
            tiles = [tile for tile in self.plan if tile.layer == index]
            levels = tuple(self.manifest.codecs[tile.codec].get("levels", 1) for tile in tiles)
            plan = Plan(layer=index, tiles=tuple(TileKey.of(tile) for tile in tiles), levels=levels)
            layers.append(HeldLayer(index, plan.digest(), bytes(len(self.levels[tile]) for tile in tiles)))
        return layers

    def spec(self, tile: Tile) -> ChunkSpec:
        return tile.spec(self.manifest.dtype, self.manifest.layer(tile.layer).head_dim(tile.part))

    def words(self, tile: Tile) -> Any:
        """The words of a tile whose levels are all here."""
        parts = self.levels[tile]
        data = np.zeros(self.spec(tile).nbytes, np.uint8)
        for i, part in enumerate(parts):
            data[i :: len(parts)] = np.frombuffer(part, np.uint8)
        return data.view("<u2").reshape(self.spec(tile).shape)


class Shell:
    """A connection and the simplest honest user of it."""

    def __init__(self, config: Config, *, client: bool, seed: int = 0) -> None:
        self.land: Any = lambda transfer, tile: None  # where the words of a tile belong
        self.connection = Connection(config, client=client, random=Random(seed), land=self._land, unix_offset=0.0)
        self.log: list[Any] = []
        self.sent: dict[int, tuple[Manifest, dict[Any, Any]]] = {}
        self.released: dict[int, bool] = {}
        self.errors: dict[int, Any] = {}
        self.received: dict[int, Received] = {}
        self.kept: dict[bytes, Received] = {}  # resume key -> what outlives a session, and this process
        self.accepts: Any = lambda event: None  # wants, or an exception's (code, text) to reject
        self.hold = False  # keep received chunks instead of applying them
        self.waiting: list[ev.ChunkReceived] = []
        self.bad_tiles: dict[Tile, int] = {}  # fail verification so many times
        self.lazy = False  # do not encode
        self.lied_to = False  # words may differ from their digest though all checksums are right
        self.encoded = 0
        self.requests: list[ev.FetchRequested] = []

    def _land(self, transfer: int, tile: Tile) -> memoryview | None:
        place: memoryview | None = self.land(transfer, tile)
        return place

    def send(self, words: dict[Any, Any], now: float, *, finish: bool = True, **kw: Any) -> int:
        """Open a transfer of a whole cache and say everything at once."""
        open_kw = {k: kw.pop(k) for k in ("fetch", "deadline", "resume") if k in kw}
        step = kw.pop("step", 5)
        manifest = manifest_of(words, **kw)
        c = self.connection
        transfer = c.open(manifest, now, **open_kw)
        self.sent[transfer] = (manifest, words)
        for spec in manifest.layers:
            self.send_layer(transfer, spec.index, now, step)
        c.result(transfer, 7, 1.5, now)
        if finish:
            c.finish(transfer, now)
        return transfer

    def send_layer(self, transfer: int, layer: int, now: float, step: int = 5) -> None:
        manifest, words = self.sent[transfer]
        tiles = tiles_of(manifest, layer, step)
        self.connection.plan(transfer, layer, tiles, now)
        digests = [b"" if manifest.lossy else self._digest(manifest, words, tile) for tile in tiles]
        self.connection.end_layer(transfer, layer, digests, now)

    @staticmethod
    def _digest(manifest: Manifest, words: dict[Any, Any], tile: Tile) -> bytes:
        spec = tile.spec(manifest.dtype, manifest.layer(tile.layer).head_dim(tile.part))
        return tile_digest(spec, tile_words(words, tile))

    def encode(self, now: float) -> None:
        while not self.lazy and (request := self.connection.next_chunk(now)) is not None:
            manifest, words = self.sent[request.transfer]
            data = np.ascontiguousarray(tile_words(words, request.tile)).tobytes()
            n = manifest.codecs[request.tile.codec].get("levels", 1)
            self.connection.chunk_encoded(request.transfer, request.tile, request.level, data[request.level :: n], now)
            self.encoded += 1

    def handle_events(self, now: float) -> None:
        while (event := self.connection.next_event()) is not None:
            self.log.append(event)
            handler = getattr(self, "on_" + type(event).__name__, None)
            if handler is not None:
                handler(event, now)

    def seen(self, kind: type) -> list[Any]:
        return [event for event in self.log if isinstance(event, kind)]

    # sending

    def on_TransferReleased(self, event: ev.TransferReleased, now: float) -> None:
        if event.transfer in self.received:
            got = self.received[event.transfer]
            assert got.released is None, "released twice"
            got.released = event.complete
        elif event.transfer in self.sent:
            assert event.transfer not in self.released, "released twice"
            self.released[event.transfer] = event.complete

    def on_TransferFailed(self, event: ev.TransferFailed, now: float) -> None:
        if event.transfer in self.received:
            self.received[event.transfer].error = event.error
        self.errors[event.transfer] = event.error

    def on_FetchRequested(self, event: ev.FetchRequested, now: float) -> None:
        self.requests.append(event)

    # receiving

    def on_TransferOffered(self, event: ev.TransferOffered, now: float) -> None:
        assert event.transfer not in self.received, "offered twice"
        before = self.kept.get(event.resume)
        if before is not None and before.manifest != event.manifest:
            before = None
        got = self.received[event.transfer] = Received(event.manifest, before=before)
        if event.resume:
            self.kept[event.resume] = got
        answer = self.accepts(event)
        if isinstance(answer, ErrorCode):
            self.connection.reject(event.transfer, answer, "no", now)
        elif answer != "later":
            self.connection.accept(event.transfer, now, answer, before.held() if before else ())

    def on_PlanReceived(self, event: ev.PlanReceived, now: float) -> None:
        got = self.received[event.transfer]
        for tile, levels, held in zip(event.tiles, event.levels, event.held, strict=True):
            assert tile not in got.plan, "planned twice"
            got.plan[tile] = levels
            got.levels[tile] = got.before.levels[tile][:held] if held and got.before else []
            for level in range(held):
                self.connection.applied(event.transfer, tile, level, now)

    def on_ChunkReceived(self, event: ev.ChunkReceived, now: float) -> None:
        if self.hold:
            self.waiting.append(event)
        else:
            self.apply(event, now)

    def apply(self, event: ev.ChunkReceived, now: float) -> None:
        got = self.received[event.transfer]
        if got.attempts.get(event.tile, 0) != event.attempt:
            got.attempts[event.tile] = event.attempt
            got.levels[event.tile] = []
        assert len(got.levels[event.tile]) == event.level, "out of order"
        got.levels[event.tile].append(bytes(event.payload))
        self.connection.applied(event.transfer, event.tile, event.level, now)
        self._verify(event.transfer, event.tile, now)

    def on_LayerEnded(self, event: ev.LayerEnded, now: float) -> None:
        got = self.received[event.transfer]
        tiles = [tile for tile in got.plan if tile.layer == event.layer]
        for tile, digest in zip(tiles, event.digests, strict=True):
            got.digests[tile] = digest
            self._verify(event.transfer, tile, now)

    def _verify(self, transfer: int, tile: Tile, now: float) -> None:
        got = self.received[transfer]
        total = got.manifest.codecs[tile.codec].get("levels", 1)
        digest = got.digests.get(tile)
        if not digest or len(got.levels[tile]) < total or tile in got.verified:
            return
        if self.bad_tiles.get(tile, 0):
            self.bad_tiles[tile] -= 1
            self.connection.tile_failed(transfer, tile, now)
            return
        if self.lied_to and not self._right(got, tile):
            self.connection.tile_failed(transfer, tile, now)
            return
        assert self._right(got, tile)
        got.verified.add(tile)
        self.connection.tile_verified(transfer, tile, now)

    @staticmethod
    def _right(got: Received, tile: Tile) -> bool:
        try:
            return tile_digest(got.spec(tile), got.words(tile)) == got.digests[tile]
        except ValueError:  # a payload of the wrong size, which a codec would refuse
            return False

    def on_ResultReceived(self, event: ev.ResultReceived, now: float) -> None:
        got = self.received[event.transfer]
        assert got.result is None, "two results"
        got.result = (event.first_token, event.logit_gap)

    def on_LevelsCancelled(self, event: ev.LevelsCancelled, now: float) -> None:
        if event.transfer in self.received:
            self.received[event.transfer].cut = event.level

    def on_TransferComplete(self, event: ev.TransferComplete, now: float) -> None:
        self.received[event.transfer].complete = True


def split_frames(data: bytearray) -> list[bytes]:
    """Remove and return the whole frames at the start of ``data``."""
    found = []
    while len(data) >= HEADER_SIZE:
        header = Header.unpack(data[:HEADER_SIZE])
        size = HEADER_SIZE + header.extension_length + header.payload_length
        if len(data) < size:
            break
        found.append(bytes(data[:size]))
        del data[:size]
    return found


class Pipe:
    """One byte stream: a pair of stripe numbers, and per direction the bytes and frames that are on their way."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ends = [shell.connection.open_stripe(world.now) for shell in world.shells]
        self.partial = [bytearray(), bytearray()]
        self.frames: list[list[bytes]] = [[], []]
        self.alive = True

    def collect(self, side: int, limit: int = 1 << 20) -> None:
        """Take what ``side`` wants to send."""
        connection = self.world.shells[side].connection
        for part in connection.data_to_send(self.world.now, self.ends[side], limit):
            self.partial[side] += part
        self.frames[side] += split_frames(self.partial[side])

    def collect_frame(self, side: int) -> None:
        """Take the next frame that ``side`` wants to send, and no more."""
        self.collect(side, 1)
        while self.partial[side]:
            self.collect(side, 1)

    def deliver(self, side: int, frame: bytes) -> None:
        """Give bytes that ``side`` sent to the other side."""
        if self.alive:
            self.world.shells[1 - side].connection.receive_data(frame, self.world.now, self.ends[1 - side])

    def cut(self, nbytes: int = 0) -> None:
        """The stream breaks; of what each side was sending, ``nbytes`` more bytes still arrive."""
        for side in (0, 1):
            rest = b"".join(self.frames[side]) + bytes(self.partial[side])
            self.deliver(side, rest[:nbytes])
        self.alive = False
        for side in (0, 1):
            self.world.shells[side].connection.stripe_lost(self.ends[side], self.world.now)
            self.frames[side].clear()


class World:
    """Two shells (0 is the client), the pipes between them, and the time."""

    def __init__(self, client: Config | None = None, server: Config | None = None, *, pipes: int = 1) -> None:
        self.now = 0.0
        self.shells = [
            Shell(client or small_config(), client=True, seed=1),
            Shell(server or small_config(), client=False, seed=2),
        ]
        self.pipes = [Pipe(self) for _ in range(pipes)]

    @property
    def client(self) -> Shell:
        return self.shells[0]

    @property
    def server(self) -> Shell:
        return self.shells[1]

    def step(self) -> bool:
        """Everybody works, and everything that was sent arrives; False when nothing moves any more."""
        moved = False
        for shell in self.shells:
            shell.handle_events(self.now)
            shell.encode(self.now)
        for pipe in self.pipes:
            for side in (0, 1):
                if pipe.alive:
                    pipe.collect(side)
                    frames, pipe.frames[side] = pipe.frames[side], []
                    for frame in frames:
                        pipe.deliver(side, frame)
                        moved = True
        for shell in self.shells:
            shell.handle_events(self.now)
        self.drop_closed()
        return moved

    def drop_closed(self) -> None:
        """Do as a shell does on StripeClosed: close the byte stream."""
        for pipe in self.pipes:
            for side in (0, 1):
                closed = {event.stripe for event in self.shells[side].seen(ev.StripeClosed)}
                if pipe.alive and pipe.ends[side] in closed:
                    pipe.collect(side)
                    for frame in pipe.frames[side]:
                        pipe.deliver(side, frame)
                    pipe.frames[side].clear()
                    pipe.cut()

    def settle(self) -> None:
        """Run until nothing moves."""
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the two sides never come to rest")

    def pass_time(self, seconds: float) -> None:
        """Move the clock to each timer in turn, and settle after each."""
        end = self.now + seconds
        for _ in range(100_000):
            timers = [t for shell in self.shells if (t := shell.connection.next_timer()) is not None and t <= end]
            if not timers:
                break
            self.now = max(self.now, min(timers))
            for shell in self.shells:
                shell.connection.handle_timer(self.now)
            self.settle()
        else:
            raise AssertionError("timers never come to rest")
        self.now = end
        for shell in self.shells:
            shell.handle_events(end)

    def new_pipe(self) -> Pipe:
        """Another byte stream, its handshake carried over faithfully."""
        pipe = Pipe(self)
        self.pipes.append(pipe)
        for _ in range(3):
            for side in (0, 1):
                pipe.collect(side)
                frames, pipe.frames[side] = pipe.frames[side], []
                for frame in frames:
                    pipe.deliver(side, frame)
        for shell in self.shells:
            shell.handle_events(self.now)
        self.drop_closed()
        return pipe
