"""The thread-safe interface of the scheduler core: one object for each changefeed, ticked by the owner.

`tick` and `close` belong to the owner's tick thread. Every other method may be called from any
thread and never waits for a tick: a job is left to the next tick, and reads take what the last tick
published.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from owner.core.events import Event, JobChanged
from owner.core.jobs import CancelJob, CancelRequest, DrainJob, Job, JobReason, JobRequest, MoveJob, RebalanceJob
from owner.core.scheduler_config import SchedulerConfig
from owner.core.state import Core, Identity
from owner.core.tick import TickInput, tick
from owner.scheduling.dry_run import MovePlan, plan_rebalance
from owner.scheduling.publisher import Publisher
from owner.scheduling.snapshot import Snapshot, task_statuses
from tablewire.errors import ClosedError, ConcurrentTickError, InvariantError, UnknownCaptureError
from tablewire.model.columns import I64
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID, TableID, Ts
from tablewire.model.jobs import ENDED, JobView, new_job_id
from tablewire.model.messages import Transport
from tablewire.model.progress import BarrierWithMinTs, TaskStatus, Watermark
from tablewire.model.queries import Query
from tablewire.model.spans import Span
from tablewire.model.splitter import Splitter, WholeTables
from tablewire.model.states import QueryState

ENDED_JOBS_KEPT = 256
OPEN_JOBS_MAX = 10_000


class Scheduler(Protocol):
    """Assigns the spans of one changefeed to captures, and reports the global watermark."""

    def tick(
        self,
        checkpoint_ts: Ts,
        current_tables: Sequence[TableID],
        alive_captures: Mapping[CaptureID, CaptureInfo],
        barrier: BarrierWithMinTs,
    ) -> Watermark:
        """Run one step; never blocks. checkpoint_ts: the global one so far. current_tables: ints,
        or an int64 array (a read-only one is neither copied nor compared with itself).

        Return Watermark(0, 0, 0, 0) before bootstrap is done and while a current table has an
        uncovered part. ConcurrentTickError: another tick is running. ClosedError: after close.
        """
        ...

    def move_table(self, table_id: TableID, target: CaptureID) -> Query:
        """Request the move of all spans of a table; the next tick after bootstrap decides."""
        ...

    def rebalance(self) -> Query:
        """Request even loads by the fewest moves. A newer request replaces an older one."""
        ...

    def drain_capture(self, target: CaptureID) -> int:
        """Request that every span leaves a capture, and return how many have not; 0: safe to stop.
        It is at least 1 until a tick after bootstrap has seen the drain. Idempotent.
        UnknownCaptureError: the last tick did not know the capture."""
        ...

    def close(self) -> None: ...


class InfoProvider(Protocol):
    """The state of a scheduler, as the API shows it."""

    def is_initialized(self) -> bool: ...

    def get_task_statuses(self) -> Mapping[CaptureID, TaskStatus]: ...


def new_scheduler(
    *,
    owner_id: CaptureID,
    changefeed_id: ChangefeedID,
    owner_revision: int,
    changefeed_epoch: int,
    transport: Transport,
    config: SchedulerConfig = SchedulerConfig(),  # noqa: B008 - frozen
    clock: Callable[[], float] = time.monotonic,
    splitter: Splitter = WholeTables(),  # noqa: B008 - has no state
    cluster_load: Callable[[], Mapping[CaptureID, float]] | None = None,
) -> SchedulerAndInfo:
    """Return a scheduler for one changefeed in one term; starts no thread.

    owner_revision: etcd create-revision of the leader key. changefeed_epoch: grows with every
    (re)start. clock: seconds. cluster_load: the weight of the other changefeeds by capture, read
    once a tick.
    """
    identity = Identity(owner_id, changefeed_id, owner_revision, changefeed_epoch)
    return SchedulerAndInfo(Core(identity, config, splitter), transport, clock, cluster_load)


class SchedulerAndInfo(Scheduler, InfoProvider):
    """Both, and what the API, the CLI and tests need besides. asked_by: the caller, for logs and the
    history.

    Invariant: the tick's thread alone touches the core and the jobs in it. A caller makes a new
    Job, leaves it in `_requests` and keeps its Query; each tick takes the requests, and at its end
    updates the queries from its JobChanged events. A request stays in `_requests` until the tick
    that took it has published its snapshot, so that a reader sees it in one of the two.
    """

    def __init__(
        self,
        core: Core,
        transport: Transport,
        clock: Callable[[], float],
        cluster_load: Callable[[], Mapping[CaptureID, float]] | None,
    ) -> None:
        self._core = core
        self._transport = transport
        self._clock = clock
        self._cluster_load = cluster_load or dict
        self._ticking = threading.Lock()
        self._has_ticked = False
        self._closed = False
        self._publisher = Publisher(core)
        self._events: Sequence[Event] = ()
        self._lock = threading.Lock()  # guards the fields below
        self._requests: list[JobRequest] = []
        self._queries: dict[int, Query] = {}  # by job id, oldest first: open jobs, and the last that have ended
        self._ended: deque[int] = deque()

    # -- the tick's thread --------------------------------------------------------------------------------------------

    def tick(
        self,
        checkpoint_ts: Ts,
        current_tables: Sequence[TableID] | I64,
        alive_captures: Mapping[CaptureID, CaptureInfo],
        barrier: BarrierWithMinTs,
    ) -> Watermark:
        if not self._ticking.acquire(blocking=False):
            raise ConcurrentTickError("tick was called while another tick of this scheduler is running")
        try:
            if self._closed:
                raise ClosedError("tick was called on a closed scheduler")
            with self._lock:
                requests = tuple(self._requests)
            inputs = TickInput(
                now_ms=round(self._clock() * 1000),
                checkpoint_ts=checkpoint_ts,
                current_tables=_as_ids(current_tables),
                alive_captures=alive_captures,
                barrier=barrier,
                messages=self._transport.recv(),
                cluster_load=self._cluster_load(),
                requests=requests,
            )
            output = tick(self._core, inputs)
            self._transport.send(output.messages)
            self._publisher.publish(self._core, output.roles_changed)
            self._events, self._has_ticked = output.events, True
            with self._lock:
                del self._requests[: len(requests)]
                for event in output.events:
                    if isinstance(event, JobChanged):
                        self._update_query(event.job)
            return output.watermark
        finally:
            self._ticking.release()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._lock:
            for query in self._queries.values():
                query.update(replace(query.job, state=QueryState.CANCELLED, reason=JobReason.CLOSED.value))
        self._transport.close()

    def check(self) -> None:
        """Raise InvariantError if a row breaks an invariant; for tests, between ticks."""
        wrong = self._core.tables.check()
        if wrong:
            raise InvariantError(wrong[0], "; ".join(wrong[1:10]))

    # -- any thread ---------------------------------------------------------------------------------------------------

    def move_table(self, table_id: TableID, target: CaptureID, asked_by: str = "") -> Query:
        with self._lock:
            return self._request(MoveJob(id=self._new_id(), target=target, table_id=table_id, asked_by=asked_by))

    def move_span(self, span: Span, target: CaptureID, asked_by: str = "") -> Query:
        """Request that one span moves to a capture."""
        with self._lock:
            job = MoveJob(id=self._new_id(), target=target, table_id=span.table_id, span=span, asked_by=asked_by)
            return self._request(job)

    def rebalance(self, asked_by: str = "") -> Query:
        with self._lock:
            return self._request(RebalanceJob(id=self._new_id(), asked_by=asked_by))

    def plan_rebalance(self) -> MovePlan:
        """Return what a rebalance would move now, and the loads before and after it."""
        return plan_rebalance(self.snapshot())

    def drain_capture(self, target: CaptureID) -> int:
        with self._lock:
            self._refuse_closed()
            has_ticked, snapshot = self._has_ticked, self.snapshot()
            drain_id = self._drain_in_force(target, snapshot)
            if not drain_id:
                if has_ticked and target not in {capture.id for capture in snapshot.captures}:
                    raise UnknownCaptureError(f"processor {target} is unknown")
                self._request(DrainJob(id=self._new_id(), target=target))
        drain = snapshot.drains.get(target)
        if drain is not None and drain.job_id == drain_id and drain.spans_left is not None:
            return drain.spans_left
        return max(1, len(snapshot.touching(target)))

    def cancel_drain(self, target: CaptureID) -> Query:
        """Request the end of a drain; what has moved stays where it is. It is refused if the capture
        is not being drained."""
        with self._lock:
            drain_id = self._drain_in_force(target, self.snapshot())
            job = CancelJob(id=self._new_id(), target=target, cancelled_id=drain_id)
            if not drain_id:
                job.set(QueryState.REFUSED, JobReason.NOT_DRAINED.of(target=target))
            return self._request(job)

    def queries(self) -> Sequence[Query]:
        """Return the jobs, oldest first: the open ones, and a bounded number that have ended."""
        with self._lock:
            return tuple(self._queries.values())

    def snapshot(self) -> Snapshot:
        return self._publisher.latest()

    def events(self) -> Sequence[Event]:
        """Return what the last tick reported."""
        return self._events

    def is_initialized(self) -> bool:
        return self.snapshot().initialized

    def get_task_statuses(self) -> Mapping[CaptureID, TaskStatus]:
        return task_statuses(self.snapshot())

    # -- with the lock held -------------------------------------------------------------------------------------------

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError("the scheduler is closed")

    def _new_id(self) -> int:
        self._refuse_closed()
        return new_job_id(self._core.identity.owner_revision)

    def _request(self, job: Job) -> Query:
        """Leave the job to the next tick."""
        if isinstance(job, MoveJob | RebalanceJob) and len(self._queries) - len(self._ended) >= OPEN_JOBS_MAX:
            job.set(QueryState.REFUSED, JobReason.TOO_MANY_JOBS.of(limit=OPEN_JOBS_MAX))
        query = self._queries[job.id] = Query(job.view(), self._request_cancel)
        if query.state in ENDED:
            self._note_end(job.id)
        if query.state not in ENDED or len(self._requests) < OPEN_JOBS_MAX:
            self._requests.append(job)  # a refused one too, for the log and the metrics
        return query

    def _drain_in_force(self, target: CaptureID, snapshot: Snapshot) -> int:
        """Return the id of the drain of this capture once the requests have been taken, 0 = none."""
        drain = snapshot.drains.get(target)
        drain_id = drain.job_id if drain is not None else 0
        for request in self._requests:
            if isinstance(request, DrainJob) and request.target == target:
                drain_id = request.id
            elif isinstance(request, CancelJob | CancelRequest) and request.cancelled_id == drain_id:
                drain_id = 0
        return drain_id

    def _update_query(self, job: JobView) -> None:
        query = self._queries.get(job.id)
        if query is not None and query.state not in ENDED:
            query.update(job)
            if job.state in ENDED:
                self._note_end(job.id)

    def _note_end(self, job_id: int) -> None:
        self._ended.append(job_id)
        if len(self._ended) > ENDED_JOBS_KEPT:
            del self._queries[self._ended.popleft()]

    # -- any thread ---------------------------------------------------------------------------------------------------

    def _request_cancel(self, job_id: int) -> None:
        with self._lock:
            if not self._closed:
                self._requests.append(CancelRequest(job_id))


def _as_ids(current_tables: Sequence[TableID] | I64) -> I64:
    if isinstance(current_tables, np.ndarray):
        return current_tables.astype(np.int64, copy=False)
    tables = np.fromiter(current_tables, np.int64, len(current_tables))
    tables.flags.writeable = False
    return tables
