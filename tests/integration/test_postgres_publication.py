"""The publication: one bad table is one bad table, and what is changed by hand is undone and copied again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg
import pytest

from processor.postgres import PostgresExecutor
from tablewire.errors import OperatingError
from tablewire.model.spans import Span
from tablewire.postgres import new_source
from tablewire.postgres.publication import read_publication
from tablewire.postgres.source import PostgresSource
from tablewire.source import SourceRequest
from tests.processor.postgres.replication_kit import Kit, begin, prepare, promote, stop, wait_until

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
    with pytest.raises(OperatingError, match="owner changefeed resync"):
        kit.source.tables()


def publication_name(kit: Kit) -> str:
    return str(kit.run("SELECT pubname FROM pg_publication")[0][0])


def error_of(executor: PostgresExecutor, span: Span) -> str:
    try:
        executor.get_table_span_status(span, False)
    except OperatingError as error:
        return str(error)
    return ""


def again(kit: Kit, executor: PostgresExecutor, span: Span) -> int:
    """Remove a table that has failed and schedule it again, as the agent and the owner do; return its last checkpoint."""
    checkpoint_ts = stop(executor, span)
    assert kit.source is not None
    kit.source.tables()
    prepare(executor, span, checkpoint_ts)
    promote(executor, span, checkpoint_ts)
    return checkpoint_ts


BY_HAND = {
    "only inserts": "ALTER PUBLICATION {p} SET (publish = 'insert')",
    "by root": "ALTER PUBLICATION {p} SET (publish_via_partition_root = true)",
    "a row filter": "ALTER PUBLICATION {p} SET TABLE a WHERE (id > 100)",
    "a column list": "ALTER PUBLICATION {p} SET TABLE a (id)",
    "dropped": "ALTER PUBLICATION {p} DROP TABLE a",
}


@pytest.mark.parametrize("change", BY_HAND.values(), ids=BY_HAND)
@pytest.mark.parametrize("is_restored_by_hand", [False, True], ids=["by the owner", "by hand"])
def test_a_change_by_hand_is_undone_and_its_tables_are_copied_again(kit: Kit, change: str, is_restored_by_hand: bool) -> None:
    """What was missed is not known: the table fails, although its position at the sink may be past the change already."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY, v text)")
    kit.run("INSERT INTO a SELECT i, 'old' FROM generate_series(1, 20) i")
    start_ts = kit.start()
    executor, span = kit.executor(), kit.span("a")
    begin(executor, [span], start_ts)
    kit.wait_equal("a")
    name = publication_name(kit)
    kit.run(change.format(p=name))
    kit.run("INSERT INTO a VALUES (50, 'missed by some')")
    kit.run("UPDATE a SET v = 'missed' WHERE id <= 10")
    kit.run("DELETE FROM a WHERE id > 15 AND id < 50")
    missed_ts = int(str(kit.run("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")[0][0]))
    if is_restored_by_hand:
        kit.run(f"ALTER PUBLICATION {name} SET TABLE ONLY a")
        kit.run(
            f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate', publish_via_partition_root = false)"
        )
    else:
        assert kit.source is not None
        assert list(kit.source.tables().values()) == ["public.a"]
    kit.run("INSERT INTO a VALUES (200, 'after')")
    wait_until(lambda: error_of(executor, span), "the table shows an error")
    assert again(kit, executor, span) < missed_ts, "a position at which the sink is not right was confirmed"
    kit.wait_equal("a")
    kit.run("UPDATE a SET v = 'again'")
    kit.wait_equal("a")
    assert error_of(executor, span) == ""


def test_what_was_missed_by_a_changefeed_without_first_copies_is_an_error(source_db: str, sink_db: str) -> None:
    """It cannot be copied again; the way out in the text continues without what was missed."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor, span = kit.executor(), kit.span("a")
        begin(executor, [span], start_ts)
        kit.run("INSERT INTO a VALUES (1)")
        kit.wait_equal("a")
        kit.run(f"ALTER PUBLICATION {publication_name(kit)} SET (publish = 'insert')")
        kit.run("INSERT INTO a VALUES (2)")
        kit.run("DELETE FROM a WHERE id = 1")
        kit.run("INSERT INTO a VALUES (3)")
        wait_until(lambda: error_of(executor, span), "the table shows an error")
        checkpoint_ts = stop(executor, span)
        assert kit.source is not None
        kit.source.tables()
        prepare(executor, span, checkpoint_ts)
        with pytest.raises(OperatingError, match=r"remove its row in tablewire\.positions"):
            promote(executor, span, checkpoint_ts)
        stop(executor, span)
        kit.at_sink("DELETE FROM tablewire.positions")
        checkpoint_ts = kit.source.current_ts()
        prepare(executor, span, checkpoint_ts)
        promote(executor, span, checkpoint_ts)
        kit.run("INSERT INTO a VALUES (4)")
        wait_until(lambda: (4,) in kit.at_sink("SELECT id FROM a"), "it continues")


def test_a_replaced_publication_is_refused(kit: Kit) -> None:
    """One without Tablewire's comment may publish anything; the tables fail, and the owner names the way out."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY)")
    start_ts = kit.start()
    executor, span = kit.executor(), kit.span("a")
    begin(executor, [span], start_ts)
    name = publication_name(kit)
    kit.run(f"DROP PUBLICATION {name}; CREATE PUBLICATION {name} FOR ALL TABLES")
    kit.run("INSERT INTO a VALUES (1)")
    wait_until(lambda: error_of(executor, span), "the table shows an error")
    assert kit.source is not None
    with pytest.raises(OperatingError, match="Tablewire did not create it: drop or rename it"):
        kit.source.tables()
    kit.run(f"DROP PUBLICATION {name}")


def test_a_publication_of_an_earlier_version_is_adopted(kit: Kit) -> None:
    """Its comment does not name transactions: no table is copied again, and changes by hand are detected from then on."""
    kit.run("CREATE TABLE a (id int PRIMARY KEY)")
    kit.start()
    name = publication_name(kit)
    kit.run(f'COMMENT ON PUBLICATION {name} IS \'{{"tablewire": 1, "incarnation": 5, "created_lsn": "0/1"}}\'')
    assert kit.source is not None
    kit.source.tables()
    publication = read_publication(kit.source_connection, name)
    assert publication is not None
    assert (publication.incarnation, publication.changed_ts, publication.added) == (5, 0, {})
    kit.run(f"ALTER PUBLICATION {name} SET (publish = 'insert')")
    kit.source.tables()
    publication = read_publication(kit.source_connection, name)
    assert publication is not None
    assert publication.changed_ts > 0
    assert publication.flags["pubdelete"]


def test_other_options_change_the_publication_and_copy_the_tables_again(kit: Kit) -> None:
    """An operator has chosen more operations for a paused changefeed: what was not published before is not known."""
    kit.options = {"operations": "insert"}
    kit.run("CREATE TABLE a (id int PRIMARY KEY, v text)")
    kit.run("INSERT INTO a VALUES (1, 'a'), (2, 'a')")
    start_ts = kit.start()
    executor, span = kit.executor(), kit.span("a")
    begin(executor, [span], start_ts)
    kit.wait_equal("a")
    kit.run("UPDATE a SET v = 'b' WHERE id = 1")
    checkpoint_ts = stop(executor, span)
    executor.close()
    kit.options = {}
    source = source_of(kit)
    assert list(source.tables().values()) == ["public.a"]
    source.close()
    begin(kit.executor("b"), [span], checkpoint_ts)
    kit.wait_equal("a")
    kit.run("DELETE FROM a WHERE id = 2")
    kit.wait_equal("a")
