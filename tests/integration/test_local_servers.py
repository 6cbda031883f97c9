"""The embedded servers start, answer, survive faults, and die with their parent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from deploy.local.etcd import EtcdCluster, EtcdServer
from deploy.local.postgres import PostgresServer
from deploy.local.process import wait_until

pytestmark = pytest.mark.integration


def alive(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_etcd_member_answers_and_keeps_its_data(new_etcd: Callable[..., EtcdServer]) -> None:
    """A member that is killed and started again answers at the same endpoint."""
    server = new_etcd()
    endpoint = server.endpoint
    server.kill()
    assert not server.healthy()
    server.start()
    assert server.endpoint == endpoint
    assert server.healthy()


def test_etcd_cluster_survives_the_loss_of_a_member(tmp_path: Path) -> None:
    """Three members form a cluster; two of them stay healthy without the third, which may return."""
    with EtcdCluster(tmp_path, 3, ["127.31.7.1", "127.31.7.2", "127.31.7.3"]) as cluster:
        lost = cluster.member("etcd0")
        lost.kill()
        wait_until("two members go on", lambda: all(m.healthy() for m in cluster.members if m is not lost), 20)
        cluster.start()
        assert all(member.healthy() for member in cluster.members)


def test_postgres_is_ready_for_logical_replication(source_db: str, sink_db: str) -> None:
    """wal_level is logical and durability is on, in two different databases."""
    assert source_db != sink_db
    with psycopg.connect(source_db, autocommit=True) as connection:
        for setting, value in (("wal_level", "logical"), ("fsync", "on"), ("synchronous_commit", "on")):
            assert connection.execute(f"SHOW {setting}").fetchone() == (value,)
        connection.execute("SELECT pg_create_logical_replication_slot('left_behind', 'pgoutput')")


def test_databases_are_dropped_with_their_slots(postgres_server: PostgresServer) -> None:
    """A database is dropped although a slot and an open connection hold it."""
    uri = postgres_server.create_database("held")
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('holds', 'pgoutput')")
        postgres_server.drop_database("held")
    assert postgres_server.execute("SELECT 1 FROM pg_database WHERE datname = 'held'") == []


def test_postgres_keeps_committed_rows_when_killed(new_postgres: Callable[..., PostgresServer]) -> None:
    """SIGKILL of the whole tree loses nothing that was committed, and the endpoint stays."""
    server = new_postgres()
    server.execute("CREATE TABLE t AS SELECT 42 AS n")
    endpoint = server.endpoint
    server.kill()
    assert not server.running
    server.start()
    assert server.endpoint == endpoint
    assert server.execute("SELECT n FROM t") == [(42,)]


def test_postgres_can_be_paused(new_postgres: Callable[..., PostgresServer]) -> None:
    """A paused server does not answer, a resumed one does, and a paused one can be stopped."""
    server = new_postgres()
    server.pause()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.uri(), connect_timeout=2)
    server.resume()
    assert server.execute("SELECT 1") == [(1,)]
    server.pause()
    server.stop()
    assert not server.running


def test_settings_of_the_caller_win(new_postgres: Callable[..., PostgresServer]) -> None:
    """fsync and wal_level can be set for benchmarks and for tests of bad sources."""
    server = new_postgres(settings={"wal_level": "replica", "fsync": "off"})
    assert server.execute("SHOW wal_level") == [("replica",)]
    assert server.execute("SHOW fsync") == [("off",)]


def test_path_with_spaces(tmp_path: Path) -> None:
    """Servers run in folders whose names need quoting."""
    folder = tmp_path / "a folder 'of' ours"
    with EtcdServer(folder) as etcd, PostgresServer(folder) as postgres:
        assert etcd.healthy()
        assert postgres.execute("SELECT 1") == [(1,)]


def test_folder_that_nobody_else_may_enter(tmp_path: Path) -> None:
    """PostgreSQL runs inside a folder of mode 0700, whichever user runs it."""
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o700)
    with PostgresServer(folder) as postgres:
        assert postgres.execute("SELECT 1") == [(1,)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_root_without_user_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without user namespaces, a copy of the binaries runs as another user and is removed at the end."""
    from deploy.local import postgres as module

    real_probe = module._probe

    def barred(mode: str, folder: Path, bin_folder: Path) -> str:
        return "barred" if mode.startswith("map") else real_probe(mode, folder, bin_folder)

    monkeypatch.setattr(module, "_probe", barred)
    with PostgresServer(tmp_path) as server:
        home = server._home
        assert home is not None
        assert home.external is not None
        assert server.execute("SELECT 1") == [(1,)]
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0
    assert not home.external.exists()


_PARENT = """
import sys, threading
from pathlib import Path
from deploy.local.etcd import EtcdServer
from deploy.local.postgres import PostgresServer
folder = Path(sys.argv[1])
etcd, postgres = EtcdServer(folder), PostgresServer(folder)
# From threads that end at once: the servers must depend on the process, not on the thread that asked for them.
for server in (etcd, postgres):
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
assert etcd.healthy() and postgres.running
from deploy.local.process import descendants
print(*descendants(__import__("os").getpid()), flush=True)
sys.stdin.read()
"""


def test_servers_die_with_a_killed_parent(tmp_path: Path) -> None:
    """SIGKILL of the process that started them leaves neither etcd nor any process of PostgreSQL."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) > 3
        parent.kill()
    wait_until("all are gone", lambda: not any(alive(pid) for pid in pids), 20)
