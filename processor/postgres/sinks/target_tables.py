"""The table at a PostgreSQL sink that a source's table is written to: it is described, created and extended.

Everything runs inside the fenced transaction that needs it, so a writer that was replaced does not
change a table either.
"""

from __future__ import annotations

import re

from psycopg import sql

from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.target_facts import read_facts, truncates, why_unwritable
from processor.postgres.sinks.target_partitions import create_partition
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import CatalogueColumn, TableSchema, describe_named_table
from tablewire.postgres.connections import quoted
from tablewire.postgres.shapes import ColumnShape

_QUALIFIED = re.compile(r'^("([^"]|"")*"|[^".]+)\.')
_EXTENSION_SCHEMAS = """
SELECT DISTINCT n.nspname FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
 WHERE to_regtype(quote_ident(n.nspname) || '.' || %s) IS NOT NULL"""


def describe_target(connection: SinkConnection, schema: TableSchema) -> TableSchema:
    if (target := _find(connection, schema)) is None:
        raise OperatingError(f"table {schema.full_name} no longer exists at the sink; create it, or have it copied again")
    return target


def _find(connection: SinkConnection, schema: TableSchema) -> TableSchema | None:
    return connection.call(lambda found: describe_named_table(found, schema.schema, schema.name))


def create_table(connection: SinkConnection, schema: TableSchema) -> bool:
    """Create the table and its schema if there is none of its name; return whether it was created.

    Raise OperatingError if a type is missing at the sink.
    """
    if _find(connection, schema) is not None:
        return False
    if create_partition(connection, schema):
        return True
    lines = [f"{quoted(column.name)} {ddl_type(connection, schema, column)}" for column in schema.columns]
    key = schema.primary_key or schema.identity
    if key:
        deferred = " DEFERRABLE INITIALLY DEFERRED" if schema.key_is_deferrable else ""
        lines.append(f"PRIMARY KEY ({', '.join(map(quoted, key))}){deferred}")
    if schema.identity and set(schema.identity) != set(key):
        lines.append(f"UNIQUE ({', '.join(map(quoted, schema.identity))})")
    if not connection.query("SELECT 1 WHERE to_regnamespace(%s) IS NOT NULL", (quoted(schema.schema),)):
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema.schema)}")
    connection.execute(f"CREATE TABLE IF NOT EXISTS {schema.quoted} ({', '.join(lines)})")
    return True


def add_column(connection: SinkConnection, schema: TableSchema, column: ColumnShape, table: str) -> None:
    """Add the column to the table. Rows that are older than the column have its missing_text without ever being written.

    table: the one to alter, quoted; of a partition, its root.
    """
    change = f"ALTER TABLE {table} ADD COLUMN {quoted(column.name)} {ddl_type(connection, schema, column)}"
    if column.missing_text is not None:
        default = sql.Literal(column.missing_text).as_string(None)
        change += f" DEFAULT {default}; ALTER TABLE {table} ALTER COLUMN {quoted(column.name)} DROP DEFAULT"
    connection.execute(change)


def ddl_type(connection: SinkConnection, schema: TableSchema, column: CatalogueColumn | ColumnShape) -> str:
    """Return the column's type as DDL, in the schema of its extension there; raise OperatingError if it is missing."""
    if connection.query("SELECT 1 WHERE to_regtype(%s) IS NOT NULL", (column.type_text,)):
        return column.type_text
    name = _QUALIFIED.sub("", column.type_text)
    found = connection.query(_EXTENSION_SCHEMAS, (name,)) if name != column.type_text else []
    if len(found) != 1:
        raise OperatingError(
            f"table {schema.full_name}: column {column.name} has type {column.type_text}, which the sink does not have; "
            "create it there"
        )
    return f"{quoted(found[0][0])}.{name}"


def has_rows(connection: SinkConnection, schema: TableSchema) -> bool:
    """Return whether the table has rows of its own; those of tables that inherit from it are other tables' rows."""
    facts = read_facts(connection, describe_target(connection, schema).table_id)
    only = "" if facts.is_partitioned else "ONLY "
    return bool(connection.query(f"SELECT 1 FROM {only}{schema.quoted} LIMIT 1"))


def empty_table(connection: SinkConnection, schema: TableSchema) -> None:
    """Remove the table's own rows, and no others."""
    facts = read_facts(connection, describe_target(connection, schema).table_id)
    if facts.hides_rows:
        raise OperatingError(why_unwritable(schema.full_name, facts))
    connection.execute("; ".join(truncates(schema.quoted, facts, restarts=False)))


def delete_rows(connection: SinkConnection, schema: TableSchema) -> None:
    """Remove the table's own rows, and no others; until the commit, other sessions can still read them."""
    facts = read_facts(connection, describe_target(connection, schema).table_id)
    if facts.hides_rows:
        raise OperatingError(why_unwritable(schema.full_name, facts))
    connection.execute(f"DELETE FROM {'' if facts.is_partitioned else 'ONLY '}{schema.quoted}")
