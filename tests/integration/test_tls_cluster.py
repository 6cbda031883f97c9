"""A cluster with TLS on every connection and a certificate for each role: which role may call which
service.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.local.node import OWNER, PROCESSOR, Node
from deploy.local.process import wait_until
from tablewire.runtime import tls
from tablewire.runtime.addresses import parse_address
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.sections import PeerTlsSection
from tablewire.v1 import admin_pb2 as pb
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE
from tests.integration.tls_world import USER, WAIT_S, TlsWorld, identity, make_certs

pytestmark = pytest.mark.integration

TABLES = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsWorld]:
    """Provide a running cluster with a changefeed of three tables."""
    world = TlsWorld(tmp_path_factory.mktemp("tls"), members=3)
    try:
        world.start()
        for number in range(1, TABLES + 1):
            world.postgres.execute(f"CREATE TABLE t{number} (id int PRIMARY KEY, v text)", "source")
            world.postgres.execute(f"INSERT INTO t{number} VALUES (0, 'first')", "source")
        world.ask("changefeed", "create", "--id", "one", "--source", world.uri("source"), "--sink", world.uri("sink"),
                  "--tables", "public.*")  # fmt: skip
        yield world
    finally:
        world.close()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide certificates with the same names, signed by another CA."""
    return make_certs(tmp_path_factory.mktemp("foreign") / "certs")


def rows(world: TlsWorld, table: str) -> list[tuple[object, ...]]:
    """Return the rows of the table at the sink; none while it does not exist."""
    if not world.postgres.execute(f"SELECT 1 FROM pg_tables WHERE tablename = '{table}'", "sink"):
        return []
    return world.postgres.execute(f"SELECT id, v FROM {table} ORDER BY id", "sink")


def counted(world: TlsWorld) -> float:
    """Return how many rows the processors report as written."""
    text = "\n".join(node.metrics() for node in world.nodes.values())
    return sum(map(float, re.findall(r"^tablewire_processor_sink_rows_total{.*} ([0-9.e+]+)$", text, re.M)))


def called(address: str, world: TlsWorld, role: str, method: Any) -> tuple[grpc.StatusCode, str]:
    """Return the response of an owner to a call of this role with an empty request."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    with closing(open_channel(address, tls.channel_credentials(PeerTlsSection(**identity(world.certs, role))))) as channel:
        try:
            if method.server_streaming:
                list(channel.unary_stream(name)(b"", timeout=20))
            else:
                channel.unary_unary(name)(b"", timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def refusal_without_certificate(address: str, ca_file: Path) -> str:
    """Return how a TLS server refuses a client without a certificate; empty if it accepts it."""
    context = ssl.create_default_context(cafile=str(ca_file))
    try:
        with (
            socket.create_connection(parse_address(address), 10) as plain,
            context.wrap_socket(plain, server_hostname=parse_address(address)[0]) as secure,
        ):
            secure.sendall(b"GET / HTTP/1.0\r\n\r\n")
            secure.recv(1)  # with TLS 1.3 the refusal comes after the handshake of the client
    except ssl.SSLError as error:
        return str(error)
    return ""


def exchange(world: TlsWorld, section: PeerTlsSection) -> grpc.RpcError:
    """Return the response of a processor to an invalid Exchange of this identity."""
    channel = open_channel(world.nodes["processor0"].address, tls.channel_credentials(section))
    try:
        channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")(b"nonsense", timeout=20)
    except grpc.RpcError as error:
        return error
    finally:
        channel.close()
    raise AssertionError("nonsense was taken in")


def test_a_cluster_replicates_with_tls_only(world: TlsWorld) -> None:
    """A first copy, changes and a move work; no connection to PostgreSQL is in plain text; each
    owner answers.
    """
    wait_until("the first rows are there", lambda: all(rows(world, f"t{n}") == [(0, "first")] for n in (1, 2, 3)), WAIT_S)
    row = world.ask("table", "list", "--table", "public.t1")["tables"][0]
    target = next(c["id"] for c in world.ask("capture", "list")["captures"] if c["id"] != row["primary"])
    assert world.ask("table", "move", "public.t1", "--to", target, "--wait")["state"] == "done"
    world.postgres.execute("INSERT INTO t1 VALUES (1, 'after the move')", "source")
    wait_until("the change is there", lambda: rows(world, "t1")[-1] == (1, "after the move"), WAIT_S)
    plain = "SELECT ssl, count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = '%s' GROUP BY ssl"
    assert [ssl for ssl, _ in world.postgres.execute(plain % USER)] == [True]
    wait_until("the processors count what they write", lambda: counted(world) > TABLES, WAIT_S)
    for owner in world.owners:
        assert world.ask("--endpoint", owner, "status")["captures_by_state"] == {"ready": 2}


def test_the_members_of_etcd_use_tls_too(world: TlsWorld) -> None:
    """Each member accepts only certificates of the CA at its peer port; with one member down
    everything continues.
    """
    assert "certificate" in refusal_without_certificate(world.peer_endpoints[0], world.certs / "ca.pem").lower()
    world.etcd[0].kill()
    try:
        assert world.ask("changefeed", "query", "one")["state"] == "normal"
        world.postgres.execute("INSERT INTO t2 VALUES (1, 'without a member')", "source")
        wait_until("the change is there", lambda: rows(world, "t2")[-1] == (1, "without a member"), WAIT_S)
    finally:
        world.etcd[0].start()
    world.wait_etcd()


def test_no_admin_call_is_open_to_a_processor(world: TlsWorld) -> None:
    """Every call in the service's descriptor, so that a new one cannot be forgotten, is refused by
    name before it is read, by a leader and by a follower. With the CLI's certificate it is not.
    """
    methods = pb.DESCRIPTOR.services_by_name["Admin"].methods
    assert len(methods) >= 19
    for owner in world.owners:
        for method in methods:
            assert called(owner, world, "processor", method) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "certificate of tablewire-processor may not call here",
            )
    harmless = [method for method in methods if method.name.startswith(("Get", "List", "Plan", "Query"))]
    assert len(harmless) >= 9
    for method in harmless:
        assert called(world.owners[0], world, "cli", method)[0] is not grpc.StatusCode.PERMISSION_DENIED


def test_health_and_reflection_with_tls(world: TlsWorld) -> None:
    """Both services answer both for certificates that may call, and refuse others like every other
    call.
    """
    for node, role in ((world.nodes["owner0"], "cli"), (world.nodes["processor0"], OWNER)):
        service = {OWNER: "tablewire.v1.Admin", PROCESSOR: EXCHANGE_SERVICE}[node.kind]
        with closing(
            open_channel(node.address, tls.channel_credentials(PeerTlsSection(**identity(world.certs, role))))
        ) as channel:
            status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert status.status == health_pb2.HealthCheckResponse.SERVING
            ask = iter((reflection_pb2.ServerReflectionRequest(list_services=""),))
            answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask, timeout=20))
            names = {found.name for found in answer.list_services_response.service}
            assert {service, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names
        stranger = PeerTlsSection(**identity(world.certs, "postgres"))
        with closing(open_channel(node.address, tls.channel_credentials(stranger))) as channel:
            with pytest.raises(grpc.RpcError, match="tablewire-postgres may not call here"):
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            ask = iter((reflection_pb2.ServerReflectionRequest(list_services=""),))
            with pytest.raises(grpc.RpcError, match="tablewire-postgres may not call here"):
                next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask, timeout=20))


def test_a_processor_may_not_call_admin_verbs(world: TlsWorld) -> None:
    """The processor's certificate is signed by the CA, but its role may not call: reads and changes
    are refused by name.
    """
    for command in (("changefeed", "pause", "one"), ("changefeed", "list"), ("resign",)):
        done = world.cli(*command, role="processor")
        assert (done.returncode, done.stdout) == (1, "")
        assert "certificate of tablewire-processor may not call here" in done.stderr
    assert world.ask("changefeed", "query", "one")["state"] == "normal"


def test_only_an_owner_may_exchange(world: TlsWorld) -> None:
    """The CLI and another processor are refused by name before the request is read; the request of
    an owner is decoded.
    """
    for role in ("cli", "processor"):
        error = exchange(world, PeerTlsSection(**identity(world.certs, role)))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error.details() == f"certificate of tablewire-{role} may not call here"
    assert exchange(world, PeerTlsSection(**identity(world.certs, OWNER))).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_strangers_cannot_connect(world: TlsWorld, foreign: Path) -> None:
    """Certificates of another CA and plain text get no connection, and the CLI names the endpoints
    that it tried.
    """
    done = world.cli("status", "--timeout-s", "5", certs=foreign)
    assert done.returncode == 1
    assert f"no owner answers; tried {world.owners[0]}" in done.stderr
    assert "certificate" in done.stderr.lower()
    assert exchange(world, PeerTlsSection(**identity(foreign, OWNER))).code() is grpc.StatusCode.UNAVAILABLE
    assert exchange(world, PeerTlsSection()).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", [OWNER, PROCESSOR])
def test_a_service_that_etcd_refuses_ends_with_one_line(world: TlsWorld, foreign: Path, kind: str) -> None:
    """The line names etcd's endpoint and the reason, and the service is not registered."""
    node = world.new_node(kind, f"foreign-{kind}", certs=foreign)
    node.config["etcd"]["start_timeout_ms"] = 1_000
    assert ended(node) == 1
    last = world.log(node).strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert any(endpoint in last for endpoint in world.etcd_endpoints)
    assert "ertificate" in last or "ssl" in last.lower()


def test_a_source_with_the_wrong_authority_is_a_failed_check(world: TlsWorld, foreign: Path) -> None:
    """`create` names the check and the reason, and stores nothing."""
    wrong = world.uri("source", ca_file=foreign / "ca.pem")
    done = world.cli(
        "changefeed", "create", "--id", "two", "--source", wrong, "--sink", world.uri("sink"), "--tables", "public.*"
    )
    assert done.returncode == 1
    assert "source_reachable" in done.stderr
    assert "certificate verify failed" in done.stderr
    assert [row["changefeed"] for row in world.ask("changefeed", "list")["changefeeds"]] == ["default/one"]


def ended(node: Node) -> int:
    """Start a service and wait until it has ended."""
    node.start()
    try:
        return node.process.wait(WAIT_S)
    finally:
        node.process.kill()
