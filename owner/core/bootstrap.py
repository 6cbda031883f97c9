"""The start of a term: placement is not stored, it is rebuilt from what the captures say of themselves.

The gate opens once every capture that was alive at the first tick has answered or is gone, at the latest after
`bootstrap_timeout_ms`; it never closes again. Whoever stayed silent may hold any span: it is Undetermined everywhere until it
speaks or dies, so that nothing is promoted beside it while all that already writes goes on.
"""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.inbox import HELD, rows_of_report
from owner.core.replication import RowReports, advance_checkpoints, raise_progress
from owner.core.state import Core
from owner.core.tables import (
    ABSENT,
    NO_CAPTURE,
    NO_ROW,
    PREPARE,
    REPLICATING,
    TASK_ADD,
    TASK_MOVE,
    Rows,
)
from tablewire.model.messages import SpanReports
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction, TableState

PREPARING, PREPARED = TableState.PREPARING.code, TableState.PREPARED.code
WRITES, STOPPED = TableState.REPLICATING.code, TableState.STOPPED.code


def try_finish_bootstrap(core: Core) -> bool:
    """Opens the gate if it is time to; True when this call did it."""
    gate = core.bootstrap
    if gate.done:
        return False
    if gate.started_ms is None:
        gate.started_ms = core.now_ms
        gate.waiting_for = {capture.index for capture in core.captures.alive()}
    gate.waiting_for = {index for index in gate.waiting_for if core.captures[index].alive}
    if gate.waiting_for and core.now_ms - gate.started_ms < core.config.bootstrap_timeout_ms:
        return False
    gate.done = True
    # Captures that joined while the gate was closed and have not answered hold nothing of a former term: their id is new.
    core.replication.may_hold_any_span |= gate.waiting_for
    _rebuild(core)
    gate.reports.clear()
    return True


def _rebuild(core: Core) -> None:
    """Each capture's report becomes roles: the writer with the newest permission is Primary, the first prepared one Secondary."""
    reports = sorted(core.bootstrap.reports.items(), key=lambda item: core.captures[item[0]].id)
    told = [
        (core.captures[index], report, _rows(core, core.captures[index], report))
        for index, report in reports
        if core.captures[index].alive
    ]
    for capture, _, _ in told:
        capture.acked = capture.received
    for capture, report, rows in told:
        _assign_primaries(core, capture, report, rows)
    for wanted in (PREPARED, PREPARING):
        for capture, report, rows in told:
            _assign_secondaries(core, capture, rows, report.states, wanted)
    for capture, report, rows in told:
        _note_stopping(core, capture, report, rows)
    tables = core.tables
    rows = tables.all_rows()
    primary, secondary = tables.primary[rows] != NO_CAPTURE, tables.secondary[rows] != NO_CAPTURE
    tables.set_state(rows[secondary], PREPARE, core.now_ms)
    tables.set_state(rows[primary & ~secondary], REPLICATING, core.now_ms)
    tables.set_state(rows[~primary & ~secondary], ABSENT, core.now_ms)
    tables.task[rows[secondary]] = np.where(primary[secondary], TASK_MOVE, TASK_ADD)
    known = rows[primary | secondary | (tables.checkpoint_ts[rows] > 0)]
    tables.scheduled[known] = True
    raise_progress(tables, known, core.checkpoint_ts)  # the global checkpoint holds for every span
    tables.refresh_steady(rows)


def _rows(core: Core, capture: Capture, report: SpanReports) -> Rows:
    """Rows for all that is held, stopping or just stopped; made where there are none."""
    tables = core.tables
    matters = HELD[report.states] | (report.states == STOPPED)
    named = report.numbers == 0
    spans = report.spans
    missing = np.flatnonzero((tables.rows_of_spans(spans) == NO_ROW) & matters[named])
    if len(missing):
        fresh = spans if len(missing) == len(spans) else SpanBlock.of([spans[int(position)] for position in missing])
        tables.add(fresh, core.now_ms)
    return rows_of_report(core, capture, report)


def _assign_primaries(core: Core, capture: Capture, report: SpanReports, rows: Rows) -> None:
    tables = core.tables
    mask = (report.states == WRITES) & (rows != NO_ROW)
    at, epochs = rows[mask], report.assignment_epochs[mask]
    wins = (tables.primary[at] == NO_CAPTURE) | (epochs > tables.assignment_epoch[at])
    beaten = at[wins & (tables.primary[at] != NO_CAPTURE)]
    for row in beaten.tolist():
        former = int(tables.primary[row])
        tables.add_undetermined((row,), former, WRITES)
        core.replication.outgoing.add(former, np.array([row], np.int64), DispatchAction.REMOVE)
        core.replication.two_writers.append((row, capture.index, former))
    losers = at[~wins]
    for row in losers.tolist():
        tables.add_undetermined((row,), capture.index, WRITES)
        core.replication.two_writers.append((row, int(tables.primary[row]), capture.index))
    core.replication.outgoing.add(capture.index, losers, DispatchAction.REMOVE)
    winners = at[wins]
    tables.primary[winners] = capture.index
    tables.primary_reported[winners] = WRITES
    tables.assignment_epoch[winners] = epochs[wins]
    advance_checkpoints(tables, _progress(report, rows, mask))


def _assign_secondaries(core: Core, capture: Capture, rows: Rows, states: np.ndarray, wanted: int) -> None:
    tables = core.tables
    at = rows[(states == wanted) & (rows != NO_ROW)]
    seated = at[tables.secondary[at] == NO_CAPTURE]
    tables.secondary[seated] = capture.index
    tables.secondary_reported[seated] = wanted
    for row in at[tables.secondary[at] != capture.index].tolist():
        tables.add_undetermined((row,), capture.index, wanted)


def _note_stopping(core: Core, capture: Capture, report: SpanReports, rows: Rows) -> None:
    stopping = rows[(report.states == TableState.STOPPING.code) & (rows != NO_ROW)]
    core.tables.add_undetermined(stopping.tolist(), capture.index, TableState.STOPPING.code)
    stopped = (report.states == STOPPED) & (rows != NO_ROW)
    advance_checkpoints(core.tables, _progress(report, rows, stopped))


def _progress(report: SpanReports, rows: Rows, mask: np.ndarray) -> RowReports:
    return RowReports(
        rows[mask],
        report.states[mask],
        report.checkpoint_ts[mask],
        report.resolved_ts[mask],
        report.last_synced_ts[mask],
        report.assignment_epochs[mask],
    )
