"""Every cell of the agent's table, by name and on the columns."""

from __future__ import annotations

import numpy as np
import pytest

from processor.core.span_table import SpanTable
from processor.core.table_life import (
    CALL_DUE,
    EFFECTS,
    IMPOSSIBLE,
    REPORTED,
    RULES,
    THEN,
    Call,
    Effect,
    ImpossibleInputError,
    Input,
    Phase,
)
from tablewire.model.messages import DispatchTableRequest
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import DispatchAction, TableState

SPAN = Span(11)
DISPATCHES = (Input.ADD_PREPARE, Input.ADD_WRITE, Input.REMOVE)
CALLED_OFF = (Phase.REMOVING, Phase.STOPPING, Phase.STOPPED)

# The table of the design, cell by cell: (what comes, where the span is) -> where it is then. Everything else cannot happen.
CELLS: dict[tuple[Input, Phase], Phase] = {
    (Input.ADD_PREPARE, Phase.ABSENT): Phase.ADDING,
    (Input.ADD_PREPARE, Phase.ADDING): Phase.ADDING,
    (Input.ADD_PREPARE, Phase.PREPARING): Phase.PREPARING,
    (Input.ADD_PREPARE, Phase.PREPARED): Phase.PREPARED,
    (Input.ADD_PREPARE, Phase.GRANTED): Phase.GRANTED,
    (Input.ADD_PREPARE, Phase.STARTING): Phase.STARTING,
    (Input.ADD_PREPARE, Phase.REPLICATING): Phase.REPLICATING,
    (Input.ADD_PREPARE, Phase.REMOVING): Phase.REMOVING,
    (Input.ADD_PREPARE, Phase.STOPPING): Phase.STOPPING,
    (Input.ADD_PREPARE, Phase.STOPPED): Phase.STOPPED,
    (Input.ADD_WRITE, Phase.ABSENT): Phase.ABSENT,
    (Input.ADD_WRITE, Phase.ADDING): Phase.ADDING,
    (Input.ADD_WRITE, Phase.PREPARING): Phase.PREPARING,
    (Input.ADD_WRITE, Phase.PREPARED): Phase.GRANTED,
    (Input.ADD_WRITE, Phase.GRANTED): Phase.GRANTED,
    (Input.ADD_WRITE, Phase.STARTING): Phase.STARTING,
    (Input.ADD_WRITE, Phase.REPLICATING): Phase.REPLICATING,
    (Input.ADD_WRITE, Phase.REMOVING): Phase.REMOVING,
    (Input.ADD_WRITE, Phase.STOPPING): Phase.STOPPING,
    (Input.ADD_WRITE, Phase.STOPPED): Phase.STOPPED,
    (Input.REMOVE, Phase.ABSENT): Phase.ABSENT,
    (Input.REMOVE, Phase.ADDING): Phase.REMOVING,
    (Input.REMOVE, Phase.PREPARING): Phase.REMOVING,
    (Input.REMOVE, Phase.PREPARED): Phase.REMOVING,
    (Input.REMOVE, Phase.GRANTED): Phase.REMOVING,
    (Input.REMOVE, Phase.STARTING): Phase.REMOVING,
    (Input.REMOVE, Phase.REPLICATING): Phase.REMOVING,
    (Input.REMOVE, Phase.REMOVING): Phase.REMOVING,
    (Input.REMOVE, Phase.STOPPING): Phase.STOPPING,
    (Input.REMOVE, Phase.STOPPED): Phase.STOPPED,
    (Input.TAKEN, Phase.ADDING): Phase.PREPARING,
    (Input.TAKEN, Phase.GRANTED): Phase.STARTING,
    (Input.TAKEN, Phase.REMOVING): Phase.STOPPING,
    (Input.FINISHED, Phase.PREPARING): Phase.PREPARED,
    (Input.FINISHED, Phase.STARTING): Phase.REPLICATING,
    (Input.FINISHED, Phase.STOPPING): Phase.STOPPED,
    (Input.BEHIND, Phase.GRANTED): Phase.REMOVING,
    (Input.FAILED, Phase.ADDING): Phase.REMOVING,
    (Input.FAILED, Phase.PREPARING): Phase.REMOVING,
    (Input.FAILED, Phase.PREPARED): Phase.REMOVING,
    (Input.FAILED, Phase.GRANTED): Phase.REMOVING,
    (Input.FAILED, Phase.STARTING): Phase.REMOVING,
    (Input.FAILED, Phase.REPLICATING): Phase.REMOVING,
    (Input.FAILED, Phase.REMOVING): Phase.REMOVING,
    (Input.FAILED, Phase.STOPPING): Phase.STOPPING,
    (Input.ACKED, Phase.STOPPED): Phase.ABSENT,
    (Input.ACKED, Phase.ABSENT): Phase.ABSENT,
}
ALL_CELLS = [(what, phase) for what in Input for phase in Phase]


def request(action: DispatchAction, ts: int = 100, epoch: int = 0, span: Span = SPAN) -> DispatchTableRequest:
    return DispatchTableRequest(
        numbers=np.array([1], np.uint32),
        spans=SpanBlock.of([span]),
        actions=np.array([action], np.uint8),
        checkpoint_ts=np.array([ts], np.uint64),
        resolved_ts=np.array([ts], np.uint64),
        assignment_epochs=np.array([epoch], np.uint64),
    )


def span_table_in(phase: Phase) -> tuple[SpanTable, int]:
    """SpanTable whose only span has come to this phase in the proper way, and has been reported as number 1."""
    table = SpanTable()
    table.take(request(DispatchAction.REMOVE if phase is Phase.ABSENT else DispatchAction.ADD_PREPARE))
    row = table.row_of(SPAN)
    assert row is not None
    if phase > Phase.ADDING:
        table.apply(Input.TAKEN, [row])
    if phase > Phase.PREPARING:
        table.apply(Input.FINISHED, [row])
    if phase > Phase.PREPARED:
        table.take(request(DispatchAction.ADD_WRITE, epoch=5))
    if phase > Phase.GRANTED:
        table.apply(Input.TAKEN, [row])
    if phase > Phase.STARTING:
        table.apply(Input.FINISHED, [row])
    if phase > Phase.REPLICATING:
        table.take(request(DispatchAction.REMOVE))
    if phase > Phase.REMOVING:
        table.apply(Input.TAKEN, [row])
    if phase > Phase.STOPPING:
        table.advance_checkpoints([row], [150])
        table.apply(Input.FINISHED, [row])
    table.stamp[row] = 1
    table.state_stamp[row] = 1
    table.has_changes = False
    assert table.phase[row] == phase
    table.check()
    return table, row


def happen(table: SpanTable, row: int, what: Input) -> None:
    if what in DISPATCHES:
        table.take(request(DispatchAction(what), epoch=6 if what is Input.ADD_WRITE else 0))
    elif what is Input.FAILED:
        table.fail(row, "it broke")
    elif what is Input.ACKED:
        table.acknowledge(1)
    else:
        table.apply(what, [row])


def test_the_compiled_arrays_are_the_table() -> None:
    """Each listed cell leads to its phase, every other one is impossible."""
    for what, phase in ALL_CELLS:
        then = CELLS.get((what, phase))
        assert THEN[what, phase] == (IMPOSSIBLE if then is None else then), (what.name, phase.name)
        assert (EFFECTS[what, phase] == IMPOSSIBLE) == (then is None)


@pytest.mark.parametrize(("what", "phase"), sorted(CELLS), ids=lambda value: value.name)
def test_each_cell_on_the_columns(what: Input, phase: Phase) -> None:
    """A span that has really come to a phase reaches the phase of the cell, and keeps its bookkeeping right."""
    table, row = span_table_in(phase)
    happen(table, row, what)
    table.check()
    assert table.phase[row] == CELLS[what, phase]


@pytest.mark.parametrize(
    ("what", "phase"),
    [cell for cell in ALL_CELLS if cell not in CELLS and cell[0] in (Input.TAKEN, Input.FINISHED, Input.BEHIND, Input.FAILED)],
    ids=lambda value: value.name,
)
def test_each_impossible_cell_tells_its_story(what: Input, phase: Phase) -> None:
    """The outcome of a call that was not due is a bug of ours: it is raised, with span and phase."""
    table, row = span_table_in(phase)
    with pytest.raises(ImpossibleInputError, match=f"{what.name} of span 11 in phase {phase.name}"):
        happen(table, row, what)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.STOPPED, Phase.ABSENT)])
def test_an_acknowledgement_touches_only_what_has_ended(phase: Phase) -> None:
    """A span that is alive is not forgotten because the owner has acknowledged it."""
    table, row = span_table_in(phase)
    table.acknowledge(1)
    assert table.phase[row] == phase
    assert not table.has_changes


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("what", DISPATCHES)
def test_a_dispatch_is_always_followed_by_a_report(what: Input, phase: Phase) -> None:
    """Even where nothing changes: the owner waits for a report that shows that the dispatch was taken in."""
    table, row = span_table_in(phase)
    happen(table, row, what)
    assert table.has_changes
    assert table.stamp[row] > 1


@pytest.mark.parametrize("phase", CALLED_OFF)
def test_nothing_starts_while_a_span_is_on_its_way_out(phase: Phase) -> None:
    """An Add that comes then leaves no trace that could start it later."""
    table, row = span_table_in(phase)
    table.take(request(DispatchAction.ADD_PREPARE, ts=500))
    table.take(request(DispatchAction.ADD_WRITE, ts=500, epoch=9))
    assert (row in table.kept_grants, row in table.to_raise) == (False, False)
    assert table.granted_epoch[row] == 5


def test_stopped_is_only_reported_after_its_call_has_finished() -> None:
    """Only the phase after the executor's confirmation is reported as Stopped."""
    assert [phase for phase in Phase if REPORTED[phase] is TableState.STOPPED] == [Phase.STOPPED]
    into = [(rule.input, phase) for rule in RULES for phase in rule.phases if rule.then is Phase.STOPPED]
    assert into == [(Input.FINISHED, Phase.STOPPING)]


def test_writing_is_only_reached_from_prepared() -> None:
    """Granted, the only door to writing, has one way in for a dispatch, and one for a grant that was kept."""
    into = [(rule.input, phase) for rule in RULES for phase in rule.phases if rule.then is Phase.GRANTED]
    assert into == [(Input.ADD_WRITE, Phase.PREPARED)]
    assert [rule.phases for rule in RULES if rule.effect is Effect.USE_KEPT_GRANT] == [(Phase.PREPARING,)]


def test_every_phase_with_a_due_call_has_its_outcomes() -> None:
    """A call that can be due can be taken or finished, and can fail."""
    for phase in Phase:
        is_due = CALL_DUE[phase] is not Call.NONE
        assert ((Input.TAKEN, phase) in CELLS or (Input.FINISHED, phase) in CELLS) == is_due
        assert not is_due or (Input.FAILED, phase) in CELLS


def test_a_span_named_twice_in_one_dispatch_is_taken_in_order() -> None:
    """Prepare and remove of one span in one message: it is being removed."""
    table = SpanTable()
    first, second = request(DispatchAction.ADD_PREPARE), request(DispatchAction.REMOVE)
    table.take(
        DispatchTableRequest(
            numbers=np.concatenate([first.numbers, second.numbers]),
            spans=SpanBlock.of([SPAN, SPAN]),
            actions=np.concatenate([first.actions, second.actions]),
            checkpoint_ts=np.concatenate([first.checkpoint_ts, second.checkpoint_ts]),
            resolved_ts=np.concatenate([first.resolved_ts, second.resolved_ts]),
            assignment_epochs=np.concatenate([first.assignment_epochs, second.assignment_epochs]),
        )
    )
    table.check()
    assert table.rows_in(Phase.REMOVING) == [table.row_of(SPAN)]


def test_a_number_that_is_given_to_another_span_leaves_the_former() -> None:
    """The former span is reported by name from then on, so that the owner cannot mistake one for the other."""
    table, row = span_table_in(Phase.REPLICATING)
    table.take(request(DispatchAction.ADD_PREPARE, span=Span(12)))
    table.check()
    other = table.row_of(Span(12))
    assert (table.number[row], table.number[other]) == (0, 1)


def test_rows_are_used_again() -> None:
    """A million lives of one span need one row."""
    table = SpanTable()
    for number in range(1, 200):
        table.take(request(DispatchAction.ADD_PREPARE))
        row = table.row_of(SPAN)
        assert row is not None
        table.fail(row, "no")
        table.apply(Input.TAKEN, [row])
        table.apply(Input.FINISHED, [row])
        table.stamp[row] = table.state_stamp[row] = number
        table.acknowledge(number)
        table.stamp[row] = number
        table.acknowledge(number)
        table.check()
    assert table.size == 1
    assert table.row_of(SPAN) is None
    assert table.held() == (0, 0)
