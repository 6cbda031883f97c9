"""ShapeFollower: has the sink's table follow the source's shape before rows of another shape are written.

What it decides is in tablewire/postgres/shapes.py, what it reads at the source in source/shape_watch.py.
One for each session; one thread. Everything at the sink runs inside the fenced transaction of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from processor.postgres.sinks import Fence, ReloadNeededError, SinkUnavailableError
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.positions import PositionRow, Positions
from processor.postgres.sinks.shape_steps import make_steps
from processor.postgres.sinks.sink_identity import adopt_table, require_same_table
from processor.postgres.source.pgoutput import Part, Relation
from processor.postgres.source.shape_watch import PendingChange, ShapeWatch
from tablewire.errors import OperatingError
from tablewire.model.ids import TableID
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import full_table_name, quoted
from tablewire.postgres.shapes import (
    CopyAgain,
    Decision,
    Follow,
    Later,
    Same,
    SeenShape,
    TableShape,
    adopt,
    decide,
    decide_between_rows,
)

_NAME_MAX = 40


@dataclass(frozen=True, slots=True)
class _Written:
    """What the open transaction has done to a table."""

    shape: TableShape
    relation: Relation | None
    is_replanned: bool


class ShapeFollower:
    """See the module. copies: a table that cannot be followed is copied again; otherwise it fails."""

    def __init__(self, watch: ShapeWatch, positions: Positions, copies: bool) -> None:
        self.watch = watch
        self._positions = positions
        self._copies = copies
        self._uncommitted: dict[TableID, _Written] = {}
        self._names: dict[TableID, tuple[str, str]] = {}

    # --- transactions ------------------------------------------------------------------------------------------------

    def committed(self) -> None:
        for table_id, written in self._uncommitted.items():
            self.watch.set_applied(table_id, written.shape, written.relation)
            if written.is_replanned:
                self.watch.replan(table_id)
        for table_id, name in self._names.items():
            self.watch.set_name(table_id, *name)
        self.rolled_back()

    def rolled_back(self) -> None:
        self._uncommitted.clear()
        self._names.clear()

    def applied(self, table_id: TableID) -> TableShape | None:
        """Return the shape that the sink's table has now, in the open transaction."""
        written = self._uncommitted.get(table_id)
        return written.shape if written is not None else self.watch.applied(table_id)

    def _store(self, connection: SinkConnection, schema: TableSchema, shape: TableShape) -> None:
        """Store the shape that the sink's table follows with this transaction."""
        self._positions.set_shape(connection, schema.full_name, shape)
        self._note(schema.table_id, shape, None, is_replanned=True)

    def _note(self, table_id: TableID, shape: TableShape, relation: Relation | None, is_replanned: bool) -> None:
        before = self._uncommitted.get(table_id)
        is_replanned = is_replanned or (before is not None and before.is_replanned)
        self._uncommitted[table_id] = _Written(shape, relation, is_replanned)

    # --- rows --------------------------------------------------------------------------------------------------------

    def verify(self, connection: SinkConnection, schema: TableSchema, part: Part) -> bool:
        """Have the table follow to the shape of these rows; return whether it was changed.

        Raise ReloadNeededError if only a copy leads there.

        schema: with the name at the sink. Raise SourceUnavailableError if the source cannot be asked now.
        """
        table_id, relation = schema.table_id, part.relation
        written = self._uncommitted.get(table_id)
        if written.relation is relation if written is not None else self.watch.is_verified(table_id, relation):
            return False
        seen = seen_shape(relation)
        applied = self.watch.applied(table_id)
        was_applied = written is None and self.watch.was_applied(table_id, part.transaction)
        if was_applied and applied is not None and isinstance(decide(applied, applied, seen, was_applied=True), Same):
            self._note(table_id, applied, relation, is_replanned=False)
            return False
        row = self._positions.read(connection, schema.full_name)
        if row is None:
            raise SinkUnavailableError(f"the position of table {schema.full_name} was removed")
        current = self.watch.read_after(table_id, part.transaction)
        self.watch.require_published(schema)  # a new relation may be the first one after changes that were not published
        decision = self._decide(schema, row, current, seen, part)
        return self._follow(connection, schema, row, decision, relation)

    def _decide(self, schema: TableSchema, row: PositionRow, current: TableShape | None, seen: SeenShape, part: Part) -> Decision:
        if current is None and row.shape is not None:
            current = row.shape  # it was dropped since
        if current is None:
            raise OperatingError(f"table {schema.full_name} no longer exists at the source")
        if row.shape is None:
            return adopt(row.columns, current, seen)
        was_applied = schema.table_id not in self._uncommitted and self.watch.was_applied(schema.table_id, part.transaction)
        return decide(row.shape, current, seen, was_applied, self.watch.is_current(current, part.transaction))

    def _follow(
        self, connection: SinkConnection, schema: TableSchema, row: PositionRow, decision: Decision, relation: Relation
    ) -> bool:
        if isinstance(decision, CopyAgain):
            raise self._copy_needed(schema, decision)
        if isinstance(decision, Follow):
            self._make_steps(connection, schema, row, decision)
            shape = decision.shape
            if row.shape is not None:  # the name follows between rows
                shape = replace(shape, schema=row.shape.schema, name=row.shape.name)
            self._positions.set_shape(connection, schema.full_name, shape)
            self._note(schema.table_id, shape, relation, is_replanned=bool(decision.steps))
            return bool(decision.steps)
        if isinstance(decision, Same | Later):
            assert row.shape is not None
            self._note(schema.table_id, row.shape, relation, is_replanned=False)
        return False

    def _make_steps(self, connection: SinkConnection, schema: TableSchema, row: PositionRow, decision: Follow) -> None:
        if decision.steps and row.shape is not None:
            names = [column.name for column in row.shape.columns]
            require_same_table(connection, self._positions.changefeed, schema, names)
            make_steps(connection, schema, decision.steps)

    def _copy_needed(self, schema: TableSchema, decision: CopyAgain) -> OperatingError:
        text = f"table {schema.full_name} cannot follow its source: {decision.reason}"
        if self._copies:
            return ReloadNeededError(text)
        return OperatingError(
            f"{text}; on_shape_change=error: to have it copied again, empty it at the sink and delete its row in"
            " tablewire.positions"
        )

    # --- between rows ------------------------------------------------------------------------------------------------

    def follow(self, connection: SinkConnection, schema: TableSchema, row: PositionRow, pending: PendingChange) -> bool:
        """Apply a change that a look has found, after all rows of its position; return False if it is out of date.

        Inside the fenced transaction, whose rows are `row` and nothing else.
        """
        if row.shape != pending.applied and row.shape is not None:
            self._note(schema.table_id, row.shape, None, is_replanned=False)
            return False
        if row.shape is None:
            decision = adopt(row.columns, pending.current, None)
        else:
            decision = decide_between_rows(row.shape, pending.current)
        if isinstance(decision, CopyAgain):
            raise self._copy_needed(schema, decision)
        if not isinstance(decision, Follow):
            return False
        self._make_steps(connection, schema, row, decision)
        shape = decision.shape
        moved = self._move(connection, schema, shape)
        if moved is not None and row.shape is not None and moved.full_name != full_table_name(shape.schema, shape.name):
            shape = replace(shape, schema=row.shape.schema, name=row.shape.name)  # not there yet
        adopt_table(connection, self._positions.changefeed, moved or schema)
        self._store(connection, moved or schema, shape)
        return True

    def _move(self, connection: SinkConnection, schema: TableSchema, shape: TableShape) -> TableSchema | None:
        """Rename the sink's table like the source's; None: it has that name. To a temporary name if a table that is still to be
        renamed has the new one."""
        wanted = replace(schema, schema=shape.schema, name=shape.name)
        if wanted.quoted == schema.quoted:
            return None
        if not connection.query("SELECT 1 WHERE to_regnamespace(%s) IS NOT NULL", (quoted(shape.schema),)):
            connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(shape.schema)}")
        other = self._positions.read(connection, wanted.full_name)
        temporary = f"{shape.name[:_NAME_MAX]}_tablewire_{schema.table_id}"
        if other is not None:
            wanted = replace(wanted, name=temporary)
            if wanted.quoted == schema.quoted:
                raise SinkUnavailableError(f"table {schema.full_name} waits for {shape.name} to be renamed at the sink")
        elif connection.query("SELECT 1 WHERE to_regclass(%s) IS NOT NULL", (wanted.quoted,)):
            raise OperatingError(
                f"table {schema.full_name} was renamed to {wanted.full_name} at the source, but the sink has another table of"
                " that name: rename or drop it there"
            )
        steps = [f"RENAME TO {quoted(wanted.name)}"]
        if wanted.schema != schema.schema:
            steps = [f"RENAME TO {quoted(temporary)}", f"SET SCHEMA {quoted(wanted.schema)}", *steps]
        names = [schema, replace(schema, name=temporary), replace(wanted, name=temporary)] if len(steps) > 1 else [schema]
        for named, step in zip(names, steps, strict=True):
            if named.quoted != wanted.quoted and step != f"RENAME TO {quoted(named.name)}":
                connection.execute(f"ALTER TABLE {named.quoted} {step}")
        self._positions.rename(connection, schema.full_name, wanted.full_name)
        self._names[schema.table_id] = (wanted.schema, wanted.name)
        return wanted

    # --- takeovers and copies ----------------------------------------------------------------------------------------

    def take_over(
        self, connection: SinkConnection, schema: TableSchema, row: PositionRow, is_same: bool, starts_as_it_is: bool
    ) -> TableShape | None:
        """Return the applied shape of a table that is taken over. row: as it was found.

        is_same: the row is of this very table; starts_as_it_is: the sink's table has the present shape, as
        it was just created, or is to be continued without a first copy.
        """
        is_unknown = not is_same or (row.shape is None and not row.columns)
        if starts_as_it_is and is_unknown and schema.shape is not None:
            self._store(connection, schema, schema.shape)
            return schema.shape
        return row.shape

    def copied(self, connection: SinkConnection, schema: TableSchema, row: PositionRow) -> None:
        """Store the shape of a table that was copied, whose name at the sink may follow later."""
        if (shape := schema.shape) is None:
            return
        if schema.full_name != full_table_name(shape.schema, shape.name):
            shape = replace(shape, schema=schema.schema, name=schema.name)
        self._store(connection, schema, shape)

    def locate(self, connection: SinkConnection, schema: TableSchema, fence: Fence) -> TableSchema:
        """Return the table with the name that it has at the sink, where it may still have a former one.

        Raise SinkUnavailableError while another table, which is still to be renamed, has its name.
        """
        found = self._positions.name_of(connection, schema.table_id, fence)
        if found is not None:
            self.watch.set_name(schema.table_id, *found)
            return replace(schema, schema=found[0], name=found[1])
        self.watch.set_name(schema.table_id, schema.schema, schema.name)
        row = self._positions.read(connection, schema.full_name)
        if row is not None and row.source_table_id != schema.table_id and row.fence.incarnation == fence.incarnation:
            other = self.watch.read((row.source_table_id,)).shapes.get(row.source_table_id)
            if other is not None and (other.schema, other.name) != (schema.schema, schema.name):
                raise SinkUnavailableError(
                    f"table {schema.full_name} waits until the sink's table of that name is renamed to"
                    f" {full_table_name(other.schema, other.name)}, as at the source"
                )
        return schema


def seen_shape(relation: Relation) -> SeenShape:
    key = None if relation.replica_identity == "f" else frozenset(c.name for c in relation.columns if c.is_identity)
    return SeenShape(tuple((column.name, column.type_oid, column.type_modifier) for column in relation.columns), key)
