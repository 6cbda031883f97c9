"""Every connection of a cluster by TLS, a role a certificate: who may call whom, and what is said to who may not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from deploy.local.node import OWNER, PROCESSOR, Node
from deploy.local.process import wait_until
from tablewire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE
from tablewire.runtime import tls
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.sections import PeerTlsSection
from tests.integration.tls_world import USER, WAIT_S, TlsWorld, identity, make_certs

pytestmark = pytest.mark.integration

TABLES = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsWorld]:
    """Runs, with a changefeed of three tables."""
    world = TlsWorld(tmp_path_factory.mktemp("tls"))
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
    """Certificates with the same names, signed by somebody else."""
    return make_certs(tmp_path_factory.mktemp("foreign") / "certs")


def rows(world: TlsWorld, table: str) -> list[tuple[object, ...]]:
    """Of the sink; empty while there is no such table."""
    if not world.postgres.execute(f"SELECT 1 FROM pg_tables WHERE tablename = '{table}'", "sink"):
        return []
    return world.postgres.execute(f"SELECT id, v FROM {table} ORDER BY id", "sink")


def counted(world: TlsWorld) -> float:
    """Rows that the processors say they have written."""
    text = "\n".join(node.metrics() for node in world.nodes.values())
    return sum(map(float, re.findall(r"^tablewire_processor_sink_rows_total{.*} ([0-9.e+]+)$", text, re.M)))


def exchange(world: TlsWorld, section: PeerTlsSection) -> grpc.RpcError:
    """What a processor answers to an Exchange of nonsense by this identity."""
    channel = open_channel(world.nodes["processor0"].address, tls.channel_credentials(section))
    try:
        channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")(b"nonsense", timeout=20)
    except grpc.RpcError as error:
        return error
    finally:
        channel.close()
    raise AssertionError("nonsense was taken in")


def test_a_cluster_replicates_by_tls_alone(world: TlsWorld) -> None:
    """A first copy, changes and a move; no connection to PostgreSQL is in plain text; whichever owner is asked answers."""
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


def test_a_processor_may_not_call_admin_verbs(world: TlsWorld) -> None:
    """Its certificate is of our authority, but not of a role that may: reads and changes are refused by name."""
    for command in (("changefeed", "pause", "one"), ("changefeed", "list"), ("resign",)):
        done = world.cli(*command, role="processor")
        assert (done.returncode, done.stdout) == (1, "")
        assert "certificate of tablewire-processor may not call here" in done.stderr
    assert world.ask("changefeed", "query", "one")["state"] == "normal"


def test_only_an_owner_may_exchange(world: TlsWorld) -> None:
    """The CLI and another processor are refused by name before a byte is read; an owner gets as far as the decoder."""
    for role in ("cli", "processor"):
        error = exchange(world, PeerTlsSection(**identity(world.certs, role)))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error.details() == f"certificate of tablewire-{role} may not call here"
    assert exchange(world, PeerTlsSection(**identity(world.certs, OWNER))).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_strangers_find_no_connection(world: TlsWorld, foreign: Path) -> None:
    """The right names of another authority, and plain text: nothing answers, and the CLI says which it tried."""
    done = world.cli("status", "--timeout-s", "5", certs=foreign)
    assert done.returncode == 1
    assert f"no owner answers; tried {world.owners[0]}" in done.stderr
    assert "certificate" in done.stderr.lower()
    assert exchange(world, PeerTlsSection(**identity(foreign, OWNER))).code() is grpc.StatusCode.UNAVAILABLE
    assert exchange(world, PeerTlsSection()).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", [OWNER, PROCESSOR])
def test_a_service_that_etcd_refuses_ends_with_one_line(world: TlsWorld, foreign: Path, kind: str) -> None:
    """It names etcd's endpoint and the reason, and nothing of it is registered."""
    node = world.new_node(kind, f"foreign-{kind}", certs=foreign)
    node.config["etcd"]["start_timeout_ms"] = 1_000
    assert ended(node) == 1
    last = world.log(node).strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert world.etcd_endpoint in last
    assert "ertificate" in last or "ssl" in last.lower()


def test_a_source_with_the_wrong_authority_is_a_failed_check(world: TlsWorld, foreign: Path) -> None:
    """`create` names the check and the reason, and nothing is stored."""
    wrong = world.uri("source", ca_file=foreign / "ca.pem")
    done = world.cli(
        "changefeed", "create", "--id", "two", "--source", wrong, "--sink", world.uri("sink"), "--tables", "public.*"
    )
    assert done.returncode == 1
    assert "source_reachable" in done.stderr
    assert "certificate verify failed" in done.stderr
    assert [row["changefeed"] for row in world.ask("changefeed", "list")["changefeeds"]] == ["default/one"]


def ended(node: Node) -> int:
    """Starts it and waits for its end."""
    node.start()
    try:
        return node.process.wait(WAIT_S)
    finally:
        node.process.kill()
