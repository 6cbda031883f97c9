"""Manual jobs of a scheduler (moves, rebalances, drains), as they are followed and listed. Any thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from owner.admin.errors import RefusedError
from owner.admin.ports import OwnerPort
from owner.admin.resolve import scheduler_of
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.queries import ENDED, job_id
from tablewire.model.states import QueryState
from tablewire.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from owner.scheduling.scheduler import Query, SchedulerAndInfo

JOB_POLL_S = 0.05
JOB_WAIT_S_MAX = 24 * 3_600.0


class Job:
    """One manual job of a scheduler, as it is followed by the call that asked for it."""

    def __init__(
        self,
        owner: OwnerPort,
        changefeed: ChangefeedID,
        scheduler: SchedulerAndInfo,
        query: Query,
        target: str,
        capture: CaptureID,
    ) -> None:
        self._owner = owner
        self._changefeed = changefeed
        self._scheduler = scheduler
        self._query = query
        self._target = target
        self._capture = capture

    def row(self) -> pb.Job:
        return _row(self._changefeed, self._query, self._target, self._capture)

    def note_asked(self, by: str) -> None:
        """Tells the log and the history of it, before it is looked at. by: who asked."""
        query = self._query
        query.asked_by = by
        where = f"to {self._capture}" if self._capture else ""
        term = self._owner.term
        if term is not None:
            ids = {"changefeed": str(self._changefeed), "job": job_id(query.number), "by": by}
            term.history.tell(f"{query.kind}_requested", subject=self._target if self._capture else "", text=where, **ids)

    def follow(
        self,
        *,
        until_done: bool,
        timeout_s: float,
        is_wanted: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> Iterator[pb.Job]:
        """As `follow`, of this job alone."""
        return follow([self], until_done=until_done, timeout_s=timeout_s, is_wanted=is_wanted, clock=clock)

    def wait(self, timeout_s: float) -> None:
        """Until it has ended, at most so long."""
        self._query.wait(timeout_s)

    def check_alive(self) -> None:
        """RefusedError when its scheduler does not run here any more: nobody will ever end it."""
        if scheduler_of(self._owner, self._changefeed) is not self._scheduler:
            last = self.row()
            raise RefusedError(
                f"{last.kind} of {last.target}: {last.state} when changefeed {self._changefeed} stopped running here "
                "(it was paused or restarted, or another owner leads now); look where the table is, and ask again"
            )


def follow(
    jobs: Sequence[Job],
    *,
    until_done: bool,
    timeout_s: float,
    is_wanted: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[pb.Job]:
    """Each job at once and at each change, until all have ended (or, not until_done, are decided), timeout_s are over or nobody
    wants to know. Jobs go on whatever happens here. RefusedError when the scheduler of one stopped before that."""
    deadline = clock() + min(timeout_s, JOB_WAIT_S_MAX)
    goals = ENDED if until_done else ENDED | {QueryState.ACCEPTED}
    last = {job: job.row() for job in jobs}
    yield from last.values()
    while (open_jobs := [job for job, row in last.items() if row.state not in goals]) and is_wanted():
        left_s = deadline - clock()
        if left_s <= 0:
            return
        open_jobs[0].wait(min(left_s, JOB_POLL_S))
        for job in open_jobs:
            row = job.row()
            if row != last[job]:
                last[job] = row
                yield row
            else:
                job.check_alive()


def jobs_under_way(changefeed: ChangefeedID, scheduler: SchedulerAndInfo) -> list[pb.Job]:
    rows = []
    for query in scheduler.queries():
        if query.state not in ENDED:
            target, capture = query.subject, query.target or ""
            rows.append(_row(changefeed, query, target or capture, capture))
    return rows


def _row(changefeed: ChangefeedID, query: Query, target: str, capture: CaptureID) -> pb.Job:
    return pb.Job(
        changefeed=str(changefeed),
        kind=query.kind,
        target=target,
        capture=capture,
        state=query.state,
        reason=query.reason,
        id=job_id(query.number),
        by=query.asked_by,
        moves_done=query.moves_done,
        moves_left=query.moves_left,
    )
