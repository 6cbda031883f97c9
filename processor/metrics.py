"""What a processor shows at /metrics: read from its last round when Prometheus asks, so that no tick pays for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from processor.host import SlotPhase
from tablewire.runtime.metrics import Metrics
from tablewire.types import TableState

if TYPE_CHECKING:
    from processor.service import ProcessorService

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
        ready = GaugeMetricFamily(f"{_PREFIX}_ready", "1 while this processor is registered and may be given tables")
        ready.add_metric([], 0 if self._service.ready() else 1)
        yield ready
        restarts = CounterMetricFamily(f"{_PREFIX}_lease_losses", "How often the lease was lost and a new capture id taken")
        restarts.add_metric([], self._service.restarts)
        yield restarts
        capture = self._service.capture
        if capture is None:
            return
        spans = GaugeMetricFamily(f"{_PREFIX}_spans", "Spans held, by state", labels=["changefeed", "state"])
        agents = GaugeMetricFamily(f"{_PREFIX}_agent_running", "1 while the agent of a changefeed runs", labels=["changefeed"])
        for view in capture.host.views():
            for state in TableState:
                if state is not TableState.ABSENT:
                    spans.add_metric([str(view.changefeed), state], view.spans.get(state, 0))
            agents.add_metric([str(view.changefeed)], 1 if view.phase is SlotPhase.RUNNING else 0)
        yield spans
        yield agents
        stats = capture.server.stats
        exchanges = CounterMetricFamily(f"{_PREFIX}_exchanges", "Turns of owners, by what became of them", labels=["outcome"])
        for outcome in ("received", "invalid", "refused", "overflowed", "unanswered"):
            exchanges.add_metric([outcome], getattr(stats, outcome))
        yield exchanges
