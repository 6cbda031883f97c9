"""Tables as the catalogue of a server describes them: which ones a filter matches, and their columns and keys.

A pattern is `schema.table` with * and ? in both parts; `!pattern` excludes and takes precedence.
Ordinary permanent tables match, partitions included (each partition is a table of its own).
Partitioned roots, views, foreign and temporary tables, the system schemas and Tablewire's own schema
never match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.rows import args_row

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.connections import Connection, full_table_name, quoted

OWN_SCHEMA = "tablewire"
"""Where a PostgreSQL sink keeps positions; never replicated."""


class TableFilter:
    """The compiled patterns of a changefeed. Raises OperatingError for a malformed pattern."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._included: list[re.Pattern[str]] = []
        self._excluded: list[re.Pattern[str]] = []
        for pattern in self.patterns:
            text = pattern.strip()
            target = self._excluded if text.startswith("!") else self._included
            target.append(_compile(text.removeprefix("!"), pattern))
        if not self._included:
            raise OperatingError("the table filter includes nothing: give at least one pattern such as 'public.*'")

    def matches(self, schema: str, name: str) -> bool:
        path = f"{schema}\0{name}"
        return any(p.match(path) for p in self._included) and not any(p.match(path) for p in self._excluded)


def _compile(text: str, pattern: str) -> re.Pattern[str]:
    schema, _, name = text.partition(".")
    if not schema or not name:
        raise OperatingError(f"table pattern {pattern!r}: expected schema.table, with * and ? in either part")
    parts = ("".join({"*": "[^\0]*", "?": "[^\0]"}.get(char, re.escape(char)) for char in part) for part in (schema, name))
    return re.compile("\0".join(parts) + r"\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SourceTable:
    """A table that can be replicated.

    replica_identity: d(efault), i(ndex), f(ull) or n(othing). has_key: it has a valid primary key that
    is not deferrable, or, for replica identity `i`, the index that it names.
    """

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
        return quoted(self.schema, self.name)

    def why_unusable(self) -> str:
        """Return why changes of this table do not identify their row; empty if they do."""
        alter = f"ALTER TABLE {self.full_name} REPLICA IDENTITY"
        if self.replica_identity == "n":
            problem = "has REPLICA IDENTITY NOTHING, so updates and deletes do not identify their row"
            remedy = f"{alter} DEFAULT (with a primary key) or FULL"
        elif self.replica_identity == "i" and not self.has_key:
            problem = "has REPLICA IDENTITY USING INDEX, but that index no longer exists"
            remedy = f"{alter} DEFAULT (with a primary key), FULL, or another index"
        elif self.replica_identity == "d" and not self.has_key:
            problem = "has no primary key and the default replica identity"
            remedy = f"add a primary key, or {alter} FULL"
        else:
            return ""
        return f"table {self.full_name} {problem}: {remedy}"


_TABLE_FIELDS = """c.oid::bigint, n.nspname, c.relname, c.relreplident::text,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid
               AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary AND i.indimmediate END)"""
_TABLES = f"""
SELECT {_TABLE_FIELDS}
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', %s)
 ORDER BY 2, 3
"""


def matching_tables(connection: Connection, table_filter: TableFilter) -> list[SourceTable]:
    """Return the tables that the filter matches now, ordered by name."""
    with connection.cursor(row_factory=args_row(SourceTable)) as cursor:
        found = cursor.execute(_TABLES, (OWN_SCHEMA,))
        return [table for table in found if table_filter.matches(table.schema, table.name)]


@dataclass(frozen=True, slots=True)
class CatalogueColumn:
    """A column that is replicated (neither dropped nor generated).

    type_text: as in DDL, with its modifier. type_schema, type_name: of pg_type. element_oid: of an
    array, else 0. has_binary: the type has a binary output. has_default: a default or an identity.
    missing_text: the value of rows that are older than the column, None if it has none.
    """

    name: str
    type_oid: int
    type_text: str
    type_schema: str
    type_name: str
    element_oid: int
    has_binary: bool
    has_default: bool
    missing_text: str | None


@dataclass(frozen=True, slots=True)
class TableSchema(SourceTable):
    """A table as a writer needs it.

    primary_key: its columns in key order. identity: the columns by which old rows are identified (of
    the index of the replica identity, or the primary key); empty if only the whole row identifies one.
    published_ts: where it was added to the publication; earlier changes cannot be had. 0: from the
    beginning, or unknown. released_ts: where the changefeed's slot stood when the table was prepared;
    everything before was confirmed by the sink.
    """

    primary_key: tuple[str, ...]
    identity: tuple[str, ...]
    columns: tuple[CatalogueColumn, ...]
    published_ts: Ts = 0
    released_ts: Ts = 0

    def column(self, name: str) -> CatalogueColumn | None:
        return next((column for column in self.columns if column.name == name), None)


_INDEX_COLUMNS = """ARRAY(SELECT a.attname::text FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
         WHERE i.indrelid = c.oid AND k.n <= i.indnkeyatts AND {} ORDER BY k.n)"""
_DESCRIBE = f"""
SELECT {_TABLE_FIELDS},
       {_INDEX_COLUMNS.format("i.indisprimary AND i.indisvalid")}, {_INDEX_COLUMNS.format("i.indisreplident")}
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND """

# attmissingval is an anyarray of one element; as text[] it can be read without knowing the type.
_COLUMNS = """
SELECT a.attname, a.atttypid::bigint, format_type(a.atttypid, a.atttypmod), tn.nspname, t.typname, t.typelem::bigint,
       t.typsend <> 0, a.atthasdef OR a.attidentity <> '',
       CASE WHEN a.atthasmissing THEN (a.attmissingval::text::text[])[1] END
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
 WHERE a.attrelid = %s::oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
 ORDER BY a.attnum
"""


def describe_table(connection: Connection, table_id: TableID) -> TableSchema | None:
    return _describe(connection, "c.oid = %s::oid", (table_id,))


def describe_named_table(connection: Connection, schema: str, name: str) -> TableSchema | None:
    return _describe(connection, "n.nspname = %s AND c.relname = %s", (schema, name))


def _describe(connection: Connection, where: str, values: tuple[object, ...]) -> TableSchema | None:
    if (row := connection.execute(_DESCRIBE + where, values).fetchone()) is None:
        return None
    table_id, schema, table, replica_identity, has_key, primary_key, identity_index = row
    with connection.cursor(row_factory=args_row(CatalogueColumn)) as cursor:
        columns = tuple(cursor.execute(_COLUMNS, (table_id,)))
    identity = identity_index if replica_identity == "i" and identity_index else primary_key if has_key else ()
    return TableSchema(table_id, schema, table, replica_identity, has_key, tuple(primary_key), tuple(identity), columns)
