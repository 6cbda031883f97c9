"""The servers' own logical replication, as a measure for ours: one subscription for the same tables, between the same servers.

The subscription is made (disabled, with a slot of its own) before the load is written, and enabled when its time is taken, as
our executor is started then: both begin with a slot, empty tables and a backlog. It goes into a database of its own at the sink.
Everything else is as CREATE SUBSCRIPTION has it, but for `binary = true`, which we use too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import psycopg

from deploy.local.postgres import PostgresServer

WAIT_S = 600.0
POLL_S = 0.005
MARKS = "bench_marks"
"""A schema of its own: our own changefeed, which takes public.*, has nothing to do for it."""


class Servers(Protocol):
    @property
    def source(self) -> PostgresServer: ...

    @property
    def sink(self) -> PostgresServer: ...


def describe_native() -> dict[str, str]:
    """What the comparison is."""
    return {
        "what": "CREATE SUBSCRIPTION WITH (binary = true, copy_data = false, create_slot = false), all else by default",
        "applied_by": "one apply worker, in commit order, one transaction at the sink for each at the source",
        "streaming": "off (the default; no transaction here is as large as logical_decoding_work_mem)",
        "synchronous_commit": "off in its apply worker (the default): its time ends when the last commit is visible, while ours "
        "ends when it is durable",
        "backlog": "the same for both, worked off one after the other; `is_first` says who began",
        "start": "both times include it: enabling the subscription; copying a slot and taking the tables over",
    }


class NativeLine:
    """One subscription. Its rows arrive below the same names in a database of its own."""

    def __init__(self, servers: Servers, name: str, source_uri: str, tables: Sequence[str]) -> None:
        """source_uri: a database that has these tables already; tables: the statements that make them at the sink."""
        self._servers = servers
        self._name = f"native_{name}"
        self._marks = 0
        self._source = psycopg.connect(source_uri, autocommit=True)
        self.sink_uri = servers.sink.create_database(self._name)
        self._sink: psycopg.Connection[tuple[object, ...]] | None = psycopg.connect(self.sink_uri, autocommit=True)
        marks = (f"CREATE SCHEMA {MARKS}", f"CREATE TABLE {MARKS}.marks (number int PRIMARY KEY)")
        for statement in (*marks, *tables):
            self._sink.execute(statement.encode())
        for statement in marks:
            self._source.execute(statement.encode())
        self._source.execute(f"CREATE PUBLICATION {self._name} FOR TABLES IN SCHEMA public, {MARKS}".encode())
        self._source.execute(f"SELECT pg_create_logical_replication_slot('{self._name}', 'pgoutput')".encode())
        self._sink.execute(
            (
                f"CREATE SUBSCRIPTION {self._name} CONNECTION '{source_uri}' PUBLICATION {self._name} WITH"
                f" (slot_name = '{self._name}', create_slot = false, copy_data = false, binary = true, enabled = false)"
            ).encode()
        )

    def mark(self) -> None:
        """Notes the end of a load."""
        self._marks += 1
        self._source.execute(f"INSERT INTO {MARKS}.marks VALUES ({self._marks})".encode())

    def work_off(self) -> None:
        """Enables the subscription until the last mark is at the sink."""
        sink = self._sink
        assert sink is not None
        sink.execute(f"ALTER SUBSCRIPTION {self._name} ENABLE".encode())
        deadline = time.monotonic() + WAIT_S
        query = f"SELECT FROM {MARKS}.marks WHERE number = {self._marks}".encode()
        while sink.execute(query).fetchone() is None:
            if time.monotonic() > deadline:
                raise TimeoutError("native replication stands still")
            time.sleep(POLL_S)
        sink.execute(f"ALTER SUBSCRIPTION {self._name} DISABLE".encode())

    def close(self) -> None:
        """Drops the subscription with its slot, and its database. Idempotent."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        sink.execute(f"ALTER SUBSCRIPTION {self._name} DISABLE".encode())
        sink.execute(f"ALTER SUBSCRIPTION {self._name} SET (slot_name = NONE)".encode())
        sink.execute(f"DROP SUBSCRIPTION {self._name}".encode())
        sink.close()
        self._servers.sink.drop_database(self._name)
        deadline = time.monotonic() + WAIT_S
        drop = f"SELECT pg_drop_replication_slot('{self._name}')".encode()
        while True:
            try:
                self._source.execute(drop)
                break
            except psycopg.errors.ObjectInUse:  # its walsender is just ending
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)
        self._source.execute(f"DROP PUBLICATION {self._name}".encode())
        self._source.close()
