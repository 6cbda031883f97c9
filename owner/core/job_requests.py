"""The jobs at the edges of a tick: what was asked for since the last one, and what has changed by
its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from owner.core.events import JobChanged
from owner.core.jobs import CancelJob, CancelRequest, DrainJob, Job, JobReason, JobRequest, MoveJob, RebalanceJob
from owner.core.state import Core
from tablewire.model.jobs import ENDED
from tablewire.model.states import QueryState


def take_requests(core: Core, requests: Sequence[JobRequest]) -> Iterable[Job]:
    """Take the jobs that were asked for since the last tick; return every job that may change in
    this one."""
    rebalance = core.balancer.job
    jobs = {job.id: job for job in (*core.moves, *core.drains.values(), *([rebalance] if rebalance is not None else []))}
    for request in requests:
        if isinstance(request, CancelRequest):
            _cancel(core, jobs.get(request.cancelled_id))
            continue
        jobs[request.id] = request
        if request.state in ENDED:
            continue  # it was refused when it was asked for, and has only to be reported
        match request:
            case MoveJob():
                core.moves.append(request)
            case DrainJob():
                core.drains[request.target] = request
            case RebalanceJob():
                if core.balancer.job is not None:
                    core.balancer.job.set(QueryState.CANCELLED, JobReason.REBALANCE_REPLACED.of())
                core.balancer.job = request
            case CancelJob():
                _cancel(core, jobs.get(request.cancelled_id))
                request.set(QueryState.DONE)
    return jobs.values()


def _cancel(core: Core, job: Job | None) -> None:
    if isinstance(job, MoveJob | RebalanceJob):
        job.cancel_requested = True
    elif isinstance(job, DrainJob):
        job.set(QueryState.CANCELLED, JobReason.CANCELLED.of())
        if core.drains.get(job.target) is job:
            del core.drains[job.target]


def take_changes(core: Core, jobs: Iterable[Job]) -> list[JobChanged]:
    """Return the jobs that have changed since the last call."""
    changes = []
    for job in jobs:
        if isinstance(job, RebalanceJob):
            _count_moves_left(core, job)
        if job.changed:
            job.changed = False
            changes.append(JobChanged(job.view()))
    return changes


def _count_moves_left(core: Core, job: RebalanceJob) -> None:
    """Count the moves of a rebalance that are in progress, and those of its present plan."""
    left = 0
    if job.state not in ENDED:
        left = len(core.balancer.planned) + sum(origin.job is job for origin in core.tables.origin.values())
    if left != job.moves_left:
        job.moves_left, job.changed = left, True
