"""Random transactions on tables of several kinds, written in every way, with restarts in between: source = sink at the end."""

from __future__ import annotations

import random

import psycopg
import pytest

from processor.postgres import PostgresExecutor
from tablewire.model.spans import Span
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, wait_until

pytestmark = pytest.mark.integration

TABLES = {
    "plain": "(id int PRIMARY KEY, v text, n numeric, big text)",
    "pair": "(v text, a int, b text, big text, PRIMARY KEY (b, a))",
    "whole": "(id int, v text, n numeric, big text)",
    "wide": "(id numeric PRIMARY KEY, v text, n numeric, tags text[], big text)",
}
ROUNDS = 6
TRANSACTIONS = 60


def big(rng: random.Random) -> str:
    """A value that is TOASTed, or not, or NULL."""
    return rng.choice(["NULL", "'small'", f"repeat(md5('{rng.random()}'), 200)", f"repeat(md5('{rng.random()}'), 200)"])


def insert(rng: random.Random, name: str) -> str:
    number, text = rng.randrange(40), rng.choice(["NULL", "'a'", "'é'", "''"])
    key = f"'k{number % 5}', {number}"
    return {
        "plain": f"INSERT INTO plain VALUES ({number}, {text}, {rng.random()}, {big(rng)}) ON CONFLICT DO NOTHING",
        "pair": f"INSERT INTO pair (b, a, v, big) VALUES ({key}, {text}, {big(rng)}) ON CONFLICT DO NOTHING",
        "whole": f"INSERT INTO whole SELECT {number % 6}, {text}, 1.0, {big(rng)} FROM generate_series(1, {rng.randrange(1, 4)})",
        "wide": f"INSERT INTO wide VALUES ({number}.{'0' * rng.randrange(3)}, {text}, NULL, '{{a,NULL}}', {big(rng)})"
        " ON CONFLICT DO NOTHING",
    }[name]


def change(rng: random.Random, name: str) -> str:
    column = "a" if name == "pair" else "id"
    low = rng.randrange(40)
    where = f"{column} BETWEEN {low} AND {low + rng.randrange(8)}"
    kind = rng.randrange(10)
    if kind < 3:
        return f"DELETE FROM {name} WHERE {where}"
    if kind == 3 and name != "whole":
        # Keys that change: to a free place far away, or back.
        return f"UPDATE {name} SET {column} = {column} + {rng.choice(['1000', '-1000'])} WHERE {where} OR {column} > 900"
    if kind == 4:
        return f"UPDATE {name} SET big = {big(rng)} WHERE {where}"
    if kind == 5 and rng.random() < 0.1:
        return f"TRUNCATE {name}"
    return f"UPDATE {name} SET v = 'u{rng.randrange(100)}' WHERE {where}"


def transact(rng: random.Random, connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """A few statements on a few tables, some of them rolled back in a subtransaction, sometimes all of them."""
    names = rng.sample(list(TABLES), rng.randrange(1, 3))
    with connection.transaction(force_rollback=rng.random() < 0.1):
        for _ in range(rng.randrange(1, 8)):
            name = rng.choice(names)
            statement = (insert if rng.random() < 0.6 else change)(rng, name)
            try:
                with connection.transaction(force_rollback=rng.random() < 0.1):
                    connection.execute(statement.encode())
            except psycopg.errors.UniqueViolation:
                continue


def settle(kit: Kit, executor: PostgresExecutor, spans: list[Span]) -> None:
    target = current(kit)
    wait_until(lambda: min(checkpoint_of(executor, span) for span in spans) >= target, "every checkpoint")


@pytest.mark.parametrize("seed", range(3))
def test_random_transactions_arrive(source_db: str, sink_db: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is replayed by its seed."""
    rng = random.Random(seed)
    with Kit(source_db, sink_db, options={"binary": "false" if seed == 2 else "true"}) as kit:
        for name, columns in TABLES.items():
            kit.run(f"CREATE TABLE {name} {columns}")
            kit.run(f"ALTER TABLE {name} ALTER big SET STORAGE EXTERNAL")
        kit.run("ALTER TABLE whole REPLICA IDENTITY FULL")
        start_ts = kit.start()
        spans = [kit.span(name) for name in TABLES]
        for number in range(ROUNDS):
            # Few at once and many at once, and by what ways.
            monkeypatch.setattr("processor.postgres.sinks.bulk.BULK_MIN", rng.choice([1, 2, 10, 48]))
            executor = kit.executor(
                f"r{number}", options={**kit.options, "batch_max_bytes": str(rng.choice([1024, 100_000, 4_000_000]))}
            )
            if rng.random() < 0.5:
                begin(executor, spans, start_ts)
            for _ in range(TRANSACTIONS):
                transact(rng, kit.source_connection)
            if not executor._tables:
                begin(executor, spans, start_ts)
            if rng.random() < 0.7 or number == ROUNDS - 1:
                settle(kit, executor, spans)
                kit.wait_equal(*TABLES)
            executor.close()
