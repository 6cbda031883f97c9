"""Which table at the sink a changefeed writes: it is stored, compared, and verified in every transaction.

The **version** of a table is a text of everything in the sink's catalogue that a plan depends on. A
statement at the end of each write transaction, when the writes hold their lock, compares it with the
plan's, and fails if somebody has changed the table since.

The **shape** (tablewire.positions.sink_shape) is what must stay the same while rows are in the table: its
oid, and its columns. A change that may have changed or removed rows means that the table is copied again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from psycopg.types.json import Jsonb

from processor.postgres.sinks import ReloadNeededError
from processor.postgres.sinks.connection import SinkConnection, Statement
from tablewire.model.ids import TableID
from tablewire.postgres.catalogue import TableSchema

_CHANGED = "tablewire: the table at the sink was changed"
_COLUMNS = "FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
_VERSION = f"""
concat_ws(' ', c.oid, c.relkind, c.relispartition, c.relhasrules, c.relrowsecurity, c.relforcerowsecurity,
 (SELECT string_agg(concat_ws(',', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attgenerated, a.attidentity), ';'
    ORDER BY a.attnum) {_COLUMNS}),
 (SELECT string_agg(t.oid || t.tgenabled::text, ',' ORDER BY t.oid) FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid),
 (SELECT string_agg(i.indexrelid || i.indisvalid::text, ',' ORDER BY i.indexrelid)
    FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid))"""
_FROM = "FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
VERIFY_SQL = (
    f"SELECT (CASE WHEN (SELECT {_VERSION} {_FROM} WHERE n.nspname = $1::text AND c.relname = $2::text) = $3::text"
    f" THEN '1' ELSE '{_CHANGED}' END)::int"
)
_READ = f"""
SELECT c.oid::bigint, {_VERSION}, jsonb_build_object('oid', c.oid::bigint, 'kind', c.relkind,
  'columns', coalesce((SELECT jsonb_object_agg(a.attname, jsonb_build_object('attnum', a.attnum, 'type',
     format_type(a.atttypid, a.atttypmod), 'oid', a.atttypid::bigint, 'modifier', a.atttypmod, 'generated', a.attgenerated))
     {_COLUMNS}), '{{}}'))
  {_FROM} WHERE n.nspname = %s AND c.relname = %s"""
_STORED = "SELECT sink_shape FROM tablewire.positions WHERE changefeed = %s AND table_name = %s"
_STORE = "UPDATE tablewire.positions SET sink_shape = %s WHERE changefeed = %s AND table_name = %s"

_INT2, _INT4, _INT8, _FLOAT4, _FLOAT8, _NUMERIC, _TEXT, _VARCHAR = 21, 23, 20, 700, 701, 1700, 25, 1043
_WIDER = {
    _INT2: {_INT4, _INT8, _NUMERIC},
    _INT4: {_INT8, _NUMERIC, _FLOAT8},
    _INT8: {_NUMERIC},
    _FLOAT4: {_FLOAT8},
    _VARCHAR: {_TEXT, _VARCHAR},
    _TEXT: {_VARCHAR},
    _NUMERIC: {_NUMERIC},
}
"""Types without a modifier that hold every value of the first type."""

Shape = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SinkTable:
    """A table at the sink as it is now; see the module."""

    table_id: TableID
    version: str
    shape: Shape


def read_sink_table(connection: SinkConnection, schema: str, name: str) -> SinkTable | None:
    rows = connection.query(_READ, (schema, name))
    return SinkTable(*rows[0]) if rows else None


def verify_statement(schema: str, name: str, version: str) -> Statement:
    """Return a statement that fails if the table is no longer of this version."""
    return VERIFY_SQL, [schema.encode(), name.encode(), version.encode()]


def require_same_table(connection: SinkConnection, changefeed: str, schema: TableSchema, names: Collection[str]) -> None:
    """Raise ReloadNeededError if the table at the sink no longer holds the rows that were written to it; lock it as it is.

    names: of the source's columns.
    """
    found = read_sink_table(connection, schema.schema, schema.name)
    stored = _stored_shape(connection, changefeed, schema.full_name)
    if why := why_copy(stored, found.shape if found is not None else None, names):
        raise ReloadNeededError(f"table {schema.full_name}: {why}")
    connection.execute(f"LOCK TABLE ONLY {schema.quoted} IN ACCESS SHARE MODE")


def why_not_the_same(connection: SinkConnection, changefeed: str, schema: TableSchema, is_filled: bool) -> str:
    """Return why the table at the sink no longer holds the rows that its position stands for; empty if it does.

    is_filled: a first copy was made, so that there must be a table.
    """
    stored = _stored_shape(connection, changefeed, schema.full_name)
    if stored is None and not is_filled:
        return ""
    found = read_sink_table(connection, schema.schema, schema.name)
    return why_copy(stored, found.shape if found is not None else None, [column.name for column in schema.columns])


def adopt_table(connection: SinkConnection, changefeed: str, schema: TableSchema) -> None:
    """Store which table at the sink holds the rows. Inside a transaction that has locked the row of the position."""
    if (found := read_sink_table(connection, schema.schema, schema.name)) is not None:
        connection.query(_STORE, (Jsonb(found.shape), changefeed, schema.full_name))


def _stored_shape(connection: SinkConnection, changefeed: str, table: str) -> Shape | None:
    rows = connection.query(_STORED, (changefeed, table))
    return rows[0][0] if rows else None


def why_copy(stored: Shape | None, current: Shape | None, names: Collection[str]) -> str:
    """Return why the rows at the sink may no longer be those that were written; empty if they are.

    names: of the source's columns. Pure.
    """
    if current is None:
        return "it no longer exists at the sink"
    if stored is None:
        return ""
    if stored["oid"] != current["oid"]:
        return "the table at the sink was replaced by another one"
    for name, before in stored["columns"].items():
        if name not in names:
            continue
        after = current["columns"].get(name)
        if after is None or after["attnum"] != before["attnum"]:
            return f"column {name} was dropped or renamed at the sink"
        if after["generated"] != before["generated"]:
            return f"column {name} was changed at the sink into one that is{'' if after['generated'] else ' not'} generated"
        if not _holds_all(before, after):
            return f"column {name} was changed at the sink from {before['type']} to {after['type']}"
    return ""


def _holds_all(before: Shape, after: Shape) -> bool:
    """Return whether the second type holds every value of the first one as it is."""
    if before["oid"] != after["oid"]:
        return bool(after["modifier"] == -1 and after["oid"] in _WIDER.get(before["oid"], ()))
    if before["modifier"] == after["modifier"] or after["modifier"] == -1:
        return True
    return bool(before["oid"] == _VARCHAR and 0 <= before["modifier"] <= after["modifier"])
