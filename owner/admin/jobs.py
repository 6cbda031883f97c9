"""The manual jobs (moves, rebalances, drains) that the API follows and lists. Any thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owner.admin.errors import RefusedError
from owner.admin.ports import OwnerPort
from owner.admin.resolve import scheduler_of
from tablewire.model.ids import ChangefeedID
from tablewire.model.jobs import ENDED, JobView, format_job_id
from tablewire.model.states import QueryState
from tablewire.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from owner.scheduling.scheduler import SchedulerAndInfo
    from tablewire.model.queries import Query

JOB_POLL_S = 0.05
JOB_WAIT_S_MAX = 24 * 3_600.0


@dataclass(frozen=True, slots=True, eq=False)
class FollowedJob:
    """A job that a call asked for. subject: the name of the table or changefeed that it is about."""

    owner: OwnerPort
    changefeed: ChangefeedID
    scheduler: SchedulerAndInfo
    query: Query
    subject: str

    def row(self) -> pb.Job:
        return _row(self.changefeed, self.query.job, self.subject)

    def record_request(self) -> None:
        """Record in the log and the history that the job was asked for."""
        job, term = self.query.job, self.owner.term
        if term is not None:
            subject, text = (self.subject, f"to {job.target}") if job.target else ("", "")
            ids = {"changefeed": str(self.changefeed), "job": format_job_id(job.id), "by": job.asked_by}
            term.history.add_and_log(f"{job.kind}_requested", subject=subject, text=text, **ids)

    def check_alive(self) -> None:
        """Raise RefusedError if the scheduler of the job no longer runs here: the job will never end."""
        if scheduler_of(self.owner, self.changefeed) is not self.scheduler:
            raise RefusedError(
                f"{self.query.kind} of {self.subject}: {self.query.state} when changefeed {self.changefeed} stopped running here "
                "(it was paused or restarted, or another owner leads now); check `owner table list` and try again"
            )


def follow(
    jobs: Sequence[FollowedJob], *, until_done: bool, timeout_s: float, is_wanted: Callable[[], bool] = lambda: True
) -> Iterator[pb.Job]:
    """Yield each job at once and at each change of it.

    Stop when all jobs have ended (or, not until_done, are decided), after timeout_s, or when the
    caller has gone (not is_wanted); the jobs continue. Raise RefusedError when the scheduler of an
    open job has stopped.
    """
    deadline = time.monotonic() + min(timeout_s, JOB_WAIT_S_MAX)
    goals = ENDED if until_done else ENDED | {QueryState.ACCEPTED}
    last = {job: job.row() for job in jobs}
    yield from last.values()
    while (open_jobs := [job for job, row in last.items() if row.state not in goals]) and is_wanted():
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return
        open_jobs[0].query.wait(min(remaining_s, JOB_POLL_S))
        for job in open_jobs:
            row = job.row()
            if row != last[job]:
                last[job] = row
                yield row
            else:
                job.check_alive()


def open_jobs(changefeed: ChangefeedID, scheduler: SchedulerAndInfo) -> list[pb.Job]:
    """Return the jobs of a changefeed that have not ended."""
    jobs = [query.job for query in scheduler.queries() if query.state not in ENDED]
    return [_row(changefeed, job, job.subject or job.target or "") for job in jobs]


def _row(changefeed: ChangefeedID, job: JobView, subject: str) -> pb.Job:
    return pb.Job(
        changefeed=str(changefeed),
        kind=job.kind,
        target=subject,
        capture=job.target or "",
        state=job.state,
        reason=job.reason,
        id=format_job_id(job.id),
        by=job.asked_by,
        moves_done=job.moves_done,
        moves_left=job.moves_left,
    )
