"""The dashboard and the provisioning files, checked without Grafana: structure, names and positions.

test_scrape.py evaluates the expressions against a real cluster.
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
from deploy.monitoring.prometheus_server import RULES
from docs.tools.metrics_page import families

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
    """Yield (panel title, target)."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target


def test_the_file_is_generated_from_the_panels() -> None:
    """The checked-in JSON is what the generator writes."""
    assert FILE.read_text() == text(), "run `python -m deploy.monitoring.dashboard --write`"


def test_ids_and_titles_are_unique() -> None:
    """Links use panel ids, people use titles."""
    ids = [panel["id"] for panel in panels()]
    titles = [panel["title"] for panel in panels()]
    assert len(set(ids)) == len(ids) == len(set(titles))
    assert len(ids) == sum(1 + len(row) for row in ROWS.values())


def test_no_two_panels_overlap() -> None:
    """Each panel lies within the 24 columns and overlaps no other."""
    cells: dict[str, set[tuple[int, int]]] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] >= 0 < place["w"], panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells[panel["title"]] = {(x, y) for x in columns for y in lines}
    assert [(one, two) for one, two in combinations(cells, 2) if cells[one] & cells[two]] == []


def test_every_panel_says_what_it_shows() -> None:
    """Each has a type, a unit that Grafana knows, a description, the variable data source, and targets A, B, ..."""
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


def test_every_variable_is_defined_and_used() -> None:
    """Each `$name` in an expression is a variable of the dashboard or of Grafana, and each variable is used."""
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
            assert set(uses) <= {'=~"'}, f"{title}: a variable with several values is a regular expression"


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (where, text) for everything that names metrics: panels, variables, annotations, rules."""
    document_ = document()
    for title, target in targets():
        yield title, target["expr"]
    for variable in document_["templating"]["list"]:
        yield variable["name"], str(variable["query"])
    for note in document_["annotations"]["list"]:
        yield note["name"], note["expr"]
    yield "rules.yml", "\n".join(line for line in RULES.read_text().splitlines() if not re.match(r"\s*(#|\w+: .*docs/)", line))


def exported() -> set[str]:
    """Return the names of all samples that the services can export."""
    return {name + suffix for name, kind, _, _ in families() for suffix in SUFFIXES[kind]}


def test_every_metric_in_use_is_exported() -> None:
    """Panels and rules use only metrics that the services export or that rules.yml records."""
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
    """Each exported metric is used in a panel or a rule, with the exceptions listed here."""
    unused = {"tablewire_owner_exchange_protocol_version"}  # matters only during upgrades
    used = "\n".join(expr for _, expr in expressions())
    unseen = {
        name for name, kind, _, _ in families() if not any(re.search(rf"\b{name}{suffix}\b", used) for suffix in SUFFIXES[kind])
    }
    assert unseen == unused


def test_labels_that_are_filtered_on_exist() -> None:
    """Matchers and `by` name labels that some metric has or that Prometheus adds."""
    known = {label for _, _, labels, _ in families() for label in labels} | {"job", "instance", "le", "alertname", "alertstate"}
    for where, expr in expressions():
        if where in {"datasource", "changefeed", "processor"}:
            continue
        named = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)\"", expr))
        named |= {name for group in re.findall(r"(?:by|on) \(([\w, ]+)\)", expr) for name in re.split(r",\s*", group)}
        assert named <= known, f"{where}: {sorted(named - known)}"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("datasources/prometheus.yml", ["url: http://prometheus:9090", "type: prometheus", "isDefault: true"]),
        ("dashboards/tablewire.yml", ["path: /var/lib/grafana/dashboards", "type: file"]),
    ],
)
def test_provisioning_names_the_documented_places(name: str, settings: list[str]) -> None:
    """The provisioning files use the paths and the URL that docs/monitoring.md documents."""
    provided = (PROVISIONING / name).read_text()
    assert provided.startswith("#")
    assert "\napiVersion: 1\n" in provided
    assert [line for line in settings if line not in provided] == []
    assert (ROOT / "docs/monitoring.md").read_text().count(settings[0].split(": ")[1]) >= 1


def test_grafana_and_prometheus_agree_on_the_scrape_interval() -> None:
    """Grafana derives $__rate_interval from the timeInterval of the data source."""
    interval = re.search(r"scrape_interval: (\S+)", (RULES.parent / "prometheus.yml").read_text())
    configured = re.search(r"timeInterval: (\S+)", (PROVISIONING / "datasources/prometheus.yml").read_text())
    assert interval is not None
    assert configured is not None
    assert interval[1] == configured[1]
