"""Types and kinds of tables: each column travels in a form that its type has, and each kind of table is replicated."""

from __future__ import annotations

import psycopg
import pytest

from tests.integration.data_plane import EITHER, Scenario, data_plane, named, run_scenario

pytestmark = pytest.mark.integration

SHIFT = "CREATE TABLE shift (v int); CREATE TYPE shift_type AS ENUM ('a')"
"""Makes the ids of later objects differ between the two databases."""
MYTEXT = """
CREATE TYPE mytext;
CREATE FUNCTION mytext_in(cstring) RETURNS mytext LANGUAGE internal IMMUTABLE STRICT AS 'textin';
CREATE FUNCTION mytext_out(mytext) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
CREATE TYPE mytext (input = mytext_in, output = mytext_out, like = text);"""
"""A type that has no binary form."""


def typed(name: str, types: str, column: str, *values: str, key: str = "id int PRIMARY KEY", **more: object) -> Scenario:
    """A table with one column of this type: the first value is copied, the others are changes."""
    rows = "".join(f"; INSERT INTO t VALUES ({number}, {value})" for number, value in enumerate(values, 10))
    return Scenario(
        name,
        f"{types}; CREATE TABLE t ({key}, v {column})",
        f"INSERT INTO t VALUES (1, {values[0]}), (2, NULL)",
        f"{SHIFT}; {types}",
        (rows.removeprefix("; "), f"UPDATE t SET v = {values[-1]} WHERE id IN (1, 2)",
         f"INSERT INTO t SELECT i, ({values[0]})::{column} FROM generate_series(100, 300) i", "DELETE FROM t WHERE id = 10"),
        compares_types=False,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


PAIR = "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TYPE pair AS (a int, b text, c mood)"
COLUMNS = (
    typed("regclass", "CREATE TABLE other (a int)", "regclass", "'other'::regclass", "'pg_class'"),
    typed("regtype", "CREATE TYPE mood AS ENUM ('sad')", "regtype", "'mood'::regtype", "'int'"),
    typed("regnamespace", "CREATE SCHEMA mine", "regnamespace", "'mine'", "'pg_catalog'"),
    typed("regconfig", "CREATE TEXT SEARCH CONFIGURATION mine (COPY = simple)", "regconfig", "'mine'", "'simple'"),
    typed("regdictionary", "SELECT 1", "regdictionary", "'simple'", "'simple'"),
    typed("regprocedure", "CREATE FUNCTION f(int) RETURNS int LANGUAGE sql AS 'SELECT 1'", "regprocedure", "'f(int)'", "'now()'"),
    typed("regoperator", "SELECT 1", "regoperator", "'=(int,int)'", "'+(int,int)'"),
    typed("regrole", "SELECT 1", "regrole", "'postgres'", "'pg_monitor'"),
    typed("regclass[]", "CREATE TABLE other (a int)", "regclass[]", "ARRAY['other'::regclass]", "'{pg_class,NULL}'"),
    typed("composite with regclass", "CREATE TABLE other (a int); CREATE TYPE p AS (a regclass)", "p", "ROW('other'::regclass)",
          "NULL"),
    typed("domain over regtype", "CREATE TYPE mood AS ENUM ('a'); CREATE DOMAIN d AS regtype", "d", "'mood'", "'int'"),
    typed("enum", "CREATE TYPE mood AS ENUM ('sad', 'ok')", "mood", "'sad'", "'ok'"),
    typed("composite of a user type", PAIR, "pair", "ROW(1, 'x y', 'sad')", "ROW(NULL, '\"', 'ok')"),
    typed("array of composites", PAIR, "pair[]", "ARRAY[ROW(1, 'x,y', 'sad')::pair, NULL]", "'{}'"),
    typed("composite of composites", f"{PAIR}; CREATE TYPE two AS (p pair, q pair[])", "two",
          "ROW(ROW(1, 'a', 'sad'), ARRAY[ROW(2, 'b', 'ok')::pair])", "NULL"),
    typed("domain over a composite", f"{PAIR}; CREATE DOMAIN d AS pair", "d", "ROW(1, 'a', 'sad')", "ROW(2, 'b', 'ok')"),
    typed("array of domains", "CREATE DOMAIN d AS int CHECK (value > 0)", "d[]", "'{1,2}'", "'{3,NULL}'"),
    typed("range of a user type", "CREATE TYPE textrange AS RANGE (subtype = text)", "textrange", "'[a,b)'", "'empty'"),
    typed("array of ranges", "CREATE TYPE textrange AS RANGE (subtype = text)", "textrange[]", "'{\"[a,b)\"}'", "'{}'"),
    typed("multirange", "SELECT 1", "int4multirange", "'{[1,3),[5,7)}'", "'{}'"),
    typed("no binary form", MYTEXT, "mytext", "'a'", "'b \"c\"'"),
    typed("array without a binary form", MYTEXT, "mytext[]", "'{a,NULL}'", "'{}'"),
    typed("composite without a binary form", f"{MYTEXT}; CREATE TYPE p AS (a mytext, b int)", "p", "ROW('a', 1)", "NULL"),
    typed("aclitem", "SELECT 1", "aclitem", "'postgres=r/postgres'", "'=w/postgres'"),
    typed("aclitem[]", "SELECT 1", "aclitem[]", "'{postgres=r/postgres}'", "'{}'"),
    typed("domain over aclitem[]", "CREATE DOMAIN d AS aclitem[]", "d", "'{postgres=r/postgres}'", "'{}'"),
    typed("hstore", "CREATE EXTENSION hstore", "hstore", "'a=>1'", "'b=>NULL'"),
    typed("hstore in another schema", "CREATE SCHEMA ext; CREATE EXTENSION hstore SCHEMA ext", "ext.hstore", "'a=>1'",
          "'b=>NULL'"),
    typed("ltree[]", "CREATE EXTENSION ltree", "ltree[]", "'{a.b}'", "'{c}'"),
    typed("cube", "CREATE EXTENSION cube", "cube", "'(1,2)'", "'(3,4)'"),
    typed("citext", "CREATE EXTENSION citext", "citext", "'Abc'", "'dEf'"),
    typed("pg_lsn, xid8, snapshot", "SELECT 1", "xid8", "'5'", "'6'"),
    typed("jsonpath", "SELECT 1", "jsonpath", "'$.a[*]'", "'$'"),
    typed("tsquery", "SELECT 1", "tsquery", "'a & b'", "'c'"),
    typed("char", "SELECT 1", '"char"[]', "'{a,b}'", "'{}'"),
    typed("money", "SELECT 1", "money", "'1.50'", "'-2'"),
    typed("interval", "SELECT 1", "interval", "'-1 year 2 days -03:04:05.6'", "'P1M'"),
    typed("odd times", "SELECT 1", "timestamptz", "'infinity'", "'0044-03-15 12:00:00+00 BC'"),
    typed("odd numbers", "SELECT 1", "numeric", "'NaN'", "'-Infinity'"),
    typed("floats", "SELECT 1", "float4", "'0.1'", "'-0'"),
    typed("lines and boxes", "SELECT 1", "box[]", "'{(1,2),(3,4);(0,0),(1,1)}'", "'{}'"),
    typed("arrays with bounds", "SELECT 1", "int[]", "'[0:1][5:6]={{1,2},{3,4}}'", "'{}'"),
)  # fmt: skip

KEYS = (
    Scenario("ltree as the only key", "CREATE EXTENSION ltree; CREATE TABLE t (id ltree PRIMARY KEY, v int)",
             "INSERT INTO t SELECT ('a.' || i)::ltree, i FROM generate_series(1, 100) i", "CREATE EXTENSION ltree",
             ("UPDATE t SET v = -v WHERE id = 'a.5'", "UPDATE t SET v = v + 1", "DELETE FROM t WHERE id <@ 'a.7'",
              "UPDATE t SET id = 'b' || id WHERE v > 50")),
    Scenario("citext key", "CREATE EXTENSION citext; CREATE TABLE t (id citext PRIMARY KEY, v int)",
             "INSERT INTO t SELECT 'Key' || i, i FROM generate_series(1, 100) i", "CREATE EXTENSION citext",
             ("UPDATE t SET v = -v WHERE id = 'KEY5'", "UPDATE t SET id = upper(id::text) WHERE v > 50",
             "DELETE FROM t WHERE v = 3")),
    Scenario("extension in another schema at the sink",
             "CREATE EXTENSION citext; CREATE TABLE t (id citext PRIMARY KEY, v citext)",
             "INSERT INTO t SELECT 'Key' || i, i FROM generate_series(1, 100) i",
             "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext",
             ("UPDATE t SET v = 'new' WHERE id = 'KEY5'", "UPDATE t SET v = v || 'x'", "DELETE FROM t WHERE id = 'key7'"),
             compares_types=False),
    Scenario("enum key", "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE t (id mood PRIMARY KEY, v int)",
             "INSERT INTO t VALUES ('sad', 1), ('ok', 2)", "CREATE TYPE mood AS ENUM ('sad', 'ok')",
             ("UPDATE t SET v = 5 WHERE id = 'ok'", "DELETE FROM t WHERE id = 'sad'")),
    Scenario("composite key", "CREATE TYPE pair AS (a int, b text); CREATE TABLE t (id pair PRIMARY KEY, v int)",
             "INSERT INTO t SELECT ROW(i, 'x')::pair, i FROM generate_series(1, 100) i", "CREATE TYPE pair AS (a int, b text)",
             ("UPDATE t SET v = 5 WHERE (id).a = 7", "UPDATE t SET v = -v", "DELETE FROM t WHERE (id).a < 60")),
    Scenario("array key", "CREATE TABLE t (id int[] PRIMARY KEY, v int)",
             "INSERT INTO t SELECT ARRAY[i, 0], i FROM generate_series(1, 100) i",
             None, ("UPDATE t SET v = 5 WHERE id[1] = 7", "UPDATE t SET v = -v", "DELETE FROM t WHERE id[1] < 60")),
    Scenario("numeric key with zeros", "CREATE TABLE t (id numeric PRIMARY KEY, v int)",
             "INSERT INTO t VALUES (1.0, 1), (2.00, 2)", None,
             ("UPDATE t SET id = 1.000 WHERE id = 1", "UPDATE t SET v = 5 WHERE id = 2", "UPDATE t SET id = 2.0 WHERE id = 2")),
    Scenario("float key", "CREATE TABLE t (id float8 PRIMARY KEY, v int)",
             "INSERT INTO t VALUES (0.1, 1), ('NaN', 2), ('-0', 3)", None,
             ("UPDATE t SET v = 5", "DELETE FROM t WHERE id = 'NaN'")),
    Scenario("char key", "CREATE TABLE t (id char(5) PRIMARY KEY, v int)", "INSERT INTO t VALUES ('a', 1), ('b', 2)", None,
             ("UPDATE t SET v = 5 WHERE id = 'a'", "DELETE FROM t WHERE id = 'b'")),
    Scenario("regclass key", "CREATE TABLE other (a int); CREATE TABLE t (id regclass PRIMARY KEY, v int)",
             "INSERT INTO t VALUES ('other', 1), ('pg_class', 2)", f"{SHIFT}; CREATE TABLE other (a int)",
             ("UPDATE t SET v = 5", "DELETE FROM t WHERE id = 'other'::regclass"), filter=("public.t",)),
    Scenario("no key, types without equality",
             "CREATE TABLE t (a json, c point, d int); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t SELECT '{\"a\": 1}', '(1,2)', i FROM generate_series(1, 5) i", None,
             ("UPDATE t SET a = '[1]' WHERE d = 2", "DELETE FROM t WHERE d = 3", "INSERT INTO t SELECT * FROM t WHERE d = 1")),
    Scenario("no key, regclass",
             "CREATE TABLE other (a int); CREATE TABLE t (a regclass, b int); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t VALUES ('other', 1), ('pg_class', 2)", f"{SHIFT}; CREATE TABLE other (a int)",
             ("UPDATE t SET b = 5 WHERE b = 1", "DELETE FROM t WHERE a = 'pg_class'::regclass"), filter=("public.t",)),
)  # fmt: skip

KINDS = (
    Scenario("without columns", "CREATE TABLE t (); ALTER TABLE t REPLICA IDENTITY FULL", "INSERT INTO t DEFAULT VALUES", None,
             ("INSERT INTO t DEFAULT VALUES", "INSERT INTO t DEFAULT VALUES", "DELETE FROM t WHERE ctid = '(0,1)'")),
    Scenario("all columns dropped", "CREATE TABLE t (a int); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t VALUES (1), (2)", None,
             ("ALTER TABLE t DROP COLUMN a", "INSERT INTO t DEFAULT VALUES")),
    Scenario("generated columns at the sink compute their own", "CREATE TABLE t (id int PRIMARY KEY, v int)",
             "INSERT INTO t VALUES (1, 1)",
             "CREATE TABLE t (id int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v * 22) STORED)",
             ("INSERT INTO t VALUES (2, 2)", "UPDATE t SET v = 5 WHERE id = 1"),
             at_sink=(("SELECT id, g FROM t ORDER BY 1", [(1, 110), (2, 44)]),)),
    Scenario("no key, inserts only", "CREATE TABLE t (a int)", "INSERT INTO t VALUES (1)", None,
             ("INSERT INTO t VALUES (2), (2)", "TRUNCATE t", "INSERT INTO t VALUES (3)"),
             options={"operations": "insert,truncate"}),
    Scenario("replica identity nothing, inserts only",
             "CREATE TABLE t (a int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY NOTHING",
             "INSERT INTO t VALUES (1)", None, ("INSERT INTO t VALUES (2), (3)",), options={"operations": "insert"}),
    Scenario("deferrable primary key, inserts only", "CREATE TABLE t (a int PRIMARY KEY DEFERRABLE)",
             "INSERT INTO t VALUES (1)", None, ("INSERT INTO t VALUES (2), (3)",), options={"operations": "insert"}),
    Scenario("deferrable primary key, full identity",
             "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v int); ALTER TABLE t REPLICA IDENTITY FULL",
             "INSERT INTO t SELECT i, i FROM generate_series(1, 100) i", None,
             ("UPDATE t SET v = -v WHERE id < 5", "UPDATE t SET id = id + 1", "DELETE FROM t WHERE id = 50")),
    Scenario("inserts only, updates at the source", "CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (1, 1)",
             None,
             ("UPDATE t SET v = 1", "INSERT INTO t VALUES (2, 2)"), options={"operations": "insert"}),
    Scenario("restart identity", "CREATE TABLE t (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v int)",
             "INSERT INTO t (v) SELECT generate_series(1, 10)",
             "CREATE TABLE t (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v int)",
             ("sink: SELECT setval('t_id_seq', 500)", "TRUNCATE t RESTART IDENTITY", "INSERT INTO t (v) VALUES (1)"),
             at_sink=(("SELECT nextval('t_id_seq')", [(1,)]),)),
    Scenario("continue identity", "CREATE TABLE t (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v int)",
             "INSERT INTO t (v) SELECT generate_series(1, 10)",
             "CREATE TABLE t (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v int)",
             ("sink: SELECT setval('t_id_seq', 500)", "TRUNCATE t", "INSERT INTO t (v) VALUES (1)"),
             at_sink=(("SELECT nextval('t_id_seq')", [(501,)]),)),
    Scenario("truncate of parents and children",
             "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY REFERENCES a)",
             "INSERT INTO a VALUES (1), (2); INSERT INTO b VALUES (1)",
             "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY REFERENCES a)",
             ("TRUNCATE a CASCADE", "INSERT INTO a VALUES (3)", "INSERT INTO b VALUES (3)", "TRUNCATE b, a"), compared=("a",
             "b")),
    Scenario("unlogged and temporary tables are left alone",
             "CREATE TABLE t (id int PRIMARY KEY); CREATE UNLOGGED TABLE u (a int); CREATE TEMPORARY TABLE w (a int)",
             "INSERT INTO t VALUES (1)", None,
             ("INSERT INTO u VALUES (1); UPDATE u SET a = 2; INSERT INTO w VALUES (1); UPDATE w SET a = 2",
                                                "INSERT INTO t VALUES (2)")),
    Scenario("odd names", 'CREATE SCHEMA "my.app"; CREATE TABLE "my.app"."a.b ""c"" %s é" ("id.x" int PRIMARY KEY, "%v" text)',
             "INSERT INTO \"my.app\".\"a.b \"\"c\"\" %s é\" VALUES (1, 'x')", None,
             ("INSERT INTO \"my.app\".\"a.b \"\"c\"\" %s é\" VALUES (2, 'y')",), compared=('"my.app"."a.b ""c"" %s é"',),
             filter=('"my.app".*',)),
    Scenario("odd names, all schemas", 'CREATE SCHEMA "my.app"; CREATE TABLE "my.app"."T" (id int PRIMARY KEY)',
             'INSERT INTO "my.app"."T" VALUES (1)', None, ('INSERT INTO "my.app"."T" VALUES (2)',), compared=('"my.app"."T"',),
             filter=('"my.app"."T"',)),
)  # fmt: skip

LEAVES = (
    "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);"
    "CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (MINVALUE) TO (50);"
    "CREATE TABLE t_high (v text, id int NOT NULL); ALTER TABLE t ATTACH PARTITION t_high FOR VALUES FROM (50) TO (1000)"
)
FILLED = "INSERT INTO t SELECT i, i FROM generate_series(1, 100) i"
MOVES = ("UPDATE t SET id = id + 500 WHERE id BETWEEN 30 AND 40", "UPDATE t SET v = v || 'x'",
         "DELETE FROM t WHERE id IN (1, 99)", "INSERT INTO t VALUES (700, 'n'), (0, 'm')")  # fmt: skip
ROOT = {"partitions": "root"}

PARTITIONS = (
    Scenario("by leaf", LEAVES, FILLED, None, MOVES, compared=("t_low", "t_high")),
    Scenario("by root into a plain table", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)", MOVES, options=ROOT),
    Scenario("by root into a missing table", LEAVES, FILLED, None, MOVES, options=ROOT),
    Scenario("by root into other partitions", LEAVES, FILLED,
             "CREATE TABLE t (v text, id int PRIMARY KEY) PARTITION BY HASH (id);"
             "CREATE TABLE t0 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
             "CREATE TABLE t1 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 1)", MOVES, options=ROOT),
    Scenario("by root, a partition added later", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)",
             ("CREATE TABLE t_more PARTITION OF t FOR VALUES FROM (1000) TO (2000)", "INSERT INTO t VALUES (1500, 'x')",
              "UPDATE t SET v = 'y' WHERE id = 1500"), options=ROOT),
    Scenario("by root, a filled partition attached", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)",
             ("CREATE TABLE t_more (id int NOT NULL, v text); INSERT INTO t_more VALUES (1500, 'x')",
              "ALTER TABLE t ATTACH PARTITION t_more FOR VALUES FROM (1000) TO (2000)", "INSERT INTO t VALUES (1501, 'x')"),
              options=ROOT),
    Scenario("by root, a partition detached", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)",
             ("ALTER TABLE t DETACH PARTITION t_high", "UPDATE t SET v = 'z'"),
             options=ROOT),
    Scenario("by root, a partition dropped", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)",
             ("DROP TABLE t_high", "UPDATE t SET v = 'z'"), options=ROOT),
    Scenario("by root, a leaf truncated", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)",
             ("TRUNCATE t_high", "UPDATE t SET v = 'z'"), options=ROOT),
    Scenario("by root, truncated", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)",
             ("TRUNCATE t", "INSERT INTO t VALUES (5, 'z')"), options=ROOT),
    Scenario("by root, a column is added", LEAVES, FILLED, "CREATE TABLE t (id int PRIMARY KEY, v text)",
             ("ALTER TABLE t ADD COLUMN w int DEFAULT 7", "INSERT INTO t VALUES (777, 'z', 1)"), options=ROOT),
    Scenario("by leaf, a partition added later", LEAVES, FILLED, None,
             ("CREATE TABLE t_more PARTITION OF t FOR VALUES FROM (1000) TO (2000)", "INSERT INTO t VALUES (1500, 'x')"),
             compared=("t_low", "t_high", "t_more")),
    Scenario("by leaf into leaves of a partitioned table", LEAVES, FILLED, LEAVES,
             ("CREATE TABLE t_more PARTITION OF t FOR VALUES FROM (1000) TO (2000)", "INSERT INTO t VALUES (1500, 'x')"),
             compared=("t_low", "t_high", "t_more"), expected=EITHER),
    Scenario("by leaf, in another schema than the root",
             "CREATE SCHEMA parts; CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);"
             "CREATE TABLE parts.low PARTITION OF t FOR VALUES FROM (MINVALUE) TO (50);"
             "CREATE TABLE parts.high PARTITION OF t FOR VALUES FROM (50) TO (1000)", FILLED, None, MOVES,
             compared=("parts.low", "parts.high"), filter=("parts.*",)),
    Scenario("by root, leaves in another schema",
             "CREATE SCHEMA parts; CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);"
             "CREATE TABLE parts.low PARTITION OF t FOR VALUES FROM (MINVALUE) TO (50);"
             "CREATE TABLE parts.high PARTITION OF t FOR VALUES FROM (50) TO (1000)", FILLED, None, MOVES, options=ROOT),
)  # fmt: skip


@pytest.mark.parametrize("scenario", COLUMNS, ids=named)
def test_column_of_a_type(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Values arrive by name and by content, by the first copy, by single changes and by many, in the default options."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", KEYS, ids=named)
def test_rows_are_found_by_their_key(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Operators of types and extensions are found wherever they are."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", KINDS, ids=named)
def test_kind_of_table(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """Unusual tables, identities, operations and names."""
    run_scenario(scenario, source_db, sink_db)


@pytest.mark.parametrize("scenario", PARTITIONS, ids=named)
def test_partitions(source_db: str, sink_db: str, scenario: Scenario) -> None:
    """By leaf each partition is a table; by root all of them are one, also those that come, go or live in another schema."""
    run_scenario(scenario, source_db, sink_db)


def test_scheme_of_libpq(source_db: str, sink_db: str) -> None:
    """A URI may begin with postgres:// too."""
    with data_plane(source_db.replace("postgresql://", "postgres://"), sink_db.replace("postgresql://", "postgres://")) as plane:
        plane.kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        plane.kit.run("INSERT INTO t VALUES (1)")
        plane.start()
        plane.kit.run("INSERT INTO t VALUES (2)")
        plane.settle("t")


def test_type_without_binary_form_stops_no_other_table(source_db: str, sink_db: str) -> None:
    """The first value of such a type arrives while another table is written; both go through the same changefeed."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE fine (id int PRIMARY KEY, v int)")
        kit.run("CREATE TABLE odd (id int PRIMARY KEY, v aclitem[])")
        kit.run("CREATE TABLE inner_odd (id int PRIMARY KEY)")
        plane.start()
        kit.run("INSERT INTO fine VALUES (1, 1)")
        kit.run("INSERT INTO odd VALUES (1, '{=r/postgres}')")
        kit.run("INSERT INTO fine VALUES (2, 2)")
        plane.settle("fine", "odd")
        kit.run("CREATE TYPE p AS (a aclitem)")
        kit.at_sink("CREATE TYPE p AS (a aclitem)")
        kit.run("ALTER TABLE inner_odd ADD COLUMN v p[]")
        kit.run("INSERT INTO inner_odd VALUES (1, ARRAY[ROW('=r/postgres')::p])")
        kit.run("INSERT INTO fine VALUES (3, 3)")
        plane.settle("fine", "inner_odd")


def test_truncate_of_a_published_and_another_table(source_db: str, sink_db: str) -> None:
    """Only the tables of the changefeed are emptied."""
    with data_plane(source_db, sink_db, ("public.a",)) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)")
        kit.run("INSERT INTO a VALUES (1); INSERT INTO b VALUES (1)")
        kit.at_sink("CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (1)")
        plane.start()
        kit.run("TRUNCATE a, b")
        plane.settle("a")
        assert kit.at_sink("SELECT * FROM b") == [(1,)]


def test_encodings_of_both_ends_differ(source_db: str, sink_db: str) -> None:
    """Text of a LATIN1 source arrives in a UTF8 sink as the same characters."""
    with psycopg.connect(source_db, autocommit=True) as connection:
        name = f"{connection.info.dbname}_latin1"
        connection.execute(f"CREATE DATABASE {name} ENCODING LATIN1 TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'".encode())
        try:
            with data_plane(f"{source_db}_latin1", sink_db) as plane:
                kit = plane.kit
                kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
                kit.run("INSERT INTO t VALUES (1, 'schön')")
                plane.start()
                kit.run("INSERT INTO t VALUES (2, 'naïve')")
                kit.run("INSERT INTO t SELECT i, 'Ärger' FROM generate_series(10, 100) i")
                plane.settle("t")
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
