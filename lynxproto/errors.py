"""Every error that lynxproto raises, and the codes that cross the wire.

Two sides are told apart, as in h11: a :class:`LocalError` means this program misused the library; a
:class:`RemoteError` means the peer, or the link, broke the rules. Each message says what is wrong, where
(byte offset, transfer, layer, chunk) and, where there is one, what to do.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "AuthenticationError",
    "BenchmarkError",
    "BudgetError",
    "CacheFileError",
    "CalibrationError",
    "CaptureError",
    "CodecError",
    "ConfigError",
    "ConnectionClosedError",
    "CorruptFrameError",
    "CorruptObjectError",
    "DeadlineError",
    "DigestError",
    "ErrorCode",
    "ExpiredSecretError",
    "ForbiddenError",
    "ForeignObjectError",
    "IdentityError",
    "LimitError",
    "LocalError",
    "LynxError",
    "MissingDependencyError",
    "NotFoundError",
    "ObjectError",
    "PayloadError",
    "PeerError",
    "PolicyError",
    "ProtocolError",
    "RejectedError",
    "RemoteError",
    "SpecError",
    "SpeculationError",
    "StateError",
    "StreamClosedError",
    "TransferCancelledError",
    "TransportError",
    "UnknownCodecError",
    "UnknownTransportError",
    "VersionError",
]


class ErrorCode(IntEnum):
    """Wire error codes (ERROR, REJECT, GOAWAY frames); spec/wire-format.md, "Error codes"."""

    NO_ERROR = 0
    INTERNAL = 1
    PROTOCOL = 2
    VERSION = 3
    FRAME_CORRUPT = 4
    FRAME_TOO_LARGE = 5
    UNKNOWN_CRITICAL = 6
    AUTHENTICATION = 7
    IDENTITY = 8
    UNSUPPORTED = 9
    MISSING_TABLE = 10
    LIMIT = 11
    FLOW_CONTROL = 12
    DIGEST = 13
    TIMEOUT = 14
    CANCELLED = 15
    NOT_FOUND = 16
    SHUTDOWN = 17
    PAYLOAD = 18
    STATE = 19
    EXPIRED = 20
    FORBIDDEN = 21


class LynxError(Exception):
    """Base of all errors raised by lynxproto."""


class LocalError(LynxError):
    """This side misused the library, or its machine lacks something."""


class RemoteError(LynxError):
    """The peer or the link broke the rules; ``code`` is the wire code that describes it."""

    code: ErrorCode = ErrorCode.PROTOCOL


class SpecError(LocalError, ValueError):
    """A ChunkSpec, token set or array that does not describe a chunk, or does not match it."""


class ConfigError(LocalError, ValueError):
    """A configuration value that makes no sense."""


class CacheFileError(LocalError):
    """A file that does not hold a KV cache, or holds a broken one."""


class CaptureError(LocalError):
    """A file that is no capture of frames, or a capture that cannot be written."""


class BudgetError(LocalError, ValueError):
    """A budget of bytes that cannot hold what it is for."""


class PolicyError(LocalError, ValueError):
    """A policy file that is broken, or that was made for another model or revision."""


class StateError(LocalError):
    """A state folder, or a spool in it, that cannot be used or holds no more."""


class CalibrationError(LocalError, ValueError):
    """A calibration that is broken, does not fit its model, or cannot be measured."""


class MissingDependencyError(LocalError, ImportError):
    """An optional package or the native module is absent; the message names what to install."""


class StreamClosedError(LocalError):
    """This side closed a stream, session or transfer, and then used it."""


class SpeculationError(LocalError):
    """A drafting engine broke its contract, or a phase of drafting and verification came out of order."""


class BenchmarkError(LynxError):
    """A measurement that proves nothing, because what was measured gave a wrong result."""


class CodecError(LynxError):
    """Base of codec failures."""


class UnknownCodecError(CodecError, LookupError):
    """No codec is registered under this id."""


class PayloadError(CodecError, RemoteError, ValueError):
    """A codec payload that is truncated, padded, corrupt or hostile. The output is not usable."""

    code = ErrorCode.PAYLOAD


class UnknownTransportError(ConfigError, LookupError):
    """No transport is registered for this URL scheme."""


class TransportError(RemoteError, OSError):
    """The link could not be made, or broke."""


class ConnectionClosedError(TransportError):
    """The connection ended (peer hung up, or it was closed) before the work was done."""


class ProtocolError(RemoteError):
    """The peer sent something the protocol does not allow."""

    def __init__(self, message: str, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class CorruptFrameError(ProtocolError):
    """Bad magic, or a header or payload whose CRC32C does not match."""

    code = ErrorCode.FRAME_CORRUPT


class VersionError(ProtocolError):
    """No protocol version is common to both sides."""

    code = ErrorCode.VERSION


class LimitError(ProtocolError):
    """A negotiated limit (frame size, transfers, memory, tokens...) was exceeded."""

    code = ErrorCode.LIMIT


class AuthenticationError(ProtocolError):
    """The peer did not prove who it is."""

    code = ErrorCode.AUTHENTICATION


class ExpiredSecretError(AuthenticationError):
    """The shared secret is not valid any more, or not yet."""

    code = ErrorCode.EXPIRED


class PeerError(RemoteError):
    """The peer reported an error; ``code`` is what it sent."""

    def __init__(self, message: str, code: ErrorCode) -> None:
        super().__init__(message)
        self.code = code


class RejectedError(PeerError):
    """The peer refused a transfer before any data moved; ``code`` says why."""


class ForbiddenError(RejectedError):
    """The peer knows who this side is, and does not let it push or pull this."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ErrorCode.FORBIDDEN)


class IdentityError(PeerError):
    """A cache of another model, revision, dtype, shape or prompt than this side computes with."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ErrorCode.IDENTITY)


class NotFoundError(PeerError):
    """The peer holds no cache under the key that was fetched."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ErrorCode.NOT_FOUND)


class DigestError(RemoteError):
    """A reconstructed tile differs from what the sender had, even after it was sent again whole."""

    code = ErrorCode.DIGEST


class DeadlineError(RemoteError, TimeoutError):
    """A level, or the peer, did not arrive in time."""

    code = ErrorCode.TIMEOUT


class ObjectError(RemoteError):
    """A cache object that cannot be used. The store that holds it should forget it; the cache is computed again."""


class CorruptObjectError(ObjectError):
    """A cache object that is damaged, cut off, or none at all."""

    code = ErrorCode.PAYLOAD


class ForeignObjectError(ObjectError):
    """A cache object of another model, layout, dtype, shape or name than the one that was asked for."""

    code = ErrorCode.IDENTITY


class TransferCancelledError(RemoteError):
    """The transfer was cancelled, by this side or the other."""

    code = ErrorCode.CANCELLED
