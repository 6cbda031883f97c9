"""A model of a table: random DDL and DML at the source, a catalogue as PostgreSQL keeps it, and a sink that follows decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tablewire.postgres.shapes import (
    AddColumn,
    AlterType,
    ColumnShape,
    DropColumn,
    RenameColumn,
    SeenShape,
    SetKey,
    Step,
    TableShape,
)

Row = dict[str, object]


@dataclass
class SourceModel:
    """The table at the source. contents: of each row by attnum; a column that is newer than a row has its missing value there."""

    shape: TableShape = field(
        default_factory=lambda: TableShape(1, "public", "t", "f0", 2, "d", (1,), (_column(1, "id"), _column(2, "a")))
    )
    rows: dict[int, dict[int, object]] = field(default_factory=dict)
    clock: int = 100

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def content(self) -> list[Row]:
        columns = self.shape.columns
        return [{column.name: self.rows[key].get(column.attnum) for column in columns} for key in sorted(self.rows)]

    def seen(self) -> SeenShape:
        columns = tuple((column.name, *column.type) for column in self.shape.columns)
        return SeenShape(columns, frozenset(self.shape.names(self.shape.key)))

    # --- DDL ---------------------------------------------------------------------------------------------------------

    def add(self, name: str, kind: int, default: str) -> None:
        attnum, version = self.shape.attnums + 1, str(self.tick())
        missing = f"d{version}" if default == "constant" else None
        column = replace(_column(attnum, name, kind), version=version, missing_text=missing)
        for row in self.rows.values():
            row[attnum] = missing
        self.shape = replace(self.shape, attnums=attnum, columns=(*self.shape.columns, column))
        if default == "volatile":
            for row in self.rows.values():
                row[attnum] = self.tick()
            self.rewrite()

    def drop(self, column: ColumnShape) -> None:
        self.shape = replace(self.shape, columns=tuple(other for other in self.shape.columns if other is not column))
        for row in self.rows.values():
            row.pop(column.attnum, None)

    def alter(self, column: ColumnShape, **changes: object) -> None:
        new = replace(column, version=str(self.tick()), **changes)  # type: ignore[arg-type]
        self.shape = replace(self.shape, columns=tuple(new if other is column else other for other in self.shape.columns))

    def compute(self, column: ColumnShape, kind: int) -> None:
        """ALTER TYPE ... USING: other values, in a new file."""
        for row in self.rows.values():
            row[column.attnum] = f"computed {self.tick()}"
        self.alter(column, type_oid=kind)
        self.rewrite()

    def rewrite(self) -> None:
        """Give the table another file; that stores missing values in the rows, and alters those columns."""
        columns = tuple(
            column if column.missing_text is None else replace(column, missing_text=None, version=str(self.tick()))
            for column in self.shape.columns
        )
        self.shape = replace(self.shape, file=f"f{self.tick()}", columns=columns)

    # --- DML ---------------------------------------------------------------------------------------------------------

    def write(self, key: int) -> Row:
        """Insert or replace a row; return it as the stream has it."""
        self.rows[key] = {1: key, **{column.attnum: f"v{self.tick()}" for column in self.shape.columns[1:]}}
        return {column.name: self.rows[key][column.attnum] for column in self.shape.columns}


@dataclass
class SinkModel:
    """The table at the sink, whose columns have names only."""

    columns: list[str]
    rows: dict[int, Row]

    def content(self) -> list[Row]:
        return [{name: self.rows[key].get(name) for name in self.columns} for key in sorted(self.rows)]

    def write(self, row: Row) -> None:
        assert set(row) == set(self.columns), "the sink's table does not have the columns of the row"
        key = row["id"]
        assert isinstance(key, int)
        self.rows[key] = dict(row)

    def apply(self, steps: Sequence[Step]) -> None:
        for step in steps:
            match step:
                case DropColumn(name):
                    self.columns.remove(name)
                    for row in self.rows.values():
                        row.pop(name, None)
                case RenameColumn(name, new_name):
                    assert new_name not in self.columns
                    self.columns[self.columns.index(name)] = new_name
                    for row in self.rows.values():
                        row[new_name] = row.pop(name, None)
                case AddColumn(column):
                    assert column.name not in self.columns
                    self.columns.append(column.name)
                    for row in self.rows.values():
                        row[column.name] = column.missing_text
                case AlterType() | SetKey():
                    pass


def _column(attnum: int, name: str, kind: int = 23) -> ColumnShape:
    return ColumnShape(attnum, name, kind, -1, f"type {kind}", "", "", "1")
