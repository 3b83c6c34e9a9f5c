"""Credit windows: cumulative byte limits, as QUIC's flow control (RFC 9000, section 4), but charged once a chunk.

A chunk is charged when it is first sent, not when it is sent again: its receiver holds at most one copy. So a lost
frame costs no credit, and a duplicate gives none back.
"""

from __future__ import annotations

from lynxproto.errors import ErrorCode, ProtocolError

__all__ = ["Budget", "ReceiveWindow", "SendWindow"]


class SendWindow:
    """The sender's view: ``charged`` bytes of at most ``limit``, and ``reserved`` for chunks being encoded."""

    __slots__ = ("charged", "limit", "reserved")

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.charged = 0
        self.reserved = 0

    def fits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be charged."""
        return self.charged + self.reserved + nbytes <= self.limit

    def raise_limit(self, limit: int) -> bool:
        """Take a limit from the peer; limits only grow, so late frames change nothing. True if it grew."""
        if limit <= self.limit:
            return False
        self.limit = limit
        return True


class ReceiveWindow:
    """The receiver's view: of ``charged`` bytes, ``released`` have been given back; ``size`` may be out at a time."""

    __slots__ = ("advertised", "charged", "largest", "released", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.charged = 0
        self.released = 0
        self.advertised = size
        self.largest = 0
        """Bytes of the largest chunk that is known to come."""

    def charge(self, nbytes: int, what: str) -> None:
        """Account for a chunk that arrives. Raises ProtocolError (FLOW_CONTROL) beyond the advertised limit."""
        if self.charged + nbytes > self.advertised:
            over = self.charged + nbytes - self.advertised
            raise ProtocolError(f"{what}: {nbytes} bytes are {over} more than the credit given", ErrorCode.FLOW_CONTROL)
        self.charged += nbytes

    def release(self, nbytes: int) -> None:
        """Give credit back."""
        self.released += nbytes

    def settle(self, final: int, what: str) -> int:
        """The sender says it charged ``final`` bytes in all and will charge no more.

        Returns how many of them this side never saw. Raises ProtocolError (FLOW_CONTROL) for an impossible figure.
        """
        if not self.charged <= final <= self.advertised:
            raise ProtocolError(
                f"{what}: final charge {final} is not between {self.charged} (seen) and {self.advertised} (allowed)",
                ErrorCode.FLOW_CONTROL,
            )
        unseen = final - self.charged
        self.charged = final
        return unseen

    @property
    def limit(self) -> int:
        """The cumulative limit to advertise now."""
        return self.released + self.size

    @property
    def pressing(self) -> bool:
        """Whether the peer may soon be short of credit: a quarter of the window can be given back."""
        return self.released + self.size - self.advertised >= self.size // 4

    @property
    def due(self) -> bool:
        """Whether the peer should be told: a quarter of the window has become free, or it may lack room for a chunk."""
        gain = self.limit - self.advertised
        return gain > 0 and (gain >= self.size // 4 or self.advertised - self.charged < self.largest)

    def advertise(self) -> int:
        """The limit to put into a CREDIT frame; from now on the peer may use it."""
        self.advertised = self.limit
        return self.advertised


class Budget:
    """A token bucket: ``rate`` a second on average, and ``burst`` at once (default: two seconds' worth)."""

    __slots__ = ("_at", "_left", "burst", "rate")

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self.rate = rate
        self.burst = 2 * rate if burst is None else burst
        self._left = self.burst
        self._at: float | None = None

    def spend(self, amount: float, now: float) -> bool:
        """Take ``amount``; False if there is not so much."""
        if self._at is not None:
            self._left = min(self.burst, self._left + self.rate * max(now - self._at, 0.0))
        self._at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True

    def full(self, now: float) -> bool:
        """Whether nothing of it is in use: it may be forgotten."""
        return self._at is None or self._left + self.rate * (now - self._at) >= self.burst
