"""TableWork: one table between its readers and its sink. Its life is the table of rules in life.py; this is the code around it.

Three kinds of threads meet here: the agent's (asks and answers, never waits), those of the streams (push
into the queue and notify), and one worker (steps.py) or copy at a time, which uses the sink. `_lock`
guards the life, and is never held during a wait.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from processor.postgres.sinks import Fence, ReloadNeededError, SinkUnavailableError, WaitsForTableError, WriteNotAllowedError
from processor.postgres.source.shape_watch import PendingChange
from processor.postgres.tables.ends import End, copy_due, retry_after, settled
from processor.postgres.tables.life import (
    ADVANCING,
    BEGINNING,
    COPY_STATES,
    ENDED,
    FAILED,
    LEAVING,
    NO_RETRY,
    WRITERS,
    Data,
    Described,
    Failure,
    Gate,
    Grant,
    Leaving,
    Life,
    State,
    TableInput,
    Writer,
    after,
)
from processor.postgres.tables.queues import TableQueue
from tablewire.errors import OperatingError
from tablewire.model.ids import TS_MAX, Ts
from tablewire.model.progress import Checkpoint, Stats, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import SourceUnavailableError
from tablewire.runtime.backoff import Backoff

RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
NOT_ALLOWED_RETRY_S = 0.1
TABLE_RETRY_S = 0.5
"""Wait at most this long until another table is written as far as a foreign key requires. Every second attempt takes one source
transaction (the other table is not as far as the whole batch), the others many (it is further than the first one)."""
GATHER_SHARE = 4
"""In a backlog, a worker waits a moment for a batch of 1/GATHER_SHARE of the largest size: each batch costs the sink a commit."""


@dataclass(frozen=True, slots=True)
class TableServices:
    """What a table needs of its executor. Any thread may call these; none of them waits.

    submit: have a worker call `step` soon; submit_later: after some seconds. wake_agent: a state has
    changed. wake_control: the table waits for a stream or a copy. released: the table stops, and streams
    may forget it. shared_position: of the table's shared stream. pending_change: what the source has changed
    about the table, which the sink has not followed.
    """

    batch_max_bytes: int
    error_after_s: float
    wants_snapshot: bool
    submit: Callable[[TableWork], None]
    submit_later: Callable[[TableWork, float], None]
    wake_agent: Callable[[], None]
    wake_control: Callable[[], None]
    released: Callable[[TableWork], None]
    shared_position: Callable[[TableWork], Ts]
    pending_change: Callable[[TableWork], PendingChange | None] = lambda _: None


class TableWork:
    """See the module.

    is_scheduled: owned by the pool, under its lock. needs_solo, needs_text: owned by the control thread:
    catch up alone; read text values. verified_ts: up to where its shape is known to be the one that the
    sink has, its name included; the reported checkpoint never passes it; set by the control thread.
    fence_wanted: of the next takeover. barrier_ts: nothing that ends after it is written.
    last_synced_ts: what the sink has confirmed.
    """

    def __init__(self, span: Span, queue: TableQueue, services: TableServices) -> None:
        self.span = span
        self.table_id = span.table_id
        self.queue = queue
        self.is_scheduled = False
        self.needs_solo = False
        self.needs_text = False
        self.verified_ts: Ts = TS_MAX
        self.rows_written = 0
        self.bytes_written = 0
        self.snapshot_rows = 0
        self.copy_delays = 0
        self.services = services
        self.fence_wanted: Fence | None = None
        self.barrier_ts: Ts = TS_MAX
        self.last_synced_ts: Ts = 0
        self.gather_bytes = services.batch_max_bytes // GATHER_SHARE
        self._lock = threading.Lock()
        self._life = BEGINNING
        self._reported_ts: Ts = queue.cursor
        self.takes_one = False
        """The next batch is one source transaction."""
        self._backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        self._rates = (time.monotonic(), 0, 0)

    # --- the life, any thread ----------------------------------------------------------------------------------------

    @property
    def life(self) -> Life:
        return self._life

    @property
    def state(self) -> TableState:
        """The state that the agent reports."""
        return self._life.reported

    @property
    def error(self) -> Exception | None:
        data = self._life.data
        return data.error if isinstance(data, Failure) else None

    @property
    def schema(self) -> TableSchema | None:
        data = self._life.data
        return data.schema if isinstance(data, Described | Grant | Writer) else None

    @property
    def writer(self) -> Writer | None:
        """The right to write, None if there is none, or no longer."""
        data = self._life.data
        return data if isinstance(data, Writer) else None

    def _move(self, what: TableInput, data: Data | None = None) -> bool:
        """Apply an input; return whether it changed anything. Inside the lock."""
        before = self._life
        life, gate = after(before, what, data)
        if life is before:
            return False
        if life.state in ENDED:
            self._report()
        self._life = life
        if gate is Gate.OPEN:
            self.queue.open_for_writing()
        elif gate is Gate.PAUSE:
            self.queue.pause_writing()
        elif gate is Gate.CLOSE:
            self.queue.close()
        return True

    def describe(self, schema: TableSchema) -> bool:
        """Set the shape of a new table; return False if it was removed meanwhile. The control thread."""
        with self._lock:
            return self._move(TableInput.DESCRIBED, Described(schema))

    def replace_schema(self, schema: TableSchema) -> None:
        """Continue with another description of the same table, which was renamed, for example. Any thread."""
        with self._lock:
            if isinstance(self._life.data, Described | Grant | Writer):
                self._life = Life(self._life.state, replace(self._life.data, schema=schema))

    def want_copy(self, reason: ReloadNeededError) -> bool:
        """Have the table copied again; return False if nothing of it was written yet, or if it ends. Any thread.

        A worker first records that at the sink. Until the copy is durable, the checkpoint stays where it is.
        """
        with self._lock:
            data = self._life.data
            if isinstance(data, Writer):
                if self._life.state is State.AWAITING_COPY:
                    data = replace(data, copy_after=time.monotonic())
                else:
                    self._report()
                    data = replace(data, copy_wanted=reason)
            is_accepted = self._move(TableInput.WANT_COPY, data)
        if is_accepted:
            self.services.submit(self)
        return is_accepted

    def fail(self, error: Exception) -> None:
        """Stop the table with an error; the agent sees it in the status, and removes the table. Any thread."""
        with self._lock:
            self._move(TableInput.FAIL, self._failure(error))
        self.services.wake_agent()

    def _failure(self, error: Exception) -> Failure:
        return Failure(error, self._life.reported, self._life.has_position)

    # --- the agent's thread ------------------------------------------------------------------------------------------

    def set_epoch(self, fence: Fence) -> None:
        """Set the fence of the next takeover; a table that writes takes over again with it."""
        with self._lock:
            if self.fence_wanted is None or fence > self.fence_wanted:
                self.fence_wanted = fence
        if self._life.state in WRITERS:
            self.services.submit(self)

    def promote(self, granted_ts: Ts) -> bool:
        """Begin phase two; return False while the table is not prepared."""
        with self._lock:
            data = self._life.data
            is_new = self._move(TableInput.GRANT, Grant(data.schema, granted_ts) if isinstance(data, Described) else None)
            is_granted = isinstance(self._life.data, Grant | Writer)
        if is_new:
            self.services.submit(self)
        return is_granted

    def remove(self) -> None:
        """Stop the table as soon as no worker or copy uses it."""
        with self._lock:
            if not self._move(TableInput.REMOVE, Leaving(self._life.has_position)):
                return
        self.services.released(self)
        self.services.wake_agent()

    def set_barrier(self, barrier_ts: Ts) -> None:
        is_lifted = barrier_ts > self.barrier_ts
        self.barrier_ts = barrier_ts
        if is_lifted and self._life.state in ADVANCING:
            self.services.submit(self)

    def status(self, collect_stats: bool) -> TableStatus:
        """Return the status; raise the error of a table that has failed."""
        if (error := self.error) is not None:
            raise error.with_traceback(None)
        checkpoint = self.checkpoint()
        return TableStatus(self.span, self.state, checkpoint, self._stats(checkpoint) if collect_stats else None)

    def checkpoint(self) -> Checkpoint:
        with self._lock:
            checkpoint_ts = self._report()
        queue = self.queue
        received_ts = self.services.shared_position(self) if queue.is_caught_up else queue.received_position
        return Checkpoint(checkpoint_ts, max(checkpoint_ts, received_ts), self.last_synced_ts)

    def _report(self) -> Ts:
        """Return the checkpoint, which never decreases; inside the lock."""
        if self._life.has_position:
            if self._life.state in ADVANCING:
                done_ts = self.queue.idle_position(self.services.shared_position(self))
            else:
                # The streams may have forgotten the table already: an empty queue means nothing.
                done_ts = self.queue.cursor
            done_ts = min(done_ts, self.verified_ts, max(self.barrier_ts, self.last_synced_ts))
            self._reported_ts = max(self._reported_ts, done_ts)
        return self._reported_ts

    def _stats(self, checkpoint: Checkpoint) -> Stats:
        now = time.monotonic()
        since, rows, size = self._rates
        seconds = max(now - since, 0.001)
        self._rates = (now, self.rows_written, self.bytes_written)
        received = checkpoint.resolved_ts
        stages = {"puller": Checkpoint(received, received), "sink": checkpoint}
        if self._life.state in COPY_STATES:
            stages["snapshot"] = checkpoint
        return Stats((self.rows_written - rows) / seconds, (self.bytes_written - size) / seconds, stages)

    # --- streams and the control thread ------------------------------------------------------------------------------

    @property
    def is_new(self) -> bool:
        """It must be described and attached to the shared stream."""
        return self._life.state is State.DESCRIBING

    @property
    def is_followed(self) -> bool:
        """The shared stream delivers to it, and must."""
        return self._life.state is not State.DESCRIBING and self._life.state not in ENDED

    @property
    def is_leaving(self) -> bool:
        return self._life.state in LEAVING

    @property
    def is_preparing(self) -> bool:
        return self._life.state in (State.DESCRIBING, State.PREPARING)

    @property
    def is_troubled(self) -> bool:
        """The last attempt of a worker or a copy failed."""
        data = self._life.data
        return isinstance(data, Grant | Writer) and data.retry.since is not None

    @property
    def waits_for_copy(self) -> bool:
        life = self._life
        if life.state is not State.AWAITING_COPY or not isinstance(life.data, Writer):
            return False
        return not life.data.is_unsure and time.monotonic() >= life.data.retry.at

    @property
    def waits_for_copy_since(self) -> float:
        """Monotonic seconds; infinity if it does not wait for a copy."""
        data = self._life.data
        return data.copy_after if self.waits_for_copy and isinstance(data, Writer) else math.inf

    @property
    def waits_for_catch_up(self) -> bool:
        """Changes after the cursor must be read by a catch-up stream."""
        queue = self.queue
        state = self._life.state
        if queue.streamed_floor is None or queue.is_covered:
            return False
        if state is State.PREPARING:
            return not queue.overflows
        return state in ADVANCING and queue.is_open

    def notify(self) -> None:
        """Handle that something was pushed, or that a lane has advanced."""
        if self.queue.is_open:
            is_gathering = self._life.state is State.GATHERING and self.queue.held_bytes < self.gather_bytes
            if not self.is_scheduled and not is_gathering:
                self.services.submit(self)
        elif self._life.state is State.PREPARING:
            self._check_prepared()

    def _check_prepared(self) -> None:
        queue = self.queue
        if queue.streamed_floor is None:
            return
        if not queue.is_caught_up and not queue.overflows:
            self.services.wake_control()
            return
        with self._lock:
            is_prepared = self._move(TableInput.CAUGHT_UP)
        if is_prepared:
            self.services.wake_agent()

    # --- a worker's thread -------------------------------------------------------------------------------------------

    def begin_step(self) -> tuple[TableInput, State] | None:
        """Begin a step; return how, and in which state. None: there is nothing to do, or not yet."""
        with self._lock:
            state, data = self._life.state, self._life.data
            if isinstance(data, Grant | Writer) and data.retry is not NO_RETRY:
                wait_s = data.retry.at - time.monotonic()
                if wait_s > 0:
                    self.services.submit_later(self, wait_s)
                    return None
            what = TableInput.TAKE_OVER
            if isinstance(data, Writer) and data.fence == self.fence_wanted:
                is_copy_unsure = state is State.AWAITING_COPY and data.is_unsure
                what = TableInput.TAKE_OVER if is_copy_unsure else TableInput.WRITE
            return (what, state) if self._move(what) else None

    def end_work(self, end: End) -> None:
        with self._lock:
            before = self._life
            data = before.data
            if isinstance(data, Grant | Writer):
                if end.start_ts is not None:
                    self.queue.start_at(end.start_ts)
                if end.start_ts is not None and isinstance(data, Grant):
                    self._reported_ts = end.start_ts
                self._move(end.what, end.data(data))
            else:
                self._move(end.what)
            life = self._life
        if end.what is TableInput.DONE:
            self._backoff.reset()
            self.takes_one = False
        if life.reported is not before.reported or life.state in FAILED:
            self.services.wake_agent()
        if end.delay_s is not None and life.state not in ENDED:
            self.services.submit_later(self, end.delay_s)
        if life.state is State.AWAITING_COPY or end.start_ts is not None:
            self.services.wake_control()

    def end_after(self, error: OperatingError, copy_wanted: ReloadNeededError | None = None) -> End:
        """Retry a temporary error, without showing it for error_after_s; all others are the table's own."""
        if isinstance(error, WriteNotAllowedError):
            return retry_after(NOT_ALLOWED_RETRY_S, None, False, copy_wanted)
        if isinstance(error, SinkUnavailableError | SourceUnavailableError):
            data = self._life.data
            now = time.monotonic()
            since = data.retry.since if isinstance(data, Grant | Writer) else None
            since = now if since is None else since
            if now - since <= self.services.error_after_s:
                delay_s = self._backoff.next_s()
                if isinstance(error, WaitsForTableError):
                    delay_s = min(delay_s, TABLE_RETRY_S)
                    self.takes_one = not self.takes_one
                return retry_after(delay_s, since, isinstance(error, SinkUnavailableError), copy_wanted)
        return End(TableInput.ERROR, lambda _: self._failure(error))

    def count(self, rows: int, size: int, end_ts: Ts) -> None:
        """Note what was written. end_ts: of the last transaction."""
        self.rows_written += rows
        self.bytes_written += size
        self.last_synced_ts = end_ts

    # --- a copy's thread ---------------------------------------------------------------------------------------------

    def begin_copy(self, requested_at: float) -> Writer | None:
        """Claim the table for a copy; return None if it no longer needs one, or needs a newer snapshot.

        requested_at: when the snapshot was requested, in monotonic seconds.
        """
        with self._lock:
            data = self._life.data
            if isinstance(data, Writer) and data.copy_after >= requested_at:
                return None
            return data if self._move(TableInput.COPY) and isinstance(data, Writer) else None

    def watch_copy(self, chunks: Iterator[tuple[bytes, int]]) -> Iterator[bytes]:
        """Yield the chunks and count their rows; raise WriteNotAllowedError if the table must stop."""
        self.snapshot_rows = 0
        for chunk, rows in chunks:
            if self._life.state is not State.COPYING:
                raise WriteNotAllowedError("the table stops")
            self.snapshot_rows += rows
            self.rows_written += rows
            self.bytes_written += len(chunk)
            yield chunk

    def end_copy(self, position: Ts) -> None:
        """Continue with the changes after `position`: the copy is durable."""
        self.last_synced_ts = position
        self.end_work(End(TableInput.DONE, settled, start_ts=max(position, self.queue.cursor)))
        self.services.submit(self)

    def delay_copy(self) -> None:
        """Wait for the next snapshot: this one no longer fits the table."""
        self.copy_delays += 1
        self.end_work(copy_due())

    def fail_copy(self, error: OperatingError) -> None:
        """Have the copy repeated if the error is temporary, else fail the table."""
        self.end_work(self.end_after(error))
