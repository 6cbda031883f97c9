"""PostgresExecutor: the TableExecutor of PostgreSQL sources (tablewire/executor.py is the contract of each method).

The agent's thread calls in here and never waits: tables answer from memory, and threads do the work:
 - control: describes new tables at the source, starts the streams
 - shared stream and catch-up streams (stream.py): read changes into the queues of tables
 - sink workers (workers.py): take over and write; snapshot runners (snapshot.py): fill new tables
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import structlog

from processor.postgres.readers.catch_up import CatchUpStream
from processor.postgres.readers.looks import ShapeLooks
from processor.postgres.readers.publication_check import PublicationCheck
from processor.postgres.readers.shared_stream import SharedStreams
from processor.postgres.readers.snapshot import SnapshotRunner
from processor.postgres.readers.stream import ChangeStream, StreamContext, StreamTable
from processor.postgres.sinks import Fence, SinkContext
from processor.postgres.sinks.registry import new_sink
from processor.postgres.sinks.wire_types import TextNeededError
from processor.postgres.source.catalogue import SourceCatalogue
from processor.postgres.source.replication import ReplicationConnection
from processor.postgres.source.shape_watch import ShapeWatch
from processor.postgres.tables.queues import Budget, TableQueue
from processor.postgres.tables.table_work import TableServices, TableWork
from processor.postgres.tables.threads import end_threads, new_thread
from processor.postgres.tables.workers import WorkerPool
from tablewire.errors import ClosedError, InvariantError, OperatingError
from tablewire.executor import ExecutorMeter, ExecutorRequest
from tablewire.model.ids import TS_MAX, TableID, Ts
from tablewire.model.progress import Barrier, Checkpoint, StatusColumns, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.postgres.connections import SourceUnavailableError, parse_uri
from tablewire.postgres.names import slot_name
from tablewire.postgres.options import parse_options
from tablewire.runtime.shutdown import EXIT_BUG, end_process

CONTROL_INTERVAL_S = 0.5
GATHER_S = 0.03
"""The shared stream starts this long after the first table, so that tables which arrive together need no catch-up."""
DESCRIBE_RETRY_S = 0.5
JOIN_TIMEOUT_S = 2.0
_WRITER_CHARS = 40
_log = structlog.get_logger(__name__)


class PostgresExecutor:
    """See the module. The methods of the contract: the agent's thread. fence, close: any thread."""

    def __init__(self, request: ExecutorRequest) -> None:
        """Check the URIs and the options, without I/O."""
        parse_uri(request.source_uri)
        options = parse_options(request.options)
        self._request = request
        self._options = options
        self._name = slot_name(request.changefeed)
        self._catalogue = SourceCatalogue(request.source_uri, self._name, options.rules)
        self._watch = ShapeWatch(self._catalogue)
        writer = f"tablewire {request.capture_id[:_WRITER_CHARS]}"
        self._context = SinkContext(request.changefeed, writer, self.may_write, self._watch)
        self._sink = new_sink(request.sink_uri, self._context, self._catalogue, options)
        self._publication = PublicationCheck(self._catalogue, self._all_tables)
        self._looks = ShapeLooks(self._watch, self._publication.run, self._sink.follows_shapes)
        self._binary = options.binary and self._sink.takes_binary
        self._budget = Budget(options.queues_max_bytes)
        self._tables: dict[Span, TableWork] = {}
        self._removed_rows = 0
        """Written by tables that were removed."""
        self._removed_bytes = 0
        self._barrier = Barrier(TS_MAX)
        self._barriers: dict[int, Ts] = {}
        self._incarnation = 0
        self._server: tuple[int, int] | None = None  # system identifier and timeline that the tables are read from
        self._streams: StreamContext | None = None
        self._shared = SharedStreams()
        self._text_tables: set[TableID] = set()
        """Their values turned out to be readable only as text at the sink."""
        self._catch_ups: list[CatchUpStream] = []
        self._catch_up_lock = threading.Lock()
        self._describe_at = 0.0
        self._describe_since: float | None = None
        self._is_fenced = threading.Event()
        self._is_closing = threading.Event()
        self._is_closed = False
        self._close_lock = threading.Lock()
        self._woken = threading.Event()
        self._crash: BaseException | None = None
        self._pool = WorkerPool(self._sink.session, options.sink_connections, self._crashed)
        self._services = TableServices(
            options.batch_max_bytes,
            options.error_after_ms / 1000,
            request.initial_snapshot,
            submit=self._pool.submit,
            submit_later=self._pool.submit_later,
            wake_agent=request.wake,
            wake_control=self._woken.set,
            released=self._released,
            shared_position=self._shared.position,
            pending_change=lambda table: self._watch.pending(table.table_id),
        )
        self._snapshots = [
            SnapshotRunner(
                request.source_uri,
                self._connect_replication,
                self._catalogue,
                self._binary,
                self._sink.session(),
                self._waiting_for_copy,
                self._services.error_after_s,
                self._crashed,
            )
            for _ in range(options.snapshot_threads)
        ]
        self._control = new_thread("postgres-control", self._run_control, self._crashed)
        self._is_started = False

    # --- TableExecutor -----------------------------------------------------------------------------------------------

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        self._require_alive()
        if span.start_key or span.end_key:
            raise OperatingError(f"span {span}: a PostgreSQL table is replicated as a whole; parts of one cannot be")
        table = self._tables.get(span)
        if not is_prepare:
            if table is None:
                raise OperatingError(f"span {span} was not prepared here")
            if table.fence_wanted is None:
                self.set_assignment_epoch(span, 0)
            return table.promote(checkpoint.checkpoint_ts)
        if table is None:
            start_ts = max(checkpoint.checkpoint_ts, self._request.start_ts)
            queue = TableQueue(self._options.queue_max_bytes, self._budget, start_ts)
            table = self._tables[span] = TableWork(span, queue, self._services)
            table.set_barrier(self._barrier_of(span))
            self._start()
            self._woken.set()
        return True

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        table = self._tables.get(span)
        states = (TableState.PREPARED, TableState.REPLICATING) if is_prepare else (TableState.REPLICATING,)
        return table is not None and table.state in states

    def remove_table_span(self, span: Span) -> bool:
        if (table := self._tables.get(span)) is not None:
            if isinstance(table.error, TextNeededError):
                self._text_tables.add(span.table_id)
            table.remove()
        return True

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        table = self._tables.get(span)
        if table is None:
            return 0, True
        if table.state is not TableState.STOPPED:
            return 0, False
        del self._tables[span]
        self._watch.forget(table.table_id)
        self._removed_rows += table.rows_written
        self._removed_bytes += table.bytes_written
        return table.checkpoint().checkpoint_ts, True

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        self._require_alive()
        table = self._tables.get(span)
        if table is None:
            return TableStatus(span, TableState.ABSENT, Checkpoint(0, 0))
        return table.status(collect_stat)

    # --- the optional protocols --------------------------------------------------------------------------------------

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        if (table := self._tables.get(span)) is not None:
            # The incarnation is known since the table was described.
            table.set_epoch(Fence(self._incarnation, self._request.changefeed_epoch, epoch))

    def set_barrier(self, barrier: Barrier) -> None:
        if barrier == self._barrier:
            return
        self._barrier = barrier
        self._barriers = {table_barrier.table_id: table_barrier.barrier_ts for table_barrier in barrier.table_barriers}
        for span, table in self._tables.items():
            table.set_barrier(self._barrier_of(span))

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns:
        self._require_alive()
        states = np.zeros(len(spans), np.uint8)
        positions = np.zeros((3, len(spans)), np.uint64)
        errors: list[tuple[int, str]] = []
        for at, span in enumerate(spans):
            if (table := self._tables.get(span)) is None:
                continue
            if table.error is not None:
                errors.append((at, str(table.error)))
            checkpoint = table.checkpoint()
            states[at] = table.state.code
            positions[:, at] = checkpoint.checkpoint_ts, checkpoint.resolved_ts, checkpoint.last_synced_ts
        return StatusColumns(states, positions[0], positions[1], positions[2], errors)

    def meter(self) -> ExecutorMeter:
        tables = self._tables.values()
        return ExecutorMeter(
            rows_written=self._removed_rows + sum(table.rows_written for table in tables),
            bytes_written=self._removed_bytes + sum(table.bytes_written for table in tables),
            queue_bytes=self._budget.held_bytes,
            queue_bytes_max=self._budget.max_bytes,
            read_ts=self._shared.read_ts,
            conflicts=self._context.conflicts.total,
        )

    def close(self) -> None:
        """Stop everything; return when no write can follow. Idempotent."""
        self._is_closing.set()
        with self._close_lock:
            if self._is_closed:
                return
            self._woken.set()
            for runner in self._snapshots:
                runner.stop()
            if self._is_started:
                self._control.join(JOIN_TIMEOUT_S)
            self._catalogue.close()  # cuts the connection that the control thread or a worker may wait for
            if self._is_started:
                self._control.join(JOIN_TIMEOUT_S)  # it may be connecting; it no longer starts anything
            streams: list[ChangeStream] = [*self._catch_ups, *self._shared.running]
            for stream in streams:
                stream.stop()
            self._pool.stop()
            writers = [*self._pool.threads, *(runner.thread for runner in self._snapshots)]
            sessions = [*self._pool.sessions, *(runner.session for runner in self._snapshots)]
            end_threads(writers, sessions, [runner.cut for runner in self._snapshots])
            for stream in streams:
                if stream.thread.ident is not None:
                    stream.thread.join(JOIN_TIMEOUT_S)  # it may be connecting; it writes nothing
            self._sink.close()
            self._is_closed = True

    def fence(self) -> None:
        """Begin no more commits at the sink, for good. Return at once; any thread."""
        self._is_fenced.set()

    def may_write(self) -> bool:
        """Return whether a commit may be begun now. Any thread."""
        return not self._is_fenced.is_set() and not self._is_closing.is_set() and self._request.may_write()

    # --- for tables and streams, any thread --------------------------------------------------------------------------

    def _released(self, table: TableWork) -> None:
        self._shared.detach(table)
        with self._catch_up_lock:
            for stream in self._catch_ups:
                stream.release(table)

    def _catch_up_ended(self, stream: CatchUpStream, slow: Sequence[StreamTable]) -> None:
        with self._catch_up_lock:
            self._catch_ups.remove(stream)
            for table in stream.tables:
                table.needs_solo = table in slow
        self._woken.set()

    def _waiting_for_copy(self) -> list[TableWork]:
        return [table for table in self._all_tables() if table.waits_for_copy]

    def _all_tables(self) -> list[TableWork]:
        return list(self._tables.values())

    def _connect_replication(self, purpose: str) -> ReplicationConnection:
        return ReplicationConnection(self._request.source_uri, self._request.changefeed, purpose, self._server)

    def _crashed(self, error: BaseException) -> None:
        """Write nothing more and end the process, after a bug in one of the threads.

        Its tables move to other processors, or to its own next start; a process that continued would be
        given the same tables again, and refuse them.
        """
        self._crash = error
        self.fence()
        _log.critical("postgres_executor_crashed", thread=threading.current_thread().name, exc_info=error)
        end_process(EXIT_BUG)

    # --- the control thread ------------------------------------------------------------------------------------------

    def _run_control(self) -> None:
        while not self._is_closing.is_set():
            self._woken.wait(self._looks.wait_s(CONTROL_INTERVAL_S))
            self._woken.clear()
            self._describe_new()
            if not self._sink.follows_shapes:  # otherwise each look does
                self._publication.run_if_due(self._shared.latest_ts)
            self._start_catch_up()
            self._pool.submit_waiting(self._all_tables())
            self._looks.run(self._all_tables(), self._shared.latest_ts)
            if self._waiting_for_copy():
                for runner in self._snapshots:
                    runner.wake()

    def _new_tables(self) -> list[TableWork]:
        return [table for table in self._all_tables() if table.is_new]

    def _describe_new(self) -> None:
        """Describe new tables at the source and attach them to a shared stream; start that with the first ones."""
        new = self._new_tables()
        if not new or time.monotonic() < self._describe_at:
            return
        self._shared.drop_failed()
        try:
            self._follow_server(self._catalogue.server())
            if self._streams is None:
                self._streams = self._new_streams()
            if not self._shared.running:
                if self._is_closing.wait(GATHER_S):
                    return
                new = self._new_tables()
            published, slot_ts = self._catalogue.published(), self._catalogue.slot_ts()
            for table in new:
                self._describe(table, published, slot_ts)
            self._describe_since = None
        except SourceUnavailableError as error:
            now = time.monotonic()
            self._describe_at = now + DESCRIBE_RETRY_S
            self._describe_since = self._describe_since or now
            if now - self._describe_since > self._services.error_after_s:
                for table in new:
                    table.fail(error)
        except OperatingError as error:
            for table in new:
                table.fail(error)
            return
        if self._streams is not None and not self._is_closing.is_set():
            self._shared.start(self._streams, [table for table in self._all_tables() if table.is_followed])

    def _follow_server(self, server: tuple[int, int]) -> None:
        """Note which server the source is. What was read from another one is dropped: its tables are taken over again."""
        if self._server not in (None, server):
            for table in [table for table in self._all_tables() if table.is_followed]:
                table.fail(OperatingError("the source is another server now: the table is taken over again"))
            self._shared.stop()
        self._server = server

    def _new_streams(self) -> StreamContext:
        publication = self._catalogue.publication()
        self._incarnation = publication.incarnation
        return StreamContext(
            self._connect_replication,
            self._name,
            publication.created_ts,
            self._binary,
            self._services.error_after_s,
            self._options.queue_max_bytes,
            self._budget,
            self._crashed,
            self._sink.identity,
        )

    def _describe(self, table: TableWork, published: Mapping[TableID, Ts], slot_ts: Ts) -> None:
        try:
            schema = self._catalogue.describe(table.table_id)
            table.needs_text = self._binary and (table.table_id in self._text_tables or self._catalogue.needs_text(schema))
            if table.table_id not in published:
                raise OperatingError(f"table {schema.full_name} is not in publication {self._name}: its owner adds it first")
        except SourceUnavailableError:
            raise
        except OperatingError as error:
            table.fail(error)
            return
        described = replace(schema, published_ts=published[table.table_id], released_ts=slot_ts, server=self._server)
        self._looks.begin(table)
        if table.describe(described):
            self._shared.attach(table)
            if table.is_leaving:
                self._shared.detach(table)  # it was removed before it was attached

    def _start_catch_up(self) -> None:
        with self._catch_up_lock:
            served = {id(table) for stream in self._catch_ups for table in stream.tables}
            waiting = [table for table in self._all_tables() if id(table) not in served and table.waits_for_catch_up]
            while waiting and self._streams is not None and not self._is_closing.is_set():
                if not (group := self._next_group(waiting)):
                    return
                waiting = [table for table in waiting if table not in group]
                serves_preparing = all(table.is_preparing for table in group)
                stream = CatchUpStream(self._streams, group, serves_preparing, self._catch_up_ended)
                self._catch_ups.append(stream)
                stream.thread.start()

    def _next_group(self, waiting: Sequence[TableWork]) -> Sequence[TableWork]:
        """Return the tables of the next catch-up stream, none if the maximum number is running.

        One more stream may run for tables that prepare, so that moves do not wait for a long backlog.
        """
        if len(self._catch_ups) < self._options.catch_up_streams:
            return [table for table in waiting if not table.needs_solo] or waiting[:1]
        if any(stream.serves_preparing for stream in self._catch_ups):
            return ()
        return [table for table in waiting if table.is_preparing]

    # --- helpers of the agent's thread -------------------------------------------------------------------------------

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            for thread in (*self._pool.threads, *(runner.thread for runner in self._snapshots), self._control):
                thread.start()

    def _barrier_of(self, span: Span) -> Ts:
        return min(self._barrier.global_barrier_ts, self._barriers.get(span.table_id, TS_MAX))

    def _require_alive(self) -> None:
        if self._crash is not None:
            raise InvariantError("a thread of the PostgreSQL executor ended", f"{type(self._crash).__name__}: {self._crash}")
        if self._is_closing.is_set():
            raise ClosedError("the executor is closed")
