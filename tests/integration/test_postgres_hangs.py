"""Servers that hang without closing a connection: it is noticed within a bounded time, and becomes a retry or a clear error."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from deploy.local.postgres import PostgresServer
from processor.postgres.tables.life import BUSY
from tablewire.model.progress import Barrier, Checkpoint
from tablewire.postgres.connections import SourceUnavailableError
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, prepare, wait_until

pytestmark = pytest.mark.integration
AT_ONCE_S = 0.5
"""Far more than a call takes, far less than any wait for a server."""
WALSENDER = "SELECT pid FROM pg_stat_replication WHERE application_name = 'tablewire shared'"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader asks after 0.2 s of silence and waits 0.5 s for an answer."""
    monkeypatch.setattr("processor.postgres.source.replication.ASK_AFTER_S", 0.2)
    monkeypatch.setattr("processor.postgres.source.replication.ANSWER_MAX_S", 0.5)
    monkeypatch.setattr("processor.postgres.readers.stream.IDLE_WAIT_S", 0.1)


@pytest.mark.usefixtures("impatient")
def test_walsender_that_hangs_is_replaced(source_db: str, sink_db: str) -> None:
    """A stopped walsender closes nothing and acknowledges everything; the stream continues over another one."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        begin(executor, [span], start_ts)
        kit.run("INSERT INTO t VALUES (1)")
        kit.wait_equal("t")
        pid = int(str(kit.run(WALSENDER)[0][0]))
        os.kill(pid, signal.SIGSTOP)
        try:
            kit.run("INSERT INTO t VALUES (2)")
            kit.wait_equal("t")
        finally:
            os.kill(pid, signal.SIGCONT)
        target = current(kit)
        wait_until(lambda: checkpoint_of(executor, span) >= target, "the checkpoint goes on")


@pytest.mark.usefixtures("impatient")
def test_walsender_that_only_has_nothing_to_say_is_kept(source_db: str, sink_db: str) -> None:
    """An idle source answers when it is asked: its connection stays."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, [kit.span("t")], start_ts)
        kit.run("INSERT INTO t VALUES (1)")
        kit.wait_equal("t")
        before = kit.run(WALSENDER)
        (shared,) = executor._shared.running
        connection = shared._connection
        assert connection is not None
        for _ in range(3):
            heard_at = connection._heard_at
            wait_until(lambda heard_at=heard_at: connection._heard_at > heard_at, "the source is heard")  # type: ignore[misc]
        assert kit.run(WALSENDER) == before


@pytest.mark.usefixtures("impatient")
def test_source_that_hangs_as_a_whole_is_the_tables_error(new_postgres: Callable[..., PostgresServer], sink_db: str) -> None:
    """After error_after_ms the table says that the source does not answer; when the source is back, so is the table."""
    server = new_postgres()
    with Kit(server.create_database("hangs"), sink_db, options={"error_after_ms": "1000"}) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        begin(executor, [span], start_ts)
        server.pause()
        texts: list[str] = []

        def has_failed() -> bool:
            try:
                executor.get_table_span_status(span, False)
            except SourceUnavailableError as error:
                texts.append(str(error))
            return bool(texts)

        try:
            wait_until(has_failed, "the table's error")
        finally:
            server.resume()
        assert any(word in texts[0] for word in ("not answered", "timeout"))


def test_calls_of_the_agent_return_at_once_while_source_and_sink_hang(new_postgres: Callable[..., PostgresServer]) -> None:
    """One thread calls the executors of all changefeeds of a processor: none of them may wait for a server."""
    server = new_postgres()
    with Kit(server.create_database("source"), server.create_database("sink")) as kit:
        for name in ("a", "b", "c"):
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        written, prepared, new = (kit.span(name) for name in ("a", "b", "c"))
        begin(executor, [written], start_ts)
        prepare(executor, prepared, start_ts)
        kit.run("INSERT INTO a VALUES (1)")
        kit.wait_equal("a")
        checkpoint = Checkpoint(start_ts, start_ts)
        calls: list[Callable[[], object]] = [
            lambda: executor.add_table_span(new, checkpoint, True),
            lambda: executor.is_add_table_span_finished(new, True),
            lambda: executor.set_assignment_epoch(prepared, 1_000_000),
            lambda: executor.add_table_span(prepared, checkpoint, False),
            lambda: executor.is_add_table_span_finished(prepared, False),
            lambda: executor.set_assignment_epoch(written, 1_000_000),
            lambda: executor.set_barrier(Barrier(2**62)),
            lambda: executor.get_table_span_statuses([written, prepared, new]),
            lambda: executor.get_table_span_status(written, True),
            executor.meter,
            lambda: executor.remove_table_span(written),
            lambda: executor.is_remove_table_span_finished(written),
            executor.fence,
        ]
        server.pause()
        try:
            executor.add_table_span(new, checkpoint, True)
            executor.set_assignment_epoch(prepared, 999_999)
            executor.add_table_span(prepared, checkpoint, False)
            wait_until(lambda: executor._catalogue._connection._lock.locked(), "the source is asked")
            wait_until(lambda: executor._tables[prepared].life.state in BUSY, "the sink is asked")
            for call in calls:
                started = time.monotonic()
                call()
                assert time.monotonic() - started < AT_ONCE_S
        finally:
            server.resume()
