"""Reading a scheduler's snapshot: rows for people, and counts. Pure; any thread.

A snapshot may hold a million spans, so selections and counts are masks over its columns, and a SpanView is made only of what is
shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from owner.scheduling.snapshot import Snapshot, span_view, stall_reason
from tablewire.model.columns import I64
from tablewire.model.ids import TS_MAX, CaptureID, TableID
from tablewire.model.progress import SpanView
from tablewire.model.states import StallReason
from tablewire.v1 import admin_pb2 as pb

ROW_ERROR_LENGTH_MAX = 1_000
WAITING = "waiting"
"""Counts what a drain still waits for without a stall reason."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over all spans. stalls: those that are not steady, by reason. slowest: the one that holds the checkpoint.
    *_per_s: over all; None while no executor gave statistics."""

    spans: int = 0
    by_state: Mapping[str, int] = field(default_factory=dict)
    stalls: Mapping[str, int] = field(default_factory=dict)
    slowest: SpanView | None = None
    rows_per_s: float | None = None
    bytes_per_s: float | None = None


def summarize(snapshot: Snapshot | None) -> Summary:
    if snapshot is None:
        return Summary()
    count = len(snapshot.roles.rows)
    states = {state.value: spans for state, spans in snapshot.states().items() if spans}
    if not snapshot.initialized:
        stalls: Mapping[str, int] = {StallReason.BOOTSTRAP.value: count} if count else {}
    else:
        stalls = _reasons(snapshot, _may_stall(snapshot))
        stalls = {reason: spans for reason, spans in stalls.items() if reason != WAITING}
    totals = None if snapshot.rates is None else snapshot.rates.sum(axis=1, dtype=np.float64).tolist()
    return Summary(count, states, stalls, _slowest(snapshot), *(totals or (None, None)))


def select(
    snapshot: Snapshot, *, capture: CaptureID = "", stalled: bool = False, table_id: TableID | None = None
) -> Iterator[SpanView]:
    """The spans that all given conditions hold for, by table and start key; each is made when it is asked for."""
    for _, view in select_positions(snapshot, capture=capture, stalled=stalled, table_id=table_id):
        yield view


def select_positions(
    snapshot: Snapshot, *, capture: CaptureID = "", stalled: bool = False, table_id: TableID | None = None
) -> Iterator[tuple[int, SpanView]]:
    """The same, with their positions in the snapshot."""
    positions = _may_stall(snapshot) if stalled else np.arange(len(snapshot.roles.rows))
    if table_id is not None:
        positions = positions[snapshot.roles.spans.table_ids[positions] == table_id]
    if capture:
        positions = positions[np.isin(positions, _touching(snapshot, capture))]
    for position in positions.tolist():
        view = span_view(snapshot, position)
        if not stalled or view.stall_reason is not None:
            yield position, view


def rates(snapshot: Snapshot, position: int) -> tuple[float, float] | None:
    """rows/s and bytes/s of one span; None while no executor gave statistics."""
    if snapshot.rates is None:
        return None
    return float(snapshot.rates[0, position]), float(snapshot.rates[1, position])


def reasons_at(snapshot: Snapshot, capture: CaptureID) -> Mapping[str, int]:
    """Why spans are still at a capture: counts by stall reason, WAITING where there is none."""
    return _reasons(snapshot, _touching(snapshot, capture))


def table_row(view: SpanView, names: Mapping[TableID, str], rates: tuple[float, float] | None = None) -> pb.TableRow:
    return pb.TableRow(
        table_id=view.span.table_id,
        table=names.get(view.span.table_id, ""),
        start_key=view.span.start_key,
        end_key=view.span.end_key,
        state=view.state.value,
        primary=view.primary or "",
        secondary=view.secondary or "",
        checkpoint_ts=view.checkpoint.checkpoint_ts,
        resolved_ts=view.checkpoint.resolved_ts,
        state_age_ms=max(0, view.state_age_ms),
        stall_reason="" if view.stall_reason is None else view.stall_reason.value,
        error=view.error[:ROW_ERROR_LENGTH_MAX],
        rows_per_s=None if rates is None else rates[0],
        bytes_per_s=None if rates is None else rates[1],
    )


def _touching(snapshot: Snapshot, capture: CaptureID) -> I64:
    """Positions."""
    index = next((index for index, name in snapshot.capture_ids.items() if name == capture), None)
    if index is None:
        return np.empty(0, np.int64)
    return np.flatnonzero((snapshot.roles.primary == index) | (snapshot.roles.secondary == index))


def _may_stall(snapshot: Snapshot) -> I64:
    """Positions of all spans that can have a stall reason: a superset, so that few need to be looked at singly."""
    roles, progress = snapshot.roles, snapshot.progress
    if not snapshot.initialized:
        return np.arange(len(roles.rows))
    mask = ~roles.steady | roles.in_snapshot
    if snapshot.silent:
        mask |= np.isin(roles.primary, np.fromiter(snapshot.silent, np.int64))
    barrier_ts = snapshot.barrier.barrier.global_barrier_ts
    if snapshot.table_barriers:
        barrier_ts = min(barrier_ts, *snapshot.table_barriers.values())
    if barrier_ts < TS_MAX:
        mask |= progress.checkpoint_ts[roles.rows] >= np.uint64(barrier_ts)
    return np.flatnonzero(mask)


def _reasons(snapshot: Snapshot, positions: I64) -> dict[str, int]:
    reasons = (stall_reason(snapshot, position) for position in positions.tolist())
    return dict(Counter(reason.value if reason is not None else WAITING for reason in reasons))


def _slowest(snapshot: Snapshot) -> SpanView | None:
    if snapshot.slowest is None:
        return None
    positions = np.flatnonzero(snapshot.roles.spans.table_ids == snapshot.slowest.table_id).tolist()
    spans = (span_view(snapshot, position) for position in positions)
    return next((view for view in spans if view.span == snapshot.slowest), None)
