"""What the parts of one connection share: configuration, events, counters, outgoing control frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any, Final

from lynxproto import _cbor
from lynxproto.chunk import Tile
from lynxproto.codecs import get_codec
from lynxproto.codecs.abc import Codec
from lynxproto.config import MAX_LEVELS, Config, Limits
from lynxproto.counters import Counters
from lynxproto.errors import ConfigError
from lynxproto.events import Event
from lynxproto.frames import Body, control_frame
from lynxproto.manifest import Manifest

__all__ = ["Backoff", "Context", "Land", "Lend", "Peer", "Sizes", "build_codec"]

Land = Callable[[int, Tile], memoryview | None]
Lend = Callable[[int, Tile], memoryview]
_MAX_WAITING: Final = 10_000


@dataclass(frozen=True, slots=True)
class Peer:
    """What the peer said of itself in HELLO."""

    name: str
    limits: Limits
    codecs: tuple[str, ...]
    features: tuple[str, ...]
    lease: float

    @property
    def largest_chunk(self) -> int:
        """The largest payload that fits each of the peer's windows and its frame limit."""
        return min(self.limits.frame_bytes, self.limits.session_window, self.limits.transfer_window)


@dataclass(slots=True)
class Context:
    """Shared by :class:`~lynxproto.connection.Connection`, its sender and its receiver."""

    config: Config
    random: Random
    grease: Random = field(default_factory=Random)
    """For what has to be varied and not secret."""
    events: deque[Event] = field(default_factory=deque)
    counters: Counters = field(default_factory=Counters)
    control: deque[tuple[bytes, int]] = field(default_factory=deque)
    """Control frames for whichever stripe is free first, each with its transfer."""
    now: float = 0.0
    """The time of the call that is being handled."""
    ready: bool = False
    """At least one stripe is ready. While none is, nothing is queued: state is sent afresh when one is."""
    peer: Peer | None = None
    stripe_alive: Callable[[int], bool] = field(default=lambda stripe: False)
    take_over: Callable[[Any], None] = field(default=lambda chunk: None)
    """Copy what is left to send of the frame of this chunk: its payload must not be read any more."""
    land: Land | None = None
    """Where the shell wants a tile's words."""
    lend: Lend | None = None
    """Where the shell has them."""

    def emit(self, body: Body, transfer: int = 0) -> None:
        """Queue a control frame, if some stripe can carry it."""
        if self.ready:
            self.control.append((self.encode(body, transfer), transfer))

    def reply(self, body: Body, transfer: int) -> None:
        """The same for an answer, unless too many wait for a peer that asks and does not read: it will ask again."""
        if len(self.control) < _MAX_WAITING:
            self.emit(body, transfer)

    def encode(self, body: Body, transfer: int = 0) -> bytes:
        """A control frame, perhaps greased."""
        return control_frame(body, transfer, self.grease if self.config.grease else None)


class Backoff:
    """When to try again: after ``first`` seconds, then twice as long each time up to ``limit``."""

    __slots__ = ("_first", "_limit", "_wait", "at")

    def __init__(self, config: Config, now: float) -> None:
        self._first, self._limit = config.retry_interval, config.retry_limit
        self.reset(now)

    def reset(self, now: float) -> None:
        """Something moved: start over."""
        self._wait = self._first
        self.at = now + self._wait

    def tried(self, now: float) -> None:
        """Tried once more."""
        self._wait = min(self._wait * 2, self._limit)
        self.at = now + self._wait


@lru_cache(maxsize=256)
def _cached_codec(config: bytes) -> Codec:
    fields = _cbor.loads(config, "codec config")
    return get_codec(fields.raw)


def build_codec(config: Mapping[str, Any]) -> Codec:
    """The codec of a config as the wire has it, cached: transfers of one policy share it.

    Raises what ``get_codec`` raises, and ConfigError for keys that are only ``get_codec``'s, such as ``preset``.
    """
    codec = _cached_codec(_cbor.dumps(dict(config)))
    if unknown := config.keys() - codec.get_config().keys():
        raise ConfigError(f"codec {config['id']!r}: a config on the wire has no key {min(unknown)!r}")
    return codec


class Sizes:
    """The largest payload of each level of a transfer's tiles: the same for all that differ only in their tokens."""

    __slots__ = ("_codecs", "_known", "_manifest")

    def __init__(self, codecs: Sequence[Codec], manifest: Manifest) -> None:
        self._codecs = codecs
        self._manifest = manifest
        self._known: dict[tuple[Hashable, ...], tuple[int, ...]] = {}

    def of(self, tile: Tile) -> tuple[int, ...]:
        """Bytes by level. Raises what the codec raises for such a tile."""
        key = (tile.layer, tile.part, tile.head_start, tile.heads, len(tile.tokens), tile.codec)
        found = self._known.get(key)
        if found is None:
            codec, layer = self._codecs[tile.codec], self._manifest.layer(tile.layer)
            spec = tile.spec(self._manifest.dtype, layer.head_dim(tile.part))
            found = self._known[key] = tuple(codec.max_encoded_size(spec, level) for level in range(codec.levels))
        return found


ALL_LEVELS = MAX_LEVELS - 1
