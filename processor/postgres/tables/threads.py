"""Threads of the executor: a bug in one is reported, and they can be ended although a server hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from processor.postgres.sinks import SinkSession

CANCEL_AFTER_S = 0.5
"""How long a server may take to finish what it is doing when the executor is closed."""
CANCELS_MAX_S = 4.0
"""A sink that hangs takes a while to refuse each of many cancel requests: after this, the connections are cut."""


def new_thread(name: str, run: Callable[[], None], crashed: Callable[[BaseException], None]) -> threading.Thread:
    """Return a daemon thread that was not started. crashed: called with the exception that ends it."""

    def top() -> None:
        try:
            run()
        except BaseException as error:
            crashed(error)
            raise

    return threading.Thread(target=top, name=name, daemon=True)


def end_threads(threads: Iterable[threading.Thread], sessions: Sequence[SinkSession], cut: Iterable[Callable[[], None]]) -> None:
    """Wait until threads that were stopped have ended; cancel, then cut, what they wait for at a server.

    sessions: theirs at the sink. cut: ends their other connections.
    """
    running = [thread for thread in threads if thread.ident is not None]

    def is_over() -> bool:
        deadline = time.monotonic() + CANCEL_AFTER_S
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in running)

    if is_over():
        return
    deadline = time.monotonic() + CANCELS_MAX_S
    for session in sessions:
        if time.monotonic() < deadline:
            session.cancel()
    while not is_over():
        for end in (*(session.cut for session in sessions), *cut):
            end()
