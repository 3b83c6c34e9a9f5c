"""The state machines, as tables.

Rule 1: everything that moves a machine from state to state lives here. Rule 2: this file knows nothing of frames,
time or who is client (both rules are h11's). The diagrams in spec/ are drawn from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final, TypeVar

from lynxproto.errors import LocalError

__all__ = [
    "CHUNK",
    "INCOMING",
    "OUTGOING",
    "SESSION",
    "STRIPE",
    "ChunkState",
    "IncomingState",
    "OutgoingState",
    "SessionState",
    "StripeState",
    "advance",
]


class _State(Enum):
    """A state is itself and nothing else: it is looked up by identity, which is fast."""

    __hash__ = object.__hash__


class SessionState(_State):
    """One session with one peer."""

    CONNECTING = "connecting"  # no handshake has been completed yet
    ACTIVE = "active"  # at least one stripe is ready
    SUSPENDED = "suspended"  # all stripes are lost; waits for another
    CLOSED = "closed"


class StripeState(_State):
    """One byte stream."""

    HELLO = "hello"  # waits for the peer's HELLO
    PROOF = "proof"  # waits for the peer's HELLO_ACK
    READY = "ready"
    CLOSED = "closed"


class OutgoingState(_State):
    """A transfer at its sender."""

    OFFERED = "offered"  # OPEN sent, no answer yet
    SENDING = "sending"
    CLOSED = "closed"  # CLOSED sent; a tombstone repeats it


class IncomingState(_State):
    """A transfer at its receiver."""

    OFFERED = "offered"  # the shell decides
    RECEIVING = "receiving"
    COMPLETE = "complete"  # everything wanted is applied and verified; waits for CLOSED
    CLOSING = "closing"  # this side gave up; waits for CLOSED
    CLOSED = "closed"


class ChunkState(_State):
    """A chunk at its sender."""

    IDLE = "idle"  # not wanted
    WAITING = "waiting"  # to be encoded
    ENCODING = "encoding"  # handed to the shell
    READY = "ready"  # encoded, waits for a stripe
    SENDING = "sending"  # partly written
    SENT = "sent"  # written, not known to have arrived
    ARRIVED = "arrived"


S = TypeVar("S", bound=Enum)
Table = Mapping[S, Mapping[str, S]]


def _table(table: dict[S, dict[str, S]]) -> Table[S]:
    return MappingProxyType({state: MappingProxyType(row) for state, row in table.items()})


_s = SessionState
SESSION: Final = _table(
    {
        _s.CONNECTING: {"stripe ready": _s.ACTIVE, "end": _s.CLOSED},
        _s.ACTIVE: {"stripe ready": _s.ACTIVE, "last stripe lost": _s.SUSPENDED, "end": _s.CLOSED},
        _s.SUSPENDED: {"stripe ready": _s.ACTIVE, "forgotten": _s.CONNECTING, "end": _s.CLOSED},
        _s.CLOSED: {},
    }
)

_t = StripeState
STRIPE: Final = _table(
    {
        _t.HELLO: {"hello": _t.PROOF, "lost": _t.CLOSED},
        _t.PROOF: {"proof": _t.READY, "lost": _t.CLOSED},
        _t.READY: {"lost": _t.CLOSED},
        _t.CLOSED: {},
    }
)

_o = OutgoingState
OUTGOING: Final = _table(
    {
        _o.OFFERED: {"accept": _o.SENDING, "reject": _o.CLOSED, "end": _o.CLOSED},
        _o.SENDING: {"confirmed": _o.CLOSED, "forgotten": _o.OFFERED, "end": _o.CLOSED},
        _o.CLOSED: {},
    }
)

_i = IncomingState
INCOMING: Final = _table(
    {
        _i.OFFERED: {"accept": _i.RECEIVING, "reject": _i.CLOSED, "closed": _i.CLOSED},
        _i.RECEIVING: {"complete": _i.COMPLETE, "give up": _i.CLOSING, "closed": _i.CLOSED},
        _i.COMPLETE: {"closed": _i.CLOSED},
        _i.CLOSING: {"closed": _i.CLOSED},
        _i.CLOSED: {},
    }
)

_c = ChunkState
CHUNK: Final = _table(
    {
        _c.IDLE: {"wanted": _c.WAITING, "held": _c.ARRIVED},
        _c.WAITING: {"requested": _c.ENCODING, "lent": _c.READY, "arrived": _c.ARRIVED, "unwanted": _c.IDLE},
        _c.ENCODING: {"encoded": _c.READY, "arrived": _c.ARRIVED, "unwanted": _c.IDLE},
        _c.READY: {"started": _c.SENDING, "arrived": _c.ARRIVED, "restarted": _c.WAITING, "unwanted": _c.IDLE},
        _c.SENDING: {"written": _c.SENT, "cut off": _c.READY},
        _c.SENT: {"arrived": _c.ARRIVED, "lost": _c.WAITING, "restarted": _c.WAITING, "unwanted": _c.IDLE},
        _c.ARRIVED: {"restarted": _c.WAITING, "unwanted": _c.IDLE},
    }
)


def advance(table: Table[S], state: S, signal: str) -> S:
    """The state after ``signal``. Raises :class:`~lynxproto.errors.LocalError` where the table has no such move."""
    try:
        return table[state][signal]
    except KeyError:
        raise LocalError(f"{type(state).__name__} {state.value!r} does not allow {signal!r}") from None
