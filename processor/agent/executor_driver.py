"""The calls of a user's executor that are due for the spans of an agent, and the border at which its exceptions stop.

Every call is made on one thread, inside Agent.tick. An exception is the error of the span that the call was for and of no other;
this is the only module of the agent that catches `Exception`. A call that fails while a span is being removed is repeated with
the next tick: Stopped is reported only when the executor has confirmed it.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from processor.core.span_table import Rows, SpanTable
from processor.core.table_life import OUTCOME, Call, Input, Phase
from tablewire.errors import OperatingError, TablewireError
from tablewire.executor import (
    BarrierTableExecutor,
    BulkTableExecutor,
    ClosableTableExecutor,
    FencedTableExecutor,
    TableExecutor,
)
from tablewire.model.ids import TS_MAX, Ts
from tablewire.model.progress import Barrier, Checkpoint, StatusColumns, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.runtime.uris import redact_uri

MAX_ERROR_CHARACTERS = 1_000
"""An error's text is cut to this length before it is reported."""

_CLOSE_POLL_SECONDS = 0.005

_STATES = tuple(TableState)
_HAS_ENDED = np.array([state in (TableState.ABSENT, TableState.STOPPING, TableState.STOPPED) for state in _STATES])


class ExecutorDriver:
    """One executor and the spans that it works for. One thread."""

    def __init__(self, executor: TableExecutor, table: SpanTable) -> None:
        self._executor = executor
        self._table = table
        self._fence = executor if isinstance(executor, FencedTableExecutor) else None
        self.is_fenced = self._fence is not None
        self._barrier = executor if isinstance(executor, BarrierTableExecutor) else None
        self._bulk = executor if isinstance(executor, BulkTableExecutor) else None
        self.last_error: BaseException | None = None  # of the last call that raised, for the log

    # Transitions -----------------------------------------------------------------------------------------------------

    def drive(self) -> None:
        """Make every call that is due, once, and the calls that these make due. Removals first: others may wait for them."""
        table = self._table
        if table.is_settled():
            return
        self._remove()
        self._make(Call.ADD_PREPARE, self._adder(is_prepare=True))
        self._make(Call.IS_PREPARED, self._is_added(is_prepare=True))
        doubtful = [row for row in table.rows_due(Call.ADD_WRITE) if table.start_ts[row] < table.prepared_from[row]]
        table.apply(Input.BEHIND, self._ask(doubtful, self._is_behind))
        add = self._adder(is_prepare=False)
        self._make(Call.ADD_WRITE, lambda row: self._raise_epoch(row) and add(row))
        self._make(Call.IS_WRITING, self._is_added(is_prepare=False))
        for row in self._ask(sorted(table.to_raise), self._raise_epoch):
            table.epoch_raised(row)
        self._remove_failed()

    def _make(self, call: Call, attempt: Callable[[int], bool]) -> None:
        """Make this call for every row for which it is due."""
        rows = self._table.rows_due(call)
        done = self._ask(rows, attempt)
        self._table.apply(OUTCOME[call], done)

    def _remove(self) -> None:
        self._make(Call.REMOVE, lambda row: self._executor.remove_table_span(self._table.spans[row]))
        last: dict[int, Ts] = {}

        def is_removed(row: int) -> bool:
            checkpoint_ts, is_finished = self._executor.is_remove_table_span_finished(self._table.spans[row])
            if is_finished:
                last[row] = _checked_ts(checkpoint_ts)
            return is_finished

        self._make(Call.IS_REMOVED, is_removed)
        self._table.advance_checkpoints(list(last), list(last.values()))

    def _remove_failed(self) -> None:
        if not self._table.is_settled() and self._table.rows_due(Call.REMOVE):
            self._remove()

    def _adder(self, *, is_prepare: bool) -> Callable[[int], bool]:
        add, spans = self._executor.add_table_span, self._table.spans
        start_ts, resolved_ts = self._table.start_ts.item, self._table.start_resolved_ts.item
        return lambda row: add(spans[row], Checkpoint(start_ts(row), resolved_ts(row)), is_prepare)

    def _is_added(self, *, is_prepare: bool) -> Callable[[int], bool]:
        is_finished, spans = self._executor.is_add_table_span_finished, self._table.spans
        return lambda row: is_finished(spans[row], is_prepare)

    def _raise_epoch(self, row: int) -> bool:
        if self._fence is not None:
            self._fence.set_assignment_epoch(self._table.spans[row], self._table.granted_epoch.item(row))
        return True

    def _is_behind(self, row: int) -> bool:
        """Return whether changes between the grant and the point from which the span was prepared are missing here: they are
        unless the sink is further than that point."""
        status = self._executor.get_table_span_status(self._table.spans[row], False)
        return status.checkpoint.checkpoint_ts <= self._table.prepared_from.item(row)

    # Statuses --------------------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Ask for the status of every span that the executor has, note what moved, and fail what has ended by itself."""
        rows, spans = self._table.observed()
        if not spans:
            return
        columns = self._bulk_statuses(spans)
        if columns is None:
            rows, columns = self._single_statuses(rows)
        self._table.observe(rows, columns.checkpoint_ts, columns.resolved_ts, columns.last_synced_ts)
        texts = dict(columns.errors)
        ended = np.flatnonzero(_HAS_ENDED[columns.states]).tolist()
        for place in sorted({*ended, *texts}):
            state = _STATES[int(columns.states[place])]
            text = texts.get(place) or f"the executor reports the span as {state}, although it was not removed"
            self._table.fail(int(rows[place]), _reportable(text))
        self._remove_failed()

    def observe_stats(self, rows: Iterable[int]) -> None:
        """Collect the statistics of these rows, as far as they are being written."""
        self._ask([row for row in rows if self._table.phase[row] == Phase.REPLICATING], self._collect_stats)
        self._remove_failed()

    def _collect_stats(self, row: int) -> bool:
        stats = self._executor.get_table_span_status(self._table.spans[row], True).stats
        if stats is not None:
            puller = stats.stage_checkpoints.get("puller")
            puller_ts = _checked_ts(puller.resolved_ts) if puller is not None else 0
            rates = _checked_rate(stats.rows_per_s), _checked_rate(stats.bytes_per_s)
            self._table.observe_stats(row, *rates, puller_ts, "snapshot" in stats.stage_checkpoints)
        return True

    def _bulk_statuses(self, spans: Sequence[Span]) -> StatusColumns | None:
        """Return the statuses of all spans; None if there is no bulk form, or it failed: then each span is asked, which finds
        the one at fault."""
        if self._bulk is None:
            return None
        try:
            return _checked_columns(self._bulk.get_table_span_statuses(spans), len(spans))
        except Exception as error:  # noqa: BLE001 - the border of a user's executor
            self.last_error = error
            return None

    def _single_statuses(self, rows: Rows) -> tuple[Rows, StatusColumns]:
        """Return the rows whose call did not raise, and their statuses."""
        statuses: list[tuple[int, Ts, Ts, Ts]] = []
        errors: list[tuple[int, str]] = []

        def ask(row: int) -> bool:
            status = self._executor.get_table_span_status(self._table.spans[row], False)
            values = _checked_status(status)
            if status.error:
                errors.append((len(statuses), str(status.error)))
            statuses.append(values)
            return True

        answered = self._ask(rows.tolist(), ask)
        states, checkpoint_ts, resolved_ts, last_synced_ts = np.array(statuses, np.uint64).reshape(-1, 4).T
        columns = StatusColumns(states.astype(np.uint8), checkpoint_ts, resolved_ts, last_synced_ts, errors)
        return np.array(answered, np.intp), columns

    # The rest --------------------------------------------------------------------------------------------------------

    def set_barrier(self, barrier: Barrier) -> None:
        """Pass the barrier to an executor that wants it. If that raises, no span can be trusted to keep it: all fail."""
        if self._barrier is None:
            return
        try:
            self._barrier.set_barrier(barrier)
        except Exception as error:  # noqa: BLE001 - the border of a user's executor
            self.last_error = error
            for row in self._table.observed()[0].tolist():
                self._table.fail(row, f"set_barrier: {_text(error)}")

    def close(self, timeout_ms: int) -> None:
        """Return once no write can follow; OperatingError if the executor does not stop within timeout_ms."""
        if isinstance(self._executor, ClosableTableExecutor):
            try:
                self._executor.close()
            except Exception as error:
                raise OperatingError(f"the executor did not close: {_text(error)}") from error
            return
        table = self._table
        for row, phase in enumerate(table.phase[: table.size].tolist()):
            if Phase.ABSENT < phase < Phase.REMOVING:
                table.fail(row, "the agent is closed")
        for _ in range(max(1, int(timeout_ms / 1000 / _CLOSE_POLL_SECONDS))):
            self._remove()
            left = table.rows_due(Call.REMOVE) + table.rows_due(Call.IS_REMOVED)
            if not left:
                return
            time.sleep(_CLOSE_POLL_SECONDS)
        raise OperatingError(
            f"the executor has not stopped {len(left)} spans within {timeout_ms} ms, among them {table.spans[left[0]]}"
        )

    def _ask(self, rows: Iterable[int], call: Callable[[int], bool]) -> list[int]:
        """Return the rows for which `call` returns True. An exception fails that row."""
        answered = []
        for row in rows:
            try:
                if call(row):
                    answered.append(row)
            except Exception as error:  # noqa: BLE001 - the border of a user's executor
                self.last_error = error
                self._table.fail(row, _text(error))
        return answered


def _text(error: Exception) -> str:
    if isinstance(error, TablewireError) and str(error):
        return _reportable(str(error))
    # Not str(): an exception of a user may fail even there.
    return _reportable("".join(traceback.format_exception_only(error)).strip())


def _reportable(text: str) -> str:
    """Return valid UTF-8 of bounded length, without passwords."""
    return redact_uri(text)[:MAX_ERROR_CHARACTERS].encode(errors="replace").decode()


def _checked_rate(rate: float) -> float:
    """Return the rate, or 0 for nonsense: rates only steer the balance, which is no reason to stop a table."""
    return rate if math.isfinite(rate) and rate >= 0 else 0.0


def _checked_ts(ts: Ts) -> Ts:
    if not 0 <= ts <= TS_MAX:
        raise OperatingError(f"the executor returned {ts}, which is no Ts")
    return ts


def _checked_status(status: TableStatus) -> tuple[int, Ts, Ts, Ts]:
    at = status.checkpoint
    if (at.checkpoint_ts | at.resolved_ts | at.last_synced_ts) >> 64:
        raise OperatingError(f"the executor returned {at}, which holds no Ts")
    return status.state.code, at.checkpoint_ts, at.resolved_ts, at.last_synced_ts


def _checked_columns(columns: StatusColumns, n_spans: int) -> StatusColumns:
    checked = StatusColumns(
        np.asarray(columns.states, np.uint8),
        np.asarray(columns.checkpoint_ts, np.uint64),
        np.asarray(columns.resolved_ts, np.uint64),
        np.asarray(columns.last_synced_ts, np.uint64),
        [(int(place), str(text)) for place, text in columns.errors],
    )
    shapes = {checked.states.shape, checked.checkpoint_ts.shape, checked.resolved_ts.shape, checked.last_synced_ts.shape}
    if shapes != {(n_spans,)} or (checked.states >= len(TableState)).any():
        raise OperatingError(f"get_table_span_statuses of {n_spans} spans: a column does not fit")
    if any(not 0 <= place < n_spans for place, _ in checked.errors):
        raise OperatingError(f"get_table_span_statuses of {n_spans} spans: an error is at a position beyond them")
    return checked
