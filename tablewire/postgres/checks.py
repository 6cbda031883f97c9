"""The requirements of `changefeed create`, checked together: each that is not met is reported, and nothing is changed.

Words: source_reachable, wal_level, privileges, tables, replica_identity, replication_slot,
sink_reachable, sink_writable. A check that needs a failed one (the connection) is skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psycopg

from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import GENERATED_VERSION, OWN_SCHEMA, PublicationRules, SourceListing, SourceTable, list_tables
from tablewire.postgres.connections import (
    SCHEMES,
    Connection,
    SourceUnavailableError,
    connect,
    error_text,
    fetch_value,
    server_name,
)
from tablewire.postgres.filters import TableFilter
from tablewire.postgres.publication import read_publication
from tablewire.postgres.servers import require_primary
from tablewire.postgres.slots import read_slot
from tablewire.runtime.uris import redact_uri
from tablewire.source import CheckFailure, SourceRequest

VERSION_MIN = 140000
"""pgoutput sends binary values since PostgreSQL 14."""
NAMES_IN_TEXT_MAX = 5
APPLICATION_NAME = "tablewire check"

_MAY_CREATE = "SELECT has_database_privilege(current_database(), 'CREATE')"
_UNWRITABLE = """
SELECT t FROM unnest(%s::text[]) t, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) p
 WHERE to_regclass(t) IS NOT NULL GROUP BY t HAVING NOT bool_and(has_table_privilege(to_regclass(t), p)) ORDER BY t"""


def run_checks(request: SourceRequest, table_filter: TableFilter, rules: PublicationRules, name: str) -> list[CheckFailure]:
    """Return every requirement that is not met. name: of the slot and the publication."""
    failures: list[CheckFailure] = []
    tables: Sequence[SourceTable] = ()
    identity: tuple[object, ...] | None = None
    try:
        with connect(request.source_uri, application_name=APPLICATION_NAME) as connection:
            require_primary(connection)
            listing = list_tables(connection, table_filter, rules)
            tables = listing.tables
            identity = _database_identity(connection)
            failures += _source_failures(connection, listing, table_filter, rules, name)
    except OperatingError as error:
        failures.append(CheckFailure("source_reachable", f"the source is unreachable: {error}"))
    except psycopg.Error as error:
        text = f"the source {server_name(request.source_uri)} cannot be read: {error_text(error)}"
        failures.append(CheckFailure("source_reachable", text))
    failures += _sink_failures(request, tables, identity)
    return failures


def _source_failures(
    connection: Connection, listing: SourceListing, table_filter: TableFilter, rules: PublicationRules, name: str
) -> Iterator[CheckFailure]:
    tables = listing.tables
    if entry := _synchronous_entry(fetch_value(connection, "SHOW synchronous_standby_names")):
        yield CheckFailure(
            "synchronous_standby",
            f"synchronous_standby_names of the source has the entry {entry}, which matches Tablewire's streams: a commit would be"
            " confirmed when they have received it, not when a standby has; name the standbys",
        )
    version = connection.info.server_version
    if version < VERSION_MIN:
        reason = f"the source is PostgreSQL {version // 10_000}; at least {VERSION_MIN // 10_000} is required"
        yield CheckFailure("source_reachable", reason)
    if rules.generated and version < GENERATED_VERSION:
        reason = f"generated_columns=stored requires PostgreSQL {GENERATED_VERSION // 10_000}; the source is {version // 10_000}"
        yield CheckFailure("tables", reason)
    level = fetch_value(connection, "SHOW wal_level")
    if level != "logical":
        yield CheckFailure("wal_level", f"wal_level is {level}: set wal_level = logical at the source and restart it")
    if not tables:
        patterns = ", ".join(table_filter.patterns)
        others = f"; {_some(listing.not_replicated, '; ')}" if listing.not_replicated else ""
        yield CheckFailure("tables", f"the filter ({patterns}) matches no table of {connection.info.dbname}{others}")
    for table in tables:
        if reason := table.why_unusable(rules):
            yield CheckFailure("replica_identity", reason)
    for reason in _missing_privileges(connection, tables):
        yield CheckFailure("privileges", reason)
    for reason in _slot_problems(connection, name):
        yield CheckFailure("replication_slot", reason)


def _synchronous_entry(setting: str) -> str:
    """Return the first entry of synchronous_standby_names that matches the application name of a stream; empty if none does."""
    names = re.sub(r"^\s*((FIRST|ANY)\s+)?\d+\s*\(|\)\s*$", "", setting, flags=re.IGNORECASE)
    for entry in (name.strip().strip('"') for name in names.split(",")):
        if entry == "*" or entry.lower().startswith("tablewire "):
            return entry
    return ""


def _missing_privileges(connection: Connection, tables: Sequence[SourceTable]) -> Iterator[str]:
    role = connection.execute(
        "SELECT current_user, rolsuper, rolreplication FROM pg_roles WHERE rolname = current_user"
    ).fetchone()
    if role is None:
        yield "the role of the source connection does not exist in pg_roles"
        return
    user, is_superuser, may_replicate = role
    if is_superuser:
        return
    if not may_replicate:
        yield f"role {user} may not replicate: ALTER ROLE {user} REPLICATION"
    if not fetch_value(connection, _MAY_CREATE):
        yield f"role {user} may not create a publication: GRANT CREATE ON DATABASE {connection.info.dbname} TO {user}"
    rows = connection.execute(
        "SELECT c.oid::bigint, has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(c.relnamespace, 'USAGE'),"
        " pg_has_role(c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = ANY(%s::bigint[]::oid[])",
        ([table.table_id for table in tables],),
    ).fetchall()
    names = {table.table_id: table.full_name for table in tables}
    if unreadable := [names[table_id] for table_id, may_read, _ in rows if not may_read]:
        yield f"role {user} may not read {_some(unreadable)}: GRANT SELECT (and USAGE on the schema) to it"
    if not_owned := [names[table_id] for table_id, _, is_owner in rows if not is_owner]:
        yield f"role {user} does not own {_some(not_owned)}, so it cannot publish it: make it a member of the owning role"


def _slot_problems(connection: Connection, name: str) -> Iterator[str]:
    try:
        read_publication(connection, name)
    except OperatingError as error:
        yield str(error)
    slot = read_slot(connection, name)
    if slot is not None and (problem := slot.why_unusable(connection.info.dbname)):
        yield problem
    row = connection.execute(
        "SELECT current_setting('max_replication_slots')::int, (SELECT count(*) FROM pg_replication_slots),"
        " current_setting('max_wal_senders')::int, (SELECT count(*) FROM pg_stat_replication)"
    ).fetchone()
    assert row is not None
    slots_max, slots, senders_max, senders = row
    if slots_max - slots < (1 if slot is not None else 2):
        yield (
            f"{slots} of max_replication_slots = {slots_max} are used: one for the changefeed and at least one for each "
            "processor are needed; drop unused slots or raise it"
        )
    if senders_max - senders < 1:
        yield f"{senders} of max_wal_senders = {senders_max} are used: raise it"


def _sink_failures(
    request: SourceRequest, tables: Sequence[SourceTable], source_identity: tuple[object, ...] | None
) -> Iterator[CheckFailure]:
    uri = request.sink_uri
    scheme = uri.partition("://")[0]
    try:
        if scheme in SCHEMES:
            with connect(uri, application_name=APPLICATION_NAME) as connection:
                for reason in _postgres_sink_problems(connection, tables, source_identity):
                    yield CheckFailure("sink_writable", reason)
        elif scheme == "file":
            if reason := _folder_problem(sink_folder(uri)):
                yield CheckFailure("sink_writable", f"sink {uri}: {reason}")
        elif scheme != "blackhole":
            raise unknown_scheme(uri)
    except SourceUnavailableError as error:
        yield CheckFailure("sink_reachable", f"the sink is unreachable: {error}")
    except OperatingError as error:
        yield CheckFailure("sink_reachable", str(error))
    except psycopg.Error as error:
        yield CheckFailure("sink_reachable", f"the sink {server_name(uri)} cannot be read: {error_text(error)}")


def unknown_scheme(uri: str) -> OperatingError:
    return OperatingError(
        f"sink {redact_uri(uri)}: the scheme is none of postgresql:// (or postgres://), file:///directory, blackhole://"
    )


def _postgres_sink_problems(
    connection: Connection, tables: Sequence[SourceTable], source_identity: tuple[object, ...] | None
) -> Iterator[str]:
    if source_identity is not None and _database_identity(connection) == source_identity:
        yield "source and sink are the same database: every table would replicate to itself"
        return
    database, user = connection.info.dbname, connection.info.user
    if fetch_value(connection, "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool"):
        yield f"the sink {database} is read-only"
        return
    may_create = fetch_value(connection, _MAY_CREATE)
    names = {table.quoted: table for table in tables}
    missing = connection.execute("SELECT t FROM unnest(%s::text[]) t WHERE to_regclass(t) IS NULL", (list(names),))
    needed = {OWN_SCHEMA, *(names[row[0]].schema for row in missing)}
    for schema in sorted(needed | {table.schema for table in tables}):
        query = "SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = %s"
        may_create_in = fetch_value(connection, query, (schema,))
        if may_create_in is None and not may_create:
            yield f"role {user} may not create schema {schema} at the sink: GRANT CREATE ON DATABASE {database} TO {user}"
        elif may_create_in is False and schema in needed:
            yield f"role {user} may not create tables in schema {schema} of the sink"
    if unwritable := [names[row[0]].full_name for row in connection.execute(_UNWRITABLE, (list(names),))]:
        yield f"role {user} may not write {_some(unwritable)}: GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE at the sink"


def _folder_problem(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return "" if os.access(existing, os.W_OK | os.X_OK) else f"folder {existing} cannot be written"


def sink_folder(uri: str) -> Path:
    """Return the folder of a `file:///folder` URI; raise OperatingError if it names none."""
    parts = urlsplit(uri)
    path = Path(unquote(parts.path))
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not path.is_absolute() or path == Path("/"):
        raise OperatingError(f"sink {redact_uri(uri)}: expected file:///an/absolute/folder")
    return path


def _database_identity(connection: Connection) -> tuple[object, ...]:
    """Return what distinguishes this database of this server from all others, as far as this role may see it."""
    try:
        row = connection.execute(
            "SELECT (SELECT system_identifier FROM pg_control_system()), oid::bigint FROM pg_database"
            " WHERE datname = current_database()"
        ).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        info = connection.info
        return (info.host, info.port, info.dbname)
    return tuple(row or ())


def _some(names: Sequence[str], separator: str = ", ") -> str:
    shown = separator.join(names[:NAMES_IN_TEXT_MAX])
    return shown if len(names) <= NAMES_IN_TEXT_MAX else f"{shown} and {len(names) - NAMES_IN_TEXT_MAX} more"
