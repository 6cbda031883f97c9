"""Changes of shape that end with an error, whose way out works; and what a copy leaves alone."""

from __future__ import annotations

import threading

import psycopg
import pytest

from processor.postgres.source.shape_reader import read_look
from tablewire.errors import OperatingError
from tablewire.postgres.connections import connect
from tests.integration.test_postgres_shapes import settle, start
from tests.processor.postgres.replication_kit import Kit, checkpoint_of, current, wait_until

pytestmark = pytest.mark.integration


def fails(kit: Kit, match: str) -> None:
    executor, span = kit.executors[-1], kit.span("t")
    with pytest.raises(OperatingError, match=match):
        wait_until(lambda: executor.get_table_span_status(span, False) is None, "the error shows")


def test_one_transaction_with_rows_of_two_shapes(source_db: str, sink_db: str) -> None:
    """An update before DROP COLUMN and an insert after it, while followed and while no processor runs."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, old text, v int)")
        kit.run("INSERT INTO t SELECT i, 'old', i FROM generate_series(1, 9) i")
        start(kit, "t")
        settle(kit, "t")
        kit.run("BEGIN; UPDATE t SET v = -v; ALTER TABLE t DROP COLUMN old; INSERT INTO t VALUES (10, 10); COMMIT")
        settle(kit, "t")
        kit.executors[-1].close()
        kit.run("BEGIN; UPDATE t SET v = -v; ALTER TABLE t DROP COLUMN v; INSERT INTO t VALUES (11); COMMIT")
        start(kit, "t")
        settle(kit, "t")


def test_many_changes_while_no_processor_runs(source_db: str, sink_db: str) -> None:
    """Rows between five changes of all kinds: one copy is enough, and nothing is left over."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, a int, b text)")
        start(kit, "t")
        settle(kit, "t")
        kit.executors[-1].close()
        changes = (
            "ALTER TABLE t ADD COLUMN c text DEFAULT 'c'",
            "ALTER TABLE t RENAME a TO aa",
            "ALTER TABLE t DROP COLUMN b",
            "ALTER TABLE t ALTER aa TYPE text USING 'n' || aa",
            "ALTER TABLE t ADD COLUMN b int",
        )
        for number, change in enumerate(changes):
            kit.run(f"INSERT INTO t (id) VALUES ({number})")
            kit.run(change)
        start(kit, "t")
        settle(kit, "t")
        kit.run("INSERT INTO t SELECT i, 'x', 'y', 1 FROM generate_series(100, 300) i")
        settle(kit, "t")


def test_on_shape_change_error_names_a_way_out(source_db: str, sink_db: str) -> None:
    """The table fails instead of being copied; emptied, and without its position, it is copied."""
    with Kit(source_db, sink_db, options={"on_shape_change": "error"}) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v int)")
        kit.run("INSERT INTO t SELECT i, i FROM generate_series(1, 9) i")
        start(kit, "t")
        settle(kit, "t")
        kit.run("ALTER TABLE t ALTER v TYPE int USING v * 100")
        fails(kit, "cannot follow its source.*empty it at the sink and delete its row in tablewire.positions")
        kit.executors[-1].close()
        kit.at_sink("TRUNCATE t")
        kit.at_sink("DELETE FROM tablewire.positions WHERE table_name = 'public.t'")
        start(kit, "t")
        settle(kit, "t")


def test_view_at_the_sink_keeps_a_column_from_being_dropped(source_db: str, sink_db: str) -> None:
    """The error names the view; without it, the change follows."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v int)")
        start(kit, "t")
        settle(kit, "t")
        kit.at_sink("CREATE VIEW needs_v AS SELECT v FROM t")
        kit.run("ALTER TABLE t DROP COLUMN v")
        fails(kit, "view public.needs_v depends on")
        kit.executors[-1].close()
        kit.at_sink("DROP VIEW needs_v")
        start(kit, "t")
        kit.run("INSERT INTO t VALUES (1)")
        settle(kit, "t")


def test_type_that_the_sink_lacks(source_db: str, sink_db: str) -> None:
    """A new column of a type that only the source has is an error until the type is created at the sink."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start(kit, "t")
        settle(kit, "t")
        kit.run("CREATE TYPE mood AS ENUM ('ok')")
        kit.run("ALTER TABLE t ADD COLUMN m mood DEFAULT 'ok'")
        kit.run("INSERT INTO t VALUES (1)")
        fails(kit, "which the sink does not have; create it there")
        kit.executors[-1].close()
        kit.at_sink("CREATE TYPE mood AS ENUM ('ok')")
        start(kit, "t")
        settle(kit, "t")


def test_column_that_the_sink_has_already_gets_the_values_of_the_source(source_db: str, sink_db: str) -> None:
    """An operator who adds or renames columns first is not an obstacle, and what is in them is not kept."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, name text)")
        kit.run("INSERT INTO t SELECT i, 'n' FROM generate_series(1, 9) i")
        start(kit, "t")
        settle(kit, "t")
        kit.at_sink("ALTER TABLE t ADD COLUMN v int DEFAULT 5, ADD COLUMN local int DEFAULT 1")
        kit.run("ALTER TABLE t ADD COLUMN v int DEFAULT 7")
        kit.at_sink("ALTER TABLE t RENAME name TO full_name")
        kit.run("ALTER TABLE t RENAME name TO full_name")
        kit.run("INSERT INTO t VALUES (10, 'm')")
        target = current(kit)
        wait_until(lambda: checkpoint_of(kit.executors[-1], kit.span("t")) >= target, "the checkpoint")
        query = "SELECT id, full_name, v FROM t ORDER BY id"
        assert kit.at_sink(query) == kit.run(query)


def test_sink_can_be_read_while_it_is_copied_again(source_db: str, sink_db: str) -> None:
    """Until a copy into a table of another shape is complete, readers see the rows as they were."""
    with Kit(source_db, sink_db, options={"statement_timeout_ms": "30000"}) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v int)")
        kit.run("INSERT INTO t SELECT i, i FROM generate_series(1, 1000) i")
        start(kit, "t")
        settle(kit, "t")
        seen: set[object] = set()
        is_done = threading.Event()

        def read() -> None:
            with psycopg.connect(sink_db, autocommit=True) as reader:
                while not is_done.is_set():
                    seen.add(reader.execute("SELECT count(*) FROM t").fetchone())

        thread = threading.Thread(target=read)
        thread.start()
        try:
            kit.run("ALTER TABLE t ALTER v TYPE bigint USING v * 2")
            settle(kit, "t")
        finally:
            is_done.set()
            thread.join()
        assert seen == {(1000,)}


def test_ddl_that_a_synchronous_standby_delays(source_db: str) -> None:
    """DDL that is in the WAL but not visible yet is not overlooked: a look does not count for its table."""
    with psycopg.connect(source_db, autocommit=True) as source:
        source.execute("CREATE TABLE t (id int PRIMARY KEY, v int)")
        source.execute("CREATE TABLE other (id int PRIMARY KEY)")
        t, other = source.execute("SELECT 't'::regclass::oid::int, 'other'::regclass::oid::int").fetchone() or (0, 0)
        source.execute("ALTER SYSTEM SET synchronous_standby_names = 'absent'")
        source.execute("SELECT pg_reload_conf()")
        xids: list[int] = []

        def alter() -> None:
            with psycopg.connect(source_db) as session:
                session.execute("ALTER TABLE t ALTER v TYPE int USING v * 100")
                xids.append(int(str((session.execute("SELECT pg_current_xact_id()").fetchone() or (0,))[0])))

        thread = threading.Thread(target=alter)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()"
        with connect(source_db, application_name="look") as connection:
            wait_until(lambda: source.execute("SHOW synchronous_standby_names").fetchone() == ("absent",), "the setting")
            thread.start()
            try:
                wait_until(lambda: source.execute(waiting).fetchone() == (1,), "the commit waits for its standby")
                look = read_look(connection, [t, other], False)
                assert not look.is_complete(t)
                assert look.is_complete(other)
                assert not look.sees(xids[0] & 0xFFFFFFFF)
            finally:
                source.execute("ALTER SYSTEM RESET synchronous_standby_names")
                source.execute("SELECT pg_reload_conf()")
                thread.join()
            after = read_look(connection, [t, other], False)
            assert after.is_complete(t)
            assert after.sees(xids[0] & 0xFFFFFFFF)
            assert after.shapes[t] != look.shapes[t]
