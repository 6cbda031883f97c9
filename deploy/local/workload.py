"""A steady load over twelve tables of different shapes: inserts, updates and deletes at a set rate,
determined by a seed.

One thread, one connection, short transactions over one to three tables. Committed changes are
counted by table and kind; failed transactions are not. A table that has reached its maximum of rows
gets as many deletes as inserts.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

import psycopg
from psycopg import sql

from deploy.local.process import Scoped
from deploy.local.shapes import SHAPES, Shape

ROWS_PER_TABLE_MAX = 5_000
ROWS_PER_TRANSACTION = 12
RECONNECT_PAUSE_S = 0.2
STOP_TIMEOUT_S = 30.0

INSERT, UPDATE, DELETE = "insert", "update", "delete"
_KINDS = (INSERT, UPDATE, DELETE)
_WEIGHTS = (45, 40, 15)
_FULL_WEIGHTS = (20, 40, 40)
"""Once a table has reached its cap."""


@dataclass(slots=True)
class _Table:
    """The keys that a table holds, so that updates and deletes hit rows that exist."""

    shape: Shape
    keys: list[tuple[Any, ...]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def take(self, rng: Random) -> tuple[Any, ...] | None:
        """Remove a random key and return it; None when the table is empty."""
        if not self.keys:
            return None
        index = rng.randrange(len(self.keys))
        self.keys[index], self.keys[-1] = self.keys[-1], self.keys[index]
        return self.keys.pop()


@dataclass(frozen=True, slots=True)
class LoadCounts:
    """The changes committed so far."""

    by_kind: Mapping[str, int]
    by_table: Mapping[str, Mapping[str, int]]
    transactions: int
    errors: int

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def create_tables(uri: str, *, schema: str = "public", shapes: Sequence[Shape] = SHAPES) -> list[str]:
    """Create the schema and the tables. Returns their names as schema.table, in order."""
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        for shape in shapes:
            name = sql.Identifier(schema, shape.name)
            body = sql.SQL(shape.columns_sql)
            connection.execute(sql.SQL("CREATE TABLE {} ({})").format(name, body))
            for statement in shape.extra_sql:
                connection.execute(sql.SQL(statement).format(name))
    return [f"{schema}.{shape.name}" for shape in shapes]


def end_of_wal(connection: psycopg.Connection[Any]) -> int:
    """Return the position where the WAL of a server ends now, as a Ts."""
    row = connection.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint").fetchone()
    assert row is not None
    return int(row[0])


class Workload(Scoped):
    """The load on tables made by `create_tables`: `start` it, `stop` it, read `counts` at any time
    from any thread.

    A broken connection is opened again; `error` holds the last error. The same seed gives the same
    sequence of changes at any rate.
    """

    def __init__(
        self,
        uri: str,
        *,
        rows_per_s: float = 500.0,
        seed: int = 1,
        schema: str = "public",
        shapes: Sequence[Shape] = SHAPES,
        rows_per_table_max: int = ROWS_PER_TABLE_MAX,
    ) -> None:
        self._uri = uri
        self._rate = rows_per_s
        self._rng = Random(seed)
        self._schema = schema
        self._tables = [_Table(shape) for shape in shapes]
        self._cap = rows_per_table_max
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # (table, kind)
        self._transactions = 0
        self._errors = 0
        self.error = ""

    def fill(self, rows_per_table: int) -> None:
        """Insert this many rows into each table, at full speed and in this thread; before `start`."""
        with psycopg.connect(self._uri) as connection:
            for table in self._tables:
                for begin in range(0, rows_per_table, 500):
                    self._transaction(connection, [(table, INSERT)] * min(500, rows_per_table - begin))

    def start(self) -> None:
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="workload", daemon=True)
        self._thread.start()

    def stop(self) -> LoadCounts:
        """Stop after the current transaction and return what was committed in total. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)
            if self._thread.is_alive():
                raise TimeoutError(f"the workload's transaction did not end within {STOP_TIMEOUT_S:g} s")
        return self.counts

    def close(self) -> None:
        self.stop()

    @property
    def counts(self) -> LoadCounts:
        with self._lock:
            names = [table.shape.name for table in self._tables]
            by_table = {name: {kind: n for kind in _KINDS if (n := self._counts[name, kind])} for name in names}
            by_kind = {kind: sum(counts.get(kind, 0) for counts in by_table.values()) for kind in _KINDS}
            return LoadCounts(by_kind, by_table, self._transactions, self._errors)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._uri, connect_timeout=5) as connection:
                    self._pace(connection)
            except psycopg.OperationalError as error:
                with self._lock:
                    self._errors += 1
                    self.error = str(error).strip()
                self._stopping.wait(RECONNECT_PAUSE_S)

    def _pace(self, connection: psycopg.Connection[Any]) -> None:
        begin, done = time.monotonic(), 0
        while not self._stopping.is_set():
            ahead_s = done / self._rate - (time.monotonic() - begin)
            if ahead_s > 0 and self._stopping.wait(ahead_s):
                return
            if ahead_s < -1.0:  # a machine that fell behind does not catch up in a burst
                begin, done = time.monotonic(), 0
            done += self._transaction(connection, self._choose())

    def _choose(self) -> list[tuple[_Table, str]]:
        """Choose the changes of the next transaction."""
        tables = self._rng.sample(self._tables, k=min(len(self._tables), self._rng.randint(1, 3)))
        chosen = self._rng.choices(tables, k=self._rng.randint(1, ROWS_PER_TRANSACTION))
        weights = [_WEIGHTS if len(table.keys) < self._cap else _FULL_WEIGHTS for table in chosen]
        return [(table, self._rng.choices(_KINDS, weight)[0]) for table, weight in zip(chosen, weights, strict=True)]

    def _transaction(self, connection: psycopg.Connection[Any], work: Sequence[tuple[_Table, str]]) -> int:
        """Commit a transaction and return how many rows changed. After an error the keys are as before."""
        before = [(table, list(table.keys)) for table in {id(table): table for table, _ in work}.values()]
        try:
            with connection.transaction(), connection.pipeline(), connection.cursor() as cursor:
                done = Counter((table.shape.name, self._change(cursor, table, kind)) for table, kind in work)
        except psycopg.Error:
            for table, keys in before:
                table.keys = keys
            raise
        with self._lock:
            self._transactions += 1
            self._counts.update(done)
        return len(work)

    def _change(self, cursor: psycopg.Cursor[Any], table: _Table, kind: str) -> str:
        """Send one change and return its kind: an insert where there is no row to change."""
        shape, rng = table.shape, self._rng
        name = sql.Identifier(self._schema, shape.name)
        key = table.take(rng) if kind != INSERT else None
        if key is None:
            row = shape.row(rng, next(table.numbers))
            columns = sql.SQL(", ").join(map(sql.Identifier, row))
            values = sql.SQL(", ").join(sql.Placeholder() * len(row))
            cursor.execute(sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(name, columns, values), list(row.values()))
            table.keys.append(tuple(row[column] for column in shape.key))
            return INSERT
        where = sql.SQL(" AND ").join(sql.SQL("{} = %s").format(sql.Identifier(column)) for column in shape.key)
        if kind == DELETE:
            cursor.execute(sql.SQL("DELETE FROM {} WHERE {}").format(name, where), key)
            return DELETE
        changed = shape.update(rng, next(table.numbers))
        assignments = sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(column)) for column in changed)
        cursor.execute(sql.SQL("UPDATE {} SET {} WHERE {}").format(name, assignments, where), [*changed.values(), *key])
        table.keys.append(tuple(changed.get(column, old) for column, old in zip(shape.key, key, strict=True)))
        return UPDATE
