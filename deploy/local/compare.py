"""Compares tables of two PostgreSQL databases by content: every column's text, ordered by key, streamed, never by counts.

Both sides are read as `COPY (SELECT key..., rest... ORDER BY key) TO STDOUT` with keys ordered by the bytes of their text, and
merged. A table without a primary key is ordered by all of its columns, so that a row too many is found there as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

EXAMPLES_MAX = 5
"""Differences that are described, a table; the rest is counted."""
TEXT_MAX = 200
CONNECT_TIMEOUT_S = 10

_SESSION = (
    "SET datestyle TO 'ISO, YMD'",
    "SET intervalstyle TO 'postgres'",
    "SET timezone TO 'UTC'",
    "SET bytea_output TO 'hex'",
    "SET extra_float_digits TO 1",
    "SET client_encoding TO 'UTF8'",
)
_UNESCAPED = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v", b"\\": b"\\"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One row (or table) that is not the same. what: "missing", "extra", "differs" or "table"; detail: for a person."""

    table: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.table}: {self.what}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """rows: compared at the source. different: how many rows (or tables) are not the same; examples: the first few of each."""

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


@dataclass(frozen=True, slots=True)
class _Layout:
    columns: tuple[tuple[str, str], ...]  # (name, type)
    key: tuple[str, ...]  # empty: no primary key

    @property
    def ordered(self) -> list[str]:
        """Columns, the key's first."""
        return [*self.key, *(name for name, _ in self.columns if name not in self.key)]


def compare(source_uri: str, sink_uri: str, tables: Sequence[str]) -> Comparison:
    """Compare these tables ("schema.table"); each side is read in one snapshot. psycopg.Error when a side cannot be read."""
    rows, different, examples = 0, 0, list[Difference]()
    with _session(source_uri) as source, _session(sink_uri) as sink:
        for table in tables:
            found = _compare_table(source, sink, table)
            rows += found[0]
            different += found[1]
            examples.extend(found[2])
    return Comparison(len(tables), rows, different, tuple(examples))


def _session(uri: str) -> psycopg.Connection[Any]:
    connection = psycopg.connect(uri, connect_timeout=CONNECT_TIMEOUT_S)
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    for setting in _SESSION:
        connection.execute(setting.encode())
    return connection


def _layout(connection: psycopg.Connection[Any], table: str) -> _Layout | None:
    """None when there is no such table."""
    schema, _, name = table.partition(".")
    columns = connection.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod),"
        " coalesce(array_position(i.indkey::int2[], a.attnum), -1)"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid"
        " LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary"
        " WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
        (schema, name),
    ).fetchall()
    if not columns:
        return None
    key = sorted((position, column) for column, _, position in columns if position >= 0)
    return _Layout(tuple((column, kind) for column, kind, _ in columns), tuple(column for _, column in key))


def _compare_table(
    source: psycopg.Connection[Any], sink: psycopg.Connection[Any], table: str
) -> tuple[int, int, list[Difference]]:
    layout, theirs = _layout(source, table), _layout(sink, table)
    if layout is None or theirs is None:
        where = "source" if layout is None else "sink"
        return 0, 1, [Difference(table, "table", f"there is none in the {where}")]
    if layout.columns != theirs.columns:
        return 0, 1, [Difference(table, "table", f"columns {layout.columns} in the source, {theirs.columns} in the sink")]
    names = layout.ordered
    keys = len(layout.key) or len(names)
    return _merge(table, names, keys, _rows(source, table, names, keys), _rows(sink, table, names, keys))


def _rows(connection: psycopg.Connection[Any], table: str, names: Sequence[str], keys: int) -> Iterator[bytes]:
    """The rows as lines of COPY's text format, without the newline, ordered by the first `keys` columns."""
    texts = [sql.SQL("{}::text").format(sql.Identifier(name)) for name in names]
    order = sql.SQL(", ").join(sql.SQL('{} COLLATE "C" NULLS FIRST').format(text) for text in texts[:keys])
    select = sql.SQL("SELECT {} FROM {} ORDER BY {}").format(
        sql.SQL(", ").join(texts), sql.Identifier(*table.split(".", 1)), order
    )
    with connection.cursor() as cursor, cursor.copy(sql.SQL("COPY ({}) TO STDOUT").format(select)) as copy:
        rest = b""
        for chunk in copy:
            *lines, rest = (rest + bytes(chunk)).split(b"\n")
            yield from lines


def _merge(
    table: str, names: Sequence[str], keys: int, source: Iterator[bytes], sink: Iterator[bytes]
) -> tuple[int, int, list[Difference]]:
    rows, different, examples = 0, 0, list[Difference]()

    def note(what: str, detail: str) -> None:
        nonlocal different
        different += 1
        if len(examples) < EXAMPLES_MAX:
            examples.append(Difference(table, what, detail))

    left, right = next(source, None), next(sink, None)
    while left is not None or right is not None:
        if left == right:
            rows += 1
            left, right = next(source, None), next(sink, None)
            continue
        left_key = _key(left, keys) if left is not None else None
        right_key = _key(right, keys) if right is not None else None
        if right_key is None or (left_key is not None and left_key < right_key):
            assert left is not None
            rows += 1
            note("missing", f"the sink has no row {_describe(names[:keys], left)}")
            left = next(source, None)
        elif left_key is None or right_key < left_key:
            assert right is not None
            note("extra", f"the source has no row {_describe(names[:keys], right)}")
            right = next(sink, None)
        else:
            assert left is not None
            assert right is not None
            rows += 1
            note("differs", _describe_difference(names, keys, left, right))
            left, right = next(source, None), next(sink, None)
    return rows, different, examples


def _key(line: bytes, keys: int) -> tuple[tuple[bool, bytes], ...]:
    """Ordered as the server orders: NULL first, then by bytes."""
    return tuple((field != b"\\N", _unescape(field)) for field in line.split(b"\t")[:keys])


def _unescape(field: bytes) -> bytes:
    if b"\\" not in field or field == b"\\N":
        return field
    parts = field.split(b"\\")
    text, index = parts[0], 1
    while index < len(parts):
        part = parts[index]
        if part:
            text += _UNESCAPED.get(part[:1], part[:1]) + part[1:]
            index += 1
        else:  # an escaped backslash: what follows it is plain
            text += b"\\" + (parts[index + 1] if index + 1 < len(parts) else b"")
            index += 2
    return text


def _describe(names: Sequence[str], line: bytes) -> str:
    fields = line.split(b"\t")
    return _short(", ".join(f"{name}={field.decode('utf-8', 'replace')}" for name, field in zip(names, fields, strict=False)))


def _describe_difference(names: Sequence[str], keys: int, left: bytes, right: bytes) -> str:
    changed = [
        f"{name}: source {_short(mine.decode('utf-8', 'replace'))} sink {_short(theirs.decode('utf-8', 'replace'))}"
        for name, mine, theirs in zip(names, left.split(b"\t"), right.split(b"\t"), strict=False)
        if mine != theirs
    ]
    return f"row {_describe(names[:keys], left)}: " + "; ".join(changed)


def _short(text: str) -> str:
    return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]}... ({len(text)} characters)"
