"""The real core and the real agents in one thread, under one seed and virtual time, with injected
faults.

A seed determines everything. It draws a world (numbers of tables and processes, limits, a sink that
fences or not) and then storms, each with its own network conditions and faults. After each storm
there are no faults until the world has settled, within a bounded number of ticks. The invariants
are in oracle.py, the faults in faults.py.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import structlog

from owner.core.scheduler_config import SchedulerConfig
from owner.scheduling.scheduler import new_scheduler
from processor.agent.agent import AgentConfig, new_agent
from tablewire.model.ids import ChangefeedID
from tablewire.model.jobs import ENDED
from tablewire.model.liveness import Liveness
from tablewire.model.progress import Barrier, BarrierWithMinTs, Watermark
from tablewire.model.spans import Span
from tablewire.model.splitter import HashRanges, Splitter, WholeTables
from tablewire.model.states import LivenessState, QueryState
from tests.sim.faults import Faults
from tests.sim.network import SimNetwork, Weather
from tests.sim.nodes import FENCE_MARGIN_S, LEASE_S, TICK_S, Lease, Owner, Process
from tests.sim.oracle import Oracle
from tests.sim.sink import SimSink, new_executor

CHANGEFEED = ChangefeedID("default", "sim")
STORMS = 4
SETTLE_TICKS_MAX = 800
"""All spans may have to move, one after the other, with the slowest executors."""
STILL_TICKS_MAX = 80
"""A lease, a bootstrap, a deadline, a backoff: nothing else keeps everything as it is, and none so long."""
START_TS = 100
SOURCE_TS_PER_TICK = 10
PROCESSES_MAX = 5


@dataclass(slots=True)
class Result:
    seed: int
    ticks: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    settle_ticks: int = 0  # the longest


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress the logs of the agents, whose executors fail thousands of times on purpose."""
    former = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**former)


class Simulation:
    """The world of one seed. `run` runs all of it; `trace`, if set, receives a text for each event."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        draw = self.random
        self.fenced = bool(seed % 2)
        self.ticks = 0
        self.now = 1000.0
        self.calm = False
        self.faults = Faults(self)
        self.network = SimNetwork(draw, lambda: self.now)
        self.oracle = Oracle(self)
        self.network.on_send = self.oracle.sent
        self.sink = SimSink()
        self.source_ts = self.checkpoint_ts = START_TS
        self.barrier_ts = self.sink.barrier_ts = START_TS + 30
        self.sink.heeds_barrier = not self.fenced or draw.random() < 0.7
        self.parts = draw.choice((1, 1, 1, 2))
        self.pace = draw.choice((0, 2, 6, 15))
        self.tables: set[int] = set()
        self.former_tables: set[int] = set()
        for table in range(1, 1 + draw.choice((1, 2, 3, 8, 8))):
            self.add_table(table)
        self.config = SchedulerConfig(
            heartbeat_interval_ms=draw.choice((100, 200, 300)),
            bootstrap_timeout_ms=draw.choice((1_000, 2_000)),
            capture_silent_ms=draw.choice((800, 1_500)),
            error_backoff_initial_ms=200,
            error_backoff_max_ms=1_000,
            prepare_timeout_ms=2_500,
            spans_per_message=draw.choice((1, 2, 1_000)),
            add_batch_spans=draw.choice((1, 4, 1_000)),
            balance_interval_ms=draw.choice((0, 1_500)),
            move_cooldown_ms=2_000,
            audit_interval_ms=1,
            brake_window_ms=1_000,
            brake_hold_ms=2_000,
        )
        self.agent_config = AgentConfig(
            stats_interval_ms=500, max_reports_per_message=draw.choice((1, 2, 1_000)), max_stats_per_tick=draw.choice((1, 100))
        )
        self.leases: dict[str, Lease] = {}
        self.processes: dict[str, Process] = {}
        self.next_process = 0
        self.changefeed_epoch = 1
        self.drained: set[str] = set()
        self.doubtful: set[str] = set()  # processes that an owner may have considered dead although they lived
        for _ in range(draw.choice((2, 3, 4, 5))):
            self.start_process()
        self.owners: list[Owner] = []
        self.last_revision = 10
        self.elect(self.last_revision)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, storms: int = STORMS) -> Result:
        result = Result(self.seed, faults=self.faults.counts, violations=self.oracle.violations)
        for _ in range(storms):
            self.storm()
            result.settle_ticks = max(result.settle_ticks, self.settle())
            result.ticks = self.ticks
            if self.oracle.violations:
                break
        return result

    def storm(self) -> None:
        """Run a storm."""
        self.calm = False
        self.network.weather = Weather.draw(self.random)
        self.faults.draw_kinds()
        chance = self.random.choice((0.1, 0.3, 0.8))
        for _ in range(self.random.randrange(30, 120)):
            if self.random.random() < chance:
                self.faults.strike()
            self.step()
            if self.oracle.violations:
                return

    def settle(self) -> int:
        """Run without faults until the world has settled; return the number of ticks."""
        if self.oracle.violations:
            return 0
        self.faults.calm_down()
        goal = self.source_ts
        still, looks = 0, b""
        for taken in range(SETTLE_TICKS_MAX):
            if self.oracle.violations or (taken and self.trouble(goal) is None):
                return taken
            self.step()
            tables = self.owner.core.tables
            now = tables.state.tobytes() + tables.primary.tobytes() + tables.secondary.tobytes()
            still, looks = (still + 1 if now == looks else 0), now
            if still > STILL_TICKS_MAX:
                break
        self.oracle.complain(f"not settled after {taken + 1} calm ticks, nothing moves for {still}: {self.trouble(goal)}")
        return taken + 1

    def step(self) -> None:
        """Run a tenth of a second: every node acts once, in any order."""
        self.ticks += 1
        self.now += TICK_S
        self.source_ts += SOURCE_TS_PER_TICK
        if self.calm or self.random.random() < 0.3:
            self.barrier_ts = self.sink.barrier_ts = self.source_ts + 3 * SOURCE_TS_PER_TICK
        self.network.deliver()
        self.faults.pass_by()
        self._expire_leases()
        actors: list[Process | Owner] = [*self.processes.values(), *self.owners]
        self.random.shuffle(actors)
        for actor in actors:
            if isinstance(actor, Process):
                self._run_process(actor)
            else:
                self._run_owner(actor)
        self.oracle.stepped()

    # -- owners -------------------------------------------------------------------------------------------------------

    @property
    def owner(self) -> Owner:
        """Return the owner that was elected last."""
        return self.owners[-1]

    def elect(self, revision: int) -> None:
        """Elect a new owner, after the caller has dealt with the former one. Limits differ from
        term to term."""
        id, draw = f"owner{revision}", self.random
        limit = draw.choice((1, 2, 8, 8))
        config = replace(self.config, max_task_concurrency=limit, max_task_concurrency_per_capture=draw.choice((1, 8)))
        splitter: Splitter = WholeTables() if self.parts == 1 else HashRanges(self.parts)
        scheduler = new_scheduler(
            owner_id=id,
            changefeed_id=CHANGEFEED,
            owner_revision=revision,
            changefeed_epoch=self.changefeed_epoch,
            transport=self.network.transport(id),
            config=config,
            clock=lambda: self.now,
            splitter=splitter,
        )
        self.owners.append(Owner(id, revision, self.changefeed_epoch, scheduler, config))
        for target in sorted(self.drained):
            scheduler.drain_capture(target)
        self.watch()

    def _run_owner(self, owner: Owner) -> None:
        if self.now < owner.paused_until:
            return
        is_leader = owner is self.owner
        if not is_leader and self.random.random() < 0.5:
            return
        tables = sorted(self.tables) if is_leader or owner.frozen_tables is None else owner.frozen_tables
        checkpoint_ts = self.checkpoint_ts if is_leader else owner.frozen_checkpoint_ts
        alive = owner.sees(self.leases, self.now, self.random)
        barrier = BarrierWithMinTs(Barrier(self.barrier_ts), self.barrier_ts)
        watermark: Watermark = owner.scheduler.tick(checkpoint_ts, tables, alive, barrier)
        self.oracle.ticked(owner, watermark)
        if is_leader:
            self.checkpoint_ts = max(self.checkpoint_ts, watermark.checkpoint_ts)

    def watch(self) -> None:
        """Let the oracle watch a job of the present owner until it ends."""
        known = {id(query) for query, _, _ in self.oracle.watched}
        for query in self.owner.scheduler.queries():
            if id(query) not in known and query.state is QueryState.PENDING:
                spans = tuple(span for span in self.spans() if span.table_id == query.job.table_id and query.job.span is None)
                self.oracle.watched.append((query, self.owner, spans))

    # -- processes ----------------------------------------------------------------------------------------------------

    def start_process(self) -> None:
        if len(self.processes) >= PROCESSES_MAX:
            return
        self.next_process += 1
        id = f"p{self.next_process}"
        self.leases[id] = Lease(self.now, self.now + LEASE_S)
        self.start_agent(id, Liveness(), 0)

    def start_agent(self, id: str, liveness: Liveness, revision_floor: int) -> None:
        """Start a new agent and a new executor in a process, which is created if it does not exist."""
        executor = new_executor(self.random, self.sink, id, self.changefeed_epoch, self.fenced, self.pace)
        transport = self.network.transport(id)
        transport.revision_floor = transport.seen_revision = revision_floor
        agent = new_agent(
            capture_id=id,
            changefeed_id=CHANGEFEED,
            changefeed_epoch=self.changefeed_epoch,
            transport=transport,
            executor=executor,
            liveness=liveness,
            config=self.agent_config,
            clock=lambda: self.now,
        )
        former = self.processes.get(id)
        process = Process(id, agent, transport, executor, liveness, self.changefeed_epoch)
        process.lags = self.random.choice((0.0, 0.2, 0.6))
        if former is not None:
            process.paused_until, process.cut_off_until = former.paused_until, former.cut_off_until
            process.hung_until = former.hung_until
            process.is_zombie = former.is_zombie
        self.processes[id] = process

    def restart_agent(self, process: Process) -> None:
        """Close the former executor first, so that it cannot write any longer."""
        process.agent.close()
        self.start_agent(process.id, process.liveness, process.transport.seen_revision)

    def end_process(self, process: Process, lease_too: bool = False) -> None:
        """End a process: it cannot write from now on. Its lease lives until it expires, unless it
        is revoked."""
        process.executor.close()
        process.transport.close()
        del self.processes[process.id]
        if lease_too:
            self.leases[process.id].ended_at = self.now
        self.drained.discard(process.id)

    def _run_process(self, process: Process) -> None:
        if self.processes.get(process.id) is not process:
            return
        lease = self.leases[process.id]
        paused = self.now < process.paused_until
        if not paused and self.now >= process.cut_off_until and lease.ended_at is None:
            lease.until = self.now + LEASE_S
        if lease.until - FENCE_MARGIN_S <= self.now and not process.is_zombie and (not paused or not self.fenced):
            # It fences itself before the lease can be over, and starts again under a new id. While it is paused it can write
            # nothing, and it looks at its clock before it does anything else: an unfenced world counts it as ended at once.
            self.faults.counts["fenced itself"] += 1
            self.end_process(process)
            self.start_process()
            return
        if paused:
            return
        if process.is_zombie and lease.ended_at is not None and lease.ended_at + 2.0 <= self.now:
            self.end_process(process)
            self.start_process()
            return
        if process.changefeed_epoch != self.changefeed_epoch and self.now >= max(process.restarts_at, process.hung_until):
            self.restart_agent(process)
            return
        agent, executor = process.agent, process.executor
        # With nothing to take in and nothing to do a tick would change nothing.
        if self.now >= process.hung_until and not (process.transport.is_empty and agent.is_settled):
            agent.tick()
        if self.calm or (self.now >= process.stalled_until and self.random.random() >= process.lags):
            executor.advance(self.source_ts - (0 if self.calm else self.random.randrange(20)))
        self._leave_if_empty(process)

    def _leave_if_empty(self, process: Process) -> None:
        """Let a stopping process exit when the owner has reported it empty three times."""
        if process.liveness.state is not LivenessState.STOPPING:
            return
        capture = self.owner.core.captures.get(process.id)
        if capture is None or capture.liveness is not LivenessState.STOPPING or not self.owner.scheduler.is_initialized():
            return
        core = self.owner.core
        left = len(core.tables.rows_with_role(capture.index)) + (capture.index in core.replication.may_hold_any_span)
        process.found_empty = 0 if left else process.found_empty + 1
        if process.found_empty >= 3:
            self.faults.counts["left"] += 1
            self.oracle.empty(process.id)
            self.end_process(process, lease_too=True)
            if len(self.processes) < 2:
                self.start_process()

    def _expire_leases(self) -> None:
        for id, lease in list(self.leases.items()):
            if lease.ended_at is None and lease.until <= self.now:
                lease.ended_at = lease.until
            elif lease.ended_at is not None and id not in self.processes and lease.ended_at + 10.0 < self.now:
                del self.leases[id]

    # -- tables -------------------------------------------------------------------------------------------------------

    def spans(self) -> list[Span]:
        """Return the tables that there should be."""
        if self.parts == 1:
            return [Span(table) for table in sorted(self.tables)]
        return list(HashRanges(self.parts).split(np.array(sorted(self.tables), np.int64)))

    def add_table(self, table: int) -> None:
        self.tables.add(table)
        self.former_tables.add(table)
        for span in self.spans():
            if span.table_id == table:
                self.sink.begin(span, self.checkpoint_ts)

    # -- all is well --------------------------------------------------------------------------------------------------

    def trouble(self, goal: int) -> str | None:
        """Return why the world has not settled yet; None if it has."""
        core, scheduler = self.owner.core, self.owner.scheduler
        if not scheduler.is_initialized():
            return "not initialized"
        tables = core.tables
        wanted = set(self.spans())
        rows = tables.all_rows()
        if not tables.steady[rows].all() or {tables.span(row) for row in rows.tolist()} != wanted:
            views = {view.span: view for view in scheduler.snapshot().spans}
            for row in rows.tolist():
                if not tables.steady[row]:
                    return f"{tables.row(row)} {views[tables.span(row)]}"
            return f"the owner knows {sorted(map(str, views))} instead of {sorted(map(str, wanted))}"
        for span in sorted(wanted):
            holders = [process.id for process in self.processes.values() if span in process.executor.spans()]
            if len(self.sink.writers(span)) != 1 or len(holders) != 1:
                return f"span {span} is held by {holders} and written by {self.sink.writers(span)}"
        if sum(len(process.executor.spans()) for process in self.processes.values()) != len(wanted):
            return f"more is held than there is: {[process.executor.spans() for process in self.processes.values()]}"
        open_jobs = [str(query) for query in scheduler.queries() if query.kind != "drain" and query.state not in ENDED]
        if open_jobs:
            return f"jobs have not ended: {open_jobs}"
        for target in sorted(self.drained):
            if scheduler.drain_capture(target):
                return f"{target} is not drained"
            self.oracle.empty(target)
        if core.watermark.checkpoint_ts < goal:
            return f"the watermark is {core.watermark}, short of {goal}"
        return None


def run_seed(seed: int) -> Result:
    with quietly():
        return Simulation(seed).run()
