"""The placement log and the counters: moves are named, and everything that grows with the tables is counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from owner.core.events import AuditFailed, Event, OrphansFound, PlacementReason, SpansPlaced, TwoWriters
from owner.core.scheduler_config import SchedulerConfig
from owner.events.placement_counters import PlacementCounters
from owner.events.recorder import COUNTS_INTERVAL_S, NAMED_PER_TICK_MAX, EventRecorder
from tablewire.model.jobs import ENDED, format_job_id
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind
from tablewire.runtime.metrics import Metrics
from tests.owner.world import CHANGEFEED, World

NAME = str(CHANGEFEED)
Line = dict[str, Any]


class LoggedWorld(World):
    """A world whose events are recorded after each tick, in virtual time."""

    def __init__(self, captures: Sequence[str] = ("a", "b", "c"), tables: Sequence[int] = (1,)) -> None:
        super().__init__(captures, tables)
        self.metrics = Metrics("owner", "1.0")
        self.counters = PlacementCounters(self.metrics)
        self.recorder = EventRecorder(CHANGEFEED, self.counters, clock=lambda: self.now)

    def step(self) -> Any:
        watermark = super().step()
        self.recorder.record(self.scheduler.events())
        return watermark

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"tablewire_owner_{name}_total", {"changefeed": NAME, **labels})


@pytest.fixture
def events() -> Iterator[list[Line]]:
    with capture_logs() as captured:
        yield captured  # type: ignore[misc]


def named(events: list[Line], name: str) -> list[Line]:
    return [event for event in events if event["event"] == name]


def test_a_thousand_new_tables_are_one_line(events: list[Line]) -> None:
    """The line has the counts by reason and the changefeed."""
    world = LoggedWorld(tables=range(1_000))
    world.settle()
    world.run(20)
    assert sum(event["add"] for event in named(events, "spans_placed")) == 1_000
    assert len(events) < 10
    assert all(event["changefeed"] == NAME for event in events)
    assert world.count("placements", why="add") == 1_000
    assert world.count("placements", why="move") == 0


def test_the_end_of_a_planned_move_is_a_line_with_both_sides(events: list[Line]) -> None:
    """The move is logged once, and so is the end of its job."""
    world = LoggedWorld(tables=(1, 2, 3))
    world.settle()
    source = world.primary(1)
    target = next(capture for capture in "abc" if capture != source)
    query = world.scheduler.move_table(1, target)
    world.run(30)
    (moved,) = named(events, "span_moved")
    assert (moved["span"], moved["source"], moved["target"], moved["why"]) == (str(Span(1)), source, target, "move")
    (ended,) = named(events, "job_ended")
    assert (ended["kind"], ended["target"], ended["state"], ended["log_level"]) == ("move", target, query.state, "info")
    assert world.count("placements", why="move") == 1
    assert world.count("jobs_ended", kind="move", state="done") == 1


def test_counters_begin_at_zero_and_go_with_their_changefeed() -> None:
    """Prometheus sees the first increase only of a series that existed before it; that holds for jobs by kind and state too."""
    world = LoggedWorld()
    assert {world.count("jobs_ended", kind=kind, state=state) for kind in QueryKind for state in ENDED} == {0.0}
    assert {world.count(name) for name in ("failovers", "brakes", "two_writers", "orphans", "audit_failures")} == {0.0}
    world.counters.keep_only(())
    assert [world.count(name) for name in ("failovers", "orphans")] == [None, None]
    assert world.count("jobs_ended", kind="move", state="done") is None


def test_a_refused_job_is_a_warning_with_the_reason(events: list[Line]) -> None:
    """The operator may have left the command, so the log has the reason."""
    world = LoggedWorld()
    world.settle()
    world.scheduler.move_table(1, world.primary(1))
    world.run(3)
    (ended,) = named(events, "job_ended")
    assert (ended["log_level"], ended["state"]) == ("warning", "refused")
    assert "already the primary" in ended["reason"]


def test_every_line_of_a_job_has_its_id_and_who_asked(events: list[Line]) -> None:
    """The lines of the spans and of the end of a move, a drain and a rebalance share the id of their job."""
    world = LoggedWorld(tables=(1, 2, 3, 4, 5, 6))
    world.settle()
    source = world.primary(1)
    target = next(capture for capture in "abc" if capture != source)
    query = world.scheduler.move_table(1, target, "alice")
    world.until(lambda: query.state in ENDED)
    (moved,) = named(events, "span_moved")
    (ended,) = named(events, "job_ended")
    assert moved["job"] == ended["job"] == format_job_id(query.job.id)
    assert moved["by"] == ended["by"] == "alice"
    rebalance = world.scheduler.rebalance()
    world.until(lambda: rebalance.state in ENDED)
    assert rebalance.job.id != query.job.id
    balanced = [event for event in named(events, "span_moved") if event["why"] == "balance"]
    assert {event["job"] for event in balanced} == {format_job_id(rebalance.job.id)}
    assert named(events, "job_ended")[-1]["moves"] == len(balanced) == rebalance.job.moves_done
    assert rebalance.job.moves_left == 0
    world.scheduler.drain_capture(source)
    world.step()
    world.until(lambda: world.scheduler.drain_capture(source) == 0 and world.steady())
    drained = [event for event in named(events, "span_moved") if event["why"] == "drain"]
    assert {event["job"] for event in drained} == {named(events, "job_ended")[-1]["job"]} != {format_job_id(rebalance.job.id)}


def test_many_moves_are_a_few_lines_and_a_count(events: list[Line]) -> None:
    """A drain of many spans names a few of them in each tick and counts the others."""
    world = LoggedWorld(captures=("a",), tables=range(300))
    world.config = SchedulerConfig(max_task_concurrency=1_000, max_task_concurrency_per_capture=1_000)
    world.scheduler = world.new_scheduler()
    world.settle()
    world.join("b")
    world.run(10)
    events.clear()
    world.scheduler.drain_capture("a")
    world.run(30)
    lines = named(events, "span_moved")
    told = sum(event.get("drain", 0) for event in named(events, "spans_placed"))
    assert 1 <= len(lines) <= 2 * NAMED_PER_TICK_MAX
    assert len(lines) + told == 300
    assert world.count("placements", why="drain") == 300


def test_counts_are_logged_at_most_once_a_second(events: list[Line]) -> None:
    """The number of ticks does not matter."""
    world = LoggedWorld()
    world.settle()
    events.clear()
    begun = world.now
    for _ in range(200):
        world.now += 0.01
        world.recorder.record([SpansPlaced({PlacementReason.ADD: 3})])
    assert len(named(events, "spans_placed")) <= (world.now - begun) / COUNTS_INTERVAL_S + 1


def test_a_failed_span_is_logged_once_with_its_error(events: list[Line]) -> None:
    """The error has no secrets and is not logged at each attempt; many failures at once are a few lines and a count."""
    tables = tuple(range(1, 3 + NAMED_PER_TICK_MAX))
    world = LoggedWorld(captures=("a",), tables=tables)
    world.settle()
    world.executors["a"].fail(Span(1), "cannot write to postgresql://me:secret@sink/db")
    world.until(lambda: bool(named(events, "span_failed")))
    world.run(3)
    (failed,) = named(events, "span_failed")
    assert (failed["span"], failed["error"], failed["changefeed"]) == ("1", "cannot write to postgresql://me:***@sink/db", NAME)
    for table in tables[1:]:
        world.executors["a"].fail(Span(table), "disk full")
    world.until(lambda: any("spans_failed" in event for event in named(events, "placement_trouble")), what="the count")
    told = len(named(events, "span_failed")) - 1 + named(events, "placement_trouble")[0]["spans_failed"]
    assert (told, len(named(events, "span_failed")) - 1) == (len(tables) - 1, NAMED_PER_TICK_MAX)


def test_a_failover_has_a_beginning_and_an_end(events: list[Line]) -> None:
    """The lines name the capture, the spans, and how long they had no writer."""
    world = LoggedWorld(tables=range(30))
    world.settle()
    world.run(10)
    events.clear()
    world.die("a")
    world.run(20)
    (began,) = named(events, "failover_began")
    (done,) = named(events, "failover_done")
    assert (began["captures"], began["gone"], began["spans"], began["log_level"]) == (["a"], 1, 10, "warning")
    assert done["spans"] == 10
    assert 0 < done["took_ms"] < 2_000
    assert world.count("failovers") == 1


def test_a_drained_capture_that_leaves_is_no_failover(events: list[Line]) -> None:
    """It no longer wrote anything."""
    world = LoggedWorld(tables=range(3))
    world.settle()
    world.scheduler.drain_capture("a")
    world.until(lambda: world.scheduler.drain_capture("a") == 0)
    world.die("a")
    world.run(20)
    assert not named(events, "failover_began")
    assert [(event["kind"], event["state"]) for event in named(events, "job_ended")] == [("drain", "done")]


def test_the_guard_is_logged_when_it_engages_and_when_it_is_released(events: list[Line]) -> None:
    """The line has the number of the spans that wait."""
    world = LoggedWorld(captures="abcd", tables=range(40))
    world.config = SchedulerConfig(brake_hold_ms=1_000)
    world.scheduler = world.new_scheduler()
    world.settle()
    for capture in "abc":
        world.die(capture)
    world.run(60)
    (on,) = named(events, "brake_on")
    (_off,) = named(events, "brake_off")
    assert (on["spans_waiting"], on["captures_left"], on["log_level"]) == (30, 1, "warning")
    assert world.count("brakes") == 1
    (done,) = named(events, "failover_done")
    assert (done["spans"], done["took_ms"] >= 1_000) == (30, True)


def test_what_must_not_happen_is_counted_and_logged(events: list[Line]) -> None:
    """Two writers are named; orphans and failed audits are counted."""
    world = LoggedWorld()
    world.settle()
    events.clear()
    world.now += COUNTS_INTERVAL_S
    both: list[Event] = [TwoWriters(Span(table), "a", "b") for table in range(9)]
    world.recorder.record([*both, OrphansFound(4), AuditFailed("a"), AuditFailed("b")])
    world.now += COUNTS_INTERVAL_S
    world.recorder.record([AuditFailed("a")])
    assert len(named(events, "two_writers")) == NAMED_PER_TICK_MAX
    first, second = named(events, "placement_trouble")
    assert (first["two_writers"], first["orphans"], first["audit_failures"], second["audit_failures"]) == (4, 4, 2, 1)
    assert (world.count("two_writers"), world.count("orphans"), world.count("audit_failures")) == (9, 4, 3)


def test_scenario_30_the_series_of_a_changefeed_go_with_it_and_no_others() -> None:
    """The series of other changefeeds stay, even if their names have the same prefix."""
    metrics = Metrics("owner", "1.0")
    counters = PlacementCounters(metrics)
    for name in ("default/a", "default/ab"):
        counters.begin(name)
        counters.orphans.labels(name).inc(3)
    counters.keep_only(["default/ab"])
    sample = "tablewire_owner_orphans_total"
    assert metrics.registry.get_sample_value(sample, {"changefeed": "default/a"}) is None
    assert metrics.registry.get_sample_value(sample, {"changefeed": "default/ab"}) == 3
