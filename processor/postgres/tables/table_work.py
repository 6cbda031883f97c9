"""TableWork: one table's life in this executor, from prepared to stopped.

Three kinds of threads meet here: the agent's (asks and answers, never waits), those of the streams
(push into the queue and notify), and one worker at a time (everything that uses the sink). `_lock`
guards the state, and is never held during a wait.

  PREPARING   described at the source, attached to the shared stream, not caught up yet
  PREPARED    caught up (or its queue overflowed without a writer: then it catches up when it writes)
  REPLICATING the takeover at the sink is done; makes its first copy if it needs one, then writes
  STOPPING    no new work is begun; a worker or a copy that is running ends first
  STOPPED     no write can follow
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from processor.postgres.sinks import (
    Fence,
    LostCommitsError,
    ReloadNeededError,
    SinkSession,
    SinkUnavailableError,
    WriteNotAllowedError,
)
from processor.postgres.tables.queues import ChangeBatch, TableQueue
from processor.postgres.tables.writing import write_batch
from tablewire.errors import EpochRefusedError, OperatingError
from tablewire.model.ids import TS_MAX, Ts
from tablewire.model.progress import Checkpoint, Stats, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.connections import SourceUnavailableError
from tablewire.postgres.lsn import format_lsn
from tablewire.runtime.backoff import Backoff

RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
NOT_ALLOWED_RETRY_S = 0.1
PART_WAIT_S = 0.1
GATHER_S = 0.2
GATHER_SHARE = 4
"""In a backlog, wait at most GATHER_S for a batch of 1/GATHER_SHARE of the largest size: each batch costs the sink a commit."""

_RETRIED = (SinkUnavailableError, SourceUnavailableError, WriteNotAllowedError)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TableServices:
    """What a table needs of its executor. Any thread may call these; none of them waits.

    submit: have a worker call `step` soon; submit_later: after some seconds. wake_agent: a state has
    changed. wake_control: the table waits for a stream or a copy. released: the table stops, and streams
    may forget it. shared_position: of the shared stream.
    """

    batch_max_bytes: int
    error_after_s: float
    wants_snapshot: bool
    submit: Callable[[TableWork], None]
    submit_later: Callable[[TableWork, float], None]
    wake_agent: Callable[[], None]
    wake_control: Callable[[], None]
    released: Callable[[TableWork], None]
    shared_position: Callable[[], Ts]


class TableWork:
    """See the module."""

    def __init__(self, span: Span, queue: TableQueue, services: TableServices) -> None:
        self.span = span
        self.table_id = span.table_id
        self.queue = queue
        self.state = TableState.PREPARING
        self.schema: TableSchema | None = None
        self.error: Exception | None = None
        self.fence_wanted: Fence | None = None
        self.is_scheduled = False  # owned by the pool, under its lock
        self.needs_solo = False  # owned by the control thread: catch up alone
        self.is_attached = False  # owned by the control thread: the shared stream has the table
        self.rows_written = 0
        self.bytes_written = 0
        self.snapshot_rows = 0
        self._services = services
        self._lock = threading.Lock()
        self._granted_ts: Ts | None = None
        self._fence_held: Fence | None = None
        self._is_removing = False
        self._is_busy = False
        self._needs_snapshot = False
        self._barrier_ts: Ts = TS_MAX
        self._reported_ts: Ts = queue.cursor
        self._last_synced_ts: Ts = 0
        self._retry_at = 0.0
        self._failing_since: float | None = None
        self._is_unsure = False  # a commit may have succeeded without a reply
        self._backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        self._gathers = False  # waiting a moment for a larger batch
        self._gather_bytes = services.batch_max_bytes // GATHER_SHARE
        self._rates = (time.monotonic(), 0, 0)

    # --- the agent's thread ------------------------------------------------------------------------------------------

    def set_epoch(self, fence: Fence) -> None:
        """Set the fence of the next takeover; a table that writes takes over again with it."""
        with self._lock:
            if self.fence_wanted is None or fence > self.fence_wanted:
                self.fence_wanted = fence
        if self.state is TableState.REPLICATING:
            self._services.submit(self)

    def promote(self, granted_ts: Ts) -> bool:
        """Begin phase two; return False while the table is not prepared."""
        with self._lock:
            if self.state is TableState.REPLICATING or self._granted_ts is not None:
                return True
            if self.state is not TableState.PREPARED or self._is_removing:
                return False
            self._granted_ts = granted_ts
        self._services.submit(self)
        return True

    def remove(self) -> None:
        """Stop the table as soon as no worker uses it."""
        with self._lock:
            if self._is_removing:
                return
            self._report()
            self._is_removing = True
            if self.state is not TableState.STOPPED:
                self.state = TableState.STOPPING
            self.queue.is_writing = False
        self._services.released(self)
        self._finish_removal()

    def _finish_removal(self) -> None:
        """Become STOPPED, unless a worker or a copy is running, which calls this when it ends."""
        with self._lock:
            if not self._is_removing or self._is_busy or self.state is TableState.STOPPED:
                return
            self._report()
            self.state = TableState.STOPPED
            self.queue.close()
        self._services.wake_agent()

    def set_barrier(self, barrier_ts: Ts) -> None:
        is_lifted = barrier_ts > self._barrier_ts
        self._barrier_ts = barrier_ts
        if is_lifted and self.state is TableState.REPLICATING:
            self._services.submit(self)

    def status(self, collect_stats: bool) -> TableStatus:
        """Return the status; raise the error of a table that has failed."""
        if self.error is not None:
            raise self.error.with_traceback(None)
        checkpoint = self.checkpoint()
        return TableStatus(self.span, self.state, checkpoint, self._stats(checkpoint) if collect_stats else None)

    def checkpoint(self) -> Checkpoint:
        with self._lock:
            checkpoint_ts = self._report()
        queue = self.queue
        received_ts = self._services.shared_position() if queue.is_caught_up else max(queue.catch_up_position, queue.cursor)
        return Checkpoint(checkpoint_ts, max(checkpoint_ts, received_ts), self._last_synced_ts)

    def _report(self) -> Ts:
        """Return the checkpoint, which never decreases; inside the lock."""
        is_started = self._fence_held is not None and self._granted_ts is not None and not self._needs_snapshot
        if is_started and self.state in (TableState.REPLICATING, TableState.STOPPING):
            if self._is_removing:
                # The streams may have forgotten the table already: an empty queue means nothing.
                done_ts = self.queue.cursor
            else:
                done_ts = self.queue.idle_position(self._services.shared_position())
            self._reported_ts = max(self._reported_ts, min(done_ts, max(self._barrier_ts, self._last_synced_ts)))
        return self._reported_ts

    def _stats(self, checkpoint: Checkpoint) -> Stats:
        now = time.monotonic()
        since, rows, size = self._rates
        seconds = max(now - since, 0.001)
        self._rates = (now, self.rows_written, self.bytes_written)
        received = checkpoint.resolved_ts
        stages = {"puller": Checkpoint(received, received), "sink": checkpoint}
        if self._needs_snapshot and self.state is TableState.REPLICATING:
            stages["snapshot"] = checkpoint
        return Stats((self.rows_written - rows) / seconds, (self.bytes_written - size) / seconds, stages)

    # --- streams and the control thread ------------------------------------------------------------------------------

    @property
    def is_preparing(self) -> bool:
        return self.state is TableState.PREPARING and self.error is None

    @property
    def waits_for_snapshot(self) -> bool:
        with self._lock:
            ready = self._needs_snapshot and not self._is_busy and not self._is_removing and self.error is None
            return ready and self.state is TableState.REPLICATING and time.monotonic() >= self._retry_at

    @property
    def waits_for_catch_up(self) -> bool:
        """Changes after the cursor must be read by a catch-up stream."""
        queue = self.queue
        if self.error is not None or self._is_removing or queue.streamed_floor is None or queue.is_covered:
            return False
        if self.state is TableState.PREPARING:
            return not queue.overflows
        return self.state is TableState.REPLICATING and queue.is_writing and not self._needs_snapshot

    def notify(self) -> None:
        """Handle that something was pushed, or that a lane has advanced."""
        if self.queue.is_writing:
            if not self.is_scheduled and not (self._gathers and self.queue.held_bytes < self._gather_bytes):
                self._services.submit(self)
        elif self.state is TableState.PREPARING:
            self._check_prepared()

    def _check_prepared(self) -> None:
        queue = self.queue
        if queue.streamed_floor is None:
            return
        with self._lock:
            if self.state is not TableState.PREPARING or self._is_removing:
                return
            if not queue.is_caught_up and not queue.overflows:
                self._services.wake_control()
                return
            self.state = TableState.PREPARED
        self._services.wake_agent()

    def fail(self, error: Exception) -> None:
        """Stop the table with an error; the agent sees it in the status, and removes the table."""
        with self._lock:
            if self.error is not None or self.state is TableState.STOPPED:
                return
            self.error = error
            self.queue.is_writing = False
        self._services.wake_agent()

    # --- a worker's thread -------------------------------------------------------------------------------------------

    def step(self, session: SinkSession) -> bool:
        """Do one piece of work at the sink; return True if there is more to do now."""
        with self._lock:
            if self._is_busy or self._is_removing or self.error is not None or self._granted_ts is None:
                return False
            wait_s = self._retry_at - time.monotonic()
            if wait_s > 0:
                self._services.submit_later(self, wait_s)
                return False
            self._is_busy = True
            takes_over = self.fence_wanted is not None and self.fence_wanted != self._fence_held
        again = False
        try:
            if takes_over or self.state is not TableState.REPLICATING:
                self._take_over(session)
                again = True
            elif not self._needs_snapshot:
                if self._is_unsure:
                    self._read_position(session)
                again = self._write(session)
            self._failing_since = None
            self._backoff.reset()
        except ReloadNeededError as error:
            self._copy_again(session, error)
        except WriteNotAllowedError:
            self._wait_before_retry(NOT_ALLOWED_RETRY_S)
        except (SinkUnavailableError, SourceUnavailableError) as error:
            self._is_unsure = True
            self._retry(error)
        except OperatingError as error:
            session.forget(self.table_id)
            self.fail(error)
        finally:
            self._end_work()
            if self._is_removing:
                session.forget(self.table_id)
        return again and self.error is None

    def _end_work(self) -> None:
        with self._lock:
            self._is_busy = False
        self._finish_removal()

    def _writer(self) -> tuple[TableSchema, Fence]:
        """Return the table and the fence that the sink has accepted."""
        assert self.schema is not None
        assert self._fence_held is not None
        return self.schema, self._fence_held

    def _copy_again(self, session: SinkSession, reason: ReloadNeededError) -> None:
        """Have the table copied again, if this changefeed makes first copies."""
        wants_snapshot = self._services.wants_snapshot
        is_lost = isinstance(reason, LostCommitsError)
        try:
            if is_lost or wants_snapshot:
                session.request_copy(*self._writer(), wants_snapshot)
            if not wants_snapshot:
                hint = "" if is_lost else "; the values of old rows are not known here: start the changefeed with a first copy"
                raise OperatingError(f"{reason}{hint}")
            _log.warning("postgres_copies_again", reason=str(reason))
        except _RETRIED as error:
            self._retry(error)
        except OperatingError as error:
            self.fail(error)
        else:
            session.forget(self.table_id)
            with self._lock:
                self._needs_snapshot = True
                self.queue.is_writing = False
            self._services.wake_control()

    def _retry(self, error: OperatingError) -> None:
        """Retry without an error for error_after_s; then the table fails."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since > self._services.error_after_s:
            self.fail(error)
        else:
            self._wait_before_retry(self._backoff.next_s())

    def _wait_before_retry(self, delay_s: float) -> None:
        self.queue.is_writing = False
        self._retry_at = time.monotonic() + delay_s
        self._services.submit_later(self, delay_s)

    def _take_over(self, session: SinkSession) -> None:
        schema, fence, granted_ts = self.schema, self.fence_wanted, self._granted_ts
        assert schema is not None
        assert granted_ts is not None
        if fence is None:
            raise EpochRefusedError(f"table {schema.full_name}: no epoch to write with was granted")
        found = session.take_over(schema, fence, granted_ts, self._services.wants_snapshot)
        with self._lock:
            is_first = self.state is not TableState.REPLICATING
            self._fence_held = fence
            if not is_first or self._is_removing:
                return
            self._needs_snapshot = found.needs_snapshot
            start_ts = granted_ts if found.needs_snapshot else max(granted_ts, found.position)
            self.queue.start_at(start_ts)
            self._reported_ts = start_ts
            self.state = TableState.REPLICATING
            self.queue.is_writing = not found.needs_snapshot
        self._services.wake_agent()
        self._services.wake_control()

    def _read_position(self, session: SinkSession) -> None:
        """Ask the sink how far the table is: a commit may have succeeded although its reply was lost."""
        schema, fence = self._writer()
        position = session.position(schema, fence)
        if 0 < position < self._last_synced_ts:
            raise LostCommitsError(
                f"table {schema.full_name}: the sink is at {format_lsn(position)}, but had confirmed everything up to"
                f" {format_lsn(self._last_synced_ts)}: it has lost commits (was it restored, or was a standby promoted?)"
            )
        self.queue.skip_to(position)
        self._is_unsure = False

    def _write(self, session: SinkSession) -> bool:
        """Write the next batch; return False if there is none."""
        self.queue.is_writing = True
        if not self._gathers and self.queue.has_backlog(self._gather_bytes):
            self._gathers = True
            self._services.submit_later(self, GATHER_S)
            return False
        self._gathers = False
        batch = self.queue.take(self._barrier_ts, self._services.batch_max_bytes)
        if batch is None:
            if not self.queue.is_covered:
                self._services.wake_control()
            return False
        transaction = session.begin(*self._writer())
        rows, size, self._last_synced_ts = write_batch(self.queue, transaction, batch, self._take_following)
        self.rows_written += rows
        self.bytes_written += size
        return True

    def _take_following(self, batch: ChangeBatch) -> ChangeBatch | None:
        """Wait for what follows the beginning of a transaction; return None if nothing will."""
        while not self._is_removing and self.error is None and batch.is_current:
            following = self.queue.take(self._barrier_ts, self._services.batch_max_bytes, continuing=batch)
            if following is not None or not self.queue.is_writing:  # not writing: its end is after the barrier
                return following
            self.queue.wait_for_parts(PART_WAIT_S)
        return None

    # --- a copy's thread ---------------------------------------------------------------------------------------------

    def begin_snapshot(self) -> Fence | None:
        """Claim the table for a copy; return None if it no longer needs one."""
        with self._lock:
            is_free = not self._is_busy and not self._is_removing and self.error is None
            if not self._needs_snapshot or not is_free or self._fence_held is None:
                return None
            self._is_busy = True
            return self._fence_held

    def watch_snapshot(self, chunks: Iterator[tuple[bytes, int]]) -> Iterator[bytes]:
        """Yield the chunks and count their rows; raise WriteNotAllowedError if the table must stop."""
        self.snapshot_rows = 0
        for chunk, rows in chunks:
            if self._is_removing:
                raise WriteNotAllowedError("the table is being removed")
            self.snapshot_rows += rows
            self.rows_written += rows
            self.bytes_written += len(chunk)
            yield chunk

    def end_snapshot(self, position: Ts | None, error: OperatingError | None = None) -> None:
        """Continue with the changes after `position` if the copy is durable; else (None) it may be retried."""
        if error is not None and not isinstance(error, _RETRIED):
            self.fail(error)
        elif error is not None and not self._is_removing:
            self._retry(error)
        if position is not None:
            with self._lock:
                self._needs_snapshot = False
                self._failing_since = None
                self.queue.start_at(max(position, self.queue.cursor))
                self._last_synced_ts = position
                self.queue.is_writing = not self._is_removing
        self._end_work()
        self._services.submit(self)
        self._services.wake_control()
