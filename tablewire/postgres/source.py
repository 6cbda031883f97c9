"""PostgresSource: one changefeed's view of its PostgreSQL source, as the owner needs it (tablewire/source.py).

All calls block; one thread at a time. One connection is opened when it is needed, and again after it
was lost. Nothing is kept that a new owner could not read from the server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psycopg
import structlog

from tablewire.errors import ChangesLostError, OperatingError
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
from tablewire.postgres.publication import PublicationInfo, create_publication, missing_publication, note_source, read_publication
from tablewire.postgres.servers import (
    RESYNC,
    Action,
    Decision,
    Mark,
    ServerState,
    SinkState,
    SourceRecord,
    decide,
    read_mark,
    read_server,
    read_switch,
    record_from_json,
    record_to_json,
    require_primary,
)
from tablewire.postgres.sink_checkpoint import SinkCheckpoint
from tablewire.postgres.table_listing import TableListing
from tablewire.source import CheckFailure, SourceRequest

HEARTBEAT_AFTER_S = 10.0
"""If a checkpoint is behind the end of the WAL and has not moved for this long, a message is written to the WAL, so that
walsenders report their position again."""
STATEMENT_TIMEOUT_MS = 30_000
CLIENT_TIMEOUT_S = 300.0
"""For all statements of one call together."""
ADVANCE_REST = 4
"""After an advance there is none for this many times as long as it took: each reads the WAL again from the restart position."""
ADVANCE_REST_MAX_S = 60.0
RESTORE_BYTES_MAX = 64 * 1024 * 1024
"""The source writes less WAL than this while a slot is restored."""
TOUCH_INTERVAL_S = 30.0
"""How often a slot that does not move is used, where the source makes unused slots unusable."""
APPLICATION_NAME = "tablewire owner"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """What exists at the source and at the sink. has_started: the changefeed has replicated, or could have."""

    publication: PublicationInfo | None
    slot: slots.SlotInfo | None
    sink: SinkState
    has_started: bool


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
            application_name=APPLICATION_NAME,
            settings={"statement_timeout": STATEMENT_TIMEOUT_MS},
            set_up=self._connected,
            limit_s=CLIENT_TIMEOUT_S,
        )
        self._checkpoint_ts = max(request.start_ts, request.checkpoint_ts)
        self._has_started = False
        self._is_verified = False
        """Whether the server of the current connection was compared with what the sink holds."""
        self._record: SourceRecord | None = None
        """What is stored at the sink with the next checkpoint; None before the source was verified."""
        self._pending_mark: Mark | None = None
        self._marked: tuple[Ts, Mark | None] = (0, None)
        """The checkpoint and the mark that were last recorded."""
        self._advance_at = self._touched_at = 0.0
        self._dropped_incarnation = 0
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
        return self._connection.run("list tables", self._tables)

    def left_out(self) -> Sequence[str]:
        """Return why tables that the filter matches were not in the last listing; no I/O."""
        return list(self._listing.left_out.values())

    def current_ts(self) -> Ts:
        """Return the end of the written WAL: every commit that was acknowledged is at or before it."""
        return self._connection.run("read the position", self._current_ts)

    def verify(self) -> None:
        """Raise ChangesLostError if a changefeed that has started cannot continue at this server. Change nothing."""
        self._connection.run("verify the source", self._verify)

    def advance(self, checkpoint_ts: Ts) -> None:
        """Advance the slot to the global checkpoint, never backwards, and not before the sink has recorded it.

        What takes long is continued by the next call. Also wake the walsenders of an idle source. Raise OperatingError if
        the sink has lost what it had confirmed, ChangesLostError if the slot is lost.
        """
        if time.monotonic() < self._advance_at:
            return
        slot = self._connection.run(
            "record the checkpoint", lambda connection: self._record_checkpoint(connection, checkpoint_ts)
        )
        if slot is None:
            return
        began = time.monotonic()
        limit_s = CLIENT_TIMEOUT_S + slots.advance_timeout_ms(slot, checkpoint_ts) / 1000
        self._connection.run("advance the slot", lambda connection: self._advance(connection, slot, checkpoint_ts), limit_s)
        now = time.monotonic()
        self._advance_at = now + min(ADVANCE_REST * (now - began), ADVANCE_REST_MAX_S)

    def retained_bytes(self) -> int:
        """Return how much WAL the server keeps for the slot; 0 if there is no slot."""

        def read(connection: Connection) -> int:
            slot = slots.read_slot(connection, self._name)
            return 0 if slot is None else max(0, _wal_end(connection) - slot.restart_ts)

        return self._connection.run("read the slot", read)

    def drop(self) -> None:
        """Drop the slot and the publication. Idempotent."""
        self._connection.run("drop the slot", self._drop)
        self._has_started = False
        self._checkpoint_ts = 0

    def clean_sink(self) -> None:
        """Remove what is kept at the sink of a changefeed whose source was dropped. Idempotent."""
        if self._sink_checkpoint is not None:
            self._sink_checkpoint.remove(self._dropped_incarnation or self._sink_checkpoint.last_incarnation())

    def close(self) -> None:
        if self._sink_checkpoint is not None:
            self._sink_checkpoint.close()
        self._connection.close()

    # --- which server it is ------------------------------------------------------------------------------------------

    def _connected(self, _connection: Connection) -> None:
        self._is_verified = False

    def _start(self, connection: Connection) -> Ts:
        require_primary(connection)
        found = self._look(connection)
        if found.has_started:
            known_ts = self._checkpoint_ts or found.sink.checkpoint_ts
            slot = self._continue(connection, found)
            start_ts = min(slot.confirmed_ts, known_ts)
        else:
            slot = self._begin(connection, found)
            start_ts = slot.confirmed_ts
        self._has_started = self._is_verified = True
        return start_ts

    def _verify_again(self, connection: Connection) -> None:
        """Verify the server of a new connection, which may be another one."""
        if self._has_started and not self._is_verified:
            require_primary(connection)
            self._continue(connection, self._look(connection))
            self._is_verified = True

    def _verify(self, connection: Connection) -> None:
        require_primary(connection)
        found = self._look(connection)
        if found.has_started:
            self._decide(connection, found)

    def _look(self, connection: Connection) -> _Found:
        """Read what exists at the source and what the sink holds. Raise ChangesLostError if the publication is missing."""
        publication, slot = read_publication(connection, self._name), slots.read_slot(connection, self._name)
        if slot is not None and not slot.belongs_to(connection.info.dbname):
            raise OperatingError(slot.why_unusable(connection.info.dbname))
        if publication is None and (slot is not None or self._request.start_ts):
            raise missing_publication(self._name)
        if publication is None or self._sink_checkpoint is None:
            sink = SinkState(record_from_json(publication.source) if publication is not None else None, self._checkpoint_ts)
            return _Found(publication, slot, sink, bool(self._request.start_ts) or self._has_started)
        stored = self._sink_checkpoint.read(publication.incarnation)
        recorded_ts = stored.position or 0
        sink = SinkState(
            record_from_json(stored.source), max(self._checkpoint_ts, recorded_ts), max(stored.highest_ts, recorded_ts)
        )
        return _Found(publication, slot, sink, bool(self._checkpoint_ts) or stored.position is not None or self._has_started)

    def _begin(self, connection: Connection, found: _Found) -> slots.SlotInfo:
        """Create the publication and the slot of a changefeed that has not started."""
        if found.publication is None:
            tables = list_tables(connection, self._filter, self._rules).tables
            usable = [table for table in tables if not table.why_unusable(self._rules)]
            above = self._sink_checkpoint.last_incarnation() if self._sink_checkpoint is not None else 0
            create_publication(connection, self._name, usable, self._rules, above)
            self._listing.read(connection)  # before the slot: no change of a table that was added one by one is missed
            if self._sink_checkpoint is not None:
                self._sink_checkpoint.adopt()
        slot = found.slot or slots.create_slot(connection, self._name)
        if problem := slot.why_unusable(connection.info.dbname):
            raise OperatingError(problem)
        publication = found.publication or read_publication(connection, self._name)
        self._record = SourceRecord(read_server(connection), restart_ts=slot.restart_ts)
        record = record_to_json(self._record)
        if self._sink_checkpoint is None:
            note_source(connection, self._name, self._rules, record)
        elif publication is not None:
            self._sink_checkpoint.record(publication.incarnation, slot.confirmed_ts, slot.confirmed_ts, record)
        return slot

    def _continue(self, connection: Connection, found: _Found) -> slots.SlotInfo:
        """Return the slot of a changefeed that has started, restored or created where nothing can be missing."""
        now, decision = self._decide(connection, found)
        former, slot = found.sink.record, found.slot
        record = SourceRecord(
            now.server,
            former.mark if former is not None and now.switch_ts is None else None,
            restored_ts=former.restored_ts if former is not None and now.switch_ts is None else 0,
        )
        pass_over_to: Ts = 0
        if decision.action is Action.RESTORE:
            record = replace(record, restored_ts=now.wal_end + RESTORE_BYTES_MAX)  # it is known exactly after the copy
        elif decision.action is Action.PASS_OVER:
            slot = self._usable_slot(connection, found)
            pass_over_to = slot.confirmed_ts
        if decision.action is not Action.CONTINUE or (former is not None and former.server != now.server):
            is_same = former is not None and former.server == now.server and not pass_over_to
            self._accept(connection, found, record, pass_over_to, is_same)
            reason = f"system {now.server.system}, timeline {now.server.timeline}"
            _log.warning("source_accepted", changefeed=str(self._request.changefeed), action=decision.action.value, reason=reason)
        if decision.action is Action.RESTORE:
            slot = slots.restore_slot(connection, self._name, now.living_slot)
            record = replace(record, restored_ts=slot.confirmed_ts)
        assert slot is not None
        self._record = replace(record, restart_ts=slot.restart_ts)
        self._checkpoint_ts = max(self._checkpoint_ts, pass_over_to)
        return slot

    def _decide(self, connection: Connection, found: _Found) -> tuple[ServerState, Decision]:
        """Compare the server with what the sink holds. Raise ChangesLostError if replication cannot continue."""
        server, mark, former = read_server(connection), read_mark(connection)[0], found.sink.record
        switch_ts: Ts | None = None
        if former is not None and former.server.timeline != server.timeline:
            switch_ts = read_switch(self._request.source_uri, server, former.server.timeline, APPLICATION_NAME)
        is_usable = found.slot is not None and not found.slot.is_lost
        living = "" if is_usable else slots.find_living_slot(connection, self._request.changefeed)
        now = ServerState(server, mark.position, mark.xmax, found.slot, switch_ts, living)
        decision = decide(now, found.sink)
        if decision.action is Action.FAIL:
            source = server_name(self._request.source_uri)
            raise ChangesLostError(f"the source {source} cannot be followed: {decision.reason}; {RESYNC}")
        return now, decision

    def _usable_slot(self, connection: Connection, found: _Found) -> slots.SlotInfo:
        """Return the slot, or a new one; raise ChangesLostError if a transaction has committed before that."""
        if found.slot is not None and not found.slot.is_lost:
            return found.slot
        slots.drop_slot(connection, self._name)
        slot = slots.create_slot(connection, self._name)
        mark = found.sink.record.mark if found.sink.record is not None else None
        if mark is None or read_mark(connection)[0].xmax != mark.xmax:
            slots.drop_slot(connection, self._name)
            source = server_name(self._request.source_uri)
            raise ChangesLostError(
                f"the source {source} cannot be followed: slot {self._name} was lost, and a transaction has committed before it"
                f" could be created again; {RESYNC}"
            )
        return slot

    def _accept(self, connection: Connection, found: _Found, record: SourceRecord, pass_over_to: Ts, is_same: bool) -> None:
        """Record another server or slot; at a PostgreSQL sink, unless the server is the same, what was read before is refused."""
        if found.publication is None:
            return
        if self._sink_checkpoint is None:
            note_source(connection, self._name, self._rules, record_to_json(record))
            return
        incarnation, position, source = found.publication.incarnation, found.sink.checkpoint_ts, record_to_json(record)
        if is_same:
            self._sink_checkpoint.record(incarnation, 0, position, source)
            return
        self._sink_checkpoint.accept(
            incarnation, max(position, pass_over_to), source, highest_ts=found.sink.highest_ts, pass_over_to=pass_over_to
        )

    # --- tables and positions ----------------------------------------------------------------------------------------

    def _tables(self, connection: Connection) -> Mapping[TableID, str]:
        self._verify_again(connection)
        return self._listing.read(connection)

    def _current_ts(self, connection: Connection) -> Ts:
        self._verify_again(connection)
        return _wal_end(connection)

    def _record_checkpoint(self, connection: Connection, checkpoint_ts: Ts) -> slots.SlotInfo | None:
        """Record the checkpoint at the sink; return the slot if it may be advanced to it."""
        self._verify_again(connection)
        self._checkpoint_ts = max(self._checkpoint_ts, checkpoint_ts)
        slot = slots.read_slot(connection, self._name)
        if slot is None or slot.is_lost:
            slot = self._continue(connection, self._look(connection))
        return slot if self._is_recorded(connection, slot, checkpoint_ts) else None

    def _advance(self, connection: Connection, slot: slots.SlotInfo, checkpoint_ts: Ts) -> None:
        try:
            if checkpoint_ts > slot.confirmed_ts:
                slots.advance_slot(connection, slot, checkpoint_ts)
            elif time.monotonic() - self._touched_at >= TOUCH_INTERVAL_S:
                self._touched_at = time.monotonic()
                slots.touch_slot(connection, slot)
        except psycopg.errors.ObjectInUse:
            return  # a former owner is still advancing it: this call will be repeated
        self._send_heartbeat(connection, checkpoint_ts)

    def _take_mark(self, connection: Connection) -> Mark | None:
        """Return the last durable mark. While no transaction ends, it stays the first one, whose position proves most."""
        last = self._record.mark if self._record is not None else None
        mark, flushed_ts = read_mark(connection)
        if (pending := self._pending_mark) is not None and pending.position <= flushed_ts:
            last, self._pending_mark = pending, None
        if last is not None and last.is_idle and mark.is_idle and last.xmax == mark.xmax:
            return last
        if mark.position <= flushed_ts:
            return mark
        self._pending_mark = self._pending_mark or mark
        return last

    def _is_recorded(self, connection: Connection, slot: slots.SlotInfo, checkpoint_ts: Ts) -> bool:
        """Record the checkpoint at the sink; return False, and log it once, if the sink is unavailable."""
        if self._sink_checkpoint is None or self._record is None:
            return True
        mark = self._take_mark(connection)
        record = replace(self._record, mark=mark, restart_ts=slot.restart_ts)
        # An idle mark is recorded once more, since it may be newer than the last checkpoint.
        is_marked = self._marked[0] == checkpoint_ts or self._marked[1] == mark or mark is None or not mark.is_idle
        if checkpoint_ts <= slot.confirmed_ts and is_marked:
            return True
        if (publication := read_publication(connection, self._name)) is None:
            return True
        try:
            self._sink_checkpoint.record(publication.incarnation, slot.confirmed_ts, checkpoint_ts, record_to_json(record))
            self._record = record
            if checkpoint_ts <= slot.confirmed_ts:
                self._marked = (checkpoint_ts, mark)
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
        slot = slots.read_slot(connection, self._name)
        if slot is not None and slot.database == connection.info.dbname:
            slots.drop_slot(connection, self._name)
        if (publication := read_publication(connection, self._name)) is not None:
            self._dropped_incarnation = publication.incarnation
            connection.execute(f"DROP PUBLICATION IF EXISTS {quoted(self._name)}")


def _wal_end(connection: Connection) -> Ts:
    position: Ts = fetch_value(connection, "SELECT pg_current_wal_lsn()")
    return position
