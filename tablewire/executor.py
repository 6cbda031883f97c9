"""TableExecutor: what users implement to do their own per-table work.

The agent calls an executor from one thread, inside `Agent.tick`. Every call must return at once (work happens on the
executor's own threads), is repeated until it has taken effect, and therefore must be idempotent. An exception is that span's
error: the agent removes the span, reports Stopped with its last checkpoint and the text, and the owner schedules it again.

A plug-in offers a factory under the entry point group `tablewire.executors`, named by the scheme of the source URI:
`new_executor(request: ExecutorRequest) -> TableExecutor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tablewire.model.ids import CaptureID, ChangefeedID, TableID, Ts
from tablewire.model.progress import Barrier, Checkpoint, TableStatus
from tablewire.model.progress import StatusColumns as StatusColumns  # part of this contract; it lives beside TableStatus
from tablewire.model.spans import Span


class TableExecutor(Protocol):
    """The work on spans, one object a (processor, changefeed)."""

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        """Phase one (is_prepare=True): get ready to continue behind `checkpoint`, write nothing. Phase two
        (is_prepare=False, only for a prepared span): write from `checkpoint` on. False = not taken yet, call again."""
        ...

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        """Phase one: the span is ready to write at once. Phase two: it writes."""
        ...

    def remove_table_span(self, span: Span) -> bool:
        """Stop the span. False = not taken yet, call again. An unknown span is removed already: True."""
        ...

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        """(last checkpoint_ts, True) once no write can follow any more, then the span is forgotten; 0 = not known."""
        ...

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        """How far the span is; an unknown span is ABSENT with Checkpoint(0, 0). Raises the span's background failure."""
        ...


@runtime_checkable
class FencedTableExecutor(Protocol):
    """Optional: the sink refuses an older assignment_epoch. An executor without it is unfenced, and the owner knows."""

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        """Called right before add_table_span(…, is_prepare=False), and later to raise the epoch of a writing span."""
        ...


@runtime_checkable
class BarrierTableExecutor(Protocol):
    """Optional: wants every barrier that a heartbeat brings. No write past min(global, own table's)."""

    def set_barrier(self, barrier: Barrier) -> None: ...


@runtime_checkable
class BulkTableExecutor(Protocol):
    """Optional: the statuses of many spans in one call; without it the agent loops over get_table_span_status."""

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns: ...


@runtime_checkable
class ClosableTableExecutor(Protocol):
    """Optional: stops everything, and returns only when no write can follow any more. Idempotent."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ExecutorMeter:
    """What an executor shows at /metrics. rows_written, bytes_written: since it was made, never less than before.
    queue_bytes: read and not written yet, queue_bytes_max: its limit. read_ts: how far the source has been read."""

    rows_written: int = 0
    bytes_written: int = 0
    queue_bytes: int = 0
    queue_bytes_max: int = 0
    read_ts: Ts = 0


@runtime_checkable
class MeteredTableExecutor(Protocol):
    """Optional: figures for /metrics, asked for about once a second; does no I/O."""

    def meter(self) -> ExecutorMeter: ...


def _nothing() -> None:
    pass


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class ExecutorRequest:
    """What a processor knows when it starts a changefeed's executor. start_ts: where the changefeed started at its source.
    tables: the filter, as in SourceRequest. table_names: names of tables by id as far as the owner knows them (may be empty).
    wake: call it (any thread) when a span's state has changed, so that the agent reports at once and not at its next tick.
    may_write: ask it (any thread) right before each commit or flush at the sink; False = this processor's lease is in doubt:
    give the work back and ask again later. It never blocks."""

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
    wake: Callable[[], None] = _nothing
    may_write: Callable[[], bool] = _always


class ExecutorFactory(Protocol):
    def __call__(self, request: ExecutorRequest) -> TableExecutor: ...
