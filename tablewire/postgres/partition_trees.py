"""Partitioned tables that are replicated as one table (`partitions=root`): what their partitions must be, and what may change.

The stream has the changes of rows under the root's name, but not what happens to whole partitions: rows
of one that is attached, detached, dropped or truncated alone come and go without a change. So the
identity of such a table includes its partitions, and only an empty new one leaves its contents as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tablewire.model.ids import TableID
from tablewire.postgres.connections import Connection, full_table_name, quoted


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition at any level. file: names its storage, 0 if it has partitions itself.

    is_created: by CREATE TABLE ... PARTITION OF, so that all rows that it ever had are in the stream.
    """

    table_id: TableID
    file: int
    is_created: bool


# The columns of a table, the system's included, are written by one command (xmin, cmin). ATTACH PARTITION writes all of the
# user's again; CREATE TABLE ... PARTITION OF does not, and writes the row of pg_inherits in the same transaction. An update that
# was rolled back leaves an xmax, and may have overwritten cmin.
TREE_SQL = """
(SELECT coalesce(json_agg(json_build_array(l.oid::bigint, l.relfilenode::bigint,
            EXISTS (SELECT FROM pg_catalog.pg_attribute s JOIN pg_catalog.pg_attribute a ON a.attrelid = s.attrelid
                      JOIN pg_catalog.pg_inherits i ON i.inhrelid = s.attrelid AND i.xmin = s.xmin
                     WHERE s.attrelid = l.oid AND s.attnum = -1 AND a.attnum > 0 AND NOT a.attisdropped
                       AND a.xmin = s.xmin AND a.cmin = s.cmin AND a.xmax = '0'::xid AND s.xmax = '0'::xid)
            ) ORDER BY l.oid), '[]')
   FROM pg_catalog.pg_partition_tree(c.oid) t JOIN pg_catalog.pg_class l ON l.oid = t.relid WHERE t.level > 0)"""
"""Of a partitioned table `c` of pg_class: its partitions, as arrays of the fields of Partition."""


def why_copy(before: Sequence[Partition], after: Sequence[Partition]) -> str:
    """Return why rows of a partitioned table came or went without a change in the stream; empty if none did."""
    files = {partition.table_id: partition.file for partition in before}
    kept = {partition.table_id for partition in after}
    for partition in before:
        if partition.table_id not in kept:
            return "a partition was detached or dropped"
    for partition in after:
        if partition.table_id in files:
            if files[partition.table_id] != partition.file:
                return "a partition was truncated or rewritten"
        elif not partition.is_created:
            return "a partition was attached"
    return ""


_LEAVES = """
SELECT r.oid::bigint, n.nspname, l.relname, l.relkind::text, l.relpersistence::text, r.relreplident::text, l.relreplident::text,
       {0} = {1} AS is_same
  FROM pg_class r CROSS JOIN LATERAL pg_partition_tree(r.oid) t JOIN pg_class l ON l.oid = t.relid
  JOIN pg_namespace n ON n.oid = l.relnamespace
 WHERE r.oid = ANY(%s::bigint[]::oid[]) AND t.isleaf AND t.level > 0 ORDER BY n.nspname, l.relname
"""
_KEY = """coalesce((SELECT array_agg(a.attname ORDER BY a.attname) FROM pg_index i
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY((i.indkey::int2[])[0:i.indnkeyatts - 1])
   WHERE i.indrelid = {0}.oid AND i.indisvalid
     AND CASE {0}.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary AND i.indimmediate END), '{{}}')"""


def leaf_problems(connection: Connection, roots: Sequence[TableID], needs_identity: bool) -> Mapping[TableID, str]:
    """Return why these partitioned tables cannot be replicated as one table, because of a leaf."""
    found: dict[TableID, str] = {}
    if not roots:
        return found
    query = _LEAVES.format(_KEY.format("r"), _KEY.format("l"))
    for root, schema, name, kind, persistence, root_identity, identity, is_same in connection.execute(query, (list(roots),)):
        leaf = full_table_name(schema, name)
        alter = f"ALTER TABLE {quoted(schema, name)} REPLICA IDENTITY"
        if kind == "f":
            problem = f"its partition {leaf} is a foreign table, which cannot be replicated: detach it, or use partitions=leaf"
        elif persistence == "u":
            problem = f"its partition {leaf} is unlogged: ALTER TABLE {quoted(schema, name)} SET LOGGED"
        elif not needs_identity or identity == "f":
            continue
        elif root_identity == "f":
            problem = f"it has REPLICA IDENTITY FULL, but its partition {leaf} has not: {alter} FULL"
        elif identity == "n" or not is_same:
            problem = f"its partition {leaf} identifies rows by other columns: {alter} DEFAULT, or FULL"
        else:
            continue
        found.setdefault(root, problem)
    return found
