"""Calibration: widths from importances, the side file, and measuring a small random model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lynxproto import calibration
from lynxproto.calibration import KEY_ERROR, VALUE_ERROR, Calibration, Widths
from lynxproto.chunk import ChunkSpec
from lynxproto.cli import main
from lynxproto.codecs import get_codec
from lynxproto.errors import CalibrationError, ConfigError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lynxproto.integrations.hf import HFEngine, WordCache  # noqa: E402 - it needs torch and transformers


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    layers = draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0, 3, 60, 800]))

    def sample(*shape: int) -> NDArray[np.int16]:
        return random.integers(-spread, spread, shape, np.int16, endpoint=True)

    return Calibration(
        model="m",
        revision="r",
        method="random",
        keys=tuple(sample(heads, dim) for _ in range(layers)),
        values=tuple(sample(heads) for _ in range(layers)),
    )


def _flat(arrays: tuple[NDArray[Any], ...]) -> NDArray[np.float64]:
    return np.concatenate([a.ravel() for a in arrays]).astype(np.float64)


@given(calibrations(), st.floats(0, 7), st.floats(2, 5))
@settings(max_examples=60, deadline=None)
def test_widths_meet_the_budget_and_follow_importance(c: Calibration, key_bits: float, value_bits: float) -> None:
    widths = c.widths(key_bits, value_bits)
    for importances, chosen, mean, (low, high) in (
        (c.keys, widths.keys, key_bits, (0, 7)),
        (c.values, widths.values, value_bits, (2, 5)),
    ):
        assert [a.shape for a in importances] == [a.shape for a in chosen]
        imp, w = _flat(importances), _flat(chosen)
        assert w.min() >= low
        assert w.max() <= high
        assert mean - 1 / len(w) - 1e-6 <= w.mean() <= mean + 1e-6
        order = np.argsort(imp, kind="stable")
        rising = w[order]
        different = np.diff(imp[order]) > 0
        assert np.all(np.diff(rising)[different] >= 0), "a more important channel has fewer bits"
    again = Calibration.from_bytes(c.to_bytes()).widths(key_bits, value_bits)
    assert all(np.array_equal(a, b) for a, b in zip(widths.keys, again.keys, strict=True))


@given(calibrations(), st.floats(0.5, 6))
@settings(max_examples=30, deadline=None)
def test_no_exchange_of_one_bit_helps(c: Calibration, bits: float) -> None:
    imp, w = np.exp2(_flat(c.keys) / 16), _flat(c.widths(bits, 3).keys).astype(int)
    error = np.asarray([*KEY_ERROR, KEY_ERROR[-1]])
    gain = np.where(w < 7, imp * (error[w] - error[w + 1]), 0)
    loss = np.where(w > 0, imp * (error[np.maximum(w - 1, 0)] - error[w]), np.inf)
    # Gains are rounded to 1/16 of a factor of two.
    assert gain.max() <= loss.min() * 2 ** (1.01 / 16)


@given(calibrations(), st.floats(-12, 2))
@settings(max_examples=40, deadline=None)
def test_a_predicted_kl_is_reached_with_the_fewest_bits(c: Calibration, exponent: float) -> None:
    def bits(widths: Widths) -> float:
        return sum(k.sum() + v.sum() * k.shape[1] for k, v in zip(widths.keys, widths.values, strict=True))

    most, least = c.widths(7, 5), c.widths(0, 2)
    low, high = c.predicted_kl(most), c.predicted_kl(least)
    target = low + (high - low) * 10.0 ** min(exponent, 0)
    chosen = c.reaching(target)
    assert c.predicted_kl(chosen) <= target * (1 + 1e-9)
    assert bits(least) <= bits(chosen) <= bits(most)
    # Of all the ways to spend as many bits on keys and on values as these do, none is better.
    means = [np.mean(_flat(part)) for part in (chosen.keys, chosen.values)]
    if len({k.shape for k in c.keys}) == 1:
        assert c.predicted_kl(chosen) <= c.predicted_kl(c.widths(*means)) * 1.05 + 1e-12
    assert bits(c.reaching(2 * high)) == bits(least)
    assert bits(c.reaching(low / 2)) == bits(most)


def test_presets_take_the_bits_that_a_model_needs() -> None:
    random = np.random.default_rng(1)
    c = Calibration(
        model="m",
        method="random",
        keys=tuple(random.integers(-200, -40, (2, 64), np.int16) for _ in range(3)),
        values=tuple(random.integers(-150, -100, 2, np.int16) for _ in range(3)),
    )
    needy = Calibration(
        model="m", method="random", keys=tuple(k + 24 for k in c.keys), values=tuple(v + 24 for v in c.values)
    )
    widths = {}
    for name, of in (("balanced", c), ("dense", c), ("needy", needy)):
        preset = "balanced" if name == "needy" else name
        config = get_codec("hq", preset=preset, calibration=of).get_config()
        assert get_codec(config).get_config() == config
        widths[name] = np.array([int(w) for layer in config["widths"]["keys"] for head in layer for w in head])
        assert config["key_bits"] == pytest.approx(max(2, widths[name].mean()), abs=1e-3)
    assert widths["dense"].mean() < widths["balanced"].mean() < widths["needy"].mean()
    given_bits = get_codec("hq", preset="dense", calibration=c, key_bits=3, value_bits=2.5).get_config()
    assert given_bits["widths"]["keys"][0][0] == "".join(map(str, c.widths(3, 2.5).keys[0][0]))


def test_widths_do_not_change_between_versions() -> None:
    keys = np.array([[0, 16, 32, -16], [64, -64, 5, 5]], np.int16)
    c = Calibration(model="m", method="by hand", keys=(keys,), values=(np.array([0, 41], np.int16),))
    widths = c.widths(2, 3)
    assert widths.keys[0].tolist() == [[2, 2, 3, 1], [4, 0, 2, 2]]
    assert widths.values[0].tolist() == [2, 4]
    assert c.hash.hex() == "e478d60145cf3971c6b4bd6f973d3c7b"


@pytest.mark.parametrize(("key_bits", "value_bits"), [(-0.1, 3), (7.1, 3), (3, 1.9), (3, 5.1), (float("nan"), 3)])
def test_budgets_outside_the_widths_are_refused(key_bits: float, value_bits: float) -> None:
    c = Calibration(model="m", method="", keys=(np.zeros((1, 4), np.int16),), values=(np.zeros(1, np.int16),))
    with pytest.raises(ConfigError, match="outside"):
        c.widths(key_bits, value_bits)


def test_a_file_survives_the_round_trip(tmp_path: Path) -> None:
    keys = np.arange(-6, 6, dtype=np.int16).reshape(2, 6)
    c = Calibration(model="m", revision="r", method="x", keys=(keys, keys + 1), values=(keys[:, 0], keys[:, 1]))
    c.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded.hash == c.hash
    assert loaded.shapes == ((2, 6), (2, 6))
    assert all(np.array_equal(a, b) for a, b in zip(loaded.keys, c.keys, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def _fields(**change: Any) -> bytes:
    c = Calibration(model="m", method="x", keys=(np.ones((2, 3), np.int16),), values=(np.ones(2, np.int16),))
    return json.dumps({**json.loads(c.to_bytes()), **change}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a calibration"),
        (b'{"format": "lynxproto.calibration/2"}', "not a calibration"),
        (_fields(extra=1), "fields must be"),
        (_fields(units=8), "fields must be"),
        (_fields(model=5), "must be texts"),
        (_fields(keys=[]), "must be a list"),
        (_fields(keys={}), "must be a list"),
        (_fields(keys=[[[1, 2], [1]]]), "not a rectangle"),
        (_fields(keys=[[[1.5, 2, 3], [1, 2, 3]]]), "not a rectangle"),
        (_fields(keys=[[[True, False, True], [True, True, True]]]), "not a rectangle"),
        (_fields(keys=[[["a", "b", "c"], ["a", "b", "c"]]]), "not a rectangle"),
        (_fields(keys=[[1, 2, 3]]), "not a rectangle"),
        (_fields(keys=[[[10**30, 1, 1], [1, 1, 1]]]), "not a rectangle"),
        (_fields(keys=[[[5000, 1, 1], [1, 1, 1]]]), "beyond"),
        (_fields(keys=[[[1, 1, 1]]]), "kv_heads"),
        (_fields(values=[[1, 1], [1, 1]]), "same 1 to"),
        (_fields(values=[[1, 2]]), "hash does not match"),
        (_fields(xxh3_128=""), "hash does not match"),
    ],
)
def test_broken_files_are_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(data)
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(tmp_path / "broken")
    assert "broken" in str(caught.value)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot read"):
        Calibration.load(tmp_path / "absent")
    c = Calibration.from_bytes(_fields())
    with pytest.raises(CalibrationError, match="cannot write"):
        c.save(tmp_path / "no" / "folder")


@pytest.mark.parametrize("width", range(9))
def test_anchors_have_as_many_levels_as_their_width_says(width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(2, 150, 64)
    keys = calibration.anchor_keys(x, torch.full((2, 64), width))
    values = calibration.anchor_values(x, torch.full((2,), width))
    assert keys.shape == values.shape == x.shape
    assert max(len(torch.unique(keys[h, :64, c])) for h in range(2) for c in range(64)) <= 2**width
    assert max(len(torch.unique(values[h, t])) for h in range(2) for t in range(150)) <= 2**width
    if width < min(len(KEY_ERROR), len(VALUE_ERROR)):
        for out, dim, error in ((keys[:, :128].unflatten(1, (2, 64)), 2, KEY_ERROR), (values, 2, VALUE_ERROR)):
            source = x[:, :128].unflatten(1, (2, 64)) if dim == 2 and out.ndim == 4 else x
            relative = (out - source).square().mean(dim) / calibration._square_range(source, dim)
            assert 0.7 < float(relative.mean()) / error[width] < 1.4


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.o_proj,):
            projection.weight.zero_()  # nothing that this layer's cache holds can matter
    return model


@pytest.fixture(scope="module")
def windows() -> list[NDArray[np.int64]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 97, 200) for _ in range(2)]


@pytest.fixture(scope="module")
def measured(model: Any, windows: list[NDArray[np.int64]]) -> Calibration:
    return calibration.calibrate(model, windows, name="tiny", revision="1", scored=32)


def test_measuring_finds_what_matters(model: Any, measured: Calibration) -> None:
    assert measured.shapes == ((2, 32),) * 3
    useless = max(measured.keys[1].max(), measured.values[1].max())
    assert all(useless < min(np.median(measured.keys[i]), measured.values[i].min()) for i in (0, 2))
    widths = measured.widths(2, 3)
    assert widths.keys[1].max() == 0
    assert widths.values[1].max() == 2
    assert all(p.requires_grad for p in model.parameters()), "the model is given back as it was"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_measuring_is_reproducible_and_reports_progress(
    model: Any, windows: list[NDArray[np.int64]], measured: Calibration, implementation: str
) -> None:
    seen: list[tuple[int, int, str]] = []
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        again = calibration.calibrate(
            model, windows, name="tiny", revision="1", scored=32, on_progress=lambda *step: seen.append(step)
        )
    finally:
        model.set_attn_implementation(before)
    difference = max(np.abs(a - b).max() for a, b in zip(measured.keys, again.keys, strict=True))
    assert difference <= 16  # the drawn tokens may differ where kernels round differently
    if implementation == before:
        assert again.hash == measured.hash
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS = {
    "sliding": ("Mistral", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 48}),
    "head_dim 256, one head, local and global": (
        "Gemma3",
        {
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "head_dim 128, normalised keys": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 128}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_attention(kind: str) -> None:
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**SMALL, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    tokens = np.random.default_rng(0).integers(0, 50, 180)
    measured = calibration.calibrate(model, [tokens], name="w", scored=16)
    heads, dim = sizes["num_key_value_heads"], sizes["head_dim"]
    assert measured.shapes == ((heads, dim),) * 3
    cache = WordCache(config, 180)
    HFEngine(model, cache).prefill(tokens.tolist())
    for preset, by in itertools.product(("fast", "balanced", "dense"), (None, measured)):
        codec = get_codec("hq", preset=preset, calibration=by)
        for layer, part in itertools.product(range(3), ("key", "value")):
            words = cache.words(layer, part)
            spec = ChunkSpec(part, "bfloat16", heads, len(tokens), dim, layer=layer)
            out = np.empty_like(words)
            codec.decode(spec, codec.encode(spec, words), out)
            np.testing.assert_array_equal(out, words)


def test_windows_that_are_too_short_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="at least"):
        calibration.calibrate(model, [np.zeros(100, np.int64)], name="tiny")
    with pytest.raises(ConfigError, match="at least"):
        calibration.calibrate(model, [], name="tiny")


class _Characters:
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 97 for c in text[:3000]]}


def test_the_command_writes_a_file(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path / "tiny")
    words = [chr(i) for i in range(33, 127)]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(words), unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "tiny")
    text = tmp_path / "text"
    text.write_text(" ".join(words * 20), encoding="utf-8")
    out = tmp_path / "c.json"
    arguments = ["calibrate", str(tmp_path / "tiny"), "-o", str(out), "--text", str(text), "--json", "--quiet"]
    sizes = ["--windows", "1", "--context", "160", "--scored", "16"]
    result = CliRunner().invoke(main, [*arguments, *sizes])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    loaded = Calibration.load(out)
    assert summary["xxh3_128"] == loaded.hash.hex()
    assert (loaded.model, summary["layers"], len(loaded.revision)) == ("tiny", 3, 16)
    for command in ("calibrate", "probe"):  # at once, not after minutes
        result = CliRunner().invoke(main, [command, str(tmp_path / "tiny"), "-o", str(tmp_path / "no" / "c.json")])
        assert (result.exit_code, "is not a folder" in result.output) == (1, True)
    result = CliRunner().invoke(main, ["calibrate", str(tmp_path / "absent"), "-o", str(out)])
    assert result.exit_code == 1
    assert "neither a folder" in result.output
    result = CliRunner().invoke(main, [*arguments, "--windows", "1", "--context", "99999"])
    assert result.exit_code == 1
    assert "do not fit" in result.output


def _tokenizer(words: list[str]) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, **{word: i + 1 for i, word in enumerate(words)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer
