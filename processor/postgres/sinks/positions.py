"""Tablewire's own tables at a PostgreSQL sink: how far each table is, and who writes it.

tablewire.positions has one row a (changefeed, table). It is the fence: every write transaction locks the row first and goes on
only if the row names it as the writer, and a takeover writes a greater fence into it under the same lock. tablewire.takeovers
keeps the last takeovers of each table for audits; tablewire.checkpoints is the owner's (tablewire/postgres/sink_checkpoint.py).
Only SQL here; `postgres.py` says when it runs.
"""

from __future__ import annotations

import psycopg
from psycopg import pq

from processor.postgres.sinks import Fence
from processor.postgres.sinks.connection import SinkConnection, Statement
from tablewire.model.ids import Ts
from tablewire.postgres import sink_checkpoint
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import quote_text
from tablewire.postgres.lsn import format_lsn, parse_lsn

TAKEOVERS_KEPT = 200
SNAPSHOT_LOST = "lost"
"""The sink has lost commits of it, and its changefeed makes no copies."""
SNAPSHOT_DONE = "done"
SNAPSHOT_PENDING = "pending"
SNAPSHOT_RELOAD = "reload"
SNAPSHOT_SKIPPED = "skipped"

_CREATE = f"""
BEGIN;
SELECT pg_advisory_xact_lock({sink_checkpoint.CREATE_LOCK});
CREATE SCHEMA IF NOT EXISTS tablewire;
CREATE TABLE IF NOT EXISTS tablewire.positions (
  changefeed text NOT NULL,
  table_name text NOT NULL,
  source_table_id bigint NOT NULL,
  incarnation bigint NOT NULL,
  changefeed_epoch bigint NOT NULL,
  assignment_epoch bigint NOT NULL,
  position pg_lsn NOT NULL,
  snapshot text NOT NULL,
  columns text[] NOT NULL DEFAULT '{{}}',
  writer text NOT NULL,
  taken_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (changefeed, table_name)
) WITH (fillfactor = 50);
COMMENT ON TABLE tablewire.positions IS
  'How far each replicated table is; position: every source transaction that ends at or before it is in the table.';
CREATE TABLE IF NOT EXISTS tablewire.takeovers (
  number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  changefeed text NOT NULL,
  table_name text NOT NULL,
  incarnation bigint NOT NULL,
  changefeed_epoch bigint NOT NULL,
  assignment_epoch bigint NOT NULL,
  writer text NOT NULL,
  position pg_lsn NOT NULL,
  taken_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS takeovers_by_table ON tablewire.takeovers (changefeed, table_name, number);
{sink_checkpoint.CREATE_TABLE};
COMMIT"""

_FENCE_VALUES = "incarnation = $3::text::int8 AND changefeed_epoch = $4::text::int8 AND assignment_epoch = $5::text::int8"
_REFUSAL = "tablewire: another writer has taken the table over"
LOCK_SQL = (
    f"SELECT (CASE WHEN count(*) = 1 THEN '1' ELSE '{_REFUSAL}' END)::int FROM (SELECT FROM tablewire.positions"
    f" WHERE changefeed = $1::text AND table_name = $2::text AND {_FENCE_VALUES} FOR UPDATE) locked"
)
"""An error at the server (the text is no number) when the fence is not the writer: what was sent behind it in the same pipeline
is not run, and nothing stays locked, even if the writer never looks at the answer."""
MOVE_SQL = (
    "UPDATE tablewire.positions SET position = $3::text::pg_lsn, updated_at = clock_timestamp()"
    " WHERE changefeed = $1::text AND table_name = $2::text"
)


def exists(connection: SinkConnection) -> bool:
    result = connection.execute(
        "SELECT to_regclass('tablewire.positions') IS NOT NULL AND to_regclass('tablewire.takeovers') IS NOT NULL"
        " AND to_regclass('tablewire.checkpoints') IS NOT NULL"
    )
    return result[-1].get_value(0, 0) == b"t"


def create(connection: SinkConnection) -> None:
    """Makes schema and tables where they are missing."""
    if not exists(connection):
        connection.execute(_CREATE)


def lock_statement(changefeed: str, table_name: str, fence: Fence) -> Statement:
    """Locks the row if `fence` is its writer; else an error of which `is_refusal` is true."""
    return LOCK_SQL, [
        changefeed.encode(),
        table_name.encode(),
        b"%d" % fence.incarnation,
        b"%d" % fence.changefeed_epoch,
        b"%d" % fence.assignment_epoch,
    ]


def is_refusal(error: psycopg.Error) -> bool:
    """Whether a lock statement found another writer."""
    return isinstance(error, psycopg.errors.InvalidTextRepresentation) and _REFUSAL in str(error)


def move_statement(changefeed: str, table_name: str, position: Ts) -> Statement:
    """Sets the position of a row that this transaction has locked: behind a lock statement it is only run if that went well."""
    return MOVE_SQL, [changefeed.encode(), table_name.encode(), format_lsn(position).encode()]


class PositionRow:
    """What the row says."""

    __slots__ = ("columns", "fence", "position", "snapshot", "source_table_id")

    def __init__(self, result: pq.abc.PGresult) -> None:
        values = [(result.get_value(0, column) or b"").decode() for column in range(result.nfields)]
        self.fence = Fence(int(values[0]), int(values[1]), int(values[2]))
        self.position: Ts = parse_lsn(values[3])
        self.snapshot = values[4]
        self.source_table_id = int(values[5])
        self.columns = tuple(values[6].split("\n")) if values[6] else ()


_ROW = (
    "SELECT incarnation, changefeed_epoch, assignment_epoch, position, snapshot, source_table_id,"
    " array_to_string(columns, E'\\n')"
    " FROM tablewire.positions WHERE changefeed = {changefeed} AND table_name = {table}"
)


def read_row(connection: SinkConnection, changefeed: str, table_name: str, for_update: bool) -> PositionRow | None:
    sql = _ROW.format(changefeed=quote_text(changefeed), table=quote_text(table_name))
    result = connection.execute(sql + (" FOR UPDATE" if for_update else ""))[-1]
    return PositionRow(result) if result.ntuples else None


def insert_sql(changefeed: str, schema: TableSchema, fence: Fence, position: Ts, snapshot: str, writer: str) -> str:
    """A row for a table that was never here; nothing if there is one."""
    return (
        "INSERT INTO tablewire.positions (changefeed, table_name, source_table_id, incarnation, changefeed_epoch,"
        f" assignment_epoch, position, snapshot, writer) VALUES ({quote_text(changefeed)}, {quote_text(schema.full_name)},"
        f" {schema.table_id}, {fence.incarnation}, {fence.changefeed_epoch}, {fence.assignment_epoch}, '{format_lsn(position)}',"
        f" '{snapshot}', {quote_text(writer)}) ON CONFLICT DO NOTHING"
    )


def rename_sql(changefeed: str, schema: TableSchema) -> str:
    """Earlier versions did not quote names in the key: the row of this very table gets its own name. Empty for a plain name."""
    plain = f"{schema.schema}.{schema.name}"
    if plain == schema.full_name:
        return ""
    return (
        f"UPDATE tablewire.positions SET table_name = {quote_text(schema.full_name)} WHERE changefeed = {quote_text(changefeed)}"
        f" AND table_name = {quote_text(plain)} AND source_table_id = {schema.table_id};"
    )


def take_sql(changefeed: str, schema: TableSchema, fence: Fence, position: Ts, snapshot: str, writer: str) -> str:
    """The takeover of a locked row, and its entry in the history."""
    where = f"changefeed = {quote_text(changefeed)} AND table_name = {quote_text(schema.full_name)}"
    return (
        f"UPDATE tablewire.positions SET source_table_id = {schema.table_id}, incarnation = {fence.incarnation},"
        f" changefeed_epoch = {fence.changefeed_epoch}, assignment_epoch = {fence.assignment_epoch},"
        f" position = '{format_lsn(position)}', snapshot = '{snapshot}', writer = {quote_text(writer)},"
        f" taken_at = clock_timestamp(), updated_at = clock_timestamp() WHERE {where};"
        " INSERT INTO tablewire.takeovers"
        " (changefeed, table_name, incarnation, changefeed_epoch, assignment_epoch, writer, position)"
        f" VALUES ({quote_text(changefeed)}, {quote_text(schema.full_name)}, {fence.incarnation}, {fence.changefeed_epoch},"
        f" {fence.assignment_epoch}, {quote_text(writer)}, '{format_lsn(position)}');"
        f" DELETE FROM tablewire.takeovers WHERE {where} AND number <= (SELECT number FROM tablewire.takeovers WHERE {where}"
        f" ORDER BY number DESC OFFSET {TAKEOVERS_KEPT} LIMIT 1)"
    )


def require_kept(connection: SinkConnection, changefeed: str, fence: Fence, slot_ts: Ts, where: str) -> None:
    """OperatingError when the sink has lost commits that it had confirmed before the source's slot was at slot_ts."""
    result = connection.execute(sink_checkpoint.read_sql(changefeed, fence.incarnation))[-1]
    noted = (result.get_value(0, 0) or b"").decode() if result.ntuples else None
    sink_checkpoint.require_kept(noted, slot_ts, where, changefeed)


def holders(connection: SinkConnection, changefeed: str, table_name: str) -> list[int]:
    """Backends of Tablewire that hold the row's lock: the transaction id in the row's xmax is one that they hold."""
    sql = (
        "SELECT l.pid FROM tablewire.positions p JOIN pg_locks l ON l.locktype = 'transactionid' AND l.transactionid = p.xmax"
        " AND l.granted JOIN pg_stat_activity a ON a.pid = l.pid WHERE a.application_name LIKE 'tablewire%'"
        f" AND l.pid <> pg_backend_pid() AND p.changefeed = {quote_text(changefeed)} AND p.table_name = {quote_text(table_name)}"
    )
    result = connection.execute(sql)[-1]
    return [int(result.get_value(row, 0) or b"0") for row in range(result.ntuples)]


def reload_sql(changefeed: str, table_name: str, snapshot: str) -> str:
    """The table must be copied again (SNAPSHOT_RELOAD), or would have to be (SNAPSHOT_LOST)."""
    return (
        f"UPDATE tablewire.positions SET snapshot = '{snapshot}', updated_at = clock_timestamp()"
        f" WHERE changefeed = {quote_text(changefeed)} AND table_name = {quote_text(table_name)}"
    )


def snapshot_statement(changefeed: str, table_name: str, position: Ts) -> str:
    """The first copy is complete: changes go on behind `position`."""
    return (
        f"UPDATE tablewire.positions SET position = '{format_lsn(position)}', snapshot = '{SNAPSHOT_DONE}',"
        f" updated_at = clock_timestamp() WHERE changefeed = {quote_text(changefeed)} AND table_name = {quote_text(table_name)}"
    )


def columns_statement(changefeed: str, table_name: str, columns: tuple[str, ...]) -> str:
    """Keeps which columns the source's table had last, so that a dropped one is told from one that only the sink has."""
    names = ", ".join(quote_text(name) for name in columns)
    return (
        f"UPDATE tablewire.positions SET columns = ARRAY[{names}]::text[]"
        f" WHERE changefeed = {quote_text(changefeed)} AND table_name = {quote_text(table_name)}"
    )
