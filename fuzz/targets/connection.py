"""A connection against a peer that says anything: it never raises, holds no more than its limits, and ends released.

The input is a script for the peer of an honest user: frames of any kind, with right checksums or not, genuine frames
with some bytes changed, raw bytes, new byte streams, time that passes, and what the honest user does meanwhile. Both
halves of a connection are exercised: the user sends a cache and receives what the peer offers.
"""

from __future__ import annotations

from links import Pipe, World, cache, small_config

from fuzz.targets.bytesource import ByteSource
from lynxproto import events as ev
from lynxproto.config import MAX_LEVELS, Limits
from lynxproto.digest import crc32c
from lynxproto.errors import ErrorCode
from lynxproto.frames import HEADER_SIZE, FrameType, Header, TileKey, data_frame

_LIMITS = Limits(
    session_window=2048, transfer_window=1024, transfers=4, layers=8, stripes=4, frame_bytes=1 << 16,
    control_bytes=1 << 15, tokens=4096, tiles=256, positions=4096, transfer_bytes=1 << 20,
)  # fmt: skip
_CONFIG = small_config(limits=_LIMITS, tombstones=16, control_rate=2000.0)
_WORDS = cache(1, layers=1, heads=1, tokens=6, dim=2)
_STEPS = 24
_TYPES = [*FrameType, 0, 23, 0x8000, 0x8000 + 27, 0xFFFF]
_TIMES = (0.0, 0.01, 0.6, 5.1, 31.0, 121.0)


def run(data: bytes) -> None:
    """Play the script in ``data``."""
    script = ByteSource(data)
    kind = script.below(4)
    world = World(_CONFIG, _CONFIG, pipes=0)
    if kind == 0:  # a stranger: nothing but bytes
        _stranger(world, script)
    else:
        _Peer(world, script, client=kind == 1).play()


def _stranger(world: World, script: ByteSource) -> None:
    """An unauthenticated byte stream into a server."""
    connection = world.server.connection
    stripe = connection.open_stripe(0.0)
    while script:
        chunk = script.take(1 + script.below(200))
        connection.receive_data(chunk, 0.0, stripe)
        connection.data_to_send(0.0, stripe)
    world.server.handle_events(0.0)
    assert not world.server.received, "a stranger made a transfer"
    assert connection.session is None or not connection.next_chunk(0.0)
    connection.close(0.0)


class _Peer:
    """Plays the peer of ``honest``; the other shell serves to shake hands and to make genuine frames."""

    def __init__(self, world: World, script: ByteSource, *, client: bool) -> None:
        self.world = world
        self.script = script
        self.me = 0 if client else 1  # which side the script plays
        self.honest = world.shells[1 - self.me]
        self.honest.lied_to = True
        self.genuine: list[bytes] = []
        self.transfers = [0, 1, (1 << 128) - 1]

    def play(self) -> None:
        """Shake hands, offer a transfer each way, then the script."""
        world = self.world
        pipe = world.new_pipe()
        other = world.shells[self.me]
        self.transfers.append(self.honest.send(_WORDS, world.now, levels=2, step=4))
        self.transfers.append(other.send(_WORDS, world.now, levels=2, step=4, finish=False))
        other.encode(world.now)
        for _ in range(2):  # some of what an honest peer would say, kept to be said wrongly
            pipe.collect(self.me)
            frames, pipe.frames[self.me] = pipe.frames[self.me], []
            self.genuine += frames
            for frame in frames[:3]:
                pipe.deliver(self.me, frame)
            self.turn()
            other.encode(world.now)
        for _ in range(_STEPS):
            if not self.script or self.honest.connection.closed:
                break
            self.step()
            self.turn()
            self.check_bounds()
        self.end()

    def turn(self) -> None:
        """The honest side works; what it says goes to the other shell, whose answers become genuine frames."""
        world, honest = self.world, self.honest
        honest.handle_events(world.now)
        honest.encode(world.now)
        for pipe in world.pipes:
            if pipe.alive:
                pipe.collect(1 - self.me)
                frames, pipe.frames[1 - self.me] = pipe.frames[1 - self.me], []
                for frame in frames[:8]:
                    pipe.deliver(1 - self.me, frame)
                pipe.collect(self.me)
                self.genuine = [*self.genuine, *pipe.frames[self.me]][-64:]
                pipe.frames[self.me].clear()
        world.shells[self.me].handle_events(world.now)
        closed = {event.stripe for event in honest.seen(ev.StripeClosed)}
        for pipe in world.pipes:
            if pipe.alive and pipe.ends[1 - self.me] in closed:
                pipe.alive = False
                honest.connection.stripe_lost(pipe.ends[1 - self.me], world.now)
                world.shells[self.me].connection.stripe_lost(pipe.ends[self.me], world.now)
                pipe.frames = [[], []]

    def pipe(self) -> Pipe | None:
        """A living byte stream."""
        alive = [pipe for pipe in self.world.pipes if pipe.alive]
        return alive[self.script.below(len(alive))] if alive else None

    def say(self, frame: bytes) -> None:
        """Deliver bytes to the honest side."""
        pipe = self.pipe()
        if pipe is not None:
            pipe.deliver(self.me, frame)

    def step(self) -> None:
        """One thing that happens."""
        script, now = self.script, self.world.now
        match script.below(12):
            case 0:
                self.say(script.take(1 + script.below(128)))
            case 1 | 2:
                self.say(self.control())
            case 3 | 4:
                self.say(self.data())
            case 5 | 6 | 7:
                self.say(self.mutated())
            case 8:
                self.world.now = now + _TIMES[script.below(len(_TIMES))]
                self.honest.connection.handle_timer(self.world.now)
            case 9:
                self.user()
            case 10:
                pipe = self.pipe()
                if pipe is not None:
                    pipe.cut()
            case 11:
                if len(self.world.pipes) < 8 and not any(shell.connection.closed for shell in self.world.shells):
                    self.world.new_pipe()

    def control(self) -> bytes:
        """A control frame, its payload any bytes."""
        script = self.script
        kind = _TYPES[script.below(len(_TYPES))]
        transfer = self.transfers[script.below(len(self.transfers))]
        flags = script.number(2) if script.below(8) == 0 else 0
        payload = script.take(script.below(200))
        return Header(kind, transfer, len(payload), crc32c(payload), flags).pack() + payload

    def data(self) -> bytes:
        """A DATA frame of a tile that exists, or nearly."""
        script = self.script
        tiles = [tile for got in self.honest.received.values() for tile in got.plan]
        if tiles and script.below(4):
            key = TileKey.of(tiles[script.below(len(tiles))])
        else:
            bitmap = script.take(script.below(4))
            start = script.below(16)
            key = TileKey(
                script.below(4), script.below(6), script.below(3), script.below(4), start, start + script.below(16),
                script.below(4), bitmap,
            )  # fmt: skip
        payload = memoryview(script.take(script.below(120)))
        transfer = self.transfers[script.below(len(self.transfers))]
        frame = data_frame(
            transfer, key, script.below(MAX_LEVELS + 1), payload, attempt=script.below(3), codec_id=0x8001
        )
        return b"".join(frame)

    def mutated(self) -> bytes:
        """A genuine frame with some bytes changed, its checksums put right unless the script says not to."""
        script = self.script
        if not self.genuine:
            return b""
        frame = bytearray(self.genuine[script.below(len(self.genuine))])
        for _ in range(script.below(4)):
            frame[script.number(2) % len(frame)] = script.number(1)
        if script.below(8):
            length = len(frame) - HEADER_SIZE - int.from_bytes(frame[52:56], "little")
            frame[56:60] = crc32c(frame[len(frame) - length :] if length > 0 else b"").to_bytes(4, "little")
            frame[60:64] = crc32c(frame[:60]).to_bytes(4, "little")
        if script.below(8) == 0:
            frame = frame[: script.number(2) % len(frame)]
        return bytes(frame)

    def user(self) -> None:
        """The honest user does something."""
        script, honest, now = self.script, self.honest, self.world.now
        transfers = [t for t in self.transfers[3:] if t in honest.sent or t in honest.received]
        transfer = transfers[script.below(len(transfers))] if transfers else None
        match script.below(6):
            case 0:
                honest.hold = not honest.hold
            case 1:
                while honest.waiting:
                    honest.apply(honest.waiting.pop(0), now)
            case 2 if transfer is not None:
                honest.connection.cancel(transfer, now, (None, 0, 1)[script.below(3)])
            case 3:
                tiles = [tile for got in honest.received.values() for tile in got.plan if tile not in got.verified]
                if tiles:
                    honest.bad_tiles[tiles[script.below(len(tiles))]] = 1 + script.below(2)
            case 4:
                answers = (None, "later", ErrorCode.IDENTITY)
                answer = answers[script.below(len(answers))]
                honest.accepts = lambda event: answer
            case 5 if transfer in honest.received and honest.received[transfer].released is None:
                honest.connection.urgent(transfer, now)
            case _:
                pass

    def check_bounds(self) -> None:
        """What the honest side holds for its peer."""
        receiver = self.honest.connection._receiver
        tiles = [
            tile for t in receiver.transfers.values() for layer in t.layers.values() for tile in layer.by_key.values()
        ]
        arrivals = [arrival for tile in tiles for arrival in tile.held.values()]
        held = sum(arrival.header.payload_length for arrival in arrivals if not arrival.landing)
        assert held <= MAX_LEVELS * _LIMITS.session_window, f"{held} bytes of chunks are held"
        for window in receiver.windows:
            assert 0 <= window.released <= window.charged <= window.advertised
        assert len(receiver.transfers) <= _LIMITS.transfers

    def end(self) -> None:
        """The session ends, and everything is released once."""
        honest, now = self.honest, self.world.now
        honest.connection.close(now)
        honest.handle_events(now)
        assert honest.connection.closed
        for transfer, got in honest.received.items():
            rejected = got.released is None and transfer not in honest.connection._receiver.transfers
            assert got.released is not None or rejected
        for transfer in honest.sent:
            assert transfer in honest.released
        for pipe in self.world.pipes:
            if pipe.alive:
                honest.connection.data_to_send(now, pipe.ends[1 - self.me], 1 << 20)
