"""Bugs that are planted into the executor, one at a time, for random cases to find; edits as in tests/sim/mutations.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.random_tables.case import Result
from tests.random_tables.generator import Focus, Scope, generate
from tests.random_tables.world import World
from tests.sim.mutations import Edit


@dataclass(frozen=True, slots=True)
class Bug:
    """focus: the kind of cases that are run. seed: the first one known to find the bug; others are tried if it no longer does."""

    name: str
    edits: tuple[Edit, ...]
    focus: Focus
    seed: int = 1

    @contextmanager
    def plant(self) -> Iterator[None]:
        functions = [(edit, edit.resolve()) for edit in self.edits]
        former = [(function, function.__code__) for _, function in functions]
        try:
            for edit, function in functions:
                function.__code__ = edit.planted(function).__code__
            yield
        finally:
            for function, code in former:
                function.__code__ = code

    def find(self, world: World, seeds: Iterable[int]) -> Result | None:
        """Return the result of the first of these seeds that fails, None if none does."""
        with self.plant():
            for seed in seeds:
                result = world.run(generate(seed, focus=self.focus))
                if result.kind:
                    return result
        return None


def _edit(function: str, old: str, new: str) -> tuple[Edit, ...]:
    return (Edit(function, old, new),)


SINKS = "processor.postgres.sinks"
SOURCE = "tablewire.postgres.source:PostgresSource"
SHAPES = "tablewire.postgres.shapes"
BY_NAME = "next((found for found in {}.columns if found.name == {}.name), None)"
UNCHECKED = _edit(f"{SINKS}.connection:SinkConnection.flush", "if count >= 0 and", "if False and")
BUGS = (
    Bug(
        "TRUNCATE at the sink also empties the tables that inherit from the table",
        _edit(f"{SINKS}.target_facts:truncates", 'only = table if facts.is_partitioned else f"ONLY {table}"', "only = table"),
        Focus(Scope.ROWS, kind="child", sink="like"),
        seed=2,
    ),
    Bug(
        "a row of a partitioned table is identified by its ctid alone, and the number of changed rows is not checked",
        (
            *_edit(
                f"{SINKS}.plans:RowCondition.sql",
                "(t.tableoid, t.ctid) = (SELECT f.tableoid, f.ctid FROM",
                "t.ctid = (SELECT f.ctid FROM",
            ),
            *UNCHECKED,
        ),
        Focus(Scope.ROWS, kind="keyless", sink="partitioned"),
        seed=2,
    ),
    Bug(
        "the number of rows that a statement affected is not checked",
        UNCHECKED,
        Focus(Scope.SINK, kind="keyed", sink_changes=("delete",)),
    ),
    Bug(
        "columns are compared by name, not by attnum",
        (
            *_edit(f"{SHAPES}:_common", "current.column(before.attnum)", BY_NAME.format("current", "before")),
            *_edit(
                f"{SHAPES}:_dropped", "current.column(column.attnum) is None", BY_NAME.format("current", "column") + " is None"
            ),
            *_edit(f"{SHAPES}:added", "column.attnum > applied.attnums", BY_NAME.format("applied", "column") + " is None"),
        ),
        Focus(Scope.SHAPES, kind="keyed", shapes=("replace_column",)),
    ),
    Bug(
        "the relfilenode is not compared",
        _edit(f"{SHAPES}:why_copy", "is_moved = applied.file != current.file", "is_moved = False"),
        Focus(Scope.SHAPES, kind="keyed", shapes=("change_values",)),
    ),
    Bug(
        "the version of a column is not compared",
        _edit(f"{SHAPES}:why_copy", "elif before.version != after.version and is_moved:", "elif False:"),
        Focus(Scope.SHAPES, kind="keyed", shapes=("change_values",)),
    ),
    Bug(
        "the checkpoint passes positions up to which no shape was verified",
        _edit(
            "processor.postgres.tables.table_work:TableWork._report",
            "done_ts, self.verified_ts, max(",
            "done_ts, max(",
        ),
        Focus(Scope.SHAPES, kind="keyed", shapes=("add_column", "drop_column", "rename_column")),
    ),
    Bug(
        "a missing slot is replaced although changes may be lost",
        (
            *_edit(
                "tablewire.postgres.servers:decide",
                "cause = slot.why_lost",
                "return Decision(Action.PASS_OVER)\n    cause = slot.why_lost",
            ),
            *_edit(
                "tablewire.postgres.source:PostgresSource._usable_slot", "if mark is None or read_mark", "if False and read_mark"
            ),
        ),
        Focus(Scope.ROWS, kind="keyed", loses_slot=True),
    ),
)
