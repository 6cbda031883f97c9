"""Changes that find other rows at the sink than at the source: settled as `on_conflict` says, counted, and logged."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from tablewire.errors import OperatingError
from tests.processor.postgres.replication_kit import Kit, begin, current, follow, settle, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(params=["single", "bulk"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every rule by single statements and by the ways for many changes."""
    monkeypatch.setattr("processor.postgres.sinks.bulk.BULK_MIN", 1 if request.param == "bulk" else 1_000_000)
    return str(request.param)


def conflicts(kit: Kit) -> object:
    return kit.at_sink("SELECT sum(conflicts)::int FROM tablewire.positions")[0][0]


def start(kit: Kit, extra: str = "", identity: str = "DEFAULT") -> None:
    """Follows a table of 100 rows, of which the sink then loses 1 and 2, and has a different 3."""
    kit.run(f"CREATE TABLE t (id int PRIMARY KEY, v text, big text {extra})")
    kit.run(f"ALTER TABLE t REPLICA IDENTITY {identity}")
    kit.run("INSERT INTO t SELECT n, 'a', 'b' FROM generate_series(1, 100) n")
    follow(kit, "t")
    kit.at_sink("DELETE FROM t WHERE id < 3; UPDATE t SET v = 'other' WHERE id = 3")
    kit.at_sink("INSERT INTO t VALUES (101, 'local', 'local'), (102, 'local', 'local')")


CHANGES = (
    "UPDATE t SET v = 'u' WHERE id = 1",  # missing
    "DELETE FROM t WHERE id = 2",  # missing
    "INSERT INTO t VALUES (101, 'new', 'new')",  # exists
    "UPDATE t SET id = 102 WHERE id = 50",  # the new key exists
    "UPDATE t SET v = 'plain' WHERE id BETWEEN 61 AND 99",
)


@pytest.mark.parametrize("binary", ["true", "false"])
def test_the_source_wins(source_db: str, sink_db: str, binary: str) -> None:
    """Missing rows are inserted, existing ones overwritten; each conflict is counted once, and logged by table, kind and key."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit, capture_logs() as logs:
        start(kit)
        kit.run("; ".join(CHANGES))
        settle(kit, "t")
        kit.at_sink("UPDATE t SET v = 'a' WHERE id = 3")  # nothing has touched the row that differs
        kit.wait_equal("t")
        assert conflicts(kit) == 4
        assert kit.executors[0].meter().conflicts == 4
        found = [entry for entry in logs if entry["event"] == "sink_conflict"]
        assert [(entry["table"], entry["key"]) for entry in found] == [("public.t", "id")]
        kinds = ("update_missing", "delete_missing", "insert_exists", "update_exists")
        assert [found[0][kind] for kind in kinds] == [1, 1, 1, 1]


def test_the_sink_is_kept(source_db: str, sink_db: str) -> None:
    """skip: what does not fit is not written, everything else is."""
    with Kit(source_db, sink_db, options={"on_conflict": "skip"}) as kit:
        start(kit)
        kit.run("; ".join(CHANGES))
        settle(kit, "t")
        assert kit.at_sink("SELECT id, v FROM t WHERE id < 4 OR id IN (50, 101, 102) ORDER BY 1") == [
            (3, "other"),
            (50, "a"),
            (101, "local"),
            (102, "local"),
        ]
        assert kit.at_sink("SELECT count(*) FROM t WHERE v = 'plain'") == [(39,)]
        assert conflicts(kit) == 4


@pytest.mark.parametrize("number", range(4))
def test_a_conflict_stops_the_table(source_db: str, sink_db: str, number: int) -> None:
    """error: nothing of the transaction is written; when the sink's rows are repaired, the table continues."""
    with Kit(source_db, sink_db, options={"on_conflict": "error"}) as kit:
        start(kit)
        before = kit.sink_content("t")
        kit.run(f"INSERT INTO t VALUES (200, 'x', 'x'); {CHANGES[number]}")
        texts: list[str] = []

        def fails() -> bool:
            try:
                kit.executors[0].get_table_span_status(kit.span("t"), False)
            except OperatingError as error:
                texts.append(str(error))
            return bool(texts)

        wait_until(fails, "the table's error")
        assert ("update_missing", "delete_missing", "insert_exists", "update_exists")[number] in texts[0]
        assert kit.sink_content("t") == before
        kit.at_sink("DELETE FROM t WHERE id > 100; UPDATE t SET v = 'a' WHERE id = 3")
        kit.at_sink("INSERT INTO t VALUES (1, 'a', 'b'), (2, 'a', 'b')")
        begin(kit.executor("b", changefeed_epoch=2), [kit.span("t")], kit.start_ts)
        settle(kit, "t")
        kit.wait_equal("t")
        assert conflicts(kit) == 0


def test_a_row_that_differs(source_db: str, sink_db: str) -> None:
    """With REPLICA IDENTITY FULL the old row is compared: an update or delete of another one is a conflict."""
    with Kit(source_db, sink_db) as kit:
        start(kit, identity="FULL")
        kit.at_sink("UPDATE t SET big = 'other' WHERE id IN (4, 5)")
        kit.run("UPDATE t SET v = 'u' WHERE id IN (3, 4, 6)")
        kit.run("DELETE FROM t WHERE id IN (5, 7)")
        settle(kit, "t")
        assert kit.at_sink("SELECT id, v, big FROM t WHERE id BETWEEN 3 AND 7 ORDER BY 1") == [
            (3, "u", "b"),
            (4, "u", "b"),
            (6, "u", "b"),
        ]
        assert conflicts(kit) == 3


def test_a_missing_row_with_a_value_that_was_not_sent(source_db: str, sink_db: str) -> None:
    """A large value that did not change is not part of the update: the table is copied again."""
    with Kit(source_db, sink_db) as kit, capture_logs() as logs:
        start(kit)
        kit.run("ALTER TABLE t ALTER big SET STORAGE EXTERNAL")
        kit.run("UPDATE t SET big = repeat('x', 10000) WHERE id = 10")
        settle(kit, "t")
        kit.at_sink("DELETE FROM t WHERE id = 10")
        kit.run("UPDATE t SET v = 'u' WHERE id = 10")
        kit.wait_equal("t")
        reasons = [entry["reason"] for entry in logs if entry["event"] == "postgres_copies_again"]
        assert len(reasons) == 1
        assert "does not exist at the sink" in reasons[0]


def test_rows_without_a_key(source_db: str, sink_db: str) -> None:
    """A row that is missing is inserted with its new values; duplicates are no conflict."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (a int, b text)")
        kit.run("ALTER TABLE t REPLICA IDENTITY FULL")
        kit.run("INSERT INTO t SELECT n / 2, 'x' FROM generate_series(1, 100) n")
        follow(kit, "t")
        kit.at_sink("DELETE FROM t WHERE a IN (10, 11)")
        kit.run("UPDATE t SET b = 'y' WHERE a IN (10, 12)")
        kit.run("DELETE FROM t WHERE a = 11")
        settle(kit, "t")
        kit.wait_equal("t")
        assert conflicts(kit) == 4


def test_a_trigger_of_the_sink_may_suppress_changes(source_db: str, sink_db: str) -> None:
    """As with native replication; what it suppresses is counted."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink(
            "CREATE FUNCTION filter() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF NEW.id % 2 = 0 THEN RETURN NULL; END IF; RETURN NEW; END $$;"
            "CREATE TRIGGER filter BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION filter();"
            "ALTER TABLE t ENABLE ALWAYS TRIGGER filter"
        )
        follow(kit, "t")
        kit.run("INSERT INTO t SELECT n, 'a' FROM generate_series(1, 10) n")
        kit.run("UPDATE t SET v = 'b' WHERE id IN (1, 3)")
        settle(kit, "t")
        assert kit.at_sink("SELECT id, v FROM t ORDER BY id") == [(1, "b"), (3, "b"), (5, "a"), (7, "a"), (9, "a")]
        assert conflicts(kit) == 5


def test_a_conflict_in_a_transaction_larger_than_the_queue(source_db: str, sink_db: str) -> None:
    """Only the part with the conflict is written again; what came before stays."""
    options = {"queue_max_bytes": "65536", "batch_max_bytes": "16384"}
    with Kit(source_db, sink_db, options=options) as kit:
        start(kit)
        kit.run(
            "DO $$ BEGIN FOR i IN 1..20 LOOP INSERT INTO t SELECT 1000 * i + n, 'c', repeat('z', 50)"
            " FROM generate_series(1, 200) n; END LOOP; INSERT INTO t VALUES (101, 'new', 'new');"
            " UPDATE t SET v = 'u' WHERE id = 1; DELETE FROM t WHERE id = 2;"
            " UPDATE t SET v = 'a' WHERE id = 3; END $$"
        )
        kit.at_sink("DELETE FROM t WHERE id = 102")
        target = current(kit)
        assert target
        settle(kit, "t")
        kit.wait_equal("t")
        assert conflicts(kit) == 3


def test_many_conflicts_need_one_look_each(source_db: str, sink_db: str) -> None:
    """A sink that is filled already, without first copies: every change is a conflict, and the tables are equal."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink("INSERT INTO t SELECT n, 'a' FROM generate_series(1, 300) n")
        follow(kit, "t")
        kit.run("INSERT INTO t SELECT n, 'b' FROM generate_series(1, 400) n")
        kit.run("UPDATE t SET v = 'c' WHERE id > 350")
        settle(kit, "t")
        kit.wait_equal("t")
        assert conflicts(kit) == 300
