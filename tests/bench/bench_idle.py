"""The cost of a quiet cluster: CPU time of the owner and the processor while no row is written.

A real cluster (one etcd, one owner, one processor, PostgreSQL as the source and another one as the sink) with one changefeed.
Once its tables replicate and nothing has been written for SETTLE_S, the CPU time of both services is read from /proc twice,
QUIET_S apart. Two servers, because the owner's notes at a sink in the same server are changes of the source's WAL.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from deploy.local.cluster import Cluster
from deploy.local.postgres import PostgresServer

QUIET_S = 60.0
SETTLE_S = 5.0
TABLES = 4
CHANGEFEED = "idle"
LEASE_TTL_MS = 10_000
"""The default of `etcd.lease_ttl_ms`; a shorter lease is renewed more often."""


def run(quiet_s: float = QUIET_S) -> dict[str, Any]:
    """Measure CPU seconds of each service over `quiet_s` seconds."""
    with (
        tempfile.TemporaryDirectory(prefix="tablewire-bench-") as folder,
        PostgresServer(Path(folder), name="source") as source_server,
        PostgresServer(Path(folder), name="sink") as sink_server,
        Cluster(
            Path(folder),
            etcd=1,
            owners=1,
            processors=1,
            postgres={"source": source_server, "sink": sink_server},
            lease_ttl_ms=LEASE_TTL_MS,
            links=False,
        ) as cluster,
    ):
        source, sink = source_server.create_database("source"), sink_server.create_database("sink")
        with psycopg.connect(source, autocommit=True) as connection:
            for number in range(TABLES):
                connection.execute(f"CREATE TABLE public.quiet{number} (id bigserial PRIMARY KEY, text text)")
                connection.execute(f"INSERT INTO public.quiet{number} (text) VALUES ('one row')")
        cluster.owner_json("changefeed", "create", "--id", CHANGEFEED, "--source", source, "--sink", sink, "--tables", "public.*")
        cluster.wait_replicating(CHANGEFEED, tables=TABLES)
        time.sleep(SETTLE_S)
        before, started = _cpu_seconds(cluster), time.monotonic()
        time.sleep(quiet_s)
        after, elapsed_s = _cpu_seconds(cluster), time.monotonic() - started
    used = {service: after[service] - before[service] for service in before}
    return {
        "quiet_s": round(elapsed_s, 1),
        "tables": TABLES,
        **{f"{service}_cpu_s": round(seconds, 2) for service, seconds in used.items()},
        **{f"{service}_core_percent": round(100 * seconds / elapsed_s, 2) for service, seconds in used.items()},
    }


def _cpu_seconds(cluster: Cluster) -> dict[str, float]:
    """Return the user and system time that each service has used since it started."""
    return {
        "owner": _process_cpu_s(cluster.node("owner0").process.pid),
        "processor": _process_cpu_s(cluster.node("processor0").process.pid),
    }


def _process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
