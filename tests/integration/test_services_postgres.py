"""What an operator does to a PostgreSQL changefeed, with real services: a target, another filter, a pause, a removal."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from deploy.local.cluster import CliError, Cluster
from deploy.local.postgres import PostgresServer
from tablewire.postgres.lsn import format_lsn

pytestmark = pytest.mark.integration

WAIT_S = 60.0


class Line:
    """A cluster with one owner and one processor, a source and a sink database. `a` is a table with a key."""

    def __init__(self, folder: Path, source: str, sink: str) -> None:
        self.source, self.sink = source, sink
        self.cluster = Cluster(
            folder, etcd=1, owners=1, processors=1, links=False, owner_config={"source": {"idle_poll_interval_ms": 500}}
        )

    def run(self, statement: str, sink: bool = False) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.sink if sink else self.source, autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]  # a test's own text
            return cursor.fetchall() if cursor.description else []

    def position(self) -> int:
        """Where the source's WAL ends."""
        return int(str(self.run("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")[0][0]))

    def create(self, *more: str, name: str = "one", tables: str = "public.a", sink: str = "") -> Any:
        uris = ("--source", self.source, "--sink", sink or self.sink)
        return self.cluster.owner_json("changefeed", "create", "--id", name, *uris, "--tables", tables, *more)

    def changefeed(self) -> Any:
        return self.cluster.admin.changefeed("one")

    def ids(self, table: str = "a") -> set[int]:
        if self.run(f"SELECT to_regclass('public.{table}')", sink=True) == [(None,)]:
            return set()
        return {row[0] for row in self.run(f"SELECT id FROM {table}", sink=True)}

    def kinds(self) -> set[str]:
        """Of all events."""
        return {event["kind"] for event in self.cluster.owner_json("events", "-n", "0")["events"]}

    def refused(self, *arguments: str) -> str:
        """Why the CLI ended with exit code 1."""
        with pytest.raises(CliError) as failure:
            self.cluster.owner_json(*arguments)
        return str(failure.value)

    def wait(self, what: str, condition: Any) -> None:
        self.cluster.wait(what, condition, WAIT_S)


@pytest.fixture
def line(tmp_path: Path, source_db: str, sink_db: str) -> Iterator[Line]:
    line = Line(tmp_path, source_db, sink_db)
    line.run("CREATE TABLE a (id int PRIMARY KEY, v text)")
    line.run("CREATE TABLE b (id int PRIMARY KEY, v text)")
    line.run("INSERT INTO a SELECT i FROM generate_series(1, 100) i")
    line.run("INSERT INTO b SELECT i FROM generate_series(1, 50) i")
    with line.cluster:
        yield line


def test_a_target_is_where_it_stops(line: Line) -> None:
    """All that was committed at or before the target is in the sink, nothing behind it is, and the state is finished."""
    target = line.position() + 300_000  # source and sink are one server: what is made at the sink moves the position too
    line.create("--target-ts", format_lsn(target))
    assert line.changefeed()["target_ts"] == target
    line.wait("the first copy is there", lambda: len(line.ids()) == 100)
    before, after = set(), set()
    for number in itertools.count(101):
        began = line.position()
        line.run(f"INSERT INTO a VALUES ({number}, repeat('x', 4000))")
        if line.position() <= target:
            before.add(number)
        elif began >= target:
            after.add(number)
        if len(after) == 20:
            break
    line.wait("it is finished", lambda: line.changefeed()["state"] == "finished")
    assert line.changefeed()["checkpoint_ts"] == target
    assert len(before) >= 5
    found = line.ids()
    assert before <= found
    assert not after & found
    line.wait("it is told", lambda: "changefeed_finished" in line.kinds())


def test_a_paused_changefeed_takes_another_filter(line: Line) -> None:
    """The new table is copied after `resume`, the old one continues where it was, and a wrong filter changes nothing."""
    line.create()
    line.wait("the first copy is there", lambda: len(line.ids()) == 100)
    assert "only a paused one can be changed" in line.refused("changefeed", "update", "one", "--tables", "public.*")
    line.cluster.owner_json("changefeed", "pause", "one")
    line.run("INSERT INTO a SELECT i FROM generate_series(101, 200) i")
    assert "matches no table" in line.refused("changefeed", "update", "one", "--tables", "nowhere.*")
    assert line.cluster.owner_json("changefeed", "update", "one", "--tables", "public.*")["tables"] == ["public.*"]
    line.cluster.owner_json("changefeed", "resume", "one")
    line.wait("both tables are there", lambda: (len(line.ids()), len(line.ids("b"))) == (200, 50))
    line.run("INSERT INTO b SELECT i FROM generate_series(51, 60) i")
    line.wait("the new one is followed", lambda: len(line.ids("b")) == 60)
    rows = line.cluster.owner_json("changefeed", "statistics", "one")
    assert {row["table"] for row in rows["tables"]} == {"public.a", "public.b"}
    assert rows["lag"] is not None


def test_scenario_34_what_a_pause_and_a_removal_leave_at_the_source_is_told(line: Line) -> None:
    """A pause shows the WAL that it retains; a removal that cannot clean up says why, and ends when it can."""
    line.create()
    line.wait("the first copy is there", lambda: len(line.ids()) == 100)
    line.wait("what is retained is known", lambda: line.changefeed()["retained_bytes"] is not None)
    assert line.cluster.owner_json("changefeed", "pause", "one")["retained_bytes"] is not None
    line.wait("it is known of the paused one too", lambda: line.changefeed()["retained_bytes"] is not None)
    retained = line.changefeed()["retained_bytes"]
    line.run("INSERT INTO a SELECT i, repeat('x', 1000) FROM generate_series(1001, 3000) i")
    line.wait("more is retained", lambda: line.changefeed()["retained_bytes"] > retained + 2_000_000)
    (row,) = line.cluster.owner_json("changefeed", "list")["changefeeds"]
    assert row["state"] == "stopped"
    assert row["retained_bytes"] > 2_000_000

    # Somebody reads the slot, so it cannot be dropped.
    reader = psycopg.connect(line.source, replication="database", autocommit=True)
    reader.pgconn.send_query(
        b"START_REPLICATION SLOT tablewire_one LOGICAL 0/0 (proto_version '1', publication_names 'tablewire_one')"
    )
    held = "SELECT active FROM pg_replication_slots WHERE slot_name = 'tablewire_one'"
    line.wait("the slot is held", lambda: line.run(held) == [(True,)])
    line.cluster.owner_json("changefeed", "remove", "one")
    line.wait("it says what it could not", lambda: line.changefeed()["error"])
    left = line.changefeed()
    assert left["state"] == "removed"
    assert "tablewire_one" in left["error"]
    reader.close()
    line.wait("it is forgotten", lambda: not line.cluster.admin.changefeeds())
    assert line.run("SELECT 1 FROM pg_replication_slots WHERE slot_name = 'tablewire_one'") == []
    assert line.run("SELECT 1 FROM pg_publication WHERE pubname = 'tablewire_one'") == []


def test_scenario_19_a_sink_that_hangs_delays_no_other_changefeed(
    line: Line, new_postgres: Callable[..., PostgresServer]
) -> None:
    """Its server is stopped in the middle: the other changefeed of the same owner and processor continues as before; the hung one
    is stuck alone, and continues by itself when its server does."""
    slow = new_postgres(name="slow")
    line.create(tables="public.a")
    line.create(name="two", tables="public.b", sink=slow.create_database("sink"))
    line.wait("the first copies are there", lambda: len(line.ids()) == 100 and copied(slow) == 50)
    slow.pause()
    line.run("INSERT INTO b SELECT i FROM generate_series(51, 5000) i")
    for number in range(101, 106):
        began = time.monotonic()
        line.run(f"INSERT INTO a VALUES ({number})")
        line.wait("it is replicated", lambda number=number: number in line.ids())
        position = line.position()
        line.cluster.wait_checkpoint(position, "one", WAIT_S)
        assert time.monotonic() - began < 5.0
    stuck = line.cluster.admin.changefeed("two")
    assert stuck["checkpoint_ts"] < line.changefeed()["checkpoint_ts"]
    assert line.changefeed()["state"] == "normal"
    slow.resume()
    line.wait("the hung one goes on", lambda: copied(slow) == 5_000)


def test_a_table_that_cannot_be_published_holds_up_no_other(line: Line) -> None:
    """A table without a key appears: it is named where operators look, all others go forward and their WAL is released; with a
    key it is copied."""
    line.create(tables="public.*")
    line.wait("the first copies are there", lambda: (len(line.ids()), len(line.ids("b"))) == (100, 50))
    line.run("CREATE TABLE keyless (id int)")
    line.run("INSERT INTO keyless VALUES (1), (2)")
    line.wait("it is named", lambda: "public.keyless" in str(line.changefeed()["error"]))
    assert line.changefeed()["state"] == "warning"
    line.run("INSERT INTO a VALUES (101)")
    position = line.position()
    line.cluster.wait_checkpoint(position, "one", WAIT_S)
    slot = "SELECT confirmed_flush_lsn - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = 'tablewire_one'"
    line.wait("the slot advances", lambda: line.run(slot)[0][0] >= position)
    line.run("ALTER TABLE keyless ADD PRIMARY KEY (id)")
    line.wait("it is copied", lambda: line.ids("keyless") == {1, 2})
    line.wait("nothing is left out", lambda: line.changefeed()["state"] == "normal")


def copied(server: PostgresServer) -> int:
    """Rows of `b` at this server."""
    if server.execute("SELECT to_regclass('public.b')", "sink") == [(None,)]:
        return 0
    return int(str(server.execute("SELECT count(*) FROM b", "sink")[0][0]))


def test_a_quiet_changefeed_is_asked_rarely_and_a_change_is_noticed(line: Line, tmp_path: Path) -> None:
    """While nothing moves there is about one Exchange a second instead of ten, and a commit ends that within a second or two."""
    line.create(sink=f"file://{tmp_path}/sink")
    line.cluster.wait_replicating("one", tables=1)
    line.cluster.wait_checkpoint(line.position(), "one", WAIT_S)

    def exchanges() -> float:
        return float(
            re.findall(r"^tablewire_owner_exchange_seconds_count\S* (\S+)$", line.cluster.node("owner0").metrics(), re.M)[0]
        )

    samples = [(time.monotonic(), exchanges())]

    def is_quiet() -> bool:
        """Whether there were few Exchanges in the last three seconds."""
        samples.append((time.monotonic(), exchanges()))
        ended, last = samples[-1]
        earlier = [(at, count) for at, count in samples if at <= ended - 3.0]
        return bool(earlier) and (last - earlier[-1][1]) / (ended - earlier[-1][0]) < 2.5

    line.wait("it is quiet", is_quiet)
    line.run("INSERT INTO a VALUES (101)")
    committed, began = line.position(), time.monotonic()
    line.cluster.wait_checkpoint(committed, "one", WAIT_S)
    assert time.monotonic() - began < 5.0
