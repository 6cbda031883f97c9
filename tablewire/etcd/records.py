"""The records in etcd: frozen structs as versioned JSON, converted by `encode` and `decode`.

Missing fields of an older version get their defaults. Unknown fields of a newer version are
**kept** in `unknown`, so that a service of the previous version that changes a record during a
rolling upgrade writes them back. A record with a higher `format` is refused: its writer declares
that older versions cannot read it.

A URI is stored as written: `${VAR}` is not expanded (see `tablewire.runtime.uris`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from tablewire.errors import OperatingError
from tablewire.model.ids import TS_MAX, CaptureInfo, ChangefeedID
from tablewire.model.states import LivenessState
from tablewire.wire.versions import ProtocolVersions

FORMAT = 1
"""Raised only by a change that previous versions would misunderstand."""

Timestamp = Annotated[datetime, msgspec.Meta(tz=True)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class ChangefeedState(StrEnum):
    """WARNING: running, an error is retried. STOPPED: paused. FINISHED: the target is reached."""

    NORMAL = "normal"
    WARNING = "warning"
    FAILED = "failed"
    STOPPED = "stopped"
    FINISHED = "finished"
    REMOVED = "removed"

    @property
    def runs(self) -> bool:
        """Return whether the owner schedules a changefeed in this state."""
        return self in (ChangefeedState.NORMAL, ChangefeedState.WARNING)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records. unknown: the fields of a newer version; not a field of the JSON itself."""

    ts_fields: ClassVar[tuple[str, ...]] = ()

    format: int = FORMAT
    unknown: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.ts_fields:
            value = getattr(self, name)
            if not 0 <= value <= TS_MAX:
                raise ValueError(f"{name} = {value} is not an unsigned 64-bit number")


class LeaderRecord(Record, frozen=True, kw_only=True):
    """A candidate for leadership. address: host:port of its admin gRPC server."""

    id: str
    address: str
    version: str = ""


class _CaptureFields(Record, frozen=True, kw_only=True):
    id: str
    address: str
    version: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def info(self) -> CaptureInfo:
        return CaptureInfo(self.id, self.address, self.version, dict(self.labels))


class CaptureRecord(_CaptureFields, frozen=True, kw_only=True):
    """A processor process. address: host:port of its gRPC server."""

    started_at: Timestamp
    liveness: LivenessState = LivenessState.ALIVE
    protocol_lowest: Count = 1
    protocol_highest: Count = 1

    @property
    def protocols(self) -> ProtocolVersions:
        return ProtocolVersions(self.protocol_lowest, self.protocol_highest)


class ChangefeedInfo(Record, frozen=True, kw_only=True):
    """One replication job.

    version: of the software that created it. tables: the filter, see
    `tablewire.source.SourceRequest`. epoch: grows with every (re)start, see `next_epoch`. start_ts:
    0 until the source has been started. target_ts: 0 for no end. error: what stopped or disturbs
    it, empty if nothing does. asked_by: the caller who requested its last change, empty if the
    owner made it (the changefeed failed, or reached its target). generation: grows with each
    resync; what an earlier one has made at the source, and its progress, no longer count.
    """

    ts_fields: ClassVar[tuple[str, ...]] = ("start_ts", "target_ts")

    version: str = ""
    namespace: str = "default"
    id: str
    source_uri: str
    sink_uri: str
    tables: list[str]
    state: ChangefeedState = ChangefeedState.NORMAL
    epoch: Count = 1
    error: str = ""
    asked_by: str = ""
    created_at: Timestamp
    start_ts: int = 0
    target_ts: int = 0
    initial_snapshot: bool = True
    options: dict[str, str] = msgspec.field(default_factory=dict)
    generation: Count = 0

    @property
    def changefeed(self) -> ChangefeedID:
        return ChangefeedID(self.namespace, self.id)


class ChangefeedStatus(Record, frozen=True, kw_only=True):
    """The progress of a changefeed when this was written. generation: of its ChangefeedInfo."""

    ts_fields: ClassVar[tuple[str, ...]] = ("checkpoint_ts", "resolved_ts")

    checkpoint_ts: int
    resolved_ts: int
    generation: Count = 0


class DrainRecord(Record, frozen=True, kw_only=True):
    """A capture that is being drained. requested_by: as `by` in EventRecord."""

    capture_id: str
    requested_at: Timestamp
    requested_by: str = ""


class EvictionRecord(_CaptureFields, frozen=True, kw_only=True):
    """A capture whose key was removed before its lease expired, and which may not have stopped yet.

    lease: of its key, to be revoked; 0 if it had none. fenced: its sinks refuse what it writes.
    """

    lease: Count = 0
    fenced: bool = False
    requested_at: Timestamp


class EventRecord(Record, frozen=True, kw_only=True):
    """One event of the cluster, for people; it contains no secrets.

    kind: a snake_case word. owner: the leader that recorded it. changefeed: empty if it concerns
    the whole cluster. subject: the capture, table or owner that it concerns. by: the caller who
    requested it (`owner.admin.caller_identity`), empty if there is none. job: the id of its job.
    """

    at: Timestamp
    kind: str
    owner: str
    owner_revision: int = 0
    changefeed: str = ""
    subject: str = ""
    text: str = ""
    why: str = ""
    by: str = ""
    job: str = ""


_R = TypeVar("_R", bound=Record)


def now() -> datetime:
    """Return the wall clock in UTC, for timestamps that are shown to people and never compared."""
    return datetime.now(UTC)


def next_epoch(previous: int, revision: int) -> int:
    """Return the epoch of a changefeed's next start. revision: of etcd, read just now.

    It is above the previous epoch and not below the revision. Revisions only grow, so a changefeed
    that is removed and created again starts above all its former epochs, which a sink may still
    hold.
    """
    return max(previous + 1, revision)


def encode(record: Record) -> bytes:
    """Return the record as JSON, with the fields that were unknown when it was read."""
    fields = msgspec.to_builtins(record)
    unknown = fields.pop("unknown")
    return msgspec.json.encode({**unknown, **fields})


def decode(kind: type[_R], key: str, value: bytes) -> _R:
    """Return the record; raise OperatingError, which names the key, if it is unreadable."""
    try:
        fields = msgspec.json.decode(value)
        if not isinstance(fields, dict):
            raise OperatingError(f"etcd key {key}: unreadable {kind.__name__}: not a JSON object")
        written = fields.get("format", FORMAT)
        if isinstance(written, int) and written > FORMAT:
            raise OperatingError(
                f"etcd key {key}: {kind.__name__} of format {written}, this version reads up to {FORMAT}: upgrade"
            )
        known = set(kind.__struct_fields__) - {"unknown"}
        fields["unknown"] = {name: field for name, field in fields.items() if name not in known}
        return msgspec.convert(fields, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OperatingError(f"etcd key {key}: unreadable {kind.__name__}: {error}") from error
