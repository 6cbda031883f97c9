"""The words of Tablewire (docs/concepts.md), as frozen values.

Everything both services must agree on stands here. This module imports the standard library and numpy alone: the pure
cores (`owner.core`, `processor.core`) may import nothing of ours but this. Every value is immutable and may be read from
any thread. Enums are StrEnums whose value is the lower-case name; on the wire and in columns an enum is its `code`, the
position in its definition, so members are only ever appended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Ts: TypeAlias = int
"""Unsigned 64 bit, monotone, defined by the source (PostgreSQL: an LSN). 0 = cannot proceed."""
TableID: TypeAlias = int
"""Signed 64 bit."""
CaptureID: TypeAlias = str
"""One start of one processor process; new at every start."""

U8: TypeAlias = npt.NDArray[np.uint8]
U32: TypeAlias = npt.NDArray[np.uint32]
U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
F64: TypeAlias = npt.NDArray[np.float64]

TS_MAX: Ts = 2**64 - 1
CHECKPOINT_CANNOT_PROCEED: Ts = 0
"""The global checkpoint must not be advanced yet."""
PROTOCOL_VERSION = 1
"""Version of the messages of this module. On the wire two processes speak the highest one that both know (`ProtocolVersions`);
the codec translates, so that the cores know this one alone."""


@dataclass(frozen=True, slots=True)
class ProtocolVersions:
    """The versions of the wire that a process speaks, both ends included; its text is for people."""

    lowest: int = PROTOCOL_VERSION
    highest: int = PROTOCOL_VERSION

    def common(self, other: ProtocolVersions) -> int | None:
        """The one that both should speak; None: they cannot speak with each other."""
        version = min(self.highest, other.highest)
        return version if version >= max(self.lowest, other.lowest) else None

    def __contains__(self, version: int) -> bool:
        return self.lowest <= version <= self.highest

    def __str__(self) -> str:
        return str(self.lowest) if self.lowest == self.highest else f"{self.lowest} to {self.highest}"


SPOKEN = ProtocolVersions()
"""What this build speaks. A release that changes the wire raises `highest`, and keeps the former version for one more release."""


class _CodedEnum(StrEnum):
    """A StrEnum with a small stable number for columns and the wire."""

    @property
    def code(self) -> int:
        return _codes(type(self))[self]

    @classmethod
    def from_code(cls, code: int) -> _CodedEnum:
        """The member with this code; ValueError when there is none."""
        members = _members(cls)
        if not 0 <= code < len(members):
            raise ValueError(f"{cls.__name__} has no code {code}")
        return members[code]


_CODES: dict[type, dict[str, int]] = {}
_MEMBERS: dict[type, tuple[_CodedEnum, ...]] = {}


def _members(enum: type[_CodedEnum]) -> tuple[_CodedEnum, ...]:
    found = _MEMBERS.get(enum)
    if found is None:
        found = _MEMBERS[enum] = tuple(enum)
    return found


def _codes(enum: type[_CodedEnum]) -> dict[str, int]:
    found = _CODES.get(enum)
    if found is None:
        found = _CODES[enum] = {member: code for code, member in enumerate(enum)}
    return found


class TableState(_CodedEnum):
    """What an agent reports of a span. Absent -> Preparing -> Prepared -> Replicating -> Stopping -> Stopped."""

    ABSENT = "absent"
    PREPARING = "preparing"
    PREPARED = "prepared"
    REPLICATING = "replicating"
    STOPPING = "stopping"
    STOPPED = "stopped"


class ReplicationState(_CodedEnum):
    """What the owner keeps of a span."""

    ABSENT = "absent"
    PREPARE = "prepare"
    COMMIT = "commit"
    REPLICATING = "replicating"
    REMOVING = "removing"


class CaptureState(_CodedEnum):
    UNINITIALIZED = "uninitialized"
    READY = "ready"
    SILENT = "silent"
    STOPPING = "stopping"


class LivenessState(_CodedEnum):
    ALIVE = "alive"
    STOPPING = "stopping"


class QueryKind(_CodedEnum):
    MOVE = "move"
    REBALANCE = "rebalance"
    DRAIN = "drain"
    CANCEL = "cancel"


class QueryState(_CodedEnum):
    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    DONE = "done"
    CANCELLED = "cancelled"


class StallReason(_CodedEnum):
    """Why a span is not steady; a closed list (docs/operations.md explains each)."""

    BOOTSTRAP = "bootstrap"
    SILENT_CAPTURE = "silent_capture"
    NO_CAPTURE = "no_capture"
    CONCURRENCY = "concurrency"
    PREPARING = "preparing"
    SNAPSHOT = "snapshot"
    PRIMARY_STOPPING = "primary_stopping"
    UNDETERMINED = "undetermined"
    REMOVING = "removing"
    BARRIER = "barrier"
    EXECUTOR_ERROR = "executor_error"
    BACKOFF = "backoff"
    BRAKE = "brake"


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open key range of a table. Empty keys are unbounded, so a whole table is `Span(table_id)`."""

    table_id: TableID
    start_key: bytes = b""
    end_key: bytes = b""

    def __str__(self) -> str:
        if not self.start_key and not self.end_key:
            return str(self.table_id)
        return f"{self.table_id}[{self.start_key.hex() or '-'},{self.end_key.hex() or '-'})"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a span has got: durable in the sink (checkpoint_ts), received from the source (resolved_ts, never below),
    and the largest commit that was written (last_synced_ts, 0 = none yet)."""

    checkpoint_ts: Ts
    resolved_ts: Ts
    last_synced_ts: Ts = 0


_NO_CHECKPOINTS: Mapping[str, Checkpoint] = MappingProxyType({})
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Stats:
    """Rates of a span over the last statistics interval; stage_checkpoints by stage ("puller", "snapshot", "sink")."""

    rows_per_s: float = 0.0
    bytes_per_s: float = 0.0
    stage_checkpoints: Mapping[str, Checkpoint] = field(default_factory=lambda: _NO_CHECKPOINTS)


@dataclass(frozen=True, slots=True)
class TableStatus:
    """What an executor says of a span. `error` is the text of what stopped it, empty when nothing did."""

    span: Span
    state: TableState
    checkpoint: Checkpoint
    stats: Stats | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StatusColumns:
    """The statuses of n spans, one element a span in the order asked for. states: TableState codes. errors: (position, text)
    of the spans that failed in the background."""

    states: U8
    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64
    errors: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class TableBarrier:
    """No write of this table past barrier_ts."""

    table_id: TableID
    barrier_ts: Ts


@dataclass(frozen=True, slots=True)
class Barrier:
    """No write past min(global_barrier_ts, the table's own)."""

    global_barrier_ts: Ts
    table_barriers: Sequence[TableBarrier] = ()


@dataclass(frozen=True, slots=True)
class BarrierWithMinTs:
    """A barrier and the least of its table barriers, which bounds the global checkpoint."""

    barrier: Barrier
    min_table_barrier_ts: Ts


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far a whole changefeed has got. All 0 = cannot proceed."""

    checkpoint_ts: Ts
    resolved_ts: Ts
    last_synced_ts: Ts = 0
    puller_resolved_ts: Ts = 0


@dataclass(frozen=True, slots=True)
class CaptureInfo:
    """A processor as registered under its lease. `address` is host:port of its gRPC server."""

    id: CaptureID
    address: str
    version: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: _NO_LABELS)


@dataclass(frozen=True, slots=True, order=True)
class ChangefeedID:
    namespace: str
    id: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.id}"


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """The spans that one capture writes, with their checkpoints (a lazy view: reading it costs what is read)."""

    spans: Mapping[Span, Checkpoint]


@dataclass(frozen=True, slots=True)
class SpanView:
    """One span as the last tick left it. primary, secondary: captures by id, None where nobody. error: the executor's last."""

    span: Span
    state: ReplicationState
    primary: CaptureID | None
    secondary: CaptureID | None
    checkpoint: Checkpoint
    state_age_ms: int
    stall_reason: StallReason | None
    error: str


@dataclass(frozen=True, slots=True)
class CaptureView:
    """One living capture. spans: how many it is the Primary of."""

    id: CaptureID
    state: CaptureState
    spans: int
    draining: bool


# ---------------------------------------------------------------------------------------------------------------------
# Messages: one frozen value an envelope. Columns are numpy arrays that nobody writes to once the message exists.


class DispatchAction(IntEnum):
    """What a dispatch asks of one span: AddTable in its two phases, or RemoveTable."""

    ADD_PREPARE = 0
    ADD_WRITE = 1
    REMOVE = 2


@dataclass(frozen=True, slots=True, eq=False)
class SpanBlock(Sequence[Span]):
    """Spans as columns, in the order of the column that they accompany.

    table_ids: int64, shape (n,). start_keys and end_keys: n byte strings each, or both () when every span is a whole table.
    """

    table_ids: I64
    start_keys: tuple[bytes, ...] = ()
    end_keys: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, spans: Sequence[Span]) -> SpanBlock:
        if isinstance(spans, SpanBlock):
            return spans
        table_ids = np.fromiter((span.table_id for span in spans), dtype=np.int64, count=len(spans))
        if any(span.start_key or span.end_key for span in spans):
            return cls(table_ids, tuple(s.start_key for s in spans), tuple(s.end_key for s in spans))
        return cls(table_ids)

    def __len__(self) -> int:
        return len(self.table_ids)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return SpanBlock(self.table_ids[index], self.start_keys[index], self.end_keys[index])
        if self.start_keys:
            return Span(int(self.table_ids[index]), self.start_keys[index], self.end_keys[index])
        return Span(int(self.table_ids[index]))

    def __iter__(self) -> Iterator[Span]:
        table_ids = self.table_ids.tolist()
        if self.start_keys:
            return map(Span, table_ids, self.start_keys, self.end_keys)
        return map(Span, table_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanBlock) and same_columns(self, other)

    __hash__ = None  # type: ignore[assignment]


def _empty_u8() -> U8:
    return np.empty(0, np.uint8)


def _empty_u32() -> U32:
    return np.empty(0, np.uint32)


def _empty_u64() -> U64:
    return np.empty(0, np.uint64)


def _empty_f64() -> F64:
    return np.empty(0, np.float64)


def _empty_spans() -> SpanBlock:
    return SpanBlock(np.empty(0, np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Heartbeat:
    """Owner -> agent: the barrier, what of the agent's reports has arrived, and numbers for spans it reported by name.

    acked: the largest m that the owner has applied; the agent's next report holds what changed since (0: all of it).
    numbers, shape (k,), and spans: from now on these spans are called by these numbers (while this owner_revision lasts).
    collect_stats: the next response should carry statistics.
    by_name: forget all numbers, and report everything by name on base 0 (the owner met a number that it does not know).
    """

    barrier: Barrier
    acked: int = 0
    collect_stats: bool = False
    by_name: bool = False
    numbers: U32 = field(default_factory=_empty_u32)
    spans: SpanBlock = field(default_factory=_empty_spans)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Heartbeat) and same_columns(self, other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class DispatchTableRequest:
    """Owner -> agent: AddTable (prepare or write) and RemoveTable, one element a span, shape (k,) each.

    numbers: the owner's number of the span, never 0. actions: DispatchAction. checkpoint_ts, resolved_ts: where to start
    (Add), else 0. assignment_epochs: the fencing token of ADD_WRITE, else 0. acked: as in Heartbeat (0: not said), so that an
    Add to a capture whose Stopped has been applied is not dropped there for want of a heartbeat. jobs: the manual job that each
    order belongs to (`tablewire.queries`), 0 = none, for logs alone; empty when none does.
    """

    numbers: U32
    spans: SpanBlock
    actions: U8
    checkpoint_ts: U64
    resolved_ts: U64
    assignment_epochs: U64
    acked: int = 0
    jobs: U64 = field(default_factory=_empty_u64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DispatchTableRequest) and same_columns(self, other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class SpanStats:
    """Statistics of some of the spans of a report. rows: uint32 (k,), positions in the report's columns;
    puller_resolved_ts 0 = the executor has no stage "puller"; in_snapshot 1 = the initial snapshot is under way."""

    rows: U32 = field(default_factory=_empty_u32)
    rows_per_s: F64 = field(default_factory=_empty_f64)
    bytes_per_s: F64 = field(default_factory=_empty_f64)
    puller_resolved_ts: U64 = field(default_factory=_empty_u64)
    in_snapshot: U8 = field(default_factory=_empty_u8)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanStats) and same_columns(self, other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class SpanReports:
    """What an agent says of its spans, one element a span, shape (n,) each.

    base: the `acked` that this report builds on: every span that changed since is in it (a span that is gone: ABSENT).
    base 0 means the whole truth: a span that is not in it is ABSENT at this agent.
    numbers: the owner's number, or 0 while the span has none; then it is named in `spans`, which holds the spans of the
    zeros in order. states: TableState codes. assignment_epochs: the permission the span writes or wrote under, 0 = none.
    errors: (position, text) of the spans that an executor's error stopped.
    more: this is a chunk and the report goes on in the message numbered m + 1, whose base is m. A report is whole, and says that
    a span is ABSENT by leaving it out (base 0), only with its last chunk (`join_reports`); the HeartbeatResponse is
    the last one; the chunks before it are DispatchTableResponses.
    """

    base: int
    numbers: U32
    spans: SpanBlock
    states: U8
    checkpoint_ts: U64
    resolved_ts: U64
    last_synced_ts: U64
    assignment_epochs: U64
    errors: tuple[tuple[int, str], ...] = ()
    stats: SpanStats = field(default_factory=SpanStats)
    more: bool = False

    def __len__(self) -> int:
        return len(self.states)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanReports) and same_columns(self, other)

    __hash__ = None  # type: ignore[assignment]


def join_reports(chunks: Sequence[SpanReports]) -> SpanReports:
    """The one report that these chunks, in the order of their numbers, are: base of the first, the spans of all.

    The caller has checked that each chunk but the first has the number before its own as base, and that only the last has
    `more` False. The stats' rows and the errors' positions count through all chunks.
    """
    if len(chunks) == 1:
        return chunks[0]
    starts = np.cumsum([0] + [len(chunk) for chunk in chunks[:-1]]).tolist()
    keyed = any(chunk.spans.start_keys for chunk in chunks)

    def keys(chunk: SpanReports, name: str) -> tuple[bytes, ...]:
        return getattr(chunk.spans, name) or (b"",) * len(chunk.spans)

    return SpanReports(
        base=chunks[0].base,
        numbers=np.concatenate([chunk.numbers for chunk in chunks]),
        spans=SpanBlock(
            np.concatenate([chunk.spans.table_ids for chunk in chunks]),
            tuple(key for chunk in chunks for key in keys(chunk, "start_keys")) if keyed else (),
            tuple(key for chunk in chunks for key in keys(chunk, "end_keys")) if keyed else (),
        ),
        states=np.concatenate([chunk.states for chunk in chunks]),
        checkpoint_ts=np.concatenate([chunk.checkpoint_ts for chunk in chunks]),
        resolved_ts=np.concatenate([chunk.resolved_ts for chunk in chunks]),
        last_synced_ts=np.concatenate([chunk.last_synced_ts for chunk in chunks]),
        assignment_epochs=np.concatenate([chunk.assignment_epochs for chunk in chunks]),
        errors=tuple((start + row, text) for start, chunk in zip(starts, chunks, strict=True) for row, text in chunk.errors),
        stats=SpanStats(
            np.concatenate([chunk.stats.rows + np.uint32(start) for start, chunk in zip(starts, chunks, strict=True)]),
            np.concatenate([chunk.stats.rows_per_s for chunk in chunks]),
            np.concatenate([chunk.stats.bytes_per_s for chunk in chunks]),
            np.concatenate([chunk.stats.puller_resolved_ts for chunk in chunks]),
            np.concatenate([chunk.stats.in_snapshot for chunk in chunks]),
        ),
    )


@dataclass(frozen=True, slots=True)
class HeartbeatResponse:
    """Agent -> owner, in answer to a heartbeat. fenced: the executor refuses older assignment epochs at its sink.
    held, checksum: how many spans are neither ABSENT nor STOPPED here, and `span_checksum` over those that have a number."""

    liveness: LivenessState
    fenced: bool
    held: int
    checksum: int
    reports: SpanReports


@dataclass(frozen=True, slots=True)
class DispatchTableResponse:
    """Agent -> owner, as soon as a span's state has changed or a dispatch was taken in; never waits for a heartbeat."""

    reports: SpanReports


MessageBody: TypeAlias = Heartbeat | HeartbeatResponse | DispatchTableRequest | DispatchTableResponse


@dataclass(frozen=True, slots=True)
class Message:
    """One envelope.

    owner_revision: of the owner that speaks or is answered. processor_epoch: of the agent that speaks or is addressed
    (0 in a Heartbeat to an agent whose epoch is not known yet). number: n from the owner, m from the agent, each growing by
    one from 1 per (owner_revision, capture). echo: agent -> owner, the last n that was taken in; 0 from the owner.
    """

    sender: str
    receiver: str
    changefeed: ChangefeedID
    owner_revision: int
    changefeed_epoch: int
    processor_epoch: int
    number: int
    echo: int
    body: MessageBody
    version: int = PROTOCOL_VERSION


class Transport(Protocol):
    """Carries messages between one node and its peers. Never blocks; may lose, repeat, delay and reorder. One thread."""

    def send(self, messages: Sequence[Message]) -> None: ...

    def recv(self) -> Sequence[Message]: ...

    def close(self) -> None: ...


def span_checksum(numbers: U32, states: U8) -> int:
    """Order-free checksum (uint64, wrapping sum of mixed words) over the numbered spans that an agent holds."""
    words = (numbers.astype(np.uint64) << np.uint64(8)) | states.astype(np.uint64)
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    return int(words.sum(dtype=np.uint64))


_Columns = TypeVar("_Columns")


def same_columns(left: _Columns, right: _Columns) -> bool:
    """Equality by value of two dataclasses of one type that hold numpy columns."""
    for name in left.__dataclass_fields__:  # type: ignore[attr-defined]
        mine, theirs = getattr(left, name), getattr(right, name)
        if isinstance(mine, np.ndarray) or isinstance(theirs, np.ndarray):
            if not np.array_equal(mine, theirs):
                return False
        elif mine != theirs:
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# One turn of an Exchange.


@dataclass(frozen=True, slots=True, order=True)
class ActiveChangefeed:
    """A changefeed that the owner schedules, at the epoch of its present (re)start."""

    changefeed: ChangefeedID
    epoch: int


@dataclass(frozen=True, slots=True)
class Batch:
    """All that one owner process and one processor process say to each other in one turn.

    active: from the owner, all of its active changefeeds (a whole set: the processor closes the agents of any other); from a
    processor, (). sender, receiver and owner_revision are those of every message. version: of the wire; an answer has that of
    its request.
    """

    sender: str
    receiver: str
    owner_revision: int
    active: tuple[ActiveChangefeed, ...] = ()
    messages: tuple[Message, ...] = ()
    version: int = PROTOCOL_VERSION
