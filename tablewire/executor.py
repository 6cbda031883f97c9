"""TableExecutor: the interface that a plug-in implements to do its own work for each table.

The agent calls an executor from one thread. Every call must return at once (work happens on threads
of the executor), is repeated until it has taken effect, and must therefore be idempotent. An
exception is an error of that span alone: the agent removes the span and reports it as Stopped with
its last checkpoint and the text, and the owner schedules it again.

A plug-in offers a factory `new_executor(request: ExecutorRequest) -> TableExecutor` under the entry
point group `tablewire.executors`, named after the scheme of the source URI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tablewire.model.ids import CaptureID, ChangefeedID, TableID, Ts
from tablewire.model.progress import Barrier, Checkpoint, StatusColumns, TableStatus
from tablewire.model.spans import Span


class TableExecutor(Protocol):
    """The work on the spans of one changefeed in one processor."""

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        """Start a phase of an Add; return False if it cannot start yet, and the call is repeated.

        Phase one (is_prepare): get ready to continue after `checkpoint`, and write nothing. Phase
        two, which follows only when the span is prepared: write everything after `checkpoint`.
        """
        ...

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        """Return whether the span can write at once (phase one), or writes (phase two)."""
        ...

    def remove_table_span(self, span: Span) -> bool:
        """Stop the span; return False if that cannot start yet, and True for an unknown span."""
        ...

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        """Return (last checkpoint_ts or 0, True), and forget the span, once no write can follow."""
        ...

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        """Return the status, ABSENT for an unknown span. Raise the span's background failure."""
        ...


@runtime_checkable
class FencedTableExecutor(Protocol):
    """Optional: the sink refuses writes with an older assignment_epoch."""

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        """Set the epoch, before phase two of an Add, and later to raise it."""
        ...


@runtime_checkable
class BarrierTableExecutor(Protocol):
    """Optional: receives every barrier; nothing may be written past it (see `Barrier`)."""

    def set_barrier(self, barrier: Barrier) -> None: ...


@runtime_checkable
class BulkTableExecutor(Protocol):
    """Optional: returns the statuses of many spans in one call."""

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns: ...


@runtime_checkable
class ClosableTableExecutor(Protocol):
    """Optional: stops all spans, and returns only when no write can follow. Idempotent."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ExecutorMeter:
    """Figures of an executor for /metrics.

    rows_written, bytes_written: since it was made, never decreasing. queue_bytes: read but not yet
    written; queue_bytes_max: the limit. read_ts: how far the source has been read. conflicts: changes
    that found other rows at the sink than at the source.
    """

    rows_written: int = 0
    bytes_written: int = 0
    queue_bytes: int = 0
    queue_bytes_max: int = 0
    read_ts: Ts = 0
    conflicts: int = 0


@runtime_checkable
class MeteredTableExecutor(Protocol):
    """Optional: figures for /metrics, read about once a second. Does no I/O."""

    def meter(self) -> ExecutorMeter: ...


@dataclass(frozen=True, slots=True)
class ExecutorRequest:
    """What a processor knows when it starts the executor of a changefeed.

    tables: the filter, as in SourceRequest. start_ts: where the changefeed started at its source.
    table_names: the names of tables that the owner knows, by id; may be empty.
    wake(): called by the executor, on any thread, when the state of a span has changed, so that the
    agent reports it at once.
    may_write(): called by the executor, on any thread, right before each commit or flush at the
    sink. False means that the lease of this processor is in doubt: put the work back and ask again
    later. It never blocks.
    """

    capture_id: CaptureID
    changefeed: ChangefeedID
    changefeed_epoch: int
    source_uri: str
    sink_uri: str
    tables: Sequence[str]
    start_ts: Ts = 0
    initial_snapshot: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    table_names: Mapping[TableID, str] = field(default_factory=dict)
    wake: Callable[[], None] = lambda: None
    may_write: Callable[[], bool] = lambda: True


class ExecutorFactory(Protocol):
    def __call__(self, request: ExecutorRequest) -> TableExecutor: ...
