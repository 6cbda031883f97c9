"""Move: what operators asked for, decided in the order of their calls."""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.jobs import JobReason, MoveJob, Reason
from owner.core.moves import MoveSlots, can_be_stopped, prepare, undo_prepare
from owner.core.policies.planner import PlanInput, plan_move, refuse_target
from owner.core.state import Core
from owner.core.tables import COMMIT, NO_ROW, PREPARE, REMOVING, TASK_MOVE
from tablewire.model.jobs import ENDED
from tablewire.model.spans import Span
from tablewire.model.states import QueryState


def move(core: Core, slots: MoveSlots) -> None:
    """Starts, continues and ends the moves that were asked for; a job that ended leaves the list."""
    under_way = {row: job for job in core.moves for row in job.rows or ()}
    for job in core.moves:
        if job.cancel_requested:
            _cancel(core, job)
            continue
        if job.rows is None:
            _decide(core, job, under_way)
        if job.state not in ENDED and job.rows is not None:
            _go_on(core, job, slots)
    core.moves = [job for job in core.moves if job.state not in ENDED]


def _target(core: Core, job: MoveJob) -> Capture | Reason:
    """Return the target if it may take spans, otherwise the reason why not."""
    capture = core.captures.get(job.target)
    state = core.capture_state(capture) if capture is not None else None
    refused = refuse_target(job.target, state, job.target in core.drains)
    if refused is not None:
        return refused
    assert capture is not None
    return capture


def _decide(core: Core, job: MoveJob, under_way: dict[int, MoveJob]) -> None:
    """Refuses what cannot be; else binds the job to its rows and ends older moves of them.
    under_way: the move of each row."""
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
    elif not plan_move(PlanInput.of(core, ()), rows, target.index):
        job.set(QueryState.REFUSED, JobReason.ALREADY_PRIMARY.of(target=job.target))
    else:
        job.rows, job.numbers = rows, tables.number[rows].tolist()
        for row in rows:
            older = under_way.get(row)
            if older is not None and older.state not in ENDED:
                _supersede(core, older, job)
            under_way[row] = job


def _supersede(core: Core, older: MoveJob, newer: MoveJob) -> None:
    """The newer move wins; what the older one has prepared is undone unless it leads to the same
    capture."""
    if older.target != newer.target:
        _undo(core, older)
    older.set(QueryState.CANCELLED, JobReason.MOVE_REPLACED.of(target=newer.target))


def _cancel(core: Core, job: MoveJob) -> None:
    _undo(core, job)
    span = _cannot_be_undone(core, job)
    job.set(QueryState.CANCELLED, JobReason.CANCELLED.of() if span is None else JobReason.CANCELLED_TOO_LATE.of(span=span))


def _cannot_be_undone(core: Core, job: MoveJob) -> Span | None:
    """Return a span that continues to the target, as its Primary was told to stop."""
    tables, capture = core.tables, core.captures.get(job.target)
    for row, number in zip(job.rows or (), job.numbers, strict=True):
        if capture is None or tables.number[row] != number or tables.state[row] != COMMIT:
            continue
        if capture.index in (int(tables.primary[row]), int(tables.secondary[row])):
            return tables.span(row)
    return None


def _undo(core: Core, job: MoveJob) -> None:
    capture = core.captures.get(job.target)
    if capture is None or not job.rows:
        return
    tables, rows = core.tables, np.array(job.rows, np.int64)
    mine = (tables.state[rows] == PREPARE) & (tables.secondary[rows] == capture.index) & (tables.task[rows] == TASK_MOVE)
    undo_prepare(core, rows[mine & (tables.primary[rows] >= 0)])


def _go_on(core: Core, job: MoveJob, slots: MoveSlots) -> None:
    tables = core.tables
    assert job.rows is not None
    rows = [
        row
        for row, number in zip(job.rows, job.numbers, strict=True)
        if tables.live[row] and tables.number[row] == number and tables.state[row] != REMOVING
    ]
    if not rows:
        job.set(QueryState.CANCELLED, JobReason.TABLE_DROPPED.of(table=job.table_id))
        return
    target = _target(core, job)
    if isinstance(target, Reason):
        _undo(core, job)
        job.set(QueryState.REFUSED, target)
        return
    given_up = [row for row in rows if _gave_up(core, job, row, target.index)]
    if given_up:
        _undo(core, job)
        span, last = tables.span(given_up[0]), tables.failures.get(given_up[0])
        error = f": {last.error}" if last is not None else ""
        attempts = core.config.move_attempts
        job.set(QueryState.REFUSED, JobReason.PREPARE_FAILED.of(span=span, target=job.target, attempts=attempts, error=error))
        return
    waiting = [_start(core, job, move.row, target.index, slots) for move in plan_move(PlanInput.of(core, ()), rows, target.index)]
    reasons = [reason for reason in waiting if reason is not None]
    if reasons:
        job.set(QueryState.PENDING, reasons[0])
    else:
        job.set(QueryState.ACCEPTED if waiting else QueryState.DONE)


def _start(core: Core, job: MoveJob, row: int, target: int, slots: MoveSlots) -> Reason | None:
    """Start the move of one span, or return why it waits; None when it is in progress."""
    tables = core.tables
    if int(tables.secondary[row]) == target or int(tables.primary[row]) == target:
        if tables.task[row] == TASK_MOVE and row in tables.origin:
            tables.origin[row].job = job  # it may have been started by an older move to the same target
        return None
    holders = tables.undetermined.get(row, {})
    if target in holders:
        return JobReason.SPAN_HELD_BY_TARGET.of(span=tables.span(row))
    if holders:
        captures = ", ".join(sorted(core.captures[holder].id for holder in holders))
        return JobReason.SPAN_HELD.of(captures=captures, span=tables.span(row))
    if not tables.steady[row]:
        return JobReason.SPAN_BUSY.of(span=tables.span(row), state=tables.row(row).state)
    source = int(tables.primary[row])
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


def _gave_up(core: Core, job: MoveJob, row: int, target: int) -> bool:
    """Every attempt was made, and none is under way."""
    touched = target in (int(core.tables.primary[row]), int(core.tables.secondary[row]))
    return not touched and job.attempts.get(row, 0) >= core.config.move_attempts
