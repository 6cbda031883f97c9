"""The columns: one row a span, one numpy array a field. Only `Tables` and the kernels in this package write them.

A row is found by its number (what goes over the wire; never used twice in a term), by its table id when it is a whole table,
or by its span. Captures appear as small ints (`captures.py`); `NO_CAPTURE` is the empty role. Whoever may still hold a span
without being its Primary or Secondary is Undetermined; that is rare, so these stand in a dict beside the columns, and
`undetermined_count` says where to look.

Invariant of a row: a capture has at most one role in it; Primary and Secondary differ; a live row has a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from owner.core.jobs import Job
from owner.core.statistics import Statistics
from tablewire.model.columns import I64, U8, U32, U64
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
CaptureIndexes = npt.NDArray[np.int16]  # captures by index, NO_CAPTURE where there is none
F64 = npt.NDArray[np.float64]

TASK_NONE, TASK_ADD, TASK_MOVE, TASK_DRAIN, TASK_REMOVE, TASK_BALANCE = range(6)

_GROWTH = 1.25
CHANGED_SHARE = 8
"""Up to one in so many rows are published one by one; when more have changed, the columns are copied."""
_SMALLEST = 64


class _Column(NamedTuple):
    name: str
    dtype: type
    empty: int | float


_COLUMNS = (
    _Column("table_id", np.int64, 0),
    _Column("number", np.uint32, 0),
    _Column("live", np.bool_, 0),  # the row is in use
    _Column("wanted", np.bool_, 0),  # a current table has this span
    _Column("scheduled", np.bool_, 0),  # it was added somewhere at least once, so its checkpoint counts
    _Column("steady", np.bool_, 0),  # Replicating, its Primary says so, nobody else has a role
    _Column("state", np.uint8, ABSENT),
    _Column("primary", np.int16, NO_CAPTURE),
    _Column("secondary", np.int16, NO_CAPTURE),
    _Column("undetermined_count", np.int16, 0),
    _Column("primary_reported", np.uint8, 0),  # TableState code that the Primary last reported and that counted
    _Column("secondary_reported", np.uint8, 0),
    _Column("primary_dispatch", np.uint32, 0),  # number n of the last dispatch of this span to its Primary
    _Column("secondary_dispatch", np.uint32, 0),
    _Column("checkpoint_ts", np.uint64, 0),
    _Column("resolved_ts", np.uint64, 0),
    _Column("last_synced_ts", np.uint64, 0),
    _Column("assignment_epoch", np.uint64, 0),  # the Primary's permission to write
    _Column("grants", np.uint32, 0),  # how many permissions this term gave for this span
    _Column("state_since_ms", np.int64, 0),
    _Column("task", np.uint8, TASK_NONE),
    _Column("in_snapshot", np.bool_, 0),
    _Column("weight", np.float32, 1),  # smoothed
)


@dataclass(slots=True)
class Holder:
    """An Undetermined capture of one row: what it reported last, and the last dispatch of the span to it."""

    reported: int = TableState.ABSENT.code
    dispatch: int = 0


@dataclass(frozen=True, slots=True)
class SpanFailure:
    """An executor's error of one row, or a prepare that took too long: not again before retry_at_ms, and elsewhere first."""

    error: str
    attempts: int
    retry_at_ms: int
    capture: int


@dataclass(slots=True)
class MoveOrigin:
    """Where a planned move of one row comes from, and the job that asked for it. source: an id, since the index of a capture that
    is gone may belong to another one when the move ends."""

    source: CaptureID
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
    """Whole tables by id: sorted ids and their rows; rebuilt when rows came or went."""

    table_ids: I64 = field(default_factory=lambda: np.empty(0, np.int64))
    rows: I32 = field(default_factory=lambda: np.empty(0, np.int32))


class Tables:
    """Owns the columns. Kernels read them as attributes and write them through rows; one thread."""

    table_id: I64
    number: U32
    live: Mask
    wanted: Mask
    scheduled: Mask
    steady: Mask
    state: U8
    primary: CaptureIndexes
    secondary: CaptureIndexes
    undetermined_count: npt.NDArray[np.int16]
    primary_reported: U8
    secondary_reported: U8
    primary_dispatch: U32
    secondary_dispatch: U32
    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64
    assignment_epoch: U64
    grants: U32
    state_since_ms: I64
    task: U8
    in_snapshot: Mask
    weight: npt.NDArray[np.float32]

    def __init__(self) -> None:
        self.size = 0  # rows in use are below this
        for column in _COLUMNS:
            setattr(self, column.name, np.full(_SMALLEST, column.empty, column.dtype))
        self.undetermined: dict[int, dict[int, Holder]] = {}
        self.failures: dict[int, SpanFailure] = {}
        self.attempts: dict[int, int] = {}  # row -> attempts in a row, kept while it replicates until forgotten
        self.changed: list[Rows] = []  # rows whose progress has changed since it was published
        self.changed_count = 0
        self.all_steady = False  # False: there may be rows that are not steady
        self.moved_ms: dict[int, int] = {}  # row -> when a planned move of it ended; kept for the cooldown
        self.pinned: set[int] = set()  # rows that an operator moved, among those
        self.origin: dict[int, MoveOrigin] = {}  # rows of planned moves in progress
        self.statistics = Statistics(_SMALLEST)
        self.version = 0  # grows when rows came or went, and when a snapshot began or ended
        self._capacity = _SMALLEST
        self._free: list[int] = []
        self._partial: dict[Span, int] = {}
        self._keys: dict[int, tuple[bytes, bytes]] = {}
        self._row_of_number: npt.NDArray[np.int32] = np.full(_SMALLEST, NO_ROW, np.int32)
        self._next_number = 1
        self._index: Index | None = Index()

    # -- finding rows -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(np.count_nonzero(self.live[: self.size]))

    def rows_of_numbers(self, numbers: U32) -> Rows:
        """The row of each number, NO_ROW where there is none; shape as given."""
        known = numbers < self._next_number
        if known.all():
            return self._row_of_number[numbers].astype(np.int64)
        rows = np.full(len(numbers), NO_ROW, np.int64)
        rows[known] = self._row_of_number[numbers[known]]
        return rows

    def rows_of_spans(self, spans: SpanBlock) -> Rows:
        """The row of each span, NO_ROW where there is none; shape (len(spans),)."""
        rows = self._rows_of_tables(spans.table_ids)
        if spans.start_keys:
            for position, span in enumerate(spans):
                if span.start_key or span.end_key:
                    rows[position] = self._partial.get(span, NO_ROW)
        return rows

    def row_of(self, span: Span) -> int:
        if span.start_key or span.end_key:
            return self._partial.get(span, NO_ROW)
        return int(self._rows_of_tables(np.array([span.table_id], np.int64))[0])

    def rows_of_table(self, table_id: int) -> list[int]:
        """Every row of a table, by start key."""
        rows = [row for span, row in self._partial.items() if span.table_id == table_id]
        whole = self.row_of(Span(table_id))
        if whole != NO_ROW:
            rows.append(whole)
        return sorted(rows, key=lambda row: self.span(row))

    def span(self, row: int) -> Span:
        keys = self._keys.get(row)
        if keys is None:
            return Span(int(self.table_id[row]))
        return Span(int(self.table_id[row]), *keys)

    def spans(self, rows: Rows) -> SpanBlock:
        table_ids = self.table_id[rows]
        if not self._keys:
            return SpanBlock(table_ids)
        keys = [self._keys.get(row, (b"", b"")) for row in rows.tolist()]
        if not any(start or end for start, end in keys):
            return SpanBlock(table_ids)
        return SpanBlock(table_ids, tuple(start for start, _ in keys), tuple(end for _, end in keys))

    def all_rows(self) -> Rows:
        return np.flatnonzero(self.live[: self.size])

    def index(self) -> Index:
        """Whole tables by id (sorted)."""
        if self._index is None:
            rows = self.all_rows()
            if self._keys:
                rows = rows[~np.isin(rows, np.fromiter(self._keys, np.int64, len(self._keys)))]
            ids = self.table_id[rows]
            order = np.argsort(ids, kind="stable")
            self._index = Index(ids[order], rows[order].astype(np.int32))
        return self._index

    def partial_spans(self) -> dict[Span, int]:
        """Rows of spans that are not whole tables."""
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

    # -- rows come and go ---------------------------------------------------------------------------------------------

    def add(self, spans: SpanBlock, now_ms: int) -> Rows:
        """New Absent rows for spans that have none, in their order; shape (len(spans),)."""
        count = len(spans)
        if not count:
            return np.empty(0, np.int64)
        reused = [self._free.pop() for _ in range(min(count, len(self._free)))]
        fresh = count - len(reused)
        self._reserve(self.size + fresh)
        rows = np.concatenate([np.array(reused, np.int64), np.arange(self.size, self.size + fresh)])
        self.size += fresh
        for column in _COLUMNS:
            getattr(self, column.name)[rows] = column.empty
        numbers = np.arange(self._next_number, self._next_number + count, dtype=np.uint32)
        self._next_number += count
        if self._next_number > len(self._row_of_number):
            capacity = max(self._next_number, int(_GROWTH * len(self._row_of_number)))
            grown: npt.NDArray[np.int32] = np.full(capacity, NO_ROW, np.int32)
            grown[: len(self._row_of_number)] = self._row_of_number
            self._row_of_number = grown
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
        self._index = None
        self.version += 1
        return rows

    def drop(self, rows: Rows) -> None:
        """The rows are gone, and their numbers are never used again."""
        if not len(rows):
            return
        self._row_of_number[self.number[rows]] = NO_ROW
        for row in rows.tolist():
            keys = self._keys.pop(row, None)
            if keys is not None:
                del self._partial[Span(int(self.table_id[row]), *keys)]
            for rare in (self.undetermined, self.failures, self.attempts, self.moved_ms, self.origin):
                rare.pop(row, None)
            self.pinned.discard(row)
        self.statistics.forget(rows)
        for column in _COLUMNS:
            getattr(self, column.name)[rows] = column.empty
        self._free.extend(rows.tolist()[::-1])
        self._index = None
        self.version += 1

    def is_in_backoff(self, row: int, now_ms: int) -> bool:
        """Return whether the span failed and is not to be tried again yet."""
        failure = self.failures.get(row)
        return failure is not None and failure.retry_at_ms > now_ms

    # -- roles --------------------------------------------------------------------------------------------------------

    def add_undetermined(self, rows: Iterable[int], capture: int, reported: int, dispatches: Sequence[int] | int = 0) -> None:
        """The capture may still hold these rows; a former entry keeps the newer dispatch."""
        for position, row in enumerate(rows):
            dispatch = dispatches if isinstance(dispatches, int) else int(dispatches[position])
            holders = self.undetermined.setdefault(row, {})
            former = holders.get(capture)
            holders[capture] = Holder(reported, max(dispatch, former.dispatch if former else 0))
            self.undetermined_count[row] = len(holders)

    def clear_undetermined(self, rows: Iterable[int], capture: int) -> None:
        for row in rows:
            holders = self.undetermined.get(row)
            if holders is None or holders.pop(capture, None) is None:
                continue
            self.undetermined_count[row] = len(holders)
            if not holders:
                del self.undetermined[row]

    def rows_undetermined_at(self, capture: int) -> Rows:
        return np.array(sorted(row for row, holders in self.undetermined.items() if capture in holders), np.int64)

    def rows_with_role(self, capture: int) -> Rows:
        """Every row in which the capture has any role, sorted."""
        size = self.size
        mask = (self.primary[:size] == capture) | (self.secondary[:size] == capture)
        rows = np.flatnonzero(mask)
        other = self.rows_undetermined_at(capture)
        return np.union1d(rows, other) if len(other) else rows

    def mark_changed(self, rows: Rows) -> None:
        """The progress of these rows has changed."""
        self.changed_count += len(rows)
        if self.changed_count <= self.size:
            self.changed.append(rows)

    def take_changed(self) -> list[Rows] | None:
        """The rows whose progress has changed since the last call; None = too many to name them."""
        changed = self.changed if self.changed_count * CHANGED_SHARE <= self.size else None
        self.changed, self.changed_count = [], 0
        return changed

    def unsteady_rows(self) -> Rows:
        """Live rows that are not steady, sorted; costs nothing while there are none."""
        if self.all_steady:
            return np.empty(0, np.int64)
        rows = np.flatnonzero(self.live[: self.size] & ~self.steady[: self.size])
        self.all_steady = not len(rows)
        return rows

    def mark_unsteady(self, rows: Rows) -> None:
        """These rows are not steady now."""
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
        """What of the row invariant does not hold, one text each; empty when all is well."""
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
        wrong += [f"row {row} prepares for nobody: {self.row(row)}" for row in prepared_for.tolist()]
        ahead = rows[self.checkpoint_ts[rows] > self.resolved_ts[rows]]
        wrong += [f"row {row} has a checkpoint past resolved: {self.row(row)}" for row in ahead.tolist()]
        if not np.array_equal(self._row_of_number[self.number[rows]], rows):
            wrong.append("a number does not lead to its row")
        return wrong

    def _rows_of_tables(self, table_ids: I64) -> Rows:
        index = self.index()
        if not len(index.table_ids):
            return np.full(len(table_ids), NO_ROW, np.int64)
        positions = np.searchsorted(index.table_ids, table_ids)
        positions[positions == len(index.table_ids)] = 0
        return np.where(index.table_ids[positions] == table_ids, index.rows[positions].astype(np.int64), NO_ROW)

    def _reserve(self, rows: int) -> None:
        if rows <= self._capacity:
            return
        capacity = max(rows, int(_GROWTH * self._capacity))
        for column in _COLUMNS:
            wider: np.ndarray = np.full(capacity, column.empty, column.dtype)
            wider[: self.size] = getattr(self, column.name)[: self.size]
            setattr(self, column.name, wider)
        self.statistics.grow(capacity)
        self._capacity = capacity
