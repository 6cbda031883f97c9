"""The source's server and its sessions: failovers, lost slots, settings of roles and databases, encodings, two directions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

from deploy.local.postgres import PostgresServer
from tests.integration.data_plane import DataPlane, Scenario, data_plane, named, run_scenario

pytestmark = pytest.mark.integration

_numbers = count(1)
KEYED = "CREATE TABLE t (id int PRIMARY KEY, v int)"
ROWS = "INSERT INTO t SELECT i, i FROM generate_series(1, 10) i"

HAND_S = 5.0
"""How long a change of the publication by hand may stay undetected; it is looked for once a second."""

NewPostgres = Callable[..., PostgresServer]


@pytest.fixture
def role(postgres_server: PostgresServer) -> Iterator[str]:
    """A role that may replicate; it is dropped after the databases."""
    name = f"reader_{next(_numbers)}"
    postgres_server.execute(f"CREATE ROLE {name} LOGIN REPLICATION")
    yield name
    postgres_server.execute(f"DROP ROLE {name}")


def copied_server(server: PostgresServer, folder: Path, name: str, *, standby: bool = True) -> PostgresServer:
    """Return a copy of a server that is stopped, as a standby; without its slots, as a standby has none."""
    copy = PostgresServer(folder, name=name)
    copy.folder.mkdir(parents=True)
    shutil.copytree(server.folder / "data", copy.folder / "data", symlinks=True)
    data = copy.folder / "data"
    (data / "postmaster.pid").unlink(missing_ok=True)
    for slot in (data / "pg_replslot").iterdir():
        shutil.rmtree(slot)
    if standby:
        (data / "standby.signal").touch()
    return copy


def fail_over(plane: DataPlane, standby: PostgresServer) -> None:
    """Promote the standby, and let the changefeed find it behind its URI."""
    standby.execute("SELECT pg_promote()")
    plane.move_source(standby.uri(plane.kit.source_uri.rpartition("/")[2]))


def test_failover_to_a_standby_that_lacks_rows(new_postgres: NewPostgres, sink_db: str, tmp_path: Path) -> None:
    """Rows at the sink that the new source does not have are not kept without a word, nor are its new rows left out."""
    first = new_postgres(name="first")
    source = first.create_database("source")
    with data_plane(source, sink_db) as plane:
        plane.kit.run(KEYED)
        plane.start()
        plane.kit.run(ROWS)
        plane.settle("t")
        plane.pause()
        plane.close_source()
        first.stop()
        standby = copied_server(first, tmp_path, "standby")
        first.start()
        plane.move_source(first.uri("source"))
        plane.resume()
        plane.kit.run("INSERT INTO t SELECT i, i FROM generate_series(1001, 4000) i")
        plane.settle("t")
        plane.pause()
        plane.close_source()
        first.stop()
        with standby:
            fail_over(plane, standby)
            plane.resume()
            plane.kit.run("INSERT INTO t SELECT i, i FROM generate_series(11, 15) i")
            assert plane.settle_or_error("t")
            plane.close_source()


def test_failover_to_a_standby_that_has_everything(new_postgres: NewPostgres, sink_db: str, tmp_path: Path) -> None:
    """No row is in question: the changefeed continues although the standby has no slot."""
    first = new_postgres(name="first")
    source = first.create_database("source")
    with data_plane(source, sink_db) as plane:
        plane.kit.run(KEYED)
        plane.kit.run(ROWS)
        plane.start()
        plane.settle("t")
        plane.advance_to_end()
        plane.pause()
        plane.close_source()
        first.stop()
        with copied_server(first, tmp_path, "standby") as standby:
            fail_over(plane, standby)
            plane.resume()
            plane.wait_until(lambda: plane.kit.source is not None, "the owner has accepted the new primary")
            plane.kit.run("INSERT INTO t SELECT i, i FROM generate_series(11, 15) i")
            plane.settle("t")
            plane.close_source()


def test_another_server_behind_the_uri(new_postgres: NewPostgres, sink_db: str) -> None:
    """A server with another identity that happens to have such a table is not taken for the source."""
    first, second = new_postgres(name="first"), new_postgres(name="second")
    for server in (first, second):
        server.create_database("source")
        server.execute(KEYED, "source")
        server.execute(ROWS, "source")
    with data_plane(first.uri("source"), sink_db) as plane:
        plane.start()
        plane.settle("t")
        plane.pause()
        plane.close_source()
        plane.move_source(second.uri("source"))
        plane.resume()
        plane.kit.run("DELETE FROM t WHERE id < 5")
        assert plane.settle_or_error("t")
        plane.close_source()


def drop_slot(plane: DataPlane) -> None:
    assert plane.kit.source is not None
    plane.kit.run(f"SELECT pg_drop_replication_slot('{plane.kit.source._name}')")


def test_slot_is_dropped_while_every_table_is_past_it(source_db: str, sink_db: str) -> None:
    """A manager that removes inactive slots takes nothing that is needed: the changefeed continues."""
    with data_plane(source_db, sink_db) as plane:
        plane.kit.run(KEYED)
        plane.kit.run(ROWS)
        plane.start()
        plane.settle("t")
        plane.advance_to_end()
        drop_slot(plane)
        plane.kit.run("INSERT INTO t VALUES (11, 11)")
        plane.settle("t")
        plane.kit.run("INSERT INTO t VALUES (12, 12)")
        plane.settle("t")


def test_slot_is_dropped_while_changes_are_needed(source_db: str, sink_db: str) -> None:
    """Changes that no slot keeps are missing: the changefeed says so, and is not continued behind them."""
    with data_plane(source_db, sink_db) as plane:
        plane.kit.run(KEYED)
        plane.kit.run(ROWS)
        plane.start()
        plane.settle("t")
        plane.pause()
        plane.kit.run("UPDATE t SET v = -v")
        drop_slot(plane)
        plane.kit.run("INSERT INTO t VALUES (11, 11)")
        plane.resume()
        assert plane.settle_or_error("t")


def test_publication_is_changed_by_hand(source_db: str, sink_db: str) -> None:
    """Updates that are no longer published are not missing without a word."""
    with data_plane(source_db, sink_db) as plane:
        plane.kit.run(KEYED)
        plane.kit.run(ROWS)
        plane.start()
        plane.settle("t")
        plane.grace_s = HAND_S
        assert plane.kit.source is not None
        plane.kit.run(f"ALTER PUBLICATION {plane.kit.source._name} SET (publish = 'insert')")
        plane.kit.run("UPDATE t SET v = -v WHERE id = 5")
        plane.kit.run("DELETE FROM t WHERE id = 6")
        plane.kit.run("INSERT INTO t VALUES (11, 11)")
        plane.settle_or_error("t")


@pytest.mark.parametrize(
    "change", ["DROP TABLE t", "SET TABLE other", "SET (publish_via_partition_root = true)"], ids=["drop", "set", "root"]
)
def test_tables_of_the_publication_are_changed_by_hand(source_db: str, sink_db: str, change: str) -> None:
    """A table that left the publication for a moment misses nothing without a word."""
    with data_plane(source_db, sink_db) as plane:
        plane.kit.run(f"{KEYED}; CREATE TABLE other (id int PRIMARY KEY)")
        plane.kit.run(ROWS)
        plane.start()
        plane.settle("t", "other")
        plane.grace_s = HAND_S
        assert plane.kit.source is not None
        plane.kit.run(f"ALTER PUBLICATION {plane.kit.source._name} {change}")
        plane.kit.run("UPDATE t SET v = -v WHERE id = 5")
        plane.settle("t", "other")


@pytest.mark.parametrize("forced", [True, False], ids=["owner", "other role"])
def test_row_level_security_of_the_source(role: str, source_db: str, sink_db: str, forced: bool) -> None:
    """A first copy that would lack rows is an error, or has them all."""
    with psycopg.connect(source_db, autocommit=True) as superuser:
        name = source_db.rpartition("/")[2]
        superuser.execute(f"GRANT CREATE ON DATABASE {name} TO {role}; GRANT ALL ON SCHEMA public TO {role}".encode())
        superuser.execute(f"{KEYED}; {ROWS}; ALTER TABLE t OWNER TO {role}".encode())
        superuser.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING (id > 5)")
        if forced:
            superuser.execute("ALTER TABLE t FORCE ROW LEVEL SECURITY")
        with data_plane(source_db.replace("postgres@", f"{role}@"), sink_db) as plane:
            plane.observer.use_source(source_db)
            plane.start()
            superuser.execute("INSERT INTO t VALUES (11, 11)")
            errors = plane.settle_or_error("t")
            assert bool(errors) == forced
            superuser.execute("ALTER TABLE t NO FORCE ROW LEVEL SECURITY; ALTER TABLE t DISABLE ROW LEVEL SECURITY")
            plane.settle("t")


SETTINGS = (
    "datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'", "extra_float_digits = 0", "bytea_output = 'escape'",
    "timezone = 'Asia/Kolkata'", "search_path = 'nowhere'", "default_transaction_isolation = 'serializable'",
    "standard_conforming_strings = off", "lc_monetary = 'C'", "xmloption = 'document'", "client_encoding = 'LATIN1'",
    "statement_timeout = '1s'", "lock_timeout = '100ms'", "idle_in_transaction_session_timeout = '100ms'",
    "enable_seqscan = off", "default_transaction_deferrable = on", "quote_all_identifiers = on",
    "session_replication_role = 'origin'", "array_nulls = off", "transform_null_equals = on",
)  # fmt: skip
"""What a role or a database may set for every session."""


@pytest.mark.parametrize("binary", ["true", "false"])
@pytest.mark.parametrize("where", ["source", "sink"])
def test_settings_of_the_database_change_no_value(source_db: str, sink_db: str, where: str, binary: str) -> None:
    """Dates, floats, intervals, bytes and text arrive as they are, by copies, changes and defaults of new columns."""
    with data_plane(source_db, sink_db, options={"binary": binary}) as plane:
        kit = plane.kit
        for setting in SETTINGS:
            run = kit.run if where == "source" else kit.at_sink
            database = (source_db if where == "source" else sink_db).rpartition("/")[2]
            run(f"ALTER DATABASE {database} SET {setting}")
        columns = "d date, ts timestamptz, i interval, f float8, r real, b bytea, n numeric, m money, a text[], t text, p point"
        values = (
            "'2025-02-03', '2025-02-03 04:05:06.789+00', '-1 year 2 days -03:04:05.6', 0.1::float8 + 0.2::float8, 1.1::real / 3, "
            "'\\x00ff275c', 1.50, 12.5, ARRAY['a', 'NULL', NULL], E'a\\\\b''c', point(0.1::float8 + 0.2::float8, 1)"
        )
        kit.run(f"CREATE TABLE t (id int PRIMARY KEY, {columns})")
        kit.run(f"INSERT INTO t SELECT i, {values} FROM generate_series(1, 3) i")
        plane.start()
        plane.settle("t")
        kit.run(f"INSERT INTO t VALUES (4, {values})")
        kit.run(f"INSERT INTO t SELECT i, {values} FROM generate_series(100, 200) i")
        kit.run("UPDATE t SET d = '2024-03-04' WHERE id = 1")
        kit.run("ALTER TABLE t ADD COLUMN late date DEFAULT '2025-02-03', ADD COLUMN g float8 DEFAULT 0.30000000000000004")
        kit.run("ALTER TABLE t ADD COLUMN late_i interval DEFAULT '-1 day 2 hours'")
        kit.run(f"INSERT INTO t VALUES (5, {values})")
        plane.settle("t")


def test_statement_timeout_of_the_database_ends_no_copy(source_db: str, sink_db: str) -> None:
    """A first copy may take longer than any statement of the role or the database."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.run("INSERT INTO t SELECT i, repeat(md5(i::text), 60) FROM generate_series(1, 40000) i")
        kit.run(f"ALTER DATABASE {source_db.rpartition('/')[2]} SET statement_timeout = '50ms'")
        kit.at_sink(f"ALTER DATABASE {sink_db.rpartition('/')[2]} SET statement_timeout = '50ms'")
        plane.start()
        plane.wait_until(lambda: kit.at_sink("SELECT to_regclass('public.t')") != [(None,)], "the table is created")
        plane.settle("t")


def test_row_that_is_not_text_of_any_encoding(source_db: str, sink_db: str) -> None:
    """In a SQL_ASCII source one row is not UTF-8: its table shows the error, the others go on."""
    with psycopg.connect(source_db, autocommit=True) as connection:
        name = f"{connection.info.dbname}_ascii"
        connection.execute(f"CREATE DATABASE {name} ENCODING SQL_ASCII TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'".encode())
        try:
            with data_plane(f"{source_db}_ascii", sink_db) as plane:
                kit = plane.kit
                kit.run("CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY, v text)")
                plane.start()
                kit.run("INSERT INTO a VALUES (1, 'fine')")
                kit.run("INSERT INTO b VALUES (1, E'\\xff')")
                kit.run("INSERT INTO a VALUES (2, 'fine')")
                plane.settle("a")
                assert "b" in plane.wait_error("b", r"\bb\b")
                kit.run("INSERT INTO a VALUES (3, 'fine')")
                plane.settle("a")
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_source_is_a_standby(new_postgres: NewPostgres, sink_db: str, tmp_path: Path) -> None:
    """A server in recovery cannot have the publication: create refuses it."""
    first = new_postgres(name="first")
    first.create_database("source")
    first.execute(KEYED, "source")
    first.stop()
    with copied_server(first, tmp_path, "standby") as standby, data_plane(standby.uri("source"), sink_db) as plane:
        problems = plane.new_source().check()
        assert any("recovery" in failure.reason or "standby" in failure.reason for failure in problems), problems


TRANSACTIONS = (
    Scenario("a subtransaction is rolled back", KEYED, ROWS, None,
             ("BEGIN; INSERT INTO t VALUES (50, 1); SAVEPOINT s; UPDATE t SET v = 0; ROLLBACK TO s; DELETE FROM t; COMMIT",)),
    Scenario("a large transaction that spills", KEYED, ROWS, None,
             ("INSERT INTO t SELECT i, i FROM generate_series(1000, 60000) i", "UPDATE t SET v = -v",
             "DELETE FROM t WHERE id % 3 = 0")),
)  # fmt: skip


@pytest.mark.parametrize("scenario", TRANSACTIONS, ids=named)
def test_transactions_of_the_source(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """What was rolled back is not written; what was committed is, however large."""
    run_scenario(scenario, source_db, sink_db)
