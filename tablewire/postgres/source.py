"""PostgresSource: one changefeed's view of its PostgreSQL source, as the owner needs it (tablewire/source.py).

All calls block; one thread at a time. One connection is opened when it is needed, and again after it
was lost. Nothing is kept that a new owner could not read from the server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import psycopg
import structlog

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres import slots
from tablewire.postgres.catalogue import list_tables
from tablewire.postgres.checks import run_checks
from tablewire.postgres.connections import (
    SCHEMES,
    Connection,
    ReconnectingConnection,
    SourceUnavailableError,
    StatementError,
    fetch_value,
    parse_uri,
    quoted,
    server_name,
)
from tablewire.postgres.filters import TableFilter
from tablewire.postgres.names import slot_name
from tablewire.postgres.options import parse_options
from tablewire.postgres.publication import create_publication, missing_publication, read_publication
from tablewire.postgres.sink_checkpoint import SinkCheckpoint
from tablewire.postgres.table_listing import TableListing
from tablewire.source import CheckFailure, SourceRequest

HEARTBEAT_AFTER_S = 10.0
"""If a checkpoint is behind the end of the WAL and has not moved for this long, a message is written to the WAL, so that
walsenders report their position again."""
DROP_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_MS = 30_000
CLIENT_TIMEOUT_S = 300.0
"""For all statements of one call together."""

_log = structlog.get_logger(__name__)


class PostgresSource:
    """See the module. Every method may raise OperatingError with one clear message."""

    def __init__(self, request: SourceRequest) -> None:
        """Check the URI, the filter and the options, without I/O."""
        parse_uri(request.source_uri)
        self._rules = parse_options(request.options).rules
        self._request = request
        self._filter = TableFilter(request.tables)
        self._name = slot_name(request.changefeed)
        self._connection = ReconnectingConnection(
            request.source_uri,
            application_name="tablewire owner",
            settings={"statement_timeout": STATEMENT_TIMEOUT_MS},
            limit_s=CLIENT_TIMEOUT_S,
        )
        self._advanced: tuple[Ts, float] = (0, 0.0)
        self._waits_for_sink = False
        self._sink_checkpoint: SinkCheckpoint | None = None
        if request.sink_uri.partition("://")[0] in SCHEMES:
            sink = f"sink {server_name(request.sink_uri)}"
            self._sink_checkpoint = SinkCheckpoint(request.sink_uri, sink, str(request.changefeed))
        self._listing = TableListing(str(request.changefeed), self._name, self._filter, self._rules)

    def check(self) -> Sequence[CheckFailure]:
        """Return each requirement of `create` that is not met. Change nothing. This uses connections of its own."""
        return run_checks(self._request, self._filter, self._rules, self._name)

    def start(self) -> Ts:
        """Create the publication and the slot if they are missing; return the position after which the slot has changes."""
        return self._connection.run("start", self._start)

    def tables(self) -> Mapping[TableID, str]:
        """Return the tables that are replicated now; make the publication list them."""
        return self._connection.run("list tables", self._listing.read)

    def left_out(self) -> Sequence[str]:
        """Return why tables that the filter matches were not in the last listing; no I/O."""
        return list(self._listing.left_out.values())

    def current_ts(self) -> Ts:
        """Return the end of the written WAL: every commit that was acknowledged is at or before it."""
        return self._connection.run("read the position", _wal_end)

    def advance(self, checkpoint_ts: Ts) -> None:
        """Advance the slot to the global checkpoint, never backwards, and not before the sink has recorded it.

        Also wake the walsenders of an idle source. Raise OperatingError if the sink has lost what it had confirmed.
        """
        self._connection.run("advance the slot", lambda connection: self._advance(connection, checkpoint_ts))

    def retained_bytes(self) -> int:
        """Return how much WAL the server keeps for the slot; 0 if there is no slot."""

        def read(connection: Connection) -> int:
            slot = slots.read_slot(connection, self._name)
            return 0 if slot is None else max(0, _wal_end(connection) - slot.restart_ts)

        return self._connection.run("read the slot", read)

    def drop(self) -> None:
        """Drop the slot and the publication. Idempotent."""
        self._connection.run("drop the slot", self._drop)

    def close(self) -> None:
        if self._sink_checkpoint is not None:
            self._sink_checkpoint.close()
        self._connection.close()

    def _start(self, connection: Connection) -> Ts:
        publication = read_publication(connection, self._name)
        slot = slots.read_slot(connection, self._name)
        if slot is not None and publication is None:
            raise missing_publication(self._name)
        if publication is None:
            tables = list_tables(connection, self._filter, self._rules).tables
            usable = [table for table in tables if not table.why_unusable(self._rules)]
            create_publication(connection, self._name, usable, self._rules)
        if slot is None:
            return slots.create_slot(connection, self._name).confirmed_ts
        self._require_usable(connection, slot)
        return slot.confirmed_ts

    def _require_usable(self, connection: Connection, slot: slots.SlotInfo) -> None:
        if problem := slot.why_unusable(connection.info.dbname):
            raise OperatingError(problem)

    def _advance(self, connection: Connection, checkpoint_ts: Ts) -> None:
        if (slot := slots.read_slot(connection, self._name)) is None:
            raise OperatingError(f"slot {self._name} does not exist at the source")
        self._require_usable(connection, slot)
        try:
            if self._is_recorded(connection, slot, checkpoint_ts):
                slots.advance_slot(connection, slot, checkpoint_ts)
        except psycopg.errors.ObjectInUse:
            return  # a former owner is still advancing it: this call will be repeated
        self._send_heartbeat(connection, checkpoint_ts)

    def _is_recorded(self, connection: Connection, slot: slots.SlotInfo, checkpoint_ts: Ts) -> bool:
        """Record the checkpoint at the sink; return False, and log it once, if the sink is unavailable."""
        if self._sink_checkpoint is None or checkpoint_ts <= slot.confirmed_ts:
            return True
        if (publication := read_publication(connection, self._name)) is None:
            return True
        try:
            self._sink_checkpoint.record(publication.incarnation, slot.confirmed_ts, checkpoint_ts)
        except (SourceUnavailableError, StatementError) as error:
            if not self._waits_for_sink:
                _log.warning("slot_waits_for_sink", changefeed=str(self._request.changefeed), reason=str(error))
            self._waits_for_sink = True
            return False
        self._waits_for_sink = False
        return True

    def _send_heartbeat(self, connection: Connection, checkpoint_ts: Ts) -> None:
        last_ts, since = self._advanced
        now = time.monotonic()
        if checkpoint_ts != last_ts:
            self._advanced = (checkpoint_ts, now)
        elif now - since >= HEARTBEAT_AFTER_S and checkpoint_ts < _wal_end(connection):
            connection.execute("SELECT pg_logical_emit_message(false, 'tablewire', 'heartbeat')")
            self._advanced = (checkpoint_ts, now)

    def _drop(self, connection: Connection) -> None:
        deadline = time.monotonic() + DROP_TIMEOUT_S
        while (slot := slots.read_slot(connection, self._name)) is not None and slot.database == connection.info.dbname:
            try:
                connection.execute("SELECT pg_drop_replication_slot(%s)", (self._name,))
            except psycopg.errors.UndefinedObject:
                break
            except psycopg.errors.ObjectInUse:
                if time.monotonic() >= deadline:
                    raise OperatingError(f"slot {self._name} is in use at the source; try again") from None
                time.sleep(0.05)
        if read_publication(connection, self._name) is not None:
            connection.execute(f"DROP PUBLICATION IF EXISTS {quoted(self._name)}")


def _wal_end(connection: Connection) -> Ts:
    position: Ts = fetch_value(connection, "SELECT pg_current_wal_lsn()")
    return position
