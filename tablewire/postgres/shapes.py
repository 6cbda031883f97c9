"""The shape of a source's table, and what a change of it means for a table at the sink that follows it. Pure.

**Invariant: rows at the sink equal those of the source after a decision other than CopyAgain, if they
did before.** A decision compares three things:

 - applied: the shape that the sink's table has followed;
 - current: what the catalogue of the source says now, after the rows in question were committed;
 - seen: the columns of those rows as the stream describes them. It has names and types, but no attnums.

The catalogue keeps a trace of all that changes the contents of rows without a change in the stream: a
rewrite gives the table another file and the altered column another version (pg_attribute.xmin), a column
that is added gets a new attnum, and the attnum of a dropped one is never used again. What leaves no trace
changes no contents. VACUUM FULL, CLUSTER and TRUNCATE change the file and no version; SET NOT NULL,
DEFAULT, STATISTICS and STORAGE change a version and not the file.

The table may have changed several times between the rows and the catalogue. `_shape_of_rows` derives the
shape in between only where no other one fits: without dropped columns, the columns of the stream are the
first ones of the catalogue; without new ones, they are all of the applied or all of the current shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from tablewire.postgres import partition_trees
from tablewire.postgres.partition_trees import Partition

TypeDefinition: TypeAlias = "tuple[tuple[int, str], ...]"
"""Of an enum: (oid, label) of each value; of a composite: (attnum, type and modifier) of each field."""

_WIDENS = frozenset({(25, 1043), (1043, 25)})
"""Pairs of types (text and varchar) whose values stay the same, byte for byte, if no rewrite was needed."""


@dataclass(frozen=True, slots=True)
class ColumnShape:
    """A column. version: changes with any ALTER COLUMN. missing_text: the value of rows that are older than the column; not
    a part of the identity, as a rewrite stores it in the rows."""

    attnum: int
    name: str
    type_oid: int
    type_modifier: int
    type_text: str
    generated: str
    identity: str
    version: str
    missing_text: str | None = field(default=None, compare=False)

    @property
    def type(self) -> tuple[int, int]:
        return self.type_oid, self.type_modifier


@dataclass(frozen=True, slots=True)
class TableShape:
    """A table. file: names its storage. attnums: how many columns it has had. key: attnums by which rows are identified.

    columns: ordered by attnum, without dropped ones. types: definitions of the user-defined types that
    its columns use. uniques: the attnums of each unique index; not a part of the identity. partitions: of
    a partitioned table, which has no file itself.
    """

    table_id: int
    schema: str
    name: str
    file: str
    attnums: int
    replica_identity: str
    key: tuple[int, ...]
    columns: tuple[ColumnShape, ...]
    types: Mapping[int, TypeDefinition] = field(default_factory=dict)
    uniques: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    partitions: tuple[Partition, ...] = ()

    def column(self, attnum: int) -> ColumnShape | None:
        return next((column for column in self.columns if column.attnum == attnum), None)

    def named(self, name: str) -> ColumnShape | None:
        return next((column for column in self.columns if column.name == name), None)

    def names(self, attnums: Sequence[int]) -> tuple[str, ...]:
        by_attnum = {column.attnum: column.name for column in self.columns}
        return tuple(by_attnum[attnum] for attnum in attnums if attnum in by_attnum)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["columns"] = [{key: value for key, value in column.items() if key != "missing_text"} for column in found["columns"]]
        del found["uniques"]
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TableShape:
        """Return the shape; raise KeyError or TypeError for one that another version stored."""
        types = {int(oid): tuple((int(number), str(text)) for number, text in parts) for oid, parts in found["types"].items()}
        columns = tuple(ColumnShape(**column) for column in found["columns"])
        partitions = tuple(Partition(**partition) for partition in found.get("partitions", ()))
        known = {"key": tuple(found["key"]), "columns": columns, "types": types, "partitions": partitions}
        return cls(**{**found, **known})


@dataclass(frozen=True, slots=True)
class SeenShape:
    """The columns of rows in the stream: (name, type, modifier) of each. key: names; None: whole old rows are sent."""

    columns: tuple[tuple[str, int, int], ...]
    key: frozenset[str] | None


# --- steps at the sink, in the order in which they are made


@dataclass(frozen=True, slots=True)
class DropColumn:
    name: str


@dataclass(frozen=True, slots=True)
class RenameColumn:
    name: str
    new_name: str


@dataclass(frozen=True, slots=True)
class AlterType:
    """Change a column's type, if the sink's column has the former one."""

    name: str
    former: str
    column: ColumnShape


@dataclass(frozen=True, slots=True)
class AddColumn:
    column: ColumnShape


@dataclass(frozen=True, slots=True)
class SetKey:
    """Have `names` identify rows. former: names of the former key as they are now. is_kept: it is still unique."""

    names: tuple[str, ...]
    former: tuple[str, ...]
    is_kept: bool


Step: TypeAlias = "DropColumn | RenameColumn | AlterType | AddColumn | SetKey"

# --- decisions


@dataclass(frozen=True, slots=True)
class Same:
    """The shape is the applied one."""


@dataclass(frozen=True, slots=True)
class Later:
    """The rows have the applied shape; the table changed after them."""


@dataclass(frozen=True, slots=True)
class Follow:
    """The steps that lead to `shape`, which the rows have; none if only what does not matter to rows has changed."""

    steps: tuple[Step, ...]
    shape: TableShape


@dataclass(frozen=True, slots=True)
class CopyAgain:
    """Only a copy leads to the current shape."""

    reason: str


Decision: TypeAlias = "Same | Later | Follow | CopyAgain"


def decide(
    applied: TableShape, current: TableShape, seen: SeenShape, was_applied: bool = False, is_current: bool = False
) -> Decision:
    """Decide how rows of shape `seen` are written.

    was_applied: the table is known to have had the applied shape when they were written; is_current:
    the current one.
    """
    if was_applied and _has_columns(seen, applied):
        shape: TableShape | None = applied
    elif reason := why_copy(applied, current):
        return CopyAgain(reason)
    else:
        shape = current if is_current and _has_columns(seen, current) else _shape_of_rows(applied, current, seen)
    if shape is None:
        return CopyAgain("it was changed several times")
    if (shape := _with_key(shape, applied, current, seen, was_applied, is_current)) is None:
        return CopyAgain("the columns that identify its rows changed")
    if shape == current:
        return Same() if applied == current else Follow(steps(applied, current), current)
    return Later() if shape == applied else Follow(steps(applied, shape), shape)


def decide_between_rows(applied: TableShape, current: TableShape) -> Decision:
    """Decide how the applied shape becomes the current one, if all rows of the applied shape are written, and no others."""
    if reason := why_copy(applied, current):
        return CopyAgain(reason)
    return Same() if applied == current else Follow(steps(applied, current), current)


def adopt(columns: Sequence[str], current: TableShape, seen: SeenShape | None) -> Decision:
    """Decide how a table continues whose applied shape was not stored: by an earlier version, which stored names of columns."""
    names = {column.name for column in current.columns if not column.generated}
    if (columns and set(columns) != names) or (seen is not None and not _has_columns(seen, current)):
        return CopyAgain("its columns changed, and it is not known how they were")
    return Follow((), current)


def why_copy(applied: TableShape, current: TableShape) -> str:
    """Return why the contents of old rows are unknown; empty if they are known."""
    if applied.table_id != current.table_id or applied.attnums > current.attnums:
        return "it is another table"
    if reason := partition_trees.why_copy(applied.partitions, current.partitions):
        return reason
    is_moved = applied.file != current.file
    for before, after in _common(applied, current):
        if before.generated and after.generated:
            if before.version != after.version and is_moved:
                return f"column {after.name} was computed again"
        elif before.generated != after.generated:
            return f"column {after.name} changed from or to a generated one"
        elif before.version != after.version and is_moved:
            return f"column {after.name} was altered and the table rewritten"
        elif not _is_wider(before, after):
            return f"the type of column {after.name} changed from {before.type_text} to {after.type_text}"
    for column in added(applied, current):
        if is_moved and not column.generated:
            return f"column {column.name} was added and the table rewritten, so the values of old rows are unknown"
    for oid, before_parts in applied.types.items():
        if not _holds(before_parts, current.types.get(oid, before_parts)):
            return f"the type with oid {oid} of one of its columns was altered"
    return ""


def _is_wider(before: ColumnShape, after: ColumnShape) -> bool:
    """Return whether values of the former type are values of the new one, given that there was no rewrite."""
    return before.type_oid == after.type_oid or (before.type_oid, after.type_oid) in _WIDENS


def _holds(before: TypeDefinition, after: TypeDefinition) -> bool:
    """Return whether all former values have the same text; an enum may have new labels, a composite no new fields."""
    if before and before[0][0] < 1000:  # attnums
        return before == after
    return set(before) <= set(after)


def _common(applied: TableShape, current: TableShape) -> Iterator[tuple[ColumnShape, ColumnShape]]:
    for before in applied.columns:
        if (after := current.column(before.attnum)) is not None:
            yield before, after


def added(applied: TableShape, current: TableShape) -> list[ColumnShape]:
    return [column for column in current.columns if column.attnum > applied.attnums]


def _dropped(applied: TableShape, current: TableShape) -> list[ColumnShape]:
    return [column for column in applied.columns if current.column(column.attnum) is None]


def _has_columns(seen: SeenShape, shape: TableShape) -> bool:
    return seen.columns == tuple((column.name, *column.type) for column in _sent(shape, seen))


def _sent(shape: TableShape, seen: SeenShape) -> list[ColumnShape]:
    """Return the columns that the stream sends; generated ones only if it names them."""
    names = {name for name, _, _ in seen.columns}
    return [column for column in shape.columns if not column.generated or column.name in names]


def _shape_of_rows(applied: TableShape, current: TableShape, seen: SeenShape) -> TableShape | None:
    """Return the only shape between the two (both included) that rows of these columns can have; None if that is not certain."""
    new, gone = added(applied, current), _dropped(applied, current)
    has_lost = current.attnums - applied.attnums > len(new)  # columns that came and went
    if gone and (new or has_lost or applied.file != current.file):
        return None
    if new and has_lost:
        return None
    whole = applied if gone else current
    candidates = _sent(whole, seen)
    surplus = len(candidates) - len(seen.columns)
    if gone:
        # Of some of them only, the stream does not show which: a column may have been renamed before it was dropped.
        droppable = [column.attnum for column in candidates if column in gone]
        missing = {column.attnum for column in gone} if surplus == len(droppable) else set()
    else:
        optional = [column.attnum for column in candidates if column.attnum > applied.attnums]
        missing = set(optional[len(optional) - surplus :] if 0 < surplus <= len(optional) else ())
    candidates = [column for column in candidates if column.attnum not in missing]
    if len(candidates) != len(seen.columns):
        return None
    found: dict[int, ColumnShape] = {}
    for column, (name, *kind) in zip(candidates, seen.columns, strict=True):
        matching = [
            known
            for shape in (current, applied)
            if (known := shape.column(column.attnum)) is not None and [known.type_oid, known.type_modifier] == kind
        ]
        if not matching:
            return None
        found[column.attnum] = replace(matching[0], name=name)
    columns = tuple(found.get(column.attnum, column) for column in whole.columns if column.attnum not in missing)
    if len({column.name for column in columns}) < len(columns):
        return None
    return _named_like(columns, applied, current, missing)


def _named_like(columns: tuple[ColumnShape, ...], applied: TableShape, current: TableShape, missing: set[int]) -> TableShape:
    """Return the applied or the current shape if the columns are theirs, else one in between."""
    plain = [(column.attnum, column.name, column.type) for column in columns]
    for shape in (current, applied):
        if plain == [(column.attnum, column.name, column.type) for column in shape.columns]:
            return shape
    later = {attnum for attnum in missing if attnum > applied.attnums}
    attnums = min(later) - 1 if later else current.attnums
    return replace(current, attnums=attnums, columns=columns)


def _with_key(
    shape: TableShape, applied: TableShape, current: TableShape, seen: SeenShape, was_applied: bool, is_current: bool
) -> TableShape | None:
    """Return the shape with the key that the rows have, as far as the stream shows it; None if that is not certain."""
    if seen.key is not None:
        key = shape.key if set(shape.names(shape.key)) == seen.key else _attnums(shape, seen.key)
    elif was_applied or applied.key == current.key:
        key = applied.key
    elif is_current or not current.key:  # whole old rows identify rows without a key too, even before it was dropped
        key = current.key
    else:
        return None
    if key == shape.key:
        return shape
    if shape.columns == current.columns and key == current.key:
        return current
    return replace(shape, key=key)


def _attnums(shape: TableShape, names: frozenset[str]) -> tuple[int, ...]:
    return tuple(column.attnum for column in shape.columns if column.name in names)


def steps(applied: TableShape, target: TableShape) -> tuple[Step, ...]:
    """Return the steps from one shape to the other, in an order in which no two columns ever have one name."""
    found: list[Step] = [DropColumn(column.name) for column in _dropped(applied, target) if not column.generated]
    pairs = [(before, after) for before, after in _common(applied, target) if not before.generated]
    found += _renames([(before.name, after.name) for before, after in pairs if before.name != after.name])
    found += [AlterType(after.name, before.type_text, after) for before, after in pairs if before.type != after.type]
    found += [AddColumn(column) for column in added(applied, target) if not column.generated]
    if applied.key != target.key:
        is_kept = any(set(unique) == set(applied.key) for unique in target.uniques)
        former = target.names(applied.key)
        is_whole = len(former) == len(applied.key)  # an index ends with any of its columns
        found.append(SetKey(target.names(target.key), former if is_whole else (), is_kept))
    return tuple(found)


def _renames(pairs: Sequence[tuple[str, str]]) -> list[Step]:
    """Return renames; a name that another column still has is reached through a temporary one."""
    former = {name for name, _ in pairs}
    first: list[Step] = []
    last: list[Step] = []
    for number, (name, new_name) in enumerate(pairs, 1):
        if new_name in former:
            first.append(RenameColumn(name, f"tablewire_rename_{number}"))
            last.append(RenameColumn(f"tablewire_rename_{number}", new_name))
        else:
            first.append(RenameColumn(name, new_name))
    return first + last
