"""Every cell of the table of a table's life, by name and on a TableWork, and the invariants that the table keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from processor.postgres.sinks import Fence, LostCommitsError, ReloadNeededError, SinkSession, SinkUnavailableError, TakeoverResult
from processor.postgres.source.pgoutput import Part, Relation, Transaction
from processor.postgres.tables.ends import IDLE, End, copy_due, gathering, retry_after
from processor.postgres.tables.life import (
    ADVANCING,
    BUSY,
    ENDED,
    GATES,
    IMPOSSIBLE,
    RULES,
    STATES,
    THEN,
    Gate,
    Grant,
    ImpossibleTableInputError,
    State,
    TableInput,
    Writer,
)
from processor.postgres.tables.queues import Budget, TableQueue
from processor.postgres.tables.steps import step
from processor.postgres.tables.table_work import TableServices, TableWork
from tablewire.errors import OperatingError
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.postgres.catalogue import TableSchema

# What comes (rows) in which state (columns) -> the next state; `=` stays, `-` cannot occur.
MATRIX = """
          De Pr Pd Gr Ta Aw Co Re Rd Ga Wr Fg Fd Rm St
DESCRIBED Pr -  -  -  -  -  -  -  -  -  -  -  -  -  =
CAUGHT_UP -  Pd =  =  =  =  =  =  =  =  =  =  =  =  =
GRANT     =  =  Gr =  =  =  =  =  =  =  =  =  =  =  =
REMOVE    St St St St Rm St Rm Rm St St Rm Rm St =  =
FAIL      Fd Fd Fd Fd Fg Fd Fg Fg Fd Fd Fg =  =  =  =
WANT_COPY =  =  =  =  =  =  =  =  =  =  =  =  =  =  =
TAKE_OVER -  -  -  Ta -  Re =  -  Wr Wr -  =  =  =  =
WRITE     -  -  -  -  -  =  =  -  Wr Wr -  -  -  -  -
COPY      -  -  -  -  -  Co =  =  =  =  =  =  =  =  =
DONE      -  -  -  -  Rd -  Rd Rd -  -  Rd Fd -  St -
COPY_DUE  -  -  -  -  Aw -  Aw Aw -  -  Aw Fd -  St -
GATHER    -  -  -  -  -  -  -  -  -  -  Ga Fd -  St -
RETRY     -  -  -  -  Gr -  Aw Aw -  -  Rd Fd -  St -
ERROR     -  -  -  -  Fd -  Fd Fd -  -  Fd Fd -  St -
"""
SHORT = dict(zip(MATRIX.split("\n")[1].split(), State, strict=True))
CELLS = {
    (TableInput[name], state): state if word == "=" else SHORT[word]
    for name, *words in map(str.split, MATRIX.strip().split("\n")[1:])
    for state, word in zip(State, words, strict=True)
    if word != "-"
}
ALL_CELLS = [(what, state) for what in TableInput for state in State]

SCHEMA = TableSchema(
    table_id=7, schema="public", name="t", replica_identity="d", has_key=True, primary_key=("id",), identity=("id",), columns=()
)
FENCE = Fence(1, 1, 1)
GRANTED_TS = 100
TABLE_ERROR = OperatingError("the first error")


class Sink(SinkSession):
    """A sink with prepared answers, which keeps what it was asked."""

    def __init__(self, found: TakeoverResult | None = None) -> None:
        self.found = found or TakeoverResult(GRANTED_TS, False)
        self.calls: list[str] = []
        self.error: OperatingError | None = None

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: int, wants_snapshot: bool) -> TakeoverResult:
        self.calls.append(f"take over {fence.assignment_epoch}")
        if self.error is not None:
            raise self.error
        return self.found

    def request_copy(self, schema: TableSchema, fence: Fence, makes_copies: bool) -> None:
        self.calls.append("request copy")
        if self.error is not None:
            raise self.error

    def position(self, schema: TableSchema, fence: Fence) -> int:
        self.calls.append("position")
        return self.found.position


class Services:
    """What a table asks of its executor; the shared stream is at 1000."""

    def __init__(self) -> None:
        self.wakes = 0
        self.is_released = False

    def of(self, wants_snapshot: bool = True) -> TableServices:
        def wake_agent() -> None:
            self.wakes += 1

        def released(_: TableWork) -> None:
            self.is_released = True

        return TableServices(
            1000,
            15.0,
            wants_snapshot,
            submit=lambda _: None,
            submit_later=lambda _, __: None,
            wake_agent=wake_agent,
            wake_control=lambda: None,
            released=released,
            shared_position=lambda _: 1000,
        )


def new_table(wants_snapshot: bool = True, services: Services | None = None) -> TableWork:
    queue = TableQueue(10_000, Budget(100_000), 50)
    table = TableWork(Span(7), queue, (services or Services()).of(wants_snapshot))
    table.set_epoch(FENCE)
    return table


def table_in(state: State, sink: Sink | None = None) -> TableWork:
    """A table that has come to this state by the calls that the executor, a worker and a copy make."""
    table = new_table()
    copies = state in (State.AWAITING_COPY, State.COPYING, State.RETAKING)
    sink = sink or Sink(TakeoverResult(0, True) if copies else None)
    if state is State.DESCRIBING:
        return table
    table.describe(SCHEMA)
    if state is State.PREPARING:
        return table
    table.queue.attach_streamed(50)
    table.notify()
    if state is State.PREPARED:
        return table
    table.promote(GRANTED_TS)
    if state is State.GRANTED:
        return table
    if state in (State.FAILED, State.STOPPED):
        step(table, sink)
        if state is State.FAILED:
            table.fail(TABLE_ERROR)
        else:
            table.remove()
        return table
    if state is State.TAKING_OVER:
        assert table.begin_step() == (TableInput.TAKE_OVER, State.GRANTED)
        return table
    step(table, sink)
    if state is State.COPYING:
        table.begin_copy(math.inf)
    elif state is State.RETAKING:
        table.set_epoch(replace(FENCE, assignment_epoch=2))
        assert table.begin_step() == (TableInput.TAKE_OVER, State.AWAITING_COPY)
    elif state in (State.WRITING, State.GATHERING, State.FAILING, State.REMOVING):
        assert table.begin_step() == (TableInput.WRITE, State.READY)
        if state is State.GATHERING:
            table.end_work(gathering(0.1))
        elif state is State.FAILING:
            table.fail(TABLE_ERROR)
        elif state is State.REMOVING:
            table.remove()
    return table


def happen(table: TableWork, what: TableInput) -> None:
    """Bring the input as the executor does; the beginnings and CAUGHT_UP without the look at what is due."""
    taken = lambda data: Writer(data.schema, GRANTED_TS, FENCE)  # noqa: E731
    ends = {
        TableInput.DONE: End(TableInput.DONE, taken),
        TableInput.COPY_DUE: copy_due(taken),
        TableInput.GATHER: gathering(0.1),
        TableInput.RETRY: retry_after(0.1, None, False, None),
        TableInput.ERROR: table.end_after(OperatingError("the worker's error")),
    }
    if what is TableInput.DESCRIBED:
        table.describe(SCHEMA)
    elif what is TableInput.GRANT:
        table.promote(GRANTED_TS)
    elif what is TableInput.REMOVE:
        table.remove()
    elif what is TableInput.FAIL:
        table.fail(OperatingError("another error"))
    elif what is TableInput.WANT_COPY:
        table.want_copy(ReloadNeededError("rewritten"))
    elif what is TableInput.COPY:
        table.begin_copy(math.inf)
    elif what in ends:
        table.end_work(ends[what])
    else:
        with table._lock:
            table._move(what)


def part(end_ts: int) -> Part:
    return Part(Relation(7, "public", "t", "d", ()), [b"x"], 100, Transaction(end_ts - 5, 0, end_ts), end_ts, True)


def test_the_compiled_arrays_are_the_matrix() -> None:
    """Each listed cell leads to its state, every other one is impossible."""
    for what, state in ALL_CELLS:
        then = CELLS.get((what, state))
        assert THEN[what, state] == (IMPOSSIBLE if then is None else then), (what.name, state.name)


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.name)
def test_each_state_is_reached(state: State) -> None:
    """The calls of the executor lead to every state, with data of its type and what it reports."""
    table = table_in(state)
    reported, data = STATES[state]
    assert (table.life.state, type(table.life.data)) == (state, data)
    assert table.state is (reported or TableState.REPLICATING)


@pytest.mark.parametrize(("what", "state"), sorted(CELLS), ids=lambda value: value.name)
def test_each_cell_on_a_table(what: TableInput, state: State) -> None:
    """A table in a state reaches the state of the cell; its queue is open for a writer only if changes are written."""
    table = table_in(state)
    happen(table, what)
    then = table.life.state
    assert then is CELLS[what, state]
    assert type(table.life.data) is STATES[then][1]
    assert not table.queue.is_open or then in ADVANCING
    if then in ENDED:
        assert (table.error is not None) == (then in (State.FAILING, State.FAILED))


@pytest.mark.parametrize(("what", "state"), [cell for cell in ALL_CELLS if cell not in CELLS], ids=lambda value: value.name)
def test_each_impossible_cell_names_itself(what: TableInput, state: State) -> None:
    """An input that cannot occur is a bug: it is raised, and the state stays."""
    table = table_in(state)
    with pytest.raises(ImpossibleTableInputError, match=f"{what.name} of a table in state {state.name}"):
        happen(table, what)
    assert table.life.state is state


def test_only_work_that_has_begun_can_end() -> None:
    """Busy states are entered by the three beginnings, from states that are not busy, and left for Stopped by an end."""
    begins = (TableInput.TAKE_OVER, TableInput.WRITE, TableInput.COPY)
    ends = (TableInput.DONE, TableInput.COPY_DUE, TableInput.GATHER, TableInput.RETRY, TableInput.ERROR)
    for (what, state), then in CELLS.items():
        if then in BUSY and state not in BUSY:
            assert what in begins
        if then is State.STOPPED and state is not then:
            assert (state in BUSY) == (what in ends)
        assert (what in ends) <= (state in BUSY)


def test_the_sink_is_written_only_with_an_accepted_fence() -> None:
    """The states in which the sink is written have the fence in their data, and it comes only from the end of a takeover."""
    assert [STATES[state][1] for state in (State.WRITING, State.COPYING)] == [Writer, Writer]
    makers = {
        rule.input
        for rule in RULES
        for state in rule.states
        if rule.then is not None and STATES[rule.then][1] is Writer and STATES[state][1] is Grant
    }
    assert makers == {TableInput.DONE, TableInput.COPY_DUE}


def test_the_queue_is_closed_in_stopped_only() -> None:
    """Each way to Stopped closes the queue, and nothing else does."""
    for what, state in CELLS:
        is_stopping = THEN[what, state] == State.STOPPED and state is not State.STOPPED
        assert (GATES[what, state] == Gate.CLOSE) == is_stopping


@pytest.mark.parametrize("state", [state for state in State if state not in ADVANCING], ids=lambda state: state.name)
def test_a_checkpoint_advances_only_where_all_is_written(state: State) -> None:
    """A table that is not written, or waits for a copy, keeps its last checkpoint although the shared stream is ahead."""
    table = table_in(state)
    before = table.checkpoint().checkpoint_ts
    table.queue.attach_streamed(50)
    assert table.checkpoint().checkpoint_ts == before
    assert before <= 1000 if state in (State.FAILING, State.FAILED, State.REMOVING, State.STOPPED) else before <= GRANTED_TS


def test_a_checkpoint_stays_while_another_copy_is_wanted() -> None:
    """From the request on, until the copy is durable; then it continues."""
    table, sink = table_in(State.READY), Sink()
    table.queue.push_streamed([part(300)], 100)
    assert table.checkpoint().checkpoint_ts == 295
    assert table.want_copy(ReloadNeededError("the table was rewritten"))
    table.queue.skip_to(400)
    assert table.checkpoint().checkpoint_ts == 295
    assert not step(table, sink)
    assert sink.calls == ["request copy"]
    assert table.life.state is State.AWAITING_COPY
    assert table.begin_copy(math.inf) is not None
    assert table.checkpoint().checkpoint_ts == 295
    table.end_copy(600)
    step(table, sink)
    assert table.checkpoint().checkpoint_ts == 1000


def test_a_checkpoint_does_not_pass_what_was_verified() -> None:
    """The bound of the control thread holds for a table that writes and for the last checkpoint of one that was removed."""
    table = table_in(State.READY)
    table.verified_ts = 700
    assert table.checkpoint().checkpoint_ts == 700
    table.remove()
    assert table.checkpoint().checkpoint_ts == 700


def test_a_copy_uses_a_snapshot_that_is_newer_than_its_request() -> None:
    """A snapshot that was requested before the table had to be copied (again) is not used for it."""
    table = table_in(State.AWAITING_COPY)
    data = table.life.data
    assert isinstance(data, Writer)
    assert table.begin_copy(data.copy_after) is None
    assert table.want_copy(ReloadNeededError("rewritten"))
    newer = table.life.data
    assert isinstance(newer, Writer)
    assert newer.copy_after > data.copy_after
    assert table.begin_copy(newer.copy_after) is None
    assert table.begin_copy(newer.copy_after + 0.001) is not None


def test_a_copy_that_is_wanted_during_a_copy_follows_it() -> None:
    """It is recorded at the sink when the present copy has ended."""
    table, sink = table_in(State.COPYING), Sink()
    assert table.want_copy(ReloadNeededError("rewritten"))
    table.end_copy(600)
    assert table.checkpoint().checkpoint_ts == GRANTED_TS
    step(table, sink)
    assert (sink.calls, table.life.state) == (["request copy"], State.AWAITING_COPY)


def test_a_request_that_the_sink_did_not_record_is_repeated() -> None:
    """A connection loss does not lose the reason why the table must be copied again."""
    table, sink = table_in(State.READY), Sink()
    table.want_copy(ReloadNeededError("rewritten"))
    sink.error = SinkUnavailableError("gone")
    step(table, sink)
    assert table.life.state is State.READY
    sink.error = None
    data = table.life.data
    assert isinstance(data, Writer)
    assert str(data.copy_wanted) == "rewritten"
    assert table.checkpoint().checkpoint_ts <= 1000


def test_without_first_copies_a_wanted_copy_is_an_error() -> None:
    """The error has the reason and the way out."""
    table = new_table(wants_snapshot=False)
    table.describe(SCHEMA)
    table.queue.attach_streamed(50)
    table.notify()
    table.promote(GRANTED_TS)
    sink = Sink()
    step(table, sink)
    table.want_copy(ReloadNeededError("it was rewritten"))
    step(table, sink)
    assert table.life.state is State.FAILED
    assert "it was rewritten; the values of old rows" in str(table.error)


def test_an_unsure_copy_is_taken_over_again_and_found_done() -> None:
    """The reply to the commit was lost: the sink is asked before the table is copied a second time."""
    table = table_in(State.COPYING)
    table.fail_copy(SinkUnavailableError("the connection was lost"))
    assert not table.waits_for_copy
    data = table.life.data
    assert isinstance(data, Writer)
    with table._lock:
        table._life = replace(table.life, data=replace(data, retry=replace(data.retry, at=0.0)))
    sink = Sink(TakeoverResult(600, False))
    assert step(table, sink)
    assert sink.calls == ["take over 1"]
    assert (table.life.state, table.queue.cursor) == (State.READY, 600)


def test_a_takeover_with_a_newer_epoch_may_find_that_a_copy_is_due() -> None:
    """Another process has requested a copy at the sink: the table is copied again."""
    table = table_in(State.READY)
    table.set_epoch(replace(FENCE, assignment_epoch=2))
    sink = Sink(TakeoverResult(0, True))
    step(table, sink)
    data = table.life.data
    assert isinstance(data, Writer)
    assert (table.life.state, data.fence.assignment_epoch) == (State.AWAITING_COPY, 2)


def test_what_was_written_during_a_removal_is_reported() -> None:
    """The worker that is still running moves the cursor: the last checkpoint has it, and the streams are let go at once."""
    services = Services()
    table = new_table(services=services)
    table.describe(SCHEMA)
    table.queue.attach_streamed(50)
    table.notify()
    table.promote(GRANTED_TS)
    step(table, Sink())
    table.queue.push_streamed([part(300)], 100)
    table.begin_step()
    batch = table.queue.take(10**6, 1000)
    assert batch is not None
    table.remove()
    assert (services.is_released, table.state) == (True, TableState.STOPPING)
    table.queue.confirm(batch)
    table.end_work(IDLE)
    assert (table.state, table.checkpoint().checkpoint_ts) == (TableState.STOPPED, 300)


def test_the_first_error_stays() -> None:
    """A stream fails the table while a worker writes; the worker's own end does not replace the reason."""
    table = table_in(State.WRITING)
    table.fail(TABLE_ERROR)
    table.end_work(table.end_after(LostCommitsError("the second error")))
    assert table.life.state is State.FAILED
    assert table.error is TABLE_ERROR
    with pytest.raises(OperatingError, match="the first error"):
        table.status(False)


def test_a_description_may_be_replaced_while_a_worker_writes() -> None:
    """The worker's end keeps the newer description."""
    table = table_in(State.WRITING)
    table.replace_schema(replace(SCHEMA, name="renamed"))
    table.end_work(IDLE)
    assert table.schema is not None
    assert table.schema.name == "renamed"
