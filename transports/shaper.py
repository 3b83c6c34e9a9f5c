"""A link of a given speed, without root: a token bucket in front of any transport.

For real shaping use ``tc``; this one serves demos and tests. It never queues: :meth:`ByteStream.send` returns when the
link has taken the bytes, so residual data cannot pile up behind the caller's back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from lynxproto.errors import ConfigError
from lynxproto.transports.abc import ByteStream, WrappedStream, take

__all__ = ["ShapedStream", "TokenBucket"]

_TICK_S = 1e-3  # pieces of about this long, so that streams sharing a link alternate


class TokenBucket:
    """A link's budget: ``bits_per_second``, and at most ``burst_bytes`` at once (default: 5 ms worth, at least 16 KiB).

    The burst makes up for timers that fire late. Streams that share a bucket share the link. ``clock`` returns seconds.
    """

    def __init__(
        self,
        bits_per_second: float,
        burst_bytes: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not bits_per_second > 0:
            raise ConfigError(f"a link needs a positive speed, not {bits_per_second!r} bits per second")
        self.bytes_per_second = bits_per_second / 8
        self.burst_bytes = burst_bytes if burst_bytes is not None else max(16 << 10, int(self.bytes_per_second * 5e-3))
        if self.burst_bytes < 1:
            raise ConfigError(f"a link needs a burst of at least one byte, not {burst_bytes!r}")
        #: What a sender should ask for at once.
        self.piece = max(1, min(self.burst_bytes, max(1500, int(self.bytes_per_second * _TICK_S))))
        self._clock = clock
        self._tokens = float(self.burst_bytes)
        self._filled_at = clock()

    def reserve(self, nbytes: int) -> float:
        """Take ``nbytes`` from the budget; return the seconds to wait before they may go."""
        now = self._clock()
        self._tokens = min(self.burst_bytes, self._tokens + (now - self._filled_at) * self.bytes_per_second)
        self._filled_at = now
        self._tokens -= nbytes
        return max(0.0, -self._tokens / self.bytes_per_second)

    def over(self, stream: ByteStream) -> ByteStream:
        """See :meth:`~lynxproto.transports.abc.Link.over`."""
        return ShapedStream(stream, self)


class ShapedStream(WrappedStream):
    """``stream``, which it owns, with its sending held to ``link``."""

    def __init__(self, stream: ByteStream, link: TokenBucket) -> None:
        super().__init__(stream)
        self._link = link

    async def send(self, buffers: Sequence[memoryview]) -> None:
        """See :meth:`ByteStream.send`."""
        queue = deque(memoryview(b).cast("B") for b in buffers)
        while piece := take(queue, self._link.piece):
            delay = self._link.reserve(sum(part.nbytes for part in piece))
            if delay > 0:
                await asyncio.sleep(delay)
            await self._stream.send(piece)
