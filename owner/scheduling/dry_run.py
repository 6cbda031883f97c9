"""Dry runs: what a move, a drain or a rebalance of one changefeed would do now. Any thread; nothing
is changed.

They call the planner that a tick calls, with the columns of the last snapshot instead of the live
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import overload

import numpy as np

from owner.core.jobs import JobReason, Reason
from owner.core.policies import planner
from owner.core.policies.planner import PLANNED_MAX, Move, PlanInput
from owner.core.tables import NO_CAPTURE
from owner.scheduling.snapshot import Snapshot
from tablewire.model.ids import CaptureID, TableID
from tablewire.model.spans import Span


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """What would be done with one span, and why. source: "" if no capture has the span."""

    span: Span
    source: CaptureID
    target: CaptureID
    weight: float
    reason: str


@dataclass(frozen=True, slots=True)
class MovePlan(Sequence[PlannedMove]):
    """The moves of a dry run, at most PLANNED_MAX, and the load of each capture before and after
    them."""

    moves: tuple[PlannedMove, ...] = ()
    load_before: Mapping[CaptureID, float] = field(default_factory=dict)
    load_after: Mapping[CaptureID, float] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> PlannedMove: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[PlannedMove]: ...

    def __getitem__(self, index: int | slice) -> PlannedMove | Sequence[PlannedMove]:
        return self.moves[index]

    def __len__(self) -> int:
        return len(self.moves)


def plan_rebalance(snapshot: Snapshot) -> MovePlan:
    """Plan a rebalance."""
    rows = _MovableRows(snapshot)
    movable = rows.column(snapshot.roles.steady & snapshot.roles.wanted, False)
    moves = planner.plan_rebalance(rows.inputs(), movable, snapshot.balance_stop_percent)
    return rows.plan(moves, lambda move, source, target: f"{source} has more load than {target}")


def plan_drain(snapshot: Snapshot, target: CaptureID) -> MovePlan:
    """Plan a drain of one capture. The plan is empty if the capture is unknown or no other one can
    take spans."""
    rows = _MovableRows(snapshot)
    leaving = [index for index, capture in snapshot.capture_ids.items() if capture == target]
    moves = planner.plan_drain(rows.inputs(leaving), leaving, rows.column(snapshot.roles.wanted, False))
    return rows.plan(islice(moves, PLANNED_MAX), lambda move, source, target: f"drain of {source}: {target} has the least load")


def plan_move(snapshot: Snapshot, table_id: TableID, target: CaptureID) -> MovePlan | Reason:
    """Plan the move of a table, or return why it would be refused."""
    rows, roles = _MovableRows(snapshot), snapshot.roles
    wanted = roles.rows[(roles.spans.table_ids == table_id) & roles.wanted].tolist()
    if not wanted:
        return JobReason.SPAN_UNKNOWN.of(subject=f"table {table_id}")
    capture = next((capture for capture in snapshot.captures if capture.id == target), None)
    refused = planner.refuse_target(target, capture.state if capture is not None else None, target in snapshot.drains)
    if refused is not None:
        return refused
    index = next(index for index, capture_id in snapshot.capture_ids.items() if capture_id == target)
    moves = planner.plan_move(rows.inputs(), wanted, index)
    if not moves:
        return JobReason.ALREADY_PRIMARY.of(target=target)

    def why(move: Move, source: CaptureID, target: CaptureID) -> str:
        position = int(rows.position[move.row])
        return "asked for" if roles.steady[position] else f"asked for; it waits until {roles.spans[position]} is steady"

    return rows.plan(moves, why)


class _MovableRows:
    """The columns of a snapshot by row, as the planner wants them. position: in the snapshot, of
    each row."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.position = self.column(np.arange(len(snapshot.roles.rows)), 0)

    def column(self, values: np.ndarray, empty: int) -> np.ndarray:
        rows = self._snapshot.roles.rows
        column = np.full(int(rows.max(initial=-1)) + 1, empty, values.dtype)
        column[rows] = values
        return column

    def inputs(self, leaving: Sequence[int] = ()) -> PlanInput:
        """Return the input of a plan. leaving: captures to drain; a drain first cancels the moves
        towards them."""
        snapshot, roles, ids = self._snapshot, self._snapshot.roles, self._snapshot.capture_ids
        secondary = np.where(np.isin(roles.secondary, leaving), roles.secondary.dtype.type(NO_CAPTURE), roles.secondary)
        return PlanInput(
            self.column(roles.primary, NO_CAPTURE),
            self.column(secondary, NO_CAPTURE),
            self.column(roles.state, 0),
            self.column(snapshot.weight, 0),
            sorted(snapshot.ready, key=ids.__getitem__),
            {index: snapshot.cluster_load.get(capture, 0.0) for index, capture in ids.items()},
            {row: failure.capture for row, failure in snapshot.failures.items()},
        )

    def plan(self, moves: Iterable[Move], why: Callable[[Move, CaptureID, CaptureID], str]) -> MovePlan:
        """Return the moves by name, and the loads before and after them."""
        ids, spans = self._snapshot.capture_ids, self._snapshot.roles.spans
        loads = self.inputs().loads()
        before = {capture: float(loads[index]) for index, capture in ids.items()}
        after, planned = dict(before), []
        for move in moves:
            source, target = ids.get(move.source, ""), ids[move.target]
            span = spans[int(self.position[move.row])]
            planned.append(PlannedMove(span, source, target, move.weight, why(move, source, target)))
            if source:
                after[source] -= move.weight
            after[target] += move.weight
        return MovePlan(tuple(planned), before, after)
