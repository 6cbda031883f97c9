"""BulkWriter: writes the changes of one table in one transaction in the fastest way that is correct for them.

few changes                     single statements in one pipeline, in order (changes.py)
inserts only                    COPY into the table itself
inserts, updates, deletes       folded by key; deletes by arrays of keys, rows by COPY into a staging
                                table and one upsert
without a key                   COPY for runs of inserts, single statements for the rest

A violated unique constraint may be avoided by the next write mode (targets.WriteMode): the caller
repeats the transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, groupby

from processor.postgres.sinks.changes import parameters, partial_update, patch, statements
from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.sinks.encoding import COPY_HEAD, COPY_TAIL, encode_array, encode_frames, encode_rows
from processor.postgres.sinks.folding import Folded, Key, after_truncate, fold_carefully, fold_quickly
from processor.postgres.sinks.plans import TargetPlan, WriteMode
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
    """For one call within one transaction; one thread. may_copy: a COPY into the table itself may be tried."""

    def __init__(self, connection: SinkConnection, stages: Stages, may_copy: bool) -> None:
        self.connection = connection
        self._stages = stages
        self._may_copy = may_copy

    def write(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        if len(frames) < BULK_MIN or plan.mode is WriteMode.SINGLE:
            self._write_singly(plan, frames)
            return
        frames, is_truncated = after_truncate(frames)
        if is_truncated:
            self.connection.add((plan.truncate_sql, ()))
        if frames and plan.key:
            self._write_keyed(plan, frames)
        else:
            self._write_keyless(plan, frames)

    def _write_singly(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        for at in range(0, len(frames), PIPELINE_MAX):
            self.connection.add(*statements(plan, frames[at : at + PIPELINE_MAX]))
            if len(self.connection.pending) >= PIPELINE_MAX:
                self.connection.flush()

    def _write_keyless(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        for is_insert, group in groupby(frames, lambda frame: frame[FRAME_HEADER] == INSERT):
            run = list(group)
            if is_insert and len(run) >= BULK_MIN:
                self._insert(plan, run)
            else:
                self._write_singly(plan, run)

    def _write_keyed(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        if self._may_copy and plan.mode is WriteMode.COPY and all(frame[FRAME_HEADER] == INSERT for frame in frames):
            self._insert(plan, frames)
            return
        folded = fold_quickly(plan, frames)
        if folded is None or not self._apply_quickly(plan, folded):
            self._apply_carefully(plan, frames)

    def _apply_quickly(self, plan: TargetPlan, folded: Folded) -> bool:
        """Update rows that exist, copy new ones; do nothing and return False if a row lacks an unchanged value."""
        may_copy = self._may_copy and plan.is_direct and plan.mode is WriteMode.COPY
        replaced = folded.frames if may_copy else folded.frames + folded.inserted
        rows = encode_frames(replaced, len(plan.columns)) if replaced else b""
        inserted = encode_frames(folded.inserted, len(plan.columns)) if may_copy and folded.inserted else b""
        if rows is None or inserted is None:
            return False
        self._delete(plan, folded.deletes)
        if rows:
            stage = self._fill_stage(plan, rows)
            if may_copy:
                self._replace(plan, stage, len(replaced))
            else:
                self.connection.add((plan.upsert_staged_sql(stage), ()))
        if inserted:
            self._copy(plan, inserted)
        return True

    def _apply_carefully(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        """Write the changes after reading every value; one by one if that is not sufficient."""
        folded = fold_carefully(plan, frames)
        if folded is None:
            self._write_singly(plan, frames)
            return
        self._delete(plan, folded.deletes)
        if folded.rows:
            self._upsert(plan, encode_rows(folded.rows, len(plan.columns)))
        for key, values in folded.partial:
            self.connection.add(partial_update(plan, values, key))

    def _delete(self, plan: TargetPlan, keys: Sequence[Key]) -> None:
        """Delete the rows with these keys, before any row is written: see folding.py."""
        columns = [plan.columns[at] for at in plan.key]
        if any(not column.wire.is_element for column in columns):
            for key in keys:
                self.connection.add((plan.delete_sql, parameters(key)))
        elif keys:
            arrays = [encode_array([key[n] for key in keys], column.wire.oid) for n, column in enumerate(columns)]
            self.connection.add((plan.delete_many_sql, arrays))

    def _fill_stage(self, plan: TargetPlan, rows: bytes) -> str:
        stage = self._stages.find(self.connection, plan)
        self.connection.copy_in(f"COPY {stage} FROM STDIN (FORMAT binary)", (COPY_HEAD, rows, COPY_TAIL))
        return stage

    def _replace(self, plan: TargetPlan, stage: str, rows: int) -> None:
        """Update rows with the values of the stage; insert those that do not exist, which only happens without a first copy."""
        if len(plan.key) < len(plan.columns):
            self.connection.add((plan.update_staged_sql(stage), ()))
            if self.connection.flush()[-1].command_tuples == rows:
                return
        self.connection.add((plan.upsert_staged_sql(stage), ()))

    def _upsert(self, plan: TargetPlan, rows: bytes) -> None:
        self.connection.add((plan.upsert_staged_sql(self._fill_stage(plan, rows)), ()))

    def _insert(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        rows = None if plan.patches else encode_frames(frames, len(plan.columns))
        if rows is None:
            rows = encode_rows(_patched_rows(plan, frames), len(plan.columns))
        if plan.is_direct:
            self._copy(plan, rows)
        else:
            self._upsert(plan, rows)

    def _copy(self, plan: TargetPlan, rows: bytes) -> None:
        if plan.key and not self._may_copy:
            raise InvariantError("a COPY of rows that may exist already", plan.quoted)
        self.connection.copy_in(plan.copy_sql, (COPY_HEAD, rows, COPY_TAIL))


def _patched_rows(plan: TargetPlan, frames: Sequence[bytes]) -> list[list[bytes | None]]:
    rows: list[list[bytes | None]] = []
    for frame in frames:
        row = read_change(frame)[2]
        if row is None or None in row:
            raise InvariantError("an insert without all of its values", plan.quoted)
        patch(plan, row)
        rows.append(row)
    return rows
