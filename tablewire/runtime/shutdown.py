"""How a process of ours ends: gracefully on the first signal, at once on the second, and on a bug in any thread.

`run_thread` is one of the two named borders of the project: whatever escapes a thread ends the process, loudly, instead of
leaving a service that looks alive and has lost one of its threads.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import structlog

EXIT_BUG = 70
"""An exception reached the top of a thread (EX_SOFTWARE)."""
EXIT_SIGNAL_BASE = 128
"""A second signal ends the process at once with this plus the signal's number, as a shell would say it."""
JOIN_TIMEOUT_S = 1.0

_log = structlog.get_logger("tablewire.shutdown")


def run_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Starts `run` on a daemon thread of this name. An exception in it is logged and ends the process with EXIT_BUG."""

    def top() -> None:
        try:
            run()
        except BaseException:  # noqa: BLE001 - the named border: nothing of ours may go on after this
            _log.critical("thread_failed", thread=name, exc_info=True)
            end_process(EXIT_BUG)

    thread = threading.Thread(target=top, name=name, daemon=True)
    thread.start()
    return thread


def end_process(code: int) -> None:
    """Ends the process now, without waiting for any thread; what was written to stdout and stderr is flushed first."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


class Shutdown:
    """SIGTERM and SIGINT as one event that threads wait on.

    The signals are read from a pipe by a thread of their own ("signals"), so that they work while the main thread is busy,
    and so that setting the event never happens inside a handler that interrupted a waiter holding the event's lock.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._reason = ""
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    @property
    def reason(self) -> str:
        """What asked first ("SIGTERM", or the text given to `request`); empty before."""
        return self._reason

    def wait(self, timeout_s: float | None = None) -> bool:
        """True once the end has been asked for, False after timeout_s."""
        return self._requested.wait(timeout_s)

    def on_request(self, callback: Callable[[], None]) -> None:
        """Calls back once, on the thread that asked, or right now when that has happened. It must not block."""
        with self._lock:
            if not self._requested.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def request(self, reason: str) -> None:
        """Asks for a graceful end. Idempotent; any thread, but never from a signal handler."""
        with self._lock:
            if self._requested.is_set():
                return
            self._reason = reason
            self._requested.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT. Main thread only; `uninstall` gives them back."""
        if self._pipe is not None:
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._pipe = (reader, writer)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, _nothing)
        self._thread = run_thread("signals", lambda: self._read(reader))

    def uninstall(self) -> None:
        if self._pipe is None:
            return
        reader, writer = self._pipe
        self._pipe = None
        signal.set_wakeup_fd(-1)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        os.close(writer)
        self._thread.join(JOIN_TIMEOUT_S)
        os.close(reader)

    def _read(self, reader: int) -> None:
        while numbers := os.read(reader, 1):
            signum = numbers[0]
            if signum not in (signal.SIGTERM, signal.SIGINT):
                continue
            name = signal.Signals(signum).name
            if self._requested.is_set():
                _log.warning("second_signal", signal=name)
                end_process(EXIT_SIGNAL_BASE + signum)
            _log.info("signal", signal=name)
            self.request(name)


def _nothing(_signum: int, _frame: FrameType | None) -> None:
    """The wake-up pipe has the signal already; a handler is needed so that the default action does not happen."""
