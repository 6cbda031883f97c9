"""What a processor shows at /metrics: read from its last round when Prometheus asks, so that no tick pays for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from processor.service.agents import SlotPhase, SlotView
from processor.service.exchange_server import ExchangeStats
from tablewire.etcd.lease import lease_clock
from tablewire.model.states import TableState
from tablewire.runtime.metrics import Metrics

if TYPE_CHECKING:
    from processor.service.processor_service import ProcessorService

_PREFIX = "tablewire_processor"


class ProcessorMetrics(Collector):
    def __init__(self, version: str, service: ProcessorService) -> None:
        self._service = service
        self._metrics = Metrics("processor", version)
        self._metrics.registry.register(self)

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families depend on what runs."""
        return ()

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily(f"{_PREFIX}_ready", "1 while this processor is registered and can be assigned tables")
        ready.add_metric([], 0 if self._service.ready() else 1)
        restarts = CounterMetricFamily(f"{_PREFIX}_lease_losses", "How often the lease was lost and a new capture id was taken")
        restarts.add_metric([], self._service.restarts)
        margin = GaugeMetricFamily(
            f"{_PREFIX}_lease_margin_seconds",
            "Time until this processor must stop writing unless its lease is renewed; negative: it has stopped",
        )
        capture = self._service.capture
        margin_s = capture.registration.deadline() - lease_clock() if capture is not None else -math.inf
        if math.isfinite(margin_s):
            margin.add_metric([], margin_s)
        yield from (ready, restarts, margin)
        yield from _agents(capture.host.views() if capture is not None else ())
        yield from _executors(capture.host.views() if capture is not None else ())
        yield _exchanges(capture.server.stats if capture is not None else ExchangeStats())


def _agents(views: Sequence[SlotView]) -> Iterable[Metric]:
    spans = GaugeMetricFamily(f"{_PREFIX}_spans", "Spans held, by state", labels=["changefeed", "state"])
    agents = GaugeMetricFamily(f"{_PREFIX}_agent_running", "1 while the agent of a changefeed runs", labels=["changefeed"])
    for view in views:
        for state in TableState:
            if state is not TableState.ABSENT:
                spans.add_metric([str(view.changefeed), state], view.spans.get(state, 0))
        agents.add_metric([str(view.changefeed)], 1 if view.phase is SlotPhase.RUNNING else 0)
    return (spans, agents)


def _executors(views: Sequence[SlotView]) -> Iterable[Metric]:
    """Of the changefeeds whose executor tells."""
    labels = ["changefeed"]
    read = GaugeMetricFamily(
        f"{_PREFIX}_reader_position_ts",
        "Position up to which the source has been read (PostgreSQL: in bytes of WAL, so its rate is bytes/s)",
        labels=labels,
    )
    rows = CounterMetricFamily(f"{_PREFIX}_sink_rows", "Rows written to the sink since the agent started", labels=labels)
    size = CounterMetricFamily(f"{_PREFIX}_sink_bytes", "Bytes of those rows, as received from the source", labels=labels)
    queued = GaugeMetricFamily(f"{_PREFIX}_queue_bytes", "Size of the changes that were read but not yet written", labels=labels)
    most = GaugeMetricFamily(
        f"{_PREFIX}_queue_limit_bytes",
        "Above it, a table's queue is discarded and the table is read again later",
        labels=labels,
    )
    for view in views:
        meter = view.meter
        if meter is None:
            continue
        name = [str(view.changefeed)]
        read.add_metric(name, meter.read_ts)
        rows.add_metric(name, meter.rows_written)
        size.add_metric(name, meter.bytes_written)
        queued.add_metric(name, meter.queue_bytes)
        most.add_metric(name, meter.queue_bytes_max)
    return (read, rows, size, queued, most)


def _exchanges(stats: ExchangeStats) -> Metric:
    exchanges = CounterMetricFamily(
        f"{_PREFIX}_exchanges",
        "Calls from owners: received, of these unanswered within exchange.wait_ms; invalid, refused, overflowed: no effect",
        labels=["outcome"],
    )
    for outcome in ("received", "invalid", "refused", "overflowed", "unanswered"):
        exchanges.add_metric([outcome], getattr(stats, outcome))
    return exchanges
