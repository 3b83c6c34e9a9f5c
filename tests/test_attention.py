"""How much tokens are attended to: what the hook records equals the whole attention matrix's sums."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lynxproto import blocking
from lynxproto.errors import ConfigError, SpecError
from lynxproto.policy import Policy
from lynxproto.quality import prefill
from lynxproto.tiers import Tiers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from lynxproto.integrations import attention  # noqa: E402 - after importorskip
from lynxproto.integrations.attention import AttentionMass, require_layers, watch_attention  # noqa: E402 - the same
from lynxproto.integrations.hf import HFEngine, LynxCache, WordCache, make_identity, make_manifest  # noqa: E402 - the same

torch.set_num_threads(1)
TOKENS, HEADS, KV_HEADS, LAYERS = 60, 6, 2, 2
IDS = torch.arange(TOKENS)[None] * 7 % 97


def make(kind: str, implementation: str):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "initializer_range": 0.5,
        "attn_implementation": implementation,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, head_dim=8, sliding_window=7)).eval()


def whole(model, queries):
    """Attention of the last ``queries``, summed over them and over heads that share a KV head."""
    with torch.inference_mode():
        matrices = model(IDS, output_attentions=True).attentions
    sums = [m[0, :, TOKENS - queries :].double().unflatten(0, (KV_HEADS, -1)) for m in matrices]
    return [m.sum((1, 2)).numpy() for m in sums], [m.square().sum((1, 2)).numpy() for m in sums]


def observe(model, mass, *pieces):
    cache = WordCache(model.config, TOKENS, "float32")
    with watch_attention(model, mass), torch.inference_mode():
        for piece in pieces:
            model(IDS[:, piece], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "sliding"])
@pytest.mark.parametrize("queries", [None, 5])
def test_mass_is_that_of_the_whole_matrix(kind, implementation, queries, monkeypatch):
    expected, squares = whole(make(kind, "eager"), queries or TOKENS)
    monkeypatch.setattr(attention, "_CHUNK_SCORES", 7 * HEADS * TOKENS)  # 7 queries at a time
    mass = AttentionMass(queries)
    observe(make(kind, implementation), mass, slice(None))
    for layer in range(LAYERS):
        np.testing.assert_allclose(mass.mass[layer], expected[layer], atol=1e-4)
        np.testing.assert_allclose(mass.squares[layer], squares[layer], atol=1e-4)
    assert mass.mass[0].sum() == pytest.approx(HEADS * (queries or TOKENS), rel=1e-4)


def test_pieces_of_a_prompt_add_up():
    model = make("llama", "sdpa")
    all_at_once, piecewise = AttentionMass(None), AttentionMass(None)
    observe(model, all_at_once, slice(None))
    observe(model, piecewise, slice(0, 25), slice(25, TOKENS))
    for layer in range(LAYERS):
        np.testing.assert_allclose(piecewise.mass[layer], all_at_once.mass[layer], atol=1e-4)


def test_the_mass_of_a_layer_is_told_at_once_and_the_models_result_does_not_change():
    model = make("llama", "sdpa")
    told = []
    mass = AttentionMass(8, on_layer=lambda layer, found: told.append((layer, found.shape)))
    with torch.inference_mode():
        before = model(IDS).logits
        with watch_attention(model, mass):
            during = model(IDS).logits
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(before, during)
    assert told == [(0, (KV_HEADS, TOKENS)), (1, (KV_HEADS, TOKENS))]


def test_models_that_cannot_be_watched_are_named():
    with pytest.raises(SpecError, match="key norms"):
        require_layers({0: 1}, 2, object())
    with pytest.raises(ConfigError, match="at least 1"):
        AttentionMass(0)


def test_a_layers_plan_follows_its_attention_while_prefill_runs_and_all_tokens_become_exact():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    count = 400
    ids = [i * 31 % 97 for i in range(count)]
    identity = make_identity(model, name="tiny")
    manifest = make_manifest(model, count, identity)
    window = prefill(model, identity, np.array(ids), count)
    tiers = Tiers.uniform((2, 4, 8, 16), window.cache).observed([window.attention.astype(float)])
    cache = WordCache(config, count)
    order = []
    with blocking.listen("memory://attention") as receiver, blocking.connect(receiver.url) as sender:
        outgoing = sender.open(manifest, Policy(tiers=tiers, budget=0.3, model="tiny"))

        def send(layer, found):
            order.append(layer)
            outgoing.write(layer, cache.words(layer, "key"), cache.words(layer, "value"), importance=found)

        with watch_attention(model, AttentionMass(64, send)):
            HFEngine(model, cache).prefill(ids)
        incoming = next(iter(receiver))
        outgoing.finish(timeout=60)
        incoming.exact(timeout=60)
        assert order == list(range(LAYERS))
        assert outgoing.stats.levels[0].bytes < 0.32 * manifest.nbytes
        for layer in range(LAYERS):
            for part in ("key", "value"):
                np.testing.assert_array_equal(np.asarray(incoming.arrays[layer, part]), cache.words(layer, part))

    with (
        ThreadPoolExecutor(1) as pool,
        LynxCache.listen("tcp://127.0.0.1:0", model, dtype="bfloat16", identity=identity) as receiver,
    ):
        sending = pool.submit(
            LynxCache.prefill, model, ids, receiver.url, dtype="bfloat16", identity=identity,
            policy=Policy(tiers=tiers, budget=0.3, model="tiny"),
        )  # fmt: skip
        arrived = LynxCache.pull(receiver, model, ids, identity=identity, timeout=60)
        stats = sending.result()[2]
    assert stats.levels[0].bytes < 0.32 * manifest.nbytes
    for layer, held in zip(arrived.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, held.keys)
