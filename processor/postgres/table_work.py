"""TableWork: one table's life in this executor, from prepared to stopped.

Three kinds of threads meet here: the agent's (asks and answers, never waits), the streams' (they push into the queue and notify)
and one worker at a time (everything that touches the sink). `_lock` guards the state and is never held while anything waits.

  PREPARING   described at the source, attached to the shared stream, behind it still
  PREPARED    caught up (or its queue overflowed while nobody wrote: then it catches up when it writes)
  REPLICATING the takeover at the sink is done; copies its first snapshot if it must, then writes
  STOPPING    no new work is begun; a worker or a copy that is at it ends first
  STOPPED     no write can follow
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import structlog

from processor.postgres.queues import ChangeBatch, TableQueue
from processor.postgres.services import TableServices
from processor.postgres.sinks import (
    Fence,
    LostCommitsError,
    ReloadNeededError,
    SinkSession,
    SinkUnavailableError,
    WriteNotAllowedError,
)
from processor.postgres.writing import write_batch
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
"""In a backlog a batch waits at most GATHER_S until it has 1/GATHER_SHARE of its greatest size: each costs the sink a commit."""

_log = structlog.get_logger(__name__)
_BUSY_STATES = (TableState.REPLICATING, TableState.STOPPING)


class TableWork:
    """See the module."""

    def __init__(self, span: Span, start_ts: Ts, queue: TableQueue, services: TableServices) -> None:
        self.span = span
        self.queue = queue
        self.state = TableState.PREPARING
        self.schema: TableSchema | None = None
        self.error: Exception | None = None
        self.is_scheduled = False  # the pool's, under its lock
        self.needs_solo = False  # the control thread's: catch up alone
        self.is_attached = False  # the control thread's: the shared stream knows the table
        self.rows_written = 0
        self.bytes_written = 0
        self.snapshot_rows = 0
        self._services = services
        self._lock = threading.Lock()
        self._start_ts = start_ts
        self._granted_ts: Ts | None = None
        self._fence_wanted: Fence | None = None
        self._fence_held: Fence | None = None
        self._is_removing = False
        self._is_busy = False
        self._needs_snapshot = False
        self._barrier_ts: Ts = TS_MAX
        self._reported_ts: Ts = start_ts
        self._last_synced_ts: Ts = 0
        self._retry_at = 0.0
        self._failing_since: float | None = None
        self._is_unsure = False  # a commit may have happened without an answer
        self._backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        self._gathers = False  # a batch is worth waiting for, for a moment
        self._gather_bytes = services.batch_max_bytes // GATHER_SHARE
        self._rates = (time.monotonic(), 0, 0)

    # --- the agent's thread ------------------------------------------------------------------------------------------

    @property
    def table_id(self) -> int:
        return self.span.table_id

    @property
    def fence_wanted(self) -> Fence | None:
        return self._fence_wanted

    def set_epoch(self, fence: Fence) -> None:
        """What the next takeover writes; a table that writes takes over again with it."""
        with self._lock:
            if self._fence_wanted is None or fence > self._fence_wanted:
                self._fence_wanted = fence
            is_writing = self.state is TableState.REPLICATING
        if is_writing:
            self._services.submit(self)

    def promote(self, granted_ts: Ts) -> bool:
        """Phase two. False while the table is not prepared."""
        with self._lock:
            if self.state is TableState.REPLICATING or self._granted_ts is not None:
                return True
            if self.state is not TableState.PREPARED or self._is_removing:
                return False
            self._granted_ts = granted_ts
        self._services.submit(self)
        return True

    def remove(self) -> None:
        """Stops the table as soon as nobody works on it."""
        with self._lock:
            if self._is_removing:
                return
            self._report()
            self._is_removing = True
            if self.state is not TableState.STOPPED:
                self.state = TableState.STOPPING
            self.queue.is_writing = False
        self._services.released(self)
        self.finish_removal()

    def finish_removal(self) -> None:
        """STOPPED, unless somebody is still at work: then they call this when they are done."""
        with self._lock:
            if not self._is_removing or self._is_busy or self.state is TableState.STOPPED:
                return
            self._report()
            self.state = TableState.STOPPED
            self.queue.close()
        self._services.changed()

    def set_barrier(self, barrier_ts: Ts) -> None:
        if barrier_ts == self._barrier_ts:
            return
        is_lifted = barrier_ts > self._barrier_ts
        self._barrier_ts = barrier_ts
        if is_lifted and self.state is TableState.REPLICATING:
            self._services.submit(self)

    def status(self, collect_stats: bool) -> TableStatus:
        """Raises what the table failed with."""
        if self.error is not None:
            raise self.error.with_traceback(None)
        checkpoint = self.checkpoint()
        stats = self._stats(checkpoint) if collect_stats else None
        return TableStatus(self.span, self.state, checkpoint, stats)

    def checkpoint(self) -> Checkpoint:
        with self._lock:
            checkpoint_ts = self._report()
        return Checkpoint(checkpoint_ts, max(checkpoint_ts, self._received_ts()), self._last_synced_ts)

    def _report(self) -> Ts:
        """The checkpoint, never back; inside the lock."""
        is_started = self._fence_held is not None and self._granted_ts is not None and not self._needs_snapshot
        if is_started and self.state in _BUSY_STATES:
            if self._is_removing:
                # The streams may have let go of the table already: an empty queue says nothing any more.
                done_ts = self.queue.cursor
            else:
                done_ts = self.queue.idle_position(self._services.shared_position())
            self._reported_ts = max(self._reported_ts, min(done_ts, max(self._barrier_ts, self._last_synced_ts)))
        return self._reported_ts

    def _received_ts(self) -> Ts:
        queue = self.queue
        if queue.is_caught_up:
            return self._services.shared_position()
        return max(queue.catch_up_position, queue.cursor)

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
        """Changes from behind the cursor must be read by a stream of its own."""
        queue = self.queue
        if self.error is not None or self._is_removing or queue.streamed_floor is None or queue.is_covered:
            return False
        if self.state is TableState.PREPARING:
            return not queue.overflows
        return self.state is TableState.REPLICATING and queue.is_writing and not self._needs_snapshot

    def notify(self) -> None:
        """Something was pushed, or a lane has moved."""
        if self.queue.is_writing:
            if not self.is_scheduled and not (self._gathers and self.queue.held_bytes < self._gather_bytes):
                self._services.submit(self)
        elif self.state is TableState.PREPARING:
            self._look_prepared()

    def _look_prepared(self) -> None:
        queue = self.queue
        if queue.streamed_floor is None:
            return
        with self._lock:
            if self.state is not TableState.PREPARING or self._is_removing:
                return
            if not queue.is_caught_up and not queue.overflows:
                self._services.wake()
                return
            self.state = TableState.PREPARED
        self._services.changed()

    def fail(self, error: Exception) -> None:
        """The table cannot go on; the agent is told at its next look, and removes it."""
        with self._lock:
            if self.error is not None or self.state is TableState.STOPPED:
                return
            self.error = error
            self.queue.is_writing = False
        self._services.changed()

    # --- a worker's thread -------------------------------------------------------------------------------------------

    def step(self, session: SinkSession) -> bool:
        """Does one piece of work at the sink; True = there is more to do now."""
        with self._lock:
            if self._is_busy or self._is_removing or self.error is not None or self._granted_ts is None:
                return False
            wait_s = self._retry_at - time.monotonic()
            if wait_s > 0:
                self._services.submit_later(self, wait_s)
                return False
            self._is_busy = True
            takes_over = self._fence_wanted is not None and self._fence_wanted != self._fence_held
        again = False
        try:
            if takes_over or self.state is not TableState.REPLICATING:
                self._take_over(session)
                again = True
            elif not self._needs_snapshot:
                if self._is_unsure:
                    self._look_up(session)
                again = self._write(session)
            self._failing_since = None
            self._backoff.reset()
        except ReloadNeededError as error:
            self._copy_again(session, error)
        except WriteNotAllowedError:
            self._wait_before_retry(NOT_ALLOWED_RETRY_S)
        except (SinkUnavailableError, SourceUnavailableError) as error:
            self._is_unsure = True
            self.retry(error)
        except OperatingError as error:
            session.forget(self.table_id)
            self.fail(error)
        finally:
            self._end_work()
            if self._is_removing:
                session.forget(self.table_id)
        return again and self.error is None

    def _copy_again(self, session: SinkSession, why: ReloadNeededError) -> None:
        """Has the table copied anew, if this changefeed makes copies at all."""
        schema, fence = self.schema, self._fence_held
        assert schema is not None
        assert fence is not None
        try:
            is_lost = isinstance(why, LostCommitsError)
            if is_lost or self._services.wants_snapshot:
                session.request_copy(schema, fence, self._services.wants_snapshot)
            if not self._services.wants_snapshot:
                hint = "" if is_lost else "; the values of old rows are not known here: start the changefeed with a first copy"
                raise OperatingError(f"{why}{hint}")
            _log.warning("postgres_copies_again", reason=str(why))
        except (WriteNotAllowedError, SinkUnavailableError) as error:
            self.retry(error)
        except OperatingError as error:
            self.fail(error)
        else:
            session.forget(self.table_id)
            with self._lock:
                self._needs_snapshot = True
                self.queue.is_writing = False
            self._services.wake()

    def _end_work(self) -> None:
        with self._lock:
            self._is_busy = False
        self.finish_removal()

    def retry(self, error: OperatingError) -> None:
        """Trouble that may pass: quietly again for a while, then the table's error."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since > self._services.error_after_s:
            self.fail(error)
            return
        self._wait_before_retry(self._backoff.next_s())

    def _wait_before_retry(self, delay_s: float) -> None:
        self.queue.is_writing = False
        self._retry_at = time.monotonic() + delay_s
        self._services.submit_later(self, delay_s)

    def _take_over(self, session: SinkSession) -> None:
        schema, fence, granted_ts = self.schema, self._fence_wanted, self._granted_ts
        assert schema is not None
        assert granted_ts is not None
        if fence is None:
            raise EpochRefusedError(f"table {schema.full_name}: nobody granted an epoch to write with")
        takeover = session.take_over(schema, fence, granted_ts, self._services.wants_snapshot)
        with self._lock:
            is_first = self.state is not TableState.REPLICATING
            self._fence_held = fence
            if not is_first or self._is_removing:
                return
            self._needs_snapshot = takeover.needs_snapshot
            start_ts = granted_ts if takeover.needs_snapshot else max(granted_ts, takeover.position)
            self.queue.start_at(start_ts)
            self._reported_ts = start_ts
            self.state = TableState.REPLICATING
            self.queue.is_writing = not takeover.needs_snapshot
        self._services.changed()
        self._services.wake()

    def _write(self, session: SinkSession) -> bool:
        self.queue.is_writing = True
        if not self._gathers and self.queue.has_backlog(self._gather_bytes):
            self._gathers = True
            self._services.submit_later(self, GATHER_S)
            return False
        self._gathers = False
        batch = self.queue.take(self._barrier_ts, self._services.batch_max_bytes)
        if batch is None:
            if not self.queue.is_covered:
                self._services.wake()
            return False
        schema, fence = self.schema, self._fence_held
        assert schema is not None
        assert fence is not None
        written = write_batch(self.queue, session.begin(schema, fence), batch, self._take_following)
        self._last_synced_ts = written.end_ts
        self.rows_written += written.rows
        self.bytes_written += written.size
        return True

    def _look_up(self, session: SinkSession) -> None:
        """After a connection broke, a commit may have happened although nobody heard of it: asks how far the table is."""
        schema, fence = self.schema, self._fence_held
        assert schema is not None
        assert fence is not None
        position = session.position(schema, fence)
        if 0 < position < self._last_synced_ts:
            raise LostCommitsError(
                f"table {schema.full_name}: the sink stands at {format_lsn(position)}, but had confirmed everything up to"
                f" {format_lsn(self._last_synced_ts)}: it has lost commits (was it restored, or did a standby take over?)"
            )
        self.queue.skip_to(position)
        self._is_unsure = False

    def _take_following(self, batch: ChangeBatch) -> ChangeBatch | None:
        """What follows a batch that is only the beginning of a transaction; None when nothing will."""
        while not self._is_removing and self.error is None and self.queue.is_current(batch):
            following = self.queue.take(self._barrier_ts, self._services.batch_max_bytes, continuing=batch)
            if following is not None:
                return following
            if not self.queue.is_writing:
                return None  # its end turned out to be behind the barrier
            self.queue.wait_for_parts(PART_WAIT_S)
        return None

    # --- a copy's thread ---------------------------------------------------------------------------------------------

    def begin_snapshot(self) -> tuple[TableSchema, Fence] | None:
        """Claims the table for a copy; None when it needs none any more."""
        with self._lock:
            fence = self._fence_held
            if not self._needs_snapshot or self._is_busy or self._is_removing or self.error is not None or fence is None:
                return None
            self._is_busy = True
            assert self.schema is not None
            return self.schema, fence

    def watch_snapshot(self, chunks: Iterator[tuple[bytes, int]]) -> Iterator[bytes]:
        """The chunks (with their numbers of rows), counted; WriteNotAllowedError when the table must stop."""
        self.snapshot_rows = 0
        for chunk, rows in chunks:
            if self._is_removing:
                raise WriteNotAllowedError("the table is being removed")
            self.snapshot_rows += rows
            self.rows_written += rows
            self.bytes_written += len(chunk)
            yield chunk

    def end_snapshot(self, position: Ts | None, error: OperatingError | None = None) -> None:
        """The copy is durable and changes go on behind `position`, or it is not (None) and may be tried again."""
        if error is not None and not isinstance(error, SinkUnavailableError | WriteNotAllowedError):
            self.fail(error)
        elif error is not None and not self._is_removing:
            self.retry(error)
        if position is not None:
            with self._lock:
                self._needs_snapshot = False
                self._failing_since = None
                self.queue.start_at(max(position, self.queue.cursor))
                self._last_synced_ts = position
                self.queue.is_writing = not self._is_removing
        self._end_work()
        self._services.submit(self)
        self._services.wake()
