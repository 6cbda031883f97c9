"""What Prometheus says of a real cluster that something happens to: every expression of the dashboard and the rules is asked.

One cluster for all tests of this file: a load, a planned move, a rebalance, a processor that is paused until its lease is lost, a
resignation, a leader and a processor killed. Grafana's variables are filled in as it would for "all".
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
from deploy.monitoring.panels import ROWS, STAT
from deploy.monitoring.plots import FIGURES, pictures
from deploy.monitoring.scene import Scene
from deploy.monitoring.server import QueryError
from deploy.monitoring.svg import COLOURS, Span
from tests.monitoring.test_dashboard import document
from tests.monitoring.test_rules import alerts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

RATE_INTERVAL = "5s"
STEP_S = 1.0
SETTINGS = {"scheduler": {"capture_silent_ms": 1_000, "stats_interval_ms": 500}, "source": {"poll_interval_ms": 500}}

TRUE_IN_THIS_RUN = {
    "TablewireNoLeader", "TablewireOwnerDown", "TablewireOneOwnerLeft", "TablewireProcessorDown", "TablewireFailover",
    "TablewireSpansStalled", "TablewireCaptureSilent", "TablewireLeaseLost",
}  # fmt: skip
"""Alerts whose expression held at some time of the story, `for:` aside. What the others need is tried by promtool alone."""
MUST_NOT_BE_TRUE = {
    "TablewireTwoWriters", "TablewireChangefeedFailed", "TablewireAuditFailures", "TablewireMixedVersions",
    "TablewireRequestsInvalid", "TablewireMessagesDropped", "TablewireEtcdNoLeader", "TablewireSpanErrors", "TablewireQueueFull",
}  # fmt: skip
"""Nothing in the story is a reason for these."""

Series = list[dict[str, Any]]


class Story:
    """A scene that is over, still scraped."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.begin = time.time()
        self.first_leader = ""

    def play(self) -> None:
        scene = self.scene
        scene.move_a_table()
        scene.rebalance()
        scene.wait_seen('sum(increase(tablewire_owner_jobs_ended_total{kind="move", state="done"}[1m])) > 0')
        paused = scene.by_tables()[-1]
        scene.cluster.pause(paused)
        scene.wait_seen('tablewire_owner_stalled_spans{reason="silent_capture"} > 0')
        scene.wait_seen("sum(tablewire_owner_failovers_total) > 0")
        scene.cluster.resume(paused)
        scene.wait_seen("sum(tablewire_processor_lease_losses_total) > 0")
        scene.wait_replicating()
        self.first_leader = scene.resign()
        scene.kill_the_leader()
        victim = scene.kill_a_processor()
        scene.wait_seen(f'up{{job="tablewire-processor", instance="{scene.cluster.node(victim).http_address}"}} == 0')
        scene.wait_seen("tablewire_owner_failovers_total > 0")  # of the present leader
        scene.wait_seen('ALERTS{alertname="TablewireFailover", alertstate="firing"}')
        self.end = time.time()

    def ask(self, expr: str) -> Series:
        """An expression over the whole story, as a panel would."""
        return self.scene.prometheus.query_range(filled(expr), self.begin, self.end + STEP_S, STEP_S)


@pytest.fixture(scope="module")
def story(promtool: str, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Skipped where there is no Prometheus, before anything is started. Logs of one that does not come to its end are kept."""
    folder = tmp_path_factory.mktemp("scene")
    scene = Scene(folder, {"source": postgres_server, "sink": postgres_server}, owner_config=SETTINGS)
    try:
        scene.start()
        told = Story(scene)
        told.play()
    except BaseException as error:
        kept = scene.cluster.collect(ROOT / ".runs" / f"monitoring-{os.getpid()}")
        error.add_note(f"logs: {kept}")
        scene.close()
        raise
    yield told
    scene.close()


def filled(expr: str) -> str:
    """With a dashboard's variables as they are for "all"."""
    return (
        re.sub(r"\$(changefeed|processor)\b", ".*", expr).replace("$__rate_interval", RATE_INTERVAL).replace("$__interval", "5s")
    )


def selectors(expr: str) -> list[str]:
    """What an expression reads: names of metrics with their matchers."""
    return re.findall(r"\b((?:\w+:)?(?:tablewire|etcd|process)_\w+(?::\w+)?(?:\{[^}]*\})?|up\{[^}]*\}|ALERTS\{[^}]*\})", expr)


def test_every_panel_has_something_to_show(story: Story) -> None:
    """Each query of each panel is accepted and has series with numbers in the course of the story; a stat has one now."""
    empty = []
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                series = story.ask(query.expr)
                if not any(value != "NaN" for line in series for _, value in line["values"]):
                    empty.append(f"{panel.title}: {query.expr}")
                if panel.kind == STAT:
                    assert len(story.scene.prometheus.query(filled(query.expr))) == 1, panel.title
    assert not empty


def test_every_legend_names_labels_that_are_there(story: Story) -> None:
    """A line of a panel is called by labels that it has."""
    wrong = []
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                wanted = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
                wrong += [
                    f"{panel.title}: {line['metric']}" for line in story.ask(query.expr) if not wanted <= line["metric"].keys()
                ]
    assert not wrong


def test_variables_and_annotations_have_values(story: Story) -> None:
    """`label_values(metric, label)` names a label that the metric has; elections are marked."""
    prometheus = story.scene.prometheus
    for variable in document()["templating"]["list"][1:]:
        call = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
        assert call is not None
        values = prometheus.api(f"label/{call[2]}/values", **{"match[]": call[1]})
        assert values, variable["definition"]
    for note in document()["annotations"]["list"]:
        assert story.ask(note["expr"]), note["expr"]


def test_a_changefeed_can_be_chosen(story: Story) -> None:
    """One that is there gives what "all" gives, another one nothing."""
    lag = "max by (changefeed) (tablewire_owner_checkpoint_lag_seconds{changefeed=~%r})".replace("%r", '"%s"')
    assert [line["metric"] for line in story.scene.prometheus.query(lag % "default/shop")] == [{"changefeed": "default/shop"}]
    assert story.scene.prometheus.query(lag % "default/shopping") == []


def test_every_rule_is_accepted_and_reads_what_is_there(story: Story) -> None:
    """Prometheus evaluates each without an error, what it records is there, and every selector of every alert finds series."""
    rules = story.scene.prometheus.rules()
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    blind = []
    for rule in rules:
        story.ask(rule["query"])
        read = [rule["name"]] if rule["type"] == "recording" else selectors(rule["query"])
        assert read, rule["query"]
        blind += [f"{rule['name']}: {selector}" for selector in read if not story.ask(selector)]
    assert not blind


def test_alerts_hold_when_there_is_a_reason(story: Story) -> None:
    """What happened is seen by the alerts that are for it, and by none for which there was no reason."""
    rules = alerts(story.scene.prometheus.rules())
    held = {name for name, rule in rules.items() if story.ask(rule["query"])}
    assert TRUE_IN_THIS_RUN - held == set()
    assert MUST_NOT_BE_TRUE & held == set()
    assert held | set(rules) == set(rules) >= TRUE_IN_THIS_RUN | MUST_NOT_BE_TRUE


def test_figures_agree_with_what_happened(story: Story) -> None:
    """Jobs, placements, failovers, elections and rows of the story, as the panels have them."""

    def most(expr: str) -> float:
        return max(float(value) for line in story.ask(expr) for _, value in line["values"])

    tables = len(story.scene.tables)
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
    assert min(float(value) for line in story.ask("tablewire_processor_lease_margin_seconds") for _, value in line["values"]) < 2


def test_a_former_leader_shows_nothing_old(story: Story) -> None:
    """The owner that resigned in the story was alive when the next one was killed and leads again: series by one owner only."""
    alive = {row["id"] for row in story.scene.cluster.admin.captures()}
    for name in ("tablewire_owner_exchange_seconds_count", "tablewire_owner_capture_load"):
        story.scene.wait_seen(name, lambda series: {line["metric"]["capture"] for line in series} == alive)
    # At no time did two owners have series of the changefeed, but for the moment between two scrapes.
    doubled = story.ask("count(tablewire_owner_failovers_total) > 1")
    assert sum(len(line["values"]) for line in doubled) <= 3
    assert story.scene.cluster.node(story.first_leader).kind == OWNER


def test_pictures_are_drawn_of_it(story: Story) -> None:
    """The plots of the documentation can be made of any scene: every panel has a line, names stand for addresses."""
    drawn = pictures(story.scene, Span(story.begin, story.end, tuple(story.scene.marks)))
    assert list(drawn) == list(FIGURES)
    for text in drawn.values():
        groups = ElementTree.fromstring(text).findall("{http://www.w3.org/2000/svg}g")
        assert len(groups) == 6
        assert all(set(COLOURS) & set(re.findall(r"#[0-9a-f]{6}", ElementTree.tostring(group, "unicode"))) for group in groups)
        assert not re.search(r"\b127\.\d+\.\d+\.\d+", text)


def test_a_wrong_expression_is_an_error(story: Story) -> None:
    """Asking can fail: Prometheus refuses what is not PromQL, and a metric that does not exist has no series."""
    with pytest.raises(QueryError, match="parse error"):
        story.ask("sum by (changefeed) (tablewire_owner_spans")
    assert story.ask("tablewire_owner_no_such_thing") == []
