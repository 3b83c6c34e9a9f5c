"""What happens in an endpoint: one log record for each event, and the same for whoever observes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from lynxproto.errors import LynxError, RejectedError, RemoteError, TransferCancelledError, TransportError
from lynxproto.windows import Budget

if TYPE_CHECKING:
    from lynxproto._stats import TransferStats
    from lynxproto.access import Principal
    from lynxproto.manifest import Manifest

__all__ = ["Journal", "Observe", "reason_of"]

#: ``observe(event, fields)``: called on the I/O thread; docs/operations.md lists events and fields.
Observe = Callable[[str, Mapping[str, Any]], object]

_log = logging.getLogger("lynxproto")
#: Lines a second about peers that are refused: a flood must not fill the disk.
_REFUSALS: Final = 5.0


def reason_of(error: BaseException) -> str:
    """A short stable name: the wire's error code in small letters, or ``link`` for one that broke."""
    if isinstance(error, TransportError):
        return "link"
    return error.code.name.lower() if isinstance(error, RemoteError) else type(error).__name__


class Side(Protocol):
    """What of a transfer is told."""

    id: int
    manifest: Manifest
    principal: Principal
    stats: TransferStats
    error: LynxError | None
    complete: bool
    final: int | None


def _about(direction: str, side: Side, peer: str) -> dict[str, Any]:
    return {
        "transfer": f"{side.id:032x}",
        "direction": direction,
        "peer": peer,
        "principal": side.principal.name,
        "request_id": side.manifest.request_id,
    }


def _outcome(side: Side) -> str:
    """``complete``, ``degraded``, ``rejected``, ``cancelled`` or ``failed``."""
    if side.complete:
        return "complete" if getattr(side, "degraded", None) is None else "degraded"
    if isinstance(side.error, RejectedError):
        return "rejected"
    return "cancelled" if side.error is None or isinstance(side.error, TransferCancelledError) else "failed"


class Journal:
    """Tells the log and the observer."""

    def __init__(self, observe: Observe | None = None) -> None:
        self._observe = observe
        self._refusals = Budget(_REFUSALS, 4 * _REFUSALS)
        self._untold = 0

    def tell(self, level: int, event: str, text: str, /, **fields: Any) -> None:
        """Log ``text`` with ``event`` and ``fields`` in the record, and tell the observer."""
        if _log.isEnabledFor(level):
            _log.log(level, "%s", text, extra={"event": event, "fields": fields})
        self._notify(event, fields)

    def refuse(self, event: str, text: str, now: float, /, **fields: Any) -> None:
        """The same, as a warning about a peer that is refused; of a flood most lines are only counted."""
        if self._refusals.spend(1, now):
            more = f" ({self._untold} more went unlogged)" if self._untold else ""
            self._untold = 0
            _log.warning("%s%s", text, more, extra={"event": event, "fields": fields})
        else:
            self._untold += 1
        self._notify(event, fields)

    def handshake_failed(self, peer: str, error: BaseException, now: float, *, stage: str) -> None:
        """A peer did not get in."""
        text = f"handshake with {peer} failed: {error}"
        fields = {"peer": peer, "stage": stage, "reason": reason_of(error), "error": str(error)}
        self.refuse("handshake_failed", text, now, **fields)

    def transfer_opened(self, direction: str, side: Side, peer: str) -> None:
        """A transfer was offered to the peer (out), or accepted from it (in)."""
        fields = _about(direction, side, peer)
        text = f"transfer {fields['transfer']} {'to' if direction == 'out' else 'from'} {peer} opened"
        if side.stats.policy:
            fields |= {"policy": side.stats.policy, "reason": side.stats.reason}
            text += f"; policy {side.stats.policy}: {side.stats.reason}"
        self.tell(logging.INFO, "transfer_opened", text, **fields, cache_bytes=side.manifest.nbytes)

    def level_ready(self, side: Side, peer: str, level: int, now: float) -> None:
        """An incoming transfer's arrays hold ``level`` everywhere."""
        fields = _about("in", side, peer)
        seconds = now - side.stats.opened
        text = f"transfer {fields['transfer']}: level {level} is ready after {seconds:.3f} s"
        self.tell(logging.DEBUG, "level_ready", text, **fields, level=level, seconds=seconds)

    def transfer_closed(self, direction: str, side: Side, peer: str, now: float) -> None:
        """A transfer is over: how, and what it moved."""
        fields, stats = _about(direction, side, peer), side.stats
        outcome = _outcome(side)
        levels = [
            {"level": level, "chunks": s.chunks, "bytes": s.bytes, "seconds": (s.last or now) - stats.opened}
            for level, s in sorted(stats.levels.items())
            if s.chunks
        ]
        seconds = now - stats.opened
        error = None if outcome == "complete" or side.error is None else str(side.error)
        self.tell(
            logging.INFO if error is None else logging.WARNING,
            "transfer_closed",
            f"transfer {fields['transfer']} {'to' if direction == 'out' else 'from'} {peer}: {outcome}, "
            f"{stats.bytes} bytes in {seconds:.3f} s{'' if error is None else f': {error}'}",
            **fields,
            outcome=outcome,
            exact=outcome == "complete" and side.final is None and not side.manifest.lossy,
            error=error,
            cache_bytes=side.manifest.nbytes,
            bytes=stats.bytes,
            seconds=seconds,
            levels=levels,
        )

    def _notify(self, event: str, fields: Mapping[str, Any]) -> None:
        if self._observe is not None:
            try:
                self._observe(event, fields)
            except Exception:  # what the user's observer raises is its own affair
                _log.exception("observe failed")
