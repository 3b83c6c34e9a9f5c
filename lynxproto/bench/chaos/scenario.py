"""What each seed does, and how it must end: stated before it runs.

A seed chooses a fault, a cache, a policy, a transport and the bytes at which the link is struck. Its
:class:`Expected` follows from the fault alone: ``exact`` on both sides, or which errors may end which side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

from lynxproto.bench.chaos.proxy import Direction, FrameFaults, Strike

__all__ = ["FAULTS", "KILLS", "Expected", "Fault", "Scenario", "Side"]

Side = Literal["sender", "receiver"]

#: Bytes of the handshake, about: strikes after them fall on a session that stands.
_HANDSHAKE: Final = {"up": 1200, "down": 1300}


@dataclass(frozen=True, slots=True)
class Expected:
    """How a seed must end: names of errors of :mod:`lynxproto.errors` for each side; ``exact`` if empty.

    ``nothing`` stands for a receiver that is never offered the transfer.
    """

    sender: tuple[str, ...] = ()
    receiver: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether both sides must end exact."""
        return not self.sender and not self.receiver


EXACT: Final = Expected()


@dataclass(slots=True)
class Scenario:
    """One seed's transfer. Sizes are of a uniform cache of bfloat16 words."""

    seed: int
    fault: str
    expected: Expected
    layers: int
    tokens: int
    heads: int
    policy: str
    tile_bytes: int
    scheme: str
    stripes: int
    fetch: bool
    """The listening side sends: the connecting one asked for the cache by its key."""
    state: bool
    """The listening side keeps what it receives in a state folder."""
    nbytes: int
    """Bytes that the data's direction will carry, about."""
    strikes: list[Strike] = field(default_factory=list)
    frames: FrameFaults | None = None
    delays: tuple[float, float] = (0.0, 0.0)
    patience: float = 1.0
    """All timeouts are multiplied by it, on a machine that has other things to do."""

    @property
    def data(self) -> Direction:
        """The direction in which chunks go."""
        return "down" if self.fetch else "up"

    @property
    def answers(self) -> Direction:
        """The other one."""
        return "up" if self.fetch else "down"

    @classmethod
    def of(cls, seed: int, patience: float = 1.0) -> Scenario:
        """The scenario of ``seed``; the same for the same version of this module."""
        random = Random(f"lynxproto chaos {seed}")
        fault = _BY_SEED[seed % len(_BY_SEED)]
        layers, tokens, heads = random.randint(2, 4), random.choice([70, 130, 260, 400]), random.choice([1, 2])
        policy = random.choice(["balanced", "fast", "dense", "bf16"])
        whole = layers * tokens * heads * 2 * 64 * 2
        scenario = cls(
            seed=seed,
            fault=fault.name,
            expected=fault.expected,
            layers=layers,
            tokens=tokens,
            heads=heads,
            policy=policy,
            tile_bytes=random.choice([4096, 16384, 65536]),
            scheme=random.choice(["tcp", "tcp", "unix"]),
            stripes=random.choice([1, 1, 2, 4]),
            fetch=random.random() < 0.2,
            state=random.random() < 0.3,
            nbytes=int(whole * (1.0 if policy == "bf16" else 0.65)),
            patience=patience,
        )
        fault.arrange(scenario, random)
        return scenario

    def within(self, random: Random, direction: Direction | None = None) -> tuple[int, Direction]:
        """A byte after the handshake, in ``direction`` or either, while the transfer most likely still runs."""
        chosen = direction or (self.data if random.random() < 0.75 else self.answers)
        start = _HANDSHAKE[chosen]
        span = int(self.nbytes * 0.9) if chosen == self.data else 1500
        return start + random.randrange(span), chosen

    def strike(self, random: Random, kind: str, value: float = 0, direction: Direction | None = None) -> None:
        """Add one."""
        at, where = self.within(random, direction)
        self.strikes.append(Strike(at, where, kind, value))  # type: ignore[arg-type]  # kinds are literals here

    def gate(self, random: Random) -> None:
        """Hold the data within the transfer until something else has happened."""
        at = _HANDSHAKE[self.data] + 1500 + random.randrange(int(self.nbytes * 0.7))
        self.strikes.append(Strike(at, self.data, "gate"))


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault: what it does, how it must end, and how many of a thousand seeds have it."""

    name: str
    weight: int
    arrange: Callable[[Scenario, Random], None]
    expected: Expected = EXACT


def _flips(s: Scenario, random: Random) -> None:
    for _ in range(random.randint(1, 3)):
        s.strike(random, "flip", random.randrange(8))


def _cut(kind: str) -> Callable[[Scenario, Random], None]:
    def arrange(s: Scenario, random: Random) -> None:
        for _ in range(random.randint(1, 3)):
            s.strike(random, kind)

    return arrange


def _silence(s: Scenario, random: Random) -> None:
    s.strike(random, "silence")


def _stall(s: Scenario, random: Random) -> None:
    """Shorter than what makes a peer give a stripe up, or longer: then its bytes come late."""
    s.strike(random, "stall", random.choice([0.1, 0.3, 1.5]))


def _trickle(s: Scenario, random: Random) -> None:
    s.strike(random, "trickle", random.randrange(500, 5000))


def _rates(s: Scenario, random: Random) -> None:
    for _ in range(random.randint(2, 4)):
        s.strike(random, "rate", random.choice([1e6, 4e6, 2e7]))


def _reorder(s: Scenario, random: Random) -> None:
    s.stripes = random.choice([2, 3, 4])
    s.delays = (0.0, random.choice([0.002, 0.02]))


def _frames(lose: float, double: float) -> Callable[[Scenario, Random], None]:
    def arrange(s: Scenario, random: Random) -> None:
        s.stripes = random.choice([1, 2, 3])
        s.frames = FrameFaults(lose=lose, double=double, limit=random.randint(1, 12))

    return arrange


def _one_stripe(s: Scenario, random: Random) -> None:
    s.stripes = random.choice([2, 3, 4])
    s.delays = (0.0, 0.003)
    s.strike(random, random.choice(["end", "reset", "silence"]))


def _mixture(s: Scenario, random: Random) -> None:
    for _ in range(random.randint(2, 5)):
        kind = random.choice(["flip", "end", "reset", "stall", "trickle", "rate"])
        value = {"flip": random.randrange(8), "stall": 0.1, "trickle": 1000, "rate": 5e6}.get(kind, 0)
        s.strike(random, kind, value)
    if random.random() < 0.5:
        s.frames = FrameFaults(lose=0.02, double=0.05, limit=6)


def _gated(s: Scenario, random: Random) -> None:
    s.fetch = False
    s.gate(random)


def _gone(kind: str) -> Callable[[Scenario, Random], None]:
    def arrange(s: Scenario, random: Random) -> None:
        s.fetch = False
        s.gate(random)
        gate = s.strikes[-1]
        s.strikes[-1] = Strike(gate.at, gate.direction, kind)  # type: ignore[arg-type]  # "gone" is one

    return arrange


def _spoiled(s: Scenario, random: Random) -> None:
    s.fetch = False
    s.frames = FrameFaults(spoil_layer=random.randrange(s.layers))


def _full(s: Scenario, random: Random) -> None:
    s.fetch, s.state = False, True


def _push(s: Scenario, random: Random) -> None:
    s.fetch = False


def _greeting(s: Scenario, random: Random) -> None:
    """A bit of the first HELLOs: the client finds out, whichever side was hit."""
    s.fetch = False
    s.stripes = 1
    direction: Direction = random.choice(["up", "down"])
    s.strikes.append(Strike(random.randrange(64), direction, "flip", random.randrange(8)))


_REFUSED: Final = ("CorruptFrameError", "PeerError", "ConnectionClosedError", "VersionError", "ProtocolError")
_CANCELLED: Final = ("TransferCancelledError",)
FAULTS: Final = (
    # recoverable: exact, always
    Fault("none", 15, lambda s, random: None),
    Fault("bit flips", 140, _flips),
    Fault("stream ends (truncation)", 105, _cut("end")),
    Fault("reset", 100, _cut("reset")),
    Fault("half-open peer", 40, _silence),
    Fault("stall", 55, _stall),
    Fault("trickle (slow-loris bytes)", 50, _trickle),
    Fault("bandwidth steps", 45, _rates),
    Fault("stripes overtake", 55, _reorder),
    Fault("frames doubled, also on other stripes", 65, _frames(0.0, 0.3)),
    Fault("frames lost", 50, _frames(0.15, 0.0)),
    Fault("one of several stripes is lost", 50, _one_stripe),
    Fault("mixture", 60, _mixture),
    Fault("disk full on capture", 10, _flips),
    Fault("state folder full", 5, _full),
    Fault("sender killed", 30, _gated),
    Fault("receiver killed", 30, _gated),
    Fault("both killed", 20, _gated),
    # not recoverable: a named error, on both sides
    Fault("cancelled by the sender", 10, _gated, Expected(_CANCELLED, _CANCELLED)),
    Fault("cancelled by the receiver", 16, _gated, Expected(_CANCELLED, _CANCELLED)),
    Fault("receiver out of memory", 8, _push, Expected(("RejectedError",), ("nothing",))),
    Fault("decoder dies", 6, _push, Expected(_CANCELLED, ("LocalError",))),
    Fault("encoder dies", 6, _push, Expected(("LocalError",), ("PeerError",))),
    Fault("link gone for good", 8, _gone("gone"), Expected(("DeadlineError",), ("DeadlineError",))),
    Fault("frame spoiled every time", 6, _spoiled, Expected(("PeerError",), ("ProtocolError",))),
    Fault("receiver closes", 4, _gated, Expected(("ConnectionClosedError",), ("TransferCancelledError",))),
    # the link is held: its goodbye may not come through
    Fault("sender closes", 4, _gated, Expected(_CANCELLED, ("ConnectionClosedError", "DeadlineError"))),
    Fault("first greeting damaged", 5, _greeting, Expected(_REFUSED, ("nothing",))),
    Fault("wrong secret", 2, _push, Expected(("AuthenticationError", "PeerError"), ("nothing",))),
)


def _by_seed() -> tuple[Fault, ...]:
    """A thousand places, each fault in as many as its weight, spread evenly: a few seeds show many faults."""
    places = [(((i + 0.5) / fault.weight), n, fault) for n, fault in enumerate(FAULTS) for i in range(fault.weight)]
    return tuple(fault for _, _, fault in sorted(places, key=lambda place: place[:2]))


_BY_SEED: Final = _by_seed()
#: Faults whose sides are processes of their own.
KILLS: Final = ("sender killed", "receiver killed", "both killed")
