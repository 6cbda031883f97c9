"""ChangeStream: reads one replication stream, splits it into transactions by table, and hands those on.

A stream's own thread connects, reads and hands on; it connects again after a loss, from the last commit that it handed on, and
what came of an unfinished transaction is dropped. It never decodes a row. `position` is a transaction boundary: every transaction
that ends at or before it has been handed on, and keepalives move it while nothing happens; it is set after the hand-over, so
whoever reads a position first and then finds a queue empty knows that all up to there is done.

Subclasses say where it starts and what a delivery means: shared_stream.py and catch_up.py.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import psycopg
import structlog

from processor.postgres.queues import Budget, TableQueue
from processor.postgres.replication import ANSWER_MAX_DOUBLINGS, ReplicationConnection, SilentSourceError, StreamLostError
from processor.postgres.wire import (
    BEGIN,
    COMMIT,
    DELETE,
    FRAME_HEADER,
    INSERT,
    RELATION,
    TRUNCATE,
    UPDATE,
    XLOG_DATA,
    Part,
    Relation,
    Transaction,
    read_begin,
    read_commit_end,
    read_keepalive,
    read_relation,
    read_truncated,
)
from tablewire.errors import InvariantError, OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.connections import SourceUnavailableError, error_text
from tablewire.runtime.backoff import Backoff

FRAMES_A_TURN_MAX = 20_000
"""After so many frames a stream looks after its other duties, even while more are there."""
GATHER_FRAMES = 32
"""A turn that found fewer is followed by a pause, if the source is behind anyway: a walsender sends each change by itself, and to
wake up for each costs more than to read it."""
GATHER_SHARE = 0.02
"""The pause, as a share of how far the source is behind."""
GATHER_MIN_S = 0.000_2
GATHER_MAX_S = 0.000_5
"""Longer ones fill the socket, and a walsender that has to wait costs the source more than is saved here."""
STATUS_INTERVAL_S = 1.0
IDLE_WAIT_S = 1.0
SPILL_BYTES = 4 * 1024 * 1024
"""A transaction is looked at for its size each time it has grown by this much."""
FRAME_OVERHEAD_BYTES = 48
"""What Python adds to each frame: the object's header and its place in a list."""
RECONNECT_MIN_S = 0.1
RECONNECT_MAX_S = 2.0

_ROW_KINDS = frozenset((INSERT, UPDATE, DELETE))
_NO_TRANSACTION = Transaction(0, 0, 0)
_log = structlog.get_logger(__name__)


def gather_pause_s(frames: int, lag_us: int) -> float:
    """How long to let more arrive before the next turn. frames: that the last one found; lag_us: how far the source is behind."""
    pause_s = min(lag_us / 1_000_000 * GATHER_SHARE, GATHER_MAX_S)
    return pause_s if 0 < frames < GATHER_FRAMES and pause_s >= GATHER_MIN_S else 0.0


class StreamTable(Protocol):
    """What a stream needs of a table."""

    @property
    def table_id(self) -> int: ...

    @property
    def queue(self) -> TableQueue: ...

    def notify(self) -> None:
        """There is something to take, or the lane has moved. Any thread; cheap when it is known already."""
        ...

    def fail(self, error: Exception) -> None:
        """This table cannot go on."""
        ...


Connect = Callable[[str], ReplicationConnection]
"""Connects for a purpose (one word)."""


def table_key(table_id: int) -> bytes:
    """A table's id as it stands in a frame."""
    return table_id.to_bytes(4, "big")


class ChangeStream(ABC):
    """See the module. Public attributes are read by any thread."""

    def __init__(self, purpose: str, connect: Connect, publication: str, binary: bool, error_after_s: float) -> None:
        self.position: Ts = 0
        self.lost_since: float | None = None
        self.has_failed = False
        """The source refused for good; the thread ends, and a new stream may be tried."""
        self.lost_reason = ""
        self._purpose = purpose
        self._connect = connect
        self._publication = publication
        self._binary = binary
        self._error_after_s = error_after_s
        self.crashed: Callable[[BaseException], None] | None = None
        """Told when the thread ends by a bug of ours; set before the thread starts."""
        self.budget: Budget | None = None
        """What the open transaction may take together with all queues; set before the thread starts."""
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
        """commit_ts of the last whole transaction that each table got. A connection may be lost between two tables of one
        transaction; it is then given again from its beginning, and the first table must not get it twice."""
        self._lag_us = 0
        """Of the transaction that was last begun; 0 when the source has nothing more to send."""
        self._open_bytes = 0
        self._spill_at = SPILL_BYTES
        self._confirmed_at = 0.0
        self._silences = 0
        """Connections in a row that were given up because the source did not answer."""
        self.thread = threading.Thread(target=self._run_guarded, name=f"postgres-{purpose}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def interrupt(self) -> None:
        """Makes the stream look after its duties now. Any thread."""
        connection = self._connection
        if connection is not None:
            connection.interrupt()

    def stop(self) -> None:
        """Ends the stream soon. Any thread; join `thread` to wait."""
        self._stopping.set()
        connection = self._connection
        if connection is not None:
            connection.abort()

    # --- what subclasses say -----------------------------------------------------------------------------------------

    @abstractmethod
    def _start_ts(self) -> Ts:
        """Where to start (again)."""

    @abstractmethod
    def _started(self, start_ts: Ts) -> None:
        """The stream gives what lies behind start_ts, which may be later than it was asked for."""

    @abstractmethod
    def _deliver(self, table: StreamTable, parts: Sequence[Part], size: int) -> None:
        """Hands one whole transaction (or, after a spill, the next parts of one) to a table."""

    @abstractmethod
    def _oversize(self, key: bytes, table: StreamTable) -> bool:
        """The open transaction is large in this table. True = its parts so far were dealt with and are dropped here."""

    @abstractmethod
    def _give_up(self, key: bytes, table: StreamTable) -> None:
        """The table gets nothing of the open transaction, and must be read again."""

    @abstractmethod
    def _duties(self) -> bool:
        """At a transaction boundary, often: takes tables in and out. False = the stream has nothing left to do."""

    @abstractmethod
    def _broke(self) -> None:
        """The connection is lost inside a transaction or outside: drop what was handed on of an unfinished one."""

    def _skip_at_commit(self, table: StreamTable, end_ts: Ts) -> None:  # noqa: B027 - only some streams skip
        """The transaction of a table that `_oversize` gave up has ended."""

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run_guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:
            if self.crashed is not None:
                self.crashed(error)
            raise

    def _run(self) -> None:
        backoff = Backoff(RECONNECT_MIN_S, RECONNECT_MAX_S)
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                connection = self._connect(self._purpose)
                try:
                    self._receive(connection)
                    return
                finally:
                    self._connection = None
                    connection.close()
                    self._reset()
            except SourceUnavailableError as error:
                if isinstance(error, SilentSourceError):
                    self._silences = min(self._silences + 1, ANSWER_MAX_DOUBLINGS)
                self._note_loss(error, started)
            except psycopg.Error as error:
                self._note_loss(StreamLostError(f"the replication stream broke: {error_text(error)}"), started)
            except OperatingError as error:
                self.has_failed = True
                self._fail_all(error)
                return
            if time.monotonic() - started > RECONNECT_MAX_S:
                backoff.reset()
            self._stopping.wait(backoff.next_s())

    def _note_loss(self, error: SourceUnavailableError, started: float) -> None:
        now = time.monotonic()
        if self.lost_since is None:
            self.lost_since = started
            _log.warning("postgres_stream_lost", stream=self._purpose, reason=str(error))
        self.lost_reason = str(error)
        if now - self.lost_since > self._error_after_s:
            self._fail_all(error)

    def _fail_all(self, error: OperatingError) -> None:
        if not self.has_failed:
            _log.error("postgres_stream_failed", stream=self._purpose, reason=str(error))
        for table in list(self._inboxes.values()):
            table.fail(error)

    def _receive(self, connection: ReplicationConnection) -> None:
        connection.answer_max_s *= 2**self._silences
        self._connection = connection  # from here on `stop` ends what waits for the server
        if self._stopping.is_set():
            return
        start_ts = connection.start(self._publication, self._start_ts(), self._binary)
        self._started(start_ts)
        self.position = max(self.position, start_ts)
        if self.lost_since is not None:
            _log.info("postgres_stream_again", stream=self._purpose)
        self.lost_since = None
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
                pause_s = gather_pause_s(frames, self._lag_us)
                if pause_s:
                    time.sleep(pause_s)
                connection.listen(IDLE_WAIT_S)

    @property
    def _is_inside(self) -> bool:
        return self._transaction is not _NO_TRANSACTION

    def _read_turn(self, connection: ReplicationConnection) -> int:
        """Reads frames; how many. Fewer than FRAMES_A_TURN_MAX: there was none left."""
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
                    if key not in self._inboxes or key in self._skipped:
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
        if kind == BEGIN:
            self._transaction = read_begin(frame)
            self._lag_us = self._transaction.lag_us
        elif kind == COMMIT:
            self._commit(read_commit_end(frame))
        elif kind == RELATION:
            key = frame[FRAME_HEADER + 1 : FRAME_HEADER + 5]
            self._close_part(key)
            self._relations[key] = read_relation(frame)
        elif kind == TRUNCATE:
            for key in read_truncated(frame):
                if key in self._inboxes and key not in self._skipped:
                    self._frames.setdefault(key, []).append(frame)
        # Origin, type and message frames say nothing that a table needs.

    def _close_part(self, key: bytes) -> None:
        """What came of this table so far has another shape than what follows."""
        frames = self._frames.pop(key, None)
        if frames:
            self._parts.setdefault(key, []).append(self._part(key, frames))

    def _part(self, key: bytes, frames: list[bytes]) -> Part:
        relation = self._relations.get(key)
        if relation is None:
            raise InvariantError("a change came before its relation", f"relation {int.from_bytes(key, 'big')}")
        size = sum(map(len, frames)) + FRAME_OVERHEAD_BYTES * len(frames)
        return Part(relation, frames, size, self._transaction, 0, False)

    def _commit(self, end_ts: Ts) -> None:
        if self._transaction.commit_ts < self.position:
            self._end_transaction()  # from before our start: the server skips those, so this is only for safety
            return
        self._raise_warnings()
        if self._parts:
            for key in list(self._parts):
                self._close_part(key)
        for key, frames in self._frames.items():
            self._parts.setdefault(key, []).append(self._part(key, frames))
        for key in self._handed_on - self._parts.keys():
            self._parts[key] = [self._part(key, [])]  # nothing followed the last piece: this one says that it is complete
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
        """Before the position moves: a source that has warned of missing changes must not be followed."""
        connection = self._connection
        if connection is not None:
            connection.raise_warnings()

    def _moved(self) -> None:  # noqa: B027 - only some streams care
        """The position has moved, at a transaction boundary."""

    def _keepalive(self, connection: ReplicationConnection, frame: bytes) -> None:
        end_ts, wants_answer = read_keepalive(frame)
        if not self._is_inside and end_ts > self.position:
            self._raise_warnings()
            self._lag_us = 0
            self.position = end_ts
            self._moved()
            wants_answer = True  # the walsender speaks on only after it knows that this arrived
        if wants_answer:
            connection.confirm(self.position)

    def _spill(self) -> None:
        """The open transaction is large: tables may have to be given up, or get their parts before the commit."""
        for key in list(self._frames.keys() | self._parts.keys()):
            table = self._inboxes.get(key)
            if table is None or self._oversize(key, table):
                self._frames.pop(key, None)
                self._parts.pop(key, None)
        self._open_bytes = sum(self._held(key) for key in self._frames.keys() | self._parts.keys())
        budget = self.budget
        if budget is not None and self._open_bytes + budget.held_bytes > budget.max_bytes:
            self._shrink(budget.max_bytes // 2)
        self._spill_at = self._open_bytes + SPILL_BYTES

    def _shrink(self, max_bytes: int) -> None:
        """A transaction over many tables can be too large although none of them is: gives up the largest ones until at most
        max_bytes of it wait here."""
        for held, key in sorted(((self._held(key), key) for key in self._frames.keys() | self._parts.keys()), reverse=True):
            if self._open_bytes <= max_bytes:
                return
            table = self._inboxes.get(key)
            if table is not None:
                self._give_up(key, table)
            self._frames.pop(key, None)
            self._parts.pop(key, None)
            self._open_bytes -= held

    def _held(self, key: bytes) -> int:
        """Bytes of the open transaction that wait here for this table."""
        frames = self._frames.get(key, ())
        waiting = sum(part.size for part in self._parts.get(key, ()))
        return waiting + sum(map(len, frames)) + FRAME_OVERHEAD_BYTES * len(frames)

    def _end_transaction(self) -> None:
        self._frames.clear()
        self._parts.clear()
        self._skipped.clear()
        self._handed_on.clear()
        self._transaction = _NO_TRANSACTION
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
        """Called while a delivery waits: the walsender must hear of us."""
        connection = self._connection
        if connection is not None:
            self._confirm_if_due(connection)


__all__ = ["ChangeStream", "Connect", "StreamLostError", "StreamTable", "table_key"]
