"""A lease with real etcd and a clock that can jump, as after a machine was suspended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.etcd import EtcdServer
from deploy.local.process import wait_until
from tablewire.errors import EtcdError
from tablewire.etcd.lease import LeaseKeeper, lease_clock
from tablewire.etcd.session import EtcdSession
from tablewire.runtime.sections import default_margin_s
from tablewire.runtime.shutdown import run_thread

pytestmark = pytest.mark.integration

TIMEOUT_S = 10.0


class JumpingClock:
    """The clock of a lease. jumped_s: how far it has jumped."""

    def __init__(self) -> None:
        self.jumped_s = 0.0

    def __call__(self) -> float:
        return lease_clock() + self.jumped_s


@pytest.fixture
def session(etcd_server: EtcdServer) -> Iterator[EtcdSession]:
    session = EtcdSession([etcd_server.endpoint])
    yield session
    session.close()


def test_the_deadline_is_before_etcds(session: EtcdSession) -> None:
    """The deadline counts from when the request was sent, less the margin, never from the response."""
    before = lease_clock()
    keeper = LeaseKeeper(session, ttl_s=9.5, margin_s=2, on_lost=lambda _reason: None)
    after = lease_clock()
    assert before + 10 - 2 <= keeper.deadline() <= after + 10 - 2
    keeper.close()
    assert not keeper.is_valid()
    session.revoke(keeper.lease_id)


def test_a_jump_of_the_clock_is_seen_at_the_next_check_and_never_forgotten(session: EtcdSession) -> None:
    """After the deadline the lease is invalid, no keep-alive is sent although it would succeed, and
    on_lost is called once.
    """
    clock = JumpingClock()
    reasons: list[str] = []
    keeper = LeaseKeeper(session, ttl_s=60, on_lost=reasons.append, clock=clock)
    assert keeper.is_valid()
    clock.jumped_s = 60
    assert not keeper.is_valid()
    thread = run_thread("lease", keeper.run)
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert reasons == ["the lease was not renewed in time"]
    clock.jumped_s = 0
    assert not keeper.is_valid()
    keeper.lose("again")
    assert len(reasons) == 1
    assert session.keep_alive_once(keeper.lease_id) == 60  # etcd still has it
    session.revoke(keeper.lease_id)


def test_a_revoked_lease_is_lost_with_its_reason(session: EtcdSession) -> None:
    """The next keep-alive finds that the lease does not exist."""
    clock = JumpingClock()
    reasons: list[str] = []
    keeper = LeaseKeeper(session, ttl_s=60, on_lost=reasons.append, clock=clock)
    session.revoke(keeper.lease_id)
    clock.jumped_s = 30  # a keep-alive is due
    run_thread("lease", keeper.run).join(TIMEOUT_S)
    assert "expired or was revoked" in reasons[0]
    assert keeper.lost_reason == reasons[0]


def test_a_closed_lease_is_not_lost(session: EtcdSession) -> None:
    """close ends the thread and calls no callback."""
    reasons: list[str] = []
    keeper = LeaseKeeper(session, ttl_s=60, on_lost=reasons.append)
    thread = run_thread("lease", keeper.run)
    keeper.close()
    keeper.close()
    thread.join(TIMEOUT_S)
    wait_until("the thread has ended", lambda: not thread.is_alive(), TIMEOUT_S)
    keeper.lose("late")
    assert reasons == []
    session.revoke(keeper.lease_id)


def test_margins_are_checked(session: EtcdSession) -> None:
    """The default margin has bounds, and a margin as long as the lease is refused."""
    assert (default_margin_s(1), default_margin_s(5), default_margin_s(600)) == (0.3, 1.0, 2.0)
    with pytest.raises(ValueError, match="cannot have a margin of 2 s"):
        LeaseKeeper(session, ttl_s=2, margin_s=2, on_lost=lambda _reason: None)


def test_a_lease_without_etcd_is_an_error(free_port: int) -> None:
    """The constructor raises EtcdError if no member answers."""
    session = EtcdSession([f"127.0.0.1:{free_port}"], request_timeout_ms=200)
    with pytest.raises(EtcdError, match="grant a lease"):
        LeaseKeeper(session, ttl_s=2, on_lost=lambda _reason: None)
    session.close()
