"""Messages between the owner and its processors: frozen values with read-only columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeAlias

import numpy as np

from tablewire.model.columns import F64, U8, U32, U64, Columns
from tablewire.model.ids import ChangefeedID
from tablewire.model.progress import Barrier
from tablewire.model.spans import SpanBlock
from tablewire.model.states import LivenessState

PROTOCOL_VERSION = 1
"""The version of these messages. The codec translates those of older processes."""


@dataclass(frozen=True, slots=True, eq=False)
class Heartbeat(Columns):
    """Owner -> agent: the barrier, which reports have arrived, and numbers for new spans.

    acked: the largest message number of the agent that the owner has applied; the agent's next
    report contains what changed since then (0: everything). numbers and spans, one element each:
    the number that identifies the span from now on, under this owner_revision. collect_stats: the
    next response should contain statistics. by_name: the agent must forget all numbers and report
    everything by name on base 0, because the owner received a number that it does not know.
    """

    barrier: Barrier
    acked: int = 0
    collect_stats: bool = False
    by_name: bool = False
    numbers: U32 = field(default_factory=lambda: np.empty(0, np.uint32))
    spans: SpanBlock = field(default_factory=lambda: SpanBlock(np.empty(0, np.int64)))


@dataclass(frozen=True, slots=True, eq=False)
class DispatchTableRequest(Columns):
    """Owner -> agent: AddTable (prepare or write) and RemoveTable, one element for each span.

    numbers: the owner's number of the span, never 0. actions: DispatchAction. checkpoint_ts,
    resolved_ts: where to start an Add, 0 for a Remove. assignment_epochs: the fencing token of
    ADD_WRITE, otherwise 0. acked: as in Heartbeat (0: not given), so that an Add to an agent whose
    Stopped was applied is not dropped until the next heartbeat. jobs: the manual job of each
    element (`tablewire.model.jobs`), 0 if none, for logs only; empty if no element has one.
    """

    numbers: U32
    spans: SpanBlock
    actions: U8
    checkpoint_ts: U64
    resolved_ts: U64
    assignment_epochs: U64
    acked: int = 0
    jobs: U64 = field(default_factory=lambda: np.empty(0, np.uint64))


@dataclass(frozen=True, slots=True, eq=False)
class SpanStats(Columns):
    """Statistics of some spans of a report.

    rows: their positions in the report. puller_resolved_ts: 0 if there is no stage "puller".
    in_snapshot: 1 during the initial snapshot.
    """

    rows: U32 = field(default_factory=lambda: np.empty(0, np.uint32))
    rows_per_s: F64 = field(default_factory=lambda: np.empty(0, np.float64))
    bytes_per_s: F64 = field(default_factory=lambda: np.empty(0, np.float64))
    puller_resolved_ts: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    in_snapshot: U8 = field(default_factory=lambda: np.empty(0, np.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class SpanReports(Columns):
    """Agent -> owner: the states of spans, one element for each.

    base: the `acked` that the report builds on. It contains every span that changed since then; a
    span that is gone is ABSENT. With base 0 it is complete: a span that it does not contain is
    ABSENT at this agent.
    numbers: the owner's number of the span, or 0 while it has none. `spans` holds the spans of the
    zeros, in their order.
    states: TableState codes. assignment_epochs: the permission that the span writes or wrote under,
    0 if none.
    errors: (position, text) of each span that an error of its executor stopped.
    more: this is a chunk, and the report continues in the message with the next number, whose base
    is this message's number. Only with its last chunk is a report complete (`join_reports`). The
    last chunk is a HeartbeatResponse, the others are DispatchTableResponses.
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


def join_reports(chunks: Sequence[SpanReports]) -> SpanReports:
    """Return the report whose chunks these are, in the order of their numbers.

    The caller has checked that the base of each chunk but the first is the number of the previous
    one, and that only the last one has `more` False. The positions of statistics and errors count
    through all chunks.
    """
    if len(chunks) == 1:
        return chunks[0]
    starts = np.cumsum([0] + [len(chunk) for chunk in chunks[:-1]]).tolist()

    def joined(column: Callable[[SpanReports], Any]) -> Any:
        return np.concatenate([column(chunk) for chunk in chunks])

    def keys(name: str) -> tuple[bytes, ...]:
        if not any(chunk.spans.start_keys for chunk in chunks):
            return ()
        return tuple(chain.from_iterable(getattr(chunk.spans, name) or (b"",) * len(chunk.spans) for chunk in chunks))

    return SpanReports(
        base=chunks[0].base,
        numbers=joined(lambda chunk: chunk.numbers),
        spans=SpanBlock(joined(lambda chunk: chunk.spans.table_ids), keys("start_keys"), keys("end_keys")),
        states=joined(lambda chunk: chunk.states),
        checkpoint_ts=joined(lambda chunk: chunk.checkpoint_ts),
        resolved_ts=joined(lambda chunk: chunk.resolved_ts),
        last_synced_ts=joined(lambda chunk: chunk.last_synced_ts),
        assignment_epochs=joined(lambda chunk: chunk.assignment_epochs),
        errors=tuple((start + row, text) for start, chunk in zip(starts, chunks, strict=True) for row, text in chunk.errors),
        stats=SpanStats(
            np.concatenate([chunk.stats.rows + np.uint32(start) for start, chunk in zip(starts, chunks, strict=True)]),
            joined(lambda chunk: chunk.stats.rows_per_s),
            joined(lambda chunk: chunk.stats.bytes_per_s),
            joined(lambda chunk: chunk.stats.puller_resolved_ts),
            joined(lambda chunk: chunk.stats.in_snapshot),
        ),
    )


@dataclass(frozen=True, slots=True)
class HeartbeatResponse:
    """Agent -> owner: the response to a heartbeat.

    fenced: the sink refuses older assignment epochs. held: how many spans are neither ABSENT nor
    STOPPED at this agent.
    checksum: `span_checksum` of those that have a number.
    """

    liveness: LivenessState
    fenced: bool
    held: int
    checksum: int
    reports: SpanReports


@dataclass(frozen=True, slots=True)
class DispatchTableResponse:
    """Agent -> owner: sent when a span changes or after a dispatch, before the next heartbeat."""

    reports: SpanReports


MessageBody: TypeAlias = Heartbeat | HeartbeatResponse | DispatchTableRequest | DispatchTableResponse


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    owner_revision: of the owner that sends or receives it. processor_epoch: of the agent that sends
    or receives it (0 in a Heartbeat to an agent whose epoch is not known yet). number: counts the
    messages of the sender, from 1, for each (owner_revision, capture). echo: the last number that
    the agent received from the owner; 0 in the owner's messages.
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
    """The messages of one node. Never blocks; may lose, repeat, delay and reorder. One thread."""

    def send(self, messages: Sequence[Message]) -> None: ...

    def recv(self) -> Sequence[Message]: ...

    def close(self) -> None: ...


def span_checksum(numbers: U32, states: U8) -> int:
    """Return a checksum of spans and their states that does not depend on their order (uint64)."""
    words = (numbers.astype(np.uint64) << np.uint64(8)) | states.astype(np.uint64)
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    return int(words.sum(dtype=np.uint64))


@dataclass(frozen=True, slots=True, order=True)
class ActiveChangefeed:
    """A changefeed that the owner schedules. epoch: of its last (re)start."""

    changefeed: ChangefeedID
    epoch: int


@dataclass(frozen=True, slots=True)
class Batch:
    """All messages between an owner and a processor in one direction of one Exchange.

    sender, receiver and owner_revision are the same in every message. active: all active
    changefeeds of the owner (the processor closes the agents of all others); () from a processor.
    version: of the wire; a response has its request's.
    """

    sender: str
    receiver: str
    owner_revision: int
    active: tuple[ActiveChangefeed, ...] = ()
    messages: tuple[Message, ...] = ()
    version: int = PROTOCOL_VERSION
