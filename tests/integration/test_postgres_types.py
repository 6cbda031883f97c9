"""Every type arrives as it was: by the first copy, by few and by many changes, in keys, beside large values, in any stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg
import pytest

from tests.integration.test_postgres_sessions import failure, settle, start_again
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, stop, wait_until

pytestmark = pytest.mark.integration

BIG = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 200) i)"


@dataclass(frozen=True, slots=True)
class Case:
    """A type with values, as SQL. is_key: it has an equality that a primary key can use."""

    type: str
    values: tuple[str, ...]
    is_key: bool = False


def case(type_name: str, *values: str, key: bool = False) -> Case:
    return Case(type_name, values, key)


SETUP = (
    "CREATE TYPE mood AS ENUM ('sad', 'ok', 'it''s \"fine\"')",
    "CREATE DOMAIN positive AS int CHECK (value > 0)",
    "CREATE DOMAIN short AS varchar(5) NOT NULL DEFAULT 'a'",
    "CREATE DOMAIN class_domain AS regclass",
    "CREATE DOMAIN moods AS mood[] CHECK (cardinality(value) < 9)",
    "CREATE DOMAIN deep AS positive CHECK (value < 1000)",
    "CREATE TYPE plain AS (a int, b text)",
    "CREATE TYPE rich AS (m mood, p plain, n numeric[], d positive)",
    "CREATE TYPE with_class AS (c regclass, v int)",
    "CREATE TYPE with_acl AS (a aclitem)",
    "CREATE DOMAIN rich_domain AS rich",
    "CREATE TYPE size AS ENUM ('s', 'm', 'l')",
    "CREATE TYPE size_range AS RANGE (subtype = size)",
    "CREATE TYPE float_range AS RANGE (subtype = float8, subtype_diff = float8mi)",
    "CREATE TYPE plain_range AS RANGE (subtype = plain)",
    "CREATE TABLE named (id int)",
    'CREATE SCHEMA other CREATE TABLE "Odd ""name" (id int)',
    "CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql AS 'SELECT 2 * $1'",
    "CREATE TEXT SEARCH CONFIGURATION own (COPY = simple)",
)

BUILT_IN = (
    case("bool", "true", "false", key=True),
    case("int2", "-32768", "32767", key=True),
    case("int8", "-9223372036854775808", "9223372036854775807", key=True),
    case("float4", "'NaN'", "'-Infinity'", "1.1234567", "'-0'", key=True),
    case("float8", "'NaN'", "'Infinity'", "0.1::float8 + 0.2", "'-0'", "5e-324", key=True),
    case("numeric", "'NaN'", "'Infinity'", "1.0", "2.00", "'1e-200'", "-0.000", key=True),
    case("numeric(20, 6)", "'NaN'", "12345678901234.678901", key=True),
    case("numeric(3, -2)", "12300"),
    case("money", "-92233720368547758.08", "0.01", key=True),
    case("text", "''", "E'tab\\t nl\\n back\\\\ nul \\\\N \\\\. é€😀'", "NULL", key=True),
    case("varchar(20)", "'vär'", "'trailing   '", key=True),
    case("bpchar", "'ab   '", "''"),
    case("char(5)", "'ab'", "''", key=True),
    case('"char"', "'x'", "''", key=True),
    case("name", "'a name'", key=True),
    case("bytea", r"'\x00ff105c27'", "''", key=True),
    case("date", "'0001-01-01'", "'infinity'", "'-infinity'", "'4713-01-01 BC'", key=True),
    case("timestamp", "'2024-02-29 12:34:56.789012'", "'infinity'", key=True),
    case("timestamp(3)", "'2024-02-29 12:34:56.789'"),
    case("timestamptz", "'1999-12-31 23:59:59+02'", "'-infinity'", key=True),
    case("time", "'23:59:59.999999'", "'24:00'", key=True),
    case("timetz", "'04:05:06.7+05:45'", "'24:00-12'", key=True),
    case("interval", "'-1 year 2 days -03:04:05.678'", "'30 days'", key=True),
    case("interval", "'1 mon'"),
    case("interval day to second(2)", "'2 days 03:04:05.67'"),
    case("uuid", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", key=True),
    case("json", '\'{"a" : 1, "a":2}\'', "'null'"),
    case("jsonb", "'{\"b\": [1.50, null]}'", "'null'", "'1.0'", key=True),
    case("jsonpath", "'$.a[*] ? (@.b > 1)'"),
    case("inet", "'10.0.0.1/8'", "'10.0.0.1'", "'::1'", key=True),
    case("cidr", "'10.0.0.0/8'", key=True),
    case("macaddr", "'08:00:2b:01:02:03'", key=True),
    case("macaddr8", "'08:00:2b:01:02:03:04:05'", key=True),
    case("bit(5)", "B'10101'", key=True),
    case("bit varying", "B'101010101010'", "B''", key=True),
    case("bit varying(9)", "B'10101'"),
    case("point", "'(0.1,-2e300)'"),
    case("box", "'(3,4),(1,2)'"),
    case("box[]", "'{(3,4),(1,2);(1,1),(0,0)}'"),
    case("path", "'((1,2),(3,4))'", "'[(1,2),(3,4)]'"),
    case("polygon", "'((1,2),(3,4),(5,6))'"),
    case("circle", "'<(1,2),3>'"),
    case("line", "'{1,2,3}'"),
    case("tsvector", "'a:3A b:1,2'", "''"),
    case("pg_lsn", "'16/B374D848'", key=True),
    case("oid", "4294967295", key=True),
    case("xid", "'42'"),
    case("xid8", "'4294967299'", key=True),
    case("tid", "'(42,7)'", key=True),
    case("txid_snapshot", "'10:20:10,14,15'"),
    case("pg_snapshot", "'10:20:10,14,15'"),
    case("refcursor", "'cursor'"),
    case("int[]", "'{}'", "'{1,NULL,-3}'", "'[2:4]={7,8,9}'", "'{{1,2},{3,4}}'", "'[0:1][-1:0]={{1,2},{3,4}}'", key=True),
    case("text[]", '\'{"a,b",NULL,"","NULL","q\\"\\\\"}\''),
    case("numeric[][]", "'{{1.5,2},{NULL,-3}}'"),
    case("date[]", "'{infinity,NULL,2024-02-29}'"),
    case("interval[]", "'{1 year,-3 days}'"),
    case("bytea[]", r"""'{"\\x00","\\xff"}'"""),
    case("int4range", "'empty'", "'[1,10)'", "'(,5)'", key=True),
    case("tstzrange", "'[2024-01-01 00:00+00,infinity)'", key=True),
    case("int4multirange", "'{}'", "'{[1,3),[5,9)}'", key=True),
    case("int4range[]", "'{\"[1,3)\",empty}'"),
    case("information_schema.yes_or_no", "'YES'"),
)
INEXACT = (
    case("tsquery", "'a & !b <2> c:*A'"),
    case("oidvector", "'1 2 3'", "''", key=True),
    case("int2vector", "'1 -2 3'", "''"),
    case("information_schema.sql_identifier[]", "'{a,b}'"),
)
BY_NAME = (
    case("regclass", "'named'", "'-'", "'4294967290'", '\'other."Odd ""name"\'', "'pg_class'", key=True),
    case("regtype", "'mood'", "'int4'", "'-'", "'mood[]'", "'timestamp with time zone'"),
    case("regproc", "'twice'", "'now'"),
    case("regprocedure", "'twice(int)'", "'lower(text)'"),
    case("regoper", "'pg_catalog.||/'"),
    case("regoperator", "'+(int4,int4)'", "'-(NONE,int4)'"),
    case("regnamespace", "'other'", "'public'"),
    case("regconfig", "'own'", "'english'"),
    case("regdictionary", "'simple'"),
    case("regrole", "'postgres'"),
    case("regcollation", "'\"C\"'"),
    case("regclass[]", "ARRAY['named', 'other.\"Odd \"\"name\"', NULL]::regclass[]", "'{-}'"),
    case("class_domain", "'named'", "'-'"),
    case("class_domain[]", "'{named}'"),
    case("with_class", "'(named,1)'", "'(-,2)'"),
    case("with_class[]", "ARRAY['(named,1)'::with_class]"),
)
OF_USER = (
    case("mood", "'sad'", "'it''s \"fine\"'", key=True),
    case("mood[]", "'{sad,NULL,ok}'", "'{}'", "'[3:4]={ok,sad}'", "'{{sad},{ok}}'", key=True),
    case("moods", "'{sad}'"),
    case("positive", "5", key=True),
    case("positive[]", "'{1,NULL,3}'"),
    case("deep", "7", key=True),
    case("short", "'abc'"),
    case("short[]", "'{abc}'"),
    case("plain", "'(1,\"x y\")'", "'(,)'", key=True),
    case("plain[]", "ARRAY['(1,\"x y\")', NULL, '(,\"\")']::plain[]"),
    case("rich", '\'(ok,"(1,""a \\\\""b"")","{1.50,NULL}",7)\'', "'(,,,)'"),
    case("rich[]", 'ARRAY[\'(ok,"(1,x)","{1.5}",7)\'::rich, NULL]'),
    case("rich_domain", '\'(ok,"(1,x)","{1.5}",7)\''),
    case("rich_domain[]", 'ARRAY[\'(ok,"(1,x)","{1.5}",7)\'::rich_domain]'),
    case("size_range", "'[s,m)'", "'empty'"),
    case("size_range[]", "'{\"[s,l)\"}'"),
    case("size_multirange", "'{[s,m)}'"),
    case("float_range", "'[1.5,2.5)'"),
    case("float_range[]", "'{\"[1.5,2.5)\"}'"),
    case("plain_range", "plain_range('(1,a)'::plain, '(2,b)'::plain)"),
    case("named", "'(5)'"),
    case("named[]", "ARRAY['(5)'::named]"),
)
UNSENDABLE = (
    case("aclitem", "'postgres=r/postgres'"),
    case("aclitem[]", "'{postgres=r/postgres,=r/postgres}'"),
    case("with_acl", "'(postgres=r/postgres)'"),
    case("with_acl[]", "ARRAY['(postgres=r/postgres)'::with_acl]"),
)
GROUPS = {
    "built-in": BUILT_IN,
    "built-in with an enum": (*BUILT_IN, OF_USER[0]),  # copied as text, streamed in binary form
    "inexact in binary": INEXACT,
    "by name": BY_NAME,
    "of users": OF_USER,
    "unsendable": UNSENDABLE,
}


def prepare_types(kit: Kit) -> None:
    """Creates all types at both ends, with other ids at the sink, and labels of enums in another order."""
    kit.at_sink("CREATE TABLE shift (v int)")
    for statement in SETUP:
        kit.run(statement)
        kit.at_sink(statement.replace("('sad', 'ok'", "('ok', 'sad'"))


def columns_of(cases: Sequence[Case]) -> str:
    return ", ".join(f"c{at} {one.type}" for at, one in enumerate(cases))


def row_of(cases: Sequence[Case], turn: int) -> str:
    return ", ".join(one.values[turn % len(one.values)] for one in cases)


def turns(cases: Sequence[Case]) -> Iterator[int]:
    return iter(range(max(len(one.values) for one in cases)))


@pytest.mark.parametrize("binary", ["true", "false"])
@pytest.mark.parametrize("cases", GROUPS.values(), ids=GROUPS.keys())
def test_values_arrive_as_they_were(source_db: str, sink_db: str, cases: tuple[Case, ...], binary: str) -> None:
    """Each type in one table: first copy, single changes, many changes, unchanged large values, and replica identity full."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        prepare_types(kit)
        if kit.has_xml() and cases[0] is BUILT_IN[0]:
            cases = (*cases, case("xml", "'<?xml version=\"1.0\"?><a>é</a>'", "'text <b/>'"))
        kit.run(f"CREATE TABLE t (id int PRIMARY KEY, big text, {columns_of(cases)})")
        kit.run("ALTER TABLE t ALTER big SET STORAGE EXTERNAL")
        kit.run(f"CREATE TABLE whole (id int, {columns_of(cases)})")
        kit.run("ALTER TABLE whole REPLICA IDENTITY FULL")
        for turn in turns(cases):
            kit.run(f"INSERT INTO t VALUES ({turn}, {BIG}, {row_of(cases, turn)})")
            kit.run(f"INSERT INTO whole VALUES ({turn}, {row_of(cases, turn)})")
        kit.run("INSERT INTO t (id) VALUES (99)")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t"), kit.span("whole")], start_ts)
        settle(kit, "t", "whole")
        for turn in turns(cases):
            kit.run(f"INSERT INTO t VALUES ({100 + turn}, {BIG}, {row_of(cases, turn)})")
            names = ", ".join(f"c{at}" for at in range(len(cases)))
            kit.run(f"UPDATE t SET ({names}) = ROW({row_of(cases, turn + 1)}) WHERE id = {turn}")
            kit.run(f"INSERT INTO whole VALUES ({turn + 1}, {row_of(cases, turn)})")
        kit.run("UPDATE whole SET id = id + 100 WHERE id % 2 = 0")
        kit.run("DELETE FROM whole WHERE id % 2 = 1")
        settle(kit, "t", "whole")
        for turn in turns(cases):
            series = f"generate_series({1000 * turn + 1000}, {1000 * turn + 1099})"
            kit.run(f"INSERT INTO t SELECT i, 'small', {row_of(cases, turn)} FROM {series} i")
        kit.run("UPDATE t SET big = 'x' WHERE id % 3 = 0")
        settle(kit, "t", "whole")


def test_images_do_not_depend_on_the_form(source_db: str) -> None:
    """Rows without a key are found by their image, which is the same whether the sink has read a value as text or as binary."""
    with psycopg.connect(source_db, autocommit=True) as connection:
        for statement in SETUP:
            connection.execute(statement.encode())
        for one in (*BUILT_IN, *OF_USER):
            connection.execute(f"DROP TABLE IF EXISTS a, b; CREATE TABLE a (v {one.type}); CREATE TABLE b (LIKE a)".encode())
            connection.execute(f"INSERT INTO a VALUES ({'), ('.join(one.values)})".encode())
            with connection.cursor() as reader, reader.copy("COPY a TO STDOUT (FORMAT binary)") as copy:
                rows = b"".join(map(bytes, copy))
            with connection.cursor() as writer, writer.copy("COPY b FROM STDIN (FORMAT binary)") as copy:
                copy.write(rows)
            same = "SELECT count(*) FROM a WHERE EXISTS (SELECT FROM b WHERE ROW(a.v)::record *= ROW(b.v)::record)"
            assert connection.execute(same.encode()).fetchone() == (len(one.values),), one


@pytest.mark.parametrize("cases", [BUILT_IN, (*INEXACT, *BY_NAME), OF_USER], ids=["built-in", "by name", "of users"])
def test_keys_of_every_type(source_db: str, sink_db: str, cases: tuple[Case, ...]) -> None:
    """Rows are found by keys of each type, by few and by many changes, and equal keys with other bytes are one row."""
    with Kit(source_db, sink_db) as kit:
        prepare_types(kit)
        keys = [one for one in cases if one.is_key]
        names = [f"k{at}" for at in range(len(keys))]
        for name, one in zip(names, keys, strict=True):
            kit.run(f"CREATE TABLE {name} (k {one.type} PRIMARY KEY, v int, pad int)")
            for value in one.values:
                if value != "NULL":
                    kit.run(f"INSERT INTO {name} VALUES ({value}, 0, 0)")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span(name) for name in names], start_ts)
        settle(kit, *names)
        for name, one in zip(names, keys, strict=True):
            kit.run(f"UPDATE {name} SET v = 1")
            for turn in range(60):
                kit.run(f"UPDATE {name} SET v = v + {turn}")
            kit.run(f"DELETE FROM {name} WHERE k = ({one.values[0]})::{one.type}")
        settle(kit, *names)


def test_extensions_in_another_schema(source_db: str, sink_db: str) -> None:
    """Types of an extension that is installed in another schema at the sink arrive, also in keys, arrays and domains."""
    with Kit(source_db, sink_db) as kit:
        kit.at_sink("CREATE SCHEMA ext")
        for name in ("hstore", "citext", "ltree"):
            kit.run(f"CREATE EXTENSION {name}")
            kit.at_sink(f"CREATE EXTENSION {name} SCHEMA ext")
        kit.run("CREATE DOMAIN email AS citext CHECK (value ~ '@')")
        kit.at_sink("CREATE DOMAIN email AS ext.citext CHECK (value OPERATOR(ext.~) '@')")
        columns = "h hstore, c citext, l ltree, ca citext[], ha hstore[], e email"
        row = "'a=>1, \"b c\"=>NULL', 'Abc', 'a.b.c', '{A,b}', ARRAY['x=>y'::hstore], 'A@b'"
        kit.run(f"CREATE TABLE t (id int PRIMARY KEY, {columns})")
        kit.run("CREATE TABLE by_citext (k citext PRIMARY KEY, v int)")
        kit.run("CREATE TABLE by_ltree (k ltree PRIMARY KEY, v int)")
        kit.run(f"INSERT INTO t VALUES (1, {row})")
        kit.run("INSERT INTO by_citext VALUES ('A', 1), ('B', 1); INSERT INTO by_ltree VALUES ('a.b', 1), ('c', 1)")
        start_ts = kit.start()
        names = ("t", "by_citext", "by_ltree")
        begin(kit.executor(), [kit.span(name) for name in names], start_ts)
        settle(kit, *names)
        kit.run(f"INSERT INTO t SELECT i, {row} FROM generate_series(2, 100) i")
        kit.run("UPDATE t SET h = h || 'z=>1', c = 'aBC' WHERE id % 2 = 0")
        kit.run("UPDATE by_ltree SET v = 2 WHERE k = 'a.b'; DELETE FROM by_ltree WHERE k = 'c'")
        kit.run("UPDATE by_citext SET v = 2 WHERE k = 'a'; UPDATE by_citext SET k = 'a' WHERE k = 'A'")
        kit.run("DELETE FROM by_citext WHERE k = 'b'; INSERT INTO by_citext VALUES ('b', 7)")
        settle(kit, *names)
        kit.run("ALTER TABLE t ADD COLUMN added citext DEFAULT 'Old'")
        kit.run(f"INSERT INTO t VALUES (1000, {row})")
        settle(kit, *names)


def test_equal_keys_with_other_bytes_in_one_batch(source_db: str, sink_db: str) -> None:
    """A key that is replaced by an equal one of other bytes stays one row, in few changes and in many of one transaction."""
    keys = {
        "numeric": ("1.0", "1.00", "1"),
        "citext": ("'A'", "'a'", "'A'"),
        "float8": ("'-0'", "0", "'-0'"),
        "ci": ("'É'", "'é'", "'É'"),
        "jsonb": ("'1.0'", "'1.00'", "'1'"),
        "char(4)": ("'a'", "'a  '", "'a'"),
        "interval": ("'1 mon'", "'30 days'", "'720:00:00'"),
    }
    collation = "CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    with Kit(source_db, sink_db) as kit:
        for run in (kit.run, kit.at_sink):
            run("CREATE EXTENSION citext")
            try:
                run(collation)
            except psycopg.errors.FeatureNotSupported:  # the server was built without ICU
                keys.pop("ci", None)
        for at, (name, values) in enumerate(keys.items()):
            kit.run(f"CREATE TABLE e{at} (k {'text COLLATE ci' if name == 'ci' else name} PRIMARY KEY, v int, w text)")
            kit.run(f"INSERT INTO e{at} VALUES ({values[0]}, 0, 'w')")
        names = [f"e{at}" for at in range(len(keys))]
        start_ts = kit.start()
        begin(kit.executor(), [kit.span(name) for name in names], start_ts)
        settle(kit, *names)
        for at, (first, second, third) in enumerate(keys.values()):
            for turns in (1, 30):
                with kit.source_connection.transaction():
                    for _ in range(turns):
                        kit.run(f"UPDATE e{at} SET k = {second}, v = v + 1")
                        kit.run(f"UPDATE e{at} SET v = v + 1")
                        kit.run(f"UPDATE e{at} SET k = {third}")
                        kit.run(f"DELETE FROM e{at}")
                        kit.run(f"INSERT INTO e{at} VALUES ({second}, 5, 'x')")
                        kit.run(f"UPDATE e{at} SET k = {first}, v = 6")
                settle(kit, f"e{at}")


def test_types_without_binary_functions(source_db: str, sink_db: str) -> None:
    """A base type that has no send and receive functions, and arrays, composites and ranges of it, disturb no other table."""
    setup = (
        "CREATE TYPE plainest",
        "CREATE FUNCTION plainest_in(cstring) RETURNS plainest LANGUAGE internal IMMUTABLE STRICT AS 'textin'",
        "CREATE FUNCTION plainest_out(plainest) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout'",
        "CREATE TYPE plainest (INPUT = plainest_in, OUTPUT = plainest_out)",
        "CREATE TYPE holder AS (p plainest, n int)",
    )
    with Kit(source_db, sink_db) as kit:
        for statement in setup:
            kit.run(statement)
            kit.at_sink(statement)
        kit.run("CREATE TABLE scalar (id int PRIMARY KEY, p plainest)")
        kit.run("CREATE TABLE parts (id int PRIMARY KEY, a plainest[], h holder)")
        kit.run("CREATE TABLE other (id int PRIMARY KEY, v int)")
        names = ("scalar", "parts", "other")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span(name) for name in names], start_ts)
        for turn in range(3):
            kit.run(f"INSERT INTO scalar VALUES ({turn}, 'some text')")
            kit.run(f"INSERT INTO parts VALUES ({turn}, '{{a,\"b c\"}}', '(x y,1)')")
            kit.run(f"INSERT INTO other SELECT i, i FROM generate_series({turn * 100}, {turn * 100 + 99}) i")
        settle(kit, *names)


def test_a_row_without_binary_form_disturbs_no_other_table(source_db: str, sink_db: str) -> None:
    """A value that only a table of another processor has does not stop a stream, which continues with text."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE elsewhere (id int PRIMARY KEY, a aclitem[])")
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v float8, b bytea)")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t")], start_ts)
        kit.run("INSERT INTO t VALUES (1, 0.1, '\\x00')")
        kit.run("INSERT INTO elsewhere VALUES (1, '{=r/postgres}')")
        kit.run("INSERT INTO t SELECT i, i / 3.0, '\\x5c00' FROM generate_series(2, 100) i")
        settle(kit, "t")
        kit.run("UPDATE t SET v = v * 3 WHERE id < 3")
        settle(kit, "t")


@pytest.mark.parametrize("type_name", ["regclass", "regtype[]", "aclitem[]", "with_class", "rich[]"])
def test_column_that_needs_text_added_later(source_db: str, sink_db: str, type_name: str) -> None:
    """A table that is read in binary form gets such a column: no id is written, and added again it is read as text."""
    values = {one.type: one.values[0] for one in (*BY_NAME, *OF_USER, *UNSENDABLE)} | {"regtype[]": "'{int4,mood}'"}
    with Kit(source_db, sink_db) as kit:
        prepare_types(kit)
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v int)")
        kit.run("CREATE TABLE other (id int PRIMARY KEY, v int)")
        kit.run("INSERT INTO t VALUES (1, 1)")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t"), kit.span("other")], start_ts)
        settle(kit, "t")
        kit.run(f"ALTER TABLE t ADD COLUMN c {type_name} DEFAULT {values[type_name]}")
        kit.run("INSERT INTO t VALUES (2, 2)")
        kit.run("INSERT INTO other VALUES (1, 1)")
        settle(kit, "other")
        if type_name != "aclitem[]":  # there, the stream as a whole continues with text
            assert "text" in failure(kit, "t")
            start_again(kit, "t")
        settle(kit, "t", "other")


COLUMNS = (  # at the source, at the sink, a value, whether nothing is lost
    ("int2", "int4", "5", True),
    ("int4", "int8", "5", True),
    ("int4", "numeric", "5", True),
    ("int4", "numeric(10,0)", "5", True),
    ("int4", "numeric(9,0)", "5", False),
    ("int4", "numeric(12,2)", "5", True),
    ("int4", "float8", "5", True),
    ("int8", "float8", "5", False),
    ("int8", "int4", "5", False),
    ("int4", "int2", "5", False),
    ("int4", "bool", "1", False),
    ("float4", "float8", "1.1", True),
    ("float8", "float4", "1.5", False),
    ("float8", "numeric", "1.5", False),
    ("numeric", "int4", "1", False),
    ("numeric(9,0)", "int4", "1", True),
    ("numeric(10,2)", "numeric(12,4)", "1.25", True),
    ("numeric(10,2)", "numeric(10,4)", "1.25", False),
    ("numeric(12,4)", "numeric(12,2)", "1.2345", False),
    ("numeric", "numeric(12,2)", "1.2", False),
    ("numeric(12,4)", "numeric", "1.2345", True),
    ("varchar(5)", "varchar(10)", "'a'", True),
    ("varchar(10)", "varchar(5)", "'a'", False),
    ("varchar(10)", "text", "'a  '", True),
    ("text", "varchar(10)", "'a'", False),
    ("text", "varchar", "'a'", True),
    ("char(5)", "char(7)", "'a'", True),
    ("char(7)", "char(5)", "'a'", False),
    ("char(5)", "text", "'a'", True),
    ("text", "char(5)", "'a'", False),
    ("name", "text", "'a'", True),
    ("text", "name", "'a'", False),
    ("uuid", "text", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", True),
    ("text", "uuid", "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'", False),
    ("bool", "text", "true", True),
    ("mood", "text", "'ok'", True),
    ("mood[]", "text[]", "'{ok}'", True),
    ("mood", "varchar(3)", "'ok'", False),
    ("text", "mood", "'ok'", False),
    ("regclass", "text", "'pg_class'", True),
    ("int[]", "int8[]", "'{1,NULL}'", True),
    ("int8[]", "int[]", "'{1,NULL}'", False),
    ("int[]", "text", "'{1,NULL}'", True),
    ("positive", "int4", "5", True),
    ("int4", "positive", "5", True),
    ("int4", "deep", "5", True),
    ("positive[]", "int4[]", "'{1}'", True),
    ("int4[]", "positive[]", "'{1}'", True),
    ("varchar(9)", "short", "'abc'", False),
    ("short", "varchar(5)", "'abc'", True),
    ("date", "timestamp", "'2024-02-29'", True),
    ("date", "timestamptz", "'2024-02-29'", False),
    ("timestamp", "timestamptz", "'2024-02-29 01:00'", False),
    ("timestamptz", "timestamp", "'2024-02-29 01:00'", False),
    ("timestamp", "date", "'2024-02-29'", False),
    ("timestamp", "timestamp(3)", "'2024-02-29 01:00:00.123'", False),
    ("timestamp(3)", "timestamp(6)", "'2024-02-29 01:00:00.123'", True),
    ("timestamp", "timestamp(6)", "'2024-02-29 01:00:00.123456'", True),
    ("time(3)", "time", "'01:00:00.123'", True),
    ("interval", "interval(2)", "'1.23 s'", False),
    ("interval day to second", "interval", "'1 day 1.23 s'", True),
    ("interval", "interval year to month", "'1 year'", False),
    ("bit(5)", "bit varying", "B'10101'", True),
    ("bit(5)", "bit(6)", "B'10101'", False),
    ("bit varying(5)", "bit varying(6)", "B'101'", True),
    ("json", "jsonb", "'{\"a\": 1}'", False),
    ("jsonb", "json", "'{\"a\": 1}'", True),
    ("jsonb", "text", "'{\"a\": 1}'", True),
    ("bytea", "text", "'\\x00ff'", True),
    ("money", "numeric", "'1.50'", False),
    ("oid", "int8", "4294967295", True),
    ("cidr", "inet", "'10.0.0.0/8'", True),
    ("inet", "cidr", "'10.0.0.0/8'", False),
)


@pytest.mark.parametrize("binary", ["true", "false"])
def test_other_types_at_the_sink(source_db: str, sink_db: str, binary: str) -> None:
    """A column of another type is written if nothing is lost, alike by copies and changes; else the error names a way out."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        prepare_types(kit)
        for at, (source, sink, value, _) in enumerate(COLUMNS):
            kit.run(f"CREATE TABLE c{at} (id int PRIMARY KEY, v {source})")
            kit.at_sink(f"CREATE TABLE c{at} (id int PRIMARY KEY, v {sink})")
            kit.run(f"INSERT INTO c{at} VALUES (1, {value})")
        names = [f"c{at}" for at in range(len(COLUMNS))]
        start_ts = kit.start()
        begin(kit.executor(), [kit.span(name) for name in names], start_ts)
        lossless = [name for name, column in zip(names, COLUMNS, strict=True) if column[3]]
        for name, (_, _, value, _) in zip(names, COLUMNS, strict=True):
            if name in lossless:
                kit.run(f"INSERT INTO {name} VALUES (2, {value})")
                kit.run(f"INSERT INTO {name} SELECT i, {value} FROM generate_series(3, 99) i")
        for name, (source, sink, _, is_lossless) in zip(names, COLUMNS, strict=True):
            if is_lossless:
                wait_until(lambda name=name: kit.at_sink(f"SELECT count(*) FROM {name}") == [(99,)], f"{source} as {sink}")  # type: ignore[misc]
                assert kit.at_sink(f"SELECT count(DISTINCT v::text) FROM {name}") == [(1,)], (source, sink)
                as_text = kit.run(f"SELECT DISTINCT v::{sink}::text FROM {name}")
                assert kit.at_sink(f"SELECT DISTINCT v::text FROM {name}") == as_text, (source, sink)
            else:
                message = failure(kit, name)
                assert f"public.{name}" in message, (source, sink, message)
                assert "does not hold every value" in message, (source, sink, message)
        assert 'ALTER TABLE public.c4 ALTER COLUMN "v" TYPE integer' in failure(kit, "c4")
        kit.at_sink("ALTER TABLE public.c4 ALTER COLUMN v TYPE integer")
        start_again(kit, "c4")
        settle(kit, "c4")


def test_composite_types_that_differ_are_an_error(source_db: str, sink_db: str) -> None:
    """Fields in another order would be exchanged without a word, in binary and in text form."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TYPE pair AS (a int, b int)")
        kit.at_sink("CREATE TYPE pair AS (b int, a int)")
        kit.run("CREATE TABLE t (id int PRIMARY KEY, p pair)")
        kit.run("INSERT INTO t VALUES (1, '(1,2)')")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t")], start_ts)
        assert "column p has type public.pair, but its fields" in failure(kit, "t")


def test_table_that_needs_text_moves(source_db: str, sink_db: str) -> None:
    """Another processor reads what the first one has not written from a text stream, beside a table in binary form."""
    with Kit(source_db, sink_db) as kit:
        prepare_types(kit)
        kit.run("CREATE TABLE t (id int PRIMARY KEY, c regclass, r rich)")
        kit.run("CREATE TABLE other (id int PRIMARY KEY, v float8)")
        kit.run("INSERT INTO t VALUES (1, 'named', '(ok,\"(1,x)\",\"{1.5}\",7)'); INSERT INTO other VALUES (1, 0.1)")
        start_ts = kit.start()
        first = kit.executor("a")
        spans = [kit.span("t"), kit.span("other")]
        begin(first, spans, start_ts)
        settle(kit, "t", "other")
        checkpoints = [stop(first, span) for span in spans]
        second = kit.executor("b")
        begin(second, spans[1:], checkpoints[1])
        kit.run("INSERT INTO t SELECT i, 'named', '(ok,\"(1,x)\",\"{1.5}\",7)' FROM generate_series(2, 99) i")
        kit.run("INSERT INTO other SELECT i, i / 3.0 FROM generate_series(2, 99) i")
        kit.run('UPDATE t SET c = \'other."Odd ""name"\' WHERE id = 1')
        settle_other = current(kit)
        wait_until(lambda: checkpoint_of(second, spans[1]) >= settle_other, "the other table")
        begin(second, spans[:1], checkpoints[0])
        settle(kit, "t", "other")
        kit.run("UPDATE t SET c = 'pg_class' WHERE id > 50; UPDATE other SET v = -v")
        settle(kit, "t", "other")


def test_extension_type_as_text_at_the_sink(source_db: str, sink_db: str) -> None:
    """A type that the sink does not have is written to a text column, read as text once the first change has shown the need."""
    with Kit(source_db, sink_db) as kit:
        for name in ("citext", "hstore"):
            kit.run(f"CREATE EXTENSION {name}")
        kit.run("CREATE TABLE t (id int PRIMARY KEY, c citext, h hstore, f float4, b bool)")
        kit.at_sink("CREATE TABLE t (id int PRIMARY KEY, c text, h text, f float8, b text)")
        kit.run("INSERT INTO t VALUES (1, 'Abc', 'a=>1', 1.1, true)")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t")], start_ts)
        rows = "SELECT c::text, h::text, f::float8::text, b::text FROM t ORDER BY id"
        wait_until(lambda: kit.at_sink(rows) == kit.run(rows), "the copy")
        kit.run("INSERT INTO t VALUES (2, 'dEf', 'b=>NULL', 2.2, false)")
        assert "column c has type citext" in failure(kit, "t")
        start_again(kit, "t")
        wait_until(lambda: kit.at_sink(rows) == kit.run(rows), "the change")
        kit.run("INSERT INTO t SELECT i, 'X', 'b=>NULL', i / 3.0, false FROM generate_series(3, 99) i")
        kit.run("UPDATE t SET b = true, f = 0.3 WHERE id < 3")
        wait_until(lambda: kit.at_sink(rows) == kit.run(rows), "the changes")
