"""What an agent holds: one row a span, one numpy column a field, and which rows the owner has to be told of.

Pure bookkeeping: dispatches and the outcomes of executor calls come in, phases and columns change by the rules of table.py;
`rows_in` says for which rows a call is due, agent.py performs it. No other module writes to the columns. One thread.

What the owner knows
--------------------
`told` of a row is the number m of the first report that said its present state, `stamp` that of the first report that said
everything of it, NEWS while none did. A report on base b holds every row with stamp > b, hence:

    the owner has applied m  =>  it knows every row with stamp <= m  (and the state of every row with 0 < told <= m)

A dispatch that was taken in raises the stamp even where nothing changed, so that a report that counts follows. `told` is left
alone by it: a Stopped that the owner has heard of is forgotten although its dispatches go on crossing the acknowledgement.
A row whose stamp is 0 is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from processor.core.table_life import (
    EFFECTS,
    IMPOSSIBLE,
    OBSERVED,
    STATE_CODES,
    THEN,
    UNSETTLED,
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

NEWS = np.uint64(2**64 - 1)
"""Stamp of a row of which no report has said everything yet."""

_NO_SPAN = Span(0)
_FIRST_CAPACITY = 64
_COLUMNS = (
    *("phase", "number", "stamp", "told", "start_ts", "start_resolved_ts", "prepared_from", "granted_epoch", "epoch"),
    *("checkpoint_ts", "resolved_ts", "last_synced_ts"),
    *("stats_stamp", "rows_per_s", "bytes_per_s", "puller_resolved_ts", "in_snapshot"),
)


class SpanTable:
    """The rows. Columns have shape (capacity,); rows at and beyond `size` were never used."""

    def __init__(self) -> None:
        capacity = _FIRST_CAPACITY
        self.size = 0
        self.spans: list[Span] = []  # by row
        self.phase: U8 = np.zeros(capacity, np.uint8)
        self.number: U32 = np.zeros(capacity, np.uint32)  # the owner's; 0 = none yet
        self.stamp: U64 = np.zeros(capacity, np.uint64)
        self.told: U64 = np.zeros(capacity, np.uint64)
        self.start_ts: U64 = np.zeros(capacity, np.uint64)  # of the next add_table_span
        self.start_resolved_ts: U64 = np.zeros(capacity, np.uint64)
        self.prepared_from: U64 = np.zeros(capacity, np.uint64)
        self.granted_epoch: U64 = np.zeros(capacity, np.uint64)  # the newest that was granted
        self.epoch: U64 = np.zeros(capacity, np.uint64)  # the one in force
        self.checkpoint_ts: U64 = np.zeros(capacity, np.uint64)
        self.resolved_ts: U64 = np.zeros(capacity, np.uint64)
        self.last_synced_ts: U64 = np.zeros(capacity, np.uint64)
        self.stats_stamp: U64 = np.zeros(capacity, np.uint64)  # as stamp, of the statistics; 0 = there are none
        self.rows_per_s: F64 = np.zeros(capacity, np.float64)
        self.bytes_per_s: F64 = np.zeros(capacity, np.float64)
        self.puller_resolved_ts: U64 = np.zeros(capacity, np.uint64)
        self.in_snapshot: U8 = np.zeros(capacity, np.uint8)
        self.errors: dict[int, str] = {}  # row -> what ended it
        self.kept_grants: dict[int, tuple[int, int, int]] = {}  # row -> (epoch, checkpoint_ts, resolved_ts)
        self.to_raise: set[int] = set()  # rows whose granted_epoch is to be raised at the sink
        self.has_news = False
        """Something changed, or a dispatch was taken in, since the last report."""
        self._row_of_span: dict[Span, int] = {}
        self._row_of_number: dict[int, int] = {}
        self._free: list[int] = []
        self._version = 0  # grows whenever a phase or a number changes
        self._observed: tuple[int, Rows, list[Span]] = (-1, np.empty(0, np.intp), [])
        self._held: tuple[int, int, int] = (-1, 0, 0)

    # What is there -------------------------------------------------------------------------------------------------

    def rows_in(self, phase: Phase) -> list[int]:
        return np.flatnonzero(self.phase[: self.size] == phase).tolist()

    def row_of(self, span: Span) -> int | None:
        return self._row_of_span.get(span)

    def is_settled(self) -> bool:
        """No call of the executor is due."""
        return not self.to_raise and not bool(UNSETTLED[self.phase[: self.size]].any())

    def observed(self) -> tuple[Rows, list[Span]]:
        """The rows whose status is asked for, and their spans; the same list objects until a span comes, goes or changes."""
        if self._observed[0] != self._version:
            rows = np.flatnonzero(OBSERVED[self.phase[: self.size]])
            spans = self.spans
            self._observed = (self._version, rows, [spans[row] for row in rows.tolist()])
        return self._observed[1], self._observed[2]

    def held(self) -> tuple[int, int]:
        """How many spans are neither Absent nor Stopped, and the checksum over those that have a number."""
        if self._held[0] != self._version:
            phases = self.phase[: self.size]
            states = STATE_CODES[phases]
            rows = np.flatnonzero((states != TableState.ABSENT.code) & (states != TableState.STOPPED.code))
            numbered = rows[self.number[rows] != 0]
            checksum = span_checksum(self.number[numbered], STATE_CODES[phases[numbered]])
            self._held = (self._version, len(rows), checksum)
        return self._held[1], self._held[2]

    # Dispatches ----------------------------------------------------------------------------------------------------

    def take(self, request: DispatchTableRequest) -> None:
        """Applies one dispatch, and marks every span of it to be reported."""
        rows = np.array(self._rows_for(request), np.intp)
        places = np.arange(len(rows))
        if len(np.unique(rows)) == len(rows):
            self._take(request, rows, places)
        else:  # a span that is named twice: in order
            for place in places.tolist():
                self._take(request, rows[place : place + 1], places[place : place + 1])

    def _take(self, request: DispatchTableRequest, rows: Rows, places: Rows) -> None:
        events, before = request.actions[places], self.phase[rows]
        effects = EFFECTS[events, before]
        self._enter(rows, before, THEN[events, before])
        for effect in np.unique(effects).tolist():
            if effect != Effect.NOTHING:
                mask = effects == effect
                _DISPATCH_EFFECTS[Effect(effect)](self, request, rows[mask], places[mask])
        self._mark(rows)

    def _rows_for(self, request: DispatchTableRequest) -> list[int]:
        known, rows = self._row_of_span, []
        for span in request.spans:
            row = known.get(span)
            rows.append(self._new_row(span) if row is None else row)
        differs = self.number[rows] != request.numbers if rows else np.empty(0, bool)
        for place in np.flatnonzero(differs).tolist():
            self._set_number(rows[place], int(request.numbers[place]))
        return rows

    def _start(self, request: DispatchTableRequest, rows: Rows, places: Rows) -> None:
        self._set_start(request, rows, places)
        self.prepared_from[rows] = self.checkpoint_ts[rows] = self.start_ts[rows]
        self.resolved_ts[rows] = self.start_resolved_ts[rows]
        self.last_synced_ts[rows] = self.granted_epoch[rows] = self.epoch[rows] = self.stats_stamp[rows] = 0

    def _set_start(self, request: DispatchTableRequest, rows: Rows, places: Rows) -> None:
        self.start_ts[rows] = request.checkpoint_ts[places]
        self.start_resolved_ts[rows] = np.maximum(request.checkpoint_ts[places], request.resolved_ts[places])

    def _grant(self, request: DispatchTableRequest, rows: Rows, places: Rows) -> None:
        self._set_start(request, rows, places)
        self.granted_epoch[rows] = request.assignment_epochs[places]

    def _keep_grant(self, request: DispatchTableRequest, rows: Rows, places: Rows) -> None:
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            epoch, checkpoint_ts = int(request.assignment_epochs[place]), int(request.checkpoint_ts[place])
            if row not in self.kept_grants or epoch > self.kept_grants[row][0]:
                self.kept_grants[row] = (epoch, checkpoint_ts, max(checkpoint_ts, int(request.resolved_ts[place])))

    def _renew_grant(self, request: DispatchTableRequest, rows: Rows, places: Rows) -> None:
        newer = request.assignment_epochs[places] > self.granted_epoch[rows]
        self._grant(request, rows[newer], places[newer])

    def _raise(self, request: DispatchTableRequest, rows: Rows, places: Rows) -> None:
        newer = request.assignment_epochs[places] > self.granted_epoch[rows]
        self.granted_epoch[rows[newer]] = request.assignment_epochs[places[newer]]
        self.to_raise.update(rows[newer].tolist())

    def _call_off(self, rows: Iterable[int]) -> None:
        if self.kept_grants or self.to_raise:
            for row in rows:
                self.kept_grants.pop(row, None)
                self.to_raise.discard(row)

    # What the executor said ----------------------------------------------------------------------------------------

    def happened(self, event: Input, happened_to: Sequence[int]) -> None:
        """TAKEN, FINISHED or BEHIND, to rows in which that call was due. FINISHED of a removal: see `ended`."""
        if not happened_to:
            return
        rows = np.array(happened_to, np.intp)
        before = self.phase[rows]
        effects = EFFECTS[event, before]
        self._enter(rows, before, self._then(event, rows, before))
        writing = rows[effects == Effect.WRITE]
        if len(writing):
            self.epoch[writing] = self.granted_epoch[writing]
            self.checkpoint_ts[writing] = np.maximum(self.checkpoint_ts[writing], self.start_ts[writing])
            self.resolved_ts[writing] = np.maximum(self.resolved_ts[writing], self.start_resolved_ts[writing])
        if event is Input.BEHIND:
            self._call_off(happened_to)
        if self.kept_grants:
            for row in rows[effects == Effect.READY].tolist():
                self._give_kept_grant(row)

    def ended(self, ended: Sequence[int], last_checkpoints: Sequence[int]) -> None:
        """FINISHED of a removal, with the executor's last checkpoint_ts (0: not known; what was seen last holds)."""
        self.happened(Input.FINISHED, ended)
        rows = np.array(ended, np.intp)
        self.checkpoint_ts[rows] = np.maximum(self.checkpoint_ts[rows], np.array(last_checkpoints, np.uint64))
        self.resolved_ts[rows] = np.maximum(self.resolved_ts[rows], self.checkpoint_ts[rows])

    def fail(self, row: int, text: str) -> None:
        """The span's error: it is to be removed, and reported with this text. The first text stays."""
        at = np.array([row], np.intp)
        before = self.phase[at]
        self._enter(at, before, self._then(Input.FAILED, at, before))
        self._call_off((row,))
        if row not in self.errors:
            self.errors[row] = text
            self._mark(at)

    def raised(self, row: int) -> None:
        """The sink has taken the newest granted epoch."""
        self.to_raise.discard(row)
        self.epoch[row] = self.granted_epoch[row]
        self._mark(np.array([row], np.intp))

    def observe(self, rows: Rows, checkpoint_ts: U64, resolved_ts: U64, last_synced_ts: U64) -> None:
        """What the executor says of observed rows, shape (len(rows),) each. Nothing goes back; the rows that moved are marked."""
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
        """Statistics of one row; marked if they differ from the last ones."""
        new = (rows_per_s, bytes_per_s, puller_resolved_ts, int(in_snapshot))
        old = (self.rows_per_s[row], self.bytes_per_s[row], self.puller_resolved_ts[row], self.in_snapshot[row])
        if self.stats_stamp[row] == 0 or new != old:
            self.rows_per_s[row], self.bytes_per_s[row], self.puller_resolved_ts[row], self.in_snapshot[row] = new
            self.stats_stamp[row] = NEWS

    def _then(self, event: Input, rows: Rows, before: U8) -> U8:
        then: U8 = THEN[event, before]
        if (then == IMPOSSIBLE).any():
            row = int(rows[then == IMPOSSIBLE][0])
            raise ImpossibleInputError(f"{event.name} of span {self.spans[row]} in phase {Phase(self.phase[row]).name}")
        return then

    def _give_kept_grant(self, row: int) -> None:
        grant = self.kept_grants.pop(row, None)
        if grant is not None:
            self.granted_epoch[row], self.start_ts[row], self.start_resolved_ts[row] = grant
            self.phase[row] = Phase.GRANTED

    # The owner -----------------------------------------------------------------------------------------------------

    def acknowledge(self, acked: int) -> None:
        """The owner has applied every report up to number `acked`: what has ended and was heard of is forgotten."""
        phases = self.phase[: self.size]
        stamps, told = self.stamp[: self.size], self.told[: self.size]
        for row in np.flatnonzero((phases == Phase.ABSENT) & (stamps > 0) & (stamps <= acked)).tolist():
            self._free_row(row)
        stopped = np.flatnonzero((phases == Phase.STOPPED) & (told > 0) & (told <= acked))
        if len(stopped):
            self._enter(stopped, phases[stopped], THEN[Input.ACKED, phases[stopped]])
            self.epoch[stopped] = 0
            self.stats_stamp[stopped] = 0
            for row in stopped.tolist():
                self.errors.pop(row, None)

    def set_numbers(self, numbers: U32, spans: SpanBlock) -> None:
        """From now on these spans are called by these numbers; spans that are not here are passed over."""
        for number, span in zip(numbers.tolist(), spans, strict=True):
            row = self._row_of_span.get(span)
            if row is not None and number != self.number[row]:
                self._set_number(row, number)

    def tell_everything(self, new_owner: bool) -> None:
        """Numbers are forgotten and the next report, on base 0, names everything. new_owner: it has heard of nothing yet."""
        if new_owner:
            absent = (self.phase[: self.size] == Phase.ABSENT) & (self.stamp[: self.size] > 0)
            for row in np.flatnonzero(absent).tolist():
                self._free_row(row)  # it has no need to hear of them
        self._row_of_number.clear()
        self.number[: self.size] = 0
        used = self.stamp[: self.size] > 0
        self.stamp[: self.size][used] = NEWS
        self.stats_stamp[: self.size][self.stats_stamp[: self.size] > 0] = NEWS
        if new_owner:
            self.told[: self.size] = 0
        self._version += 1

    # Rows ----------------------------------------------------------------------------------------------------------

    def _enter(self, rows: Rows, before: U8, then: U8) -> None:
        self.phase[rows] = then
        self._version += 1
        changed = rows[STATE_CODES[before] != STATE_CODES[then]]
        if len(changed):
            self.told[changed] = 0
            self._mark(changed)

    def _mark(self, rows: Rows) -> None:
        self.stamp[rows] = NEWS
        self.has_news = True

    def _set_number(self, row: int, number: int) -> None:
        old, other = int(self.number[row]), self._row_of_number.get(number)
        if old and self._row_of_number.get(old) == row:
            del self._row_of_number[old]
        if other is not None:
            self.number[other] = 0  # the owner has given this number to another span: the former is reported by name again
        self.number[row] = number
        if number:
            self._row_of_number[number] = row
        self._version += 1

    def _new_row(self, span: Span) -> int:
        if self._free:
            row = self._free.pop()
            self.spans[row] = span
        else:
            row = self.size
            if row == len(self.phase):
                self._grow()
            self.spans.append(span)
            self.size += 1
        self._row_of_span[span] = row
        return row

    def _free_row(self, row: int) -> None:
        self._set_number(row, 0)
        del self._row_of_span[self.spans[row]]
        self.spans[row] = _NO_SPAN
        self.stamp[row] = self.told[row] = self.stats_stamp[row] = 0
        self._free.append(row)

    def _grow(self) -> None:
        for name in _COLUMNS:
            column = getattr(self, name)
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))

    def check(self) -> None:
        """Asserts what holds between calls; for tests."""
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


_DISPATCH_EFFECTS: dict[Effect, Callable[[SpanTable, DispatchTableRequest, Rows, Rows], None]] = {
    Effect.START: SpanTable._start,
    Effect.GRANT: SpanTable._grant,
    Effect.KEEP_GRANT: SpanTable._keep_grant,
    Effect.RENEW_GRANT: SpanTable._renew_grant,
    Effect.RAISE: SpanTable._raise,
    Effect.CALL_OFF: lambda table, _request, rows, _places: table._call_off(rows.tolist()),
}
