"""Alerts and recording rules: promtool accepts the shipped files, and each alert fires exactly when it should.

alert_cases.py has the inputs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deploy.monitoring.prometheus_server import RULES, SHIPPED, Prometheus, with_targets
from owner.owner_config import OwnerConfig
from processor.processor_config import ProcessorConfig
from tests.monitoring.alert_cases import CASES, Case, Series

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/monitoring.md"
TIMEOUT_S = 60
SEVERITIES = {"critical", "warning", "info"}
AT_ONCE = {
    "TablewireElections", "TablewireLeaseLost", "TablewireFailover", "TablewireTwoWriters", "TablewireOrphans",
    "TablewireAuditFailures", "TablewireRequestsInvalid",
}  # fmt: skip
"""Alerts on an `increase`: the window of the expression replaces `for:`."""
MUST_NOT_WAIT = {"TablewireBrake", "TablewireExchangeFailing"}
"""Alerts without `for:` whose expression covers the delay, or that must not be delayed."""

Rules = list[dict[str, Any]]


def run(promtool: str, *arguments: str) -> str:
    """Return the output of promtool, which must succeed."""
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts(rules: Rules) -> dict[str, dict[str, Any]]:
    return {rule["name"]: rule for rule in rules if rule["type"] == "alerting"}


def test_promtool_accepts_the_shipped_files(promtool: str) -> None:
    """`check config` accepts the configuration with its rules, `check rules` the rules alone."""
    assert "1 rule files found" in run(promtool, "check", "config", str(SHIPPED / "prometheus.yml"))
    assert "SUCCESS" in run(promtool, "check", "rules", str(RULES))


def test_processes_are_found_by_name_at_their_default_ports(shipped: Prometheus) -> None:
    """Jobs use DNS, so that scaling needs no change, and the default ports of the services."""
    config = shipped.api("status/config")["yaml"]
    found = re.findall(
        r"- job_name: (\S+)\n(?:  .*\n)*?  dns_sd_configs:\n  - names:\n((?:    - \S+\n)+)((?:    \S+: .*\n)+)", config
    )
    jobs = {job: (re.findall(r"- (\S+)", names), dict(re.findall(r"(\w+): (\S+)", rest))) for job, names, rest in found}
    assert {job: (names, rest["type"], int(rest["port"])) for job, (names, rest) in jobs.items()} == {
        "tablewire-owner": (["owner"], "A", OwnerConfig().http.port),
        "tablewire-processor": (["processor"], "A", ProcessorConfig().http.port),
        "etcd": (["etcd-1", "etcd-2", "etcd-3"], "A", 2379),
    }
    assert all(int(rest["refresh_interval"].rstrip("s")) <= 10 for _, rest in jobs.values())


def test_addresses_can_replace_dns_names(promtool: str, tmp_path: Path) -> None:
    """Tests and figures scrape the shipped configuration with addresses instead of DNS; an unknown job is an error."""
    text = (SHIPPED / "prometheus.yml").read_text()
    jobs = {"tablewire-owner": ["a:1", "b:2"], "tablewire-processor": ["c:3"], "etcd": ["d:4"]}
    (tmp_path / "prometheus.yml").write_text(with_targets(text, jobs))
    shutil.copy(RULES, tmp_path)
    run(promtool, "check", "config", str(tmp_path / "prometheus.yml"))
    assert "dns_sd_configs:" not in with_targets(text, jobs)
    with pytest.raises(LookupError, match="no job unknown"):
        with_targets(text, {"unknown": ["a:1"]})


def test_every_alert_is_complete(rules: Rules) -> None:
    """Each has a severity, a summary, a description, a `for:` where it needs one, and a link to its paragraph."""
    wrong = []
    for name, rule in alerts(rules).items():
        notes = rule["annotations"]
        if rule["labels"].get("severity") not in SEVERITIES or len(rule["labels"]) != 1:
            wrong.append(f"{name}: labels {rule['labels']}")
        if set(notes) != {"summary", "description", "runbook"} or not all(notes.values()):
            wrong.append(f"{name}: annotations {sorted(notes)}")
        if notes.get("runbook") != f"docs/monitoring.md#{name.lower()}":
            wrong.append(f"{name}: runbook {notes.get('runbook')}")
        if (rule["duration"] == 0) != (name in AT_ONCE | MUST_NOT_WAIT):
            wrong.append(f"{name}: for {rule['duration']} s")
    assert not wrong
    assert all("increase(" in alerts(rules)[name]["query"] for name in AT_ONCE)


def test_every_alert_has_its_paragraph(rules: Rules) -> None:
    """docs/monitoring.md has exactly one heading for each alert."""
    headings = re.findall(r"^#### (Tablewire\w+)$", PAGE.read_text(), re.M)
    assert sorted(headings) == sorted(alerts(rules))


def test_every_alert_has_its_cases(rules: Rules) -> None:
    """Each alert has at least one case in alert_cases.py, and no case is there twice."""
    assert set(alerts(rules)) == {case.alert for case in CASES}
    assert len({(case.alert, str(case.fires), str(case.quiet)) for case in CASES}) == len(CASES)


def unit(case: Case, rule: dict[str, Any], series: Series, expected: dict[int, bool]) -> dict[str, Any]:
    """Return one of promtool's tests. expected: evaluation time in seconds -> whether the alert fires."""
    fires = {
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    return {
        "interval": f"{case.interval}s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{at}s", "alertname": case.alert, "exp_alerts": [fires] if does else []}
            for at, does in sorted(expected.items())
        ],
    }


def whole(units: list[dict[str, Any]]) -> str:
    """Return a file for `promtool test rules`; JSON is YAML."""
    return json.dumps({"rule_files": [str(RULES)], "evaluation_interval": units[0]["interval"], "tests": units})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires_when_it_should_and_only_then(case: Case, promtool: str, rules: Rules, tmp_path: Path) -> None:
    """It fires with its labels and texts, not before its time, and not for the series of `quiet`."""
    rule = alerts(rules)[case.alert]
    fires = unit(case, rule, case.fires, {case.not_before: False, case.at: True})
    quiet = unit(case, rule, case.quiet, {case.not_before: False, case.at: False})
    path = tmp_path / "rules_test.json"
    path.write_text(whole([fires, quiet]))
    run(promtool, "test", "rules", str(path))


def test_a_wrong_case_fails(promtool: str, rules: Rules, tmp_path: Path) -> None:
    """With the series of `quiet` in place of those of `fires`, promtool reports a failure."""
    for case in (CASES[0], CASES[-1]):
        swapped = unit(case, alerts(rules)[case.alert], case.quiet, {case.at: True})
        path = tmp_path / "rules_test.json"
        path.write_text(whole([swapped]))
        done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0
        assert case.alert in done.stdout + done.stderr


def test_rule_names_are_unique(rules: Rules) -> None:
    """No two alerts or recording rules share a name."""
    assert [name for name, count in Counter(rule["name"] for rule in rules).items() if count > 1] == []
