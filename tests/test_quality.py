"""Scoring lossy caches, on a small random model: what must hold for any model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lynxproto import quality
from lynxproto.chunk import Part
from lynxproto.errors import BudgetError, ConfigError
from lynxproto.frames import HEADER_SIZE
from lynxproto.manifest import Identity, LayerSpec
from lynxproto.policy import Policy

CONTEXT, SCORED, COUNT = 160, 24, 3


class Words:
    """A tokenizer of a small vocabulary: one token a character, after ``front``."""

    def __init__(self, front: tuple[int, ...] = ()) -> None:
        self.front = front

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*(self.front if add_special_tokens else ()), *(ord(c) % 97 for c in text[:2000])]}


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


@pytest.fixture(scope="module")
def windows(model: Any, folder: Path) -> list[quality.Window]:
    return _prefill(model, folder)


def _prefill(model: Any, folder: Path, **kw: Any) -> list[quality.Window]:
    sizes = {"count": COUNT, "context": CONTEXT, "scored": SCORED} | kw
    return quality.prefill_windows(model, Words(), Identity(model="tiny"), folder, **sizes)


def _exact(layer: LayerSpec, part: Part, words: Any) -> tuple[Any, float]:
    return words.copy(), words.nbytes


def _zero(layer: LayerSpec, part: Part, words: Any) -> tuple[Any, float]:
    return np.zeros_like(words), 0.0


def test_the_exact_cache_scores_perfectly(model: Any, windows: list[quality.Window]) -> None:
    (score,) = quality.evaluate(model, windows, {"copy": _exact})
    assert score.kl.shape == (COUNT,)
    assert np.all(score.top1 == 1)
    assert np.all(np.abs(score.kl) < 1e-7)
    assert np.all(score.nll == 0)
    assert np.all(score.bits == 16)


def test_fewer_bits_are_worse_and_methods_do_not_disturb_each_other(model: Any, windows: list[quality.Window]) -> None:
    int4, int8 = (quality.CodecMethod(Policy.named(name)) for name in ("int4", "int8"))
    zero, four, eight, again = quality.evaluate(model, windows, {"zero": _zero, "int4": int4, "int8": int8, "z": _zero})
    assert np.all(zero.kl > four.kl)
    assert np.all(four.kl > eight.kl)
    assert np.all(eight.kl > 0)
    assert np.array_equal(zero.kl, again.kl)
    assert quality.paired(zero, again) == quality.Difference(0, 0, 0, 0)
    assert quality.paired(four, eight).kl == pytest.approx(four.kl.mean() - eight.kl.mean())
    with pytest.raises(ConfigError, match="different windows"):
        quality.paired(zero, quality.evaluate(model, windows[:1], {"zero": _zero})[0])


def test_all_levels_of_a_policy_are_exact_and_cost_more(model: Any, windows: list[quality.Window]) -> None:
    levels = {str(n): quality.CodecMethod(Policy(), n) for n in range(3)}
    scores = quality.evaluate(model, windows[:1], levels)
    assert scores[0].bits < scores[1].bits < scores[2].bits
    assert np.all(np.abs(scores[2].kl) < 1e-7)


def test_a_method_that_gives_up_half_way_leaves_the_next_one_alone(model: Any, windows: list[quality.Window]) -> None:
    def stop(layer: LayerSpec, part: Part, words: Any) -> tuple[Any, float]:
        if layer.index:
            raise BudgetError("too little")
        return words, 0.0

    scorer = quality.Scorer(model, windows[0])
    before = scorer.score(_zero)
    with pytest.raises(BudgetError, match="too little"):
        scorer.score(stop)
    assert scorer.score(_zero) == before


def test_bytes_are_those_of_payloads_and_headers(windows: list[quality.Window]) -> None:
    layer = windows[0].cache.manifest.layers[0]
    words = windows[0].cache.arrays[0, "key"]
    out, nbytes = quality.CodecMethod(Policy.named("bf16"))(layer, "key", words)
    assert np.array_equal(out, words)
    assert nbytes == pytest.approx(words.nbytes + HEADER_SIZE, abs=16)


def test_windows_are_mapped_again_and_belong_to_their_model_and_text(
    model: Any, folder: Path, windows: list[quality.Window]
) -> None:
    files = sorted(folder.iterdir())
    times = [f.stat().st_mtime_ns for f in files]
    again = _prefill(model, folder)
    assert [f.stat().st_mtime_ns for f in sorted(folder.iterdir())] == times
    for a, b in zip(windows, again, strict=True):
        assert np.array_equal(a.tokens, b.tokens)
        assert all(np.array_equal(a.cache.arrays[k], b.cache.arrays[k]) for k in a.cache.arrays)
    assert len(windows[0].tokens) == SCORED + 1
    _prefill(model, folder, text="source")
    assert len(list(folder.iterdir())) == 2 * len(files)


def test_progress_ends_at_its_total(model: Any, windows: list[quality.Window]) -> None:
    seen: list[tuple[int, int, str]] = []
    quality.evaluate(model, windows[:2], {"zero": _zero}, lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (2, 2)


def test_report_has_the_documented_keys(model: Any, windows: list[quality.Window]) -> None:
    report = quality.report(quality.evaluate(model, windows, {"zero": _zero}))
    assert report["schema"] == "lynxproto.bench.quality/1"
    assert report["windows"] == COUNT
    (result,) = report["results"]
    documented = {"method", "bits_per_value", "budget", "top1", "top1_se", "kl", "kl_se", "perplexity_change"}
    assert documented <= set(result)
    assert result["bits_per_value"] == 16 * result["budget"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"count": 0}, "do not fit"), ({"context": 5000}, "do not fit"), ({"text": "poetry"}, "unknown text")],
)
def test_windows_that_cannot_be_cut_are_refused(model: Any, folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _prefill(model, folder, **change)


def test_no_windows_no_score(model: Any) -> None:
    with pytest.raises(ConfigError, match="no windows"):
        quality.evaluate(model, [], {"zero": _zero})


@pytest.mark.parametrize("front", [(), (1, 2)])
@pytest.mark.parametrize("place", [0, 0.4, 1])
def test_windows_are_spread_without_overlap(front: tuple[int, ...], place: float) -> None:
    class Counter(Words):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [*(self.front if add_special_tokens else ()), *range(1000, 1000 + len(text))]}

    pieces = quality.cut(Counter(front), "x" * 1000, 90, 11, place)
    assert len(pieces) == 11
    for piece in pieces:
        assert tuple(piece[: len(front)]) == front
        assert len(piece) == 90
        assert set(np.diff(piece[len(front) :])) == {1}
    starts = [int(piece[len(front)]) - 1000 for piece in pieces]
    assert starts[0] == int(place * (1000 // 11 - 90 + len(front)))
    assert all(b - a >= 90 - len(front) for a, b in pairwise(starts))
    assert starts[-1] + 90 - len(front) <= 1000
