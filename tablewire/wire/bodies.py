"""The four bodies of an envelope, between the values of types.py and their pb messages. Used by codec.py alone.

Names in errors are the paths of v1/schedule.proto. Every reader checks before it builds; nothing here keeps state but `Rows`,
the budget of rows that one decoding may unfold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from tablewire.errors import CodecError
from tablewire.model.columns import F64, U8, U32, U64
from tablewire.model.ids import TS_MAX
from tablewire.model.messages import (
    DispatchTableRequest,
    DispatchTableResponse,
    Heartbeat,
    HeartbeatResponse,
    MessageBody,
    SpanReports,
    SpanStats,
)
from tablewire.model.progress import Barrier, TableBarrier
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction, LivenessState, TableState
from tablewire.v1 import schedule_pb2 as pb
from tablewire.wire.columns import check_array, pack, pack_signed, require_ascending, unpack, unpack_signed

MAX_ERROR_CHARS: Final = 4_096
"""Of one span's error text; the sender cuts what is longer."""

_RATE: Final = np.dtype("<f8")


class Rows:
    """How many rows may still be unfolded; what is refused has not been allocated."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0

    def take(self, rows: int, name: str) -> int:
        self.taken += rows
        if self.taken > self._limit:
            raise CodecError(f"{name}.rows: {self.taken} rows in all, at most {self._limit}")
        return rows

    def count(self, body: MessageBody) -> None:
        """Takes what a reader of this body will take."""
        match body:
            case Heartbeat():
                self.take(len(body.barrier.table_barriers), "barrier")
                self.take(len(body.spans), "spans")
            case DispatchTableRequest():
                self.take(len(body.spans), "spans")
            case HeartbeatResponse() | DispatchTableResponse():
                self.take(len(body.reports), "reports")
                self.take(len(body.reports.spans), "spans")
                self.take(len(body.reports.stats.rows), "stats")


def write_body(envelope: pb.Envelope, body: MessageBody, rows: Rows) -> None:
    rows.count(body)
    kind = _KINDS.get(type(body))
    if kind is None:
        raise CodecError(f"body: {type(body).__name__} is no message")
    getattr(envelope, kind).SetInParent()
    match body:
        case Heartbeat():
            _write_heartbeat(envelope.heartbeat, body)
        case HeartbeatResponse():
            _write_heartbeat_response(envelope.heartbeat_response, body)
        case DispatchTableRequest():
            _write_dispatch(envelope.dispatch_table_request, body)
        case DispatchTableResponse():
            _write_reports(envelope.dispatch_table_response.reports, body.reports, "dispatch_table_response.reports")


def read_body(envelope: pb.Envelope, rows: Rows) -> MessageBody:
    kind = envelope.WhichOneof("body")
    reader = _READERS.get(kind or "")
    if kind is None or reader is None:
        raise CodecError("body: missing, or of a kind that is not known here")
    return reader(getattr(envelope, kind), kind, rows)


def fits(value: int, bits: int, name: str) -> int:
    """The value as an int of so many unsigned bits, else CodecError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise CodecError(f"{name}: {value!r} is not an integer") from None
    if not 0 <= number < 1 << bits:
        raise CodecError(f"{name}: {number} does not fit {bits} bits")
    return number


# ---------------------------------------------------------------------------------------------------------------------
# Heartbeat


def _write_heartbeat(target: pb.Heartbeat, body: Heartbeat) -> None:
    name = "heartbeat"
    barriers = body.barrier.table_barriers
    target.barrier.global_barrier_ts = fits(body.barrier.global_barrier_ts, 64, f"{name}.barrier.global_barrier_ts")
    target.barrier.rows = len(barriers)
    try:
        table_ids = np.fromiter((one.table_id for one in barriers), np.int64, len(barriers))
        barrier_ts = np.fromiter((one.barrier_ts for one in barriers), np.uint64, len(barriers))
    except (OverflowError, TypeError, ValueError) as error:
        raise CodecError(f"{name}.barrier.table_barriers: {error}") from None
    pack_signed(target.barrier.table_ids, table_ids, f"{name}.barrier.table_ids", len(barriers))
    pack(target.barrier.barrier_ts, barrier_ts, f"{name}.barrier.barrier_ts", np.uint64, len(barriers))
    target.acked = fits(body.acked, 64, f"{name}.acked")
    target.collect_stats = bool(body.collect_stats)
    target.by_name = bool(body.by_name)
    _write_spans(target.spans, body.spans, f"{name}.spans")
    pack(target.numbers, body.numbers, f"{name}.numbers", np.uint32, len(body.spans))
    _require_no_zero(body.numbers, f"{name}.numbers")


def _read_heartbeat(source: pb.Heartbeat, name: str, rows: Rows) -> Heartbeat:
    count = rows.take(source.barrier.rows, f"{name}.barrier")
    table_ids = unpack_signed(source.barrier.table_ids, f"{name}.barrier.table_ids", count)
    barrier_ts = unpack(source.barrier.barrier_ts, f"{name}.barrier.barrier_ts", np.uint64, count)
    spans = _read_spans(source.spans, f"{name}.spans", rows)
    numbers = unpack(source.numbers, f"{name}.numbers", np.uint32, len(spans))
    _require_no_zero(numbers, f"{name}.numbers")
    return Heartbeat(
        barrier=Barrier(
            source.barrier.global_barrier_ts,
            tuple(map(TableBarrier, table_ids.tolist(), barrier_ts.tolist())),
        ),
        acked=source.acked,
        collect_stats=source.collect_stats,
        by_name=source.by_name,
        numbers=numbers,
        spans=spans,
    )


# ---------------------------------------------------------------------------------------------------------------------
# DispatchTableRequest


def _write_dispatch(target: pb.DispatchTableRequest, body: DispatchTableRequest) -> None:
    name = "dispatch_table_request"
    rows = len(body.spans)
    _write_spans(target.spans, body.spans, f"{name}.spans")
    pack(target.numbers, body.numbers, f"{name}.numbers", np.uint32, rows)
    pack(target.actions, body.actions, f"{name}.actions", np.uint8, rows)
    pack(target.assignment_epochs, body.assignment_epochs, f"{name}.assignment_epochs", np.uint64, rows)
    _write_checkpoints(target, body.checkpoint_ts, body.resolved_ts, name, rows)
    _require_actions(body.actions, body.assignment_epochs, name)
    _require_no_zero(body.numbers, f"{name}.numbers")
    target.acked = fits(body.acked, 64, f"{name}.acked")
    if len(body.jobs):
        target.jobs.SetInParent()
        pack(target.jobs, body.jobs, f"{name}.jobs", np.uint64, rows)


def _read_dispatch(source: pb.DispatchTableRequest, name: str, rows: Rows) -> DispatchTableRequest:
    spans = _read_spans(source.spans, f"{name}.spans", rows)
    count = len(spans)
    numbers = unpack(source.numbers, f"{name}.numbers", np.uint32, count)
    actions = unpack(source.actions, f"{name}.actions", np.uint8, count)
    assignment_epochs = unpack(source.assignment_epochs, f"{name}.assignment_epochs", np.uint64, count)
    checkpoint_ts, resolved_ts = _read_checkpoints(source, name, count)
    _require_actions(actions, assignment_epochs, name)
    _require_no_zero(numbers, f"{name}.numbers")
    jobs = unpack(source.jobs, f"{name}.jobs", np.uint64, count if source.HasField("jobs") else 0)
    return DispatchTableRequest(numbers, spans, actions, checkpoint_ts, resolved_ts, assignment_epochs, source.acked, jobs)


def _require_actions(actions: U8, assignment_epochs: U64, name: str) -> None:
    _require_codes(actions, len(DispatchAction), f"{name}.actions")
    # A permission to write without its fencing token would leave two writers to chance.
    unfenced = (actions == DispatchAction.ADD_WRITE) & (assignment_epochs == 0)
    if unfenced.any():
        raise CodecError(f"{name}.assignment_epochs: 0 for a permission to write (row {_first(unfenced)})")


# ---------------------------------------------------------------------------------------------------------------------
# HeartbeatResponse, DispatchTableResponse


def _write_heartbeat_response(target: pb.HeartbeatResponse, body: HeartbeatResponse) -> None:
    name = "heartbeat_response"
    target.liveness = body.liveness.code
    target.fenced = bool(body.fenced)
    target.held = fits(body.held, 64, f"{name}.held")
    target.checksum = fits(body.checksum, 64, f"{name}.checksum")
    _write_reports(target.reports, body.reports, f"{name}.reports")


def _read_heartbeat_response(source: pb.HeartbeatResponse, name: str, rows: Rows) -> HeartbeatResponse:
    members = tuple(LivenessState)
    if source.liveness >= len(members):
        raise CodecError(f"{name}.liveness: no code {source.liveness}")
    return HeartbeatResponse(
        liveness=members[source.liveness],
        fenced=source.fenced,
        held=source.held,
        checksum=source.checksum,
        reports=_read_reports(source.reports, f"{name}.reports", rows),
    )


def _read_dispatch_response(source: pb.DispatchTableResponse, name: str, rows: Rows) -> DispatchTableResponse:
    return DispatchTableResponse(_read_reports(source.reports, f"{name}.reports", rows))


def _write_reports(target: pb.Reports, reports: SpanReports, name: str) -> None:
    rows = len(reports)
    target.rows = rows
    target.base = fits(reports.base, 64, f"{name}.base")
    target.more = bool(reports.more)
    pack(target.numbers, reports.numbers, f"{name}.numbers", np.uint32, rows)
    _write_spans(target.spans, reports.spans, f"{name}.spans")
    _require_named(reports.numbers, reports.spans, name)
    pack(target.states, reports.states, f"{name}.states", np.uint8, rows)
    _require_codes(reports.states, len(TableState), f"{name}.states")
    _write_checkpoints(target, reports.checkpoint_ts, reports.resolved_ts, name, rows)
    pack(target.last_synced_ts, reports.last_synced_ts, f"{name}.last_synced_ts", np.uint64, rows)
    pack(target.assignment_epochs, reports.assignment_epochs, f"{name}.assignment_epochs", np.uint64, rows)
    for row, text in reports.errors:
        target.errors.add(row=fits(row, 32, f"{name}.errors.row"), text=_sendable(text))
    _require_rows([error.row for error in target.errors], rows, f"{name}.errors.row")
    _write_stats(target.stats, reports.stats, f"{name}.stats", rows)


def _read_reports(source: pb.Reports, name: str, rows: Rows) -> SpanReports:
    count = rows.take(source.rows, name)
    numbers = unpack(source.numbers, f"{name}.numbers", np.uint32, count)
    spans = _read_spans(source.spans, f"{name}.spans", rows)
    _require_named(numbers, spans, name)
    states = unpack(source.states, f"{name}.states", np.uint8, count)
    _require_codes(states, len(TableState), f"{name}.states")
    checkpoint_ts, resolved_ts = _read_checkpoints(source, name, count)
    errors = tuple((error.row, error.text) for error in source.errors)
    _require_rows([row for row, _ in errors], count, f"{name}.errors.row")
    for row, text in errors:
        if len(text) > MAX_ERROR_CHARS:
            raise CodecError(f"{name}.errors.text: {len(text)} characters, at most {MAX_ERROR_CHARS} (row {row})")
    return SpanReports(
        base=source.base,
        numbers=numbers,
        spans=spans,
        states=states,
        checkpoint_ts=checkpoint_ts,
        resolved_ts=resolved_ts,
        last_synced_ts=unpack(source.last_synced_ts, f"{name}.last_synced_ts", np.uint64, count),
        assignment_epochs=unpack(source.assignment_epochs, f"{name}.assignment_epochs", np.uint64, count),
        errors=errors,
        stats=_read_stats(source.stats, f"{name}.stats", count, rows),
        more=source.more,
    )


def _write_stats(target: pb.SpanStats, stats: SpanStats, name: str, report_rows: int) -> None:
    rows = len(stats.rows)
    target.rows = rows
    pack(target.positions, stats.rows, f"{name}.positions", np.uint32, rows)
    require_ascending(stats.rows, report_rows, f"{name}.positions")
    target.rows_per_s = _rates_sent(stats.rows_per_s, f"{name}.rows_per_s", rows)
    target.bytes_per_s = _rates_sent(stats.bytes_per_s, f"{name}.bytes_per_s", rows)
    pack(target.puller_resolved_ts, stats.puller_resolved_ts, f"{name}.puller_resolved_ts", np.uint64, rows)
    pack(target.in_snapshot, stats.in_snapshot, f"{name}.in_snapshot", np.uint8, rows)
    _require_codes(stats.in_snapshot, 2, f"{name}.in_snapshot")


def _read_stats(source: pb.SpanStats, name: str, report_rows: int, rows: Rows) -> SpanStats:
    count = rows.take(source.rows, name)
    positions = unpack(source.positions, f"{name}.positions", np.uint32, count)
    require_ascending(positions, report_rows, f"{name}.positions")
    in_snapshot = unpack(source.in_snapshot, f"{name}.in_snapshot", np.uint8, count)
    _require_codes(in_snapshot, 2, f"{name}.in_snapshot")
    return SpanStats(
        rows=positions,
        rows_per_s=_rates_read(source.rows_per_s, f"{name}.rows_per_s", count),
        bytes_per_s=_rates_read(source.bytes_per_s, f"{name}.bytes_per_s", count),
        puller_resolved_ts=unpack(source.puller_resolved_ts, f"{name}.puller_resolved_ts", np.uint64, count),
        in_snapshot=in_snapshot,
    )


def _rates_sent(rates: F64, name: str, rows: int) -> bytes:
    """A rate that is no number (a plug-in's division by zero) is sent as 0: it must not cost the whole report."""
    check_array(rates, name, np.float64, rows)
    sane = np.isfinite(rates) & (rates >= 0)
    return np.where(sane, rates, 0.0).astype(_RATE).tobytes()


def _rates_read(data: bytes, name: str, rows: int) -> F64:
    if len(data) != rows * _RATE.itemsize:
        raise CodecError(f"{name}: {len(data)} bytes, wanted {rows} x {_RATE.itemsize}")
    rates = np.frombuffer(data, _RATE)
    insane = ~(np.isfinite(rates) & (rates >= 0))
    if insane.any():
        raise CodecError(f"{name}: {rates[_first(insane)]} is no rate (row {_first(insane)})")
    return rates


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _write_spans(target: pb.Spans, spans: SpanBlock, name: str) -> None:
    rows = len(spans)
    target.rows = rows
    pack_signed(target.table_ids, spans.table_ids, f"{name}.table_ids", rows)
    _require_keys(spans.start_keys, spans.end_keys, rows, name)
    try:
        target.start_keys.extend(spans.start_keys)
        target.end_keys.extend(spans.end_keys)
    except TypeError as error:
        raise CodecError(f"{name}: {error}") from None


def _read_spans(source: pb.Spans, name: str, rows: Rows) -> SpanBlock:
    count = rows.take(source.rows, name)
    start_keys, end_keys = tuple(source.start_keys), tuple(source.end_keys)
    _require_keys(start_keys, end_keys, count, name)
    return SpanBlock(unpack_signed(source.table_ids, f"{name}.table_ids", count), start_keys, end_keys)


def _require_keys(start_keys: Sequence[bytes], end_keys: Sequence[bytes], rows: int, name: str) -> None:
    for field, keys in (("start_keys", start_keys), ("end_keys", end_keys)):
        if len(keys) not in (0, rows):
            raise CodecError(f"{name}.{field}: {len(keys)} keys for {rows} spans")
    if len(start_keys) != len(end_keys):
        raise CodecError(f"{name}.end_keys: {len(end_keys)} beside {len(start_keys)} start_keys")
    for row, (start, end) in enumerate(zip(start_keys, end_keys, strict=True)):
        if end and end <= start:
            raise CodecError(f"{name}.end_keys: not behind its start_key (row {row})")


def _write_checkpoints(target: Any, checkpoint_ts: U64, resolved_ts: U64, name: str, rows: int) -> None:
    check_array(resolved_ts, f"{name}.resolved_ts", np.uint64, rows)
    pack(target.checkpoint_ts, checkpoint_ts, f"{name}.checkpoint_ts", np.uint64, rows)
    below = resolved_ts < checkpoint_ts
    if below.any():
        raise CodecError(f"{name}.resolved_ts: below checkpoint_ts (row {_first(below)})")
    pack(target.resolved_lead, resolved_ts - checkpoint_ts, f"{name}.resolved_lead", np.uint64, rows)


def _read_checkpoints(source: Any, name: str, rows: int) -> tuple[U64, U64]:
    checkpoint_ts = unpack(source.checkpoint_ts, f"{name}.checkpoint_ts", np.uint64, rows)
    resolved_lead = unpack(source.resolved_lead, f"{name}.resolved_lead", np.uint64, rows)
    beyond = resolved_lead > np.uint64(TS_MAX) - checkpoint_ts
    if beyond.any():
        raise CodecError(f"{name}.resolved_lead: checkpoint_ts + resolved_lead exceeds 64 bits (row {_first(beyond)})")
    resolved_ts = checkpoint_ts + resolved_lead
    resolved_ts.flags.writeable = False
    return checkpoint_ts, resolved_ts


def _require_codes(codes: U8, members: int, name: str) -> None:
    if len(codes) and int(codes.max()) >= members:
        unknown = codes >= members
        raise CodecError(f"{name}: no code {int(codes.max())} (row {_first(unknown)})")


def _require_no_zero(numbers: U32, name: str) -> None:
    if len(numbers) and int(numbers.min()) == 0:
        raise CodecError(f"{name}: 0 is no number (row {_first(numbers == 0)})")


def _require_named(numbers: U32, spans: SpanBlock, name: str) -> None:
    unnumbered = len(numbers) - int(np.count_nonzero(numbers))
    if unnumbered != len(spans):
        raise CodecError(f"{name}.spans: {len(spans)} names for {unnumbered} spans without a number")


def _require_rows(rows: list[int], limit: int, name: str) -> None:
    require_ascending(np.asarray(rows, np.int64), limit, name)


def _sendable(text: str) -> str:
    """An executor's own text: cut, and without what UTF-8 cannot carry."""
    return text[:MAX_ERROR_CHARS].encode("utf-8", "replace").decode("utf-8")


def _first(mask: Any) -> int:
    return int(np.argmax(mask))


_KINDS: Final[dict[type, str]] = {
    Heartbeat: "heartbeat",
    HeartbeatResponse: "heartbeat_response",
    DispatchTableRequest: "dispatch_table_request",
    DispatchTableResponse: "dispatch_table_response",
}
_READERS: Final[dict[str, Callable[[Any, str, Rows], MessageBody]]] = {
    "heartbeat": _read_heartbeat,
    "heartbeat_response": _read_heartbeat_response,
    "dispatch_table_request": _read_dispatch,
    "dispatch_table_response": _read_dispatch_response,
}
