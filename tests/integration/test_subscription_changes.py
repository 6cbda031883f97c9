"""What native logical replication does with rows, identities, constraints and shapes, done by Tablewire."""

from __future__ import annotations

import pytest

from tests.integration.data_plane import FOLLOWED, NONDETERMINISTIC, Scenario, asks_peer, data_plane, named, run_scenario
from tests.integration.native_peer import run_native

pytestmark = pytest.mark.integration

INSERTS = {"operations": "insert"}

CHANGES = (
    Scenario("a key", "CREATE TABLE t (a int PRIMARY KEY)", "INSERT INTO t SELECT generate_series(1, 10)", None,
             ("INSERT INTO t SELECT generate_series(11, 50)", "DELETE FROM t WHERE a > 20", "UPDATE t SET a = -a")),
    Scenario("no key, inserts published", "CREATE TABLE t (a int)", "INSERT INTO t SELECT generate_series(1, 1002)", None,
             ("INSERT INTO t SELECT generate_series(1, 50)",), options=INSERTS),
    Scenario("full identity, equal rows", "CREATE TABLE t (a int); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t SELECT generate_series(1, 10)", None,
             ("INSERT INTO t SELECT generate_series(1, 10)", "UPDATE t SET a = a * a", "DELETE FROM t WHERE a = 49")),
    Scenario("full identity, text", "CREATE TABLE t (x text); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t VALUES ('a'), ('b'), ('b')",
             None, ("UPDATE t SET x = 'bb' WHERE x = 'b'",)),
    Scenario("full identity with a key", "CREATE TABLE t (a int PRIMARY KEY, b text); ALTER TABLE t REPLICA IDENTITY FULL",
             "SELECT 1",
             None, ("INSERT INTO t VALUES (1, 'foo'), (2, 'baz')", "UPDATE t SET b = 'bar' WHERE a = 1",
             "DELETE FROM t WHERE a = 2")),
    Scenario("other columns in another order", "CREATE TABLE t (a int PRIMARY KEY, b text, c numeric)",
             "INSERT INTO t VALUES (1, 'foo', 1.1)",
             "CREATE TABLE t (d text DEFAULT 'local', c numeric, b text, a int PRIMARY KEY)",
             ("INSERT INTO t VALUES (2, 'bar', 2.2)", "UPDATE t SET b = 'baz' WHERE a = 1",
              "UPDATE t SET b = repeat('xyzzy', 100000) WHERE a = 2", "UPDATE t SET c = 3.3 WHERE a = 2"),
             at_sink=(("SELECT a, length(b), c::text, d FROM t ORDER BY a", [(1, 3, "1.1", "local"), (2, 500000, "3.3",
             "local")]),)),
    Scenario("a covering key", "CREATE TABLE t (a int, b text, CONSTRAINT covering PRIMARY KEY (a) INCLUDE (b))", "SELECT 1",
             None,
             ("INSERT INTO t SELECT generate_series(1, 50)", "DELETE FROM t WHERE a > 20", "UPDATE t SET a = -a")),
    Scenario("identity nothing", "CREATE TABLE t (a int); ALTER TABLE t REPLICA IDENTITY NOTHING", "SELECT 1", None,
             ("INSERT INTO t SELECT generate_series(1, 20)",), options=INSERTS),
    Scenario("an index but no identity", "CREATE TABLE t (c1 int); CREATE INDEX ON t (c1)", "SELECT 1", None,
             ("INSERT INTO t VALUES (1)",), options=INSERTS),
    Scenario("no columns", "CREATE TABLE t ()", "INSERT INTO t DEFAULT VALUES", "CREATE TABLE t ()",
             ("INSERT INTO t DEFAULT VALUES",),
             options=INSERTS),
    Scenario("identity becomes full later", "CREATE TABLE t (a int PRIMARY KEY, b int)", "INSERT INTO t VALUES (1, 1), (2, 1)",
             None,
             ("UPDATE t SET b = 2", "ALTER TABLE t REPLICA IDENTITY FULL", "UPDATE t SET b = 3 WHERE a = 1",
             "DELETE FROM t WHERE a = 2")),
    Scenario("the index of the identity changes",
             "CREATE TABLE t (a int NOT NULL, b int NOT NULL); CREATE UNIQUE INDEX t_a ON t (a); "
             "CREATE UNIQUE INDEX t_b ON t (b);"
             "ALTER TABLE t REPLICA IDENTITY USING INDEX t_a", "INSERT INTO t VALUES (1, 1), (2, 2)",
             "CREATE TABLE t (a int NOT NULL, b int NOT NULL); CREATE UNIQUE INDEX t_a ON t (a); "
             "CREATE UNIQUE INDEX t_b ON t (b); ALTER TABLE t REPLICA IDENTITY USING INDEX t_b",
             ("ALTER TABLE t REPLICA IDENTITY USING INDEX t_b", "UPDATE t SET a = -a WHERE a = 1", "DELETE FROM t WHERE a = 2")),
    Scenario("an expression in an index predicate",
             "CREATE TABLE t (a int PRIMARY KEY, b int); "
             "CREATE FUNCTION twice(x int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT x * 2';"
             "CREATE INDEX ON t (b) WHERE a > twice(1)", "SELECT 1", None, ("INSERT INTO t VALUES (1, 2), (5, 6)",
             "UPDATE t SET b = 7")),
    Scenario("large keys out of line",
             "CREATE TABLE t (a text PRIMARY KEY, b int); ALTER TABLE t ALTER a SET STORAGE EXTERNAL", "SELECT 1", None,
             ("INSERT INTO t SELECT repeat(i::text, 2200), i FROM generate_series(1, 3) i", "UPDATE t SET b = b + 1",
              "UPDATE t SET a = 'k' || b WHERE b = 3", "DELETE FROM t WHERE b = 4")),
    Scenario("large values in a full identity",
             "CREATE TABLE t (a text, b int); ALTER TABLE t ALTER a SET STORAGE EXTERNAL; ALTER TABLE t REPLICA IDENTITY FULL",
             "SELECT 1",
             None, ("INSERT INTO t SELECT repeat(md5(i::text), 2000), i FROM generate_series(1, 3) i", "UPDATE t SET b = b + 1",
                    "DELETE FROM t WHERE b = 2")),
    Scenario("a value that a table rewrite did not store",
             "CREATE TABLE t (a int); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1);"
             "ALTER TABLE t ADD COLUMN b bool DEFAULT false NOT NULL; INSERT INTO t VALUES (2, true)", "SELECT 1",
             "CREATE TABLE t (a int, b bool)", ("UPDATE t SET a = a + 1", "DELETE FROM t WHERE a = 3")),
    Scenario("full identity and a dropped column",
             "CREATE TABLE t (a int, b_drop int, c int); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t VALUES (1, 1, 1)", "CREATE TABLE t (a int, b_drop int, c int)",
             ("ALTER TABLE t DROP COLUMN b_drop", "sink: ALTER TABLE t DROP COLUMN IF EXISTS b_drop", "UPDATE t SET a = 100"),
             native=None),
    Scenario("a procedural transaction", "CREATE TABLE t (a int PRIMARY KEY)", "SELECT 1", None,
             ("DO $$ BEGIN FOR i IN 1..5 LOOP INSERT INTO t VALUES (i); COMMIT; END LOOP; INSERT INTO t VALUES (9); ROLLBACK; "
              "END $$",)),
    Scenario("messages in the log", "CREATE TABLE t (a int PRIMARY KEY)", "SELECT 1", None,
             ("SELECT pg_logical_emit_message(true, 'x', 'transactional')",
              "BEGIN; INSERT INTO t VALUES (1); SELECT pg_logical_emit_message(false, 'x', 'no'); COMMIT",
              "BEGIN; INSERT INTO t VALUES (2); SELECT pg_logical_emit_message(true, 'x', 'yes'); ROLLBACK")),
    Scenario("a rewrite while changes come", "CREATE TABLE t (a int PRIMARY KEY, b text)", "INSERT INTO t VALUES (10, 'ten')",
             None,
             ("INSERT INTO t VALUES (1, 'one'), (2, 'two')", "BEGIN; ALTER TABLE t ADD c timestamptz DEFAULT now(); COMMIT",
              "INSERT INTO t VALUES (3, 'three', '2022-03-22 20:00:00+00')", "UPDATE t SET b = 'x' WHERE a = 1"), native=None),
    Scenario("a materialized view", "CREATE TABLE t (a int PRIMARY KEY, b text)", "INSERT INTO t VALUES (1, 'one')", None,
             ("CREATE MATERIALIZED VIEW v AS SELECT * FROM t", "REFRESH MATERIALIZED VIEW v", "INSERT INTO t VALUES (2, 'two')",
              "REFRESH MATERIALIZED VIEW v", "INSERT INTO t VALUES (3, 'three')")),
    Scenario("unlogged and temporary tables", "CREATE TABLE t (a int PRIMARY KEY)", "SELECT 1", None,
             ("CREATE TEMPORARY TABLE tt AS SELECT 1 AS a", "UPDATE tt SET a = 2", "CREATE UNLOGGED TABLE tu AS SELECT 1 AS a",
              "UPDATE tu SET a = 2", "INSERT INTO t VALUES (1)")),
    Scenario("a table of another name is not touched", "CREATE TABLE t (a int PRIMARY KEY); CREATE TABLE notrep AS SELECT 1 AS a",
             "SELECT 1", "CREATE TABLE t (a int PRIMARY KEY); CREATE TABLE notrep (a int)", ("INSERT INTO notrep VALUES (11)",
             "INSERT INTO t VALUES (1)"), filter=("public.t",), at_sink=(("SELECT count(*) FROM notrep", [(0,)]),), native=None),
)  # fmt: skip

SINK = (
    Scenario("other columns with defaults", "CREATE TABLE t (a int PRIMARY KEY, b varchar)",
             "INSERT INTO t VALUES (1, 'foo'), (2, 'bar')",
             "CREATE TABLE t (a int PRIMARY KEY, b text, c timestamptz DEFAULT now(), d bigint DEFAULT 999,"
             " e int GENERATED BY DEFAULT AS IDENTITY)",
             ("UPDATE t SET b = md5(b)", "sink: UPDATE t SET c = 'epoch'::timestamptz", "UPDATE t SET b = md5(a::text)",
              "INSERT INTO t VALUES (3, 'baz')"),
             at_sink=(("SELECT count(*), count(c), count(NULLIF(c, 'epoch')), count(d), count(e) FROM t", [(3, 3, 1, 3, 3)]),)),
    Scenario("the sink gains a key column that the source lacks", "CREATE TABLE t (a int)", "SELECT 1", "CREATE TABLE t (a int)",
             ("sink: ALTER TABLE t ADD COLUMN b serial PRIMARY KEY", "INSERT INTO t VALUES (1)"), options=INSERTS),
    Scenario("foreign keys do not fire",
             "CREATE TABLE fk (bid int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, junk text, bid int REFERENCES fk)",
             "SELECT 1",
             "CREATE TABLE fk (bid int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, bid int REFERENCES fk, junk text)",
             ("INSERT INTO fk VALUES (1)", "INSERT INTO t (id, bid, junk) VALUES (1, 1, repeat(pi()::text, 20000))",
              "ALTER TABLE t DROP CONSTRAINT t_bid_fkey", "INSERT INTO t (id, bid) VALUES (2, 2)"), compared=("t", "fk")),
    Scenario("a narrower text type", "CREATE TABLE t (a int PRIMARY KEY, b text)", "INSERT INTO t VALUES (1, 'x')",
             "CREATE TABLE t (a int PRIMARY KEY, b varchar)", ("INSERT INTO t VALUES (2, 'y')", "UPDATE t SET b = 'z'")),
    Scenario("int into bigint", "CREATE TABLE t (a int PRIMARY KEY, b int)", "INSERT INTO t VALUES (1, 1)",
             "CREATE TABLE t (a bigint PRIMARY KEY, b bigint)", ("INSERT INTO t VALUES (2, 2)", "UPDATE t SET b = 3 WHERE a = 1",
                                                               "DELETE FROM t WHERE a = 2")),
    Scenario("a column is dropped at the sink and at the source",
             "CREATE TABLE t (a int PRIMARY KEY, b text, c numeric)", "INSERT INTO t VALUES (1, 'foo', 1.1), (2, 'bar', 2.2)",
             "CREATE TABLE t (d text DEFAULT 'local', c numeric, b text, a int PRIMARY KEY)",
             ("UPDATE t SET b = 'bar', c = 2.2 WHERE a = 2", "ALTER TABLE t DROP COLUMN b", "UPDATE t SET c = 11.11 WHERE a = 1",
              "settle", "sink: ALTER TABLE t DROP COLUMN d", "UPDATE t SET c = 22.22 WHERE a = 2")),
    Scenario("a key with another collation",
             "CREATE TABLE t (a text PRIMARY KEY, b text)", "INSERT INTO t VALUES ('abc', 'foo')",
             'CREATE TABLE t (a text COLLATE "C" PRIMARY KEY, b text)', ("UPDATE t SET b = 'bar'",
             "INSERT INTO t VALUES ('Abc', 'x')")),
    Scenario("other encodings of a key with a collation that is not deterministic",
             f"{NONDETERMINISTIC};"
             "CREATE TABLE t (a text COLLATE nondet PRIMARY KEY, b text)", "INSERT INTO t VALUES (U&'\\00E4bc', 'foo')",
             f"{NONDETERMINISTIC};"
             "CREATE TABLE t (a text COLLATE nondet PRIMARY KEY, b text)",
             ("UPDATE t SET a = U&'\\0061\\0308bc' WHERE b = 'foo'", "UPDATE t SET b = 'bar'", "UPDATE t SET a = U&'\\00E4bc'")),
    Scenario("full identity with a collation that is not deterministic",
             f"{NONDETERMINISTIC};"
             "CREATE TABLE t (a text COLLATE nondet, b text); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t VALUES (U&'\\00E4bc', 'foo'), (U&'\\0061\\0308bc', 'foo')",
             f"{NONDETERMINISTIC};"
             "CREATE TABLE t (a text COLLATE nondet, b text)",
             ("UPDATE t SET b = 'bar' WHERE ctid = '(0,2)'", "DELETE FROM t WHERE b = 'foo'"), native=None),
)  # fmt: skip

SHAPES = (
    Scenario("a column in a small transaction", "CREATE TABLE t (a int PRIMARY KEY, b varchar)",
             "INSERT INTO t VALUES (1, 'foo')", None,
             ("BEGIN; INSERT INTO t VALUES (3, 'x'); ALTER TABLE t ADD COLUMN c int; SAVEPOINT s1; "
              "INSERT INTO t VALUES (4, 'y', -4); COMMIT",),
             native=None),
    Scenario("columns in large transactions", "CREATE TABLE t (a int PRIMARY KEY, b varchar)", "INSERT INTO t VALUES (1, 'foo')",
             None,
             ("BEGIN; INSERT INTO t SELECT i, md5(i::text) FROM generate_series(5, 1000) i; ALTER TABLE t ADD COLUMN c int; "
              "SAVEPOINT s1;"
              "INSERT INTO t SELECT i, md5(i::text), i FROM generate_series(1001, 2000) i; COMMIT",
              "BEGIN; INSERT INTO t SELECT i, 'x', i FROM generate_series(2003, 5000) i; ALTER TABLE t ADD COLUMN f int; COMMIT",
              "INSERT INTO t SELECT i, 'x', i, 2 * i FROM generate_series(5001, 5005) i"), native=None),
    Scenario("columns that are rolled back", "CREATE TABLE t (a int PRIMARY KEY, b varchar)", "INSERT INTO t VALUES (1, 'foo')",
             None,
             ("BEGIN; INSERT INTO t SELECT i, md5(i::text) FROM generate_series(3, 500) i; ALTER TABLE t ADD COLUMN c int; "
              "SAVEPOINT s1;"
              "INSERT INTO t SELECT i, 'x', -i FROM generate_series(501, 1000) i; ALTER TABLE t ADD COLUMN d int; SAVEPOINT s2;"
              "INSERT INTO t SELECT i, 'x', -i, 2 * i FROM generate_series(1001, 1500) i; ALTER TABLE t DROP COLUMN c; "
              "ROLLBACK TO s1;"
              "INSERT INTO t SELECT i, 'x', i FROM generate_series(501, 1000) i; COMMIT",), native=None),
    Scenario("subtransactions that are rolled back", "CREATE TABLE t (a int PRIMARY KEY, b varchar)",
             "INSERT INTO t VALUES (1, 'foo')", None,
             ("BEGIN; INSERT INTO t VALUES (3, 'x'); SAVEPOINT s1; INSERT INTO t VALUES (4, 'x'); SAVEPOINT s2; "
              "INSERT INTO t VALUES (5, 'x');"
              "SAVEPOINT s3; INSERT INTO t VALUES (6, 'x'); ROLLBACK TO s2; INSERT INTO t VALUES (7, 'x'); ROLLBACK TO s1;"
              "INSERT INTO t VALUES (8, 'x'); SAVEPOINT s4; INSERT INTO t VALUES (9, 'x'); RELEASE s4; COMMIT",
              "BEGIN; INSERT INTO t SELECT i, 'y' FROM generate_series(100, 5000) i; SAVEPOINT s1; DELETE FROM t; "
              "ROLLBACK TO s1; ROLLBACK")),
    Scenario("concurrent large transactions", "CREATE TABLE t (a int PRIMARY KEY, b bytea)", "INSERT INTO t VALUES (1, 'foo')",
             None,
             ("BEGIN; INSERT INTO t SELECT i, sha256(i::text::bytea) FROM generate_series(3, 5000) i; "
              "UPDATE t SET b = sha256(b) WHERE a % 2 = 0;"
              "DELETE FROM t WHERE a % 3 = 0; COMMIT",
              "BEGIN; INSERT INTO t SELECT i, 'x' FROM generate_series(6000, 9000) i; ROLLBACK",
              "UPDATE t SET b = sha256(b)")),
)  # fmt: skip

TRUNCATES = (
    Scenario("one table", "CREATE TABLE t (a int PRIMARY KEY)", "INSERT INTO t VALUES (1), (2)", None, ("TRUNCATE t",
             "INSERT INTO t VALUES (5)")),
    Scenario("identities continue", "CREATE TABLE t (a int PRIMARY KEY)", "INSERT INTO t VALUES (1), (2)",
             "CREATE TABLE t (a int PRIMARY KEY); CREATE SEQUENCE s START 101 OWNED BY t.a", ("sink: SELECT nextval('s')",
             "TRUNCATE t"),
             at_sink=(("SELECT nextval('s')", [(102,)]),)),
    Scenario("identities restart", "CREATE TABLE t (a int PRIMARY KEY)", "INSERT INTO t VALUES (1), (2)",
             "CREATE TABLE t (a int PRIMARY KEY); CREATE SEQUENCE s START 101 OWNED BY t.a",
             ("sink: SELECT setval('s', 500)", "TRUNCATE t RESTART IDENTITY"), at_sink=(("SELECT nextval('s')", [(101,)]),)),
    Scenario("tables with a foreign key",
             "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (x int PRIMARY KEY, y int REFERENCES a)",
             "INSERT INTO a VALUES (1), (2), (3); INSERT INTO b VALUES (11, 1), (111, 1), (22, 2)", None,
             ("TRUNCATE a, b", "INSERT INTO a VALUES (7)"), compared=("a", "b")),
    Scenario("no key, truncated", "CREATE TABLE t (a int); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t VALUES (1), (1), (2)", None,
             ("BEGIN; INSERT INTO t VALUES (3); TRUNCATE t; INSERT INTO t VALUES (4); COMMIT",)),
)  # fmt: skip

GENERATED = (
    Scenario("both ends compute their own", "CREATE TABLE t (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED)",
             "INSERT INTO t (a) VALUES (1), (2), (3)",
             "CREATE TABLE t (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED, c int)",
             ("INSERT INTO t VALUES (4), (5)", "UPDATE t SET a = 6 WHERE a = 5")),
    Scenario("a trigger of the sink sees the computed value",
             "CREATE TABLE t (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED)",
             "INSERT INTO t (a) VALUES (1)",
             "CREATE TABLE t (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED); CREATE TABLE log (b int);"
             "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO public.log VALUES (new.b); "
             "RETURN NULL; END';"
             "CREATE TRIGGER g AFTER INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION f(); "
             "ALTER TABLE t ENABLE REPLICA TRIGGER g",
             ("INSERT INTO t VALUES (7)", "UPDATE t SET a = 9 WHERE a = 7"),
             at_sink=(("SELECT b FROM log WHERE b > 2 ORDER BY 1", [(14,), (18,)]),)),
    Scenario("the sink's expression is dropped", "CREATE TABLE t (a int PRIMARY KEY, b int)", "SELECT 1",
             "CREATE TABLE t (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 22) STORED)",
             expected=r"\bb\b", native=None,
             remedy=("sink: ALTER TABLE t ALTER COLUMN b DROP EXPRESSION", "INSERT INTO t VALUES (1, 1), (2, 2), (3, 3)")),
)  # fmt: skip

MANY = (*CHANGES, *SINK, *SHAPES, *TRUNCATES, *GENERATED)


@pytest.mark.parametrize("scenario", MANY, ids=named)
def test_scenario_that_native_replication_passes(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Each ends with equal tables, as with CREATE SUBSCRIPTION; what native replication leaves to the operator is followed."""
    if asks_peer() and scenario.native == FOLLOWED:
        run_native(scenario, source_db, sink_db)
        return
    run_scenario(scenario, source_db, sink_db)


def test_first_copy_that_fails_at_the_sink_is_repeated(source_db: str, sink_db: str) -> None:
    """A constraint of the sink refuses a row of the copy: nothing of it stays, and it succeeds when the reason is gone."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE t (a int PRIMARY KEY)")
        kit.run("INSERT INTO t SELECT generate_series(1, 20)")
        kit.at_sink("CREATE TABLE t (a int PRIMARY KEY CHECK (a < 15))")
        plane.start()
        plane.wait_error("t", "t_a_check")
        assert kit.at_sink("SELECT count(*) FROM t") == [(0,)]
        kit.at_sink("ALTER TABLE t DROP CONSTRAINT t_a_check")
        kit.run("INSERT INTO t VALUES (21)")
        plane.settle("t")


def test_table_that_is_added_later_is_copied(source_db: str, sink_db: str) -> None:
    """A new table with rows gets its copy and its changes; one that leaves the filter's schema gets none, and may come back."""
    with data_plane(source_db, sink_db, ("one.*",)) as plane:
        kit = plane.kit
        kit.run("CREATE SCHEMA one; CREATE TABLE one.a (a int PRIMARY KEY)")
        plane.start()
        kit.run("CREATE TABLE one.b (a int PRIMARY KEY); INSERT INTO one.b SELECT generate_series(1, 10)")
        kit.run("INSERT INTO one.b VALUES (11)")
        plane.settle("one.a", "one.b")
        kit.run("ALTER TABLE one.b SET SCHEMA public")
        kit.run("INSERT INTO b VALUES (12)")
        kit.run("INSERT INTO one.a VALUES (1)")
        plane.settle("one.a")
        kit.run("ALTER TABLE b SET SCHEMA one")
        kit.run("INSERT INTO one.b VALUES (13)")
        plane.settle("one.b")
        kit.run("DROP TABLE one.b")
        kit.run("INSERT INTO one.a VALUES (2)")
        plane.settle("one.a")


def test_changes_are_not_lost_while_the_processor_is_away(source_db: str, sink_db: str) -> None:
    """Inserts, updates, a truncation and a new table during a pause arrive after it."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE t (a int PRIMARY KEY, b int)")
        kit.run("INSERT INTO t SELECT i, i FROM generate_series(1, 100) i")
        plane.start()
        plane.settle("t")
        plane.pause()
        kit.run("UPDATE t SET b = -b")
        kit.run("TRUNCATE t")
        kit.run("INSERT INTO t VALUES (1, 1)")
        kit.run("CREATE TABLE u (a int PRIMARY KEY); INSERT INTO u VALUES (1)")
        plane.resume()
        plane.settle("t", "u")


def test_cascade_of_two_changefeeds(source_db: str, sink_db: str) -> None:
    """What a changefeed writes, copies included, another one reads from there."""
    with data_plane(source_db, sink_db, ("public.t",)) as first:
        first.kit.run("CREATE SCHEMA far; CREATE TABLE t (a int PRIMARY KEY)")
        first.kit.run("INSERT INTO t SELECT generate_series(1, 10)")
        first.kit.at_sink("CREATE TABLE t (a int PRIMARY KEY)")
        third = f"{sink_db}_third"
        first.kit.at_sink(f"CREATE DATABASE {third.rpartition('/')[2]}")
        try:
            with data_plane(sink_db, third, ("public.t",)) as second:
                second.start()
                first.start()
                first.settle("t")
                first.kit.run("INSERT INTO t VALUES (11)")
                first.settle("t")
                second.settle("t")
        finally:
            first.kit.at_sink(f"DROP DATABASE {third.rpartition('/')[2]} WITH (FORCE)")
