"""Applies reports to rows: the rules of transitions.py on whole columns.

The steady case (a Primary that continues to write) is a few array operations. For the other reports
the outcome is looked up in the compiled table, and each outcome is carried out for all of its rows
at once. A row occurs at most once in a report.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from owner.core.roles import assign, clear, get_field, roles_of, set_field
from owner.core.tables import (
    COMMIT,
    NO_CAPTURE,
    PREPARE,
    REMOVING,
    REPLICATING,
    TASK_NONE,
    Mask,
    Rows,
    Tables,
)
from owner.core.transitions import COMPILED, Dispatch, Note, Outcome, Role, RoleChange
from tablewire.model.columns import U8, U64
from tablewire.model.messages import SpanReports
from tablewire.model.states import DispatchAction, ReplicationState, TableState

EPOCH_SHIFT = 20
SLICED_ROWS_MIN = 64
"""Runs of fewer rows than this on average are gathered and scattered instead of sliced."""
TABLE_REPLICATING, STOPPED = TableState.REPLICATING.code, TableState.STOPPED.code
WRITING = np.array([TABLE_REPLICATING, TableState.STOPPING.code, STOPPED], np.uint8)
_TO_REPORTER = {
    Dispatch.PREPARE_REPORTER: DispatchAction.ADD_PREPARE,
    Dispatch.WRITE_REPORTER: DispatchAction.ADD_WRITE,
    Dispatch.REMOVE_REPORTER: DispatchAction.REMOVE,
}


@dataclass(frozen=True, slots=True)
class RowReports:
    """The report of one capture by row, shape (n,) each; rows are unique."""

    rows: Rows
    states: U8
    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64
    assignment_epochs: U64

    @classmethod
    def of(cls, report: SpanReports, rows: Rows) -> RowReports:
        """Return the reports by row. rows: the row of each reported span."""
        progress = report.checkpoint_ts, report.resolved_ts, report.last_synced_ts
        return cls(rows, report.states, *progress, report.assignment_epochs)

    @classmethod
    def without_progress(cls, rows: Rows, states: npt.ArrayLike) -> RowReports:
        zeros = np.zeros(len(rows), np.uint64)
        return cls(rows, np.full(len(rows), states, np.uint8), zeros, zeros, zeros, zeros)

    def take(self, mask: Mask) -> RowReports:
        progress = self.checkpoint_ts[mask], self.resolved_ts[mask], self.last_synced_ts[mask]
        return RowReports(self.rows[mask], self.states[mask], *progress, self.assignment_epochs[mask])


@dataclass(slots=True)
class OutgoingDispatches:
    """The dispatches of one tick, in the order in which they were decided."""

    entries: dict[int, list[tuple[Rows, DispatchAction]]] = field(default_factory=dict)  # by capture

    def add(self, capture: int, rows: Rows, action: DispatchAction) -> None:
        if len(rows):
            self.entries.setdefault(capture, []).append((rows, action))

    def add_by_capture(self, captures: np.ndarray, rows: Rows, action: DispatchAction) -> None:
        """Send the same action to the capture of each row; captures: shape (len(rows),)."""
        for capture in np.unique(captures).tolist():
            self.add(capture, rows[captures == capture], action)

    def to(self, capture: int) -> tuple[Rows, U8]:
        """Return the rows and actions for one capture. If there are two for a row, the last counts."""
        entries = self.entries[capture]
        rows = np.concatenate([rows for rows, _ in entries])
        actions = np.repeat(np.array([action for _, action in entries], np.uint8), [len(rows) for rows, _ in entries])
        if len(entries) > 1:
            _, last = np.unique(rows[::-1], return_index=True)
            keep = np.sort(len(rows) - 1 - last)
            rows, actions = rows[keep], actions[keep]
        return rows, actions


@dataclass(slots=True)
class Replication:
    """What the rules need besides the rows, and their effects in one tick."""

    tables: Tables
    owner_revision: int
    outgoing: OutgoingDispatches = field(default_factory=OutgoingDispatches)
    notes: Counter[Note] = field(default_factory=Counter)
    may_hold_any_span: set[int] = field(default_factory=set)  # captures that have not answered since before this term
    grants_floor: int = 0  # no new row starts with fewer grants, so that no permission of a span is given twice
    now_ms: int = 0
    arrived: list[tuple[Rows, U8]] = field(default_factory=list)  # rows that began to replicate after a task, and the tasks
    two_writers: list[tuple[int, int, int]] = field(default_factory=list)  # (row, capture that stays, capture that goes)

    def begin_tick(self, now_ms: int) -> None:
        self.now_ms, self.outgoing = now_ms, OutgoingDispatches()
        self.notes.clear()
        self.arrived.clear()
        self.two_writers.clear()


def counted(tables: Tables, rows: Rows, roles: U8, capture: int, echo: int) -> Mask:
    """Return which reports are newer than the last dispatch of their span; shape (len(rows),)."""
    mask: Mask = get_field(tables, "dispatch", rows, roles, capture) <= echo
    return mask


def apply_reports(replication: Replication, capture: int, reports: RowReports) -> None:
    """Apply counted reports of one capture."""
    tables, rows = replication.tables, reports.rows
    writes = writes_steadily(tables, capture, reports)
    if writes.all():
        advance_checkpoints(tables, reports)
        return
    if writes.any():
        advance_checkpoints(tables, reports.take(writes))
        reports = reports.take(~writes)
        rows = reports.rows
    roles = roles_of(tables, rows, capture)
    others = tables.undetermined_count[rows] - (roles == Role.UNDETERMINED) > 0
    if replication.may_hold_any_span - {capture}:
        others[:] = True
    primary, secondary = tables.primary[rows] != NO_CAPTURE, tables.secondary[rows] != NO_CAPTURE
    codes = COMPILED.codes(tables.state[rows], roles, reports.states, primary, secondary, others)
    for code in np.unique(codes).tolist():
        mask = codes == code
        _perform(replication, capture, COMPILED.outcomes[code], reports.take(mask), roles[mask])
    tables.refresh_steady(rows)


def writes_steadily(tables: Tables, capture: int, reports: RowReports) -> Mask:
    """Return where the Primary of a steady row continues to write; shape (n,)."""
    rows = reports.rows
    mask: Mask = (tables.primary[rows] == capture) & (reports.states == TABLE_REPLICATING) & tables.steady[rows]
    return mask


def apply_steady_reports(tables: Tables, capture: int, reports: RowReports) -> bool:
    """Apply a report that brings only progress. Return False, and change nothing, if it brings
    more.

    An agent reports its spans in the order in which it got them, which is mostly that of the rows.
    Runs of neighbouring rows are read and written as slices, at the speed of memory.
    """
    rows = reports.rows
    runs = _runs(rows)
    if len(runs) * SLICED_ROWS_MIN > len(rows):
        if not writes_steadily(tables, capture, reports).all():
            return False
        advance_checkpoints(tables, reports)
        return True
    if not (reports.states == TABLE_REPLICATING).all():
        return False
    for first, _, _, count in runs:
        at = slice(first, first + count)
        if not (tables.primary[at] == capture).all() or not tables.steady[at].all():
            return False
    has_synced = bool(reports.last_synced_ts.any())
    for first, start, end, count in runs:
        at = slice(first, first + count)
        checkpoint, resolved = tables.checkpoint_ts[at], tables.resolved_ts[at]
        np.maximum(checkpoint, reports.checkpoint_ts[start:end], out=checkpoint)
        np.maximum(resolved, reports.resolved_ts[start:end], out=resolved)
        np.maximum(resolved, checkpoint, out=resolved)
        if has_synced:
            synced = tables.last_synced_ts[at]
            np.maximum(synced, reports.last_synced_ts[start:end], out=synced)
    tables.mark_changed(rows)
    return True


def _runs(rows: Rows) -> list[tuple[int, int, int, int]]:
    """Return the runs of neighbouring rows: (first row, start and end among the rows, count). If
    there are too many to be of use, only their number counts."""
    breaks = np.flatnonzero(rows[1:] - rows[:-1] != 1) + 1
    if (len(breaks) + 1) * SLICED_ROWS_MIN > len(rows):
        return [(0, 0, 0, 0)] * (len(breaks) + 1)
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(rows)]
    return [(int(rows[start]), start, end, end - start) for start, end in zip(starts, ends, strict=True)]


def advance_checkpoints(tables: Tables, reports: RowReports) -> None:
    """Take over the reported progress. It never goes back; resolved covers the checkpoint."""
    rows = reports.rows
    checkpoint = np.maximum(tables.checkpoint_ts[rows], reports.checkpoint_ts)
    tables.checkpoint_ts[rows] = checkpoint
    tables.resolved_ts[rows] = np.maximum(np.maximum(tables.resolved_ts[rows], reports.resolved_ts), checkpoint)
    tables.last_synced_ts[rows] = np.maximum(tables.last_synced_ts[rows], reports.last_synced_ts)
    tables.mark_changed(rows)


def raise_progress(tables: Tables, rows: Rows, checkpoint_ts: int) -> None:
    """Raise the progress of these rows to at least this checkpoint."""
    checkpoint = np.maximum(tables.checkpoint_ts[rows], np.uint64(checkpoint_ts))
    tables.checkpoint_ts[rows] = checkpoint
    tables.resolved_ts[rows] = np.maximum(tables.resolved_ts[rows], checkpoint)
    tables.mark_changed(rows)


def _perform(replication: Replication, capture: int, outcome: Outcome, reports: RowReports, roles: U8) -> None:
    tables, rows = replication.tables, reports.rows
    if outcome.note is not Note.NOTHING:
        replication.notes[outcome.note] += len(rows)
    if outcome.note is Note.TWO_WRITERS:
        for position, row in enumerate(rows.tolist()):
            _two_writers(replication, capture, row, int(reports.assignment_epochs[position]))
        return
    if outcome.checkpoint:
        advance_checkpoints(tables, reports)
    _change_role(tables, capture, outcome.reporter, reports, roles)
    _dispatch(replication, capture, outcome.dispatch, rows)
    if outcome.state is ReplicationState.REPLICATING:
        arrived = rows[tables.state[rows] == COMMIT]
        if len(arrived):
            replication.arrived.append((arrived, tables.task[arrived]))
    if outcome.state is not None:
        tables.set_state(rows, outcome.state.code, replication.now_ms)
        if outcome.state in (ReplicationState.REPLICATING, ReplicationState.ABSENT):
            tables.task[rows] = TASK_NONE


def _change_role(tables: Tables, capture: int, change: RoleChange, reports: RowReports, roles: U8) -> None:
    rows = reports.rows
    if change is RoleChange.KEEP:
        set_field(tables, "reported", rows, roles, capture, reports.states)
        return
    dispatches = get_field(tables, "dispatch", rows, roles, capture)
    clear(tables, rows, roles, capture)
    if change is RoleChange.CLEAR:
        return
    role = Role[change.name.removeprefix("TO_")]
    assign(tables, rows, role, capture, reports.states, dispatches)
    if role is not Role.UNDETERMINED:
        tables.scheduled[rows] = True  # a capture has it, although not by an Add of this term
    if role is Role.PRIMARY:
        tables.assignment_epoch[rows] = reports.assignment_epochs


def note_reports(tables: Tables, capture: int, reports: RowReports, roles: U8) -> None:
    """Record reports that do not count. No rule is applied, but the capture will not report these
    states again.

    The progress of the Primary counts all the same: what is durable in the sink remains so,
    whatever is in flight to the capture.
    """
    set_field(tables, "reported", reports.rows, roles, capture, reports.states)
    progress = (roles == Role.PRIMARY) & np.isin(reports.states, WRITING)
    if progress.any():
        advance_checkpoints(tables, reports.take(progress))


def _dispatch(replication: Replication, capture: int, dispatch: Dispatch, rows: Rows) -> None:
    outgoing = replication.outgoing
    if dispatch in _TO_REPORTER:
        outgoing.add(capture, rows, _TO_REPORTER[dispatch])
    elif dispatch is Dispatch.REMOVE_PRIMARY:
        outgoing.add_by_capture(replication.tables.primary[rows], rows, DispatchAction.REMOVE)
    elif dispatch is Dispatch.GRANT:
        grant(replication, rows)


def grant(replication: Replication, rows: Rows) -> None:
    """Make the Secondary, which must be the only role, the Primary under a new permission."""
    tables = replication.tables
    tables.grants[rows] = np.maximum(tables.grants[rows], replication.grants_floor) + 1
    tables.assignment_epoch[rows] = np.uint64(replication.owner_revision << EPOCH_SHIFT) + tables.grants[rows].astype(np.uint64)
    secondary = tables.secondary[rows], tables.secondary_reported[rows], tables.secondary_dispatch[rows]
    assign(tables, rows, Role.PRIMARY, *secondary)
    clear(tables, rows, Role.SECONDARY)
    replication.outgoing.add_by_capture(tables.primary[rows], rows, DispatchAction.ADD_WRITE)


def _two_writers(replication: Replication, capture: int, row: int, epoch: int) -> None:
    """Keep the writer with the newest permission. The other one is sent a remove, and is
    Undetermined until it has stopped."""
    tables, rows = replication.tables, np.array([row], np.int64)
    former = tables.primary[rows], tables.primary_reported[rows], tables.primary_dispatch[rows]
    roles = roles_of(tables, rows, capture)
    newer = capture, TABLE_REPLICATING, get_field(tables, "dispatch", rows, roles, capture)
    clear(tables, rows, roles, capture)
    winner, loser = capture, int(former[0][0])
    if epoch > int(tables.assignment_epoch[row]):
        assign(tables, rows, Role.PRIMARY, *newer)
        assign(tables, rows, Role.UNDETERMINED, *former)
        tables.assignment_epoch[row] = epoch
    else:
        winner, loser = loser, winner
        assign(tables, rows, Role.UNDETERMINED, *newer)
    replication.outgoing.add(loser, rows, DispatchAction.REMOVE)
    replication.two_writers.append((row, winner, loser))
    if tables.secondary[row] == NO_CAPTURE and tables.state[row] in (PREPARE, COMMIT):
        tables.set_state(rows, REPLICATING, replication.now_ms)
    elif winner == capture and tables.state[row] == COMMIT:
        # The winner was not sent a remove, and must not be while the loser may hold the span.
        tables.set_state(rows, PREPARE, replication.now_ms)
    tables.refresh_steady(rows)


def find_removed(replication: Replication) -> Rows:
    """Return the rows in Removing in which no capture has a role any longer, to be dropped."""
    tables, size = replication.tables, replication.tables.size
    mask = tables.state[:size] == REMOVING
    if replication.may_hold_any_span or not mask.any():
        return np.empty(0, np.int64)
    mask &= (tables.primary[:size] == NO_CAPTURE) & (tables.secondary[:size] == NO_CAPTURE)
    mask &= tables.live[:size] & (tables.undetermined_count[:size] == 0)
    rows = np.flatnonzero(mask)
    if len(rows):
        replication.grants_floor = max(replication.grants_floor, int(tables.grants[rows].max()))
    return rows


def apply_capture_loss(replication: Replication, capture: int) -> None:
    """Apply Stopped to every span of a capture that is gone, in every state."""
    replication.may_hold_any_span.discard(capture)
    rows = replication.tables.rows_with_role(capture)
    if len(rows):
        apply_reports(replication, capture, RowReports.without_progress(rows, STOPPED))
