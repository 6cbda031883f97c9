"""WorkerPool: a fixed number of threads, each with a session of the sink, that do `step` after step for tables with work.

A table is worked on by at most one worker at a time. A table that is submitted meanwhile is worked on
again afterwards, so no wake-up is lost. Tables whose last attempt failed, which may wait for a lock at the
sink until a timeout, occupy at most half of the workers.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from processor.postgres.sinks import SinkSession
from processor.postgres.tables.steps import step
from processor.postgres.tables.table_work import TableWork
from processor.postgres.tables.threads import new_thread


class WorkerPool:
    """See the module. Any thread."""

    def __init__(self, new_session: Callable[[], SinkSession], count: int, crashed: Callable[[BaseException], None]) -> None:
        self._condition = threading.Condition()
        self._ready: deque[TableWork] = deque()
        self._running: set[TableWork] = set()
        self._troubled: set[TableWork] = set()
        """Those that are running, and whose last attempt failed."""
        self._troubled_max = max(1, count // 2)
        self._timers: list[tuple[float, int, TableWork]] = []
        self._numbers = itertools.count()
        self._is_closing = False
        self.sessions = [new_session() for _ in range(count)]
        self.threads = [
            new_thread(f"postgres-sink-{number}", partial(self._run, session), crashed)
            for number, session in enumerate(self.sessions)
        ]

    def submit(self, table: TableWork) -> None:
        with self._condition:
            if not self._is_closing:
                self._schedule(table)

    def submit_later(self, table: TableWork, delay_s: float) -> None:
        with self._condition:
            heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), table))
            self._condition.notify()

    def submit_waiting(self, tables: Iterable[TableWork]) -> None:
        """Submit every table that can write, in case that a wake-up was missed."""
        for table in tables:
            if table.queue.is_open and not table.is_scheduled and table.queue.has_next:
                self.submit(table)

    def stop(self) -> None:
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()

    def _run(self, session: SinkSession) -> None:
        try:
            session.warm()
            while (table := self._next()) is not None:
                self._end(table, step(table, session))
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
                if (table := self._pop()) is not None:
                    table.is_scheduled = False
                    self._running.add(table)
                    return table
                self._condition.wait(self._timers[0][0] - now if self._timers else None)
        return None

    def _pop(self) -> TableWork | None:
        """Return the next table that may be worked on now; inside the lock."""
        for at, table in enumerate(self._ready):
            if table.is_troubled:
                if len(self._troubled) >= self._troubled_max:
                    continue
                self._troubled.add(table)
            del self._ready[at]
            return table
        return None

    def _end(self, table: TableWork, again: bool) -> None:
        with self._condition:
            self._running.discard(table)
            if table in self._troubled:
                self._troubled.discard(table)
                self._condition.notify()  # another one may have been passed over
            if (again or table.is_scheduled) and not self._is_closing:
                table.is_scheduled = True
                self._ready.append(table)
                if len(self._ready) > 1:
                    self._condition.notify()
