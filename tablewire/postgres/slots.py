"""What a changefeed owns at its source: a publication and a permanent slot of the same name.

The publication lists its tables one by one, for two reasons: FOR ALL TABLES needs a superuser, and the server then sends only
what is wanted. It needs CREATE on the database and ownership of each table. It is made before the slot, so that no position of
the slot lies before it: at an older position the server knows no publication (an error up to PostgreSQL 17, a warning and
skipped rows in 18). Its comment holds what the executor must know: the incarnation (the source's clock in µs when it was made;
a changefeed that is removed and created again gets a larger one), the position at which it existed for sure, and for each table
that was added later the position at which it was: changes of that table from before may have gone by unpublished, so whoever
holds less of it than that must copy it again.

A new table is added under a lock that waits for its open writers, for at most LOCK_TIMEOUT_MS: servers before 17.5, 16.9,
15.13, 14.18 and 13.21 lose changes of a table that is added while it is being written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psycopg

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import SourceTable
from tablewire.postgres.connections import Connection, error_text, quote_name, quote_table, quote_text
from tablewire.postgres.lsn import format_lsn, parse_lsn

CREATE_SLOT_TIMEOUT_MS = 60_000
LOCK_TIMEOUT_MS = 1_000
ADD_TABLES_MAX = 100
"""Tables added in one transaction: each one rewrites the comment."""
_VERSIONS_WITHOUT_LOSS = {13: 130021, 14: 140018, 15: 150013, 16: 160009, 17: 170005}


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
    """The publication and what its comment says. added: where each table that it has not listed from the beginning was added
    (for the last time)."""

    name: str
    incarnation: int
    created_ts: Ts
    added: Mapping[TableID, Ts]


def read_slot(connection: Connection, name: str) -> SlotInfo | None:
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


def read_publication(connection: Connection, name: str) -> PublicationInfo | None:
    """The publication of this name, None when there is none; OperatingError when it is not one of Tablewire's."""
    row = connection.execute(
        "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = %s", (name,)
    ).fetchone()
    if row is None:
        return None
    try:
        comment = json.loads(str(row[0]))
        added = {int(table_id): parse_lsn(lsn) for table_id, lsn in comment.get("added", {}).items()}
        return PublicationInfo(name, int(comment["incarnation"]), parse_lsn(comment["created_lsn"]), added)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OperatingError(
            f"publication {name} exists at the source, but Tablewire did not make it: drop or rename it"
        ) from None


def create_publication(connection: Connection, name: str, tables: Sequence[SourceTable]) -> PublicationInfo:
    """Makes the publication for these tables, with its comment; OperatingError with the server's reason."""
    targets = ", ".join(f"TABLE ONLY {table.quoted}" if not i else f"ONLY {table.quoted}" for i, table in enumerate(tables))
    try:
        with connection.transaction():
            row = connection.execute(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, pg_current_wal_insert_lsn()::text"
            ).fetchone()
            assert row is not None
            connection.execute(f"CREATE PUBLICATION {quote_name(name)}{' FOR ' + targets if targets else ''}".encode())
            _comment(connection, PublicationInfo(name, int(str(row[0])), parse_lsn(str(row[1])), {}))
    except psycopg.errors.DuplicateObject:
        pass  # another owner was faster: what it made is read below
    except psycopg.Error as error:
        raise OperatingError(f"cannot create publication {name}: {error_text(error)}") from None
    made = read_publication(connection, name)
    if made is None:
        raise OperatingError(f"publication {name} vanished while it was being created")
    return made


def create_slot(connection: Connection, name: str) -> SlotInfo:
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


def published_tables(connection: Connection, name: str) -> dict[TableID, str]:
    """The tables that the publication lists, each with its quoted name."""
    rows = connection.execute(
        "SELECT r.prrelid::bigint, n.nspname, c.relname FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid"
        " JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = %s",
        (name,),
    ).fetchall()
    return {int(str(row[0])): quote_table(str(row[1]), str(row[2])) for row in rows}


def sync_publication(connection: Connection, name: str, tables: Sequence[SourceTable]) -> None:
    """Makes the publication list these tables. OperatingError names the first table that it could not add or drop.

    A table without a usable replica identity is not listed, and taken out if it was: the source refuses updates and deletes of a
    published table that has none, and whoever writes there must not suffer. What it then misses is copied anew when it is back.
    """
    listed = published_tables(connection, name)
    wanted = {table.table_id for table in tables if not table.why_unusable()}
    for table_id, quoted in listed.items():
        if table_id not in wanted:
            _alter(connection, f"ALTER PUBLICATION {quote_name(name)} DROP TABLE ONLY {quoted}", quoted)
    missing = [table for table in tables if table.table_id in wanted and table.table_id not in listed]
    version = connection.info.server_version
    lock = version < _VERSIONS_WITHOUT_LOSS.get(version // 10_000, 0)
    step = 1 if lock else ADD_TABLES_MAX
    for at in range(0, len(missing), step):
        group = missing[at : at + step]
        try:
            _add_tables(connection, name, group, lock)
        except psycopg.Error:
            for table in group:
                _add_table(connection, name, table, lock)


def _add_table(connection: Connection, name: str, table: SourceTable, lock: bool) -> None:
    try:
        _add_tables(connection, name, [table], lock)
    except (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedTable):
        return  # another owner added it, or it is gone again: the next call sees what is true
    except psycopg.Error as error:
        raise OperatingError(f"cannot add table {table.full_name} to publication {name}: {error_text(error)}") from None


def _add_tables(connection: Connection, name: str, tables: Sequence[SourceTable], lock: bool) -> None:
    """Adds all or none, and notes in the same transaction where that was."""
    with connection.transaction():
        connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}".encode())
        connection.execute(b"SELECT pg_advisory_xact_lock(hashtext(%s))", (name,))  # one writer of the comment at a time
        if lock:
            for table in tables:
                connection.execute(f"LOCK TABLE ONLY {table.quoted} IN SHARE ROW EXCLUSIVE MODE".encode())
        targets = ", ".join(f"TABLE ONLY {table.quoted}" if not i else f"ONLY {table.quoted}" for i, table in enumerate(tables))
        connection.execute(f"ALTER PUBLICATION {quote_name(name)} ADD {targets}".encode())
        publication = read_publication(connection, name)
        row = connection.execute(b"SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert publication is not None
        assert row is not None
        listed = published_tables(connection, name)
        added = {table_id: ts for table_id, ts in publication.added.items() if table_id in listed}
        added.update((table.table_id, parse_lsn(str(row[0]))) for table in tables)
        _comment(connection, replace(publication, added=added))


def _comment(connection: Connection, publication: PublicationInfo) -> None:
    """Writes what `read_publication` reads."""
    comment: dict[str, object] = {
        "tablewire": 1,
        "incarnation": publication.incarnation,
        "created_lsn": format_lsn(publication.created_ts),
    }
    if publication.added:
        comment["added"] = {str(table_id): format_lsn(ts) for table_id, ts in publication.added.items()}
    text = quote_text(json.dumps(comment))
    connection.execute(f"COMMENT ON PUBLICATION {quote_name(publication.name)} IS {text}".encode())


def _alter(connection: Connection, statement: str, what: str) -> None:
    try:
        connection.execute(statement.encode())
    except (psycopg.errors.UndefinedObject, psycopg.errors.UndefinedTable):
        return
    except psycopg.Error as error:
        raise OperatingError(f"cannot drop table {what} from its publication: {error_text(error)}") from None


def advance_slot(connection: Connection, slot: SlotInfo, target_ts: Ts) -> None:
    """Moves the slot to target_ts, never back and never beyond the WAL that is on disk."""
    row = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
    assert row is not None
    target = min(target_ts, parse_lsn(str(row[0])))
    if target <= slot.confirmed_ts:
        return
    connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(target)))
