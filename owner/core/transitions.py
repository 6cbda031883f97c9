"""The rules of replication as one literal table. The engine, the documentation and the tests are
made from it.

A capture reports a state of a span. The row of the span has a replication state, the capture has a
role in the row, and the row has or does not have a Primary (P), a Secondary (X) and Undetermined
captures (U; the reporter itself does not count as one). The first rule whose condition holds
decides. A cell without a rule changes nothing.

The rules keep these invariants, whatever messages are lost, duplicated, delayed or reordered:

- At most one capture has permission to write a span: a permission is granted (`GRANT`) only if
  there is no Primary and no Undetermined capture, and the sink refuses every older permission.
- Every capture that may still hold a span has a role in its row. An orphan becomes Undetermined.
- A dispatch is sent on a change of state. It is sent again only in answer to a counted report of
  the capture that it is for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tablewire.model.columns import U8
from tablewire.model.states import ReplicationState, TableState

Mask = npt.NDArray[np.bool_]
S = ReplicationState
T = TableState


class Role(IntEnum):
    """The role of the reporting capture in the row."""

    NONE = 0
    PRIMARY = 1
    SECONDARY = 2
    UNDETERMINED = 3


class RoleChange(IntEnum):
    """How the role of the reporting capture changes."""

    KEEP = 0
    CLEAR = 1
    TO_PRIMARY = 2  # it writes already: the epoch that it reports is adopted
    TO_SECONDARY = 3
    TO_UNDETERMINED = 4


class Dispatch(IntEnum):
    """The dispatch that is sent because of the report."""

    NOTHING = 0
    PREPARE_REPORTER = 1  # AddTable(prepare) again
    WRITE_REPORTER = 2  # AddTable(write) again, same epoch
    REMOVE_REPORTER = 3
    REMOVE_PRIMARY = 4
    GRANT = 5  # the Secondary becomes the Primary under a new epoch, and is sent AddTable(write)


class Note(IntEnum):
    """What is counted for the operator."""

    NOTHING = 0
    ORPHAN = 1
    TWO_WRITERS = 2  # resolved by the newest assignment_epoch, see replication.py
    REFUSED = 3  # the Secondary gave up during a planned move


KEEP, CLEAR, TO_PRIMARY = RoleChange.KEEP, RoleChange.CLEAR, RoleChange.TO_PRIMARY
TO_SECONDARY, TO_UNDETERMINED = RoleChange.TO_SECONDARY, RoleChange.TO_UNDETERMINED


@dataclass(frozen=True, slots=True)
class Outcome:
    """The effect of a report on the row. state: None = unchanged. checkpoint: whether it counts."""

    state: ReplicationState | None = None
    reporter: RoleChange = KEEP
    dispatch: Dispatch = Dispatch.NOTHING
    checkpoint: bool = False
    note: Note = Note.NOTHING


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold of P, X and U. True = there is one, False = there is none, None = either."""

    primary: bool | None = None
    secondary: bool | None = None
    undetermined: bool | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table."""

    states: tuple[ReplicationState, ...]
    role: Role
    reports: tuple[TableState, ...]
    when: Condition
    then: Outcome
    why: str

    def holds(self, cell: Cell) -> bool:
        when = self.when
        return (
            (cell.state in self.states and cell.role is self.role and cell.reported in self.reports)
            and when.primary in (None, cell.primary)
            and when.secondary in (None, cell.secondary)
            and when.undetermined in (None, cell.undetermined)
        )


Line = tuple[tuple[TableState, ...], Condition, Outcome, str]


def _rules(states: tuple[ReplicationState, ...], role: Role, *lines: Line) -> tuple[Rule, ...]:
    """Return the rules for this role of the reporter. A line is (reports, when, then, why)."""
    return tuple(Rule(states, role, *line) for line in lines)


def _gone(when: Condition, then: Outcome, why: str) -> tuple[Line, Line]:
    """Return the same line for Stopped, with a last checkpoint, and for Absent, without."""
    return ((T.STOPPED,), when, replace(then, checkpoint=True), why), ((T.ABSENT,), when, then, why)


ALWAYS = Condition()
HAS_PRIMARY, NO_PRIMARY = Condition(primary=True), Condition(primary=False)
HAS_SECONDARY = Condition(secondary=True)
NO_OTHER_WRITER = Condition(primary=False, undetermined=False)
GONE = (T.STOPPED, T.ABSENT)
HELD = (T.PREPARING, T.PREPARED, T.REPLICATING)
NOT_REMOVING = (S.ABSENT, S.PREPARE, S.COMMIT, S.REPLICATING)
TWO_WRITERS = Outcome(note=Note.TWO_WRITERS)
GRANT = Dispatch.GRANT
REMOVE_REPORTER = Outcome(dispatch=Dispatch.REMOVE_REPORTER)
WRITES = Outcome(checkpoint=True)

RULES: tuple[Rule, ...] = (
    *_rules(
        (S.PREPARE,),
        Role.SECONDARY,
        ((T.ABSENT,), ALWAYS, Outcome(dispatch=Dispatch.PREPARE_REPORTER), "send prepare again"),
        (
            (T.PREPARED,),
            Condition(primary=True, undetermined=False),
            Outcome(S.COMMIT, dispatch=Dispatch.REMOVE_PRIMARY),
            "it is ready: stop the Primary",
        ),
        (
            (T.PREPARED,),
            Condition(primary=True, undetermined=True),
            Outcome(),
            "it is ready, but could not be promoted while a third capture may hold the span: the Primary continues",
        ),
        (
            (T.PREPARED,),
            Condition(primary=False, undetermined=True),
            Outcome(S.COMMIT),
            "it is ready, but another capture may still write: wait",
        ),
        ((T.PREPARED,), NO_OTHER_WRITER, Outcome(S.COMMIT, dispatch=GRANT), "it is ready and no capture writes: promote it"),
        (
            (T.STOPPING,),
            HAS_PRIMARY,
            Outcome(S.REPLICATING, TO_UNDETERMINED, note=Note.REFUSED),
            "it gives up: the Primary continues",
        ),
        ((T.STOPPING,), ALWAYS, Outcome(S.ABSENT, TO_UNDETERMINED), "it gives up"),
        ((T.STOPPED,), HAS_PRIMARY, Outcome(S.REPLICATING, CLEAR, note=Note.REFUSED), "it gave up: the Primary continues"),
        ((T.STOPPED,), ALWAYS, Outcome(S.ABSENT, CLEAR), "it gave up: schedule the span again"),
    ),
    *_rules(
        (S.PREPARE, S.COMMIT),
        Role.SECONDARY,
        ((T.REPLICATING,), NO_OTHER_WRITER, Outcome(S.REPLICATING, TO_PRIMARY, checkpoint=True), "it is the writer"),
        ((T.REPLICATING,), HAS_PRIMARY, TWO_WRITERS, "two writers"),
    ),
    *_rules(
        (S.COMMIT,),
        Role.SECONDARY,
        ((T.PREPARED,), NO_OTHER_WRITER, Outcome(dispatch=GRANT), "the last capture that might write is gone: promote it"),
        ((T.PREPARING,), ALWAYS, Outcome(S.PREPARE), "it is no longer ready"),
        ((T.STOPPING,), NO_PRIMARY, Outcome(S.ABSENT, TO_UNDETERMINED), "it gives up"),
        ((T.STOPPING,), ALWAYS, Outcome(None, TO_UNDETERMINED), "the report of the Primary decides"),
        (GONE, NO_PRIMARY, Outcome(S.ABSENT, CLEAR), "it gave up: schedule the span again"),
        (GONE, ALWAYS, Outcome(None, CLEAR), "the report of the Primary decides"),
    ),
    *_rules(
        (S.PREPARE,),
        Role.PRIMARY,
        ((T.REPLICATING, T.STOPPING), ALWAYS, WRITES, "it writes"),
        *_gone(HAS_SECONDARY, Outcome(None, CLEAR), "the Secondary continues to prepare"),
        ((T.PREPARING, T.PREPARED), ALWAYS, Outcome(None, TO_UNDETERMINED, Dispatch.REMOVE_REPORTER), "it does not write"),
    ),
    *_rules(
        (S.COMMIT,),
        Role.PRIMARY,
        (
            (T.REPLICATING,),
            HAS_SECONDARY,
            Outcome(dispatch=Dispatch.REMOVE_REPORTER, checkpoint=True),
            "it is to stop: send remove again",
        ),
        ((T.REPLICATING,), ALWAYS, Outcome(S.REPLICATING, checkpoint=True), "it writes: done"),
        ((T.PREPARING, T.PREPARED), HAS_SECONDARY, REMOVE_REPORTER, "it is to stop: send remove again"),
        ((T.PREPARED,), ALWAYS, Outcome(dispatch=Dispatch.WRITE_REPORTER), "it has just been promoted"),
        ((T.PREPARING,), ALWAYS, Outcome(S.PREPARE, TO_SECONDARY), "its permission is void"),
        ((T.STOPPING,), ALWAYS, WRITES, "it is stopping"),
        *_gone(Condition(secondary=True, undetermined=False), Outcome(None, CLEAR, GRANT), "it stopped: promote the Secondary"),
        *_gone(Condition(secondary=False), Outcome(S.ABSENT, CLEAR), "no capture is left: schedule the span again"),
        *_gone(ALWAYS, Outcome(None, CLEAR), "another capture may still write: wait"),
    ),
    *_rules(
        (S.REPLICATING,),
        Role.PRIMARY,
        ((T.REPLICATING, T.STOPPING), ALWAYS, WRITES, "it writes"),
        *_gone(ALWAYS, Outcome(S.ABSENT, CLEAR), "it lost the span: schedule the span again"),
        ((T.PREPARING, T.PREPARED), ALWAYS, Outcome(S.PREPARE, TO_SECONDARY), "it does not write"),
    ),
    *(
        rule
        for role in (Role.PRIMARY, Role.SECONDARY, Role.UNDETERMINED)
        for rule in _rules(
            (S.REMOVING,),
            role,
            (HELD, ALWAYS, REMOVE_REPORTER, "send remove again"),
            (GONE, ALWAYS, Outcome(None, CLEAR), "it is gone; the row is deleted with its last role"),
        )
    ),
    *_rules(
        NOT_REMOVING,
        Role.UNDETERMINED,
        (
            (T.REPLICATING,),
            Condition(primary=False, secondary=True),
            Outcome(S.PREPARE, TO_PRIMARY, checkpoint=True),
            "it is the writer; the Secondary continues to prepare",
        ),
        (
            (T.REPLICATING,),
            Condition(primary=False, secondary=False),
            Outcome(S.REPLICATING, TO_PRIMARY, checkpoint=True),
            "it is the writer",
        ),
        ((T.REPLICATING,), ALWAYS, TWO_WRITERS, "two writers"),
    ),
    *_rules(
        (S.ABSENT,),
        Role.UNDETERMINED,
        (
            (T.PREPARING, T.PREPARED),
            Condition(primary=False, secondary=False),
            Outcome(S.PREPARE, TO_SECONDARY),
            "it is nearly ready: use it",
        ),
    ),
    *_rules(
        NOT_REMOVING,
        Role.UNDETERMINED,
        ((T.PREPARING, T.PREPARED), ALWAYS, REMOVE_REPORTER, "it is not needed"),
        ((T.STOPPED,), ALWAYS, Outcome(None, CLEAR, checkpoint=True), "it stopped"),
        ((T.ABSENT,), ALWAYS, Outcome(None, CLEAR), "it holds nothing"),
    ),
    *_rules(
        tuple(S),
        Role.NONE,
        (
            HELD,
            ALWAYS,
            Outcome(None, TO_UNDETERMINED, Dispatch.REMOVE_REPORTER, note=Note.ORPHAN),
            "an orphan: remove it, and keep it as Undetermined until it is gone",
        ),
        ((T.STOPPING,), ALWAYS, Outcome(None, TO_UNDETERMINED), "it may still write"),
    ),
)

WAIT = Outcome()


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of a row and a report."""

    state: ReplicationState
    role: Role
    reported: TableState
    primary: bool
    secondary: bool
    undetermined: bool


def cells() -> Iterator[Cell]:
    """Yield every combination, including the impossible ones."""
    for state, role, reported, bits in itertools.product(S, Role, T, range(8)):
        yield Cell(state, role, reported, bool(bits & 4), bool(bits & 2), bool(bits & 1))


def impossible(cell: Cell) -> str:
    """Return why a cell cannot occur, "" if it can. The rules are total all the same."""
    if cell.role is Role.PRIMARY and not cell.primary:
        return "the reporter is the Primary, so there is one"
    if cell.role is Role.SECONDARY and not cell.secondary:
        return "the reporter is the Secondary, so there is one"
    if cell.state is S.ABSENT and (cell.primary or cell.secondary):
        return "Absent means that neither role is taken"
    if cell.state is S.PREPARE and not cell.secondary:
        return "Prepare always has a Secondary"
    if cell.state is S.REPLICATING and (cell.secondary or not cell.primary):
        return "Replicating means a Primary and no Secondary"
    if cell.state is S.COMMIT and not (cell.primary or cell.secondary):
        return "Commit always has a Primary or a Secondary"
    return ""


def rule_for(cell: Cell) -> Rule | None:
    """Return the rule that decides a cell; None if there is none."""
    return next((rule for rule in RULES if rule.holds(cell)), None)


@dataclass(frozen=True, slots=True)
class Compiled:
    """The table as an array: the outcome of a cell is `outcomes[code]`."""

    code: U8  # shape (states, roles, reports, 2, 2, 2)
    outcomes: tuple[Outcome, ...]

    def codes(self, state: U8, role: U8, reported: U8, *has_pxu: Mask) -> U8:
        """Return the code of each cell. has_pxu: whether there is a P, an X and a U."""
        codes: U8 = self.code[(state, role, reported, *(has.astype(np.uint8) for has in has_pxu))]
        return codes


def compile_rules() -> Compiled:
    outcomes = [WAIT]
    codes = []
    for cell in cells():
        rule = rule_for(cell)
        outcome = rule.then if rule else WAIT
        if outcome not in outcomes:
            outcomes.append(outcome)
        codes.append(outcomes.index(outcome))
    shape = len(S), len(Role), len(T), 2, 2, 2
    return Compiled(np.array(codes, np.uint8).reshape(shape), tuple(outcomes))


COMPILED = compile_rules()
