"""Changes as single statements, in the order of the source: what happened there happens here. Pure.

An insert is an INSERT, an update an UPDATE (also of the key), a delete a DELETE, and each affects one
row; what affects none or several is a conflict, see conflicts.py. Without a key, an update or delete
picks exactly one of the rows that equal the old one byte for byte, so the number of duplicates stays
the same as at the source.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from processor.postgres.sinks.connection import Statement
from processor.postgres.sinks.plans import TargetPlan
from processor.postgres.source.pgoutput import DELETE, INSERT, NULL_VALUE, TRUNCATE, Value, read_change, read_truncate_flags
from tablewire.errors import OperatingError

ANY_ROWS = -1
"""Instead of a number of rows: any number is right."""
_RESTART_IDENTITY = 2
_ARRAY_HEADER_BYTES = 16  # length, dimensions, flags, element type
_ARRAY_TYPE_AT = 12


def statements(plan: TargetPlan, frames: Iterable[bytes]) -> tuple[list[Statement], list[int]]:
    """Return the statements, and how many rows each must affect."""
    found: list[Statement] = []
    rows: list[int] = []
    for frame in frames:
        kind, old, new = read_change(frame)
        if kind == TRUNCATE:
            found += truncates(plan, frame)
        else:
            if plan.patches:
                patch(plan, old)
                patch(plan, new)
            if kind == INSERT:
                assert new is not None
                found.append((plan.insert_sql, parameters(new)))
            elif kind == DELETE:
                assert old is not None
                found.append(_delete(plan, old))
            else:
                assert new is not None
                found += _update(plan, old, new)
        rows += [ANY_ROWS if kind == TRUNCATE else 1] * (len(found) - len(rows))
    return found, rows


def truncates(plan: TargetPlan, frame: bytes) -> list[Statement]:
    """Return what empties the table. Other tables of the same TRUNCATE, and of its CASCADE, are emptied by their own changes."""
    return [(text, ()) for text in plan.truncate_sql(bool(read_truncate_flags(frame) & _RESTART_IDENTITY))]


def parameters(values: Iterable[Value]) -> list[bytes | None]:
    return [None if value is None or value == NULL_VALUE else value[4:] for value in values]


def key_of(plan: TargetPlan, values: Sequence[Value]) -> list[Value]:
    return [values[at] for at in plan.key]


def old_key(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> list[Value]:
    """Return the key before the update: the old tuple is only sent if its identity changed (or is the whole row)."""
    key = key_of(plan, old if old is not None else new)
    if any(value is None for value in key):
        raise OperatingError(f"{plan.quoted}: the source sent an update without the key of its row")
    return key


def patch(plan: TargetPlan, values: list[Value] | None) -> None:
    """Replace the id of the element type in array values by the sink's."""
    if values is None:
        return
    for at, oid in plan.patches:
        value = values[at]
        if value is not None and value != NULL_VALUE and len(value) >= _ARRAY_HEADER_BYTES:
            values[at] = value[:_ARRAY_TYPE_AT] + oid + value[_ARRAY_HEADER_BYTES:]


def merged(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> list[Value]:
    """Return the new row, with the old values of columns that were not sent; None if they are unknown."""
    known = _known(plan, old)
    return [old[at] if value is None and old is not None and at in known else value for at, value in enumerate(new)]


def changed_columns(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> tuple[int, ...]:
    """Return the columns that an update sets: those that were sent, but a key or identity column only if its value changed."""
    steady = plan.always.union(plan.key)
    known = _known(plan, old)

    def is_set(at: int) -> bool:
        return at not in steady or (old is not None and at in known and old[at] not in (None, new[at]))

    sent = [at for at, value in enumerate(new) if value is not None]
    return tuple(at for at in sent if is_set(at)) or tuple(at for at in sent if at not in plan.always)[:1]


def _known(plan: TargetPlan, old: Sequence[Value] | None) -> Collection[int]:
    """Return the columns whose old values were sent."""
    if old is None:
        return ()
    return range(len(old)) if not plan.key or plan.checks_rows else plan.key


def must_replace(plan: TargetPlan, columns: Iterable[int]) -> bool:
    """Return whether a row must be deleted and inserted, as no UPDATE may set one of the columns.

    Raise OperatingError if that would lose what only the sink has.
    """
    always = [plan.columns[at] for at in columns if at in plan.always]
    if always and (plan.has_local_columns or plan.facts.has_triggers):
        raise OperatingError(
            f"table {plan.quoted}: column {always[0].name} was changed at the source, but is GENERATED ALWAYS AS IDENTITY at the"
            f" sink: ALTER TABLE {plan.quoted} ALTER COLUMN {always[0].quoted} SET GENERATED BY DEFAULT there"
        )
    return bool(always)


def _delete(plan: TargetPlan, old: Sequence[Value]) -> Statement:
    row = plan.by_whole_row(old) if not plan.key else plan.by_key_and_row if plan.checks_rows else plan.by_key
    return plan.delete_sql(row), parameters(row.values(old))


def _update(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> list[Statement]:
    if old is None and not plan.key:
        raise OperatingError(f"{plan.quoted}: the source sent an update without its old row; its replica identity was changed")
    columns = changed_columns(plan, old, new)
    if must_replace(plan, columns):
        after = merged(plan, old, new)
        if old is None or None in after:
            raise OperatingError(f"{plan.quoted}: the source did not send all values of a row that must be written again")
        return [_delete(plan, old), (plan.insert_sql, parameters(after))]
    if not columns:
        return []
    return [update(plan, old, new, columns)]


def update(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value], columns: tuple[int, ...]) -> Statement:
    """Return an update of these columns of the one row that the source has changed."""
    before = new if old is None else old
    if not plan.key:
        row = plan.by_whole_row(before)
    else:
        key = old_key(plan, old, new)
        if plan.checks_rows and old is not None:
            row = plan.by_key_and_row
        elif plan.always.difference(plan.key):
            row = plan.by_key_and_identity
            before = list(new)
            for at, value in zip(plan.key, key, strict=True):
                before[at] = value
        else:
            row = plan.by_key
    return plan.update_sql(columns, row), parameters([*(new[at] for at in columns), *row.values(before)])
