"""The first copy of a table into a PostgreSQL sink; inside a fenced transaction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.planner import TargetPlanner
from processor.postgres.sinks.shape_steps import adjust_columns, adjust_key, needs_adjusting
from processor.postgres.sinks.target_tables import create_table, delete_rows, empty_table, has_rows
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import quoted
from tablewire.postgres.shapes import TableShape


def copy_rows(
    connection: SinkConnection,
    planner: TargetPlanner,
    schema: TableSchema,
    rows: Iterable[bytes],
    may_empty: bool,
    former: TableShape | None,
) -> None:
    """Replace the rows of the sink's table, which can be read as it was until the end.

    A table that holds rows and needs another shape gets it last, from a temporary table: a changed table
    is locked for readers until the commit. may_empty: existing rows are of an earlier life of the
    changefeed, or the operator has permitted their removal; else they are an OperatingError. former: the
    shape that the sink's table has followed.
    """
    create_table(connection, schema)
    is_filled = has_rows(connection, schema)
    if is_filled and not may_empty:
        raise OperatingError(
            f"table {schema.full_name} at the sink holds rows already: empty it, or create the changefeed with the source"
            " option existing_rows=truncate, or without a snapshot"
        )
    current = schema.shape
    if current is None or not needs_adjusting(connection, schema, former, current):
        if is_filled:
            delete_rows(connection, schema)
        _fill(connection, planner, schema, rows)
        return
    if not is_filled:
        adjust_columns(connection, schema, former, current)
        adjust_key(connection, schema, former, current)
        _fill(connection, planner, schema, rows)
        return
    clone = _clone(connection, schema)
    adjust_columns(connection, clone, former, current)
    _fill(connection, planner, clone, rows)
    empty_table(connection, schema)
    adjust_columns(connection, schema, former, current)
    adjust_key(connection, schema, former, current)
    names = ", ".join(quoted(column.name) for column in schema.columns)
    connection.execute(
        f"INSERT INTO {schema.quoted} ({names}) OVERRIDING SYSTEM VALUE SELECT {names} FROM {clone.quoted}"
        if names
        else f"INSERT INTO {schema.quoted} SELECT FROM {clone.quoted}"
    )


def _clone(connection: SinkConnection, schema: TableSchema) -> TableSchema:
    """Create an empty temporary table with the columns of the sink's table, without its constraints."""
    statement = f"CREATE TEMP TABLE tablewire_clone ON COMMIT DROP AS SELECT * FROM {schema.quoted} WITH NO DATA"
    connection.execute(statement)
    ((temporary,),) = connection.query("SELECT pg_catalog.pg_my_temp_schema()::regnamespace::text")
    return replace(schema, schema=temporary, name="tablewire_clone")


def _fill(connection: SinkConnection, planner: TargetPlanner, schema: TableSchema, rows: Iterable[bytes]) -> None:
    """Copy the rows into an empty table; through a temporary one if columns must be cast, or if there are none."""
    columns = planner.copy_columns(connection, schema)
    options = "FORMAT binary" if planner.copies_in_binary(schema) else "FORMAT text"
    names = ", ".join(column.quoted for column in columns)
    if columns and not any(column.cast for column in columns):
        connection.copy_in(f"COPY {schema.quoted} ({names}) FROM STDIN ({options})", rows)
        return
    definitions = ", ".join(f"{column.quoted} {column.wire.sql}" for column in columns)
    values = ", ".join(column.staged for column in columns)
    connection.execute(f"CREATE TEMP TABLE tablewire_copy ({definitions}) ON COMMIT DROP")
    listed = f" ({names})" if columns else ""  # an empty list would be a syntax error
    connection.copy_in(f"COPY pg_temp.tablewire_copy{listed} FROM STDIN ({options})", rows)
    connection.execute(
        f"INSERT INTO {schema.quoted}{listed} OVERRIDING SYSTEM VALUE SELECT {values} FROM pg_temp.tablewire_copy s"
    )
