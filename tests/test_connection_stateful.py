"""Two connections over links that lose, reorder, duplicate, corrupt and cut: nothing hangs, nothing leaks.

Whatever the link did, once it behaves again every transfer ends: with equal words on both sides, or with a named error
on both. Credit is conserved, and what both sides hold stays within their configuration throughout.
"""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from links import Pipe, Received, Shell, World, cache, small_config

from lynxproto import events as ev
from lynxproto.config import MAX_LEVELS
from lynxproto.errors import DeadlineError, ErrorCode, LynxError
from lynxproto.frames import HEADER_SIZE
from lynxproto.manifest import Want

CONFIG = small_config(grease=True)
SIDES = st.integers(0, 1)
WANTS = st.sampled_from(
    [
        None,
        None,
        None,
        ErrorCode.INTERNAL,
        (),
        (Want(tokens=(3, 6)),),
        (Want(layers=(1, 2)), Want(heads=(0, 1), levels=1)),
        (Want(levels=2),),
    ]
)


class LossyLink(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(CONFIG, CONFIG, pipes=0)
        self.world.new_pipe()
        self.failures_allowed = False  # once a rule was broken that a session may not survive
        self.sent: list[tuple[int, int]] = []
        self.restarts = 0
        self.over: set[int] = set()  # for its sender, when the receiver's process ended

    # --- helpers

    def after(self) -> None:
        for shell in self.world.shells:
            shell.handle_events(self.world.now)
        self.world.drop_closed()

    # --- what the users do

    @rule(side=SIDES, seed=st.integers(0, 9), levels=st.integers(1, 4), wants=WANTS)
    def send(self, side: int, seed: int, levels: int, wants) -> None:
        shell, other = self.world.shells[side], self.world.shells[1 - side]
        if shell.connection.closed or len(self.sent) >= 6:
            return
        other.accepts = lambda event: wants
        key = Random(len(self.sent)).randbytes(32)
        self.sent.append((side, shell.send(cache(seed), self.world.now, levels=levels, resume=key)))

    @rule(side=SIDES, hold=st.booleans())
    def apply(self, side: int, hold: bool) -> None:
        """A slow consumer keeps what it gets for a while."""
        shell = self.world.shells[side]
        shell.hold = hold
        while shell.waiting and not hold:
            shell.apply(shell.waiting.pop(0), self.world.now)

    @rule(side=SIDES, data=st.data())
    def fail_a_tile(self, side: int, data: st.DataObject) -> None:
        shell = self.world.shells[side]
        tiles = [tile for got in shell.received.values() for tile in got.plan if tile not in got.verified]
        if tiles:
            shell.bad_tiles[data.draw(st.sampled_from(tiles))] = 1

    @rule(data=st.data(), level=st.sampled_from([None, 0, 1]), by_sender=st.booleans())
    @precondition(lambda self: self.sent)
    def cancel(self, data: st.DataObject, level: int | None, by_sender: bool) -> None:
        side, transfer = data.draw(st.sampled_from(self.sent))
        shell = self.world.shells[side if by_sender else 1 - side]
        if not by_sender and (transfer not in shell.received or transfer in self.over):
            return
        if not by_sender and level is not None and shell.received[transfer].released is not None:
            return
        shell.connection.cancel(transfer, self.world.now, level)
        self.after()

    @rule(data=st.data())
    @precondition(lambda self: self.sent)
    def urgent(self, data: st.DataObject) -> None:
        side, transfer = data.draw(st.sampled_from(self.sent))
        if transfer in self.world.shells[1 - side].received:
            self.world.shells[1 - side].connection.urgent(transfer, self.world.now)

    # --- what the link does

    @rule(
        seed=st.integers(0, 1 << 16), rounds=st.integers(1, 8), bad=st.sampled_from([0.05, 0.2, 0.5]),
        headers=st.booleans(),
    )  # fmt: skip
    def run(self, *, seed: int, rounds: int, bad: float, headers: bool) -> None:
        """Everybody works; each frame may be lost, doubled, delayed, corrupted, or cut off with its stripe."""
        random, world = Random(seed), self.world
        for _ in range(rounds):
            for shell in world.shells:
                shell.encode(world.now)
            for pipe in world.pipes:
                for side in (0, 1):
                    if pipe.alive:
                        pipe.collect(side, random.choice([200, 2000, 1 << 20]))
                        frames, pipe.frames[side] = pipe.frames[side], []
                        if random.random() < bad:
                            random.shuffle(frames)
                        for frame in frames:
                            self.mistreat(pipe, side, frame, random, bad=bad, headers=headers)
            self.after()

    def mistreat(self, pipe: Pipe, side: int, frame: bytes, random: Random, *, bad: float, headers: bool) -> None:
        if random.random() >= bad:
            pipe.deliver(side, frame)
            return
        kind = random.randrange(12)
        if kind == 0 and headers:
            pipe.deliver(side, frame[: random.randrange(len(frame))])
            pipe.cut()
        elif kind == 1 and headers:
            at = random.randrange(HEADER_SIZE)
            pipe.deliver(side, frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :])
        elif kind in (2, 3) and len(frame) > HEADER_SIZE:
            pipe.deliver(side, frame[:-1] + bytes([frame[-1] ^ 1]))
        elif kind in (4, 5, 6):
            pipe.deliver(side, frame)
            pipe.frames[side].append(frame)
        elif kind in (7, 8, 9):
            pipe.frames[side].append(frame)

    @rule(data=st.data(), nbytes=st.integers(0, 400))
    def cut(self, data: st.DataObject, nbytes: int) -> None:
        if alive := [pipe for pipe in self.world.pipes if pipe.alive]:
            data.draw(st.sampled_from(alive)).cut(nbytes)
            self.after()

    @rule()
    def connect(self) -> None:
        alive = [pipe for pipe in self.world.pipes if pipe.alive]
        if len(alive) < 3 and not any(shell.connection.closed for shell in self.world.shells):
            self.world.new_pipe()

    @rule()
    @precondition(lambda self: self.restarts < 3 and not any(side for side, _ in self.sent))
    def server_restarts(self) -> None:
        """Its process is gone, and with it all but what it kept of transfers; the client begins another session."""
        world = self.world
        if any(shell.connection.closed for shell in world.shells):
            return
        self.restarts += 1
        for pipe in world.pipes:
            if pipe.alive:
                pipe.cut()
        self.after()
        self.new_server()
        world.new_pipe()
        self.after()
        if world.server.connection.closed:  # it did not know the session
            self.new_server()

    def new_server(self) -> None:
        world, old = self.world, self.world.server
        world.shells[1] = new = Shell(CONFIG, client=False, seed=3 + self.restarts)
        new.kept, new.accepts = old.kept, old.accepts
        self.over |= world.client.released.keys()

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        for shell in self.world.shells:
            shell.connection.handle_timer(self.world.now)
        self.after()

    # --- what must hold

    @invariant()
    def memory_is_bounded(self) -> None:
        for shell in self.world.shells:
            receiver, sender = shell.connection._receiver, shell.connection._sender
            for window in receiver.windows:
                assert 0 <= window.charged - window.released <= CONFIG.limits.session_window
                assert window.charged <= window.advertised
            for transfer in receiver.transfers.values():
                for window in transfer.windows:
                    assert 0 <= window.charged - window.released <= CONFIG.limits.transfer_window
            assert all(0 <= held <= 2 * CONFIG.encode_ahead for held in sender._held)
            for window in sender.windows:
                assert window.reserved >= 0
                assert window.charged + window.reserved <= window.limit

    @invariant()
    def no_wrong_words(self) -> None:
        for side, transfer in self.sent:
            got = self.world.shells[1 - side].received.get(transfer)
            if got is not None and got.released:
                self.check_words(side, transfer, got)

    def check_words(self, side: int, transfer: int, got: Received) -> None:
        manifest, words = self.world.shells[side].sent[transfer]
        for tile, want in got.plan.items():
            levels = manifest.codecs[tile.codec].get("levels", 1)
            want = min(want, got.cut + 1)
            assert len(got.levels[tile]) >= want
            if want == levels:
                assert tile in got.verified
                whole = words[tile.layer, tile.part]
                assert np.array_equal(got.words(tile), whole[:, list(tile.tokens)])

    def teardown(self) -> None:
        world = self.world
        self.run(seed=len(self.sent), rounds=20, bad=0.3, headers=True)
        for pipe in world.pipes:
            if pipe.alive:
                pipe.cut()
        self.after()
        for shell in world.shells:
            shell.hold = False
            shell.handle_events(world.now)
            while shell.waiting:
                shell.apply(shell.waiting.pop(0), world.now)
        if not any(shell.connection.closed for shell in world.shells):
            world.new_pipe()
            world.settle()
        world.pass_time(60)
        for side, transfer in self.sent:
            sender, receiver = world.shells[side], world.shells[1 - side]
            assert transfer in sender.released, "the sender never released it"
            got = receiver.received.get(transfer)
            if transfer in self.over:
                continue
            if sender.released[transfer]:
                assert got is not None
                assert got.released is True
                assert got.complete
            else:
                assert got is None or got.released is not None, "the receiver never released it"
            for error in (sender.errors.get(transfer), receiver.errors.get(transfer)):
                assert error is None or isinstance(error, LynxError)
        for shell in world.shells:
            for event in shell.seen(ev.ConnectionFailed):  # no link can make two honest sides break the rules
                assert isinstance(event.error, DeadlineError), event.error
        if any(shell.connection.closed for shell in world.shells):
            return
        for shell, other in (world.shells, world.shells[::-1]):
            sender, receiver = shell.connection._sender, other.connection._receiver
            assert not sender.transfers
            assert not receiver.transfers
            assert sender._held == [0, 0]
            for level in range(MAX_LEVELS):
                assert sender.windows[level].reserved == 0
                assert receiver.windows[level].charged == receiver.windows[level].released
                assert sender.windows[level].charged == receiver.windows[level].charged, "credit leaked"


LossyLink.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLossyLink = LossyLink.TestCase
