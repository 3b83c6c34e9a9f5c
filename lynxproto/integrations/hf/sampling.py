"""transformers' seeded sampling as a :class:`~lynxproto.speculation.Sampler`: drafts and generate agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import ConfigError
from lynxproto.integrations.hf.model import require_version  # says what to install if torch is missing
from lynxproto.speculation import Logits, gap, nucleus

import torch  # isort: skip  # after model, whose error names the extra
from transformers.generation.logits_process import (  # isort: skip  # the same
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

__all__ = ["Multinomial", "split_warpers"]

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


def split_warpers(processors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What comes before sampling's own filters, and those. Raises ConfigError for filters that are not built here."""
    first = next((i for i, one in enumerate(processors) if isinstance(one, _WARPERS)), len(processors))
    if other := [type(one).__name__ for one in processors[first:] if not isinstance(one, _WARPERS)]:
        raise ConfigError(f"generate samples with temperature, top_k and top_p; {', '.join(other)} is not supported")
    return list(processors[:first]), list(processors[first:])


class Multinomial:
    """``torch.multinomial`` from torch's global generator, as ``generate`` calls it, once for each position.

    How far a call moves the generator does not depend on what it draws from, so the state at a position is the same in
    a draft, in the verification and in ``generate``; with it, so is the noise: torch takes the largest of p / q with q
    exponentially distributed. ``start`` is the first position that is sampled.
    """

    needs_draft_logits: ClassVar[bool] = False

    def __init__(self, warpers: Sequence[Any], start: int) -> None:
        require_version()
        self._warpers = list(warpers)
        self._states = {start: torch.get_rng_state()}
        self._last = start
        self._temperature, self._top_k, self._top_p = 1.0, 0, 1.0
        for warper in warpers:
            self._temperature = float(getattr(warper, "temperature", self._temperature))
            self._top_k = int(getattr(warper, "top_k", self._top_k))
            self._top_p = float(getattr(warper, "top_p", self._top_p))

    def leave(self, position: int) -> None:
        """Leave the generator as a run leaves it whose next token would be at ``position``."""
        if position in self._states:
            torch.set_rng_state(self._states[position])

    def choose(self, logits: Logits, position: int) -> int:
        """The token for ``position``."""
        probabilities = self._probabilities(logits)
        torch.set_rng_state(self._states[position])
        token = int(torch.multinomial(probabilities, num_samples=1))
        self._states.setdefault(position + 1, torch.get_rng_state())
        return token

    def check(self, token: int, draft_logits: Logits | None, logits: Logits, position: int) -> int:
        """The token to commit where ``token`` was drafted."""
        return self.choose(logits, position)

    def near_tie(self, logits: Logits, position: int, noise: float) -> bool:
        """Whether ``noise`` could change the choice, be it by the order of scores or by who passes the filters."""
        if noise <= 0:
            return False
        slack = 2 * noise / self._temperature
        scaled = np.asarray(logits, np.float64) / self._temperature
        torch.set_rng_state(self._states[position])
        exponential = torch.empty((1, len(scaled))).exponential_(1)
        scores = scaled - np.log(exponential[0].double().numpy())
        certain, possible = self._passing(scaled, -slack), self._passing(scaled, slack)
        best = int(np.argmax(np.where(possible, scores, -np.inf)))
        return not certain[best] or gap(np.where(possible, scores, -np.inf)) < slack

    def _passing(self, scaled: NDArray[np.float64], slack: float) -> NDArray[np.bool_]:
        """Who surely (``slack`` < 0) or possibly passes top_k and then top_p, which acts on what top_k leaves."""
        few, many = (nucleus(scaled, self._top_k, 1.0, sign * abs(slack)) for sign in (-1, 1))
        if self._top_p >= 1:
            return few if slack < 0 else many
        either = [nucleus(np.where(left, scaled, -np.inf), 0, self._top_p, slack) for left in (few, many)]
        return (few & either[0] & either[1]) if slack < 0 else (many & (either[0] | either[1]))

    def _probabilities(self, logits: Logits) -> torch.Tensor:
        scores = torch.tensor(np.asarray(logits, np.float32))[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.nn.functional.softmax(scores, dim=-1)
