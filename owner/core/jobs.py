"""Manual jobs: what operators ask for. A tick takes the new requests, its policies work on all jobs,
and at its end it reports each job that has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, TypeVar

from owner.core.events import JobChanged
from tablewire.model.ids import CaptureID, TableID
from tablewire.model.jobs import ENDED, JobView
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState


class JobReason(Enum):
    """Why a job is pending, refused or cancelled. The value is the text, with fields for details."""

    NOT_SEEN = "not considered yet"
    TOO_MANY_JOBS = "{limit} jobs are already pending"
    NOT_DRAINED = "processor {target} is not being drained"
    SPAN_UNKNOWN = "{subject} is unknown"
    TARGET_UNKNOWN = "processor {target} is unknown"
    TARGET_DRAINED = "processor {target} is being drained"
    TARGET_UNINITIALIZED = "processor {target} has not reported yet"
    TARGET_SILENT = "processor {target} is silent"
    TARGET_STOPPING = "processor {target} is stopping"
    ALREADY_PRIMARY = "processor {target} is already the primary"
    TABLE_DROPPED = "table {table} was dropped"
    STILL_REMOVED = "table {span} was dropped and added again, and is still being removed"
    SPAN_HELD_BY_TARGET = "the target has not released table {span} yet"
    SPAN_HELD = "{captures} may still hold table {span}"
    SPAN_BUSY = "another task of table {span} is in progress ({state})"
    MOVES_BLOCKED = "waiting for the first report of {captures}, which may hold any table"
    SOURCE_SILENT = "{source} is silent and cannot be stopped"
    LIMIT_REACHED = "the limit of {limit} concurrent moves is reached"
    PREPARE_FAILED = "{target} failed to prepare table {span} in {attempts} attempts{error}"
    TARGETS_FAILED = "{captures} failed to prepare {attempts} tables in a row"
    MOVE_REPLACED = "replaced by a newer move to {target}"
    REBALANCE_REPLACED = "replaced by a newer rebalance"
    CANCELLED = "cancelled"
    CANCELLED_TOO_LATE = "cancelled; table {span} can no longer be stopped and continues to the target"
    REBALANCE_CANCELLED = "cancelled; moves in progress will finish"
    SPANS_LEFT = "{tables} left{why}"
    CAPTURE_GONE = "the processor is gone"
    CLOSED = "the scheduler was closed"

    def of(self, **details: object) -> Reason:
        return Reason(self, self.value.format(**details))


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason with its details filled in."""

    code: JobReason
    text: str


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One manual job. The tick's thread alone changes it; its state and reason stay as they are
    once it has ended."""

    kind: ClassVar[QueryKind]
    id: int
    target: CaptureID | None = None
    asked_by: str = ""
    state: QueryState = QueryState.PENDING
    reason: Reason | None = field(default_factory=JobReason.NOT_SEEN.of)
    cancel_requested: bool = False  # of a move or a rebalance, which end at their next turn
    reported: JobView | None = None

    def set(self, state: QueryState, reason: Reason | None = None) -> None:
        if self.state not in ENDED:
            self.state, self.reason = state, reason

    def view(self) -> JobView:
        reason = self.reason.text if self.reason is not None else ""
        return JobView(self.id, self.kind, self.target, state=self.state, reason=reason, asked_by=self.asked_by)


@dataclass(slots=True, kw_only=True, eq=False)
class MoveJob(Job):
    """Brings all spans of a table, or one of them, to a capture."""

    kind = QueryKind.MOVE
    target: CaptureID
    table_id: TableID
    span: Span | None = None
    numbers: list[int] | None = None  # of the rows; None until a tick has accepted the job
    attempts: dict[int, int] = field(default_factory=dict)  # prepares that were started, by row

    def view(self) -> JobView:
        return replace(Job.view(self), table_id=self.table_id, span=self.span)


@dataclass(slots=True, kw_only=True, eq=False)
class DrainJob(Job):
    """Moves everything away from a capture. It is in force until it is cancelled or the capture is
    gone, even when done."""

    kind = QueryKind.DRAIN
    target: CaptureID
    spans_left: int | None = None  # that touch the capture; None until a tick after bootstrap has counted them


@dataclass(slots=True, kw_only=True, eq=False)
class RebalanceJob(Job):
    """Evens the loads out by the fewest moves; ends when there is nothing left to move."""

    kind = QueryKind.REBALANCE
    moves_done: int = 0
    moves_left: int = 0  # in progress and planned

    def view(self) -> JobView:
        left = 0 if self.state in ENDED else self.moves_left
        return replace(Job.view(self), moves_done=self.moves_done, moves_left=left)


@dataclass(slots=True, kw_only=True, eq=False)
class CancelJob(Job):
    """Ends a drain. cancelled_id: of the drain, 0 = there is none."""

    kind = QueryKind.CANCEL
    target: CaptureID
    cancelled_id: int


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Asks for the end of a job."""

    cancelled_id: int


JobRequest = Job | CancelRequest
SomeJob = TypeVar("SomeJob", bound=Job)


class Jobs:
    """The jobs that have not ended, and the drains in force."""

    def __init__(self) -> None:
        self.drains: dict[CaptureID, DrainJob] = {}  # in force, by target
        self._by_id: dict[int, Job] = {}  # in the order of the requests

    def open(self, kind: type[SomeJob]) -> list[SomeJob]:
        """Return the jobs of one kind that have not ended, oldest first."""
        return [job for job in self._by_id.values() if isinstance(job, kind) and job.state not in ENDED]

    def take(self, requests: Sequence[JobRequest]) -> None:
        """Take the requests that came since the last tick, in their order. A job that was refused
        at once has only to be reported."""
        for request in requests:
            if isinstance(request, CancelRequest):
                self._cancel(request.cancelled_id)
                continue
            self._by_id[request.id] = request
            if isinstance(request, DrainJob):
                self.drains[request.target] = request
            elif isinstance(request, CancelJob):
                self._cancel(request.cancelled_id)
                request.set(QueryState.DONE)

    def report(self) -> list[JobChanged]:
        """Return the jobs that have changed since the last call, and forget those that are over."""
        changes = []
        for job in self._by_id.values():
            view = job.view()
            if view != job.reported:
                job.reported = view
                changes.append(JobChanged(view))
        self._by_id = {job.id: job for job in self._by_id.values() if job.state not in ENDED or self._is_in_force(job)}
        return changes

    def _cancel(self, job_id: int) -> None:
        job = self._by_id.get(job_id)
        if job is None:
            return
        job.cancel_requested = True
        if isinstance(job, DrainJob) and self._is_in_force(job):
            job.set(QueryState.CANCELLED, JobReason.CANCELLED.of())
            del self.drains[job.target]

    def _is_in_force(self, job: Job) -> bool:
        return isinstance(job, DrainJob) and self.drains.get(job.target) is job
