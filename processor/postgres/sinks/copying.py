"""The first copy of a table into a PostgreSQL sink; inside a fenced transaction."""

from __future__ import annotations

from collections.abc import Iterable

from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.targets import TargetPlanner, ddl_type, is_referenced
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import quote_name, quote_table


def make_room(connection: SinkConnection, schema: TableSchema, may_empty: bool) -> None:
    """Brings the sink's table to the source's columns, and makes sure that it is empty. may_empty: rows that are there are of an
    earlier life of this changefeed, or the operator said that they may go; else OperatingError."""
    target = connection.describe(schema.schema, schema.name)
    if target is None:
        raise OperatingError(f"table {schema.full_name} does not exist at the sink any more")
    for column in schema.columns:
        if target.column(column.name) is None:
            kind = ddl_type(connection, schema, column)
            connection.execute(f"ALTER TABLE {schema.quoted} ADD COLUMN {quote_name(column.name)} {kind}")
    if connection.execute(f"SELECT EXISTS (SELECT FROM {schema.quoted})")[-1].get_value(0, 0) != b"t":
        return
    if not may_empty:
        raise OperatingError(
            f"table {schema.full_name} at the sink holds rows already: empty it, or create the changefeed with the source option "
            "existing_rows=truncate, or without a snapshot"
        )
    is_parent = is_referenced(connection, target)
    connection.execute(f"DELETE FROM {schema.quoted}" if is_parent else f"TRUNCATE {schema.quoted}")


def copy_rows(connection: SinkConnection, planner: TargetPlanner, schema: TableSchema, rows: Iterable[bytes]) -> None:
    """Fills the table; through a temporary one where columns must be cast."""
    wires = planner.copy_types(connection, schema)
    target = connection.describe(schema.schema, schema.name)
    values: list[str] = []
    is_direct = True
    for column in schema.columns:
        there = target.column(column.name) if target is not None else None
        if there is None:
            raise OperatingError(f"table {schema.full_name}: column {column.name} cannot be written at the sink")
        cast = "" if there.type_oid == wires[column.name].oid else "::" + quote_table(there.type_schema, there.type_name)
        is_direct = is_direct and not cast
        values.append(quote_name(column.name) + cast)
    names = ", ".join(quote_name(column.name) for column in schema.columns)
    if is_direct:
        connection.copy_in(f"COPY {schema.quoted} ({names}) FROM STDIN (FORMAT binary)", rows)
        return
    definitions = ", ".join(f"{quote_name(column.name)} {wires[column.name].sql}" for column in schema.columns)
    connection.execute(f"CREATE TEMP TABLE tablewire_copy ({definitions}) ON COMMIT DROP")
    connection.copy_in(f"COPY pg_temp.tablewire_copy ({names}) FROM STDIN (FORMAT binary)", rows)
    connection.execute(
        f"INSERT INTO {schema.quoted} ({names}) OVERRIDING SYSTEM VALUE SELECT {', '.join(values)} FROM pg_temp.tablewire_copy"
    )
