"""Rebalance and balance: the fewest moves, by weight, over all changefeeds, without oscillation,
and without effects on later joins."""

from __future__ import annotations

from collections import Counter

from owner.core.scheduler_config import SchedulerConfig
from tablewire.model.progress import Stats
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState
from tests.owner.world import World


def spread(world: World) -> Counter[str]:
    return Counter(view.primary or "nobody" for view in world.snapshot.spans)


def uneven(tables: int = 9) -> World:
    """Return a world with all tables on a and b, after c has joined."""
    world = World(captures=["a", "b"], tables=range(1, tables + 1))
    world.settle()
    world.join("c")
    world.run(3)
    return world


def test_rebalance_moves_the_fewest_spans() -> None:
    """5 + 4 + 0 becomes 3 + 3 + 3 by three moves, all to the new capture."""
    world = uneven()
    before = {view.span: view.primary for view in world.snapshot.spans}
    plan = world.scheduler.plan_rebalance()
    assert len(plan) == 3
    query = world.scheduler.rebalance()
    world.until(lambda: query.state is QueryState.DONE)
    assert query.kind is QueryKind.REBALANCE
    assert sorted(spread(world).values()) == [3, 3, 3]
    moved = {view.span for view in world.snapshot.spans if view.primary != before[view.span]}
    assert moved == {move.span for move in plan}
    assert {move.target for move in plan} == {"c"}


def test_scenario_25_rebalance_with_nothing_to_move_ends_at_once() -> None:
    """It is DONE in the next tick and has no later effect: a node that joins days later is not
    filled by it."""
    world = World(tables=range(1, 10))
    world.config = SchedulerConfig(balance_interval_ms=0)
    world.elect()
    world.settle()
    query = world.scheduler.rebalance()
    world.step()
    assert query.state is QueryState.DONE
    world.now += 3 * 86_400
    world.join("late")
    world.run(50)
    assert spread(world)["late"] == 0


def test_scenario_26_balance_leaves_a_manual_move_alone_and_does_not_oscillate() -> None:
    """A moved table stays; the others are balanced once, and then nothing moves."""
    world = World(captures=["a", "b", "c"], tables=range(1, 13))
    world.config = SchedulerConfig(balance_interval_ms=2_000)
    world.elect()
    world.settle()
    target = "a" if world.primary(1) != "a" else "b"
    for table in (1, 2, 3):
        if world.primary(table) != target:
            query = world.scheduler.move_table(table, target)
            world.until(lambda query=query: query.state is QueryState.DONE)
    world.run(100)
    assert {world.primary(table) for table in (1, 2, 3)} == {target}
    assert max(spread(world).values()) - min(spread(world).values()) <= 1
    settled = {view.span: view.primary for view in world.snapshot.spans}
    for _ in range(300):
        world.step()
        assert {view.span: view.primary for view in world.snapshot.spans} == settled


def test_scenario_26_a_hot_table_weighs_more() -> None:
    """The capture of a table with a high rate gets no other table."""
    world = World(captures=["a", "b"], tables=[1, 2, 3, 4])
    world.config = SchedulerConfig(balance_interval_ms=0)
    world.elect()
    world.settle()
    hot = world.primary(1)
    for _ in range(60):
        for executor in world.executors.values():
            if Span(1) in executor.spans():
                executor.set_stats(Span(1), Stats(rows_per_s=1000.0))
        world.step()
    assert world.snapshot.loads()[hot] > 8
    query = world.scheduler.rebalance()
    world.until(lambda: query.state is QueryState.DONE)
    assert spread(world)[hot] == 1
    assert world.primary(1) == hot


def test_scenario_26_loads_of_other_changefeeds_count() -> None:
    """The load of a capture includes its spans of other changefeeds."""
    world = World(captures=["a", "b"], tables=[])
    scheduler = world.new_scheduler(cluster_load=lambda: {"a": 10.0})
    world.scheduler = scheduler
    world.run(3)
    world.tables = list(range(1, 11))
    world.settle()
    assert spread(world) == {"b": 10}


def test_balance_waits_for_a_quiet_time() -> None:
    """Without a job, loads are balanced only after balance_interval_ms without a disturbance."""
    world = uneven()
    world.config = SchedulerConfig(balance_interval_ms=3_000)
    world.elect()
    world.settle()
    world.run(25)
    assert spread(world)["c"] == 0
    world.run(40)
    assert spread(world)["c"] == 3


def test_rebalance_can_be_cancelled() -> None:
    """Moves in progress end, the others do not start."""
    world = uneven(tables=60)
    world.executors["c"].hang("prepare")
    query = world.scheduler.rebalance()
    world.run(3)
    query.cancel()
    world.step()
    assert query.state is QueryState.CANCELLED
    world.executors["c"].let_go("prepare")
    world.settle()
    assert 0 < spread(world)["c"] <= world.config.max_task_concurrency_per_capture


def test_scenario_24_limits_hold_for_every_policy() -> None:
    """There are never more moves in progress than the limits allow, in total and for each capture."""
    world = uneven(tables=100)
    world.config = SchedulerConfig(max_task_concurrency=7, max_task_concurrency_per_capture=5)
    world.join("d")
    world.elect()
    world.settle()
    for executor in world.executors.values():
        executor.hang("prepare")
    world.scheduler.rebalance()
    for table in range(1, 20):
        world.scheduler.move_table(table, "d")
    world.scheduler.drain_capture("a")
    for _ in range(30):
        world.step()
        moving = [view for view in world.snapshot.spans if view.primary and view.secondary]
        assert len(moving) <= 7
        touched = Counter(capture for view in moving for capture in (view.primary, view.secondary))
        assert max(touched.values(), default=0) <= 5


def test_rates_are_shown_as_reported() -> None:
    """The snapshot holds rows/s and bytes/s of each span once an executor reports them."""
    world = World(tables=[1, 2])
    world.settle()
    assert world.snapshot.rates is None
    world.executors[world.primary(2)].set_stats(Span(2), Stats(rows_per_s=10.0, bytes_per_s=2000.0))
    world.run(80)
    rates = world.snapshot.rates
    assert rates is not None
    assert rates.tolist() == [[0.0, 10.0], [0.0, 2000.0]]
