"""Every cell of the agent's table, by name and on the columns."""

from __future__ import annotations

import numpy as np
import pytest

from processor.core.span_table import Holdings
from processor.core.table_life import (
    CALL_DUE,
    DEEDS,
    IMPOSSIBLE,
    REPORTED,
    RULES,
    THEN,
    Call,
    Deed,
    Event,
    ImpossibleEventError,
    Phase,
)
from tablewire.model.messages import DispatchTableRequest
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import DispatchAction, TableState

SPAN = Span(11)
DISPATCHES = (Event.ADD_PREPARE, Event.ADD_WRITE, Event.REMOVE)
CALLED_OFF = (Phase.REMOVING, Phase.STOPPING, Phase.STOPPED)

# The table of the design, cell by cell: (what comes, where the span is) -> where it is then. Everything else cannot happen.
CELLS: dict[tuple[Event, Phase], Phase] = {
    (Event.ADD_PREPARE, Phase.ABSENT): Phase.ADDING,
    (Event.ADD_PREPARE, Phase.ADDING): Phase.ADDING,
    (Event.ADD_PREPARE, Phase.PREPARING): Phase.PREPARING,
    (Event.ADD_PREPARE, Phase.PREPARED): Phase.PREPARED,
    (Event.ADD_PREPARE, Phase.GRANTED): Phase.GRANTED,
    (Event.ADD_PREPARE, Phase.STARTING): Phase.STARTING,
    (Event.ADD_PREPARE, Phase.REPLICATING): Phase.REPLICATING,
    (Event.ADD_PREPARE, Phase.REMOVING): Phase.REMOVING,
    (Event.ADD_PREPARE, Phase.STOPPING): Phase.STOPPING,
    (Event.ADD_PREPARE, Phase.STOPPED): Phase.STOPPED,
    (Event.ADD_WRITE, Phase.ABSENT): Phase.ABSENT,
    (Event.ADD_WRITE, Phase.ADDING): Phase.ADDING,
    (Event.ADD_WRITE, Phase.PREPARING): Phase.PREPARING,
    (Event.ADD_WRITE, Phase.PREPARED): Phase.GRANTED,
    (Event.ADD_WRITE, Phase.GRANTED): Phase.GRANTED,
    (Event.ADD_WRITE, Phase.STARTING): Phase.STARTING,
    (Event.ADD_WRITE, Phase.REPLICATING): Phase.REPLICATING,
    (Event.ADD_WRITE, Phase.REMOVING): Phase.REMOVING,
    (Event.ADD_WRITE, Phase.STOPPING): Phase.STOPPING,
    (Event.ADD_WRITE, Phase.STOPPED): Phase.STOPPED,
    (Event.REMOVE, Phase.ABSENT): Phase.ABSENT,
    (Event.REMOVE, Phase.ADDING): Phase.REMOVING,
    (Event.REMOVE, Phase.PREPARING): Phase.REMOVING,
    (Event.REMOVE, Phase.PREPARED): Phase.REMOVING,
    (Event.REMOVE, Phase.GRANTED): Phase.REMOVING,
    (Event.REMOVE, Phase.STARTING): Phase.REMOVING,
    (Event.REMOVE, Phase.REPLICATING): Phase.REMOVING,
    (Event.REMOVE, Phase.REMOVING): Phase.REMOVING,
    (Event.REMOVE, Phase.STOPPING): Phase.STOPPING,
    (Event.REMOVE, Phase.STOPPED): Phase.STOPPED,
    (Event.TAKEN, Phase.ADDING): Phase.PREPARING,
    (Event.TAKEN, Phase.GRANTED): Phase.STARTING,
    (Event.TAKEN, Phase.REMOVING): Phase.STOPPING,
    (Event.FINISHED, Phase.PREPARING): Phase.PREPARED,
    (Event.FINISHED, Phase.STARTING): Phase.REPLICATING,
    (Event.FINISHED, Phase.STOPPING): Phase.STOPPED,
    (Event.BEHIND, Phase.GRANTED): Phase.REMOVING,
    (Event.FAILED, Phase.ADDING): Phase.REMOVING,
    (Event.FAILED, Phase.PREPARING): Phase.REMOVING,
    (Event.FAILED, Phase.PREPARED): Phase.REMOVING,
    (Event.FAILED, Phase.GRANTED): Phase.REMOVING,
    (Event.FAILED, Phase.STARTING): Phase.REMOVING,
    (Event.FAILED, Phase.REPLICATING): Phase.REMOVING,
    (Event.FAILED, Phase.REMOVING): Phase.REMOVING,
    (Event.FAILED, Phase.STOPPING): Phase.STOPPING,
    (Event.ACKED, Phase.STOPPED): Phase.ABSENT,
    (Event.ACKED, Phase.ABSENT): Phase.ABSENT,
}
ALL_CELLS = [(event, phase) for event in Event for phase in Phase]


def request(action: DispatchAction, ts: int = 100, epoch: int = 0, span: Span = SPAN) -> DispatchTableRequest:
    return DispatchTableRequest(
        numbers=np.array([1], np.uint32),
        spans=SpanBlock.of([span]),
        actions=np.array([action], np.uint8),
        checkpoint_ts=np.array([ts], np.uint64),
        resolved_ts=np.array([ts], np.uint64),
        assignment_epochs=np.array([epoch], np.uint64),
    )


def holdings_in(phase: Phase) -> tuple[Holdings, int]:
    """Holdings whose only span has come to this phase in the proper way, and has been reported as number 1."""
    holdings = Holdings()
    holdings.take(request(DispatchAction.REMOVE if phase is Phase.ABSENT else DispatchAction.ADD_PREPARE))
    row = holdings.row_of(SPAN)
    assert row is not None
    if phase > Phase.ADDING:
        holdings.happened(Event.TAKEN, [row])
    if phase > Phase.PREPARING:
        holdings.happened(Event.FINISHED, [row])
    if phase > Phase.PREPARED:
        holdings.take(request(DispatchAction.ADD_WRITE, epoch=5))
    if phase > Phase.GRANTED:
        holdings.happened(Event.TAKEN, [row])
    if phase > Phase.STARTING:
        holdings.happened(Event.FINISHED, [row])
    if phase > Phase.REPLICATING:
        holdings.take(request(DispatchAction.REMOVE))
    if phase > Phase.REMOVING:
        holdings.happened(Event.TAKEN, [row])
    if phase > Phase.STOPPING:
        holdings.ended([row], [150])
    holdings.stamp[row] = 1
    holdings.told[row] = 1
    holdings.has_news = False
    assert holdings.phase[row] == phase
    holdings.check()
    return holdings, row


def happen(holdings: Holdings, row: int, event: Event) -> None:
    if event in DISPATCHES:
        holdings.take(request(DispatchAction(event), epoch=6 if event is Event.ADD_WRITE else 0))
    elif event is Event.FAILED:
        holdings.fail(row, "it broke")
    elif event is Event.ACKED:
        holdings.acknowledge(1)
    elif event is Event.FINISHED and holdings.phase[row] == Phase.STOPPING:
        holdings.ended([row], [150])
    else:
        holdings.happened(event, [row])


def test_the_compiled_arrays_are_the_table() -> None:
    """Each listed cell leads where it says, every other one is impossible."""
    for event, phase in ALL_CELLS:
        then = CELLS.get((event, phase))
        assert THEN[event, phase] == (IMPOSSIBLE if then is None else then), (event.name, phase.name)
        assert (DEEDS[event, phase] == IMPOSSIBLE) == (then is None)


@pytest.mark.parametrize(("event", "phase"), sorted(CELLS), ids=lambda value: value.name)
def test_each_cell_on_the_columns(event: Event, phase: Phase) -> None:
    """A span that has really come to a phase goes where the cell says, and keeps its bookkeeping right."""
    holdings, row = holdings_in(phase)
    happen(holdings, row, event)
    holdings.check()
    assert holdings.phase[row] == CELLS[event, phase]


@pytest.mark.parametrize(
    ("event", "phase"),
    [cell for cell in ALL_CELLS if cell not in CELLS and cell[0] in (Event.TAKEN, Event.FINISHED, Event.BEHIND, Event.FAILED)],
    ids=lambda value: value.name,
)
def test_each_impossible_cell_tells_its_story(event: Event, phase: Phase) -> None:
    """The outcome of a call that was not due is a bug of ours: it is raised, with span and phase."""
    holdings, row = holdings_in(phase)
    with pytest.raises(ImpossibleEventError, match=f"{event.name} of span 11 in phase {phase.name}"):
        happen(holdings, row, event)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.STOPPED, Phase.ABSENT)])
def test_an_acknowledgement_touches_only_what_has_ended(phase: Phase) -> None:
    """A span that is alive is not forgotten because the owner has heard of it."""
    holdings, row = holdings_in(phase)
    holdings.acknowledge(1)
    assert holdings.phase[row] == phase
    assert not holdings.has_news


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("event", DISPATCHES)
def test_a_dispatch_is_always_followed_by_a_report(event: Event, phase: Phase) -> None:
    """Even where nothing changes: the owner waits for a report that shows that the dispatch was taken in."""
    holdings, row = holdings_in(phase)
    happen(holdings, row, event)
    assert holdings.has_news
    assert holdings.stamp[row] > 1


@pytest.mark.parametrize("phase", CALLED_OFF)
def test_nothing_starts_while_a_span_is_on_its_way_out(phase: Phase) -> None:
    """An Add that comes then leaves no trace that could start it later."""
    holdings, row = holdings_in(phase)
    holdings.take(request(DispatchAction.ADD_PREPARE, ts=500))
    holdings.take(request(DispatchAction.ADD_WRITE, ts=500, epoch=9))
    assert (row in holdings.kept_grants, row in holdings.to_raise) == (False, False)
    assert holdings.granted_epoch[row] == 5


def test_stopped_is_only_reported_after_its_call_has_finished() -> None:
    """No phase before the executor's last word is reported as Stopped, and only that one is."""
    assert [phase for phase in Phase if REPORTED[phase] is TableState.STOPPED] == [Phase.STOPPED]
    into = [(rule.event, phase) for rule in RULES for phase in rule.phases if rule.then is Phase.STOPPED]
    assert into == [(Event.FINISHED, Phase.STOPPING)]


def test_writing_is_only_reached_from_prepared() -> None:
    """Granted, the only door to writing, has one way in for a dispatch, and one for a grant that was kept."""
    into = [(rule.event, phase) for rule in RULES for phase in rule.phases if rule.then is Phase.GRANTED]
    assert into == [(Event.ADD_WRITE, Phase.PREPARED)]
    assert [rule.phases for rule in RULES if rule.deed is Deed.READY] == [(Phase.PREPARING,)]


def test_every_phase_with_a_due_call_has_its_outcomes() -> None:
    """A call that can be due can be taken or finished, and can fail."""
    for phase in Phase:
        is_due = CALL_DUE[phase] is not Call.NONE
        assert ((Event.TAKEN, phase) in CELLS or (Event.FINISHED, phase) in CELLS) == is_due
        assert not is_due or (Event.FAILED, phase) in CELLS


def test_a_span_named_twice_in_one_dispatch_is_taken_in_order() -> None:
    """Prepare and remove of one span in one message: it is being removed."""
    holdings = Holdings()
    first, second = request(DispatchAction.ADD_PREPARE), request(DispatchAction.REMOVE)
    holdings.take(
        DispatchTableRequest(
            numbers=np.concatenate([first.numbers, second.numbers]),
            spans=SpanBlock.of([SPAN, SPAN]),
            actions=np.concatenate([first.actions, second.actions]),
            checkpoint_ts=np.concatenate([first.checkpoint_ts, second.checkpoint_ts]),
            resolved_ts=np.concatenate([first.resolved_ts, second.resolved_ts]),
            assignment_epochs=np.concatenate([first.assignment_epochs, second.assignment_epochs]),
        )
    )
    holdings.check()
    assert holdings.rows_in(Phase.REMOVING) == [holdings.row_of(SPAN)]


def test_a_number_that_is_given_to_another_span_leaves_the_former() -> None:
    """The former span is reported by name from then on, so that the owner cannot mistake one for the other."""
    holdings, row = holdings_in(Phase.REPLICATING)
    holdings.take(request(DispatchAction.ADD_PREPARE, span=Span(12)))
    holdings.check()
    other = holdings.row_of(Span(12))
    assert (holdings.number[row], holdings.number[other]) == (0, 1)


def test_rows_are_used_again() -> None:
    """A million lives of one span need one row."""
    holdings = Holdings()
    for number in range(1, 200):
        holdings.take(request(DispatchAction.ADD_PREPARE))
        row = holdings.row_of(SPAN)
        assert row is not None
        holdings.fail(row, "no")
        holdings.happened(Event.TAKEN, [row])
        holdings.ended([row], [0])
        holdings.stamp[row] = holdings.told[row] = number
        holdings.acknowledge(number)
        holdings.stamp[row] = number
        holdings.acknowledge(number)
        holdings.check()
    assert holdings.size == 1
    assert holdings.row_of(SPAN) is None
    assert holdings.held() == (0, 0)
