"""The table at a PostgreSQL sink that a source's table is written to.

It is created if it is missing, extended by new columns, and planned: the wire type of each value, the
columns that identify rows, and the SQL of each kind of change. Everything runs inside the fenced
transaction that needs it, so a writer that was replaced does not change a table either.

A **wire type** is a type of the sink that reads the bytes of the stream (or of a COPY of the source):
the source's own type if it is built in or exists at the sink under the same name; text for enums, for
types without a binary form, and for everything if the changefeed does not use binary values. A column
whose type differs from its wire type is cast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

from psycopg import sql

from processor.postgres.sinks import ReloadNeededError
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.source_catalogue import COPY_TEXT, COPY_TEXT_ARRAY, SourceCatalogue, TypeInfo, base_of, copy_cast
from processor.postgres.wire import Relation, RelationColumn
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import CatalogueColumn, TableSchema, describe_named_table
from tablewire.postgres.connections import quoted

TEXT_OID = 25
TEXT_ARRAY_OID = 1009


@dataclass(frozen=True, slots=True)
class WireType:
    """A type that reads wire values.

    sql: its name at the sink. patch: the id that array values must carry for their element type, None
    if they are right. is_element: values fit into an array, from which unnest returns one column.
    """

    sql: str
    oid: int
    patch: bytes | None = None
    is_element: bool = True


_TEXT = WireType(quoted("pg_catalog", "text"), TEXT_OID)
_TEXT_ARRAY = WireType(f"{_TEXT.sql}[]", TEXT_ARRAY_OID, is_element=False)


@dataclass(frozen=True)
class TargetColumn:
    """A column of the source and where it is written. cast: the type to cast to, empty if the wire type is the column's."""

    name: str
    wire: WireType
    cast: str

    @cached_property
    def quoted(self) -> str:
        return quoted(self.name)

    def parameter(self, number: int) -> str:
        text = f"${number}::{self.wire.sql}"
        return f"{text}::{self.cast}" if self.cast else text

    @cached_property
    def staged(self) -> str:
        """The column of a staging table `s` as a value of the column."""
        return f"s.{self.quoted}::{self.cast}" if self.cast else f"s.{self.quoted}"


class WriteMode(IntEnum):
    """How many changes at once are written, fastest first.

    If a unique constraint is violated, the plan continues in the next mode: rows may exist already
    (COPY), or exchange values of another unique column (UPSERT); SINGLE follows the source's order.
    """

    COPY = 0
    UPSERT = 1
    SINGLE = 2


@dataclass(eq=False)
class TargetPlan:
    """How rows of one relation are written. Immutable except for `mode`.

    quoted: the table. key: positions of the columns that identify rows; empty if only whole rows do.
    """

    relation: Relation
    quoted: str
    columns: tuple[TargetColumn, ...]
    key: tuple[int, ...]
    truncate_sql: str
    mode: WriteMode = WriteMode.COPY
    _updates: dict[tuple[int, ...], str] = field(default_factory=dict)

    @cached_property
    def names(self) -> str:
        return ", ".join(column.quoted for column in self.columns)

    @cached_property
    def is_direct(self) -> bool:
        return not any(column.cast for column in self.columns)

    @cached_property
    def patches(self) -> tuple[tuple[int, bytes], ...]:
        return tuple((at, column.wire.patch) for at, column in enumerate(self.columns) if column.wire.patch is not None)

    @cached_property
    def copy_sql(self) -> str:
        return f"COPY {self.quoted} ({self.names}) FROM STDIN (FORMAT binary)"

    @cached_property
    def insert_sql(self) -> str:
        """An insert of one row, with a key an upsert; parameters: its values."""
        values = ", ".join(column.parameter(at + 1) for at, column in enumerate(self.columns))
        return f"INSERT INTO {self.quoted} ({self.names}) OVERRIDING SYSTEM VALUE VALUES ({values}){self._conflict}"

    @cached_property
    def delete_sql(self) -> str:
        """Parameters: the values of the key, of the whole row without one."""
        return f"DELETE FROM {self.quoted} WHERE {self._condition(1)}"

    @cached_property
    def delete_many_sql(self) -> str:
        """Parameters: an array of the values of each key column."""
        key = [self.columns[at] for at in self.key]
        arrays = ", ".join(f"${n + 1}::{column.wire.sql}[]" for n, column in enumerate(key))
        names = ", ".join(column.quoted for column in key)
        return f"DELETE FROM {self.quoted} t USING unnest({arrays}) AS s ({names}) WHERE {self._staged_key}"

    def update_sql(self, present: tuple[int, ...]) -> str:
        """Return an update of these columns; parameters: their values, then those of the old key or row."""
        if (text := self._updates.get(present)) is None:
            sets = ", ".join(f"{self.columns[at].quoted} = {self.columns[at].parameter(n + 1)}" for n, at in enumerate(present))
            text = f"UPDATE {self.quoted} SET {sets} WHERE {self._condition(len(present) + 1)}"
            self._updates[present] = text
        return text

    def upsert_staged_sql(self, stage: str) -> str:
        """Return an insert of all rows of a staging table, with a key an upsert."""
        return f"INSERT INTO {self.quoted} ({self.names}) {self._staged_values} FROM {stage} s{self._conflict}"

    def update_staged_sql(self, stage: str) -> str:
        """Return an update of all rows that exist and are in a staging table."""
        return f"UPDATE {self.quoted} t SET {self._staged_sets} FROM {stage} s WHERE {self._staged_key}"

    @cached_property
    def _staged_values(self) -> str:
        return "OVERRIDING SYSTEM VALUE SELECT " + ", ".join(column.staged for column in self.columns)

    @cached_property
    def _staged_sets(self) -> str:
        others = [column for at, column in enumerate(self.columns) if at not in self.key]
        return ", ".join(f"{column.quoted} = {column.staged}" for column in others)

    @cached_property
    def _staged_key(self) -> str:
        return " AND ".join(f"t.{self.columns[at].quoted} = {self.columns[at].staged}" for at in self.key)

    @cached_property
    def _conflict(self) -> str:
        """What makes an insert an upsert, if there is a key."""
        if not self.key:
            return ""
        key = ", ".join(self.columns[at].quoted for at in self.key)
        sets = ", ".join(f"{column.quoted} = EXCLUDED.{column.quoted}" for column in self.columns)
        return f" ON CONFLICT ({key}) DO UPDATE SET {sets}"

    def _condition(self, first: int) -> str:
        """Return a condition on the key, with parameters from `first` on; without a key, one that picks exactly one of the
        rows that equal this one byte for byte."""
        if self.key:
            key = [(self.columns[at], first + n) for n, at in enumerate(self.key)]
            return " AND ".join(f"{column.quoted} = {column.parameter(number)}" for column, number in key)
        values = ", ".join(column.parameter(first + at) for at, column in enumerate(self.columns))
        return f"ctid = (SELECT ctid FROM {self.quoted} WHERE ROW({self.names})::record *= ROW({values})::record LIMIT 1)"


def describe_target(connection: SinkConnection, schema: TableSchema) -> TableSchema:
    if (target := _find(connection, schema)) is None:
        raise OperatingError(f"table {schema.full_name} no longer exists at the sink; create it, or have it copied again")
    return target


def _find(connection: SinkConnection, schema: TableSchema) -> TableSchema | None:
    return connection.call(lambda found: describe_named_table(found, schema.schema, schema.name))


def create_table(connection: SinkConnection, schema: TableSchema) -> None:
    """Create the table and its schema if there is none of its name; raise OperatingError if a type is missing at the sink."""
    if _find(connection, schema) is not None:
        return
    if not schema.columns:
        raise OperatingError(f"table {schema.full_name} has no columns that can be replicated")
    lines = [f"{quoted(column.name)} {ddl_type(connection, schema, column)}" for column in schema.columns]
    key = schema.primary_key or schema.identity
    if key:
        lines.append(f"PRIMARY KEY ({', '.join(map(quoted, key))})")
    if schema.identity and set(schema.identity) != set(key):
        lines.append(f"UNIQUE ({', '.join(map(quoted, schema.identity))})")
    if not connection.query("SELECT 1 WHERE to_regnamespace(%s) IS NOT NULL", (quoted(schema.schema),)):
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema.schema)}")
    connection.execute(f"CREATE TABLE IF NOT EXISTS {schema.quoted} ({', '.join(lines)})")


def add_column(connection: SinkConnection, schema: TableSchema, column: CatalogueColumn) -> None:
    """Add the column to the table. Rows that are older than the column have its missing_text without ever being written."""
    change = f"ALTER TABLE {schema.quoted} ADD COLUMN {quoted(column.name)} {ddl_type(connection, schema, column)}"
    if column.missing_text is not None:
        default = sql.Literal(column.missing_text).as_string(None)
        change += f" DEFAULT {default}; ALTER TABLE {schema.quoted} ALTER COLUMN {quoted(column.name)} DROP DEFAULT"
    connection.execute(change)


def ddl_type(connection: SinkConnection, schema: TableSchema, column: CatalogueColumn) -> str:
    """Return the column's type as DDL; raise OperatingError if it is missing at the sink."""
    if not connection.query("SELECT 1 WHERE to_regtype(%s) IS NOT NULL", (column.type_text,)):
        raise OperatingError(
            f"table {schema.full_name}: column {column.name} has type {column.type_text}, which the sink does not have; "
            "create it there"
        )
    return column.type_text


class TargetPlanner:
    """Plans relations, and keeps the plan of each table while its relation stays the same. For one session; one thread."""

    def __init__(self, catalogue: SourceCatalogue, binary: bool) -> None:
        self._catalogue = catalogue
        self._binary = binary
        self._plans: dict[int, TargetPlan] = {}
        self._uncommitted: set[int] = set()
        """Planned in the open transaction, which may have extended their tables at the sink."""
        self._modes: dict[int, tuple[Relation, WriteMode]] = {}
        """The write modes of plans that were rolled back."""

    def cached(self, relation: Relation) -> TargetPlan | None:
        """Return the plan of exactly this shape, if there is one."""
        plan = self._plans.get(relation.relation_id)
        return plan if plan is not None and (plan.relation is relation or plan.relation == relation) else None

    def forget(self, table_id: int) -> None:
        self._plans.pop(table_id, None)
        self._modes.pop(table_id, None)

    def committed(self) -> None:
        self._uncommitted.clear()

    def rolled_back(self) -> None:
        """Drop the plans of the transaction, whose columns do not exist, but keep their write modes."""
        for relation_id in self._uncommitted:
            if (plan := self._plans.pop(relation_id, None)) is not None:
                self._modes[relation_id] = (plan.relation, plan.mode)
        self._uncommitted.clear()

    def plan(
        self, connection: SinkConnection, schema: TableSchema, relation: Relation, known_columns: Sequence[str]
    ) -> TargetPlan:
        """Extend the sink's table if needed, and plan it. Inside a transaction.

        known_columns: of the source's table when it was last written. Raise OperatingError for a change
        of shape that cannot be followed.
        """
        target = describe_target(connection, schema)
        names = {column.name for column in relation.columns}
        for name in known_columns:
            if name not in names and target.column(name) is not None:
                raise OperatingError(
                    f"table {schema.full_name}: column {name} was dropped or renamed at the source; "
                    "do the same at the sink to continue"
                )
        if missing := [column for column in relation.columns if target.column(column.name) is None]:
            self._add_columns(connection, schema, missing)
            target = describe_target(connection, schema)
        columns = self._columns(connection, target, relation.columns, is_copy=False)
        key = self._key(connection, schema, relation, target)
        plan = TargetPlan(relation, schema.quoted, columns, key, truncate_sql(connection, target))
        planned, mode = self._modes.pop(relation.relation_id, (relation, WriteMode.COPY))
        plan.mode = mode if planned == relation else WriteMode.COPY
        self._plans[relation.relation_id] = plan
        self._uncommitted.add(relation.relation_id)
        return plan

    def copy_columns(self, connection: SinkConnection, schema: TableSchema) -> tuple[TargetColumn, ...]:
        return self._columns(connection, describe_target(connection, schema), schema.columns, is_copy=True)

    def _columns(
        self,
        connection: SinkConnection,
        target: TableSchema,
        columns: Sequence[RelationColumn | CatalogueColumn],
        is_copy: bool,
    ) -> tuple[TargetColumn, ...]:
        types = self._catalogue.types_with_parts([column.type_oid for column in columns])
        wires = _WireTypes(connection, target.full_name, types, self._binary)
        found = []
        for column in columns:
            wire = wires.of(column.name, column.type_oid, is_copy)
            if (there := target.column(column.name)) is None:
                text = f"column {column.name} cannot be written at the sink (is it generated there?)"
                raise OperatingError(f"table {target.full_name}: {text}")
            cast = "" if wire.oid == there.type_oid else quoted(there.type_schema, there.type_name)
            found.append(TargetColumn(column.name, wire, cast))
        return tuple(found)

    def _add_columns(self, connection: SinkConnection, schema: TableSchema, missing: Sequence[RelationColumn]) -> None:
        current = self._catalogue.describe(schema.table_id)
        for column in missing:
            known = current.column(column.name)
            if known is None or known.type_oid != column.type_oid:
                raise OperatingError(
                    f"table {schema.full_name}: column {column.name} was added and changed again before it was replicated; "
                    "add it at the sink to continue"
                )
            if known.missing_text is None and known.has_default and has_rows(connection, schema):
                # A default that differs by row (or one that was set later, which looks the same) gave old rows values that
                # no change contains.
                raise ReloadNeededError(
                    f"table {schema.full_name}: column {column.name} was added with a default that differs by row"
                )
            add_column(connection, schema, known)

    def _key(self, connection: SinkConnection, schema: TableSchema, relation: Relation, target: TableSchema) -> tuple[int, ...]:
        if relation.replica_identity in ("d", "i"):
            key = tuple(at for at, column in enumerate(relation.columns) if column.is_identity)
        else:
            at_by_name = {column.name: at for at, column in enumerate(relation.columns)}
            names = schema.identity if all(name in at_by_name for name in schema.identity) else ()
            key = tuple(at_by_name[name] for name in names)
        # Without a key and without whole old rows (the primary key was dropped) the source itself refuses updates and deletes
        # of a published table, and inserts need no key: every change that arrives can be written.
        if key:
            _require_unique(connection, schema, [relation.columns[at].name for at in key], target)
        return key


class _WireTypes:
    """The wire types of one table's columns. types: of the source, by id."""

    def __init__(self, connection: SinkConnection, full_name: str, types: Mapping[int, TypeInfo], binary: bool) -> None:
        self._connection = connection
        self._full_name = full_name
        self._types = types
        self._binary = binary

    def of(self, column: str, oid: int, is_copy: bool) -> WireType:
        """Return the wire type of a column in the stream, or in a COPY of the source."""
        info = base_of(self._types, oid)
        cast = copy_cast(self._types, oid, self._binary)
        if cast == COPY_TEXT:
            return _TEXT
        if cast == COPY_TEXT_ARRAY:
            return _TEXT_ARRAY if is_copy else self._of_array(column, base_of(self._types, info.element_oid))
        name = quoted(info.schema, info.name)
        if info.is_builtin:
            return WireType(name, info.oid, is_element=not info.element_oid)
        if info.kind == "c" and info.has_user_fields:
            raise OperatingError(
                f"table {self._full_name}: column {column} has type {info.name}, a composite of user-defined types, whose binary"
                " form holds the source's type ids; create the changefeed with the source option binary=false"
            )
        return WireType(name, self._sink_ids(column, name)[0], is_element=info.kind != "c")

    def _of_array(self, column: str, element: TypeInfo) -> WireType:
        """Return the type of an array; its binary form contains the id of the element's type, which must be replaced."""
        if element.kind == "e" or not element.has_binary:
            return WireType(_TEXT_ARRAY.sql, TEXT_ARRAY_OID, TEXT_OID.to_bytes(4, "big"), is_element=False)
        if element.kind == "c":
            raise OperatingError(
                f"table {self._full_name}: column {column} is an array of the composite type {element.name}; "
                "create the changefeed with the source option binary=false"
            )
        name = quoted(element.schema, element.name)
        oid, array_oid = self._sink_ids(column, name)
        return WireType(f"{name}[]", array_oid, oid.to_bytes(4, "big"), is_element=False)

    def _sink_ids(self, column: str, name: str) -> tuple[int, int]:
        """Return the ids at the sink of a type and of its array type."""
        query = "SELECT oid::int8, typarray::int8 FROM pg_catalog.pg_type WHERE oid = to_regtype(%s)"
        for oid, array_oid in self._connection.query(query, (name,)):
            return oid, array_oid
        raise OperatingError(
            f"table {self._full_name}: column {column} has type {name}, which the sink does not have; create it there"
        )


def has_rows(connection: SinkConnection, schema: TableSchema) -> bool:
    return bool(connection.query(f"SELECT 1 FROM {schema.quoted} LIMIT 1"))


def _require_unique(connection: SinkConnection, schema: TableSchema, names: Sequence[str], target: TableSchema) -> None:
    """Raise OperatingError unless the sink can find a row by its key, and refuse a second one."""
    found = connection.query(
        "SELECT 1 FROM pg_catalog.pg_index i WHERE i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL"
        " AND i.indexprs IS NULL AND i.indrelid = %s::oid"
        " AND (SELECT array_agg(a.attname::text ORDER BY a.attname::text) FROM pg_catalog.pg_attribute a"
        " WHERE a.attrelid = i.indrelid AND a.attnum = ANY((i.indkey::int2[])[0:i.indnkeyatts - 1]))"
        " = (SELECT array_agg(n ORDER BY n) FROM unnest(%s::text[]) n)",
        (target.table_id, list(names)),
    )
    if not found:
        raise OperatingError(
            f"table {schema.full_name} at the sink has no unique index on ({', '.join(names)}), "
            "by which the source identifies rows"
        )


def truncate_sql(connection: SinkConnection, target: TableSchema) -> str:
    """Return TRUNCATE, or, as it is refused for a table that foreign keys refer to, a DELETE of the whole table."""
    is_referenced = connection.query(
        "SELECT 1 FROM pg_catalog.pg_constraint WHERE confrelid = %s::oid LIMIT 1", (target.table_id,)
    )
    return f"DELETE FROM {target.quoted}" if is_referenced else f"TRUNCATE {target.quoted}"
