"""Which policy is worth its codec on this link: predictions from measured figures, and the choice among policies.

Everything here is arithmetic on figures that the caller measured; nothing looks at a clock or a link.

A transfer is a tandem of three stages that work at the same time, level after level: the sender encodes, the link
carries, the receiver decodes. A level is there when it has passed the slowest of them; on a link that is faster than
the codec that is the codec, and the words as they are would have been there before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lynxproto.policy import Policy

if TYPE_CHECKING:
    from lynxproto.calibration import Calibration

__all__ = [
    "AutoPolicy",
    "Choice",
    "Chooser",
    "CodecFigures",
    "Estimate",
    "LevelFigures",
    "LinkMeter",
    "break_even",
    "predict",
]

#: Bytes of a chunk's words: how much of a transfer a stage must have before the next one can begin.
_CHUNK: Final = 1 << 20
#: A measurement of the link is worth something from so many bytes on.
_SAMPLE_BYTES: Final = 4 << 20
#: Weight of the newest of several measurements.
_NEWEST: Final = 0.5
#: How far experience may bend a prediction.
_BEND: Final = (0.5, 20.0)
#: How much of it is still believed after a transfer by another policy.
_MEMORY: Final = 0.9


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """One level of a codec, for each byte of words: its payload's bytes, and the seconds to make and to show it."""

    size: float
    encode: float
    decode: float


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """A codec as measured, all threads together. ``levels`` in order; the last one makes the words exact."""

    levels: tuple[LevelFigures, ...]

    @property
    def size(self) -> float:
        """Bytes of all levels for each byte of words."""
        return sum(level.size for level in self.levels)

    def on_threads(self, threads: int) -> CodecFigures:
        """The same on ``threads`` threads that do not hinder one another, if these are figures of one."""
        return CodecFigures(tuple(LevelFigures(v.size, v.encode / threads, v.decode / threads) for v in self.levels))


@dataclass(frozen=True, slots=True)
class Estimate:
    """When each level is there, in seconds from the start."""

    levels: tuple[float, ...]

    @property
    def usable(self) -> float:
        """Seconds to the first level: decoding can start."""
        return self.levels[0]

    @property
    def exact(self) -> float:
        """Seconds to the last."""
        return self.levels[-1]

    def scaled(self, factor: float) -> Estimate:
        """All times multiplied."""
        return Estimate(tuple(seconds * factor for seconds in self.levels))


def predict(figures: CodecFigures, nbytes: int, bytes_per_second: float) -> Estimate:
    """When the levels of ``nbytes`` bytes of words are there over a link of this goodput."""
    chunk = min(nbytes, _CHUNK)
    made = carried = shown = 0.0
    times = []
    for level in figures.levels:
        made += nbytes * level.encode
        carried = max(carried + nbytes * level.size / bytes_per_second, made + chunk * level.size / bytes_per_second)
        shown = max(shown + nbytes * level.decode, carried + chunk * level.decode)
        times.append(shown)
    return Estimate(tuple(times))


@dataclass(frozen=True, slots=True)
class AutoPolicy:
    """A policy for each transfer, by the link's goodput and the codecs' speed; made by :meth:`Policy.auto`.

    The one with the least ``usable + exact_weight * exact`` seconds is taken: with the default a second until decoding
    can start weighs as much as a second until what was drafted can be verified. Of equals, the first.
    """

    candidates: Mapping[str, Policy]
    """Simplest first. A name's first word (before a hyphen) is its kind: experience with one goes for all of a kind."""
    exact_weight: float = 1.0

    def cost(self, estimate: Estimate) -> float:
        """What is to be small."""
        return estimate.usable + self.exact_weight * estimate.exact


def default_candidates(calibration: Calibration | None = None) -> dict[str, Policy]:
    """Simplest first: words as they are; exact in two levels of which the first has 8 bits; progressive."""
    candidates = {"raw": Policy.named("raw"), "exact": Policy.named("exact")}
    for preset in ("fast", "balanced", "dense"):
        for levels in (2, 3):
            candidates[f"lynx-{preset}-{levels}"] = Policy.lynx(preset, calibration, levels=levels)
    return candidates


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why."""

    name: str
    policy: Policy
    estimates: Mapping[str, Estimate]
    """Of every candidate, experience included; empty if the link is not known."""
    bytes_per_second: float | None
    reason: str


class Chooser:
    """Chooses for the transfers of one session, and learns from how long they took."""

    def __init__(self, auto: AutoPolicy, figures: Mapping[str, CodecFigures]) -> None:
        self.auto = auto
        self.figures = figures
        self.bytes_per_second: float | None = None
        """The link's goodput, as far as is known."""
        self.measured_by = ""
        self._bends: dict[str, float] = {}

    def saw_link(self, bytes_per_second: float, measured_by: str) -> None:
        """The link was measured."""
        self.bytes_per_second, self.measured_by = bytes_per_second, measured_by

    def estimates(self, nbytes: int, names: Iterable[str] | None = None) -> dict[str, Estimate]:
        """What each candidate would take for ``nbytes`` bytes of words, by its figures and experience of its kind."""
        if self.bytes_per_second is None:
            return {}
        return {
            name: predict(self.figures[name], nbytes, self.bytes_per_second).scaled(self._bends.get(_kind(name), 1.0))
            for name in (self.figures if names is None else names)
        }

    def choose(self, nbytes: int, names: Sequence[str]) -> Choice:
        """The best of the candidates ``names`` for ``nbytes`` bytes of words.

        As long as the link is not known: the last, the most progressive.
        """
        estimates = self.estimates(nbytes, names)
        if not estimates or self.bytes_per_second is None:
            name = names[-1]
            return Choice(name, self.auto.candidates[name], {}, None, "the link has not been measured yet")
        name = min(names, key=lambda candidate: self.auto.cost(estimates[candidate]))
        best = estimates[name]
        reason = (
            f"{_rate(self.bytes_per_second)} ({self.measured_by}): usable after {best.usable:.3g} s, "
            f"exact after {best.exact:.3g} s"
        )
        if name != names[0]:
            plain = estimates[names[0]]
            reason += f"; {names[0]} {plain.exact:.3g} s"
        elif len(names) > 1:
            second = min(names[1:], key=lambda candidate: self.auto.cost(estimates[candidate]))
            other = estimates[second]
            reason += f"; {second} {other.usable:.3g} s and {other.exact:.3g} s"
        return Choice(name, self.auto.candidates[name], estimates, self.bytes_per_second, reason)

    def took(self, name: str, nbytes: int, seconds: float) -> None:
        """A transfer that was alone, and written at once, took ``seconds`` until all of it was confirmed.

        That includes what the figures do not know: the receiver's decoding, above all. Small ones tell nothing.
        """
        if self.bytes_per_second is None or nbytes < _SAMPLE_BYTES or name not in self.figures:
            return
        kind = _kind(name)
        for other, bend in self._bends.items():
            if other != kind:  # what was long ago may be otherwise now
                self._bends[other] = 1 + (bend - 1) * _MEMORY
        bend = seconds / predict(self.figures[name], nbytes, self.bytes_per_second).exact
        bend = min(max(bend, _BEND[0]), _BEND[1])
        self._bends[kind] = _NEWEST * bend + (1 - _NEWEST) * self._bends.get(kind, bend)


def break_even(a: CodecFigures, b: CodecFigures, nbytes: int, auto: AutoPolicy) -> float | None:
    """The goodput in bytes/s up to which ``a`` is the better choice of the two; None if there is no such point."""

    def better(rate: float) -> bool:
        return auto.cost(predict(a, nbytes, rate)) < auto.cost(predict(b, nbytes, rate))

    low, high = 1e5, 1e12
    if not better(low) or better(high):
        return None
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if better(middle) else (low, middle)
    return low


class LinkMeter:
    """The link's goodput, from what the peer has confirmed and how long the link was taking it.

    A link that is busy holds a stream's ``send`` back; while nothing is being sent, the codec, the receiver or the
    engine is what everybody waits for, and the link is not to blame.
    """

    def __init__(self) -> None:
        self.bytes_per_second: float | None = None
        self._sending = 0
        self._since = 0.0
        self._held = 0.0
        self._confirmed = 0

    def begin(self, now: float) -> None:
        """A stream begins to send."""
        if self._sending == 0:
            self._since = now
        self._sending += 1

    def end(self, now: float) -> None:
        """It has sent."""
        self._sending -= 1
        if self._sending == 0:
            self._held += now - self._since

    def confirmed(self, nbytes: int, now: float) -> None:
        """The peer has confirmed ``nbytes`` bytes more."""
        self._confirmed += nbytes
        if self._confirmed < _SAMPLE_BYTES:
            return
        held = self._held + (now - self._since if self._sending else 0.0)
        if held > 0:
            rate = self._confirmed / held
            before = self.bytes_per_second
            self.bytes_per_second = rate if before is None else _NEWEST * rate + (1 - _NEWEST) * before
        self._confirmed, self._held, self._since = 0, 0.0, now


def _kind(name: str) -> str:
    return name.split("-", 1)[0]


def _rate(bytes_per_second: float) -> str:
    bits = 8 * bytes_per_second
    unit, name = next(((u, n) for u, n in ((1e9, "Gbit/s"), (1e6, "Mbit/s")) if bits >= u), (1e3, "kbit/s"))
    return f"{bits / unit:.3g} {name}"
