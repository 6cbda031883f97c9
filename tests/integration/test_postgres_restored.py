"""A sink that has lost commits which it had confirmed: restored from a backup, or replaced by a standby that lacked them."""

from __future__ import annotations

import psycopg
import pytest

from tablewire.errors import OperatingError
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, stop, wait_until

pytestmark = pytest.mark.integration


def back_up(kit: Kit, *tables: str) -> None:
    """Keeps what these tables hold now, beside them."""
    kit.at_sink("CREATE SCHEMA kept")
    for name in tables:
        kit.at_sink(f"CREATE TABLE kept.{name.rpartition('.')[2]} AS SELECT * FROM {name}")


def restore(kit: Kit, *tables: str) -> None:
    """Brings it back and ends the executors' connections, in one transaction."""
    with psycopg.connect(kit.sink_uri) as connection:
        for name in tables:
            connection.execute(f"TRUNCATE {name}".encode())
            connection.execute(f"INSERT INTO {name} SELECT * FROM kept.{name.rpartition('.')[2]}".encode())
        connection.execute(
            b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'tablewire capture%'"
        )


def follow(kit: Kit, executor: object, *names: str) -> None:
    """Everything that is committed is at the sink, and the owner has advanced the slot behind it."""
    target = current(kit)
    for name in names:
        span = kit.span(name)
        wait_until(lambda span=span: checkpoint_of(executor, span) >= target, "the checkpoint passes")  # type: ignore[arg-type, misc]
    assert kit.source is not None
    kit.source.advance(target)


def test_changefeed_that_starts_again_on_a_restored_sink_says_so(source_db: str, sink_db: str) -> None:
    """Rows and positions of the sink are of yesterday: neither a table nor the slot advances, and both positions are named."""
    with Kit(source_db, sink_db) as kit:
        for name in ("busy", "idle"):
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO idle VALUES (1)")
        kit.run("INSERT INTO busy VALUES (1)")
        follow(kit, executor, "busy", "idle")
        state = ("busy", "idle", "tablewire.positions", "tablewire.checkpoints")
        back_up(kit, *state)
        kit.run("INSERT INTO busy SELECT generate_series(2, 60)")
        follow(kit, executor, "busy", "idle")
        executor.close()
        assert kit.source is not None
        checkpoint_ts = current(kit)
        kit.source.advance(checkpoint_ts)

        again = kit.executor("b", 2)  # nothing is lost yet: an idle table, whose position is old, is no trouble
        begin(again, kit.spans(), checkpoint_ts)
        kit.run("INSERT INTO idle VALUES (2)")
        kit.wait_equal("busy", "idle")
        again.close()

        restore(kit, *state)
        late = kit.executor("c", 3)
        for name in ("busy", "idle"):
            with pytest.raises(OperatingError, match=r"is at \w+/\w+, but had confirmed everything up to \w+/\w+"):
                begin(late, [kit.span(name)], checkpoint_ts)
        with pytest.raises(OperatingError, match="has lost commits"):
            kit.source.advance(current(kit))
        kit.at_sink("DELETE FROM tablewire.checkpoints")  # the operator says: go on without
        kit.source.advance(checkpoint_ts)


@pytest.mark.parametrize("initial_snapshot", [True, False], ids=["with first copies", "without"])
def test_running_table_whose_sink_lost_commits(source_db: str, sink_db: str, initial_snapshot: bool) -> None:
    """After the connection broke, the position at the sink is behind what it had confirmed: the table is copied again, or stops
    with its error, also when it is taken over again."""
    with Kit(source_db, sink_db, initial_snapshot=initial_snapshot) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        begin(executor, [span], start_ts)
        kit.run("INSERT INTO t VALUES (1)")
        kit.wait_equal("t")
        back_up(kit, "t", "tablewire.positions")
        kit.run("INSERT INTO t SELECT generate_series(2, 60)")
        kit.wait_equal("t")
        restore(kit, "t", "tablewire.positions")
        kit.run("INSERT INTO t VALUES (100)")
        if initial_snapshot:
            kit.wait_equal("t")
            return

        def has_failed() -> bool:
            try:
                executor.get_table_span_status(span, False)
            except OperatingError as error:
                return "has lost commits" in str(error)
            return False

        wait_until(has_failed, "the table's error")
        stop(executor, span)
        with pytest.raises(OperatingError, match="must be copied again"):
            begin(executor, [span], current(kit))


def test_slot_waits_for_a_sink_that_is_away(source_db: str, sink_db: str) -> None:
    """The slot stands still while the sink cannot note it, without an error of the source."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.start()
        assert kit.source is not None
        slot = f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{kit.source._name}'"
        before = kit.run(slot)
        kit.run("INSERT INTO t VALUES (1)")
        uri = kit.source._sink_checkpoint._connection._uri  # type: ignore[union-attr]
        kit.source._sink_checkpoint._connection._drop()  # type: ignore[union-attr]
        kit.source._sink_checkpoint._connection._uri = uri + "_away"  # type: ignore[union-attr]
        kit.source.advance(current(kit))
        assert kit.run(slot) == before
        kit.source._sink_checkpoint._connection._uri = uri  # type: ignore[union-attr]
        kit.source.advance(current(kit))
        assert kit.run(slot) != before
