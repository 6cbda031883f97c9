"""The table at a PostgreSQL sink that a source's table is written to: made when it is missing, extended by new columns, and
planned: which wire type each value has there, which columns tell rows apart, and the SQL of each kind of change.

Everything runs inside the fenced transaction that needs it, so that a writer that was replaced changes no table either.

A **wire type** is a type of the sink that reads the bytes which the stream (or a COPY of the source) gives: the source's own
type when it is the server's or exists at the sink under the same name, text for enums, for types without a binary form, and for
everything when the changefeed does not ask for binary values. A column whose type differs from its wire type is cast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from processor.postgres.sinks import ReloadNeededError
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.source_catalogue import COPY_TEXT, COPY_TEXT_ARRAY, SourceCatalogue, TypeInfo, base_of, copy_cast
from processor.postgres.wire import Relation, RelationColumn
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import CatalogueColumn, TableSchema
from tablewire.postgres.connections import quote_name, quote_table, quote_text

TEXT_OID = 25
TEXT_ARRAY_OID = 1009
_TEXT = 'pg_catalog."text"'


@dataclass(frozen=True, slots=True)
class WireType:
    """sql: the type's name at the sink. patch: the element's type id that array values must be given, None if they fit.
    is_element: values can be gathered in an array and come out of unnest as one column."""

    sql: str
    oid: int
    patch: bytes | None = None
    is_element: bool = True


@dataclass(frozen=True, slots=True)
class TargetColumn:
    """One column of the source and where it goes. cast: the type to cast to, empty when wire and column agree."""

    name: str
    wire: WireType
    cast: str

    @property
    def quoted(self) -> str:
        return quote_name(self.name)

    def value(self, number: int) -> str:
        """Parameter `number` as a value of the column."""
        text = f"${number}::{self.wire.sql}"
        return f"{text}::{self.cast}" if self.cast else text

    @property
    def staged(self) -> str:
        """The column of a staging table as a value of the column."""
        return f"s.{self.quoted}::{self.cast}" if self.cast else f"s.{self.quoted}"


class WriteMode(IntEnum):
    """How many changes at once are written, quickest first. A unique constraint that is violated takes a plan to the next one:
    rows may be there already (COPY), or swap values of another unique column (UPSERT); one by one is as the source did it."""

    COPY = 0
    UPSERT = 1
    SINGLE = 2


@dataclass(slots=True)
class TargetPlan:
    """How rows of one relation are written. key: positions of the columns that tell rows apart, empty = only whole rows do.
    The plan is immutable but for `way`, and for `cache`, SQL that was built once."""

    relation: Relation
    quoted: str
    columns: tuple[TargetColumn, ...]
    key: tuple[int, ...]
    is_referenced: bool
    mode: WriteMode = WriteMode.COPY
    cache: dict[tuple[object, ...], str] = field(default_factory=dict)

    @property
    def names(self) -> str:
        return ", ".join(column.quoted for column in self.columns)

    @property
    def is_direct(self) -> bool:
        """Every column takes its wire type as it is."""
        return not any(column.cast for column in self.columns)

    @property
    def patches(self) -> tuple[tuple[int, bytes], ...]:
        return tuple((at, column.wire.patch) for at, column in enumerate(self.columns) if column.wire.patch is not None)

    def insert(self) -> str:
        values = ", ".join(column.value(at + 1) for at, column in enumerate(self.columns))
        return f"INSERT INTO {self.quoted} ({self.names}) OVERRIDING SYSTEM VALUE VALUES ({values})"

    def conflict(self) -> str:
        """What makes an insert an upsert."""
        key = ", ".join(self.columns[at].quoted for at in self.key)
        sets = ", ".join(f"{column.quoted} = EXCLUDED.{column.quoted}" for column in self.columns)
        return f" ON CONFLICT ({key}) DO UPDATE SET {sets}"

    def by_key(self, first: int) -> str:
        """A condition on the key, parameters from `first` on."""
        return " AND ".join(f"{self.columns[at].quoted} = {self.columns[at].value(first + n)}" for n, at in enumerate(self.key))

    def by_row(self, first: int) -> str:
        """A condition that picks exactly one of the rows that are, byte for byte, this one."""
        row = ", ".join(column.quoted for column in self.columns)
        values = ", ".join(column.value(first + at) for at, column in enumerate(self.columns))
        return f"ctid = (SELECT ctid FROM {self.quoted} WHERE ROW({row})::record *= ROW({values})::record LIMIT 1)"


def create_table(connection: SinkConnection, schema: TableSchema) -> None:
    """Makes the table (and its schema) if there is none of its name; OperatingError when a type is missing at the sink."""
    if connection.describe(schema.schema, schema.name) is not None:
        return
    if not schema.columns:
        raise OperatingError(f"table {schema.full_name} has no columns that can be replicated")
    lines = [f"{quote_name(column.name)} {ddl_type(connection, schema, column)}" for column in schema.columns]
    key = schema.primary_key or schema.identity
    if key:
        lines.append(f"PRIMARY KEY ({', '.join(map(quote_name, key))})")
    if schema.identity and set(schema.identity) != set(key):
        lines.append(f"UNIQUE ({', '.join(map(quote_name, schema.identity))})")
    found = connection.execute(f"SELECT to_regnamespace({quote_text(quote_name(schema.schema))}) IS NOT NULL")[-1]
    if found.get_value(0, 0) != b"t":
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote_name(schema.schema)}")
    connection.execute(f"CREATE TABLE IF NOT EXISTS {schema.quoted} ({', '.join(lines)})")


def ddl_type(connection: SinkConnection, schema: TableSchema, column: CatalogueColumn) -> str:
    """The column's type as DDL; OperatingError when the sink does not have it."""
    found = connection.execute(f"SELECT to_regtype({quote_text(column.type_text)}) IS NOT NULL")[-1]
    if found.get_value(0, 0) != b"t":
        raise OperatingError(
            f"table {schema.full_name}: column {column.name} has type {column.type_text}, which the sink does not have; "
            "create it there"
        )
    return column.type_text


class TargetPlanner:
    """Plans relations; keeps the plan of each table while its relation stays the same. One session's, one thread."""

    def __init__(self, catalogue: SourceCatalogue, binary: bool) -> None:
        self._catalogue = catalogue
        self._binary = binary
        self._plans: dict[int, TargetPlan] = {}
        self._uncommitted: set[int] = set()
        """Planned in the open transaction, which may have extended their tables at the sink."""
        self._modes: dict[int, tuple[Relation, WriteMode]] = {}
        """What plans had learnt that were rolled back."""

    def cached(self, relation: Relation) -> TargetPlan | None:
        """The plan of exactly this shape."""
        plan = self._plans.get(relation.relation_id)
        return plan if plan is not None and (plan.relation is relation or plan.relation == relation) else None

    def forget(self, table_id: int) -> None:
        self._plans.pop(table_id, None)
        self._modes.pop(table_id, None)

    def committed(self) -> None:
        self._uncommitted.clear()

    def rolled_back(self) -> None:
        """Columns that were added in the transaction are not there: its plans must be made again, and go on in their way."""
        for relation_id in self._uncommitted:
            plan = self._plans.pop(relation_id, None)
            if plan is not None:
                self._modes[relation_id] = (plan.relation, plan.mode)
        self._uncommitted.clear()

    def plan(
        self, connection: SinkConnection, schema: TableSchema, relation: Relation, known_columns: Sequence[str]
    ) -> TargetPlan:
        """Extends the sink's table where it must, and plans. known_columns: of the source's table when it was last written.
        OperatingError for a change of shape that cannot be followed. Inside a transaction."""
        full_name = schema.full_name
        target = connection.describe(schema.schema, schema.name)
        if target is None:
            raise OperatingError(f"table {full_name} does not exist at the sink any more; create it, or start the table anew")
        names = {column.name for column in relation.columns}
        for name in known_columns:
            if name not in names and target.column(name) is not None:
                raise OperatingError(
                    f"table {full_name}: column {name} was dropped or renamed at the source; do the same at the sink to go on"
                )
        missing = [column for column in relation.columns if target.column(column.name) is None]
        if missing:
            self._add_columns(connection, schema, missing)
            target = connection.describe(schema.schema, schema.name)
            assert target is not None
        types = self._catalogue.types_with_parts([column.type_oid for column in relation.columns])
        columns = tuple(
            self._target_column(connection, full_name, column, types, target.column(column.name)) for column in relation.columns
        )
        key = self._key(connection, schema, relation, target)
        plan = TargetPlan(relation, schema.quoted, columns, key, is_referenced(connection, target))
        planned, way = self._modes.pop(relation.relation_id, (relation, WriteMode.COPY))
        plan.mode = way if planned == relation else WriteMode.COPY
        self._plans[relation.relation_id] = plan
        self._uncommitted.add(relation.relation_id)
        return plan

    def copy_types(self, connection: SinkConnection, schema: TableSchema) -> dict[str, WireType]:
        """The wire type of each column, by name, in a COPY of the source: see `copy_cast`."""
        types = self._catalogue.types_with_parts([column.type_oid for column in schema.columns])
        found: dict[str, WireType] = {}
        for column in schema.columns:
            cast = copy_cast(types, column.type_oid, self._binary)
            if cast == COPY_TEXT:
                found[column.name] = WireType(_TEXT, TEXT_OID)
            elif cast == COPY_TEXT_ARRAY:
                found[column.name] = WireType(f"{_TEXT}[]", TEXT_ARRAY_OID)
            else:
                found[column.name] = self._wire_type(connection, schema.full_name, column.name, types, column.type_oid)
        return found

    def _add_columns(self, connection: SinkConnection, schema: TableSchema, missing: Sequence[RelationColumn]) -> None:
        fresh = self._catalogue.describe(schema.table_id)
        for column in missing:
            known = fresh.column(column.name)
            if known is None or known.type_oid != column.type_oid:
                raise OperatingError(
                    f"table {schema.full_name}: column {column.name} appeared and changed again before it was replicated; "
                    "add it at the sink to go on"
                )
            statement = f"ALTER TABLE {schema.quoted} ADD COLUMN {quote_name(column.name)} {ddl_type(connection, schema, known)}"
            if known.missing_text is None and known.has_default and not _is_empty(connection, schema):
                # A default that differs from row to row (or one that was set later, which cannot be told from it) gave old rows
                # values that no change has told of.
                raise ReloadNeededError(
                    f"table {schema.full_name}: column {column.name} was added with a default of its own in each row"
                )
            if known.missing_text is not None:
                # Rows from before the column have this value at the source without ever having been written.
                statement += f" DEFAULT {quote_text(known.missing_text)}"
                statement += f"; ALTER TABLE {schema.quoted} ALTER COLUMN {quote_name(column.name)} DROP DEFAULT"
            connection.execute(statement)

    def _target_column(
        self,
        connection: SinkConnection,
        full_name: str,
        column: RelationColumn,
        types: Mapping[int, TypeInfo],
        target: CatalogueColumn | None,
    ) -> TargetColumn:
        if target is None:
            raise OperatingError(
                f"table {full_name}: column {column.name} cannot be written at the sink (is it generated there?)"
            )
        wire = self._wire_type(connection, full_name, column.name, types, column.type_oid)
        cast = "" if wire.oid == target.type_oid else quote_table(target.type_schema, target.type_name)
        return TargetColumn(column.name, wire, cast)

    def _wire_type(
        self, connection: SinkConnection, full_name: str, column: str, types: Mapping[int, TypeInfo], oid: int
    ) -> WireType:
        info = base_of(types, oid)
        if not self._binary or not info.has_binary or info.kind == "e":
            return WireType(_TEXT, TEXT_OID)
        if info.element_oid and not types[info.element_oid].is_builtin:
            return self._array_type(connection, full_name, column, types, types[info.element_oid])
        if info.is_builtin:
            return WireType(quote_table(info.schema, info.name), info.oid, is_element=not info.element_oid)
        if info.kind == "c" and info.has_user_fields:
            raise OperatingError(
                f"table {full_name}: column {column} has type {info.name}, a composite of user-defined types, whose binary form "
                "holds the source's type ids; create the changefeed with the source option binary=false"
            )
        sink_oid = self._sink_type(connection, full_name, column, info)
        return WireType(quote_table(info.schema, info.name), sink_oid, is_element=info.kind != "c")

    def _array_type(
        self, connection: SinkConnection, full_name: str, column: str, types: Mapping[int, TypeInfo], element: TypeInfo
    ) -> WireType:
        """Binary arrays name their element's type by its id, which differs between databases: it is replaced in each value."""
        element = base_of(types, element.oid)
        if element.kind == "e" or not element.has_binary:
            return WireType(f"{_TEXT}[]", TEXT_ARRAY_OID, TEXT_OID.to_bytes(4, "big"), is_element=False)
        if element.kind == "c":
            raise OperatingError(
                f"table {full_name}: column {column} is an array of the composite type {element.name}; "
                "create the changefeed with the source option binary=false"
            )
        sink_oid = element.oid if element.is_builtin else self._sink_type(connection, full_name, column, element)
        name = quote_table(element.schema, element.name)
        return WireType(f"{name}[]", self._array_oid(connection, sink_oid), sink_oid.to_bytes(4, "big"), is_element=False)

    def _sink_type(self, connection: SinkConnection, full_name: str, column: str, info: TypeInfo) -> int:
        quoted = quote_table(info.schema, info.name)
        found = connection.execute(f"SELECT to_regtype({quote_text(quoted)})::oid::int8")[-1].get_value(0, 0)
        if found is None:
            raise OperatingError(
                f"table {full_name}: column {column} has type {quoted}, which the sink does not have; create it there"
            )
        return int(found)

    def _array_oid(self, connection: SinkConnection, element_oid: int) -> int:
        result = connection.execute(f"SELECT typarray::int8 FROM pg_catalog.pg_type WHERE oid = {element_oid}")[-1]
        return int(result.get_value(0, 0) or b"0")

    def _key(self, connection: SinkConnection, schema: TableSchema, relation: Relation, target: TableSchema) -> tuple[int, ...]:
        if relation.replica_identity in ("d", "i"):
            key = tuple(at for at, column in enumerate(relation.columns) if column.is_identity)
        else:
            at_by_name = {column.name: at for at, column in enumerate(relation.columns)}
            names = schema.identity if all(name in at_by_name for name in schema.identity) else ()
            key = tuple(at_by_name[name] for name in names)
        # Without a key and without whole old rows (the primary key was dropped) the source itself refuses updates and deletes
        # of a published table, and inserts need no key: what comes can be written.
        if key:
            _require_unique(connection, schema, [relation.columns[at].name for at in key], target)
        return key


def _is_empty(connection: SinkConnection, schema: TableSchema) -> bool:
    return connection.execute(f"SELECT EXISTS (SELECT FROM {schema.quoted})")[-1].get_value(0, 0) != b"t"


def _require_unique(connection: SinkConnection, schema: TableSchema, names: Sequence[str], target: TableSchema) -> None:
    """The sink must be able to find a row by its key, and to refuse a second one."""
    wanted = ", ".join(quote_text(name) for name in sorted(names))
    result = connection.execute(
        "SELECT 1 FROM pg_catalog.pg_index i WHERE i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL"
        f" AND i.indexprs IS NULL AND i.indrelid = {target.table_id}::oid"
        " AND (SELECT array_agg(a.attname::text ORDER BY a.attname::text) FROM pg_catalog.pg_attribute a"
        " WHERE a.attrelid = i.indrelid AND a.attnum = ANY((i.indkey::int2[])[0:i.indnkeyatts - 1]))"
        f" = (SELECT array_agg(n ORDER BY n) FROM unnest(ARRAY[{wanted}]::text[]) n)"
    )[-1]
    if not result.ntuples:
        raise OperatingError(
            f"table {schema.full_name} at the sink has no unique index on ({', '.join(names)}), "
            "by which the source tells rows apart"
        )


def is_referenced(connection: SinkConnection, target: TableSchema) -> bool:
    """Whether foreign keys of other tables point here."""
    result = connection.execute(f"SELECT 1 FROM pg_catalog.pg_constraint WHERE confrelid = {target.table_id}::oid LIMIT 1")[-1]
    return bool(result.ntuples)
