"""The end of a process, with real processes and real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from tablewire.runtime.shutdown import EXIT_BUG, EXIT_SIGNAL_BASE, Shutdown, run_thread

TIMEOUT_S = 20.0

# Two threads print at the same time, so each uses a single write.
GRACEFUL = """
import os
import sys
from tablewire.runtime import logs
from tablewire.runtime.shutdown import Shutdown
logs.configure("json")
shutdown = Shutdown()
shutdown.install()
shutdown.on_request(lambda: os.write(1, b"asked\\n"))
print("ready", flush=True)
shutdown.wait()
os.write(1, f"reason {shutdown.reason}\\n".encode())
sys.stdin.read()
"""


BUG = """
import threading
from tablewire.runtime import logs
from tablewire.runtime.shutdown import run_thread
logs.configure("json")
def run():
    print("half a line", end="")
    raise KeyError("a bug")
run_thread("worker", run)
threading.Event().wait(60)
"""


def start(script: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_graceful_and_the_second_ends_at_once(signum: signal.Signals) -> None:
    """The first signal wakes the waiting thread and calls back; the second ends the process with
    128 + its number.
    """
    with start(GRACEFUL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        assert sorted(process.stdout.readline() for _ in range(2)) == ["asked\n", f"reason {signum.name}\n"]
        assert process.poll() is None
        process.send_signal(signum)
        assert process.wait(TIMEOUT_S) == EXIT_SIGNAL_BASE + signum


def test_a_graceful_shutdown_has_the_exit_code_of_the_service() -> None:
    """After one signal the process ends by itself with its own exit code."""
    with start(GRACEFUL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate("", timeout=TIMEOUT_S)
        assert process.returncode == 0
        assert '"signal":"SIGTERM"' in errors


def test_an_exception_in_a_thread_ends_the_process() -> None:
    """The exception is logged with its traceback, stdout is flushed, and the exit code is EXIT_BUG."""
    with start(BUG) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == EXIT_BUG
        assert output == "half a line"
        assert '"thread":"worker"' in errors
        assert "KeyError" in errors


def test_a_thread_runs_under_its_name() -> None:
    """run_thread starts a daemon thread with this name, which may return."""
    names: list[str] = []
    thread = run_thread("worker", lambda: names.append(threading.current_thread().name))
    thread.join(TIMEOUT_S)
    assert names == ["worker"]
    assert thread.daemon


def test_a_request_is_idempotent_and_late_callbacks_are_called() -> None:
    """The first reason is kept, and each callback is called once, a late one immediately."""
    shutdown = Shutdown()
    calls: list[str] = []
    shutdown.on_request(lambda: calls.append("early"))
    assert not shutdown.wait(0)
    shutdown.request("first")
    shutdown.request("second")
    shutdown.on_request(lambda: calls.append("late"))
    assert (shutdown.requested, shutdown.reason, calls) == (True, "first", ["early", "late"])
    assert shutdown.wait(0)


def test_signal_handlers_are_restored() -> None:
    """uninstall restores the previous handlers; installing twice is allowed."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    shutdown = Shutdown()
    shutdown.install()
    shutdown.install()
    shutdown.uninstall()
    shutdown.uninstall()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
