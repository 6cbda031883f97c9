"""The test kit: the loopback network, the fake executor and the fake sink."""

from __future__ import annotations

import numpy as np
import pytest

from tablewire import Barrier, ChangefeedID, Checkpoint, Span, Stats, TableBarrier, TableState
from tablewire.errors import CodecError, EpochRefusedError
from tablewire.executor import (
    BarrierTableExecutor,
    BulkTableExecutor,
    ClosableTableExecutor,
    FencedTableExecutor,
    TableExecutor,
)
from tablewire.model.messages import PROTOCOL_VERSION, Heartbeat, Message
from tablewire.testing import (
    Deliver,
    FakeCall,
    FakeSink,
    FakeTableExecutor,
    LoopbackNetwork,
    UnfencedFakeTableExecutor,
)

SPAN = Span(11)
OTHER = Span(12, b"a", b"b")


def message(receiver: str, number: int = 1, sender: str = "owner") -> Message:
    return Message(sender, receiver, ChangefeedID("d", "c"), 7, 1, 0, number, 0, Heartbeat(Barrier(number)))


def numbers(messages: object) -> list[int]:
    return [each.number for each in messages]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------- the network


def test_what_is_sent_is_in_the_next_recv() -> None:
    """Messages arrive once, in order, equal by value, and only at their receiver."""
    network = LoopbackNetwork()
    owner, a, b = (network.transport(node) for node in ("owner", "a", "b"))
    sent = [message("a", 1), message("a", 2)]
    owner.send(sent)
    assert list(a.recv()) == sent
    assert list(a.recv()) == list(b.recv()) == list(owner.recv()) == []


def test_messages_pass_through_the_wire_format() -> None:
    """A received message is a new value, and an invalid one is refused by send; a flag disables
    both.
    """
    network = LoopbackNetwork()
    owner, a = network.transport("owner"), network.transport("a")
    sent = message("a")
    owner.send([sent])
    assert a.recv()[0] is not sent
    bad = Message("owner", "a", ChangefeedID("d", "c"), -7, 1, 0, 1, 0, Heartbeat(Barrier(1)), PROTOCOL_VERSION)
    with pytest.raises((ValueError, CodecError)):
        owner.send([bad])
    plain = LoopbackNetwork(codec=False)
    owner, a = plain.transport("owner"), plain.transport("a")
    owner.send([sent, bad])
    assert a.recv()[0] is sent


def test_unknown_receivers_drop() -> None:
    """A message without a receiver is lost without an error."""
    network = LoopbackNetwork()
    network.transport("owner").send([message("a")])
    assert list(network.transport("a").recv()) == []


def test_a_transport_of_a_known_id_is_a_restart() -> None:
    """The inbox is new and empty, and the previous transport receives nothing."""
    network = LoopbackNetwork()
    owner, former = network.transport("owner"), network.transport("a")
    owner.send([message("a", 1)])
    new = network.transport("a")
    owner.send([message("a", 2)])
    assert numbers(new.recv()) == [2]
    assert numbers(former.recv()) == [1]
    owner.send([message("a", 3)])
    assert numbers(former.recv()) == []
    former.close()
    assert numbers(new.recv()) == [3]


def test_the_hook_decides() -> None:
    """It is called once for each message, with sender, receiver and message."""
    network = LoopbackNetwork()
    owner, a = network.transport("owner"), network.transport("a")
    seen = []
    fates = [Deliver.DELIVER, Deliver.DROP, Deliver.DUPLICATE, Deliver.HOLD]

    def hook(sender: str, receiver: str, message: Message) -> Deliver:
        seen.append((sender, receiver, message.number))
        return fates[message.number - 1]

    network.hook = hook
    owner.send([message("a", number) for number in (1, 2, 3, 4)])
    assert seen == [("owner", "a", number) for number in (1, 2, 3, 4)]
    assert numbers(a.recv()) == [1, 3, 3]
    network.release()
    assert numbers(a.recv()) == [4]
    assert len(seen) == 4


def held_order(seed: int) -> list[int]:
    network = LoopbackNetwork(seed)
    owner, a = network.transport("owner"), network.transport("a")
    network.hook = lambda sender, receiver, message: Deliver.HOLD
    owner.send([message("a", number) for number in range(1, 21)])
    assert numbers(a.recv()) == []
    network.release()
    return numbers(a.recv())


def test_what_was_held_arrives_shuffled_by_the_seed() -> None:
    """All held messages arrive, in an order that only depends on the seed."""
    assert held_order(1) == held_order(1) != held_order(2)
    assert sorted(held_order(1)) == list(range(1, 21)) != held_order(1)


def test_held_messages_reach_the_current_transport() -> None:
    """A restarted node receives held messages; a node without a transport loses them."""
    network = LoopbackNetwork()
    owner, _ = network.transport("owner"), network.transport("a")
    network.hook = lambda sender, receiver, message: Deliver.HOLD
    owner.send([message("a", 1), message("b", 2)])
    new = network.transport("a")
    network.release()
    assert numbers(new.recv()) == [1]
    assert numbers(network.transport("b").recv()) == []


def test_a_closed_transport_is_silent() -> None:
    """A closed transport neither sends nor receives, and may be closed again."""
    network = LoopbackNetwork()
    owner, a = network.transport("owner"), network.transport("a")
    a.close()
    a.close()
    owner.send([message("a")])
    a.send([message("owner", sender="a")])
    assert list(a.recv()) == list(owner.recv()) == []


# ------------------------------------------------------------------------------------------------------ the executor


def prepared(executor: UnfencedFakeTableExecutor, span: Span = SPAN, ts: int = 100) -> None:
    assert executor.add_table_span(span, Checkpoint(ts, ts), True)
    assert executor.is_add_table_span_finished(span, True)


def writing(executor: UnfencedFakeTableExecutor, span: Span = SPAN, ts: int = 100, epoch: int = 1) -> None:
    prepared(executor, span, ts)
    if isinstance(executor, FakeTableExecutor):
        executor.set_assignment_epoch(span, epoch)
    assert executor.add_table_span(span, Checkpoint(ts, ts), False)
    assert executor.is_add_table_span_finished(span, False)


def test_the_fake_offers_every_form() -> None:
    """The fake has all optional methods; the unfenced one has all but one."""
    executor: TableExecutor = FakeTableExecutor()
    for protocol in (FencedTableExecutor, BarrierTableExecutor, BulkTableExecutor, ClosableTableExecutor):
        assert isinstance(executor, protocol)
    unfenced: TableExecutor = UnfencedFakeTableExecutor()
    assert not isinstance(unfenced, FencedTableExecutor)
    assert isinstance(unfenced, BulkTableExecutor)


def test_with_no_arguments_everything_is_immediate() -> None:
    """The life of a span, call by call; an unknown span is Absent and counts as removed."""
    executor = FakeTableExecutor()
    assert executor.get_table_span_status(SPAN, False).state is TableState.ABSENT
    assert executor.get_table_span_status(SPAN, False).checkpoint == Checkpoint(0, 0)
    assert executor.is_remove_table_span_finished(SPAN) == (0, True)
    writing(executor)
    executor.advance(150)
    status = executor.get_table_span_status(SPAN, False)
    assert (status.state, status.checkpoint) == (TableState.REPLICATING, Checkpoint(150, 150, 150))
    assert executor.remove_table_span(SPAN)
    assert executor.is_remove_table_span_finished(SPAN) == (150, True)
    assert executor.is_remove_table_span_finished(SPAN) == (0, True)
    assert executor.spans() == ()


def test_every_call_is_idempotent() -> None:
    """Repeated calls change nothing."""
    executor = FakeTableExecutor()
    for _ in range(3):
        writing(executor)
    assert executor.state(SPAN) is TableState.REPLICATING
    assert executor.calls[0] == FakeCall("add_table_span", SPAN, True)
    assert executor.remove_table_span(SPAN) is executor.remove_table_span(SPAN) is True


def test_the_fake_refuses_what_the_contract_forbids() -> None:
    """A write of an unprepared span, an epoch for an unknown span and an add after close are errors
    of the caller.
    """
    executor = FakeTableExecutor()
    with pytest.raises(RuntimeError, match="without being prepared"):
        executor.add_table_span(SPAN, Checkpoint(1, 1), False)
    with pytest.raises(RuntimeError, match="not here"):
        executor.set_assignment_epoch(SPAN, 1)
    executor.close()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        executor.add_table_span(SPAN, Checkpoint(1, 1), True)


def test_progress_is_scripted() -> None:
    """advance moves all spans or one; only replicating spans write, and nothing moves backwards."""
    executor = FakeTableExecutor()
    writing(executor, SPAN)
    prepared(executor, OTHER)
    executor.advance(200)
    assert executor.get_table_span_status(OTHER, False).checkpoint == Checkpoint(100, 200)
    executor.advance(150)
    executor.advance(300, SPAN)
    assert executor.get_table_span_status(SPAN, False).checkpoint == Checkpoint(300, 300, 300)
    automatic = FakeTableExecutor(auto_advance=5)
    writing(automatic)
    assert [automatic.get_table_span_status(SPAN, False).checkpoint.checkpoint_ts for _ in range(2)] == [105, 110]
    assert automatic.get_table_span_statuses([SPAN]).checkpoint_ts.tolist() == [115]


def test_barriers_hold_writes_back() -> None:
    """The lower barrier limits existing and later spans; resolved_ts is not limited."""
    executor = FakeTableExecutor()
    writing(executor, SPAN)
    executor.set_barrier(Barrier(500, (TableBarrier(12, 200),)))
    writing(executor, OTHER)
    executor.advance(900)
    assert executor.get_table_span_status(SPAN, False).checkpoint == Checkpoint(500, 900, 500)
    assert executor.get_table_span_status(OTHER, False).checkpoint == Checkpoint(200, 900, 200)
    executor.set_barrier(Barrier(950))
    executor.advance(900)
    assert executor.get_table_span_status(OTHER, False).checkpoint.checkpoint_ts == 900


def test_failures_are_scripted() -> None:
    """A call can be made to raise once, and a span to fail until it is removed."""
    executor = FakeTableExecutor()
    executor.raise_at("add_table_span", OTHER, ValueError("once"))
    prepared(executor, SPAN)
    with pytest.raises(ValueError, match="once"):
        prepared(executor, OTHER)
    prepared(executor, OTHER)
    executor.fail(OTHER, "it broke")
    with pytest.raises(RuntimeError, match="it broke"):
        executor.get_table_span_status(OTHER, False)
    assert executor.get_table_span_statuses([SPAN, OTHER]).errors == [(1, "it broke")]
    executor.remove_table_span(OTHER)
    executor.is_remove_table_span_finished(OTHER)
    assert executor.get_table_span_status(OTHER, False).state is TableState.ABSENT
    with pytest.raises(ValueError, match="no call 'fly'"):
        executor.raise_at("fly")


def test_hangs_and_slow_steps_are_scripted() -> None:
    """A step can hang until it is let go or take several polls, and a call can be refused first."""
    executor = FakeTableExecutor(prepare_polls=2, refusals=1)
    executor.hang("stop", SPAN)
    assert [executor.add_table_span(SPAN, Checkpoint(1, 1), True) for _ in range(2)] == [False, True]
    assert [executor.is_add_table_span_finished(SPAN, True) for _ in range(3)] == [False, False, True]
    assert [executor.remove_table_span(SPAN) for _ in range(2)] == [False, True]
    assert executor.is_remove_table_span_finished(SPAN) == (1, False)
    executor.let_go("stop", SPAN)
    assert executor.is_remove_table_span_finished(SPAN) == (1, True)
    with pytest.raises(ValueError, match="'sleep'"):
        executor.hang("sleep")


def test_bulk_and_single_statuses_agree() -> None:
    """They agree for known and unknown spans, for the same list, and after spans were added and
    lost.
    """
    executor = FakeTableExecutor()
    writing(executor, SPAN)
    prepared(executor, OTHER, 70)
    spans = [OTHER, Span(99), SPAN]
    for _ in range(2):
        columns = executor.get_table_span_statuses(spans)
        single = [executor.get_table_span_status(span, False) for span in spans]
        assert columns.states.tolist() == [status.state.code for status in single]
        assert columns.checkpoint_ts.tolist() == [status.checkpoint.checkpoint_ts for status in single] == [70, 0, 100]
        assert columns.resolved_ts.dtype == columns.last_synced_ts.dtype == np.uint64
    executor.lose(OTHER)
    assert executor.get_table_span_statuses(spans).states.tolist()[0] == TableState.ABSENT.code


def test_many_spans_fit() -> None:
    """The columns grow, rows are reused, and statistics are returned on request."""
    executor = FakeTableExecutor()
    for table in range(300):
        writing(executor, Span(table))
    executor.advance(400)
    executor.lose(Span(5))
    writing(executor, Span(1_000))
    assert executor.state(Span(299)) is TableState.REPLICATING
    assert executor.get_table_span_status(Span(1_000), False).checkpoint == Checkpoint(100, 100)
    executor.set_stats(SPAN, Stats(4.0))
    assert executor.get_table_span_status(SPAN, True).stats == Stats(4.0)
    assert executor.get_table_span_status(SPAN, False).stats is None


# ---------------------------------------------------------------------------------------------------------- the sink


def test_a_takeover_excludes_the_previous_writer() -> None:
    """There is one effective writer at any time; the next write of the previous one is refused and
    fails its span.
    """
    sink = FakeSink()
    former, new = FakeTableExecutor(sink, name="former"), FakeTableExecutor(sink, name="new")
    writing(former, ts=100, epoch=1)
    former.advance(180)
    assert sink.writers(SPAN) == ("former",)
    writing(new, ts=100, epoch=2)
    assert sink.writers(SPAN) == ("new",)
    assert new.get_table_span_status(SPAN, False).checkpoint.checkpoint_ts == 180
    former.advance(999)
    with pytest.raises(EpochRefusedError):
        former.get_table_span_status(SPAN, False)
    assert (sink.position(SPAN), sink.max_writers, list(sink.violations)) == (180, 1, [])
    assert sink.refused_writes[SPAN] == 1


def test_an_older_pair_is_refused_at_the_takeover() -> None:
    """The changefeed_epoch is compared before the assignment_epoch."""
    sink = FakeSink()
    writing(FakeTableExecutor(sink, name="new", changefeed_epoch=2), epoch=1)
    late = FakeTableExecutor(sink, name="late", changefeed_epoch=1)
    prepared(late)
    late.set_assignment_epoch(SPAN, 99)
    with pytest.raises(EpochRefusedError, match=r"\(2, 1\)"):
        late.add_table_span(SPAN, Checkpoint(100, 100), False)
    assert sink.fence(SPAN) == (2, 1)


def test_a_span_keeps_writing_with_a_raised_epoch() -> None:
    """set_assignment_epoch of a writing span takes the span over again."""
    sink = FakeSink()
    executor = FakeTableExecutor(sink, name="mine")
    writing(executor, epoch=3)
    executor.set_assignment_epoch(SPAN, 4)
    executor.advance(300)
    assert (sink.fence(SPAN), sink.writers(SPAN), sink.position(SPAN)) == ((0, 4), ("mine",), 300)


def test_two_writers_are_violations() -> None:
    """Two unfenced writers, and two with the same fence, are violations."""
    sink = FakeSink()
    writing(UnfencedFakeTableExecutor(sink, name="a"))
    writing(UnfencedFakeTableExecutor(sink, name="b"))
    assert (sink.writers(SPAN), sink.max_writers, len(sink.violations)) == (("a", "b"), 2, 1)
    twice = FakeSink()
    writing(FakeTableExecutor(twice, name="a"), epoch=5)
    writing(FakeTableExecutor(twice, name="b"), epoch=5)
    assert twice.max_writers == 2


def test_a_writer_that_has_stopped_is_none() -> None:
    """An executor remains a writer until it has reported that the span stopped."""
    sink = FakeSink()
    executor = FakeTableExecutor(sink, name="mine", stop_polls=1)
    writing(executor)
    executor.remove_table_span(SPAN)
    assert executor.is_remove_table_span_finished(SPAN)[1] is False
    assert sink.writers(SPAN) == ("mine",)
    assert executor.is_remove_table_span_finished(SPAN)[1] is True
    assert sink.writers(SPAN) == ()
