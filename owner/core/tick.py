"""One tick of the scheduler, as a pure function: time, messages and job requests come in, messages
and events go out.

Take job requests -> captures joined and gone -> apply reports -> bootstrap once -> current tables
-> policies and jobs -> watermark -> dispatches and heartbeats -> events. Inputs are whole sets and
messages are idempotent, so that a lost, duplicate, late or reordered message needs no code of its
own: the next report states the whole truth again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from owner.core import events, watermark
from owner.core.bootstrap import try_finish_bootstrap
from owner.core.captures import Capture
from owner.core.events import Event
from owner.core.inbox import receive_messages
from owner.core.jobs import JobRequest
from owner.core.moves import MoveSlots, finish_moves, undo_overdue_prepares
from owner.core.outbox import write_messages
from owner.core.policies.add_and_remove import add_missing, reconcile_tables, remove_unwanted
from owner.core.policies.drain import drain, update_drains
from owner.core.policies.move import move
from owner.core.policies.rebalance import balance
from owner.core.replication import apply_capture_loss, find_removed
from owner.core.state import Core
from owner.core.tables import ABSENT, NO_CAPTURE
from owner.core.transitions import Note
from tablewire.model.columns import I64
from tablewire.model.ids import CaptureID, CaptureInfo, Ts
from tablewire.model.messages import Message
from tablewire.model.progress import BarrierWithMinTs, Watermark
from tablewire.model.states import LivenessState

WEIGHT_SMOOTHING = 0.3


@dataclass(frozen=True, slots=True)
class TickInput:
    """The input of one tick. now_ms: any monotone clock. current_tables: int64, shape (n,), any
    order. requests: since the last tick, in order."""

    now_ms: int
    checkpoint_ts: Ts
    current_tables: I64
    alive_captures: Mapping[CaptureID, CaptureInfo]
    barrier: BarrierWithMinTs
    messages: Sequence[Message]
    cluster_load: Mapping[CaptureID, float]
    requests: Sequence[JobRequest] = ()


@dataclass(frozen=True, slots=True)
class TickOutput:
    messages: list[Message]
    watermark: Watermark
    events: Sequence[Event]
    roles_changed: bool  # a span's state or role changed, not only its progress


def tick(core: Core, inputs: TickInput) -> TickOutput:
    """Run one tick of one scheduler; `core` is its memory."""
    core.now_ms = max(core.now_ms, inputs.now_ms)
    core.checkpoint_ts, core.barrier = inputs.checkpoint_ts, inputs.barrier
    core.cluster_load = dict(inputs.cluster_load)
    core.events = []
    core.jobs.take(inputs.requests)
    core.replication.begin_tick(core.now_ms)
    version, unsteady = core.tables.version, bool(len(core.tables.unsteady_rows()))
    joined, gone = core.captures.update(inputs.alive_captures)
    receive_messages(core, inputs.messages)
    _take_losses(core, gone)
    lost = [capture for capture in gone if capture.id not in core.jobs.drains and capture.liveness is LivenessState.ALIVE]
    was_active = core.mass_failure_guard.is_active
    core.mass_failure_guard.tick(core.now_ms, sum(1 for _ in core.captures.alive()), len(lost), core.config)
    bootstrapped = try_finish_bootstrap(core)
    _drop(core)
    reconcile_tables(core, inputs.current_tables)
    if core.bootstrap.done:
        _run_policies(core, disturbed=bool(joined or gone))
        _forget_failures(core)
        _drop(core)
    if core.now_ms - core.weights_smoothed_ms >= core.config.stats_interval_ms:
        core.weights_smoothed_ms = core.now_ms
        core.tables.statistics.smooth(core.tables.weight[: core.tables.size], WEIGHT_SMOOTHING)
    core.watermark = watermark.compute(core, inputs.barrier)
    messages = write_messages(core, inputs.barrier)
    _report(core, bootstrapped, was_active)
    return TickOutput(
        messages=messages,
        watermark=core.watermark,
        events=(*core.events, *core.jobs.report()),
        roles_changed=unsteady
        or bool(len(core.tables.unsteady_rows()) or version != core.tables.version or bootstrapped or joined or gone),
    )


def _take_losses(core: Core, gone: Sequence[Capture]) -> None:
    """Apply the loss of these captures: what they wrote has no writer any longer, and a failover
    begins."""
    tables, lost = core.tables, {}
    for capture in gone:
        core.chunks.pop(capture.index, None)
        core.bootstrap.waiting_for.discard(capture.index)
        core.bootstrap.reports.pop(capture.index, None)
        if spans := int(np.count_nonzero(tables.primary[: tables.size] == capture.index)):
            lost[capture.id] = spans
        apply_capture_loss(core.replication, capture.index)
        core.captures.release(capture)
    if lost:
        spans = sum(lost.values())
        since_ms, spans_before = core.failover or (core.now_ms, 0)
        core.failover = (since_ms, spans_before + spans)
        core.events.append(events.FailoverBegan(tuple(lost), spans))


def _report(core: Core, bootstrapped: bool, guard_was_active: bool) -> None:
    """Add the events that are known at the end of a tick only."""
    tables = core.tables
    size, alive = tables.size, sum(1 for _ in core.captures.alive())
    if bootstrapped:
        core.events.append(events.BootstrapDone(len(tables)))
    for row, stays, goes in core.replication.two_writers:
        core.events.append(events.TwoWriters(tables.span(row), core.captures[stays].id, core.captures[goes].id))
    if orphans := core.replication.notes[Note.ORPHAN]:
        core.events.append(events.OrphansFound(orphans))
    if core.failover is not None and not (tables.wanted[:size] & (tables.primary[:size] == NO_CAPTURE)).any():
        since_ms, spans = core.failover
        core.failover = None
        core.events.append(events.FailoverDone(spans, core.now_ms - since_ms))
    if core.mass_failure_guard.is_active and not guard_was_active:
        waiting = tables.live[:size] & (tables.state[:size] == ABSENT)
        core.events.append(events.GuardEngaged(int(np.count_nonzero(waiting)) if core.bootstrap.done else 0, alive))
    elif guard_was_active and not core.mass_failure_guard.is_active:
        core.events.append(events.GuardReleased(alive))


def _drop(core: Core) -> None:
    """Drop removed rows without a holder. A table that came back meanwhile gets a new row with the
    next reconciliation."""
    rows = find_removed(core.replication)
    if len(rows):
        if core.tables.wanted[rows].any():
            core.reconciled = False
        core.tables.drop(rows)


def _run_policies(core: Core, disturbed: bool) -> None:
    ready = core.ready_captures()
    remove_unwanted(core)
    undo_overdue_prepares(core)
    finish_moves(core)
    if not core.mass_failure_guard.is_active:
        add_missing(core, ready)
    slots = MoveSlots.of(core)
    drain(core, ready, slots)
    move(core, slots)
    balance(core, ready, slots, disturbed)
    update_drains(core)


def _forget_failures(core: Core) -> None:
    """Forget the failure of a span that replicates again when its backoff is over, and its number
    of attempts some time later."""
    tables = core.tables
    for row in [row for row, failure in tables.failures.items() if tables.steady[row] and failure.retry_at_ms <= core.now_ms]:
        del tables.failures[row]
    for row in list(tables.attempts):
        if tables.steady[row] and core.now_ms - tables.state_since_ms[row] > core.config.error_forget_ms:
            del tables.attempts[row]
