"""First copies while tables are changed, locked or broken at either end: each table is right or waits alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from processor.postgres import PostgresExecutor
from processor.postgres.sinks import ReloadNeededError
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.postgres_sink import PostgresSession
from processor.postgres.tables.life import ADVANCING, State
from tablewire.errors import OperatingError
from tablewire.model.progress import Checkpoint
from tablewire.model.spans import Span
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, wait_until

pytestmark = pytest.mark.integration


@contextmanager
def locked(uri: str, table: str) -> Iterator[int]:
    """Hold the strongest lock of a table in another session; its process."""
    with psycopg.connect(uri, application_name="somebody") as connection:
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield connection.info.backend_pid
        connection.rollback()


def state(executor: PostgresExecutor, span: Span) -> State:
    return executor._tables[span].life.state


def error(executor: PostgresExecutor, span: Span) -> str:
    try:
        executor.get_table_span_status(span, False)
    except OperatingError as found:
        return str(found)
    return ""


def add_again(executor: PostgresExecutor, span: Span, ts: int) -> None:
    """What owner and agent do with a table that has failed."""
    executor.remove_table_span(span)
    wait_until(lambda: executor.is_remove_table_span_finished(span)[1], "the table is stopped")
    begin(executor, [span], ts)


HOLD = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql
  AS 'BEGIN PERFORM pg_advisory_xact_lock(TG_ARGV[0]::int); RETURN NULL; END';
CREATE TABLE first (id int PRIMARY KEY, v int);
CREATE TABLE a (id int PRIMARY KEY, v int);
CREATE TRIGGER hold BEFORE INSERT ON first FOR EACH STATEMENT EXECUTE FUNCTION hold(1);
CREATE TRIGGER hold BEFORE INSERT ON a FOR EACH STATEMENT EXECUTE FUNCTION hold(2);
ALTER TABLE first ENABLE ALWAYS TRIGGER hold;
ALTER TABLE a ENABLE ALWAYS TRIGGER hold"""
"""At the sink: the copies of these tables wait while a test holds the advisory lock. (A lock of the table would need a
transaction id, for whose end the source waits before it makes a snapshot: here it is the same server.)"""


@contextmanager
def copying_a(kit: Kit, *others: str) -> Iterator[tuple[PostgresExecutor, dict[str, Span]]]:
    """Copies of a, b and c under one snapshot, of which the first is held up at the sink."""
    for name in ("first", "a", "b", "c"):
        kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY, v int)")
        kit.run(f"INSERT INTO {name} SELECT g, g FROM generate_series(1, 100) g")
    for statement in HOLD.split(";\n"):
        kit.at_sink(statement)
    start_ts = kit.start()
    executor = kit.executor()
    first, *spans = (kit.span(name) for name in ("first", "a", "b", "c", *others))
    with psycopg.connect(kit.sink_uri, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")
        begin(executor, [first], start_ts)
        wait_until(lambda: state(executor, first) is State.COPYING, "the first copy has begun")
        begin(executor, spans, start_ts)
        holder.execute("SELECT pg_advisory_unlock(1)")
        wait_until(lambda: state(executor, spans[0]) is State.COPYING, "the copy of a has begun")
        yield executor, dict(zip(("a", "b", "c", *others), spans, strict=True))


REWRITES = {
    "type": "ALTER TABLE b ALTER v TYPE bigint",
    "using": "ALTER TABLE b ALTER v TYPE int USING v * 100",
    "vacuum": "VACUUM FULL b",
    "truncate": "TRUNCATE b",
    "again": "ALTER TABLE b DROP COLUMN v; ALTER TABLE b ADD COLUMN v int DEFAULT 7",
}


@pytest.mark.parametrize("statement", REWRITES.values(), ids=REWRITES)
def test_a_table_that_is_changed_under_the_snapshot_waits_for_the_next(source_db: str, sink_db: str, statement: str) -> None:
    """A rewritten table is empty for an older snapshot: it is copied with a newer one, and so are changed columns."""
    with Kit(source_db, sink_db) as kit:
        with copying_a(kit) as (executor, spans):
            for single in statement.split("; "):
                kit.run(single)
        kit.run("INSERT INTO a VALUES (1000, 1)")
        kit.wait_equal("a", "b", "c")
        for span in spans.values():
            wait_until(lambda span=span: checkpoint_of(executor, span) >= kit.start_ts, "no table shows an error")


def test_columns_that_are_dropped_under_the_snapshot_are_not_missed(source_db: str, sink_db: str) -> None:
    """The copy reads the columns that there are."""
    with Kit(source_db, sink_db) as kit:
        with copying_a(kit) as (executor, spans):
            kit.run("ALTER TABLE b DROP COLUMN v")
        wait_until(lambda: len(kit.at_sink("SELECT id FROM b")) == 100, "the rows of b arrive")
        assert error(executor, spans["b"]) == ""


def test_tables_that_swap_names_under_the_snapshot_keep_their_rows(source_db: str, sink_db: str) -> None:
    """Each is copied under its new name: no rows are written under the name of the other table."""
    with Kit(source_db, sink_db) as kit:
        with copying_a(kit):
            kit.run("UPDATE b SET v = -v")
            for change in ("c RENAME TO d", "b RENAME TO c", "d RENAME TO b"):
                kit.run(f"ALTER TABLE {change}")
        kit.wait_equal("a", "b", "c")


def test_a_table_that_is_dropped_under_the_snapshot_is_its_own_error(source_db: str, sink_db: str) -> None:
    """The others are copied, and the error names the table."""
    with Kit(source_db, sink_db) as kit:
        with copying_a(kit) as (executor, spans):
            kit.run("DROP TABLE b")
        kit.wait_equal("a", "c")
        wait_until(lambda: error(executor, spans["b"]), "the dropped table has an error")
        assert "table public.b" in error(executor, spans["b"])  # it no longer exists, or has left the publication


def test_a_locked_table_waits_alone_for_its_copy(source_db: str, sink_db: str) -> None:
    """Tables behind it are copied; it shows which process holds the lock, and arrives when that has ended."""
    with Kit(source_db, sink_db, options={"error_after_ms": "0"}) as kit:
        with copying_a(kit) as (executor, spans):
            lock = locked(source_db, "b")
            pid = lock.__enter__()
        try:
            kit.wait_equal("a", "c")
            wait_until(lambda: error(executor, spans["b"]), "the locked table shows why it waits")
            # Of the lock, or of the transaction that has it, when the next snapshot is being taken.
            assert "public.b: its first copy waits for " in error(executor, spans["b"])
            assert f"process {pid}, role " in error(executor, spans["b"])
        finally:
            lock.__exit__(None, None, None)
        add_again(executor, spans["b"], kit.start_ts)
        kit.wait_equal("b")


def test_tables_that_are_locked_at_the_sink_leave_workers_to_the_others(
    source_db: str, sink_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tables as there are workers wait for locks; after their first timeout another one is written without delay."""
    monkeypatch.setattr("processor.postgres.sinks.connection.LOCK_TIMEOUT_MS", 4_000)
    names = [f"t{number}" for number in range(5)]
    with Kit(source_db, sink_db, options={"sink_connections": "4", "error_after_ms": "60000"}) as kit:
        for name in names:
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        wait_until(lambda: all(state(executor, kit.span(name)) in ADVANCING for name in names), "the tables are copied")
        free = kit.span("t4")
        with psycopg.connect(sink_db) as other:
            other.execute("LOCK TABLE t0, t1, t2, t3 IN ACCESS EXCLUSIVE MODE")
            for name in names[:4]:
                kit.run(f"INSERT INTO {name} VALUES (1)")
            troubled = [executor._tables[kit.span(name)] for name in names[:4]]
            wait_until(lambda: all(table.is_troubled for table in troubled), "all of them have met the lock")
            for number in range(10):
                kit.run(f"INSERT INTO t4 VALUES ({number})")
                end_ts = current(kit)
                wait_until(lambda end_ts=end_ts: checkpoint_of(executor, free) >= end_ts, "t4 is written", 2.0)  # type: ignore[misc]
            other.rollback()
        kit.wait_equal(*names)


def test_a_copy_is_made_again_on_request(source_db: str, sink_db: str) -> None:
    """What any thread has found to be different is right after the copy, and changes follow it."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY, v int)")
        kit.run("INSERT INTO a SELECT g, g FROM generate_series(1, 100) g")
        start_ts = kit.start()
        executor, span = kit.executor(), kit.span("a")
        begin(executor, [span], start_ts)
        kit.wait_equal("a")
        kit.at_sink("UPDATE a SET v = 0 WHERE id < 50")
        wait_until(lambda: executor._tables[span].want_copy(ReloadNeededError("rows differ")), "the copy is requested")
        kit.run("UPDATE a SET v = v + 1")
        kit.wait_equal("a")
        end_ts = current(kit)
        wait_until(lambda: checkpoint_of(executor, span) >= end_ts, "the checkpoint continues")


def test_a_copy_that_waits_for_a_transaction_shows_which(source_db: str, sink_db: str) -> None:
    """A snapshot for changes can only be taken when all transactions have ended that were open before."""
    with Kit(source_db, sink_db, options={"error_after_ms": "500"}) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        kit.run("CREATE TABLE other (id int)")
        kit.run("INSERT INTO a VALUES (1)")
        start_ts = kit.start()
        executor, span = kit.executor(), kit.span("a")
        with psycopg.connect(source_db, application_name="somebody") as open_one:
            open_one.execute("INSERT INTO other VALUES (1)")
            xid = open_one.execute("SELECT pg_current_xact_id()::text").fetchone()
            begin(executor, [span], start_ts)
            wait_until(lambda: error(executor, span), "the table shows what it waits for")
            assert xid is not None
            expected = f"public.a: its first copy waits for transaction {xid[0]} of process {open_one.info.backend_pid}, role "
            assert expected in error(executor, span)
            assert "application somebody, idle in transaction" in error(executor, span)
            open_one.rollback()
        add_again(executor, span, start_ts)
        kit.wait_equal("a")


def test_a_table_that_is_locked_while_it_is_described_is_its_own_error(source_db: str, sink_db: str) -> None:
    """Reading the bound of a partition waits for its lock: other new tables are prepared, and it shows who holds the lock."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)")
        for number in range(3):
            kit.run(f"CREATE TABLE leaf{number} PARTITION OF parted FOR VALUES FROM ({number}0) TO ({number}9)")
        kit.run("CREATE TABLE plain (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        leaf, plain = kit.span("leaf1"), kit.span("plain")
        with locked(source_db, "leaf1") as pid:
            for span in (leaf, plain):
                executor.add_table_span(span, Checkpoint(start_ts, start_ts), True)
            wait_until(lambda: executor.is_add_table_span_finished(plain, True), "the other table is prepared", 5.0)
            if error(executor, leaf):  # versions that lock what they read the bound of
                assert f"table leaf1 cannot be described while process {pid}, role " in error(executor, leaf).replace(
                    "public.", ""
                )
        if error(executor, leaf):
            executor.remove_table_span(leaf)
            wait_until(lambda: executor.is_remove_table_span_finished(leaf)[1], "the table is stopped")
        begin(executor, [leaf, plain], start_ts)
        kit.run("INSERT INTO parted VALUES (11)")
        kit.wait_equal("leaf1", "plain")


def test_partitions_that_are_rewritten_under_the_snapshot_are_not_missed(source_db: str, sink_db: str) -> None:
    """A partitioned table that is copied as a whole waits for the next snapshot if one of its partitions was rewritten."""
    with Kit(source_db, sink_db, options={"partitions": "root"}) as kit:
        kit.run("CREATE TABLE parted (id int PRIMARY KEY, v int) PARTITION BY RANGE (id)")
        kit.run("CREATE TABLE leaf PARTITION OF parted FOR VALUES FROM (0) TO (1000)")
        kit.run("INSERT INTO parted SELECT g, g FROM generate_series(1, 100) g")
        with copying_a(kit, "parted"):
            kit.run("ALTER TABLE parted ALTER v TYPE int USING v * 100")
        kit.wait_equal("a", "b", "c", "parted")


def test_a_table_that_is_locked_at_the_sink_waits_alone(source_db: str, sink_db: str) -> None:
    """The first copy of the others, their changes and checkpoints go on while the lock is held for longer than any timeout."""
    with Kit(source_db, sink_db) as kit:
        with copying_a(kit) as (executor, spans):
            kit.wait_equal("b", "c")
            kit.run("INSERT INTO c VALUES (1000, 1)")
            kit.wait_equal("c")
            end_ts = current(kit)
            wait_until(lambda: checkpoint_of(executor, spans["c"]) >= end_ts, "the checkpoint advances")
        kit.wait_equal("a")


def test_a_copy_whose_commit_was_not_answered_is_not_repeated(
    source_db: str, sink_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sink is asked, and has the table: its rows are neither refused as rows that were there before, nor copied twice."""
    broken: list[str] = []
    execute = SinkConnection.execute

    def break_after_commit(self: SinkConnection, sql: str) -> object:
        result = execute(self, sql)
        session = kit.executors[0]._snapshots[0].session
        if sql == "COMMIT" and not broken and isinstance(session, PostgresSession) and session.connection is self:
            broken.append(sql)
            self._pgconn.finish()
            raise psycopg.OperationalError("the connection was lost behind COMMIT")
        return result

    monkeypatch.setattr(SinkConnection, "execute", break_after_commit)
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        kit.run("INSERT INTO a SELECT generate_series(1, 100)")
        start_ts = kit.start()
        executor, span = kit.executor(), kit.span("a")
        begin(executor, [span], start_ts)
        wait_until(lambda: bool(broken), "the break behind COMMIT")
        kit.run("INSERT INTO a VALUES (0)")
        kit.wait_equal("a")
        end_ts = current(kit)
        wait_until(lambda: checkpoint_of(executor, span) >= end_ts, "the checkpoint continues without an error")
        assert executor._tables[span].rows_written < 200
