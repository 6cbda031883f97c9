"""The multi-node harness: clusters of real processes under load. The logs of failed tests are kept.

`cluster(etcd=3, owners=2, processors=3)` starts one, with any option of `deploy.local.cluster.Cluster`.
After a failure the logs of all nodes and the content of etcd are in `.runs/<test>-<pid>`, which the
report names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from deploy.local.cluster import Cluster
from deploy.local.compare import compare
from deploy.local.node import ROOT
from deploy.local.postgres import PostgresServer
from deploy.local.process import wait_until
from deploy.local.shapes import SHAPES, Shape
from deploy.local.workload import LoadCounts, Workload, create_tables, end_of_wal

LOAD_TIMEOUT_S = 60.0
CATCH_UP_TIMEOUT_S = 120.0

StartCluster = Callable[..., Cluster]
_CLUSTERS = pytest.StashKey[list[Cluster]]()

LEDGER = Shape(
    "ledger",
    "n bigint, text text",
    ("n",),
    lambda rng, number: {"n": number, "text": str(rng.random())},
    lambda rng, _number: {"text": str(rng.random())},
    ("ALTER TABLE {} REPLICA IDENTITY FULL",),
)
"""Without a key at the sink too: the comparison finds a row that was written twice."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Collect the logs of a failed test's clusters while they still run."""
    report = yield
    if report.failed and report.when in ("setup", "call"):
        name = re.sub(r"[^\w.-]+", "_", item.name)
        folder = ROOT / ".runs" / f"{name}-{os.getpid()}"
        for number, cluster in enumerate(item.stash.get(_CLUSTERS, [])):
            cluster.collect(folder / str(number))
            report.sections.append(("cluster", f"logs and etcd dump: {folder / str(number)}"))
    return report


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path, postgres_server: PostgresServer) -> Iterator[StartCluster]:
    """Return a function that starts a cluster; its servers are the session's PostgreSQL unless `postgres=` is given."""
    clusters = request.node.stash.setdefault(_CLUSTERS, [])

    def start(**options: object) -> Cluster:
        options.setdefault("postgres", {"source": postgres_server, "sink": postgres_server})
        made = Cluster(tmp_path / f"cluster{len(clusters)}", **options)  # type: ignore[arg-type]
        clusters.append(made)
        made.start()
        return made

    yield start
    for made in clusters:
        made.close()


@dataclass
class Replication:
    """A changefeed over the workload's tables in a running cluster, under load."""

    cluster: Cluster
    source: str
    sink: str
    tables: list[str]
    load: Workload
    changefeed: str = "load"
    checkpoints: list[int] = field(default_factory=list)

    def more_rows(self, count: int) -> None:
        """Return when the load has changed that number of further rows."""
        before = self.load.counts.total
        wait_until(f"{count} more rows are changed", lambda: self.load.counts.total >= before + count, LOAD_TIMEOUT_S)

    def primaries(self) -> dict[str, str]:
        """Return table -> the capture that replicates it."""
        return {row["table"]: row["primary"] for row in self.cluster.admin.tables(self.changefeed) if row["primary"]}

    def busiest(self) -> str:
        """Return the processor node that replicates most tables."""
        held = list(self.primaries().values())
        captures = self.cluster.captures()
        return max(captures, key=lambda node: (held.count(captures[node]), node))

    def wait_replicating(self) -> None:
        self.cluster.wait_replicating(self.changefeed, tables=len(self.tables))

    def wait_replicating_without(self, capture: str) -> None:
        """Wait until all tables are replicated, none of them by this capture."""
        self.cluster.wait(
            f"all tables are replicated by others than {capture}",
            lambda: len(held := self.primaries()) >= len(self.tables) and capture not in held.values(),
        )
        self.wait_replicating()

    def finish(self) -> LoadCounts:
        """Stop the load, wait until the checkpoint has passed its end, and compare row by row."""
        counts = self.load.stop()
        assert counts.errors == 0, self.load.error
        with psycopg.connect(self.source, autocommit=True) as connection:
            end_ts = end_of_wal(connection)
        self.cluster.wait_checkpoint(end_ts, self.changefeed, CATCH_UP_TIMEOUT_S)
        result = compare(self.source, self.sink, self.tables)
        assert result.equal, str(result)
        assert result.rows > 0
        return counts


@pytest.fixture
def replication(cluster: StartCluster, source_db: str, sink_db: str) -> Iterator[Callable[..., Replication]]:
    """Return a function that starts a cluster with a changefeed over 13 tables that replicate under load."""
    running: list[Workload] = []

    def start(*, rows_per_s: float = 500.0, **options: object) -> Replication:
        made = cluster(**options)
        shapes = [*SHAPES, LEDGER]
        tables = create_tables(source_db, shapes=shapes)
        load = Workload(source_db, rows_per_s=rows_per_s, shapes=shapes)
        load.fill(50)
        running.append(load)
        load.start()
        uris = [made.uri(server, uri.rpartition("/")[2]) for server, uri in (("source", source_db), ("sink", sink_db))]
        made.owner_json("changefeed", "create", "--id", "load", "--source", uris[0], "--sink", uris[1], "--tables", "public.*")
        world = Replication(made, source_db, sink_db, tables, load)
        world.wait_replicating()
        world.more_rows(100)
        return world

    yield start
    for load in running:
        load.stop()
