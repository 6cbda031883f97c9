"""What waits in the hub is bounded, coalesces, and never costs another capture anything."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from owner.exchange.hub import ExchangeHub
from owner.exchange.processor_client import MAX_QUEUED_DISPATCHES
from tablewire.model.messages import Batch, Message
from tablewire.model.states import TableState
from tablewire.runtime.message_queues import MAX_INBOX_MESSAGES
from tests.owner.scripted_captures import (
    ORDERS,
    OWNER,
    REVISION,
    USERS,
    Answers,
    ScriptedCapture,
    beat,
    dispatch,
    lead,
    response,
    running_captures,
    running_hub,
    to,
)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def hub(answers: Answers) -> Iterator[ExchangeHub]:
    with running_hub(answers) as hub:
        yield hub


@pytest.fixture
def captures() -> Iterator[dict[str, ScriptedCapture]]:
    with running_captures() as captures:
        yield captures


def test_one_call_is_in_flight_and_the_queue_coalesces(hub: ExchangeHub, captures: dict[str, ScriptedCapture]) -> None:
    """While a call is out, heartbeats replace each other, dispatches wait in their order, and one batch takes them all."""
    capture = captures["a"]
    capture.hold()
    transport = hub.transport(ORDERS, 1)
    lead(hub, capture)
    capture.wait_for(lambda: capture.in_flight == 1)
    for number in range(1, 21):
        transport.send([to("a", beat(number) if number % 2 else dispatch(), number)])
    assert hub.client_views()[0].queued == 11
    capture.let_go()
    capture.wait_for(lambda: len(capture.messages()) == 11)
    assert [m.number for m in capture.messages()] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 19, 20]
    assert capture.most_in_flight == 1


def test_scenario_17_congested_processor_costs_the_healthy_ones_nothing(
    hub: ExchangeHub, captures: dict[str, ScriptedCapture]
) -> None:
    """One capture answers nothing and its queue overflows; every dispatch to the other one arrives, in order, promptly."""
    slow, healthy = captures["a"], captures["b"]
    slow.hold()
    transport = hub.transport(ORDERS, 1)
    lead(hub, slow, healthy)
    slow.wait_for(lambda: slow.in_flight == 1)
    rounds = MAX_QUEUED_DISPATCHES * 4
    slowest_s = 0.0
    for number in range(1, rounds + 1):
        started = time.monotonic()
        transport.send([to("a", dispatch(), number), to("b", dispatch(), number)])
        healthy.wait_for(lambda expected=number: len(healthy.messages()) == expected)  # type: ignore[misc]
        slowest_s = max(slowest_s, time.monotonic() - started)
    assert [message.number for message in healthy.messages()] == list(range(1, rounds + 1))
    views = {view.capture_id: view for view in hub.client_views()}
    assert views["b"].dropped == 0
    assert views["a"].dropped == rounds - MAX_QUEUED_DISPATCHES
    assert slowest_s < 1.0, "a turn of the healthy one never waits for the slow one's deadline"


def test_scenario_18_queue_to_a_processor_is_bounded_and_keeps_the_newest(
    hub: ExchangeHub, captures: dict[str, ScriptedCapture]
) -> None:
    """Ten thousand messages while one call hangs: a bounded queue, counted losses, the newest of everything when it resumes."""
    capture = captures["a"]
    capture.hold()
    orders, users = hub.transport(ORDERS, 1), hub.transport(USERS, 1)
    lead(hub, capture)
    capture.wait_for(lambda: capture.in_flight == 1)
    users.send([to("a", dispatch(), 1, changefeed=USERS)])
    for number in range(1, 10_001, 2):
        orders.send([to("a", dispatch(), number), to("a", beat(number), number + 1)])
    view = hub.client_views()[0]
    assert view.queued == MAX_QUEUED_DISPATCHES + 2
    assert view.dropped == 5_000 - MAX_QUEUED_DISPATCHES
    capture.let_go()
    capture.wait_for(lambda: len(capture.messages()) == MAX_QUEUED_DISPATCHES + 2)
    sent = capture.messages()
    assert [m.number for m in sent if m.changefeed == USERS] == [1], "another changefeed's burst pushed nothing out"
    assert sent[-1].number == 10_000
    assert sent[-1].body == beat(9_999)


def test_scenario_18_inbox_of_a_slow_changefeed_is_bounded(
    hub: ExchangeHub, captures: dict[str, ScriptedCapture], answers: Answers
) -> None:
    """A changefeed that does not tick keeps the newest answers of each capture, and no capture pushes out another's."""
    numbers = iter(range(1, 1_000_000))

    def chatter(batch: Batch) -> list[Message]:
        return [
            Message("a", OWNER, ORDERS, REVISION, 1, 9, next(numbers), 0, response(TableState.REPLICATING))
            for _ in range(MAX_INBOX_MESSAGES)
        ]

    captures["a"].answer = chatter
    once = iter([Message("b", OWNER, ORDERS, REVISION, 1, 9, 1, 0, response(TableState.STOPPED))])
    captures["b"].answer = lambda batch: list(once)
    transport = hub.transport(ORDERS, 1)
    lead(hub, captures["a"], captures["b"])
    answers.wait_for(4)
    hub.stop_sending()
    received = transport.recv()
    from_a = [message.number for message in received if message.sender == "a"]
    assert len(from_a) == MAX_INBOX_MESSAGES
    assert from_a == list(range(from_a[0], from_a[0] + MAX_INBOX_MESSAGES))
    assert [message.number for message in received if message.sender == "b"] == [1]
    assert transport.dropped >= MAX_INBOX_MESSAGES
