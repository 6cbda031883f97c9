"""How far spans are: checkpoints, statistics, barriers, watermarks, and the views that readers get."""

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
    """How far a span has got: durable in the sink (checkpoint_ts), received from the source (resolved_ts, never below),
    and the largest commit that was written (last_synced_ts, 0 = none yet)."""

    checkpoint_ts: Ts
    resolved_ts: Ts
    last_synced_ts: Ts = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Rates of a span over the last statistics interval; stage_checkpoints by stage ("puller", "snapshot", "sink")."""

    rows_per_s: float = 0.0
    bytes_per_s: float = 0.0
    stage_checkpoints: Mapping[str, Checkpoint] = field(default_factory=lambda: _NO_CHECKPOINTS)


@dataclass(frozen=True, slots=True)
class TableStatus:
    """What an executor says of a span. `error` is the text of what stopped it, empty when nothing did."""

    span: Span
    state: TableState
    checkpoint: Checkpoint
    stats: Stats | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StatusColumns:
    """The statuses of n spans, one element a span in the order asked for. states: TableState codes. errors: (position, text)
    of the spans that failed in the background."""

    states: U8
    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64
    errors: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class TableBarrier:
    """No write of this table past barrier_ts."""

    table_id: TableID
    barrier_ts: Ts


@dataclass(frozen=True, slots=True)
class Barrier:
    """No write past min(global_barrier_ts, the table's own)."""

    global_barrier_ts: Ts
    table_barriers: Sequence[TableBarrier] = ()


@dataclass(frozen=True, slots=True)
class BarrierWithMinTs:
    """A barrier and the least of its table barriers, which bounds the global checkpoint."""

    barrier: Barrier
    min_table_barrier_ts: Ts


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far a whole changefeed has got. All 0 = cannot proceed."""

    checkpoint_ts: Ts
    resolved_ts: Ts
    last_synced_ts: Ts = 0
    puller_resolved_ts: Ts = 0


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """The spans that one capture writes, with their checkpoints (a lazy view: reading it costs what is read)."""

    spans: Mapping[Span, Checkpoint]


@dataclass(frozen=True, slots=True)
class SpanView:
    """One span as the last tick left it. primary, secondary: captures by id, None where nobody. error: the executor's last."""

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
    """One living capture. spans: how many it is the Primary of."""

    id: CaptureID
    state: CaptureState
    spans: int
    draining: bool
