from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Batch(_message.Message):
    __slots__ = ("version", "sender", "receiver", "owner_revision", "active", "envelopes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    OWNER_REVISION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    ENVELOPES_FIELD_NUMBER: _ClassVar[int]
    version: int
    sender: str
    receiver: str
    owner_revision: int
    active: _containers.RepeatedCompositeFieldContainer[ActiveChangefeed]
    envelopes: _containers.RepeatedCompositeFieldContainer[Envelope]
    def __init__(self, version: _Optional[int] = ..., sender: _Optional[str] = ..., receiver: _Optional[str] = ..., owner_revision: _Optional[int] = ..., active: _Optional[_Iterable[_Union[ActiveChangefeed, _Mapping]]] = ..., envelopes: _Optional[_Iterable[_Union[Envelope, _Mapping]]] = ...) -> None: ...

class ActiveChangefeed(_message.Message):
    __slots__ = ("namespace", "id", "epoch")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    id: str
    epoch: int
    def __init__(self, namespace: _Optional[str] = ..., id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("version", "sender", "receiver", "namespace", "changefeed", "owner_revision", "changefeed_epoch", "processor_epoch", "number", "echo", "heartbeat", "heartbeat_response", "dispatch_table_request", "dispatch_table_response")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CHANGEFEED_FIELD_NUMBER: _ClassVar[int]
    OWNER_REVISION_FIELD_NUMBER: _ClassVar[int]
    CHANGEFEED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROCESSOR_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_TABLE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_TABLE_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    version: int
    sender: str
    receiver: str
    namespace: str
    changefeed: str
    owner_revision: int
    changefeed_epoch: int
    processor_epoch: int
    number: int
    echo: int
    heartbeat: Heartbeat
    heartbeat_response: HeartbeatResponse
    dispatch_table_request: DispatchTableRequest
    dispatch_table_response: DispatchTableResponse
    def __init__(self, version: _Optional[int] = ..., sender: _Optional[str] = ..., receiver: _Optional[str] = ..., namespace: _Optional[str] = ..., changefeed: _Optional[str] = ..., owner_revision: _Optional[int] = ..., changefeed_epoch: _Optional[int] = ..., processor_epoch: _Optional[int] = ..., number: _Optional[int] = ..., echo: _Optional[int] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., heartbeat_response: _Optional[_Union[HeartbeatResponse, _Mapping]] = ..., dispatch_table_request: _Optional[_Union[DispatchTableRequest, _Mapping]] = ..., dispatch_table_response: _Optional[_Union[DispatchTableResponse, _Mapping]] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("base", "width", "deltas", "positions", "values")
    BASE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    base: int
    width: int
    deltas: bytes
    positions: bytes
    values: bytes
    def __init__(self, base: _Optional[int] = ..., width: _Optional[int] = ..., deltas: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., values: _Optional[bytes] = ...) -> None: ...

class Spans(_message.Message):
    __slots__ = ("rows", "table_ids", "start_keys", "end_keys")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TABLE_IDS_FIELD_NUMBER: _ClassVar[int]
    START_KEYS_FIELD_NUMBER: _ClassVar[int]
    END_KEYS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    table_ids: Column
    start_keys: _containers.RepeatedScalarFieldContainer[bytes]
    end_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, rows: _Optional[int] = ..., table_ids: _Optional[_Union[Column, _Mapping]] = ..., start_keys: _Optional[_Iterable[bytes]] = ..., end_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Barrier(_message.Message):
    __slots__ = ("global_barrier_ts", "rows", "table_ids", "barrier_ts")
    GLOBAL_BARRIER_TS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TABLE_IDS_FIELD_NUMBER: _ClassVar[int]
    BARRIER_TS_FIELD_NUMBER: _ClassVar[int]
    global_barrier_ts: int
    rows: int
    table_ids: Column
    barrier_ts: Column
    def __init__(self, global_barrier_ts: _Optional[int] = ..., rows: _Optional[int] = ..., table_ids: _Optional[_Union[Column, _Mapping]] = ..., barrier_ts: _Optional[_Union[Column, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("barrier", "acked", "collect_stats", "numbers", "spans", "by_name")
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    COLLECT_STATS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    BY_NAME_FIELD_NUMBER: _ClassVar[int]
    barrier: Barrier
    acked: int
    collect_stats: bool
    numbers: Column
    spans: Spans
    by_name: bool
    def __init__(self, barrier: _Optional[_Union[Barrier, _Mapping]] = ..., acked: _Optional[int] = ..., collect_stats: bool = ..., numbers: _Optional[_Union[Column, _Mapping]] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., by_name: bool = ...) -> None: ...

class DispatchTableRequest(_message.Message):
    __slots__ = ("spans", "numbers", "actions", "checkpoint_ts", "resolved_lead", "assignment_epochs", "acked", "jobs")
    SPANS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_TS_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_LEAD_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    spans: Spans
    numbers: Column
    actions: Column
    checkpoint_ts: Column
    resolved_lead: Column
    assignment_epochs: Column
    acked: int
    jobs: Column
    def __init__(self, spans: _Optional[_Union[Spans, _Mapping]] = ..., numbers: _Optional[_Union[Column, _Mapping]] = ..., actions: _Optional[_Union[Column, _Mapping]] = ..., checkpoint_ts: _Optional[_Union[Column, _Mapping]] = ..., resolved_lead: _Optional[_Union[Column, _Mapping]] = ..., assignment_epochs: _Optional[_Union[Column, _Mapping]] = ..., acked: _Optional[int] = ..., jobs: _Optional[_Union[Column, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("liveness", "fenced", "held", "checksum", "reports")
    LIVENESS_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    liveness: int
    fenced: bool
    held: int
    checksum: int
    reports: Reports
    def __init__(self, liveness: _Optional[int] = ..., fenced: bool = ..., held: _Optional[int] = ..., checksum: _Optional[int] = ..., reports: _Optional[_Union[Reports, _Mapping]] = ...) -> None: ...

class DispatchTableResponse(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: Reports
    def __init__(self, reports: _Optional[_Union[Reports, _Mapping]] = ...) -> None: ...

class Reports(_message.Message):
    __slots__ = ("rows", "base", "numbers", "spans", "states", "checkpoint_ts", "resolved_lead", "last_synced_ts", "assignment_epochs", "errors", "stats", "more")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_TS_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_LEAD_FIELD_NUMBER: _ClassVar[int]
    LAST_SYNCED_TS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    rows: int
    base: int
    numbers: Column
    spans: Spans
    states: Column
    checkpoint_ts: Column
    resolved_lead: Column
    last_synced_ts: Column
    assignment_epochs: Column
    errors: _containers.RepeatedCompositeFieldContainer[SpanError]
    stats: SpanStats
    more: bool
    def __init__(self, rows: _Optional[int] = ..., base: _Optional[int] = ..., numbers: _Optional[_Union[Column, _Mapping]] = ..., spans: _Optional[_Union[Spans, _Mapping]] = ..., states: _Optional[_Union[Column, _Mapping]] = ..., checkpoint_ts: _Optional[_Union[Column, _Mapping]] = ..., resolved_lead: _Optional[_Union[Column, _Mapping]] = ..., last_synced_ts: _Optional[_Union[Column, _Mapping]] = ..., assignment_epochs: _Optional[_Union[Column, _Mapping]] = ..., errors: _Optional[_Iterable[_Union[SpanError, _Mapping]]] = ..., stats: _Optional[_Union[SpanStats, _Mapping]] = ..., more: bool = ...) -> None: ...

class SpanError(_message.Message):
    __slots__ = ("row", "text")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    row: int
    text: str
    def __init__(self, row: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class SpanStats(_message.Message):
    __slots__ = ("rows", "positions", "rows_per_s", "bytes_per_s", "puller_resolved_ts", "in_snapshot")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PULLER_RESOLVED_TS_FIELD_NUMBER: _ClassVar[int]
    IN_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    rows: int
    positions: Column
    rows_per_s: bytes
    bytes_per_s: bytes
    puller_resolved_ts: Column
    in_snapshot: Column
    def __init__(self, rows: _Optional[int] = ..., positions: _Optional[_Union[Column, _Mapping]] = ..., rows_per_s: _Optional[bytes] = ..., bytes_per_s: _Optional[bytes] = ..., puller_resolved_ts: _Optional[_Union[Column, _Mapping]] = ..., in_snapshot: _Optional[_Union[Column, _Mapping]] = ...) -> None: ...
