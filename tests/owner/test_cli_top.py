"""`owner top`: text without a terminal, and on a terminal a live view that q ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from click.testing import CliRunner

from deploy.local.process import wait_until
from owner.cli.main import cli
from tablewire.model.progress import Stats
from tablewire.model.spans import Span
from tests.owner.admin_world import FEED, AdminView, serving, ticking

WAIT_S = 30.0


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> Iterator[AdminView]:
    """Return an owner of three processors and three tables that is served and ticked."""
    view = AdminView()
    view.world.settle()
    with ExitStack() as stack:
        monkeypatch.setenv("TABLEWIRE_ENDPOINTS", stack.enter_context(serving(view)))
        stack.enter_context(ticking(view))
        yield view


def top(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ("top", "--count", "1", *arguments), prog_name="owner")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_view_shows_the_whole_cluster(view: AdminView) -> None:
    """It shows processors, changefeeds with rates and lag, stalled tables with the reason, and events."""
    for capture in "abc":
        for table in (1, 2, 3):
            if view.world.primary(table) == capture:
                view.world.executors[capture].set_stats(Span(table), Stats(rows_per_s=1_000.0, bytes_per_s=2_048.0))
    view.events.add("capture_joined", subject="a", text="registered")
    wait_until("rates are reported", lambda: "3,000" in top(), WAIT_S)
    shown = top("--plain")
    assert "owner-1 leads | 1 owner | processors: ready 3 | changefeeds: normal 1" in shown
    assert "6.0 KiB" in shown
    assert "capture_joined" in shown
    assert "STALLED TABLE" not in shown
    # Two processors stop answering: their tables stall, with the reason.
    view.world.paused |= {"a", "b"}
    wait_until("it is seen", lambda: "silent_capture" in top(), WAIT_S)
    assert "silent 2" in top()


def test_a_view_as_json_is_a_line(view: AdminView) -> None:
    """Each line has the objects of the other commands."""
    lines = top("--count", "2", "--interval-s", "0.1", "-o", "json").splitlines()
    looks = [json.loads(line) for line in lines]
    assert len(looks) == 2
    assert [row["changefeed"] for row in looks[1]["changefeeds"]] == [FEED]
    assert [row["id"] for row in looks[1]["captures"]] == ["a", "b", "c"]
    assert looks[1]["error"] is None


def test_without_any_owner_it_fails_at_once(free_port: int) -> None:
    """The exit code is 1, and the error gives the reason."""
    result = CliRunner().invoke(cli, ("top", "--endpoint", f"127.0.0.1:{free_port}"), prog_name="owner")
    assert result.exit_code == 1
    assert "no owner answers" in result.stderr


def test_once_is_one_view_as_text(view: AdminView) -> None:
    """It equals --plain --count 1, and no pause follows it."""
    result = CliRunner().invoke(cli, ("top", "--once", "--interval-s", "3600"), prog_name="owner")
    assert result.exit_code == 0
    assert result.stdout.count("owner-1 leads") == 1


def test_a_wait_is_a_bar_on_a_terminal(view: AdminView) -> None:
    """A drain that hangs shows its progress and why the rest is left; Ctrl-C restores the terminal."""
    held = next(table for table in (1, 2, 3) if view.world.primary(table) == "a")
    for capture in "bc":
        view.world.executors[capture].hang("prepare", Span(held))
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "owner", "capture", "drain", "a", "--wait"],
        stdin=end,
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(end)
    seen = b""
    try:
        while b"preparing 1" not in seen:
            seen += os.read(terminal, 65_536)
        assert b"0/1" in seen
        process.send_signal(signal.SIGINT)
        while b"the drain of a continues" not in seen:
            seen += os.read(terminal, 65_536)
        assert process.wait(WAIT_S) == 1
        assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1  # the cursor went and came back
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_on_a_terminal_it_is_live_until_q(view: AdminView) -> None:
    """The view is refreshed; q ends it with exit code 0 and restores the terminal."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "owner", "top", "--interval-s", "0.2"],
        stdin=end,
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
    )
    os.close(end)
    seen = b""
    try:
        while seen.count(b"q leaves") < 2:
            seen += os.read(terminal, 65_536)
        assert b"CHANGEFEED" in seen
        os.write(terminal, b"q")
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
