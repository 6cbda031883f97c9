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
DROP_TIMEOUT_S = 5.0
ADVANCE_STEP_BYTES = 256 * 1024 * 1024
"""The WAL of one step of an advance: one that is interrupted loses this step only."""
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


def create_slot(connection: Connection, name: str) -> SlotInfo:
    """Create the permanent slot. This waits for the transactions that are open now, for at most CREATE_SLOT_TIMEOUT_MS."""
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = {CREATE_SLOT_TIMEOUT_MS}")
            connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))
    except psycopg.errors.DuplicateObject:
        pass  # another owner was faster
    except psycopg.errors.QueryCanceled:
        raise OperatingError(
            f"cannot create slot {name}: transactions at the source stay open for more than {CREATE_SLOT_TIMEOUT_MS // 1000} s "
            "(pg_stat_activity shows them); end them and try again"
        ) from None
    except psycopg.Error as error:
        raise OperatingError(f"cannot create slot {name}: {error_text(error)}") from None
    if (slot := read_slot(connection, name)) is None:
        raise OperatingError(f"slot {name} was dropped while it was being created")
    return slot


def advance_slot(connection: Connection, slot: SlotInfo, target_ts: Ts) -> None:
    """Advance the slot towards target_ts, never backwards and never past the WAL that is on disk.

    Each step is a statement of its own, without a time limit of the server: it reads the WAL again from the slot's
    restart position, which takes as long as it takes. After ADVANCE_TURN_S the rest is left to the next call.
    """
    target_ts = min(target_ts, fetch_value(connection, "SELECT pg_current_wal_flush_lsn()"))
    position, until = slot.confirmed_ts, time.monotonic() + ADVANCE_TURN_S
    while position < target_ts and time.monotonic() < until:
        position = min(target_ts, position + ADVANCE_STEP_BYTES)
        with connection.transaction():
            connection.execute("SET LOCAL statement_timeout = 0")
            connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(position)))


def touch_slot(connection: Connection, slot: SlotInfo) -> None:
    """Use the slot without moving it, if the server makes slots unusable that are not used (PostgreSQL 18)."""
    limit = fetch_value(connection, "SELECT coalesce(current_setting('idle_replication_slot_timeout', true), '0')")
    if limit != "0" and slot.confirmed_ts:
        connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(slot.confirmed_ts)))
