"""What stands in etcd, as frozen records in versioned JSON; and URIs that may hold secrets.

`encode` and `decode` are the only way in and out. A record that is older (fields missing) gets their defaults; one that is
newer (fields unknown here) is read, and **keeps** those fields in `unknown`, so that a service of the former version that
changes a record during a rolling upgrade writes back what it did not understand. A record whose `format` is higher than ours
is refused: its writer said that it cannot be read by us. What cannot be read is an OperatingError that names the key.

A URI is stored as it was written: `${VAR}` stays so. `resolve_uri` expands it where the URI is used, `redact_uri` hides what
is secret wherever a text is shown. Pure; any thread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import quote

import msgspec

from tablewire.errors import ConfigError, OperatingError
from tablewire.types import TS_MAX, CaptureInfo, ChangefeedID, LivenessState, ProtocolVersions

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
    for it (`owner.callers`), empty when nobody did. job: the id of the job that it belongs to. No secrets.
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


# ---------------------------------------------------------------------------------------------------------------------
# URIs

HIDDEN = "***"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_AUTHORITY = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]{0,30}://)(?P<rest>[^\s?#\"'<>]*)")
_UNENCODED = re.compile(
    r"(?P<start>[A-Za-z][A-Za-z0-9+.\-]{0,30}://[^\s:/@?#\"'<>]{0,128}:)"
    r"(?!\d{1,5}(?:$|[\s\"'<>(),;/#]|\?[^@\s]*=))"  # a port
    r"(?P<password>[^\n@]{0,512}(?:@[^\s@]{0,512}(?=@)){0,9})@"
)
"""A password with characters that a URI cannot have (a space, a quote, a question mark): it ends at the next '@' all the same.
The bounds keep the time linear, whatever the text."""
_SECRET_NAME = r"(?P<name>\b\w{0,64}?(?:password|passwd|secret|token)\w{0,64}[\"']?\s*[=:]\s*)"
_SECRET_PARAMETER = re.compile(rf"(?<=[?&]){_SECRET_NAME}(?P<value>[^\s&]+)", re.IGNORECASE)
_SECRET_FIELD = re.compile(
    rf"(?<![?&]){_SECRET_NAME}(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|(?:\\.|\S)+)", re.IGNORECASE
)
_AROUND = "\"'<>(),.;:"
"""What may stand round a URI in a text."""


def resolve_uri(text: str, environ: Mapping[str, str]) -> str:
    """The text with every `${VAR}` replaced by the variable's value; ConfigError when one is not set.

    A value within a URI's user part or query is percent-encoded, so that any password works as it is; elsewhere (the whole
    URI, a host, a path) it is taken literally. Values are not expanded again.
    """
    authority = text.find("://")
    path = _first(text, "/", authority + 3)
    user_end = text.rfind("@", 0, path) if authority >= 0 else -1
    query = _first(text, "?", 0)

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in environ:
            raise ConfigError(f"{redact_uri(text)}: environment variable {name} is not set")
        is_part = match.start() < user_end or match.start() > query
        return quote(environ[name], safe="") if is_part else environ[name]

    return _VARIABLE.sub(value, text)


def redact_uri(text: str) -> str:
    """The text with every password in it hidden: in URIs anywhere in it, and in `password=…` fields. A password that is
    written as `${VAR}` is no secret and stays."""
    if "://" in text:
        text = _UNENCODED.sub(_hide_unencoded, _AUTHORITY.sub(_hide_user, text))
    return _SECRET_FIELD.sub(_hide_field, _SECRET_PARAMETER.sub(_hide_field, text))


def _hide_user(match: re.Match[str]) -> str:
    """Hides what stands between the user's colon and the last '@'. A raw '/' or '@' in a password is a mistake in a URI, and
    just then its text must not leak: so the last '@' of all counts, even where that hides a host and a path."""
    scheme, rest = match.group("scheme"), match.group("rest")
    user, colon, tail = rest.partition(":")
    password, at, host = tail.rpartition("@")
    if not colon or not at or "/" in user or "@" in user:
        return match.group()
    return f"{scheme}{user}:{_hide(password)}@{host}"


def _hide_unencoded(match: re.Match[str]) -> str:
    return f"{match.group('start')}{_hide(match.group('password'))}@"


def _hide_field(match: re.Match[str]) -> str:
    return match.group("name") + _hide(match.group("value"))


def _hide(secret: str) -> str:
    bare = secret.strip(_AROUND)
    return secret if not secret or _VARIABLE.fullmatch(bare) else HIDDEN


def _first(text: str, what: str, start: int) -> int:
    found = text.find(what, start)
    return len(text) if found < 0 else found
