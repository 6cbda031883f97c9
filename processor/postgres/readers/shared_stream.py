"""The shared stream: each (processor, changefeed) has one, which delivers changes to all of its tables; a second one has text
values for the tables that need them, if there are any (SharedStreams).

It starts at the changefeed's slot when the first table is added, so that tables which begin there need
no stream of their own. No single table stops it: a table without a writer loses its oldest changes, and
one whose writer is much slower than the others is given up after SLOW_TABLE_PATIENCE_S; both are read
again by a catch-up stream. The stream only waits if the sink as a whole is the bottleneck.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from processor.postgres.readers.stream import ChangeStream, StreamContext, StreamTable, table_key
from processor.postgres.source.pgoutput import Part
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts

SLOW_TABLE_PATIENCE_S = 1.0
"""How long a full queue may block the stream while other tables have nothing to do."""
SPACE_WAIT_S = 0.02
BUSY_SHARE = 4
"""Another table counts as busy if it holds at least 1/BUSY_SHARE of what the full one holds."""


class SharedStream(ChangeStream):
    """See the module. `attach` and `detach` may be called by any thread; they take effect at a transaction boundary."""

    def __init__(self, context: StreamContext, is_binary: bool = True) -> None:
        super().__init__("shared", context, is_binary)
        self._requests: deque[tuple[bool, StreamTable]] = deque()
        self._waited_s: dict[int, float] = {}

    def attach(self, table: StreamTable) -> None:
        """Deliver everything that is committed after some boundary (queue.streamed_floor) to this table."""
        self._requests.append((True, table))
        self.interrupt()

    def detach(self, table: StreamTable) -> None:
        """Stop delivering to this table soon."""
        self._requests.append((False, table))
        self.interrupt()

    def _started(self, start_ts: Ts) -> None:
        """Have all tables read again if the changefeed's slot has passed this stream after a long loss.

        If a table still needs those changes, its catch-up stream will report that they are gone.
        """
        if start_ts > self.position:
            for table in self._inboxes.values():
                table.queue.drop_streamed(start_ts)

    def _fail_all(self, error: OperatingError) -> None:
        if self.has_failed:
            self._duties()  # tables that are being attached fail too
        super()._fail_all(error)

    def _duties(self) -> bool:
        while self._requests:
            is_attach, table = self._requests.popleft()
            key = table_key(table.table_id)
            if is_attach:
                self._inboxes[key] = table
                self._delivered.pop(key, None)  # an earlier queue of this table has it, this one has not
                table.queue.attach_streamed(self.position)
                table.notify()
            elif self._inboxes.get(key) is table:
                del self._inboxes[key]
                self._delivered.pop(key, None)
        return True

    def _deliver(self, table: StreamTable, parts: Sequence[Part], size: int) -> None:
        queue = table.queue
        started = 0.0
        while not queue.push_streamed(parts, size):
            now = time.monotonic()
            if not started:
                started = now
                if queue.held_bytes < self._context.queue_max_bytes // 2:
                    self._waited_s.pop(table.table_id, None)
            waited_s = self._waited_s.get(table.table_id, 0.0) + now - started
            if self._stopping.is_set():
                queue.drop_streamed(parts[-1].end_ts)  # otherwise an empty queue would mean that this transaction is done
                return
            if waited_s > SLOW_TABLE_PATIENCE_S and self._is_alone_slow(table):
                self._waited_s.pop(table.table_id, None)
                queue.drop_streamed(parts[-1].end_ts)
                break
            if self._context.budget.is_exhausted:
                self._reclaim(parts[-1])
            queue.wait_for_space(SPACE_WAIT_S)
            self._stay_alive()
        else:
            if started:
                self._waited_s[table.table_id] = self._waited_s.get(table.table_id, 0.0) + time.monotonic() - started
        table.notify()

    def _is_alone_slow(self, table: StreamTable) -> bool:
        """Return whether there are other tables, and none of them waits for the sink to a comparable degree."""
        others = [other.queue for other in self._inboxes.values() if other is not table]
        mark = table.queue.held_bytes // BUSY_SHARE
        return bool(others) and not any(queue.is_open and queue.held_bytes >= mark for queue in others)

    def _reclaim(self, delivering: Part) -> None:
        """Empty the largest queue without a writer, since all queues together hold too much.

        The transaction that is being delivered counts as delivered to it: it may be in that queue
        already, and `position` passes it when the delivery ends.
        """
        idle = [table for table in self._inboxes.values() if not (table.queue.is_open and table.queue.is_covered)]
        largest = max(idle, key=lambda table: table.queue.held_bytes, default=None)
        if largest is not None and largest.queue.held_bytes:
            largest.queue.close_catch_up()
            largest.queue.drop_streamed(delivering.end_ts)
            self._delivered[table_key(largest.table_id)] = delivering.transaction.commit_ts

    def _oversize(self, key: bytes, table: StreamTable) -> bool:
        if self._context.budget.is_exhausted:
            self._give_up(key, table)
            return True
        return super()._oversize(key, table)

    def _skip_at_commit(self, table: StreamTable, end_ts: Ts) -> None:
        table.queue.drop_streamed(end_ts)
        table.notify()


class SharedStreams:
    """The shared streams of one executor. The control thread, unless noted otherwise."""

    def __init__(self) -> None:
        self._streams: dict[bool, SharedStream] = {}
        """By whether it is for tables that need text."""

    @property
    def running(self) -> list[SharedStream]:
        """Return all that were started. Any thread."""
        return list(self._streams.values())

    def position(self, table: StreamTable) -> Ts:
        """Return the position of this table's stream, 0 if there is none. Any thread."""
        stream = self._streams.get(table.needs_text)
        return stream.position if stream is not None else 0

    @property
    def read_ts(self) -> Ts:
        """Up to where all of them have read. Any thread."""
        return min((stream.position for stream in self.running), default=0)

    @property
    def latest_ts(self) -> Ts:
        """Up to where one of them has read. Any thread."""
        return max((stream.position for stream in self.running), default=0)

    def drop_failed(self) -> None:
        """Forget the streams that the source has refused: new ones may be tried."""
        for needs_text in [key for key, stream in self._streams.items() if stream.has_failed]:
            del self._streams[needs_text]

    def stop(self) -> None:
        """End all of them, and forget them."""
        for stream in self.running:
            stream.stop()
        self._streams = {}

    def attach(self, table: StreamTable) -> None:
        """Attach a table if its stream is running; otherwise `start` will."""
        if (stream := self._streams.get(table.needs_text)) is not None:
            stream.attach(table)

    def detach(self, table: StreamTable) -> None:
        """Stop delivering to this table soon. Any thread."""
        if (stream := self._streams.get(table.needs_text)) is not None:
            stream.detach(table)

    def start(self, context: StreamContext, tables: Sequence[StreamTable]) -> None:
        """Start the streams of these tables that are not running."""
        for needs_text in {table.needs_text for table in tables} - self._streams.keys():
            stream = self._streams[needs_text] = SharedStream(context, is_binary=not needs_text)
            for table in tables:
                if table.needs_text == needs_text:
                    stream.attach(table)
            stream.thread.start()
