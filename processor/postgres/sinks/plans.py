"""TargetPlan: how the rows of one relation are written to its table at the sink, and the SQL of each kind of change. Pure.

Statements name ONLY the table, unless it is partitioned: rows of tables that inherit from it are not
rows of the source's table. Equality is the operator of the sink's index, by its full name, for the
search_path is empty. A row that no key identifies is found by (tableoid, ctid), as ctid alone is not
unique across partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from processor.postgres.sinks.target_facts import TargetFacts, truncates
from processor.postgres.sinks.wire_types import WireType
from processor.postgres.source.pgoutput import NULL_VALUE, Relation, Value
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


@dataclass(frozen=True, slots=True)
class RowCondition:
    """What a row `t` must satisfy. columns: positions of the columns that are equal; is_whole: all columns are, byte for byte.

    is_one: exactly one of the rows that satisfy it; is_place: the row at a tableoid and ctid instead.
    """

    columns: tuple[int, ...] = ()
    is_whole: bool = False
    is_one: bool = False
    is_place: bool = False

    def sql(self, plan: TargetPlan, first: int) -> str:
        """Return the condition, whose parameters have numbers from `first` on, in the order of `values`."""
        if self.is_place:
            return f"t.tableoid = ${first}::text::oid AND t.ctid = ${first + 1}::text::tid"
        columns = [plan.columns[at] for at in self.columns]
        row = "f" if self.is_one else "t"
        terms = [
            f"{row}.{column.quoted} {plan.facts.equals_of(column.name)} {column.parameter(first + n)}"
            for n, column in enumerate(columns)
        ]
        if self.is_whole and plan.columns:
            theirs = ", ".join(f"{row}.{column.quoted}" for column in plan.columns)
            ours = ", ".join(column.parameter(first + len(columns) + n) for n, column in enumerate(plan.columns))
            terms.append(f"ROW({theirs})::record *= ROW({ours})::record")
        text = " AND ".join(terms) or "true"
        if not self.is_one:
            return text
        return f"(t.tableoid, t.ctid) = (SELECT f.tableoid, f.ctid FROM {plan.target} f WHERE {text} LIMIT 1)"

    def values(self, row: Sequence[Value]) -> list[Value]:
        """Return the parameters for a row. Not for a place."""
        return [*(row[at] for at in self.columns), *(row if self.is_whole else ())]


AT_PLACE = RowCondition(is_place=True)


@dataclass(eq=False)
class TargetPlan:
    """How rows of one relation are written. Immutable except for `careful`.

    quoted: the table. key: positions of the columns that identify rows; empty if only whole rows do.
    version: the sink's table as it was planned, see sink_identity.py. careful: in how many more
    transactions changes are written in the source's order, as constraints or conflicts require it.
    """

    relation: Relation
    quoted: str
    columns: tuple[TargetColumn, ...]
    key: tuple[int, ...]
    facts: TargetFacts = field(default_factory=TargetFacts)
    version: str = ""
    careful: int = 0
    _texts: dict[tuple[object, ...], str] = field(default_factory=dict)

    @cached_property
    def is_exact(self) -> bool:
        """Each change needs a statement of its own."""
        names = [column.name for column in self.columns]
        return self.checks_rows or bool(self.facts.why_exact(names, self.key_names))

    @cached_property
    def checks_rows(self) -> bool:
        """The source sends whole old rows of a table with a key, with which the sink's rows are compared."""
        return bool(self.key) and self.relation.replica_identity == "f"

    @cached_property
    def key_names(self) -> list[str]:
        return [self.columns[at].name for at in self.key]

    @cached_property
    def has_local_columns(self) -> bool:
        return bool(set(self.facts.names).difference(column.name for column in self.columns))

    @cached_property
    def always(self) -> frozenset[int]:
        """Positions of columns that are GENERATED ALWAYS AS IDENTITY at the sink, which no UPDATE may set."""
        return frozenset(at for at, column in enumerate(self.columns) if column.name in self.facts.always)

    @cached_property
    def search(self) -> tuple[int, ...]:
        """Positions of the columns by which an index finds a row that no key identifies."""
        at_by_name = {column.name: at for at, column in enumerate(self.columns)}
        return tuple(at_by_name[name] for name in self.facts.search_columns(list(at_by_name)))

    @cached_property
    def by_key(self) -> RowCondition:
        return RowCondition(self.key)

    @cached_property
    def by_key_and_row(self) -> RowCondition:
        return RowCondition(self.key, is_whole=True)

    @cached_property
    def by_key_and_identity(self) -> RowCondition:
        """An update may not set identity columns that are GENERATED ALWAYS, so they must be equal already."""
        return RowCondition((*self.key, *sorted(self.always.difference(self.key))))

    def by_whole_row(self, row: Sequence[Value], is_one: bool = True) -> RowCondition:
        """Return the condition that finds this row without a key; an index is of use for the values before the first NULL."""
        found = 0
        while found < len(self.search) and row[self.search[found]] != NULL_VALUE:
            found += 1
        return RowCondition(self.search[:found], is_whole=True, is_one=is_one)

    @cached_property
    def target(self) -> str:
        return self.quoted if self.facts.is_partitioned else f"ONLY {self.quoted}"

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
        """An insert of one row; parameters: its values."""
        if not self.columns:
            return f"INSERT INTO {self.quoted} DEFAULT VALUES"
        values = ", ".join(column.parameter(at + 1) for at, column in enumerate(self.columns))
        return f"INSERT INTO {self.quoted} ({self.names}) OVERRIDING SYSTEM VALUE VALUES ({values})"

    def truncate_sql(self, restarts: bool) -> tuple[str, ...]:
        return truncates(self.quoted, self.facts, restarts)

    def insert_staged_sql(self, stage: str) -> str:
        """Return an insert of all rows of a staging table."""
        values = ", ".join(column.staged for column in self.columns)
        return f"INSERT INTO {self.quoted} ({self.names}) OVERRIDING SYSTEM VALUE SELECT {values} FROM {stage} s"

    def update_staged_sql(self, stage: str) -> str:
        """Return an update of all rows that are in a staging table. Not for a table that has only key columns."""
        others = [column for at, column in enumerate(self.columns) if at not in self.key]
        sets = ", ".join(f"{column.quoted} = {column.staged}" for column in others)
        return f"UPDATE {self.target} t SET {sets} FROM {stage} s WHERE {self._staged_key}"

    @cached_property
    def delete_many_sql(self) -> str:
        """Parameters: an array of the values of each key column."""
        key = [self.columns[at] for at in self.key]
        arrays = ", ".join(f"${n + 1}::{column.wire.sql}[]" for n, column in enumerate(key))
        names = ", ".join(column.quoted for column in key)
        return f"DELETE FROM {self.target} t USING unnest({arrays}) AS s ({names}) WHERE {self._staged_key}"

    def delete_sql(self, row: RowCondition) -> str:
        """Return a delete of one row; parameters: those of its condition."""
        return self._text(("delete", row), lambda: f"DELETE FROM {self.target} t WHERE {row.sql(self, 1)}")

    def update_sql(self, present: tuple[int, ...], row: RowCondition) -> str:
        """Return an update of these columns of one row; parameters: their values, then those of its condition."""

        def text() -> str:
            sets = ", ".join(f"{self.columns[at].quoted} = {self.columns[at].parameter(n + 1)}" for n, at in enumerate(present))
            return f"UPDATE {self.target} t SET {sets} WHERE {row.sql(self, len(present) + 1)}"

        return self._text((present, row), text)

    def find_sql(self, row: RowCondition) -> str:
        """Return a query for where at most two rows are that a condition holds for; parameters: those of the condition."""
        return self._text(
            ("find", row),
            lambda: f"SELECT t.tableoid::text, t.ctid::text FROM {self.target} t WHERE {row.sql(self, 1)} LIMIT 2",
        )

    @cached_property
    def _staged_key(self) -> str:
        columns = [self.columns[at] for at in self.key]
        return " AND ".join(f"t.{c.quoted} {self.facts.equals_of(c.name)} {c.staged}" for c in columns)

    def _text(self, name: tuple[object, ...], new: Callable[[], str]) -> str:
        if (text := self._texts.get(name)) is None:
            text = self._texts[name] = new()
        return text
