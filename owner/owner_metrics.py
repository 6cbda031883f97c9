"""What an owner shows at /metrics: read from the last snapshots when Prometheus asks, so that no tick pays for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import Metric, SummaryMetricFamily

from owner.changefeed.run import ChangefeedRun
from owner.events.placement_counters import PlacementCounters
from owner.exchange.hub import ProcessorClientView
from owner.scheduling.snapshot import Snapshot
from tablewire.model.ids import ChangefeedID
from tablewire.model.states import CaptureState, ReplicationState, StallReason
from tablewire.runtime.metrics import ReadMetrics, Samples

_BY_CHANGEFEED = ("changefeed",)
_BY_CAPTURE = ("capture",)
_BY_STATE = ("changefeed", "state")
_CHANGEFEED_STATES = ("normal", "warning", "failed", "stopped", "finished", "removed")


class OwnerFigures(Protocol):
    """What the metrics read from the service; any thread."""

    def is_leading(self) -> bool: ...

    def runs(self) -> Mapping[ChangefeedID, ChangefeedRun]: ...

    def client_views(self) -> Iterable[ProcessorClientView]: ...

    def margin_s(self) -> float | None:
        """Return the seconds until this owner must stop leading unless its lease is renewed; None if it does not lead."""
        ...


class OwnerMetrics(ReadMetrics):
    def __init__(self, version: str, figures: OwnerFigures) -> None:
        super().__init__("owner", version)
        self._figures = figures
        self.tick_seconds = self.metrics.histogram("tick_seconds", "Duration of one round of ticks of all changefeeds")
        self.elections = self.metrics.counter("elections", "How often this process became the leader")
        self.placement = PlacementCounters(self.metrics)
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        is_leading, margin_s = self._figures.is_leading(), self._figures.margin_s()
        yield self.gauge("is_leader", "1 while this owner leads", [((), is_leading)])
        yield self.gauge(
            "lease_margin_seconds",
            "Time until the leader must stop acting unless its lease is renewed; exported by the leader only",
            [((), margin_s)] if margin_s is not None else [],
        )
        runs = [(str(changefeed), run) for changefeed, run in self._figures.runs().items()]
        yield from self._progress(runs)
        yield from self._placement([(name, run.scheduler.snapshot()) for name, run in runs if run.scheduler is not None])
        # The connections of a former leader remain, but their figures are out of date.
        yield from self._exchanges(list(self._figures.client_views()) if is_leading else [])

    def _progress(self, runs: Sequence[tuple[str, ChangefeedRun]]) -> Iterable[Metric]:
        """Yield how far each changefeed is, and what that costs its source."""
        views = [((name,), run.runtime(), run.lag_s()) for name, run in runs]
        behind = [
            (name, max(0, runtime.source_ts - runtime.watermark.checkpoint_ts), lag_s)
            for name, runtime, lag_s in views
            if lag_s is not None
        ]

        def gauge(name: str, doc: str, samples: Samples) -> Metric:
            return self.gauge(name, doc, samples, _BY_CHANGEFEED)

        yield gauge("checkpoint_ts", "The stored global checkpoint", [(name, r.watermark.checkpoint_ts) for name, r, _ in views])
        yield gauge("resolved_ts", "The stored global resolved_ts", [(name, r.watermark.resolved_ts) for name, r, _ in views])
        yield gauge("source_ts", "The position of the source at the last poll", [(name, r.source_ts) for name, r, _ in views])
        yield gauge(
            "checkpoint_lag",
            "source_ts - checkpoint_ts, in source units (PostgreSQL: bytes of WAL)",
            [(name, lag) for name, lag, _ in behind],
        )
        yield gauge(
            "checkpoint_lag_seconds",
            "Time since the source was at the checkpoint, as far as this leader has observed it",
            [(name, lag_s) for name, _, lag_s in behind],
        )
        yield gauge(
            "source_retained_bytes",
            "What the source retains on disk for the changefeed (PostgreSQL: WAL of its slot)",
            [(name, r.retained_bytes) for name, r, _ in views if r.retained_bytes is not None],
        )
        states = [((*name, state), r.state == state) for name, r, _ in views for state in _CHANGEFEED_STATES]
        yield self.gauge("changefeed_state", "1 for the current state, else 0", states, _BY_STATE)

    def _placement(self, snapshots: Sequence[tuple[str, Snapshot]]) -> Iterable[Metric]:
        """Yield where the spans of the running changefeeds are, and what stands still."""
        spans, stalls, captures, capture_spans, capture_load = [], [], [], [], []
        for name, snapshot in snapshots:
            states, reasons = snapshot.states(), snapshot.stalls()
            found = Counter(capture.state for capture in snapshot.captures)
            spans += [((name, state), states.get(state, 0)) for state in ReplicationState]
            stalls += [((name, reason), reasons.get(reason, 0)) for reason in StallReason]
            captures += [((name, state), found[state]) for state in CaptureState]
            capture_spans += [((name, capture.id), capture.spans) for capture in snapshot.captures]
            capture_load += [((name, capture_id), weight) for capture_id, weight in snapshot.loads().items()]
        yield self.gauge("spans", "Spans by replication state", spans, _BY_STATE)
        yield self.gauge("stalled_spans", "Stalled spans by reason", stalls, ("changefeed", "reason"))
        yield self.gauge("captures", "Processors by state, according to the scheduler of the changefeed", captures, _BY_STATE)
        guard = [((name,), snapshot.guard_active) for name, snapshot in snapshots]
        yield self.gauge("brake", "1 while the mass-failure guard suspends placement", guard, _BY_CHANGEFEED)
        by_both = (*_BY_CHANGEFEED, *_BY_CAPTURE)
        yield self.gauge("capture_spans", "Spans of which the processor is the primary", capture_spans, by_both)
        yield self.gauge(
            "capture_load", "Sum of the processor's span weights: 1 per span, more with high rates", capture_load, by_both
        )

    def _exchanges(self, clients: Sequence[ProcessorClientView]) -> Iterable[Metric]:
        """Yield the figures of the calls to each processor that is registered now."""
        name, doc = f"{self.prefix}_exchange_seconds", "Started Exchanges and their duration"
        duration = SummaryMetricFamily(name, doc, labels=_BY_CAPTURE)
        for client in clients:
            duration.add_metric([client.capture_id], count_value=client.exchanges, sum_value=client.exchange_s)
        yield duration

        def by_client(field_name: str, unit: int = 1) -> Samples:
            return [((client.capture_id,), (getattr(client, field_name) or 0) / unit) for client in clients]

        yield self.counter("exchange_failures", "Failed Exchanges", by_client("failures"), _BY_CAPTURE)
        yield self.gauge(
            "exchange_failing_seconds",
            "Time since the first of the current consecutive failures; 0: the last Exchange succeeded",
            by_client("failing_ms", 1000),
            _BY_CAPTURE,
        )
        yield self.gauge("exchange_queued_messages", "Messages waiting for the next Exchange", by_client("queued"), _BY_CAPTURE)
        yield self.counter(
            "exchange_dropped_messages",
            "Dropped from a full queue; newer messages repeat their content",
            by_client("dropped"),
            _BY_CAPTURE,
        )
        yield self.gauge("exchange_protocol_version", "Version of the protocol in use", by_client("version"), _BY_CAPTURE)
