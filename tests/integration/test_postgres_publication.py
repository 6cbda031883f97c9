"""The publication: one bad table is one bad table, and what is changed by hand is undone and copied again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg
import pytest

from tablewire.errors import OperatingError
from tablewire.postgres import new_source
from tablewire.postgres.publication import read_publication
from tablewire.postgres.source import PostgresSource
from tablewire.source import SourceRequest
from tests.processor.postgres.replication_kit import Kit, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def kit(source_db: str, sink_db: str) -> Iterator[Kit]:
    with Kit(source_db, sink_db) as kit:
        yield kit


@pytest.fixture
def role(kit: Kit) -> Iterator[str]:
    """A role that replicates and owns the schema's tables `a` and `b`, but no others."""
    name = "weak_" + kit.source_uri.rpartition("/")[2]
    kit.run(f"CREATE ROLE {name} LOGIN REPLICATION")
    kit.run(f"GRANT ALL ON DATABASE {kit.source_uri.rpartition('/')[2]} TO {name}; GRANT ALL ON SCHEMA public TO {name}")
    yield name
    kit.run(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def source_of(kit: Kit, role: str = "postgres", tables: Sequence[str] = ("public.*",)) -> PostgresSource:
    uri = kit.source_uri.replace("postgres@", f"{role}@")
    source = new_source(SourceRequest(kit.changefeed, uri, kit.sink_uri, tables, options=kit.options))
    assert isinstance(source, PostgresSource)
    return source


def published(kit: Kit) -> set[str]:
    return {str(row[0]) for row in kit.run("SELECT tablename FROM pg_publication_tables")}


def test_a_table_of_another_role_is_left_out_alone(kit: Kit, role: str) -> None:
    """Others are added, the listing names it with a way out, and following that adds it."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY)")
    kit.run(f"ALTER TABLE a OWNER TO {role}")
    source = source_of(kit, role)
    source.start()
    kit.run("CREATE TABLE m_foreign (id int PRIMARY KEY)")
    kit.run("CREATE TABLE z (id int PRIMARY KEY)")
    kit.run(f"ALTER TABLE z OWNER TO {role}")
    assert set(source.tables().values()) == {"public.a", "public.z"}
    assert published(kit) == {"a", "z"}
    (reason,) = source.left_out()
    assert "public.m_foreign" in reason
    assert "owner" in reason
    source.advance(source.current_ts())
    kit.run(f"ALTER TABLE m_foreign OWNER TO {role}")
    wait_until(lambda: "public.m_foreign" in source.tables().values(), "it is added")
    assert source.left_out() == []
    source.drop()
    source.close()


def test_a_locked_table_is_left_out_until_the_lock_is_released(kit: Kit, source_db: str) -> None:
    """It is named with the process that holds the lock; the others are added at once."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY)")
    source = source_of(kit)
    source.start()
    kit.run("CREATE TABLE b (id int PRIMARY KEY)")
    kit.run("CREATE TABLE c (id int PRIMARY KEY)")
    with psycopg.connect(source_db) as holder:
        holder.execute("LOCK TABLE b IN ACCESS EXCLUSIVE MODE")
        assert set(source.tables().values()) == {"public.a", "public.c"}
        (reason,) = source.left_out()
        assert "public.b" in reason
        assert str(holder.info.backend_pid) in reason
        source.advance(source.current_ts())
    # Releasing a lock writes no WAL, so the listing must not rely on that.
    wait_until(lambda: "public.b" in source.tables().values(), "it is added")
    source.drop()
    source.close()


def test_a_table_without_a_key_is_left_out_until_it_has_one(kit: Kit) -> None:
    """It appears later and was never replicated, so it is not scheduled and holds nothing."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY)")
    kit.start()
    assert kit.source is not None
    kit.run("CREATE TABLE keyless (v int)")
    assert set(kit.source.tables().values()) == {"public.a"}
    assert "public.keyless" in kit.source.left_out()[0]
    kit.run("ALTER TABLE keyless REPLICA IDENTITY FULL")
    assert set(kit.source.tables().values()) == {"public.a", "public.keyless"}


def test_a_replicated_table_that_loses_its_key_stays_listed(kit: Kit) -> None:
    """Its changes are missed from then on, so it must hold the checkpoint; a new owner knows that too."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY)")
    kit.run("CREATE TABLE b (id int PRIMARY KEY)")
    kit.start()
    assert kit.source is not None
    kit.source.tables()
    kit.run("ALTER TABLE b DROP CONSTRAINT b_pkey")
    for source in (kit.source, source_of(kit)):
        assert set(source.tables().values()) == {"public.a", "public.b"}
        assert published(kit) == {"a"}
        assert source.left_out() == []
    kit.run("UPDATE b SET id = 2")
    kit.run("ALTER TABLE b ADD PRIMARY KEY (id)")
    assert set(kit.source.tables().values()) == {"public.a", "public.b"}
    assert published(kit) == {"a", "b"}
    publication = read_publication(kit.source_connection, str(kit.run("SELECT pubname FROM pg_publication")[0][0]))
    assert publication is not None
    assert publication.withdrawn == frozenset()


def test_a_dropped_publication_is_an_error_with_a_way_out(kit: Kit) -> None:
    """The owner does not re-create it, since it is not known which changes it has missed."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY)")
    kit.start()
    assert kit.source is not None
    kit.run("DROP PUBLICATION " + str(kit.run("SELECT pubname FROM pg_publication")[0][0]))
    with pytest.raises(OperatingError, match="remove the changefeed and create it again"):
        kit.source.tables()
