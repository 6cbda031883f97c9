"""What a tick reports besides its messages: small frozen events for the log, the metrics and the
history (owner/events).

There is at most one event for each job, and one for each span that failed or that a planned move
has brought to its target; spans that are placed in bulk are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tablewire.model.ids import CaptureID
from tablewire.model.jobs import JobView
from tablewire.model.spans import Span


class PlacementReason(StrEnum):
    """Why a span was placed at a capture. ADD: the table is new, or its capture failed. BALANCE:
    with or without a job."""

    ADD = "add"
    MOVE = "move"
    DRAIN = "drain"
    BALANCE = "balance"


class Event:
    """Base class of the events of a tick."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class BootstrapDone(Event):
    """Placement was rebuilt from the reports of the captures. spans: how many there are."""

    spans: int


@dataclass(frozen=True, slots=True)
class SpanMoved(Event):
    """A planned move ended: the span replicates at `target`. job_id: the job that asked for the
    move, 0 = none."""

    span: Span
    source: CaptureID
    target: CaptureID
    why: PlacementReason
    job_id: int = 0
    asked_by: str = ""


@dataclass(frozen=True, slots=True)
class SpansPlaced(Event):
    """The number of spans that began to replicate on the capture they were placed on, those of SpanMoved included."""

    counts: Mapping[PlacementReason, int]


@dataclass(frozen=True, slots=True)
class SpanFailed(Event):
    """A span failed at a capture, with an error that is new for it. It is retried after a backoff."""

    span: Span
    error: str


@dataclass(frozen=True, slots=True)
class TwoWriters(Event):
    """Two captures reported to write one span; the one with the newest permission stays."""

    span: Span
    stays: CaptureID
    goes: CaptureID


@dataclass(frozen=True, slots=True)
class OrphansFound(Event):
    """Captures reported spans that were not assigned to them."""

    spans: int


@dataclass(frozen=True, slots=True)
class AuditFailed(Event):
    """A capture holds other spans than this owner expected."""

    capture: CaptureID


@dataclass(frozen=True, slots=True)
class FailoverBegan(Event):
    """Captures that wrote spans are gone. spans: how many lost their writer."""

    captures: tuple[CaptureID, ...]
    spans: int


@dataclass(frozen=True, slots=True)
class FailoverDone(Event):
    """Every span has a writer again. spans: how many had lost theirs, took_ms: since the first of
    them."""

    spans: int
    took_ms: int


@dataclass(frozen=True, slots=True)
class GuardEngaged(Event):
    """The mass-failure guard holds placement back."""

    spans_waiting: int
    captures_left: int


@dataclass(frozen=True, slots=True)
class GuardReleased(Event):
    captures: int


@dataclass(frozen=True, slots=True)
class JobChanged(Event):
    """The state or the reason of a job changed. Its handle is updated from this event."""

    job: JobView
