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


class Pace:
    """How many bytes to ask of the connection at once: what the link carries in ``_SEND_S``. Times are in seconds."""

    def __init__(self) -> None:
        self.limit = _SEND_BYTES[0]
        self.rate: float | None = None
        """Bytes a second; None while too little went to tell."""
        self._bytes = 0
        self._busy = 0.0  # seconds that they took
        self._until: float | None = None  # the end of the last send; None if there was nothing to send since

    def idle(self) -> None:
        """There is nothing to send. What goes next finds room in buffers, and its time tells nothing of the link."""
        self._until = None

    def sent(self, nbytes: int, ended: float) -> None:
        """``nbytes`` went, until ``ended``."""
        if self._until is not None:
            self._bytes += nbytes
            self._busy += ended - self._until
        self._until = ended
        if self._busy >= _RATE_S:
            low, high = _SEND_BYTES
            self.rate = self._bytes / self._busy
            self.limit = int(max(low, min(self.rate * _SEND_S, high)))
            self._bytes, self._busy = 0, 0.0
