"""The source's catalogue as the executor's threads read it: tables, the publication, and types.

One connection is shared by all threads. All calls block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from psycopg.rows import args_row

from processor.postgres.source import snapshots
from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import DEFAULT_RULES, PublicationRules, TableSchema, describe_table
from tablewire.postgres.connections import Connection, ReconnectingConnection
from tablewire.postgres.identity import database_identity
from tablewire.postgres.partition_trees import leaf_problems
from tablewire.postgres.publication import PublicationInfo, published_positions, read_publication
from tablewire.postgres.slots import read_slot

FIRST_USER_OID = 16384
"""Types with smaller ids are built in, and the same on every server."""
STATEMENT_TIMEOUT_MS = 15_000
CLIENT_TIMEOUT_S = 20.0
"""Longer than the timeout of the server: it only ends what a hanging server cannot."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A type of the source.

    kind: b(ase), e(num), d(omain), c(omposite), r(ange) or m(ultirange). element_oid: of an array, else
    0; base_oid: of a domain, else 0. has_user_fields: a composite with a field whose type is not built in.
    """

    oid: int
    schema: str
    name: str
    kind: str
    element_oid: int
    has_binary: bool
    base_oid: int
    has_user_fields: bool

    @property
    def is_builtin(self) -> bool:
        return self.oid < FIRST_USER_OID


def base_of(types: Mapping[int, TypeInfo], oid: int) -> TypeInfo:
    info = types[oid]
    while info.kind == "d" and info.base_oid in types:
        info = types[info.base_oid]
    return info


COPY_TEXT = "text"
COPY_TEXT_ARRAY = "text[]"


def copy_cast(types: Mapping[int, TypeInfo], oid: int, binary: bool) -> str:
    """Return the cast of a column in a COPY of the source, so that its binary form means the same everywhere.

    Empty: no cast. Enums become text, and arrays of user-defined types, whose binary form contains a
    type id, arrays of text.
    """
    info = base_of(types, oid)
    if not binary or not info.has_binary or info.kind == "e":
        return COPY_TEXT
    if info.element_oid and not types[info.element_oid].is_builtin:
        return COPY_TEXT_ARRAY
    return ""


class SourceCatalogue:
    """See the module."""

    def __init__(self, uri: str, publication: str, rules: PublicationRules = DEFAULT_RULES) -> None:
        self._publication = publication
        self.rules = rules
        self._connection = ReconnectingConnection(
            uri,
            application_name="tablewire catalogue",
            settings={"statement_timeout": STATEMENT_TIMEOUT_MS},
            limit_s=CLIENT_TIMEOUT_S,
        )
        self._types: dict[int, TypeInfo] = {}
        self._identity = ""

    def publication(self) -> PublicationInfo:
        if (found := self._run(lambda connection: read_publication(connection, self._publication))) is None:
            raise OperatingError(f"publication {self._publication} does not exist at the source: was the changefeed removed?")
        return found

    def slot_ts(self) -> Ts:
        """Return the position of the changefeed's slot, before which the source keeps nothing; 0 if there is no slot."""
        slot = self._run(lambda connection: read_slot(connection, self._publication))
        return 0 if slot is None else slot.confirmed_ts

    def identity(self) -> str:
        """Return what distinguishes the source's database from all others; read once."""
        if not self._identity:
            self._identity = self._run(database_identity)
        return self._identity

    def describe(self, table_id: TableID) -> TableSchema:
        """Return the current shape of a table; raise OperatingError if it cannot be replicated, with the reason."""
        if (schema := self._run(lambda connection: describe_table(connection, table_id, self.rules.generated))) is None:
            raise OperatingError(f"table {table_id} does not exist at the source")
        if schema.kind == "p":
            needs_identity = self.rules.needs_identity
            problems = self._run(lambda connection: leaf_problems(connection, [table_id], needs_identity))
            schema = replace(schema, leaf_problem=problems.get(table_id, ""))
        if problem := schema.why_unusable(self.rules):
            raise OperatingError(problem)
        return schema

    def published(self) -> Mapping[TableID, Ts]:
        """Return the tables that are published, with the position at which each was added (0: from the beginning).

        Raise OperatingError if the publication no longer exists, or was changed by hand.
        """
        return self._run(lambda connection: published_positions(connection, self._publication, self.rules))

    def types_with_parts(self, oids: Iterable[int]) -> Mapping[int, TypeInfo]:
        """Return these types, with the element types of arrays and the base types of domains.

        Raise OperatingError if one no longer exists.
        """
        found: dict[int, TypeInfo] = {}
        wanted = set(oids)
        while wanted:
            if missing := [oid for oid in wanted if oid not in self._types]:
                self._types.update(self._run(partial(_read_types, oids=missing)))
            for oid in wanted:
                if oid not in self._types:
                    raise OperatingError(f"type {oid} no longer exists at the source")
                found[oid] = self._types[oid]
            parts = {part for oid in wanted for part in (found[oid].element_oid, found[oid].base_oid) if part}
            wanted = parts - found.keys()
        return found

    def table_version(self, table_id: TableID) -> str:
        """Return the version of a table now; see `snapshots.table_version`."""
        return self._run(lambda connection: snapshots.table_version(connection, table_id))

    def lock_holder(self, table_id: TableID) -> str:
        return self._run(lambda connection: snapshots.lock_holder(connection, table_id))

    def awaited_transaction(self, pid: int) -> str:
        return self._run(lambda connection: snapshots.awaited_transaction(connection, pid))

    def close(self) -> None:
        self._connection.close()

    def _run(self, work: Callable[[Connection], _Result]) -> _Result:
        return self._connection.run("read the catalogue", work)


def _read_types(connection: Connection, oids: Sequence[int]) -> dict[int, TypeInfo]:
    query = (
        "SELECT t.oid::bigint, n.nspname, t.typname, t.typtype::text,"
        " CASE WHEN t.typcategory = 'A' THEN t.typelem::bigint ELSE 0 END, t.typsend <> 0, t.typbasetype::bigint,"
        " EXISTS (SELECT FROM pg_attribute a WHERE t.typrelid <> 0 AND a.attrelid = t.typrelid"
        f" AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= {FIRST_USER_OID})"
        " FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = ANY(%s::bigint[]::oid[])"
    )
    with connection.cursor(row_factory=args_row(TypeInfo)) as cursor:
        return {info.oid: info for info in cursor.execute(query, (list(oids),))}
