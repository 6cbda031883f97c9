"""What distinguishes one database of one server from all others, and the mark of replicated writes that carries it.

A write transaction of a PostgreSQL sink begins with a logical message (prefix MARK_PREFIX, content: the
identity of the source), if the WAL of the sink can be read by logical replication. A stream drops each
transaction that is marked with the identity of its own sink: it came from there. So two changefeeds may
replicate the same tables in opposite directions, and a change does not return to where it was made.
"""

from __future__ import annotations

from tablewire.postgres.connections import Connection

MARK_PREFIX = "tablewire_source"
_IDENTITY = """
SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system())::text || '/' || oid
  FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()"""


def database_identity(connection: Connection) -> str:
    """Return `system identifier/database oid`. A standby, and a primary after a failover, have the identity of their server."""
    row = connection.execute(_IDENTITY).fetchone()
    assert row is not None
    return str(row[0])
