"""What a processor exports at /metrics: read from its last round when Prometheus asks, so that no tick pays for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import Metric

from processor.service.agents import SlotPhase, SlotView
from processor.service.exchange_server import ExchangeStats
from tablewire.model.states import TableState
from tablewire.runtime.metrics import ReadMetrics

_OUTCOMES = ("received", "invalid", "refused", "overflowed", "unanswered")
_STATES = [state for state in TableState if state is not TableState.ABSENT]


@dataclass(frozen=True, slots=True)
class ProcessorFigures:
    """The figures of a processor at one moment. lease_margin_s: None while it has no lease."""

    is_ready: bool = False
    lease_losses: int = 0
    lease_margin_s: float | None = None
    views: Sequence[SlotView] = ()
    exchanges: ExchangeStats = field(default_factory=ExchangeStats)


class ProcessorMetrics(ReadMetrics):
    def __init__(self, version: str, read: Callable[[], ProcessorFigures]) -> None:
        super().__init__("processor", version)
        self._read = read
        self.registry.register(self)

    def collect(self) -> Iterable[Metric]:
        now = self._read()
        yield self.gauge("ready", "1 while this processor is registered and can be assigned tables", [((), now.is_ready)])
        yield self.counter(
            "lease_losses", "How often the lease was lost and a new capture id was taken", [((), now.lease_losses)]
        )
        yield self.gauge(
            "lease_margin_seconds",
            "Time until this processor must stop writing unless its lease is renewed; negative: it has stopped",
            [((), now.lease_margin_s)] if now.lease_margin_s is not None else [],
        )
        by_name = [((str(view.changefeed),), view) for view in now.views]
        spans = [((*name, state), view.spans.get(state, 0)) for name, view in by_name for state in _STATES]
        yield self.gauge("spans", "Spans held, by state", spans, ("changefeed", "state"))
        running = [(name, view.phase is SlotPhase.RUNNING) for name, view in by_name]
        yield self.gauge("agent_running", "1 while the agent of a changefeed runs", running, ("changefeed",))
        meters = [(name, view.meter) for name, view in by_name if view.meter is not None]
        for make, metric, field_name, text in (
            (
                self.gauge,
                "reader_position_ts",
                "read_ts",
                "Position up to which the source has been read (PostgreSQL: in bytes of WAL, so its rate is bytes/s)",
            ),
            (self.counter, "sink_rows", "rows_written", "Rows written to the sink since the agent started"),
            (self.counter, "sink_bytes", "bytes_written", "Bytes of those rows, as received from the source"),
            (
                self.counter,
                "sink_conflicts",
                "conflicts",
                "Changes that found other rows at the sink than at the source, since the agent started",
            ),
            (self.gauge, "queue_bytes", "queue_bytes", "Size of the changes that were read but not yet written"),
            (
                self.gauge,
                "queue_limit_bytes",
                "queue_bytes_max",
                "Above it, a table's queue is discarded and the table is read again later",
            ),
        ):
            yield make(metric, text, [(name, getattr(meter, field_name)) for name, meter in meters], ("changefeed",))
        yield self.counter(
            "exchanges",
            "Calls from owners: received, of these unanswered within exchange.wait_ms; invalid, refused, overflowed: no effect",
            [((outcome,), getattr(now.exchanges, outcome)) for outcome in _OUTCOMES],
            ("outcome",),
        )
