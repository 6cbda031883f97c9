"""Messages in: which ones count, and what they say in terms of rows.

Invariant: a report (base b, number m) is applied only if b is at most the last m that was applied from that processor_epoch;
after it the rows hold what the agent knew at m.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from owner.core.captures import Capture
from owner.core.events import AuditFailed
from owner.core.moves import note_failure
from owner.core.replication import (
    RowReports,
    apply_reports,
    apply_steady_reports,
    counted,
    note_reports,
    note_states,
    reports_without_progress,
    roles_of,
)
from owner.core.state import Core
from owner.core.tables import NO_ROW, REMOVING, Rows, Tables
from owner.core.transitions import Role
from tablewire.model.columns import U8, U32
from tablewire.model.messages import (
    PROTOCOL_VERSION,
    DispatchTableResponse,
    HeartbeatResponse,
    Message,
    SpanReports,
    SpanStats,
    join_reports,
    span_checksum,
)
from tablewire.model.spans import SpanBlock
from tablewire.model.states import TableState

HELD = np.zeros(len(TableState), np.bool_)
HELD[[TableState.PREPARING.code, TableState.PREPARED.code, TableState.REPLICATING.code, TableState.STOPPING.code]] = True
CHUNKS_MAX = 1_024


def receive_messages(core: Core, messages: Sequence[Message]) -> None:
    """Applies what counts, by capture and in the order of their numbers; the rest is counted by its reason."""
    for message in sorted(messages, key=lambda message: (message.sender, message.number)):
        why_not = _receive(core, message)
        if why_not:
            core.dropped_messages[why_not] = core.dropped_messages.get(why_not, 0) + 1


def _receive(core: Core, message: Message) -> str:
    identity, body = core.identity, message.body
    if not isinstance(body, HeartbeatResponse | DispatchTableResponse):
        return "not for an owner"
    if message.version != PROTOCOL_VERSION:
        return "version"
    if message.receiver != identity.owner_id or message.changefeed != identity.changefeed:
        return "addressee"
    if message.owner_revision != identity.owner_revision:
        return "owner_revision"
    if message.changefeed_epoch != identity.changefeed_epoch:
        return "changefeed_epoch"
    capture = core.captures.get(message.sender)
    if capture is None:
        return "unknown capture"
    if message.processor_epoch == 0:
        return "processor_epoch"
    if message.processor_epoch != capture.processor_epoch:
        # A restarted agent is learnt afresh; its epoch has no order, so only the echo tells that it is the newer one.
        if capture.processor_epoch and message.echo <= capture.echoed:
            return "processor_epoch"
        capture.processor_epoch = message.processor_epoch
        capture.received = capture.acked = 0
        core.chunks.pop(capture.index, None)
    elif message.number <= capture.received:
        return "number"
    follows = message.number == capture.received + 1
    capture.received = message.number
    capture.echoed = max(capture.echoed, message.echo)
    capture.reported_ms = core.now_ms
    if isinstance(body, HeartbeatResponse):
        capture.liveness, capture.fenced = body.liveness, body.fenced
    report = _join_chunks(core, capture, body.reports, follows)
    if report is None:
        return ""
    if report.base > capture.acked or (capture.must_report_names and (report.base or report.numbers.any())):
        return "base"
    capture.must_report_names = False
    capture.acked = message.number
    if core.bootstrap.done:
        apply_span_reports(core, capture, report, message.echo, isinstance(body, HeartbeatResponse))
        if isinstance(body, HeartbeatResponse):
            _audit(core, capture, body, report.base)
    else:
        capture.acked = 0  # until the gate opens, each answer is to be the whole truth
        core.bootstrap.reports[capture.index] = report
        core.bootstrap.waiting_for.discard(capture.index)
    return ""


def _audit(core: Core, capture: Capture, response: HeartbeatResponse, base: int) -> None:
    """Now and then what the capture says it holds is compared with what is known of it; if they differ, which would be a bug, it
    tells everything again. A number that was given by a lost heartbeat is no bug: it is given again after the whole truth."""
    if capture.audited_ms is not None and core.now_ms - capture.audited_ms < core.config.audit_interval_ms:
        return
    capture.audited_ms = core.now_ms
    tables = core.tables
    rows = tables.rows_with_role(capture.index)
    states = _last_reported(tables, rows, roles_of(tables, rows, capture.index), capture.index)
    held = HELD[states]
    count, checksum = int(np.count_nonzero(held)), span_checksum(tables.number[rows[held]], states[held])
    if count == response.held and (checksum == response.checksum or capture.unnumbered):
        return
    if count == response.held and base:
        capture.audited_ms = None  # it may not know its numbers: ask for everything, and look again
    else:
        core.audits_failed += 1
        core.events.append(AuditFailed(capture.id))
    capture.acked = 0


def _join_chunks(core: Core, capture: Capture, chunk: SpanReports, follows: bool) -> SpanReports | None:
    """The whole report once its last chunk is there, else None. Chunks follow each other without a gap; a chunk that comes after
    a gap begins a report whose base was never applied, and is dropped for that."""
    before = core.chunks.pop(capture.index, None)
    if before is not None and follows and len(before) < CHUNKS_MAX:
        before.append(chunk)
    else:
        before = [chunk]
    if chunk.more:
        core.chunks[capture.index] = before
        return None
    return join_reports(before)


def apply_span_reports(core: Core, capture: Capture, report: SpanReports, echo: int, restate: bool) -> None:
    """Rows are found, what does not count is left out, and the rules are applied; then the rows of this capture that are not
    steady and that the report leaves out are told again (restate) in the state that was last reported."""
    tables = core.tables
    rows = rows_of_report(core, capture, report)
    found = rows != NO_ROW
    whole_truth = report.base == 0
    if found.all():
        reports = _reports(report, rows)
    else:
        reports = _reports(report, rows).take(found)
    _resolve_unheard_capture(core, capture, reports, whole_truth)
    if report.errors or not apply_steady_reports(tables, capture.index, reports):
        _apply_counted(core, capture, report, reports, rows, echo)
    apply_stats(core, capture, report.stats, rows)
    if whole_truth:
        _restate(core, capture, _without(tables.rows_with_role(capture.index), reports.rows, tables.size), echo, absent=True)
    elif restate:
        _restate(core, capture, _without(unsteady_rows_of(tables, capture.index), reports.rows, tables.size), echo, absent=False)


def _apply_counted(core: Core, capture: Capture, report: SpanReports, reports: RowReports, rows: Rows, echo: int) -> None:
    """The rules for what counts, a note of what does not."""
    tables = core.tables
    roles = roles_of(tables, reports.rows, capture.index)
    mask = counted(tables, reports.rows, roles, capture.index, echo)
    failed = _failed(report, rows, reports.rows[mask & (roles != Role.NONE)]) if report.errors else {}
    if mask.all():
        apply_reports(core.replication, capture.index, reports)
    else:
        note_reports(tables, capture.index, reports.take(~mask), roles[~mask])
        apply_reports(core.replication, capture.index, reports.take(mask))
    apply_errors(core, capture, failed)


def _without(rows: Rows, told: Rows, size: int) -> Rows:
    """The rows that are not among those told."""
    if not len(rows):
        return rows
    is_told = np.zeros(size, np.bool_)
    is_told[told] = True
    return rows[~is_told[rows]]


def unsteady_rows_of(tables: Tables, capture: int) -> Rows:
    """The rows that are not steady and in which the capture has a role, sorted."""
    rows = tables.unsteady_rows()
    if not len(rows):
        return rows
    mask = (tables.primary[rows] == capture) | (tables.secondary[rows] == capture)
    for position in np.flatnonzero(tables.undetermined_count[rows]).tolist():
        mask[position] |= capture in tables.undetermined[int(rows[position])]
    found: Rows = rows[mask]
    return found


def _restate(core: Core, capture: Capture, rows: Rows, echo: int, absent: bool) -> None:
    if not len(rows):
        return
    tables = core.tables
    roles = roles_of(tables, rows, capture.index)
    mask = counted(tables, rows, roles, capture.index, echo)
    if absent:
        # Too old to count, but it is what the capture said last: it will not say so again.
        note_states(tables, capture.index, reports_without_progress(rows[~mask], TableState.ABSENT.code), roles[~mask])
    rows, roles = rows[mask], roles[mask]
    states: U8 | int = TableState.ABSENT.code if absent else _last_reported(tables, rows, roles, capture.index)
    apply_reports(core.replication, capture.index, reports_without_progress(rows, states))


def _last_reported(tables: Tables, rows: Rows, roles: U8, capture: int) -> U8:
    states: U8 = tables.secondary_reported[rows].astype(np.uint8)
    primary = roles == Role.PRIMARY
    states[primary] = tables.primary_reported[rows[primary]]
    for position in np.flatnonzero(roles == Role.UNDETERMINED).tolist():
        states[position] = tables.undetermined[int(rows[position])][capture].reported
    return states


def _resolve_unheard_capture(core: Core, capture: Capture, reports: RowReports, whole_truth: bool) -> None:
    """A capture that might have held anything has told what it holds: those spans name it, and it is free of the others."""
    replication = core.replication
    if capture.index not in replication.may_hold_any_span or not whole_truth:
        return
    replication.may_hold_any_span.discard(capture.index)
    held = reports.take(HELD[reports.states])
    roles = roles_of(core.tables, held.rows, capture.index)
    new = roles == Role.NONE
    for row, state in zip(held.rows[new].tolist(), held.states[new].tolist(), strict=True):
        core.tables.add_undetermined((row,), capture.index, state)
    core.tables.refresh_steady(held.rows)


def rows_of_report(core: Core, capture: Capture, report: SpanReports) -> Rows:
    """The row of each reported span; shape (len(report),); NO_ROW: nothing to do. A held stranger gets one in Removing."""
    tables = core.tables
    numbers: U32 = report.numbers
    if numbers.all():
        rows = tables.rows_of_numbers(numbers)
    else:
        named = numbers == 0
        rows = tables.rows_of_numbers(numbers)
        by_name = tables.rows_of_spans(report.spans)
        strangers = (by_name == NO_ROW) & HELD[report.states[named]]
        if strangers.any():
            by_name[strangers] = insert_unknown_spans(core, report.spans, np.flatnonzero(strangers))
        rows[named] = by_name
        capture.unnumbered.append(by_name[by_name != NO_ROW])
    if not (rows != NO_ROW).all():
        unknown = (rows == NO_ROW) & (numbers != 0) & HELD[report.states]
        if unknown.any():
            capture.must_report_names, capture.acked = True, 0
    return rows


def insert_unknown_spans(core: Core, spans: SpanBlock, positions: Rows) -> Rows:
    """Spans that somebody holds and nobody knows: rows that are being removed, so that the holder is not forgotten."""
    rows = core.tables.add(SpanBlock.of([spans[int(position)] for position in positions]), core.now_ms)
    core.tables.set_state(rows, REMOVING, core.now_ms)
    return rows


def _failed(report: SpanReports, rows: Rows, counting: Rows) -> dict[int, str]:
    """row -> error text, of the spans that have Stopped, where the reporter had a role and the report counts.

    The text comes with Stopping already, and again until Stopped is acknowledged: it is one failure, and counts once.
    """
    known, stopped = set(counting.tolist()), TableState.STOPPED.code
    return {
        int(rows[position]): text
        for position, text in report.errors
        if report.states[position] == stopped and int(rows[position]) in known
    }


def apply_errors(core: Core, capture: Capture, failed: dict[int, str]) -> None:
    """An executor's error stopped these spans."""
    for row, text in failed.items():
        if core.tables.state[row] == REMOVING:
            continue
        note_failure(core, row, capture.index, text)


def apply_stats(core: Core, capture: Capture, stats: SpanStats, rows: Rows) -> None:
    """What a capture says of spans that it writes; rates become weights."""
    tables, config = core.tables, core.config
    if not len(stats.rows):
        return
    at = rows[stats.rows]
    mask = at != NO_ROW
    mask[mask] = tables.primary[at[mask]] == capture.index
    at = at[mask]
    tables.statistics.set_puller(at, stats.puller_resolved_ts[mask])
    in_snapshot = stats.in_snapshot[mask] != 0
    if (tables.in_snapshot[at] != in_snapshot).any():
        tables.version += 1  # a steady report says so too, and the published view has to show it
    tables.in_snapshot[at] = in_snapshot
    rate = np.maximum(
        stats.rows_per_s[mask] / config.rows_per_s_per_weight, stats.bytes_per_s[mask] / config.bytes_per_s_per_weight
    )
    tables.statistics.set_rates(at, stats.rows_per_s[mask], stats.bytes_per_s[mask])
    tables.statistics.set_weights(at, 1 + np.where(in_snapshot, 0.0, rate))


def _reports(report: SpanReports, rows: Rows) -> RowReports:
    return RowReports(
        rows,
        report.states,
        report.checkpoint_ts,
        report.resolved_ts,
        report.last_synced_ts,
        report.assignment_epochs,
    )
