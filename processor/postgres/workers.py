"""WorkerPool: a fixed number of threads, each with a session of the sink, that call `step` of tables with work.

A table is worked on by at most one worker at a time. A table that is submitted meanwhile is worked on
again afterwards, so no wake-up is lost.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from processor.postgres.sinks import SinkSession
from processor.postgres.table_work import TableWork

CANCELS_MAX_S = 4.0
"""A sink that hangs takes a while to refuse each of many cancel requests: after this, the connections are cut."""
CLOSE_CANCEL_AFTER_S = 0.5
"""How long the sink may take to finish what it is doing when the pool is closed."""


class WorkerPool:
    """See the module. Any thread."""

    def __init__(self, new_session: Callable[[], SinkSession], count: int, crashed: Callable[[BaseException], None]) -> None:
        self._new_session = new_session
        self._crashed = crashed
        self._condition = threading.Condition()
        self._ready: deque[TableWork] = deque()
        self._running: set[TableWork] = set()
        self._timers: list[tuple[float, int, TableWork]] = []
        self._numbers = itertools.count()
        self._is_closing = False
        self._sessions: list[SinkSession] = []
        self._threads = [
            threading.Thread(target=self._run, name=f"postgres-sink-{number}", daemon=True) for number in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, table: TableWork) -> None:
        """Have the table worked on soon."""
        with self._condition:
            if not self._is_closing:
                self._schedule(table)

    def submit_later(self, table: TableWork, delay_s: float) -> None:
        """Have the table worked on after delay_s."""
        with self._condition:
            heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), table))
            self._condition.notify()

    def submit_waiting(self, tables: Iterable[TableWork]) -> None:
        """Submit every table that can write, in case that a wake-up was missed."""
        for table in tables:
            if table.queue.is_writing and not table.is_scheduled and table.queue.has_next:
                self.submit(table)

    def close(self) -> None:
        """Stop the workers; return when none of them can write."""
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        if self._threads[0].ident is None:
            return
        self._join(CLOSE_CANCEL_AFTER_S)
        cancel_until = time.monotonic() + CANCELS_MAX_S
        for session in list(self._sessions):
            if self._is_alive and time.monotonic() < cancel_until:
                session.cancel()
        self._join(CLOSE_CANCEL_AFTER_S)
        while self._is_alive:
            for session in list(self._sessions):
                session.cut()  # the server does not even cancel
            self._join(CLOSE_CANCEL_AFTER_S)

    @property
    def _is_alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _join(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        session = self._new_session()
        self._sessions.append(session)
        try:
            session.warm()
            while (table := self._next()) is not None:
                self._end(table, table.step(session))
        except BaseException as error:
            self._crashed(error)
            raise
        finally:
            session.close()

    def _schedule(self, table: TableWork) -> None:
        """Make the table ready, or, if it is being worked on, have it worked on again; inside the lock."""
        if not table.is_scheduled:
            table.is_scheduled = True
            if table not in self._running:
                self._ready.append(table)
                self._condition.notify()

    def _next(self) -> TableWork | None:
        with self._condition:
            while not self._is_closing:
                now = time.monotonic()
                while self._timers and self._timers[0][0] <= now:
                    self._schedule(heapq.heappop(self._timers)[2])
                if self._ready:
                    table = self._ready.popleft()
                    table.is_scheduled = False
                    self._running.add(table)
                    return table
                self._condition.wait(self._timers[0][0] - now if self._timers else None)
        return None

    def _end(self, table: TableWork, again: bool) -> None:
        with self._condition:
            self._running.discard(table)
            if (again or table.is_scheduled) and not self._is_closing:
                table.is_scheduled = True
                self._ready.append(table)
                if len(self._ready) > 1:
                    self._condition.notify()
