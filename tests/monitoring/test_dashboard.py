"""The dashboard and the provisioning files, as far as they can be checked without Grafana: structure, names and places.

What its expressions answer is tried on a real cluster in test_scrape.py.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from deploy.monitoring.dashboard import FILE, text
from deploy.monitoring.panels import ROWS, UNITS
from deploy.monitoring.server import RULES
from tests.test_metrics_docs import families

ROOT = Path(__file__).resolve().parents[2]
PROVISIONING = ROOT / "deploy/monitoring/grafana/provisioning"
BUILT_IN = {"__rate_interval", "__interval", "__range"}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count"), "gauge": ("",)}

Json = dict[str, Any]


def document() -> Json:
    loaded: Json = json.loads(FILE.read_text())
    return loaded


def panels() -> list[Json]:
    found: list[Json] = document()["panels"]
    return found


def targets() -> Iterator[tuple[str, Json]]:
    """(title of the panel, target)"""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target


def test_the_file_is_made_of_the_panels() -> None:
    """Nobody edits JSON by hand."""
    assert FILE.read_text() == text(), "run `python -m deploy.monitoring.dashboard --write`"


def test_ids_and_titles_are_unique() -> None:
    """Grafana links to panels by id, people by title."""
    ids = [panel["id"] for panel in panels()]
    titles = [panel["title"] for panel in panels()]
    assert len(set(ids)) == len(ids) == len(set(titles))
    assert len(ids) == sum(1 + len(row.panels) for row in ROWS)


def test_no_two_panels_overlap() -> None:
    """Each lies within the 24 columns and apart from all others."""
    cells: dict[str, set[tuple[int, int]]] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] >= 0 < place["w"], panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells[panel["title"]] = {(x, y) for x in columns for y in lines}
    assert [(one, two) for one, two in combinations(cells, 2) if cells[one] & cells[two]] == []


def test_every_panel_says_what_it_shows() -> None:
    """A type, a unit that Grafana knows, a description, the data source of the variable, targets named A, B, ..."""
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["type"] in {"stat", "timeseries"}, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["description"].endswith((".", "?")), panel["title"]
        assert panel["targets"], panel["title"]
        assert [target["refId"] for target in panel["targets"]] == list(string.ascii_uppercase[: len(panel["targets"])])
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
    assert len({target["expr"] for _, target in targets()}) == len(list(targets()))


def test_every_variable_is_there_and_used() -> None:
    """`$name` in an expression is a variable of the dashboard or one of Grafana's, and each variable filters something."""
    document_ = document()
    defined = {variable["name"] for variable in document_["templating"]["list"]}
    used = {name for _, target in targets() for name in re.findall(r"\$\{?(\w+)", target["expr"])}
    assert used - defined <= BUILT_IN
    assert defined - used == {"datasource"}
    assert document_["templating"]["list"][0]["type"] == "datasource"
    all_values = [variable for variable in document_["templating"]["list"] if variable["type"] == "query"]
    assert all(variable["includeAll"] and variable["allValue"] == ".*" and variable["multi"] for variable in all_values)
    for title, target in targets():
        for name in defined - {"datasource"}:
            uses = re.findall(rf"(.{{3}})\${name}\b", target["expr"])
            assert set(uses) <= {'=~"'}, f"{title}: several values are a regular expression"


def expressions() -> Iterator[tuple[str, str]]:
    """(where, text) of everything that names metrics: panels, variables, annotations, rules."""
    document_ = document()
    for title, target in targets():
        yield title, target["expr"]
    for variable in document_["templating"]["list"]:
        yield variable["name"], str(variable["query"])
    for note in document_["annotations"]["list"]:
        yield note["name"], note["expr"]
    yield "rules.yml", "\n".join(line for line in RULES.read_text().splitlines() if not re.match(r"\s*(#|\w+: .*docs/)", line))


def exported() -> set[str]:
    """The names of all samples that the code can make."""
    return {name + suffix for name, kind, _, _ in families() for suffix in SUFFIXES[kind]}


def test_every_metric_that_is_named_is_exported() -> None:
    """A metric that the code does not have, in a panel or in a rule, is a mistake; recorded ones are those of rules.yml."""
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text()))
    known = exported() | recorded
    assert "tablewire_owner_tick_seconds_bucket" in known
    unknown = [
        (where, name)
        for where, expr in expressions()
        for name in re.findall(r"[a-z_]*:?\btablewire_\w+(?::\w+)?", re.sub(r'"[^"]*"', '""', expr))
        if name not in known
    ]
    assert not unknown


def test_every_family_is_shown_or_alerted_on() -> None:
    """What is measured is looked at somewhere; those that are not are named here."""
    nowhere = {"tablewire_owner_exchange_protocol_version"}  # `owner capture list` has it; it matters during upgrades alone
    said = "\n".join(expr for _, expr in expressions())
    unseen = {
        name for name, kind, _, _ in families() if not any(re.search(rf"\b{name}{suffix}\b", said) for suffix in SUFFIXES[kind])
    }
    assert unseen == nowhere


def test_labels_that_are_filtered_on_exist() -> None:
    """A matcher or a `by` of one of ours names a label that some family has, or one that Prometheus adds."""
    known = {label for _, _, labels, _ in families() for label in labels} | {"job", "instance", "le", "alertname", "alertstate"}
    for where, expr in expressions():
        if where in {"datasource", "changefeed", "processor"}:
            continue
        named = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)\"", expr))
        named |= {name for group in re.findall(r"(?:by|on) \(([\w, ]+)\)", expr) for name in re.split(r",\s*", group)}
        assert named <= known, f"{where}: {sorted(named - known)}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("datasources/prometheus.yml", ["url: http://prometheus:9090", "type: prometheus", "isDefault: true"]),
        ("dashboards/tablewire.yml", ["path: /var/lib/grafana/dashboards", "type: file"]),
    ],
)
def test_grafana_finds_what_it_is_given(name: str, said: list[str]) -> None:
    """The provisioning files name the places where docs/monitoring.md says that things lie."""
    provided = (PROVISIONING / name).read_text()
    assert provided.startswith("#")
    assert "\napiVersion: 1\n" in provided
    assert [line for line in said if line not in provided] == []
    assert (ROOT / "docs/monitoring.md").read_text().count(said[0].split(": ")[1]) >= 1


def test_the_time_between_scrapes_is_one() -> None:
    """Grafana makes $__rate_interval of the scrape interval that it is told."""
    interval = re.search(r"scrape_interval: (\S+)", (RULES.parent / "prometheus.yml").read_text())
    told = re.search(r"timeInterval: (\S+)", (PROVISIONING / "datasources/prometheus.yml").read_text())
    assert interval is not None
    assert told is not None
    assert interval[1] == told[1]
