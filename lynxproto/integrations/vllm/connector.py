"""``LynxConnector``: vLLM's KVConnectorBase_V1, split into its two sides."""

from __future__ import annotations

import re
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lynxproto.errors import ConfigError
from lynxproto.integrations.vllm.metadata import LynxMetadata
from lynxproto.integrations.vllm.packing import packing_of
from lynxproto.integrations.vllm.scheduler import SchedulerSide
from lynxproto.integrations.vllm.settings import Settings, make_identity
from lynxproto.integrations.vllm.stats import LynxPromMetrics, LynxStats
from lynxproto.integrations.vllm.worker import WorkerSide

__all__ = ["LynxConnector"]


class LynxConnector(KVConnectorBase_V1):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """KV caches from prefill to decode instances through lynxproto: layer by layer, lossless, verified.

    A push: the prefill side connects to the decode side's workers and sends each layer as it is computed, so that most
    of a cache is there when prefill ends. Requests name each other by ``kv_transfer_params``; docs/embedding/vllm.md.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = Settings.of(transfer.kv_connector_extra_config)
        self._group = _only_group(kv_cache_config)
        self._scheduler_side: SchedulerSide | None = None
        self._worker_side: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler_side = SchedulerSide(
                self._settings,
                self._group.kv_cache_spec.block_size,
                producer=transfer.is_kv_producer,
                consumer=transfer.is_kv_consumer,
            )

    @property
    def _scheduler(self) -> SchedulerSide:
        assert self._scheduler_side is not None, "called on a worker"
        return self._scheduler_side

    @property
    def _worker(self) -> WorkerSide:
        assert self._worker_side is not None, "called before register_kv_caches, or in the scheduler"
        return self._worker_side

    # --- workers

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Learn how pages are packed, and begin to listen."""
        config = self._vllm_config
        parallel, transfer = config.parallel_config, config.kv_transfer_config
        if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
            raise ConfigError("context parallelism divides tokens among workers; this connector cannot transfer that")
        rank = parallel.rank % parallel.tensor_parallel_size
        spec = self._group.kv_cache_spec
        self._worker_side = WorkerSide(
            self._settings,
            make_identity(config, vllm.__version__, self._settings),
            kv_caches,
            packing_of(spec, config.cache_config.cache_dtype, kv_caches),
            block_tokens=spec.block_size,
            kv_heads=config.model_config.get_total_num_kv_heads(),
            rank=rank,
            ranks=parallel.tensor_parallel_size,
            max_tokens=config.model_config.max_model_len,
            listen=_listen_url(self._settings, transfer.kv_port, rank) if transfer.is_kv_consumer else "",
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Take this step's loads; they proceed on other threads."""
        self._worker.begin_loads(self._metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests are scheduled when their blocks are filled."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Copy what this layer has of the prompts that are sent, and hand it to their transfers."""
        self._worker.save_layer(layer_name, self._metadata)

    def wait_for_save(self) -> None:
        """All layers were given: nothing reads the blocks any more."""
        self._worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Requests whose blocks are filled and verified, and those whose cache did not arrive."""
        finished, failed = self._worker.take_outcomes(idle=self._metadata.idle)
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_kv_connector_stats(self) -> LynxStats | None:
        """Transfers since the last call."""
        return None if self._worker_side is None else self._worker_side.take_stats()

    def shutdown(self) -> None:
        """End all transfers."""
        if self._worker_side is not None:
            self._worker_side.close()
            self._worker_side = None

    @property
    def _metadata(self) -> LynxMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LynxMetadata)
        return metadata

    # --- scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that come from the prefill side, asynchronously."""
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks for them."""
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> LynxMetadata:
        """This step's work for the workers."""
        return self._scheduler.build(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Loads that are over."""
        self._scheduler.received(connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed; what the decode side needs to know."""
        return self._scheduler.finished(request)

    # --- both

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True: layers are copied between pieces of the graph."""
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LynxStats:
        """Statistics as they come from a worker."""
        return LynxStats(data=data) if data else LynxStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> LynxPromMetrics:
        """Metrics ``vllm:lynx_*``."""
        return LynxPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _only_group(kv_cache_config: Any) -> Any:
    if len(kv_cache_config.kv_cache_groups) != 1:
        raise ConfigError(
            f"the model's KV cache has {len(kv_cache_config.kv_cache_groups)} groups; only models whose layers all "
            "keep their cache alike can be transferred so far"
        )
    return kv_cache_config.kv_cache_groups[0]


def _listen_url(settings: Settings, port: int, rank: int) -> str:
    url = settings.listen or f"tcp://127.0.0.1:{port}"
    match = re.fullmatch(r"(.*:)(\d+)", url)
    if match is None:
        raise ConfigError(f"kv_connector_extra_config: listen must be a URL with a port, not {url!r}")
    return f"{match[1]}{int(match[2]) + rank if int(match[2]) else 0}"
