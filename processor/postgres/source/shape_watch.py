"""ShapeWatch: what is known of the shapes of an executor's tables, at the source and as the sink has applied them.

One for all threads of an executor. A table is written by one session at a time, so what a session records
for a table after a commit is the newest. Looks are made by the control thread.

**Invariant: up to `verified_ts` of a table, its shape at the source is the applied one, or one that
came before it and was applied.** The checkpoint that a table reports never passes that position.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from processor.postgres.source.catalogue import SourceCatalogue
from processor.postgres.source.pgoutput import Relation, Transaction
from processor.postgres.source.shape_reader import Look, read_look
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import SourceUnavailableError
from tablewire.postgres.shapes import TableShape


@dataclass(frozen=True, slots=True)
class PendingChange:
    """A change that a look has found. It must be applied once everything at or before `position` has been written.

    applied: the shape that the look has compared with.
    """

    position: Ts
    applied: TableShape | None
    current: TableShape


@dataclass(slots=True)
class _Known:
    applied: TableShape | None = None
    relation: Relation | None = None
    """The last object whose rows were written: the stream has a new one after each possible change of shape."""
    verified_ts: Ts = 0
    found: tuple[Ts, TableShape] | None = None
    """The last look, if no DDL could be hidden from it."""
    pending: PendingChange | None = None
    name: tuple[str, str] | None = None
    """Of the table at the sink, if it is not the one that it was described with."""
    generation: int = 0


class ShapeWatch:
    """See the module. Any thread."""

    def __init__(self, catalogue: SourceCatalogue) -> None:
        self._catalogue = catalogue
        self._tables: dict[TableID, _Known] = {}
        self._lock = threading.Lock()

    # --- the source --------------------------------------------------------------------------------------------------

    def read(self, table_ids: Iterable[TableID]) -> Look:
        """Read the catalogue now; raise SourceUnavailableError if the source is unreachable."""
        ids = list(table_ids)
        return self._catalogue.run(lambda connection: read_look(connection, ids, self._catalogue.rules.generated))

    def read_after(self, table_id: TableID, transaction: Transaction) -> TableShape | None:
        """Return the table's shape after this transaction, which has been committed; None if the table no longer exists.

        Raise SourceUnavailableError while sessions do not see the transaction yet: it may hold DDL. All
        earlier DDL of the table was visible when the transaction could write to the table.
        """
        look = self.read((table_id,))
        if not look.sees(transaction.xid):
            raise SourceUnavailableError(
                f"transaction {transaction.xid} of the source is committed, but not visible yet; does a synchronous standby lag?"
            )
        return look.shapes.get(table_id)

    def require_published(self, schema: TableSchema) -> None:
        """Raise OperatingError if changes of the table may not have been published; see `SourceCatalogue`."""
        self._catalogue.require_published(schema)

    def look(self, table_ids: Iterable[TableID]) -> tuple[Ts, dict[TableID, TableShape]]:
        """Compare all tables with the catalogue; return its position, and the shapes that differ, which `pending` describes."""
        look = self.read(table_ids)
        changed: dict[TableID, TableShape] = {}
        with self._lock:
            for table_id, shape in look.shapes.items():
                if not look.is_complete(table_id):
                    continue
                known = self._known(table_id)
                known.found = (look.position, shape)
                if known.applied == shape:
                    known.verified_ts = max(known.verified_ts, look.position)
                    known.pending = None
                else:
                    known.pending = PendingChange(look.position, known.applied, shape)
                    changed[table_id] = shape
        return look.position, changed

    # --- what is known -----------------------------------------------------------------------------------------------

    def applied(self, table_id: TableID) -> TableShape | None:
        return self._known(table_id).applied

    def verified_ts(self, table_id: TableID) -> Ts:
        return self._known(table_id).verified_ts

    def pending(self, table_id: TableID) -> PendingChange | None:
        return self._known(table_id).pending

    def is_verified(self, table_id: TableID, relation: Relation) -> bool:
        """Return whether rows of this very relation have been written, so that nothing can have changed before more of them."""
        return self._known(table_id).relation is relation

    def was_applied(self, table_id: TableID, transaction: Transaction) -> bool:
        """Return whether the table certainly had the applied shape when the transaction was committed, or one that equals it."""
        return transaction.commit_ts < self._known(table_id).verified_ts

    def is_current(self, current: TableShape, transaction: Transaction) -> bool:
        """Return whether the table certainly had this shape, which it has now, when the transaction was committed."""
        found = self._known(current.table_id).found
        return found is not None and found[0] <= transaction.commit_ts and found[1] == current

    def generation(self, table_id: TableID) -> int:
        """Return a number that increases whenever plans for the sink's table become invalid."""
        return self._known(table_id).generation

    def located(self, schema: TableSchema) -> TableSchema:
        """Return the table with the name that it has at the sink, which follows a rename at the source a little later."""
        if (name := self._known(schema.table_id).name) is None:
            return schema
        return replace(schema, schema=name[0], name=name[1])

    # --- what was committed at the sink ------------------------------------------------------------------------------

    def set_applied(self, table_id: TableID, shape: TableShape | None, relation: Relation | None = None) -> None:
        """Record what the sink has committed; relation: whose rows it holds now."""
        with self._lock:
            known = self._known(table_id)
            known.applied = shape
            known.relation = relation
            if known.pending is not None and known.pending.applied != shape:
                known.pending = None

    def set_name(self, table_id: TableID, schema: str, name: str) -> None:
        self._known(table_id).name = (schema, name)

    def replan(self, table_id: TableID) -> None:
        """Make the plans of all sessions for this table invalid."""
        with self._lock:
            self._known(table_id).generation += 1

    def forget(self, table_id: TableID) -> None:
        """Drop what is known of a table that is no longer followed."""
        with self._lock:
            if (known := self._tables.get(table_id)) is not None:
                self._tables[table_id] = _Known(generation=known.generation + 1)

    def _known(self, table_id: TableID) -> _Known:
        return self._tables.setdefault(table_id, _Known())
