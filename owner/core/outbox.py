"""Outgoing messages: the dispatches that a tick decided, and the heartbeats that are due.

Invariant: the number n of a dispatch is recorded in the row at the role of the capture that it is
for, so that only reports with an echo of at least n count for that span.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from owner.core.captures import Capture
from owner.core.roles import roles_of, set_field
from owner.core.state import Core
from owner.core.tables import TASK_ADD, Rows, Tables
from tablewire.model.columns import U64
from tablewire.model.messages import DispatchTableRequest, Heartbeat, Message, MessageBody
from tablewire.model.progress import BarrierWithMinTs
from tablewire.model.states import DispatchAction

NUMBERS_MAX = 65_536
JOB_IDS_MAX = 256


def write_messages(core: Core, barrier: BarrierWithMinTs) -> list[Message]:
    """Return the messages of this tick: to each capture its dispatches, then a heartbeat if one is
    due. The answer to the heartbeat acknowledges the dispatches before it."""
    messages = []
    for capture in core.captures.alive():
        requests = list(_requests(core, capture))
        if capture.processor_epoch:
            for rows, request in requests:
                messages.append(_envelope(core, capture, request))
                roles = roles_of(core.tables, rows, capture.index)
                set_field(core.tables, "dispatch", rows, roles, capture.index, capture.sent)
        heartbeat = _heartbeat(core, capture, barrier, bool(requests))
        if heartbeat is not None:
            messages.append(_envelope(core, capture, heartbeat))
    return messages


def _requests(core: Core, capture: Capture) -> Iterator[tuple[Rows, DispatchTableRequest]]:
    """Yield the requests to one capture with their rows, each of a bounded size."""
    tables, chunk, outgoing = core.tables, core.config.spans_per_message, core.replication.outgoing
    if capture.index not in outgoing.entries:
        return
    rows, actions = outgoing.to(capture.index)
    # A later report of the same tick may have taken the role from the capture.
    due = actions == DispatchAction.REMOVE
    due |= (actions == DispatchAction.ADD_PREPARE) & (tables.secondary[rows] == capture.index)
    due |= (actions == DispatchAction.ADD_WRITE) & (tables.primary[rows] == capture.index)
    due &= tables.live[rows]
    rows, actions = rows[due], actions[due]
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        yield part, _request(tables, part, actions[start : start + chunk], capture.acked)


def _request(tables: Tables, rows: Rows, actions: np.ndarray, acked: int) -> DispatchTableRequest:
    adds, writes, zero = actions != DispatchAction.REMOVE, actions == DispatchAction.ADD_WRITE, np.uint64(0)
    return DispatchTableRequest(
        numbers=tables.number[rows],
        spans=tables.spans(rows),
        actions=actions,
        checkpoint_ts=np.where(adds, tables.checkpoint_ts[rows], zero),
        resolved_ts=np.where(adds, tables.resolved_ts[rows], zero),
        assignment_epochs=np.where(writes, tables.assignment_epoch[rows], zero),
        acked=acked,
        jobs=_job_ids(tables, rows),
    )


def _job_ids(tables: Tables, rows: Rows) -> U64:
    """Return the job that each dispatch belongs to, 0 = none; empty when no dispatch has a job, or
    when there are too many dispatches for the agent to log them one by one."""
    ids = np.zeros(len(rows), np.uint64)
    if tables.moving and len(rows) <= JOB_IDS_MAX:
        for position, row in enumerate(rows.tolist()):
            move = tables.moving.get(row)
            if move is not None and move.job is not None and tables.task[row] != TASK_ADD:
                ids[position] = move.job.id
    return ids if ids.any() else ids[:0]


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
        rows = np.unique(np.concatenate(capture.unnumbered))[:NUMBERS_MAX]
        rows = rows[core.tables.live[rows]]
        capture.unnumbered.clear()  # a span whose number is left out or lost is reported by name again
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
