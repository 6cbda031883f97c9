"""Managed processes are recorded from their fork on, and end with the program that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.local.process import ManagedProcess, wait_until

pytestmark = pytest.mark.integration

WAIT_S = 30
SLEEPER = [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]


class InterruptError(Exception):
    """Raised by the signal handler of the test, as Ctrl-C raises KeyboardInterrupt."""


def _is_forking() -> bool:
    """Return whether the spawner is forking: it opens the log, which has no reader yet."""
    spawners = [thread.ident for thread in threading.enumerate() if thread.name.startswith("spawner")]
    frames = sys._current_frames()
    for ident in spawners:
        frame = frames.get(ident or 0)
        while frame is not None:
            if frame.f_code.co_name == "fork":
                return True
            frame = frame.f_back
    return False


def test_an_interrupt_during_the_fork_leaves_no_unknown_process(tmp_path: Path) -> None:
    """The process is recorded, so that its owner can kill it."""
    log = tmp_path / "log"
    os.mkfifo(log)
    process = ManagedProcess("sleeper", SLEEPER, log=log)
    main = threading.main_thread().ident
    assert main is not None
    opened: list[int] = []

    def interrupt() -> None:
        wait_until("the fork is under way", _is_forking, WAIT_S)
        signal.pthread_kill(main, signal.SIGUSR1)
        wait_until("the interrupt has arrived", lambda: bool(arrived), WAIT_S)
        opened.append(os.open(log, os.O_RDONLY))

    arrived: list[int] = []

    def handler(number: int, _frame: object) -> None:
        arrived.append(number)
        raise InterruptError

    former = signal.signal(signal.SIGUSR1, handler)
    helper = threading.Thread(target=interrupt)
    helper.start()
    try:
        with pytest.raises(InterruptError):
            process.start()
        assert process.running
        pid = process.pid
    finally:
        signal.signal(signal.SIGUSR1, former)
        helper.join()
        process.kill()
        for descriptor in opened:
            os.close(descriptor)
    assert not Path("/proc", str(pid)).exists()


PROGRAM = """
import os, subprocess, sys
from deploy.local.process import adopt_orphans, descendants, end_descendants
adopt_orphans()
inner = '''
import subprocess, sys
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], **quiet).pid)
'''
orphan = int(subprocess.run([sys.executable, "-c", inner], capture_output=True, text=True, check=True).stdout)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
assert {orphan, child.pid} <= set(descendants(os.getpid()))
end_descendants()
assert descendants(os.getpid()) == []
print(orphan, child.pid)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
def test_nothing_is_left_below_a_program_that_ends() -> None:
    """No child remains, nor the child of a child that has ended."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    pids = done.stdout.split()
    assert len(pids) == 2
    assert not any(Path("/proc", pid).exists() for pid in pids)
