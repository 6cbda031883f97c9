"""What a tick reports besides its messages: small frozen events for the log, the metrics and the history (owner/events).

The number of events of one tick is bounded: EVENTS_OF_A_KIND_MAX of each kind, and a MoreEvents with the number of the
others. JobChanged is bounded by the number of jobs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tablewire.model.ids import CaptureID
from tablewire.model.jobs import JobView
from tablewire.model.spans import Span

EVENTS_OF_A_KIND_MAX = 256


class PlacementReason(StrEnum):
    """Why a span was placed at a capture. ADD: the table is new, or its capture failed. BALANCE: with or without a job."""

    ADD = "add"
    MOVE = "move"
    DRAIN = "drain"
    BALANCE = "balance"


@dataclass(frozen=True, slots=True)
class BootstrapDone:
    """Placement was rebuilt from the reports of the captures. spans: how many there are."""

    spans: int


@dataclass(frozen=True, slots=True)
class SpanMoved:
    """A planned move ended: the span replicates at `target`. job_id: the job that asked for the move, 0 = none."""

    span: Span
    source: CaptureID
    target: CaptureID
    why: PlacementReason
    job_id: int = 0
    asked_by: str = ""


@dataclass(frozen=True, slots=True)
class SpansPlaced:
    """How many spans began to replicate where they were placed, those of SpanMoved included."""

    counts: Mapping[PlacementReason, int]


@dataclass(frozen=True, slots=True)
class SpanFailed:
    """A span failed at a capture, with an error that is new for it. It is retried after a backoff."""

    span: Span
    error: str


@dataclass(frozen=True, slots=True)
class TwoWriters:
    """Two captures reported to write one span; the one with the newest permission stays."""

    span: Span
    stays: CaptureID
    goes: CaptureID


@dataclass(frozen=True, slots=True)
class OrphansFound:
    """Captures reported spans that were not assigned to them."""

    spans: int


@dataclass(frozen=True, slots=True)
class AuditFailed:
    """A capture holds other spans than this owner expected."""

    capture: CaptureID


@dataclass(frozen=True, slots=True)
class FailoverBegan:
    """Captures that wrote spans are gone. spans: how many lost their writer."""

    captures: tuple[CaptureID, ...]
    spans: int


@dataclass(frozen=True, slots=True)
class FailoverDone:
    """Every span has a writer again. spans: how many had lost theirs, took_ms: since the first of them."""

    spans: int
    took_ms: int


@dataclass(frozen=True, slots=True)
class GuardEngaged:
    """The mass-failure guard holds placement back."""

    spans_waiting: int
    captures_left: int


@dataclass(frozen=True, slots=True)
class GuardReleased:
    captures: int


@dataclass(frozen=True, slots=True)
class JobChanged:
    """The state or the reason of a job changed. Its handle is updated from this event."""

    job: JobView


@dataclass(frozen=True, slots=True)
class MoreEvents:
    """How many more events of this kind there were."""

    kind: type[Any]
    count: int


Event = (
    BootstrapDone
    | SpanMoved
    | SpansPlaced
    | SpanFailed
    | TwoWriters
    | OrphansFound
    | AuditFailed
    | FailoverBegan
    | FailoverDone
    | GuardEngaged
    | GuardReleased
    | JobChanged
    | MoreEvents
)


@dataclass(slots=True)
class TickEvents:
    """Collects the events of one tick, a bounded number of each kind."""

    events: list[Event] = field(default_factory=list)
    counts: Counter[type[Any]] = field(default_factory=Counter)

    def add(self, event: Event) -> None:
        self.counts[type(event)] += 1
        if self.counts[type(event)] <= EVENTS_OF_A_KIND_MAX:
            self.events.append(event)

    def take(self, changed_jobs: Sequence[JobChanged]) -> tuple[Event, ...]:
        """Return the events since the last call, the changes of jobs last."""
        more = [
            MoreEvents(kind, count - EVENTS_OF_A_KIND_MAX) for kind, count in self.counts.items() if count > EVENTS_OF_A_KIND_MAX
        ]
        taken = (*self.events, *more, *changed_jobs)
        self.events, self.counts = [], Counter()
        return taken
