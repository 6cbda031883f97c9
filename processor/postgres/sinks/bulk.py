"""BulkWriter: writes the changes of one table in one transaction in the fastest way that is correct for them.

few changes                     single statements in one pipeline, in order (changes.py)
inserts only                    COPY into the table itself
inserts, updates, deletes       folded by key; deletes by arrays of keys, updates by COPY into a staging
                                table and one UPDATE, new rows by COPY
with foreign keys that fire     folded, as other tables are not as far as this one: what was inserted and
                                deleted again may no longer have the row that it refers to
tables that need it             single statements in order, but COPY for runs of inserts
                                (TargetFacts.why_exact says for which)

Every statement must affect as many rows as the source's changes did. If one does not (RowCountError),
or a constraint is violated, the caller repeats the work with conflicts.CarefulWriter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count, groupby

from processor.postgres.sinks.changes import parameters, patch, statements, truncates, update
from processor.postgres.sinks.connection import RowCountError, SinkConnection
from processor.postgres.sinks.encoding import COPY_HEAD, COPY_TAIL, encode_array, encode_frames, encode_rows
from processor.postgres.sinks.folding import Folded, Key, after_truncate, fold_carefully, fold_quickly
from processor.postgres.sinks.plans import TargetPlan
from processor.postgres.source.pgoutput import FRAME_HEADER, INSERT, read_change
from tablewire.errors import InvariantError

PIPELINE_MAX = 2_000
"""Statements of one round trip."""
BULK_MIN = 48
"""From this many changes on, writing in bulk is faster."""
STAGES_MAX = 24
"""Staging tables that a connection keeps: each one costs a little at every commit that used it."""


class Stages:
    """The staging tables of one connection, by the plan that they were made for."""

    def __init__(self) -> None:
        self._names: dict[TargetPlan, str] = {}
        self._uncommitted: list[TargetPlan] = []
        self._used: set[str] = set()
        self._numbers = count(1)
        self._is_permitted: bool | None = None

    def is_permitted(self, connection: SinkConnection) -> bool:
        """Return whether the role may make temporary tables; asked once."""
        if self._is_permitted is None:
            query = "SELECT has_database_privilege(current_database(), 'TEMP')"
            self._is_permitted = bool(connection.query(query)[0][0])
        return self._is_permitted

    def forget(self, plans: Iterable[TargetPlan]) -> None:
        """Forget the staging tables of plans that are no longer valid, without dropping them."""
        for plan in plans:
            self._names.pop(plan, None)

    def find(self, connection: SinkConnection, plan: TargetPlan) -> str:
        """Return the empty staging table of this plan; create it if needed. Inside a transaction."""
        name = self._names.get(plan)
        if name is None:
            name = self._names[plan] = f"pg_temp.tablewire_stage_{next(self._numbers)}"
            columns = ", ".join(f"{column.quoted} {column.wire.sql}" for column in plan.columns)
            connection.execute(f"CREATE TEMP TABLE {name} ({columns}) ON COMMIT DELETE ROWS")
            self._uncommitted.append(plan)
        elif name in self._used:
            connection.execute(f"TRUNCATE {name}")
        self._used.add(name)
        return name

    def committed(self) -> None:
        self._uncommitted.clear()
        self._used.clear()

    def rolled_back(self) -> None:
        for plan in self._uncommitted:
            self._names.pop(plan, None)
        self.committed()

    def trim(self, connection: SinkConnection) -> None:
        """Drop all staging tables if there are too many. Outside a transaction."""
        if len(self._names) > STAGES_MAX:
            connection.execute("DROP TABLE IF EXISTS " + ", ".join(self._names.values()))
            self._names.clear()


class BulkWriter:
    """For one call within one transaction; one thread."""

    def __init__(self, connection: SinkConnection, stages: Stages) -> None:
        self.connection = connection
        self._stages = stages

    def write(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        if len(frames) < (BULK_MIN if not plan.facts.enforces_keys else 2):
            self._write_singly(plan, frames)
        elif plan.is_exact or not self._stages.is_permitted(self.connection):
            self._write_in_order(plan, frames)
        else:
            frames, truncate = after_truncate(frames)
            if truncate is not None:
                self.connection.add(*truncates(plan, truncate))
            if frames:
                self._write_folded(plan, frames)

    def _write_singly(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        for at in range(0, len(frames), PIPELINE_MAX):
            self.connection.add_counted(*statements(plan, frames[at : at + PIPELINE_MAX]))
            if len(self.connection.pending) >= PIPELINE_MAX:
                self.connection.flush()

    def _write_in_order(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        may_copy = plan.columns and (plan.is_direct or self._stages.is_permitted(self.connection))
        for is_insert, group in groupby(frames, lambda frame: frame[FRAME_HEADER] == INSERT):
            run = list(group)
            if is_insert and may_copy and len(run) >= BULK_MIN:
                self._insert(plan, run)
            else:
                self._write_singly(plan, run)

    def _write_folded(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        if all(frame[FRAME_HEADER] == INSERT for frame in frames):
            self._insert(plan, frames)
            return
        folded = fold_quickly(plan, frames)
        if folded is None or not self._apply_quickly(plan, folded):
            self._apply_carefully(plan, frames)

    def _apply_quickly(self, plan: TargetPlan, folded: Folded) -> bool:
        """Write what was folded by the last frame of each key; do nothing and return False if a row lacks an unchanged value."""
        if folded.frames and len(plan.key) == len(plan.columns):
            return False
        rows = encode_frames(folded.frames, len(plan.columns)) if folded.frames else b""
        inserted = encode_frames(folded.inserted, len(plan.columns)) if folded.inserted else b""
        if rows is None or inserted is None:
            return False
        self._delete(plan, folded.deletes)
        self._replace(plan, rows, len(folded.frames))
        self._copy(plan, inserted, len(folded.inserted))
        return True

    def _apply_carefully(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        """Write the changes after reading every value; one by one if that is not sufficient."""
        folded = fold_carefully(plan, frames)
        if folded is None or (folded.rows and len(plan.key) == len(plan.columns)):
            self._write_singly(plan, frames)
            return
        width = len(plan.columns)
        self._delete(plan, folded.deletes)
        self._replace(plan, encode_rows(folded.rows, width), len(folded.rows))
        for _, values in folded.partial:
            present = tuple(at for at, value in enumerate(values) if value is not None and at not in plan.key)
            self.connection.add_counted([update(plan, None, values, present or plan.key[:1])], [1])
        self._copy(plan, encode_rows(folded.new_rows, width), len(folded.new_rows))

    def _delete(self, plan: TargetPlan, keys: Sequence[Key]) -> None:
        """Delete the rows with these keys, before any row is written: see folding.py."""
        columns = [plan.columns[at] for at in plan.key]
        if any(not column.wire.is_element for column in columns):
            text = plan.delete_sql(plan.by_key)
            self.connection.add_counted([(text, parameters(key)) for key in keys], [1] * len(keys))
        elif keys:
            arrays = [encode_array([key[n] for key in keys], column.wire.oid) for n, column in enumerate(columns)]
            self.connection.add_counted([(plan.delete_many_sql, arrays)], [len(keys)])

    def _replace(self, plan: TargetPlan, rows: bytes, count: int) -> None:
        """Update rows, all of which exist, with these values."""
        if count:
            stage = self._fill_stage(plan, rows)
            self.connection.add_counted([(plan.update_staged_sql(stage), ())], [count])

    def _insert(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        rows = None if plan.patches else encode_frames(frames, len(plan.columns))
        if rows is None:
            rows = encode_rows(_patched_rows(plan, frames), len(plan.columns))
        self._copy(plan, rows, len(frames))

    def _copy(self, plan: TargetPlan, rows: bytes, count: int) -> None:
        """Add new rows."""
        if not count:
            return
        if not plan.is_direct:
            self.connection.add_counted([(plan.insert_staged_sql(self._fill_stage(plan, rows)), ())], [count])
        elif (added := self.connection.copy_in(plan.copy_sql, (COPY_HEAD, rows, COPY_TAIL))) != count:
            raise RowCountError(plan.copy_sql, count, added)

    def _fill_stage(self, plan: TargetPlan, rows: bytes) -> str:
        stage = self._stages.find(self.connection, plan)
        self.connection.copy_in(f"COPY {stage} FROM STDIN (FORMAT binary)", (COPY_HEAD, rows, COPY_TAIL))
        return stage


def _patched_rows(plan: TargetPlan, frames: Sequence[bytes]) -> list[list[bytes | None]]:
    rows: list[list[bytes | None]] = []
    for frame in frames:
        row = read_change(frame)[2]
        if row is None or None in row:
            raise InvariantError("an insert without all of its values", plan.quoted)
        patch(plan, row)
        rows.append(row)
    return rows
