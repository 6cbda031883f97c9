"""What each capture carries over all changefeeds, so that a scheduler can even out the cluster and not its own part alone.

Schedulers tick one after the other. Each is told what the others carry as they stand at that moment, those that ticked before it
in this round with what they have just planned: so the first one moves, and the others see that nothing is left to do.
One thread: the tick's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tablewire.model.ids import CaptureID

Loads = Mapping[CaptureID, float]
"""Weight by capture."""


class ClusterLoad:
    """The loads of one round."""

    def __init__(self, loads: Iterable[Loads]) -> None:
        """loads: of each changefeed."""
        self._total: dict[CaptureID, float] = {}
        for load in loads:
            self._add(load, 1)

    def without(self, own: Loads) -> Loads:
        """What the other changefeeds carry. own: what is in the total of this one."""
        return {capture: max(0.0, load - own.get(capture, 0.0)) for capture, load in self._total.items()}

    def replace(self, before: Loads, after: Loads) -> None:
        """One changefeed has ticked."""
        self._add(before, -1)
        self._add(after, 1)

    def _add(self, load: Loads, sign: int) -> None:
        for capture, weight in load.items():
            self._total[capture] = self._total.get(capture, 0.0) + sign * weight
