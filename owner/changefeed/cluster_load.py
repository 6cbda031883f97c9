"""The load of each processor over all changefeeds, so that a scheduler balances the cluster and not
only its own changefeed.

Schedulers tick one after another. Each sees the load of the other changefeeds at that moment,
including what those that ticked before it in this round have just planned. So the first one moves
spans, and the next ones find nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tablewire.model.ids import CaptureID

Loads = Mapping[CaptureID, float]
"""Weight by capture."""


class ClusterLoad:
    """The loads of one round. The tick's thread."""

    def __init__(self, loads: Iterable[Loads]) -> None:
        """loads: one mapping for each changefeed."""
        self._total: dict[CaptureID, float] = {}
        for load in loads:
            self._add(load, 1)

    def without(self, own: Loads) -> Loads:
        """Return the load of the other changefeeds. own: the load of this one, which is part of the
        total."""
        return {capture: max(0.0, load - own.get(capture, 0.0)) for capture, load in self._total.items()}

    def replace(self, before: Loads, after: Loads) -> None:
        """Replace the load of a changefeed that has ticked."""
        self._add(before, -1)
        self._add(after, 1)

    def _add(self, load: Loads, sign: int) -> None:
        for capture, weight in load.items():
            self._total[capture] = self._total.get(capture, 0.0) + sign * weight
