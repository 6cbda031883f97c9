"""The etcd session with a real member: reads, guarded writes, leases, errors, lost responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from google.protobuf.internal import api_implementation

from deploy.local.etcd import EtcdServer
from deploy.local.proxy import Direction, TcpProxy
from tablewire.errors import ClosedError, EtcdError
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import (
    Compare,
    EtcdUnavailableError,
    KeyValue,
    LeaseLostError,
    Put,
    is_absent,
    is_created_at,
    is_unchanged,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def session(etcd_server: EtcdServer) -> Iterator[EtcdSession]:
    session = EtcdSession([etcd_server.endpoint])
    yield session
    session.close()


@pytest.fixture
def proxy(etcd_server: EtcdServer) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", etcd_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def behind_proxy(proxy: TcpProxy, etcd_server: EtcdServer) -> Iterator[EtcdSession]:
    """Provide a session that uses the member through a proxy first, and directly after that failed."""
    session = EtcdSession([proxy.endpoint, etcd_server.endpoint], request_timeout_ms=500)
    yield session
    session.close()


def test_protobuf_runs_on_upb() -> None:
    """The fast implementation of protobuf is in use, and the generated code of etcd3 works with it."""
    assert api_implementation.Type() == "upb"


def test_a_key_has_a_value_and_its_revisions(session: EtcdSession, etcd_prefix: str) -> None:
    """A key is read back with its value, its create revision and its mod revision."""
    key = f"{etcd_prefix}/a"
    assert session.get(key) is None
    created = session.put(key, b"1")
    changed = session.put(key, b"\x00\xff")
    assert session.get(key) == KeyValue(key, b"\x00\xff", created, changed)
    session.delete(key)
    assert session.get(key) is None


def test_a_prefix_is_read_at_one_revision(session: EtcdSession, etcd_prefix: str) -> None:
    """All keys below a prefix are returned in order, and no other key."""
    for name in ("p/b", "p/a", "p0", "o"):
        revision = session.put(f"{etcd_prefix}/{name}", name.encode())
    items, at = session.get_prefix(f"{etcd_prefix}/p/")
    assert [item.key for item in items] == [f"{etcd_prefix}/p/a", f"{etcd_prefix}/p/b"]
    assert at >= revision


def test_a_transaction_is_all_or_nothing(session: EtcdSession, etcd_prefix: str) -> None:
    """A failed compare changes nothing and returns the stored keys; otherwise puts and deletes are
    applied together.
    """
    old, new, guard = (f"{etcd_prefix}/{name}" for name in ("old", "new", "guard"))
    session.put(old, b"x")
    created = session.put(guard, b"g")
    refused = session.transact([is_absent(guard), is_absent(new)], [Put(new, b"y")], [old], read_on_failure=[guard])
    assert not refused
    assert refused.found[guard].create_revision == created
    assert session.get(old) is not None
    assert session.get(new) is None
    done = session.transact([is_created_at(guard, created), is_unchanged(new, 0)], [Put(new, b"y")], [old])
    assert done
    assert session.get(old) is None
    found = session.get(new)
    assert found is not None
    assert found.mod_revision == done.revision


@pytest.mark.parametrize("compare", [is_created_at, is_unchanged])
def test_every_compare_target_compares(session: EtcdSession, etcd_prefix: str, compare: Callable[[str, int], Compare]) -> None:
    """A compare holds for the right revision and fails for another one."""
    revision = session.put(etcd_prefix, b"v")
    assert session.put_if(compare(etcd_prefix, revision), f"{etcd_prefix}/x", b"")
    assert not session.put_if(compare(etcd_prefix, 1), f"{etcd_prefix}/x", b"")


def test_a_lease_takes_its_keys_along(session: EtcdSession, etcd_prefix: str) -> None:
    """Revoking a lease deletes its keys; keeping it alive after that is LeaseLostError; revoking it
    again does nothing.
    """
    lease, ttl_s = session.grant(60)
    assert ttl_s == 60
    session.put(etcd_prefix, b"x", lease=lease)
    assert session.keep_alive_once(lease) == 60
    session.revoke(lease)
    assert session.get(etcd_prefix) is None
    with pytest.raises(LeaseLostError):
        session.keep_alive_once(lease)
    session.revoke(lease)
    with pytest.raises(LeaseLostError):
        session.put(etcd_prefix, b"x", lease=lease)


def test_a_refusal_of_etcd_is_one_clear_error(session: EtcdSession, etcd_prefix: str) -> None:
    """A refusal is an EtcdError with the member, the request and the reason, in one line."""
    with pytest.raises(EtcdError, match="too many operations") as caught:
        session.transact([], [Put(f"{etcd_prefix}/{number}", b"") for number in range(200)])
    assert session.endpoints[0] in str(caught.value)
    assert not isinstance(caught.value, EtcdUnavailableError)
    with pytest.raises(EtcdError, match="request is too large"):
        session.put(etcd_prefix, bytes(1_900_000))


def test_an_unreachable_etcd_is_reported_in_bounded_time(free_port: int) -> None:
    """Without a member every operation soon raises EtcdUnavailableError, which names the endpoint."""
    session = EtcdSession([f"127.0.0.1:{free_port}"], request_timeout_ms=300)
    start = time.monotonic()
    with pytest.raises(EtcdUnavailableError, match=f"127.0.0.1:{free_port}"):
        session.get("/a")
    with pytest.raises(EtcdUnavailableError):
        session.grant(5)
    assert time.monotonic() - start < 3
    session.close()


def test_a_silent_etcd_is_given_up_in_bounded_time(proxy: TcpProxy) -> None:
    """A member that accepts the connection and never answers costs at most two timeouts."""
    session = EtcdSession([proxy.endpoint], request_timeout_ms=300)
    assert session.get("/a") is None
    proxy.stall()
    start = time.monotonic()
    with pytest.raises(EtcdUnavailableError, match="no answer in time"):
        session.get("/a")
    assert time.monotonic() - start < 2
    proxy.heal()
    assert session.get("/a") is None
    session.close()


def test_a_closed_session_says_so(etcd_server: EtcdServer) -> None:
    """After close every call raises ClosedError; close is idempotent."""
    session = EtcdSession([etcd_server.endpoint])
    session.close()
    session.close()
    with pytest.raises(ClosedError):
        session.get("/a")
    with pytest.raises(ClosedError):
        session.watch_prefix("/a")


def test_a_read_goes_to_the_next_member(behind_proxy: EtcdSession, proxy: TcpProxy, etcd_prefix: str) -> None:
    """A read whose member does not answer is repeated on another one, in the same call."""
    behind_proxy.put(etcd_prefix, b"x")
    proxy.stall()
    found = behind_proxy.get(etcd_prefix)
    assert found is not None


def test_a_write_whose_response_was_lost_is_recognised(
    behind_proxy: EtcdSession, session: EtcdSession, proxy: TcpProxy, etcd_prefix: str
) -> None:
    """A guarded write that was applied while its response was lost is repeated and reported as
    applied.
    """
    assert behind_proxy.get(etcd_prefix) is None
    proxy.cut(Direction.FROM_TARGET)
    result = behind_proxy.put_if(is_absent(etcd_prefix), etcd_prefix, b"mine")
    found = session.get(etcd_prefix)
    assert found is not None
    assert result.applied
    assert (found.value, found.mod_revision, found.create_revision) == (b"mine", result.revision, result.revision)


def test_a_lost_race_is_not_mistaken_for_an_own_write(
    behind_proxy: EtcdSession, session: EtcdSession, proxy: TcpProxy, etcd_prefix: str
) -> None:
    """A guarded write that was not applied, because another one was, is reported as refused after
    its repetition.
    """
    assert behind_proxy.get(etcd_prefix) is None
    session.put(etcd_prefix, b"theirs")
    proxy.stall()
    result = behind_proxy.put_if(is_absent(etcd_prefix), etcd_prefix, b"mine")
    assert not result.applied
    assert result.found[etcd_prefix].value == b"theirs"


def test_an_unguarded_write_is_never_repeated(
    behind_proxy: EtcdSession, session: EtcdSession, proxy: TcpProxy, etcd_prefix: str
) -> None:
    """A write whose repetition could undo a later one raises EtcdUnavailableError, and the next
    call uses another member.
    """
    assert behind_proxy.get(etcd_prefix) is None
    proxy.stall()
    with pytest.raises(EtcdUnavailableError, match="no answer in time"):
        behind_proxy.put(etcd_prefix, b"1")
    second = behind_proxy.put(etcd_prefix, b"2")
    found = session.get(etcd_prefix)
    assert found is not None
    assert (found.value, found.mod_revision) == (b"2", second)
