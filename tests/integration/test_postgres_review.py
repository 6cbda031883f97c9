"""What a review of the executor found, with real servers: tables that leave and come back, servers that hang."""

from __future__ import annotations

import pytest

from tablewire.errors import OperatingError
from tablewire.postgres import new_source
from tablewire.source import SourceRequest
from tablewire.types import Checkpoint
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, stop, wait_until

pytestmark = pytest.mark.integration


def list_tables(kit: Kit, *patterns: str) -> None:
    """What the owner does when the filter of the changefeed is updated to these patterns."""
    source = new_source(SourceRequest(kit.changefeed, kit.source_uri, kit.sink_uri, patterns, options=kit.options))
    source.tables()
    source.close()


def test_table_that_loses_its_key_for_a_while_stays_published(source_db: str, sink_db: str) -> None:
    """DROP and ADD of a primary key, with the owner looking in between: what is written meanwhile arrives."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE a (id int CONSTRAINT pk PRIMARY KEY, v int)")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES (1, 1)")
        kit.wait_equal("a")
        kit.run("ALTER TABLE a DROP CONSTRAINT pk")
        assert list(kit.spans()) == [kit.span("a")]
        kit.run("INSERT INTO a VALUES (2, 2)")
        kit.run("ALTER TABLE a ADD CONSTRAINT pk PRIMARY KEY (id)")
        kit.spans()
        kit.run("UPDATE a SET v = 3 WHERE id = 2")
        kit.wait_equal("a")


def test_table_without_a_key_is_not_published(source_db: str, sink_db: str) -> None:
    """Publishing it would make the source refuse updates."""
    with Kit(source_db, sink_db) as kit:
        kit.start()
        kit.run("CREATE TABLE a (id int)")
        kit.spans()
        kit.run("INSERT INTO a VALUES (1)")
        kit.run("UPDATE a SET id = 2")


def test_table_that_comes_back_is_copied_again(source_db: str, sink_db: str) -> None:
    """The filter leaves a table out and includes it again: what was written meanwhile arrives with a new copy."""
    with Kit(source_db, sink_db) as kit:
        for name in ("a", "b"):
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY, v int)")
        start_ts = kit.start()
        first = kit.executor()
        begin(first, kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES (1, 1)")
        kit.wait_equal("a", "b")
        stop(first, kit.span("a"))
        list_tables(kit, "public.b")
        kit.run("INSERT INTO a VALUES (2, 2)")
        kit.run("UPDATE a SET v = 5 WHERE id = 1")
        position = current(kit)
        kit.spans()
        begin(first, [kit.span("a")], position)
        kit.run("INSERT INTO a VALUES (3, 3)")
        kit.wait_equal("a", "b")
        stop(first, kit.span("a"))
        second = kit.executor("b", 2)
        begin(second, [kit.span("a")], position)
        kit.run("INSERT INTO a VALUES (4, 4)")
        kit.wait_equal("a")
        assert second._tables[kit.span("a")].snapshot_rows == 0  # the second takeover has nothing to copy
        target = current(kit)
        wait_until(lambda: checkpoint_of(second, kit.span("a")) >= target, "the checkpoint goes on")


def test_table_that_comes_back_without_first_copies_is_an_error(source_db: str, sink_db: str) -> None:
    """Nothing can bring what was missed: the table says so, and the others go on."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        for name in ("a", "b"):
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES (1)")
        kit.wait_equal("a", "b")
        stop(executor, kit.span("a"))
        list_tables(kit, "public.b")
        kit.run("INSERT INTO a VALUES (2)")
        kit.spans()
        with pytest.raises(OperatingError, match="outside of the changefeed's tables"):
            begin(executor, [kit.span("a")], current(kit))
        kit.run("INSERT INTO b VALUES (1)")
        kit.wait_equal("b")


def test_new_table_without_first_copies_begins_where_it_was_published(source_db: str, sink_db: str) -> None:
    """A table that is created later has nothing to miss, at its first and at its second takeover."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        kit.run("CREATE TABLE b (id int PRIMARY KEY)")
        start_ts = kit.start()
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        kit.spans()
        executor = kit.executor()
        for epoch in (1, 2):
            begin(executor, [kit.span("a")], start_ts)
            kit.run(f"INSERT INTO a VALUES ({epoch})")
            kit.wait_equal("a")
            stop(executor, kit.span("a"))


def test_running_table_that_left_the_publication_says_so(source_db: str, sink_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when it is back before anybody stopped it: its stream has missed changes."""
    monkeypatch.setattr("processor.postgres.executor.PUBLICATION_INTERVAL_S", 0.1)
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        kit.run("CREATE TABLE b (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("a")
        begin(executor, kit.spans(), start_ts)
        list_tables(kit, "public.b")
        kit.run("INSERT INTO a VALUES (1)")
        kit.spans()

        def has_failed() -> bool:
            try:
                executor.get_table_span_status(span, False)
            except OperatingError as error:
                return "left publication" in str(error)
            return False

        wait_until(has_failed, "the table says that it left the publication")
        stop(executor, span)
        executor.add_table_span(span, Checkpoint(start_ts, start_ts), True)
        begin(executor, [span], current(kit))
        kit.wait_equal("a")
