"""The four bodies of an envelope as protobuf messages, and back. Used by codec.py.

Error texts begin with the path of the field in v1/schedule.proto. A `_check_` function checks a
value in both directions, after the lengths and types of its columns have been checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tablewire.errors import CodecError
from tablewire.model.columns import F64, U8, U32
from tablewire.model.ids import TS_MAX
from tablewire.model.messages import (
    DispatchTableRequest,
    DispatchTableResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    MessageBody,
    SpanReports,
    SpanStats,
)
from tablewire.model.progress import Barrier, TableBarrier
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction, LivenessState, TableState
from tablewire.v1 import schedule_pb2 as pb
from tablewire.wire.columns import check_array, pack, require_ascending, unpack
from tablewire.wire.limits import MAX_ERROR_CHARS, MAX_ROWS_PER_MESSAGE

_Columns: TypeAlias = Mapping[str, type[np.generic]]
_REPORT_COLUMNS: Final[_Columns] = {
    "numbers": np.uint32,
    "states": np.uint8,
    "last_synced_ts": np.uint64,
    "assignment_epochs": np.uint64,
}
_DISPATCH_COLUMNS: Final[_Columns] = {"numbers": np.uint32, "actions": np.uint8, "assignment_epochs": np.uint64}
_STATS_COLUMNS: Final[_Columns] = {"puller_resolved_ts": np.uint64, "in_snapshot": np.uint8}
_RATE: Final = np.dtype("<f8")


class RowBudget:
    """The rows that may still be decoded. They are counted before memory is allocated for them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def take(self, rows: int, path: str) -> int:
        """Count these rows and return their number; raise CodecError if they exceed the limit."""
        self._taken += rows
        if self._taken > self._limit:
            raise CodecError(f"{path}.rows: {self._taken} rows in all, at most {self._limit}")
        return rows


def rows_of(message: Message) -> int:
    """Return how many rows a message has for the limits of the wire."""
    match message.body:
        case Heartbeat(barrier=barrier, spans=spans):
            return len(barrier.table_barriers) + len(spans)
        case DispatchTableRequest(spans=spans):
            return len(spans)
        case HeartbeatResponse(reports=reports) | DispatchTableResponse(reports=reports):
            return len(reports) + len(reports.spans) + len(reports.stats.rows)


def write_body(envelope: pb.Envelope, message: Message) -> None:
    body = message.body
    if type(body) not in _KINDS:
        raise CodecError(f"body: {type(body).__name__} is no message")
    kind, write = _KINDS[type(body)]
    RowBudget(MAX_ROWS_PER_MESSAGE).take(rows_of(message), kind)
    target = getattr(envelope, kind)
    target.SetInParent()
    write(target, body, kind)


def read_body(envelope: pb.Envelope, rows: RowBudget) -> MessageBody:
    kind = envelope.WhichOneof("body")
    if kind is None:
        raise CodecError("body: missing, or of an unknown kind")
    return _READERS[kind](getattr(envelope, kind), kind, rows)


def fits(value: int, bits: int, path: str) -> int:
    """Return the value as an int; raise CodecError unless it is unsigned and has at most `bits`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise CodecError(f"{path}: {value!r} is not an integer") from None
    if not 0 <= number < 1 << bits:
        raise CodecError(f"{path}: {number} does not fit {bits} bits")
    return number


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def _write_heartbeat(target: pb.Heartbeat, body: Heartbeat, path: str) -> None:
    barriers = body.barrier.table_barriers
    target.barrier.global_barrier_ts = fits(body.barrier.global_barrier_ts, 64, f"{path}.barrier.global_barrier_ts")
    target.barrier.rows = len(barriers)
    try:
        table_ids = np.fromiter((one.table_id for one in barriers), np.int64, len(barriers))
        barrier_ts = np.fromiter((one.barrier_ts for one in barriers), np.uint64, len(barriers))
    except (OverflowError, TypeError, ValueError) as error:
        raise CodecError(f"{path}.barrier.table_barriers: {error}") from None
    pack(target.barrier.table_ids, table_ids, f"{path}.barrier.table_ids", np.int64, len(barriers))
    pack(target.barrier.barrier_ts, barrier_ts, f"{path}.barrier.barrier_ts", np.uint64, len(barriers))
    target.acked = fits(body.acked, 64, f"{path}.acked")
    target.collect_stats = bool(body.collect_stats)
    target.by_name = bool(body.by_name)
    _write_spans(target.spans, body.spans, f"{path}.spans")
    pack(target.numbers, body.numbers, f"{path}.numbers", np.uint32, len(body.spans))
    _require_no_zero(body.numbers, f"{path}.numbers")


def _read_heartbeat(source: pb.Heartbeat, path: str, rows: RowBudget) -> Heartbeat:
    count = rows.take(source.barrier.rows, f"{path}.barrier")
    table_ids = unpack(source.barrier.table_ids, f"{path}.barrier.table_ids", np.int64, count).tolist()
    barrier_ts = unpack(source.barrier.barrier_ts, f"{path}.barrier.barrier_ts", np.uint64, count).tolist()
    barrier = Barrier(source.barrier.global_barrier_ts, tuple(map(TableBarrier, table_ids, barrier_ts)))
    spans = _read_spans(source.spans, f"{path}.spans", rows)
    numbers = unpack(source.numbers, f"{path}.numbers", np.uint32, len(spans))
    _require_no_zero(numbers, f"{path}.numbers")
    return Heartbeat(barrier, source.acked, source.collect_stats, source.by_name, numbers, spans)


def _write_dispatch(target: pb.DispatchTableRequest, body: DispatchTableRequest, path: str) -> None:
    rows = len(body.spans)
    _write_spans(target.spans, body.spans, f"{path}.spans")
    _write_columns(target, body, _DISPATCH_COLUMNS, path, rows)
    _write_checkpoints(target, body, path, rows)
    _check_dispatch(body, path)
    target.acked = fits(body.acked, 64, f"{path}.acked")
    if len(body.jobs):
        target.jobs.SetInParent()
        pack(target.jobs, body.jobs, f"{path}.jobs", np.uint64, rows)


def _read_dispatch(source: pb.DispatchTableRequest, path: str, rows: RowBudget) -> DispatchTableRequest:
    spans = _read_spans(source.spans, f"{path}.spans", rows)
    body = DispatchTableRequest(
        spans=spans,
        **_read_columns(source, _DISPATCH_COLUMNS, path, len(spans)),
        **_read_checkpoints(source, path, len(spans)),
        acked=source.acked,
        jobs=unpack(source.jobs, f"{path}.jobs", np.uint64, len(spans) if source.HasField("jobs") else 0),
    )
    _check_dispatch(body, path)
    return body


def _check_dispatch(body: DispatchTableRequest, path: str) -> None:
    _require_codes(body.actions, len(DispatchAction), f"{path}.actions")
    _require_no_zero(body.numbers, f"{path}.numbers")
    # Without its fencing token a permission to write could leave two writers.
    unfenced = (body.actions == DispatchAction.ADD_WRITE) & (body.assignment_epochs == 0)
    _refuse(unfenced, f"{path}.assignment_epochs", lambda _row: "0 for a permission to write")


def _write_heartbeat_response(target: pb.HeartbeatResponse, body: HeartbeatResponse, path: str) -> None:
    target.liveness = body.liveness.code
    target.fenced = bool(body.fenced)
    target.held = fits(body.held, 64, f"{path}.held")
    target.checksum = fits(body.checksum, 64, f"{path}.checksum")
    _write_reports(target, body, path)


def _read_heartbeat_response(source: pb.HeartbeatResponse, path: str, rows: RowBudget) -> HeartbeatResponse:
    try:
        liveness = LivenessState.from_code(source.liveness)
    except ValueError:
        raise CodecError(f"{path}.liveness: no code {source.liveness}") from None
    reports = _read_reports(source.reports, f"{path}.reports", rows)
    return HeartbeatResponse(liveness, source.fenced, source.held, source.checksum, reports)


def _read_dispatch_response(source: pb.DispatchTableResponse, path: str, rows: RowBudget) -> DispatchTableResponse:
    return DispatchTableResponse(_read_reports(source.reports, f"{path}.reports", rows))


def _write_reports(
    response: pb.HeartbeatResponse | pb.DispatchTableResponse, body: HeartbeatResponse | DispatchTableResponse, path: str
) -> None:
    target, reports, path, rows = response.reports, body.reports, f"{path}.reports", len(body.reports)
    target.rows = rows
    target.base = fits(reports.base, 64, f"{path}.base")
    target.more = bool(reports.more)
    _write_spans(target.spans, reports.spans, f"{path}.spans")
    _write_columns(target, reports, _REPORT_COLUMNS, path, rows)
    _write_checkpoints(target, reports, path, rows)
    for row, text in reports.errors:
        # The text is an executor's own: it is cut, and what UTF-8 cannot express is replaced.
        sent = text[:MAX_ERROR_CHARS].encode("utf-8", "replace").decode("utf-8")
        target.errors.add(row=fits(row, 32, f"{path}.errors.row"), text=sent)
    _check_reports(reports, path)
    _write_stats(target.stats, reports.stats, f"{path}.stats")
    _check_stats(reports.stats, rows, f"{path}.stats")


def _read_reports(source: pb.Reports, path: str, rows: RowBudget) -> SpanReports:
    count = rows.take(source.rows, path)
    errors = tuple((error.row, error.text) for error in source.errors)
    for row, text in errors:
        if len(text) > MAX_ERROR_CHARS:
            raise CodecError(f"{path}.errors.text: {len(text)} characters, at most {MAX_ERROR_CHARS} (row {row})")
    reports = SpanReports(
        base=source.base,
        spans=_read_spans(source.spans, f"{path}.spans", rows),
        **_read_columns(source, _REPORT_COLUMNS, path, count),
        **_read_checkpoints(source, path, count),
        errors=errors,
        stats=_read_stats(source.stats, f"{path}.stats", rows),
        more=source.more,
    )
    _check_reports(reports, path)
    _check_stats(reports.stats, count, f"{path}.stats")
    return reports


def _check_reports(reports: SpanReports, path: str) -> None:
    unnumbered = len(reports) - int(np.count_nonzero(reports.numbers))
    if unnumbered != len(reports.spans):
        raise CodecError(f"{path}.spans: {len(reports.spans)} names for {unnumbered} spans without a number")
    _require_codes(reports.states, len(TableState), f"{path}.states")
    require_ascending(np.array([row for row, _ in reports.errors], np.int64), len(reports), f"{path}.errors.row")


def _write_stats(target: pb.SpanStats, stats: SpanStats, path: str) -> None:
    target.rows = rows = len(stats.rows)
    pack(target.positions, stats.rows, f"{path}.positions", np.uint32, rows)
    _write_columns(target, stats, _STATS_COLUMNS, path, rows)
    target.rows_per_s = _write_rates(stats.rows_per_s, f"{path}.rows_per_s", rows)
    target.bytes_per_s = _write_rates(stats.bytes_per_s, f"{path}.bytes_per_s", rows)


def _read_stats(source: pb.SpanStats, path: str, rows: RowBudget) -> SpanStats:
    count = rows.take(source.rows, path)
    return SpanStats(
        rows=unpack(source.positions, f"{path}.positions", np.uint32, count),
        rows_per_s=_read_rates(source.rows_per_s, f"{path}.rows_per_s", count),
        bytes_per_s=_read_rates(source.bytes_per_s, f"{path}.bytes_per_s", count),
        **_read_columns(source, _STATS_COLUMNS, path, count),
    )


def _check_stats(stats: SpanStats, report_rows: int, path: str) -> None:
    require_ascending(stats.rows, report_rows, f"{path}.positions")
    _require_codes(stats.in_snapshot, 2, f"{path}.in_snapshot")


# ---------------------------------------------------------------------------------------------------------------------
# Parts of messages


def _write_columns(target: Any, value: Any, columns: _Columns, path: str, rows: int) -> None:
    for name, dtype in columns.items():
        pack(getattr(target, name), getattr(value, name), f"{path}.{name}", dtype, rows)


def _read_columns(source: Any, columns: _Columns, path: str, rows: int) -> dict[str, Any]:
    return {name: unpack(getattr(source, name), f"{path}.{name}", dtype, rows) for name, dtype in columns.items()}


def _write_checkpoints(target: Any, value: DispatchTableRequest | SpanReports, path: str, rows: int) -> None:
    check_array(value.resolved_ts, f"{path}.resolved_ts", np.uint64, rows)
    pack(target.checkpoint_ts, value.checkpoint_ts, f"{path}.checkpoint_ts", np.uint64, rows)
    _refuse(value.resolved_ts < value.checkpoint_ts, f"{path}.resolved_ts", lambda _row: "below checkpoint_ts")
    lead = value.resolved_ts - value.checkpoint_ts
    pack(target.resolved_lead, lead, f"{path}.resolved_lead", np.uint64, rows)


def _read_checkpoints(source: Any, path: str, rows: int) -> dict[str, Any]:
    checkpoint_ts = unpack(source.checkpoint_ts, f"{path}.checkpoint_ts", np.uint64, rows)
    lead = unpack(source.resolved_lead, f"{path}.resolved_lead", np.uint64, rows)
    exceeds = lead > np.uint64(TS_MAX) - checkpoint_ts
    _refuse(exceeds, f"{path}.resolved_lead", lambda _row: "checkpoint_ts + resolved_lead exceeds 64 bits")
    resolved_ts = checkpoint_ts + lead
    resolved_ts.flags.writeable = False
    return {"checkpoint_ts": checkpoint_ts, "resolved_ts": resolved_ts}


def _write_rates(rates: F64, path: str, rows: int) -> bytes:
    """Encode rates; an invalid one (a plug-in's division by zero) becomes 0."""
    check_array(rates, path, np.float64, rows)
    return np.where(_is_rate(rates), rates, 0.0).astype(_RATE).tobytes()


def _read_rates(data: bytes, path: str, rows: int) -> F64:
    if len(data) != rows * _RATE.itemsize:
        raise CodecError(f"{path}: {len(data)} bytes, wanted {rows} x {_RATE.itemsize}")
    rates = np.frombuffer(data, _RATE)
    _refuse(~_is_rate(rates), path, lambda row: f"{rates[row]} is no rate")
    return rates


def _is_rate(rates: F64) -> npt.NDArray[np.bool_]:
    return np.isfinite(rates) & (rates >= 0)


def _write_spans(target: pb.Spans, spans: SpanBlock, path: str) -> None:
    target.rows = len(spans)
    pack(target.table_ids, spans.table_ids, f"{path}.table_ids", np.int64, len(spans))
    _check_keys(spans, path)
    try:
        target.start_keys.extend(spans.start_keys)
        target.end_keys.extend(spans.end_keys)
    except TypeError as error:
        raise CodecError(f"{path}: {error}") from None


def _read_spans(source: pb.Spans, path: str, rows: RowBudget) -> SpanBlock:
    table_ids = unpack(source.table_ids, f"{path}.table_ids", np.int64, rows.take(source.rows, path))
    spans = SpanBlock(table_ids, tuple(source.start_keys), tuple(source.end_keys))
    _check_keys(spans, path)
    return spans


def _check_keys(spans: SpanBlock, path: str) -> None:
    for field, keys in (("start_keys", spans.start_keys), ("end_keys", spans.end_keys)):
        if len(keys) not in (0, len(spans)):
            raise CodecError(f"{path}.{field}: {len(keys)} keys for {len(spans)} spans")
    if len(spans.start_keys) != len(spans.end_keys):
        raise CodecError(f"{path}.end_keys: {len(spans.end_keys)} beside {len(spans.start_keys)} start_keys")
    for row, (start, end) in enumerate(zip(spans.start_keys, spans.end_keys, strict=True)):
        if end and end <= start:
            raise CodecError(f"{path}.end_keys: not behind its start_key (row {row})")


def _require_codes(codes: U8, members: int, path: str) -> None:
    _refuse(codes >= members, path, lambda row: f"no code {codes[row]}")


def _require_no_zero(numbers: U32, path: str) -> None:
    _refuse(numbers == 0, path, lambda _row: "0 is no number")


def _refuse(is_wrong: npt.NDArray[np.bool_], path: str, reason: Callable[[int], str]) -> None:
    """Raise CodecError for the first wrong row, if there is one."""
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        raise CodecError(f"{path}: {reason(row)} (row {row})")


_KINDS: Final[dict[type, tuple[str, Callable[[Any, Any, str], None]]]] = {
    Heartbeat: ("heartbeat", _write_heartbeat),
    HeartbeatResponse: ("heartbeat_response", _write_heartbeat_response),
    DispatchTableRequest: ("dispatch_table_request", _write_dispatch),
    DispatchTableResponse: ("dispatch_table_response", _write_reports),
}
_READERS: Final[dict[str, Callable[[Any, str, RowBudget], MessageBody]]] = {
    "heartbeat": _read_heartbeat,
    "heartbeat_response": _read_heartbeat_response,
    "dispatch_table_request": _read_dispatch,
    "dispatch_table_response": _read_dispatch_response,
}
