"""The generator's idea of the source: its tables and columns.

It may be wrong, for a statement that fails is left out by the runner.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.random_tables.types import KEYS, VALUES

SCHEMAS = ("public", "other")
KEY_NUMBERS = 12
"""Rows are identified by a small number, so that changes hit them."""
PARTITION_NUMBERS = 4


@dataclass(slots=True, eq=False)
class Column:
    """A column. key_form: how a small number becomes its value, empty if it is not a key. extra: identity or generated."""

    name: str
    type: str
    key_form: str = ""
    extra: str = ""
    is_external: bool = False

    @property
    def is_written(self) -> bool:
        return "GENERATED ALWAYS AS (" not in self.extra

    def value(self, rng: random.Random, number: int) -> str:
        if self.key_form and "IDENTITY" not in self.extra:
            return f"({self.key_form.format(number)})::{self.type}"
        if self.type not in VALUES or rng.random() < 0.15:
            return "NULL"
        return f"{rng.choice(VALUES[self.type])}::{self.type}"


@dataclass(slots=True, eq=False)
class Table:
    """A table of the source. columns: shared with the partitions of the table.

    key: names of the primary key, whose constraint is key_name. parent: its partitioned table, or the
    table that it inherits from. number: the partition's. extra: columns of this table alone.
    """

    schema: str
    name: str
    columns: list[Column]
    key: list[str]
    key_name: str = ""
    identity: str = "DEFAULT"
    is_root: bool = False
    parent: Table | None = None
    number: int = -1
    is_deferrable: bool = False
    extra: list[Column] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def all_columns(self) -> list[Column]:
        return [*self.columns, *self.extra]

    @property
    def is_partition(self) -> bool:
        return self.parent is not None and self.parent.is_root

    def key_columns(self) -> list[Column]:
        """Return the columns with which statements find rows."""
        named = [column for column in self.all_columns if column.name in self.key and column.key_form]
        return named or [column for column in self.all_columns if column.key_form][:1]


def new_key_column(rng: random.Random, name: str, types: list[str]) -> Column:
    kind = rng.choice(types)
    return Column(name, kind, rng.choice(KEYS[kind]))


def new_column(rng: random.Random, name: str) -> Column:
    kind = rng.choice(list(VALUES))
    if rng.random() < 0.2:
        kind = rng.choice(["text", "int", "numeric(10,2)", "varchar(20)"])
    return Column(name, kind, is_external=kind in ("text", "bytea", "jsonb", "text[]") and rng.random() < 0.7)


def definition(column: Column) -> str:
    not_null = " NOT NULL" if column.extra == "" and column.key_form and column.name.startswith("k") else ""
    return f"{column.name} {column.type} {column.extra}{not_null}".rstrip()


def storage_statements(table: Table) -> list[str]:
    return [
        f"ALTER TABLE {table.path} ALTER {column.name} SET STORAGE EXTERNAL" for column in table.columns if column.is_external
    ]


def create_statements(table: Table) -> list[str]:
    """Return what creates the table, its partitions excepted."""
    lines = [definition(column) for column in table.all_columns if table.parent is None or column in table.extra]
    if table.key and not table.is_partition:
        deferrable = " DEFERRABLE INITIALLY DEFERRED" if table.is_deferrable else ""
        lines.append(f"CONSTRAINT {table.key_name} PRIMARY KEY ({', '.join(table.key)}){deferrable}")
    body = f"({', '.join(lines)})"
    if table.is_partition:
        assert table.parent is not None
        text = f"CREATE TABLE {table.path} PARTITION OF {table.parent.path} {bounds(table.number)}"
    elif table.parent is not None:
        text = f"CREATE TABLE {table.path} {body} INHERITS ({table.parent.path})"
    elif table.is_root:
        text = f"CREATE TABLE {table.path} {body} PARTITION BY RANGE ({table.columns[0].name})"
    else:
        text = f"CREATE TABLE {table.path} {body}"
    found = [text]
    if not table.is_partition:
        found += storage_statements(table)
    return [*found, *identity_statements(table)]


def partitioned_statements(table: Table) -> list[str]:
    """Return what creates a partitioned table for a table that is none."""
    by = next((column.name for column in table.columns if column.name in table.key), table.columns[0].name)
    if table.is_root or table.parent is not None:
        return []
    lines = [definition(column) for column in table.columns if column.is_written]
    if table.key:
        lines.append(f"PRIMARY KEY ({', '.join(table.key)})")
    parts = [
        f"CREATE TABLE {table.path}_h{n} PARTITION OF {table.path} FOR VALUES WITH (MODULUS 3, REMAINDER {n})" for n in range(3)
    ]
    return [f"CREATE TABLE {table.path} ({', '.join(lines)}) PARTITION BY HASH ({by})", *parts]


def identity_statements(table: Table) -> list[str]:
    if table.identity == "DEFAULT" or table.is_root:
        return []
    if table.identity == "INDEX":
        names = ", ".join(column.name for column in table.columns if column.name.startswith("k"))
        index = f"{table.name}_identity"
        return [
            f"CREATE UNIQUE INDEX {index} ON {table.path} ({names})",
            f"ALTER TABLE {table.path} REPLICA IDENTITY USING INDEX {index}",
        ]
    return [f"ALTER TABLE {table.path} REPLICA IDENTITY {table.identity}"]


def bounds(number: int) -> str:
    if number >= PARTITION_NUMBERS:
        return "DEFAULT"
    return f"FOR VALUES FROM ({number * 4}) TO ({number * 4 + 4})"
