"""TargetPlanner: decides how the rows of a relation are written, and extends the sink's table if needed.

A plan has the wire type of each value and the columns that identify rows (plans.py, wire_types.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from processor.postgres.sinks import ReloadNeededError
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.plans import TargetColumn, TargetPlan, WriteMode
from processor.postgres.sinks.target_tables import add_column, describe_target, has_rows, truncate_sql
from processor.postgres.sinks.wire_types import WireTypes
from processor.postgres.source.catalogue import SourceCatalogue
from processor.postgres.source.pgoutput import Relation, RelationColumn
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import CatalogueColumn, TableSchema
from tablewire.postgres.connections import quoted


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
        wires = WireTypes(connection, target.full_name, types, self._binary)
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
