"""Processes of a local cluster: they die with this process, are signalled by pid, and write their
output to a file.

One thread that lives as long as this process forks all of them, because Linux sends the
parent-death signal when the *thread* that forked ends. This process also adopts its orphans
(children of a killed server) and reaps them, so that no zombie remains where the machine's init
does not reap. Methods may be called from any thread. Only descendants are signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

_PR_SET_CHILD_SUBREAPER = 36
_LAUNCH = Path(__file__).with_name("launch.py")

_T = TypeVar("_T")
POLL_INTERVAL_S = 0.02
FORK_TIMEOUT_S = 10.0
TAIL_BYTES = 4_000


class StartError(Exception):
    """A server did not start or did not become ready in time. The text holds the end of its log."""


class Scoped(ABC):
    """Started by its `with` block, closed at its end; also closed when its start fails."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def adopt_orphans() -> None:
    """Make this process the parent of descendants that lose their own parent (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


_forker = ThreadPoolExecutor(1, "spawner", initializer=adopt_orphans)


def _fork(job: Callable[[], None]) -> None:
    """Run `job`, which forks and records the new process, on the thread that forks.

    The job has ended when this returns or raises, so that a Ctrl-C in between leaves no unrecorded
    process.
    """
    done = _forker.submit(job)
    try:
        done.result()
    except BaseException:
        wait([done], FORK_TIMEOUT_S)
        raise


def end_descendants() -> None:
    """Kill all remaining descendants and wait until they are gone; the last action of a program.

    An interrupted helper such as initdb may have left processes that are not recorded anywhere.
    """
    while below := descendants(os.getpid()):
        _signal(below, signal.SIGKILL)
        _reap(below)


def launch_command(mode: str, folder: Path | None, argv: Sequence[str]) -> list[str]:
    """Return the command line that runs `argv` through launch.py as a child of this process."""
    where = str(folder) if folder is not None else "-"
    return [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), mode, where, "--", *argv]


def wait_until(what: str, condition: Callable[[], _T], timeout_s: float) -> _T:
    """Wait until condition() is true and return its value. Raises TimeoutError that names `what`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_INTERVAL_S)
    return value


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """Return the last `size` bytes of a log as text, "" when the file does not exist."""
    return path.read_bytes()[-size:].decode("utf-8", "replace") if path.exists() else ""


def descendants(pid: int) -> list[int]:
    """Return the pids of all descendants of `pid`, parents first. Empty where there is no /proc."""
    children = defaultdict[int, list[int]](list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            words = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            children[int(words[1])].append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found += children[parent]
    return found[1:]


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _reap(pids: Sequence[int]) -> None:
    """Collect killed orphans, as far as they are children of this process."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


class ManagedProcess:
    """A process and everything that it forks. `start` may be called again after it has ended."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        mode: str = "plain",
    ) -> None:
        """Describe a process: argv[0] is an absolute path, output is appended to `log`; mode: see launch.py."""
        self.name = name
        self.log = log
        self._argv = list(argv)
        self._env = dict(env) if env is not None else None
        self._cwd = cwd
        self._mode = mode
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._log_start = 0

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process

    @property
    def pid(self) -> int:
        """Return the pid of the program itself. Raises RuntimeError before the first start."""
        return self._started.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def paused(self) -> bool:
        return self._paused and self.running

    @property
    def exit_code(self) -> int | None:
        """Return the exit code: negative = ended by that signal; None = running, or never started."""
        return self._process.poll() if self._process is not None else None

    def log_since_start(self) -> str:
        """Return what it has written to its log since the last start."""
        return self.log.read_bytes()[self._log_start :].decode("utf-8", "replace")

    def start(self, argv: Sequence[str] | None = None) -> None:
        """Start it, with a new command line if given, and return at once. RuntimeError while it runs."""
        if self.running:
            raise RuntimeError(f"{self.name} is running already (pid {self.pid})")
        if argv is not None:
            self._argv = list(argv)
        command = launch_command(self._mode, None, self._argv)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log.stat().st_size if self.log.is_file() else 0

        def fork() -> None:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    cwd=self._cwd,
                    start_new_session=True,  # a Ctrl-C at the terminal reaches this process alone
                )

        self._paused = False
        _fork(fork)

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process itself, not what it forked; do nothing when it has ended."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Return its exit code. Raises TimeoutError when it has not ended by then."""
        try:
            return self._started.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} (pid {self.pid}) did not end within {timeout_s:g} s") from None

    def kill(self) -> None:
        """Kill it and everything that it forked, and wait until it is gone; do nothing when it has ended."""
        if not self.running:
            return
        self.send_signal(signal.SIGSTOP)  # so that it does not fork while its descendants are listed
        below = descendants(self.pid)
        self._started.kill()
        _signal(below, signal.SIGKILL)
        self._started.wait()
        _reap(below)
        self._paused = False

    def pause(self) -> None:
        """Stop it and everything that it forked with SIGSTOP."""
        if not self.running:
            raise RuntimeError(f"{self.name} is not running")
        self.send_signal(signal.SIGSTOP)
        _signal(descendants(self.pid), signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Continue it and everything that it forked with SIGCONT; do nothing when it is not paused."""
        if self.running:
            _signal(descendants(self.pid), signal.SIGCONT)
            self.send_signal(signal.SIGCONT)
        self._paused = False

    def terminate(self, timeout_s: float, number: signal.Signals = signal.SIGTERM) -> int:
        """Send `number`, wait, kill it after timeout_s, and return its exit code (-9 = killed)."""
        if self.running:
            self.resume()
            self.send_signal(number)
            try:
                return self.wait(timeout_s)
            except TimeoutError:
                self.kill()
        return self.wait(0)
