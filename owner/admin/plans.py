"""Dry runs: what a move, a drain or a rebalance would do now, over all changefeeds. Any thread.

A plan is made from the snapshots of the last ticks and changes nothing. Changefeeds are planned in
the order of their names, each with the loads after the moves of those before it, as their
schedulers do it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

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
from tablewire.runtime.text import plural
from tablewire.v1 import admin_pb2 as pb

MOVES_MAX = 100_000
"""A plan lists at most this many moves, and the loads after these moves."""


def plan_rebalance(owner: OwnerPort, text: str) -> pb.Plan:
    """Plan `operations.rebalance`."""
    chosen = {info.changefeed for info, _ in rebalanced(owner, text)}
    return _plan(owner, chosen, dry_run.plan_rebalance, _why_no_rebalance)


def plan_drain(owner: OwnerPort, capture: CaptureID) -> pb.Plan:
    """Plan the drain of a processor."""
    check_capture(owner, capture)
    chosen = {info.changefeed for info, _ in schedulers_of(owner, owner.changefeeds.list())}
    return _plan(owner, chosen, lambda snapshot: dry_run.plan_drain(snapshot, capture), lambda rows: _why_no_drain(rows, capture))


def plan_move(owner: OwnerPort, text: str, table: str, target: CaptureID) -> pb.Plan:
    """Plan the move of a table; raise RefusedError with the reason if the scheduler would refuse it."""
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
            raise RefusedError(f"changefeed {changefeed} cannot be planned yet: not all processors have reported their tables")
    loads: dict[ChangefeedID, Loads] = {changefeed: snapshot.loads_to_come() for changefeed, snapshot in snapshots.items()}
    cluster = ClusterLoad(loads.values())
    answer = pb.Plan(changefeeds=map(str, sorted(chosen)), load_before=cluster.without({}))
    planned = []
    for changefeed in sorted(chosen & snapshots.keys()):
        own, names = loads[changefeed], table_names(owner, changefeed)
        snapshot = dataclasses.replace(snapshots[changefeed], cluster_load=cluster.without(own))
        planned.append(snapshot)
        after = defaultdict(float, own)
        for move in plan(snapshot)[: MOVES_MAX - len(answer.moves)]:
            after[move.target] += move.weight
            if move.source:
                after[move.source] -= move.weight
            answer.moves.add(
                changefeed=str(changefeed),
                table_id=move.span.table_id,
                table=names.get(move.span.table_id, ""),
                start_key=move.span.start_key,
                end_key=move.span.end_key,
                source=move.source,
                target=move.target,
                weight=move.weight,
                reason=move.reason,
            )
        cluster.replace(own, after)
    answer.load_after.update(cluster.without({}))
    answer.note = why_not_more(planned)
    if len(answer.moves) == MOVES_MAX:
        answer.note = f"only the first {MOVES_MAX} moves were planned"
    return answer


def _ready(snapshots: Sequence[Snapshot]) -> set[CaptureID]:
    return {snapshot.capture_ids[index] for snapshot in snapshots for index in snapshot.ready}


def _why_no_rebalance(snapshots: Sequence[Snapshot]) -> str:
    if (ready := len(_ready(snapshots))) < 2:
        return f"{plural(ready, 'processor')} can take tables, so there is nothing to even out"
    within = max((snapshot.balance_stop_percent for snapshot in snapshots), default=0)
    return f"a difference of up to {within} % from the mean is accepted, and no other move would reduce it"


def _why_no_drain(snapshots: Sequence[Snapshot], capture: CaptureID) -> str:
    return "" if not snapshots or _ready(snapshots) - {capture} else "no other processor can take tables: start a processor first"
