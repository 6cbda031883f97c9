"""What `make demo` and `make cluster` share: a run that cleans up after itself, and the cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deploy.local.cluster import Cluster
from deploy.local.node import ROOT
from deploy.local.postgres import PostgresServer
from deploy.local.process import Scoped, adopt_orphans, end_descendants
from deploy.local.runfolder import RunFolder
from deploy.local.workload import Workload, create_tables

CHANGEFEED = "demo"
LEASE_TTL_MS = 3_000
ROWS_AT_START = 100
"""Rows in each table before the changefeed is created."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def on_interrupt() -> None:
    """Treat SIGTERM and SIGHUP like Ctrl-C, and SIGINT also in the background, where shells ignore it."""
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def no_more_interrupts() -> None:
    """Ignore these signals, because a second Ctrl-C must not interrupt the cleanup."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def session(*, keep: bool) -> Iterator[tuple[RunFolder, ExitStack]]:
    """Run a program with a folder below .demo, and a stack for what has to be closed at its end.

    At the end interrupts are ignored, the stack is closed, all remaining processes are killed, and
    the folder is removed unless `keep`. The block ends with KeyboardInterrupt on SIGINT, SIGTERM
    and SIGHUP.
    """
    on_interrupt()
    with ExitStack() as stack:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # an interrupt here would leave a folder that nothing removes
        run = stack.enter_context(RunFolder(ROOT / ".demo", keep=keep))
        adopt_orphans()
        stack.callback(end_descendants)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            yield run, stack
        finally:
            no_more_interrupts()


class Shop(Scoped):
    """A cluster between two PostgreSQL servers: a source with twelve tables, and an empty sink."""

    def __init__(
        self, folder: Path, *, rows_per_s: float, seed: int = 1, say: Callable[[str], None] = lambda _text: None, **nodes: int
    ) -> None:
        """Describe the cluster. say: receives progress. nodes: numbers of `etcd`, `owners`, `processors`."""
        self._say = say
        self._rows_per_s = rows_per_s
        self._seed = seed
        self._stack = ExitStack()
        self.servers = {name: PostgresServer(folder, name=name) for name in ("source", "sink")}
        counts: dict[str, Any] = {"etcd": 1, "owners": 2, "processors": 3, **nodes}
        self.cluster = Cluster(folder, postgres=self.servers, lease_ttl_ms=LEASE_TTL_MS, links=False, **counts)
        self.source = self.sink = ""
        self.tables: list[str] = []
        self.load: Workload

    def start(self) -> None:
        """Start the servers and the cluster, and fill the source. The load is started by the caller."""
        self._say("starting two PostgreSQL servers")
        for server in self.servers.values():
            self._stack.callback(server.close)
            server.start()
        version = self.servers["source"].execute("SHOW server_version")[0][0]
        self._say(f"two PostgreSQL {version} servers are up, source and sink")
        self._stack.callback(self.cluster.close)
        self.cluster.start()
        self._say(f"etcd, {len(self.cluster.owners)} owners and {len(self.cluster.processors)} processors are up")
        self.source, self.sink = (server.create_database("shop") for server in self.servers.values())
        self.tables = create_tables(self.source)
        self.load = Workload(self.source, rows_per_s=self._rows_per_s, seed=self._seed)
        self.load.fill(ROWS_AT_START)
        self._stack.callback(self.load.stop)

    def close(self) -> None:
        self._stack.close()

    @property
    def create_arguments(self) -> list[str]:
        """Return the arguments of the owner CLI that create the changefeed."""
        return ["changefeed", "create", "--id", CHANGEFEED, "--source", self.source, "--sink", self.sink, "--tables", "public.*"]
