"""Types of a server's catalogue, and in which form their values can leave it. Pure, except for `read_types`.

The binary form of some types contains ids of their own server: the reg* types are ids of tables,
functions and so on, arrays hold the id of their element's type, and composites those of their fields.
Other types have no binary form at all; an array, a composite or a range of them has one by name, but
the server fails when it is used. So the text form of such values is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from psycopg.rows import args_row

from tablewire.postgres.connections import Connection, quoted

FIRST_UNSTABLE_OID = 10_000
"""Types with smaller ids are the same on every server of every version; those of information_schema are not."""
_HOLD_IDS = frozenset(
    {
        "regclass",
        "regcollation",
        "regconfig",
        "regdatabase",
        "regdictionary",
        "regnamespace",
        "regoper",
        "regoperator",
        "regproc",
        "regprocedure",
        "regrole",
        "regtype",
    }
)
_INEXACT = frozenset({"oidvector", "int2vector", "tsquery"})
"""The receive functions of vectors reject an empty one; that of tsquery makes another image of an equal value than its input
function does, so rows that are found as a whole would not be found."""


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A type of one server.

    kind: b(ase), e(num), d(omain), c(omposite), r(ange) or m(ultirange). element_oid: of an array, else
    0; array_oid: of the array type over this one. sends_binary: a binary stream contains its binary form;
    has_binary: which can also be read. base_oid, base_modifier: of a domain, else 0 and -1. fields: (name,
    type, modifier) of a composite. part_oid: of a range its subtype, of a multirange its range, else 0.
    """

    oid: int
    schema: str
    name: str
    kind: str
    element_oid: int
    array_oid: int
    sends_binary: bool
    has_binary: bool
    base_oid: int
    base_modifier: int
    fields: tuple[tuple[str, int, int], ...]
    part_oid: int

    @property
    def is_stable(self) -> bool:
        return self.oid < FIRST_UNSTABLE_OID

    @property
    def sql(self) -> str:
        return quoted(self.schema, self.name)

    @property
    def parts(self) -> tuple[int, ...]:
        """The types that this one consists of."""
        found = (self.element_oid, self.base_oid, self.part_oid, *(type_oid for _, type_oid, _ in self.fields))
        return tuple(oid for oid in found if oid)


Types = Mapping[int, TypeInfo]


def base_of(types: Types, oid: int) -> TypeInfo:
    """Return the type below all domains."""
    info = types[oid]
    while info.kind == "d":
        info = types[info.base_oid]
    return info


def modifier_of(types: Types, oid: int, modifier: int) -> int:
    """Return the modifier of a column's values, which a domain may define; -1 if there is none."""
    info = types[oid]
    while info.kind == "d" and modifier < 0:
        modifier = info.base_modifier
        info = types[info.base_oid]
    return modifier


def has_no_ids(types: Types, oid: int) -> bool:
    """Return whether the type has a binary form that contains no id of its server."""
    info = base_of(types, oid)
    if not info.has_binary or (info.is_stable and info.name in _HOLD_IDS):
        return False
    if info.element_oid:
        return types[info.element_oid].is_stable and has_no_ids(types, info.element_oid)
    if info.kind == "c":
        return all(types[part].is_stable and has_no_ids(types, part) for part in info.parts)
    return all(has_no_ids(types, part) for part in info.parts)


def is_fixed(types: Types, oid: int) -> bool:
    """Return whether each server reads the binary form of this type in the same way."""
    return base_of(types, oid).is_stable and has_no_ids(types, oid)


def streams_in_binary(types: Types, oid: int) -> bool:
    """Return whether a sink that has this type can read its values in a binary stream.

    Types without a binary form are sent as text there. In an array, the id of the element's type can be
    replaced.
    """
    info = base_of(types, oid)
    if not info.sends_binary or has_no_ids(types, oid):
        return True
    if not info.element_oid:
        return False
    element = base_of(types, info.element_oid)
    return not element.element_oid and has_no_ids(types, element.oid)


def needs_text(types: Types, oids: Iterable[int]) -> bool:
    """Return whether a table with columns of these types must be read from a text stream."""
    return not all(streams_in_binary(types, oid) and _is_exact(types, oid) for oid in oids)


def copies_in_binary(types: Types, oids: Iterable[int]) -> bool:
    """Return whether a first copy of columns of these types may have the binary format."""
    return all(is_fixed(types, oid) and _is_exact(types, oid) for oid in oids)


def _is_exact(types: Types, oid: int) -> bool:
    """Return whether the type consists of none of _INEXACT, which are read as text where that is known from the beginning."""
    info = types[oid]
    return not (info.is_stable and info.name in _INEXACT) and all(_is_exact(types, part) for part in info.parts)


_TYPES = """
SELECT t.oid::bigint, n.nspname, t.typname, t.typtype::text, CASE e.typarray WHEN t.oid THEN t.typelem::bigint ELSE 0 END,
       t.typarray::bigint, t.typsend <> 0, t.typsend <> 0 AND t.typreceive <> 0, t.typbasetype::bigint, t.typtypmod,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a WHERE {fields}),
       ARRAY(SELECT a.atttypid::bigint FROM pg_catalog.pg_attribute a WHERE {fields}),
       ARRAY(SELECT a.atttypmod FROM pg_catalog.pg_attribute a WHERE {fields}),
       coalesce(CASE t.typtype WHEN 'r' THEN r.rngsubtype WHEN 'm' THEN r.rngtypid END, 0)::bigint
  FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
  LEFT JOIN pg_catalog.pg_type e ON e.oid = t.typelem
  LEFT JOIN pg_catalog.pg_range r ON t.oid IN (r.rngtypid, r.rngmultitypid)
 WHERE t.oid = ANY(%s::bigint[]::oid[])""".format(
    fields="t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"
)


def read_types(connection: Connection, oids: Sequence[int]) -> dict[int, TypeInfo]:
    """Return those of these types that exist."""

    def info(*values: object) -> TypeInfo:
        *before, names, type_oids, modifiers, part_oid = values
        fields = tuple(zip(names, type_oids, modifiers, strict=True))  # type: ignore[call-overload]
        return TypeInfo(*before, fields, part_oid)  # type: ignore[call-arg,arg-type]

    with connection.cursor(row_factory=args_row(info)) as cursor:
        return {found.oid: found for found in cursor.execute(_TYPES, (list(oids),))}


def types_with_parts(connection: Connection, oids: Iterable[int]) -> dict[int, TypeInfo]:
    """Return those of these types that exist, and all that they consist of."""
    found: dict[int, TypeInfo] = {}
    wanted = set(oids)
    while wanted:
        read = read_types(connection, sorted(wanted))
        found.update(read)
        wanted = {part for info in read.values() for part in info.parts} - found.keys()
    return found
