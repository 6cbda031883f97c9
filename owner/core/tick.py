"""The recipe of one tick. Pure: time comes in, messages go out, nothing else is touched.

take messages -> captures joined and gone -> apply reports -> bootstrap once -> current tables -> jobs and policies ->
watermark -> heartbeats and dispatches. Inputs are whole sets and messages are idempotent, so that a lost, doubled, late or
reordered message needs no code of its own: the next report restates the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from owner.core import watermark
from owner.core.bootstrap import try_finish_bootstrap
from owner.core.captures import Capture
from owner.core.dispatch import OutgoingDispatches, note_number
from owner.core.inbox import receive_messages
from owner.core.moves import PLANNED, MoveSlots, undo_overdue_prepares
from owner.core.policies.add_and_remove import add_missing, reconcile_tables, remove_unwanted
from owner.core.policies.drain import drain, update_drains
from owner.core.policies.move import move
from owner.core.policies.rebalance import balance, forget_moves
from owner.core.replication import apply_capture_loss, find_removed
from owner.core.state import Core
from owner.core.tables import NO_CAPTURE, TASK_BALANCE, TASK_DRAIN, TASK_MOVE
from owner.core.transitions import Note
from tablewire.model.columns import I64
from tablewire.model.ids import CaptureID, CaptureInfo, Ts
from tablewire.model.messages import DispatchTableRequest, Heartbeat, Message, MessageBody
from tablewire.model.progress import BarrierWithMinTs, Watermark
from tablewire.model.spans import Span
from tablewire.model.states import LivenessState

INTRODUCTIONS_MAX = 65_536
PLACEMENTS_MAX = 256
WEIGHT_SMOOTHING = 0.3
_WHY = {TASK_MOVE: "move", TASK_DRAIN: "drain", TASK_BALANCE: "balance"}


@dataclass(frozen=True, slots=True)
class TickInput:
    """What one tick is told. now_ms: any monotone clock. current_tables: int64, shape (n,), any order."""

    now_ms: int
    checkpoint_ts: Ts
    current_tables: I64
    alive_captures: Mapping[CaptureID, CaptureInfo]
    barrier: BarrierWithMinTs
    messages: Sequence[Message]
    cluster_load: Mapping[CaptureID, float]


@dataclass(frozen=True, slots=True)
class TwoWriters:
    """Two captures reported to write one span; the newest permission stays."""

    span: Span
    stays: CaptureID
    goes: CaptureID


@dataclass(frozen=True, slots=True)
class Placement:
    """A span began to replicate at `target`. source: where it came from by a planned move, None else. why: a word for people.
    job: the manual job that it belongs to, 0 = none, or not known here (see `owner.scheduling.job_ids`)."""

    span: Span
    source: CaptureID | None
    target: CaptureID
    why: str
    job: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What happened in a tick, for logs and metrics: small, and nothing that grows with the tables."""

    bootstrapped: bool
    joined: tuple[CaptureID, ...]
    gone: tuple[CaptureID, ...]
    orphans: int
    two_writers: tuple[TwoWriters, ...]
    placements: tuple[Placement, ...] = ()  # at most PLACEMENTS_MAX, planned moves first
    placed: Mapping[str, int] = field(default_factory=dict)  # how many there were, by `why`
    brake: bool = False
    audits_failed: int = 0  # over the term


@dataclass(frozen=True, slots=True)
class TickOutput:
    messages: list[Message]
    watermark: Watermark
    facts: Facts
    roles_changed: bool  # a span's life changed, not its progress alone


def tick(core: Core, inputs: TickInput) -> TickOutput:
    """One tick of one scheduler; `core` is its memory."""
    core.now_ms = max(core.now_ms, inputs.now_ms)
    core.checkpoint_ts, core.barrier = inputs.checkpoint_ts, inputs.barrier
    core.cluster_load = dict(inputs.cluster_load)
    replication = core.replication
    replication.now_ms = core.now_ms
    replication.outgoing = OutgoingDispatches()
    replication.notes.clear()
    replication.two_writers.clear()
    replication.refused.clear()
    replication.arrived.clear()
    version, unsteady = core.tables.version, bool(len(core.tables.unsteady_rows()))
    joined, gone = core.captures.update(inputs.alive_captures, core.now_ms)
    receive_messages(core, inputs.messages)
    for capture in gone:
        core.chunks.pop(capture.index, None)
        core.bootstrap.waiting_for.discard(capture.index)
        core.bootstrap.reports.pop(capture.index, None)
        apply_capture_loss(replication, capture.index)
        core.captures.release(capture)
    lost = [capture for capture in gone if capture.id not in core.drains and capture.liveness is LivenessState.ALIVE]
    core.mass_failure_guard.tick(core.now_ms, sum(1 for _ in core.captures.alive()), len(lost), core.config)
    bootstrapped = try_finish_bootstrap(core)
    _drop(core)
    reconcile_tables(core, inputs.current_tables)
    if core.bootstrap.done:
        _run_policies(core, disturbed=bool(joined or gone))
        _forget_troubles(core)
        _drop(core)
    if core.now_ms - core.weights_smoothed_ms >= core.config.stats_interval_ms:
        core.weights_smoothed_ms = core.now_ms
        core.tables.statistics.smooth(core.tables.weight[: core.tables.size], WEIGHT_SMOOTHING)
    core.watermark = watermark.compute(core, inputs.barrier)
    two_writers = tuple(
        TwoWriters(core.tables.span(row), core.captures[stays].id, core.captures[goes].id)
        for row, stays, goes in replication.two_writers
    )
    messages = _messages(core, inputs.barrier)
    return TickOutput(
        messages=messages,
        watermark=core.watermark,
        facts=Facts(
            bootstrapped,
            tuple(capture.id for capture in joined),
            tuple(capture.id for capture in gone),
            replication.notes[Note.ORPHAN],
            two_writers,
            *_placements(core),
            core.mass_failure_guard.is_active,
            core.audits_failed,
        ),
        roles_changed=unsteady
        or bool(len(core.tables.unsteady_rows()) or version != core.tables.version or bootstrapped or joined or gone),
    )


def _placements(core: Core) -> tuple[tuple[Placement, ...], dict[str, int]]:
    """The spans that arrived in this tick, a bounded number by name, and how many; notes the moves for their cooldown."""
    tables = core.tables
    placed: dict[str, int] = {}
    found: list[Placement] = []
    for rows, tasks in sorted(core.replication.arrived, key=lambda arrived: -int(arrived[1].max())):
        for task, count in zip(*np.unique(tasks, return_counts=True), strict=True):
            why = _WHY.get(int(task), "add")
            placed[why] = placed.get(why, 0) + int(count)
        planned = np.isin(tasks, PLANNED)
        for row, task in zip(rows[planned].tolist(), tasks[planned].tolist(), strict=True):
            tables.moved_ms[row] = core.now_ms
            if task == TASK_MOVE:
                tables.pinned.add(row)
        room = PLACEMENTS_MAX - len(found)
        for row, task in zip(rows[:room].tolist(), tasks[:room].tolist(), strict=True):
            if tables.primary[row] == NO_CAPTURE:
                continue
            source = tables.origin.pop(row, None) if task in PLANNED else None
            found.append(Placement(tables.span(row), source, core.captures[int(tables.primary[row])].id, _WHY.get(task, "add")))
    return tuple(found), placed


def _drop(core: Core) -> None:
    """Rows that nobody holds any more go; a table that came back meanwhile gets a new row with the next reconciliation."""
    rows = find_removed(core.replication)
    if len(rows):
        if core.tables.wanted[rows].any():
            core.reconciled = False
        core.tables.drop(rows)


def _run_policies(core: Core, disturbed: bool) -> None:
    for job in core.drains.values():
        job.taken_in = True
    ready = core.ready_captures()
    remove_unwanted(core)
    undo_overdue_prepares(core)
    if not core.mass_failure_guard.is_active:
        add_missing(core, ready)
    slots = MoveSlots.of(core)
    drain(core, ready, slots)
    move(core, slots)
    balance(core, ready, slots, disturbed)
    update_drains(core)


def _forget_troubles(core: Core) -> None:
    """An error is over once its span replicates again and its time has come; how often it failed is forgotten some time later."""
    tables = core.tables
    for row in [row for row, trouble in tables.failures.items() if tables.steady[row] and trouble.retry_at_ms <= core.now_ms]:
        del tables.failures[row]
    for row in list(tables.attempts):
        if tables.steady[row] and core.now_ms - tables.state_since_ms[row] > core.config.error_forget_ms:
            del tables.attempts[row]
    forget_moves(core)


def _messages(core: Core, barrier: BarrierWithMinTs) -> list[Message]:
    """Dispatches first, so that the heartbeat behind them acknowledges that they were taken in."""
    messages = []
    for capture in core.captures.alive():
        requests = core.replication.outgoing.requests(core.tables, capture, core.config.spans_per_message)
        if capture.processor_epoch:
            for request in requests:
                messages.append(_envelope(core, capture, _with_ack(request, capture.acked)))
                note_number(core.tables, capture.index, request.numbers, capture.sent)
        heartbeat = _heartbeat(core, capture, barrier, bool(requests))
        if heartbeat is not None:
            messages.append(_envelope(core, capture, heartbeat))
    return messages


def _with_ack(request: DispatchTableRequest, acked: int) -> DispatchTableRequest:
    return DispatchTableRequest(
        request.numbers,
        request.spans,
        request.actions,
        request.checkpoint_ts,
        request.resolved_ts,
        request.assignment_epochs,
        acked,
    )


def _heartbeat(core: Core, capture: Capture, barrier: BarrierWithMinTs, now: bool) -> Heartbeat | None:
    config = core.config
    due = capture.heartbeat_ms is None or core.now_ms - capture.heartbeat_ms >= config.heartbeat_interval_ms
    if not (due or now or capture.unnumbered or capture.must_report_names):
        return None
    capture.heartbeat_ms = core.now_ms
    collect = capture.stats_ms is None or core.now_ms - capture.stats_ms >= config.stats_interval_ms
    if collect:
        capture.stats_ms = core.now_ms
    rows = np.empty(0, np.int64)
    if capture.unnumbered and core.bootstrap.done:
        rows = np.unique(np.concatenate(capture.unnumbered))[:INTRODUCTIONS_MAX]
        rows = rows[core.tables.live[rows]]
        capture.unnumbered.clear()  # what is left out, or lost, is reported by name again
    return Heartbeat(
        barrier=barrier.barrier,
        acked=capture.acked,
        collect_stats=collect,
        by_name=capture.must_report_names,
        numbers=core.tables.number[rows],
        spans=core.tables.spans(rows),
    )


def _envelope(core: Core, capture: Capture, body: MessageBody) -> Message:
    capture.sent += 1
    identity = core.identity
    return Message(
        sender=identity.owner_id,
        receiver=capture.id,
        changefeed=identity.changefeed,
        owner_revision=identity.owner_revision,
        changefeed_epoch=identity.changefeed_epoch,
        processor_epoch=capture.processor_epoch,
        number=capture.sent,
        echo=0,
        body=body,
    )
