"""How a span begins to go somewhere, how that is undone, and how many planned moves may be under way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from owner.core.events import SpanFailed
from owner.core.jobs import Job, JobReason, Reason
from owner.core.replication import clear_secondary, raise_progress
from owner.core.state import Core
from owner.core.tables import (
    ABSENT,
    COMMIT,
    NO_CAPTURE,
    PREPARE,
    REPLICATING,
    TASK_BALANCE,
    TASK_DRAIN,
    TASK_MOVE,
    TASK_NONE,
    MoveOrigin,
    Rows,
    SpanFailure,
)
from tablewire.model.states import CaptureState, DispatchAction, TableState

PREPARED = TableState.PREPARED.code
PLANNED = (TASK_MOVE, TASK_DRAIN, TASK_BALANCE)


@dataclass(slots=True)
class MoveSlots:
    """How many planned moves may still start: in all, and from or to one capture. blocked: why none may start."""

    free: int
    limit: int
    used: dict[int, int] = field(default_factory=dict)  # capture index -> moves that touch it
    blocked: Reason | None = None

    @classmethod
    def of(cls, core: Core) -> MoveSlots:
        tables = core.tables
        rows = in_progress(core, PLANNED)
        used: dict[int, int] = {}
        for role in (tables.primary[rows], tables.secondary[rows]):
            for capture, count in zip(*np.unique(role[role != NO_CAPTURE], return_counts=True), strict=True):
                used[int(capture)] = used.get(int(capture), 0) + int(count)
        config = core.config
        return cls(config.max_task_concurrency - len(rows), config.max_task_concurrency_per_capture, used, why_blocked(core))

    def allow(self, *captures: int) -> bool:
        """Return whether a move that touches these captures may start."""
        return self.blocked is None and self.free > 0 and all(self.used.get(capture, 0) < self.limit for capture in captures)

    def take(self, source: int, target: int) -> None:
        self.free -= 1
        for capture in (source, target):
            if capture != NO_CAPTURE:
                self.used[capture] = self.used.get(capture, 0) + 1


def in_progress(core: Core, tasks: tuple[int, ...]) -> Rows:
    """Return the rows of the moves of these kinds that have begun and not ended."""
    tables = core.tables
    rows = tables.unsteady_rows()
    return rows[np.isin(tables.task[rows], tasks) & np.isin(tables.state[rows], (PREPARE, COMMIT))]


def why_blocked(core: Core) -> Reason | None:
    """Return why no planned move may start, None when it may. A capture that has been silent since before this term may hold any
    span: nothing can be promoted beside it, so a move would only stop what is known to be written."""
    silent = sorted(core.captures[index].id for index in core.replication.may_hold_any_span)
    return JobReason.MOVES_BLOCKED.of(captures=", ".join(silent)) if silent else None


def can_be_stopped(core: Core, capture: int) -> bool:
    """Whether a move away from it can end: beside one that is silent it would only keep others from being begun."""
    return core.capture_state(core.captures[capture]) in (CaptureState.READY, CaptureState.STOPPING)


def prepare(core: Core, rows: Rows, targets: np.ndarray, task: int, job: Job | None = None) -> None:
    """Make each target the Secondary of its row and tell it to prepare; it must have no role there. job: asked for the moves."""
    if not len(rows):
        return
    tables = core.tables
    fresh = rows[~tables.scheduled[rows]]
    tables.scheduled[fresh] = True
    raise_progress(tables, rows, core.checkpoint_ts)
    for row in rows[tables.primary[rows] != NO_CAPTURE].tolist():
        tables.origin[row] = MoveOrigin(core.captures[int(tables.primary[row])].id, job)
    tables.secondary[rows] = targets
    tables.secondary_reported[rows] = 0
    tables.secondary_dispatch[rows] = 0
    tables.set_state(rows, PREPARE, core.now_ms)
    tables.task[rows] = task
    tables.mark_unsteady(rows)
    core.replication.outgoing.add_by_capture(tables.secondary[rows], rows, DispatchAction.ADD_PREPARE)


def undo_prepare(core: Core, rows: Rows) -> None:
    """The Secondary is told to let go and is Undetermined until it has; the Primary goes on, or the span is placed again."""
    if not len(rows):
        return
    tables = core.tables
    holders = tables.secondary[rows].copy()
    reported = tables.secondary_reported[rows].copy()
    dispatches = tables.secondary_dispatch[rows].copy()
    clear_secondary(tables, rows)
    for row, holder, state, dispatch in zip(rows.tolist(), holders.tolist(), reported.tolist(), dispatches.tolist(), strict=True):
        tables.add_undetermined((row,), holder, state, dispatch)
    core.replication.outgoing.add_by_capture(holders, rows, DispatchAction.REMOVE)
    writes = tables.primary[rows] != NO_CAPTURE
    tables.set_state(rows[writes], REPLICATING, core.now_ms)
    tables.set_state(rows[~writes], ABSENT, core.now_ms)
    tables.task[rows] = TASK_NONE
    tables.refresh_steady(rows)


def undo_overdue_prepares(core: Core) -> None:
    """A prepare that outlived its deadline is undone: the span stays where it was, or is placed again, elsewhere first."""
    tables = core.tables
    rows = tables.unsteady_rows()
    rows = rows[(tables.state[rows] == PREPARE) & (tables.secondary[rows] != NO_CAPTURE)]
    rows = rows[tables.state_since_ms[rows] < core.now_ms - core.config.prepare_timeout_ms]
    if not len(rows):
        return
    for row, capture in zip(rows.tolist(), tables.secondary[rows].tolist(), strict=True):
        is_ready = tables.secondary_reported[row] == PREPARED
        why = "ready, but another one might still hold it for more than" if is_ready else "not ready within"
        note_failure(core, row, capture, f"{why} {core.config.prepare_timeout_ms} ms")
    undo_prepare(core, rows)


def note_failure(core: Core, row: int, capture: int, text: str) -> None:
    """The span did not work out at this capture: wait, longer each time, and elsewhere first."""
    attempts = core.tables.attempts.get(row, 0) + 1
    core.tables.attempts[row] = attempts
    wait_ms = core.config.error_backoff_initial_ms << min(attempts - 1, 20)
    wait_ms = min(wait_ms, core.config.error_backoff_max_ms)
    former = core.tables.failures.get(row)
    if former is None or former.error != text:
        core.events.append(SpanFailed(core.tables.span(row), text))
    core.tables.failures[row] = SpanFailure(
        text, attempts, core.now_ms + _jittered(wait_ms, int(core.tables.number[row]), attempts), capture
    )


def _jittered(wait_ms: int, number: int, attempts: int) -> int:
    """Half of it to all of it, another part for each span and attempt: spans that failed together do not come back together. By a
    hash, since a core has no dice."""
    part = ((number * 40_503 + attempts * 30_011) * 2_654_435_761 >> 16) % 1024
    return wait_ms // 2 + (wait_ms - wait_ms // 2) * part // 1023
