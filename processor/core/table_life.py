"""One table's life at an agent, as one literal table: the engine, the documentation and the test matrix are made from it.

    Absent -> Adding -> Preparing -> Prepared -> Granted -> Starting -> Replicating -> Removing -> Stopping -> Stopped -> Absent
              '------- Preparing'    '------------ Prepared -------'                   '----- Stopping ----'
                                                                                        (what is reported, if it differs)

A phase is finer than what is reported: it also says which call of the executor is due (`CALL_DUE`). Each call is repeated, tick
by tick, until it has taken effect. What happens to a span is an event: a dispatch of the owner, the outcome of a call, or the
owner's acknowledgement of a report. A cell that RULES does not list cannot happen: dispatches are listed for every phase, and the
outcome of a call only comes in a phase in which that call is due.

Invariants:

- A span is written only from Granted, and Granted is reached only from Prepared (never from Absent).
- Stopped is said only after the executor has said that no write can follow. A call that fails while the span is being removed
  therefore changes nothing: it is repeated.
- A dispatch never starts anything while the span is on its way out (Removing, Stopping, Stopped): the owner asks again when it
  is told Absent.
- Whatever a dispatch does or does not do, the span is reported afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from tablewire.model.columns import U8
from tablewire.model.states import DispatchAction, TableState


class Phase(IntEnum):
    """Where a span is."""

    ABSENT = 0  # not here; a row in this phase only lives until the owner has been told
    ADDING = 1  # add_table_span(prepare) is to be taken
    PREPARING = 2  # it was taken; is it finished?
    PREPARED = 3  # ready to write, waits for a grant
    GRANTED = 4  # add_table_span(write) is to be taken
    STARTING = 5  # it was taken; is it finished?
    REPLICATING = 6
    REMOVING = 7  # remove_table_span is to be taken
    STOPPING = 8  # it was taken; is it finished?
    STOPPED = 9  # no write can follow; kept until the owner has heard of it


class Input(IntEnum):
    """What happens to a span. The first three are the values of DispatchAction."""

    ADD_PREPARE = DispatchAction.ADD_PREPARE
    ADD_WRITE = DispatchAction.ADD_WRITE
    REMOVE = DispatchAction.REMOVE
    TAKEN = 3  # the executor took the call that was due
    FINISHED = 4  # ... and has finished it
    BEHIND = 5  # the grant lies before the point from which the span was prepared, and the sink is not further
    FAILED = 6  # a call raised, the span failed in the background, or the sink refuses its epoch
    ACKED = 7  # the owner has heard of the present state


class Effect(IntEnum):
    """What is to be noted besides the new phase."""

    NOTHING = 0
    START = 1  # a new life: prepare from the dispatch's checkpoint
    GRANT = 2  # write from the dispatch's checkpoint under its epoch
    KEEP_GRANT = 3  # the same, once the span is prepared
    RENEW_GRANT = 4  # a newer epoch takes the place of the one that the executor has not taken yet
    RAISE = 5  # a newer epoch is to be raised at the sink; an older or the same one is ignored
    CALL_OFF = 6  # what was kept for later is dropped
    READY = 7  # a grant that was kept is given now
    WRITE = 8  # the epoch is in force from here on
    END = 9  # the last checkpoint is known
    FORGET = 10  # the life is over; say Absent
    FREE = 11  # nothing is left to be said of the span


class Call(IntEnum):
    """The call of the executor that a phase waits for."""

    NONE = 0
    ADD_PREPARE = 1
    IS_PREPARED = 2
    ADD_WRITE = 3
    IS_WRITING = 4
    REMOVE = 5
    IS_REMOVED = 6


@dataclass(frozen=True, slots=True)
class Rule:
    """In these phases this event leads to `then` (None: the span stays where it is) and `effect`."""

    event: Input
    phases: tuple[Phase, ...]
    then: Phase | None
    effect: Effect
    why: str


P = Phase
E = Input
D = Effect
HELD = (P.ADDING, P.PREPARING, P.PREPARED, P.GRANTED, P.STARTING, P.REPLICATING)
LEAVING = (P.REMOVING, P.STOPPING, P.STOPPED)

RULES: tuple[Rule, ...] = (
    Rule(E.ADD_PREPARE, (P.ABSENT,), P.ADDING, D.START, "phase one"),
    Rule(E.ADD_PREPARE, HELD, None, D.NOTHING, "it is here already"),
    Rule(E.ADD_PREPARE, LEAVING, None, D.NOTHING, "dropped: the owner asks again when it is told Absent"),
    Rule(E.ADD_WRITE, (P.ABSENT,), None, D.NOTHING, "refused: never start to write from Absent"),
    Rule(E.ADD_WRITE, (P.ADDING, P.PREPARING), None, D.KEEP_GRANT, "kept until it is prepared"),
    Rule(E.ADD_WRITE, (P.PREPARED,), P.GRANTED, D.GRANT, "phase two"),
    Rule(E.ADD_WRITE, (P.GRANTED,), None, D.RENEW_GRANT, "the executor has not taken the former one yet"),
    Rule(E.ADD_WRITE, (P.STARTING, P.REPLICATING), None, D.RAISE, "it writes already"),
    Rule(E.ADD_WRITE, LEAVING, None, D.NOTHING, "dropped: the owner asks again when it is told Absent"),
    Rule(E.REMOVE, (P.ABSENT,), None, D.NOTHING, "it is gone already"),
    Rule(E.REMOVE, HELD, P.REMOVING, D.CALL_OFF, "a pending Add is dropped, Remove takes its place"),
    Rule(E.REMOVE, LEAVING, None, D.NOTHING, "it is on its way out already"),
    Rule(E.TAKEN, (P.ADDING,), P.PREPARING, D.NOTHING, ""),
    Rule(E.TAKEN, (P.GRANTED,), P.STARTING, D.WRITE, "from here on the executor may write"),
    Rule(E.TAKEN, (P.REMOVING,), P.STOPPING, D.NOTHING, ""),
    Rule(E.FINISHED, (P.PREPARING,), P.PREPARED, D.READY, ""),
    Rule(E.FINISHED, (P.STARTING,), P.REPLICATING, D.NOTHING, ""),
    Rule(E.FINISHED, (P.STOPPING,), P.STOPPED, D.END, ""),
    Rule(E.BEHIND, (P.GRANTED,), P.REMOVING, D.CALL_OFF, "it will be prepared again, from the right place"),
    Rule(E.FAILED, HELD, P.REMOVING, D.CALL_OFF, "the error is this span's alone"),
    Rule(E.FAILED, (P.REMOVING, P.STOPPING), None, D.NOTHING, "Stopped must be true: the removal is tried again"),
    Rule(E.ACKED, (P.STOPPED,), P.ABSENT, D.FORGET, "the owner may ask again now"),
    Rule(E.ACKED, (P.ABSENT,), None, D.FREE, ""),
)

REPORTED: dict[Phase, TableState] = {
    P.ABSENT: TableState.ABSENT,
    P.ADDING: TableState.PREPARING,
    P.PREPARING: TableState.PREPARING,
    P.PREPARED: TableState.PREPARED,
    P.GRANTED: TableState.PREPARED,
    P.STARTING: TableState.PREPARED,
    P.REPLICATING: TableState.REPLICATING,
    P.REMOVING: TableState.STOPPING,
    P.STOPPING: TableState.STOPPING,
    P.STOPPED: TableState.STOPPED,
}

CALL_DUE: dict[Phase, Call] = {
    P.ABSENT: Call.NONE,
    P.ADDING: Call.ADD_PREPARE,
    P.PREPARING: Call.IS_PREPARED,
    P.PREPARED: Call.NONE,
    P.GRANTED: Call.ADD_WRITE,
    P.STARTING: Call.IS_WRITING,
    P.REPLICATING: Call.NONE,
    P.REMOVING: Call.REMOVE,
    P.STOPPING: Call.IS_REMOVED,
    P.STOPPED: Call.NONE,
}

IMPOSSIBLE = 255
"""In the compiled arrays: a cell that cannot happen."""


def _compile() -> tuple[U8, U8]:
    then = np.full((len(Input), len(Phase)), IMPOSSIBLE, np.uint8)
    effects = np.full((len(Input), len(Phase)), IMPOSSIBLE, np.uint8)
    for rule in RULES:
        for phase in rule.phases:
            assert then[rule.event, phase] == IMPOSSIBLE, f"two rules for {rule.event.name} in {phase.name}"
            then[rule.event, phase] = phase if rule.then is None else rule.then
            effects[rule.event, phase] = rule.effect
    return then, effects


THEN, EFFECTS = _compile()
"""THEN[event, phase], EFFECTS[event, phase]: the rules as arrays."""

STATE_CODES: U8 = np.array([REPORTED[phase].code for phase in Phase], np.uint8)
"""STATE_CODES[phase]: the code of the TableState that is reported."""

UNSETTLED: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.array([CALL_DUE[phase] is not Call.NONE for phase in Phase])
"""UNSETTLED[phase]: a call of the executor is due."""

OBSERVED: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.array(
    [phase in (P.PREPARING, P.PREPARED, P.GRANTED, P.STARTING, P.REPLICATING) for phase in Phase]
)
"""OBSERVED[phase]: the executor has taken the span and is asked for its status."""


class ImpossibleInputError(Exception):
    """An event came in a phase in which it cannot happen: a bug of ours."""
