"""A replication connection: a temporary slot copied from the changefeed's own, and the stream that it gives.

psycopg has no public replication API; its `pq` layer does it: START_REPLICATION answers COPY BOTH, then frames are read with
get_copy_data and status updates written with put_copy_data, on the socket's readiness. The slot is temporary: it vanishes with
the connection, and a crash leaves nothing behind. One thread owns a connection; `interrupt` is for any thread.
"""

from __future__ import annotations

import secrets
import select
import socket
import time

import psycopg
from psycopg import pq

from processor.postgres.wire import status_update
from tablewire.errors import OperatingError
from tablewire.model.ids import ChangefeedID, Ts
from tablewire.postgres.connections import (
    SourceUnavailableError,
    connect,
    error_text,
    is_connection_loss,
    quote_text,
)
from tablewire.postgres.lsn import format_lsn, parse_lsn
from tablewire.postgres.names import slot_name, temporary_slot_name
from tablewire.runtime.uris import redact_uri

COMMAND_WAIT_S = 1.0
COMMAND_MAX_S = 60.0
"""How long a command may take that waits for nobody."""
SNAPSHOT_SLOT_MAX_S = 600.0
"""A slot with a snapshot waits for all transactions that are open at the source."""
WALSENDER_TIMEOUT_MS = 20_000
"""Our walsenders' wal_sender_timeout, whatever the server's is: while a walsender skips what we did not ask for it looks at our
questions only after half of it."""
ASK_AFTER_S = 5.0
"""A source that was silent for so long is asked whether it is there."""
ANSWER_MAX_S = 20.0
"""How long it may take to say so. A process that hangs, or a host that vanished, closes no connection."""
ANSWER_MAX_DOUBLINGS = 5
"""Each loss by silence doubles the patience of the next connection, as far as this: a walsender may be busy after all."""
_POLL_ERRORS = select.POLLERR | select.POLLHUP | select.POLLNVAL
RETRY_CODES = frozenset(
    {
        "53400",  # all replication slots are in use
        "53300",  # too many connections or walsenders
        "55000",  # the slot was changed while it was being copied
        "55006",  # the slot is in use
        "57014",  # cancelled by a timeout
        "55P03",  # a lock was not available
    }
)
"""Trouble of the moment at the source: worth another try."""


SKIPPED_CODES = frozenset(
    {
        "55000",  # the publication was skipped, as it does not exist at this point of the WAL
        "42704",  # an object does not exist
    }
)
"""PostgreSQL 18 warns with these and leaves changes out, where earlier versions raise an error."""


class StreamLostError(SourceUnavailableError):
    """The stream ended; what it gave up to the last commit is valid."""


class SilentSourceError(StreamLostError):
    """The source does not answer, but its connection stands: the process hangs, or nobody is there any more."""


class ReplicationConnection:
    """One walsender and its temporary slot."""

    def __init__(self, uri: str, changefeed: ChangefeedID, purpose: str) -> None:
        """Connects. purpose: one word of [a-z], part of the slot's name."""
        self.answer_max_s = ANSWER_MAX_S
        self._heard_at = time.monotonic()
        self._asked_at: float | None = None
        self._position: Ts = 0
        self.slot = temporary_slot_name(changefeed, f"{purpose[:8]}_{secrets.token_hex(5)}")
        self._base = slot_name(changefeed)
        self._connection = connect(uri, application_name=f"tablewire {purpose}", replication=True)
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
        """Copies the changefeed's slot and starts the stream behind start_ts, or where the copy stands if that is later: the
        server has nothing from before. Gives where it really starts."""
        result = self._execute(f"SET wal_sender_timeout = {WALSENDER_TIMEOUT_MS}")
        if result.status != pq.ExecStatus.COMMAND_OK:
            self._raise(result)
        self._query(f"SELECT pg_copy_logical_replication_slot({quote_text(self._base)}, {quote_text(self.slot)}, true)")
        start_ts = max(start_ts, self._confirmed_ts(self.slot))
        options = f"proto_version '1', publication_names {quote_text(chr(34) + publication + chr(34))}"
        if binary:
            options += ", binary 'true'"
        statement = f'START_REPLICATION SLOT "{self.slot}" LOGICAL {format_lsn(start_ts)} ({options})'
        result = self._execute(statement)
        if result.status != pq.ExecStatus.COPY_BOTH:
            self._raise(result)
        return start_ts

    def create_snapshot_slot(self) -> tuple[Ts, str]:
        """Makes a slot of its own with an exported snapshot: (the position behind which its changes begin, the snapshot's name).
        The snapshot lives until the next command on this connection."""
        statement = f'CREATE_REPLICATION_SLOT "{self.slot}" TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT'
        rows = self._query(statement, SNAPSHOT_SLOT_MAX_S)
        return parse_lsn(rows[1]), rows[2]

    def _confirmed_ts(self, slot: str) -> Ts:
        rows = self._query(f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = {quote_text(slot)}")
        if not rows:
            raise OperatingError(f"slot {slot} does not exist at the source")
        return parse_lsn(rows[0])

    def listen(self, timeout_s: float) -> None:
        """`wait` for a stream: a source that says nothing for long is asked, and StreamLostError when it does not answer."""
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
        """Until there is something to read, `interrupt` was called, or timeout_s; reads what has arrived."""
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
        """OperatingError when the source has warned that it leaves changes out: never go on."""
        if self._warnings:
            raise OperatingError(f"the source cannot give all changes: {self._warnings[0]}")

    def interrupt(self) -> None:
        """Ends a `wait` of the owning thread. Any thread."""
        try:
            self._interrupt_write.send(b"\0")
        except (BlockingIOError, OSError):
            return  # it is full (an interrupt is pending) or closed (nobody waits)

    def abort(self) -> None:
        """Ends a command of the owning thread that still waits for the server. Any thread."""
        self._aborted = True
        self.interrupt()

    def confirm(self, position: Ts, wants_answer: bool = False) -> None:
        """Tells the walsender that everything at or before `position` was received. It need not be durable: the changefeed's own
        slot is what keeps the WAL."""
        self._position = position
        deadline = time.monotonic() + self.answer_max_s
        try:
            self._pgconn.put_copy_data(status_update(position, position, time.time_ns() // 1000, wants_answer))
            while self._pgconn.flush():
                if self._aborted:
                    raise StreamLostError("given up")
                if time.monotonic() > deadline:
                    raise SilentSourceError(f"the source has taken nothing for {self.answer_max_s:g} s")
                writable = select.poll()
                writable.register(self._pgconn.socket, select.POLLIN | select.POLLOUT)
                for _, event in writable.poll(1000):
                    if event & (select.POLLIN | _POLL_ERRORS):
                        self._pgconn.consume_input()
        except psycopg.Error as error:
            raise StreamLostError(f"the replication stream broke: {error_text(error)}") from None

    def raise_end(self) -> None:
        """The stream has no more data: raises what ended it."""
        result = self._pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            self._raise(result)
        raise StreamLostError("the source ended the replication stream")

    def close(self) -> None:
        self._connection.close()
        self._interrupt_read.close()
        self._interrupt_write.close()

    def _query(self, statement: str, max_s: float = COMMAND_MAX_S) -> list[str]:
        """The first row's columns as text."""
        result = self._execute(statement, max_s)
        if result.status != pq.ExecStatus.TUPLES_OK:
            self._raise(result)
        if not result.ntuples:
            return []
        return [(result.get_value(0, column) or b"").decode() for column in range(result.nfields)]

    def _execute(self, statement: str, max_s: float = COMMAND_MAX_S) -> pq.abc.PGresult:
        """Runs one command; waits for the server for at most max_s, or until `abort`."""
        deadline = time.monotonic() + max_s
        try:
            self._pgconn.send_query(statement.encode())
            self._pgconn.flush()
            result: pq.abc.PGresult | None = None
            while True:
                while self._pgconn.is_busy():
                    if self._aborted:
                        raise StreamLostError("given up")
                    if time.monotonic() > deadline:
                        raise SilentSourceError(f"the source has not done within {max_s:g} s: {statement}")
                    self.wait(COMMAND_WAIT_S)
                following = self._pgconn.get_result()
                if following is None:
                    break
                result = following
                if result.status in (pq.ExecStatus.COPY_BOTH, pq.ExecStatus.FATAL_ERROR):
                    break
        except psycopg.Error as error:
            raise StreamLostError(f"the source does not answer: {error_text(error)}") from None
        if result is None:
            raise StreamLostError("the source does not answer")
        return result

    def _raise(self, result: pq.abc.PGresult) -> None:
        code = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        error = psycopg.errors.error_from_result(result)
        text = redact_uri(error_text(error))
        if is_connection_loss(error) or code in RETRY_CODES or not code:
            raise StreamLostError(f"the source refused for now: {text}")
        raise OperatingError(f"the source refused the replication stream: {text}")

    def _notice(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        # By codes: the texts come in the server's language.
        if diagnostic.severity_nonlocalized == "WARNING" and diagnostic.sqlstate in SKIPPED_CODES:
            self._warnings.append(redact_uri(diagnostic.message_primary or ""))

    def _drain_interrupts(self) -> None:
        try:
            while self._interrupt_read.recv(4096):
                continue
        except BlockingIOError:
            return
