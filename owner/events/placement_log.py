"""What a tick says has happened, as events for an operator and as counters.

The number of lines does not grow with the tables: a few moves are named in each tick, everything else is a count, at most one
line a second. One object a changefeed and term; the tick's thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import structlog

from owner.core.tables import NO_CAPTURE
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.queries import ENDED, job_id
from tablewire.model.states import QueryKind, QueryState, StallReason
from tablewire.runtime.metrics import Metrics
from tablewire.runtime.uris import redact_uri

if TYPE_CHECKING:
    from owner.core.tick import Facts
    from owner.scheduling.snapshot import Snapshot
    from tablewire.model.queries import Query

NAMED_PER_TICK_MAX = 5
"""So many of each kind are lines of their own."""
COUNTS_INTERVAL_S = 1.0
WHYS = ("add", "move", "drain", "balance")
TROUBLE = ("two_writers", "orphans", "audit_failures", "spans_failed")

_log = structlog.get_logger("owner.placement")


class PlacementLog(Protocol):
    """Of a structlog logger what is used here."""

    def info(self, event: str, **fields: Any) -> None: ...

    def warning(self, event: str, **fields: Any) -> None: ...

    def error(self, event: str, **fields: Any) -> None: ...


class FactCounters:
    """The counters of all changefeeds in this process. Any thread."""

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
        """Shows 0 from the beginning, so that the first increase is seen."""
        self._known.add(changefeed)
        for family in (self.failovers, self.brakes, self.two_writers, self.orphans, self.audit_failures):
            family.labels(changefeed)
        for why in WHYS:
            self.placements.labels(changefeed, why)
        for kind, state in product(QueryKind, sorted(ENDED)):
            self.jobs.labels(changefeed, kind, state)

    def keep_only(self, changefeeds: Iterable[str]) -> None:
        """Forgets the series of all others."""
        for gone in sorted(self._known - set(changefeeds)):
            self._metrics.forget(changefeed=gone)
            self._known.discard(gone)


class FactsLog:
    """`note` after each tick of the scheduler."""

    def __init__(
        self,
        changefeed: ChangefeedID,
        counters: FactCounters,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[PlacementLog], PlacementLog] = lambda log: log,
        owner_revision: int = 0,
    ) -> None:
        """owner_revision: joins the lines with those of the processors.
        tell: makes of the log one that passes on to others too what is logged."""
        self._name = str(changefeed)
        self._log = tell(_log.bind(changefeed=self._name, owner_revision=owner_revision))
        self._counters = counters
        self._clock = clock
        self._held: dict[CaptureID, int] = {}  # spans that each capture wrote after the last tick
        self._failover: tuple[float, int] | None = None  # since when, and how many spans had lost their writer
        self._braked = False
        self._errors: dict[int, str] = {}  # by row, as they stood after the last tick
        self._audits = 0
        self._open: list[Query] = []
        self._last_query: Query | None = None
        self._counts: Counter[str] = Counter()  # that no line has told yet
        self._told_s = clock() - COUNTS_INTERVAL_S
        counters.begin(self._name)

    def note(self, facts: Facts, snapshot: Snapshot, queries: Sequence[Query]) -> None:
        """facts, snapshot: of the tick that has just ended. queries: of its scheduler."""
        if facts.bootstrapped:
            self._log.info("changefeed_bootstrapped", spans=len(snapshot.spans))
        self._note_trouble(facts)
        self._note_lost(facts, snapshot)
        self._note_errors(snapshot)
        self._note_brake(facts, snapshot)
        self._note_placements(facts, queries)
        self._note_jobs(queries)
        self._tell_counts()

    def _note_trouble(self, facts: Facts) -> None:
        for two in facts.two_writers[:NAMED_PER_TICK_MAX]:
            self._log.error("two_writers", span=str(two.span), stays=two.stays, goes=two.goes)
        self._counts["two_writers"] += max(0, len(facts.two_writers) - NAMED_PER_TICK_MAX)
        self._counts["orphans"] += facts.orphans
        failed = facts.audits_failed - self._audits
        self._audits = facts.audits_failed
        self._counts["audit_failures"] += failed
        for family, count in (
            (self._counters.two_writers, len(facts.two_writers)),
            (self._counters.orphans, facts.orphans),
            (self._counters.audit_failures, failed),
        ):
            if count:
                family.labels(self._name).inc(count)

    def _note_lost(self, facts: Facts, snapshot: Snapshot) -> None:
        lost = {capture: spans for capture in facts.gone if (spans := self._held.get(capture, 0))}
        self._held = {view.id: view.spans for view in snapshot.captures}
        now_s = self._clock()
        if lost:
            since_s, spans = self._failover or (now_s, 0)
            self._failover = (since_s, spans + sum(lost.values()))
            self._counters.failovers.labels(self._name).inc(len(lost))
            names = sorted(lost)[:NAMED_PER_TICK_MAX]
            self._log.warning("failover_began", captures=names, gone=len(lost), spans=sum(lost.values()))
        if self._failover is not None and not _without_writer(snapshot):
            since_s, spans = self._failover
            self._failover = None
            self._log.info("failover_done", spans=spans, took_ms=round((now_s - since_s) * 1000))

    def _note_errors(self, snapshot: Snapshot) -> None:
        """Spans that did not work out somewhere, once for each error; they are tried again after a pause."""
        if not snapshot.errors and not self._errors:
            return
        errors = {row: text for row, (text, _) in snapshot.errors.items()}
        new = [row for row, text in errors.items() if self._errors.get(row) != text]
        self._errors = errors
        named = np.isin(snapshot.roles.rows, new[:NAMED_PER_TICK_MAX])
        for position in np.flatnonzero(named).tolist() if new else ():
            error = redact_uri(errors[int(snapshot.roles.rows[position])])
            self._log.warning("span_failed", span=str(snapshot.roles.spans[position]), error=error)
        self._counts["spans_failed"] += max(0, len(new) - NAMED_PER_TICK_MAX)

    def _note_brake(self, facts: Facts, snapshot: Snapshot) -> None:
        if facts.brake == self._braked:
            return
        self._braked = facts.brake
        if facts.brake:
            self._counters.brakes.labels(self._name).inc()
            waiting = snapshot.stalls().get(StallReason.BRAKE, 0)
            self._log.warning("brake_on", spans_waiting=waiting, captures_left=len(snapshot.captures))
        else:
            self._log.info("brake_off", captures=len(snapshot.captures))

    def _note_placements(self, facts: Facts, queries: Sequence[Query]) -> None:
        unnamed = Counter(facts.placed)
        moves = [placement for placement in facts.placements if placement.source is not None]
        for moved in moves[:NAMED_PER_TICK_MAX]:
            ids = _ids(next((query for query in queries if query.number == moved.job), None)) if moved.job else {}
            self._log.info("span_moved", span=str(moved.span), source=moved.source, target=moved.target, why=moved.why, **ids)
            unnamed[moved.why] -= 1
        self._counts.update(unnamed)
        for why, count in facts.placed.items():
            self._counters.placements.labels(self._name, why).inc(count)

    def _note_jobs(self, queries: Sequence[Query]) -> None:
        """Those that have ended since the last call; a job is told of once."""
        at = len(queries)
        while at and queries[at - 1] is not self._last_query:
            at -= 1
        candidates = [*self._open, *queries[at:]]
        self._last_query = queries[-1] if queries else self._last_query
        ended = [query for query in candidates if query.state in ENDED]
        self._open = [query for query in candidates if query.state not in ENDED]
        for query in ended[:NAMED_PER_TICK_MAX]:
            log = self._log.warning if query.state is QueryState.REFUSED else self._log.info
            more = _ids(query) if query.moves_done is None else {**_ids(query), "moves": query.moves_done}
            what = {"kind": query.kind, "subject": query.subject, "target": query.target}
            log("job_ended", **what, state=query.state, reason=query.reason, **more)
        self._counts["jobs_ended"] += max(0, len(ended) - NAMED_PER_TICK_MAX)
        for query in ended:
            self._counters.jobs.labels(self._name, query.kind, query.state).inc()

    def _tell_counts(self) -> None:
        """What has no line of its own, at most once in COUNTS_INTERVAL_S."""
        counts = {what: count for what, count in sorted(self._counts.items()) if count}
        now_s = self._clock()
        if not counts or now_s - self._told_s < COUNTS_INTERVAL_S:
            return
        self._told_s = now_s
        self._counts.clear()
        trouble = {what: counts.pop(what) for what in TROUBLE if what in counts}
        if trouble:
            self._log.warning("placement_trouble", **trouble)
        jobs = counts.pop("jobs_ended", 0)
        if jobs:
            self._log.info("more_jobs_ended", jobs=jobs)
        if counts:
            self._log.info("spans_placed", **counts)


def _ids(query: Query | None) -> dict[str, Any]:
    """What joins a line with the others of its job, and who asked for it."""
    if query is None:
        return {}
    return {name: value for name, value in (("job", job_id(query.number)), ("by", query.asked_by)) if value}


def _without_writer(snapshot: Snapshot) -> int:
    """How many spans that somebody should write are written by nobody."""
    return int(np.count_nonzero(snapshot.roles.wanted & (snapshot.roles.primary == NO_CAPTURE)))
