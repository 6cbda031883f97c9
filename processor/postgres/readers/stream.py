"""ChangeStream: reads one replication stream, divides it into transactions by table, and delivers them.

The thread of a stream connects, reads and delivers. After a connection loss it connects again from the
last commit that it delivered, and drops what it has of an unfinished transaction. It never decodes a
row. `position` is a transaction boundary: every transaction that ends at or before it was delivered, and
keepalives advance it while nothing happens. It is set after the delivery: if a position is read first
and a queue is then found empty, everything up to that position is done.

Subclasses define what a delivery means: shared_stream.py and catch_up.py.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import psycopg
import structlog

from processor.postgres.source import pgoutput
from processor.postgres.source.pgoutput import COMMIT, FRAME_HEADER, XLOG_DATA, Part, Relation, Transaction
from processor.postgres.source.replication import (
    ANSWER_MAX_DOUBLINGS,
    NoBinaryFormError,
    ReplicationConnection,
    SilentSourceError,
    StreamLostError,
)
from processor.postgres.tables.queues import Budget, TableQueue
from processor.postgres.tables.threads import new_thread
from tablewire.errors import InvariantError, OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.connections import SourceUnavailableError, error_text
from tablewire.postgres.identity import MARK_PREFIX
from tablewire.runtime.backoff import Backoff

FRAMES_A_TURN_MAX = 20_000
"""After this many frames a stream attends to its other duties, even if more have arrived."""
GATHER_FRAMES = 32
"""A turn with fewer is followed by a pause, if the source lags: a walsender sends each change separately, and waking up for each
one costs more than reading it."""
GATHER_SHARE = 0.02
"""The pause, as a share of the source's lag."""
GATHER_MIN_S = 0.000_2
GATHER_MAX_S = 0.000_5
"""Longer pauses fill the socket, and a walsender that has to wait costs the source more than is saved here."""
STATUS_INTERVAL_S = 1.0
IDLE_WAIT_S = 1.0
SPILL_BYTES = 4 * 1024 * 1024
"""The size of the open transaction is examined each time it has grown by this much."""
FRAME_OVERHEAD_BYTES = 48
"""What Python adds to each frame: the object's header and its place in a list."""
RECONNECT_MIN_S = 0.1
RECONNECT_MAX_S = 2.0

_ROW_KINDS = frozenset((pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE))
_NO_TRANSACTION = Transaction(0, 0, 0)
_log = structlog.get_logger(__name__)


def gather_pause_s(frames: int, lag_us: int) -> float:
    """Return how long to let frames arrive before the next turn. frames: of the last turn; lag_us: of the source."""
    pause_s = min(lag_us / 1_000_000 * GATHER_SHARE, GATHER_MAX_S)
    return pause_s if 0 < frames < GATHER_FRAMES and pause_s >= GATHER_MIN_S else 0.0


class StreamTable(Protocol):
    """A table as a stream sees it. needs_text: it has values that the sink can only read as text."""

    table_id: int
    queue: TableQueue
    needs_solo: bool
    needs_text: bool

    def notify(self) -> None:
        """Announce that there is something to take, or that a lane has advanced. Any thread; cheap if already known."""
        ...

    def fail(self, error: Exception) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What the streams of one executor share.

    connect: opens a replication connection for a purpose (one word). created_ts: where the publication
    certainly existed; nothing before may be read. error_after_s: how long a loss is retried without an
    error. budget: of all queues and the open transaction. crashed: called when a thread ends by a bug.
    sink_identity: of the sink's database; transactions that are marked with it came from there.
    """

    connect: Callable[[str], ReplicationConnection]
    publication: str
    created_ts: Ts
    binary: bool
    error_after_s: float
    queue_max_bytes: int
    budget: Budget
    crashed: Callable[[BaseException], None]
    sink_identity: Callable[[], str]


def table_key(table_id: int) -> bytes:
    return table_id.to_bytes(4, "big")


class ChangeStream(ABC):
    """See the module. Any thread may read the public attributes."""

    def __init__(self, purpose: str, context: StreamContext, is_binary: bool) -> None:
        self.position: Ts = 0
        self.is_binary = context.binary and is_binary
        self.has_failed = False
        """The source refused permanently: the thread ends, and a new stream may be tried."""
        self._purpose = purpose
        self._context = context
        self._lost_since: float | None = None
        self._stopping = threading.Event()
        self._connection: ReplicationConnection | None = None
        self._inboxes: dict[bytes, StreamTable] = {}
        self._relations: dict[bytes, Relation] = {}
        self._transaction = _NO_TRANSACTION
        self._frames: dict[bytes, list[bytes]] = {}
        self._parts: dict[bytes, list[Part]] = {}
        self._skipped: set[bytes] = set()
        self._handed_on: set[bytes] = set()
        self._delivered: dict[bytes, Ts] = {}
        """commit_ts of the last whole transaction that was delivered to each table. A connection may be lost between two tables
        of one transaction, which is then sent again; the first table must not get it twice."""
        self._is_ignored = False
        """The open transaction came from the sink: it is not sent back."""
        self._lag_us = 0
        """Of the transaction that was last begun; 0 if the source has nothing more to send."""
        self._open_bytes = 0
        self._spill_at = SPILL_BYTES
        self._confirmed_at = 0.0
        self._silences = 0
        """Consecutive connections that were closed because the source did not reply."""
        self.thread = new_thread(f"postgres-{purpose}", self._run, context.crashed)

    def interrupt(self) -> None:
        """Make the stream attend to its duties now. Any thread."""
        if (connection := self._connection) is not None:
            connection.interrupt()

    def stop(self) -> None:
        """End the stream soon. Any thread; join `thread` to wait."""
        self._stopping.set()
        if (connection := self._connection) is not None:
            connection.abort()

    # --- what subclasses define --------------------------------------------------------------------------------------

    @abstractmethod
    def _started(self, start_ts: Ts) -> None:
        """Handle that the stream begins after start_ts, which may be later than requested."""

    @abstractmethod
    def _deliver(self, table: StreamTable, parts: Sequence[Part], size: int) -> None:
        """Deliver one whole transaction (or, after a spill, the next parts of one) to a table."""

    @abstractmethod
    def _duties(self) -> bool:
        """Add and remove tables, at a transaction boundary; return False if the stream has nothing left to do."""

    def _oversize(self, key: bytes, table: StreamTable) -> bool:
        """Handle that the open transaction may be large in this table; return True to drop its parts here."""
        if self._held(key) <= self._context.queue_max_bytes:
            return False
        self._give_up(key, table)
        return True

    def _give_up(self, key: bytes, table: StreamTable) -> None:
        """Skip the open transaction for this table, which must be read again."""
        self._skipped.add(key)

    def _broke(self) -> None:  # noqa: B027 - optional
        """Drop what was delivered of an unfinished transaction: the connection is lost."""

    def _skip_at_commit(self, table: StreamTable, end_ts: Ts) -> None:  # noqa: B027 - optional
        """Handle the end of a transaction that the table was excluded from."""

    def _moved(self) -> None:  # noqa: B027 - optional
        """Handle that the position has advanced, at a transaction boundary."""

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(RECONNECT_MIN_S, RECONNECT_MAX_S)
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                connection = self._context.connect(self._purpose)
                try:
                    self._receive(connection)
                    return
                finally:
                    self._connection = None
                    connection.close()
                    self._reset()
            except NoBinaryFormError as error:
                if not self.is_binary:
                    self._fail_for_good(error)
                    return
                # The row may be of any published table, also of one that is not read here.
                _log.warning("postgres_stream_text", stream=self._purpose, reason=str(error))
                self.is_binary = False
            except SourceUnavailableError as error:
                if isinstance(error, SilentSourceError):
                    self._silences = min(self._silences + 1, ANSWER_MAX_DOUBLINGS)
                self._note_loss(error, started)
            except psycopg.Error as error:
                self._note_loss(StreamLostError(f"the replication stream broke: {error_text(error)}"), started)
            except OperatingError as error:
                self._fail_for_good(error)
                return
            if time.monotonic() - started > RECONNECT_MAX_S:
                backoff.reset()
            self._stopping.wait(backoff.next_s())

    def _note_loss(self, error: SourceUnavailableError, started: float) -> None:
        if self._lost_since is None:
            self._lost_since = started
            _log.warning("postgres_stream_lost", stream=self._purpose, reason=str(error))
        if time.monotonic() - self._lost_since > self._context.error_after_s:
            self._fail_all(error)

    def _fail_for_good(self, error: OperatingError) -> None:
        self.has_failed = True
        self._fail_all(error)

    def _fail_all(self, error: OperatingError) -> None:
        if not self.has_failed:
            _log.error("postgres_stream_failed", stream=self._purpose, reason=str(error))
        for table in list(self._inboxes.values()):
            table.fail(error)

    def _receive(self, connection: ReplicationConnection) -> None:
        connection.answer_max_s *= 2**self._silences
        self._connection = connection  # from here on `stop` ends a wait for the server
        if self._stopping.is_set():
            return
        wanted_ts = max(self.position, self._context.created_ts)
        start_ts = connection.start(self._context.publication, wanted_ts, self.is_binary)
        self._started(start_ts)
        self.position = max(self.position, start_ts)
        if self._lost_since is not None:
            _log.info("postgres_stream_again", stream=self._purpose)
        self._lost_since = None
        if not self._duties():
            return
        while not self._stopping.is_set():
            frames = self._read_turn(connection)
            if self._stopping.is_set():
                return
            if not self._is_inside and not self._duties():
                return
            self._confirm_if_due(connection)
            if frames < FRAMES_A_TURN_MAX:
                if pause_s := gather_pause_s(frames, self._lag_us):
                    time.sleep(pause_s)
                connection.listen(IDLE_WAIT_S)

    @property
    def _is_inside(self) -> bool:
        return self._transaction is not _NO_TRANSACTION

    def _read_turn(self, connection: ReplicationConnection) -> int:
        """Read frames and return how many; fewer than FRAMES_A_TURN_MAX if none is left."""
        get_copy_data = connection.get_copy_data
        open_frames = self._frames
        open_bytes = self._open_bytes
        for count in range(FRAMES_A_TURN_MAX):
            size, view = get_copy_data(1)
            if size <= 0:
                self._open_bytes = open_bytes
                if size < 0:
                    connection.raise_end()
                return count
            if view[0] != XLOG_DATA:
                self._keepalive(connection, bytes(view))
                continue
            kind = view[FRAME_HEADER]
            if kind in _ROW_KINDS:
                key = bytes(view[26:30])
                frames = open_frames.get(key)
                if frames is None:
                    if key not in self._inboxes or key in self._skipped or self._is_ignored:
                        continue
                    frames = open_frames[key] = []
                frames.append(bytes(view))
                open_bytes += size + FRAME_OVERHEAD_BYTES
                if open_bytes > self._spill_at:
                    self._open_bytes = open_bytes
                    self._spill()
                    open_bytes = self._open_bytes
            else:
                self._other(kind, bytes(view))
                if kind == COMMIT:
                    open_bytes = 0
        self._open_bytes = open_bytes
        return FRAMES_A_TURN_MAX

    def _other(self, kind: int, frame: bytes) -> None:
        if kind == pgoutput.BEGIN:
            self._transaction = pgoutput.read_begin(frame)
            self._lag_us = self._transaction.lag_us
        elif kind == COMMIT:
            self._commit(pgoutput.read_commit_end(frame))
        elif kind == pgoutput.RELATION:
            key = frame[FRAME_HEADER + 1 : FRAME_HEADER + 5]
            self._close_part(key)
            relation = pgoutput.read_relation(frame)
            self._relations[key] = relation if self.is_binary else replace(relation, is_binary=False)
        elif kind == pgoutput.TRUNCATE:
            for key in pgoutput.read_truncated(frame):
                if key in self._inboxes and key not in self._skipped and not self._is_ignored:
                    self._frames.setdefault(key, []).append(frame)
        elif kind == pgoutput.MESSAGE:
            is_transactional, prefix, content = pgoutput.read_message(frame)
            if is_transactional and prefix == MARK_PREFIX:
                self._is_ignored = content.decode() == self._context.sink_identity()
        # Tables need nothing from origin and type frames.

    def _close_part(self, key: bytes) -> None:
        """Turn the frames of this table into a part: what follows may have another shape."""
        if frames := self._frames.pop(key, None):
            self._parts.setdefault(key, []).append(self._part(key, frames))

    def _part(self, key: bytes, frames: list[bytes]) -> Part:
        if (relation := self._relations.get(key)) is None:
            raise InvariantError("a change arrived before its relation", f"relation {int.from_bytes(key, 'big')}")
        return Part(relation, frames, _size(frames), self._transaction, 0, False)

    def _commit(self, end_ts: Ts) -> None:
        if self._transaction.commit_ts < self.position:
            self._end_transaction()  # from before the start: the server should have skipped it
            return
        self._raise_warnings()
        for key in list(self._frames):
            self._close_part(key)
        for key in self._handed_on - self._parts.keys():
            self._parts[key] = [self._part(key, [])]  # nothing followed the last piece: this one marks the end
        for key, parts in self._parts.items():
            table = self._inboxes.get(key)
            if table is None or self._delivered.get(key, -1) >= self._transaction.commit_ts:
                continue
            for part in parts:
                part.end_ts = end_ts
            parts[-1].is_last = True
            self._deliver(table, parts, sum(part.size for part in parts))
            self._delivered[key] = self._transaction.commit_ts
        for key in self._skipped:
            if key in self._inboxes:
                self._skip_at_commit(self._inboxes[key], end_ts)
        self._end_transaction()
        self.position = max(self.position, end_ts)
        self._silences = 0
        self._moved()

    def _raise_warnings(self) -> None:
        """Raise OperatingError, before the position advances, if the source has warned of missing changes."""
        if self._connection is not None:
            self._connection.raise_warnings()

    def _keepalive(self, connection: ReplicationConnection, frame: bytes) -> None:
        end_ts, wants_answer = pgoutput.read_keepalive(frame)
        if not self._is_inside and end_ts > self.position:
            self._raise_warnings()
            self._lag_us = 0
            self.position = end_ts
            self._moved()
            wants_answer = True  # the walsender only continues when it knows that this has arrived
        if wants_answer:
            connection.confirm(self.position)

    def _spill(self) -> None:
        """Give tables up, or deliver parts before the commit: the open transaction is large."""
        for key in self._frames.keys() | self._parts.keys():
            table = self._inboxes.get(key)
            if table is None or self._oversize(key, table):
                self._drop(key)
        held = {key: self._held(key) for key in self._frames.keys() | self._parts.keys()}
        self._open_bytes = sum(held.values())
        budget = self._context.budget
        if self._open_bytes + budget.held_bytes > budget.max_bytes:
            self._shrink(held, budget.max_bytes // 2)
        self._spill_at = self._open_bytes + SPILL_BYTES

    def _shrink(self, held: dict[bytes, int], max_bytes: int) -> None:
        """Give up the largest tables until at most max_bytes wait here: many small ones can be too large together."""
        for key in sorted(held, key=held.__getitem__, reverse=True):
            if self._open_bytes <= max_bytes:
                return
            if (table := self._inboxes.get(key)) is not None:
                self._give_up(key, table)
            self._drop(key)
            self._open_bytes -= held[key]

    def _drop(self, key: bytes) -> None:
        self._frames.pop(key, None)
        self._parts.pop(key, None)

    def _held(self, key: bytes) -> int:
        """Return how many bytes of the open transaction wait here for this table."""
        return _size(self._frames.get(key, ())) + sum(part.size for part in self._parts.get(key, ()))

    def _end_transaction(self) -> None:
        self._frames.clear()
        self._parts.clear()
        self._skipped.clear()
        self._handed_on.clear()
        self._transaction = _NO_TRANSACTION
        self._is_ignored = False
        self._open_bytes = 0
        self._spill_at = SPILL_BYTES

    def _reset(self) -> None:
        self._broke()
        self._end_transaction()
        self._relations.clear()

    def _confirm_if_due(self, connection: ReplicationConnection) -> None:
        now = time.monotonic()
        if now - self._confirmed_at >= STATUS_INTERVAL_S:
            self._confirmed_at = now
            connection.confirm(self.position)

    def _stay_alive(self) -> None:
        """Report to the walsender while a delivery waits."""
        if self._connection is not None:
            self._confirm_if_due(self._connection)


def _size(frames: Sequence[bytes]) -> int:
    return sum(map(len, frames)) + FRAME_OVERHEAD_BYTES * len(frames)
