"""Reports under loss, doubling, holding and reordering, whole and in chunks: what the owner has applied is what was true at m."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from processor import AgentConfig
from processor.core.reports import make_reports
from tablewire import Span, TableState
from tablewire.model.messages import DispatchTableResponse, HeartbeatResponse, Message, SpanReports
from tablewire.testing import Deliver, FakeTableExecutor

SPANS = [Span(table_id) for table_id in range(1, 9)] + [Span(9, b"a", b"m"), Span(9, b"m", b"")]


def lose_reports(sender: str, receiver: str, message: Message) -> Deliver:
    return Deliver.DROP if receiver == "owner" else Deliver.DELIVER


def deliver(sender: str, receiver: str, message: Message) -> Deliver:
    return Deliver.DELIVER


def test_a_lost_report_is_told_again(world: Any) -> None:
    """The base stays where it was, and the next report holds the change again."""
    world.replicate(*SPANS)
    world.beat()
    world.network.hook = lose_reports
    world.fake.advance(300, SPANS[2])
    world.beat()
    world.network.hook = deliver
    world.fake.advance(400, SPANS[5])
    world.beat()
    assert sorted(world.owner.response.reports.checkpoint_ts.tolist()) == [300, 400]


def test_nothing_is_told_twice_once_it_was_heard(world: Any) -> None:
    """Acknowledged rows are not repeated, whatever else changes."""
    world.replicate(*SPANS)
    world.beat()
    assert len(world.owner.response.reports) == 0
    world.fake.advance(300, SPANS[0])
    world.beat()
    assert len(world.owner.response.reports) == 1


def test_a_large_report_goes_out_in_chunks(make_world: Any) -> None:
    """Each chunk is a message with its own number; only the last one completes the report, and is the HeartbeatResponse."""
    world = make_world(config=AgentConfig(max_reports_per_message=4))
    world.owner.prepare(*SPANS)
    world.owner.heartbeat()
    world.step()
    bodies = [message.body for message in world.owner.messages]
    assert [type(body) for body in bodies] == [DispatchTableResponse, DispatchTableResponse, HeartbeatResponse]
    reports = [body.reports for body in bodies]
    numbers = [message.number for message in world.owner.messages]
    assert [len(report) for report in reports] == [4, 4, 2]
    assert [report.base for report in reports] == [1, numbers[0], numbers[1]]
    assert [report.more for report in reports] == [True, True, False]
    assert {world.state(span) for span in SPANS} == {TableState.PREPARED}
    assert [message.echo for message in world.owner.messages] == [3, 3, 3]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_chunk_loses_nothing(make_world: Any, lost: int) -> None:
    """Whichever chunk is lost, the next report contains its spans again."""
    world = make_world(config=AgentConfig(max_reports_per_message=4))
    sent = 0

    def lose_one(sender: str, receiver: str, message: Message) -> Deliver:
        nonlocal sent
        sent += receiver == "owner"
        return Deliver.DROP if receiver == "owner" and sent == lost + 1 else Deliver.DELIVER

    world.network.hook = lose_one
    world.owner.prepare(*SPANS)
    world.step()
    assert world.owner.known == {}
    world.beat()
    assert {world.state(span) for span in SPANS} == {TableState.PREPARED}


def test_an_owner_that_acknowledges_chunk_by_chunk_loses_nothing(make_world: Any) -> None:
    """Applying chunks one by one in the order of their bases is allowed, too: what a later chunk holds is not acknowledged."""
    world = make_world(config=AgentConfig(max_reports_per_message=4))
    world.owner.prepare(*SPANS)
    world.agent.tick()
    first, _, _ = world.owner.transport.recv()
    world.owner.heartbeat(acked=first.number)
    world.agent.tick()
    told = sum(len(message.body.reports) for message in world.owner.transport.recv())
    assert told == len(SPANS) - 4


def test_what_a_later_chunk_repeats_is_not_heard_with_an_earlier_one(make_world: Any) -> None:
    """A row that was in a lost report and again in a later chunk counts as reported in that chunk, not before."""
    world = make_world(config=AgentConfig(max_reports_per_message=2))
    world.owner.prepare(*SPANS[:4])
    world.agent.tick()
    world.owner.transport.recv()  # both chunks are lost
    world.owner.heartbeat()
    world.agent.tick()
    first, second = world.owner.transport.recv()
    world.owner.heartbeat(acked=first.number)  # the second one is lost
    world.agent.tick()
    (again,) = world.owner.transport.recv()
    assert again.body.reports.numbers.tolist() == second.body.reports.numbers.tolist() == [3, 4]


def test_chunks_are_bounded_in_bytes_too(make_world: Any) -> None:
    """Long keys make small chunks; a row that is larger than the bound goes alone."""
    world = make_world(config=AgentConfig(max_report_bytes=700))
    spans = [Span(1, bytes([n]) * 300, bytes([n + 1]) * 300) for n in range(1, 6)]
    world.owner.prepare(*spans, Span(2), Span(3))
    world.step()
    world.owner.heartbeat(by_name=True)
    world.step()
    assert [len(message.body.reports) for message in world.owner.messages] == [1, 1, 1, 1, 1, 2]
    assert {world.state(span) for span in (*spans, Span(2), Span(3))} == {TableState.PREPARED}


def test_errors_and_statistics_keep_their_place_in_chunks(make_world: Any) -> None:
    """Positions count within the chunk, and are ascending."""
    world = make_world(config=AgentConfig(max_reports_per_message=3))
    world.fake.raise_at("add_table_span", SPANS[4], ValueError("fourth"))
    world.fake.raise_at("add_table_span", SPANS[5], ValueError("fifth"))
    world.owner.prepare(*SPANS)
    world.step()
    assert [message.body.reports.errors for message in world.owner.messages] == [
        (),
        ((1, "ValueError: fourth"), (2, "ValueError: fifth")),
        (),
        (),
    ]
    assert world.owner.known[SPANS[5]].error == "ValueError: fifth"


def test_an_empty_report_is_one_message(world: Any) -> None:
    """No news is one empty report."""
    (report,) = make_reports(world.agent._table, base=1, number=2, max_rows=4, max_bytes=100)
    assert (len(report), report.base, report.more) == (0, 1, False)


# ------------------------------------------------------------------------------------------------ a storm of messages


@dataclass(frozen=True)
class Truth:
    """What an agent held when it sent report m."""

    states: dict[Span, tuple[TableState, int, int]]


def truth_of(agent: Any) -> Truth:
    return Truth(
        {status.span: (status.state, status.checkpoint.checkpoint_ts, status.checkpoint.resolved_ts) for status in agent.spans()}
    )


def belief_of(owner: Any) -> Truth:
    return Truth({span: (known.state, known.checkpoint_ts, known.resolved_ts) for span, known in owner.known.items()})


def storm(chance: random.Random) -> Any:
    """A network that loses, doubles and holds."""

    def hook(sender: str, receiver: str, message: Message) -> Deliver:
        return chance.choices(list(Deliver), weights=[60, 15, 10, 15])[0]

    return hook


def act(world: Any, chance: random.Random, ts: int) -> None:
    """The owner sends anything, sensible or not; the executor does anything it may."""
    spans = chance.sample(SPANS, chance.randint(1, 4))
    match chance.randrange(9):
        case 0 | 1:
            world.owner.prepare(*spans, ts=ts, acked=chance.choice([0, world.owner.acked]))
        case 2 | 3:
            world.owner.write(*spans, ts=ts, epoch=ts)
        case 4:
            world.owner.remove(*spans)
        case 5:
            world.fake.advance(ts)
        case 6:
            world.fake.fail(spans[0]) if spans[0] in world.fake.spans() else None
        case 7:
            world.fake.lose(spans[0])
        case 8:
            world.network.release()
    if chance.random() < 0.6:
        world.owner.heartbeat(acked=0 if chance.random() < 0.1 else None, by_name=chance.random() < 0.05)
    if chance.random() < 0.3:
        introduce(world.owner)


def introduce(owner: Any) -> None:
    spans = list(owner.known)
    numbers = np.array([owner.number_of(span) for span in spans], np.uint32)
    owner.heartbeat(numbers=numbers, spans=type(owner.request(0, spans).spans).of(spans))


def meet_again(world: Any, make_owner: Any, revision: int) -> None:
    """A new owner takes over."""
    world.owner = make_owner(world.network, revision=revision)


@pytest.mark.parametrize("max_rows", [2, 1_000])
@pytest.mark.parametrize("seed", range(30))
def test_what_was_applied_is_what_was_true(make_world: Any, make_owner: Any, seed: int, max_rows: int) -> None:
    """After each report that the owner applies, it believes exactly what the agent held when it sent it; when the storm is over
    it believes what is, and nothing that has ended is kept."""
    chance = random.Random(seed)
    executor = FakeTableExecutor(
        prepare_polls=chance.randint(0, 2), stop_polls=chance.randint(0, 2), refusals=chance.randint(0, 1)
    )
    world = make_world(executor, seed=seed, config=AgentConfig(max_reports_per_message=max_rows))
    world.network.hook = storm(chance)
    truths: dict[int, Truth] = {}
    for ts in range(101, 221):
        if chance.random() < 0.03:
            meet_again(world, make_owner, world.owner.revision + 1)
            truths.clear()
        act(world, chance, ts)
        world.agent.tick()
        world.agent._table.check()
        if world.agent._owner is not None and world.agent._owner.revision == world.owner.revision:
            truths[world.agent._owner.sent] = truth_of(world.agent)
        applied = len(world.owner.applied)
        world.owner.take()
        if len(world.owner.applied) > applied:
            assert belief_of(world.owner) == truths[world.owner.applied[-1][0]], f"seed {seed}, ts {ts}"
    world.network.hook = deliver
    world.network.release()
    for _ in range(10):
        world.beat()
    assert belief_of(world.owner) == truth_of(world.agent)
    assert world.agent.is_settled
    assert TableState.STOPPED not in {state for state, _, _ in truth_of(world.agent).states.values()}
    held = world.agent._table.held()
    assert (world.owner.response.held, world.owner.response.checksum) == held
    assert len(world.agent._table._row_of_span) == held[0]


def test_the_columns_of_a_report_fit_together(make_world: Any) -> None:
    """Every column has one element a span, and a name for each number 0."""
    world = make_world()
    world.replicate(*SPANS[:3])
    world.owner.heartbeat(by_name=True)
    world.step()
    report: SpanReports = world.owner.messages[0].body.reports
    columns = (report.numbers, report.checkpoint_ts, report.resolved_ts, report.last_synced_ts, report.assignment_epochs)
    assert {column.shape for column in columns} == {(3,)}
    assert len(report.spans) == int((report.numbers == 0).sum()) == 3
