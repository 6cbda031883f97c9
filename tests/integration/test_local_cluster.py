"""The local cluster: folders of runs, the processes behind connections, ports, configuration files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy.local.cluster import Cluster
from deploy.local.identify import client_name
from deploy.local.net import free_port
from deploy.local.node import OWNER, to_toml
from deploy.local.process import ManagedProcess, StartError, wait_until
from deploy.local.runfolder import LOCK_NAME, RunFolder, sweep
from tablewire.runtime.addresses import parse_address

pytestmark = pytest.mark.integration


def test_a_client_is_known_by_its_process() -> None:
    """The name of the pid that holds the socket is found; a socket of another process has no name."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        peer, address = server.accept()
        with peer:
            assert client_name(address, {"init": 1, "me": os.getpid()}) == "me"
            assert client_name(address, {}) is None


def test_toml_is_read_back() -> None:
    """A service reads the configuration that a node was given."""
    config = {
        "id": 'a "quoted" \\ name',
        "etcd": {"endpoints": ["127.0.0.1:1"], "ttl": 3, "tls": {"on": True}},
        "labels": {"n": "x"},
    }
    assert tomllib.loads(to_toml(config)) == config


def test_links_to_etcd_are_apart(tmp_path: Path) -> None:
    """The members of a cluster of etcd alone answer through the proxies, and each client has a link of its own."""
    with Cluster(tmp_path, etcd=1, owners=0, processors=0) as cluster:
        assert cluster.etcd_endpoints[0] != cluster.etcd.endpoints[0]
        with socket.create_connection(parse_address(cluster.etcd_endpoints[0]), timeout=10) as client:
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.0 200"
        assert cluster.link("cli", "etcd0").accepted == 1
        assert cluster.link("owner0", "etcd0").accepted == 0
        folder = cluster.collect(tmp_path / "collected")
        assert (folder / "etcd0.log").exists()
        assert (folder / "etcd.json").read_text() == "{}"


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The error holds the end of its log, and no process remains."""
    cluster = Cluster(tmp_path, etcd=1, owners=1, processors=0, owner_config={"no_such_key": 1})
    with pytest.raises(StartError, match="no_such_key"), cluster:
        pass
    assert not cluster.etcd.members[0].running


@pytest.mark.parametrize("which", ["address", "http_address"])
@pytest.mark.parametrize("links", [True, False])
def test_a_port_lost_before_the_first_start_costs_nothing(tmp_path: Path, which: str, links: bool) -> None:
    """The node starts on another port, and clients find it there."""
    with Cluster(tmp_path, etcd=1, owners=0, processors=0, links=links) as cluster:
        node = cluster.add_node(OWNER, 0)
        lost = getattr(node, which)
        with socket.create_server(parse_address(lost)):
            cluster.start_node("owner0")
            assert getattr(node, which) != lost
            assert cluster.wait_for_leader() == "owner0"
            status = cluster.owner_json("status")
    assert status["leader"]["address"] == node.advertised
    assert (node.advertised == node.address) is not links


def test_a_port_lost_later_is_an_error(tmp_path: Path) -> None:
    """A node whose address is known to others does not return at another one."""
    with Cluster(tmp_path, etcd=1, owners=1, processors=0) as cluster:
        cluster.kill("owner0")
        with (
            socket.create_server(parse_address(cluster.node("owner0").address)),
            pytest.raises(StartError, match="cannot listen on"),
        ):
            cluster.start_node("owner0")


def test_no_port_is_given_twice_in_a_row() -> None:
    """A server that was given a port may not have bound it yet."""
    given = [free_port() for _ in range(500)]
    assert len(set(given)) == len(given)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The launcher says which program it could not start."""
    process = ManagedProcess("nobody", ["/nowhere/at/all"], log=tmp_path / "log")
    process.start()
    assert process.wait(30) == 127
    assert "/nowhere/at/all" in process.log.read_text()


def test_a_run_removes_its_folder(tmp_path: Path) -> None:
    """Two simultaneous runs have separate folders; the last one removes the parent."""
    parent = tmp_path / ".demo"
    with RunFolder(parent) as one:
        (one.path / "data").mkdir()
        with RunFolder(parent) as two:
            assert one.path != two.path
        assert one.path.exists()
        assert not two.path.exists()
    assert not parent.exists()


def test_the_folder_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    """The next run removes the folder of a killed run; one in use stays."""
    script = f"""
import sys, os
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from deploy.local.runfolder import RunFolder
from tablewire.runtime.addresses import parse_address
with RunFolder(Path(sys.argv[1])) as run:
    print(run.path, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        folder = Path(run.stdout.readline().strip())
        assert (folder / LOCK_NAME).exists()
        assert sweep(tmp_path) == []
        run.kill()
    assert sweep(tmp_path) == [folder]
    wait_until("it is gone", lambda: not folder.exists(), 5)


def test_logs_of_a_failure_stay(tmp_path: Path) -> None:
    """The entry to keep stays, and nothing else."""
    with RunFolder(tmp_path / ".demo") as run:
        for name in ("logs", "data"):
            (run.path / name).mkdir()
        run.keep_only("logs")
    assert run.kept == run.path / "logs"
    assert sorted(path.name for path in run.path.iterdir()) == [LOCK_NAME, "logs"]


def test_a_client_by_ipv6_is_known_too() -> None:
    """gRPC dials IPv4 addresses with IPv6 sockets."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET6) as client:
        client.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
        peer, address = server.accept()
        with peer:
            assert client_name(address, {"me": os.getpid()}) == "me"
