"""Load balancing by planned moves: when an operator asks for a rebalance, and when loads have
drifted apart.

Without a job it starts only after a quiet time and only when the difference is large (hysteresis),
and it leaves spans alone that were moved lately or that an operator placed. A rebalance considers
every span and releases those that operators placed.
"""

from __future__ import annotations

from owner.core.balancer import Balancer, QueuedMove
from owner.core.captures import Capture
from owner.core.jobs import JobReason, Reason, RebalanceJob
from owner.core.moves import MoveSlots, in_progress, prepare
from owner.core.policies.planner import Move, PlanInput, plan_rebalance
from owner.core.state import Core
from owner.core.tables import TASK_BALANCE
from tablewire.model.states import QueryState


def balance(core: Core, ready: list[Capture], slots: MoveSlots, disturbed: bool) -> None:
    """Work on the newest job, or else check whether loads have drifted. disturbed: captures came or
    went in this tick."""
    balancer, jobs = core.balancer, core.jobs.open(RebalanceJob)
    for older in jobs[:-1]:
        older.set(QueryState.CANCELLED, JobReason.REBALANCE_REPLACED.of())
    job = jobs[-1] if jobs else None
    if job is not None and job.cancel_requested:
        _end(balancer, job, QueryState.CANCELLED, JobReason.REBALANCE_CANCELLED.of())
        job = None
    if job is not None and job.state is QueryState.PENDING:
        core.tables.moved_ms.clear()
        balancer.clear()
        job.set(QueryState.ACCEPTED)
    if job is None and not balancer.is_balancing:
        if not _should_begin(core, balancer, ready, disturbed):
            return
        balancer.is_balancing = True
        balancer.clear()
    able = [capture for capture in ready if balancer.failed[capture.index] < core.config.move_attempts]
    if not balancer.planned and not len(in_progress(core, (TASK_BALANCE,))):
        _plan_or_end(core, job, ready, able)
    _begin_moves(core, job, able, slots)
    if job is not None:
        job.set(QueryState.ACCEPTED, slots.blocked)
        job.moves_left = len(balancer.planned) + len(in_progress(core, (TASK_BALANCE,)))


def _begin_moves(core: Core, job: RebalanceJob | None, able: list[Capture], slots: MoveSlots) -> None:
    tables, indexes = core.tables, {capture.index for capture in able}
    while (move := core.balancer.planned.pop(slots.allow)) is not None:
        row, source, target = move.row, move.source, move.target
        is_stale = tables.number[row] != move.number or tables.primary[row] != source or not tables.steady[row]
        if is_stale or not {source, target} <= indexes:
            continue
        prepare(core, [row], [target], TASK_BALANCE, job)
        slots.take(source, target)


def _plan_or_end(core: Core, job: RebalanceJob | None, ready: list[Capture], able: list[Capture]) -> None:
    """Plan the next moves. End if the loads are even, or as even as they can be without the
    captures that failed to prepare. able: the others."""
    tables, balancer = core.tables, core.balancer
    moves = _plan(core, job, able)
    balancer.planned.add(
        QueuedMove(place, move.row, int(tables.number[move.row]), move.source, move.target, move.weight)
        for place, move in enumerate(moves)
        if not tables.is_in_backoff(move.row, core.now_ms)
    )
    if moves:
        return
    unable = [capture.id for capture in ready if capture not in able]
    if unable and _plan(core, job, ready):
        reason = JobReason.TARGETS_FAILED.of(captures=", ".join(unable), attempts=core.config.move_attempts)
        _end(balancer, job, QueryState.REFUSED, reason)
    else:
        _end(balancer, job, QueryState.DONE)
    balancer.quiet_since_ms = core.now_ms


def _plan(core: Core, job: RebalanceJob | None, captures: list[Capture]) -> list[Move]:
    tables, size = core.tables, core.tables.size
    movable = tables.steady[:size] & tables.wanted[:size]
    if job is None:
        cooling_ms = core.now_ms - core.config.move_cooldown_ms
        tables.moved_ms = {row: moved_ms for row, moved_ms in tables.moved_ms.items() if moved_ms >= cooling_ms}
        movable[list(tables.moved_ms)] = False
    return plan_rebalance(PlanInput.of(core, captures), movable, core.config.balance_stop_percent)


def _end(balancer: Balancer, job: RebalanceJob | None, state: QueryState, reason: Reason | None = None) -> None:
    if job is not None:
        job.set(state, reason)
    balancer.is_balancing = False
    balancer.clear()


def _should_begin(core: Core, balancer: Balancer, ready: list[Capture], disturbed: bool) -> bool:
    """Return whether loads have drifted apart; looked at once after each quiet time."""
    config, tables, size = core.config, core.tables, core.tables.size
    disturbed |= core.mass_failure_guard.is_active or bool(core.leaving_captures())
    disturbed |= not config.balance_interval_ms or len(ready) < 2
    since_ms = balancer.quiet_since_ms
    if not disturbed and since_ms is not None and core.now_ms - since_ms < config.balance_interval_ms:
        return False
    balancer.quiet_since_ms = core.now_ms
    if disturbed or since_ms is None or bool((tables.wanted[:size] & ~tables.steady[:size]).any()):
        return False
    inputs = PlanInput.of(core, ready)
    load = inputs.loads()[inputs.captures]
    return bool(load.max() - load.mean() > load.mean() * config.balance_start_percent / 100)
