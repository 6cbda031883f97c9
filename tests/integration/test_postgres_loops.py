"""Changefeeds in opposite directions: a change does not return to where it was made, and is not applied twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import psycopg
import pytest

from deploy.local.postgres import PostgresServer
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(kit: Kit) -> object:
    start_ts = kit.start()
    executor = kit.executor()
    begin(executor, kit.spans(), start_ts)
    return executor


def versions(*kits: Kit) -> list[object]:
    """Return the transaction that wrote each row of t at each source."""
    return [kit.run("SELECT id, xmin FROM t ORDER BY id") for kit in kits]


def settle(kit: Kit) -> None:
    target = current(kit)
    executor = kit.executors[-1]
    wait_until(lambda: min(checkpoint_of(executor, span) for span in kit.spans()) >= target, "every checkpoint")


def as_plain_role(server: PostgresServer, uri: str) -> str:
    """The same database for a role that may write and not use replication origins."""
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS plain")
        connection.execute("CREATE ROLE plain LOGIN REPLICATION")
        connection.execute(f"ALTER DATABASE {uri.rpartition('/')[2]} OWNER TO plain".encode())
        connection.execute("ALTER SCHEMA public OWNER TO plain")
    return uri.replace("postgres@", "plain@")


@pytest.mark.parametrize("rows", [1, 300], ids=["single", "bulk"])
def test_two_directions_do_not_loop(source_db: str, sink_db: str, stack: ExitStack, rows: int) -> None:
    """Rows that are inserted, updated, truncated and copied on either side arrive at the other side once."""
    there = stack.enter_context(Kit(source_db, sink_db, ["public.t"]))
    back = stack.enter_context(Kit(sink_db, source_db, ["public.t"], initial_snapshot=False))
    for kit in (there, back):
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
    there.run(f"INSERT INTO t SELECT n, 'copied' FROM generate_series(1, {rows}) n")
    start(there)
    there.wait_equal("t")
    start(back)
    there.run(f"INSERT INTO t SELECT n, 'there' FROM generate_series(1001, {1000 + rows}) n")
    back.run(f"INSERT INTO t SELECT n, 'back' FROM generate_series(2001, {2000 + rows}) n")
    there.run("UPDATE t SET v = 'updated' WHERE id < 2000")
    for kit in (there, back, there, back):
        settle(kit)
    there.wait_equal("t")
    back.run("UPDATE t SET v = 'again'")
    for kit in (back, there, back):
        settle(kit)
    there.wait_equal("t")
    there.run("INSERT INTO t VALUES (9999, 'last')")
    settle(there)
    there.wait_equal("t")
    before = versions(there, back)
    for kit in (back, there, back):
        settle(kit)
    assert versions(there, back) == before


def test_a_role_without_privileges_does_not_loop(
    source_db: str, sink_db: str, stack: ExitStack, postgres_server: PostgresServer
) -> None:
    """The mark needs no privilege: neither a superuser nor a replication origin."""
    there = stack.enter_context(Kit(source_db, as_plain_role(postgres_server, sink_db), ["public.t"]))
    there.run("CREATE TABLE t (id int PRIMARY KEY, v int)")
    there.run("INSERT INTO t VALUES (1, 0)")
    start(there)
    there.wait_equal("t")
    back = stack.enter_context(Kit(there.sink_uri, source_db, ["public.t"], initial_snapshot=False))
    start(back)
    there.run("UPDATE t SET v = 1")
    back.run("UPDATE t SET v = v + 1")
    for kit in (there, back, there, back):
        settle(kit)
    there.run("UPDATE t SET v = v + 10")
    for kit in (there, back, there, back):
        settle(kit)
    there.wait_equal("t")


def test_a_chain_passes_everything_on(
    source_db: str, sink_db: str, stack: ExitStack, new_postgres: object, postgres_server: PostgresServer
) -> None:
    """What a sink received is a change like any other for a changefeed to a third database."""
    third = postgres_server.create_database("third")
    try:
        first = stack.enter_context(Kit(source_db, sink_db, ["public.t"]))
        first.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        start(first)
        second = stack.enter_context(Kit(sink_db, third, ["public.t"]))
        start(second)
        first.run("INSERT INTO t SELECT n, 'first' FROM generate_series(1, 100) n")
        first.wait_equal("t")
        second.wait_equal("t")
        assert len(second.at_sink("TABLE t")) == 100
    finally:
        stack.close()
        postgres_server.drop_database("third")


def test_native_subscriptions_can_filter_by_origin(source_db: str, sink_db: str, stack: ExitStack) -> None:
    """Transactions at the sink carry a replication origin."""
    kit = stack.enter_context(Kit(source_db, sink_db, ["public.t"]))
    kit.run("CREATE TABLE t (id int PRIMARY KEY)")
    start(kit)
    kit.at_sink("SELECT pg_create_logical_replication_slot('peer', 'test_decoding')")
    kit.run("INSERT INTO t VALUES (1)")
    kit.wait_equal("t")
    everything = kit.at_sink("SELECT data FROM pg_logical_slot_peek_changes('peer', NULL, NULL) WHERE data LIKE '%public.t:%'")
    own = kit.at_sink(
        "SELECT data FROM pg_logical_slot_get_changes('peer', NULL, NULL, 'only-local', 'true') WHERE data LIKE '%public.t:%'"
    )
    kit.at_sink("SELECT pg_drop_replication_slot('peer')")
    assert len(everything) == 1
    assert own == []
