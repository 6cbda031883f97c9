"""A cluster under load that a real Prometheus scrapes, and operations on it, for tests and for the figures of the docs.

    with MonitoredCluster(folder, {"source": server, "sink": server}) as monitored:
        monitored.move_table()
        monitored.kill_leader()
        monitored.prometheus.query("...")

Each operation is recorded in `events`, so that a plot can show it. Not thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deploy.local.cluster import Cluster
from deploy.local.postgres import PostgresServer
from deploy.local.process import Scoped, wait_until
from deploy.local.workload import Workload, create_tables
from deploy.monitoring.prometheus_server import Prometheus

CHANGEFEED = "shop"
ROWS_AT_START = 50
TIMEOUT_S = 60.0


class MonitoredCluster(Scoped):
    """One changefeed over the workload's tables. The caller owns the PostgreSQL servers; `close` stops everything else."""

    def __init__(
        self,
        folder: Path,
        servers: Mapping[str, PostgresServer],
        *,
        rows_per_s: float = 300.0,
        owner_config: Mapping[str, Any] | None = None,
    ) -> None:
        """servers: "source" and "sink"; both may be the same server."""
        self.cluster = Cluster(folder / "cluster", etcd=1, postgres=servers, links=False, owner_config=owner_config or {})
        self.events: list[tuple[float, str]] = []
        """(seconds since the Unix epoch, operation), in order."""
        self.tables: list[str] = []
        self.prometheus: Prometheus
        self._folder = folder
        self._servers = dict(servers)
        self._rows_per_s = rows_per_s
        self._stack = ExitStack()

    def start(self) -> None:
        """Return when every table replicates and Prometheus has observed it: `increase` counts from the first sample."""
        uris = {}
        for name, server in self._servers.items():
            database = f"{CHANGEFEED}_{name}"
            uris[name] = server.create_database(database)
            self._stack.callback(server.drop_database, database)
        self.tables = create_tables(uris["source"])
        load = Workload(uris["source"], rows_per_s=self._rows_per_s)
        load.fill(ROWS_AT_START)
        self._stack.callback(self.cluster.close)
        self.cluster.start()
        self.prometheus = self._stack.enter_context(Prometheus(self._folder, targets=self._targets()))
        self._stack.callback(load.stop)
        load.start()
        self.prometheus.wait_scraped()
        self.record("changefeed created")
        create = ["changefeed", "create", "--id", CHANGEFEED, "--source", uris["source"], "--sink", uris["sink"]]
        self.cluster.owner_json(*create, "--tables", "public.*")
        self.wait_replicating()
        self.wait_observed(f'tablewire_owner_spans{{state="replicating"}} == {len(self.tables)}')

    def close(self) -> None:
        self._stack.close()

    def record(self, event: str) -> None:
        self.events.append((time.time(), event))

    def move_table(self) -> None:
        """Move a table from the processor with the most tables to the one with the fewest."""
        processors, captures = self.processors_by_tables(), self.cluster.captures()
        source, target = captures[processors[-1]], captures[processors[0]]
        table = next(row["table"] for row in self.cluster.admin.tables() if row["primary"] == source)
        self.record("planned move")
        self.cluster.owner_json("table", "move", table, "--to", target, "--wait")
        self.wait_replicating()

    def rebalance(self) -> None:
        self.record("rebalance")
        self.cluster.owner_json("rebalance", "--wait")
        self.wait_replicating()

    def kill_leader(self) -> None:
        """Kill the leader with SIGKILL; return when another owner has scheduled every table."""
        leader = self.cluster.wait_for_leader()
        self.record("leader killed")
        self.cluster.kill(leader)
        self._wait_for_successor(leader)

    def resign(self) -> str:
        """Make the leader resign; return its name when another owner has scheduled every table."""
        leader = self.cluster.wait_for_leader()
        self.record("leader resigns")
        self.cluster.owner_json("resign")
        self._wait_for_successor(leader)
        return leader

    def kill_processor(self) -> str:
        """Kill the processor with the most tables with SIGKILL; return its name when its tables replicate elsewhere."""
        victim = self.processors_by_tables()[-1]
        capture = self.cluster.captures()[victim]
        self.record("processor killed")
        self.cluster.kill(victim)
        self.cluster.wait(f"{victim} is gone", lambda: capture not in {row["id"] for row in self.cluster.admin.captures()})
        self.wait_replicating()
        return victim

    def processors_by_tables(self) -> list[str]:
        """Return the live processors, ordered by how many tables they replicate, fewest first."""
        primaries = [row["primary"] for row in self.cluster.admin.tables()]
        captures = self.cluster.captures()
        return sorted(captures, key=lambda node: (primaries.count(captures[node]), node))

    def wait_replicating(self) -> None:
        self.cluster.wait_replicating(CHANGEFEED, tables=len(self.tables))

    def wait_observed(self, expr: str, condition: Callable[[list[dict[str, Any]]], object] = bool) -> None:
        """Wait until the condition holds for the series that an expression returns; by default, until it returns any.

        Raises TimeoutError, which names the expression.
        """
        wait_until(f"Prometheus answers {expr}", lambda: bool(condition(self.prometheus.query(expr))), TIMEOUT_S)

    def _wait_for_successor(self, former: str) -> None:
        leader = self.cluster.node(self.cluster.wait_for_leader(other_than=former))
        self.wait_replicating()
        self.wait_observed(f'tablewire_owner_failovers_total{{instance="{leader.http_address}"}}')

    def _targets(self) -> dict[str, list[str]]:
        targets: dict[str, list[str]] = {"etcd": self.cluster.etcd.endpoints}
        for node in self.cluster.nodes.values():
            targets.setdefault(f"tablewire-{node.kind}", []).append(node.http_address)
        return targets
