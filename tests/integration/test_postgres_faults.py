"""What goes wrong around the executor: slow and blocked tables, broken connections, paused writers, crashes in the middle."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psycopg
import pytest

from deploy.local.postgres import PostgresServer
from processor.postgres import PostgresExecutor
from processor.postgres.sinks.postgres_sink import PostgresTransaction
from processor.postgres.source.pgoutput import Part
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.model.progress import Barrier, TableBarrier
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tests.processor.postgres.replication_kit import (
    Kit,
    begin,
    checkpoint_of,
    current,
    prepare,
    promote,
    stop,
    wait_until,
)

pytestmark = pytest.mark.integration

SMALL_QUEUES = {"queue_max_bytes": "65536", "queues_max_bytes": "2000000"}


@contextmanager
def load(kit: Kit, *names: str, pause_s: float = 0.002) -> Iterator[Callable[[], int]]:
    """Inserts, updates and deletes in these tables (id identity, v text) until the end; gives the number of rounds."""
    done = threading.Event()
    count = 0

    def run() -> None:
        nonlocal count
        with psycopg.connect(kit.source_uri, autocommit=True) as connection:
            while not done.is_set():
                for name in names:
                    connection.execute(f"INSERT INTO {name} (v) SELECT repeat('x', 50) FROM generate_series(1, 20)".encode())
                    connection.execute(f"UPDATE {name} SET v = 'u{count}' WHERE id % 50 = {count % 50}".encode())
                    connection.execute(f"DELETE FROM {name} WHERE id % 97 = {count % 97}".encode())
                    count += 1
                done.wait(pause_s)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lambda: count
    finally:
        done.set()
        thread.join()


def create(kit: Kit, *names: str) -> None:
    for name in names:
        kit.run(f"CREATE TABLE {name} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)")


def lag(kit: Kit, executor: PostgresExecutor, span: Span) -> Ts:
    return current(kit) - checkpoint_of(executor, span)


def test_held_prepared_table_stops_nobody(source_db: str, sink_db: str) -> None:
    """A table that is prepared and never promoted overflows its queue; the others' lag does not grow; then it catches up."""
    with Kit(source_db, sink_db, options=SMALL_QUEUES) as kit:
        create(kit, "held", "other")
        start_ts = kit.start()
        executor = kit.executor()
        held, other = kit.span("held"), kit.span("other")
        prepare(executor, held, start_ts)
        begin(executor, [other], start_ts)
        with load(kit, "held", "other") as count:
            wait_until(lambda: count() > 200, "load")
            for _ in range(5):
                target, before = current(kit), count()
                wait_until(lambda target=target: checkpoint_of(executor, other) >= target, "other follows", 10.0)  # type: ignore[misc]
                wait_until(lambda before=before: count() > before + 40, "more load")  # type: ignore[misc]
            assert executor._tables[held].queue.overflows > 0
            assert executor.get_table_span_status(held, False).state is TableState.PREPARED
            promote(executor, held, start_ts)
            wait_until(lambda: count() > 500, "load while it catches up")
        kit.wait_equal("held", "other")
        wait_until(lambda: executor._tables[held].queue.is_joined, "it has joined the shared stream")


def test_barrier_holds_one_table_and_not_the_others(source_db: str, sink_db: str) -> None:
    """Nothing is written past a table's barrier; when it is lifted the table catches up, although its queue had overflowed."""
    with Kit(source_db, sink_db, options=SMALL_QUEUES) as kit:
        create(kit, "held", "other")
        start_ts = kit.start()
        executor = kit.executor()
        held, other = kit.span("held"), kit.span("other")
        begin(executor, [held, other], start_ts)
        kit.run("INSERT INTO held (v) VALUES ('before')")
        kit.wait_equal("held")
        barrier_ts = current(kit)
        executor.set_barrier(Barrier(2**63, (TableBarrier(held.table_id, barrier_ts),)))
        with load(kit, "held", "other") as count:
            wait_until(lambda: count() > 200, "load")
            target = current(kit)
            wait_until(lambda: checkpoint_of(executor, other) >= target, "other follows")
            assert checkpoint_of(executor, held) <= barrier_ts
            assert kit.at_sink("SELECT v FROM held") == [("before",)]
            executor.set_barrier(Barrier(2**63))
            wait_until(lambda: checkpoint_of(executor, held) >= target, "held follows again")
        kit.wait_equal("held", "other")
        stopped_at = current(kit)
        executor.set_barrier(Barrier(stopped_at))
        kit.run("INSERT INTO other (v) VALUES ('past the global barrier')")
        wait_until(lambda: executor.meter().read_ts > stopped_at, "it was received")
        wait_until(lambda: checkpoint_of(executor, other) == stopped_at, "the checkpoint stops at the barrier")
        assert not kit.matches("other")


def test_large_transaction_that_ends_behind_the_barrier_is_not_held_open(source_db: str, sink_db: str) -> None:
    """The barrier lies inside the commit record of a transaction that came in pieces: what was begun is rolled back, and no
    worker touches it until the barrier is lifted."""
    with Kit(source_db, sink_db, options=SMALL_QUEUES) as kit:
        create(kit, "t")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        begin(executor, [span], start_ts)
        kit.run("INSERT INTO t (v) VALUES ('before')")
        kit.wait_equal("t")
        executor.set_barrier(Barrier(current(kit)))
        kit.run("INSERT INTO t (v) SELECT repeat('x', 200) FROM generate_series(1, 20000)")
        end_ts = current(kit)
        begun: list[int] = []
        apply = PostgresTransaction.apply

        def counting(self: PostgresTransaction, parts: Sequence[Part], is_last: bool) -> int:
            begun.append(len(parts))
            return apply(self, parts, is_last)

        PostgresTransaction.apply = counting  # type: ignore[method-assign]
        try:
            executor.set_barrier(Barrier(end_ts - 1))
            wait_until(lambda: begun, "its beginning is applied")
            open_ones = "SELECT FROM pg_stat_activity WHERE application_name = 'tablewire capture-a' AND xact_start IS NOT NULL"
            wait_until(lambda: not kit.at_sink(open_ones) and not executor._catch_ups, "nothing is held open", 10.0)
            takes = len(begun)
            kit.run("CREATE TABLE other (id int)")
            target = current(kit)
            wait_until(lambda: executor.meter().read_ts >= target, "the stream goes on")
            assert len(begun) == takes
            assert kit.at_sink("SELECT count(*) FROM t") == [(1,)]
            assert checkpoint_of(executor, span) < end_ts
        finally:
            PostgresTransaction.apply = apply  # type: ignore[method-assign]
        executor.set_barrier(Barrier(2**63))
        kit.wait_equal("t")


def test_table_that_is_locked_at_the_sink_stops_nobody(source_db: str, sink_db: str) -> None:
    """While one table cannot be written, the others go on; afterwards it is read again, and equal."""
    with Kit(source_db, sink_db, options=SMALL_QUEUES) as kit:
        create(kit, "held", "other")
        start_ts = kit.start()
        executor = kit.executor()
        held, other = kit.span("held"), kit.span("other")
        begin(executor, [held, other], start_ts)
        kit.run("INSERT INTO held (v) VALUES ('before')")
        kit.run("INSERT INTO other (v) VALUES ('before')")
        kit.wait_equal("held", "other")  # both copies are done: a new slot would wait for the blocker on this very server
        with psycopg.connect(sink_db) as blocker, load(kit, "held", "other") as count:
            blocker.execute("LOCK TABLE held IN ACCESS EXCLUSIVE MODE")
            wait_until(lambda: count() > 100, "load")
            for _ in range(5):
                target, before = current(kit), count()
                wait_until(lambda target=target: checkpoint_of(executor, other) >= target, "other follows", 10.0)  # type: ignore[misc]
                wait_until(lambda before=before: count() > before + 40, "more load")  # type: ignore[misc]
            blocker.rollback()
        kit.wait_equal("held", "other")


@pytest.mark.parametrize("rows", [3_000, 60_000])
def test_transaction_larger_than_the_queue(source_db: str, sink_db: str, rows: int) -> None:
    """One transaction of many times the queue is applied whole, in bounded memory, beside small ones of other tables."""
    with Kit(source_db, sink_db, options=SMALL_QUEUES) as kit:
        create(kit, "big", "small")
        start_ts = kit.start()
        executor = kit.executor()
        big = kit.span("big")
        begin(executor, [big, kit.span("small")], start_ts)
        kit.run("INSERT INTO small (v) VALUES ('a')")
        kit.run(f"INSERT INTO big (v) SELECT repeat('x', 200) FROM generate_series(1, {rows})")
        kit.run("INSERT INTO small (v) VALUES ('b')")
        kit.wait_equal("small")
        kit.run("UPDATE big SET v = 'y' || id")
        kit.run("DELETE FROM big WHERE id % 2 = 0")
        kit.run("INSERT INTO small (v) VALUES ('c')")
        kit.wait_equal("big", "small", deadline_s=40)
        target = current(kit)
        wait_until(lambda: checkpoint_of(executor, big) >= target, "the checkpoint passes it")


def test_broken_connections_lose_and_double_nothing(source_db: str, sink_db: str) -> None:
    """Walsenders and sink backends are ended again and again under load; every row is there exactly once."""
    with Kit(source_db, sink_db) as kit:
        create(kit, "t", "u")
        kit.run("CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY, v text)")
        kit.run("ALTER TABLE log REPLICA IDENTITY FULL")
        start_ts = kit.start()
        executor = kit.executor()
        spans = [kit.span(name) for name in ("t", "u", "log")]
        begin(executor, spans, start_ts)
        with load(kit, "t", "u") as count:
            for turn in range(12):
                before = count()
                kit.run("INSERT INTO log (v) SELECT 'x' FROM generate_series(1, 10)")
                kind = "tablewire shared" if turn % 2 else "tablewire capture-a"
                kit.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{kind}'")
                wait_until(lambda before=before: count() > before + 10, "more load")  # type: ignore[misc]
        kit.wait_equal("t", "u", "log")
        for span in spans:
            assert executor.get_table_span_status(span, True).state is TableState.REPLICATING


def test_source_that_restarts_is_followed_again(new_postgres: Callable[..., PostgresServer], sink_db: str) -> None:
    """A crash of the source costs a reconnect; temporary slots are made again from the changefeed's own."""
    server = new_postgres()
    with Kit(server.uri(), sink_db) as kit:
        create(kit, "t")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        begin(executor, [span], start_ts)
        kit.run("INSERT INTO t (v) SELECT 'a' FROM generate_series(1, 100)")
        kit.wait_equal("t")
        server.kill()
        server.start()
        kit.source_connection = kit._stack.enter_context(psycopg.connect(server.uri(), autocommit=True))
        kit.run("INSERT INTO t (v) SELECT 'b' FROM generate_series(1, 100)")
        kit.wait_equal("t")
        assert executor.get_table_span_status(span, False).state is TableState.REPLICATING


def test_crash_inside_a_first_copy_leaves_nothing(source_db: str, sink_db: str) -> None:
    """A copy whose backend dies, and one whose table is taken away, start again; at no time is a part of it visible."""
    with Kit(source_db, sink_db) as kit:
        create(kit, "t")
        kit.run("INSERT INTO t (v) SELECT repeat('x', 100) FROM generate_series(1, 20000)")
        start_ts = kit.start()
        span = kit.span("t")
        at_commit, go_on = threading.Semaphore(0), threading.Semaphore(0)

        def may_write() -> bool:
            table = first._tables.get(span)
            if table is not None and table.snapshot_rows:
                at_commit.release()
                go_on.acquire(timeout=30)
            return True

        first = kit.executor("a", may_write=may_write)
        begin(first, [span], start_ts)
        assert at_commit.acquire(timeout=30)
        status = first.get_table_span_status(span, True)
        assert status.stats is not None
        assert "snapshot" in status.stats.stage_checkpoints
        assert status.checkpoint.checkpoint_ts == start_ts
        kit.at_sink("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tablewire capture-a'")
        go_on.release()
        assert at_commit.acquire(timeout=30)  # the second attempt, complete but not committed
        assert kit.at_sink("SELECT count(*) FROM t") == [(0,)]
        kit.run("UPDATE t SET v = 'changed' WHERE id <= 100")
        kit.at_sink("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tablewire capture-a'")
        first.remove_table_span(span)
        go_on.release()
        assert stop(first, span) == start_ts
        assert kit.at_sink("SELECT count(*) FROM t") == [(0,)]
        second = kit.executor("b")
        begin(second, [span], start_ts)
        kit.run("DELETE FROM t WHERE id <= 50")
        kit.wait_equal("t")
        assert kit.at_sink("SELECT snapshot FROM tablewire.positions") == [("done",)]


def test_scenario_12_writer_paused_inside_a_transaction(source_db: str, sink_db: str) -> None:
    """A writer that stands still inside its transaction, holding the position's lock, is put out of the way by the takeover."""
    with Kit(source_db, sink_db) as kit:
        create(kit, "t")
        start_ts = kit.start()
        old, new = kit.executor("a"), kit.executor("b")
        span = kit.span("t")
        begin(old, [span], start_ts)
        kit.run("INSERT INTO t (v) VALUES ('a')")
        kit.wait_equal("t")
        prepare(new, span, checkpoint_of(old, span))
        paused, resumed = threading.Event(), threading.Event()
        old_may_write = old._request.may_write

        def pause() -> bool:
            paused.set()
            resumed.wait(20)
            return old_may_write()

        object.__setattr__(old._request, "may_write", pause)
        kit.run("INSERT INTO t (v) VALUES ('b')")
        assert paused.wait(10)
        started = time.monotonic()
        promote(new, span, start_ts)
        assert time.monotonic() - started < 2.0
        resumed.set()
        kit.run("INSERT INTO t (v) VALUES ('c')")
        kit.wait_equal("t")
        with pytest.raises(OperatingError):
            wait_until(lambda: old.get_table_span_status(span, False) is None, "the old writer is refused")
        kit.wait_equal("t")


def test_nothing_is_written_while_the_lease_is_in_doubt(source_db: str, sink_db: str) -> None:
    """may_write = no holds every commit back, without an error; yes lets it go on; fence() is for good."""
    with Kit(source_db, sink_db) as kit:
        create(kit, "t")
        start_ts = kit.start()
        allowed = True
        executor = kit.executor(may_write=lambda: allowed)
        span = kit.span("t")
        begin(executor, [span], start_ts)
        kit.run("INSERT INTO t (v) VALUES ('a')")
        kit.wait_equal("t")
        allowed = False
        kit.run("INSERT INTO t (v) VALUES ('b')")
        target = current(kit)
        wait_until(lambda: executor.meter().read_ts >= target, "it was received")
        assert checkpoint_of(executor, span) < target
        assert not kit.matches("t")
        allowed = True
        kit.wait_equal("t")
        executor.fence()
        kit.run("INSERT INTO t (v) VALUES ('c')")
        target = current(kit)
        wait_until(lambda: executor.meter().read_ts >= target, "it was received")
        assert not kit.matches("t")
        executor.close()
        assert not kit.matches("t")


def test_close_under_load_ends_all_writes(source_db: str, sink_db: str) -> None:
    """When close returns, nothing of this executor remains at the source or the sink."""
    with Kit(source_db, sink_db) as kit:
        create(kit, "t", "u")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, [kit.span("t"), kit.span("u")], start_ts)
        with load(kit, "t", "u") as count:
            wait_until(lambda: count() > 50, "load")
            executor.close()
            content = kit.sink_content("t"), kit.sink_content("u")
            before = count()
            wait_until(lambda: count() > before + 20, "more load")
            assert content == (kit.sink_content("t"), kit.sink_content("u"))
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tablewire%'"
            " AND application_name <> 'tablewire owner' AND datname = current_database()"
        )
        wait_until(lambda: kit.run(query) == [(0,)] and kit.at_sink(query) == [(0,)], "its connections are gone")


def test_moves_at_random_under_load(source_db: str, sink_db: str) -> None:
    """Three executors pass six tables around under load, with planned moves and with sudden ends; every row is there once."""
    rng = random.Random(7)
    names = [f"t{number}" for number in range(5)]
    with Kit(source_db, sink_db) as kit:
        create(kit, *names)
        kit.run("CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY, v text)")
        kit.run("ALTER TABLE log REPLICA IDENTITY FULL")
        start_ts = kit.start()
        executors = [kit.executor(f"n{number}") for number in range(3)]
        spans = [kit.span(name) for name in [*names, "log"]]
        where: dict[Span, PostgresExecutor] = {}
        for span in spans:
            where[span] = executors[0]
        begin(executors[0], spans, start_ts)
        with load(kit, *names):
            for turn in range(25):
                kit.run("INSERT INTO log (v) SELECT 'x' FROM generate_series(1, 3)")
                if turn % 8 == 7:
                    victim = rng.randrange(len(executors))
                    last = {s: checkpoint_of(where[s], s) for s in spans if where[s] is executors[victim]}
                    if turn % 16 == 7:
                        executors[victim].close()
                    executors[victim] = kit.executor(f"r{turn}")
                    begin(executors[victim], list(last), min(last.values(), default=start_ts))
                    where.update(dict.fromkeys(last, executors[victim]))
                    continue
                span = rng.choice(spans)
                target = rng.choice([executor for executor in executors if executor is not where[span]])
                if target._tables.get(span) is not None:
                    continue
                prepare(target, span, checkpoint_of(where[span], span))
                promote(target, span, stop(where[span], span))
                where[span] = target
        kit.wait_equal(*names, "log", deadline_s=40)
        goal = current(kit)
        for span in spans:
            wait_until(lambda span=span: checkpoint_of(where[span], span) >= goal, "every checkpoint follows")  # type: ignore[misc]


def test_rows_that_are_there_already_become_upserts(source_db: str, sink_db: str) -> None:
    """Without a first copy the sink may hold rows of old: a COPY that meets one is done again as an upsert."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink("INSERT INTO t SELECT i, 'old' FROM generate_series(50, 60) i")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t")], start_ts)
        kit.run("INSERT INTO t SELECT i, 'new' FROM generate_series(1, 200) i")
        kit.wait_equal("t")
        kit.run("INSERT INTO t SELECT i, 'new' FROM generate_series(201, 400) i")
        kit.wait_equal("t")


def test_sink_that_restarts_is_written_again(source_db: str, new_postgres: Callable[..., PostgresServer]) -> None:
    """A crash of the sink costs retries; every row is there exactly once afterwards."""
    server = new_postgres()
    with Kit(source_db, server.uri()) as kit:
        create(kit, "t")
        kit.run("CREATE TABLE log (v int)")
        kit.run("ALTER TABLE log REPLICA IDENTITY FULL")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("log")
        begin(executor, [kit.span("t"), span], start_ts)
        kit.run("INSERT INTO log VALUES (1)")
        kit.wait_equal("log")
        with load(kit, "t") as count:
            wait_until(lambda: count() > 30, "load")
            server.kill()
            kit.run("INSERT INTO log SELECT generate_series(2, 100)")
            before = count()
            wait_until(lambda: count() > before + 30, "more load")
            server.start()
        kit.sink_connection = kit._stack.enter_context(psycopg.connect(server.uri(), autocommit=True))
        kit.wait_equal("log", "t")
        assert executor.get_table_span_status(span, False).state is TableState.REPLICATING


def test_lost_publication_is_an_error_and_not_a_silence(source_db: str, sink_db: str) -> None:
    """Without its publication the source cannot give all changes: the tables fail with the reason, old and new ones."""
    with Kit(source_db, sink_db, options={"error_after_ms": "1000"}) as kit:
        create(kit, "t", "u")
        start_ts = kit.start()
        executor = kit.executor()
        span, late = kit.span("t"), kit.span("u")
        begin(executor, [span], start_ts)
        assert kit.source is not None
        kit.run(f'DROP PUBLICATION "{kit.source._name}"')
        kit.run("INSERT INTO t (v) VALUES ('lost')")
        kit.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tablewire shared'")
        kit.run("INSERT INTO t (v) VALUES ('lost')")
        with pytest.raises(OperatingError, match="publication"):
            wait_until(lambda: executor.get_table_span_status(span, False) is None, "the error shows")
        with pytest.raises(OperatingError, match="publication"):
            prepare(executor, late, start_ts)


def test_unreachable_source_is_the_tables_error_after_a_while(sink_db: str, new_postgres: Callable[..., PostgresServer]) -> None:
    """Retried quietly at first, then an error that names the server and holds no password; later it works again."""
    server = new_postgres()
    with Kit(server.uri().replace("postgres@", "postgres:s3cret@"), sink_db, options={"error_after_ms": "500"}) as kit:
        create(kit, "t", "u")
        start_ts = kit.start()
        executor = kit.executor()
        span, late = kit.span("t"), kit.span("u")
        begin(executor, [span], start_ts)
        kit.wait_equal("t")
        server.kill()
        with pytest.raises(OperatingError) as caught:
            wait_until(lambda: executor.get_table_span_status(span, False) is None, "the error shows")
        assert "s3cret" not in str(caught.value)
        with pytest.raises(OperatingError) as caught:
            prepare(executor, late, start_ts)
        assert "s3cret" not in str(caught.value)
        stopped = [stop(executor, span), stop(executor, late)]
        server.start()
        kit.source_connection = kit._stack.enter_context(psycopg.connect(kit.source_uri, autocommit=True))
        kit.run("INSERT INTO t (v) VALUES ('again')")
        for each, checkpoint_ts in zip((span, late), stopped, strict=True):
            prepare(executor, each, checkpoint_ts)
            promote(executor, each, checkpoint_ts)
        kit.wait_equal("t", "u")


def test_many_tables_share_few_connections(source_db: str, sink_db: str) -> None:
    """A hundred tables, first copies and changes, with the default number of sink connections and one walsender."""
    with Kit(source_db, sink_db) as kit:
        names = [f"m{number}" for number in range(100)]
        create(kit, *names)
        for name in names:
            kit.run(f"INSERT INTO {name} (v) SELECT 'a' FROM generate_series(1, 20)")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span(name) for name in names], start_ts)
        for name in names:
            kit.run(f"INSERT INTO {name} (v) SELECT 'b' FROM generate_series(1, 70)")
        kit.wait_equal(*names)
        mine = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'tablewire capture%'"
        )
        assert int(str(kit.at_sink(mine)[0][0])) <= 5


def test_scenario_12_stopped_process_is_replaced_and_changes_nothing_when_it_wakes(source_db: str, sink_db: str) -> None:
    """SIGSTOP of a real writer under load, takeover within two seconds, SIGCONT: every row once; again with SIGKILL."""
    with Kit(source_db, sink_db) as kit:
        create(kit, "t", "u")
        kit.run("CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY, v text)")
        kit.run("ALTER TABLE log REPLICA IDENTITY FULL")
        start_ts = kit.start()
        spans = [kit.span(name) for name in ("t", "u", "log")]
        for turn, stop_signal in enumerate((signal.SIGSTOP, signal.SIGKILL)):
            given = {
                "source_uri": source_db,
                "sink_uri": sink_db,
                "namespace": kit.changefeed.namespace,
                "id": kit.changefeed.id,
                "start_ts": start_ts,
                "epoch": 100 + 10 * turn,
                "table_ids": [span.table_id for span in spans],
            }
            command = [sys.executable, "-m", "tests.processor.postgres.writer_process", json.dumps(given)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "writing\n"
                with load(kit, "t", "u") as count:
                    before = count()
                    wait_until(lambda before=before: count() > before + 30, "load")  # type: ignore[misc]
                    kit.run("INSERT INTO log (v) SELECT 'x' FROM generate_series(1, 50)")
                    process.send_signal(stop_signal)
                    executor = kit.executor(f"next{turn}")
                    for span in spans:
                        prepare(executor, span, start_ts)
                    for span in spans:
                        started = time.monotonic()
                        promote(executor, span, start_ts, epoch=101 + 10 * turn)
                        assert time.monotonic() - started < 5.0  # 0.3 s of waiting, and what a busy machine adds
                    if stop_signal == signal.SIGSTOP:
                        process.send_signal(signal.SIGCONT)
                    before = count()
                    wait_until(lambda before=before: count() > before + 30, "more load")  # type: ignore[misc]
                kit.wait_equal("t", "u", "log")
            finally:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            for span in spans:
                stop(executor, span)
        assert kit.at_sink("SELECT count(*) FROM log") == [(100,)]


def test_changes_that_the_source_let_go_of_are_an_error(source_db: str, sink_db: str) -> None:
    """A table whose checkpoint lies before what the slot keeps says so, and never skips them in silence."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        create(kit, "t")
        start_ts = kit.start()
        kit.run("INSERT INTO t (v) VALUES ('lost')")
        assert kit.source is not None
        kit.source.advance(current(kit))
        executor = kit.executor()
        span = kit.span("t")
        prepare(executor, span, start_ts)
        promote(executor, span, start_ts)
        with pytest.raises(OperatingError, match="has kept changes only from"):
            wait_until(lambda: executor.get_table_span_status(span, False) is None, "the error shows")
