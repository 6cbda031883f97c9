"""The PostgreSQL sink: data and position in one transaction, fenced by the position's row, so each change is there exactly once.

A write transaction: BEGIN; lock the row of this table if it names us as its writer; the changes; the new position; then, when all
of it went well and may_write says yes, COMMIT. A takeover: lock the row, compare the fence, write ours; whoever held the row's
lock for longer than takeover_wait_ms (a process that was stopped inside a transaction) has its backend ended, which rolls its
work back. So once a takeover has committed, no write of an earlier writer can follow, paused or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import psycopg

from processor.postgres.sinks import Fence, SinkContext, SinkUnavailableError, TakeoverResult, WriteNotAllowedError, positions
from processor.postgres.sinks.bulk import BulkWriter, Stages
from processor.postgres.sinks.connection import COPY_TIMEOUT_S, SinkConnection, sink_error
from processor.postgres.sinks.copying import copy_rows, make_room
from processor.postgres.sinks.targets import TargetPlan, TargetPlanner, WriteMode, create_table
from processor.postgres.source_catalogue import SourceCatalogue
from processor.postgres.wire import Part, Relation
from tablewire.errors import EpochRefusedError, OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import cut, error_text, parse_uri, server_name
from tablewire.postgres.options import PostgresOptions

TAKEOVER_TIMEOUT_S = 10.0
TAKEOVER_IDLE_TIMEOUT_MS = 2_000
"""A process that stops inside a takeover loses it after this long."""


class PostgresSink:
    """Opens the sessions; shared by all threads of an executor."""

    takes_binary = True

    def __init__(self, uri: str, context: SinkContext, catalogue: SourceCatalogue, options: PostgresOptions) -> None:
        parse_uri(uri)
        self._uri = uri
        self._context = context
        self._catalogue = catalogue
        self._options = options

    def session(self) -> PostgresSession:
        return PostgresSession(self._uri, self._context, self._catalogue, self._options)

    def close(self) -> None:
        """The sessions hold everything."""


class PostgresSession:
    """One connection to the sink, made when it is needed."""

    def __init__(self, uri: str, context: SinkContext, catalogue: SourceCatalogue, options: PostgresOptions) -> None:
        self._uri = uri
        self._where = f"sink {server_name(uri)}"
        self._context = context
        self._changefeed = str(context.changefeed)
        self._options = options
        self._planner = TargetPlanner(catalogue, options.binary)
        self._connection: SinkConnection | None = None
        self._stages = Stages()
        self._has_positions = False

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool) -> TakeoverResult:
        deadline = time.monotonic() + TAKEOVER_TIMEOUT_S
        with self._errors(schema):
            while True:
                connection = self._ready()
                if not self._has_positions:
                    positions.create(connection)
                    self._has_positions = True
                try:
                    return self._take_over(connection, schema, fence, granted_ts, wants_snapshot)
                except psycopg.errors.LockNotAvailable:
                    self.rollback()
                    if time.monotonic() > deadline:
                        raise
                    self._end_holders(schema, fence)

    def begin(self, schema: TableSchema, fence: Fence) -> PostgresTransaction:
        return PostgresTransaction(self, schema, fence)

    def request_copy(self, schema: TableSchema, fence: Fence, makes_copies: bool) -> None:
        with self._errors(schema):
            connection = self._ready()
            connection.execute("BEGIN")
            connection.run([positions.lock_statement(self._changefeed, schema.full_name, fence)])
            snapshot = positions.SNAPSHOT_RELOAD if makes_copies else positions.SNAPSHOT_LOST
            connection.execute(positions.reload_sql(self._changefeed, schema.full_name, snapshot))
            self.commit(connection)

    def warm(self) -> None:
        try:
            self._ready()
        except OperatingError:
            return  # the first use will say what is wrong

    def forget(self, table_id: TableID) -> None:
        self._planner.forget(table_id)

    def reset(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._stages = Stages()
            self._planner.rolled_back()
            self._has_positions = False

    def cancel(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.cancel()

    def cut(self) -> None:
        connection = self._connection
        if connection is not None:
            cut(connection.connection)

    def close(self) -> None:
        self.reset()

    def _ready(self) -> SinkConnection:
        """The connection, outside of any transaction."""
        if self._connection is not None and self._connection.is_broken:
            self.reset()
        if self._connection is None:
            try:
                self._connection = SinkConnection(self._uri, self._context.writer, self._options.statement_timeout_ms)
            except psycopg.Error as error:
                raise sink_error(error, self._where) from None
        return self._connection

    def rollback(self) -> None:
        """Ends the open transaction; gives the connection up when that does not work."""
        if self._connection is None:
            return
        self._stages.rolled_back()
        self._planner.rolled_back()
        try:
            self._connection.rollback()
        except psycopg.Error:
            self.reset()

    @contextmanager
    def _errors(self, schema: TableSchema) -> Iterator[None]:
        """Errors of the connection as errors of the sink; the connection is given up after them."""
        try:
            yield
        except psycopg.Error as error:
            if positions.is_refusal(error):
                self.rollback()
                raise EpochRefusedError(_replaced(schema)) from None
            self.reset()
            raise sink_error(error, self._where) from None
        except OperatingError:
            self.rollback()
            raise

    def _take_over(
        self, connection: SinkConnection, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool
    ) -> TakeoverResult:
        fresh = positions.SNAPSHOT_PENDING if wants_snapshot else positions.SNAPSHOT_SKIPPED
        writer = self._context.writer
        connection.execute(
            f"BEGIN; SET LOCAL lock_timeout = {self._options.takeover_wait_ms};"
            f" SET LOCAL idle_in_transaction_session_timeout = {TAKEOVER_IDLE_TIMEOUT_MS};"
            + positions.rename_sql(self._changefeed, schema)
            + positions.insert_sql(self._changefeed, schema, fence, max(granted_ts, schema.published_ts), fresh, writer)
        )
        row = positions.read_row(connection, self._changefeed, schema.full_name, for_update=True)
        if row is None:
            raise SinkUnavailableError(f"{self._where}: the position of {schema.full_name} was removed during a takeover")
        if row.fence > fence:
            raise EpochRefusedError(
                f"table {schema.full_name}: the sink has a newer writer ({_text(row.fence)}) than this one ({_text(fence)})"
            )
        positions.require_kept(connection, self._changefeed, fence, schema.released_ts, self._where)
        position, snapshot = row.position, row.snapshot
        is_same = row.source_table_id == schema.table_id and row.fence.incarnation == fence.incarnation
        if is_same and snapshot == positions.SNAPSHOT_LOST:
            raise OperatingError(
                f"table {schema.full_name} must be copied again, for the sink has lost commits of it, but this changefeed makes"
                " no first copies: remove its row in tablewire.positions to go on without what is missing"
            )
        if not is_same:
            # Another table of that name, or another life of the changefeed: what is there is of no use.
            position = max(granted_ts, schema.published_ts)
            snapshot = positions.SNAPSHOT_RELOAD if wants_snapshot else positions.SNAPSHOT_SKIPPED
        elif position < schema.published_ts and snapshot in (positions.SNAPSHOT_DONE, positions.SNAPSHOT_SKIPPED):
            # It left the publication and came back: what was written meanwhile will never arrive as changes.
            if not wants_snapshot:
                raise OperatingError(
                    f"table {schema.full_name} was outside of the changefeed's tables for a while, and what was written to it"
                    " then is not at the sink: remove its row in tablewire.positions to go on without, or start a changefeed"
                    " with a first copy"
                )
            snapshot = positions.SNAPSHOT_RELOAD
        connection.execute(positions.take_sql(self._changefeed, schema, fence, position, snapshot, writer))
        create_table(connection, schema)
        self.commit(connection)
        needs_snapshot = snapshot in (positions.SNAPSHOT_PENDING, positions.SNAPSHOT_RELOAD)
        return TakeoverResult(0 if needs_snapshot else position, needs_snapshot)

    def position(self, schema: TableSchema, fence: Fence) -> Ts:
        connection = self._ready()
        with self._errors(schema):
            # FOR UPDATE waits for the backend of a connection that broke: it may be in the middle of its COMMIT.
            connection.execute(f"BEGIN; SET LOCAL lock_timeout = {self._options.takeover_wait_ms}")
            row = positions.read_row(connection, self._changefeed, schema.full_name, for_update=True)
            connection.execute("ROLLBACK")
        if row is None or row.fence != fence:
            raise EpochRefusedError(_replaced(schema))
        return row.position

    def _end_holders(self, schema: TableSchema, fence: Fence) -> None:
        """Ends the backends that hold the table's row, unless a newer writer holds it."""
        connection = self._ready()
        row = positions.read_row(connection, self._changefeed, schema.full_name, for_update=False)
        if row is not None and row.fence > fence:
            raise EpochRefusedError(f"table {schema.full_name}: the sink has a newer writer ({_text(row.fence)})")
        for pid in positions.holders(connection, self._changefeed, schema.full_name):
            connection.execute(f"SELECT pg_terminate_backend({pid})")

    def commit(self, connection: SinkConnection) -> None:
        """COMMIT, if this processor may still write."""
        if not self._context.may_write():
            raise WriteNotAllowedError("the lease of this processor is in doubt")
        connection.execute("COMMIT")
        self._stages.committed()
        self._planner.committed()


class _WriteModeRefusedError(Exception):
    """The transaction is over; what it did may go well in another way."""


def _replaced(schema: TableSchema) -> str:
    return f"table {schema.full_name}: another processor has taken the table over at the sink"


def _text(fence: Fence) -> str:
    return f"changefeed_epoch {fence.changefeed_epoch}, assignment_epoch {fence.assignment_epoch}"


class PostgresTransaction:
    """One write transaction of one table. It begins with the first call of apply or copy."""

    def __init__(self, session: PostgresSession, schema: TableSchema, fence: Fence) -> None:
        self._session = session
        self._schema = schema
        self._lock = positions.lock_statement(session._changefeed, schema.full_name, fence)
        self._is_open = False

    def apply(self, parts: Sequence[Part], is_last: bool) -> int:
        session = self._session
        with session._errors(self._schema):
            if self._is_open:
                try:
                    self._write(self._open_connection(), parts, is_last, may_copy=False)
                except _WriteModeRefusedError as error:
                    # What was applied before is lost with the transaction: all of it is read again.
                    raise SinkUnavailableError(f"table {self._schema.full_name}: {error}") from None
            else:
                session._stages.trim(session._ready())
                self._write_first(parts, is_last)
        return sum(len(part.frames) for part in parts)

    def _write_first(self, parts: Sequence[Part], is_last: bool) -> None:
        """Begins the transaction with these parts, again in another way if one is refused."""
        while True:
            try:
                self._write(self._session._ready(), parts, is_last, may_copy=is_last)
                return
            except _WriteModeRefusedError:
                self._session.rollback()
                self._is_open = False

    def _write(self, connection: SinkConnection, parts: Sequence[Part], is_last: bool, may_copy: bool) -> None:
        """Writes the parts; begins the transaction if it is not open. _WriteModeRefusedError: a constraint was
        violated, and the plans have another write mode."""
        plans: list[TargetPlan] = []
        try:
            self._write_parts(connection, parts, is_last, may_copy, plans)
        except psycopg.IntegrityError as error:
            others = [plan for plan in plans if plan.mode is not WriteMode.SINGLE]
            if not others:
                raise
            for plan in others:
                plan.mode = WriteMode(plan.mode + 1)
            raise _WriteModeRefusedError(error_text(error)) from None

    def _write_parts(
        self, connection: SinkConnection, parts: Sequence[Part], is_last: bool, may_copy: bool, plans: list[TargetPlan]
    ) -> None:
        writer = BulkWriter(connection, self._session._stages, may_copy)
        if not self._is_open:
            writer.add(("BEGIN", ()))
            writer.add(self._lock)
            self._is_open = True
        if is_last:
            # Behind the lock, so nothing that is refused; first, so that it costs no round trip of its own.
            writer.add(positions.move_statement(self._session._changefeed, self._schema.full_name, parts[-1].end_ts))
        at = 0
        while at < len(parts):
            relation = parts[at].relation
            end = at + 1
            while end < len(parts) and parts[end].relation is relation:
                end += 1
            plan = self._plan(writer, relation)
            plans.append(plan)
            writer.write(plan, [frame for part in parts[at:end] for frame in part.frames])
            at = end
        writer.flush()

    def copy(self, schema: TableSchema, rows: Iterable[bytes], position: Ts) -> None:
        session = self._session
        with session._errors(self._schema):
            connection = session._ready()
            connection.execute("BEGIN; SET LOCAL statement_timeout = 0")
            connection.patience_s = COPY_TIMEOUT_S
            self._is_open = True
            connection.run([self._lock])
            row = positions.read_row(connection, session._changefeed, schema.full_name, for_update=False)
            assert row is not None
            may_empty = row.snapshot == positions.SNAPSHOT_RELOAD or session._options.existing_rows != "refuse"
            make_room(connection, schema, may_empty)
            copy_rows(connection, session._planner, schema, rows)
            columns = tuple(column.name for column in schema.columns)
            connection.execute(positions.columns_statement(session._changefeed, schema.full_name, columns))
            connection.execute(positions.snapshot_statement(session._changefeed, schema.full_name, position))

    def commit(self) -> None:
        with self._session._errors(self._schema):
            self._session.commit(self._open_connection())
        self._is_open = False

    def rollback(self) -> None:
        if self._is_open:
            self._is_open = False
            self._session.rollback()

    def _open_connection(self) -> SinkConnection:
        """The connection that this transaction is open on."""
        connection = self._session._connection
        if connection is None:
            raise SinkUnavailableError(f"{self._session._where}: the connection was lost inside a transaction")
        return connection

    def _plan(self, writer: BulkWriter, relation: Relation) -> TargetPlan:
        session = self._session
        plan = session._planner.cached(relation)
        if plan is None:
            writer.flush()  # the fence first, and what came before the change of shape
            connection = writer.connection
            row = positions.read_row(connection, session._changefeed, self._schema.full_name, for_update=False)
            plan = session._planner.plan(connection, self._schema, relation, row.columns if row is not None else ())
            names = tuple(column.name for column in relation.columns)
            if row is None or row.columns != names:
                connection.execute(positions.columns_statement(session._changefeed, self._schema.full_name, names))
        return plan
