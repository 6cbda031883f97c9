from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Owner(_message.Message):
    __slots__ = ("id", "address", "version", "leading")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEADING_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    version: str
    leading: bool
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., leading: bool = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("cluster", "answered_by", "version", "leader", "leader_revision", "owners", "captures_by_state", "changefeeds_by_state", "braked", "problem")
    class CapturesByStateEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ChangefeedsByStateEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_BY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEADER_FIELD_NUMBER: _ClassVar[int]
    LEADER_REVISION_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    CAPTURES_BY_STATE_FIELD_NUMBER: _ClassVar[int]
    CHANGEFEEDS_BY_STATE_FIELD_NUMBER: _ClassVar[int]
    BRAKED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    cluster: str
    answered_by: str
    version: str
    leader: Owner
    leader_revision: int
    owners: _containers.RepeatedCompositeFieldContainer[Owner]
    captures_by_state: _containers.ScalarMap[str, int]
    changefeeds_by_state: _containers.ScalarMap[str, int]
    braked: _containers.RepeatedScalarFieldContainer[str]
    problem: str
    def __init__(self, cluster: _Optional[str] = ..., answered_by: _Optional[str] = ..., version: _Optional[str] = ..., leader: _Optional[_Union[Owner, _Mapping]] = ..., leader_revision: _Optional[int] = ..., owners: _Optional[_Iterable[_Union[Owner, _Mapping]]] = ..., captures_by_state: _Optional[_Mapping[str, int]] = ..., changefeeds_by_state: _Optional[_Mapping[str, int]] = ..., braked: _Optional[_Iterable[str]] = ..., problem: _Optional[str] = ...) -> None: ...

class ResignRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResignResponse(_message.Message):
    __slots__ = ("owner_id",)
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    owner_id: str
    def __init__(self, owner_id: _Optional[str] = ...) -> None: ...

class ListCapturesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Capture(_message.Message):
    __slots__ = ("id", "address", "version", "state", "spans", "draining", "labels", "spans_by_changefeed", "remaining", "reasons")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class SpansByChangefeedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SPANS_BY_CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    version: str
    state: str
    spans: int
    draining: bool
    labels: _containers.ScalarMap[str, str]
    spans_by_changefeed: _containers.ScalarMap[str, int]
    remaining: int
    reasons: _containers.ScalarMap[str, int]
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[str] = ..., spans: _Optional[int] = ..., draining: bool = ..., labels: _Optional[_Mapping[str, str]] = ..., spans_by_changefeed: _Optional[_Mapping[str, int]] = ..., remaining: _Optional[int] = ..., reasons: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ListCapturesResponse(_message.Message):
    __slots__ = ("captures",)
    CAPTURES_FIELD_NUMBER: _ClassVar[int]
    captures: _containers.RepeatedCompositeFieldContainer[Capture]
    def __init__(self, captures: _Optional[_Iterable[_Union[Capture, _Mapping]]] = ...) -> None: ...

class DrainCaptureRequest(_message.Message):
    __slots__ = ("capture", "cancel")
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    capture: str
    cancel: bool
    def __init__(self, capture: _Optional[str] = ..., cancel: bool = ...) -> None: ...

class GetDrainRequest(_message.Message):
    __slots__ = ("capture",)
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    capture: str
    def __init__(self, capture: _Optional[str] = ...) -> None: ...

class DrainCaptureResponse(_message.Message):
    __slots__ = ("capture", "draining", "remaining", "reasons", "gone", "note")
    class ReasonsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    capture: str
    draining: bool
    remaining: int
    reasons: _containers.ScalarMap[str, int]
    gone: bool
    note: str
    def __init__(self, capture: _Optional[str] = ..., draining: bool = ..., remaining: _Optional[int] = ..., reasons: _Optional[_Mapping[str, int]] = ..., gone: bool = ..., note: _Optional[str] = ...) -> None: ...

class CreateChangefeedRequest(_message.Message):
    __slots__ = ("changefeed", "source_uri", "sink_uri", "tables", "skip_snapshot", "options", "dry_run", "target_ts")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_URI_FIELD_NUMBER: _ClassVar[int]
    SINK_URI_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SKIP_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    TARGET_TS_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    source_uri: str
    sink_uri: str
    tables: _containers.RepeatedScalarFieldContainer[str]
    skip_snapshot: bool
    options: _containers.ScalarMap[str, str]
    dry_run: bool
    target_ts: int
    def __init__(self, changefeed: _Optional[str] = ..., source_uri: _Optional[str] = ..., sink_uri: _Optional[str] = ..., tables: _Optional[_Iterable[str]] = ..., skip_snapshot: bool = ..., options: _Optional[_Mapping[str, str]] = ..., dry_run: bool = ..., target_ts: _Optional[int] = ...) -> None: ...

class UpdateChangefeedRequest(_message.Message):
    __slots__ = ("changefeed", "tables", "options", "unset_options")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    UNSET_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    tables: _containers.RepeatedScalarFieldContainer[str]
    options: _containers.ScalarMap[str, str]
    unset_options: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, changefeed: _Optional[str] = ..., tables: _Optional[_Iterable[str]] = ..., options: _Optional[_Mapping[str, str]] = ..., unset_options: _Optional[_Iterable[str]] = ...) -> None: ...

class ChangefeedRequest(_message.Message):
    __slots__ = ("changefeed",)
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    def __init__(self, changefeed: _Optional[str] = ...) -> None: ...

class ListChangefeedsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListChangefeedsResponse(_message.Message):
    __slots__ = ("changefeeds",)
    CHANGEFEEDS_FIELD_NUMBER: _ClassVar[int]
    changefeeds: _containers.RepeatedCompositeFieldContainer[Changefeed]
    def __init__(self, changefeeds: _Optional[_Iterable[_Union[Changefeed, _Mapping]]] = ...) -> None: ...

class RemoveChangefeedResponse(_message.Message):
    __slots__ = ("changefeed",)
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    def __init__(self, changefeed: _Optional[str] = ...) -> None: ...

class Changefeed(_message.Message):
    __slots__ = ("changefeed", "state", "error", "epoch", "source_uri", "sink_uri", "tables", "skip_snapshot", "start_ts", "target_ts", "options", "running", "initialized", "checkpoint_ts", "resolved_ts", "last_synced_ts", "source_ts", "lag", "retained_bytes", "spans", "spans_by_state", "stalls", "slowest", "jobs", "rows_per_s", "bytes_per_s")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class SpansByStateEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class StallsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_URI_FIELD_NUMBER: _ClassVar[int]
    SINK_URI_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SKIP_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    START_TS_FIELD_NUMBER: _ClassVar[int]
    TARGET_TS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    INITIALIZED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_TS_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_TS_FIELD_NUMBER: _ClassVar[int]
    LAST_SYNCED_TS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_TS_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    RETAINED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    SPANS_BY_STATE_FIELD_NUMBER: _ClassVar[int]
    STALLS_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    state: str
    error: str
    epoch: int
    source_uri: str
    sink_uri: str
    tables: _containers.RepeatedScalarFieldContainer[str]
    skip_snapshot: bool
    start_ts: int
    target_ts: int
    options: _containers.ScalarMap[str, str]
    running: bool
    initialized: bool
    checkpoint_ts: int
    resolved_ts: int
    last_synced_ts: int
    source_ts: int
    lag: int
    retained_bytes: int
    spans: int
    spans_by_state: _containers.ScalarMap[str, int]
    stalls: _containers.ScalarMap[str, int]
    slowest: TableRow
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    rows_per_s: float
    bytes_per_s: float
    def __init__(self, changefeed: _Optional[str] = ..., state: _Optional[str] = ..., error: _Optional[str] = ..., epoch: _Optional[int] = ..., source_uri: _Optional[str] = ..., sink_uri: _Optional[str] = ..., tables: _Optional[_Iterable[str]] = ..., skip_snapshot: bool = ..., start_ts: _Optional[int] = ..., target_ts: _Optional[int] = ..., options: _Optional[_Mapping[str, str]] = ..., running: bool = ..., initialized: bool = ..., checkpoint_ts: _Optional[int] = ..., resolved_ts: _Optional[int] = ..., last_synced_ts: _Optional[int] = ..., source_ts: _Optional[int] = ..., lag: _Optional[int] = ..., retained_bytes: _Optional[int] = ..., spans: _Optional[int] = ..., spans_by_state: _Optional[_Mapping[str, int]] = ..., stalls: _Optional[_Mapping[str, int]] = ..., slowest: _Optional[_Union[TableRow, _Mapping]] = ..., jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., rows_per_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class ListTablesRequest(_message.Message):
    __slots__ = ("changefeed", "capture", "stalled", "table", "limit")
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    capture: str
    stalled: bool
    table: str
    limit: int
    def __init__(self, changefeed: _Optional[str] = ..., capture: _Optional[str] = ..., stalled: bool = ..., table: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class TableRow(_message.Message):
    __slots__ = ("table_id", "table", "start_key", "end_key", "state", "primary", "secondary", "checkpoint_ts", "resolved_ts", "state_age_ms", "stall_reason", "error", "rows_per_s", "bytes_per_s")
    TABLE_ID_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    START_KEY_FIELD_NUMBER: _ClassVar[int]
    END_KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    SECONDARY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_TS_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_TS_FIELD_NUMBER: _ClassVar[int]
    STATE_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    STALL_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    table_id: int
    table: str
    start_key: bytes
    end_key: bytes
    state: str
    primary: str
    secondary: str
    checkpoint_ts: int
    resolved_ts: int
    state_age_ms: int
    stall_reason: str
    error: str
    rows_per_s: float
    bytes_per_s: float
    def __init__(self, table_id: _Optional[int] = ..., table: _Optional[str] = ..., start_key: _Optional[bytes] = ..., end_key: _Optional[bytes] = ..., state: _Optional[str] = ..., primary: _Optional[str] = ..., secondary: _Optional[str] = ..., checkpoint_ts: _Optional[int] = ..., resolved_ts: _Optional[int] = ..., state_age_ms: _Optional[int] = ..., stall_reason: _Optional[str] = ..., error: _Optional[str] = ..., rows_per_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class ListTablesResponse(_message.Message):
    __slots__ = ("changefeed", "tables", "truncated")
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    tables: _containers.RepeatedCompositeFieldContainer[TableRow]
    truncated: bool
    def __init__(self, changefeed: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[TableRow, _Mapping]]] = ..., truncated: bool = ...) -> None: ...

class MoveTableRequest(_message.Message):
    __slots__ = ("changefeed", "table", "target", "wait_done", "wait_ms")
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WAIT_DONE_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    table: str
    target: str
    wait_done: bool
    wait_ms: int
    def __init__(self, changefeed: _Optional[str] = ..., table: _Optional[str] = ..., target: _Optional[str] = ..., wait_done: bool = ..., wait_ms: _Optional[int] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("changefeed", "wait_done", "wait_ms")
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    WAIT_DONE_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    wait_done: bool
    wait_ms: int
    def __init__(self, changefeed: _Optional[str] = ..., wait_done: bool = ..., wait_ms: _Optional[int] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("changefeed", "kind", "target", "capture", "state", "reason", "id", "by", "moves_done", "moves_left")
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    MOVES_DONE_FIELD_NUMBER: _ClassVar[int]
    MOVES_LEFT_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    kind: str
    target: str
    capture: str
    state: str
    reason: str
    id: str
    by: str
    moves_done: int
    moves_left: int
    def __init__(self, changefeed: _Optional[str] = ..., kind: _Optional[str] = ..., target: _Optional[str] = ..., capture: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., id: _Optional[str] = ..., by: _Optional[str] = ..., moves_done: _Optional[int] = ..., moves_left: _Optional[int] = ...) -> None: ...

class PlanMoveRequest(_message.Message):
    __slots__ = ("changefeed", "table", "target")
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    table: str
    target: str
    def __init__(self, changefeed: _Optional[str] = ..., table: _Optional[str] = ..., target: _Optional[str] = ...) -> None: ...

class PlanDrainRequest(_message.Message):
    __slots__ = ("capture",)
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    capture: str
    def __init__(self, capture: _Optional[str] = ...) -> None: ...

class PlanRebalanceRequest(_message.Message):
    __slots__ = ("changefeed",)
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    def __init__(self, changefeed: _Optional[str] = ...) -> None: ...

class PlannedMove(_message.Message):
    __slots__ = ("changefeed", "table_id", "table", "start_key", "end_key", "source", "target", "weight", "reason")
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    TABLE_ID_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    START_KEY_FIELD_NUMBER: _ClassVar[int]
    END_KEY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    changefeed: str
    table_id: int
    table: str
    start_key: bytes
    end_key: bytes
    source: str
    target: str
    weight: float
    reason: str
    def __init__(self, changefeed: _Optional[str] = ..., table_id: _Optional[int] = ..., table: _Optional[str] = ..., start_key: _Optional[bytes] = ..., end_key: _Optional[bytes] = ..., source: _Optional[str] = ..., target: _Optional[str] = ..., weight: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("changefeeds", "moves", "load_before", "load_after", "note")
    class LoadBeforeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class LoadAfterEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CHANGEFEEDS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    LOAD_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOAD_AFTER_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    changefeeds: _containers.RepeatedScalarFieldContainer[str]
    moves: _containers.RepeatedCompositeFieldContainer[PlannedMove]
    load_before: _containers.ScalarMap[str, float]
    load_after: _containers.ScalarMap[str, float]
    note: str
    def __init__(self, changefeeds: _Optional[_Iterable[str]] = ..., moves: _Optional[_Iterable[_Union[PlannedMove, _Mapping]]] = ..., load_before: _Optional[_Mapping[str, float]] = ..., load_after: _Optional[_Mapping[str, float]] = ..., note: _Optional[str] = ...) -> None: ...

class ListEventsRequest(_message.Message):
    __slots__ = ("limit", "after", "follow")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: int
    follow: bool
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[int] = ..., follow: bool = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("sequence", "at", "kind", "owner", "owner_revision", "changefeed", "subject", "text", "why", "by", "job")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    OWNER_REVISION_FIELD_NUMBER: _ClassVar[int]
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at: str
    kind: str
    owner: str
    owner_revision: int
    changefeed: str
    subject: str
    text: str
    why: str
    by: str
    job: str
    def __init__(self, sequence: _Optional[int] = ..., at: _Optional[str] = ..., kind: _Optional[str] = ..., owner: _Optional[str] = ..., owner_revision: _Optional[int] = ..., changefeed: _Optional[str] = ..., subject: _Optional[str] = ..., text: _Optional[str] = ..., why: _Optional[str] = ..., by: _Optional[str] = ..., job: _Optional[str] = ...) -> None: ...

class ListEventsResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...
