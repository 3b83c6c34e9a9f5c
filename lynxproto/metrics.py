"""Prometheus metrics of sessions, through prometheus-client; names and units are in docs/operations.md.

Counters and gauges are read from the sessions when they are scraped; what happens once (outcomes, times, failures) is
counted as it is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from lynxproto.config import MAX_LEVELS
from lynxproto.counters import Counters
from lynxproto.errors import ConfigError, MissingDependencyError, StreamClosedError
from lynxproto.session import Snapshot

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
except ImportError as error:
    raise MissingDependencyError(
        f"metrics need prometheus-client ({error}); run: pip install 'lynxproto[metrics]'"
    ) from error

__all__ = ["Metrics", "class_name"]

_SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0,
)  # fmt: skip


def class_name(level: int) -> str:
    """The ``class`` label of a level: ``anchor``, ``residual_1``..."""
    return "anchor" if level == 0 else f"residual_{level}"


class Metrics:
    """Metrics of all the sessions given to :meth:`watch`, a collector of prometheus-client.

    Pass :meth:`observe` to their ``observe``.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._sources: list[Callable[[], Snapshot]] = []
        self._last: dict[Callable[[], Snapshot], Snapshot] = {}
        self._transfers = Counter(
            "lynxproto_transfers", "Transfers that are over.", ("direction", "outcome"), registry=self.registry
        )
        self._refused = Counter(
            "lynxproto_refused", "Pushes and pulls that this side refused.", ("reason",), registry=self.registry
        )
        self._failures = Counter(
            "lynxproto_handshake_failures", "Peers that did not get in.", ("reason",), registry=self.registry
        )
        self._sessions = Counter("lynxproto_sessions_opened", "Sessions that were established.", registry=self.registry)
        self._anchor = Histogram(
            "lynxproto_time_to_anchor_seconds",
            "From accepting a transfer until level 0 of all layers is in place.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._done = Histogram(
            "lynxproto_time_to_exact_seconds",
            "From opening a transfer until all of it is confirmed; only exact transfers.",
            ("direction",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def observe(self, event: str, fields: Mapping[str, Any]) -> None:
        """Count an event; see :data:`lynxproto.session.connect`'s ``observe``."""
        match event:
            case "transfer_closed":
                self._transfers.labels(fields["direction"], fields["outcome"]).inc()
                if fields["exact"]:
                    self._done.labels(fields["direction"]).observe(fields["seconds"])
            case "level_ready" if fields["level"] == 0:
                self._anchor.observe(fields["seconds"])
            case "handshake_failed":
                self._failures.labels(fields["reason"]).inc()
            case "transfer_refused" | "fetch_refused":
                self._refused.labels(fields["reason"]).inc()
            case "session_opened":
                self._sessions.inc()

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Read counters and gauges of a session, ``session.snapshot``; what it moved stays counted once it ended."""
        self._sources.append(snapshot)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """For prometheus-client."""
        now, gauges = Counters(), Snapshot()
        for source in self._sources:
            try:
                shot = self._last[source] = source()
            except StreamClosedError:
                now.add(self._last.get(source, Snapshot()).counters)
                continue
            now.add(shot.counters)
            gauges.handshakes += shot.handshakes
            gauges.sessions += shot.sessions
            gauges.incoming += shot.incoming
            gauges.outgoing += shot.outgoing
            gauges.credit = [a + b for a, b in zip(gauges.credit, shot.credit, strict=True)]
            gauges.unapplied = [a + b for a, b in zip(gauges.unapplied, shot.unapplied, strict=True)]
        yield from _traffic(now)
        for name, text, value in (
            ("lynxproto_resends", "Chunks that were sent again.", now.resends),
            ("lynxproto_nacks", "Chunks that peers asked for again because they had arrived corrupt.", now.nacks),
            ("lynxproto_corrupt_frames", "Payloads that arrived with a wrong CRC32C.", now.corrupt),
            ("lynxproto_duplicate_chunks", "Chunks that arrived twice.", now.duplicates),
            ("lynxproto_dropped_chunks", "Chunks that arrived too late or cancelled.", now.dropped),
        ):
            yield CounterMetricFamily(name, text, value=value)
        opened = GaugeMetricFamily("lynxproto_open_transfers", "Transfers under way.", labels=["direction"])
        opened.add_metric(["in"], gauges.incoming)
        opened.add_metric(["out"], gauges.outgoing)
        yield opened
        yield GaugeMetricFamily(
            "lynxproto_open_sessions", "Sessions that are open, or may be resumed.", value=gauges.sessions
        )
        yield GaugeMetricFamily(
            "lynxproto_open_handshakes", "Byte streams of peers that are not known yet.", value=gauges.handshakes
        )
        for name, text, values in (
            ("lynxproto_credit_bytes", "What peers still allow this side to send.", gauges.credit),
            ("lynxproto_unapplied_bytes", "What was received and waits to be decoded.", gauges.unapplied),
        ):
            family = GaugeMetricFamily(name, text, labels=["class"])
            for level in range(MAX_LEVELS):
                family.add_metric([class_name(level)], values[level])
            yield family

    def serve(self, address: str) -> Callable[[], None]:
        """Answer scrapes on ``HOST:PORT`` from a thread; returns what ends that.

        Raises :class:`~lynxproto.errors.ConfigError` if the address is none, or cannot be had.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 0xFFFF:
            raise ConfigError(f"metrics: expected HOST:PORT, for example 127.0.0.1:9411, not {address!r}")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise ConfigError(f"metrics cannot listen on {address}: {error.strerror or error}") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop


def _traffic(counters: Counters) -> Iterator[CounterMetricFamily]:
    for name, text, control, sent, received in (
        (
            "lynxproto_bytes", "Bytes of frames, headers included.",
            (counters.control_bytes_sent, counters.control_bytes_received),
            counters.sent_bytes, counters.received_bytes,
        ),
        (
            "lynxproto_frames", "Frames: control frames, and DATA of each level.",
            (counters.control_frames_sent, counters.control_frames_received),
            counters.sent_frames, counters.received_frames,
        ),
    ):  # fmt: skip
        family = CounterMetricFamily(name, text, labels=["direction", "class"])
        for direction, ruling, levels in (("out", control[0], sent), ("in", control[1], received)):
            family.add_metric([direction, "control"], ruling)
            for level in range(MAX_LEVELS):
                family.add_metric([direction, class_name(level)], levels[level])
        yield family
