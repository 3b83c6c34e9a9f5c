"""Configuration of one side of a session: one dataclass for behaviour, one for limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from lynxproto.errors import ConfigError

if TYPE_CHECKING:
    from lynxproto.manifest import Identity

__all__ = ["MAX_LEVELS", "MIN_SECRET", "Config", "Limits"]

#: Levels a tile may have, and priority classes of data; spec/wire-format.md, "Tiles, chunks and levels".
MAX_LEVELS = 8
#: Bytes of a shared secret at least.
MIN_SECRET = 16

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this side accepts from its peer: announced in HELLO, enforced before anything is allocated."""

    frame_bytes: int = 64 * _MIB
    """Payload of one DATA frame."""
    control_bytes: int = 4 * _MIB
    """Payload of one frame of any other type (before the handshake is over: 16 KiB)."""
    transfer_bytes: int = 256 * _GIB
    """Uncompressed cache of one transfer."""
    layers: int = 1024
    """Layers of one transfer."""
    tokens: int = 2 * _MIB
    """Tokens of one prompt."""
    tiles: int = 1 << 18
    """Tiles of one transfer, all layers together."""
    positions: int = 4 * _MIB
    """Explicit token positions of one transfer's plans (token ranges cost none)."""
    transfers: int = 256
    """Transfers that the peer may have open at a time; also FETCH requests."""
    stripes: int = 64
    """Byte streams of one session."""
    session_window: int = 16 * _MIB
    """Bytes of one class (level) of all transfers that may be under way or not yet applied."""
    transfer_window: int = 8 * _MIB
    """The same for one class of one transfer."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Limits.{item.name} must be a positive integer, not {value!r}")
        if self.frame_bytes >= 1 << 32:
            raise ConfigError("Limits.frame_bytes must be below 4 GiB, the wire format's largest payload")
        if self.control_bytes < 16 * _KIB:
            raise ConfigError("Limits.control_bytes must be at least 16 KiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one side of a session behaves. Times are seconds, sizes bytes."""

    identity: Identity | None = None
    """The only identity whose caches this side sends and accepts; None accepts any."""
    secret: bytes | None = field(default=None, repr=False)
    """Shared secret: both sides prove that they know it, by HMAC over both HELLOs."""
    name: str = "lynxproto"
    """Implementation name, told to the peer."""
    codecs: tuple[str, ...] = ("raw", "bitplane", "hq")
    """Codec ids that this side can decode."""
    features: tuple[str, ...] = ()
    """Optional features of this side, told to the peer."""
    tables: frozenset[bytes] = frozenset()
    """Hashes of the codec tables that this side holds."""
    limits: Limits = field(default_factory=Limits)
    """What the peer may ask of this side."""
    grease: bool = True
    """Send reserved frame types and parameters now and then, so that peers keep ignoring what they must."""
    encode_ahead: int = 4 * _MIB
    """Sender: encoded bytes that wait for the link, for anchors and again for residuals."""
    residual_floor: float = 0.1
    """Share of the link that residuals keep while anchors saturate it."""
    urgent_share: float = 0.5
    """The same while some transfer is urgent."""
    ping_interval: float = 5.0
    """A stripe silent for so long is pinged."""
    peer_timeout: float = 30.0
    """A stripe silent for so long is lost; a handshake that takes longer has failed."""
    session_timeout: float = 30.0
    """A session without a stripe for so long has failed."""
    lease: float = 120.0
    """A transfer that makes no progress for so long is abandoned, and what it borrowed is released."""
    retry_interval: float = 0.5
    """First wait before control state that was not confirmed is sent again; doubles up to ``retry_limit``."""
    retry_limit: float = 8.0
    """Longest such wait."""
    resends: int = 3
    """How often a chunk that arrived corrupt is asked for again."""
    tombstones: int = 4096
    """Closed transfers that are remembered, to answer late frames."""
    control_rate: float = 20_000.0
    """Control frames a second that a peer may send on average (burst: as many again)."""

    def __post_init__(self) -> None:
        for name in (
            "encode_ahead", "ping_interval", "peer_timeout", "session_timeout", "lease", "retry_interval",
            "retry_limit", "tombstones", "control_rate",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"Config.{name} must be positive, not {getattr(self, name)!r}")
        for name in ("residual_floor", "urgent_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"Config.{name} must be in [0, 1), not {getattr(self, name)!r}")
        if self.resends < 0:
            raise ConfigError("Config.resends must not be negative")
        if self.secret is not None and len(self.secret) < MIN_SECRET:
            raise ConfigError(
                f"Config.secret must have at least {MIN_SECRET} bytes; make one with secrets.token_bytes(32)"
            )
