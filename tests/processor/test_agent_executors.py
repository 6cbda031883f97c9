"""Executors that raise, lie, lose tables or do not stop: each trouble is one span's, and Stopped is always true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from processor import AgentConfig
from tablewire import Barrier, Checkpoint, Span, StatusColumns, TableState, TableStatus, Ts
from tablewire.errors import OperatingError
from tablewire.executor import BulkTableExecutor
from tablewire.testing import FakeTableExecutor

SPAN = Span(11)
OTHER = Span(12)


class PlainExecutor:
    """The five methods and nothing else, over a fake: what the smallest plug-in looks like."""

    def __init__(self) -> None:
        self.fake = FakeTableExecutor()

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        return self.fake.add_table_span(span, checkpoint, is_prepare)

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        return self.fake.is_add_table_span_finished(span, is_prepare)

    def remove_table_span(self, span: Span) -> bool:
        return self.fake.remove_table_span(span)

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        return self.fake.is_remove_table_span_finished(span)

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        return self.fake.get_table_span_status(span, collect_stat)


@pytest.fixture(params=["bulk", "plain"])
def both(request: pytest.FixtureRequest, make_world: Any) -> Any:
    """A world with an executor that has every optional form, and one that has none."""
    world = make_world(FakeTableExecutor() if request.param == "bulk" else PlainExecutor())
    world.script = world.executor if request.param == "bulk" else world.executor.fake
    return world


def test_a_plain_executor_is_enough(make_world: Any) -> None:
    """The whole life of a span without a single optional form."""
    world = make_world(PlainExecutor())
    assert not isinstance(world.executor, BulkTableExecutor)
    world.replicate(SPAN, OTHER)
    world.executor.fake.advance(300)
    world.beat()
    assert (world.owner.response.fenced, world.owner.known[SPAN].checkpoint_ts) == (False, 300)
    world.owner.remove(SPAN)
    world.step()
    assert (world.state(SPAN), world.owner.known[SPAN].checkpoint_ts) == (TableState.STOPPED, 300)
    assert world.state(OTHER) is TableState.REPLICATING


def test_scenario_20_a_background_failure_is_that_spans_alone(both: Any) -> None:
    """Removed, Stopped with its last checkpoint and the text; the others continue."""
    both.replicate(SPAN, OTHER)
    both.script.advance(300)
    both.beat()
    both.script.fail(SPAN, "the disk is full")
    both.beat()
    known = both.owner.known[SPAN]
    assert (known.state, known.checkpoint_ts) == (TableState.STOPPED, 300)
    assert "the disk is full" in known.error
    assert both.script.spans() == (OTHER,)
    both.script.advance(400)
    both.beat()
    assert both.owner.known[OTHER].checkpoint_ts == 400
    assert both.state(OTHER) is TableState.REPLICATING


def test_scenario_01_a_table_that_the_executor_has_lost_is_stopped(both: Any) -> None:
    """It does not stay Replicating for ever: Stopped, with the last checkpoint that was seen and the reason."""
    both.replicate(SPAN, OTHER)
    both.script.advance(300)
    both.beat()
    both.script.lose(SPAN)
    both.beat()
    known = both.owner.known[SPAN]
    assert (known.state, known.checkpoint_ts) == (TableState.STOPPED, 300)
    assert "absent" in known.error
    assert both.state(OTHER) is TableState.REPLICATING


@pytest.mark.parametrize(
    ("call", "settles_as"),
    [
        ("add_table_span", TableState.STOPPED),
        ("is_add_table_span_finished", TableState.STOPPED),
        ("set_assignment_epoch", TableState.STOPPED),
        ("get_table_span_status", TableState.REPLICATING),  # the bulk form does not need it
    ],
)
def test_a_call_that_raises_ends_the_span(world: Any, call: str, settles_as: TableState) -> None:
    """Whatever call it was, the executor has released the span before Stopped is reported."""
    world.fake.raise_at(call, SPAN, ValueError("no"))
    world.owner.prepare(SPAN, OTHER)
    world.owner.write(SPAN, OTHER)
    world.step()
    assert world.state(OTHER) is TableState.REPLICATING
    assert world.state(SPAN) is settles_as
    if settles_as is TableState.STOPPED:
        assert world.owner.known[SPAN].error == "ValueError: no"
        assert world.fake.spans() == (OTHER,)
        world.owner.prepare(SPAN, acked=world.owner.acked)  # and it may be tried again
        world.owner.write(SPAN, epoch=2)
        world.step()
        assert (world.state(SPAN), world.owner.known[SPAN].error) == (TableState.REPLICATING, "")


@pytest.mark.parametrize("call", ["remove_table_span", "is_remove_table_span_finished"])
def test_a_removal_that_raises_is_repeated(world: Any, call: str) -> None:
    """A write may still follow, so Stopped is not reported; the text is."""
    world.replicate(SPAN)
    world.fake.raise_at(call, SPAN, ValueError("not now"))
    world.fake.raise_at(call, SPAN, ValueError("nor now"))
    world.owner.remove(SPAN)
    world.step()
    known = world.owner.known[SPAN]
    assert (known.state, known.error) == (TableState.STOPPING, "ValueError: not now")
    for _ in range(2):
        world.step()
    assert world.state(SPAN) is TableState.STOPPED


def test_a_failed_span_that_does_not_stop_stays_stopping(world: Any) -> None:
    """An error does not make a span Stopped while the executor may still write."""
    world.replicate(SPAN)
    world.fake.hang("stop", SPAN)
    world.fake.fail(SPAN)
    for _ in range(3):
        world.beat()
        assert world.state(SPAN) is TableState.STOPPING
    world.fake.let_go("stop", SPAN)
    world.beat()
    assert world.state(SPAN) is TableState.STOPPED


def test_scenario_08_a_hung_preparation_can_be_taken_back(world: Any) -> None:
    """RemoveTable of a span whose preparation never ends works, and the others did not wait for it."""
    world.fake.hang("prepare", SPAN)
    world.owner.prepare(SPAN, OTHER)
    world.owner.write(OTHER)
    world.step()
    assert (world.state(SPAN), world.state(OTHER)) == (TableState.PREPARING, TableState.REPLICATING)
    world.owner.remove(SPAN)
    world.step()
    assert world.state(SPAN) is TableState.STOPPED


class _LyingExecutor(FakeTableExecutor):
    """Its bulk form returns what the test sets."""

    answer: object = None

    def get_table_span_statuses(self, spans: Sequence[Span]) -> StatusColumns:
        if isinstance(self.answer, Exception):
            raise self.answer
        return super().get_table_span_statuses(spans) if self.answer is None else self.answer  # type: ignore[return-value]


def _columns(n_spans: int, state: int = 3, errors: Sequence[tuple[int, str]] = ()) -> StatusColumns:
    ts = np.full(n_spans, 500, np.uint64)
    return StatusColumns(np.full(n_spans, state, np.uint8), ts, ts, ts, errors)


@pytest.mark.parametrize(
    "answer",
    [RuntimeError("bulk"), "nonsense", _columns(1), _columns(2, state=77), _columns(2, errors=[(9, "where?")])],
    ids=["raises", "no columns", "too short", "no such state", "error beyond"],
)
def test_a_bulk_form_that_fails_is_passed_by(make_world: Any, answer: object) -> None:
    """Each span is asked instead, so that no span pays for a fault of the bulk form or of another span."""
    world = make_world(_LyingExecutor())
    world.replicate(SPAN, OTHER)
    world.executor.answer = answer
    world.fake.advance(400)
    world.fake.fail(OTHER, "mine alone")
    world.beat()
    assert (world.state(SPAN), world.owner.known[SPAN].checkpoint_ts) == (TableState.REPLICATING, 400)
    assert (world.state(OTHER), world.owner.known[OTHER].error) == (TableState.STOPPED, "RuntimeError: mine alone")


class _OddExecutor(PlainExecutor):
    """Its statuses and last checkpoints are what the test sets."""

    status: object = None
    last: object = None

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        odd = self.status is not None and span == SPAN
        return self.status if odd else super().get_table_span_status(span, collect_stat)  # type: ignore[return-value]

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        answer = super().is_remove_table_span_finished(span)
        odd, self.last = self.last, None
        return answer if odd is None else odd  # type: ignore[return-value]


@pytest.mark.parametrize(
    "status",
    [
        "nothing",
        TableStatus(SPAN, TableState.REPLICATING, Checkpoint(-5, 3)),
        TableStatus(SPAN, TableState.REPLICATING, Checkpoint(2**64, 2**64)),
        TableStatus(SPAN, "replicating", Checkpoint(1, 1)),  # type: ignore[arg-type]
        TableStatus(SPAN, TableState.REPLICATING, Checkpoint(1, 1), error="it says so"),
        TableStatus(SPAN, TableState.STOPPED, Checkpoint(1, 1)),
    ],
    ids=["no status", "negative", "too large", "no state", "an error", "stopped by itself"],
)
def test_a_status_that_cannot_be_ends_that_span(make_world: Any, status: object) -> None:
    """An invalid status is an error of the span that it belongs to."""
    world = make_world(_OddExecutor())
    world.replicate(SPAN, OTHER)
    world.executor.status = status
    world.beat()
    assert (world.state(SPAN), world.state(OTHER)) == (TableState.STOPPED, TableState.REPLICATING)
    assert world.owner.known[SPAN].error


@pytest.mark.parametrize("last", [None, 7, (-1, True), ("x", True)])
def test_a_last_checkpoint_that_cannot_be_is_asked_for_again(make_world: Any, last: object) -> None:
    """The agent retries until the answer makes sense, and keeps what it has seen last."""
    world = make_world(_OddExecutor())
    world.replicate(SPAN)
    world.executor.last = last
    world.owner.remove(SPAN)
    for _ in range(3):
        world.step()
    assert (world.state(SPAN), world.owner.known[SPAN].checkpoint_ts) == (TableState.STOPPED, 100)


def test_a_checkpoint_never_goes_back(make_world: Any) -> None:
    """An executor whose status falls back does not pull the report back."""
    world = make_world(_OddExecutor())
    world.replicate(SPAN)
    world.executor.fake.advance(300)
    world.beat()
    world.executor.status = TableStatus(SPAN, TableState.REPLICATING, Checkpoint(150, 120))
    world.beat()
    assert (world.owner.known[SPAN].checkpoint_ts, world.owner.known[SPAN].resolved_ts) == (300, 300)


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


@pytest.mark.parametrize("error", [_Unprintable(), ValueError("x" * 5_000), ValueError("\ud800"), OperatingError()])
def test_any_exception_can_be_reported(world: Any, error: Exception) -> None:
    """Without a text, with a text that is too long, or with one that is no UTF-8."""
    world.fake.raise_at("add_table_span", SPAN, error)
    world.owner.prepare(SPAN)
    world.step()
    assert world.state(SPAN) is TableState.STOPPED
    assert 0 < len(world.owner.known[SPAN].error) <= 1_000


class _BarrierlessExecutor(FakeTableExecutor):
    def set_barrier(self, barrier: Barrier) -> None:
        if barrier.global_barrier_ts == 13:
            raise RuntimeError("unlucky")
        super().set_barrier(barrier)


def test_a_barrier_that_is_not_taken_stops_all(make_world: Any) -> None:
    """No table may write past a barrier that its executor does not know."""
    world = make_world(_BarrierlessExecutor())
    world.replicate(SPAN, OTHER)
    world.owner.heartbeat(barrier=13)
    assert world.step() == Barrier(13)
    assert {world.state(SPAN), world.state(OTHER)} == {TableState.STOPPED}
    assert "unlucky" in world.owner.known[SPAN].error


def test_closing_waits_for_an_executor_without_close(make_world: Any) -> None:
    """Every span is removed, and close returns only when each has stopped."""
    world = make_world(PlainExecutor())
    world.executor.fake._polls["stop"] = 3
    world.replicate(SPAN, OTHER)
    world.agent.close()
    assert world.executor.fake.spans() == ()


def test_closing_an_executor_that_does_not_stop_says_so(make_world: Any) -> None:
    """A clear error that names a span; another close continues where this one ended."""
    world = make_world(PlainExecutor(), config=AgentConfig(close_timeout_ms=20))
    world.replicate(SPAN, OTHER)
    world.executor.fake.hang("stop", SPAN)
    with pytest.raises(OperatingError, match="has not stopped 1 spans within 20 ms, among them 11"):
        world.agent.close()
    world.executor.fake.let_go("stop", SPAN)
    world.agent.close()
    assert world.executor.fake.spans() == ()


def test_an_executor_whose_close_raises_is_an_error_of_the_caller(make_world: Any) -> None:
    """No other agent may start on tables that may still be written."""

    class _Clinging(FakeTableExecutor):
        def close(self) -> None:
            raise RuntimeError("still busy")

    world = make_world(_Clinging())
    with pytest.raises(OperatingError, match="did not close: RuntimeError: still busy"):
        world.agent.close()
