"""Publishes a snapshot of the core after each tick."""

from __future__ import annotations

import sys
import threading
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from owner.core.state import Core
from owner.scheduling.snapshot import DrainView, ProgressColumns, Roles, Snapshot
from tablewire.model.progress import CaptureView
from tablewire.model.spans import SpanBlock
from tablewire.model.states import CaptureState

_PROGRESS = [field.name for field in fields(ProgressColumns)]
_ROLES = [field.name for field in fields(Roles) if field.name not in ("rows", "spans", "undetermined")]
_COUNTS_REFERENCES = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


class Publisher:
    """Publishes a snapshot at the end of each tick. `publish`: the tick's thread; `latest`: any.

    A reader's snapshot never changes. The columns of a snapshot without readers are updated in
    place, row by row, which makes a tick cheap when little has changed. References are counted to
    find that out (an interpreter without a global lock always copies), and `latest` waits while
    columns are updated or copied.
    """

    def __init__(self, core: Core) -> None:
        self._lock = threading.Lock()
        self._rates: npt.NDArray[np.float32] | None = None
        self.publish(core, True)

    def latest(self) -> Snapshot:
        """Return the snapshot of the last tick."""
        with self._lock:
            return self._snapshot

    def publish(self, core: Core, roles_changed: bool) -> None:
        tables, statistics = core.tables, core.tables.statistics
        if roles_changed:
            self._roles = _copy_roles(core)
            written = self._roles.primary[self._roles.primary >= 0]
            self._spans_written = np.bincount(written, minlength=len(core.captures)).tolist()  # by Primary
        rows = self._roles.rows
        if statistics.rates is not None and (roles_changed or statistics.have_changed):
            self._rates = statistics.rates[:, rows]
        if statistics.reported_weight is None:
            self._weight: npt.NDArray[np.float32] = np.broadcast_to(np.float32(1), len(rows))
        elif roles_changed or statistics.have_changed:
            self._weight = tables.weight[rows]
        statistics.have_changed = False
        changed = tables.take_changed()
        with self._lock:
            if roles_changed or changed is None or self._may_be_read():
                self._progress = ProgressColumns(*(getattr(tables, name)[: tables.size].copy() for name in _PROGRESS))
            else:
                for changed_rows in changed:
                    for name in _PROGRESS:
                        getattr(self._progress, name)[changed_rows] = getattr(tables, name)[changed_rows]
            self._snapshot = self._make(core, self._progress)
            self._unread = self._references()  # as long as there are no readers

    def _may_be_read(self) -> bool:
        return not _COUNTS_REFERENCES or self._references() != self._unread

    def _references(self) -> tuple[int, int]:
        return sys.getrefcount(self._snapshot), sys.getrefcount(self._progress)

    def _make(self, core: Core, progress: ProgressColumns) -> Snapshot:
        alive = list(core.captures.alive())
        states = {capture.index: core.capture_state(capture) for capture in alive}
        written = [*self._spans_written, *([0] * (len(core.captures) - len(self._spans_written)))]
        return Snapshot(
            watermark=core.watermark,
            initialized=core.bootstrap.done,
            captures=tuple(
                CaptureView(
                    capture.id,
                    states[capture.index],
                    written[capture.index],
                    capture.id in core.jobs.drains or states[capture.index] is CaptureState.STOPPING,
                )
                for capture in alive
            ),
            slowest=core.tables.span(core.slowest_row) if core.slowest_row >= 0 else None,
            now_ms=core.now_ms,
            roles=self._roles,
            progress=progress,
            weight=self._weight,
            rates=self._rates,
            has_rates=core.tables.statistics.has_rates,
            capture_ids={capture.index: capture.id for capture in alive},
            silent=frozenset(index for index, state in states.items() if state is CaptureState.SILENT),
            ready=frozenset(capture.index for capture in core.ready_captures()),
            cluster_load=core.cluster_load,
            planned=dict(core.balancer.planned.load_change),
            balance_stop_percent=core.config.balance_stop_percent,
            may_hold_any_span=bool(core.replication.may_hold_any_span),
            unfenced=frozenset(capture.id for capture in alive if not capture.fenced),
            guard_active=core.mass_failure_guard.is_active,
            drains={target: DrainView(job.id, job.spans_left) for target, job in core.jobs.drains.items()},
            failures=dict(core.tables.failures),
            barrier=core.barrier,
        )


def _copy_roles(core: Core) -> Roles:
    tables = core.tables
    if tables.partial_spans():
        rows = np.array(sorted(tables.all_rows().tolist(), key=tables.span), np.int32)
        spans = tables.spans(rows.astype(np.int64))
    else:
        rows, spans = tables.index().rows, SpanBlock(tables.index().table_ids)
    undetermined = tables.undetermined_count[rows] > 0
    return Roles(rows=rows, spans=spans, undetermined=undetermined, **{name: getattr(tables, name)[rows] for name in _ROLES})
