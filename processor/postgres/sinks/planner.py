"""TargetPlanner: decides how the rows of a relation are written.

A plan has the wire type of each value and the columns that identify rows (plans.py, wire_types.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import structlog

from processor.postgres.sinks import ReloadNeededError
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.plans import TargetColumn, TargetPlan
from processor.postgres.sinks.sink_identity import read_sink_table
from processor.postgres.sinks.target_facts import read_facts, why_unwritable
from processor.postgres.sinks.target_tables import describe_target
from processor.postgres.sinks.wire_types import ColumnPair, copy_wire_of, wire_of
from processor.postgres.source.catalogue import SourceCatalogue, TypeGoneError
from processor.postgres.source.pgoutput import Relation, RelationColumn
from processor.postgres.source.shape_watch import ShapeWatch
from processor.postgres.source.types import Types, types_with_parts
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import CatalogueColumn, TableSchema
from tablewire.postgres.shapes import TableShape

_log = structlog.get_logger(__name__)


class TargetPlanner:
    """Plans relations, and keeps the plan of each table while its relation stays the same. For one session; one thread."""

    def __init__(self, catalogue: SourceCatalogue, watch: ShapeWatch, binary: bool) -> None:
        self._catalogue = catalogue
        self._watch = watch
        self._binary = binary
        self._plans: dict[int, TargetPlan] = {}
        self._generations: dict[int, int] = {}
        """Of the sink's table when it was planned."""
        self._uncommitted: set[int] = set()
        """Planned in the open transaction, which may have changed their tables at the sink."""
        self._careful: dict[int, tuple[Relation, int]] = {}
        """What `careful` was in plans that were rolled back."""
        self._warned: set[int] = set()

    def cached(self, relation: Relation) -> TargetPlan | None:
        """Return the plan of exactly this shape, if there is one."""
        table_id = relation.relation_id
        plan = self._plans.get(table_id)
        if plan is None or (plan.relation is not relation and plan.relation != relation):
            return None
        return plan if self._generations[table_id] == self._watch.generation(table_id) else None

    def forget(self, table_id: int) -> None:
        self._plans.pop(table_id, None)
        self._careful.pop(table_id, None)

    def is_committed(self, plan: TargetPlan) -> bool:
        """Return whether the plan was made in an earlier transaction, so that it may be out of date."""
        return plan.relation.relation_id not in self._uncommitted

    def committed(self) -> None:
        self._uncommitted.clear()

    def rolled_back(self) -> None:
        """Drop the plans of the transaction, whose columns do not exist, but keep how they were written."""
        for relation_id in self._uncommitted:
            if (plan := self._plans.pop(relation_id, None)) is not None:
                self._careful[relation_id] = (plan.relation, plan.careful)
        self._uncommitted.clear()

    def plan(self, connection: SinkConnection, schema: TableSchema, relation: Relation, shape: TableShape | None) -> TargetPlan:
        """Plan the sink's table. Inside a transaction. shape: of the source's table, which the sink's has followed."""
        target = describe_target(connection, schema)
        try:
            columns = self._columns(connection, schema, target, relation)
        except TypeGoneError as error:
            raise ReloadNeededError(f"table {schema.full_name}: {error}") from None
        # The version before the facts: what changes in between is found by the next transaction.
        if (found := read_sink_table(connection, schema.schema, schema.name)) is None:
            raise ReloadNeededError(f"table {schema.full_name} no longer exists at the sink")
        facts = read_facts(connection, found.table_id)
        if why := why_unwritable(schema.full_name, facts):
            raise OperatingError(why)
        plan = TargetPlan(relation, schema.quoted, columns, self._key(schema, relation, shape), facts, found.version)
        self._warn(schema, plan)
        planned, careful = self._careful.pop(relation.relation_id, (relation, 0))
        plan.careful = careful if planned == relation else 0
        self._plans[relation.relation_id] = plan
        self._generations[relation.relation_id] = self._watch.generation(relation.relation_id)
        self._uncommitted.add(relation.relation_id)
        return plan

    def copy_columns(self, connection: SinkConnection, schema: TableSchema) -> tuple[TargetColumn, ...]:
        target = describe_target(connection, schema)
        return tuple(
            TargetColumn(pair.name, *copy_wire_of(pair, source, sink))
            for pair, source, sink in self._pairs(connection, schema, target, schema.columns)
        )

    def copies_in_binary(self, schema: TableSchema) -> bool:
        """Return whether the first copy has the binary format of COPY; otherwise it has the text format."""
        return self._binary and self._catalogue.copies_in_binary(schema)

    def _columns(
        self, connection: SinkConnection, schema: TableSchema, target: TableSchema, relation: Relation
    ) -> tuple[TargetColumn, ...]:
        return tuple(
            TargetColumn(pair.name, *wire_of(pair, source, sink, relation.is_binary))
            for pair, source, sink in self._pairs(connection, schema, target, relation.columns)
        )

    def _pairs(
        self,
        connection: SinkConnection,
        schema: TableSchema,
        target: TableSchema,
        columns: Sequence[RelationColumn | CatalogueColumn],
    ) -> Iterator[tuple[ColumnPair, Types, Types]]:
        """Yield each column at both ends, with the types of the source and of the sink."""
        source = self._catalogue.types_with_parts([column.type_oid for column in columns])
        oids = [column.type_oid for column in target.columns]
        sink = connection.call(lambda found: types_with_parts(found, oids))
        for column in columns:
            if (there := target.column(column.name)) is None:
                text = f"column {column.name} cannot be written at the sink (is it generated there?)"
                raise OperatingError(f"table {target.full_name}: {text}")
            here = column.type_oid, column.type_modifier
            known = schema.column(column.name)
            is_current = known is not None and (known.type_oid, known.type_modifier) == here
            text = known.type_text if known is not None and is_current else source[column.type_oid].name
            there_type = there.type_oid, there.type_modifier
            yield ColumnPair(target.full_name, column.name, here, text, there_type, there.type_text), source, sink

    def _key(self, schema: TableSchema, relation: Relation, shape: TableShape | None) -> tuple[int, ...]:
        if relation.replica_identity in ("d", "i"):
            return tuple(at for at, column in enumerate(relation.columns) if column.is_identity)
        at_by_name = {column.name: at for at, column in enumerate(relation.columns)}
        identity = schema.identity if shape is None else shape.names(shape.key)
        names = identity if all(name in at_by_name for name in identity) else ()
        # Without a key and without whole old rows (the primary key was dropped) the source itself refuses updates and deletes
        # of a published table, and inserts need no key: every change that arrives can be written.
        return tuple(at_by_name[name] for name in names)

    def _warn(self, schema: TableSchema, plan: TargetPlan) -> None:
        """Log once that the sink searches a whole table for each change."""
        if plan.key and not plan.facts.search_columns(plan.key_names) and schema.table_id not in self._warned:
            self._warned.add(schema.table_id)
            _log.warning("sink_without_index", table=schema.full_name, key=", ".join(plan.key_names))
