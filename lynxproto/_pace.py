"""How much a byte stream takes at once."""

from __future__ import annotations

from typing import Final

__all__ = ["Pace"]

#: What is asked of the connection at once is what the link lately carried in this time, within bounds: a more urgent
#: frame has to wait for it (and for the kernel's share), and each time costs some CPU.
_SEND_S: Final = 1e-3
#: The link's speed is taken over so long.
_RATE_S: Final = 5e-3
_SEND_BYTES: Final = (16 << 10, 4 << 20)
#: The same at first: what a kernel holds unsent anyway.
_FIRST_BYTES: Final = 128 << 10
#: A link that had little to carry may be faster than it was seen to be: pieces by so much (frames are not).
_HIDDEN: Final = 2.0


class Pace:
    """How many bytes to ask of the connection at once: what the link carries in ``_SEND_S``. Times are in seconds."""

    def __init__(self) -> None:
        self.limit = _FIRST_BYTES
        self.rate: float | None = None
        """Bytes a second; None while too little went to tell."""
        self._bytes = 0
        self._busy = 0.0  # seconds that they took
        self._until: float | None = None  # the end of the last send; None if there was nothing to send since

    def idle(self) -> None:
        """There is nothing to send. What goes next finds room in buffers, and its time tells nothing of the link."""
        self._until = None

    def sent(self, nbytes: int, ended: float, link_rate: float | None = None) -> None:
        """``nbytes`` went, until ``ended``; the stream knows ``link_rate`` of a link behind buffers (0: not yet)."""
        if self._until is not None:
            self._bytes += nbytes
            self._busy += ended - self._until
        self._until = ended
        if self._busy >= _RATE_S:
            seen, self._bytes, self._busy = self._bytes / self._busy, 0, 0.0
            known = seen if link_rate is None else min(seen, link_rate)
            if known:
                low, high = _SEND_BYTES
                self.rate = known
                self.limit = int(max(low, min(seen * _SEND_S, _HIDDEN * known * _SEND_S, high)))
