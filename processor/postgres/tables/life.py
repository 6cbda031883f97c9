"""The life of one table in this executor, as one literal table: the code, the documentation and the tests are made from it.

    Describing -> Preparing -> Prepared -> Granted -> TakingOver -> Ready <-> Writing
                                                          |           ^  '-> Gathering -> Writing
                                                          '-> AwaitingCopy <-> Copying
    any of them -> (Failing ->) Failed;  any of them -> (Removing ->) Stopped

Threads. The agent's thread prepares, grants and removes, and never waits. The control thread describes, and asks for another
copy. Streams push into the queue, say that the table has caught up, and may fail it. One worker **or** one copy at a time uses
the sink; it begins with TAKE_OVER, WRITE or COPY and ends with exactly one of the inputs that are named after its outcome. In
between, in a state of `BUSY`, all other threads may still bring their inputs, so the end finds Failing or Removing instead.
TableWork (table_work.py) keeps one `Life`, applies inputs under its lock, and never holds the lock during a wait.

Invariants:

- The sink is written only in Writing and Copying, whose data is a `Writer`: the fence in it has been accepted by the sink.
- One worker or copy at a time: a state of `BUSY` is entered only by TAKE_OVER, WRITE and COPY from states that are not busy.
- Stopped means that no write can follow: it is entered from states that are not busy, or by the end of the work.
- The queue is open for a writer only in `ADVANCING`, and closed for good in Stopped.
- The reported checkpoint advances only in `ADVANCING`, where everything at or before the cursor is at the sink, and not while
  another copy is wanted. A table that waits for a copy, or is being copied, keeps its last one.
- A failed table keeps its error until it is removed, and begins nothing. The first error stays.
- After an unsure commit nothing is written before the sink has been asked how far it is.

A rule gives for an input and a state the next state, whether that state gets new data or keeps what it has, and what happens to
the queue. A cell that RULES does not list cannot occur.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeAlias

import numpy as np

from processor.postgres.sinks import Fence, ReloadNeededError
from tablewire.errors import InvariantError
from tablewire.model.columns import U8
from tablewire.model.ids import Ts
from tablewire.model.states import TableState
from tablewire.postgres.catalogue import TableSchema


class State(IntEnum):
    """Where a table is."""

    DESCRIBING = 0  # its shape has not been read yet, and no stream has it
    PREPARING = 1  # attached to the shared stream, not caught up yet
    PREPARED = 2  # caught up (or its queue overflowed without a writer: then it catches up when it writes)
    GRANTED = 3  # it may write; the takeover at the sink is due
    TAKING_OVER = 4  # a worker takes it over for the first time
    AWAITING_COPY = 5  # taken over; must be copied before anything else is written
    COPYING = 6  # a copy is running
    RETAKING = 7  # a worker takes over again while a copy is due: a newer epoch, or it is unknown whether the copy succeeded
    READY = 8  # changes are written as they come; no worker uses it now
    GATHERING = 9  # the same, waiting a moment for a larger batch
    WRITING = 10  # a worker writes, or takes over again, or asks the sink how far it is
    FAILING = 11  # it has failed; the worker or the copy has not ended yet
    FAILED = 12  # waits for the agent to remove it
    REMOVING = 13  # it is being removed; the worker or the copy has not ended yet
    STOPPED = 14  # no write can follow


class TableInput(IntEnum):
    """What happens to a table."""

    DESCRIBED = 0  # control thread: its shape is known
    CAUGHT_UP = 1  # a stream: it has everything up to the shared stream's position
    GRANT = 2  # agent: it may write
    REMOVE = 3  # agent
    FAIL = 4  # any thread but the worker's or the copy's
    WANT_COPY = 5  # worker, control thread or operator: what the sink holds cannot be followed by changes
    TAKE_OVER = 6  # a worker begins, with a fence that the sink has not accepted yet
    WRITE = 7  # a worker begins, with the accepted fence
    COPY = 8  # a copy begins
    DONE = 9  # the worker or the copy ended: the table is complete up to the queue's cursor
    COPY_DUE = 10  # ... it must be copied (again)
    GATHER = 11  # ... the worker waits for a larger batch
    RETRY = 12  # ... it failed temporarily
    ERROR = 13  # ... it failed


class Carry(IntEnum):
    """The data of the next state."""

    KEEP = 0  # the same as before
    NEW = 1  # what comes with the input


class Gate(IntEnum):
    """What happens to the queue."""

    KEEP = 0
    OPEN = 1  # streams may wait for its writer
    PAUSE = 2  # streams do not wait for it
    CLOSE = 3  # nothing is taken from it or put into it again


@dataclass(frozen=True, slots=True)
class New:
    """Nothing is known of the table yet."""


@dataclass(frozen=True, slots=True)
class Described:
    """The table as described at the source."""

    schema: TableSchema


@dataclass(frozen=True, slots=True)
class Retry:
    """at: when failed work may be repeated; since: of the first of these failures, None if there was none. Monotonic seconds."""

    at: float = 0.0
    since: float | None = None


NO_RETRY = Retry()


@dataclass(frozen=True, slots=True)
class Grant:
    """The permission to write after granted_ts; the sink has not accepted a fence yet."""

    schema: TableSchema
    granted_ts: Ts
    retry: Retry = NO_RETRY


@dataclass(frozen=True, slots=True)
class Writer:
    """The right to write: `fence` has been accepted by the sink.

    is_unsure: a commit may have succeeded without a reply. copy_wanted: why the table must be copied
    again; a worker records that at the sink with its next step. copy_after: a copy must use a snapshot
    that was requested later than this (monotonic seconds).
    """

    schema: TableSchema
    granted_ts: Ts
    fence: Fence
    retry: Retry = NO_RETRY
    is_unsure: bool = False
    copy_wanted: ReloadNeededError | None = None
    copy_after: float = 0.0

    def settled(self) -> Writer:
        """Return this writer after work that succeeded."""
        return self if self.retry is NO_RETRY and not self.is_unsure else replace(self, retry=NO_RETRY, is_unsure=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """reported: the state in which the table failed. has_position: everything at or before the queue's cursor is at the sink."""

    error: Exception
    reported: TableState
    has_position: bool


@dataclass(frozen=True, slots=True)
class Leaving:
    """has_position: as in Failure."""

    has_position: bool


Data: TypeAlias = New | Described | Grant | Writer | Failure | Leaving


@dataclass(frozen=True, slots=True)
class TableRule:
    """In these states this input leads to `then` (None: the state does not change)."""

    input: TableInput
    states: tuple[State, ...]
    then: State | None
    carry: Carry
    gate: Gate
    why: str


S = State
I = TableInput  # noqa: E741
KEEP, NEW = Carry.KEEP, Carry.NEW
SAME, OPEN, PAUSE, CLOSE = Gate.KEEP, Gate.OPEN, Gate.PAUSE, Gate.CLOSE

ADVANCING = (S.READY, S.GATHERING, S.WRITING)
COPY_STATES = (S.AWAITING_COPY, S.COPYING, S.RETAKING)
WRITERS = (*COPY_STATES, *ADVANCING)
WORKING = (S.TAKING_OVER, S.COPYING, S.RETAKING, S.WRITING)
BUSY = (*WORKING, S.FAILING, S.REMOVING)
FAILED = (S.FAILING, S.FAILED)
LEAVING = (S.REMOVING, S.STOPPED)
ENDED = (*FAILED, *LEAVING)
UNGRANTED = (S.DESCRIBING, S.PREPARING, S.PREPARED)
GRANTED = (S.GRANTED, S.TAKING_OVER, *WRITERS)
AT_REST = (*UNGRANTED, S.GRANTED, S.AWAITING_COPY, S.READY, S.GATHERING)

RULES: tuple[TableRule, ...] = (
    TableRule(I.DESCRIBED, (S.DESCRIBING,), S.PREPARING, NEW, SAME, "streams may deliver to it"),
    TableRule(I.DESCRIBED, (S.STOPPED,), None, KEEP, SAME, "it was removed meanwhile"),
    TableRule(I.CAUGHT_UP, (S.PREPARING,), S.PREPARED, KEEP, SAME, ""),
    TableRule(I.CAUGHT_UP, (S.PREPARED, *GRANTED), None, KEEP, SAME, "known already"),
    TableRule(I.CAUGHT_UP, ENDED, None, KEEP, SAME, "too late"),
    TableRule(I.GRANT, (S.DESCRIBING, S.PREPARING), None, KEEP, SAME, "refused: the agent asks again"),
    TableRule(I.GRANT, (S.PREPARED,), S.GRANTED, NEW, SAME, "phase two"),
    TableRule(I.GRANT, GRANTED, None, KEEP, SAME, "it has a grant already"),
    TableRule(I.GRANT, ENDED, None, KEEP, SAME, "refused"),
    TableRule(
        I.REMOVE,
        (*UNGRANTED, S.GRANTED, S.AWAITING_COPY, S.READY, S.GATHERING, S.FAILED),
        S.STOPPED,
        NEW,
        CLOSE,
        "no work is running",
    ),
    TableRule(
        I.REMOVE,
        (S.TAKING_OVER, S.COPYING, S.RETAKING, S.WRITING, S.FAILING),
        S.REMOVING,
        NEW,
        PAUSE,
        "the work that is running ends first",
    ),
    TableRule(I.REMOVE, LEAVING, None, KEEP, SAME, "it is being removed already"),
    TableRule(I.FAIL, AT_REST, S.FAILED, NEW, PAUSE, ""),
    TableRule(I.FAIL, WORKING, S.FAILING, NEW, PAUSE, "the work that is running ends first"),
    TableRule(I.FAIL, ENDED, None, KEEP, SAME, "the first error stays, and a removal needs none"),
    TableRule(
        I.WANT_COPY,
        WRITERS,
        None,
        NEW,
        SAME,
        "noted: before a copy begins a newer snapshot is needed, otherwise a worker records it",
    ),
    TableRule(
        I.WANT_COPY,
        (*UNGRANTED, S.GRANTED, S.TAKING_OVER),
        None,
        KEEP,
        SAME,
        "refused: nothing is written yet, the takeover decides",
    ),
    TableRule(I.WANT_COPY, ENDED, None, KEEP, SAME, "refused"),
    TableRule(I.TAKE_OVER, (S.GRANTED,), S.TAKING_OVER, KEEP, SAME, ""),
    TableRule(I.TAKE_OVER, (S.AWAITING_COPY,), S.RETAKING, KEEP, SAME, ""),
    TableRule(I.TAKE_OVER, (S.READY, S.GATHERING), S.WRITING, KEEP, OPEN, ""),
    TableRule(I.TAKE_OVER, (S.COPYING,), None, KEEP, SAME, "the end of the copy has a worker come again"),
    TableRule(I.TAKE_OVER, ENDED, None, KEEP, SAME, "it begins nothing"),
    TableRule(I.WRITE, (S.READY, S.GATHERING), S.WRITING, KEEP, OPEN, ""),
    TableRule(I.WRITE, (S.AWAITING_COPY, S.COPYING), None, KEEP, SAME, "the copy comes first"),
    TableRule(I.COPY, (S.AWAITING_COPY,), S.COPYING, KEEP, SAME, ""),
    TableRule(I.COPY, (S.COPYING, S.RETAKING, *ADVANCING), None, KEEP, SAME, "another thread was faster"),
    TableRule(I.COPY, ENDED, None, KEEP, SAME, "it begins nothing"),
    TableRule(I.DONE, (S.TAKING_OVER, S.RETAKING, S.COPYING), S.READY, NEW, OPEN, ""),
    TableRule(I.DONE, (S.WRITING,), S.READY, NEW, SAME, "the queue may have paused itself at the barrier"),
    TableRule(I.COPY_DUE, WORKING, S.AWAITING_COPY, NEW, PAUSE, ""),
    TableRule(I.GATHER, (S.WRITING,), S.GATHERING, NEW, SAME, ""),
    TableRule(I.RETRY, (S.TAKING_OVER,), S.GRANTED, NEW, PAUSE, ""),
    TableRule(I.RETRY, (S.RETAKING, S.COPYING), S.AWAITING_COPY, NEW, PAUSE, ""),
    TableRule(I.RETRY, (S.WRITING,), S.READY, NEW, PAUSE, ""),
    TableRule(I.ERROR, WORKING, S.FAILED, NEW, PAUSE, ""),
    *(
        rule
        for end in (I.DONE, I.COPY_DUE, I.GATHER, I.RETRY, I.ERROR)
        for rule in (
            TableRule(end, (S.FAILING,), S.FAILED, KEEP, SAME, "the first error stays"),
            TableRule(end, (S.REMOVING,), S.STOPPED, KEEP, CLOSE, "no write can follow"),
        )
    ),
)

STATES: dict[State, tuple[TableState | None, type[Data]]] = {
    S.DESCRIBING: (TableState.PREPARING, New),
    S.PREPARING: (TableState.PREPARING, Described),
    S.PREPARED: (TableState.PREPARED, Described),
    S.GRANTED: (TableState.PREPARED, Grant),
    S.TAKING_OVER: (TableState.PREPARED, Grant),
    S.AWAITING_COPY: (TableState.REPLICATING, Writer),
    S.COPYING: (TableState.REPLICATING, Writer),
    S.RETAKING: (TableState.REPLICATING, Writer),
    S.READY: (TableState.REPLICATING, Writer),
    S.GATHERING: (TableState.REPLICATING, Writer),
    S.WRITING: (TableState.REPLICATING, Writer),
    S.FAILING: (None, Failure),
    S.FAILED: (None, Failure),
    S.REMOVING: (TableState.STOPPING, Leaving),
    S.STOPPED: (TableState.STOPPED, Leaving),
}
"""What is reported in a state (None: what was reported before the failure), and the type of its data."""

IMPOSSIBLE = 255
"""In the compiled arrays: a cell that cannot occur."""


class ImpossibleTableInputError(InvariantError):
    """An input came in a state in which it cannot occur: a bug in Tablewire."""


def _compile() -> tuple[U8, U8, U8]:
    then, carries, gates = (np.full((len(TableInput), len(State)), IMPOSSIBLE, np.uint8) for _ in range(3))
    for rule in RULES:
        for state in rule.states:
            assert then[rule.input, state] == IMPOSSIBLE, f"two rules for {rule.input.name} in {state.name}"
            then[rule.input, state] = state if rule.then is None else rule.then
            carries[rule.input, state] = rule.carry
            gates[rule.input, state] = rule.gate
    return then, carries, gates


THEN, CARRIES, GATES = _compile()
"""THEN[input, state], CARRIES[input, state], GATES[input, state]: the rules as arrays."""

_CELLS = {
    (what, state): (State(THEN[what, state]), Carry(CARRIES[what, state]), Gate(GATES[what, state]))
    for what in TableInput
    for state in State
    if THEN[what, state] != IMPOSSIBLE
}
"""The same for one table at a time: an element of an array costs more than one of a dictionary."""


@dataclass(frozen=True, slots=True)
class Life:
    """A state and its data."""

    state: State
    data: Data

    @property
    def reported(self) -> TableState:
        """The state that the agent reports."""
        return self.data.reported if isinstance(self.data, Failure) else _REPORTED[self.state]

    @property
    def has_position(self) -> bool:
        """Whether everything at or before the queue's cursor is at the sink, so that it may be reported."""
        data = self.data
        if isinstance(data, Failure | Leaving):
            return data.has_position
        return self.state in ADVANCING and isinstance(data, Writer) and data.copy_wanted is None


_REPORTED = {state: reported for state, (reported, _) in STATES.items() if reported is not None}

BEGINNING = Life(S.DESCRIBING, New())


def after(life: Life, what: TableInput, data: Data | None = None) -> tuple[Life, Gate]:
    """Return the life after an input, and what happens to the queue. The same life: the input changes nothing.

    data: for a cell that needs new data; a cell that keeps what it has ignores it. Raise
    ImpossibleTableInputError if the cell cannot occur.
    """
    cell = _CELLS.get((what, life.state))
    if cell is None:
        raise ImpossibleTableInputError(f"{what.name} of a table in state {life.state.name} cannot occur", str(life.data))
    then, carry, gate = cell
    kept = life.data if carry is Carry.KEEP or data is None else data
    if then is life.state and kept is life.data:
        return life, gate
    if type(kept) is not STATES[then][1]:
        raise ImpossibleTableInputError(f"{what.name} of a table in state {life.state.name} has data of another state", str(kept))
    return Life(then, kept), gate
