"""Every type arrives as it was: by the first copy, by few and by many changes, in keys, beside large values, in any stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.integration.test_postgres_sessions import settle
from tests.processor.postgres.replication_kit import Kit, begin

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
    case("tsquery", "'a & !b <2> c:*A'"),
    case("pg_lsn", "'16/B374D848'", key=True),
    case("oid", "4294967295", key=True),
    case("xid", "'42'"),
    case("xid8", "'4294967299'", key=True),
    case("tid", "'(42,7)'", key=True),
    case("txid_snapshot", "'10:20:10,14,15'"),
    case("pg_snapshot", "'10:20:10,14,15'"),
    case("refcursor", "'cursor'"),
    case("oidvector", "'1 2 3'", "''", key=True),
    case("int2vector", "'1 -2 3'", "''"),
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
@pytest.mark.parametrize("cases", [BUILT_IN, BY_NAME, OF_USER, UNSENDABLE], ids=["built-in", "by name", "of users", "unsendable"])
def test_values_arrive_as_they_were(source_db: str, sink_db: str, cases: tuple[Case, ...], binary: str) -> None:
    """Each type in one table: first copy, single changes, many changes, unchanged large values, and replica identity full."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        prepare_types(kit)
        if kit.has_xml() and cases is BUILT_IN:
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


@pytest.mark.parametrize("cases", [BUILT_IN, BY_NAME, OF_USER], ids=["built-in", "by name", "of users"])
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
