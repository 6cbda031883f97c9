"""Where a span should go: the least loaded capture, by the weight of what each has or gets, over all changefeeds."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from owner.core.captures import Capture
from owner.core.state import Core
from owner.core.tables import NO_CAPTURE, CaptureIndexes


@dataclass(slots=True)
class Placement:
    """Loads of the candidates, kept up to date while one tick hands out spans. candidates: indexes; loads: shape as they."""

    candidates: list[int]
    loads: npt.NDArray[np.float64]

    @classmethod
    def of(cls, core: Core, captures: list[Capture]) -> Placement:
        loads = core.tables.loads(len(core.captures))
        candidates = [capture.index for capture in captures]
        elsewhere = [core.cluster_load.get(capture.id, 0.0) for capture in captures]
        return cls(candidates, loads[candidates] + np.array(elsewhere, np.float64))

    def spread(self, count: int) -> CaptureIndexes:
        """A target for each of `count` spans, so that the loads end as level as they can; shape (count,)."""
        if not count:
            return np.empty(0, np.int16)
        shares = _level(self.loads, count)
        self.loads += shares
        return np.repeat(np.array(self.candidates, np.int16), shares)

    def least(self, never: Set[int], rather_not: Set[int] = frozenset()) -> int:
        """The least loaded candidate for one span, NO_CAPTURE when every one is barred; counts it."""
        best, best_rank = NO_CAPTURE, (True, float("inf"))
        at = 0
        for position, candidate in enumerate(self.candidates):
            rank = (candidate in rather_not, float(self.loads[position]))
            if candidate not in never and rank < best_rank:
                best, best_rank, at = candidate, rank, position
        if best != NO_CAPTURE:
            self.loads[at] += 1
        return best


def _level(loads: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """How many of `count` spans each gets: fill the emptiest up to a common level; ties by position. Shape as loads."""
    order = np.argsort(loads, kind="stable")
    ordered = loads[order]
    takers = 1
    while takers < len(ordered) and ordered[takers] * takers - ordered[:takers].sum() < count:
        takers += 1
    level = (ordered[:takers].sum() + count) / takers
    shares = np.zeros(len(loads), np.int64)
    exact = np.maximum(level - ordered[:takers], 0)
    shares[order[:takers]] = np.floor(exact)
    rest = count - int(shares.sum())
    for position in order[:takers][np.argsort(-(exact - np.floor(exact)), kind="stable")][:rest]:
        shares[position] += 1
    return shares
