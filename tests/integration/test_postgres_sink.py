"""The PostgreSQL sink's sessions, driven by hand: what an old writer, a rollback and a strange name can do."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import psycopg
import pytest

from processor.postgres.sinks import Fence, SinkUnavailableError, WriteNotAllowedError
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.postgres_sink import PostgresSession
from processor.postgres.source.pgoutput import Part, Relation, RelationColumn, Transaction
from tablewire.errors import EpochRefusedError, OperatingError
from tablewire.postgres.catalogue import TableSchema
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, wait_until

pytestmark = pytest.mark.integration
DEADLINE_S = 20.0
INT4_OID = 23


def relation(schema: TableSchema, columns: Sequence[str]) -> Relation:
    """The shape with these columns, all of them int, the first one the key."""
    shape = tuple(RelationColumn(name, INT4_OID, -1, not at) for at, name in enumerate(columns))
    return Relation(schema.table_id, schema.schema, schema.name, "d", shape)


def inserts(shape: Relation, rows: Sequence[Sequence[int]], commit_ts: int) -> list[Part]:
    """One source transaction that inserts these rows."""
    head = b"w" + bytes(24) + b"I" + struct.pack(">I", shape.relation_id) + b"N" + struct.pack(">H", len(shape.columns))
    frames = [head + b"".join(b"b" + struct.pack(">Ii", 4, value) for value in row) for row in rows]
    return [Part(shape, frames, 100, Transaction(commit_ts, 0, 1), commit_ts + 8, True)]


def write(session: PostgresSession, schema: TableSchema, fence: Fence, parts: list[Part]) -> None:
    transaction = session.begin(schema, fence)
    try:
        transaction.apply(parts, True)
        transaction.commit()
    except BaseException:
        transaction.rollback()
        raise


def session_of(kit: Kit, capture: str, name: str, **changes: object) -> tuple[PostgresSession, TableSchema]:
    """A session as a worker of that capture has it, and the table's shape at the source."""
    executor = kit.executor(capture, **changes)  # type: ignore[arg-type]
    session = executor._sink.session()
    assert isinstance(session, PostgresSession)
    return session, executor._catalogue.describe(kit.span(name).table_id)


def test_scenario_12_old_writer_paused_behind_its_pipeline_blocks_nobody(source_db: str, sink_db: str) -> None:
    """Its lock, changes and position are sent in one go: the sink refuses them itself, without waiting for the writer to look at
    the answers, so the new writer does not wait for it either."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.start()
        (old, schema), (new, _) = session_of(kit, "old", "t"), session_of(kit, "new", "t")
        shape = relation(schema, ["id"])
        first, second = Fence(1, 1, 1), Fence(1, 1, 2)
        old.take_over(schema, first, 100, False)
        write(old, schema, first, inserts(shape, [[1]], 200))
        new.take_over(schema, second, 100, False)
        connection = old.connection
        assert connection is not None
        collect, is_sent, may_look = connection._collect, threading.Event(), threading.Event()

        def look_later(expected: Sequence[bool]) -> object:
            connection._flush()
            is_sent.set()
            may_look.wait(DEADLINE_S)
            return collect(expected)

        connection._collect = look_later  # type: ignore[method-assign, assignment]
        refused: list[bool] = []

        def write_late() -> None:
            with pytest.raises(EpochRefusedError, match="another processor"):
                write(old, schema, first, inserts(shape, [[2]], 300))
            refused.append(True)

        late = threading.Thread(target=write_late)
        late.start()
        try:
            assert is_sent.wait(DEADLINE_S)
            write(new, schema, second, inserts(shape, [[2], [3]], 300))
        finally:
            may_look.set()
            late.join()
            old.close()
            new.close()
        assert refused
        assert kit.at_sink("SELECT id FROM t ORDER BY 1") == [(1,), (2,), (3,)]


@pytest.mark.parametrize("trouble", ["lease in doubt", "row is there"])
def test_column_that_was_added_in_a_transaction_that_was_rolled_back(source_db: str, sink_db: str, trouble: str) -> None:
    """The sink's ALTER TABLE is gone with the transaction: the next one makes the column again."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.start()
        may_write = [True]
        session, schema = session_of(kit, "a", "t", may_write=lambda: may_write[0])
        fence = Fence(1, 1, 1)
        session.take_over(schema, fence, 100, False)
        write(session, schema, fence, inserts(relation(schema, ["id"]), [[1]], 200))
        kit.run("ALTER TABLE t ADD COLUMN v int")
        wide = relation(schema, ["id", "v"])
        rows = [[number, number] for number in range(2, 100)]
        if trouble == "row is there":
            kit.at_sink("INSERT INTO t VALUES (50)")  # a COPY finds it, and everything is written in another way
        else:
            may_write[0] = False
            with pytest.raises(WriteNotAllowedError):
                write(session, schema, fence, inserts(wide, rows, 300))
            may_write[0] = True
        write(session, schema, fence, inserts(wide, rows, 300))
        write(session, schema, fence, inserts(wide, [[100, 100]], 400))
        session.close()
        assert kit.at_sink("SELECT count(*), count(v), sum(v) FROM t") == [(100, 99, sum(range(2, 101)))]


def test_connection_that_is_ended_while_it_is_set_up(source_db: str, sink_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the sink's trouble of the moment wherever the session connects, and no bug that would end the process."""

    def end(_: SinkConnection) -> None:
        raise psycopg.errors.AdminShutdown("terminating connection due to administrator command")

    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.start()
        session, schema = session_of(kit, "a", "t")
        monkeypatch.setattr(SinkConnection, "_set_up", end)
        session.warm()
        for call in (
            lambda: session.position(schema, Fence(1, 1, 1)),
            lambda: session.take_over(schema, Fence(1, 1, 1), 100, False),
            lambda: session.begin(schema, Fence(1, 1, 1)).apply(inserts(relation(schema, ["id"]), [[1]], 200), True),
        ):
            with pytest.raises(SinkUnavailableError, match="terminating"):
                call()


def test_a_pooler_that_gives_each_transaction_another_session(source_db: str, sink_db: str) -> None:
    """A name that we have not prepared is taken, or one that we have is gone: the error says what the sink URI leads to."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        kit.start()
        session, schema = session_of(kit, "a", "t")
        fence, shape = Fence(1, 1, 1), relation(schema, ["id"])
        session.take_over(schema, fence, 100, False)
        write(session, schema, fence, inserts(shape, [[1]], 200))
        for statement in ("DEALLOCATE ALL", "PREPARE s1 AS SELECT 1"):
            session.ready().execute(statement)
            with pytest.raises(OperatingError, match="pooler"):
                write(session, schema, fence, inserts(shape, [[2]], 300))
        write(session, schema, fence, inserts(shape, [[2]], 300))
        session.close()
        assert kit.at_sink("SELECT id FROM t ORDER BY 1") == [(1,), (2,)]


def test_names_with_dots_are_told_apart(source_db: str, sink_db: str) -> None:
    """Table b.c of schema a and table c of schema a.b have a position each."""
    with Kit(source_db, sink_db, tables=("*.*",)) as kit:
        for schema, name in (("a.b", "c"), ("a", "b.c")):
            kit.run(f'CREATE SCHEMA "{schema}"')
            kit.run(f'CREATE TABLE "{schema}"."{name}" (id int PRIMARY KEY)')
        start_ts = kit.start()
        executor = kit.executor()
        spans = [kit.span('"a.b".c'), kit.span('a."b.c"')]
        begin(executor, spans, start_ts)
        kit.run('INSERT INTO "a.b".c SELECT generate_series(1, 10)')
        kit.run('INSERT INTO a."b.c" SELECT generate_series(1, 20)')
        kit.wait_equal('"a.b".c', 'a."b.c"')
        target = current(kit)
        for span in spans:
            wait_until(lambda span=span: checkpoint_of(executor, span) >= target, "the checkpoint passes")  # type: ignore[misc]
        names = kit.at_sink("SELECT table_name FROM tablewire.positions ORDER BY 1")
        assert names == [('"a.b".c',), ('a."b.c"',)]
