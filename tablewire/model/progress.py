"""Progress: checkpoints, statistics, barriers, watermarks, and the views that readers get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from tablewire.model.columns import U8, U64
from tablewire.model.ids import CaptureID, TableID, Ts
from tablewire.model.spans import Span
from tablewire.model.states import CaptureState, ReplicationState, StallReason, TableState

_NO_CHECKPOINTS: Mapping[str, Checkpoint] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The progress of a span.

    checkpoint_ts: everything at or before it is durable in the sink. resolved_ts: everything at or
    before it has been received from the source; never below checkpoint_ts. last_synced_ts: the last
    commit that was written, 0 if none was.
    """

    checkpoint_ts: Ts
    resolved_ts: Ts
    last_synced_ts: Ts = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Rates of a span. stage_checkpoints: by stage ("puller", "snapshot", "sink")."""

    rows_per_s: float = 0.0
    bytes_per_s: float = 0.0
    stage_checkpoints: Mapping[str, Checkpoint] = field(default_factory=lambda: _NO_CHECKPOINTS)


@dataclass(frozen=True, slots=True)
class TableStatus:
    """The status that an executor reports. error: what stopped the span, empty if nothing did."""

    span: Span
    state: TableState
    checkpoint: Checkpoint
    stats: Stats | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StatusColumns:
    """The statuses of several spans, in the order of the request.

    states: TableState codes. errors: (position, text) of each span that failed in the background.
    """

    states: U8
    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64
    errors: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class TableBarrier:
    """Nothing of this table may be written past barrier_ts."""

    table_id: TableID
    barrier_ts: Ts


@dataclass(frozen=True, slots=True)
class Barrier:
    """No table may be written past the lower one of global_barrier_ts and its own barrier."""

    global_barrier_ts: Ts
    table_barriers: Sequence[TableBarrier] = ()


@dataclass(frozen=True, slots=True)
class BarrierWithMinTs:
    """A barrier and the lowest of its table barriers, which bounds the global checkpoint."""

    barrier: Barrier
    min_table_barrier_ts: Ts


@dataclass(frozen=True, slots=True)
class Watermark:
    """The progress of a whole changefeed. All 0: it cannot proceed."""

    checkpoint_ts: Ts
    resolved_ts: Ts
    last_synced_ts: Ts = 0
    puller_resolved_ts: Ts = 0


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """The spans that one capture writes. `spans` is computed as it is read."""

    spans: Mapping[Span, Checkpoint]


@dataclass(frozen=True, slots=True)
class SpanView:
    """One span after the last tick. error: the last one of its executor."""

    span: Span
    state: ReplicationState
    primary: CaptureID | None
    secondary: CaptureID | None
    checkpoint: Checkpoint
    state_age_ms: int
    stall_reason: StallReason | None
    error: str


@dataclass(frozen=True, slots=True)
class CaptureView:
    """One live capture. spans: the number of spans that it is the primary of."""

    id: CaptureID
    state: CaptureState
    spans: int
    draining: bool
