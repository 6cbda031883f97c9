"""Makes the steps of a changed shape at the sink's table, inside the fenced transaction that needs them.

The sink's table may differ from the source's: an operator may have made a step already, or have given a
column another type. A step that was made is skipped, and a column of another type keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.target_tables import add_column, ddl_type, describe_target
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import quoted
from tablewire.postgres.shapes import AddColumn, AlterType, ColumnShape, DropColumn, RenameColumn, SetKey, Step, TableShape

_UNIQUE = """
SELECT c.relname, n.nspname, co.conname,
       (SELECT array_agg(a.attname::text ORDER BY a.attname::text) FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = i.indrelid AND a.attnum = ANY((i.indkey::int2[])[0:i.indnkeyatts - 1])),
       i.indisprimary
  FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_catalog.pg_constraint co ON co.conindid = i.indexrelid AND co.contype IN ('p', 'u')
 WHERE i.indrelid = %s::oid AND i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL"""


_ROOT = """
SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = pg_catalog.pg_partition_root(to_regclass(%s))"""


def make_steps(connection: SinkConnection, schema: TableSchema, steps: Sequence[Step]) -> None:
    """Make the steps in their order. schema: with the name that the table has at the sink."""
    table = alterable(connection, schema)
    for step in steps:
        match step:
            case DropColumn(name):
                connection.execute(f"ALTER TABLE {table} DROP COLUMN IF EXISTS {quoted(name)}")
            case RenameColumn(name, new_name):
                _rename_column(connection, schema, name, new_name)
            case AlterType(name, former, column):
                target = describe_target(connection, schema).column(name)
                if target is not None and target.type_text == former:
                    new_type = ddl_type(connection, schema, column)
                    change = f"ALTER COLUMN {quoted(name)} TYPE {new_type} USING {quoted(name)}::{new_type}"
                    connection.execute(f"ALTER TABLE {table} {change}")
            case AddColumn(column):
                _add_column(connection, schema, column)
            case SetKey(names, former_names, is_kept):
                _set_key(connection, schema, names, () if is_kept else former_names)


def alterable(connection: SinkConnection, schema: TableSchema) -> str:
    """Return the table whose columns must be altered: of a partition, those of its root."""
    rows = connection.query(_ROOT, (schema.quoted,))
    return quoted(*rows[0]) if rows else schema.quoted


def adjust_columns(connection: SinkConnection, schema: TableSchema, former: TableShape | None, current: TableShape) -> None:
    """Give an empty table the columns and types of the current shape.

    former: the shape that it has followed. What an operator has added to the sink's table stays as it is.
    """
    table = alterable(connection, schema)
    kept = {column.name for column in current.columns}
    before = {column.name: column for column in former.columns} if former is not None else {}
    _rename_former(connection, schema, former, current)
    for name in before.keys() - kept:
        connection.execute(f"ALTER TABLE {table} DROP COLUMN IF EXISTS {quoted(name)}")
    target = describe_target(connection, schema)
    for column in current.columns:
        if column.generated:
            continue
        there, name = target.column(column.name), quoted(column.name)
        known = [before.get(column.name)]
        if former is not None and former.table_id == current.table_id:
            known.append(former.column(column.attnum))
        if there is None:
            add_column(connection, schema, column, table)
        elif there.type_text != column.type_text and there.type_text in {other.type_text for other in known if other}:
            new_type = ddl_type(connection, schema, column)
            connection.execute(f"ALTER TABLE {table} ALTER COLUMN {name} TYPE {new_type} USING NULL::{new_type}")


def adjust_key(connection: SinkConnection, schema: TableSchema, former: TableShape | None, current: TableShape) -> None:
    """Have the table refuse a second row with the same key of the current shape, and no longer of the former one."""
    if former is not None and former.names(former.key) != current.names(current.key):
        uniques = {frozenset(current.names(unique)) for unique in current.uniques}
        names = former.names(former.key)
        _set_key(connection, schema, current.names(current.key), () if frozenset(names) in uniques else names)


def _rename_former(connection: SinkConnection, schema: TableSchema, former: TableShape | None, current: TableShape) -> None:
    """Rename columns, so that what refers to them at the sink still does, unless another column has that name."""
    if former is None or former.table_id != current.table_id:
        return
    target = describe_target(connection, schema)
    for column in former.columns:
        renamed = current.column(column.attnum)
        is_renamed = renamed is not None and renamed.name != column.name and not column.generated
        if is_renamed and renamed is not None and target.column(column.name) and not target.column(renamed.name):
            _rename_column(connection, schema, column.name, renamed.name)


def needs_adjusting(connection: SinkConnection, schema: TableSchema, former: TableShape | None, current: TableShape) -> bool:
    """Return whether adjust_columns or adjust_key may have something to do."""
    target = describe_target(connection, schema)
    names = {column.name for column in current.columns if not column.generated}
    if any(target.column(name) is None for name in names):
        return True
    if former is None:
        return False

    def key(shape: TableShape) -> set[str]:
        return set(shape.names(shape.key))

    types = {column.name: column.type_text for column in current.columns}
    is_changed = any(types.get(column.name) != column.type_text for column in former.columns if not column.generated)
    return is_changed or key(former) != key(current)


def _rename_column(connection: SinkConnection, schema: TableSchema, name: str, new_name: str) -> None:
    target = describe_target(connection, schema)
    if target.column(name) is None:
        return  # renamed at the sink already, or dropped there
    if target.column(new_name) is not None:
        raise OperatingError(
            f"table {schema.full_name}: column {name} was renamed to {new_name} at the source, but the sink's table has both:"
            f" rename or drop its column {new_name}"
        )
    connection.execute(f"ALTER TABLE {alterable(connection, schema)} RENAME COLUMN {quoted(name)} TO {quoted(new_name)}")


def _add_column(connection: SinkConnection, schema: TableSchema, column: ColumnShape) -> None:
    """Add the column; give rows the value that they have at the source if the sink's table has such a column already."""
    target = describe_target(connection, schema)
    if (there := target.column(column.name)) is None:
        add_column(connection, schema, column, alterable(connection, schema))
        return
    name = quoted(column.name)
    text = "NULL" if column.missing_text is None else sql.Literal(column.missing_text).as_string(None)
    value = f"{text}::{quoted(there.type_schema, there.type_name)}"
    differs = f"NOT (ROW({name})::record OPERATOR(pg_catalog.*=) ROW({value})::record)"
    connection.execute(f"UPDATE {schema.quoted} SET {name} = {value} WHERE {differs}")


def _set_key(connection: SinkConnection, schema: TableSchema, names: Sequence[str], former: Sequence[str]) -> None:
    """Drop what makes `former` unique, and have the sink's table refuse a second row with the same `names`."""
    table, target = schema.quoted, describe_target(connection, schema)
    found = connection.query(_UNIQUE, (target.table_id,))
    has_primary = False
    for index, index_schema, constraint, columns, is_primary in found:
        if former and set(columns) == set(former) and set(columns) != set(names):
            if constraint is not None:
                connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {quoted(constraint)}")
            else:
                connection.execute(f"DROP INDEX {quoted(index_schema, index)}")
            for name in set(columns) - set(names) if is_primary else ():
                connection.execute(f"ALTER TABLE {table} ALTER COLUMN {quoted(name)} DROP NOT NULL")
        else:
            has_primary = has_primary or is_primary
    if names and not any(set(columns) == set(names) for _, _, _, columns, _ in found):
        kind = "UNIQUE" if has_primary else "PRIMARY KEY"
        connection.execute(f"ALTER TABLE {table} ADD {kind} ({', '.join(map(quoted, names))})")
