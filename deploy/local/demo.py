"""`make demo`: the whole of Tablewire on this machine, with kills, and a comparison row for row at the end.

Starts etcd, two PostgreSQL servers, owners and processors as real processes, replicates twelve tables under a steady load,
moves a table, kills the leading owner and a processor with SIGKILL, stops the load, and compares source and sink by content.
Writes demo.json. Exit code 0: all of it happened and source = sink; 1: something did not, and it says what; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from deploy.local.admin import AdminError
from deploy.local.cluster import CliError, Cluster
from deploy.local.compare import Comparison, compare
from deploy.local.node import ROOT
from deploy.local.observer import Measures, Observer
from deploy.local.postgres import PostgresServer
from deploy.local.process import StartError, adopt_orphans, end_descendants, wait_until
from deploy.local.runfolder import RunFolder
from deploy.local.screen import Screen
from deploy.local.story import Acts, StoryError
from deploy.local.workload import LoadCounts, Workload, create_tables
from tablewire.postgres.sink_checkpoint import OWNER_SESSION

SECONDS_DEFAULT, SECONDS_MIN, SECONDS_MAX = 45.0, 10.0, 3_600.0
RATE_DEFAULT = 400.0
LOAD_SHARE_MIN = 0.5
"""Of the announced rate; below it the load counts as not having happened."""
ROWS_AT_START = 100
MOVE_AT, LEADER_AT, PROCESSOR_AT = 0.15, 0.35, 0.65
"""When the acts begin, in parts of --seconds."""
SETTLE_S = 2.0
REPLICATING_TIMEOUT_S = 60.0
CATCH_UP_TIMEOUT_S = 90.0
SINK_IDLE_TIMEOUT_S = 15.0
STALLS_SHOWN = 3
CHANGEFEED = "demo"
LEASE_TTL_MS = 3_000
COUNTED_AS = "by the sink's PostgreSQL: a changed key is a delete and an insert, several changes of a row in one batch are one"
METHOD = "by content: every column's text, ordered by key, both sides streamed and merged; never by counts"

_TROUBLE = (StartError, StoryError, CliError, AdminError, TimeoutError, psycopg.Error, OSError)


@dataclass(slots=True)
class Report:
    """Everything that ends up in the summary and in demo.json."""

    seconds: float = 0.0
    load: LoadCounts | None = None
    replicated: dict[str, int] = field(default_factory=dict)
    acts: dict[str, Any] = field(default_factory=lambda: {"moves": [], "kills": []})
    measures: Measures = field(default_factory=Measures)
    events: int = 0
    comparison: Comparison | None = None
    postgres: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def main() -> int:
    options = parse(sys.argv[1:])
    on_interrupt()
    report = Report()
    try:
        with ExitStack() as stack:
            stack.callback(no_more_interrupts)  # runs last; the first cleanup below runs it too
            run = stack.enter_context(RunFolder(ROOT / ".demo", keep=options.keep))
            adopt_orphans()
            stack.callback(end_descendants)
            with Screen(plain=options.plain) as screen:
                perform(options, run, screen, report)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything was stopped and removed", file=sys.stderr)
        return 130
    write_json(options.json, report)
    print("\n".join(summary(report)), flush=True)
    if report.problems and run.kept:
        print(f"logs of the failure: {run.kept}", file=sys.stderr)
    return 1 if report.problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seconds", type=float, default=SECONDS_DEFAULT, help=f"how long the load runs, from {SECONDS_MIN:g}")
    parser.add_argument("--rate", type=float, default=RATE_DEFAULT, help="rows changed a second")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live view; by itself without a terminal")
    parser.add_argument("--seed", type=int, default=1, help="of the load")
    parser.add_argument("--json", type=Path, default=Path("demo.json"), help="where the figures are written")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the run, with data and logs, below .demo")
    options = parser.parse_args(arguments)
    if not SECONDS_MIN <= options.seconds <= SECONDS_MAX:
        parser.error(f"--seconds must be between {SECONDS_MIN:g} and {SECONDS_MAX:g}")
    if not 1 <= options.rate <= 20_000:
        parser.error("--rate must be between 1 and 20000")
    options.plain = options.plain or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb"
    return options


def perform(options: argparse.Namespace, run: RunFolder, screen: Screen, report: Report) -> None:
    """The demo; what goes wrong ends up in report.problems, and its logs stay in the run's folder."""
    with ExitStack() as stack:
        servers: dict[str, PostgresServer] = {}
        cluster = None
        try:
            for name in ("source", "sink"):
                servers[name] = PostgresServer(run.path, name=name)
                stack.callback(servers[name].close)
                servers[name].start()
            report.postgres = _describe(servers["source"])
            screen.say(f"PostgreSQL {report.postgres['version']} is up twice, as source and as sink")
            cluster = Cluster(run.path, etcd=1, postgres=servers, lease_ttl_ms=LEASE_TTL_MS, links=False)
            stack.callback(cluster.close)
            cluster.start()
            screen.say(f"etcd, {len(cluster.owners)} owners and {len(cluster.processors)} processors are up")
            _play(options, cluster, servers, screen, report, stack)
        except _TROUBLE as error:
            report.problems.append(str(error))
        finally:
            no_more_interrupts()
        if report.problems and cluster is not None:
            cluster.collect(run.path / "logs")
            run.keep_only("logs")


def _play(
    options: argparse.Namespace,
    cluster: Cluster,
    servers: dict[str, PostgresServer],
    screen: Screen,
    report: Report,
    stack: ExitStack,
) -> None:
    source = servers["source"].create_database("shop")
    sink = servers["sink"].create_database("shop")
    tables = create_tables(source)
    load = Workload(source, rows_per_s=options.rate, seed=options.seed)
    load.fill(ROWS_AT_START)
    names = {cluster.node(name).advertised: name for name in cluster.owners}
    observer = Observer([cluster.node(name).address for name in cluster.owners], source, names, screen.say)
    stack.callback(_stop_observer, observer, report)
    observer.start()
    screen.show(lambda: observer.view, lambda: _load_text(load))
    create = ["changefeed", "create", "--id", CHANGEFEED, "--source", source, "--sink", sink, "--tables", "public.*"]
    screen.say("owner " + " ".join(create))
    cluster.owner_json(*create)
    stack.callback(load.stop)
    load.start()
    screen.say(f"the load runs: {options.rate:g} rows a second over {len(tables)} tables")
    begin = time.monotonic()
    cluster.wait_replicating(CHANGEFEED, tables=len(tables), timeout_s=REPLICATING_TIMEOUT_S)
    screen.say(f"all {len(tables)} tables are replicating")
    observer.measure(True)
    acts = Acts(cluster, observer, screen.say, len(tables))
    report.acts = acts.story.as_json()
    for at, act in ((MOVE_AT, acts.move_a_table), (LEADER_AT, acts.kill_the_leader), (PROCESSOR_AT, acts.kill_a_processor)):
        _until(begin + at * options.seconds)
        act()
        report.acts = acts.story.as_json()
    _until(max(begin + options.seconds, time.monotonic() + SETTLE_S))
    report.load = load.stop()
    report.seconds = time.monotonic() - begin
    screen.say(f"the load has stopped after {report.load.total} rows in {report.load.transactions} transactions")
    _finish(cluster, servers, observer, screen, report, (source, sink), tables)
    check(options, report)


def _finish(
    cluster: Cluster,
    servers: dict[str, PostgresServer],
    observer: Observer,
    screen: Screen,
    report: Report,
    uris: tuple[str, str],
    tables: list[str],
) -> None:
    """Wait until the sink has all, stop what writes, and compare."""
    source, sink = uris
    end_ts = _position(source)
    try:
        cluster.wait_checkpoint(end_ts, CHANGEFEED, CATCH_UP_TIMEOUT_S)
    except TimeoutError as error:
        report.problems.append(str(error))  # the comparison says what is missing
    observer.measure(False)
    _stop_observer(observer, report)
    for name in cluster.processors:
        if cluster.node(name).process.exit_code not in (None, -signal.SIGKILL):
            report.problems.append(f"{name} ended by itself with exit code {cluster.node(name).process.exit_code}")
        cluster.kill(name)
    screen.say("comparing source and sink row for row")
    report.comparison = compare(source, sink, tables)
    report.replicated = _changed_rows(servers["sink"], "shop")


def _stop_observer(observer: Observer, report: Report) -> None:
    """Idempotent; what it has seen goes into the report, and why nothing moves if that is what went wrong."""
    observer.stop()
    report.measures, report.events = observer.measures, observer.events
    stalls = sorted(
        {f"{row['table']}: {row['error'] or row['stall_reason']}" for row in observer.view.tables if row["stall_reason"]}
    )
    for problem in (observer.error, *(stalls[:STALLS_SHOWN] if report.problems else ())):
        if problem and problem not in report.problems:
            report.problems.append(problem)


def check(options: argparse.Namespace, report: Report) -> None:
    """What was announced must have happened; what did not is a problem."""
    problems = report.problems
    if report.load is None or any(report.load.by_kind[kind] == 0 for kind in report.load.by_kind):
        problems.append("the load did not insert, update and delete")
    elif report.load.total < LOAD_SHARE_MIN * options.rate * report.seconds:
        problems.append(f"the load changed {report.load.total} rows, less than half of what was announced")
    elif report.load.errors:
        problems.append(f"the load's transactions failed {report.load.errors} times")
    if not report.acts["moves"]:
        problems.append("no table was moved")
    for role in ("leading owner", "processor"):
        if not any(kill["role"] == role for kill in report.acts["kills"]):
            problems.append(f"no {role} was killed")
    if report.measures.went_back:
        problems.append(f"the checkpoint went back {report.measures.went_back} times")
    if report.comparison is None:
        problems.append("source and sink were not compared")
    elif not report.comparison.equal:
        problems.append(f"source and sink differ: {report.comparison}")
    elif report.comparison.rows == 0:
        problems.append("there was no row to compare")


def summary(report: Report) -> list[str]:
    kinds = _kinds(report.load.by_kind) if report.load is not None else "none"
    lines = ["", "Summary"]
    lines.append(f"  events seen           {report.events}")
    lines.append(f"  rows written          {kinds}")
    lines.append(f"  rows replicated       {_kinds(report.replicated)} (as the sink's PostgreSQL counts them)")
    for move in report.acts["moves"]:
        lines.append(f"  planned move          {move['table']}: {move['origin']} -> {move['target']}, {move['seconds']:.2f} s")
    for kill in report.acts["kills"]:
        taken = f"{', '.join(kill['by'])} took over in {kill['seconds']:.2f} s"
        lines.append(f"  killed (SIGKILL)      {kill['role']} {kill['node']}: {taken}")
    measures = report.measures
    lines.append(f"  longest standstill    {measures.longest_standstill_s:.2f} s (of the global checkpoint, kills included)")
    lag = f"median {measures.lag_s_median:.2f} s, longest {measures.lag_s_max:.2f} s, {measures.lag_bytes_max:,} bytes of WAL"
    lines.append(f"  watermark lag         {lag}")
    if report.comparison is not None:
        lines.append(f"  compared              {report.comparison.rows} rows in {report.comparison.tables} tables, by content")
    lines.append(f"  source = sink: {'yes' if report.comparison is not None and report.comparison.equal else 'NO'}")
    lines += [f"  problem: {problem}" for problem in report.problems]
    return lines


def write_json(path: Path, report: Report) -> None:
    """At once or not at all, since two demos may write the same file."""
    load, comparison, measures = report.load, report.comparison, report.measures
    document = {
        "ok": not report.problems,
        "problems": report.problems,
        "seconds": round(report.seconds, 3),
        "rows_written": {**load.by_kind, "total": load.total, "transactions": load.transactions} if load else None,
        "rows_written_by_table": load.by_table if load else None,
        "rows_replicated": report.replicated,
        "rows_replicated_as": COUNTED_AS,
        **report.acts,
        "events": report.events,
        "longest_standstill_s": round(measures.longest_standstill_s, 3),
        "watermark_lag": {
            "median_s": round(measures.lag_s_median, 3),
            "longest_s": round(measures.lag_s_max, 3),
            "longest_bytes": measures.lag_bytes_max,
            "readings": measures.readings,
        },
        "checkpoint_went_back": measures.went_back,
        "source_equals_sink": comparison is not None and comparison.equal,
        "comparison": {
            "how": METHOD,
            "tables": comparison.tables,
            "rows": comparison.rows,
            "different": comparison.different,
            "examples": [str(example) for example in comparison.examples],
        }
        if comparison is not None
        else None,
        "postgres": report.postgres,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _describe(server: PostgresServer) -> dict[str, str]:
    names = ("server_version", "fsync", "synchronous_commit", "wal_level")
    values = [str(server.execute(f"SHOW {name}")[0][0]) for name in names]
    return dict(zip(("version", *names[1:]), values, strict=True))


def _position(uri: str) -> int:
    """Where the source's WAL ends now."""
    with psycopg.connect(uri, autocommit=True) as connection:
        row = connection.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint").fetchone()
        return int(row[0]) if row is not None else 0


def _changed_rows(server: PostgresServer, dbname: str) -> dict[str, int]:
    """Rows that PostgreSQL itself has counted in the sink's tables; sessions report when they end, so wait for that of all that
    wrote them. The owner's stays, and writes none."""
    others = (
        f"SELECT 1 FROM pg_stat_activity WHERE datname = '{dbname}' AND pid <> pg_backend_pid()"
        f" AND backend_type = 'client backend' AND application_name <> '{OWNER_SESSION}'"
    )
    wait_until("the sink's sessions have ended", lambda: not server.execute(others, dbname), SINK_IDLE_TIMEOUT_S)
    sums = "coalesce(sum(n_tup_ins), 0)::bigint, coalesce(sum(n_tup_upd), 0)::bigint, coalesce(sum(n_tup_del), 0)::bigint"
    row = server.execute(f"SELECT {sums} FROM pg_stat_user_tables WHERE schemaname = 'public'", dbname)[0]
    return dict(zip(("insert", "update", "delete"), (int(str(value)) for value in row), strict=True))


def _load_text(load: Workload) -> str:
    counts = load.counts
    return f"{counts.total:,} rows in {counts.transactions:,} transactions ({_kinds(counts.by_kind)})"


def _kinds(by_kind: Any) -> str:
    return ", ".join(f"{count:,} {kind}s" for kind, count in by_kind.items()) or "none"


def _until(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def on_interrupt() -> None:
    """SIGTERM and SIGHUP (a closed terminal) do what Ctrl-C does; so does SIGINT in the background, where a shell ignores it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def no_more_interrupts() -> None:
    """From here on everything is being stopped, which takes a second or two: a second Ctrl-C must not leave half of it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
