"""Evening out: which spans should go from where to where, so that the loads end near their mean by the fewest moves.

Pure functions of columns, so that a dry run on a snapshot and the policy on the live rows decide alike. A span is moved only when
that makes the two captures more alike than they were, so no two rounds can undo each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from owner.core.tables import CaptureIndexes, Mask


@dataclass(frozen=True, slots=True)
class Move:
    """position: of the span in the columns that were given; source, target: capture indexes."""

    position: int
    source: int
    target: int
    weight: float


@dataclass(frozen=True, slots=True)
class Leveling:
    """Moves in the order in which they help most, and the loads by capture index."""

    moves: list[Move]
    before: dict[int, float]
    after: dict[int, float]


def level(
    location: CaptureIndexes,
    weight: npt.NDArray[np.float32],
    movable: Mask,
    captures: list[int],
    elsewhere: Mapping[int, float],
    stop_percent: int,
    moves_max: int,
) -> Leveling:
    """location: the capture that each span is at or is going to (negative: none); weight, movable: of each; shape (n,) all.

    captures: who takes part. elsewhere: what they carry for other changefeeds, by index. stop_percent: so far
    above the mean is good enough. At most moves_max moves.
    """
    held = location >= 0
    size = max(captures, default=-1) + 1
    size = max(size, int(location.max(initial=-1)) + 1)
    loads = np.bincount(location[held], weights=weight[held], minlength=size)
    load = {capture: float(loads[capture]) + elsewhere.get(capture, 0.0) for capture in captures}
    before = dict(load)
    moves: list[Move] = []
    if len(captures) < 2:
        return Leveling(moves, before, dict(load))
    mean = sum(load.values()) / len(load)
    enough = mean * stop_percent / 100
    shelves = {capture: _Shelf(location, weight, movable, capture) for capture in captures}
    givers = set(captures)
    while givers and len(moves) < moves_max:
        source = max(sorted(givers), key=lambda capture: load[capture])
        target = min(sorted(load), key=lambda capture: load[capture])
        gap = load[source] - load[target]
        if load[source] - mean <= enough and mean - load[target] <= enough:
            break
        if load[source] <= mean:
            break
        taken = shelves[source].take(gap)
        if taken is None:
            givers.discard(source)  # nothing of it would help
            continue
        position, moved = taken
        moves.append(Move(position, source, target, moved))
        load[source] -= moved
        load[target] += moved
    return Leveling(moves, before, load)


class _Shelf:
    """The movable spans of one capture by weight, sorted when first needed."""

    def __init__(self, location: CaptureIndexes, weight: npt.NDArray[np.float32], movable: Mask, capture: int) -> None:
        self._columns = (location, weight, movable, capture)
        self._weights: list[float] | None = None
        self._positions: list[int] = []

    def take(self, gap: float) -> tuple[int, float] | None:
        """The span whose move helps most over this gap, (position, weight): the heaviest up to half of it, else the lightest that
        is less than all of it; None when each would only swap the two."""
        weights = self._sorted()
        at = bisect_right(weights, gap / 2) - 1
        if at < 0:
            at = 0
        if not weights or weights[at] >= gap:
            return None
        return self._positions.pop(at), weights.pop(at)

    def _sorted(self) -> list[float]:
        if self._weights is None:
            location, weight, movable, capture = self._columns
            positions = np.flatnonzero((location == capture) & movable)
            order = np.argsort(weight[positions], kind="stable")
            self._positions = positions[order].tolist()
            self._weights = weight[positions][order].astype(np.float64).tolist()
        return self._weights
