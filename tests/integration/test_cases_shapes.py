"""A source table changes shape: rows, the statement, then one more row; the sink follows exactly, or copies the table again."""

from __future__ import annotations

import psycopg
import pytest

from tests.integration.data_plane import Scenario, data_plane, named, run_scenario

pytestmark = pytest.mark.integration

T = "ALTER TABLE t"


def changed(name: str, column: str, value: str, *changes: str) -> Scenario:
    """A table with one more column of this type and value, and the changes, the last of which is one more row."""
    return Scenario(
        name,
        tables=f"CREATE TABLE t (id int PRIMARY KEY, v {column})",
        rows=f"INSERT INTO t SELECT i, {value} FROM generate_series(1, 100) i",
        changes=changes,
    )


def row(*values: str) -> str:
    return f"INSERT INTO t VALUES ({', '.join(('101', *values))})"


TYPES = (
    changed("USING", "int", "i", f"{T} ALTER v TYPE int USING v * 100", row("7")),
    changed("numeric gains scale", "numeric(10,2)", "i", f"{T} ALTER v TYPE numeric(12,4)", row("1.2345")),
    changed("numeric loses scale", "numeric(10,4)", "i / 7.0", f"{T} ALTER v TYPE numeric(10,2)", row("1.25")),
    changed("numeric widens", "numeric(5,2)", "i", f"{T} ALTER v TYPE numeric(12,2)", row("1234567.89")),
    changed("int to numeric", "int", "i", f"{T} ALTER v TYPE numeric(10,2)", row("1.55")),
    changed("date to timestamptz", "date", "'2024-01-01'", f"{T} ALTER v TYPE timestamptz", row("'2024-05-06 07:08:09.1+00'")),
    changed("varchar widens", "varchar(5)", "i", f"{T} ALTER v TYPE varchar(50)", row("repeat('x', 40)")),
    changed("varchar to text", "varchar(5)", "i", f"{T} ALTER v TYPE text", row("repeat('x', 40)")),
    changed("varchar narrows", "varchar(50)", "i", f"{T} ALTER v TYPE varchar(3)", row("'abc'")),
    changed("varchar narrows, USING", "varchar(50)", "'wide' || i", f"{T} ALTER v TYPE varchar(3) USING left(v, 3)", row("'a'")),
    changed("text to varchar", "text", "i", f"{T} ALTER v TYPE varchar(10)", row("'short'")),
    changed("char widens", "char(3)", "i", f"{T} ALTER v TYPE char(6)", row("'abcdef'")),
    changed("int to bigint", "int", "i", f"{T} ALTER v TYPE bigint", row("5000000000")),
    changed("bigint to int", "bigint", "i", f"{T} ALTER v TYPE int", row("5")),
    changed("real to double", "real", "i / 10.0", f"{T} ALTER v TYPE float8", row("0.1")),
    changed("int to text", "int", "i", f"{T} ALTER v TYPE text", row("'not a number'")),
    changed("text to jsonb", "text", "'{\"a\":  1}'", f"{T} ALTER v TYPE jsonb USING v::jsonb", row("'[1]'")),
    changed("enum to text", "text", "'a'", f"{T} ALTER v TYPE varchar", row("'b'")),
    changed("precision of a time", "timestamp(0)", "now()", f"{T} ALTER v TYPE timestamp(6)", row("'2024-01-01 0:0:0.123456'")),
    changed("bit widens", "bit varying(4)", "B'101'", f"{T} ALTER v TYPE bit varying(9)", row("B'101010101'")),
    changed("array of another type", "int[]", "ARRAY[i]", f"{T} ALTER v TYPE numeric[]", row("'{1.5}'")),
    changed(
        "time zone of the session", "timestamp", "'2024-01-01 10:00'",
        f"SET timezone = 'Asia/Tokyo'; {T} ALTER v TYPE timestamptz; RESET timezone", row("now()"),
    ),
    changed("type of the key", "int", "i", f"{T} ALTER id TYPE bigint", "INSERT INTO t VALUES (5000000000, 1)"),
    changed("type of the key with USING", "int", "i", f"{T} ALTER id TYPE int USING id + 1000", row("1")),
    changed("two changes at once", "int", "i", f"{T} ALTER v TYPE bigint, ADD w text DEFAULT 'w'", row("5000000000", "'x'")),
    changed("there and back", "int", "i", f"{T} ALTER v TYPE bigint", f"{T} ALTER v TYPE int", row("5")),
    changed("USING twice", "int", "i", f"{T} ALTER v TYPE int USING v + 1", row("5"), f"{T} ALTER v TYPE int USING v + 1"),
)  # fmt: skip

COLUMNS = (
    changed("drop", "int", "i", f"{T} DROP COLUMN v", row()),
    changed("drop and add again", "text", "i", f"{T} DROP COLUMN v", f"{T} ADD COLUMN v text", row("'new'")),
    changed("drop and add at once", "text", "i", f"{T} DROP COLUMN v, ADD COLUMN v text", row("'new'")),
    changed("drop and add another type", "text", "i", f"{T} DROP COLUMN v, ADD COLUMN v int DEFAULT 5", row("6")),
    changed("rename", "text", "i", f"{T} RENAME v TO w", row("'a'")),
    changed("rename and add", "text", "i", f"{T} RENAME v TO full_v", f"{T} ADD COLUMN v text", row("'a'", "'b'")),
    changed("rename the key", "text", "i", f"{T} RENAME id TO number", row("'a'")),
    changed("rename to an odd name", "text", "i", f'{T} RENAME v TO "A ""b"" %s é"', row("'a'")),
    changed(
        "swap names", "int", "i", f"{T} ADD COLUMN w int DEFAULT 7",
        f"BEGIN; {T} RENAME v TO x; {T} RENAME w TO v; {T} RENAME x TO w; COMMIT", row("1", "2"),
    ),
    changed("add", "int", "i", f"{T} ADD COLUMN w text", row("1", "'w'")),
    changed("add without a row", "int", "i", f"{T} ADD COLUMN w text DEFAULT 'old'"),
    changed("drop without a row", "int", "i", f"{T} DROP COLUMN v"),
    changed("rename without a row", "int", "i", f"{T} RENAME v TO w"),
    changed("USING without a row", "int", "i", f"{T} ALTER v TYPE int USING v * 100"),
    changed("constant default", "int", "i", f"{T} ADD COLUMN w text DEFAULT 'it''s' NOT NULL", row("1", "'w'")),
    changed("default of type box", "int", "i", f"{T} ADD COLUMN w box DEFAULT '(1,2),(3,4)'", row("1", "'(5,6),(7,8)'")),
    changed("default of type array", "int", "i", T + """ ADD COLUMN w text[] DEFAULT '{"a,b",NULL,"q\\""}'""", row("1", "'{}'")),
    changed("default of type date", "int", "i", f"{T} ADD COLUMN w date DEFAULT '2025-02-03'", row("1", "'2024-01-01'")),
    changed(
        "default that is dropped", "int", "i",
        f"{T} ADD COLUMN w text DEFAULT 'active' NOT NULL", f"{T} ALTER w DROP DEFAULT", row("1", "'x'"),
    ),
    changed(
        "default that changes", "int", "i",
        f"{T} ADD COLUMN w text DEFAULT 'first'", f"{T} ALTER w SET DEFAULT 'second'", row("1"),
    ),
    changed(
        "default that is dropped, then a rewrite", "int", "i",
        f"{T} ADD COLUMN w text DEFAULT 'active' NOT NULL", f"{T} ALTER w DROP DEFAULT", "VACUUM FULL t", row("1", "'x'"),
    ),
    changed(
        "default of its own in each row", "int", "i",
        f"{T} ADD COLUMN w uuid DEFAULT gen_random_uuid()", row("1"),
    ),
    changed(
        "default of its own in each row that is dropped", "int", "i",
        f"{T} ADD COLUMN w uuid DEFAULT gen_random_uuid()", f"{T} ALTER w DROP DEFAULT", row("1"),
    ),
    changed("identity", "int", "i", f"{T} ADD COLUMN w bigint GENERATED ALWAYS AS IDENTITY", row("1")),
    changed("add and fill", "int", "i", f"BEGIN; {T} ADD COLUMN w int; UPDATE t SET w = v * 2; COMMIT", row("1", "2")),
    changed("add, drop, add", "int", "i", f"{T} ADD w int DEFAULT 1", f"{T} DROP w", f"{T} ADD w int DEFAULT 2", row("1", "3")),
)  # fmt: skip

OTHERS = (
    changed("constraints and defaults", "int", "i", f"{T} ALTER v SET NOT NULL, ADD CHECK (v > 0), ALTER v SET DEFAULT 5", row()),
    changed("statistics and storage", "text", "i", f"{T} ALTER v SET STATISTICS 7, ALTER v SET STORAGE EXTERNAL", row("'x'")),
    changed("vacuum full", "int", "i", "VACUUM FULL t", row("5")),
    changed("cluster", "int", "i", "CLUSTER t USING t_pkey", row("5")),
    changed("truncate", "int", "i", "TRUNCATE t", row("5")),
    changed("analyze and an index", "int", "i", "ANALYZE t", "CREATE INDEX ON t (v)", "VACUUM FREEZE t", row("5")),
    changed("owner and privileges", "int", "i", "GRANT SELECT ON t TO PUBLIC", "COMMENT ON TABLE t IS 'x'", row("5")),
    changed("identity becomes full", "int", "i", f"{T} REPLICA IDENTITY FULL", "UPDATE t SET v = -v", row("5")),
    changed(
        "identity becomes an index", "int NOT NULL", "i", "CREATE UNIQUE INDEX i ON t (v)",
        f"{T} REPLICA IDENTITY USING INDEX i", "UPDATE t SET id = id + 1000 WHERE v < 50", row("500"),
    ),
    changed(
        "primary key gains a column", "int NOT NULL", "i",
        f"{T} DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (v, id)", "INSERT INTO t VALUES (1, 5)", "UPDATE t SET v = -v",
    ),
    changed(
        "primary key gains a column, full identity", "int NOT NULL", "i", f"{T} REPLICA IDENTITY FULL",
        f"{T} DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (v, id)", "INSERT INTO t VALUES (1, 2)", "UPDATE t SET v = -v",
    ),
    changed("primary key is dropped, full identity", "int", "i", f"{T} REPLICA IDENTITY FULL",
            f"{T} DROP CONSTRAINT t_pkey", "INSERT INTO t VALUES (1, 1), (1, 1)", "DELETE FROM t WHERE id = 2"),
    changed("dropped and created again", "int", "i", "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v int)", row("5")),
    changed("dropped and created with other columns", "int", "i", "DROP TABLE t; CREATE TABLE t (id text PRIMARY KEY)", row()),
    Scenario(
        "label of an enum is renamed",
        tables="CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE t (id int PRIMARY KEY, v mood)",
        rows="INSERT INTO t VALUES (1, 'sad'), (2, 'ok')",
        sink="CREATE TYPE mood AS ENUM ('sad', 'ok')",
        changes=("ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'", "sink: ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'",
                 "INSERT INTO t VALUES (3, 'blue')"),
    ),
    Scenario(
        "label of an enum is added",
        tables="CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE t (id int PRIMARY KEY, v mood)",
        rows="INSERT INTO t VALUES (1, 'sad'), (2, 'ok')",
        sink="CREATE TYPE mood AS ENUM ('sad', 'ok')",
        changes=("sink: ALTER TYPE mood ADD VALUE 'happy'", "ALTER TYPE mood ADD VALUE 'happy'",
                 "INSERT INTO t VALUES (3, 'happy')"),
    ),
)  # fmt: skip

TRANSACTIONS = (
    changed(
        "drop between an update and an insert", "int", "i",
        f"BEGIN; UPDATE t SET v = v + 1 WHERE id < 10; {T} DROP COLUMN v; {row()}; COMMIT",
    ),
    changed(
        "add between two inserts", "int", "i",
        f"BEGIN; INSERT INTO t VALUES (200, 1); {T} ADD COLUMN w int DEFAULT 4; INSERT INTO t VALUES (201, 1, 2); COMMIT",
    ),
    changed(
        "rename between two updates", "int", "i",
        f"BEGIN; UPDATE t SET v = 500; {T} RENAME v TO w; UPDATE t SET w = w + 1 WHERE id < 50; COMMIT", row("1"),
    ),
    changed(
        "type between two inserts", "int", "i",
        f"BEGIN; INSERT INTO t VALUES (200, 1); {T} ALTER v TYPE bigint; INSERT INTO t VALUES (201, 5000000000); COMMIT",
    ),
    changed(
        "rolled back to a savepoint", "int", "i",
        f"BEGIN; SAVEPOINT s; {T} ADD w int; INSERT INTO t VALUES (201, 1, 2); ROLLBACK TO s; {row('5')}; COMMIT",
    ),
    changed(
        "several shapes while paused", "int", "i", "pause", row("5"), f"{T} DROP COLUMN v", "INSERT INTO t VALUES (102)",
        f"{T} ADD COLUMN w text DEFAULT 'x'", "INSERT INTO t VALUES (103, 'y')", "resume",
    ),
    changed(
        "type while paused", "int", "i", "pause", row("5"),
        f"{T} ALTER v TYPE numeric(10,2)", "INSERT INTO t VALUES (102, 1.55)", "resume",
    ),
    changed(
        "rename while paused", "int", "i", "pause", row("5"), f"{T} RENAME v TO w", "INSERT INTO t VALUES (102, 1)",
        f"{T} ADD COLUMN v text DEFAULT 'x'", "UPDATE t SET v = 'y' WHERE id < 5", "resume",
    ),
    changed(
        "created again while paused", "int", "i", "pause", row("5"), "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v int)",
        "INSERT INTO t VALUES (7, 7)", "resume",
    ),
    changed("the key is made again", "int", "i", f"BEGIN; {T} DROP CONSTRAINT t_pkey; {T} ADD PRIMARY KEY (id); COMMIT",
        row("5")),
)  # fmt: skip

NAMED = (
    Scenario(
        "two tables swap their names",
        tables="CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE t_new (id int PRIMARY KEY, v text)",
        rows="INSERT INTO t VALUES (1, 'old'); INSERT INTO t_new VALUES (1, 'new'), (2, 'new')",
        changes=(
            "BEGIN; ALTER TABLE t RENAME TO t_old; ALTER TABLE t_new RENAME TO t; COMMIT",
            "INSERT INTO t VALUES (3, 'new')",
            "INSERT INTO t_old VALUES (4, 'old')",
        ),
        compared=("t", "t_old"),
    ),
    Scenario(
        "a table is renamed",
        tables="CREATE TABLE t (id int PRIMARY KEY)",
        rows="INSERT INTO t VALUES (1), (2)",
        changes=("ALTER TABLE t RENAME TO u", "INSERT INTO u VALUES (3)", "DELETE FROM u WHERE id = 1"),
        compared=("u",),
    ),
    Scenario(
        "a table is renamed and one of the old name is created",
        tables="CREATE TABLE t (id int PRIMARY KEY)",
        rows="INSERT INTO t VALUES (1), (2)",
        changes=(
            "BEGIN; INSERT INTO t VALUES (3); ALTER TABLE t RENAME TO u; CREATE TABLE t (id int PRIMARY KEY); "
            "INSERT INTO t VALUES (7); INSERT INTO u VALUES (4); COMMIT",
        ),
        compared=("t", "u"),
    ),
    Scenario(
        "a schema is renamed",
        tables="CREATE SCHEMA one; CREATE TABLE one.t (id int PRIMARY KEY)",
        rows="INSERT INTO one.t VALUES (1), (2)",
        changes=("ALTER SCHEMA one RENAME TO two", "INSERT INTO two.t VALUES (3)", "UPDATE two.t SET id = 9 WHERE id = 1"),
        compared=("two.t",),
        filter=("one.*", "two.*"),
    ),
    Scenario(
        "a table moves to another schema",
        tables="CREATE SCHEMA one; CREATE TABLE t (id int PRIMARY KEY)",
        rows="INSERT INTO t VALUES (1), (2)",
        changes=("ALTER TABLE t SET SCHEMA one", "INSERT INTO one.t VALUES (3)", "UPDATE one.t SET id = 9 WHERE id = 1"),
        compared=("one.t",),
        filter=("one.*", "public.*"),
    ),
    Scenario(
        "a schema is renamed in a transaction that creates another one",
        tables="CREATE SCHEMA one; CREATE TABLE one.t (id int PRIMARY KEY)",
        rows="INSERT INTO one.t VALUES (1)",
        changes=(
            "BEGIN; INSERT INTO one.t VALUES (2); ALTER SCHEMA one RENAME TO two; CREATE SCHEMA one; "
            "CREATE TABLE one.t (id int PRIMARY KEY); INSERT INTO one.t VALUES (3); INSERT INTO two.t VALUES (4); COMMIT",
        ),
        compared=("one.t", "two.t"),
        filter=("one.*", "two.*"),
    ),
)


@pytest.mark.parametrize("scenario", TYPES, ids=named)
def test_type_of_a_column_changes(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Old and new values are those of the source, and the types too."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", COLUMNS, ids=named)
def test_columns_come_and_go(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """A column of the same name may be another column; old rows have the values that they have at the source."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", OTHERS, ids=named)
def test_table_changes_otherwise(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Rewrites, keys, identities and labels: harmless ones cost nothing, the others are followed or copied."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", TRANSACTIONS, ids=named)
def test_shape_changes_inside_a_transaction_or_a_pause(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Rows before and after the change arrive, each in the shape that it had."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", NAMED, ids=named)
def test_names_change(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """A table is found by its identity: rows go to where the source has them now."""
    run_scenario(scenario, source_db, sink_db)


def test_table_that_waits_for_its_copy_is_rewritten(source_db: str, sink_db: str) -> None:
    """A rewrite hides the rows from older snapshots: the copy of a large table does not leave the next one empty."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE a0 (id int PRIMARY KEY, v text)")
        kit.run("INSERT INTO a0 SELECT i, repeat(md5(i::text), 30) FROM generate_series(1, 60000) i")
        for name in ("b0", "b1"):
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY, v int)")
            kit.run(f"INSERT INTO {name} SELECT i, i FROM generate_series(1, 100) i")
        kit.start()
        plane.resume()
        plane.wait_until(lambda: copies_of(plane.observer.sink), "a copy is running")
        kit.run("ALTER TABLE b0 ALTER v TYPE bigint")
        kit.run("ALTER TABLE b1 ALTER v TYPE text USING 'number ' || v")
        plane.settle("a0", "b0", "b1")


def copies_of(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Return whether a first copy is being written at this server."""
    return bool(connection.execute("SELECT 1 FROM pg_stat_progress_copy WHERE command = 'COPY FROM'").fetchall())
