"""The state of one scheduler between two ticks. One thread; only this package writes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from owner.core.balancer import Balancer
from owner.core.captures import Capture, Captures
from owner.core.events import Event
from owner.core.jobs import Jobs
from owner.core.mass_failure_guard import MassFailureGuard
from owner.core.replication import Replication
from owner.core.scheduler_config import SchedulerConfig
from owner.core.tables import Tables
from tablewire.model.columns import I64
from tablewire.model.ids import CaptureID, ChangefeedID, Ts
from tablewire.model.messages import SpanReports
from tablewire.model.progress import Barrier, BarrierWithMinTs, Watermark
from tablewire.model.splitter import Splitter, WholeTables
from tablewire.model.states import CaptureState


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a scheduler. Each message carries it, and is checked against it."""

    owner_id: CaptureID
    changefeed: ChangefeedID
    owner_revision: int
    changefeed_epoch: int


@dataclass(slots=True)
class Bootstrap:
    """The progress of the start of a term, see bootstrap.py."""

    started_ms: int | None = None
    done: bool = False
    waiting_for: set[int] = field(default_factory=set)  # capture indexes
    reports: dict[int, SpanReports] = field(default_factory=dict)  # the last complete report of each capture


@dataclass(slots=True)
class Core:
    """The state of one scheduler."""

    identity: Identity
    config: SchedulerConfig
    splitter: Splitter = field(default_factory=WholeTables)
    tables: Tables = field(default_factory=Tables)
    captures: Captures = field(default_factory=Captures)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    mass_failure_guard: MassFailureGuard = field(default_factory=MassFailureGuard)
    balancer: Balancer = field(default_factory=Balancer)
    failover: tuple[int, int] | None = None  # in progress: (since_ms, spans that lost their writer)
    replication: Replication = field(init=False)
    events: list[Event] = field(default_factory=list)  # of this tick
    chunks: dict[int, list[SpanReports]] = field(default_factory=dict)  # unfinished reports by capture index
    jobs: Jobs = field(default_factory=Jobs)
    current_tables: I64 | None = None  # as passed to the last tick
    reconciled: bool = False  # the rows are those that the current tables should have
    uncovered: dict[int, str] = field(default_factory=dict)  # tables that the splitter's spans do not cover, and where
    now_ms: int = 0
    weights_smoothed_ms: int = 0
    checkpoint_ts: Ts = 0  # as passed to this tick
    barrier: BarrierWithMinTs = BarrierWithMinTs(Barrier(0), 0)  # noqa: RUF009 - frozen
    cluster_load: dict[CaptureID, float] = field(default_factory=dict)
    watermark: Watermark = Watermark(0, 0, 0, 0)  # noqa: RUF009 - frozen
    slowest_row: int = -1
    audits_failed: int = 0  # audits in this term that found a capture to hold other spans than expected

    def __post_init__(self) -> None:
        self.replication = Replication(self.tables, self.identity.owner_revision)

    def capture_state(self, capture: Capture) -> CaptureState:
        return capture.state(self.now_ms, self.config.capture_silent_ms)

    def ready_captures(self) -> list[Capture]:
        """Return the captures that may be given spans, by id: ready and not drained."""
        return [
            capture
            for capture in self.captures.alive()
            if capture.id not in self.jobs.drains and self.capture_state(capture) is CaptureState.READY
        ]

    def leaving_captures(self) -> list[Capture]:
        """Return the captures that their spans are to leave, by id: they are drained or stopping."""
        return [
            capture
            for capture in self.captures.alive()
            if capture.id in self.jobs.drains or self.capture_state(capture) is CaptureState.STOPPING
        ]
