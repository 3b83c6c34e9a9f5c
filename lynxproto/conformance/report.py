"""Results of a run as JSON (schema ``lynxproto.conformance/1``), as JUnit XML, and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

from lynxproto.conformance.judge import Outcome, Verdict

__all__ = ["SCHEMA", "Run", "as_json", "as_junit", "as_text"]

SCHEMA: Final = "lynxproto.conformance/1"


@dataclass(frozen=True, slots=True)
class Run:
    """All verdicts on one program."""

    subject: str
    verdicts: Sequence[Verdict]

    def count(self, outcome: Outcome) -> int:
        """Cases with this outcome."""
        return sum(verdict.outcome is outcome for verdict in self.verdicts)

    def of(self, outcome: Outcome) -> list[Verdict]:
        """The verdicts with this outcome."""
        return [verdict for verdict in self.verdicts if verdict.outcome is outcome]

    def by_op(self) -> dict[str, Counter[Outcome]]:
        """Outcomes of each file and operation."""
        found: dict[str, Counter[Outcome]] = {}
        for verdict in self.verdicts:
            name = f"{verdict.case.file}/{verdict.case.op}"
            found.setdefault(name, Counter())[verdict.outcome] += 1
        return found


def _case(verdict: Verdict) -> dict[str, Any]:
    case = verdict.case
    found = {"case": case.address, "comment": case.comment, "section": case.section, "result": case.result}
    return {**found, "flags": list(case.flags)}


def as_json(run: Run) -> dict[str, Any]:
    """The report."""
    return {
        "schema": SCHEMA,
        "subject": run.subject,
        "cases": len(run.verdicts),
        "passed": run.count(Outcome.PASSED),
        "failed": run.count(Outcome.FAILED),
        "unsupported": run.count(Outcome.UNSUPPORTED),
        "groups": {
            name: {outcome.value: counts[outcome] for outcome in Outcome} for name, counts in run.by_op().items()
        },
        "failures": [{**_case(v), "reasons": list(v.reasons)} for v in run.of(Outcome.FAILED)],
        "unsupported_cases": [_case(v) for v in run.of(Outcome.UNSUPPORTED)],
    }


def as_junit(run: Run) -> bytes:
    """JUnit XML: one suite a file; unsupported cases are skipped ones."""
    root = ElementTree.Element("testsuites", name=run.subject)
    suites: dict[str, ElementTree.Element] = {}
    totals: dict[str, Counter[str]] = {}
    for verdict in run.verdicts:
        case = verdict.case
        suite = suites.get(case.file)
        if suite is None:
            suite = suites[case.file] = ElementTree.SubElement(root, "testsuite", name=case.file)
        name = f"{case.op} {case.number}: {case.comment}"
        test = ElementTree.SubElement(suite, "testcase", classname=case.file, name=name, time=f"{verdict.seconds:.6f}")
        totals.setdefault(case.file, Counter())["tests"] += 1
        if verdict.outcome is Outcome.FAILED:
            failure = ElementTree.SubElement(test, "failure", message=verdict.reasons[0])
            failure.text = "\n".join((case.section, *verdict.reasons))
            totals[case.file]["failures"] += 1
        elif verdict.outcome is Outcome.UNSUPPORTED:
            ElementTree.SubElement(test, "skipped", message="unsupported")
            totals[case.file]["skipped"] += 1
    for name, suite in suites.items():
        for key in ("tests", "failures", "skipped"):
            suite.set(key, str(totals[name][key]))
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document


def as_text(run: Run, shown: int = 20) -> Iterator[str]:
    """Lines for people: a table by operation, then the failures, each with what differs."""
    counts = run.by_op()
    width = max(map(len, counts))
    yield f"{'':<{width}}  passed  failed  unsupported"
    for name, row in counts.items():
        numbers = [row[outcome] for outcome in Outcome]
        yield f"{name:<{width}}  {numbers[0]:>6}  {numbers[1]:>6}  {numbers[2]:>11}"
    failures = run.of(Outcome.FAILED)
    for verdict in failures[:shown]:
        case = verdict.case
        yield ""
        yield f"FAILED {case.address} ({case.result}): {case.comment}"
        yield f"  {case.section}"
        yield from (f"  {reason}" for reason in verdict.reasons[:8])
        if len(verdict.reasons) > 8:
            yield f"  and {len(verdict.reasons) - 8} more differences"
    if len(failures) > shown:
        yield f"\nand {len(failures) - shown} more failures; --json lists all"
    yield ""
    yield (
        f"{run.subject}: {len(run.verdicts)} cases, {run.count(Outcome.PASSED)} passed, {len(failures)} failed, "
        f"{run.count(Outcome.UNSUPPORTED)} unsupported"
    )
