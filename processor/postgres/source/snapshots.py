"""What a first copy asks the source's catalogue: whether a snapshot still fits a table, and what a lock or a slot waits for."""

from __future__ import annotations

from tablewire.model.ids import TableID
from tablewire.postgres.connections import Connection, fetch_value

# The rows as the connection's snapshot sees them. Rewrites change relfilenode, each ALTER of a column its xmin.
_VERSION = """
WITH RECURSIVE tree AS (
  SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = %s::bigint::oid
  UNION ALL
  SELECT c.oid, c.relkind FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid JOIN pg_class c ON c.oid = i.inhrelid
   WHERE t.relkind = 'p')
SELECT string_agg(concat_ws(' ', c.oid, quote_ident(n.nspname), quote_ident(c.relname), c.relfilenode, (
         SELECT string_agg(concat_ws(' ', a.attnum, quote_ident(a.attname), a.atttypid, a.atttypmod, a.xmin), ', '
                           ORDER BY a.attnum)
           FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)), '; ' ORDER BY c.oid)
  FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace"""

_PROCESS = """nullif(concat_ws(', ', 'process ' || a.pid, 'role ' || a.usename, 'application ' || nullif(a.application_name, ''),
  a.state, 'in a transaction since ' || to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SS')), '')"""
_LOCK_HOLDER = f"""
SELECT {_PROCESS} FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'relation' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.relation = %s::bigint::oid AND l.mode = 'AccessExclusiveLock' ORDER BY l.granted DESC, a.xact_start LIMIT 1"""
_AWAITED = f"""
SELECT concat_ws(' ', 'transaction', w.transactionid, 'of ' || {_PROCESS},
         'prepared as ' || quote_literal(p.gid) || ' at ' || to_char(p.prepared, 'YYYY-MM-DD HH24:MI:SS'))
  FROM pg_locks w
  LEFT JOIN pg_locks h ON h.locktype = 'transactionid' AND h.transactionid = w.transactionid AND h.granted
  LEFT JOIN pg_stat_activity a ON a.pid = h.pid LEFT JOIN pg_prepared_xacts p ON p.transaction = w.transactionid
 WHERE w.pid = %s AND w.locktype = 'transactionid' AND NOT w.granted LIMIT 1"""


def table_version(connection: Connection, table_id: TableID) -> str:
    """Return what changes with each change of the table's name, columns or storage, partitions included; empty without a table.

    In a transaction with an older snapshot this is the table at that snapshot. A copy of a table that
    was rewritten since would be empty: rewrites are not MVCC-safe.
    """
    return str(fetch_value(connection, _VERSION, (table_id,)) or "")


def lock_holder(connection: Connection, table_id: TableID) -> str:
    """Return which process locks the table so that it cannot be read; empty if none does now."""
    return str(fetch_value(connection, _LOCK_HOLDER, (table_id,)) or "")


def awaited_transaction(connection: Connection, pid: int) -> str:
    """Return the transaction that a process of the server waits for; empty if it does not wait for one."""
    return str(fetch_value(connection, _AWAITED, (pid,)) or "")
