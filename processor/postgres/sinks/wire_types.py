"""Wire types: in which form the values of a source's column reach a PostgreSQL sink. Pure.

A **wire type** is a type of the sink that reads the bytes of the stream (or of a COPY of the source). If
the column has the same type at both ends (casts.py) and the values are binary, that is the type of the
sink's column itself, so nothing is converted; otherwise text or the source's built-in type, and the
value is cast. Values of types without a portable binary form come from a text stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from processor.postgres.sinks.casts import are_same, is_lossless
from processor.postgres.source.types import TypeInfo, Types, base_of, is_fixed, streams_in_binary
from tablewire.errors import OperatingError
from tablewire.postgres.connections import quoted

TEXT_OID = 25
TEXT_ARRAY_OID = 1009


class TextNeededError(OperatingError):
    """The values cannot be read in binary form: the table must be read from a text stream."""


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


@dataclass(frozen=True, slots=True)
class ColumnPair:
    """A column at both ends: (type, modifier), and the same as DDL, for messages."""

    table: str
    name: str
    source: tuple[int, int]
    source_text: str
    sink: tuple[int, int]
    sink_text: str


_TEXT = WireType(quoted("pg_catalog", "text"), TEXT_OID)
_READS_TEXT_BY_CAST = {"regclass": quoted("pg_catalog", "bpchar")}
"""A text that is cast to these runs a function that does not read all values. Through this type, their input function is used."""


def wire_of(pair: ColumnPair, source: Types, sink: Types, is_binary: bool) -> tuple[WireType, str]:
    """Return the wire type of a column in a stream, and what to cast it to: empty, or types joined by `::`.

    Raise OperatingError if the sink's column does not hold every value, TextNeededError if a binary
    stream cannot be used.
    """
    require_lossless(pair, source, sink)
    own = WireType(sink[pair.sink[0]].sql, pair.sink[0], is_element=_is_element(sink, pair.sink[0]))
    info = base_of(source, pair.source[0])
    is_same = are_same(source, pair.source[0], sink, pair.sink[0])
    if is_binary and info.sends_binary:
        if is_same and streams_in_binary(source, info.oid):
            return _patched(own, info, base_of(sink, own.oid)), ""
        if is_fixed(source, info.oid):
            return WireType(info.sql, info.oid, is_element=_is_element(source, info.oid)), own.sql
        if (labels := _labels(source, info)) is not None:
            return labels, "" if own.oid == labels.oid else own.sql
        text = f"column {pair.name} has type {info.name}, whose values the sink can only read as text; nothing was written"
        raise TextNeededError(f"table {pair.table}: {text}, and the table is read as text as soon as it is added again")
    if own.oid == TEXT_OID and not is_fixed(source, info.oid):
        return _TEXT, ""
    if not is_same and is_fixed(source, info.oid) and info.oid != TEXT_OID:
        return _TEXT, f"{info.sql}::{own.sql}"  # as a binary value would be cast
    below = base_of(sink, own.oid)
    if below.is_stable and below.name in _READS_TEXT_BY_CAST:
        steps = [_READS_TEXT_BY_CAST[below.name], below.sql, *([own.sql] if own.oid != below.oid else [])]
        return _TEXT, "::".join(steps)
    return _TEXT, "" if own.oid == TEXT_OID else own.sql


def copy_wire_of(pair: ColumnPair, source: Types, sink: Types) -> tuple[WireType, str]:
    """Return the same for a first copy, whose format only decides whether input or receive functions read the values."""
    require_lossless(pair, source, sink)
    own = WireType(sink[pair.sink[0]].sql, pair.sink[0])
    info = base_of(source, pair.source[0])
    if are_same(source, pair.source[0], sink, pair.sink[0]) or not is_fixed(source, info.oid):
        return own, ""
    return WireType(info.sql, info.oid), own.sql


def require_lossless(pair: ColumnPair, source: Types, sink: Types) -> None:
    """Raise OperatingError, with the way out, if the sink's column does not hold every value of the source's."""
    if not is_lossless(source, pair.source, sink, pair.sink):
        where = f"table {pair.table}: column {pair.name} has type {pair.source_text}"
        if pair.source_text == pair.sink_text:
            raise OperatingError(f"{where}, but its fields or its base type are others at the sink: make the type the same there")
        raise OperatingError(
            f"{where} at the source and {pair.sink_text} at the sink, which does not hold every value of it: at the sink,"
            f" ALTER TABLE {pair.table} ALTER COLUMN {quoted(pair.name)} TYPE {pair.source_text}"
        )


def _patched(own: WireType, info: TypeInfo, below: TypeInfo) -> WireType:
    """Return the wire type of the sink's column; array values get the id of its element type."""
    if not info.element_oid or info.element_oid == below.element_oid:
        return own
    return WireType(own.sql, own.oid, below.element_oid.to_bytes(4, "big"), is_element=False)


def _labels(types: Types, info: TypeInfo) -> WireType | None:
    """Return the wire type of an enum or an array of one as text: the binary form of a label is its text."""
    if info.kind == "e":
        return _TEXT
    if info.element_oid and base_of(types, info.element_oid).kind == "e":
        return WireType(quoted("pg_catalog", "_text"), TEXT_ARRAY_OID, TEXT_OID.to_bytes(4, "big"), is_element=False)
    return None


def _is_element(types: Types, oid: int) -> bool:
    info = base_of(types, oid)
    return not info.element_oid and info.kind != "c" and types[oid].array_oid > 0
