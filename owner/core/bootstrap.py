"""The start of a term. Placement is not stored: it is rebuilt from the first reports of the
captures.

Bootstrap ends once every capture that was alive at the first tick has reported or is gone, at the
latest after `bootstrap_timeout_ms`, and never starts again. A capture that has not reported by then
may hold any span. It counts as Undetermined for each of them until it reports or is gone, so that
no Secondary is promoted beside it while current writers continue.
"""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.inbox import HELD, rows_of_report
from owner.core.replication import RowReports, advance_checkpoints, apply_reports, raise_progress
from owner.core.roles import assign
from owner.core.state import Core
from owner.core.tables import ABSENT, NO_CAPTURE, NO_ROW, PREPARE, REPLICATING, TASK_ADD, TASK_MOVE, Rows
from owner.core.transitions import Role
from tablewire.model.spans import SpanBlock
from tablewire.model.states import TableState

PREPARING, PREPARED = TableState.PREPARING.code, TableState.PREPARED.code
WRITES, STOPPING, STOPPED = TableState.REPLICATING.code, TableState.STOPPING.code, TableState.STOPPED.code


def try_finish_bootstrap(core: Core) -> bool:
    """End bootstrap if nothing is left to wait for; return whether this call did."""
    bootstrap = core.bootstrap
    if bootstrap.done:
        return False
    if bootstrap.started_ms is None:
        bootstrap.started_ms = core.now_ms
        bootstrap.waiting_for = {capture.index for capture in core.captures.alive()}
    bootstrap.waiting_for = {index for index in bootstrap.waiting_for if core.captures[index].alive}
    if bootstrap.waiting_for and core.now_ms - bootstrap.started_ms < core.config.bootstrap_timeout_ms:
        return False
    bootstrap.done = True
    # A capture that joined during bootstrap and has not reported holds nothing of a former term,
    # since its id is new.
    core.replication.may_hold_any_span |= bootstrap.waiting_for
    _rebuild(core)
    bootstrap.reports.clear()
    return True


def _rebuild(core: Core) -> None:
    """Assign roles. The rules for an Undetermined capture make the writer with the newest
    permission the Primary; the first prepared capture becomes the Secondary."""
    tables = core.tables
    captures = sorted((core.captures[index] for index in core.bootstrap.reports), key=lambda capture: capture.id)
    reports = [(capture, _by_row(core, capture)) for capture in captures if capture.alive]
    for capture, report in reports:
        capture.acked = capture.received
        writes = report.take(report.states == WRITES)
        tables.add_undetermined(writes.rows, capture.index, WRITES)
        apply_reports(core.replication, capture.index, writes)
    for state in (PREPARED, PREPARING):
        for capture, report in reports:
            _assign_secondaries(core, capture, report.rows[report.states == state], state)
    for capture, report in reports:
        _note_stopping(core, capture, report)
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


def _by_row(core: Core, capture: Capture) -> RowReports:
    """Return the report of a capture by row, with new rows for unknown spans."""
    tables, report = core.tables, core.bootstrap.reports[capture.index]
    matters = (HELD[report.states] | (report.states == STOPPED))[report.numbers == 0]
    missing = np.flatnonzero((tables.rows_of_spans(report.spans) == NO_ROW) & matters).tolist()
    if missing:
        spans = report.spans
        tables.add(spans if len(missing) == len(spans) else SpanBlock.of([spans[at] for at in missing]), core.now_ms)
    rows = rows_of_report(core, capture, report)
    return RowReports.of(report, rows).take(rows != NO_ROW)


def _assign_secondaries(core: Core, capture: Capture, rows: Rows, state: int) -> None:
    tables = core.tables
    assigned = rows[tables.secondary[rows] == NO_CAPTURE]
    assign(tables, assigned, Role.SECONDARY, capture.index, state)
    tables.add_undetermined(rows[tables.secondary[rows] != capture.index], capture.index, state)


def _note_stopping(core: Core, capture: Capture, report: RowReports) -> None:
    core.tables.add_undetermined(report.rows[report.states == STOPPING], capture.index, STOPPING)
    advance_checkpoints(core.tables, report.take(report.states == STOPPED))
