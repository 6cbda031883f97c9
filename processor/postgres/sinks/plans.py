"""TargetPlan: how the rows of one relation are written to its table at the sink, and the SQL of each kind of change. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

from processor.postgres.sinks.wire_types import WireType
from processor.postgres.source.pgoutput import Relation
from tablewire.postgres.connections import quoted


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
