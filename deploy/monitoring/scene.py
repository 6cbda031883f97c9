"""A cluster under load with a real Prometheus that scrapes it, and the things that happen to it: for tests and for plots.

    with Scene(folder, {"source": server, "sink": server}) as scene:
        scene.move_a_table()
        scene.kill_the_leader()
        scene.prometheus.query("...")

Everything that happens is written down as a mark, (seconds since the epoch, what), so that a plot can show it. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deploy.local.cluster import Cluster
from deploy.local.postgres import PostgresServer
from deploy.local.process import Scoped, wait_until
from deploy.local.workload import Workload, create_tables
from deploy.monitoring.server import Prometheus

CHANGEFEED = "shop"
ROWS_AT_START = 50
TIMEOUT_S = 60.0
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Scene(Scoped):
    """One changefeed over the workload's tables. The PostgreSQL servers are the caller's; all else is ended by `close`."""

    def __init__(
        self,
        folder: Path,
        servers: Mapping[str, PostgresServer],
        *,
        rows_per_s: float = 300.0,
        etcd: int = 1,
        owner_config: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """servers: "source" and "sink"; one server may be both."""
        self.cluster = Cluster(folder / "cluster", etcd=etcd, postgres=servers, links=False, owner_config=owner_config)
        self.marks: list[tuple[float, str]] = []
        self.tables: list[str] = []
        self.prometheus: Prometheus
        self.load: Workload
        self._folder = folder
        self._servers = dict(servers)
        self._rows_per_s = rows_per_s
        self._stack = ExitStack()

    def start(self) -> None:
        """Returns when every table is replicating, and Prometheus has seen that: increases are counted from there."""
        uris = {}
        for name, server in self._servers.items():
            database = f"{CHANGEFEED}_{name}"
            uris[name] = server.create_database(database)
            self._stack.callback(server.drop_database, database)
        self.tables = create_tables(uris["source"])
        self.load = Workload(uris["source"], rows_per_s=self._rows_per_s)
        self.load.fill(ROWS_AT_START)
        self._stack.callback(self.cluster.close)
        self.cluster.start()
        self.prometheus = self._stack.enter_context(Prometheus(self._folder, targets=self._targets()))
        self._stack.callback(self.load.stop)
        self.load.start()
        self.prometheus.wait_scraped()
        self.mark("changefeed created")
        create = ["changefeed", "create", "--id", CHANGEFEED, "--source", uris["source"], "--sink", uris["sink"]]
        self.cluster.owner_json(*create, "--tables", "public.*")
        self.wait_replicating()
        self.wait_seen(f'tablewire_owner_spans{{state="replicating"}} == {len(self.tables)}')

    def close(self) -> None:
        self._stack.close()

    # -- what happens -------------------------------------------------------------------------------------------------

    def mark(self, what: str) -> None:
        self.marks.append((time.time(), what))

    def move_a_table(self) -> str:
        """From the processor with most tables to the one with fewest; its name."""
        busiest, idlest = self.by_tables()[-1], self.by_tables()[0]
        captures = self.cluster.captures()
        table = next(row["table"] for row in self.cluster.admin.tables() if row["primary"] == captures[busiest])
        self.mark("planned move")
        self.cluster.owner_json("table", "move", table, "--to", captures[idlest], "--wait")
        self.wait_replicating()
        return str(table)

    def rebalance(self) -> None:
        """Evens the tables out."""
        self.mark("rebalance")
        self.cluster.owner_json("rebalance", "--wait")
        self.wait_replicating()

    def kill_the_leader(self) -> str:
        """SIGKILL; its name, when the other owner has scheduled everything."""
        leader = self.cluster.wait_for_leader()
        self.mark("leader killed")
        self.cluster.kill(leader)
        return self._succeeded(leader)

    def resign(self) -> str:
        """The leader makes way; its name, when the other owner has scheduled everything."""
        leader = self.cluster.wait_for_leader()
        self.mark("leader resigns")
        self.cluster.owner_json("resign")
        return self._succeeded(leader)

    def kill_a_processor(self) -> str:
        """SIGKILL of the one with most tables; its name, when they replicate elsewhere."""
        victim = self.by_tables()[-1]
        capture = self.cluster.captures()[victim]
        self.mark("processor killed")
        self.cluster.kill(victim)
        self.cluster.wait(f"{victim} is gone", lambda: capture not in {row["id"] for row in self.cluster.admin.captures()})
        self.wait_replicating()
        return victim

    # -- what is ------------------------------------------------------------------------------------------------------

    def by_tables(self) -> list[str]:
        """The processors that live, by how many tables they replicate, the fewest first."""
        held = [row["primary"] for row in self.cluster.admin.tables()]
        captures = self.cluster.captures()
        return sorted(captures, key=lambda node: (held.count(captures[node]), node))

    def wait_replicating(self) -> None:
        self.cluster.wait_replicating(CHANGEFEED, tables=len(self.tables))

    def wait_seen(self, expr: str, holds: Callable[[list[dict[str, Any]]], object] = bool) -> None:
        """Until Prometheus' answer to an expression holds (has a series). TimeoutError that names it."""
        wait_until(f"Prometheus answers {expr}", lambda: bool(holds(self.prometheus.query(expr))), TIMEOUT_S)

    def _succeeded(self, former: str) -> str:
        """When another owner has scheduled everything, and Prometheus has seen it lead: the former one's name."""
        leader = self.cluster.node(self.cluster.wait_for_leader(other_than=former))
        self.wait_replicating()
        self.wait_seen(f'tablewire_owner_failovers_total{{instance="{leader.http_address}"}}')
        return former

    def _targets(self) -> dict[str, list[str]]:
        nodes = self.cluster.nodes.values()
        found = {
            f"tablewire-{kind}": [node.http_address for node in nodes if node.kind == kind] for kind in ("owner", "processor")
        }
        return {**found, "etcd": self.cluster.etcd.endpoints}
