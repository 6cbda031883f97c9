"""Random changes of the shape of tables. Each function changes the model and returns statements; none if it does not fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from tests.random_tables import dml
from tests.random_tables.model import (
    PARTITION_NUMBERS,
    SCHEMAS,
    Column,
    Table,
    bounds,
    create_statements,
    new_column,
    new_key_column,
)
from tests.random_tables.types import CHANGES, DEFAULTS, KEYS


def generated_column(name: str, table: Table) -> Column:
    """Return a column that is computed from another one if that is possible for its type."""
    first = next((column for column in table.columns if column.type in ("int", "bigint", "smallint") and not column.extra), None)
    value = f"{first.name}::bigint * 2" if first is not None else "42"
    return Column(name, "bigint", extra=f"GENERATED ALWAYS AS ({value}) STORED")


class Ddl:
    """tables: the model, in which dropped tables no longer are.

    kind: of new tables, if only one is wanted: keyed, keyless, child or partitioned. shapes: names of
    the changes, if only some are wanted.
    """

    def __init__(self, rng: random.Random, tables: list[Table], kind: str = "", shapes: tuple[str, ...] = ()) -> None:
        self.rng = rng
        self._kind = kind
        self._shapes = shapes
        self.tables = tables
        self._number = 0

    def name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}{self._number}"

    # --- new tables --------------------------------------------------------------------------------------------------

    def new_tables(self) -> list[Table]:
        """Return a table with its partitions or children; the model has them from now on."""
        rng = self.rng
        name, choice = self.name("t"), rng.random()
        schema = "public" if rng.random() < 0.85 else "other"
        if self._kind:
            choice = {"partitioned": 0.0, "keyless": 0.9}.get(self._kind, 0.5)
        if choice < 0.15:
            return self._partitioned(schema, name)
        table = Table(schema, name, [], [], f"{name}_key")
        if choice < 0.8:
            count = rng.choice([1, 1, 1, 2, 3])
            table.columns += [new_key_column(rng, f"k{n}", list(KEYS)) for n in range(count)]
            table.key = [column.name for column in rng.sample(table.columns, count)]
            if rng.random() < 0.12 and table.columns[0].type in ("int", "bigint"):
                table.columns[0].extra = f"GENERATED {rng.choice(['ALWAYS', 'BY DEFAULT'])} AS IDENTITY"
            table.is_deferrable = rng.random() < 0.06
            table.identity = rng.choice(["DEFAULT"] * 6 + ["FULL", "FULL", "INDEX"])
            if table.is_deferrable:
                table.identity = "FULL"
        else:
            table.columns.append(new_key_column(rng, "k0", list(KEYS)))
            table.identity = rng.choice(["FULL"] * 5 + ["INDEX", "NOTHING"])
        table.columns += [new_column(rng, f"c{n}") for n in range(rng.choice([0, 1, 2, 3, 5]))]
        if rng.random() < 0.1:
            table.columns.append(generated_column("g0", table))
        if rng.random() < 0.3:
            rng.shuffle(table.columns)
        self.tables.append(table)
        if rng.random() < (1.0 if self._kind == "child" else 0.1):
            child = Table(
                schema, f"{name}_child", table.columns, list(table.key), f"{name}_child_key", table.identity, parent=table
            )
            child.extra = [new_column(rng, "x0")]
            if child.identity == "INDEX":
                child.identity = "FULL"
            self.tables.append(child)
            return [table, child]
        return [table]

    def _partitioned(self, schema: str, name: str) -> list[Table]:
        rng = self.rng
        columns = [Column("k0", "int", "{}"), *(new_column(rng, f"c{n}") for n in range(rng.choice([1, 2])))]
        has_key = rng.random() < 0.8
        root = Table(schema, name, columns, ["k0"] if has_key else [], f"{name}_key", is_root=True)
        identity = "DEFAULT" if has_key and rng.random() < 0.7 else "FULL"
        parts = [
            Table(rng.choice([schema, schema, "other"]), f"{name}_p{n}", columns, root.key, "", identity, parent=root, number=n)
            for n in (0, 1, 4)
        ]
        self.tables += [root, *parts]
        return [root, *parts]

    def create(self) -> list[str]:
        if len(self.tables) > 9:
            return []
        return [text for table in self.new_tables() for text in create_statements(table)]

    # --- columns -----------------------------------------------------------------------------------------------------

    def add_column(self, table: Table) -> list[str]:
        rng, name = self.rng, self.name("c")
        alter = f"ALTER TABLE {table.path}"
        choice = rng.random()
        if choice < 0.3:
            column = new_column(rng, name)
            table.columns.append(column)
            return [f"{alter} ADD COLUMN {name} {column.type}"]
        if choice < 0.36:
            table.columns.append(generated_column(name, table))
            return [f"{alter} ADD COLUMN {name} {table.columns[-1].type} {table.columns[-1].extra}"]
        if choice < 0.4 and not table.is_root:
            table.columns.append(Column(name, "bigint", extra="GENERATED BY DEFAULT AS IDENTITY"))
            return [f"{alter} ADD COLUMN {name} bigint {table.columns[-1].extra}"]
        kind = rng.choice(list(DEFAULTS))
        default = rng.choice(DEFAULTS[kind])
        table.columns.append(Column(name, kind))
        not_null = rng.choice(["", " NOT NULL"])
        found = [f"{alter} ADD COLUMN {name} {kind} DEFAULT {default}{not_null}"]
        if rng.random() < 0.5:
            found.append(f"{alter} ALTER {name} {rng.choice(['DROP DEFAULT', 'SET DEFAULT NULL'])}")
        if rng.random() < 0.25 and not table.is_root:
            found.append(f"VACUUM FULL {table.path}")
        return found

    def _free_column(self, table: Table) -> Column | None:
        found = [column for column in table.columns if column.name not in table.key and not column.name.startswith("k")]
        return self.rng.choice(found) if found else None

    def drop_column(self, table: Table) -> list[str]:
        if (column := self._free_column(table)) is None:
            return []
        table.columns.remove(column)
        return [f"ALTER TABLE {table.path} DROP COLUMN {column.name}"]

    def replace_column(self, table: Table) -> list[str]:
        """Drop a column and add it again, with the same or another type."""
        if (column := self._free_column(table)) is None:
            return []
        kind = column.type if self.rng.random() < 0.7 else "text"
        table.columns.remove(column)
        table.columns.append(Column(column.name, kind))
        change = f"DROP COLUMN {column.name}", f"ADD COLUMN {column.name} {kind}"
        if self.rng.random() < 0.5:
            return [f"ALTER TABLE {table.path} {', '.join(change)}"]
        return [f"ALTER TABLE {table.path} {text}" for text in change]

    def rename_column(self, table: Table) -> list[str]:
        column = self.rng.choice(table.columns)
        former, column.name = column.name, self.name("k" if column.key_form else "c")
        table.key = [column.name if name == former else name for name in table.key]
        found = [f"ALTER TABLE {table.path} RENAME COLUMN {former} TO {column.name}"]
        if self.rng.random() < 0.3:
            table.columns.append(Column(former, column.type if column.type in DEFAULTS else "text"))
            found.append(f"ALTER TABLE {table.path} ADD COLUMN {former} {table.columns[-1].type}")
        return found

    def swap_columns(self, table: Table) -> list[str]:
        """Exchange the names of two columns."""
        if len(table.columns) < 2:
            return []
        one, other = self.rng.sample(table.columns, 2)
        if one.name in table.key or other.name in table.key:
            return []
        text = f"ALTER TABLE {table.path} RENAME COLUMN {{}} TO {{}}"
        found = [text.format(one.name, "swapped"), text.format(other.name, one.name), text.format("swapped", other.name)]
        one.name, other.name = other.name, one.name
        return found

    def change_type(self, table: Table) -> list[str]:
        columns = [column for column in table.columns if column.type in CHANGES and not column.extra]
        if not columns:
            return []
        column = self.rng.choice(columns)
        kind, using = self.rng.choice(CHANGES[column.type])
        if using and column.name in table.key:
            return []
        column.type = kind
        if column.key_form and kind in KEYS:
            column.key_form = KEYS[kind][0] if column.key_form != "{}" else column.key_form
        if self.rng.random() < 0.15:
            using = using or f"{{0}}::{kind}"
        text = f" USING {using.format(column.name)}" if using else ""
        return [f"ALTER TABLE {table.path} ALTER {column.name} TYPE {kind}{text}"]

    def change_values(self, table: Table) -> list[str]:
        """Rewrite a column by USING, without a new type."""
        columns = [column for column in table.columns if not column.extra and column.name not in table.key]
        changes = [(column, using) for column in columns for kind, using in CHANGES.get(column.type, ()) if kind == column.type]
        if not changes:
            return []
        column, using = self.rng.choice(changes)
        return [f"ALTER TABLE {table.path} ALTER {column.name} TYPE {column.type} USING {using.format(column.name)}"]

    def alter_default(self, table: Table) -> list[str]:
        columns = [column for column in table.columns if column.type in DEFAULTS and not column.extra]
        if not columns:
            return []
        column = self.rng.choice(columns)
        what = self.rng.choice([f"SET DEFAULT {self.rng.choice(DEFAULTS[column.type])}", "DROP DEFAULT"])
        return [f"ALTER TABLE {table.path} ALTER {column.name} {what}"]

    # --- keys and identities -----------------------------------------------------------------------------------------

    def change_key(self, table: Table) -> list[str]:
        if not table.key or table.is_partition or table.is_root:
            return []
        others = [column for column in table.all_columns if not column.extra and column.type in KEYS]
        if not others:
            return []
        key = [column.name for column in self.rng.sample(others, min(len(others), self.rng.choice([1, 2])))]
        former, table.key, table.key_name = table.key_name, key, self.name(f"{table.name}_key")
        drop, add = f"DROP CONSTRAINT {former}", f"ADD CONSTRAINT {table.key_name} PRIMARY KEY ({', '.join(key)})"
        if self.rng.random() < 0.7:
            return [f"ALTER TABLE {table.path} {drop}, {add}"]
        return [f"ALTER TABLE {table.path} {drop}", f"ALTER TABLE {table.path} {add}"]

    def change_identity(self, table: Table) -> list[str]:
        if table.is_root:
            return []
        choices = ["FULL"] * 4 + ["DEFAULT"] * 4 + ["NOTHING"] if table.key else ["FULL"]
        table.identity = self.rng.choice(choices)
        return [f"ALTER TABLE {table.path} REPLICA IDENTITY {table.identity}"]

    # --- whole tables ------------------------------------------------------------------------------------------------

    def rewrite(self, table: Table) -> list[str]:
        texts = [f"VACUUM FULL {table.path}", f"VACUUM {table.path}", f"ALTER TABLE {table.path} SET (fillfactor = 90)"]
        texts += [f"ALTER TABLE {table.path} ADD CONSTRAINT {self.name('check')} CHECK (true)"]
        if table.key and not table.is_root and not table.is_partition:
            texts.append(f"CLUSTER {table.path} USING {table.key_name}")
        return [self.rng.choice(texts)]

    def rename(self, table: Table) -> list[str]:
        former, table.name = table.path, self.name("t")
        return [f"ALTER TABLE {former} RENAME TO {table.name}"]

    def swap_tables(self, table: Table) -> list[str]:
        """Exchange the names of two tables, or of a table and a new one like it."""
        others = [other for other in self.tables if other.schema == table.schema and other is not table]
        if not others:
            return []
        other = self.rng.choice(others)
        text = "ALTER TABLE {} RENAME TO {}"
        found = [
            text.format(table.path, "swapping"),
            text.format(other.path, table.name),
            text.format(f"{table.schema}.swapping", other.name),
        ]
        table.name, other.name = other.name, table.name
        return found

    def replace_table(self, table: Table) -> list[str]:
        """Fill a new table like this one, and give it the name of this one."""
        if table.parent is not None or table.is_root or any(other.parent is table for other in self.tables):
            return []
        former, fresh = self.name("t"), self.name("t")
        old = replace(table, name=former, columns=[replace(column) for column in table.columns], key=list(table.key))
        self.tables.append(old)
        table.key_name = f"{fresh}_pkey"
        found = [
            f"CREATE TABLE {table.schema}.{fresh} (LIKE {table.path} INCLUDING ALL)",
            f"INSERT INTO {table.schema}.{fresh} SELECT * FROM {table.path} LIMIT 5",
            f"ALTER TABLE {table.path} RENAME TO {former}",
            f"ALTER TABLE {table.schema}.{fresh} RENAME TO {table.name}",
        ]
        if table.identity != "DEFAULT":
            table.identity = "FULL"
            found.insert(1, f"ALTER TABLE {table.schema}.{fresh} REPLICA IDENTITY FULL")
        if self.rng.random() < 0.5:
            self.tables.remove(old)
            found.append(f"DROP TABLE {old.path}")
        return found

    def move_schema(self, table: Table) -> list[str]:
        former, schema = table.path, self.rng.choice([schema for schema in SCHEMAS if schema != table.schema])
        table.schema = schema
        return [f"ALTER TABLE {former} SET SCHEMA {schema}"]

    def rename_schema(self, table: Table) -> list[str]:
        """Rename a schema to and fro, so that the model's names stay right."""
        return [f"ALTER SCHEMA {table.schema} RENAME TO moved", f"ALTER SCHEMA moved RENAME TO {table.schema}"]

    def drop(self, table: Table) -> list[str]:
        gone = [table, *(other for other in self.tables if other.parent is table)]
        if len(self.tables) - len(gone) < 2:
            return []
        for other in gone:
            self.tables.remove(other)
        return [f"DROP TABLE {table.path} CASCADE"]

    def recreate(self, table: Table) -> list[str]:
        if table.parent is not None or table.is_root or any(other.parent is table for other in self.tables):
            return []
        table.key_name = self.name(f"{table.name}_key") if table.key else ""
        columns = [column for column in table.columns if column.is_written]
        table.columns[:] = columns
        found = [f"DROP TABLE {table.path} CASCADE", *create_statements(table)]
        return [*found, dml.insert(self.rng, table, 3)]

    def unlogged(self, table: Table) -> list[str]:
        return [f"ALTER TABLE {table.path} SET UNLOGGED", f"ALTER TABLE {table.path} SET LOGGED"]

    def partition(self, table: Table) -> list[str]:
        """Detach, attach, create or drop a partition."""
        roots = [other for other in self.tables if other.is_root]
        if not roots:
            return []
        root = self.rng.choice(roots)
        parts = [other for other in self.tables if other.parent is root]
        choice = self.rng.random()
        used = {part.number for part in parts}
        free = [number for number in range(PARTITION_NUMBERS + 1) if number not in used]
        if choice < 0.35 and parts:
            part = self.rng.choice(parts)
            part.parent, part.columns = None, [replace(column) for column in part.columns]
            part.key, part.key_name = list(part.key), f"{part.name}_pkey"
            found = [f"ALTER TABLE {root.path} DETACH PARTITION {part.path}"]
            if self.rng.random() < 0.5:
                part.parent, part.columns, part.key = root, root.columns, root.key
                found.append(f"ALTER TABLE {root.path} ATTACH PARTITION {part.path} {bounds(part.number)}")
            return found
        if choice < 0.5 and len(parts) > 1:
            part = self.rng.choice(parts)
            self.tables.remove(part)
            return [f"DROP TABLE {part.path}"]
        if free and PARTITION_NUMBERS not in used:
            identity = "DEFAULT" if root.key else "FULL"
            name = self.name(f"{root.name}_q")
            part = Table(root.schema, name, root.columns, root.key, "", identity, parent=root, number=self.rng.choice(free))
            self.tables.append(part)
            return create_statements(part)
        return []

    # --- all ---------------------------------------------------------------------------------------------------------

    def change(self) -> list[str]:
        """Return the statements of one random change of a random table."""
        for _ in range(20):
            table = self.rng.choice(self.tables)
            if table.is_partition and self.rng.random() < 0.7:
                continue
            change = self.rng.choices(CHANGES_OF_SHAPE, WEIGHTS)[0]
            if self._shapes:
                change = getattr(Ddl, self.rng.choice(self._shapes))
            if table.parent is not None and change in COLUMN_CHANGES:
                continue
            if found := change(self, table):
                return found
        return []


WEIGHTED: tuple[tuple[int, Callable[[Ddl, Table], list[str]]], ...] = (
    (14, Ddl.add_column),
    (7, Ddl.drop_column),
    (6, Ddl.replace_column),
    (7, Ddl.rename_column),
    (3, Ddl.swap_columns),
    (12, Ddl.change_type),
    (3, Ddl.change_values),
    (3, Ddl.alter_default),
    (5, Ddl.change_key),
    (4, Ddl.change_identity),
    (8, Ddl.rewrite),
    (5, Ddl.rename),
    (4, Ddl.swap_tables),
    (4, Ddl.replace_table),
    (4, Ddl.move_schema),
    (1, Ddl.rename_schema),
    (2, Ddl.drop),
    (4, Ddl.recreate),
    (2, Ddl.unlogged),
    (6, Ddl.partition),
    (4, lambda ddl, table: ddl.create()),
)
WEIGHTS = [weight for weight, _ in WEIGHTED]
CHANGES_OF_SHAPE = [change for _, change in WEIGHTED]
COLUMN_CHANGES = (
    Ddl.add_column,
    Ddl.drop_column,
    Ddl.replace_column,
    Ddl.rename_column,
    Ddl.swap_columns,
    Ddl.change_type,
    Ddl.change_values,
)
"""Changes of columns that partitions and children have from their parent."""
