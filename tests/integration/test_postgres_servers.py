"""A source that is not the server that it was: failovers, restored copies, lost slots. No row is lost or kept without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest

from deploy.local.postgres import PostgresServer
from tablewire.errors import ChangesLostError, OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres import new_source, slots
from tablewire.postgres.connections import SourceUnavailableError
from tablewire.postgres.source import PostgresSource
from tablewire.source import SourceRequest
from tests.integration.standbys import move_to, new_standby, promote, restore_data, save_data, wait_caught_up
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, wait_until

pytestmark = pytest.mark.integration


class Failover:
    """A table `t` that is replicated from a server of its own; `again` is what a new owner does after the server changed."""

    def __init__(self, server: PostgresServer, sink_uri: str) -> None:
        server.execute("CREATE TABLE t (id int PRIMARY KEY)")
        server.execute("INSERT INTO t SELECT generate_series(1, 10)")
        self.server = server
        self.kit = Kit(server.uri(), sink_uri)
        self.kit.start()
        self.executor = self.kit.executor()
        begin(self.executor, self.kit.spans(), self.kit.start_ts)
        self.follow()

    @property
    def source(self) -> PostgresSource:
        assert self.kit.source is not None
        return self.kit.source

    def follow(self) -> Ts:
        """Everything that is committed is at the sink, and the slot stands there; return the checkpoint."""
        target = current(self.kit)
        wait_until(lambda: checkpoint_of(self.executor, self.kit.span("t")) >= target, "the checkpoint passes")
        self.source.advance(target)
        self.source.advance(target)  # of a server that stands still the mark is recorded once more
        return target

    def leave(self) -> Ts:
        """Follow, then stop reading; return the checkpoint."""
        checkpoint_ts = self.follow()
        self.executor.close()
        self.source.close()
        self.kit.source_connection.close()
        return checkpoint_ts

    def again(self, server: PostgresServer, checkpoint_ts: Ts) -> PostgresSource:
        """A source of the same changefeed at another server, not started."""
        kit = self.kit
        kit.source_uri = server.uri()
        kit.source_connection = psycopg.connect(kit.source_uri, autocommit=True)
        request = SourceRequest(
            kit.changefeed, kit.source_uri, kit.sink_uri, kit.tables, start_ts=kit.start_ts, checkpoint_ts=checkpoint_ts
        )
        source = new_source(request)
        assert isinstance(source, PostgresSource)
        kit.source = source
        return source

    def resume(self, checkpoint_ts: Ts, epoch: int = 2) -> None:
        """Start the source and an executor; what is committed then has to follow."""
        started = self.source.start()
        assert started <= checkpoint_ts
        self.executor = self.kit.executor("b", epoch)
        begin(self.executor, self.kit.spans(), checkpoint_ts)
        self.kit.run("INSERT INTO t SELECT max(id) + 1 FROM t")
        self.kit.wait_equal("t")
        self.follow()

    def slots(self) -> list[tuple[object, ...]]:
        return self.kit.run("SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'logical' AND NOT temporary")

    def assert_lost(self, reason: str) -> None:
        """Neither a resume nor a start continues; both say why, and no slot is made."""
        before = self.slots()
        for call in (self.source.verify, self.source.start):
            with pytest.raises(ChangesLostError, match=f"{reason}.*owner changefeed resync"):
                call()
        assert self.slots() == before


@pytest.fixture
def failover(new_postgres: Callable[..., PostgresServer], sink_db: str) -> Iterator[Failover]:
    # Nothing but the tests may run transactions, as on an idle server.
    failover = Failover(new_postgres(settings={"autovacuum": "off", "hot_standby_feedback": "on"}), sink_db)
    try:
        yield failover
    finally:
        for executor in failover.kit.executors:
            executor.close()
        failover.source.close()


def test_standby_that_lacks_rows_of_the_sink(failover: Failover, tmp_path: Path) -> None:
    """The rows that only the former primary had are named by both positions, and no slot is created at the new one."""
    standby = new_standby(failover.server, tmp_path)
    standby.stop()
    failover.kit.run("INSERT INTO t SELECT generate_series(101, 3100)")
    checkpoint_ts = failover.leave()
    failover.server.stop()
    standby.start()
    promote(standby)
    standby.execute("INSERT INTO t VALUES (11)")
    failover.again(standby, checkpoint_ts)
    failover.assert_lost(r"promoted at \w+/\w+, but the sink has been written up to")
    assert failover.slots() == []
    standby.close()


def test_standby_that_is_up_to_date_and_has_no_slot(failover: Failover, tmp_path: Path) -> None:
    """No transaction has committed since all rows were at the sink: replication continues with a new slot."""
    standby = new_standby(failover.server, tmp_path)
    failover.kit.run("INSERT INTO t VALUES (11)")
    checkpoint_ts = failover.leave()
    wait_caught_up(failover.server)
    failover.server.stop()
    promote(standby)
    failover.again(standby, checkpoint_ts)
    failover.source.verify()
    failover.resume(checkpoint_ts)
    standby.close()


def test_standby_without_the_slot_that_was_written_before_it_was_seen(failover: Failover, tmp_path: Path) -> None:
    """The row that was written to the new primary cannot be had as a change, so the changefeed does not continue."""
    standby = new_standby(failover.server, tmp_path)
    checkpoint_ts = failover.leave()
    wait_caught_up(failover.server)
    failover.server.stop()
    promote(standby)
    standby.execute("INSERT INTO t VALUES (11)")
    failover.again(standby, checkpoint_ts)
    failover.assert_lost("slot does not exist .* later changes are lost")
    standby.close()


def test_standby_with_a_synchronized_slot(failover: Failover, tmp_path: Path) -> None:
    """From PostgreSQL 17 on the slot fails over too: what is written before the owner sees the new primary follows as well."""
    standby = new_standby(failover.server, tmp_path)
    checkpoint_ts = failover.leave()
    if failover.server.execute("SHOW server_version_num") < [("170000",)]:
        failover.server.stop()
        promote(standby)
        # An HA manager of an earlier version may create the slot at the new primary: it starts too late.
        standby.execute("INSERT INTO t VALUES (11)")
        failover.again(standby, checkpoint_ts)
        name = failover.source._name
        standby.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
        failover.assert_lost("it can only be read from")
        standby.close()
        return
    failover.server.execute("SELECT pg_create_physical_replication_slot('standby')")
    standby._settings.update(sync_replication_slots="on", primary_slot_name="standby")
    standby.restart()
    synced = "SELECT 1 FROM pg_replication_slots WHERE synced AND NOT temporary AND failover"
    wait_until(lambda: standby.execute(synced), "the slot is synchronized")
    wait_caught_up(failover.server)
    failover.server.stop()
    promote(standby)
    standby.execute("INSERT INTO t VALUES (11)")
    failover.again(standby, checkpoint_ts)
    failover.resume(checkpoint_ts)
    assert failover.kit.at_sink("SELECT count(*) FROM t WHERE id = 11") == [(1,)]
    standby.close()


def test_source_that_is_a_standby_is_retried(failover: Failover, tmp_path: Path) -> None:
    """Until it is promoted, the error says what it is; create refuses it."""
    standby = new_standby(failover.server, tmp_path)
    checkpoint_ts = failover.leave()
    source = failover.again(standby, checkpoint_ts)
    for call in (source.start, source.verify):
        with pytest.raises(SourceUnavailableError, match="is a standby"):
            call()
    assert "is a standby" in {failure.check: failure.reason for failure in source.check()}["source_reachable"]
    standby.close()


@pytest.mark.parametrize("rows_after", [1, 20_000], ids=["less than before", "more than before"])
def test_source_restored_from_an_older_copy(failover: Failover, tmp_path: Path, rows_after: int) -> None:
    """Its WAL ends before what the sink has; or, if it has written more since, its slot has gone back."""
    failover.executor.close()
    failover.source.close()
    failover.kit.source_connection.close()
    server = failover.server
    server.stop()
    save_data(server, tmp_path / "copy")
    server.start()
    failover.again(server, failover.kit.start_ts)
    failover.resume(failover.kit.start_ts)
    failover.kit.run("CHECKPOINT")  # the slot's restart position moves with what the server logs now and then
    failover.kit.run("INSERT INTO t SELECT generate_series(101, 3100)")
    checkpoint_ts = failover.leave()
    server.stop()
    restore_data(server, tmp_path / "copy")
    server.start()
    server.execute(f"INSERT INTO t SELECT generate_series(10001, 10000 + {rows_after})")
    failover.again(server, checkpoint_ts)
    failover.assert_lost("its WAL ends at" if rows_after == 1 else "restored from an older copy")


def test_another_cluster_under_the_same_address(failover: Failover, new_postgres: Callable[..., PostgresServer]) -> None:
    """Even with a publication and a slot of the same names it is not taken for the source."""
    (comment,) = failover.kit.run("SELECT obj_description(oid, 'pg_publication') FROM pg_publication")
    checkpoint_ts = failover.leave()
    other = new_postgres(name="other")
    other.execute("CREATE TABLE t (id int PRIMARY KEY)")
    failover.again(other, checkpoint_ts)
    failover.assert_lost("publication .* does not exist at the source")
    name = failover.source._name
    other.execute(f"CREATE PUBLICATION {name} FOR TABLE t")
    other.execute(f"COMMENT ON PUBLICATION {name} IS '{comment[0]}'")
    other.execute(f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")
    failover.assert_lost("it is another server: its system identifier is")


def test_failover_is_noticed_by_a_running_owner(failover: Failover, tmp_path: Path) -> None:
    """The same address leads to a standby that lacks rows: the next call of the owner's source says so, whatever it is."""
    standby = new_standby(failover.server, tmp_path)
    standby.stop()
    failover.kit.run("INSERT INTO t SELECT generate_series(101, 3100)")
    failover.follow()
    failover.executor.close()
    failover.kit.source_connection.close()
    move_to(standby, failover.server)
    with pytest.raises(SourceUnavailableError, match="is a standby"):
        failover.source.current_ts()
    promote(standby)
    for call in (failover.source.current_ts, failover.source.tables, lambda: failover.source.advance(1)):
        with pytest.raises(ChangesLostError, match="promoted at"):
            call()
    standby.close()


def test_what_was_read_before_a_failover_is_not_written_after_it(failover: Failover, tmp_path: Path) -> None:
    """An accepted failover raises the epoch of every table at the sink, which refuses the writers of before."""
    standby = new_standby(failover.server, tmp_path)
    executor = failover.executor
    checkpoint_ts = failover.follow()
    failover.kit.source_connection.close()
    (before,) = failover.kit.at_sink("SELECT assignment_epoch, position FROM tablewire.positions")
    wait_caught_up(failover.server)
    failover.server.stop()
    promote(standby)
    failover.again(standby, checkpoint_ts).start()
    (after,) = failover.kit.at_sink("SELECT assignment_epoch, position FROM tablewire.positions")
    assert after[0] == int(str(before[0])) + 1
    source = failover.kit.at_sink("SELECT source ->> 'timeline' FROM tablewire.checkpoints")
    assert source == [("2",)]
    executor.close()
    standby.close()


@pytest.mark.parametrize("limit", ["max_slot_wal_keep_size", "idle_replication_slot_timeout"])
def test_why_a_slot_was_lost(new_postgres: Callable[..., PostgresServer], sink_db: str, limit: str) -> None:
    """The error names the setting that made the server drop it (a timeout of idle slots exists since PostgreSQL 18)."""
    version = new_postgres(name="probe").execute("SHOW server_version_num")
    if version < [("180000",)]:
        limit = "max_slot_wal_keep_size"
    value = {"max_slot_wal_keep_size": "16MB", "idle_replication_slot_timeout": "1s"}[limit]
    failover = Failover(new_postgres(settings={limit: value, "autovacuum": "off", "max_wal_size": "64MB"}), sink_db)
    checkpoint_ts = failover.leave()
    failover.again(failover.server, checkpoint_ts)
    failover.kit.run("INSERT INTO t VALUES (11)")
    lost = "SELECT 1 FROM pg_replication_slots WHERE wal_status = 'lost'"

    def is_lost() -> bool:
        failover.kit.run("SELECT pg_switch_wal()")
        failover.kit.run("INSERT INTO t SELECT max(id) + 1 FROM t")
        failover.kit.run("CHECKPOINT")
        return bool(failover.kit.run(lost))

    wait_until(is_lost, "the slot is lost")
    failover.assert_lost(f"is lost: .*{limit}")
    failover.source.close()


def test_advance_keeps_what_it_has_done(source_db: str, sink_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is kept although the call ends after it, and the role's statement_timeout does not count."""
    monkeypatch.setattr(slots, "ADVANCE_STEP_BYTES", 200_000)
    monkeypatch.setattr(slots, "ADVANCE_TURN_S", 0.000_001)
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.start()
        kit.run("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 10000) i")
        target, source = current(kit), kit.source
        assert source is not None
        seen = []
        slot = f"SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = '{source._name}'"

        def is_there() -> bool:
            source._advance_at = 0.0
            source.advance(target)
            seen.append(int(str(kit.run(slot)[0][0])))
            return seen[-1] == target

        wait_until(is_there, "the slot has reached the target")
        assert len(seen) > 4
        assert all(0 < later - earlier <= 300_000 for earlier, later in pairwise(seen))


def test_slot_of_a_living_stream_replaces_one_that_was_dropped(source_db: str, sink_db: str) -> None:
    """While a processor reads, nothing is missing: the slot is restored, and a processor that comes later finds all it needs."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor, source = kit.executor(), kit.source
        assert source is not None
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO t VALUES (1)")
        kit.wait_equal("t")
        kit.run(f"SELECT pg_drop_replication_slot('{source._name}')")
        kit.run("INSERT INTO t VALUES (2)")
        source.advance(start_ts)
        assert kit.run(f"SELECT temporary FROM pg_replication_slots WHERE slot_name = '{source._name}'") == [(False,)]
        kit.wait_equal("t")
        target = current(kit)
        wait_until(lambda: checkpoint_of(executor, kit.span("t")) >= target, "the checkpoint passes")
        source.advance(target)
        executor.close()
        kit.run("INSERT INTO t VALUES (3)")
        begin(kit.executor("b", 2), kit.spans(), target)
        kit.wait_equal("t")


def test_slot_that_was_dropped_while_nothing_reads(source_db: str, sink_db: str) -> None:
    """No processor has it, and rows were written: the owner says that they are lost instead of starting behind them."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        assert kit.source is not None
        kit.run(f"SELECT pg_drop_replication_slot('{kit.source._name}')")
        kit.run("INSERT INTO t VALUES (1)")
        with pytest.raises(ChangesLostError, match=r"slot does not exist .* later changes are lost"):
            kit.source.advance(start_ts)
        with pytest.raises(OperatingError, match="slot does not exist"):
            kit.source.start()


def test_transactions_that_keep_a_slot_from_being_created_are_named(
    new_postgres: Callable[..., PostgresServer], sink_db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepared one is named at once, an open one when it has stayed open; then the slot is created."""
    monkeypatch.setattr(slots, "CREATE_SLOT_TIMEOUT_MS", 300)
    server = new_postgres(settings={"max_prepared_transactions": "2"})
    server.execute("CREATE TABLE t (id int PRIMARY KEY)")
    kit = Kit(server.uri(), sink_db)
    with psycopg.connect(server.uri()) as writer:
        writer.execute("INSERT INTO t VALUES (1)")
        (pid, xid) = writer.execute("SELECT pg_backend_pid(), pg_current_xact_id()::text").fetchone() or ()
        with pytest.raises(OperatingError, match=rf"transaction {xid}, process {pid}, .*idle in transaction, since"):
            kit.start()
        writer.execute("PREPARE TRANSACTION 'left'")
        with pytest.raises(OperatingError, match=rf"transaction {xid}, prepared as 'left', since .*ROLLBACK PREPARED"):
            kit.start()
    server.execute("COMMIT PREPARED 'left'")
    assert kit.start() > 0
    assert kit.source is not None
    kit.source.close()


def test_slot_that_does_not_move_is_used(new_postgres: Callable[..., PostgresServer], sink_db: str) -> None:
    """Where the server makes slots unusable that are not used (PostgreSQL 18), a running changefeed uses its own."""
    server = new_postgres(settings={})
    if server.execute("SHOW server_version_num") >= [("180000",)]:
        server._settings["idle_replication_slot_timeout"] = "1h"
        server.restart()
    else:
        return
    server.execute("CREATE TABLE t (id int PRIMARY KEY)")
    kit = Kit(server.uri(), sink_db)
    checkpoint_ts = kit.start()
    since = "SELECT inactive_since FROM pg_replication_slots"
    before = kit.run(since)
    assert kit.source is not None
    kit.source.advance(checkpoint_ts)
    assert kit.run(since) > before
    kit.source.close()


def test_failover_with_a_sink_that_stores_nothing(new_postgres: Callable[..., PostgresServer], tmp_path: Path) -> None:
    """The comment of the publication knows the server: a standby that lacks what was confirmed is refused, and so is another."""
    server = new_postgres(settings={"autovacuum": "off"})
    server.execute("CREATE TABLE t (id int PRIMARY KEY)")
    kit = Kit(server.uri(), f"file://{tmp_path}/files")
    start_ts = kit.start()
    assert kit.source is not None
    kit.source.tables()
    standby = new_standby(server, tmp_path)
    standby.stop()
    server.execute("INSERT INTO t SELECT generate_series(1, 1000)")
    checkpoint_ts = current(kit)
    kit.source.advance(checkpoint_ts)
    kit.source.close()
    kit.source_connection.close()
    server.stop()
    standby.start()
    promote(standby)
    for reached_ts, reason in ((checkpoint_ts, "promoted at"), (start_ts, "slot does not exist")):
        request = SourceRequest(
            kit.changefeed, standby.uri(), kit.sink_uri, kit.tables, start_ts=start_ts, checkpoint_ts=reached_ts
        )
        source = new_source(request)
        assert isinstance(source, PostgresSource)
        with pytest.raises(ChangesLostError, match=reason):
            source.start()
        source.close()
    standby.close()


@pytest.mark.parametrize(
    "change",
    ["DROP TABLE t", "ALTER TABLE t DROP COLUMN v", "ALTER TABLE t RENAME v TO w", "ALTER TABLE t ADD COLUMN x int DEFAULT 3"],
)
def test_new_copy_repairs_what_was_changed_at_the_sink(source_db: str, sink_db: str, change: str) -> None:
    """What a resync does at source and sink: everything of the former start is dropped, and the table is copied again."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.run("INSERT INTO t VALUES (1, 'a')")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        kit.wait_equal("t")
        executor.close()
        kit.at_sink(change)
        assert kit.source is not None
        kit.source.drop()
        start_ts = kit.source.start()
        begin(kit.executor("b", 2), kit.spans(), start_ts)
        wait_until(lambda: kit.at_sink("SELECT snapshot FROM tablewire.positions") == [("done",)], "it is copied")
        kit.run("INSERT INTO t VALUES (2, 'b')")
        wait_until(lambda: kit.at_sink("SELECT id, v FROM t ORDER BY id") == [(1, "a"), (2, "b")], "rows are right")
