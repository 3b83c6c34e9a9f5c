"""The least of an engine that a connector needs, in place of vLLM: one scheduler, some workers, pages of random words.

It calls the connector as vLLM 0.32.0 does (`tests/vllm_stub` has the names it imports).
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "vllm_stub"))

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # the same

from lynxproto.integrations.vllm import LynxConnector  # needs the stub
from lynxproto.integrations.vllm.packing import cpu_packing  # the same
from lynxproto.integrations.vllm.pages import LayerPages  # the same
from lynxproto.integrations.vllm.settings import head_range  # the same

MODEL = {"hidden_size": 64, "rope_theta": 10000.0, "_name_or_path": "/anywhere"}
_ids = itertools.count()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Wait for what other threads do."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        pause.wait(0.002)
    return True


class AttentionSpec:
    """Of all layers."""

    def __init__(self, block_size: int, head_size: int) -> None:
        self.block_size, self.head_size, self.head_size_v = block_size, head_size, head_size
        self.tokens_per_state = 1


class Request:
    """As the scheduler keeps it."""

    def __init__(self, tokens: int | list[int], params: dict[str, Any] | None = None) -> None:
        self.request_id = f"request-{next(_ids)}"
        self.prompt_token_ids = list(range(7, 7 + tokens)) if isinstance(tokens, int) else tokens
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.kv_transfer_params = params
        self.lora_request = None
        self.mm_features: list[Any] = []


class Engine:
    """An instance with ``ranks`` workers."""

    def __init__(
        self,
        role: str,
        *,
        ranks: int = 1,
        kv_heads: int = 2,
        block: int = 32,
        page: int | None = None,
        blocks: int = 40,
        layers: int = 2,
        dim: int = 64,
        dtype: Any = torch.bfloat16,
        seed: int = 0,
        model: str = "test/model",
        revision: str = "r1",
        config: dict[str, Any] = MODEL,
        **extra: Any,
    ) -> None:
        self.layers, self.block, self.kv_heads, self.ranks = layers, block, kv_heads, ranks
        page = page or block
        spec = AttentionSpec(block, dim)
        groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
        rng = np.random.default_rng(seed)
        self.free = rng.permutation(blocks).tolist()
        if role != "kv_producer":
            extra = {"listen": "tcp://127.0.0.1:0"} | extra
        self.connectors = []
        self.caches: list[dict[str, Any]] = []
        for rank in range(-1, ranks):
            vllm_config = SimpleNamespace(
                kv_transfer_config=SimpleNamespace(
                    kv_connector_extra_config={"threads": 2} | extra,
                    kv_port=14579,
                    is_kv_producer=role != "kv_consumer",
                    is_kv_consumer=role != "kv_producer",
                ),
                model_config=SimpleNamespace(
                    model=model,
                    revision=revision,
                    hf_text_config=SimpleNamespace(to_dict=lambda: dict(config)),
                    quantization=None,
                    max_model_len=4096,
                    get_total_num_kv_heads=lambda: kv_heads,
                ),
                parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=ranks, decode_context_parallel_size=1),
                cache_config=SimpleNamespace(cache_dtype="auto"),
            )
            if rank < 0:
                self.scheduler = LynxConnector(vllm_config, KVConnectorRole.SCHEDULER, groups)
                continue
            heads = len(head_range(kv_heads, ranks, rank)[0])
            shape = (blocks * block // page, heads, page, 2 * dim)
            words = torch.from_numpy(rng.integers(0, 2, shape).astype(np.float32))  # finite, and not equal
            caches = {
                f"model.layers.{i}.self_attn.attn": ((words + i).to(dtype) * torch.randn(shape)).to(dtype)
                for i in range(layers)
            }
            worker = LynxConnector(vllm_config, KVConnectorRole.WORKER, groups)
            worker.register_kv_caches(caches)
            self.connectors.append(worker)
            self.caches.append(caches)
        self.packing = cpu_packing(dtype, page, dim)
        self._tables: dict[str, list[int]] = {}
        self._workers: Counter[str] = Counter()
        self.finished: set[str] = set()
        self.failed: set[str] = set()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        for connector in self.connectors:
            connector.shutdown()

    @property
    def urls(self) -> list[str]:
        return [connector._worker.url for connector in self.connectors]

    def rows(self, request: Request, start: int, stop: int) -> list[Any]:
        """Words of all heads, by layer and part: ``[kv_heads, tokens, dim]``."""
        found: list[Any] = []
        for name in self.caches[0]:
            parts: list[list[Any]] = [[], []]
            for rank, caches in enumerate(self.caches):
                if head_range(self.kv_heads, self.ranks, rank)[1]:
                    pages = LayerPages(caches[name], self.packing)
                    table = self.connectors[rank]._worker._to_pages(tuple(self._tables[request.request_id]))
                    for part, words in zip(parts, pages.read(table, start, stop), strict=True):
                        part.append(words)
            found += [np.concatenate(part) for part in parts]
        return found

    # --- steps

    def prefill(self, request: Request, *chunks: int, layers: int | None = None) -> dict[str, Any] | None:
        """Compute a prompt in steps of ``chunks`` tokens (default: one step); returns its kv_transfer_params."""
        self._allocate(request, 0)
        done = 0
        for chunk in chunks or (request.num_prompt_tokens,):
            self.forward(request, done, chunk, layers)
            done += chunk
        return self.finish(request)

    def forward(
        self, request: Request, done: int, count: int, layers: int | None = None, *, dies: bool = False
    ) -> None:
        """One step; of the first ``layers`` only, as if the forward failed there."""
        table = self._tables[request.request_id]
        cut = lambda tokens: -(-tokens // self.block)  # noqa: E731  # blocks of so many tokens
        new = SimpleNamespace(req_id=request.request_id, block_ids=(table[: cut(count)],), num_computed_tokens=done)
        more = (table[cut(done) : cut(done + count)],)
        cached = SimpleNamespace(
            req_ids=[request.request_id], resumed_req_ids=set(), new_block_ids=[more], num_computed_tokens=[done]
        )
        empty = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        self.step(
            SimpleNamespace(
                scheduled_new_reqs=[] if done else [new],
                scheduled_cached_reqs=cached if done else empty,
                num_scheduled_tokens={request.request_id: count},
                total_num_scheduled_tokens=count,
            ),
            layers,
            dies=dies,
        )

    def step(self, output: Any = None, layers: int | None = None, *, dies: bool = False) -> None:
        """As the model runner's mixin does it."""
        empty = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        idle = output is None
        output = output or SimpleNamespace(
            scheduled_new_reqs=[], scheduled_cached_reqs=empty, num_scheduled_tokens={}, total_num_scheduled_tokens=0
        )
        metadata = self.scheduler.build_connector_meta(output)
        finished: set[str] = set()
        for connector, caches in zip(self.connectors, self.caches, strict=True):
            connector.bind_connector_metadata(metadata)
            for name, cache in itertools.islice(caches.items(), 0 if idle else layers):
                connector.wait_for_layer_load(name)
                connector.save_kv_layer(name, cache, None)
            if dies:
                return
            connector.start_load_kv(None)
            connector.wait_for_save()
            results = connector.get_transfer_results(set())
            connector.clear_connector_metadata()
            self._workers.update(results.finished_recving)
            finished |= {request for request in results.finished_recving if self._workers[request] == self.ranks}
            self.failed |= results.failed_recving
        self.finished |= finished
        self.scheduler.update_connector_output(SimpleNamespace(finished_recving=finished))

    def load(self, request: Request, computed: int = 0) -> int:
        """Schedule a request of which ``computed`` tokens are cached; returns how many more are to come."""
        count, asynchronous = self.scheduler.get_num_new_matched_tokens(request, computed)
        assert asynchronous == (count > 0)
        self._allocate(request, count)
        self.step()
        return count

    def wait(self, request: Request, seconds: float = 30.0) -> bool:
        """Step until the request's load is over; whether it came in."""

        def over() -> bool:
            self.step()
            return request.request_id in self.finished

        assert until(over, seconds), "the load never ends"
        return request.request_id not in self.failed

    def finish(self, request: Request) -> dict[str, Any] | None:
        delay, params = self.scheduler.request_finished(request, self._tables.get(request.request_id, []))
        assert delay is False
        return params

    def _allocate(self, request: Request, external: int) -> None:
        if request.request_id not in self._tables:
            count = -(-request.num_prompt_tokens // self.block)
            self._tables[request.request_id], self.free = self.free[:count], self.free[count:]
        table = self._tables[request.request_id]
        self.scheduler.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: (table,)), external)
