"""The real Scheduler and real agents on one loopback network: brought up, moved, crashed, and under loss."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from owner import SchedulerConfig, new_scheduler
from processor import Agent, AgentConfig, new_agent
from tablewire import Barrier, BarrierWithMinTs, CaptureInfo, ChangefeedID, Liveness, QueryState, ReplicationState, Span
from tablewire.model.messages import Message
from tablewire.model.progress import Watermark
from tablewire.testing import Deliver, FakeSink, FakeTableExecutor, LoopbackNetwork

FEED = ChangefeedID("default", "orders")
TICK_S = 0.1
TS_MAX = 2**62


class Cluster:
    """One owner, some captures, one sink; `run` ticks everything at 100 ms of its own clock."""

    def __init__(self, captures: int = 3, tables: int = 12, seed: int = 0, is_slow: bool = False) -> None:
        self.is_slow = is_slow  # executors take several polls, and reports come in chunks of 2
        self.network = LoopbackNetwork(seed)
        self.sink = FakeSink()
        self.now = 0.0
        self.ts = 1_000
        self.tables = list(range(1, tables + 1))
        self.executors: dict[str, FakeTableExecutor] = {}
        self.agents: dict[str, Agent] = {}
        self.watermark = Watermark(0, 0)
        self.revision = 0
        self.chance = random.Random(seed)
        for at in range(captures):
            self.start(f"c{at}")
        self.elect()

    def elect(self) -> None:
        """A new owner; the former one sends nothing more."""
        self.revision += 10
        self.scheduler = new_scheduler(
            owner_id=f"owner-{self.revision}",
            changefeed_id=FEED,
            owner_revision=self.revision,
            changefeed_epoch=4,
            transport=self.network.transport(f"owner-{self.revision}"),
            config=SchedulerConfig(error_backoff_initial_ms=200, capture_silent_ms=60_000),
            clock=lambda: self.now,
        )

    def start(self, capture: str) -> None:
        polls = {name: self.chance.randint(0, 3) for name in ("prepare_polls", "write_polls", "stop_polls", "refusals")}
        self.executors[capture] = FakeTableExecutor(self.sink, name=capture, changefeed_epoch=4, **polls if self.is_slow else {})
        self.agents[capture] = new_agent(
            capture_id=capture,
            changefeed_id=FEED,
            changefeed_epoch=4,
            transport=self.network.transport(capture),
            executor=self.executors[capture],
            liveness=Liveness(),
            config=AgentConfig(max_reports_per_message=2 if self.is_slow else 1_000),
            clock=lambda: self.now,
        )

    def kill(self, capture: str) -> None:
        """Its lease has run out, and its process is gone."""
        self.agents.pop(capture).close()
        del self.executors[capture]

    def tick(self) -> None:
        self.now += TICK_S
        self.ts += 10
        alive = {capture: CaptureInfo(capture, f"{capture}:1") for capture in self.agents}
        before = self.watermark
        barrier = BarrierWithMinTs(Barrier(TS_MAX), TS_MAX)
        watermark = self.scheduler.tick(max(1_000, before.checkpoint_ts), self.tables, alive, barrier)
        if watermark.checkpoint_ts:
            assert watermark.checkpoint_ts >= before.checkpoint_ts
            self.watermark = watermark
            assert all(max(1_000, self.sink.position(Span(table))) >= watermark.checkpoint_ts for table in self.tables)
        for capture, agent in sorted(self.agents.items()):
            agent.tick()
            self.executors[capture].advance(self.ts)
        assert not self.sink.violations
        assert self.sink.max_writers <= 1

    def run_until(self, condition: Callable[[], bool], ticks: int = 100) -> int:
        """How many ticks it took."""
        for tick in range(ticks):
            if condition():
                return tick
            self.tick()
        raise AssertionError(f"not within {ticks} ticks: {list(self.scheduler.snapshot().spans)}")

    def is_steady(self) -> bool:
        views = list(self.scheduler.snapshot().spans)
        return len(views) == len(self.tables) and all(
            view.state is ReplicationState.REPLICATING and self.sink.writers(view.span) == (view.primary,) for view in views
        )


def test_tables_are_brought_up_and_progress() -> None:
    """From nothing to all Replicating in a few ticks, then the watermark follows the source."""
    cluster = Cluster()
    assert cluster.run_until(cluster.is_steady) <= 6
    before = cluster.watermark.checkpoint_ts
    for _ in range(5):
        cluster.tick()
    assert cluster.watermark.checkpoint_ts >= before + 40


def test_a_move_has_one_writer_at_any_time() -> None:
    """The table is written elsewhere within a second of clock, from where it was left."""
    cluster = Cluster()
    cluster.run_until(cluster.is_steady)
    source = next(view for view in cluster.scheduler.snapshot().spans if view.span == Span(1)).primary
    target = next(capture for capture in cluster.agents if capture != source)
    query = cluster.scheduler.move_table(1, target)
    assert cluster.run_until(lambda: query.state is QueryState.DONE) <= 10
    assert cluster.sink.writers(Span(1)) == (target,)


def test_a_crash_moves_its_tables_elsewhere() -> None:
    """A capture dies, and a table of another one fails: all replicate again."""
    cluster = Cluster()
    cluster.run_until(cluster.is_steady)
    cluster.kill("c1")
    cluster.executors["c0"].fail(cluster.executors["c0"].spans()[0], "the disk is full")
    cluster.run_until(cluster.is_steady)
    assert {view.primary for view in cluster.scheduler.snapshot().spans} <= {"c0", "c2"}


def test_a_new_owner_finds_everything_as_it_is() -> None:
    """Nothing is stopped and nothing is started because the owner has changed."""
    cluster = Cluster()
    cluster.run_until(cluster.is_steady)
    cluster.elect()
    for executor in cluster.executors.values():
        executor.calls.clear()
    cluster.run_until(lambda: cluster.scheduler.is_initialized() and cluster.is_steady())
    assert not [call for executor in cluster.executors.values() for call in executor.calls if "add" in call.name]


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_storm_never_makes_two_writers_and_ends(seed: int, is_slow: bool) -> None:
    """Loss, doubling, holding, crashes, failures, elections; once the network is well, everything replicates again."""
    chance = random.Random(seed)
    cluster = Cluster(seed=seed, is_slow=is_slow)

    def storm(sender: str, receiver: str, message: Message) -> Deliver:
        return chance.choices(list(Deliver), weights=[70, 15, 5, 10])[0]

    cluster.network.hook = storm
    for round_ in range(120):
        cluster.tick()
        match chance.randrange(20):
            case 0:
                capture = chance.choice(sorted(cluster.agents))
                cluster.kill(capture)
                cluster.start(f"d{round_}")
            case 1:
                cluster.elect()
            case 2 | 3:
                executor = cluster.executors[chance.choice(sorted(cluster.executors))]
                if executor.spans():
                    executor.fail(chance.choice(executor.spans()))
            case 4 | 5 | 6:
                cluster.network.release()
            case 7 | 8:
                cluster.scheduler.move_table(chance.choice(cluster.tables), chance.choice(sorted(cluster.agents)))
    cluster.network.hook = lambda sender, receiver, message: Deliver.DELIVER
    cluster.network.release()
    cluster.run_until(cluster.is_steady, ticks=1_000)
