"""The invariants, checked by a model that does not know the rules: which capture holds which span,
up to where it is durable, and what was promised.

There are two kinds of worlds. *Unfenced*: the sink accepts every writer, and a capture leaves etcd
only when its executor can no longer write, so the protocol alone must keep writers apart. *Fenced*:
clocks, leases and views of etcd may all be wrong, and the sink refuses old permissions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from owner.core.coverage import overlaps
from owner.core.events import TwoWriters
from owner.core.moves import PLANNED
from owner.core.tables import ABSENT, COMMIT, PREPARE, REPLICATING
from tablewire.model.jobs import ENDED
from tablewire.model.messages import DispatchTableRequest, DispatchTableResponse, HeartbeatResponse, Message
from tablewire.model.progress import Watermark
from tablewire.model.queries import Query
from tablewire.model.spans import Span
from tablewire.model.states import DispatchAction, QueryKind, QueryState
from tests.sim.nodes import Owner

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation


HOLDS = (REPLICATING, PREPARE)
"""The Primary of such a row writes. A policy may start another move in the tick in which a move ended."""


IDLE_TICKS_MAX = 40
"""Twice the number of spans that may wait for each other where one is added for each tick."""


class Oracle:
    """Checks every message, every tick of an owner, and the world after every step."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.violations: list[str] = []
        self.watched: list[tuple[Query, Owner, tuple[Span, ...]]] = []
        self._permissions: dict[tuple[int, Span, int], str] = {}
        self._answers: dict[tuple[str, int], tuple[int, int]] = {}
        self._checked: set[tuple[int, Span, int]] = set()

    def complain(self, text: str) -> None:
        self.violations.append(f"seed {self.sim.seed} tick {self.sim.ticks}: {text}")

    # -- messages -----------------------------------------------------------------------------------------------------

    def sent(self, message: Message) -> None:
        """Check that a permission is granted once, and never while another capture may still hold
        the span."""
        body = message.body
        if isinstance(body, HeartbeatResponse | DispatchTableResponse):
            self._answered(message)
        if not isinstance(body, DispatchTableRequest):
            return
        sender = next((owner for owner in self.sim.owners if owner.id == message.sender), None)
        if sender is not None:
            for place in np.flatnonzero(body.actions != DispatchAction.REMOVE).tolist():
                sender.adds[message.receiver, body.spans[place]] = message.number
            for place in np.flatnonzero(body.actions == DispatchAction.REMOVE).tolist():
                self._followed(sender, body.spans[place], message.receiver)
        for place in np.flatnonzero(body.actions == DispatchAction.ADD_WRITE).tolist():
            span, epoch = body.spans[place], int(body.assignment_epochs[place])
            key = message.changefeed_epoch, span, epoch
            former = self._permissions.setdefault(key, message.receiver)
            if former != message.receiver:
                self.complain(f"the permission {epoch} for span {span} was given to {former} and to {message.receiver}")
            elif message.owner_revision == self.sim.owner.revision:
                self._alone(span, message.receiver)
            if former == message.receiver and key not in self._checked:
                self._checked.add(key)
                self._known_alone(span, message)

    def _answered(self, message: Message) -> None:
        """Check that an agent never returns to an older owner, or to an older message of the same
        owner."""
        key, said = (message.sender, message.processor_epoch), (message.owner_revision, message.echo)
        if said < self._answers.get(key, said):
            self.complain(f"{message.sender} answers {said} (owner_revision, n) after {self._answers[key]}")
        self._answers[key] = said

    def _known_alone(self, span: Span, message: Message) -> None:
        """Check that an owner that grants a permission knows no other capture that may hold the
        span."""
        for owner in self.sim.owners:
            if owner.id != message.sender or owner.changefeed_epoch != message.changefeed_epoch:
                continue
            silent = owner.core.replication.may_hold_any_span - {_index_of(owner, message.receiver)}
            row = owner.core.tables.row(owner.core.tables.row_of(span))
            lasting = owner.undetermined.get(int(owner.core.tables.number[row.row]), frozenset()) & set(row.undetermined)
            if silent or lasting or (row.undetermined and not self.sim.fenced):
                self.complain(f"{owner.id}: {message.receiver} may write {row} beside {len(silent)} that never spoke")

    def _followed(self, owner: Owner, span: Span, receiver: str) -> None:
        """Check that a Primary is sent a remove for a move only if its owner knows no capture that
        would block the Secondary."""
        core, tables = owner.core, owner.core.tables
        row, primary = tables.row_of(span), _index_of(owner, receiver)
        if row < 0 or int(tables.primary[row]) != primary or tables.state[row] != COMMIT or int(tables.secondary[row]) < 0:
            return
        number = int(tables.number[row])
        if (number, primary) in owner.stopping:
            return
        silent = core.replication.may_hold_any_span - {int(tables.secondary[row])}
        lasting = owner.undetermined.get(number, frozenset()) & set(tables.undetermined.get(row, ()))
        if silent or lasting:
            self.complain(
                f"{owner.id} stops {receiver} for a move that cannot go on yet: {tables.row(row)}, {len(silent)} never spoke"
            )

    def _alone(self, span: Span, receiver: str) -> None:
        for process in self.sim.processes.values():
            if process.id == receiver or self._is_doubtful(process.id):
                continue
            for held in process.executor.spans():
                if held.table_id == span.table_id and overlaps(held.start_key, held.end_key, span.start_key, span.end_key):
                    state = process.executor.state(held)
                    self.complain(f"{receiver} may write span {span} while {process.id} holds {held}, {state}")

    # -- ticks --------------------------------------------------------------------------------------------------------

    def ticked(self, owner: Owner, watermark: Watermark) -> None:
        """Check the state and the effects of one tick of an owner."""
        core = owner.core
        for text in core.tables.check():
            self.complain(f"{owner.id}: {text}")
        if core.audits_failed:
            self.complain(f"{owner.id} did not know what a capture holds")
        initialized = owner.scheduler.is_initialized()
        if owner.was_initialized and not initialized:
            self.complain(f"{owner.id} is not initialized any more")
        self._check_memory(owner)
        self._check_progress(owner)
        self._check_limits(owner, begins=initialized and not owner.was_initialized)
        owner.was_initialized = initialized
        owner.stopping = _stopping(owner)
        owner.undetermined = {
            int(core.tables.number[row]): frozenset(captures) for row, captures in core.tables.undetermined.items()
        }
        if owner is self.sim.owner:
            self._check_watermark(owner, watermark)
            self._check_queries()
            self._check_idle(owner)
            self._check_two_writers(owner)

    def _check_two_writers(self, owner: Owner) -> None:
        """Check that the newest permission wins, whether it has reached the sink already or not."""
        for both in owner.scheduler.events():
            if not isinstance(both, TwoWriters):
                continue
            changefeed_epoch, epoch = self.sim.sink.fence(both.span)
            newer = [
                capture
                for (run, span, given), capture in self._permissions.items()
                if span == both.span and run == changefeed_epoch and given > epoch
            ]
            if self.sim.sink.writers(both.span) == (both.goes,) and both.stays not in newer:
                self.complain(f"{both}, but the sink takes writes of {both.goes} alone")

    def _check_idle(self, owner: Owner) -> None:
        """Check that a span without a writer is added soon, if a capture can take it."""
        core, tables = owner.core, owner.core.tables
        size = tables.size
        rows = np.flatnonzero(tables.wanted[:size] & (tables.state[:size] == ABSENT) & (tables.undetermined_count[:size] == 0))
        if not len(rows) or not core.bootstrap.done or core.mass_failure_guard.is_active or not core.ready_captures():
            owner.waiting.clear()
            return
        waiting = {}
        for row in rows.tolist():
            trouble = tables.failures.get(row)
            if trouble is None or trouble.retry_at_ms <= core.now_ms:
                number = int(tables.number[row])
                waiting[number] = owner.waiting.get(number, 0) + 1
                if waiting[number] == IDLE_TICKS_MAX:
                    self.complain(f"{owner.id}: span {tables.span(row)} could be added for {IDLE_TICKS_MAX} ticks")
        owner.waiting = waiting

    def _check_memory(self, owner: Owner) -> None:
        """Check that every capture that may still receive an Add has a role in that row."""
        core, tables = owner.core, owner.core.tables
        for (id, span), number in list(owner.adds.items()):
            capture = core.captures.get(id)
            if capture is None or capture.echoed >= number:
                del owner.adds[id, span]
                continue
            row = tables.row_of(span)
            roles = (
                {int(tables.primary[row]), int(tables.secondary[row]), *tables.undetermined.get(row, ())} if row >= 0 else set()
            )
            if capture.index not in roles:
                self.complain(f"{owner.id} forgot {id} for span {span}, to which Add {number} is under way")

    def _check_progress(self, owner: Owner) -> None:
        """Check that the progress of a span never goes back."""
        tables = owner.core.tables
        numbers, checkpoints = tables.number[: tables.size].copy(), tables.checkpoint_ts[: tables.size].copy()
        size = len(owner.numbers)
        fell = (owner.numbers == numbers[:size]) & (owner.checkpoints > checkpoints[:size])
        for row in np.flatnonzero(fell).tolist():
            self.complain(f"{owner.id}: span {tables.span(row)} fell from {owner.checkpoints[row]} to {checkpoints[row]}")
        owner.numbers, owner.checkpoints = numbers, checkpoints

    def _check_limits(self, owner: Owner, begins: bool) -> None:
        """Check that moves start only within the limits. Moves that a new owner finds in progress
        count, although it did not start them."""
        tables = owner.core.tables
        size = tables.size
        moving = (tables.primary[:size] >= 0) & (tables.secondary[:size] >= 0)
        if not moving.any():
            owner.planned = frozenset()
            return
        rows = np.flatnonzero(moving)
        rows = rows[np.isin(tables.task[rows], PLANNED) & np.isin(tables.state[rows], (PREPARE, COMMIT))]
        planned = frozenset(tables.number[rows].tolist())
        begun = planned - owner.planned
        owner.planned = planned
        if not begun or begins:
            return
        limit, each = owner.config.max_task_concurrency, owner.config.max_task_concurrency_per_capture
        if len(rows) > limit:
            self.complain(f"{owner.id} began a move beside {len(rows) - 1} others; the limit is {limit}")
        for row in rows[np.isin(tables.number[rows], list(begun))].tolist():
            for capture in (int(tables.primary[row]), int(tables.secondary[row])):
                touching = int(np.count_nonzero((tables.primary[rows] == capture) | (tables.secondary[rows] == capture)))
                if touching > each:
                    self.complain(f"{owner.id} began a move at {owner.core.captures[capture].id}, which has {touching}")

    def _check_watermark(self, owner: Owner, watermark: Watermark) -> None:
        sim = self.sim
        if not watermark.checkpoint_ts:
            if owner.proceeding:
                self.complain(f"{owner.id} cannot proceed any more, and no table has come or gone")
            return
        owner.proceeding = True
        if watermark.checkpoint_ts < sim.checkpoint_ts:
            self.complain(f"the watermark fell from {sim.checkpoint_ts} to {watermark}")
        if watermark.resolved_ts < watermark.checkpoint_ts:
            self.complain(f"resolved is below the checkpoint: {watermark}")
        if watermark.checkpoint_ts > max(sim.checkpoint_ts, sim.barrier_ts):
            self.complain(f"the watermark {watermark.checkpoint_ts} is past the barrier {sim.barrier_ts}")
        for span in sim.spans():
            if watermark.checkpoint_ts > sim.sink.position(span):
                at = sim.sink.position(span)
                self.complain(f"the watermark {watermark.checkpoint_ts} is past span {span}, which is durable to {at}")

    def _check_queries(self) -> None:
        still = []
        for query, owner, spans in self.watched:
            if query.state not in ENDED:
                still.append((query, owner, spans))
            elif query.state is not QueryState.DONE:
                if not query.reason:
                    self.complain(f"{query} without a reason")
            elif owner is self.sim.owner:
                self._check_done(query, owner, spans)
        self.watched = still

    def _check_done(self, query: Query, owner: Owner, spans: tuple[Span, ...]) -> None:
        """Check that the end of a job is reported truthfully."""
        tables = owner.core.tables
        if query.kind is QueryKind.MOVE:
            for span in spans:
                row = tables.row_of(span)
                primary = int(tables.primary[row]) if row >= 0 else -1
                if primary < 0 or owner.core.captures[primary].id != query.target or tables.state[row] not in HOLDS:
                    self.complain(f"{query}, but the owner knows {tables.row(row)}")
        elif query.kind is QueryKind.REBALANCE:
            moves = owner.scheduler.plan_rebalance()
            if moves:
                self.complain(f"{query}, but {len(moves)} moves are left")
        elif query.kind is QueryKind.DRAIN and query.target is not None:
            self.empty(query.target)

    def empty(self, capture: str) -> None:
        """Check a report that no span is left at this capture. An owner that missed the capture for
        a while cannot know."""
        process = self.sim.processes.get(capture)
        if process is not None and process.executor.spans() and not self._is_doubtful(capture):
            self.complain(f"{capture} was said to be empty, but it holds {process.executor.spans()}")

    def _is_doubtful(self, capture: str) -> bool:
        """Return whether a living capture was considered dead, correctly as far as etcd knew; this
        happens in fenced worlds only."""
        lease = self.sim.leases.get(capture)
        return self.sim.fenced and (capture in self.sim.doubtful or lease is None or lease.ended_at is not None)

    # -- the world ----------------------------------------------------------------------------------------------------

    def stepped(self) -> None:
        if self.sim.sink.violations:
            for text in self.sim.sink.violations:
                self.complain(text)
            self.sim.sink.violations.clear()


def _stopping(owner: Owner) -> frozenset[tuple[int, int]]:
    """Return (number, Primary) of the rows whose Primary was sent a remove for a move."""
    tables = owner.core.tables
    rows = np.flatnonzero((tables.state == COMMIT) & (tables.primary >= 0) & (tables.secondary >= 0))
    return frozenset(zip(tables.number[rows].tolist(), tables.primary[rows].tolist(), strict=True))


def _index_of(owner: Owner, capture: str) -> int:
    found = owner.core.captures.get(capture)
    return -1 if found is None else found.index
