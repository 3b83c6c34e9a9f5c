"""The vLLM connector between two engines of synthetic pages, over TCP: all words arrive, or the engine is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("prometheus_client")

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm_engine import MODEL, Engine, LynxConnector, Request, until

from lynxproto.errors import ConfigError, SpecError
from lynxproto.integrations.vllm.settings import Settings


def hand_over(prefill: Engine, decode: Engine, tokens: int, *chunks: int, computed: int = 0, **more: Any) -> Request:
    """Prefill on one side, load on the other; returns the decode side's request, whose rows were compared."""
    sent = Request(tokens, {"do_remote_decode": True, "remote_urls": decode.urls})
    params = prefill.prefill(sent, *chunks)
    assert params is not None
    assert params["remote_num_tokens"] == tokens
    loaded = Request(tokens, params | more)
    count = decode.load(loaded, computed)
    assert decode.wait(loaded)
    stop = computed + count
    for mine, theirs in zip(decode.rows(loaded, computed, stop), prefill.rows(sent, computed, stop), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    decode.finish(loaded)
    return loaded


@pytest.mark.parametrize("policy", ["exact", "raw", "zstd"])
@pytest.mark.parametrize("tokens", [2, 32, 333])
def test_words_arrive(policy: str, tokens: int) -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2, policy=policy) as prefill:
        hand_over(prefill, decode, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: Any) -> None:
    with Engine("kv_consumer", seed=1, dtype=dtype) as decode, Engine("kv_producer", seed=2, dtype=dtype) as prefill:
        hand_over(prefill, decode, 100)


@pytest.mark.parametrize(("ranks", "others"), [(1, 2), (2, 1), (2, 2), (4, 2), (1, 4), (4, 1)])
def test_tensor_parallel_sizes_that_differ(ranks: int, others: int) -> None:
    """Two KV heads: of four ranks, two each have the same one."""
    with Engine("kv_consumer", ranks=others, seed=1) as decode, Engine("kv_producer", ranks=ranks, seed=2) as prefill:
        loaded = hand_over(prefill, decode, 150)
        if others == 4:  # copies of a head agree
            name = next(iter(decode.caches[0]))
            used = decode._tables[loaded.request_id][:4]
            for one, two in ((0, 1), (2, 3)):
                assert torch.equal(decode.caches[one][name][used], decode.caches[two][name][used])


@pytest.mark.parametrize(("block", "other", "page"), [(32, 128, 128), (128, 32, 32), (128, 64, 32), (64, 96, 32)])
def test_block_sizes_that_differ(block: int, other: int, page: int) -> None:
    """``page``: the kernels may divide the decode side's blocks again."""
    with Engine("kv_consumer", block=other, page=page, seed=1) as decode, Engine("kv_producer", block=block) as prefill:
        hand_over(prefill, decode, 333)


def test_packings_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import cpu_attn

    with Engine("kv_consumer", seed=1) as decode:
        monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_: "amx")
        with Engine("kv_producer", seed=2) as prefill:
            assert not np.array_equal(prefill.packing.key, decode.packing.key)
            hand_over(prefill, decode, 100)


def test_a_chunked_prefill_is_sent_in_parts() -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        hand_over(prefill, decode, 333, 100, 20, 150, 63)


def test_tokens_that_are_cached_stay_as_they_are() -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        sent = Request(200, {"do_remote_decode": True, "remote_urls": decode.urls})
        loaded = Request(200, prefill.prefill(sent))
        decode._tables[loaded.request_id] = table = list(range(7))
        before = decode.rows(loaded, 0, 64)
        assert decode.load(loaded, 64) == 136
        assert decode.wait(loaded)
        for mine, old in zip(decode.rows(loaded, 0, 64), before, strict=True):
            np.testing.assert_array_equal(mine, old)
        for mine, theirs in zip(decode.rows(loaded, 64, 200), prefill.rows(sent, 64, 200), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert table == list(range(7))


def test_whole_blocks() -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        for tokens, expected in ((100, 96), (97, 64), (33, 0)):
            request = Request(tokens, {"do_remote_prefill": True, "transfer_key": "k" * 16, "whole_blocks": True})
            assert decode.scheduler.get_num_new_matched_tokens(request, 0) == (expected, expected > 0)
        hand_over(prefill, decode, 100, whole_blocks=True)


def test_the_request_may_wait_before_anything_is_sent() -> None:
    """A proxy may give both sides the key at once: then the cache goes into blocks while it is computed."""
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        key = {"transfer_key": "0123456789abcdef"}
        loaded = Request(150, {"do_remote_prefill": True} | key)
        assert decode.load(loaded) == 150
        sent = Request(150, {"do_remote_decode": True, "remote_urls": decode.urls} | key)
        prefill.prefill(sent)
        assert decode.wait(loaded)
        for mine, theirs in zip(decode.rows(loaded, 0, 150), prefill.rows(sent, 0, 150), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_requests_without_parameters_are_none_of_our_business() -> None:
    with Engine("kv_both", seed=1) as engine:
        request = Request(100)
        assert engine.load(request) == 0
        assert engine.prefill(request) is None
        assert engine.connectors[0].get_kv_connector_stats() is None


def test_it_loads_once() -> None:
    """After a preemption, or a failed load, vLLM asks again: the prompt is computed then."""
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        loaded = hand_over(prefill, decode, 64)
        decode.scheduler._scheduler._asked[loaded.request_id] = "loaded"
        assert decode.scheduler.get_num_new_matched_tokens(loaded, 0) == (0, False)


# --- what does not fit is refused, and the engine is told at once


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"model": "test/another"}, "model is 'test/another'"),
        ({"revision": "r2"}, "revision is 'r2'"),
        ({"config": MODEL | {"rope_theta": 5e5}}, "rope_hash is"),
        ({"dtype": torch.float16}, "dtype is float16"),
        ({"dim": 32}, "holds .* of 32 and 32"),
        ({"layers": 3}, "no layer 2"),
        ({"kv_heads": 4}, "heads range"),
    ],
)
def test_another_model_is_refused(other: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2, **other) as prefill:
        before = {name: cache.clone() for name, cache in decode.caches[0].items()}
        loaded = Request(100, prefill.prefill(Request(100, {"do_remote_decode": True, "remote_urls": decode.urls})))
        decode.load(loaded)
        assert not decode.wait(loaded)
        assert "was not received: not a cache for this worker" in caplog.text
        assert re.search(reason, caplog.text)
        for name, cache in decode.caches[0].items():
            assert torch.equal(cache, before[name])
        stats = decode.connectors[0].get_kv_connector_stats()
        assert stats.data["failed_receives"] == 1
        assert stats.data["receive_seconds"] == []


def test_fewer_layers_never_complete() -> None:
    with Engine("kv_consumer", seed=1, timeout=0.3) as decode, Engine("kv_producer", layers=1) as prefill:
        loaded = Request(64, prefill.prefill(Request(64, {"do_remote_decode": True, "remote_urls": decode.urls})))
        decode.load(loaded)
        assert not decode.wait(loaded)


def test_another_prompt_gets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with Engine("kv_consumer", seed=1, idle=0.3) as decode, Engine("kv_producer", seed=2) as prefill:
        params = prefill.prefill(Request(64, {"do_remote_decode": True, "remote_urls": decode.urls}))
        loaded = Request(list(range(1000, 1064)), params)
        decode.load(loaded)
        assert not decode.wait(loaded)
        assert "all of it missing" in caplog.text


def test_a_forward_that_fails_sends_nothing() -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        sent = Request(64, {"do_remote_decode": True, "remote_urls": decode.urls})
        loaded = Request(64, prefill.prefill(sent, layers=1))
        decode.load(loaded)
        assert not decode.wait(loaded)


def test_a_prefill_side_that_dies_fails_the_load() -> None:
    with Engine("kv_consumer", seed=1) as decode:
        prefill = Engine("kv_producer", seed=2)
        key = {"transfer_key": "0123456789abcdef"}
        loaded = Request(150, {"do_remote_prefill": True} | key)
        decode.load(loaded)
        sent = Request(150, {"do_remote_decode": True, "remote_urls": decode.urls} | key)
        prefill._allocate(sent, 0)
        prefill.forward(sent, 0, 150, layers=1, dies=True)
        inbox = decode.connectors[0]._worker._inbox
        assert until(lambda: any(piece.exact for pieces in inbox._pieces.values() for piece in pieces))
        prefill.close()
        assert not decode.wait(loaded)


_HALF_A_PREFILL = """
import sys
from vllm_engine import Engine, Request
prefill = Engine("kv_producer", seed=2)
request = Request(150, {"do_remote_decode": True, "remote_urls": [sys.argv[1]], "transfer_key": "0123456789abcdef"})
prefill._allocate(request, 0)
prefill.forward(request, 0, 150, layers=1, dies=True)
sys.stdin.read()
"""


def test_a_prefill_process_that_is_killed_fails_the_load() -> None:
    with Engine("kv_consumer", seed=1, peer_timeout=1) as decode:
        loaded = Request(150, {"do_remote_prefill": True, "transfer_key": "0123456789abcdef"})
        decode.load(loaded)
        command = [sys.executable, "-c", _HALF_A_PREFILL, decode.urls[0]]
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parent) as prefill:
            inbox = decode.connectors[0]._worker._inbox
            assert until(lambda: any(piece.exact for pieces in inbox._pieces.values() for piece in pieces), 60)
            prefill.kill()
        assert not decode.wait(loaded)


def test_a_chunk_that_never_comes_fails_the_load(caplog: pytest.LogCaptureFixture) -> None:
    with Engine("kv_consumer", seed=1, idle=0.3) as decode, Engine("kv_producer", seed=2) as prefill:
        key = {"transfer_key": "0123456789abcdef"}
        loaded = Request(150, {"do_remote_prefill": True} | key)
        decode.load(loaded)
        sent = Request(150, {"do_remote_decode": True, "remote_urls": decode.urls} | key)
        prefill._allocate(sent, 0)
        prefill.forward(sent, 0, 100)
        assert not decode.wait(loaded)
        assert "some of it missing" in caplog.text


def test_a_decode_side_that_is_not_there_is_a_failed_send() -> None:
    with Engine("kv_producer", seed=2, peer_timeout=0.5) as prefill:
        sent = Request(64, {"do_remote_decode": True, "remote_urls": ["tcp://127.0.0.1:9"]})
        assert prefill.prefill(sent) is not None
        prefill.connectors[0]._worker._outbox._threads.shutdown(wait=True)
        assert prefill.connectors[0].get_kv_connector_stats().data["failed_sends"] == 1


def test_a_decode_side_that_was_restarted_is_found_again() -> None:
    with Engine("kv_producer", seed=2, peer_timeout=2) as prefill:
        with Engine("kv_consumer", seed=1) as decode:
            url = decode.urls[0]
            hand_over(prefill, decode, 64)
        with Engine("kv_consumer", seed=3, listen=url) as decode:
            hand_over(prefill, decode, 64)


def test_an_aborted_request_is_let_go() -> None:
    with Engine("kv_consumer", seed=1) as decode:
        loaded = Request(64, {"do_remote_prefill": True, "transfer_key": "0123456789abcdef"})
        decode.load(loaded)
        decode.finish(loaded)
        assert not decode.wait(loaded)


def test_what_nobody_will_ask_for_is_dropped() -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        cached, aborted = (
            Request(64, prefill.prefill(Request(64, {"do_remote_decode": True, "remote_urls": decode.urls})))
            for _ in range(2)
        )
        prefill.connectors[0]._worker._outbox._threads.shutdown(wait=True)
        assert decode.load(cached, 64) == 0
        decode.finish(aborted)
        decode.step()
        worker = decode.connectors[0]._worker
        worker._mail.put(None)
        worker._courier.join()
        worker._mail.put(None)
        assert worker._inbox._pieces == {}
        assert worker._inbox._room == worker._settings.buffer_bytes


def test_buffers_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    with Engine("kv_consumer", seed=1, buffer_bytes=1000) as decode, Engine("kv_producer", seed=2) as prefill:
        loaded = Request(64, prefill.prefill(Request(64, {"do_remote_decode": True, "remote_urls": decode.urls})))
        decode.load(loaded)
        assert not decode.wait(loaded)
        assert "buffer_bytes" in caplog.text
    with Engine("kv_producer", seed=2, buffer_bytes=1000) as prefill:
        prefill.prefill(Request(64, {"do_remote_decode": True, "remote_urls": ["tcp://127.0.0.1:9"]}))
        assert prefill.connectors[0].get_kv_connector_stats().data["failed_sends"] == 1


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_decode": True},
        {"do_remote_decode": True, "remote_urls": 7},
        {"do_remote_decode": True, "remote_urls": ["tcp://127.0.0.1:9", 7]},
        {"do_remote_decode": True, "remote_urls": ["tcp://stranger:1"]},
        {"do_remote_decode": True, "remote_urls": ["tcp://127.0.0.1:9"], "transfer_key": "short"},
        {"do_remote_decode": True, "remote_urls": ["tcp://127.0.0.1:9"], "transfer_key": ["k" * 16]},
    ],
)
def test_parameters_of_a_bad_proxy_do_not_stop_the_engine(params: dict[str, Any]) -> None:
    with Engine("kv_producer", seed=2, peers=["tcp://127.0.0.1:9"]) as prefill:
        assert prefill.prefill(Request(64, params)) is None


@pytest.mark.parametrize("key", [None, 7, "short", "../../etc/passwd/and/so/on", "k" * 65])
def test_keys_of_a_bad_proxy_load_nothing(key: Any) -> None:
    with Engine("kv_consumer", seed=1) as decode:
        assert decode.load(Request(64, {"do_remote_prefill": True, "transfer_key": key})) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"polcy": "raw"}, "unknown polcy; known: "),
        ({"policy": "int4"}, "policy 'int4' is not one of exact, raw, zstd"),
        ({"timeout": "soon"}, "timeout cannot be 'soon'"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"listen": "tcp://host"}, "a URL with a port"),
    ],
)
def test_settings_are_checked(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine("kv_consumer", **extra)


def test_caches_that_cannot_be_sent() -> None:
    with pytest.raises(SpecError, match="a KV cache of torch"):
        Engine("kv_producer", dim=24, block=24, dtype=torch.float64)


def test_statistics_and_metrics() -> None:
    with Engine("kv_consumer", seed=1) as decode, Engine("kv_producer", seed=2) as prefill:
        hand_over(prefill, decode, 64)
        prefill.connectors[0]._worker._outbox._threads.shutdown(wait=True)
        received, sent = (e.connectors[0].get_kv_connector_stats() for e in (decode, prefill))
    size = 2 * 2 * 2 * 64 * 64 * 2  # layers, parts, heads, tokens, dim, bytes
    assert received.data["received_cache_bytes"] == sent.data["sent_cache_bytes"] == [size]
    assert received.data["received_bytes"] == sent.data["sent_bytes"]
    both = LynxConnector.build_kv_connector_stats(received.to_dict()).aggregate(sent)
    line = both.reduce()
    assert line["caches sent"] == line["caches received"] == 1
    assert not both.is_empty()
    both.reset()
    assert both.is_empty()
    assert both.reduce() == {"failed sends": 0, "failed receives": 0}

    registry = CollectorRegistry()
    kinds = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    metrics = LynxConnector.build_prom_metrics(None, kinds, ["model_name", "engine"], {0: ["m", "0"]})
    metrics.observe(received.to_dict(), 0)
    labels = {"model_name": "m", "engine": "0"}
    assert registry.get_sample_value("vllm:lynx_received_cache_bytes_total", labels) == size
    assert registry.get_sample_value("vllm:lynx_receive_seconds_count", labels) == 1
    assert registry.get_sample_value("vllm:lynx_failed_receives_total", labels) == 0


def test_latent_caches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm_engine

    def latent(self: Any, block_size: int, head_size: int) -> None:
        self.block_size, self.head_size, self.head_size_v, self.tokens_per_state = block_size, 2 * head_size, 0, 1

    monkeypatch.setattr(vllm_engine.AttentionSpec, "__init__", latent)
    with pytest.raises(SpecError, match="only K and V of the same size can"):
        Engine("kv_producer")


def test_groups_of_layers_are_refused() -> None:
    with Engine("kv_producer") as engine:
        groups = SimpleNamespace(kv_cache_groups=[None, None])
        with pytest.raises(ConfigError, match="has 2 groups"):
            LynxConnector(engine.scheduler._vllm_config, engine.scheduler._role, groups)


def test_the_page_names_every_setting_and_metric() -> None:
    page = (Path(__file__).parent.parent / "docs" / "embedding" / "vllm.md").read_text()
    settings = page[page.index("## Settings") : page.index("## When something fails")]
    assert {field.name for field in fields(Settings)} <= set(re.findall(r"`(\w+)`", settings))
    registry = CollectorRegistry()
    kinds = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    LynxConnector.build_prom_metrics(None, kinds, ["engine"], {0: ["0"]})
    for metric in registry.collect():
        name = metric.name if metric.type == "histogram" else f"{metric.name}_total"
        assert f"`{name}`" in page
    for config in re.findall(r"--kv-transfer-config '(\{.*?\})'", page, re.DOTALL):
        loaded = json.loads(config)
        assert loaded["kv_connector_module_path"] == "lynxproto.integrations.vllm"
        assert Settings.of(loaded.get("kv_connector_extra_config", {}))
