"""Make the figures of docs/monitoring.md: run a cluster, cause faults, and plot expressions of the dashboard over time.

    python -m docs.tools.monitoring_figures docs/images

This starts two PostgreSQL servers, etcd, two owners, three processors and a Prometheus on the loopback interface. It moves a
table, kills the leader and a processor, starts the processor again and rebalances. It takes two minutes and leaves nothing
running. The plots are made with matplotlib, a development dependency; Grafana is not involved.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.local.postgres import PostgresServer
from deploy.monitoring.monitored_cluster import MonitoredCluster
from deploy.monitoring.panels import ROWS, Panel
from deploy.monitoring.prometheus_server import Prometheus, missing_programs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

ROWS_PER_S = 400.0
WARM_UP_S = 8.0
"""Until first copies are done and rates have a full window."""
QUIET_S = 15.0
SILENT_MS = 1_000
"""`scheduler.capture_silent_ms`: below the lease, so that the stall of a killed processor's tables shows."""
STEP_S, BAR_STEP_S, RATE_INTERVAL = 1.0, 4.0, "5s"
"""As in Grafana, bars are one rate window less one scrape apart, so that each increase counts once."""
NOT_GRAFANA = "this is not a picture of Grafana"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4a9e", "#7f7f7f")
"""A palette that colour-blind readers can distinguish; more series start it again."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "tablewire", "font.family": ["DejaVu Sans"], "font.size": 7.5,
    "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 12,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": "#e3e3e3", "lines.linewidth": 1.2, "legend.frameon": False,
}  # fmt: skip

FIGURES: Mapping[str, tuple[str, Sequence[str]]] = {
    "monitoring-progress.svg": ("Progress", (
        "Checkpoint lag", "Checkpoint lag in source units", "WAL retained by the source", "Growth of source and checkpoint",
        "Received but not confirmed", "Rows written",
    )),
    "monitoring-spans.svg": ("Spans", (
        "Spans by state", "Stalled spans by reason", "Placements", "Finished jobs", "Failovers and mass failures",
        "Processors by state",
    )),
    "monitoring-processors.svg": ("Processors", (
        "Spans by processor", "Load by processor", "WAL read", "Queue usage", "Lease margin of processors",
        "Spans by state, reported by processors",
    )),
    "monitoring-owners.svg": ("Owners", (
        "Leader", "Elections", "Lease margin of the leader", "Tick", "Exchange duration", "Exchange failing for",
    )),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timeline:
    """What all plots of a figure share: begin and end in seconds since the Unix epoch, and the events in between."""

    begin: float
    end: float
    events: Sequence[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Plot:
    """A panel and its series: legend -> values from the beginning of the timeline, step_s apart, NaN where missing."""

    panel: Panel
    series: Mapping[str, Sequence[float]]
    step_s: float


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m docs.tools.monitoring_figures FOLDER", file=sys.stderr)
        return 2
    if problem := missing_programs():
        print(problem, file=sys.stderr)
        return 1
    for name, text in run().items():
        path = Path(arguments[0], name)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(text) / 1000:.0f} kB")
    return 0


def run() -> dict[str, str]:
    """Run a cluster through the events that the figures show; return the SVG of each figure by file name."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tablewire-figures-")))
        servers = {name: stack.enter_context(PostgresServer(folder, name=name)) for name in ("source", "sink")}
        config = {"scheduler": {"capture_silent_ms": SILENT_MS}}
        monitored = stack.enter_context(MonitoredCluster(folder, servers, rows_per_s=ROWS_PER_S, owner_config=config))
        time.sleep(WARM_UP_S)
        begin = time.time()
        time.sleep(QUIET_S)
        monitored.move_table()
        time.sleep(QUIET_S)
        monitored.kill_leader()
        time.sleep(QUIET_S)
        victim = monitored.kill_processor()
        time.sleep(QUIET_S)
        monitored.record("processor restarted")
        monitored.cluster.start_node(victim)
        time.sleep(QUIET_S / 3)
        monitored.rebalance()
        time.sleep(QUIET_S)
        events = [event for event in monitored.events if event[0] >= begin]
        return figures(monitored, Timeline(begin, time.time(), events))


def figures(monitored: MonitoredCluster, timeline: Timeline) -> dict[str, str]:
    """Return the SVG of each figure by file name."""
    cluster, prometheus = monitored.cluster, monitored.prometheus
    version = prometheus.api("status/buildinfo")["version"].split("+")[0]
    names = {node.http_address: name for name, node in cluster.nodes.items()}
    names |= dict(zip(cluster.etcd.endpoints, cluster.etcd_names, strict=True))
    caption = (
        f"Expressions of the dashboard, plotted by docs/tools/monitoring_figures.py from Prometheus {version}; {NOT_GRAFANA}.",
        f"Scraped every second, rates over {RATE_INTERVAL}. Addresses are replaced by node names.",
        f"A cluster on one machine: {len(cluster.owners)} owners, {len(cluster.processors)} processors, PostgreSQL to PostgreSQL,"
        f" {len(monitored.tables)} tables, {ROWS_PER_S:g} rows/s, leases of 3 s, scheduler.capture_silent_ms = {SILENT_MS}.",
    )
    panels = {panel.title: panel for row in ROWS.values() for panel in row}
    return {
        file: draw(title, caption, [query(panels[name], prometheus, timeline, names) for name in chosen], timeline)
        for file, (title, chosen) in FIGURES.items()
    }


def query(panel: Panel, prometheus: Prometheus, timeline: Timeline, names: Mapping[str, str]) -> Plot:
    """Evaluate a panel's expressions over the timeline. names: address -> node name, for legends."""
    step_s = BAR_STEP_S if panel.kind == "bars" else STEP_S
    count = int((timeline.end - timeline.begin) / step_s) + 2  # Prometheus rounds both times to milliseconds
    series = {}
    for expression in panel.expressions:
        expr = re.sub(r"\$(changefeed|processor)\b", ".*", expression.expr).replace("$__rate_interval", RATE_INTERVAL)
        for found in prometheus.query_range(expr, timeline.begin, timeline.end, step_s):
            values = [np.nan] * count
            for when, value in found["values"]:
                values[round((when - timeline.begin) / step_s)] = float(value)
            series[legend(expression.legend, {key: names.get(value, value) for key, value in found["metric"].items()})] = values
    return Plot(panel, dict(sorted(series.items())), step_s)


def legend(pattern: str, labels: Mapping[str, str]) -> str:
    """Replace each `{{label}}` by the label's value."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), pattern)


def draw(title: str, caption: Sequence[str], plots: Sequence[Plot], timeline: Timeline) -> str:
    """Return a figure with two plots per row as SVG. The same input gives the same text."""
    rows = -(-len(plots) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.1 * rows + 1), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        for number, plot in enumerate(plots, 1):
            draw_plot(figure.add_subplot(rows, 2, number), plot, timeline)
        events = (f"{index}: {what}, {when - timeline.begin:.0f} s" for index, (when, what) in enumerate(timeline.events, 1))
        figure.supxlabel("\n".join(["Events: " + "; ".join(events), *caption]), x=0.01, ha="left", fontsize=7.5, color="#555")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)


def draw_plot(axes: Axes, plot: Plot, timeline: Timeline) -> None:
    """Draw one panel: lines or stacked areas, event marks, and the threshold if the values come near it."""
    panel = plot.panel
    values = np.array(list(plot.series.values()), dtype=float, ndmin=2)
    threshold = panel.red_below if panel.red_from is None else panel.red_from
    is_stacked = panel.kind in ("bars", "stack")
    tops = np.where(np.isnan(values), np.nan, np.nancumsum(values, axis=0)) if is_stacked else values
    lowest, highest = (float(bound(np.nan_to_num(tops), initial=0.0)) for bound in (np.min, np.max))
    if threshold is not None and highest > threshold / 2:
        highest = max(highest, threshold)
    factor, suffix = axis_unit(panel.unit, highest)
    for index, name in enumerate(plot.series):
        own, top = values[index] * factor, tops[index] * factor
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "label": name}
        times = np.arange(len(own)) * plot.step_s
        if is_stacked:
            # A bar shows what happened in the step before its time; other values hold until the next one.
            edges = np.append(times, len(own) * plot.step_s) - (plot.step_s if panel.kind == "bars" else 0)
            axes.stairs(top, edges, baseline=np.nan_to_num(top - own), fill=True, alpha=0.8, **style)
        else:
            axes.plot(times, own, marker=".", markersize=2, markevery=isolated(own), **style)
    if threshold is not None and highest >= threshold:
        axes.axhline(threshold * factor, color="#c00", linestyle="--", linewidth=0.8)
    for number, (when, _) in enumerate(timeline.events, 1):
        axes.axvline(when - timeline.begin, color="#888", linestyle=":", linewidth=0.8)
        axes.annotate(str(number), (when - timeline.begin, 1.02), xycoords=("data", "axes fraction"), ha="center", color="#555")
    axes.set_title(panel.title)
    axes.set_xlim(0, timeline.end - timeline.begin)
    axes.set_ylim(None if lowest < 0 else 0.0, None if highest else 1.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda second, _: f"{second:g} s"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=panel.unit in ("none", "short"), steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}{suffix}"))
    if plot.series:
        columns = max(1, 70 // (max(map(len, plot.series)) + 6))
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.12), ncols=columns, handlelength=1, columnspacing=1.2)


def isolated(values: NDArray[np.float64]) -> list[int]:
    """Return the positions of values between two missing ones, which a line does not show."""
    missing = np.isnan(np.pad(values, 1, constant_values=np.nan))
    return np.flatnonzero(~missing[1:-1] & missing[:-2] & missing[2:]).tolist()


def axis_unit(unit: str, highest: float) -> tuple[float, str]:
    """Return the factor and the suffix that make an axis up to `highest` readable: (1024**-2, " MiB")."""
    if unit == "s":
        return (1.0, " s") if highest >= 1 else (1000.0, " ms")
    if unit in ("bytes", "Bps"):
        power = min(3, max(0, int(np.log2(max(highest, 1)) // 10)))
        return 1024.0**-power, " " + ("B", "KiB", "MiB", "GiB")[power] + ("/s" if unit == "Bps" else "")
    return {"percentunit": (100.0, " %"), "cps": (1.0, "/s")}.get(unit, (1.0, ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
