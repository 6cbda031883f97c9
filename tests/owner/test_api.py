"""The admin API over real gRPC on the loopback: status codes, streaming, forwarding by one hop, limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest

from owner.admin.forwarding import FORWARDED_KEY
from owner.admin.grpc_service import CHUNK_ROWS, FOLLOWERS_MAX, WAITERS_MAX, clip
from owner.admin.probe import RETRY_KEY
from owner.changefeed.store import ChangefeedEvent
from tablewire.errors import ConflictError, EtcdError, NotLeaderError, OperatingError
from tablewire.etcd.records import ChangefeedInfo, LeaderRecord
from tablewire.model.ids import ChangefeedID
from tablewire.model.spans import Span
from tablewire.runtime.grpc import KEEPALIVE_INTERVAL_MS, MIN_PING_INTERVAL_MS, open_channel
from tablewire.source import CheckFailure
from tablewire.v1 import admin_pb2 as pb
from tablewire.v1 import admin_pb2_grpc
from tests.owner.admin_world import FEED, AdminView, paused, serving, ticking
from tests.owner.world import World

TIMEOUT_S = 20.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close what a test opens."""
    with ExitStack() as stack:
        yield stack


def stub_of(address: str, stack: ExitStack) -> Any:
    channel = stack.enter_context(grpc.insecure_channel(address))
    return admin_pb2_grpc.AdminStub(channel)


@pytest.fixture
def view() -> AdminView:
    """Return an owner of three processors and three tables, all replicating."""
    view = AdminView()
    view.world.settle()
    return view


@pytest.fixture
def stub(view: AdminView, stack: ExitStack) -> Any:
    """Return a client of the leader."""
    return stub_of(stack.enter_context(serving(view)), stack)


@pytest.fixture
def follower(view: AdminView, stack: ExitStack) -> AdminView:
    """Return another owner, which knows that `view` leads."""
    stack.enter_context(serving(view))
    other = AdminView(view.world, "owner-2")
    other.leads, other.records = False, [*view.records, LeaderRecord(id="owner-2", address="127.0.0.1:2")]
    return other


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def has_retry_key(error: grpc.RpcError) -> bool:
    return any(key == RETRY_KEY for key, _ in error.trailing_metadata() or ())


def target_of(view: AdminView, table: int) -> str:
    return next(capture for capture in "abc" if capture != view.world.primary(table))


def test_a_move_streams_its_states_until_it_is_done(view: AdminView, stub: Any) -> None:
    """The first message comes at once, the last one has the final state."""
    target = target_of(view, 1)
    with ticking(view):
        jobs = list(stub.MoveTable(pb.MoveTableRequest(table="public.t1", target=target, wait_done=True, wait_ms=20_000)))
    assert jobs[0].state in ("pending", "accepted")
    assert jobs[-1].state == "done"
    assert (jobs[-1].changefeed, jobs[-1].capture) == (FEED, target)
    assert view.world.primary(1) == target


def test_a_move_that_no_tick_decides_stays_pending(view: AdminView, stub: Any) -> None:
    """The stream ends at wait_ms with the state as it is."""
    jobs = list(stub.MoveTable(pb.MoveTableRequest(table="1", target=target_of(view, 1), wait_ms=100), timeout=TIMEOUT_S))
    assert [job.state for job in jobs] == ["pending"]


@pytest.mark.parametrize(
    ("call", "request_", "code", "text"),
    [
        ("QueryChangefeed", pb.ChangefeedRequest(changefeed="NO"), "INVALID_ARGUMENT", "'NO' is not valid"),
        ("QueryChangefeed", pb.ChangefeedRequest(changefeed="no"), "NOT_FOUND", "no changefeed default/no; there: default/test"),
        ("DrainCapture", pb.DrainCaptureRequest(capture="z"), "NOT_FOUND", "no processor 'z'; registered: a, b, c"),
        ("DrainCapture", pb.DrainCaptureRequest(capture="a", cancel=True), "FAILED_PRECONDITION", "not being drained"),
        ("ResumeChangefeed", pb.ChangefeedRequest(), "FAILED_PRECONDITION", "cannot resume: it is running already"),
        ("RemoveChangefeed", pb.ChangefeedRequest(), "INVALID_ARGUMENT", "must name"),
        ("ResyncChangefeed", pb.ChangefeedRequest(), "INVALID_ARGUMENT", "must name"),
        ("Resign", pb.ResignRequest(), "FAILED_PRECONDITION", "only owner"),
        (
            "CreateChangefeed",
            pb.CreateChangefeedRequest(changefeed="test", source_uri="a:b", sink_uri="a:b", tables=["*"]),
            "ALREADY_EXISTS",
            "exists already",
        ),
    ],
)
def test_a_refusal_has_its_code_and_text(stub: Any, call: str, request_: Any, code: str, text: str) -> None:
    """The text is the operation's own."""
    error = refused(lambda: getattr(stub, call)(request_, timeout=TIMEOUT_S))
    assert error.code() == grpc.StatusCode[code]
    assert text in error.details()
    assert not has_retry_key(error)


@pytest.mark.parametrize(
    ("error", "code", "again"),
    [
        (EtcdError("etcd does not answer"), "UNAVAILABLE", False),
        (NotLeaderError("the leader key is gone"), "UNAVAILABLE", True),
        (ConflictError("changed by others"), "ABORTED", False),
        (OperatingError("something else"), "FAILED_PRECONDITION", False),
    ],
)
def test_trouble_below_has_a_code(view: AdminView, stub: Any, error: OperatingError, code: str, again: bool) -> None:
    """Only calls that certainly did nothing are marked as repeatable."""

    def fail(_changefeed: ChangefeedID, _event: ChangefeedEvent, *, by: str) -> ChangefeedInfo:
        raise error

    view.store.apply = fail  # type: ignore[method-assign,assignment]
    caught = refused(lambda: stub.PauseChangefeed(pb.ChangefeedRequest(), timeout=TIMEOUT_S))
    assert caught.code() == grpc.StatusCode[code]
    assert str(error) in caught.details()
    assert has_retry_key(caught) == again


def test_a_long_text_arrives_cut(view: AdminView, stub: Any) -> None:
    """gRPC would drop a header that is too long, and with it the reason."""
    view.failures = [CheckFailure("replica_identity", f"täble {number} has none") for number in range(2000)]
    request = pb.CreateChangefeedRequest(changefeed="new", source_uri="a:b", sink_uri="a:b", tables=["*"])
    error = refused(lambda: stub.CreateChangefeed(request, timeout=TIMEOUT_S))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error.details().startswith("changefeed default/new was not created, 2000 checks failed: replica_identity: täble 0")
    assert error.details().endswith("more characters)")


def test_clip_keeps_what_fits() -> None:
    """A byte beyond ASCII takes three bytes of the percent-encoded header."""
    assert clip("a" * 50, 50) == "a" * 50
    assert clip("ä" * 50, 60).startswith("ä" * 10 + " ... (40 more")


def _messages(call: Any) -> list[Any]:
    """Return what a call streamed before it ended, with or without an error."""
    messages = []
    with suppress(grpc.RpcError):
        for message in call:
            messages.append(message)
    return messages


def test_tables_come_in_chunks_and_the_first_names_the_changefeed(stack: ExitStack) -> None:
    """No message grows with the number of tables, and a list that a limit cuts says so."""
    count = 2 * CHUNK_ROWS + 10
    view = AdminView(World(tables=range(1, count + 1)))
    view.world.settle()
    stub = stub_of(stack.enter_context(serving(view)), stack)
    chunks = list(stub.ListTables(pb.ListTablesRequest(), timeout=TIMEOUT_S))
    assert [len(chunk.tables) for chunk in chunks] == [CHUNK_ROWS, CHUNK_ROWS, 10]
    assert [chunk.changefeed for chunk in chunks] == [FEED, "", ""]
    assert not any(chunk.truncated for chunk in chunks)
    (chunk,) = stub.ListTables(pb.ListTablesRequest(limit=5), timeout=TIMEOUT_S)
    assert (len(chunk.tables), chunk.truncated) == (5, True)
    (chunk,) = stub.ListTables(pb.ListTablesRequest(stalled=True), timeout=TIMEOUT_S)
    assert (chunk.changefeed, len(chunk.tables)) == (FEED, 0)


def test_keys_and_errors_of_a_span_arrive(view: AdminView, stub: Any) -> None:
    """A failed table shows the executor's text."""
    view.world.executors[view.world.primary(1)].fail(Span(1), "disk is full")
    view.world.run(3)
    chunks = list(stub.ListTables(pb.ListTablesRequest(table="1"), timeout=TIMEOUT_S))
    assert "disk is full" in chunks[0].tables[0].error


def test_a_follower_forwards_every_call(view: AdminView, follower: AdminView, stack: ExitStack) -> None:
    """Unary and streaming calls return the leader's answer."""
    stub = stub_of(stack.enter_context(serving(follower)), stack)
    assert stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).answered_by == "owner-1"
    assert stub.QueryChangefeed(pb.ChangefeedRequest(), timeout=TIMEOUT_S).changefeed == FEED
    with ticking(view):
        request = pb.MoveTableRequest(table="1", target=target_of(view, 1), wait_done=True, wait_ms=20_000)
        assert list(stub.MoveTable(request, timeout=TIMEOUT_S))[-1].state == "done"


def test_a_follower_forwards_refusals(follower: AdminView, stack: ExitStack) -> None:
    """Code and text are the leader's, for unary and streaming calls."""
    stub = stub_of(stack.enter_context(serving(follower)), stack)
    error = refused(lambda: stub.QueryChangefeed(pb.ChangefeedRequest(changefeed="no"), timeout=TIMEOUT_S))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no changefeed default/no; there: default/test")
    error = refused(lambda: list(stub.MoveTable(pb.MoveTableRequest(table="x.y", target="a"), timeout=TIMEOUT_S)))
    assert error.code() == grpc.StatusCode.NOT_FOUND


def test_two_followers_that_take_each_other_for_the_leader_refuse(view: AdminView, stack: ExitStack) -> None:
    """A call makes one hop and never circulates; the client learns that it may retry."""
    first, second = AdminView(view.world, "owner-1"), AdminView(view.world, "owner-2")
    first.leads = second.leads = False
    address = stack.enter_context(serving(first))
    first.records = [LeaderRecord(id="owner-2", address=stack.enter_context(serving(second)))]
    second.records = [LeaderRecord(id="owner-1", address=address)]
    stub = stub_of(address, stack)
    error = refused(lambda: stub.ListCaptures(pb.ListCapturesRequest(), timeout=TIMEOUT_S))
    assert (error.code(), has_retry_key(error)) == (grpc.StatusCode.UNAVAILABLE, True)
    assert "owner-2 does not lead; try again" in error.details()
    error = refused(lambda: list(stub.ListTables(pb.ListTablesRequest(), timeout=TIMEOUT_S)))
    assert (error.code(), has_retry_key(error)) == (grpc.StatusCode.UNAVAILABLE, True)
    assert stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).answered_by == "owner-2"


def test_a_forwarded_call_is_never_forwarded_again(follower: AdminView, stack: ExitStack) -> None:
    """This holds even if the follower knows a leader."""
    stub = stub_of(stack.enter_context(serving(follower)), stack)
    metadata = ((FORWARDED_KEY, "somebody"),)
    error = refused(lambda: stub.ListCaptures(pb.ListCapturesRequest(), timeout=TIMEOUT_S, metadata=metadata))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


def test_without_a_leader_only_status_is_answered(follower: AdminView, stack: ExitStack) -> None:
    """The status says that there is no leader."""
    follower.records = []
    stub = stub_of(stack.enter_context(serving(follower)), stack)
    assert not stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).HasField("leader")
    error = refused(lambda: stub.ListChangefeeds(pb.ListChangefeedsRequest(), timeout=TIMEOUT_S))
    assert has_retry_key(error)
    assert "no leader is known" in error.details()
    follower.error = "etcd a:1: no answer"
    error = refused(lambda: stub.ListChangefeeds(pb.ListChangefeedsRequest(), timeout=TIMEOUT_S))
    assert has_retry_key(error)
    assert error.details() == f"owner {follower.owner_id} does not lead and cannot be elected: etcd a:1: no answer; try again"


def test_an_owner_without_etcd_says_what_it_cannot_know(view: AdminView, stub: Any) -> None:
    """It does not know the changefeeds, nor the leader unless it leads; it says why."""
    view.error = "etcd a:1: no answer"
    status = stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert (status.problem, dict(status.changefeeds_by_state)) == ("etcd a:1: no answer", {})
    assert status.leader.id == view.owner_id
    view.leads = False
    status = stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert not status.HasField("leader")
    view.error = ""
    status = stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert (status.problem, status.leader.id) == ("", view.owner_id)
    assert status.changefeeds_by_state


def test_a_dead_leader_is_named(follower: AdminView, stack: ExitStack, free_port: int) -> None:
    """The call was not sent to it, so the client may retry."""
    follower.records = [LeaderRecord(id="owner-1", address=f"127.0.0.1:{free_port}")]
    stub = stub_of(stack.enter_context(serving(follower)), stack)
    error = refused(lambda: stub.ListCaptures(pb.ListCapturesRequest(), timeout=TIMEOUT_S))
    assert (error.code(), has_retry_key(error)) == (grpc.StatusCode.UNAVAILABLE, True)
    assert f"the leader owner-1 at 127.0.0.1:{free_port} does not answer" in error.details()


def test_waiting_calls_are_limited_and_others_are_answered(view: AdminView, stub: Any) -> None:
    """A call beyond the limit starts no job; reads are answered meanwhile, and cancelling frees the places."""
    target = target_of(view, 1)
    request = pb.MoveTableRequest(table="1", target=target, wait_done=True, wait_ms=60_000)
    calls = [stub.MoveTable(request, timeout=60) for _ in range(WAITERS_MAX)]
    for call in calls:
        assert next(call).state == "pending"
    error = refused(lambda: list(stub.MoveTable(request, timeout=TIMEOUT_S)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(view.world.scheduler.queries()) == WAITERS_MAX
    assert len(stub.ListCaptures(pb.ListCapturesRequest(), timeout=TIMEOUT_S).captures) == 3
    for call in calls:
        call.cancel()
    deadline = time.monotonic() + TIMEOUT_S
    with ticking(view):
        while True:
            call = stub.MoveTable(pb.MoveTableRequest(table="2", target=target_of(view, 2)), timeout=TIMEOUT_S)
            last = next(reversed(_messages(call)), None)
            if last is not None:
                assert last.state in ("accepted", "done")
                return
            assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert time.monotonic() < deadline


def test_an_oversize_request_changes_nothing(view: AdminView, stub: Any) -> None:
    """It is refused before it is parsed."""
    request = pb.CreateChangefeedRequest(changefeed="new", source_uri="a:b", sink_uri="a:b", tables=["x" * (2 << 20)])
    error = refused(lambda: stub.CreateChangefeed(request, timeout=TIMEOUT_S))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(view.store.infos) == 1


def test_bytes_that_are_no_message_are_refused(view: AdminView, stack: ExitStack) -> None:
    """gRPC fails this call alone."""
    address = stack.enter_context(serving(view))
    channel = stack.enter_context(grpc.insecure_channel(address))
    call = channel.unary_unary("/tablewire.v1.Admin/PauseChangefeed")
    assert refused(lambda: call(b"\xff\xff\xff", timeout=TIMEOUT_S)).code() is not grpc.StatusCode.OK
    assert view.store.list()[0].state.value == "normal"


def test_passwords_never_leave_the_owner(view: AdminView, stub: Any) -> None:
    """Neither a list nor a query shows them."""
    view.store.create(paused())
    answer = stub.ListChangefeeds(pb.ListChangefeedsRequest(), timeout=TIMEOUT_S)
    assert "secret" not in str(answer)
    assert {row.source_uri for row in answer.changefeeds} == {"postgresql://me:***@source/db"}
    assert {row.sink_uri for row in answer.changefeeds} == {"postgresql://me:${SINK_PASSWORD}@sink/db"}


def test_a_silent_stream_outlasts_many_pings(view: AdminView, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients ping an idle connection; the server must not treat that as abuse, as a stricter one does after three pings.
    The intervals are half of those in use, which is the shortest that gRPC keeps."""

    def stub_of(min_ping_interval_ms: int) -> Any:
        monkeypatch.setattr("tablewire.runtime.grpc.MIN_PING_INTERVAL_MS", min_ping_interval_ms)
        channel = stack.enter_context(open_channel(stack.enter_context(serving(view))))
        return admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]

    monkeypatch.setattr("tablewire.runtime.grpc.KEEPALIVE_INTERVAL_MS", KEEPALIVE_INTERVAL_MS // 2)
    refused_call = stub_of(60_000).ListEvents(pb.ListEventsRequest(follow=True), timeout=TIMEOUT_S)
    request = pb.MoveTableRequest(table="1", target=target_of(view, 1), wait_ms=2 * KEEPALIVE_INTERVAL_MS)
    jobs = list(stub_of(MIN_PING_INTERVAL_MS // 2).MoveTable(request, timeout=TIMEOUT_S))
    assert [job.state for job in jobs] == ["pending"]
    assert refused(lambda: list(refused_call)).code() == grpc.StatusCode.UNAVAILABLE


def test_followed_events_come_as_they_happen_and_end_with_the_term(view: AdminView, stub: Any) -> None:
    """The first message comes at once, even an empty one; when the leader steps down the client may retry."""
    call = stub.ListEvents(pb.ListEventsRequest(follow=True), timeout=TIMEOUT_S)
    assert not next(call).events
    view.events.add("capture_joined", subject="a")
    assert [event.subject for event in next(call).events] == ["a"]
    view.events.add("capture_gone", subject="a")
    assert [(event.sequence, event.kind) for event in next(call).events] == [(2, "capture_gone")]
    view.leads = False
    assert has_retry_key(refused(lambda: next(call)))


def test_followers_are_limited_and_leave_room_for_others(stub: Any) -> None:
    """The error names the limit; a call that lists events is answered nevertheless."""
    calls = [stub.ListEvents(pb.ListEventsRequest(follow=True), timeout=TIMEOUT_S) for _ in range(FOLLOWERS_MAX)]
    for call in calls:
        next(call)
    error = refused(lambda: next(stub.ListEvents(pb.ListEventsRequest(follow=True), timeout=TIMEOUT_S)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"{FOLLOWERS_MAX} calls that follow events" in error.details()
    assert not next(stub.ListEvents(pb.ListEventsRequest(), timeout=TIMEOUT_S)).events
    for call in calls:
        call.cancel()
