"""Random requests, cancellations, losses and changes of leader: no job is lost, and each change of
a job is reported once."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from owner.core.events import JobChanged, SpanMoved, SpansPlaced
from owner.core.scheduler_config import SchedulerConfig
from owner.scheduling.scheduler import SchedulerAndInfo
from tablewire.errors import UnknownCaptureError
from tablewire.model.jobs import ENDED, JobView
from tablewire.model.queries import Query
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState
from tests.owner.world import World

STEPS = 80
SEEDS = 8
CALM_TICKS = 120


class Jobs:
    """The handles of all schedulers of a world, and the last view of each job that was reported."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.queries: dict[int, Query] = {}
        self.reported: dict[int, JobView] = {}

    def request(self, source: random.Random) -> None:
        """Make one random request."""
        scheduler, capture = self.world.scheduler, source.choice(sorted(self.world.alive))
        table = source.choice(self.world.tables)
        match source.choice(("move", "move", "move", "span", "rebalance", "drain", "cancel drain", "cancel", "cancel")):
            case "move":
                scheduler.move_table(table, capture)
            case "span":
                scheduler.move_span(Span(table), capture)
            case "rebalance":
                scheduler.rebalance()
            case "drain":
                try:
                    assert scheduler.drain_capture(capture) >= 0
                except UnknownCaptureError:
                    assert capture not in {view.id for view in self.world.snapshot.captures}
            case "cancel drain":
                scheduler.cancel_drain(capture)
            case "cancel" if self.open():
                source.choice(self.open()).cancel()
        self.note(scheduler)

    def note(self, scheduler: SchedulerAndInfo) -> None:
        self.queries |= {query.job.id: query for query in scheduler.queries()}

    def open(self) -> list[Query]:
        return [query for query in self.queries.values() if query.state not in ENDED]

    def check_tick(self) -> None:
        """Check the reports of the last tick."""
        events = self.world.scheduler.events()
        placed = sum((Counter(event.counts) for event in events if isinstance(event, SpansPlaced)), Counter())
        moved = Counter(event.why for event in events if isinstance(event, SpanMoved) and event.source != event.target)
        assert moved <= placed
        assert moved.total() == sum(isinstance(event, SpanMoved) for event in events)
        changed = [event.job for event in events if isinstance(event, JobChanged)]
        assert len({job.id for job in changed}) == len(changed)
        for job in changed:
            assert job.id not in self.reported or self.reported[job.id].state not in ENDED, f"{job} changed after its end"
            assert self.queries[job.id].job == job
            assert job.reason or job.state not in (QueryState.REFUSED, QueryState.CANCELLED)
            self.reported[job.id] = job
        for query in self.world.scheduler.queries():
            assert self.reported[query.job.id] == query.job, f"{query} has not been reported"

    def close(self) -> None:
        """Close the scheduler: the jobs that it has not ended are cancelled."""
        self.world.scheduler.close()
        assert not self.open()


def disturb(world: World, source: random.Random) -> None:
    """Cause a random fault."""
    capture = source.choice(sorted(world.alive))
    match source.choice(("die", "hang", "release", "release", "pause", "drop", "add")):
        case "die" if len(world.alive) > 2:
            world.die(capture)
            world.join(f"{capture}2")
        case "hang":
            world.executors[capture].hang(source.choice(("prepare", "stop")))
        case "release":
            world.executors[capture].let_go(source.choice(("prepare", "stop")))
        case "pause":
            world.paused ^= {capture}
        case "drop" if len(world.tables) > 2:
            world.tables.remove(source.choice(world.tables))
        case "add":
            world.tables.append(max(world.tables) + 1)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_job_ends_with_its_reason(seed: int) -> None:
    """Whatever happens, a job ends at the latest when the faults are over or its scheduler closes."""
    source = random.Random(seed)
    world = World(captures="abc", tables=range(1, 9), seed=seed)
    world.config = SchedulerConfig(
        max_task_concurrency=source.choice((1, 3, 32)), capture_silent_ms=500, prepare_timeout_ms=2_000, bootstrap_timeout_ms=500
    )
    world.scheduler = world.new_scheduler()
    jobs = Jobs(world)
    for step in range(STEPS):
        for _ in range(source.randrange(3)):
            jobs.request(source)
        if source.random() < 0.3:
            disturb(world, source)
        if step in (STEPS // 3, STEPS // 2):
            jobs.close()
            world.elect(f"owner{step}")
        world.step()
        jobs.check_tick()
    world.paused.clear()
    for capture in world.alive:
        for phase in ("prepare", "stop"):
            world.executors[capture].let_go(phase)
    for _ in range(CALM_TICKS):
        world.step()
        jobs.check_tick()
    assert {query.kind for query in jobs.open()} <= {QueryKind.DRAIN}  # of the last capture that is left
    jobs.close()
