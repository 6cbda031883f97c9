"""The publication of a changefeed at its source, and how it is kept equal to the changefeed's tables.

It lists its tables one by one, because FOR ALL TABLES needs a superuser, and because the server then
sends only what is needed. It requires CREATE on the database and ownership of each table. It is created
before the slot, so that no position of the slot is before it: there the server knows no publication (an
error up to PostgreSQL 17, a warning and skipped rows in 18).

Its comment holds what the executor must know: the incarnation (the clock of the source in µs when it
was created; a changefeed that is removed and created again gets a larger one), the position at which it
certainly existed, and for each table that was added later the position at which that happened. Earlier
changes of that table may not have been published, so a writer that holds less must copy it again.

A change by hand is detected by the transactions (xmin) that wrote the rows of the catalogue: the comment
lists Tablewire's own. What was missed is not known, so the owner undoes such a change, and the tables
concerned are copied again.

A new table is added under a lock that waits for its open writers, for at most LOCK_TIMEOUT_MS:
servers before 17.5, 16.9, 15.13, 14.18 and 13.21 lose changes of a table that is added while it is
being written.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg import sql

from tablewire.errors import ChangesLostError, OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import GENERATED_VERSION, OPERATIONS, PublicationRules, SourceTable
from tablewire.postgres.connections import Connection, error_text, fetch_value, is_connection_loss, quoted
from tablewire.postgres.lsn import format_lsn, parse_lsn

LOCK_TIMEOUT_MS = 1_000
FAILURES_MAX_S = 3.0
"""One call of `sync_publication` begins no more single tables after this long, so that locked tables do not delay the slot."""
NAMES_MAX = 5
CHANGE_TABLES_MAX = 100
"""Tables of one transaction: each rewrites the comment."""
_OVERTAKEN = (psycopg.errors.DuplicateObject, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject)
"""Another owner added or dropped it, or the table is gone: the next call reads the current state."""
_VERSIONS_WITHOUT_LOSS = {13: 130021, 14: 140018, 15: 150013, 16: 160009, 17: 170005}

_Item = TypeVar("_Item")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PublicationInfo:
    """The publication and its comment.

    added: where each table was last added that was not listed from the beginning. changed_ts: where a
    change by hand of the publication as a whole was last undone; 0: never. withdrawn: tables that were
    replicated and cannot be published now. xids: of Tablewire's own transactions that wrote rows of the
    catalogue; empty: of an earlier version, which did not note them. row_xid: which wrote the row of the
    publication. flags: its columns. source: for a sink that stores nothing of the source, what servers.py
    compares.
    """

    name: str
    incarnation: int
    created_ts: Ts
    added: Mapping[TableID, Ts]
    changed_ts: Ts = 0
    withdrawn: frozenset[TableID] = frozenset()
    xids: frozenset[str] = frozenset()
    row_xid: str = ""
    flags: Mapping[str, bool | str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def is_ours(self, xid: str) -> bool:
        """Return whether a transaction of Tablewire wrote this version of a row, as far as that is known."""
        return not self.xids or xid in self.xids

    def published_ts(self, table_id: TableID) -> Ts:
        """Return the position after which all changes of a listed table are published; 0: from the beginning."""
        return max(self.added.get(table_id, 0), self.changed_ts)

    def why_altered(self, rules: PublicationRules) -> str:
        """Return how the publication as a whole was changed by hand; empty if it was not."""
        if different := [name for name, value in _flags(rules).items() if self.flags.get(name, value) != value]:
            return (
                f"publication {self.name} was changed by hand ({', '.join(f'{name} = {self.flags[name]}' for name in different)})"
            )
        return "" if self.is_ours(self.row_xid) else f"publication {self.name} was changed by hand"


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table that the publication lists. xid: of the transaction that added it."""

    table_id: TableID
    quoted: str
    xid: str


def read_publication(connection: Connection, name: str) -> PublicationInfo | None:
    """Return the publication with this name, None if there is none; raise OperatingError if Tablewire did not create it."""
    row = connection.execute(
        "SELECT obj_description(oid, 'pg_publication'), xmin::text, to_jsonb(p) FROM pg_publication p WHERE pubname = %s", (name,)
    ).fetchone()
    if row is None:
        return None
    try:
        comment = json.loads(str(row[0]))
        return PublicationInfo(
            name,
            int(comment["incarnation"]),
            parse_lsn(comment["created_lsn"]),
            {int(table_id): parse_lsn(lsn) for table_id, lsn in comment.get("added", {}).items()},
            parse_lsn(comment.get("changed_lsn", "0/0")),
            frozenset(map(int, comment.get("withdrawn", ()))),
            frozenset(map(str, comment.get("xids", ()))),
            str(row[1]),
            row[2],
            dict(comment.get("source", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OperatingError(
            f"publication {name} exists at the source, but Tablewire did not create it: drop or rename it"
        ) from None


def published_tables(connection: Connection, name: str, table_id: TableID | None = None) -> dict[TableID, PublishedTable]:
    """Return the tables that the publication lists, or only this one of them."""
    rows = connection.execute(
        "SELECT c.oid::bigint, n.nspname, c.relname, r.xmin::text FROM pg_publication p"
        " JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = %s AND coalesce(r.prrelid = %s::bigint::oid, true)",
        (name, table_id),
    )
    return {listed_id: PublishedTable(listed_id, quoted(schema, table), xid) for listed_id, schema, table, xid in rows}


def published_positions(
    connection: Connection, name: str, rules: PublicationRules, table_id: TableID | None = None
) -> Mapping[TableID, Ts]:
    """Return the tables that are published as this changefeed needs it, each with its `published_ts`; or only one of them.

    Raise OperatingError if the publication does not exist, or was changed by hand as a whole.
    """
    if (publication := read_publication(connection, name)) is None:
        raise missing_publication(name)
    if problem := publication.why_altered(rules):
        raise OperatingError(f"{problem}: changes may be missing; the owner restores it, and the tables are copied again")
    listed = published_tables(connection, name, table_id)
    return {listed_id: publication.published_ts(listed_id) for listed_id, row in listed.items() if publication.is_ours(row.xid)}


def missing_publication(name: str) -> ChangesLostError:
    return ChangesLostError(
        f"publication {name} does not exist at the source: changes since it was dropped are lost; "
        "`owner changefeed resync` copies all tables again"
    )


def create_publication(
    connection: Connection, name: str, tables: Sequence[SourceTable], rules: PublicationRules, above: int = 0
) -> None:
    """Create the publication, unless another owner was faster. above: an incarnation that the sink has seen.

    If one of the tables cannot be published, it lists none: `sync_publication` adds them one by one.
    """
    try:
        with connection.transaction():
            row = connection.execute(
                "SELECT greatest((extract(epoch FROM clock_timestamp()) * 1000000)::bigint, %s + 1), pg_current_wal_insert_lsn()",
                (above,),
            ).fetchone()
            assert row is not None
            publication = PublicationInfo(name, row[0], row[1], {}, xids=frozenset((_own_xid(connection),)))
            listed = f" FOR TABLE {_list(tables)}" if tables else ""
            connection.execute(f"CREATE PUBLICATION {quoted(name)}{listed} WITH ({_clause(connection, rules)})")
            _comment(connection, publication)
    except psycopg.errors.DuplicateObject:
        return  # another owner was faster
    except psycopg.Error as error:
        if not tables or connection.closed:
            raise OperatingError(f"cannot create publication {name}: {error_text(error)}") from None
        create_publication(connection, name, (), rules, above)


def note_source(connection: Connection, name: str, rules: PublicationRules, source: Mapping[str, Any]) -> None:
    """Store what is known of the source in the comment."""
    _Sync(connection, name, rules).note_source(source)


@dataclass(frozen=True, slots=True)
class SyncResult:
    """problems: why tables could not be added or dropped. scheduled: tables that are published or withdrawn."""

    problems: Mapping[TableID, str]
    scheduled: Set[TableID]


def sync_publication(
    connection: Connection,
    name: str,
    rules: PublicationRules,
    tables: Sequence[SourceTable],
    avoided: Collection[TableID] = (),
    replicated: Collection[TableID] = (),
) -> SyncResult:
    """Make the publication list these tables, and undo changes by hand.

    A table without a usable replica identity is not listed: the source refuses updates and deletes of
    such a table while it is published. It is copied again when it returns, since its changes are missed.
    avoided: tables that are not tried now. replicated: tables that the changefeed has listed before: if
    they cannot be published, they are withdrawn. Raise OperatingError if the publication is missing, or
    cannot be restored.
    """
    sync = _Sync(connection, name, rules)
    publication = sync.restore()
    matched = {table.table_id for table in tables}
    usable = {table.table_id: table for table in tables if not table.why_unusable(rules)}
    listed = published_tables(connection, name)
    foreign = {table_id for table_id, row in listed.items() if not publication.is_ours(row.xid)}
    if foreign:
        names = ", ".join(listed[table_id].quoted for table_id in sorted(foreign)[:NAMES_MAX])
        _log.warning("source_publication_restored", reason=f"publication {name} was changed by hand for {names}")
    dropped = [listed[table_id] for table_id in sorted(foreign | (listed.keys() - usable.keys())) if table_id not in avoided]
    added = [usable[table_id] for table_id in usable if table_id not in listed.keys() - foreign and table_id not in avoided]
    if dropped or added:
        sync.drop(dropped, matched)
        sync.add(added)
        publication, listed = sync.read(), published_tables(connection, name)
    withdrawn = (matched - listed.keys()) & {*publication.withdrawn, *replicated}
    if withdrawn != publication.withdrawn:
        sync.withdraw(withdrawn)
    return SyncResult(sync.problems, listed.keys() | withdrawn)


class _Sync:
    """One call of `sync_publication`. problems: by table."""

    def __init__(self, connection: Connection, name: str, rules: PublicationRules) -> None:
        self.problems: dict[TableID, str] = {}
        self._connection = connection
        self._name = name
        self._rules = rules
        self._deadline = time.monotonic() + FAILURES_MAX_S
        version = connection.info.server_version
        self._must_lock = version < _VERSIONS_WITHOUT_LOSS.get(version // 10_000, 0)

    def restore(self) -> PublicationInfo:
        """Return the publication; undo changes by hand that concern all of its tables."""
        publication = self.read()
        if not publication.xids:
            xids = {row.xid for row in published_tables(self._connection, self._name).values()}
            publication = self._change(lambda found: replace(found, xids=frozenset(xids | {found.row_xid})))
        if problem := publication.why_altered(self._rules):
            _log.warning("source_publication_restored", reason=problem)
            try:
                return self._change(self._set_flags)
            except psycopg.Error as error:
                if is_connection_loss(error):
                    raise
                raise OperatingError(f"{problem}, and cannot be restored: {error_text(error)}") from None
        return publication

    def _set_flags(self, publication: PublicationInfo) -> PublicationInfo:
        self._connection.execute(f"ALTER PUBLICATION {quoted(self._name)} SET ({_clause(self._connection, self._rules)})")
        return replace(publication, changed_ts=_position(self._connection))

    def drop(self, rows: Sequence[PublishedTable], matched: Collection[TableID]) -> None:
        """Drop the rows. matched: tables of the filter, which are withdrawn until they are added again."""
        for row, error in self._groups(rows, CHANGE_TABLES_MAX, partial(self._drop, matched)):
            self._failed(row.table_id, f"table {row.quoted} cannot be dropped from", error)

    def add(self, tables: Sequence[SourceTable]) -> None:
        for table, error in self._groups(tables, 1 if self._must_lock else CHANGE_TABLES_MAX, self._add):
            self._failed(table.table_id, f"table {table.full_name} cannot be added to", error)

    def _groups(
        self, items: Sequence[_Item], step: int, change: Callable[[Sequence[_Item], PublicationInfo], PublicationInfo]
    ) -> Iterator[tuple[_Item, psycopg.Error]]:
        """Change the publication for groups of items, after a failure one by one; yield the items that fail alone."""
        pending = deque(items[at : at + step] for at in range(0, len(items), step))
        while pending:
            group = pending.popleft()
            if self.problems and time.monotonic() > self._deadline:
                return  # the next call tries the others
            try:
                self._change(partial(change, group))
            except psycopg.Error as error:
                if is_connection_loss(error):
                    raise
                if len(group) > 1:
                    pending.extendleft([item] for item in reversed(group))
                elif not isinstance(error, _OVERTAKEN):
                    yield group[0], error

    def _drop(
        self, matched: Collection[TableID], rows: Sequence[PublishedTable], publication: PublicationInfo
    ) -> PublicationInfo:
        names = ", ".join(f"ONLY {row.quoted}" for row in rows)
        self._connection.execute(f"ALTER PUBLICATION {quoted(self._name)} DROP TABLE {names}")
        return replace(publication, withdrawn=publication.withdrawn | {row.table_id for row in rows if row.table_id in matched})

    def _add(self, tables: Sequence[SourceTable], publication: PublicationInfo) -> PublicationInfo:
        """Add all tables or none, and record the position in the comment, in one transaction."""
        if self._must_lock:
            locked = ", ".join(("" if table.kind == "p" else "ONLY ") + table.quoted for table in tables)
            self._connection.execute(f"LOCK TABLE {locked} IN SHARE ROW EXCLUSIVE MODE")
        self._connection.execute(f"ALTER PUBLICATION {quoted(self._name)} ADD TABLE {_list(tables)}")
        position = _position(self._connection)
        ids = {table.table_id for table in tables}
        added = {**publication.added, **dict.fromkeys(ids, position)}
        return replace(publication, added=added, withdrawn=publication.withdrawn - ids)

    def withdraw(self, tables: Set[TableID]) -> None:
        """Note these tables, and no others, as replicated but not published."""
        self._change(lambda found: replace(found, withdrawn=frozenset(tables)))

    def note_source(self, source: Mapping[str, Any]) -> None:
        self._change(lambda found: replace(found, source=source))

    def read(self) -> PublicationInfo:
        if (publication := read_publication(self._connection, self._name)) is None:
            raise missing_publication(self._name)
        return publication

    def _change(self, change: Callable[[PublicationInfo], PublicationInfo]) -> PublicationInfo:
        """Change the publication and its comment in one transaction. change: returns what the comment shall say."""
        connection = self._connection
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
            # One writer of the comment at a time.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (self._name,))
            publication = change(self.read())
            listed = published_tables(connection, self._name)
            added = {table_id: ts for table_id, ts in publication.added.items() if table_id in listed}
            written = {row.xid for row in listed.values()} | {publication.row_xid}
            xids = (publication.xids & written) | {_own_xid(connection)}
            publication = replace(publication, added=added, xids=frozenset(xids))
            _comment(connection, publication)
        return self.read()

    def _failed(self, table_id: TableID, what: str, error: psycopg.Error) -> None:
        if is_connection_loss(error):
            raise error
        hint = ""
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            hint = f": make role {self._connection.info.user} a member of the role that owns it, or exclude the table"
        elif isinstance(error, psycopg.errors.LockNotAvailable):
            hint = f": {_holders(self._connection, table_id)}"
        self.problems[table_id] = f"{what} publication {self._name}: {error_text(error)}{hint}"


def _holders(connection: Connection, table_id: TableID) -> str:
    """Return who holds locks on the table that a publication has to wait for."""
    query = (
        "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'relation' AND relation = %s::oid AND granted AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND mode NOT IN ('AccessShareLock', 'RowShareLock') AND pid <> pg_backend_pid() ORDER BY pid LIMIT 5"
    )
    pids = [str(row[0]) for row in connection.execute(query, (table_id,)) if row[0] is not None]
    return f"locked by process {', '.join(pids)} of the source" if pids else "locked at the source for a moment"


def _flags(rules: PublicationRules) -> dict[str, bool | str]:
    """Return the columns of pg_publication that must have these values, if the version has them."""
    operations = {f"pub{name}": name in rules.operations for name in OPERATIONS}
    return {"puballtables": False, "pubviaroot": rules.by_root, **operations, "pubgencols": "s" if rules.generated else "n"}


def _clause(connection: Connection, rules: PublicationRules) -> str:
    by_root = "true" if rules.by_root else "false"
    text = f"publish = '{', '.join(rules.operations)}', publish_via_partition_root = {by_root}"
    if connection.info.server_version >= GENERATED_VERSION:
        text += f", publish_generated_columns = {'stored' if rules.generated else 'none'}"
    return text


def _own_xid(connection: Connection) -> str:
    """Return the id of the open transaction, as xmin has it."""
    return str(fetch_value(connection, "SELECT pg_current_xact_id()::xid::text"))


def _position(connection: Connection) -> Ts:
    position: Ts = fetch_value(connection, "SELECT pg_current_wal_insert_lsn()")
    return position


def _list(tables: Sequence[SourceTable]) -> str:
    return ", ".join(f"ONLY {table.quoted}" for table in tables)


def _comment(connection: Connection, publication: PublicationInfo) -> None:
    """Write the comment that `read_publication` reads."""
    comment: dict[str, object] = {
        "tablewire": 1,
        "incarnation": publication.incarnation,
        "created_lsn": format_lsn(publication.created_ts),
        "xids": sorted(publication.xids),
    }
    if publication.changed_ts:
        comment["changed_lsn"] = format_lsn(publication.changed_ts)
    if publication.added:
        comment["added"] = {str(table_id): format_lsn(ts) for table_id, ts in publication.added.items()}
    if publication.source:
        comment["source"] = dict(publication.source)
    if publication.withdrawn:
        comment["withdrawn"] = sorted(publication.withdrawn)
    connection.execute(sql.SQL("COMMENT ON PUBLICATION {} IS {}").format(sql.Identifier(publication.name), json.dumps(comment)))
