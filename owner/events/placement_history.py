"""What the ticks of a changefeed report, as entries of the history."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from owner.core import events
from owner.core.events import Event, PlacementReason
from owner.events.history import History
from owner.events.placement_log import CAPTURES_NAMED_MAX
from tablewire.model.ids import ChangefeedID, TableID
from tablewire.model.jobs import JobView, format_job_id
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState
from tablewire.runtime.text import plural

QUIET_S: Final = 2.0
COUNTING_S_MAX: Final = 30.0


class PlacementHistory:
    """The history of one changefeed's placement; the tick's thread.

    Manual moves are named. Spans that were placed otherwise are counted, and the counts are one
    event, so that the number of events does not grow with the tables.
    """

    def __init__(
        self,
        history: History,
        changefeed: ChangefeedID,
        table_names: Callable[[], Mapping[TableID, str]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """table_names: returns the names of the tables, as known now."""
        self._history = history
        self._changefeed = str(changefeed)
        self._table_names = table_names
        self._clock = clock
        self._placed: Counter[str] = Counter()
        self._first_s = self._last_s = 0.0  # when the first and the last span was counted

    def add(self, event: Event) -> None:
        match event:
            case events.BootstrapDone(spans):
                self._add("changefeed_bootstrapped", text=plural(spans, "table"))
            case events.SpanMoved(span, source, target, PlacementReason.MOVE as why, job_id, by):
                self._add("span_moved", self._name(span), f"from {source} to {target}", why, job_id, by)
            case events.SpanMoved():
                self._count_spans({event.why: 1})
            case events.SpanFailed(span, error):
                self._add("span_failed", self._name(span), "it is retried after a pause", error)
            case events.TwoWriters(span, stays, goes):
                self._add("two_writers", self._name(span), f"{stays} stays, {goes} goes", "two processors reported to write it")
            case events.FailoverBegan(captures, spans):
                subject, gone = ", ".join(captures[:CAPTURES_NAMED_MAX]), plural(len(captures), "processor")
                self._add("failover_began", subject, f"{plural(spans, 'table')} without a writer", f"{gone} gone")
            case events.FailoverDone(spans, took_ms):
                self._add("failover_done", text=f"{plural(spans, 'table')} with a writer again after {took_ms} ms")
            case events.GuardEngaged(waiting, left):
                text = f"{plural(waiting, 'table')} waiting, {plural(left, 'processor')} left"
                self._add("brake_on", text=text, why="many processors vanished at once")
            case events.GuardReleased(captures):
                self._add("brake_off", text=plural(captures, "processor"))
            case events.JobChanged(job):
                self._add_ended(job)

    def add_counts(self, placed: Mapping[str, int], trouble: Mapping[str, int], jobs_ended: int) -> None:
        if trouble:
            self._add("placement_trouble", text=", ".join(f"{name} {count}" for name, count in trouble.items()))
        if jobs_ended:
            self._add("jobs_ended", text=plural(jobs_ended, "more job"))
        if placed:
            self._count_spans(placed)

    def flush(self, at_once: bool = False) -> None:
        """Add the event with the counts: QUIET_S after the last span, or COUNTING_S_MAX after the
        first one."""
        now_s = self._clock()
        if self._placed and (at_once or now_s - self._last_s >= QUIET_S or now_s - self._first_s >= COUNTING_S_MAX):
            text = f"{plural(self._placed.total(), 'table')} began to replicate"
            self._add("spans_placed", text=text, why=", ".join(f"{why} {count}" for why, count in self._placed.most_common()))
            self._placed.clear()

    def _count_spans(self, counts: Mapping[str, int]) -> None:
        self._last_s = self._clock()
        self._first_s = self._first_s if self._placed else self._last_s
        self._placed.update(counts)

    def _add_ended(self, job: JobView) -> None:
        if job.kind is QueryKind.CANCEL or (job.kind is QueryKind.MOVE and job.state is QueryState.DONE):
            return  # `drain_cancelled` and `span_moved` say so
        where, subject = "", job.target or ""
        if job.table_id is not None:
            where, subject = f" to {job.target}", self._name(job.span or Span(job.table_id))
        moves = "" if job.moves_done is None else f" after {plural(job.moves_done, 'move')}"
        self._add("job_ended", subject, f"{job.kind}{where}: {job.state}{moves}", job.reason, job.id, job.asked_by)

    def _add(self, kind: str, subject: str = "", text: str = "", why: str = "", job_id: int = 0, by: str = "") -> None:
        ids = {"changefeed": self._changefeed, "by": by, "job": format_job_id(job_id)}
        self._history.add(kind, subject=subject, text=text, why=why, **ids)

    def _name(self, span: Span) -> str:
        """Return the span as text, with the name of its table where that is known."""
        name, text = self._table_names().get(span.table_id), str(span)
        return name + text.removeprefix(str(span.table_id)) if name else text
