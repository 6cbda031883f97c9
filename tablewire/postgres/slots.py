"""The permanent slot of a changefeed at its source. Its publication (publication.py) has the same name."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.connections import Connection, error_text, fetch_value
from tablewire.postgres.lsn import format_lsn

CREATE_SLOT_TIMEOUT_MS = 60_000


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """The permanent slot. is_lost: the server has removed WAL that it needs. database: the one it belongs to."""

    name: str
    plugin: str
    database: str
    restart_ts: Ts
    confirmed_ts: Ts
    is_lost: bool

    def why_unusable(self, database: str) -> str:
        """Return why a changefeed of this database cannot use the slot; empty if it can."""
        if self.database != database or self.plugin != "pgoutput":
            return (
                f"slot {self.name} belongs to database {self.database} and plugin {self.plugin}: another changefeed with this"
                " name uses this server; choose another id"
            )
        if self.is_lost:
            return (
                f"slot {self.name} is lost: the source removed WAL that it needed (max_slot_wal_keep_size); "
                "remove the changefeed and create it again"
            )
        return ""


def read_slot(connection: Connection, name: str) -> SlotInfo | None:
    row = connection.execute(
        "SELECT plugin, database, coalesce(restart_lsn, '0/0'), coalesce(confirmed_flush_lsn, '0/0'),"
        " coalesce(wal_status = 'lost', false) FROM pg_replication_slots WHERE slot_name = %s",
        (name,),
    ).fetchone()
    return None if row is None else SlotInfo(name, *row)


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
    """Advance the slot to target_ts, never backwards and never past the WAL that is on disk."""
    target_ts = min(target_ts, fetch_value(connection, "SELECT pg_current_wal_flush_lsn()"))
    if target_ts > slot.confirmed_ts:
        connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(target_ts)))
