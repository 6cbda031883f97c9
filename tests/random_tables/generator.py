"""One seed, one case: tables, rows, and steps. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from tests.random_tables import dml
from tests.random_tables.case import Act, Case, Step
from tests.random_tables.ddl import Ddl
from tests.random_tables.model import Column, Table, create_statements, partitioned_statements
from tests.random_tables.types import NEW_TYPES, SINK_WIDER

ALONE = ("VACUUM", "CONCURRENTLY")
"""Statements with these words cannot run inside a transaction."""


class Scope(StrEnum):
    """What changes besides rows."""

    ROWS = "rows"
    SINK = "sink"
    SHAPES = "shapes"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Focus:
    """Makes one kind of case frequent. shapes: names of methods of Ddl; kind: of the tables, see Ddl; sink: how it
    is prepared; sink_changes: names of changes there.
    """

    scope: Scope = Scope.ALL
    shapes: tuple[str, ...] = ()
    kind: str = ""
    sink: str = ""
    sink_changes: tuple[str, ...] = ()
    loses_slot: bool = False


def generate(seed: int, scope: Scope = Scope.ALL, focus: Focus | None = None) -> Case:
    """Return the case of this seed."""
    return Generator(seed, focus or Focus(scope)).case()


class Generator:
    def __init__(self, seed: int, focus: Focus) -> None:
        scope = focus.scope
        self.focus = focus
        self.changes_sink = scope in (Scope.SINK, Scope.ALL)
        self.changes_shapes = scope in (Scope.SHAPES, Scope.ALL)
        self.seed = seed
        self.rng = random.Random(seed)
        self.tables: list[Table] = []
        self.ddl = Ddl(self.rng, self.tables, focus.kind, focus.shapes)
        self.steps: list[Step] = []
        self._is_open = False
        self._is_held = False

    def case(self) -> Case:
        rng = self.rng
        has_snapshot = rng.random() < 0.96 or self.focus != Focus(self.focus.scope)
        self.steps.append(Step(Act.BOTH, (*NEW_TYPES, "CREATE SCHEMA other")))
        self.steps.append(Step(Act.SOURCE, ("CREATE SEQUENCE numbers",)))
        self._first_tables("like" if rng.random() < 0.3 else "partitioned" if rng.random() < 0.1 else "")
        if has_snapshot:
            for _ in range(rng.choice([0, 2, 5])):
                self._rows()
        self.steps.append(Step(Act.START))
        if rng.random() < 0.85:
            # What follows is streamed, rather than part of the first copy.
            self.steps.append(Step(Act.CHECK))
        for _ in range(rng.choice([4, 8, 12, 20])):
            self._step()
        if self._is_open:
            self.steps.append(Step(Act.FINISH))
        if self._is_held:
            self.steps.append(Step(Act.LIFT))
        if rng.random() < 0.5:
            self._rows()
        options = {"binary": rng.choice(["true", "true", "true", "false"])}
        options["batch_max_bytes"] = str(rng.choice([1024, 100_000, 4_000_000]))
        if rng.random() < 0.2:
            options |= {"queue_max_bytes": "65536"}
        return Case(self.seed, tuple(self.steps), options, has_snapshot, rng.choice([1, 2, 10, 48]))

    def _first_tables(self, sink: str) -> None:
        """Create tables. sink: empty, like the source, or partitioned where the source is not."""
        sink = self.focus.sink or sink
        for _ in range(self.rng.choice([1, 2, 3])):
            for table in self.ddl.new_tables():
                act = Act.BOTH if sink == "like" else Act.SOURCE
                self.steps.append(Step(act, tuple(create_statements(table)), alone=True))
                if sink == "partitioned":
                    self.steps.append(Step(Act.SINK, tuple(partitioned_statements(table)), alone=True))

    def _rows(self) -> None:
        self._source(dml.transaction(self.rng, self.tables))

    def _source(self, statements: list[str], act: Act = Act.SOURCE, one_by_one: bool = False) -> None:
        alone = one_by_one or any(word in text for text in statements for word in ALONE)
        self.steps.append(Step(act, tuple(statements), alone=alone))

    def _step(self) -> None:
        rng = self.rng
        choice = rng.random()
        if self.focus.loses_slot and choice < 0.3:
            self._source(dml.transaction(rng, self.tables), Act.LOSE_SLOT)
        elif choice < 0.45:
            self._rows()
        elif choice < 0.75:
            if self.changes_sink and (choice < 0.50 or not self.changes_shapes):
                self._sink()
            elif self.changes_shapes:
                self._shape()
            else:
                self._rows()
        elif choice < 0.79:
            self._open()
        elif choice < 0.83:
            self._hold()
        else:
            act = rng.choice(
                [Act.CHECK, Act.CHECK, Act.DRIVE, Act.DRIVE, Act.RESTART, Act.CRASH, Act.ABANDON, Act.PAUSE, Act.MOVE, Act.CUT]
            )
            self.steps.append(Step(act, number=rng.randrange(1, 40)))

    def _shape(self) -> None:
        """Change a shape: alone, or in a transaction with changes of rows before and after it."""
        if not (found := self.ddl.change()):
            return
        if self.rng.random() < 0.35:
            before = dml.transaction(self.rng, self.tables)
            found = [*before, *found, *dml.transaction(self.rng, self.tables)]
            if self.rng.random() < 0.1:
                found = ["SAVEPOINT shape", *found, "ROLLBACK TO shape", *dml.transaction(self.rng, self.tables)]
            self._source(found)
            return
        self._source(found, one_by_one=self.rng.random() < 0.5)
        if self.rng.random() < 0.6:
            self._rows()
        if self.rng.random() < 0.3:
            self.steps.append(Step(Act.CHECK))

    def _open(self) -> None:
        if self._is_open:
            self.steps.append(Step(Act.FINISH))
        else:
            self._source(dml.transaction(self.rng, self.tables), Act.OPEN)
        self._is_open = not self._is_open

    def _hold(self) -> None:
        self.steps.append(Step(Act.LIFT if self._is_held else Act.HOLD))
        self._is_held = not self._is_held

    def _sink(self) -> None:
        """Change the sink's table, and then every row at the source, so that the change is noticed."""
        tables = [table for table in self.tables if not table.is_root and table.parent is None and table.columns]
        if not tables:
            return
        table = self.rng.choice(tables)
        path, column = table.path, self.rng.choice(table.columns)
        changes = self._sink_changes(table, column)
        names = [name for name in changes if name in self.focus.sink_changes] or list(changes)
        found = changes[self.rng.choice(names)]
        name = self.rng.choice(table.columns)
        touch = f"UPDATE ONLY {path} SET {name.name} = {name.name}" if name.is_written and "ALWAYS" not in name.extra else ""
        touch = touch or dml.insert(self.rng, table)
        self.steps.append(Step(Act.SINK_THEN_SOURCE, (*found, touch), alone=True, name=path))

    def _sink_changes(self, table: Table, column: Column) -> dict[str, list[str]]:
        path = table.path
        found = {
            "drop": [f"DROP TABLE {path} CASCADE"],
            "recreate": [
                f"CREATE TABLE kept AS TABLE {path}",
                f"DROP TABLE {path} CASCADE",
                f"CREATE TABLE {path} (LIKE kept)",
                "DROP TABLE kept",
            ],
            "local column": [f"ALTER TABLE {path} ADD COLUMN local_c int DEFAULT 5"],
            "local text": [f"ALTER TABLE {path} ADD COLUMN local_t text"],
            "index": [f"CREATE INDEX ON {path} ({column.name})"],
            "trigger": [
                "CREATE TABLE IF NOT EXISTS public.sink_log (t text, op text)",
                "CREATE OR REPLACE FUNCTION public.log_it() RETURNS trigger LANGUAGE plpgsql AS"
                " $$BEGIN INSERT INTO public.sink_log VALUES (TG_TABLE_NAME, TG_OP); RETURN NULL; END$$",
                f"CREATE TRIGGER logs AFTER INSERT OR UPDATE OR DELETE ON {path} FOR EACH ROW EXECUTE FUNCTION public.log_it()",
                f"ALTER TABLE {path} ENABLE ALWAYS TRIGGER logs",
            ],
        }
        if column.type in SINK_WIDER:
            found["wider"] = [f"ALTER TABLE {path} ALTER {column.name} TYPE {SINK_WIDER[column.type]}"]
        if table.key:
            # Without a key, rows that are missing at the sink cannot be found again.
            found["delete"] = [f"DELETE FROM {path}"]
            found["no key"] = [
                "DO $$DECLARE n text; BEGIN FOR n IN SELECT conname FROM pg_constraint WHERE contype IN ('p', 'u')"
                f" AND conrelid = '{path}'::regclass LOOP EXECUTE 'ALTER TABLE {path} DROP CONSTRAINT ' || quote_ident(n);"
                " END LOOP; END$$"
            ]
        return found
