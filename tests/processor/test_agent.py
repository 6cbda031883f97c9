"""What an agent accepts and what it reports: one owner, one agent, message by message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from processor import AgentConfig
from tablewire import Barrier, ChangefeedID, Checkpoint, LivenessState, Span, Stats, TableBarrier, TableState
from tablewire.errors import ClosedError, ConfigError
from tablewire.model.messages import DispatchTableResponse, Heartbeat, HeartbeatResponse, Message, span_checksum
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction
from tablewire.testing import Deliver, FakeSink, FakeTableExecutor, UnfencedFakeTableExecutor

SPAN = Span(11)
OTHER = Span(12, b"\x01", b"\x02")

# ------------------------------------------------------------------------------------------------------ heartbeats


def test_a_heartbeat_is_answered_once(world: Any) -> None:
    """One HeartbeatResponse, with what an owner needs, echoing the heartbeat; the barrier comes back from tick."""
    world.owner.heartbeat(barrier=77)
    assert world.step() == Barrier(77)
    (message,) = world.owner.messages
    assert isinstance(message.body, HeartbeatResponse)
    assert (message.sender, message.receiver, message.echo, message.number) == ("a", "owner", 2, 2)
    assert message.processor_epoch == world.agent.processor_epoch > 0
    assert (message.body.liveness, message.body.fenced, message.body.held) == (LivenessState.ALIVE, True, 0)


def test_several_heartbeats_are_answered_together(world: Any) -> None:
    """One answer echoes them all, and the last barrier is the one that counts."""
    world.owner.heartbeat(barrier=5)
    world.owner.heartbeat(barrier=6)
    assert world.step() == Barrier(6)
    assert [message.echo for message in world.owner.messages] == [3]


def test_nothing_is_said_to_nobody(make_world: Any) -> None:
    """Before an owner has called there is no receiver."""
    world = make_world(meet=False)
    assert world.step() is None
    assert world.owner.messages == []


def test_nothing_is_said_when_nothing_happened(world: Any) -> None:
    """A tick without a message and without a change is silent, any number of times at one clock reading."""
    world.replicate(SPAN)
    for _ in range(3):
        assert world.step() is None
        assert world.owner.messages == []


def test_liveness_is_told(world: Any) -> None:
    """A stopping process reports it in its next response."""
    world.liveness.stop()
    world.beat()
    assert world.owner.response.liveness is LivenessState.STOPPING


def test_an_executor_without_epochs_is_unfenced(make_world: Any) -> None:
    """The owner has to know that it may not trust the sink."""
    world = make_world(UnfencedFakeTableExecutor())
    assert world.owner.response.fenced is False
    world.replicate(SPAN)
    assert world.state(SPAN) is TableState.REPLICATING


def test_every_barrier_reaches_the_executor(world: Any) -> None:
    """The executor holds tables back by it; the agent does not."""
    barrier = Barrier(900, (TableBarrier(11, 300),))
    world.owner.send(Heartbeat(barrier))
    assert world.step() == barrier
    assert world.fake.barrier == barrier
    world.replicate(SPAN)
    world.owner.send(Heartbeat(barrier))
    world.step()
    world.fake.advance(1_000)
    world.owner.send(Heartbeat(barrier, acked=world.owner.acked))
    world.step()
    assert world.owner.known[SPAN].checkpoint_ts == 300


def test_what_is_held_is_summed_up(world: Any) -> None:
    """held and checksum cover every span that is not Absent, by its number and state."""
    world.replicate(SPAN, OTHER)
    states = np.array([TableState.REPLICATING.code] * 2, np.uint8)
    assert world.owner.response.held == 2
    assert world.owner.response.checksum == span_checksum(np.array([1, 2], np.uint32), states)


def test_only_what_moved_is_told(world: Any) -> None:
    """A heartbeat costs what has changed."""
    world.replicate(SPAN, OTHER)
    world.beat()
    world.fake.advance(200, SPAN)
    world.beat()
    assert [len(report) for _, report in world.owner.applied[-1:]] == [1]
    assert world.owner.known[SPAN].checkpoint_ts == 200
    assert world.owner.known[OTHER].checkpoint_ts == 100
    world.beat()
    assert len(world.owner.response.reports) == 0


# ------------------------------------------------------------------------------------------------- which owner is obeyed


@pytest.mark.parametrize(
    "envelope",
    [
        {"changefeed": ChangefeedID("default", "other")},
        {"changefeed_epoch": 2},
        {"changefeed_epoch": 4},
        {"owner_revision": 6},
        {"body": DispatchTableResponse},
    ],
    ids=str,
)
def test_scenario_15_messages_for_others_are_dropped(world: Any, envelope: dict[str, Any]) -> None:
    """Another changefeed, another run of it, a deposed owner, the wrong direction: as if nothing had come."""
    world.replicate(SPAN)
    envelope = dict(envelope)
    body = envelope.pop("body", None)
    request = world.owner.request(DispatchAction.REMOVE, [SPAN])
    world.owner.send(DispatchTableResponse(world.owner.applied[-1][1]) if body else request, **envelope)
    assert world.step() is None
    assert world.owner.messages == []
    assert world.fake.state(SPAN) is TableState.REPLICATING


def test_another_receiver_and_another_version_are_dropped(make_world: Any) -> None:
    """Even if the network brings them here."""
    world = make_world()
    inbox: list[Message] = []
    world.agent.transport.recv = lambda: [inbox.pop()] if inbox else []
    good = Message("owner", "a", ChangefeedID("default", "orders"), 7, 3, 0, 9, 0, Heartbeat(Barrier(1)))
    for bad in (replace(good, receiver="b"), replace(good, version=2)):
        inbox.append(bad)
        assert world.step() is None
    inbox.append(good)
    assert world.step() == Barrier(1)


def test_each_number_is_taken_once(world: Any) -> None:
    """Doubled messages are dropped."""
    world.network.hook = lambda sender, receiver, message: Deliver.DUPLICATE
    world.owner.prepare(SPAN)
    world.owner.heartbeat()
    world.step()
    world.network.hook = lambda sender, receiver, message: Deliver.DELIVER
    assert world.calls("add_table_span") == [SPAN]
    assert world.owner.messages[0].echo == 3


def test_a_late_message_is_dropped(world: Any) -> None:
    """n that is not larger than the last one comes too late."""
    world.replicate(SPAN)
    late = world.owner.request(DispatchAction.REMOVE, [SPAN])
    world.owner.send(late, number=2)
    assert world.step() is None
    assert world.fake.state(SPAN) is TableState.REPLICATING


def test_what_comes_together_is_put_into_its_order(world: Any) -> None:
    """Messages that only changed places on their way are all taken in."""
    held = []
    world.network.hook = lambda sender, receiver, message: held.append(message) or Deliver.HOLD
    world.owner.prepare(SPAN)
    world.owner.write(SPAN)
    world.owner.remove(SPAN)
    world.network.hook = lambda sender, receiver, message: Deliver.DELIVER
    world.network.release()
    world.step()
    assert world.owner.messages[0].echo == 4
    assert world.state(SPAN) is TableState.STOPPED


def test_dispatches_are_for_this_agent_alone(world: Any) -> None:
    """A dispatch that was written for a former agent is dropped, and does not count as taken in."""
    world.owner.send(world.owner.request(DispatchAction.ADD_PREPARE, [SPAN], 100), processor_epoch=12345)
    assert world.step() is None
    world.owner.send(world.owner.request(DispatchAction.ADD_PREPARE, [SPAN], 100), processor_epoch=0)
    assert world.step() is None
    assert world.fake.spans() == ()
    world.beat()
    assert world.owner.messages[0].echo == 4


def test_scenario_07_a_restarted_agent_is_heard(world: Any) -> None:
    """A new agent in the slot of a former one has a new epoch, holds nothing, reports that, and gets work again."""
    world.replicate(SPAN)
    former = world.agent.processor_epoch
    world.agent.close()
    world.start_agent(FakeTableExecutor())
    world.owner.remove(SPAN)  # for the former agent
    world.step()
    world.beat()
    assert world.owner.processor_epoch == world.agent.processor_epoch != former
    assert world.owner.known == {}
    world.replicate(SPAN, epoch=2)
    assert world.state(SPAN) is TableState.REPLICATING


def test_an_acknowledgement_of_a_former_agents_report_is_not_believed(world: Any) -> None:
    """The new agent's reports start at 1 again; acknowledgements of the former one's do not shorten them."""
    world.replicate(SPAN)
    world.beat()
    world.agent.close()
    world.start_agent(FakeTableExecutor())
    former = world.owner.processor_epoch
    assert world.owner.acked > 3
    world.owner.heartbeat()
    world.agent.tick()
    world.owner.transport.recv()  # lost
    world.owner.heartbeat()
    world.step()
    assert world.owner.messages[0].body.reports.base == 0
    assert world.owner.processor_epoch != former


def test_a_new_owner_gets_the_whole_truth_by_name(world: Any, make_owner: Any) -> None:
    """A larger revision is adopted; numbers, acknowledgements and n of the former one are void, and so is the former one."""
    world.replicate(SPAN, OTHER, epoch=5)
    world.beat()
    new = make_owner(world.network, revision=9, node_id="owner-2")
    new.heartbeat()
    world.agent.tick()
    new.take()
    (message,) = new.messages
    assert (message.receiver, message.owner_revision, message.echo, message.number) == ("owner-2", 9, 1, 1)
    assert not message.body.reports.numbers.any()
    assert {span: (known.state, known.epoch) for span, known in new.known.items()} == {
        SPAN: (TableState.REPLICATING, 5),
        OTHER: (TableState.REPLICATING, 5),
    }
    world.owner.remove(SPAN)
    assert world.agent.tick() is None
    assert world.fake.state(SPAN) is TableState.REPLICATING


def test_numbers_are_introduced_by_a_heartbeat(world: Any, make_owner: Any) -> None:
    """A new owner gives numbers to spans that were reported by name; from then on the agent reports the numbers."""
    world.replicate(SPAN, OTHER)
    new = make_owner(world.network, revision=9, node_id="owner-2")
    new.heartbeat()
    world.agent.tick()
    new.take()
    spans = [OTHER, SPAN, Span(99)]
    numbers = np.array([new.number_of(span) for span in spans], np.uint32)
    new.heartbeat(numbers=numbers, spans=SpanBlock.of(spans))
    world.fake.advance(300)
    world.agent.tick()
    new.take()
    reports = new.messages[0].body.reports
    assert sorted(reports.numbers.tolist()) == [1, 2]
    assert len(reports.spans) == 0
    assert new.known[OTHER].checkpoint_ts == 300


def test_an_owner_may_ask_for_names_again(world: Any) -> None:
    """by_name: everything is reported by name on base 0, whatever was acknowledged."""
    world.replicate(SPAN, OTHER)
    world.beat()
    world.owner.heartbeat(by_name=True)
    world.step()
    reports = world.owner.messages[0].body.reports
    assert (reports.base, reports.numbers.tolist(), list(reports.spans)) == (0, [0, 0], [SPAN, OTHER])


def test_an_owner_may_ask_for_everything_again(world: Any) -> None:
    """acked 0: the whole truth, by the numbers that are known."""
    world.replicate(SPAN, OTHER)
    world.beat()
    world.owner.heartbeat(acked=0)
    world.step()
    reports = world.owner.messages[0].body.reports
    assert (reports.base, reports.numbers.tolist()) == (0, [1, 2])


# -------------------------------------------------------------------------------------------------- one table's life


def test_a_dispatch_is_answered_without_a_heartbeat(world: Any) -> None:
    """Both phases, each with its own answer, and the epoch set right before the second."""
    world.owner.prepare(SPAN, ts=100)
    assert world.step() is None
    assert isinstance(world.owner.messages[0].body, DispatchTableResponse)
    assert world.state(SPAN) is TableState.PREPARED
    world.owner.write(SPAN, ts=120, epoch=9)
    world.step()
    assert (world.state(SPAN), world.owner.known[SPAN].checkpoint_ts, world.owner.known[SPAN].epoch) == (
        TableState.REPLICATING,
        120,
        9,
    )
    names = [call.name for call in world.fake.calls]
    assert names[:5] == [
        "add_table_span",
        "is_add_table_span_finished",
        "set_assignment_epoch",
        "add_table_span",
        "is_add_table_span_finished",
    ]
    assert world.fake.assignment_epoch(SPAN) == 9


def test_slow_steps_are_asked_again_and_told_once(make_world: Any) -> None:
    """A call is repeated until it is taken and finished; in between nothing is reported."""
    world = make_world(FakeTableExecutor(prepare_polls=2, write_polls=2, stop_polls=2, refusals=2))
    world.owner.prepare(SPAN)
    told = []
    for _ in range(8):
        world.step()
        assert world.agent.is_settled is (world.state(SPAN) is TableState.PREPARED)
        told += [world.state(SPAN) for _ in world.owner.messages]
    assert told == [TableState.PREPARING, TableState.PREPARED]
    world.owner.write(SPAN)
    for _ in range(8):
        world.step()
    assert world.state(SPAN) is TableState.REPLICATING
    world.owner.remove(SPAN)
    for _ in range(8):
        world.step()
    assert world.state(SPAN) is TableState.STOPPED
    assert world.agent.is_settled
    assert world.calls("remove_table_span") == [SPAN] * 3


def test_adds_of_a_span_that_is_here_only_report(world: Any) -> None:
    """AddTable(prepare) of a Preparing, Prepared or Replicating span changes nothing and is answered."""
    world.fake.hang("prepare")
    for expected in (TableState.PREPARING, TableState.PREPARED, TableState.REPLICATING):
        world.owner.prepare(SPAN, ts=700)
        world.step()
        assert world.owner.messages[0].echo == world.owner.sent
        world.owner.prepare(SPAN, ts=800)
        world.step()
        assert world.owner.messages[0].echo == world.owner.sent
        assert world.state(SPAN) is expected
        if expected is TableState.PREPARING:
            world.fake.let_go("prepare")
            world.step()
        elif expected is TableState.PREPARED:
            world.owner.write(SPAN, ts=700)
            world.step()
    assert world.owner.known[SPAN].checkpoint_ts == 700


def test_writing_never_starts_from_absent(world: Any) -> None:
    """AddTable(write) of a span that is not here is refused: Absent is reported."""
    world.owner.write(SPAN)
    world.step()
    (message,) = world.owner.messages
    reports = message.body.reports
    assert (message.echo, reports.numbers.tolist(), reports.states.tolist()) == (2, [1], [TableState.ABSENT.code])
    assert world.fake.calls == type(world.fake.calls)()


def test_a_removal_of_what_is_not_here_is_answered(world: Any) -> None:
    """Absent, with a number that counts."""
    world.owner.remove(SPAN)
    world.step()
    assert world.owner.messages[0].body.reports.states.tolist() == [TableState.ABSENT.code]
    world.beat()
    world.beat()
    assert world.agent.spans() == []
    assert world.agent._table.row_of(SPAN) is None


def test_a_grant_waits_for_prepared(world: Any) -> None:
    """AddTable(write) of a Preparing span is kept; the newest of two is used."""
    world.fake.hang("prepare")
    world.owner.prepare(SPAN)
    world.owner.write(SPAN, ts=150, epoch=8)
    world.owner.write(SPAN, ts=140, epoch=7)
    world.step()
    assert (world.state(SPAN), world.agent.is_settled) == (TableState.PREPARING, False)
    world.fake.let_go("prepare")
    world.step()
    assert (world.state(SPAN), world.fake.assignment_epoch(SPAN)) == (TableState.REPLICATING, 8)
    assert world.owner.known[SPAN].checkpoint_ts == 150


def test_a_removal_takes_the_place_of_a_pending_add(world: Any) -> None:
    """The grant that was kept never comes back, not even when the preparation ends after all."""
    world.fake.hang("prepare")
    world.fake.hang("stop")
    world.owner.prepare(SPAN)
    world.owner.write(SPAN)
    world.step()
    world.owner.remove(SPAN)
    world.step()
    assert world.state(SPAN) is TableState.STOPPING
    world.fake.let_go("prepare")
    world.step()
    world.fake.let_go("stop")
    world.step()
    assert world.state(SPAN) is TableState.STOPPED
    assert "set_assignment_epoch" not in {call.name for call in world.fake.calls}


def test_a_removal_that_was_taken_in_reads_stopping(world: Any) -> None:
    """As long as the executor has not finished, the checkpoint and the epoch stay with it."""
    world.replicate(SPAN, epoch=4)
    world.fake.hang("stop")
    world.owner.remove(SPAN)
    world.step()
    assert (world.state(SPAN), world.owner.known[SPAN].epoch) == (TableState.STOPPING, 4)
    world.fake.let_go("stop")
    world.step()
    assert (world.state(SPAN), world.owner.known[SPAN].epoch) == (TableState.STOPPED, 4)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_an_add_on_the_way_out_is_dropped_and_answered(world: Any, is_stopped: bool) -> None:
    """Add, prepare or write, of a Stopping or Stopped span: the state is reported again, and nothing starts."""
    world.replicate(SPAN)
    world.fake.hang("stop")
    world.owner.remove(SPAN)
    world.step()
    if is_stopped:
        world.fake.let_go("stop")
        world.step()
    expected = TableState.STOPPED if is_stopped else TableState.STOPPING
    before = len(world.calls("add_table_span"))
    world.owner.prepare(SPAN)
    world.step()
    assert (world.owner.messages[0].echo, world.state(SPAN)) == (world.owner.sent, expected)
    world.owner.write(SPAN, epoch=2)
    world.step()
    assert (world.owner.messages[0].echo, world.state(SPAN)) == (world.owner.sent, expected)
    assert len(world.calls("add_table_span")) == before


def test_stopped_is_told_until_it_was_heard_then_absent(world: Any) -> None:
    """Stopped, with its last checkpoint, until the acknowledgement; then Absent once; then nothing is left of the span."""
    world.replicate(SPAN, ts=100)
    world.fake.advance(180)
    world.owner.remove(SPAN)
    world.network.hook = lambda sender, receiver, message: Deliver.DROP if receiver == "owner" else Deliver.DELIVER
    world.step()  # lost
    world.network.hook = lambda sender, receiver, message: Deliver.DELIVER
    world.beat()
    assert (world.state(SPAN), world.owner.known[SPAN].checkpoint_ts) == (TableState.STOPPED, 180)
    world.beat()
    assert world.owner.messages[0].body.reports.states.tolist() == [TableState.ABSENT.code]
    assert world.owner.response.held == 0
    world.beat()
    assert len(world.owner.messages[0].body.reports) == 0
    assert world.agent._table.row_of(SPAN) is None


def test_an_add_that_acknowledges_stopped_is_taken(world: Any) -> None:
    """The owner has acknowledged Stopped and adds the span again at once: no heartbeat has to come in between."""
    world.replicate(SPAN, epoch=1)
    world.owner.remove(SPAN)
    world.step()
    assert world.state(SPAN) is TableState.STOPPED
    world.owner.prepare(SPAN, ts=150, acked=world.owner.acked)
    world.step()
    assert (world.state(SPAN), world.owner.known[SPAN].checkpoint_ts, world.owner.known[SPAN].epoch) == (
        TableState.PREPARED,
        150,
        0,
    )


def test_adds_that_cross_the_acknowledgement_do_not_starve(world: Any) -> None:
    """An owner that asks with every message, and acknowledges one message too late each time, still gets its span."""
    world.replicate(SPAN)
    world.owner.remove(SPAN)
    world.step()
    for _ in range(3):
        acked = world.owner.acked
        world.owner.prepare(SPAN, ts=150)  # restated with a newer m each time
        world.step()
        world.owner.heartbeat(acked=acked)
        world.step()
    assert world.state(SPAN) is TableState.PREPARED


def test_a_newer_epoch_is_raised_at_the_sink_an_older_one_ignored(world: Any) -> None:
    """AddTable(write) of a span that writes: only a newer permission changes anything; all are answered."""
    world.replicate(SPAN, epoch=5)
    for epoch, expected in ((5, 5), (4, 5), (6, 6)):
        world.owner.write(SPAN, epoch=epoch)
        world.step()
        assert world.owner.messages[0].echo == world.owner.sent
        assert (world.fake.assignment_epoch(SPAN), world.owner.known[SPAN].epoch) == (expected, expected)
    assert world.state(SPAN) is TableState.REPLICATING
    assert world.calls("set_assignment_epoch") == [SPAN] * 2


def test_a_newer_epoch_replaces_one_that_was_not_taken_yet(make_world: Any) -> None:
    """The executor is still being asked to start: it is asked with the newest permission, never with an older one."""
    world = make_world(FakeTableExecutor(refusals=2))
    world.owner.prepare(SPAN)
    for _ in range(4):
        world.step()
    world.owner.write(SPAN, ts=110, epoch=5)
    world.step()
    world.owner.write(SPAN, ts=130, epoch=7)
    world.owner.write(SPAN, ts=120, epoch=6)
    for _ in range(4):
        world.step()
    known = world.owner.known[SPAN]
    assert (known.state, known.epoch, known.checkpoint_ts) == (TableState.REPLICATING, 7, 130)


def test_scenario_16_a_grant_before_the_prepared_point_is_not_written(world: Any) -> None:
    """Rows between the grant and the point from which it was prepared were not received: stop, and be prepared again."""
    world.owner.prepare(SPAN, ts=200)
    world.step()
    world.owner.write(SPAN, ts=150)
    world.step()
    assert (world.state(SPAN), world.owner.known[SPAN].error) == (TableState.STOPPED, "")
    assert [call for call in world.fake.calls if call.is_prepare is False] == []


def test_a_grant_before_the_prepared_point_is_fine_where_the_sink_is_further(world: Any) -> None:
    """The sink has the rows in between already."""
    world.owner.prepare(SPAN, ts=200)
    world.step()
    world.fake._ts[1:, 0] = 250  # what the executor read from its sink
    world.owner.write(SPAN, ts=150)
    world.step()
    world.beat()
    assert (world.state(SPAN), world.owner.known[SPAN].checkpoint_ts) == (TableState.REPLICATING, 250)


def test_scenario_12_a_writer_whose_epoch_is_refused_stops(make_world: Any) -> None:
    """Another writer has taken over at the sink: the table is stopped and reported so; nothing was written twice."""
    sink = FakeSink()
    world = make_world(FakeTableExecutor(sink, name="mine"))
    world.replicate(SPAN, epoch=5)
    sink.take_over(SPAN, "theirs", (0, 6), 100)
    assert sink.writers(SPAN) == ("theirs",)
    world.fake.advance(500)
    world.beat()
    assert world.state(SPAN) is TableState.STOPPED
    assert world.owner.known[SPAN].error.startswith("the sink refuses the epoch")
    assert (sink.max_writers, sink.position(SPAN), sink.refused_writes[SPAN]) == (1, 100, 1)


def test_a_grant_that_is_too_old_for_the_sink_never_writes(make_world: Any) -> None:
    """The sink refuses the takeover itself."""
    sink = FakeSink()
    sink.take_over(SPAN, "theirs", (0, 9), 100)
    world = make_world(FakeTableExecutor(sink, name="mine"))
    world.owner.prepare(SPAN)
    world.owner.write(SPAN, epoch=5)
    world.step()
    assert world.state(SPAN) is TableState.STOPPED
    assert sink.writers(SPAN) == ("theirs",)


def test_takeover_starts_from_the_sinks_position(make_world: Any) -> None:
    """max(granted, position): the rows that the former writer got through are not written again."""
    sink = FakeSink()
    sink.take_over(SPAN, "former", (0, 1), 100)
    sink.write(SPAN, "former", 170)
    world = make_world(FakeTableExecutor(sink, name="mine"))
    world.replicate(SPAN, ts=100, epoch=2)
    assert world.owner.known[SPAN].checkpoint_ts == 170


# ------------------------------------------------------------------------------------------------------ statistics


def test_statistics_come_at_their_interval(make_world: Any) -> None:
    """Collected about every stats_interval_ms, reported once, and again only when they differ."""
    world = make_world(config=AgentConfig(stats_interval_ms=1_000))
    world.replicate(SPAN, OTHER)
    world.fake.set_stats(OTHER, Stats(20.0, 300.0, {"puller": Checkpoint(5, 7), "snapshot": Checkpoint(1, 1)}))
    world.beat()
    assert len(world.owner.response.reports.stats.rows) == 0
    world.now = 1.5
    world.beat()
    reports = world.owner.response.reports
    assert [reports.numbers[row] for row in reports.stats.rows] == [world.owner.numbers[OTHER]]
    assert (reports.stats.rows_per_s[0], reports.stats.bytes_per_s[0]) == (20.0, 300.0)
    assert (reports.stats.puller_resolved_ts[0], reports.stats.in_snapshot[0]) == (7, 1)
    world.now = 3.0
    world.beat()
    assert len(world.owner.response.reports.stats.rows) == 0
    assert len(world.owner.response.reports) == 0


def test_statistics_come_when_asked_for(world: Any) -> None:
    """collect_stats of a heartbeat, whatever the interval; what was lost is reported again."""
    world.replicate(SPAN)
    world.fake.set_stats(SPAN, Stats(20.0))
    world.network.hook = lambda sender, receiver, message: Deliver.DROP if receiver == "owner" else Deliver.DELIVER
    world.owner.heartbeat(collect_stats=True)
    world.step()
    world.network.hook = lambda sender, receiver, message: Deliver.DELIVER
    world.beat()
    assert world.owner.response.reports.stats.rows_per_s.tolist() == [20.0]


def test_statistics_are_collected_in_bounded_portions(make_world: Any) -> None:
    """A tick asks for the statistics of at most max_stats_per_tick spans; the others follow."""
    world = make_world(config=AgentConfig(max_stats_per_tick=2))
    spans = [Span(table_id) for table_id in range(1, 6)]
    world.replicate(*spans)
    for span in spans:
        world.fake.set_stats(span, Stats(1.0))
    told = []
    for _ in range(3):
        world.owner.heartbeat(collect_stats=True)
        world.step()
        told.append(len(world.owner.response.reports.stats.rows))
    assert told == [2, 2, 1]


# ----------------------------------------------------------------------------------------------------- the service's


def test_what_the_service_asks(world: Any) -> None:
    """Counts by state, statuses by span, and whether anything is under way."""
    world.replicate(SPAN)
    world.fake.hang("prepare")
    world.owner.prepare(OTHER, ts=100)
    world.step()
    assert world.agent.counts()[TableState.REPLICATING] == 1
    assert world.agent.counts()[TableState.PREPARING] == 1
    assert [(status.span, status.state) for status in world.agent.spans()] == [
        (SPAN, TableState.REPLICATING),
        (OTHER, TableState.PREPARING),
    ]
    assert not world.agent.is_settled
    world.fake.let_go("prepare")
    world.step()
    assert world.agent.is_settled


def test_close_is_idempotent_and_final(world: Any) -> None:
    """Everything is stopped; a tick afterwards is a mistake of the caller."""
    world.replicate(SPAN)
    world.agent.close()
    world.agent.close()
    assert world.fake.is_closed
    assert world.fake.spans() == ()
    with pytest.raises(ClosedError):
        world.agent.tick()


@pytest.mark.parametrize("field", ["stats_interval_ms", "max_reports_per_message"])
def test_a_config_that_cannot_work_is_refused(field: str) -> None:
    """One clear line that names the key."""
    with pytest.raises(ConfigError, match=rf"AgentConfig\.{field}: 0"):
        AgentConfig(**{field: 0})
