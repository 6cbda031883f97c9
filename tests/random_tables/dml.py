"""Random changes of rows."""

from __future__ import annotations

import random

from tests.random_tables.model import KEY_NUMBERS, Column, Table


def insert(rng: random.Random, table: Table, rows: int = 1) -> str:
    columns = [column for column in table.all_columns if column.is_written and "ALWAYS AS IDENTITY" not in column.extra]
    if not columns:
        return f"INSERT INTO {table.path} DEFAULT VALUES"
    if len(columns) > 3 and rng.random() < 0.2:
        kept = set(map(id, table.key_columns())) | {id(rng.choice(columns)) for _ in range(2)}
        columns = [column for column in columns if id(column) in kept] or columns
    lines = []
    for _ in range(rows):
        number = rng.randrange(KEY_NUMBERS)
        lines.append("(" + ", ".join(column.value(rng, number + rng.choice([0, 0, 0, 1])) for column in columns) + ")")
    names = ", ".join(column.name for column in columns)
    return f"INSERT INTO {table.path} ({names}) VALUES {', '.join(lines)} ON CONFLICT DO NOTHING"


def insert_many(rng: random.Random, table: Table) -> str:
    """Return an insert of several rows, which may be written in bulk."""
    columns = [column for column in table.all_columns if column.is_written and "ALWAYS AS IDENTITY" not in column.extra]
    if not columns:
        return insert(rng, table)
    names, values = ", ".join(column.name for column in columns), []
    for column in columns:
        if column.key_form and "IDENTITY" not in column.extra and "10.0.0" not in column.key_form:
            values.append(f"({_of_g(column)})::{column.type}")
        else:
            values.append(column.value(rng, 3))
    series = f"generate_series(20, {rng.choice([22, 79, 219])}) g"
    return f"INSERT INTO {table.path} ({names}) SELECT {', '.join(values)} FROM {series} ON CONFLICT DO NOTHING"


def _of_g(column: Column) -> str:
    """Return the form of the key with the series' number in it."""
    form = column.key_form
    if form.startswith("'"):
        inner = form[1:].partition("'")
        return (
            f"concat('{inner[0].replace('{}', chr(39) + ', g, ' + chr(39))}'){inner[2]}" if "{}" in inner[0] else form.format("g")
        )
    if form in ("{}.5", "{}.1", "{}.25", "{}.0", "{}.00"):
        return f"g + {form.format(0)}"
    if form.startswith("md5"):
        return "md5(g::text)::uuid"
    return form.format("g")


def condition(rng: random.Random, table: Table) -> str:
    keys = table.key_columns()
    if not keys or rng.random() < 0.05:
        return "true"
    column = rng.choice(keys)
    if "IDENTITY" in column.extra:
        return f"{column.name} % {rng.randrange(2, 5)} = 0"
    numbers = [rng.randrange(KEY_NUMBERS) for _ in range(rng.choice([1, 1, 2, 4]))]
    return f"{column.name} IN ({', '.join(column.value(rng, number) for number in numbers)})"


def update(rng: random.Random, table: Table) -> str:
    columns = [column for column in table.all_columns if column.is_written and column.name not in table.key]
    if not columns:
        return update_key(rng, table)
    chosen = rng.sample(columns, min(len(columns), rng.choice([1, 1, 2])))
    sets = ", ".join(f"{column.name} = {column.value(rng, rng.randrange(KEY_NUMBERS))}" for column in chosen)
    return f"UPDATE {table.path} SET {sets} WHERE {condition(rng, table)}"


def update_key(rng: random.Random, table: Table) -> str:
    keys = [column for column in table.key_columns() if "IDENTITY" not in column.extra]
    if not keys:
        return insert(rng, table)
    column = rng.choice(keys)
    low, high = rng.randrange(KEY_NUMBERS), rng.randrange(KEY_NUMBERS)
    return f"UPDATE {table.path} SET {column.name} = {column.value(rng, high)} WHERE {column.name} = {column.value(rng, low)}"


def swap(rng: random.Random, table: Table) -> list[str]:
    """Return statements that exchange the keys of two rows: through a third key, or at once if the key is deferrable."""
    keys = [column for column in table.key_columns() if "IDENTITY" not in column.extra]
    if not keys:
        return [insert(rng, table)]
    column = rng.choice(keys)
    one, other, free = (column.value(rng, number) for number in (*rng.sample(range(KEY_NUMBERS), 2), 77))
    name = column.name
    if table.is_deferrable:
        return [
            f"UPDATE {table.path} SET {name} = CASE {name} WHEN {one} THEN {other} ELSE {one} END"
            f" WHERE {name} IN ({one}, {other})"
        ]
    text = f"UPDATE {table.path} SET {name} = {{}} WHERE {name} = {{}}"
    return [text.format(free, one), text.format(one, other), text.format(other, free)]


def delete(rng: random.Random, table: Table) -> str:
    only = "ONLY " if rng.random() < 0.1 and not table.is_root else ""
    return f"DELETE FROM {only}{table.path} WHERE {condition(rng, table)}"


def truncate(rng: random.Random, table: Table, tables: list[Table]) -> str:
    only = "ONLY " if rng.random() < 0.4 and not table.is_root else ""
    others = f", {rng.choice(tables).path}" if rng.random() < 0.2 else ""
    return f"TRUNCATE {only}{table.path}{others}{rng.choice(['', '', ' RESTART IDENTITY', ' CASCADE'])}"


def change(rng: random.Random, table: Table, tables: list[Table]) -> list[str]:
    """Return one change of rows, usually one statement."""
    choice = rng.random()
    if choice < 0.42:
        return [insert(rng, table, rng.choice([1, 1, 2, 5]))]
    if choice < 0.47:
        return [insert_many(rng, table)]
    if choice < 0.67:
        return [update(rng, table)]
    if choice < 0.76:
        return [update_key(rng, table)]
    if choice < 0.82:
        return swap(rng, table)
    if choice < 0.95:
        return [delete(rng, table)]
    if choice < 0.97:
        return [f"UPDATE {table.path} SET {rng.choice(table.all_columns).name} = DEFAULT"]
    return [truncate(rng, table, tables)]


def transaction(rng: random.Random, tables: list[Table]) -> list[str]:
    """Return the statements of a transaction on one or two tables, with subtransactions of which some are rolled back."""
    chosen = [rng.choice(tables) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    found: list[str] = []
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        table = rng.choice(chosen)
        if table.parent is not None and table.is_partition and rng.random() < 0.7:
            table = table.parent  # the row finds its partition
        part = change(rng, table, tables)
        if rng.random() < 0.15:
            ending = "ROLLBACK TO s" if rng.random() < 0.5 else "RELEASE s"
            part = ["SAVEPOINT s", *part, ending]
        found += part
    return found
