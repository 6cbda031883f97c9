"""The whole line, PostgreSQL to PostgreSQL: first copy, changes, moves, and who may write."""

from __future__ import annotations

import pytest

from tablewire.errors import EpochRefusedError, OperatingError
from tablewire.model.progress import Checkpoint
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, prepare, promote, stop, wait_until

pytestmark = pytest.mark.integration


def test_snapshot_then_changes(source_db: str, sink_db: str) -> None:
    """What was there is copied, what comes is followed, and the checkpoint passes every commit."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id bigint PRIMARY KEY, v text, n numeric)")
        kit.run("INSERT INTO t SELECT i, 'v' || i, i / 7.0 FROM generate_series(1, 1000) i")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        begin(executor, [span], start_ts)
        kit.wait_equal("t")
        kit.run("INSERT INTO t SELECT i, NULL, i FROM generate_series(1001, 1100) i")
        kit.run("UPDATE t SET v = 'changed' WHERE id % 10 = 0")
        kit.run("DELETE FROM t WHERE id % 17 = 0")
        committed = current(kit)
        wait_until(lambda: checkpoint_of(executor, span) >= committed, "the checkpoint passes the commits")
        assert kit.matches("t")
        assert kit.at_sink("SELECT snapshot FROM tablewire.positions") == [("done",)]


def test_move_between_two_executors_loses_and_doubles_nothing(source_db: str, sink_db: str) -> None:
    """The destination prepares while the source of the move writes, and continues exactly behind its last checkpoint."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)")
        kit.run("CREATE TABLE log (v text)")
        kit.run("ALTER TABLE log REPLICA IDENTITY FULL")
        start_ts = kit.start()
        writers = [kit.executor("a"), kit.executor("b")]
        spans = [kit.span("t"), kit.span("log")]
        begin(writers[0], spans, start_ts)
        for turn in range(6):
            origin, destination = writers[turn % 2], writers[(turn + 1) % 2]
            for span in spans:
                kit.run(f"INSERT INTO t (v) SELECT 'turn {turn}' FROM generate_series(1, 50)")
                kit.run(f"INSERT INTO log SELECT 'turn {turn}' FROM generate_series(1, 5)")
                prepare(destination, span, checkpoint_of(origin, span))
                kit.run(f"INSERT INTO t (v) SELECT 'prepared {turn}' FROM generate_series(1, 50)")
                kit.run(f"INSERT INTO log SELECT 'prepared {turn}' FROM generate_series(1, 5)")
                stopped_at = stop(origin, span)
                kit.run(f"INSERT INTO log SELECT 'gap {turn}' FROM generate_series(1, 5)")
                promote(destination, span, stopped_at)
        kit.wait_equal("t", "log")
        assert kit.at_sink("SELECT count(*) FROM log") == [(180,)]


def test_scenario_12_older_epoch_is_refused(source_db: str, sink_db: str) -> None:
    """A writer that was replaced gets EpochRefusedError at its next write and changes nothing; so does an older takeover."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        old, new, late = kit.executor("a"), kit.executor("b"), kit.executor("c")
        span = kit.span("t")
        prepare(old, span, start_ts)
        promote(old, span, start_ts, epoch=10)
        kit.run("INSERT INTO t VALUES (1)")
        kit.wait_equal("t")
        prepare(new, span, checkpoint_of(old, span))
        promote(new, span, start_ts, epoch=11)
        kit.run("INSERT INTO t VALUES (2)")
        with pytest.raises(EpochRefusedError):
            wait_until(lambda: old.get_table_span_status(span, False) is None, "the old writer is refused")
        kit.wait_equal("t")
        prepare(late, span, start_ts)
        with pytest.raises(EpochRefusedError):
            promote(late, span, start_ts, epoch=10)
        assert kit.at_sink("SELECT assignment_epoch FROM tablewire.takeovers ORDER BY number") == [(10,), (11,)]
        assert stop(old, span) <= checkpoint_of(new, span)


def test_restarted_changefeed_beats_a_greater_assignment_epoch(source_db: str, sink_db: str) -> None:
    """The fence is a pair: a newer changefeed_epoch wins although its grants start again."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        first, second = kit.executor("a", changefeed_epoch=1), kit.executor("b", changefeed_epoch=2)
        span = kit.span("t")
        prepare(first, span, start_ts)
        promote(first, span, start_ts, epoch=99)
        stopped = stop(first, span)
        prepare(second, span, stopped)
        promote(second, span, stopped, epoch=1)
        kit.run("INSERT INTO t VALUES (1)")
        kit.wait_equal("t")


def test_raised_epoch_of_a_writing_table(source_db: str, sink_db: str) -> None:
    """set_assignment_epoch on a writing span raises it at the sink, and writing continues."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        prepare(executor, span, start_ts)
        promote(executor, span, start_ts, epoch=5)
        executor.set_assignment_epoch(span, 8)
        wait_until(lambda: kit.at_sink("SELECT assignment_epoch FROM tablewire.positions") == [(8,)], "the epoch is raised")
        kit.run("INSERT INTO t VALUES (1)")
        kit.wait_equal("t")


def test_prepared_table_writes_nothing(source_db: str, sink_db: str) -> None:
    """Until it is promoted, a table leaves no trace at the sink, where the owner has recorded the source."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        prepare(executor, kit.span("t"), start_ts)
        kit.run("INSERT INTO t VALUES (1)")
        status = executor.get_table_span_status(kit.span("t"), True)
        assert status.state is TableState.PREPARED
        assert kit.at_sink("SELECT to_regclass('t'), count(*) FROM tablewire.positions") == [(None, 0)]


def test_without_snapshot_starts_at_the_slot(source_db: str, sink_db: str) -> None:
    """What was there before the slot is not copied."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.run("INSERT INTO t VALUES (1)")
        start_ts = kit.start()
        kit.run("INSERT INTO t VALUES (2)")
        executor = kit.executor()
        begin(executor, [kit.span("t")], start_ts)
        kit.run("INSERT INTO t VALUES (3)")
        wait_until(lambda: kit.at_sink("SELECT id FROM t ORDER BY 1") == [(2,), (3,)], "only what came after")


def test_restart_goes_on_from_the_position_at_the_sink(source_db: str, sink_db: str) -> None:
    """An executor that starts from an old checkpoint skips what the sink has already."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE log (v int)")
        kit.run("ALTER TABLE log REPLICA IDENTITY FULL")
        start_ts = kit.start()
        for turn in range(3):
            executor = kit.executor(f"c{turn}")
            begin(executor, [kit.span("log")], start_ts)
            kit.run("INSERT INTO log SELECT generate_series(1, 10)")
            kit.wait_equal("log")
            executor.close()
        assert kit.at_sink("SELECT count(*) FROM log") == [(30,)]


def test_idle_table_advances_with_the_source(source_db: str, sink_db: str) -> None:
    """A table without changes has a checkpoint that follows the WAL."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE idle (id int PRIMARY KEY)")
        kit.run("CREATE TABLE busy (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        spans = [kit.span("idle"), kit.span("busy")]
        begin(executor, spans, start_ts)
        kit.run("INSERT INTO busy SELECT generate_series(1, 1000)")
        kit.run("CREATE TABLE unrelated AS SELECT generate_series(1, 1000)")
        target = current(kit)
        for span in spans:
            wait_until(lambda span=span: checkpoint_of(executor, span) >= target, "the checkpoint follows")  # type: ignore[misc]


def test_partial_and_unknown_spans(source_db: str, sink_db: str) -> None:
    """A part of a table is refused with the reason; an unknown span is absent, and removed already."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.start()
        executor = kit.executor()
        with pytest.raises(OperatingError, match="whole"):
            executor.add_table_span(Span(1, b"a", b"b"), Checkpoint(1, 1), True)
        assert executor.get_table_span_status(Span(7), False).state is TableState.ABSENT
        assert executor.remove_table_span(Span(7))
        assert executor.is_remove_table_span_finished(Span(7)) == (0, True)
