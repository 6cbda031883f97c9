"""Manual jobs: the core owns them, their handles follow at the end of a tick, and each change is reported once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from owner.core.events import JobChanged, SpanMoved
from owner.scheduling import scheduler as scheduler_module
from owner.scheduling.snapshot import Snapshot
from tablewire.model.columns import I64
from tablewire.model.jobs import ENDED, JobView
from tablewire.model.messages import DispatchTableRequest, Message
from tablewire.model.spans import Span
from tablewire.model.states import DispatchAction, QueryKind, QueryState, ReplicationState
from tablewire.testing import Deliver
from tests.owner.world import World


@pytest.fixture
def world() -> World:
    """Three captures and three tables, all replicating."""
    world = World(tables=(1, 2, 3))
    world.settle()
    return world


def changes(world: World) -> list[JobView]:
    """The jobs that changed in the last tick."""
    return [event.job for event in world.scheduler.events() if isinstance(event, JobChanged)]


def others(world: World, table: int) -> list[str]:
    return [capture for capture in "abc" if capture != world.primary(table)]


def test_a_handle_shows_what_the_last_tick_reported(world: World) -> None:
    """Each change of a job is one event, the last one when it has ended."""
    query = world.scheduler.move_table(1, others(world, 1)[0], "alice")
    assert (query.job.asked_by, query.reason) == ("alice", "not considered yet")
    seen = []
    for _ in range(10):
        world.step()
        seen += [job for job in changes(world) if job.id == query.job.id]
        assert not seen or seen[-1] == query.job
    assert [job.state for job in seen] == [QueryState.ACCEPTED, QueryState.DONE]


def test_a_job_that_is_refused_at_once_is_reported_by_the_next_tick(world: World) -> None:
    """Its caller has the answer at once; the log and the metrics get it from the events."""
    query = world.scheduler.cancel_drain("a")
    assert (query.state, query.reason) == (QueryState.REFUSED, "processor a is not being drained")
    world.step()
    assert changes(world) == [query.job]
    world.step()
    assert not changes(world)


def test_too_many_open_jobs_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A move is refused while that many have not ended; a drain and its end are accepted all the same."""
    monkeypatch.setattr(scheduler_module, "OPEN_JOBS_MAX", 2)
    target = others(world, 1)[0]
    world.executors[target].hang("prepare")
    first, second, third = (world.scheduler.move_table(table, target) for table in (1, 1, 1))
    assert (third.state, third.reason) == (QueryState.REFUSED, "2 jobs are already pending")
    assert world.scheduler.drain_capture(target) >= 1
    assert world.scheduler.cancel_drain(target).state is QueryState.PENDING
    world.step()
    assert (first.state, second.state) == (QueryState.CANCELLED, QueryState.ACCEPTED)


def test_a_drain_ends_by_its_handle(world: World) -> None:
    """The capture is used again, and a drain that is asked for before the next tick is a new one."""
    world.scheduler.drain_capture("a")
    world.step()
    drain = next(query for query in world.scheduler.queries() if query.kind is QueryKind.DRAIN)
    drain.cancel()
    drain.cancel()
    assert world.scheduler.drain_capture("a") >= 1
    world.step()
    assert drain.state is QueryState.CANCELLED
    drains = [query.state for query in world.scheduler.queries() if query.kind is QueryKind.DRAIN]
    assert drains == [QueryState.CANCELLED, QueryState.ACCEPTED]
    world.scheduler.cancel_drain("a")
    world.step()
    assert not any(view.draining for view in world.snapshot.captures)


def test_the_dispatches_of_a_move_name_its_job(world: World) -> None:
    """Prepare, stop and write carry the id, so that the logs of both processors can be joined with the owner's."""
    found: list[tuple[str, int, int]] = []

    def listen(_sender: str, receiver: str, message: Message) -> Deliver:
        if isinstance(message.body, DispatchTableRequest):
            jobs = message.body.jobs.tolist()
            found.extend((receiver, action, job) for action, job in zip(message.body.actions.tolist(), jobs, strict=True))
        return Deliver.DELIVER

    world.network.hook = listen
    source, target = world.primary(1), others(world, 1)[0]
    query = world.scheduler.move_table(1, target)
    world.until(lambda: query.state in ENDED)
    assert found == [
        (target, DispatchAction.ADD_PREPARE, query.job.id),
        (source, DispatchAction.REMOVE, query.job.id),
        (target, DispatchAction.ADD_WRITE, query.job.id),
    ]


def test_a_move_that_another_one_takes_over_belongs_to_the_newer_job(world: World) -> None:
    """Both lead to the same capture: the older one is cancelled, what it has begun continues."""
    target = others(world, 1)[0]
    world.executors[target].hang("prepare")
    older = world.scheduler.move_table(1, target)
    world.run(2)
    newer = world.scheduler.move_table(1, target)
    world.run(2)
    assert (older.state, newer.state) == (QueryState.CANCELLED, QueryState.ACCEPTED)
    world.executors[target].let_go("prepare")
    moved: list[SpanMoved] = []
    for _ in range(10):
        world.step()
        moved += [event for event in world.scheduler.events() if isinstance(event, SpanMoved)]
    assert [(event.span, event.target, event.job_id) for event in moved] == [(Span(1), target, newer.job.id)]


def test_a_drain_that_is_requested_during_the_first_tick_knows_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot that it reads is the one from before the tick, which has no captures."""
    world, in_tick, proceed = World(), threading.Event(), threading.Event()

    def wait_in_tick() -> dict[str, float]:
        in_tick.set()
        assert proceed.wait(10.0)
        return {}

    world.scheduler = world.new_scheduler(cluster_load=wait_in_tick)
    tick, latest = threading.Thread(target=world.step), world.scheduler.snapshot
    tick.start()
    assert in_tick.wait(10.0)

    def read_before_the_tick_ends() -> Snapshot:
        before = latest()
        proceed.set()
        tick.join(0.2)  # it waits for the caller of this function
        return before

    monkeypatch.setattr(world.scheduler, "snapshot", read_before_the_tick_ends)
    assert world.scheduler.drain_capture("a") >= 1
    tick.join(10.0)
    assert not tick.is_alive()


def test_a_tick_does_not_wait_for_a_reader_that_counts_spans(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes a while when there are a million spans."""

    def count_during_a_tick(_snapshot: Snapshot, _capture: str) -> I64:
        tick = threading.Thread(target=world.step)
        tick.start()
        tick.join(10.0)
        assert not tick.is_alive()
        return np.empty(0, np.int64)

    monkeypatch.setattr(Snapshot, "touching", count_during_a_tick)
    assert world.scheduler.drain_capture("a") == 1


def test_a_move_that_begins_when_another_one_ends_does_not_take_its_place(world: World) -> None:
    """The end of the older move is reported with its own source, target and job."""
    source, (target, later) = world.primary(1), others(world, 1)
    world.executors[source].hang("stop")
    older = world.scheduler.move_table(1, target)
    world.run(4)
    newer = world.scheduler.move_table(1, later)
    world.run(2)
    assert (older.state, newer.state) == (QueryState.CANCELLED, QueryState.PENDING)
    world.executors[source].let_go("stop")
    moved: list[SpanMoved] = []
    for _ in range(15):
        world.step()
        moved += [event for event in world.scheduler.events() if isinstance(event, SpanMoved)]
    found = [(event.source, event.target, event.job_id) for event in moved]
    assert found == [(source, target, older.job.id), (target, later, newer.job.id)]


def test_a_move_of_a_table_that_is_dropped_before_the_target_writes_is_not_reported(world: World) -> None:
    """The target has its permission already."""
    target = others(world, 1)[0]
    query = world.scheduler.move_table(1, target)
    world.until(lambda: world.view(1).state is ReplicationState.COMMIT)
    world.paused.add(target)
    world.until(lambda: world.view(1).primary == target)
    world.tables.remove(1)
    world.step()
    assert query.state is QueryState.CANCELLED
    assert not any(isinstance(event, SpanMoved) for event in world.scheduler.events())
