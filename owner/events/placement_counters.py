"""The counters of what the ticks of all changefeeds report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from owner.core.events import (
    AuditFailed,
    Event,
    FailoverBegan,
    GuardEngaged,
    JobChanged,
    MoreEvents,
    OrphansFound,
    PlacementReason,
    SpansPlaced,
    TwoWriters,
)
from tablewire.model.jobs import ENDED
from tablewire.model.states import QueryKind
from tablewire.runtime.metrics import Metrics


class PlacementCounters:
    """The counters of all changefeeds of this process. Any thread."""

    def __init__(self, metrics: Metrics) -> None:
        by_changefeed = ["changefeed"]
        self._metrics = metrics
        self._known: set[str] = set()
        self.placements = metrics.counter(
            "placements", "Spans that started to replicate on a processor, by reason of the placement", ["changefeed", "why"]
        )
        self.jobs = metrics.counter("jobs_ended", "Finished manual jobs", ["changefeed", "kind", "state"])
        self.failovers = metrics.counter("failovers", "Losses of processors that were writing spans", by_changefeed)
        self.brakes = metrics.counter("brakes", "How often the mass-failure guard suspended placement", by_changefeed)
        self.two_writers = metrics.counter("two_writers", "Spans that two processors reported writing at once", by_changefeed)
        self.orphans = metrics.counter("orphans", "Spans that a processor held without an assignment", by_changefeed)
        self.audit_failures = metrics.counter(
            "audit_failures", "How often a processor's report differed from what the owner knew of it", by_changefeed
        )

    def begin(self, changefeed: str) -> None:
        """Create every series at 0, so that Prometheus sees the first increase."""
        self._known.add(changefeed)
        for family in (self.failovers, self.brakes, self.two_writers, self.orphans, self.audit_failures):
            family.labels(changefeed)
        for why in PlacementReason:
            self.placements.labels(changefeed, why)
        for kind, state in product(QueryKind, sorted(ENDED)):
            self.jobs.labels(changefeed, kind, state)

    def count(self, changefeed: str, events: Sequence[Event]) -> None:
        """events: all of one tick."""
        for event in events:
            match event:
                case SpansPlaced():
                    for why, count in event.counts.items():
                        self.placements.labels(changefeed, why).inc(count)
                case JobChanged() if event.job.state in ENDED:
                    self.jobs.labels(changefeed, event.job.kind, event.job.state).inc()
                case FailoverBegan():
                    self.failovers.labels(changefeed).inc(len(event.captures))
                case GuardEngaged():
                    self.brakes.labels(changefeed).inc()
                case OrphansFound():
                    self.orphans.labels(changefeed).inc(event.spans)
                case TwoWriters() | AuditFailed():
                    self._count(changefeed, type(event), 1)
                case MoreEvents():
                    self._count(changefeed, event.kind, event.count)

    def _count(self, changefeed: str, kind: type[Event], count: int) -> None:
        family = {TwoWriters: self.two_writers, AuditFailed: self.audit_failures}.get(kind)
        if family is not None:
            family.labels(changefeed).inc(count)

    def keep_only(self, changefeeds: Iterable[str]) -> None:
        """Forget the series of all other changefeeds."""
        for gone in sorted(self._known - set(changefeeds)):
            self._metrics.forget(changefeed=gone)
            self._known.discard(gone)
