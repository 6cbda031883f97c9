"""The registration of a processor with real etcd: it stops before etcd can let it expire, and never comes back."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.etcd import EtcdServer
from deploy.local.process import wait_until
from deploy.local.proxy import TcpProxy
from processor.service.registration import Registration
from tablewire.errors import ClosedError, EtcdError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.lease import lease_clock
from tablewire.etcd.records import CaptureRecord, decode, now
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import EtcdUnavailableError
from tablewire.model.states import LivenessState

pytestmark = pytest.mark.integration

TIMEOUT_S = 15.0
TTL_S = 3.0
PROCESS = Path(__file__).with_name("registered_process.py")

Register = Callable[..., tuple[Registration, "queue.Queue[str]"]]


@pytest.fixture
def cluster(etcd_prefix: str) -> str:
    """A cluster name of the test's own."""
    return "registration" + etcd_prefix.replace("/", "-")


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
def register(cluster: str) -> Iterator[Register]:
    """Registers a capture; the second value gets the reasons that on_lost was called with."""
    registrations: list[Registration] = []

    def start(session: EtcdSession, capture_id: str, **options: float) -> tuple[Registration, queue.Queue[str]]:
        record = CaptureRecord(id=capture_id, address="127.0.0.1:7", version="1", labels={"zone": "a"}, started_at=now())
        lost: queue.Queue[str] = queue.Queue()
        settings = {"ttl_s": TTL_S, **options}
        registration = Registration(session, cluster, record, on_lost=lost.put, **settings)  # type: ignore[arg-type]
        registrations.append(registration)
        registration.start()
        return registration, lost

    yield start
    for registration in registrations:
        registration.deregister()


def stored(session: EtcdSession, cluster: str, capture_id: str) -> CaptureRecord | None:
    found = session.get(etcd_keys.capture_key(cluster, capture_id))
    return decode(CaptureRecord, found.key, found.value) if found is not None else None


def test_a_capture_is_registered_until_it_leaves(session: EtcdSession, cluster: str, register: Register) -> None:
    """The record is in etcd under the lease; leaving removes it at once, silently, and twice is fine."""
    registration, lost = register(session, "p1")
    assert registration.is_valid()
    assert lease_clock() < registration.deadline() < lease_clock() + TTL_S
    record = stored(session, cluster, "p1")
    assert record is not None
    assert (record.address, record.labels, record.liveness) == ("127.0.0.1:7", {"zone": "a"}, LivenessState.ALIVE)
    registration.deregister()
    registration.deregister()
    assert stored(session, cluster, "p1") is None
    assert not registration.is_valid()
    assert lost.empty()
    with pytest.raises(ClosedError):
        registration.update_liveness(LivenessState.STOPPING)


def test_the_lease_is_kept(session: EtcdSession, register: Register) -> None:
    """The deadline moves on with every keep-alive, past the first TTL."""
    registration, lost = register(session, "p1")
    start = lease_clock()
    wait_until("it outlived its TTL", lambda: registration.deadline() > start + TTL_S + 1, TIMEOUT_S)
    assert registration.is_valid()
    assert lost.empty()


def test_stopping_is_told(session: EtcdSession, cluster: str, register: Register) -> None:
    """The liveness in etcd changes, under the same lease and the same creation."""
    registration, _ = register(session, "p1")
    before = session.get(etcd_keys.capture_key(cluster, "p1"))
    registration.update_liveness(LivenessState.STOPPING)
    registration.update_liveness(LivenessState.STOPPING)
    after = session.get(etcd_keys.capture_key(cluster, "p1"))
    assert before is not None
    assert after is not None
    assert (after.create_revision, after.lease) == (before.create_revision, before.lease)
    record = stored(session, cluster, "p1")
    assert record is not None
    assert record.liveness is LivenessState.STOPPING


def test_a_taken_id_is_refused(session: EtcdSession, cluster: str, register: Register) -> None:
    """A second registration under one id is an error that names it, and leaves the first one alone."""
    registration, lost = register(session, "p1")
    with pytest.raises(OperatingError, match="capture p1 is registered already"):
        register(session, "p1")
    assert registration.is_valid()
    assert stored(session, cluster, "p1") is not None
    assert lost.empty()
    with pytest.raises(ClosedError, match="new id"):
        registration.start()


def test_an_evicted_capture_is_told(session: EtcdSession, register: Register) -> None:
    """When the owner revokes the lease, the capture is fenced at once, long before its next keep-alive."""
    registration, lost = register(session, "p1", ttl_s=60)
    session.revoke(registration.lease_id)
    assert "deleted" in lost.get(timeout=5)
    assert not registration.is_valid()
    with pytest.raises(ClosedError):
        registration.update_liveness(LivenessState.STOPPING)
    assert lost.empty()


def test_scenario_13_a_capture_cut_off_from_etcd_fences_itself_first(
    session: EtcdSession, behind_proxy: EtcdSession, proxy: TcpProxy, cluster: str, register: Register
) -> None:
    """Cut off from etcd alone, it stops while its key still stands, and does not come back when the line does."""
    registration, lost = register(behind_proxy, "p1", ttl_s=3, margin_s=1)
    proxy.stall()
    assert lost.get(timeout=TIMEOUT_S)
    assert not registration.is_valid()
    assert stored(session, cluster, "p1") is not None
    proxy.heal()
    watch = session.watch_prefix(etcd_keys.captures_prefix(cluster))
    watch.wait_until(lambda state: not state.entries, TIMEOUT_S)
    assert not registration.is_valid()
    assert lost.empty()


def test_an_unreachable_etcd_is_told_and_can_be_tried_again(
    behind_proxy: EtcdSession, proxy: TcpProxy, cluster: str, session: EtcdSession
) -> None:
    """A start without etcd is an EtcdError in bounded time; the same object can start once etcd is there."""
    proxy.refuse()
    record = CaptureRecord(id="p1", address="127.0.0.1:7", started_at=now())
    registration = Registration(behind_proxy, cluster, record, ttl_s=TTL_S, on_lost=lambda _reason: None)
    with pytest.raises(EtcdUnavailableError, match=proxy.endpoint):
        registration.start()
    assert not registration.is_valid()
    proxy.heal()

    def started() -> bool:
        try:
            registration.start()
        except EtcdError:
            return False
        return True

    wait_until("it is registered", started, TIMEOUT_S)
    assert stored(session, cluster, "p1") is not None
    registration.deregister()


def test_scenario_12_a_stopped_process_is_fenced_when_it_wakes_up(
    etcd_server: EtcdServer, session: EtcdSession, cluster: str
) -> None:
    """After SIGSTOP past its lease and SIGCONT, the very next check returns "fenced", before anything else could be done."""
    command = [sys.executable, str(PROCESS), etcd_server.endpoint, cluster, "p1", str(TTL_S)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    said: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                said.put(line.strip())

    threading.Thread(target=read, daemon=True).start()
    try:
        assert said.get(timeout=TIMEOUT_S) == "valid"
        process.send_signal(signal.SIGSTOP)
        watch = session.watch_prefix(etcd_keys.captures_prefix(cluster))
        watch.wait_until(lambda state: not state.entries, TIMEOUT_S)
        assert said.empty()
        process.send_signal(signal.SIGCONT)
        assert said.get(timeout=TIMEOUT_S) == "fenced"
        assert said.empty()
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
