"""A transfer goes on wherever it was cut: the link at any byte, and either side or both as new processes.

All byte positions of a small transfer are tried, in both directions. What a receiver keeps outlives its process, as a
session's state folder does (:mod:`links` keeps it in a dictionary).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from links import Pipe, Shell, World, cache, manifest_of, small_config, tile_words, tiles_of

from lynxproto import events as ev
from lynxproto.config import MAX_LEVELS, Limits
from lynxproto.errors import ErrorCode, ProtocolError
from lynxproto.frames import Error, FrameType, Header, HeldLayer, TileKey, control_frame, data_frame
from lynxproto.manifest import Want

KEY = bytes(range(32))
CONFIG = small_config(grease=False)
#: One layer, 2 tiles a part: what crosses the link is small enough to be cut everywhere.
WORDS = cache(layers=1, heads=1, tokens=6, dim=4)


def only(events: list[Any]) -> Any:
    assert len(events) == 1
    return events[0]


def flow(world: World, side: int, nbytes: int) -> int:
    """Let the two sides talk until ``side`` has sent ``nbytes`` more bytes, or nothing moves; returns how many."""
    (pipe,) = [pipe for pipe in world.pipes if pipe.alive]
    arrived, moved = 0, True
    while moved and arrived < nbytes:
        moved = False
        for shell in world.shells:
            shell.handle_events(world.now)
            shell.encode(world.now)
        for sender in (0, 1):
            limit = nbytes - arrived if sender == side else 1 << 20
            data = b"".join(world.shells[sender].connection.data_to_send(world.now, pipe.ends[sender], limit))
            arrived += len(data) * (sender == side)
            if data:
                moved = True
                pipe.deliver(sender, data)
    for shell in world.shells:
        shell.handle_events(world.now)
    return arrived


def begin(config: Any = CONFIG, words: Any = WORDS, **kw: Any) -> tuple[World, int]:
    world = World(config, config)
    transfer = world.client.send(words, 0.0, resume=KEY, **{"step": 5, "levels": 2, **kw})
    return world, transfer


def cut(world: World) -> None:
    for pipe in world.pipes:
        if pipe.alive:
            pipe.alive = False
            for side in (0, 1):
                if world.shells[side].connection is not None:
                    world.shells[side].connection.stripe_lost(pipe.ends[side], world.now)
    for shell in world.shells:
        shell.handle_events(world.now)


def restart(world: World, side: int) -> Shell:
    """The process of ``side`` ends, and another begins; what it kept is all that is left."""
    old = world.shells[side]
    new = world.shells[side] = Shell(CONFIG, client=side == 0, seed=7 + side)
    new.kept = old.kept
    return new


def the_link_breaks(world: World) -> None:
    """Nothing else does."""


def the_receiver_restarts(world: World) -> None:
    restart(world, 1)


def both_restart(world: World) -> None:
    restart(world, 1)
    restart(world, 0).send(WORDS, world.now, resume=KEY, step=5, levels=2)


def kept(world: World) -> tuple[int, int]:
    """How many chunks, and bytes of payload, the receiver has kept."""
    got = world.server.kept.get(KEY)
    chunks = [level for levels in got.levels.values() for level in levels] if got else []
    return len(chunks), sum(map(len, chunks))


def connect(world: World) -> None:
    """Byte streams until one stands; a listener makes a new Connection for a session that it does not know."""
    while not any(pipe.alive for pipe in world.pipes) and not world.client.connection.closed:
        if world.server.connection.closed:
            restart(world, 1)
        world.new_pipe()


def reconnect(world: World) -> None:
    connect(world)
    world.settle()


def check(world: World, words: Any = WORDS) -> None:
    """Both sides are done, and the words are right."""
    (transfer,) = world.client.sent
    got = world.server.received[transfer]
    assert got.complete
    assert got.released is True
    assert world.client.released[transfer] is True
    for tile in got.plan:
        assert tile in got.verified
        assert np.array_equal(got.words(tile), tile_words(words, tile))
    assert got.result == (7, 1.5)
    for shell in world.shells:
        assert not shell.seen(ev.ConnectionFailed)


@pytest.mark.parametrize("side", [0, 1], ids=["sent", "answered"])
@pytest.mark.parametrize(("happens", "step"), [(the_link_breaks, 1), (the_receiver_restarts, 5), (both_restart, 5)])
def test_goes_on_after_a_cut_at_any_byte(happens: Callable[[World], None], step: int, side: int) -> None:
    """Every byte after the handshake: both sides end complete and equal, and what the receiver kept is not sent.

    Where a process restarts every fifth byte: nothing else than the link has half a frame.
    """
    world, _ = begin()
    start = 0
    while not world.client.seen(ev.HandshakeCompleted):
        start += flow(world, side, 1)
    stop = start + flow(world, side, 1 << 30)
    check(world)
    chunks = sum(world.server.connection.counters.received_frames)
    for position in range(start, stop, step):
        world, _ = begin()
        assert flow(world, side, position) == position
        cut(world)
        if world.client.released:  # both had said all that mattered
            continue
        had, _ = kept(world)
        happens(world)
        reconnect(world)
        if not world.client.released:
            world.pass_time(10)
        check(world)
        counters = world.server.connection.counters
        assert counters.duplicates == 0
        expected = chunks if happens is the_link_breaks else chunks - had
        assert sum(counters.received_frames) == expected, f"cut at byte {position}"


# --- what a receiver kept is judged


def keep(world: World, **kw: Any) -> None:
    """The receiver keeps all of a transfer of :data:`WORDS` but its last bytes; then both sides restart."""
    words = kw.pop("words", WORDS)
    transfer = world.client.send(words, 0.0, resume=KEY, finish=False, **{"step": 5, "levels": 2, **kw})
    world.settle()
    assert not world.server.received[transfer].complete or not world.client.released
    cut(world)
    restart(world, 1)
    restart(world, 0)


def fresh(config: Any = CONFIG) -> World:
    return World(config, config)


def test_a_receiver_that_has_everything_is_sent_nothing() -> None:
    world = fresh()
    keep(world)
    world.client.send(WORDS, 0.0, resume=KEY, step=5, levels=2)
    reconnect(world)
    check(world)
    assert sum(world.server.connection.counters.received_frames) == 0
    assert world.client.encoded == 0


def test_another_plan_of_the_same_manifest_is_sent_whole() -> None:
    world = fresh()
    keep(world)
    world.client.send(WORDS, 0.0, resume=KEY, step=2, levels=2)
    reconnect(world)
    check(world)
    (received,) = world.server.received.values()
    assert sum(world.server.connection.counters.received_frames) == sum(received.plan.values())


def test_another_manifest_or_secret_is_another_transfer() -> None:
    for levels, key in ((3, KEY), (2, KEY[::-1])):
        world = fresh()
        keep(world)
        world.client.send(WORDS, 0.0, resume=key, step=5, levels=levels)
        reconnect(world)
        check(world)
        (received,) = world.server.received.values()
        assert sum(world.server.connection.counters.received_frames) == sum(received.plan.values())


def test_what_was_kept_of_other_words_is_found_by_its_digest_and_sent_again() -> None:
    world = fresh()
    keep(world)
    other = cache(seed=5, layers=1, heads=1, tokens=6, dim=4)
    for part in ("key", "value"):
        other[0, part][:, :1] = WORDS[0, part][:, :1]  # one tile of each part is the same
    bad = [tile for tile in world.server.kept[KEY].plan if len(tile.tokens) > 1]
    world.server.bad_tiles = dict.fromkeys(bad, 1)  # what digests find
    world.client.send(other, 0.0, resume=KEY, step=5, levels=2)
    reconnect(world)
    check(world, other)
    assert sum(world.server.connection.counters.received_frames) == 2 * len(bad)
    for shell, peer in (world.shells, world.shells[::-1]):
        for level in range(MAX_LEVELS):
            mine, theirs = shell.connection._sender.windows[level], peer.connection._receiver.windows[level]
            assert mine.charged == theirs.charged == theirs.released
            assert mine.reserved == 0


def test_wants_and_cancelled_levels_bound_what_was_kept() -> None:
    world = fresh()
    keep(world)
    world.server.accepts = lambda event: (Want(levels=1),)
    transfer = world.client.send(WORDS, 0.0, resume=KEY, step=5, levels=2)
    reconnect(world)
    got = world.server.received[transfer]
    assert got.complete
    assert all(len(got.levels[tile]) == 1 for tile in got.plan)
    world = fresh()
    keep(world)
    transfer = world.client.send(WORDS, 0.0, resume=KEY, step=5, levels=2, finish=False)
    world.client.connection.cancel(transfer, 0.0, 0)
    world.client.connection.finish(transfer, 0.0)
    reconnect(world)
    assert world.server.received[transfer].complete
    assert world.client.released[transfer]


def test_a_lost_accept_says_the_same_again() -> None:
    world = fresh()
    keep(world)
    world.client.send(WORDS, 0.0, resume=KEY, step=5, levels=2)
    world.new_pipe()
    pipe = world.pipes[-1]
    for shell in world.shells:
        shell.handle_events(0.0)
    pipe.collect(0)
    for frame in pipe.frames[0]:
        pipe.deliver(0, frame)
    world.server.handle_events(0.0)
    pipe.frames[0].clear()
    pipe.collect(1)
    assert FrameType.ACCEPT in [Header.unpack(frame[:64]).type for frame in pipe.frames[1]]
    pipe.frames[1].clear()  # lost
    world.pass_time(5)
    check(world)
    assert sum(world.server.connection.counters.received_frames) == 0


def test_kept_layers_that_do_not_fit_one_frame_are_left_out() -> None:
    config = small_config(grease=False, limits=Limits(control_bytes=16 << 10))
    world = fresh(config)
    world.server.accepts = lambda event: "later"
    words = cache(layers=16, heads=1, tokens=6, dim=4)
    transfer = world.client.send(words, 0.0, resume=KEY, step=5, levels=2)
    world.settle()
    held = [HeldLayer(layer, bytes(16), bytes([1]) * 2000) for layer in range(16)]  # of plans that will not come
    world.server.connection.accept(transfer, 0.0, None, held)
    world.settle()
    check(world, words)
    assert 0 < len(world.client.seen(ev.TransferAccepted)) == 1
    assert world.server.connection.counters.control_bytes_sent < 24 << 10


@pytest.mark.parametrize("early", [False, True], ids=["after its plan", "before its plan"])
def test_a_sender_that_sends_what_is_held_breaks_the_rules(early: bool) -> None:
    world = fresh()
    keep(world)
    tile = next(iter(world.server.kept[KEY].plan))
    manifest = manifest_of(WORDS, levels=2)
    client = world.client.connection
    transfer = client.open(manifest, 0.0, resume=KEY)
    reconnect(world)
    data = np.ascontiguousarray(tile_words(WORDS, tile)).tobytes()
    codec = {"test-sliced": 0x8001, "raw": 1}[manifest.codecs[tile.codec]["id"]]
    frame = b"".join(data_frame(transfer, TileKey.of(tile), 0, memoryview(data), attempt=0, codec_id=codec))
    if early:
        world.pipes[-1].deliver(0, frame)
    client.plan(transfer, 0, tiles_of(manifest, 0, 5), 0.0)
    world.settle()
    if not early:
        world.pipes[-1].deliver(0, frame)
        world.settle()
    failed = only(world.server.seen(ev.ConnectionFailed))
    assert failed.error.code is ErrorCode.STATE
    assert "holds from another session" in str(failed.error)


# --- the server forgets


def test_a_server_that_always_forgets_is_given_up() -> None:
    world, transfer = begin(small_config(grease=False, session_restarts=3))
    for _ in range(20):
        flow(world, 0, 700)
        cut(world)
        restart(world, 1)
        world.server.kept = {}
        connect(world)
        if world.client.connection.closed:
            break
    failed = only(world.client.seen(ev.ConnectionFailed))
    assert failed.error.code is ErrorCode.NOT_FOUND
    assert world.client.released[transfer] is False
    assert len(world.client.seen(ev.HandshakeCompleted)) == 4


def test_a_stripe_that_reaches_another_server_costs_nothing_while_others_stand() -> None:
    """Behind one address there may be several servers: one that does not know the session is no reason to end it."""
    world = World(CONFIG, CONFIG)
    world.settle()
    other = Shell(CONFIG, client=False, seed=9).connection
    client = world.client.connection
    mine, theirs = client.open_stripe(0.0), other.open_stripe(0.0)
    other.receive_data(b"".join(client.data_to_send(0.0, mine)), 0.0, theirs)
    client.receive_data(b"".join(other.data_to_send(0.0, theirs)), 0.0, mine)
    world.client.handle_events(0.0)
    assert only(world.client.seen(ev.StripeClosed)).error.code is ErrorCode.NOT_FOUND
    world.client.send(WORDS, 0.0, resume=KEY, step=5, levels=2)
    world.settle()
    check(world)


def test_what_the_client_was_receiving_fails_when_the_server_forgets() -> None:
    world = World(CONFIG, CONFIG)
    world.settle()
    world.client.hold = True
    transfer = world.server.send(WORDS, 0.0, step=5, levels=2)
    world.settle()
    cut(world)
    restart(world, 1)
    reconnect(world)
    assert world.client.received[transfer].released is False
    assert world.client.received[transfer].error.code is ErrorCode.NOT_FOUND
    world.client.hold = False
    again = world.server.send(WORDS, 0.0, step=5, levels=2)
    world.settle()
    assert world.client.received[again].complete


def test_a_damaged_handshake_of_a_new_session_costs_its_stripe_only() -> None:
    world, _ = begin()
    flow(world, 0, 1500)
    cut(world)
    restart(world, 1)
    world.new_pipe()  # is told that the session is gone
    restart(world, 1)
    pipe_ends = [shell.connection.open_stripe(0.0) for shell in world.shells]
    hello = b"".join(world.client.connection.data_to_send(0.0, pipe_ends[0]))
    world.server.connection.receive_data(hello, 0.0, pipe_ends[1])
    answer = bytearray(b"".join(world.server.connection.data_to_send(0.0, pipe_ends[1])))
    answer[100] ^= 1
    world.client.connection.receive_data(answer, 0.0, pipe_ends[0])
    world.client.handle_events(0.0)
    assert not world.client.connection.closed
    restart(world, 1)
    reconnect(world)
    check(world)


@pytest.mark.parametrize(
    "held",
    [
        [0, b"x" * 15, b""],
        [0, b"x" * 16, b"\x09"],
        [-1, b"x" * 16, b""],
        [1 << 16, b"x" * 16, b""],
        [0, b"x" * 16],
        ["0", b"x" * 16, b""],
        7,
    ],
)
def test_hostile_held_layers_are_refused(held: Any) -> None:
    with pytest.raises(ProtocolError, match="held"):
        HeldLayer.from_list(held)


def handshake_frames(world: World) -> tuple[Any, list[bytes]]:
    """A second stripe of a session that stands, up to the client's proof, which is returned undelivered."""
    pipe = Pipe(world)
    world.pipes.append(pipe)
    for side in (0, 1):
        pipe.collect(side)
        for frame in pipe.frames[side]:
            pipe.deliver(side, frame)
        pipe.frames[side].clear()
    pipe.collect(0)
    proof, pipe.frames[0] = pipe.frames[0], []
    return pipe, proof


@pytest.mark.parametrize("at", [0, 20, 60, 70, 100])
def test_a_damaged_proof_of_a_joining_stripe_costs_that_stripe_only(at: int) -> None:
    """The client has finished its handshake by then: what the server says of it must not end the session."""
    world = World(CONFIG, CONFIG)
    world.settle()
    pipe, (proof, *_) = handshake_frames(world)
    assert Header.unpack(proof[:64]).type == FrameType.HELLO_ACK
    pipe.deliver(0, proof[:at] + bytes([proof[at] ^ 1]) + proof[at + 1 :])
    world.settle()
    assert not pipe.alive
    world.client.send(WORDS, 0.0, resume=KEY, step=5, levels=2)
    world.settle()
    check(world)


def test_a_peer_that_finds_a_stripe_damaged_ends_that_stripe_only() -> None:
    world = World(CONFIG, CONFIG)
    world.settle()
    world.new_pipe()
    error = control_frame(Error(code=ErrorCode.FRAME_CORRUPT, text="magic"))
    world.pipes[1].deliver(1, error)
    world.settle()
    assert [pipe.alive for pipe in world.pipes] == [True, False]
    world.client.send(WORDS, 0.0, resume=KEY, step=5, levels=2)
    world.settle()
    check(world)
