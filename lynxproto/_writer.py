"""What goes out next on each byte stream: control frames, then the most urgent chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lynxproto import frames
from lynxproto._context import Context
from lynxproto._receiver import Receiver
from lynxproto._sender import Sender
from lynxproto._stripe import Stripe

__all__ = ["Writer"]

_GREASE_RATE: Final = 1 / 64
#: Bytes given out at once that are many.
_LARGE: Final = 256 << 10
#: A frame pauses so long at most: even if the stripe that it gives way to stalls.
_PAUSE_S: Final = 0.1


class Writer:
    """Of all stripes of a connection, which adds and removes them in ``stripes``.

    With several stripes the first one carries no residuals: anchors need not wait there for the end of a residual's
    frame. While it carries an anchor, residuals' frames on the others pause where they are.
    """

    def __init__(self, ctx: Context, sender: Sender, receiver: Receiver, stripes: Mapping[int, Stripe]) -> None:
        self._ctx = ctx
        self._sender = sender
        self._receiver = receiver
        self._stripes = stripes

    def take(self, stripe: Stripe, limit: int) -> tuple[list[memoryview], bool]:
        """About ``limit`` bytes for ``stripe``, and whether a frame ended in them.

        A large ``limit`` may be doubled, to hold the rest of a frame: nothing else could go before it.
        """
        chunks: list[memoryview] = []
        ended = False
        stripe.lent.clear()
        if self._paused(stripe):
            return chunks, ended
        if stripe.lender is not None:
            stripe.lent.add(stripe.lender)
        more = limit if limit >= _LARGE else 0
        while limit > 0 and (stripe.out or self._next_frame(stripe)):
            part = stripe.out.popleft()
            if part.nbytes > limit + more:
                stripe.out.appendleft(part[limit:])
                part = part[:limit]
            chunks.append(part)
            limit -= part.nbytes
            if not stripe.out:
                self._frame_written(stripe)
                ended = True
        return chunks, ended

    def has_some(self, stripe: Stripe) -> bool:
        """Whether :meth:`take` may have something. Cheap."""
        if stripe.out:
            return not self._paused(stripe)
        if stripe.control or stripe.pongs or stripe.probed:
            return True
        if not stripe.ready:
            return False
        waits = self._sender.anchors_wait if stripe is self._express() else self._sender.waits
        return waits or bool(self._ctx.control) or self._receiver.due or self._sender.plans_wait

    def timer(self, stripe: Stripe) -> float | None:
        """When a frame on ``stripe`` has paused for long enough."""
        if stripe.may_pause and stripe.paused_at is not None and self._ctx.now < stripe.paused_at + _PAUSE_S:
            return stripe.paused_at + _PAUSE_S
        return None

    def _express(self) -> Stripe | None:
        """The stripe that is kept free of residuals: the first of several."""
        first = None
        for stripe in self._stripes.values():
            if stripe.ready:
                if first is not None:
                    return first
                first = stripe
        return None

    def _paused(self, stripe: Stripe) -> bool:
        """Whether the rest of the residual's frame on ``stripe`` lets an anchor on another go first."""
        if not stripe.may_pause or not stripe.ready:
            return False
        express = self._express()
        if express is None or express.writing is None or express.writing.level > 0:
            return False
        if stripe.paused_at is None:
            stripe.paused_at = self._ctx.now
        return self._ctx.now < stripe.paused_at + _PAUSE_S

    def _next_frame(self, stripe: Stripe) -> bool:
        """Start the most urgent frame on ``stripe``; False if there is none."""
        if not stripe.control and stripe.ready:
            self._answer_pings(stripe)
        if stripe.control:
            self._start_control(stripe, stripe.control.popleft(), 0)
            return True
        if not stripe.ready:
            return False
        if not self._ctx.control and self._receiver.due:
            self._receiver.flush()  # not before: while frames wait, more changes fit into the same ACK
        if self._ctx.control:
            self._start_control(stripe, *self._ctx.control.popleft())
        else:
            chunk = self._sender.next_frame(anchors_only=stripe is self._express())
            if chunk is None:
                self._sender.say_plan()
                if not self._ctx.control:
                    return False
                self._start_control(stripe, *self._ctx.control.popleft())
                return True
            stripe.may_pause = chunk.level > 0 and not self._sender.anchors_wait  # else it is due though anchors wait
            stripe.paused_at = None
            while self._ctx.control:
                self._start_control(stripe, *self._ctx.control.popleft())
            if self._ctx.config.grease and self._ctx.grease.random() < _GREASE_RATE:
                self._start_control(stripe, frames.grease_frame(self._ctx.grease), 0)
            parts = self._sender.frame(chunk)
            stripe.writing = chunk
            stripe.lender = chunk.tile.transfer.id
            stripe.lent.add(stripe.lender)
            stripe.writing_bytes = sum(part.nbytes for part in parts)
            stripe.out.extend(parts)
        return True

    def _answer_pings(self, stripe: Stripe) -> None:
        """One status answers all probes that came before it; made only now, so that it does not wait many times."""
        if stripe.probed:
            stripe.control.extend(self._receiver.status_frames())
            stripe.probed = False
        stripe.control.extend(self._ctx.encode(frames.Pong(id=ping)) for ping in stripe.pongs)
        stripe.pongs.clear()

    def _start_control(self, stripe: Stripe, frame: bytes, transfer: int) -> None:
        stripe.out.append(memoryview(frame))
        found = self._sender.transfers.get(transfer) or self._receiver.transfers.get(transfer)
        for counters in (self._ctx.counters, found.counters) if found else (self._ctx.counters,):
            counters.control_frames_sent += 1
            counters.control_bytes_sent += len(frame)

    def _frame_written(self, stripe: Stripe) -> None:
        chunk, stripe.writing, stripe.lender = stripe.writing, None, None
        stripe.may_pause = False
        if chunk is not None:
            self._sender.written(chunk, stripe.index, stripe.writing_bytes, self._ctx.now)
