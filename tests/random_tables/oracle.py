"""What a table contains, as text that can be compared, at the source and at the sink.

Compared are the columns that the source's table has and does not generate, in the types that the source
has. Columns that only the sink has count as a difference, unless the sink generates them or a step added
them there (`local_`).
"""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql

from tests.random_tables.case import Violation

Connection = psycopg.Connection[tuple[object, ...]]

SETTINGS = (
    "SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; SET timezone = 'UTC'; SET extra_float_digits = 1;"
    " SET bytea_output = 'hex'; SET lock_timeout = '150ms'; SET statement_timeout = '15s'"
)
_TABLES = """
SELECT c.oid::bigint, n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname IN ('public', 'other', 'moved')"""
_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, NULL), a.attgenerated <> ''
  FROM pg_attribute a WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attname"""
_PLACED = """
SELECT n.nspname, c.relname
  FROM tablewire.positions p JOIN pg_class c ON c.oid = to_regclass(p.table_name) JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE p.source_table_id = %s ORDER BY p.incarnation DESC LIMIT 1"""


@dataclass(frozen=True, slots=True)
class Content:
    """A table. rows: sorted texts of the rows' columns in the order of `columns`; None: there is no such table."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class SourceState:
    """The source at a quiescent position: its tables by id, each with its qualified name and content."""

    position: int
    names: dict[int, tuple[str, str]]
    contents: dict[int, Content]


def _quoted(name: tuple[str, str]) -> str:
    return sql.Identifier(*name).as_string(None)


def _columns(connection: Connection, name: tuple[str, str]) -> list[tuple[str, str, bool]]:
    return [(str(row[0]), str(row[1]), bool(row[2])) for row in connection.execute(_COLUMNS, (_quoted(name),))]


def read_source(connection: Connection, position: int, only: set[int] | None = None) -> SourceState:
    """Return all tables, or only these; nothing may write to the source meanwhile."""
    tables = {int(str(row[0])): (str(row[1]), str(row[2])) for row in connection.execute(_TABLES)}
    if only is not None:
        tables = {table_id: name for table_id, name in tables.items() if table_id in only}
    contents = {}
    for table_id, name in tables.items():
        columns = tuple((column, kind) for column, kind, is_generated in _columns(connection, name) if not is_generated)
        contents[table_id] = Content(columns, _rows(connection, name, columns, only=True))
    return SourceState(position, tables, contents)


def sink_name(connection: Connection, table_id: int, name: tuple[str, str]) -> tuple[str, str]:
    """Return where the table is at the sink: a rename may follow up to a second after the rows that came after it."""
    row = connection.execute(_PLACED, (table_id,)).fetchone()
    return name if row is None else (str(row[0]), str(row[1]))


def difference(connection: Connection, table_id: int, name: tuple[str, str], expected: Content) -> str:
    """Return how the table at the sink differs; empty if it does not."""
    while True:
        placed = sink_name(connection, table_id, name)
        try:
            found = _difference(connection, placed, expected)
        except psycopg.errors.LockNotAvailable:
            continue  # it is being changed
        except (psycopg.DataError, psycopg.ProgrammingError) as error:
            found = f"it cannot be compared at the sink: {error}"
        if sink_name(connection, table_id, name) == placed:
            return found  # it was not renamed meanwhile


def _difference(connection: Connection, name: tuple[str, str], expected: Content) -> str:
    found = connection.execute("SELECT relkind::text FROM pg_class WHERE oid = to_regclass(%s)", (_quoted(name),)).fetchone()
    if found is None:
        return "the sink has no such table"
    columns = _columns(connection, name)
    names = {column for column, _ in expected.columns}
    if missing := names - {column for column, _, _ in columns}:
        return f"columns missing at the sink: {', '.join(sorted(missing))}"
    extra = {column for column, _, is_generated in columns if not is_generated and not column.startswith("local_")} - names
    if extra:
        return f"columns only at the sink: {', '.join(sorted(extra))}"
    rows = _rows(connection, name, expected.columns, only=found[0] != "p")
    return _first_difference(expected.rows or (), rows)


def _first_difference(expected: tuple[str, ...], rows: tuple[str, ...]) -> str:
    if expected == rows:
        return ""
    missing, extra = list(expected), list(rows)
    for row in rows:
        if row in missing:
            missing.remove(row)
            extra.remove(row)
    return (
        f"{len(expected)} rows at the source, {len(rows)} at the sink;"
        f" only at the source: {_short(missing)}; only at the sink: {_short(extra)}"
    )


def _short(rows: list[str]) -> str:
    return f"{len(rows)} such as {rows[0][:200]}" if rows else "none"


def _rows(connection: Connection, name: tuple[str, str], columns: tuple[tuple[str, str], ...], only: bool) -> tuple[str, ...]:
    texts = []
    for column, kind in columns:
        value = f"{sql.Identifier(column).as_string(None)}::{kind}::text"
        texts.append(f"CASE WHEN length({value}) > 300 THEN md5({value}) ELSE {value} END")
    row = f"concat_ws('|', {', '.join(f'coalesce({text}, $n$<NULL>$n$)' for text in texts)})" if texts else "''"
    query = f"SELECT {row} FROM {'ONLY ' if only else ''}{_quoted(name)}"
    return tuple(sorted(str(found[0]) for found in connection.execute(query.encode())))


def require_equal(connection: Connection, state: SourceState, table_id: int, what: str) -> None:
    if text := difference(connection, table_id, state.names[table_id], state.contents[table_id]):
        raise Violation("difference", f"table {'.'.join(state.names[table_id])} {what}: {text}")
