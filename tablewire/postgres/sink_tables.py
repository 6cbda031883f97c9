"""Tablewire's own tables at a PostgreSQL sink.

The processors use positions and takeovers (processor/postgres/sinks/positions.py), the owner uses
checkpoints (sink_checkpoint.py).
"""

from __future__ import annotations

from tablewire.postgres.connections import Connection

_NAMES = ["tablewire.positions", "tablewire.takeovers", "tablewire.checkpoints", "tablewire.former_tables"]
_CREATE_LOCK = 0x7461626C65776972  # "tablewir"
_CREATE = """
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
  columns text[] NOT NULL DEFAULT '{}',
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
CREATE TABLE IF NOT EXISTS tablewire.checkpoints (
  changefeed text PRIMARY KEY,
  incarnation bigint NOT NULL,
  position pg_lsn NOT NULL,
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE tablewire.checkpoints IS
  'The source may have forgotten everything at or before position: it was in all tables of the changefeed by then.';
CREATE TABLE IF NOT EXISTS tablewire.former_tables (
  changefeed text NOT NULL,
  table_name text NOT NULL,
  sink_table oid NOT NULL,
  removed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (changefeed, table_name)
);
COMMENT ON TABLE tablewire.former_tables IS
  'What a changefeed that was removed has written: one that is created under its name may replace these rows.'"""


_ADDED_COLUMNS = {
    "tablewire.positions": {
        "shape": "jsonb",
        "sink_shape": "jsonb",
        "conflicts": "bigint NOT NULL DEFAULT 0",
        "published": "pg_lsn",
    },
    "tablewire.checkpoints": {"source": "jsonb"},
}
"""Columns that earlier versions did not create. They do not name them in an INSERT, so each has a default or may be NULL."""
_MISSING = """
SELECT 1 FROM unnest(%s::text[]) t WHERE to_regclass(t) IS NULL
UNION ALL
SELECT 1 FROM unnest(%s::text[], %s::text[]) AS wanted (t, name)
 WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass(t) AND attname = name AND NOT attisdropped)"""


def create_sink_tables(connection: Connection) -> None:
    """Create the schema, and the tables and columns that are missing; one session at a time."""
    columns = [(table, name) for table, names in _ADDED_COLUMNS.items() for name in names]
    missing = connection.execute(_MISSING, (_NAMES, [table for table, _ in columns], [name for _, name in columns])).fetchone()
    if missing is None:
        return
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_CREATE_LOCK,))
        connection.execute(_CREATE)
        for table, names in _ADDED_COLUMNS.items():
            for name, definition in names.items():
                connection.execute(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {name} {definition}")
