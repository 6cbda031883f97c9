"""Records what the ticks of a changefeed report: in the metrics, the log and the history."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from owner.core.events import AuditFailed, Event, JobChanged, OrphansFound, SpanFailed, SpanMoved, SpansPlaced, TwoWriters
from owner.events.placement_counters import PlacementCounters
from owner.events.placement_history import PlacementHistory
from owner.events.placement_log import PlacementLog
from tablewire.model.ids import ChangefeedID
from tablewire.model.jobs import ENDED

NAMED_PER_TICK_MAX: Final = 5
COUNTS_INTERVAL_S: Final = 1.0


class EventRecorder:
    """The recorder of one changefeed in one term; the tick's thread.

    So that log and history do not grow with the tables, NAMED_PER_TICK_MAX events of a kind are
    recorded one by one in a tick. The others are counted, and the counts are recorded at most once
    in COUNTS_INTERVAL_S.
    """

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
        self._clock = clock
        self._placed: Counter[str] = Counter()
        self._trouble: Counter[str] = Counter()
        self._jobs_ended = 0
        self._counts_at_s = clock() - COUNTS_INTERVAL_S
        counters.begin(self._changefeed)

    def record(self, events: Sequence[Event]) -> None:
        """Record all events of one tick. Also called when there are none, since counts may be due."""
        named: Counter[type[Event]] = Counter()
        for event in events:
            self._counters.count(self._changefeed, event)
            match event:
                case JobChanged(job) if job.state not in ENDED:
                    pass
                case SpansPlaced(counts):
                    self._placed.update(counts)
                case OrphansFound(spans):
                    self._trouble["orphans"] += spans
                case AuditFailed():
                    self._trouble["audit_failures"] += 1
                case _ if named[type(event)] < NAMED_PER_TICK_MAX:
                    named[type(event)] += 1
                    self._record(event)
                case TwoWriters():
                    self._trouble["two_writers"] += 1
                case SpanFailed():
                    self._trouble["spans_failed"] += 1
                case JobChanged():
                    self._jobs_ended += 1
        if self._clock() - self._counts_at_s >= COUNTS_INTERVAL_S:
            self._record_counts()
        if self._history is not None:
            self._history.flush()

    def close(self) -> None:
        """Record the counts that are not due yet."""
        self._record_counts()
        if self._history is not None:
            self._history.flush(at_once=True)

    def _record(self, event: Event) -> None:
        if isinstance(event, SpanMoved):
            self._placed[event.why] -= 1  # it is named, and SpansPlaced counts it too
        self._log.write(event)
        if self._history is not None:
            self._history.add(event)

    def _record_counts(self) -> None:
        counts = ({str(why): count for why, count in sorted((+self._placed).items())}, +self._trouble, self._jobs_ended)
        if any(counts):
            self._counts_at_s, self._jobs_ended = self._clock(), 0
            self._placed.clear()
            self._trouble.clear()
            self._log.write_counts(*counts)
            if self._history is not None:
                self._history.add_counts(*counts)
