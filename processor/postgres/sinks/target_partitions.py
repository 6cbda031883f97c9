"""Partitions at a PostgreSQL sink: a leaf that appears at the source becomes a partition of the sink's table, if it has one.

A partitioned table of the sink is not created by Tablewire. Where a table of the source's root (or of a
partitioned table below it) exists at the sink and is partitioned, a new leaf is created with the same
bounds, so that the root at the sink has its rows.
"""

from __future__ import annotations

import psycopg

from processor.postgres.sinks.connection import SinkConnection
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import PartitionPlace, TableSchema
from tablewire.postgres.connections import error_text, is_connection_loss, quoted

_IS_PARTITIONED = (
    "SELECT c.relkind = 'p' FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = %s AND c.relname = %s"
)


def create_partition(connection: SinkConnection, schema: TableSchema) -> bool:
    """Create the table as a partition of the sink's table; return False if the sink has none that is partitioned.

    Partitioned tables between that one and the leaf are created too. Raise OperatingError if the sink
    refuses that, for example because its table is partitioned in another way.
    """
    places = schema.places
    if schema.kind == "p":
        return False  # replicated as one table: it gets no partitions here
    parent_at = next((at for at in range(len(places) - 2, -1, -1) if _is_partitioned(connection, places[at])), None)
    if parent_at is None:
        return False
    for at in range(parent_at + 1, len(places)):
        parent, place = places[at - 1], places[at]
        _create_schema(connection, place.schema)
        key = f" PARTITION BY {place.key}" if place.key else ""
        statement = f"CREATE TABLE IF NOT EXISTS {place.quoted} PARTITION OF {parent.quoted} {place.bound}{key}"
        try:
            connection.execute(statement)
        except psycopg.errors.LockNotAvailable:
            raise
        except psycopg.Error as error:
            if is_connection_loss(error):
                raise
            raise OperatingError(
                f"table {schema.full_name} cannot be created at the sink as a partition of {parent.schema}.{parent.name}, which"
                f" is partitioned there: {error_text(error)}; create it there, as a partition or as a table of its own"
            ) from None
    return True


def _is_partitioned(connection: SinkConnection, place: PartitionPlace) -> bool:
    return any(row[0] for row in connection.query(_IS_PARTITIONED, (place.schema, place.name)))


def _create_schema(connection: SinkConnection, name: str) -> None:
    if not connection.query("SELECT 1 WHERE to_regnamespace(%s) IS NOT NULL", (quoted(name),)):
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(name)}")
