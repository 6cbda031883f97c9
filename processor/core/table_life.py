"""The life of one span at an agent, as one literal table: the engine, the documentation and the test matrix are made from it.

    Absent -> Adding -> Preparing -> Prepared -> Granted -> Starting -> Replicating -> Removing -> Stopping -> Stopped -> Absent
              '------- Preparing'    '------------ Prepared -------'                   '----- Stopping ----'
                                                                                        (what is reported, if it differs)

A phase is finer than the state that is reported: it also determines which call of the executor is due (`CALL_DUE`). Each call is
repeated, tick by tick, until it has taken effect. An input is a dispatch of the owner, the outcome of a call, or the owner's
acknowledgement of a report. RULES gives for each input and phase the next phase and what is noted besides (`Effect`). A cell
that RULES does not list cannot occur: dispatches are listed for every phase, and the outcome of a call only comes in a phase in
which that call is due.

Invariants:

- A span is written only from Granted, and Granted is reached only from Prepared (never from Absent).
- Stopped is reported only after the executor has confirmed that no write can follow. A call that fails while the span is being
  removed therefore changes nothing: it is repeated.
- A dispatch never starts anything while the span is being removed (Removing, Stopping, Stopped): the owner sends it again after
  the report of Absent.
- A dispatch is always followed by a report of its spans, whatever it changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from tablewire.model.columns import U8
from tablewire.model.states import DispatchAction, TableState


class Phase(IntEnum):
    """Where a span is."""

    ABSENT = 0  # not here; a row in this phase only lives until the owner has acknowledged it
    ADDING = 1  # add_table_span(prepare) has not been accepted yet
    PREPARING = 2  # it was accepted; is it finished?
    PREPARED = 3  # ready to write, waits for a grant
    GRANTED = 4  # add_table_span(write) has not been accepted yet
    STARTING = 5  # it was accepted; is it finished?
    REPLICATING = 6
    REMOVING = 7  # remove_table_span has not been accepted yet
    STOPPING = 8  # it was accepted; is it finished?
    STOPPED = 9  # no write can follow; kept until the owner has acknowledged it


class Input(IntEnum):
    """What happens to a span. The first three are the values of DispatchAction."""

    ADD_PREPARE = DispatchAction.ADD_PREPARE
    ADD_WRITE = DispatchAction.ADD_WRITE
    REMOVE = DispatchAction.REMOVE
    TAKEN = 3  # the executor accepted the call that was due
    FINISHED = 4  # ... and has finished it
    BEHIND = 5  # the grant lies before the point from which the span was prepared, and the sink is not further
    FAILED = 6  # a call raised, the span failed in the background, or the sink refused its epoch
    ACKED = 7  # the owner has acknowledged a report of the present state


class Effect(IntEnum):
    """What is noted besides the new phase (`SpanTable` has a method for each)."""

    NOTHING = 0
    START = 1  # a new life: prepare from the dispatch's checkpoint
    GRANT = 2  # write from the dispatch's checkpoint under its epoch
    KEEP_GRANT = 3  # the same, once the span is prepared
    RENEW_GRANT = 4  # a newer epoch replaces the one that the executor has not accepted yet
    RAISE_EPOCH = 5  # a newer epoch is to be raised at the sink; an older or equal one is ignored
    CANCEL_GRANT = 6  # a grant that was kept, and an epoch that was to be raised, are dropped
    USE_KEPT_GRANT = 7  # a grant that was kept takes effect: the span becomes Granted
    WRITE = 8  # the epoch is in force from here on
    FORGET = 9  # this life is over; report Absent
    FREE = 10  # nothing is left to report of the span


class Call(IntEnum):
    """The call of the executor that is due in a phase."""

    NONE = 0
    ADD_PREPARE = 1
    IS_PREPARED = 2
    ADD_WRITE = 3
    IS_WRITING = 4
    REMOVE = 5
    IS_REMOVED = 6


@dataclass(frozen=True, slots=True)
class InputRule:
    """In these phases this input leads to `then` (None: the phase does not change) and has this effect."""

    input: Input
    phases: tuple[Phase, ...]
    then: Phase | None
    effect: Effect
    why: str


P = Phase
I = Input  # noqa: E741
E = Effect
HELD = (P.ADDING, P.PREPARING, P.PREPARED, P.GRANTED, P.STARTING, P.REPLICATING)
LEAVING = (P.REMOVING, P.STOPPING, P.STOPPED)

RULES: tuple[InputRule, ...] = (
    InputRule(I.ADD_PREPARE, (P.ABSENT,), P.ADDING, E.START, "phase one"),
    InputRule(I.ADD_PREPARE, HELD, None, E.NOTHING, "it is here already"),
    InputRule(I.ADD_PREPARE, LEAVING, None, E.NOTHING, "dropped: the owner sends it again after the report of Absent"),
    InputRule(I.ADD_WRITE, (P.ABSENT,), None, E.NOTHING, "refused: never start to write from Absent"),
    InputRule(I.ADD_WRITE, (P.ADDING, P.PREPARING), None, E.KEEP_GRANT, "kept until it is prepared"),
    InputRule(I.ADD_WRITE, (P.PREPARED,), P.GRANTED, E.GRANT, "phase two"),
    InputRule(I.ADD_WRITE, (P.GRANTED,), None, E.RENEW_GRANT, "the executor has not accepted the former one yet"),
    InputRule(I.ADD_WRITE, (P.STARTING, P.REPLICATING), None, E.RAISE_EPOCH, "it writes already"),
    InputRule(I.ADD_WRITE, LEAVING, None, E.NOTHING, "dropped: the owner sends it again after the report of Absent"),
    InputRule(I.REMOVE, (P.ABSENT,), None, E.NOTHING, "it is gone already"),
    InputRule(I.REMOVE, HELD, P.REMOVING, E.CANCEL_GRANT, "a pending Add is dropped, Remove takes its place"),
    InputRule(I.REMOVE, LEAVING, None, E.NOTHING, "it is being removed already"),
    InputRule(I.TAKEN, (P.ADDING,), P.PREPARING, E.NOTHING, ""),
    InputRule(I.TAKEN, (P.GRANTED,), P.STARTING, E.WRITE, "from here on the executor may write"),
    InputRule(I.TAKEN, (P.REMOVING,), P.STOPPING, E.NOTHING, ""),
    InputRule(I.FINISHED, (P.PREPARING,), P.PREPARED, E.USE_KEPT_GRANT, ""),
    InputRule(I.FINISHED, (P.STARTING,), P.REPLICATING, E.NOTHING, ""),
    InputRule(I.FINISHED, (P.STOPPING,), P.STOPPED, E.NOTHING, ""),
    InputRule(I.BEHIND, (P.GRANTED,), P.REMOVING, E.CANCEL_GRANT, "it will be prepared again, from the right place"),
    InputRule(I.FAILED, HELD, P.REMOVING, E.CANCEL_GRANT, "the error concerns this span only"),
    InputRule(I.FAILED, (P.REMOVING, P.STOPPING), None, E.NOTHING, "Stopped must be true: the removal is repeated"),
    InputRule(I.ACKED, (P.STOPPED,), P.ABSENT, E.FORGET, "the owner may add it again now"),
    InputRule(I.ACKED, (P.ABSENT,), None, E.FREE, ""),
)

PHASES: dict[Phase, tuple[TableState, Call]] = {
    P.ABSENT: (TableState.ABSENT, Call.NONE),
    P.ADDING: (TableState.PREPARING, Call.ADD_PREPARE),
    P.PREPARING: (TableState.PREPARING, Call.IS_PREPARED),
    P.PREPARED: (TableState.PREPARED, Call.NONE),
    P.GRANTED: (TableState.PREPARED, Call.ADD_WRITE),
    P.STARTING: (TableState.PREPARED, Call.IS_WRITING),
    P.REPLICATING: (TableState.REPLICATING, Call.NONE),
    P.REMOVING: (TableState.STOPPING, Call.REMOVE),
    P.STOPPING: (TableState.STOPPING, Call.IS_REMOVED),
    P.STOPPED: (TableState.STOPPED, Call.NONE),
}
"""The state that is reported in a phase, and the call of the executor that is due."""

REPORTED = {phase: state for phase, (state, _) in PHASES.items()}
CALL_DUE = {phase: call for phase, (_, call) in PHASES.items()}

OUTCOME = {call: I.FINISHED if call.name.startswith("IS_") else I.TAKEN for call in Call}
"""The input when a call has returned True. An IS_ call asks whether the one before it has finished."""

IMPOSSIBLE = 255
"""In the compiled arrays: a cell that cannot occur."""


def _compile() -> tuple[U8, U8]:
    then = np.full((len(Input), len(Phase)), IMPOSSIBLE, np.uint8)
    effects = np.full((len(Input), len(Phase)), IMPOSSIBLE, np.uint8)
    for rule in RULES:
        for phase in rule.phases:
            assert then[rule.input, phase] == IMPOSSIBLE, f"two rules for {rule.input.name} in {phase.name}"
            then[rule.input, phase] = phase if rule.then is None else rule.then
            effects[rule.input, phase] = rule.effect
    return then, effects


THEN, EFFECTS = _compile()
"""THEN[input, phase], EFFECTS[input, phase]: the rules as arrays."""

STATE_CODES: U8 = np.array([REPORTED[phase].code for phase in Phase], np.uint8)
"""STATE_CODES[phase]: the code of the TableState that is reported."""

CALLS: U8 = np.array([CALL_DUE[phase] for phase in Phase], np.uint8)
"""CALLS[phase]: the Call that is due."""

OBSERVED: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.array(
    [phase in (P.PREPARING, P.PREPARED, P.GRANTED, P.STARTING, P.REPLICATING) for phase in Phase]
)
"""OBSERVED[phase]: the executor has accepted the span and is asked for its status."""


class ImpossibleInputError(Exception):
    """An input came in a phase in which it cannot occur: a bug in Tablewire."""
