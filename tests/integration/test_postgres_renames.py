"""Tables and schemas that are renamed at the source: the tables at the sink, and their positions, follow."""

from __future__ import annotations

import pytest

from tablewire.errors import OperatingError
from tests.integration.test_postgres_shapes import settle, start
from tests.processor.postgres.replication_kit import Kit, begin, wait_until

pytestmark = pytest.mark.integration

RENAMES = {
    "renamed": (["ALTER TABLE t RENAME TO u"], ["u"]),
    "moved to another schema": (["CREATE SCHEMA other", "ALTER TABLE t SET SCHEMA other"], ["other.t"]),
    "schema renamed": (["ALTER SCHEMA s RENAME TO r"], ["r.t"]),
    "both": (
        ["CREATE SCHEMA other", "BEGIN; ALTER TABLE t SET SCHEMA other; ALTER TABLE other.t RENAME TO x; COMMIT"],
        ["other.x"],
    ),
    "replaced": (["BEGIN; ALTER TABLE t RENAME TO t_old; ALTER TABLE t_new RENAME TO t; COMMIT"], ["t", "t_old"]),
    "exchanged": (
        ["BEGIN; ALTER TABLE t RENAME TO x; ALTER TABLE t_new RENAME TO t; ALTER TABLE x RENAME TO t_new; COMMIT"],
        ["t", "t_new"],
    ),
}


@pytest.mark.parametrize("stage", ["rows", "idle", "stopped"])
@pytest.mark.parametrize("name", RENAMES)
def test_names_follow(source_db: str, sink_db: str, name: str, stage: str) -> None:
    """Rows arrive in the table of the new name; while the table is written, idle, or without a processor."""
    statements, names = RENAMES[name]
    table = "s.t" if name == "schema renamed" else "t"
    with Kit(source_db, sink_db, tables=("*.*",)) as kit:
        kit.run("CREATE SCHEMA s")
        kit.run(f"CREATE TABLE {table} (id int PRIMARY KEY, v text)")
        kit.run("CREATE TABLE t_new (id int PRIMARY KEY, n int)")
        kit.run(f"INSERT INTO {table} SELECT i, 'old' FROM generate_series(1, 9) i")
        kit.run("INSERT INTO t_new SELECT i, i FROM generate_series(100, 120) i")
        start(kit, table, "t_new")
        settle(kit, table, "t_new")
        if stage == "stopped":
            kit.executors[-1].close()
        for statement in statements:
            kit.run(statement)
        if stage != "idle":
            for renamed in names:
                kit.run(f"INSERT INTO {renamed} VALUES (500)")
        if stage == "stopped":
            start(kit, *names)
        for renamed in names:
            kit.wait_equal(renamed)
        settle(kit, *names)
        rows = kit.at_sink("SELECT table_name, snapshot FROM tablewire.positions WHERE table_name ~ 'tablewire'")
        assert rows == []
        kit.run(f"INSERT INTO {names[0]} VALUES (501)")
        settle(kit, *names)


def test_new_table_takes_the_name_of_a_renamed_one(source_db: str, sink_db: str) -> None:
    """The renamed table keeps its rows at the sink; the new one begins with its own."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.run("INSERT INTO t SELECT generate_series(1, 9)")
        start(kit, "t")
        settle(kit, "t")
        kit.run("BEGIN; ALTER TABLE t RENAME TO t_old; CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (77); COMMIT")
        assert kit.source is not None
        kit.source.tables()
        begin(kit.executors[-1], [kit.span("t")], kit.start_ts)
        settle(kit, "t", "t_old")


def test_name_that_the_sink_uses_already_is_an_error_with_a_way_out(source_db: str, sink_db: str) -> None:
    """A table of the operator is never replaced; once it is out of the way, the rename follows."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.at_sink("CREATE TABLE u (mine text)")
        start(kit, "t")
        settle(kit, "t")
        kit.run("ALTER TABLE t RENAME TO u")
        executor, span = kit.executors[-1], kit.span("u")
        with pytest.raises(OperatingError, match="the sink has another table of that name: rename or drop it there"):
            wait_until(lambda: executor.get_table_span_status(span, False) is None, "the error shows")
        kit.at_sink("ALTER TABLE u RENAME TO mine")
        executor.close()
        start(kit, "u")
        kit.run("INSERT INTO u VALUES (1)")
        kit.wait_equal("u")
