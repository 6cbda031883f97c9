"""The global watermark.

Invariants: it is never above the checkpoint of a current span, never above the barrier, and never
below the checkpoint that was passed in. It is 0 while placement is unknown, or while a current
table has a part that no scheduled span covers.
"""

from __future__ import annotations

import numpy as np

from owner.core.state import Core
from owner.core.tables import REMOVING, Mask, Tables
from tablewire.model.progress import BarrierWithMinTs, Watermark

CANNOT_PROCEED = Watermark(0, 0, 0, 0)


def compute(core: Core, barrier: BarrierWithMinTs) -> Watermark:
    """Return the watermark, and set `core.slowest_row` to the row that holds it back (-1: none)."""
    tables, size = core.tables, core.tables.size
    core.slowest_row = -1
    if not core.bootstrap.done or not core.reconciled:
        return CANNOT_PROCEED
    if core.uncovered:
        core.slowest_row = next(iter(tables.rows_of_table(min(core.uncovered))), -1)
        return CANNOT_PROCEED
    checkpoint_bound = min(barrier.barrier.global_barrier_ts, barrier.min_table_barrier_ts)
    resolved_bound = barrier.barrier.global_barrier_ts
    wanted = tables.wanted[:size]
    count = int(np.count_nonzero(wanted))
    if not count:
        checkpoint = max(core.checkpoint_ts, checkpoint_bound)
        return Watermark(checkpoint, max(checkpoint, resolved_bound))
    uncovered = wanted & (~tables.scheduled[:size] | (tables.state[:size] == REMOVING))
    if uncovered.any():
        core.slowest_row = int(np.argmax(uncovered))
        return CANNOT_PROCEED
    rows = slice(size) if count == size else np.flatnonzero(wanted)
    checkpoints = tables.checkpoint_ts[rows]
    slowest = int(np.argmin(checkpoints))
    core.slowest_row = slowest if isinstance(rows, slice) else int(rows[slowest])
    checkpoint = max(core.checkpoint_ts, min(int(checkpoints[slowest]), checkpoint_bound))
    return Watermark(
        checkpoint_ts=checkpoint,
        resolved_ts=max(checkpoint, min(int(tables.resolved_ts[rows].min()), resolved_bound)),
        last_synced_ts=int(tables.last_synced_ts[rows].max()),
        puller_resolved_ts=_puller_resolved_ts(tables, wanted),
    )


def _puller_resolved_ts(tables: Tables, wanted: Mask) -> int:
    """Return the least one that is reported, 0 if there is none."""
    if tables.statistics.puller_resolved_ts is None:
        return 0
    puller = tables.statistics.puller_resolved_ts[: tables.size][wanted]
    reported = puller[puller > 0]
    return int(reported.min()) if len(reported) else 0
