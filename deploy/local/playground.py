"""`make cluster`: the demo's cluster, left up to play with until Ctrl-C.

etcd, owners and processors, a source with twelve tables under a gentle load, an empty sink, and one changefeed between them.
It prints how to talk to it. Everything is stopped and removed at the end; `--keep` keeps the folder with data and logs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
from contextlib import ExitStack

import psycopg

from deploy.local.cluster import CliError, Cluster
from deploy.local.demo import CHANGEFEED, LEASE_TTL_MS, ROWS_AT_START, no_more_interrupts, on_interrupt
from deploy.local.node import ROOT
from deploy.local.postgres import PostgresServer
from deploy.local.process import StartError, adopt_orphans, end_descendants
from deploy.local.runfolder import RunFolder
from deploy.local.workload import Workload, create_tables

RATE_DEFAULT = 50.0
NODES_MAX = 20


def main() -> int:
    options = parse(sys.argv[1:])
    on_interrupt()
    try:
        with ExitStack() as stack:
            run = stack.enter_context(RunFolder(ROOT / ".demo", keep=options.keep))
            adopt_orphans()
            stack.callback(end_descendants)
            try:
                start(options, run, stack)
                threading.Event().wait()
            except (StartError, CliError, TimeoutError, psycopg.Error, OSError) as error:
                print(f"cluster: {error}", file=sys.stderr)
                return 1
            finally:
                no_more_interrupts()
    except KeyboardInterrupt:
        print("\ncluster: everything was stopped and removed", file=sys.stderr)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make cluster ARGS=...", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--etcd", type=int, default=1, help="etcd members")
    parser.add_argument("--owners", type=int, default=2)
    parser.add_argument("--processors", type=int, default=3)
    parser.add_argument("--rate", type=float, default=RATE_DEFAULT, help="rows changed a second; 0: no load")
    parser.add_argument("--no-changefeed", action="store_true", help="leave `owner changefeed create` to you")
    parser.add_argument("--keep", action="store_true", help="keep the folder, with data and logs, below .demo")
    options = parser.parse_args(arguments)
    for name in ("etcd", "owners", "processors"):
        if not 1 <= getattr(options, name) <= NODES_MAX:
            parser.error(f"--{name} must be between 1 and {NODES_MAX}")
    if not 0 <= options.rate <= 20_000:
        parser.error("--rate must be between 0 and 20000")
    return options


def start(options: argparse.Namespace, run: RunFolder, stack: ExitStack) -> None:
    servers = {}
    for name in ("source", "sink"):
        servers[name] = PostgresServer(run.path, name=name)
        stack.callback(servers[name].close)
        servers[name].start()
    cluster = Cluster(
        run.path,
        etcd=options.etcd,
        owners=options.owners,
        processors=options.processors,
        postgres=servers,
        lease_ttl_ms=LEASE_TTL_MS,
        links=False,
    )
    stack.callback(cluster.close)
    cluster.start()
    source, sink = (servers[name].create_database("shop") for name in ("source", "sink"))
    tables = create_tables(source)
    load = Workload(source, rows_per_s=max(1.0, options.rate))
    load.fill(ROWS_AT_START)
    if options.rate:
        stack.callback(load.stop)
        load.start()
    create = ["changefeed", "create", "--id", CHANGEFEED, "--source", source, "--sink", sink, "--tables", "public.*"]
    if not options.no_changefeed:
        cluster.owner_json(*create)
        cluster.wait_replicating(CHANGEFEED, tables=len(tables))
    explain(cluster, source, sink, create if options.no_changefeed else None)


def explain(cluster: Cluster, source: str, sink: str, create: list[str] | None) -> None:
    """How to talk to it, to be pasted into another terminal."""
    etcd = ",".join(cluster.etcd_endpoints)
    lines = [
        "",
        "The cluster is up; Ctrl-C stops and removes it. In another terminal, in this folder:",
        "",
        "  . .venv/bin/activate",
        f"  export TABLEWIRE_ENDPOINTS={','.join(cluster.admin_endpoints)}",
        *([f"  owner {shlex.join(create)}"] if create else []),
        "  owner status",
        "  owner capture list",
        "  owner changefeed query",
        "  owner table list",
        "  owner table move public.accounts --to CAPTURE --wait",
        "",
        f"  source  {source}",
        f"  sink    {sink}",
        f"  etcd    {etcd}",
        "",
        *(f"  {name:<12}pid {node.process.pid:<8}log {node.log}" for name, node in cluster.nodes.items()),
        "",
    ]
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
