"""The sink table is not what it was, or not what the source's table is: other rows, types, keys, partitions, triggers, roles."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

import psycopg
import pytest

from deploy.local.postgres import PostgresServer
from tests.integration.data_plane import EITHER, Scenario, data_plane, named, run_scenario
from tests.processor.postgres.replication_kit import wait_until

pytestmark = pytest.mark.integration

_numbers = count(1)
KEYED = "CREATE TABLE t (id int PRIMARY KEY, v int)"
KEYLESS = "CREATE TABLE t (id int, v int); ALTER TABLE t REPLICA IDENTITY FULL"
ROWS = "INSERT INTO t SELECT i, i FROM generate_series(1, 100) i"
MANY = "INSERT INTO t SELECT i, i FROM generate_series(201, 400) i"
PARTITIONS = (
    "CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (MINVALUE) TO (50);"
    "CREATE TABLE t_middle PARTITION OF t FOR VALUES FROM (50) TO (150);"
    "CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (150) TO (MAXVALUE)"
)


def keyed(name: str, *changes: str, sink: str | None = None, **more: object) -> Scenario:
    """A table with a key and 100 rows, and changes at either end."""
    return Scenario(name, KEYED, ROWS, sink, changes, **more)  # type: ignore[arg-type]


REPLACED = (
    keyed("dropped", "sink: DROP TABLE t", "INSERT INTO t VALUES (101, 1)"),
    keyed("dropped, many rows", "sink: DROP TABLE t", MANY),
    keyed("dropped, an update", "sink: DROP TABLE t", "UPDATE t SET v = -v WHERE id = 5"),
    keyed("dropped while paused", "pause", "sink: DROP TABLE t", "INSERT INTO t VALUES (101, 1)", "resume"),
    keyed("created again", f"sink: DROP TABLE t; {KEYED}", "INSERT INTO t VALUES (101, 1)"),
    keyed("created again while paused", "pause", f"sink: DROP TABLE t; {KEYED}", "INSERT INTO t VALUES (101, 1)", "resume"),
    keyed("renamed away", "sink: ALTER TABLE t RENAME TO gone", "INSERT INTO t VALUES (101, 1)"),
    keyed(
        "another one under its name",
        "sink: BEGIN; ALTER TABLE t RENAME TO gone; CREATE TABLE t (LIKE gone INCLUDING ALL); COMMIT",
        MANY,
    ),
    keyed("dropped with its schema", "sink: DROP SCHEMA public CASCADE", "INSERT INTO t VALUES (101, 1)"),
    keyed("dropped twice", "sink: DROP TABLE t", "INSERT INTO t VALUES (101, 1)", "settle", "sink: DROP TABLE t", MANY),
)  # fmt: skip

TYPES = (
    Scenario(
        "numeric at both ends",
        KEYED,
        ROWS,
        changes=(
            "INSERT INTO t VALUES (101, 1)",
            "settle",
            "sink: ALTER TABLE t ALTER v TYPE numeric",
            "ALTER TABLE t ALTER v TYPE numeric",
            "INSERT INTO t VALUES (102, 1.5), (103, 2.25)",
            "INSERT INTO t SELECT i, i / 8.0 FROM generate_series(201, 400) i",
            "UPDATE t SET v = v + 0.125",
        ),
    ),
    keyed("bigint to double", "sink: ALTER TABLE t ALTER v TYPE float8", "INSERT INTO t VALUES (101, 7)", MANY, expected=EITHER,
          compares_types=False),
    keyed("int to text", "sink: ALTER TABLE t ALTER v TYPE text", "INSERT INTO t VALUES (101, 7)", MANY, "UPDATE t SET v = -v",
          compares_types=False),
    keyed("int to bigint", "sink: ALTER TABLE t ALTER v TYPE bigint", "INSERT INTO t VALUES (101, 7)", MANY,
        "UPDATE t SET v = -v",
          compares_types=False),
    keyed("int to smallint", "sink: ALTER TABLE t ALTER v TYPE smallint", "INSERT INTO t VALUES (101, 70000)", expected=EITHER,
          compares_types=False),
    keyed("int to real", "sink: ALTER TABLE t ALTER v TYPE real", "INSERT INTO t VALUES (101, 16777217)", expected=EITHER,
          compares_types=False),
    Scenario("timestamptz into date", "CREATE TABLE t (id int PRIMARY KEY, v timestamptz)", "INSERT INTO t VALUES (1, now())",
             "CREATE TABLE t (id int PRIMARY KEY, v date)", ("INSERT INTO t VALUES (2, now())",), expected=EITHER),
    Scenario("text into varchar(3)", "CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (1, 'abc')",
             "CREATE TABLE t (id int PRIMARY KEY, v varchar(3))", ("INSERT INTO t VALUES (2, 'abcd')",), expected=EITHER),
    Scenario("numeric into int", "CREATE TABLE t (id int PRIMARY KEY, v numeric)", "INSERT INTO t VALUES (1, 1.5)",
             "CREATE TABLE t (id int PRIMARY KEY, v int)", ("INSERT INTO t VALUES (2, 2.5)",), expected=EITHER),
    Scenario("numeric into numeric of less scale", "CREATE TABLE t (id int PRIMARY KEY, v numeric(10,4))",
             "INSERT INTO t VALUES (1, 1.2345)", "CREATE TABLE t (id int PRIMARY KEY, v numeric(10,2))",
             ("INSERT INTO t VALUES (2, 2.3456)",), expected=EITHER),
    Scenario("text into int", "CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (1, '7')",
             "CREATE TABLE t (id int PRIMARY KEY, v int)", ("INSERT INTO t VALUES (2, '08')",), expected=EITHER),
)  # fmt: skip

PARTITIONED = (
    Scenario(
        "no key, equal rows in several partitions",
        KEYLESS,
        "INSERT INTO t SELECT i, v FROM generate_series(1, 200) i, generate_series(1, 2) v",
        f"CREATE TABLE t (id int, v int) PARTITION BY RANGE (id); {PARTITIONS}",
        (
            "UPDATE t SET v = 7 WHERE id IN (1, 60, 160) AND v = 1",
            "DELETE FROM t WHERE id IN (2, 61, 161) AND v = 2",
            "UPDATE t SET id = id + 100 WHERE id BETWEEN 40 AND 60",
            "UPDATE t SET v = v + 1",
            "DELETE FROM t WHERE id % 3 = 0",
        ),
    ),
    Scenario(
        "no key, the same row twice",
        KEYLESS,
        "INSERT INTO t SELECT 10, 1 FROM generate_series(1, 5); INSERT INTO t SELECT 200, 1 FROM generate_series(1, 5)",
        f"CREATE TABLE t (id int, v int) PARTITION BY RANGE (id); {PARTITIONS}",
        (
            "DELETE FROM t WHERE ctid IN (SELECT ctid FROM t WHERE id = 10 LIMIT 2)",
            "UPDATE t SET v = 2 WHERE ctid IN (SELECT ctid FROM t WHERE id = 200 LIMIT 2)",
        ),
    ),
    Scenario(
        "a key, rows that move between partitions",
        KEYED,
        ROWS,
        f"CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id); {PARTITIONS}",
        ("UPDATE t SET id = id + 100 WHERE id BETWEEN 20 AND 30", MANY, "UPDATE t SET id = -id", "DELETE FROM t WHERE v % 7 = 0"),
    ),
    Scenario("truncate", KEYED, ROWS, f"CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id); {PARTITIONS}",
             ("TRUNCATE t", "INSERT INTO t VALUES (1, 1), (200, 2)")),
    Scenario("a partition is replaced", KEYED, ROWS,
             f"CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id); {PARTITIONS}",
             ("sink: ALTER TABLE t DETACH PARTITION t_high; DROP TABLE t_high",
              "sink: CREATE TABLE t_high2 PARTITION OF t FOR VALUES FROM (150) TO (MAXVALUE)", MANY)),
)  # fmt: skip

INHERITED = tuple(
    Scenario(
        name,
        f"CREATE TABLE parent (id int PRIMARY KEY, v int); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent); {more}",
        "INSERT INTO parent SELECT i, i FROM generate_series(1, 100) i; INSERT INTO child SELECT * FROM parent",
        f"CREATE TABLE parent (id int PRIMARY KEY, v int); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent); {more}",
        changes,
        compared=("parent", "child"),
    )
    for name, more, changes in (
        ("truncate only", "", ("TRUNCATE ONLY parent",)),
        ("delete only", "", ("DELETE FROM ONLY parent WHERE id = 2",)),
        ("update only", "", ("UPDATE ONLY parent SET v = -1 WHERE id < 90", "UPDATE child SET v = -2 WHERE id = 3")),
        (
            "truncate with children",
            "",
            ("TRUNCATE parent", "INSERT INTO parent VALUES (1, 1)", "INSERT INTO child VALUES (1, 2)"),
        ),
        (
            "no keys, full identity",
            "ALTER TABLE parent DROP CONSTRAINT parent_pkey; ALTER TABLE child DROP CONSTRAINT child_pkey; "
            "ALTER TABLE parent REPLICA IDENTITY FULL; ALTER TABLE child REPLICA IDENTITY FULL",
            (
                "DELETE FROM ONLY parent WHERE id < 60",
                "UPDATE ONLY parent SET v = 0 WHERE id = 70",
                "DELETE FROM child WHERE id = 4",
            ),
        ),
        ("many", "", ("UPDATE ONLY parent SET v = v + 1", "DELETE FROM ONLY parent WHERE id % 2 = 0", "UPDATE child SET v = -v")),
    )
)

STATEMENTS = (
    Scenario(
        "key is GENERATED ALWAYS AS IDENTITY",
        "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)",
        "INSERT INTO t (v) SELECT i FROM generate_series(1, 100) i",
        "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)",
        ("INSERT INTO t (v) VALUES (5)", "UPDATE t SET v = -v WHERE id = 5", "UPDATE t SET v = v + 1",
        "DELETE FROM t WHERE id < 3"),
    ),
    Scenario(
        "another column is GENERATED ALWAYS AS IDENTITY",
        "CREATE TABLE t (id int PRIMARY KEY, v int GENERATED ALWAYS AS IDENTITY, w int)",
        "INSERT INTO t (id) SELECT i FROM generate_series(1, 100) i",
        changes=("INSERT INTO t (id) VALUES (101)", "UPDATE t SET w = id WHERE id = 5", "UPDATE t SET w = -id",
                 "UPDATE t SET id = id + 500 WHERE id < 5"),
    ),
    Scenario("no index on the key", KEYED, ROWS, "CREATE TABLE t (id int, v int)",
             ("INSERT INTO t VALUES (101, 1)", "UPDATE t SET v = -v WHERE id = 5", "UPDATE t SET v = v + 1",
             "DELETE FROM t WHERE id < 60")),
    Scenario("an index that is not unique", KEYED, ROWS, "CREATE TABLE t (id int, v int); CREATE INDEX ON t (id)",
             ("INSERT INTO t VALUES (101, 1)", "UPDATE t SET v = -v WHERE id = 5", "UPDATE t SET v = v + 1",
             "DELETE FROM t WHERE id < 60")),
    Scenario("another unique index", KEYED, ROWS, "CREATE TABLE t (id int, v int UNIQUE)",
             ("INSERT INTO t VALUES (101, 1000)", "UPDATE t SET v = -v WHERE id = 5", "UPDATE t SET v = v + 5000",
             "DELETE FROM t WHERE id < 60")),
    Scenario("a partial unique index", KEYED, ROWS, "CREATE TABLE t (id int, v int); CREATE UNIQUE INDEX ON t (id) WHERE v > 50",
             ("INSERT INTO t VALUES (101, 1)", "UPDATE t SET v = -v WHERE id = 5", "UPDATE t SET v = v + 1",
             "DELETE FROM t WHERE id < 60")),
    Scenario("the key in another order", "CREATE TABLE t (a int, b int, v int, PRIMARY KEY (a, b))",
             "INSERT INTO t SELECT i % 7, i, i FROM generate_series(1, 100) i",
             "CREATE TABLE t (v int, b int, a int, PRIMARY KEY (b, a))",
             ("UPDATE t SET v = -v WHERE b = 5", "UPDATE t SET a = a + 1", "DELETE FROM t WHERE b < 60")),
    Scenario("a deferrable key at the sink", KEYED, ROWS,
             "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v int)",
             ("INSERT INTO t VALUES (101, 1)", "UPDATE t SET v = v + 1", "DELETE FROM t WHERE id < 60")),
    Scenario(
        "deferrable unique values that are swapped",
        "CREATE TABLE t (id int PRIMARY KEY, v int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
        ROWS,
        "CREATE TABLE t (id int PRIMARY KEY, v int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
        ("BEGIN; UPDATE t SET v = 2 WHERE id = 1; UPDATE t SET v = 1 WHERE id = 2; COMMIT", "UPDATE t SET v = 101 - v"),
    ),
    Scenario(
        "deferrable key that is swapped",
        "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v int); ALTER TABLE t REPLICA IDENTITY FULL",
        ROWS,
        "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v int)",
        ("BEGIN; UPDATE t SET id = 2 WHERE v = 1; UPDATE t SET id = 1 WHERE v = 2; COMMIT", "UPDATE t SET id = 101 - id"),
    ),
    Scenario(
        "a rule for inserts",
        KEYED,
        ROWS,
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE log (id int);"
        "CREATE RULE r AS ON INSERT TO t DO ALSO INSERT INTO log VALUES (new.id)",
        ("INSERT INTO t VALUES (101, 1)", MANY, "UPDATE t SET v = -v", "DELETE FROM t WHERE id < 50"),
    ),
    Scenario(
        "a rule for updates",
        KEYED,
        ROWS,
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE log (id int);"
        "CREATE RULE r AS ON UPDATE TO t DO ALSO INSERT INTO log VALUES (new.id)",
        ("INSERT INTO t VALUES (101, 1)", MANY, "UPDATE t SET v = -v", "UPDATE t SET v = v + 1 WHERE id = 7"),
    ),
    Scenario(
        "local columns survive a changed key",
        KEYED,
        ROWS,
        "CREATE TABLE t (id int PRIMARY KEY, v int, seen text DEFAULT 'no')",
        ("sink: UPDATE t SET seen = 'yes' WHERE v <= 60", "UPDATE t SET id = id + 1000 WHERE v = 5",
         "UPDATE t SET id = id + 2000 WHERE v BETWEEN 10 AND 80", "INSERT INTO t VALUES (7000, 7000)"),
        at_sink=(("SELECT count(*), min(v), max(v) FROM t WHERE seen = 'yes'", [(60, 1, 60)]),
                 ("SELECT count(*) FROM t WHERE seen = 'no'", [(41,)])),
    ),
    Scenario(
        "local columns of a table without a key",
        KEYLESS,
        ROWS,
        "CREATE TABLE t (id int, v int, seen text DEFAULT 'no')",
        ("sink: UPDATE t SET seen = 'yes' WHERE v <= 60", "UPDATE t SET id = id + 1000 WHERE v <= 80",
        "DELETE FROM t WHERE v = 3"),
        at_sink=(("SELECT count(*), min(v), max(v) FROM t WHERE seen = 'yes'", [(59, 1, 60)]),),
    ),
    Scenario(
        "temporal primary key",
        "CREATE TABLE t (id int4range, during daterange, v text, PRIMARY KEY (id, during WITHOUT OVERLAPS))",
        "INSERT INTO t SELECT int4range(i, i + 1), '[2020-01-01,2021-01-01)', 'a' FROM generate_series(1, 100) i",
        changes=(
            "INSERT INTO t VALUES ('[1,2)', '[2021-01-01,2022-01-01)', 'b')",
            "UPDATE t SET v = 'c' WHERE id = '[1,2)' AND during @> '2021-06-01'::date",
            "UPDATE t SET v = v || 'x'",
            "DELETE FROM t WHERE lower(id) < 60",
        ),
        version_min=180000,
    ),
)  # fmt: skip

OPERATIONS = """
CREATE TABLE log (number serial, op text, old_id int, new_id int);
CREATE FUNCTION log_op() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF TG_OP = 'DELETE' THEN INSERT INTO log (op, old_id) VALUES (TG_OP, old.id);
  ELSIF TG_OP = 'INSERT' THEN INSERT INTO log (op, new_id) VALUES (TG_OP, new.id);
  ELSE INSERT INTO log (op, old_id, new_id) VALUES (TG_OP, old.id, new.id); END IF;
  RETURN NULL; END $$;
ALTER FUNCTION log_op SET search_path = public;
CREATE TRIGGER log_op AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION log_op();
ALTER TABLE t ENABLE ALWAYS TRIGGER log_op;"""


@pytest.mark.parametrize("scenario", REPLACED, ids=named)
def test_sink_table_is_replaced(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """A sink table that is gone, or is another one, is copied again; the next change alone would not make it equal."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", TYPES, ids=named)
def test_types_of_the_sink_differ(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """A type that holds every value is written exactly, also if it changes while sessions have plans; others are an error."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", PARTITIONED, ids=named)
def test_sink_table_is_partitioned(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Each change affects its own row, in whatever partition that is."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", INHERITED, ids=named)
def test_tables_inherit(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Rows of a child are not rows of its parent."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", STATEMENTS, ids=named)
def test_sink_table_needs_other_statements(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Identity columns, missing and deferrable indexes, rules, local columns and temporal keys work as at the source."""
    if scenario.version_min and version_of(source_db) < scenario.version_min:
        scenario = Scenario(scenario.name, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    run_scenario(scenario, source_db, sink_db)


def test_triggers_see_what_happened(source_db: str, sink_db: str) -> None:
    """An update of the source is one update for a trigger of the sink, also when the key changes."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run(KEYED)
        kit.at_sink(KEYED)
        kit.run(ROWS)
        plane.start()
        plane.settle("t")
        kit.at_sink(OPERATIONS)
        kit.run("UPDATE t SET v = -v WHERE id = 5")
        kit.run("UPDATE t SET id = 1005 WHERE id = 5")
        kit.run("INSERT INTO t VALUES (101, 1)")
        kit.run("DELETE FROM t WHERE id = 6")
        kit.run("BEGIN; INSERT INTO t VALUES (102, 1); UPDATE t SET v = 2 WHERE id = 102; DELETE FROM t WHERE id = 102; COMMIT")
        plane.settle("t")
        assert kit.at_sink("SELECT op, old_id, new_id FROM log ORDER BY number") == [
            ("UPDATE", 5, 5),
            ("UPDATE", 5, 1005),
            ("INSERT", None, 101),
            ("DELETE", 6, None),
            ("INSERT", None, 102),
            ("UPDATE", 102, 102),
            ("DELETE", 102, None),
        ]


CONFLICTS = {
    "update of a missing row": ("DELETE FROM t WHERE id = 5", "UPDATE t SET v = 50 WHERE id = 5"),
    "delete of a missing row": ("DELETE FROM t WHERE id = 5", "DELETE FROM t WHERE id = 5"),
    "insert of an existing row": ("INSERT INTO t VALUES (101, 7)", "INSERT INTO t VALUES (101, 1)"),
    "update to an existing key": ("INSERT INTO t VALUES (101, 7)", "UPDATE t SET id = 101 WHERE id = 5"),
}


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("conflict", list(CONFLICTS))
def test_conflicts_are_counted_and_the_source_wins(source_db: str, sink_db: str, conflict: str, many: bool) -> None:
    """The table is equal in the end, and its row in tablewire.positions counts what did not match."""
    at_sink, at_source = CONFLICTS[conflict]
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run(KEYED)
        kit.run(ROWS)
        plane.start()
        plane.settle("t")
        assert conflicts(plane.observer.sink) == 0
        kit.at_sink(at_sink)
        kit.run(f"BEGIN; {at_source}; {MANY if many else 'SELECT 1'}; COMMIT")
        plane.settle("t")
        assert conflicts(plane.observer.sink) > 0


def test_conflict_is_an_error_if_that_is_wanted(source_db: str, sink_db: str) -> None:
    """With on_conflict=error the table stops at a row that is missing, and continues when it is there again."""
    with data_plane(source_db, sink_db, options={"on_conflict": "error"}) as plane:
        kit = plane.kit
        kit.run(KEYED)
        kit.run(ROWS)
        plane.start()
        plane.settle("t")
        kit.at_sink("DELETE FROM t WHERE id = 5")
        kit.run("UPDATE t SET v = 50 WHERE id = 5")
        plane.wait_error("t", 'public.t|"t"')
        kit.at_sink("INSERT INTO t VALUES (5, 5)")
        plane.settle("t")


def test_conflict_is_skipped_if_that_is_wanted(source_db: str, sink_db: str) -> None:
    """With on_conflict=skip the sink keeps its own row, which is counted."""
    with data_plane(source_db, sink_db, options={"on_conflict": "skip"}) as plane:
        kit = plane.kit
        kit.run(KEYED)
        kit.run(ROWS)
        plane.start()
        plane.settle("t")
        kit.at_sink("INSERT INTO t VALUES (101, 7)")
        kit.run("INSERT INTO t VALUES (101, 1)")
        kit.run("INSERT INTO t VALUES (102, 2)")
        plane.wait_until(lambda: kit.at_sink("SELECT 1 FROM t WHERE id = 102"), "the next row")
        assert kit.at_sink("SELECT v FROM t WHERE id = 101") == [(7,)]
        assert conflicts(plane.observer.sink) == 1


def conflicts(connection: object) -> int:
    rows = connection.execute("SELECT sum(conflicts) FROM tablewire.positions").fetchall()  # type: ignore[attr-defined]
    return int(rows[0][0] or 0)


def test_index_of_the_sink_finds_rows_without_a_key(source_db: str, sink_db: str) -> None:
    """Updates of a table without a key use an index of the sink table instead of reading it all each time."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run(KEYLESS)
        kit.run("INSERT INTO t SELECT i, i FROM generate_series(1, 20000) i")
        kit.at_sink("CREATE TABLE t (id int, v int); CREATE INDEX by_id ON t (id)")
        plane.start()
        plane.settle("t")
        kit.at_sink("ANALYZE t")
        began = scans(plane.observer.sink)
        for number in range(1, 101):
            kit.run(f"UPDATE t SET v = -v WHERE id = {number * 7}")
        plane.settle("t")
        plane.wait_until(lambda: scans(plane.observer.sink) - began < 20, "the table is hardly ever read as a whole")
        plane.wait_until(
            lambda: kit.at_sink("SELECT 1 FROM pg_stat_user_indexes WHERE indexrelname = 'by_id' AND idx_scan > 0"),
            "the index is used",
        )


def scans(connection: object) -> int:
    rows = connection.execute("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 't'").fetchall()  # type: ignore[attr-defined]
    return int(rows[0][0])


@pytest.fixture
def role(postgres_server: PostgresServer) -> Iterator[str]:
    """A role of the server without special rights; it is dropped after the databases."""
    name = f"plain_{next(_numbers)}"
    postgres_server.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    postgres_server.execute(f"DROP ROLE {name}")


def uri_of(uri: str, role: str) -> str:
    return uri.replace("postgres@", f"{role}@")


def version_of(uri: str) -> int:
    with psycopg.connect(uri) as connection:
        return connection.info.server_version


def test_row_level_security_hides_rows_of_the_sink(role: str, source_db: str, sink_db: str) -> None:
    """An update that would affect no row because the role does not see it is the table's error until the policy is gone."""
    with data_plane(source_db, uri_of(sink_db, role)) as plane, data_plane(source_db, sink_db) as superuser:
        kit = plane.kit
        kit.run(KEYED)
        kit.run(ROWS)
        superuser.kit.at_sink(
            f"{KEYED}; GRANT ALL ON t TO {role}; GRANT CREATE ON DATABASE {sink_db.rpartition('/')[2]} TO {role}"
        )
        plane.start()
        wait_until(lambda: superuser.kit.at_sink("SELECT count(*) FROM t") == [(100,)], "the copy")
        superuser.kit.at_sink("ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING (id > 50) WITH CHECK (true)")
        kit.run("UPDATE t SET v = -v WHERE id = 5")
        kit.run("DELETE FROM t WHERE id = 6")
        plane.wait_error("t", "row-level security")
        superuser.kit.at_sink("ALTER TABLE t DISABLE ROW LEVEL SECURITY")
        plane.settle("t")


def test_role_that_may_not_disable_foreign_keys(role: str, source_db: str, sink_db: str) -> None:
    """Parents and children of one transaction arrive without waiting for the pauses between many retries."""
    tables = "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent)"
    with data_plane(source_db, uri_of(sink_db, role)) as plane, data_plane(source_db, sink_db) as superuser:
        kit = plane.kit
        kit.run(tables)
        superuser.kit.at_sink(
            f"{tables}; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};"
            f"GRANT CREATE ON DATABASE {sink_db.rpartition('/')[2]} TO {role}"
        )
        plane.start()
        plane.settle("parent", "child")
        began = time.monotonic()
        for number in range(0, 500, 100):
            kit.run(
                f"BEGIN; INSERT INTO parent SELECT i FROM generate_series({number}, {number + 99}) i;"
                f"INSERT INTO child SELECT i, i FROM generate_series({number}, {number + 99}) i; COMMIT"
            )
        plane.settle("parent", "child")
        assert time.monotonic() - began < 5.0


def test_role_without_temporary_tables(role: str, source_db: str, sink_db: str) -> None:
    """A role that may not create temporary tables writes large batches too."""
    name = sink_db.rpartition("/")[2]
    with data_plane(source_db, uri_of(sink_db, role)) as plane, data_plane(source_db, sink_db) as superuser:
        kit = plane.kit
        kit.run(KEYED)
        superuser.kit.at_sink(f"{KEYED}; GRANT ALL ON t TO {role}; REVOKE ALL ON DATABASE {name} FROM PUBLIC")
        superuser.kit.at_sink(f"GRANT CREATE, CONNECT ON DATABASE {name} TO {role}")
        plane.start()
        kit.run("INSERT INTO t SELECT i, i FROM generate_series(1, 500) i")
        kit.run("UPDATE t SET v = -v")
        kit.run("DELETE FROM t WHERE id % 3 = 0")
        plane.settle("t")
