"""The sink and the executors of the simulation: the fakes of tablewire.testing with stricter checks
and worse behavior."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from owner.core.coverage import overlaps
from tablewire import StatusColumns
from tablewire.model.ids import Ts
from tablewire.model.progress import Checkpoint
from tablewire.model.spans import Span
from tablewire.testing import FakeSink, FakeTableExecutor, UnfencedFakeTableExecutor


class SimSink(FakeSink):
    """Also detects a permission that leaves a gap after the durable position, a write past the
    barrier, and two writers of overlapping spans."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier_ts: Ts = 0  # the highest so far
        self.heeds_barrier = True
        self._spans_of: dict[int, set[Span]] = {}

    def begin(self, span: Span, checkpoint_ts: Ts) -> None:
        """Start the span at this position; earlier changes are not its own."""
        self._row(span).position = max(self.position(span), checkpoint_ts)

    def take_over(self, span: Span, writer: str, fence: tuple[int, int] | None, granted: Ts) -> Ts:
        position = self.position(span)
        if granted > position:
            self.violations.append(f"span {span}: {writer} was told to start at {granted}, but it is durable to {position} only")
        start = super().take_over(span, writer, fence, granted)
        for other in sorted(self._spans_of.setdefault(span.table_id, set())):
            if other != span and overlaps(span.start_key, span.end_key, other.start_key, other.end_key):
                writers = set(self.writers(other)) - {writer}
                if writers:
                    self.violations.append(f"span {span} of {writer} overlaps span {other}, which {sorted(writers)} write")
        self._spans_of[span.table_id].add(span)
        return start

    def write(self, span: Span, writer: str, checkpoint_ts: Ts) -> None:
        if self.heeds_barrier and checkpoint_ts > max(self.barrier_ts, self.position(span)):
            self.violations.append(f"span {span}: {writer} wrote to {checkpoint_ts}, past the barrier {self.barrier_ts}")
        super().write(span, writer, checkpoint_ts)

    def _row(self, span: Span):  # type: ignore[no-untyped-def]
        from tablewire.testing.fake_sink import _SinkRow

        return self._rows.setdefault(span, _SinkRow())


class _BadManners:
    """Reports a position behind the real one from time to time, and forgets the position of a span
    that it stopped. It has received the changes after the point that it was asked to prepare from:
    an older permission leaves a gap."""

    random: random.Random
    forgetful: float = 0.0
    prepared_from: dict[Span, Ts]

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        is_new = span not in self._held  # type: ignore[attr-defined]
        taken: bool = super().add_table_span(span, checkpoint, is_prepare)  # type: ignore[misc]
        if is_prepare and is_new and taken:
            self.prepared_from[span] = checkpoint.checkpoint_ts
        elif not is_prepare:
            self._check_hole(span, checkpoint.checkpoint_ts)
        return taken

    def _check_hole(self, span: Span, granted: Ts) -> None:
        sink: SimSink = self.sink  # type: ignore[attr-defined]
        if max(granted, sink.position(span)) < self.prepared_from[span]:
            sink.violations.append(
                f"span {span} is prepared from {self.prepared_from[span]} on, but to be written from {granted} on"
            )

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns:
        columns: StatusColumns = super().get_table_span_statuses(spans)  # type: ignore[misc]
        if self.forgetful and self.random.random() < self.forgetful:
            back = np.minimum(columns.checkpoint_ts, np.uint64(self.random.randrange(50)))
            return StatusColumns(
                columns.states, columns.checkpoint_ts - back, columns.resolved_ts - back, columns.last_synced_ts, columns.errors
            )
        return columns

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        checkpoint_ts, finished = super().is_remove_table_span_finished(span)  # type: ignore[misc]
        if self.forgetful and self.random.random() < self.forgetful:
            return 0, finished
        return checkpoint_ts, finished


class SimExecutor(_BadManners, FakeTableExecutor):
    """An executor with a sink that fences."""


class FreeSimExecutor(SimExecutor):
    """Ignore barriers."""

    set_barrier = None


class UnfencedSimExecutor(_BadManners, UnfencedFakeTableExecutor):
    """An executor with a sink that accepts every writer: the protocol alone keeps writers apart."""


def new_executor(
    source: random.Random, sink: SimSink, name: str, changefeed_epoch: int, fenced: bool, pace: int
) -> SimExecutor | UnfencedSimExecutor:
    """Return an executor with random behavior. pace: the number of polls that slow steps take."""
    kind: Callable[..., SimExecutor | UnfencedSimExecutor]
    kind = UnfencedSimExecutor if not fenced else SimExecutor if sink.heeds_barrier else FreeSimExecutor
    executor = kind(
        sink,
        name=name,
        changefeed_epoch=changefeed_epoch,
        prepare_polls=source.choice((0, pace, pace)),
        write_polls=source.choice((0, 0, 1, pace // 3)),
        stop_polls=source.choice((0, pace // 2, pace)),
        refusals=source.choice((0, 0, 0, 2)),
        record_calls=False,
    )
    executor.random, executor.prepared_from = source, {}
    executor.forgetful = source.choice((0.0, 0.0, 0.1))
    return executor
