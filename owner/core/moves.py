"""Beginning, undoing and ending moves, backoff after failures, and the limits of planned moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from owner.core.events import PlacementReason, SpanFailed, SpanMoved, SpansPlaced
from owner.core.jobs import Job, JobReason, Reason, RebalanceJob
from owner.core.replication import raise_progress
from owner.core.roles import assign, clear
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
    CaptureIndexes,
    MoveInProgress,
    Rows,
    SpanFailure,
)
from owner.core.transitions import Role
from tablewire.model.states import CaptureState, DispatchAction, TableState

PREPARED = TableState.PREPARED.code
REASONS = {TASK_MOVE: PlacementReason.MOVE, TASK_DRAIN: PlacementReason.DRAIN, TASK_BALANCE: PlacementReason.BALANCE}
PLANNED = tuple(REASONS)


@dataclass(slots=True)
class MoveSlots:
    """The planned moves that may still start. blocked: why none may."""

    free: int
    limit: int
    used: Counter[int] = field(default_factory=Counter)  # by capture index: the moves from or to it
    blocked: Reason | None = None

    @classmethod
    def of(cls, core: Core) -> MoveSlots:
        config, tables, rows = core.config, core.tables, in_progress(core, PLANNED)
        used = Counter([*tables.primary[rows].tolist(), *tables.secondary[rows].tolist()])
        return cls(config.max_task_concurrency - len(rows), config.max_task_concurrency_per_capture, used, why_blocked(core))

    def allow(self, *captures: int) -> bool:
        """Return whether a move that touches these captures may start."""
        return self.blocked is None and self.free > 0 and all(self.used[capture] < self.limit for capture in captures)

    def take(self, source: int, target: int) -> None:
        self.free -= 1
        self.used.update((source, target))


def in_progress(core: Core, tasks: tuple[int, ...]) -> Rows:
    """Return the rows of the moves of these kinds that have begun and not ended."""
    tables = core.tables
    rows = tables.unsteady_rows()
    return rows[np.isin(tables.task[rows], tasks) & np.isin(tables.state[rows], (PREPARE, COMMIT))]


def why_blocked(core: Core) -> Reason | None:
    """Return why no planned move may start, None if one may. A capture that has not reported in
    this term may hold any span. No Secondary can be promoted beside it, so a move would only stop a
    known writer."""
    silent = sorted(core.captures[index].id for index in core.replication.may_hold_any_span)
    return JobReason.MOVES_BLOCKED.of(captures=", ".join(silent)) if silent else None


def can_be_stopped(core: Core, capture: int) -> bool:
    """Return whether a move away from the capture can end; from a silent one it cannot."""
    return core.capture_state(core.captures[capture]) in (CaptureState.READY, CaptureState.STOPPING)


def prepare(
    core: Core, rows: Rows | Sequence[int], targets: CaptureIndexes | Sequence[int], task: int, job: Job | None = None
) -> None:
    """Make each target, which must have no role in its row, the Secondary, and send it a prepare.
    job: asked for the moves."""
    tables, rows = core.tables, np.asarray(rows, np.int64)
    if not len(rows):
        return
    tables.scheduled[rows] = True
    raise_progress(tables, rows, core.checkpoint_ts)
    if task in PLANNED:
        for row, source, target in zip(rows.tolist(), tables.primary[rows].tolist(), targets, strict=True):
            tables.moving[row] = MoveInProgress(core.captures[source].id, int(target), task, job)
    assign(tables, rows, Role.SECONDARY, targets)
    tables.set_state(rows, PREPARE, core.now_ms)
    tables.task[rows] = task
    tables.mark_unsteady(rows)
    core.replication.outgoing.add_by_capture(tables.secondary[rows], rows, DispatchAction.ADD_PREPARE)


def undo_prepare(core: Core, rows: Rows) -> None:
    """Send the Secondary a remove; it is Undetermined until it stops. The Primary continues."""
    if not len(rows):
        return
    tables = core.tables
    holders, reported, dispatches = tables.secondary[rows], tables.secondary_reported[rows], tables.secondary_dispatch[rows]
    clear(tables, rows, Role.SECONDARY)
    assign(tables, rows, Role.UNDETERMINED, holders, reported, dispatches)
    core.replication.outgoing.add_by_capture(holders, rows, DispatchAction.REMOVE)
    writes = tables.primary[rows] != NO_CAPTURE
    tables.set_state(rows[writes], REPLICATING, core.now_ms)
    tables.set_state(rows[~writes], ABSENT, core.now_ms)
    tables.task[rows] = TASK_NONE
    tables.refresh_steady(rows)


def finish_moves(core: Core) -> None:
    """Report the spans that have arrived and the planned moves that have ended."""
    tables, failed = core.tables, core.balancer.failed
    placed, arrived = Counter[PlacementReason](), set[int]()
    for rows, tasks in core.replication.arrived:
        for task, count in zip(*np.unique(tasks, return_counts=True), strict=True):
            placed[REASONS.get(int(task), PlacementReason.ADD)] += int(count)
        arrived.update(rows[np.isin(tasks, PLANNED)].tolist())
    tables.moved_ms.update(dict.fromkeys(arrived, core.now_ms))
    if placed:
        core.events.append(SpansPlaced(placed))
    for row in [row for row in tables.moving if tables.task[row] not in PLANNED]:
        move = tables.moving.pop(row)
        is_at_target = tables.primary[row] == move.target
        if move.task == TASK_BALANCE:
            failed[move.target] = 0 if is_at_target else failed[move.target] + 1
        if is_at_target and row in arrived:
            _report_move(core, row, move)


def _report_move(core: Core, row: int, move: MoveInProgress) -> None:
    job_id, asked_by = (move.job.id, move.job.asked_by) if move.job is not None else (0, "")
    target, why = core.captures[move.target].id, REASONS[move.task]
    core.events.append(SpanMoved(core.tables.span(row), move.source, target, why, job_id, asked_by))
    if isinstance(move.job, RebalanceJob):
        move.job.moves_done += 1


def undo_overdue_prepares(core: Core) -> None:
    """Undo prepares that missed their deadline: the span stays where it was, or is placed again,
    elsewhere if possible."""
    tables = core.tables
    rows = tables.unsteady_rows()
    rows = rows[(tables.state[rows] == PREPARE) & (tables.secondary[rows] != NO_CAPTURE)]
    rows = rows[tables.state_since_ms[rows] < core.now_ms - core.config.prepare_timeout_ms]
    for row in rows.tolist():
        is_ready = tables.secondary_reported[row] == PREPARED
        why = "ready, but another one might still hold it for more than" if is_ready else "not ready within"
        note_failure(core, row, int(tables.secondary[row]), f"{why} {core.config.prepare_timeout_ms} ms")
    undo_prepare(core, rows)


def note_failure(core: Core, row: int, capture: int, error: str) -> None:
    """Record a failure of the span at this capture, and start a backoff that doubles each time."""
    tables, config = core.tables, core.config
    attempts = tables.attempts[row] = tables.attempts.get(row, 0) + 1
    wait_ms = min(config.error_backoff_initial_ms << min(attempts - 1, 20), config.error_backoff_max_ms)
    former = tables.failures.get(row)
    if former is None or former.error != error:
        core.events.append(SpanFailed(tables.span(row), error))
    retry_at_ms = core.now_ms + _jittered(wait_ms, int(tables.number[row]), attempts)
    tables.failures[row] = SpanFailure(error, attempts, retry_at_ms, capture)


def _jittered(wait_ms: int, number: int, attempts: int) -> int:
    """Return between half and all of the time, so that spans that failed together are not tried
    together again. The share is a hash of span and attempt, since a core has no random numbers."""
    part = ((number * 40_503 + attempts * 30_011) * 2_654_435_761 >> 16) % 1024
    return wait_ms // 2 + (wait_ms - wait_ms // 2) * part // 1023
