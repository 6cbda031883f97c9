"""Rate limits: the token bucket, and the answers of a real server."""

from __future__ import annotations

from collections import Counter

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owner.admin import grpc_service as api
from processor.service import exchange_server as exchange
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.rates import RateLimit
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE
from tests.owner.admin_world import FEED, AdminView, serving

TIMEOUT_S = 30.0


@given(st.lists(st.floats(0.0, 0.5), max_size=100), st.integers(1, 20), st.integers(1, 20))
def test_never_more_than_the_rate_and_the_burst(pauses: list[float], per_s: int, burst: int) -> None:
    """In any period at most burst + rate * time calls are accepted; after a quiet period a burst is."""
    now = 0.0
    limit = RateLimit(per_s, burst, lambda: now)
    passed = 0
    for pause in pauses:
        now += pause
        passed += limit.allows()
        assert passed <= burst + per_s * now + 1e-6
    now += burst / per_s + 1e-6
    assert all(limit.allows() for _ in range(burst))
    assert not limit.allows()


def codes_of(call: grpc.UnaryUnaryMultiCallable, request: bytes, times: int) -> Counter[grpc.StatusCode]:
    """Return the outcome of that number of calls, one after the other."""
    found: Counter[grpc.StatusCode] = Counter()
    for _ in range(times):
        try:
            call(request, timeout=TIMEOUT_S)
            found[grpc.StatusCode.OK] += 1
        except grpc.RpcError as error:
            found[error.code()] += 1
    return found


def test_admin_calls_beyond_the_rate_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused calls change nothing; a stream is refused in the same way."""
    monkeypatch.setattr(api, "CALLS_PER_S_MAX", 0.001)
    monkeypatch.setattr(api, "CALLS_BURST_MAX", 3)
    view = AdminView()
    view.world.settle()
    with serving(view) as address:
        channel = open_channel(address)
        status = channel.unary_unary("/tablewire.v1.Admin/GetStatus")
        assert codes_of(status, b"", 5) == {grpc.StatusCode.OK: 3, grpc.StatusCode.RESOURCE_EXHAUSTED: 2}
        with pytest.raises(grpc.RpcError, match="nothing was done, try again"):
            channel.unary_unary("/tablewire.v1.Admin/PauseChangefeed")(b"\n\x04test", timeout=TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream("/tablewire.v1.Admin/ListTables")(b"", timeout=TIMEOUT_S))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        channel.close()
    assert {str(name): info.state for name, info in view.store.infos.items()} == {FEED: "normal"}


def test_exchanges_beyond_the_rate_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor neither receives refused calls nor counts them as invalid."""
    monkeypatch.setattr(exchange, "CALLS_PER_S_MAX", 0.001)
    monkeypatch.setattr(exchange, "CALLS_BURST_MAX", 2)
    server = exchange.ExchangeServer("capture-1", "127.0.0.1", 0)
    server.start()
    channel = open_channel(f"127.0.0.1:{server.port}")
    call = channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")
    found = codes_of(call, b"nonsense", 6)
    assert found == {grpc.StatusCode.INVALID_ARGUMENT: 2, grpc.StatusCode.RESOURCE_EXHAUSTED: 4}
    assert (server.stats.invalid, server.take()) == (2, [])
    channel.close()
    server.stop(0)
