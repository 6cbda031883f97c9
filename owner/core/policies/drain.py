"""Drain: everything away from captures that are drained or stopping, a bounded number of spans at a time."""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.jobs import JobReason
from owner.core.moves import MoveSlots, can_be_stopped, prepare, undo_prepare, why_blocked
from owner.core.policies.placement import Placement
from owner.core.state import Core
from owner.core.tables import NO_CAPTURE, PREPARE, TASK_DRAIN
from tablewire.model.states import QueryState


def drain(core: Core, ready: list[Capture], slots: MoveSlots) -> None:
    """Proposes moves away from every leaving capture; works on the spans that are ready and waits for none."""
    leaving = core.leaving_captures()
    if not leaving:
        return
    placement = Placement.of(core, ready)
    for capture in leaving:
        _turn_inbound_away(core, capture, bool(ready))
        if ready and can_be_stopped(core, capture.index):
            _move_away(core, capture, placement, slots)


def _turn_inbound_away(core: Core, capture: Capture, elsewhere: bool) -> None:
    """What is being prepared there is undone: a move stays where it was, an add is placed again."""
    tables, size = core.tables, core.tables.size
    rows = np.flatnonzero((tables.secondary[:size] == capture.index) & (tables.state[:size] == PREPARE))
    with_writer = rows[tables.primary[rows] != NO_CAPTURE]
    undo_prepare(core, with_writer)
    if elsewhere:
        undo_prepare(core, rows[tables.primary[rows] == NO_CAPTURE])


def _move_away(core: Core, capture: Capture, placement: Placement, slots: MoveSlots) -> None:
    tables, size = core.tables, core.tables.size
    rows = np.flatnonzero((tables.primary[:size] == capture.index) & tables.steady[:size] & tables.wanted[:size])
    for row in rows.tolist():
        if not slots.free_from(capture.index):
            return
        never = {capture.index} | slots.full()
        trouble = tables.failures.get(row)
        if trouble is not None and trouble.retry_at_ms > core.now_ms:
            if trouble.attempts > 1:
                continue
            never.add(trouble.capture)  # elsewhere at once, there later
        target = placement.least(never, rather_not=set() if trouble is None else {trouble.capture})
        if target == NO_CAPTURE and trouble is not None:
            continue
        if target == NO_CAPTURE:
            return
        prepare(core, np.array([row], np.int64), np.array([target], np.int16), TASK_DRAIN, core.drains.get(capture.id))
        slots.take(capture.index, target)


def update_drains(core: Core) -> None:
    """Count what is left at each drained capture; a drain ends for good when its capture is gone."""
    for capture_id, job in list(core.drains.items()):
        capture = core.captures.get(capture_id)
        if capture is None:
            job.set(QueryState.DONE, JobReason.CAPTURE_GONE.of())
            del core.drains[capture_id]
            continue
        left = len(core.tables.rows_with_role(capture.index)) + (capture.index in core.replication.may_hold_any_span)
        job.spans_left = left
        if left:
            job.set(QueryState.ACCEPTED, JobReason.SPANS_LEFT.of(count=left, why=_why_left(core, capture)))
        else:
            job.set(QueryState.DONE)


def _why_left(core: Core, capture: Capture) -> str:
    if not core.ready_captures():
        return " and no other capture is ready to take them"
    reason = why_blocked(core)
    if reason is None and not can_be_stopped(core, capture.index):
        reason = JobReason.SOURCE_SILENT.of(source=capture.id)
    return f": {reason.text}" if reason is not None else ""
