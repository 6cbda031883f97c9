"""A real Prometheus scrapes a real cluster, and evaluates every expression of the dashboard and the rules.

All tests share one cluster under load. It goes through a planned move, a rebalance, a processor paused until its lease is lost, a
resignation, and the kills of a leader and a processor. Grafana's variables are replaced as for "all".
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from deploy.local.node import OWNER, ROOT
from deploy.local.postgres import PostgresServer
from deploy.monitoring.monitored_cluster import MonitoredCluster
from deploy.monitoring.panels import ROWS
from deploy.monitoring.prometheus_server import QueryError
from docs.tools.monitoring_figures import FIGURES, Timeline, figures
from tests.monitoring.test_dashboard import document
from tests.monitoring.test_figures import axes_of, colours
from tests.monitoring.test_rules import alerts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

RATE_INTERVAL = "5s"
STEP_S = 1.0
SETTINGS = {"scheduler": {"capture_silent_ms": 1_000, "stats_interval_ms": 500}, "source": {"poll_interval_ms": 500}}

TRUE_IN_THIS_RUN = {
    "TablewireNoLeader", "TablewireOwnerDown", "TablewireOneOwnerLeft", "TablewireProcessorDown", "TablewireFailover",
    "TablewireSpansStalled", "TablewireCaptureSilent", "TablewireLeaseLost",
}  # fmt: skip
"""Alerts whose expression held at some time of the run, ignoring `for:`. The others are tested by promtool alone."""
MUST_NOT_BE_TRUE = {
    "TablewireTwoWriters", "TablewireChangefeedFailed", "TablewireAuditFailures", "TablewireMixedVersions",
    "TablewireRequestsInvalid", "TablewireMessagesDropped", "TablewireEtcdNoLeader", "TablewireSpanErrors", "TablewireQueueFull",
}  # fmt: skip
"""Alerts that nothing in the run should cause."""

Series = list[dict[str, Any]]


class Run:
    """A monitored cluster that has gone through its events and is still scraped."""

    def __init__(self, monitored: MonitoredCluster) -> None:
        self.monitored = monitored
        self.begin = time.time()
        self.first_leader = ""

    def play(self) -> None:
        monitored = self.monitored
        monitored.move_table()
        monitored.rebalance()
        monitored.wait_observed('sum(increase(tablewire_owner_jobs_ended_total{kind="move", state="done"}[1m])) > 0')
        paused = monitored.processors_by_tables()[-1]
        monitored.cluster.pause(paused)
        monitored.wait_observed('tablewire_owner_stalled_spans{reason="silent_capture"} > 0')
        monitored.wait_observed("sum(tablewire_owner_failovers_total) > 0")
        monitored.cluster.resume(paused)
        monitored.wait_observed("sum(tablewire_processor_lease_losses_total) > 0")
        monitored.wait_replicating()
        self.first_leader = monitored.resign()
        monitored.kill_leader()
        victim = monitored.kill_processor()
        monitored.wait_observed(f'up{{job="tablewire-processor", instance="{monitored.cluster.node(victim).http_address}"}} == 0')
        monitored.wait_observed("tablewire_owner_failovers_total > 0")  # of the current leader
        monitored.wait_observed('ALERTS{alertname="TablewireFailover", alertstate="firing"}')
        self.end = time.time()

    def evaluate(self, expr: str) -> Series:
        """Evaluate an expression over the whole run, as a panel does."""
        return self.monitored.prometheus.query_range(filled(expr), self.begin, self.end + STEP_S, STEP_S)


@pytest.fixture(scope="module")
def finished(promtool: str, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Yield a cluster after its events. Skips before anything starts if Prometheus is missing; keeps the logs of a failed run."""
    folder = tmp_path_factory.mktemp("cluster")
    monitored = MonitoredCluster(folder, {"source": postgres_server, "sink": postgres_server}, owner_config=SETTINGS)
    try:
        monitored.start()
        run = Run(monitored)
        run.play()
    except BaseException as error:
        kept = monitored.cluster.collect(ROOT / ".runs" / f"monitoring-{os.getpid()}")
        error.add_note(f"logs: {kept}")
        monitored.close()
        raise
    yield run
    monitored.close()


def filled(expr: str) -> str:
    """Replace the variables of the dashboard as Grafana does for "all"."""
    return (
        re.sub(r"\$(changefeed|processor)\b", ".*", expr).replace("$__rate_interval", RATE_INTERVAL).replace("$__interval", "5s")
    )


def selectors(expr: str) -> list[str]:
    """Return the selectors of an expression: metric names with their matchers."""
    return re.findall(r"\b((?:\w+:)?(?:tablewire|etcd|process)_\w+(?::\w+)?(?:\{[^}]*\})?|up\{[^}]*\}|ALERTS\{[^}]*\})", expr)


def test_every_panel_has_something_to_show(finished: Run) -> None:
    """Each expression of each panel is accepted and returns numbers at some time of the run; a stat returns one series now."""
    empty = []
    for row in ROWS.values():
        for panel in row:
            for query in panel.expressions:
                series = finished.evaluate(query.expr)
                if not any(value != "NaN" for line in series for _, value in line["values"]):
                    empty.append(f"{panel.title}: {query.expr}")
                if panel.kind == "stat":
                    assert len(finished.monitored.prometheus.query(filled(query.expr))) == 1, panel.title
    assert not empty


def test_every_legend_names_existing_labels(finished: Run) -> None:
    """Each series of a panel has the labels of its legend."""
    wrong = []
    for row in ROWS.values():
        for panel in row:
            for query in panel.expressions:
                wanted = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
                wrong += [
                    f"{panel.title}: {line['metric']}"
                    for line in finished.evaluate(query.expr)
                    if not wanted <= line["metric"].keys()
                ]
    assert not wrong


def test_variables_and_annotations_have_values(finished: Run) -> None:
    """`label_values(metric, label)` names a label that the metric has, and the annotation finds the elections."""
    prometheus = finished.monitored.prometheus
    for variable in document()["templating"]["list"][1:]:
        call = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
        assert call is not None
        values = prometheus.api(f"label/{call[2]}/values", **{"match[]": call[1]})
        assert values, variable["definition"]
    for note in document()["annotations"]["list"]:
        assert finished.evaluate(note["expr"]), note["expr"]


def test_a_changefeed_can_be_selected(finished: Run) -> None:
    """An existing changefeed returns its series, an unknown one none."""
    lag = "max by (changefeed) (tablewire_owner_checkpoint_lag_seconds{changefeed=~%r})".replace("%r", '"%s"')
    assert [line["metric"] for line in finished.monitored.prometheus.query(lag % "default/shop")] == [
        {"changefeed": "default/shop"}
    ]
    assert finished.monitored.prometheus.query(lag % "default/shopping") == []


def test_every_rule_is_accepted_and_finds_series(finished: Run) -> None:
    """Each rule evaluates without error, recorded series exist, and every selector of every alert finds series."""
    rules = finished.monitored.prometheus.rules()
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    blind = []
    for rule in rules:
        finished.evaluate(rule["query"])
        read = [rule["name"]] if rule["type"] == "recording" else selectors(rule["query"])
        assert read, rule["query"]
        blind += [f"{rule['name']}: {selector}" for selector in read if not finished.evaluate(selector)]
    assert not blind


def test_alerts_hold_when_they_should(finished: Run) -> None:
    """The alerts for what happened held, and those without a cause did not."""
    rules = alerts(finished.monitored.prometheus.rules())
    held = {name for name, rule in rules.items() if finished.evaluate(rule["query"])}
    assert TRUE_IN_THIS_RUN - held == set()
    assert MUST_NOT_BE_TRUE & held == set()
    assert held | set(rules) == set(rules) >= TRUE_IN_THIS_RUN | MUST_NOT_BE_TRUE


def test_figures_agree_with_what_happened(finished: Run) -> None:
    """Jobs, placements, failovers, elections and rows of the run, as the panels show them."""

    def most(expr: str) -> float:
        return max(float(value) for line in finished.evaluate(expr) for _, value in line["values"])

    tables = len(finished.monitored.tables)
    assert most('sum(max by (changefeed) (tablewire_owner_spans{state="replicating"}))') == tables
    assert most("sum(max by (changefeed, capture) (tablewire_owner_capture_spans))") == tables
    assert most('sum(tablewire_processor_spans{state="replicating"})') >= tables
    assert most('sum(max_over_time(tablewire_owner_jobs_ended_total{kind="move", state="done"}[1h]))') == 1
    assert most('sum(max_over_time(tablewire_owner_jobs_ended_total{kind="rebalance", state="done"}[1h]))') == 1
    assert most('sum(max_over_time(tablewire_owner_placements_total{why="move"}[1h]))') == 1
    assert most("sum(max_over_time(tablewire_owner_elections_total[1h]))") >= 3
    assert most("sum(increase(tablewire_owner_failovers_total[1h]))") > 1.5
    assert most("sum(rate(tablewire_processor_sink_rows_total[5s]))") > 50
    assert most("max(tablewire_owner_is_leader)") == 1
    assert (
        min(float(value) for line in finished.evaluate("tablewire_processor_lease_margin_seconds") for _, value in line["values"])
        < 2
    )


def test_a_former_leader_exports_nothing_stale(finished: Run) -> None:
    """The owner that resigned leads again after the next leader was killed: only one owner exports series at a time."""
    alive = {row["id"] for row in finished.monitored.cluster.admin.captures()}
    for name in ("tablewire_owner_exchange_seconds_count", "tablewire_owner_capture_load"):
        finished.monitored.wait_observed(name, lambda series: {line["metric"]["capture"] for line in series} == alive)
    # Two owners export series of the changefeed at most for the interval between two scrapes.
    doubled = finished.evaluate("count(tablewire_owner_failovers_total) > 1")
    assert sum(len(line["values"]) for line in doubled) <= 3
    assert finished.monitored.cluster.node(finished.first_leader).kind == OWNER


def test_figures_can_be_drawn(finished: Run) -> None:
    """The figures of the documentation can be made from any run: each panel has a series, and node names replace addresses."""
    drawn = figures(finished.monitored, Timeline(finished.begin, finished.end, finished.monitored.events))
    assert list(drawn) == list(FIGURES)
    for text in drawn.values():
        groups = axes_of(ElementTree.fromstring(text))
        assert len(groups) == 6
        assert all(colours(group) for group in groups)
        assert not re.search(r"\b127\.\d+\.\d+\.\d+", text)


def test_a_wrong_expression_is_an_error(finished: Run) -> None:
    """Prometheus rejects what is not PromQL, and an unknown metric has no series."""
    with pytest.raises(QueryError, match="parse error"):
        finished.evaluate("sum by (changefeed) (tablewire_owner_spans")
    assert finished.evaluate("tablewire_owner_no_such_thing") == []
