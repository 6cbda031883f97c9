"""The source's catalogue as the executor's threads read it: shapes of tables and what their types are called.

One connection, shared under a lock; opened when it is needed and again after it broke. Any thread; blocking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import TableSchema, describe_table, identity_problem
from tablewire.postgres.connections import (
    Connection,
    ReconnectingConnection,
    SourceUnavailableError,
    server_name,
)
from tablewire.postgres.slots import PublicationInfo, published_tables, read_publication, read_slot

FIRST_USER_OID = 16384
"""Types below are the server's own and have the same id on every server."""
STATEMENT_TIMEOUT_MS = 15_000
CLIENT_TIMEOUT_S = 20.0
"""Longer than the server's own limit: only a server that does not keep it is given up by this."""
CLOSE_TIMEOUT_S = 1.0

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A type of the source. kind: b(ase), e(num), d(omain), c(omposite), r(ange), m(ultirange). element_oid: 0 = not an array;
    base_oid: of a domain, else 0. has_user_fields: a composite with a field whose type is not the server's own."""

    oid: int
    schema: str
    name: str
    kind: str
    element_oid: int
    has_binary: bool
    base_oid: int = 0
    has_user_fields: bool = False

    @property
    def is_builtin(self) -> bool:
        return self.oid < FIRST_USER_OID


def base_of(types: Mapping[int, TypeInfo], oid: int) -> TypeInfo:
    """The type itself, or what a domain stands on."""
    info = types[oid]
    while info.kind == "d" and info.base_oid in types:
        info = types[info.base_oid]
    return info


COPY_TEXT = "text"
COPY_TEXT_ARRAY = "text[]"


def copy_cast(types: Mapping[int, TypeInfo], oid: int, binary: bool) -> str:
    """What a column is cast to when it is copied from the source, so that its binary form means the same everywhere; empty = it
    stays as it is. Enums become text, and arrays of user-defined types (whose binary form names a type id) arrays of text."""
    info = base_of(types, oid)
    if not binary or not info.has_binary or info.kind == "e":
        return COPY_TEXT
    if info.element_oid and not types[info.element_oid].is_builtin:
        return COPY_TEXT_ARRAY
    return ""


class SourceCatalogue:
    """See the module."""

    def __init__(self, uri: str, publication: str) -> None:
        self._uri = uri
        self._publication = publication
        self._lock = threading.Lock()
        self._connection = ReconnectingConnection(
            uri, application_name="tablewire catalogue", set_up=self._set_up, limit_s=CLIENT_TIMEOUT_S
        )
        self._is_closed = threading.Event()
        self._types: dict[int, TypeInfo] = {}

    def publication(self) -> PublicationInfo:
        """The changefeed's publication; OperatingError when it is gone."""
        found = self._run(lambda connection: read_publication(connection, self._publication))
        if found is None:
            raise OperatingError(f"publication {self._publication} does not exist at the source: was the changefeed removed?")
        return found

    def slot_ts(self) -> Ts:
        """Where the changefeed's slot stands: the source has let go of everything before; 0 when there is no slot."""
        slot = self._run(lambda connection: read_slot(connection, self._publication))
        return 0 if slot is None else slot.confirmed_ts

    def describe(self, table_id: TableID) -> TableSchema:
        """The shape of a table now; OperatingError when it cannot be replicated, with the reason."""
        schema = self._run(lambda connection: describe_table(connection, table_id))
        if schema is None:
            raise OperatingError(f"table {table_id} does not exist at the source")
        problem = identity_problem(schema.full_name, schema.replica_identity, schema.usable_key)
        if problem:
            raise OperatingError(problem)
        return schema

    def published(self) -> Mapping[TableID, Ts]:
        """The tables that the publication lists, each with the position at which it was added (0: from the beginning);
        OperatingError when the publication is gone."""
        added = self.publication().added
        listed = self._run(lambda connection: published_tables(connection, self._publication))
        return {table_id: added.get(table_id, 0) for table_id in listed}

    def types(self, oids: Sequence[int]) -> dict[int, TypeInfo]:
        """What these types are; OperatingError when one is gone."""
        missing = [oid for oid in oids if oid not in self._types]
        if missing:
            for info in self._run(lambda connection: _read_types(connection, missing)):
                self._types[info.oid] = info
        unknown = [oid for oid in oids if oid not in self._types]
        if unknown:
            raise OperatingError(f"the source has no type with id {unknown[0]} any more")
        return {oid: self._types[oid] for oid in oids}

    def types_with_parts(self, oids: Sequence[int]) -> Mapping[int, TypeInfo]:
        """These types, with the elements of arrays and the bases of domains."""
        found: dict[int, TypeInfo] = {}
        wanted = sorted(set(oids))
        while wanted:
            found.update(self.types(wanted))
            parts = {part for oid in wanted for part in (found[oid].element_oid, found[oid].base_oid) if part}
            wanted = sorted(parts - found.keys())
        return found

    def close(self) -> None:
        """For good. A query that is under way is cut off after a moment; a thread that is just connecting ends by itself."""
        self._is_closed.set()
        if not self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
            self._connection.cut()
            if not self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
                return
        try:
            self._connection.close()
        finally:
            self._lock.release()

    def _run(self, work: Callable[[Connection], _Answer]) -> _Answer:
        with self._lock:
            if self._is_closed.is_set():
                raise SourceUnavailableError(f"{server_name(self._uri)}: the executor is closing")
            try:
                return self._connection.run("read the catalogue", work)
            finally:
                if self._is_closed.is_set():
                    self._connection.close()

    def _set_up(self, connection: Connection) -> None:
        if self._is_closed.is_set():
            raise SourceUnavailableError(f"{server_name(self._uri)}: the executor is closing")
        # With an empty path, format_type qualifies every type that is not the server's own.
        connection.execute(f"SET search_path = ''; SET statement_timeout = {STATEMENT_TIMEOUT_MS}".encode())


def _read_types(connection: Connection, oids: Sequence[int]) -> list[TypeInfo]:
    query = (
        "SELECT t.oid::bigint, n.nspname, t.typname, t.typtype,"
        " CASE WHEN t.typcategory = 'A' THEN t.typelem::bigint ELSE 0 END, t.typsend <> 0, t.typbasetype::bigint,"
        " EXISTS (SELECT FROM pg_attribute a WHERE t.typrelid <> 0 AND a.attrelid = t.typrelid"
        f" AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= {FIRST_USER_OID})"
        " FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = ANY(%s::bigint[]::oid[])"
    )
    found = []
    for row in connection.execute(query.encode(), (list(oids),)):
        oid, schema, name, kind, element, has_binary, base, has_user_fields = row
        found.append(
            TypeInfo(
                oid=int(str(oid)),
                schema=str(schema),
                name=str(name),
                kind=kind.decode() if isinstance(kind, bytes) else str(kind),
                element_oid=int(str(element)),
                has_binary=bool(has_binary),
                base_oid=int(str(base)),
                has_user_fields=bool(has_user_fields),
            )
        )
    return found
