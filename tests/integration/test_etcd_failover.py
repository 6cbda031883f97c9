"""Session, watch and lease with three real members: one is lost or frozen, or all are restarted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from deploy.local.etcd import EtcdCluster
from deploy.local.process import wait_until
from tablewire.errors import EtcdError
from tablewire.etcd.lease import LeaseKeeper
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import EtcdUnavailableError
from tablewire.etcd.watch import PrefixWatch
from tablewire.runtime.shutdown import run_thread

pytestmark = pytest.mark.integration

TIMEOUT_S = 20.0
LEASE_TTL_S = 10.0


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
def cluster(members: EtcdCluster) -> Iterator[EtcdCluster]:
    """Provide three healthy members before and after each test."""
    members.start()
    yield members
    for member in members.members:
        if member.running:
            member.resume()


@pytest.fixture
def session(cluster: EtcdCluster) -> Iterator[EtcdSession]:
    session = EtcdSession(cluster.endpoints, request_timeout_ms=1_000)
    yield session
    session.close()


@pytest.fixture
def keeper(session: EtcdSession) -> Iterator[LeaseKeeper]:
    """Provide a lease that is kept alive."""
    keeper = LeaseKeeper(session, ttl_s=LEASE_TTL_S, on_lost=lambda _reason: None)
    thread = run_thread("lease", keeper.run)
    yield keeper
    keeper.close()
    thread.join(TIMEOUT_S)


def put_until(session: EtcdSession, key: str, value: bytes, watch: PrefixWatch) -> None:
    """Put the value, again if etcd does not answer, until the watch has it."""

    def done() -> bool:
        state = watch.state
        if state is not None and (found := state.entries.get(key)) is not None and found.value == value:
            return True
        try:
            session.put(key, value)
        except EtcdUnavailableError:
            return False
        return False

    wait_until(f"the watch sees {key} = {value!r}", done, TIMEOUT_S)


def renewed(keeper: LeaseKeeper) -> Callable[[], bool]:
    """Return a condition that is true once the lease has been renewed again."""
    before = keeper.deadline()
    return lambda: keeper.deadline() > before


def test_the_member_in_use_is_killed(cluster: EtcdCluster, session: EtcdSession, keeper: LeaseKeeper, etcd_prefix: str) -> None:
    """Reads and guarded writes succeed within the call, the watch resumes, and the lease is kept."""
    watch = session.watch_prefix(f"{etcd_prefix}/")
    put_until(session, f"{etcd_prefix}/a", b"1", watch)
    session.put(f"{etcd_prefix}/lease", b"x", lease=keeper.lease_id)
    cluster.members[cluster.endpoints.index(session.members.pick().endpoint)].kill()
    wait_until("a read succeeds", lambda: _readable(session, f"{etcd_prefix}/a"), TIMEOUT_S)
    put_until(session, f"{etcd_prefix}/a", b"2", watch)
    wait_until("the lease is renewed", renewed(keeper), TIMEOUT_S)
    assert keeper.is_valid()
    assert not keeper.lost_reason
    assert session.get(f"{etcd_prefix}/lease") is not None


def test_a_frozen_member_is_replaced(cluster: EtcdCluster, session: EtcdSession, keeper: LeaseKeeper, etcd_prefix: str) -> None:
    """A member that is stopped with open connections costs one timeout; the watch moves on, and the
    lease is kept.
    """
    watch = session.watch_prefix(f"{etcd_prefix}/")
    put_until(session, f"{etcd_prefix}/a", b"1", watch)
    cluster.members[cluster.endpoints.index(session.members.pick().endpoint)].pause()
    put_until(session, f"{etcd_prefix}/a", b"2", watch)
    wait_until("the lease is renewed", renewed(keeper), TIMEOUT_S)
    assert keeper.is_valid()


def test_a_member_without_quorum_ends_its_watches(cluster: EtcdCluster, session: EtcdSession, etcd_prefix: str) -> None:
    """A watch on a member that lost its peers reports it instead of staying silent, and continues
    when they are back.
    """
    watch = session.watch_prefix(f"{etcd_prefix}/")
    put_until(session, f"{etcd_prefix}/a", b"1", watch)
    in_use = session.members.pick().endpoint
    others = [member for member in cluster.members if member.endpoint != in_use]
    for member in others:
        member.pause()
    wait_until("the watch says that it is broken", lambda: bool(watch.error), TIMEOUT_S)
    with pytest.raises(EtcdError):
        session.get(f"{etcd_prefix}/a")
    for member in others:
        member.resume()
    put_until(session, f"{etcd_prefix}/a", b"2", watch)


def test_all_members_are_restarted(cluster: EtcdCluster, session: EtcdSession, keeper: LeaseKeeper, etcd_prefix: str) -> None:
    """Without any member calls fail in bounded time; when all are back, watch, writes and lease
    continue.
    """
    watch = session.watch_prefix(f"{etcd_prefix}/")
    put_until(session, f"{etcd_prefix}/a", b"1", watch)
    cluster.kill()
    with pytest.raises(EtcdUnavailableError):
        session.get(f"{etcd_prefix}/a")
    wait_until("the watch says that it is broken", lambda: bool(watch.error), TIMEOUT_S)
    cluster.start()
    put_until(session, f"{etcd_prefix}/a", b"2", watch)
    wait_until("the lease is kept or known as lost", lambda: bool(keeper.lost_reason) or keeper.is_valid(), TIMEOUT_S)
    if not keeper.lost_reason:
        wait_until("the lease is renewed", renewed(keeper), TIMEOUT_S)


def _readable(session: EtcdSession, key: str) -> bool:
    try:
        return session.get(key) is not None
    except EtcdUnavailableError:  # the raft leader died, and the others are electing
        return False
