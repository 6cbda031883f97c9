"""The source's catalogue as the executor's threads read it: tables, the publication, and types.

One connection is shared by all threads. All calls block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import psycopg

from processor.postgres.source import snapshots
from processor.postgres.source.types import FIRST_UNSTABLE_OID, TypeInfo, Types, copies_in_binary, needs_text, types_with_parts
from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import DEFAULT_RULES, PublicationRules, TableSchema, describe_table
from tablewire.postgres.connections import Connection, ReconnectingConnection, fetch_value
from tablewire.postgres.identity import database_identity
from tablewire.postgres.partition_trees import leaf_problems
from tablewire.postgres.publication import PublicationInfo, published_positions, read_publication
from tablewire.postgres.servers import read_server, require_primary
from tablewire.postgres.slots import read_slot

STATEMENT_TIMEOUT_MS = 15_000
LOCK_TIMEOUT_MS = 200
"""Reading the bound of a partition locks it: another session may hold it for long."""
CLIENT_TIMEOUT_S = 20.0
"""Longer than the timeout of the server: it only ends what a hanging server cannot."""

_Result = TypeVar("_Result")


class TypeGoneError(OperatingError):
    """A type was dropped at the source."""


class SourceCatalogue:
    """See the module."""

    def __init__(self, uri: str, publication: str, rules: PublicationRules = DEFAULT_RULES) -> None:
        self._publication = publication
        self.rules = rules
        self._connection = ReconnectingConnection(
            uri,
            application_name="tablewire catalogue",
            settings={"statement_timeout": STATEMENT_TIMEOUT_MS, "lock_timeout": LOCK_TIMEOUT_MS},
            limit_s=CLIENT_TIMEOUT_S,
        )
        self._builtin: dict[int, TypeInfo] = {}
        """Types that are the same everywhere, with their parts. Others may change."""
        self._identity = ""

    def publication(self) -> PublicationInfo:
        if (found := self.run(lambda connection: read_publication(connection, self._publication))) is None:
            raise OperatingError(f"publication {self._publication} does not exist at the source: was the changefeed removed?")
        return found

    def server(self) -> tuple[int, int]:
        """Return the system identifier and the timeline; raise SourceUnavailableError if the server is a standby."""

        def read(connection: Connection) -> tuple[int, int]:
            require_primary(connection)
            found = read_server(connection)
            return found.system, found.timeline

        return self.run(read)

    def slot_ts(self) -> Ts:
        """Return the position of the changefeed's slot, before which the source keeps nothing; 0 if there is no slot."""
        slot = self.run(lambda connection: read_slot(connection, self._publication))
        return 0 if slot is None else slot.confirmed_ts

    def identity(self) -> str:
        """Return what distinguishes the source's database from all others; read once."""
        if not self._identity:
            self._identity = self.run(database_identity)
        return self._identity

    def describe(self, table_id: TableID) -> TableSchema:
        """Return the current shape of a table; raise OperatingError if it cannot be replicated, with the reason."""
        if (schema := self.run(lambda connection: self._describe(connection, table_id))) is None:
            raise OperatingError(f"table {table_id} does not exist at the source")
        if schema.kind == "p":
            needs_identity = self.rules.needs_identity
            problems = self.run(lambda connection: leaf_problems(connection, [table_id], needs_identity))
            schema = replace(schema, leaf_problem=problems.get(table_id, ""))
        if problem := schema.why_unusable(self.rules):
            raise OperatingError(problem)
        return schema

    def published(self) -> Mapping[TableID, Ts]:
        """Return the tables that are published, with the position at which each was added (0: from the beginning).

        Raise OperatingError if the publication no longer exists, or was changed by hand.
        """
        return self.run(lambda connection: published_positions(connection, self._publication, self.rules))

    def require_published(self, schema: TableSchema) -> None:
        """Raise OperatingError unless all changes of the table have been published since it was described."""
        published = self.run(lambda connection: published_positions(connection, self._publication, self.rules, schema.table_id))
        if published.get(schema.table_id) != schema.published_ts:
            raise self.unpublished(schema)

    def unpublished(self, schema: TableSchema) -> OperatingError:
        return OperatingError(
            f"table {schema.full_name}: it left publication {self._publication}, or was changed there by hand: "
            "changes may be missing"
        )

    def types_with_parts(self, oids: Iterable[int]) -> Types:
        """Return these types and all that they consist of; raise OperatingError if one no longer exists."""
        wanted = set(oids)
        if all(oid in self._builtin for oid in wanted):
            return self._builtin
        found = self.run(lambda connection: types_with_parts(connection, wanted))
        if missing := wanted - found.keys():
            raise TypeGoneError(f"type {min(missing)} no longer exists at the source")
        for oid, info in found.items():
            if max(oid, *info.parts, 0) < FIRST_UNSTABLE_OID:
                self._builtin[oid] = info
        return found

    def needs_text(self, schema: TableSchema) -> bool:
        """Return whether the table must be read from a text stream."""
        oids = [column.type_oid for column in schema.columns]
        return needs_text(self.types_with_parts(oids), oids)

    def copies_in_binary(self, schema: TableSchema) -> bool:
        """Return whether a first copy of the table may have the binary format."""
        oids = [column.type_oid for column in schema.columns]
        return copies_in_binary(self.types_with_parts(oids), oids)

    def _describe(self, connection: Connection, table_id: TableID) -> TableSchema | None:
        try:
            return describe_table(connection, table_id, self.rules.generated)
        except psycopg.errors.LockNotAvailable:
            name = fetch_value(connection, "SELECT %s::bigint::regclass::text", (table_id,))
            holder = snapshots.lock_holder(connection, table_id) or "another process"
            raise OperatingError(
                f"table {name} cannot be described while {holder} locks it (or its parent) at the source"
            ) from None

    def table_version(self, table_id: TableID) -> str:
        """Return the version of a table now; see `snapshots.table_version`."""
        return self.run(lambda connection: snapshots.table_version(connection, table_id))

    def lock_holder(self, table_id: TableID) -> str:
        return self.run(lambda connection: snapshots.lock_holder(connection, table_id))

    def awaited_transaction(self, pid: int) -> str:
        return self.run(lambda connection: snapshots.awaited_transaction(connection, pid))

    def close(self) -> None:
        self._connection.close()

    def run(self, work: Callable[[Connection], _Result]) -> _Result:
        """Return work(connection); raise SourceUnavailableError if the source is unreachable."""
        return self._connection.run("read the catalogue", work)
