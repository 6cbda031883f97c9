"""RowReports move rows: the rules of transitions.py, applied to whole columns.

The steady case (a Primary that goes on writing) is a handful of array operations; everything else is looked up in the compiled
table and done outcome by outcome, each for all of its rows at once. A row occurs at most once in a report.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from owner.core.dispatch import OutgoingDispatches
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
from owner.core.transitions import COMPILED, Dispatch, Note, Outcome, Role, RoleChange, key_of
from tablewire.model.columns import U8, U64
from tablewire.model.states import DispatchAction, ReplicationState, TableState

EPOCH_SHIFT = 20
STOPPED = TableState.STOPPED.code
SLICED_ROWS_MIN = 64
"""Runs of fewer rows than this on average are gathered and scattered instead."""
TABLE_ABSENT = TableState.ABSENT.code
WRITING = np.array([TableState.REPLICATING.code, TableState.STOPPING.code, STOPPED], np.uint8)


@dataclass(frozen=True, slots=True)
class RowReports:
    """What one capture says of rows, shape (n,) each; rows unique. Only reports that count."""

    rows: Rows
    states: U8
    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64
    assignment_epochs: U64

    def take(self, mask: Mask) -> RowReports:
        return RowReports(
            self.rows[mask],
            self.states[mask],
            self.checkpoint_ts[mask],
            self.resolved_ts[mask],
            self.last_synced_ts[mask],
            self.assignment_epochs[mask],
        )


def reports_without_progress(rows: Rows, states: U8 | int) -> RowReports:
    """RowReports that bring a state and no progress."""
    nothing = np.zeros(len(rows), np.uint64)
    return RowReports(rows, np.full(len(rows), states, np.uint8), nothing, nothing, nothing, nothing)


@dataclass(slots=True)
class Replication:
    """What the rules need beside the rows, and what they leave behind in one tick."""

    tables: Tables
    owner_revision: int
    outgoing: OutgoingDispatches = field(default_factory=OutgoingDispatches)
    notes: Counter[Note] = field(default_factory=Counter)
    may_hold_any_span: set[int] = field(default_factory=set)  # captures that may hold any span: silent since before this term
    grants_floor: int = 0  # no new row starts with fewer grants, so that a span never gets a permission twice
    now_ms: int = 0
    refused: list[int] = field(default_factory=list)  # rows whose Secondary gave up during a planned move
    arrived: list[tuple[Rows, U8]] = field(default_factory=list)  # rows that began to replicate after a task, and which
    two_writers: list[tuple[int, int, int]] = field(default_factory=list)  # (row, capture that stays, capture that goes)


def roles_of(tables: Tables, rows: Rows, capture: int) -> U8:
    """The capture's Role in each row; shape (len(rows),)."""
    roles = np.zeros(len(rows), np.uint8)
    roles[tables.primary[rows] == capture] = Role.PRIMARY
    roles[tables.secondary[rows] == capture] = Role.SECONDARY
    for position in np.flatnonzero(tables.undetermined_count[rows]).tolist():
        if capture in tables.undetermined[int(rows[position])]:
            roles[position] = Role.UNDETERMINED
    return roles


def counted(tables: Tables, rows: Rows, roles: U8, capture: int, echo: int) -> Mask:
    """Which reports are newer than the last dispatch of their span to this capture; shape (len(rows),)."""
    mask = np.ones(len(rows), np.bool_)
    primary, secondary = roles == Role.PRIMARY, roles == Role.SECONDARY
    mask[primary] = tables.primary_dispatch[rows[primary]] <= echo
    mask[secondary] = tables.secondary_dispatch[rows[secondary]] <= echo
    for position in np.flatnonzero(roles == Role.UNDETERMINED).tolist():
        mask[position] = tables.undetermined[int(rows[position])][capture].dispatch <= echo
    return mask


def apply_reports(replication: Replication, capture: int, reports: RowReports) -> None:
    """Applies counted reports of one capture."""
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
    keys = key_of(
        tables.state[rows],
        roles,
        reports.states,
        tables.primary[rows] != NO_CAPTURE,
        tables.secondary[rows] != NO_CAPTURE,
        others,
    )
    codes = COMPILED.code[keys]
    for code in np.unique(codes).tolist():
        mask = codes == code
        _perform(replication, capture, COMPILED.outcomes[code], reports.take(mask), roles[mask])
    tables.refresh_steady(rows)


def writes_steadily(tables: Tables, capture: int, reports: RowReports) -> Mask:
    """Where a steady row's Primary goes on writing, so that there is nothing but progress; shape (len(reports.rows),)."""
    rows = reports.rows
    mask: Mask = (tables.primary[rows] == capture) & (reports.states == TableState.REPLICATING.code) & tables.steady[rows]
    return mask


def apply_steady_reports(tables: Tables, capture: int, reports: RowReports) -> bool:
    """Takes the progress of a report that brings nothing else; False, and nothing is done, when it brings more.

    An agent reports its spans in the order in which it got them, which is mostly that of the rows: runs of neighbouring rows are
    then read and written as slices, at the speed of memory.
    """
    rows = reports.rows
    if len(rows) < SLICED_ROWS_MIN:
        if not writes_steadily(tables, capture, reports).all():
            return False
        advance_checkpoints(tables, reports)
        return True
    if not (reports.states == TableState.REPLICATING.code).all():
        return False
    runs = _runs(rows)
    if len(runs) * SLICED_ROWS_MIN > len(rows):
        if not writes_steadily(tables, capture, reports).all():
            return False
        advance_checkpoints(tables, reports)
        return True
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
    """Runs of neighbouring rows: (first row, start and end among the rows, count)."""
    breaks = np.flatnonzero(rows[1:] - rows[:-1] != 1) + 1
    if len(breaks) * SLICED_ROWS_MIN > len(rows):
        return [(0, 0, 0, 0)] * (len(breaks) + 1)  # too many to be worth it
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(rows)]
    return [(int(rows[start]), start, end, end - start) for start, end in zip(starts, ends, strict=True)]


def advance_checkpoints(tables: Tables, reports: RowReports) -> None:
    """Progress never goes back, and resolved is never below the checkpoint."""
    rows = reports.rows
    checkpoint = np.maximum(tables.checkpoint_ts[rows], reports.checkpoint_ts)
    tables.checkpoint_ts[rows] = checkpoint
    tables.resolved_ts[rows] = np.maximum(np.maximum(tables.resolved_ts[rows], reports.resolved_ts), checkpoint)
    tables.last_synced_ts[rows] = np.maximum(tables.last_synced_ts[rows], reports.last_synced_ts)
    tables.mark_changed(rows)


def raise_progress(tables: Tables, rows: Rows, checkpoint_ts: int) -> None:
    """No row stays below this checkpoint."""
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
    if outcome.note is Note.REFUSED:
        replication.refused.extend(rows.tolist())
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
    if change is RoleChange.KEEP:
        note_states(tables, capture, reports, roles)
        return
    dispatches = np.zeros(len(roles), np.uint32)
    rows = reports.rows
    primary, secondary, undetermined = (roles == role for role in (Role.PRIMARY, Role.SECONDARY, Role.UNDETERMINED))
    dispatches[primary] = tables.primary_dispatch[rows[primary]]
    dispatches[secondary] = tables.secondary_dispatch[rows[secondary]]
    for position in np.flatnonzero(undetermined).tolist():
        dispatches[position] = tables.undetermined[int(rows[position])][capture].dispatch
    clear_primary(tables, rows[primary])
    clear_secondary(tables, rows[secondary])
    tables.clear_undetermined(rows[undetermined].tolist(), capture)
    if change in (RoleChange.TO_PRIMARY, RoleChange.TO_SECONDARY):
        tables.scheduled[rows] = True  # somebody has it, although not by an Add of this term
    if change is RoleChange.TO_PRIMARY:
        tables.primary[rows] = capture
        tables.primary_reported[rows] = reports.states
        tables.primary_dispatch[rows] = dispatches
        tables.assignment_epoch[rows] = reports.assignment_epochs
    elif change is RoleChange.TO_SECONDARY:
        tables.secondary[rows] = capture
        tables.secondary_reported[rows] = reports.states
        tables.secondary_dispatch[rows] = dispatches
    elif change is RoleChange.TO_UNDETERMINED:
        for position, row in enumerate(rows.tolist()):
            tables.add_undetermined((row,), capture, int(reports.states[position]), int(dispatches[position]))


def note_reports(tables: Tables, capture: int, reports: RowReports, roles: U8) -> None:
    """RowReports that do not count: no rule is applied, but they are what the capture said last, and will not be said again.

    The Primary's progress is taken all the same: what is durable in the sink remains so, whatever is under way to it.
    """
    note_states(tables, capture, reports, roles)
    progress = (roles == Role.PRIMARY) & np.isin(reports.states, WRITING)
    if progress.any():
        advance_checkpoints(tables, reports.take(progress))


def note_states(tables: Tables, capture: int, reports: RowReports, roles: U8) -> None:
    """Remembers what was said last, at the role of the capture."""
    primary, secondary = roles == Role.PRIMARY, roles == Role.SECONDARY
    tables.primary_reported[reports.rows[primary]] = reports.states[primary]
    tables.secondary_reported[reports.rows[secondary]] = reports.states[secondary]
    for position in np.flatnonzero(roles == Role.UNDETERMINED).tolist():
        tables.undetermined[int(reports.rows[position])][capture].reported = int(reports.states[position])


def clear_primary(tables: Tables, rows: Rows) -> None:
    tables.primary[rows] = NO_CAPTURE
    tables.primary_reported[rows] = TABLE_ABSENT
    tables.primary_dispatch[rows] = 0
    tables.in_snapshot[rows] = False


def clear_secondary(tables: Tables, rows: Rows) -> None:
    tables.secondary[rows] = NO_CAPTURE
    tables.secondary_reported[rows] = TABLE_ABSENT
    tables.secondary_dispatch[rows] = 0


def _dispatch(replication: Replication, capture: int, dispatch: Dispatch, rows: Rows) -> None:
    tables, outgoing = replication.tables, replication.outgoing
    if dispatch is Dispatch.PREPARE_REPORTER:
        outgoing.add(capture, rows, DispatchAction.ADD_PREPARE)
    elif dispatch is Dispatch.WRITE_REPORTER:
        outgoing.add(capture, rows, DispatchAction.ADD_WRITE)
    elif dispatch is Dispatch.REMOVE_REPORTER:
        outgoing.add(capture, rows, DispatchAction.REMOVE)
    elif dispatch is Dispatch.REMOVE_PRIMARY:
        outgoing.add_by_capture(tables.primary[rows], rows, DispatchAction.REMOVE)
    elif dispatch is Dispatch.GRANT:
        grant(replication, rows)


def grant(replication: Replication, rows: Rows) -> None:
    """The Secondary of each row becomes its Primary under a new permission; there must be no Primary and no Undetermined."""
    tables = replication.tables
    tables.grants[rows] = np.maximum(tables.grants[rows], replication.grants_floor) + 1
    tables.assignment_epoch[rows] = np.uint64(replication.owner_revision << EPOCH_SHIFT) + tables.grants[rows].astype(np.uint64)
    tables.primary[rows] = tables.secondary[rows]
    tables.primary_reported[rows] = tables.secondary_reported[rows]
    tables.primary_dispatch[rows] = tables.secondary_dispatch[rows]
    clear_secondary(tables, rows)
    replication.outgoing.add_by_capture(tables.primary[rows], rows, DispatchAction.ADD_WRITE)


def _two_writers(replication: Replication, capture: int, row: int, epoch: int) -> None:
    """The newest permission wins; the other is told to stop and remains Undetermined until it has."""
    tables = replication.tables
    rows = np.array([row], np.int64)
    former = int(tables.primary[row])
    was_secondary = int(tables.secondary[row]) == capture
    if was_secondary:
        dispatch = int(tables.secondary_dispatch[row])
        clear_secondary(tables, rows)
    else:
        dispatch = tables.undetermined[row][capture].dispatch
        tables.clear_undetermined((row,), capture)
    if epoch > int(tables.assignment_epoch[row]):
        tables.add_undetermined((row,), former, int(tables.primary_reported[row]), int(tables.primary_dispatch[row]))
        tables.primary[row], tables.assignment_epoch[row] = capture, epoch
        tables.primary_reported[row], tables.primary_dispatch[row] = TableState.REPLICATING.code, dispatch
        loser, winner = former, capture
    else:
        tables.add_undetermined((row,), capture, TableState.REPLICATING.code, dispatch)
        loser, winner = capture, former
    replication.outgoing.add(loser, rows, DispatchAction.REMOVE)
    replication.two_writers.append((row, winner, loser))
    if tables.secondary[row] == NO_CAPTURE and tables.state[row] in (PREPARE, COMMIT):
        tables.set_state(rows, REPLICATING, replication.now_ms)
    elif winner == capture and tables.state[row] == COMMIT:
        tables.set_state(
            rows, PREPARE, replication.now_ms
        )  # it was not told to stop, and is not while the other may hold the span
    tables.refresh_steady(rows)


def find_removed(replication: Replication) -> Rows:
    """Rows in Removing that nobody holds any more are dropped; the rows that were, as they are in use no more."""
    tables = replication.tables
    if replication.may_hold_any_span:
        return np.empty(0, np.int64)
    size = tables.size
    mask = tables.state[:size] == REMOVING
    if not mask.any():
        return np.empty(0, np.int64)
    mask &= (tables.primary[:size] == NO_CAPTURE) & (tables.secondary[:size] == NO_CAPTURE)
    mask &= tables.live[:size] & (tables.undetermined_count[:size] == 0)
    rows = np.flatnonzero(mask)
    if len(rows):
        replication.grants_floor = max(replication.grants_floor, int(tables.grants[rows].max()))
    return rows


def apply_capture_loss(replication: Replication, capture: int) -> None:
    """A capture's death counts as Stopped from it, in every state; it leaves no role behind."""
    replication.may_hold_any_span.discard(capture)
    rows = replication.tables.rows_with_role(capture)
    if len(rows):
        apply_reports(replication, capture, reports_without_progress(rows, STOPPED))
