"""The records of tables and their counts, from a scheduler's snapshot. Pure; any thread.

A snapshot may hold a million spans, so spans are selected and counted by masks over its columns,
and a SpanView is made only for a span that is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from owner.scheduling.snapshot import Snapshot, span_view
from tablewire.model.ids import CaptureID, TableID
from tablewire.model.progress import SpanView
from tablewire.v1 import admin_pb2 as pb

ROW_ERROR_LENGTH_MAX = 1_000
WAITING = "waiting"
"""Stands for a span that a drain waits for and that has no stall reason."""


def add_summary(row: pb.Changefeed, snapshot: Snapshot, names: Mapping[TableID, str]) -> None:
    """Add the counts over all spans, and the slowest span, to the record of a changefeed."""
    row.initialized = snapshot.initialized
    row.spans = len(snapshot.roles.rows)
    row.spans_by_state.update({state.value: spans for state, spans in snapshot.states().items() if spans})
    row.stalls.update({reason.value: spans for reason, spans in snapshot.stalls().items()})
    if (slowest := snapshot.slowest_span()) is not None:
        row.slowest.CopyFrom(table_row(slowest, names))
    if snapshot.rates is not None:
        row.rows_per_s, row.bytes_per_s = snapshot.rates.sum(axis=1, dtype=np.float64).tolist()


def select_positions(
    snapshot: Snapshot, *, capture: CaptureID = "", stalled: bool = False, table_id: TableID | None = None
) -> Iterator[tuple[int, SpanView]]:
    """Yield the spans that meet all given conditions, with their positions in the snapshot, in their order."""
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
    """Return rows/s and bytes/s of one span; None if no executor reports statistics."""
    return None if snapshot.rates is None else tuple(snapshot.rates[:, position].tolist())


def reasons_at(snapshot: Snapshot, capture: CaptureID) -> Mapping[str, int]:
    """Count the spans in which a processor has a role by stall reason, WAITING for those that are steady."""
    positions = snapshot.touching(capture)
    reasons = {reason.value: count for reason, count in snapshot.stalls(positions).items()}
    waiting = len(positions) - sum(reasons.values())
    return reasons | ({WAITING: waiting} if waiting else {})


def table_row(view: SpanView, names: Mapping[TableID, str], rates: tuple[float, float] | None = None) -> pb.TableRow:
    """Return the record of a span."""
    rows_per_s, bytes_per_s = rates or (None, None)
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
        rows_per_s=rows_per_s,
        bytes_per_s=bytes_per_s,
    )
