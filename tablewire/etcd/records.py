"""What stands in etcd, as frozen records in versioned JSON.

`encode` and `decode` are the only way in and out. A record that is older (fields missing) gets their defaults; one that is
newer (fields unknown here) is read, and **keeps** those fields in `unknown`, so that a service of the former version that
changes a record during a rolling upgrade writes back what it did not understand. A record whose `format` is higher than ours
is refused: its writer said that it cannot be read by us. What cannot be read is an OperatingError that names the key.

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
"""Raised only by a change that a former version must not read as if it understood it."""

Timestamp = Annotated[datetime, msgspec.Meta(tz=True)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class ChangefeedState(StrEnum):
    """normal; warning (running, an error is being retried); failed; stopped (paused); finished (target reached); removed."""

    NORMAL = "normal"
    WARNING = "warning"
    FAILED = "failed"
    STOPPED = "stopped"
    FINISHED = "finished"
    REMOVED = "removed"

    @property
    def runs(self) -> bool:
        """Whether the owner schedules a changefeed in this state."""
        return self in (ChangefeedState.NORMAL, ChangefeedState.WARNING)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records. `unknown` holds the fields of a newer version, and never appears as a field itself."""

    ts_fields: ClassVar[tuple[str, ...]] = ()

    format: int = FORMAT
    unknown: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.ts_fields:
            value = getattr(self, name)
            if not 0 <= value <= TS_MAX:
                raise ValueError(f"{name} = {value} is not an unsigned 64-bit number")


class CaptureRecord(Record, frozen=True, kw_only=True):
    """A processor process. address: host:port of its gRPC server; version: of its software.
    protocol_lowest, protocol_highest: the versions of the wire that it speaks."""

    id: str
    address: str
    version: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    started_at: Timestamp
    liveness: LivenessState = LivenessState.ALIVE
    protocol_lowest: Count = 1
    protocol_highest: Count = 1

    @property
    def protocols(self) -> ProtocolVersions:
        return ProtocolVersions(self.protocol_lowest, self.protocol_highest)

    @property
    def info(self) -> CaptureInfo:
        return CaptureInfo(self.id, self.address, self.version, dict(self.labels))


class LeaderRecord(Record, frozen=True, kw_only=True):
    """A candidate, and the leader when its key has the lowest create revision. address: host:port of its admin gRPC server."""

    id: str
    address: str
    version: str = ""


class ChangefeedInfo(Record, frozen=True, kw_only=True):
    """One replication job. version: of the software that created it.

    tables: the filter, see `tablewire.source.SourceRequest`. epoch: higher at every (re)start, also over a removal and a new
    creation under the same id (`next_epoch`). start_ts: 0 until the source has been started. target_ts: 0 = no end.
    error: what stopped or disturbs it, empty when nothing does. asked_by: who asked for its last change, empty when nobody did
    (it failed, or reached its target).
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

    @property
    def changefeed(self) -> ChangefeedID:
        return ChangefeedID(self.namespace, self.id)


class ChangefeedStatus(Record, frozen=True, kw_only=True):
    """How far a changefeed was known to be when this was written."""

    ts_fields: ClassVar[tuple[str, ...]] = ("checkpoint_ts", "resolved_ts")

    checkpoint_ts: int
    resolved_ts: int


class DrainRecord(Record, frozen=True, kw_only=True):
    """A capture that is to hold nothing. requested_by: who asked, as in EventRecord."""

    capture_id: str
    requested_at: Timestamp
    requested_by: str = ""


class EvictionRecord(Record, frozen=True, kw_only=True):
    """A capture whose key was taken away while its lease lived, and that may not have stopped yet. id to labels: as it was
    registered. lease: of its key, to be revoked; 0: it had none. fenced: its sinks are known to refuse what it writes."""

    id: str
    address: str
    version: str = ""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    lease: Count = 0
    fenced: bool = False
    requested_at: Timestamp

    @property
    def info(self) -> CaptureInfo:
        return CaptureInfo(self.id, self.address, self.version, dict(self.labels))


class EventRecord(Record, frozen=True, kw_only=True):
    """One thing that happened in the cluster, for people. kind: a snake_case word. owner: the leader that saw or did it.

    subject: a capture, a table, an owner, what it is about; changefeed: empty when it is about the whole cluster. by: who asked
    for it (`owner.admin.caller_identity`), empty when nobody did. job: the id of the job that it belongs to. No secrets.
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
    """The wall clock in UTC, for the timestamps of records (shown to people, never compared)."""
    return datetime.now(UTC)


def next_epoch(previous: int, revision: int) -> int:
    """The epoch of a changefeed's next start: above its previous one (0: none), and not below an etcd revision read just
    now. Revisions only grow, so a changefeed that is removed and created again starts above all its former epochs, which
    a sink may still remember."""
    return max(previous + 1, revision)


def encode(record: Record) -> bytes:
    """The record as JSON, with what was unknown when it was read."""
    fields = msgspec.to_builtins(record)
    unknown = fields.pop("unknown")
    return msgspec.json.encode({**unknown, **fields})


def decode(kind: type[_R], key: str, value: bytes) -> _R:
    """The record that stands at `key`. OperatingError (naming the key, never the value) when it cannot be read."""
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
