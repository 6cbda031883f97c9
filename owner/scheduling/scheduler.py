"""The thread-safe face of the scheduler: one object a changefeed, ticked by the owner, asked by everybody.

`tick` and `close` belong to the owner's tick thread; every other method may be called from any thread. Jobs are handed over to
the next tick and answered through their Query; reads take the snapshot that the last tick left, and never wait for a tick.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from owner.core.jobs import DrainJob, MoveJob, PlannedMove, RebalanceJob, RebalancePlan
from owner.core.scheduler_config import SchedulerConfig
from owner.core.state import Core, Identity
from owner.core.tick import Facts, TickInput, tick
from owner.scheduling.job_ids import JobNumbers, moves_ahead
from owner.scheduling.publisher import Publisher
from owner.scheduling.snapshot import Snapshot, task_statuses
from tablewire.errors import ClosedError, ConcurrentTickError, InvariantError, UnknownCaptureError
from tablewire.model.columns import I64
from tablewire.model.ids import CHECKPOINT_CANNOT_PROCEED, CaptureID, CaptureInfo, ChangefeedID, TableID, Ts
from tablewire.model.messages import Transport
from tablewire.model.progress import Barrier, BarrierWithMinTs, CaptureView, SpanView, TaskStatus, Watermark
from tablewire.model.queries import ENDED, Query, new_job_number
from tablewire.model.spans import Span
from tablewire.model.splitter import HashRanges, Splitter, WholeTables
from tablewire.model.states import QueryKind, QueryState

__all__ = [
    "CHECKPOINT_CANNOT_PROCEED",
    "CaptureView",
    "HashRanges",
    "InfoProvider",
    "PlannedMove",
    "Query",
    "Scheduler",
    "SchedulerAndInfo",
    "SchedulerConfig",
    "Snapshot",
    "SpanView",
    "Splitter",
    "WholeTables",
    "new_scheduler",
]

QUERIES_KEPT = 256
JOBS_WAITING_MAX = 10_000


class Scheduler(Protocol):
    """Assigns the spans of one changefeed, and reports its global watermark."""

    def tick(
        self,
        checkpoint_ts: Ts,
        current_tables: Sequence[TableID],
        alive_captures: Mapping[CaptureID, CaptureInfo],
        barrier: BarrierWithMinTs,
    ) -> Watermark:
        """One step; never blocks. checkpoint_ts: the global one so far. current_tables: ints, or an int64 array (a read-only
        one is neither copied nor compared with itself).

        Watermark(0, 0, 0, 0) before bootstrap is done and while a current table has a part that nothing covers. Raises
        ConcurrentTickError when called twice at once, ClosedError after close; expected trouble never raises.
        """
        ...

    def move_table(self, table_id: TableID, target: CaptureID) -> Query:
        """Asks for all spans of a table at a capture. Returns at once; the next tick after bootstrap decides."""
        ...

    def rebalance(self) -> Query: ...

    def drain_capture(self, target: CaptureID) -> int:
        """Asks that every span leave a capture; how many still touch it. At least 1 until a tick after bootstrap has taken the
        drain in; 0 = safe to stop. Idempotent. UnknownCaptureError for a capture that the last tick did not know."""
        ...

    def close(self) -> None: ...


class InfoProvider(Protocol):
    """What the API shows of a scheduler."""

    def is_initialized(self) -> bool: ...

    def get_task_statuses(self) -> Mapping[CaptureID, TaskStatus]: ...


class SchedulerAndInfo(Scheduler, InfoProvider, Protocol):
    """Both, and what API, CLI and tests ask beside them."""

    def snapshot(self) -> Snapshot: ...

    def move_span(self, span: Span, target: CaptureID) -> Query: ...

    def cancel_drain(self, target: CaptureID) -> Query: ...

    def plan_rebalance(self) -> Sequence[PlannedMove]: ...

    def queries(self) -> Sequence[Query]: ...

    def facts(self) -> Facts | None: ...


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
    """A scheduler for one changefeed in one owner term. Starts no thread.

    owner_revision: etcd create-revision of the leader key. changefeed_epoch: bumped at every (re)start. clock: seconds.
    cluster_load: the weight of the other changefeeds by capture, read once a tick.
    """
    identity = Identity(owner_id, changefeed_id, owner_revision, changefeed_epoch)
    return _Scheduler(Core(identity, config, splitter), transport, clock, cluster_load)


@dataclass(frozen=True, slots=True)
class _CancelDrain:
    target: CaptureID
    query: Query
    drain: Query  # that ends by it


class _Scheduler:
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
        self._cluster_load = cluster_load
        self._ticking = threading.Lock()
        self._closed = False
        self._lock = threading.Lock()  # of what stands below
        self._waiting: deque[MoveJob | DrainJob | RebalanceJob | _CancelDrain] = deque()
        self._cancels: deque[Query] = deque()
        self._queries: deque[Query] = deque()  # every job that has not ended, and so many that have
        self._drains: dict[CaptureID, Query] = {}  # standing, by target
        self._jobs: dict[Query, MoveJob | DrainJob | RebalanceJob] = {}
        self._publisher = Publisher()
        self._facts: Facts | None = None
        nothing = BarrierWithMinTs(Barrier(0), 0)
        core.barrier = nothing
        self._publisher.publish(core, True)
        self._ticked = False

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
            tables = _as_ids(current_tables)
            self._take_jobs()
            jobs = JobNumbers(self._core)
            rebalance = self._core.balancer.job
            output = tick(
                self._core,
                TickInput(
                    now_ms=round(self._clock() * 1000),
                    checkpoint_ts=checkpoint_ts,
                    current_tables=tables,
                    alive_captures=alive_captures,
                    barrier=barrier,
                    messages=self._transport.recv(),
                    cluster_load=self._cluster_load() if self._cluster_load is not None else {},
                ),
            )
            self._transport.send(jobs.name_orders(output.messages))
            self._facts = jobs.name_placements(output.facts)
            if rebalance is not None:
                self._note_progress(rebalance, output.facts)
            self._publisher.publish(self._core, output.roles_changed)
            self._ticked = True
            self._settle()
            return output.watermark
        finally:
            self._ticking.release()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._lock:
            for query in self._queries:
                query.settle(QueryState.CANCELLED, "the scheduler was closed")
            self._jobs.clear()
        self._transport.close()

    def check(self) -> None:
        """Raises InvariantError when a row breaks an invariant; for tests and simulation, between ticks."""
        wrong = self._core.tables.check()
        if wrong:
            raise InvariantError(wrong[0], "; ".join(wrong[1:10]))

    # -- any thread ---------------------------------------------------------------------------------------------------

    def move_table(self, table_id: TableID, target: CaptureID) -> Query:
        return self._move(table_id, None, target, f"table {table_id}")

    def move_span(self, span: Span, target: CaptureID) -> Query:
        """Asks for one span at a capture."""
        return self._move(span.table_id, span, target, f"span {span}")

    def rebalance(self) -> Query:
        """Asks for even loads by the fewest moves; DONE when nothing is left. A newer one replaces an older one."""
        with self._lock:
            self._refuse_closed()
            query = self._new_query(QueryKind.REBALANCE, None, on_cancel=self._ask_cancel)
            self._enqueue(RebalanceJob(query.number), query)
        return query

    def plan_rebalance(self) -> RebalancePlan:
        """What a rebalance would move now, and the loads before and after; changes nothing."""
        return self._publisher.latest().plan_rebalance()

    def drain_capture(self, target: CaptureID) -> int:
        snapshot = self._publisher.latest()
        with self._lock:
            self._refuse_closed()
            query = self._drains.get(target)
            if query is None:
                if self._ticked and target not in {capture.id for capture in snapshot.captures}:
                    raise UnknownCaptureError(f"capture {target} is unknown")
                query = self._new_query(QueryKind.DRAIN, target, on_cancel=self._cancel_drain_query)
                self._drains[target] = query
                self._enqueue(DrainJob(query.number, target), query)
                return max(1, self._core_left(target))
            job = self._jobs.get(query)
            if not isinstance(job, DrainJob) or not job.taken_in:
                return max(1, self._core_left(target))
            return job.left

    def cancel_drain(self, target: CaptureID) -> Query:
        """Asks that a drain end; what has moved stays where it is. Refused when there is none."""
        query = self._new_query(QueryKind.CANCEL, target, "drain")
        with self._lock:
            self._refuse_closed()
            self._remember(query)
            drain = self._drains.pop(target, None)  # who asks for a drain from here on gets a new one
            if drain is None:
                query.settle(QueryState.REFUSED, f"capture {target} is not being drained")
            else:
                self._waiting.append(_CancelDrain(target, query, drain))
        return query

    def queries(self) -> Sequence[Query]:
        """The jobs that were asked for, oldest first; a bounded number of ended ones is kept."""
        with self._lock:
            return tuple(self._queries)

    def snapshot(self) -> Snapshot:
        return self._publisher.latest()

    def facts(self) -> Facts | None:
        """What happened in the last tick; None before the first."""
        return self._facts

    def is_initialized(self) -> bool:
        return self._publisher.latest().initialized

    def get_task_statuses(self) -> Mapping[CaptureID, TaskStatus]:
        return task_statuses(self._publisher.latest())

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _move(self, table_id: TableID, span: Span | None, target: CaptureID, subject: str) -> Query:
        query = self._new_query(QueryKind.MOVE, target, subject, on_cancel=self._ask_cancel)
        with self._lock:
            self._refuse_closed()
            if len(self._jobs) >= JOBS_WAITING_MAX:
                query.settle(QueryState.REFUSED, f"{JOBS_WAITING_MAX} jobs are waiting already")
                self._remember(query)
            else:
                self._enqueue(MoveJob(query.number, table_id, span, target), query)
        return query

    def _enqueue(self, job: MoveJob | DrainJob | RebalanceJob, query: Query) -> None:
        self._jobs[query] = job
        self._waiting.append(job)
        self._remember(query)

    def _remember(self, query: Query) -> None:
        self._queries.append(query)
        if len(self._queries) > JOBS_WAITING_MAX + QUERIES_KEPT:
            self._forget_ended()

    def _forget_ended(self) -> None:
        """Of the jobs that have ended only the last ones are kept."""
        surplus = len(self._queries) - QUERIES_KEPT
        if surplus > 0:
            surplus = sum(query.state in ENDED for query in self._queries) - QUERIES_KEPT
        if surplus > 0:
            ended = [query for query in self._queries if query.state in ENDED][:surplus]
            forgotten = set(map(id, ended))
            self._queries = deque(query for query in self._queries if id(query) not in forgotten)

    def _new_query(
        self, kind: QueryKind, target: CaptureID | None, subject: str = "", on_cancel: Callable[[Query], None] | None = None
    ) -> Query:
        number = new_job_number(self._core.identity.owner_revision)
        return Query(kind, target, subject, number=number, on_cancel=on_cancel)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError("the scheduler is closed")

    def _ask_cancel(self, query: Query) -> None:
        with self._lock:
            self._cancels.append(query)

    def _cancel_drain_query(self, query: Query) -> None:
        if query.target is not None and self._drains.get(query.target) is query:
            self.cancel_drain(query.target)

    def _core_left(self, target: CaptureID) -> int:
        for index, capture_id in self._publisher.latest().capture_ids.items():
            if capture_id == target:
                return self._publisher.latest().touching(index)
        return 0

    def _take_jobs(self) -> None:
        """What was asked for since the last tick, into the core."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            cancels, self._cancels = self._cancels, deque()
            for job in waiting:
                if isinstance(job, MoveJob):
                    self._core.moves.append(job)
                elif isinstance(job, DrainJob):
                    self._core.drains[job.target] = job
                elif isinstance(job, RebalanceJob):
                    self._begin_rebalance(job)
                else:
                    self._end_drain(job)
            for query in cancels:
                asked = self._jobs.get(query)
                if isinstance(asked, MoveJob | RebalanceJob):
                    asked.cancel_requested = True

    def _begin_rebalance(self, job: RebalanceJob) -> None:
        """A rebalance that is still under way is replaced: the newer one starts from what is now."""
        former = self._core.balancer.job
        if former is not None:
            former.end(QueryState.CANCELLED, "a newer rebalance took its place")
        self._core.balancer.job = job

    def _note_progress(self, job: RebalanceJob, facts: Facts) -> None:
        """What a rebalance has moved, and what of its present plan is left; when it ends nothing is."""
        with self._lock:
            query = next((query for query, one in self._jobs.items() if one is job), None)
        if query is not None:
            query.moves_done = (query.moves_done or 0) + facts.placed.get("balance", 0)
            query.moves_left = 0 if job.state in ENDED else moves_ahead(self._core)

    def _end_drain(self, cancel: _CancelDrain) -> None:
        drain = self._core.drains.pop(cancel.target, None)
        if drain is not None:
            drain.end(QueryState.CANCELLED, "cancelled")
        cancel.drain.settle(QueryState.CANCELLED, "cancelled")
        self._jobs.pop(cancel.drain, None)
        cancel.query.settle(QueryState.DONE, "")

    def _settle(self) -> None:
        """What the tick made of the jobs, out to their queries."""
        with self._lock:
            for query, job in list(self._jobs.items()):
                query.settle(job.state, job.reason)
                standing = isinstance(job, DrainJob) and self._core.drains.get(job.target) is job
                if job.state in ENDED and not standing:
                    del self._jobs[query]
                    if isinstance(job, DrainJob) and self._drains.get(job.target) is query:
                        del self._drains[job.target]
            self._forget_ended()


def _as_ids(current_tables: Sequence[TableID] | I64) -> I64:
    if isinstance(current_tables, np.ndarray):
        return current_tables.astype(np.int64, copy=False)
    tables = np.fromiter(current_tables, np.int64, len(current_tables))
    tables.flags.writeable = False
    return tables
