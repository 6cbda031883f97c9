"""A COMMIT whose answer is lost, and long keys: what is written once stays written once."""

from __future__ import annotations

import psycopg
import psycopg.sql
import pytest

from processor.postgres.sinks.connection import SinkConnection
from tests.processor.postgres.replication_kit import Kit, begin, wait_until

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("key", ["", "PRIMARY KEY"], ids=["without a key", "with a key"])
def test_commit_whose_answer_is_lost_is_not_repeated(
    source_db: str, sink_db: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The sink has committed and the connection breaks before the answer: the position says that nothing is to be done again."""
    broken = []
    execute = SinkConnection.execute

    def break_after_commit(self: SinkConnection, sql: str) -> object:
        result = execute(self, sql)
        if sql == "COMMIT" and armed and not broken:
            broken.append(sql)
            self._pgconn.finish()
            raise psycopg.OperationalError("the connection was lost behind COMMIT")
        return result

    armed: list[bool] = []
    monkeypatch.setattr(SinkConnection, "execute", break_after_commit)
    with Kit(source_db, sink_db) as kit:
        kit.run(f"CREATE TABLE a (v int {key})")
        kit.run("ALTER TABLE a REPLICA IDENTITY FULL")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES (0)")
        kit.wait_equal("a")
        armed.append(True)
        kit.run("INSERT INTO a SELECT generate_series(1, 60)")
        wait_until(lambda: bool(broken), "the break behind COMMIT")
        kit.run("DELETE FROM a WHERE v > 30")
        kit.run("INSERT INTO a VALUES (99)")
        kit.wait_equal("a")
        assert kit.at_sink("SELECT count(*) FROM a") == kit.run("SELECT count(*) FROM a")


def test_long_keys_that_do_not_change(source_db: str, sink_db: str) -> None:
    """A key value that is stored out of line comes with the old tuple alone; every row keeps its own."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE a (id text PRIMARY KEY, v int)")
        kit.run("ALTER TABLE a ALTER id SET STORAGE EXTERNAL")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, kit.spans(), start_ts)
        kit.run("INSERT INTO a VALUES ('x', 1)")
        kit.wait_equal("a")
        with kit.source_connection.transaction():
            kit.run(
                "INSERT INTO a SELECT (SELECT string_agg(md5(g::text || i::text), '') FROM generate_series(1, 75) i), g"
                " FROM generate_series(1, 30) g"
            )
            kit.run("UPDATE a SET v = v + 100")
        kit.wait_equal("a")


def test_commits_are_durable_whatever_the_role_says(source_db: str, sink_db: str) -> None:
    """A role or database with synchronous_commit = off does not make the checkpoint run ahead of the disk."""
    with psycopg.connect(sink_db, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(psycopg.sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(psycopg.sql.Identifier(name)))
    session = SinkConnection(sink_db, "test", 10_000)
    try:
        assert session.query("SHOW synchronous_commit") == [("on",)]
    finally:
        session.connection.close()
