"""Move: bring tables and spans to the captures that operators named, in that order."""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.jobs import JobReason, MoveJob, Reason
from owner.core.moves import MoveSlots, can_be_stopped, prepare, undo_prepare
from owner.core.policies.planner import PlanInput, plan_move, refuse_target
from owner.core.state import Core
from owner.core.tables import COMMIT, NO_CAPTURE, NO_ROW, PREPARE, REMOVING, TASK_MOVE
from tablewire.model.jobs import ENDED
from tablewire.model.states import QueryState


def move(core: Core, slots: MoveSlots) -> None:
    """Start, continue and end the moves of the jobs."""
    jobs, inputs, job_of_row = core.jobs.open(MoveJob), PlanInput.of(core, ()), dict[int, MoveJob]()
    if any(job.numbers is None for job in jobs):
        job_of_row = {row: job for job in jobs for row in _rows(core, job)}
    for job in jobs:
        if job.cancel_requested:
            _cancel(core, job)
            continue
        if job.numbers is None:
            _decide(core, job, inputs, job_of_row)
        if job.state not in ENDED and job.numbers is not None:
            _continue(core, job, inputs, slots)


def _rows(core: Core, job: MoveJob) -> list[int]:
    """Return the rows of a job that still exist."""
    rows = core.tables.rows_of_numbers(np.array(job.numbers or (), np.uint32))
    return [row for row in rows.tolist() if row != NO_ROW]


def _target(core: Core, job: MoveJob) -> Capture | Reason:
    """Return the target if it may take spans, otherwise the reason why not."""
    capture = core.captures.get(job.target)
    state = core.capture_state(capture) if capture is not None else None
    refused = refuse_target(job.target, state, job.target in core.jobs.drains)
    if refused is not None:
        return refused
    assert capture is not None
    return capture


def _decide(core: Core, job: MoveJob, inputs: PlanInput, job_of_row: dict[int, MoveJob]) -> None:
    """Refuse the job, or bind it to its rows and end older moves of them."""
    tables = core.tables
    target = _target(core, job)
    rows = [tables.row_of(job.span)] if job.span is not None else tables.rows_of_table(job.table_id)
    rows = [row for row in rows if row != NO_ROW and tables.wanted[row]]
    leaving = [row for row in rows if tables.state[row] == REMOVING]
    if not rows:
        job.set(QueryState.REFUSED, JobReason.SPAN_UNKNOWN.of(subject=job.view().subject))
    elif isinstance(target, Reason):
        job.set(QueryState.REFUSED, target)
    elif leaving:
        job.set(QueryState.PENDING, JobReason.STILL_REMOVED.of(span=tables.span(leaving[0])))
    elif not plan_move(inputs, rows, target.index):
        job.set(QueryState.REFUSED, JobReason.ALREADY_PRIMARY.of(target=job.target))
    else:
        job.numbers = tables.number[rows].tolist()
        for row in rows:
            older = job_of_row.get(row)
            if older is not None and older.state not in ENDED:
                _replace(core, older, job)
            job_of_row[row] = job


def _replace(core: Core, older: MoveJob, newer: MoveJob) -> None:
    """End the older move, and undo its prepares unless both have the same target."""
    if older.target != newer.target:
        _undo(core, older)
    older.set(QueryState.CANCELLED, JobReason.MOVE_REPLACED.of(target=newer.target))


def _cancel(core: Core, job: MoveJob) -> None:
    _undo(core, job)
    tables, capture = core.tables, core.captures.get(job.target)
    reason = JobReason.CANCELLED.of()
    for row in _rows(core, job):
        is_moving = capture is not None and capture.index in (tables.primary[row], tables.secondary[row])
        if is_moving and tables.state[row] == COMMIT:  # its Primary has been sent a remove
            reason = JobReason.CANCELLED_TOO_LATE.of(span=tables.span(row))
            break
    job.set(QueryState.CANCELLED, reason)


def _undo(core: Core, job: MoveJob) -> None:
    """Undo the prepares of a job."""
    tables, capture = core.tables, core.captures.get(job.target)
    rows = np.array(_rows(core, job), np.int64)
    if capture is not None:
        is_prepared = (tables.state[rows] == PREPARE) & (tables.secondary[rows] == capture.index)
        is_moving = (tables.task[rows] == TASK_MOVE) & (tables.primary[rows] != NO_CAPTURE)
        undo_prepare(core, rows[is_prepared & is_moving])


def _continue(core: Core, job: MoveJob, inputs: PlanInput, slots: MoveSlots) -> None:
    tables, target = core.tables, _target(core, job)
    rows = [row for row in _rows(core, job) if tables.state[row] != REMOVING]
    if not rows:
        job.set(QueryState.CANCELLED, JobReason.TABLE_DROPPED.of(table=job.table_id))
        return
    refused = target if isinstance(target, Reason) else _failed(core, job, rows, target.index)
    if refused is not None:
        _undo(core, job)
        job.set(QueryState.REFUSED, refused)
        return
    assert isinstance(target, Capture)
    moves = plan_move(inputs, rows, target.index)
    reasons = [reason for move in moves if (reason := _start(core, job, move.row, move.target, slots))]
    if reasons:
        job.set(QueryState.PENDING, reasons[0])
    else:
        job.set(QueryState.ACCEPTED if moves else QueryState.DONE)


def _failed(core: Core, job: MoveJob, rows: list[int], target: int) -> Reason | None:
    """Return why the job has failed: all attempts to prepare a span have ended without success."""
    tables, limit = core.tables, core.config.move_attempts
    for row in rows:
        is_in_progress = target in (tables.primary[row], tables.secondary[row])
        if not is_in_progress and job.attempts.get(row, 0) >= limit:
            failure = tables.failures.get(row)
            error = f": {failure.error}" if failure is not None else ""
            return JobReason.PREPARE_FAILED.of(span=tables.span(row), target=job.target, attempts=limit, error=error)
    return None


def _start(core: Core, job: MoveJob, row: int, target: int, slots: MoveSlots) -> Reason | None:
    """Start the move of one span, or return why it waits; None if it is in progress."""
    tables, source = core.tables, int(core.tables.primary[row])
    if target in (source, tables.secondary[row]):
        if tables.task[row] == TASK_MOVE and row in tables.moving:
            tables.moving[row].job = job  # an older move to the same target may have started it
        return None
    holders = tables.undetermined.get(row, {})
    if target in holders:
        return JobReason.SPAN_HELD_BY_TARGET.of(span=tables.span(row))
    if holders:
        captures = ", ".join(sorted(core.captures[holder].id for holder in holders))
        return JobReason.SPAN_HELD.of(captures=captures, span=tables.span(row))
    if not tables.steady[row]:
        return JobReason.SPAN_BUSY.of(span=tables.span(row), state=tables.row(row).state)
    if slots.blocked is not None:
        return slots.blocked
    if not can_be_stopped(core, source):
        return JobReason.SOURCE_SILENT.of(source=core.captures[source].id)
    if not slots.allow(source, target):
        return JobReason.LIMIT_REACHED.of(limit=core.config.max_task_concurrency)
    prepare(core, [row], [target], TASK_MOVE, job)
    job.attempts[row] = job.attempts.get(row, 0) + 1
    slots.take(source, target)
    return None
