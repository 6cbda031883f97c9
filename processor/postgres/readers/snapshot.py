"""The first copy of tables: an exported snapshot of the source, COPY out of it and into the sink.

The snapshot comes with a temporary slot whose position P divides the source's transactions exactly:
those that end at or before P are in the snapshot, the others arrive as changes. A copy is one
transaction at the sink, together with the position P and the record that it is done, so a crash leaves
nothing of it. Tables that wait at the same time share a snapshot. Each runner has its own thread; errors
are reported to the tables.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence

import psycopg
from psycopg import sql

from processor.postgres.sinks import SinkSession, SinkUnavailableError
from processor.postgres.source.catalogue import SourceCatalogue, copy_cast
from processor.postgres.source.replication import ReplicationConnection
from processor.postgres.tables.table_work import TableWork
from processor.postgres.tables.threads import new_thread
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.catalogue import TableSchema, describe_table
from tablewire.postgres.connections import (
    Connection,
    SourceUnavailableError,
    connect,
    cut,
    error_text,
    is_connection_loss,
    policy_hint,
    quoted,
)

CHUNK_BYTES = 256 * 1024
GROUP_MAX = 32
"""Tables of one snapshot, which stays open until the last of them is copied."""
WAKE_INTERVAL_S = 1.0


class SnapshotRunner:
    """See the module. waiting: returns the tables that wait for a copy."""

    def __init__(
        self,
        uri: str,
        connect_replication: Callable[[str], ReplicationConnection],
        catalogue: SourceCatalogue,
        binary: bool,
        session: SinkSession,
        waiting: Callable[[], Sequence[TableWork]],
        crashed: Callable[[BaseException], None],
    ) -> None:
        self._uri = uri
        self._connect_replication = connect_replication
        self._catalogue = catalogue
        self._binary = binary
        self.session = session
        self._waiting = waiting
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._replication: ReplicationConnection | None = None
        self._source: Connection | None = None
        self.thread = new_thread("postgres-snapshot", self._run, crashed)

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        """End soon; unfinished copies leave nothing. Any thread; see `end_threads`."""
        self._stopping.set()
        self._woken.set()
        if (replication := self._replication) is not None:
            replication.abort()

    def cut(self) -> None:
        """End the connections to the source. Any thread."""
        if (source := self._source) is not None:
            cut(source)
        if (replication := self._replication) is not None:
            replication.abort()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if tables := list(self._waiting())[:GROUP_MAX]:
                    self._copy_group(tables)
                else:
                    self._woken.wait(WAKE_INTERVAL_S)
                    self._woken.clear()
        finally:
            self.session.close()

    def _copy_group(self, tables: Sequence[TableWork]) -> None:
        try:
            with connect(self._uri, application_name="tablewire snapshot") as source:
                self._source = source
                requested_at = time.monotonic()
                position = self._take_snapshot(source)
                for table in tables:
                    # A failed copy leaves the source's transaction failed: the others wait for the next snapshot.
                    if self._stopping.is_set() or not self._copy_table(source, table, position, requested_at):
                        return
                source.execute("COMMIT")
        except OperatingError as error:
            self._retry(tables, error)
        except psycopg.Error as error:
            self._retry(tables, SourceUnavailableError(f"snapshot of the source: {error_text(error)}"))
        finally:
            self._source = None

    def _take_snapshot(self, source: Connection) -> Ts:
        """Begin a transaction with a new snapshot; return its position. The slot is not needed any longer."""
        replication = self._connect_replication("snapshot")
        self._replication = replication
        try:
            position, name = replication.create_snapshot_slot()
            source.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            source.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(name))
            return position
        finally:
            self._replication = None
            replication.close()

    def _retry(self, tables: Sequence[TableWork], error: OperatingError) -> None:
        """Have the tables that were not copied retry, or fail: the snapshot as a whole has failed."""
        if not self._stopping.is_set():
            for table in tables:
                if table.begin_copy(math.inf) is not None:
                    table.fail_copy(error)

    def _copy_table(self, source: Connection, table: TableWork, position: Ts, requested_at: float) -> bool:
        """Copy a table unless it no longer waits for that; return False if the copy failed."""
        if (writer := table.begin_copy(requested_at)) is None:
            return True
        failure: OperatingError | None = None
        is_done = False
        try:
            if (schema := describe_table(source, table.table_id)) is None:
                raise OperatingError(f"table {table.table_id} does not exist at the source")
            transaction = self.session.begin(schema, writer.fence)
            rows = self._rows(source, schema)
            try:
                transaction.copy(schema, table.watch_copy(rows), position)
                transaction.commit()
                is_done = True
            finally:
                rows.close()
                if not is_done:
                    transaction.rollback()
        except OperatingError as error:
            failure = error
        except psycopg.Error as error:
            failure = _copy_error(writer.schema.full_name, error)
        self.session.forget(table.table_id)
        if failure is None:
            table.end_copy(position)
        else:
            table.fail_copy(failure)
        return failure is None

    def _rows(self, source: Connection, schema: TableSchema) -> Generator[tuple[bytes, int], None, None]:
        """Yield the table as chunks of a COPY BINARY stream, each of whole rows, with their number."""
        types = self._catalogue.types_with_parts([column.type_oid for column in schema.columns])
        casts = [(column.name, copy_cast(types, column.type_oid, self._binary)) for column in schema.columns]
        columns = ", ".join(f"{quoted(name)}{'::pg_catalog.' + cast if cast else ''}" for name, cast in casts)
        statement = f"COPY (SELECT {columns} FROM {schema.rows_of}) TO STDOUT (FORMAT binary)"
        try:
            with source.cursor() as cursor, cursor.copy(statement) as copy:
                pieces: list[bytes] = []
                size = 0
                for piece in copy:
                    pieces.append(bytes(piece))
                    size += len(piece)
                    if size >= CHUNK_BYTES:
                        if self._stopping.is_set():
                            raise SinkUnavailableError("the executor is closing")
                        yield b"".join(pieces), len(pieces)
                        pieces, size = [], 0
                if pieces:
                    yield b"".join(pieces), len(pieces)
        except psycopg.Error as error:
            raise _copy_error(schema.full_name, error) from None


def _copy_error(table: str, error: psycopg.Error) -> OperatingError:
    kind = SourceUnavailableError if is_connection_loss(error) else OperatingError
    return kind(f"snapshot of table {table}: {error_text(error)}{policy_hint(error, 'source')}")
