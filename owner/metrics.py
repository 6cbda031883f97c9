"""What an owner shows at /metrics: read from the last snapshots when Prometheus asks, so that no tick pays for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from owner.facts_log import FactCounters
from owner.run import ChangefeedRun
from owner.transport import PeerView
from tablewire.runtime.metrics import Metrics
from tablewire.types import ChangefeedID, ReplicationState, StallReason

_PREFIX = "tablewire_owner"
_CHANGEFEED_STATES = ("normal", "warning", "failed", "stopped", "finished", "removed")


class Shown(Protocol):
    """What the metrics read of the service; any thread."""

    def is_leading(self) -> bool: ...

    def runs(self) -> Mapping[ChangefeedID, ChangefeedRun]: ...

    def peers(self) -> Iterable[PeerView]: ...


class OwnerMetrics(Collector):
    def __init__(self, version: str, shown: Shown) -> None:
        self._shown = shown
        self._metrics = Metrics("owner", version)
        self.tick_seconds = self._metrics.histogram("tick_seconds", "One round of ticks of all changefeeds")
        self.elections = self._metrics.counter("elections", "How often this process became the leader")
        self.facts = FactCounters(self._metrics)
        self._metrics.registry.register(self)

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families depend on what runs."""
        return ()

    def collect(self) -> Iterable[Metric]:
        leading = GaugeMetricFamily(f"{_PREFIX}_is_leader", "1 while this owner leads")
        leading.add_metric([], 1 if self._shown.is_leading() else 0)
        yield leading
        yield from self._changefeeds()
        yield from self._captures()

    def _changefeeds(self) -> Iterable[Metric]:
        by_changefeed = ["changefeed"]
        checkpoint = GaugeMetricFamily(f"{_PREFIX}_checkpoint_ts", "The global checkpoint, as stored", labels=by_changefeed)
        resolved = GaugeMetricFamily(f"{_PREFIX}_resolved_ts", "The global resolved_ts, as stored", labels=by_changefeed)
        source = GaugeMetricFamily(f"{_PREFIX}_source_ts", "Where the source was when it was asked last", labels=by_changefeed)
        retained = GaugeMetricFamily(
            f"{_PREFIX}_source_retained_bytes", "What the source keeps on disk for the changefeed", labels=by_changefeed
        )
        state = GaugeMetricFamily(f"{_PREFIX}_changefeed_state", "1 for the present state", labels=["changefeed", "state"])
        spans = GaugeMetricFamily(f"{_PREFIX}_spans", "Spans, by replication state", labels=["changefeed", "state"])
        stalls = GaugeMetricFamily(
            f"{_PREFIX}_stalled_spans", "Spans that stand still, by reason", labels=["changefeed", "reason"]
        )
        brake = GaugeMetricFamily(
            f"{_PREFIX}_brake", "1 while a mass loss of processors holds placement back", labels=by_changefeed
        )
        for changefeed, run in self._shown.runs().items():
            name, runtime = str(changefeed), run.runtime()
            checkpoint.add_metric([name], runtime.watermark.checkpoint_ts)
            resolved.add_metric([name], runtime.watermark.resolved_ts)
            source.add_metric([name], runtime.source_ts)
            if runtime.retained_bytes is not None:
                retained.add_metric([name], runtime.retained_bytes)
            for word in _CHANGEFEED_STATES:
                state.add_metric([name, word], 1 if runtime.state == word else 0)
            scheduler = run.scheduler
            if scheduler is None:
                continue
            snapshot = scheduler.snapshot()
            brake.add_metric([name], 1 if snapshot.brake else 0)
            states, reasons = snapshot.states(), snapshot.stalls()
            for replication in ReplicationState:
                spans.add_metric([name, replication], states.get(replication, 0))
            for reason in StallReason:
                stalls.add_metric([name, reason], reasons.get(reason, 0))
        yield from (checkpoint, resolved, source, retained, state, spans, stalls, brake)

    def _captures(self) -> Iterable[Metric]:
        failing = GaugeMetricFamily(f"{_PREFIX}_captures_failing", "Processors whose last Exchange failed")
        exchanges = CounterMetricFamily(f"{_PREFIX}_exchanges", "Exchanges with the processors that are here now")
        failures = CounterMetricFamily(f"{_PREFIX}_exchange_failures", "Exchanges with them that failed")
        peers = list(self._shown.peers())
        failing.add_metric([], sum(peer.failing_ms is not None for peer in peers))
        exchanges.add_metric([], sum(peer.exchanges for peer in peers))
        failures.add_metric([], sum(peer.failures for peer in peers))
        yield from (failing, exchanges, failures)
