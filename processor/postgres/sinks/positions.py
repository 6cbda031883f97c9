"""The positions at a PostgreSQL sink: how far each table is, and which writer may write it.

tablewire.positions has one row for each (changefeed, table). It is the fence: every write transaction
first locks the row, and continues only if the row names it as the writer; a takeover writes a greater
fence into it under the same lock. tablewire.takeovers keeps the last takeovers of each table for audits.
tablewire/postgres/sink_tables.py defines both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import psycopg

from processor.postgres.sinks import Fence
from processor.postgres.sinks.connection import SinkConnection, Statement
from tablewire.errors import EpochRefusedError
from tablewire.model.ids import Ts
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import split_table_name
from tablewire.postgres.lsn import format_lsn
from tablewire.postgres.shapes import TableShape

TAKEOVERS_KEPT = 200
SNAPSHOT_LOST = "lost"
"""The sink has lost commits of the table, and its changefeed makes no first copies."""
SNAPSHOT_DONE = "done"
SNAPSHOT_PENDING = "pending"
SNAPSHOT_RELOAD = "reload"
SNAPSHOT_SKIPPED = "skipped"

_REFUSAL = "tablewire: another writer has taken the table over"
LOCK_SQL = (
    f"SELECT (CASE WHEN count(*) = 1 THEN '1' ELSE '{_REFUSAL}' END)::int FROM (SELECT FROM tablewire.positions"
    " WHERE changefeed = $1::text AND table_name = $2::text AND incarnation = $3::text::int8"
    " AND changefeed_epoch = $4::text::int8 AND assignment_epoch = $5::text::int8 FOR UPDATE) locked"
)
"""Fails at the server (the text is no number) if the row names another writer: later statements of the same pipeline do not run,
and nothing stays locked, even if the writer never reads the result."""
MOVE_SQL = (
    "UPDATE tablewire.positions SET position = $3::text::pg_lsn, updated_at = clock_timestamp()"
    " WHERE changefeed = $1::text AND table_name = $2::text"
)
CONFLICT_SQL = (
    "UPDATE tablewire.positions SET conflicts = conflicts + $3::text::int8 WHERE changefeed = $1::text AND table_name = $2::text"
)

_KEY = "changefeed = %(changefeed)s AND table_name = %(table)s"
_READ = (
    "SELECT incarnation, changefeed_epoch, assignment_epoch, position, snapshot, source_table_id, columns, published, shape"
    f" FROM tablewire.positions WHERE {_KEY}"
)
# Earlier versions did not quote names in the key: the row of this very table gets the name that is used now.
_BEGIN_TAKEOVER = f"""
BEGIN; SET LOCAL lock_timeout = %(lock_timeout_ms)s; SET LOCAL idle_in_transaction_session_timeout = %(idle_timeout_ms)s;
UPDATE tablewire.positions SET table_name = %(table)s WHERE changefeed = %(changefeed)s AND table_name = %(unquoted)s
  AND source_table_id = %(table_id)s AND %(unquoted)s <> %(table)s;
INSERT INTO tablewire.positions (changefeed, table_name, source_table_id, incarnation, changefeed_epoch, assignment_epoch,
    position, snapshot, published, writer)
  VALUES (%(changefeed)s, %(table)s, %(table_id)s, %(incarnation)s, %(changefeed_epoch)s, %(assignment_epoch)s,
    %(position)s, %(snapshot)s, %(published)s, %(writer)s) ON CONFLICT DO NOTHING;
{_READ} FOR UPDATE"""
_TAKE_OVER = f"""
UPDATE tablewire.positions SET source_table_id = %(table_id)s, incarnation = %(incarnation)s,
  changefeed_epoch = %(changefeed_epoch)s, assignment_epoch = %(assignment_epoch)s, position = %(position)s,
  snapshot = %(snapshot)s, published = %(published)s, writer = %(writer)s,
  taken_at = clock_timestamp(), updated_at = clock_timestamp() WHERE {_KEY};
INSERT INTO tablewire.takeovers (changefeed, table_name, incarnation, changefeed_epoch, assignment_epoch, writer, position)
  SELECT changefeed, table_name, incarnation, changefeed_epoch, assignment_epoch, writer, position
    FROM tablewire.positions WHERE {_KEY};
DELETE FROM tablewire.takeovers WHERE {_KEY} AND number <=
  (SELECT number FROM tablewire.takeovers WHERE {_KEY} ORDER BY number DESC OFFSET {TAKEOVERS_KEPT} LIMIT 1)"""
_NAME_OF = (
    "SELECT table_name FROM tablewire.positions WHERE changefeed = %(changefeed)s AND source_table_id = %(table_id)s"
    " AND incarnation = %(incarnation)s"
)
# The transaction id in the xmax of a locked row is one that its backend holds.
_HOLDERS = (
    "SELECT l.pid FROM tablewire.positions p JOIN pg_locks l ON l.locktype = 'transactionid' AND l.transactionid = p.xmax"
    " AND l.granted JOIN pg_stat_activity a ON a.pid = l.pid WHERE a.application_name LIKE 'tablewire%%'"
    f" AND l.pid <> pg_backend_pid() AND {_KEY}"
)


@dataclass(frozen=True, slots=True)
class PositionRow:
    """A row of tablewire.positions.

    columns, shape: of the source's table when it was last written; shape: None if an earlier version wrote
    it. published: the table's published_ts at its last takeover; None: taken over by an earlier version.
    """

    fence: Fence
    position: Ts
    snapshot: str
    source_table_id: int
    columns: tuple[str, ...]
    published: Ts | None
    shape: TableShape | None


@dataclass(frozen=True, slots=True)
class Positions:
    """The rows of one changefeed. writer: a word that identifies this process."""

    changefeed: str
    writer: str

    def lock_statement(self, table: str, fence: Fence) -> Statement:
        """Return a statement that locks the row if `fence` is its writer, and else fails; see `is_refusal`."""
        numbers = (fence.incarnation, fence.changefeed_epoch, fence.assignment_epoch)
        return LOCK_SQL, [self.changefeed.encode(), table.encode(), *(b"%d" % number for number in numbers)]

    def move_statement(self, table: str, position: Ts) -> Statement:
        """Return a statement that sets the position of a locked row; in a pipeline it only runs if the lock succeeded."""
        return MOVE_SQL, [self.changefeed.encode(), table.encode(), format_lsn(position).encode()]

    def conflict_statement(self, table: str, number: int) -> Statement:
        """Return a statement that counts conflicts in a locked row."""
        return CONFLICT_SQL, [self.changefeed.encode(), table.encode(), b"%d" % number]

    def read(self, connection: SinkConnection, table: str, for_update: bool = False) -> PositionRow | None:
        return _row(connection.query(_READ + (" FOR UPDATE" if for_update else ""), self._key(table)))

    def begin_takeover(
        self, connection: SinkConnection, schema: TableSchema, fence: Fence, position: Ts, snapshot: str, **timeouts: int
    ) -> PositionRow | None:
        """Begin a transaction, insert a row for a table that has none, lock the row and return it."""
        unquoted = f"{schema.schema}.{schema.name}"
        values = self._values(schema, fence, position, snapshot)
        return _row(connection.query(_BEGIN_TAKEOVER, {**values, "unquoted": unquoted, **timeouts}))

    def take_over(self, connection: SinkConnection, schema: TableSchema, fence: Fence, position: Ts, snapshot: str) -> None:
        """Make this process the writer of a locked row, and add that to the history."""
        connection.query(_TAKE_OVER, self._values(schema, fence, position, snapshot))

    def name_of(self, connection: SinkConnection, table_id: int, fence: Fence) -> tuple[str, str] | None:
        """Return schema and name under which the table of this id was last written by this life of the changefeed."""
        rows = connection.query(_NAME_OF, {**self._key(""), "table_id": table_id, "incarnation": fence.incarnation})
        return split_table_name(rows[0][0]) if rows else None

    def rename(self, connection: SinkConnection, table: str, new_table: str) -> None:
        query = f"UPDATE tablewire.positions SET table_name = %(new)s WHERE {_KEY}"
        connection.query(query, {**self._key(table), "new": new_table})

    def holders(self, connection: SinkConnection, table: str) -> list[int]:
        """Return the process ids of Tablewire's other backends that hold the lock of the row."""
        return [row[0] for row in connection.query(_HOLDERS, self._key(table))]

    def set_snapshot(self, connection: SinkConnection, table: str, snapshot: str, position: Ts | None = None) -> None:
        """Set the state of the first copy, and the position after which changes follow it."""
        query = (
            "UPDATE tablewire.positions SET snapshot = %(snapshot)s, position = coalesce(%(position)s, position),"
            f" updated_at = clock_timestamp() WHERE {_KEY}"
        )
        lsn = None if position is None else format_lsn(position)
        connection.query(query, {**self._key(table), "snapshot": snapshot, "position": lsn})

    def set_columns(self, connection: SinkConnection, table: str, columns: tuple[str, ...]) -> None:
        """Keep the columns of the source's table, which distinguishes a dropped one from one that only the sink has."""
        query = f"UPDATE tablewire.positions SET columns = %(columns)s::text[] WHERE {_KEY}"
        connection.query(query, {**self._key(table), "columns": list(columns)})

    def set_shape(self, connection: SinkConnection, table: str, shape: TableShape | None) -> None:
        """Keep the shape of the source's table that the sink's table has followed."""
        stored = None if shape is None else json.dumps(shape.to_json())
        query = f"UPDATE tablewire.positions SET shape = %(shape)s::jsonb WHERE {_KEY}"
        connection.query(query, {**self._key(table), "shape": stored})

    def _key(self, table: str) -> dict[str, object]:
        return {"changefeed": self.changefeed, "table": table}

    def _values(self, schema: TableSchema, fence: Fence, position: Ts, snapshot: str) -> dict[str, object]:
        return {
            **self._key(schema.full_name),
            "table_id": schema.table_id,
            "incarnation": fence.incarnation,
            "changefeed_epoch": fence.changefeed_epoch,
            "assignment_epoch": fence.assignment_epoch,
            "position": format_lsn(position),
            "snapshot": snapshot,
            "published": format_lsn(schema.published_ts),
            "writer": self.writer,
        }


def _row(rows: list[tuple[Any, ...]]) -> PositionRow | None:
    if not rows:
        return None
    incarnation, changefeed_epoch, assignment_epoch, position, snapshot, table_id, columns, published, stored = rows[0]
    fence = Fence(incarnation, changefeed_epoch, assignment_epoch)
    return PositionRow(fence, position, snapshot, table_id, tuple(columns), published, _read_shape(stored))


def _read_shape(stored: dict[str, Any] | None) -> TableShape | None:
    if stored is None:
        return None
    try:
        return TableShape.from_json(stored)
    except (KeyError, TypeError, ValueError):
        return None  # of a newer version: as if an earlier one had written the row


def is_refusal(error: psycopg.Error) -> bool:
    """Return whether a lock statement found another writer."""
    return isinstance(error, psycopg.errors.InvalidTextRepresentation) and _REFUSAL in str(error)


def replaced(schema: TableSchema) -> EpochRefusedError:
    """Return the error of a writer whose table another one has taken over."""
    return EpochRefusedError(f"table {schema.full_name}: another processor has taken the table over at the sink")


def require_greatest(schema: TableSchema, found: Fence, fence: Fence) -> None:
    """Raise EpochRefusedError if the sink has a newer writer than this one."""
    if found > fence:
        texts = (f"changefeed_epoch {f.changefeed_epoch}, assignment_epoch {f.assignment_epoch}" for f in (found, fence))
        raise EpochRefusedError("table {}: the sink has a newer writer ({}) than this one ({})".format(schema.full_name, *texts))


def was_unpublished(row: PositionRow, schema: TableSchema) -> bool:
    """Return whether changes may be missing between the position and the changes that are published now.

    A writer may have moved the position past the place where the table was added again, before it saw that.
    """
    return row.position < schema.published_ts or row.published not in (None, schema.published_ts)
