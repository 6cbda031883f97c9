"""A source that fails over under its address, with real services: what continues by itself, and what needs a resync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from deploy.local.cluster import CliError, Cluster
from deploy.local.postgres import PostgresServer
from tests.integration.standbys import move_to, new_standby, promote, wait_caught_up

pytestmark = pytest.mark.integration

WAIT_S = 60.0


class World:
    """An owner and two processors; `source` is the server that the changefeed's address leads to."""

    def __init__(self, folder: Path, source: PostgresServer, sink: str) -> None:
        self.source = source
        self.sink = sink
        self.cluster = Cluster(folder / "cluster", etcd=1, owners=1, processors=2, links=False)

    def create(self, name: str = "one", *more: str) -> None:
        uris = ("--source", self.source.uri(), "--sink", self.sink)
        self.cluster.owner_json("changefeed", "create", "--id", name, *uris, "--tables", "public.*", *more)

    def at_sink(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.sink, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def is_equal(self) -> bool:
        if None in self.at_sink("SELECT to_regclass('public.a'), to_regclass('public.b')")[0]:
            return False
        query = "SELECT array_agg(id ORDER BY id) FROM public."
        return all(self.source.execute(query + table) == self.at_sink(query + table) for table in "ab")

    def wait_equal(self) -> None:
        self.cluster.wait("source and sink are equal", self.is_equal, WAIT_S)

    def state(self) -> str:
        return str(self.cluster.admin.changefeed("one")["state"])

    def wait_idle(self) -> None:
        """The slot stands at the end of the WAL, and the sink has recorded that nothing happens."""
        at_end = (
            "SELECT 1 FROM pg_replication_slots WHERE slot_name = 'tablewire_one' AND confirmed_flush_lsn = pg_current_wal_lsn()"
        )
        recorded = "SELECT 1 FROM tablewire.checkpoints WHERE source -> 'mark' ->> 'xmin' = source -> 'mark' ->> 'xmax'"
        self.cluster.wait("the slot is at the end", lambda: self.source.execute(at_end), WAIT_S)
        self.cluster.wait("it is recorded", lambda: self.at_sink(recorded), WAIT_S)


@pytest.fixture
def world(tmp_path: Path, new_postgres: Callable[..., PostgresServer], sink_db: str) -> Iterator[World]:
    source = new_postgres(settings={"autovacuum": "off", "hot_standby_feedback": "on"})
    for table in "ab":
        source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY)")
        source.execute(f"INSERT INTO {table} SELECT generate_series(1, 10)")
    world = World(tmp_path, source, sink_db)
    with world.cluster:
        world.create()
        world.wait_equal()
        yield world


def test_failover_to_a_standby_that_has_everything(world: World, tmp_path: Path) -> None:
    """The slot did not fail over, but nothing can be missing: the changefeed continues by itself, and so do all tables."""
    standby = new_standby(world.source, tmp_path)
    world.source.execute("INSERT INTO a VALUES (11)")
    world.wait_equal()
    world.wait_idle()
    wait_caught_up(world.source)
    world.source.stop()
    move_to(standby, world.source)
    promote(standby)
    world.source = standby
    accepted = "SELECT 1 FROM tablewire.checkpoints WHERE source ->> 'timeline' = '2'"
    world.cluster.wait("the new server is accepted", lambda: world.at_sink(accepted), WAIT_S)
    standby.execute("INSERT INTO a VALUES (12)")
    standby.execute("INSERT INTO b VALUES (11)")
    world.wait_equal()
    world.cluster.wait("it is normal", lambda: world.state() == "normal", WAIT_S)
    standby.close()


def test_failover_to_a_standby_that_lacks_rows(world: World, tmp_path: Path) -> None:
    """The changefeed fails and says why, a resume is refused, and a resync makes source and sink equal again."""
    standby = new_standby(world.source, tmp_path)
    standby.stop()
    world.source.execute("INSERT INTO a SELECT generate_series(101, 3100)")
    world.wait_equal()
    world.wait_idle()
    world.source.stop()
    move_to(standby, world.source)
    promote(standby)
    standby.execute("INSERT INTO b SELECT generate_series(11, 15)")
    world.source = standby
    world.cluster.wait("it has failed", lambda: world.state() == "failed", WAIT_S)
    assert "promoted at" in world.cluster.admin.changefeed("one")["error"]
    with pytest.raises(CliError, match="it lacks changes that the sink holds"):
        world.cluster.owner_json("changefeed", "resume", "one")
    assert world.at_sink("SELECT count(*) FROM a") == [(3010,)]
    world.cluster.owner_json("changefeed", "resync", "one", "--wait")
    assert world.is_equal()
    standby.execute("INSERT INTO a VALUES (11)")
    world.wait_equal()
    standby.close()


def test_removed_changefeed_leaves_no_positions(world: World) -> None:
    """Its rows in Tablewire's tables are gone; one of the same name replaces what it wrote, another one refuses to."""
    world.cluster.owner_json("changefeed", "remove", "one", "--wait")
    left = (
        "SELECT (SELECT count(*) FROM tablewire.{}) + (SELECT count(*) FROM tablewire.{}) + (SELECT count(*) FROM tablewire.{})"
    )
    assert world.at_sink(left.format("positions", "takeovers", "checkpoints")) == [(0,)]
    world.source.execute("DELETE FROM a WHERE id = 10")
    world.create()
    world.wait_equal()
    world.cluster.owner_json("changefeed", "remove", "one", "--wait")
    world.create("other")

    def errors() -> list[str]:
        return [row["error"] or "" for row in world.cluster.admin.tables("other")]

    world.cluster.wait("it refuses", lambda: errors() and all("existing_rows=truncate" in text for text in errors()), WAIT_S)


def test_removal_does_not_wait_for_the_sink(world: World) -> None:
    """The sink's database is gone: the changefeed is removed from the source and the cluster all the same."""
    world.cluster.owner_json("changefeed", "pause", "one")
    name = world.sink.rpartition("/")[2]
    with psycopg.connect(world.sink.replace(name, "postgres"), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'".encode())
        try:
            world.cluster.owner_json("changefeed", "remove", "one", "--wait")
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    assert world.source.execute("SELECT count(*) FROM pg_replication_slots") == [(0,)]
    assert "sink_rows_remain" in world.cluster.node("owner0").log.read_text()
