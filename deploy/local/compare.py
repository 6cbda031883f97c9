"""Compare tables of two PostgreSQL databases by content: the text of every column, row by row,
never by counts.

Both sides are streamed in the order of their keys, compared by the bytes of their text, and merged.
A table without a primary key is ordered by all of its columns, so that a surplus row is found there
as well.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from operator import itemgetter
from typing import Any, TypeAlias

import psycopg
from psycopg import sql

EXAMPLES_MAX = 5
"""The number of differences that are described per table; the others are counted."""
TEXT_MAX = 200
CONNECT_TIMEOUT_S = 10
FETCH_ROWS = 1_000

_SESSION = (
    "SET datestyle TO 'ISO, YMD'",
    "SET intervalstyle TO 'postgres'",
    "SET timezone TO 'UTC'",
    "SET bytea_output TO 'hex'",
    "SET extra_float_digits TO 1",
    "SET client_encoding TO 'UTF8'",
)
_Row: TypeAlias = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """A row or table that differs. what: "missing", "extra", "differs" or "table"."""

    table: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.table}: {self.what}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result. rows: at the source. different: rows or tables that differ. examples: a few per table."""

    tables: int
    rows: int
    different: int
    examples: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        return self.different == 0

    def __str__(self) -> str:
        if self.equal:
            return f"{self.tables} tables, {self.rows} rows: the same"
        return f"{self.different} of {self.rows} rows in {self.tables} tables differ: " + "; ".join(map(str, self.examples))


def compare(source_uri: str, sink_uri: str, tables: Sequence[str]) -> Comparison:
    """Compare these tables ("schema.table"), each side in one snapshot. Raises psycopg.Error."""
    with _session(source_uri) as source, _session(sink_uri) as sink:
        found = [_compare_table(source, sink, table) for table in tables]
    examples = tuple(example for one in found for example in one.examples)
    return Comparison(len(tables), sum(one.rows for one in found), sum(one.different for one in found), examples)


def _session(uri: str) -> psycopg.Connection[Any]:
    connection = psycopg.connect(uri, connect_timeout=CONNECT_TIMEOUT_S)
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    for setting in _SESSION:
        connection.execute(setting.encode())
    return connection


def _columns(connection: psycopg.Connection[Any], table: str) -> list[tuple[str, str, int]]:
    """Return (name, type, position in the primary key or -1) of each column; empty when there is no such table."""
    schema, _, name = table.partition(".")
    return connection.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod),"
        " coalesce(array_position(i.indkey::int2[], a.attnum), -1)"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid"
        " LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary"
        " WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
        (schema, name),
    ).fetchall()


def _compare_table(source: psycopg.Connection[Any], sink: psycopg.Connection[Any], table: str) -> Comparison:
    columns, others = _columns(source, table), _columns(sink, table)
    kinds, other_kinds = ([(name, kind) for name, kind, _ in side] for side in (columns, others))
    if kinds != other_kinds or not kinds:
        reason = f"columns {kinds} in the source, {other_kinds} in the sink"
        if not kinds or not other_kinds:
            reason = f"it does not exist in the {'sink' if kinds else 'source'}"
        return Comparison(1, 0, 1, (Difference(table, "table", reason),))
    key = [name for position, name in sorted((position, name) for name, _, position in columns) if position >= 0]
    names = [*key, *(name for name, _ in kinds if name not in key)]
    keys = len(key) or len(names)
    rows, different, examples = 0, 0, list[Difference]()
    for mine, theirs in _by_key(_rows(source, table, names, keys), _rows(sink, table, names, keys), keys):
        rows += len(mine)
        if mine != theirs:
            found = list(_differences(names, keys, mine, theirs))
            different += len(found)
            examples += [Difference(table, what, detail) for what, detail in found[: EXAMPLES_MAX - len(examples)]]
    return Comparison(1, rows, different, tuple(examples))


def _rows(connection: psycopg.Connection[Any], table: str, names: Sequence[str], keys: int) -> Iterator[_Row]:
    """Yield the rows as text, ordered by the first `keys` columns: NULLs first, then by bytes."""
    texts = [sql.SQL("{}::text").format(sql.Identifier(name)) for name in names]
    order = sql.SQL(", ").join(sql.SQL('{} COLLATE "C" NULLS FIRST').format(text) for text in texts[:keys])
    select = sql.SQL("SELECT {} FROM {} ORDER BY {}").format(
        sql.SQL(", ").join(texts), sql.Identifier(*table.split(".", 1)), order
    )
    with connection.cursor("rows") as cursor:  # named: the server keeps what was not fetched yet
        cursor.itersize = FETCH_ROWS
        yield from cursor.execute(select)


def _by_key(source: Iterator[_Row], sink: Iterator[_Row], keys: int) -> Iterator[tuple[list[_Row], list[_Row]]]:
    """Yield the rows of the source and of the sink that have the same key, for each key."""

    def keyed(rows: Iterator[_Row], is_sink: bool) -> Iterator[tuple[tuple[tuple[bool, str], ...], bool, _Row]]:
        for row in rows:
            yield tuple((field is not None, field or "") for field in row[:keys]), is_sink, row

    merged = heapq.merge(keyed(source, False), keyed(sink, True), key=itemgetter(0))
    for _, group in groupby(merged, key=itemgetter(0)):
        sides: tuple[list[_Row], list[_Row]] = ([], [])
        for _, is_sink, row in group:
            sides[is_sink].append(row)
        yield sides


def _differences(names: Sequence[str], keys: int, mine: list[_Row], theirs: list[_Row]) -> Iterator[tuple[str, str]]:
    """Yield (what, detail) of each difference between the source's and the sink's rows of one key."""
    key = _short(", ".join(f"{name}={_text(field)}" for name, field in zip(names[:keys], (mine or theirs)[0], strict=False)))
    for one, other in zip_longest(mine, theirs):
        if other is None:
            yield "missing", f"the sink has no row {key}"
        elif one is None:
            yield "extra", f"the source has no row {key}"
        elif one != other:
            changed = [
                f"{name}: source {_short(_text(left))} sink {_short(_text(right))}"
                for name, left, right in zip(names, one, other, strict=True)
                if left != right
            ]
            yield "differs", f"row {key}: " + "; ".join(changed)


def _text(field: str | None) -> str:
    return "NULL" if field is None else repr(field)


def _short(text: str) -> str:
    return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}... ({len(text)} characters)"
