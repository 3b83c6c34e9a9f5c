"""Configuration of one side of a session: one dataclass for behaviour, one for limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from lynxproto.errors import ConfigError, ExpiredSecretError

if TYPE_CHECKING:
    from lynxproto.manifest import Identity

__all__ = ["MAX_LEVELS", "MIN_SECRET", "Admission", "Config", "Limits", "Secret"]

#: Levels a tile may have, and priority classes of data; spec/wire-format.md, "Tiles, chunks and levels".
MAX_LEVELS = 8
#: Bytes of a shared secret at least.
MIN_SECRET = 16
#: Bytes of its id at most.
MAX_SECRET_ID = 64

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
class Admission:
    """What a listener lets in: of strangers, and of each peer that it knows. Not told to peers."""

    handshakes: int = 256
    """Byte streams whose peers have not yet proved who they are; the oldest of the busiest address goes first."""
    handshakes_per_address: int = 128
    """The same from one address."""
    accepts_per_address: int = 500
    """Byte streams a second from one address (burst: as many); more are closed at once."""
    connections: int = 4096
    """Byte streams of known peers."""
    connections_per_address: int = 1024
    """The same from one address."""
    connections_per_principal: int = 1024
    """The same of one principal."""
    sessions_per_principal: int = 256
    """Sessions of one principal, also those whose link is broken for the moment."""
    transfers_per_principal: int = 1024
    """Transfers that one principal pushes at a time, over all its sessions."""
    bytes_per_principal: int = 1 << 40
    """Uncompressed bytes of the caches that one principal pushes at a time: memory that is allocated for it."""
    control_frames_per_principal: int = 200_000
    """Control frames a second that all sessions of one principal may send together (burst: as many again)."""
    control_bytes_per_principal: int = 512 * _MIB
    """The same for their bytes."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Admission.{item.name} must be a positive integer, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A shared secret with a name and a life, so that one can be replaced while both are accepted. Times are Unix."""

    key: bytes = field(repr=False)
    """At least 16 bytes, random: ``secrets.token_bytes(32)``."""
    id: str = ""
    """Told in the clear, so that the peer knows which secret is meant."""
    principal: str = ""
    """Who is known by it, for authorisation and limits (default: its id, or ``shared``); stays over a rotation."""
    not_before: float | None = None
    """Not accepted or used before."""
    not_after: float | None = None
    """Not accepted or used from then on; sessions that stand go on."""

    def __post_init__(self) -> None:
        name = f"secret {self.id!r}"
        if len(self.key) < MIN_SECRET:
            raise ConfigError(
                f"{name} must have at least {MIN_SECRET} bytes, not {len(self.key)}; "
                "make one with secrets.token_bytes(32) or `openssl rand -hex 32`"
            )
        if len(self.id.encode()) > MAX_SECRET_ID:
            raise ConfigError(f"{name}: an id has at most {MAX_SECRET_ID} bytes")
        if self.not_before is not None and self.not_after is not None and self.not_before >= self.not_after:
            raise ConfigError(f"{name}: not_before must be earlier than not_after")

    @property
    def owner(self) -> str:
        """The principal."""
        return self.principal or self.id or "shared"

    def check(self, unix_time: float) -> None:
        """Raise :class:`~lynxproto.errors.ExpiredSecretError` outside its life."""
        for bound, late, what in ((self.not_after, True, "expired"), (self.not_before, False, "is not valid before")):
            if bound is not None and (unix_time >= bound) is late:
                when = datetime.fromtimestamp(bound, UTC).isoformat(timespec="seconds")
                raise ExpiredSecretError(
                    f"the secret {self.id!r} {what} {when}; both sides need one that is valid now "
                    "(Config.secrets), and clocks that agree"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one side of a session behaves. Times are seconds, sizes bytes."""

    identity: Identity | None = None
    """The only identity whose caches this side sends and accepts; None accepts any."""
    secret: bytes | None = field(default=None, repr=False)
    """Shared secret: both sides prove that they know it, by HMAC over both HELLOs."""
    secrets: tuple[Secret, ...] = ()
    """Several, for rotation and to tell peers apart: a listener accepts each, a client uses the first that is valid."""
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
    admission: Admission = field(default_factory=Admission)
    """Listener: what it lets in."""
    grease: bool = True
    """Send reserved frame types and parameters now and then, so that peers keep ignoring what they must."""
    encode_ahead: int = 32 * _MIB
    """Sender: encoded bytes that wait for the link, for anchors and again for residuals."""
    residual_floor: float = 0.1
    """Share of the link that residuals keep while anchors saturate it."""
    residual_grace: float = 0.1
    """Seconds that anchors may have all of the link before that: most are gone sooner."""
    urgent_share: float = 0.5
    """The same while some transfer is urgent."""
    ping_interval: float = 5.0
    """A stripe silent for so long is pinged."""
    peer_timeout: float = 30.0
    """A stripe silent for so long is lost."""
    handshake_timeout: float = 10.0
    """A handshake (of TLS and of the session) that takes longer has failed."""
    session_timeout: float = 30.0
    """A session without a stripe for so long has failed."""
    session_restarts: int = 8
    """How often a client whose session the server has forgotten begins a new one, before a transfer was confirmed."""
    lease: float = 120.0
    """A transfer that makes no progress for so long is abandoned, and what it borrowed is released."""
    retry_interval: float = 0.5
    """First wait before control state that was not confirmed is sent again; doubles up to ``retry_limit``."""
    retry_limit: float = 8.0
    """Longest such wait."""
    resends: int = 3
    """How often a chunk that arrived corrupt is asked for again."""
    ack_delay: float = 5e-3
    """Receiver: what was applied is confirmed so late at most, unless credit runs short: one ACK for many chunks."""
    tombstones: int = 4096
    """Closed transfers that are remembered, to answer late frames."""
    control_rate: float = 20_000.0
    """Control frames a second that a peer may send on average (burst: as many again)."""
    control_byte_rate: float = 64.0 * _MIB
    """The same for their bytes."""

    def __post_init__(self) -> None:
        for name in (
            "encode_ahead", "ping_interval", "peer_timeout", "session_timeout", "lease", "retry_interval",
            "retry_limit", "tombstones", "control_rate", "control_byte_rate", "handshake_timeout",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(f"Config.{name} must be positive, not {getattr(self, name)!r}")
        for name in ("ack_delay", "residual_grace"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"Config.{name} must not be negative, not {getattr(self, name)!r}")
        for name in ("residual_floor", "urgent_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"Config.{name} must be in [0, 1), not {getattr(self, name)!r}")
        for name in ("resends", "session_restarts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Config.{name} must not be negative")
        if self.secret is not None:
            if self.secrets:
                raise ConfigError("Config.secret is short for one nameless secret: give either it or Config.secrets")
            Secret(key=self.secret)
        if len({secret.id for secret in self.secrets}) < len(self.secrets):
            raise ConfigError("two of Config.secrets have the same id")

    @property
    def accepted_secrets(self) -> tuple[Secret, ...]:
        """``secrets``, or the nameless ``secret``, or none."""
        return self.secrets if self.secret is None else (Secret(key=self.secret),)
