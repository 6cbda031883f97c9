"""Which differences between the types of a column at both ends lose nothing. Pure.

Two types are **the same** if they are the same built-in type, or of the same name and structure,
whatever their schemas are: an extension may be installed elsewhere at the sink. A value may be cast to
another type only if that type holds every value of the source's: anything else would be a silent
difference. Modifiers count: a character varying(10) does not fit into a character varying(5).
"""

from __future__ import annotations

from processor.postgres.source.types import TypeInfo, Types, base_of, modifier_of

_TEXTS = ("text", "varchar", "citext")
_WHOLE_DIGITS = {"int2": 5, "int4": 10, "int8": 19}
WIDER: dict[str, tuple[str, ...]] = {
    "int2": ("int4", "int8", "float4", "float8"),
    "int4": ("int8", "float8"),
    "oid": ("int8",),
    "float4": ("float8",),
    "date": ("timestamp",),
    "cidr": ("inet",),
    "jsonb": ("json",),
}
"""Built-in types, without modifiers; what depends on them is below."""
_PRECISION_MAX = 6
_ALL_FIELDS = 0x7FFF
_LENGTH_HEADER = 4
_TEXT_LENGTHS = {"name": 63, "uuid": 36, "int2": 6, "int4": 11, "int8": 20, "bool": 5}


def are_same(source: Types, source_oid: int, sink: Types, sink_oid: int) -> bool:
    """Return whether two types are the same, except for modifiers."""
    one, other = base_of(source, source_oid), base_of(sink, sink_oid)
    if one.oid == other.oid and one.is_stable:
        return True
    if one.element_oid and other.element_oid:
        return not (one.is_stable and other.is_stable) and are_same(source, one.element_oid, sink, other.element_oid)
    if one.is_stable or other.is_stable or one.kind != other.kind or len(one.parts) != len(other.parts):
        return False
    if one.kind == "e":
        return True  # labels are compared when they are written
    if not one.parts:
        return one.name == other.name
    if [name for name, _, _ in one.fields] != [name for name, _, _ in other.fields]:
        return False
    if any(
        not fits(source, first, first_modifier, second_modifier)
        for (_, first, first_modifier), (_, _, second_modifier) in zip(one.fields, other.fields, strict=True)
    ):
        return False
    return all(are_same(source, first, sink, second) for first, second in zip(one.parts, other.parts, strict=True))


def is_lossless(source: Types, source_column: tuple[int, int], sink: Types, sink_column: tuple[int, int]) -> bool:
    """Return whether the sink's column holds every value of the source's. Columns: (type, modifier)."""
    source_oid, sink_oid = source_column[0], sink_column[0]
    before, after = modifier_of(source, *source_column), modifier_of(sink, *sink_column)
    if are_same(source, source_oid, sink, sink_oid):
        return fits(source, source_oid, before, after)
    one, other = base_of(source, source_oid), base_of(sink, sink_oid)
    if one.element_oid and other.element_oid:
        return is_lossless(source, (one.element_oid, before), sink, (other.element_oid, after))
    return _is_wider(one, before, other, after)


def fits(types: Types, oid: int, before: int, after: int) -> bool:
    """Return whether each value of a type with the modifier `before` is one with the modifier `after`."""
    if after in (-1, before):
        return True
    info = base_of(types, oid)
    name = base_of(types, info.element_oid).name if info.element_oid else info.name
    if name in ("varchar", "bpchar", "varbit"):
        return -1 < before <= after
    if name in ("timestamp", "timestamptz", "time", "timetz"):
        return (_PRECISION_MAX if before < 0 else before) <= after
    if name == "interval":
        (part, precision), (wider_part, wider_precision) = _interval(before), _interval(after)
        return wider_part in (part, _ALL_FIELDS) and precision <= wider_precision
    if name == "numeric" and before >= 0:
        (precision, scale), (wider_precision, wider_scale) = _numeric(before), _numeric(after)
        return scale <= wider_scale and precision - scale <= wider_precision - wider_scale
    return False


def _is_wider(one: TypeInfo, before: int, other: TypeInfo, after: int) -> bool:
    """Return whether another type holds every value, as its own value or as the text of it."""
    if other.name in _TEXTS:
        return after < 0 or 0 <= _text_length(one, before) <= after - _LENGTH_HEADER
    if not (one.is_stable and other.is_stable):
        return False
    if other.name == "numeric" and one.name in _WHOLE_DIGITS:
        precision, scale = _numeric(after)
        return after < 0 or precision - scale >= _WHOLE_DIGITS[one.name]
    if one.name == "numeric" and before >= 0 and other.name in _WHOLE_DIGITS:
        precision, scale = _numeric(before)
        return scale <= 0 and precision - scale < _WHOLE_DIGITS[other.name]
    if one.name == "bit" and other.name == "varbit":
        return after < 0 or before <= after
    if one.name == "date" and other.name == "timestamp":
        return True
    return after < 0 and other.name in WIDER.get(one.name, ())


def _text_length(info: TypeInfo, modifier: int) -> int:
    """Return how many characters the text of a value has at most; -1 if that is not limited."""
    if info.name in ("varchar", "bpchar") and modifier >= 0:
        return modifier - _LENGTH_HEADER
    return _TEXT_LENGTHS.get(info.name, -1) if info.is_stable else -1


def _numeric(modifier: int) -> tuple[int, int]:
    """Return (precision, scale); the scale has 11 bits with a sign since PostgreSQL 15."""
    packed = modifier - _LENGTH_HEADER
    return (packed >> 16) & 0xFFFF, ((packed & 0x7FF) ^ 1024) - 1024


def _interval(modifier: int) -> tuple[int, int]:
    """Return (fields, precision); all fields and the greatest precision without a modifier."""
    if modifier < 0:
        return _ALL_FIELDS, _PRECISION_MAX
    return (modifier >> 16) & _ALL_FIELDS, min(modifier & 0xFFFF, _PRECISION_MAX)
