"""Policy files: what `lynxproto probe` found out about a model, as JSON. docs/quality.md, "Policy files"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from lynxproto.errors import LynxError, PolicyError
from lynxproto.policy import Policy
from lynxproto.tiers import Tiers

__all__ = ["PolicyFile"]

_FORMAT: Final = "lynxproto.policy/1"
_MAX_FILE: Final = 64 << 20
_SETTINGS: Final = ("sinks", "recent", "budget", "rule", "importance", "decay")
_ARRAYS: Final = ("costs", "overheads", "errors", "typical")
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """A policy with tiers for one model and revision, and the ``evidence`` that it rests on (JSON, for people)."""

    policy: Policy
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy.tiers is None or not self.policy.model:
            raise PolicyError("a policy file holds a policy with tiers, and names its model")

    def to_bytes(self) -> bytes:
        """Canonical JSON (sorted keys, no spaces, a line feed at the end) with the xxh3-128 of the other fields."""
        fields = self._fields()
        return _json({**fields, "xxh3_128": xxhash.xxh3_128_hexdigest(_json(fields))}) + b"\n"

    def _fields(self) -> dict[str, Any]:
        policy, tiers = self.policy, self.policy.tiers
        assert tiers is not None
        return {
            "format": _FORMAT,
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

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises :class:`~lynxproto.errors.PolicyError`."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.part")
        try:
            temporary.write_bytes(self.to_bytes())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PolicyError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file. Raises :class:`~lynxproto.errors.PolicyError`."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE + 1)
        except OSError as error:
            raise PolicyError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            return cls.from_bytes(data)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode and check :meth:`to_bytes`' form. Raises :class:`~lynxproto.errors.PolicyError`."""
        if len(data) > _MAX_FILE:
            raise PolicyError(f"larger than {_MAX_FILE} bytes: not a policy")
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"not JSON ({error})") from error
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            raise PolicyError(f"not a policy: format is not {_FORMAT!r}; make one with `lynxproto probe`")
        stated = fields.pop("xxh3_128", None)
        if stated != xxhash.xxh3_128_hexdigest(_json(fields)):
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


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


def _rounded(array: NDArray[np.float64]) -> Any:
    return [_rounded(row) for row in array] if array.ndim > 1 else [float(f"{x:.{_DIGITS}g}") for x in array]
