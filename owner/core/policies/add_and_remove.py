"""Add every span of the current tables that no capture has, and remove every other span."""

from __future__ import annotations

import numpy as np

from owner.core.captures import Capture
from owner.core.coverage import overlaps, uncovered_tables
from owner.core.moves import prepare
from owner.core.policies.planner import LeastLoaded, PlanInput, heaviest_first
from owner.core.replication import raise_progress
from owner.core.state import Core
from owner.core.tables import (
    ABSENT,
    NO_CAPTURE,
    NO_ROW,
    REMOVING,
    TASK_ADD,
    TASK_REMOVE,
    Rows,
)
from tablewire.model.columns import I64
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import DispatchAction


def reconcile_tables(core: Core, current_tables: I64) -> None:
    """Keep the rows in step with the current tables. If nothing has changed it costs a comparison,
    or nothing for a read-only array that is passed again."""
    known, is_frozen = core.current_tables, current_tables.base is None and not current_tables.flags.writeable
    if known is None or not ((current_tables is known and is_frozen) or np.array_equal(current_tables, known)):
        core.current_tables = current_tables if is_frozen else np.array(current_tables, np.int64)
        core.reconciled = False
    if core.bootstrap.done and not core.reconciled:
        _reconcile(core, np.unique(current_tables))
        core.reconciled = True


def _reconcile(core: Core, table_ids: I64) -> None:
    tables = core.tables
    spans = core.splitter.split(table_ids)
    core.uncovered = uncovered_tables(spans)
    rows = tables.rows_of_spans(spans)
    tables.wanted[: tables.size] = False
    missing = np.flatnonzero(rows == NO_ROW)
    if len(missing):
        fresh = spans if len(missing) == len(spans) else SpanBlock.of([spans[position] for position in missing.tolist()])
        rows[missing] = tables.add(fresh, core.now_ms)
        raise_progress(tables, rows[missing], core.checkpoint_ts)  # the global checkpoint holds for every span
    tables.wanted[rows] = True


def remove_unwanted(core: Core) -> None:
    """Start to remove the spans that no current table has, in whatever state they are."""
    tables, size = core.tables, core.tables.size
    mask = tables.live[:size] & ~tables.wanted[:size] & (tables.state[:size] != REMOVING)
    if not mask.any():
        return
    rows = np.flatnonzero(mask)[: core.config.remove_batch_spans]
    tables.set_state(rows, REMOVING, core.now_ms)
    tables.task[rows] = TASK_REMOVE
    tables.mark_unsteady(rows)
    outgoing = core.replication.outgoing
    for roles in (tables.primary, tables.secondary):
        held = rows[roles[rows] != NO_CAPTURE]
        outgoing.add_by_capture(roles[held], held, DispatchAction.REMOVE)
    for row in rows[tables.undetermined_count[rows] > 0].tolist():
        for capture in sorted(tables.undetermined[row]):
            outgoing.add(capture, np.array([row], np.int64), DispatchAction.REMOVE)


def add_missing(core: Core, captures: list[Capture]) -> None:
    """Prepare the spans that no capture has on the least loaded captures, the heaviest spans first."""
    tables, size = core.tables, core.tables.size
    absent = tables.wanted[:size] & (tables.state[:size] == ABSENT)
    if not captures or not absent.any():
        return
    rows = heaviest_first(_without_overlaps(core, np.flatnonzero(absent)), tables.weight)
    waiting = [row for row in tables.failures if tables.is_in_backoff(row, core.now_ms)]
    rows = rows[~np.isin(rows, waiting)]
    restricted = (tables.undetermined_count[rows] > 0) | np.isin(rows, list(tables.failures))
    inputs = PlanInput.of(core, captures)
    least_loaded = LeastLoaded(inputs.captures, inputs.loads())
    plain = rows[~restricted][: core.config.add_batch_spans]
    prepare(core, plain, least_loaded.take_all(tables.weight[plain]), TASK_ADD)
    room = core.config.add_batch_spans - len(plain)
    for row in rows[restricted].tolist():
        if not room:
            return
        failure = tables.failures.get(row)
        avoid = () if failure is None else (failure.capture,)
        target = least_loaded.take(float(tables.weight[row]), exclude=tables.undetermined.get(row, ()), avoid=avoid)
        if target != NO_CAPTURE:  # a span that no capture can take leaves its room to others
            prepare(core, [row], [target], TASK_ADD)
            room -= 1


def _without_overlaps(core: Core, rows: Rows) -> Rows:
    """Leave out spans that overlap a span that is being removed. If a table is split in another
    way, its old spans are removed first; then the new ones start at the global checkpoint."""
    tables, size = core.tables, core.tables.size
    old = np.flatnonzero(tables.live[:size] & ~tables.wanted[:size])
    if not len(old):
        return rows
    disputed = np.isin(tables.table_id[rows], tables.table_id[old])
    if not disputed.any():
        return rows
    leaving: dict[int, list[Span]] = {}
    for row in old.tolist():
        leaving.setdefault(int(tables.table_id[row]), []).append(tables.span(row))
    free = ~disputed
    for position in np.flatnonzero(disputed).tolist():
        span = tables.span(int(rows[position]))
        free[position] = not any(
            overlaps(span.start_key, span.end_key, other.start_key, other.end_key) for other in leaving[span.table_id]
        )
    return rows[free]
