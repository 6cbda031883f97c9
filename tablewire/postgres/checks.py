"""All that `changefeed create` promises, checked at once: every failure is named, nothing is changed.

The words: source_reachable, wal_level, privileges, tables, replica_identity, replication_slot, sink_reachable, sink_writable.
A check that cannot be made because an earlier one failed (no connection) is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psycopg

from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import OWN_SCHEMA, SourceTable, TableFilter, matching_tables
from tablewire.postgres.connections import SCHEMES, Connection, connect, error_text, quote_table, server_name
from tablewire.postgres.slots import read_publication, read_slot
from tablewire.runtime.uris import redact_uri
from tablewire.source import CheckFailure, SourceRequest

VERSION_MIN = 140000
"""Binary values in pgoutput came with PostgreSQL 14."""
NAMES_IN_TEXT_MAX = 5
APPLICATION_NAME = "tablewire check"


def run_checks(request: SourceRequest, table_filter: TableFilter, name: str) -> list[CheckFailure]:
    """name: of the slot and the publication."""
    failures: list[CheckFailure] = []
    tables: list[SourceTable] = []
    identity: tuple[object, ...] | None = None
    try:
        with connect(request.source_uri, application_name=APPLICATION_NAME) as connection:
            tables = matching_tables(connection, table_filter)
            identity = _database_identity(connection)
            failures += _source_failures(connection, tables, table_filter, name)
    except OperatingError as error:
        failures.append(CheckFailure("source_reachable", f"the source does not answer: {error}"))
    except psycopg.Error as error:
        text = f"the source {server_name(request.source_uri)} cannot be read: {error_text(error)}"
        failures.append(CheckFailure("source_reachable", text))
    failures += _sink_failures(request, tables, identity)
    return failures


def _source_failures(
    connection: Connection, tables: Sequence[SourceTable], table_filter: TableFilter, name: str
) -> Iterator[CheckFailure]:
    if connection.info.server_version < VERSION_MIN:
        reason = (
            f"the source is PostgreSQL {connection.info.server_version // 10_000}; at least {VERSION_MIN // 10_000} is needed"
        )
        yield CheckFailure("source_reachable", reason)
    level = _text(connection, "SHOW wal_level")
    if level != "logical":
        yield CheckFailure("wal_level", f"wal_level is {level}: set wal_level = logical at the source and restart it")
    if not tables:
        patterns = ", ".join(table_filter.patterns)
        yield CheckFailure("tables", f"the filter ({patterns}) matches no table of {connection.info.dbname}")
    for table in tables:
        reason = table.why_unusable()
        if reason:
            yield CheckFailure("replica_identity", reason)
    yield from _privilege_failures(connection, tables)
    yield from _slot_failures(connection, name)


def _privilege_failures(connection: Connection, tables: Sequence[SourceTable]) -> Iterator[CheckFailure]:
    role = connection.execute(
        "SELECT current_user, rolsuper, rolreplication FROM pg_roles WHERE rolname = current_user"
    ).fetchone()
    if role is None:
        yield CheckFailure("privileges", "the role of the source connection does not exist in pg_roles")
        return
    user, superuser, replication = role
    if superuser:
        return
    if not replication:
        yield CheckFailure("privileges", f"role {user} may not replicate: ALTER ROLE {user} REPLICATION")
    if not _true(connection, "SELECT has_database_privilege(current_database(), 'CREATE')"):
        reason = f"role {user} may not create a publication: GRANT CREATE ON DATABASE {connection.info.dbname} TO {user}"
        yield CheckFailure("privileges", reason)
    rows = connection.execute(
        "SELECT c.oid::bigint, has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(c.relnamespace, 'USAGE'),"
        " pg_has_role(c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = ANY(%s::bigint[]::oid[])",
        ([table.table_id for table in tables],),
    ).fetchall()
    names = {table.table_id: table.full_name for table in tables}
    unread = [names[int(str(row[0]))] for row in rows if not row[1]]
    foreign = [names[int(str(row[0]))] for row in rows if not row[2]]
    if unread:
        yield CheckFailure(
            "privileges", f"role {user} may not read {_some(unread)}: GRANT SELECT (and USAGE on the schema) to it"
        )
    if foreign:
        reason = f"role {user} does not own {_some(foreign)}, so it cannot publish it: make it a member of the owning role"
        yield CheckFailure("privileges", reason)


def _slot_failures(connection: Connection, name: str) -> Iterator[CheckFailure]:
    try:
        read_publication(connection, name)
    except OperatingError as error:
        yield CheckFailure("replication_slot", str(error))
    slot = read_slot(connection, name)
    if slot is not None:
        if slot.database != connection.info.dbname or slot.plugin != "pgoutput":
            reason = f"slot {name} exists already, for database {slot.database} and plugin {slot.plugin}: choose another id"
            yield CheckFailure("replication_slot", reason)
        elif slot.lost:
            yield CheckFailure("replication_slot", f"slot {name} exists and has lost its WAL: drop it")
    row = connection.execute(
        "SELECT current_setting('max_replication_slots')::int, (SELECT count(*)::int FROM pg_replication_slots),"
        " current_setting('max_wal_senders')::int, (SELECT count(*)::int FROM pg_stat_replication)"
    ).fetchone()
    assert row is not None
    slots_max, slots, senders_max, senders = (int(str(value)) for value in row)
    needed = 1 if slot is not None else 2
    if slots_max - slots < needed:
        reason = (
            f"{slots} of max_replication_slots = {slots_max} are taken: one for the changefeed and at least one for each "
            "processor are needed; drop unused slots or raise it"
        )
        yield CheckFailure("replication_slot", reason)
    if senders_max - senders < 1:
        yield CheckFailure("replication_slot", f"{senders} of max_wal_senders = {senders_max} are taken: raise it")


def _sink_failures(
    request: SourceRequest, tables: Sequence[SourceTable], source_identity: tuple[object, ...] | None
) -> Iterator[CheckFailure]:
    scheme = request.sink_uri.partition("://")[0]
    if scheme in SCHEMES:
        yield from _postgres_sink_failures(request.sink_uri, tables, source_identity)
    elif scheme == "file":
        yield from _file_sink_failures(request.sink_uri)
    elif scheme != "blackhole":
        reason = f"sink {redact_uri(request.sink_uri)}: the scheme is none of postgresql://, file:///directory, blackhole://"
        yield CheckFailure("sink_reachable", reason)


def _postgres_sink_failures(
    uri: str, tables: Sequence[SourceTable], source_identity: tuple[object, ...] | None
) -> Iterator[CheckFailure]:
    try:
        with connect(uri, application_name=APPLICATION_NAME) as connection:
            if source_identity is not None and _database_identity(connection) == source_identity:
                yield CheckFailure(
                    "sink_writable", "source and sink are the same database: every table would replicate to itself"
                )
                return
            yield from _postgres_write_failures(connection, tables)
    except OperatingError as error:
        yield CheckFailure("sink_reachable", f"the sink does not answer: {error}")
    except psycopg.Error as error:
        yield CheckFailure("sink_reachable", f"the sink {server_name(uri)} cannot be read: {error_text(error)}")


def _postgres_write_failures(connection: Connection, tables: Sequence[SourceTable]) -> Iterator[CheckFailure]:
    where, user = connection.info.dbname, connection.info.user
    if _true(connection, "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool"):
        yield CheckFailure("sink_writable", f"the sink {where} is read-only")
        return
    may_create = _true(connection, "SELECT has_database_privilege(current_database(), 'CREATE')")
    for schema in sorted({OWN_SCHEMA, *(table.schema for table in tables)}):
        row = connection.execute(
            "SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = %s", (schema,)
        ).fetchone()
        if row is None and not may_create:
            reason = f"role {user} may not create schema {schema} at the sink: GRANT CREATE ON DATABASE {where} TO {user}"
            yield CheckFailure("sink_writable", reason)
        elif row is not None and not row[0] and (schema == OWN_SCHEMA or _any_missing(connection, schema, tables)):
            yield CheckFailure("sink_writable", f"role {user} may not create tables in schema {schema} of the sink")
    closed = [
        table.full_name
        for table in tables
        if not _true(
            connection,
            "SELECT coalesce((SELECT bool_and(has_table_privilege(to_regclass(%s), p)) FROM unnest(ARRAY['SELECT', 'INSERT',"
            " 'UPDATE', 'DELETE', 'TRUNCATE']) p WHERE to_regclass(%s) IS NOT NULL), true)",
            (quote_table(table.schema, table.name),) * 2,
        )
    ]
    if closed:
        reason = f"role {user} may not write {_some(closed)}: GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE at the sink"
        yield CheckFailure("sink_writable", reason)


def _any_missing(connection: Connection, schema: str, tables: Sequence[SourceTable]) -> bool:
    return any(
        table.schema == schema
        and not _true(connection, "SELECT to_regclass(%s) IS NOT NULL", (quote_table(table.schema, table.name),))
        for table in tables
    )


def _file_sink_failures(uri: str) -> Iterator[CheckFailure]:
    try:
        folder = sink_folder(uri)
    except OperatingError as error:
        yield CheckFailure("sink_reachable", str(error))
        return
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        yield CheckFailure("sink_writable", f"sink {uri}: {existing} is not a folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield CheckFailure("sink_writable", f"sink {uri}: folder {existing} cannot be written")


def sink_folder(uri: str) -> Path:
    """The folder of a `file:///folder` URI; OperatingError when it names none."""
    parts = urlsplit(uri)
    path = Path(unquote(parts.path))
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not path.is_absolute() or path == Path("/"):
        raise OperatingError(f"sink {redact_uri(uri)}: expected file:///an/absolute/folder")
    return path


def _database_identity(connection: Connection) -> tuple[object, ...]:
    """What tells one database of one server from all others, as far as this role may see it."""
    try:
        row = connection.execute(
            "SELECT (SELECT system_identifier FROM pg_control_system()), oid::bigint FROM pg_database"
            " WHERE datname = current_database()"
        ).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        info = connection.info
        return (info.host, info.port, info.dbname)
    return tuple(row or ())


def _text(connection: Connection, query: str) -> str:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


def _true(connection: Connection, query: str, values: tuple[object, ...] = ()) -> bool:
    row = connection.execute(query.encode(), values).fetchone()
    return row is not None and bool(row[0])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_IN_TEXT_MAX])
    return shown if len(names) <= NAMES_IN_TEXT_MAX else f"{shown} and {len(names) - NAMES_IN_TEXT_MAX} more"
