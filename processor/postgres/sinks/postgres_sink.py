"""The PostgreSQL sink: data and position in one transaction, fenced by the row of the position: exactly once.

A write transaction: BEGIN; lock the row of this table if it names us as its writer; the changes; the new
position; then, if all of it succeeded and may_write returns True, COMMIT. A takeover: lock the row,
compare the fences, write ours. A backend that holds the lock for longer than takeover_wait_ms (its
process was stopped inside a transaction) is terminated, which rolls its work back. So after a takeover
has committed, no write of an earlier writer can follow, paused or not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby

import psycopg

from processor.postgres.sinks import (
    Fence,
    SinkContext,
    SinkSession,
    SinkUnavailableError,
    TakeoverResult,
    positions,
)
from processor.postgres.sinks.bulk import BulkWriter, Stages
from processor.postgres.sinks.conflicts import CAREFUL_TRANSACTIONS, CarefulWriter, ConflictLog
from processor.postgres.sinks.connection import (
    COPY_TIMEOUT_S,
    POOLER_CODES,
    RowCountError,
    SinkConnection,
    Statement,
    is_retried,
    sink_error,
)
from processor.postgres.sinks.copying import copy_rows
from processor.postgres.sinks.following import ShapeFollower
from processor.postgres.sinks.origin import mark_statement
from processor.postgres.sinks.planner import TargetPlanner
from processor.postgres.sinks.plans import TargetPlan
from processor.postgres.sinks.positions import Positions
from processor.postgres.sinks.sink_identity import (
    adopt_table,
    require_same_table,
    verify_statement,
    why_not_the_same,
)
from processor.postgres.sinks.takeovers import decide_start
from processor.postgres.sinks.target_tables import create_table
from processor.postgres.source.catalogue import SourceCatalogue
from processor.postgres.source.pgoutput import Part
from processor.postgres.source.shape_watch import PendingChange, ShapeWatch
from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import cut, error_text, server_name
from tablewire.postgres.options import PostgresOptions
from tablewire.postgres.sink_checkpoint import require_no_lost_commits
from tablewire.postgres.sink_tables import create_sink_tables

TAKEOVER_TIMEOUT_S = 10.0
TAKEOVER_IDLE_TIMEOUT_MS = 2_000
"""A process that stops inside a takeover loses it after this long."""
_PART = "tablewire_part"
"""The savepoint before each further part of a large transaction."""


class PostgresSession(SinkSession):
    """One connection to the sink, opened when it is needed."""

    takes_copy_text = True

    def __init__(self, uri: str, context: SinkContext, catalogue: SourceCatalogue, options: PostgresOptions) -> None:
        self.name = f"sink {server_name(uri)}"
        self.options = options
        self.positions = Positions(str(context.changefeed), context.writer)
        self.watch = context.shapes or ShapeWatch(catalogue)
        self.follower = ShapeFollower(self.watch, self.positions, options.on_shape_change == "copy")
        self.planner = TargetPlanner(catalogue, self.watch, options.binary)
        self.stages = Stages()
        self.conflicts = ConflictLog(context.conflicts)
        self.connection: SinkConnection | None = None
        self._uri = uri
        self._context = context
        self._catalogue = catalogue
        self._mark: Statement | None = None
        self._has_positions = False

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool) -> TakeoverResult:
        deadline = time.monotonic() + TAKEOVER_TIMEOUT_S
        if not wants_snapshot:
            schema = self._with_shape(schema)
        with self.errors(schema):
            while True:
                connection = self.ready()
                if not self._has_positions:
                    connection.call(create_sink_tables)
                    self._has_positions = True
                try:
                    schema = self.follower.locate(connection, schema, fence)
                    return self._take_over(connection, schema, fence, granted_ts, wants_snapshot)
                except psycopg.errors.LockNotAvailable:
                    self.rollback()
                    if time.monotonic() > deadline:
                        raise
                    self._end_holders(schema, fence)

    def begin(self, schema: TableSchema, fence: Fence) -> PostgresTransaction:
        return PostgresTransaction(self, self.watch.located(schema), fence)

    def follow(self, schema: TableSchema, fence: Fence, pending: PendingChange) -> None:
        schema = self.watch.located(schema)
        with self.errors(schema):
            connection = self.ready()
            connection.add(*self.begin_statements(self.positions.lock_statement(schema.full_name, fence)))
            row = self.positions.read(connection, schema.full_name)
            if row is None or row.snapshot not in (positions.SNAPSHOT_DONE, positions.SNAPSHOT_SKIPPED):
                self.rollback()
            elif self.follower.follow(connection, schema, row, pending):
                self.planner.forget(schema.table_id)
                self.commit(connection)
            else:
                connection.execute("ROLLBACK")
                self.follower.committed()  # nothing was written: it notes what the sink had already

    def request_copy(self, schema: TableSchema, fence: Fence, makes_copies: bool) -> None:
        schema = self.watch.located(schema)
        with self.errors(schema):
            connection = self.ready()
            connection.add(("BEGIN", ()), self.positions.lock_statement(schema.full_name, fence))
            snapshot = positions.SNAPSHOT_RELOAD if makes_copies else positions.SNAPSHOT_LOST
            self.positions.set_snapshot(connection, schema.full_name, snapshot)
            self.commit(connection)

    def warm(self) -> None:
        with suppress(OperatingError, psycopg.Error):  # the first use will report it
            self.ready()

    def forget(self, table_id: TableID) -> None:
        self.planner.forget(table_id)

    def cancel(self) -> None:
        if (connection := self.connection) is not None:
            connection.cancel()

    def cut(self) -> None:
        if (connection := self.connection) is not None:
            cut(connection.connection)

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
            self.stages = Stages()
            self.planner.rolled_back()
            self.follower.rolled_back()
            self._has_positions = False

    def ready(self) -> SinkConnection:
        """Return the connection, outside of any transaction."""
        if self.connection is not None and self.connection.is_broken:
            self.close()
        if self.connection is None:
            self.connection = SinkConnection(self._uri, self._context.writer, self.options.statement_timeout_ms)
            self._mark = mark_statement(self.connection, self._catalogue.identity())
        return self.connection

    def begin_statements(self, lock: Statement) -> list[Statement]:
        """Return the statements that begin a write transaction. lock: fails if another writer has taken the table over."""
        return [("BEGIN", ()), lock] if self._mark is None else [("BEGIN", ()), lock, self._mark]

    def rollback(self) -> None:
        """End the open transaction; close the connection if that fails."""
        if self.connection is None:
            return
        self.rolled_back()
        try:
            self.connection.rollback()
        except psycopg.Error:
            self.close()

    def rolled_back(self) -> None:
        """Forget what the open transaction has made."""
        self.stages.rolled_back()
        self.planner.rolled_back()
        self.follower.rolled_back()

    def drop_plans(self, plans: Sequence[TargetPlan], error: psycopg.Error) -> bool:
        """Drop plans after an error that new ones may avoid; return False if there is no such hope."""
        is_hopeless = is_retried(error) or positions.is_refusal(error) or error.sqlstate in POOLER_CODES
        if is_hopeless or not any(self.planner.is_committed(plan) for plan in plans):
            return False
        for plan in plans:
            self.planner.forget(plan.relation.relation_id)
        self.stages.forget(plans)
        return True

    @contextmanager
    def errors(self, schema: TableSchema) -> Iterator[None]:
        """Translate errors of the connection, and close it after them."""
        try:
            yield
        except psycopg.Error as error:
            if positions.is_refusal(error):
                self.rollback()
                raise positions.replaced(schema) from None
            self.close()
            raise sink_error(error, f"{self.name}: table {schema.full_name}") from None
        except OperatingError:
            self.rollback()
            raise

    def _take_over(
        self, connection: SinkConnection, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool
    ) -> TakeoverResult:
        start_ts = max(granted_ts, schema.published_ts)
        row = self.positions.begin_takeover(
            connection,
            schema,
            fence,
            start_ts,
            positions.SNAPSHOT_PENDING if wants_snapshot else positions.SNAPSHOT_SKIPPED,
            lock_timeout_ms=self.options.takeover_wait_ms,
            idle_timeout_ms=TAKEOVER_IDLE_TIMEOUT_MS,
        )
        if row is None:
            raise SinkUnavailableError(f"{self.name}: the position of {schema.full_name} was removed during a takeover")
        positions.require_greatest(schema, row.fence, fence)
        checked = (self.positions.changefeed, fence.incarnation, schema.released_ts, self.name, schema.server)
        connection.call(lambda found: require_no_lost_commits(found, *checked))
        is_same = row.source_table_id == schema.table_id and row.fence.incarnation == fence.incarnation
        why_copy = self._why_copy(connection, schema, row.snapshot) if is_same else ""
        position, snapshot = decide_start(row, schema, is_same, start_ts, wants_snapshot, why_copy)
        self.positions.take_over(connection, schema, fence, position, snapshot)
        if is_created := create_table(connection, schema):
            schema = self._with_shape(schema)
        if snapshot in (positions.SNAPSHOT_DONE, positions.SNAPSHOT_SKIPPED):
            adopt_table(connection, self.positions.changefeed, schema)
        starts_as_it_is = is_created or snapshot == positions.SNAPSHOT_SKIPPED
        applied = self.follower.take_over(connection, schema, row, is_same and not is_created, starts_as_it_is)
        self.commit(connection)
        self.watch.set_applied(schema.table_id, applied)
        needs_snapshot = snapshot in (positions.SNAPSHOT_PENDING, positions.SNAPSHOT_RELOAD)
        return TakeoverResult(0 if needs_snapshot else position, needs_snapshot)

    def _with_shape(self, schema: TableSchema) -> TableSchema:
        """Return the description with the present shape of the source's table; without one if it has other columns."""
        shape = self.watch.read((schema.table_id,)).shapes.get(schema.table_id)
        if shape is not None and any(
            (one := shape.named(c.name)) is None or one.type_text != c.type_text for c in schema.columns
        ):
            shape = None
        return replace(schema, shape=shape)

    def _why_copy(self, connection: SinkConnection, schema: TableSchema, snapshot: str) -> str:
        is_filled = snapshot == positions.SNAPSHOT_DONE
        if not is_filled and snapshot != positions.SNAPSHOT_SKIPPED:
            return ""
        return why_not_the_same(connection, self.positions.changefeed, schema, is_filled)

    def position(self, schema: TableSchema, fence: Fence) -> Ts:
        schema = self.watch.located(schema)
        with self.errors(schema):
            connection = self.ready()
            # FOR UPDATE waits for the backend of a broken connection, which may be in the middle of its COMMIT.
            connection.execute(f"BEGIN; SET LOCAL lock_timeout = {self.options.takeover_wait_ms}")
            row = self.positions.read(connection, schema.full_name, for_update=True)
            connection.execute("ROLLBACK")
        if row is None or row.fence != fence:
            raise positions.replaced(schema)
        return row.position

    def _end_holders(self, schema: TableSchema, fence: Fence) -> None:
        """Terminate the backends that lock the table's row, unless a newer writer does."""
        connection = self.ready()
        if (row := self.positions.read(connection, schema.full_name)) is not None:
            positions.require_greatest(schema, row.fence, fence)
        for pid in self.positions.holders(connection, schema.full_name):
            connection.query("SELECT pg_terminate_backend(%s)", (pid,))

    def commit(self, connection: SinkConnection) -> None:
        """Commit, if this processor may still write."""
        self._context.require_allowed()
        connection.execute("COMMIT")
        self.stages.committed()
        self.planner.committed()
        self.follower.committed()


class PostgresTransaction:
    """A write transaction of one table. It begins with the first call of apply or copy."""

    def __init__(self, session: PostgresSession, schema: TableSchema, fence: Fence) -> None:
        self._session = session
        self._schema = schema
        self._table = schema.full_name
        self._lock = session.positions.lock_statement(self._table, fence)
        self._is_open = False
        self._has_replanned = False
        self._is_careful = False
        """Parts had to be written again. A plan forgets this if the shape is followed again in the repetition."""
        self._found: Counter[str] = Counter()
        self._key_names: Sequence[str] = ()

    def apply(self, parts: Sequence[Part], is_last: bool) -> int:
        is_first = not self._is_open
        with self._session.errors(self._schema):
            if is_first:
                self._session.stages.trim(self._session.ready())
            elif self._session.connection is not None:
                self._session.connection.add((f"SAVEPOINT {_PART}", ()))
            while not self._write(parts, is_last, is_first):
                self._undo(is_first)
        return sum(len(part.frames) for part in parts)

    def _write(self, parts: Sequence[Part], is_last: bool, is_first: bool) -> bool:
        """Write the parts; return False if they must be undone and written again, in another way."""
        connection = self._session.ready() if is_first else self._open_connection()
        plans: list[TargetPlan] = []
        try:
            self._write_parts(connection, parts, is_last, plans)
        except psycopg.errors.ForeignKeyViolation:
            raise
        except (psycopg.IntegrityError, RowCountError):
            if self._is_careful or all(plan.careful for plan in plans):
                raise
            self._is_careful = True
            for plan in plans:
                plan.careful = CAREFUL_TRANSACTIONS
            return False
        except psycopg.Error as error:
            # The table may have changed since it was planned: a new plan either writes it or says what is wrong.
            if self._has_replanned or not self._session.drop_plans(plans, error):
                raise
            self._has_replanned = True
            if not is_first:
                # What was applied before is lost with the transaction: all of it is read again.
                raise SinkUnavailableError(f"table {self._table}: {error_text(error)}") from None
            return False
        return True

    def _undo(self, is_first: bool) -> None:
        """Undo the parts that could not be written, and nothing before them."""
        if is_first:
            self.rollback()
        else:
            self._session.rolled_back()
            self._open_connection().rollback_to(_PART)

    def _write_parts(self, connection: SinkConnection, parts: Sequence[Part], is_last: bool, plans: list[TargetPlan]) -> None:
        if not self._is_open:
            connection.add(*self._session.begin_statements(self._lock))
            self._is_open = True
        if is_last:
            # After the lock, so nothing that is refused; early, so that it costs no round trip of its own.
            connection.add(self._session.positions.move_statement(self._table, parts[-1].end_ts))
        found: Counter[str] = Counter()
        for _, group in groupby(parts, lambda part: id(part.relation)):
            run = list(group)
            plan = self._plan(connection, run[0])
            plans.append(plan)
            if plan.facts.may_defer:
                connection.add(("SET CONSTRAINTS ALL DEFERRED", ()))
            frames = [frame for part in run for frame in part.frames]
            if plan.careful or self._is_careful:
                found += self._write_carefully(connection, plan, frames, is_last)
            else:
                BulkWriter(connection, self._session.stages).write(plan, frames)
            if plan.facts.may_defer:
                connection.add(("SET CONSTRAINTS ALL IMMEDIATE", ()))
            self._key_names = plan.key_names
        if found:
            connection.add(self._session.positions.conflict_statement(self._table, found.total()))
        # After the writes, whose locks keep the table as it is until the transaction ends.
        connection.add(verify_statement(self._schema.schema, self._schema.name, plans[-1].version))
        connection.flush()
        self._found += found

    def _write_carefully(
        self, connection: SinkConnection, plan: TargetPlan, frames: Sequence[bytes], is_last: bool
    ) -> Counter[str]:
        writer = CarefulWriter(connection, self._table, self._session.options.on_conflict)
        writer.write(plan, frames)
        if writer.has_failed:
            plan.careful = CAREFUL_TRANSACTIONS
        elif is_last and plan.careful > 1:
            plan.careful -= 1
        return writer.found

    def copy(self, schema: TableSchema, rows: Iterable[bytes], position: Ts) -> None:
        session = self._session
        with session.errors(self._schema):
            connection = session.ready()
            connection.timeout_s = COPY_TIMEOUT_S
            self._is_open = True
            connection.add(*session.begin_statements(self._lock), ("SET LOCAL statement_timeout = 0", ()))
            row = session.positions.read(connection, self._table)
            assert row is not None
            may_empty = row.snapshot == positions.SNAPSHOT_RELOAD or session.options.existing_rows != "refuse"
            schema = replace(schema, schema=self._schema.schema, name=self._schema.name)  # as it is called at the sink
            copy_rows(connection, session.planner, schema, rows, may_empty, row.shape)
            session.positions.set_columns(connection, self._table, tuple(column.name for column in schema.columns))
            session.positions.set_snapshot(connection, self._table, positions.SNAPSHOT_DONE, position)
            adopt_table(connection, session.positions.changefeed, schema)
            session.follower.copied(connection, schema, row)

    def commit(self) -> None:
        with self._session.errors(self._schema):
            self._session.commit(self._open_connection())
        self._is_open = False
        if self._found:
            self._session.conflicts.add(self._table, self._key_names, self._found)

    def rollback(self) -> None:
        if self._is_open:
            self._is_open = False
            self._session.rollback()

    def _open_connection(self) -> SinkConnection:
        """Return the connection on which this transaction is open."""
        if self._session.connection is None:
            raise SinkUnavailableError(f"{self._session.name}: the connection was lost inside a transaction")
        return self._session.connection

    def _plan(self, connection: SinkConnection, part: Part) -> TargetPlan:
        session, schema, relation = self._session, self._schema, part.relation
        if session.follower.verify(connection, schema, part):
            session.planner.forget(schema.table_id)
        plan = session.planner.cached(relation)
        if plan is None:
            names = tuple(column.name for column in relation.columns)
            require_same_table(connection, session.positions.changefeed, schema, names)
            plan = session.planner.plan(connection, schema, relation, session.follower.applied(schema.table_id))
            session.positions.set_columns(connection, self._table, names)
            adopt_table(connection, session.positions.changefeed, schema)
        return plan
