"""The placement log: what the ticks of a changefeed report, as lines for an operator."""

from __future__ import annotations

import structlog

from owner.core.events import (
    BootstrapDone,
    FailoverBegan,
    FailoverDone,
    GuardEngaged,
    GuardReleased,
    JobChanged,
    SpanFailed,
    SpanMoved,
    TwoWriters,
)
from owner.events.limiter import NAMED_PER_TICK_MAX, MoreJobsEnded, MoreSpansPlaced, PlacementTrouble, RecordedEvent
from tablewire.model.ids import ChangefeedID
from tablewire.model.jobs import JobView, format_job_id
from tablewire.model.states import QueryState
from tablewire.runtime.uris import redact_uri

_log = structlog.get_logger("owner.placement")


class PlacementLog:
    """The log of one changefeed. owner_revision joins its lines with those of the processors."""

    def __init__(self, changefeed: ChangefeedID, owner_revision: int) -> None:
        self._log = _log.bind(changefeed=str(changefeed), owner_revision=owner_revision)

    def write(self, event: RecordedEvent) -> None:
        log = self._log
        match event:
            case BootstrapDone(spans):
                log.info("changefeed_bootstrapped", spans=spans)
            case SpanMoved(span, source, target, why):
                ids = _ids(event.job_id, event.asked_by)
                log.info("span_moved", span=str(span), source=source, target=target, why=str(why), **ids)
            case SpanFailed(span, error):
                log.warning("span_failed", span=str(span), error=redact_uri(error))
            case TwoWriters(span, stays, goes):
                log.error("two_writers", span=str(span), stays=stays, goes=goes)
            case FailoverBegan(captures, spans):
                log.warning("failover_began", captures=list(captures[:NAMED_PER_TICK_MAX]), gone=len(captures), spans=spans)
            case FailoverDone(spans, took_ms):
                log.info("failover_done", spans=spans, took_ms=took_ms)
            case GuardEngaged(waiting, left):
                log.warning("brake_on", spans_waiting=waiting, captures_left=left)
            case GuardReleased(captures):
                log.info("brake_off", captures=captures)
            case JobChanged(job):
                self._write_ended(job)
            case MoreJobsEnded(jobs):
                log.info("more_jobs_ended", jobs=jobs)
            case MoreSpansPlaced(counts):
                log.info("spans_placed", **counts)
            case PlacementTrouble(counts):
                log.warning("placement_trouble", **counts)

    def _write_ended(self, job: JobView) -> None:
        write = self._log.warning if job.state is QueryState.REFUSED else self._log.info
        moves = {} if job.moves_done is None else {"moves": job.moves_done}
        ids = _ids(job.id, job.asked_by)
        write(
            "job_ended",
            kind=job.kind,
            subject=job.subject,
            target=job.target,
            state=job.state,
            reason=job.reason,
            **ids,
            **moves,
        )


def _ids(job_id: int, asked_by: str) -> dict[str, str]:
    """Return the fields that join a line with the others of its job."""
    return {name: value for name, value in (("job", format_job_id(job_id)), ("by", asked_by)) if value}
