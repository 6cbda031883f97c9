"""Manual jobs of a scheduler (moves, rebalances, drains), as they are followed and listed. Any thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from owner.answers import JobRow, RefusedError
from owner.view import OwnerView
from tablewire.queries import ENDED
from tablewire.types import CaptureID, ChangefeedID, QueryState

if TYPE_CHECKING:
    from owner.scheduler import Query, SchedulerAndInfo

JOB_POLL_S = 0.05
JOB_WAIT_S_MAX = 24 * 3_600.0


class Job:
    """One manual job of a scheduler, as it is followed by the call that asked for it."""

    def __init__(
        self,
        view: OwnerView,
        changefeed: ChangefeedID,
        scheduler: SchedulerAndInfo,
        query: Query,
        target: str,
        capture: CaptureID,
    ) -> None:
        self._view = view
        self._changefeed = changefeed
        self._scheduler = scheduler
        self._query = query
        self._target = target
        self._capture = capture

    def row(self) -> JobRow:
        query = self._query
        return JobRow(str(self._changefeed), query.kind, self._target, self._capture, query.state, query.reason)

    def follow(
        self,
        *,
        until_done: bool,
        timeout_s: float,
        is_wanted: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> Iterator[JobRow]:
        """The job at once and at each change, until it has ended (or, not until_done, is decided), timeout_s are over or
        nobody wants to know. The job goes on whatever happens here. RefusedError when its scheduler stopped before that."""
        deadline = clock() + min(timeout_s, JOB_WAIT_S_MAX)
        goals = ENDED if until_done else ENDED | {QueryState.ACCEPTED}
        last = self.row()
        yield last
        while last.state not in goals and is_wanted():
            left_s = deadline - clock()
            if left_s <= 0:
                return
            self._query.wait(min(left_s, JOB_POLL_S))
            row = self.row()
            if row != last:
                last = row
                yield row
            elif self._view.scheduler(self._changefeed) is not self._scheduler:
                raise RefusedError(
                    f"{last.kind} of {last.target}: {last.state} when changefeed {self._changefeed} stopped running here "
                    "(it was paused or restarted, or another owner leads now); look where the table is, and ask again"
                )


def jobs_under_way(changefeed: ChangefeedID, scheduler: SchedulerAndInfo) -> list[JobRow]:
    rows = []
    for query in scheduler.queries():
        if query.state not in ENDED:
            target, capture = query.subject, query.target or ""
            rows.append(JobRow(str(changefeed), query.kind, target or capture, capture, query.state, query.reason))
    return rows
