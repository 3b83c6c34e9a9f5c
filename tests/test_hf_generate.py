"""generate() on arriving caches: the tokens of model.generate on the exact cache, whatever kind of cache it is."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gate import ResidualGate
from test_serve import SECRET, serving
from tinymodels import KINDS, prefilled, prompt, tiny, torch, transformers

from lynxproto import blocking
from lynxproto.config import Config
from lynxproto.errors import (
    ConfigError,
    ConnectionClosedError,
    IdentityError,
    LocalError,
    SpecError,
    SpeculationError,
    TransferCancelledError,
)
from lynxproto.integrations.hf import CacheReceiver, LynxCache, generate, make_identity
from lynxproto.integrations.hf.dynamic import cache_of
from lynxproto.integrations.hf.model import prompt_id
from lynxproto.policy import Policy
from lynxproto.speculation import Event, Provisional, Report, Verified
from lynxproto.transports import TokenBucket

URL = "tcp://127.0.0.1:0"
IDS = prompt(150)
#: A coarse anchor, so that drafts are wrong now and then.
COARSE = Policy(body={"id": "bitplane", "planes": [9, 7]}, sinks=0, recent=0)
COARSE_FLOATS = Policy(body={"id": "bitplane", "planes": [9, 23]}, sinks=0, recent=0)


def coarse(model: Any) -> Policy:
    return COARSE_FLOATS if model.dtype == torch.float32 else COARSE


@contextmanager
def arriving(
    model: Any, cache: Any, ids: Any, *, room: int = 1024, link: Any = None, **options: Any
) -> Iterator[CacheReceiver]:
    """A receiver that the cache of ``ids`` is pushed to, by another thread."""
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model, room=room) as receiver:
        sending = pool.submit(
            LynxCache.push, cache, receiver.url, model, ids, policy=coarse(model), link=link, **options
        )
        yield receiver
        sending.result()


class Drafts:
    """Opens the link for residuals after ``count`` drafts; remembers all events."""

    def __init__(self, count: int) -> None:
        self.link = ResidualGate()
        self.events: list[Event] = []
        self._left = count

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._left -= isinstance(event, Provisional)
        if not self._left:
            self.link.open()


def reference(model: Any, cache: Any, ids: Any, first: int | None = None, **arguments: Any) -> Any:
    """model.generate on the exact cache; with ``first`` on a cache of the whole prompt."""
    if first is not None:
        ids = torch.cat([ids, torch.tensor([[first]])], dim=-1)
        arguments["max_new_tokens"] -= 1
    return model.generate(ids, past_key_values=copy.deepcopy(cache), **{"do_sample": False, **arguments})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_generate(kind: str, dtype: str) -> None:
    """With prefill's first token, then with one, two and seven tokens after the cache."""
    model = tiny(kind, dtype)
    reports: list[Report] = []
    for cached in (150, 149, 148, 143):
        cache, first = prefilled(model, IDS[:, :cached])
        whole = cached == 150
        expected = reference(model, cache, IDS, first if whole else None, max_new_tokens=30)
        drafts = Drafts(12)
        with arriving(model, cache, IDS[:, :cached], first_token=first, link=drafts.link) as receiver:
            got = generate(
                model, IDS, receiver, max_new_tokens=30, max_draft=12, on_event=drafts, on_report=reports.append
            )
        assert got.tolist() == expected.tolist()
        assert got.dtype == expected.dtype
    assert all(report.drafted == 12 for report in reports)
    assert all(set(report.mismatches) <= set(report.redecided) for report in reports)


def test_drafts_are_wrong_now_and_then_and_nothing_shows() -> None:
    model = tiny("gemma3", "bfloat16")
    wrong = 0
    for seed in range(8):
        ids = prompt(90, seed=seed)
        cache, first = prefilled(model, ids)
        seen = Drafts(16)
        with arriving(model, cache, ids, first_token=first, link=seen.link) as receiver:
            got = generate(model, ids, receiver, max_new_tokens=24, max_draft=16, on_event=seen)
        assert got.tolist() == reference(model, cache, ids, first, max_new_tokens=24).tolist()
        drafts = [event.token for event in seen.events if isinstance(event, Provisional)]
        tokens = [token for event in seen.events if isinstance(event, Verified) for token in event.tokens]
        assert tokens == got[0, 90:].tolist()
        assert len(drafts) == 16
        wrong += drafts != tokens[1:17]
    assert wrong


@pytest.mark.parametrize("noise", [math.inf, 0.5])
def test_all_or_most_tokens_step_by_step(noise: float) -> None:
    model = tiny("gemma3", "bfloat16")
    cache, first = prefilled(model, IDS)
    reports: list[Report] = []
    drafts = Drafts(10)
    with arriving(model, cache, IDS, first_token=first, link=drafts.link) as receiver:
        got = generate(
            model, IDS, receiver, max_new_tokens=20, max_draft=10, noise=noise, on_event=drafts,
            on_report=reports.append,
        )  # fmt: skip
    assert got.tolist() == reference(model, cache, IDS, first, max_new_tokens=20).tolist()
    (report,) = reports
    assert (report.batches == 0) == (noise == math.inf)
    assert report.steps == 19 or noise != math.inf
    assert report.drafted == 10
    assert report.accepted > 0


def test_arguments_of_generate() -> None:
    model = tiny("llama", "bfloat16")
    cache, _ = prefilled(model, IDS[:, :149])

    class Short(transformers.StoppingCriteria):  # type: ignore[misc]  # transformers is not followed
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.tensor([input_ids.shape[1] >= 159])

    free = reference(model, cache, IDS, max_new_tokens=25)[0, 150:].tolist()
    for arguments in (
        {"max_new_tokens": 1},
        {"max_length": 160},
        {"max_new_tokens": 25, "eos_token_id": free[6], "pad_token_id": 0},
        {"max_new_tokens": 25, "eos_token_id": [free[0], free[9]], "pad_token_id": 0},
        {"max_new_tokens": 25, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 25, "bad_words_ids": [[free[0]], [free[3]]]},
        {"max_new_tokens": 25, "min_new_tokens": 12, "eos_token_id": free[2], "pad_token_id": 0},
        {"max_new_tokens": 25, "stopping_criteria": [Short()]},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=9, suppress_tokens=[free[1]])},
        {"max_new_tokens": 25, "attention_mask": torch.ones_like(IDS), "temperature": 1.0},
        {"max_new_tokens": 25, "prefix_allowed_tokens_fn": lambda batch, ids: [5, 6, int(ids[-1]) // 2]},
    ):
        if isinstance(arguments.get("stopping_criteria"), list):
            arguments["stopping_criteria"] = transformers.StoppingCriteriaList(arguments["stopping_criteria"])
        expected = reference(model, cache, IDS, **arguments)
        with arriving(model, cache, IDS[:, :149]) as receiver:
            got = generate(model, IDS, receiver, **{"do_sample": False, **arguments})
        assert got.tolist() == expected.tolist(), arguments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 0},
        {"temperature": 0.7},
        {"top_k": 5, "top_p": 0.8},
        {"top_p": 0.9, "top_k": 0, "repetition_penalty": 1.3},
    ],
)
def test_seeded_sampling_draws_what_generate_draws(filters: dict[str, Any], dtype: str) -> None:
    """And leaves torch's generator where generate leaves it."""
    model = tiny("llama", dtype)
    for seed, cached in ((1, 149), (2, 143), (3, 150)):
        cache, first = prefilled(model, IDS[:, :cached])
        arguments = {"max_new_tokens": 30, "do_sample": True, **filters}
        torch.manual_seed(seed)
        expected = reference(model, cache, IDS, first if cached == 150 else None, **arguments)
        after = torch.rand(3)
        drafts = Drafts(12)
        with arriving(model, cache, IDS[:, :cached], first_token=first, link=drafts.link) as receiver:
            torch.manual_seed(seed)
            got = generate(model, IDS, receiver, max_draft=12, on_event=drafts, **arguments)
        assert got.tolist() == expected.tolist()
        assert torch.equal(torch.rand(3), after)
    assert len(set(got[0, 150:].tolist())) > 5


def test_stop_strings(tmp_path: Path) -> None:
    from test_transformers_docs import TEXT, save_model

    model, tokenizer = save_model(tmp_path)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    cache, first = prefilled(model, ids)
    free = reference(model, cache, ids, first, max_new_tokens=25)
    wanted = tokenizer.decode(free[0, ids.shape[1] + 9 : ids.shape[1] + 12])
    settings = {"max_new_tokens": 25, "stop_strings": [wanted], "tokenizer": tokenizer}
    expected = reference(model, cache, ids, first, **settings)
    with arriving(model, cache, ids, first_token=first) as receiver:
        got = generate(model, ids, receiver, **settings)
    assert got.tolist() == expected.tolist()
    assert got.shape[1] == ids.shape[1] + 12 < free.shape[1]
    with pytest.raises(ConfigError, match="need the tokenizer"):
        generate(model, ids, "tcp://127.0.0.1:1", stop_strings=["x"])


def test_streamers_and_dictionaries() -> None:
    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]  # not followed
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: Any) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.got.append("end")

    model = tiny("gemma3")
    cache, _ = prefilled(model, IDS[:, :149])
    ours, theirs = Streamer(), Streamer()
    settings = {"max_new_tokens": 15, "return_dict_in_generate": True}
    expected = reference(model, cache, IDS, streamer=theirs, **settings)
    with arriving(model, cache, IDS[:, :149]) as receiver:
        got = generate(model, IDS, receiver, streamer=ours, **settings)
    assert ours.got == theirs.got
    assert got.sequences.tolist() == expected.sequences.tolist()
    for mine, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert mine.get_seq_length() == other.get_seq_length()
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():  # and it goes on from there
        more = [model(torch.tensor([[7]]), past_key_values=x.past_key_values).logits for x in (got, expected)]
    torch.testing.assert_close(*more, atol=1e-3, rtol=1e-3)


def test_prefill_and_generate_meet() -> None:
    """Nothing but the prompt on either side; layers are sent as they are computed."""
    model = tiny("gemma4", "bfloat16")
    expected = model.generate(IDS, max_new_tokens=20, do_sample=False)
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model) as receiver:
        sending = pool.submit(LynxCache.prefill, model, IDS, receiver.url, policy=COARSE)
        assert generate(model, IDS, receiver, max_new_tokens=20).tolist() == expected.tolist()
        sending.result()


def test_from_a_store(tmp_path: Path) -> None:
    model, session = tiny("gemma3", "bfloat16"), {"config": Config(secret=SECRET.encode())}
    cache, first = prefilled(model, IDS)
    with serving(tmp_path / "store") as (_, url):
        LynxCache.push(cache, url, model, IDS, first_token=first, **session)
        got = generate(model, IDS, url, session=session, max_new_tokens=12)
        assert got.tolist() == reference(model, cache, IDS, first, max_new_tokens=12).tolist()
        longer = prompt(155)
        longer[:, :150] = IDS
        got = generate(model, longer, url, cached_tokens=150, session=session, max_new_tokens=12)
        assert got.tolist() == reference(model, cache, longer, max_new_tokens=12).tolist()


def test_a_cache_of_the_whole_prompt_without_a_first_token() -> None:
    model = tiny("llama", "bfloat16")
    cache, _ = prefilled(model, IDS)
    shorter = copy.deepcopy(cache)
    shorter.crop(-1)
    with arriving(model, cache, IDS) as receiver:
        got = generate(model, IDS, receiver, max_new_tokens=12)
    assert got.tolist() == reference(model, shorter, IDS, max_new_tokens=12).tolist()
    sliding = tiny("mistral")
    cache, _ = prefilled(sliding, IDS)
    with (
        pytest.raises(SpeculationError, match="holds tokens from 144 on, 149 tokens need 143"),
        arriving(sliding, cache, IDS) as receiver,
    ):
        generate(sliding, IDS, receiver, max_new_tokens=12)


def test_prefills_token_may_end_it() -> None:
    model = tiny("llama", "bfloat16")
    cache, first = prefilled(model, IDS)
    with arriving(model, cache, IDS, first_token=first, link=TokenBucket(4e5)) as receiver:
        got = generate(model, IDS, receiver, max_new_tokens=12, eos_token_id=first, pad_token_id=0)
    assert got.tolist() == [[*IDS[0].tolist(), first]]


def test_little_room_means_fewer_drafts_and_the_same_tokens() -> None:
    model = tiny("llama", "bfloat16")
    cache, first = prefilled(model, IDS)
    for room, drafted in ((0, 0), (4, 3)):
        reports: list[Report] = []
        drafts = Drafts(drafted)
        if not drafted:
            drafts.link.open()
        with arriving(model, cache, IDS, first_token=first, room=room, link=drafts.link) as receiver:
            got = generate(model, IDS, receiver, max_new_tokens=300, on_event=drafts, on_report=reports.append)
        assert got.tolist() == reference(model, cache, IDS, first, max_new_tokens=300).tolist()
        assert reports[0].drafted == drafted


def test_words_of_another_type_than_the_models() -> None:
    """A model in float32 on words of bfloat16: the reference is a cache that rounds what enters, too."""
    from lynxproto.integrations.hf import WordCache

    model = tiny("gemma3")
    exact = WordCache(model.config, 300, "bfloat16", windows=True)
    with torch.inference_mode():
        first = int(model(IDS, past_key_values=exact).logits[0, -1].argmax())
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model, dtype="bfloat16") as receiver:
        sending = pool.submit(LynxCache.push, exact, receiver.url, model, IDS, first_token=first, policy=COARSE)
        got = generate(model, IDS, receiver, dtype="bfloat16", max_new_tokens=20)
        sending.result()
    ids = torch.cat([IDS, torch.tensor([[first]])], dim=-1)
    assert got.tolist() == model.generate(ids, past_key_values=exact, max_new_tokens=19, do_sample=False).tolist()


# --- what is refused, and what fails


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_beams": 3}, "3 beams"),
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences is 2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper is not supported"),
        ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"output_scores": True, "return_dict_in_generate": True}, "does not support output_scores"),
        ({"attention_mask": torch.tensor([[0] + [1] * 149])}, "without padding"),
        ({"token_type_ids": torch.zeros_like(IDS)}, "token_type_ids"),
        ({"past_key_values": transformers.DynamicCache()}, "leave past_key_values out"),
        ({"cached_tokens": 151}, "cached_tokens is 151"),
    ],
)
def test_what_is_not_supported_is_named_before_a_cache_is_taken(arguments: dict[str, Any], match: str) -> None:
    kind = "gemma3" if "token_type_ids" in arguments else "llama"
    model = tiny(kind, "bfloat16")
    with LynxCache.listen(URL, model) as receiver, pytest.raises((ConfigError, ValueError), match=match):
        generate(model, IDS, receiver, max_new_tokens=4, **arguments)


def test_batches_and_event_loops_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(SpecError, match="token ids of one prompt"):
        generate(model, IDS.repeat(2, 1), "tcp://127.0.0.1:1")

    async def run() -> None:
        with pytest.raises(LocalError, match="to_thread"):
            generate(model, IDS, "tcp://127.0.0.1:1", max_new_tokens=3)

    asyncio.run(run())


def test_the_cache_of_another_prompt_is_not_used() -> None:
    model = tiny("llama", "bfloat16")
    other = prompt(150, seed=5)
    cache, first = prefilled(model, other)
    with (
        pytest.raises(TransferCancelledError),  # what the sender hears
        arriving(model, cache, other, first_token=first) as receiver,
        pytest.raises(IdentityError, match="another prompt"),
    ):
        generate(model, IDS, receiver, max_new_tokens=4)


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_a_peer_that_dies_ends_it_without_tokens(layers: int) -> None:
    """It leaves before layer 0, in the middle, or when all anchors are there and drafts are waiting."""
    model = tiny("llama", "bfloat16")
    cache, first = prefilled(model, IDS)
    told: list[Event] = []
    described = cache_of(cache, make_identity(model), request_id=prompt_id(IDS[0].tolist()), first_token=first)
    identity = described.manifest.identity
    with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model, identity=identity) as receiver:
        with blocking.connect(receiver.url, link=ResidualGate()) as sender:
            transfer = sender.open(described.manifest, COARSE)
            transfer.result(first)
            for layer in range(layers):
                transfer.write(layer, described.arrays[layer, "key"], described.arrays[layer, "value"])
            incoming = receiver.take(timeout=60)
            deciding = pool.submit(
                generate, model, IDS, incoming, identity=identity, max_new_tokens=9, on_event=told.append
            )
            _wait_for(lambda: len(told) == (9 if layers == 3 else 1))  # prefill's own token, and 8 drafts
        with pytest.raises((TransferCancelledError, ConnectionClosedError)):
            deciding.result(timeout=60)
    assert [event for event in told if isinstance(event, Verified)] == [Verified(1, (first,))]


def _wait_for(condition: Callable[[], bool]) -> None:
    import time

    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.model
def test_the_real_model_gives_the_tokens_of_generate() -> None:
    pytest.importorskip("gguf")
    from lynxproto.demo.model import load_model, load_tokenizer, prepare_model, prose

    folder, _ = prepare_model()
    model, tokenizer = load_model(folder).to(torch.bfloat16), load_tokenizer(folder)
    ids = torch.tensor([prose(tokenizer, 300)])
    for cached in (300, 296):
        cache, first = prefilled(model, ids[:, :cached])
        reports: list[Report] = []
        drafts = Drafts(16)
        with ThreadPoolExecutor(1) as pool, LynxCache.listen(URL, model) as receiver:
            sending = pool.submit(
                LynxCache.push, cache, receiver.url, model, ids[:, :cached], first_token=first, link=drafts.link
            )
            got = generate(
                model, ids, receiver, max_new_tokens=24, max_draft=16, do_sample=False, on_event=drafts,
                on_report=reports.append,
            )  # fmt: skip
            sending.result()
        expected = reference(model, cache, ids, first if cached == 300 else None, max_new_tokens=24)
        assert got.tolist() == expected.tolist()
        assert reports[0].accepted > 0
