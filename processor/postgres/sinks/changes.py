"""Changes as single statements, in the order of the source: always correct, and the fastest way for a few of them. Pure.

With a key, an insert is an upsert, and so is an update that contains every column. Without one, an
update or delete picks exactly one of the rows that equal the old one byte for byte, so the number of
duplicates stays the same as at the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from processor.postgres.sinks.connection import Statement
from processor.postgres.sinks.plans import TargetPlan
from processor.postgres.source.pgoutput import DELETE, INSERT, NULL_VALUE, TRUNCATE, Value, read_change
from tablewire.errors import OperatingError

_ARRAY_HEADER_BYTES = 16  # length, dimensions, flags, element type
_ARRAY_TYPE_AT = 12


def statements(plan: TargetPlan, frames: Iterable[bytes]) -> list[Statement]:
    found: list[Statement] = []
    for frame in frames:
        kind, old, new = read_change(frame)
        if kind == TRUNCATE:
            found.append((plan.truncate_sql, ()))
            continue
        if plan.patches:
            patch(plan, old)
            patch(plan, new)
        if kind == INSERT:
            assert new is not None
            found.append((plan.insert_sql, parameters(new)))
        elif kind == DELETE:
            assert old is not None
            found.append((plan.delete_sql, parameters(key_of(plan, old) if plan.key else old)))
        else:
            assert new is not None
            found += _update(plan, old, new)
    return found


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


def _update(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> list[Statement]:
    if not plan.key:
        if old is None:
            raise OperatingError(
                f"{plan.quoted}: the source sent an update without its old row; its replica identity was changed"
            )
        # With the whole old row known, a value that was not sent is the old one.
        whole = [before if value is None else value for value, before in zip(new, old, strict=True)]
        return [(plan.update_sql(tuple(range(len(whole)))), parameters([*whole, *old]))]
    before = old_key(plan, old, new)
    if None in new:
        return [partial_update(plan, new, before)]
    upsert = (plan.insert_sql, parameters(new))
    if before == key_of(plan, new):
        return [upsert]
    return [(plan.delete_sql, parameters(before)), upsert]


def partial_update(plan: TargetPlan, new: Sequence[Value], key: Iterable[Value]) -> Statement:
    """Return an update of the columns that were sent, of the row with this key."""
    present = tuple(at for at, value in enumerate(new) if value is not None)
    return plan.update_sql(present), parameters([*(new[at] for at in present), *key])
