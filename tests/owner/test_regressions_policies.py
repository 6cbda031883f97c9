"""Bugs that a review found in the policies, each reduced to a few steps."""

from __future__ import annotations

import numpy as np

from owner.core.events import SpanMoved
from owner.core.replication import Replication, RowReports, apply_reports
from owner.core.scheduler_config import SchedulerConfig
from owner.core.tables import COMMIT, PREPARE, Tables
from tablewire.model.messages import DispatchTableRequest, Message
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import DispatchAction, QueryState, TableState
from tablewire.testing import Deliver
from tests.owner.world import World

MUTE = "waiting for the first report of mute, which may hold any table"


def world_with(captures: list[str], tables: int, config: SchedulerConfig) -> World:
    world = World(captures=captures, tables=range(1, tables + 1))
    world.config = config
    world.elect()
    world.settle()
    return world


def prepares_of(world: World, target: str) -> list[int]:
    """Return a list that gets one element for each span that this capture is sent a prepare for
    from now on."""
    asked: list[int] = []

    def listen(_sender: str, receiver: str, message: Message) -> Deliver:
        if receiver == target and isinstance(message.body, DispatchTableRequest):
            asked.extend(action for action in message.body.actions.tolist() if action == DispatchAction.ADD_PREPARE)
        return Deliver.DELIVER

    world.network.hook = listen
    return asked


def break_prepares(world: World, capture: str) -> None:
    for _ in range(5_000):
        world.executors[capture].raise_at("add_table_span")


def test_a_rebalance_ends_although_one_capture_prepares_nothing() -> None:
    """It is refused with the name of the capture that failed repeatedly, instead of retrying
    forever."""
    world = world_with(["a"], 8, SchedulerConfig())
    world.join("b")
    break_prepares(world, "b")
    world.run(3)
    asked = prepares_of(world, "b")
    query = world.scheduler.rebalance()
    world.until(lambda: query.state is QueryState.REFUSED)
    assert query.reason == "b failed to prepare 3 tables in a row"
    assert len(asked) <= 8
    world.settle()


def test_a_rebalance_continues_without_the_failing_capture() -> None:
    """The others are balanced; the reason names the capture that took nothing."""
    world = world_with(["a"], 12, SchedulerConfig())
    world.join("b")
    world.join("c")
    break_prepares(world, "b")
    world.run(3)
    query = world.scheduler.rebalance()
    world.until(lambda: query.state is QueryState.REFUSED, ticks=200)
    assert query.reason.startswith("b ")
    assert {view.id: view.spans for view in world.snapshot.captures} == {"a": 6, "b": 0, "c": 6}


def test_a_planned_move_that_waits_delays_no_other() -> None:
    """The first planned move needs a capture that is at its limit; moves of other captures start."""
    world = world_with(["a", "b"], 12, SchedulerConfig(max_task_concurrency_per_capture=1))
    world.join("c")
    world.join("d")
    world.executors["c"].hang("prepare")
    world.run(3)
    query = world.scheduler.rebalance()
    world.until(lambda: next(view.spans for view in world.snapshot.captures if view.id == "d") == 3)
    assert query.state is QueryState.ACCEPTED
    world.executors["c"].let_go("prepare")
    world.until(lambda: query.state is QueryState.DONE, ticks=100)


def test_a_drain_waits_before_it_tries_again() -> None:
    """If the only target fails, the backoff is respected."""
    world = world_with(["a", "b"], 8, SchedulerConfig(error_backoff_initial_ms=1_000, error_backoff_max_ms=4_000))
    left = sum(view.primary == "a" for view in world.snapshot.spans)
    break_prepares(world, "b")
    asked = prepares_of(world, "b")
    world.scheduler.drain_capture("a")
    world.run(100)
    assert 2 * left <= len(asked) <= 5 * left
    world.executors["b"]._raises.clear()
    world.until(lambda: world.scheduler.drain_capture("a") == 0, ticks=100)


def test_a_drain_tries_another_capture_at_once() -> None:
    """If one capture fails, another is tried without delay."""
    world = world_with(["a", "b", "c"], 6, SchedulerConfig(error_backoff_initial_ms=60_000))
    break_prepares(world, "b")
    world.scheduler.drain_capture("a")
    world.until(lambda: world.scheduler.drain_capture("a") == 0, ticks=20)


def test_a_span_that_no_capture_can_take_delays_no_other() -> None:
    """The only capture may still hold a span that has no writer; the next table is placed all the
    same, with one span for each tick."""
    world = World(captures=["a"], tables=[1])
    world.config = SchedulerConfig(add_batch_spans=1)
    world.executors["a"].hang("prepare", Span(1))
    world.executors["a"].hang("stop", Span(1))
    world.elect()
    world.run(3)
    world.executors["a"].fail(Span(1))
    world.run(15)
    world.tables = [1, 2]
    world.until(lambda: world.writers(2) == ("a",), ticks=10)
    world.executors["a"].let_go("prepare", Span(1))
    world.executors["a"].let_go("stop", Span(1))
    world.settle()


def test_moves_from_silent_captures_use_no_slots() -> None:
    """Two silent captures are drained: their spans stay, with the reason, and others are moved."""
    world = world_with(["a", "b", "c", "d"], 100, SchedulerConfig())
    world.paused |= {"a", "b"}
    world.run(35)
    world.scheduler.drain_capture("a")
    world.scheduler.drain_capture("b")
    stays = next(view.span.table_id for view in world.snapshot.spans if view.primary == "a")
    goes = next(view.span.table_id for view in world.snapshot.spans if view.primary == "c")
    waits, query = world.scheduler.move_table(stays, "c"), world.scheduler.move_table(goes, "d")
    world.until(lambda: query.state is QueryState.DONE, ticks=10)
    assert waits.state is QueryState.PENDING
    assert waits.reason == "a is silent and cannot be stopped"
    drain = next(query for query in world.scheduler.queries() if query.target == "a")
    assert drain.reason == "25 tables left: a is silent and cannot be stopped"
    world.paused.clear()
    world.until(lambda: world.scheduler.drain_capture("a") + world.scheduler.drain_capture("b") == 0, ticks=100)


def test_a_drain_names_the_capture_that_has_not_reported() -> None:
    """A drain names the capture that blocks moves; a rebalance that finds nothing to move is done."""
    world = world_with(["a", "b", "mute"], 3, SchedulerConfig(bootstrap_timeout_ms=500))
    world.paused.add("mute")
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    even = world.scheduler.rebalance()
    world.run(2)
    assert even.state is QueryState.DONE
    left = world.scheduler.drain_capture("a")
    world.run(3)
    drain = next(query for query in world.scheduler.queries() if query.target == "a")
    assert drain.reason == f"{left} tables left: {MUTE}"
    world.paused.discard("mute")
    world.until(lambda: world.scheduler.drain_capture("a") == 0)


def test_a_blocked_rebalance_gives_the_reason() -> None:
    """It waits with the name of the capture that has not reported, and continues once it has."""
    world = world_with(["a"], 8, SchedulerConfig(bootstrap_timeout_ms=500))
    world.join("b")
    world.join("mute")
    world.run(3)
    world.paused.add("mute")
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    query = world.scheduler.rebalance()
    world.run(5)
    assert (query.state, query.reason) == (QueryState.ACCEPTED, MUTE)
    world.paused.discard("mute")
    world.until(lambda: query.state is QueryState.DONE, ticks=100)
    assert query.reason == ""


def test_a_move_that_is_cancelled_at_once_replaces_no_other() -> None:
    """The older move of the same table continues."""
    world = world_with(["a", "b", "c"], 1, SchedulerConfig())
    first, second = (capture for capture in ("a", "b", "c") if capture != world.primary(1))
    world.executors[first].hang("prepare")
    older = world.scheduler.move_table(1, first)
    world.run(3)
    newer = world.scheduler.move_table(1, second)
    newer.cancel()
    world.step()
    assert (older.state, newer.state) == (QueryState.ACCEPTED, QueryState.CANCELLED)
    world.executors[first].let_go("prepare")
    world.until(lambda: older.state is QueryState.DONE)


def test_a_cancelled_move_names_the_span_that_continues() -> None:
    """Its Primary has been sent a remove: the span continues to the target, and the reason says so."""
    world = world_with(["a", "b"], 1, SchedulerConfig())
    source = world.primary(1)
    target = "b" if source == "a" else "a"
    world.executors[source].hang("stop")
    query = world.scheduler.move_table(1, target)
    world.until(lambda: world.executors[source].state(Span(1)) is TableState.STOPPING)
    query.cancel()
    world.step()
    assert query.state is QueryState.CANCELLED
    assert query.reason == f"cancelled; table {Span(1)} can no longer be stopped and continues to the target"
    world.executors[source].let_go("stop")
    world.settle()
    assert world.primary(1) == target


def test_a_newer_writer_in_commit_is_not_stopped() -> None:
    """During a move a third capture turns out to be the writer: it was sent nothing yet, so the
    Secondary continues to prepare."""
    tables = Tables()
    rows = tables.add(SpanBlock(np.array([1], np.int64)), 0)
    tables.state[rows], tables.primary[rows], tables.secondary[rows], tables.assignment_epoch[rows] = COMMIT, 0, 1, 5
    tables.wanted[rows] = tables.scheduled[rows] = True
    tables.add_undetermined((0,), 2, TableState.STOPPING.code)
    replication, one = Replication(tables, owner_revision=7), np.array([150], np.uint64)
    report = RowReports(rows, np.array([TableState.REPLICATING.code], np.uint8), one, one, one, np.array([6], np.uint64))
    apply_reports(replication, 2, report)
    apply_reports(replication, 2, report)
    assert (int(tables.state[0]), int(tables.primary[0]), int(tables.secondary[0])) == (PREPARE, 2, 1)
    assert set(tables.undetermined[0]) == {0}
    assert {capture for capture, entries in replication.outgoing.entries.items() if entries} == {0}
    assert tables.check() == []


def test_a_drain_that_is_requested_after_its_cancel_stays_in_force() -> None:
    """Drain, cancel and drain again before the next tick leave the capture drained."""
    world = world_with(["a", "b"], 2, SchedulerConfig())
    world.scheduler.drain_capture("a")
    world.until(lambda: world.scheduler.drain_capture("a") == 0)
    former = world.scheduler.queries()[0]
    world.scheduler.cancel_drain("a")
    assert world.scheduler.drain_capture("a") >= 1
    former.cancel()
    world.run(3)
    assert next(view.draining for view in world.snapshot.captures if view.id == "a")
    assert world.scheduler.drain_capture("a") == 0
    world.scheduler.cancel_drain("a")
    world.step()
    assert not any(view.draining for view in world.snapshot.captures)


def test_all_open_jobs_are_listed_and_ended() -> None:
    """Jobs that have not ended are listed, and end with the scheduler; of the ended jobs only the
    last ones are kept."""
    world = world_with(["a", "b", "mute"], 400, SchedulerConfig(bootstrap_timeout_ms=500))
    refused = [world.scheduler.move_table(table, "nobody") for table in range(1, 301)]
    world.paused.add("mute")
    world.step()
    assert {query.state for query in refused} == {QueryState.REFUSED}
    assert len(world.scheduler.queries()) == 256
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    queries = [world.scheduler.move_table(view.span.table_id, "b") for view in world.snapshot.spans if view.primary != "b"]
    world.step()
    assert len(queries) > 256
    assert list(world.scheduler.queries()) == queries
    world.scheduler.close()
    assert {query.state for query in queries} == {QueryState.CANCELLED}


def test_a_move_names_its_source_although_it_is_gone() -> None:
    """The index of the source belongs to another capture by the time the move ends."""
    world = world_with(["a", "b"], 1, SchedulerConfig())
    source = world.primary(1)
    target = "b" if source == "a" else "a"
    world.executors[target].hang("prepare")
    world.scheduler.move_table(1, target)
    world.run(3)
    world.die(source)
    world.step()
    world.join("z")
    world.run(3)
    world.executors[target].let_go("prepare")
    found: list[tuple[str, str]] = []
    for _ in range(10):
        world.step()
        found += [(event.source, event.target) for event in world.scheduler.events() if isinstance(event, SpanMoved)]
    assert found == [(source, target)]


def test_a_prepare_that_was_ready_is_not_blamed() -> None:
    """It missed its deadline because a capture had not reported, and the error says that it was
    ready."""
    world = world_with(["a", "b", "mute"], 3, SchedulerConfig(bootstrap_timeout_ms=500, prepare_timeout_ms=1_500))
    table = next(table for table in world.tables if world.primary(table) != "mute")
    source = world.primary(table)
    target = "b" if source == "a" else "a"
    world.executors[target].hang("prepare")
    world.scheduler.move_table(table, target)
    world.run(3)
    world.paused.add("mute")
    world.elect("owner2")
    world.executors[target].let_go("prepare")
    world.until(lambda: world.view(table).error != "" if len(world.snapshot.spans) == 3 else False)
    assert world.view(table).error == "ready, but another one might still hold it for more than 1500 ms"
    assert world.writers(table) == (source,)


def test_spans_that_failed_together_are_retried_apart() -> None:
    """Each waits for another share of its backoff, between half and all of it; a replay waits the
    same."""

    def retries() -> list[int]:
        world = world_with(["a", "b"], 40, SchedulerConfig(error_backoff_initial_ms=10_000, error_backoff_max_ms=10_000))
        for executor in world.executors.values():
            for table in world.tables:
                executor.fail(Span(table), "no disk")
        world.run(3)
        core = world.scheduler._core  # type: ignore[attr-defined]
        now_ms = core.now_ms
        waits = [trouble.retry_at_ms - now_ms for trouble in core.tables.failures.values()]
        assert len(waits) == len(world.tables)
        assert all(4_000 <= wait_ms <= 10_000 for wait_ms in waits)
        return waits

    first = retries()
    assert len(set(first)) > len(first) // 2
    assert retries() == first
