"""ExchangeServer over real gRPC on the loopback: strict, bounded, and no message of an agent is lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from owner.exchange.hub import ExchangeHub
from owner.owner_config import OwnerExchangeSection
from processor.service.exchange_server import ExchangeServer
from tablewire.errors import ClosedError, OperatingError
from tablewire.model.ids import CaptureInfo, ChangefeedID
from tablewire.model.messages import (
    ActiveChangefeed,
    Batch,
    DispatchTableResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    MessageBody,
    SpanReports,
)
from tablewire.model.progress import Barrier
from tablewire.model.spans import SpanBlock
from tablewire.model.states import LivenessState, TableState
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.message_queues import MAX_INBOX_MESSAGES, ChangefeedTransport
from tablewire.v1 import schedule_pb2 as pb
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, decode_batch, encode_batch
from tablewire.wire.limits import MAX_MESSAGE_BYTES

CAPTURE, OWNER, REVISION = "capture-1", "owner-1", 7
ORDERS, USERS = ChangefeedID("default", "orders"), ChangefeedID("default", "users")
ACTIVE = (ActiveChangefeed(ORDERS, 1),)
DEADLINE_S = 10.0


def asked(number: int, *, revision: int = REVISION, changefeed: ChangefeedID = ORDERS) -> Message:
    return Message(OWNER, CAPTURE, changefeed, revision, 1, 0, number, 0, Heartbeat(Barrier(5)))


def batch_of(*messages: Message, revision: int = REVISION, receiver: str = CAPTURE) -> Batch:
    return Batch(OWNER, receiver, revision, ACTIVE, messages)


def report(rows: int = 1) -> SpanReports:
    zeros = np.zeros(rows, np.uint64)
    numbers = np.arange(1, rows + 1, dtype=np.uint32)
    states = np.full(rows, TableState.STOPPED.code, np.uint8)
    return SpanReports(1, numbers, SpanBlock(np.empty(0, np.int64)), states, zeros, zeros, zeros, zeros)


def reply(number: int, body: MessageBody | None = None, *, revision: int = REVISION, owner: str = OWNER) -> Message:
    return Message(CAPTURE, owner, ORDERS, revision, 1, 9, number, 0, body or DispatchTableResponse(report()))


def response() -> HeartbeatResponse:
    return HeartbeatResponse(LivenessState.ALIVE, True, 1, 0, report())


@pytest.fixture
def server() -> Iterator[ExchangeServer]:
    server = ExchangeServer(CAPTURE, "127.0.0.1", 0, exchange_wait_ms=5_000)
    server.start()
    yield server
    server.stop(0)


@pytest.fixture
def impatient() -> Iterator[ExchangeServer]:
    """A server whose handlers do not wait for the loop."""
    server = ExchangeServer(CAPTURE, "127.0.0.1", 0, exchange_wait_ms=20, max_pending=3)
    server.start()
    yield server
    server.stop(0)


class Caller:
    """An owner that sends whatever bytes the test wants."""

    def __init__(self, server: ExchangeServer) -> None:
        self.channel = open_channel(f"127.0.0.1:{server.port}")
        self._method = self.channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")

    def start(self, request: bytes | Batch) -> grpc.Future:
        data = request if isinstance(request, bytes) else encode_batch(request)
        return self._method.future(data, timeout=DEADLINE_S)

    def call(self, request: bytes | Batch) -> Batch:
        return decode_batch(self.start(request).result())

    def refused(self, request: bytes | Batch) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(request)
        return caught.value.code(), caught.value.details()


@pytest.fixture
def caller(request: pytest.FixtureRequest) -> Iterator[Caller]:
    name = "impatient" if "impatient" in request.fixturenames else "server"
    caller = Caller(request.getfixturevalue(name))
    yield caller
    caller.channel.close()


def taken(server: ExchangeServer) -> list[Batch]:
    """What has come by now, each answered at once."""
    assert server.wait(DEADLINE_S)
    batches = []
    for pending in server.take():
        server.transports.deliver(pending.batch.messages)
        batches.append(pending.batch)
        pending.answer()
    return batches


def until(condition: Callable[[], bool]) -> None:
    """Poll a condition that has no notification, with a deadline."""
    never = threading.Event()
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        never.wait(0.005)


def test_batch_reaches_the_loop_and_is_answered_at_once(server: ExchangeServer, caller: Caller) -> None:
    """The answer does not wait for exchange_wait_ms when the loop has answered."""
    transport = server.transports.open(ORDERS, 1)
    started = time.monotonic()
    call = caller.start(batch_of(asked(1), asked(2)))
    assert server.wait(DEADLINE_S)
    (pending,) = server.take()
    assert pending.batch == batch_of(asked(1), asked(2))
    assert len(server.transports.deliver(pending.batch.messages)) == 2
    assert [message.number for message in transport.recv()] == [1, 2]
    transport.send([reply(1), reply(2, response())])
    assert pending.is_open
    transport.send([reply(3)])
    pending.answer()
    answer = decode_batch(call.result())
    assert time.monotonic() - started < 4
    assert (answer.sender, answer.receiver, answer.owner_revision) == (CAPTURE, OWNER, REVISION)
    assert sorted(message.number for message in answer.messages) == [1, 2, 3]
    assert not pending.is_open
    assert server.stats.received == 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda batch: b"\xff\xff not a batch", "bad batch: batch: "),
        (lambda batch: b"", "bad batch: version: 0 is not supported"),
        (lambda batch: _with(batch, version=9), "bad batch: version: 9 is not supported"),
        (lambda batch: _with_envelope(batch, version=9), r"bad batch: envelopes[1].version: 9"),
        (lambda batch: _with_envelope(batch, sender="x"), r"bad batch: envelopes[1].sender: 'x' is not its batch's"),
        (lambda batch: batch[:-3], "bad batch: batch: "),
    ],
)
def test_malformed_batch_is_refused_and_changes_nothing(
    server: ExchangeServer, caller: Caller, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    """INVALID_ARGUMENT with the field's name; nothing of it reaches the loop, not even the good message before the bad one."""
    spoiled = spoil(encode_batch(batch_of(asked(1, revision=99), asked(2, revision=99), revision=99)))
    code, details = caller.refused(spoiled)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(reason)
    assert server.take() == []
    assert (server.stats.invalid, server.stats.received, server.stats.seen_revision) == (1, 0, 0)


def _with(data: bytes, **fields: object) -> bytes:
    batch = pb.Batch.FromString(data)
    for name, value in fields.items():
        setattr(batch, name, value)
    return batch.SerializeToString()


def _with_envelope(data: bytes, **fields: object) -> bytes:
    batch = pb.Batch.FromString(data)
    for name, value in fields.items():
        setattr(batch.envelopes[1], name, value)
    return batch.SerializeToString()


def test_batch_for_another_capture_is_refused(server: ExchangeServer, caller: Caller) -> None:
    """A capture that restarted at an address is not taken for the one before it."""
    code, details = caller.refused(Batch(OWNER, "capture-0", REVISION, ACTIVE))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert details == "receiver: 'capture-0' is not here, this is 'capture-1'"
    assert server.take() == []
    assert server.stats.refused == 1
    assert server.stats.seen_revision == 0


def test_batch_of_a_replaced_owner_is_refused(impatient: ExchangeServer, caller: Caller) -> None:
    """Once a newer owner has called, an older one is refused."""
    caller.call(batch_of(revision=8))
    code, details = caller.refused(batch_of(revision=7))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert details == "owner_revision: 7 has been replaced by 8"
    assert len(impatient.take()) == 1
    caller.call(batch_of(revision=8))
    assert (impatient.stats.refused, impatient.stats.seen_revision) == (1, 8)


def test_unanswered_turn_returns_what_was_sent_and_the_rest_goes_with_the_next(impatient: ExchangeServer, caller: Caller) -> None:
    """A busy loop delays no call, and loses nothing."""
    transport = impatient.transports.open(ORDERS, 1)
    transport.send([reply(1)])
    assert [message.number for message in caller.call(batch_of(asked(1))).messages] == [1]
    assert caller.call(batch_of(asked(2))).messages == ()
    assert impatient.stats.unanswered == 2
    late = impatient.take()
    assert [pending.batch.messages[0].number for pending in late] == [1, 2], "the loop gets what was accepted"
    assert not any(pending.is_open for pending in late)
    transport.send([reply(2)])
    late[0].answer()
    assert [message.number for message in caller.call(batch_of(asked(3))).messages] == [2]


def test_loop_that_is_behind_refuses_and_takes_nothing_in(impatient: ExchangeServer, caller: Caller) -> None:
    """scenario_18 on this side: the mailbox is bounded, and the owner gets an error."""
    for number in range(1, 4):
        caller.call(batch_of(asked(number)))
    code, details = caller.refused(batch_of(asked(4)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "nothing was taken in" in details
    assert [pending.batch.messages[0].number for pending in impatient.take()] == [1, 2, 3]
    assert impatient.stats.overflowed == 1
    caller.call(batch_of(asked(5)))


def test_scenario_18_outbox_of_an_agent_is_bounded_and_keeps_the_newest(impatient: ExchangeServer, caller: Caller) -> None:
    """An owner that is away for long: one heartbeat response and the newest dispatch responses wait, in their order."""
    orders, users = impatient.transports.open(ORDERS, 1), impatient.transports.open(USERS, 1)
    users.send([Message(CAPTURE, OWNER, USERS, REVISION, 1, 9, 1, 0, DispatchTableResponse(report()))])
    rounds = MAX_INBOX_MESSAGES * 2
    for number in range(1, 2 * rounds + 1, 2):
        orders.send([reply(number), reply(number + 1, response())])
    answer = caller.call(batch_of())
    numbers = [message.number for message in answer.messages if message.changefeed == ORDERS]
    assert len(numbers) == MAX_INBOX_MESSAGES + 1
    assert numbers == sorted(numbers)
    assert numbers[-1] == 2 * rounds
    assert [message.number for message in answer.messages if message.changefeed == USERS] == [1]
    assert impatient.stats.dropped == rounds - MAX_INBOX_MESSAGES


def test_answer_of_a_caller_that_has_gone_is_kept(server: ExchangeServer, caller: Caller) -> None:
    """What was sent after the caller had gone is in the next answer."""
    transport = server.transports.open(ORDERS, 1)
    call = caller.start(batch_of(asked(1)))
    assert server.wait(DEADLINE_S)
    (pending,) = server.take()
    call.cancel()
    until(lambda: not pending.is_open)
    transport.send([reply(1)])
    again = caller.start(batch_of(asked(2)))
    taken(server)
    assert [message.number for message in decode_batch(again.result()).messages] == [1]


def test_answer_holds_only_what_was_sent_in_its_term(impatient: ExchangeServer, caller: Caller) -> None:
    """Messages to a former owner are dropped, messages to a newer one wait for it."""
    transport = impatient.transports.open(ORDERS, 1)
    transport.send([reply(1, revision=6), reply(2), reply(3, revision=9, owner="owner-2"), reply(4)])
    assert [message.number for message in caller.call(batch_of()).messages] == [2, 4]
    newer = caller.call(Batch("owner-2", CAPTURE, 9, ACTIVE))
    assert [message.number for message in newer.messages] == [3]


def test_one_agents_bad_message_does_not_cost_the_others(impatient: ExchangeServer, caller: Caller) -> None:
    """It is dropped and counted; the rest of the answer goes."""
    broken = report()
    spans = SpanReports(
        1,
        broken.numbers,
        broken.spans,
        broken.states,
        np.full(1, 9, np.uint64),
        broken.resolved_ts,
        broken.last_synced_ts,
        broken.assignment_epochs,
    )
    impatient.transports.open(ORDERS, 1).send([reply(1, DispatchTableResponse(spans)), reply(2)])
    assert [message.number for message in caller.call(batch_of()).messages] == [2]
    assert impatient.stats.unsendable == 1


def test_answer_larger_than_a_batch_goes_in_several(
    impatient: ExchangeServer, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit leads the next answer, in order."""
    monkeypatch.setattr("tablewire.wire.codec.MAX_ROWS_PER_BATCH", 25)
    impatient.transports.open(ORDERS, 1).send([reply(number, DispatchTableResponse(report(10))) for number in range(1, 6)])
    answers = [[message.number for message in caller.call(batch_of()).messages] for _ in range(3)]
    assert answers == [[1, 2], [3, 4], [5]]


def test_messages_without_an_agent_are_strays(server: ExchangeServer, caller: Caller) -> None:
    """For a changefeed or an epoch that has no transport here: dropped, the others delivered."""
    orders = server.transports.open(ORDERS, 1)
    call = caller.start(batch_of(asked(1), asked(2, changefeed=USERS)))
    assert server.wait(DEADLINE_S)
    (pending,) = server.take()
    assert [m.number for m in server.transports.deliver(pending.batch.messages)] == [1]
    pending.answer()
    call.result()
    assert [message.number for message in orders.recv()] == [1]


def test_closed_transport_forgets_both_directions(impatient: ExchangeServer, caller: Caller) -> None:
    """A changefeed that was restarted neither receives nor sends the messages of its former run."""
    former = impatient.transports.open(ORDERS, 1)
    former.send([reply(1)])
    latter = impatient.transports.open(ORDERS, 1)
    with pytest.raises(ClosedError):
        former.send([reply(2)])
    latter.send([reply(3)])
    assert [message.number for message in caller.call(batch_of(asked(1))).messages] == [3]
    assert len(impatient.transports.deliver([asked(1)])) == 1
    assert [list(former.recv()), [message.number for message in latter.recv()]] == [[], [1]]
    latter.close()
    latter.close()
    assert impatient.transports.deliver([asked(1)]) == []


def test_wake_from_any_thread_ends_a_wait(server: ExchangeServer) -> None:
    """This is what executors call; a wake before the wait is not lost."""
    assert not server.wait(0)
    server.wake()
    assert server.wait(0)
    assert not server.wait(0)
    thread = threading.Timer(0.01, server.wake)
    thread.start()
    assert server.wait(DEADLINE_S)
    thread.join()


def test_oversize_request_is_refused_by_grpc(server: ExchangeServer) -> None:
    """More than the limit is not even received."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=[("grpc.max_send_message_length", -1)]) as channel:
        method = channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")
        with pytest.raises(grpc.RpcError) as caught:
            method(bytes(MAX_MESSAGE_BYTES + 1), timeout=DEADLINE_S)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.take() == []


def test_stop_answers_the_turns_that_wait(caller: Caller, server: ExchangeServer) -> None:
    """With what was sent by then, and within the grace; new calls are refused, and health reports it before."""
    server.transports.open(ORDERS, 1).send([reply(1)])
    call = caller.start(batch_of(asked(1)))
    assert server.wait(DEADLINE_S)
    started = time.monotonic()
    server.stop(grace_s=3)
    assert time.monotonic() - started < 3
    assert [message.number for message in decode_batch(call.result()).messages] == [1]
    code, _ = caller.refused(batch_of(asked(2)))
    assert code == grpc.StatusCode.UNAVAILABLE
    server.stop(grace_s=0)


def test_health_and_reflection_are_served(server: ExchangeServer, caller: Caller) -> None:
    """For load balancers, grpcurl and people."""
    health = health_pb2_grpc.HealthStub(caller.channel)
    for service in ("", EXCHANGE_SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    server.health.set_serving(False)
    answer = health.Check(health_pb2.HealthCheckRequest(service=EXCHANGE_SERVICE), timeout=DEADLINE_S)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    listing = reflection_pb2_grpc.ServerReflectionStub(caller.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=DEADLINE_S
    )
    names = {service.name for service in next(iter(listing)).list_services_response.service}
    assert EXCHANGE_SERVICE in names


def test_port_in_use_is_one_clear_error(server: ExchangeServer) -> None:
    """Two processes never share a port, each getting half of the calls."""
    with pytest.raises(OperatingError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        ExchangeServer("capture-2", "127.0.0.1", server.port)


class Loop:
    """The smallest agents' loop: answers every heartbeat, on a thread of its own."""

    def __init__(self, server: ExchangeServer) -> None:
        self._server = server
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="loop")
        self._thread.start()

    def _run(self) -> None:
        transports: dict[ActiveChangefeed, ChangefeedTransport] = {}
        number = 0
        while not self._ending:
            self._server.wait(1.0)
            for pending in self._server.take():
                for one in pending.batch.active:
                    if one not in transports:
                        transports[one] = self._server.transports.open(one.changefeed, one.epoch)
                self._server.transports.deliver(pending.batch.messages)
                for transport in transports.values():
                    for heard in transport.recv():
                        number += 1
                        transport.send([replace(reply(number, response()), echo=heard.number)])
                pending.answer()

    def end(self) -> None:
        self._ending = True
        self._server.wake()
        self._thread.join()


def test_hub_and_server_work_with_each_other(server: ExchangeServer) -> None:
    """Owner's end and processor's end together: a hundred heartbeats, a hundred answers, each in its own turn."""
    loop = Loop(server)
    answered = threading.Semaphore(0)
    hub = ExchangeHub(
        OWNER, config=OwnerExchangeSection(idle_ms=5_000), on_answer=lambda matters: answered.release() if matters else None
    )
    try:
        hub.set_term(REVISION)
        hub.set_captures({CAPTURE: CaptureInfo(CAPTURE, f"127.0.0.1:{server.port}")})
        transport = hub.transport(ORDERS, 1)
        hub.set_active(ACTIVE)
        for number in range(1, 101):
            transport.send([asked(number)])
            assert answered.acquire(timeout=DEADLINE_S)
            assert [message.echo for message in transport.recv()] == [number]
        (view,) = hub.client_views()
        assert (view.failures, view.dropped) == (0, 0)
        assert server.stats.unanswered == 0
    finally:
        hub.close()
        loop.end()
