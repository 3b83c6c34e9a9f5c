"""LynxCache: DynamicCaches of many kinds of models to files and to peers, and back, as they were."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_cli import invoke, receiving
from test_serve import SECRET, serving
from tinymodels import KINDS, prefilled, prompt, tiny, torch, transformers

import lynxproto
from lynxproto import blocking
from lynxproto.cachefile import load_cache
from lynxproto.config import Config
from lynxproto.errors import (
    CacheFileError,
    ConnectionClosedError,
    DeadlineError,
    IdentityError,
    LocalError,
    NotFoundError,
    RejectedError,
    SpecError,
    TransferCancelledError,
)
from lynxproto.integrations.hf import LynxCache, WordCache, make_identity
from lynxproto.integrations.hf.dynamic import cache_of, dynamic_of, load_dynamic
from lynxproto.integrations.hf.model import prompt_id
from lynxproto.manifest import Identity
from lynxproto.policy import Policy
from lynxproto.session import Progress
from lynxproto.transports import TokenBucket

IDENTITY = Identity(model="test/model")
URL = "tcp://127.0.0.1:0"
PROMPT = prompt(150)


def random_dynamic(dtype: Any = torch.bfloat16, layers: int = 2, batch: int = 1) -> Any:
    torch.manual_seed(0)
    cache = transformers.DynamicCache()
    for layer in range(layers):
        cache.update(*(torch.randn(batch, 2, 150, 64).to(dtype) for _ in range(2)), layer)
    return cache


def assert_same(a: Any, b: Any) -> None:
    assert len(a.layers) == len(b.layers)
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert type(mine) is type(theirs)
        if mine.keys is None:
            assert theirs.keys is None
            continue
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        assert mine.keys.dtype == theirs.keys.dtype
        assert mine.get_seq_length() == theirs.get_seq_length()


def assert_same_after(model: Any, a: Any, b: Any) -> None:
    """They hold the same, and lead to the same logits, several tokens on."""
    assert_same(a, b)
    for tokens in ([[5]], [[3, 8, 9]], [[1]]):
        with torch.inference_mode():
            mine, theirs = (model(torch.tensor(tokens), past_key_values=cache).logits for cache in (a, b))
        assert torch.equal(mine, theirs)


def pushed(model: Any, push: Callable[[str], object], **options: Any) -> Any:
    """What a receiver pulls while ``push`` runs beside it."""
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model, **options) as receiver:
        sending = pool.submit(push, receiver.url)
        cache = LynxCache.pull(receiver, model, PROMPT, timeout=60)
        sending.result()
        return cache


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_pushed_saved_and_loaded_caches_decode_as_before(kind: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(kind, dtype)
    cache, first = prefilled(model, PROMPT)
    path = LynxCache.save(cache, tmp_path / "one.safetensors", model, PROMPT, first_token=first)
    arrived = pushed(model, lambda url: LynxCache.push(cache, url, model, PROMPT, first_token=first))
    loaded = LynxCache.load(path, model, PROMPT)
    assert arrived.first_token == loaded.first_token == first
    assert_same_after(model, loaded, copy.deepcopy(cache))
    assert_same_after(model, arrived, cache)


def test_short_prompts_of_sliding_layers() -> None:
    """Fewer tokens than the window, exactly as many, and one more."""
    model = tiny("gemma3")
    for tokens in (1, 6, 7, 8, 9):
        ids = prompt(tokens, seed=tokens)
        cache, _ = prefilled(model, ids)
        with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model) as receiver:
            sending = pool.submit(LynxCache.push, cache, receiver.url, model, ids)
            arrived = LynxCache.pull(receiver, model, ids, timeout=60)
            sending.result()
        assert arrived.first_token is None
        assert_same_after(model, arrived, cache)


def test_asyncio_and_open_sessions() -> None:
    model = tiny("llama", "bfloat16")
    cache, first = prefilled(model, PROMPT)

    async def run() -> None:
        async with LynxCache.listen(URL, model) as receiver, lynxproto.connect(receiver.url) as sender:
            for _ in range(2):
                told: list[int] = []

                def tell(progress: Progress, told: list[int] = told) -> None:
                    told.append(progress.bytes)

                _, arrived = await asyncio.gather(
                    LynxCache.apush(cache, sender, model, PROMPT, first_token=first),
                    LynxCache.apull(receiver, model, PROMPT, on_progress=tell, timeout=60),
                )
                assert arrived.first_token == first
                assert told
                assert_same(arrived, cache)
            with pytest.raises(LocalError, match="begins with 'a'"):
                LynxCache.pull(receiver, model, PROMPT)

    asyncio.run(run())
    with LynxCache.listen(URL, model) as receiver, blocking.connect(receiver.url) as sender:
        taking = threading.Thread(target=lambda: LynxCache.pull(receiver, model, PROMPT, timeout=60))
        taking.start()
        assert LynxCache.push(cache, sender, model, PROMPT).bytes > 0
        taking.join()
        with pytest.raises(SpecError, match="open session has its own"):
            LynxCache.push(cache, sender, model, PROMPT, insecure=True)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_prefill_sends_layers_as_they_are_computed(kind: str) -> None:
    model = tiny(kind, "bfloat16")
    expected, first = prefilled(model, PROMPT)
    order: list[int] = []
    made: list[Any] = []

    def push(url: str) -> None:
        cache, result, _ = LynxCache.prefill(model, PROMPT, url, on_layer=order.append)
        made.append(cache)
        assert result.first_token == first

    arrived = pushed(model, push)
    assert order == sorted(order)
    assert arrived.first_token == first
    assert_same(arrived, expected)
    assert_same_after(model, arrived, dynamic_of(cache_of(made[0], IDENTITY), model.config))


def test_a_policy_that_chooses_for_itself() -> None:
    model = tiny("llama", "bfloat16")
    cache, _ = prefilled(model, PROMPT)
    told: list[Any] = []
    assert_same(
        pushed(model, lambda url: told.append(LynxCache.push(cache, url, model, PROMPT, policy=Policy.auto()))), cache
    )
    assert told[0].policy


def test_a_store_keeps_caches_by_prompt(tmp_path: Path) -> None:
    model, config = tiny("gemma3"), Config(secret=SECRET.encode())
    cache, first = prefilled(model, PROMPT)
    with serving(tmp_path / "store") as (_, url):
        LynxCache.push(cache, url, model, PROMPT, first_token=first, config=config)
        arrived = LynxCache.pull(url, model, PROMPT, config=config)
        with pytest.raises(NotFoundError):
            LynxCache.pull(url, model, prompt(20), config=config)
        with pytest.raises(NotFoundError):
            LynxCache.pull(url, tiny("gemma3", seed=1), PROMPT, config=config)
    assert arrived.first_token == first
    assert_same_after(model, arrived, cache)


def refused(model: Any, cache: Any, pushed_as: Any, ids: Any, match: str, **options: Any) -> None:
    """Both sides are told before a byte of the cache moves."""
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model) as receiver:
        sending = pool.submit(LynxCache.push, cache, receiver.url, pushed_as, ids, **options)
        with pytest.raises(IdentityError, match=match):
            LynxCache.pull(receiver, model, PROMPT, timeout=60)
        with pytest.raises(RejectedError):
            sending.result()


def refused_for_its_prompt(model: Any, cache: Any, ids: Any, match: str) -> None:
    """The prompt is known when a cache is taken; a small one may be whole by then, and else is cancelled."""
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model) as receiver:
        sending = pool.submit(LynxCache.push, cache, receiver.url, model, ids)
        with pytest.raises(IdentityError, match=match):
            LynxCache.pull(receiver, model, PROMPT, timeout=60)
        assert isinstance(sending.exception(), TransferCancelledError | None)


def test_caches_of_others_are_refused() -> None:
    model = tiny("llama")
    cache, _ = prefilled(model, PROMPT)
    refused(model, cache, tiny("llama", seed=1), PROMPT, "revision is 'weights-")
    refused(model, cache, model, PROMPT, "model is 'other'", identity=make_identity(model, name="other"))
    half = tiny("llama", "float16")
    refused(model, prefilled(half, PROMPT)[0], model, PROMPT, "holds float16, the model computes with float32")
    refused(half, cache, half, PROMPT, "holds float32, the model computes with float16")
    refused_for_its_prompt(model, cache, None, "does not say of which prompt")
    other = prompt(150, seed=3)
    refused_for_its_prompt(model, prefilled(model, other)[0], other, "another prompt of 150 tokens")
    longer = prompt(151)
    refused_for_its_prompt(model, prefilled(model, longer)[0], longer, "another prompt of 151 tokens")
    fewer = transformers.DynamicCache()
    for index, layer in enumerate(cache.layers[:2]):
        fewer.update(layer.keys, layer.values, index)
    refused(model, fewer, model, PROMPT, r"differ in which layers keep K and V: \[2\]")
    narrow = transformers.DynamicCache()
    for index, layer in enumerate(cache.layers):
        narrow.update(layer.keys[:, :1], layer.values[:, :1], index)
    refused(model, narrow, model, PROMPT, "layer 0 of the cache is .*kv_heads=1")


def test_too_few_tokens_of_a_sliding_layer_are_refused() -> None:
    model = tiny("mistral")
    cache, _ = prefilled(model, PROMPT)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
    refused(model, cache, model, PROMPT, "token_start=145")


def test_lossy_caches_only_if_asked_for() -> None:
    model = tiny("llama", "bfloat16")
    cache, _ = prefilled(model, PROMPT)
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model) as receiver:
        sending = pool.submit(LynxCache.push, cache, receiver.url, model, PROMPT, policy=Policy.named("int8"))
        with pytest.raises(IdentityError, match="lossy"):
            receiver.take(timeout=60)
        with pytest.raises(RejectedError, match="lossy"):
            sending.result()


def test_a_receiver_goes_on_after_a_refusal() -> None:
    model = tiny("llama")
    cache, _ = prefilled(model, PROMPT)
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model) as receiver:
        with pytest.raises(RejectedError, match="revision"):
            LynxCache.push(cache, receiver.url, tiny("llama", seed=1), PROMPT)
        sending = pool.submit(LynxCache.push, cache, receiver.url, model, PROMPT)
        with pytest.raises(IdentityError):
            receiver.take(timeout=60)
        assert_same(LynxCache.pull(receiver, model, PROMPT, timeout=60), cache)
        sending.result()
        with pytest.raises(DeadlineError, match="not done within"):
            receiver.take(timeout=0.01)


def test_a_peer_that_dies_leaves_an_error_and_no_cache() -> None:
    model = tiny("llama", "bfloat16")
    cache, _ = prefilled(model, PROMPT)
    with LynxCache.listen(URL, model) as receiver:
        described = cache_of(cache, make_identity(model), request_id=prompt_id(PROMPT[0].tolist()))
        with blocking.connect(receiver.url) as sender:
            transfer = sender.open(described.manifest)
            transfer.write(0, described.arrays[0, "key"], described.arrays[0, "value"])
            incoming = receiver.take(timeout=60)  # it leaves with two layers unsent
        with pytest.raises((TransferCancelledError, ConnectionClosedError)):
            LynxCache.pull(incoming, model, PROMPT, timeout=60)


def test_a_push_that_takes_too_long_ends() -> None:
    model = tiny("llama")
    cache, _ = prefilled(model, PROMPT)
    with LynxCache.listen(URL, model) as receiver, pytest.raises(DeadlineError, match=r"not done within 0\.3 s"):
        LynxCache.push(cache, receiver.url, model, PROMPT, timeout=0.3, link=TokenBucket(1e4))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    model = tiny("gemma3")
    cache, _ = prefilled(model, PROMPT)
    seen: list[tuple[int, int]] = []
    path = LynxCache.save(cache, tmp_path / "a.safetensors", model, PROMPT, on_progress=lambda *s: seen.append(s))
    assert len(seen) == 6
    assert seen[-1][0] == seen[-1][1] == load_cache(path).manifest.nbytes
    LynxCache.load(path, model, on_progress=lambda *s: seen.append(s))
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == 12
    with pytest.raises(IdentityError, match="another prompt"):
        LynxCache.load(path, model, prompt(150, seed=9))
    with pytest.raises(IdentityError, match="revision"):
        LynxCache.load(path, tiny("gemma3", seed=1), PROMPT)
    with pytest.raises(IdentityError, match="holds float32"):
        LynxCache.load(path, tiny("gemma3", "float16"), PROMPT, identity=load_cache(path).manifest.identity)
    with pytest.raises(SpecError, match="holds 150 tokens, and 149 were given"):
        LynxCache.save(cache, tmp_path / "b.safetensors", model, PROMPT[:, 1:])
    LynxCache.save(cache, tmp_path / "c.safetensors", model)
    with pytest.raises(IdentityError, match="does not say of which prompt"):
        LynxCache.load(tmp_path / "c.safetensors", model, PROMPT)
    with pytest.raises(CacheFileError, match="exists"):
        LynxCache.save(cache, path, model)


def test_another_dtype_must_be_named(tmp_path: Path) -> None:
    """A cache of bfloat16 words, computed on in float32: each value is exactly what was sent."""
    model, half = tiny("llama"), tiny("llama", "bfloat16")
    cache, _ = prefilled(half, PROMPT)
    path = LynxCache.save(cache, tmp_path / "a.safetensors", half, PROMPT, identity=IDENTITY)
    with pytest.raises(IdentityError, match="holds bfloat16"):
        LynxCache.load(path, model, PROMPT, identity=IDENTITY)
    loaded = LynxCache.load(path, model, PROMPT, dtype="bfloat16", identity=IDENTITY)
    for mine, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert mine.keys.dtype == torch.float32
        assert torch.equal(mine.keys, theirs.keys.float())


def test_what_cannot_travel_is_named() -> None:
    model = tiny("llama")
    batch = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(PROMPT.repeat(2, 1), past_key_values=batch)
    with pytest.raises(SpecError, match=r"batch of 2 sequences.*batch_select_indices"):
        cache_of(batch, IDENTITY)
    for row in range(2):  # what the error advises
        one = copy.deepcopy(batch)
        one.batch_select_indices(torch.tensor([row]))
        assert cache_of(one, IDENTITY).manifest.prompt_tokens == 150
    with pytest.raises(SpecError, match="DynamicCache"):
        cache_of({"keys": 1}, IDENTITY)
    with pytest.raises(SpecError, match="dtype"):
        cache_of(random_dynamic(torch.float64), IDENTITY)
    with pytest.raises(SpecError, match="one dtype"):
        cache_of([], IDENTITY)
    with pytest.raises(SpecError, match="no tokens"):
        cache_of(transformers.DynamicCache(config=model.config), IDENTITY)
    with pytest.raises(SpecError, match="not StaticCache"):
        cache_of(transformers.StaticCache(config=model.config, max_cache_len=8), IDENTITY)
    with pytest.raises(SpecError, match="token ids of one prompt"):
        LynxCache.save(batch, "x", model, PROMPT.repeat(2, 1))
    uneven = random_dynamic()
    short = uneven.layers[0]
    short.keys, short.values = short.keys[:, :, 1:], short.values[:, :, 1:]
    with pytest.raises(SpecError, match="different numbers of tokens"):
        cache_of(uneven, IDENTITY)


def test_words_are_views() -> None:
    cache = random_dynamic()
    words = cache_of(cache, IDENTITY).arrays[0, "key"]
    assert words.ctypes.data == cache.layers[0].keys.data_ptr()
    model = tiny("gemma3")
    held = WordCache(model.config, 200, "float32", windows=True)
    with torch.inference_mode():
        model(PROMPT, past_key_values=held)
    assert cache_of(held, IDENTITY).arrays[0, "key"].shape == (1, 7, 16)
    assert cache_of(held, IDENTITY).arrays[1, "key"].shape == (1, 150, 16)


def test_a_file_of_torch_is_sent(tmp_path: Path) -> None:
    cache = random_dynamic()
    torch.save(cache, tmp_path / "one.pt")
    code, _, err = invoke("send", str(tmp_path / "one.pt"), "tcp://127.0.0.1:9")
    assert (code, "give --model" in err) == (1, True)
    with receiving("-o", str(tmp_path / "out")) as (receiver, url):
        code, _, err = invoke("send", str(tmp_path / "one.pt"), url, "--model", "test/model", "-q")
        assert code == 0, err
        receiver.communicate(timeout=60)
    assert_same(dynamic_of(load_cache(tmp_path / "out" / "one.safetensors")), cache)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_files_of_torch_with_sliding_and_without_layers(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    cache, _ = prefilled(model, PROMPT)
    torch.save(cache, tmp_path / "one.pt")
    assert_same_after(model, dynamic_of(load_dynamic(tmp_path / "one.pt", IDENTITY), model.config), cache)


def test_a_saved_cache_goes_through_send_and_recv(tmp_path: Path) -> None:
    """float32 too, whose policy is another."""
    for dtype in ("float32", "bfloat16"):
        model = tiny("gemma3", dtype)
        cache, first = prefilled(model, PROMPT)
        path = LynxCache.save(cache, tmp_path / f"{dtype}.safetensors", model, PROMPT, first_token=first)
        with receiving("-o", str(tmp_path / "out" / dtype)) as (receiver, url):
            code, _, err = invoke("send", str(path), url, "-q")
            assert code == 0, err
            receiver.communicate(timeout=60)
        (received,) = (tmp_path / "out" / dtype).iterdir()
        arrived = LynxCache.load(received, model, PROMPT)
        assert arrived.first_token == first
        assert_same_after(model, arrived, cache)


def test_legacy_tuples_are_read(tmp_path: Path) -> None:
    cache = random_dynamic()
    torch.save([(layer.keys, layer.values) for layer in cache.layers], tmp_path / "one.pt")
    assert_same(dynamic_of(load_dynamic(tmp_path / "one.pt", IDENTITY)), cache)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("/tmp/lynxproto-bomb").touch, ())


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save(Bomb(), tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "text.pt").write_text("no cache")
    for name in ("bomb", "plain", "text", "absent"):
        with pytest.raises(CacheFileError, match=name):
            load_dynamic(tmp_path / f"{name}.pt", IDENTITY)
    assert not Path("/tmp/lynxproto-bomb").exists()
