"""Records what the ticks of one changefeed report: in the metrics, the log and the history."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from owner.core.events import Event
from owner.events.limiter import EventLimiter
from owner.events.placement_counters import PlacementCounters
from owner.events.placement_history import PlacementHistory
from owner.events.placement_log import PlacementLog
from tablewire.model.ids import ChangefeedID


class EventRecorder:
    """One object for each changefeed and term; the tick's thread."""

    def __init__(
        self,
        changefeed: ChangefeedID,
        counters: PlacementCounters,
        history: PlacementHistory | None = None,
        *,
        owner_revision: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changefeed = str(changefeed)
        self._counters = counters
        self._log = PlacementLog(changefeed, owner_revision)
        self._history = history
        self._limiter = EventLimiter(clock)
        counters.begin(self._changefeed)

    def record(self, events: Sequence[Event]) -> None:
        """events: all of one tick, also when there are none: counts that have waited may be due."""
        self._counters.count(self._changefeed, events)
        for event in self._limiter.limit(events):
            self._log.write(event)
            if self._history is not None:
                self._history.add(event)
