"""The first copy of tables: an exported snapshot of the source, COPY out of it and into the sink.

The snapshot comes with a temporary slot whose position P divides the source's transactions exactly:
those that end at or before P are in the snapshot, the others arrive as changes. A copy is one
transaction at the sink, together with the position P and the record that it is done, so a crash leaves
nothing of it. Tables that wait at the same time share a snapshot; one that is locked, or was changed after
the snapshot, waits for another while the others are copied. Each runner has its own thread; errors are
reported to the tables.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import psycopg
import structlog
from psycopg import sql

from processor.postgres.sinks import SinkSession, SinkUnavailableError
from processor.postgres.source.catalogue import SourceCatalogue
from processor.postgres.source.replication import ReplicationConnection
from processor.postgres.source.shape_reader import read_shape
from processor.postgres.source.snapshots import table_version
from processor.postgres.tables.life import Writer
from processor.postgres.tables.table_work import TableWork
from processor.postgres.tables.threads import new_thread
from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
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
LOCK_TIMEOUT_MS = 1_000
"""How long the copies of the other tables of a snapshot may wait for the lock of one."""
SINK_FAILURES_MAX = 3
"""After this number of tables in a row for which the sink was unavailable, the rest wait for the next snapshot."""
WAKE_INTERVAL_S = 1.0

_log = structlog.get_logger(__name__)


class SnapshotRunner:
    """See the module.

    waiting: returns the tables that wait for a copy. error_after_s: after this long they show what delays it.
    """

    def __init__(
        self,
        uri: str,
        connect_replication: Callable[[str], ReplicationConnection],
        catalogue: SourceCatalogue,
        binary: bool,
        session: SinkSession,
        waiting: Callable[[], Sequence[TableWork]],
        error_after_s: float,
        crashed: Callable[[BaseException], None],
    ) -> None:
        self._uri = uri
        self._connect_replication = connect_replication
        self._catalogue = catalogue
        self._binary = binary
        self.session = session
        self._waiting = waiting
        self._error_after_s = error_after_s
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
                if tables := sorted(self._waiting(), key=lambda table: -table.copy_delays)[:GROUP_MAX]:
                    self._copy_group(tables)
                else:
                    self._woken.wait(WAKE_INTERVAL_S)
                    self._woken.clear()
        finally:
            self.session.close()

    def _copy_group(self, tables: Sequence[TableWork]) -> None:
        """Copy tables under one snapshot. One that cannot be copied now is left to another snapshot, or fails."""
        try:
            with connect(self._uri, application_name="tablewire snapshot", is_raw=True) as source:
                self._source = source
                requested_at = time.monotonic()
                position = self._take_snapshot(source)
                failures = 0
                for table in tables:
                    if self._stopping.is_set() or failures >= SINK_FAILURES_MAX:
                        return
                    if (writer := table.begin_copy(requested_at)) is not None:
                        is_unavailable = self._copy_table(source, table, writer, position)
                        failures = failures + 1 if is_unavailable else 0
                        # Gives the locks of this table back.
                        source.execute("ROLLBACK TO SAVEPOINT tablewire_copy")
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
        started = time.monotonic()
        try:
            position, name = replication.create_snapshot_slot(lambda: self._report_wait(replication.pid, started))
            source.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            source.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(name))
            source.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; SAVEPOINT tablewire_copy")
            return position
        finally:
            self._replication = None
            replication.close()

    def _report_wait(self, pid: int, started: float) -> None:
        """Fail tables that have waited for long, and name the transaction that delays them; they come back and wait again."""
        late = time.monotonic() - self._error_after_s
        if started > late or not (tables := [table for table in self._waiting() if table.waits_for_copy_since < late]):
            return
        try:
            awaited = self._catalogue.awaited_transaction(pid)
        except OperatingError:
            return
        if awaited:
            _log.warning("postgres_copy_waits", awaited=awaited, tables=len(tables))
            for table in tables:
                name = table.schema.full_name if table.schema is not None else table.table_id
                table.fail(OperatingError(f"table {name}: its first copy waits for {awaited}: end it at the source"))

    def _retry(self, tables: Sequence[TableWork], error: OperatingError) -> None:
        """Have the tables that were not copied retry, or fail: the snapshot as a whole has failed."""
        if not self._stopping.is_set():
            for table in tables:
                if table.begin_copy(math.inf) is not None:
                    table.fail_copy(error)

    def _copy_table(self, source: Connection, table: TableWork, writer: Writer, position: Ts) -> bool:
        """Copy a table; return whether the sink was unavailable. Errors are the table's."""
        failure: OperatingError | None = None
        is_done = False
        try:
            if (schema := self._lock(source, table.table_id, writer.schema)) is None:
                _log.info("postgres_copy_needs_newer_snapshot", table=writer.schema.full_name)
                table.delay_copy()
                return False
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
        return isinstance(failure, SinkUnavailableError)

    def _lock(self, source: Connection, table_id: TableID, known: TableSchema) -> TableSchema | None:
        """Lock the table for reading and return it as the snapshot sees it; None if it has been changed since.

        Under the lock it can neither be rewritten, which would make it empty for the snapshot, nor
        renamed or altered.
        """
        schema = None
        try:
            if (schema := describe_table(source, table_id, self._catalogue.rules.generated)) is not None:
                source.execute(f"LOCK TABLE {schema.rows_of} IN ACCESS SHARE MODE")
        except psycopg.errors.LockNotAvailable:
            holder = self._catalogue.lock_holder(table_id) or "another process"
            raise SourceUnavailableError(
                f"table {known.full_name}: its first copy waits for a lock at the source, held by {holder}"
            ) from None
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            schema = None  # renamed, moved or dropped
        now = self._catalogue.table_version(table_id)
        if not now:
            raise OperatingError(f"table {known.full_name} no longer exists at the source")
        if schema is None or table_version(source, table_id) != now:
            return None
        return replace(schema, shape=read_shape(source, table_id, self._catalogue.rules.generated))

    def _rows(self, source: Connection, schema: TableSchema) -> Generator[tuple[bytes, int], None, None]:
        """Yield the table as chunks of a COPY, each of whole rows, with their number; see SinkSession.takes_copy_text."""
        is_binary = self._binary and self._catalogue.copies_in_binary(schema)
        form = "text" if not is_binary and self.session.takes_copy_text else "binary"
        cast = "" if is_binary or form == "text" else "::pg_catalog.text"
        columns = ", ".join(f"{quoted(column.name)}{cast}" for column in schema.columns)
        statement = f"COPY (SELECT {columns} FROM {schema.rows_of}) TO STDOUT (FORMAT {form})"
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
            raise _copy_error(schema.full_name, error) from None


def _copy_error(table: str, error: psycopg.Error) -> OperatingError:
    kind = SourceUnavailableError if is_connection_loss(error) else OperatingError
    return kind(f"snapshot of table {table}: {error_text(error)}{policy_hint(error, 'source')}")
