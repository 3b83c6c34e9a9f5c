"""Which chunk goes next, with many transfers: order, fairness, and who must not be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lynxproto.scheduler import ChunkQueue, Fit, Flow, Share
from lynxproto.state import ChunkState


@dataclass(eq=False)
class Piece:
    flow: Flow
    level: int
    place: tuple[int, int]
    size: int = 10
    state: ChunkState = ChunkState.READY


def always(piece: Any) -> Fit:
    return Fit.YES


def take(
    queue: ChunkQueue[Piece],
    share: Share,
    fits: Any = always,
    *,
    portion: float = 0.1,
    urgent: Any = (),
    now: float = 0.0,
) -> Any:
    piece = queue.pick(share, portion, now, fits, lambda p: p.size, urgent=urgent)
    if piece is not None:
        piece.state = ChunkState.SENDING
        if piece.level == 0:
            piece.flow.anchors -= 1
            if not piece.flow.anchors:
                queue.anchors_gone(piece.flow)
    return piece


def fill(flows: int, layers: int = 2, levels: int = 3) -> tuple[ChunkQueue[Piece], list[Flow], int]:
    queue: ChunkQueue[Piece] = ChunkQueue(ChunkState.READY)
    found = [Flow(order, float("inf")) for order in range(flows)]
    count = 0
    for flow in found:
        for layer in range(layers):
            for level in range(levels):
                flow.anchors += level == 0
                queue.push(Piece(flow, level, (layer, 0)))
                count += 1
    return queue, found, count


@pytest.mark.parametrize("flows", [1, 7, 1000])
def test_everything_goes_once_anchors_first_by_layer(flows: int) -> None:
    queue, _, count = fill(flows)
    share = Share()
    out = [take(queue, share) for _ in range(count)]
    assert take(queue, share) is None
    assert not queue
    assert len({id(piece) for piece in out}) == count
    anchors = [piece.place[0] for piece in out[: 2 * flows] if piece.level == 0]
    assert anchors == sorted(anchors)
    # nobody's residual before that same transfer's last anchor
    last_anchor = {piece.flow.order: i for i, piece in enumerate(out) if piece.level == 0}
    assert all(i > last_anchor[piece.flow.order] for i, piece in enumerate(out) if piece.level)


def test_residuals_are_fair() -> None:
    queue, flows, _ = fill(50, layers=20, levels=1)
    for flow in flows:
        flow.anchors = 0
    queue = ChunkQueue(ChunkState.READY)
    for flow in flows:
        for layer in range(20):
            queue.push(Piece(flow, 1, (layer, 0), size=10 if flow.order % 2 else 5))
    share, got = Share(), dict.fromkeys(range(50), 0)
    for _ in range(500):
        piece = take(queue, share)
        got[piece.flow.order] += piece.size
    assert max(got.values()) - min(got.values()) <= 10


def test_an_anchor_that_its_own_credit_holds_back_lets_others_pass() -> None:
    queue, flows, _ = fill(3)
    short = flows[0]
    out = [take(queue, Share(), lambda p: Fit.NOT_THIS_TRANSFER if p.flow is short else Fit.YES) for _ in range(4)]
    assert [piece.flow.order for piece in out] == [1, 2, 1, 2]
    assert take(queue, Share()).flow is short


def test_nothing_overtakes_what_waits_for_room_that_all_share() -> None:
    queue, flows, _ = fill(1, layers=1, levels=1)
    other = Flow(9, float("inf"))
    other.anchors = 1
    queue.push(Piece(other, 0, (1, 0), size=1))
    assert take(queue, Share(), lambda p: Fit.NOTHING if p.size > 5 else Fit.YES) is None
    assert take(queue, Share()).flow is flows[0]


def test_urgent_residuals_come_first() -> None:
    queue, flows, _ = fill(5, layers=1)
    share = Share()
    for _ in range(5):
        assert take(queue, share).level == 0
    assert take(queue, share, urgent=[flows[3]]).flow is flows[3]


def test_a_transfer_that_is_over_leaves_nothing() -> None:
    queue, flows, _ = fill(2)
    queue.forget(flows[0])
    out = [take(queue, Share()) for _ in range(6)]
    assert {piece.flow.order for piece in out} == {1}
    assert take(queue, Share()) is None


@pytest.mark.parametrize("urgent", [False, True])
def test_anchors_have_all_of_the_link_for_a_while(urgent: bool) -> None:
    """What waited longer than the grace gets its floor, and what it was owed; urgent residuals do not wait for it."""
    queue: ChunkQueue[Piece] = ChunkQueue(ChunkState.READY)
    waiting, busy = Flow(0, float("inf")), Flow(1, float("inf"))
    waiting.urgent = urgent
    for place in range(20):
        queue.push(Piece(waiting, 1, (place, 0)))
    for place in range(100):
        busy.anchors += 1
        queue.push(Piece(busy, 0, (place, 0)))
    share = Share(grace=1.0)
    pieces = [take(queue, share, now=0.05 * i, urgent=[waiting] if urgent else ()) for i in range(60)]
    first = next(i for i, piece in enumerate(pieces) if piece.level)
    assert first < 20 if urgent else 20 <= first <= 21
    assert sum(piece.level for piece in pieces) in (5, 6)  # a tenth
    while take(queue, share, now=3.0).level == 0 or busy.anchors:
        pass
    assert take(queue, share, now=3.0) is None or share.since is None  # anchors are gone: the next time begins anew
