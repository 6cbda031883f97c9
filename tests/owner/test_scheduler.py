"""The scheduler with real agents: adding, moving, removing, draining, watermark, barrier, jobs."""

from __future__ import annotations

import numpy as np
import pytest

from tablewire.errors import ClosedError, UnknownCaptureError
from tablewire.model.progress import Barrier, BarrierWithMinTs, TableBarrier, Watermark
from tablewire.model.spans import Span
from tablewire.model.states import CaptureState, QueryState, ReplicationState, StallReason
from tests.owner.world import World


def test_tables_are_spread_and_replicate() -> None:
    """Twelve tables on three captures end as four each, within a few ticks."""
    world = World(tables=range(1, 13))
    assert world.settle() <= 8
    assert sorted(view.spans for view in world.snapshot.captures) == [4, 4, 4]
    assert all(len(world.writers(table)) == 1 for table in world.tables)


def test_nothing_before_bootstrap() -> None:
    """The first tick does not know the placement: the scheduler is not initialized and the watermark is 0."""
    world = World()
    assert world.step() == Watermark(0, 0, 0, 0)
    assert not world.scheduler.is_initialized()


def test_watermark_is_the_minimum_and_a_new_table_holds_it() -> None:
    """The slowest span bounds the checkpoint, and a table that joins starts at the checkpoint_ts passed in."""
    world = World(tables=[1, 2])
    world.settle()
    world.advance(500)
    world.executors[world.primary(1)].advance(700, Span(1))
    world.run(3)
    assert world.watermark.checkpoint_ts == 500
    world.tables.append(3)
    world.settle()
    assert world.view(3).checkpoint.checkpoint_ts == 500
    assert world.watermark.checkpoint_ts == 500
    assert world.snapshot.slowest in (Span(2), Span(3))


def test_watermark_obeys_barriers() -> None:
    """Neither checkpoint nor resolved pass the global barrier, nor the checkpoint a table's own."""
    world = World(tables=[1, 2])
    world.settle()
    world.barrier = BarrierWithMinTs(Barrier(400, (TableBarrier(2, 300),)), 300)
    world.advance(1000)
    world.run(4)
    assert world.watermark.checkpoint_ts == 300
    assert world.watermark.resolved_ts == 400
    world.barrier = BarrierWithMinTs(Barrier(50), 50)
    world.run(2)
    assert world.watermark.checkpoint_ts == 300


def test_no_tables_gives_the_barrier() -> None:
    """Without tables the watermark is the two bounds."""
    world = World(tables=[])
    world.barrier = BarrierWithMinTs(Barrier(900), 800)
    world.run(3)
    assert world.watermark == Watermark(800, 900)


def test_no_capture_is_a_reason() -> None:
    """Without captures the span has that stall reason, and the watermark cannot proceed."""
    world = World(captures=[])
    world.run(2)
    assert world.view(1).stall_reason is StallReason.NO_CAPTURE
    assert world.watermark == Watermark(0, 0, 0, 0)


def test_current_tables_may_be_an_array() -> None:
    """A numpy array, a range and a list are the same set."""
    world = World(tables=[3, 1, 2])
    world.settle()
    world.scheduler.tick(100, np.array([2, 3, 1]), {}, world.barrier)
    assert [view.span.table_id for view in world.snapshot.spans] == [1, 2, 3]


def test_dropped_table_is_removed_everywhere() -> None:
    """A table that is gone leaves its executor and its row, and may come back."""
    world = World(tables=[1, 2])
    world.settle()
    holder = world.primary(2)
    world.tables.remove(2)
    world.until(lambda: len(world.snapshot.spans) == 1)
    assert Span(2) not in world.executors[holder].spans()
    world.tables.append(2)
    world.settle()
    assert len(world.writers(2)) == 1


def test_table_dropped_and_back_before_it_was_removed() -> None:
    """A table that returns while its removal is under way is removed, then added again, with a permission that the sink takes."""
    world = World(tables=[1, 2])
    world.settle()
    holder = world.executors[world.primary(2)]
    holder.hang("stop", Span(2))
    world.tables.remove(2)
    world.run(3)
    assert world.view(2).stall_reason is StallReason.REMOVING
    world.tables.append(2)
    world.run(3)
    assert world.watermark == Watermark(0, 0, 0, 0)
    holder.let_go("stop", Span(2))
    world.settle()
    assert len(world.writers(2)) == 1


@pytest.mark.parametrize("target", ["a", "b", "c"])
def test_move_ends_within_a_second(target: str) -> None:
    """A planned move with an immediate executor takes less than 1 s of clock, and the table is never without its data."""
    world = World(tables=[1])
    world.settle()
    if world.primary(1) == target:
        assert world.scheduler.move_table(1, target).wait(0) is QueryState.PENDING
        world.step()
        assert "already the primary" in world.scheduler.queries()[-1].reason
        return
    query = world.scheduler.move_table(1, target)
    assert world.until(lambda: query.state is QueryState.DONE) <= 10
    assert world.primary(1) == target
    assert world.writers(1) == (target,)


@pytest.mark.parametrize(
    ("table", "target", "reason"),
    [(99, "b", "table 99 is unknown"), (1, "nobody", "unknown"), (1, "stopping", "stopping"), (1, "silent", "silent")],
)
def test_impossible_moves_are_refused_with_a_reason(table: int, target: str, reason: str) -> None:
    """The table is unknown, or the target is unknown, stopping or silent."""
    world = World(captures=["a", "b", "stopping", "silent"], tables=[1])
    world.liveness["stopping"].stop()
    world.settle()
    world.paused.add("silent")
    world.run(40)
    query = world.scheduler.move_table(table, target)
    world.step()
    assert query.state is QueryState.REFUSED
    assert reason in query.reason
    assert "refused" in str(query)


def test_move_to_a_draining_capture_is_refused() -> None:
    """A capture that is drained takes no spans."""
    world = World(tables=[1])
    world.settle()
    target = next(capture for capture in "abc" if capture != world.primary(1))
    world.scheduler.drain_capture(target)
    query = world.scheduler.move_table(1, target)
    world.step()
    assert query.state is QueryState.REFUSED
    assert "drained" in query.reason


def test_newer_move_cancels_an_older_one() -> None:
    """Of two moves of one span the last one wins, and the first one is cancelled."""
    world = World(tables=[1])
    world.settle()
    first, second = [capture for capture in "abc" if capture != world.primary(1)]
    world.executors[first].hang("prepare")
    older = world.scheduler.move_table(1, first)
    world.run(3)
    assert older.state is QueryState.ACCEPTED
    newer = world.scheduler.move_table(1, second)
    world.until(lambda: newer.state is QueryState.DONE)
    assert older.state is QueryState.CANCELLED
    assert world.writers(1) == (second,)


def test_cancelled_move_stays_where_it_was() -> None:
    """A prepare that hangs is undone by cancel, while the Primary continues to write."""
    world = World(tables=[1])
    world.settle()
    source = world.primary(1)
    target = next(capture for capture in "abc" if capture != source)
    world.executors[target].hang("prepare")
    query = world.scheduler.move_table(1, target)
    world.run(5)
    assert world.view(1).stall_reason is StallReason.PREPARING
    query.cancel()
    world.step()
    assert query.state is QueryState.CANCELLED
    world.settle()
    assert world.primary(1) == source


def test_span_in_progress_keeps_a_move_pending() -> None:
    """A move of a span that is still being added waits with its reason, then runs."""
    world = World(tables=[1])
    for executor in world.executors.values():
        executor.hang("prepare")
    world.run(4)
    query = world.scheduler.move_table(1, next(c for c in "abc" if c != world.view(1).secondary))
    world.step()
    assert query.state is QueryState.PENDING
    assert "in progress" in query.reason
    for executor in world.executors.values():
        executor.let_go("prepare")
    world.until(lambda: query.state is QueryState.DONE)


def test_drain_counts_down_to_zero() -> None:
    """The count is at least 1 until a tick has seen the drain, then what is left, then 0, and nothing returns."""
    world = World(tables=range(1, 31))
    assert world.scheduler.drain_capture("a") >= 1
    world.settle()
    world.until(lambda: world.scheduler.drain_capture("a") == 0)
    assert {view.primary for view in world.snapshot.spans} == {"b", "c"}
    assert world.executors["a"].spans() == ()
    with pytest.raises(UnknownCaptureError):
        world.scheduler.drain_capture("nobody")


def test_drain_can_be_cancelled() -> None:
    """After cancel_drain the capture is used again, and a second cancel is refused."""
    world = World(tables=range(1, 4))
    world.settle()
    world.scheduler.drain_capture("a")
    world.until(lambda: world.scheduler.drain_capture("a") == 0)
    query = world.scheduler.cancel_drain("a")
    world.step()
    assert query.state is QueryState.DONE
    assert world.scheduler.cancel_drain("a").state is QueryState.REFUSED
    moved = world.scheduler.move_table(1, "a")
    world.until(lambda: moved.state is QueryState.DONE)


def test_stopping_capture_is_emptied() -> None:
    """The spans of a capture that reports that it is stopping are moved away, one planned move after the other."""
    world = World(tables=range(1, 10))
    world.settle()
    world.liveness["b"].stop()
    world.until(lambda: not world.executors["b"].spans())
    world.settle()
    stopping = next(view for view in world.snapshot.captures if view.id == "b")
    assert (stopping.state, stopping.draining, stopping.spans) == (CaptureState.STOPPING, True, 0)


def test_drain_without_another_capture_says_so() -> None:
    """The spans stay and are written, and the count has a reason."""
    world = World(captures=["a"], tables=[1])
    world.settle()
    world.scheduler.drain_capture("a")
    world.run(3)
    assert world.scheduler.drain_capture("a") == 1
    assert "no other processor" in world.scheduler.queries()[-1].reason
    assert world.writers(1) == ("a",)


def test_executor_error_is_retried_elsewhere_first() -> None:
    """A span whose executor fails goes to another capture after a backoff; other spans are not affected."""
    world = World(tables=[1, 2, 3])
    world.settle()
    failed = world.primary(1)
    world.executors[failed].fail(Span(1), "disk on fire")
    world.until(lambda: world.view(1).stall_reason is StallReason.BACKOFF)
    assert world.view(1).error == "disk on fire"
    assert world.view(2).state is world.view(3).state is ReplicationState.REPLICATING
    world.settle()
    assert world.primary(1) != failed


def test_closed_scheduler_refuses() -> None:
    """After close, tick and jobs raise; close is idempotent and cancels the waiting jobs."""
    world = World()
    query = world.scheduler.move_table(1, "a")
    world.scheduler.close()
    world.scheduler.close()
    assert query.state is QueryState.CANCELLED
    with pytest.raises(ClosedError):
        world.scheduler.tick(1, [], {}, world.barrier)
    with pytest.raises(ClosedError):
        world.scheduler.move_table(1, "a")


def test_task_statuses_name_every_capture() -> None:
    """Every living capture has a status, which is empty where it writes nothing."""
    world = World(tables=[1])
    world.settle()
    statuses = world.scheduler.get_task_statuses()
    assert set(statuses) == {"a", "b", "c"}
    assert {span for status in statuses.values() for span in status.spans} == {Span(1)}
    assert statuses[world.primary(1)].spans[Span(1)].checkpoint_ts == 100


def test_new_owner_moves_nothing() -> None:
    """An election rebuilds placement from the captures: same primaries, no new permission, watermark not back."""
    world = World(tables=range(1, 20))
    world.settle()
    world.advance(300)
    world.run(3)
    before = {view.span: view.primary for view in world.snapshot.spans}
    epochs = {span: world.sink.fence(span) for span in before}
    world.elect("owner2")
    world.settle()
    assert {view.span: view.primary for view in world.snapshot.spans} == before
    assert {span: world.sink.fence(span) for span in before} == epochs
    assert world.watermark.checkpoint_ts == 300


def test_crash_of_a_capture_moves_its_spans() -> None:
    """The spans of a dead capture replicate elsewhere from their checkpoint; the others stay."""
    world = World(tables=range(1, 10))
    world.settle()
    world.advance(200)
    world.run(2)
    kept = {view.span: view.primary for view in world.snapshot.spans if view.primary != "b"}
    world.die("b")
    world.settle()
    after = {view.span: view.primary for view in world.snapshot.spans}
    assert {span: after[span] for span in kept} == kept
    assert set(after.values()) == {"a", "c"}
    assert world.watermark.checkpoint_ts == 200


def test_a_held_snapshot_never_changes() -> None:
    """A snapshot, and a view of it, shows the state of its tick; the next snapshot shows the present state."""
    world = World(tables=range(1, 50))
    world.settle()
    world.executors[world.primary(7)].advance(300, Span(7))
    world.run(2)
    held = world.snapshot
    spans = held.spans
    del held
    for ts in (400, 500):
        world.executors[world.primary(7)].advance(ts, Span(7))
        world.run(2)
    assert spans[6].checkpoint.checkpoint_ts == 300
    assert world.snapshot.spans[6].checkpoint.checkpoint_ts == 500


def test_a_snapshot_without_readers_is_updated_in_place() -> None:
    """When little has changed and the snapshot has no readers, the columns are not copied."""
    world = World(tables=range(1, 50))
    world.settle()
    world.run(2)
    before = id(world.snapshot.progress)
    world.executors[world.primary(7)].advance(300, Span(7))
    world.run(2)
    assert id(world.snapshot.progress) == before
    assert world.snapshot.spans[6].checkpoint.checkpoint_ts == 300
