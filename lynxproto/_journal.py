"""What happens in an endpoint: one log record for each event, and the same for whoever observes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from lynxproto.errors import RemoteError, TransportError
from lynxproto.windows import Budget

__all__ = ["Journal", "Observe", "reason_of"]

#: ``observe(event, fields)``: called on the I/O thread; docs/operations.md lists events and fields.
Observe = Callable[[str, Mapping[str, Any]], object]

_log = logging.getLogger("lynxproto")
#: Lines a second about strangers that fail: a flood must not fill the disk.
_STRANGERS: Final = 5.0


def reason_of(error: BaseException) -> str:
    """A short stable name: the wire's error code in small letters, or ``link`` for one that broke."""
    if isinstance(error, TransportError):
        return "link"
    return error.code.name.lower() if isinstance(error, RemoteError) else type(error).__name__


class Journal:
    """Tells the log and the observer."""

    def __init__(self, observe: Observe | None = None) -> None:
        self._observe = observe
        self._strangers = Budget(_STRANGERS, 4 * _STRANGERS)
        self._untold = 0

    def tell(self, level: int, event: str, text: str, /, **fields: Any) -> None:
        """Log ``text`` with ``event`` and ``fields`` in the record, and tell the observer."""
        if _log.isEnabledFor(level):
            _log.log(level, "%s", text, extra={"event": event, "fields": fields})
        self._notify(event, fields)

    def handshake_failed(self, peer: str, error: BaseException, now: float, *, stage: str) -> None:
        """A peer did not get in; the lines of a flood are counted instead of written."""
        fields = {"peer": peer, "stage": stage, "reason": reason_of(error), "error": str(error)}
        if self._strangers.spend(1, now):
            more = f" ({self._untold} more went unlogged)" if self._untold else ""
            self._untold = 0
            _log.warning(
                "handshake with %s failed: %s%s",
                peer,
                error,
                more,
                extra={"event": "handshake_failed", "fields": fields},
            )
        else:
            self._untold += 1
        self._notify("handshake_failed", fields)

    def _notify(self, event: str, fields: Mapping[str, Any]) -> None:
        if self._observe is not None:
            try:
                self._observe(event, fields)
            except Exception:  # what the user's observer raises is its own affair
                _log.exception("observe failed")
