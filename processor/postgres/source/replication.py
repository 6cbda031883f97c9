"""A replication connection: a temporary slot copied from the changefeed's own, and its stream.

psycopg has no public replication API, so its `pq` layer is used: after START_REPLICATION, frames are
read with get_copy_data and status updates written with put_copy_data when the socket is ready. The slot
is temporary: it is dropped with the connection, and a crash leaves nothing behind. One thread owns a
connection; `interrupt` and `abort` are for any thread.
"""

from __future__ import annotations

import secrets
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg
from psycopg import pq, sql

from processor.postgres.source.pgoutput import status_update
from tablewire.errors import OperatingError
from tablewire.model.ids import ChangefeedID, Ts
from tablewire.postgres.connections import SourceUnavailableError, connect, error_text, is_connection_loss, quoted
from tablewire.postgres.lsn import format_lsn, parse_lsn
from tablewire.postgres.names import slot_name, temporary_slot_name
from tablewire.runtime.uris import redact_uri

COMMAND_WAIT_S = 1.0
COMMAND_MAX_S = 60.0
"""How long a command may take that waits for no transaction."""
SNAPSHOT_SLOT_MAX_S = 600.0
"""Creating a slot with a snapshot waits for all transactions that are open at the source."""
WALSENDER_TIMEOUT_MS = 20_000
"""wal_sender_timeout of these connections, independent of the server's: while a walsender skips changes that are not published,
it replies to a status request only after half of it."""
ASK_AFTER_S = 5.0
"""After this long without data, a reply is requested."""
ANSWER_MAX_S = 20.0
"""How long the reply may take. A process that hangs, or a host that vanished, closes no connection."""
ANSWER_MAX_DOUBLINGS = 5
"""Each loss by this timeout doubles it for the next connection, at most this often: the walsender may only be busy."""
_POLL_ERRORS = select.POLLERR | select.POLLHUP | select.POLLNVAL
RETRY_CODES = frozenset(
    {
        "53400",  # all replication slots are in use
        "53300",  # too many connections or walsenders
        "55000",  # the slot was changed while it was being copied
        "55006",  # the slot is in use
        "57014",  # canceled by a timeout
        "55P03",  # a lock was not available
    }
)
"""Temporary failures of the source: a retry may succeed."""
SKIPPED_CODES = frozenset(
    {
        "55000",  # the publication was skipped, as it does not exist at this point of the WAL
        "42704",  # an object does not exist
    }
)
"""PostgreSQL 18 warns with these and omits changes, where earlier versions raise an error."""

NO_BINARY_FORM = "42883"
"""undefined_function: no binary output function is available for a type."""

_COPY_SLOT = sql.SQL("SELECT pg_copy_logical_replication_slot({}, {}, true)")
_SLOT_POSITION = sql.SQL("SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = {}")
_IDENTIFY = sql.SQL("IDENTIFY_SYSTEM")
_CREATE_SLOT = sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT")
_START = sql.SQL(
    "START_REPLICATION SLOT {slot} LOGICAL {position}"
    " (proto_version '1', publication_names {publication}, messages 'true'{binary})"
)


class StreamLostError(SourceUnavailableError):
    """The stream ended; everything up to its last commit is valid."""


class SilentSourceError(StreamLostError):
    """The source does not reply on an open connection: its process hangs, or its host vanished."""


class NoBinaryFormError(StreamLostError):
    """A row has a value without a binary form: a binary stream cannot pass it."""


class ReplicationConnection:
    """One walsender and its temporary slot."""

    def __init__(self, uri: str, changefeed: ChangefeedID, purpose: str, server: tuple[int, int] | None = None) -> None:
        """Connect. purpose: one word of [a-z], part of the slot's name. server: the only one to read from (system, timeline)."""
        self.answer_max_s = ANSWER_MAX_S
        self._heard_at = time.monotonic()
        self._asked_at: float | None = None
        self._position: Ts = 0
        self.slot = temporary_slot_name(changefeed, f"{purpose[:8]}_{secrets.token_hex(5)}")
        self._base = slot_name(changefeed)
        self._server = server
        self._connection = connect(uri, application_name=f"tablewire {purpose}", replication=True, is_raw=True)
        self._pgconn = self._connection.pgconn
        self._warnings: list[str] = []
        self._aborted = False
        self._connection.add_notice_handler(self._notice)
        self._interrupt_read, self._interrupt_write = socket.socketpair()
        self._interrupt_read.setblocking(False)
        self._interrupt_write.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)
        self._poll.register(self._interrupt_read, select.POLLIN)
        self.get_copy_data = self._pgconn.get_copy_data

    def start(self, publication: str, start_ts: Ts, binary: bool) -> Ts:
        """Copy the changefeed's slot and start the stream after start_ts; return where it starts.

        That is later than start_ts if the slot is: the server keeps nothing from before.
        """
        self._execute(f"SET wal_sender_timeout = {WALSENDER_TIMEOUT_MS}", pq.ExecStatus.COMMAND_OK)
        self._require_server()
        self._query(_COPY_SLOT.format(self._base, self.slot))
        if not (rows := self._query(_SLOT_POSITION.format(self.slot))):
            raise OperatingError(f"slot {self.slot} does not exist at the source")
        start_ts = max(start_ts, parse_lsn(rows[0]))
        statement = _START.format(
            slot=sql.Identifier(self.slot),
            position=sql.SQL(format_lsn(start_ts)),
            publication=quoted(publication),
            binary=sql.SQL(", binary 'true'" if binary else ""),
        )
        self._execute(statement.as_string(None), pq.ExecStatus.COPY_BOTH)
        return start_ts

    def create_snapshot_slot(self, waiting: Callable[[], None]) -> tuple[Ts, str]:
        """Create another slot with an exported snapshot; return the position after which changes follow it, and its name.

        The snapshot exists until the next command on this connection. waiting: called each second while
        the server waits for transactions that are open.
        """
        self._require_server()
        rows = self._query(_CREATE_SLOT.format(sql.Identifier(self.slot)), SNAPSHOT_SLOT_MAX_S, waiting)
        return parse_lsn(rows[1]), rows[2]

    def _require_server(self) -> None:
        """Raise OperatingError if this is another server than the one that the tables were read from so far."""
        if self._server is None:
            return
        system, timeline, *_ = self._query(_IDENTIFY.format())
        if (int(system), int(timeline)) != self._server:
            raise OperatingError(
                f"the source is on timeline {timeline} of system {system}, and was on timeline {self._server[1]} of"
                f" {self._server[0]}: after a failover a table continues when the owner has accepted the new server"
            )

    def listen(self, timeout_s: float) -> None:
        """Wait for the stream. Request a reply from a source that is silent for long; raise StreamLostError without one."""
        before = self._heard_at
        self.wait(timeout_s)
        if self._heard_at != before:
            self._asked_at = None
            return
        now = time.monotonic()
        if self._asked_at is None:
            if now - self._heard_at >= ASK_AFTER_S:
                self._asked_at = now
                self.confirm(self._position, wants_answer=True)
        elif now - self._asked_at > self.answer_max_s:
            raise SilentSourceError(f"the source has not answered for {self.answer_max_s:g} s, and has not ended the connection")

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to read, `interrupt` was called, or timeout_s has passed; read what has arrived."""
        events = self._poll.poll(max(0.0, timeout_s) * 1000)
        for descriptor, _ in events:
            if descriptor == self._interrupt_read.fileno():
                self._drain_interrupts()
                continue
            try:
                self._pgconn.consume_input()
            except psycopg.Error as error:
                raise StreamLostError(f"the replication stream broke: {error_text(error)}") from None
            self._heard_at = time.monotonic()
            self.raise_warnings()

    def raise_warnings(self) -> None:
        """Raise OperatingError if the source has warned that it omits changes: the stream must not continue."""
        if self._warnings:
            raise OperatingError(f"the source cannot send all changes: {self._warnings[0]}")

    def interrupt(self) -> None:
        """End a `wait` of the owning thread. Any thread."""
        with suppress(OSError):  # it is full (an interrupt is pending) or closed
            self._interrupt_write.send(b"\0")

    def abort(self) -> None:
        """End a command of the owning thread that waits for the server. Any thread."""
        self._aborted = True
        self.interrupt()

    def confirm(self, position: Ts, wants_answer: bool = False) -> None:
        """Report to the walsender that everything at or before `position` was received.

        It need not be durable, since the changefeed's own slot retains the WAL.
        """
        self._position = position
        deadline = time.monotonic() + self.answer_max_s
        try:
            self._pgconn.put_copy_data(status_update(position, position, time.time_ns() // 1000, wants_answer))
            while self._pgconn.flush():
                if self._aborted:
                    raise StreamLostError("aborted")
                if time.monotonic() > deadline:
                    raise SilentSourceError(f"the source has read nothing for {self.answer_max_s:g} s")
                writable = select.poll()
                writable.register(self._pgconn.socket, select.POLLIN | select.POLLOUT)
                for _, event in writable.poll(1000):
                    if event & (select.POLLIN | _POLL_ERRORS):
                        self._pgconn.consume_input()
        except psycopg.Error as error:
            raise StreamLostError(f"the replication stream broke: {error_text(error)}") from None

    def raise_end(self) -> None:
        """Raise what ended the stream."""
        result = self._pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            self._raise(result)
        raise StreamLostError("the source ended the replication stream")

    def close(self) -> None:
        self._connection.close()
        self._interrupt_read.close()
        self._interrupt_write.close()

    @property
    def pid(self) -> int:
        """The server's process of this connection."""
        return self._pgconn.backend_pid

    def _query(
        self, statement: sql.Composed, max_s: float = COMMAND_MAX_S, waiting: Callable[[], None] | None = None
    ) -> list[str]:
        """Return the first row's columns as text, an empty list if there is no row."""
        result = self._execute(statement.as_string(None), pq.ExecStatus.TUPLES_OK, max_s, waiting)
        columns = range(result.nfields if result.ntuples else 0)
        return [(result.get_value(0, column) or b"").decode() for column in columns]

    def _execute(
        self,
        statement: str,
        expected: pq.ExecStatus,
        max_s: float = COMMAND_MAX_S,
        waiting: Callable[[], None] | None = None,
    ) -> pq.abc.PGresult:
        """Run one command; wait for the server for at most max_s, or until `abort`. Raise unless the result is as expected."""
        deadline = time.monotonic() + max_s
        try:
            self._pgconn.send_query(statement.encode())
            self._pgconn.flush()
            result: pq.abc.PGresult | None = None
            while True:
                while self._pgconn.is_busy():
                    if self._aborted:
                        raise StreamLostError("aborted")
                    if time.monotonic() > deadline:
                        raise SilentSourceError(f"the source has not answered within {max_s:g} s: {statement}")
                    self.wait(COMMAND_WAIT_S)
                    if waiting is not None:
                        waiting()
                following = self._pgconn.get_result()
                if following is None:
                    break
                result = following
                if result.status in (pq.ExecStatus.COPY_BOTH, pq.ExecStatus.FATAL_ERROR):
                    break
        except psycopg.Error as error:
            raise StreamLostError(f"the source is unreachable: {error_text(error)}") from None
        if result is None:
            raise StreamLostError("the source ended the connection")
        if result.status != expected:
            self._raise(result)
        return result

    def _raise(self, result: pq.abc.PGresult) -> None:
        code = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        error = psycopg.errors.error_from_result(result)
        text = redact_uri(error_text(error))
        if code == NO_BINARY_FORM:
            raise NoBinaryFormError(f"the source cannot send a value in binary form: {text}")
        if is_connection_loss(error) or code in RETRY_CODES or not code:
            raise StreamLostError(f"the source refused temporarily: {text}")
        raise OperatingError(f"the source refused the replication stream: {text}")

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        # By code, since texts are in the server's language.
        if diagnostic.severity_nonlocalized == "WARNING" and diagnostic.sqlstate in SKIPPED_CODES:
            self._warnings.append(redact_uri(diagnostic.message_primary or ""))

    def _drain_interrupts(self) -> None:
        with suppress(BlockingIOError):
            while self._interrupt_read.recv(4096):
                continue
