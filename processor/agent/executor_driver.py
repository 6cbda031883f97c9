"""Performs what the table wait for: the calls of a user's executor, and the border at which its exceptions stop.

Every call is made in one thread, inside Agent.tick. An exception is the error of the span that the call was for and of no
other; this is the only module of the agent that catches `Exception`. A call that fails while a span is being removed is
repeated with the next tick: Stopped is said only when the executor has said so.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from processor.core.span_table import SpanTable
from processor.core.table_life import Input, Phase
from tablewire.errors import OperatingError, TablewireError
from tablewire.executor import (
    BarrierTableExecutor,
    BulkTableExecutor,
    ClosableTableExecutor,
    FencedTableExecutor,
    TableExecutor,
)
from tablewire.model.columns import U8, U64
from tablewire.model.ids import TS_MAX, Ts
from tablewire.model.progress import Barrier, Checkpoint, StatusColumns, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.runtime.uris import redact_uri

MAX_ERROR_CHARACTERS = 1_000
"""An error's text is cut to this length before it is reported."""

_CLOSE_POLL_SECONDS = 0.005

_ENDED_CODES = tuple(state.code for state in (TableState.ABSENT, TableState.STOPPING, TableState.STOPPED))
_STATES = tuple(TableState)


class ExecutorDriver:
    """One executor and the rows that it works for. One thread."""

    def __init__(self, executor: TableExecutor, table: SpanTable) -> None:
        self._executor = executor
        self._table = table
        self._fence = executor if isinstance(executor, FencedTableExecutor) else None
        self._barrier = executor if isinstance(executor, BarrierTableExecutor) else None
        self._bulk = executor if isinstance(executor, BulkTableExecutor) else None
        self.last_error: BaseException | None = None  # of the last call that raised, for the log

    @property
    def is_fenced(self) -> bool:
        return self._fence is not None

    # Transitions ---------------------------------------------------------------------------------------------------

    def drive(self) -> None:
        """Makes every call that is due, once, and the calls that these make due. Removals first: others may wait for them."""
        if self._table.is_settled():
            return
        self._remove()
        self._add()
        self._raise_epochs()
        self._remove_failed()

    def _remove(self) -> None:
        table, executor = self._table, self._executor
        removing = table.rows_in(Phase.REMOVING)
        table.happened(Input.TAKEN, self._ask(removing, executor.remove_table_span, self._spans(removing)))
        last_checkpoints: list[Ts] = []

        def is_removed(span: Span) -> bool:
            checkpoint_ts, finished = executor.is_remove_table_span_finished(span)
            if finished:
                last_checkpoints.append(_checked_ts(checkpoint_ts))
            return finished

        stopping = table.rows_in(Phase.STOPPING)
        ended = self._ask(stopping, is_removed, self._spans(stopping))
        table.ended(ended, last_checkpoints)

    def _remove_failed(self) -> None:
        if self._table.rows_in(Phase.REMOVING):
            self._remove()

    def _add(self) -> None:
        table, executor = self._table, self._executor

        def prepare(span: Span, checkpoint_ts: Ts, resolved_ts: Ts) -> bool:
            return executor.add_table_span(span, Checkpoint(checkpoint_ts, resolved_ts), True)

        rows = table.rows_in(Phase.ADDING)
        starts = (table.start_ts[rows].tolist(), table.start_resolved_ts[rows].tolist()) if rows else ((), ())
        table.happened(Input.TAKEN, self._ask(rows, prepare, self._spans(rows), *starts))
        rows = table.rows_in(Phase.PREPARING)
        table.happened(
            Input.FINISHED, self._ask(rows, lambda span: executor.is_add_table_span_finished(span, True), self._spans(rows))
        )
        self._write()
        rows = table.rows_in(Phase.STARTING)
        table.happened(
            Input.FINISHED, self._ask(rows, lambda span: executor.is_add_table_span_finished(span, False), self._spans(rows))
        )

    def _write(self) -> None:
        table, executor, fence = self._table, self._executor, self._fence

        def write(span: Span, epoch: int, checkpoint_ts: Ts, resolved_ts: Ts) -> bool:
            if fence is not None:
                fence.set_assignment_epoch(span, epoch)
            return executor.add_table_span(span, Checkpoint(checkpoint_ts, resolved_ts), False)

        granted = table.rows_in(Phase.GRANTED)
        if not granted:
            return
        doubtful = [row for row in granted if table.start_ts[row] < table.prepared_from[row]]
        if doubtful:
            table.happened(Input.BEHIND, self._ask(doubtful, self._is_behind, self._spans(doubtful), doubtful))
            granted = table.rows_in(Phase.GRANTED)
        epochs = table.granted_epoch[granted].tolist()
        starts = (table.start_ts[granted].tolist(), table.start_resolved_ts[granted].tolist())
        table.happened(Input.TAKEN, self._ask(granted, write, self._spans(granted), epochs, *starts))

    def _is_behind(self, span: Span, row: int) -> bool:
        """Changes between the grant and the point from which it was prepared were not received here. That only does not matter
        where the sink has got further than that point."""
        status = self._executor.get_table_span_status(span, False)
        return status.checkpoint.checkpoint_ts <= int(self._table.prepared_from[row])

    def _raise_epochs(self) -> None:
        table, fence = self._table, self._fence
        for row in sorted(table.to_raise):
            span, epoch = table.spans[row], int(table.granted_epoch[row])

            def raise_epoch(span: Span, epoch: int) -> bool:
                if fence is not None:
                    fence.set_assignment_epoch(span, epoch)
                return True

            if self._ask([row], raise_epoch, [span], [epoch]):
                table.raised(row)

    # Statuses ------------------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Asks for the status of every span that the executor has, notes what moved, and fails what has ended by itself."""
        rows, spans = self._table.observed()
        if not spans:
            return
        columns = self._bulk_statuses(spans)
        if columns is None:
            failed, columns = self._single_statuses(rows.tolist(), spans)
            if failed:
                keep = np.array([row not in failed for row in rows.tolist()])
                rows, spans = rows[keep], [span for span, kept in zip(spans, keep.tolist(), strict=True) if kept]
        self._table.observe(rows, columns.checkpoint_ts, columns.resolved_ts, columns.last_synced_ts)
        texts = dict(columns.errors)
        ended = np.isin(columns.states, _ENDED_CODES)
        for place in sorted({*np.flatnonzero(ended).tolist(), *texts}):
            text = (
                texts.get(place) or f"the executor reports the span as {_STATES[int(columns.states[place])]} without being told"
            )
            self._table.fail(int(rows[place]), _cut(text))
        self._remove_failed()

    def observe_stats(self, rows: Iterable[int]) -> None:
        """Collects the statistics of these rows, as far as they are being written."""
        table = self._table
        rows = [row for row in rows if table.phase[row] == Phase.REPLICATING]

        def collect(span: Span, row: int) -> bool:
            stats = self._executor.get_table_span_status(span, True).stats
            if stats is not None:
                puller = stats.stage_checkpoints.get("puller")
                puller_ts = _checked_ts(puller.resolved_ts) if puller is not None else 0
                in_snapshot = "snapshot" in stats.stage_checkpoints
                rates = _checked_rate(stats.rows_per_s), _checked_rate(stats.bytes_per_s)
                table.observe_stats(row, *rates, puller_ts, in_snapshot)
            return True

        self._ask(rows, collect, self._spans(rows), rows)
        self._remove_failed()

    def _bulk_statuses(self, spans: Sequence[Span]) -> StatusColumns | None:
        """None: there is no bulk form, or it raised or answered nonsense: each span is asked, and the one at fault is found."""
        if self._bulk is None:
            return None
        try:
            answer = self._bulk.get_table_span_statuses(spans)
            return _checked_columns(answer, len(spans))
        except Exception as error:  # noqa: BLE001 - the border of a user's executor
            self.last_error = error
            return None

    def _single_statuses(self, rows: Sequence[int], spans: Sequence[Span]) -> tuple[set[int], StatusColumns]:
        """(rows whose call raised, the statuses of the others in order)."""
        statuses: list[tuple[int, Ts, Ts, Ts]] = []
        errors: list[tuple[int, str]] = []

        def ask(span: Span) -> bool:
            status = self._executor.get_table_span_status(span, False)
            row = _checked_row(status)
            if status.error:
                errors.append((len(statuses), str(status.error)))
            statuses.append(row)
            return True

        answered = self._ask(rows, ask, spans)
        failed = set(rows) - set(answered) if len(answered) < len(rows) else set()
        states, checkpoint_ts, resolved_ts, last_synced_ts = zip(*statuses, strict=True) if statuses else ((), (), (), ())
        return failed, StatusColumns(
            np.array(states, np.uint8),
            np.array(checkpoint_ts, np.uint64),
            np.array(resolved_ts, np.uint64),
            np.array(last_synced_ts, np.uint64),
            errors,
        )

    # The rest ------------------------------------------------------------------------------------------------------

    def set_barrier(self, barrier: Barrier) -> None:
        """Hands it on if the executor wants it. If that raises, no table of it can be trusted to keep the barrier: all fail."""
        if self._barrier is None:
            return
        try:
            self._barrier.set_barrier(barrier)
        except Exception as error:  # noqa: BLE001 - the border of a user's executor
            self.last_error = error
            for row in self._table.observed()[0].tolist():
                self._table.fail(row, f"set_barrier: {_text(error)}")

    def close(self, timeout_ms: int) -> None:
        """Returns once no write can follow any more; OperatingError if the executor does not get there within timeout_ms."""
        if isinstance(self._executor, ClosableTableExecutor):
            try:
                self._executor.close()
            except Exception as error:
                raise OperatingError(f"the executor did not close: {_text(error)}") from error
            return
        for row in np.flatnonzero(self._table.phase[: self._table.size] != Phase.ABSENT).tolist():
            if self._table.phase[row] < Phase.REMOVING:
                self._table.fail(row, "the agent is closed")
        for _ in range(max(1, int(timeout_ms / 1000 / _CLOSE_POLL_SECONDS))):
            self._remove()
            left = self._table.rows_in(Phase.REMOVING) + self._table.rows_in(Phase.STOPPING)
            if not left:
                return
            time.sleep(_CLOSE_POLL_SECONDS)
        raise OperatingError(
            f"the executor has not stopped {len(left)} spans within {timeout_ms} ms, among them {self._table.spans[left[0]]}"
        )

    def _spans(self, rows: Sequence[int]) -> list[Span]:
        spans = self._table.spans
        return [spans[row] for row in rows]

    def _ask(self, rows: Sequence[int], call: Callable[..., bool], *arguments: Iterable[Any]) -> list[int]:
        """The rows for which `call` answers True, called with one element of each of `arguments`. What raises fails that row."""
        answered = []
        for row, each in zip(rows, _transposed(arguments), strict=True):
            try:
                if call(*each):
                    answered.append(row)
            except Exception as error:  # noqa: BLE001 - the border of a user's executor
                self._failed(row, error)
        return answered

    def _failed(self, row: int, error: Exception) -> None:
        self.last_error = error
        self._table.fail(row, _text(error))


def _transposed(arguments: tuple[Iterable[Any], ...]) -> Iterator[tuple[Any, ...]]:
    return zip(*arguments, strict=True)


def _text(error: Exception) -> str:
    if isinstance(error, TablewireError) and str(error):
        return _cut(str(error))
    # Not str(): an exception of a user may fail even there.
    return _cut("".join(traceback.format_exception_only(error)).strip())


def _cut(text: str) -> str:
    """What can be reported of it: valid UTF-8 of bounded length, without passwords."""
    return redact_uri(text)[:MAX_ERROR_CHARACTERS].encode(errors="replace").decode()


def _checked_rate(rate: float) -> float:
    """Rates only steer the balance: nonsense is no reason to stop a table."""
    return rate if math.isfinite(rate) and rate >= 0 else 0.0


def _checked_ts(ts: Ts) -> Ts:
    if not 0 <= ts <= TS_MAX:
        raise OperatingError(f"the executor gave {ts}, which is no Ts")
    return ts


def _checked_row(status: TableStatus) -> tuple[int, Ts, Ts, Ts]:
    at = status.checkpoint
    if (at.checkpoint_ts | at.resolved_ts | at.last_synced_ts) >> 64:
        raise OperatingError(f"the executor gave {at}, which holds no Ts")
    return status.state.code, at.checkpoint_ts, at.resolved_ts, at.last_synced_ts


def _checked_columns(columns: StatusColumns, n_spans: int) -> StatusColumns:
    states: U8 = np.asarray(columns.states, np.uint8)
    checkpoint_ts: U64 = np.asarray(columns.checkpoint_ts, np.uint64)
    resolved_ts: U64 = np.asarray(columns.resolved_ts, np.uint64)
    last_synced_ts: U64 = np.asarray(columns.last_synced_ts, np.uint64)
    errors = [(int(place), str(text)) for place, text in columns.errors]
    shapes = {states.shape, checkpoint_ts.shape, resolved_ts.shape, last_synced_ts.shape}
    if shapes != {(n_spans,)} or (states >= len(TableState)).any():
        raise OperatingError(f"get_table_span_statuses of {n_spans} spans: a column does not fit")
    if any(not 0 <= place < n_spans for place, _ in errors):
        raise OperatingError(f"get_table_span_statuses of {n_spans} spans: an error is at a position beyond them")
    return StatusColumns(states, checkpoint_ts, resolved_ts, last_synced_ts, errors)
