"""`make cluster`: the cluster of the demo, left running until Ctrl-C.

etcd, owners and processors, a source with twelve tables under a light load, an empty sink, and a
changefeed between them. Prints the commands to try. Everything is stopped and removed at the end.
"""

from __future__ import annotations

import shlex
import sys
import threading

import click
import psycopg

from deploy.local.cluster import CliError
from deploy.local.process import StartError
from deploy.local.session import CHANGEFEED, Shop, session

NODES = click.IntRange(1, 20)


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--etcd", type=NODES, default=1, show_default=True, help="Number of etcd members.")
@click.option("--owners", type=NODES, default=2, show_default=True)
@click.option("--processors", type=NODES, default=3, show_default=True)
@click.option("--rate", type=click.FloatRange(0, 20_000), default=50, show_default=True, help="Rows changed per second; 0: none.")
@click.option("--no-changefeed", is_flag=True, help="Leave `owner changefeed create` to you.")
@click.option("--keep", is_flag=True, help="Keep the folder, with data and logs, below .demo.")
def main(etcd: int, owners: int, processors: int, rate: float, no_changefeed: bool, keep: bool) -> None:
    try:
        with session(keep=keep) as (run, stack):
            nodes = {"etcd": etcd, "owners": owners, "processors": processors}
            shop = Shop(run.path, rows_per_s=max(1.0, rate), say=lambda text: print(text, flush=True), **nodes)
            stack.callback(shop.close)
            try:
                shop.start()
                if rate:
                    shop.load.start()
                if not no_changefeed:
                    shop.cluster.owner_json(*shop.create_arguments)
                    shop.cluster.wait_replicating(CHANGEFEED, tables=len(shop.tables))
                print("\n".join(explanation(shop, created=not no_changefeed)), flush=True)
                threading.Event().wait()
            except (StartError, CliError, TimeoutError, psycopg.Error, OSError) as error:
                print(f"cluster: {error}", file=sys.stderr)
                sys.exit(1)
    except KeyboardInterrupt:
        print("\ncluster: everything was stopped and removed", file=sys.stderr)


def explanation(shop: Shop, *, created: bool) -> list[str]:
    """Return commands to paste into another terminal, and where everything is."""
    cluster, target = shop.cluster, "PROCESSOR"
    if created:
        tables = {row["table"]: row["primary"] for row in cluster.admin.tables(CHANGEFEED)}
        target = next((capture for capture in cluster.captures().values() if capture != tables["public.accounts"]), target)
    return [
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


if __name__ == "__main__":
    main(prog_name="make cluster ARGS=...")
