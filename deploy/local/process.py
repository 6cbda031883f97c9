"""Real processes of a local cluster: started so that they die with us, signalled by pid, their output in a file.

Every process is forked by one thread that lives as long as this process, because Linux sends the parent-death signal when
the *thread* that forked dies. We are also the reaper of our orphans (children of a killed server), so that no zombie stays where
the machine's first process does not reap. Methods may be called from any thread; none of them touches a
process that we did not start.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Self

_PR_SET_CHILD_SUBREAPER = 36
_LAUNCH = Path(__file__).with_name("launch.py")

POLL_INTERVAL_S = 0.02
FORK_TIMEOUT_S = 10.0
TAIL_BYTES = 4_000


class StartError(Exception):
    """A server did not start or did not answer in time; the text holds the end of its log."""


class Scoped(ABC):
    """What is started where its `with` block begins and closed where that ends; one whose start fails half way is closed too."""

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


class _Spawner:
    """The one thread that forks. It starts with the first process and ends with ours."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._owner_pid = 0

    def spawn(self, job: Callable[[], None]) -> None:
        """Runs the job, which forks and notes what it has forked. When this returns or raises it has done so: a Ctrl-C in
        between leaves no process that nobody knows."""
        with self._lock:
            if self._owner_pid != os.getpid():  # first use, or first use after a fork
                self._owner_pid = os.getpid()
                threading.Thread(target=self._run, name="spawner", daemon=True).start()
        answer: Future[None] = Future()
        try:
            self._jobs.put((job, answer))
            answer.result()
        except BaseException:
            wait([answer], FORK_TIMEOUT_S)
            raise

    def _run(self) -> None:
        adopt_orphans()
        while True:
            job, answer = self._jobs.get()
            try:
                job()
                answer.set_result(None)
            except OSError as error:
                answer.set_exception(error)


_spawner = _Spawner()


def adopt_orphans() -> None:
    """What loses its parent below us becomes our child. Where the system cannot do that, nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kills whatever is still below this process, and waits until it is gone: the last thing that a program does. Programs that
    were run to their end and interrupted (initdb) may have left something that nobody knows by name."""
    while below := descendants(os.getpid()):
        for pid in below:
            _signal(pid, signal.SIGKILL)
        for pid in below:
            _reap(pid)


def launch_command(mode: str, folder: Path | None, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` through launch.py as a child of this process."""
    where = str(folder) if folder is not None else "-"
    return [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), mode, where, "--", *argv]


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float) -> None:
    """Return as soon as condition() is true; TimeoutError naming `what` after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_INTERVAL_S)


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """The last bytes of a log, as text; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def descendants(pid: int) -> list[int]:
    """The pids below `pid`, parents first. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    try:
        entries = os.listdir("/proc")
    except OSError:
        return []
    for entry in entries:
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        parent = int(stat.rpartition(")")[2].split()[1])  # a process name may hold blanks and brackets
        children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for parent in level for child in children.get(parent, [])]
        found.extend(level)
    return found


def _reap(pid: int) -> None:
    """Collect an orphan that was killed; nothing when it is not ours to collect."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


class ManagedProcess:
    """One process (and what it forks). `start` may be called again after it has ended."""

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
        """argv[0] is an absolute path. env None: ours. log: output is appended to it. mode: of launch.py."""
        self.name = name
        self.log = log
        self._argv = list(argv)
        self._env = dict(env) if env is not None else None
        self._cwd = cwd
        self._mode = mode
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def pid(self) -> int:
        """The pid of the program itself; RuntimeError when it was never started."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def paused(self) -> bool:
        return self._paused and self.running

    @property
    def exit_code(self) -> int | None:
        """As in subprocess: negative = ended by that signal; None = running, or never started."""
        return self._process.poll() if self._process is not None else None

    def start(self, argv: Sequence[str] | None = None) -> None:
        """Start it (with a new command line if given); returns at once. RuntimeError when it is running."""
        if self.running:
            raise RuntimeError(f"{self.name} is running already (pid {self.pid})")
        if argv is not None:
            self._argv = list(argv)
        command = launch_command(self._mode, None, self._argv)
        self.log.parent.mkdir(parents=True, exist_ok=True)

        def fork() -> None:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    cwd=self._cwd,
                    start_new_session=True,  # a Ctrl-C at the terminal is ours to handle, not theirs
                )

        self._paused = False
        _spawner.spawn(fork)

    def send_signal(self, number: signal.Signals) -> None:
        """To the process alone, not to what it forked; nothing happens when it has ended."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Its exit code; TimeoutError when it has not ended by then."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} (pid {self.pid}) did not end within {timeout_s:g} s") from None

    def kill(self) -> None:
        """SIGKILL to it and to all that it forked, and wait until it is gone. Nothing happens when it has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGSTOP)  # so that it forks no more while we look
        below = descendants(self._process.pid)
        self._process.kill()
        for pid in below:
            _signal(pid, signal.SIGKILL)
        self._process.wait()
        for pid in below:
            _reap(pid)
        self._paused = False

    def pause(self) -> None:
        """SIGSTOP to it and to all that it forked."""
        if not self.running:
            raise RuntimeError(f"{self.name} is not running")
        self.send_signal(signal.SIGSTOP)
        for pid in descendants(self.pid):
            _signal(pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """SIGCONT to it and to all that it forked; nothing happens when it was not paused."""
        if self.running:
            for pid in descendants(self.pid):
                _signal(pid, signal.SIGCONT)
            self.send_signal(signal.SIGCONT)
        self._paused = False

    def terminate(self, timeout_s: float, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, wait, kill it after timeout_s. Its exit code (-9 when it had to be killed)."""
        if self.running:
            self.resume()
            self.send_signal(number)
            try:
                return self.wait(timeout_s)
            except TimeoutError:
                self.kill()
        return self.wait(0)
