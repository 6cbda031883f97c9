"""Conflicts: a change finds other rows at the sink than it did at the source. CarefulWriter finds and settles them one by one.

insert_exists   a row with the key of an inserted one exists
update_exists   a row with the new key of an updated one exists
update_missing, delete_missing   the row does not exist
update_differs, delete_differs   it exists, but is not the old row (only known with REPLICA IDENTITY FULL)
suppressed      a trigger at the sink has prevented the change

source-wins makes the sink's row what the source's is; skip keeps what the sink has; error stops the
table. All of them are counted in tablewire.positions.conflicts, in the transaction that settles them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import psycopg
import structlog

from processor.postgres.sinks import ConflictCounter, ReloadNeededError
from processor.postgres.sinks.changes import (
    changed_columns,
    key_of,
    merged,
    must_replace,
    parameters,
    patch,
    statements,
    truncates,
)
from processor.postgres.sinks.connection import RowCountError, SinkConnection
from processor.postgres.sinks.plans import AT_PLACE, RowCondition, TargetPlan
from processor.postgres.source.pgoutput import INSERT, TRUNCATE, Value, read_change
from tablewire.errors import OperatingError

CHUNK = 64
"""Changes that are tried together before each of them is looked at alone."""
CAREFUL_TRANSACTIONS = 100
"""How long a table is written carefully after a conflict: they rarely come alone."""
LOG_INTERVAL_S = 10.0
_SAVEPOINT = "tablewire_chunk"

_Place = tuple[bytes, bytes]
_log = structlog.get_logger(__name__)


class ConflictLog:
    """Logs the conflicts of one session's tables, each table at most every LOG_INTERVAL_S seconds."""

    def __init__(self, counter: ConflictCounter) -> None:
        self._counter = counter
        self._waiting: dict[str, Counter[str]] = {}
        self._logged_at: dict[str, float] = {}

    def add(self, table: str, key: Sequence[str], found: Counter[str]) -> None:
        """Count conflicts of a committed transaction."""
        self._counter.add(found.total())
        waiting = self._waiting.setdefault(table, Counter())
        waiting.update(found)
        now = time.monotonic()
        if now - self._logged_at.get(table, -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
            self._logged_at[table] = now
            del self._waiting[table]
            _log.warning("sink_conflict", table=table, key=", ".join(key) or "the whole row", **waiting)


class CarefulWriter:
    """Writes in the source's order, and looks for the rows of changes that do not fit. For one call within one transaction."""

    def __init__(self, connection: SinkConnection, table: str, policy: str) -> None:
        self.found: Counter[str] = Counter()
        self.has_failed = False
        self._connection = connection
        self._table = table
        self._policy = policy

    def write(self, plan: TargetPlan, frames: Sequence[bytes]) -> None:
        connection = self._connection
        for at in range(0, len(frames), CHUNK):
            chunk = frames[at : at + CHUNK]
            connection.add((f"SAVEPOINT {_SAVEPOINT}", ()))
            connection.add_counted(*statements(plan, chunk))
            try:
                connection.flush()
            except (psycopg.IntegrityError, RowCountError):
                self.has_failed = True
                connection.rollback_to(_SAVEPOINT)
                for frame in chunk:
                    self._apply(plan, frame)
            connection.add((f"RELEASE SAVEPOINT {_SAVEPOINT}", ()))

    def _apply(self, plan: TargetPlan, frame: bytes) -> None:
        kind, old, new = read_change(frame)
        patch(plan, old)
        patch(plan, new)
        if kind == TRUNCATE:
            self._connection.add(*truncates(plan, frame))
        elif kind == INSERT:
            assert new is not None
            self._insert(plan, new)
        elif new is None:
            assert old is not None
            self._delete(plan, old)
        else:
            self._update(plan, old, new)

    def _insert(self, plan: TargetPlan, new: Sequence[Value]) -> None:
        if not plan.key:
            self._run(plan, plan.insert_sql, parameters(new))
        elif place := self._find(RowCondition(plan.key), plan, new):
            if self._settles("insert_exists"):
                self._overwrite(plan, place, new)
        else:
            self._run(plan, plan.insert_sql, parameters(new))

    def _delete(self, plan: TargetPlan, old: Sequence[Value]) -> None:
        if not (place := self._find_old(plan, old)):
            self._settles("delete_missing")
        elif self._is_as_before(plan, place, old) or self._settles("delete_differs"):
            self._run(plan, plan.delete_sql(AT_PLACE), place)

    def _update(self, plan: TargetPlan, old: Sequence[Value] | None, new: Sequence[Value]) -> None:
        before = new if old is None else old
        after = merged(plan, old, new)
        if not (place := self._find_old(plan, before)):
            if self._settles("update_missing"):
                if None in after:
                    raise ReloadNeededError(
                        f"table {self._table}: a row that was updated at the source does not exist at the sink, and the change"
                        " does not contain all of its values"
                    )
                self._insert(plan, after)
            return
        if not self._is_as_before(plan, place, before) and not self._settles("update_differs"):
            return
        if plan.key and key_of(plan, after) != key_of(plan, before):
            other = self._find(RowCondition(plan.key), plan, after)
            if other and other != place:
                if not self._settles("update_exists"):
                    return
                self._run(plan, plan.delete_sql(AT_PLACE), other)
        if plan.checks_rows or plan.always.difference(plan.key):
            self._overwrite(plan, place, after)
        else:
            self._set(plan, place, after, changed_columns(plan, old, new))

    def _overwrite(self, plan: TargetPlan, place: _Place, new: Sequence[Value]) -> None:
        """Make a row at the sink equal to the new one, whatever it is."""
        always = sorted(plan.always)
        is_same = not always or bool(self._find(RowCondition(tuple(always)), plan, new, place))
        columns = tuple(at for at, value in enumerate(new) if value is not None and (at not in plan.always or not is_same))
        self._set(plan, place, new, columns)

    def _set(self, plan: TargetPlan, place: _Place, new: Sequence[Value], columns: tuple[int, ...]) -> None:
        if must_replace(plan, columns):
            if None in new:
                raise OperatingError(f"table {self._table}: the source did not send all values of a row that is written again")
            self._run(plan, plan.delete_sql(AT_PLACE), place)
            self._run(plan, plan.insert_sql, parameters(new))
        elif columns:
            values = parameters(new[at] for at in columns)
            self._run(plan, plan.update_sql(columns, AT_PLACE), [*values, *place])

    def _find_old(self, plan: TargetPlan, row: Sequence[Value]) -> _Place | None:
        return self._find(RowCondition(plan.key) if plan.key else plan.by_whole_row(row, is_one=False), plan, row)

    def _is_as_before(self, plan: TargetPlan, place: _Place, old: Sequence[Value]) -> bool:
        if not plan.checks_rows:
            return True
        return bool(self._find(plan.by_key_and_row, plan, old, place))

    def _find(self, row: RowCondition, plan: TargetPlan, values: Sequence[Value], only: _Place | None = None) -> _Place | None:
        """Return where a row is that satisfies the condition, of several the first. only: look at no other place."""
        self._connection.add((plan.find_sql(row), parameters(row.values(values))))
        result = self._connection.flush()[-1]
        places = [(_bytes(result.get_value(n, 0)), _bytes(result.get_value(n, 1))) for n in range(result.ntuples)]
        if only is not None:
            return only if only in places else None
        return places[0] if places else None

    def _run(self, plan: TargetPlan, text: str, values: Sequence[bytes | None]) -> None:
        """Run a statement that must affect one row, unless a trigger of the sink prevents that."""
        self._connection.add((text, values))
        rows = self._connection.flush()[-1].command_tuples or 0
        if rows != 1:
            if rows or not plan.facts.has_triggers:
                raise RowCountError(text, 1, rows)
            self._settles("suppressed")

    def _settles(self, kind: str) -> bool:
        """Count a conflict; return whether the sink's row is to become the source's."""
        if self._policy == "error":
            raise OperatingError(
                f"table {self._table}: conflict {kind} at the sink: make its rows equal to the source's there, or set the source"
                " option on_conflict to source-wins or skip, to continue"
            )
        self.found[kind] += 1
        return self._policy == "source-wins"


def _bytes(value: bytes | None) -> bytes:
    assert value is not None
    return value
