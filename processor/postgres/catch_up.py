"""Catch-up streams: they read tables again that need changes from before what the shared stream gives them.

One stream serves a group of tables from the least of their cursors, and ends when all of them have caught up. A stream that
serves a single table (solo) also hands on transactions larger than the table's queue, piece by piece, at the pace of its writer;
a table that holds up its group is taken out of it and gets a stream of its own later. Each costs a walsender and a slot while it
lasts, so their number is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from processor.postgres.queues import TableQueue
from processor.postgres.stream import ChangeStream, Connect, StreamTable, table_key
from processor.postgres.wire import Part
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.lsn import format_lsn

GROUP_PATIENCE_S = 0.5
SPACE_WAIT_S = 0.02
TELL_INTERVAL_S = 0.01


class CatchUpStream(ChangeStream):
    """See the module. ended: called once by the stream's thread, with the tables that must have a stream of their own."""

    def __init__(
        self,
        connect: Connect,
        publication: str,
        binary: bool,
        error_after_s: float,
        tables: Sequence[StreamTable],
        queue_max_bytes: int,
        created_ts: Ts,
        ended: Callable[[CatchUpStream, Sequence[StreamTable]], None],
    ) -> None:
        super().__init__("catchup", connect, publication, binary, error_after_s)
        self.tables = tuple(tables)
        self._is_solo = len(tables) == 1
        self._queue_max_bytes = queue_max_bytes
        self._ended = ended
        self._slow: list[StreamTable] = []
        self.serves_preparing = False
        """It was begun for tables that only prepare; the executor's word."""
        self._told_at = 0.0
        self._told_ts: Ts = 0
        self.position = max(min(table.queue.cursor for table in tables), created_ts)
        for table in tables:
            self._inboxes[table_key(table.table_id)] = table
            table.queue.open_catch_up(min(self.position, table.queue.cursor))

    def release(self, table: StreamTable) -> None:
        """The table is being removed. Any thread."""
        self._inboxes.pop(table_key(table.table_id), None)
        self.interrupt()

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            for table in list(self._inboxes.values()):
                if not table.queue.is_caught_up:
                    table.queue.close_catch_up()
            self._ended(self, self._slow)

    def _start_ts(self) -> Ts:
        return self.position

    def _started(self, start_ts: Ts) -> None:
        """No writer may need what the changefeed's slot has let go of; a table that prepares may be granted a later start."""
        for key, table in list(self._inboxes.items()):
            queue = table.queue
            if queue.cursor >= start_ts or queue.catch_up_position >= start_ts:
                continue
            self._inboxes.pop(key, None)
            if queue.is_writing:
                text = f"the source has kept changes only from {format_lsn(start_ts)} on, and this table needs them from"
                table.fail(OperatingError(f"table {table.table_id}: {text} {format_lsn(queue.cursor)} on; copy it again"))
            queue.lose_transaction()
            table.notify()

    def _duties(self) -> bool:
        self._tell_position()
        for key, table in list(self._inboxes.items()):
            queue = table.queue
            if _is_done(queue):
                self._inboxes.pop(key, None)
                table.notify()
        return bool(self._inboxes)

    def _moved(self) -> None:
        if time.monotonic() - self._told_at >= TELL_INTERVAL_S:
            self._tell_position()

    def _tell_position(self) -> None:
        """All tables of the group learn how far the stream is; not at every commit, since there may be many tables."""
        self._told_at = time.monotonic()
        if self.position == self._told_ts:
            return
        self._told_ts = self.position
        for table in list(self._inboxes.values()):
            table.queue.move_catch_up(self.position)
            table.notify()

    def _broke(self) -> None:
        for table in list(self._inboxes.values()):
            table.queue.cut_catch_up()

    def _deliver(self, table: StreamTable, parts: Sequence[Part], size: int) -> None:
        queue = table.queue
        waited_until = time.monotonic() + GROUP_PATIENCE_S
        while not queue.push_catch_up(parts, size):
            if self._stopping.is_set() or table_key(table.table_id) not in self._inboxes:
                queue.close_catch_up()  # what is missing from here on must be read again
                return
            if not self._is_solo and time.monotonic() > waited_until:
                self._set_aside(table)
                return
            queue.wait_for_space(SPACE_WAIT_S)
            self._stay_alive()
        table.notify()

    def _set_aside(self, table: StreamTable) -> None:
        self._inboxes.pop(table_key(table.table_id), None)
        self._slow.append(table)
        table.queue.close_catch_up()

    def _oversize(self, key: bytes, table: StreamTable) -> bool:
        if not self._is_solo:
            if self._held(key) <= self._queue_max_bytes:
                return False
            self._give_up(key, table)
            return True
        self._close_part(key)
        parts = self._parts.pop(key, [])
        if parts:
            self._handed_on.add(key)
            self._deliver(table, parts, sum(part.size for part in parts))
        return True

    def _give_up(self, key: bytes, table: StreamTable) -> None:
        self._skipped.add(key)
        self._set_aside(table)


def _is_done(queue: TableQueue) -> bool:
    """A writer has to reach the shared stream's part first: until then it may drop its oldest changes. A queue that is not
    covered has given its gap up, and takes nothing more from this stream."""
    return queue.is_joined or not queue.is_covered or (not queue.is_writing and queue.is_caught_up)
