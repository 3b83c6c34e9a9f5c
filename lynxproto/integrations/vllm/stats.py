"""Statistics of transfers for vLLM's log and its Prometheus endpoint. Units are bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["LynxPromMetrics", "LynxStats"]

_SERIES: Final = (
    "send_seconds", "sent_bytes", "sent_cache_bytes", "receive_seconds", "received_bytes", "received_cache_bytes",
)  # fmt: skip
_COUNTS: Final = ("failed_sends", "failed_receives")
_TIMES: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class LynxStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What was sent and received since the last report: plain lists and numbers, which travel between processes."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {name: [] for name in _SERIES} | dict.fromkeys(_COUNTS, 0)

    def sent(self, seconds: float, wire_bytes: int, cache_bytes: int) -> None:
        """A transfer was confirmed by the decode side."""
        self._add("send_seconds", seconds, "sent_bytes", wire_bytes, "sent_cache_bytes", cache_bytes)

    def received(self, seconds: float, wire_bytes: int, cache_bytes: int) -> None:
        """A request's blocks are filled and verified, ``seconds`` after it began to wait."""
        self._add("receive_seconds", seconds, "received_bytes", wire_bytes, "received_cache_bytes", cache_bytes)

    def failed(self, name: str) -> None:
        """``failed_sends`` or ``failed_receives``."""
        self.data[name] += 1

    def _add(self, *pairs: Any) -> None:
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            self.data[name].append(value)

    def aggregate(self, other: LynxStats) -> LynxStats:
        """Add another worker's, or another interval's."""
        for name in _SERIES:
            self.data[name] += other.data[name]
        for name in _COUNTS:
            self.data[name] += other.data[name]
        return self

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        """A line for vLLM's log."""
        line: dict[str, int | float] = {}
        for verb, times in (("sent", "send_seconds"), ("received", "receive_seconds")):
            if count := len(self.data[times]):
                wire, cache = sum(self.data[f"{verb}_bytes"]), sum(self.data[f"{verb}_cache_bytes"])
                line[f"caches {verb}"] = count
                line[f"MB {verb}"] = round(wire / 1e6, 3)
                line[f"{verb}, of uncompressed"] = round(wire / cache, 4) if cache else 0.0
                line[f"mean seconds {verb}"] = round(sum(self.data[times]) / count, 4)
        return line | {name.replace("_", " "): self.data[name] for name in _COUNTS}


class LynxPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """``vllm:lynx_*``, with vLLM's labels."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._histograms = {
            "send_seconds": self._make(
                self._histogram_cls,
                "vllm:lynx_send_seconds",
                "From a prompt's first layer until the decode side confirmed all of it, verified.",
                buckets=_TIMES,
            ),
            "receive_seconds": self._make(
                self._histogram_cls,
                "vllm:lynx_receive_seconds",
                "From a request's blocks being allocated until they were filled and verified.",
                buckets=_TIMES,
            ),
        }
        self._counters = {
            name: self._make(self._counter_cls, f"vllm:lynx_{name}", text)
            for name, text in (
                ("sent_bytes", "Bytes of KV cache sent, as they crossed the link."),
                ("sent_cache_bytes", "Bytes of KV cache sent, before they were coded."),
                ("received_bytes", "Bytes of KV cache received, as they crossed the link."),
                ("received_cache_bytes", "Bytes of KV cache received, after they were decoded."),
                ("failed_sends", "Transfers that the decode side did not confirm."),
                ("failed_receives", "Requests whose cache did not arrive exact: recomputed or failed, by policy."),
            )
        }

    def _make(self, kind: Any, name: str, text: str, **options: Any) -> dict[int, Any]:
        metric = kind(name=name, documentation=text, labelnames=self._labelnames, **options)
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what a LynxStats holds."""
        for name, histogram in self._histograms.items():
            for value in cast(list[float], transfer_stats_data[name]):
                histogram[engine_idx].observe(value)
        for name, counter in self._counters.items():
            value = transfer_stats_data[name]
            counter[engine_idx].inc(sum(value) if isinstance(value, list) else value)
