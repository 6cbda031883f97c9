"""The pictures of docs/monitoring.md: a cluster under load, what happens to it, and the dashboard's queries drawn over time.

    python -m deploy.monitoring.plots docs/images

starts PostgreSQL twice, etcd, two owners, three processors and a Prometheus on the loopback, moves a table, kills the leader and
a processor, starts the processor again, and evens the tables out. It takes about two minutes and leaves nothing behind. The
expressions are those of the dashboard; Grafana has no part in it, and each picture says so.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg

from deploy.local.admin import AdminError
from deploy.local.cluster import CliError
from deploy.local.demo import no_more_interrupts, on_interrupt
from deploy.local.postgres import PostgresServer
from deploy.local.process import StartError
from deploy.monitoring.panels import BARS, ROWS, Panel
from deploy.monitoring.scene import Scene
from deploy.monitoring.server import Prometheus, QueryError, missing_program
from deploy.monitoring.svg import Line, Plot, Span, figure

ROWS_PER_S = 400.0
WARM_UP_S = 8.0
"""So that the first copies are over, and rates know where they come from."""
QUIET_S = 15.0
STEP_S, BAR_STEP_S, RATE_INTERVAL = 1.0, 4.0, "5s"
"""Bars are a window apart, less one scrape, as in Grafana: so each increase is counted once."""

_TROUBLE = (StartError, CliError, AdminError, QueryError, TimeoutError, psycopg.Error, OSError)

NOT_GRAFANA = "this is not a picture of Grafana"

FIGURES: Mapping[str, tuple[str, Sequence[str]]] = {
    "monitoring-progress.svg": (
        "How far it is",
        (
            "Checkpoint lag", "Checkpoint lag in the source's units", "Kept at the source", "Source and checkpoint",
            "Received and not confirmed", "Rows written",
        ),
    ),
    "monitoring-spans.svg": (
        "Spans",
        (
            "Spans by state", "Stalled spans by reason", "Spans that began to replicate", "Jobs that ended",
            "Failovers and brakes", "Processors by state",
        ),
    ),
    "monitoring-processors.svg": (
        "Processors",
        (
            "Spans by processor", "Load by processor", "Source read", "Queues in use",
            "Lease margin of the processors", "Spans held, by what the processors say",
        ),
    ),
    "monitoring-owners.svg": (
        "Owners",
        ("Who leads", "Elections", "Lease margin of the leader", "Tick", "Exchange", "Failing since"),
    ),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m deploy.monitoring.plots FOLDER", file=sys.stderr)
        return 2
    if problem := missing_program():
        print(f"plots: {problem}", file=sys.stderr)
        return 1
    on_interrupt()
    try:
        drawn = run()
    except KeyboardInterrupt:
        print("plots: interrupted; everything was stopped and removed", file=sys.stderr)
        return 130
    except _TROUBLE as error:
        print(f"plots: {error}", file=sys.stderr)
        return 1
    for name, text in drawn.items():
        (Path(arguments[0]) / name).write_text(text, encoding="utf-8")
        print(f"{arguments[0]}/{name}: {len(text) / 1000:.0f} kB")
    return 0


def run() -> dict[str, str]:
    """The pictures of a run of its own, of which nothing is left behind."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tablewire-plots-")))
        servers = {name: stack.enter_context(PostgresServer(folder, name=name)) for name in ("source", "sink")}
        scene = stack.enter_context(Scene(folder, servers, rows_per_s=ROWS_PER_S))
        stack.callback(no_more_interrupts)  # the first thing when all is being stopped
        time.sleep(WARM_UP_S)
        begin = time.time()
        play(scene)
        return pictures(scene, Span(begin, time.time(), tuple(mark for mark in scene.marks if mark[0] >= begin)))


def play(scene: Scene) -> None:
    """What the pictures show, with quiet times in between."""
    time.sleep(QUIET_S)
    scene.move_a_table()
    time.sleep(QUIET_S)
    scene.kill_the_leader()
    time.sleep(QUIET_S)
    victim = scene.kill_a_processor()
    time.sleep(QUIET_S)
    scene.mark("processor started again")
    scene.cluster.start_node(victim)
    scene.rebalance()
    time.sleep(QUIET_S)


def pictures(scene: Scene, span: Span) -> dict[str, str]:
    """Every figure by its file's name."""
    version = scene.prometheus.api("status/buildinfo")["version"].split("+")[0]
    names = {node.http_address: name for name, node in scene.cluster.nodes.items()}
    names |= dict(zip(scene.cluster.etcd.endpoints, scene.cluster.etcd_names, strict=True))
    caption = (
        f"The dashboard's own queries, drawn by deploy/monitoring/plots.py from Prometheus {version}; {NOT_GRAFANA}."
        f" Scraped every second, rates over {RATE_INTERVAL}; addresses are replaced by the names of the nodes.",
        f"A cluster on one machine: {len(scene.cluster.owners)} owners, {len(scene.cluster.processors)} processors, PostgreSQL to"
        f" PostgreSQL, {len(scene.tables)} tables, {ROWS_PER_S:g} rows/s, leases of 3 s.",
    )
    panels = {panel.title: panel for row in ROWS for panel in row.panels}
    return {
        file: figure(title, caption, [plot(panels[name], scene.prometheus, span, names) for name in chosen], span)
        for file, (title, chosen) in FIGURES.items()
    }


def plot(panel: Panel, prometheus: Prometheus, span: Span, names: Mapping[str, str]) -> Plot:
    """A panel's queries over the time that is shown. names: of nodes by address."""
    step_s = BAR_STEP_S if panel.kind == BARS else STEP_S
    lines = []
    for query in panel.queries:
        expr = re.sub(r"\$(changefeed|processor)\b", ".*", query.expr).replace("$__rate_interval", RATE_INTERVAL)
        for series in prometheus.query_range(expr, span.begin, span.end, step_s):
            labels = {key: names.get(value, value) for key, value in series["metric"].items()}
            points = [(float(when), float(value)) for when, value in series["values"] if value != "NaN"]
            lines.append(Line(legend(query.legend, labels), points))
    lines.sort(key=lambda line: line.name)
    return Plot(panel.title, panel.kind, panel.unit, lines, step_s, panel.red_below if panel.red_from is None else panel.red_from)


def legend(pattern: str, labels: Mapping[str, str]) -> str:
    """Grafana's `{{label}}` filled in."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), pattern)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
