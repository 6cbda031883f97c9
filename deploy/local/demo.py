"""`make demo`: Tablewire on this machine, with a planned move, two kills, and a comparison at the
end.

Starts etcd, two PostgreSQL servers, owners and processors as real processes, replicates twelve
tables under a steady load, moves a table, kills the leading owner and a processor with SIGKILL,
stops the load, and compares source and sink row by row. Writes demo.json. Exit code 0: everything
happened as announced and source = sink; 1: something did not, and the output says what; 130:
Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import click
import psycopg

from deploy.local.admin import AdminError
from deploy.local.cluster import CliError
from deploy.local.compare import compare
from deploy.local.observer import Observer
from deploy.local.postgres import PostgresServer
from deploy.local.process import StartError, wait_until
from deploy.local.report import Report, check, rows_text, summary, write_json
from deploy.local.runfolder import RunFolder
from deploy.local.screen import Screen
from deploy.local.session import CHANGEFEED, Shop, no_more_interrupts, on_interrupt, session
from deploy.local.story import Acts, StoryError
from deploy.local.workload import end_of_wal
from tablewire.postgres.sink_checkpoint import OWNER_SESSION

__all__ = ["Report", "check", "main", "no_more_interrupts", "on_interrupt", "perform", "summary", "write_json"]

MOVE_AT, LEADER_AT, PROCESSOR_AT = 0.15, 0.35, 0.65
"""When the acts begin, as fractions of --seconds."""
SETTLE_S = 2.0
REPLICATING_TIMEOUT_S = 60.0
CATCH_UP_TIMEOUT_S = 90.0
SINK_IDLE_TIMEOUT_S = 15.0
STALLS_SHOWN = 3

_TROUBLE = (StartError, StoryError, CliError, AdminError, TimeoutError, psycopg.Error, OSError)


@click.command(help=(__doc__ or "").split("\n\n")[1])
@click.option("--seconds", type=click.FloatRange(10, 3_600), default=45, show_default=True, help="Duration of the load.")
@click.option("--rate", type=click.FloatRange(1, 20_000), default=400, show_default=True, help="Rows changed per second.")
@click.option("--plain", is_flag=True, help="Print lines instead of a live view; the default without a terminal.")
@click.option("--seed", type=int, default=1, help="Seed of the load.")
@click.option("--json", "figures", type=click.Path(path_type=Path), default="demo.json", help="File for the figures.")
@click.option("--keep", is_flag=True, help="Keep the folder of the run, with data and logs, below .demo.")
def main(seconds: float, rate: float, plain: bool, seed: int, figures: Path, keep: bool) -> None:
    plain = plain or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb"
    report = Report()
    try:
        with session(keep=keep) as (run, stack), Screen(plain=plain) as screen:
            perform(run, stack, screen, report, seconds=seconds, rate=rate, seed=seed)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything was stopped and removed", file=sys.stderr)
        sys.exit(130)
    write_json(figures, report)
    print("\n".join(summary(report)), flush=True)
    if report.problems and run.kept:
        print(f"logs of the failure: {run.kept}", file=sys.stderr)
    sys.exit(1 if report.problems else 0)


def perform(
    run: RunFolder, stack: ExitStack, screen: Screen, report: Report, *, seconds: float, rate: float, seed: int = 1
) -> None:
    """Run the demo. Problems go to the report, and their logs stay in the folder of the run."""
    shop = Shop(run.path, rows_per_s=rate, seed=seed, say=screen.say)
    stack.callback(shop.close)
    try:
        shop.start()
        report.postgres = _settings(shop.servers["source"])
        _play(shop, screen, report, stack, seconds, rate)
    except _TROUBLE as error:
        report.problems.append(str(error))
    finally:
        no_more_interrupts()
    if report.problems:
        shop.cluster.collect(run.path / "logs")
        run.keep_only("logs")


def _play(shop: Shop, screen: Screen, report: Report, stack: ExitStack, seconds: float, rate: float) -> None:
    cluster, tables = shop.cluster, len(shop.tables)
    names = {cluster.node(name).advertised: name for name in cluster.owners}
    observer = Observer([cluster.node(name).address for name in cluster.owners], shop.source, names, screen.say)
    stack.callback(_stop_observer, observer, report)
    observer.start()
    screen.show(lambda: observer.view, lambda: rows_text(shop.load.counts.by_kind))
    screen.say("owner " + " ".join(shop.create_arguments))
    cluster.owner_json(*shop.create_arguments)
    shop.load.start()
    screen.say(f"the load runs: {rate:g} rows per second over {tables} tables")
    begin = time.monotonic()
    cluster.wait_replicating(CHANGEFEED, tables=tables, timeout_s=REPLICATING_TIMEOUT_S)
    screen.say(f"all {tables} tables are replicating")
    observer.measure(True)
    acts = Acts(cluster, report, screen.say, tables)
    for at, act in ((MOVE_AT, acts.move_a_table), (LEADER_AT, acts.kill_the_leader), (PROCESSOR_AT, acts.kill_a_processor)):
        _sleep_until(begin + at * seconds)
        act()
    _sleep_until(max(begin + seconds, time.monotonic() + SETTLE_S))
    report.load = shop.load.stop()
    report.seconds = time.monotonic() - begin
    screen.say(f"the load has stopped after {report.load.total:,} rows in {report.load.transactions:,} transactions")
    _finish(shop, observer, screen, report)
    check(report, rate)


def _finish(shop: Shop, observer: Observer, screen: Screen, report: Report) -> None:
    """Wait until the sink has caught up, stop the processors, and compare."""
    cluster = shop.cluster
    with psycopg.connect(shop.source, autocommit=True) as connection:
        end_ts = end_of_wal(connection)
    try:
        cluster.wait_checkpoint(end_ts, CHANGEFEED, CATCH_UP_TIMEOUT_S)
    except TimeoutError as error:
        report.problems.append(str(error))  # the comparison says what is missing
    _stop_observer(observer, report)
    for name in cluster.processors:
        exit_code = cluster.node(name).process.exit_code
        if exit_code not in (None, -signal.SIGKILL):
            report.problems.append(f"{name} ended by itself with exit code {exit_code}")
        cluster.kill(name)
    screen.say("comparing source and sink row by row")
    report.comparison = compare(shop.source, shop.sink, shop.tables)
    report.replicated = _changed_rows(shop.servers["sink"])


def _stop_observer(observer: Observer, report: Report) -> None:
    """Stop the observer and report its results; after a problem, also why tables stall. Idempotent."""
    observer.stop()
    report.measures, report.events = observer.measures, observer.events
    stalls = {f"{row['table']}: {row['error'] or row['stall_reason']}" for row in observer.view.tables if row["stall_reason"]}
    for problem in (observer.error, *(sorted(stalls)[:STALLS_SHOWN] if report.problems else ())):
        if problem and problem not in report.problems:
            report.problems.append(problem)


def _settings(server: PostgresServer) -> dict[str, str]:
    names = {"version": "server_version", **{name: name for name in ("fsync", "synchronous_commit", "wal_level")}}
    return {key: str(server.execute(f"SHOW {name}")[0][0]) for key, name in names.items()}


def _changed_rows(server: PostgresServer) -> dict[str, int]:
    """Return how many rows of each kind the sink's PostgreSQL has counted.

    A session reports its counts when it ends, so wait for the end of all but the owner's, which
    writes no rows.
    """
    others = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        f" AND backend_type = 'client backend' AND application_name <> '{OWNER_SESSION}'"
    )
    wait_until("the sink's sessions have ended", lambda: not server.execute(others, "shop"), SINK_IDLE_TIMEOUT_S)
    sums = ", ".join(f"coalesce(sum(n_tup_{kind}), 0)::bigint" for kind in ("ins", "upd", "del"))
    row = server.execute(f"SELECT {sums} FROM pg_stat_user_tables WHERE schemaname = 'public'", "shop")[0]
    return dict(zip(("insert", "update", "delete"), (int(str(value)) for value in row), strict=True))


def _sleep_until(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))


if __name__ == "__main__":
    main(prog_name="make demo ARGS=...")
