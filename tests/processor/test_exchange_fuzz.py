"""The Exchange, fed with anything over real gRPC: a processor refuses by a declared code, and an owner counts a bad answer."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deploy.local.process import wait_until
from owner.exchange.hub import ExchangeHub
from owner.owner_config import OwnerExchangeSection
from processor.service.exchange_server import ExchangeServer
from tablewire.errors import CodecError
from tablewire.model.ids import CaptureInfo
from tablewire.model.messages import Batch
from tablewire.runtime.grpc import listen, new_server, open_channel
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, decode_batch, encode_batch
from tests.processor.test_exchange import ACTIVE, CAPTURE, OWNER, REVISION, asked, batch_of, reply, response

TIMEOUT_S = 20.0
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = encode_batch(batch_of(asked(1), asked(2)))
ANSWER = encode_batch(Batch(CAPTURE, OWNER, REVISION, (), (reply(1), reply(2, response()))))


@st.composite
def spoiled(draw: st.DrawFn, good: bytes) -> bytes:
    """The good message with a few bytes changed, cut off and appended; or anything at all."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    data = bytearray(good)
    for at, byte in draw(st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4)):
        data[at] = byte
    return bytes(data[: draw(st.integers(len(good) // 2, len(good)))]) + draw(st.binary(max_size=8))


def decoded(data: bytes) -> Batch | None:
    try:
        return decode_batch(data)
    except CodecError:
        return None


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ExchangeServer, grpc.Channel]]:
    """A processor's server whose loop is the test."""
    server = ExchangeServer(CAPTURE, "127.0.0.1", 0, exchange_wait_ms=1)
    server.start()
    channel = open_channel(f"127.0.0.1:{server.port}")
    yield server, channel
    channel.close()
    server.stop(0)


@FUZZ
@given(spoiled(GOOD))
@example(GOOD)
@example(b"")
def test_a_processor_takes_batches_alone(served: tuple[ExchangeServer, grpc.Channel], data: bytes) -> None:
    """What is a batch for this capture, of the newest owner, is taken in whole; anything else is refused with its reason and
    counted, and nothing of it reaches the loop."""
    server, channel = served
    batch, before = decoded(data), server.stats
    code, text = grpc.StatusCode.OK, ""
    try:
        channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")(data, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        code, text = error.code(), error.details()
    taken = [pending.batch for pending in server.take()]
    if batch is None:
        assert (code, server.stats.invalid) == (grpc.StatusCode.INVALID_ARGUMENT, before.invalid + 1)
        assert text.startswith("bad batch: ")
        assert len(text) > len("bad batch: ")
    elif batch.receiver != CAPTURE or batch.owner_revision < before.seen_revision:
        assert (code, server.stats.refused) == (grpc.StatusCode.FAILED_PRECONDITION, before.refused + 1)
    else:
        assert code is grpc.StatusCode.OK, text
    assert taken == ([batch] if code is grpc.StatusCode.OK else [])


class Liar:
    """A capture that answers the bytes that a test sets."""

    def __init__(self) -> None:
        self.answer = b""
        self.server = new_server(max_workers=2, max_concurrent_rpcs=8, thread_name="liar")
        handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: self.answer)
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(EXCHANGE_SERVICE, {EXCHANGE_METHOD: handler}),)
        )
        self.port = listen(self.server, "127.0.0.1", 0)
        self.server.start()


@pytest.fixture(scope="module")
def lied_to() -> Iterator[tuple[ExchangeHub, Liar]]:
    """The hub of an owner that calls a liar all the time."""
    liar = Liar()
    hub = ExchangeHub(OWNER, config=OwnerExchangeSection(timeout_ms=5_000, idle_ms=1, failure_pause_ms=1))
    hub.set_term(REVISION)
    hub.set_captures({CAPTURE: CaptureInfo(CAPTURE, f"127.0.0.1:{liar.port}")})
    hub.set_active(ACTIVE)
    yield hub, liar
    hub.close()
    liar.server.stop(0).wait()


@FUZZ
@given(spoiled(ANSWER))
@example(ANSWER)
@example(b"")
def test_an_owner_outlives_any_answer(lied_to: tuple[ExchangeHub, Liar], data: bytes) -> None:
    """What is no answer to this very call is a failure of that capture, reported as such, and the next call is made."""
    hub, liar = lied_to
    liar.answer = data
    made = hub.client_views()[0].exchanges
    wait_until("two more calls are made", lambda: hub.client_views()[0].exchanges >= made + 3, TIMEOUT_S)  # one may be under way
    batch, peer = decoded(data), hub.client_views()[0]
    is_good = batch is not None and (batch.sender, batch.receiver, batch.owner_revision) == (CAPTURE, OWNER, REVISION)
    assert (peer.consecutive_failures == 0) is is_good, peer.last_error
    assert is_good or peer.last_error.startswith("bad answer: ")
