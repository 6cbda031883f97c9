"""Manual jobs of the owner (move, rebalance, drain, cancel) as values: ids and views."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tablewire.model.ids import CaptureID, TableID
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState

ENDED = frozenset({QueryState.REFUSED, QueryState.DONE, QueryState.CANCELLED})

_COUNT_BITS = 20
_counter = itertools.count(1)


def new_job_id(owner_revision: int) -> int:
    """Return an id that no other job of the cluster has: term and number in it. Any thread."""
    return owner_revision << _COUNT_BITS | next(_counter) & (1 << _COUNT_BITS) - 1


def format_job_id(job_id: int) -> str:
    """Return the id as logs and operators see it, such as `7-12`; empty for 0, which means no job."""
    return f"{job_id >> _COUNT_BITS}-{job_id & (1 << _COUNT_BITS) - 1}" if job_id else ""


@dataclass(frozen=True, slots=True)
class JobView:
    """One manual job as the last tick left it.

    table_id, span: what a move is about; span is None for all spans of the table. target: the
    capture to move to, to drain, or whose drain is cancelled. reason: why the job is pending,
    refused or cancelled; may be empty. asked_by: the caller. moves_done, moves_left: of a
    rebalance; left are the moves in progress and planned.
    """

    id: int
    kind: QueryKind
    target: CaptureID | None
    table_id: TableID | None = None
    span: Span | None = None
    state: QueryState = QueryState.PENDING
    reason: str = ""
    asked_by: str = ""
    moves_done: int | None = None
    moves_left: int | None = None

    @property
    def subject(self) -> str:
        """What the job is about, as text: `table 7`, `span 7[01,02)`, `drain` of a cancel, else empty."""
        if self.span is not None:
            return f"span {self.span}"
        if self.table_id is not None:
            return f"table {self.table_id}"
        return "drain" if self.kind is QueryKind.CANCEL else ""
