"""ExchangeHub against real gRPC servers on the loopback: one call in flight, bounded queues, nothing sent after the term."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from owner.exchange.hub import ExchangeHub
from owner.owner_config import OwnerExchangeSection
from tablewire.errors import ClosedError
from tablewire.model.messages import Batch, DispatchTableRequest, DispatchTableResponse, Message, MessageBody
from tablewire.model.states import TableState
from tablewire.wire.codec import encode_batch
from tests.owner.scripted_captures import (
    ACTIVE,
    DEADLINE_S,
    ORDERS,
    OWNER,
    QUICK,
    REVISION,
    USERS,
    Answers,
    ScriptedCapture,
    beat,
    dispatch,
    lead,
    report,
    response,
    running_captures,
    running_hub,
    to,
    until,
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


def test_message_goes_and_its_answer_comes(hub: ExchangeHub, captures: dict[str, ScriptedCapture], answers: Answers) -> None:
    """The answer is in the inbox of its own changefeed, and of no other."""
    capture = captures["a"]
    capture.answer = lambda batch: [
        Message("a", OWNER, m.changefeed, REVISION, 1, 9, 1, m.number, response(TableState.REPLICATING)) for m in batch.messages
    ]
    orders, users = hub.transport(ORDERS, 1), hub.transport(USERS, 1)
    lead(hub, capture)
    orders.send([to("a", beat(), 1)])
    answers.wait_for(1)
    assert [message.echo for message in orders.recv()] == [1]
    assert users.recv() == []
    assert answers.matters == [False], "a steady report does not matter"
    assert capture.batches[-1].active == ACTIVE
    assert capture.batches[-1].receiver == "a"


@pytest.mark.parametrize(
    ("body", "matters"),
    [
        (response(TableState.REPLICATING, TableState.REPLICATING), False),
        (response(TableState.REPLICATING, TableState.STOPPED), True),
        (response(), False),
        (DispatchTableResponse(report(TableState.REPLICATING)), True),
    ],
)
def test_answers_that_matter_are_marked(
    hub: ExchangeHub, captures: dict[str, ScriptedCapture], answers: Answers, body: MessageBody, matters: bool
) -> None:
    """A change of state, or the answer to a dispatch, is worth a tick at once."""
    captures["a"].answer = lambda batch: [Message("a", OWNER, ORDERS, REVISION, 1, 9, 1, 0, body)] if batch.messages else []
    transport = hub.transport(ORDERS, 1)
    lead(hub, captures["a"])
    transport.send([to("a", beat(), 1)])
    answers.wait_for(1)
    assert answers.matters[0] is matters


def test_nothing_is_sent_before_the_active_set_is_known(hub: ExchangeHub, captures: dict[str, ScriptedCapture]) -> None:
    """An Exchange without the set would close every agent; so there is none, whatever is queued."""
    transport = hub.transport(ORDERS, 1)
    hub.set_captures({"a": captures["a"].info})
    transport.send([to("a", beat(), 1)])
    hub.set_term(REVISION)
    transport.send([to("a", beat(), 2)])
    assert hub.client_views()[0].exchanges == 0
    hub.set_active(ACTIVE)
    captures["a"].wait_for(lambda: len(captures["a"].messages()) == 1)
    assert all(batch.active == ACTIVE for batch in captures["a"].batches)
    assert captures["a"].messages()[0].number == 2, "what was queued before the term is forgotten"


def test_new_active_set_is_sent_at_once_and_idle_captures_are_called(
    hub: ExchangeHub, captures: dict[str, ScriptedCapture]
) -> None:
    """Without any message queued."""
    capture = captures["a"]
    lead(hub, capture)
    capture.wait_for(lambda: len(capture.batches) >= 3)
    hub.set_active(ACTIVE[:1])
    capture.wait_for(lambda: capture.batches[-1].active == ACTIVE[:1])
    assert capture.messages() == []


def test_after_stop_sending_no_exchange_starts(hub: ExchangeHub, captures: dict[str, ScriptedCapture], answers: Answers) -> None:
    """Neither what was queued, nor what is queued later, nor an idle call; and the answer under way is not delivered."""
    capture = captures["a"]
    capture.hold()
    capture.answer = lambda batch: [Message("a", OWNER, ORDERS, REVISION, 1, 9, 1, 0, response(TableState.STOPPED))]
    transport = hub.transport(ORDERS, 1)
    lead(hub, capture)
    capture.wait_for(lambda: capture.in_flight == 1)
    transport.send([to("a", dispatch(), 1)])
    hub.stop_sending()
    started = hub.client_views()[0].exchanges
    transport.send([to("a", dispatch(), 2)])
    capture.let_go()
    capture.wait_for(lambda: capture.in_flight == 0)
    until(lambda: hub.client_views()[0].in_flight_ms is None)
    assert hub.client_views()[0].exchanges == started
    assert (transport.recv(), answers.matters) == ([], [])

    hub.set_term(REVISION + 1)
    hub.set_active(ACTIVE)
    capture.wait_for(lambda: capture.batches[-1].owner_revision == REVISION + 1)
    assert capture.messages() == [], "what was queued after the end of the term is forgotten too"


def test_stop_sending_races_with_senders(captures: dict[str, ScriptedCapture]) -> None:
    """Under load from many threads: once stop_sending has returned, the number of started calls stands still."""
    hub = ExchangeHub(OWNER, config=QUICK)
    transport = hub.transport(ORDERS, 1)
    done = threading.Event()

    def chatter() -> None:
        number = 0
        while not done.is_set():
            number += 1
            transport.send([to("a", beat(), number), to("b", beat(), number)])

    threads = [threading.Thread(target=chatter) for _ in range(2)]
    hub.set_captures({capture.id: capture.info for capture in captures.values()})
    for thread in threads:
        thread.start()
    try:
        for revision in range(1, 11):
            hub.set_term(revision)
            hub.set_active(ACTIVE)
            before = len(captures["a"].batches)
            captures["a"].wait_for(lambda seen=before: len(captures["a"].batches) > seen)  # type: ignore[misc]
            hub.stop_sending()
            started = [view.exchanges for view in hub.client_views()]
            until(lambda: all(view.in_flight_ms is None for view in hub.client_views()))
            assert [view.exchanges for view in hub.client_views()] == started
    finally:
        done.set()
        for thread in threads:
            thread.join()
        hub.close()


def test_no_call_while_the_lease_may_be_over(captures: dict[str, ScriptedCapture]) -> None:
    """may_send is asked right before each call; when it returns True again, calls resume."""
    asked = threading.Event()
    held = threading.Event()

    def may_send() -> bool:
        asked.set()
        return held.is_set()

    hub = ExchangeHub(OWNER, config=QUICK, may_send=may_send)
    try:
        transport = hub.transport(ORDERS, 1)
        lead(hub, captures["a"])
        transport.send([to("a", beat(), 1)])
        assert asked.wait(DEADLINE_S)
        assert hub.client_views()[0].exchanges == 0
        held.set()
        transport.send([to("a", beat(), 2)])
        captures["a"].wait_for(lambda: [m.number for m in captures["a"].messages()][-1:] == [2])
    finally:
        hub.close()


def test_dead_capture_is_reported_and_comes_back(hub: ExchangeHub, captures: dict[str, ScriptedCapture]) -> None:
    """Failures are kept for the status; a capture that listens again is called again soon."""
    capture = captures["a"]
    port = capture.port
    lead(hub, capture)
    capture.wait_for(lambda: len(capture.batches) >= 1)
    capture.stop()
    until(lambda: hub.client_views()[0].consecutive_failures >= 2)
    view = hub.client_views()[0]
    assert view.failing_ms is not None
    assert "UNAVAILABLE" in view.last_error
    again = captures["a"] = ScriptedCapture("a", port)
    again.wait_for(lambda: len(again.batches) >= 1)
    until(lambda: hub.client_views()[0].consecutive_failures == 0)
    assert hub.client_views()[0].failing_ms is None


def test_deadline_ends_a_call_that_hangs(captures: dict[str, ScriptedCapture]) -> None:
    """A capture that takes the call and never answers is a failure, again and again."""
    hub = ExchangeHub(OWNER, config=OwnerExchangeSection(timeout_ms=100, idle_ms=50, failure_pause_ms=10))
    captures["a"].hold()
    try:
        lead(hub, captures["a"])
        until(lambda: hub.client_views()[0].consecutive_failures >= 2)
        assert "DEADLINE_EXCEEDED" in hub.client_views()[0].last_error
    finally:
        hub.close()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff\xff\xff", "bad answer: batch"),
        (encode_batch(Batch("b", OWNER, REVISION)), "not between this owner and this capture"),
        (encode_batch(Batch("a", "owner-2", REVISION)), "not between this owner and this capture"),
        (encode_batch(Batch("a", OWNER, REVISION - 1)), "owner_revision: 6 is not that of the call"),
    ],
)
def test_answer_that_is_none_is_a_failure(
    hub: ExchangeHub, captures: dict[str, ScriptedCapture], answers: Answers, raw: bytes, reason: str
) -> None:
    """Nothing of it is delivered, and the status has the reason."""
    captures["a"].raw = raw
    lead(hub, captures["a"])
    until(lambda: hub.client_views()[0].failures >= 1)
    assert reason in hub.client_views()[0].last_error
    assert answers.matters == []


def test_message_that_cannot_be_sent_does_not_cost_the_others(hub: ExchangeHub, captures: dict[str, ScriptedCapture]) -> None:
    """It is dropped, counted, and named in the status; its batch goes."""
    good = dispatch()
    above = np.full(1, 9, np.uint64)
    body = DispatchTableRequest(good.numbers, good.spans, good.actions, above, good.resolved_ts, good.assignment_epochs)
    broken = to("a", body, 1)
    transport = hub.transport(ORDERS, 1)
    lead(hub, captures["a"])
    transport.send([broken, to("a", beat(), 2)])
    captures["a"].wait_for(lambda: [m.number for m in captures["a"].messages()] == [2])
    assert hub.client_views()[0].dropped == 1
    assert "cannot be sent" in hub.client_views()[0].last_error


def test_unknown_receivers_and_strays_are_counted(hub: ExchangeHub, captures: dict[str, ScriptedCapture]) -> None:
    """A message to an unknown capture, and an answer for a changefeed that is over, change nothing."""
    captures["a"].answer = lambda batch: [Message("a", OWNER, USERS, REVISION, 1, 9, 1, 0, response())]
    transport = hub.transport(ORDERS, 1)
    lead(hub, captures["a"])
    transport.send([to("unknown", beat(), 1)])
    assert hub.unknown_receivers == 1
    until(lambda: hub.strays >= 1)


def test_closed_transport_is_forgotten(hub: ExchangeHub, captures: dict[str, ScriptedCapture]) -> None:
    """What it had queued is not sent, and it takes nothing more; the other epoch's transport continues."""
    capture = captures["a"]
    capture.hold()
    former, latter = hub.transport(ORDERS, 1), hub.transport(ORDERS, 2)
    lead(hub, capture)
    capture.wait_for(lambda: capture.in_flight == 1)
    former.send([to("a", dispatch(), 1)])
    latter.send([Message(OWNER, "a", ORDERS, REVISION, 2, 0, 2, 0, beat())])
    former.close()
    former.close()
    with pytest.raises(ClosedError):
        former.send([])
    capture.let_go()
    capture.wait_for(lambda: len(capture.messages()) >= 1)
    assert [message.number for message in capture.messages()] == [2]


def test_capture_that_left_or_moved_gets_a_new_channel(hub: ExchangeHub, captures: dict[str, ScriptedCapture]) -> None:
    """set_captures is a whole set: a capture that is not in it is no longer called, a new address is a new client."""
    a, b = captures["a"], captures["b"]
    lead(hub, a, b)
    a.wait_for(lambda: len(a.batches) >= 1)
    hub.set_captures({"b": b.info})
    assert [view.capture_id for view in hub.client_views()] == ["b"]
    moved = ScriptedCapture("b")
    try:
        hub.set_captures({"b": moved.info})
        moved.wait_for(lambda: len(moved.batches) >= 1)
        assert hub.client_views()[0].address == moved.info.address
    finally:
        moved.stop()


def test_hub_that_is_closed_refuses(captures: dict[str, ScriptedCapture]) -> None:
    """close ends the threads, also of a call under way, and is idempotent."""
    hub = ExchangeHub(OWNER, config=QUICK)
    captures["a"].hold()
    lead(hub, captures["a"])
    captures["a"].wait_for(lambda: captures["a"].in_flight == 1)
    started = time.monotonic()
    hub.close()
    hub.close()
    assert time.monotonic() - started < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("exchange-")]
    with pytest.raises(ClosedError):
        hub.set_term(9)
