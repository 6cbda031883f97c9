"""The demo says 1 whenever something it announces did not happen, and cleans up whenever it is told to stop."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.local import demo
from deploy.local.compare import Comparison, Difference
from deploy.local.node import ROOT
from deploy.local.observer import View, changes
from deploy.local.process import descendants, wait_until
from deploy.local.workload import LoadCounts

pytestmark = pytest.mark.integration

OPTIONS = argparse.Namespace(rate=100.0, seconds=20.0)


def good() -> demo.Report:
    kinds = {"insert": 1_000, "update": 900, "delete": 100}
    return demo.Report(
        seconds=20.0,
        load=LoadCounts(kinds, {"accounts": kinds}, 300, 0),
        replicated=kinds,
        acts={
            "moves": [{"table": "public.accounts", "origin": "processor0", "target": "processor1", "seconds": 0.2}],
            "kills": [
                {"node": "owner0", "role": "leading owner", "seconds": 2.0, "by": ["owner1"], "tables": []},
                {"node": "processor0", "role": "processor", "seconds": 3.0, "by": ["processor1"], "tables": ["public.accounts"]},
            ],
        },
        comparison=Comparison(12, 900, 0, ()),
    )


def test_a_good_run_has_no_problem(tmp_path: Path) -> None:
    """All happened: exit code 0's summary and figures say so."""
    report = good()
    demo.check(OPTIONS, report)
    assert report.problems == []
    assert "  source = sink: yes" in demo.summary(report)
    demo.write_json(tmp_path / "demo.json", report)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["ok"]
    assert written["source_equals_sink"]
    assert written["rows_written"]["total"] == 2_000
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def no_load(report: demo.Report) -> None:
    report.load = LoadCounts({"insert": 10, "update": 0, "delete": 0}, {}, 1, 0)


def slow_load(report: demo.Report) -> None:
    report.load = LoadCounts({"insert": 10, "update": 10, "delete": 10}, {}, 1, 0)


def no_move(report: demo.Report) -> None:
    report.acts["moves"] = []


def no_owner_killed(report: demo.Report) -> None:
    del report.acts["kills"][0]


def no_processor_killed(report: demo.Report) -> None:
    del report.acts["kills"][1]


def not_compared(report: demo.Report) -> None:
    report.comparison = None


def nothing_to_compare(report: demo.Report) -> None:
    report.comparison = Comparison(12, 0, 0, ())


def not_equal(report: demo.Report) -> None:
    report.comparison = Comparison(12, 900, 1, (Difference("public.accounts", "missing", "the sink has no row id=1"),))


def went_back(report: demo.Report) -> None:
    report.measures.went_back = 1


@pytest.mark.parametrize(
    "spoil",
    [
        no_load,
        slow_load,
        no_move,
        no_owner_killed,
        no_processor_killed,
        not_compared,
        nothing_to_compare,
        not_equal,
        went_back,
    ],
)
def test_whatever_did_not_happen_is_a_problem(spoil: Callable[[demo.Report], None]) -> None:
    """Each thing that is announced is looked for."""
    report = good()
    spoil(report)
    demo.check(OPTIONS, report)
    assert len(report.problems) == 1


def test_events_are_told_once() -> None:
    """A new leader, a processor that goes, a table that goes on elsewhere: one sentence each, none when nothing changed."""
    row: dict[str, Any] = {"table_id": 1, "table": "public.a", "state": "replicating", "primary": "c0", "error": None}
    before = View(1.0, True, "owner0", 5, {"c0": "processor0", "c1": "processor1"}, {"c0": "ready", "c1": "ready"}, (row,))
    after = View(2.0, True, "owner1", 9, before.captures, {"c1": "ready"}, ({**row, "primary": "c1"},))
    writers = {1: "c0"}
    assert changes(before, before, writers) == []
    assert changes(before, after, writers) == [
        "owner1 leads (election 9)",
        "processor0 is gone",
        "processor1 replicates public.a",
    ]
    assert writers == {1: "c1"}


def test_the_whole_demo(tmp_path: Path) -> None:
    """What a stranger sees: a move, two kills, a comparison that finds no difference, exit code 0, and nothing left."""
    figures = tmp_path / "demo.json"
    command = [sys.executable, "-m", "deploy.local.demo", "--plain", "--seconds", "15", "--json", str(figures)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert "source = sink: yes" in said
    document = json.loads(figures.read_text())
    assert (document["ok"], document["problems"], document["source_equals_sink"]) == (True, [], True)
    assert {kill["role"] for kill in document["kills"]} == {"leading owner", "processor"}
    assert len(document["moves"]) == 1
    assert all(document["rows_replicated"][kind] > 0 for kind in ("insert", "update", "delete"))
    assert not any((ROOT / ".demo").glob(f"{run.pid}-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["at once", "is up twice", "processors are up"])
def test_a_stopped_demo_leaves_nothing(tmp_path: Path, number: signal.Signals, when: str) -> None:
    """Ctrl-C (or its relatives) at any time: exit code 130, no process, no folder, no figures."""
    command = [sys.executable, "-m", "deploy.local.demo", "--plain", "--json", str(tmp_path / "demo.json")]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        folders = ROOT / ".demo"
        if when == "at once":
            wait_until("it has begun", lambda: any(folders.glob(f"{run.pid}-*")), 30)
        else:
            assert any(when in line for line in run.stdout)
        children = descendants(run.pid)
        run.send_signal(number)
        rest = run.stdout.read()
        assert run.wait(30) == 130, rest
    assert "interrupted" in rest
    assert not any(Path("/proc", str(pid)).exists() for pid in children)
    assert not any(folders.glob(f"{run.pid}-*"))
    assert list(tmp_path.iterdir()) == []
