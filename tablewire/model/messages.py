"""Messages between the owner and its processors: one frozen value per envelope, with columns that are never written again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np

from tablewire.model.columns import F64, U8, U32, U64, same_columns
from tablewire.model.ids import ChangefeedID
from tablewire.model.progress import Barrier
from tablewire.model.spans import SpanBlock
from tablewire.model.states import LivenessState

PROTOCOL_VERSION = 1
"""The version of the messages of this module; the codec translates the versions that older processes use."""


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
    order belongs to (`tablewire.model.jobs`), 0 = none, for logs alone; empty when none does.
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
