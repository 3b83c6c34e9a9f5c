"""The transformers adapter, on small random models (and once on the real one)."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lynxproto.codecs import get_codec
from lynxproto.errors import SpecError, SpeculationError
from lynxproto.manifest import Manifest
from lynxproto.policy import Policy
from lynxproto.speculation import Greedy, SeededSampler, Speculation, measure_noise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from tinymodels import KINDS, tiny  # noqa: E402 - after importorskip
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM  # noqa: E402

from lynxproto.integrations.hf import HFEngine, WordCache, make_identity, make_manifest  # noqa: E402

torch.set_num_threads(1)  # small matrices; on a busy machine several threads wait for each other

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROMPT = [int(x) for x in np.random.default_rng(0).integers(0, 97, 40)]


def make(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5)).eval()
    return MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=7, initializer_range=0.5)).eval()


@pytest.fixture(params=["llama", "sliding"])
def model(request):
    return make(request.param)


def truncated(words: np.ndarray) -> np.ndarray:
    """An approximate cache without any codec: 4 of the 8 bits of bfloat16's significand."""
    return words & np.uint16(0xFFF0)


def test_same_logits_as_the_stock_cache(model):
    ours = HFEngine(model, WordCache(model.config, 64, "float32"))
    stock = HFEngine(model, DynamicCache(config=model.config))
    np.testing.assert_allclose(ours.prefill(PROMPT), stock.prefill(PROMPT), atol=1e-4)
    for token in (3, 1, 4):
        np.testing.assert_allclose(ours.step(token), stock.step(token), atol=1e-4)
    np.testing.assert_allclose(ours.verify([1, 5, 9]), stock.verify([1, 5, 9]), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_windows_the_stock_caches_logits_bit_for_bit(kind, dtype):
    model = tiny(kind, dtype)
    ours = HFEngine(model, WordCache(model.config, 64, dtype, windows=True))
    stock = HFEngine(model, DynamicCache(config=model.config))
    np.testing.assert_array_equal(ours.prefill(PROMPT), stock.prefill(PROMPT))
    for token in (3, 1, 4):
        np.testing.assert_array_equal(ours.step(token), stock.step(token))
    np.testing.assert_array_equal(ours.verify([1, 5, 9]), stock.verify([1, 5, 9]))
    np.testing.assert_array_equal(ours.step(2), stock.step(2))


def test_words_are_views_of_rounded_values(model):
    cache = WordCache(model.config, 64)
    engine = HFEngine(model, cache)
    engine.prefill(PROMPT)
    words = cache.words(1, "key")
    assert words.shape == (2, len(PROMPT), 8)
    assert words.dtype == np.uint16
    values = cache.layers[1].keys[0].numpy()
    np.testing.assert_array_equal((words.astype(np.uint32) << 16).view(np.float32), values)
    assert np.shares_memory(words, cache.words(1, "key"))
    engine.step(1)
    assert cache.words(1, "key").shape == (2, len(PROMPT) + 1, 8)


def test_layers_are_exported_while_prefill_runs(model):
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []
    running = threading.Event()

    def on_layer(layer, keys, values):
        assert running.is_set()
        assert layer == len(seen)
        assert layer + 1 == 3 or not cache.layers[layer + 1].is_initialized  # the next layer has not begun
        seen.append((layer, keys, values))

    cache = WordCache(model.config, 64, on_layer=on_layer)
    running.set()
    HFEngine(model, cache).prefill(PROMPT)
    running.clear()
    assert len(seen) == 3
    for layer, keys, values in seen:
        assert np.shares_memory(keys, cache.words(layer, "key"))
        np.testing.assert_array_equal(values, cache.words(layer, "value"))


def test_received_words_give_the_senders_logits(model):
    sender = HFEngine(model, WordCache(model.config, 50))
    first = int(sender.prefill(PROMPT).argmax())
    receiver = HFEngine(model, WordCache(model.config, 80))
    manifest = make_manifest(model, len(PROMPT), make_identity(model))
    arrays = receiver.cache.allocate(manifest, model)
    assert set(arrays) == {(layer, part) for layer in range(3) for part in ("key", "value")}
    for attempt in range(2):  # the second prompt uses the same buffers
        for (layer, part), array in arrays.items():
            array[...] = sender.cache.words(layer, part)[:, : len(PROMPT)]
        for layer in range(3):
            receiver.cache.refresh(layer, len(PROMPT))
        for token in (first, 5, 6):
            np.testing.assert_array_equal(sender.step(token), receiver.step(token), err_msg=str(attempt))
        sender.crop(len(PROMPT))
        receiver.crop(len(PROMPT))
        arrays = receiver.cache.allocate(manifest, model)


def test_a_step_computes_while_layers_come_in(model):
    sender = HFEngine(model, WordCache(model.config, 50))
    sender.prefill(PROMPT)
    kept = {(i, p): sender.cache.words(i, p).copy() for i in range(3) for p in ("key", "value")}
    order: list[int] = []

    def arrive(layer: int) -> None:
        order.append(layer)
        for part in ("key", "value"):
            arrays[layer, part][...] = kept[layer, part]
        cache.refresh(layer, len(PROMPT))

    cache = WordCache(model.config, 50, before_layer=arrive)
    arrays = cache.allocate(make_manifest(model, len(PROMPT), make_identity(model)), model)
    cache.expect(len(PROMPT))
    np.testing.assert_array_equal(HFEngine(model, cache).step(3), sender.step(3))
    assert order == [0, 1, 2]


def test_a_cache_that_prefilled_can_receive(model):
    engine = HFEngine(model, WordCache(model.config, 60))
    engine.prefill(PROMPT)
    expected = engine.step(3)
    kept = {(i, p): engine.cache.words(i, p).copy() for i in range(3) for p in ("key", "value")}
    engine.crop(0)
    engine.prefill(PROMPT[::-1])
    engine.crop(0)
    arrays = engine.cache.allocate(make_manifest(model, len(PROMPT), make_identity(model)), model)
    for layer, part in arrays:
        arrays[layer, part][...] = kept[layer, part][:, : len(PROMPT)]
        engine.cache.refresh(layer, len(PROMPT))
    np.testing.assert_array_equal(engine.step(3), expected)


def test_crop_leaves_what_feeding_fewer_tokens_leaves(model):
    once, twice = (HFEngine(model, WordCache(model.config, 64)) for _ in range(2))
    for engine in (once, twice):
        engine.prefill(PROMPT)
    twice.verify([9, 8, 7, 6])
    twice.crop(len(PROMPT) + 1)
    once.verify([9, 8, 7, 6])
    once.crop(len(PROMPT) + 1)
    once.step(2)
    once.crop(len(PROMPT) + 1)
    np.testing.assert_array_equal(once.step(3), twice.step(3))
    with pytest.raises(SpeculationError, match="cannot crop a cache of 42 tokens to 43"):
        once.crop(43)


def test_stock_caches_are_cropped_or_refused():
    engine = HFEngine(make("llama"), DynamicCache())
    engine.prefill(PROMPT)
    expected = engine.step(1)
    engine.crop(len(PROMPT))
    np.testing.assert_array_equal(engine.step(1), expected)

    model = make("sliding")
    engine = HFEngine(model, DynamicCache(config=model.config))
    engine.prefill(PROMPT)
    with pytest.raises(SpeculationError, match="cannot be cropped"):
        engine.crop(3)


@pytest.mark.parametrize("sampler", [Greedy(), SeededSampler(11, temperature=0.9, top_p=0.95)])
@pytest.mark.parametrize("with_result", [True, False])
def test_speculation_gives_the_tokens_of_plain_decoding(model, sampler, with_result):
    exact = HFEngine(model, WordCache(model.config, 120))
    chosen = sampler.choose(exact.prefill(PROMPT), len(PROMPT))
    words = {(i, p): exact.cache.words(i, p).copy() for i in range(3) for p in ("key", "value")}
    first = chosen if with_result else None
    plain = Speculation(exact, PROMPT, first, sampler=sampler, max_draft=0)
    list(plain.verify())
    list(plain.decode(40))
    noise = measure_noise(exact, len(PROMPT), plain.tokens[:17])

    engine = HFEngine(model, WordCache(model.config, 120))
    arrays = engine.cache.allocate(make_manifest(model, len(PROMPT), make_identity(model)), model)

    def install(change) -> None:
        for key, array in arrays.items():
            array[...] = change(words[key])
        for layer in range(3):
            engine.cache.refresh(layer, len(PROMPT))

    install(truncated)
    run = Speculation(engine, PROMPT, first, sampler=sampler, max_draft=16, noise=noise)
    list(run.draft())
    list(run.verify(lambda: install(lambda w: w)))
    list(run.decode(40))
    assert run.report.drafted == 16
    assert run.tokens == plain.tokens
    assert len(run.tokens) == 40
    assert run.report.mismatches == ()


def test_identity_and_manifest(model):
    class Tokenizer:
        def __init__(self, word: str) -> None:
            self.word = word

        def get_vocab(self) -> dict[str, int]:
            return {self.word: 0}

    identity = make_identity(model, Tokenizer("a"), name="toy", revision="1")
    assert identity.model == "toy"
    assert identity.producer == f"transformers {transformers.__version__}"
    assert identity.mismatch(make_identity(model, Tokenizer("a"), name="toy", revision="1")) is None
    assert "tokenizer_hash" in str(identity.mismatch(make_identity(model, Tokenizer("b"), name="toy", revision="1")))
    other = make("llama")
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert "rope_hash" in str(make_identity(make("llama")).mismatch(make_identity(other)))

    manifest = make_manifest(model, 40, identity, request_id="r")
    assert isinstance(manifest, Manifest)
    assert [layer.kind for layer in manifest.layers] == [
        "sliding" if model.config.model_type == "mistral" else "full"
    ] * 3
    assert manifest.nbytes == 3 * 2 * 2 * 40 * 8 * 2


def test_misuse_is_named(model):
    with pytest.raises(SpecError, match="float8"):
        WordCache(model.config, 4, "float8_e4m3")
    with pytest.raises(SpecError, match="capacity"):
        WordCache(model.config, 0)
    cache = WordCache(model.config, 4)
    with pytest.raises(SpecError, match="holds no tokens"):
        cache.words(0, "key")
    with pytest.raises(SpeculationError, match="5 tokens do not fit"):
        HFEngine(model, cache).prefill(PROMPT[:5])
    identity = make_identity(model)
    with pytest.raises(SpecError, match="do not fit a word cache of 4 tokens"):
        cache.allocate(make_manifest(model, 5, identity), model)
    with pytest.raises(SpecError, match="layers of float16"):
        cache.allocate(make_manifest(model, 4, identity, dtype="float16"), model)
    wide = Manifest.for_cache(identity=identity, dtype="bfloat16", layers=3, kv_heads=3, head_dim=8, tokens=4)
    HFEngine(model, cache).prefill(PROMPT[:2])
    with pytest.raises(SpecError, match=r"\(3, 8\)"):
        cache.allocate(wide, model)


def test_recurrent_state_is_refused():
    config = LlamaConfig(**SIZES)
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(SpecError, match=r"(?i)layer 1 .* linear_?attention"):
        WordCache(config, 8)


@pytest.mark.model
def test_real_model_drafts_on_an_anchor_and_ends_exact():
    """The whole path but the wire: hq's anchor, then the exact words, into a running engine."""
    pytest.importorskip("gguf")
    from lynxproto.demo.model import load_model, load_tokenizer, prepare_model, prose

    folder, revision = prepare_model()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = prose(tokenizer, 160)
    sender = HFEngine(model, WordCache(model.config, 200))
    first = int(sender.prefill(prompt).argmax())
    manifest = make_manifest(model, len(prompt), make_identity(model, tokenizer, revision=revision))
    words = {
        (layer.index, p): sender.cache.words(layer.index, p).copy() for layer in manifest.layers for p in layer.parts
    }
    plain = Speculation(sender, prompt, first, max_draft=0, max_tokens=13)
    list(plain.verify())
    list(plain.decode())

    receiver = HFEngine(model, WordCache(model.config, 200))
    arrays = receiver.cache.allocate(manifest, model)
    policy = Policy(body={"id": "hq", "anchor_bits": 4}, sinks=0, recent=0)
    codec = get_codec(policy.body)

    def install(levels: int) -> None:
        for layer in manifest.layers:
            for tile in policy.tiles("bfloat16", layer):
                key = (layer.index, tile.part)
                spec = tile.spec("bfloat16", layer.head_dim(tile.part))
                codec.decode(spec, codec.encode(spec, words[key])[:levels], arrays[key])
            receiver.cache.refresh(layer.index, len(prompt))

    install(1)
    assert any((arrays[key] != words[key]).any() for key in words)
    noise = measure_noise(sender, len(prompt), plain.tokens)
    run = Speculation(receiver, prompt, first, max_draft=8, max_tokens=13, noise=noise)
    list(run.draft())
    list(run.verify(lambda: install(codec.levels)))
    list(run.decode())
    assert all((arrays[key] == words[key]).all() for key in words)
    assert run.tokens == plain.tokens
    assert run.report.accepted > 0
