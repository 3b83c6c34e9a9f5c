"""Which precisions a model tolerates, found out in under a minute: a policy with its evidence.

SpectrumKV (arXiv 2606.08635) asks three needles at a budget of .3 with INT4, INT8 and FP16, and gives INT4 up for a
model that does not find two. A needle tells whether one fact survives, and passes while a model's predictions are
already off; so here the model also predicts real text on caches with each tier everywhere, and every layer is spoiled
alone: KL and agreement see what needles miss, and where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.calibration import KEY_ERROR, VALUE_ERROR, Calibration
from lynxproto.errors import BudgetError, ConfigError
from lynxproto.needles import answer, ask, plant
from lynxproto.policy import Policy
from lynxproto.policyfile import PolicyFile
from lynxproto.quality import TEXTS, CodecMethod, Scorer, Window, cut, prefill
from lynxproto.tiers import Tiers

if TYPE_CHECKING:
    from lynxproto.integrations.loading import OpenedModel

__all__ = ["Bounds", "probe"]

OnProgress = Callable[[int, int, str], None]

#: The paper's probe.
_NEEDLES: Final = 3
_NEEDLES_NEEDED: Final = 2
_NEEDLE_BUDGET: Final = 0.3
_NEEDLE_CONTEXT: Final = 512
_DEPTHS: Final = (0.2, 0.5, 0.8)
#: Tiers of a model without a calibration.
_UNIFORM: Final = (2, 3, 4, 6, 8, 16)
#: Of a layer spoiled alone.
_SPOILED_BITS: Final = 3
#: What a model that does not tolerate INT4 gets: INT8 and raw words, and a budget that they fit.
_FALLBACK: Final = (8, 16)
_FALLBACK_BUDGET: Final = 0.6
_STEPS: Final = (0.0, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What counts as tolerated, on the probe's windows: at most ``kl`` nats and at least ``top1`` agreement."""

    kl: float = 0.05
    top1: float = 0.9

    def hold(self, kl: float, top1: float) -> bool:
        """Whether a measurement is within the bounds."""
        return kl <= self.kl and top1 >= self.top1


def probe(
    opened: OpenedModel,
    *,
    calibration: Calibration | None = None,
    budget: float = 0.22,
    windows: int = 2,
    context: int = 768,
    scored: int = 64,
    bounds: Bounds | None = None,
    on_progress: OnProgress | None = None,
) -> PolicyFile:
    """Probe a model: a policy of the least budget from ``budget`` on that it tolerates, with the evidence.

    Without a ``calibration`` tiers are uniform widths, weighed by what spoiling each layer does. A model that fails
    INT4 gets SpectrumKV's fallback: INT8 and raw words only, the most attended tokens first.

    Raises :class:`~lynxproto.errors.ConfigError` for a context longer than the model's, and
    :class:`~lynxproto.errors.SpecError` for a model whose attention cannot be watched.
    """
    from lynxproto.integrations.hf import make_identity

    bounds = bounds or Bounds()
    limit = getattr(opened.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and max(context + scored, _NEEDLE_CONTEXT + 32) > limit:
        raise ConfigError(
            f"{opened.name} takes {limit} tokens; the probe needs {context} + {scored}: ask for a shorter context"
        )
    pieces = cut(opened.tokenizer, TEXTS["prose"](), context + scored + 1, windows, place=0.8)
    identity = make_identity(opened.model, opened.tokenizer, name=opened.name, revision=opened.revision)
    held: list[Window] = []
    for n, ids in enumerate(pieces):
        _tell(on_progress, n, windows, "prefill")
        held.append(prefill(opened.model, identity, ids, context))
    judge = _Judge(opened, held, bounds, on_progress)
    evidence: dict[str, Any] = {
        "windows": windows, "context": context, "scored": scored, "bounds": {"kl": bounds.kl, "top1": bounds.top1},
        "calibrated": calibration is not None,
    }  # fmt: skip
    cache = held[0].cache
    attention = [_attention(window) for window in held]
    three = Tiers.uniform((4, 8, 16), cache).observed(attention)
    evidence["everywhere"] = judge.everywhere((8, 4, 3))
    evidence["layers"] = judge.layers()
    if calibration is None:
        tiers = Tiers.uniform(_UNIFORM, cache, _errors(evidence["layers"], _UNIFORM))
    else:
        tiers = Tiers.calibrated(calibration, cache)
    policy = Policy(tiers=tiers.observed(attention), budget=budget, model=opened.name, revision=opened.revision)
    papers = Policy(tiers=three, budget=_NEEDLE_BUDGET, rule="ranked", recent=0)
    evidence["needles"] = judge.needles({"exact": _exact, "paper": CodecMethod(papers), "policy": CodecMethod(policy)})
    found = {name: sum(m is not None and m > 0 for m in row) for name, row in evidence["needles"].items()}
    conclusive = found["exact"] >= _NEEDLES_NEEDED
    int4 = next(row for row in evidence["everywhere"] if row["bits"] == 4)
    reasons = []
    if conclusive and found["paper"] < _NEEDLES_NEEDED:
        reasons.append(
            f"{found['paper']} of {_NEEDLES} needles found with INT4, INT8 and raw words at {_NEEDLE_BUDGET}"
        )
    if not bounds.hold(int4["kl"], int4["top1"]):
        reasons.append(f"INT4 everywhere: KL {int4['kl']:.4f}, top-1 {int4['top1']:.3f}")
    evidence["needles_conclusive"] = conclusive
    if not reasons:
        tolerated, evidence["policy"] = judge.least_budget(policy)
        if tolerated is None:
            reasons.append("no budget of the tiers keeps within the bounds")
        else:
            policy = tolerated
    evidence["int4"] = not reasons
    evidence["reasons"] = reasons
    if reasons:
        fallback = Tiers.uniform(_FALLBACK, cache).observed(attention)
        policy = Policy(
            tiers=fallback, budget=_FALLBACK_BUDGET, rule="ranked", recent=0, model=opened.name,
            revision=opened.revision,
        )  # fmt: skip
        evidence["policy"] = [judge.measured(policy)]
    _tell(on_progress, 1, 1, "done")
    return PolicyFile(policy=policy, evidence=evidence)


def _tell(on_progress: OnProgress | None, done: int, total: int, what: str) -> None:
    if on_progress is not None:
        on_progress(done, total, what)


def _attention(window: Window) -> NDArray[np.float64]:
    assert window.attention is not None
    return window.attention.astype(np.float64)


def _exact(layer: Any, part: Any, words: Any) -> tuple[Any, float]:
    return words, words.nbytes


def _errors(layers: Sequence[dict[str, Any]], bits: Sequence[int]) -> NDArray[np.float64]:
    """Errors of uniform tiers from what spoiling each layer did, by the codec's squared errors."""
    count = 1 + max(row["layer"] for row in layers)
    errors = np.zeros((count, 2, len(bits)))
    for row in layers:
        for index, table in enumerate((KEY_ERROR, VALUE_ERROR)):
            relative = [0.0 if b == 16 else table[b] if b < 7 else 1 / (2**b - 2) ** 2 / 12 for b in bits]
            # Keys and values were spoiled together; at equal widths keys do most of the harm.
            errors[row["layer"], index] = max(row["kl"], 1e-7) / 2 * np.array(relative) / table[_SPOILED_BITS]
    return errors


class _Spoiled:
    """One layer stored with few bits, the others exact."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._method = CodecMethod(
            Policy(body={"id": "hq", "anchor_bits": _SPOILED_BITS, "levels": 1}, sinks=4, recent=0)
        )

    def __call__(self, layer: Any, part: Any, words: Any) -> tuple[Any, float]:
        return self._method(layer, part, words) if layer.index == self._layer else (words, words.nbytes)


class _Judge:
    """Measures on the probe's windows."""

    def __init__(
        self, opened: OpenedModel, windows: Sequence[Window], bounds: Bounds, on_progress: OnProgress | None
    ) -> None:
        self._opened, self._windows, self._bounds, self._tell = opened, windows, bounds, on_progress
        self._scorers = [Scorer(opened.model, window) for window in windows]

    def _score(self, method: Any, windows: int | None = None) -> dict[str, float]:
        rows = np.array([scorer.score(method) for scorer in self._scorers[:windows]])
        bits, top1, kl, _ = rows.mean(0)
        return {"bits_per_value": round(float(bits), 4), "top1": round(float(top1), 4), "kl": float(f"{kl:.4g}")}

    def everywhere(self, widths: Sequence[int]) -> list[dict[str, Any]]:
        """Each width for all tokens but 4 sinks."""
        rows = []
        for n, bits in enumerate(widths):
            _tell(self._tell, n, len(widths), f"INT{bits} everywhere")
            body = {"id": "hq", "anchor_bits": bits, "levels": 1}
            rows.append({"bits": bits, **self._score(CodecMethod(Policy(body=body, sinks=4, recent=0)))})
        return rows

    def layers(self) -> list[dict[str, Any]]:
        """KL when one layer alone is stored with few bits, on the first window."""
        manifest = self._windows[0].cache.manifest
        rows = []
        for layer in manifest.layers:
            _tell(self._tell, layer.index, len(manifest.layers), f"layer {layer.index} at {_SPOILED_BITS} bits")
            rows.append({"layer": layer.index, "kl": self._score(_Spoiled(layer.index), 1)["kl"]})
        return rows

    def needles(self, methods: dict[str, Any]) -> dict[str, list[float | None]]:
        """Margins of three needles by method, in nats; None for an impossible budget."""
        tokenizer = self._opened.tokenizer
        filler = tokenizer(TEXTS["prose"]()[-40_000:], add_special_tokens=False)["input_ids"]
        tokens, planted = plant(tokenizer, filler, _NEEDLE_CONTEXT, _DEPTHS)
        margins: dict[str, list[float | None]] = {name: [] for name in methods}
        for n, (needle, window) in enumerate(ask(self._opened, tokens, planted)):
            _tell(self._tell, n, _NEEDLES, "needles")
            for name, method in methods.items():
                margin = answer(self._opened.model, window, needle, method)
                margins[name].append(None if margin is None else round(margin, 3))
        return margins

    def measured(self, policy: Policy) -> dict[str, Any]:
        """A policy on the windows."""
        return {"budget": policy.budget, **self._score(CodecMethod(policy))}

    def least_budget(self, policy: Policy) -> tuple[Policy | None, list[dict[str, Any]]]:
        """The policy with the first budget, from its own on, that keeps within the bounds; and all that was tried."""
        tried = []
        for n, step in enumerate(_STEPS):
            _tell(self._tell, n, len(_STEPS), f"budget {policy.budget + step:.2f}")
            candidate = replace(policy, budget=min(1.0, round(policy.budget + step, 4)))
            try:
                tried.append(self.measured(candidate))
            except BudgetError as error:
                tried.append({"budget": candidate.budget, "impossible": str(error)})
                continue
            if self._bounds.hold(tried[-1]["kl"], tried[-1]["top1"]):
                return candidate, tried
        return None, tried
