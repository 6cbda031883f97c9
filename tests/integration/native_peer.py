"""Runs a scenario with native logical replication between two databases, to show that its expectation is right."""

from __future__ import annotations

import psycopg

from tests.integration.data_plane import Observer, Scenario, without_icu
from tests.processor.postgres.replication_kit import wait_until

SLOT = "native_peer"
SYNCED = "SELECT count(*) > 0 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel"


def run_native(scenario: Scenario, source_uri: str, sink_uri: str) -> None:
    """Replay the scenario with a publication and a subscription; the tables must be equal in the end."""
    observer = Observer(source_uri, sink_uri)
    scenario = without_icu(scenario, observer)
    with psycopg.connect(source_uri, autocommit=True) as source, psycopg.connect(sink_uri, autocommit=True) as sink:
        slot = f"{SLOT}_{source.info.dbname}"
        for statement in (scenario.tables, scenario.rows):
            source.execute(statement.encode())
        sink.execute((scenario.tables if scenario.sink is None else scenario.sink).encode())
        via_root = scenario.options.get("partitions") == "root"
        operations = scenario.options.get("operations", "insert,update,delete,truncate")
        source.execute(
            f"CREATE PUBLICATION native FOR ALL TABLES WITH (publish_via_partition_root = {via_root}, publish = "
            f"'{operations}')".encode()
        )
        source.execute(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')".encode())
        sink.execute(
            f"CREATE SUBSCRIPTION {slot} CONNECTION '{source_uri}' PUBLICATION native WITH (create_slot = false,"
            f" slot_name = '{slot}', copy_data = {scenario.initial_snapshot})".encode()
        )
        try:
            wait_until(lambda: sink.execute(SYNCED).fetchone() == (True,), "the subscription is synchronized", 30.0)
            for step in scenario.changes:
                if step.startswith("sink: "):
                    _wait_equal(observer, scenario)
                    sink.execute(step.removeprefix("sink: ").encode())
                elif step not in ("pause", "resume"):
                    source.execute(step.encode()) if step != "settle" else _wait_equal(observer, scenario)
            _wait_equal(observer, scenario)
            for query, rows in scenario.at_sink:
                assert sink.execute(query.encode()).fetchall() == rows, query
        finally:
            observer.close()
            sink.execute(f"ALTER SUBSCRIPTION {slot} DISABLE; ALTER SUBSCRIPTION {slot} SET (slot_name = NONE)".encode())
            sink.execute(f"DROP SUBSCRIPTION {slot}".encode())


def _wait_equal(observer: Observer, scenario: Scenario) -> None:
    for name in scenario.compared:
        wait_until(lambda name=name: not observer.difference(name, compares_types=False), f"natively, {name} is equal", 15.0)  # type: ignore[misc]
