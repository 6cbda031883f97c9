"""One step of a worker: a takeover at the sink, or the next batch of a table's changes. A worker's thread."""

from __future__ import annotations

from dataclasses import replace

import structlog

from processor.postgres.sinks import LostCommitsError, ReloadNeededError, SinkSession
from processor.postgres.source.shape_watch import PendingChange
from processor.postgres.tables.ends import IDLE, WROTE, End, copy_due, gathering
from processor.postgres.tables.life import ADVANCING, NO_RETRY, WRITERS, Grant, State, TableInput, Writer
from processor.postgres.tables.queues import ChangeBatch
from processor.postgres.tables.table_work import TableWork
from processor.postgres.tables.writing import write_batch
from tablewire.errors import EpochRefusedError, OperatingError
from tablewire.postgres.lsn import format_lsn

PART_WAIT_S = 0.1
GATHER_S = 0.2
"""In a backlog, wait at most this long for a larger batch: each batch costs the sink a commit."""

_log = structlog.get_logger(__name__)


def step(table: TableWork, session: SinkSession) -> bool:
    """Do one piece of work at the sink; return True if there is more to do now."""
    if (begun := table.begin_step()) is None:
        return False
    what, was = begun
    try:
        end = _take_over(table, session) if what is TableInput.TAKE_OVER else _write(table, session, was is State.GATHERING)
    except ReloadNeededError as error:
        end = _copy_again(table, session, error)
    except OperatingError as error:
        end = table.end_after(error)
    table.end_work(end)
    state = table.life.state
    if state not in ADVANCING:
        session.forget(table.table_id)
    return end.again and state in WRITERS


def _copy_again(table: TableWork, session: SinkSession, reason: ReloadNeededError) -> End:
    """Record at the sink that the table must be copied again, if this changefeed makes first copies."""
    writer = table.writer
    wants_snapshot = table.services.wants_snapshot
    is_lost = isinstance(reason, LostCommitsError)
    try:
        if writer is not None and (is_lost or wants_snapshot):
            session.request_copy(writer.schema, writer.fence, wants_snapshot)
        if not wants_snapshot:
            hint = "" if is_lost else "; the values of old rows are not known here: start the changefeed with a first copy"
            raise OperatingError(f"{reason}{hint}")
    except OperatingError as error:
        return table.end_after(error, reason)
    _log.warning("postgres_copies_again", reason=str(reason))
    return copy_due()


def _take_over(table: TableWork, session: SinkSession) -> End:
    life, fence = table.life, table.fence_wanted
    data = life.data
    if not isinstance(data, Grant | Writer):
        return IDLE  # it fails or stops
    schema, granted_ts = data.schema, data.granted_ts
    if fence is None:
        raise EpochRefusedError(f"table {schema.full_name}: no epoch to write with was granted")
    found = session.take_over(schema, fence, granted_ts, table.services.wants_snapshot)

    def accepted(data: Writer | Grant) -> Writer:
        return replace(data, fence=fence) if isinstance(data, Writer) else Writer(data.schema, granted_ts, fence)

    if found.needs_snapshot:
        return copy_due(accepted, granted_ts if life.state is State.TAKING_OVER else None)
    if life.state is State.WRITING:
        return End(TableInput.DONE, lambda data: replace(accepted(data), retry=NO_RETRY), again=True)
    # For the first time; or the copy whose commit was unsure has succeeded.
    start_ts = max(granted_ts if life.state is State.TAKING_OVER else table.queue.cursor, found.position)
    return End(TableInput.DONE, lambda data: accepted(data).settled(), again=True, start_ts=start_ts)


def _read_position(table: TableWork, session: SinkSession, writer: Writer) -> None:
    """Ask the sink how far the table is: a commit may have succeeded although its reply was lost."""
    position = session.position(writer.schema, writer.fence)
    if 0 < position < table.last_synced_ts:
        raise LostCommitsError(
            f"table {writer.schema.full_name}: the sink is at {format_lsn(position)}, but had confirmed everything up to"
            f" {format_lsn(table.last_synced_ts)}: it has lost commits (was it restored, or was a standby promoted?)"
        )
    table.queue.skip_to(position)


def pending_change(table: TableWork) -> PendingChange | None:
    """Return a change of shape that the sink's table can follow now: all rows up to where it was found are written."""
    pending = table.services.pending_change(table)
    if pending is None:
        return None
    shared_position = table.services.shared_position(table)  # before the queue is asked
    return pending if table.queue.idle_position(shared_position) >= pending.position else None


def _write(table: TableWork, session: SinkSession, has_gathered: bool) -> End:
    """Write the next batch, if there is one."""
    writer, queue = table.writer, table.queue
    if writer is None:
        return IDLE  # it fails or stops
    if writer.copy_wanted is not None:
        raise writer.copy_wanted.with_traceback(None)
    if writer.is_unsure:
        _read_position(table, session, writer)
    if (pending := pending_change(table)) is not None:
        session.follow(writer.schema, writer.fence, pending)
    if not has_gathered and queue.has_backlog(table.gather_bytes):
        return gathering(GATHER_S)
    batch = queue.take(table.barrier_ts, 1 if table.takes_one else table.services.batch_max_bytes)
    if batch is None:
        if not queue.is_covered:
            table.services.wake_control()
        return IDLE

    def take_following(batch: ChangeBatch) -> ChangeBatch | None:
        """Wait for what follows the beginning of a transaction; return None if nothing will."""
        while table.life.state is State.WRITING and batch.is_current:
            following = queue.take(table.barrier_ts, table.services.batch_max_bytes, continuing=batch)
            if following is not None or not queue.is_open:  # paused by itself: its end is after the barrier
                return following
            queue.wait_for_parts(PART_WAIT_S)
        return None

    transaction = session.begin(writer.schema, writer.fence)
    table.count(*write_batch(queue, transaction, batch, take_following))
    return WROTE
