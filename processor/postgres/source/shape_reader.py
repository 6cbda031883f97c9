"""Reads the shapes of tables from the source's catalogue, as of a position.

A table's DDL holds a lock on it until all sessions see its result. So after reading, in this order, a
position of the WAL, the locks and the catalogue, all DDL that was committed at or before the position is
in what was read, for tables without such a lock. (A commit that waits for a synchronous standby is in the
WAL, and decoded by a walsender, before it is visible.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.connections import Connection
from tablewire.postgres.partition_trees import TREE_SQL, Partition
from tablewire.postgres.shapes import ColumnShape, TableShape, TypeDefinition

FIRST_USER_OID = 16384
_XID_MASK = 0xFFFFFFFF

_POSITION = "SELECT pg_catalog.pg_current_wal_insert_lsn()"
_LOCKED = """
SELECT DISTINCT relation::bigint FROM pg_catalog.pg_locks
 WHERE locktype = 'relation' AND granted AND relation = ANY(%(ids)s::oid[]) AND pid IS DISTINCT FROM pg_backend_pid()
   AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
   AND mode IN ('ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')"""
_SNAPSHOT = "SELECT pg_catalog.pg_current_snapshot()::text"
# A partitioned table has no rows of its own: the value of rows that are older than a column is in its partitions.
_MISSING = """
CASE WHEN a.atthasmissing THEN pg_catalog.array_to_string(a.attmissingval, '')
     WHEN c.relkind = 'p' THEN (SELECT pg_catalog.array_to_string(m.attmissingval, '') FROM pg_partition_tree(c.oid) t
            JOIN pg_attribute m ON m.attrelid = t.relid AND m.attname = a.attname WHERE m.atthasmissing LIMIT 1) END"""
_TABLES = f"""
SELECT c.oid::bigint, n.nspname, c.relname,
       CASE c.relkind WHEN 'p' THEN '' ELSE c.relfilenode::text END,
       c.relnatts::int, c.relreplident::text,
       ARRAY(SELECT k.attnum::int FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
              WHERE i.indrelid = c.oid AND k.n <= i.indnkeyatts AND i.indisvalid
                AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary AND i.indimmediate END ORDER BY k.n),
       (SELECT coalesce(json_agg((i.indkey::int2[])[0:i.indnkeyatts - 1]), '[]') FROM pg_index i
         WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL),
       (SELECT coalesce(json_agg(json_build_array(a.attnum, a.attname, a.atttypid::bigint, a.atttypmod,
                  pg_catalog.format_type(a.atttypid, a.atttypmod), a.attgenerated, a.attidentity,
                  a.xmin::text || CASE WHEN a.attgenerated <> '' THEN '/' || coalesce(d.oid::text, '') ELSE '' END,
                  {_MISSING}) ORDER BY a.attnum), '[]')
          FROM pg_attribute a LEFT JOIN pg_attrdef d ON a.attgenerated <> '' AND d.adrelid = a.attrelid AND d.adnum = a.attnum
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
       CASE c.relkind WHEN 'p' THEN {TREE_SQL} ELSE '[]' END
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = ANY(%(ids)s::oid[]) AND c.relkind IN ('r', 'p')"""
# Of user-defined types: what each consists of, and the values of enums and the fields of composites.
_TYPES = f"""
WITH RECURSIVE used(oid) AS (
  SELECT DISTINCT atttypid FROM pg_attribute
   WHERE attrelid = ANY(%(ids)s::oid[]) AND attnum > 0 AND NOT attisdropped AND atttypid >= {FIRST_USER_OID}
  UNION
  SELECT part.oid FROM used JOIN pg_type t ON t.oid = used.oid CROSS JOIN LATERAL (
      SELECT t.typelem UNION ALL SELECT t.typbasetype
      UNION ALL SELECT rngsubtype FROM pg_range WHERE rngtypid = t.oid OR rngmultitypid = t.oid
      UNION ALL SELECT atttypid FROM pg_attribute WHERE t.typtype = 'c' AND attrelid = t.typrelid AND attnum > 0
                   AND NOT attisdropped) part(oid)
   WHERE part.oid >= {FIRST_USER_OID})
SELECT t.oid::bigint,
       (SELECT coalesce(json_agg(p.oid::bigint), '[]') FROM (
          SELECT t.typelem UNION ALL SELECT t.typbasetype
          UNION ALL SELECT rngsubtype FROM pg_range WHERE rngtypid = t.oid OR rngmultitypid = t.oid
          UNION ALL SELECT atttypid FROM pg_attribute WHERE t.typtype = 'c' AND attrelid = t.typrelid AND attnum > 0
                       AND NOT attisdropped) p(oid)),
       CASE t.typtype
         WHEN 'e' THEN (SELECT json_agg(json_build_array(e.oid::bigint, e.enumlabel) ORDER BY e.oid) FROM pg_enum e
                         WHERE e.enumtypid = t.oid)
         WHEN 'c' THEN (SELECT json_agg(json_build_array(a.attnum, a.atttypid::bigint || ' ' || a.atttypmod) ORDER BY a.attnum)
                          FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped) END
  FROM pg_type t JOIN used ON used.oid = t.oid"""


@dataclass(frozen=True, slots=True)
class Look:
    """What the catalogue said. position: all DDL of unlocked tables that was committed at or before it is included.

    snapshot: of the session that read the shapes, as text.
    """

    position: Ts
    shapes: Mapping[TableID, TableShape]
    locked: frozenset[TableID]
    snapshot: str = ""

    def is_complete(self, table_id: TableID) -> bool:
        """Return whether no DDL of the table may be committed and not yet visible."""
        return table_id not in self.locked

    def sees(self, xid: int) -> bool:
        """Return whether the transaction with this 32-bit id, which has been committed, was visible."""
        lowest, end, *running = self.snapshot.replace(",", ":").rstrip(":").split(":")
        if _is_before(xid, int(lowest)):
            return True
        return _is_before(xid, int(end)) and xid not in {int(other) & _XID_MASK for other in running}


def _is_before(xid: int, limit: int) -> bool:
    """Return whether a 32-bit id is before a 64-bit one, at most 2^31 transactions apart."""
    distance = (limit - xid) & _XID_MASK
    return 0 < distance < 1 << 31


def read_look(connection: Connection, table_ids: Iterable[TableID], generated: bool) -> Look:
    """Read the shapes of these tables and the position that they are valid for, in one round trip.

    generated: values of stored generated columns are replicated, so that these are columns like others.
    """
    values = {"ids": list(table_ids)}
    statements = ";".join((_POSITION, _LOCKED, _SNAPSHOT, _TABLES, _TYPES))
    cursor = psycopg.ClientCursor(connection).execute(statements, values)
    position = cursor.fetchall()[0][0]
    cursor.nextset()
    locked = frozenset(row[0] for row in cursor.fetchall())
    cursor.nextset()
    snapshot = str(cursor.fetchall()[0][0])
    cursor.nextset()
    return Look(position, _shapes(cursor, generated), locked, snapshot)


def read_shape(connection: Connection, table_id: TableID, generated: bool) -> TableShape:
    """Read the shape of one table under the transaction's snapshot; raise OperatingError if it does not exist there."""
    cursor = psycopg.ClientCursor(connection).execute(f"{_TABLES};{_TYPES}", {"ids": [table_id]})
    if (shape := _shapes(cursor, generated).get(table_id)) is None:
        raise OperatingError(f"table {table_id} does not exist at the source")
    return shape


def _shapes(cursor: psycopg.ClientCursor[tuple[Any, ...]], generated: bool) -> dict[TableID, TableShape]:
    """Return the shapes from the results of _TABLES and _TYPES."""
    tables: list[tuple[Any, ...]] = cursor.fetchall()
    cursor.nextset()
    types = {row[0]: row[1:] for row in cursor.fetchall()}
    found: dict[TableID, TableShape] = {}
    for table_id, schema, name, file, attnums, identity, key, uniques, columns, partitions in tables:
        shapes = tuple(ColumnShape(*column) for column in columns)
        if generated:
            shapes = tuple(replace(column, generated="") if column.generated == "s" else column for column in shapes)
        found[table_id] = TableShape(
            table_id,
            schema,
            name,
            file,
            attnums,
            identity,
            tuple(key),
            shapes,
            _definitions(types, [column.type_oid for column in shapes]),
            tuple(tuple(unique) for unique in uniques),
            tuple(Partition(*partition) for partition in partitions),
        )
    return found


def _definitions(types: Mapping[int, Sequence[Any]], wanted: Sequence[int]) -> dict[int, TypeDefinition]:
    """Return what these types, and those that they consist of, are defined as."""
    found: dict[int, TypeDefinition] = {}
    remaining = [oid for oid in wanted if oid in types]
    seen: set[int] = set()
    while remaining:
        oid = remaining.pop()
        if oid in seen:
            continue
        seen.add(oid)
        parts, definition = types[oid]
        if definition:
            found[oid] = tuple((number, text) for number, text in definition)
        remaining += [part for part in parts if part in types]
    return found
