"""The placement log: what the ticks of a changefeed report, as lines for an operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from owner.core import events
from owner.core.events import Event
from tablewire.model.ids import ChangefeedID
from tablewire.model.jobs import JobView, format_job_id
from tablewire.model.states import QueryState
from tablewire.runtime.uris import redact_uri

CAPTURES_NAMED_MAX = 5

_log = structlog.get_logger("owner.placement")


class PlacementLog:
    """The log of one changefeed. owner_revision joins its lines with those of the processors."""

    def __init__(self, changefeed: ChangefeedID, owner_revision: int) -> None:
        self._log = _log.bind(changefeed=str(changefeed), owner_revision=owner_revision)

    def write(self, event: Event) -> None:
        log = self._log
        match event:
            case events.BootstrapDone(spans):
                log.info("changefeed_bootstrapped", spans=spans)
            case events.SpanMoved(span, source, target, why, job_id, asked_by):
                ids = _ids(job_id, asked_by)
                log.info("span_moved", span=str(span), source=source, target=target, why=str(why), **ids)
            case events.SpanFailed(span, error):
                log.warning("span_failed", span=str(span), error=redact_uri(error))
            case events.TwoWriters(span, stays, goes):
                log.error("two_writers", span=str(span), stays=stays, goes=goes)
            case events.FailoverBegan(captures, spans):
                log.warning("failover_began", captures=[*captures[:CAPTURES_NAMED_MAX]], gone=len(captures), spans=spans)
            case events.FailoverDone(spans, took_ms):
                log.info("failover_done", spans=spans, took_ms=took_ms)
            case events.GuardEngaged(waiting, left):
                log.warning("brake_on", spans_waiting=waiting, captures_left=left)
            case events.GuardReleased(captures):
                log.info("brake_off", captures=captures)
            case events.JobChanged(job) if job.state is QueryState.REFUSED:
                log.warning("job_ended", **_fields(job))
            case events.JobChanged(job):
                log.info("job_ended", **_fields(job))

    def write_counts(self, placed: Mapping[str, int], trouble: Mapping[str, int], jobs_ended: int) -> None:
        if trouble:
            self._log.warning("placement_trouble", **trouble)
        if jobs_ended:
            self._log.info("more_jobs_ended", jobs=jobs_ended)
        if placed:
            self._log.info("spans_placed", **placed)


def _fields(job: JobView) -> dict[str, Any]:
    moves = {} if job.moves_done is None else {"moves": job.moves_done}
    fields = {name: getattr(job, name) for name in ("kind", "subject", "target", "state", "reason")}
    return fields | _ids(job.id, job.asked_by) | moves


def _ids(job_id: int, asked_by: str) -> dict[str, str]:
    """Return the fields that join a line with the others of its job."""
    return {name: value for name, value in (("job", format_job_id(job_id)), ("by", asked_by)) if value}
