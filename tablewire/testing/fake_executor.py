"""The executors that `tablewire.testing` offers. Import them from there."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tablewire.errors import EpochRefusedError
from tablewire.model.columns import U8, U64
from tablewire.model.ids import TS_MAX, Ts
from tablewire.model.progress import Barrier, Checkpoint, Stats, StatusColumns, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.testing.fake_sink import FakeSink

MAX_RECORDED_CALLS = 100_000

_ABSENT, _PREPARING, _PREPARED, _REPLICATING, _STOPPING = (
    state.code
    for state in (TableState.ABSENT, TableState.PREPARING, TableState.PREPARED, TableState.REPLICATING, TableState.STOPPING)
)
_STATES = tuple(TableState)
_STEPS = ("prepare", "write", "stop")


class FakeCall(NamedTuple):
    """A call of an executor. is_prepare: None for calls without it."""

    name: str
    span: Span
    is_prepare: bool | None = None


class UnfencedFakeTableExecutor:
    """A TableExecutor whose sink knows no epochs: it has no `set_assignment_epoch`. Else like FakeTableExecutor, see there."""

    def __init__(
        self,
        sink: FakeSink | None = None,
        *,
        name: str = "",
        changefeed_epoch: int = 0,
        prepare_polls: int = 0,
        write_polls: int = 0,
        stop_polls: int = 0,
        refusals: int = 0,
        auto_advance: int = 0,
        record_calls: bool = True,
    ) -> None:
        self.sink = sink
        self.name = name or f"executor-{id(self):x}"
        self.calls: deque[FakeCall] = deque(maxlen=MAX_RECORDED_CALLS)
        """Every call that came, oldest first (the last 100,000)."""
        self.barrier: Barrier | None = None
        """The last one that came."""
        self.is_closed = False
        self._changefeed_epoch = changefeed_epoch
        self._polls = {"prepare": prepare_polls, "write": write_polls, "stop": stop_polls}
        self._refusals = refusals
        self._auto_advance = auto_advance
        self._record_calls = record_calls
        self._row_of: dict[Span, int] = {}
        self._spans: list[Span] = []
        self._free: list[int] = []
        self._state: U8 = np.zeros(64, np.uint8)
        self._checkpoint_ts: U64 = np.zeros(64, np.uint64)
        self._resolved_ts: U64 = np.zeros(64, np.uint64)
        self._last_synced_ts: U64 = np.zeros(64, np.uint64)
        self._limit_ts: U64 = np.full(64, TS_MAX, np.uint64)
        self._starting: set[Span] = set()  # add_table_span(write) was taken and has not finished
        self._epochs: dict[Span, int] = {}
        self._polled: Counter[tuple[Span, str]] = Counter()
        self._refused: Counter[tuple[str, Span, bool | None]] = Counter()
        self._hangs: set[tuple[Span | None, str]] = set()
        self._raises: list[tuple[str, Span | None, Exception]] = []
        self._failures: dict[Span, Exception] = {}
        self._stats: dict[Span, Stats] = {}
        self._last_asked: tuple[Sequence[Span], npt.NDArray[np.intp], int] | None = None
        self._version = 0  # grows when a span comes or goes

    # The script ----------------------------------------------------------------------------------------------------

    def advance(self, ts: Ts, span: Span | None = None) -> None:
        """Everything up to `ts` was received by every span (or this one), and written by those that replicate, as far as the
        barrier lets them. Nothing goes back."""
        rows = np.array(list(self._row_of.values()) if span is None else [self._row_of[span]], np.intp)
        self._resolved_ts[rows] = np.maximum(self._resolved_ts[rows], np.uint64(ts))
        self._write(rows[self._state[rows] == _REPLICATING], np.uint64(ts))

    def fail(self, span: Span, error: str | Exception = "it broke") -> None:
        """The span fails in the background: `get_table_span_status` raises this from now on, until the span is removed."""
        self._failures[span] = error if isinstance(error, Exception) else RuntimeError(error)

    def raise_at(self, call: str, span: Span | None = None, error: Exception | None = None) -> None:
        """The next call of this name (for this span) raises, once. Say it n times for n calls."""
        if not hasattr(self, call):
            raise ValueError(f"an executor has no call {call!r}")
        self._raises.append((call, span, error or RuntimeError(f"scripted failure of {call}")))

    def hang(self, step: str, span: Span | None = None) -> None:
        """The step, "prepare", "write" or "stop", of this span (None: of all) does not finish until `let_go`."""
        if step not in _STEPS:
            raise ValueError(f"a step is one of {', '.join(_STEPS)}, not {step!r}")
        self._hangs.add((span, step))

    def let_go(self, step: str, span: Span | None = None) -> None:
        """Ends `hang` with the same arguments."""
        self._hangs.discard((span, step))

    def lose(self, span: Span) -> None:
        """The executor has forgotten the span, without a word; no write can follow."""
        self._forget(span)

    def set_stats(self, span: Span, stats: Stats) -> None:
        """What `get_table_span_status(span, collect_stat=True)` carries from now on."""
        self._stats[span] = stats

    def spans(self) -> tuple[Span, ...]:
        """What it has, in any state."""
        return tuple(sorted(self._row_of))

    def state(self, span: Span) -> TableState:
        row = self._row_of.get(span)
        return TableState.ABSENT if row is None else _STATES[int(self._state[row])]

    def assignment_epoch(self, span: Span) -> int:
        """The last one that was set, 0 if none."""
        return self._epochs.get(span, 0)

    # TableExecutor -------------------------------------------------------------------------------------------------

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        self._called("add_table_span", span, is_prepare)
        if self.is_closed:
            raise RuntimeError("the executor is closed")
        if self._refuses("add_table_span", span, is_prepare):
            return False
        row = self._row_of.get(span)
        if is_prepare:
            if row is None:
                self._new(span, checkpoint)
            return True
        if row is None or self._state[row] == _PREPARING:
            raise RuntimeError(f"span {span} was to be written without being prepared")
        if self._state[row] == _PREPARED and span not in self._starting:
            start = checkpoint.checkpoint_ts
            if self.sink is not None:
                start = self.sink.take_over(span, self.name, self._fence(span), start)
            self._checkpoint_ts[row] = max(start, int(self._checkpoint_ts[row]))
            self._resolved_ts[row] = max(int(self._resolved_ts[row]), int(self._checkpoint_ts[row]))
            self._starting.add(span)
        return True

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        self._called("is_add_table_span_finished", span, is_prepare)
        row = self._row_of.get(span)
        if row is None:
            return False
        if is_prepare:
            if self._state[row] == _PREPARING and self._finishes(span, "prepare"):
                self._state[row] = _PREPARED
            return bool(self._state[row] != _PREPARING)
        if span in self._starting and self._finishes(span, "write"):
            self._starting.discard(span)
            self._state[row] = _REPLICATING
        return bool(self._state[row] == _REPLICATING)

    def remove_table_span(self, span: Span) -> bool:
        self._called("remove_table_span", span)
        row = self._row_of.get(span)
        if row is None:
            return True
        if self._refuses("remove_table_span", span, None):
            return False
        self._state[row] = _STOPPING
        self._starting.discard(span)
        return True

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        self._called("is_remove_table_span_finished", span)
        row = self._row_of.get(span)
        if row is None:
            return 0, True
        checkpoint_ts = int(self._checkpoint_ts[row])
        if self._state[row] != _STOPPING or not self._finishes(span, "stop"):
            return checkpoint_ts, False
        self._forget(span)
        return checkpoint_ts, True

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        self._called("get_table_span_status", span)
        row = self._row_of.get(span)
        if row is None:
            return TableStatus(span, TableState.ABSENT, Checkpoint(0, 0))
        if span in self._failures:
            raise self._failures[span]
        self._auto(np.array([row], np.intp))
        if span in self._failures:
            raise self._failures[span]
        checkpoint = Checkpoint(int(self._checkpoint_ts[row]), int(self._resolved_ts[row]), int(self._last_synced_ts[row]))
        return TableStatus(span, _STATES[int(self._state[row])], checkpoint, self._stats.get(span) if collect_stat else None)

    # Optional forms ------------------------------------------------------------------------------------------------

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns:
        """The bulk form: all in one call. Not recorded in `calls`."""
        rows = self._rows(spans)
        here = rows >= 0
        self._auto(rows[here])
        errors: list[tuple[int, str]] = []
        if self._failures:
            errors = [(at, str(self._failures[span])) for at, span in enumerate(spans) if span in self._failures]
        if here.all():
            return StatusColumns(
                self._state[rows], self._checkpoint_ts[rows], self._resolved_ts[rows], self._last_synced_ts[rows], errors
            )
        zero = np.uint64(0)
        return StatusColumns(
            np.where(here, self._state[rows], np.uint8(_ABSENT)),
            np.where(here, self._checkpoint_ts[rows], zero),
            np.where(here, self._resolved_ts[rows], zero),
            np.where(here, self._last_synced_ts[rows], zero),
            errors,
        )

    def set_barrier(self, barrier: Barrier) -> None:
        self.barrier = barrier
        self._limit_ts[:] = barrier.global_barrier_ts
        for span, row in self._row_of.items() if barrier.table_barriers else ():
            self._limit_ts[row] = self._limit_of(span)

    def close(self) -> None:
        """Everything stops at once, hung or not."""
        self.is_closed = True
        for span in list(self._row_of):
            self._forget(span)

    # Inside --------------------------------------------------------------------------------------------------------

    def _fence(self, span: Span) -> tuple[int, int] | None:
        return None

    def _called(self, name: str, span: Span, is_prepare: bool | None = None) -> None:
        if self._record_calls:
            self.calls.append(FakeCall(name, span, is_prepare))
        if self._raises:
            for at, (call, only, error) in enumerate(self._raises):
                if call == name and only in (None, span):
                    del self._raises[at]
                    raise error

    def _refuses(self, name: str, span: Span, is_prepare: bool | None) -> bool:
        if self._refusals == 0 or self._refused[name, span, is_prepare] >= self._refusals:
            return False
        self._refused[name, span, is_prepare] += 1
        return True

    def _finishes(self, span: Span, step: str) -> bool:
        if self._hangs and ((span, step) in self._hangs or (None, step) in self._hangs):
            return False
        if self._polls[step] and self._polled[span, step] < self._polls[step]:
            self._polled[span, step] += 1
            return False
        return True

    def _auto(self, rows: npt.NDArray[np.intp]) -> None:
        if self._auto_advance and len(rows):
            rows = rows[self._state[rows] == _REPLICATING]
            self._write(rows, self._checkpoint_ts[rows] + np.uint64(self._auto_advance))

    def _write(self, rows: npt.NDArray[np.intp], ts: U64 | np.uint64) -> None:
        target = np.maximum(np.minimum(ts, self._limit_ts[rows]), self._checkpoint_ts[rows])
        if self.sink is not None:
            written = [self._write_at_sink(row, to) for row, to in zip(rows.tolist(), target.tolist(), strict=True)]
            keep = np.array(written, bool)
            rows, target = rows[keep], target[keep]
        moved = target > self._checkpoint_ts[rows]
        self._checkpoint_ts[rows] = target
        self._resolved_ts[rows] = np.maximum(self._resolved_ts[rows], target)
        self._last_synced_ts[rows[moved]] = target[moved]

    def _write_at_sink(self, row: int, checkpoint_ts: Ts) -> bool:
        span = self._spans[row]
        assert self.sink is not None
        try:
            self.sink.write(span, self.name, checkpoint_ts)
        except EpochRefusedError as error:
            self._failures.setdefault(span, error)
            return False
        return True

    def _limit_of(self, span: Span) -> Ts:
        if self.barrier is None:
            return TS_MAX
        own = (barrier.barrier_ts for barrier in self.barrier.table_barriers if barrier.table_id == span.table_id)
        return min(self.barrier.global_barrier_ts, min(own, default=TS_MAX))

    def _rows(self, spans: Sequence[Span]) -> npt.NDArray[np.intp]:
        """Row by span, -1 for an unknown one; remembered while the same list is asked for and nothing came or went."""
        if self._last_asked is not None and self._last_asked[0] is spans and self._last_asked[2] == self._version:
            return self._last_asked[1]
        row_of = self._row_of
        rows = np.array([row_of.get(span, -1) for span in spans], np.intp)
        self._last_asked = (spans, rows, self._version)
        return rows

    def _new(self, span: Span, checkpoint: Checkpoint) -> None:
        if self._free:
            row = self._free.pop()
            self._spans[row] = span
        else:
            row = len(self._spans)
            self._spans.append(span)
            if row == len(self._state):
                self._state = np.concatenate([self._state, np.zeros_like(self._state)])
                self._checkpoint_ts = np.concatenate([self._checkpoint_ts, np.zeros_like(self._checkpoint_ts)])
                self._resolved_ts = np.concatenate([self._resolved_ts, np.zeros_like(self._resolved_ts)])
                self._last_synced_ts = np.concatenate([self._last_synced_ts, np.zeros_like(self._last_synced_ts)])
                self._limit_ts = np.concatenate([self._limit_ts, np.zeros_like(self._limit_ts)])
        self._row_of[span] = row
        self._version += 1
        self._state[row] = _PREPARING
        self._checkpoint_ts[row] = checkpoint.checkpoint_ts
        self._resolved_ts[row] = max(checkpoint.checkpoint_ts, checkpoint.resolved_ts)
        self._last_synced_ts[row] = 0
        self._limit_ts[row] = self._limit_of(span)

    def _forget(self, span: Span) -> None:
        row = self._row_of.pop(span, None)
        if row is None:
            return
        self._version += 1
        self._state[row] = _ABSENT
        self._free.append(row)
        self._starting.discard(span)
        self._epochs.pop(span, None)
        self._failures.pop(span, None)
        for step in _STEPS:
            self._polled.pop((span, step), None)
        for key in (("add_table_span", span, True), ("add_table_span", span, False), ("remove_table_span", span, None)):
            self._refused.pop(key, None)
        if self.sink is not None:
            self.sink.leave(span, self.name)


class FakeTableExecutor(UnfencedFakeTableExecutor):
    """A TableExecutor that does as it is told, and with no arguments everything at once: a span is prepared, writes and stops
    within the call that asks for it; its checkpoint moves when `advance` is called.

    sink: shared by several executors, see FakeSink; None = no sink at all. name: at the sink, and for people.
    changefeed_epoch: the first half of the fence. prepare_polls, write_polls, stop_polls: how many times `is_…_finished` says no
    before it says yes. refusals: how many times each add_table_span and remove_table_span is not taken at first.
    auto_advance: each status that is asked for moves a replicating span by so much.
    It offers the optional forms too: bulk statuses, barriers, epochs, close. It raises what a real one would treat as a broken
    contract (a write of a span that is not prepared, a call after close).
    """

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        self._called("set_assignment_epoch", span)
        row = self._row_of.get(span)
        if row is None:
            raise RuntimeError(f"span {span} is not here")
        before, self._epochs[span] = self._epochs.get(span, 0), epoch
        is_writing = span in self._starting or self._state[row] == _REPLICATING
        if self.sink is not None and is_writing and epoch != before:
            self.sink.take_over(span, self.name, (self._changefeed_epoch, epoch), int(self._checkpoint_ts[row]))

    def _fence(self, span: Span) -> tuple[int, int] | None:
        return self._changefeed_epoch, self._epochs.get(span, 0)
