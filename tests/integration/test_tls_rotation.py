"""Certificates and their CA are replaced in a running cluster: no process ends, no table moves, the
old ones are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from deploy.local.node import OWNER
from deploy.local.process import wait_until
from tablewire.runtime import tls
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.sections import PeerTlsSection
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE
from tests.integration.tls_world import WAIT_S, TlsWorld, identity, make_certs

pytestmark = pytest.mark.integration

ROLES = ("owner", "processor", "cli", "etcd")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[TlsWorld]:
    """Provide a running cluster with a changefeed of one table; each service is reached through a
    proxy.
    """
    world = TlsWorld(tmp_path, lease_ttl_ms=10_000, links=True)
    try:
        world.start()
        shutil.copytree(world.certs, tmp_path / "old")
        world.postgres.execute("CREATE TABLE t1 (id int PRIMARY KEY)", "source")
        # PostgreSQL's own certificate is not replaced here, and neither is the CA in the URIs.
        uris = [world.uri(database, ca_file=tmp_path / "old/ca.pem") for database in ("source", "sink")]
        world.ask("changefeed", "create", "--id", "one", "--source", uris[0], "--sink", uris[1], "--tables", "public.*")
        wait_until("the table is there", lambda: "t1" in sink_tables(world), WAIT_S)
        yield world
    finally:
        world.close()


def sink_tables(world: TlsWorld) -> set[str]:
    return {
        str(name) for (name,) in world.postgres.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", "sink")
    }


def replace(world: TlsWorld, source: Path, *names: str) -> None:
    """Replace files as an operator does: write a new file, then rename it."""
    for name in names:
        shutil.copyfile(source / name, world.certs / f"{name}.new")
        os.replace(world.certs / f"{name}.new", world.certs / name)


def restart_etcd(world: TlsWorld) -> None:
    """Restart etcd, which reads its CA only at its start. This also breaks every connection to it."""
    world.etcd[0].terminate(10.0)
    world.etcd[0].start()
    world.wait_etcd()


def reconnect(world: TlsWorld, number: int, certs: Path | None = None) -> None:
    """Break every connection between the services, and wait until everything works again: each
    owner answers the CLI (with these certificates), a follower forwards to its leader, both
    processors are heard, and a row is replicated.
    """
    for proxy in world.proxies.values():
        proxy.reset()
    for owner in world.owners:
        wait_until(f"{owner} hears both", lambda owner=owner: heard(world, owner, certs) == ["ready", "ready"], WAIT_S)
    world.postgres.execute(f"INSERT INTO t1 VALUES ({number})", "source")
    wait_until("the row is there", lambda: world.postgres.execute(f"SELECT 1 FROM t1 WHERE id = {number}", "sink"), WAIT_S)


def heard(world: TlsWorld, owner: str, certs: Path | None) -> list[str]:
    """Return the states of the processors as this owner reports them; empty if it does not answer."""
    done = world.cli("--endpoint", owner, "capture", "list", "-o", "json", certs=certs)
    return [row["state"] for row in json.loads(done.stdout)["captures"]] if done.returncode == 0 else []


def answer(address: str, certs: Path, role: str) -> grpc.StatusCode:
    """Return the response to an invalid Exchange on a new connection; INVALID_ARGUMENT comes from
    the decoder.
    """
    with closing(open_channel(address, tls.channel_credentials(PeerTlsSection(**identity(certs, role))))) as channel:
        try:
            channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")(b"nonsense", timeout=20)
        except grpc.RpcError as error:
            return error.code()
    raise AssertionError("nonsense was taken in")


def test_certificates_and_authority_are_replaced_without_a_restart(world: TlsWorld, tmp_path: Path) -> None:
    """First both CAs are trusted, then the certificates are replaced, then the old CA is removed;
    after each step every connection is made again. A pair of which only one file has been replaced
    is not used, and a warning is logged.
    """
    new, old = make_certs(tmp_path / "new"), tmp_path / "old"
    before = world.ask("table", "list")["tables"][0]["primary"]
    revision = world.ask("status")["leader_revision"]
    processor = world.nodes["processor0"].address

    both = tmp_path / "both"
    both.mkdir()
    (both / "ca.pem").write_bytes((old / "ca.pem").read_bytes() + (new / "ca.pem").read_bytes())
    replace(world, both, "ca.pem")
    restart_etcd(world)
    reconnect(world, 1)
    assert (
        answer(processor, new, OWNER) is grpc.StatusCode.UNAVAILABLE
    )  # the client is accepted, but it does not accept the server
    for folder in (new, old):
        shutil.copytree(folder, tmp_path / f"{folder.name} and trusting")
        shutil.copyfile(both / "ca.pem", tmp_path / f"{folder.name} and trusting/ca.pem")
    assert answer(processor, tmp_path / "new and trusting", OWNER) is grpc.StatusCode.INVALID_ARGUMENT

    replace(world, new, *(f"{role}.pem" for role in ROLES))
    reconnect(world, 2, tmp_path / "old and trusting")
    assert all("certificates_unusable" in world.log(node) for node in world.nodes.values())
    replace(world, new, *(f"{role}.key" for role in ROLES))
    restart_etcd(world)
    reconnect(world, 3)

    replace(world, new, "ca.pem")
    restart_etcd(world)
    reconnect(world, 4)
    assert answer(processor, new, OWNER) is grpc.StatusCode.INVALID_ARGUMENT
    assert answer(processor, old, OWNER) is grpc.StatusCode.UNAVAILABLE
    assert world.cli("status", "--timeout-s", "5", certs=old).returncode == 1

    assert all(node.process.running for node in world.nodes.values())
    assert world.ask("table", "list")["tables"][0]["primary"] == before
    assert world.ask("status")["leader_revision"] == revision
    for node in world.nodes.values():
        assert "registration_lost" not in world.log(node)
        assert "certificates_replaced" in world.log(node)
