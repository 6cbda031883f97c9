"""The columns: one row for each span, one numpy array for each field. Only `Tables` and the
functions of this package write them.

A row is found by its number (which goes over the wire and is never reused in a term), by the table
id if it is a whole table, or by its span. Captures are small ints (`captures.py`); `NO_CAPTURE` is
the empty role. A capture that may still hold a span without being its Primary or Secondary is
Undetermined. That is rare, so these are kept in a dict beside the columns, and the column
`undetermined_count` says where to look.

Invariant of a row: a capture has at most one role in it; Primary and Secondary differ; a live row
has a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from owner.core.jobs import Job
from owner.core.statistics import Statistics
from tablewire.model.columns import F32, I64, U8, U32, U64
from tablewire.model.ids import CaptureID
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import ReplicationState, TableState

NO_CAPTURE = -1
NO_ROW = -1

ABSENT = ReplicationState.ABSENT.code
PREPARE = ReplicationState.PREPARE.code
COMMIT = ReplicationState.COMMIT.code
REPLICATING = ReplicationState.REPLICATING.code
REMOVING = ReplicationState.REMOVING.code

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
I32 = npt.NDArray[np.int32]
CaptureIndexes = npt.NDArray[np.int16]  # NO_CAPTURE where there is none

TASK_NONE, TASK_ADD, TASK_MOVE, TASK_DRAIN, TASK_REMOVE, TASK_BALANCE = range(6)

CHANGED_SHARE = 8
"""Up to one row in this number is published one by one; if more have changed, the columns are copied."""
_GROWTH = 1.25
_INITIAL_CAPACITY = 64


@dataclass(slots=True)
class Holder:
    """An Undetermined capture of one row: its last reported state, and the last dispatch to it."""

    reported: int = TableState.ABSENT.code
    dispatch: int = 0


@dataclass(frozen=True, slots=True)
class SpanFailure:
    """An executor's error, or a prepare that took too long. The span is not tried before
    retry_at_ms, and elsewhere first."""

    error: str
    attempts: int
    retry_at_ms: int
    capture: int


@dataclass(slots=True)
class MoveInProgress:
    """A planned move that has begun, and the job that asked for it. source: an id, since the index
    of a capture that is gone may belong to another capture when the move ends."""

    source: CaptureID
    target: int
    task: int
    job: Job | None


@dataclass(frozen=True, slots=True)
class RowView:
    """One row for people, errors and tests."""

    row: int
    span: Span
    state: ReplicationState
    primary: int
    secondary: int
    undetermined: frozenset[int]
    checkpoint_ts: int
    resolved_ts: int
    assignment_epoch: int


@dataclass(slots=True)
class Index:
    """Whole tables: sorted table ids and their rows. It is rebuilt after rows came or went."""

    table_ids: I64 = field(default_factory=lambda: np.empty(0, np.int64))
    rows: I32 = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(frozen=True, slots=True)
class _Column:
    dtype: type
    empty: int


def _column(dtype: type, empty: int = 0) -> Any:
    """Declare a column, and its value in a row that is not in use."""
    return _Column(dtype, empty)


class Tables:
    """Owns the columns. Other modules read them as attributes and write them by rows; one thread."""

    table_id: I64 = _column(np.int64)
    number: U32 = _column(np.uint32)
    live: Mask = _column(np.bool_)  # the row is in use
    wanted: Mask = _column(np.bool_)  # a current table has this span
    scheduled: Mask = _column(np.bool_)  # it was added somewhere at least once, so its checkpoint counts
    steady: Mask = _column(np.bool_)  # Replicating, as its Primary reports, and no other capture has a role
    state: U8 = _column(np.uint8, ABSENT)
    primary: CaptureIndexes = _column(np.int16, NO_CAPTURE)
    secondary: CaptureIndexes = _column(np.int16, NO_CAPTURE)
    undetermined_count: npt.NDArray[np.int16] = _column(np.int16)
    primary_reported: U8 = _column(np.uint8)  # code of the TableState that the Primary last reported
    secondary_reported: U8 = _column(np.uint8)
    primary_dispatch: U32 = _column(np.uint32)  # number n of the last dispatch of this span to its Primary
    secondary_dispatch: U32 = _column(np.uint32)
    checkpoint_ts: U64 = _column(np.uint64)
    resolved_ts: U64 = _column(np.uint64)
    last_synced_ts: U64 = _column(np.uint64)
    assignment_epoch: U64 = _column(np.uint64)  # the Primary's permission to write
    grants: U32 = _column(np.uint32)  # the number of permissions that this term gave for this span
    state_since_ms: I64 = _column(np.int64)
    task: U8 = _column(np.uint8, TASK_NONE)
    in_snapshot: Mask = _column(np.bool_)
    weight: F32 = _column(np.float32, 1)  # smoothed

    def __init__(self) -> None:
        self.size = 0  # rows in use are below this
        for name, column in _COLUMNS.items():
            setattr(self, name, np.full(_INITIAL_CAPACITY, column.empty, column.dtype))
        self.undetermined: dict[int, dict[int, Holder]] = {}
        self.failures: dict[int, SpanFailure] = {}
        self.attempts: dict[int, int] = {}  # row -> consecutive failures; kept for a while when it replicates again
        self.changed: list[Rows] = []  # rows whose progress has changed since it was published
        self.changed_count = 0
        self.all_steady = False  # False: there may be rows that are not steady
        self.moved_ms: dict[int, int] = {}  # row -> when its last planned move ended, for the cooldown
        self.moving: dict[int, MoveInProgress] = {}  # by row
        self.statistics = Statistics(_INITIAL_CAPACITY)
        self.version = 0  # grows when rows came or went, and when a snapshot began or ended
        self._free: list[int] = []
        self._partial: dict[Span, int] = {}
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._row_of_number: npt.NDArray[np.int32] = np.full(_INITIAL_CAPACITY, NO_ROW, np.int32)
        self._next_number = 1
        self._index: Index | None = Index()

    # -- finding rows -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(np.count_nonzero(self.live[: self.size]))

    def rows_of_numbers(self, numbers: U32) -> Rows:
        """Return the row of each number, NO_ROW where there is none; shape as given."""
        known = numbers < self._next_number
        if known.all():
            return self._row_of_number[numbers].astype(np.int64)
        rows = np.full(len(numbers), NO_ROW, np.int64)
        rows[known] = self._row_of_number[numbers[known]]
        return rows

    def rows_of_spans(self, spans: SpanBlock) -> Rows:
        """Return the row of each span, NO_ROW where there is none; shape (len(spans),)."""
        index = self.index()
        if not len(index.table_ids):
            rows = np.full(len(spans), NO_ROW, np.int64)
        else:
            positions = np.searchsorted(index.table_ids, spans.table_ids)
            positions[positions == len(index.table_ids)] = 0
            rows = np.where(index.table_ids[positions] == spans.table_ids, index.rows[positions].astype(np.int64), NO_ROW)
        if spans.start_keys:
            for position, span in enumerate(spans):
                if span.start_key or span.end_key:
                    rows[position] = self._partial.get(span, NO_ROW)
        return rows

    def row_of(self, span: Span) -> int:
        return int(self.rows_of_spans(SpanBlock.of([span]))[0])

    def rows_of_table(self, table_id: int) -> list[int]:
        """Return every row of a table, by start key."""
        whole = self.row_of(Span(table_id))
        rows = [row for span, row in self._partial.items() if span.table_id == table_id]
        return sorted(rows if whole == NO_ROW else [*rows, whole], key=self.span)

    def span(self, row: int) -> Span:
        return Span(int(self.table_id[row]), *self._keys.get(row, ()))

    def spans(self, rows: Rows) -> SpanBlock:
        table_ids = self.table_id[rows]
        keys = [self._keys.get(row, (b"", b"")) for row in rows.tolist()] if self._keys else []
        if not any(start or end for start, end in keys):
            return SpanBlock(table_ids)
        return SpanBlock(table_ids, tuple(start for start, _ in keys), tuple(end for _, end in keys))

    def all_rows(self) -> Rows:
        return np.flatnonzero(self.live[: self.size])

    def index(self) -> Index:
        """Return the index of whole tables."""
        if self._index is None:
            rows = self.all_rows()
            if self._keys:
                rows = rows[~np.isin(rows, np.fromiter(self._keys, np.int64, len(self._keys)))]
            order = np.argsort(self.table_id[rows], kind="stable")
            self._index = Index(self.table_id[rows[order]], rows[order].astype(np.int32))
        return self._index

    def partial_spans(self) -> dict[Span, int]:
        """Return the rows of spans that are not whole tables."""
        return self._partial

    def row(self, row: int) -> RowView:
        return RowView(
            row=row,
            span=self.span(row),
            state=ReplicationState.from_code(int(self.state[row])),
            primary=int(self.primary[row]),
            secondary=int(self.secondary[row]),
            undetermined=frozenset(self.undetermined.get(row, ())),
            checkpoint_ts=int(self.checkpoint_ts[row]),
            resolved_ts=int(self.resolved_ts[row]),
            assignment_epoch=int(self.assignment_epoch[row]),
        )

    def is_in_backoff(self, row: int, now_ms: int) -> bool:
        """Return whether the span failed and is not to be tried again yet."""
        failure = self.failures.get(row)
        return failure is not None and failure.retry_at_ms > now_ms

    # -- adding and dropping rows -------------------------------------------------------------------------------------

    def add(self, spans: SpanBlock, now_ms: int) -> Rows:
        """Add Absent rows for spans that have none; return them in the order of the spans."""
        count = len(spans)
        if not count:
            return np.empty(0, np.int64)
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = count - len(reused)
        self._reserve(self.size + fresh)
        rows = np.concatenate([np.array(reused, np.int64), np.arange(self.size, self.size + fresh)])
        self.size += fresh
        self._clear(rows)
        numbers = np.arange(self._next_number, self._next_number + count, dtype=np.uint32)
        self._next_number += count
        if self._next_number > len(self._row_of_number):
            self._row_of_number = _grown(self._row_of_number, self._next_number, NO_ROW)
        self._row_of_number[numbers] = rows
        self.all_steady = False
        self.number[rows] = numbers
        self.table_id[rows] = spans.table_ids
        self.live[rows] = True
        self.state_since_ms[rows] = now_ms
        if spans.start_keys:
            for row, span in zip(rows.tolist(), spans, strict=True):
                if span.start_key or span.end_key:
                    self._partial[span] = row
                    self._keys[row] = (span.start_key, span.end_key)
        return rows

    def drop(self, rows: Rows) -> None:
        """Drop the rows. Their numbers are never used again."""
        if not len(rows):
            return
        self._row_of_number[self.number[rows]] = NO_ROW
        for row in rows.tolist():
            if row in self._keys:
                del self._partial[self.span(row)], self._keys[row]
            for rare in (self.undetermined, self.failures, self.attempts, self.moved_ms, self.moving):
                rare.pop(row, None)
        self.statistics.forget(rows)
        self._clear(rows)
        self._free.extend(rows.tolist()[::-1])

    def _clear(self, rows: Rows) -> None:
        """Set every column of these rows to its empty value, as rows come or go."""
        for name, column in _COLUMNS.items():
            getattr(self, name)[rows] = column.empty
        self._index = None
        self.version += 1

    # -- roles --------------------------------------------------------------------------------------------------------

    def add_undetermined(
        self, rows: npt.ArrayLike, captures: npt.ArrayLike, reported: npt.ArrayLike, dispatches: npt.ArrayLike = 0
    ) -> None:
        """Note that a capture may still hold each row. The arguments after rows are given for each
        row or once for all. A former entry keeps the newer dispatch."""
        columns = np.broadcast_arrays(np.atleast_1d(rows), captures, reported, dispatches)
        for row, capture, state, dispatch in zip(*(column.tolist() for column in columns), strict=True):
            holders = self.undetermined.setdefault(row, {})
            former = holders.get(capture)
            holders[capture] = Holder(state, max(dispatch, former.dispatch if former else 0))
            self.undetermined_count[row] = len(holders)

    def clear_undetermined(self, rows: Iterable[int], capture: int) -> None:
        for row in rows:
            holders = self.undetermined.get(row)
            if holders is None or holders.pop(capture, None) is None:
                continue
            self.undetermined_count[row] = len(holders)
            if not holders:
                del self.undetermined[row]

    def rows_with_role(self, capture: int) -> Rows:
        """Return every row in which the capture has any role, sorted."""
        mask = (self.primary[: self.size] == capture) | (self.secondary[: self.size] == capture)
        mask[[row for row, holders in self.undetermined.items() if capture in holders]] = True
        return np.flatnonzero(mask)

    def mark_changed(self, rows: Rows) -> None:
        """Note that the progress of these rows has changed."""
        self.changed_count += len(rows)
        if self.changed_count <= self.size:
            self.changed.append(rows)

    def take_changed(self) -> list[Rows] | None:
        """Return the rows whose progress has changed since the last call; None if they are many."""
        changed = self.changed if self.changed_count * CHANGED_SHARE <= self.size else None
        self.changed, self.changed_count = [], 0
        return changed

    def unsteady_rows(self) -> Rows:
        """Return the live rows that are not steady, sorted; free of cost while there are none."""
        if self.all_steady:
            return np.empty(0, np.int64)
        rows = np.flatnonzero(self.live[: self.size] & ~self.steady[: self.size])
        self.all_steady = not len(rows)
        return rows

    def mark_unsteady(self, rows: Rows) -> None:
        self.steady[rows] = False
        self.all_steady = False

    def refresh_steady(self, rows: Rows) -> None:
        self.all_steady = False
        self.steady[rows] = (
            (self.state[rows] == REPLICATING)
            & (self.primary_reported[rows] == TableState.REPLICATING.code)
            & (self.primary[rows] != NO_CAPTURE)
            & (self.secondary[rows] == NO_CAPTURE)
            & (self.undetermined_count[rows] == 0)
        )

    def set_state(self, rows: Rows, state: int, now_ms: int) -> None:
        changed = rows[self.state[rows] != state]
        self.state[changed] = state
        self.state_since_ms[changed] = now_ms

    def check(self) -> list[str]:
        """Return a text for each violation of the row invariant."""
        wrong = []
        rows = self.all_rows()
        both = rows[(self.primary[rows] != NO_CAPTURE) & (self.primary[rows] == self.secondary[rows])]
        wrong += [f"row {row} has one capture in two roles: {self.row(row)}" for row in both.tolist()]
        for row, holders in self.undetermined.items():
            if not self.live[row] or int(self.primary[row]) in holders or int(self.secondary[row]) in holders:
                wrong.append(f"row {row} has a misplaced undetermined: {self.row(row)}")
            if len(holders) != self.undetermined_count[row]:
                wrong.append(f"row {row} miscounts its undetermined: {self.row(row)}")
        prepared_for = rows[(self.state[rows] == PREPARE) & (self.secondary[rows] == NO_CAPTURE)]
        wrong += [f"row {row} is in Prepare without a Secondary: {self.row(row)}" for row in prepared_for.tolist()]
        ahead = rows[self.checkpoint_ts[rows] > self.resolved_ts[rows]]
        wrong += [f"row {row} has a checkpoint past resolved: {self.row(row)}" for row in ahead.tolist()]
        if not np.array_equal(self._row_of_number[self.number[rows]], rows):
            wrong.append("a number does not lead to its row")
        return wrong

    def _reserve(self, rows: int) -> None:
        if rows > len(self.live):
            for name, column in _COLUMNS.items():
                setattr(self, name, _grown(getattr(self, name), rows, column.empty))
            self.statistics.grow(len(self.live))


def _grown(column: np.ndarray, needed: int, empty: int) -> np.ndarray:
    grown = np.full(max(needed, int(_GROWTH * len(column))), empty, column.dtype)
    grown[: len(column)] = column
    return grown


_COLUMNS = {name: column for name, column in vars(Tables).items() if isinstance(column, _Column)}
