"""How far all of it has got.

Invariants: never above a current span's checkpoint, never above the barrier, never below the
checkpoint that was passed in; all 0 while placement is unknown or a current table has a part that
no scheduled span covers.
"""

from __future__ import annotations

import numpy as np

from owner.core.state import Core
from owner.core.tables import REMOVING, Mask, Tables
from tablewire.model.progress import BarrierWithMinTs, Watermark

CANNOT_PROCEED = Watermark(0, 0, 0, 0)


def compute(core: Core, barrier: BarrierWithMinTs) -> Watermark:
    """The watermark of this tick; leaves the row that holds it back in `core.slowest_row` (-1:
    none)."""
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
    everything = count == size
    checkpoints = tables.checkpoint_ts[:size] if everything else tables.checkpoint_ts[:size][wanted]
    resolved = tables.resolved_ts[:size] if everything else tables.resolved_ts[:size][wanted]
    synced = tables.last_synced_ts[:size] if everything else tables.last_synced_ts[:size][wanted]
    slowest = int(np.argmin(checkpoints))
    core.slowest_row = slowest if everything else int(np.flatnonzero(wanted)[slowest])
    checkpoint = max(core.checkpoint_ts, min(int(checkpoints[slowest]), checkpoint_bound))
    return Watermark(
        checkpoint_ts=checkpoint,
        resolved_ts=max(checkpoint, min(int(resolved.min()), resolved_bound)),
        last_synced_ts=int(synced.max()),
        puller_resolved_ts=_puller_resolved_ts(tables, wanted),
    )


def _puller_resolved_ts(tables: Tables, wanted: Mask) -> int:
    """The least of those that are given, 0 when none is."""
    if tables.statistics.puller_resolved_ts is None:
        return 0
    puller = tables.statistics.puller_resolved_ts[: tables.size][wanted]
    given = puller[puller > 0]
    return int(given.min()) if len(given) else 0
