"""Makes a snapshot of the core after each tick, and copies only what changed since the last one."""

from __future__ import annotations

import sys
import threading

import numpy as np
import numpy.typing as npt

from owner.core.state import Core
from owner.scheduling.snapshot import DrainView, ProgressColumns, Roles, Snapshot
from tablewire.model.progress import CaptureView
from tablewire.model.spans import SpanBlock
from tablewire.model.states import CaptureState

_PROGRESS = ("checkpoint_ts", "resolved_ts", "last_synced_ts")
_COUNTS_REFERENCES = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


class Publisher:
    """Makes a snapshot a tick, and copies only what changed. `publish`: the tick's thread; `latest`: any.

    A snapshot is immutable for whoever holds it. The one that nobody but this publisher holds may be brought up to date in place,
    row by row, which is what makes a tick cheap when little has changed; references are counted for that (under the interpreter's
    lock, and in builds without one the columns are always copied), and `latest` waits for the microseconds that it takes.
    """

    def __init__(self) -> None:
        self._roles: Roles | None = None
        self._progress: ProgressColumns | None = None
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
        roles, tables, told = self._roles, core.tables, core.tables.statistics
        if told.rates is not None and (roles_changed or told.have_changed):
            self._rates = told.rates[:, roles.rows]
        if told.reported_weight is None:
            self._weight = np.broadcast_to(np.float32(1), len(roles.rows))
        elif roles_changed or told.have_changed:
            self._weight = tables.weight[roles.rows]
        told.have_changed = False
        changed = tables.take_changed()
        with self._lock:
            in_place = changed is not None and not roles_changed and self._progress is not None and self._is_alone()
            if in_place and changed is not None and self._progress is not None:
                for rows in changed:
                    for name in _PROGRESS:
                        getattr(self._progress, name)[rows] = getattr(tables, name)[rows]
            else:
                self._progress = ProgressColumns(*(getattr(tables, name)[: tables.size].copy() for name in _PROGRESS))
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
            may_hold_any_span=bool(core.replication.may_hold_any_span),
            unfenced=frozenset(capture.id for capture in alive if not capture.fenced),
            brake=core.mass_failure_guard.is_active,
            drains={target: DrainView(job.id, job.spans_left) for target, job in core.drains.items()},
            errors={row: (trouble.error, trouble.retry_at_ms) for row, trouble in core.tables.failures.items()},
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
        secondary_reported=tables.secondary_reported[rows],
        wanted=tables.wanted[rows],
        steady=tables.steady[rows],
        in_snapshot=tables.in_snapshot[rows],
        state_since_ms=tables.state_since_ms[rows],
    )
