"""PostgresSource against a real server: what create checks and makes, and how the slot follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

from deploy.local.postgres import PostgresServer
from tablewire.errors import OperatingError
from tablewire.model.ids import ChangefeedID
from tablewire.postgres import new_source
from tablewire.postgres.source import PostgresSource
from tablewire.source import SourceRequest

pytestmark = pytest.mark.integration

Execute = Callable[[str], list[tuple[object, ...]]]


@pytest.fixture
def execute(source_db: str) -> Iterator[Execute]:
    """Runs one statement at the source."""
    with psycopg.connect(source_db, autocommit=True) as connection:

        def run(statement: str) -> list[tuple[object, ...]]:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

        yield run


def make_source(source_uri: str, sink_uri: str, tables: Sequence[str] = ("public.*",), name: str | None = None) -> PostgresSource:
    changefeed = ChangefeedID("default", name or "feed_" + source_uri.rpartition("/")[2])
    source = new_source(SourceRequest(changefeed, source_uri, sink_uri, tables))
    assert isinstance(source, PostgresSource)
    return source


def failed(source: PostgresSource) -> dict[str, str]:
    return {failure.check: failure.reason for failure in source.check()}


def test_check_finds_nothing_to_say(source_db: str, sink_db: str, execute: Execute) -> None:
    """A source and a sink that are fine give no failure, and nothing was made."""
    execute("CREATE TABLE t (id bigint PRIMARY KEY)")
    source = make_source(source_db, sink_db)
    assert source.check() == []
    assert execute("SELECT * FROM pg_publication") == []
    with psycopg.connect(sink_db) as sink:
        assert sink.execute("SELECT to_regnamespace('tablewire')").fetchone() == (None,)
    source.close()


def test_check_names_every_unusable_table(source_db: str, sink_db: str, execute: Execute) -> None:
    """`nothing`, and the default without a primary key, are refused by name; full and an index are fine."""
    execute("CREATE TABLE good (id int PRIMARY KEY)")
    execute("CREATE TABLE keyless (v int)")
    execute("CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE)")
    execute("CREATE TABLE whole (v int)")
    execute("ALTER TABLE whole REPLICA IDENTITY FULL")
    execute("CREATE TABLE mute (id int PRIMARY KEY)")
    execute("ALTER TABLE mute REPLICA IDENTITY NOTHING")
    execute("CREATE TABLE indexed (u int NOT NULL UNIQUE)")
    execute("ALTER TABLE indexed REPLICA IDENTITY USING INDEX indexed_u_key")
    source = make_source(source_db, sink_db)
    reasons = [failure.reason for failure in source.check() if failure.check == "replica_identity"]
    assert len(reasons) == 3
    assert {reason.split()[1] for reason in reasons} == {"public.keyless", "public.deferred", "public.mute"}


def test_check_names_all_failures_in_one_answer(source_db: str, execute: Execute, tmp_path: Path) -> None:
    """A filter without a match and a sink that cannot be reached are both named."""
    source = make_source(source_db, "postgresql://postgres:s3cret@127.0.0.1:1/none", ["nothing.*"])
    failures = failed(source)
    assert set(failures) == {"tables", "sink_reachable"}
    assert "s3cret" not in " ".join(failures.values())
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert set(failed(make_source(source_db, f"file://{blocked}/below"))) == {"tables", "sink_writable"}
    assert set(failed(make_source(source_db, "kafka://h"))) == {"tables", "sink_reachable"}


def test_check_names_an_unreachable_source() -> None:
    """Nothing listens: one clear failure, without a password."""
    failures = failed(make_source("postgresql://u:s3cret@127.0.0.1:1/none", "blackhole://"))
    assert set(failures) == {"source_reachable"}
    assert "s3cret" not in failures["source_reachable"]


def test_check_refuses_to_replicate_a_database_into_itself(source_db: str, execute: Execute) -> None:
    """Source and sink must be two databases."""
    execute("CREATE TABLE t (id int PRIMARY KEY)")
    assert "same database" in failed(make_source(source_db, source_db))["sink_writable"]


def test_check_names_missing_privileges(source_db: str, sink_db: str, execute: Execute, postgres_server: PostgresServer) -> None:
    """A role without replication, select, ownership and create gets an error for each of them, at both ends."""
    execute("CREATE TABLE t (id int PRIMARY KEY)")
    role = "weak_" + source_db.rpartition("/")[2]
    execute(f"CREATE ROLE {role} LOGIN")
    try:
        source = make_source(source_db.replace("postgres@", f"{role}@"), sink_db.replace("postgres@", f"{role}@"))
        reasons = [failure.reason for failure in source.check() if failure.check == "privileges"]
        assert len(reasons) == 4
        assert "sink_writable" in failed(source)
    finally:
        execute(f"DROP ROLE {role}")


def test_check_names_wal_level_and_full_slots(new_postgres: Callable[..., PostgresServer], tmp_path: Path) -> None:
    """A server that cannot replicate logically, with all slots taken, is reported for both."""
    server = new_postgres(settings={"wal_level": "replica", "max_replication_slots": "1"})
    server.execute("CREATE TABLE t (id int PRIMARY KEY)")
    server.execute("SELECT pg_create_physical_replication_slot('taken')")
    failures = failed(make_source(server.uri(), f"file://{tmp_path}/sink"))
    assert set(failures) == {"wal_level", "replication_slot"}


@pytest.mark.parametrize(
    ("names", "is_refused"),
    [("*", True), ('ANY 1 (other, "tablewire shared")', True), ("FIRST 1 (standby1, standby2)", False), ("", False)],
)
def test_check_refuses_to_be_a_synchronous_standby(
    new_postgres: Callable[..., PostgresServer], tmp_path: Path, names: str, is_refused: bool
) -> None:
    """A commit would be confirmed when a stream has received it; with standbys that are named it is not."""
    server = new_postgres(settings={"synchronous_standby_names": names, "synchronous_commit": "local"})
    server.execute("CREATE TABLE t (id int PRIMARY KEY)")
    found = failed(make_source(server.uri(), f"file://{tmp_path}/sink"))
    assert set(found) == ({"synchronous_standby"} if is_refused else set())


def test_start_is_idempotent_and_drop_leaves_nothing(source_db: str, sink_db: str, execute: Execute) -> None:
    """Two starts make one slot and one publication; two drops remove both."""
    execute("CREATE TABLE t (id int PRIMARY KEY)")
    execute("CREATE TABLE keyless (v int)")
    source = make_source(source_db, sink_db)
    started = source.start()
    assert 0 < started <= source.current_ts()
    assert source.start() == started
    assert execute("SELECT tablename FROM pg_publication_tables") == [("t",)]
    other = make_source(source_db, sink_db)
    assert other.start() == started
    source.drop()
    other.drop()
    assert execute("SELECT 1 FROM pg_publication") == []
    assert execute("SELECT 1 FROM pg_replication_slots WHERE database = current_database()") == []
    source.close()
    other.close()


def test_tables_follow_the_filter(source_db: str, sink_db: str, execute: Execute) -> None:
    """New, dropped and renamed tables are noticed, and the publication is kept in step."""
    execute("CREATE TABLE t1 (id int PRIMARY KEY)")
    source = make_source(source_db, sink_db, ["public.t*", "!public.*_tmp"])
    source.start()
    assert set(source.tables().values()) == {"public.t1"}
    execute("CREATE TABLE t2 (id int PRIMARY KEY)")
    execute("CREATE TABLE t3_tmp (id int PRIMARY KEY)")
    assert set(source.tables().values()) == {"public.t1", "public.t2"}
    assert {row[0] for row in execute("SELECT tablename FROM pg_publication_tables")} == {"t1", "t2"}
    execute("DROP TABLE t1")
    execute("ALTER TABLE t2 RENAME TO other")
    assert source.tables() == {}
    assert execute("SELECT tablename FROM pg_publication_tables") == []
    source.drop()
    source.close()


def test_slot_advances_and_releases_wal(source_db: str, sink_db: str, execute: Execute) -> None:
    """The safepoint goes forward with the checkpoint, never back, and not beyond the end of the WAL."""
    execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    source = make_source(source_db, sink_db)
    started = source.start()
    execute("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 10000) i")
    execute("CHECKPOINT")
    position = source.current_ts()
    before = source.retained_bytes()
    assert before > 1_000_000
    source.advance(position)
    assert source.start() == position > started
    source.advance(started)
    assert source.start() == position
    source.advance(position + 2**40)
    assert source.start() >= position
    execute("CHECKPOINT")
    source.advance(source.current_ts())
    assert source.retained_bytes() < before
    source.drop()
    source.close()


def test_lost_publication_is_an_error(source_db: str, sink_db: str, execute: Execute) -> None:
    """A slot without its publication would skip rows in silence: start refuses."""
    execute("CREATE TABLE t (id int PRIMARY KEY)")
    source = make_source(source_db, sink_db)
    source.start()
    execute("DROP PUBLICATION " + str(execute("SELECT pubname FROM pg_publication")[0][0]))
    with pytest.raises(OperatingError, match="publication"):
        source.start()
    source.drop()
    source.close()


def test_source_reconnects_after_its_backend_was_ended(source_db: str, sink_db: str, execute: Execute) -> None:
    """An ended backend costs one quiet reconnect."""
    execute("CREATE TABLE t (id int PRIMARY KEY)")
    source = make_source(source_db, sink_db)
    source.start()
    execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tablewire owner'")
    assert set(source.tables().values()) == {"public.t"}
    source.drop()
    source.close()
