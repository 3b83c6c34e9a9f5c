"""Two connections, and a record of what they say: how the scripts of ``session`` cases are made.

Either side may also be played by hand: bytes that no connection would send are put into its mouth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import numpy as np
from pieces import rng
from tiles import tile

from lynxproto import events as ev
from lynxproto.chunk import Tile, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.config import Config, Limits
from lynxproto.conformance.scripts import Receiving
from lynxproto.connection import Connection
from lynxproto.digest import tile_digest
from lynxproto.frames import HEADER_SIZE, TileKey
from lynxproto.manifest import Identity, LayerSpec, Manifest, Want

RAW, HQ, PLANES = 0, 1, 2
CODECS: tuple[dict[str, Any], ...] = (
    {"id": "raw"},
    {"id": "hq", "key_bits": 3, "value_bits": 3, "levels": 3, "widths": "ranges", "fold": True, "scaling": True},
    {"id": "bitplane", "planes": [9, 7]},
)
SMALL = Limits(
    session_window=8192, transfer_window=4096, transfers=4, layers=8, control_bytes=65536, frame_bytes=1 << 16
)
Words = dict[tuple[int, str], Any]


def cache(layers: int = 1, heads: int = 1, tokens: int = 24, dim: int = 8, dtype: str = "bfloat16") -> Words:
    """Words of a small cache: ``{(layer, part): [heads, tokens, dim]}``."""
    shape = (heads, tokens, dim)
    return {
        (layer, part): np.frombuffer(tile("usual", dtype, part, shape, layer), np.uint16).reshape(shape)
        for layer in range(layers)
        for part in ("key", "value")
    }


def manifest_of(words: Words, **more: Any) -> Manifest:
    """The manifest of such a cache."""
    heads, tokens, dim = words[0, "key"].shape
    layers = tuple(
        LayerSpec(index=i, kv_heads=heads, key_dim=dim, value_dim=dim, token_stop=tokens)
        for i in sorted({layer for layer, _ in words})
    )
    given = {"identity": Identity(model="m"), "dtype": "bfloat16", "prompt_tokens": tokens, "codecs": CODECS, **more}
    return Manifest(**given, layers=layers)


def tiles_of(manifest: Manifest, layer: int, cuts: Sequence[tuple[Iterable[int], int]] | None = None) -> list[Tile]:
    """A plan: token sets and codecs of each part; by default 4 tokens as they are, the rest in ``hq``."""
    spec = manifest.layer(layer)
    chosen = cuts or ((range(4), RAW), (range(4, spec.token_stop), HQ))
    return [
        Tile(layer, part, spec.head_start, spec.kv_heads, TokenSet.of(tokens), codec)
        for part in spec.parts
        for tokens, codec in chosen
    ]


def words_of(words: Words, tile_: Tile) -> Any:
    """The words of a tile."""
    whole = words[tile_.layer, tile_.part]
    return np.ascontiguousarray(whole[tile_.head_start : tile_.head_start + tile_.heads][:, list(tile_.tokens)])


def digest_of(manifest: Manifest, words: Words, tile_: Tile) -> bytes:
    """Its digest."""
    spec = tile_.spec(manifest.dtype, manifest.layer(tile_.layer).head_dim(tile_.part))
    return tile_digest(spec, words_of(words, tile_))


def encoded(manifest: Manifest, words: Words, tile_: Tile) -> list[bytes]:
    """All its payloads."""
    spec = tile_.spec(manifest.dtype, manifest.layer(tile_.layer).head_dim(tile_.part))
    codec = get_codec(manifest.codecs[tile_.codec])
    return [bytes(payload) for payload in codec.encode(spec, words_of(words, tile_))]


def told_tile(manifest: Manifest, words: Words, tile_: Tile, level: int | None = None, *, verified: bool = True) -> Any:
    """A tile as the operation tells it, with all levels or those up to ``level``."""
    key = TileKey.of(tile_)
    payloads = encoded(manifest, words, tile_)
    last = len(payloads) - 1
    level = last if level is None else min(level, last)
    spec = tile_.spec(manifest.dtype, manifest.layer(tile_.layer).head_dim(tile_.part))
    out = np.zeros(spec.shape, spec.word_dtype)
    get_codec(manifest.codecs[tile_.codec]).decode(spec, payloads[: level + 1], out)
    return {
        "tile": [tile_.layer, *key.as_list()[:6], key.bitmap],
        "level": level,
        "verified": verified and level == last,
        "words": out.tobytes(),
    }


def cut(data: bytes) -> list[bytes]:
    """The frames of a stream."""
    found = []
    while data:
        size = HEADER_SIZE + int.from_bytes(data[12:16], "little") + int.from_bytes(data[52:56], "little")
        found.append(data[:size])
        data = data[size:]
    return found


class Play:
    """Two sides and what they said. ``alter(side, frame)`` gives the frames that arrive in place of one."""

    def __init__(self, name: str, client: Config | None = None, server: Config | None = None) -> None:
        configs = {"client": client, "server": server}
        self.sides: dict[str, Connection] = {}
        for side, config in configs.items():
            seeded: Random = rng(name, side)
            chosen = config or Config(grease=False, limits=SMALL, name=side)
            self.sides[side] = Connection(chosen, client=side == "client", random=seeded)
        self.stripes: dict[int, dict[str, int]] = {}
        self.script: list[dict[str, Any]] = []
        self.said: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.sent: dict[int, tuple[Manifest, Words]] = {}
        self.received: dict[str, dict[int, Receiving]] = {"client": {}, "server": {}}
        self.alter: Callable[[str, bytes], list[bytes]] = lambda side, frame: [frame]
        self.wants: Sequence[Want] | None = None
        self.accepts = True
        self.requests: list[ev.FetchRequested] = []
        self.stripe(0)

    def stripe(self, number: int) -> None:
        """Another byte stream."""
        self.stripes[number] = {side: c.open_stripe(0.0) for side, c in self.sides.items()}

    def lose(self, number: int) -> None:
        """A byte stream ends."""
        self.script.append({"stripe": number, "event": "lost"})
        for side, stripe in self.stripes.pop(number).items():
            self.sides[side].stripe_lost(stripe, 0.0)
            self.events(side)

    def at(self, side: str, stripe: int = 0) -> int:
        """How many bytes ``side`` has said: where its next frame begins."""
        return self.said[side, stripe]

    def say(self, side: str, data: bytes, stripe: int = 0) -> int:
        """``side`` says this, and the other hears it. Returns where it begins."""
        begins = self.at(side, stripe)
        self.script.append({"stripe": stripe, "from": side, "data": data})
        self.said[side, stripe] += len(data)
        other = "server" if side == "client" else "client"
        self.sides[other].receive_data(data, 0.0, self.stripes[stripe][other])
        self.events(other)
        return begins

    def collect(self, side: str, stripe: int = 0) -> bytes:
        """What ``side`` wants to say, which nobody has heard yet."""
        parts = self.sides[side].data_to_send(0.0, self.stripes[stripe][side], 1 << 30)
        return b"".join(map(bytes, parts))

    def answer(self, side: str, stripe: int = 0) -> None:
        """Note what ``side`` says; the other side is played by hand and has no use for it."""
        data = self.collect(side, stripe)
        if data:
            self.script.append({"stripe": stripe, "from": side, "data": data})
            self.said[side, stripe] += len(data)

    def step(self) -> bool:
        """Each side speaks once; False when neither has anything to say."""
        moved = False
        for side in ("client", "server"):
            for stripe in list(self.stripes):
                self.encode(side)
                frames = [new for frame in cut(self.collect(side, stripe)) for new in self.alter(side, frame)]
                if frames and stripe in self.stripes:
                    self.say(side, b"".join(frames), stripe)
                    moved = True
        return moved

    def settle(self) -> Play:
        """Until both have nothing to say."""
        while self.step():
            pass
        return self

    def open(self, side: str, words: Words, cuts: Any = None, **more: Any) -> int:
        """``side`` sends a whole cache."""
        manifest = manifest_of(words, **{k: v for k, v in more.items() if k != "fetch"})
        connection = self.sides[side]
        transfer = connection.open(manifest, 0.0, fetch=more.get("fetch"))
        self.sent[transfer] = manifest, words
        for spec in manifest.layers:
            tiles = tiles_of(manifest, spec.index, cuts)
            connection.plan(transfer, spec.index, tiles, 0.0)
            digests = [b"" if manifest.lossy else digest_of(manifest, words, t) for t in tiles]
            connection.end_layer(transfer, spec.index, digests, 0.0)
        connection.result(transfer, 17, 1.5, 0.0)
        connection.finish(transfer, 0.0)
        return transfer

    def encode(self, side: str) -> None:
        """Encode what ``side`` is asked for."""
        connection = self.sides[side]
        while not connection.closed and (request := connection.next_chunk(0.0)) is not None:
            payload = encoded(*self.sent[request.transfer], request.tile)[request.level]
            connection.chunk_encoded(request.transfer, request.tile, request.level, payload, 0.0)

    def events(self, side: str) -> None:
        """Do as a shell does."""
        connection = self.sides[side]
        while (event := connection.next_event()) is not None:
            transfer = getattr(event, "transfer", None)
            if isinstance(event, ev.TransferOffered):
                self.received[side][event.transfer] = Receiving(event.manifest)
                if self.accepts:
                    connection.accept(event.transfer, 0.0, self.wants)
            elif isinstance(event, ev.FetchRequested):
                self.requests.append(event)
            elif transfer in self.received[side]:
                self.received[side][transfer].on_event(event, connection)

    def case(self, role: str, **more: Any) -> dict[str, Any]:
        """The input of a case."""
        return {"role": role, "script": self.script, **more}
