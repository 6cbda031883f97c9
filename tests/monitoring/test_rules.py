"""Alerts and recording rules: promtool accepts them, each alert fires when it should and is silent when it should be.

What is tested are the files that are shipped. The inputs stand in alert_cases.py.
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

from deploy.monitoring.server import RULES, SHIPPED, Prometheus, with_targets
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
"""Increases: the window of the expression is what `for:` is elsewhere. With them the two that must not wait:"""
MUST_NOT_WAIT = {"TablewireBrake", "TablewireExchangeFailing"}

Rules = list[dict[str, Any]]


def run(promtool: str, *arguments: str) -> str:
    """What promtool says; it must be content."""
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts(rules: Rules) -> dict[str, dict[str, Any]]:
    return {rule["name"]: rule for rule in rules if rule["type"] == "alerting"}


def test_promtool_accepts_what_is_shipped(promtool: str) -> None:
    """The configuration with its rules, and the rules by themselves."""
    assert "1 rule files found" in run(promtool, "check", "config", str(SHIPPED / "prometheus.yml"))
    assert "SUCCESS" in run(promtool, "check", "rules", str(RULES))


def test_processes_are_found_by_name_at_their_default_ports(shipped: Prometheus) -> None:
    """By DNS, so that scaling needs no change; the ports are the defaults of the code."""
    said = shipped.api("status/config")["yaml"]
    found = re.findall(
        r"- job_name: (\S+)\n(?:  .*\n)*?  dns_sd_configs:\n  - names:\n((?:    - \S+\n)+)((?:    \S+: .*\n)+)", said
    )
    jobs = {job: (re.findall(r"- (\S+)", names), dict(re.findall(r"(\w+): (\S+)", rest))) for job, names, rest in found}
    assert {job: (names, rest["type"], int(rest["port"])) for job, (names, rest) in jobs.items()} == {
        "tablewire-owner": (["owner"], "A", OwnerConfig().http.port),
        "tablewire-processor": (["processor"], "A", ProcessorConfig().http.port),
        "etcd": (["etcd-1", "etcd-2", "etcd-3"], "A", 2379),
    }
    assert all(int(rest["refresh_interval"].rstrip("s")) <= 10 for _, rest in jobs.values())


def test_addresses_can_be_named_instead(promtool: str, tmp_path: Path) -> None:
    """What the tests and the plots scrape is the shipped file with addresses for names; a job that is not there is an error."""
    text = (SHIPPED / "prometheus.yml").read_text()
    jobs = {"tablewire-owner": ["a:1", "b:2"], "tablewire-processor": ["c:3"], "etcd": ["d:4"]}
    (tmp_path / "prometheus.yml").write_text(with_targets(text, jobs))
    shutil.copy(RULES, tmp_path)
    run(promtool, "check", "config", str(tmp_path / "prometheus.yml"))
    assert "dns_sd_configs:" not in with_targets(text, jobs)
    with pytest.raises(LookupError, match="no job nobody"):
        with_targets(text, {"nobody": ["a:1"]})


def test_every_alert_says_what_it_is(rules: Rules) -> None:
    """A severity, a summary, a description, time to be sure, and a link to its own paragraph."""
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
    """docs/monitoring.md has a heading for each alert, and for no other."""
    headings = re.findall(r"^#### (Tablewire\w+)$", PAGE.read_text(), re.M)
    assert sorted(headings) == sorted(alerts(rules))


def test_every_alert_has_its_cases(rules: Rules) -> None:
    """Nothing is alerted on that was not tried."""
    assert set(alerts(rules)) == {case.alert for case in CASES}
    assert len({(case.alert, str(case.fires), str(case.quiet)) for case in CASES}) == len(CASES)


def unit(case: Case, rule: dict[str, Any], series: Series, expected: dict[int, bool]) -> dict[str, Any]:
    """One of promtool's tests: at which second the alert fires."""
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
    """A file for `promtool test rules`; JSON is YAML."""
    return json.dumps({"rule_files": [str(RULES)], "evaluation_interval": units[0]["interval"], "tests": units})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires_when_it_should_and_only_then(case: Case, promtool: str, rules: Rules, tmp_path: Path) -> None:
    """With its labels and its text, not before its time, and not in the other world."""
    rule = alerts(rules)[case.alert]
    fires = unit(case, rule, case.fires, {case.not_before: False, case.at: True})
    quiet = unit(case, rule, case.quiet, {case.not_before: False, case.at: False})
    path = tmp_path / "rules_test.json"
    path.write_text(whole([fires, quiet]))
    run(promtool, "test", "rules", str(path))


def test_a_case_that_is_wrong_is_found(promtool: str, rules: Rules, tmp_path: Path) -> None:
    """The cases above can fail: with the two worlds exchanged promtool refuses them."""
    for case in (CASES[0], CASES[-1]):
        exchanged = unit(case, alerts(rules)[case.alert], case.quiet, {case.at: True})
        path = tmp_path / "rules_test.json"
        path.write_text(whole([exchanged]))
        done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0
        assert case.alert in done.stdout + done.stderr


def test_no_rule_is_there_twice(rules: Rules) -> None:
    """Each name of an alert or a recording rule is one rule's."""
    assert [name for name, count in Counter(rule["name"] for rule in rules).items() if count > 1] == []
