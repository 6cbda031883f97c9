"""The real core and the real agents in one thread, under one seed and virtual time, with everything that can go wrong.

A seed determines everything: messages are dropped, doubled, delayed and reordered; processes pause beyond their lease, crash
and come back; agents restart in their slot; owners crash, pause and are deposed; executors are slow, fail, lose spans and hang;
tables come and go; operators move and drain. After every step:

- at most one effective writer a span, by the sink's own fencing;
- the watermark never falls, is never past what the sink holds of any current table, and never past the barrier;
- the limits of planned moves hold, and the columns keep their row invariant.

After the faults stop, everything replicates within a bounded number of ticks.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from owner.scheduler import SchedulerAndInfo, SchedulerConfig, new_scheduler
from processor.agent import Agent, new_agent
from tablewire.liveness import Liveness
from tablewire.testing import Deliver, FakeSink, FakeTableExecutor, LoopbackNetwork
from tablewire.types import (
    TS_MAX,
    Barrier,
    BarrierWithMinTs,
    CaptureInfo,
    ChangefeedID,
    Message,
    ReplicationState,
    Span,
    Watermark,
)

CHANGEFEED = ChangefeedID("default", "sim")
TICK_S = 0.1
LEASE_S = 2.0
SETTLE_TICKS = 400
START_TS = 100


@dataclass(slots=True)
class Process:
    """One processor: an agent while it runs, a lease while etcd thinks so."""

    id: str
    agent: Agent | None
    executor: FakeTableExecutor
    liveness: Liveness
    lease_until: float
    paused_until: float = 0.0
    is_cut_off: bool = False  # from etcd: it cannot renew its lease, and its clock tells it so
    is_zombie: bool = False  # it does not notice that its lease is over; the sink alone stops it


@dataclass(slots=True)
class Weather:
    """How bad it is; shares of messages, and chances a tick."""

    drop: float
    duplicate: float
    hold: float
    release: float
    fault: float


@dataclass(slots=True)
class Result:
    seed: int
    ticks: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    settle_ticks: int = 0


class Simulation:
    def __init__(self, seed: int, tables: int = 12, processes: int = 4) -> None:
        self.random = random.Random(seed)
        self.result = Result(seed)
        self.network = LoopbackNetwork(seed, codec=False)
        self.network.hook = self._hook
        draw = self.random.random
        self.weather = Weather(0.2 * draw(), 0.1 * draw(), 0.2 * draw(), 0.3, 0.02 + 0.2 * draw())
        self.calm = False
        self.now = 1000.0
        self.sink = FakeSink()
        self.tables = set(range(1, tables + 1))
        self.next_table = tables + 1
        self.next_capture = 0
        self.processes: dict[str, Process] = {}
        for _ in range(processes):
            self._start_process()
        self.config = SchedulerConfig(
            bootstrap_timeout_ms=3_000,
            max_task_concurrency=4,
            max_task_concurrency_per_capture=2,
            error_backoff_initial_ms=200,
            error_backoff_max_ms=2_000,
        )
        self.revision = 10
        self.deposed: list[SchedulerAndInfo] = []
        self.checkpoint_ts = START_TS
        self.watermark = Watermark(0, 0)
        self.barrier = BarrierWithMinTs(Barrier(TS_MAX), TS_MAX)
        self.source_ts = START_TS
        self.owner_paused_until = 0.0
        self.drained: set[str] = set()
        self.scheduler = self._new_scheduler()

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, ticks: int) -> Result:
        """So many ticks with faults, then calm until all is well."""
        for _ in range(ticks):
            if self.random.random() < self.weather.fault:
                self._fault()
            self._step()
            if self.result.violations:
                return self.result
        self._calm_down()
        for taken in range(SETTLE_TICKS):
            self._step()
            if self.result.violations:
                return self.result
            if self._is_settled():
                self.result.settle_ticks = taken
                return self.result
        stuck = [view for view in self.scheduler.snapshot().spans if view.state is not ReplicationState.REPLICATING]
        self.result.violations.append(f"not settled after {SETTLE_TICKS} calm ticks: {stuck[:3]} {self._missing()}")
        return self.result

    def _step(self) -> None:
        self.now += TICK_S
        self.source_ts += 10
        self._expire_leases()
        if self.now >= self.owner_paused_until:
            self._tick_owner()
        for scheduler in self.deposed:  # an owner that does not know yet that it is deposed
            if self.random.random() < 0.3:
                self._tick(scheduler)
        for process in list(self.processes.values()):
            self._run_process(process)
        if not self.calm and self.random.random() < self.weather.release:
            self.network.release()
        self.result.ticks += 1
        self._check()

    def _tick_owner(self) -> None:
        watermark = self._tick(self.scheduler)
        if watermark.checkpoint_ts:
            self._check_watermark(watermark)
            self.watermark = watermark
            self.checkpoint_ts = max(self.checkpoint_ts, watermark.checkpoint_ts)

    def _tick(self, scheduler: SchedulerAndInfo) -> Watermark:
        alive = {id: CaptureInfo(id, f"{id}:1") for id, process in self.processes.items() if process.lease_until > self.now}
        return scheduler.tick(self.checkpoint_ts, sorted(self.tables), alive, self.barrier)

    def _run_process(self, process: Process) -> None:
        if self.now < process.paused_until:
            return
        if not process.is_cut_off and process.lease_until > self.now:
            process.lease_until = self.now + LEASE_S
        if process.lease_until - 3 * TICK_S <= self.now and not process.is_zombie:
            # It fences itself before the lease can be over, and starts again under a new id.
            self.result.faults["fenced"] += 1
            self._end_process(process)
            self._start_process()
            return
        if process.lease_until + 20 * TICK_S <= self.now:
            self._end_process(process)
            self._start_process()
            return
        if process.agent is None:
            return
        process.agent.tick()
        if self.random.random() < 0.8:
            process.executor.advance(self.source_ts - self.random.randrange(10))

    # -- faults -------------------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        fault = self.random.choice(
            [
                self._crash_process,
                self._pause_process,
                self._cut_off_process,
                self._make_zombie,
                self._restart_agent,
                self._crash_owner,
                self._pause_owner,
                self._depose_owner,
                self._fail_span,
                self._lose_span,
                self._hang,
                self._drop_table,
                self._new_table,
                self._move,
                self._move,
                self._cancel,
                self._drain,
                self._cancel_drain,
                self._stop_process,
                self._start_process,
            ]
        )
        self.result.faults[fault.__name__.strip("_")] += 1
        fault()

    def _any_process(self) -> Process:
        return self.processes[self.random.choice(sorted(self.processes))]

    def _start_process(self) -> None:
        if len(self.processes) >= 6:
            return
        self.next_capture += 1
        id = f"p{self.next_capture}"
        random = self.random
        executor = FakeTableExecutor(
            self.sink,
            name=id,
            changefeed_epoch=1,
            prepare_polls=random.randrange(3),
            write_polls=random.randrange(2),
            stop_polls=random.randrange(3),
            record_calls=False,
        )
        process = Process(id, None, executor, Liveness(), self.now + LEASE_S)
        self.processes[id] = process
        self._start_agent(process)

    def _start_agent(self, process: Process) -> None:
        process.agent = new_agent(
            capture_id=process.id,
            changefeed_id=CHANGEFEED,
            changefeed_epoch=1,
            transport=self.network.transport(process.id),
            executor=process.executor,
            liveness=process.liveness,
            clock=lambda: self.now,
        )

    def _end_process(self, process: Process) -> None:
        """It stops acting now; its lease goes on until it expires, unless it is over."""
        process.executor.close()
        self.drained.discard(process.id)
        del self.processes[process.id]
        if process.lease_until > self.now:
            ghost = Process(f"{process.id}", None, process.executor, process.liveness, process.lease_until)
            ghost.is_cut_off = True
            ghost.is_zombie = True
            ghost.paused_until = process.lease_until
            self.processes[process.id] = ghost

    def _expire_leases(self) -> None:
        for process in list(self.processes.values()):
            if process.agent is None and process.lease_until <= self.now:
                del self.processes[process.id]

    def _crash_process(self) -> None:
        process = self._any_process()
        if process.agent is None:
            return
        self._end_process(process)
        self._start_process()

    def _pause_process(self) -> None:
        self._any_process().paused_until = self.now + self.random.uniform(0.2, 2 * LEASE_S)

    def _cut_off_process(self) -> None:
        self._any_process().is_cut_off = True

    def _make_zombie(self) -> None:
        process = self._any_process()
        process.is_cut_off = process.is_zombie = True

    def _restart_agent(self) -> None:
        process = self._any_process()
        if process.agent is None:
            return
        process.executor.close()
        process.executor = FakeTableExecutor(self.sink, name=process.id, changefeed_epoch=1, record_calls=False)
        self._start_agent(process)

    def _new_scheduler(self) -> SchedulerAndInfo:
        owner_id = f"owner{self.revision}"
        scheduler = new_scheduler(
            owner_id=owner_id,
            changefeed_id=CHANGEFEED,
            owner_revision=self.revision,
            changefeed_epoch=1,
            transport=self.network.transport(owner_id),
            config=self.config,
            clock=lambda: self.now,
        )
        for target in sorted(self.drained):
            scheduler.drain_capture(target)
        return scheduler

    def _crash_owner(self) -> None:
        self.revision += self.random.randrange(1, 5)
        self.scheduler = self._new_scheduler()

    def _depose_owner(self) -> None:
        """The old one goes on ticking for a while beside the new one."""
        self.deposed = [self.scheduler]
        self._crash_owner()

    def _pause_owner(self) -> None:
        self.owner_paused_until = self.now + self.random.uniform(0.2, 3.0)

    def _fail_span(self) -> None:
        process = self._any_process()
        spans = process.executor.spans()
        if spans and process.agent is not None:
            process.executor.fail(self.random.choice(spans), "scripted")

    def _lose_span(self) -> None:
        process = self._any_process()
        spans = process.executor.spans()
        if spans and process.agent is not None:
            process.executor.lose(self.random.choice(spans))

    def _hang(self) -> None:
        process = self._any_process()
        step = self.random.choice(["prepare", "write", "stop"])
        process.executor.hang(step, Span(self.random.choice(sorted(self.tables))) if self.tables else None)

    def _drop_table(self) -> None:
        if len(self.tables) > 4:
            self.tables.discard(self.random.choice(sorted(self.tables)))

    def _new_table(self) -> None:
        if len(self.tables) < 20:
            back = self.random.randrange(1, self.next_table)  # one that was there before, perhaps
            self.tables.add(back if back not in self.tables else self.next_table)
            self.next_table = max(self.next_table, max(self.tables) + 1)

    def _move(self) -> None:
        if self.tables:
            self.scheduler.move_table(self.random.choice(sorted(self.tables)), self._any_process().id)

    def _cancel(self) -> None:
        queries = self.scheduler.queries()
        if queries:
            self.random.choice(queries).cancel()

    def _drain(self) -> None:
        if len(self.drained) < 2:
            target = self._any_process().id
            if target in {view.id for view in self.scheduler.snapshot().captures}:
                self.scheduler.drain_capture(target)
                self.drained.add(target)

    def _cancel_drain(self) -> None:
        for target in sorted(self.drained):
            self.scheduler.cancel_drain(target)
        self.drained.clear()

    def _stop_process(self) -> None:
        if len(self.processes) > 3:
            process = self._any_process()
            process.liveness.stop()

    def _hook(self, _sender: str, _receiver: str, _message: Message) -> Deliver:
        if self.calm:
            return Deliver.DELIVER
        draw = self.random.random()
        for share, what in (
            (self.weather.drop, Deliver.DROP),
            (self.weather.duplicate, Deliver.DUPLICATE),
            (self.weather.hold, Deliver.HOLD),
        ):
            if draw < share:
                return what
            draw -= share
        return Deliver.DELIVER

    def _calm_down(self) -> None:
        """No fault any more: who hangs is let go, who stands apart comes back, drains end, and one process is fresh."""
        self.calm = True
        self.network.release()
        self.deposed = []
        self.owner_paused_until = 0.0
        self._cancel_drain()
        for process in self.processes.values():
            if process.agent is not None:
                process.paused_until = 0.0
                process.is_cut_off = process.is_zombie = False
            for step in ("prepare", "write", "stop"):
                process.executor.let_go(step)
                for table in range(1, self.next_table + 1):
                    process.executor.let_go(step, Span(table))
        if all(process.liveness.state == "stopping" or process.agent is None for process in self.processes.values()):
            self.result.faults["fresh"] += 1
            for process in list(self.processes.values()):
                if process.agent is not None:
                    self._end_process(process)
            self._start_process()
            self._start_process()

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        found = self.result.violations
        found.extend(self.sink.violations)
        for scheduler in (self.scheduler, *self.deposed):
            found.extend(scheduler._core.tables.check())  # type: ignore[attr-defined]
        self._check_limits()
        if found:
            found[:] = [f"seed {self.result.seed} tick {self.result.ticks}: {text}" for text in found[:5]]

    def _check_limits(self) -> None:
        moves = [
            view
            for view in self.scheduler.snapshot().spans
            if view.state is ReplicationState.PREPARE and view.primary and view.secondary
        ]
        # A move that a new owner found under way counts as one, but was not started by it.
        inherited = self.result.faults["crash_owner"] + self.result.faults["depose_owner"]
        if len(moves) > self.config.max_task_concurrency and not inherited:
            self.result.violations.append(f"{len(moves)} moves at a time")

    def _check_watermark(self, watermark: Watermark) -> None:
        found = self.result.violations
        if watermark.checkpoint_ts < self.watermark.checkpoint_ts:
            found.append(f"the watermark fell from {self.watermark} to {watermark}")
        if watermark.resolved_ts < watermark.checkpoint_ts:
            found.append(f"resolved is below the checkpoint: {watermark}")
        for table in self.tables:
            durable = max(self.checkpoint_ts, self.sink.position(Span(table)))
            if watermark.checkpoint_ts > durable:
                found.append(f"the watermark {watermark.checkpoint_ts} is past table {table}, which is durable to {durable}")

    def _is_settled(self) -> bool:
        snapshot = self.scheduler.snapshot()
        return (
            snapshot.initialized
            and {view.span.table_id for view in snapshot.spans} == self.tables
            and all(view.state is ReplicationState.REPLICATING and view.stall_reason is None for view in snapshot.spans)
            and not self._missing()
        )

    def _missing(self) -> list[int]:
        """Tables that nobody, or somebody beside its Primary, has."""
        return [
            table
            for table in sorted(self.tables)
            if len(self.sink.writers(Span(table))) != 1
            or sum(Span(table) in process.executor.spans() for process in self.processes.values()) != 1
        ]
