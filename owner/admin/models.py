"""What the operations answer, as frozen values, and the ways in which they refuse.

The same fields as the messages of admin.proto and the objects of `-o json`.

States, kinds and reasons are text (the lower-case names of `tablewire.model`). Ts and counts are ints, 0 = nothing known.
URIs are redacted before they get here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tablewire.errors import OperatingError
from tablewire.model.ids import CaptureID, TableID, Ts


@dataclass(frozen=True, slots=True)
class OwnerRow:
    id: str
    address: str
    version: str
    leading: bool


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """leader_revision: 0 on an owner that does not lead. *_by_state: counts. braked: changefeeds whose placement is held back
    because many captures vanished at once. problem: why the owner that answered cannot know more (etcd is out of its reach, say);
    "" = all is known."""

    cluster: str
    answered_by: str
    version: str
    leader: OwnerRow | None
    leader_revision: int
    owners: Sequence[OwnerRow]
    captures_by_state: Mapping[str, int]
    changefeeds_by_state: Mapping[str, int]
    braked: Sequence[str] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class CaptureRow:
    """state: over all changefeeds the one that asks for attention first; "idle" while no changefeed runs.
    spans: those that it writes. remaining, reasons: of its drain, None and empty while it is not drained."""

    id: CaptureID
    address: str
    version: str
    state: str
    spans: int
    draining: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    spans_by_changefeed: Mapping[str, int] = field(default_factory=dict)
    remaining: int | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DrainProgress:
    """remaining: spans that still touch the capture in any role; 0 while draining = safe to stop. reasons: why they are still
    there, by stall reason. gone: it has left. note: what holds everything up, and what to do; empty when it goes on."""

    capture: CaptureID
    draining: bool
    remaining: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    gone: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One span. table: `schema.table`, empty when not known. primary, secondary: empty = nobody. *_per_s: as the executor told
    last, None = no executor of this changefeed ever did."""

    table_id: TableID
    table: str
    start_key: bytes
    end_key: bytes
    state: str
    primary: CaptureID
    secondary: CaptureID
    checkpoint_ts: Ts
    resolved_ts: Ts
    state_age_ms: int
    stall_reason: str
    error: str
    rows_per_s: float | None = None
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class JobRow:
    """A manual job of the scheduler. target: what it is about (a table, a span, a capture); capture: where a move goes.
    id: it stands in events and in the logs of all processes that it touches; by: who asked. moves_done, moves_left: None = not
    known."""

    changefeed: str
    kind: str
    target: str
    capture: CaptureID
    state: str
    reason: str
    id: str = ""
    by: str = ""
    moves_done: int | None = None
    moves_left: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedMoveRow:
    """What a dry run would do with one span. table: `schema.table`, empty when not known."""

    changefeed: str
    table_id: TableID
    table: str
    start_key: bytes
    end_key: bytes
    source: CaptureID
    target: CaptureID
    weight: float
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A dry run. moves: in the order in which they would begin. load_*: over all changefeeds. note: why there are no (more)
    moves; may be empty."""

    changefeeds: Sequence[str]
    moves: Sequence[PlannedMoveRow]
    load_before: Mapping[CaptureID, float]
    load_after: Mapping[CaptureID, float]
    note: str = ""


@dataclass(frozen=True, slots=True)
class ChangefeedRow:
    """changefeed: `namespace/id`. lag: source_ts - checkpoint_ts in units of Ts, None = not known. jobs: those under way.
    *_per_s: over all spans, None = no executor gave statistics."""

    changefeed: str
    state: str
    error: str
    epoch: int
    source_uri: str
    sink_uri: str
    tables: Sequence[str]
    skip_snapshot: bool
    start_ts: Ts
    target_ts: Ts
    options: Mapping[str, str]
    running: bool
    initialized: bool
    checkpoint_ts: Ts
    resolved_ts: Ts
    last_synced_ts: Ts
    source_ts: Ts
    lag: int | None
    retained_bytes: int | None
    spans: int
    spans_by_state: Mapping[str, int]
    stalls: Mapping[str, int]
    slowest: TableRow | None
    jobs: Sequence[JobRow]
    rows_per_s: float | None = None
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened. at: RFC 3339, UTC. owner: the leader that saw or did it. changefeed: empty = the whole cluster.
    by: who asked for it; job: the id of its job; empty = nobody, none."""

    sequence: int
    at: str
    kind: str
    owner: str
    owner_revision: int
    changefeed: str
    subject: str
    text: str
    why: str
    by: str = ""
    job: str = ""


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """What of a paused changefeed shall change. tables: empty = the filter stays. options: these get new values, unset_options
    their defaults again."""

    changefeed: str
    tables: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    unset_options: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What `create` is told. changefeed: `id` or `namespace/id`. dry_run: check everything, store nothing. target_ts: where it
    stops, 0 = never."""

    changefeed: str
    source_uri: str
    sink_uri: str
    tables: Sequence[str]
    skip_snapshot: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    target_ts: Ts = 0


@dataclass(frozen=True, slots=True)
class TableFilter:
    """capture: in any role that is shown. stalled: only what is not steady. table: name or id. limit: 0 = all."""

    capture: str = ""
    stalled: bool = False
    table: str = ""
    limit: int = 0


class InvalidRequestError(OperatingError):
    """The request cannot be right, whatever the state of the cluster."""


class UnknownTableError(OperatingError, LookupError):
    """No table of this name or id is in the changefeed."""


class AlreadyExistsError(OperatingError):
    """A changefeed of this id exists."""


class RefusedError(OperatingError):
    """The state of the cluster does not allow what was asked; nothing was changed."""
