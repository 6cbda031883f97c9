"""Messages out: the dispatches that a tick decided and the heartbeats that are due."""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.roles import roles_of, set_field
from owner.core.state import Core
from tablewire.model.messages import Heartbeat, Message, MessageBody
from tablewire.model.progress import BarrierWithMinTs

INTRODUCTIONS_MAX = 65_536


def write_messages(core: Core, barrier: BarrierWithMinTs) -> list[Message]:
    """Return the messages of this tick: to each capture its dispatches, then a heartbeat if one is
    due. The answer to the heartbeat acknowledges the dispatches before it."""
    messages = []
    for capture in core.captures.alive():
        requests = core.replication.outgoing.requests(core.tables, capture, core.config.spans_per_message)
        if capture.processor_epoch:
            for request in requests:
                messages.append(_envelope(core, capture, request))
                rows = core.tables.rows_of_numbers(request.numbers)
                roles = roles_of(core.tables, rows, capture.index)
                set_field(core.tables, "dispatch", rows, roles, capture.index, capture.sent)
        heartbeat = _heartbeat(core, capture, barrier, bool(requests))
        if heartbeat is not None:
            messages.append(_envelope(core, capture, heartbeat))
    return messages


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
