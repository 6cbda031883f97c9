"""Dry runs: what a move, a drain or a rebalance would do now, over all changefeeds, and the loads before and after. Any thread.

A plan is made from the snapshots of the last ticks and changes nothing. Changefeeds are planned for in the order of their names,
each with what those before it would move, as their schedulers do it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from owner.admin.errors import RefusedError, UnknownTableError
from owner.admin.ports import OwnerPort
from owner.admin.resolve import (
    check_capture,
    find_changefeed,
    rebalanced,
    running,
    schedulers_of,
    table_id_of,
    table_names,
)
from owner.changefeed.cluster_load import ClusterLoad, Loads
from owner.core.jobs import JobReason, Reason
from owner.scheduling import dry_run
from owner.scheduling.dry_run import PlannedMove
from owner.scheduling.snapshot import Snapshot
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.v1 import admin_pb2 as pb

MOVES_MAX = 100_000
"""A plan names at most so many; the loads after it are those after these moves."""


def plan_rebalance(owner: OwnerPort, text: str) -> pb.Plan:
    """As `operations.rebalance` would do it."""
    chosen = {info.changefeed for info, _ in rebalanced(owner, text)}
    return _plan(owner, chosen, dry_run.plan_rebalance, _why_no_rebalance)


def plan_drain(owner: OwnerPort, capture: CaptureID) -> pb.Plan:
    """Where everything on this capture would go."""
    check_capture(owner, capture)
    chosen = {info.changefeed for info, _ in schedulers_of(owner, owner.changefeeds.list())}
    return _plan(owner, chosen, lambda snapshot: dry_run.plan_drain(snapshot, capture), lambda rows: _why_no_drain(rows, capture))


def plan_move(owner: OwnerPort, text: str, table: str, target: CaptureID) -> pb.Plan:
    """RefusedError for what the scheduler would refuse, with its reason."""
    info = find_changefeed(owner, text)
    running(owner, info)
    table_id = table_id_of(info, table_names(owner, info.changefeed), table)
    check_capture(owner, target)

    def plan(snapshot: Snapshot) -> Sequence[PlannedMove]:
        planned = dry_run.plan_move(snapshot, table_id, target)
        if isinstance(planned, Reason):
            error = UnknownTableError if planned.code is JobReason.SPAN_UNKNOWN else RefusedError
            raise error(planned.text)
        return planned

    return _plan(owner, {info.changefeed}, plan, lambda _: "")


def _plan(
    owner: OwnerPort,
    chosen: set[ChangefeedID],
    plan: Callable[[Snapshot], Sequence[PlannedMove]],
    why_not_more: Callable[[Sequence[Snapshot]], str],
) -> pb.Plan:
    stored = sorted(owner.changefeeds.list(), key=lambda info: info.changefeed)
    snapshots = {info.changefeed: scheduler.snapshot() for info, scheduler in schedulers_of(owner, stored)}
    for changefeed in sorted(chosen & snapshots.keys()):
        if not snapshots[changefeed].initialized:
            raise RefusedError(f"changefeed {changefeed} cannot be planned for yet: its owner is still hearing from the captures")
    loads: dict[ChangefeedID, Loads] = {changefeed: snapshot.loads_to_come() for changefeed, snapshot in snapshots.items()}
    cluster = ClusterLoad(loads.values())
    before = dict(cluster.without({}))
    rows: list[pb.PlannedMove] = []
    seen = []
    for changefeed, snapshot in snapshots.items():
        if changefeed not in chosen:
            continue
        own = loads[changefeed]
        snapshot = dataclasses.replace(snapshot, cluster_load=cluster.without(own))
        seen.append(snapshot)
        moves = plan(snapshot)[: MOVES_MAX - len(rows)]
        cluster.replace(own, _after(own, moves))
        rows.extend(_rows(owner, changefeed, moves))
    note = why_not_more(seen)
    if len(rows) == MOVES_MAX:
        note = f"only the first {MOVES_MAX} moves were planned"
    return pb.Plan(
        changefeeds=[str(changefeed) for changefeed in sorted(chosen)],
        moves=rows,
        load_before=before,
        load_after=dict(cluster.without({})),
        note=note,
    )


def _after(own: Loads, moves: Sequence[PlannedMove]) -> Loads:
    after = dict(own)
    for move in moves:
        after[move.target] = after.get(move.target, 0.0) + move.weight
        if move.source:
            after[move.source] = after.get(move.source, 0.0) - move.weight
    return after


def _rows(owner: OwnerPort, changefeed: ChangefeedID, moves: Sequence[PlannedMove]) -> Iterator[pb.PlannedMove]:
    names = table_names(owner, changefeed)
    for move in moves:
        span = move.span
        yield pb.PlannedMove(
            changefeed=str(changefeed),
            table_id=span.table_id,
            table=names.get(span.table_id, ""),
            start_key=span.start_key,
            end_key=span.end_key,
            source=move.source,
            target=move.target,
            weight=move.weight,
            reason=move.reason,
        )


def _why_no_rebalance(snapshots: Sequence[Snapshot]) -> str:
    ready = {snapshot.capture_ids[index] for snapshot in snapshots for index in snapshot.ready}
    if len(ready) < 2:
        return f"{len(ready)} of the captures may be given work, so there is nothing to even out"
    within = max((snapshot.balance_stop_percent for snapshot in snapshots), default=0)
    return f"a difference of up to {within} % from the mean is left alone, and so is a span whose move would not lessen it"


def _why_no_drain(snapshots: Sequence[Snapshot], capture: CaptureID) -> str:
    ready = {snapshot.capture_ids[index] for snapshot in snapshots for index in snapshot.ready}
    return "" if not snapshots or ready - {capture} else "no other capture is ready to take anything: start a processor first"
