"""Kinds of source tables: without keys, without columns, with generated columns, under unusual names, and those left out."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tablewire.runtime.plugins import SOURCES, make
from tablewire.source import SourceRequest
from tests.processor.postgres.replication_kit import Kit, begin, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def kit(source_db: str, sink_db: str) -> Iterator[Kit]:
    with Kit(source_db, sink_db) as kit:
        yield kit


def kit_of(source_db: str, sink_db: str, operations: str) -> Kit:
    return Kit(source_db, sink_db, options={"operations": operations})


def test_only_inserts_need_no_key(source_db: str, sink_db: str) -> None:
    """The source's own updates and deletes work, and are not replicated, nor is TRUNCATE."""
    with kit_of(source_db, sink_db, "insert") as kit:
        kit.run("CREATE TABLE keyless (v int)")
        kit.run("CREATE TABLE mute (id int PRIMARY KEY, v int)")
        kit.run("ALTER TABLE mute REPLICA IDENTITY NOTHING")
        kit.run("CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
        names = ("keyless", "mute", "deferred")
        for name in names:
            kit.run(f"INSERT INTO {name} VALUES (1), (2)")
        start_ts = kit.start()
        assert kit.source is not None
        assert kit.source.check() == []
        begin(kit.executor(), kit.spans(), start_ts)
        for name in names:
            kit.run(f"INSERT INTO {name} VALUES (3)")
        kit.wait_equal(*names)
        before = [kit.sink_content(name) for name in names]
        kit.run("UPDATE keyless SET v = 10; DELETE FROM mute WHERE id = 1; TRUNCATE deferred")
        kit.run("INSERT INTO keyless VALUES (4)")
        kit.run("INSERT INTO mute VALUES (4)")
        kit.run("INSERT INTO deferred VALUES (4)")
        wait_until(lambda: all("4" in str(kit.sink_content(name)) for name in names), "what follows is replicated")
        for name, content in zip(names, before, strict=True):
            rows = kit.at_sink(f"SELECT to_jsonb(t)::text FROM {name} t WHERE to_jsonb(t)::text NOT LIKE '%4%' ORDER BY 1")
            assert [row[0] for row in rows] == content[0]  # type: ignore[index]


def test_chosen_operations_are_followed_and_others_are_not(source_db: str, sink_db: str) -> None:
    """Without truncate, the sink keeps its rows when the source is emptied, as with native replication."""
    with kit_of(source_db, sink_db, "insert,update,delete") as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY, v text)")
        kit.run("INSERT INTO a VALUES (1, 'x'), (2, 'x'), (3, 'x')")
        start_ts = kit.start()
        begin(kit.executor(), kit.spans(), start_ts)
        kit.run("UPDATE a SET v = 'y' WHERE id = 1")
        kit.run("DELETE FROM a WHERE id = 2")
        kit.wait_equal("a")
        kit.run("TRUNCATE a")
        kit.run("INSERT INTO a VALUES (4, 'z')")
        wait_until(lambda: kit.at_sink("SELECT id FROM a ORDER BY id") == [(1,), (3,), (4,)], "only the insert arrives")


def test_create_names_the_way_out_for_tables_without_a_key(kit: Kit) -> None:
    """Publishing their updates would break the source; `operations=insert` is offered, and works."""
    kit.run("CREATE TABLE keyless (v int)")
    kit.run("CREATE TABLE generated (id int, g int GENERATED ALWAYS AS (id * 2) STORED PRIMARY KEY)")
    kit.start()
    assert kit.source is not None
    reasons = {failure.reason.split()[1]: failure.reason for failure in kit.source.check()}
    assert set(reasons) == {"public.keyless", "public.generated"}
    assert all("operations=insert" in reason for reason in reasons.values())
    assert "generated column in its key" in reasons["public.generated"]
    options = {"operations": "insert"}
    source = make(
        SOURCES, kit.source_uri, SourceRequest(kit.changefeed, kit.source_uri, kit.sink_uri, ["public.*"], options=options)
    )
    assert source.check() == []
    source.close()


def test_keys_of_all_kinds_identify_rows(kit: Kit) -> None:
    """An index on several columns, FULL beside a key, and a key that includes more columns."""
    kit.run("CREATE TABLE by_index (a int NOT NULL, b text NOT NULL, v int, UNIQUE (b, a))")
    kit.run("ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_b_a_key")
    kit.run("CREATE TABLE full_with_key (id int PRIMARY KEY, v int)")
    kit.run("ALTER TABLE full_with_key REPLICA IDENTITY FULL")
    kit.run("CREATE TABLE covering (id int, v int, PRIMARY KEY (id) INCLUDE (v))")
    kit.run("INSERT INTO by_index SELECT i, 'b' || i, i FROM generate_series(1, 100) i")
    kit.run("INSERT INTO full_with_key SELECT i, i FROM generate_series(1, 100) i")
    kit.run("INSERT INTO covering SELECT i, i FROM generate_series(1, 100) i")
    start_ts = kit.start()
    begin(kit.executor(), kit.spans(), start_ts)
    for name, key in (("by_index", "a"), ("full_with_key", "id"), ("covering", "id")):
        kit.run(f"UPDATE {name} SET v = v + 1 WHERE {key} % 3 = 0")
        kit.run(f"UPDATE {name} SET {key} = {key} + 1000 WHERE {key} % 5 = 0")
        kit.run(f"DELETE FROM {name} WHERE {key} % 7 = 0")
    kit.wait_equal("by_index", "full_with_key", "covering")


def test_names_of_all_kinds_are_selected_and_replicated(source_db: str, sink_db: str) -> None:
    """Dots, quotes, spaces, upper case, wildcards and other scripts, each selected by a quoted pattern alone."""
    names = [
        ("my.schema", "t"),
        ("public", "Order"),
        ("public", 'say "x"'),
        ("größe", "Ä b"),
        ("public", "a*b"),
        ("public", "a,b"),
    ]

    def quote(*parts: str) -> str:
        return ".".join('"' + part.replace('"', '""') + '"' for part in parts)

    with Kit(source_db, sink_db, [quote(*name) for name in names]) as kit:
        kit.run('CREATE SCHEMA "my.schema"; CREATE SCHEMA "größe"; CREATE TABLE axb (id int PRIMARY KEY)')
        kit.run('CREATE TABLE public."order" (id int PRIMARY KEY)')
        for name in names:
            kit.run(f"CREATE TABLE {quote(*name)} (id int PRIMARY KEY)")
            kit.run(f"INSERT INTO {quote(*name)} VALUES (1)")
        start_ts = kit.start()
        spans = kit.spans()
        assert len(spans) == len(names)
        begin(kit.executor(), spans, start_ts)
        for name in names:
            kit.run(f"INSERT INTO {quote(*name)} VALUES (2)")
        kit.wait_equal(*(quote(*name) for name in names))


def test_what_cannot_be_replicated_is_named(kit: Kit) -> None:
    """A filter that matches only such relations is refused with the kind of each."""
    kit.run("CREATE TABLE base (id int PRIMARY KEY)")
    kit.run("CREATE VIEW a_view AS SELECT * FROM base")
    kit.run("CREATE MATERIALIZED VIEW b_view AS SELECT * FROM base")
    kit.run("CREATE UNLOGGED TABLE c_unlogged (id int PRIMARY KEY)")
    request = SourceRequest(kit.changefeed, kit.source_uri, kit.sink_uri, ["public.?_*"])
    source = make(SOURCES, kit.source_uri, request)
    (failure,) = source.check()
    assert failure.check == "tables"
    for text in ("a_view is a view", "b_view is a materialized view", "c_unlogged is an unlogged table"):
        assert text in failure.reason
    source.close()
    kit.start()
    assert kit.source is not None
    assert set(kit.source.tables().values()) == {"public.base"}
    kit.run("ALTER TABLE c_unlogged SET LOGGED")
    assert set(kit.source.tables().values()) == {"public.base", "public.c_unlogged"}


def test_the_scheme_postgres_is_accepted(source_db: str, sink_db: str) -> None:
    """Of source and sink, by every part: the URI means the same to libpq."""
    source_uri, sink_uri = (uri.replace("postgresql://", "postgres://") for uri in (source_db, sink_db))
    with Kit(source_uri, sink_uri) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        kit.run("INSERT INTO a VALUES (1)")
        source = make(SOURCES, source_uri, SourceRequest(kit.changefeed, source_uri, sink_uri, ["public.*"]))
        assert source.check() == []
        source.close()
        start_ts = kit.start()
        begin(kit.executor(), kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES (2)")
        kit.wait_equal("a")
        assert kit.source is not None
        kit.source.advance(kit.source.current_ts())


def test_generated_columns_do_not_break_the_source(kit: Kit) -> None:
    """PostgreSQL 18 refuses updates of a published table with REPLICA IDENTITY FULL and generated columns that are not sent."""
    kit.run("CREATE TABLE g (id int, v int GENERATED ALWAYS AS (id * 2) STORED)")
    kit.run("ALTER TABLE g REPLICA IDENTITY FULL")
    kit.start()
    assert kit.source is not None
    kit.source.tables()
    kit.run("INSERT INTO g VALUES (1)")
    kit.run("UPDATE g SET id = 2")
    with psycopg.connect(kit.source_uri) as connection:
        is_refused = connection.info.server_version >= 180000
    assert bool(kit.source.left_out()) is is_refused


@pytest.mark.parametrize("sink", ["", "CREATE TABLE nothing ()", "CREATE TABLE nothing (local int DEFAULT 7)"])
def test_a_table_without_columns_has_rows(kit: Kit, sink: str) -> None:
    """They are counted: copied, inserted, deleted and truncated, also after a column came and went."""
    kit.run("CREATE TABLE nothing (); ALTER TABLE nothing REPLICA IDENTITY FULL")
    kit.run("CREATE TABLE emptied (v int); ALTER TABLE emptied REPLICA IDENTITY FULL; INSERT INTO emptied VALUES (1), (2)")
    kit.run("ALTER TABLE emptied DROP COLUMN v")
    for _ in range(3):
        kit.run("INSERT INTO nothing DEFAULT VALUES")
    if sink:
        kit.at_sink(sink)
    start_ts = kit.start()
    begin(kit.executor(), kit.spans(), start_ts)

    def count(expected: int, name: str = "nothing") -> None:
        count = f"SELECT count(*) FROM {name}"
        assert kit.run(count) == [(expected,)]
        exists = f"SELECT to_regclass('public.{name}') IS NOT NULL"
        wait_until(lambda: kit.at_sink(exists) == [(True,)] and kit.at_sink(count) == [(expected,)], f"{expected} rows")

    count(3)
    count(2, "emptied")
    kit.run("INSERT INTO nothing DEFAULT VALUES")
    kit.run("INSERT INTO emptied DEFAULT VALUES")
    count(4)
    count(3, "emptied")
    kit.run("DELETE FROM nothing WHERE ctid = (SELECT min(ctid) FROM nothing)")
    count(3)
    kit.run("TRUNCATE nothing")
    count(0)


def test_generated_columns_are_replicated_where_the_source_can(source_db: str, sink_db: str) -> None:
    """PostgreSQL 18 sends their values into ordinary columns, also of a key and of whole old rows; earlier versions refuse."""
    with Kit(source_db, sink_db, options={"generated_columns": "stored"}) as kit:
        kit.run("CREATE TABLE keyed (id int, g int GENERATED ALWAYS AS (id * 2) STORED PRIMARY KEY, v text)")
        kit.run("CREATE TABLE whole (id int, g int GENERATED ALWAYS AS (id * 2) STORED, v text)")
        kit.run("ALTER TABLE whole REPLICA IDENTITY FULL")
        names = ("keyed", "whole")
        for name in names:
            kit.run(f"INSERT INTO {name} (id, v) VALUES (1, 'a'), (2, 'a'), (3, 'a')")
        source = make(SOURCES, source_db, SourceRequest(kit.changefeed, source_db, sink_db, ["public.*"], options=kit.options))
        failures = source.check()
        source.close()
        if kit.source_connection.info.server_version < 180000:
            assert any("requires PostgreSQL 18" in failure.reason for failure in failures)
            return
        assert failures == []
        start_ts = kit.start()
        begin(kit.executor(), kit.spans(), start_ts)
        kit.wait_equal(*names)
        for name in names:
            kit.run(f"INSERT INTO {name} (id, v) VALUES (4, 'b')")
            kit.run(f"UPDATE {name} SET id = 20 WHERE id = 2")
            kit.run(f"UPDATE {name} SET v = 'c' WHERE id = 1")
            kit.run(f"DELETE FROM {name} WHERE id = 3")
        kit.wait_equal(*names)


def test_rows_exchange_the_values_of_a_deferrable_key(kit: Kit) -> None:
    """The source checks it at the end of the transaction; the sink's key does too, and whole rows identify rows."""
    kit.run("CREATE TABLE d (id int PRIMARY KEY DEFERRABLE, v text); ALTER TABLE d REPLICA IDENTITY FULL")
    kit.run("INSERT INTO d VALUES (1, 'a'), (2, 'b'), (3, 'c')")
    start_ts = kit.start()
    begin(kit.executor(), kit.spans(), start_ts)
    kit.wait_equal("d")
    with kit.source_connection.transaction():
        kit.run("SET CONSTRAINTS ALL DEFERRED")
        kit.run("UPDATE d SET id = 2 WHERE v = 'a'")
        kit.run("UPDATE d SET id = 1 WHERE v = 'b'")
    kit.run("DELETE FROM d WHERE id = 3")
    kit.run("UPDATE d SET v = v || '!'")
    kit.wait_equal("d")
