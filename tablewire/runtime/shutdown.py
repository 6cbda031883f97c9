"""How a process ends: gracefully at a signal, at once at a second one or a bug in any thread."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

import structlog

EXIT_BUG = 70
"""An exception reached the top of a thread (EX_SOFTWARE)."""
EXIT_SIGNAL_BASE = 128
"""The exit code after a second signal is this plus the number of the signal, as in a shell."""
JOIN_TIMEOUT_S = 1.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = structlog.get_logger("tablewire.shutdown")


def run_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread. An exception in it is logged and ends the process with EXIT_BUG.

    Otherwise a service could look alive although one of its threads has ended.
    """

    def top() -> None:
        try:
            run()
        except BaseException:  # noqa: BLE001 - the top of a thread: the process ends
            _log.critical("thread_failed", thread=name, exc_info=True)
            end_process(EXIT_BUG)

    thread = threading.Thread(target=top, name=name, daemon=True)
    thread.start()
    return thread


def end_process(code: int) -> None:
    """Flush stdout and stderr, and end the process without waiting for any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Shutdown:
    """An event that SIGTERM and SIGINT set, and that threads wait for.

    A thread of its own ("signals") reads the signals from a pipe. So they work while the main
    thread is busy, and the event is never set inside a signal handler that has interrupted a thread
    which holds the event's lock.
    """

    def __init__(self) -> None:
        self.reason = ""
        """What requested the shutdown ("SIGTERM", or the text given to `request`); empty before."""
        self._requested = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the request at most timeout_s; return whether it was made."""
        return self._requested.wait(timeout_s)

    def on_request(self, callback: Callable[[], None]) -> None:
        """Call back once, on the requesting thread or, after a request, immediately."""
        with self._lock:
            if not self._requested.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def request(self, reason: str) -> None:
        """Request a graceful shutdown. Idempotent. Any thread, but never a signal handler."""
        with self._lock:
            if self._requested.is_set():
                return
            self.reason = reason
            self._requested.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def install(self) -> None:
        """Handle SIGTERM and SIGINT until `uninstall`. Main thread only."""
        if self._pipe is not None:
            return
        reader, writer = self._pipe = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # The pipe receives the signal; the handler only replaces the default action.
        self._previous = {signum: signal.signal(signum, lambda _signum, _frame: None) for signum in _SIGNALS}
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
            if numbers[0] not in _SIGNALS:
                continue
            name = signal.Signals(numbers[0]).name
            if self._requested.is_set():
                _log.warning("second_signal", signal=name)
                end_process(EXIT_SIGNAL_BASE + numbers[0])
            _log.info("signal", signal=name)
            self.request(name)
