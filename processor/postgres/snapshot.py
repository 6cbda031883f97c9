"""The first copy of tables: an exported snapshot of the source, COPY out of it and into the sink.

The snapshot comes with a temporary slot whose position P splits the source's transactions exactly: those that end at or before
P are in the snapshot, the others come as changes. A copy is one transaction at the sink, with the position P and the word that
it is done, so a crash leaves nothing of it. Tables that wait together share a snapshot. A thread of its own; errors go to the
tables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence

import psycopg
from psycopg import sql

from processor.postgres.replication import ReplicationConnection
from processor.postgres.sinks import SinkSession, SinkUnavailableError
from processor.postgres.source_catalogue import SourceCatalogue, copy_cast
from processor.postgres.table_work import TableWork
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
    quoted,
)

CHUNK_BYTES = 256 * 1024
GROUP_MAX = 32
"""Tables of one snapshot: it stays open until the last of them is copied."""
LOOK_INTERVAL_S = 1.0
CANCEL_AFTER_S = 0.5


class SnapshotRunner:
    """See the module. claim: gives tables that wait for a copy, each of them to one caller only."""

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
        self._session = session
        self._waiting = waiting
        self._crashed = crashed
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._replication: ReplicationConnection | None = None
        self._source: Connection | None = None
        self.thread = threading.Thread(target=self._run, name="postgres-snapshot", daemon=True)

    def wake(self) -> None:
        """Tables may wait. Any thread."""
        self._woken.set()

    def stop(self) -> None:
        """Ends soon, unfinished copies leave nothing. Any thread; join `thread` to wait."""
        self._stopping.set()
        self._woken.set()
        replication = self._replication
        if replication is not None:
            replication.abort()

    def join(self) -> None:
        """After `stop`: returns when the thread can write no more; a copy that waits for one of the servers is cut off."""
        if self.thread.ident is None:
            return
        self.thread.join(CANCEL_AFTER_S)
        if self.thread.is_alive():
            self._session.cancel()
            self.thread.join(CANCEL_AFTER_S)
        while self.thread.is_alive():
            self._session.cut()
            source, replication = self._source, self._replication
            if source is not None:
                cut(source)
            if replication is not None:
                replication.abort()
            self.thread.join(CANCEL_AFTER_S)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                tables = list(self._waiting())[:GROUP_MAX]
                if tables:
                    self._copy_group(tables)
                else:
                    self._woken.wait(LOOK_INTERVAL_S)
                    self._woken.clear()
        except BaseException as error:
            self._crashed(error)
            raise
        finally:
            self._session.close()

    def _copy_group(self, tables: Sequence[TableWork]) -> None:
        try:
            with connect(self._uri, application_name="tablewire snapshot") as source:
                self._source = source
                position = self._take_snapshot(source)
                for table in tables:
                    # A copy that broke leaves the source's transaction broken: the others wait for the next snapshot.
                    if self._stopping.is_set() or not self._copy_table(source, table, position):
                        return
                source.execute(b"COMMIT")
        except SourceUnavailableError as error:
            self._retry(tables, SinkUnavailableError(str(error)))
        except OperatingError as error:
            self._retry(tables, error)
        except psycopg.Error as error:
            self._retry(tables, SinkUnavailableError(f"snapshot of the source: {error_text(error)}"))
        finally:
            self._source = None

    def _take_snapshot(self, source: Connection) -> Ts:
        """Puts the connection into a new snapshot; its position. The slot that came with it is of no more use then."""
        replication = self._connect_replication("snapshot")
        self._replication = replication
        try:
            position, name = replication.create_snapshot_slot()
            source.execute(b"SET search_path = ''; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            source.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(name))
            return position
        finally:
            self._replication = None
            replication.close()

    def _retry(self, tables: Sequence[TableWork], error: OperatingError) -> None:
        """The snapshot as a whole broke: the tables that were not copied try again, or fail."""
        if self._stopping.is_set():
            return
        for table in tables:
            if table.begin_snapshot() is not None:
                table.end_snapshot(None, error)

    def _copy_table(self, source: Connection, table: TableWork, position: Ts) -> bool:
        """False when the copy broke."""
        claimed = table.begin_snapshot()
        if claimed is None:
            return True
        _, fence = claimed
        failure: OperatingError | None = None
        done: Ts | None = None
        try:
            schema = describe_table(source, table.table_id)
            if schema is None:
                raise OperatingError(f"table {table.table_id} does not exist at the source")
            transaction = self._session.begin(schema, fence)
            rows = self._rows(source, schema)
            try:
                transaction.copy(schema, table.watch_snapshot(rows), position)
                transaction.commit()
                done = position
            finally:
                rows.close()
                if done is None:
                    transaction.rollback()
        except OperatingError as error:
            failure = error
        except psycopg.Error as error:
            kind = SinkUnavailableError if is_connection_loss(error) else OperatingError
            failure = kind(f"snapshot of table {table.table_id}: {error_text(error)}")
            if source.closed:
                raise
        finally:
            self._session.forget(table.table_id)
            table.end_snapshot(done, failure)
        return done is not None

    def _rows(self, source: Connection, schema: TableSchema) -> Generator[tuple[bytes, int], None, None]:
        """The table as chunks of a COPY BINARY stream, with the number of rows in each."""
        types = self._catalogue.types_with_parts([column.type_oid for column in schema.columns])
        columns = []
        for column in schema.columns:
            cast = copy_cast(types, column.type_oid, self._binary)
            columns.append(f"{quoted(column.name)}{'::pg_catalog.' + cast if cast else ''}")
        statement = f"COPY (SELECT {', '.join(columns)} FROM ONLY {schema.quoted}) TO STDOUT (FORMAT binary)"
        try:
            with source.cursor() as cursor, cursor.copy(statement.encode()) as copy:
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
            kind = SinkUnavailableError if is_connection_loss(error) else OperatingError
            raise kind(f"snapshot of table {schema.full_name}: {error_text(error)}") from None
