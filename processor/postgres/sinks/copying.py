"""The first copy of a table into a PostgreSQL sink; inside a fenced transaction."""

from __future__ import annotations

from collections.abc import Iterable

from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.planner import TargetPlanner
from processor.postgres.sinks.target_tables import add_column, create_table, describe_target, empty_table, has_rows
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import TableSchema


def copy_rows(
    connection: SinkConnection, planner: TargetPlanner, schema: TableSchema, rows: Iterable[bytes], may_empty: bool
) -> None:
    """Fill the sink's table; through a temporary one if columns must be cast, or if there are none.

    may_empty: existing rows are of an earlier life of the changefeed, or the operator has permitted
    their removal; else they are an OperatingError.
    """
    create_table(connection, schema)
    target = describe_target(connection, schema)
    for column in schema.columns:
        if target.column(column.name) is None:
            add_column(connection, schema, column)
    if has_rows(connection, schema):
        if not may_empty:
            raise OperatingError(
                f"table {schema.full_name} at the sink holds rows already: empty it, or create the changefeed with the source"
                " option existing_rows=truncate, or without a snapshot"
            )
        empty_table(connection, schema)
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
