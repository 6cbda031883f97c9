"""What a changefeed owns at its source: a publication and a permanent slot of the same name.

The publication lists its tables one by one, because FOR ALL TABLES needs a superuser, and because the
server then sends only what is needed. It requires CREATE on the database and ownership of each table.
It is created before the slot, so that no position of the slot is before it: there the server knows no
publication (an error up to PostgreSQL 17, a warning and skipped rows in 18).

Its comment holds what the executor must know: the incarnation (the clock of the source in µs when it
was created; a changefeed that is removed and created again gets a larger one), the position at which
it certainly existed, and for each table that was added later the position at which that happened.
Earlier changes of that table may not have been published, so a writer that holds less must copy it again.

A new table is added under a lock that waits for its open writers, for at most LOCK_TIMEOUT_MS:
servers before 17.5, 16.9, 15.13, 14.18 and 13.21 lose changes of a table that is added while it is
being written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import SourceTable
from tablewire.postgres.connections import Connection, error_text, fetch_value, quoted
from tablewire.postgres.lsn import format_lsn, parse_lsn

CREATE_SLOT_TIMEOUT_MS = 60_000
LOCK_TIMEOUT_MS = 1_000
ADD_TABLES_MAX = 100
"""Tables added in one transaction: each of these rewrites the comment."""
_VERSIONS_WITHOUT_LOSS = {13: 130021, 14: 140018, 15: 150013, 16: 160009, 17: 170005}


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


@dataclass(frozen=True, slots=True)
class PublicationInfo:
    """The publication and its comment. added: where each table was last added that was not listed from the beginning."""

    name: str
    incarnation: int
    created_ts: Ts
    added: Mapping[TableID, Ts]


def read_slot(connection: Connection, name: str) -> SlotInfo | None:
    row = connection.execute(
        "SELECT plugin, database, coalesce(restart_lsn, '0/0'), coalesce(confirmed_flush_lsn, '0/0'),"
        " coalesce(wal_status = 'lost', false) FROM pg_replication_slots WHERE slot_name = %s",
        (name,),
    ).fetchone()
    return None if row is None else SlotInfo(name, *row)


def read_publication(connection: Connection, name: str) -> PublicationInfo | None:
    """Return the publication with this name, None if there is none; raise OperatingError if Tablewire did not create it."""
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
            f"publication {name} exists at the source, but Tablewire did not create it: drop or rename it"
        ) from None


def create_publication(connection: Connection, name: str, tables: Sequence[SourceTable]) -> None:
    try:
        with connection.transaction():
            row = connection.execute(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, pg_current_wal_insert_lsn()"
            ).fetchone()
            assert row is not None
            publication = PublicationInfo(name, row[0], row[1], {})
            listed = f" FOR TABLE {_list(tables)}" if tables else ""
            connection.execute(f"CREATE PUBLICATION {quoted(name)}{listed}")
            _comment(connection, publication)
    except psycopg.errors.DuplicateObject:
        return  # another owner was faster
    except psycopg.Error as error:
        raise OperatingError(f"cannot create publication {name}: {error_text(error)}") from None


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


def published_tables(connection: Connection, name: str) -> dict[TableID, str]:
    """Return the tables that the publication lists, each with its quoted name."""
    rows = connection.execute(
        "SELECT c.oid::bigint, n.nspname, c.relname FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid"
        " JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = %s",
        (name,),
    )
    return {table_id: quoted(schema, table) for table_id, schema, table in rows}


def sync_publication(connection: Connection, name: str, tables: Sequence[SourceTable]) -> None:
    """Make the publication list these tables; raise OperatingError for the first one that cannot be added or dropped.

    A table without a usable replica identity is not listed: the source refuses updates and deletes of
    such a table while it is published. It is copied again when it returns, since its changes are missed.
    """
    listed = published_tables(connection, name)
    usable = {table.table_id: table for table in tables if not table.why_unusable()}
    for table_id in listed.keys() - usable.keys():
        _drop_table(connection, name, listed[table_id])
    missing = [table for table_id, table in usable.items() if table_id not in listed]
    version = connection.info.server_version
    must_lock = version < _VERSIONS_WITHOUT_LOSS.get(version // 10_000, 0)
    step = 1 if must_lock else ADD_TABLES_MAX
    for at in range(0, len(missing), step):
        group = missing[at : at + step]
        try:
            _add_tables(connection, name, group, must_lock)
        except psycopg.Error:
            for table in group:
                _add_table(connection, name, table, must_lock)


def _drop_table(connection: Connection, name: str, table: str) -> None:
    try:
        connection.execute(f"ALTER PUBLICATION {quoted(name)} DROP TABLE ONLY {table}")
    except (psycopg.errors.UndefinedObject, psycopg.errors.UndefinedTable):
        return
    except psycopg.Error as error:
        raise OperatingError(f"cannot drop table {table} from publication {name}: {error_text(error)}") from None


def _add_table(connection: Connection, name: str, table: SourceTable, must_lock: bool) -> None:
    try:
        _add_tables(connection, name, [table], must_lock)
    except (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedTable):
        return  # another owner added it, or it was dropped: the next call reads the current state
    except psycopg.Error as error:
        raise OperatingError(f"cannot add table {table.full_name} to publication {name}: {error_text(error)}") from None


def _add_tables(connection: Connection, name: str, tables: Sequence[SourceTable], must_lock: bool) -> None:
    """Add all tables or none, and record the position in the comment, in one transaction."""
    with connection.transaction():
        connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
        connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (name,))  # one writer of the comment at a time
        if must_lock:
            connection.execute(f"LOCK TABLE {_list(tables)} IN SHARE ROW EXCLUSIVE MODE")
        connection.execute(f"ALTER PUBLICATION {quoted(name)} ADD TABLE {_list(tables)}")
        publication = read_publication(connection, name)
        assert publication is not None
        position: Ts = fetch_value(connection, "SELECT pg_current_wal_insert_lsn()")
        listed = published_tables(connection, name)
        added = {table_id: ts for table_id, ts in publication.added.items() if table_id in listed}
        added.update((table.table_id, position) for table in tables)
        _comment(connection, replace(publication, added=added))


def _list(tables: Sequence[SourceTable]) -> str:
    return ", ".join(f"ONLY {table.quoted}" for table in tables)


def _comment(connection: Connection, publication: PublicationInfo) -> None:
    """Write the comment that `read_publication` reads."""
    comment: dict[str, object] = {
        "tablewire": 1,
        "incarnation": publication.incarnation,
        "created_lsn": format_lsn(publication.created_ts),
    }
    if publication.added:
        comment["added"] = {str(table_id): format_lsn(ts) for table_id, ts in publication.added.items()}
    connection.execute(sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(sql.Identifier(publication.name), json.dumps(comment)))


def advance_slot(connection: Connection, slot: SlotInfo, target_ts: Ts) -> None:
    """Advance the slot to target_ts, never backwards and never past the WAL that is on disk."""
    target_ts = min(target_ts, fetch_value(connection, "SELECT pg_current_wal_flush_lsn()"))
    if target_ts > slot.confirmed_ts:
        connection.execute("SELECT pg_replication_slot_advance(%s, %s::pg_lsn)", (slot.name, format_lsn(target_ts)))
