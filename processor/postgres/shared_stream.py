"""The shared stream: one a (processor, changefeed), gives every table of this processor its changes.

It starts where the changefeed's slot stands when the first table is added, so that tables which begin there need no stream of
their own. It stops for nobody: a table that nobody writes loses its oldest changes, and one whose writer is much slower than the
rest is set aside after SLOW_TABLE_PATIENCE_S; both are read again by a catch-up stream. Only when the sink as a whole is the
bottleneck does the stream wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from processor.postgres.queues import Budget
from processor.postgres.stream import ChangeStream, Connect, StreamTable, table_key
from processor.postgres.wire import Part
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts

SLOW_TABLE_PATIENCE_S = 1.0
"""How long a full queue may hold up the stream while other tables have nothing to do."""
SPACE_WAIT_S = 0.02
BUSY_SHARE = 4
"""Another table counts as busy too when it holds at least 1/BUSY_SHARE of what the full one holds."""


class SharedStream(ChangeStream):
    """See the module. `attach` and `detach` may be called by any thread; they take effect at a transaction boundary."""

    def __init__(
        self,
        connect: Connect,
        publication: str,
        binary: bool,
        error_after_s: float,
        budget: Budget,
        queue_max_bytes: int,
        created_ts: Ts,
    ) -> None:
        """created_ts: where the publication existed for sure; no position before it may be read."""
        super().__init__("shared", connect, publication, binary, error_after_s)
        self._budget = budget
        self._queue_max_bytes = queue_max_bytes
        self._created_ts = created_ts
        self._requests: list[tuple[bool, StreamTable]] = []
        self._requests_lock = threading.Lock()
        self._waited_s: dict[int, float] = {}

    def attach(self, table: StreamTable) -> None:
        """The table gets all that is committed from some boundary on (queue.streamed_floor)."""
        with self._requests_lock:
            self._requests.append((True, table))
        self.interrupt()

    def detach(self, table: StreamTable) -> None:
        """The table gets nothing any more; soon."""
        with self._requests_lock:
            self._requests.append((False, table))
        self.interrupt()

    def _start_ts(self) -> Ts:
        return max(self.position, self._created_ts)

    def _started(self, start_ts: Ts) -> None:
        """After a long loss the changefeed's slot may have passed us: tables that we served are behind (none may need those
        changes, and the catch-up stream says so if one does)."""
        if start_ts > self.position:
            for table in self._inboxes.values():
                table.queue.drop_streamed(start_ts)

    def _fail_all(self, error: OperatingError) -> None:
        if self.has_failed:
            self._duties()  # tables that are on their way in fail too
        super()._fail_all(error)

    def _duties(self) -> bool:
        with self._requests_lock:
            requests, self._requests = self._requests, []
        for is_attach, table in requests:
            key = table_key(table.table_id)
            if is_attach:
                self._inboxes[key] = table
                self._delivered.pop(key, None)  # an earlier queue of this table got it, this one did not
                table.queue.attach_streamed(self.position)
                table.notify()
            elif self._inboxes.get(key) is table:
                del self._inboxes[key]
                self._delivered.pop(key, None)
        return True

    def _broke(self) -> None:
        """Queues stay valid: the next connection goes on behind the last whole transaction."""

    def _deliver(self, table: StreamTable, parts: Sequence[Part], size: int) -> None:
        queue = table.queue
        started = 0.0
        while not queue.push_streamed(parts, size):
            now = time.monotonic()
            if not started:
                started = now
                if queue.held_bytes < self._queue_max_bytes // 2:
                    self._waited_s.pop(table.table_id, None)
            waited_s = self._waited_s.get(table.table_id, 0.0) + now - started
            if self._stopping.is_set():
                queue.drop_streamed(parts[-1].end_ts)  # else an empty queue would say that this transaction is done
                return
            if waited_s > SLOW_TABLE_PATIENCE_S and self._is_alone_slow(table):
                self._waited_s.pop(table.table_id, None)
                queue.drop_streamed(parts[-1].end_ts)
                break
            if self._budget.is_exhausted:
                self._reclaim(parts[-1])
            queue.wait_for_space(SPACE_WAIT_S)
            self._stay_alive()
        else:
            if started:
                self._waited_s[table.table_id] = self._waited_s.get(table.table_id, 0.0) + time.monotonic() - started
        table.notify()

    def _is_alone_slow(self, table: StreamTable) -> bool:
        """Other tables are served here, and none of them waits for the sink in a comparable way."""
        others = [other.queue for other in self._inboxes.values() if other is not table]
        mark = table.queue.held_bytes // BUSY_SHARE
        return bool(others) and not any(queue.is_writing and queue.held_bytes >= mark for queue in others)

    def _reclaim(self, delivering: Part) -> None:
        """Queues together hold too much: the largest one that nobody takes from is emptied. The transaction that is being
        delivered counts as given: it may be in that queue already, and `position` passes it when the delivery ends."""
        idle = [table for table in self._inboxes.values() if not (table.queue.is_writing and table.queue.is_covered)]
        largest = max(idle, key=lambda table: table.queue.held_bytes, default=None)
        if largest is not None and largest.queue.held_bytes:
            largest.queue.close_catch_up()
            largest.queue.drop_streamed(delivering.end_ts)
            self._delivered[table_key(largest.table_id)] = delivering.transaction.commit_ts

    def _oversize(self, key: bytes, table: StreamTable) -> bool:
        if self._held(key) <= self._queue_max_bytes and not self._budget.is_exhausted:
            return False
        self._give_up(key, table)
        return True

    def _give_up(self, key: bytes, table: StreamTable) -> None:
        self._skipped.add(key)

    def _skip_at_commit(self, table: StreamTable, end_ts: Ts) -> None:
        table.queue.drop_streamed(end_ts)
        table.notify()
