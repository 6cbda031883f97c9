"""Tables as the catalogue of a server describes them: which ones a filter matches, and their columns and keys.

Ordinary permanent tables can be replicated, partitions included. By default each partition without
partitions of its own (a leaf) is a table of its own; with `partitions=root` a partitioned table is one, and
its partitions are not listed. A partition belongs to the filter if a pattern matches it or a table that
it is a partition of, and none with `!` does, as it is published by PostgreSQL when its root is.
Views, foreign, unlogged and temporary tables are named, but never replicated; the system schemas and
Tablewire's own never match.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from psycopg.rows import args_row, dict_row, kwargs_row

from tablewire.model.ids import TableID, Ts
from tablewire.postgres.connections import Connection, full_table_name, quoted
from tablewire.postgres.filters import TableFilter
from tablewire.postgres.partition_trees import leaf_problems
from tablewire.postgres.shapes import TableShape

OWN_SCHEMA = "tablewire"
"""Where a PostgreSQL sink keeps positions; never replicated."""
OPERATIONS = ("insert", "update", "delete", "truncate")
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
GENERATED_VERSION = 180000
"""The first version that can publish generated columns."""


@dataclass(frozen=True, slots=True)
class PublicationRules:
    """What a changefeed publishes.

    operations: of OPERATIONS. by_root: a partitioned table is one table. generated: stored generated
    columns are published, which PostgreSQL 18 introduced.
    """

    operations: tuple[str, ...] = OPERATIONS
    by_root: bool = False
    generated: bool = False

    @property
    def needs_identity(self) -> bool:
        """Updates or deletes are published, so the source refuses them in tables that do not identify their rows."""
        return "update" in self.operations or "delete" in self.operations


DEFAULT_RULES = PublicationRules()


@dataclass(frozen=True, slots=True)
class SourceTable:
    """A table that can be replicated.

    replica_identity: d(efault), i(ndex), f(ull) or n(othing). has_key: it has a valid primary key that
    is not deferrable, or, for replica identity `i`, the index that it names. kind: r, or p for a
    partitioned table. generated: the kinds of its generated columns, s(tored) and v(irtual).
    generated_key: one of them is in the key. ancestors: the tables that it is a partition of, its root
    last. leaf_problem: why its partitions prevent that it is replicated as one table. server_version: as
    libpq has it.
    """

    table_id: TableID
    schema: str
    name: str
    replica_identity: str
    has_key: bool
    kind: str = field(default="r", kw_only=True)
    persistence: str = field(default="p", kw_only=True)
    generated: str = field(default="", kw_only=True)
    generated_key: bool = field(default=False, kw_only=True)
    ancestors: tuple[TableID, ...] = field(default=(), kw_only=True)
    leaf_problem: str = field(default="", kw_only=True)
    server_version: int = field(default=0, kw_only=True)

    @property
    def full_name(self) -> str:
        return full_table_name(self.schema, self.name)

    @property
    def quoted(self) -> str:
        return quoted(self.schema, self.name)

    @property
    def why_not_replicated(self) -> str:
        """Why a relation of this kind cannot be published; empty if it can."""
        persistence = {"u": "an unlogged table", "t": "a temporary table"}
        what = _KINDS.get(self.kind) or persistence.get(self.persistence, "")
        return f"{self.full_name} is {what}, which cannot be replicated" if what else ""

    def why_unusable(self, rules: PublicationRules = DEFAULT_RULES) -> str:
        """Return why changes of this table cannot be followed, mostly as they do not identify their row; empty if they can."""
        if self.leaf_problem:
            return f"table {self.full_name}: {self.leaf_problem}"
        if not rules.needs_identity:
            return ""
        alter = f"ALTER TABLE {self.quoted} REPLICA IDENTITY"
        only_inserts = "replicate only its inserts (source option operations=insert)"
        if self.replica_identity == "n":
            problem = "has REPLICA IDENTITY NOTHING, so updates and deletes do not identify their row"
            remedy = f"{alter} DEFAULT (with a primary key) or FULL, or {only_inserts}"
        elif self.replica_identity == "i" and not self.has_key:
            problem = "has REPLICA IDENTITY USING INDEX, but that index no longer exists"
            remedy = f"{alter} DEFAULT (with a primary key), FULL, or another index, or {only_inserts}"
        elif self.replica_identity == "d" and not self.has_key:
            problem = "has no primary key (or a deferrable one) and the default replica identity"
            remedy = f"add a primary key, or {alter} FULL, or {only_inserts}"
        elif self.replica_identity in "di" and self.generated_key and not rules.generated:
            problem = "has a generated column in its key, whose values are not replicated"
            remedy = f"{self._publish_generated}use a key without it (REPLICA IDENTITY USING INDEX), or {only_inserts}"
        elif self.replica_identity == "f" and self._hides_generated(rules):
            problem = "has REPLICA IDENTITY FULL and generated columns that are not published, so its updates would fail"
            publish = "" if "v" in self.generated else self._publish_generated
            remedy = f"{publish}{alter} DEFAULT (with a primary key) or USING INDEX, or {only_inserts}"
        else:
            return ""
        return f"table {self.full_name} {problem}: {remedy}"

    @property
    def _publish_generated(self) -> str:
        is_possible = self.server_version >= GENERATED_VERSION
        return "publish them (source option generated_columns=stored), or " if is_possible else ""

    def _hides_generated(self, rules: PublicationRules) -> bool:
        """Return whether PostgreSQL 18 refuses updates, as whole old rows would lack columns; earlier versions do not."""
        hidden = "v" if rules.generated else "sv"
        return self.server_version >= GENERATED_VERSION and any(kind in hidden for kind in self.generated)


@dataclass(frozen=True, slots=True)
class SourceListing:
    """What a filter matches. tables: ordered by name. not_replicated: reasons, of relations of other kinds."""

    tables: tuple[SourceTable, ...]
    not_replicated: tuple[str, ...] = ()


_TABLE_FIELDS = """c.oid::bigint AS table_id, n.nspname AS schema, c.relname AS name, c.relreplident::text AS replica_identity,
       k.indkey IS NOT NULL AS has_key, c.relkind::text AS kind, c.relpersistence::text AS persistence,
       coalesce(g.kinds, '') AS generated, coalesce(k.indkey::int2[] && g.attnums, false) AS generated_key,
       current_setting('server_version_num')::int AS server_version"""
_TABLE_SOURCES = """pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN LATERAL (SELECT i.indkey FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid
      AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary AND i.indimmediate END LIMIT 1) k ON true
  LEFT JOIN LATERAL (SELECT string_agg(DISTINCT a.attgenerated::text, '') AS kinds, array_agg(a.attnum) AS attnums
      FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
     WHERE d.adrelid = c.oid AND a.attgenerated <> '') g ON true"""
_RELATIONS = f"""
SELECT {_TABLE_FIELDS}, CASE WHEN c.relispartition
           THEN ARRAY(SELECT a.relid::oid::bigint FROM pg_partition_ancestors(c.oid) WITH ORDINALITY a (relid, n)
                       WHERE a.relid <> c.oid ORDER BY a.n) ELSE '{{}}' END AS ancestors
  FROM {_TABLE_SOURCES}
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', %s)
 ORDER BY n.nspname, c.relname
"""


def list_tables(connection: Connection, table_filter: TableFilter, rules: PublicationRules = DEFAULT_RULES) -> SourceListing:
    """Return the tables that the filter matches now."""
    with connection.cursor(row_factory=kwargs_row(SourceTable)) as cursor:
        relations = {table.table_id: table for table in cursor.execute(_RELATIONS, (OWN_SCHEMA,))}
    matched = {table.table_id: table for table in relations.values() if _matches(table, relations, table_filter)}
    tables, others = [], []
    for table in matched.values():
        if reason := table.why_not_replicated:
            others.append(reason)
        elif rules.by_root and any(ancestor in matched for ancestor in table.ancestors):
            continue
        elif table.kind == "r" or rules.by_root:
            tables.append(table)
    roots = [table.table_id for table in tables if table.kind == "p"]
    problems = leaf_problems(connection, roots, rules.needs_identity)
    checked = (replace(table, leaf_problem=problems.get(table.table_id, "")) for table in tables)
    return SourceListing(tuple(checked), tuple(others))


def _matches(table: SourceTable, relations: Mapping[TableID, SourceTable], table_filter: TableFilter) -> bool:
    family = [table, *(relations[ancestor] for ancestor in table.ancestors if ancestor in relations)]
    if any(table_filter.excludes(member.schema, member.name) for member in family):
        return False
    return any(table_filter.includes(member.schema, member.name) for member in family)


@dataclass(frozen=True, slots=True)
class CatalogueColumn:
    """A column that is replicated: not dropped, and not generated unless those are published.

    type_text: as in DDL, with its modifier. type_schema, type_name: of pg_type. element_oid: of an
    array, else 0. has_binary: the type has a binary output. has_default: a default or an identity.
    missing_text: the value of rows that are older than the column, None if it has none. type_modifier: -1
    if there is none.
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
    type_modifier: int = -1


@dataclass(frozen=True, slots=True)
class PartitionPlace:
    """A table in a tree of partitions. bound: as in DDL, empty for the root. key: how it is partitioned, empty for a leaf."""

    schema: str
    name: str
    bound: str
    key: str

    @property
    def quoted(self) -> str:
        return quoted(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class TableSchema(SourceTable):
    """A table as a writer needs it.

    primary_key: its columns in key order. identity: the columns by which old rows are identified (of
    the index of the replica identity, or the primary key); empty if only the whole row identifies one.
    published_ts: where it was added to the publication; earlier changes cannot be had. 0: from the
    beginning, or unknown. server: the system identifier and the timeline that it was
    described at; None: unknown. released_ts: where the changefeed's slot stood when the table was prepared;
    everything before was confirmed by the sink. places: of a partition: from its root to the table itself.
    key_is_deferrable: the primary key is, so rows may exchange its values within a transaction.
    """

    primary_key: tuple[str, ...]
    identity: tuple[str, ...]
    columns: tuple[CatalogueColumn, ...]
    published_ts: Ts = 0
    released_ts: Ts = 0
    server: tuple[int, int] | None = None
    places: tuple[PartitionPlace, ...] = ()
    key_is_deferrable: bool = False
    shape: TableShape | None = None

    @property
    def rows_of(self) -> str:
        """The table as it is read or written in SQL: without the children that inherit from it, with its partitions."""
        return self.quoted if self.kind == "p" else f"ONLY {self.quoted}"

    def column(self, name: str) -> CatalogueColumn | None:
        return next((column for column in self.columns if column.name == name), None)


_INDEX_COLUMNS = """ARRAY(SELECT a.attname::text FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, n)
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
         WHERE i.indrelid = c.oid AND k.n <= i.indnkeyatts AND {} ORDER BY k.n)"""
_DESCRIBE = f"""
SELECT {_TABLE_FIELDS},
       {_INDEX_COLUMNS.format("i.indisprimary AND i.indisvalid")} AS primary_key,
       {_INDEX_COLUMNS.format("i.indisreplident")} AS identity_index,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND NOT i.indimmediate) AS key_is_deferrable
  FROM {_TABLE_SOURCES}
 WHERE c.relkind IN ('r', 'p') AND """

# attmissingval is an anyarray of one element, whose own output function writes it here, whatever its type and delimiter are.
_COLUMNS = """
SELECT a.attname, a.atttypid::bigint, format_type(a.atttypid, a.atttypmod), tn.nspname, t.typname, t.typelem::bigint,
       t.typsend <> 0, a.atthasdef OR a.attidentity <> '',
       CASE WHEN a.atthasmissing THEN pg_catalog.array_to_string(a.attmissingval, '') END, a.atttypmod
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
 WHERE a.attrelid = %s::oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated::text = ANY(%s)
 ORDER BY a.attnum
"""

_PLACES = """
SELECT n.nspname, c.relname, coalesce(pg_get_expr(c.relpartbound, c.oid), ''), coalesce(pg_get_partkeydef(c.oid), '')
  FROM pg_partition_ancestors(%s::oid) WITH ORDINALITY a (relid, n) JOIN pg_class c ON c.oid = a.relid
  JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY a.n DESC
"""


def describe_table(connection: Connection, table_id: TableID, generated: bool = False) -> TableSchema | None:
    """Return the table, None if it does not exist. generated: with stored generated columns."""
    return _describe(connection, "c.oid = %s::oid", (table_id,), generated)


def describe_named_table(connection: Connection, schema: str, name: str) -> TableSchema | None:
    return _describe(connection, "n.nspname = %s AND c.relname = %s", (schema, name))


def _describe(connection: Connection, where: str, values: tuple[object, ...], generated: bool = False) -> TableSchema | None:
    with connection.cursor(row_factory=dict_row) as found:
        row = found.execute(_DESCRIBE + where, values).fetchone()
    if row is None:
        return None
    with connection.cursor(row_factory=args_row(CatalogueColumn)) as cursor:
        columns = tuple(cursor.execute(_COLUMNS, (row["table_id"], ["", "s"] if generated else [""])))
    with connection.cursor(row_factory=args_row(PartitionPlace)) as places_cursor:
        places = tuple(places_cursor.execute(_PLACES, (row["table_id"],)))
    primary_key, identity_index = tuple(row.pop("primary_key")), tuple(row.pop("identity_index"))
    identity = identity_index if row["replica_identity"] == "i" and identity_index else primary_key if row["has_key"] else ()
    return TableSchema(**row, primary_key=primary_key, identity=identity, columns=columns, places=places)
