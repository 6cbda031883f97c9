"""The states of a changefeed: each state with each event."""

from __future__ import annotations

import msgspec
import pytest

from owner.changefeed.store import TRANSITIONS, ChangefeedEvent, ChangefeedRefusedError, Next, step
from tablewire.etcd import records as registry
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState

# One row a state, one column an event. "!" = refused, "+" = a new start at a higher epoch.
MATRIX = """
          error     recovered fatal     target_reached pause     resume    resync    remove
normal    warning   normal    failed    finished       stopped   !         normal+   removed
warning   warning   normal    failed    finished       stopped   !         normal+   removed
failed    failed    failed    failed    failed         stopped   normal+   normal+   removed
stopped   stopped   stopped   stopped   stopped        !         normal+   normal+   removed
finished  finished  finished  finished  finished       !         !         !         removed
removed   removed   removed   removed   removed        !         !         !         removed
"""


def _cells() -> list[tuple[ChangefeedState, ChangefeedEvent, str]]:
    header, *rows = (line.split() for line in MATRIX.strip().splitlines())
    return [
        (ChangefeedState(row[0]), ChangefeedEvent(event), cell)
        for row in rows
        for event, cell in zip(header, row[1:], strict=True)
    ]


def _info(state: ChangefeedState, error: str = "") -> ChangefeedInfo:
    common = {"source_uri": "counter:///a", "sink_uri": "file:///b", "tables": ["*"], "created_at": registry.now()}
    return ChangefeedInfo(id="cf", state=state, epoch=7, error=error, **common)


def test_the_table_is_complete() -> None:
    """Every state has an outcome for every event."""
    assert set(TRANSITIONS) == {(state, event) for state in ChangefeedState for event in ChangefeedEvent}
    assert len(_cells()) == len(TRANSITIONS)


@pytest.mark.parametrize(("state", "event", "cell"), _cells())
def test_each_cell(state: ChangefeedState, event: ChangefeedEvent, cell: str) -> None:
    """The next state, the epoch and the refusals are those of the matrix above."""
    before = _info(state)
    if cell == "!":
        with pytest.raises(ChangefeedRefusedError, match=f"changefeed default/cf: cannot {event}: it "):
            step(before, event)
        return
    after = step(before, event, revision=3)
    assert after.state == cell.rstrip("+")
    assert after.epoch == (8 if cell.endswith("+") else 7)


def test_a_restart_is_above_every_former_epoch() -> None:
    """A restart uses the revision of etcd if it is larger than the previous epoch."""
    assert step(_info(ChangefeedState.STOPPED), ChangefeedEvent.RESUME, revision=5000).epoch == 5000


def test_the_error_goes_when_it_is_over() -> None:
    """Warning keeps the text of its error, and recovered clears it."""
    warned = step(_info(ChangefeedState.NORMAL), ChangefeedEvent.ERROR, error="no route")
    assert (warned.state, warned.error) == (ChangefeedState.WARNING, "no route")
    assert step(warned, ChangefeedEvent.RECOVERED).error == ""


@pytest.mark.parametrize("event", [ChangefeedEvent.ERROR, ChangefeedEvent.FATAL, ChangefeedEvent.RECOVERED])
@pytest.mark.parametrize("state", [state for state in ChangefeedState if not state.runs])
def test_a_late_event_of_a_run_changes_nothing(state: ChangefeedState, event: ChangefeedEvent) -> None:
    """A changefeed that does not run keeps its text too."""
    before = _info(state, "the reason")
    assert step(before, event, error="late") is before


def test_a_removal_that_failed_says_why() -> None:
    """A removed changefeed keeps the error of a drop that failed."""
    assert step(_info(ChangefeedState.REMOVED), ChangefeedEvent.REMOVE, error="slot in use").error == "slot in use"


def test_only_what_ran_before_restarts() -> None:
    """Only resume and resync raise the epoch."""
    restarts = {event for (_, event), outcome in TRANSITIONS.items() if isinstance(outcome, Next) and outcome.restarts}
    assert restarts == {ChangefeedEvent.RESUME, ChangefeedEvent.RESYNC}


def test_a_resync_forgets_the_progress_and_copies() -> None:
    """The start position is unknown again, tables are copied even after --no-snapshot, and an earlier status does not count."""
    before = msgspec.structs.replace(_info(ChangefeedState.FAILED, "lost"), start_ts=50, initial_snapshot=False)
    after = step(before, ChangefeedEvent.RESYNC, revision=3)
    assert (after.start_ts, after.initial_snapshot, after.generation, after.error) == (0, True, 1, "")
    assert step(before, ChangefeedEvent.RESUME, revision=3).generation == 0
