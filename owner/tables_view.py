"""Reading a scheduler's snapshot: rows for people, and counts. Pure; any thread.

A snapshot may hold a million spans, so that what is asked for often (counts, the slowest span) is taken from its columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from owner.answers import TableRow
from tablewire.types import CaptureID, ReplicationState, TableID

if TYPE_CHECKING:
    from owner.scheduler import Snapshot, SpanView

WAITING = "waiting"
"""Counts what a drain still waits for without a stall reason."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over all spans. stalls: those that are not steady, by reason. slowest: the one that holds the checkpoint."""

    spans: int = 0
    by_state: Mapping[str, int] = field(default_factory=dict)
    stalls: Mapping[str, int] = field(default_factory=dict)
    slowest: SpanView | None = None


def summarize(snapshot: Snapshot | None) -> Summary:
    if snapshot is None:
        return Summary()
    states, stalls = Counter[str](), Counter[str]()
    slowest: SpanView | None = None
    for span in snapshot.spans:
        states[span.state.value] += 1
        if span.stall_reason is not None:
            stalls[span.stall_reason.value] += 1
        counts = span.state is not ReplicationState.REMOVING
        if counts and (slowest is None or span.checkpoint.checkpoint_ts < slowest.checkpoint.checkpoint_ts):
            slowest = span
    return Summary(len(snapshot.spans), dict(states), dict(stalls), slowest)


def select(
    snapshot: Snapshot, *, capture: CaptureID = "", stalled: bool = False, table_id: TableID | None = None
) -> Iterator[SpanView]:
    """The spans that all given conditions hold for, lazily."""
    for span in snapshot.spans:
        if table_id is not None and span.span.table_id != table_id:
            continue
        if stalled and span.stall_reason is None:
            continue
        if capture and capture not in (span.primary, span.secondary):
            continue
        yield span


def reasons_at(snapshot: Snapshot, capture: CaptureID) -> Mapping[str, int]:
    """Why spans are still at a capture: counts by stall reason."""
    return Counter(
        span.stall_reason.value if span.stall_reason is not None else WAITING for span in select(snapshot, capture=capture)
    )


def table_row(span: SpanView, names: Mapping[TableID, str]) -> TableRow:
    return TableRow(
        table_id=span.span.table_id,
        table=names.get(span.span.table_id, ""),
        start_key=span.span.start_key,
        end_key=span.span.end_key,
        state=span.state.value,
        primary=span.primary or "",
        secondary=span.secondary or "",
        checkpoint_ts=span.checkpoint.checkpoint_ts,
        resolved_ts=span.checkpoint.resolved_ts,
        state_age_ms=span.state_age_ms,
        stall_reason="" if span.stall_reason is None else span.stall_reason.value,
        error=span.error,
    )
