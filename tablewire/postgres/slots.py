"""The permanent slot of a changefeed at its source. Its publication (publication.py) has the same name."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import psycopg

from tablewire.errors import OperatingError
from tablewire.model.ids import ChangefeedID, Ts
from tablewire.postgres.connections import Connection, error_text, fetch_value
from tablewire.postgres.lsn import format_lsn
from tablewire.postgres.names import is_stream_slot

CREATE_SLOT_TIMEOUT_MS = 60_000
CREATE_SLOT_PATIENCE_S = 20.0
TRANSACTIONS_IN_TEXT_MAX = 3
_OPEN_TRANSACTIONS = """
SELECT text FROM (
  SELECT xact_start, concat_ws(', ', 'transaction ' || backend_xid, 'process ' || pid, 'role ' || usename,
           'application ' || nullif(application_name, ''), state, 'since ' || to_char(xact_start, 'YYYY-MM-DD HH24:MI:SS'))
           AS text
    FROM pg_stat_activity
   WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() AND (xact_start < now() - make_interval(secs => %s)) IS NOT FALSE
  UNION ALL
  SELECT prepared, concat_ws(', ', 'transaction ' || transaction, 'prepared as ' || quote_literal(gid),
           'since ' || to_char(prepared, 'YYYY-MM-DD HH24:MI:SS')) FROM pg_prepared_xacts) found
 ORDER BY xact_start LIMIT %s"""
DROP_TIMEOUT_S = 5.0
ADVANCE_STEP_BYTES = 256 * 1024 * 1024
"""The WAL of one step of an advance: one that is interrupted loses this step only."""
ADVANCE_TIMEOUT_MS = 30_000
ADVANCE_BYTES_PER_MS_MIN = 1_000
ADVANCE_TURN_S = 5.0
"""An advance returns after this long, to be continued by the next call."""
_LOST_REASONS = {
    "wal_removed": "the source removed WAL that it needed (max_slot_wal_keep_size)",
    "idle_timeout": "it was not used for longer than idle_replication_slot_timeout allows",
    "rows_removed": "the source removed rows of its catalogue that it needed",
    "wal_level_insufficient": "wal_level was below logical",
}


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """The permanent slot. database: the one it belongs to. lost_reason: why the server made it unusable; empty if it did not."""

    name: str
    plugin: str
    database: str
    restart_ts: Ts
    confirmed_ts: Ts
    lost_reason: str = ""

    @property
    def is_lost(self) -> bool:
        return bool(self.lost_reason)

    @property
    def why_lost(self) -> str:
        """Why the slot is lost, as a sentence without an end."""
        cause = _LOST_REASONS.get(self.lost_reason, f"the source gives the reason {self.lost_reason}")
        return f"slot {self.name} is lost: {cause}"

    def belongs_to(self, database: str) -> bool:
        """Return whether a changefeed of this database may have created the slot."""
        return self.database == database and self.plugin == "pgoutput"

    def why_unusable(self, database: str) -> str:
        """Return why a changefeed of this database cannot use the slot; empty if it can."""
        if not self.belongs_to(database):
            return (
                f"slot {self.name} belongs to database {self.database} and plugin {self.plugin}: another changefeed with this"
                " name uses this server; choose another id"
            )
        if self.is_lost:
            return f"{self.why_lost}; drop it, if nothing else uses it: SELECT pg_drop_replication_slot('{self.name}')"
        return ""


def read_slot(connection: Connection, name: str) -> SlotInfo | None:
    """Return the slot with this name, None if there is none."""
    reason = "invalidation_reason" if connection.info.server_version >= 170000 else "NULL"
    query = (
        "SELECT plugin, database, coalesce(restart_lsn, '0/0'), coalesce(confirmed_flush_lsn, '0/0'),"
        f" coalesce({reason}, CASE WHEN wal_status = 'lost' THEN 'wal_removed' END, '')"
        " FROM pg_replication_slots WHERE slot_name = %s"
    )
    row = connection.execute(query.encode(), (name,)).fetchone()
    return None if row is None else SlotInfo(name, *row)


def _waits(name: str, waits: str) -> OperatingError:
    return OperatingError(
        f"cannot create slot {name} before transactions have ended that are open at the source ({waits}): COMMIT, ROLLBACK,"
        " ROLLBACK PREPARED or pg_terminate_backend; it is tried again"
    )


def find_living_slot(connection: Connection, changefeed: ChangefeedID) -> str:
    """Return the processors' temporary slot of this changefeed with the lowest position; empty if there is none."""
    rows = connection.execute(
        "SELECT slot_name FROM pg_replication_slots WHERE temporary AND active AND plugin = 'pgoutput'"
        " AND database = current_database() AND coalesce(wal_status, 'lost') <> 'lost' ORDER BY confirmed_flush_lsn"
    )
    return next((name for (name,) in rows if is_stream_slot(changefeed, name)), "")


def drop_slot(connection: Connection, name: str) -> None:
    """Drop a slot, if it exists; wait a little for a process that uses it."""
    deadline = time.monotonic() + DROP_TIMEOUT_S
    while True:
        try:
            connection.execute("SELECT pg_drop_replication_slot(%s)", (name,))
        except psycopg.errors.UndefinedObject:
            return
        except psycopg.errors.ObjectInUse:
            if time.monotonic() >= deadline:
                raise OperatingError(f"slot {name} is in use at the source; try again") from None
            time.sleep(0.05)
        else:
            return


def restore_slot(connection: Connection, name: str, living_slot: str) -> SlotInfo:
    """Create the permanent slot as a copy of a processor's temporary one; a lost slot of this name is dropped."""
    drop_slot(connection, name)
    with suppress(psycopg.errors.DuplicateObject):  # another owner was faster
        connection.execute("SELECT pg_copy_logical_replication_slot(%s, %s, false)", (living_slot, name))
    if (slot := read_slot(connection, name)) is None:
        raise OperatingError(f"slot {name} was dropped while it was being restored")
    return slot


def open_transactions(connection: Connection, older_than_s: float = 0) -> str:
    """Return which transactions that have begun to write are open, the oldest first, and all prepared ones; empty: none."""
    rows = connection.execute(_OPEN_TRANSACTIONS, (older_than_s, TRANSACTIONS_IN_TEXT_MAX)).fetchall()
    return "; ".join(text for (text,) in rows)


def create_slot(connection: Connection, name: str) -> SlotInfo:
    """Create the permanent slot. This waits for the transactions that are open now, for at most CREATE_SLOT_TIMEOUT_MS.

    Raise OperatingError at once for one that is prepared, or open for CREATE_SLOT_PATIENCE_S already.
    """
    if waits := open_transactions(connection, CREATE_SLOT_PATIENCE_S):
        raise _waits(name, waits)
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = {CREATE_SLOT_TIMEOUT_MS}")
            # From PostgreSQL 17 on, a standby that synchronizes slots has it after a failover.
            failover = ", failover => true" if connection.info.server_version >= 170000 else ""
            connection.execute(f"SELECT pg_create_logical_replication_slot(%s, 'pgoutput'{failover})".encode(), (name,))
    except psycopg.errors.DuplicateObject:
        pass  # another owner was faster
    except psycopg.errors.QueryCanceled:
        raise _waits(name, open_transactions(connection) or "they have ended by now") from None
    except psycopg.Error as error:
        raise OperatingError(f"cannot create slot {name}: {error_text(error)}") from None
    if (slot := read_slot(connection, name)) is None:
        raise OperatingError(f"slot {name} was dropped while it was being created")
    return slot


def advance_slot(connection: Connection, slot: SlotInfo, target_ts: Ts) -> None:
    """Advance the slot towards target_ts, never backwards and never past the WAL that is on disk.

    Each step is a statement of its own, whose time limit grows with the WAL that it reads, from the slot's restart
    position on. After ADVANCE_TURN_S the rest is left to the next call.
    """
    target_ts = min(target_ts, fetch_value(connection, "SELECT pg_current_wal_flush_lsn()"))
    position, until = slot.confirmed_ts, time.monotonic() + ADVANCE_TURN_S
    while position < target_ts:
        position = min(target_ts, position + ADVANCE_STEP_BYTES)
        with connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = {advance_timeout_ms(slot, position)}")
            connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(position)))
        if time.monotonic() > until:
            return


def advance_timeout_ms(slot: SlotInfo, position: Ts) -> int:
    """Return how long an advance to this position may take: a server that reads WAL more slowly hangs."""
    return ADVANCE_TIMEOUT_MS + max(0, position - slot.restart_ts) // ADVANCE_BYTES_PER_MS_MIN


def touch_slot(connection: Connection, slot: SlotInfo) -> None:
    """Use the slot without moving it, if the server makes slots unusable that are not used (PostgreSQL 18)."""
    limit = fetch_value(connection, "SELECT coalesce(current_setting('idle_replication_slot_timeout', true), '0')")
    if limit != "0" and slot.confirmed_ts:
        connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(slot.confirmed_ts)))
