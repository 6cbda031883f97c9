"""What native logical replication does with types, partitions, indexes, roles and conflicts, done by Tablewire."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from deploy.local.postgres import PostgresServer
from tests.integration.data_plane import FOLLOWED, Scenario, asks_peer, data_plane, named, run_scenario
from tests.integration.native_peer import run_native

pytestmark = pytest.mark.integration

_numbers = count(1)
ROOT = {"partitions": "root"}

TYPE_DDL = """
CREATE EXTENSION hstore;
CREATE TYPE mood AS ENUM ('a', 'b', 'c', 'd', 'e');
CREATE TYPE basic AS (a float8, b text, c int);
CREATE TYPE with_enum AS (a float8, b mood, c int);
CREATE TYPE with_enums AS (a float8, b mood[], c int);
CREATE TYPE mixed AS (a basic, b basic[], c mood, d mood[]);
CREATE FUNCTION grows(int) RETURNS bool LANGUAGE sql AS 'SELECT $1 >= 0';
CREATE DOMAIN growing AS int CHECK (grows(VALUE));"""
TYPE_TABLES = {
    "one_array": ("a int PRIMARY KEY, b int[]", "(1, '{1,2,3}'), (2, '{2,3,1}'), (5, '{5,NULL,3}')", "b = '{4,5,6}'", "a = 2"),
    "arrays": ("a int[] PRIMARY KEY, b text[], c float8[], d interval[]",
               "('{1,2,3}', '{a,b}', '{1.1,2.2}', '{1 day,2 days}'), ('{5,NULL,NULL}', '{e,NULL}', '{5.5,NULL}', '{5 "
               "years,NULL}')",
               "b = '{1a,2b}', c = '{1.0}', d = '{1 day 1 second}'", "a = '{1,2,3}'"),
    "one_enum": ("a int PRIMARY KEY, b mood", "(1, 'a'), (2, 'b'), (5, NULL)", "b = 'c'", "a = 5"),
    "enums": ("a mood PRIMARY KEY, b mood[]", "('a', '{b,c}'), ('b', '{c,a}'), ('e', '{d,NULL}')", "b = '{e,NULL}'", "a = 'b'"),
    "one_comp": ("a int PRIMARY KEY, b basic", "(1, ROW(1.0, 'a', 1)), (5, ROW(NULL, NULL, 5))", "b = ROW(1.0, 'A', 1)", "a = 1"),
    "comps": ("a basic PRIMARY KEY, b basic[]", "(ROW(1.0, 'a', 1), ARRAY[ROW(1, 'a', 1)::basic]), (ROW(5.0, 'e', NULL), "
                                                "'{NULL}')",
              "b = ARRAY[NULL, ROW(9, 'x', NULL)::basic]", "(a).b = 'a'"),
    "comp_enum": ("a int PRIMARY KEY, b with_enum", "(1, ROW(1.0, 'a', 1)), (5, ROW(NULL, 'e', NULL))", "b = ROW(4.0, 'd', "
                                                                                                        "44)", "a = 1"),
    "comp_enum_array": ("a with_enum PRIMARY KEY, b with_enum[]", "(ROW(1.0, 'a', 1), ARRAY[ROW(1, 'a', 1)::with_enum, NULL])",
                        "b = ARRAY[ROW(2, 'b', 2)::with_enum]", "(a).c = 7"),
    "comp_enums": ("a with_enums PRIMARY KEY, b with_enums[]",
                   "(ROW(1.0, '{a,b,c}', 1), ARRAY[ROW(1, '{a,b,c}', 1)::with_enums]), (ROW(5.0, '{c,NULL,b}', NULL), '{}')",
                   "b = ARRAY[NULL, ROW(NULL, '{a,e,c}', 2)::with_enums]", "(a).a = 1"),
    "mixes": ("a mixed PRIMARY KEY, b mixed[]",
              "(ROW(ROW(1,'a',1), ARRAY[ROW(1,'a',1)::basic, ROW(2,'b',2)::basic], 'a', '{a,b,NULL,c}'), '{}')",
              "b[2] = ROW(ROW(1,'a',1), '{NULL}', 'a', '{a,b,c}')", "((a).a).a = 2"),
    "ranges": ("a int PRIMARY KEY, b int4range, c tstzrange, d int8range[]",
               "(1, '[1,10]', tstzrange('2014-08-04 00:00:00+02', 'infinity'), '{\"[1,2]\",\"[10,20]\"}'), (5, NULL, NULL, NULL)",
               "b = '(1,90)', d = '{NULL,\"[11,9999999]\"}'", "a = 5"),
    "hstores": ("a int PRIMARY KEY, b hstore", "(1, 'a=>1'), (4, '\"yellow horse\"=>moaned')", "b = 'also=>updated'", "a = 4"),
    "domains": ("a growing PRIMARY KEY, b int", "(10, 1), (11, 2)", "b = 3", "a = 11"),
    "numerical": ("a int PRIMARY KEY, b numeric, c float8, d bigint", "(1, 1.2, 1.3, 10), (2, 2.2, 2.3, 20)", "b = 42, c = "
                                                                                                              "NULL", "a = 2"),
}  # fmt: skip
"""For each table: its columns, its rows, an update of all of them, and which are deleted."""

FULL = "ALTER TABLE t REPLICA IDENTITY FULL"
INDEXES = (
    Scenario("an index with two columns", f"CREATE TABLE t (x int, y text); {FULL}",
             "INSERT INTO t SELECT i % 10, i % 10 FROM generate_series(0, 10) i", "CREATE TABLE t (x int, y text); "
                                                                                  "CREATE INDEX ON t (x, y)",
             ("DELETE FROM t WHERE x IN (5, 6)", "UPDATE t SET x = 100, y = '200' WHERE x IN (1, 2)")),
    Scenario("an index of a partitioned table",
             f"CREATE TABLE t (user_id bigint, v int, w int) PARTITION BY RANGE (v); "
             f"CREATE TABLE t_0 PARTITION OF t FOR VALUES FROM (0) TO (10);"
             f"CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (10) TO (20); {FULL}; ALTER TABLE t_0 REPLICA IDENTITY FULL;"
             "ALTER TABLE t_1 REPLICA IDENTITY FULL", "INSERT INTO t SELECT i % 100, i % 20, i FROM generate_series(0, 100) i",
             "CREATE TABLE t (user_id bigint, v int, w int) PARTITION BY RANGE (v); "
             "CREATE TABLE t_0 PARTITION OF t FOR VALUES FROM (0) TO (10);"
             "CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (10) TO (20); CREATE INDEX ON t (user_id, v)",
             ("UPDATE t SET v = 0 WHERE user_id = 4", "DELETE FROM t WHERE user_id = 1 AND v = 1", "DELETE FROM t WHERE "
                                                                                                   "user_id = 12 AND v = 12"),
             compared=("t_0", "t_1")),
    Scenario("indexes on an expression and with a predicate", f"CREATE TABLE t (a text, b text); {FULL}",
             "INSERT INTO t SELECT 'first_' || i, 'last_' || i FROM generate_series(0, 200) i",
             "CREATE TABLE t (a text, b text); CREATE INDEX ON t ((a || ' ' || b)); CREATE INDEX ON t (a) WHERE a = 'first_1'",
             ("UPDATE t SET a = 'no-name' WHERE a = 'first_1'", "UPDATE t SET a = 'no-name' WHERE b = 'last_2'",
             "DELETE FROM t WHERE a = 'first_3'")),
    Scenario("an index with columns and an expression, dropped later", f"CREATE TABLE t (a text, b text); {FULL}",
             "INSERT INTO t SELECT 'first_' || i, 'last_' || i FROM generate_series(0, 20) i",
             "CREATE TABLE t (a text, b text); CREATE INDEX names ON t (a, b, (a || ' ' || b))",
             ("UPDATE t SET a = 'no-name' WHERE a = 'first_1'", "DELETE FROM t WHERE a = 'no-name'", "settle",
             "sink: DROP INDEX names",
              "DELETE FROM t WHERE b = 'last_18'")),
    Scenario("a column that the source lacks in the index", f"CREATE TABLE t (x int); {FULL}", "SELECT 1",
             "CREATE TABLE t (x int, y int); CREATE INDEX ON t (x, y)",
             ("INSERT INTO t VALUES (1), (2), (3)", "UPDATE t SET x = x + 1 WHERE x = 1")),
    Scenario("NULLs in the index", f"CREATE TABLE t (x int, y int); {FULL}",
             "INSERT INTO t VALUES (1, NULL), (2, 2), (NULL, NULL)",
             "CREATE TABLE t (x int, y int); CREATE UNIQUE INDEX ON t (x, y)",
             ("UPDATE t SET y = 5 WHERE x = 1", "DELETE FROM t WHERE x IS NULL",
             "INSERT INTO t VALUES (NULL, NULL), (NULL, NULL)",
              "DELETE FROM t WHERE ctid IN (SELECT ctid FROM t WHERE x IS NULL LIMIT 1)")),
    Scenario("a unique index and more rows at the sink", f"CREATE TABLE t (x int, y int); {FULL}",
             "INSERT INTO t SELECT i, i FROM generate_series(0, 21) i",
             "CREATE TABLE t (x int, y int); CREATE UNIQUE INDEX ON t (x, y)",
             ("sink: INSERT INTO t SELECT i + 100, i FROM generate_series(0, 21) i", "UPDATE t SET x = 2000 WHERE y = 15",
              "sink: DELETE FROM t WHERE x BETWEEN 100 AND 200"), native=None),
    Scenario("a hash index", f"CREATE TABLE t (x int, y text); {FULL}",
             "INSERT INTO t SELECT i, i % 10 FROM generate_series(0, 10) i",
             "CREATE TABLE t (x int, y text); CREATE INDEX ON t USING hash (x)",
             ("DELETE FROM t WHERE x IN (5, 6)", "UPDATE t SET x = 100, y = '200' WHERE x IN (1, 2)")),
    Scenario("a key at the sink alone", f"CREATE TABLE t (a int, b int); {FULL}",
             "INSERT INTO t SELECT i, i FROM generate_series(1, 50) i",
             "CREATE TABLE t (a int PRIMARY KEY, b int)", ("UPDATE t SET b = -b", "UPDATE t SET a = a + 100 WHERE b < -40",
             "DELETE FROM t WHERE b = -3")),
)  # fmt: skip

LISTED = (
    "CREATE TABLE t (a int PRIMARY KEY, b text) PARTITION BY LIST (a); CREATE TABLE t_1 (b text, a int NOT NULL);"
    "ALTER TABLE t ATTACH PARTITION t_1 FOR VALUES IN (1, 2, 3); CREATE TABLE t_2 PARTITION OF t FOR VALUES IN (4, 5, 6);"
    "CREATE TABLE t_def PARTITION OF t DEFAULT"
)
LEAVES = ("t_1", "t_2", "t_def")
MOVES = (
    "INSERT INTO t VALUES (1, 'x')", "INSERT INTO t_1 (a) VALUES (3)", "INSERT INTO t_2 VALUES (5)", "INSERT INTO t VALUES (0)",
    "UPDATE t SET a = 2 WHERE a = 1", "UPDATE t SET a = 6 WHERE a = 5", "UPDATE t SET a = 4 WHERE a = 6",
    "UPDATE t SET a = 1 WHERE a = 0", "UPDATE t SET a = 5 WHERE a = 1", "UPDATE t SET a = 7 WHERE a = 2",
    "DELETE FROM t WHERE a = 3",
)  # fmt: skip
PARTITIONS = (
    Scenario("leaves into tables", LISTED, "SELECT 1",
             "CREATE TABLE t_1 (a int PRIMARY KEY, c text DEFAULT 'c1', b text); CREATE TABLE t_2 (a int PRIMARY KEY, b text);"
             "CREATE TABLE t_def (a int PRIMARY KEY, b text, c text DEFAULT 'cd')",
             (*MOVES, "TRUNCATE t_2", "INSERT INTO t VALUES (4, 'y')", "TRUNCATE t", "INSERT INTO t VALUES (5), (9)"),
             compared=LEAVES),
    Scenario("leaves into partitions that have partitions", LISTED, "SELECT 1",
             "CREATE TABLE t (c text, a int PRIMARY KEY, b text) PARTITION BY LIST (a); "
             "CREATE TABLE t_1 (b text, c text, a int NOT NULL);"
             "ALTER TABLE t ATTACH PARTITION t_1 FOR VALUES IN (1, 2, 3);"
             "CREATE TABLE t_2 PARTITION OF t FOR VALUES IN (4, 5, 6) PARTITION BY LIST (a);"
             "CREATE TABLE t_2_1 PARTITION OF t_2 FOR VALUES IN (5); CREATE TABLE t_2_2 PARTITION OF t_2 FOR VALUES IN (4, 6);"
             "CREATE TABLE t_def PARTITION OF t DEFAULT", (*MOVES, "TRUNCATE t_2", "INSERT INTO t VALUES (4, 'y')"),
             compared=LEAVES),
    Scenario("root into a table", LISTED, "INSERT INTO t VALUES (9, 'z')",
             "CREATE TABLE t (a int PRIMARY KEY, c text DEFAULT 'c', b text)",
             (*MOVES, "TRUNCATE t", "INSERT INTO t VALUES (1), (2), (5)"), options=ROOT),
    Scenario("root into a hash partitioned table", LISTED, "INSERT INTO t VALUES (9, 'z')",
             "CREATE TABLE t (a int PRIMARY KEY, c text DEFAULT 'c', b text) PARTITION BY HASH (a);"
             "CREATE TABLE t_p1 (b text, c text, a int NOT NULL); "
             "ALTER TABLE t ATTACH PARTITION t_p1 FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
             "CREATE TABLE t_p2 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 1)", MOVES, options=ROOT),
    Scenario("root whose columns change", LISTED, "INSERT INTO t VALUES (9, 'z')", None,
             ("ALTER TABLE t DROP b, ADD COLUMN c text DEFAULT 'pub', ADD b text",
             "INSERT INTO t (a, b) VALUES (1, 'xxx'), (5, 'zzz')",
              "INSERT INTO t (a, b, c) VALUES (6, 'aaa', 'xxx_c')"), options=ROOT, native=None),
    Scenario("root with two levels", "CREATE TABLE t (a int PRIMARY KEY) PARTITION BY LIST (a);"
             "CREATE TABLE t_1 PARTITION OF t FOR VALUES IN (-1, 0, 1) PARTITION BY LIST (a);"
             "CREATE TABLE t_1_1 PARTITION OF t_1 FOR VALUES IN (-1, 0, 1)", "INSERT INTO t VALUES (-1)",
             "CREATE TABLE t (a int PRIMARY KEY)",
             ("INSERT INTO t VALUES (0)", "INSERT INTO t_1 VALUES (1)", "DELETE FROM t WHERE a = -1"),
             options=ROOT),
    Scenario("a table into partitions that change",
             "CREATE TABLE t (a int NOT NULL, b int); CREATE UNIQUE INDEX i ON t (a); "
             "ALTER TABLE t REPLICA IDENTITY USING INDEX i", "SELECT 1",
             "CREATE TABLE t (a int NOT NULL, b int, c int) PARTITION BY LIST (a); CREATE TABLE t_1 PARTITION OF t DEFAULT;"
             "CREATE UNIQUE INDEX i ON t (a); ALTER TABLE t REPLICA IDENTITY USING INDEX i; "
             "ALTER TABLE t_1 REPLICA IDENTITY USING INDEX t_1_a_idx",
             ("INSERT INTO t VALUES (1, 1)", "UPDATE t SET a = 2 WHERE a = 1", "settle",
              "sink: ALTER TABLE t DETACH PARTITION t_1; ALTER TABLE t_1 DROP COLUMN b; ALTER TABLE t_1 ADD COLUMN b int;"
              "UPDATE t_1 SET b = 1; ALTER TABLE t ATTACH PARTITION t_1 DEFAULT", "UPDATE t SET a = 3 WHERE a = 2")),
    Scenario("truncate of a root whose rows are all over", LISTED, "INSERT INTO t SELECT generate_series(1, 20)", None,
             ("TRUNCATE t", "INSERT INTO t VALUES (1), (5), (10)"), compared=LEAVES),
)  # fmt: skip

SPANS = "'[1,2)', '[2000-01-01,2010-01-01)', 'a'"
TEMPORAL = tuple(
    Scenario(
        f"temporal, {name}",
        f"CREATE TABLE t (id int4range {null}, valid_at daterange {null}, a text, {key}); {more}",
        f"INSERT INTO t VALUES ({SPANS})",
        f"CREATE TABLE t (id int4range {null}, valid_at daterange {null}, a text, {key})" + (f"; {more}" if more else ""),
        ("INSERT INTO t VALUES ('[2,3)', '[2000-01-01,2010-01-01)', 'a'), ('[3,4)', '[2000-01-01,2010-01-01)', 'a')",
         "UPDATE t SET a = 'b' WHERE id = '[2,3)'", "DELETE FROM t WHERE id = '[3,4)'",
         "UPDATE t SET valid_at = '[2010-01-01,2011-01-01)' WHERE id = '[1,2)'"),
    )
    for name, null, key, more in (
        ("primary key", "", "PRIMARY KEY (id, valid_at WITHOUT OVERLAPS)", ""),
        ("primary key, full", "", "PRIMARY KEY (id, valid_at WITHOUT OVERLAPS)", FULL),
        ("unique, full", "", "CONSTRAINT u UNIQUE (id, valid_at WITHOUT OVERLAPS)", FULL),
        ("primary key, index", "", "CONSTRAINT p PRIMARY KEY (id, valid_at WITHOUT OVERLAPS)",
        "ALTER TABLE t REPLICA IDENTITY USING INDEX p"),
        ("unique, index", "NOT NULL", "CONSTRAINT u UNIQUE (id, valid_at WITHOUT OVERLAPS)",
        "ALTER TABLE t REPLICA IDENTITY USING INDEX u"),
    )
)  # fmt: skip


@pytest.mark.parametrize("scenario", [*INDEXES, *PARTITIONS], ids=named)
def test_scenario_that_native_replication_passes(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Each ends with equal tables, as with CREATE SUBSCRIPTION."""
    if asks_peer() and scenario.native == FOLLOWED:
        run_native(scenario, source_db, sink_db)
        return
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", TEMPORAL, ids=named)
def test_temporal_keys(postgres_server: PostgresServer, source_db: str, sink_db: str, scenario: Scenario) -> None:
    """A key without overlaps identifies rows; servers before 18 have none, and get a plain key of the same columns."""
    if int(str(postgres_server.execute("SHOW server_version_num")[0][0])) < 180000:
        plain = [text.replace(" WITHOUT OVERLAPS", "") for text in (scenario.tables, scenario.sink or "")]
        scenario = Scenario(scenario.name, plain[0], scenario.rows, plain[1], scenario.changes)
    (run_native if asks_peer() else run_scenario)(scenario, source_db, sink_db)


@pytest.mark.parametrize("binary", ["true", "false"])
def test_types(source_db: str, sink_db: str, binary: str) -> None:
    """Arrays, enums, composites, ranges, domains and extension types: inserts, updates and deletes of each."""
    with data_plane(source_db, sink_db, options={"binary": binary}) as plane:
        kit = plane.kit
        for run in (kit.run, kit.at_sink):
            run(TYPE_DDL)
        for name, (columns, rows, _, _) in TYPE_TABLES.items():
            kit.run(f"CREATE TABLE {name} ({columns})")
            kit.run(f"INSERT INTO {name} VALUES {rows}")
        plane.start()
        plane.settle(*TYPE_TABLES)
        for name, (_, _, change, where) in TYPE_TABLES.items():
            kit.run(f"DELETE FROM {name} WHERE {where}")
            kit.run(f"UPDATE {name} SET {change}")
        plane.settle(*TYPE_TABLES)
        for name, (_, rows, _, _) in TYPE_TABLES.items():
            kit.run(f"TRUNCATE {name}")
            kit.run(f"INSERT INTO {name} VALUES {rows}")
        plane.settle(*TYPE_TABLES)


@pytest.fixture
def role(postgres_server: PostgresServer) -> Iterator[str]:
    """A role of the server without special rights; it is dropped after the databases."""
    name = f"alice_{next(_numbers)}"
    postgres_server.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    postgres_server.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_privileges_of_the_sink_come_and_go(role: str, source_db: str, sink_db: str) -> None:
    """A missing privilege is the table's error; it continues when the privilege is granted, and no row is lost."""
    with data_plane(source_db, sink_db.replace("postgres@", f"{role}@")) as plane, data_plane(source_db, sink_db) as superuser:
        kit, at_sink = plane.kit, superuser.kit.at_sink
        kit.run(f"CREATE TABLE t (i int); {FULL}")
        at_sink(f"CREATE TABLE t (i int); GRANT ALL ON t TO {role}")
        at_sink(f"GRANT CREATE ON DATABASE {sink_db.rpartition('/')[2]} TO {role}")
        plane.start()
        kit.run("INSERT INTO t VALUES (1), (3), (5)")
        kit.run("UPDATE t SET i = 7 WHERE i = 1")
        kit.run("DELETE FROM t WHERE i = 3")
        plane.settle("t")
        at_sink(f"REVOKE INSERT ON t FROM {role}")
        kit.run("INSERT INTO t VALUES (9)")
        plane.wait_error("t", "permission denied|privilege|may not")
        at_sink(f"GRANT INSERT ON t TO {role}")
        plane.settle("t")
        at_sink(f"REVOKE UPDATE, DELETE ON t FROM {role}")
        kit.run("UPDATE t SET i = 11 WHERE i = 5")
        plane.wait_error("t", "permission denied|privilege|may not")
        at_sink(f"GRANT UPDATE, DELETE ON t TO {role}")
        plane.settle("t")


def test_forced_row_level_security_of_the_sink(role: str, source_db: str, sink_db: str) -> None:
    """A table whose policies apply to the writer is refused, and continues without them."""
    with data_plane(source_db, sink_db.replace("postgres@", f"{role}@")) as plane, data_plane(source_db, sink_db) as superuser:
        kit, at_sink = plane.kit, superuser.kit.at_sink
        kit.run(f"CREATE TABLE t (i int); {FULL}")
        at_sink(f"CREATE TABLE t (i int); ALTER TABLE t OWNER TO {role}")
        at_sink(f"GRANT CREATE ON DATABASE {sink_db.rpartition('/')[2]} TO {role}")
        plane.start()
        kit.run("INSERT INTO t VALUES (1), (2)")
        plane.settle("t")
        at_sink("ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY")
        kit.run("INSERT INTO t VALUES (15)")
        kit.run("UPDATE t SET i = 17 WHERE i = 1")
        plane.wait_error("t", "row-level security")
        at_sink("ALTER TABLE t NO FORCE ROW LEVEL SECURITY")
        plane.settle("t")


def test_several_unique_keys_in_conflict(source_db: str, sink_db: str) -> None:
    """A row of the source that meets three rows of the sink is never half written: it wins, or the table shows the conflict."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE t (a int PRIMARY KEY, b int UNIQUE, c int UNIQUE)")
        kit.run("INSERT INTO t VALUES (1, 1, 1)")
        kit.at_sink("CREATE TABLE t (a int PRIMARY KEY, b int UNIQUE, c int UNIQUE)")
        plane.start()
        plane.settle("t")
        kit.at_sink("INSERT INTO t VALUES (2, 2, 2), (3, 3, 3), (4, 4, 4)")
        kit.run("INSERT INTO t VALUES (2, 3, 4)")
        plane.wait_error("t", "unique|duplicate")
        kit.at_sink("DELETE FROM t WHERE a > 1")
        plane.settle("t")
        kit.run("INSERT INTO t VALUES (5, 5, 5)")
        plane.settle("t")
        kit.at_sink("INSERT INTO t VALUES (7, 7, 7), (8, 8, 8)")
        kit.run("UPDATE t SET a = 6, b = 7, c = 8 WHERE a = 5")
        plane.wait_error("t", "unique|duplicate")
        kit.at_sink("DELETE FROM t WHERE a IN (7, 8)")
        plane.settle("t")


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_rows_that_are_missing_at_the_sink(source_db: str, sink_db: str, identity: str) -> None:
    """Updates and deletes of rows that the sink does not have end in an equal table."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run(f"CREATE TABLE t (a int PRIMARY KEY, b text); ALTER TABLE t REPLICA IDENTITY {identity}")
        kit.run("INSERT INTO t VALUES (1, 'foo'), (2, 'baz'), (3, 'x')")
        plane.start()
        plane.settle("t")
        kit.at_sink("DELETE FROM t WHERE a < 3")
        kit.run("UPDATE t SET b = 'quux' WHERE a = 1")
        kit.run("DELETE FROM t WHERE a = 2")
        plane.settle("t")


def test_trigger_of_a_replica(source_db: str, sink_db: str) -> None:
    """A trigger that is enabled for replication decides about rows; ordinary triggers do not fire."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE t (id int PRIMARY KEY, bid int)")
        kit.at_sink(
            "CREATE TABLE t (id int PRIMARY KEY, bid int); CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$"
            " BEGIN IF TG_OP = 'INSERT' AND new.id < 10 THEN RETURN new; END IF; RETURN NULL; END $$;"
            "CREATE FUNCTION g() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''ordinary''; END';"
            "CREATE TRIGGER ordinary BEFORE INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION g();"
            "CREATE TRIGGER chosen BEFORE INSERT OR UPDATE OF bid ON t FOR EACH ROW EXECUTE FUNCTION f();"
            "ALTER TABLE t ENABLE REPLICA TRIGGER chosen"
        )
        plane.start()
        kit.run("INSERT INTO t VALUES (1, 1)")
        plane.settle("t")
        kit.run("INSERT INTO t VALUES (10, 10)")
        kit.run("INSERT INTO t VALUES (2, 2)")
        plane.wait_until(lambda: kit.at_sink("SELECT 1 FROM t WHERE id = 2"), "the next row is there")
        assert kit.at_sink("SELECT id FROM t ORDER BY 1") == [(1,), (2,)]


def test_trigger_of_a_partition(source_db: str, sink_db: str) -> None:
    """Replica triggers of the leaf that holds the row see inserts and updates, also when the source names another partition."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE t_2 (a int PRIMARY KEY)")
        kit.at_sink(
            "CREATE TABLE t_2 (a int PRIMARY KEY) PARTITION BY LIST (a); CREATE TABLE t_2_1 PARTITION OF t_2 FOR VALUES IN (5);"
            "CREATE TABLE t_2_2 PARTITION OF t_2 FOR VALUES IN (4, 6); CREATE TABLE log (tab text, op text, a int);"
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN INSERT INTO public.log VALUES (TG_RELNAME, TG_OP, new.a); RETURN NULL; END';"
            "CREATE TRIGGER g AFTER INSERT OR UPDATE ON t_2 FOR EACH ROW EXECUTE FUNCTION f();"
            "ALTER TABLE t_2 ENABLE REPLICA TRIGGER g; ALTER TABLE t_2_2 ENABLE REPLICA TRIGGER g"
        )
        plane.start()
        plane.settle("t_2")
        for statement in ("INSERT INTO t_2 VALUES (5)", *(f"UPDATE t_2 SET a = {a}" for a in (6, 4, 6))):
            kit.run(statement)
        plane.settle("t_2")
        assert kit.at_sink("SELECT tab, op, a FROM log WHERE tab = 't_2_2' AND op = 'UPDATE'") == [
            ("t_2_2", "UPDATE", 4),
            ("t_2_2", "UPDATE", 6),
        ]
