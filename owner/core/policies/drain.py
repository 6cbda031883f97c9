"""Drain: empty the captures that are drained or stopping, some spans at a time."""

from __future__ import annotations

from itertools import islice

import numpy as np

from owner.core.captures import Capture
from owner.core.jobs import JobReason
from owner.core.moves import MoveSlots, can_be_stopped, prepare, undo_prepare, why_blocked
from owner.core.policies.planner import Move, PlanInput, plan_drain
from owner.core.state import Core
from owner.core.tables import NO_CAPTURE, PREPARE, TASK_DRAIN
from tablewire.model.states import QueryState

MOVES_EXAMINED_MAX = 1_024
"""A tick looks for moves that can begin among this number of the plan."""


def drain(core: Core, ready: list[Capture], slots: MoveSlots) -> None:
    """Begin the first moves of the plan that empties the leaving captures, as far as they can be."""
    leaving = core.leaving_captures()
    for capture in leaving:
        _cancel_inbound(core, capture, bool(ready))
    sources = {capture.index: capture for capture in leaving if can_be_stopped(core, capture.index)}
    able = [index for index in sources if slots.allow(index)]
    if not able or not ready:
        return
    tables, size = core.tables, core.tables.size
    movable = tables.steady[:size] & tables.wanted[:size]
    for move in islice(plan_drain(PlanInput.of(core, ready), able, movable), MOVES_EXAMINED_MAX):
        if not any(slots.allow(index) for index in able):
            return
        if not slots.allow(move.source, move.target) or _must_wait(core, move):
            continue
        job = core.jobs.drains.get(sources[move.source].id)
        prepare(core, [move.row], [move.target], TASK_DRAIN, job)
        slots.take(move.source, move.target)


def _must_wait(core: Core, move: Move) -> bool:
    """Return whether the span is in backoff; after one failure, only where it failed."""
    failure = core.tables.failures.get(move.row)
    if failure is None or failure.retry_at_ms <= core.now_ms:
        return False
    return failure.attempts > 1 or failure.capture == move.target


def _cancel_inbound(core: Core, capture: Capture, elsewhere: bool) -> None:
    """Undo the prepares of the capture; a new span is not undone if no other capture can take it."""
    tables, size = core.tables, core.tables.size
    rows = np.flatnonzero((tables.secondary[:size] == capture.index) & (tables.state[:size] == PREPARE))
    undo_prepare(core, rows if elsewhere else rows[tables.primary[rows] != NO_CAPTURE])


def update_drains(core: Core) -> None:
    """Count what is left at each drained capture; a drain ends for good when its capture is gone."""
    for capture_id, job in list(core.jobs.drains.items()):
        capture = core.captures.get(capture_id)
        if capture is None:
            job.set(QueryState.DONE, JobReason.CAPTURE_GONE.of())
            del core.jobs.drains[capture_id]
            continue
        left = len(core.tables.rows_with_role(capture.index)) + (capture.index in core.replication.may_hold_any_span)
        job.spans_left = left
        if left:
            tables = "1 table" if left == 1 else f"{left} tables"
            job.set(QueryState.ACCEPTED, JobReason.SPANS_LEFT.of(tables=tables, why=_why_left(core, capture)))
        else:
            job.set(QueryState.DONE)


def _why_left(core: Core, capture: Capture) -> str:
    if not core.ready_captures():
        return " and no other processor is ready to take them"
    reason = why_blocked(core)
    if reason is None and not can_be_stopped(core, capture.index):
        reason = JobReason.SOURCE_SILENT.of(source=capture.id)
    return f": {reason.text}" if reason is not None else ""
