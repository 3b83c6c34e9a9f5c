"""In which order chunks went, what went twice and what never went. Memory is bounded.

- A chunk *waits* from its PLAN (and, if ACCEPT asks for a part only, as far as that wants it) until it is sent or
  cancelled.
- An *inversion*: a chunk that goes while one of a lower level waits in the same session and direction. A few are
  normal: a sender keeps a share of the link for residuals, and an anchor waits until it is encoded and has credit.
- A *layer inversion*: an anchor that goes while an anchor of an earlier layer of the same transfer waits.
- A *duplicate*: a chunk that had arrived intact and goes again, though nobody asked. A *resend*: one that was asked for
  (NACK), or whose earlier copy was damaged or cut off.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from lynxproto import frames
from lynxproto.capture import Direction
from lynxproto.config import MAX_LEVELS
from lynxproto.errors import ErrorCode, LynxError
from lynxproto.frames import Header, TileKey
from lynxproto.inspect.model import Frame
from lynxproto.manifest import Want, wanted_levels

__all__ = ["Novelty", "Order", "Tally", "Transfer"]

#: What is followed; chunks of further tiles and transfers are counted, and their order is not judged.
_MAX_TILES: Final = 1 << 18
_MAX_TRANSFERS: Final = 1 << 12


@dataclass(slots=True)
class Tally:
    """Some frames."""

    frames: int = 0
    bytes: int = 0
    """Of their payloads."""

    def add(self, nbytes: int) -> None:
        """One more."""
        self.frames += 1
        self.bytes += nbytes


class Novelty(Enum):
    """What a DATA frame brings."""

    TILE = "the first chunk of a tile"
    CHUNK = "another level of it"
    REPEAT = "a chunk that went before"


@dataclass(slots=True)
class _Tile:
    """Masks of levels."""

    planned: int = 0
    wanted: int = 0
    waiting: int = 0
    sent: int = 0
    intact: int = 0  # arrived intact in this attempt
    asked: int = 0  # by NACK, and not sent since
    attempt: int = 0


@dataclass(slots=True)
class _Group:
    """One session and direction: its chunks share a scheduler."""

    waiting: list[int] = field(default_factory=lambda: [0] * MAX_LEVELS)
    quiet_since: int | None = None


@dataclass(slots=True)
class Transfer:
    """One transfer; times in nanoseconds, None for what was not seen."""

    id: int
    group: _Group
    name: str = ""
    opened: int | None = None
    accepted: int | None = None
    result: int | None = None
    closed: int | None = None
    outcome: str = "not closed"
    levels: list[Tally] = field(default_factory=lambda: [Tally() for _ in range(MAX_LEVELS)])
    """What was sent of each level, each chunk once."""
    last: list[int | None] = field(default_factory=lambda: [None] * MAX_LEVELS)
    """When the last chunk of each level was complete."""
    uncompressed: int = 0
    top: int = MAX_LEVELS - 1
    """The highest level that was not cancelled."""
    wants: tuple[Want, ...] | None = None
    tiles: dict[TileKey, _Tile] = field(default_factory=dict)
    waiting_layers: Counter[int] = field(default_factory=Counter)

    def planned(self, level: int) -> int:
        """Chunks of ``level`` that were planned, wanted and not cancelled."""
        return sum(tile.wanted >> level & 1 for tile in self.tiles.values())

    def missing(self) -> int:
        """How many of all those never went."""
        return sum((tile.wanted & ~tile.sent).bit_count() for tile in self.tiles.values())

    def update(self, key: TileKey, tile: _Tile) -> None:
        """Bring what the tile waits for up to date."""
        waiting = tile.wanted & ~tile.sent if self.closed is None else 0
        changed = waiting ^ tile.waiting
        while changed:
            level = changed.bit_length() - 1
            changed ^= 1 << level
            step = 1 if waiting >> level & 1 else -1
            self.group.waiting[level] += step
            if level == 0:
                self.waiting_layers[key.layer] += step
                if not self.waiting_layers[key.layer]:
                    del self.waiting_layers[key.layer]
        tile.waiting = waiting

    def update_all(self) -> None:
        """After a change that concerns all tiles."""
        for key, tile in self.tiles.items():
            tile.wanted = tile.planned & ((1 << (self.top + 1)) - 1)
            if self.wants is not None and tile.wanted:
                tile.wanted &= (1 << _wanted(self.wants, key)) - 1
            self.update(key, tile)


def _wanted(wants: tuple[Want, ...], key: TileKey) -> int:
    try:
        return wanted_levels(wants, key.tile(), MAX_LEVELS)
    except LynxError:  # a key that describes no tile: its frame has a problem
        return 0


class Order:
    """Feed it all frames in order."""

    def __init__(self) -> None:
        self.transfers: dict[int, Transfer] = {}
        self.inversions = Tally()
        self.contended = Tally()
        """DATA that went while some anchor waited, anchors included."""
        self.layer_inversions = Tally()
        self.duplicates = Tally()
        self.resends = Tally()
        self.nacks = 0
        """Chunks asked for again."""
        self.silence = (0, 0)
        """The longest time without DATA in which chunks waited, and when it ended."""
        self.untracked = 0
        """Frames whose order is not judged, for lack of memory."""
        self._tiles = 0
        self._groups: dict[tuple[bytes | int, Direction], _Group] = {}
        self._sessions: dict[int, bytes] = {}

    def _transfer(self, frame: Frame) -> Transfer | None:
        """The transfer of a frame of its sender; ACCEPT and the like come from the other side and never create one."""
        found = self.transfers.get(frame.header.transfer)
        if found is None:
            if len(self.transfers) >= _MAX_TRANSFERS:
                self.untracked += 1
                return None
            session: bytes | int = self._sessions.get(frame.stripe, frame.stripe)
            group = self._groups.setdefault((session, frame.direction), _Group())
            found = self.transfers[frame.header.transfer] = Transfer(frame.header.transfer, group)
        return found

    def control(self, frame: Frame) -> None:
        """A control frame with a body."""
        match frame.body:
            case frames.Hello(session=session) if session and len(self._sessions) < _MAX_TRANSFERS:
                self._sessions[frame.stripe] = session
            case frames.Open() | frames.Plan() | frames.Result() | frames.Closed():
                transfer = self._transfer(frame)
                if transfer is not None:
                    self._from_sender(transfer, frame)
            case frames.Accept() | frames.Nack() | frames.Reject() | frames.Error():
                transfer = self.transfers.get(frame.header.transfer)
                if transfer is not None:
                    self._from_receiver(transfer, frame)

    def _from_sender(self, transfer: Transfer, frame: Frame) -> None:
        match frame.body:
            case frames.Open() if transfer.opened is None:
                transfer.opened, transfer.name = frame.time, frame.note
            case frames.Result() if transfer.result is None:
                transfer.result = frame.time
            case frames.Plan(tiles=keys, levels=levels):
                for key, count in zip(keys, levels, strict=True):
                    tile = self._tile(transfer, key)
                    if tile is not None:
                        tile.planned = (1 << count) - 1
                transfer.update_all()
                transfer.group.quiet_since = transfer.group.quiet_since or frame.time
            case frames.Closed(end=True, code=code):
                transfer.closed = frame.time
                transfer.outcome = "complete" if code is ErrorCode.NO_ERROR else code.name
                if code is not ErrorCode.NO_ERROR:
                    transfer.top = -1
                transfer.update_all()
            case frames.Closed(level=level):
                transfer.top = min(transfer.top, level)
                transfer.update_all()

    def _from_receiver(self, transfer: Transfer, frame: Frame) -> None:
        match frame.body:
            case frames.Accept(wants=wants) if transfer.accepted is None:
                transfer.accepted, transfer.wants = frame.time, wants
                transfer.update_all()
            case frames.Nack(items=items):
                self.nacks += len(items)
                for item in items:
                    tile = transfer.tiles.get(item.key)
                    if tile is not None:
                        tile.asked |= 0xFF if item.attempt > tile.attempt else 1 << item.level
            case frames.Reject(code=code) | frames.Error(code=code):
                transfer.outcome, transfer.closed, transfer.top = code.name, frame.time, -1
                transfer.update_all()

    def _tile(self, transfer: Transfer, key: TileKey) -> _Tile | None:
        tile = transfer.tiles.get(key)
        if tile is None:
            if self._tiles >= _MAX_TILES:
                self.untracked += 1
                return None
            self._tiles += 1
            tile = transfer.tiles[key] = _Tile()
        return tile

    def data(self, frame: Frame) -> Novelty:
        """A DATA frame."""
        h, size = frame.header, frame.size
        transfer = self._transfer(frame)
        tile = None if transfer is None else self._tile(transfer, h.key(frame.bitmap))
        if transfer is None or tile is None or h.level >= MAX_LEVELS:
            return Novelty.CHUNK if h.level else Novelty.TILE
        group, bit = transfer.group, 1 << h.level
        self._judge(transfer, h, size)
        if group.quiet_since is not None and any(group.waiting):
            self.silence = max(self.silence, (frame.start - group.quiet_since, frame.start))
        group.quiet_since = frame.time
        if h.attempt > tile.attempt:
            tile.attempt, tile.intact = h.attempt, 0
            tile.asked |= tile.sent
        first = not tile.sent & bit
        if not first:
            asked = tile.asked & bit or not tile.intact & bit
            (self.resends if asked else self.duplicates).add(size)
            tile.asked &= ~bit
        if frame.checksum == "ok":
            tile.intact |= bit
        transfer.last[h.level] = frame.time
        novelty = Novelty.REPEAT if not first else Novelty.CHUNK if tile.sent else Novelty.TILE
        if first:
            if novelty is Novelty.TILE:
                transfer.uncompressed += frame.uncompressed or 0
            tile.sent |= bit
            transfer.levels[h.level].add(size)
            transfer.update(h.key(frame.bitmap), tile)
        return novelty

    def _judge(self, transfer: Transfer, h: Header, size: int) -> None:
        waiting = transfer.group.waiting
        if waiting[0]:
            self.contended.add(size)
        if any(waiting[: h.level]):
            self.inversions.add(size)
        if h.level == 0 and transfer.waiting_layers and min(transfer.waiting_layers) < h.layer:
            self.layer_inversions.add(size)
