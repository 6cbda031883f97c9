"""The spans of one agent: one row for each, one numpy column for each field, and which rows must be reported.

Pure bookkeeping. `agent.py` brings the owner's messages (`take`, `acknowledge`, `set_numbers`, `report_everything`);
`executor_driver.py` makes the calls that are due (`rows_due`) and brings their outcomes (`apply`, `fail`, `observe`);
`reports.py` reads the changed rows and notes in which report they were. Phases change by the rules of table_life.py, and no other
module writes to the columns but `reports.py`, which sets the stamps. One thread.

Stamps
------
`stamp` of a row is the number m of the first report that held its present content, `state_stamp` that of the first report that
held its present state; UNREPORTED and 0 while there is none. A report on base b holds every row with stamp > b, hence:

    the owner has applied m  =>  it knows every row with stamp <= m  (and the state of every row with 0 < state_stamp <= m)

A dispatch raises the stamp even where nothing changed, so that a report follows. It leaves `state_stamp` alone: a Stopped that
the owner has acknowledged is forgotten although dispatches for it still arrive. A row whose stamp is 0 is free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from processor.core.table_life import (
    CALLS,
    EFFECTS,
    IMPOSSIBLE,
    OBSERVED,
    REPORTED,
    STATE_CODES,
    THEN,
    Call,
    Effect,
    ImpossibleInputError,
    Input,
    Phase,
)
from tablewire.model.columns import F64, U8, U32, U64
from tablewire.model.messages import DispatchTableRequest, span_checksum
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import TableState

Rows: TypeAlias = npt.NDArray[np.intp]

UNREPORTED = np.uint64(2**64 - 1)
"""Stamp of a row whose present content is in no report yet."""

_NO_SPAN = Span(0)
_FIRST_CAPACITY = 64


_T = TypeVar("_T")


def _cached(method: Callable[[SpanTable], _T]) -> Callable[[SpanTable], _T]:
    """Keep the result of a method until a phase or a number changes."""
    name = method.__name__

    def cached(self: SpanTable) -> _T:
        if name not in self._cache:
            self._cache[name] = method(self)
        result: _T = self._cache[name]
        return result

    return cached


class SpanTable:
    """The rows. Columns have shape (capacity,); rows at and beyond `size` were never used."""

    def __init__(self) -> None:
        capacity = _FIRST_CAPACITY
        self.size = 0
        self.spans: list[Span] = []  # by row
        self.phase: U8 = np.zeros(capacity, np.uint8)
        self.number: U32 = np.zeros(capacity, np.uint32)  # the owner's; 0 = none yet
        self.stamp: U64 = np.zeros(capacity, np.uint64)
        self.state_stamp: U64 = np.zeros(capacity, np.uint64)
        self.start_ts: U64 = np.zeros(capacity, np.uint64)  # of the next add_table_span
        self.start_resolved_ts: U64 = np.zeros(capacity, np.uint64)
        self.prepared_from: U64 = np.zeros(capacity, np.uint64)
        self.granted_epoch: U64 = np.zeros(capacity, np.uint64)  # the newest that was granted
        self.epoch: U64 = np.zeros(capacity, np.uint64)  # the one in force
        self.checkpoint_ts: U64 = np.zeros(capacity, np.uint64)
        self.resolved_ts: U64 = np.zeros(capacity, np.uint64)
        self.last_synced_ts: U64 = np.zeros(capacity, np.uint64)
        self.stats_stamp: U64 = np.zeros(capacity, np.uint64)  # the stamp of the statistics; 0 = there are none
        self.rows_per_s: F64 = np.zeros(capacity, np.float64)
        self.bytes_per_s: F64 = np.zeros(capacity, np.float64)
        self.puller_resolved_ts: U64 = np.zeros(capacity, np.uint64)
        self.in_snapshot: U8 = np.zeros(capacity, np.uint8)
        self._columns = [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]
        self.errors: dict[int, str] = {}  # row -> what ended it
        self.kept_grants: dict[int, tuple[int, int, int]] = {}  # row -> (epoch, checkpoint_ts, resolved_ts)
        self.to_raise: set[int] = set()  # rows whose granted_epoch is to be raised at the sink
        self.has_changes = False
        """Something changed, or a dispatch came, since the last report."""
        self._row_of_span: dict[Span, int] = {}
        self._row_of_number: dict[int, int] = {}
        self._free: list[int] = []
        self._cache: dict[str, Any] = {}  # of the methods marked so; emptied whenever a phase or a number changes

    # What is there ---------------------------------------------------------------------------------------------------

    def rows_in(self, phase: Phase) -> list[int]:
        return np.flatnonzero(self.phase[: self.size] == phase).tolist()

    def rows_due(self, call: Call) -> list[int]:
        """Return the rows for which this call of the executor is due."""
        return np.flatnonzero(CALLS[self.phase[: self.size]] == call).tolist()

    def row_of(self, span: Span) -> int | None:
        return self._row_of_span.get(span)

    def is_settled(self) -> bool:
        """Return whether no call of the executor is due."""
        return not self.to_raise and not self._has_calls_due()

    @_cached
    def _has_calls_due(self) -> bool:
        return bool(CALLS[self.phase[: self.size]].any())

    @_cached
    def counts(self) -> Mapping[TableState, int]:
        """Return how many spans are in each state; ABSENT is left out."""
        counts: Counter[TableState] = Counter()
        for phase, spans in enumerate(np.bincount(self.phase[: self.size], minlength=len(Phase)).tolist()):
            counts[REPORTED[Phase(phase)]] += spans
        del counts[TableState.ABSENT]
        return counts

    @_cached
    def observed(self) -> tuple[Rows, list[Span]]:
        """Return the rows to ask the executor about, and their spans; the same list object until one of them changes."""
        rows = np.flatnonzero(OBSERVED[self.phase[: self.size]])
        return rows, [self.spans[row] for row in rows.tolist()]

    @_cached
    def held(self) -> tuple[int, int]:
        """Return how many spans are neither Absent nor Stopped, and the checksum over those that have a number."""
        states, numbers = STATE_CODES[self.phase[: self.size]], self.number[: self.size]
        is_held = (states != TableState.ABSENT.code) & (states != TableState.STOPPED.code)
        numbered = is_held & (numbers != 0)
        return int(is_held.sum()), span_checksum(numbers[numbered], states[numbered])

    @_cached
    def _ended(self) -> Rows:
        """Return the rows that are Absent or Stopped."""
        phases = self.phase[: self.size]
        return np.flatnonzero((phases == Phase.ABSENT) | (phases == Phase.STOPPED))

    # The engine ------------------------------------------------------------------------------------------------------

    def take(self, request: DispatchTableRequest) -> None:
        """Apply a dispatch, and mark all its spans to be reported."""
        rows = np.array(self._rows_for(request), np.intp)
        resolved_ts = np.maximum(request.checkpoint_ts, request.resolved_ts)
        orders = _Orders(request.assignment_epochs, request.checkpoint_ts, resolved_ts)
        if len(np.unique(rows)) == len(rows):
            self._apply(request.actions, rows, orders)
        else:  # a span that is named twice: in order
            for place in range(len(rows)):
                at = slice(place, place + 1)
                self._apply(request.actions[at], rows[at], orders.at(at))
        self._mark(rows)

    def apply(self, what: Input, rows: Sequence[int] | Rows) -> None:
        """Apply the outcome of a call to rows for which that call was due."""
        if len(rows):
            self._apply(np.full(len(rows), what, np.uint8), np.asarray(rows, np.intp))

    def fail(self, row: int, text: str) -> None:
        """Remove the span because of an error, and report it with this text. The first text stays."""
        self.apply(Input.FAILED, [row])
        if row not in self.errors:
            self.errors[row] = text
            self._mark(np.array([row]))

    def acknowledge(self, acked: int) -> None:
        """Note that the owner has applied every report up to number `acked`: rows that have ended are forgotten or freed."""
        rows = self._ended()
        if len(rows):
            stamps = np.where(self.phase[rows] == Phase.STOPPED, self.state_stamp[rows], self.stamp[rows])
            self.apply(Input.ACKED, rows[(stamps > 0) & (stamps <= acked)])

    def _apply(self, inputs: U8, rows: Rows, orders: _Orders | None = None) -> None:
        """Apply one input to each row by the rules. orders: of the rows, if the inputs are dispatches."""
        before = self.phase[rows]
        then, effects = THEN[inputs, before], EFFECTS[inputs, before]
        if (then == IMPOSSIBLE).any():
            place = int(np.argmax(then == IMPOSSIBLE))
            name, phase = Input(inputs[place]).name, Phase(before[place]).name
            raise ImpossibleInputError(f"{name} of span {self.spans[rows[place]]} in phase {phase}")
        self.phase[rows] = then
        self._cache.clear()
        changed = rows[STATE_CODES[before] != STATE_CODES[then]]
        self.state_stamp[changed] = 0
        self._mark(changed)
        for effect in np.flatnonzero(np.bincount(effects)).tolist():
            if effect != Effect.NOTHING:
                mask = effects == effect
                _EFFECTS[Effect(effect)](self, rows[mask], orders.at(mask) if orders is not None else _NO_ORDERS)

    def _rows_for(self, request: DispatchTableRequest) -> list[int]:
        known, rows = self._row_of_span, []
        for span in request.spans:
            row = known.get(span)
            rows.append(self._new_row(span) if row is None else row)
        differs = self.number[rows] != request.numbers if rows else np.empty(0, bool)
        for place in np.flatnonzero(differs).tolist():
            self._set_number(rows[place], int(request.numbers[place]))
        return rows

    # The effects -----------------------------------------------------------------------------------------------------

    def _start(self, rows: Rows, orders: _Orders) -> None:
        self.start_ts[rows], self.start_resolved_ts[rows] = orders.checkpoint_ts, orders.resolved_ts
        self.prepared_from[rows] = self.checkpoint_ts[rows] = orders.checkpoint_ts
        self.resolved_ts[rows] = orders.resolved_ts
        self.last_synced_ts[rows] = self.granted_epoch[rows] = self.epoch[rows] = self.stats_stamp[rows] = 0

    def _grant(self, rows: Rows, orders: _Orders) -> None:
        self.start_ts[rows], self.start_resolved_ts[rows] = orders.checkpoint_ts, orders.resolved_ts
        self.granted_epoch[rows] = orders.epochs

    def _keep_grant(self, rows: Rows, orders: _Orders) -> None:
        for row, *grant in zip(rows.tolist(), *(column.tolist() for column in orders), strict=True):
            if row not in self.kept_grants or grant[0] > self.kept_grants[row][0]:
                self.kept_grants[row] = tuple(grant)

    def _renew_grant(self, rows: Rows, orders: _Orders) -> None:
        newer = orders.epochs > self.granted_epoch[rows]
        self._grant(rows[newer], orders.at(newer))

    def _raise_epoch(self, rows: Rows, orders: _Orders) -> None:
        newer = orders.epochs > self.granted_epoch[rows]
        self.granted_epoch[rows[newer]] = orders.epochs[newer]
        self.to_raise.update(rows[newer].tolist())

    def _cancel_grant(self, rows: Rows, _orders: _Orders) -> None:
        if self.kept_grants or self.to_raise:
            for row in rows.tolist():
                self.kept_grants.pop(row, None)
                self.to_raise.discard(row)

    def _use_kept_grant(self, rows: Rows, _orders: _Orders) -> None:
        for row in self.kept_grants.keys() & rows.tolist() if self.kept_grants else ():
            self.granted_epoch[row], self.start_ts[row], self.start_resolved_ts[row] = self.kept_grants.pop(row)
            self.phase[row] = Phase.GRANTED

    def _write(self, rows: Rows, _orders: _Orders) -> None:
        self.epoch[rows] = self.granted_epoch[rows]
        self.checkpoint_ts[rows] = np.maximum(self.checkpoint_ts[rows], self.start_ts[rows])
        self.resolved_ts[rows] = np.maximum(self.resolved_ts[rows], self.start_resolved_ts[rows])

    def _forget(self, rows: Rows, _orders: _Orders) -> None:
        self.epoch[rows] = self.stats_stamp[rows] = 0
        for row in rows.tolist() if self.errors else ():
            self.errors.pop(row, None)

    def _free_rows(self, rows: Rows, _orders: _Orders) -> None:
        for row in rows.tolist():
            self._set_number(row, 0)
            del self._row_of_span[self.spans[row]]
            self.spans[row] = _NO_SPAN
            self._free.append(row)
        self.stamp[rows] = self.state_stamp[rows] = self.stats_stamp[rows] = 0

    # What the executor reports ---------------------------------------------------------------------------------------

    def epoch_raised(self, row: int) -> None:
        """Note that the sink has accepted the newest granted epoch."""
        self.to_raise.discard(row)
        self.epoch[row] = self.granted_epoch[row]
        self._mark(np.array([row]))

    def advance_checkpoints(self, rows: Sequence[int], checkpoint_ts: Sequence[int]) -> None:
        """Note the last checkpoint_ts of spans that were removed (0: not known). Nothing goes back."""
        if rows:
            last = np.array(checkpoint_ts, np.uint64)
            self.checkpoint_ts[rows] = np.maximum(self.checkpoint_ts[rows], last)
            self.resolved_ts[rows] = np.maximum(self.resolved_ts[rows], last)

    def observe(self, rows: Rows, checkpoint_ts: U64, resolved_ts: U64, last_synced_ts: U64) -> None:
        """Note the progress of observed rows, shape (len(rows),) each. Nothing goes back; rows that moved are marked."""
        old_checkpoint_ts, old_resolved_ts = self.checkpoint_ts[rows], self.resolved_ts[rows]
        old_last_synced_ts = self.last_synced_ts[rows]
        checkpoint_ts = np.maximum(checkpoint_ts, old_checkpoint_ts)
        resolved_ts = np.maximum(np.maximum(resolved_ts, old_resolved_ts), checkpoint_ts)
        last_synced_ts = np.maximum(last_synced_ts, old_last_synced_ts)
        moved = (checkpoint_ts != old_checkpoint_ts) | (resolved_ts != old_resolved_ts) | (last_synced_ts != old_last_synced_ts)
        if moved.any():
            at = rows[moved]
            self.checkpoint_ts[at], self.resolved_ts[at] = checkpoint_ts[moved], resolved_ts[moved]
            self.last_synced_ts[at] = last_synced_ts[moved]
            self._mark(at)

    def observe_stats(self, row: int, rows_per_s: float, bytes_per_s: float, puller_resolved_ts: int, in_snapshot: bool) -> None:
        """Note the statistics of a row; it is marked if they differ from the last ones."""
        new = (rows_per_s, bytes_per_s, puller_resolved_ts, int(in_snapshot))
        old = (self.rows_per_s[row], self.bytes_per_s[row], self.puller_resolved_ts[row], self.in_snapshot[row])
        if self.stats_stamp[row] == 0 or new != old:
            self.rows_per_s[row], self.bytes_per_s[row], self.puller_resolved_ts[row], self.in_snapshot[row] = new
            self.stats_stamp[row] = UNREPORTED

    # The owner -------------------------------------------------------------------------------------------------------

    def set_numbers(self, numbers: U32, spans: SpanBlock) -> None:
        """Give these spans these numbers from now on; spans that are not here are ignored."""
        for number, span in zip(numbers.tolist(), spans, strict=True):
            row = self._row_of_span.get(span)
            if row is not None and number != self.number[row]:
                self._set_number(row, number)

    def report_everything(self, *, to_new_owner: bool) -> None:
        """Forget all numbers; the next report, on base 0, names everything. A new owner gets no report of absent spans."""
        if to_new_owner:
            rows = self._ended()
            is_absent = (self.phase[rows] == Phase.ABSENT) & (self.stamp[rows] > 0)
            self.apply(Input.ACKED, rows[is_absent])
            self.state_stamp[: self.size] = 0
        self._row_of_number.clear()
        self.number[: self.size] = 0
        for stamps in (self.stamp[: self.size], self.stats_stamp[: self.size]):
            stamps[stamps > 0] = UNREPORTED
        self._cache.clear()

    # Rows ------------------------------------------------------------------------------------------------------------

    def _mark(self, rows: Rows) -> None:
        """Make these rows part of the next report."""
        if len(rows):
            self.stamp[rows] = UNREPORTED
            self.has_changes = True

    def _set_number(self, row: int, number: int) -> None:
        old, other = int(self.number[row]), self._row_of_number.get(number)
        if old and self._row_of_number.get(old) == row:
            del self._row_of_number[old]
        if other is not None:
            self.number[other] = 0  # the owner has given this number to another span: the former is reported by name again
        self.number[row] = number
        if number:
            self._row_of_number[number] = row
        self._cache.clear()

    def _new_row(self, span: Span) -> int:
        if self._free:
            row = self._free.pop()
            self.spans[row] = span
        else:
            row = self.size
            if row == len(self.phase):
                for name in self._columns:
                    column = getattr(self, name)
                    setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
            self.spans.append(span)
            self.size += 1
        self._row_of_span[span] = row
        return row

    def check(self) -> None:
        """Assert what holds between calls; for tests."""
        used = np.flatnonzero(self.stamp[: self.size] > 0).tolist()
        assert sorted(used + self._free) == list(range(self.size))
        assert {self.spans[row]: row for row in used} == self._row_of_span
        assert {int(self.number[row]): row for row in used if self.number[row]} == self._row_of_number
        assert not self.number[self._free].any()
        assert not self.phase[self._free].any()
        for row in used:
            phase = Phase(self.phase[row])
            assert row not in self.kept_grants or phase in (Phase.ADDING, Phase.PREPARING)
            assert row not in self.to_raise or phase in (Phase.STARTING, Phase.REPLICATING)
            assert row not in self.errors or phase in (Phase.REMOVING, Phase.STOPPING, Phase.STOPPED)
            assert self.resolved_ts[row] >= self.checkpoint_ts[row]


class _Orders(NamedTuple):
    """The columns of a dispatch besides its actions, shape (k,) each."""

    epochs: U64
    checkpoint_ts: U64
    resolved_ts: U64

    def at(self, places: slice | npt.NDArray[np.bool_]) -> _Orders:
        return _Orders(*(column[places] for column in self))


_NO_ORDERS = _Orders(*np.empty((3, 0), np.uint64))

_EFFECTS: dict[Effect, Callable[[SpanTable, Rows, _Orders], None]] = {
    Effect.START: SpanTable._start,
    Effect.GRANT: SpanTable._grant,
    Effect.KEEP_GRANT: SpanTable._keep_grant,
    Effect.RENEW_GRANT: SpanTable._renew_grant,
    Effect.RAISE_EPOCH: SpanTable._raise_epoch,
    Effect.CANCEL_GRANT: SpanTable._cancel_grant,
    Effect.USE_KEPT_GRANT: SpanTable._use_kept_grant,
    Effect.WRITE: SpanTable._write,
    Effect.FORGET: SpanTable._forget,
    Effect.FREE: SpanTable._free_rows,
}
