"""PostgresExecutor: the TableExecutor of PostgreSQL sources (tablewire/executor.py says what each method promises).

The agent's thread calls in here and never waits: tables are asked for what they know, and work is handed to threads:
 - control: describes new tables at the source, starts the streams
 - shared stream and catch-up streams (stream.py): read changes into the tables' queues
 - sink workers (workers.py): take over and write; a copy's thread (snapshot.py) fills new tables
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from processor.postgres.catch_up import CatchUpStream
from processor.postgres.queues import Budget, TableQueue
from processor.postgres.replication import ReplicationConnection
from processor.postgres.shared_stream import SharedStream
from processor.postgres.sinks import Fence, SinkContext
from processor.postgres.sinks.registry import new_sink
from processor.postgres.snapshot import SnapshotRunner
from processor.postgres.source_catalogue import SourceCatalogue
from processor.postgres.statuses import status_columns
from processor.postgres.stream import StreamTable
from processor.postgres.table_work import TableWork
from processor.postgres.workers import WorkerPool
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
"""The shared stream starts this long after the first table, so that tables which come together need no catch-up."""
DESCRIBE_RETRY_S = 0.5
PUBLICATION_INTERVAL_S = 10.0
"""How often tables are compared with what the publication lists."""
JOIN_TIMEOUT_S = 2.0
_WRITER_CHARS = 40

_log = structlog.get_logger(__name__)


class PostgresExecutor:
    """See the module. The five methods, the setters and get_table_span_statuses: the agent's thread. fence, close: any thread."""

    def __init__(self, request: ExecutorRequest) -> None:
        """No I/O; OperatingError for a URI or an option that cannot be right."""
        parse_uri(request.source_uri)
        options = parse_options(request.options)
        self._request = request
        self._options = options
        self._name = slot_name(request.changefeed)
        self._catalogue = SourceCatalogue(request.source_uri, self._name)
        writer = f"tablewire {request.capture_id[:_WRITER_CHARS]}"
        self._sink = new_sink(request.sink_uri, SinkContext(request.changefeed, writer, self.may_write), self._catalogue, options)
        self._binary = options.binary and self._sink.takes_binary
        self._budget = Budget(options.queues_max_bytes)
        self._tables: dict[Span, TableWork] = {}
        self._rows_left = 0
        """Written by tables that are no longer here; so are the bytes."""
        self._bytes_left = 0
        self._barrier = Barrier(TS_MAX)
        self._barriers: dict[int, Ts] = {}
        self._incarnation: int | None = None
        self._created_ts: Ts = 0
        self._shared: SharedStream | None = None
        self._catch_ups: list[CatchUpStream] = []
        self._catch_up_lock = threading.Lock()
        self._describe_at = 0.0
        self._look_at = 0.0
        self._describe_since: float | None = None
        self._is_fenced = threading.Event()
        self._is_closing = threading.Event()
        self._is_closed = False
        self._close_lock = threading.Lock()
        self._woken = threading.Event()
        self._crash: BaseException | None = None
        self._pool = WorkerPool(self._sink.session, options.sink_connections, self._crashed)
        self._snapshots = [
            SnapshotRunner(
                request.source_uri,
                self._connect_replication,
                self._catalogue,
                self._binary,
                self._sink.session(),
                self._waiting_for_snapshot,
                self._crashed,
            )
            for _ in range(options.snapshot_threads)
        ]
        self._control = threading.Thread(target=self._run_control, name="postgres-control", daemon=True)
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
            table = self._tables[span] = TableWork(span, start_ts, queue, self)
            table.set_barrier(self._barrier_of(span))
            self._start()
            self.wake()
        return True

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        table = self._tables.get(span)
        if table is None:
            return False
        if is_prepare:
            return table.state in (TableState.PREPARED, TableState.REPLICATING)
        return table.state is TableState.REPLICATING

    def remove_table_span(self, span: Span) -> bool:
        table = self._tables.get(span)
        if table is not None:
            table.remove()
        return True

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        table = self._tables.get(span)
        if table is None:
            return 0, True
        if table.state is not TableState.STOPPED:
            return 0, False
        del self._tables[span]
        self._rows_left += table.rows_written
        self._bytes_left += table.bytes_written
        return table.checkpoint().checkpoint_ts, True

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        self._require_alive()
        table = self._tables.get(span)
        if table is None:
            return TableStatus(span, TableState.ABSENT, Checkpoint(0, 0))
        return table.status(collect_stat)

    # --- the optional protocols --------------------------------------------------------------------------------------

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        table = self._tables.get(span)
        if table is not None:
            # A prepared table has been described, and with that the incarnation is known.
            table.set_epoch(Fence(self._incarnation or 0, self._request.changefeed_epoch, epoch))

    def set_barrier(self, barrier: Barrier) -> None:
        if barrier == self._barrier:
            return
        self._barrier = barrier
        self._barriers = {table_barrier.table_id: table_barrier.barrier_ts for table_barrier in barrier.table_barriers}
        for span, table in self._tables.items():
            table.set_barrier(self._barrier_of(span))

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns:
        self._require_alive()
        return status_columns(self._tables, spans)

    def meter(self) -> ExecutorMeter:
        tables = self._tables.values()
        return ExecutorMeter(
            rows_written=self._rows_left + sum(table.rows_written for table in tables),
            bytes_written=self._bytes_left + sum(table.bytes_written for table in tables),
            queue_bytes=self._budget.held_bytes,
            queue_bytes_max=self._budget.max_bytes,
            read_ts=self.shared_position(),
        )

    def close(self) -> None:
        """Stops everything; returns when no write can follow. Idempotent."""
        self._is_closing.set()
        with self._close_lock:
            if self._is_closed:
                return
            self._woken.set()
            for runner in self._snapshots:
                runner.stop()
            if self._is_started:
                self._control.join(JOIN_TIMEOUT_S)
            self._catalogue.close()  # cuts off who still waits for the source, the control thread or a worker
            if self._is_started:
                self._control.join(JOIN_TIMEOUT_S)  # it may be connecting; it starts nothing any more
            streams = [*([self._shared] if self._shared is not None else []), *self._catch_ups]
            for stream in streams:
                stream.stop()
            self._pool.close()
            for runner in self._snapshots:
                runner.join()
            for stream in streams:
                if stream.thread.ident is not None:
                    stream.thread.join(JOIN_TIMEOUT_S)  # it may be connecting; it writes nothing
            self._sink.close()
            self._is_closed = True

    def fence(self) -> None:
        """From now on no commit is begun at the sink, for good. Returns at once; any thread."""
        self._is_fenced.set()

    def may_write(self) -> bool:
        """Whether a commit may be begun now. Any thread."""
        return not self._is_fenced.is_set() and not self._is_closing.is_set() and self._request.may_write()

    # --- TableServices: any thread -----------------------------------------------------------------------------------

    @property
    def batch_max_bytes(self) -> int:
        return self._options.batch_max_bytes

    @property
    def error_after_s(self) -> float:
        return self._options.error_after_ms / 1000

    @property
    def wants_snapshot(self) -> bool:
        return self._request.initial_snapshot

    def submit(self, table: TableWork) -> None:
        self._pool.submit(table)

    def submit_later(self, table: TableWork, delay_s: float) -> None:
        self._pool.submit_later(table, delay_s)

    def changed(self) -> None:
        self._request.wake()

    def wake(self) -> None:
        self._woken.set()

    def released(self, table: TableWork) -> None:
        shared = self._shared
        if shared is not None:
            shared.detach(table)
        with self._catch_up_lock:
            for stream in self._catch_ups:
                stream.release(table)

    def shared_position(self) -> Ts:
        shared = self._shared
        return shared.position if shared is not None else 0

    # --- the control thread ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._pool.start()
            for runner in self._snapshots:
                runner.thread.start()
            self._control.start()

    def _run_control(self) -> None:
        try:
            while not self._is_closing.is_set():
                self._woken.wait(CONTROL_INTERVAL_S)
                self._woken.clear()
                self._describe_new()
                self._look_at_publication()
                self._start_catch_up()
                self._pool.look(list(self._tables.values()))
                if self._waiting_for_snapshot():
                    for runner in self._snapshots:
                        runner.wake()
        except BaseException as error:
            self._crashed(error)
            raise

    def _describe_new(self) -> None:
        new = [table for table in list(self._tables.values()) if not table.is_attached and table.is_preparing]
        if not new or time.monotonic() < self._describe_at:
            return
        if self._shared is not None and self._shared.has_failed:
            self._shared = None
        try:
            if self._incarnation is None:
                publication = self._catalogue.publication()
                self._created_ts = publication.created_ts
                self._incarnation = publication.incarnation
            published, slot_ts = self._catalogue.published(), self._catalogue.slot_ts()
            for table in new:
                self._describe(table, published, slot_ts)
            self._describe_since = None
        except SourceUnavailableError as error:
            now = time.monotonic()
            self._describe_at = now + DESCRIBE_RETRY_S
            self._describe_since = self._describe_since or now
            if now - self._describe_since > self.error_after_s:
                for table in new:
                    table.fail(error)
        except OperatingError as error:
            for table in new:
                table.fail(error)
            return
        if self._shared is None:
            self._start_shared()

    def _describe(self, table: TableWork, published: Mapping[TableID, Ts], slot_ts: Ts) -> None:
        try:
            schema = self._catalogue.describe(table.table_id)
            if table.table_id not in published:
                raise OperatingError(
                    f"table {schema.full_name} is not in publication {self._name}: it is added by its owner first"
                )
        except SourceUnavailableError:
            raise
        except OperatingError as error:
            table.fail(error)
            return
        table.schema = replace(schema, published_ts=published[table.table_id], released_ts=slot_ts)
        table.is_attached = True
        if self._shared is not None:
            self._shared.attach(table)

    def _look_at_publication(self) -> None:
        """A table that left the publication, even if it is back, has missed changes: it fails, and is taken over anew."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + PUBLICATION_INTERVAL_S
        followed = [table for table in list(self._tables.values()) if table.is_attached and table.error is None]
        if not followed:
            return
        try:
            published = self._catalogue.published()
        except OperatingError as error:
            _log.warning("postgres_publication_unreadable", reason=str(error))
            return
        for table in followed:
            schema = table.schema
            if schema is not None and published.get(table.table_id) != schema.published_ts:
                table.fail(OperatingError(f"table {schema.full_name} left publication {self._name}: changes may be missing here"))

    def _start_shared(self) -> None:
        """Waits a moment for more tables, so that the first ones all begin where the stream begins."""
        if self._is_closing.wait(GATHER_S):
            return
        late = [table for table in list(self._tables.values()) if not table.is_attached and table.is_preparing]
        try:
            published, slot_ts = (self._catalogue.published(), self._catalogue.slot_ts()) if late else ({}, 0)
            for table in late:
                self._describe(table, published, slot_ts)
        except SourceUnavailableError:
            self.wake()
        shared = SharedStream(
            self._connect_replication,
            self._name,
            self._binary,
            self.error_after_s,
            self._budget,
            self._options.queue_max_bytes,
            self._created_ts,
        )
        if self._is_closing.is_set():
            return
        for table in list(self._tables.values()):
            if table.is_attached:
                shared.attach(table)
        self._shared = shared
        shared.budget = self._budget
        shared.crashed = self._crashed
        shared.start()

    def _start_catch_up(self) -> None:
        with self._catch_up_lock:
            served = {id(table) for stream in self._catch_ups for table in stream.tables}
            waiting = [t for t in list(self._tables.values()) if id(t) not in served and t.waits_for_catch_up]
            while waiting and not self._is_closing.is_set():
                group = self._next_group(waiting)
                if not group:
                    return
                waiting = [table for table in waiting if table not in group]
                stream = CatchUpStream(
                    self._connect_replication,
                    self._name,
                    self._binary,
                    self.error_after_s,
                    group,
                    self._options.queue_max_bytes,
                    self._created_ts,
                    self._catch_up_ended,
                )
                stream.serves_preparing = all(table.is_preparing for table in group)
                self._catch_ups.append(stream)
                stream.budget = self._budget
                stream.crashed = self._crashed
                stream.start()

    def _next_group(self, waiting: Sequence[TableWork]) -> Sequence[TableWork]:
        """The tables of the next catch-up stream; none when all places are taken. One more place is there for tables that
        prepare: a move must not wait until somebody's long backlog is through."""
        if len(self._catch_ups) < self._options.catch_up_streams:
            return [table for table in waiting if not table.needs_solo] or waiting[:1]
        if any(stream.serves_preparing for stream in self._catch_ups):
            return ()
        return [table for table in waiting if table.is_preparing]

    def _catch_up_ended(self, stream: CatchUpStream, slow: Sequence[StreamTable]) -> None:
        with self._catch_up_lock:
            self._catch_ups.remove(stream)
            for table in stream.tables:
                if isinstance(table, TableWork):
                    table.needs_solo = table in slow
        self.wake()

    def _waiting_for_snapshot(self) -> list[TableWork]:
        return [table for table in list(self._tables.values()) if table.waits_for_snapshot]

    def _connect_replication(self, purpose: str) -> ReplicationConnection:
        return ReplicationConnection(self._request.source_uri, self._request.changefeed, purpose)

    def _barrier_of(self, span: Span) -> Ts:
        return min(self._barrier.global_barrier_ts, self._barriers.get(span.table_id, TS_MAX))

    def _crashed(self, error: BaseException) -> None:
        """At the top of a thread of ours that met a bug: nothing is written any more, and the process ends. Its tables go
        to others, or to its own next life; a process that lived on would be given the same tables again and refuse them."""
        self._crash = error
        self.fence()
        _log.critical("postgres_executor_crashed", thread=threading.current_thread().name, exc_info=error)
        end_process(EXIT_BUG)

    def _require_alive(self) -> None:
        if self._crash is not None:
            raise InvariantError("a thread of the PostgreSQL executor ended", f"{type(self._crash).__name__}: {self._crash}")
        if self._is_closing.is_set():
            raise ClosedError("the executor is closed")
