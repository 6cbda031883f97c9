"""The gap of a planned move: how long a table has no writer while it moves from one processor to another.

A real cluster (one etcd, one owner, two processors, one PostgreSQL for both sides). A row is committed to the table every few
milliseconds, and a trigger at the sink notes the time of each write there. The gap of a move is the longest time between two
writes from the moment the move was asked for until it was done; beside it stands what that is without any move.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import psycopg

from deploy.local.cluster import Cluster
from deploy.local.postgres import PostgresServer
from deploy.local.process import wait_until

MOVES = 20
TABLES = 4
COMMIT_INTERVAL_S = 0.002
CHANGEFEED = "bench"
TABLE = "public.moving0"
SETTLE_WRITES = 200
TIMEOUT_S = 60.0
LEASE_TTL_MS = 5_000

WATCH = """
CREATE TABLE IF NOT EXISTS public.bench_writes (at double precision NOT NULL);
CREATE OR REPLACE FUNCTION public.bench_note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO public.bench_writes VALUES (extract(epoch FROM clock_timestamp()));
  RETURN NULL;
END $$;
CREATE TRIGGER bench_note AFTER INSERT OR UPDATE ON public.moving0 FOR EACH STATEMENT EXECUTE FUNCTION public.bench_note();
ALTER TABLE public.moving0 ENABLE ALWAYS TRIGGER bench_note;
"""


class Load:
    """Commits one row every COMMIT_INTERVAL_S, on a thread of its own, until `stop`."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.rows = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        with psycopg.connect(self._uri, autocommit=True) as connection:
            while not self._stop.wait(COMMIT_INTERVAL_S):
                connection.execute("INSERT INTO public.moving0 (text) VALUES (repeat('x', 100))")
                self.rows += 1


def run(moves: int = MOVES) -> dict[str, Any]:
    """Figures in milliseconds of the sink's clock."""
    with (
        tempfile.TemporaryDirectory(prefix="tablewire-bench-") as folder,
        PostgresServer(Path(folder)) as server,
        Cluster(
            Path(folder), etcd=1, owners=1, processors=2, postgres={"db": server}, lease_ttl_ms=LEASE_TTL_MS, links=False
        ) as cluster,
    ):
        return _measure(cluster, server, moves)


def _measure(cluster: Cluster, server: PostgresServer, moves: int) -> dict[str, Any]:
    source, sink = server.create_database("source"), server.create_database("sink")
    with psycopg.connect(source, autocommit=True) as connection:
        for number in range(TABLES):
            connection.execute(f"CREATE TABLE public.moving{number} (id bigserial PRIMARY KEY, text text)")
    cluster.owner_json("changefeed", "create", "--id", CHANGEFEED, "--source", source, "--sink", sink, "--tables", "public.*")
    cluster.wait_replicating(CHANGEFEED, tables=TABLES)
    load = Load(source)
    load.start()
    try:
        with psycopg.connect(sink, autocommit=True) as connection:
            wait_until("the table is at the sink", lambda: _exists(connection), TIMEOUT_S)
            connection.execute(WATCH)
            _await_writes(connection)
            quiet = _longest_gap(connection, *_window(connection))
            gaps = [_move(cluster, connection) for _ in range(moves)]
    finally:
        load.stop()
    return {
        "moves": moves,
        "gap_ms_p50": round(statistics.median(gaps), 1),
        "gap_ms_p99": round(sorted(gaps)[max(0, -(-len(gaps) * 99 // 100) - 1)], 1),
        "gap_ms_max": round(max(gaps), 1),
        "longest_between_writes_without_move_ms": round(quiet, 1),
        "commit_interval_ms": COMMIT_INTERVAL_S * 1000,
        "rows": load.rows,
        "fsync": server.settings.get("fsync", "on"),
        "synchronous_commit": server.settings.get("synchronous_commit", "on"),
    }


def _move(cluster: Cluster, connection: psycopg.Connection[Any]) -> float:
    """Moves the table to the other processor; the longest time between two writes meanwhile, in milliseconds."""
    tables = cluster.admin.tables(CHANGEFEED)
    primary = next(row["primary"] for row in tables if row["table"] == TABLE)
    target = next(capture for capture in cluster.captures().values() if capture != primary)
    begin = _now(connection)
    cluster.owner_json("table", "move", TABLE, "--to", target, "--wait")
    end = _now(connection)
    _await_writes(connection)
    return _longest_gap(connection, begin, end)


def _exists(connection: psycopg.Connection[Any]) -> bool:
    return connection.execute("SELECT to_regclass('public.moving0') IS NOT NULL").fetchall() == [(True,)]


def _now(connection: psycopg.Connection[Any]) -> float:
    return float(connection.execute("SELECT extract(epoch FROM clock_timestamp())::double precision").fetchall()[0][0])


def _count(connection: psycopg.Connection[Any]) -> int:
    return int(connection.execute("SELECT count(*) FROM public.bench_writes").fetchall()[0][0])


def _await_writes(connection: psycopg.Connection[Any]) -> None:
    """Until the table is written again at its usual pace."""
    enough = _count(connection) + SETTLE_WRITES
    wait_until("the table is written", lambda: _count(connection) >= enough, TIMEOUT_S)


def _window(connection: psycopg.Connection[Any]) -> tuple[float, float]:
    """The times of the first and the last write that are known."""
    return connection.execute("SELECT min(at), max(at) FROM public.bench_writes").fetchall()[0]


def _longest_gap(connection: psycopg.Connection[Any], begin: float, end: float) -> float:
    """In milliseconds, between neighbouring writes of which at least one is between begin and end."""
    times = [row[0] for row in connection.execute("SELECT at FROM public.bench_writes ORDER BY at").fetchall()]
    first, last = max(0, bisect.bisect_left(times, begin) - 1), bisect.bisect_right(times, end) + 1
    within = times[first:last]
    return max(1000 * (later - earlier) for earlier, later in itertools.pairwise(within))
