"""Costs that grew with the number of tables in schedulers like this one: first scheduling,
heartbeats, and the search for the slowest table."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

import numpy as np
import pytest

from owner.core.captures import Capture
from owner.core.policies.planner import PlanInput
from owner.core.state import Core
from tablewire.model.columns import I64
from tablewire.model.messages import DispatchTableResponse, HeartbeatResponse, Message
from tablewire.model.progress import Watermark
from tablewire.model.spans import SpanBlock
from tablewire.model.splitter import HashRanges
from tablewire.model.states import QueryState, StallReason
from tablewire.testing import Deliver
from tests.owner.world import World


class HoleIn:
    """A splitter that omits a part of one table."""

    def __init__(self, table: int) -> None:
        self.table = table

    def split(self, table_ids: I64) -> SpanBlock:
        spans = HashRanges(2).split(table_ids)
        return SpanBlock.of([span for span in spans if span.table_id != self.table or span.end_key])


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_scenario_09_the_missing_table_is_reported(missing: int) -> None:
    """A part that no span covers holds the watermark back and is reported, for the first, a middle
    and the last table."""
    world = World(tables=[1, 2, 3])
    world.splitter = HoleIn(missing)
    world.scheduler = world.new_scheduler()
    world.run(6)
    assert world.watermark == Watermark(0, 0, 0, 0)
    slowest = world.snapshot.slowest
    assert slowest is not None
    assert slowest.table_id == missing


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_scenario_09_the_waiting_span_has_a_reason(missing: int) -> None:
    """A table that its executor cannot prepare is the one with a stall reason, whichever it is."""
    world = World(tables=[1, 2, 3])
    world.run(2)
    for executor in world.executors.values():
        executor.hang("prepare")
    world.tables = [1, 2, 3, 3 + missing]
    world.run(6)
    reasons = {view.span.table_id: view.stall_reason for view in world.snapshot.spans}
    assert reasons.pop(3 + missing) is StallReason.PREPARING


def calls_of_bring_up(tables: int) -> tuple[int, int]:
    """Return (Python calls of the owner's ticks, ticks) until all tables replicate: a measure that
    does not depend on the machine."""
    world = World(tables=range(1, tables + 1))
    calls: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        calls[event] += 1

    tick = world.scheduler.tick

    def counted_tick(*arguments: Any) -> Watermark:
        sys.setprofile(count)
        try:
            return tick(*arguments)
        finally:
            sys.setprofile(None)

    world.scheduler.tick = counted_tick  # type: ignore[method-assign]
    for ticks in range(1, 30):
        world.step()
        roles = world.snapshot.roles
        if len(roles.rows) == tables and np.all(roles.steady):
            return calls["call"] + calls["c_call"], ticks
    raise AssertionError(f"{tables} tables were not up after {ticks} ticks")


def test_scenario_28_first_scheduling_is_not_quadratic() -> None:
    """Sixteen times the tables take the same number of ticks, and far less than sixteen times the
    owner's calls."""
    calls_of_bring_up(64)  # exclude imports and compilation at first use
    few, ticks_few = calls_of_bring_up(256)
    many, ticks_many = calls_of_bring_up(4096)
    assert ticks_many == ticks_few
    assert many < 16 * few


def test_scenario_29_a_heartbeat_does_not_list_what_has_not_changed() -> None:
    """A thousand unchanged tables are not reported; one that changed is reported alone."""
    world = World(tables=range(1, 1001))
    world.settle()
    world.run(3)
    told = [0]

    def hook(_sender: str, _receiver: str, message: Message) -> Deliver:
        if isinstance(message.body, HeartbeatResponse | DispatchTableResponse):
            told[0] += len(message.body.reports)
        return Deliver.DELIVER

    world.network.hook = hook
    world.run(5)
    assert told == [0]
    span = world.snapshot.spans[500]
    assert span.primary is not None
    world.executors[span.primary].advance(900, span.span)
    world.run(5)
    assert told == [1]


def test_a_tick_does_not_look_at_every_span_that_was_moved() -> None:
    """After a drain, that would be many for as long as the cooldown."""
    world = World(tables=[1, 2, 3])
    world.settle()

    class Unread(dict[int, int]):
        def items(self) -> Any:
            raise AssertionError("a tick without load balancing has read the spans in cooldown")

    world.scheduler._core.tables.moved_ms = Unread({0: 1_000_000, 1: 1_000_000})
    world.run(5)


def test_open_moves_share_the_input_of_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the failures of all spans."""
    world, made = World(captures=["a", "b"], tables=range(1, 21)), Counter[str]()
    world.settle()
    world.executors["b"].hang("prepare")
    make = PlanInput.of

    def count(core: Core, ready: Sequence[Capture]) -> PlanInput:
        made["inputs"] += 1
        return make(core, ready)

    monkeypatch.setattr(PlanInput, "of", count)
    moves = [world.scheduler.move_table(view.span.table_id, "b") for view in world.snapshot.spans if view.primary == "a"]
    world.run(4)
    assert all(move.state in (QueryState.ACCEPTED, QueryState.PENDING) for move in moves)
    assert made["inputs"] <= 2 * 4
