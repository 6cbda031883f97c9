"""What a review of the executor found, with real servers: tables that leave and come back, servers that hang."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg.pq import ExecStatus

from deploy.local.postgres import PostgresServer
from processor.postgres import PostgresExecutor
from processor.postgres.tables.life import BUSY
from tablewire.errors import OperatingError
from tablewire.model.progress import Checkpoint
from tablewire.model.spans import Span
from tablewire.postgres import new_source
from tablewire.runtime.shutdown import EXIT_BUG
from tablewire.source import SourceRequest
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, stop, wait_until

pytestmark = pytest.mark.integration
_numbers = itertools.count(1)


def list_tables(kit: Kit, *patterns: str) -> None:
    """What the owner does when the filter of the changefeed is updated to these patterns."""
    source = new_source(SourceRequest(kit.changefeed, kit.source_uri, kit.sink_uri, patterns, options=kit.options))
    source.tables()
    source.close()


@pytest.mark.parametrize(
    ("lose", "gain"),
    [
        ("ALTER TABLE a DROP CONSTRAINT pk", "ALTER TABLE a ADD CONSTRAINT pk PRIMARY KEY (id)"),
        ("ALTER TABLE a REPLICA IDENTITY NOTHING", "ALTER TABLE a REPLICA IDENTITY FULL"),
        (
            "CREATE UNIQUE INDEX i ON a (id); ALTER TABLE a REPLICA IDENTITY USING INDEX i; DROP INDEX i",
            "ALTER TABLE a REPLICA IDENTITY DEFAULT",
        ),
    ],
    ids=["primary key", "nothing", "index"],
)
def test_table_that_loses_its_key_is_not_published_any_more(source_db: str, sink_db: str, lose: str, gain: str) -> None:
    """The source takes updates and deletes of it again after the owner's next look; the table shows why it is stalled, and is
    copied again when it can be replicated again."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE a (id int CONSTRAINT pk PRIMARY KEY, v int)")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("a")
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES (1, 1), (2, 2)")
        kit.wait_equal("a")
        kit.run(lose)
        assert list(kit.spans()) == [span]
        kit.run("UPDATE a SET v = 5 WHERE id = 1")
        kit.run("DELETE FROM a WHERE id = 2")
        assert reason_of(executor, span, "left publication")
        stop(executor, span)
        executor.add_table_span(span, Checkpoint(start_ts, start_ts), True)
        assert "REPLICA IDENTITY" in reason_of(executor, span, "")
        stop(executor, span)
        kit.run(gain)
        kit.spans()
        begin(executor, [span], current(kit))
        kit.run("UPDATE a SET v = 6 WHERE id = 1")
        kit.wait_equal("a")


def reason_of(executor: PostgresExecutor, span: Span, part: str) -> str:
    """The table's error, once it has one that holds this part."""
    found: list[str] = []

    def has_failed() -> bool:
        try:
            executor.get_table_span_status(span, False)
        except OperatingError as error:
            found.append(str(error))
        return bool(found) and part in found[-1]

    wait_until(has_failed, f"the table's error: {part}")
    return found[-1]


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


def test_running_table_that_left_the_publication_says_so(source_db: str, sink_db: str) -> None:
    """Even when it is back before anybody stopped it: its stream has missed changes."""
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


@pytest.fixture
def other_server(server_folder: Path) -> Iterator[PostgresServer]:
    """A server that a test may stop for a while."""
    with PostgresServer(server_folder, name=f"hangs_{next(_numbers)}") as server:
        yield server


def assert_closes(executor: PostgresExecutor, server: PostgresServer) -> None:
    """close() returns soon although the server hangs; its sockets are still acknowledged by the kernel."""
    closer = threading.Thread(target=executor.close, daemon=True)
    try:
        closer.start()
        closer.join(15.0)
        assert not closer.is_alive(), "close() hangs"
    finally:
        server.resume()
        closer.join(30.0)


@pytest.mark.parametrize("moment", ["describing", "copying"])
def test_close_returns_while_the_source_hangs(other_server: PostgresServer, sink_db: str, moment: str) -> None:
    """The source is stopped while it is asked for the shape of a table, or while a table is copied out of it."""
    with Kit(other_server.create_database("hanging_source"), sink_db) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        kit.run("CREATE TABLE b (id int PRIMARY KEY, v text)")
        kit.run("INSERT INTO b SELECT g, repeat(md5(g::text), 300) FROM generate_series(1, 30000) g")
        start_ts = kit.start()
        executor = kit.executor()
        first, second = kit.span("a"), kit.span("b")
        begin(executor, [first], start_ts)
        if moment == "copying":
            begin(executor, [second], start_ts)
            wait_until(lambda: executor._tables[second].snapshot_rows, "the copy is under way")
            other_server.pause()
        else:
            other_server.pause()
            executor.add_table_span(second, Checkpoint(start_ts, start_ts), True)
            wait_until(lambda: executor._catalogue._connection._lock.locked(), "the catalogue is asked")
        assert_closes(executor, other_server)


def test_close_returns_while_the_sink_hangs(source_db: str, other_server: PostgresServer) -> None:
    """The sink is stopped while rows are written to it: not even a cancel request is answered."""
    with Kit(source_db, other_server.create_database("hanging_sink")) as kit:
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES (1)")
        kit.wait_equal("a")
        other_server.pause()
        kit.run("INSERT INTO a VALUES (2)")
        wait_until(lambda: executor._tables[kit.span("a")].life.state in BUSY, "a worker waits for the sink")
        assert_closes(executor, other_server)


def test_warning_of_skipped_changes_is_known_by_its_code(source_db: str, sink_db: str) -> None:
    """The text comes in the server's language (lc_messages), the code does not."""
    with Kit(source_db, sink_db) as kit:
        kit.start()
        connection = kit.executor()._connect_replication("test")
        try:
            warn = "DO $$ BEGIN RAISE WARNING 'X' USING ERRCODE = '%s'; END $$"
            connection._execute(warn % "01000", ExecStatus.COMMAND_OK)
            connection.raise_warnings()

            def meet() -> None:
                connection._execute(warn % "55000", ExecStatus.COMMAND_OK)
                connection.raise_warnings()

            with pytest.raises(OperatingError, match="cannot send all changes: X"):
                meet()
        finally:
            connection.close()


def test_tables_prepare_beside_a_long_backlog(source_db: str, sink_db: str) -> None:
    """The only catch-up stream serves a table that does not get on; another one is prepared all the same."""
    with Kit(source_db, sink_db, options={"catch_up_streams": "1"}) as kit:
        for name in ("a", "b", "c"):
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, [kit.span("c")], start_ts)
        kit.run("INSERT INTO a VALUES (1)")
        kit.run("INSERT INTO b VALUES (1)")
        kit.run("INSERT INTO c VALUES (1)")
        kit.wait_equal("c")  # the shared stream is behind the start of the others now
        with executor._catch_up_lock:
            executor._catch_ups.append(Endless())  # type: ignore[arg-type]
        try:
            begin(executor, [kit.span("a")], start_ts)
            kit.wait_equal("a")
        finally:
            with executor._catch_up_lock:
                executor._catch_ups[:] = [stream for stream in executor._catch_ups if not isinstance(stream, Endless)]


class Endless:
    """A catch-up stream that never gets through."""

    tables: tuple[()] = ()
    serves_preparing = False

    def release(self, table: object) -> None:
        return


def test_bug_in_a_thread_ends_the_process(source_db: str, sink_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that is fenced for good must not stay among those that are given tables."""
    codes: list[int] = []
    monkeypatch.setattr("processor.postgres.executor.end_process", codes.append)
    with Kit(source_db, sink_db) as kit:
        kit.start()
        executor = kit.executor()
        executor._crashed(RuntimeError("a bug"))
        assert codes == [EXIT_BUG]
        assert not executor.may_write()
