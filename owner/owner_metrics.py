"""What an owner shows at /metrics: read from the last snapshots when Prometheus asks, so that no tick pays for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from owner.changefeed.run import ChangefeedRun
from owner.events.placement_counters import PlacementCounters
from owner.exchange.hub import ProcessorClientView
from tablewire.model.ids import ChangefeedID
from tablewire.model.states import CaptureState, ReplicationState, StallReason
from tablewire.runtime.metrics import Metrics

_PREFIX = "tablewire_owner"
_BY_CHANGEFEED = ["changefeed"]
_BY_CAPTURE = ["capture"]
_CHANGEFEED_STATES = ("normal", "warning", "failed", "stopped", "finished", "removed")


class Shown(Protocol):
    """What the metrics read of the service; any thread."""

    def is_leading(self) -> bool: ...

    def runs(self) -> Mapping[ChangefeedID, ChangefeedRun]: ...

    def client_views(self) -> Iterable[ProcessorClientView]: ...

    def margin_s(self) -> float | None:
        """Return the seconds until this owner must stop leading unless its lease is renewed; None if it does not lead."""
        ...


class OwnerMetrics(Collector):
    def __init__(self, version: str, shown: Shown) -> None:
        self._shown = shown
        self._metrics = Metrics("owner", version)
        self.tick_seconds = self._metrics.histogram("tick_seconds", "Duration of one round of ticks of all changefeeds")
        self.elections = self._metrics.counter("elections", "How often this process became the leader")
        self.placement = PlacementCounters(self._metrics)
        self._metrics.registry.register(self)

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def describe(self) -> Iterable[Metric]:
        """Describe nothing: the families depend on what runs."""
        return ()

    def collect(self) -> Iterable[Metric]:
        leading = GaugeMetricFamily(f"{_PREFIX}_is_leader", "1 while this owner leads")
        is_leading = self._shown.is_leading()
        leading.add_metric([], 1 if is_leading else 0)
        margin = GaugeMetricFamily(
            f"{_PREFIX}_lease_margin_seconds",
            "Time until the leader must stop acting unless its lease is renewed; exported by the leader only",
        )
        margin_s = self._shown.margin_s()
        if margin_s is not None:
            margin.add_metric([], margin_s)
        yield from (leading, margin)
        runs = list(self._shown.runs().items())
        yield from _progress(runs)
        yield from _placement(runs)
        yield from _loads(runs)
        # The connections of a former leader stay; what they last were is no news.
        yield from _exchanges(list(self._shown.client_views()) if is_leading else [])


Runs = Sequence[tuple[ChangefeedID, ChangefeedRun]]


def _progress(runs: Runs) -> Iterable[Metric]:
    """Return the progress of each changefeed, and what it costs the source."""

    def gauge(name: str, doc: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"{_PREFIX}_{name}", doc, labels=_BY_CHANGEFEED)

    checkpoint = gauge("checkpoint_ts", "The stored global checkpoint")
    resolved = gauge("resolved_ts", "The stored global resolved_ts")
    source = gauge("source_ts", "The position of the source at the last poll")
    lag = gauge("checkpoint_lag", "source_ts - checkpoint_ts, in source units (PostgreSQL: bytes of WAL)")
    lag_s = gauge("checkpoint_lag_seconds", "Time since the source was at the checkpoint, as far as this leader has observed it")
    retained = gauge("source_retained_bytes", "What the source retains on disk for the changefeed (PostgreSQL: WAL of its slot)")
    state = GaugeMetricFamily(f"{_PREFIX}_changefeed_state", "1 for the current state, else 0", labels=["changefeed", "state"])
    for changefeed, run in runs:
        name, runtime = [str(changefeed)], run.runtime()
        checkpoint.add_metric(name, runtime.watermark.checkpoint_ts)
        resolved.add_metric(name, runtime.watermark.resolved_ts)
        source.add_metric(name, runtime.source_ts)
        seconds = run.lag_s()
        if seconds is not None:
            lag.add_metric(name, max(0, runtime.source_ts - runtime.watermark.checkpoint_ts))
            lag_s.add_metric(name, seconds)
        if runtime.retained_bytes is not None:
            retained.add_metric(name, runtime.retained_bytes)
        for word in _CHANGEFEED_STATES:
            state.add_metric([*name, word], 1 if runtime.state == word else 0)
    return (checkpoint, resolved, source, lag, lag_s, retained, state)


def _placement(runs: Runs) -> Iterable[Metric]:
    """Return the spans by state and stall reason, of the changefeeds that run."""
    spans = GaugeMetricFamily(f"{_PREFIX}_spans", "Spans by replication state", labels=["changefeed", "state"])
    stalls = GaugeMetricFamily(f"{_PREFIX}_stalled_spans", "Stalled spans by reason", labels=["changefeed", "reason"])
    captures = GaugeMetricFamily(
        f"{_PREFIX}_captures", "Processors by state, according to the scheduler of the changefeed", labels=["changefeed", "state"]
    )
    brake = GaugeMetricFamily(f"{_PREFIX}_brake", "1 while the mass-failure guard suspends placement", labels=_BY_CHANGEFEED)
    for changefeed, run in runs:
        scheduler, name = run.scheduler, str(changefeed)
        if scheduler is None:
            continue
        snapshot = scheduler.snapshot()
        brake.add_metric([name], 1 if snapshot.guard_active else 0)
        states, reasons = snapshot.states(), snapshot.stalls()
        for replication in ReplicationState:
            spans.add_metric([name, replication], states.get(replication, 0))
        for reason in StallReason:
            stalls.add_metric([name, reason], reasons.get(reason, 0))
        seen = Counter(capture.state for capture in snapshot.captures)
        for capture_state in CaptureState:
            captures.add_metric([name, capture_state], seen[capture_state])
    return (spans, stalls, captures, brake)


def _loads(runs: Runs) -> Iterable[Metric]:
    """Return the load of each processor."""
    by_both = [*_BY_CHANGEFEED, *_BY_CAPTURE]
    spans = GaugeMetricFamily(f"{_PREFIX}_capture_spans", "Spans of which the processor is the primary", labels=by_both)
    load = GaugeMetricFamily(
        f"{_PREFIX}_capture_load",
        "Sum of the processor's span weights: 1 per span, more with high rates",
        labels=by_both,
    )
    for changefeed, run in runs:
        scheduler, name = run.scheduler, str(changefeed)
        if scheduler is None:
            continue
        snapshot = scheduler.snapshot()
        for capture in snapshot.captures:
            spans.add_metric([name, capture.id], capture.spans)
        for capture_id, weight in snapshot.loads().items():
            load.add_metric([name, capture_id], weight)
    return (spans, load)


def _exchanges(clients: Sequence[ProcessorClientView]) -> Iterable[Metric]:
    """Return the figures of the calls to each registered processor."""
    duration = SummaryMetricFamily(f"{_PREFIX}_exchange_seconds", "Started Exchanges and their duration", labels=_BY_CAPTURE)
    failures = CounterMetricFamily(f"{_PREFIX}_exchange_failures", "Failed Exchanges", labels=_BY_CAPTURE)
    failing = GaugeMetricFamily(
        f"{_PREFIX}_exchange_failing_seconds",
        "Time since the first of the current consecutive failures; 0: the last Exchange succeeded",
        labels=_BY_CAPTURE,
    )
    queued = GaugeMetricFamily(
        f"{_PREFIX}_exchange_queued_messages", "Messages waiting for the next Exchange", labels=_BY_CAPTURE
    )
    dropped = CounterMetricFamily(
        f"{_PREFIX}_exchange_dropped_messages",
        "Dropped from a full queue; newer messages repeat their content",
        labels=_BY_CAPTURE,
    )
    version = GaugeMetricFamily(f"{_PREFIX}_exchange_protocol_version", "Version of the protocol in use", labels=_BY_CAPTURE)
    for client in clients:
        name = [client.capture_id]
        duration.add_metric(name, count_value=client.exchanges, sum_value=client.exchange_s)
        failures.add_metric(name, client.failures)
        failing.add_metric(name, (client.failing_ms or 0) / 1000)
        queued.add_metric(name, client.queued)
        dropped.add_metric(name, client.dropped)
        version.add_metric(name, client.version)
    return (duration, failures, failing, queued, dropped, version)
