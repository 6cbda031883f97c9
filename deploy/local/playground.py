"""`make cluster`: the cluster of the demo, left running until Ctrl-C.

etcd, owners and processors, a source with twelve tables under a light load, an empty sink, and a changefeed between them.
Prints the commands to try. Everything is stopped and removed at the end; `--keep` keeps the folder with data and logs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import threading

import psycopg

from deploy.local.cluster import CliError
from deploy.local.process import StartError
from deploy.local.session import CHANGEFEED, Shop, session

RATE_DEFAULT = 50.0
NODES_MAX = 20


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        with session(keep=options.keep) as (run, stack):
            try:
                shop = Shop(
                    run.path,
                    etcd=options.etcd,
                    owners=options.owners,
                    processors=options.processors,
                    rows_per_s=options.rate,
                    say=lambda text: print(text, flush=True),
                )
                stack.callback(shop.close)
                start(options, shop)
                threading.Event().wait()
            except (StartError, CliError, TimeoutError, psycopg.Error, OSError) as error:
                print(f"cluster: {error}", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        print("\ncluster: everything was stopped and removed", file=sys.stderr)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make cluster ARGS=...", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--etcd", type=int, default=1, help="number of etcd members")
    parser.add_argument("--owners", type=int, default=2)
    parser.add_argument("--processors", type=int, default=3)
    parser.add_argument("--rate", type=float, default=RATE_DEFAULT, help="rows changed per second; 0: no load")
    parser.add_argument("--no-changefeed", action="store_true", help="leave `owner changefeed create` to you")
    parser.add_argument("--keep", action="store_true", help="keep the folder, with data and logs, below .demo")
    options = parser.parse_args(arguments)
    for name in ("etcd", "owners", "processors"):
        if not 1 <= getattr(options, name) <= NODES_MAX:
            parser.error(f"--{name} must be between 1 and {NODES_MAX}")
    if not 0 <= options.rate <= 20_000:
        parser.error("--rate must be between 0 and 20000")
    return options


def start(options: argparse.Namespace, shop: Shop) -> None:
    shop.start()
    shop.start_load()
    if not options.no_changefeed:
        shop.cluster.owner_json(*shop.create_arguments)
        shop.cluster.wait_replicating(CHANGEFEED, tables=len(shop.tables))
    explain(shop, created=not options.no_changefeed)


def explain(shop: Shop, *, created: bool) -> None:
    """Print commands to paste into another terminal, and where everything is."""
    cluster = shop.cluster
    target = "PROCESSOR"
    if created:
        tables = {row["table"]: row["primary"] for row in cluster.admin.tables(CHANGEFEED)}
        target = next((capture for capture in cluster.captures().values() if capture != tables["public.accounts"]), target)
    lines = [
        "",
        "The cluster is up; Ctrl-C stops and removes it. In another terminal, in this folder:",
        "",
        "  . .venv/bin/activate",
        f"  export TABLEWIRE_ENDPOINTS={','.join(cluster.admin_endpoints)}",
        *([] if created else [f"  owner {shlex.join(shop.create_arguments)}"]),
        "  owner status",
        "  owner capture list",
        "  owner changefeed query",
        "  owner table list",
        f"  owner table move public.accounts --to {target} --wait",
        "",
        f"  source  {shop.source}",
        f"  sink    {shop.sink}",
        f"  etcd    {','.join(cluster.etcd_endpoints)}",
        "",
        *(f"  {name:<12}pid {node.process.pid:<8}log {node.log}" for name, node in cluster.nodes.items()),
        "",
    ]
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
