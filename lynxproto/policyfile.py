"""Policy files: what `lynxproto probe` found out about a model, as JSON. docs/quality.md, "Policy files"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from lynxproto._sidefile import SideFile, pack, unpack
from lynxproto.errors import LynxError, PolicyError
from lynxproto.policy import Policy
from lynxproto.tiers import Tiers

__all__ = ["PolicyFile"]

_SETTINGS: Final = ("sinks", "recent", "budget", "rule", "importance", "decay")
_ARRAYS: Final = ("costs", "overheads", "errors", "typical")
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile(SideFile):
    """A policy with tiers for one model and revision, and the ``evidence`` that it rests on (JSON, for people)."""

    FORMAT: ClassVar = "lynxproto.policy/1"
    WHAT: ClassVar = "policy"
    COMMAND: ClassVar = "probe"
    MAX_BYTES: ClassVar = 64 << 20
    ERROR: ClassVar = PolicyError

    policy: Policy
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy.tiers is None or not self.policy.model:
            raise PolicyError("a policy file holds a policy with tiers, and names its model")

    def to_bytes(self) -> bytes:
        """Canonical JSON (sorted keys, no spaces, a line feed at the end) with the xxh3-128 of the other fields."""
        return pack(self._fields())

    def _fields(self) -> dict[str, Any]:
        policy, tiers = self.policy, self.policy.tiers
        assert tiers is not None
        return {
            "format": self.FORMAT,
            "model": policy.model,
            "revision": policy.revision,
            "settings": {name: getattr(policy, name) for name in _SETTINGS},
            "tiers": {
                "configs": [dict(config) for config in tiers.configs],
                "floor": tiers.floor,
                **{name: _rounded(getattr(tiers, name)) for name in _ARRAYS},
            },
            "evidence": dict(self.evidence),
        }

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode and check :meth:`to_bytes`' form. Raises :class:`~lynxproto.errors.PolicyError`."""
        fields, intact = unpack(data, cls)
        if not intact:
            raise PolicyError("its hash does not match its content: it was edited or damaged; probe again")
        try:
            tiers, settings = fields["tiers"], fields["settings"]
            arrays = {name: np.array(tiers[name], np.float64) for name in _ARRAYS}
            policy = Policy(
                tiers=Tiers(configs=tuple(tiers["configs"]), floor=tiers["floor"], **arrays),
                model=fields["model"],
                revision=fields["revision"],
                **{name: settings[name] for name in _SETTINGS},
            )
            _ = policy.codecs  # builds each codec: a config that makes no sense is found here
            return cls(policy=policy, evidence=fields["evidence"])
        except PolicyError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, LynxError) as error:
            raise PolicyError(f"broken policy: {error}") from error


def _rounded(array: NDArray[np.float64]) -> Any:
    return [_rounded(row) for row in array] if array.ndim > 1 else [float(f"{x:.{_DIGITS}g}") for x in array]
