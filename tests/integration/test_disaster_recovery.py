"""docs/disaster-recovery.md, done as it says: real servers, a load, a loss, the page's steps, and every row compared."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from deploy.local.cluster import CliError, Cluster
from deploy.local.compare import compare
from deploy.local.process import wait_until
from deploy.local.shapes import SHAPES
from deploy.local.workload import Workload, create_tables
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Put

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/disaster-recovery.md").read_text()
TIMEOUT_S = 60.0
STREAMS = "SELECT 1 FROM pg_replication_slots WHERE slot_name LIKE 'tablewire_one_%'"
FORMER_REVISIONS = 1_000
"""So far etcd has counted before it is lost: a new one does not get there while the test lasts."""


def statement(beginning: str) -> str:
    """The SQL that the page tells the operator to run."""
    (found,) = re.findall(rf'psql "\$SINK" -c "({beginning}[^"]*)"', PAGE)
    return str(found).replace("'default/orders'", "'default/one'")


class World:
    """A changefeed `one` over four tables under load, in a cluster of one etcd, two owners and two processors."""

    def __init__(self, folder: Path, source: str, sink: str) -> None:
        self.cluster = Cluster(folder / "cluster", etcd=1, owners=2, processors=2, links=False)
        self.source, self.sink = source, sink
        self.tables = create_tables(self.source, shapes=SHAPES[:4])
        self.load = Workload(self.source, rows_per_s=100, shapes=SHAPES[:4])

    def start(self) -> None:
        self.cluster.start()
        self.load.fill(50)
        self.load.start()
        self.create()
        self.wait_replicating()

    def close(self) -> None:
        self.load.stop()
        self.cluster.close()

    def create(self) -> None:
        self.owner("create", "--id", "one", "--source", self.source, "--sink", self.sink, "--tables", "public.*")

    def owner(self, *arguments: str) -> None:
        self.cluster.owner_json("changefeed", *arguments)

    def wait_replicating(self) -> None:
        self.cluster.wait_replicating("one", tables=len(self.tables), timeout_s=TIMEOUT_S)

    def sql(self, uri: str, text: str) -> list[tuple[object, ...]]:
        with psycopg.connect(uri, autocommit=True) as connection:
            cursor = connection.execute(text.encode())
            return cursor.fetchall() if cursor.description else []

    def assert_equal(self) -> None:
        """After the load has stopped, source and sink are the same row for row."""
        self.load.stop()
        wait_until("the sink has everything", lambda: compare(self.source, self.sink, self.tables).equal, TIMEOUT_S)

    def errors(self) -> list[str]:
        """Of all tables, once they are scheduled."""
        return [row["error"] or "" for row in self.cluster.admin.tables("one")] or [""]


@pytest.fixture
def world(tmp_path: Path, source_db: str, sink_db: str) -> Iterator[World]:
    world = World(tmp_path, source_db, sink_db)
    try:
        world.start()
        yield world
    finally:
        world.close()


def test_etcd_is_lost_with_its_data(world: World) -> None:
    """All services return by themselves; the sink refuses the small epochs of a new etcd until they are reset, and continues
    from where each table is, without a copy."""
    (member,) = world.cluster.etcd.members
    session = EtcdSession([member.endpoint])
    for number in range(FORMER_REVISIONS):
        session.transact([], [Put("/elsewhere", b"%d" % number)])
    session.close()
    world.owner("pause")
    world.owner("resume")  # epochs come from etcd's revisions
    world.wait_replicating()
    ((before,),) = world.sql(world.sink, "SELECT max(changefeed_epoch) FROM tablewire.positions")
    member.kill()
    shutil.rmtree(world.cluster.folder / member.name / "data")
    member.start()
    world.cluster.wait("both processors are back", lambda: len(world.cluster.admin.captures()) == 2)
    assert world.cluster.admin.changefeeds() == []
    world.create()
    assert world.cluster.admin.changefeed("one")["epoch"] < int(str(before))
    world.cluster.wait("the sink refuses", lambda: all("newer writer" in error for error in world.errors()))
    world.owner("pause")
    world.sql(world.sink, statement("UPDATE tablewire.positions SET changefeed_epoch = 0"))
    assert world.sql(world.sink, "SELECT DISTINCT snapshot FROM tablewire.positions") == [("done",)]
    world.owner("resume")
    world.wait_replicating()
    world.assert_equal()


def test_the_slot_is_lost(world: World) -> None:
    """Nothing can be missing while processors read; of a paused changefeed changes are lost, so that it is not resumed, but can
    be copied again."""

    def has_slot() -> bool:
        return bool(world.sql(world.source, "SELECT 1 FROM pg_replication_slots WHERE slot_name = 'tablewire_one'"))

    def dropped() -> bool:
        try:
            world.sql(world.source, "SELECT pg_drop_replication_slot('tablewire_one')")
        except psycopg.errors.ObjectInUse:
            return False
        return True

    wait_until("the slot is free to be dropped", dropped, TIMEOUT_S)
    wait_until("it is restored from a processor's", has_slot, TIMEOUT_S)
    world.cluster.wait("it continues", lambda: world.cluster.admin.changefeed("one")["state"] == "normal")
    world.wait_replicating()
    world.owner("pause")
    world.cluster.wait("it is paused", lambda: not world.sql(world.source, STREAMS))
    wait_until("the slot is dropped", dropped, TIMEOUT_S)
    with pytest.raises(CliError, match=r"slot does not exist .* later changes are lost; `owner changefeed resync`"):
        world.owner("resume")
    assert world.cluster.admin.changefeed("one")["state"] == "stopped"
    world.owner("resync", "one", "--wait")
    world.assert_equal()


def test_a_table_at_the_sink_is_spoilt(world: World) -> None:
    """Marked to be copied again, and moved: that table alone is copied, and is right again."""
    world.sql(world.sink, "DELETE FROM public.accounts")
    marked = statement("UPDATE tablewire.positions SET snapshot = 'reload'")
    assert "'public.accounts'" in marked
    world.sql(world.sink, marked)
    (row,) = [row for row in world.cluster.admin.tables("one") if row["table"] == "public.accounts"]
    (target,) = [capture for capture in world.cluster.captures().values() if capture != row["primary"]]
    world.cluster.owner_json("table", "move", "public.accounts", "--to", target, "--wait")
    world.assert_equal()
