"""A small owner: it lists the tables, places them on executors, moves them, adds failed ones again, and advances the slot.

One thread calls `tick`, which never waits. It also watches what an owner relies on: a checkpoint of a
table never goes back.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, field
from enum import Enum, auto

from processor.postgres import PostgresExecutor
from tablewire.errors import OperatingError, TablewireError
from tablewire.model.ids import TS_MAX, TableID, Ts
from tablewire.model.progress import Barrier, Checkpoint, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tests.processor.postgres.replication_kit import Kit, current
from tests.random_tables.case import Violation

RETRY_S = 0.15
LIST_INTERVAL_S = 0.03
ADVANCE_INTERVAL_S = 0.2
ERRORS_KEPT = 8


class Phase(Enum):
    ABSENT = auto()
    PREPARING = auto()
    PROMOTING = auto()
    WRITING = auto()
    REMOVING = auto()


@dataclass(slots=True)
class Placement:
    """Where a table is. target: the executor that it moves to, prepared there. failures: since the last success."""

    span: Span
    checkpoint_ts: Ts
    capture: str = ""
    phase: Phase = Phase.ABSENT
    target: str = ""
    is_wanted: bool = True
    retry_at: float = 0.0
    error: str = ""
    failures: int = 0
    is_pending: bool = False
    errors: list[str] = field(default_factory=list)


class SmallOwner:
    """captures: names of live executors."""

    def __init__(self, kit: Kit, rng: random.Random) -> None:
        assert kit.source is not None
        self.kit = kit
        self.source = kit.source
        self.rng = rng
        self.placements: dict[TableID, Placement] = {}
        self.captures: dict[str, PostgresExecutor] = {}
        self.checkpoint_ts = kit.start_ts
        self.source_errors: list[str] = []
        self._names: dict[TableID, str] = {}
        self.listed_ts: Ts = kit.start_ts
        self._listed_at = self._advanced_at = 0.0
        self._epochs = itertools.count(1)
        self._barrier: Barrier | None = None

    # --- what steps call ---------------------------------------------------------------------------------------------

    def start(self, capture: str) -> None:
        executor = self.kit.executor(capture)
        self.captures[capture] = executor
        if self._barrier is not None:
            executor.set_barrier(self._barrier)

    def forget(self, capture: str) -> PostgresExecutor:
        """Take an executor that has ended, or is about to, out of the placements."""
        for placement in self.placements.values():
            if placement.target == capture:
                placement.target = ""
            if placement.capture == capture:
                # What was prepared elsewhere for a move is used at once.
                placement.capture, placement.target = placement.target, ""
                placement.phase = Phase.PREPARING if placement.capture else Phase.ABSENT
        return self.captures.pop(capture)

    def move(self, count: int) -> None:
        """Begin to move up to `count` tables to another executor."""
        for placement in self.placements.values():
            others = [capture for capture in self.captures if capture != placement.capture]
            if count > 0 and placement.phase is Phase.WRITING and not placement.target and others:
                placement.target = self.rng.choice(others)
                count -= 1

    def hold(self, position: Ts | None) -> None:
        self._barrier = Barrier(TS_MAX if position is None else position)
        for executor in self.captures.values():
            executor.set_barrier(self._barrier)

    def name(self, table_id: TableID) -> str:
        return self._names.get(table_id, str(table_id))

    def left_out(self, name: tuple[str, str]) -> str:
        """Return why a table was not in the last listing; empty if that does not say."""
        return next((text for text in self.source.left_out() if ".".join(name) in text), "")

    # --- one round ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        if not self.captures:
            return
        now = time.monotonic()
        if now - self._listed_at > LIST_INTERVAL_S:
            self._listed_at = now
            self._list()
        for table_id, placement in list(self.placements.items()):
            try:
                self._step(placement, now)
            except OperatingError as error:
                self._failed(placement, error, now)
            if placement.phase is Phase.ABSENT and not placement.is_wanted:
                del self.placements[table_id]
        self._note_checkpoint()
        if now - self._advanced_at > ADVANCE_INTERVAL_S:
            self._advanced_at = now
            self._advance()

    def _list(self) -> None:
        try:
            listed_ts = current(self.kit)
            tables = self.source.tables()
        except OperatingError as error:
            self.source_errors.append(str(error))
            return
        self._names.update(tables)
        for table_id in tables:
            if table_id not in self.placements:
                self.placements[table_id] = Placement(Span(table_id), self.checkpoint_ts)
        for table_id, placement in self.placements.items():
            placement.is_wanted = table_id in tables
        self.listed_ts = listed_ts

    def _advance(self) -> None:
        try:
            self.source.advance(self.checkpoint_ts)
        except OperatingError as error:
            self.source_errors.append(str(error))

    def _note_checkpoint(self) -> None:
        found = min([self.listed_ts, *(placement.checkpoint_ts for placement in self.placements.values())])
        self.checkpoint_ts = max(self.checkpoint_ts, found)

    def _step(self, placement: Placement, now: float) -> None:
        span, checkpoint = placement.span, Checkpoint(placement.checkpoint_ts, placement.checkpoint_ts)
        executor = self.captures.get(placement.capture)
        if placement.phase is Phase.ABSENT:
            if placement.is_wanted and now >= placement.retry_at:
                placement.capture = self.rng.choice(list(self.captures))
                if self.captures[placement.capture].add_table_span(span, checkpoint, True):
                    placement.phase = Phase.PREPARING
            return
        assert executor is not None
        if placement.phase is Phase.REMOVING:
            self._removed(placement, executor)
            return
        if not placement.is_wanted:
            self._remove(placement, executor)
            return
        status = executor.get_table_span_status(span, True)
        if placement.phase is Phase.PREPARING and executor.is_add_table_span_finished(span, True):
            executor.set_assignment_epoch(span, next(self._epochs))
            placement.phase = Phase.PROMOTING
        if placement.phase is Phase.PROMOTING:
            executor.add_table_span(span, checkpoint, False)
            if executor.is_add_table_span_finished(span, False):
                placement.phase, placement.is_pending = Phase.WRITING, True  # until the first report
        elif placement.phase is Phase.WRITING:
            self._report(placement, status)
            self._move(placement, executor)

    def _report(self, placement: Placement, status: TableStatus) -> None:
        if status.state is TableState.ABSENT:
            placement.phase, placement.capture = Phase.ABSENT, ""
            return
        found = status.checkpoint.checkpoint_ts
        if found < placement.checkpoint_ts:
            text = f"table {self.name(placement.span.table_id)} was at {placement.checkpoint_ts}, then at {found}"
            raise Violation("checkpoint went back", text)
        if found > placement.checkpoint_ts and not placement.is_pending:
            placement.error, placement.failures = "", 0
        placement.checkpoint_ts = found
        placement.is_pending = status.stats is not None and "snapshot" in status.stats.stage_checkpoints

    def _move(self, placement: Placement, executor: PostgresExecutor) -> None:
        """Prepare at the target, then stop at the source; the promotion follows when that has stopped."""
        if not placement.target or (target := self.captures.get(placement.target)) is None:
            return
        span = placement.span
        try:
            target.add_table_span(span, Checkpoint(placement.checkpoint_ts, placement.checkpoint_ts), True)
            target.get_table_span_status(span, False)
            if target.is_add_table_span_finished(span, True):
                self._remove(placement, executor)
        except OperatingError:
            target.remove_table_span(span)
            placement.target = ""

    def _remove(self, placement: Placement, executor: PostgresExecutor) -> None:
        executor.remove_table_span(placement.span)
        placement.phase = Phase.REMOVING

    def _removed(self, placement: Placement, executor: PostgresExecutor) -> None:
        checkpoint_ts, is_finished = executor.is_remove_table_span_finished(placement.span)
        if not is_finished:
            return
        placement.checkpoint_ts = max(placement.checkpoint_ts, checkpoint_ts)
        placement.phase, placement.capture = Phase.ABSENT, ""
        target = self.captures.get(placement.target)
        if target is not None and placement.is_wanted:
            placement.capture, placement.phase = placement.target, Phase.PREPARING
        elif target is not None:
            placement.capture, placement.phase = placement.target, Phase.REMOVING
            target.remove_table_span(placement.span)
        placement.target = ""

    def _failed(self, placement: Placement, error: TablewireError, now: float) -> None:
        text = str(error)
        placement.error, placement.failures = text, placement.failures + 1
        placement.errors = [*placement.errors, text][-ERRORS_KEPT:]
        placement.retry_at = now + RETRY_S
        if (executor := self.captures.get(placement.capture)) is not None:
            self._remove(placement, executor)
