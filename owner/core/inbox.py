"""Incoming messages: which ones count, and their effect on the rows.

Invariant: a report (base b, number m) is applied only if b is at most the last m that was applied
from that processor_epoch. Afterwards the rows hold what the agent knew at m.
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
)
from owner.core.roles import get_field, roles_of, set_field
from owner.core.state import Core
from owner.core.tables import NO_ROW, REMOVING, Rows
from owner.core.transitions import Role
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

ABSENT, STOPPED = TableState.ABSENT.code, TableState.STOPPED.code
HELD = np.zeros(len(TableState), np.bool_)
HELD[[TableState.PREPARING.code, TableState.PREPARED.code, TableState.REPLICATING.code, TableState.STOPPING.code]] = True
CHUNKS_MAX = 1_024


def receive_messages(core: Core, messages: Sequence[Message]) -> None:
    """Apply the messages that count, by capture and in the order of their numbers."""
    for message in sorted(messages, key=lambda message: (message.sender, message.number)):
        capture = core.captures.get(message.sender)
        if capture is not None and _is_for(core, message):
            _receive(core, capture, message)


def _is_for(core: Core, message: Message) -> bool:
    """Return whether this is a response to this scheduler, term and run of the changefeed."""
    identity = core.identity
    return (
        isinstance(message.body, HeartbeatResponse | DispatchTableResponse)
        and message.version == PROTOCOL_VERSION
        and (message.receiver, message.changefeed) == (identity.owner_id, identity.changefeed)
        and (message.owner_revision, message.changefeed_epoch) == (identity.owner_revision, identity.changefeed_epoch)
        and message.processor_epoch != 0
    )


def _receive(core: Core, capture: Capture, message: Message) -> None:
    """Apply a message unless it is out of date."""
    body = message.body
    assert isinstance(body, HeartbeatResponse | DispatchTableResponse)
    if message.processor_epoch != capture.processor_epoch:
        # The agent has restarted. Epochs have no order: only the echo shows that this one is the
        # newer.
        if capture.processor_epoch and message.echo <= capture.echoed:
            return
        capture.processor_epoch = message.processor_epoch
        capture.received = capture.acked = 0
        core.chunks.pop(capture.index, None)
    elif message.number <= capture.received:
        return
    follows = message.number == capture.received + 1
    capture.received = message.number
    capture.echoed = max(capture.echoed, message.echo)
    capture.reported_ms = core.now_ms
    if isinstance(body, HeartbeatResponse):
        capture.liveness, capture.fenced = body.liveness, body.fenced
    report = _join_chunks(core, capture, body.reports, follows)
    if report is None:
        return
    if report.base > capture.acked or (capture.must_report_names and (report.base or report.numbers.any())):
        return
    capture.must_report_names = False
    if not core.bootstrap.done:
        capture.acked = 0  # until bootstrap is done, each report is to be complete
        core.bootstrap.reports[capture.index] = report
        core.bootstrap.waiting_for.discard(capture.index)
        return
    capture.acked = message.number
    apply_span_reports(core, capture, report, message.echo, isinstance(body, HeartbeatResponse))
    if isinstance(body, HeartbeatResponse):
        _audit(core, capture, body, report.base)


def _audit(core: Core, capture: Capture, response: HeartbeatResponse, base: int) -> None:
    """Compare from time to time what the capture says it holds with the rows. A difference would be
    a bug: ask for a complete report. A number that was lost with a heartbeat is none: it is sent
    again after the complete report."""
    if capture.audited_ms is not None and core.now_ms - capture.audited_ms < core.config.audit_interval_ms:
        return
    capture.audited_ms = core.now_ms
    tables = core.tables
    rows = tables.rows_with_role(capture.index)
    roles = roles_of(tables, rows, capture.index)
    states = get_field(tables, "reported", rows, roles, capture.index).astype(np.uint8)
    held = HELD[states]
    count, checksum = int(np.count_nonzero(held)), span_checksum(tables.number[rows[held]], states[held])
    if count == response.held and (checksum == response.checksum or capture.unnumbered):
        return
    if count == response.held and base:
        capture.audited_ms = None  # it may not know its numbers: audit again after the complete report
    else:
        core.audits_failed += 1
        core.events.append(AuditFailed(capture.id))
    capture.acked = 0


def _join_chunks(core: Core, capture: Capture, chunk: SpanReports, follows: bool) -> SpanReports | None:
    """Return the whole report once its last chunk has arrived, None before. Chunks follow each
    other without a gap. A chunk after a gap begins a report whose base was never applied, which is
    dropped for that reason."""
    chunks = core.chunks.pop(capture.index, [])
    if not follows or len(chunks) >= CHUNKS_MAX:
        chunks = []
    chunks.append(chunk)
    if not chunk.more:
        return join_reports(chunks)
    core.chunks[capture.index] = chunks
    return None


def apply_span_reports(core: Core, capture: Capture, report: SpanReports, echo: int, restate: bool) -> None:
    """Apply the rules to the reported rows. Then apply them to rows of this capture that the report
    leaves out: Absent if the report is complete; otherwise, if restate, the last reported state of
    the rows that are not steady."""
    tables, is_complete = core.tables, report.base == 0
    rows = rows_of_report(core, capture, report)
    reports, found = RowReports.of(report, rows), rows != NO_ROW
    if not found.all():
        reports = reports.take(found)
    if is_complete:
        _resolve_unheard_capture(core, capture, reports)
    if report.errors or not apply_steady_reports(tables, capture.index, reports):
        _apply_counted(core, capture, report, reports, rows, echo)
    apply_stats(core, capture, report.stats, rows)
    if is_complete:
        _restate(core, capture, tables.rows_with_role(capture.index), reports, echo, absent=True)
    elif restate:
        others = tables.unsteady_rows()
        others = others[roles_of(tables, others, capture.index) != Role.NONE]
        _restate(core, capture, others, reports, echo, absent=False)


def _apply_counted(core: Core, capture: Capture, report: SpanReports, reports: RowReports, rows: Rows, echo: int) -> None:
    """Apply the rules to the reports that count, and record the others."""
    tables = core.tables
    roles = roles_of(tables, reports.rows, capture.index)
    mask = counted(tables, reports.rows, roles, capture.index, echo)
    counting = set(reports.rows[mask & (roles != Role.NONE)].tolist()) if report.errors else ()
    if mask.all():
        apply_reports(core.replication, capture.index, reports)
    else:
        note_reports(tables, capture.index, reports.take(~mask), roles[~mask])
        apply_reports(core.replication, capture.index, reports.take(mask))
    for position, text in report.errors:
        # The error is reported with Stopping and with Stopped, until that is acknowledged: it is
        # one failure, and counts once.
        row = int(rows[position])
        if report.states[position] == STOPPED and row in counting and tables.state[row] != REMOVING:
            note_failure(core, row, capture.index, text)


def _restate(core: Core, capture: Capture, rows: Rows, reports: RowReports, echo: int, absent: bool) -> None:
    """Apply the rules to those of the rows that the reports leave out."""
    if len(rows):
        rows = rows[~np.isin(rows, reports.rows)]
    if not len(rows):
        return
    tables = core.tables
    roles = roles_of(tables, rows, capture.index)
    mask = counted(tables, rows, roles, capture.index, echo)
    if absent:
        # These are too old to count, but the capture will not report them again.
        set_field(tables, "reported", rows[~mask], roles[~mask], capture.index, ABSENT)
    rows, roles = rows[mask], roles[mask]
    states = ABSENT if absent else get_field(tables, "reported", rows, roles, capture.index)
    apply_reports(core.replication, capture.index, RowReports.without_progress(rows, states))


def _resolve_unheard_capture(core: Core, capture: Capture, reports: RowReports) -> None:
    """Replace "may hold any span" by roles in the spans that the first complete report lists."""
    may_hold_any_span = core.replication.may_hold_any_span
    if capture.index not in may_hold_any_span:
        return
    may_hold_any_span.discard(capture.index)
    held = reports.take(HELD[reports.states])
    new = roles_of(core.tables, held.rows, capture.index) == Role.NONE
    core.tables.add_undetermined(held.rows[new], capture.index, held.states[new])
    core.tables.refresh_steady(held.rows)


def rows_of_report(core: Core, capture: Capture, report: SpanReports) -> Rows:
    """Return the row of each reported span, NO_ROW where there is nothing to do; shape
    (len(report),). A span that is held and has no row gets one in Removing."""
    tables, numbers = core.tables, report.numbers
    rows = tables.rows_of_numbers(numbers)
    if not numbers.all():
        named = numbers == 0
        by_name = tables.rows_of_spans(report.spans)
        unknown = (by_name == NO_ROW) & HELD[report.states[named]]
        if unknown.any():
            spans = SpanBlock.of([report.spans[at] for at in np.flatnonzero(unknown).tolist()])
            by_name[unknown] = tables.add(spans, core.now_ms)
            tables.set_state(by_name[unknown], REMOVING, core.now_ms)  # so that the holder is not forgotten
        rows[named] = by_name
        capture.unnumbered.append(by_name[by_name != NO_ROW])
    missing = rows == NO_ROW
    if missing.any() and (missing & (numbers != 0) & HELD[report.states]).any():
        capture.must_report_names, capture.acked = True, 0
    return rows


def apply_stats(core: Core, capture: Capture, stats: SpanStats, rows: Rows) -> None:
    """Record the statistics of the spans that the capture writes; rates become weights."""
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
        tables.version += 1  # a steady report may bring it, and the published view has to show it
    tables.in_snapshot[at] = in_snapshot
    rows_per_s, bytes_per_s = stats.rows_per_s[mask], stats.bytes_per_s[mask]
    tables.statistics.set_rates(at, rows_per_s, bytes_per_s)
    rate = np.maximum(rows_per_s / config.rows_per_s_per_weight, bytes_per_s / config.bytes_per_s_per_weight)
    tables.statistics.set_weights(at, 1 + np.where(in_snapshot, 0.0, rate))
