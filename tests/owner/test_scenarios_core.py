"""Known failures of schedulers like this one, in the core: each case has its number in its name."""

from __future__ import annotations

import pytest

from owner.core.scheduler_config import SchedulerConfig
from tablewire.model.messages import DispatchTableRequest, Message
from tablewire.model.spans import Span
from tablewire.model.states import DispatchAction, QueryState, ReplicationState, StallReason
from tablewire.testing import Deliver
from tests.owner.world import World


def other(world: World, *not_these: str) -> str:
    return next(capture for capture in sorted(world.alive) if capture not in not_these)


def test_scenario_01_primary_lost_the_table() -> None:
    """The Primary reports Absent while the owner assumes Replicating: the span is scheduled again."""
    world = World(tables=[1])
    world.settle()
    world.executors[world.primary(1)].lose(Span(1))
    world.until(lambda: world.view(1).state is not ReplicationState.REPLICATING)
    world.settle()
    assert len(world.writers(1)) == 1


def test_scenario_02_capture_dies_while_its_table_is_removed() -> None:
    """The row is deleted with the capture and does not block a drain."""
    world = World(tables=[1, 2])
    world.settle()
    holder = world.primary(1)
    world.executors[holder].hang("stop")
    world.tables.remove(1)
    world.run(3)
    assert world.view(1).state is ReplicationState.REMOVING
    world.die(holder)
    world.until(lambda: [view.span for view in world.snapshot.spans] == [Span(2)])
    drained = world.primary(2)
    world.scheduler.drain_capture(drained)
    world.until(lambda: world.scheduler.drain_capture(drained) == 0)


def test_scenario_03_table_dropped_while_preparing() -> None:
    """The removal is accepted at once, and other policies continue."""
    world = World(tables=[1])
    for executor in world.executors.values():
        executor.hang("prepare", Span(1))
    world.until(lambda: world.view(1).stall_reason is StallReason.PREPARING if world.snapshot.spans else False)
    world.tables = [2]
    world.settle()
    assert [view.span for view in world.snapshot.spans] == [Span(2)]
    target = other(world, world.primary(2))
    query = world.scheduler.move_table(2, target)
    world.until(lambda: query.state is QueryState.DONE)


def test_scenario_04_two_captures_hold_a_table_prepared() -> None:
    """A new owner that finds two prepared captures uses one and removes the other."""
    world = World(tables=[1])
    world.network.hook = lambda _sender, _receiver, message: (
        Deliver.DROP
        if isinstance(message.body, DispatchTableRequest) and (message.body.actions == DispatchAction.ADD_WRITE).any()
        else Deliver.DELIVER
    )
    world.run(5)
    first = world.view(1).primary
    assert first is not None
    world.alive.discard(first)  # one owner does not see its lease key, and prepares at another capture
    world.run(4)
    world.alive.add(first)
    prepared = [capture for capture, executor in world.executors.items() if Span(1) in executor.spans()]
    assert len(prepared) == 2
    world.elect("owner2")
    world.network.hook = lambda *_: Deliver.DELIVER
    world.settle()
    assert len(world.writers(1)) == 1
    world.until(lambda: sum(Span(1) in executor.spans() for executor in world.executors.values()) == 1)


def test_scenario_05_one_hung_process_keeps_its_lease() -> None:
    """A silent capture blocks no other: the tables of another one fail over, and a new owner
    continues without it."""
    world = World(tables=range(1, 10))
    world.settle()
    world.paused.add("a")
    world.run(40)
    world.die("b")
    world.until(lambda: all(view.primary in ("a", "c") for view in world.snapshot.spans))
    world.run(3)
    stalls = world.snapshot.stalls()
    assert set(stalls) == {StallReason.SILENT_CAPTURE}
    world.elect("owner2")
    world.until(world.scheduler.is_initialized, ticks=120)
    world.advance(900)
    world.run(5)
    assert world.watermark.checkpoint_ts == 100  # the silent capture's spans wait: no other may write them yet
    waiting = [view for view in world.snapshot.spans if view.state is not ReplicationState.REPLICATING]
    assert {view.stall_reason for view in waiting} <= {
        StallReason.SILENT_CAPTURE,
        StallReason.PREPARING,
        StallReason.UNDETERMINED,
    }
    world.paused.discard("a")
    world.settle()
    assert all(len(world.writers(table)) == 1 for table in world.tables)


def test_scenario_06_a_capture_joins_and_does_not_answer() -> None:
    """Running spans continue, and moves between the other captures work."""
    world = World(tables=[1, 2, 3])
    world.settle()
    world.join("mute")
    world.paused.add("mute")
    world.advance(400)
    world.run(4)
    assert world.watermark.checkpoint_ts == 400
    query = world.scheduler.move_table(1, other(world, world.primary(1), "mute"))
    world.until(lambda: query.state is QueryState.DONE)


def test_scenario_07_agent_restarts_in_the_same_slot() -> None:
    """A new processor_epoch of the same capture is accepted, and its spans are placed again."""
    world = World(tables=range(1, 7))
    world.settle()
    world.restart_agent("a")
    world.until(lambda: all(len(world.writers(table)) == 1 for table in world.tables))
    world.settle()
    assert all(len(world.writers(table)) == 1 for table in world.tables)
    assert sorted(view.spans for view in world.snapshot.captures) == [2, 2, 2]


def test_scenario_10_no_promotion_while_another_may_be_stopping() -> None:
    """The Secondary waits for every capture that may still write, although the Primary has stopped."""
    world = World(tables=[1])
    world.settle()
    source = world.primary(1)
    world.executors[source].hang("stop")
    target = other(world, source)
    query = world.scheduler.move_table(1, target)
    world.run(10)
    assert world.view(1).stall_reason is StallReason.PRIMARY_STOPPING
    world.elect("owner2")  # the new owner finds the source Stopping: Undetermined
    world.run(10)
    assert world.view(1).stall_reason is StallReason.UNDETERMINED
    assert world.sink.fence(Span(1))[1] >> 20 == 10  # no permission of the new term
    world.executors[source].let_go("stop")
    world.settle()
    assert world.writers(1) == (world.primary(1),)
    assert query.state is QueryState.ACCEPTED


def test_scenario_11_an_orphan_is_removed_and_remembered() -> None:
    """A capture that holds a span without a role, or an unknown span, is sent a remove."""
    world = World(tables=[1])
    world.settle()
    holder = world.primary(1)
    world.alive.discard(holder)  # the owner considers it dead, but it lives
    world.until(lambda: world.view(1).primary not in (None, holder))
    world.alive.add(holder)
    world.until(lambda: Span(1) not in world.executors[holder].spans())
    world.settle()
    assert len(world.writers(1)) == 1

    world.tables = [2]  # and with a table that no longer exists
    holder = world.primary(1)
    world.alive.discard(holder)
    world.until(lambda: Span(1) not in [view.span for view in world.snapshot.spans])
    world.alive.add(holder)
    world.until(lambda: all(Span(1) not in executor.spans() for executor in world.executors.values()))
    world.settle()


@pytest.mark.parametrize("heal_order", [("a", "b"), ("b", "a")])
def test_scenario_14_two_report_replicating_after_a_partition(heal_order: tuple[str, str]) -> None:
    """Both report to write the span to a new owner: the newest permission wins, the other capture
    is sent a remove."""
    world = World(captures=["a", "b"], tables=[1])
    world.settle()
    old = world.primary(1)
    new = other(world, old)
    world.alive.discard(old)
    world.paused.add(old)
    world.until(lambda: world.writers(1) == (new,))
    world.alive.add(old)
    world.elect("owner2")
    world.paused.discard(old)
    world.agents = {capture: world.agents[capture] for capture in heal_order}
    world.settle()
    assert world.primary(1) == new
    world.until(lambda: Span(1) not in world.executors[old].spans())


def test_scenario_15_messages_of_the_former_run() -> None:
    """A restarted changefeed drops messages of its former run."""
    world = World(tables=[1])
    world.settle()
    held: list[Message] = []

    def hold(_sender: str, _receiver: str, message: Message) -> Deliver:
        held.append(message)
        return Deliver.HOLD

    world.network.hook = hold
    world.run(3)
    world.scheduler.close()
    for agent in world.agents.values():
        agent.close()
    world.changefeed_epoch += 1
    world.network.hook = lambda *_: Deliver.DELIVER
    for capture in ("a", "b", "c"):
        world.join(capture)
    world.scheduler = world.new_scheduler()
    assert held
    world.network.release()
    world.settle()
    assert len(world.writers(1)) == 1


def test_scenario_16_handover_never_goes_back() -> None:
    """The watermark never goes back over moves and crashes, without the help of the fencing sink."""
    world = World(tables=[1])
    world.settle()
    seen = []
    for turn in range(6):
        world.advance(200 + 100 * turn)
        world.run(2)
        seen.append(world.watermark.checkpoint_ts)
        if turn % 2:
            world.die(world.primary(1))
            world.join(f"new{turn}")
        else:
            world.scheduler.move_table(1, other(world, world.primary(1)))
        for _ in range(12):
            seen.append(world.step().checkpoint_ts)
        world.settle()
    assert [ts for ts in seen if ts] == sorted(ts for ts in seen if ts)


def test_scenario_21_drain_avoids_stopping_captures() -> None:
    """No span moves to a capture that is stopping or drained itself."""
    world = World(captures=["a", "b", "c", "d"], tables=range(1, 13))
    world.settle()
    world.liveness["b"].stop()
    world.run(2)
    world.scheduler.drain_capture("c")
    world.scheduler.drain_capture("a")
    world.until(lambda: all(view.primary == "d" for view in world.snapshot.spans), ticks=100)


def test_scenario_23_drain_counts_inbound_and_secondaries() -> None:
    """A move to the capture counts until it is undone."""
    world = World(tables=[1])
    world.settle()
    target = other(world, world.primary(1))
    world.executors[target].hang("prepare")
    world.executors[target].hang("stop")
    world.scheduler.move_table(1, target)
    world.run(3)
    world.scheduler.drain_capture(target)
    world.run(5)
    assert world.scheduler.drain_capture(target) == 1
    world.executors[target].let_go("stop")
    world.until(lambda: world.scheduler.drain_capture(target) == 0)
    assert world.writers(1) == (world.primary(1),)


def test_scenario_27_not_all_on_the_first_that_answers() -> None:
    """The first capture that reports does not get all spans: bootstrap waits for all known
    captures."""
    world = World(tables=range(1, 31))
    world.paused |= {"b", "c"}
    world.run(3)
    world.paused.clear()
    world.settle()
    assert sorted(view.spans for view in world.snapshot.captures) == [10, 10, 10]


def test_scenario_08_a_prepare_that_never_ends_is_undone() -> None:
    """A move that hangs in Prepare is undone at its deadline, retried, and finally refused; a drain
    chooses another target."""
    world = World(tables=[1])
    world.config = SchedulerConfig(prepare_timeout_ms=1_000)
    world.elect()
    world.settle()
    source = world.primary(1)
    hung = other(world, source)
    world.executors[hung].hang("prepare")
    query = world.scheduler.move_table(1, hung)
    world.until(lambda: query.state is QueryState.REFUSED, ticks=200)
    assert "failed to prepare table" in query.reason
    assert "3 attempts" in query.reason
    assert world.primary(1) == source
    world.scheduler.drain_capture(source)
    world.until(lambda: world.scheduler.drain_capture(source) == 0, ticks=200)
    assert world.primary(1) not in (source, hung)


def test_a_prepare_that_never_ends_is_tried_at_another_capture() -> None:
    """A new table whose capture fails to prepare it is placed at another one."""
    world = World(tables=[])
    world.config = SchedulerConfig(prepare_timeout_ms=1_000)
    world.elect()
    world.run(3)
    world.executors["a"].hang("prepare")
    world.tables = [1, 2, 3]
    world.until(lambda: {view.primary for view in world.snapshot.spans} == {"b", "c"}, ticks=100)


def test_the_mass_failure_guard_delays_placement() -> None:
    """If most captures disappear at once, running spans continue and the others wait, until
    captures are back or a time has passed."""
    world = World(captures=["a", "b", "c", "d"], tables=range(1, 9))
    world.settle()
    for capture in ("b", "c", "d"):
        world.die(capture)
    world.run(20)
    assert world.snapshot.stalls() == {StallReason.BRAKE: 6}
    assert len([view for view in world.snapshot.spans if view.primary == "a"]) == 2
    for capture in ("e", "f"):
        world.join(capture)
    world.settle()
    assert world.snapshot.stalls() == {}
    world.run(200)
    for capture in ("a", "e"):
        world.die(capture)
    world.join("g")
    world.join("h")
    world.settle()
