"""Is an answer what a case expects? If not: where do they differ?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from lynxproto.conformance.vectors import Case

__all__ = ["Outcome", "Verdict", "judge"]

_SHOWN: Final = 64
_HEX: Final = re.compile(r"(?:[0-9a-f]{2}){8,}")


class Outcome(Enum):
    """What became of a case."""

    PASSED = "passed"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reasons``: a line for each difference; ``seconds``: what the answer took."""

    case: Case
    outcome: Outcome
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0


def judge(case: Case, answer: dict[str, Any], seconds: float = 0.0) -> Verdict:
    """The verdict on ``answer``."""
    status = answer.get("status")
    if status == "unsupported":
        return Verdict(case, Outcome.UNSUPPORTED, (), seconds)
    wanted = {"valid": ("ok",), "invalid": ("refused",), "acceptable": ("ok", "refused")}[case.result]
    if status not in wanted:
        told = {key: value for key, value in answer.items() if key not in ("id", "status")}
        reasons = [f"status: expected {' or '.join(wanted)}, got {_show(status)} {_show(told)}"]
    elif case.result == "acceptable" and status == "refused":
        reasons = []
    else:
        reasons = [line for key, value in case.expected.items() for line in _differences(key, value, answer.get(key))]
    return Verdict(case, Outcome.FAILED if reasons else Outcome.PASSED, tuple(reasons), seconds)


def _differences(path: str, expected: Any, got: Any) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected)]:
            if key not in got:
                yield f"{path}.{key}: missing, expected {_show(expected[key])}"
            elif key not in expected:
                yield f"{path}.{key}: not expected, got {_show(got[key])}"
            else:
                yield from _differences(f"{path}.{key}", expected[key], got[key])
    elif isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            yield f"{path}: expected {len(expected)} items, got {len(got)}"
        for i, (one, other) in enumerate(zip(expected, got, strict=False)):
            yield from _differences(f"{path}[{i}]", one, other)
    elif isinstance(expected, bool) is not isinstance(got, bool) or expected != got:
        yield f"{path}: {_where(expected, got)}"


def _where(expected: Any, got: Any) -> str:
    if isinstance(expected, str) and isinstance(got, str) and _HEX.fullmatch(expected) and _HEX.fullmatch(got):
        one, other = bytes.fromhex(expected), bytes.fromhex(got)
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        sizes = f"{len(one)} bytes" if len(one) == len(other) else f"{len(one)} bytes, not {len(other)}"
        pieces = [data[max(0, at - 4) : at + 12].hex(" ") for data in (one, other)]
        return f"byte {at} of {sizes}: expected ..{pieces[0]}.., got ..{pieces[1]}.. (from byte {max(0, at - 4)})"
    return f"expected {_show(expected)}, got {_show(got)}"


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN * 2 else text[: _SHOWN * 2] + "..."
