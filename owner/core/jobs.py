"""Manual jobs inside the core: what an operator asked for, worked on in every tick until it is done
or refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar

from tablewire.model.ids import CaptureID, TableID
from tablewire.model.jobs import ENDED, JobView
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState


class JobReason(Enum):
    """Why a job is pending, refused or cancelled. The value is the text, with the details to fill
    in."""

    NOT_SEEN = "not looked at yet"
    TOO_MANY_JOBS = "{limit} jobs are waiting already"
    NOT_DRAINED = "processor {target} is not being drained"
    SPAN_UNKNOWN = "{subject} is unknown"
    TARGET_UNKNOWN = "processor {target} is unknown"
    TARGET_DRAINED = "processor {target} is being drained"
    TARGET_UNINITIALIZED = "processor {target} has not reported yet"
    TARGET_SILENT = "processor {target} is silent"
    TARGET_STOPPING = "processor {target} is stopping"
    ALREADY_PRIMARY = "processor {target} is already the primary"
    TABLE_DROPPED = "table {table} was dropped"
    STILL_REMOVED = "span {span} was dropped and added again, and is still being removed"
    SPAN_HELD_BY_TARGET = "the target has not released span {span} yet"
    SPAN_HELD = "{captures} may still hold span {span}"
    SPAN_BUSY = "another task of span {span} is in progress ({state})"
    MOVES_BLOCKED = "{captures} has not reported since this owner started, and may hold any span"
    SOURCE_SILENT = "{source} is silent and cannot be stopped"
    LIMIT_REACHED = "the limit of {limit} concurrent moves is reached"
    PREPARE_FAILED = "{target} failed to prepare span {span} in {attempts} attempts{error}"
    TARGETS_FAILED = "{captures} failed to prepare {attempts} spans in a row"
    MOVE_REPLACED = "replaced by a newer move to {target}"
    REBALANCE_REPLACED = "replaced by a newer rebalance"
    CANCELLED = "cancelled"
    CANCELLED_TOO_LATE = "cancelled; span {span} can no longer be stopped and continues to the target"
    REBALANCE_CANCELLED = "cancelled; moves in progress will finish"
    SPANS_LEFT = "{spans} left{why}"
    CAPTURE_GONE = "the processor is gone"
    CLOSED = "the scheduler was closed"

    def of(self, **details: object) -> Reason:
        return Reason(self, self.value.format(**details))


@dataclass(frozen=True, slots=True)
class Reason:
    """A reason with its details filled in."""

    code: JobReason
    text: str


@dataclass(slots=True, kw_only=True)
class Job:
    """One manual job. The tick's thread alone changes it; its state and reason stay as they are
    once it has ended."""

    kind: ClassVar[QueryKind]
    id: int
    target: CaptureID | None = None
    asked_by: str = ""
    state: QueryState = QueryState.PENDING
    reason: Reason | None = field(default_factory=JobReason.NOT_SEEN.of)
    moves_done: int = 0
    changed: bool = True  # since the last JobChanged

    def set(self, state: QueryState, reason: Reason | None = None) -> None:
        if self.state not in ENDED and (state, reason) != (self.state, self.reason):
            self.state, self.reason, self.changed = state, reason, True

    def count_move(self) -> None:
        """Count a move that ended, unless the end of the job was reported before."""
        if self.state not in ENDED or self.changed:
            self.moves_done, self.changed = self.moves_done + 1, True

    def view(self) -> JobView:
        return JobView(
            self.id,
            self.kind,
            self.target,
            state=self.state,
            reason=self.reason.text if self.reason is not None else "",
            asked_by=self.asked_by,
        )


@dataclass(slots=True, kw_only=True)
class MoveJob(Job):
    """Brings all spans of a table, or one of them, to a capture."""

    kind = QueryKind.MOVE
    target: CaptureID
    table_id: TableID
    span: Span | None = None
    cancel_requested: bool = False
    numbers: list[int] | None = None  # of the rows; None until a tick has accepted the job
    attempts: dict[int, int] = field(default_factory=dict)  # prepares that were started, by row

    def view(self) -> JobView:
        return replace(Job.view(self), table_id=self.table_id, span=self.span)


@dataclass(slots=True, kw_only=True)
class DrainJob(Job):
    """Moves everything away from a capture. It is in force until it is cancelled or the capture is
    gone, even when done."""

    kind = QueryKind.DRAIN
    target: CaptureID
    spans_left: int | None = None  # that touch the capture; None until a tick after bootstrap has counted them


@dataclass(slots=True, kw_only=True)
class RebalanceJob(Job):
    """Evens the loads out by the fewest moves; ends when there is nothing left to move."""

    kind = QueryKind.REBALANCE
    cancel_requested: bool = False
    moves_left: int = 0  # in progress and planned

    def view(self) -> JobView:
        return replace(Job.view(self), moves_done=self.moves_done, moves_left=self.moves_left)


@dataclass(slots=True, kw_only=True)
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
