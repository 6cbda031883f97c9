"""The workload changes what it reports, and the comparison finds every kind of difference."""

from __future__ import annotations

import psycopg
import pytest

from deploy.local.compare import compare
from deploy.local.process import wait_until
from deploy.local.shapes import SHAPES
from deploy.local.workload import Workload, create_tables

pytestmark = pytest.mark.integration


def run_load(uri: str, rows: int, seed: int = 7) -> Workload:
    workload = Workload(uri, rows_per_s=20_000, seed=seed)
    with workload:
        wait_until(f"{rows} rows were changed", lambda: workload.counts.total >= rows, 60)
    return workload


def test_counts_are_what_the_database_holds(source_db: str) -> None:
    """Inserts minus deletes is the number of rows, table by table; every kind occurs in every table; nothing failed."""
    tables = create_tables(source_db)
    assert len(tables) == 12
    counts = run_load(source_db, 3_000).counts
    assert counts.errors == 0
    assert all(counts.by_kind[kind] > 0 for kind in ("insert", "update", "delete"))
    with psycopg.connect(source_db) as connection:
        for shape in SHAPES:
            kinds = counts.by_table[shape.name]
            assert set(kinds) == {"insert", "update", "delete"}, shape.name
            found = connection.execute(f"SELECT count(*) FROM {shape.name}".encode()).fetchone()
            assert found == (kinds["insert"] - kinds["delete"],), shape.name


def test_rows_stay_below_the_cap(source_db: str) -> None:
    """A long load does not grow the tables without bound."""
    create_tables(source_db)
    workload = Workload(source_db, rows_per_s=20_000, rows_per_table_max=20)
    with workload:
        wait_until("5000 rows were changed", lambda: workload.counts.total >= 5_000, 60)
    with psycopg.connect(source_db) as connection:
        for shape in SHAPES:
            found = connection.execute(f"SELECT count(*) FROM {shape.name}".encode()).fetchone()
            assert found is not None
            assert found[0] <= 40, shape.name


def test_load_goes_on_after_a_broken_connection(source_db: str) -> None:
    """The load's connection is killed: the error is counted and the load continues."""
    create_tables(source_db)
    workload = Workload(source_db, rows_per_s=2_000)
    with workload, psycopg.connect(source_db, autocommit=True) as connection:
        wait_until("the load runs", lambda: workload.counts.total > 100, 30)
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        wait_until("it has noticed", lambda: workload.counts.errors > 0, 30)
        before = workload.counts.total
        wait_until("it goes on", lambda: workload.counts.total > before + 100, 30)


def test_equal_databases_compare_equal(source_db: str, sink_db: str) -> None:
    """Two databases with the same changes are equal, and every row was compared."""
    tables = create_tables(source_db)
    create_tables(sink_db)
    for uri in (source_db, sink_db):
        Workload(uri, seed=3).fill(200)
    result = compare(source_db, sink_db, tables)
    assert result.equal, str(result)
    assert result.rows == 12 * 200


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("DELETE FROM settings WHERE name = (SELECT max(name) FROM settings)", "missing"),
        ("INSERT INTO settings VALUES (E'a\\\\n\\tnew\\n''one', NULL)", "extra"),
        ("UPDATE big_texts SET body = body || 'x' WHERE id = 3", "differs"),
        ("UPDATE nulls SET b = '\\N' WHERE id = (SELECT min(id) FROM nulls WHERE b IS NULL)", "differs"),
        ("INSERT INTO events SELECT * FROM events LIMIT 1", "extra"),
        ("UPDATE events SET happened_at = happened_at + '1us' WHERE n = 5", "missing"),
        ("UPDATE mixed SET short = short || '.' WHERE id = 1", "differs"),
        ("DROP TABLE arrays", "table"),
        ("ALTER TABLE arrays DROP COLUMN matrix", "table"),
        ("TRUNCATE moments", "missing"),
    ],
)
def test_every_difference_is_found(source_db: str, sink_db: str, statement: str, what: str) -> None:
    """A missing, extra or different row is found and named, also when counts are equal."""
    tables = create_tables(source_db)
    create_tables(sink_db)
    for uri in (source_db, sink_db):
        Workload(uri, seed=3).fill(50)
    with psycopg.connect(sink_db, autocommit=True) as connection:
        connection.execute(statement.encode())
    result = compare(source_db, sink_db, tables)
    assert not result.equal
    assert result.examples[0].what == what, str(result)
