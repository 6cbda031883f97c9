"""/healthz, /readyz and gRPC health with hung ticks, hung executors and a stopped etcd."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.local.etcd import EtcdServer
from deploy.local.node import OWNER, Node
from deploy.local.process import wait_until
from owner import service
from owner.leadership.election import Election
from owner.leadership.term import Term
from owner.owner_config import OwnerConfig
from owner.service import OwnerService
from tablewire.etcd.session import EtcdSession
from tablewire.runtime.config import load
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.shutdown import Shutdown, run_thread
from tablewire.wire.codec import EXCHANGE_SERVICE
from tests.plugins.counter_world import CounterWorld, install_plugin

pytestmark = pytest.mark.integration

WAIT_S = 40.0
TABLES = (1, 2, 3, 4)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CounterWorld]:
    """Provide one etcd member, one owner and two processors that replicate four tables."""
    plugin = install_plugin(tmp_path_factory.mktemp("plugin"))
    world = CounterWorld(tmp_path_factory.mktemp("health") / "world", plugin, processors=2)
    world.set_tables(*(f"public.t{number}" for number in TABLES))
    world.cluster.start()
    world.create()
    world.wait_steady(len(TABLES))
    yield world
    world.close()


def ask(address: str, path: str) -> tuple[int, str]:
    """Send a request to the HTTP port of a service."""
    connection = http.client.HTTPConnection(address, timeout=10)
    with closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode().strip()


def grpc_health(address: str, name: str = "") -> int:
    with closing(open_channel(address)) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
        return int(status)


def name_of(node: Node) -> str:
    return "tablewire.v1.Admin" if node.kind == OWNER else EXCHANGE_SERVICE


def all_well(world: CounterWorld) -> bool:
    nodes = world.cluster.nodes.values()
    return all(ask(node.http_address, path) == (200, "ok") for node in nodes for path in ("/healthz", "/readyz")) and all(
        grpc_health(node.address, name) == SERVING for node in nodes for name in ("", name_of(node))
    )


def test_health_and_reflection_without_tls(world: CounterWorld) -> None:
    """Both services answer both, for the whole server and for each service by name; an unknown name
    is refused.
    """
    wait_until("all is well", lambda: all_well(world), WAIT_S)
    for node in world.cluster.nodes.values():
        with closing(open_channel(node.address)) as channel:
            requests = iter(
                (
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=name_of(node)),
                )
            )
            answers = list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests, timeout=10))
            names = {found.name for found in answers[0].list_services_response.service}
            assert names == {name_of(node), "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            assert answers[1].file_descriptor_response.file_descriptor_proto
            with pytest.raises(grpc.RpcError) as caught:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="none"), timeout=10)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_with_a_stopped_etcd_services_are_healthy_but_not_ready(world: CounterWorld) -> None:
    """After SIGSTOP of etcd a restart of the services would not help, so /healthz still passes.
    Once the leases have expired no process can accept work, which both report over HTTP and gRPC,
    until etcd resumes.
    """
    wait_until("all is well", lambda: all_well(world), WAIT_S)
    world.cluster.pause("etcd0")
    try:
        for node in world.cluster.nodes.values():
            wait_until(f"{node.name} is not ready", lambda node=node: ask(node.http_address, "/readyz")[0] == 503, WAIT_S)
            wait_until(f"{node.name} says so", lambda node=node: grpc_health(node.address, name_of(node)) == NOT_SERVING, WAIT_S)
            assert ask(node.http_address, "/healthz") == (200, "ok")
            text = ask(node.http_address, "/readyz")[1]
            assert ("no candidate: etcd" if node.kind == OWNER else "registered") in text or "lost its lease" in text
    finally:
        world.cluster.resume("etcd0")
    wait_until("all is well", lambda: all_well(world), WAIT_S)


def test_a_processor_whose_executor_hangs_is_unhealthy(world: CounterWorld) -> None:
    """A processor whose executor does not return from a call is neither healthy nor ready; the
    other processor and the owner are. When the call returns, it is again.
    """
    wait_until("all is well", lambda: all_well(world), WAIT_S)
    world.wait_steady(len(TABLES))
    table = TABLES[0]
    capture = world.primaries()[table]
    hung = next(node for node in world.cluster.processors if world.capture_of(node) == capture)
    pipe = world.source / f"broken-{table}"
    os.mkfifo(pipe)  # a reader waits until it has been written
    for name, node in world.cluster.nodes.items():
        if name == hung:
            wait_until("it is unhealthy", lambda node=node: ask(node.http_address, "/healthz")[0] == 503, WAIT_S)
            assert ask(node.http_address, "/healthz")[1].startswith("an executor has not returned from a call for ")
            assert ask(node.http_address, "/readyz")[0] == 503
            wait_until("gRPC says so", lambda node=node: grpc_health(node.address, EXCHANGE_SERVICE) == NOT_SERVING, WAIT_S)
    for name, node in world.cluster.nodes.items():
        assert name == hung or ask(node.http_address, "/healthz") == ask(node.http_address, "/readyz") == (200, "ok")
    wrong = pipe.with_suffix(".gone")
    pipe.rename(wrong)
    wrong.write_text("")
    wait_until("all is well", lambda: all_well(world), WAIT_S)
    world.wait_written(*TABLES)
    world.audit(*TABLES)


class Ticks:
    """Every tick of the owners in this process; `hang` stops them."""

    def __init__(self) -> None:
        self._go_on = threading.Event()
        self._go_on.set()
        self._reconcile = Term._reconcile

    def hang(self) -> None:
        self._go_on.clear()

    def go_on(self) -> None:
        self._go_on.set()

    def reconcile(self, term: Term) -> None:
        """Replace `Term._reconcile`, the first step of each round of ticks."""
        self._go_on.wait()
        self._reconcile(term)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ticks]:
    """Provide ticks that can hang, with short timeouts."""
    ticks = Ticks()
    monkeypatch.setattr(Term, "_reconcile", lambda term: ticks.reconcile(term))
    monkeypatch.setattr(service, "HANGS_AFTER_S", 1.0)
    monkeypatch.setattr(service, "HEALTH_INTERVAL_S", 0.2)
    yield ticks
    ticks.go_on()


def test_an_owner_whose_tick_hangs_is_unhealthy_and_resigns(etcd_server: EtcdServer, ticks: Ticks, tmp_path: Path) -> None:
    """The threads "lease" and "admin" continue, so the hang would not show: the owner reports it,
    and resigns.
    """
    (tmp_path / "owner.toml").write_text(
        f'cluster = "hung-{os.getpid()}"\nid = "hangs"\n[etcd]\nendpoints = ["{etcd_server.endpoint}"]\n'
        "[admin]\nport = 0\n[http]\nport = 0\n"
    )
    config = load(OwnerConfig, files=[tmp_path / "owner.toml"])
    shutdown = Shutdown()
    owner = OwnerService(config, shutdown)
    assert owner._http is not None
    address = f"{owner._http.host}:{owner._http.port}"

    def run() -> None:
        owner.run()

    ends = run_thread("owner", run)
    session = EtcdSession([etcd_server.endpoint])
    next_one = Election(session, config.cluster, "next", "127.0.0.1:1", ttl_s=10)
    try:
        wait_until("it leads", lambda: owner.is_leading() and ask(address, "/readyz") == (200, "ok"), WAIT_S)
        wait_until("gRPC says that it serves", lambda: grpc_health(owner.address) == SERVING, WAIT_S)
        next_one.start(WAIT_S)
        ticks.hang()
        wait_until("it is unhealthy", lambda: ask(address, "/healthz")[0] == 503, WAIT_S)
        assert ask(address, "/healthz")[1].startswith("no tick for ")
        assert ask(address, "/readyz")[0] == 503
        wait_until("gRPC says so", lambda: grpc_health(owner.address) == NOT_SERVING, WAIT_S)
        assert next_one.wait_for_leadership(5.0) is not None, "long before the lease of 10 s would be over"
        ticks.go_on()
        wait_until("it is well again", lambda: ask(address, "/readyz") == (200, "ok"), WAIT_S)
        assert not owner.is_leading()
    finally:
        next_one.close()
        session.close()
        shutdown.request("the end of the test")
        ticks.go_on()
        ends.join(WAIT_S)
    assert not ends.is_alive()
