"""The probe and the quality benchmark on small random models with a tokenizer of words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lynxproto import blocking
from lynxproto.cachefile import load_cache, save_cache
from lynxproto.cli import main
from lynxproto.errors import ConfigError
from lynxproto.needles import CANDIDATES, plant
from lynxproto.policy import Policy
from lynxproto.policyfile import PolicyFile
from lynxproto.quality import TEXTS, prefill

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
tokenizers = pytest.importorskip("tokenizers")

from lynxproto.integrations.hf import make_identity  # noqa: E402 - after importorskip
from lynxproto.integrations.loading import open_model  # noqa: E402 - the same
from lynxproto.probe import Bounds, probe  # noqa: E402 - the same

torch.set_num_threads(1)
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `save_pretrained` leaves it: random weights, a tokenizer of the prose's and the needles' words."""
    path = tmp_path_factory.mktemp("tiny")
    source = Path(plant.__code__.co_filename).read_text(encoding="utf-8")
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", source + TEXTS["prose"]()[:300_000]))
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["[unk]", *words])}, unk_token="[unk]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]").save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words) + 1, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, initializer_range=0.1, max_position_embeddings=2048,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def opened(folder: Path) -> Any:
    return open_model(str(folder))


SMALL = {"windows": 1, "context": 320, "scored": 16}


def test_needles_are_hidden_where_asked_and_questions_have_one_right_answer(opened: Any) -> None:
    filler = opened.tokenizer(TEXTS["prose"]()[:40_000])["input_ids"]
    tokens, needles = plant(opened.tokenizer, filler, 600, (0.1, 0.5, 0.9), seed=3)
    assert len(tokens) == 600
    answers = {int(n.candidates[n.answer]) for n in needles}
    assert len(answers) == 3
    for needle in needles:
        assert len(set(needle.candidates.tolist())) == CANDIDATES
        right = int(needle.candidates[needle.answer])
        assert answers & set(needle.candidates.tolist()) == {right}
        places = [i for i, t in enumerate(tokens) if t == right]
        assert any(abs(i / 600 - needle.depth) < 0.15 for i in places)
        logits = np.zeros(len(opened.tokenizer), np.float32)
        logits[right] = 2
        assert needle.margin(logits) == 2
    with pytest.raises(ConfigError, match="filler"):
        plant(opened.tokenizer, filler[:100], 600, (0.5,))
    with pytest.raises(ConfigError, match="1 to"):
        plant(opened.tokenizer, filler, 600, ())


def test_a_model_that_tolerates_few_bits_gets_tiers(opened: Any) -> None:
    result = probe(opened, budget=0.3, bounds=Bounds(kl=1, top1=0), **SMALL)
    policy, evidence = result.policy, result.evidence
    assert policy.tiers is not None
    assert (policy.rule, policy.budget, policy.model) == ("optimise", 0.3, opened.name)
    assert evidence["int4"]
    assert [row["bits"] for row in evidence["everywhere"]] == [8, 4, 3]
    kls = [row["kl"] for row in evidence["everywhere"]]
    assert kls == sorted(kls)
    assert [row["layer"] for row in evidence["layers"]] == list(range(LAYERS))
    assert set(evidence["needles"]) == {"exact", "paper", "policy"}
    assert PolicyFile.from_bytes(result.to_bytes()).evidence == json.loads(json.dumps(evidence))


def test_a_model_that_fails_falls_back_and_says_why(opened: Any) -> None:
    result = probe(opened, bounds=Bounds(kl=1e-9, top1=1), **SMALL)
    assert not result.evidence["int4"]
    assert any("INT4 everywhere" in reason for reason in result.evidence["reasons"])
    policy = result.policy
    assert policy.rule == "ranked"
    assert [config.get("anchor_bits") for config in policy.tiers.configs] == [8, None]
    assert policy.budget > 0.5


def test_contexts_beyond_the_models_are_named(opened: Any) -> None:
    with pytest.raises(ConfigError, match="2048 tokens"):
        probe(opened, context=3000)


def test_from_the_command_line_to_a_transfer(folder: Path, opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    run = CliRunner().invoke(
        main, ["probe", str(folder), "-o", str(path), "--windows", "1", "--context", "320", "--scored", "16", "--kl",
               "9", "--top1", "0", "--budget", "0.3", "--json", "-q"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    summary = json.loads(run.stdout)
    assert summary["schema"] == "lynxproto.probe/1"
    assert summary["budget"] == 0.3
    policy = Policy.from_file(path)
    ids = np.asarray(opened.tokenizer(TEXTS["prose"]()[:8000])["input_ids"], np.int64)
    window = prefill(opened.model, make_identity(opened.model, name=opened.name, revision=opened.revision), ids, 500)
    policy.require(window.cache.manifest.identity)
    dump, mass = tmp_path / "cache.safetensors", tmp_path / "attention.npy"
    save_cache(dump, window.cache)
    np.save(mass, window.attention)
    for options, message, code in (
        (["--budget", "0.2"], "--policy-file", 2),
        (["--no-residual"], "--policy-file", 2),
        (["--policy-file", str(path), "--importance", "attention"], "--attention", 2),
        (["--policy-file", str(path), "--attention", str(dump)], "npy", 1),
    ):
        refused = CliRunner().invoke(main, ["send", str(dump), "memory://nobody", *options])
        assert refused.exit_code == code
        assert message in refused.output
    for extra, lossy in (["--attention", str(mass)], False), (["--no-residual"], True):
        with blocking.listen("tcp://127.0.0.1:0") as receiver:
            sent = [
                sys.executable,
                "-m",
                "lynxproto",
                "send",
                str(dump),
                receiver.url,
                "--policy-file",
                str(path),
                *extra,
            ]
            process = subprocess.Popen(sent, stdout=subprocess.DEVNULL)
            incoming = next(iter(receiver))
            incoming.ready(level=2, timeout=60)
            assert incoming.manifest.lossy == lossy
            if not lossy:
                incoming.exact(timeout=60)
            assert process.wait(60) == 0
        same = [np.array_equal(np.asarray(incoming.arrays[k]), w) for k, w in load_cache(dump).arrays.items()]
        assert all(same) != lossy


def test_the_benchmark_resumes_and_reports_what_is_documented(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("constriction")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out, plot = tmp_path / "quality.json", tmp_path / "quality.png"
    arguments = ["bench", "quality", "--model", str(folder), "--windows", "2", "--context", "320", "--scored", "16",
                 "--budgets", "0.3,0.45", "--json", str(out), "--plot", str(plot), "--skip", "needles"]  # fmt: skip
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    first = json.loads(out.read_text())
    assert first["schema"] == "lynxproto.bench.quality/1"
    assert first["windows"] == 2
    names = {row["method"] for row in first["results"]}
    assert {"lynx tiers 0.30", "paper's tiers 0.45", "uniform INT4", "CacheGen, deltas", "first/last 0.30"} <= names
    documented = {"method", "bits_per_value", "budget", "top1", "top1_se", "kl", "kl_se", "perplexity_change"}
    for row in first["results"]:
        assert documented <= set(row)
        if row["family"] in ("lynx tiers", "paper's tiers", "random tiers", "first/last tiers"):
            assert row["budget"] <= row["given_budget"] * 1.03
    assert len(first["layers"]) == 2 * LAYERS
    assert plot.stat().st_size > 10_000
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json") if p != out}
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json") if p != out} == before
    assert json.loads(out.read_text())["results"] == first["results"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--budgets", "0.05"], "above"), (["--budgets", "x"], "numbers"), (["--context", "4000"], "2048 tokens")],
)
def test_benchmarks_that_cannot_be_are_named(folder: Path, tmp_path: Path, options: Any, message: str) -> None:
    run = CliRunner(env={"XDG_CACHE_HOME": str(tmp_path)}).invoke(
        main, ["bench", "quality", "--model", str(folder), *options]
    )
    assert run.exit_code == 1
    assert message in run.output
