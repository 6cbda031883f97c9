"""Bugs that the simulation or a review found in the core and the agents, each reduced to a few
steps."""

from __future__ import annotations

from owner.core.scheduler_config import SchedulerConfig
from tablewire.model.messages import DispatchTableRequest, Heartbeat, Message
from tablewire.model.spans import Span
from tablewire.model.splitter import HashRanges
from tablewire.model.states import QueryState, ReplicationState, TableState
from tablewire.testing import Deliver
from tests.owner.world import World


def audited() -> World:
    """Return a world in which every heartbeat response is audited."""
    world = World(captures=["a", "b"], tables=[1])
    world.config = SchedulerConfig(audit_interval_ms=1)
    world.elect()
    world.settle()
    return world


def test_the_watermark_advances_when_a_silent_writer_reports() -> None:
    """A span whose writer was silent while a new owner started counts as scheduled once the writer
    reports."""
    world = World(captures=["a"], tables=[1])
    world.config = SchedulerConfig(bootstrap_timeout_ms=1_000)
    world.settle()
    world.paused.add("a")
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    world.run(3)
    assert world.view(1).state is ReplicationState.ABSENT
    world.paused.discard("a")
    world.settle()
    world.advance(500)
    world.run(5)
    assert world.watermark.checkpoint_ts == 500


def test_a_silent_prepared_capture_starts_at_the_global_checkpoint() -> None:
    """A span that is only prepared at a silent capture is written from the global checkpoint, never
    from 0."""
    world = World(captures=["a"], tables=[1])
    world.config = SchedulerConfig(bootstrap_timeout_ms=1_000)
    world.executors["a"].hang("prepare")
    world.elect()
    world.until(lambda: world.executors["a"].state(world.view(1).span) is TableState.PREPARING if world.snapshot.spans else False)
    world.paused.add("a")
    world.executors["a"].let_go("prepare")
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    world.paused.discard("a")
    world.step()
    row = world.scheduler._core.tables.row(0)  # type: ignore[attr-defined]
    assert row.checkpoint_ts == 100
    world.settle()
    assert world.watermark.checkpoint_ts == 100


def test_spans_that_a_restarted_agent_leaves_out_are_recorded() -> None:
    """The complete report of a new agent whose echo is older than the last dispatch is recorded:
    audits find no difference."""
    world = audited()
    source = world.primary(1)
    target = "b" if source == "a" else "a"
    world.executors[target].hang("write")
    world.scheduler.move_table(1, target)
    world.until(lambda: world.view(1).primary == target)
    world.network.hook = lambda sender, *_: Deliver.HOLD if sender == target else Deliver.DELIVER
    world.step()  # its last report
    world.network.hook = lambda _sender, receiver, _message: Deliver.HOLD if receiver == target else Deliver.DELIVER
    world.step()  # a heartbeat to it
    world.restart_agent(target)
    world.network.release()
    world.network.hook = lambda _sender, receiver, _message: Deliver.DROP if receiver == target else Deliver.DELIVER
    world.step()  # the permission is sent again, after the heartbeat that the new agent answers
    world.network.hook = lambda *_: Deliver.DELIVER
    world.settle()
    assert world.scheduler._core.audits_failed == 0  # type: ignore[attr-defined]


def test_a_lost_number_is_sent_again() -> None:
    """If the heartbeat that assigns a number to an unchanged span is lost, the audit has the number
    sent again, and counts no failure."""
    world = audited()
    dropped: list[Message] = []

    def drop(_sender: str, _receiver: str, message: Message) -> Deliver:
        if isinstance(message.body, Heartbeat) and len(message.body.numbers) and not dropped:
            dropped.append(message)
            return Deliver.DROP
        return Deliver.DELIVER

    world.network.hook = drop
    world.elect("owner2")
    world.settle()
    world.run(5)
    assert dropped
    table = world.agents[world.primary(1)]._table  # type: ignore[attr-defined]
    assert table.number[: table.size].tolist() == [1]
    assert world.scheduler._core.audits_failed == 0  # type: ignore[attr-defined]


def test_no_capture_without_a_role_is_sent_a_write() -> None:
    """Two reports of one capture arrive in one tick, Prepared and Stopped: the permission that the
    first leads to is void."""
    world = audited()
    target = "b" if world.primary(1) == "a" else "a"
    world.executors[target].hang("write")
    world.scheduler.move_table(1, target)
    world.until(lambda: world.view(1).primary == target)
    world.network.hook = lambda sender, *_: Deliver.HOLD if sender == target else Deliver.DELIVER
    world.step()
    world.executors[target].fail(Span(1))
    world.run(2)
    world.network.release()
    asked: list[int] = []

    def listen(_sender: str, receiver: str, message: Message) -> Deliver:
        if receiver == target and isinstance(message.body, DispatchTableRequest):
            asked.extend(message.body.actions.tolist())
        return Deliver.DELIVER

    world.network.hook = listen
    world.step()
    assert world.view(1).primary is None
    assert asked == []
    world.executors[target].let_go("write")
    world.settle()


def test_a_table_that_was_added_again_is_moved_completely() -> None:
    """A move that is requested while a part of the table is still being removed waits, and then
    moves all parts."""
    world = World(captures=["a", "b"], tables=[1])
    world.splitter = HashRanges(2)
    world.elect()
    world.until(lambda: len(world.snapshot.spans) == 2 and world.steady())
    first, second = (view.span for view in world.snapshot.spans)
    holder = next(view.primary for view in world.snapshot.spans if view.span == first)
    assert holder is not None
    world.executors[holder].hang("stop", first)
    world.tables = []
    world.until(lambda: [view.span for view in world.snapshot.spans] == [first])
    world.tables = [1]
    world.until(lambda: any(view.span == second and view.primary for view in world.snapshot.spans))
    query = world.scheduler.move_table(1, "a")
    world.run(3)
    assert query.state is QueryState.PENDING
    assert "still being removed" in query.reason
    world.executors[holder].let_go("stop", first)
    world.until(lambda: query.state in (QueryState.DONE, QueryState.REFUSED))
    assert [view.primary for view in world.snapshot.spans] == ["a", "a"]


def test_no_move_stops_a_writer_while_no_capture_can_be_promoted() -> None:
    """While a capture has not reported, a move waits with a reason, and one in progress stops no
    writer; then both end."""
    world = World(captures=["a", "b", "mute"], tables=[1, 2, 3])
    world.config = SchedulerConfig(bootstrap_timeout_ms=500)
    world.settle()
    table, other = (table for table in world.tables if world.primary(table) != "mute")
    source, target = world.primary(table), world.primary(other)
    world.executors[target].hang("prepare")
    world.scheduler.move_table(table, target)
    world.run(3)
    world.paused.add("mute")
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    assert (world.view(table).primary, world.view(table).secondary) == (source, target)
    world.executors[target].let_go("prepare")
    query = world.scheduler.move_table(other, source)
    for _ in range(20):
        world.step()
        assert world.writers(table) == (source,)
        assert world.writers(other) == (target,)
    assert query.state is QueryState.PENDING
    assert query.reason == "waiting for the first report of mute, which may hold any table"
    world.paused.discard("mute")
    world.until(lambda: query.state is QueryState.DONE)
    world.settle()
    assert world.primary(table) == target
