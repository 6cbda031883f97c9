"""The table at the sink is dropped, replaced or changed by somebody else: it is copied again, written rightly, or an error."""

from __future__ import annotations

import psycopg
import pytest
from structlog.testing import capture_logs

from tablewire.errors import OperatingError
from tests.processor.postgres.replication_kit import Kit, begin, follow, settle, stop, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(params=["single", "bulk"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every rule by single statements and by the ways for many changes."""
    monkeypatch.setattr("processor.postgres.sinks.bulk.BULK_MIN", 1 if request.param == "bulk" else 1_000_000)
    return str(request.param)


def start(kit: Kit) -> None:
    kit.run("CREATE TABLE t (id int PRIMARY KEY, v bigint, note varchar(10))")
    kit.run("INSERT INTO t SELECT n, n, 'n' FROM generate_series(1, 10) n")
    follow(kit, "t")
    kit.run("UPDATE t SET v = v + 1 WHERE id < 5")  # every session may have a plan and prepared statements
    settle(kit, "t")


REPLACED = {
    "dropped": "DROP TABLE t",
    "re-created": "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v bigint, note varchar(10))",
    "re-created in another way": "DROP TABLE t;"
    " CREATE TABLE t (note text, extra int DEFAULT 7, v numeric, id bigint PRIMARY KEY)",
    "partitioned": "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v bigint, note varchar(10)) PARTITION BY HASH (id);"
    "CREATE TABLE t0 PARTITION OF t FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
    "column dropped": "ALTER TABLE t DROP COLUMN v",
    "column re-created": "ALTER TABLE t DROP COLUMN v; ALTER TABLE t ADD COLUMN v bigint",
    "column renamed": "ALTER TABLE t RENAME COLUMN v TO w",
}


@pytest.mark.parametrize("binary", ["true", "false"])
@pytest.mark.parametrize("how", REPLACED)
def test_a_table_that_was_replaced_is_copied_again(source_db: str, sink_db: str, how: str, binary: str) -> None:
    """While it is written: the next change finds that, and no row is missing afterwards."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit, capture_logs() as logs:
        start(kit)
        kit.at_sink(REPLACED[how])
        kit.run("INSERT INTO t VALUES (11, 11, 'n')")
        wait_until(lambda: ids_and_values(kit, at_source=True) == ids_and_values(kit), f"source = sink: {logs[-3:]}")
        kit.run("UPDATE t SET v = 0, note = 'u'")
        kit.run("DELETE FROM t WHERE id = 1")
        settle(kit, "t")
        assert ids_and_values(kit, at_source=True) == ids_and_values(kit)
        assert [entry["event"] for entry in logs].count("postgres_copies_again") == 1


def ids_and_values(kit: Kit, at_source: bool = False) -> object:
    query = "SELECT array_agg((id, v, note)::text ORDER BY id) FROM t"
    try:
        return kit.run(query) if at_source else kit.at_sink(query)
    except psycopg.Error as error:  # the table does not exist at this moment
        return str(error)


@pytest.mark.parametrize("how", REPLACED)
def test_a_table_that_was_replaced_while_it_moved(source_db: str, sink_db: str, how: str) -> None:
    """The next writer finds it when it takes the table over, without any change."""
    with Kit(source_db, sink_db) as kit:
        start(kit)
        checkpoint = stop(kit.executors[0], kit.span("t"))
        kit.at_sink(REPLACED[how])
        begin(kit.executor("b", changefeed_epoch=2), [kit.span("t")], checkpoint)
        wait_until(lambda: ids_and_values(kit, at_source=True) == ids_and_values(kit), "source = sink")


@pytest.mark.parametrize("how", ["dropped", "re-created"])
def test_without_first_copies_it_is_an_error(source_db: str, sink_db: str, how: str) -> None:
    """Nothing is written to a table that lacks the earlier rows; a later writer says how to continue."""
    with Kit(source_db, sink_db, initial_snapshot=False) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v bigint)")
        follow(kit, "t")
        kit.run("INSERT INTO t VALUES (1, 1)")
        settle(kit, "t")
        kit.at_sink(REPLACED[how].replace(", note varchar(10)", ""))
        kit.run("INSERT INTO t VALUES (2, 2)")
        span = kit.span("t")

        def text() -> str:
            try:
                kit.executors[-1].get_table_span_status(span, False)
            except OperatingError as error:
                return str(error)
            return ""

        wait_until(text, "the table's error")
        kit.executor("b", changefeed_epoch=2)
        with pytest.raises(OperatingError, match=r"remove its row in tablewire\.positions"):
            begin(kit.executors[-1], [span], kit.start_ts)
        kit.at_sink("DELETE FROM tablewire.positions")
        begin(kit.executor("c", changefeed_epoch=3), [span], kit.start_ts)
        settle(kit, "t")
        assert kit.at_sink("SELECT count(*) FROM t WHERE id = 2") == [(1,)]


@pytest.mark.parametrize("binary", ["true", "false"])
def test_int_to_numeric_at_both_ends(source_db: str, sink_db: str, binary: str) -> None:
    """The sink's first, then the source's: no cached plan or statement rounds a value."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        start(kit)
        kit.at_sink("ALTER TABLE t ALTER v TYPE numeric")
        kit.run("INSERT INTO t VALUES (11, 11, 'n')")
        kit.run("ALTER TABLE t ALTER v TYPE numeric")
        kit.run("INSERT INTO t SELECT n, n + 0.25, 'n' FROM generate_series(12, 90) n")
        kit.run("UPDATE t SET v = v + 0.5")
        settle(kit, "t")
        kit.wait_equal("t")


@pytest.mark.parametrize("binary", ["true", "false"])
def test_another_type_at_the_sink(source_db: str, sink_db: str, binary: str) -> None:
    """bigint -> double precision: the values are right, or the table has an error; the bytes are never read as another type."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        start(kit)
        kit.at_sink("ALTER TABLE t ALTER v TYPE double precision")
        kit.run("INSERT INTO t SELECT n, 7, 'n' FROM generate_series(12, 90) n")
        failed: list[str] = []

        def is_right_or_an_error() -> bool:
            try:
                kit.executors[0].get_table_span_status(kit.span("t"), False)
            except OperatingError as error:
                failed.append(str(error))
            return bool(failed) or kit.matches("t")

        wait_until(is_right_or_an_error, "equal, or an error")
        assert kit.at_sink("SELECT count(*) FROM t WHERE v NOT IN (SELECT generate_series(1, 12))") == [(0,)]
        assert not failed or "double precision" in failed[0]


def test_what_the_writer_must_know_is_planned_again(source_db: str, sink_db: str) -> None:
    """A trigger, an index or a local column that appears at the sink is respected by the next transaction."""
    with Kit(source_db, sink_db) as kit:
        start(kit)
        kit.at_sink("ALTER TABLE t ADD COLUMN local text DEFAULT 'kept'; UPDATE t SET local = 'old'")
        kit.run("UPDATE t SET id = 100 WHERE id = 1")
        settle(kit, "t")
        assert kit.at_sink("SELECT local FROM t WHERE id = 100") == [("old",)]
        kit.at_sink("CREATE TABLE seen (op text)")
        kit.at_sink(
            "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO public.seen VALUES (TG_OP); RETURN NULL; END $$;"
            "CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION audit();"
            "ALTER TABLE t ENABLE ALWAYS TRIGGER audit"
        )
        kit.run("UPDATE t SET id = 101 WHERE id = 100")
        kit.run("UPDATE t SET v = 0 WHERE id = 2")
        settle(kit, "t")
        assert kit.at_sink("SELECT op, count(*) FROM seen GROUP BY 1") == [("UPDATE", 2)]
        assert kit.at_sink("SELECT conflicts FROM tablewire.positions WHERE table_name = 'public.t'") == [(0,)]
