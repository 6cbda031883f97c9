"""What the ticks of a changefeed report, as events of the history."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from owner.core.events import (
    BootstrapDone,
    FailoverBegan,
    FailoverDone,
    GuardEngaged,
    GuardReleased,
    JobChanged,
    PlacementReason,
    SpanFailed,
    SpanMoved,
    TwoWriters,
)
from owner.events.history import History
from owner.events.limiter import NAMED_PER_TICK_MAX, MoreJobsEnded, MoreSpansPlaced, PlacementTrouble, RecordedEvent
from tablewire.model.ids import ChangefeedID, TableID
from tablewire.model.jobs import JobView, format_job_id
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState


class PlacementHistory:
    """The history of one changefeed's placement. Moves by hand are named; spans that were placed otherwise are counted."""

    def __init__(
        self, history: History, changefeed: ChangefeedID, table_names: Callable[[], Mapping[TableID, str]] = dict
    ) -> None:
        """table_names: returns the names of the tables, as known now."""
        self._history = history
        self._changefeed = str(changefeed)
        self._table_names = table_names

    def add(self, event: RecordedEvent) -> None:
        match event:
            case BootstrapDone(spans):
                self._add("changefeed_bootstrapped", text=f"spans {spans}")
            case SpanMoved(span, source, target, PlacementReason.MOVE as why):
                subject, job = self._name(span), format_job_id(event.job_id)
                self._add("span_moved", subject, f"from {source} to {target}", why, by=event.asked_by, job=job)
            case SpanMoved():
                self._history.count_spans(self._changefeed, {event.why: 1})
            case MoreSpansPlaced(counts):
                self._history.count_spans(self._changefeed, counts)
            case SpanFailed(span, error):
                self._add("span_failed", self._name(span), "it is tried again after a pause", error)
            case TwoWriters(span, stays, goes):
                self._add("two_writers", self._name(span), f"{stays} stays, {goes} goes", "two reported to write it")
            case FailoverBegan(captures, spans):
                subject = ", ".join(captures[:NAMED_PER_TICK_MAX])
                self._add("failover_began", subject, f"{spans} spans lost their writer", f"{len(captures)} captures gone")
            case FailoverDone(spans, took_ms):
                self._add("failover_done", text=f"{spans} spans have a writer again, after {took_ms} ms")
            case GuardEngaged(waiting, left):
                self._add(
                    "brake_on", text=f"{waiting} spans wait, {left} captures are left", why="many captures vanished at once"
                )
            case GuardReleased(captures):
                self._add("brake_off", text=f"captures {captures}")
            case JobChanged(job):
                self._add_ended(job)
            case MoreJobsEnded(jobs):
                self._add("jobs_ended", text=f"{jobs} more jobs")
            case PlacementTrouble(counts):
                self._add("placement_trouble", text=", ".join(f"{name} {count}" for name, count in counts.items()))

    def _add_ended(self, job: JobView) -> None:
        if job.kind is QueryKind.CANCEL or (job.kind is QueryKind.MOVE and job.state is QueryState.DONE):
            return  # `drain_cancelled` and `span_moved` say so
        where, subject = "", job.target or ""
        if job.kind is QueryKind.MOVE and job.table_id is not None:
            where, subject = f" to {job.target}", self._name(job.span or Span(job.table_id))
        moves = "" if job.moves_done is None else f" after {job.moves_done} moves"
        text = f"{job.kind}{where}: {job.state}{moves}"
        self._add("job_ended", subject, text, job.reason, by=job.asked_by, job=format_job_id(job.id))

    def _add(self, kind: str, subject: str = "", text: str = "", why: str = "", by: str = "", job: str = "") -> None:
        self._history.add(kind, changefeed=self._changefeed, subject=subject, text=text, why=why, by=by, job=job)

    def _name(self, span: Span) -> str:
        """Return the span as text, with the name of its table where that is known."""
        name, text = self._table_names().get(span.table_id), str(span)
        return text if not name else name + text[len(str(span.table_id)) :]
