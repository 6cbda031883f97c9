"""What a tick leaves for readers: frozen columns, and views that are made when somebody looks. Any thread may read.

Publishing copies the columns that changed since the last tick and nothing else; no list of spans is made per tick.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from owner.core.jobs import PlannedMove, RebalancePlan
from owner.core.policies.leveling import level
from owner.core.state import Core
from owner.core.tables import (
    ABSENT,
    COMMIT,
    I32,
    NOBODY,
    PREPARE,
    REMOVING,
    Holders,
    Mask,
)
from tablewire.types import (
    I64,
    TS_MAX,
    U8,
    U64,
    BarrierWithMinTs,
    CaptureID,
    CaptureState,
    CaptureView,
    Checkpoint,
    ReplicationState,
    Span,
    SpanBlock,
    SpanView,
    StallReason,
    TableState,
    TaskStatus,
    Watermark,
)

_PROGRESS = ("checkpoint_ts", "resolved_ts", "last_synced_ts")
_COUNTS_REFERENCES = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
PLANNED_MAX = 100_000
"""A dry run names at most so many moves."""


@dataclass(frozen=True)
class Roles:
    """The columns that change when a span's life changes; shape (n,) each, sorted by span."""

    rows: I32
    spans: SpanBlock
    state: U8
    primary: Holders
    secondary: Holders
    undetermined: Mask
    primary_reported: U8
    wanted: Mask
    steady: Mask
    in_snapshot: Mask
    state_since_ms: I64


@dataclass(frozen=True)
class Progress:
    """The columns that change with every heartbeat; indexed by row."""

    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64

    def of(self, row: int) -> Checkpoint:
        return Checkpoint(int(self.checkpoint_ts[row]), int(self.resolved_ts[row]), int(self.last_synced_ts[row]))


@dataclass(frozen=True)
class Snapshot:
    """The state after one tick; immutable."""

    watermark: Watermark
    initialized: bool
    captures: Sequence[CaptureView]
    slowest: Span | None
    now_ms: int
    roles: Roles
    progress: Progress
    weight: npt.NDArray[np.float32]  # of each span, in the order of roles
    rates: npt.NDArray[np.float32] | None  # rows/s and bytes/s of each span, shape (2, n) in that order; None: none were given
    capture_ids: Mapping[int, CaptureID]
    silent: frozenset[int]
    ready: frozenset[int]  # captures that may be given work
    cluster_load: Mapping[CaptureID, float]
    planned: Mapping[int, float]  # what moves that are planned and have not begun will add to each capture
    balance_stop_percent: int
    everywhere: bool
    unfenced: frozenset[CaptureID]  # captures whose executor does not refuse older permissions at its sink
    brake: bool
    errors: Mapping[int, tuple[str, int]]  # row -> (text, retry_at_ms)
    barrier: BarrierWithMinTs

    @property
    def spans(self) -> Sequence[SpanView]:
        """Every span, by table and start key; made as they are read."""
        return _Spans(self)

    @cached_property
    def table_barriers(self) -> Mapping[int, int]:
        return {barrier.table_id: barrier.barrier_ts for barrier in self.barrier.barrier.table_barriers}

    def stalls(self) -> dict[StallReason, int]:
        """How many spans stand still, by reason; costs what is not steady."""
        counts: dict[StallReason, int] = {}
        roles = self.roles
        mask = ~roles.steady | roles.in_snapshot | np.isin(roles.primary, list(self.silent))
        if self._may_stall_steady:
            mask[:] = True
        for position in np.flatnonzero(mask).tolist():
            reason = stall_reason(self, position)
            if reason is not None:
                counts[reason] = counts.get(reason, 0) + 1
        return counts

    def states(self) -> dict[ReplicationState, int]:
        """How many spans are in each state."""
        counts = np.bincount(self.roles.state, minlength=len(ReplicationState)).tolist()
        return dict(zip(ReplicationState, counts, strict=True))

    @property
    def _may_stall_steady(self) -> bool:
        return not self.initialized or self.barrier.barrier.global_barrier_ts < TS_MAX or bool(self.table_barriers)

    def loads(self) -> dict[CaptureID, float]:
        """The weight that each living capture carries for this changefeed."""
        held = self.roles.primary >= 0
        loads = np.bincount(self.roles.primary[held], weights=self.weight[held]).tolist()
        return {id: loads[index] if index < len(loads) else 0.0 for index, id in self.capture_ids.items()}

    def loads_to_come(self) -> dict[CaptureID, float]:
        """The weight that each living capture carries once the moves that are under way and planned have ended."""
        roles = self.roles
        where = np.where(roles.secondary != NOBODY, roles.secondary, roles.primary)
        held = where >= 0
        loads = np.bincount(where[held], weights=self.weight[held], minlength=max(self.capture_ids, default=-1) + 1)
        return {id: float(loads[index]) + self.planned.get(index, 0.0) for index, id in self.capture_ids.items()}

    def plan_rebalance(self) -> RebalancePlan:
        """What a rebalance would do now: the moves, and the loads before and after them. Any thread; changes nothing."""
        roles = self.roles
        found = level(
            np.where(roles.secondary != NOBODY, roles.secondary, roles.primary),
            self.weight,
            roles.steady & roles.wanted,
            sorted(self.ready),
            {index: self.cluster_load.get(self.capture_ids[index], 0.0) for index in self.ready},
            self.balance_stop_percent,
            PLANNED_MAX,
        )
        return RebalancePlan(
            tuple(
                PlannedMove(
                    roles.spans[move.position],
                    self.capture_ids[move.source],
                    self.capture_ids[move.target],
                    move.weight,
                    f"{self.capture_ids[move.source]} carries more than {self.capture_ids[move.target]}",
                )
                for move in found.moves
            ),
            {self.capture_ids[index]: load for index, load in found.before.items()},
            {self.capture_ids[index]: load for index, load in found.after.items()},
        )

    def touching(self, capture: int) -> int:
        """How many spans have this capture as Primary or Secondary."""
        return int(np.count_nonzero((self.roles.primary == capture) | (self.roles.secondary == capture)))


class _Spans(Sequence[SpanView]):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __len__(self) -> int:
        return len(self._snapshot.roles.rows)

    @overload
    def __getitem__(self, index: int) -> SpanView: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SpanView]: ...

    def __getitem__(self, index: int | slice) -> SpanView | Sequence[SpanView]:
        if isinstance(index, slice):
            return [span_view(self._snapshot, position) for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return span_view(self._snapshot, index % len(self))

    def __iter__(self) -> Iterator[SpanView]:
        return (span_view(self._snapshot, position) for position in range(len(self)))


def span_view(snapshot: Snapshot, position: int) -> SpanView:
    roles, progress = snapshot.roles, snapshot.progress
    row = int(roles.rows[position])
    return SpanView(
        span=roles.spans[position],
        state=ReplicationState.from_code(int(roles.state[position])),  # type: ignore[arg-type]
        primary=snapshot.capture_ids.get(int(roles.primary[position])),
        secondary=snapshot.capture_ids.get(int(roles.secondary[position])),
        checkpoint=progress.of(row),
        state_age_ms=snapshot.now_ms - int(roles.state_since_ms[position]),
        stall_reason=stall_reason(snapshot, position),
        error=snapshot.errors.get(row, ("", 0))[0],
    )


def stall_reason(snapshot: Snapshot, position: int) -> StallReason | None:
    """Why the span is not steady, or why a steady one does not write; None when all is well."""
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
        return StallReason.EXECUTOR_ERROR if int(roles.rows[position]) in snapshot.errors else StallReason.PREPARING
    if primary in snapshot.silent:
        return StallReason.SILENT_CAPTURE
    if state == COMMIT:
        if primary != NOBODY:
            return StallReason.PRIMARY_STOPPING if secondary != NOBODY else StallReason.PREPARING
        return StallReason.SILENT_CAPTURE if snapshot.everywhere else StallReason.UNDETERMINED
    if roles.steady[position]:
        return _why_steady_waits(snapshot, position)
    if roles.undetermined[position]:
        return StallReason.UNDETERMINED
    return StallReason.PRIMARY_STOPPING if int(roles.primary_reported[position]) == TableState.STOPPING.code else None


def _why_absent(snapshot: Snapshot, position: int) -> StallReason:
    if snapshot.brake:
        return StallReason.BRAKE
    error = snapshot.errors.get(int(snapshot.roles.rows[position]))
    if error is not None and error[1] > snapshot.now_ms:
        return StallReason.BACKOFF
    if not snapshot.ready:
        return StallReason.NO_CAPTURE
    if error is not None:
        return StallReason.EXECUTOR_ERROR
    return StallReason.UNDETERMINED if snapshot.roles.undetermined[position] else StallReason.CONCURRENCY


def _why_steady_waits(snapshot: Snapshot, position: int) -> StallReason | None:
    roles, progress = snapshot.roles, snapshot.progress
    if roles.in_snapshot[position]:
        return StallReason.SNAPSHOT
    row = int(roles.rows[position])
    bound = snapshot.table_barriers.get(int(roles.spans.table_ids[position]), TS_MAX)
    bound = min(bound, snapshot.barrier.barrier.global_barrier_ts)
    if bound == TS_MAX:
        return None
    checkpoint = progress.of(row)
    return StallReason.BARRIER if checkpoint.checkpoint_ts >= bound and checkpoint.resolved_ts > bound else None


class _Statuses(Mapping[Span, Checkpoint]):
    """The spans of one capture; found when first asked."""

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
    """One for every living capture, empty where it writes nothing."""
    index_of = {capture_id: index for index, capture_id in snapshot.capture_ids.items()}
    return {view.id: TaskStatus(_Statuses(snapshot, index_of[view.id])) for view in snapshot.captures}


class Publisher:
    """Makes a snapshot a tick, and copies only what changed. `publish`: the tick's thread; `latest`: any.

    A snapshot is immutable for whoever holds it. The one that nobody but this publisher holds may be brought up to date in place,
    row by row, which is what makes a tick cheap when little has changed; references are counted for that (under the interpreter's
    lock, and in builds without one the columns are always copied), and `latest` waits for the microseconds that it takes.
    """

    def __init__(self) -> None:
        self._roles: Roles | None = None
        self._progress: Progress | None = None
        self._primaries: list[int] = []  # spans by Primary
        self._weight: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self._rates: npt.NDArray[np.float32] | None = None
        self._snapshot: Snapshot | None = None
        self._alone = (0, 0)  # how many references there are to the snapshot and its progress when nobody holds them
        self._lock = threading.Lock()

    def latest(self) -> Snapshot:
        """What the last tick left."""
        with self._lock:
            assert self._snapshot is not None
            return self._snapshot

    def publish(self, core: Core, roles_changed: bool) -> None:
        if self._roles is None or roles_changed:
            self._roles = _copy_roles(core)
            self._primaries = np.bincount(self._roles.primary[self._roles.primary >= 0], minlength=len(core.captures)).tolist()
        roles, tables = self._roles, core.tables
        if tables.rates is not None and (roles_changed or tables.weights_changed):
            self._rates = tables.rates[:, roles.rows]
        if tables.weight_told is None:
            self._weight = np.broadcast_to(np.float32(1), len(roles.rows))
        elif roles_changed or tables.weights_changed:
            self._weight = tables.weight[roles.rows]
        tables.weights_changed = False
        touched = tables.take_touched()
        with self._lock:
            in_place = touched is not None and not roles_changed and self._progress is not None and self._is_alone()
            if in_place and touched is not None and self._progress is not None:
                for rows in touched:
                    for name in _PROGRESS:
                        getattr(self._progress, name)[rows] = getattr(tables, name)[rows]
            else:
                self._progress = Progress(*(getattr(tables, name)[: tables.size].copy() for name in _PROGRESS))
            self._snapshot = self._make(core, roles)
            self._alone = self._references()

    def _is_alone(self) -> bool:
        return _COUNTS_REFERENCES and self._references() == self._alone

    def _references(self) -> tuple[int, int]:
        return sys.getrefcount(self._snapshot), sys.getrefcount(self._progress)

    def _make(self, core: Core, roles: Roles) -> Snapshot:
        alive = list(core.captures.alive())
        states = {capture.index: core.capture_state(capture) for capture in alive}
        assert core.barrier is not None
        assert self._progress is not None
        primaries = [*self._primaries, *([0] * (len(core.captures) - len(self._primaries)))]
        return Snapshot(
            watermark=core.watermark,
            initialized=core.bootstrap.done,
            captures=tuple(
                CaptureView(
                    capture.id,
                    states[capture.index],
                    primaries[capture.index],
                    capture.id in core.drains or states[capture.index] is CaptureState.STOPPING,
                )
                for capture in alive
            ),
            slowest=core.tables.span(core.slowest_row) if core.slowest_row >= 0 else None,
            now_ms=core.now_ms,
            roles=roles,
            progress=self._progress,
            weight=self._weight,
            rates=self._rates,
            capture_ids={capture.index: capture.id for capture in alive},
            silent=frozenset(index for index, state in states.items() if state is CaptureState.SILENT),
            ready=frozenset(capture.index for capture in core.ready_captures()),
            cluster_load=core.cluster_load,
            planned=core.balancer.shift(core.tables),
            balance_stop_percent=core.config.balance_stop_percent,
            everywhere=bool(core.replication.everywhere),
            unfenced=frozenset(capture.id for capture in alive if capture.heard_ms is not None and not capture.fenced),
            brake=core.brake.is_on,
            errors={row: (trouble.error, trouble.retry_at_ms) for row, trouble in core.tables.trouble.items()},
            barrier=core.barrier,
        )


def _copy_roles(core: Core) -> Roles:
    tables = core.tables
    if tables.partial_spans():
        rows = np.array(sorted(tables.all_rows().tolist(), key=tables.span), np.int32)
        spans = tables.spans(rows.astype(np.int64))
    else:
        rows, spans = tables.index().rows, SpanBlock(tables.index().table_ids)
    return Roles(
        rows=rows,
        spans=spans,
        state=tables.state[rows],
        primary=tables.primary[rows],
        secondary=tables.secondary[rows],
        undetermined=tables.undetermined_count[rows] > 0,
        primary_reported=tables.primary_reported[rows],
        wanted=tables.wanted[rows],
        steady=tables.steady[rows],
        in_snapshot=tables.in_snapshot[rows],
        state_since_ms=tables.state_since_ms[rows],
    )
