"""A scheduler and its agents in one thread and virtual time: real core, real agents, real messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from owner.core.scheduler_config import SchedulerConfig
from owner.scheduling.scheduler import SchedulerAndInfo, new_scheduler
from owner.scheduling.snapshot import Snapshot
from processor.agent.agent import Agent, new_agent
from tablewire.model.ids import TS_MAX, CaptureInfo, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.progress import Barrier, BarrierWithMinTs, SpanView, Watermark
from tablewire.model.spans import Span
from tablewire.model.splitter import Splitter, WholeTables
from tablewire.model.states import ReplicationState
from tablewire.testing import FakeSink, FakeTableExecutor, LoopbackNetwork

CHANGEFEED = ChangefeedID("default", "test")
NO_BARRIER = BarrierWithMinTs(Barrier(TS_MAX), TS_MAX)
TICK_S = 0.1


class World:
    """Ticks the owner and every agent that runs, 100 ms of virtual time apart. `checkpoint_ts`
    follows the watermark."""

    def __init__(self, captures: Sequence[str] = ("a", "b", "c"), tables: Sequence[int] = (1,), seed: int = 0) -> None:
        self.lock = threading.RLock()  # a test may act while another thread steps
        self.network = LoopbackNetwork(seed)
        self.now = 1000.0
        self.sink = FakeSink()
        self.tables = list(tables)
        self.checkpoint_ts = 100
        self.barrier = NO_BARRIER
        self.config = SchedulerConfig()
        self.splitter: Splitter = WholeTables()
        self.changefeed_epoch = 1
        self.revision = 10
        self.watermark = Watermark(0, 0)
        self.executors: dict[str, FakeTableExecutor] = {}
        self.agents: dict[str, Agent] = {}
        self.liveness: dict[str, Liveness] = {}
        self.alive: set[str] = set()
        self.paused: set[str] = set()
        for capture in captures:
            self.join(capture)
        self.scheduler = self.new_scheduler()

    def new_scheduler(
        self, owner_id: str = "owner", cluster_load: Callable[[], Mapping[str, float]] | None = None
    ) -> SchedulerAndInfo:
        return new_scheduler(
            owner_id=owner_id,
            changefeed_id=CHANGEFEED,
            owner_revision=self.revision,
            changefeed_epoch=self.changefeed_epoch,
            transport=self.network.transport(owner_id),
            config=self.config,
            clock=lambda: self.now,
            cluster_load=cluster_load,
            splitter=self.splitter,
        )

    def elect(self, owner_id: str = "owner") -> None:
        """Replace the owner; the old one just stops ticking."""
        with self.lock:
            self.revision += 1
            self.scheduler = self.new_scheduler(owner_id)

    def join(self, capture: str, executor: FakeTableExecutor | None = None) -> None:
        with self.lock:
            self.liveness[capture] = Liveness()
            self.executors[capture] = executor or FakeTableExecutor(
                self.sink, name=capture, changefeed_epoch=self.changefeed_epoch
            )
            self.start_agent(capture)
            self.alive.add(capture)

    def start_agent(self, capture: str) -> None:
        self.agents[capture] = new_agent(
            capture_id=capture,
            changefeed_id=CHANGEFEED,
            changefeed_epoch=self.changefeed_epoch,
            transport=self.network.transport(capture),
            executor=self.executors[capture],
            liveness=self.liveness[capture],
            clock=lambda: self.now,
        )

    def restart_agent(self, capture: str) -> None:
        """Restart the agent in the same process slot, with a new processor_epoch and no spans."""
        with self.lock:
            self.agents[capture].close()
            self.executors[capture] = FakeTableExecutor(self.sink, name=capture, changefeed_epoch=self.changefeed_epoch)
            self.start_agent(capture)

    def die(self, capture: str) -> None:
        """Remove the process and its lease; it never acts again."""
        with self.lock:
            self.alive.discard(capture)
            del self.agents[capture]

    def step(self) -> Watermark:
        with self.lock:
            return self._step()

    def _step(self) -> Watermark:
        alive = {capture: CaptureInfo(capture, f"{capture}:1") for capture in self.alive}
        self.watermark = self.scheduler.tick(self.checkpoint_ts, self.tables, alive, self.barrier)
        self.scheduler.check()  # type: ignore[attr-defined]
        self.checkpoint_ts = max(self.checkpoint_ts, self.watermark.checkpoint_ts)
        for capture, agent in self.agents.items():
            if capture not in self.paused:
                agent.tick()
        self.now += TICK_S
        assert not self.sink.violations, self.sink.violations
        return self.watermark

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.step()

    def until(self, condition: Callable[[], bool], ticks: int = 50, what: str = "the condition") -> int:
        """Step until the condition holds; return the number of steps."""
        for taken in range(ticks):
            if condition():
                return taken
            self.step()
        assert condition(), f"{what} did not hold within {ticks} ticks: {list(self.snapshot.spans)[:8]}"
        return ticks

    def settle(self, ticks: int = 50) -> int:
        """Step at least once, until every span replicates without a move in progress; return the
        number of steps."""
        self.step()
        return 1 + self.until(lambda: len(self.snapshot.spans) == len(self.tables) and self.steady(), ticks, "steady state")

    def steady(self) -> bool:
        return all(
            view.state is ReplicationState.REPLICATING and view.secondary is None and view.stall_reason is None
            for view in self.snapshot.spans
        )

    @property
    def snapshot(self) -> Snapshot:
        return self.scheduler.snapshot()

    def view(self, table: int) -> SpanView:
        return next(view for view in self.snapshot.spans if view.span == Span(table))

    def primary(self, table: int) -> str:
        primary = self.view(table).primary
        assert primary is not None
        return primary

    def advance(self, ts: int) -> None:
        for executor in self.executors.values():
            executor.advance(ts)

    def writers(self, table: int) -> tuple[str, ...]:
        return self.sink.writers(Span(table))
