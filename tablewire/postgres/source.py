"""PostgresSource: one changefeed's view of its PostgreSQL source, as the owner needs it (tablewire/source.py).

Blocking; one thread at a time. One connection, opened when it is needed and again after it broke; nothing is kept that a new
owner could not read from the server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import psycopg
import structlog

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import SourceTable, TableFilter, matching_tables
from tablewire.postgres.checks import run_checks
from tablewire.postgres.connections import (
    SCHEMES,
    Connection,
    ReconnectingConnection,
    SourceUnavailableError,
    StatementError,
    parse_uri,
    server_name,
)
from tablewire.postgres.lsn import parse_lsn
from tablewire.postgres.names import slot_name
from tablewire.postgres.options import parse_options
from tablewire.postgres.sink_checkpoint import SinkNotes
from tablewire.postgres.slots import (
    advance_slot,
    create_publication,
    create_slot,
    read_publication,
    read_slot,
    sync_publication,
)
from tablewire.source import CheckFailure, SourceRequest

HEARTBEAT_AFTER_S = 10.0
"""A checkpoint that stands still this long behind the WAL's end gets a message into the WAL, so that walsenders report again."""
DROP_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_MS = 30_000
CLIENT_TIMEOUT_S = 300.0
"""For all statements of one call together."""

_log = structlog.get_logger(__name__)


class PostgresSource:
    """See the module. Every method may raise OperatingError with one clear text."""

    def __init__(self, request: SourceRequest) -> None:
        """No I/O. OperatingError for a URI, a filter or an option that cannot be right."""
        parse_uri(request.source_uri)
        parse_options(request.options)
        self._request = request
        self._filter = TableFilter(request.tables)
        self._name = slot_name(request.changefeed)
        self._connection = ReconnectingConnection(
            request.source_uri,
            application_name="tablewire owner",
            set_up=lambda connection: connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}".encode()),
            limit_s=CLIENT_TIMEOUT_S,
        )
        self._advanced: tuple[Ts, float] = (0, 0.0)
        self._is_note_missing = False
        self._notes: SinkNotes | None = None
        if request.sink_uri.partition("://")[0] in SCHEMES:
            where = f"sink {server_name(request.sink_uri)}"
            self._notes = SinkNotes(request.sink_uri, where, str(request.changefeed))
        self._warned: frozenset[TableID] = frozenset()

    def check(self) -> Sequence[CheckFailure]:
        """All that `create` promises; changes nothing. Uses connections of its own."""
        return run_checks(self._request, self._filter, self._name)

    def start(self) -> Ts:
        """Makes publication and slot where they are missing; the position from which the slot gives changes."""
        return self._connection.run("start", self._start)

    def tables(self) -> Mapping[TableID, str]:
        """What the filter matches now, after the publication (if there is one) was made to list the same tables."""
        return self._connection.run("list tables", self._tables)

    def current_ts(self) -> Ts:
        """The end of the WAL that is written: every commit that was answered by now is at or before it."""

        def read(connection: Connection) -> Ts:
            return _position(connection, "SELECT pg_current_wal_lsn()::text")

        return self._connection.run("read the position", read)

    def advance(self, checkpoint_ts: Ts) -> None:
        """Moves the slot behind the global checkpoint; never back, and not while the sink cannot note it first. Also wakes an
        idle source's walsenders. OperatingError when the sink has lost what it had confirmed."""
        self._connection.run("advance the slot", lambda connection: self._advance(connection, checkpoint_ts))

    def retained_bytes(self) -> int:
        """WAL that the server keeps for the slot; 0 when there is no slot."""

        def read(connection: Connection) -> int:
            slot = read_slot(connection, self._name)
            if slot is None:
                return 0
            return max(0, _position(connection, "SELECT pg_current_wal_lsn()::text") - slot.restart_ts)

        return self._connection.run("read the slot", read)

    def drop(self) -> None:
        """Removes slot and publication; idempotent."""
        self._connection.run("drop the slot", self._drop)

    def close(self) -> None:
        if self._notes is not None:
            self._notes.close()
        self._connection.close()

    def _start(self, connection: Connection) -> Ts:
        publication = read_publication(connection, self._name)
        slot = read_slot(connection, self._name)
        if slot is not None and publication is None:
            raise OperatingError(
                f"slot {self._name} exists at the source, but its publication does not: changes since it was dropped are lost; "
                "remove the changefeed and create it again"
            )
        if slot is not None:
            self._verify_slot(connection, slot.database, slot.plugin, slot.lost)
        if publication is None:
            create_publication(connection, self._name, _usable(matching_tables(connection, self._filter)))
        if slot is None:
            slot = create_slot(connection, self._name)
        return slot.confirmed_ts

    def _verify_slot(self, connection: Connection, database: str, plugin: str, lost: bool) -> None:
        if database != connection.info.dbname or plugin != "pgoutput":
            raise OperatingError(
                f"slot {self._name} belongs to database {database} and plugin {plugin}: another changefeed of this name uses "
                "this server; choose another id"
            )
        if lost:
            raise OperatingError(
                f"slot {self._name} is lost: the source removed WAL that it needed (max_slot_wal_keep_size); "
                "remove the changefeed and create it again"
            )

    def _tables(self, connection: Connection) -> Mapping[TableID, str]:
        found = matching_tables(connection, self._filter)
        if read_publication(connection, self._name) is not None:
            sync_publication(connection, self._name, found)
        self._warn(found)
        return {table.table_id: table.full_name for table in found}

    def _warn(self, tables: Sequence[SourceTable]) -> None:
        """Says once of each table why its changes cannot be told apart, and again when that comes back."""
        problems = {table.table_id: problem for table in tables if (problem := table.why_unusable())}
        for table_id in problems.keys() - self._warned:
            _log.warning("source_table_unusable", changefeed=str(self._request.changefeed), reason=problems[table_id])
        self._warned = frozenset(problems)

    def _advance(self, connection: Connection, checkpoint_ts: Ts) -> None:
        slot = read_slot(connection, self._name)
        if slot is None:
            raise OperatingError(f"slot {self._name} does not exist at the source")
        self._verify_slot(connection, slot.database, slot.plugin, slot.lost)
        is_noted = True
        publication = read_publication(connection, self._name) if self._notes is not None else None
        if self._notes is not None and publication is not None and checkpoint_ts > slot.confirmed_ts:
            is_noted = self._note(self._notes, publication.incarnation, slot.confirmed_ts, checkpoint_ts)
        try:
            if is_noted:
                advance_slot(connection, slot, checkpoint_ts)
        except psycopg.errors.ObjectInUse:
            return  # an advance of a former owner is still under way: this one will be repeated
        self._beat(connection, checkpoint_ts)

    def _note(self, notes: SinkNotes, incarnation: int, slot_ts: Ts, checkpoint_ts: Ts) -> bool:
        """Whether the sink has noted the checkpoint. Why not is said once, until it goes well again."""
        try:
            notes.note(incarnation, slot_ts, checkpoint_ts)
        except (SourceUnavailableError, StatementError) as error:
            if not self._is_note_missing:
                _log.warning("slot_waits_for_sink", changefeed=str(self._request.changefeed), reason=str(error))
            self._is_note_missing = True
            return False
        self._is_note_missing = False
        return True

    def _beat(self, connection: Connection, checkpoint_ts: Ts) -> None:
        last_ts, since = self._advanced
        now = time.monotonic()
        if checkpoint_ts != last_ts:
            self._advanced = (checkpoint_ts, now)
        elif now - since >= HEARTBEAT_AFTER_S and checkpoint_ts < _position(connection, "SELECT pg_current_wal_lsn()::text"):
            connection.execute("SELECT pg_logical_emit_message(false, 'tablewire', 'heartbeat')")
            self._advanced = (checkpoint_ts, now)

    def _drop(self, connection: Connection) -> None:
        deadline = time.monotonic() + DROP_TIMEOUT_S
        while True:
            slot = read_slot(connection, self._name)
            if slot is None or slot.database != connection.info.dbname:
                break
            try:
                connection.execute("SELECT pg_drop_replication_slot(%s)", (self._name,))
            except psycopg.errors.UndefinedObject:
                break
            except psycopg.errors.ObjectInUse:
                if time.monotonic() >= deadline:
                    raise OperatingError(f"slot {self._name} is in use at the source; try again") from None
                time.sleep(0.05)
        if read_publication(connection, self._name) is not None:
            connection.execute(f'DROP PUBLICATION IF EXISTS "{self._name}"'.encode())


def _usable(tables: Sequence[SourceTable]) -> list[SourceTable]:
    return [table for table in tables if not table.why_unusable()]


def _position(connection: Connection, query: str) -> Ts:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return parse_lsn(str(row[0]))
