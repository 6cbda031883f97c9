"""The snapshot that a tick publishes: frozen columns, and views that are made when they are read.
Any thread may read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from owner.core.tables import (
    ABSENT,
    COMMIT,
    I32,
    NO_CAPTURE,
    PREPARE,
    REMOVING,
    CaptureIndexes,
    Mask,
    SpanFailure,
)
from tablewire.model.columns import I64, U8, U64
from tablewire.model.ids import TS_MAX, CaptureID
from tablewire.model.progress import BarrierWithMinTs, CaptureView, Checkpoint, SpanView, TaskStatus, Watermark
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import CaptureState, ReplicationState, StallReason, TableState


@dataclass(frozen=True)
class Roles:
    """The columns that change with the state and the roles of a span; shape (n,), sorted by span."""

    rows: I32
    spans: SpanBlock
    state: U8
    primary: CaptureIndexes
    secondary: CaptureIndexes
    undetermined: Mask
    primary_reported: U8
    secondary_reported: U8
    wanted: Mask
    steady: Mask
    in_snapshot: Mask
    state_since_ms: I64


@dataclass(frozen=True)
class ProgressColumns:
    """The columns that change with every heartbeat, by row."""

    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64

    def of(self, row: int) -> Checkpoint:
        return Checkpoint(int(self.checkpoint_ts[row]), int(self.resolved_ts[row]), int(self.last_synced_ts[row]))


@dataclass(frozen=True, slots=True)
class DrainView:
    """A drain that is in force. spans_left: the spans in which the capture has a role; None until a
    tick after bootstrap has counted them."""

    job_id: int
    spans_left: int | None


@dataclass(frozen=True)
class Snapshot:
    """The state after one tick; immutable. Columns are in the order of `roles` if nothing else is said."""

    watermark: Watermark
    initialized: bool
    captures: Sequence[CaptureView]
    slowest: Span | None
    now_ms: int
    roles: Roles
    progress: ProgressColumns
    weight: npt.NDArray[np.float32]
    rates: npt.NDArray[np.float32] | None  # rows/s and bytes/s, shape (2, n); None: all are 0, or none was reported
    has_rates: bool  # executors report rates
    capture_ids: Mapping[int, CaptureID]
    silent: frozenset[int]
    ready: frozenset[int]  # captures that may be given work
    cluster_load: Mapping[CaptureID, float]
    planned: Mapping[int, float]  # the load that planned moves will add to each capture
    balance_stop_percent: int
    may_hold_any_span: bool
    unfenced: frozenset[CaptureID]  # captures that did not report that their sink refuses older permissions
    guard_active: bool  # the mass-failure guard holds placement back
    drains: Mapping[CaptureID, DrainView]
    failures: Mapping[int, SpanFailure]  # by row
    barrier: BarrierWithMinTs

    @property
    def spans(self) -> Sequence[SpanView]:
        """Every span, by table and start key; a view is made when it is read."""
        return _Spans(self)

    @cached_property
    def table_barriers(self) -> Mapping[int, int]:
        return {barrier.table_id: barrier.barrier_ts for barrier in self.barrier.barrier.table_barriers}

    def stalls(self, positions: I64 | None = None) -> dict[StallReason, int]:
        """Return how many of these spans are stalled, by reason. positions: None = all spans, at the
        cost of those that are not steady."""
        if positions is None:
            positions = self.may_stall()
            if not self.initialized:
                return {StallReason.BOOTSTRAP: len(positions)} if len(positions) else {}
        reasons = Counter(stall_reason(self, position) for position in positions.tolist())
        return {reason: count for reason, count in reasons.items() if reason is not None}

    def may_stall(self) -> I64:
        """Return the positions of all spans that can be stalled, and of some others."""
        roles, barrier_ts = self.roles, min(self.barrier.barrier.global_barrier_ts, *self.table_barriers.values(), TS_MAX)
        if not self.initialized:
            return np.arange(len(roles.rows))
        mask = ~roles.steady | roles.in_snapshot
        if self.silent:
            mask |= np.isin(roles.primary, list(self.silent))
        if barrier_ts < TS_MAX:
            mask |= self.progress.checkpoint_ts[roles.rows] >= np.uint64(barrier_ts)
        return np.flatnonzero(mask)

    @property
    def is_steady(self) -> bool:
        """Whether every span replicates without an error and every processor answers."""
        roles = self.roles
        return (
            self.initialized
            and not self.failures
            and bool(roles.steady.all() and not roles.in_snapshot.any())
            and all(view.state is CaptureState.READY for view in self.captures)
        )

    @property
    def is_idle(self) -> bool:
        """Whether executors report their rates and no rows are written."""
        return self.has_rates and (self.rates is None or not self.rates.any())

    def states(self) -> dict[ReplicationState, int]:
        """Return how many spans are in each state."""
        counts = np.bincount(self.roles.state, minlength=len(ReplicationState)).tolist()
        return dict(zip(ReplicationState, counts, strict=True))

    def loads(self) -> dict[CaptureID, float]:
        """Return the weight that each living capture carries for this changefeed."""
        held = self.roles.primary >= 0
        loads = np.bincount(self.roles.primary[held], weights=self.weight[held]).tolist()
        return {id: loads[index] if index < len(loads) else 0.0 for index, id in self.capture_ids.items()}

    def loads_to_come(self) -> dict[CaptureID, float]:
        """Return the weight that each living capture will carry after the moves in progress and the
        planned ones."""
        roles = self.roles
        where = np.where(roles.secondary != NO_CAPTURE, roles.secondary, roles.primary)
        held = where >= 0
        loads = np.bincount(where[held], weights=self.weight[held], minlength=max(self.capture_ids, default=-1) + 1)
        return {id: float(loads[index]) + self.planned.get(index, 0.0) for index, id in self.capture_ids.items()}

    def touching(self, capture: CaptureID) -> I64:
        """Return the positions of the spans that have this capture as Primary or Secondary."""
        indexes = [index for index, capture_id in self.capture_ids.items() if capture_id == capture]
        return np.flatnonzero(np.isin(self.roles.primary, indexes) | np.isin(self.roles.secondary, indexes))

    def slowest_span(self) -> SpanView | None:
        """Return the span that holds the watermark back."""
        if self.slowest is None:
            return None
        positions = np.flatnonzero(self.roles.spans.table_ids == self.slowest.table_id).tolist()
        return next((self.spans[position] for position in positions if self.roles.spans[position] == self.slowest), None)


class _Spans(Sequence[SpanView]):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __len__(self) -> int:
        return len(self._snapshot.roles.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        positions = range(len(self))[index]  # raises IndexError as a list does
        if isinstance(index, slice):
            return [span_view(self._snapshot, position) for position in positions]
        return span_view(self._snapshot, positions)


def span_view(snapshot: Snapshot, position: int) -> SpanView:
    roles, progress = snapshot.roles, snapshot.progress
    row = int(roles.rows[position])
    return SpanView(
        span=roles.spans[position],
        state=ReplicationState.from_code(int(roles.state[position])),
        primary=snapshot.capture_ids.get(int(roles.primary[position])),
        secondary=snapshot.capture_ids.get(int(roles.secondary[position])),
        checkpoint=progress.of(row),
        state_age_ms=snapshot.now_ms - int(roles.state_since_ms[position]),
        stall_reason=stall_reason(snapshot, position),
        error=failure.error if (failure := snapshot.failures.get(row)) is not None else "",
    )


def stall_reason(snapshot: Snapshot, position: int) -> StallReason | None:
    """Return why the span is not steady, or is steady and does not write; None if all is well."""
    roles = snapshot.roles
    if not snapshot.initialized:
        return StallReason.BOOTSTRAP
    state, primary, secondary = int(roles.state[position]), int(roles.primary[position]), int(roles.secondary[position])
    if state == REMOVING:
        return StallReason.SILENT_CAPTURE if {primary, secondary} & snapshot.silent else StallReason.REMOVING
    if state == ABSENT:
        return _why_absent(snapshot, position)
    if state == PREPARE:
        if secondary in snapshot.silent or primary in snapshot.silent:
            return StallReason.SILENT_CAPTURE
        if int(roles.secondary_reported[position]) == TableState.PREPARED.code:  # it waits for other holders of the span
            if snapshot.may_hold_any_span:
                return StallReason.SILENT_CAPTURE
            if roles.undetermined[position]:
                return StallReason.UNDETERMINED
        return StallReason.EXECUTOR_ERROR if int(roles.rows[position]) in snapshot.failures else StallReason.PREPARING
    if primary in snapshot.silent:
        return StallReason.SILENT_CAPTURE
    if state == COMMIT:
        if primary != NO_CAPTURE:
            return StallReason.PRIMARY_STOPPING if secondary != NO_CAPTURE else StallReason.PREPARING
        return StallReason.SILENT_CAPTURE if snapshot.may_hold_any_span else StallReason.UNDETERMINED
    if roles.steady[position]:
        return _why_steady_waits(snapshot, position)
    if roles.undetermined[position]:
        return StallReason.UNDETERMINED
    return StallReason.PRIMARY_STOPPING if int(roles.primary_reported[position]) == TableState.STOPPING.code else None


def _why_absent(snapshot: Snapshot, position: int) -> StallReason:
    if snapshot.guard_active:
        return StallReason.BRAKE
    failure = snapshot.failures.get(int(snapshot.roles.rows[position]))
    if failure is not None and failure.retry_at_ms > snapshot.now_ms:
        return StallReason.BACKOFF
    if not snapshot.ready:
        return StallReason.NO_CAPTURE
    if failure is not None:
        return StallReason.EXECUTOR_ERROR
    return StallReason.UNDETERMINED if snapshot.roles.undetermined[position] else StallReason.CONCURRENCY


def _why_steady_waits(snapshot: Snapshot, position: int) -> StallReason | None:
    roles, progress = snapshot.roles, snapshot.progress
    if roles.in_snapshot[position]:
        return StallReason.SNAPSHOT
    bound = snapshot.table_barriers.get(int(roles.spans.table_ids[position]), TS_MAX)
    bound = min(bound, snapshot.barrier.barrier.global_barrier_ts)
    if bound == TS_MAX:
        return None
    checkpoint = progress.of(int(roles.rows[position]))
    return StallReason.BARRIER if checkpoint.checkpoint_ts >= bound and checkpoint.resolved_ts > bound else None


class _Statuses(Mapping[Span, Checkpoint]):
    """The spans that one capture writes; they are looked up on first use."""

    def __init__(self, snapshot: Snapshot, capture: int) -> None:
        self._snapshot, self._capture = snapshot, capture

    @cached_property
    def _positions(self) -> dict[Span, int]:
        roles = self._snapshot.roles
        return {roles.spans[position]: position for position in np.flatnonzero(roles.primary == self._capture).tolist()}

    def __getitem__(self, span: Span) -> Checkpoint:
        return span_view(self._snapshot, self._positions[span]).checkpoint

    def __iter__(self) -> Iterator[Span]:
        return iter(self._positions)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._snapshot.roles.primary == self._capture))


def task_statuses(snapshot: Snapshot) -> Mapping[CaptureID, TaskStatus]:
    """Return a status for every living capture, an empty one where it writes nothing."""
    return {capture_id: TaskStatus(_Statuses(snapshot, index)) for index, capture_id in snapshot.capture_ids.items()}
