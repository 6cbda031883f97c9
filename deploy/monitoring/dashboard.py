"""Makes Grafana's dashboard of panels.py: `python -m deploy.monitoring.dashboard --write`; a test keeps the file in step.

The layout is computed, so that panels never overlap; ids and places are stable as long as the panels are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.monitoring.panels import BARS, LINES, ROWS, STACK, STAT, Panel

FILE = Path(__file__).with_name("grafana") / "dashboards/tablewire.json"
UID = "tablewire"
COLUMNS = 24
HEIGHTS = {STAT: 4, LINES: 8, BARS: 8, STACK: 8}
BAR_STEP = "15s"
"""Bars are at least so far apart: with steps as long as a window, less one scrape, each event is counted once."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GREEN, RED = "green", "red"
_STYLES: dict[str, dict[str, Any]] = {
    LINES: {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0},
    BARS: {"drawStyle": "bars", "lineWidth": 1, "fillOpacity": 70, "stacking": {"mode": "normal", "group": "A"}},
    STACK: {
        "drawStyle": "line", "lineInterpolation": "stepAfter", "lineWidth": 1, "fillOpacity": 40,
        "stacking": {"mode": "normal", "group": "A"},
    },
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The whole document."""
    return {
        "uid": UID,
        "title": "Tablewire",
        "description": "Made by deploy/monitoring/dashboard.py; docs/monitoring.md tells how to read it.",
        "tags": ["tablewire"],
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 38,
        "version": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "timezone": "browser",
        "templating": {"list": list(_variables())},
        "annotations": {"list": [_elections()]},
        "panels": list(_panels()),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0}
    for name, label, query in (
        ("changefeed", "Changefeed", "label_values(tablewire_owner_checkpoint_ts, changefeed)"),
        ("processor", "Processor", "label_values(tablewire_processor_ready, instance)"),
    ):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": f"variable-{name}"},
            "refresh": 2,  # when the time range changes
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "hide": 0,
        }


def _elections() -> dict[str, Any]:
    """A vertical line wherever an owner became the leader."""
    return {
        "name": "Elections",
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": "changes(tablewire_owner_elections_total[$__interval]) > 0",
        "titleFormat": "{{instance}} leads",
        "step": "",
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for row in ROWS:
        yield {
            "id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
        }  # fmt: skip
        number, y, x, height = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            height = max(height, HEIGHTS[panel.kind])
            yield _panel(panel, number, {"x": x, "y": y, "w": panel.width, "h": HEIGHTS[panel.kind]})
            number, x = number + 1, x + panel.width
        y += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    is_stat = panel.kind == STAT
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": _thresholds(panel)}
    if not is_stat:
        marks = panel.red_from is not None or panel.red_below is not None
        style = {"showPoints": "never", "spanNulls": False, **_STYLES[panel.kind]}
        defaults["custom"] = {**style, "thresholdsStyle": {"mode": "dashed" if marks else "off"}}
        if panel.red_below is None:
            defaults["min"] = 0
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    if is_stat:
        options = {
            "colorMode": "value", "graphMode": "area", "justifyMode": "auto", "orientation": "auto", "textMode": "value",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }  # fmt: skip
    steps = {"interval": BAR_STEP} if panel.kind == BARS else {}
    return {
        **steps,
        "id": number,
        "type": "stat" if is_stat else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "range": True,
                "instant": False,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _thresholds(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": GREEN, "value": None}]
    if panel.red_from is not None:
        steps.append({"color": RED, "value": panel.red_from})
    elif panel.red_below is not None:
        steps = [{"color": RED, "value": None}, {"color": GREEN, "value": panel.red_below}]
    return {"mode": "absolute", "steps": steps}


def main(arguments: list[str]) -> int:
    if arguments != ["--write"]:
        print("usage: python -m deploy.monitoring.dashboard --write", file=sys.stderr)
        return 2
    FILE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
