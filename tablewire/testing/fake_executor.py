"""The executors of `tablewire.testing`; import them from there."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
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

_ABSENT, _PREPARING, _PREPARED, _REPLICATING, _STOPPING, _ = (state.code for state in TableState)
_STEPS = ("prepare", "write", "stop")
_CHECKPOINT, _RESOLVED, _SYNCED = range(3)
"""Columns of `_ts`."""
_NO_ROW = 0
"""The row of every unknown span: ABSENT and all 0."""


class FakeCall(NamedTuple):
    """A call of an executor. is_prepare: None for calls without that argument."""

    name: str
    span: Span
    is_prepare: bool | None = None


@dataclass(slots=True)
class _Held:
    """A span that is held. is_starting: phase two is not finished. polls: by step."""

    row: int
    is_starting: bool = False
    epoch: int = 0
    polls: dict[str, int] = field(default_factory=dict)


class UnfencedFakeTableExecutor:
    """A FakeTableExecutor whose sink knows no epochs: it has no `set_assignment_epoch`."""

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
        """The last 100,000 calls, oldest first."""
        self.barrier: Barrier | None = None
        """The last one that was set."""
        self.is_closed = False
        self._changefeed_epoch = changefeed_epoch
        self._polls = {"prepare": prepare_polls, "write": write_polls, "stop": stop_polls}
        self._refusals = refusals
        self._auto_advance = auto_advance
        self._record_calls = record_calls
        self._held: dict[Span, _Held] = {}
        self._version = 0  # grows when a span is added or forgotten
        self._state: U8 = np.zeros(64, np.uint8)
        self._ts: U64 = np.zeros((64, 3), np.uint64)
        self._spans: list[Span] = [Span(0)]  # by row
        self._free: list[int] = []
        self._refused: Counter[tuple[Span, str, bool | None]] = Counter()
        self._hangs: set[tuple[Span | None, str]] = set()
        self._raises: list[tuple[str, Span | None, Exception]] = []
        self._failures: dict[Span, Exception] = {}
        self._stats: dict[Span, Stats] = {}
        self._last_lookup: tuple[Sequence[Span], npt.NDArray[np.intp], int] | None = None

    # -- the script

    def advance(self, ts: Ts, span: Span | None = None) -> None:
        """Receive everything up to `ts`; spans that replicate also write it, up to the barrier."""
        rows = np.flatnonzero(self._state) if span is None else np.array([self._held[span].row], np.intp)
        self._ts[rows, _RESOLVED] = np.maximum(self._ts[rows, _RESOLVED], np.uint64(ts))
        self._write(rows[self._state[rows] == _REPLICATING], np.uint64(ts))

    def fail(self, span: Span, error: str | Exception = "it broke") -> None:
        """Let the span fail in the background: its status raises this until the span is removed."""
        self._failures[span] = error if isinstance(error, Exception) else RuntimeError(error)

    def raise_at(self, call: str, span: Span | None = None, error: Exception | None = None) -> None:
        """Let the next call with this name (for this span) raise once."""
        if not hasattr(self, call):
            raise ValueError(f"an executor has no call {call!r}")
        self._raises.append((call, span, error or RuntimeError(f"scripted failure of {call}")))

    def hang(self, step: str, span: Span | None = None) -> None:
        """Do not finish this step ("prepare", "write", "stop") of one or all spans until `let_go`."""
        if step not in _STEPS:
            raise ValueError(f"a step is one of {', '.join(_STEPS)}, not {step!r}")
        self._hangs.add((span, step))

    def let_go(self, step: str, span: Span | None = None) -> None:
        """End a `hang` with the same arguments."""
        self._hangs.discard((span, step))

    def lose(self, span: Span) -> None:
        """Forget the span without reporting it; no write can follow."""
        self._forget(span)

    def set_stats(self, span: Span, stats: Stats) -> None:
        """Return these statistics from `get_table_span_status(span, collect_stat=True)`."""
        self._stats[span] = stats

    def spans(self) -> tuple[Span, ...]:
        """Return the spans that are held, in any state."""
        return tuple(sorted(self._held))

    def state(self, span: Span) -> TableState:
        return TableState.from_code(int(self._state[self._row(span)]))

    def assignment_epoch(self, span: Span) -> int:
        """Return the last epoch that was set, 0 if none was."""
        return self._held[span].epoch if span in self._held else 0

    # -- TableExecutor

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        self._called("add_table_span", span, is_prepare)
        if self.is_closed:
            raise RuntimeError("the executor is closed")
        if self._refuses("add_table_span", span, is_prepare):
            return False
        if is_prepare:
            if span not in self._held:
                self._add(span, checkpoint)
            return True
        held = self._held.get(span)
        if held is None or self._state[held.row] == _PREPARING:
            raise RuntimeError(f"span {span} was to be written without being prepared")
        if self._state[held.row] == _PREPARED and not held.is_starting:
            start = checkpoint.checkpoint_ts
            if self.sink is not None:
                start = self.sink.take_over(span, self.name, self._fence(held), start)
            row = self._ts[held.row]
            row[_CHECKPOINT] = max(start, int(row[_CHECKPOINT]))
            row[_RESOLVED] = max(row[_RESOLVED], row[_CHECKPOINT])
            held.is_starting = True
        return True

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        self._called("is_add_table_span_finished", span, is_prepare)
        held = self._held.get(span)
        if held is None:
            return False
        if is_prepare:
            if self._state[held.row] == _PREPARING and self._finishes(span, "prepare"):
                self._state[held.row] = _PREPARED
            return bool(self._state[held.row] != _PREPARING)
        if held.is_starting and self._finishes(span, "write"):
            held.is_starting = False
            self._state[held.row] = _REPLICATING
        return bool(self._state[held.row] == _REPLICATING)

    def remove_table_span(self, span: Span) -> bool:
        self._called("remove_table_span", span)
        if span not in self._held:
            return True
        if self._refuses("remove_table_span", span, None):
            return False
        held = self._held[span]
        self._state[held.row], held.is_starting = _STOPPING, False
        return True

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        self._called("is_remove_table_span_finished", span)
        if span not in self._held:
            return 0, True
        row = self._row(span)
        checkpoint_ts = int(self._ts[row, _CHECKPOINT])
        if self._state[row] != _STOPPING or not self._finishes(span, "stop"):
            return checkpoint_ts, False
        self._forget(span)
        return checkpoint_ts, True

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        self._called("get_table_span_status", span)
        row = self._row(span)
        if row == _NO_ROW:
            return TableStatus(span, TableState.ABSENT, Checkpoint(0, 0))
        if span not in self._failures:
            self._advance_automatically(np.array([row], np.intp))
        if span in self._failures:
            raise self._failures[span]
        stats = self._stats.get(span) if collect_stat else None
        return TableStatus(span, self.state(span), Checkpoint(*self._ts[row].tolist()), stats)

    # -- optional methods

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns:
        """Return the statuses of many spans. The call is not recorded in `calls`."""
        rows = self._look_up(spans)
        self._advance_automatically(rows)
        errors = (
            [(at, str(self._failures[span])) for at, span in enumerate(spans) if span in self._failures] if self._failures else []
        )
        ts = self._ts[rows]
        return StatusColumns(self._state[rows], ts[:, _CHECKPOINT], ts[:, _RESOLVED], ts[:, _SYNCED], errors)

    def set_barrier(self, barrier: Barrier) -> None:
        self.barrier = barrier

    def close(self) -> None:
        """Stop everything at once, including what hangs."""
        self.is_closed = True
        for span in list(self._held):
            self._forget(span)

    # -- inside

    def _fence(self, _held: _Held) -> tuple[int, int] | None:
        return None

    def _called(self, name: str, span: Span, is_prepare: bool | None = None) -> None:
        if self._record_calls:
            self.calls.append(FakeCall(name, span, is_prepare))
        for at, (call, only, error) in enumerate(self._raises):
            if call == name and only in (None, span):
                del self._raises[at]
                raise error

    def _refuses(self, name: str, span: Span, is_prepare: bool | None) -> bool:
        if not self._refusals or self._refused[span, name, is_prepare] >= self._refusals:
            return False
        self._refused[span, name, is_prepare] += 1
        return True

    def _finishes(self, span: Span, step: str) -> bool:
        if self._hangs and not self._hangs.isdisjoint({(span, step), (None, step)}):
            return False
        polls = self._held[span].polls
        polls[step] = polls.get(step, 0) + 1
        return polls[step] > self._polls[step]

    def _advance_automatically(self, rows: npt.NDArray[np.intp]) -> None:
        if self._auto_advance:
            rows = rows[self._state[rows] == _REPLICATING]
            self._write(rows, self._ts[rows, _CHECKPOINT] + np.uint64(self._auto_advance))

    def _write(self, rows: npt.NDArray[np.intp], ts: U64 | np.uint64) -> None:
        before = self._ts[rows, _CHECKPOINT]
        target = np.maximum(np.minimum(ts, self._limits(rows)), before)
        if self.sink is not None:
            for at, (row, checkpoint_ts) in enumerate(zip(rows.tolist(), target.tolist(), strict=True)):
                if not self._write_at_sink(self.sink, self._spans[row], checkpoint_ts):
                    target[at] = before[at]
        self._ts[rows, _CHECKPOINT] = target
        self._ts[rows, _RESOLVED] = np.maximum(self._ts[rows, _RESOLVED], target)
        moved = target > before
        self._ts[rows[moved], _SYNCED] = target[moved]

    def _write_at_sink(self, sink: FakeSink, span: Span, checkpoint_ts: Ts) -> bool:
        try:
            sink.write(span, self.name, checkpoint_ts)
        except EpochRefusedError as error:
            self._failures.setdefault(span, error)
            return False
        return True

    def _limits(self, rows: npt.NDArray[np.intp]) -> U64 | np.uint64:
        """Return how far each row may be written."""
        if self.barrier is None:
            return np.uint64(TS_MAX)
        if not self.barrier.table_barriers:
            return np.uint64(self.barrier.global_barrier_ts)
        own = {barrier.table_id: barrier.barrier_ts for barrier in self.barrier.table_barriers}
        limits = [own.get(self._spans[row].table_id, TS_MAX) for row in rows.tolist()]
        return np.minimum(np.array(limits, np.uint64), np.uint64(self.barrier.global_barrier_ts))

    def _row(self, span: Span) -> int:
        held = self._held.get(span)
        return _NO_ROW if held is None else held.row

    def _look_up(self, spans: Sequence[Span]) -> npt.NDArray[np.intp]:
        """Return the rows of these spans; remember them for the same list while nothing changes."""
        if self._last_lookup is not None and self._last_lookup[0] is spans and self._last_lookup[2] == self._version:
            return self._last_lookup[1]
        rows = np.array([held.row if (held := self._held.get(span)) is not None else _NO_ROW for span in spans], np.intp)
        self._last_lookup = (spans, rows, self._version)
        return rows

    def _add(self, span: Span, checkpoint: Checkpoint) -> None:
        row = len(self._spans)
        if self._free:
            row = self._free.pop()
            self._spans[row] = span
        else:
            self._spans.append(span)
        if row == len(self._state):
            self._state = np.concatenate([self._state, np.zeros_like(self._state)])
            self._ts = np.concatenate([self._ts, np.zeros_like(self._ts)])
        self._held[span] = _Held(row)
        self._version += 1
        checkpoint_ts = checkpoint.checkpoint_ts
        self._state[row] = _PREPARING
        self._ts[row] = (checkpoint_ts, max(checkpoint_ts, checkpoint.resolved_ts), 0)

    def _forget(self, span: Span) -> None:
        held = self._held.pop(span, None)
        if held is None:
            return
        self._version += 1
        self._state[held.row] = _ABSENT
        self._free.append(held.row)
        self._failures.pop(span, None)
        for name, is_prepare in (("add_table_span", True), ("add_table_span", False), ("remove_table_span", None)):
            self._refused.pop((span, name, is_prepare), None)
        if self.sink is not None:
            self.sink.leave(span, self.name)


class FakeTableExecutor(UnfencedFakeTableExecutor):
    """A TableExecutor that follows a script, with all optional methods.

    With no arguments every step is finished within the call that requests it, and checkpoints move
    when `advance` is called.

    sink: shared by several executors; None for no sink. name: the writer's name at the sink.
    changefeed_epoch: the first half of the fence. prepare_polls, write_polls, stop_polls: how many
    times `is_…_finished` returns False first. refusals: how many times each add_table_span and
    remove_table_span returns False first. auto_advance: how far each request for the status moves a
    replicating span. It raises RuntimeError where a caller breaks the contract (a write of a span
    that is not prepared, a call after close).
    """

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        self._called("set_assignment_epoch", span)
        held = self._held.get(span)
        if held is None:
            raise RuntimeError(f"span {span} is not here")
        before, held.epoch = held.epoch, epoch
        is_writing = held.is_starting or self._state[held.row] == _REPLICATING
        if self.sink is not None and is_writing and epoch != before:
            self.sink.take_over(span, self.name, self._fence(held), int(self._ts[held.row, _CHECKPOINT]))

    def _fence(self, held: _Held) -> tuple[int, int] | None:
        return self._changefeed_epoch, held.epoch
