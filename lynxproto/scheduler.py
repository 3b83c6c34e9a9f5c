"""Which chunk goes next: strict between classes, by layer then deadline for anchors, fair between transfers else.

A class is a level. Anchors (class 0) come first, except that residuals keep a floor of the link (more while some
transfer is urgent); a transfer's own anchors always come before its residuals. Among residuals urgent transfers come
first, then lower levels, then the transfer that was served least. The same order is applied twice: to chunks to
encode, and to encoded chunks to send.

What a pick costs does not grow with the number of transfers: each class is a heap of transfers, and of each transfer's
chunks. Entries that have become wrong are put right when they come up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import Any, Generic, Protocol, TypeVar

from lynxproto.config import MAX_LEVELS
from lynxproto.state import ChunkState

__all__ = ["ChunkQueue", "Fit", "Flow", "Schedulable", "Share"]


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


class Fit(Enum):
    """Whether a chunk may go now."""

    YES = "yes"
    NOT_THIS_TRANSFER = "not this transfer"  # its own credit is short: others may go
    NOTHING = "nothing"  # what all share is short: a smaller chunk must not overtake, or large ones would starve


class Schedulable(Protocol):
    """A chunk, as the queues see it; ``place`` is ``(layer, position in the plan)``."""

    flow: Flow
    level: int
    place: tuple[int, int]
    state: ChunkState


C = TypeVar("C", bound=Schedulable)


class Share:
    """Byte accounting that gives residuals a share of a contended link, without ever giving them more.

    Anchors that are gone within ``grace`` seconds have all of the link: residuals lacked it for no longer than that.
    """

    __slots__ = ("grace", "owed", "since")

    def __init__(self, grace: float = 0.0) -> None:
        self.grace = grace
        self.owed = 0.0
        self.since: float | None = None  # since when the link has been contended

    def residual_is_due(self, nbytes: int, now: float, *, urgent: bool) -> bool:
        """Whether a residual chunk of ``nbytes`` may go before an anchor that waits."""
        waited = self.since is not None and now - self.since >= self.grace
        return self.owed >= nbytes and (urgent or waited)

    def account(self, level: int, nbytes: int, share: float, now: float, *, contended: bool) -> None:
        """``nbytes`` of ``level`` went; ``contended`` means that both anchors and residuals were waiting."""
        if contended and self.since is None:
            self.since = now
        if not contended:
            self.owed = 0.0
            self.since = None
        elif level == 0:
            self.owed += nbytes * share / (1 - share)
        else:
            self.owed -= nbytes


class _Class(Generic[C]):
    """The chunks of one class: per transfer a heap by place, and a heap of the transfers by :meth:`_rank`."""

    def __init__(self, state: ChunkState, level: int) -> None:
        self._state = state
        self._level = level
        #: transfer -> its chunks; never an empty heap, though all of it may have left
        self.chunks: dict[int, list[tuple[tuple[int, int], int, C]]] = {}
        self._ranks: dict[int, Any] = {}  # as the transfer stands in the heap now
        self._heap: list[tuple[Any, int]] = []
        self._aside: set[int] = set()  # transfers that are not in the heap: their own anchors come first
        self._served: dict[int, float] = {}
        self._pushes = 0

    def push(self, chunk: C) -> None:
        """Add a chunk."""
        order = chunk.flow.order
        chunks = self.chunks.get(order)
        if chunks is None:  # one that was idle has no claim on the time it missed
            chunks = self.chunks[order] = []
            if self._level and self._heap:
                self._served[order] = max(self._served.get(order, 0.0), self._heap[0][0])
        self._pushes += 1
        heappush(chunks, (chunk.place, self._pushes, chunk))
        if order not in self._aside:
            self._enter(order, chunks[0][2])

    def forget(self, order: int) -> None:
        """Drop all chunks of a transfer."""
        for known in (self.chunks, self._ranks, self._served):
            known.pop(order, None)
        self._aside.discard(order)

    def serve(self, order: int, nbytes: int) -> None:
        """``nbytes`` of a transfer went: fairness counts them."""
        self._served[order] = self._served.get(order, 0.0) + nbytes

    def recall(self, order: int | None = None) -> None:
        """A transfer (or all of them) that was set aside is wanted again."""
        for other in list(self._aside) if order is None else [order] if order in self._aside else []:
            self._aside.discard(other)
            top = self.top(other)
            if top is not None:
                self._enter(other, top)

    def top(self, order: int) -> C | None:
        """The first chunk of a transfer."""
        chunks = self.chunks.get(order)
        while chunks:
            if chunks[0][2].state is self._state:
                return chunks[0][2]
            heappop(chunks)
        if chunks is not None:  # emptied
            del self.chunks[order]
            self._ranks.pop(order, None)
            self._aside.discard(order)
        return None

    def first(self, fits: Callable[[C], Fit], *, behind_anchors: bool) -> C | None:
        """The first chunk that fits; ``behind_anchors``: of a transfer none of whose anchors wait."""
        blocked: list[tuple[Any, int]] = []
        found = None
        while self._heap:
            rank, order = self._heap[0]
            chunk = self.top(order) if self._ranks.get(order) == rank else None
            if chunk is None:
                heappop(self._heap)
                continue
            now = self._rank(chunk)
            if now != rank:
                heappop(self._heap)
                self._enter(order, chunk)
            elif behind_anchors and chunk.flow.anchors:
                heappop(self._heap)
                del self._ranks[order]
                self._aside.add(order)
            else:
                fit = fits(chunk)
                if fit is Fit.NOT_THIS_TRANSFER:
                    blocked.append(heappop(self._heap))
                    continue
                found = chunk if fit is Fit.YES else None
                break
        for entry in blocked:
            heappush(self._heap, entry)
        return found

    def _enter(self, order: int, chunk: C) -> None:
        rank = self._rank(chunk)
        if self._ranks.get(order) != rank:
            self._ranks[order] = rank
            heappush(self._heap, (rank, order))
            if len(self._heap) > 64 + 2 * len(self._ranks):  # mostly entries that are wrong
                self._heap = [(rank, order) for order, rank in self._ranks.items()]
                heapify(self._heap)

    def _rank(self, chunk: C) -> Any:
        if self._level:
            return self._served.get(chunk.flow.order, 0.0)
        return chunk.place[0], chunk.flow.deadline


class ChunkQueue(Generic[C]):
    """Chunks in one state, in priority order. A chunk leaves by changing its state; its entry is then skipped."""

    def __init__(self, state: ChunkState) -> None:
        self._classes: list[_Class[C]] = [_Class(state, level) for level in range(MAX_LEVELS)]
        self._residuals = self._classes[1:]

    def __bool__(self) -> bool:
        """Whether there may be a chunk."""
        for class_ in self._classes:  # noqa: SIM110 -- this is asked all the time, and a generator costs more than it does
            if class_.chunks:
                return True
        return False

    @property
    def anchors(self) -> bool:
        """Whether there may be one of class 0."""
        return bool(self._classes[0].chunks)

    def push(self, chunk: C) -> None:
        """Add a chunk that has just entered this queue's state."""
        self._classes[chunk.level].push(chunk)

    def forget(self, flow: Flow) -> None:
        """Drop all chunks of a transfer that is over."""
        for class_ in self._classes:
            class_.forget(flow.order)

    def anchors_gone(self, flow: Flow) -> None:
        """None of the transfer's anchors waits any more."""
        for class_ in self._residuals:
            class_.recall(flow.order)

    def _residual(self, fits: Callable[[C], Fit], urgent: Collection[Flow], *, behind_anchors: bool) -> C | None:
        residuals = [class_ for class_ in self._residuals if class_.chunks]
        if not residuals:
            return None
        if not behind_anchors:
            for class_ in residuals:
                class_.recall()
        for flow in urgent:
            if not (behind_anchors and flow.anchors):
                for class_ in residuals:
                    chunk = class_.top(flow.order)
                    if chunk is not None and fits(chunk) is Fit.YES:
                        return chunk
        for class_ in residuals:
            chunk = class_.first(fits, behind_anchors=behind_anchors)
            if chunk is not None:
                return chunk
        return None

    def pick(
        self,
        share: Share,
        portion: float,
        now: float,
        fits: Callable[[C], Fit],
        size: Callable[[C], int],
        *,
        urgent: Collection[Flow] = (),
        anchors_only: bool = False,
    ) -> C | None:
        """The chunk that goes next, accounted for in ``share`` and in the fairness of its class.

        ``urgent``: the transfers that asked for that, in the order they are served.
        """
        anchors = self._classes[0]
        anchor = anchors.first(fits, behind_anchors=False) if anchors.chunks else None
        contended = False
        for class_ in self._residuals:
            if class_.chunks:
                contended = True
                break
        if anchors_only or not contended:
            if anchor is not None or not anchors_only:
                share.account(0, size(anchor) if anchor else 0, portion, now, contended=contended)
            if anchor is not None:
                anchors.serve(anchor.flow.order, size(anchor))
            return anchor
        # The floor is for other transfers: a residual is worth nothing to one whose own anchor still waits.
        residual = self._residual(fits, urgent, behind_anchors=anchor is not None)
        chunk = residual or anchor
        if anchor and residual and not share.residual_is_due(size(residual), now, urgent=residual.flow.urgent):
            chunk = anchor
        if chunk is not None:
            contended = anchor is not None and residual is not None
            share.account(chunk.level, size(chunk), portion, now, contended=contended)
            self._classes[chunk.level].serve(chunk.flow.order, size(chunk))
        return chunk
