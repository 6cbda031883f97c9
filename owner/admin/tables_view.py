"""Reading a scheduler's snapshot: rows for people, and counts. Pure; any thread.

A snapshot may hold a million spans, so selections and counts are masks over its columns, and a SpanView is made only of what is
shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from owner.scheduling.snapshot import Snapshot, span_view
from tablewire.model.ids import CaptureID, TableID
from tablewire.model.progress import SpanView
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
    stalls = {reason.value: spans for reason, spans in snapshot.stalls().items()}
    totals = None if snapshot.rates is None else snapshot.rates.sum(axis=1, dtype=np.float64).tolist()
    return Summary(count, states, stalls, snapshot.slowest_span(), *(totals or (None, None)))


def select_positions(
    snapshot: Snapshot, *, capture: CaptureID = "", stalled: bool = False, table_id: TableID | None = None
) -> Iterator[tuple[int, SpanView]]:
    """Yield the spans that meet all given conditions and their positions in the snapshot, by table and start key. Each view is
    made when it is asked for."""
    positions = snapshot.may_stall() if stalled else np.arange(len(snapshot.roles.rows))
    if table_id is not None:
        positions = positions[snapshot.roles.spans.table_ids[positions] == table_id]
    if capture:
        positions = positions[np.isin(positions, snapshot.touching(capture))]
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
    """Return why spans are still at a capture: counts by stall reason, WAITING where there is none."""
    positions = snapshot.touching(capture)
    reasons = {reason.value: count for reason, count in snapshot.stalls(positions).items()}
    waiting = len(positions) - sum(reasons.values())
    return reasons | ({WAITING: waiting} if waiting else {})


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
