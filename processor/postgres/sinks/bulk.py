"""BulkWriter: writes the changes of one transaction of one table by the quickest way that is right for them.

few changes                     single statements in one pipeline, in order (changes.py)
inserts only                    COPY into the table itself
inserts, updates, deletes       folded by key; deletes by arrays of keys, rows by COPY into a staging table and one upsert
without a key                   COPY for runs of inserts, single statements for the rest

What violates a unique constraint this way may be right in the next one (targets.WriteMode): the caller does it again.
"""

from __future__ import annotations

from collections.abc import Sequence

from processor.postgres.sinks.changes import delete_statement, parameters, patch, statements, truncate_sql, update_sql
from processor.postgres.sinks.connection import SinkConnection, Statement
from processor.postgres.sinks.encoding import COPY_HEAD, COPY_TAIL, encode_array, encode_frames, encode_rows
from processor.postgres.sinks.folding import Folded, Key, behind_truncate, fold_carefully, fold_quickly
from processor.postgres.sinks.targets import TargetPlan, WriteMode
from processor.postgres.wire import FRAME_HEADER, INSERT, read_change
from tablewire.errors import InvariantError

PIPELINE_MAX = 2_000
"""Statements of one round trip."""
BULK_MIN = 48
"""From so many changes on the bulk ways are quicker."""
STAGES_MAX = 24
"""Staging tables that a connection keeps: each costs a little at every commit that used one."""


class Stages:
    """The staging tables of one connection, by the plan they were made for."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[TargetPlan, str]] = {}
        self._uncommitted: list[int] = []
        self._used: set[str] = set()
        self._number = 0

    def find(self, connection: SinkConnection, plan: TargetPlan) -> str:
        """The staging table of this plan, empty, made if need be. Inside a transaction."""
        found = self._names.get(plan.relation.relation_id)
        if found is not None and found[0] is plan:
            if found[1] in self._used:
                connection.execute(f"TRUNCATE {found[1]}")
            self._used.add(found[1])
            return found[1]
        if found is not None:
            connection.execute(f"DROP TABLE IF EXISTS {found[1]}")
        self._number += 1
        name = f"pg_temp.tablewire_stage_{self._number}"
        columns = ", ".join(f"{column.quoted} {column.wire.sql}" for column in plan.columns)
        connection.execute(f"CREATE TEMP TABLE {name.removeprefix('pg_temp.')} ({columns}) ON COMMIT DELETE ROWS")
        self._names[plan.relation.relation_id] = (plan, name)
        self._uncommitted.append(plan.relation.relation_id)
        self._used.add(name)
        return name

    def committed(self) -> None:
        self._uncommitted.clear()
        self._used.clear()

    def rolled_back(self) -> None:
        """What was made in the transaction is gone (and what it dropped is left over, under a name that is not used again)."""
        for relation_id in self._uncommitted:
            self._names.pop(relation_id, None)
        self.committed()

    def trim(self, connection: SinkConnection) -> None:
        """Outside a transaction: not too many are kept."""
        if len(self._names) > STAGES_MAX:
            connection.execute("DROP TABLE IF EXISTS " + ", ".join(name for _, name in self._names.values()))
            self._names.clear()


class BulkWriter:
    """One use of one transaction, one thread. may_copy: COPY into the table itself is worth a try."""

    def __init__(self, connection: SinkConnection, stages: Stages, may_copy: bool) -> None:
        self.connection = connection
        self._stages = stages
        self._may_copy = may_copy
        self._pending: list[Statement] = []

    def add(self, statement: Statement) -> None:
        """Runs with the next flush, at the latest."""
        self._pending.append(statement)

    def write(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        """Writes changes of one shape, in order."""
        if len(frames) < BULK_MIN or plan.mode is WriteMode.SINGLE:
            self._write_singly(plan, frames)
        elif plan.key:
            self._write_keyed(plan, frames)
        else:
            self._write_keyless(plan, frames)

    def flush(self) -> None:
        """Everything that was added has run when this returns."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        self.connection.run(pending)

    def _write_singly(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        for at in range(0, len(frames), PIPELINE_MAX):
            self._pending += statements(plan, frames[at : at + PIPELINE_MAX])
            if len(self._pending) >= PIPELINE_MAX:
                self.flush()

    def _write_keyless(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        frames, is_truncated = behind_truncate(frames)
        if is_truncated:
            self.add((truncate_sql(plan), ()))
        at = 0
        while at < len(frames):
            is_insert = frames[at][FRAME_HEADER] == INSERT
            end = at + 1
            while end < len(frames) and (frames[end][FRAME_HEADER] == INSERT) == is_insert:
                end += 1
            if is_insert and end - at >= BULK_MIN:
                self._insert(plan, frames[at:end])
            else:
                self._write_singly(plan, frames[at:end])
            at = end

    def _write_keyed(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        frames, is_truncated = behind_truncate(frames)
        if is_truncated:
            self.add((truncate_sql(plan), ()))
        if not frames:
            return
        if self._may_copy and plan.mode is WriteMode.COPY and all(frame[FRAME_HEADER] == INSERT for frame in frames):
            self._insert(plan, frames)
            return
        folded = fold_quickly(plan, frames)
        if folded is None or not self._apply_quickly(plan, folded):
            self._apply_carefully(plan, frames)

    def _apply_quickly(self, plan: TargetPlan, folded: Folded) -> bool:
        """Updates what was there, copies what was not; False (and nothing done) when a row lacks an unchanged value."""
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
                self.add((_upsert_sql(plan, stage), ()))
            self.flush()
        if inserted:
            self._copy(plan, inserted)
        return True

    def _apply_carefully(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        """With every value read; one by one when that is not enough."""
        folded = fold_carefully(plan, frames)
        if folded is None:
            self._write_singly(plan, frames)
            return
        self._delete(plan, folded.deletes)
        if folded.rows:
            stage = self._fill_stage(plan, encode_rows(folded.rows, len(plan.columns)))
            self.add((_upsert_sql(plan, stage), ()))
            self.flush()
        for key, values in folded.partial:
            self.add(_partial_statement(plan, key, values))

    def _delete(self, plan: TargetPlan, keys: Sequence[Key]) -> None:
        """Before any row comes: see folding.py."""
        if any(not plan.columns[at].wire.is_element for at in plan.key):
            for key in keys:
                self.add(delete_statement(plan, key))
        elif keys:
            self.add(_delete_statement(plan, keys))

    def _fill_stage(self, plan: TargetPlan, rows: bytes) -> str:
        """The plan's staging table with these rows in it, and everything before them done."""
        self.flush()
        stage = self._stages.find(self.connection, plan)
        self.connection.copy_in(f"COPY {stage} FROM STDIN (FORMAT binary)", (COPY_HEAD, rows, COPY_TAIL))
        return stage

    def _replace(self, plan: TargetPlan, stage: str, count: int) -> None:
        """Gives the rows that are there the values of the stage; rows that are not there (which happens only to a changefeed
        without a first copy) come in too."""
        if len(plan.key) < len(plan.columns):
            result = self.connection.run([(_replace_sql(plan, stage), ())])[0]
            if result.command_tuples == count:
                return
        self.add((_upsert_sql(plan, stage), ()))

    def _insert(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        """Rows that are new."""
        rows = None if plan.patches else encode_frames(frames, len(plan.columns))
        if rows is None:
            rows = encode_rows(_patched_rows(plan, frames), len(plan.columns))
        if plan.is_direct:
            self.flush()
            self._copy(plan, rows)
        else:
            stage = self._fill_stage(plan, rows)
            self.add((_upsert_sql(plan, stage), ()))
            self.flush()

    def _copy(self, plan: TargetPlan, rows: bytes) -> None:
        """Into the table itself."""
        if plan.key and not self._may_copy:
            raise InvariantError("a COPY of rows that may be there already", plan.quoted)
        self.flush()
        self.connection.copy_in(f"COPY {plan.quoted} ({plan.names}) FROM STDIN (FORMAT binary)", (COPY_HEAD, rows, COPY_TAIL))


def _patched_rows(plan: TargetPlan, frames: Sequence[bytes]) -> list[list[bytes | None]]:
    rows: list[list[bytes | None]] = []
    for frame in frames:
        row = read_change(frame)[2]
        if row is None or None in row:
            raise InvariantError("an insert without all of its values", plan.quoted)
        patch(plan, row)
        rows.append(row)
    return rows


def _delete_statement(plan: TargetPlan, keys: Sequence[Key]) -> Statement:
    """One statement for all keys."""
    sql = plan.cache.get(("delete many",))
    columns = [plan.columns[at] for at in plan.key]
    if sql is None:
        arrays = ", ".join(f"${n + 1}::{column.wire.sql}[]" for n, column in enumerate(columns))
        names = ", ".join(column.quoted for column in columns)
        where = " AND ".join(f"t.{column.quoted} = {column.staged}" for column in columns)
        sql = plan.cache["delete many",] = f"DELETE FROM {plan.quoted} t USING unnest({arrays}) AS s ({names}) WHERE {where}"
    return sql, [encode_array([key[n] for key in keys], column.wire.oid) for n, column in enumerate(columns)]


def _replace_sql(plan: TargetPlan, stage: str) -> str:
    sql = plan.cache.get(("replace many", stage))
    if sql is None:
        others = [column for at, column in enumerate(plan.columns) if at not in plan.key]
        sets = ", ".join(f"{column.quoted} = {column.staged}" for column in others)
        where = " AND ".join(f"t.{plan.columns[at].quoted} = {plan.columns[at].staged}" for at in plan.key)
        sql = plan.cache["replace many", stage] = f"UPDATE {plan.quoted} t SET {sets} FROM {stage} s WHERE {where}"
    return sql


def _upsert_sql(plan: TargetPlan, stage: str) -> str:
    sql = plan.cache.get(("upsert many", stage))
    if sql is None:
        values = ", ".join(column.staged for column in plan.columns)
        conflict = plan.conflict() if plan.key else ""
        sql = f"INSERT INTO {plan.quoted} ({plan.names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {stage} s{conflict}"
        plan.cache["upsert many", stage] = sql
    return sql


def _partial_statement(plan: TargetPlan, key: Key, values: Sequence[bytes | None]) -> Statement:
    present = tuple(at for at, value in enumerate(values) if value is not None)
    return update_sql(plan, present, by_row=False), parameters([*(values[at] for at in present), *key])
