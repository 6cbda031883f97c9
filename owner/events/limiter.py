"""Bounds what is recorded of the events of a changefeed, so that log and history do not grow with the tables."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from owner.core.events import (
    AuditFailed,
    Event,
    JobChanged,
    MoreEvents,
    OrphansFound,
    SpanFailed,
    SpanMoved,
    SpansPlaced,
    TwoWriters,
)
from tablewire.model.jobs import ENDED

NAMED_PER_TICK_MAX: Final = 5
COUNTS_INTERVAL_S: Final = 1.0

_TROUBLE: Final[Mapping[type[Any], str]] = {
    TwoWriters: "two_writers",
    OrphansFound: "orphans",
    AuditFailed: "audit_failures",
    SpanFailed: "spans_failed",
}


@dataclass(frozen=True, slots=True)
class MoreSpansPlaced:
    """How many spans were placed without being named, by PlacementReason."""

    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MoreJobsEnded:
    jobs: int


@dataclass(frozen=True, slots=True)
class PlacementTrouble:
    """What should not happen and was not named: two_writers, orphans, audit_failures, spans_failed."""

    counts: Mapping[str, int]


RecordedEvent = Event | MoreSpansPlaced | MoreJobsEnded | PlacementTrouble


class EventLimiter:
    """Passes NAMED_PER_TICK_MAX events of each kind on and counts the others; the counts are passed on at most once in
    COUNTS_INTERVAL_S. One object for each changefeed; the tick's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._placed: Counter[str] = Counter()
        self._trouble: Counter[str] = Counter()
        self._jobs_ended = 0
        self._counts_at_s = clock() - COUNTS_INTERVAL_S

    def limit(self, events: Sequence[Event]) -> list[RecordedEvent]:
        """events: all of one tick."""
        passed: list[RecordedEvent] = []
        named: Counter[type[Any]] = Counter()
        for event in events:
            match event:
                case JobChanged() if event.job.state not in ENDED:
                    pass
                case SpansPlaced():
                    self._placed.update(event.counts)
                case OrphansFound():
                    self._count(OrphansFound, event.spans)
                case AuditFailed():
                    self._count(AuditFailed, 1)
                case MoreEvents():
                    self._count(event.kind, event.count)
                case _ if named[type(event)] == NAMED_PER_TICK_MAX:
                    self._count(type(event), 1)
                case _:
                    named[type(event)] += 1
                    passed.append(event)
                    if isinstance(event, SpanMoved):
                        self._placed[event.why] -= 1
        return [*passed, *self._take_counts()]

    def _count(self, kind: type[Any], count: int) -> None:
        """Count events that are not named. Those of SpanMoved are in SpansPlaced."""
        if kind is JobChanged:
            self._jobs_ended += count
        elif kind in _TROUBLE:
            self._trouble[_TROUBLE[kind]] += count

    def _take_counts(self) -> list[RecordedEvent]:
        placed, trouble, jobs = +self._placed, +self._trouble, self._jobs_ended
        now_s = self._clock()
        if not (placed or trouble or jobs) or now_s - self._counts_at_s < COUNTS_INTERVAL_S:
            return []
        self._counts_at_s = now_s
        self._placed.clear()
        self._trouble.clear()
        self._jobs_ended = 0
        counts: list[RecordedEvent] = []
        if trouble:
            counts.append(PlacementTrouble({name: trouble[name] for name in _TROUBLE.values() if name in trouble}))
        if jobs:
            counts.append(MoreJobsEnded(jobs))
        if placed:
            counts.append(MoreSpansPlaced({str(why): placed[why] for why in sorted(placed)}))
        return counts
