"""Dry runs: a plan names the moves and the loads, changes nothing, and is what then happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owner.core.jobs import JobReason, Reason
from owner.core.scheduler_config import SchedulerConfig
from owner.scheduling.dry_run import MovePlan, plan_drain, plan_move, plan_rebalance
from tablewire.model.progress import Stats
from tablewire.model.spans import Span
from tablewire.model.states import QueryState
from tests.owner.world import World

CAPTURES = "abc"
TABLES = st.lists(st.tuples(st.sampled_from(CAPTURES), st.sampled_from([0, 0, 0, 150, 500, 3_000])), min_size=1, max_size=12)
LIMITS = st.sampled_from([1, 2, 3, 32])
WORLDS = settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def world_of(tables: Sequence[tuple[str, int]], limit: int = 32, captures: str = CAPTURES) -> World:
    """One table for each (capture that it is on, rows/s), with settled weights; only asked-for moves happen."""
    world = World(captures=captures, tables=range(1, len(tables) + 1))
    world.config = SchedulerConfig(
        balance_interval_ms=0, stats_interval_ms=100, max_task_concurrency=limit, max_task_concurrency_per_capture=limit
    )
    world.elect()
    for table, (_, rows_per_s) in enumerate(tables, 1):
        for executor in world.executors.values():
            executor.set_stats(Span(table), Stats(rows_per_s=float(rows_per_s)))
    world.settle()
    moves = [world.scheduler.move_table(table, capture) for table, (capture, _) in enumerate(tables, 1)]
    world.until(lambda: all(move.state in (QueryState.DONE, QueryState.REFUSED) for move in moves), ticks=300)
    world.run(30)
    assert places(world) == {table: capture for table, (capture, _) in enumerate(tables, 1)}
    return world


def places(world: World) -> dict[int, str]:
    return {table: world.primary(table) for table in world.tables}


def planned(world: World, plan: MovePlan) -> dict[int, str]:
    """Where each table is once the plan was carried out."""
    found = places(world)
    for move in plan:
        assert found[move.span.table_id] == move.source
        found[move.span.table_id] = move.target
    return found


def test_dry_run_shows_loads_before_and_after() -> None:
    """The plan names every move with its reason and the load of each capture; it changes nothing."""
    world = world_of([*[("a", 0)] * 5, *[("b", 0)] * 4])
    plan = world.scheduler.plan_rebalance()
    assert (plan.load_before, plan.load_after) == ({"a": 5, "b": 4, "c": 0}, {"a": 3, "b": 3, "c": 3})
    assert all(move.reason and move.source in "ab" for move in plan)
    world.run(5)
    assert Counter(places(world).values()) == {"a": 5, "b": 4}


def test_dry_run_of_a_drain_names_every_span() -> None:
    """Where each would go, and the loads before and after; nothing moves."""
    world = World(tables=range(1, 10))
    world.settle()
    plan = plan_drain(world.snapshot, "a")
    assert len(plan) == 3
    assert {move.source for move in plan} == {"a"}
    assert sorted(plan.load_after.values()) == pytest.approx([0, 4, 5])
    assert sum(plan.load_before.values()) == sum(plan.load_after.values()) == 9
    assert len(plan_drain(world.snapshot, "nobody")) == 0
    world.run(3)
    assert sorted(Counter(places(world).values()).values()) == [3, 3, 3]


def test_scenario_37_a_drain_and_its_dry_run_place_by_weight() -> None:
    """3000, 0, 3000 and 0 rows/s: one heavy and one light table for each of the others, in the plan and in the end."""
    world = world_of([("a", 3_000), ("a", 0), ("a", 3_000), ("a", 0)])
    plan = plan_drain(world.snapshot, "a")
    expected = planned(world, plan)
    assert (plan.load_before, plan.load_after) == ({"a": 64, "b": 0, "c": 0}, {"a": 0, "b": 32, "c": 32})
    world.scheduler.drain_capture("a")
    world.until(lambda: world.scheduler.drain_capture("a") == 0)
    assert places(world) == expected
    assert world.snapshot.loads() == {"a": 0, "b": 32, "c": 32}


def test_new_spans_are_placed_by_weight() -> None:
    """The spans of a capture that is gone keep their weights: the others get one heavy and one light table each."""
    world = world_of([("a", 3_000), ("a", 0), ("a", 3_000), ("a", 0)])
    world.die("a")
    world.step()
    world.settle()
    assert world.snapshot.loads() == {"b": 32, "c": 32}


@WORLDS
@given(TABLES, LIMITS)
def test_scenario_37_a_dry_run_of_a_rebalance_is_what_happens(tables: list[tuple[str, int]], limit: int) -> None:
    """However few moves may be in progress at a time. Then there is nothing left to move."""
    world = world_of(tables, limit)
    expected = planned(world, plan_rebalance(world.snapshot))
    query = world.scheduler.rebalance()
    world.until(lambda: query.state is QueryState.DONE, ticks=300)
    assert places(world) == expected
    assert len(plan_rebalance(world.snapshot)) == 0


@WORLDS
@given(TABLES, LIMITS, st.sampled_from(CAPTURES))
def test_scenario_37_a_dry_run_of_a_drain_is_what_happens(tables: list[tuple[str, int]], limit: int, target: str) -> None:
    """However few moves may be in progress at a time; and what is left is level within one weight."""
    world = world_of(tables, limit)
    plan = plan_drain(world.snapshot, target)
    expected = planned(world, plan)
    world.scheduler.drain_capture(target)
    world.until(lambda: world.scheduler.drain_capture(target) == 0, ticks=300)
    assert places(world) == expected
    loads = world.snapshot.loads()
    least = min(load for capture, load in loads.items() if capture != target)
    for capture in {move.target for move in plan}:
        assert loads[capture] - least <= max(move.weight for move in plan if move.target == capture)


@WORLDS
@given(TABLES, st.integers(1, 12), st.sampled_from(CAPTURES))
def test_scenario_37_a_dry_run_of_a_move_is_what_happens(tables: list[tuple[str, int]], table: int, target: str) -> None:
    """It ends where the plan says, or is refused for the reason that the plan gives."""
    world = world_of(tables)
    plan = plan_move(world.snapshot, table, target)
    before = places(world)
    query = world.scheduler.move_table(table, target)
    world.until(lambda: query.state in (QueryState.DONE, QueryState.REFUSED))
    if isinstance(plan, Reason):
        assert (query.state, query.reason) == (QueryState.REFUSED, plan.text)
        assert places(world) == before
    else:
        assert query.state is QueryState.DONE
        assert places(world) == {**before, table: target}
        assert [(move.span, move.source, move.target) for move in plan] == [(Span(table), before[table], target)]


def test_a_move_to_a_capture_that_cannot_take_spans_is_refused_in_advance() -> None:
    """For the reason that the scheduler gives."""
    world = world_of([("a", 0)], captures="abcd")
    world.scheduler.drain_capture("b")
    world.liveness["c"].stop()
    world.paused.add("d")
    world.run(40)
    for target, code in {
        "a": JobReason.ALREADY_PRIMARY,
        "b": JobReason.TARGET_DRAINED,
        "c": JobReason.TARGET_STOPPING,
        "d": JobReason.TARGET_SILENT,
        "e": JobReason.TARGET_UNKNOWN,
    }.items():
        plan = plan_move(world.snapshot, 1, target)
        assert isinstance(plan, Reason)
        query = world.scheduler.move_table(1, target)
        world.step()
        assert (plan.code, query.state, query.reason) == (code, QueryState.REFUSED, plan.text)
