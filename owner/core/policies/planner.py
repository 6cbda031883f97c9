"""Where spans should go: the one planner of drains, rebalances and new spans.

Pure functions of columns. A tick calls them on the live rows and begins the first moves of the
plan; a dry run calls them on a snapshot and shows the whole plan. Two invariants make the two
agree:

- A span counts as load where it is going to be (`PlanInput.location`). Beginning a move therefore
  leaves the input that the rest of the plan is made from as the plan assumed it.
- Spans are given away one at a time, the heaviest first, each to the capture with the least load
  (longest processing time first). The k-th choice depends on the choices before it alone. So the
  plan that a later tick makes for the remaining spans is the rest of the first one, and it does not
  matter how many moves the concurrency slots let a tick begin. The result is level within one
  weight: no capture that was given a span has more load than the least loaded one plus the last
  span it was given.

Weights are float32 and at least 1, so float64 sums of them are exact in any order, and ties are
broken alike everywhere: by row for spans, by id for captures.

A rebalance differs: it makes as few moves as it can, and only moves that close the gap between two
captures instead of reversing it (`MOVED_SHARE_MAX`). Its plan is made once and then carried out.
Each move lowers the sum of the squared loads, so planning ends and cannot oscillate. The gap between
the most and the least loaded capture never grows, so a plan for the result of a plan is empty.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from owner.core.captures import Capture
from owner.core.jobs import JobReason, Reason
from owner.core.state import Core
from owner.core.tables import NO_CAPTURE, REPLICATING, CaptureIndexes, Mask, Rows
from tablewire.model.columns import F32, F64, U8
from tablewire.model.ids import CaptureID
from tablewire.model.states import CaptureState

_TARGET_NOT_READY = {
    CaptureState.UNINITIALIZED: JobReason.TARGET_UNINITIALIZED,
    CaptureState.SILENT: JobReason.TARGET_SILENT,
    CaptureState.STOPPING: JobReason.TARGET_STOPPING,
}

PLANNED_MAX = 100_000
"""A rebalance plans at most this number of moves at a time."""
MOVED_SHARE_MAX = 0.9
"""A span is moved only if it weighs at most this share of the gap between source and target: a
heavier one would leave a gap of more than 80 % of the present one in the other direction, and so
mostly exchange the two loads."""
ONE_BY_ONE_MAX = 16
"""Runs of at most this number of spans of one weight are placed one by one, longer ones as a whole."""


@dataclass(frozen=True, slots=True)
class Move:
    """A planned move between capture indexes; source: NO_CAPTURE if there is no Primary."""

    row: int
    source: int
    target: int
    weight: float


@dataclass(frozen=True, slots=True)
class PlanInput:
    """What plans are made from. The columns have shape (n_rows,)."""

    primary: CaptureIndexes
    secondary: CaptureIndexes
    state: U8
    weight: F32
    captures: Sequence[int]  # indexes of the captures that may be given spans, in the order of their ids
    cluster_load: Mapping[int, float]  # by capture index: its load by other changefeeds
    failed_at: Mapping[int, int] = field(default_factory=dict)  # row -> the capture where the span failed last

    @classmethod
    def of(cls, core: Core, ready: Sequence[Capture]) -> PlanInput:
        """Return the input of a plan for the live rows; ready: by id."""
        tables, size = core.tables, core.tables.size
        return cls(
            tables.primary[:size],
            tables.secondary[:size],
            tables.state[:size],
            tables.weight[:size],
            [capture.index for capture in ready],
            {capture.index: core.cluster_load.get(capture.id, 0.0) for capture in ready},
            {row: failure.capture for row, failure in tables.failures.items()},
        )

    def location(self) -> CaptureIndexes:
        """Return the capture that each span is at or is moving to; NO_CAPTURE if there is none."""
        location: CaptureIndexes = np.where(self.secondary != NO_CAPTURE, self.secondary, self.primary)
        return location

    def loads(self) -> F64:
        """Return the load of each capture, by index."""
        location = self.location()
        held = location >= 0
        size = 1 + max([*self.captures, *self.cluster_load, int(location.max(initial=-1))], default=-1)
        loads = np.zeros(size, np.float64)
        loads += np.bincount(location[held], weights=self.weight[held], minlength=size)
        for capture, load in self.cluster_load.items():
            loads[capture] += load
        return loads


class LeastLoaded:
    """Gives spans to the capture with the least load; ties go to the first of `captures`."""

    def __init__(self, captures: Sequence[int], loads: F64) -> None:
        self._captures = captures
        self._heap = [(float(loads[capture]), position) for position, capture in enumerate(captures)]
        heapq.heapify(self._heap)

    def take(self, weight: float, exclude: Collection[int] = (), avoid: Collection[int] = ()) -> int:
        """Return the capture for one span and add its weight there. NO_CAPTURE if all are excluded;
        a capture to avoid is taken only if there is no other."""
        if not self._heap:
            return NO_CAPTURE
        if not (exclude or avoid):
            load, position = self._heap[0]
            heapq.heapreplace(self._heap, (load + weight, position))
            return self._captures[position]
        allowed = [entry for entry in self._heap if self._captures[entry[1]] not in exclude]
        if not allowed:
            return NO_CAPTURE
        entry = min(allowed, key=lambda entry: (self._captures[entry[1]] in avoid, entry))
        self._heap[self._heap.index(entry)] = (entry[0] + weight, entry[1])
        heapq.heapify(self._heap)
        return self._captures[entry[1]]

    def take_all(self, weights: F32) -> CaptureIndexes:
        """Return the capture for each span, as that many calls of `take` would; weights: sorted, so
        that equal ones are adjacent.

        Among spans of one weight neighbours get the same capture, since agents report the spans of
        neighbouring rows faster.
        """
        targets = np.full(len(weights), NO_CAPTURE, np.int16)
        if not len(weights) or not self._captures:
            return targets
        starts = np.flatnonzero(np.concatenate([[True], weights[1:] != weights[:-1]])).tolist()
        for start, end in zip(starts, [*starts[1:], len(weights)], strict=True):
            weight, count = float(weights[start]), end - start
            run = [self.take(weight) for _ in range(count)] if count <= ONE_BY_ONE_MAX else self._take_equal(weight, count)
            targets[start:end] = np.sort(run)
        return targets

    def _take_equal(self, weight: float, count: int) -> CaptureIndexes:
        """Return what `count` calls of `take` would: the k-th picks the k-th smallest of all loads
        that the captures pass through as spans are added."""
        loads = np.empty(len(self._captures), np.float64)
        for load, position in self._heap:
            loads[position] = load
        level = ((np.cumsum(np.sort(loads)) + count * weight) / np.arange(1, len(loads) + 1)).min()  # of water poured on them
        steps = np.maximum(np.ceil((level - loads) / weight) + 1, 0).astype(np.int64)
        positions = np.repeat(np.arange(len(loads)), steps)
        step = np.arange(len(positions)) - np.repeat(np.cumsum(steps) - steps, steps)
        taken = positions[np.lexsort((positions, loads[positions] + step * weight))[:count]]
        loads += weight * np.bincount(taken, minlength=len(loads))
        self._heap = [(load, position) for position, load in enumerate(loads.tolist())]
        heapq.heapify(self._heap)
        targets: CaptureIndexes = np.array(self._captures, np.int16)[taken]
        return targets


def heaviest_first(rows: Rows, weight: F32) -> Rows:
    """Return the rows, heaviest first; rows: sorted; weight: of every row."""
    weights = weight[rows]
    return rows if not len(rows) or weights.min() == weights.max() else rows[np.argsort(-weights, kind="stable")]


def refuse_target(target: CaptureID, state: CaptureState | None, is_drained: bool) -> Reason | None:
    """Return why a move to the target is refused. state: None if there is no such capture."""
    if state is None:
        return JobReason.TARGET_UNKNOWN.of(target=target)
    reason = JobReason.TARGET_DRAINED if is_drained else _TARGET_NOT_READY.get(state)
    return reason.of(target=target) if reason is not None else None


def plan_move(inputs: PlanInput, rows: Sequence[int], target: int) -> list[Move]:
    """Return the moves that bring these rows to the target; empty if it is the Primary of each."""
    return [
        Move(row, int(inputs.primary[row]), target, float(inputs.weight[row]))
        for row in rows
        if inputs.primary[row] != target or inputs.state[row] != REPLICATING
    ]


def plan_drain(inputs: PlanInput, leaving: Collection[int], movable: Mask) -> Iterator[Move]:
    """Yield a move for each movable span of the leaving captures, in the order in which the moves
    should begin.

    leaving: capture indexes; none of them is a target. movable: a span that is moving already is
    left alone all the same.
    """
    targets = [capture for capture in inputs.captures if capture not in leaving]
    if not targets:
        return
    least_loaded = LeastLoaded(targets, inputs.loads())
    staying = np.flatnonzero(movable & (inputs.secondary == NO_CAPTURE) & np.isin(inputs.primary, list(leaving)))
    for row in heaviest_first(staying, inputs.weight).tolist():
        weight, failed_at = float(inputs.weight[row]), inputs.failed_at.get(row)
        target = least_loaded.take(weight, avoid=() if failed_at is None else (failed_at,))
        yield Move(row, int(inputs.primary[row]), target, weight)


def plan_rebalance(inputs: PlanInput, movable: Mask, stop_percent: int) -> list[Move]:
    """Return the fewest moves that even the loads out, in the order in which they should begin.

    Each takes one span from the most to the least loaded capture, until both are within
    stop_percent of the mean load or no move would help.
    """
    loads = inputs.loads()
    load = {capture: float(loads[capture]) for capture in inputs.captures}
    mean = sum(load.values()) / max(1, len(load))
    enough = mean * stop_percent / 100
    spans = _MovableSpans(inputs, movable)
    sources = list(load)
    moves: dict[int, Move] = {}
    while sources and len(moves) < PLANNED_MAX:
        source = max(sources, key=load.__getitem__)
        target = min(load, key=load.__getitem__)
        if load[source] <= mean or (load[source] - mean <= enough and mean - load[target] <= enough):
            break
        span = spans.take(source, load[source] - load[target])
        if span is None:
            sources.remove(source)  # none of its moves would help, and the gap does not grow again
            continue
        weight, row = span
        spans.add(target, span)
        load[source] -= weight
        load[target] += weight
        first = moves.pop(row, None)  # a span that is passed on moves once: from where it is to where it ends
        if first is None or first.source != target:
            moves[row] = Move(row, first.source if first is not None else source, target, weight)
    return list(moves.values())


class _MovableSpans:
    """The movable spans of each capture by weight, sorted when the capture first gives one away."""

    def __init__(self, inputs: PlanInput, movable: Mask) -> None:
        self._location, self._weight, self._movable = inputs.location(), inputs.weight, movable
        self._sorted: dict[int, list[tuple[float, int]]] = {}

    def take(self, capture: int, gap: float) -> tuple[float, int] | None:
        """Remove and return the span, (weight, row), whose move over this gap of loads leaves the
        smallest one; None if no move would help."""
        if capture not in self._sorted:
            rows = np.flatnonzero((self._location == capture) & self._movable)
            self._sorted[capture] = sorted(zip(self._weight[rows].tolist(), rows.tolist(), strict=True))
        spans = self._sorted[capture]
        half = bisect_left(spans, (gap / 2,))
        useful = [at for at in (half - 1, half) if 0 <= at < len(spans) and spans[at][0] <= gap * MOVED_SHARE_MAX]
        return spans.pop(min(useful, key=lambda at: abs(gap - 2 * spans[at][0]))) if useful else None

    def add(self, capture: int, span: tuple[float, int]) -> None:
        self._location[span[1]] = capture
        if capture in self._sorted:
            insort(self._sorted[capture], span)
