"""The rules of replication: every cell of the table is carried out on real columns, or declared
impossible with its reason."""

from __future__ import annotations

import numpy as np
import pytest

from owner.core.replication import Replication, RowReports, apply_reports
from owner.core.tables import NO_CAPTURE, Tables
from owner.core.transitions import (
    COMPILED,
    RULES,
    WAIT,
    Cell,
    Dispatch,
    Note,
    Outcome,
    Role,
    RoleChange,
    cells,
    impossible,
    rule_for,
)
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction, ReplicationState, TableState

REPORTER, PRIMARY, SECONDARY, OTHER = 0, 1, 2, 3
POSSIBLE = [cell for cell in cells() if not impossible(cell)]


def name(cell: Cell) -> str:
    flags = "".join(flag for flag, on in zip("PXU", (cell.primary, cell.secondary, cell.undetermined), strict=True) if on)
    return f"{cell.state}-{cell.role.name.lower()}-{cell.reported}-{flags or 'nobody'}"


def row_for(cell: Cell) -> Replication:
    """Return one row as the cell describes it; the reporter is capture 0."""
    tables = Tables()
    rows = tables.add(SpanBlock(np.array([42], np.int64)), 0)
    tables.state[rows] = cell.state.code
    tables.wanted[rows] = tables.scheduled[rows] = True
    tables.checkpoint_ts[rows], tables.resolved_ts[rows] = 100, 100
    tables.assignment_epoch[rows] = 5
    if cell.primary:
        tables.primary[rows] = REPORTER if cell.role is Role.PRIMARY else PRIMARY
    if cell.secondary:
        tables.secondary[rows] = REPORTER if cell.role is Role.SECONDARY else SECONDARY
    if cell.undetermined:
        tables.add_undetermined((0,), OTHER, TableState.STOPPING.code)
    if cell.role is Role.UNDETERMINED:
        tables.add_undetermined((0,), REPORTER, TableState.STOPPING.code)
    return Replication(tables, owner_revision=7)


def report(cell: Cell, checkpoint_ts: int = 150, epoch: int = 3) -> RowReports:
    return RowReports(
        np.array([0], np.int64),
        np.array([cell.reported.code], np.uint8),
        np.array([checkpoint_ts], np.uint64),
        np.array([checkpoint_ts], np.uint64),
        np.array([0], np.uint64),
        np.array([epoch], np.uint64),
    )


def sent(replication: Replication) -> dict[int, DispatchAction]:
    return {capture: action for capture, entries in replication.outgoing.entries.items() for _, action in entries}


@pytest.mark.parametrize("cell", POSSIBLE, ids=name)
def test_cell(cell: Cell) -> None:
    """The effect of a cell is exactly that of its rule, and keeps the invariant of the row."""
    replication = row_for(cell)
    tables = replication.tables
    apply_reports(replication, REPORTER, report(cell))
    rule = rule_for(cell)
    outcome = rule.then if rule else WAIT
    assert tables.check() == []
    assert int(tables.checkpoint_ts[0]) == (150 if outcome.checkpoint and outcome.note is not Note.TWO_WRITERS else 100)
    if outcome.note is Note.TWO_WRITERS:
        assert int(tables.primary[0]) == PRIMARY
        assert sent(replication) == {REPORTER: DispatchAction.REMOVE}
        assert REPORTER in tables.undetermined[0]
        return
    expected_state = outcome.state or cell.state
    assert tables.row(0).state is expected_state
    assert role_after(tables) is expected_role(cell, outcome)
    assert sent(replication) == expected_dispatch(cell, outcome)


def role_after(tables: Tables) -> Role:
    if tables.primary[0] == REPORTER:
        return Role.PRIMARY
    if tables.secondary[0] == REPORTER:
        return Role.SECONDARY
    return Role.UNDETERMINED if REPORTER in tables.undetermined.get(0, {}) else Role.NONE


def expected_role(cell: Cell, outcome: Outcome) -> Role:
    if outcome.dispatch is Dispatch.GRANT and cell.role is Role.SECONDARY:
        return Role.PRIMARY
    return {
        RoleChange.KEEP: cell.role,
        RoleChange.CLEAR: Role.NONE,
        RoleChange.TO_PRIMARY: Role.PRIMARY,
        RoleChange.TO_SECONDARY: Role.SECONDARY,
        RoleChange.TO_UNDETERMINED: Role.UNDETERMINED,
    }[outcome.reporter]


def expected_dispatch(cell: Cell, outcome: Outcome) -> dict[int, DispatchAction]:
    secondary = REPORTER if cell.role is Role.SECONDARY else SECONDARY
    return {
        Dispatch.NOTHING: {},
        Dispatch.PREPARE_REPORTER: {REPORTER: DispatchAction.ADD_PREPARE},
        Dispatch.WRITE_REPORTER: {REPORTER: DispatchAction.ADD_WRITE},
        Dispatch.REMOVE_REPORTER: {REPORTER: DispatchAction.REMOVE},
        Dispatch.REMOVE_PRIMARY: {PRIMARY: DispatchAction.REMOVE},
        Dispatch.GRANT: {secondary: DispatchAction.ADD_WRITE},
    }[outcome.dispatch]


@pytest.mark.parametrize("cell", POSSIBLE, ids=name)
def test_a_permission_is_granted_only_without_other_writers(cell: Cell) -> None:
    """A new assignment_epoch appears only where there is neither a Primary nor an Undetermined
    capture left."""
    replication = row_for(cell)
    apply_reports(replication, REPORTER, report(cell))
    granted = int(replication.tables.grants[0]) > 0
    if granted:
        others_may_write = cell.undetermined or (cell.primary and cell.role is not Role.PRIMARY)
        reporter_is_done = cell.role is Role.SECONDARY or cell.reported in (TableState.STOPPED, TableState.ABSENT)
        assert not others_may_write
        assert reporter_is_done


@pytest.mark.parametrize("cell", POSSIBLE, ids=name)
def test_a_capture_that_may_hold_a_span_keeps_a_role(cell: Cell) -> None:
    """A capture that reports to hold a span has a role afterwards."""
    replication = row_for(cell)
    apply_reports(replication, REPORTER, report(cell))
    if cell.reported not in (TableState.STOPPED, TableState.ABSENT):
        assert role_after(replication.tables) is not Role.NONE


def test_every_rule_decides_a_possible_cell() -> None:
    """Every rule decides at least one possible cell."""
    deciding = {rule_for(cell) for cell in POSSIBLE}
    assert [rule for rule in RULES if rule not in deciding] == []


def test_impossible_cells_have_a_reason() -> None:
    """Every impossible cell has a reason, and there are 960 cells."""
    every = list(cells())
    assert len(every) == 5 * 4 * 6 * 8
    assert {impossible(cell) for cell in every if impossible(cell)} >= {"Prepare always has a Secondary"}


def test_compiled_table_agrees_with_the_rules() -> None:
    """The compiled arrays agree with the literal table, cell by cell."""
    for cell in cells():
        codes = COMPILED.codes(
            np.array([cell.state.code], np.uint8),
            np.array([cell.role], np.uint8),
            np.array([cell.reported.code], np.uint8),
            np.array([cell.primary]),
            np.array([cell.secondary]),
            np.array([cell.undetermined]),
        )
        rule = rule_for(cell)
        assert COMPILED.outcomes[codes[0]] == (rule.then if rule else WAIT)


@pytest.mark.parametrize("role", [Role.SECONDARY, Role.UNDETERMINED])
def test_the_newest_permission_wins_of_two_writers(role: Role) -> None:
    """A second writer with a newer epoch becomes Primary, and the former one is sent a remove."""
    state = ReplicationState.COMMIT if role is Role.SECONDARY else ReplicationState.REPLICATING
    cell = Cell(state, role, TableState.REPLICATING, True, role is Role.SECONDARY, False)
    replication = row_for(cell)
    apply_reports(replication, REPORTER, report(cell, epoch=9))
    tables = replication.tables
    assert int(tables.primary[0]) == REPORTER
    assert int(tables.secondary[0]) == NO_CAPTURE
    assert int(tables.assignment_epoch[0]) == 9
    assert set(tables.undetermined[0]) == {PRIMARY}
    assert sent(replication) == {PRIMARY: DispatchAction.REMOVE}
    assert tables.row(0).state is ReplicationState.REPLICATING
