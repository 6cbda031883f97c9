"""Wire types: in which form the values of a source's column reach a PostgreSQL sink.

A **wire type** is a type of the sink that reads the bytes of the stream (or of a COPY of the source):
the source's own type if it is built in or exists at the sink under the same name; text for enums, for
types without a binary form, and for everything if the changefeed does not use binary values. A column
whose type differs from its wire type is cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from processor.postgres.sinks.connection import SinkConnection
from processor.postgres.source.catalogue import COPY_TEXT, COPY_TEXT_ARRAY, TypeInfo, base_of, copy_cast
from tablewire.errors import OperatingError
from tablewire.postgres.connections import quoted

TEXT_OID = 25
TEXT_ARRAY_OID = 1009


@dataclass(frozen=True, slots=True)
class WireType:
    """A type that reads wire values.

    sql: its name at the sink. patch: the id that array values must carry for their element type, None
    if they are right. is_element: values fit into an array, from which unnest returns one column.
    """

    sql: str
    oid: int
    patch: bytes | None = None
    is_element: bool = True


_TEXT = WireType(quoted("pg_catalog", "text"), TEXT_OID)
_TEXT_ARRAY = WireType(f"{_TEXT.sql}[]", TEXT_ARRAY_OID, is_element=False)


class WireTypes:
    """The wire types of one table's columns. types: of the source, by id."""

    def __init__(self, connection: SinkConnection, full_name: str, types: Mapping[int, TypeInfo], binary: bool) -> None:
        self._connection = connection
        self._full_name = full_name
        self._types = types
        self._binary = binary

    def of(self, column: str, oid: int, is_copy: bool) -> WireType:
        """Return the wire type of a column in the stream, or in a COPY of the source."""
        info = base_of(self._types, oid)
        cast = copy_cast(self._types, oid, self._binary)
        if cast == COPY_TEXT:
            return _TEXT
        if cast == COPY_TEXT_ARRAY:
            return _TEXT_ARRAY if is_copy else self._of_array(column, base_of(self._types, info.element_oid))
        name = quoted(info.schema, info.name)
        if info.is_builtin:
            return WireType(name, info.oid, is_element=not info.element_oid)
        if info.kind == "c" and info.has_user_fields:
            raise OperatingError(
                f"table {self._full_name}: column {column} has type {info.name}, a composite of user-defined types, whose binary"
                " form holds the source's type ids; create the changefeed with the source option binary=false"
            )
        return WireType(name, self._sink_ids(column, name)[0], is_element=info.kind != "c")

    def _of_array(self, column: str, element: TypeInfo) -> WireType:
        """Return the type of an array; its binary form contains the id of the element's type, which must be replaced."""
        if element.kind == "e" or not element.has_binary:
            return WireType(_TEXT_ARRAY.sql, TEXT_ARRAY_OID, TEXT_OID.to_bytes(4, "big"), is_element=False)
        if element.kind == "c":
            raise OperatingError(
                f"table {self._full_name}: column {column} is an array of the composite type {element.name}; "
                "create the changefeed with the source option binary=false"
            )
        name = quoted(element.schema, element.name)
        oid, array_oid = self._sink_ids(column, name)
        return WireType(f"{name}[]", array_oid, oid.to_bytes(4, "big"), is_element=False)

    def _sink_ids(self, column: str, name: str) -> tuple[int, int]:
        """Return the ids at the sink of a type and of its array type."""
        query = "SELECT oid::int8, typarray::int8 FROM pg_catalog.pg_type WHERE oid = to_regtype(%s)"
        for oid, array_oid in self._connection.query(query, (name,)):
            return oid, array_oid
        raise OperatingError(
            f"table {self._full_name}: column {column} has type {name}, which the sink does not have; create it there"
        )
