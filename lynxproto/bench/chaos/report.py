"""What a chaos run found: counts, a table by fault, and every seed that did not end as it had stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from lynxproto.bench.chaos.scenario import FAULTS
from lynxproto.bench.chaos.sides import Outcome

__all__ = ["SCHEMA", "Report"]

SCHEMA: Final = "lynxproto.bench.chaos/1"


@dataclass(frozen=True, slots=True)
class Report:
    """All seeds of one run."""

    outcomes: Sequence[Outcome]
    seconds: float
    workers: int
    patience: float
    environment: dict[str, Any]

    @property
    def good(self) -> bool:
        """Whether every seed ended as it had stated, and left nothing behind."""
        return all(outcome.good for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes; docs/failures.md explains the keys."""
        seeds = sorted(outcome.seed for outcome in self.outcomes)
        recoverable = [outcome for outcome in self.outcomes if not any(outcome.expected)]
        return {
            "schema": SCHEMA,
            "transfers": len(self.outcomes),
            **_counts(self.outcomes),
            "recoverable": len(recoverable),
            "recoverable_exact": sum(outcome.exact for outcome in recoverable),
            "starved": sum(outcome.starved for outcome in self.outcomes),
            "struck": sum(_struck(outcome) for outcome in self.outcomes),
            "seeds": {"first": seeds[0], "last": seeds[-1], "count": len(seeds)},
            "faults": self._faults(),
            "bad": [asdict(outcome) for outcome in self.outcomes if not outcome.good],
            "seconds": round(self.seconds, 1),
            "workers": self.workers,
            "patience": self.patience,
            "environment": self.environment,
        }

    def _faults(self) -> list[dict[str, Any]]:
        rows = []
        for fault in FAULTS:
            those = [outcome for outcome in self.outcomes if outcome.fault == fault.name]
            if those:
                rows.append(
                    {
                        "fault": fault.name,
                        "expected": {"sender": fault.expected.sender, "receiver": fault.expected.receiver},
                        "seeds": len(those),
                        "struck": sum(_struck(outcome) for outcome in those),
                        **_counts(those),
                        "seconds_median": round(median(outcome.seconds for outcome in those), 2),
                        "seconds_max": round(max(outcome.seconds for outcome in those), 2),
                    }
                )
        return rows

    def to_text(self) -> str:
        """A table for people."""
        lines = [
            f"{'fault':<40} {'seeds':>5} {'exact':>5} {'named':>5} {'wrong':>5} {'hung':>4} {'leaks':>5} "
            f"{'other':>5} {'median':>7} {'max':>7}"
        ]
        for row in self._faults():
            lines.append(
                f"{row['fault']:<40} {row['seeds']:>5} {row['exact']:>5} {row['named_errors']:>5} {row['wrong']:>5} "
                f"{row['hung']:>4} {row['leaks']:>5} {row['unexpected']:>5} {row['seconds_median']:>5.2f} s "
                f"{row['seconds_max']:>5.2f} s"
            )
        all_ = self.to_dict()
        lines.append(
            f"{all_['transfers']} transfers: {all_['exact']} exact ({all_['recoverable_exact']} of "
            f"{all_['recoverable']} recoverable ones), {all_['named_errors']} named errors, {all_['wrong']} wrong, "
            f"{all_['hung']} hung, {all_['leaks']} with leaks, {all_['unexpected']} otherwise than stated; "
            f"{all_['starved']} run again for want of CPU; "
            f"{self.seconds:.0f} s on {self.workers} processes"
        )
        lines += [explain(outcome) for outcome in self.outcomes if not outcome.good]
        return "\n".join(lines)


def explain(outcome: Outcome) -> str:
    """One seed in a line or a few."""
    expected = " and ".join("exact" if not side else " or ".join(side) for side in outcome.expected)
    lines = [
        f"seed {outcome.seed}, {outcome.fault}: sender {outcome.sender}, receiver {outcome.receiver} "
        f"(stated: {expected}), {outcome.seconds:.2f} s, {outcome.streams} streams"
    ]
    lines += [f"  {text}" for text in outcome.said]
    lines += [f"  wrong: {text}" for text in outcome.wrong] + [f"  leaked {text}" for text in outcome.leaks]
    lines += [f"  {s['kind']} at byte {s['at']} {s['direction']} ({s['value']:g})" for s in outcome.struck]
    if outcome.frames_hit:
        lines.append(f"  {outcome.frames_hit} frames lost, doubled or spoiled")
    if not outcome.good:
        lines.append(f"  again: lynxproto bench chaos --seed {outcome.seed} --verbose")
    return "\n".join(lines)


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {
        "exact": sum(outcome.exact for outcome in outcomes),
        "named_errors": sum(not (outcome.exact or outcome.hung or outcome.wrong) for outcome in outcomes),
        "wrong": sum(bool(outcome.wrong) and not outcome.hung for outcome in outcomes),
        "hung": sum(outcome.hung for outcome in outcomes),
        "leaks": sum(bool(outcome.leaks) for outcome in outcomes),
        "unexpected": sum(not outcome.as_expected for outcome in outcomes),
    }


def _struck(outcome: Outcome) -> bool:
    return bool(outcome.struck or outcome.frames_hit) or outcome.fault in _ALWAYS


#: Faults that need no byte to be reached.
_ALWAYS: Final = frozenset(
    {
        "stripes overtake", "receiver out of memory", "decoder dies", "encoder dies", "wrong secret",
        "disk full on capture", "state folder full",
    }
)  # fmt: skip
