"""The election with a real etcd: one leader, and handover after a crash, a resignation or a lost
lease."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.etcd import EtcdCluster, EtcdServer
from deploy.local.process import wait_until
from deploy.local.proxy import TcpProxy
from owner.leadership.election import Election
from tablewire.errors import ConflictError, EtcdError, NotLeaderError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.records import LeaderRecord
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import EtcdUnavailableError, Put, is_absent, is_unchanged

pytestmark = pytest.mark.integration

TIMEOUT_S = 15.0
TTL_S = 10.0
SHORT_TTL_S = 3.0
"""The lease TTL of a leader whose lease should expire."""
CANDIDATE = Path(__file__).with_name("candidate_process.py")


@pytest.fixture
def cluster(etcd_prefix: str) -> str:
    """Return a cluster name that no other test uses."""
    return "election" + etcd_prefix.replace("/", "-")


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
def behind_proxy(proxy: TcpProxy) -> Iterator[EtcdSession]:
    session = EtcdSession([proxy.endpoint], request_timeout_ms=500)
    yield session
    session.close()


@pytest.fixture
def candidate(cluster: str) -> Iterator[Callable[..., Election]]:
    """Return a function that starts a candidate."""
    elections: list[Election] = []

    def enter(session: EtcdSession, owner_id: str, ttl_s: float = TTL_S, **options: float) -> Election:
        election = Election(session, cluster, owner_id, f"{owner_id}:1", ttl_s=ttl_s, **options)  # type: ignore[arg-type]
        elections.append(election)
        election.start(TIMEOUT_S)
        return election

    yield enter
    for election in elections:
        election.close()


def test_the_first_in_the_line_leads(session: EtcdSession, candidate: Callable[..., Election]) -> None:
    """The earlier candidate leads, and each candidate knows the leader and its address."""
    first, second = candidate(session, "o1"), candidate(session, "o2")
    leadership = first.wait_for_leadership(TIMEOUT_S)
    assert leadership is not None
    assert 0 < leadership.remaining_s() < TTL_S
    assert second.leadership() is None
    wait_until(
        "both know the leader", lambda: first.leader() == second.leader() == LeaderRecord(id="o1", address="o1:1"), TIMEOUT_S
    )
    wait_until("both are in the line", lambda: [c.id for c in first.candidates()] == ["o1", "o2"], TIMEOUT_S)


def test_resigning_hands_over_at_once(session: EtcdSession, candidate: Callable[..., Election]) -> None:
    """The next candidate leads long before the lease ends, with a higher revision; the one that
    resigned becomes the last."""
    first, second = candidate(session, "o1"), candidate(session, "o2")
    before = first.wait_for_leadership(TIMEOUT_S)
    assert before is not None
    start = time.monotonic()
    first.resign()
    assert first.leadership() is None
    after = second.wait_for_leadership(TIMEOUT_S)
    assert time.monotonic() - start < TTL_S / 2
    assert after is not None
    assert after.revision > before.revision
    wait_until("the first is last in the line", lambda: [c.id for c in second.candidates()] == ["o2", "o1"], TIMEOUT_S)
    second.resign()
    again = first.wait_for_leadership(TIMEOUT_S)
    assert again is not None
    assert again.revision > after.revision


def test_closing_hands_over_at_once(session: EtcdSession, candidate: Callable[..., Election]) -> None:
    """A closed candidate is no longer listed, and closing is idempotent."""
    first, second = candidate(session, "o1"), candidate(session, "o2")
    first.close()
    first.close()
    assert second.wait_for_leadership(TTL_S / 2) is not None
    assert first.leadership() is None
    wait_until("one is left", lambda: [c.id for c in second.candidates()] == ["o2"], TIMEOUT_S)


def test_changes_are_called_out(session: EtcdSession, cluster: str, candidate: Callable[..., Election]) -> None:
    """on_change is called when leadership is won and when it is lost."""
    called = threading.Event()
    election = Election(session, cluster, "o1", "o1:1", ttl_s=TTL_S, on_change=called.set)
    election.start(TIMEOUT_S)
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    assert called.wait(TIMEOUT_S)
    called.clear()
    election.resign()
    assert called.is_set()
    election.close()


def test_a_deleted_key_ends_leadership(session: EtcdSession, cluster: str, candidate: Callable[..., Election]) -> None:
    """The watch detects a deleted key, and the process becomes a candidate again with a higher
    revision."""
    election = candidate(session, "o1")
    before = election.wait_for_leadership(TIMEOUT_S)
    assert before is not None
    session.delete(election.guard().key)
    wait_until(
        "it leads at a higher revision",
        lambda: (now := election.leadership()) is not None and now.revision > before.revision,
        TIMEOUT_S,
    )


def test_doubt_ends_leadership_before_etcd_does(
    session: EtcdSession, behind_proxy: EtcdSession, proxy: TcpProxy, candidate: Callable[..., Election]
) -> None:
    """A leader that cannot renew its lease stops while its key still exists; the next one leads
    once etcd has deleted the key."""
    first, second = candidate(behind_proxy, "o1", 3.0, margin_s=1.0), candidate(session, "o2")
    before = first.wait_for_leadership(TIMEOUT_S)
    assert before is not None
    key = first.guard().key
    proxy.stall()
    wait_until("the leader gave up", lambda: first.leadership() is None, TIMEOUT_S)
    assert session.get(key) is not None
    assert second.leadership() is None
    start = time.monotonic()
    assert second.wait_for_leadership(TIMEOUT_S) is not None
    assert time.monotonic() - start < 3.0
    assert first.leadership() is None
    proxy.heal()
    wait_until("the first is back in the line", lambda: [c.id for c in second.candidates()] == ["o2", "o1"], TIMEOUT_S)
    second.close()
    after = first.wait_for_leadership(TIMEOUT_S)
    assert after is not None
    assert after.revision > before.revision


def test_a_late_keep_alive_does_not_revive(
    session: EtcdSession, behind_proxy: EtcdSession, proxy: TcpProxy, candidate: Callable[..., Election]
) -> None:
    """A lease that was given up locally is not used again, although etcd still has it: the revision
    changes."""
    election = candidate(behind_proxy, "o1", 6.0, margin_s=5.0)
    before = election.wait_for_leadership(TIMEOUT_S)
    assert before is not None
    key = election.guard().key
    proxy.stall()
    wait_until("the leader gave up", lambda: election.leadership() is None, TIMEOUT_S)
    assert session.get(key) is not None
    proxy.heal()
    after = election.wait_for_leadership(TIMEOUT_S)
    assert after is not None
    assert after.revision > before.revision
    assert session.get(key) is None


def test_a_guarded_write_tells_a_lost_race_from_lost_leadership(session: EtcdSession, candidate: Callable[..., Election]) -> None:
    """While we lead, a failed compare is a ConflictError; without our key it is a NotLeaderError;
    neither changes anything."""
    election = candidate(session, "o1")
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    key = f"{election.guard().key}-data"
    revision = election.guarded_write([Put(key, b"1")], extra_compares=[is_absent(key)])
    with pytest.raises(ConflictError, match=key):
        election.guarded_write([Put(key, b"2")], extra_compares=[is_absent(key)])
    revision = election.guarded_write([Put(key, b"3")], extra_compares=[is_unchanged(key, revision)])
    found = session.get(key)
    assert found is not None
    assert (found.value, found.mod_revision) == (b"3", revision)
    election.resign()
    with pytest.raises(NotLeaderError, match="o1"):
        election.guarded_write([Put(key, b"4")])
    found = session.get(key)
    assert found is not None
    assert found.value == b"3"


def test_a_guarded_write_of_a_deposed_leader_is_refused(
    session: EtcdSession, proxy: TcpProxy, candidate: Callable[..., Election]
) -> None:
    """A leader that hears from etcd late cannot write once its key is gone, and steps down then."""
    slow_session = EtcdSession([proxy.endpoint], request_timeout_ms=5_000)
    election = candidate(slow_session, "o1", 30.0)
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    guard = election.guard()
    proxy.delay_ms(500)
    session.delete(guard.key)
    assert election.leadership() is not None
    with pytest.raises(NotLeaderError, match="the leader key of o1 is gone"):
        election.guarded_write([Put(f"{guard.key}-data", b"x")])
    assert session.get(f"{guard.key}-data") is None
    proxy.heal()
    election.close()
    slow_session.close()


def test_an_unreadable_candidate_is_reported_and_harmless(
    session: EtcdSession, cluster: str, candidate: Callable[..., Election]
) -> None:
    """An unreadable record hides the name of the leader; the other candidates continue, and know
    that they do not lead."""
    lease, _ = session.grant(60)
    session.put(etcd_keys.owner_key(cluster, lease), b"{", lease=lease)
    election = candidate(session, "o1")
    assert election.leader() is None
    assert election.leadership() is None
    assert [record.id for record in election.candidates()] == ["o1"]
    session.revoke(lease)
    assert election.wait_for_leadership(TIMEOUT_S) is not None


def test_an_unreachable_etcd_fails_the_start_in_bounded_time(free_port: int, cluster: str) -> None:
    """With a timeout, a start without etcd fails with one error that names the endpoint."""
    session = EtcdSession([f"127.0.0.1:{free_port}"], request_timeout_ms=200)
    election = Election(session, cluster, "o1", "o1:1", ttl_s=TTL_S)
    start = time.monotonic()
    with pytest.raises(EtcdError, match=f"127.0.0.1:{free_port}"):
        election.start(0.5)
    assert time.monotonic() - start < 3
    session.close()


def test_a_start_without_a_timeout_keeps_trying(behind_proxy: EtcdSession, proxy: TcpProxy, cluster: str) -> None:
    """Without a timeout, the candidate reports the error, and leads once etcd is reachable."""
    proxy.refuse()
    election = Election(behind_proxy, cluster, "o1", "o1:1", ttl_s=TTL_S)
    election.start()
    wait_until("it says what is wrong", lambda: proxy.endpoint in election.error, TIMEOUT_S)
    assert election.leadership() is None
    proxy.heal()
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    assert not election.error
    election.close()


class CandidateProcess:
    """A process of candidate_process.py and its output."""

    def __init__(self, endpoint: str, cluster: str, owner_id: str) -> None:
        command = [sys.executable, str(CANDIDATE), endpoint, cluster, owner_id, str(SHORT_TTL_S)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.said: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def hear(self) -> str:
        """Return the next line of output."""
        return self.said.get(timeout=TIMEOUT_S)

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said.put(line.strip())


@pytest.fixture
def other_process(etcd_server: EtcdServer, cluster: str) -> Iterator[CandidateProcess]:
    """Return a candidate in another process that leads."""
    process = CandidateProcess(etcd_server.endpoint, cluster, "other")
    said = process.hear()
    assert (said if said != "follows" else process.hear()).startswith("leads ")
    yield process
    process.close()


def test_a_killed_leader_is_followed_after_its_lease(
    session: EtcdSession, candidate: Callable[..., Election], other_process: CandidateProcess
) -> None:
    """The next candidate leads within the TTL and a little after a SIGKILL of the leader."""
    election = candidate(session, "o1")
    assert election.leadership() is None
    start = time.monotonic()
    other_process.signal(signal.SIGKILL)
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    assert time.monotonic() - start < SHORT_TTL_S + 3.0


def test_a_leader_that_was_stopped_knows_at_once_when_it_wakes_up(
    session: EtcdSession, candidate: Callable[..., Election], other_process: CandidateProcess
) -> None:
    """A leader stopped by SIGSTOP for longer than its lease reports that it follows as soon as it
    continues (scenario_12)."""
    election = candidate(session, "o1")
    other_process.signal(signal.SIGSTOP)
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    assert other_process.said.empty()
    other_process.signal(signal.SIGCONT)
    assert other_process.hear() == "follows"
    assert election.leadership() is not None


def test_the_election_outlives_a_member_and_a_restart_of_all(tmp_path: Path, cluster: str) -> None:
    """If one etcd member of three is killed, the leader stays; if all are restarted, one candidate
    leads again and can write."""
    with EtcdCluster(tmp_path) as members:
        sessions = [EtcdSession(members.endpoints, request_timeout_ms=1_000) for _ in range(2)]
        elections = [Election(session, cluster, f"o{i}", f"o{i}:1", ttl_s=10) for i, session in enumerate(sessions)]
        for election in elections:
            election.start(TIMEOUT_S)
        before = elections[0].wait_for_leadership(TIMEOUT_S)
        assert before is not None
        members.members[members.endpoints.index(sessions[0].members.pick().endpoint)].kill()

        def written() -> bool:
            leader = next((election for election in elections if election.leadership() is not None), None)
            if leader is None:
                return False
            try:
                return leader.guarded_write([Put(f"/{cluster}/data", b"x")]) > 0
            except (EtcdError, NotLeaderError):
                return False

        wait_until("a leader writes", written, TIMEOUT_S)
        after = elections[0].leadership()
        assert after is not None
        assert after.revision == before.revision
        members.kill()
        members.start()
        wait_until("a leader writes again", written, 2 * TIMEOUT_S)
        for election, session in zip(elections, sessions, strict=True):
            election.close()
            session.close()


def test_a_write_that_nobody_answers_is_told(
    behind_proxy: EtcdSession, proxy: TcpProxy, candidate: Callable[..., Election]
) -> None:
    """While etcd does not answer and the deadline has not passed, a guarded write neither succeeds
    nor is refused."""
    election = candidate(behind_proxy, "o1", 30.0)
    assert election.wait_for_leadership(TIMEOUT_S) is not None
    proxy.stall()
    with pytest.raises(EtcdUnavailableError):
        election.guarded_write([Put(f"{election.guard().key}-data", b"x")])
    proxy.heal()
