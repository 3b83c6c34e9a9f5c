"""Which chunk goes next: strict between classes, by layer then deadline for anchors, fair between transfers else.

A class is a level. Anchors (class 0) come first, except that residuals keep a floor of the link (more while some
transfer is urgent); a transfer's own anchors always come before its residuals. Among residuals urgent transfers come
first, then lower levels, then the transfer that was served least. The same order is applied twice: to chunks to
encode, and to encoded chunks to send.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Generic, Protocol, TypeVar

from lynxproto.config import MAX_LEVELS
from lynxproto.state import ChunkState

__all__ = ["ChunkQueue", "Flow", "Schedulable", "Share"]


class Flow:
    """What the scheduler knows of a transfer.

    ``order`` is unique and grows with time of opening; ``anchors`` counts its anchor chunks that wait to be encoded
    or sent.
    """

    __slots__ = ("anchors", "deadline", "order", "urgent")

    def __init__(self, order: int, deadline: float) -> None:
        self.order = order
        self.deadline = deadline
        self.urgent = False
        self.anchors = 0


class Schedulable(Protocol):
    """A chunk, as the queues see it; ``place`` is ``(layer, position in the plan)``."""

    flow: Flow
    level: int
    place: tuple[int, int]
    state: ChunkState


C = TypeVar("C", bound=Schedulable)


class Share:
    """Byte accounting that gives residuals a share of a contended link, without ever giving them more."""

    __slots__ = ("owed",)

    def __init__(self) -> None:
        self.owed = 0.0

    def residual_is_due(self, nbytes: int) -> bool:
        """Whether a residual chunk of ``nbytes`` may go before an anchor that waits."""
        return self.owed >= nbytes

    def account(self, level: int, nbytes: int, share: float, *, contended: bool) -> None:
        """``nbytes`` of ``level`` went; ``contended`` means that both anchors and residuals were waiting."""
        if not contended:
            self.owed = 0.0
        elif level == 0:
            self.owed += nbytes * share / (1 - share)
        else:
            self.owed -= nbytes


class ChunkQueue(Generic[C]):
    """Chunks in one state, in priority order. A chunk leaves by changing its state; its entry is then skipped."""

    def __init__(self, state: ChunkState) -> None:
        self._state = state
        #: level -> flow order -> heap of (place, tie-break, chunk)
        self._heaps: list[dict[int, list[tuple[tuple[int, int], int, C]]]] = [{} for _ in range(MAX_LEVELS)]
        self._flows: dict[int, Flow] = {}
        self._served: list[dict[int, float]] = [{} for _ in range(MAX_LEVELS)]
        self._pushes = 0

    def push(self, chunk: C) -> None:
        """Add a chunk that has just entered this queue's state."""
        order, served = chunk.flow.order, self._served[chunk.level]
        heaps = self._heaps[chunk.level]
        if order not in heaps:  # one that was idle has no claim on the time it missed
            heaps[order] = []
            floor = min((served.get(other, 0.0) for other in heaps if other != order), default=0.0)
            served[order] = max(served.get(order, 0.0), floor)
            self._flows[order] = chunk.flow
        self._pushes += 1
        heappush(heaps[order], (chunk.place, self._pushes, chunk))

    def forget(self, flow: Flow) -> None:
        """Drop all chunks of a transfer that is over."""
        self._flows.pop(flow.order, None)
        for level in range(MAX_LEVELS):
            self._heaps[level].pop(flow.order, None)
            self._served[level].pop(flow.order, None)

    def served(self, chunk: C, nbytes: int) -> None:
        """``nbytes`` of ``chunk``'s transfer and class went: fairness counts them."""
        served = self._served[chunk.level]
        served[chunk.flow.order] = served.get(chunk.flow.order, 0.0) + nbytes

    def _top(self, level: int, order: int) -> C | None:
        heap = self._heaps[level].get(order)
        while heap:
            if heap[0][2].state is self._state:
                return heap[0][2]
            heappop(heap)
        if heap is not None:  # emptied
            del self._heaps[level][order]
        return None

    def anchor(self, fits: Callable[[C], bool]) -> C | None:
        """The first anchor chunk that ``fits`` (credit, budget)."""
        best: tuple[Any, C] | None = None
        for order in list(self._heaps[0]):
            chunk = self._top(0, order)
            if chunk is not None:
                key = (chunk.place[0], chunk.flow.deadline, order)
                if (best is None or key < best[0]) and fits(chunk):
                    best = (key, chunk)
        return best[1] if best else None

    def residual(self, fits: Callable[[C], bool]) -> C | None:
        """The first residual chunk that ``fits``."""
        urgent = [flow.order for flow in self._flows.values() if flow.urgent]
        for orders in (urgent, None) if urgent else (None,):
            for level in range(1, MAX_LEVELS):
                served = self._served[level]
                candidates = list(self._heaps[level]) if orders is None else orders
                for order in sorted(candidates, key=lambda o: (served.get(o, 0.0), o)):
                    chunk = self._top(level, order)
                    if chunk is not None and fits(chunk):
                        return chunk
        return None

    def pick(self, share: Share, portion: float, fits: Callable[[C], bool], size: Callable[[C], int]) -> C | None:
        """The chunk that goes next, accounted for in ``share`` and in the fairness of its class."""
        anchor = self.anchor(fits)
        # The floor is for other transfers: a residual is worth nothing to one whose own anchor still waits.
        residual = self.residual(fits if anchor is None else lambda chunk: not chunk.flow.anchors and fits(chunk))
        chunk = anchor if residual is None or (anchor and not share.residual_is_due(size(residual))) else residual
        if chunk is not None:
            contended = anchor is not None and residual is not None
            share.account(chunk.level, size(chunk), portion, contended=contended)
            self.served(chunk, size(chunk))
        return chunk
