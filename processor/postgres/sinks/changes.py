"""Changes as single statements, in the order of the source: always right, and the quickest way for a few. Pure but for SQL.

With a key, an insert is an upsert and so is an update that sent every column. Without one, an update or delete picks exactly one
of the rows that are byte for byte the old one, so that duplicates stay as many as they are at the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from processor.postgres.sinks.connection import Statement
from processor.postgres.sinks.targets import TargetPlan
from processor.postgres.wire import DELETE, INSERT, NULL_VALUE, TRUNCATE, Value, read_change
from tablewire.errors import OperatingError

_ARRAY_HEADER_BYTES = 16  # length, dimensions, flags, element type
_ARRAY_TYPE_AT = 12


def statements(plan: TargetPlan, frames: Iterable[bytes]) -> list[Statement]:
    """The statements of these changes, in order."""
    found: list[Statement] = []
    for frame in frames:
        kind, old, new = read_change(frame)
        if kind == TRUNCATE:
            found.append((truncate_sql(plan), ()))
            continue
        if plan.patches:
            patch(plan, old)
            patch(plan, new)
        if kind == INSERT:
            assert new is not None
            found.append((_cached(plan, "upsert" if plan.key else "insert"), parameters(new)))
        elif kind == DELETE:
            assert old is not None
            found.append(_delete(plan, old))
        else:
            assert new is not None
            found += _update(plan, old, new)
    return found


def truncate_sql(plan: TargetPlan) -> str:
    """TRUNCATE is refused for a table that others refer to; deleting does the same."""
    return f"DELETE FROM {plan.quoted}" if plan.is_referenced else f"TRUNCATE {plan.quoted}"


def parameters(values: Iterable[Value]) -> list[bytes | None]:
    return [None if value is None or value == NULL_VALUE else value[4:] for value in values]


def key_of(plan: TargetPlan, values: Sequence[Value]) -> list[Value]:
    return [values[at] for at in plan.key]


def old_key(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> list[Value]:
    """The key of the row before the update: the old tuple is only sent when its identity changed (or is the whole row)."""
    key = key_of(plan, old if old is not None else new)
    if any(value is None for value in key):
        raise OperatingError(f"{plan.quoted}: the source sent an update without the key of its row")
    return key


def patch(plan: TargetPlan, values: list[Value] | None) -> None:
    """Gives array values the sink's id of their element type."""
    if values is None:
        return
    for at, oid in plan.patches:
        value = values[at]
        if value is not None and value != NULL_VALUE and len(value) >= _ARRAY_HEADER_BYTES:
            values[at] = value[:_ARRAY_TYPE_AT] + oid + value[_ARRAY_HEADER_BYTES:]


def _cached(plan: TargetPlan, name: str) -> str:
    sql = plan.cache.get((name,))
    if sql is None:
        if name == "upsert":
            sql = plan.insert() + plan.conflict()
        elif name == "insert":
            sql = plan.insert()
        elif plan.key:
            sql = f"DELETE FROM {plan.quoted} WHERE {plan.by_key(1)}"
        else:
            sql = f"DELETE FROM {plan.quoted} WHERE {plan.by_row(1)}"
        plan.cache[name,] = sql
    return sql


def _delete(plan: TargetPlan, old: Sequence[Value]) -> Statement:
    return delete_statement(plan, key_of(plan, old) if plan.key else old)


def delete_statement(plan: TargetPlan, values: Sequence[Value]) -> Statement:
    """values: of the key, or of the whole row when there is none."""
    return _cached(plan, "delete"), parameters(values)


def _update(plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> list[Statement]:
    if not plan.key:
        if old is None:
            raise OperatingError(
                f"{plan.quoted}: the source sent an update without its old row; its replica identity was changed"
            )
        # With the whole old row at hand, a value that was not sent is the old one.
        whole = [before if value is None else value for value, before in zip(new, old, strict=True)]
        return [(update_sql(plan, tuple(range(len(whole))), by_row=True), parameters([*whole, *old]))]
    before = old_key(plan, old, new)
    present = tuple(at for at, value in enumerate(new) if value is not None)
    if len(present) == len(new):
        upsert = (_cached(plan, "upsert"), parameters(new))
        if before == key_of(plan, new):
            return [upsert]
        return [(_cached(plan, "delete"), parameters(before)), upsert]
    return [(update_sql(plan, present, by_row=False), parameters([*(new[at] for at in present), *before]))]


def update_sql(plan: TargetPlan, present: tuple[int, ...], by_row: bool) -> str:
    """An update of these columns; the values of the old key or row follow theirs."""
    sql = plan.cache.get(("update", present))
    if sql is None:
        sets = ", ".join(f"{plan.columns[at].quoted} = {plan.columns[at].value(n + 1)}" for n, at in enumerate(present))
        where = plan.by_row(len(present) + 1) if by_row else plan.by_key(len(present) + 1)
        sql = plan.cache["update", present] = f"UPDATE {plan.quoted} SET {sets} WHERE {where}"
    return sql
