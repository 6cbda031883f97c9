"""Catch-up streams: they read tables again that need earlier changes than the shared stream delivers.

One stream serves a group of tables from their lowest cursor, and ends when all of them have caught up. A
stream for a single table (solo) also delivers transactions that are larger than the table's queue, in
pieces and at the pace of its writer. A table that blocks its group is removed from it, and gets its own
stream later. Each stream uses a walsender and a slot, so their number is limited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from processor.postgres.readers.stream import ChangeStream, StreamContext, StreamTable, table_key
from processor.postgres.source.pgoutput import Part
from processor.postgres.tables.queues import TableQueue
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.lsn import format_lsn

GROUP_PATIENCE_S = 0.5
SPACE_WAIT_S = 0.02
REPORT_INTERVAL_S = 0.01


class CatchUpStream(ChangeStream):
    """See the module.

    serves_preparing: all tables only prepare. ended: called once by the stream's thread, with the tables
    that need a stream of their own.
    """

    def __init__(
        self,
        context: StreamContext,
        tables: Sequence[StreamTable],
        serves_preparing: bool,
        ended: Callable[[CatchUpStream, Sequence[StreamTable]], None],
    ) -> None:
        super().__init__("catchup", context, is_binary=not any(table.needs_text for table in tables))
        self.tables = tuple(tables)
        self.serves_preparing = serves_preparing
        self._is_solo = len(tables) == 1
        self._ended = ended
        self._slow: list[StreamTable] = []
        self._reported_at = 0.0
        self._reported_ts: Ts = 0
        self.position = max(min(table.queue.cursor for table in tables), context.created_ts)
        for table in tables:
            self._inboxes[table_key(table.table_id)] = table
            table.queue.open_catch_up(min(self.position, table.queue.cursor))

    def release(self, table: StreamTable) -> None:
        """Stop serving a table that is being removed. Any thread."""
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

    def _started(self, start_ts: Ts) -> None:
        """Fail a writer that needs what the source no longer keeps; a preparing table may be granted a later start."""
        for key, table in list(self._inboxes.items()):
            queue = table.queue
            if queue.received_position >= start_ts:
                continue
            self._inboxes.pop(key, None)
            if queue.is_open:
                text = f"the source has kept changes only from {format_lsn(start_ts)} on, but they are needed from"
                table.fail(OperatingError(f"table {table.table_id}: {text} {format_lsn(queue.cursor)} on; copy it again"))
            queue.lose_transaction()
            table.notify()

    def _duties(self) -> bool:
        self._report_position()
        for key, table in list(self._inboxes.items()):
            if _is_done(table.queue):
                self._inboxes.pop(key, None)
                table.queue.end_catch_up()
                table.notify()
        return bool(self._inboxes)

    def _moved(self) -> None:
        if time.monotonic() - self._reported_at >= REPORT_INTERVAL_S:
            self._report_position()

    def _report_position(self) -> None:
        """Report the position to all tables of the group; not at every commit, since there may be many."""
        self._reported_at = time.monotonic()
        if self.position == self._reported_ts:
            return
        self._reported_ts = self.position
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
                queue.close_catch_up()  # what follows must be read again
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
            return super()._oversize(key, table)
        self._close_part(key)
        if parts := self._parts.pop(key, []):
            self._handed_on.add(key)
            self._deliver(table, parts, sum(part.size for part in parts))
        return True

    def _give_up(self, key: bytes, table: StreamTable) -> None:
        super()._give_up(key, table)
        self._set_aside(table)


def _is_done(queue: TableQueue) -> bool:
    """Return whether the queue needs nothing more from this stream.

    A queue with a writer is done when it takes from the streamed lane, which may lose its oldest changes
    until then. One that is not covered has given its catch-up lane up.
    """
    return queue.is_joined or not queue.is_covered or (not queue.is_open and queue.is_caught_up)
