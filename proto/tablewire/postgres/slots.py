"""What a changefeed owns at its source: a publication and a permanent slot of the same name.

The publication lists its tables one by one, for two reasons: FOR ALL TABLES needs a superuser, and the server then sends only
what is wanted. It needs CREATE on the database and ownership of each table. It is made before the slot, so that no position of
the slot lies before it: at an older position the server knows no publication (an error up to PostgreSQL 17, a warning and
skipped rows in 18). Its comment holds what the executor must know: the incarnation (the source's clock in µs when it was made;
a changefeed that is removed and created again gets a larger one) and the position at which it existed for sure.

A new table is added under a lock that waits for its open writers, for at most LOCK_TIMEOUT_MS: servers before 17.5, 16.9,
15.13, 14.18 and 13.21 lose changes of a table that is added while it is being written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import SourceTable
from tablewire.postgres.connections import error_text, format_lsn, parse_lsn, quote_name, quote_text
from tablewire.types import TableID, Ts

CREATE_SLOT_TIMEOUT_MS = 60_000
LOCK_TIMEOUT_MS = 1_000
_VERSIONS_WITHOUT_LOSS = {13: 130021, 14: 140018, 15: 150013, 16: 160009, 17: 170005}

_Connection = psycopg.Connection[tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """The permanent slot. lost: the server has removed WAL that it needed. database: where it belongs."""

    name: str
    plugin: str
    database: str
    restart_ts: Ts
    confirmed_ts: Ts
    lost: bool


@dataclass(frozen=True, slots=True)
class PublicationInfo:
    """The publication and what its comment says."""

    name: str
    incarnation: int
    created_ts: Ts


def read_slot(connection: _Connection, name: str) -> SlotInfo | None:
    """The slot of this name, None when there is none."""
    row = connection.execute(
        "SELECT plugin, database, restart_lsn::text, confirmed_flush_lsn::text, coalesce(wal_status = 'lost', false)"
        " FROM pg_replication_slots WHERE slot_name = %s",
        (name,),
    ).fetchone()
    if row is None:
        return None
    restart = parse_lsn(str(row[2])) if row[2] is not None else 0
    confirmed = parse_lsn(str(row[3])) if row[3] is not None else 0
    return SlotInfo(name, str(row[0]), str(row[1]), restart, confirmed, bool(row[4]))


def read_publication(connection: _Connection, name: str) -> PublicationInfo | None:
    """The publication of this name, None when there is none; OperatingError when it is not one of Tablewire's."""
    row = connection.execute(
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = %s", (name,)
    ).fetchone()
    if row is None:
        return None
    try:
        comment = json.loads(str(row[0]))
        return PublicationInfo(name, int(comment["incarnation"]), parse_lsn(comment["created_lsn"]))
    except (ValueError, KeyError, TypeError):
        raise OperatingError(
            f"publication {name} exists at the source, but Tablewire did not make it: drop or rename it"
        ) from None


def create_publication(connection: _Connection, name: str, tables: Sequence[SourceTable]) -> PublicationInfo:
    """Makes the publication for these tables, with its comment; OperatingError with the server's reason."""
    targets = ", ".join(f"TABLE ONLY {table.quoted}" if not i else f"ONLY {table.quoted}" for i, table in enumerate(tables))
    try:
        with connection.transaction():
            row = connection.execute(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, pg_current_wal_insert_lsn()::text"
            ).fetchone()
            assert row is not None
            comment = json.dumps({"tablewire": 1, "incarnation": row[0], "created_lsn": row[1]})
            connection.execute(f"CREATE PUBLICATION {quote_name(name)}{' FOR ' + targets if targets else ''}".encode())
            connection.execute(f"COMMENT ON PUBLICATION {quote_name(name)} IS {quote_text(comment)}".encode())
    except psycopg.errors.DuplicateObject:
        pass  # another owner was faster: what it made is read below
    except psycopg.Error as error:
        raise OperatingError(f"cannot create publication {name}: {error_text(error)}") from None
    made = read_publication(connection, name)
    if made is None:
        raise OperatingError(f"publication {name} vanished while it was being created")
    return made


def create_slot(connection: _Connection, name: str) -> SlotInfo:
    """Makes the permanent slot. It waits for the transactions that are open now, at most CREATE_SLOT_TIMEOUT_MS."""
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = {CREATE_SLOT_TIMEOUT_MS}".encode())
            connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))
    except psycopg.errors.DuplicateObject:
        pass
    except psycopg.errors.QueryCanceled:
        raise OperatingError(
            f"cannot create slot {name}: transactions at the source stay open for more than {CREATE_SLOT_TIMEOUT_MS // 1000} s "
            "(pg_stat_activity names them); end them and try again"
        ) from None
    except psycopg.Error as error:
        raise OperatingError(f"cannot create slot {name}: {error_text(error)}") from None
    made = read_slot(connection, name)
    if made is None:
        raise OperatingError(f"slot {name} vanished while it was being created")
    return made


def sync_publication(connection: _Connection, name: str, tables: Sequence[SourceTable]) -> None:
    """Makes the publication list exactly these tables. OperatingError names the first table that it could not add or drop.

    A table without a usable replica identity must not be among them: publishing it would make the source refuse updates.
    """
    rows = connection.execute(
        "SELECT r.prrelid::bigint, n.nspname, c.relname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid"
        " JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = %s",
        (name,),
    ).fetchall()
    listed: dict[TableID, str] = {int(str(row[0])): f"{quote_name(str(row[1]))}.{quote_name(str(row[2]))}" for row in rows}
    wanted = {table.table_id: table for table in tables}
    for table_id, quoted in listed.items():
        if table_id not in wanted:
            _alter(connection, f"ALTER PUBLICATION {quote_name(name)} DROP TABLE ONLY {quoted}", quoted)
    for table in tables:
        if table.table_id not in listed:
            _add_table(connection, name, table)


def _add_table(connection: _Connection, name: str, table: SourceTable) -> None:
    version = connection.info.server_version
    lock = version < _VERSIONS_WITHOUT_LOSS.get(version // 10_000, 0)
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}".encode())
            if lock:
                connection.execute(f"LOCK TABLE ONLY {table.quoted} IN SHARE ROW EXCLUSIVE MODE".encode())
            connection.execute(f"ALTER PUBLICATION {quote_name(name)} ADD TABLE ONLY {table.quoted}".encode())
    except (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedTable):
        return  # another owner added it, or it is gone again: the next call sees what is true
    except psycopg.Error as error:
        raise OperatingError(f"cannot add table {table.full_name} to publication {name}: {error_text(error)}") from None


def _alter(connection: _Connection, statement: str, what: str) -> None:
    try:
        connection.execute(statement.encode())
    except (psycopg.errors.UndefinedObject, psycopg.errors.UndefinedTable):
        return
    except psycopg.Error as error:
        raise OperatingError(f"cannot drop table {what} from its publication: {error_text(error)}") from None


def advance_slot(connection: _Connection, slot: SlotInfo, target_ts: Ts) -> None:
    """Moves the slot to target_ts, never back and never beyond the WAL that is on disk."""
    row = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
    assert row is not None
    target = min(target_ts, parse_lsn(str(row[0])))
    if target <= slot.confirmed_ts:
        return
    connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(target)))
