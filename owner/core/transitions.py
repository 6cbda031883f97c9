"""The rules of replication, as one literal table: the engine, the documentation and the test matrix are made from it.

A capture reports a state of a span; the row has a replication state, the capture has a role in it, and the row has or has not
a Primary (P), a Secondary (X) and Undetermined captures (U) - of the reporter itself only the *other* Undetermined count.
The first rule whose condition holds says what happens. A cell without a rule waits.

Invariants that the rules keep, whatever is lost, doubled, late or reordered:

- at most one capture has a permission to write a span: a grant (`GRANT`) is given only when there is no Primary and nobody is
  Undetermined, and the sink refuses every older permission;
- whoever may still hold a span has a role in its row, so that nobody is forgotten (an orphan becomes Undetermined);
- a dispatch is sent on a change of state, and again only in answer to a counted report of the capture that it is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tablewire.model.states import ReplicationState, TableState

S = ReplicationState
T = TableState


class Role(IntEnum):
    """What the reporting capture is to the row."""

    NONE = 0
    PRIMARY = 1
    SECONDARY = 2
    UNDETERMINED = 3


class RoleChange(IntEnum):
    """What becomes of the reporter."""

    KEEP = 0
    CLEAR = 1
    TO_PRIMARY = 2  # it writes already: its own epoch is adopted
    TO_SECONDARY = 3
    TO_UNDETERMINED = 4


class Dispatch(IntEnum):
    """What is sent because of the report."""

    NOTHING = 0
    PREPARE_REPORTER = 1  # AddTable(prepare) again
    WRITE_REPORTER = 2  # AddTable(write) again, same epoch
    REMOVE_REPORTER = 3
    REMOVE_PRIMARY = 4
    GRANT = 5  # the Secondary is promoted: it is the Primary now, with a new epoch, and is told to write


class Note(IntEnum):
    """What an operator wants counted."""

    NOTHING = 0
    ORPHAN = 1
    TWO_WRITERS = 2  # resolved by the newest assignment_epoch, see replication.py
    REFUSED = 3  # the Secondary gave up during a planned move


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a report does to the row. state None = stays. checkpoint = the report's checkpoint counts."""

    state: ReplicationState | None = None
    reporter: RoleChange = RoleChange.KEEP
    dispatch: Dispatch = Dispatch.NOTHING
    checkpoint: bool = False
    note: Note = Note.NOTHING


@dataclass(frozen=True, slots=True)
class Condition:
    """Of P, X, U: True = must be there, False = must not, None = either."""

    primary: bool | None = None
    secondary: bool | None = None
    undetermined: bool | None = None

    def holds(self, primary: bool, secondary: bool, undetermined: bool) -> bool:
        return (
            self.primary in (None, primary) and self.secondary in (None, secondary) and self.undetermined in (None, undetermined)
        )


@dataclass(frozen=True, slots=True)
class Rule:
    states: tuple[ReplicationState, ...]
    role: Role
    reports: tuple[TableState, ...]
    when: Condition
    then: Outcome
    why: str


def _outcome(
    state: ReplicationState | None = None,
    reporter: RoleChange = RoleChange.KEEP,
    dispatch: Dispatch = Dispatch.NOTHING,
    checkpoint: bool = False,
    note: Note = Note.NOTHING,
) -> Outcome:
    return Outcome(state, reporter, dispatch, checkpoint, note)


def _when(primary: bool | None = None, secondary: bool | None = None, undetermined: bool | None = None) -> Condition:
    return Condition(primary, secondary, undetermined)


ALWAYS = Condition()
CLEAR, TO_PRIMARY = RoleChange.CLEAR, RoleChange.TO_PRIMARY
TO_SECONDARY, TO_UNDETERMINED = RoleChange.TO_SECONDARY, RoleChange.TO_UNDETERMINED
GONE = (T.STOPPED, T.ABSENT)
HELD = (T.PREPARING, T.PREPARED, T.REPLICATING)
NOT_REMOVING = (S.ABSENT, S.PREPARE, S.COMMIT, S.REPLICATING)
TWO_WRITERS = _outcome(note=Note.TWO_WRITERS)


def _gone(state: ReplicationState, role: Role, when: Condition, then: Outcome, why: str) -> tuple[Rule, Rule]:
    """Stopped brings a last checkpoint, Absent brings none; else they are the same."""
    stopped = Outcome(then.state, then.reporter, then.dispatch, True, then.note)
    return Rule((state,), role, (T.STOPPED,), when, stopped, why), Rule((state,), role, (T.ABSENT,), when, then, why)


_PREPARE_SECONDARY = (
    Rule((S.PREPARE,), Role.SECONDARY, (T.ABSENT,), ALWAYS, _outcome(dispatch=Dispatch.PREPARE_REPORTER), "ask again"),
    Rule(
        (S.PREPARE,),
        Role.SECONDARY,
        (T.PREPARED,),
        _when(primary=True, undetermined=False),
        _outcome(S.COMMIT, dispatch=Dispatch.REMOVE_PRIMARY),
        "ready: the Primary is to stop",
    ),
    Rule(
        (S.PREPARE,),
        Role.SECONDARY,
        (T.PREPARED,),
        _when(primary=True, undetermined=True),
        _outcome(),
        "ready, but a third may still hold it, so that it could not be promoted: the Primary goes on",
    ),
    Rule(
        (S.PREPARE,),
        Role.SECONDARY,
        (T.PREPARED,),
        _when(primary=False, undetermined=True),
        _outcome(S.COMMIT),
        "ready, but somebody may still write: wait",
    ),
    Rule(
        (S.PREPARE,),
        Role.SECONDARY,
        (T.PREPARED,),
        _when(primary=False, undetermined=False),
        _outcome(S.COMMIT, dispatch=Dispatch.GRANT),
        "ready, and nobody writes: promote",
    ),
    Rule(
        (S.PREPARE,),
        Role.SECONDARY,
        (T.STOPPING,),
        _when(primary=True),
        _outcome(S.REPLICATING, TO_UNDETERMINED, note=Note.REFUSED),
        "it gives up: the Primary goes on",
    ),
    Rule((S.PREPARE,), Role.SECONDARY, (T.STOPPING,), ALWAYS, _outcome(S.ABSENT, TO_UNDETERMINED), "it gives up"),
    Rule(
        (S.PREPARE,),
        Role.SECONDARY,
        (T.STOPPED,),
        _when(primary=True),
        _outcome(S.REPLICATING, CLEAR, note=Note.REFUSED),
        "it gave up: the Primary goes on",
    ),
    Rule((S.PREPARE,), Role.SECONDARY, (T.STOPPED,), ALWAYS, _outcome(S.ABSENT, CLEAR), "it gave up: schedule again"),
)

_SECONDARY_WRITES = (
    Rule(
        (S.PREPARE, S.COMMIT),
        Role.SECONDARY,
        (T.REPLICATING,),
        _when(primary=False, undetermined=False),
        _outcome(S.REPLICATING, TO_PRIMARY, checkpoint=True),
        "it is the writer",
    ),
    Rule((S.PREPARE, S.COMMIT), Role.SECONDARY, (T.REPLICATING,), _when(primary=True), TWO_WRITERS, "two writers"),
)

_COMMIT_SECONDARY = (
    Rule(
        (S.COMMIT,),
        Role.SECONDARY,
        (T.PREPARED,),
        _when(primary=False, undetermined=False),
        _outcome(dispatch=Dispatch.GRANT),
        "the last who might write is gone: promote",
    ),
    Rule((S.COMMIT,), Role.SECONDARY, (T.PREPARING,), ALWAYS, _outcome(S.PREPARE), "it is not ready any more"),
    Rule((S.COMMIT,), Role.SECONDARY, (T.STOPPING,), _when(primary=False), _outcome(S.ABSENT, TO_UNDETERMINED), "gives up"),
    Rule((S.COMMIT,), Role.SECONDARY, (T.STOPPING,), ALWAYS, _outcome(None, TO_UNDETERMINED), "the Primary's report decides"),
    Rule((S.COMMIT,), Role.SECONDARY, GONE, _when(primary=False), _outcome(S.ABSENT, CLEAR), "it gave up: schedule again"),
    Rule((S.COMMIT,), Role.SECONDARY, GONE, ALWAYS, _outcome(None, CLEAR), "the Primary's report decides"),
)

_PREPARE_PRIMARY = (
    Rule((S.PREPARE,), Role.PRIMARY, (T.REPLICATING, T.STOPPING), ALWAYS, _outcome(checkpoint=True), "it writes"),
    *_gone(S.PREPARE, Role.PRIMARY, _when(secondary=True), _outcome(None, CLEAR), "the Secondary goes on preparing"),
    Rule(
        (S.PREPARE,),
        Role.PRIMARY,
        (T.PREPARING, T.PREPARED),
        ALWAYS,
        _outcome(None, TO_UNDETERMINED, Dispatch.REMOVE_REPORTER),
        "it does not write",
    ),
)

_COMMIT_PRIMARY = (
    Rule(
        (S.COMMIT,),
        Role.PRIMARY,
        (T.REPLICATING,),
        _when(secondary=True),
        _outcome(dispatch=Dispatch.REMOVE_REPORTER, checkpoint=True),
        "it is to stop: say so again",
    ),
    Rule((S.COMMIT,), Role.PRIMARY, (T.REPLICATING,), ALWAYS, _outcome(S.REPLICATING, checkpoint=True), "it writes: done"),
    Rule(
        (S.COMMIT,),
        Role.PRIMARY,
        (T.PREPARING, T.PREPARED),
        _when(secondary=True),
        _outcome(dispatch=Dispatch.REMOVE_REPORTER),
        "it is to stop: say so again",
    ),
    Rule((S.COMMIT,), Role.PRIMARY, (T.PREPARED,), ALWAYS, _outcome(dispatch=Dispatch.WRITE_REPORTER), "just promoted"),
    Rule((S.COMMIT,), Role.PRIMARY, (T.PREPARING,), ALWAYS, _outcome(S.PREPARE, TO_SECONDARY), "its grant is void"),
    Rule((S.COMMIT,), Role.PRIMARY, (T.STOPPING,), ALWAYS, _outcome(checkpoint=True), "it is stopping"),
    *_gone(
        S.COMMIT,
        Role.PRIMARY,
        _when(secondary=True, undetermined=False),
        _outcome(None, CLEAR, Dispatch.GRANT),
        "it stopped: promote",
    ),
    *_gone(S.COMMIT, Role.PRIMARY, _when(secondary=False), _outcome(S.ABSENT, CLEAR), "nobody is left: schedule again"),
    *_gone(S.COMMIT, Role.PRIMARY, ALWAYS, _outcome(None, CLEAR), "somebody may still write: wait"),
)

_REPLICATING_PRIMARY = (
    Rule((S.REPLICATING,), Role.PRIMARY, (T.REPLICATING, T.STOPPING), ALWAYS, _outcome(checkpoint=True), "it writes"),
    *_gone(S.REPLICATING, Role.PRIMARY, ALWAYS, _outcome(S.ABSENT, CLEAR), "it lost the span: schedule again"),
    Rule(
        (S.REPLICATING,),
        Role.PRIMARY,
        (T.PREPARING, T.PREPARED),
        ALWAYS,
        _outcome(S.PREPARE, TO_SECONDARY),
        "it does not write",
    ),
)

_REMOVING = tuple(
    rule
    for role in (Role.PRIMARY, Role.SECONDARY, Role.UNDETERMINED)
    for rule in (
        Rule((S.REMOVING,), role, HELD, ALWAYS, _outcome(dispatch=Dispatch.REMOVE_REPORTER), "say it again"),
        Rule((S.REMOVING,), role, GONE, ALWAYS, _outcome(None, CLEAR), "gone; the row goes with the last one"),
    )
)

_UNDETERMINED = (
    Rule(
        NOT_REMOVING,
        Role.UNDETERMINED,
        (T.REPLICATING,),
        _when(primary=False, secondary=True),
        _outcome(S.PREPARE, TO_PRIMARY, checkpoint=True),
        "it is the writer; the Secondary goes on preparing",
    ),
    Rule(
        NOT_REMOVING,
        Role.UNDETERMINED,
        (T.REPLICATING,),
        _when(primary=False, secondary=False),
        _outcome(S.REPLICATING, TO_PRIMARY, checkpoint=True),
        "it is the writer",
    ),
    Rule(NOT_REMOVING, Role.UNDETERMINED, (T.REPLICATING,), ALWAYS, TWO_WRITERS, "two writers"),
    Rule(
        (S.ABSENT,),
        Role.UNDETERMINED,
        (T.PREPARING, T.PREPARED),
        _when(primary=False, secondary=False),
        _outcome(S.PREPARE, TO_SECONDARY),
        "it is nearly ready: use it",
    ),
    Rule(
        NOT_REMOVING,
        Role.UNDETERMINED,
        (T.PREPARING, T.PREPARED),
        ALWAYS,
        _outcome(dispatch=Dispatch.REMOVE_REPORTER),
        "it is not needed",
    ),
    Rule(NOT_REMOVING, Role.UNDETERMINED, (T.STOPPED,), ALWAYS, _outcome(None, CLEAR, checkpoint=True), "it stopped"),
    Rule(NOT_REMOVING, Role.UNDETERMINED, (T.ABSENT,), ALWAYS, _outcome(None, CLEAR), "it holds nothing"),
)

_NO_ROLE = (
    Rule(
        tuple(S),
        Role.NONE,
        HELD,
        ALWAYS,
        _outcome(None, TO_UNDETERMINED, Dispatch.REMOVE_REPORTER, note=Note.ORPHAN),
        "an orphan: remove it, and remember it",
    ),
    Rule(tuple(S), Role.NONE, (T.STOPPING,), ALWAYS, _outcome(None, TO_UNDETERMINED), "it may still write"),
)

RULES: tuple[Rule, ...] = (
    *_PREPARE_SECONDARY,
    *_SECONDARY_WRITES,
    *_COMMIT_SECONDARY,
    *_PREPARE_PRIMARY,
    *_COMMIT_PRIMARY,
    *_REPLICATING_PRIMARY,
    *_REMOVING,
    *_UNDETERMINED,
    *_NO_ROLE,
)

WAIT = Outcome()


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of what a report can meet."""

    state: ReplicationState
    role: Role
    reported: TableState
    primary: bool
    secondary: bool
    undetermined: bool


def cells() -> Iterator[Cell]:
    """Every combination, the impossible ones too."""
    for state in S:
        for role in Role:
            for reported in T:
                for bits in range(8):
                    yield Cell(state, role, reported, bool(bits & 4), bool(bits & 2), bool(bits & 1))


def impossible(cell: Cell) -> str:
    """Why a cell cannot occur, empty when it can. The rules are still total: an impossible cell waits or falls under a rule."""
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
    """The rule that decides a cell; None = it waits."""
    for rule in RULES:
        if (
            cell.state in rule.states
            and cell.role is rule.role
            and cell.reported in rule.reports
            and rule.when.holds(cell.primary, cell.secondary, cell.undetermined)
        ):
            return rule
    return None


@dataclass(frozen=True, slots=True)
class Compiled:
    """The table as arrays: `code[key]` leads to one distinct outcome; key as `key_of` makes it."""

    code: npt.NDArray[np.uint8]
    outcomes: tuple[Outcome, ...]


def key_of(
    state: npt.NDArray[np.uint8],
    role: npt.NDArray[np.uint8],
    reported: npt.NDArray[np.uint8],
    primary: npt.NDArray[np.bool_],
    secondary: npt.NDArray[np.bool_],
    undetermined: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """The position of each cell in `Compiled.code`; all of one shape (n,)."""
    key = state.astype(np.int64)
    for part, size in ((role, len(Role)), (reported, len(T)), (primary, 2), (secondary, 2), (undetermined, 2)):
        key = key * size + part
    return key


def compile_rules() -> Compiled:
    outcomes: list[Outcome] = [WAIT]
    codes = []
    for cell in cells():
        rule = rule_for(cell)
        outcome = rule.then if rule else WAIT
        if outcome not in outcomes:
            outcomes.append(outcome)
        codes.append(outcomes.index(outcome))
    return Compiled(np.array(codes, np.uint8), tuple(outcomes))


COMPILED = compile_rules()
