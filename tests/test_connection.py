"""Two connections in memory: every frame type and every promise, over links that do what they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from links import Shell, World, cache, manifest_of, small_config, split_frames, tiles_of

from lynxproto import events as ev
from lynxproto import frames
from lynxproto.chunk import Tile, TokenSet
from lynxproto.config import Config, Limits, Secret
from lynxproto.connection import Connection, hello_session
from lynxproto.digest import crc32c
from lynxproto.errors import (
    AuthenticationError,
    CorruptFrameError,
    DeadlineError,
    DigestError,
    ErrorCode,
    LocalError,
    LynxError,
    NotFoundError,
    PeerError,
    ProtocolError,
    SpecError,
)
from lynxproto.frames import HEADER_SIZE, FrameType, Header, TileKey
from lynxproto.manifest import FetchKey, Identity, Want


def check_equal(world: World, transfer: int, words: dict[Any, Any], *, sender: int = 0) -> None:
    got = world.shells[1 - sender].received[transfer]
    assert got.error is None
    assert got.released is True
    assert got.complete
    assert world.shells[sender].released[transfer] is True
    assert got.verified == set(got.plan)
    for tile in got.plan:
        assert np.array_equal(got.words(tile), words[tile.layer, tile.part][:, list(tile.tokens)])


def data_headers(blob: list[bytes]) -> list[Header]:
    headers = [Header.unpack(frame[:HEADER_SIZE]) for frame in blob]
    return [header for header in headers if header.type == FrameType.DATA]


def only(events: list[Any]) -> Any:
    assert len(events) == 1
    return events[0]


# --- the main job


def test_a_cache_arrives():
    world = World()
    words = cache()
    transfer = world.client.send(words, world.now)
    world.settle()
    check_equal(world, transfer, words)
    assert world.server.received[transfer].result == (7, 1.5)
    hello = only(world.client.seen(ev.HandshakeCompleted))
    assert hello.session == world.client.connection.session == world.server.connection.session
    assert len(hello.session) == 16


def test_either_side_may_send_and_both_at_once():
    world = World()
    a, b = cache(1), cache(2)
    first, second = world.client.send(a, 0.0), world.server.send(b, 0.0)
    world.settle()
    check_equal(world, first, a)
    check_equal(world, second, b, sender=1)


def test_layers_are_written_while_prefill_runs():
    world = World()
    words = cache(layers=3)
    manifest = manifest_of(words)
    shell = world.client
    transfer = shell.connection.open(manifest, 0.0)
    shell.sent[transfer] = (manifest, words)
    for layer in range(3):
        world.settle()
        done = {tile.layer for tile in world.server.received[transfer].verified} if layer else set()
        assert done == set(range(layer))
        shell.send_layer(transfer, layer, 0.0)
    with pytest.raises(LocalError, match="planned already"):
        shell.send_layer(transfer, 0, 0.0)
    shell.connection.finish(transfer, 0.0)
    world.settle()
    check_equal(world, transfer, words)
    assert world.server.received[transfer].result is None


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_any_split_of_the_byte_stream(size):
    world = World()
    words = cache()
    deliver = world.pipes[0].deliver

    def in_pieces(side: int, frame: bytes) -> None:
        for at in range(0, len(frame), size):
            deliver(side, frame[at : at + size])

    world.pipes[0].deliver = in_pieces
    transfer = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, transfer, words)


def test_large_payloads_land_in_their_own_buffer():
    world = World(small_config(limits=Limits()), small_config(limits=Limits()))
    words = cache(layers=1, tokens=4096, dim=32)
    world.settle()
    client, server = (shell.connection for shell in world.shells)
    transfer = world.client.send(words, 0.0, step=4000, levels=1)
    direct = set()
    for _ in range(200):
        for shell in world.shells:
            shell.handle_events(0.0)
            shell.encode(0.0)
        for part in server.data_to_send(0.0):
            client.receive_data(part, 0.0)
        data = b"".join(client.data_to_send(0.0))
        while data:
            buffer = server.get_buffer()
            n = min(len(buffer), len(data))
            buffer[:n] = data[:n]
            direct.add(id(buffer.obj))
            server.buffer_updated(n, 0.0)
            data = data[n:]
            while (event := server.next_event()) is not None:
                if isinstance(event, ev.ChunkReceived) and event.payload.nbytes > 100_000:
                    assert id(event.payload.obj) in direct
                world.server.log.append(event)
                handler = getattr(world.server, "on_" + type(event).__name__, None)
                if handler:
                    handler(event, 0.0)
    check_equal(world, transfer, words)
    assert any(event.payload.nbytes > 100_000 for event in world.server.seen(ev.ChunkReceived))


def test_payloads_are_sent_without_copying_and_bytes_are_counted():
    world = World()
    world.settle()
    words = cache(layers=1)
    transfer = world.client.send(words, 0.0)
    world.settle()
    mine, theirs = (shell.connection.transfer_counters(transfer) for shell in world.shells)
    assert mine.sent_frames[:4] == [10, 8, 8, 0]
    assert mine.sent_frames == theirs.received_frames
    assert mine.sent_bytes == theirs.received_bytes
    headers = 26 * HEADER_SIZE + 12 * 5  # each chunk of an explicit token set has 1 byte of bitmap and 4 of CRC
    assert sum(mine.sent_bytes) == sum(a.nbytes for a in words.values()) + headers
    assert mine.resends == theirs.duplicates == theirs.dropped == theirs.corrupt == 0


def test_want_only_the_difference_is_sent():
    world = World()
    world.server.accepts = lambda event: (Want(tokens=(4, 6)), Want(layers=(1, 2), tokens=(0, 1), levels=1))
    words = cache()
    transfer = world.client.send(words, 0.0)
    world.settle()
    got = world.server.received[transfer]
    assert got.complete
    for tile, levels in got.plan.items():
        if tile.tokens.start == 1:
            assert levels == 3
        elif tile.tokens.start == 6:
            assert levels == 0
        elif tile.tokens.start == 0:
            assert levels == (tile.layer == 1)
        assert len(got.levels[tile]) == levels
    assert sum(world.client.connection.counters.sent_frames) == sum(got.plan.values())
    accepted = only(world.client.seen(ev.TransferAccepted))
    assert accepted.wants[0] == Want(tokens=(4, 6))


def test_nothing_wanted_is_complete_at_once():
    world = World()
    world.server.accepts = lambda event: ()
    transfer = world.client.send(cache(), 0.0)
    world.settle()
    assert world.server.received[transfer].complete
    assert world.client.released[transfer] is True
    assert sum(world.client.connection.counters.sent_frames) == 0


def test_lossy_transfers_need_no_digests():
    world = World()
    transfer = world.client.send(cache(), 0.0, levels=1, lossy=True)
    world.settle()
    assert world.client.released[transfer] is True
    assert world.server.received[transfer].complete
    assert not world.server.received[transfer].verified


def test_data_and_end_may_overtake_the_plan_on_another_stripe():
    world = World(pipes=2)
    world.settle()
    words = cache(layers=1)
    transfer = world.client.send(words, 0.0)
    slow, fast = world.pipes
    late = []
    for _ in range(30):
        for shell in world.shells:
            shell.handle_events(0.0)
            shell.encode(0.0)
        for pipe in (slow, fast):
            for side in (0, 1):
                pipe.collect(side, 300)
                queue, pipe.frames[side] = pipe.frames[side], []
                for frame in queue:
                    if Header.unpack(frame[:HEADER_SIZE]).type in (FrameType.PLAN, FrameType.RESULT):
                        late.append(frame)
                    else:
                        pipe.deliver(side, frame)
    assert not world.server.seen(ev.ChunkReceived)
    assert not world.server.seen(ev.LayerEnded)
    assert sum(world.server.connection.counters.received_frames) > 5
    for frame in late:
        fast.deliver(0, frame)
    world.settle()
    check_equal(world, transfer, words)
    assert world.client.connection.counters.resends == 0


# --- before any data moves


def refused(world: World, transfer: int) -> ev.TransferRejected:
    world.settle()
    assert world.client.released[transfer] is False
    assert sum(world.client.connection.counters.sent_frames) == 0
    assert transfer not in world.server.received or world.server.received[transfer].released is False
    return only(world.client.seen(ev.TransferRejected))


@pytest.mark.parametrize(
    ("server", "manifest", "code", "text"),
    [
        ({"identity": Identity(model="m", revision="2")}, {"identity": Identity(model="m", revision="1")},
         ErrorCode.IDENTITY, "revision is '1', expected '2'"),
        ({}, {"tables": (b"t" * 16,)}, ErrorCode.MISSING_TABLE, "7474"),
        ({"tables": frozenset({b"u" * 16})}, {"tables": (b"t" * 16,)}, ErrorCode.MISSING_TABLE, "table"),
    ],
)  # fmt: skip
def test_transfers_are_rejected_before_any_data_moves(server, manifest, code, text):
    world = World(server=small_config(**server))
    event = refused(world, world.client.send(cache(), 0.0, **manifest))
    assert event.code is code
    assert text in event.text


def test_a_known_table_is_accepted():
    world = World(server=small_config(tables=frozenset({b"t" * 16})))
    words = cache()
    transfer = world.client.send(words, 0.0, tables=(b"t" * 16,))
    world.settle()
    check_equal(world, transfer, words)


def test_the_shell_may_reject():
    world = World()
    world.server.accepts = lambda event: ErrorCode.INTERNAL
    event = refused(world, world.client.send(cache(), 0.0))
    assert (event.code, event.text) == (ErrorCode.INTERNAL, "no")


def test_the_sender_checks_its_own_identity():
    world = World(client=small_config(identity=Identity(model="other")))
    with pytest.raises(LocalError, match="model is 'm', expected 'other'"):
        world.client.send(cache(), 0.0)


def test_an_inexact_codec_cannot_claim_to_be_exact():
    world = World()
    codecs = ({"id": "test-sliced", "levels": 1, "exact": False}, {"id": "raw"})
    with pytest.raises(SpecError, match="not exact"):
        world.client.send(cache(), 0.0, codecs=codecs)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"layers": 1}, "2 layers"),
        ({"tokens": 11}, "12 tokens"),
        ({"transfer_bytes": 100}, "bytes of cache"),
        ({"tiles": 3}, "tiles"),
        ({"transfer_window": 10}, "smaller tiles"),
        ({"session_window": 10}, "smaller tiles"),
        ({"frame_bytes": 10}, "smaller tiles"),
    ],
)
def test_the_peer_s_limits_are_kept(limits, match):
    world = World(server=small_config(limits=Limits(**limits)))
    world.settle()
    with pytest.raises(SpecError, match=match):
        world.client.send(cache(), 0.0)


def test_limits_that_are_only_known_later_fail_the_transfer_by_name():
    world = World(server=small_config(limits=Limits(transfer_window=10)))
    transfer = world.client.send(cache(), 0.0)  # before the handshake
    world.settle()
    assert "smaller tiles" in str(world.client.errors[transfer])
    assert world.client.errors[transfer].code is ErrorCode.LIMIT
    assert world.server.received[transfer].released is False


def test_a_codec_that_the_peer_lacks():
    world = World(server=small_config(codecs=("raw",)))
    early = world.client.send(cache(), 0.0)
    world.settle()
    assert only(world.client.seen(ev.TransferRejected)).code is ErrorCode.UNSUPPORTED
    assert world.client.released[early] is False
    with pytest.raises(LynxError, match="test-sliced"):
        world.client.send(cache(), 0.0)


def test_open_transfers_are_limited():
    world = World()
    world.client.lazy = True
    world.settle()
    for _ in range(8):
        world.client.send(cache(), 0.0)
    with pytest.raises(SpecError, match="9 open transfers"):
        world.client.send(cache(), 0.0)


# --- handshake


def test_the_shared_secret_is_proved_by_both_sides():
    secret = b"0123456789abcdef"
    world = World(small_config(secret=secret), small_config(secret=secret))
    words = cache()
    transfer = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, transfer, words)


@pytest.mark.parametrize(("client", "server"), [(b"a" * 16, b"b" * 16), (None, b"b" * 16), (b"a" * 16, None)])
def test_a_wrong_secret_gets_nothing(client, server):
    world = World(small_config(secret=client), small_config(secret=server))
    transfer = world.client.send(cache(), 0.0)
    world.settle()
    assert isinstance(only(world.client.seen(ev.ConnectionFailed)).error, AuthenticationError)
    failed = only(world.server.seen(ev.ConnectionFailed)).error
    assert failed.code is ErrorCode.AUTHENTICATION
    assert not world.server.seen(ev.TransferOffered)
    assert world.client.released[transfer] is False
    assert all(shell.connection.closed for shell in world.shells)


@pytest.mark.parametrize(("owner", "joins"), [("prefill", True), ("somebody else", False)])
def test_a_session_stays_with_its_principal(owner: str, joins: bool) -> None:
    """A reconnect may use a newer secret, if it is the same principal's."""
    old = Secret(id="old", key=bytes(16), principal="prefill", not_after=50.0)
    new = Secret(id="new", key=bytes(range(16)), principal=owner)
    config = small_config(secrets=(old, new))
    world = World(config, config)
    world.settle()
    assert world.server.connection.principal == "prefill"
    world.pipes[0].cut()
    world.now = 60.0
    world.new_pipe()
    resumed = [event.resumed for event in world.server.seen(ev.StripeReady)]
    assert resumed == ([False, True] if joins else [False])
    assert world.server.connection.principal == "prefill"
    if not joins:
        errors = [event.error for event in world.server.seen(ev.StripeClosed) if event.error is not None]
        assert "belongs to 'prefill', this stripe to 'somebody else'" in str(errors[-1])


def test_strangers_get_nothing():
    for blob, kind in (
        (b"GET / HTTP/1.1\r\nHost: decode\r\n\r\n" + bytes(64), CorruptFrameError),
        (Header(FrameType.OPEN, 5, 10).pack(), ProtocolError),
        (Header(FrameType.DATA, 5, 1 << 20, heads=1, token_stop=1).pack(), ProtocolError),
        (Header(FrameType.HELLO, 0, 1 << 20).pack(), ProtocolError),
    ):
        server = Connection(small_config(), client=False)
        server.open_stripe(0.0)
        server.receive_data(blob, 0.0)
        closed, failed = server.next_event(), server.next_event()
        assert isinstance(closed, ev.StripeClosed)
        assert isinstance(failed, ev.ConnectionFailed)
        assert type(failed.error) is kind
        answer = b"".join(server.data_to_send(0.0))
        assert Header.unpack(answer[:HEADER_SIZE]).type == FrameType.ERROR  # and nothing else
        assert len(split_frames(bytearray(answer))) == 1


def test_versions_are_negotiated():
    client = Connection(small_config(grease=False), client=True)
    client.open_stripe(0.0)
    frame = b"".join(client.data_to_send(0.0))
    body = frames.parse_body(Header.unpack(frame[:HEADER_SIZE]), frame[HEADER_SIZE:], Limits())
    assert isinstance(body, frames.Hello)
    newer = frames.Hello(**{name: getattr(body, name) for name in body.__slots__} | {"versions": (2, 5)})
    server = Connection(small_config(), client=False)
    server.open_stripe(0.0)
    server.receive_data(frames.control_frame(newer), 0.0)
    error = next(event for event in iter(server.next_event, None) if isinstance(event, ev.ConnectionFailed)).error
    assert error.code is ErrorCode.VERSION
    assert "versions 2 to 5" in str(error)


def test_listeners_can_tell_sessions_apart():
    world = World()
    client = Connection(small_config(), client=True)
    client.open_stripe(0.0)
    hello = b"".join(client.data_to_send(0.0))
    assert hello_session(hello[:63]) is None
    assert hello_session(hello[:-1]) is None
    assert hello_session(hello) == b""
    world.settle()
    stripe = world.client.connection.open_stripe(0.0)
    hello = b"".join(world.client.connection.data_to_send(0.0, stripe))
    assert hello_session(hello + b"more") == world.server.connection.session
    with pytest.raises(ProtocolError):
        hello_session(Header(FrameType.PING).pack())
    with pytest.raises(CorruptFrameError):
        hello_session(bytes(64))


def test_stripes_share_a_session_and_a_load():
    world = World()
    world.settle()
    world.new_pipe()
    world.new_pipe()
    words = cache(layers=4)
    transfer = world.client.send(words, 0.0)
    used = set()
    for _ in range(300):
        for shell in world.shells:
            shell.handle_events(0.0)
            shell.encode(0.0)
        for i, pipe in enumerate(world.pipes):
            for side in (0, 1):
                pipe.collect_frame(side)
                queue, pipe.frames[side] = pipe.frames[side], []
                used |= {i for _ in data_headers(queue)}
                for frame in queue:
                    pipe.deliver(side, frame)
    world.settle()
    check_equal(world, transfer, words)
    assert used == {0, 1, 2}


def half_sent(pipe: Any) -> bool:
    """Whether the client is in the middle of a payload of DATA."""
    begun = pipe.partial[0]
    return len(begun) > HEADER_SIZE and Header.unpack(begun[:HEADER_SIZE]).type == FrameType.DATA


def half_a_residual_and_half_an_anchor() -> tuple[World, list[int]]:
    """Two stripes: the first in the middle of an anchor of one transfer, the second of a residual of another."""
    world = World()
    world.settle()
    world.new_pipe()
    world.settle()
    express, other = world.pipes
    client = world.client.connection

    def run_express() -> list[Header]:
        seen = []
        for _ in range(30):
            for shell in world.shells:
                shell.handle_events(world.now)
                shell.encode(world.now)
            for side in (0, 1):
                express.collect_frame(side)
                queue, express.frames[side] = express.frames[side], []
                seen += data_headers(queue)
                for frame in queue:
                    express.deliver(side, frame)
        return seen

    transfers = [world.client.send(cache(), world.now)]
    assert {header.level for header in run_express()} == {0}, "a residual on the stripe that is kept free of them"
    assert client.wants_to_send(world.now, other.ends[0])
    other.collect(0, HEADER_SIZE + 10)
    assert Header.unpack(other.partial[0][:HEADER_SIZE]).level > 0
    transfers.append(world.client.send(cache(seed=1), world.now))
    while not half_sent(express):
        for shell in world.shells:
            shell.handle_events(world.now)
            shell.encode(world.now)
        express.collect_frame(1)
        express.collect(0, 1)
        for side in (0, 1):
            queue, express.frames[side] = express.frames[side], []
            for frame in queue:
                express.deliver(side, frame)
    return world, transfers


def test_anchors_do_not_wait_for_a_residual_that_is_half_sent() -> None:
    world, transfers = half_a_residual_and_half_an_anchor()
    express, other = world.pipes
    client = world.client.connection
    assert not client.wants_to_send(world.now, other.ends[0])
    assert client.data_to_send(world.now, other.ends[0]) == []
    while express.partial[0]:
        express.collect(0, 1)  # the rest of the anchor
    assert client.wants_to_send(world.now, other.ends[0])
    world.settle()
    check_equal(world, transfers[0], cache())
    check_equal(world, transfers[1], cache(seed=1))


def test_a_residual_does_not_wait_for_ever_for_a_stripe_that_stalls() -> None:
    world, transfers = half_a_residual_and_half_an_anchor()
    other = world.pipes[1]
    client = world.client.connection
    assert not client.wants_to_send(world.now, other.ends[0])
    timer = client.next_timer()
    assert timer is not None
    assert timer <= world.now + 0.2
    world.now = timer
    client.handle_timer(world.now)
    assert client.wants_to_send(world.now, other.ends[0])
    world.settle()
    check_equal(world, transfers[0], cache())
    check_equal(world, transfers[1], cache(seed=1))


def test_a_close_is_said_where_a_residual_paused() -> None:
    world, _ = half_a_residual_and_half_an_anchor()
    other = world.pipes[1]
    world.client.connection.close(world.now)
    data = b"".join(world.client.connection.data_to_send(world.now, other.ends[0], 1 << 20))
    frames = split_frames(other.partial[0] + data)
    assert [Header.unpack(frame[:HEADER_SIZE]).type for frame in frames][-1] == FrameType.GOAWAY


def test_stripes_may_be_opened_all_at_once():
    world = World(pipes=3)
    words = cache()
    first = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, first, words)
    world.pipes += [type(world.pipes[0])(world) for _ in range(3)]  # now that the session is known
    second = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, second, words)
    for shell in world.shells:
        assert len(shell.seen(ev.StripeReady)) == 6
        assert not shell.seen(ev.StripeClosed)
        assert len(shell.seen(ev.HandshakeCompleted)) == 1


def test_a_session_survives_many_reconnects_without_growing():
    world = World(small_config(limits=Limits(stripes=2)), small_config(limits=Limits(stripes=2)))
    world.settle()
    for _ in range(20):
        pipe = world.pipes.pop()
        pipe.cut()
        for shell, stripe in zip(world.shells, pipe.ends, strict=True):
            shell.connection.forget_stripe(stripe, 0.0)
        world.new_pipe()
    words = cache()
    transfer = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, transfer, words)
    assert all(len(shell.connection._stripes) == 1 for shell in world.shells)


def test_a_stranger_cannot_join_nor_hurt_a_session():
    world = World()
    world.settle()
    thief = Connection(small_config(), client=True)
    thief._handshake.session = world.server.connection.session  # it saw the id, not the token
    thief._handshake._token = b"guess" * 6
    at_thief, at_server = thief.open_stripe(0.0), world.server.connection.open_stripe(0.0)
    for _ in range(3):
        for part in thief.data_to_send(0.0, at_thief):
            world.server.connection.receive_data(part, 0.0, at_server)
        for part in world.server.connection.data_to_send(0.0, at_server):
            thief.receive_data(part, 0.0, at_thief)
    # The server's proof is refused by the thief's own check; one who skips it fails at the server:
    proof = frames.HelloAck(version=1, mac=bytes(32))
    world.server.connection.receive_data(frames.control_frame(proof), 0.0, at_server)
    world.server.handle_events(0.0)
    closed = only(world.server.seen(ev.StripeClosed))
    assert closed.stripe == at_server
    assert closed.error.code is ErrorCode.AUTHENTICATION
    words = cache()
    transfer = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, transfer, words)


def test_joining_a_session_that_is_gone_ends_it_where_no_other_may_begin():
    world = World(client=small_config(session_restarts=0))
    transfer = world.client.send(cache(), 0.0, finish=False)
    world.settle()
    world.pipes[0].cut()
    world.shells[1] = Shell(small_config(), client=False, seed=9)  # the server was restarted
    world.new_pipe()
    world.settle()
    error = only(world.client.seen(ev.ConnectionFailed)).error
    assert error.code is ErrorCode.NOT_FOUND
    assert world.client.released[transfer] is False


# --- loss and repair


def run_some(world: World, steps: int) -> None:
    """A slow link: one frame a side and step."""
    for _ in range(steps):
        for shell in world.shells:
            shell.handle_events(world.now)
            shell.encode(world.now)
        for pipe in world.pipes:
            for side in (0, 1):
                if pipe.alive:
                    pipe.collect_frame(side)
                    queue, pipe.frames[side] = pipe.frames[side], []
                    for frame in queue:
                        pipe.deliver(side, frame)


@pytest.mark.parametrize("steps", [1, 3, 5, 10, 15, 20])
@pytest.mark.parametrize("extra", [0, 1, 63, 64, 100])
def test_after_a_disconnect_only_what_is_missing_is_sent(steps, extra):
    world = World(small_config(grease=False), small_config(grease=False))
    world.settle()
    words = cache()
    transfer = world.client.send(words, 0.0)
    run_some(world, steps)
    world.pipes[0].collect(0)  # written, and lost but for a few bytes
    world.pipes[0].cut(extra)
    before = sum(world.server.connection.counters.received_frames)
    world.new_pipe()
    world.settle()
    check_equal(world, transfer, words)
    assert only([e for e in world.server.seen(ev.StripeReady) if e.resumed])
    counters = world.client.connection.counters
    chunks = sum(world.server.received[transfer].plan.values())
    assert world.server.connection.counters.duplicates == 0
    assert sum(world.server.connection.counters.received_frames) == chunks
    assert sum(counters.sent_frames) == chunks + counters.resends
    assert before + counters.resends <= chunks


def test_resume_when_only_the_client_noticed_the_loss():
    world = World()
    world.settle()
    words = cache()
    transfer = world.client.send(words, 0.0)
    run_some(world, 8)
    old = world.pipes[0]
    old.collect(0)
    old.alive = False  # the server's end is half open: it never hears of it
    world.client.connection.stripe_lost(old.ends[0], 0.0)
    world.new_pipe()
    world.settle()
    check_equal(world, transfer, words)
    assert [event.stripe for event in world.server.seen(ev.StripeClosed)] == [old.ends[1]]


def test_a_lost_stripe_is_repaired_over_the_others():
    world = World()
    world.settle()
    world.new_pipe()
    words = cache(layers=3)
    transfer = world.client.send(words, 0.0)
    run_some(world, 8)
    world.pipes[0].collect(0)
    world.pipes[0].cut()
    world.settle()
    check_equal(world, transfer, words)
    assert not any(event.resumed for event in world.server.seen(ev.StripeReady))


def test_a_corrupt_payload_is_asked_for_again():
    world = World()
    world.settle()
    words = cache()
    transfer = world.client.send(words, 0.0)
    seen: dict[Any, int] = {}
    deliver = world.pipes[0].deliver

    def corrupting(side: int, frame: bytes) -> None:
        header = Header.unpack(frame[:HEADER_SIZE])
        if header.type == FrameType.DATA and header.level == 1:
            key = (header.layer, header.part, header.token_start)
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= 3:
                frame = frame[:-1] + bytes([frame[-1] ^ 1])
        deliver(side, frame)

    world.pipes[0].deliver = corrupting
    world.settle()
    check_equal(world, transfer, words)
    assert set(seen.values()) == {4}
    assert world.server.connection.counters.corrupt == world.client.connection.counters.resends == 3 * len(seen)


def test_a_payload_that_is_always_corrupt_fails_the_transfer_by_name():
    world = World()
    world.settle()
    deliver, count = world.pipes[0].deliver, []

    def corrupting(side: int, frame: bytes) -> None:
        header = Header.unpack(frame[:HEADER_SIZE])
        if header.type == FrameType.DATA and (header.layer, header.part, header.level, header.token_start) == (
            0,
            0,
            1,
            1,
        ):
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
            count.append(1)
        deliver(side, frame)

    world.pipes[0].deliver = corrupting
    transfer = world.client.send(cache(), 0.0)
    world.settle()
    assert len(count) == 4
    assert world.server.errors[transfer].code is ErrorCode.FRAME_CORRUPT
    assert world.client.errors[transfer].code is ErrorCode.FRAME_CORRUPT
    assert world.client.released[transfer] is world.server.received[transfer].released is False
    check_nothing_is_held(world)


def check_nothing_is_held(world: World) -> None:
    for shell, other in (world.shells, world.shells[::-1]):
        sender, receiver = shell.connection._sender, other.connection._receiver
        assert not sender.transfers
        assert not receiver.transfers
        assert sender._held == [0, 0]
        assert [w.charged for w in sender.windows] == [w.released for w in receiver.windows]
        assert not any(w.reserved for w in sender.windows)


def test_a_tile_that_fails_its_digest_is_sent_again_whole_once():
    world = World()
    words = cache()
    tile = tiles_of(manifest_of(words), 1)[1]
    world.server.bad_tiles[tile] = 1
    transfer = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, transfer, words)
    assert world.client.connection.counters.resends == 3
    chunks = [e for e in world.server.seen(ev.ChunkReceived) if e.tile == tile]
    assert [(e.attempt, e.level) for e in chunks] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    check_nothing_is_held(world)


def test_a_tile_that_fails_twice_fails_the_transfer():
    world = World()
    words = cache()
    tile = tiles_of(manifest_of(words), 1)[1]
    world.server.bad_tiles[tile] = 2
    transfer = world.client.send(words, 0.0)
    world.settle()
    assert isinstance(world.server.errors[transfer], DigestError)
    assert "layer 1 key tokens [1, 6)" in str(world.server.errors[transfer])
    assert world.client.errors[transfer].code is ErrorCode.DIGEST
    check_nothing_is_held(world)


def test_a_payload_that_the_codec_refuses_is_treated_alike():
    world = World()
    refuse = [2]

    def chunk(event: ev.ChunkReceived, now: float) -> None:
        if event.level == 1 and event.tile.layer == 0 and refuse[0]:
            refuse[0] = 0
            world.server.connection.tile_failed(event.transfer, event.tile, now, ErrorCode.PAYLOAD, "truncated")
        else:
            world.server.apply(event, now)

    world.server.on_ChunkReceived = chunk
    words = cache()
    transfer = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, transfer, words)
    check_nothing_is_held(world)


def windows_agree(world: World, transfer: int) -> None:
    """Both sides have charged the same to the windows of the transfer, and all that was charged is free again."""
    sender, receiver = world.client.connection._sender, world.server.connection._receiver
    theirs, session = receiver.transfers[transfer].windows, receiver.windows
    assert [w.charged for w in sender.transfers[transfer].windows] == [w.charged for w in theirs]
    assert [w.charged for w in sender.windows] == [w.charged for w in session]
    assert [w.released for w in (*theirs, *session)] == [w.charged for w in (*theirs, *session)]


def test_credit_of_chunks_that_were_encoded_but_not_sent_when_their_tile_failed_is_not_lost():
    world = World(small_config(grease=False), small_config(grease=False))
    world.settle()
    words = cache(layers=1)
    transfer = world.client.send(words, 0.0, finish=False)
    failed: list[Tile] = []

    def chunk(event: ev.ChunkReceived, now: float) -> None:
        if event.level == 0 and event.attempt == 0 and world.server.received[transfer].plan[event.tile] == 3:
            failed.append(event.tile)
            world.server.connection.tile_failed(transfer, event.tile, now, ErrorCode.PAYLOAD, "truncated")
        else:
            world.server.apply(event, now)

    world.server.on_ChunkReceived = chunk
    while not failed:
        run_some(world, 1)  # one frame at a time: residuals are encoded and wait
    assert any(c.level and c.charged for t in world.client.connection._sender.transfers[transfer].by_tile.values()
               for c in t.chunks)  # fmt: skip
    world.settle()
    assert len(failed) == 8
    windows_agree(world, transfer)
    world.client.connection.finish(transfer, 0.0)
    world.settle()
    check_equal(world, transfer, words)


def test_credit_of_cancelled_levels_is_given_back_once_when_their_tile_fails():
    world, transfer, tiles = receiving()
    server = world.server.connection
    tile = next(tile for tile in tiles if tile.tokens.is_range and len(tile.tokens) == 5)
    size = tile.spec("bfloat16", 4).nbytes // 3
    world.server.hold = True
    for level in (0, 2):  # 2 waits for 1
        world.pipes[0].deliver(0, chunk(transfer, tile, level, bytes(size)))
    world.server.handle_events(world.now)
    server.cancel(transfer, world.now, 0)
    server.tile_failed(transfer, tile, world.now, ErrorCode.PAYLOAD, "truncated")
    for window in (server._receiver.windows[2], server._receiver.transfers[transfer].windows[2]):
        assert window.released == window.charged == size


def test_a_corrupt_header_closes_the_stripe_and_the_session_resumes():
    world = World()
    world.settle()
    words = cache()
    transfer = world.client.send(words, 0.0)
    run_some(world, 6)
    world.pipes[0].deliver(0, bytes(64))
    world.drop_closed()
    world.settle()
    world.server.handle_events(0.0)
    assert isinstance(world.server.seen(ev.StripeClosed)[0].error, CorruptFrameError)
    assert not world.server.connection.closed
    world.new_pipe()
    world.settle()
    check_equal(world, transfer, words)


def test_control_frames_that_are_lost_are_said_again():
    """Every control frame is lost the first time it is said."""
    world = World(small_config(grease=False), small_config(grease=False))
    world.settle()
    seen = set()
    deliver = world.pipes[0].deliver

    def forgetful(side: int, frame: bytes) -> None:
        header = Header.unpack(frame[:HEADER_SIZE])
        if header.type in (FrameType.DATA, FrameType.PING, FrameType.PONG) or (side, frame[HEADER_SIZE:]) in seen:
            deliver(side, frame)
        seen.add((side, frame[HEADER_SIZE:]))

    world.pipes[0].deliver = forgetful
    words = cache()
    transfer = world.client.send(words, 0.0)
    world.settle()
    assert transfer not in world.server.received
    world.pass_time(60)
    check_equal(world, transfer, words)


def test_chunks_that_are_lost_are_probed_for():
    world = World()
    world.settle()
    words = cache()
    deliver, dropped = world.pipes[0].deliver, []

    def lossy(side: int, frame: bytes) -> None:
        header = Header.unpack(frame[:HEADER_SIZE])
        if header.type == FrameType.DATA and len(dropped) < 5:
            dropped.append(header)
        else:
            deliver(side, frame)

    world.pipes[0].deliver = lossy
    transfer = world.client.send(words, 0.0)
    world.settle()
    assert transfer not in world.client.released
    world.pass_time(10)
    check_equal(world, transfer, words)
    assert world.client.connection.counters.resends == 5
    check_nothing_is_held(world)


# --- credit and priority


def test_a_slow_consumer_is_bounded_and_blocks_nobody_else():
    world = World()
    world.settle()
    world.server.hold = True
    first = world.client.send(cache(1, layers=8, tokens=40), 0.0)
    world.settle()
    receiver = world.server.connection._receiver
    assert 0 < receiver.windows[0].charged <= 1024  # the transfer's window, half of the session's
    held = list(world.server.waiting)
    assert {event.level for event in held} <= {0, 1, 2}
    world.server.hold = False
    words = cache(2)
    second = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, second, words)
    assert first not in world.client.released
    world.server.waiting.clear()
    for event in held:
        world.server.apply(event, 0.0)
    world.settle()
    assert world.client.released[first] is True
    check_nothing_is_held(world)


def test_slow_residual_consumers_never_block_anchors():
    world = World()
    world.settle()
    residuals = []

    def chunk(event: ev.ChunkReceived, now: float) -> None:
        if event.level:
            residuals.append(event)
        else:
            world.server.apply(event, now)

    world.server.on_ChunkReceived = chunk
    transfers = [world.client.send(cache(i, layers=8, tokens=40), 0.0) for i in range(4)]
    world.settle()
    for transfer in transfers:
        got = world.server.received[transfer]
        assert len(got.plan) == 8 * 2 * 10
        assert all(len(levels) == 1 for levels in got.levels.values())
    while residuals:
        world.server.apply(residuals.pop(0), 0.0)
        world.settle()
    assert all(world.client.released[transfer] for transfer in transfers)


def test_encode_ahead_is_bounded_and_payloads_are_dropped_once_written():
    world = World()
    world.settle()
    transfer = world.client.send(cache(layers=8, tokens=40), 0.0)
    while (request := world.client.connection.next_chunk(0.0)) is None:
        world.client.lazy = True
        world.step()
    assert request.transfer == transfer
    world.client.lazy = True
    requests = [request, *iter(lambda: world.client.connection.next_chunk(0.0), None)]
    # 600 bytes of anchors and 600 of residuals, in chunks of at most 80 bytes (raw: 16)
    anchors = [r for r in requests if r.level == 0]
    assert anchors[0] is requests[0]
    assert 600 // 80 <= len(anchors) <= 600 // 16
    assert world.client.connection._sender._held[0] <= 600
    assert world.client.connection._sender._held[1] <= 600
    assert world.client.connection.next_chunk(0.0) is None
    with pytest.raises(LocalError, match="promised"):
        world.client.connection.chunk_encoded(transfer, anchors[0].tile, 0, bytes(1000), 0.0)


def order_of(world: World) -> list[Header]:
    """Send all that there is, one frame at a time with its receiver keeping up; return the DATA headers in order."""
    sent = []
    pipe = world.pipes[0]
    for _ in range(5000):
        for shell in world.shells:
            shell.handle_events(0.0)
            shell.encode(0.0)
        moved = False
        for side in (0, 1):
            pipe.collect_frame(side)
            queue, pipe.frames[side] = pipe.frames[side], []
            sent += data_headers(queue) if side == 0 else []
            for frame in queue:
                pipe.deliver(side, frame)
                moved = True
        if not moved:
            return sent
    raise AssertionError("never ends")


WIDE = {
    "limits": Limits(session_window=1 << 20, transfer_window=1 << 20),
    "encode_ahead": 400,
    "grease": False,
    "residual_grace": 0.0,
}


def test_classes_are_strict_and_anchors_go_by_layer_then_deadline():
    world = World(small_config(**WIDE, residual_floor=0.0), small_config(**WIDE))
    world.settle()
    world.client.lazy = True
    late = world.client.send(cache(layers=3, tokens=40), 0.0, deadline=9.0)
    soon = world.client.send(cache(layers=3, tokens=40), 0.0, deadline=1.0)
    world.settle()
    world.client.lazy = False
    sent = order_of(world)
    assert [h.level for h in sent] == sorted(h.level for h in sent)
    anchors = [(h.layer, 0 if h.transfer == soon else 1) for h in sent if h.level == 0]
    assert anchors == sorted(anchors)
    assert {h.transfer for h in sent} == {late, soon}
    for layer in range(3):  # K and V of a layer together
        parts = [h.part for h in sent if h.level == 0 and h.layer == layer and h.transfer == soon]
        assert set(parts) == {0, 1}


def test_residual_classes_are_fair_between_transfers():
    world = World(small_config(**WIDE, residual_floor=0.0), small_config(**WIDE))
    world.settle()
    transfers = [world.client.send(cache(layers=3, tokens=40), 0.0) for _ in range(3)]
    sent = order_of(world)
    for level in (1, 2):
        counts = dict.fromkeys(transfers, 0)
        for header in sent:
            if header.level == level:
                counts[header.transfer] += header.payload_length
                assert max(counts.values()) - min(counts.values()) <= 2 * 80
        assert min(counts.values()) > 0


@pytest.mark.parametrize("urgent", [False, True])
def test_a_transfer_s_own_residuals_never_delay_its_anchors(urgent):
    world = World(small_config(**WIDE), small_config(**WIDE))
    world.settle()
    world.client.lazy = True
    transfers = [world.client.send(cache(seed, layers=layers, tokens=40), 0.0) for seed, layers in enumerate((3, 8))]
    world.settle()
    if urgent:
        for transfer in transfers:
            world.server.connection.urgent(transfer, 0.0)
    world.settle()
    world.client.lazy = False
    sent = order_of(world)
    for transfer in transfers:
        levels = [h.level > 0 for h in sent if h.transfer == transfer]
        assert levels == sorted(levels)
    last_anchor = max(i for i, h in enumerate(sent) if h.level == 0)
    assert any(h.level for h in sent[:last_anchor])  # of the short one, while the long one's anchors wait


@pytest.mark.parametrize(("urgent", "low", "high"), [(False, 0.05, 0.1), (True, 0.35, 0.5)])
def test_residuals_keep_their_share_of_a_saturated_link(urgent, low, high):
    world = World(small_config(**WIDE), small_config(**WIDE))
    world.settle()
    first = world.client.send(cache(1, layers=8, tokens=40), 0.0)
    while world.client.connection.transfer_counters(first).sent_frames[1] == 0:  # its anchors are out
        run_some(world, 1)
    world.client.lazy = True
    second = world.client.send(cache(2, layers=8, tokens=40), 0.0)
    if urgent:
        world.server.connection.urgent(first, 0.0)
    while not (world.client.seen(ev.TransferAccepted)[1:] and (not urgent or world.client.seen(ev.UrgentReceived))):
        run_some(world, 1)
    world.client.lazy = False
    order = order_of(world)
    last_anchor = max(i for i, h in enumerate(order) if h.level == 0)
    contended = order[:last_anchor]
    residual = sum(h.payload_length for h in contended if h.level)
    share = residual / sum(h.payload_length for h in contended)
    assert low <= share <= high
    if urgent:
        assert only(world.client.seen(ev.UrgentReceived)).transfer == first
        residuals = [h.transfer == first for h in order if h.level]
        assert residuals == sorted(residuals, reverse=True)
    assert world.client.released[first]
    assert world.client.released[second]


def test_a_new_anchor_overtakes_residuals_that_wait():
    world = World(small_config(**WIDE), small_config(**WIDE))
    world.settle()
    world.client.send(cache(1, layers=8, tokens=40), 0.0)
    for _ in range(2000):
        run_some(world, 1)
        if world.client.connection.counters.sent_frames[1] > 20:
            break
    before = list(world.client.connection.counters.sent_frames)
    second = world.client.send(cache(2, layers=1, tokens=12), 0.0)
    sent = order_of(world)
    first_anchor = next(i for i, h in enumerate(sent) if h.transfer == second)
    last_anchor = max(i for i, h in enumerate(sent) if h.transfer == second and h.level == 0)
    assert before[1] > 20
    assert first_anchor <= 8  # OPEN and ACCEPT take a round trip, then the frame under way
    assert last_anchor - first_anchor <= 10 + 2


# --- cancelling


def test_cancelled_residuals_are_never_sent():
    world = World()
    world.settle()
    transfer = world.client.send(cache(layers=4), 0.0)
    world.step()
    world.step()
    world.server.connection.cancel(transfer, 0.0, above_level=0)
    world.settle()
    assert world.client.released[transfer] is True
    got = world.server.received[transfer]
    assert got.complete
    assert got.cut == 0
    assert only(world.client.seen(ev.LevelsCancelled)).level == 0
    assert all(len(levels) == 1 or tile.codec == 1 for tile, levels in got.levels.items() if len(levels) < 3)
    assert sum(world.client.connection.counters.sent_frames[1:]) < 4 * 2 * 2 * 4
    check_nothing_is_held(world)


@pytest.mark.parametrize("at", ["before", "while", "while sending"])
@pytest.mark.parametrize("side", [0, 1])
def test_cancelling_the_whole_transfer(side, at):
    world = World()
    world.settle()
    transfer = world.client.send(cache(layers=4), 0.0)
    if at != "before":
        run_some(world, 6)
    if at == "while sending":
        world.client.encode(0.0)
        world.pipes[0].collect(0, 70)  # a frame is half written
    if side == 1 and at == "before":
        run_some(world, 1)
        world.pipes[0].collect(0)
    shell = world.shells[side]
    if transfer in shell.received or side == 0:
        shell.connection.cancel(transfer, 0.0, text="enough")
        shell.connection.cancel(transfer, 0.0)  # idempotent
        shell.handle_events(0.0)
        released = shell.released.get(transfer) if side == 0 else shell.received[transfer].released
        assert released is False
        world.settle()
        assert world.client.released[transfer] is False
        if transfer in world.server.received:
            assert world.server.received[transfer].released is False
        check_nothing_is_held(world)
    assert not any(s.connection.closed for s in world.shells)
    words = cache(3)
    another = world.client.send(words, 0.0)
    world.settle()
    check_equal(world, another, words)


def test_late_calls_for_a_transfer_that_is_over_are_ignored():
    world = World()
    words = cache()
    transfer = world.client.send(words, 0.0)
    world.settle()
    c, s = world.client.connection, world.server.connection
    tile = tiles_of(manifest_of(words), 0)[0]
    c.plan(transfer, 0, (), 0.0)
    c.chunk_encoded(transfer, tile, 0, b"x", 0.0)
    c.end_layer(transfer, 0, (), 0.0)
    c.result(transfer, 1, None, 0.0)
    c.finish(transfer, 0.0)
    c.cancel(transfer, 0.0)
    s.applied(transfer, tile, 0, 0.0)
    s.tile_verified(transfer, tile, 0.0)
    s.tile_failed(transfer, tile, 0.0)
    s.urgent(transfer, 0.0)
    s.cancel(transfer, 0.0)
    s.accept(transfer, 0.0)
    s.reject(transfer, ErrorCode.INTERNAL, "", 0.0)
    for call in (lambda: c.finish(99, 0.0), lambda: s.applied(99, tile, 0, 0.0), lambda: c.cancel(99, 0.0)):
        with pytest.raises(LocalError, match=r"no .*transfer"):
            call()


# --- fetch


def test_fetch_pulls_a_cache():
    world = World()
    world.settle()
    words = cache()
    key = FetchKey(identity=Identity(model="m").hash(), blocks=(b"h" * 16,), salt=b"tenant")
    request = world.client.connection.fetch(key, 0.0, (Want(tokens=(0, 4)),), lease=5.0)
    world.settle()
    asked = only(world.server.requests)
    assert (asked.request, asked.key, asked.wants, asked.lease) == (request, key, (Want(tokens=(0, 4)),), 5.0)
    transfer = world.server.send(words, 0.0, fetch=asked.request)
    world.settle()
    offered = only(world.client.seen(ev.TransferOffered))
    assert offered.fetch == request
    check_equal(world, transfer, words, sender=1)
    world.pass_time(300)
    assert not world.client.seen(ev.FetchFailed)


def test_fetch_of_what_is_not_there():
    world = World()
    request = world.client.connection.fetch(FetchKey(identity=bytes(16), blocks=()), 0.0)
    world.settle()
    world.server.connection.not_found(only(world.server.requests).request, 0.0)
    world.settle()
    failed = only(world.client.seen(ev.FetchFailed))
    assert failed.request == request
    assert isinstance(failed.error, NotFoundError)
    with pytest.raises(LocalError):
        world.server.connection.not_found(12345, 0.0)


def test_fetch_that_is_never_answered_times_out():
    world = World(small_config(lease=20.0))
    world.client.connection.fetch(FetchKey(identity=bytes(16), blocks=()), 0.0)
    world.settle()
    world.pass_time(21)
    assert isinstance(only(world.client.seen(ev.FetchFailed)).error, DeadlineError)
    assert len(world.server.requests) == 1  # said again, understood once


# --- time


def test_idle_sessions_stay_alive_by_pings():
    world = World()
    world.settle()
    before = world.client.connection.counters.control_frames_sent
    world.pass_time(600)
    assert not any(shell.connection.closed for shell in world.shells)
    assert not world.client.seen(ev.StripeClosed)
    pings = world.client.connection.counters.control_frames_sent - before
    assert 60 <= pings <= 400


def test_open_transfers_stay_alive_while_prefill_is_slow():
    world = World()
    words = cache()
    manifest = manifest_of(words)
    transfer = world.client.connection.open(manifest, 0.0)
    world.client.sent[transfer] = (manifest, words)
    world.settle()
    world.pass_time(1000)
    for layer in (0, 1):
        world.client.send_layer(transfer, layer, world.now)
    world.client.connection.finish(transfer, world.now)
    world.settle()
    check_equal(world, transfer, words)


def test_a_dead_peer_releases_everything_within_the_timeouts():
    world = World()
    world.settle()
    transfer = world.client.send(cache(), 0.0)
    run_some(world, 6)
    for pipe in world.pipes:
        pipe.alive = False  # bytes go nowhere, nobody is told
    world.pass_time(61)
    for shell in world.shells:
        assert isinstance(only(shell.seen(ev.StripeClosed)).error, DeadlineError)
        assert isinstance(only(shell.seen(ev.ConnectionFailed)).error, DeadlineError)
        assert shell.connection.next_timer() is None
        assert isinstance(shell.errors[transfer], DeadlineError)
        assert not shell.connection._sender.transfers
        assert not shell.connection._receiver.transfers
    assert world.client.released[transfer] is False
    assert world.server.received[transfer].released is False


def test_a_handshake_that_never_comes_times_out():
    server = Connection(small_config(), client=False)
    server.open_stripe(0.0)
    server.handle_timer(30.0)
    kinds = [type(event) for event in iter(server.next_event, None)]
    assert kinds == [ev.StripeClosed, ev.ConnectionFailed]


def test_a_receiver_that_never_confirms_costs_one_lease():
    world = World(small_config(lease=50.0))
    world.settle()
    world.server.hold = True
    transfer = world.client.send(cache(), 0.0)
    world.settle()
    world.pass_time(40)
    assert transfer not in world.client.released
    world.pass_time(15)
    assert isinstance(world.client.errors[transfer], DeadlineError)
    assert world.server.received[transfer].released is False
    assert not any(shell.connection.closed for shell in world.shells)


def test_closing_is_announced():
    world = World()
    transfer = world.client.send(cache(), 0.0)
    run_some(world, 5)
    world.client.connection.close(world.now, text="done for today")
    world.client.connection.close(world.now)
    world.settle()
    mine, theirs = (only(shell.seen(ev.ConnectionClosed)) for shell in world.shells)
    assert (mine.by_peer, theirs.by_peer, theirs.text) == (False, True, "done for today")
    assert world.client.released[transfer] is False
    assert all(got.released is False for got in world.server.received.values())
    assert all(shell.connection.closed and shell.connection.next_timer() is None for shell in world.shells)
    with pytest.raises(LocalError, match="over"):
        world.client.connection.open_stripe(0.0)
    with pytest.raises(LocalError, match="over"):
        world.client.send(cache(), 0.0)


def test_closing_in_the_middle_of_a_frame_still_delivers_goaway():
    world = World()
    world.settle()
    world.client.send(cache(), 0.0)
    run_some(world, 4)
    world.client.encode(0.0)
    pipe = world.pipes[0]
    pipe.collect(0, 70)
    assert pipe.partial[0]
    world.client.connection.close(world.now)
    pipe.collect(0)
    for frame in pipe.frames[0]:
        pipe.deliver(0, frame)
    world.server.handle_events(0.0)
    assert only(world.server.seen(ev.ConnectionClosed)).by_peer


# --- peers that break the rules


def attack(world: World, frame: bytes) -> ProtocolError:
    """Deliver a hostile frame to the server; it must end the session with a named error, told to the client."""
    world.pipes[0].deliver(0, frame)
    world.server.handle_events(0.0)
    error = only(world.server.seen(ev.ConnectionFailed)).error
    world.settle()
    told = only(world.client.seen(ev.ConnectionFailed)).error
    assert isinstance(told, PeerError)
    assert told.code is error.code
    return error


def receiving() -> tuple[World, int, list[Tile]]:
    """A world whose server is in the middle of receiving; nothing more comes from the honest client."""
    world = World(small_config(grease=False))
    world.settle()
    words = cache()
    manifest = manifest_of(words)
    transfer = world.client.connection.open(manifest, 0.0)
    world.client.sent[transfer] = (manifest, words)
    world.settle()
    tiles = list(tiles_of(manifest, 0))
    world.client.lazy = True
    world.client.connection.plan(transfer, 0, tiles, 0.0)
    world.settle()
    return world, transfer, tiles


def chunk(transfer: int, tile: Tile, level: int, payload: bytes, *, attempt: int = 0, codec_id: int = 0x8001) -> bytes:
    parts = frames.data_frame(
        transfer, TileKey.of(tile), level, memoryview(payload), attempt=attempt, codec_id=codec_id
    )
    return b"".join(parts)


def test_hostile_data_frames():
    other = Tile(0, "key", 0, 2, TokenSet.range(1, 7), 0)
    early = Tile(1, "key", 0, 2, TokenSet.range(1, 7), 0)
    for make, code, text in (
        (lambda x, t: chunk(x, Tile(9, *[getattr(t, n) for n in ("part", "head_start", "heads", "tokens", "codec")]), 0,
                            b"x"), ErrorCode.PROTOCOL, "layer 9 is not in the manifest"),
        (lambda x, t: chunk(x, t, 3, b"x"), ErrorCode.PROTOCOL, "too large"),
        (lambda x, t: chunk(x, t, 0, bytes(999)), ErrorCode.PROTOCOL, "999 bytes: too large"),
        (lambda x, t: chunk(x, t, 0, b"x", codec_id=1), ErrorCode.PROTOCOL, "codec id 1"),
        (lambda x, t: chunk(x, t, 0, b"x", attempt=1), ErrorCode.PROTOCOL, "never asked for"),
        (lambda x, t: chunk(x, other, 0, b"x"), ErrorCode.PROTOCOL, "not in its plan"),
        (lambda x, t: chunk(x, early, 0, bytes(2000)), ErrorCode.FLOW_CONTROL,
         "more than the credit"),
        (lambda x, t: chunk(x, t, 0, b"x") + chunk(x, t, 0, b"xy"), ErrorCode.STATE, "another size"),
    ):  # fmt: skip
        world, transfer, tiles = receiving()
        error = attack(world, make(transfer, tiles[1]))
        assert error.code is code
        assert text in str(error)
        assert world.server.received[transfer].released is False


def test_hostile_control_frames():
    key, value = TileKey(1, 0, 0, 2, 0, 12, 0, b""), TileKey(1, 1, 0, 2, 0, 12, 0, b"")
    other = key._replace(codec=7)
    for make, code, text in (
        (lambda x, t: (frames.Plan(layer=1, tiles=(), levels=()), x), ErrorCode.PROTOCOL, "up to token 0"),
        (lambda x, t: (frames.Plan(layer=0, tiles=(), levels=()), x), ErrorCode.STATE, "second"),
        (lambda x, t: (frames.Plan(layer=1, tiles=(key, value), levels=(2, 3)), x), ErrorCode.PROTOCOL, "levels"),
        (lambda x, t: (frames.Plan(layer=1, tiles=(other, value), levels=(3, 3)), x), ErrorCode.PROTOCOL, "codec 7"),
        (lambda x, t: (frames.End(layer=0, digests=(b"",)), x), ErrorCode.PROTOCOL, "1 digests"),
        (lambda x, t: (frames.End(layer=0, digests=(b"",) * 10), x), ErrorCode.PROTOCOL, "digest of every tile"),
        (lambda x, t: (frames.Closed(level=7, end=True, final=(1 << 40,) * 8, code=ErrorCode.NO_ERROR), x),
         ErrorCode.FLOW_CONTROL, "final charge"),
        (lambda x, t: (frames.HelloAck(version=1, mac=bytes(32)), 0), ErrorCode.STATE, "after the handshake"),
        (lambda x, t: (frames.Result(first_token=1, logit_gap=None), 0), ErrorCode.PROTOCOL, "without a transfer"),
        (lambda x, t: (frames.Error(code=ErrorCode.INTERNAL, text="boom"), 0), ErrorCode.INTERNAL, "boom"),
    ):  # fmt: skip
        world, transfer, tiles = receiving()
        body, target = make(transfer, tiles)
        if isinstance(body, frames.Error):
            world.pipes[0].deliver(0, frames.control_frame(body, target))
            world.server.handle_events(0.0)
            error = only(world.server.seen(ev.ConnectionFailed)).error
        else:
            error = attack(world, frames.control_frame(body, target))
        assert error.code is code
        assert text in str(error)


def test_data_before_accept_is_refused():
    world = World(small_config(grease=False))
    world.server.accepts = lambda event: "later"
    transfer = world.client.send(cache(), 0.0)
    world.settle()
    error = attack(world, chunk(transfer, tiles_of(manifest_of(cache()), 0)[1], 0, b"x"))
    assert error.code is ErrorCode.STATE


def test_unknown_frames_are_events_or_errors():
    world = World(small_config(grease=False), small_config(grease=False))
    world.settle()
    payload = b"future"
    header = Header(0x8ABC, 5, len(payload), crc32c(payload), 0x0003)
    world.pipes[0].deliver(0, header.pack() + payload)
    world.server.handle_events(0.0)
    event = only(world.server.seen(ev.UnknownFrame))
    assert (event.type, event.flags, event.transfer, event.nbytes) == (0x8ABC, 3, 5, 6)
    error = attack(world, Header(0x0ABC, 5).pack())
    assert error.code is ErrorCode.UNKNOWN_CRITICAL


def test_control_frames_are_rate_limited():
    world = World(small_config(grease=False), small_config(grease=False, control_rate=50.0))
    world.settle()
    ping = frames.control_frame(frames.Ping(id=1, probe=False))
    for _ in range(90):
        world.pipes[0].deliver(0, ping)
    world.settle()
    assert not world.server.connection.closed
    world.now += 1.0  # earns 50 more
    for _ in range(50):
        world.pipes[0].deliver(0, ping)
    assert not world.server.connection.closed
    for _ in range(50):
        world.pipes[0].deliver(0, ping)
    world.server.handle_events(world.now)
    error = only(world.server.seen(ev.ConnectionFailed)).error
    assert error.code is ErrorCode.LIMIT


def test_a_peer_that_asks_and_does_not_read_makes_nothing_pile_up():
    world, transfer, _ = receiving()
    client, server = world.client.connection, world.server.connection
    world.server.handle_events(world.now)
    manifest = world.client.sent[transfer][0].to_bytes()
    for i in range(2000):  # nobody takes what the server says
        world.pipes[0].deliver(0, frames.control_frame(frames.Ping(id=1000 + i, probe=True)))
        world.pipes[0].deliver(0, frames.control_frame(frames.Open(manifest=manifest), transfer))
    said = b"".join(server.data_to_send(world.now, 0, 1 << 24))
    kinds = [Header.unpack(frame[:HEADER_SIZE]).type for frame in split_frames(bytearray(said))]
    assert kinds.count(FrameType.PONG) == 2000
    assert kinds.count(FrameType.ACCEPT) == 1
    assert kinds.count(FrameType.ACK) <= 2
    assert kinds.index(FrameType.ACK) < kinds.index(FrameType.PONG)
    for i in range(1, 12_000):
        world.now += 0.001
        world.pipes[0].deliver(0, frames.control_frame(frames.Open(manifest=b"?"), 1 + (1 << 100) + i))
    assert len(server._ctx.control) == 10_000
    assert not server.closed
    assert not client.closed


def test_a_rejection_does_not_remember_what_the_peer_made_it_quote():
    world = World(small_config(grease=False), small_config(grease=False))
    world.settle()
    manifest = manifest_of(cache(), codecs=({"id": "x" * 100_000},))
    frame = frames.control_frame(frames.Open(manifest=manifest.to_bytes()), 5)
    world.pipes[0].deliver(0, frame)
    reply, _ = world.server.connection._receiver.tombstones[5]
    assert reply is not None
    assert len(reply.text) == 256


def test_late_frames_meet_a_tombstone():
    world, transfer, tiles = receiving()
    world.client.connection.cancel(transfer, 0.0)
    world.settle()
    held = world.server.connection._receiver.windows[0].charged
    world.pipes[0].deliver(0, chunk(transfer, tiles[1], 0, b"late"))
    world.settle()
    assert not world.server.connection.closed
    assert world.server.connection.counters.dropped == 1
    assert world.server.connection.counters.dropped_bytes == 4
    assert world.server.connection._receiver.windows[0].charged == held


def test_local_misuse_is_named():
    world, transfer, tiles = receiving()
    c, s = world.client.connection, world.server.connection
    good = tiles_of(manifest_of(cache()), 1)
    with pytest.raises(SpecError, match="plan of layer 1"):
        c.plan(transfer, 1, tiles, 0.0)
    with pytest.raises(SpecError, match="leave a gap before token 9"):
        c.plan(transfer, 1, good[:-1], 0.0)
    with pytest.raises(SpecError, match="no layer 5"):
        c.plan(transfer, 5, [], 0.0)
    with pytest.raises(LocalError, match="layer 0 is not ended"):
        c.finish(transfer, 0.0)
    with pytest.raises(LocalError, match="not planned"):
        c.end_layer(transfer, 1, [], 0.0)
    with pytest.raises(SpecError, match="10 digests"):
        c.end_layer(transfer, 0, [b"short"], 0.0)
    with pytest.raises(SpecError, match="exact transfer"):
        c.end_layer(transfer, 0, [b""] * 10, 0.0)
    with pytest.raises(LocalError, match="was not received"):
        s.applied(transfer, tiles[0], 0, 0.0)
    with pytest.raises(LocalError, match="before all its levels"):
        s.tile_verified(transfer, tiles[0], 0.0)
    with pytest.raises(LocalError, match="no stripe"):
        c.get_buffer(7)


def test_configs_are_checked():
    for bad in ({"secret": b"short"}, {"residual_floor": 1.0}, {"lease": 0.0}, {"resends": -1}):
        with pytest.raises(LynxError):
            Config(**bad)
    for limits in ({"layers": 0}, {"frame_bytes": 1 << 32}, {"control_bytes": 100}):
        with pytest.raises(LynxError):
            Limits(**limits)


def test_a_closed_stripe_answers_until_it_is_forgotten() -> None:
    connection = Connection(Config(limits=Limits(stripes=1)), client=True)
    first = connection.open_stripe(0.0)
    connection.stripe_lost(first, 0.0)
    for _ in range(3):
        connection.forget_stripe(connection.open_stripe(0.0), 0.0)
    assert connection.data_to_send(0.0, first) == []
    connection.forget_stripe(first, 0.0)
    with pytest.raises(LocalError, match="no stripe"):
        connection.data_to_send(0.0, first)
