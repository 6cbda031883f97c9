"""The demo fails when something that it announces did not happen, and cleans up whenever it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.local.compare import Comparison, Difference
from deploy.local.node import ROOT
from deploy.local.observer import View, changes
from deploy.local.process import descendants, wait_until
from deploy.local.report import LEADER, PROCESSOR, Kill, Report, TableMove, check, summary, write_json
from deploy.local.screen import Screen
from deploy.local.workload import LoadCounts

pytestmark = pytest.mark.integration

RATE = 100.0


def good() -> Report:
    kinds = {"insert": 1_000, "update": 900, "delete": 100}
    return Report(
        seconds=20.0,
        load=LoadCounts(kinds, {"accounts": kinds}, 300, 0),
        replicated=kinds,
        moves=[TableMove("public.accounts", "processor0", "processor1", 0.2)],
        kills=[
            Kill("owner0", LEADER, 2.0, ["owner1"]),
            Kill("processor0", PROCESSOR, 3.0, ["processor1"], ["public.accounts"]),
        ],
        comparison=Comparison(12, 900, 0, ()),
    )


def test_a_good_run_has_no_problem(tmp_path: Path) -> None:
    """When everything happened, the summary and the figures say so."""
    report = good()
    check(report, RATE)
    assert report.problems == []
    assert "  source = sink: yes" in summary(report)
    write_json(tmp_path / "demo.json", report)
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["ok"]
    assert written["source_equals_sink"]
    assert written["rows_written"]["total"] == 2_000
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    assert [kill["role"] for kill in written["kills"]] == ["leading owner", "processor"]
    assert written["moves"][0]["origin"] == "processor0"


def test_the_result_fits_on_a_small_terminal() -> None:
    """The summary, the reason for different counts and the next step need at most 80 columns and 23 lines."""
    report = good()
    report.replicated = {"insert": 1_010, "update": 800, "delete": 110}
    lines = summary(report)
    assert len(lines) <= 23
    assert max(len(line) for line in lines) <= 80
    assert any("They differ because" in line for line in lines)
    assert any("make cluster" in line for line in lines)
    assert not any("They differ" in line for line in summary(good()))


@pytest.mark.parametrize(
    ("width", "height", "last"), [(80, 24, "prepared by"), (120, 40, "checkpoint"), (60, 12, "replicated by")]
)
def test_the_live_view_fits_the_terminal(width: int, height: int, last: str) -> None:
    """Nothing is wider or higher than the terminal; the least important columns are left out, and events are wrapped."""
    row: dict[str, Any] = {"state": "replicating", "primary": "c0", "secondary": None, "checkpoint_ts": 1, "stall_reason": None}
    rows = tuple({**row, "table_id": at, "table": f"public.measurements{at:02d}"} for at in range(12))
    feed = {"changefeed": "default/demo", "state": "normal", "error": None, "checkpoint_ts": 1}
    view = View(1.0, True, "owner0", 5, {"c0": "processor0"}, {"c0": "ready"}, rows, feed, 100)
    console = Console(width=width, height=height, force_terminal=True, color_system=None)
    screen = Screen(plain=False, console=console)
    screen.show(lambda: view, lambda: "1 insert")
    for at in range(20):
        screen.say(f"event {at}: " + "some words " * 10)
    with console.capture() as capture:
        console.print(screen.render())
    lines = capture.get().splitlines()
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width
    assert last in capture.get()
    assert lines[-1].strip().endswith("words")
    assert (width >= 120) == ("checkpoint" in lines[5])


def no_load(report: Report) -> None:
    report.load = LoadCounts({"insert": 10, "update": 0, "delete": 0}, {}, 1, 0)


def slow_load(report: Report) -> None:
    report.load = LoadCounts({"insert": 10, "update": 10, "delete": 10}, {}, 1, 0)


def no_move(report: Report) -> None:
    report.moves = []


def no_owner_killed(report: Report) -> None:
    del report.kills[0]


def no_processor_killed(report: Report) -> None:
    del report.kills[1]


def not_compared(report: Report) -> None:
    report.comparison = None


def nothing_to_compare(report: Report) -> None:
    report.comparison = Comparison(12, 0, 0, ())


def not_equal(report: Report) -> None:
    report.comparison = Comparison(12, 900, 1, (Difference("public.accounts", "missing", "the sink has no row id=1"),))


def went_back(report: Report) -> None:
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
def test_what_did_not_happen_is_a_problem(spoil: Callable[[Report], None]) -> None:
    """Everything that is announced is checked."""
    report = good()
    spoil(report)
    check(report, RATE)
    assert len(report.problems) == 1


def test_each_change_is_one_event() -> None:
    """A new leader, a lost processor, a table that another one replicates: one event each, none when nothing changed."""
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
    """The demo moves a table, kills twice, finds no difference, ends with exit code 0, and leaves nothing behind."""
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
@pytest.mark.parametrize("when", ["at once", "servers are up", "processors are up"])
def test_a_stopped_demo_leaves_nothing(tmp_path: Path, number: signal.Signals, when: str) -> None:
    """Ctrl-C, SIGTERM or SIGHUP at any time: exit code 130, no process, no folder, no figures."""
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
