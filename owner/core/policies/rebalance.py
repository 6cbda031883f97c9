"""Rebalance, when an operator asks, and balance, when loads have drifted apart: planned moves towards even loads by weight.

Balance is careful: only after a quiet time, only when the difference is large (hysteresis), never a span that was moved lately or
that an operator placed. Rebalance asks for all of it, and releases what operators had placed.
"""

from __future__ import annotations

import numpy as np

from owner.core.balancer import Balancer
from owner.core.captures import Capture
from owner.core.jobs import JobReason, Reason
from owner.core.moves import MoveSlots, prepare, under_way
from owner.core.policies.load_balancing import Leveling, level
from owner.core.state import Core
from owner.core.tables import NO_CAPTURE, TASK_BALANCE, Mask
from tablewire.model.states import QueryState

MOVES_PLANNED_MAX = 1_024


def balance(core: Core, ready: list[Capture], slots: MoveSlots, disturbed: bool) -> None:
    """Works on the job if there is one, else looks whether loads have drifted. disturbed: captures came or went in this tick."""
    balancer = core.balancer
    job = balancer.job
    if job is not None and job.cancel_requested:
        _end(balancer, QueryState.CANCELLED, JobReason.REBALANCE_CANCELLED.of())
        job = None
    if job is not None and job.state is QueryState.PENDING:
        core.tables.pinned.clear()
        core.tables.moved_ms.clear()
        balancer.clear()
        job.set(QueryState.ACCEPTED)
    if job is None and not balancer.is_balancing:
        if not _should_begin(core, balancer, ready, disturbed):
            return
        balancer.is_balancing = True
        balancer.clear()
    balancer.settle(core.tables)
    if not balancer.planned:
        _plan_more(core, balancer, ready)
    if slots.blocked is None:
        _go_on(core, balancer, ready, slots)
    if balancer.job is not None:
        balancer.job.set(QueryState.ACCEPTED, slots.blocked)


def _go_on(core: Core, balancer: Balancer, ready: list[Capture], slots: MoveSlots) -> None:
    tables, taking_part = core.tables, {capture.index for capture in ready}
    for _ in range(len(balancer.planned)):
        if slots.free <= 0:
            return
        row, number, target = balancer.planned.popleft()
        source = int(tables.primary[row])
        stale = not tables.live[row] or tables.number[row] != number or not tables.steady[row]
        if stale or source == target or not {source, target} <= taking_part:
            continue
        if not slots.free_from(source) or target in slots.full():
            balancer.planned.append((row, number, target))  # others, of other captures, need not wait for it
            continue
        prepare(core, np.array([row], np.int64), np.array([target], np.int16), TASK_BALANCE, balancer.job)
        slots.take(source, target)
        balancer.begun[row] = (number, target)


def _plan_more(core: Core, balancer: Balancer, ready: list[Capture]) -> None:
    """Plans the next moves, or ends: when the loads are even, or as even as they get without those that get nothing ready."""
    for_operator, limit = balancer.job is not None, core.config.move_attempts
    able = [capture for capture in ready if balancer.failed[capture.index] < limit]
    moves = plan(core, able, for_operator).moves
    numbers = core.tables.number
    waiting = _in_backoff(core, [move.position for move in moves])
    balancer.planned.extend(
        (move.position, int(numbers[move.position]), move.target) for move in moves if move.position not in waiting
    )
    if moves or len(under_way(core, (TASK_BALANCE,))):
        return
    unable = [capture.id for capture in ready if capture not in able]
    if unable and plan(core, ready, for_operator).moves:
        _end(balancer, QueryState.REFUSED, JobReason.TARGETS_FAILED.of(captures=", ".join(unable), attempts=limit))
    else:
        _end(balancer, QueryState.DONE)
    balancer.quiet_since_ms = core.now_ms


def _in_backoff(core: Core, rows: list[int]) -> set[int]:
    """Those that failed lately: not again before their time."""
    trouble = core.tables.failures
    return {row for row in rows if row in trouble and trouble[row].retry_at_ms > core.now_ms}


def _end(balancer: Balancer, state: QueryState, reason: Reason | None = None) -> None:
    if balancer.job is not None:
        balancer.job.set(state, reason)
    balancer.job = None
    balancer.is_balancing = False
    balancer.clear()


def _should_begin(core: Core, balancer: Balancer, ready: list[Capture], disturbed: bool) -> bool:
    config, tables, size = core.config, core.tables, core.tables.size
    busy = disturbed or core.mass_failure_guard.is_active or bool(core.leaving_captures())
    if balancer.quiet_since_ms is None:
        balancer.quiet_since_ms = core.now_ms
    if busy or not config.balance_interval_ms or len(ready) < 2:
        balancer.quiet_since_ms = core.now_ms
        return False
    if core.now_ms - balancer.quiet_since_ms < config.balance_interval_ms:
        return False
    if bool((tables.wanted[:size] & ~tables.steady[:size]).any()):
        balancer.quiet_since_ms = core.now_ms
        return False
    load = [tables.loads(len(core.captures))[capture.index] + core.cluster_load.get(capture.id, 0.0) for capture in ready]
    mean = sum(load) / len(load)
    balancer.quiet_since_ms = core.now_ms
    return bool(max(load) - mean > mean * config.balance_start_percent / 100)


def plan(core: Core, ready: list[Capture], for_operator: bool) -> Leveling:
    """The moves that would even the loads out now. Positions are rows."""
    tables, size = core.tables, core.tables.size
    location = np.where(tables.secondary[:size] != NO_CAPTURE, tables.secondary[:size], tables.primary[:size])
    movable: Mask = tables.steady[:size] & tables.wanted[:size]
    if not for_operator:
        settled = [row for row in tables.moved_ms if row < size]
        movable[settled] = False
    return level(
        location,
        tables.weight[:size],
        movable,
        [capture.index for capture in ready],
        {capture.index: core.cluster_load.get(capture.id, 0.0) for capture in ready},
        core.config.balance_stop_percent,
        MOVES_PLANNED_MAX,
    )


def forget_moves(core: Core) -> None:
    """Spans whose cooldown is over may be balanced again, those that an operator placed too."""
    limit = core.now_ms - core.config.move_cooldown_ms
    for row in [row for row, at in core.tables.moved_ms.items() if at < limit]:
        del core.tables.moved_ms[row]
        core.tables.pinned.discard(row)
