"""The admin API with arbitrary requests: it answers or refuses with a declared code, and breaks nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import grpc
import msgspec
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from owner.admin.grpc_service import AdminServicer
from tablewire.runtime.grpc import open_channel
from tablewire.v1 import admin_pb2 as pb
from tests.owner.admin_world import AdminView, serving

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"]
METHODS = {method.name: method for method in SERVICE.methods}
DECLARED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
UNPARSABLE = "Exception deserializing request!"
"""What grpc itself says, as INTERNAL, of bytes that are no message."""
TIMEOUT_S = 30.0
EVENTS = 20
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[AdminView, grpc.Channel]]:
    """Serve a leader with the changefeed default/test that is never ticked, so that only calls
    change something. It is the only owner, so that it cannot resign, and has some events."""
    view = AdminView()
    view.world.settle()
    for number in range(EVENTS):
        view.events.add("happened", subject=str(number))
    with serving(view) as address:
        channel = open_channel(address)
        yield view, channel
        channel.close()


def call(channel: grpc.Channel, name: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Call a method and return its status. A stream that waits for a tick ends as DEADLINE_EXCEEDED."""
    method = f"/{SERVICE.full_name}/{name}"
    try:
        if METHODS[name].server_streaming:
            list(channel.unary_stream(method)(data, timeout=0.2))
        else:
            channel.unary_unary(method)(data, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def is_request(name: str, data: bytes) -> bool:
    try:
        METHODS[name].input_type._concrete_class().ParseFromString(data)
    except DecodeError:
        return False
    return True


def allowed(name: str, data: bytes, code: grpc.StatusCode, text: str) -> bool:
    """Return whether a call with these bytes may end like this."""
    if not is_request(name, data):
        return code is grpc.StatusCode.INTERNAL and UNPARSABLE in text
    return (
        code is grpc.StatusCode.OK
        or code in DECLARED
        or (code is grpc.StatusCode.DEADLINE_EXCEEDED and METHODS[name].server_streaming)
    )


names = st.sampled_from(sorted(METHODS))
words = st.text(max_size=40)


@FUZZ
@given(names, st.binary(max_size=120))
@example("PauseChangefeed", b"")
def test_random_bytes_change_nothing(served: tuple[AdminView, grpc.Channel], name: str, data: bytes) -> None:
    """Only a valid request changes the stored changefeeds, and the next caller is answered."""
    view, channel = served
    before = dict(view.store.infos)
    code, text = call(channel, name, data)
    assert allowed(name, data, code, text), (code, text)
    if view.store.infos != before:
        # A request without a name is a good one while there is one changefeed, and no bytes at all are such a request.
        assert name in ("PauseChangefeed", "ResumeChangefeed")
        assert is_request(name, data)
        view.store.infos = before
    assert call(channel, "GetStatus", b"")[0] is grpc.StatusCode.OK


@FUZZ
@given(words, words, words, st.lists(words, max_size=3), st.dictionaries(words, words, max_size=2))
def test_random_changefeeds_are_refused_or_good(
    served: tuple[AdminView, grpc.Channel], name: str, source: str, sink: str, tables: list[str], options: dict[str, str]
) -> None:
    """`create` refuses with a declared code, or stores a record that can be read again; a dry run
    stores nothing."""
    view, channel = served
    before = dict(view.store.infos)
    request = pb.CreateChangefeedRequest(
        changefeed=name, source_uri=source, sink_uri=sink, tables=tables, options=options, dry_run=True
    )
    code, text = call(channel, "CreateChangefeed", request.SerializeToString())
    assert code is grpc.StatusCode.OK or code in DECLARED, (code, text)
    assert view.store.infos == before
    request.dry_run = False
    code, text = call(channel, "CreateChangefeed", request.SerializeToString())
    assert code is grpc.StatusCode.OK or code in DECLARED, (code, text)
    for changefeed in view.store.infos.keys() - before.keys():
        assert msgspec.json.encode(view.store.infos.pop(changefeed))


@FUZZ
@given(words, words, words, st.integers(0, 2**64 - 1))
def test_random_names_are_refused(
    served: tuple[AdminView, grpc.Channel], changefeed: str, table: str, target: str, number: int
) -> None:
    """Every method refuses tables, processors and changefeeds that do not exist."""
    view, channel = served
    assume(target not in view.world.alive and changefeed not in {info.id for info in view.store.infos.values()})
    requests = {
        "PauseChangefeed": pb.ChangefeedRequest(changefeed=changefeed or "x"),
        "RemoveChangefeed": pb.ChangefeedRequest(changefeed=changefeed or "x"),
        "MoveTable": pb.MoveTableRequest(changefeed="test", table=table or str(number), target=target, wait_ms=1),
        "DrainCapture": pb.DrainCaptureRequest(capture=target or "nobody"),
    }
    for name, request in requests.items():
        code, text = call(channel, name, request.SerializeToString())
        assert code in DECLARED, (name, code, text)


numbers = st.one_of(st.integers(0, EVENTS + 2), st.integers(0, 2**64 - 1))


@FUZZ
@given(numbers, st.one_of(st.integers(0, EVENTS + 2), st.integers(0, 2**32 - 1)), st.booleans())
def test_random_lists_of_events_are_what_was_asked_for(
    served: tuple[AdminView, grpc.Channel], after: int, limit: int, follow: bool
) -> None:
    """The call returns the newest events beyond `after`, in order, at once even if it follows."""
    view, channel = served
    request = pb.ListEventsRequest(after=after, limit=limit, follow=follow)
    call = channel.unary_stream(f"/{SERVICE.full_name}/ListEvents")(request.SerializeToString(), timeout=TIMEOUT_S)
    # A place for following is free once the server has noticed that the former client has gone.
    code = grpc.StatusCode.OK
    found: list[int] = []
    try:
        found = [event.sequence for event in pb.ListEventsResponse.FromString(next(call)).events]
    except grpc.RpcError as error:
        code = error.code()
    finally:
        call.cancel()
    if follow and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return
    assert code is grpc.StatusCode.OK
    there = len(view.events.events_after(0))
    expected = list(range(1, there + 1))[min(after, there) :]
    assert found == expected[-limit if limit else 0 :]


@FUZZ
@given(st.binary(max_size=60))
@example(b"")
def test_only_a_good_request_makes_a_leader_resign(data: bytes) -> None:
    """With a second owner, bytes that are no message change nothing, and any message is obeyed,
    since it has no fields."""
    view = AdminView()
    view.records.append(msgspec.structs.replace(view.records[0], id="owner-2", address="127.0.0.1:2"))
    with serving(view) as address, closing(open_channel(address)) as channel:
        code, text = call(channel, "Resign", data)
        assert allowed("Resign", data, code, text), (code, text)
        assert view.leads is not (code is grpc.StatusCode.OK)
        assert (code is grpc.StatusCode.OK) is is_request("Resign", data)


def test_every_call_is_fuzzed() -> None:
    """The service implements exactly the declared methods, so a new one gets random bytes too."""
    assert METHODS.keys() == {name for name in vars(AdminServicer) if name[0].isupper()}
