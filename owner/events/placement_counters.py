"""The counters of what the ticks of all changefeeds report."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from owner.core import events
from owner.core.events import Event, PlacementReason
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

    def count(self, changefeed: str, event: Event) -> None:
        match event:
            case events.SpansPlaced(counts):
                for why, count in counts.items():
                    self.placements.labels(changefeed, why).inc(count)
            case events.JobChanged(job) if job.state in ENDED:
                self.jobs.labels(changefeed, job.kind, job.state).inc()
            case events.FailoverBegan(captures):
                self.failovers.labels(changefeed).inc(len(captures))
            case events.GuardEngaged():
                self.brakes.labels(changefeed).inc()
            case events.TwoWriters():
                self.two_writers.labels(changefeed).inc()
            case events.OrphansFound(spans):
                self.orphans.labels(changefeed).inc(spans)
            case events.AuditFailed():
                self.audit_failures.labels(changefeed).inc()

    def keep_only(self, changefeeds: Iterable[str]) -> None:
        """Forget the series of all other changefeeds."""
        for gone in sorted(self._known - set(changefeeds)):
            self._metrics.forget(changefeed=gone)
            self._known.discard(gone)
