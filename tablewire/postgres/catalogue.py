"""What the source's catalogue says of tables: which ones a filter matches, and how each can be replicated.

A pattern is `schema.table` with * and ? in both parts; `!pattern` excludes and always wins. Ordinary and permanent tables
match, partitions included (each partition is a table of its own); partitioned roots, views, foreign and temporary tables, the
system schemas and Tablewire's own schema never do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.connections import Connection, full_table_name, quote_table

OWN_SCHEMA = "tablewire"
"""Where a PostgreSQL sink keeps positions; never replicated."""


class TableFilter:
    """The compiled patterns of a changefeed. OperatingError for a pattern that cannot be right."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        included: list[re.Pattern[str]] = []
        excluded: list[re.Pattern[str]] = []
        for pattern in self.patterns:
            text = pattern.strip()
            target = excluded if text.startswith("!") else included
            target.append(_compile(text.removeprefix("!"), pattern))
        if not included:
            raise OperatingError("the table filter includes nothing: give at least one pattern such as 'public.*'")
        self._included = included
        self._excluded = excluded

    def matches(self, schema: str, name: str) -> bool:
        path = f"{schema}\0{name}"
        return any(p.match(path) for p in self._included) and not any(p.match(path) for p in self._excluded)


def _compile(text: str, pattern: str) -> re.Pattern[str]:
    schema, separator, name = text.partition(".")
    if not separator or not schema or not name:
        raise OperatingError(f"table pattern {pattern!r}: expected schema.table, with * and ? in either part")
    parts = ("".join({"*": "[^\0]*", "?": "[^\0]"}.get(char, re.escape(char)) for char in part) for part in (schema, name))
    return re.compile("\0".join(parts) + r"\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SourceTable:
    """One table as the filter sees it. replica_identity: d(efault), i(ndex), f(ull), n(othing). has_key: a primary key that
    can identify rows (valid, not deferrable), or with `i` the index that the replica identity names."""

    table_id: TableID
    schema: str
    name: str
    replica_identity: str
    has_key: bool

    @property
    def full_name(self) -> str:
        return full_table_name(self.schema, self.name)

    @property
    def quoted(self) -> str:
        return quote_table(self.schema, self.name)

    def why_unusable(self) -> str:
        """Why changes of this table cannot be told apart by row; empty when they can."""
        return identity_problem(self.full_name, self.replica_identity, self.has_key)


def identity_problem(full_name: str, replica_identity: str, has_key: bool) -> str:
    if replica_identity == "n":
        return (
            f"table {full_name} has REPLICA IDENTITY NOTHING, so updates and deletes do not say which row they mean: "
            f"ALTER TABLE {full_name} REPLICA IDENTITY DEFAULT (with a primary key) or FULL"
        )
    if replica_identity == "i" and not has_key:
        return (
            f"table {full_name} has REPLICA IDENTITY USING INDEX, but that index is not there any more: "
            f"ALTER TABLE {full_name} REPLICA IDENTITY DEFAULT (with a primary key), FULL, or another index"
        )
    if replica_identity == "d" and not has_key:
        return (
            f"table {full_name} has no primary key and the default replica identity: "
            f"add a primary key, or ALTER TABLE {full_name} REPLICA IDENTITY FULL"
        )
    return ""


_USABLE = """EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid
               AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary AND i.indimmediate END)"""
_TABLES = """
SELECT c.oid::bigint, n.nspname, c.relname, c.relreplident,
       {usable}
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', %s)
 ORDER BY 2, 3
"""


def matching_tables(connection: Connection, table_filter: TableFilter) -> list[SourceTable]:
    """The tables that the filter matches now, ordered by name."""
    tables: list[SourceTable] = []
    for row in connection.execute(_TABLES.replace("{usable}", _USABLE).encode(), (OWN_SCHEMA,)):
        table_id, schema, name, identity, has_key = row
        if table_filter.matches(str(schema), str(name)):
            tables.append(SourceTable(_integer(table_id), str(schema), str(name), _char(identity), bool(has_key)))
    return tables


@dataclass(frozen=True, slots=True)
class CatalogueColumn:
    """One column that is replicated (not dropped, not generated).

    type_text: as in DDL, with its modifier. type_schema, type_name, type_kind: of pg_type (kind b, e, d, c, r, …).
    has_binary: the type has a binary output. has_default: or is an identity. missing_text: the value that rows from before the
    column existed have, None if none.
    """

    name: str
    type_oid: int
    type_text: str
    type_schema: str
    type_name: str
    type_kind: str
    element_oid: int
    has_binary: bool
    not_null: bool
    has_default: bool
    missing_text: str | None


@dataclass(frozen=True, slots=True)
class TableSchema:
    """One table as a writer needs it. primary_key: its columns in key order. identity: the columns that old rows are told by
    (those of the replica identity's index, or of the primary key); empty when only the whole row identifies it. published_ts:
    where it was added to the changefeed's publication; changes from before are not to be had. 0: it was there from the
    beginning, or nobody asked. released_ts: where the changefeed's slot stood when the table was prepared: what the sink had
    confirmed by then."""

    table_id: TableID
    schema: str
    name: str
    replica_identity: str
    primary_key: tuple[str, ...]
    identity: tuple[str, ...]
    columns: tuple[CatalogueColumn, ...]
    usable_key: bool = True
    published_ts: Ts = 0
    released_ts: Ts = 0

    @property
    def full_name(self) -> str:
        return full_table_name(self.schema, self.name)

    @property
    def quoted(self) -> str:
        return quote_table(self.schema, self.name)

    def column(self, name: str) -> CatalogueColumn | None:
        return next((column for column in self.columns if column.name == name), None)


_DESCRIBE = """
SELECT c.oid::bigint, n.nspname, c.relname, c.relreplident,
       (SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
         WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid AND k.n <= i.indnkeyatts),
       (SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
         WHERE i.indrelid = c.oid AND i.indisreplident AND k.n <= i.indnkeyatts),
       {usable}
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND {where}
"""

_COLUMNS = """
SELECT a.attname, a.atttypid::bigint, format_type(a.atttypid, a.atttypmod), tn.nspname, t.typname, t.typtype, t.typelem::bigint,
       t.typsend <> 0, a.attnotnull, a.atthasdef OR a.attidentity <> '', {missing}
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
 WHERE a.attrelid = %s::oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
 ORDER BY a.attnum
"""
# attmissingval is an anyarray of one element; through text[] it is read without knowing the type.
_MISSING = "CASE WHEN a.atthasmissing THEN (a.attmissingval::text::text[])[1] END"


def describe_table(connection: Connection, table_id: TableID) -> TableSchema | None:
    """The table of this id, None when there is none."""
    return _describe(connection, "c.oid = %s::oid", (table_id,))


def describe_named_table(connection: Connection, schema: str, name: str) -> TableSchema | None:
    """The table of this name, None when there is none."""
    return _describe(connection, "n.nspname = %s AND c.relname = %s", (schema, name))


def _describe(connection: Connection, where: str, values: tuple[object, ...]) -> TableSchema | None:
    row = connection.execute(_DESCRIBE.replace("{where}", where).replace("{usable}", _USABLE).encode(), values).fetchone()
    if row is None:
        return None
    table_id, schema, name, identity_kind, primary_key, identity_index, usable_key = row
    kind = _char(identity_kind)
    key = tuple(str(column) for column in primary_key) if isinstance(primary_key, list) else ()
    index = tuple(str(column) for column in identity_index) if isinstance(identity_index, list) else ()
    columns = tuple(
        CatalogueColumn(
            name=str(column[0]),
            type_oid=_integer(column[1]),
            type_text=str(column[2]),
            type_schema=str(column[3]),
            type_name=str(column[4]),
            type_kind=_char(column[5]),
            element_oid=_integer(column[6]),
            has_binary=bool(column[7]),
            not_null=bool(column[8]),
            has_default=bool(column[9]),
            missing_text=None if column[10] is None else str(column[10]),
        )
        for column in connection.execute(_COLUMNS.replace("{missing}", _MISSING).encode(), (table_id,))
    )
    identity = index if kind == "i" and index else key if usable_key else ()
    return TableSchema(_integer(table_id), str(schema), str(name), kind, key, identity, columns, bool(usable_key))


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"the catalogue gave {value!r} where a number was expected")
    return value


def _char(value: object) -> str:
    """A `"char"` column, which psycopg gives as bytes or str by its version."""
    return value.decode() if isinstance(value, bytes) else str(value)
