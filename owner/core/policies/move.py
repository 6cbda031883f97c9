"""Move: what operators asked for, decided in the order of their calls."""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.jobs import ENDED, MoveJob
from owner.core.moves import MoveSlots, can_be_stopped, prepare, undo_prepare
from owner.core.state import Core
from owner.core.tables import COMMIT, NO_ROW, PREPARE, REMOVING, REPLICATING, TASK_MOVE
from tablewire.model.states import CaptureState, QueryState

_WHY_NOT = {
    CaptureState.UNINITIALIZED: "has not answered yet",
    CaptureState.SILENT: "is silent",
    CaptureState.STOPPING: "is stopping",
}


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


def _target(core: Core, job: MoveJob) -> tuple[Capture | None, str]:
    """The target if it may take spans, else why not."""
    capture = core.captures.get(job.target)
    if capture is None:
        return None, f"target capture {job.target} is unknown"
    if job.target in core.drains:
        return None, f"target capture {job.target} is being drained"
    state = core.capture_state(capture)
    if state in _WHY_NOT:
        return None, f"target capture {job.target} {_WHY_NOT[state]}"
    return capture, ""


def _decide(core: Core, job: MoveJob, under_way: dict[int, MoveJob]) -> None:
    """Refuses what cannot be; else binds the job to its rows and ends older moves of them. under_way: the move of each row."""
    tables = core.tables
    capture, why_not = _target(core, job)
    rows = [tables.row_of(job.span)] if job.span is not None else tables.rows_of_table(job.table_id)
    rows = [row for row in rows if row != NO_ROW and tables.wanted[row]]
    leaving = [row for row in rows if tables.state[row] == REMOVING]
    if not rows:
        what = f"table {job.table_id}" if job.span is None else f"span {job.span}"
        job.end(QueryState.REFUSED, f"{what} is unknown")
    elif capture is None:
        job.end(QueryState.REFUSED, why_not)
    elif leaving:
        job.reason = f"span {tables.span(leaving[0])} was dropped and is there again: it is still being removed"
    elif all(_at_target(core, row, capture.index) for row in rows):
        job.end(QueryState.REFUSED, f"capture {job.target} is already the primary")
    else:
        job.rows, job.numbers = rows, tables.number[rows].tolist()
        for row in rows:
            older = under_way.get(row)
            if older is not None and older.state not in ENDED:
                _supersede(core, older, job)
            under_way[row] = job


def _supersede(core: Core, older: MoveJob, newer: MoveJob) -> None:
    """The newer move wins; what the older one has prepared is undone unless it leads to the same capture."""
    if older.target != newer.target:
        _undo(core, older)
    older.end(QueryState.CANCELLED, f"a newer move to {newer.target} took its place")


def _cancel(core: Core, job: MoveJob) -> None:
    _undo(core, job)
    job.end(QueryState.CANCELLED, f"cancelled{_cannot_be_undone(core, job)}")


def _cannot_be_undone(core: Core, job: MoveJob) -> str:
    """A span whose Primary was told to stop goes on to the target; empty when there is none."""
    tables, capture = core.tables, core.captures.get(job.target)
    for row, number in zip(job.rows or (), job.numbers, strict=True):
        if capture is None or tables.number[row] != number or tables.state[row] != COMMIT:
            continue
        if capture.index in (int(tables.primary[row]), int(tables.secondary[row])):
            return f"; span {tables.span(row)} is past the point of no return and goes on"
    return ""


def _undo(core: Core, job: MoveJob) -> None:
    capture = core.captures.get(job.target)
    if capture is None or not job.rows:
        return
    tables, rows = core.tables, np.array(job.rows, np.int64)
    mine = (tables.state[rows] == PREPARE) & (tables.secondary[rows] == capture.index) & (tables.task[rows] == TASK_MOVE)
    undo_prepare(core, rows[mine & (tables.primary[rows] >= 0)])


def _at_target(core: Core, row: int, target: int) -> bool:
    return bool(core.tables.primary[row] == target and core.tables.state[row] == REPLICATING)


def _go_on(core: Core, job: MoveJob, slots: MoveSlots) -> None:
    tables = core.tables
    assert job.rows is not None
    rows = [
        row
        for row, number in zip(job.rows, job.numbers, strict=True)
        if tables.live[row] and tables.number[row] == number and tables.state[row] != REMOVING
    ]
    if not rows:
        job.end(QueryState.CANCELLED, f"table {job.table_id} was dropped")
        return
    capture, why_not = _target(core, job)
    if capture is None:
        _undo(core, job)
        job.end(QueryState.REFUSED, why_not)
        return
    given_up = [row for row in rows if _gave_up(core, job, row, capture.index)]
    if given_up:
        _undo(core, job)
        span, last = tables.span(given_up[0]), tables.failures.get(given_up[0])
        why = f": {last.error}" if last is not None else ""
        job.end(QueryState.REFUSED, f"span {span} did not get ready at {job.target} in {core.config.move_attempts} attempts{why}")
        return
    waiting = [_start(core, job, row, capture.index, slots) for row in rows if not _at_target(core, row, capture.index)]
    if not waiting:
        job.end(QueryState.DONE)
        return
    reasons = [reason for reason in waiting if reason]
    job.state = QueryState.PENDING if reasons else QueryState.ACCEPTED
    job.reason = reasons[0] if reasons else ""


def _start(core: Core, job: MoveJob, row: int, target: int, slots: MoveSlots) -> str:
    """Starts one span's move, or says why it waits; empty when it is under way."""
    tables = core.tables
    if int(tables.secondary[row]) == target or int(tables.primary[row]) == target:
        return ""
    holders = tables.undetermined.get(row, {})
    if target in holders:
        return f"the target has not let go of span {tables.span(row)} yet"
    if holders:
        return f"{', '.join(sorted(core.captures[holder].id for holder in holders))} may still hold span {tables.span(row)}"
    if not tables.steady[row]:
        state = core.tables.row(row).state
        return f"span {tables.span(row)} has a task under way ({state})"
    source = int(tables.primary[row])
    if slots.blocked:
        return slots.blocked
    if not can_be_stopped(core, source):
        return f"{core.captures[source].id} is silent, so that it could not be told to stop"
    if not slots.free_from(source) or target in slots.full():
        return f"the limit of {core.config.max_task_concurrency} moves at a time is reached"
    prepare(core, np.array([row], np.int64), np.array([target], np.int16), TASK_MOVE)
    job.attempts[row] = job.attempts.get(row, 0) + 1
    slots.take(source, target)
    return ""


def _gave_up(core: Core, job: MoveJob, row: int, target: int) -> bool:
    """Every attempt was made, and none is under way."""
    touched = target in (int(core.tables.primary[row]), int(core.tables.secondary[row]))
    return not touched and job.attempts.get(row, 0) >= core.config.move_attempts
