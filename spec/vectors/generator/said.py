"""What files of sessions share: their cases, and frames put into a sender's mouth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pieces import File, control, data_frame
from play import SMALL, Play, digest_of, encoded, tiles_of, told_tile

from lynxproto import _cbor
from lynxproto.chunk import PARTS, Tile
from lynxproto.config import Config
from lynxproto.errors import ErrorCode
from lynxproto.frames import TileKey
from lynxproto.manifest import Manifest

NOTES = {
    "grease": "reserved types, flags and keys, at random",
    "version": "version negotiation",
    "proof": "what a side proves",
    "order": "frames that overtake one another, come twice or not at all",
    "split": "how the bytes are cut does not matter",
    "resume": "stripes that end, and what follows",
    "state": "a frame that the state does not allow",
    "hostile": "made to make a receiver allocate, wait or write where it must not",
    "credit": "flow control",
    "corrupt": "damage, and what it costs",
    "cancel": "levels or transfers that are given up",
    "reject": "transfers that are refused before any data moves",
    "sender": "the observed side sends",
    "priority": "levels in an order that a sender would not choose",
}
E = ErrorCode


def config(name: str, **more: Any) -> Config:
    return Config(**{"grease": False, "limits": SMALL, "name": name, **more})


def patched(data: bytes, **fields: Any) -> bytes:
    """A control frame with some keys of its map changed."""
    body = {**_cbor.loads(data[64:], "frame").raw, **fields}
    return control(int.from_bytes(data[6:8], "little"), body, transfer=data[16:32])


def damaged_frame(data: bytes) -> bytes:
    """A frame whose payload was damaged on its way."""
    return data[:-1] + bytes([data[-1] ^ 0xFF])


class Sessions:
    def __init__(self, name: str, title: str) -> None:
        self.f = File(name, title, NOTES)

    def good(self, comment: str, play: Play, role: str, expected: dict[str, Any], *flags: str, **more: Any) -> None:
        self.f.valid(comment, play.case(role, **more), {"state": "active", "transfers": {}, **expected}, *flags)

    def bad(
        self,
        comment: str,
        play: Play,
        role: str,
        code: ErrorCode,
        offset: int,
        *flags: str,
        scope: str = "session",
        stripe: int = 0,
        **more: Any,
    ) -> None:
        self.f.invalid(comment, play.case(role, **more), code, *flags, scope=scope, stripe=stripe, offset=offset)


def complete(manifest: Manifest, words: Any, tiles: Iterable[Any], **more: Any) -> dict[str, Any]:
    """A transfer that is complete, at its receiver."""
    told = [told_tile(manifest, words, t) for t in tiles]
    result = {"token": 17, "gap": 1.5}
    return {"outcome": "complete", "corrupt": 0, "restarted": 0, "result": result, "tiles": told, **more}


def chunk_frame(manifest: Manifest, words: Any, tile: Tile, n: int, **more: Any) -> bytes:
    """A DATA frame of a tile, by default its level ``n``."""
    key = TileKey.of(tile)
    fields = {"layer": tile.layer, "part": PARTS.index(tile.part), "level": n, "head_start": tile.head_start}
    fields |= {"heads": tile.heads, "token_start": key.token_start, "token_stop": key.token_stop}
    fields |= {"codec_id": (1, 3, 2)[tile.codec], "codec": tile.codec}
    payload = more.pop("payload", None)
    return data_frame(
        encoded(manifest, words, tile)[n] if payload is None else payload, key.bitmap, **{**fields, **more}
    )


def plan_frame(manifest: Manifest, index: int, chosen_tiles: Iterable[Tile] | None = None, **more: Any) -> bytes:
    chosen = list(tiles_of(manifest, index) if chosen_tiles is None else chosen_tiles)
    levels = bytes((1, 3, 2)[t.codec] for t in chosen)
    body = {"layer": index, "tiles": [TileKey.of(t).as_list() for t in chosen], "levels": levels}
    return control(8, {**body, **more})


def end_frame(manifest: Manifest, words: Any, index: int, **more: Any) -> bytes:
    digests = [digest_of(manifest, words, t) for t in tiles_of(manifest, index)]
    return control(11, {"layer": index, "digests": digests, **more})


def result_frame() -> bytes:
    return control(10, {"token": 17, "gap": 1.5})


def said_by_sender(manifest: Manifest, words: Any) -> list[bytes]:
    """PLAN, END, RESULT and all chunks."""
    found = []
    for spec in manifest.layers:
        tiles = tiles_of(manifest, spec.index)
        found += [plan_frame(manifest, spec.index), end_frame(manifest, words, spec.index)]
        found += [chunk_frame(manifest, words, t, n) for t in tiles for n in range((1, 3, 2)[t.codec])]
    return [*found, result_frame()]


def place(one: bytes) -> tuple[int, ...]:
    numbers = [(32, 34), (36, 38), (38, 40), (40, 44), (44, 48)]
    return tuple(int.from_bytes(one[a:b], "little") for a, b in numbers)
